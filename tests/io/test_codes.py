"""Codes on disk: round trips, the index against slow loops, and what is refused when writing and
reading.
"""

import errno
import hashlib
import io
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from assay.codes import Format
from assay.io.codes import StoredCodes, write_codes
from assay.io.codes.layout import TORCH_DTYPES, Dtype, SourcedCodes
from assay.io.codes.writer import KEPT
from assay.numerics.codes import SelectedCodes
from shards import edit_json

FORMATS: tuple[Format, ...] = ("dense", "sparse", "onehot")
KINDS = (*FORMATS, "varying")
"""The formats, and sparse codes whose rows vary in length."""
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
STORED = {"values": "<f4", "indices": "<i4", "lengths": "<i4", "error": "<f8"}
PROVENANCE = {
    "encoding": "pca-topk-00002",
    "layer": 23,
    "shards": "687023f7",
    "ridge": 1e-8,
    "mean": True,
    "none": None,
}


@dataclass(frozen=True)
class MadeCodes:
    """Whole arrays, cut into batches."""

    format: Format
    arrays: dict[str, Tensor]
    n_rows: int
    n_features: int
    k: int | None
    provenance: Mapping[str, Any] = field(default_factory=lambda: dict(PROVENANCE))
    made_from: str = ""
    fallback: Callable[[], SourcedCodes] | None = None
    rounded: Callable[[torch.dtype], SourcedCodes] | None = None

    def batches(self, batch_size: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        for first in range(start, len(next(iter(self.arrays.values()))), batch_size):
            yield {name: array[first : first + batch_size] for name, array in self.arrays.items()}

    def changed(self, **arrays: Tensor) -> "MadeCodes":
        return replace(self, arrays=self.arrays | arrays)


@dataclass(frozen=True)
class ListedCodes(MadeCodes):
    """Batches as they are given, of any sizes up to the batch size."""

    listed: tuple[dict[str, Tensor], ...] = ()

    def batches(self, batch_size: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        assert start == 0
        assert all(len(batch["error"]) <= batch_size for batch in self.listed)
        return iter(self.listed)


def make_codes(
    kind: str, n_rows: int = 11, n_features: int = 5, k: int = 2, seed: int = 0
) -> MadeCodes:
    generator = torch.Generator().manual_seed(seed)
    arrays = {"error": torch.rand(n_rows, generator=generator).double()}
    if kind == "onehot":
        arrays["indices"] = torch.randint(0, n_features, (n_rows,), generator=generator)
        return MadeCodes("onehot", arrays, n_rows, n_features, 1)
    values = torch.randn(n_rows, n_features, generator=generator)
    values[torch.rand(values.shape, generator=generator) < 0.3] = 0.0
    if kind == "dense":
        return MadeCodes("dense", arrays | {"values": values}, n_rows, n_features, n_features)
    order = values.abs().argsort(1, descending=True)[:, :k]
    values = values.gather(1, order)
    if kind == "varying":
        order = torch.where(values == 0, 0, order)
    return MadeCodes(
        "sparse",
        arrays | {"values": values, "indices": order},
        n_rows,
        n_features,
        None if kind == "varying" else k,
    )


def join(batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All rows of each array; rows that vary in length are padded to one."""
    listed = list(batches)
    joined = {}
    for name in listed[0]:
        wide = max(batch[name].shape[1] for batch in listed) if listed[0][name].ndim == 2 else 0
        parts = [
            torch.nn.functional.pad(b[name], (0, wide - b[name].shape[1])) if wide else b[name]
            for b in listed
        ]
        joined[name] = torch.cat(parts)
    return joined


def assert_same(
    found: StoredCodes, wanted: MadeCodes, batch_size: int, dtype: Dtype = "float32", start: int = 0
) -> None:
    joined = join(found.batches(batch_size, start))
    assert (found.format, found.n_rows, found.n_features) == (
        wanted.format,
        wanted.n_rows,
        wanted.n_features,
    )
    assert (found.k, found.fallback) == (wanted.k, None)
    assert found.provenance == wanted.provenance
    assert joined.keys() == wanted.arrays.keys()
    for name, whole in wanted.arrays.items():
        array = whole[start:]
        assert (
            joined[name].dtype
            == {"indices": torch.int64, "error": torch.float64, "values": torch.float32}[name]
        )
        if name == "values":
            array = array.to(TORCH_DTYPES[dtype]).float()
        if array.ndim == 2:
            array = array[:, : joined[name].shape[1]]
            assert not wanted.arrays["values"][start:, joined[name].shape[1] :].any()
        assert torch.equal(joined[name], array)


def count_used(code_format: Format, arrays: dict[str, Tensor], n_features: int) -> list[int]:
    """How many features are nonzero in 0, 1, 2-3, 4-7, ... rows: by loops over rows and features."""
    used = [0] * n_features
    for row in range(len(arrays["error"])):
        for feature in range(n_features):
            if code_format == "dense":
                used[feature] += bool(arrays["values"][row, feature] != 0)
            elif code_format == "onehot":
                used[feature] += bool(arrays["indices"][row] == feature)
            else:
                slots = zip(
                    arrays["indices"][row].tolist(), arrays["values"][row].tolist(), strict=True
                )
                used[feature] += any(index == feature and value != 0 for index, value in slots)
    octaves = [0] * (max(used).bit_length() + 1)
    for count in used:
        octave = 0
        while count >= 2**octave:
            octave += 1
        octaves[octave] += 1
    return octaves


def tree(folder: Path) -> dict[str, bytes]:
    """Everything under a folder, hidden files too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(params=KINDS)
def codes(request: pytest.FixtureRequest) -> MadeCodes:
    return make_codes(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sparse codes of 11 rows in files of 6 and 5."""
    path = tmp_path / "shard" / "pca-topk-00002" / "layer_23"
    write_codes(path, make_codes("sparse"), batch_size=3, rows_per_shard=6)
    return path


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(DTYPES),
    st.integers(0, 20),
    st.integers(1, 6),
    st.integers(1, 25),
    st.integers(1, 25),
    st.integers(1, 25),
    st.data(),
)
def test_round_trip(
    kind: str,
    dtype: Dtype,
    n_rows: int,
    n_features: int,
    batch_size: int,
    rows_per_shard: int,
    read_size: int,
    data: st.DataObject,
) -> None:
    codes = make_codes(
        kind,
        n_rows,
        n_features,
        data.draw(st.integers(1, n_features)),
        data.draw(st.integers(0, 9)),
    )
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "codes"
        write_codes(path, codes, batch_size=batch_size, rows_per_shard=rows_per_shard, dtype=dtype)
        stored = StoredCodes(path)
        assert stored.dtype == dtype
        assert [shard.rows for shard in stored.shards if shard.rows > rows_per_shard] == []
        if n_rows == 0:
            assert list(stored.batches(read_size)) == []
            return
        assert_same(stored, codes, read_size, dtype)
        assert_same(stored, codes, read_size, dtype)  # each call is a fresh pass
        start = data.draw(st.integers(0, n_rows - 1))
        assert_same(stored, codes, read_size, dtype, start)
        assert list(stored.batches(read_size, n_rows)) == []
        assert all(1 <= len(batch["error"]) <= read_size for batch in stored.batches(read_size))


def stored_arrays(codes: MadeCodes) -> list[dict[str, Any]]:
    """What the files of three shards of 4, 4 and 3 rows hold, by loops."""
    shards = []
    for start in (0, 4, 8):
        part: dict[str, Any] = {
            name: array[start : start + 4] for name, array in codes.arrays.items()
        }
        if codes.format == "sparse" and codes.k is None:
            rows = zip(part["values"].tolist(), part["indices"].tolist(), strict=True)
            entries = [[(v, i) for v, i in zip(*row, strict=True) if v] for row in rows]
            part["lengths"] = [len(row) for row in entries]
            part["values"] = [value for row in entries for value, _ in row]
            part["indices"] = [index for row in entries for _, index in row]
        shards.append(part)
    return shards


def test_files_are_what_the_docstring_says(tmp_path: Path, codes: MadeCodes) -> None:
    path = tmp_path / "new" / "layer_23"
    write_codes(path, codes, batch_size=2, rows_per_shard=5)  # rounded down to 4
    index = json.loads((path / "shards.json").read_text())
    arrays = stored_arrays(codes)
    names = arrays[0].keys()
    numbered = {f"{name}{number:06d}.bin" for name in names for number in range(3)}
    assert {file.name for file in path.iterdir()} == numbered | {"metadata.json", "shards.json"}
    assert [child.name for child in path.parent.iterdir()] == ["layer_23"]
    for number, start in enumerate((0, 4, 8)):
        part = {name: array[start : start + 4] for name, array in codes.arrays.items()}
        digests, n_bytes = {}, 0
        for name, array in arrays[number].items():
            raw = (path / f"{name}{number:06d}.bin").read_bytes()
            assert raw == np.asarray(array).astype(STORED[name]).tobytes()
            digests[name] = hashlib.sha256(raw).hexdigest()
            n_bytes += len(raw)
        assert index[number] == {
            "rows": len(part["error"]),
            "entries": (
                np.asarray(arrays[number]["values" if "values" in names else "indices"]).size
            ),
            "bytes": n_bytes,
            "sha256": digests,
            "utilization": count_used(codes.format, part, codes.n_features),
        }
    assert len(index) == 3
    assert json.loads((path / "metadata.json").read_text()) == {
        "schema_name": "assay.codes",
        "version": 2,
        "format": codes.format,
        "n_rows": 11,
        "n_features": 5,
        "k": codes.k,
        "dtype": "float32",
        "provenance": PROVENANCE,
    }


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(DTYPES),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_utilization_counts_features_by_the_rows_they_are_nonzero_in(
    kind: str, dtype: Dtype, n_rows: int, n_features: int, seed: int
) -> None:
    codes = make_codes(kind, n_rows, n_features, min(2, n_features), seed)
    if "values" in codes.arrays:
        codes = codes.changed(
            values=torch.where(codes.arrays["values"] == 0, -0.0, codes.arrays["values"])
        )
    with tempfile.TemporaryDirectory() as root:
        write_codes(Path(root) / "codes", codes, batch_size=7, dtype=dtype)
        (shard,) = StoredCodes(Path(root) / "codes").shards
    assert shard.utilization == count_used(codes.format, codes.arrays, n_features)
    assert sum(shard.utilization) == n_features


def test_codes_of_before_utilization_was_spelled_so_are_read(folder: Path) -> None:
    wanted = StoredCodes(folder).shards

    def respell(shards: list[dict[str, Any]]) -> None:
        for shard in shards:
            shard["utilisation"] = shard.pop("utilization")

    edit_json(folder / "shards.json", respell)
    assert StoredCodes(folder).shards == wanted


def test_a_file_never_has_more_rows_than_asked_for(tmp_path: Path) -> None:
    write_codes(tmp_path / "codes", make_codes("dense"), batch_size=8, rows_per_shard=3)
    assert [shard.rows for shard in StoredCodes(tmp_path / "codes").shards] == [3, 3, 3, 2]


def test_batches_of_any_size_and_empty_ones_are_written(tmp_path: Path) -> None:
    whole = make_codes("sparse")
    bounds = [0, 0, 1, 1, 1, 5, 11, 11]
    parts = ({n: a[i:j] for n, a in whole.arrays.items()} for i, j in pairwise(bounds))
    codes = ListedCodes("sparse", whole.arrays, 11, 5, 2, listed=tuple(parts))
    write_codes(tmp_path / "codes", codes, batch_size=6, rows_per_shard=6)
    assert_same(StoredCodes(tmp_path / "codes"), whole, 4)


def test_what_rides_along_is_left_out_and_other_dtypes_are_converted(tmp_path: Path) -> None:
    whole = make_codes("onehot")
    wider = whole.changed(
        values=torch.ones(11, 3),
        indices=whole.arrays["indices"].to(torch.int32),
        error=whole.arrays["error"].clone().requires_grad_(),
    )
    write_codes(tmp_path / "codes", wider, batch_size=4)
    assert_same(StoredCodes(tmp_path / "codes"), whole, 4)
    half = make_codes("dense").changed(
        values=torch.ones(11, 5, dtype=torch.bfloat16).T.contiguous().T
    )
    write_codes(tmp_path / "codes", half, batch_size=4)
    assert torch.equal(
        join(StoredCodes(tmp_path / "codes").batches(4))["values"], torch.ones(11, 5)
    )


def test_codes_can_be_copied_and_pickled(tmp_path: Path, folder: Path) -> None:
    stored = ForkingPickler.loads(ForkingPickler.dumps(StoredCodes(folder)))
    write_codes(tmp_path / "copy", stored, batch_size=4)
    assert_same(StoredCodes(str(tmp_path / "copy")), make_codes("sparse"), 3)


# --- what is refused when writing: nothing is left behind, and what was there stays as it was


def refused() -> dict[str, tuple[MadeCodes, str]]:
    dense, sparse, onehot = (make_codes(code_format) for code_format in FORMATS)

    def poisoned(codes: MadeCodes, name: str, value: float) -> MadeCodes:
        array = (
            codes.arrays[name].clone().double() if name != "indices" else codes.arrays[name].clone()
        )
        array[-1] = value
        return codes.changed(**{name: array})

    def unsorted(codes: MadeCodes) -> MadeCodes:
        return codes.changed(values=torch.tensor([[0.5, 1.0]]).repeat(11, 1))

    def without(codes: MadeCodes, name: str) -> MadeCodes:
        return replace(
            codes, arrays={other: array for other, array in codes.arrays.items() if other != name}
        )

    first, second, *_ = sparse.batches(3)
    uneven = ListedCodes(
        "sparse", {}, 11, 5, 2, listed=(first, {**second, "values": second["values"][:, :1]})
    )
    return {
        "codes that end early": (
            replace(dense, n_rows=12),
            "ended after 11 rows; 12 were promised",
        ),
        "no codes at all": (
            ListedCodes("sparse", {}, 3, 5, 2),
            "ended after 0 rows; 3 were promised",
        ),
        "more rows, within a batch": (
            replace(dense, n_rows=10),
            "rows 9 to 10 .* but 10 rows were promised",
        ),
        "more rows, in another batch": (
            replace(dense, n_rows=6),
            "rows 6 to 8 .* but 6 rows were promised",
        ),
        "more rows than none": (
            replace(onehot, n_rows=0),
            "rows 0 to 2 .* but 0 rows were promised",
        ),
        "NaN values": (
            poisoned(dense, "values", float("nan")),
            "rows 9 to 10 .*values holds a NaN or an infinity",
        ),
        "infinite values": (
            poisoned(sparse, "values", float("-inf")),
            "values holds a NaN or an infinity",
        ),
        "values too large for float32": (
            poisoned(dense, "values", 1e39),
            r"values reach 1e\+39, more than float32 holds",
        ),
        "NaN error": (poisoned(onehot, "error", float("nan")), "error holds a NaN or an infinity"),
        "an index below 0": (poisoned(onehot, "indices", -1), "indices are -1 to .*wanted 0 to 4"),
        "an index that is no feature": (
            poisoned(sparse, "indices", 5),
            "indices are . to 5; wanted 0 to 4",
        ),
        "no error": (without(sparse, "error"), "wanted error as well"),
        "no values": (without(sparse, "values"), "wanted values as well"),
        "no indices": (without(onehot, "indices"), "wanted indices as well"),
        "values too narrow": (
            replace(dense, n_features=6, k=6),
            r"values has shape \(3, 5\); wanted \(3, 6\)",
        ),
        "values of one feature": (
            dense.changed(values=torch.ones(11, 1)),
            r"shape \(3, 1\); wanted \(3, 5\)",
        ),
        "fewer indices": (
            sparse.changed(indices=torch.zeros(11, 1).long()),
            r"indices has shape \(3, 1\)",
        ),
        "flat error": (
            dense.changed(error=torch.ones(11, 1)),
            r"error has shape \(3, 1\); wanted \(3,\)",
        ),
        "another k in another batch": (
            uneven,
            r"rows 3 to 5 .*values has shape \(3, 1\); wanted \(3, 2\)",
        ),
        "more entries than features": (replace(sparse, n_features=1), "k is 2; wanted 1 to 1"),
        "a dense row of another length": (replace(dense, k=4), "k is 4; wanted 5 to 5"),
        "dense rows that vary": (replace(dense, k=None), "k is None; wanted 5 to 5"),
        "entries by rising magnitude": (unsorted(sparse), "not by falling magnitude"),
        "rows that vary, rising": (unsorted(make_codes("varying")), "not by falling magnitude"),
        "provenance that is no JSON": (
            replace(dense, provenance={"mean": torch.ones(2)}),
            "provenance",
        ),
        "provenance that is not finite": (
            replace(dense, provenance={"tol": float("nan")}),
            "provenance",
        ),
    }


@pytest.mark.parametrize("case", refused())
@pytest.mark.parametrize("older", [False, True])
def test_faulty_codes_leave_nothing_behind(tmp_path: Path, case: str, older: bool) -> None:
    codes, message = refused()[case]
    if older:
        write_codes(tmp_path / "codes", make_codes("onehot"), batch_size=4)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        write_codes(tmp_path / "codes", codes, batch_size=3, rows_per_shard=3)
    assert tree(tmp_path) == before
    assert [child.name for child in tmp_path.iterdir()] == ["codes"] * older


def test_faults_name_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "codes"))):
        write_codes(tmp_path / "codes", replace(make_codes("dense"), n_rows=12), batch_size=3)


@pytest.mark.parametrize(("name", "sizes"), [("batch_size", (0, 4)), ("rows_per_shard", (4, 0))])
def test_sizes_below_one_are_refused(tmp_path: Path, name: str, sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0: wanted at least 1"):
        write_codes(
            tmp_path / "codes", make_codes("dense"), batch_size=sizes[0], rows_per_shard=sizes[1]
        )


@pytest.mark.parametrize(
    ("dtype", "value", "fits"), [("float16", 7e4, False), ("bfloat16", 7e4, True)]
)
def test_a_value_too_large_for_the_dtype_is_refused(
    tmp_path: Path, dtype: Dtype, value: float, fits: bool
) -> None:
    codes = make_codes("dense").changed(values=torch.full((11, 5), value))
    if fits:
        write_codes(tmp_path / "codes", codes, batch_size=3, dtype=dtype)
        assert_same(StoredCodes(tmp_path / "codes"), codes, 3, dtype)
        return
    with pytest.raises(
        ValueError, match=r"rows 0 to 2 of the codes: values reach 7e\+04, more than float16 holds"
    ):
        write_codes(tmp_path / "codes", codes, batch_size=3, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["dense", "sparse", "varying"])
def test_what_is_below_half_of_float16s_smallest_is_stored_as_0_and_counted_as_0(
    tmp_path: Path, kind: str
) -> None:
    tiny = torch.tensor([[1.0, 2.0**-24, 2.0**-25, -(2.0**-30), 0.0]])
    wide = make_codes(kind, k=5).changed(values=tiny.repeat(11, 1))
    if kind != "dense":
        wide = wide.changed(indices=torch.arange(5).repeat(11, 1))
    entries: dict[Dtype, int] = {"float16": 2, "bfloat16": 4, "float32": 4}
    for dtype, kept in entries.items():
        write_codes(tmp_path / "codes", wide, batch_size=3, dtype=dtype)
        stored = StoredCodes(tmp_path / "codes")
        values = join(stored.batches(4))["values"]
        assert torch.equal(values[:, :kept], tiny[:, :kept].repeat(11, 1)), dtype
        assert not values[:, kept:].any()
        assert stored.shards[0].utilization == [5 - kept, 0, 0, 0, kept]
        assert stored.shards[0].entries == 11 * (kept if kind == "varying" else 5)


# --- the disk


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_predicted_size_is_what_is_written(
    tmp_path: Path, codes: MadeCodes, dtype: Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a" / "b" / "codes"
    write_codes(path, codes, batch_size=11, dtype=dtype)
    size = sum(file.stat().st_size for file in path.glob("*.bin"))
    shutil.rmtree(tmp_path / "a")
    for free in (size - 1, size):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda place, free=free: _usage(place, tmp_path, free)
        )
        if free == size:
            write_codes(path, codes, batch_size=11, dtype=dtype)
            return
        with pytest.raises(
            ValueError,
            match=rf"(?s){re.escape(str(path))}: .* take .* GB, .* GB are free.*MemoryDataset",
        ):
            write_codes(path, codes, batch_size=11, dtype=dtype)
        assert list(tmp_path.iterdir()) == []


def _usage(place: Path, wanted: Path, free: int) -> Any:
    assert Path(place) == wanted, "the nearest folder there is"
    return type("Usage", (), {"free": free})


def test_a_disk_too_small_gets_the_sparser_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sparse = make_codes("sparse")
    dense = replace(make_codes("dense"), fallback=lambda: sparse)
    size = 11 * (2 * 8 + 8)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: _usage(place, tmp_path, size))
    with caplog.at_level(logging.WARNING):
        write_codes(tmp_path / "codes", dense, batch_size=3)
    assert_same(StoredCodes(tmp_path / "codes"), sparse, 3)
    assert "take 3.08e-07 GB, 2.64e-07 GB are free; writing their sparser form" in caplog.text
    shutil.rmtree(tmp_path / "codes")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: _usage(place, tmp_path, size - 1))
    with pytest.raises(ValueError, match="sparse float32 codes of 11 rows take"):
        write_codes(tmp_path / "codes", dense, batch_size=3)
    assert list(tmp_path.iterdir()) == []


class Failing(MadeCodes):
    """Gives out six rows and fails."""

    error: BaseException = OSError("the disk of the shards went away")

    def batches(self, batch_size: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        yield from list(super().batches(batch_size, start))[:2]
        raise self.error


def partials(path: Path) -> list[Path]:
    return list(path.parent.glob(f".{path.name}.partial-*"))


@pytest.mark.parametrize(
    "error", [OSError("the disk went away"), KeyboardInterrupt(), SystemExit(), GeneratorExit()]
)
def test_an_interrupted_writer_leaves_what_is_whole_to_the_next(
    folder: Path, error: BaseException
) -> None:
    before = tree(folder)
    whole = make_codes("dense")
    failing = Failing("dense", whole.arrays, 11, 5, 5)
    object.__setattr__(failing, "error", error)
    with pytest.raises(type(error)):
        write_codes(folder, failing, batch_size=3, rows_per_shard=3)
    assert tree(folder) == before
    (partial,) = partials(folder)
    assert not (partial / "metadata.json").exists()
    asked: list[int] = []

    class Asked(MadeCodes):
        def batches(self, batch_size: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
            asked.append(start)
            return super().batches(batch_size, start)

    write_codes(folder, Asked("dense", whole.arrays, 11, 5, 5), batch_size=3, rows_per_shard=3)
    assert asked == [6]
    assert_same(StoredCodes(folder), whole, 4)
    assert partials(folder) == []
    assert not (folder / "progress.json").exists()


@pytest.mark.parametrize(
    "change", ["provenance", "made_from", "dtype", "batch_size", "rows_per_shard"]
)
def test_what_was_begun_of_other_codes_is_removed(tmp_path: Path, change: str) -> None:
    path = tmp_path / "codes"
    whole = make_codes("dense")
    with pytest.raises(OSError, match="went away"):
        write_codes(path, Failing("dense", whole.arrays, 11, 5, 5), batch_size=3, rows_per_shard=3)
    others: dict[str, dict[str, Any]] = {
        "provenance": {"provenance": {"layer": 24}},
        "made_from": {"made_from": "a shard that was touched"},
    }
    other = (
        replace(whole.changed(values=torch.ones(11, 5)), **others[change])
        if change in others
        else whole
    )
    options: dict[str, Any] = {"batch_size": 3, "rows_per_shard": 3}
    options |= (
        {"dtype": "float16"} if change == "dtype" else {change: 2} if change in options else {}
    )
    write_codes(path, other, **options)
    assert_same(StoredCodes(path), other, 4, options.get("dtype", "float32"))
    assert [child.name for child in tmp_path.iterdir()] == ["codes"]


@pytest.mark.parametrize(
    "damage",
    ["cut", "flipped", "missing", "no json", "no shards", "stranger", "folder", "folder as a shard", "folder as progress", "link"],
)  # fmt: skip
def test_what_was_begun_is_checked_before_it_is_gone_on_with(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, fresh = tmp_path / "codes", tmp_path / "fresh"
    whole = make_codes("dense")
    write_codes(fresh, whole, batch_size=3, rows_per_shard=3)
    with pytest.raises(OSError, match="went away"):
        write_codes(path, Failing("dense", whole.arrays, 11, 5, 5), batch_size=3, rows_per_shard=3)
    (partial,) = partials(path)
    values, progress = partial / "values000001.bin", partial / "progress.json"
    raw = bytearray(values.read_bytes())
    if damage == "cut":
        values.write_bytes(raw[:-1])
    elif damage == "flipped":
        raw[5] ^= 1
        values.write_bytes(raw)
    elif damage == "missing":
        values.unlink()
    elif damage == "no json":
        progress.write_text("[{")
    elif damage == "no shards":
        progress.unlink()
    elif damage == "link":
        (partial / "link").symlink_to("nowhere")
    elif damage.startswith("folder"):
        place = {"folder as a shard": values, "folder as progress": progress}.get(
            damage, partial / "left"
        )
        place.unlink(missing_ok=True)
        (place / "below").mkdir(parents=True)
        (place / "below" / "a.txt").write_text("left by hand")
    else:
        (partial / "values000007.bin").write_text("left by hand")
    write_codes(path, whole, batch_size=3, rows_per_shard=3)
    assert tree(path) == tree(fresh)
    assert ("of no use" in caplog.text) == (
        damage not in ("no shards", "stranger", "folder", "link")
    )


class Slow(MadeCodes):
    """Takes its time over each batch."""

    def batches(self, batch_size: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        for batch in super().batches(batch_size, start):
            time.sleep(0.002)
            yield batch


def in_a_child(work: Callable[[], None]) -> int:
    """Start `work` in a process of its own and give its number; it ends with status 0, or 1 for any
    error.
    """
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("kind", ["dense", "varying"])
def test_kill_9_at_20_random_moments_loses_no_whole_shard_and_changes_no_byte(
    tmp_path: Path, kind: str
) -> None:
    made = make_codes(kind, n_rows=200)
    fresh, path = tmp_path / "fresh", tmp_path / "codes"
    write_codes(fresh, made, batch_size=2, rows_per_shard=6)
    slow = Slow(made.format, made.arrays, 200, 5, made.k)

    def write() -> None:
        write_codes(path, slow, batch_size=2, rows_per_shard=6)

    chance = random.Random(0)
    kills, kept = 0, set()
    while kills < 20:
        child = in_a_child(write)
        time.sleep(chance.uniform(0.005, 0.2))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if path.exists():  # it was quicker: what is there must be whole; begin anew
            assert tree(path) == tree(fresh)
            shutil.rmtree(path)
        if os.WIFSIGNALED(status):
            kills += 1
            with pytest.raises(FileNotFoundError):
                StoredCodes(path)
            kept.update(
                len(json.loads(p.read_text()))
                for p in path.parent.glob(f".{path.name}.partial-*/progress.json")
            )
    assert len(kept) > 5, "the kills hit many places"
    child = in_a_child(write)
    assert os.waitpid(child, 0)[1] == 0
    assert tree(path) == tree(fresh)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["codes", "fresh"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
# A write fails; the last of it fails, as the files are closed.
@pytest.mark.parametrize("n_features", [4000, 1000])
def test_a_disk_that_is_full_after_all_leaves_the_older_codes_and_what_is_whole(
    tmp_path: Path, n_features: int
) -> None:
    path = tmp_path / "codes"
    write_codes(path, make_codes("onehot"), batch_size=4)
    before = tree(path)
    large = make_codes("dense", n_rows=6, n_features=n_features)
    heard, said = os.pipe()

    def write_with_little_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        room = n_features * 14  # a shard's four rows are 16 bytes a feature
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        try:
            write_codes(path, large, batch_size=1, rows_per_shard=4)
        except OSError as error:
            os.write(said, str(error).encode())
            os._exit(error.errno or 1)

    assert (
        os.waitstatus_to_exitcode(os.waitpid(in_a_child(write_with_little_room), 0)[1])
        == errno.EFBIG
    )
    os.close(said)
    with open(heard, "rb") as pipe:
        assert pipe.read().decode() == f"[Errno {errno.EFBIG}] File too large{KEPT}: '{path}'"
    assert tree(path) == before
    assert len(partials(path)) == 1
    write_codes(path, large, batch_size=1, rows_per_shard=4)
    assert_same(StoredCodes(path), large, 4)
    assert partials(path) == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_of_two_writers_at_once_the_second_is_refused(tmp_path: Path) -> None:
    path, refused = tmp_path / "codes", tmp_path / "refused"
    made = make_codes("dense", n_rows=200)

    class Waiting(MadeCodes):
        """Goes no further before the other was refused."""

        def batches(self, batch_size: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
            for batch in super().batches(batch_size, start):
                yield batch
                while not refused.exists():
                    time.sleep(0.001)

    child = in_a_child(
        lambda: write_codes(path, Waiting("dense", made.arrays, 200, 5, 5), batch_size=1)
    )
    try:
        # The lock's file is there before the lock is held; the folder is made by who holds it.
        while not any(found.is_dir() for found in partials(path)):
            time.sleep(0.001)
        with pytest.raises(ValueError, match="is being written by another live process"):
            write_codes(path, made, batch_size=1)
    finally:
        refused.touch()
    assert os.waitpid(child, 0)[1] == 0
    assert_same(StoredCodes(path), made, 50)


def test_an_older_folder_is_replaced_whole(folder: Path) -> None:
    (folder / "stranger").write_text("left by hand")
    codes = make_codes("onehot", n_rows=4, seed=7)
    write_codes(folder, codes, batch_size=3)
    assert {file.name for file in folder.iterdir()} == {
        "metadata.json",
        "shards.json",
        "indices000000.bin",
        "error000000.bin",
    }
    assert_same(StoredCodes(folder), codes, 4)
    assert [child.name for child in folder.parent.iterdir()] == [folder.name]


def test_failing_to_move_in_leaves_the_older_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename, calls = tree(folder), os.rename, []

    def fail_once(source: Path, target: Path) -> None:
        calls.append(Path(target).name)
        if len(calls) == 2:  # the older folder is aside by now, and the new one would move in
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(OSError, match="no"):
        write_codes(folder, make_codes("onehot"), batch_size=3)
    assert calls[1:] == [folder.name, folder.name]
    assert tree(folder) == before
    monkeypatch.undo()
    # All is whole.
    write_codes(
        folder, replace(make_codes("onehot"), arrays={"indices": torch.empty(11)}), batch_size=3
    )
    assert_same(StoredCodes(folder), make_codes("onehot"), 4)
    assert partials(folder) == []


def test_codes_may_be_written_over_themselves(folder: Path) -> None:
    write_codes(folder, StoredCodes(folder), batch_size=2)
    assert_same(StoredCodes(folder), make_codes("sparse"), 5)


# --- what is refused when reading


def cut(path: Path, n_bytes: int) -> None:
    os.truncate(path, path.stat().st_size + n_bytes)


@pytest.mark.parametrize(
    "name",
    ["metadata.json", "shards.json", "values000001.bin", "indices000000.bin", "error000001.bin"],
)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(folder / name))):
        StoredCodes(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none"))):
        StoredCodes(tmp_path / "none")


@pytest.mark.parametrize("name", ["values000001.bin", "indices000000.bin", "error000001.bin"])
@pytest.mark.parametrize("change", [-4, -1, 1, 40])
def test_a_cut_or_overlong_file_is_named(folder: Path, name: str, change: int) -> None:
    size = (folder / name).stat().st_size
    cut(folder / name, change)
    with pytest.raises(
        ValueError,
        match=rf"{re.escape(str(folder / name))} has {size + change} bytes; wanted {size}",
    ):
        StoredCodes(folder)


@pytest.mark.parametrize("name", ["metadata.json", "shards.json"])
@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"3", b"{}", b'["a"]', b'[{"rows": 11}]'],
)
def test_bad_json_is_named(folder: Path, name: str, text: bytes) -> None:
    (folder / name).write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        StoredCodes(folder)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"version": 1}, "assay.codes version 1"),
        ({"version": 3}, "assay.codes version 3"),
        ({"version": "2"}, "assay.codes version 2"),
        ({"schema_name": "saev.codes"}, "saev.codes version 2"),
    ],
)
def test_another_version_or_schema_is_refused_by_name(
    folder: Path, change: dict[str, Any], found: str
) -> None:
    edit_json(folder / "metadata.json", lambda value: value | change)
    with pytest.raises(
        ValueError, match=rf"holds {found}; this reader wants assay.codes version 2"
    ):
        StoredCodes(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "csr"},
        {"n_rows": -1},
        {"n_rows": 11.0},
        {"n_features": 0},
        {"dtype": "float64"},
        {"k": 0},
        {"k": 6},
        {"version": 2.0},
        {"stranger": 1},
        {"provenance": {"nested": {"a": 1}}},
    ],
)
def test_metadata_is_validated(folder: Path, change: dict[str, Any]) -> None:
    edit_json(folder / "metadata.json", lambda value: value | change)
    with pytest.raises(ValueError, match=re.escape(str(folder / "metadata.json"))):
        StoredCodes(folder)


@pytest.mark.parametrize(("code_format", "k"), [("dense", 4), ("onehot", 2)])
def test_k_must_fit_the_format(tmp_path: Path, code_format: Format, k: int) -> None:
    write_codes(tmp_path / "codes", make_codes(code_format), batch_size=4)
    edit_json(tmp_path / "codes" / "metadata.json", lambda value: value | {"k": k})
    with pytest.raises(ValueError, match=f"k is {k}; wanted"):
        StoredCodes(tmp_path / "codes")


@pytest.mark.parametrize("n_rows", [10, 12])
def test_rows_must_be_those_of_the_metadata(folder: Path, n_rows: int) -> None:
    edit_json(folder / "metadata.json", lambda value: value | {"n_rows": n_rows})
    with pytest.raises(
        ValueError,
        match=rf"{re.escape(str(folder))}.*shards.json has 11 rows, metadata.json {n_rows}",
    ):
        StoredCodes(folder)


def test_a_shard_of_other_rows_is_refused(folder: Path) -> None:
    edit_json(
        folder / "shards.json", lambda shards: [shards[0] | {"rows": 5}, shards[1] | {"rows": 6}]
    )
    with pytest.raises(ValueError, match=r"shard 0 has 12 entries, wanted 5 rows x 2"):
        StoredCodes(folder)
    both = [{"rows": 5, "entries": 10}, {"rows": 6, "entries": 12}]
    edit_json(
        folder / "shards.json",
        lambda shards: [shard | more for shard, more in zip(shards, both, strict=True)],
    )
    with pytest.raises(ValueError, match=r"values000000.bin has 48 bytes; wanted 40"):
        StoredCodes(folder)


def test_checksums_must_be_those_of_the_files(folder: Path) -> None:
    edit_json(
        folder / "shards.json",
        lambda shards: [shard | {"sha256": {"values": "0"}} for shard in shards],
    )
    with pytest.raises(
        ValueError,
        match=r"shard 0 has checksums of \['values'\], wanted \['error', 'indices', 'values'\]",
    ):
        StoredCodes(folder)


@pytest.mark.parametrize("name", ["values", "indices", "lengths", "error"])
def test_a_bit_that_has_flipped_is_found_before_the_shards_last_batch(
    tmp_path: Path, name: str
) -> None:
    write_codes(
        tmp_path / "codes", make_codes("varying", n_rows=40, n_features=200, k=9), batch_size=8
    )
    file = tmp_path / "codes" / f"{name}000000.bin"
    raw = bytearray(file.read_bytes())
    raw[0] ^= 1  # in the first row; what is read stays finite and a feature
    file.write_bytes(raw)
    seen = []
    with pytest.raises(
        ValueError,
        match=rf"{re.escape(str(file))} has SHA-256 [0-9a-f]+, wanted [0-9a-f]+: it was changed",
    ):
        seen.extend(StoredCodes(tmp_path / "codes").batches(10))
    assert len(seen) == (0 if name == "lengths" else 3)


@pytest.mark.parametrize("lengths", [[2] * 10 + [-1], [2] * 10 + [6], [2] * 10 + [3]])
def test_lengths_that_cannot_be_are_refused(tmp_path: Path, lengths: list[int]) -> None:
    path = tmp_path / "codes"
    codes = make_codes("varying").changed(
        values=torch.ones(11, 2), indices=torch.tensor([[0, 1]]).repeat(11, 1)
    )
    write_codes(path, codes, batch_size=11)
    raw = np.array(lengths, "<i4").tobytes()
    (path / "lengths000000.bin").write_bytes(raw)
    digest = hashlib.sha256(raw).hexdigest()
    edit_json(
        path / "shards.json",
        lambda shards: [s | {"sha256": s["sha256"] | {"lengths": digest}} for s in shards],
    )
    with pytest.raises(ValueError, match=r"lengths000000.bin: lengths .* wanted 0 to 5, in all 22"):
        list(StoredCodes(path).batches(4))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


FIELDS = (
    *("schema_name", "version", "format", "n_rows", "n_features", "k", "dtype", "provenance"),
    *("rows", "entries", "bytes", "sha256", "utilization"),
)
JSON_FILES = ("metadata.json", "shards.json")

changes = st.one_of(
    st.tuples(st.just("whole"), json_values),
    st.tuples(st.just("field"), st.sampled_from(FIELDS), json_values),
    st.tuples(st.just("byte"), st.integers(0, 2000), st.integers(0, 255)),
    st.tuples(st.just("size"), st.integers(0, 2000)),
    st.tuples(st.just("link"), st.sampled_from(["shards.json", "../outside", "nowhere", "."])),
)


def damage(file: Path, kind: str, *how: Any) -> None:
    """Change a file; a field that it lacks is added."""
    raw = bytearray(file.read_bytes())
    if kind == "whole":
        file.write_text(json.dumps(how[0]))
    elif kind == "field":
        value = json.loads(raw)
        (value[-1] if isinstance(value, list) else value)[how[0]] = how[1]
        file.write_text(json.dumps(value))
    elif kind == "byte":
        raw[how[0] % len(raw)] = how[1]
        file.write_bytes(raw)
    elif kind == "size":
        os.truncate(file, how[0])
    else:
        (file.parent.parent / "outside").write_bytes(raw)
        file.unlink()
        file.symlink_to(how[0])


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(KINDS), st.dictionaries(st.sampled_from(JSON_FILES), changes, min_size=1))
@example("sparse", {"metadata.json": ("field", "n_features", 10**30)})
@example("sparse", {"metadata.json": ("field", "k", 10**30)})
@example("varying", {"metadata.json": ("field", "n_features", 2**31)})
@example(
    "onehot",
    {"metadata.json": ("field", "n_rows", 10**30), "shards.json": ("field", "rows", 10**30)},
)
@example("varying", {"shards.json": ("field", "entries", 10**30)})
@example("dense", {"shards.json": ("field", "bytes", 10**30)})
@example("dense", {"shards.json": ("field", "utilization", [10**30])})
@example("dense", {"metadata.json": ("field", "provenance", {"tol": 10**400})})
@example("dense", {"metadata.json": ("whole", "\ud800")})
@example("dense", {"metadata.json": ("size", 2**40)})
@example("dense", {"shards.json": ("size", 2**40)})
@example("dense", {"shards.json": ("link", "../outside")})
@example("sparse", {"values000000.bin": ("link", "../outside")})
@example("sparse", {"values000000.bin": ("size", 2**40)})
@example("varying", {"lengths000001.bin": ("link", ".")})
def test_fuzz_raises_only_the_two_errors(kind: str, damaged: dict[str, tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "codes"
        write_codes(path, make_codes(kind), batch_size=3, rows_per_shard=6)
        for name, change in damaged.items():
            damage(path / name, *change)
        message = str(path)
        try:
            list(StoredCodes(path).batches(4))
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
        assert str(path) in message
        assert len(message) < 2000


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("metadata.json", ("field", "n_features", 2**31), "n_features: .*less than or equal to 2147483647"),
        ("metadata.json", ("field", "k", 10**30), "k: .*less than or equal to 2147483647"),
        ("metadata.json", ("field", "n_rows", 2**40 + 1), "n_rows: .*less than or equal to 1099511627776"),
        ("shards.json", ("field", "rows", 2**40 + 1), "1.rows: .*less than or equal to 1099511627776"),
        ("shards.json", ("field", "bytes", 161), r"shard 1 has bytes 161, wanted 120"),
        ("shards.json", ("field", "utilization", [4]), "shard 1 has a utilization of 4 features in 1 classes, wanted 5"),
        ("shards.json", ("field", "utilization", [1] * 5), "5 features in 5 classes, wanted 5 in at most 4"),
        ("shards.json", ("field", "utilization", [6, -1]), "1.utilization.1: .*found -1"),
        ("metadata.json", ("size", 2**26 + 1), "metadata.json has 67108865 bytes, wanted at most 67108864"),
        ("shards.json", ("size", 2**40), "shards.json has 1099511627776 bytes, wanted at most 67108864"),
        ("metadata.json", ("link", "../outside"), "metadata.json leads out of the folder"),
        ("shards.json", ("link", "../outside"), "shards.json leads out of the folder"),
        ("values000000.bin", ("link", "../outside"), "values000000.bin leads out of the folder"),
        ("error000001.bin", ("link", "."), "error000001.bin leads out of the folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_on_opening(
    folder: Path, name: str, change: tuple[Any, ...], message: str
) -> None:
    damage(folder / name, *change)
    with pytest.raises(ValueError, match=message) as caught:
        StoredCodes(folder)
    assert str(folder / name) in str(caught.value)


def test_rows_that_vary_have_no_more_entries_than_there_are_features(tmp_path: Path) -> None:
    write_codes(tmp_path / "codes", make_codes("varying"), batch_size=11)
    edit_json(tmp_path / "codes" / "shards.json", lambda shards: [shards[0] | {"entries": 56}])
    with pytest.raises(ValueError, match=r"shard 0 has 56 entries, wanted at most 11 rows x 5"):
        StoredCodes(tmp_path / "codes")


def test_a_link_to_the_folder_or_within_it_is_legal(folder: Path) -> None:
    (folder / "values000000.bin").rename(folder / "moved.bin")
    (folder / "values000000.bin").symlink_to("moved.bin")
    (folder.parent / "link").symlink_to(folder)
    assert_same(StoredCodes(folder.parent / "link"), make_codes("sparse"), 4)


@pytest.mark.parametrize("when", ["opened", "read", "too large"])
def test_a_file_that_cannot_be_read_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    stored, path_open = StoredCodes(folder), Path.open

    class Bad(io.BytesIO):
        name = str(folder / "values000000.bin")

        def readinto(self, _: Any) -> int:
            raise OSError(errno.EIO, "Input/output error") if when == "read" else MemoryError

    def fail(self: Path, mode: str) -> Any:
        if self.name != "values000000.bin":
            return path_open(self, mode)
        if when == "opened":
            raise PermissionError(errno.EACCES, "Permission denied")
        return Bad()

    monkeypatch.setattr(Path, "open", fail)
    said = {
        "opened": "cannot be opened: Permission",
        "read": "cannot be read: Input/output",
        "too large": ": 4 rows are",
    }
    with pytest.raises(
        ValueError, match=re.escape(str(folder / "values000000.bin")) + f" ?{said[when]}"
    ):
        list(stored.batches(4))


def test_a_file_cut_or_removed_after_opening_is_refused(folder: Path) -> None:
    stored = StoredCodes(folder)
    cut(folder / "error000001.bin", -8)
    with pytest.raises(ValueError, match=r"error000001.bin ended early"):
        list(stored.batches(4))
    (folder / "values000000.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"values000000.bin"):
        list(stored.batches(4))


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("values", np.float32("nan"), "values holds a NaN or an infinity"),
        ("error", np.float64("inf"), "error holds a NaN or an infinity"),
        ("indices", np.int32(5), "indices are . to 5; wanted 0 to 4"),
        ("indices", np.int32(-1), "indices are -1 to .; wanted 0 to 4"),
    ],
)
def test_damaged_numbers_are_refused(
    folder: Path, name: str, number: np.generic, message: str
) -> None:
    file = folder / f"{name}000001.bin"
    raw = bytearray(file.read_bytes())
    raw[-number.itemsize :] = number.tobytes()
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}, rows 3 to 4: {message}"):
        list(StoredCodes(folder).batches(3))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_reading_wants_a_batch_size_and_a_row_at_once(folder: Path, batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}"):
        StoredCodes(folder).batches(batch_size)
    for start in (-1, 12):
        with pytest.raises(ValueError, match=f"start is {start}: wanted 0 to 11"):
            StoredCodes(folder).batches(3, start)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_seen_wherever_a_pass_starts_and_by_a_probe_whose_first_patches_are_void(
    tmp_path: Path, kind: str
) -> None:
    write_codes(tmp_path / "codes", make_codes(kind), batch_size=3, rows_per_shard=12)
    whole = list(StoredCodes(tmp_path / "codes").batches(3))
    (name,) = (each for each in ("values", "indices") if (kind == "onehot") == (each == "indices"))
    file = tmp_path / "codes" / f"{name}000000.bin"
    raw = bytearray(file.read_bytes())
    # The last bit of a number: another one of the right kind; for the one-hot codes, another
    # feature.
    raw[0] ^= 1
    file.write_bytes(raw)
    kept = torch.arange(11) > 4
    for start in (0, 1, 5, 10):
        with pytest.raises(
            ValueError, match=f"{re.escape(str(file))} has SHA-256 .*changed after it was written"
        ):
            list(StoredCodes(tmp_path / "codes").batches(3, start))
    with pytest.raises(
        ValueError, match=f"{re.escape(str(file))} has SHA-256 .*changed after it was written"
    ):
        list(SelectedCodes(StoredCodes(tmp_path / "codes"), kept).batches(3))
    raw[0] ^= 1
    file.write_bytes(raw)
    found = [
        batch["error"] for batch in SelectedCodes(StoredCodes(tmp_path / "codes"), kept).batches(3)
    ]
    assert torch.equal(torch.cat(found), torch.cat([batch["error"] for batch in whole])[kept])

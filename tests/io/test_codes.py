"""Codes on disk: round trips, the index against slow loops, and what is refused when writing and reading."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from assay.io.codes import Codes, Format, StoredCodes, write_codes

FORMATS: tuple[Format, ...] = ("dense", "sparse", "onehot")
STORED = {"values": "<f4", "indices": "<i4", "error": "<f4"}
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
    provenance: Mapping[str, Any] = field(default_factory=lambda: dict(PROVENANCE))

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(next(iter(self.arrays.values()))), batch_size):
            yield {name: array[start : start + batch_size] for name, array in self.arrays.items()}

    def changed(self, **arrays: Tensor) -> "MadeCodes":
        return replace(self, arrays=self.arrays | arrays)


@dataclass(frozen=True)
class ListedCodes(MadeCodes):
    """Batches as they are given, of any sizes up to the batch size."""

    listed: tuple[dict[str, Tensor], ...] = ()

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        assert all(len(batch["error"]) <= batch_size for batch in self.listed)
        return iter(self.listed)


def make_codes(code_format: Format, n_rows: int = 11, n_features: int = 5, k: int = 2, seed: int = 0) -> MadeCodes:
    generator = torch.Generator().manual_seed(seed)
    arrays = {"error": torch.rand(n_rows, generator=generator)}
    if code_format == "dense":
        arrays["values"] = torch.randn(n_rows, n_features, generator=generator)
    elif code_format == "sparse":
        arrays["values"] = torch.randn(n_rows, k, generator=generator)
        arrays["indices"] = torch.rand(n_rows, n_features, generator=generator).argsort(1)[:, :k]
    else:
        arrays["indices"] = torch.randint(0, n_features, (n_rows,), generator=generator)
    if "values" in arrays:
        arrays["values"][torch.rand(arrays["values"].shape, generator=generator) < 0.3] = 0.0
    return MadeCodes(code_format, arrays, n_rows, n_features)


def join(batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    listed = list(batches)
    return {name: torch.cat([batch[name] for batch in listed]) for name in listed[0]}


def assert_same(found: Codes, wanted: MadeCodes, batch_size: int) -> None:
    joined = join(found.batches(batch_size))
    assert (found.format, found.n_rows, found.n_features) == (wanted.format, wanted.n_rows, wanted.n_features)
    assert found.provenance == wanted.provenance
    assert joined.keys() == wanted.arrays.keys()
    for name, array in wanted.arrays.items():
        assert joined[name].dtype == (torch.int64 if name == "indices" else torch.float32)
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
                slots = zip(arrays["indices"][row].tolist(), arrays["values"][row].tolist(), strict=True)
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
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    changed = change(value)
    path.write_text(json.dumps(value if changed is None else changed))


@pytest.fixture(params=FORMATS)
def codes(request: pytest.FixtureRequest) -> MadeCodes:
    return make_codes(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sparse codes of 11 rows in files of 6 and 5."""
    path = tmp_path / "shard" / "pca-topk-00002" / "layer_23"
    write_codes(path, make_codes("sparse"), batch_size=3, rows_per_shard=6)
    return path


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(FORMATS),
    st.integers(0, 20),
    st.integers(1, 6),
    st.integers(1, 25),
    st.integers(1, 25),
    st.integers(1, 25),
    st.data(),
)
def test_round_trip(
    code_format: Format,
    n_rows: int,
    n_features: int,
    batch_size: int,
    rows_per_shard: int,
    read_size: int,
    data: st.DataObject,
) -> None:
    codes = make_codes(
        code_format, n_rows, n_features, data.draw(st.integers(1, n_features)), data.draw(st.integers(0, 9))
    )
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "codes"
        write_codes(path, codes, batch_size=batch_size, rows_per_shard=rows_per_shard)
        stored = StoredCodes(path)
        assert [shard.rows for shard in stored.shards if shard.rows > rows_per_shard] == []
        if n_rows == 0:
            assert list(stored.batches(read_size)) == []
            return
        assert_same(stored, codes, read_size)
        assert_same(stored, codes, read_size)  # each call is a fresh pass
        assert all(1 <= len(batch["error"]) <= read_size for batch in stored.batches(read_size))


def test_files_are_what_the_docstring_says(tmp_path: Path, codes: MadeCodes) -> None:
    path = tmp_path / "new" / "layer_23"
    write_codes(path, codes, batch_size=2, rows_per_shard=5)  # rounded down to 4
    index = json.loads((path / "shards.json").read_text())
    names = codes.arrays.keys()
    numbered = {f"{name}{number:06d}.bin" for name in names for number in range(3)}
    assert {file.name for file in path.iterdir()} == numbered | {"metadata.json", "shards.json"}
    assert [child.name for child in path.parent.iterdir()] == ["layer_23"]
    for number, start in enumerate((0, 4, 8)):
        part = {name: array[start : start + 4] for name, array in codes.arrays.items()}
        digests, n_bytes = {}, 0
        for name, array in part.items():
            raw = (path / f"{name}{number:06d}.bin").read_bytes()
            assert raw == array.numpy().astype(STORED[name]).tobytes()
            digests[name] = hashlib.sha256(raw).hexdigest()
            n_bytes += len(raw)
        assert index[number] == {
            "rows": len(part["error"]),
            "bytes": n_bytes,
            "sha256": digests,
            "utilisation": count_used(codes.format, part, codes.n_features),
        }
    assert len(index) == 3
    assert json.loads((path / "metadata.json").read_text()) == {
        "schema_name": "assay.codes",
        "version": 1,
        "format": codes.format,
        "n_rows": 11,
        "n_features": 5,
        "k": {"dense": 5, "sparse": 2, "onehot": 1}[codes.format],
        "dtype": "float32",
        "provenance": PROVENANCE,
    }


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(FORMATS), st.integers(1, 40), st.integers(1, 5), st.integers(0, 99))
def test_utilisation_counts_features_by_the_rows_they_are_nonzero_in(
    code_format: Format, n_rows: int, n_features: int, seed: int
) -> None:
    codes = make_codes(code_format, n_rows, n_features, min(2, n_features), seed)
    with tempfile.TemporaryDirectory() as root:
        write_codes(Path(root) / "codes", codes, batch_size=7)
        (shard,) = StoredCodes(Path(root) / "codes").shards
    assert shard.utilisation == count_used(code_format, codes.arrays, n_features)
    assert sum(shard.utilisation) == n_features


def test_a_file_never_has_more_rows_than_asked_for(tmp_path: Path) -> None:
    write_codes(tmp_path / "codes", make_codes("dense"), batch_size=8, rows_per_shard=3)
    assert [shard.rows for shard in StoredCodes(tmp_path / "codes").shards] == [3, 3, 3, 2]


def test_batches_of_any_size_and_empty_ones_are_written(tmp_path: Path) -> None:
    whole = make_codes("sparse")
    bounds = [0, 0, 1, 1, 1, 5, 11, 11]
    parts = ({n: a[i:j] for n, a in whole.arrays.items()} for i, j in pairwise(bounds))
    codes = ListedCodes("sparse", whole.arrays, 11, 5, listed=tuple(parts))
    write_codes(tmp_path / "codes", codes, batch_size=6, rows_per_shard=6)
    assert_same(StoredCodes(tmp_path / "codes"), whole, 4)


def test_what_rides_along_is_left_out_and_other_dtypes_are_converted(tmp_path: Path) -> None:
    whole = make_codes("onehot")
    wider = whole.changed(
        values=torch.ones(11, 3),
        indices=whole.arrays["indices"].to(torch.int32),
        error=whole.arrays["error"].double().requires_grad_(),
    )
    write_codes(tmp_path / "codes", wider, batch_size=4)
    assert_same(StoredCodes(tmp_path / "codes"), whole, 4)
    half = make_codes("dense").changed(values=torch.ones(11, 5, dtype=torch.bfloat16).T.contiguous().T)
    write_codes(tmp_path / "codes", half, batch_size=4)
    assert torch.equal(join(StoredCodes(tmp_path / "codes").batches(4))["values"], torch.ones(11, 5))


def test_codes_can_be_copied_and_pickled(tmp_path: Path, folder: Path) -> None:
    stored = ForkingPickler.loads(ForkingPickler.dumps(StoredCodes(folder)))
    write_codes(tmp_path / "copy", stored, batch_size=4)
    assert_same(StoredCodes(str(tmp_path / "copy")), make_codes("sparse"), 3)


# --- what is refused when writing: nothing is left behind, and what was there stays as it was


def refused() -> dict[str, tuple[MadeCodes, str]]:
    dense, sparse, onehot = (make_codes(code_format) for code_format in FORMATS)

    def poisoned(codes: MadeCodes, name: str, value: float) -> MadeCodes:
        array = codes.arrays[name].clone().double() if name != "indices" else codes.arrays[name].clone()
        array[-1] = value
        return codes.changed(**{name: array})

    def without(codes: MadeCodes, name: str) -> MadeCodes:
        return replace(codes, arrays={other: array for other, array in codes.arrays.items() if other != name})

    first, second, *_ = sparse.batches(3)
    uneven = ListedCodes("sparse", {}, 11, 5, listed=(first, {**second, "values": second["values"][:, :1]}))
    return {
        "codes that end early": (replace(dense, n_rows=12), "ended after 11 rows; 12 were promised"),
        "no codes at all": (ListedCodes("sparse", {}, 3, 5), "ended after 0 rows; 3 were promised"),
        "more rows, within a batch": (replace(dense, n_rows=10), "rows 9 to 10 .* but 10 rows were promised"),
        "more rows, in another batch": (replace(dense, n_rows=6), "rows 6 to 8 .* but 6 rows were promised"),
        "more rows than none": (replace(onehot, n_rows=0), "rows 0 to 2 .* but 0 rows were promised"),
        "NaN values": (poisoned(dense, "values", float("nan")), "rows 9 to 10 .*values holds a NaN or an infinity"),
        "infinite values": (poisoned(sparse, "values", float("-inf")), "values holds a NaN or an infinity"),
        "values too large for float32": (poisoned(dense, "values", 1e39), "values holds a NaN or an infinity"),
        "NaN error": (poisoned(onehot, "error", float("nan")), "error holds a NaN or an infinity"),
        "an index below 0": (poisoned(onehot, "indices", -1), "indices are -1 to .*wanted 0 to 4"),
        "an index that is no feature": (poisoned(sparse, "indices", 5), "indices are . to 5; wanted 0 to 4"),
        "no error": (without(sparse, "error"), "wanted error as well"),
        "no values": (without(sparse, "values"), "wanted values as well"),
        "no indices": (without(onehot, "indices"), "wanted indices as well"),
        "values too narrow": (replace(dense, n_features=6), r"values has shape \(3, 5\); wanted \(3, 6\)"),
        "values of one feature": (dense.changed(values=torch.ones(11, 1)), r"shape \(3, 1\); wanted \(3, 5\)"),
        "fewer indices": (sparse.changed(indices=torch.zeros(11, 1).long()), r"indices has shape \(3, 1\)"),
        "flat error": (dense.changed(error=torch.ones(11, 1)), r"error has shape \(3, 1\); wanted \(3,\)"),
        "another k in another batch": (uneven, r"rows 3 to 5 .*values has shape \(3, 1\); wanted \(3, 2\)"),
        "more entries than features": (replace(sparse, n_features=1), "k is 2; wanted 1 to 1"),
        "provenance that is no JSON": (replace(dense, provenance={"mean": torch.ones(2)}), "provenance"),
        "provenance that is not finite": (replace(dense, provenance={"tol": float("nan")}), "provenance"),
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
        write_codes(tmp_path / "codes", make_codes("dense"), batch_size=sizes[0], rows_per_shard=sizes[1])


def test_a_source_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    class Failing(MadeCodes):
        def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
            yield from list(super().batches(batch_size))[:2]
            raise OSError("the disk of the shards went away")

    with pytest.raises(OSError, match="went away"):
        write_codes(
            tmp_path / "codes", Failing("dense", make_codes("dense").arrays, 11, 5), batch_size=3, rows_per_shard=3
        )
    assert list(tmp_path.iterdir()) == []


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


def test_failing_to_move_in_leaves_the_older_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename, calls = tree(folder.parent), os.rename, []

    def fail_once(source: Path, target: Path) -> None:
        calls.append(Path(target).name)
        if len(calls) == 2:  # the older folder is aside by now, and the new one would move in
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(OSError, match="no"):
        write_codes(folder, make_codes("onehot"), batch_size=3)
    assert calls[1:] == [folder.name, folder.name]
    assert tree(folder.parent) == before


def test_codes_may_be_written_over_themselves(folder: Path) -> None:
    write_codes(folder, StoredCodes(folder), batch_size=2)
    assert_same(StoredCodes(folder), make_codes("sparse"), 5)


# --- what is refused when reading


def cut(path: Path, n_bytes: int) -> None:
    os.truncate(path, path.stat().st_size + n_bytes)


@pytest.mark.parametrize(
    "name", ["metadata.json", "shards.json", "values000001.bin", "indices000000.bin", "error000001.bin"]
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
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder / name))} has {size + change} bytes; wanted {size}"):
        StoredCodes(folder)


@pytest.mark.parametrize("name", ["metadata.json", "shards.json"])
@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"3", b"{}", b'["a"]', b'[{"rows": 11}]']
)
def test_bad_json_is_named(folder: Path, name: str, text: bytes) -> None:
    (folder / name).write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        StoredCodes(folder)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"version": 2}, "assay.codes version 2"),
        ({"version": "1"}, "assay.codes version 1"),
        ({"schema_name": "saev.codes"}, "saev.codes version 1"),
    ],
)
def test_another_version_or_schema_is_refused_by_name(folder: Path, change: dict[str, Any], found: str) -> None:
    edit_json(folder / "metadata.json", lambda value: value | change)
    with pytest.raises(ValueError, match=rf"holds {found}; this reader wants assay.codes version 1"):
        StoredCodes(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "csr"},
        {"n_rows": -1},
        {"n_rows": 11.0},
        {"n_features": 0},
        {"dtype": "float16"},
        {"k": 0},
        {"k": 6},
        {"version": True},
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
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder))}.*shards.json has 11 rows, metadata.json {n_rows}"):
        StoredCodes(folder)


def test_a_shard_of_other_rows_is_refused(folder: Path) -> None:
    edit_json(folder / "shards.json", lambda shards: [shards[0] | {"rows": 5}, shards[1] | {"rows": 6}])
    with pytest.raises(ValueError, match=r"values000000.bin has 48 bytes; wanted 40"):
        StoredCodes(folder)


def test_a_file_cut_or_removed_after_opening_is_refused(folder: Path) -> None:
    stored = StoredCodes(folder)
    cut(folder / "error000001.bin", -4)
    with pytest.raises(ValueError, match=r"error000001.bin ended early"):
        list(stored.batches(4))
    (folder / "values000000.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"values000000.bin"):
        list(stored.batches(4))


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("values", np.float32("nan"), "values holds a NaN or an infinity"),
        ("error", np.float32("inf"), "error holds a NaN or an infinity"),
        ("indices", np.int32(5), "indices are . to 5; wanted 0 to 4"),
        ("indices", np.int32(-1), "indices are -1 to .; wanted 0 to 4"),
    ],
)
def test_damaged_numbers_are_refused(folder: Path, name: str, number: np.generic, message: str) -> None:
    file = folder / f"{name}000001.bin"
    raw = bytearray(file.read_bytes())
    raw[-4:] = number.tobytes()
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}, rows 3 to 4: {message}"):
        list(StoredCodes(folder).batches(3))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_reading_wants_a_batch_size_at_once(folder: Path, batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}"):
        StoredCodes(folder).batches(batch_size)

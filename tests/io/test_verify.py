"""Verdicts on folders of shards: each damage is found where it is, and sound folders are called so."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.io.shards.verify import CHUNK_BYTES, FolderVerdict, verify_shards
from shards import make_examples, make_metadata, make_shards

TOKENS, D_MODEL = 4, 3


def make_folder(root: Path, **changes: Any) -> Path:
    """5 examples in shards of 2, the last padded; layers 3 and 5, 3 content tokens and a CLS token
    that never changes.
    """
    changes = {"d_model": D_MODEL, "pixel_agg": None} | changes
    metadata = make_metadata(**changes)
    examples = make_examples(metadata)
    examples[:, :, 0] = 7
    labels = np.arange(metadata.n_examples * (TOKENS - 1)).reshape(-1, TOKENS - 1) % 4
    dtype = metadata.labels_dtype or "uint8"
    return make_shards(root, examples, labels.astype(dtype), **changes)


def edit(path: Path, change: Callable[[npt.NDArray[np.float32]], None]) -> None:
    """Change a shard as an array (examples, layers, tokens, d_model)."""
    array = np.fromfile(path, dtype="<f4").reshape(-1, 2, TOKENS, D_MODEL)
    change(array)
    array.tofile(path)


Judge = Callable[[Path], FolderVerdict]
CHUNKS = (12, 40, CHUNK_BYTES)


@pytest.fixture(params=CHUNKS, ids=lambda n: f"{n} bytes per chunk")
def judge(request: pytest.FixtureRequest) -> Judge:
    """Verifies a folder, read in chunks of several sizes."""
    return lambda folder: verify_shards(folder, max, chunk_bytes=request.param)


def judge_at_once(folder: Path) -> FolderVerdict:
    return verify_shards(folder, max)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def test_a_thousand_missing_shards_are_one_fault(folder: Path) -> None:
    def judge() -> FolderVerdict:
        return verify_shards(folder, max, most_missing=1)

    (folder / "acts000001.bin").unlink()
    assert len(judge().shards) == 3
    (folder / "acts000002.bin").unlink()
    assert judge().faults[0].startswith("2 of 3 shards are missing, acts000001.bin the first")
    assert not judge().shards


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
def test_a_sound_folder(folder: Path, chunk_bytes: int) -> None:
    steps: list[tuple[int, int]] = []
    verdict = verify_shards(
        folder, lambda n, total: steps.append((n, total)), chunk_bytes=chunk_bytes
    )
    assert verdict.ok
    assert [(shard.name, shard.rows, shard.faults, shard.remarks) for shard in verdict.shards] == [
        ("acts000000.bin", 2, (), ()),
        ("acts000001.bin", 2, (), ()),
        ("acts000002.bin", 1, (), ()),
    ]
    assert verdict.constant == {3: (), 5: ()}
    assert verdict.labels is not None
    assert verdict.labels.counts == {0: 4, 1: 4, 2: 4, 3: 3}
    total = sum(path.stat().st_size for path in folder.glob("*.bin"))
    assert sum(n for n, _ in steps) == total
    assert {wanted for _, wanted in steps} == {total}


@pytest.mark.parametrize(
    ("value", "name"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")]
)
def test_the_first_number_that_is_not_finite_is_placed(
    folder: Path, judge: Judge, value: float, name: str
) -> None:
    def spoil(array: npt.NDArray[np.float32]) -> None:
        array[1, 0, 3, 1] = array[1, 1, 1, :2] = value

    edit(folder / "acts000001.bin", spoil)
    verdict = judge(folder)
    assert not verdict.ok
    assert [shard.ok for shard in verdict.shards] == [True, False, True]
    (fault,) = verdict.shards[1].faults
    assert fault.startswith(
        f"{name} in example 3, content token 2, layer 3, dimension 1; 3 such numbers in all"
    )


def test_the_cls_token_and_the_last_token_are_looked_at(folder: Path, judge: Judge) -> None:
    edit(folder / "acts000000.bin", lambda array: array[0, 1, 0].__setitem__(2, np.nan))
    edit(folder / "acts000002.bin", lambda array: array[0, 1, 3].__setitem__(2, np.nan))
    first, _, last = judge(folder).shards
    assert first.faults[0].startswith(
        "NaN in example 0, the CLS token, layer 5, dimension 2; 1 such"
    )
    assert last.faults[0].startswith(
        "NaN in example 4, content token 2, layer 5, dimension 2; 1 such"
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 5 * 2 * TOKENS * D_MODEL - 1), st.integers(1, 200))
def test_a_nan_anywhere_is_found(
    tmp_path_factory: pytest.TempPathFactory, place: int, chunk_bytes: int
) -> None:
    folder = make_folder(tmp_path_factory.mktemp("shards"))
    example, layer, token, dimension = (
        int(n) for n in np.unravel_index(place, (5, 2, TOKENS, D_MODEL))
    )
    edit(
        folder / f"acts{example // 2:06d}.bin",
        lambda array: array[example % 2, layer, token].__setitem__(dimension, np.nan),
    )
    verdict = verify_shards(folder, max, chunk_bytes=chunk_bytes)
    shard = verdict.shards[example // 2]
    where = f"content token {token - 1}" if token else "the CLS token"
    assert shard.faults[0].startswith(
        f"NaN in example {example}, {where}, layer {(3, 5)[layer]}, dimension {dimension}; 1 such"
    )


def test_constant_dimensions_are_named_and_no_fault(folder: Path, judge: Judge) -> None:
    for path in folder.glob("acts*.bin"):
        edit(path, lambda array: array[:, 1, 1:, 1].fill(2.5))
    verdict = judge(folder)
    assert verdict.constant == {3: (), 5: (1,)}
    assert verdict.ok
    # Constant in two shards of three is not constant.
    edit(folder / "acts000000.bin", lambda array: array[0, 1, 2].__setitem__(1, 2.75))
    assert judge(folder).constant == {3: (), 5: ()}


def test_a_layer_that_never_changes_is_a_fault(folder: Path, judge: Judge) -> None:
    for path in folder.glob("acts*.bin"):
        edit(path, lambda array: array[:, 0].fill(0))
    verdict = judge(folder)
    assert not verdict.ok
    assert verdict.faults == ("layer 3 is the same in all 15 tokens; record the activations again",)


def test_padding_that_is_not_zero_is_a_remark(folder: Path, judge: Judge) -> None:
    edit(folder / "acts000002.bin", lambda array: array[1, 1].fill(np.nan))
    verdict = judge(folder)
    assert verdict.ok
    assert verdict.shards[2].remarks[0].startswith("padding is not zero (24 bytes)")
    assert verdict.constant == {3: (), 5: ()}


def test_sizes_and_links_are_faults_of_their_shards(folder: Path, judge: Judge) -> None:
    os.truncate(folder / "acts000000.bin", 100)
    (folder / "acts000001.bin").unlink()
    # Cut to its one example: legal.
    os.truncate(folder / "acts000002.bin", 2 * TOKENS * D_MODEL * 4)
    os.truncate(folder / "labels.bin", 14)
    verdict = judge(folder)
    first, second, third = verdict.shards
    assert "has 100 bytes, wanted 192" in first.faults[0]
    assert "is missing" in second.faults[0]
    assert third.ok
    assert verdict.labels is not None
    assert (
        "has 14 bytes, wanted 15 (5 examples x 3 content tokens, uint8)" in verdict.labels.faults[0]
    )
    (folder / "acts000001.bin").symlink_to("acts000002.bin")
    os.truncate(folder / "acts000002.bin", 192)
    assert "are links to one file" in judge(folder).shards[2].faults[0]


def test_a_shard_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, d_model=512)

    def cut(n: int, total: int) -> None:
        assert 0 < n <= total
        os.truncate(folder / "acts000000.bin", 60)

    shard = verify_shards(folder, cut, chunk_bytes=2048).shards[0]
    assert "it became shorter while it was read" in shard.faults[0]


def test_wide_labels_are_counted_and_all_void_is_a_remark(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    np.array([0, 300, 65_535] * 5, dtype="<u2").tofile(folder / "labels16.bin")
    labels = judge_at_once(folder).labels
    assert labels is not None
    assert (labels.counts, labels.remarks) == ({0: 5, 300: 5, 65_535: 5}, ())
    (folder / "labels16.bin").write_bytes(bytes(30))
    labels = judge_at_once(folder).labels
    assert labels is not None
    assert (labels.ok, labels.remarks) == (True, ("every patch is void",))
    (folder / "labels16.bin").unlink()
    (folder / "labels.bin").unlink()
    assert judge_at_once(folder).labels is None


def test_json_at_fault_is_a_verdict_on_the_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    for name in ("shards.json", "metadata.json"):
        raw = json.loads((folder / name).read_text())
        (folder / name).write_text("[")
        verdict = judge_at_once(folder)
        assert not verdict.ok
        assert name in verdict.faults[0]
        (folder / name).write_text(json.dumps(raw))
    assert judge_at_once(folder).ok
    assert "is missing" in judge_at_once(tmp_path / "nowhere").faults[0]


def test_one_token_in_all_is_not_called_constant(tmp_path: Path) -> None:
    folder = make_shards(
        tmp_path,
        np.ones((1, 1, 1, 2), dtype=np.float32),
        layers=[0],
        cls_token=False,
        max_tokens_per_shard=1,
    )
    verdict = judge_at_once(folder)
    assert verdict.ok
    assert [shard.rows for shard in verdict.shards] == [1, 0]
    assert verdict.constant == {0: ()}


def test_labels_that_void_voted_for_are_remarked_upon(tmp_path: Path) -> None:
    verdict = judge_at_once(make_folder(tmp_path, pixel_agg="majority"))
    assert verdict.ok
    (remark,) = verdict.remarks
    assert "by which void votes and wins ties" in remark
    assert f"assay labels {tmp_path}" in remark
    assert judge_at_once(make_folder(tmp_path)).remarks == ()

"""Checkpoints: round trips, two kept, damage passed over, and other fits refused."""

import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from assay.io.checkpoints import Checkpoints

ABOUT = {
    "layer": 3,
    "d": 4,
    "shards": {"name": "08e569e2", "content": "ab"},
    "statistics": "ab",
    "parameters": {"seed": 0, "ks": [1, 2]},
}
TENSORS = {"centers": torch.arange(6.0).reshape(2, 3), "counts": torch.tensor([1, 2])}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_what_was_saved_last_is_loaded_and_two_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "kmeans")
    assert checkpoints.load(ABOUT) is None
    for step in (1, 20, 300):
        checkpoints.save(
            ABOUT,
            step,
            TENSORS | {"step": torch.tensor(step)},
            {"cursor": {"batch": step}, "least": None},
        )
    assert names(tmp_path) == ["step000000020.safetensors", "step000000300.safetensors"]
    found = checkpoints.load(dict(reversed(ABOUT.items())))
    assert found is not None
    assert found.state == {"cursor": {"batch": 300}, "least": None}
    assert found.tensors["step"] == 300
    assert torch.equal(found.tensors["centers"], TENSORS["centers"])
    checkpoints.clear(ABOUT)
    assert not (tmp_path / "kmeans").exists()
    checkpoints.clear(ABOUT)


@pytest.mark.parametrize("damage", ["cut", "empty", "schema", "no json", "bit", "state"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(ABOUT, step, TENSORS, {"step": step})
    newest = next(tmp_path.rglob("step000000002*"))
    if damage == "cut":
        newest.write_bytes(newest.read_bytes()[:-5])
    elif damage == "empty":
        newest.write_bytes(b"")
    elif damage == "bit":
        newest.write_bytes(newest.read_bytes()[:-1] + b"\x01")
    elif damage == "state":
        newest.write_bytes(newest.read_bytes().replace(b'\\"step\\": 2', b'\\"step\\": 3'))
    else:
        version = "0" if damage == "schema" else "2"
        header = {"schema": "assay.checkpoint", "version": version, "about": "{", "state": "{}"}
        save_file(TENSORS, newest, metadata=header)
    found = checkpoints.load(ABOUT)
    assert found is not None
    assert found.state == {"step": 1}
    assert f"{newest} is passed over" in caplog.text
    # It does not take the place of a whole one.
    checkpoints.save(ABOUT, 1, TENSORS, {"step": 1})
    assert not newest.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer", 4),
        ("d", 5),
        ("shards", {"name": "08e569e2", "content": "cd"}),
        ("statistics", "cd"),
        ("parameters", {"seed": 1, "ks": [1, 2]}),
    ],
)
def test_a_checkpoint_of_another_fit_is_never_used(
    tmp_path: Path, field: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(ABOUT, 7, TENSORS, {})
    other = ABOUT | {field: value}
    assert checkpoints.load(other) is None
    assert "holds no whole checkpoint of this fit, but of others" in caplog.text
    inner = {"parameters": "parameters.seed", "shards": "shards.content"}.get(field, field)
    assert re.search(
        f"of the nearest of them its {inner} is [^,]*, wanted [^,]*; starting", caplog.text
    )
    checkpoints.save(other, 1, TENSORS, {})
    theirs = next(tmp_path.rglob("step000000001*")).parent
    shutil.copy(next(tmp_path.rglob("step000000007*")), theirs)
    with pytest.raises(
        ValueError, match=f"of another fit: its {inner} is [^,]*, wanted [^,]*; remove"
    ):
        checkpoints.load(other)


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(ABOUT, 1, TENSORS, {})
    folder = next(tmp_path.rglob("step*")).parent
    for name in ("step0.safetensors", "notes.txt", "step0000000099.safetensors.bak"):
        (folder / name).write_text("mine")
    for step in (2, 3, 4):
        checkpoints.save(ABOUT, step, TENSORS, {})
    assert names(tmp_path) == sorted(
        [
            "notes.txt",
            "step0.safetensors",
            "step0000000099.safetensors.bak",
            "step000000003.safetensors",
            "step000000004.safetensors",
        ]
    )
    assert checkpoints.load(ABOUT) is not None


def test_a_fit_that_is_done_leaves_others_checkpoints_until_they_are_forgotten(
    tmp_path: Path,
) -> None:
    checkpoints = Checkpoints(tmp_path)
    interrupted, forgotten = ABOUT | {"d": 16_384}, ABOUT | {"d": 8}
    folders = {}
    for name, about in (("own", ABOUT), ("interrupted", interrupted), ("forgotten", forgotten)):
        before = set(tmp_path.iterdir())
        checkpoints.save(about, 7, TENSORS, {})
        (folders[name],) = set(tmp_path.iterdir()) - before
    (tmp_path / "notes").mkdir()
    for name, days in (("interrupted", 29), ("forgotten", 31), ("notes", 99)):
        folder = folders.get(name, tmp_path / name)
        for path in (*folder.iterdir(), folder):
            os.utime(path, (time.time() - days * 24 * 3600,) * 2)
    checkpoints.clear(ABOUT)
    assert {path.name for path in tmp_path.iterdir()} == {folders["interrupted"].name, "notes"}
    assert checkpoints.load(ABOUT) is None
    assert checkpoints.load(interrupted) is not None

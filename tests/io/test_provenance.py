"""What a recording says of how it was made: read back, never a pickle, and held against what is
typed.
"""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from assay.io.images import ImageLayout
from assay.io.images.masks import MaskLayout
from assay.io.shards.provenance import Provenance, RecordedFiles, RecordedMasks

SAID: dict[str, Any] = {
    "model": {"library": "transformers 5", "weights": "0a1b"},
    "geometry": {
        "patch_size": 16,
        "n_patches": 196,
        "grid": (14, 14),
        "geometry": "crop",
        "resize": 256,
        "resample": "bicubic",
    },
    "precision": "float32",
    "batch_size": 32,
    "images": {"n": 3, "sha256": "0" * 64},
}


def provenance(**changes: Any) -> Provenance:
    return Provenance.model_validate(SAID | changes)


@pytest.mark.parametrize("changes", [{}, {"examples": 5, "seed": 1}])
def test_what_is_written_is_read(changes: dict[str, Any]) -> None:
    made = provenance(**changes)
    text = made.to_text()
    assert json.loads(text)["writer"] == "assay"
    assert "\n" not in text
    assert Provenance.parse(text) == made
    later = json.dumps(json.loads(text) | {"later": 1})
    assert Provenance.parse(later) == made


@pytest.mark.parametrize(
    "data",
    [
        "",
        "none",
        "{",
        "[1]",
        "{}",
        '{"writer": "assay"}',
        '{"writer": "assay", "writer": "assay"}',
        json.dumps({"__class__": "ImageFolder", "root": "/data"}),
        provenance().to_text().replace("assay", "others"),
        "{" * 100_000,
    ],
)
def test_what_others_wrote_is_none_of_ours(data: str) -> None:
    assert Provenance.parse(data) is None


@pytest.mark.parametrize(
    "hostile",
    [
        {"patch_size": 20_000},
        {"patch_size": 0},
        {"n_patches": 2**20 + 1},
        {"grid": (1, 1025)},
        {"grid": (0, 1)},
        {"resize": 2**20 + 1},
        {"resize": (1, 2**20 + 1)},
    ],
)
def test_sizes_that_no_model_has_are_none_of_ours(hostile: dict[str, Any]) -> None:
    said = json.loads(provenance().to_text())
    said["geometry"] |= hostile
    assert Provenance.parse(json.dumps(said)) is None
    for kind in (ImageLayout, MaskLayout):
        if "n_patches" not in hostile:
            with pytest.raises(ValidationError, match=r"Input should be (less|greater) than"):
                kind.model_validate({"patch_size": 16, "geometry": "crop"} | hostile)


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("unpickled",))


def test_a_pickle_is_not_opened() -> None:
    assert Provenance.parse(base64.b64encode(pickle.dumps(Trap())).decode()) is None


def test_files_are_told_apart_by_names_sizes_and_content_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    paths = [tmp_path / "b.jpg", tmp_path / "sub/a.jpg"]
    for path in paths:
        path.write_bytes(b"same")
    first = RecordedFiles.of(tmp_path, paths)
    assert first.n == 2
    assert RecordedFiles.of(tmp_path, paths[::-1]) != first
    paths[0].write_bytes(b"more.")
    assert RecordedFiles.of(tmp_path, paths) != first
    paths[0].write_bytes(b"size")
    assert RecordedFiles.of(tmp_path, paths) != first
    paths[0].write_bytes(b"same")
    assert RecordedFiles.of(tmp_path, paths) == first


@pytest.mark.parametrize(
    "changes",
    [
        {"void": (0, 1)},
        {"offset": 1},
        {"mapping": {1: 1}},
        {"n_classes": 9},
        {"replace": {"a": "b"}},
    ],
)
def test_masks_are_told_apart_by_what_they_mean(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "a.png").touch()
    files = tmp_path, [tmp_path / "a.png"]
    layout = MaskLayout(patch_size=2)
    first = RecordedMasks.labeled(*files, layout)
    assert first == RecordedMasks.labeled(*files, MaskLayout(patch_size=2, pattern="a.*"))
    assert first != RecordedMasks.labeled(*files, MaskLayout(patch_size=2, **changes))
    assert (first.n, first.sha256) == (1, RecordedFiles.of(*files).sha256)
    said = provenance(masks=first.model_dump())
    assert Provenance.parse(said.to_text()) == said


def test_what_is_not_typed_is_as_recorded() -> None:
    recorded = {"patch_size": 16, "grid": (14, 14), "geometry": "crop", "resize": 256}
    assert provenance().layout({}) == recorded
    typed = {"patch_size": 16, "crop": True, "grid": [14, 14], "resize": None, "pattern": "*.png"}
    assert provenance().layout(typed) == recorded | {"pattern": "*.png"}
    assert provenance().layout({}, resample=True) == recorded | {"resample": "bicubic"}
    sampled = provenance(examples=5, seed=1).layout({})
    assert sampled == recorded | {"examples": 5, "seed": 1}


@pytest.mark.parametrize(
    "typed",
    [
        {"patch_size": 14},
        {"grid": (16, 16)},
        {"geometry": "aspect"},
        {"resize": 224},
        {"resize": (256, 256)},
        {"examples": 6},
        {"seed": 2},
    ],
)
def test_what_contradicts_the_recording_is_refused(typed: dict[str, Any]) -> None:
    (name,) = typed
    with pytest.raises(ValueError, match=rf"^found {name} .*recorded with {name} .*leave it out"):
        provenance(examples=5, seed=1).layout(typed)


def test_crop_contradicts_another_geometry() -> None:
    how = SAID["geometry"] | {"geometry": "aspect", "grid": None, "resize": None, "n_patches": 256}
    with pytest.raises(
        ValueError,
        match=r"found geometry crop, .*recorded with geometry aspect, .*aspect patches of 16 pix",
    ):
        provenance(geometry=how).layout({"crop": True})

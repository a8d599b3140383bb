"""Masks are found by their images' paths, and what does not go together is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from assay.io.images import ImageLayout, Images, files
from assay.io.images.masks import MaskLayout
from assay.io.shards.labels import ImageMasks


def save(path: Path, value: int, shape: tuple[int, int] = (4, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, value, dtype=np.uint8)).save(path)


@pytest.fixture
def pair(tmp_path: Path) -> Callable[..., ImageMasks]:
    def make(*names: str, masks: dict[str, int], given: Any = (), **layout: Any) -> ImageMasks:
        for name in names:
            save(tmp_path / "images" / name, 255)
        for name, value in masks.items():
            save(tmp_path / "masks" / name, value)
        found = Images(tmp_path / "images", ImageLayout(patch_size=2, pattern=None, **dict(given)))
        return ImageMasks(tmp_path / "masks", MaskLayout(patch_size=2, **layout), found)

    return make


def labels(masks: ImageMasks) -> list[int]:
    return [int(masks.label(number, 4)[0]) for number in range(len(masks.paths))]


def test_a_mask_has_its_images_path_and_another_suffix(pair: Callable[..., ImageMasks]) -> None:
    names = ("b/1.jpg", "a/1.JPEG", "c.d.png", "e.tif")
    masks = pair(*names, masks={"b/1.png": 3, "a/1.png": 2, "c.d.png": 4, "e.png": 5, "x.png": 9})
    assert labels(masks) == [2, 3, 4, 5]
    assert masks.label(0, 4).dtype == np.uint16
    assert masks.label(0, 4).shape == (4,)


@pytest.mark.parametrize(
    ("name", "mask", "replace"),
    [
        (
            "aachen/0_leftImg8bit.png",
            "aachen/0_gtFine_labelIds.png",
            {"leftImg8bit": "gtFine_labelIds"},
        ),
        ("train/0.jpg", "0_seg.png", {"train/": "", ".jpg": "_seg.png"}),
        ("0.jpg", "0.jpg.PNG", {".jpg": ".jpg.PNG"}),
    ],
)
def test_text_is_replaced_in_the_path(
    pair: Callable[..., ImageMasks], name: str, mask: str, replace: dict[str, str]
) -> None:
    assert labels(pair(name, masks={mask: 7}, replace=replace)) == [7]


def test_a_sample_of_images_has_its_masks(pair: Callable[..., ImageMasks]) -> None:
    names = [f"{number}.jpg" for number in range(9)]
    masks = {f"{number}.png": number for number in range(9)}
    found = pair(*names, masks=masks, given={"examples": 4})
    assert labels(found) == [int(path.stem) for path in found.paths]
    assert len(found.paths) == 4


def test_what_is_missing_is_named(pair: Callable[..., ImageMasks], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="masks is no folder; wanted that of the masks"):
        pair("0.jpg", masks={})
    with pytest.raises(FileNotFoundError, match=r"masks/0\.png is missing; wanted a mask for each"):
        pair("0.jpg", "1.jpg", masks={"1.png": 1})
    with pytest.raises(
        ValueError, match=r"mask of .*0\.jpg would be \.\./0\.jpg, wanted a path in"
    ):
        pair("0.jpg", masks={"0.png": 1}, replace={"0.jpg": "../0.jpg"})
    images = Images(tmp_path / "masks", ImageLayout(patch_size=2, pattern="0.png"))
    with pytest.raises(ValueError, match=r"masks/0\.png is both an image and a mask"):
        ImageMasks(tmp_path / "masks", MaskLayout(patch_size=2), images)


def test_two_images_have_two_masks(pair: Callable[..., ImageMasks], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"images/a\.jpg and .*images/a\.png have one mask, .*masks/a\.png; wanted one for",
    ):
        pair("a.jpg", "a.png", "b.jpg", masks={"a.png": 1, "b.png": 1})
    (tmp_path / "list.txt").write_text("a.jpg\nb.jpg\na.jpg\n")
    with pytest.raises(ValueError, match=r"a\.jpg and .*b\.jpg have one mask, .*b\.png; wanted"):
        pair("a.jpg", "b.jpg", masks={}, given={"names": tmp_path / "list.txt"}, replace={"a": "b"})
    twice = pair(masks={"a.png": 1, "b.png": 2}, given={"names": tmp_path / "list.txt"})
    assert labels(twice) == [1, 2, 1]


def test_the_content_of_a_thousand_masks_at_the_most_is_read(
    pair: Callable[..., ImageMasks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MOST_SAMPLED", 3)
    names = [f"{number}.jpg" for number in range(9)]
    masks = pair(*names, masks={f"{number}.png": number for number in range(9)})
    read: list[Path] = []

    def digest(path: Path, most: int) -> str:
        read.append(path)
        return path.read_bytes()[:most].hex()

    monkeypatch.setattr(files, "sampled_digest", digest)
    masks.fingerprint()
    assert read == masks.paths[::3]


def test_a_mask_of_another_size_than_its_image_is_named_with_it(
    pair: Callable[..., ImageMasks], tmp_path: Path
) -> None:
    masks = pair("0.jpg", masks={"0.png": 1}, given={"geometry": "aspect"}, geometry="aspect")
    save(tmp_path / "masks/0.png", 1, (4, 8))
    with pytest.raises(
        ValueError, match=r"masks/0\.png: 4 x 8 pixels; wanted 4 x 4, .*images/0\.jpg: restore"
    ):
        masks.label(0, 4)


def test_an_id_without_a_label_is_named_with_its_mask(pair: Callable[..., ImageMasks]) -> None:
    masks = pair("0.jpg", masks={"0.png": 5}, mapping={1: 1})
    with pytest.raises(ValueError, match=r"masks/0\.png: id 5 has no label above 0"):
        masks.label(0, 4)


def test_masks_lie_as_their_images_do(pair: Callable[..., ImageMasks]) -> None:
    with pytest.raises(
        ValueError, match=r"have geometry stretch, wanted aspect, as the images .*: give both the"
    ):
        pair("0.jpg", masks={"0.png": 1}, given={"geometry": "aspect"}, geometry="stretch")


def test_the_fingerprint_is_of_the_masks(pair: Callable[..., ImageMasks]) -> None:
    first = pair("0.jpg", masks={"0.png": 1}).fingerprint()
    assert pair("0.jpg", masks={"0.png": 1, "1.png": 1}).fingerprint() == first
    others = {pair("0.jpg", masks={"0.png": 2}).fingerprint()}
    others.add(pair("0.jpg", masks={"0.png": 1}, offset=1).fingerprint())
    assert len({first, *others}) == 3

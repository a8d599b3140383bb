"""The images behind shards: in order, resized and cropped as torchvision does it, and refused by
name where they are none.
"""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from assay.io.images import ImageLayout, Images, write_images


def photographs(folder: Path, shapes: list[tuple[int, int]]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    made = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    for number, pixels in enumerate(made):
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return made


def test_images_come_in_the_order_of_their_names_or_of_a_list(tmp_path: Path) -> None:
    made = photographs(tmp_path, [(6, 6)] * 3)
    images = Images(tmp_path, ImageLayout(patch_size=3, pattern="*.png"))
    assert len(images) == 3
    for number, pixels in enumerate(made):
        np.testing.assert_array_equal(images.read(number, 4), pixels)
    (tmp_path / "list.txt").write_text("002.png\n000.png\n")
    listed = Images(tmp_path, ImageLayout(patch_size=3, names=tmp_path / "list.txt"))
    assert len(listed) == 2
    np.testing.assert_array_equal(listed.read(0, 4), made[2])
    (tmp_path / "list.txt").write_text("002.png\n../000.png\n")
    with pytest.raises(
        ValueError, match=r"lists '\.\./000\.png'; wanted paths inside .*holds all images"
    ):
        Images(tmp_path, ImageLayout(patch_size=3, names=tmp_path / "list.txt"))


@pytest.mark.parametrize(
    ("shape", "resize", "grid", "box"),
    [
        ((40, 60), 20, None, (0, 5, 20, 20)),  # the shorter side, then the center of 20 x 30
        ((60, 40), 20, None, (5, 0, 20, 20)),
        ((40, 60), (20, 40), (5, 10), (0, 0, 20, 40)),
        ((23, 20), None, None, (2, 0, 20, 20)),  # an odd remainder, as torchvision rounds it
    ],
)
def test_an_image_is_resized_and_cropped_as_the_activations_were(
    tmp_path, shape, resize, grid, box
) -> None:
    (pixels,) = photographs(tmp_path, [shape])
    layout = ImageLayout(patch_size=4, resize=resize, grid=grid, crop=True, pattern="*.png")
    top, left, height, width = box
    resized = {
        20: (shape[1] * 20 // min(shape), shape[0] * 20 // min(shape)),
        None: shape[::-1],
    }.get(resize) or resize[::-1]
    wanted = np.asarray(Image.fromarray(pixels).resize(resized, Image.Resampling.BICUBIC))
    found = Images(tmp_path, layout).read(0, height * width // 16)
    np.testing.assert_array_equal(found, wanted[top : top + height, left : left + width])


def test_gray_images_are_written_and_read_as_they_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    write_images(tmp_path, pixels)
    images = Images(tmp_path, ImageLayout(patch_size=4, pattern="*.png"))
    for number in range(3):
        np.testing.assert_array_equal(
            images.read(number, 4), pixels[number][..., None].repeat(3, axis=2)
        )


def test_what_is_no_image_or_does_not_fit_is_named(tmp_path: Path) -> None:
    photographs(tmp_path, [(8, 8)])
    (tmp_path / "001.png").write_bytes((tmp_path / "000.png").read_bytes()[:60])
    (tmp_path / "002.png").write_text("no image")
    images = Images(tmp_path, ImageLayout(patch_size=4, pattern="*.png"))
    for number in (1, 2):
        with pytest.raises(
            ValueError, match=rf"00{number}.png: .*; wanted the image of example {number}"
        ):
            images.read(number, 4)
    with pytest.raises(ValueError, match="8 x 8 pixels; wanted 12 x 12, 3 x 3 patches of 4"):
        images.read(0, 9)
    with pytest.raises(ValueError, match="the shards have 8 patches per example; give grid"):
        images.read(0, 8)


def test_the_fingerprint_is_of_the_files_and_the_layout(tmp_path: Path) -> None:
    photographs(tmp_path, [(8, 8)] * 2)
    layout = ImageLayout(patch_size=4, pattern="*.png")
    first = Images(tmp_path, layout).fingerprint()
    assert Images(tmp_path, layout).fingerprint() == first
    assert Images(tmp_path, ImageLayout(patch_size=2, pattern="*.png")).fingerprint() != first
    photographs(tmp_path, [(8, 9)] * 2)
    assert Images(tmp_path, layout).fingerprint() != first


def test_a_copy_has_the_same_fingerprint_and_other_pixels_of_the_same_size_have_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("assay.io.sampling.PAGE", 64)
    monkeypatch.setattr("assay.io.sampling.FOLDER_BYTES", 64)
    (tmp_path / "a").mkdir()
    photographs(tmp_path / "a", [(8, 8)] * 2)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    layout = ImageLayout(patch_size=4, pattern="*.png")
    os.utime(tmp_path / "b/000.png", ns=(0, 12345))
    assert (
        Images(tmp_path / "a", layout).fingerprint() == Images(tmp_path / "b", layout).fingerprint()
    )
    raw = bytearray((tmp_path / "b/000.png").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "b/000.png").write_bytes(raw)
    assert (
        Images(tmp_path / "a", layout).fingerprint() != Images(tmp_path / "b", layout).fingerprint()
    )


def test_an_image_whose_data_end_early_is_named(tmp_path: Path) -> None:
    Image.fromarray(np.full((64, 64, 3), 7, dtype=np.uint8)).save(tmp_path / "000.png")
    raw = (tmp_path / "000.png").read_bytes()
    packed = zlib.compress((bytes([0]) + bytes([7]) * 192) * 20)  # 20 of 64 rows
    data = b"IDAT" + packed + struct.pack(">I", zlib.crc32(b"IDAT" + packed))
    end = raw[raw.index(b"IEND") - 4 :]
    (tmp_path / "000.png").write_bytes(
        raw[: raw.index(b"IDAT") - 4] + struct.pack(">I", len(packed)) + data + end
    )
    images = Images(tmp_path, ImageLayout(patch_size=32, pattern="*.png"))
    with pytest.raises(
        ValueError,
        match=r"000\.png: its image data end after 3860 of 12352 bytes; wanted the image of",
    ):
        images.read(0, 4)

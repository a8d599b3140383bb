"""Every kind of image file comes as 8-bit RGB, by several threads at once, and what is damaged is
named.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from assay.io.images import ImageLayout, Images
from assay.io.images.masks import MaskLayout, read_mask
from assay.io.shards.labels import ImageMasks

SIDE = 8
RGB = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
GRAY = np.linspace(0, 65_535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
SCALED = np.round(GRAY / 257).astype(np.uint8)[..., None].repeat(3, axis=2)


def read(path: Path) -> np.ndarray:
    layout = ImageLayout(patch_size=4, pattern=path.name)
    return Images(path.parent, layout).read(0, SIDE * SIDE // 16)


def image(pixels: np.ndarray = RGB, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.png", "L"),
        ("a.png", "1"),
        ("a.png", "P"),
        ("a.png", "RGBA"),
        ("a.png", "LA"),
        ("a.jpg", "L"),
        ("a.jpg", "CMYK"),
        ("a.tif", "CMYK"),
        ("a.tiff", "YCbCr"),
        ("a.webp", "RGBA"),
        ("a.bmp", "RGB"),
        ("a.ppm", "RGB"),
        ("a.pgm", "L"),
        ("a.gif", "P"),
    ],
)
def test_a_kind_is_what_pillow_converts_it_to(tmp_path: Path, name: str, mode: str) -> None:
    image(mode=mode).save(tmp_path / name)
    with Image.open(tmp_path / name) as found:
        wanted = np.asarray(found.convert("RGB"))
    np.testing.assert_array_equal(read(tmp_path / name), wanted)
    assert wanted.std() > 1


def test_alpha_and_a_palettes_transparency_are_dropped(tmp_path: Path) -> None:
    clear = np.dstack([RGB, np.zeros((SIDE, SIDE), np.uint8)])
    Image.fromarray(clear).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read(tmp_path / "alpha.png"), RGB)
    few = image(mode="P")
    few.save(tmp_path / "palette.png", transparency=bytes([0, 128, 255]))
    np.testing.assert_array_equal(read(tmp_path / "palette.png"), np.asarray(few.convert("RGB")))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_of_gray_are_scaled(tmp_path: Path, name: str) -> None:
    Image.fromarray(GRAY).save(tmp_path / name)
    np.testing.assert_array_equal(read(tmp_path / name), SCALED)


def test_16_bits_of_gray_are_scaled_in_a_pgm_and_in_either_order_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 8 8 65535\n" + GRAY.astype(">u2").tobytes())
    np.testing.assert_array_equal(read(tmp_path / "a.pgm"), SCALED)
    Image.frombytes("I;16B", (SIDE, SIDE), GRAY.astype(">u2").tobytes()).save(tmp_path / "b.tif")
    np.testing.assert_array_equal(read(tmp_path / "b.tif"), SCALED)


def png(width: int, height: int, depth: int, color: int, rows: bytes) -> bytes:
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


@pytest.mark.parametrize(("color", "channels"), [(2, 3), (6, 4)])
def test_of_16_bits_a_color_the_upper_8_are_read(tmp_path: Path, color: int, channels: int) -> None:
    wide = np.random.default_rng(0).integers(0, 2**16, (SIDE, SIDE, channels), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    (tmp_path / "a.png").write_bytes(png(SIDE, SIDE, 16, color, rows))
    np.testing.assert_array_equal(read(tmp_path / "a.png"), (wide >> 8)[..., :3])


@pytest.mark.parametrize(
    ("dtype", "said"), [(np.float32, "its pixels are floats"), (np.int32, "are 32-bit integers")]
)
def test_pixels_without_bounds_are_refused(tmp_path: Path, dtype: type, said: str) -> None:
    Image.fromarray(GRAY.astype(dtype)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=rf"a\.tif: .*{said}.*; save it with 8 or 16 bits"):
        read(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_an_orientation_is_not_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    left = np.zeros((SIDE, 2 * SIDE, 3), np.uint8)
    left[:, SIDE:] = 255
    Image.fromarray(left).save(tmp_path / "a.jpg", exif=exif)
    images = Images(tmp_path, ImageLayout(patch_size=4, grid=(2, 4)))
    assert images.shape(0) == (SIDE, 2 * SIDE)
    np.testing.assert_allclose(images.read(0, 8), left, atol=9)


def test_the_orientation_of_a_tiff_is_applied_by_pillow_in_its_size_too(tmp_path: Path) -> None:
    pixels = np.arange(8 * 16 * 3, dtype=np.uint8).reshape(8, 16, 3)
    Image.fromarray(pixels).save(tmp_path / "a.tif", tiffinfo={274: 6})
    images = Images(tmp_path, ImageLayout(patch_size=4, grid=(4, 2), pattern="*.tif"))
    assert images.shape(0) == (16, 8)
    np.testing.assert_array_equal(images.read(0, 8), np.rot90(pixels, -1))


@pytest.mark.parametrize(
    ("shape", "layout", "said"),
    [
        ((1, 10_000), {"geometry": "crop", "resize": 256}, "1 x 10000 pixels become 256 x 2560000"),
        ((10_000, 1), {"geometry": "crop", "resize": 256}, "10000 x 1 pixels become 2560000 x 256"),
        ((2, 70_000), {"geometry": "crop", "resize": 256}, "2 x 70000 pixels become 256 x 8960000"),
        ((8, 8), {"geometry": "crop", "resize": (2**14, 2**14)}, "8 x 8 pixels become 16384 x"),
        ((8, 8), {"geometry": "stretch", "grid": (1024, 1024), "patch_size": 16}, "8 x 8 pixels"),
        ((8, 8), {"geometry": "aspect", "patch_size": 1024}, "8 x 8 pixels become 16384 x 16384"),
    ],
)
def test_what_resizing_makes_huge_is_named_before_it_is_resized(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    layout: dict[str, Any],
    said: str,
) -> None:
    Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.ones(shape, np.uint8)).save(tmp_path / "masks/a.png")
    place = {"patch_size": 16} | layout
    n_patches = 2**20 if "grid" in layout else 256
    images = Images(tmp_path, ImageLayout(**place, pattern="*.png"))
    masks = ImageMasks(tmp_path / "masks", MaskLayout(**place), images)
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "resize", lambda *_: pytest.fail("resized"))
        patched.setattr("assay.io.shards.labels.fit_mask", lambda *_: pytest.fail("resized"))
        for look in (images.read, masks.label):
            with pytest.raises(ValueError, match=rf"a\.png: .*{said}.* 89478485 .*: leave .* out"):
                look(0, n_patches)
        with pytest.raises(ValueError, match=rf"a\.png: {said}"):
            images.check(n_patches)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert images.layout.place(shape, n_patches)


def test_a_large_image_that_is_not_resized_is_pillows_to_judge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    layout = ImageLayout(patch_size=4, geometry="crop", grid=(2, 2))
    assert layout.place((20, 20), 4).resized == (20, 20)
    assert ImageLayout(patch_size=5, geometry="stretch").place((20, 20), 4).resized == (10, 10)
    with pytest.raises(ValueError, match="20 x 20 pixels become 10 x 11, and wanted are 100"):
        ImageLayout(patch_size=1, geometry="crop", resize=(10, 11)).place((20, 20), 4)


@pytest.mark.parametrize("error", [MemoryError(), Image.DecompressionBombError("a bomb")])
def test_what_memory_is_short_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    image().convert("L").save(tmp_path / "a.png")
    images = Images(tmp_path, ImageLayout(patch_size=4, pattern="a.png"))
    monkeypatch.setattr(Image.Image, "load", fail)
    said = str(error) or "it takes more memory than there is"
    with pytest.raises(ValueError, match=rf"a\.png: {said}; wanted the image of example 0"):
        images.read(0, 4)
    with pytest.raises(ValueError, match=rf"a\.png is damaged or too large \({said}\); restore"):
        read_mask(tmp_path / "a.png")


def test_a_bomb_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(2**15, 2**15, 8, 0, b""))
    with pytest.raises(ValueError, match=r"a\.png: Image size .*; wanted the image of example 0"):
        read(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is damaged or too large \(Image size .* bomb"):
        read_mask(tmp_path / "a.png")


def cut(suffix: str, share: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        whole = path.with_suffix(suffix)
        Image.fromarray(pixels).save(whole)
        raw = whole.read_bytes()
        whole.unlink()
        path.write_bytes(raw[: int(share * len(raw))])

    return write


def of_no_color_type(path: Path) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 8, 8, 8, 5, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: path.write_bytes(b""), "it is empty"),
        (lambda path: path.write_text("no image"), "it is no image"),
        (cut(".jpg", 0.5), "truncated"),
        (cut(".png", 0.5), "truncated"),
        (cut(".webp", 0.5), ""),
        (cut(".tif", 0.5), ""),
        (cut(".bmp", 0.5), "truncated"),
        (cut(".ppm", 0.5), ""),
        (cut(".jpg", 0.01), ""),
        (of_no_color_type, ""),
    ],
)
def test_what_is_no_whole_image_is_named(
    tmp_path: Path, write: Callable[[Path], None], said: str
) -> None:
    write(tmp_path / "damaged.jpg")
    images = Images(tmp_path, ImageLayout(patch_size=4, geometry="stretch"))
    with pytest.raises(
        ValueError, match=rf"damaged\.jpg: .*{said}.*; wanted the image of example 0"
    ):
        images.read(0, 16)


def test_several_threads_may_read_at_once(tmp_path: Path) -> None:
    suffixes = (".jpg", ".png", ".webp", ".tif", ".ppm")
    rng = np.random.default_rng(0)
    for number in range(40):
        pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02d}{suffixes[number % 5]}")
    images = Images(tmp_path, ImageLayout(patch_size=4, geometry="aspect", pattern=None))
    alone = [images.read(number, 16) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            together = pool.map(lambda number: images.read(number, 16), range(40))
            for found, wanted in zip(together, alone, strict=True):
                np.testing.assert_array_equal(found, wanted)

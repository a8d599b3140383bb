"""One geometry for images and masks: where patches lie, and that both have the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from assay.io.images import ImageLayout, Images
from assay.io.images.layout import nearest_grid
from assay.io.images.masks import MaskLayout
from assay.io.shards.labels import ImageMasks

PATCH = 4
SHAPES = [(60, 60), (60, 80), (80, 45), (30, 90)]
"""(height, width): square, 4:3, 9:16, 3:1."""

GEOMETRIES: list[dict[str, Any]] = [
    {"geometry": "crop", "resize": 24, "grid": (4, 4)},
    {"geometry": "crop", "grid": (2, 8)},
    {"geometry": "crop", "resize": (40, 20), "grid": (8, 2)},
    {"geometry": "stretch", "grid": (4, 4)},
    {"geometry": "stretch", "grid": (2, 8)},
    {"geometry": "aspect"},
]


def saevs_grid(height: int, width: int, n: int) -> tuple[int, int]:
    """Every number of columns that divides, in saev's order, in whole numbers: |c / r - w / h| is
    |c h - w r| / (r h).
    """
    order = []
    for i in range(1, n + 1):
        if i * i <= n and n % i == 0:
            order += [i, n // i]
    best, least = 0, None
    for columns in order:
        rows = n // columns
        far = abs(columns * height - width * rows), rows
        if least is None or far[0] * least[1] < least[0] * far[1]:
            best, least = columns, far
    return n // best, best


def test_aspect_is_saevs_rule() -> None:
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(np.log(8), np.log(6000), (10_000, 2))).astype(int).tolist()
    counts = rng.choice([256, 196, 255, 640, 1, 17], 10_000).tolist()
    for (height, width), n in zip(sizes, counts, strict=True):
        assert nearest_grid((height, width), n) == saevs_grid(height, width, n)
    found = Counter(nearest_grid((height, width), 256) for height, width in sizes)
    assert {(8, 32), (16, 16), (32, 8), (1, 256)} <= set(found)


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((512, 512), (16, 16)),
        ((512, 683), (16, 16)),
        ((1080, 1920), (16, 16)),
        ((400, 1200), (8, 32)),
        ((1920, 1080), (32, 8)),
    ],
)
def test_grids_of_256_patches(shape: tuple[int, int], grid: tuple[int, int]) -> None:
    placed = ImageLayout(patch_size=16, geometry="aspect").place(shape, 256)
    assert (placed.grid, placed.first) == (grid, (0, 0))
    assert placed.resized == (16 * grid[0], 16 * grid[1])


def write(folder: Path, name: str, pixels: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / name)


def boxes(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A mask of overlapping boxes of classes 0 to 7, uint8."""
    mask = np.zeros(shape, dtype=np.uint8)
    for class_ in rng.integers(0, 8, 60):
        top, left = (int(rng.integers(0, n)) for n in shape)
        mask[top : top + shape[0] // 3, left : left + shape[1] // 3] = class_
    return mask


def vote(pixels: np.ndarray) -> list[int]:
    """The patches' classes, patch by patch and pixel by pixel."""
    labels = []
    for top in range(0, pixels.shape[0], PATCH):
        for left in range(0, pixels.shape[1], PATCH):
            votes = Counter(pixels[top : top + PATCH, left : left + PATCH].ravel().tolist())
            del votes[0]
            most = max(votes.values(), default=0)
            labels.append(min((each for each in votes if votes[each] == most), default=0))
    return labels


def by_hand(mask: np.ndarray, layout: ImageLayout) -> np.ndarray:
    """A mask on the patches, with Pillow's nearest pixels and torchvision's crop."""
    height, width = mask.shape
    if layout.geometry == "aspect":
        rows, columns = saevs_grid(height, width, 16)
        size = rows * PATCH, columns * PATCH
    else:
        assert layout.grid is not None
        size = layout.grid[0] * PATCH, layout.grid[1] * PATCH
    resized: Any = size
    if layout.geometry == "crop" and layout.resize is None:
        resized = mask.shape
    elif layout.geometry == "crop" and isinstance(layout.resize, int):
        short = min(height, width)
        resized = tuple(int(layout.resize * n / short) for n in mask.shape)
    elif layout.geometry == "crop":
        resized = layout.resize
    image = Image.fromarray(mask).resize(resized[::-1], Image.Resampling.NEAREST)
    top, left = (round((have - want) / 2) for have, want in zip(resized, size, strict=True))
    return np.asarray(image)[top : top + size[0], left : left + size[1]]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_patches_are_labeled_as_their_images_pixels_are(
    tmp_path: Path, geometry: dict[str, Any]
) -> None:
    """The images' colors are their classes."""
    rng = np.random.default_rng(0)
    for number, shape in enumerate(SHAPES):
        mask = boxes(shape, rng)
        write(tmp_path / "masks", f"{number}.png", mask)
        write(tmp_path / "images", f"{number}.png", mask)
    layout = ImageLayout(patch_size=PATCH, pattern=None, **geometry)
    images = Images(tmp_path / "images", layout)
    masks = ImageMasks(tmp_path / "masks", MaskLayout(patch_size=PATCH, **geometry), images)
    seen = set()
    for number, path in enumerate(images.paths):
        with Image.open(path) as image:
            pixels = np.asarray(image)
        labels = masks.label(number, 16)
        assert labels.dtype == np.uint16
        assert labels.tolist() == vote(by_hand(pixels, layout))
        seen |= set(labels.tolist())
    assert len(seen) > 3


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_labels_are_those_of_an_image_whose_color_is_its_class(
    tmp_path: Path, geometry: dict[str, Any], shape: tuple[int, int]
) -> None:
    """Halves of one color, resized smoothly: away from their edges nothing is mixed."""
    mask = np.full(shape, 1, dtype=np.uint8)
    mask[: shape[0] // 3] = 2
    mask[:, shape[1] // 2 :] += 2
    write(tmp_path / "images", "a.png", mask * np.uint8(60))
    write(tmp_path / "masks", "a.png", mask)
    layout = ImageLayout(patch_size=PATCH, pattern=None, **geometry)
    images = Images(tmp_path / "images", layout)
    masks = ImageMasks(tmp_path / "masks", MaskLayout(patch_size=PATCH, **geometry), images)
    nearest = np.round(images.read(0, 16)[..., 0] / 60).astype(np.uint8)
    wanted = np.array(vote(nearest))
    # A patch through which an edge passes may be a tie in one of the two.
    clear = np.array([len(set(row)) == 1 for row in _patches(nearest)])
    assert clear.sum() >= 6
    np.testing.assert_array_equal(masks.label(0, 16)[clear], wanted[clear])
    assert len(set(wanted[clear].tolist())) > 1


def _patches(pixels: np.ndarray) -> list[list[int]]:
    return [
        pixels[top : top + PATCH, left : left + PATCH].ravel().tolist()
        for top in range(0, pixels.shape[0], PATCH)
        for left in range(0, pixels.shape[1], PATCH)
    ]


def test_crop_is_said_in_two_ways() -> None:
    assert ImageLayout(patch_size=4, crop=True) == ImageLayout(patch_size=4, geometry="crop")
    with pytest.raises(ValidationError, match="found crop and geometry aspect, want one of them"):
        ImageLayout(patch_size=4, crop=True, geometry="aspect")


@pytest.mark.parametrize("geometry", ["stretch", "aspect"])
def test_where_the_grid_says_the_size_nothing_is_resized_before(geometry: Any) -> None:
    with pytest.raises(ValidationError, match=f"found resize 256 and geometry {geometry}"):
        ImageLayout(patch_size=4, geometry=geometry, resize=256)


def test_aspect_has_no_grid() -> None:
    with pytest.raises(ValidationError, match=r"found grid \[4, 4\] and geometry aspect, want"):
        ImageLayout(patch_size=4, geometry="aspect", grid=(4, 4))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"resize": 8}, "bicubic"),
        ({"geometry": "stretch"}, "bicubic"),
        ({"geometry": "aspect"}, "lanczos"),
        ({"geometry": "aspect", "resample": "bilinear"}, "bilinear"),
    ],
)
def test_images_are_resampled_as_the_geometry_or_the_user_has_it(
    tmp_path: Path, given: dict[str, Any], name: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    write(tmp_path, "a.png", pixels)
    layout = ImageLayout(patch_size=4, pattern="*.png", **given)
    assert layout.resample == name
    wanted = Image.fromarray(pixels).resize((8, 8), Image.Resampling[name.upper()])
    np.testing.assert_array_equal(Images(tmp_path, layout).read(0, 4), np.asarray(wanted))

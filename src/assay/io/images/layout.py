"""How images and masks lie on the grid of patches that a model sees."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Annotated, Any, ClassVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from assay.geometry import (
    Geometry,
    Grid,
    PatchSize,
    Resample,
    Resize,
    check_grid,
    check_resize,
)


@dataclass(frozen=True)
class Placement:
    """How an image comes to the patches: it is resized, and the patches are cut out.

    Attributes:
        resized: (height, width), in pixels.
        first: (top, left) of what is cut out of that, in pixels.
        grid: (rows, columns) of patches.
    """

    resized: tuple[int, int]
    first: tuple[int, int]
    grid: tuple[int, int]


class Layout(BaseModel):
    """Which files of a folder are meant, and how they lie on the patches.

    Args:
        patch_size: height and width of a patch, in pixels; 1,024 at the most.
        grid: (rows, columns) of patches in an example; None: a square, from the shards, or one for
            each image where the geometry is aspect.
        geometry: crop: resized, then the center is cut out; stretch: resized to the grid, whatever
            its shape; aspect: likewise, to the grid of as many patches that is nearest in aspect,
            as `nearest_grid` finds it for each image. None: resized at the most, and the size must
            then be the grid's.
        resize: shorter side in pixels, the other in proportion and rounded down; or (height,
            width); None: as it is. Not beside stretch and aspect, where the grid says it.
        crop: another way to say geometry crop.
        pattern: glob of the files inside their folder, which are taken in the order of their paths,
            folder by folder, and whose ** does not go into links to folders; None: every image file
            at any depth, in links to folders too, but for hidden ones.
        names: a text file that lists the files instead, one path inside their folder a line, in the
            examples' order.
        examples: how many of these files are drawn at random, and kept in their order; None: all.
            A larger sample of the same seed holds the smaller one.
        seed: of that sample.

    Raises:
        ValueError: a value is out of bounds or unknown, or two contradict each other (pydantic's
            subclass).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    things: ClassVar[str] = "files"

    patch_size: PatchSize
    grid: Grid | None = None
    geometry: Geometry | None = None
    resize: Resize | None = None
    crop: bool = False
    pattern: Annotated[str, Field(min_length=1)] | None = None
    names: Path | None = None
    examples: PositiveInt | None = None
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="before")
    @classmethod
    def _crop_is_a_geometry(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("crop") is True and raw.get("geometry") is None:
            return raw | {"geometry": "crop"}
        if isinstance(raw, dict) and raw.get("geometry") == "crop":
            return raw | {"crop": True}
        return raw

    @model_validator(mode="after")
    def _one_way_to_the_grid(self) -> Layout:
        if self.crop and self.geometry != "crop":
            raise ValueError(
                f"found crop and geometry {self.geometry}, want one of them: leave crop out, or say"
                " geometry crop"
            )
        check_resize(self.geometry, self.resize)
        check_grid(self.geometry, self.grid)
        return self

    def grid_of(self, n_patches: int) -> tuple[int, int] | None:
        """(rows, columns) of an example of so many patches; None where each has its own.

        Raises:
            ValueError: they do not make the grid.
        """
        if self.geometry == "aspect":
            return None
        side = isqrt(n_patches)
        rows, columns = self.grid or (side, side)
        if rows * columns != n_patches:
            found = f"grid is {rows} x {columns}" if self.grid else "no grid is given"
            raise ValueError(
                f"{found}, and the shards have {n_patches} patches per example; give grid, the rows"
                f" and columns that make {n_patches}"
            )
        return rows, columns

    def place(self, shape: tuple[int, ...], n_patches: int) -> Placement:
        """How an image of a shape (height, width), in pixels, comes to so many patches.

        A crop of odd remainder is placed as torchvision's CenterCrop places it.

        Raises:
            ValueError: they do not make the grid; or the image, resized, has another size than the
                grid, is smaller than the crop, or has more pixels than Pillow takes for harmless.
        """
        fixed = self.grid_of(n_patches)
        grid = nearest_grid(shape, n_patches) if fixed is None else fixed
        wanted = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        if self.geometry in {"stretch", "aspect"}:
            _check_size(shape, wanted)
            return Placement(wanted, (0, 0), grid)
        resized = _resized(shape, self.resize)
        fits = all(have >= want for have, want in zip(resized, wanted, strict=True))
        if resized != wanted and not (self.crop and fits):
            raise ValueError(
                f"{shape[0]} x {shape[1]}"
                f" pixels{f', {resized[0]} x {resized[1]} resized' if self.resize else ''}; wanted"
                f" {wanted[0]} x {wanted[1]}, {grid[0]} x {grid[1]} patches of {self.patch_size}:"
                " resize and crop as the images were, or name their geometry"
            )
        _check_size(shape, resized)
        first = round((resized[0] - wanted[0]) / 2), round((resized[1] - wanted[1]) / 2)
        return Placement(resized, first, grid)


class ImageLayout(Layout):
    """Where a dataset's images are, and how they lie on the patches, as they did when the
    activations were recorded.

    Args:
        patch_size, grid, geometry, resize, crop, pattern, names, examples, seed: as in `Layout`.
        resample: how an image is resized; None: bicubic, or as saev does it where the geometry is
            aspect, lanczos. Whoever reads it finds the name.

    Raises:
        ValueError: a value is out of bounds or unknown, or two contradict each other (pydantic's
            subclass).
    """

    things: ClassVar[str] = "images"

    pattern: Annotated[str, Field(min_length=1)] | None = "*.jpg"
    resample: Resample | None = None

    @model_validator(mode="before")
    @classmethod
    def _resample_by_geometry(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("resample") is None:
            return raw | {"resample": "lanczos" if raw.get("geometry") == "aspect" else "bicubic"}
        return raw


def nearest_grid(shape: tuple[int, ...], n_patches: int) -> tuple[int, int]:
    """(rows, columns) of so many patches whose columns / rows is nearest to an image's width /
    height; saev's rule for DINOv3.

    Of two that are as near it is the one that saev looks at first: divisors d up to the root, from
    1 on, each as d columns and then as d rows.

    Args:
        shape: (height, width) of the image.
        n_patches: rows x columns.
    """
    aspect = shape[1] / shape[0]
    divisors = (d for d in range(1, isqrt(n_patches) + 1) if n_patches % d == 0)
    grids = [grid for d in divisors for grid in ((n_patches // d, d), (d, n_patches // d))]
    return min(grids, key=lambda grid: abs(grid[1] / grid[0] - aspect))


def _check_size(shape: tuple[int, ...], resized: tuple[int, int]) -> None:
    """Raise ValueError where resizing makes an image larger than Pillow takes for harmless: a strip
    of a pixel's height becomes a gigabyte.
    """
    most, n_pixels = Image.MAX_IMAGE_PIXELS, resized[0] * resized[1]
    if most is not None and resized != tuple(shape) and n_pixels > most:
        raise ValueError(
            f"{shape[0]} x {shape[1]} pixels become {resized[0]} x {resized[1]}, and wanted are"
            f" {most} at the most (Pillow's MAX_IMAGE_PIXELS): leave the file out, cut it to a"
            " shape nearer to a square, or give a smaller grid or resize"
        )


def _resized(shape: tuple[int, ...], resize: int | tuple[int, int] | None) -> tuple[int, int]:
    height, width = shape
    if resize is None:
        return height, width
    if isinstance(resize, tuple):
        return resize
    if height <= width:
        return resize, resize * width // height
    return resize * height // width, resize

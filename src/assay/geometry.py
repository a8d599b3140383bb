"""How images lie on a grid of patches: the names, bounds and rules that parameters, layouts and
recordings have in common. What they do is in `assay.io.images.layout`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

Geometry = Literal["crop", "stretch", "aspect"]

Resample = Literal["bilinear", "bicubic", "lanczos"]

# Bounds of what is read from files as well: sizes that no model has would only fill the memory.
MAX_PATCH_SIZE = 1024

MAX_GRID_SIDE = 1024

MAX_SIDE = MAX_PATCH_SIZE * MAX_GRID_SIDE

PatchSize = Annotated[int, Field(gt=0, le=MAX_PATCH_SIZE)]

GridSide = Annotated[int, Field(gt=0, le=MAX_GRID_SIDE)]

Grid = tuple[GridSide, GridSide]
"""(rows, columns) of patches."""

Side = Annotated[int, Field(gt=0, le=MAX_SIDE)]
"""In pixels."""

Resize = Side | tuple[Side, Side]
"""The shorter side, or (height, width)."""


def check_resize(geometry: Geometry | None, resize: int | tuple[int, int] | None) -> None:
    """Raise ValueError for a size beside a geometry that says it."""
    if resize is not None and geometry in {"stretch", "aspect"}:
        raise ValueError(
            f"found resize {resize} and geometry {geometry}, want resize beside crop alone: the"
            " grid says how large images become"
        )


def check_grid(geometry: Geometry | None, grid: tuple[int, int] | None) -> None:
    """Raise ValueError for a grid where each image has its own."""
    if grid is not None and geometry == "aspect":
        raise ValueError(
            f"found grid {list(grid)} and geometry aspect, want no grid: each image has its own"
        )

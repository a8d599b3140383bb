"""Images for the report's gallery."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from assay.geometry import Geometry, Grid, PatchSize, Resample, Resize, check_grid, check_resize
from assay.parameters.fields import Section


class ImagesParameters(Section):
    """The images of shards.probe_val, for the report's gallery: the patches where a class's best
    feature is strongest.

    The embedded default draws its own, whatever stands here. Where Assay recorded the shards, the
    geometry need not be said. The names are those of `assay labels`.
    """

    path: str | None = Field(
        None, description="the folder; null: no gallery, but on the embedded default"
    )
    patch_size: PatchSize | None = Field(
        None, description="height and width of a patch, in pixels; null: as recorded, or 16"
    )
    grid: Grid | None = Field(
        None, description="(rows, columns) of patches; null: as recorded, or as many of each"
    )
    geometry: Geometry | None = Field(
        None,
        description=(
            "crop: resized, then the center; stretch: to the grid; aspect: to the grid of as many"
            " patches that is nearest in aspect, image by image, as saev does for DINOv3; null: as"
            " recorded, or resized at the most"
        ),
    )
    resize: Resize | None = Field(
        None,
        description=(
            "the shorter side, or (height, width), as it was for the activations, in pixels; null:"
            " as recorded, or none"
        ),
    )
    crop: Literal["centre"] | None = Field(
        None, description="centre: another way to say geometry: crop"
    )
    resample: Resample | None = Field(
        None,
        description="how images are resized; null: as recorded, or bicubic, and lanczos for aspect",
    )
    pattern: str | None = Field(
        "*.jpg",
        min_length=1,
        description=(
            "glob of the images, which are taken in the order of their names; null: all, at any"
            " depth"
        ),
    )
    names: str | None = Field(
        None, description="a text file that lists the images instead, one per line"
    )
    classes: PositiveInt = Field(12, description="classes a dictionary, those of the highest AP")

    @model_validator(mode="after")
    def _is_one_geometry(self) -> Self:
        if self.crop is not None and self.geometry not in {None, "crop"}:
            raise ValueError(
                f"found crop {self.crop} and geometry {self.geometry}, want one of them: leave crop"
                " out, or say geometry: crop"
            )
        check_resize(self.geometry, self.resize)
        check_grid(self.geometry, self.grid)
        return self

"""Images for the report's gallery."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from assay.parameters.fields import Section


class ImagesParameters(Section):
    """The images of shards.probe_val, for the report's gallery: the patches where a class's best
    feature is strongest.

    The embedded default draws its own, whatever stands here. The names are those of `assay labels`.
    """

    path: str | None = Field(
        None, description="the folder; null: no gallery, but on the embedded default"
    )
    patch_size: PositiveInt = Field(16, description="height and width of a patch, in pixels")
    grid: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="(rows, columns) of patches; null: as many of each"
    )
    resize: PositiveInt | tuple[PositiveInt, PositiveInt] | None = Field(
        None,
        description=(
            "the shorter side, or (height, width), as it was for the activations, in pixels; null:"
            " none"
        ),
    )
    crop: Literal["centre"] | None = Field(
        None, description="center: the grid is cut out of the middle; null: no crop"
    )
    pattern: str = Field(
        "*.jpg",
        min_length=1,
        description="glob of the images, which are taken in the order of their names",
    )
    names: str | None = Field(
        None, description="a text file that lists the images instead, one per line"
    )
    classes: PositiveInt = Field(12, description="classes a dictionary, those of the highest AP")

"""How images lie on a model's patches: what the parameters leave open, its checkpoint says."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from assay.backbones import Description
from assay.geometry import MAX_GRID_SIDE, MAX_PATCH_SIZE
from assay.parameters import ImagesToRecord, LabelsParameters, RecordingParameters

ASPECT_GRID = (16, 16)
"""Whose product is the number of patches where each image has a grid of its own: saev's."""


def find_grid(how: RecordingParameters, model: Description) -> tuple[int, int]:
    """(rows, columns) of patches; where each image has a grid of its own, only their product
    counts.

    Raises:
        ValueError: the patch size does not divide what the checkpoint was made for, or `resize`
            leaves less than the grid wants; or there are more patches, or larger ones, than any
            model has.
    """
    size, patch = model.preprocessing.size, model.patch_size
    if how.grid is not None:
        grid = how.grid
    elif how.geometry == "aspect":
        grid = ASPECT_GRID
    elif size[0] % patch or size[1] % patch:
        raise ValueError(
            f"{model.ckpt} was made for {size[0]} x {size[1]} pixels, which its patches of {patch}"
            " do not divide: give grid, the rows and columns of patches"
        )
    else:
        grid = size[0] // patch, size[1] // patch
    if patch > MAX_PATCH_SIZE or max(grid) > MAX_GRID_SIDE:
        raise ValueError(
            f"found {grid[0]} x {grid[1]} patches of {patch} pixels of {model.ckpt}, wanted"
            f" {MAX_GRID_SIDE} a side of {MAX_PATCH_SIZE} pixels at the most: give a smaller grid,"
            " or correct the checkpoint's config.json"
        )
    if how.resize is not None and how.resize < min(grid) * patch:
        raise ValueError(
            f"resize {how.resize} is less than {grid[0]} x {grid[1]} patches of {patch} pixels,"
            f" {grid[0] * patch} x {grid[1] * patch}: give resize {max(grid) * patch} or more, or a"
            " smaller grid"
        )
    return grid


def check_recording(how: RecordingParameters, model: Description, layers: Sequence[int]) -> int:
    """Check that a model has some layers and that images lie on its patches, and give the number of
    patches of one.

    Raises:
        ValueError: it has no such layer, a shard has no room for one image, or as `find_grid`.
    """
    for layer in layers:
        if not 0 <= layer < model.n_blocks:
            raise ValueError(
                f"found layer {layer}, want block numbers from 0 to {model.n_blocks - 1}:"
                f" {model.ckpt} has {model.n_blocks} blocks"
            )
    n_patches = prod(find_grid(how, model))
    least = len(layers) * (n_patches + (model.cls_token and how.cls_token))
    if how.max_tokens_per_shard < least:
        raise ValueError(
            f"found max_tokens_per_shard {how.max_tokens_per_shard}, want at least {least}, one"
            f" image's tokens of {len(layers)} layers"
        )
    return n_patches


def image_layout(
    how: RecordingParameters, model: Description, images: ImagesToRecord, folder: Path
) -> dict[str, Any]:
    """The arguments of `assay.io.images.ImageLayout`; raises ValueError as `find_grid`.

    Args:
        how: what the parameters say.
        model: what the checkpoint says.
        images: which of the files.
        folder: that a list of them is relative to.
    """
    return _placed(how, model) | {
        "resample": _resample(how, model),
        "pattern": images.pattern,
        "names": None if images.names is None else folder / images.names,
        "examples": images.examples,
        "seed": images.seed,
    }


def mask_layout(
    how: RecordingParameters, model: Description, labels: LabelsParameters
) -> dict[str, Any]:
    """The arguments of `assay.io.images.masks.MaskLayout`; raises ValueError as `find_grid`."""
    meaning: dict[str, Any] = labels.model_dump(include=set(LabelsParameters.model_fields))
    return _placed(how, model) | meaning


def _placed(how: RecordingParameters, model: Description) -> dict[str, Any]:
    """What an image and its mask have in common."""
    grid = find_grid(how, model)
    resize = how.resize
    if how.geometry == "crop" and resize is None:
        resize = max(model.preprocessing.resize or 0, max(grid) * model.patch_size)
    return {
        "patch_size": model.patch_size,
        "geometry": how.geometry,
        "grid": None if how.geometry == "aspect" else grid,
        "resize": resize,
    }


def _resample(how: RecordingParameters, model: Description) -> str:
    if how.resample is not None:
        return how.resample
    return "lanczos" if how.geometry == "aspect" else model.preprocessing.resample

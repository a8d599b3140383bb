"""What a class's best feature fires on: the images where it is strongest, with its map over them
and the strongest patch outlined.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from assay.encodings import Encoding
from assay.io.images import Images
from assay.io.shards import Shards

COLOR = (213, 94, 0)
"""Okabe and Ito's vermilion, as in the figures."""

OPACITY = 0.7
"""Of the map where it is strongest."""

MIN_SIDE = 128
"""Images are enlarged by a whole factor to this many pixels a side, for the screen."""


def gather_examples(
    *examples: dict[str, Tensor], encodings: Sequence[Encoding], layer: int
) -> dict[str, Tensor]:
    """The examples of all encodings of a layer, in that order, as one dict: under
    `<encoding>/<seed>/<name>`.
    """
    gathered = {"layer": torch.tensor(layer)}
    for encoding, tensors in zip(encodings, examples, strict=True):
        prefix = _prefix(encoding.shown, encoding.model.seed)
        gathered |= {prefix + name: tensor for name, tensor in tensors.items()}
    return gathered


def _prefix(encoding: str, seed: int | None) -> str:
    return f"{encoding}/{'' if seed is None else seed}/"


def draw_gallery(
    baselines: pd.DataFrame,
    classes: pd.DataFrame,
    images: Images,
    shards: Shards,
    *layers: dict[str, Tensor],
    most_classes: int,
) -> list[dict[str, Any]]:
    """For each method, its row of the highest mAP among those at their best layer: the classes of
    the highest AP, on images.

    A map is scaled to the range of the class's images. An item is a class: layer, method, encoding,
    seed, label, class_name where classes have names, feature, average_precision, and `images`, each
    with `source` (a WebP as a data URI), `example` and `patch`.
    """
    kept = [
        name
        for name in ("label", "class_name", "feature", "average_precision")
        if name in classes.columns
    ]
    found = {int(layer["layer"]): layer for layer in layers}
    rows = (
        baselines[baselines["best_layer"]]
        .sort_values("map", ascending=False, kind="stable")
        .drop_duplicates("method")
    )
    items = []
    for row in rows.sort_values("method").to_dict("records"):
        seed = None if pd.isna(row["seed"]) else int(row["seed"])
        about = {name: row[name] for name in ("layer", "method", "encoding")} | {"seed": seed}
        mine = classes[
            (classes["layer"] == row["layer"]) & (classes["encoding"] == row["encoding"])
        ]
        mine = mine[mine["seed"].isna() if seed is None else mine["seed"] == seed]
        best = mine.dropna(subset=["average_precision"]).nlargest(most_classes, "average_precision")
        prefix = _prefix(row["encoding"], seed)
        examples = {
            name: found[row["layer"]][prefix + name]
            for name in ("label", "example", "patch", "strength")
        }
        for each in best.to_dict("records"):
            place = int((examples["label"] == each["label"]).nonzero())
            shown = {
                name: examples[name][place].numpy() for name in ("example", "patch", "strength")
            }
            items.append(
                about
                | {name: each[name] for name in kept}
                | {
                    "images": _draw_class(
                        images, shards.metadata.content_tokens_per_example, **shown
                    )
                }
            )
    return items


def _draw_class(
    images: Images,
    n_patches: int,
    example: npt.NDArray[np.int64],
    patch: npt.NDArray[np.int64],
    strength: npt.NDArray[np.float32],
) -> list[dict[str, Any]]:
    low, high = float(strength.min()), float(strength.max())
    shares = (strength - low) / (high - low or 1)
    return [
        {
            "source": _as_uri(
                draw_map(
                    images.read(int(number), n_patches),
                    share,
                    int(strongest),
                    images.layout.patch_size,
                )
            ),
            "example": int(number),
            "patch": int(strongest),
        }
        for number, strongest, share in zip(example, patch, shares, strict=True)
        if strongest >= 0
    ]


def draw_map(
    pixels: npt.NDArray[np.uint8], share: npt.NDArray[np.float32], strongest: int, patch_size: int
) -> npt.NDArray[np.uint8]:
    """An image with a color over its patches and one of them outlined.

    Args:
        pixels: uint8 (height, width, 3), of whole patches.
        share: (patches,), 0 to 1, how much color each has.
        strongest: the patch that is outlined.
        patch_size: in pixels.

    Returns:
        uint8, enlarged by a whole factor where it is small.
    """
    rows, columns = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    alpha = (
        OPACITY
        * np.kron(share.reshape(rows, columns), np.ones((patch_size, patch_size)))[..., None]
    )
    blended = np.round(pixels * (1 - alpha) + np.array(COLOR) * alpha).astype(np.uint8)
    factor = max(1, -(-MIN_SIDE // min(blended.shape[:2])))
    picture = Image.fromarray(blended.repeat(factor, axis=0).repeat(factor, axis=1))
    side = patch_size * factor
    top, left = strongest // columns * side, strongest % columns * side
    pen = ImageDraw.Draw(picture)
    pen.rectangle([left, top, left + side - 1, top + side - 1], outline="white", width=3)
    pen.rectangle([left + 1, top + 1, left + side - 2, top + side - 2], outline="black")
    return np.asarray(picture)


def _as_uri(pixels: npt.NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"

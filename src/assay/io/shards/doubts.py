"""What is to be said of shards that can be read, and may yet not be what they should."""

from __future__ import annotations

import shlex
from pathlib import Path

from assay.io.images.layout import Layout
from assay.io.shards.metadata import LABELS_NAME, Metadata, find_labels


def doubt_labels(folder: Path, metadata: Metadata) -> str | None:
    """What is to be said of labels that were not made by Assay's vote, with the command that makes
    them so; None: nothing.
    """
    if metadata.pixel_agg != "majority" or find_labels(folder, metadata) is None:
        return None
    name = shlex.quote(str(folder))
    geometry = (
        "--geometry aspect, as saev places images for DINOv3"
        if metadata.family == "dinov3"
        else "--geometry, --grid and --resize as the images lay"
    )
    return (
        f'the labels of {folder} were made with pixel_agg "majority", by which void votes and wins'
        f" ties; it should have no vote. To make them so: assay labels {name} --masks MASKS"
        f" --patch-size PIXELS --out {name}/{LABELS_NAME} --force, with {geometry} (assay labels"
        " --help)"
    )


def doubt_geometry(metadata: Metadata, layout: Layout) -> str | None:
    """What is to be said of masks or images that lie otherwise than saev places them for DINOv3;
    None: nothing.
    """
    saevs = metadata.family == "dinov3" and not metadata.data.startswith("{")
    if not saevs or layout.geometry == "aspect":
        return None
    return (
        f"{metadata.ckpt} is a DINOv3, for which saev stretches each image to a grid of its own:"
        " unless these shards were recorded otherwise, patches are mixed up without geometry aspect"
    )

"""`assay labels`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from assay.commands.common import FILE, FOLDER, Pair, say_aside, short_errors

if TYPE_CHECKING:
    from assay.io.images.masks import MaskLayout
    from assay.io.shards.labels import PatchLabels


@click.command("labels")
@click.argument("shards", type=FOLDER)
@click.option(
    "--masks",
    type=FOLDER,
    required=True,
    help="Folder of the masks: one PNG per example, a class id per pixel.",
)
@click.option(
    "--out",
    type=FILE,
    required=True,
    help="File to write: SHARDS/labels.bin, or one anywhere else.",
)
@click.option(
    "--config", type=FILE, help="YAML with any of the options below, and `mapping: {id: label}`."
)
@click.option("--patch-size", type=int, help="Side of a patch, in pixels.")
@click.option(
    "--geometry",
    type=click.Choice(["crop", "stretch", "aspect"]),
    help="crop: resized, then the center of the grid's size; stretch: to the grid; aspect: to the"
    " grid of as many patches that is nearest in aspect, image by image, as saev does for DINOv3.",
)
@click.option(
    "--grid", type=Pair(single=False), help="Rows x columns of patches.  [default: a square]"
)
@click.option("--resize", type=Pair(single=True), help="Shorter side in pixels, or height x width.")
@click.option("--crop", is_flag=True, default=None, help="Another way to say --geometry crop.")
@click.option("--pattern", help="Glob of the masks inside their folder.  [default: *.png]")
@click.option(
    "--names",
    type=FILE,
    help="Text file that lists the masks, one per line, in the examples' order.",
)
@click.option(
    "--void", type=int, multiple=True, help="Id that has no vote; may be repeated.  [default: 0]"
)
@click.option("--offset", type=int, help="Added to every other id to make its label.  [default: 0]")
@click.option(
    "--n-classes",
    type=int,
    help="Labels there may be, void counted.  [default: as many as are found]",
)
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def labels_command(
    shards: Path, masks: Path, out: Path, config: Path | None, force: bool, **options: Any
) -> None:
    """Label the patches of SHARDS by a majority vote over the pixels of segmentation masks.

    Say --patch-size, --geometry, --grid and --resize as the images lay when SHARDS were recorded;
    where `assay extract` or `kedro run` recorded them, they say it themselves.
    """
    with short_errors():
        from assay.io.files import real_folder
        from assay.io.shards.doubts import doubt_geometry
        from assay.io.shards.labels import check_target, label_patches, publish_labels
        from assay.io.shards.metadata import WIDE_LABELS_NAME, read_metadata
        from assay.pipelines.signs_of_life import Bar, told

        folder = real_folder(shards)
        metadata = read_metadata(folder)
        layout = _layout(config, options, metadata.data)
        if (doubt := doubt_geometry(metadata, layout)) is not None:
            say_aside(f"Warning: {doubt}.")
        check_target(out, folder, force=force)
        click.echo(f"Labels of {metadata.n_examples} examples will be written to {out.absolute()}")
        with (
            told(say_aside),
            Bar(desc=f"{masks}", total=metadata.n_examples, unit=" masks") as bar,
        ):
            labels = label_patches(metadata, masks, layout, bar.update)
        written = publish_labels(labels, out, folder, force=force)
        _print_counts(labels)
        click.echo(f"Wrote {labels.dtype} {labels.labels.shape} to {written.absolute()}")
        if labels.dtype == "uint16":
            click.echo(
                f"In a folder of shards, labels above 255 go by the name {WIDE_LABELS_NAME}: saev"
                " takes labels.bin for uint8."
            )


def _layout(config: Path | None, options: dict[str, Any], data: str) -> MaskLayout:
    """The configuration file's layout, overridden by the options that are given; what neither says
    is as it was recorded.
    """
    from assay.io.images.masks import parse_layout, read_config
    from assay.io.shards.provenance import Provenance

    given = {name: value for name, value in options.items() if value not in (None, ())}
    typed = (read_config(config) if config else {}) | given
    recorded = Provenance.parse(data)
    return parse_layout(typed if recorded is None else recorded.layout(typed))


def _print_counts(labels: PatchLabels) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("label", "patches", "share", box=box.SIMPLE_HEAD)
    counts = labels.counts()
    for label in counts.nonzero()[0]:
        name = f"{label} (void)" if label == 0 else str(label)
        table.add_row(name, str(counts[label]), f"{counts[label] / counts.sum():.2%}")
    Console().print(table)

"""`assay extract`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from assay.commands.common import FILE, FOLDER, Pair, say_aside, short_errors

if TYPE_CHECKING:
    from assay.parameters import FolderParameters


class _Layers(click.ParamType[Any]):
    """``3,5``."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The numbers, each once, in their order."""
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isdecimal() for part in parts):
            self.fail(f"{value!r}; wanted block numbers from 0, as in 3,5", param, ctx)
        return tuple(sorted({int(part) for part in parts}))


class _Replacement(click.ParamType[Any]):
    """``OLD=NEW``."""

    name = "OLD=NEW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The two texts."""
        old, equals, new = str(value).partition("=")
        if not old or not equals:
            self.fail(f"{value!r}; wanted the text in an image's path = the mask's", param, ctx)
        return old, new


@click.command("extract")
@click.argument("images", type=FOLDER)
@click.option(
    "--model",
    help="A folder as transformers saves it, hf:owner/name[@revision], timm:NAME or"
    " python:package.module:function.",
)
@click.option("--layers", type=_Layers(), help="Block numbers from 0, as in 3,5.")
@click.option(
    "--out", type=FOLDER, required=True, help="A folder of its own: OUT/<hash>/ has the shards."
)
@click.option("--config", type=FILE, help="YAML with any of the options, and `mapping`.")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option(
    "--geometry", type=click.Choice(["crop", "stretch", "aspect"]), help="[default: crop]"
)
@click.option("--resize", type=int, help="Of crop: the shorter side in pixels, before it.")
@click.option("--grid", type=Pair(single=False), help="Rows x columns of patches.")
@click.option(
    "--resample",
    type=click.Choice(["bilinear", "bicubic", "lanczos"]),
    help="How images are resized.  [default: as the model's files say]",
)
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), help="[default: float32]")
@click.option("--cls-token/--no-cls-token", default=None, help="Record the CLS token too, or not.")
@click.option("--batch-size", type=int, help="Images a forward pass.  [default: 32]")
@click.option("--max-tokens-per-shard", type=int, help="Over all layers.  [default: 400000]")
@click.option("--pattern", help="Glob of the images in their folder.  [default: all, at any depth]")
@click.option("--names", type=FILE, help="Text file that lists the images, one per line.")
@click.option("--examples", type=int, help="Size of a random sample.  [default: all images]")
@click.option("--seed", type=int, help="Of that sample.  [default: 0]")
@click.option("--masks", type=FOLDER, help="Folder of masks: labels are written too.")
@click.option("--void", type=int, multiple=True, help="Id without a vote.  [default: 0]")
@click.option("--offset", type=int, help="Added to every other id to make its label.")
@click.option("--n-classes", type=int, help="Labels there may be, void counted.")
@click.option(
    "--replace",
    type=_Replacement(),
    multiple=True,
    help="Text replaced in an image's path to make its mask's; may be repeated.",
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option("--force", is_flag=True, help="Record again what is there already.")
def extract_command(
    images: Path, out: Path, config: Path | None, device: str, force: bool, **options: Any
) -> None:
    """Record a folder of IMAGES: the residual stream of a vision transformer after some blocks.

    The same command again goes on where it was broken off, and does nothing where it was not. What
    is left out is as the model's files say.
    """
    from assay.pipelines.signs_of_life import told
    from assay.pipelines.stopping import exit_code, signals_stop

    try:
        with short_errors(), signals_stop(), told(say_aside):
            _extract(_parse(images, config, options), out, device, force=force)
    except KeyboardInterrupt:
        click.echo("Stopped. The same command goes on from here.", err=True)
        raise click.exceptions.Exit(exit_code() or 130) from None


def _parse(images: Path, config: Path | None, options: dict[str, Any]) -> FolderParameters:
    """The configuration file's values, overridden by the options that are given."""
    from pydantic import ValidationError

    from assay.io.images.masks import read_config
    from assay.io.shards.metadata import explain
    from assay.parameters import FolderParameters

    given = {name: value for name, value in options.items() if value not in (None, ())}
    if "replace" in given:
        given["replace"] = dict(given["replace"])
    paths = {name: str(value) for name, value in given.items() if isinstance(value, Path)}
    raw = (
        (read_config(config) if config else {}) | given | paths | {"images": str(images.absolute())}
    )
    missing = [f"--{name}" for name in ("model", "layers") if name not in raw]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing: give them, or a line each in --config")
    try:
        return FolderParameters.model_validate(raw)
    except ValidationError as error:
        known = ", ".join(name for name in FolderParameters.model_fields if name != "images")
        raise ValueError(f"wrong options: {explain(error)}. There are {known}") from None


def _extract(folder: FolderParameters, out: Path, device: str, *, force: bool) -> None:
    from assay.io.datasets import find_shards
    from assay.pipelines.extract.folder import FolderRecording

    recording = FolderRecording(folder, out, device)
    if recording.is_there(force=force) and not force:
        click.echo(f"Nothing to do: {find_shards(out)} is this recording; --force makes it again.")
    else:
        metadata = recording.metadata
        n_bytes = metadata.n_examples * metadata.example_bytes
        click.echo(
            f"{metadata.n_examples} images of {metadata.content_tokens_per_example} patches, layers"
            f" {', '.join(map(str, metadata.layers))} of {metadata.family} {metadata.ckpt}:"
            f" {n_bytes / 1e6:,.1f} MB"
        )
        click.echo(f"Recorded {recording.record(force=force)}")
    click.echo(
        f"In a project, as shards.fit or another split's: kedro run --params='shards.fit:"
        f"{out.absolute()},layers:[{','.join(map(str, folder.layers))}],...'"
    )

"""`assay`: the commands that need no Kedro project, and `export`, which is for what a project has.
Importing this is quick: what a command needs, it imports itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from assay.io.images.masks import MaskLayout
    from assay.io.shards.labels import PatchLabels
    from assay.io.shards.verify import FolderVerdict

SHARDS = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, dir_okay=False)


class _Pair(click.ParamType[Any]):
    """``224`` or ``14x14``; with `single` False only the latter."""

    name = "HxW"

    def __init__(self, *, single: bool) -> None:
        self.single = single

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        parts = str(value).lower().split("x")
        if len(parts) not in ((1, 2) if self.single else (2,)) or not all(
            part.isdecimal() for part in parts
        ):
            self.fail(
                f"{value!r}; wanted {'N or ' if self.single else ''}HxW, whole numbers", param, ctx
            )
        numbers = tuple(int(part) for part in parts)
        return numbers if len(numbers) == 2 else numbers[0]


@click.group()
def main() -> None:
    """Assay's commands on shards, autoencoders and results. Training and probing: kedro run."""


@main.command("labels")
@click.argument("shards", type=SHARDS)
@click.option(
    "--masks",
    type=SHARDS,
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
    "--grid", type=_Pair(single=False), help="Rows x columns of patches.  [default: a square]"
)
@click.option(
    "--resize", type=_Pair(single=True), help="Shorter side in pixels, or height x width."
)
@click.option("--crop", is_flag=True, default=None, help="Cut out the center, of the grid's size.")
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

    Say --patch-size, --resize and --crop as the images were resized and cropped when SHARDS were
    recorded.
    """
    with _short_errors():
        from assay.io.files import real_folder
        from assay.io.shards.labels import check_target, label_patches, publish_labels
        from assay.io.shards.metadata import WIDE_LABELS_NAME, read_metadata
        from assay.pipelines.signs_of_life import Bar, told

        layout = _layout(config, options)
        folder = real_folder(shards)
        metadata = read_metadata(folder)
        check_target(out, folder, force=force)
        click.echo(f"Labels of {metadata.n_examples} examples will be written to {out.absolute()}")
        with (
            told(_say_aside),
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


def _layout(config: Path | None, options: dict[str, Any]) -> MaskLayout:
    """The configuration file's layout, overridden by the options that are given."""
    from assay.io.images.masks import parse_layout, read_config

    given = {name: value for name, value in options.items() if value not in (None, ())}
    return parse_layout((read_config(config) if config else {}) | given)


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


@main.group("shards")
def shards_group() -> None:
    """Check folders of shards."""


@shards_group.command("verify")
@click.argument("paths", type=SHARDS, nargs=-1, metavar="[PATH]...")
@click.option(
    "--env",
    help="Without a PATH: the configuration environment whose shards are meant.  [default: local]",
)
def verify_command(paths: tuple[Path, ...], env: str | None) -> None:
    """Read folders of shards once, whole, and print a verdict per shard. Exits with 1 if anything
    in any of them is bad.

    Without a PATH: all shards that the project around the working directory is configured to read.
    """
    from assay.io.datasets import find_shards
    from assay.io.shards.verify import verify_shards
    from assay.pipelines.signs_of_life import Bar, told

    if not paths:
        with _short_errors():
            paths = _configured_shards(env)
    verdicts = []
    for given in paths:
        path = given
        with suppress(ValueError, FileNotFoundError):  # which the verdict tells
            path = find_shards(given)
        with told(_say_aside), Bar(desc=path.name, unit="B", unit_divisor=1024) as bar:

            def advance(n: int, total: int, bar: Bar = bar) -> None:
                bar.total = total
                bar.update(n)

            verdicts.append(verify_shards(path, advance))
        _print_verdict(verdicts[-1])
    if not all(verdict.ok for verdict in verdicts):
        raise click.exceptions.Exit(1)


def _configured_shards(env: str | None) -> tuple[Path, ...]:
    """The shard folders of the project's configuration, each once, without those that a run has yet
    to make.
    """
    from kedro.framework.startup import bootstrap_project

    from assay.configuration import read_parameters
    from assay.plan import digits_splits

    project = _find_project("name the shards to verify, or change to the project")
    bootstrap_project(project)
    parameters = read_parameters(project, env)
    made_here = digits_splits(parameters)
    paths = []
    for split, path in parameters.shards:
        if split in made_here and not (project / path).exists():
            click.echo(f"shards.{split}: {path} is made by `kedro run`, and not there yet")
        else:
            paths.append(project / path)
    return tuple(dict.fromkeys(paths))


def _print_verdict(verdict: FolderVerdict) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table("shard", "examples", Column("verdict", overflow="fold"), box=box.SIMPLE_HEAD)
    for shard in verdict.shards:
        table.add_row(Text(shard.name), str(shard.rows), Text(_say(shard.faults, shard.remarks)))
    if verdict.labels:
        counts = verdict.labels.counts
        says = _say(verdict.labels.faults, verdict.labels.remarks)
        if counts:
            each = ", ".join(f"{label}: {count}" for label, count in counts.items())
            says += (
                f"\nlabels {min(counts)} to {max(counts)}, {len(counts)} of them; patches of each:"
                f" {each}"
            )
        table.add_row(verdict.labels.name, "", Text(says))
    if table.rows:
        console.print(table)
    for layer, dimensions in (verdict.constant or {}).items():
        if dimensions:
            numbers = ", ".join(map(str, dimensions))
            console.print(
                Text(f"layer {layer}: {len(dimensions)} dimensions are constant: {numbers}"),
                soft_wrap=True,
            )
    for remark in verdict.remarks:
        console.print(Text(f"note: {remark}"), soft_wrap=True)
    for fault in verdict.faults:
        console.print(Text(fault), soft_wrap=True)
    console.print(Text(f"{verdict.path}: {'ok' if verdict.ok else 'BAD'}"), soft_wrap=True)


@main.command("sae")
@click.argument("path")
@click.option("--activation", help="What the file does not say, as under `dictionaries`.")
@click.option("--k", type=click.IntRange(min=1), help="Likewise: entries per token.")
@click.option("--threshold", type=float, help="Likewise: one number for all features.")
@click.option(
    "--normalization",
    type=click.Choice(["l2", "max_l2", "l1", "max_l1", "identity"]),
    help="Likewise: of overcomplete's dictionary.",
)
def sae_command(path: str, **settings: Any) -> None:
    """Say what the autoencoder at PATH is, as its library saved it.

    PATH is a file, a folder or hf:owner/name[@revision][/subfolder]. Nothing in it is run. Exits
    with 1 if it is not understood, and says why.
    """
    from assay.io.saes import Settings, read_sae
    from assay.io.saes.hub import find
    from assay.io.saes.residual_stream import find_block
    from assay.sae import open_sae

    with _short_errors():
        found, commit = find(path)
    with _short_errors(f"{path} cannot be read as it is:\n"):
        stored = read_sae(found, Settings(**settings))
        open_sae(stored)
    said = stored.describe() | {"commit": commit}
    said["k"] = said["k"] or "as many as are active"
    said["files"] = "\n".join(said["files"])
    notes = [*said.pop("notes")]
    try:
        find_block(stored.recorded)
    except ValueError as error:
        notes.append(f"kedro run refuses it: {error}")
    said["notes"] = "\n".join(notes)
    for name, value in said.items():
        if value not in (None, ""):
            lines = str(value).splitlines()
            click.echo(f"{name:<12}{lines[0]}")
            for line in lines[1:]:
                click.echo(f"{'':<12}{line}")


def _say_aside(line: str) -> None:
    click.echo(line, err=True)


def _say(faults: tuple[str, ...], remarks: tuple[str, ...]) -> str:
    return "\n".join(
        [
            *(f"BAD: {fault}" for fault in faults),
            *([] if faults else ["ok"]),
            *(f"note: {note}" for note in remarks),
        ]
    )


@main.group("export")
def export_group() -> None:
    """Results of the project around the working directory, as other projects read them."""


def _parse_params(ctx: click.Context, param: click.Parameter, value: str) -> dict[str, Any]:
    del ctx
    from assay.arguments import parse_pairs

    try:
        return parse_pairs(value)
    except ValueError as error:
        raise click.BadParameter(str(error), param=param) from None


@export_group.command("saev")
@click.argument("encoding")
@click.option("--layer", type=int, required=True, help="The block number, as in the table.")
@click.option(
    "--out",
    type=SHARDS,
    help="Folder to write, as a run of saev's.  [default: data/09_export/saev/runs/<encoding>-"
    "layer_<N> in the project]",
)
@click.option("--env", help="The configuration environment of the run.  [default: local]")
@click.option(
    "--params",
    default="",
    callback=_parse_params,
    help="The parameters of the run, as it had them.",
)
@click.option("--force", is_flag=True, help="Replace an older export.")
def export_saev_command(
    encoding: str,
    layer: int,
    out: Path | None,
    env: str | None,
    params: dict[str, Any],
    force: bool,
) -> None:
    """Write the codes of the labeled patches (token_acts.npz) and their probes
    (probe1d_metrics.npz), of ENCODING in the table, as saev's notebooks read them.
    """
    with _short_errors():
        project = _find_project("type this in the project's folder, after `kedro run`")
    from assay.export import export_saev
    from assay.pipelines.signs_of_life import told

    with told(_say_aside):
        lines = export_saev(project, encoding, layer, env=env, params=params, out=out, force=force)
    for line in lines:
        click.echo(line)


def _find_project(otherwise: str) -> Path:
    from kedro.utils import find_kedro_project

    project = find_kedro_project(Path.cwd())
    if project is None:
        raise ValueError(f"{Path.cwd()} is in no Kedro project: {otherwise}")
    return Path(project)


@contextmanager
def _short_errors(before: str = "") -> Iterator[None]:
    """Say what is wrong with data, files and disks in a line or two, and exit with 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise click.ClickException(f"{before}{error}") from error


if __name__ == "__main__":
    sys.exit(main(prog_name="assay"))

"""`assay shards`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from assay.commands.common import FOLDER, find_project, say_aside, short_errors

if TYPE_CHECKING:
    from assay.io.shards.verify import FolderVerdict


@click.group("shards")
def shards_group() -> None:
    """Check folders of shards."""


@shards_group.command("verify")
@click.argument("paths", type=FOLDER, nargs=-1, metavar="[PATH]...")
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
        with short_errors():
            paths = _configured_shards(env)
    verdicts = []
    for given in paths:
        path = given
        with suppress(ValueError, FileNotFoundError):  # which the verdict tells
            path = find_shards(given)
        with told(say_aside), Bar(desc=path.name, unit="B", unit_divisor=1024) as bar:

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
    from assay.plan import made_here

    project = find_project("name the shards to verify, or change to the project")
    bootstrap_project(project)
    parameters = read_parameters(project, env)
    paths = []
    for split, path in parameters.shards:
        if split in made_here(parameters) and not (project / path).exists():
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


def _say(faults: tuple[str, ...], remarks: tuple[str, ...]) -> str:
    return "\n".join(
        [
            *(f"BAD: {fault}" for fault in faults),
            *([] if faults else ["ok"]),
            *(f"note: {note}" for note in remarks),
        ]
    )

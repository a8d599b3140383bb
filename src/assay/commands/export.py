"""`assay export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from assay.commands.common import FOLDER, find_project, say_aside, short_errors


@click.group("export")
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
    type=FOLDER,
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
    with short_errors():
        project = find_project("type this in the project's folder, after `kedro run`")
    from assay.export import export_saev
    from assay.pipelines.signs_of_life import told

    with told(say_aside):
        lines = export_saev(project, encoding, layer, env=env, params=params, out=out, force=force)
    for line in lines:
        click.echo(line)

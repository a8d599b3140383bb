"""`assay sae`."""

from __future__ import annotations

from typing import Any

import click

from assay.commands.common import short_errors


@click.command("sae")
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

    with short_errors():
        found, commit = find(path)
    with short_errors(f"{path} cannot be read as it is:\n"):
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

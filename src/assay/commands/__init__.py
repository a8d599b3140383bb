"""`assay`: the commands that need no Kedro project, and `export`, which is for what a project has.
Importing this is quick: what a command needs, it imports itself.
"""

from __future__ import annotations

import click

from assay.commands.export import export_group
from assay.commands.extract import extract_command
from assay.commands.labels import labels_command
from assay.commands.sae import sae_command
from assay.commands.shards import shards_group


@click.group()
def main() -> None:
    """Assay's commands on shards, autoencoders and results. Training and probing: kedro run."""


for command in (extract_command, labels_command, shards_group, sae_command, export_group):
    main.add_command(command)

"""What the commands share: types of options, and how they speak."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

FOLDER = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, dir_okay=False)


class Pair(click.ParamType[Any]):
    """``224`` or ``14x14``; with `single` False only the latter."""

    name = "HxW"

    def __init__(self, *, single: bool) -> None:
        self.single = single

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A pair of numbers (height, width), or the one number that is typed."""
        parts = str(value).lower().split("x")
        if len(parts) not in ((1, 2) if self.single else (2,)) or not all(
            part.isdecimal() for part in parts
        ):
            self.fail(
                f"{value!r}; wanted {'N or ' if self.single else ''}HxW, whole numbers", param, ctx
            )
        numbers = tuple(int(part) for part in parts)
        return numbers if len(numbers) == 2 else numbers[0]


def say_aside(line: str) -> None:
    """Write a line to the standard error."""
    click.echo(line, err=True)


def find_project(otherwise: str) -> Path:
    """The Kedro project around the working directory.

    Raises:
        ValueError: there is none; it says to do ``otherwise``.
    """
    from kedro.utils import find_kedro_project

    project = find_kedro_project(Path.cwd())
    if project is None:
        raise ValueError(f"{Path.cwd()} is in no Kedro project: {otherwise}")
    return Path(project)


@contextmanager
def short_errors(before: str = "") -> Iterator[None]:
    """Say what is wrong with data, files and disks in a line or two, and exit with 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise click.ClickException(f"{before}{error}") from error

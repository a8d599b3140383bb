"""`kedro slurm`: submit, status, logs, cancel. Importing this is quick: what a command needs, it
imports itself.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from assay.slurm.submission import Submission

LINES = 10
"""Of each log that is shown with others."""

PATIENCE = 120.0
"""Seconds for which jobs that were cancelled are waited for: Slurm kills what does not end by
itself.
"""


@click.group("slurm")
def slurm_group() -> None:
    """The layers as jobs of Slurm: digits or images, then the layers side by side, then the report.

    What the jobs ask for is in conf/<env>/slurm.yml; see docs/slurm.md.
    """


@contextmanager
def _short_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _project() -> Path:
    from kedro.utils import find_kedro_project

    return Path(find_kedro_project(Path.cwd()) or Path.cwd())


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,79}", name, re.ASCII):
        raise click.BadParameter(
            f"found {name!r}, want letters, digits, `_`, `.` and `-`, 80 at the most",
            param_hint="'--name'",
        )
    return name


@slurm_group.command("submit")
@click.option("--env", "-e", help="Environment of the configuration, as of `kedro run`.")
@click.option(
    "--params",
    type=click.UNPROCESSED,
    default="",
    help="Parameters that override the configuration, as of `kedro run`.",
)
@click.option(
    "--name",
    help="What the jobs are called, and by what they are found again; the environment's otherwise.",
)
@click.option("--dry-run", is_flag=True, help="Only print the scripts.")
def submit_command(env: str | None, params: str, name: str | None, dry_run: bool) -> None:
    """Queue the jobs that make the table. The same command again goes on from what is there."""
    from assay.slurm.submission import folder_of
    from assay.slurm.submit import opened, scripts, submit

    env = env or os.environ.get("KEDRO_ENV") or None
    name = _check_name(name or env or "assay")
    with _short_errors():
        if dry_run:
            click.echo("\n".join(scripts(_project(), name, env, params)), nl=False)
            return
        with opened(env, params) as project:
            made = submit(project, name, env, params)
    for job in made.jobs:
        layers = f" of {' '.join(map(str, job.layers))}" if job.layers else ""
        click.echo(f"{job.id:>8}  {name}-{job.step}{layers}")
    click.echo(f"kedro slurm status {name}   Logs: {folder_of(name)}/")


@slurm_group.command("status")
@click.argument("name", required=False)
def status_command(name: str | None) -> None:
    """What has become of a submission, the newest if no NAME is given: what Slurm says of its jobs,
    and how many of their steps are up to date.
    """
    from assay.slurm import queue
    from assay.slurm.submit import opened

    with _short_errors():
        submission = _find(name)
        known = {each.id: each for each in queue.find(_ids(submission), ended=True)}
        with opened(submission.env, submission.params) as project:
            progress = {
                element: project.progress(element)
                for job in submission.jobs
                for element, _ in job.elements()
            }
    click.echo(
        f"{submission.name}: submitted {submission.submitted}"
        + (f", run {submission.run} of MLflow" if submission.run else "")
    )
    for job in submission.jobs:
        for element, number in job.elements():
            found = known.get(number)
            done, steps = progress[element]
            said = "ended" if found is None else f"{found.state:10} {found.elapsed:>10}"
            more = [f"{done} of {steps} steps"]
            if found is not None and found.restarts:
                more.append(f"restarted {found.restarts}x")
            if found is not None and found.reason != "None":
                more.append(found.reason)
            click.echo(f"{number:>10}  {element:10} {said:21}  {', '.join(more)}")


@slurm_group.command("logs")
@click.argument("name", required=False)
@click.argument("part", required=False)
def logs_command(name: str | None, part: str | None) -> None:
    """The last lines that the jobs of a submission have written, the newest if no NAME is given;
    with PART, as layer_23 or report, all of that job's.
    """
    from assay.slurm.submission import folder_of

    with _short_errors():
        submission = _find(name)
        elements = {
            element: job.log_of(number, _project() / folder_of(submission.name))
            for job in submission.jobs
            for element, number in job.elements()
        }
        if part is not None:
            if part not in elements:
                raise ValueError(
                    f"`{submission.name}` has no part `{part}`; there are {', '.join(elements)}."
                )
            click.echo(_read(elements[part]), nl=False)
            return
        for path in elements.values():
            click.echo(f"==> {path}")
            click.echo("".join(_read(path).splitlines(keepends=True)[-LINES:]))


@slurm_group.command("cancel")
@click.argument("name")
def cancel_command(name: str) -> None:
    """Cancel all jobs of a submission, and wait until none is left. What they have saved stays."""
    from assay.slurm import queue

    with _short_errors():
        submission = _find(name)
        until = time.monotonic() + PATIENCE
        there = queue.find(_ids(submission))
        ended = len(there)
        while there:
            # Again: one that was just being queued again would come back.
            queue.cancel(each.id for each in there)
            if time.monotonic() > until:
                raise ValueError(
                    f"Slurm has not ended {', '.join(each.id for each in there)} of `{name}`, which"
                    " were cancelled: see `squeue`."
                )
            time.sleep(1)
            there = queue.find(_ids(submission))
        click.echo(f"{name}: {ended} jobs cancelled; none is left.")
        if ended:
            from assay.slurm.submit import close, opened

            with opened(submission.env, submission.params) as project:
                close(project, submission, "its jobs were cancelled")


def _ids(submission: Submission) -> list[str]:
    return [job.id for job in submission.jobs]


def _find(name: str | None) -> Submission:
    """The submission of a name, or the newest."""
    from assay.slurm.submission import all_submissions

    found = {each.name: each for each in all_submissions(_project())}
    if name is None and found:
        return list(found.values())[-1]
    if name not in found:
        wanted = f"There is no submission `{name}`" if name else "Nothing was submitted here"
        there = f"; there are {', '.join(sorted(found))}" if found else ": see `kedro slurm submit`"
        raise ValueError(f"{wanted}{there}.")
    return found[name]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return "(nothing yet)\n"

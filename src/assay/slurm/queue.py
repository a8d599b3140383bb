"""Slurm's own commands. None of them needs Slurm's database of jobs that have ended (sacct)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Element:
    """What Slurm says of a job, or of an array's element."""

    id: str
    """The job's number, with `_` and its own where it is an element."""
    state: str
    """PENDING, RUNNING, COMPLETED, ..."""
    reason: str
    """Why it is not running."""
    restarts: int
    elapsed: str
    """How long it has run since it was started last."""


def submit(script: str, options: Sequence[str], variables: Mapping[str, str]) -> str:
    """Queue a script; gives the job's number. The job has this process's environment, and finds
    this interpreter's programs first.

    Raises:
        ValueError: Slurm refuses it, or is not here.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    said = _ask(
        "sbatch", "--parsable", *options, script=script, variables={"PATH": path, **variables}
    )
    return said.strip().splitlines()[-1].partition(";")[0]  # a federation names its cluster


def find(jobs: Iterable[str], *, ended: bool = False) -> list[Element]:
    """What Slurm knows of jobs, each element of an array, those that have ended as well if that is
    wanted: Slurm forgets them after minutes.

    Raises:
        ValueError: Slurm does not answer.
    """
    wanted = ",".join(jobs)
    fields = ("JobArrayID", "State", "Reason", "RestartCnt", "TimeUsed")
    try:
        said = _ask(
            "squeue",
            "--noheader",
            "--array",
            f"--jobs={wanted}",
            f"--Format={','.join(f'{field}:|' for field in fields)}",
            *(["--states=all"] if ended else []),
        )
    except ValueError as error:
        if "Invalid job id" in str(error):  # it has forgotten all of them
            return []
        raise
    rows = [line.split("|") for line in said.splitlines() if line.count("|") >= len(fields)]
    return [Element(row[0].strip(), row[1], row[2], int(row[3] or 0), row[4]) for row in rows]


def cancel(jobs: Iterable[str]) -> None:
    """Cancel jobs that Slurm knows; those that have ended stay as they are.

    Raises:
        ValueError: Slurm does not answer.
    """
    _ask("scancel", "--quiet", *jobs)


def max_array_size() -> int:
    """One more than the largest index that an element of an array may have.

    Raises:
        ValueError: Slurm does not answer.
    """
    found = re.search(
        r"^MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config"), re.MULTILINE
    )
    return max(1, int(found[1])) if found else 1001


def _outside() -> dict[str, str]:
    """The environment, without what a job has that this may run in: srun, in the job that is
    submitted, would heed it.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SLURMD_", "SRUN_")) or name == "SLURM_CONF"
    }


def _ask(
    program: str,
    *arguments: str,
    script: str | None = None,
    variables: Mapping[str, str] | None = None,
) -> str:
    try:
        ended = subprocess.run(
            [program, *arguments],
            input=script,
            env={**_outside(), **(variables or {})},
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise ValueError(
            f"There is no `{program}` here: run this where Slurm is, or layers side by side without"
            " it (docs/slurm.md)."
        ) from None
    if ended.returncode != 0:
        raise ValueError(" ".join(f"{program}: {ended.stderr or ended.stdout}".split()))
    return ended.stdout

"""What was submitted, as a file of the project's, and what has become of it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from assay.encodings import layer_name
from assay.io.publish import publish_file
from assay.io.strict_json import read_json_file

FOLDER = Path("data/slurm")
FILE = "submission.json"


class QueuedJob(BaseModel):
    """A job that Slurm was given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: str
    id: str
    layers: tuple[int, ...] = ()

    def elements(self) -> Iterator[tuple[str, str]]:
        """The names of what it does, `layer_23` or its step, and Slurm's id of each."""
        for index, layer in enumerate(self.layers):
            yield layer_name(layer), f"{self.id}_{index}"
        if not self.layers:
            yield self.step, self.id

    def log_of(self, element: str, folder: Path) -> Path:
        """The file that an element writes to: that of `log_pattern`."""
        return folder / f"{self.step}-{element}.log"


def log_pattern(folder: Path, step: str, *, is_array: bool) -> str:
    """The path of a job's log, as sbatch reads it, in which a percent sign stands for more."""
    return str(folder / f"{step}-{'%A_%a' if is_array else '%j'}.log")


class Submission(BaseModel):
    """One `kedro slurm submit`: a name, what it runs, and its jobs so far."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    env: str | None
    params: str
    run: str | None
    """The id of its run of MLflow."""
    fingerprint: str
    """Of the table that it makes: what it is made from."""
    submitted: str
    jobs: tuple[QueuedJob, ...] = ()

    def write(self, project: Path) -> None:
        """Write it down, whole or not at all."""
        path = project / folder_of(self.name) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with publish_file(path) as partial:
            partial.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def arguments(env: str | None, params: str) -> list[str]:
    """Of every `kedro run` of a submission."""
    return [*([] if env is None else [f"--env={env}"]), *([f"--params={params}"] if params else [])]


def folder_of(name: str) -> Path:
    """The folder of a submission and its logs, in the project."""
    return FOLDER / name


def read_submission(project: Path, name: str) -> Submission | None:
    """What was submitted last under a name; None: nothing was.

    Raises:
        ValueError: the file says something else.
    """
    path = project / folder_of(name) / FILE
    try:
        return Submission.model_validate(read_json_file(path))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ValueError(
            f"{path} is no submission of this version ({error.errors()[0]['msg']}): remove it"
        ) from None


def all_submissions(project: Path) -> list[Submission]:
    """Every submission of a project, the newest last."""
    names = [path.parent.name for path in (project / FOLDER).glob(f"*/{FILE}")]
    found = [read_submission(project, name) for name in names]
    # As moments: an hour comes twice when the clocks go back, and people travel.
    return sorted(
        (each for each in found if each is not None),
        key=lambda each: datetime.fromisoformat(each.submitted),
    )

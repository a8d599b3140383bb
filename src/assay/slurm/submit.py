"""Submitting a project's jobs, and what the project itself knows of their work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from kedro.config import MissingConfigException
from kedro.framework.project import pipelines
from kedro.framework.session import KedroSession
from kedro.io import DatasetError

from assay.arguments import parse_pairs
from assay.configuration import current_configuration, expand_home, read_parameters
from assay.freshness import Freshness
from assay.parameters import Parameters
from assay.plan import make_plan
from assay.preflight import check_pipeline, find_d_model
from assay.runnable import check_runnable
from assay.slurm import queue
from assay.slurm.jobs import Job, plan_jobs, render, split
from assay.slurm.options import SlurmOptions, read_options
from assay.slurm.submission import (
    QueuedJob,
    Submission,
    arguments,
    folder_of,
    log_pattern,
    read_submission,
)
from assay.tracking.parent import close_parent, open_parent
from assay.work import current_freshness


@dataclass(frozen=True)
class Opened:
    """A project with a configuration in force."""

    project: Path
    hooks: Any
    freshness: Freshness
    jobs: list[Job]
    """What there is to submit."""

    def progress(self, element: str) -> tuple[int, int]:
        """How many steps of a layer, or of another part of the work, are up to date, and how many
        there are.
        """
        whole = pipelines["__default__"]
        names = [node.name for node in whole.nodes if node.name.partition(".")[0] == element]
        left = self.freshness.stale(whole.only_nodes(*names)).nodes if names else []
        return len(names) - len(left), len(names)


@contextmanager
def opened(env: str | None, params: str) -> Iterator[Opened]:
    """A project, as a `kedro run` with these arguments has it, and checked as that checks it.

    Raises:
        ValueError: something in the configuration, or in the shards, is not as it should be.
        OSError: something cannot be read.
    """
    with KedroSession.create(env=env, runtime_params=parse_params(params)) as session:
        assert isinstance(session, KedroSession)
        try:
            session.load_context()._get_catalog()
            project, parameters = current_configuration()
            check_pipeline(parameters, project, pipelines["__default__"])
            freshness = current_freshness()
            check_runnable(freshness, pipelines["__default__"])
        except (MissingConfigException, DatasetError) as error:
            raise ValueError(str(error)) from error
        yield Opened(project, session._hook_manager, freshness, _jobs(parameters, project))


def scripts(project: Path, name: str, env: str | None, params: str) -> list[str]:
    """The scripts of a submission, in the order of its jobs, from the configuration alone.

    Raises:
        ValueError: something in it is not as it should be.
    """
    parameters = read_parameters(project, env, parse_params(params))
    options = read_options(project, env)
    return [
        render(job, name, options, arguments(env, params)) for job in _jobs(parameters, project)
    ]


def _jobs(parameters: Parameters, project: Path) -> list[Job]:
    return plan_jobs(make_plan(parameters, find_d_model(parameters, project)))


def parse_params(params: str) -> dict[str, Any]:
    """What is typed after --params, nested."""
    return dict(expand_home(parse_pairs(params)))


def submit(project: Opened, name: str, env: str | None, params: str) -> Submission:
    """Queue all jobs of a project, each after the one before it, and write down which they are.

    The run of MLflow is that of the last submission of this name, where that was to make the very
    same table.

    Raises:
        ValueError: jobs of this name have not ended; or Slurm or MLflow refuses something. Then
            nothing stays queued.
    """
    options = read_options(project.project, env)
    last = read_submission(project.project, name)
    check_ended(last)
    jobs = [each for job in project.jobs for each in split(job, queue.max_array_size())]
    fingerprint = project.freshness.fingerprint("baselines")
    same = last is not None and last.fingerprint == fingerprint
    run = open_parent(project.hooks, name, last.run if last is not None and same else None)
    made = Submission(
        name=name,
        env=env,
        params=params,
        run=run,
        fingerprint=fingerprint,
        submitted=datetime.now().astimezone().isoformat(timespec="seconds"),
    )
    made.write(project.project)  # so that the run is found again, whatever becomes of the rest
    try:
        for job in jobs:
            queued = _queue(job, made, project.project, options)
            made = made.model_copy(update={"jobs": (*made.jobs, queued)})
            made.write(project.project)
    except BaseException:
        if made.jobs:
            queue.cancel(job.id for job in made.jobs)
        close(project, made, "its jobs were not queued")
        raise
    return made


def check_ended(last: Submission | None) -> None:
    """Check that no job of the last submission of a name is queued or runs.

    Raises:
        ValueError: naming those that do.
    """
    found = queue.find(job.id for job in last.jobs) if last is not None and last.jobs else []
    if last is not None and found:
        there = ", ".join(f"{each.id} {each.state}" for each in found)
        raise ValueError(
            f"`{last.name}` has jobs in the queue ({there}): wait for them, end them with `kedro"
            f" slurm cancel {last.name}`, or submit under another --name."
        )


def _queue(job: Job, made: Submission, project: Path, options: SlurmOptions) -> QueuedJob:
    waits = [each.id for each in made.jobs if each.step == job.after]
    conditions = [f"afterok:{':'.join(waits)}"] if waits else []
    before = [each.id for each in made.jobs if each.step == job.step]
    if before and options.parallel is not None:  # which is by array
        conditions.append(f"afterany:{before[-1]}")
    number = queue.submit(
        render(job, made.name, options, arguments(made.env, made.params)),
        [
            f"--chdir={project}",
            f"--output={log_pattern(folder_of(made.name), job.step, is_array=bool(job.layers))}",
            *([f"--dependency={','.join(conditions)}"] if conditions else []),
        ],
        {} if made.run is None else {"MLFLOW_RUN_ID": made.run},
    )
    return QueuedJob(step=job.step, id=number, layers=job.layers)


def close(project: Opened, submission: Submission, reason: str) -> None:
    """Have MLflow know why a submission has no jobs any more."""
    if submission.run is not None:
        close_parent(project.hooks, submission.run, reason)

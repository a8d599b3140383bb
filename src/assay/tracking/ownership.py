"""Whose a run of MLflow is and how it ends, also where several processes share it: each makes a
part (`kedro run --namespaces=layer_3` with MLFLOW_RUN_ID), and notes itself beside the others.
"""

from __future__ import annotations

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from assay.tracking import process

FAILURE = "failure"
"""The tag that says why a run of MLflow is not FINISHED."""

NOT_LOGGED = "not_logged"
"""The tag of a run that ended well while MLflow did not, with the first that it did not take."""

SUBMISSION = "submission"
"""The tag of a run that was made for jobs of a queue: its last is of no part."""

BADLY = ("FAILED", "KILLED")
"""What a part's `process` tag says when it has ended so, the worse first."""


def of_part(tag: str, part: str) -> str:
    """A tag of one part of a run; of all of it where the part has no name."""
    return f"{tag}.{part}" if part else tag


def take_up(run: Run, part: str) -> None:
    """Note this process as the one that makes a part of a run from now on, and take off why that
    ended before. Whoever makes all of it stands for every part.
    """
    client, run_id = MlflowClient(), run.info.run_id
    client.set_tag(run_id, of_part(process.TAG, part), process.own_process())
    for tag in run.data.tags:
        name, _, of = tag.partition(".")
        if (name in (FAILURE, NOT_LOGGED) and (not part or of in ("", part))) or (
            name == process.TAG and of and not part
        ):
            client.delete_tag(run_id, tag)


def end_part(run_id: str, part: str, status: str) -> str | None:
    """Note how this process's part of a run has ended.

    Returns:
        The status that the run ends with, the worst of its parts', or waits with for further jobs;
        None: others are still at theirs.
    """
    client, tag = MlflowClient(), of_part(process.TAG, part)
    if client.get_run(run_id).data.tags.get(tag) == process.own_process():
        if status in BADLY:
            client.set_tag(run_id, tag, status)
        else:
            client.delete_tag(run_id, tag)
    # Only now, so that of two that end at once one sees that it is the last.
    run, ended = client.get_run(run_id), {status}
    for noted in _parts(run).values():
        if noted not in BADLY and not process.is_gone(noted):
            return None
        ended.add(noted if noted in BADLY else "KILLED")
    well = "SCHEDULED" if SUBMISSION in run.data.tags else status
    return next((each for each in BADLY if each in ended), well)


def close_runs_of_the_dead(experiment: str) -> None:
    """Mark the runs of an experiment whose processes have ended without closing them, as `kill -9`
    has it, as killed.
    """
    client = MlflowClient()
    for run in client.search_runs([experiment], "attributes.status = 'RUNNING'"):
        parts = _parts(run) or {"": run.data.tags.get(process.TAG, "")}
        gone = [noted for noted in parts.values() if process.is_gone(noted)]
        if gone and all(noted in (*gone, *BADLY) for noted in parts.values()):
            end_with_reason(
                run.info.run_id,
                "KILLED",
                f"its process ended without a word: {process.describe(gone[-1])}",
            )


def end_with_reason(run: str, status: str, reason: str) -> None:
    """Close a run that is not whole, and say why."""
    client = MlflowClient()
    client.set_tag(run, FAILURE, reason[:5000])
    client.set_terminated(run, status)


def forget_failure(run: Run) -> None:
    """Take off a run why it ended before, or was not whole."""
    for tag in {FAILURE, NOT_LOGGED} & run.data.tags.keys():
        MlflowClient().delete_tag(run.info.run_id, tag)


def _parts(run: Run) -> dict[str, str]:
    """What the processes that make parts of a run have noted, by the parts' names."""
    prefix = f"{process.TAG}."
    return {
        tag.removeprefix(prefix): noted
        for tag, noted in run.data.tags.items()
        if tag.startswith(prefix)
    }

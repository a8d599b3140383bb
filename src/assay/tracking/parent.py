"""A run of MLflow that is there before anybody works for it: that of several processes, which take
it up by MLFLOW_RUN_ID.
"""

from __future__ import annotations

from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.tracking.context.registry import resolve_tags

from assay.tracking.connection import Connection
from assay.tracking.hook import TrackingHook
from assay.tracking.ownership import SUBMISSION, end_with_reason


def open_parent(hooks: Any, name: str, earlier: str | None = None) -> str | None:
    """The id of a run that waits for its first process (SCHEDULED): ``earlier``'s where that is
    there, else a new one's; None where mlflow.yml has nothing tracked.

    Args:
        hooks: of a session that has a context.
        name: of a new run.
        earlier: the id of a run that is to be gone on with.

    Raises:
        ValueError: MLflow does not answer.
    """
    connection = _connection_of(hooks)
    found: list[str | None] = []
    connection.writer.submit("the run", lambda: found.append(_open(connection, name, earlier)))
    connection.writer.wait()
    if not found:
        raise ValueError(
            f"MLflow has made no run for the jobs, and nothing was submitted: see to its server, or"
            f" to MLFLOW_TRACKING_URI ({connection.writer.failure})"
        )
    return found[0]


def close_parent(hooks: Any, run: str, reason: str) -> None:
    """Mark a run that is not finished as KILLED, and say why; where MLflow answers."""
    connection = _connection_of(hooks)
    connection.writer.submit("the end of the run", _close, run, reason)
    connection.writer.wait()


def _connection_of(hooks: Any) -> Connection:
    hook = next(each for each in hooks.get_plugins() if isinstance(each, TrackingHook))
    assert hook.connection is not None
    return hook.connection


def _open(connection: Connection, name: str, earlier: str | None) -> str | None:
    if "__default__" in connection.settings.disable_tracking.pipelines:
        return None
    client = MlflowClient()
    if earlier is not None and _is_there(client, earlier):
        run = earlier
    else:
        experiment = connection.settings.experiment._experiment.experiment_id
        created = client.create_run(
            experiment, run_name=name, tags=resolve_tags({SUBMISSION: name})
        )
        run = str(created.info.run_id)
    client.update_run(run, status="SCHEDULED")
    return run


def _is_there(client: MlflowClient, run: str) -> bool:
    try:
        return bool(client.get_run(run).info.lifecycle_stage == "active")
    except MlflowException:
        return False


def _close(run: str, reason: str) -> None:
    client = MlflowClient()
    if client.get_run(run).info.status != "FINISHED":
        end_with_reason(run, "KILLED", reason)

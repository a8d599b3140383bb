"""The run of MLflow that is there before the jobs that log to it."""

import shutil
from types import SimpleNamespace

import mlflow
import pytest
from mlflow import MlflowClient

from assay.tracking import process
from assay.tracking.hook import TrackingHook
from assay.tracking.ownership import close_runs_of_the_dead
from assay.tracking.parent import close_parent, open_parent
from assay.tracking.writer import Writer


@pytest.fixture
def client(tmp_path, empty_database):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    yield MlflowClient(uri)
    mlflow.set_tracking_uri(before)


@pytest.fixture
def connection(client):
    experiment = SimpleNamespace(experiment_id=client.create_experiment("assay"))
    made = SimpleNamespace(
        settings=SimpleNamespace(
            experiment=SimpleNamespace(_experiment=experiment),
            disable_tracking=SimpleNamespace(pipelines=[]),
        ),
        writer=Writer(),
    )
    yield made
    made.writer.stop()


@pytest.fixture
def hooks(connection):
    hook = TrackingHook()
    hook._connection = connection
    return SimpleNamespace(get_plugins=lambda: [object(), hook])


def test_it_waits_and_is_nobodys(client, hooks):
    run = client.get_run(open_parent(hooks, "ade20k"))
    assert (run.info.status, run.info.run_name) == ("SCHEDULED", "ade20k")
    # The process that made it ends, and the next one that begins closes the runs of the dead.
    assert process.TAG not in run.data.tags
    close_runs_of_the_dead(run.info.experiment_id)
    assert client.get_run(run.info.run_id).info.status == "SCHEDULED"


def test_an_earlier_one_is_gone_on_with_where_it_is_there(client, hooks):
    first = open_parent(hooks, "x")
    client.set_terminated(first, "KILLED")
    assert open_parent(hooks, "x", first) == first
    assert client.get_run(first).info.status == "SCHEDULED"
    client.delete_run(first)
    for gone in (first, "0" * 32):
        assert open_parent(hooks, "x", gone) not in {first, gone}


def test_one_whose_jobs_are_cancelled_is_killed_unless_it_is_finished(client, hooks):
    cancelled, finished = open_parent(hooks, "x"), open_parent(hooks, "x")
    client.set_terminated(finished, "FINISHED")
    assert cancelled is not None and finished is not None
    for run in (cancelled, finished):
        close_parent(hooks, run, "its jobs were cancelled")
    assert client.get_run(cancelled).info.status == "KILLED"
    assert client.get_run(cancelled).data.tags["failure"] == "its jobs were cancelled"
    assert client.get_run(finished).info.status == "FINISHED"


def test_there_is_none_where_nothing_is_tracked(client, hooks, connection):
    connection.settings.disable_tracking.pipelines = ["__default__"]
    assert open_parent(hooks, "x") is None
    assert not client.search_runs(["0", "1"])


def test_a_server_that_is_down_is_told(hooks, connection):
    connection.writer.fail("the experiment", OSError("refused"))
    with pytest.raises(ValueError, match=r"nothing was submitted: .*OSError: refused"):
        open_parent(hooks, "x")

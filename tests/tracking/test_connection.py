"""The parent run: whose it is, how it is taken up and closed, and servers that do not answer as
they should.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import sys
import time
import traceback
from contextlib import closing

import mlflow
import pytest
from mlflow import MlflowClient

from assay.tracking import process
from assay.tracking.connection import PARENT
from assay.tracking.ownership import FAILURE, NOT_LOGGED

DEAD = json.dumps(json.loads(process.own_process()) | {"began": 1})


def experiment_id(client: MlflowClient) -> str:
    experiment = client.get_experiment_by_name("assay")
    assert experiment is not None
    return str(experiment.experiment_id)


def end(connection, status="FINISHED", reason=None):
    connection.close(status, reason)
    connection.writer.wait()


def test_a_run_says_whose_it_is_and_how_it_was_started(connect, runs):
    connection = connect()
    (run,) = runs().values()
    assert run.info.status == "RUNNING"
    assert run.data.tags[process.TAG] == process.own_process()
    assert run.data.tags["kedro_command"] == "kedro run --pipeline=__default__"
    assert run.data.tags["mlflow.user"]
    assert not [value for value in run.data.tags.values() if " object at 0x" in value]
    assert run.data.tags["runner"] == "kedro.runner.SequentialRunner"
    assert mlflow.active_run() is None  # in this thread
    end(connection)
    assert runs()["__default__"].info.status == "FINISHED"
    assert connection.writer.failure is None


def test_its_files_lie_in_the_project_as_mlflow_reads_their_place(project, connect):
    connection = connect()
    (project / "a.txt").write_text("a")
    connection.writer.submit(
        "a", MlflowClient().log_artifact, connection.parent.run_id, str(project / "a.txt")
    )
    end(connection)
    assert len(list((project / "mlruns").rglob("a.txt"))) == 1


def test_a_run_that_ends_badly_says_why(connect, runs):
    end(connect(), "KILLED", "InterruptedRunError: the run was interrupted")
    (run,) = runs().values()
    assert (run.info.status, run.data.tags[FAILURE]) == (
        "KILLED",
        "InterruptedRunError: the run was interrupted",
    )


def test_the_runs_of_processes_that_are_gone_are_closed_and_no_others(connect, runs):
    connect(opened=False)
    client = MlflowClient()
    experiment = experiment_id(client)
    elsewhere = json.dumps(json.loads(DEAD) | {"host": "elsewhere"})
    for name, noted in {
        "dead": DEAD,
        "live": process.own_process(),
        "elsewhere": elsewhere,
        "unknown": None,
    }.items():
        parent = client.create_run(
            experiment, run_name=name, tags={process.TAG: noted} if noted else {}
        )
        tags = {PARENT: parent.info.run_id} | ({process.TAG: noted} if noted else {})
        client.create_run(experiment, run_name=f"{name}/child", tags=tags)
    done = client.create_run(experiment, run_name="done", tags={process.TAG: DEAD})
    client.set_terminated(done.info.run_id)
    connect(opened=False)
    found = runs()
    status = {name: run.info.status for name, run in found.items()}
    assert status == {
        "dead": "KILLED",
        "dead/child": "KILLED",
        "done": "FINISHED",
        **dict.fromkeys(
            ("live", "live/child", "elsewhere", "elsewhere/child", "unknown", "unknown/child"),
            "RUNNING",
        ),
    }
    assert "its process ended without a word: pid" in found["dead/child"].data.tags[FAILURE]
    assert FAILURE not in found["done"].data.tags


@pytest.mark.parametrize("where", ["environment", "active"])
def test_a_run_that_is_taken_up_keeps_its_name_and_loses_the_reason_it_ended_for(
    connect, runs, monkeypatch, where
):
    connect(opened=False)
    client = MlflowClient()
    experiment = client.create_experiment("thesis")
    run = client.create_run(
        experiment, run_name="queue's", tags={process.TAG: DEAD, FAILURE: "interrupted"}
    )
    client.set_terminated(run.info.run_id, "KILLED")
    if where == "environment":
        monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
        connection = connect()
        # A second session in this process has a run of its own.
        assert "MLFLOW_RUN_ID" not in os.environ
    else:
        mlflow.set_experiment(experiment_id=experiment)
        with mlflow.start_run(run.info.run_id):
            connection = connect()
    assert (connection.parent.run_id, connection.parent.experiment_id) == (
        run.info.run_id,
        experiment,
    )
    end(connection)
    (found,) = runs().values()
    assert (found.info.run_name, found.info.status) == ("queue's", "FINISHED")
    assert FAILURE not in found.data.tags
    assert found.data.tags[process.TAG] == process.own_process()


def test_an_experiment_that_another_process_makes_at_the_same_time_is_used(
    connect, runs, monkeypatch
):
    create, asked = MlflowClient.create_experiment, []

    def race(self, name, **options):
        asked.append(name)
        create(self, name, **options)
        return create(self, name, **options)

    monkeypatch.setattr(MlflowClient, "create_experiment", race)
    connection = connect()
    end(connection)
    assert asked == ["assay"]
    assert connection.writer.failure is None
    assert runs()["__default__"].info.status == "FINISHED"


def test_a_pipeline_that_is_not_to_be_tracked_has_no_run(project, connect, runs):
    (project / "conf/local/mlflow.yml").write_text(
        "tracking: {disable_tracking: {pipelines: [__default__]}}"
    )
    connection = connect()
    end(connection)
    assert connection.parent is None
    assert connection.writer.failure is None
    assert runs() == {}


def test_a_configuration_that_is_wrong_is_refused_before_any_work(project, connect):
    (project / "conf/local/mlflow.yml").write_text("server: {mlflow_traking_uri: a}")
    with pytest.raises(ValueError, match="mlflow_traking_uri") as refused:
        connect()
    told = (
        f"mlflow.yml in {project / 'conf'}: `server.mlflow_traking_uri`: Extra inputs are not"
        " permitted"
    )
    assert str(refused.value) == told


ANSWERS = {
    "page": (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html>\n<p>Log in first.</p>\n</html>"
    ),
    "error": b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\n\r\nboom",
    "nonsense": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n[1, 2]",
    "closed": b"",
}


@pytest.mark.parametrize("answer", [*ANSWERS, "silence"])
def test_a_server_that_does_not_answer_as_one_costs_a_line_and_seconds(
    connect, server, monkeypatch, caplog, answer
):
    monkeypatch.setattr("assay.tracking.writer.PATIENCE", 1.0)
    with (
        server(ANSWERS.get(answer)) as (address, asked),
        caplog.at_level(logging.ERROR, logger="assay"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        began = time.monotonic()
        connection = connect()
        end(connection)
        assert time.monotonic() - began < 3
    assert 1 <= len(asked) <= 2
    assert connection.parent is None
    (record,) = [record for record in caplog.records if record.name.startswith("assay")]
    assert "from the experiment: " in record.getMessage()
    assert "\n" not in record.getMessage()
    assert len(record.getMessage()) < 600


def test_a_server_that_is_down_costs_a_line(connect, server, monkeypatch):
    with server(b"") as (address, _):
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    connection = connect()
    end(connection)
    assert (
        "Connection refused" in connection.writer.failure
        or "Max retries" in connection.writer.failure
    )


@pytest.mark.parametrize("at", [1, 4, 6, 7, 8, 9, 12])
def test_from_whichever_request_on_a_store_fails_the_run_goes_on(connect, runs, monkeypatch, at):
    """Fails for good from the request of this number on: what was begun is closed by whoever comes
    next.
    """
    count = 0

    def failing(original):
        def request(self, *arguments, **options):
            nonlocal count
            count += 1
            if count >= at:
                raise ConnectionError("500")
            return original(self, *arguments, **options)

        return request

    with monkeypatch.context() as patch:
        patch.setattr(process, "own_process", lambda: DEAD)
        for name in (
            "get_experiment_by_name",
            "create_experiment",
            "create_run",
            "get_run",
            "set_tag",
            "search_runs",
        ):
            patch.setattr(MlflowClient, name, failing(getattr(MlflowClient, name)))
        connection = connect()
        end(connection)
    assert (connection.writer.failure is None) == (count < at)
    connect(opened=False)
    assert "RUNNING" not in {run.info.status for run in runs().values()}


def test_a_database_that_is_locked_holds_nothing_up(project, connect, monkeypatch):
    monkeypatch.setattr("assay.tracking.writer.PATIENCE", 0.5)
    connection = connect()
    with closing(sqlite3.connect(project / "mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        connection.writer.submit(
            "a metric", MlflowClient().log_metric, connection.parent.run_id, "a", 1.0
        )
        end(connection)
        assert time.monotonic() - began < 3
        assert connection.writer.failure == "a metric: TimeoutError: no answer for 0 s"
        # It does not wait in SQLite, whose connection the process would wait for when it ends.
        frames = traceback.extract_stack(sys._current_frames()[connection.writer._thread.ident])
        assert "_patiently" in {frame.name for frame in frames}


@pytest.mark.parametrize("level", ["EXCLUSIVE", "IMMEDIATE", "DEFERRED"])
def test_a_database_that_is_locked_for_a_while_gets_everything(project, connect, runs, level):
    connection = connect()
    with closing(sqlite3.connect(project / "mlflow.db", isolation_level=None)) as other:
        other.execute(f"BEGIN {level}")
        other.execute("SELECT * FROM runs").fetchall()
        connection.writer.submit(
            "a metric", MlflowClient().log_metric, connection.parent.run_id, "a", 1.0
        )
        time.sleep(0.5)
        other.execute("ROLLBACK")
    end(connection)
    assert runs()["__default__"].data.metrics == {"a": 1.0}
    assert connection.writer.failure is None


def test_what_is_closed_after_a_failure_says_that_it_is_not_whole(connect, runs):
    connection = connect()
    connection.writer.submit("a file", lambda: 1 / 0)
    end(connection)
    (run,) = runs().values()
    assert run.info.status == "FINISHED"
    assert run.data.tags[NOT_LOGGED] == "a file: ZeroDivisionError: division by zero"


def test_a_second_run_in_one_process_has_a_parent_of_its_own(connect):
    for _ in range(2):
        end(connect())
    assert len(MlflowClient().search_runs([experiment_id(MlflowClient())])) == 2

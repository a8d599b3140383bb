"""Many writers on PostgreSQL, spoken to directly and through MLflow's tracking server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from sqlalchemy import create_engine, text

from assay.tracking import database
from assay.tracking.database import prepare
from assay.tracking.process import TAG
from many_writers import make_rows
from postgresql import PASSWORD, QUIET, PostgreSQL, find_programs, free_port, serve_mlflow

HELPERS = Path(__file__).parents[1] / "helpers"
LAYERS, ROWS = 8, 6

pytest.importorskip("psycopg2")


@pytest.fixture(scope="module")
def postgresql() -> Iterator[PostgreSQL]:
    programs = find_programs()
    if programs is None:
        pytest.skip("needs PostgreSQL's initdb, and for root a user postgres")
    server = PostgreSQL(programs)
    yield server
    server.remove()


@pytest.fixture(scope="module")
def writers() -> Iterator[subprocess.Popen[str]]:
    """The process whose forks write."""
    process = subprocess.Popen(
        [sys.executable, str(HELPERS / "many_writers.py")],
        env=os.environ | QUIET,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.communicate(timeout=60)


@pytest.fixture
def write(
    writers: subprocess.Popen[str], project: Path, planted: tuple[Path, Path]
) -> Callable[..., None]:
    """Have a layer's run logged by each of eight processes at once."""

    def run(uri: str, parent: str | None) -> None:
        request = {
            "project": str(project),
            "shards": list(map(str, planted)),
            "uri": uri,
            "parent": parent,
            "n": LAYERS,
            "rows": ROWS,
        }
        assert writers.stdin is not None
        assert writers.stdout is not None
        print(json.dumps(request), file=writers.stdin, flush=True)
        assert json.loads(writers.stdout.readline()) == [None] * LAYERS

    return run


def runs_of(uri: str) -> tuple[list[Any], list[Any]]:
    """The parents and the children."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("assay")
    assert experiment is not None
    found = list(client.search_runs([experiment.experiment_id]))
    children = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    return [run for run in found if run not in children], children


def assert_whole(children: list[Any]) -> None:
    """Every child is there once, finished, with all that it was told."""
    wanted = {f"layer_{layer}/{name}" for layer in range(LAYERS) for name in make_rows(ROWS)}
    assert Counter(child.info.run_name for child in children) == dict.fromkeys(wanted, 1)
    assert {child.info.status for child in children} == {"FINISHED"}
    for child in children:
        assert child.data.metrics == {"map": 0.5, "probe_r": 0.1, "nmse": 0.9, "l0": 1.0}
        assert child.data.params["method"] == "kmeans"
        assert {each.dataset.name for each in child.inputs.dataset_inputs}


def make_parent(uri: str) -> str:
    client = MlflowClient(uri)
    run = client.create_run(client.create_experiment("assay"), run_name="queue's")
    client.update_run(run.info.run_id, status="SCHEDULED")
    return str(run.info.run_id)


def test_eight_that_begin_on_an_empty_database_have_a_run_each(
    postgresql: PostgreSQL, write: Callable[..., None]
) -> None:
    uri = postgresql.new_database("each")
    write(uri, None)
    parents, children = runs_of(uri)
    assert [parent.info.status for parent in parents] == ["FINISHED"] * LAYERS
    assert_whole(children)
    said = json.dumps([run.to_dictionary() for run in (*parents, *children)])
    assert PASSWORD not in said


@pytest.mark.parametrize("through", ["directly", "server"])
def test_eight_that_share_a_run_leave_each_child_once(
    postgresql: PostgreSQL, write: Callable[..., None], tmp_path: Path, through: str
) -> None:
    uri = postgresql.new_database(f"shared_{through}")
    if through == "directly":
        prepare(uri)
        write(uri, make_parent(uri))
        found = runs_of(uri)
        files = set()
    else:
        with serve_mlflow(uri, tmp_path / "files") as address:
            parent = make_parent(address)
            write(address, parent)
            found = runs_of(address)
            files = {each.path for each in MlflowClient(address).list_artifacts(parent)}
    (parent_run,), children = found
    assert_whole(children)
    assert (parent_run.info.status, parent_run.info.run_name) == ("FINISHED", "queue's")
    assert not [tag for tag in parent_run.data.tags if tag.startswith(TAG)]
    if through == "server":
        assert files == {f"layer_{layer}.json" for layer in range(LAYERS)}
        assert list((tmp_path / "files").rglob("layer_7.json"))


def test_whoever_comes_while_another_makes_the_tables_waits_and_says_that_it_lives(
    postgresql: PostgreSQL,
) -> None:
    uri, heard = postgresql.new_database("waited"), threading.Event()
    engine = create_engine(uri)
    with engine.begin() as other:
        other.execute(text(f"SELECT pg_advisory_xact_lock({database.LOCK})"))
        waiting = threading.Thread(target=prepare, args=(uri, heard.set))
        waiting.start()
        assert heard.wait(30)
        tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
        assert other.execute(text(tables)).scalar() == 0
    waiting.join(60)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT name FROM experiments")).scalar() == "Default"
    engine.dispose()


def test_a_server_that_is_started_again_in_the_middle_gets_everything(
    postgresql: PostgreSQL, connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("assay.tracking.writer.RETRY", 0.05)
    uri = postgresql.new_database("restarted")
    prepare(uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    connection = connect()
    client, run = MlflowClient(uri), connection.parent.run_id
    postgresql.stop()
    for step in range(3):
        connection.writer.submit("a metric", client.log_metric, run, "a", step, step=step)
    time.sleep(0.3)
    postgresql.start()
    until = time.monotonic() + 30
    while connection.writer._pending and time.monotonic() < until:
        time.sleep(0.05)
    connection.close("FINISHED", None)
    connection.writer.wait()
    assert connection.writer.failure is None
    assert client.get_run(run).info.status == "FINISHED"
    assert [each.value for each in client.get_metric_history(run, "a")] == [0, 1, 2]


def test_a_server_that_stays_away_costs_a_line_without_the_password(
    connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(
        "MLFLOW_TRACKING_URI", f"postgresql://assay:{PASSWORD}@127.0.0.1:{free_port()}/mlflow"
    )
    began = time.monotonic()
    connection = connect()
    connection.close("FINISHED", None)
    connection.writer.wait()
    assert time.monotonic() - began < 8
    assert "connection refused" in connection.writer.failure.lower()
    assert PASSWORD not in caplog.text

"""The thread that writes to MLflow, and runs whose tracking server goes away."""

from __future__ import annotations

import itertools
import logging
import threading
import time

import mlflow
import pytest

from assay.tracking.run import thinned
from assay.tracking.writer import Writer


def test_requests_are_done_in_order_by_one_thread():
    writer, done = Writer(), []
    for number in range(50):
        writer.submit("a", lambda n, *, by: done.append((n, by, threading.current_thread())), number, by="x")
    writer.wait()
    assert [number for number, _, _ in done] == list(range(50))
    assert len({thread for _, _, thread in done} - {threading.current_thread()}) == 1
    assert writer.failure is None


def test_after_a_failure_nothing_more_is_asked_of_the_server_and_nothing_is_raised(caplog):
    writer, done = Writer(), []

    def fails():
        time.sleep(0.05)
        raise ConnectionError("<html>\n the server is down")

    writer.submit("one", done.append, 1)
    writer.submit("the curves", fails)
    for _ in range(100):
        writer.submit("two", done.append, 2)
    with caplog.at_level(logging.ERROR):
        writer.wait()
    assert done == [1]
    assert writer.failure == "the curves: ConnectionError: <html> the server is down"
    (record,) = caplog.records
    assert "kedro run --force" in record.getMessage()
    assert "from the curves" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_locked_database_is_asked_again_until_the_run_waits_for_it(monkeypatch):
    monkeypatch.setattr("assay.tracking.writer.RETRY", 0.02)
    writer, tries, free = Writer(), [], threading.Event()

    def locked():
        tries.append(1)
        if not free.is_set():
            raise OSError("(sqlite3.OperationalError) database is locked")

    writer.submit("a", locked)
    time.sleep(0.2)
    free.set()
    writer.wait()
    assert writer.failure is None
    assert len(tries) > 2
    free.clear()
    writer.submit("b", locked)
    writer.wait()
    assert writer.failure == "b: OSError: (sqlite3.OperationalError) database is locked"


def test_what_closes_a_run_is_tried_after_a_failure_until_that_fails_too():
    writer, done = Writer(), []
    writer.submit("a", lambda: 1 / 0)
    writer.submit_always("the end", done.append, "closed")
    writer.submit_always("the end", lambda: 1 / 0)
    writer.submit_always("the end", done.append, "closed")
    writer.wait()
    assert done == ["closed"]
    assert writer.failure == "a: ZeroDivisionError: division by zero"


def test_a_server_that_hangs_is_waited_for_once_and_not_for_long(monkeypatch, caplog):
    monkeypatch.setattr("assay.tracking.writer.PATIENCE", 0.4)
    writer, done, hang = Writer(), [], threading.Event()
    began = time.monotonic()
    writer.submit("the run", hang.wait, 30)
    writer.submit_always("the end", done.append, "closed")
    with caplog.at_level(logging.ERROR):
        writer.wait()
        writer.submit_always("the end", done.append, "closed")
        writer.wait()
    assert 0.4 <= time.monotonic() - began < 2
    assert writer.failure == "the run: TimeoutError: no answer for 0 s"
    assert len(caplog.records) == 1
    hang.set()
    time.sleep(0.05)
    assert done == []


def test_a_thread_that_computes_is_no_server_that_hangs(monkeypatch):
    """As on a machine whose processors are shared: MLflow's own work takes longer than a server's answer."""
    monkeypatch.setattr("assay.tracking.writer.PATIENCE", 0.3)
    writer = Writer()

    def compute():
        began = time.monotonic()
        while time.monotonic() - began < 1:
            sum(range(1000))

    writer.submit("the experiment", compute)
    writer.wait()
    assert writer.failure is None


def test_a_server_that_is_slow_but_gets_on_is_waited_for(monkeypatch):
    monkeypatch.setattr("assay.tracking.writer.PATIENCE", 0.3)
    writer, done = Writer(), []
    for number in range(10):
        writer.submit("a", lambda n: (time.sleep(0.06), done.append(n)), number)
    writer.wait()
    assert done == list(range(10))
    assert writer.failure is None


@pytest.mark.parametrize(("n", "most"), [(0, 5), (1, 5), (5, 5), (6, 5), (12_000, 40)])
def test_a_long_record_is_thinned_evenly_and_keeps_its_ends(n, most):
    places = thinned(n, most)
    assert len(places) == min(n, most)
    assert places == sorted(set(places))
    if n:
        assert (places[0], places[-1]) == (0, n - 1)
        assert max((b - a for a, b in itertools.pairwise(places)), default=0) <= -(-n // (most - 1))


@pytest.fixture
def project(new_project):
    return new_project()


def children(project):
    mlflow.set_tracking_uri(f"sqlite:///{project / 'mlflow.db'}")
    runs = mlflow.search_runs(experiment_names=["assay"])
    return runs[runs["tags.mlflow.parentRunId"].notna()] if "tags.mlflow.parentRunId" in runs else runs.iloc[:0]


def test_what_is_made_in_parts_has_one_whole_child_a_row(project, run_command):
    """The fit alone has none; the probes have the fit's errors and steps also where these were made before."""
    small = "--params=layers:[5],pca.topk:[4]"
    assert run_command(f"kedro run --pipeline=kmeans {small}", project).returncode == 0
    assert len(children(project)) == 0
    mlflow.set_tracking_uri(f"sqlite:///{project / 'mlflow.db'}")
    (parent,) = mlflow.search_runs(experiment_names=["assay"]).to_dict("records")
    assert 0 < parent["metrics.kmeans-onehot/nmse"] < 1
    assert run_command(f"kedro run --pipeline=probe {small}", project).returncode == 0
    found = children(project)
    assert sorted(found["params.encoding"]) == ["kmeans-invdist", "kmeans-onehot", "pca-topk-00004"]
    assert sorted(found["params.k"]) == ["4", "8", "8"]  # one name for all methods
    measured = found.set_index("params.encoding")["metrics.nmse"].notna().to_dict()
    assert measured == {
        "kmeans-invdist": True,
        "kmeans-onehot": True,
        "pca-topk-00004": False,
    }  # nobody has asked for PCA's
    assert found["metrics.map"].notna().all()
    onehot = found[found["params.encoding"] == "kmeans-onehot"]["run_id"].item()
    assert len(mlflow.MlflowClient().get_metric_history(onehot, "inertia")) > 1
    assert set(found["status"]) == {"FINISHED"}
    assert run_command(f"kedro run {small}", project).returncode == 0
    assert len(children(project)) == 3  # the report makes no rows again


def test_artifacts_that_cannot_be_kept_cost_no_result(project, run_command):
    """The place of MLflow's files is one that nobody can write to: the run goes on, and says so."""
    (project / "mlruns").write_text("a file, not a folder")
    ended = run_command("kedro run --params=layers:[5],pca.topk:[4]", project)
    assert ended.returncode == 0, ended.stderr
    assert "MLflow does not take what this run logs" in " ".join((ended.stdout + ended.stderr).split())
    assert (project / "data/08_reporting/baselines.csv").exists()
    assert "Nothing to do" in run_command("kedro run --params=layers:[5],pca.topk:[4]", project).stdout
    manifest = max((project / "data/08_reporting/manifests").iterdir()).read_text()
    assert '"status": "FINISHED"' in manifest
    assert '"not_logged": null' not in manifest

"""One run of MLflow that several processes share, each with a part of it."""

from __future__ import annotations

import json

import pytest
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline
from mlflow import MlflowClient

from assay.tracking import process
from assay.tracking.ownership import FAILURE, NOT_LOGGED, SUBMISSION

DEAD = json.dumps(json.loads(process.own_process()) | {"began": 1})


@pytest.fixture
def parent(connect):
    """A run that a queue has made, as yet of no process."""
    connect(opened=False)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("assay")
    assert experiment is not None
    run = client.create_run(experiment.experiment_id, run_name="queue's")
    client.update_run(run.info.run_id, status="SCHEDULED")
    return run.info.run_id


@pytest.fixture
def begin(connect, parent, run_params, monkeypatch):
    """Begins a part of the run as a process with this note does; gives how to end it."""

    def start(*layers, noted=None):
        noted = noted or process.own_process().replace('"pid"', f'"part": "{layers}", "pid"')
        monkeypatch.setenv("MLFLOW_RUN_ID", parent)
        connection = connect(opened=False)

        def as_it(ask, *arguments):
            with monkeypatch.context() as patch:
                patch.setattr(process, "own_process", lambda: noted)
                ask(*arguments)
                connection.writer.wait()
            assert connection.writer.failure is None

        namespaces = [f"layer_{layer}" for layer in layers]
        as_it(connection.open, run_params | {"namespaces": namespaces}, Pipeline([]), DataCatalog())
        return lambda status="FINISHED", reason=None: as_it(connection.close, status, reason)

    return start


@pytest.fixture
def look(runs):
    """The run's status, and its tags about its processes."""

    def find():
        run = runs()["queue's"]
        about = {
            tag: value
            for tag, value in run.data.tags.items()
            if tag.partition(".")[0] in (process.TAG, FAILURE, NOT_LOGGED)
        }
        return run.info.status, about

    return find


def test_a_run_ends_with_the_last_of_its_parts(begin, look):
    assert look() == ("SCHEDULED", {})
    first, second = begin(3), begin(4, 5)
    status, about = look()
    assert (status, about.keys()) == ("RUNNING", {"process.layer_3", "process.layer_4 layer_5"})
    first()
    status, about = look()
    assert (status, about.keys()) == ("RUNNING", {"process.layer_4 layer_5"})
    second()
    assert look() == ("FINISHED", {})


def test_a_run_of_a_queue_waits_between_its_jobs_for_the_one_that_makes_the_report(
    parent, begin, look
):
    MlflowClient().set_tag(parent, SUBMISSION, "thesis")
    begin(3)()
    assert look() == ("SCHEDULED", {})
    begin(5)("FAILED", "no disk")
    assert look()[0] == "FAILED"
    begin(5)()
    assert look() == ("SCHEDULED", {})
    begin()()
    assert look()[0] == "FINISHED"


@pytest.mark.parametrize("worst", ["FAILED", "KILLED"])
def test_a_part_that_ended_badly_is_the_runs_end_until_it_is_made_again(begin, look, worst):
    first, second = begin(3), begin(5)
    first(worst, "it was so")
    assert look()[0] == "RUNNING"
    second()
    assert look() == (worst, {"process.layer_3": worst, "failure.layer_3": "it was so"})
    again, other = begin(3), begin(5)
    other("KILLED", "preempted")
    again()
    assert look() == ("KILLED", {"process.layer_5": "KILLED", "failure.layer_5": "preempted"})
    begin()()  # the report, which stands for all
    status, about = look()
    assert (status, about.keys()) == ("FINISHED", {"process"})


@pytest.mark.parametrize(("host", "closed"), [(None, True), ("elsewhere", False)])
def test_a_part_whose_process_was_killed_is_told_on_its_own_host_alone(begin, look, host, closed):
    begin(3, noted=json.dumps(json.loads(DEAD) | ({"host": host} if host else {})))
    begin(5)()
    assert look()[0] == ("KILLED" if closed else "RUNNING")


def test_whoever_comes_next_closes_a_run_of_whose_parts_none_lives(begin, connect, look):
    begin(3, noted=DEAD)
    second = begin(5)
    connect(opened=False)
    assert look()[0] == "RUNNING"
    second("FAILED", "no disk")
    assert look()[0] == "FAILED"
    begin(5, noted=DEAD)
    connect(opened=False)
    status, about = look()
    assert status == "KILLED"
    assert "its process ended without a word: pid" in about[FAILURE]
    begin(3)()
    assert FAILURE not in look()[1]


def test_who_ends_after_another_process_has_taken_its_part_leaves_it_that(begin, look):
    first, second = begin(3), begin(3, noted=process.own_process())
    first("KILLED", "preempted")
    status, about = look()
    assert (status, about["process.layer_3"]) == ("RUNNING", process.own_process())
    second()
    assert look()[0] == "FINISHED"

"""What a submission asks of Slurm and of MLflow, and what it writes down."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from assay.slurm import queue, submit
from assay.slurm.commands import slurm_group
from assay.slurm.jobs import Job
from assay.slurm.queue import Element
from assay.slurm.submission import (
    QueuedJob,
    Submission,
    all_submissions,
    read_submission,
)
from assay.slurm.submit import Opened, check_ended

JOBS = [
    Job("digits", "", " --pipelines=digits"),
    Job("layers", "", " --layers", (0, 2, 3, 5, 7), computes=True, after="digits"),
    Job("report", "", after="layers"),
]


class Freshness:
    def __init__(self, fingerprint):
        self.wanted = fingerprint

    def fingerprint(self, name):
        assert name == "baselines"
        return self.wanted


@dataclass
class Asked:
    """What was asked of Slurm and of MLflow."""

    jobs: list
    cancelled: list
    runs: list
    closed: list
    refused: str = ""
    there: tuple = ()


@pytest.fixture
def asked(monkeypatch):
    made = Asked([], [], [], [])

    def take(script, options, variables):
        if made.refused and made.refused in script:
            raise ValueError("sbatch: error: no")
        made.jobs.append((script, options, variables))
        return str(100 + len(made.jobs))

    def open_parent(_, name, earlier):
        made.runs.append((name, earlier))
        return earlier or f"run{len(made.runs)}"

    monkeypatch.setattr(queue, "submit", take)
    monkeypatch.setattr(queue, "find", lambda *_, **__: list(made.there))
    monkeypatch.setattr(queue, "cancel", made.cancelled.extend)
    monkeypatch.setattr(queue, "max_array_size", lambda: 2)
    monkeypatch.setattr(submit, "open_parent", open_parent)
    monkeypatch.setattr(submit, "close_parent", lambda _, *told: made.closed.append(told))
    return made


@pytest.fixture
def project(tmp_path):
    for environment in ("base", "local"):
        (tmp_path / "conf" / environment).mkdir(parents=True)
    return tmp_path


def submitted(project, *, fingerprint="f", name="x"):
    freshness: Any = Freshness(fingerprint)
    return submit.submit(Opened(project, None, freshness, JOBS), name, None, "layers:[1]")


def dependencies(asked):
    return [
        next((each for each in options if each.startswith("--dependency=")), None)
        for _, options, _ in asked.jobs
    ]


def test_each_job_waits_for_all_of_the_step_before_it(project, asked):
    made = submitted(project)
    assert dependencies(asked) == [
        None,
        *["--dependency=afterok:101"] * 3,
        "--dependency=afterok:102:103:104",
    ]
    assert [job.layers for job in made.jobs] == [(), (0, 2), (3, 5), (7,), ()]
    assert "layers=(3 5)" in asked.jobs[2][0] and "#SBATCH --array=0-1\n" in asked.jobs[2][0]
    assert all(" kedro run '--params=layers:[1]'" in script for script, _, _ in asked.jobs)
    assert [variables for _, _, variables in asked.jobs] == [{"MLFLOW_RUN_ID": "run1"}] * 5
    assert asked.jobs[0][1][:2] == [f"--chdir={project}", "--output=data/slurm/x/digits-%j.log"]
    assert asked.jobs[1][1][1] == "--output=data/slurm/x/layers-%A_%a.log"
    layer_5 = dict(made.jobs[2].elements())["layer_5"]
    assert layer_5 == "103_1"
    assert made.jobs[2].log_of(layer_5, Path("data/slurm/x")) == Path(
        "data/slurm/x/layers-103_1.log"
    )
    assert read_submission(project, "x") == made
    assert all_submissions(project) == [made]


def test_the_newest_is_so_by_the_clock_of_the_world(project):
    said = {
        "before": "2026-10-25T02:50:00+02:00",  # then the clocks go back
        "after": "2026-10-25T02:10:00+01:00",
        "elsewhere": "2026-10-24T20:20:00-05:00",
    }
    for name, submitted in said.items():
        Submission(
            name=name, env=None, params="", run=None, fingerprint="f", submitted=submitted
        ).write(project)
    assert [each.name for each in all_submissions(project)] == ["before", "after", "elsewhere"]


def test_no_more_layers_than_wanted_run_at_once_where_arrays_are_split(project, asked):
    (project / "conf/base/slurm.yml").write_text("parallel: 1\n")
    submitted(project)
    assert dependencies(asked)[1:4] == [
        "--dependency=afterok:101",
        "--dependency=afterok:101,afterany:102",
        "--dependency=afterok:101,afterany:103",
    ]
    assert "#SBATCH --array=0-1%1\n" in asked.jobs[1][0]


def test_the_run_of_mlflow_is_the_same_as_long_as_the_table_is(project, asked):
    assert submitted(project).run == "run1"
    assert submitted(project).run == "run1"
    assert submitted(project, fingerprint="g").run == "run3"
    assert submitted(project, name="y").run == "run4"
    assert asked.runs == [("x", None), ("x", "run1"), ("x", None), ("y", None)]


def test_jobs_of_the_name_that_have_not_ended_are_named(project, asked):
    submitted(project)
    asked.there = (Element("102_1", "RUNNING", "None", 0, "1:00"),)
    with pytest.raises(ValueError, match=r"^`x` has jobs in the queue \(102_1 RUNNING\): wait"):
        submitted(project)
    assert len(asked.jobs) == 5
    check_ended(None)


def test_what_was_queued_is_cancelled_where_a_later_job_is_refused(project, asked):
    asked.refused = "layers=(7)"
    with pytest.raises(ValueError, match="sbatch: error: no"):
        submitted(project)
    assert asked.cancelled == ["101", "102", "103"]
    assert asked.closed == [("run1", "its jobs were not queued")]


@pytest.mark.parametrize("refused", ["--pipelines=digits", "layers=(0 2)"])
def test_the_run_is_the_same_where_a_submission_ended_between_its_jobs(
    project, asked, monkeypatch, refused
):
    """As one that is killed, which closes nothing."""
    asked.refused = refused
    monkeypatch.setattr(submit, "close", lambda *_: None)
    with pytest.raises(ValueError, match="sbatch: error: no"):
        submitted(project)
    asked.refused = ""
    assert submitted(project).run == "run1"


@pytest.mark.parametrize("options", [["--env=a b"], ["--name=-x"], ["--name=é"], ["--env=a/b"]])
def test_what_cannot_be_a_jobs_name_is_told_before_anything_is_done(options):
    ended = CliRunner().invoke(slurm_group, ["submit", *options])
    assert ended.exit_code == 2
    assert "want letters, digits, `_`, `.` and `-`, 80 at the most" in ended.output


def test_a_file_that_is_no_submission_is_named(project):
    path = project / "data/slurm/x/submission.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"name": "x"}')
    with pytest.raises(ValueError, match=r"submission\.json is no submission of this version"):
        read_submission(project, "x")
    assert read_submission(project, "y") is None


def test_a_submission_is_written_as_it_is(project):
    made = Submission(
        name="x",
        env="ade20k",
        params="",
        run=None,
        fingerprint="f",
        submitted="2026-01-01T00:00:00+00:00",
        jobs=(QueuedJob(step="layers", id="7", layers=(18, 23)),),
    )
    made.write(project)
    assert read_submission(project, "x") == made

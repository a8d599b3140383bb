"""`kedro slurm` in a project, on a real Slurm: submit, status, logs, cancel; killed in the middle,
and submitted again.
"""

import os
import signal
from collections import Counter
from contextlib import suppress
from pathlib import Path

import mlflow
import pytest

pytestmark = pytest.mark.e2e

PARAMS = "--params=kmeans.encodings:[kmeans-onehot],kmeans.batch_size:16,kmeans.max_iter:25,kmeans.max_no_improvement:null,pca.topk:[4]"
TABLE = "data/08_reporting/baselines.csv"


@pytest.fixture(scope="module")
def kedro(cluster, run_command):
    """Run a command of Kedro's in a project; gives what it printed, and fails where its exit code
    is another.
    """

    def run(arguments, project, code=0):
        (conf,) = cluster.variables.items()
        ended = run_command(f"{'='.join(conf)} kedro {arguments}", project)
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended.stdout + ended.stderr

    return run


@pytest.fixture
def project(new_project):
    made = new_project()
    (made / "conf/base/slurm.yml").write_text("cpus_per_task: 1\n")
    return made


def of_array(said):
    return next(line.split()[0] for line in said.splitlines() if "-layers" in line)


def processes(project):
    """The `kedro run` of a project's jobs."""
    for each in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (each / "cmdline").read_bytes().split(b"\0")
            ours = words[2:3] == [b"run"] and words[1].endswith(b"/kedro")
            if ours and os.readlink(each / "cwd") == str(project):
                yield int(each.name)


def test_a_submission_that_is_killed_and_cancelled_comes_to_the_table_of_a_plain_run(
    cluster, kedro, project, new_project
):
    said = kedro(f"slurm submit {PARAMS}", project)
    array = of_array(said)
    for layer in (3, 5):
        begun = project / f"data/06_models/.checkpoints/layer_{layer}/kmeans"
        cluster.wait_for(lambda begun=begun: list(begun.rglob("*.safetensors")))
    status = kedro("slurm status", project)
    assert f"{array}_0  layer_3" in status and "RUNNING" in status and " of 16 steps" in status
    (killed, *_) = processes(project)
    os.kill(killed, signal.SIGKILL)
    cluster.wait_for(
        lambda: "FAILED" in {cluster.show(f"{array}_{each}")["JobState"] for each in (0, 1)}
    )
    assert "none is left" in kedro("slurm cancel assay", project)
    assert cluster.jobs() == {}
    assert not list(processes(project))
    assert not (project / TABLE).exists()
    (parent,) = parents(project)
    assert parent.info.status == "KILLED"
    array = of_array(kedro(f"slurm submit {PARAMS}", project))
    (parent,) = parents(project)
    assert parent.info.status in {"SCHEDULED", "RUNNING"}
    assert parent.data.tags["mlflow.runName"] == "assay"
    plain = new_project()
    kedro(f"run {PARAMS}", plain)
    cluster.wait_for(lambda: cluster.jobs() == {})
    logs = kedro("slurm logs", project)
    assert (project / TABLE).read_bytes() == (plain / TABLE).read_bytes(), logs
    whole = "".join(
        path.read_text() for path in (project / "data/slurm/assay").glob(f"layers-{array}_*.log")
    )
    assert "resuming after step" in whole and "Traceback" not in whole
    (after,) = parents(project)
    assert (after.info.run_id, after.info.status) == (parent.info.run_id, "FINISHED")
    children = mlflow.MlflowClient().search_runs(
        [after.info.experiment_id], f"tags.`mlflow.parentRunId` = '{after.info.run_id}'"
    )
    assert Counter(child.info.run_name for child in children) == Counter(
        f"layer_{layer}/{encoding}"
        for layer in (3, 5)
        for encoding in ("kmeans-onehot", "pca-topk-00004")
    )
    assert {child.info.status for child in children} == {"FINISHED"}
    status = kedro("slurm status assay", project)
    assert "16 of 16 steps" in status


def parents(project):
    mlflow.set_tracking_uri(f"sqlite:///{project / 'mlflow.db'}")
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'assay'")
    runs = client.search_runs([experiment.experiment_id])
    return [run for run in runs if "mlflow.parentRunId" not in run.data.tags]

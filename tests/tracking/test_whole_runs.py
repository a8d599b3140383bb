"""`kedro run`, and what MLflow has of it."""

from __future__ import annotations

import shutil

import mlflow
import pytest
from mlflow import MlflowClient


def experiment_id(client: MlflowClient) -> str:
    experiment = client.get_experiment_by_name("assay")
    assert experiment is not None
    return str(experiment.experiment_id)


@pytest.fixture
def project(new_project):
    return new_project()


def children(project):
    mlflow.set_tracking_uri(f"sqlite:///{project / 'mlflow.db'}")
    runs = mlflow.search_runs(experiment_names=["assay"])
    return (
        runs[runs["tags.mlflow.parentRunId"].notna()]
        if "tags.mlflow.parentRunId" in runs
        else runs.iloc[:0]
    )


def test_what_is_made_in_parts_has_one_whole_child_a_row(project, run_command):
    """The fit alone has none; the probes have the fit's errors and steps also where these were made
    before.
    """
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
    # Nobody has asked for PCA's.
    assert measured == {
        "kmeans-invdist": True,
        "kmeans-onehot": True,
        "pca-topk-00004": False,
    }
    assert found["metrics.map"].notna().all()
    onehot = found[found["params.encoding"] == "kmeans-onehot"]["run_id"].item()
    assert len(mlflow.MlflowClient().get_metric_history(onehot, "inertia")) > 1
    assert set(found["status"]) == {"FINISHED"}
    assert run_command(f"kedro run {small}", project).returncode == 0
    assert len(children(project)) == 3  # the report makes no rows again


def test_a_layer_is_a_part_of_the_run_that_is_named(project, run_command):
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    run = client.create_run(client.create_experiment("assay")).info.run_id
    few = "--params=layers:[5] --to-nodes=layer_5.standardize.fit"
    for wanted in ({"namespaces"}, {"namespaces", "process"}):
        part = "--namespaces=layer_5" if wanted == {"namespaces"} else "--force"
        ended = run_command(f"MLFLOW_RUN_ID={run} kedro run {part} {few}", project)
        assert ended.returncode == 0, ended.stderr
        found = client.get_run(run)
        assert found.info.status == "FINISHED"
        # Of a part that has ended well, nothing is left.
        assert {tag for tag in found.data.tags if tag.startswith(("namesp", "process"))} == wanted


def test_artifacts_that_cannot_be_kept_cost_no_result(project, run_command):
    """The place of MLflow's files is one that nobody can write to: the run goes on, and says so.
    Taken up again, it is logged.
    """
    (project / "mlruns").write_text("a file, not a folder")
    ended = run_command("kedro run --params=layers:[5],pca.topk:[4]", project)
    assert ended.returncode == 0, ended.stderr
    assert "MLflow does not take what this run logs" in " ".join(
        (ended.stdout + ended.stderr).split()
    )
    assert (project / "data/08_reporting/baselines.csv").exists()
    manifest = max((project / "data/08_reporting/manifests").iterdir()).read_text()
    assert '"status": "FINISHED"' in manifest
    assert '"not_logged": null' not in manifest
    (project / "mlruns").unlink()
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiment = experiment_id(client)
    (parent,) = (
        run for run in client.search_runs([experiment]) if "mlflow.parentRunId" not in run.data.tags
    )
    assert "not_logged" in parent.data.tags
    again = f"MLFLOW_RUN_ID={parent.info.run_id} kedro run --params=layers:[5],pca.topk:[4]"
    assert "Nothing to do" in run_command(again, project).stdout
    runs = client.search_runs([experiment])
    assert len(runs) == 1 + 3
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert not [run for run in runs if {"failure", "not_logged"} & run.data.tags.keys()]
    assert "report.html" in {file.path for file in client.list_artifacts(parent.info.run_id)}


def test_a_server_that_fails_costs_no_result(project, run_command, server):
    with server(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\n\r\nboom") as (
        address,
        _,
    ):
        ended = run_command(
            f"MLFLOW_TRACKING_URI={address} kedro run --pipeline=kmeans --params=layers:[5]",
            project,
        )
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout + ended.stderr
    assert said.count("MLflow") == 1
    assert "Traceback" not in said
    assert list((project / "data/08_reporting/metrics/layer_5").glob("kmeans-errors.json/*/*"))


def test_a_project_that_was_moved_writes_into_its_new_place(project, run_command):
    few = "kedro run --pipeline=standardize --params=layers:[5] --force"
    assert run_command(few, project).returncode == 0
    moved = project.with_name(f"{project.name} %41#")
    project.rename(moved)
    assert run_command(few, moved).returncode == 0
    assert not project.exists()
    assert len(list((moved / "mlruns").rglob("*.json"))) == 2
    client = mlflow.MlflowClient(f"sqlite:///{moved / 'mlflow.db'}")
    runs = client.search_runs([experiment_id(client)])
    assert [len(client.list_artifacts(run.info.run_id)) for run in runs] == [1, 1]
    shutil.rmtree(moved)

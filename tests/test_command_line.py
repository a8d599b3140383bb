"""The command lines that users type, run for real in a copy of the project."""

from __future__ import annotations

import html
import io
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from mlflow.entities import DatasetInput, Run
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file as save_torch_file

from assay.io.codes import StoredCodes
from assay.io.saes import Settings, hand_made
from assay.io.shards import Shards
from assay.numerics.codes import densify
from assay.numerics.moments import StreamingMoments
from assay.pipelines.report.nodes import FIGURES
from assay.sae import open_sae
from shards import write_planted

COLUMNS = [
    "layer",
    "method",
    "encoding",
    "k",
    "seed",
    "nmse",
    "nmse_raw",
    "l0",
    "probe_r",
    "map",
    "purity_at_16",
    "coverage_at_0.3",
    "best_layer",
]
ENCODINGS = [
    "kmeans-invdist",
    "kmeans-onehot",
    "pca-topk-00001",
    "pca-topk-00004",
    "pca-topk-00016",
    "pca-topk-00064",
]


def datasets_of(run: Run) -> list[DatasetInput]:
    """What MLflow says that a run used."""
    assert run.inputs is not None
    return run.inputs.dataset_inputs


def latest(folder: Path) -> Path:
    """The newest version of a versioned file."""
    return max(folder.glob(f"*/{folder.name}"))


def made_last(project: Path) -> list[str]:
    """The nodes that the newest run ran, by its manifest."""
    manifests = sorted((project / "data/08_reporting/manifests").iterdir())
    return sorted(json.loads(manifests[-1].read_text())["seconds"])


def test_a_whole_run_ends_with_the_table_and_no_noise(whole_run):
    project, ended = whole_run
    assert ended.returncode == 0, ended.stderr
    assert "Warning" not in ended.stdout + ended.stderr
    assert "WARNING" not in ended.stdout + ended.stderr
    assert max(len(line) for line in ended.stdout.splitlines()) <= 80
    table = pd.read_csv(project / "data/08_reporting/baselines.csv")
    assert list(table.columns) == COLUMNS
    expected = {(layer, name) for layer in (3, 5) for name in ENCODINGS}
    assert set(zip(table["layer"], table["encoding"], strict=True)) == expected
    assert len(table) == len(expected)
    for nmse in table["nmse"]:
        assert (f"{nmse:.3f}" if nmse >= 0.001 else f"{nmse:.0e}") in ended.stdout
    assert "data/08_reporting/baselines.csv" in ended.stdout
    assert (
        table.loc[table["best_layer"], "layer"] == 5
    ).all()  # the layer whose classes are planted farther apart
    assert table["best_layer"].sum() == len(ENCODINGS)
    assert (
        table.loc[table["method"] == "pca", "l0"] == table.loc[table["method"] == "pca", "k"]
    ).all()


def test_nmse_of_every_k_equals_an_explicit_float64_reconstruction(whole_run, planted):
    project, _ = whole_run
    table = cells(project / "data/08_reporting/baselines.csv", ["layer", "encoding"])
    fit, val = (Shards(path) for path in planted)
    for layer in (3, 5):
        train = np.concatenate(
            [batch.numpy() for batch in fit.batches(layer=layer, batch_size=100)]
        ).astype(np.float64)
        tokens = np.concatenate(
            [batch.numpy() for batch in val.batches(layer=layer, batch_size=100)]
        ).astype(np.float64)
        mean, std = train.mean(axis=0), train.std(axis=0)
        standardized, seen = (tokens - mean) / std, (train - mean) / std
        _, _, components = np.linalg.svd(seen, full_matrices=False)
        z = standardized @ components.T
        for k in (1, 4, 16, 64):
            kept = np.where(np.argsort(np.argsort(-np.abs(z), axis=1), axis=1) < k, z, 0)
            residual = standardized - kept @ components
            row = table[layer, f"pca-topk-{k:05d}"]
            assert row["nmse"] == pytest.approx(
                (residual**2).sum() / (standardized**2).sum(), rel=1e-6
            )
            raw = ((residual * std) ** 2).sum() / ((standardized * std) ** 2).sum()
            assert row["nmse_raw"] == pytest.approx(raw, rel=1e-6)
        centers = load_file(latest(project / f"data/06_models/layer_{layer}/kmeans.safetensors"))[
            "cluster_centers"
        ]
        distances = (
            ((standardized[:, None] - centers.astype(np.float64)) ** 2).sum(axis=2).min(axis=1)
        )
        for encoding in ("kmeans-onehot", "kmeans-invdist"):
            assert table[layer, encoding]["nmse"] == pytest.approx(
                distances.sum() / (standardized**2).sum(), rel=1e-6
            )


def test_whitened_coefficients_reach_the_table_and_nothing_is_fitted_again_for_them(
    whole_run, run_command, planted, tmp_path
):
    project = tmp_path / "project"
    shutil.copytree(whole_run[0], project)
    before = cells(project / "data/08_reporting/baselines.csv", ["layer", "encoding"])
    ended = run_command("kedro run --params=pca.whiten:true,layers:[5]", project)
    assert ended.returncode == 0, ended.stderr
    made = [name for name in made_last(project) if not name.startswith("report.")]
    ks = (1, 4, 16, 64)
    assert made == sorted(
        [
            "layer_5.pca.measure",
            *(f"layer_5.probe.pca-topk-{k:05d}" for k in ks),
            *(
                f"layer_5.encode.{name}.probe_{split}"
                for name in ("pca-dense", *(f"pca-topk-{k:05d}" for k in ks))
                for split in ("train", "val")
            ),
            "layer_5.report.gather",
            "layer_5.report.merge",
        ]
    )
    table = cells(project / "data/08_reporting/baselines.csv", ["layer", "encoding"])
    assert [name for _, name in table] == ENCODINGS
    for encoding in ("kmeans-onehot", "kmeans-invdist"):
        for name in set(COLUMNS[3:-1]) - {"seed"}:
            assert table[5, encoding][name] == before[5, encoding][name]
    train, tokens = (
        np.concatenate(
            [batch.numpy() for batch in Shards(path).batches(layer=5, batch_size=100)]
        ).astype(np.float64)
        for path in planted
    )
    mean, std = train.mean(axis=0), train.std(axis=0)
    standardized, seen = (tokens - mean) / std, (train - mean) / std
    _, singular, components = np.linalg.svd(seen, full_matrices=False)
    z = standardized @ components.T
    white = z / (singular / np.sqrt(len(seen) - 1))
    for k in ks:
        ranks = np.argsort(np.argsort(-np.abs(white), axis=1), axis=1)
        residual = standardized - np.where(ranks < k, z, 0) @ components
        row = table[5, f"pca-topk-{k:05d}"]
        assert row["nmse"] == pytest.approx((residual**2).sum() / (standardized**2).sum(), rel=1e-6)
        assert row["nmse"] > before[5, f"pca-topk-{k:05d}"]["nmse"]
        raw = ((residual * std) ** 2).sum() / ((standardized * std) ** 2).sum()
        assert row["nmse_raw"] == pytest.approx(raw, rel=1e-6)
        assert row["l0"] == k
        folders = (
            project / f"data/07_model_output/inference/{planted[1].name}/pca-topk-{k:05d}/layer_5"
        )
        (codes,) = (
            found
            for found in map(StoredCodes, folders.iterdir())
            if "whiten" in json.loads(str(found.provenance["parameters"]))
        )
        assert codes.k == k
        errors = torch.cat([batch["error"] for batch in codes.batches(100)])
        np.testing.assert_allclose(errors, (residual**2).sum(axis=1), rtol=1e-5, atol=1e-9)
    about = json.loads((project / "data/08_reporting/about.json").read_text())
    assert about["PCA codes"] == "each coefficient over its standard deviation"
    back = run_command("kedro run --params=layers:[5]", project)
    assert back.returncode == 0, back.stderr
    assert not [name for name in made_last(project) if not name.startswith("report.")]
    assert (
        cells(project / "data/08_reporting/baselines.csv", ["layer", "encoding"])[
            5, "pca-topk-00016"
        ]["nmse"]
        == before[5, "pca-topk-00016"]["nmse"]
    )


def cells(path: Path, index: str | list[str]) -> dict[Any, dict[str, Any]]:
    """A table's rows by what is in these columns."""
    rows: dict[Any, Any] = pd.read_csv(path).set_index(index).to_dict("index")
    return rows


def utilization(run: str, layer: int, method: str) -> dict[str, Any]:
    """What a run says of how a fit uses its clusters."""
    return mlflow.artifacts.load_dict(f"runs:/{run}/layer_{layer}/{method}-utilisation.json")


def test_mlflow_holds_a_parent_and_a_child_for_each_row(whole_run):
    project, _ = whole_run
    mlflow.set_tracking_uri(f"sqlite:///{project / 'mlflow.db'}")
    runs = mlflow.search_runs(experiment_names=["assay"])
    children = runs[runs["tags.mlflow.parentRunId"].notna()]
    parents = runs[runs["tags.mlflow.parentRunId"].isna()]
    assert len(parents) == 1
    assert set(runs["status"]) == {"FINISHED"}
    assert set(children["tags.mlflow.runName"]) == {
        f"layer_{n}/{name}" for n in (3, 5) for name in ENCODINGS
    }
    assert len(
        mlflow.search_runs(experiment_names=["assay"], filter_string="params.layer = '5'")
    ) == len(ENCODINGS)
    table = pd.read_csv(project / "data/08_reporting/baselines.csv")
    for row in table.to_dict("records"):
        name = f"layer_{row['layer']}/{row['encoding']}"
        (child,) = children[children["tags.mlflow.runName"] == name].to_dict("records")
        for metric in COLUMNS[5:-1]:
            assert child[f"metrics.{metric}"] == pytest.approx(row[metric], rel=1e-12)
        assert 0 <= child["metrics.certificate_ce"] <= 1e-8
        assert child["metrics.max_abs_activation"] > 0
        assert 0 <= child["metrics.f1"] <= 1
        assert child["params.method"] == row["method"]
        key = "params.latent_topk" if row["method"] == "pca" else "params.n_clusters"
        assert child[key] == str(row["k"])
        seed = child.get("params.seed")
        assert seed == "0" if row["method"] == "kmeans" else pd.isna(seed)
        assert child["tags.model_ckpt"] == "planted-tiny"
        assert (project / child["tags.dictionary"]).is_file()
        assert f"layer {row['layer']} of planted planted-tiny" in child["tags.mlflow.note.content"]
        inputs = datasets_of(mlflow.MlflowClient().get_run(child["run_id"]))
        contexts = {each.tags[0].value: each.dataset.name for each in inputs}
        # In the test one folder plays two parts.
        assert contexts == {
            f"{one}, {other}": f"shards {child[f'tags.shards.{one}']}"
            for one, other in (("fit", "probe_train"), ("val", "probe_val"))
        }
        assert len(child["tags.shards.fit"]) == 8
    client = mlflow.MlflowClient()
    (parent,) = parents["run_id"]
    curve = client.get_metric_history(parent, "pca-topk-00064/nmse")
    assert [point.step for point in sorted(curve, key=lambda point: point.step)] == [3, 5]
    assert {item.path for item in client.list_artifacts(parent)} >= {"baselines.csv"}
    kmeans = children[children["tags.mlflow.runName"] == "layer_5/kmeans-onehot"]["run_id"].item()
    assert len(client.get_metric_history(kmeans, "inertia")) > 1
    pca = children[children["tags.mlflow.runName"] == "layer_5/pca-topk-00016"]["run_id"].item()
    looks = json.loads(latest(project / "data/06_models/layer_5/pca-history.json").read_text())
    points = client.get_metric_history(pca, "reconstruction_error")
    assert [(point.step, point.value) for point in points] == [
        (look["step"], look["reconstruction_error"]) for look in looks
    ]
    used = utilization(parent, 5, "kmeans")
    assert sum(used["clusters"].values()) == 8
    assert used["decay"] == 0.1
    assert "decay" in used["counts"]
    assert client.get_run(parent).data.params["kmeans.n_clusters"] == "8"


@pytest.fixture
def tracking_server(tmp_path, empty_database):
    """MLflow's server on this machine, with a database of its own: its address."""
    shutil.copy(empty_database, tmp_path / "server.db")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).parent / "mlflow"),
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path / 'server.db'}",
        "--artifacts-destination",
        str(tmp_path / "artifacts"),
    ]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
    try:
        for _ in range(600):
            assert server.poll() is None, (tmp_path / "log").read_text()
            with (
                suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer,
            ):
                if answer.status == 200:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_a_tracking_server_with_a_database_behind_it_gets_the_same(
    whole_run, new_project, run_command, tracking_server
):
    project = new_project()
    ended = run_command(f"MLFLOW_TRACKING_URI={tracking_server} kedro run", project)
    assert ended.returncode == 0, ended.stderr

    def logged(uri):
        client = mlflow.MlflowClient(uri)
        (experiment,) = client.search_experiments(filter_string="name = 'assay'")
        runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
        (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags][:1]
        files = {file.path for file in client.list_artifacts(parent.info.run_id)}
        children = [
            run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
        ]
        found = {}
        for run in children:
            metrics = {
                name: value
                for name, value in run.data.metrics.items()
                if "second" not in name and "wait" not in name
            }
            found[run.info.run_name] = (
                run.info.status,
                metrics,
                run.data.params,
                len(datasets_of(run)),
            )
        return (
            found,
            files - {file for file in files if file.startswith("20")},
            parent.data.tags["mlflow.note.content"],
        )

    mine, theirs = logged(f"sqlite:///{whole_run[0] / 'mlflow.db'}"), logged(tracking_server)
    assert len(theirs[0]) == 12
    assert theirs == mine
    assert "| pca-topk-00064 |" in theirs[2]
    shutil.rmtree(project)


def test_the_manifest_says_how_to_run_it_again(whole_run, planted):
    project, _ = whole_run
    (path,) = (project / "data/08_reporting/manifests").iterdir()
    manifest = json.loads(path.read_text())
    assert manifest["status"] == "FINISHED"
    assert manifest["command"] == ["run"]
    assert manifest["parameters"]["kmeans"]["seed"] == 0
    assert manifest["shards"]["fit"]["name"] == planted[0].name
    assert "torch" in manifest["versions"]
    assert manifest["seconds"]["layer_3.pca.fit"] > 0
    stages = manifest["seconds_by_stage"]
    assert set(stages) == {"standardize", "kmeans", "pca", "encode", "probe", "report"}
    assert stages["pca"] == pytest.approx(
        sum(
            value
            for name, value in manifest["seconds"].items()
            if re.search(r"^layer_\d\.pca\.", name)
        ),
        abs=0.01,
    )
    assert manifest["seconds_in_all"] >= 0.9 * sum(stages.values())


def test_a_second_run_makes_nothing_and_says_so(whole_run, run_command):
    project, first = whole_run
    made = {
        path: path.stat().st_mtime_ns for path in (project / "data").rglob("*") if path.is_file()
    }
    ended = run_command("kedro run", project)
    assert ended.returncode == 0, ended.stderr
    assert "Nothing to do" in ended.stdout
    assert {
        path: path.stat().st_mtime_ns for path in (project / "data").rglob("*") if path.is_file()
    } == made
    table = re.compile(r"^ +[35] (?:kmeans|pca).*", flags=re.MULTILINE)
    assert table.findall(ended.stdout) == table.findall(first.stdout)
    assert len(table.findall(ended.stdout)) == 12
    with sqlite3.connect(project / "mlflow.db") as database:  # no empty run, no duplicates
        assert database.execute("select count(*) from runs").fetchone() == (13,)


def test_on_a_pretended_gpu_a_whole_run_mixes_no_devices_and_gives_the_cpus_table(
    whole_run, new_project, run_command
):
    pretended = Path(__file__).parent / "helpers/pretended_cuda.py"
    project = new_project()
    ended = run_command(
        f"{sys.executable} {pretended} -m kedro run --params=device:cuda,layers:[5]", project
    )
    assert ended.returncode == 0, ended.stderr
    tables = [
        (each / "data/08_reporting/baselines.csv").read_text("utf-8")
        for each in (project, whole_run[0])
    ]
    found, wanted = (pd.read_csv(io.StringIO(table)) for table in tables)
    wanted = wanted[wanted["layer"] == 5].drop(columns="best_layer").reset_index(drop=True)
    pd.testing.assert_frame_equal(found.drop(columns="best_layer"), wanted, rtol=1e-9, atol=1e-12)


def test_damaged_results_are_made_again(whole_run, run_command, planted):
    project, _ = whole_run
    before = (project / "data/08_reporting/baselines.csv").read_bytes()
    (folder,) = (
        project / f"data/07_model_output/inference/{planted[0].name}/kmeans-onehot/layer_3"
    ).iterdir()
    indices = folder / "indices000000.bin"
    indices.write_bytes(indices.read_bytes()[:-4])
    ended = run_command("kedro run --runner=ThreadRunner", project)
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"^1 of \d+ steps to do", ended.stdout, flags=re.MULTILINE)
    assert StoredCodes(folder).n_rows == 48 * 16
    assert (project / "data/08_reporting/baselines.csv").read_bytes() == before


def test_the_pca_pipeline_leaves_codes_of_both_probe_splits(new_project, run_command, planted):
    project = new_project()
    ended = run_command("kedro run --pipeline=pca --params=latent_topk:64", project)
    assert ended.returncode == 0, ended.stderr
    assert "eprecat" not in ended.stdout + ended.stderr
    inference = project / "data/07_model_output/inference"
    for shards in planted:
        assert [path.name for path in (inference / shards.name).iterdir()] == ["pca-topk-00064"]
        for layer in (3, 5):
            (folder,) = (inference / shards.name / "pca-topk-00064" / f"layer_{layer}").iterdir()
            codes = StoredCodes(folder)
            assert (codes.format, codes.n_rows, codes.n_features) == (
                "sparse",
                Shards(shards).n_tokens,
                80,
            )
            assert codes.provenance["layer"] == layer
    again = run_command("kedro run --pipeline=pca --params=latent_topk=64", project)
    assert "Nothing to do" in again.stdout
    dense = run_command("kedro run --pipelines=pca", project)
    assert dense.returncode == 0, dense.stderr
    (folder,) = (inference / planted[1].name / "pca-dense" / "layer_5").iterdir()
    codes = StoredCodes(folder)
    assert (codes.format, codes.n_rows, codes.n_features) == ("dense", 24 * 16, 80)


def test_several_parameters_nested_keys_lists_and_filters(new_project, run_command):
    project = new_project()
    ended = run_command(
        "kedro run --pipeline=kmeans --params=kmeans.n_clusters:6,layers:[5],kmeans.seed=3"
        " --env=ade20k",
        project,
    )
    assert ended.returncode == 0, ended.stderr
    models = project / "data/06_models"
    assert [path.name for path in models.glob("[!.]*")] == ["layer_5"]
    assert load_file(latest(models / "layer_5/kmeans.safetensors"))["cluster_centers"].shape == (
        6,
        80,
    )
    ended = run_command("kedro run -p kmeans --namespaces=layer_3", project)
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.name for path in models.glob("[!.]*")) == ["layer_3", "layer_5"]
    assert load_file(latest(models / "layer_3/kmeans.safetensors"))["cluster_centers"].shape == (
        8,
        80,
    )
    ended = run_command(
        "kedro run --from-nodes=layer_3.kmeans.measure --to-nodes=layer_3.kmeans.measure --force",
        project,
    )
    assert ended.returncode == 0, ended.stderr
    assert "1 of 1 steps to do" in ended.stdout
    assert made_last(project) == ["layer_3.kmeans.measure"]
    ended = run_command(
        "kedro run --namespaces=layer_5 --to-nodes=layer_5.standardize.fit --force", project
    )
    assert ended.returncode == 0, ended.stderr
    assert made_last(project) == ["layer_5.standardize.fit"]


FAULTS = {
    "--params=kmeans.n_cluster:6": ["kmeans.n_cluster", "did you mean `kmeans.n_clusters`"],
    "--params=latent_topk:81": ["latent_topk is 81", "80"],
    "--params=layers:[3,4]": ["layer 4", "[3, 5]"],
    "--params=shards.fit:nowhere": ["nowhere", "no shard folder"],
    "--pipeline=nonsense": ["nonsense", "standardize"],
    "--pipeline=pca --from-nodes=layer_3.pca.measure": ["layer_3.pca_model", "layer_3.pca.fit"],
    "--params=kmeans.n_clusters:769": ["kmeans.n_clusters is 769", "768 tokens"],
    "--pipeline=kmeans --load-versions=layer_3.kmeans_model:2000-01-01T00.00.00.000Z": [
        "layer_3.kmeans_model",
        "2000",
    ],
    "--params=layers:[true]": ["layers", "found [True], want no boolean"],
    "--params=latent_topk:true": ["latent_topk", "found True, want no boolean"],
    "--params=pca.whiten:1": ["pca.whiten` is 1", "Write true or false"],
    "--runner=Nonsense": ["Nonsense"],
    "--env=nowhere": ["conf has no environment `nowhere`, want one of"],
    "--runner=ParallelRunner": ["ParallelRunner", "ThreadRunner"],
}


def test_faults_are_named_in_a_line_or_two_before_any_work(new_project, run_command):
    project = new_project()
    with ThreadPoolExecutor(2) as pool:
        ended = dict(
            zip(
                FAULTS,
                pool.map(lambda fault: run_command(f"kedro run {fault}", project), FAULTS),
                strict=True,
            )
        )
    for fault, wanted in FAULTS.items():
        message = ended[fault].stderr
        assert ended[fault].returncode != 0
        assert 1 <= len(message.strip().splitlines()) <= 2, message
        for words in wanted:
            assert words in message
    assert not (project / "data").exists()


def test_a_run_that_fails_is_marked_failed_with_its_reason(new_project, run_command, tmp_path):
    project = new_project()
    save_file({"mean": np.full(80, 1e6), "std": np.ones(80)}, tmp_path / "layer_3.safetensors")
    given = f"standardize.statistics:{tmp_path}/{{layer}}.safetensors"
    ended = run_command(f"kedro run --pipeline=standardize --params=layers:[3],{given}", project)
    assert ended.returncode != 0
    assert "are these statistics of the same layer" in ended.stderr
    with sqlite3.connect(project / "mlflow.db") as database:
        assert database.execute("select status from runs").fetchall() == [("FAILED",)]
    (path,) = (project / "data/08_reporting/manifests").iterdir()
    manifest = json.loads(path.read_text())
    assert manifest["status"] == "FAILED"
    assert "are these statistics of the same layer" in manifest["failure"]
    assert not (project / "data/02_intermediate").exists()


def test_a_run_that_is_interrupted_is_marked_killed_and_goes_on_next_time(
    new_project, run_command, start_command
):
    project = new_project()
    process = start_command("exec kedro run", project)
    while not list(
        (project / "data/.fingerprints/layer_3.kmeans_history").glob("*.json")
    ):  # the last that the fit leaves
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    with sqlite3.connect(project / "mlflow.db") as database:
        status = [row[0] for row in database.execute("select status from runs")]
    assert set(status) == {"KILLED"}
    (path,) = (project / "data/08_reporting/manifests").iterdir()
    assert json.loads(path.read_text())["status"] == "KILLED"
    ended = run_command("kedro run", project)
    assert ended.returncode == 0, ended.stderr
    assert "layer_3.kmeans.fit" not in made_last(project)
    mlflow.set_tracking_uri(f"sqlite:///{project / 'mlflow.db'}")
    runs = mlflow.search_runs(experiment_names=["assay"], filter_string="status = 'FINISHED'")
    children = runs[runs["tags.mlflow.parentRunId"].notna()]
    assert len(children) == 12
    assert children["metrics.nmse"].notna().all()  # also where the errors were up to date already


def test_sigterm_in_the_statistics_is_gone_on_from(new_project, run_command, start_command):
    project = new_project()
    fit = write_planted(project, 1_000, seed=3)
    command = (
        "kedro run --pipeline=standardize --params=layers:[3],standardize.batch_size:4,"
        f"standardize.checkpoint_steps:300,shards.fit:{fit}"
    )
    process = start_command(f"exec {command}", project)
    folder = project / "data/06_models/.checkpoints/layer_3/statistics"
    while not list(folder.rglob("step*")):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert "Traceback" not in told
    assert "The same command goes on from here." in told
    stopped = max(int(path.stem.removeprefix("step")) for path in folder.rglob("step*"))
    assert stopped < 4_000
    ended = run_command(command, project)
    assert ended.returncode == 0, ended.stderr
    assert f"layer 3, statistics: resuming after step {stopped}" in ended.stderr + ended.stdout
    assert not folder.exists()
    (found,) = (project / "data/02_intermediate/layer_3").rglob("*/statistics.safetensors")
    whole = StreamingMoments()
    for batch in Shards(fit).batches(layer=3, batch_size=4):
        whole.partial_fit(batch)
    for name, value in load_torch_file(found).items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_an_older_version_is_used_where_it_is_asked_for_and_stays_until_it_is_pruned(
    new_project, run_command
):
    project = new_project()
    few = "kedro run --pipeline=kmeans --params=layers:[3],kmeans.n_clusters:"
    for k in (4, 6):
        assert run_command(f"{few}{k}", project).returncode == 0
    older = min(
        path.name for path in (project / "data/06_models/layer_3/kmeans.safetensors").iterdir()
    )
    errors = project / "data/08_reporting/metrics/layer_3/kmeans-errors.json"
    ended = run_command(f"{few}6 --load-versions=layer_3.kmeans_model:{older}", project)
    assert ended.returncode == 0, ended.stderr
    assert made_last(project) == ["layer_3.kmeans.measure"]
    assert json.loads(latest(errors).read_text())["rows"][0]["k"] == 4
    for k in (6, 4):  # neither fit nor errors have been lost
        assert "Nothing to do" in run_command(f"{few}{k}", project).stdout
    models = project / "data/06_models/layer_3/kmeans.safetensors"
    # As of a run with several seeds, which these settings do not have.
    shown = project / "data/08_reporting/agreement.csv"
    version = (
        shown.parent / ".versions/agreement.csv/2026-01-01T00.00.00.000Z.0123abcd/agreement.csv"
    )
    version.parent.mkdir(parents=True)
    for path in (shown, version):
        path.write_text("layer,seed\n3,5\n")
    assert (
        run_command(
            "kedro prune --dry-run --params=layers:[3],kmeans.n_clusters:6", project
        ).returncode
        == 0
    )
    assert shown.exists()
    ended = run_command("kedro prune --params=layers:[3],kmeans.n_clusters:6", project)
    assert not shown.exists()
    assert ended.returncode == 0, ended.stderr
    assert f"data/06_models/layer_3/kmeans.safetensors/{older}" in ended.stdout
    assert re.search(r"\d MB in \d+ places removed$", ended.stdout.strip())
    assert len(list(models.iterdir())) == 1
    assert "Nothing to do" in run_command(f"{few}6", project).stdout


def test_statistics_of_the_users_own_are_adopted(new_project, run_command, planted, tmp_path):
    project = new_project()
    tokens = torch.cat(list(Shards(planted[0]).batches(layer=3, batch_size=100))).double().numpy()
    own = {"mean": tokens.mean(axis=0) + 0.01, "std": tokens.std(axis=0) * 1.1}
    save_file(own, tmp_path / "layer_3.safetensors")
    given = f"standardize.statistics:{tmp_path}/{{layer}}.safetensors"
    ended = run_command(f"kedro run --pipeline=standardize --params=layers:[3],{given}", project)
    assert ended.returncode == 0, ended.stderr
    kept = load_file(latest(project / "data/02_intermediate/layer_3/statistics.safetensors"))
    np.testing.assert_array_equal(kept["mean"], own["mean"])
    np.testing.assert_array_equal(kept["std"], own["std"])


def test_the_embedded_default_is_made_once_and_again_when_its_parameters_change(
    new_project, run_command
):
    project = new_project()
    splits = ("fit", "val", "probe_train", "probe_val")
    paths = ", ".join(f"{split}: data/01_raw/digits/{split}" for split in splits)
    (project / "conf/base/globals.yml").write_text(f"shards: {{{paths}}}\nstatistics: null\n")
    sizes = ",".join(f"digits.n_{split}:40" for split in splits)
    small = (
        "kedro run --pipeline=standardize"
        f" --params=layers:[2],digits.train_steps:2,digits.train_images:16,{sizes}"
    )
    ended = run_command(small, project)
    assert ended.returncode == 0, ended.stderr
    first = {
        path.name
        for path in (project / "data/01_raw/digits/fit").iterdir()
        if not path.name.startswith(".")
    }
    assert len(first) == 1
    assert "Nothing to do" in run_command(small, project).stdout
    ended = run_command(f"{small},digits.seed:1", project)
    assert ended.returncode == 0, ended.stderr
    second = {
        path.name
        for path in (project / "data/01_raw/digits/fit").iterdir()
        if not path.name.startswith(".")
    }
    assert len(second) == 1
    assert second != first


def test_kedro_viz_builds_and_previews_the_table(whole_run, run_command):
    project, _ = whole_run
    ended = run_command("kedro viz build --include-previews", project)
    assert ended.returncode == 0, ended.stderr
    graph = json.loads((project / "build/api/main").read_text())
    names = {node["name"] for node in graph["nodes"]}
    assert {"baselines", "layer_3.pca_model", "shards_fit"} <= names
    (table,) = (node["id"] for node in graph["nodes"] if node["name"] == "baselines")
    preview = json.loads((project / f"build/api/nodes/{table}").read_text())["preview"]
    assert preview["columns"] == COLUMNS
    assert len(preview["data"]) == 12


def test_other_dictionaries_are_rows_of_the_table(new_project, run_command, planted):
    """An autoencoder by its weights, and by the codes and metrics that saev writes of it, give the
    same row.
    """
    project = new_project()
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(100, 80, generator=generator))
    weights = {"W_enc": directions.T.contiguous(), "W_dec": directions, "b_dec": torch.zeros(80)}
    (project / "saes").mkdir()
    save_torch_file(weights, project / "saes/layer_5.safetensors")
    statistics = [
        batch.double() for batch in Shards(planted[0]).batches(layer=5, batch_size=10_000)
    ]
    mean, std = statistics[0].mean(0), statistics[0].std(0, unbiased=False)
    stored = hand_made.read(
        project / "saes/layer_5.safetensors", Settings("topk", 6), input_bias=True
    )
    sae = open_sae(stored)
    for path in planted:
        tokens = torch.cat(list(Shards(path).batches(layer=5, batch_size=100)))
        standardized = ((tokens.double() - mean) / std).float()
        codes = densify(sae.encode(standardized), "sparse", 100)
        left = sae.residual(standardized).double() * std
        metrics = {
            "sse_recon": float(left.square().sum()),
            "sse_baseline": float((tokens.double() - tokens.double().mean(0)).square().sum()),
        }
        folder = project / "runs/abc/inference" / path.name
        folder.mkdir(parents=True)
        scipy.sparse.save_npz(folder / "token_acts.npz", scipy.sparse.csr_array(codes.numpy()))
        (folder / "metrics.json").write_text(json.dumps(metrics))
    as_saved = {
        "W_enc": torch.randn(80, 100, generator=generator),
        "b_enc": torch.randn(100, generator=generator) - 80,  # so that fewer than k are positive
        "W_dec": directions,
        "b_dec": mean.float(),
    }
    (project / "runs/abc/checkpoint").mkdir()
    with (project / "runs/abc/checkpoint/sae.pt").open("wb") as file:
        activation = {"cls": "TopK", "params": {"top_k": 6}}
        header = {"cfg": {"d_model": 80, "d_sae": 100, "activation": activation}, "schema": 5}
        file.write(json.dumps(header).encode() + b"\n")
        torch.save(as_saved, file)
    parameters = project / "conf/base/parameters.yml"
    given = {
        "saev": {"sae": "runs/abc"},
        "mine": {
            "weights": "saes/{layer}.safetensors",
            "activation": "topk",
            "k": 6,
            "trained_on": "standardized",
            "input_bias": "b_dec",
        },
        "theirs": {"saev_run": "runs/abc"},
        "random-centres": {"random": "centres"},
        "random-directions": {"random": "directions", "seeds": [3, 4]},
    }
    text = parameters.read_text()
    assert "dictionaries: {}" in text
    parameters.write_text(text.replace("dictionaries: {}", f"dictionaries: {json.dumps(given)}"))
    ended = run_command(
        "kedro run --params=layers:[5],pca.topk:[4,16],kmeans.more_seeds:[1]", project
    )
    assert ended.returncode == 0, ended.stderr
    assert max(len(line) for line in ended.stdout.splitlines()) <= 80
    table = pd.read_csv(project / "data/08_reporting/baselines.csv")
    assert "random-directions-topk-00016" in ended.stdout
    assert len(table) == 15
    seeds = table.groupby("encoding")["seed"].apply(list).to_dict()
    assert seeds["kmeans-onehot"] == seeds["kmeans-invdist"] == [0, 1]
    assert seeds["random-directions-topk-00016"] == [3, 4]
    paper = cells(project / "data/08_reporting/paper.csv", "encoding")
    for name in ("kmeans-onehot", "random-directions-topk-00016"):
        values = table.loc[table["encoding"] == name, "map"]
        assert paper[name]["seeds"] == 2
        assert paper[name]["map"] == pytest.approx(values.mean())
        assert paper[name]["map_sd"] == pytest.approx(values.std())
        assert paper[name]["map_sd"] > 0
    agreement = pd.read_csv(project / "data/08_reporting/agreement.csv")
    assert agreement[["layer", "seed"]].to_numpy().tolist() == [[5, 1]]
    mlflow.set_tracking_uri(f"sqlite:///{project / 'mlflow.db'}")
    found = mlflow.search_runs(experiment_names=["assay"])
    runs: dict[Any, Any] = found.set_index("tags.mlflow.runName").to_dict("index")
    parent = runs["layer_5/mine"]["tags.mlflow.parentRunId"]
    for fit in ("kmeans", "kmeans-seed-1"):
        assert sum(utilization(parent, 5, fit)["clusters"].values()) == 8
    second = runs["layer_5/kmeans-seed-1-onehot"]
    assert (second["params.method"], second["params.encoding"], second["params.seed"]) == (
        "kmeans",
        "kmeans-onehot",
        "1",
    )
    assert second["metrics.adjusted_rand_index"] == pytest.approx(
        agreement.loc[0, "adjusted_rand_index"]
    )
    assert runs["layer_5/mine"]["tags.dictionary"] == "saes/layer_5.safetensors"
    assert runs["layer_5/theirs"]["tags.dictionary"].startswith("runs/abc/inference/")
    assert runs["layer_5/saev"]["tags.dictionary"] == "runs/abc"
    assert runs["layer_5/saev"]["tags.dictionary.library"] == "saev"
    formula = "code = top-6(x W_enc + b_enc);  x^ = code W_dec + b_out"
    assert runs["layer_5/saev"]["tags.dictionary.formula"] == formula
    (path,) = (project / "data/08_reporting/manifests").iterdir()
    said = json.loads(path.read_text())["dictionaries"]
    assert {layer: sorted(each) for layer, each in said.items()} == {"layer_5": ["mine", "saev"]}
    names = ("path", "commit", "library", "formula", "k", "files")
    assert [said["layer_5"]["saev"][name] for name in names] == [
        *("runs/abc", None, "saev", formula, 6, [str(project / "runs/abc/checkpoint/sae.pt")])
    ]
    assert said["layer_5"]["mine"]["path"] == "saes/{layer}.safetensors"
    assert said["layer_5"]["mine"]["library"] == "hand-made"
    page = (project / "data/08_reporting/report.html").read_text()
    assert "Agreement of seeds" in page
    assert "<h3>mine, layer 5</h3>" in page
    firsts = table.drop_duplicates("encoding").set_index("encoding")
    rows: dict[Any, Any] = firsts.to_dict("index")
    mine, theirs = rows["mine"], rows["theirs"]
    assert (mine["k"], mine["method"], theirs["method"]) == (6, "mine", "theirs")
    assert theirs["k"] == 100
    assert theirs["nmse_raw"] == pytest.approx(mine["nmse_raw"], rel=1e-5)
    assert np.isnan(theirs["nmse"])
    for column in ("l0", "probe_r", "map", "purity_at_16", "coverage_at_0.3"):
        assert mine[column] == pytest.approx(theirs[column], rel=1e-9), column
    wide = {name: tensor.double() for name, tensor in as_saved.items()}
    x = torch.cat(list(Shards(planted[1]).batches(layer=5, batch_size=100))).double()
    entries, indices = (x @ wide["W_enc"] + wide["b_enc"]).topk(6, dim=1)
    assert entries.min() < 0 < entries.max()
    back = torch.einsum("bk,bkd->bd", entries, wide["W_dec"][indices]) + wide["b_dec"]
    for column, unit in (("nmse", std), ("nmse_raw", 1.0)):
        wanted = ((x - back) / unit).square().sum() / ((x - mean) / unit).square().sum()
        assert rows["saev"][column] == pytest.approx(float(wanted), rel=1e-6), column
    assert (rows["saev"]["k"], rows["saev"]["l0"]) == (6, 6)
    assert rows["random-directions-topk-00016"]["nmse"] > rows["pca-topk-00016"]["nmse"]
    assert rows["random-centres-onehot"]["nmse"] > rows["kmeans-onehot"]["nmse"]
    again = run_command(
        "kedro run --params=layers:[5],pca.topk:[4,16],kmeans.more_seeds:[1]", project
    )
    assert "Nothing to do" in again.stdout
    (project / "saes/layer_5.safetensors").unlink()
    ended = run_command("kedro run --params=layers:[5],pca.topk:[4,16]", project)
    assert ended.returncode != 0
    assert "layer_5.sae_mine" in ended.stderr
    assert "dictionaries.mine.weights" in ended.stderr
    assert "correct its path" in ended.stderr
    assert "Traceback" not in ended.stderr


CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)

WATCH = """<script>
window.faults = [];
addEventListener("error", event => faults.push(event.message || String(event.target.src)), true);
addEventListener("unhandledrejection", event => faults.push(String(event.reason)));
console.error = (...words) => faults.push(words.join(" "));
</script>"""

INSPECT = """<script>
addEventListener("load", () => setTimeout(() => {
  const wide = document.documentElement.scrollWidth - innerWidth;
  const found = { faults, wide, charts: {}, sorted: [], broken: [], outside: [] };
  for (const chart of document.querySelectorAll(".plotly-graph-div"))
    found.charts[chart.id] = chart.querySelectorAll(".scatterlayer .trace").length;
  for (const table of document.querySelectorAll("table")) {
    if (table.tBodies[0].rows.length < 2) continue;
    const heads = [...table.querySelectorAll("th button")];
    const column = heads.findIndex(head => ["mAP", "F1"].includes(head.textContent));
    const key = row => Number(row.cells[column].dataset.sort);
    const values = () => [...table.tBodies[0].rows].map(key).filter(value => !Number.isNaN(value));
    for (const falling of [false, true]) {
      heads[column].click();
      const now = values();
      found.sorted.push(now.every((value, i) => i === 0 || (falling ? now[i - 1] >= value : now[i - 1] <= value)));
    }
  }
  for (const link of document.querySelectorAll("a[href]"))
    if (!document.querySelector(link.getAttribute("href"))) found.broken.push(link.href);
  // Nothing covers a legend, and no caption lies over its picture.
  found.overlaps = [...document.querySelectorAll("figure")].flatMap(figure => {
    const plot = figure.querySelector(".plotly-graph-div");
    if (!plot) return [];
    const box = element => element.getBoundingClientRect(), legend = box(plot.querySelector(".legend .bg"));
    const lowest = Math.max(...[...plot.querySelectorAll(".xtitle")].map(title => box(title).bottom));
    const fits = legend.bottom <= box(plot).bottom + 1 && box(plot).bottom <= box(figure.querySelector("figcaption")).top + 1;
    return fits && lowest <= legend.top + 1 ? [] : [plot.id];
  });
  const pictures = [...document.images];
  found.pictures = pictures.length;
  found.unloaded = pictures.filter(image => { image.loading = "eager"; return !image.complete || !image.naturalWidth; }).length;
  for (const entry of performance.getEntriesByType("resource")) found.outside.push(entry.name);
  const result = document.createElement("pre");
  result.id = "found"; result.textContent = JSON.stringify(found); document.body.append(result);
}, 500));
</script>"""


def cells_of(page: str, heading: str) -> list[list[str]]:
    """What the cells of the table below a heading are sorted by: their numbers in full."""
    table = page[page.index(f'<h2 id="{heading}">') :]
    table = table[table.index("<tbody>") : table.index("</tbody>")]
    return [re.findall(r'data-sort="([^"]*)"', row) for row in table.split("<tr>")[1:]]


def test_the_page_says_what_the_table_says(whole_run):
    project, ended = whole_run
    assert "data/08_reporting/report.html" in ended.stdout
    page = (project / "data/08_reporting/report.html").read_text()
    table = pd.read_csv(project / "data/08_reporting/baselines.csv")
    cells = cells_of(page, "layers-table")
    assert len(cells) == len(table)
    for row, shown in zip(table.itertuples(index=False), cells, strict=True):
        for value, text in zip(row, shown, strict=True):
            if isinstance(value, str):
                assert text == value
            else:
                assert float(text) == pytest.approx(float(value), rel=1e-12, nan_ok=True)
    paper = pd.read_csv(project / "data/08_reporting/paper.csv")
    assert [row[1] for row in cells_of(page, "paper")] == paper["encoding"].tolist()
    assert "<script src" not in page
    assert re.findall(r'<(?:img|link|script|iframe)[^>]* (?:src|href)="(?!data:)', page) == []


def test_the_views_and_figures_are_kept_in_mlflow(whole_run):
    project, _ = whole_run
    mlflow.set_tracking_uri(f"sqlite:///{project / 'mlflow.db'}")
    runs = mlflow.search_runs(experiment_names=["assay"], order_by=["attributes.start_time"])
    parent = runs[runs["tags.mlflow.parentRunId"].isna()].iloc[0]
    kept = {file.path for file in mlflow.MlflowClient().list_artifacts(parent["run_id"])}
    assert {
        "baselines.csv",
        "paper.csv",
        "paper.md",
        "paper.tex",
        "classes.csv",
        "matched_l0.csv",
        "report.html",
    } <= kept
    assert {f"{name}.json" for name in FIGURES} <= kept


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_works_in_a_browser_without_a_network(whole_run, tmp_path, width):
    project, _ = whole_run
    page = (project / "data/08_reporting/report.html").read_text()
    path = tmp_path / "report.html"
    path.write_text(
        page.replace("<head>", f"<head>{WATCH}", 1).replace("</body>", f"{INSPECT}</body>", 1)
    )
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    command += [
        f"--window-size={width},900",
        "--virtual-time-budget=10000",
        f"--user-data-dir={tmp_path}",
        "--dump-dom",
    ]
    ended = subprocess.run(
        [*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(
        html.unescape(ended.stdout.partition('<pre id="found">')[2].partition("</pre>")[0])
    )
    assert found["faults"] == found["broken"] == found["outside"] == found["overlaps"] == []
    # One step: words, not a picture.
    assert set(found["charts"]) == set(FIGURES) - {"convergence_pca"}
    assert all(traces >= 2 for traces in found["charts"].values())
    assert (found["pictures"], found["unloaded"]) == (2 * 3 * 6, 0)  # methods, classes, images
    assert len(found["sorted"]) == 8
    assert all(found["sorted"])
    assert found["wide"] <= 0  # nothing is wider than the window

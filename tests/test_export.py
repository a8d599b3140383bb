"""`assay export saev`, typed in a project after a run."""

import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from assay.io.codes import StoredCodes
from assay.io.codes.saev import read_metrics
from assay.io.datasets import SaevInferenceDataset
from assay.io.locks import Locks
from assay.numerics.codes import TopKCodes, densify
from shards import edit_json, read_content

RUNS = "data/09_export/saev/runs"


def dense(codes):
    """All rows of codes, float32."""
    batches = codes.batches(1000)
    return torch.cat([densify(batch, codes.format, codes.n_features) for batch in batches])


def stored_codes(project, encoding, layer, shards):
    """The folder of the codes that a run left."""
    folder = project / f"data/07_model_output/inference/{shards.name}/{encoding}/layer_{layer}"
    return StoredCodes(next(folder.glob("[0-9a-f]*")))


@pytest.fixture
def exported(whole_run, run_command):
    """Types an export in the folder of the whole run, which it leaves as it was."""
    project, _ = whole_run

    def export(arguments):
        return run_command(f"assay export saev {arguments}", project)

    yield export
    shutil.rmtree(project / "data/09_export", ignore_errors=True)


def test_codes_and_probes_of_a_run_are_as_saev_writes_them(whole_run, planted, exported):
    project, _ = whole_run
    ended = exported("pca-topk-00016 --layer 3")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    run = project / RUNS / "pca-topk-00016-layer_3"
    assert ended.stdout.startswith(f"{run}: pca-topk-00016, layer 3, as a run of saev's\n")
    assert "note: with probe.void: drop there is no probe of label 0" in ended.stdout
    # What saev looks for where it opens a run.
    assert run.parts[-3:-1] == ("saev", "runs")
    assert all((run / name).is_dir() for name in ("checkpoint", "links", "inference"))
    pairs = pd.read_parquet(
        max((project / "data/08_reporting/pairs/layer_3/pca-topk-00016.parquet").glob("*/*"))
    )
    for split, path in zip(("train", "val"), planted, strict=True):
        folder = run / "inference" / path.name
        acts = scipy.sparse.load_npz(folder / "token_acts.npz")
        wanted = dense(TopKCodes(stored_codes(project, "pca-topk-00064", 3, path), 16))
        np.testing.assert_array_equal(acts.toarray(), wanted.numpy())
        assert (acts.data < 0).any()
        ours = SaevInferenceDataset(run=str(run), shards=str(path), part="codes").load()
        assert torch.equal(dense(ours), wanted)
        with np.load(folder / "probe1d_metrics.npz") as arrays:
            found = dict(arrays)
        labels = np.fromfile(path / "labels.bin", np.uint8)
        for label in range(1, 4):
            rows = pairs[pairs["label"] == label].sort_values("feature")
            for name, column in {
                "loss": f"{split}_ce",
                "weights": "weight",
                "biases": "bias",
            }.items():
                np.testing.assert_array_equal(
                    found[name][:, label], rows[column].to_numpy(np.float32)
                )
            np.testing.assert_array_equal(
                found["tp"][:, label] + found["fn"][:, label], np.sum(labels == label)
            )
            if split == "val":
                np.testing.assert_array_equal(found["tp"][:, label], rows["val_true_positives"])
        for array in found.values():
            assert (array.shape, array.dtype) == ((80, 4), np.float32)
            assert np.isnan(array[:, 0]).all()
        total = found["tp"] + found["fp"] + found["tn"] + found["fn"]
        np.testing.assert_array_equal(total[:, 1:], np.sum(labels > 0))
        best = np.argmin(found["loss"][:, 1:], axis=0)
        p = 1 / (
            1
            + np.exp(
                -(acts[:, best].toarray() * found["weights"][best, [1, 2, 3]])
                - found["biases"][best, [1, 2, 3]]
            )
        )
        p = p[labels > 0]
        np.testing.assert_array_equal(
            np.sum(p >= 0.5, axis=0), (found["tp"] + found["fp"])[best, [1, 2, 3]]
        )


def test_errors_of_every_split_are_those_of_saevs_formula(whole_run, planted, exported):
    project, _ = whole_run
    ended = exported("pca-topk-00004 --layer 5")
    assert ended.returncode == 0, ended.stderr
    train = read_content(planted[0], 5)
    mean, std = train.mean(axis=0), train.std(axis=0)
    _, _, components = np.linalg.svd((train - mean) / std, full_matrices=False)
    for path in planted:
        x = read_content(path, 5)
        z = (x - mean) / std @ components.T
        kept = np.where(np.argsort(np.argsort(-np.abs(z), axis=1), axis=1) < 4, z, 0)
        error = np.square(x - (kept @ components * std + mean)).sum()
        baseline = np.square(x - x.mean(axis=0)).sum()
        folder = project / RUNS / "pca-topk-00004-layer_5/inference" / path.name
        found = json.loads((folder / "metrics.json").read_text())
        assert found == pytest.approx(
            {
                "sse_recon": error,
                "sse_baseline": baseline,
                "normalized_mse": error / baseline,
                "n_tokens": len(x),
                "d_model": 80,
                "n_elements": x.size,
                "mse_per_dim": error / x.size,
                "mse_per_token": error / len(x),
                "baseline_mse_per_dim": baseline / x.size,
                "baseline_mse_per_token": baseline / len(x),
            },
            rel=1e-6,
        )
        assert read_metrics(folder)["sse_recon"] == found["sse_recon"]


def test_an_export_that_exists_is_replaced_by_force_alone(whole_run, exported):
    project, _ = whole_run
    run = project / RUNS / "kmeans-onehot-layer_5"
    assert exported("kmeans-onehot --layer 5").returncode == 0
    acts = next(run.glob("inference/*/token_acts.npz"))
    before = acts.stat().st_ino
    again = exported("kmeans-onehot --layer 5")
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == (
        f"Error: {run} exists already and is not replaced; name another folder with --out, or"
        " --force\n"
    )
    assert acts.stat().st_ino == before
    forced = exported("kmeans-onehot --layer 5 --force")
    assert forced.returncode == 0, forced.stderr
    assert acts.stat().st_ino != before
    assert json.loads((run / "export.json").read_text())["layer"] == 5
    refused = exported("kmeans-onehot --layer 5 --out conf --force")
    assert refused.returncode == 1
    assert "conf has no export.json, so it is no export" in refused.stderr
    assert (project / "conf/base").is_dir()


def test_what_cannot_be_exported_is_said_in_a_line(whole_run, exported, tmp_path, run_command):
    project, _ = whole_run
    for arguments, said in {
        "pca-topk-00017 --layer 3": "layer 3 has no encoding 'pca-topk-00017', wanted one of"
        " kmeans-invdist, kmeans-onehot, pca-topk-00001, pca-topk-00004, pca-topk-00016,"
        " pca-topk-00064",
        "pca-topk-00016 --layer 4": "found layer 4, wanted one of 3, 5: type the --env and"
        " --params of the run that has it",
        "pca-topk-00016 --layer 3 --params=probe.void:class": "`layer_3.probes_pca-topk-00016`"
        " does not exist for these shards and parameters, or is out of date: `kedro run` makes it"
        " (`layer_3.probe.pca-topk`); type the same --env and --params as there",
        "pca-topk-00016 --layer 3 --env=nowhere": f"{project}/conf has no environment `nowhere`,"
        " want one of ade20k, base, images, local",
    }.items():
        ended = exported(arguments)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr == f"Error: {said}\n"
    assert not (project / "data/09_export").exists()
    outside = run_command("assay export saev pca-topk-00016 --layer 3", tmp_path)
    assert outside.returncode == 1
    assert f"{tmp_path} is in no Kedro project: type this in the project's folder" in outside.stderr
    typed = exported("pca-topk-00016 --layer 3 --params=probe.void")
    assert typed.returncode == 2
    assert "`probe.void` is no key:value" in typed.stderr


def test_a_damaged_result_is_not_exported(whole_run, planted, exported):
    project, _ = whole_run
    codes = stored_codes(project, "kmeans-onehot", 3, planted[0])
    index = codes.path / "shards.json"
    whole = index.read_bytes()
    edit_json(index, lambda shards: shards[0]["sha256"].update(error="0" * 64))
    ended = exported("kmeans-onehot --layer 3")
    index.write_bytes(whole)
    assert ended.returncode == 1
    assert "`layer_3.codes_kmeans-onehot_probe_train` does not exist for these" in ended.stderr
    assert not (project / "data/09_export").exists()


def test_what_a_run_is_making_is_not_exported(whole_run, exported):
    project, _ = whole_run
    name = "layer_3.probes_kmeans-onehot"
    (record,) = (project / "data/.fingerprints" / name).glob("*.json")
    locks = Locks(project / "data/.locks")
    assert locks.take(json.loads(record.read_text())["lock"])
    try:
        ended = exported("kmeans-onehot --layer 3")
    finally:
        locks.release()
    assert ended.returncode == 1
    assert f"Error: `{name}` is in the hands of process {os.getpid()} on" in ended.stderr
    assert exported("kmeans-onehot --layer 3").returncode == 0


def test_codes_in_memory_are_computed_and_an_export_is_a_row_of_the_table_again(
    new_project, planted, run_command
):
    project = new_project()
    shutil.copy(project / "conf/ade20k/catalog.yml", project / "conf/local/catalog.yml")
    typed = "--params=layers:[5],probe.void:class"
    ended = run_command(f"kedro run {typed},pca.topk:[4,64]", project)
    assert ended.returncode == 0, ended.stderr
    typed += ",pca.topk:[4,64]"
    ended = run_command(f"assay export saev kmeans-invdist --layer 5 {typed} --out out", project)
    assert ended.returncode == 0, ended.stderr
    assert "note" not in ended.stdout
    assert not list(project.glob("data/07_model_output/inference/*/kmeans-invdist"))
    for path in planted:
        folder = project / "out/inference" / path.name
        acts = scipy.sparse.load_npz(folder / "token_acts.npz")
        assert (acts.shape[1], acts.data.min() > 0) == (8, True)
        with np.load(folder / "probe1d_metrics.npz") as arrays:
            found = dict(arrays)
        labels = np.fromfile(path / "labels.bin", np.uint8)
        assert found["loss"].shape == (8, 4)
        y = labels[:, None] == np.arange(4)
        z = acts.toarray().astype(np.float64)[:, :, None] * found["weights"] + found["biases"]
        loss = np.mean(np.logaddexp(0, z) - y[:, None] * z, axis=0)
        np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
        np.testing.assert_array_equal(found["tp"] + found["fn"], np.tile(y.sum(0), (8, 1)))
        assert np.isfinite(found["loss"].min(0).mean())
    out = run_command(f"assay export saev pca-topk-00004 --layer 5 {typed} --out back", project)
    assert out.returncode == 0, out.stderr
    ended = run_command(f"kedro run {typed},dictionaries.back.saev_run:back", project)
    assert ended.returncode == 0, ended.stderr
    table = pd.read_csv(project / "data/08_reporting/baselines.csv").set_index("encoding")
    for column in ("nmse_raw", "l0", "probe_r", "map", "purity_at_16"):
        assert table.loc["back", column] == pytest.approx(
            table.loc["pca-topk-00004", column], rel=1e-9
        ), column
    # saev's own errors are in saev's own run.
    out = run_command(
        f"assay export saev back --layer 5 {typed},dictionaries.back.saev_run:back --out again",
        project,
    )
    assert out.returncode == 0, out.stderr
    assert sorted(path.name for path in (project / "again").rglob("*.*")) == [
        "export.json",
        *["probe1d_metrics.npz"] * 2,
        *["token_acts.npz"] * 2,
    ]

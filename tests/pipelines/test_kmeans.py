"""The k-means nodes: standardized tokens in shuffled passes, and the error of the nearest center."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from assay.encodings import Form, Model
from assay.io.checkpoints import Checkpoints
from assay.io.shards import Shards
from assay.numerics.kmeans.estimator import MiniBatchKMeans
from assay.parameters import KMeansParameters, parse_parameters
from assay.pipelines.dictionary_nodes import measure
from assay.pipelines.kmeans.nodes import compare_seeds, fit_kmeans
from assay.pipelines.kmeans.pipeline import create_pipeline
from assay.plan import make_plan
from shards import read_content

LAYERS, TOKENS = (3, 5), 16

SMALL = {
    "n_clusters": 8,
    "batch_size": 64,
    "n_init": 1,
    "init_size": 100,
    "max_iter": 3,
    "max_no_improvement": None,
    "reassignment_ratio": 0.0,
    "decay": 0.5,
}
N_STEPS = 3 * 48 * TOKENS // 64
CHANGES = {
    "max_tokens": 400,
    "n_clusters": 9,
    "batch_size": 63,
    "n_init": 4,
    "init_size": 200,
    "max_iter": 4,
    "tol": 1e6,
    "max_no_improvement": 1,
    "reassignment_ratio": 0.9,
    "decay": 1.0,
    "seed": 1,
}


@pytest.fixture
def statistics(planted):
    tokens = read_content(planted[0], 5)
    return {
        "mean": torch.from_numpy(tokens.mean(axis=0)),
        "std": torch.from_numpy(tokens.std(axis=0)),
    }


@pytest.fixture
def fit(planted, statistics, tmp_path):
    def run(layer=5, **changes):
        parameters = KMeansParameters(**SMALL | changes)
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        made = fit_kmeans(
            Shards(planted[0]), statistics, parameters, checkpoints, "cpu", layer=layer
        )
        checkpoints.clear_finished()
        return made

    return run


def test_the_fit_is_that_of_shuffled_standardized_passes(planted, statistics, fit):
    shards = Shards(planted[0])
    mean, std = statistics["mean"], statistics["std"]

    def stream(epoch):
        for batch in shards.batches(layer=5, batch_size=64, shuffle=True, seed=3 + epoch):
            yield ((batch.double() - mean) / std).float()

    wanted = MiniBatchKMeans(
        8,
        seed=3,
        init_size=100,
        max_iter=3,
        max_no_improvement=None,
        reassignment_ratio=0.0,
        decay=0.5,
    )
    wanted.fit(stream)
    model, history = fit(seed=3)
    assert torch.equal(model["cluster_centers"], wanted.cluster_centers_)
    assert torch.equal(model["counts"], wanted.counts_)
    assert history == wanted.history_
    assert model["cluster_centers"].dtype == torch.float32
    assert len(history) == N_STEPS
    assert int(fit(seed=3, decay=1.0)[0]["counts"].sum()) == 3 * shards.n_tokens


def test_one_seed_gives_one_fit(fit):
    (first, history), (again, same) = fit(), fit()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert history == same


def test_max_tokens_is_the_tokens_of_a_pass(planted, fit):
    model, history = fit(max_tokens=200, decay=1.0)
    assert int(model["counts"].sum()) == 3 * 200
    assert len(history) == 3 * math.ceil(200 / 64)
    whole = fit(max_tokens=Shards(planted[0]).n_tokens)
    assert torch.equal(whole[0]["cluster_centers"], fit()[0]["cluster_centers"])


def test_order_is_the_file_that_every_pass_follows(planted, statistics, fit, tmp_path):
    order = np.random.default_rng(0).permutation(Shards(planted[0]).n_tokens)[:300]
    np.save(tmp_path / "order.npy", order)
    tokens = (read_content(planted[0], 5)[order] - statistics["mean"].numpy()) / statistics[
        "std"
    ].numpy()
    wanted = MiniBatchKMeans(
        8,
        seed=0,
        init_size=100,
        max_iter=3,
        max_no_improvement=None,
        reassignment_ratio=0.0,
        decay=0.5,
    )
    wanted.fit(lambda _: torch.from_numpy(tokens.astype(np.float32)).split(64))
    model, history = fit(order=str(tmp_path / "order.npy"))
    assert len(history) == 3 * math.ceil(300 / 64)
    torch.testing.assert_close(
        model["cluster_centers"], wanted.cluster_centers_, rtol=1e-5, atol=1e-5
    )
    with pytest.raises(FileNotFoundError, match=r"missing\.npy is missing"):
        fit(order="missing.npy")


def test_layers_are_fitted_apart(fit):
    assert not torch.equal(fit(layer=3)[0]["cluster_centers"], fit(layer=5)[0]["cluster_centers"])


@pytest.mark.parametrize("name", CHANGES)
def test_every_parameter_changes_the_fit(fit, name):
    (model, history), (other, steps) = fit(), fit(**{name: CHANGES[name]})
    if name == "n_clusters":
        assert (len(model["counts"]), len(other["counts"])) == (8, 9)
    elif name in ("tol", "max_no_improvement"):
        assert 0 < len(steps) < len(history)
        assert steps == history[: len(steps)]
    elif name == "max_iter":
        assert (len(history), len(steps)) == (N_STEPS, N_STEPS * 4 // 3)
        assert steps[: len(history)] == history
    elif name == "max_tokens":
        assert len(steps) == 3 * math.ceil(400 / 64)
    elif name == "batch_size":
        assert (len(history), len(steps)) == (N_STEPS, 3 * math.ceil(48 * TOKENS / 63))
    else:
        assert len(steps) == len(history)
        assert not torch.equal(model["cluster_centers"], other["cluster_centers"])


def test_encodings_is_the_parameter_that_says_which_codes_are_made():
    shards = dict.fromkeys(("fit", "val", "probe_train", "probe_val"), "somewhere")
    for encodings in (["kmeans-onehot"], ["kmeans-invdist"], ["kmeans-invdist", "kmeans-onehot"]):
        plan = make_plan(
            parse_parameters({"layers": [5], "shards": shards, "kmeans": {"encodings": encodings}})
        )
        assert [row.name for row in plan.encodings if row.model.method == "kmeans"] == encodings
    # Also in test_encode.py and test_fitting.py.
    elsewhere = {
        "encodings",
        "order",
        "sparsity",
        "checkpoint_steps",
        "checkpoint_minutes",
        "more_seeds",
    }
    assert set(KMeansParameters.model_fields) == {*CHANGES, *elsewhere}


@pytest.mark.parametrize("batch_size", [1_000, 7])
@pytest.mark.parametrize("layer", LAYERS)
def test_nmse_is_that_of_the_nearest_center_in_float64(planted, statistics, fit, layer, batch_size):
    model, _ = fit(layer=layer)
    parameters = KMeansParameters(**SMALL | {"batch_size": batch_size})
    found = measure(
        Shards(planted[1]),
        statistics,
        model,
        "cpu",
        parameters,
        layer=layer,
        name="kmeans",
        kind=Form("onehot"),
    )
    std = statistics["std"].numpy()
    standardized = (read_content(planted[1], layer) - statistics["mean"].numpy()) / std
    centers = model["cluster_centers"].double().numpy()
    residual = np.empty_like(standardized)
    for row, token in enumerate(standardized):
        residual[row] = token - centers[((token - centers) ** 2).sum(axis=1).argmin()]
    (row,) = found.pop("rows")
    assert found == {"layer": layer, "method": "kmeans", "n_tokens": 24 * TOKENS}
    assert row["k"] == 8
    assert row["nmse"] == pytest.approx((residual**2).sum() / (standardized**2).sum(), rel=1e-6)
    raw = ((residual * std) ** 2).sum() / ((standardized * std) ** 2).sum()
    assert row["nmse_raw"] == pytest.approx(raw, rel=1e-6)


def test_measuring_changes_nothing_it_is_given(planted, statistics, fit):
    model, _ = fit()
    before = {name: value.clone() for name, value in (model | statistics).items()}
    measured: dict[str, Any] = {"layer": 5, "name": "kmeans", "kind": Form("onehot")}
    measure(Shards(planted[1]), statistics, model, "cpu", KMeansParameters(**SMALL), **measured)
    assert all(torch.equal(value, before[name]) for name, value in (model | statistics).items())


def test_more_seeds_are_fits_of_their_own_that_the_first_is_compared_with(
    planted, statistics, fit, tmp_path
):
    parameters = KMeansParameters(**SMALL, seed=3, more_seeds=(4, 9))
    shards, checkpoints = Shards(planted[0]), Checkpoints(tmp_path / "again")
    again, _ = fit_kmeans(shards, statistics, parameters, checkpoints, "cpu", layer=5, seed=4)
    first = fit(seed=3)[0]
    assert torch.equal(again["cluster_centers"], fit(seed=4)[0]["cluster_centers"])
    assert not torch.equal(again["cluster_centers"], first["cluster_centers"])
    found = compare_seeds(
        Shards(planted[1]), statistics, first, again, parameters, "cpu", layer=5, seed=4
    )
    tokens = torch.from_numpy(
        (read_content(planted[1], 5) - statistics["mean"].numpy()) / statistics["std"].numpy()
    ).float()
    models = [MiniBatchKMeans.from_state(state) for state in (first, again)]
    inertia = [float(model.assign(tokens)[1].mean()) for model in models]
    assert found["inertia_first"] == pytest.approx(inertia[0], rel=1e-6)
    assert found["inertia"] == pytest.approx(inertia[1], rel=1e-6)
    labels = [model.predict(tokens) for model in models]
    assert found["adjusted_rand_index"] == pytest.approx(adjusted_rand_score(*labels), abs=1e-9)
    assert (found["layer"], found["seed"]) == (5, 4)
    same = compare_seeds(
        Shards(planted[1]), statistics, first, first, parameters, "cpu", layer=5, seed=4
    )
    assert same["adjusted_rand_index"] == 1
    assert {node.name for node in create_pipeline(5, [Model("kmeans", 3)]).nodes} == {
        "kmeans.fit",
        "kmeans.measure",
    }
    thrice = {
        node.name: node
        for node in create_pipeline(5, [Model("kmeans", 3), Model("a", 4), Model("b", 9)]).nodes
    }
    verbs = {"a.fit", "a.measure", "a.compare", "b.fit", "b.measure", "b.compare"}
    assert set(thrice) == {"kmeans.fit", "kmeans.measure", *verbs}
    fit = thrice["b.fit"].func
    assert isinstance(fit, partial)
    assert fit.keywords == {"layer": 5, "seed": 9, "method": "b"}
    assert thrice["b.compare"].inputs[2:4] == ["kmeans_model", "b_model"]
    for more in ((3,), (4, 4)):
        with pytest.raises(ValueError, match=r"more_seeds \[\d.*\], want none twice"):
            KMeansParameters(**SMALL, seed=3, more_seeds=more)


def test_more_clusters_than_tokens_are_refused(fit):
    with pytest.raises(
        ValueError, match="found 768 tokens to seed from, wanted at least n_clusters = 1000"
    ):
        fit(n_clusters=1000, init_size=None)

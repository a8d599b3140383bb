"""The PCA nodes against a singular value decomposition and an explicit reconstruction in float64."""

from functools import partial

import numpy as np
import pytest
import torch

from assay.encodings import Form
from assay.io.checkpoints import Checkpoints
from assay.io.shards import Shards
from assay.numerics.pca import StreamingPCA
from assay.parameters import PCAParameters, parse_parameters
from assay.pipelines import one_pass
from assay.pipelines.dictionary_nodes import measure
from assay.pipelines.pca import nodes
from assay.pipelines.pca.nodes import fit_pca
from assay.pipelines.pca.pipeline import create_pipeline
from assay.pipelines.stream import SAMPLE
from assay.plan import make_plan
from shards import read_content

LAYERS, TOKENS, D_MODEL = (3, 5), 16, 80
KS = (1, 4, 16, 80)


def measure_pca(shards, statistics, model, parameters, layer, ks, whiten=None):
    return measure(
        shards,
        statistics,
        model,
        "cpu",
        parameters,
        layer=layer,
        name="pca",
        kind=Form("dense", whiten=whiten),
        ks=ks,
    )


@pytest.fixture(params=LAYERS)
def layer(request):
    return request.param


@pytest.fixture
def statistics(planted, layer):
    """Not the train tokens' own, as the user's may not be: their standardized mean is not 0."""
    tokens = read_content(planted[0], layer)
    return {
        "mean": torch.from_numpy(tokens.mean(axis=0) + 0.3),
        "std": torch.from_numpy(tokens.std(axis=0) * 1.1),
    }


@pytest.fixture
def standardized(planted, layer, statistics):
    """The fit and the validation tokens, float64."""
    return [
        (read_content(path, layer) - statistics["mean"].numpy()) / statistics["std"].numpy()
        for path in planted
    ]


@pytest.mark.parametrize("batch_size", [100_000, 100])
def test_components_are_the_right_singular_vectors_of_the_centered_tokens(
    planted, layer, statistics, standardized, batch_size, tmp_path
):
    model, _ = fit_pca(
        Shards(planted[0]),
        statistics,
        PCAParameters(batch_size=batch_size),
        Checkpoints(tmp_path),
        "cpu",
        layer=layer,
    )
    train, _ = standardized
    np.testing.assert_allclose(model["mean"].numpy(), train.mean(axis=0), atol=1e-7)
    _, singular, components = np.linalg.svd(train - train.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(
        model["explained_variance"].numpy(), singular**2 / (len(train) - 1), rtol=1e-5
    )
    found = model["components"].numpy()
    assert found.shape == (D_MODEL, D_MODEL)
    assert all(value.dtype == torch.float64 for name, value in model.items() if name != "whiten")
    np.testing.assert_allclose(found @ found.T, np.eye(D_MODEL), atol=1e-12)
    assert (np.take_along_axis(found, np.abs(found).argmax(axis=1)[:, None], axis=1) > 0).all()
    np.testing.assert_allclose(np.abs((found[:5] * components[:5]).sum(axis=1)), 1, atol=1e-6)


@pytest.mark.parametrize("whiten", [None, True], ids=str)
def test_nmse_at_every_k_is_that_of_an_explicit_reconstruction(
    planted, layer, statistics, standardized, tmp_path, whiten
):
    model, _ = fit_pca(
        Shards(planted[0]), statistics, PCAParameters(), Checkpoints(tmp_path), "cpu", layer=layer
    )
    found = measure_pca(
        Shards(planted[1]), statistics, model, PCAParameters(batch_size=50), layer, KS, whiten
    )
    rows = found.pop("rows")
    assert found == {"layer": layer, "method": "pca", "n_tokens": 24 * TOKENS}
    assert [row["k"] for row in rows] == list(KS)
    _, val = standardized
    mean, components, std = (
        value.numpy() for value in (model["mean"], model["components"], statistics["std"])
    )
    sigma = np.sqrt(model["explained_variance"].numpy()) if whiten else np.ones(D_MODEL)
    for k, row in zip(KS, rows, strict=True):
        residual = np.empty_like(val)
        for i, token in enumerate(val):
            z = components @ (token - mean)
            kept = np.argsort(-np.abs(z / sigma), kind="stable")[:k]
            residual[i] = token - mean - z[kept] @ components[kept]
        assert row["nmse"] == pytest.approx(
            (residual**2).sum() / (val**2).sum(), rel=1e-6, abs=1e-12
        )
        raw = ((residual * std) ** 2).sum() / ((val * std) ** 2).sum()
        assert row["nmse_raw"] == pytest.approx(raw, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("layer", [3], indirect=True)
def test_batch_size_is_the_tokens_read_at_once(planted, layer, statistics, monkeypatch, tmp_path):
    seen, batches = [], Shards.batches
    monkeypatch.setattr(
        Shards, "batches", lambda *a, **k: (seen.append(k["batch_size"]), batches(*a, **k))[1]
    )
    for batch_size in (70, 640):
        parameters = PCAParameters(batch_size=batch_size)
        model, _ = fit_pca(
            Shards(planted[0]), statistics, parameters, Checkpoints(tmp_path), "cpu", layer=layer
        )
        measure_pca(Shards(planted[1]), statistics, model, parameters, layer, (1,))
    assert seen == [70, SAMPLE, 70, 640, SAMPLE, 640]  # a sample is looked at first


@pytest.mark.parametrize("layer", [5], indirect=True)
@pytest.mark.parametrize(
    ("batch_size", "steps"), [(30, [1, 2, 4, 8, 16, 26]), (48, [1, 2, 4, 8, 16]), (768, [1])]
)
def test_the_record_says_how_the_leading_subspace_settled(
    planted, layer, statistics, standardized, batch_size, steps, tmp_path
):
    """At powers of 2 and at the last step, of 20 components, a quarter of the dimensions."""
    parameters = PCAParameters(batch_size=batch_size)
    _, history = fit_pca(
        Shards(planted[0]), statistics, parameters, Checkpoints(tmp_path), "cpu", layer=layer
    )
    assert [look["step"] for look in history] == steps
    before = None
    for look in history:
        train = standardized[0][: int(look["step"]) * batch_size]
        centered = train - train.mean(axis=0)
        _, singular, components = np.linalg.svd(centered, full_matrices=False)
        left = 1 - (singular[:20] ** 2).sum() / (singular**2).sum()
        assert look["reconstruction_error"] == pytest.approx(left, rel=1e-4)
        assert ("subspace_drift" in look) == (before is not None)
        if before is not None:
            drift = 1 - ((components[:20] @ before.T) ** 2).sum() / 20
            assert look["subspace_drift"] == pytest.approx(drift, rel=1e-4)
        before = components[:20]


@pytest.mark.parametrize("layer", [3], indirect=True)
def test_the_fit_lives_on_the_device_that_is_asked_for_also_when_it_is_gone_on_with(
    planted, layer, statistics, monkeypatch, tmp_path
):
    made = []
    monkeypatch.setattr(
        nodes, "StreamingPCA", lambda **options: (made.append(options), StreamingPCA(**options))[1]
    )
    for module in (nodes, one_pass):
        monkeypatch.setattr(module, "pick_device", {"the GPU": torch.device("cpu")}.__getitem__)
    fit_pca(
        Shards(planted[0]),
        statistics,
        PCAParameters(),
        Checkpoints(tmp_path),
        "the GPU",
        layer=layer,
    )
    assert made == [{"device": torch.device("cpu")}]


def test_max_tokens_is_a_random_sample(planted, layer, statistics, tmp_path):
    shards = Shards(planted[0])
    model, _ = fit_pca(
        shards,
        statistics,
        PCAParameters(batch_size=50, max_tokens=120),
        Checkpoints(tmp_path),
        "cpu",
        layer=layer,
    )
    sample = torch.cat(
        list(shards.batches(layer=layer, batch_size=50, shuffle=True, max_tokens=120))
    ).double()
    assert len(sample) == 120
    wanted = ((sample - statistics["mean"]) / statistics["std"]).mean(dim=0)
    torch.testing.assert_close(model["mean"], wanted, rtol=0, atol=1e-5)


def test_topk_is_the_parameter_that_says_which_k_are_measured():
    shards = dict.fromkeys(("fit", "val", "probe_train", "probe_val"), "somewhere")
    for topk in ((1, 4), (2, 3, 80)):
        plan = make_plan(
            parse_parameters({"layers": [5], "shards": shards, "pca": {"topk": topk}}), D_MODEL
        )
        assert tuple(row.k for row in plan.encodings if row.model.method == "pca") == topk
        (measure,) = create_pipeline(5, ks=topk, form=Form("dense")).only_nodes("pca.measure").nodes
        assert isinstance(measure.func, partial)
        assert measure.func.keywords["ks"] == topk
    # That is all of them.
    assert set(PCAParameters.model_fields) == {
        "topk",
        "whiten",
        "batch_size",
        "max_tokens",
        "parts",
        "checkpoint_steps",
        "checkpoint_minutes",
    }


@pytest.mark.parametrize("layer", [3], indirect=True)
def test_a_k_above_the_width_is_refused(planted, layer, statistics, tmp_path):
    model, _ = fit_pca(
        Shards(planted[0]), statistics, PCAParameters(), Checkpoints(tmp_path), "cpu", layer=layer
    )
    with pytest.raises(ValueError, match="found K = 81, wanted 1 to 80"):
        measure_pca(Shards(planted[1]), statistics, model, PCAParameters(), layer, (81,))

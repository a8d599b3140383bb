"""Other dictionaries: their errors and codes against an autoencoder called by hand, and random ones
against what they are.
"""

import json
from typing import Literal

import numpy as np
import pytest
import torch

from assay.architecture import Architecture
from assay.io.codes import StoredCodes, write_codes
from assay.io.saes import StoredSae
from assay.io.shards import Shards
from assay.numerics.codes import densify, measure_l0
from assay.numerics.dictionary import open_dictionary
from assay.numerics.probe import LogisticProbe1d
from assay.numerics.sae import SparseAutoencoder
from assay.parameters import DictionaryParameters, KMeansParameters
from assay.pipelines.dictionaries.nodes import (
    adopt_saev_metrics,
    draw_centers,
    draw_directions,
)
from assay.pipelines.dictionary_nodes import encode, measure
from assay.sae import open_sae

D_MODEL, N = 80, 120


@pytest.fixture(scope="module")
def tokens(planted):
    """Layer 5 of both sets, float64."""
    return [
        torch.cat(list(Shards(path).batches(layer=5, batch_size=100))).double() for path in planted
    ]


@pytest.fixture(scope="module")
def statistics(tokens):
    return {"mean": tokens[0].mean(0), "std": tokens[0].std(0, unbiased=False)}


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(N, D_MODEL, generator=generator))
    return {
        "W_enc": directions.T.contiguous(),
        "W_dec": directions,
        "b_enc": torch.full((N,), -0.3),
        "b_out": torch.randn(D_MODEL, generator=generator) * 0.1,
    }


def make_stored(weights, kind):
    """An autoencoder of a kind, as it would be read."""
    architectures = {
        "relu": Architecture("relu"),
        "topk": Architecture("topk", 5),
        "signed": Architecture("topk", 5, signed=True),
        "abstopk": Architecture("abstopk", 5),
        "jumprelu": Architecture("jumprelu"),
    }
    tensors = weights | {"center": weights["b_out"]}
    if kind == "jumprelu":
        tensors["threshold"] = torch.full((N,), 0.5)
    return StoredSae("saev", architectures[kind], tensors)


KINDS: tuple[tuple[str, Literal["standardized", "raw"]], ...] = (
    ("relu", "standardized"),
    ("topk", "standardized"),
    ("signed", "raw"),
    ("jumprelu", "raw"),
)


@pytest.mark.parametrize(("kind", "trained_on"), KINDS)
def test_an_autoencoders_errors_and_codes_are_those_of_its_definition(
    planted, tokens, statistics, weights, kind, trained_on
):
    stored = make_stored(weights, kind)
    std = statistics["std"]
    sae = open_sae(stored, **(statistics if trained_on == "raw" else {}))
    k = stored.architecture.k
    x = ((tokens[1] - statistics["mean"]) / std).float()
    left = sae.residual(x).double()
    shards = Shards(planted[1])
    errors = measure(
        shards, statistics, stored, "cpu", layer=5, name="mine", kind=trained_on, batch_size=500
    )
    (row,) = errors["rows"]
    assert (errors["layer"], errors["method"], errors["n_tokens"], row["k"]) == (
        5,
        "mine",
        len(x),
        k or N,
    )
    assert row["nmse"] == pytest.approx(
        float(left.square().sum() / x.double().square().sum()), rel=1e-4
    )
    wanted = (left * std).square().sum() / (x.double() * std).square().sum()
    assert row["nmse_raw"] == pytest.approx(float(wanted), rel=1e-4)

    codes = encode(shards, statistics, stored, "cpu", layer=5, name="mine", kind=trained_on)
    assert (codes.format, codes.n_rows, codes.n_features, codes.k) == (
        "sparse",
        len(x),
        N,
        k,
    )
    found = torch.cat([densify(batch, "sparse", N) for batch in codes.batches(100, 7)])
    np.testing.assert_allclose(found, densify(sae.encode(x[7:]), "sparse", N), rtol=1e-4, atol=1e-4)
    assert codes.provenance["encoding"] == "mine"
    said = json.loads(str(codes.provenance["parameters"]))
    assert said == {"library": "saev", "formula": stored.formula, "trained_on": trained_on}
    assert codes.provenance["model"] == stored.fingerprint()


@pytest.mark.parametrize("kind", ["abstopk", "relu"])
def test_stored_codes_have_the_error_that_they_say_and_negative_ones_count(
    planted, tokens, statistics, weights, tmp_path, kind
):
    stored, shards = make_stored(weights, kind), Shards(planted[1])
    codes = encode(shards, statistics, stored, "cpu", layer=5, name="mine", kind="standardized")
    write_codes(tmp_path / "codes", codes, batch_size=100)
    read = StoredCodes(tmp_path / "codes")
    batches = list(read.batches(100))
    dense = torch.cat([densify(batch, "sparse", N) for batch in batches]).double()
    x = ((tokens[1] - statistics["mean"]) / statistics["std"]).float().double()
    left = x - dense @ weights["W_dec"].double() - weights["b_out"].double()
    error = torch.cat([batch["error"] for batch in batches])
    torch.testing.assert_close(error, left.square().sum(1), rtol=1e-6, atol=0)
    assert bool((dense < 0).any()) == (kind == "abstopk")
    assert measure_l0(read) == float((dense != 0).sum()) / len(x)
    if kind == "abstopk":
        assert measure_l0(read) == 5


def test_an_autoencoder_that_is_never_active_is_encoded_and_probed(
    planted, tokens, statistics, weights, tmp_path
):
    weights = weights | {"b_enc": torch.full((N,), -1e4)}
    stored, shards = make_stored(weights, "relu"), Shards(planted[1])
    errors = measure(
        shards, statistics, stored, "cpu", layer=5, name="mine", kind="raw", batch_size=100
    )
    assert errors["rows"][0]["nmse"] > 0
    codes = encode(shards, statistics, stored, "cpu", layer=5, name="mine", kind="raw")
    write_codes(tmp_path / "codes", codes, batch_size=100)
    read = StoredCodes(tmp_path / "codes")
    assert measure_l0(read) == 0
    labels = torch.arange(len(tokens[1])) % 2
    for each in (read, codes):
        probe = LogisticProbe1d().fit(each, labels, 2)
        assert not probe.coef_.any()
        assert float(probe.judge(each, labels).loss.max()) == pytest.approx(np.log(2), rel=1e-4)


def test_the_batch_size_is_that_of_the_measurement(planted, statistics, weights, monkeypatch):
    seen = []
    errors = SparseAutoencoder.errors
    monkeypatch.setattr(
        SparseAutoencoder,
        "errors",
        lambda self, x, std: (seen.append(len(x)), errors(self, x, std))[1],
    )
    measure(
        Shards(planted[1]),
        statistics,
        make_stored(weights, "relu"),
        "cpu",
        layer=5,
        name="mine",
        kind="standardized",
        batch_size=100,
    )
    assert seen == [100, 100, 100, 84]


def test_random_centers_are_tokens_drawn_by_the_seed(planted, tokens, statistics):
    parameters = KMeansParameters(n_clusters=9)
    drawn = [
        draw_centers(Shards(planted[0]), statistics, parameters, "cpu", layer=5, seed=seed)[
            "cluster_centers"
        ]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    x = ((tokens[0] - statistics["mean"]) / statistics["std"]).float()
    nearest = torch.cdist(drawn[0].double(), x.double()).min(1)
    assert (nearest.values < 1e-4).all()
    assert len(set(nearest.indices.tolist())) == 9
    assert int(nearest.indices.max() - nearest.indices.min()) > 100  # from all over
    state = draw_centers(Shards(planted[0]), statistics, parameters, "cpu", layer=5, seed=0)
    assert open_dictionary("kmeans-invdist", state).n_features == 9


def test_random_directions_are_an_orthonormal_basis_drawn_by_the_seed(planted):
    drawn = [draw_directions(Shards(planted[0]), layer=5, seed=seed) for seed in (0, 0, 1)]
    components = drawn[0]["components"]
    torch.testing.assert_close(
        components @ components.T, torch.eye(D_MODEL, dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert torch.equal(components, drawn[1]["components"])
    assert not torch.equal(components, drawn[2]["components"])
    assert open_dictionary("pca-topk-00004", drawn[0]).n_features == D_MODEL


class Codes:
    n_features = 7


@pytest.fixture
def shifted(statistics):
    """A train mean from which the validation tokens' own is far, as it is where the splits differ."""
    return statistics | {"mean": statistics["mean"] + statistics["std"] / 3}


def adopt(metrics, planted, statistics):
    dictionary = DictionaryParameters(saev_run="runs/abc", batch_size=100)
    return adopt_saev_metrics(
        metrics,
        Codes(),
        Shards(planted[1]),
        statistics,
        "cpu",
        layer=5,
        name="theirs",
        dictionary=dictionary,
    )


@pytest.mark.parametrize("names", [("sse_recon", "sse_baseline"), ("normalized_mse",)])
def test_what_saev_measured_is_divided_by_the_train_mean_as_every_other_row(
    planted, tokens, shifted, weights, names
):
    """saev's own ratio is about the mean of the tokens that it judges. The same autoencoder by its
    weights gives the same row.
    """
    stored = make_stored(weights, "relu")
    measured = measure(
        Shards(planted[1]),
        shifted,
        stored,
        "cpu",
        layer=5,
        name="mine",
        kind="raw",
        batch_size=500,
    )
    (mine,) = measured["rows"]
    sae = open_sae(stored, mean=shifted["mean"], std=shifted["std"])
    x = tokens[1]
    left = sae.residual(((x - shifted["mean"]) / shifted["std"]).float()).double() * shifted["std"]
    metrics = {
        "sse_recon": float(left.square().sum()),
        "sse_baseline": float((x - x.mean(0)).square().sum()),
    }
    metrics["normalized_mse"] = metrics["sse_recon"] / metrics["sse_baseline"]
    found = adopt({name: metrics[name] for name in names}, planted, shifted)
    (row,) = found["rows"]
    assert (found["layer"], found["method"], found["n_tokens"], row["k"], row["nmse"]) == (
        5,
        "theirs",
        len(x),
        7,
        None,
    )
    assert row["nmse_raw"] == pytest.approx(mine["nmse_raw"], rel=1e-5)
    about_train = float((x - shifted["mean"]).square().sum())
    assert row["nmse_raw"] == pytest.approx(metrics["sse_recon"] / about_train, rel=1e-6)
    assert row["nmse_raw"] < 0.95 * metrics["normalized_mse"]


def test_metrics_of_other_activations_are_refused(planted, tokens, shifted):
    """Of another layer, of scaled activations, of some of the tokens: saev's sum about the mean is
    not that of these tokens.
    """
    baseline = float((tokens[1] - tokens[1].mean(0)).square().sum())
    assert adopt({"sse_recon": 1.0, "sse_baseline": baseline * 1.005}, planted, shifted)
    with pytest.raises(
        ValueError,
        match=(
            r"dictionaries.theirs: metrics.json of runs/abc says sse_baseline .* layer 5 of .* has"
        ),
    ):
        adopt({"sse_recon": 1.0, "sse_baseline": baseline * 0.98}, planted, shifted)

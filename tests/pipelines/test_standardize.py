"""Statistics fitted on the tokens, or the user's own after a look at whether they can belong to
them.
"""

import numpy as np
import pytest
import torch

from assay.io.checkpoints import Checkpoints
from assay.io.shards import Shards
from assay.parameters import StandardizeParameters
from assay.pipelines.standardize.nodes import adopt_statistics, fit_statistics
from assay.pipelines.standardize.pipeline import create_pipeline
from shards import make_shards, read_content

LAYERS, TOKENS, D_MODEL = (3, 5), 16, 80


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints")


@pytest.fixture
def batch_sizes(monkeypatch):
    """The batch sizes that shards are read with."""
    seen, batches = [], Shards.batches
    monkeypatch.setattr(
        Shards, "batches", lambda *a, **k: (seen.append(k["batch_size"]), batches(*a, **k))[1]
    )
    return seen


@pytest.fixture
def own(planted):
    """Statistics of the user's own, as some other tool wrote them: float32, and more than is asked
    for.
    """
    tokens = read_content(planted[0], 3)
    named = {"mean": tokens.mean(axis=0) + 0.01, "std": tokens.std(axis=0) * 1.1, "n": np.ones(1)}
    return {name: torch.from_numpy(value).float() for name, value in named.items()}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("batch_size", [100_000, 100, 1])
def test_fitted_statistics_are_those_of_all_tokens_in_float64(
    planted, checkpoints, layer, batch_size
):
    tokens = read_content(planted[0], layer)
    parameters = StandardizeParameters(batch_size=batch_size)
    found = fit_statistics(Shards(planted[0]), parameters, checkpoints, "cpu", layer=layer)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in found.items()} == {
        "mean": (torch.float64, (D_MODEL,)),
        "std": (torch.float64, (D_MODEL,)),
        "count": (torch.int64, ()),
    }
    assert found["count"] == len(tokens) == 48 * TOKENS
    np.testing.assert_allclose(found["mean"].numpy(), tokens.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found["std"].numpy(), tokens.std(axis=0), rtol=1e-11)


def test_batch_size_is_the_tokens_read_at_once(planted, checkpoints, own, batch_sizes):
    for batch_size in (7, 64):
        parameters = StandardizeParameters(batch_size=batch_size)
        fit_statistics(Shards(planted[0]), parameters, checkpoints, "cpu", layer=3)
        adopt_statistics(Shards(planted[0]), own, parameters, layer=3)
    assert batch_sizes == [7, 7, 64, 64]


def test_statistics_is_the_parameter_that_puts_the_users_own_in_place():
    assert [node.name for node in create_pipeline(3, given_statistics=False).nodes] == [
        "standardize.fit"
    ]
    (adopt,) = create_pipeline(3, given_statistics=True).nodes
    assert adopt.name == "standardize.adopt"
    assert "given_statistics" in adopt.inputs
    # That is all of them.
    assert set(StandardizeParameters.model_fields) == {
        "statistics",
        "batch_size",
        "max_tokens",
        "parts",
        "checkpoint_steps",
        "checkpoint_minutes",
    }


def test_max_tokens_is_a_random_sample(planted, checkpoints):
    shards = Shards(planted[0])
    found = fit_statistics(
        shards, StandardizeParameters(max_tokens=100, batch_size=30), checkpoints, "cpu", layer=5
    )
    sample = torch.cat(
        list(shards.batches(layer=5, batch_size=50, shuffle=True, max_tokens=100))
    ).double()
    assert int(found["count"]) == len(sample) == 100
    torch.testing.assert_close(found["mean"], sample.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found["std"], sample.std(0, correction=0), rtol=1e-9, atol=0)
    first = torch.cat(list(shards.batches(layer=5, batch_size=100, max_tokens=100))).double()
    assert not torch.allclose(found["mean"], first.mean(0), rtol=1e-6, atol=0)


def test_dimensions_that_never_vary_are_counted(tmp_path, checkpoints, caplog):
    examples = np.random.default_rng(0).standard_normal((5, 1, 3, 4)).astype(np.float32)
    examples[:, :, 1:, 1:3] = 7.0  # the CLS token varies, and is no content
    shards = Shards(make_shards(tmp_path, examples, layers=[3], max_tokens_per_shard=6))
    found = fit_statistics(shards, StandardizeParameters(), checkpoints, "cpu", layer=3)
    assert (found["std"] == 0).tolist() == [False, True, True, False]
    assert (
        "layer 3: 2 of 4 dimensions never vary in 10 tokens; their standard deviation of 0 counts"
        " as 1" in caplog.text
    )


def test_adopted_statistics_are_the_users_in_float64_and_no_others(planted, own):
    before = {name: value.clone() for name, value in own.items()}
    found = adopt_statistics(Shards(planted[0]), own, StandardizeParameters(), layer=3)
    assert set(found) == {"mean", "std"}
    for name, value in found.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, before[name].double(), rtol=0, atol=0)
    assert all(torch.equal(own[name], before[name]) for name in own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std": None}, r"hold \['mean', 'n'\]; wanted `mean` and `std`.*: std is missing"),
        ({"mean": torch.zeros(79), "std": torch.ones(79)}, "80 dimensions, wanted 79"),
        ({"mean": torch.full((80,), 1e6)}, "are these statistics of the same layer, model"),
        ({"std": torch.full((80,), 1e3)}, "is it a variance, or of another layer"),
        ({"std": torch.full((80,), -1.0)}, "wanted none below 0"),
        ({"std": torch.full((80,), torch.nan)}, "not finite"),
    ],
)
def test_statistics_that_cannot_be_of_these_tokens_are_refused(planted, own, change, message):
    given = {name: value for name, value in (own | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        adopt_statistics(Shards(planted[0]), given, StandardizeParameters(), layer=3)


def test_statistics_of_another_layer_or_in_another_order_are_refused(planted, checkpoints, own):
    shards = Shards(planted[0])
    other = fit_statistics(shards, StandardizeParameters(), checkpoints, "cpu", layer=5)
    with pytest.raises(ValueError, match=r"a spread .* is it a variance, or of another layer"):
        adopt_statistics(shards, other, StandardizeParameters(), layer=3)
    adopt_statistics(shards, other, StandardizeParameters(), layer=5)
    shuffled = torch.randperm(D_MODEL, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"correlate by .* or in another order"):
        adopt_statistics(
            shards,
            {"mean": own["mean"], "std": own["std"][shuffled]},
            StandardizeParameters(),
            layer=3,
        )


def test_statistics_of_the_cls_token_are_refused(planted):
    # The planted CLS tokens are all 1000.
    given = {
        "mean": torch.full((80,), 1e3),
        "std": torch.ones(80),
    }
    with pytest.raises(ValueError, match="std from the mean given"):
        adopt_statistics(Shards(planted[0]), given, StandardizeParameters(), layer=5)

"""The one loop over tokens, and where tensors live."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from assay.io.shards import LayerActivations, Shards
from assay.pipelines import stream
from assay.pipelines.stream import bind, judged_tokens, pick_device, raw_tokens, standardized_tokens
from shards import make_shards, read_content

CPU = torch.device("cpu")
LAYERS, TOKENS, D_MODEL = (3, 5), 16, 80


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("batch_size", [1_000, 100, 7])
def test_raw_tokens_are_those_of_the_layer_in_order(planted, layer, batch_size):
    shards = Shards(planted[1])
    batches = list(raw_tokens(shards, layer, batch_size, CPU, doing="test"))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    np.testing.assert_array_equal(
        torch.cat(batches).double().numpy(), read_content(planted[1], layer)
    )


def test_standardized_tokens_are_moved_and_scaled_and_a_std_of_0_counts_as_1(planted):
    shards = Shards(planted[1])
    mean = torch.linspace(-1, 6, D_MODEL, dtype=torch.float64)
    std = torch.linspace(0, 2, D_MODEL, dtype=torch.float64)
    found = torch.cat(
        list(standardized_tokens(shards, 5, {"mean": mean, "std": std}, 50, CPU, doing="test"))
    )
    wanted = (read_content(planted[1], 5) - mean.numpy()) / np.where(
        std.numpy() == 0, 1, std.numpy()
    )
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)


def test_a_split_of_another_model_is_named_before_anything_is_made_of_it(planted, tmp_path):
    """Here the dimensions of the other model come in another order."""
    fit, val = map(Shards, planted)
    tokens = read_content(planted[0], 5)
    statistics = {"mean": torch.from_numpy(tokens.mean(0)), "std": torch.from_numpy(tokens.std(0))}
    options: dict[str, Any] = {
        "layer": 5,
        "statistics": statistics,
        "batch_size": 50,
        "device": CPU,
        "doing": "test",
        "start": 20,
    }
    for shards in (fit, val):
        found = torch.cat(list(judged_tokens(shards, **options)))
        assert torch.equal(found, torch.cat(list(standardized_tokens(shards, **options))))
    stored = torch.cat(list(fit.batches(layer=5, batch_size=1_000)))
    turned = stored.flip(1).reshape(48, 1, TOKENS, D_MODEL)
    changes = fit.metadata.model_dump() | {"layers": [5], "cls_token": False}
    other = Shards(make_shards(tmp_path, turned, **changes))
    refused = judged_tokens(other, **options)
    with pytest.raises(
        ValueError, match=r"layer 5, does not go with .*another order\? Name shards of one model"
    ) as caught:
        next(refused)
    assert str(other.path) in str(caught.value)


def test_a_shuffled_pass_holds_every_token_once_by_its_seed(planted):
    shards = Shards(planted[1])

    def one_pass(seed):
        return torch.cat(
            list(raw_tokens(shards, 3, 50, CPU, doing="test", shuffle=True, seed=seed))
        ).numpy()

    first, again, other = one_pass(1), one_pass(1), one_pass(2)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    tokens = read_content(planted[1], 3)
    for shuffled in (first, other):
        np.testing.assert_array_equal(
            shuffled[np.lexsort(shuffled.T)], tokens[np.lexsort(tokens.T)]
        )


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("start", [0, 1, 49, 50, 120, 383, 384])
def test_a_pass_can_start_at_any_token(planted, shuffle, start):
    shards = Shards(planted[1])
    whole = torch.cat(list(raw_tokens(shards, 5, 50, CPU, doing="test", shuffle=shuffle)))
    rest = list(raw_tokens(shards, 5, 50, CPU, doing="test", shuffle=shuffle, start=start))
    assert torch.equal(torch.cat([torch.empty(0, D_MODEL), *rest]), whole[start:])
    assert start % 50 or {len(batch) for batch in rest[:-1]} <= {50}


def test_statistics_of_another_width_are_refused(planted):
    statistics = {"mean": torch.zeros(79), "std": torch.ones(79)}
    with pytest.raises(
        ValueError, match=r"the statistics have 79 dimensions, .* has 80: fit them again"
    ):
        next(standardized_tokens(Shards(planted[0]), 3, statistics, 50, CPU, doing="test"))


def test_auto_is_cuda_where_there_is_one(monkeypatch):
    assert pick_device("cpu") == CPU
    for available, name in [(True, "cuda"), (False, "cpu")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=available: found)
        assert pick_device("auto") == torch.device(name)
    with pytest.raises(ValueError, match="device is cuda, but torch sees no GPU: use device=cpu"):
        pick_device("cuda")


@pytest.mark.parametrize(
    ("device", "passes", "max_tokens", "free", "holds"),
    [
        ("cuda", 3, None, 1.0, True),
        ("cpu", 3, None, 1.0, False),
        ("cuda", 1, None, 1.0, False),
        ("cuda", 3, 200, 1.0, False),  # less is read than there is
        ("cuda", 5, 200, 1.0, True),
        ("cuda", 3, None, 0.99, False),
    ],
)
def test_a_layer_is_held_on_a_gpu_that_has_room_where_it_is_read_several_times(
    planted, monkeypatch, device, passes, max_tokens, free, holds
):
    shards = Shards(planted[0])
    need = 2 * 4 * shards.n_tokens * shards.d_model
    monkeypatch.setattr(stream, "free_bytes", lambda _: int(free * need))
    monkeypatch.setattr(
        LayerActivations,
        "hold",
        lambda layer, batches, place: (layer.layer, len([*batches]), place),
    )
    monkeypatch.setattr(stream, "raw_tokens", lambda *given, **_: iter([given[1:]] * 7))
    place = torch.device(device)
    found = stream.hold_layer(shards, 3, 64, place, passes=passes, max_tokens=max_tokens)
    assert found == ((3, 7, place) if holds else None)


def test_a_bound_function_keeps_its_name_and_types():
    def measure(x: int, *, k: int) -> int:
        return x * k

    bound = bind(measure, k=3)
    assert bound(2) == 6
    assert bound.__name__ == "measure"
    assert inspect.signature(bound).parameters["x"].annotation is int

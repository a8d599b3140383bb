"""Streaming moments against numpy in float64, standardization, and the check of given statistics."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.numerics.fitted import NotFittedError
from assay.numerics.moments import StreamingMoments, standardize, unstandardize
from assay.numerics.plausibility import check_statistics


def in_batches(x, cuts):
    return torch.tensor_split(x, sorted(cuts))


def tokens(seed, n, d, offset=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float32) * scale + offset


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 60),
    d=st.integers(1, 5),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    offset=st.sampled_from([0.0, -3.0, 1e6]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_any_batching_gives_numpys_moments(seed, n, d, cuts, offset, scale):
    x = tokens(seed, n, d, offset, scale)
    moments = StreamingMoments()
    for batch in in_batches(x, cuts):
        assert moments.partial_fit(batch) is moments
    exact = x.numpy().astype(np.float64)
    assert moments.count_ == n
    assert moments.mean_.dtype == moments.std_.dtype == torch.float64
    np.testing.assert_allclose(moments.mean_, exact.mean(0), rtol=1e-13, atol=1e-13 * scale)
    np.testing.assert_allclose(moments.std_, exact.std(0), rtol=1e-9, atol=1e-12 * scale)


def test_a_large_offset_costs_no_digits():
    x = tokens(0, 5000, 3, offset=1e6)
    moments = StreamingMoments()
    for batch in x.split(7):
        moments.partial_fit(batch)
    np.testing.assert_allclose(moments.std_, x.double().numpy().std(0), rtol=1e-11)


@pytest.mark.parametrize("value", [0.1, -7.3, 1 / 3, 1e300, 1e-300, 0.0, -0.0])
@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_a_constant_dimension_has_no_spread_in_any_batching(value, batch):
    x = tokens(0, 1000, 2).double()
    x[:, 1] = value
    moments = StreamingMoments()
    for part in x.split(batch):
        moments.partial_fit(part)
    assert moments.mean_[1] == value
    assert moments.std_[1] == 0
    assert moments.std_[0] > 0.5
    assert torch.equal(
        standardize(x, moments.mean_, moments.std_)[:, 1], torch.zeros(1000, dtype=torch.float32)
    )


def test_a_hairs_breadth_is_a_spread():
    x = torch.tensor([1.0, 1.0, 1.0 + 2**-50], dtype=torch.float64)[:, None]
    assert StreamingMoments().partial_fit(x).std_[0] > 0


def test_nothing_seen_is_an_error_and_empty_batches_change_nothing():
    moments = StreamingMoments().partial_fit(torch.empty(0, 4, dtype=torch.float32))
    assert moments.count_ == 0
    for attribute in ("mean_", "std_"):
        with pytest.raises(ValueError, match="found 0 tokens"):
            getattr(moments, attribute)
    x = tokens(0, 5, 4)
    before = moments.partial_fit(x).std_
    assert torch.equal(moments.partial_fit(torch.empty(0, 4, dtype=torch.float32)).std_, before)


@pytest.mark.parametrize("shape", [(3, 5), (4,), (2, 2, 4), (3, 0), (0, 5)])
def test_batches_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="found a batch"):
        StreamingMoments().partial_fit(tokens(0, 3, 4)).partial_fit(
            torch.zeros(shape, dtype=torch.float32)
        )


def test_a_restored_state_goes_on_where_it_stopped():
    x = tokens(1, 40, 3, offset=5.0)
    state = StreamingMoments().partial_fit(x[:15]).state_dict()
    assert {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == {
        "mean": (torch.float64, (3,)),
        "std": (torch.float64, (3,)),
        "count": (torch.int64, ()),
    }
    restored = StreamingMoments.from_state(state).partial_fit(x[15:])
    assert restored.count_ == 40
    np.testing.assert_allclose(restored.std_, x.double().numpy().std(0), rtol=1e-12)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), cut=st.integers(1, 39))
def test_a_checkpoint_is_gone_on_from_to_the_bit(seed, cut):
    """Which a state is not: it has the square root of the second moment."""
    x = tokens(seed, 40, 3, offset=5.0)
    begun = StreamingMoments().partial_fit(x[:cut])
    left, state = begun.checkpoint()
    whole = begun.partial_fit(x[cut:]).state_dict()
    found = StreamingMoments().resume(left, json.loads(json.dumps(state))).partial_fit(x[cut:])
    assert all(torch.equal(whole[name], value) for name, value in found.state_dict().items())


def test_what_is_no_checkpoint_of_statistics_is_refused():
    left, _ = StreamingMoments().partial_fit(tokens(0, 4, 3)).checkpoint()
    for tensors, count in ((left, 0), (left | {"second": left["second"][:2]}, 4)):
        with pytest.raises(ValueError, match="is it a checkpoint of statistics"):
            StreamingMoments().resume(tensors, {"count": count})
    with pytest.raises(NotFittedError, match="found 0 tokens"):
        StreamingMoments().checkpoint()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), cut=st.integers(0, 40), offset=st.sampled_from([0.0, 1e6]))
def test_two_halves_merged_are_one_pass(seed, cut, offset):
    x = tokens(seed, 40, 3, offset=offset)
    one, other = (StreamingMoments().partial_fit(part) for part in (x[:cut], x[cut:]))
    before = other.count_ and other.state_dict()
    assert one.merge(other) is one
    assert one.count_ == 40
    np.testing.assert_allclose(one.mean_, x.double().numpy().mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(one.std_, x.double().numpy().std(0), rtol=1e-9)
    if before:
        one.partial_fit(x)
        assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_statistics_of_another_width_are_not_merged():
    with pytest.raises(ValueError, match="found a batch of 4 dimensions, wanted 3"):
        StreamingMoments().partial_fit(tokens(0, 9, 3)).merge(
            StreamingMoments().partial_fit(tokens(0, 9, 4))
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": torch.tensor(0)}, "over 0 tokens"),
        ({"std": torch.tensor([1.0, -2.0], dtype=torch.float32)}, "std of -2"),
        ({"mean": torch.tensor([1.0, torch.nan], dtype=torch.float32)}, "1 values of mean"),
        ({"mean": torch.zeros(3, dtype=torch.float32)}, r"mean \(3,\) and std \(2,\)"),
        (
            {"mean": torch.zeros(2, dtype=torch.bool)},
            "found a mean of torch.bool, wanted real numbers",
        ),
        (
            {"std": torch.ones(2, dtype=torch.complex64)},
            "found a std of torch.complex64, wanted real numbers",
        ),
    ],
)
def test_a_state_that_cannot_be_is_refused(change, message):
    state = {
        "mean": torch.zeros(2, dtype=torch.float32),
        "std": torch.ones(2, dtype=torch.float32),
        "count": torch.tensor(5),
    }
    with pytest.raises(ValueError, match=message):
        StreamingMoments.from_state(state | change)


def test_standardize_is_float64_inside_and_undone_by_unstandardize():
    x = tokens(2, 50, 3, offset=1e4)
    mean, std = (
        torch.tensor([1e4, 1e4 + 0.1, 0.0], dtype=torch.float64),
        torch.tensor([2.0, 0.0, 3.0], dtype=torch.float32),
    )
    z = standardize(x, mean, std)
    exact = (x.double().numpy() - mean.numpy()) / np.array([2.0, 1.0, 3.0])
    assert z.dtype == torch.float32
    np.testing.assert_array_equal(z, exact.astype(np.float32))
    back = unstandardize(z, mean, std)
    assert back.dtype == torch.float32
    np.testing.assert_allclose(back, x, rtol=1e-6)


def test_honest_statistics_pass_even_on_a_few_alike_tokens():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(200, 1, 64, generator=generator, dtype=torch.float32)
    x = (images + 0.7 * torch.randn(200, 16, 64, generator=generator, dtype=torch.float32)) * 3 + 10
    fitted = StreamingMoments().partial_fit(x.flatten(0, 1))
    for first in (1, 2, 5, 16, 64, 640):
        for image in range(0, 160, 8):
            check_statistics(x[image:].flatten(0, 1)[:first], fitted.mean_, fitted.std_)
    check_statistics(torch.empty(0, 64, dtype=torch.float32), fitted.mean_, fitted.std_)
    check_statistics(
        torch.full((8, 2), 3.0, dtype=torch.float32),
        torch.full((2,), 3.0, dtype=torch.float32),
        torch.zeros(2, dtype=torch.float32),
    )


def test_a_batch_of_few_tokens_is_given_more_room():
    check_statistics(
        torch.tensor([[4.0]], dtype=torch.float32),
        torch.zeros(1, dtype=torch.float32),
        torch.ones(1, dtype=torch.float32),
    )
    check_statistics(
        torch.full((31, 1), 0.5, dtype=torch.float32),
        torch.zeros(1, dtype=torch.float32),
        torch.ones(1, dtype=torch.float32),
    )
    with pytest.raises(ValueError, match="median of 4 std"):
        check_statistics(
            torch.full((4, 1), 4.0, dtype=torch.float32),
            torch.zeros(1, dtype=torch.float32),
            torch.ones(1, dtype=torch.float32),
        )
    with pytest.raises(ValueError, match="a spread"):
        check_statistics(
            torch.full((32, 1), 0.5, dtype=torch.float32),
            torch.zeros(1, dtype=torch.float32),
            torch.ones(1, dtype=torch.float32),
        )


def test_outlier_dimensions_decide_nothing():
    x = tokens(0, 100, 9)
    x[:, 0] += 1e5
    check_statistics(x, torch.zeros(9, dtype=torch.float32), torch.ones(9, dtype=torch.float32))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (
            torch.full((8,), 1.9, dtype=torch.float32),
            torch.ones(8, dtype=torch.float32),
            "median of .* std from the mean",
        ),
        (
            torch.zeros(8, dtype=torch.float32),
            torch.full((8,), 4.5, dtype=torch.float32),
            "a spread .* 0.2",
        ),
        (
            torch.zeros(8, dtype=torch.float32),
            torch.full((8,), 0.2, dtype=torch.float32),
            "a spread",
        ),
        (
            torch.zeros(8, dtype=torch.float32),
            torch.zeros(8, dtype=torch.float32),
            "found std 0 for 8 of 8",
        ),
        (torch.zeros(8, dtype=torch.float32), -torch.ones(8, dtype=torch.float32), "std of -1"),
        (
            torch.zeros(8, dtype=torch.float32),
            torch.full((8,), torch.inf, dtype=torch.float32),
            "8 values of std that are not finite",
        ),
        (
            torch.zeros(8, dtype=torch.bool),
            torch.ones(8, dtype=torch.float32),
            "found a mean of torch.bool",
        ),
        (
            torch.zeros(8, dtype=torch.float32),
            torch.ones(8, dtype=torch.complex64),
            "found a std of torch.complex64",
        ),
        (
            torch.zeros(7, dtype=torch.float32),
            torch.ones(7, dtype=torch.float32),
            "8 dimensions, wanted 7",
        ),
        (
            torch.zeros(8, 1, dtype=torch.float32),
            torch.ones(8, 1, dtype=torch.float32),
            r"wanted \(d,\)",
        ),
    ],
)
def test_statistics_of_other_data_are_refused(mean, std, message):
    with pytest.raises(ValueError, match=message):
        check_statistics(tokens(3, 400, 8), mean, std)


def spread_tokens(n, log_spread, mean=0.0, seed=0):
    """Tokens whose dimensions have spreads of their own."""
    return tokens(seed, n, len(log_spread)) * log_spread.exp() + mean


LOG_SPREAD = torch.linspace(-0.5, 0.5, 64, dtype=torch.float32)[
    torch.randperm(64, generator=torch.Generator().manual_seed(1))
]


@pytest.mark.parametrize(
    ("std", "same_data", "message"),
    [
        (LOG_SPREAD.exp(), True, None),
        (LOG_SPREAD.exp() * 1.4, True, None),
        # Another layer.
        (
            LOG_SPREAD.exp() * 1.75,
            True,
            "is a median of 0.5.* wanted 0.667 to 1.5 times",
        ),
        (LOG_SPREAD.exp() / 1.75, True, "is a median of 1.7.* wanted 0.667 to 1.5 times"),
        (LOG_SPREAD.exp() * 1.75, False, None),
        (LOG_SPREAD.exp() * 3, False, "wanted 0.37 to 2.7 times"),
        (
            LOG_SPREAD.flip(0).exp(),
            True,
            r"spreads of 64 dimensions .* correlate by -?0\.[01].* wanted at least 0.25",
        ),
        (LOG_SPREAD.neg().exp(), False, r"correlate by -(1\.00|0\.99) .* wanted at least 0.1"),
        ((LOG_SPREAD / 2 + LOG_SPREAD.flip(0)).exp(), False, None),  # another data set
        ((LOG_SPREAD.flip(0) * 0.05).exp(), True, None),  # too alike to say
        (torch.ones(64, dtype=torch.float32), True, None),
    ],
)
def test_from_512_tokens_on_spreads_must_be_those_of_the_layer(std, same_data, message):
    for n in (511, 512, 5000):
        x = spread_tokens(n, LOG_SPREAD)
        if message is None or n < 512:
            check_statistics(x, torch.zeros(64, dtype=torch.float32), std, same_data=same_data)
        else:
            with pytest.raises(ValueError, match=message):
                check_statistics(x, torch.zeros(64, dtype=torch.float32), std, same_data=same_data)


@pytest.mark.parametrize(("same_data", "dimensions"), [(True, 16), (False, 64)])
def test_a_correlation_is_not_asked_of_few_dimensions(same_data, dimensions):
    x = spread_tokens(600, LOG_SPREAD)
    wrong = LOG_SPREAD.neg().exp()
    x[:, dimensions - 1 :] = 1.0  # which leaves one too few, of those that vary in the batch
    check_statistics(
        x,
        torch.zeros(64, dtype=torch.float32),
        torch.where(torch.arange(64) < dimensions, wrong, 0.0),
        same_data=same_data,
    )
    x[:, dimensions - 1] = spread_tokens(600, LOG_SPREAD)[:, dimensions - 1]
    with pytest.raises(ValueError, match=f"the spreads of {dimensions} dimensions"):
        check_statistics(
            x,
            torch.zeros(64, dtype=torch.float32),
            torch.where(torch.arange(64) < dimensions, wrong, 0.0),
            same_data=same_data,
        )

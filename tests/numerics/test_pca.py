"""Streaming PCA against a float64 SVD, top-K codes against a loop, and errors against explicit
reconstruction.
"""

import json
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.numerics.pca import Convergence, StreamingPCA, orient, subspace_drift, top_k
from assay.numerics.reconstruction_error import ErrorSums, error_sums, sum_errors


def correlated(seed, n, d, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    scales = 2.0 ** -torch.arange(d, dtype=torch.float64)
    return (
        (torch.randn(n, d, generator=generator, dtype=torch.float64) * scales) @ basis + offset
    ).float()


def fitted(x, batch=16, n_components=None):
    pca = StreamingPCA(n_components)
    for part in x.split(batch):
        assert pca.partial_fit(part) is pca
    return pca


def svd(x):
    exact = x.numpy().astype(np.float64)
    mean = exact.mean(0)
    _, singular, vt = np.linalg.svd(exact - mean, full_matrices=False)
    return mean, vt, singular**2 / (len(exact) - 1)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    d=st.integers(1, 8),
    batch=st.integers(1, 90),
    offset=st.sampled_from([0.0, 7.0, 1e4]),
)
def test_any_batching_gives_the_svd(seed, d, batch, offset):
    x = correlated(seed, 80, d, offset)
    pca = fitted(x, batch)
    mean, vt, variance = svd(x)
    assert pca.n_samples_seen_ == 80
    np.testing.assert_allclose(pca.mean_, mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        pca.explained_variance_, variance, rtol=1e-9, atol=1e-12 * variance[0]
    )
    gaps_allow = np.abs(np.diff(variance, prepend=np.inf, append=-np.inf))
    clear = np.minimum(gaps_allow[:-1], gaps_allow[1:]) > 1e-4 * variance[0]
    cosines = np.abs((pca.components_.numpy() * vt).sum(1))
    np.testing.assert_allclose(cosines[clear], 1, atol=1e-12)
    signs = np.sign((pca.components_.numpy() * vt).sum(1, keepdims=True))
    np.testing.assert_allclose((pca.components_.numpy() * signs)[clear], vt[clear], atol=1e-7)
    np.testing.assert_allclose(pca.components_ @ pca.components_.T, np.eye(d), atol=1e-12)


def test_fewer_tokens_than_dimensions_leave_no_negative_variance():
    pca = fitted(correlated(0, 4, 9))
    assert pca.components_.shape == (9, 9)
    assert bool((pca.explained_variance_ >= 0).all())
    assert bool((pca.explained_variance_[:-1] >= pca.explained_variance_[1:]).all())
    assert float(pca.explained_variance_[3:].sum()) < 1e-12


@pytest.mark.parametrize("d", [2, 3, 7])
def test_the_orientation_is_the_same_in_any_order_and_batching(d):
    x = correlated(5, 300, d)
    # Standardized, so that in two dimensions both entries of each component are 1/sqrt(2) but for
    # rounding.
    x = ((x.double() - x.double().mean(0)) / x.double().std(0, correction=0)).float()
    reference = fitted(x).components_
    for seed in range(12):
        order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
        np.testing.assert_allclose(
            fitted(x[order], batch=11 + 20 * seed).components_, reference, atol=1e-6
        )


def test_orient_makes_the_first_largest_entry_positive():
    above = 0.5 + 1e-12
    components = torch.tensor(
        [[0.6, -0.8], [-0.8, -0.6], [-0.5, above], [above, -0.5]], dtype=torch.float64
    )
    expected = [[-0.6, 0.8], [0.8, 0.6], [0.5, -0.5], [0.5, -0.5]]
    np.testing.assert_allclose(orient(components), expected, atol=1e-9)


def test_the_mean_coefficient_over_the_train_tokens_is_below_rounding():
    x = correlated(1, 200, 5, offset=3.0)
    assert float(fitted(x).transform(x).double().mean(0).abs().max()) < 1e-7


def test_attributes_follow_later_batches():
    x = correlated(2, 60, 4)
    pca = fitted(x[:30])
    early = pca.explained_variance_
    pca.partial_fit(torch.empty(0, 4, dtype=torch.float32))
    assert torch.equal(pca.explained_variance_, early)
    pca.partial_fit(x[30:])
    np.testing.assert_allclose(pca.explained_variance_, svd(x)[2], rtol=1e-9)


def test_transform_and_back():
    x = correlated(3, 100, 6, offset=2.0)
    mean, vt, _ = svd(x)
    full, three = fitted(x), fitted(x, n_components=3)
    assert three.components_.shape == (3, 6)
    assert three.explained_variance_.shape == (3,)
    z = three.transform(x)
    assert z.dtype == torch.float32
    assert z.shape == (100, 3)
    np.testing.assert_allclose(z.abs(), np.abs((x.double().numpy() - mean) @ vt[:3].T), atol=1e-6)
    np.testing.assert_allclose(full.transform(x)[:, :3], z, atol=1e-6)
    np.testing.assert_allclose(full.inverse_transform(full.transform(x)), x, atol=1e-5)
    exact = (x.double().numpy() - mean) @ vt[:3].T @ vt[:3] + mean
    np.testing.assert_allclose(three.inverse_transform(z), exact, atol=1e-5)
    assert full.transform(x[:0]).shape == (0, 6)


def test_a_restored_model_transforms_alike_and_is_not_fitted_further():
    x = correlated(4, 50, 5)
    pca = fitted(x, n_components=2)
    state = pca.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "mean": (5,),
        "components": (2, 5),
        "explained_variance": (2,),
        "whiten": (),
    }
    restored = StreamingPCA.from_state(state)
    assert torch.equal(restored.transform(x), pca.transform(x))
    with pytest.raises(ValueError, match="restored from its components"):
        restored.partial_fit(x)
    with pytest.raises(ValueError, match=r"found mean \(5,\), components \(5, 2\)"):
        StreamingPCA.from_state(state | {"components": state["components"].T})


def test_errors_of_pca():
    x = correlated(0, 10, 4)
    for few in (x[:0], x[:1]):
        with pytest.raises(ValueError, match=f"found {len(few)} tokens, wanted at least 2"):
            _ = StreamingPCA().partial_fit(few).components_
    for n_components in (0, 5):
        with pytest.raises(ValueError, match=f"found n_components = {n_components}, wanted 1 to 4"):
            StreamingPCA(n_components).partial_fit(x)
    pca = fitted(x, n_components=3)
    with pytest.raises(ValueError, match="found a batch of 3 dimensions, wanted 4"):
        pca.partial_fit(x[:, :3])
    with pytest.raises(ValueError, match="found a batch of 3 dimensions, wanted 4"):
        pca.transform(x[:, :3])
    with pytest.raises(ValueError, match="found a batch of 4 dimensions, wanted 3"):
        pca.inverse_transform(x)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"found K = {k}, wanted 1 to 3"):
            pca.reconstruction_errors(x, torch.ones(4, dtype=torch.float32), [k])


def slow_top_k(row, k):
    return sorted(range(len(row)), key=lambda j: (-abs(row[j]), j))[:k]


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(1, 40).flatmap(
        lambda width: st.lists(
            st.lists(
                st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0]), min_size=width, max_size=width
            ),
            max_size=4,
        ).map(lambda rows: torch.tensor(rows, dtype=torch.float32).reshape(-1, width))
    ),
    data=st.data(),
)
def test_top_k_is_the_loops_with_ties_to_the_lower_index(rows, data):
    k = data.draw(st.integers(1, rows.shape[1]))
    values, indices = top_k(rows, k)
    assert indices.dtype == torch.int64
    assert indices.tolist() == [slow_top_k(row, k) for row in rows.tolist()]
    assert torch.equal(values, rows.gather(1, indices))


def test_top_k_breaks_ties_in_wide_rows_too():
    z = torch.ones(3, 2000, dtype=torch.float32)
    z[:, ::2] = -1
    assert top_k(z, 500)[1].tolist() == [list(range(500))] * 3
    for k in (0, 2001):
        with pytest.raises(ValueError, match=f"found K = {k}, wanted 1 to 2000"):
            top_k(z, k)


def explicit_errors(x, pca, std, k):
    """Sums by reconstructing each token on its own, in float64."""
    x, std = x.double().numpy(), np.where(std.numpy() == 0, 1, std.double().numpy())
    mean, components = pca.mean_.numpy(), pca.components_.numpy()
    residual = residual_raw = 0.0
    for token in x:
        z = components @ (token - mean)
        kept = slow_top_k(z, k)
        left = token - mean - z[kept] @ components[kept]
        residual += (left**2).sum()
        residual_raw += ((left * std) ** 2).sum()
    return residual / (x**2).sum(), residual_raw / ((x * std) ** 2).sum()


@pytest.mark.parametrize("n_components", [None, 5])
def test_nmse_at_every_k_is_that_of_explicit_reconstruction(n_components):
    train, x = correlated(6, 200, 8, offset=0.05), correlated(7, 90, 8, offset=0.1)
    std = torch.tensor([0.0, 0.5, 1, 2, 4, 8, 0.1, 3], dtype=torch.float32)
    pca = fitted(train, n_components=n_components)
    ks = range(1, (n_components or 8) + 1)
    for batch in (90, 13, 1):
        sums = sum_errors(partial(pca.reconstruction_errors, std=std, ks=ks), x.split(batch))
        assert list(sums) == list(ks)
        for k in ks:
            assert sums[k].n_tokens == 90
            nmse, nmse_raw = explicit_errors(x, pca, std, k)
            assert sums[k].nmse == pytest.approx(nmse, rel=1e-6, abs=1e-14)
            assert sums[k].nmse_raw == pytest.approx(nmse_raw, rel=1e-6, abs=1e-14)
            by_subtraction = pca.squared_errors(x, k)
            assert bool((by_subtraction >= 0).all())
            assert float(by_subtraction.sum()) == pytest.approx(
                sums[k].residual, rel=1e-6, abs=1e-12
            )


def test_some_ks_in_any_order_are_those_of_all_ks():
    x, std = correlated(8, 60, 6), torch.full((6,), 2.0, dtype=torch.float32)
    pca = fitted(x)
    every = pca.reconstruction_errors(x, std, range(1, 7))
    some = pca.reconstruction_errors(x, std, [4, 1, 4])
    assert list(some) == [1, 4]
    for k, sums in some.items():
        assert sums.residual == pytest.approx(every[k].residual, rel=1e-9)


def test_error_sums_weigh_dimensions_by_variance_and_merge():
    x, left = (
        torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float32),
        torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float32),
    )
    sums = error_sums(x, left, torch.tensor([0.0, 3.0], dtype=torch.float32))
    assert sums == ErrorSums(residual=2, total=14, residual_raw=10, total_raw=46, n_tokens=2)
    assert sums.nmse == 2 / 14
    assert sums.nmse_raw == 10 / 46
    assert sums + sums == ErrorSums(residual=4, total=28, residual_raw=20, total_raw=92, n_tokens=4)


def test_error_sums_that_cannot_be_are_refused():
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"found residual = {bad}"):
            ErrorSums(residual=bad, total=1, residual_raw=1, total_raw=1, n_tokens=1)
    nothing = ErrorSums(residual=0, total=0, residual_raw=0, total_raw=0, n_tokens=3)
    for ratio in ("nmse", "nmse_raw"):
        with pytest.raises(ValueError, match="no variance in 3 tokens"):
            getattr(nothing, ratio)
    with pytest.raises(ValueError, match="found 0 tokens"):
        sum_errors(
            lambda x: {1: error_sums(x, x, torch.ones(2, dtype=torch.float32))},
            [torch.empty(0, 2, dtype=torch.float32)],
        )


def test_the_spectrum_survives_a_far_mean_and_a_condition_number_of_1e8():
    """The variances span eight decades and the mean is 100 largest standard deviations from 0:
    float32 sums lose them.
    """
    d, n = 24, 3000
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    mean = torch.randn(d, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -4, d, dtype=torch.float64)
    x = (
        torch.randn(n, d, generator=generator, dtype=torch.float64) * scales @ basis
        + 100 * mean / mean.norm()
    )
    x = x.float()
    variance = svd(x)[2]
    for batch in (1, 100, 2500):
        np.testing.assert_allclose(fitted(x, batch).explained_variance_, variance, rtol=1e-6)
    sums = x.sum(0)
    # What float32 sums over a stream come to.
    in_float32 = (x.T @ x - torch.outer(sums, sums) / n) / (n - 1)
    assert np.abs(np.linalg.eigvalsh(in_float32)[::-1] / variance - 1).max() > 1000


def test_batches_larger_than_a_tile_and_more_dimensions_than_a_block():
    x = torch.randn(2100, 150, generator=torch.Generator().manual_seed(1), dtype=torch.float32) + 3
    pca = fitted(x, batch=1999)
    np.testing.assert_allclose(pca.explained_variance_, svd(x)[2], rtol=1e-9)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), cut=st.integers(0, 80), offset=st.sampled_from([0.0, 1e4]))
def test_two_halves_merged_equal_one_pass(seed, cut, offset):
    x = correlated(seed, 80, 5, offset)
    first, second, whole = StreamingPCA(), StreamingPCA(), fitted(x)
    first.partial_fit(x[:cut])
    second.partial_fit(x[cut:])
    before = second.checkpoint()[0]["scatter"].clone() if cut < 80 else None
    assert first.merge(second) is first
    first.partial_fit(x)  # what is added later must not reach the half that was merged in
    assert before is None or torch.equal(second.checkpoint()[0]["scatter"], before)
    twice = fitted(torch.cat([x, x]))
    assert first.n_samples_seen_ == 160
    np.testing.assert_allclose(first.mean_, twice.mean_, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        first.explained_variance_, twice.explained_variance_, rtol=1e-9, atol=1e-13
    )
    np.testing.assert_allclose(whole.merge(StreamingPCA()).mean_, fitted(x).mean_, rtol=0)


def test_what_cannot_be_merged_is_refused():
    x = correlated(0, 30, 4)
    restored = StreamingPCA.from_state(fitted(x).state_dict())
    for one, other in ((fitted(x), restored), (restored, fitted(x))):
        with pytest.raises(ValueError, match="restored from its components"):
            one.merge(other)
    with pytest.raises(ValueError, match="found a batch of 3 dimensions, wanted 4"):
        fitted(x).merge(fitted(x[:, :3]))
    with pytest.raises(ValueError, match="found n_components = 4, wanted 1 to 3"):
        StreamingPCA(4).merge(fitted(x[:, :3]))


@pytest.mark.parametrize("cut", [1, 7])
def test_a_resumed_fit_equals_the_uninterrupted_one_bit_for_bit(cut):
    batches = correlated(9, 200, 6, offset=5.0).split(20)
    whole, broken = StreamingPCA(), StreamingPCA()
    for x in batches:
        whole.partial_fit(x)
    for x in batches[:cut]:
        broken.partial_fit(x)
    tensors, state = broken.checkpoint()
    resumed = StreamingPCA().resume(tensors, json.loads(json.dumps(state)))
    for x in batches[cut:]:
        resumed.partial_fit(x)
    assert torch.equal(resumed.checkpoint()[0]["scatter"], whole.checkpoint()[0]["scatter"])
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert torch.equal(tensors["scatter"], broken.checkpoint()[0]["scatter"]), (
        "the checkpoint was written to"
    )


def test_a_pca_lives_on_its_device_from_the_first_batch_a_checkpoint_or_a_merge_on():
    x = correlated(0, 30, 4)
    checkpoint = fitted(x).checkpoint()
    for model in (
        StreamingPCA(device="meta").partial_fit(x),
        StreamingPCA(device="meta").resume(*checkpoint),
        StreamingPCA(device="meta").resume(*checkpoint).partial_fit(x),
        StreamingPCA(device="meta").merge(fitted(x)),
    ):
        assert {tensor.device.type for tensor in model.checkpoint()[0].values()} == {"meta"}
    assert {
        tensor.device.type for tensor in StreamingPCA().resume(*checkpoint).checkpoint()[0].values()
    } == {"cpu"}


def test_checkpoints_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="without sums"):
        StreamingPCA().checkpoint()
    good, state = fitted(correlated(0, 30, 4)).checkpoint()
    for bad, count in (
        ({"scatter": good["scatter"][:3]}, {}),
        ({}, {"count": 0}),
        ({"mean": good["mean"][None]}, {}),
    ):
        with pytest.raises(ValueError, match="is it a PCA's checkpoint"):
            StreamingPCA().resume(good | bad, state | count)


def test_whitened_coefficients_have_unit_variance_and_come_back():
    x = correlated(3, 400, 5, offset=2.0)
    # A dimension without variance.
    x = torch.cat([x, torch.ones(400, 1, dtype=torch.float32)], dim=1)
    white = StreamingPCA(whiten=True).partial_fit(x)
    z = white.transform(x)
    np.testing.assert_allclose(
        z[:, :5].double().var(0), torch.ones(5, dtype=torch.float32), rtol=1e-5
    )
    assert bool(z.isfinite().all())
    np.testing.assert_allclose(white.inverse_transform(z), x, atol=1e-5)
    assert torch.equal(StreamingPCA.from_state(white.state_dict()).transform(x), z)
    assert torch.equal(fitted(x).scale_, torch.ones(6, dtype=torch.float64))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 99), n_components=st.sampled_from([None, 4]))
def test_whitened_the_k_largest_are_kept_that_are_the_largest_so(seed, n_components):
    """Against the reconstruction of each token, for every K: the errors themselves are raw."""
    x = correlated(seed, 200, 6, offset=2.0)
    x[:, 5] = 3.0  # a component without variance
    tokens = correlated(seed + 1, 30, 6, offset=2.0)
    mean, vt, variance = svd(x)
    sigma = np.append(np.sqrt(variance[:5]), 1)
    std = np.linspace(0.5, 4, 6)
    kept, exact = n_components or 6, tokens.double().numpy()
    z = ((exact - mean) @ vt.T)[:, :kept]
    white = StreamingPCA(n_components, whiten=True).partial_fit(x)
    found = white.reconstruction_errors(tokens, torch.from_numpy(std), range(1, kept + 1))
    others_kept = 0
    for k in range(1, kept + 1):
        residual = np.empty_like(exact)
        for i, (token, row) in enumerate(zip(exact, z, strict=True)):
            largest = np.argsort(-np.abs(row / sigma[:kept]), kind="stable")[:k]
            others_kept += set(largest) != set(np.argsort(-np.abs(row), kind="stable")[:k])
            residual[i] = token - mean - row[largest] @ vt[largest]
        assert found[k].nmse == pytest.approx((residual**2).sum() / (exact**2).sum(), abs=1e-14)
        raw = ((residual * std) ** 2).sum() / ((exact * std) ** 2).sum()
        assert found[k].nmse_raw == pytest.approx(raw, abs=1e-14)
        np.testing.assert_allclose(
            white.squared_errors(tokens, k), (residual**2).sum(1), rtol=1e-9, atol=1e-12
        )
    assert others_kept > 0
    if n_components is None:
        assert found[6].nmse < 1e-28
        assert found[6].nmse_raw < 1e-28


def test_rounding_is_not_whitened_to_a_variance_of_1():
    """Components along which the tokens do not vary: dimensions that repeat others, and one that is
    constant.
    """
    x = correlated(3, 400, 3, offset=2.0).double()
    x = torch.cat(
        [
            x,
            x @ torch.ones(3, 2, dtype=torch.float64) / 3,
            torch.full((400, 1), 0.1, dtype=torch.float64),
        ],
        dim=1,
    )
    white = StreamingPCA(whiten=True).partial_fit(x)
    spread = white.transform(x).double().std(0)
    np.testing.assert_allclose(spread[:3], torch.ones(3, dtype=torch.float64), rtol=1e-5)
    assert float(spread[3:].max()) < 1e-6


@settings(deadline=None, max_examples=30)
@given(cut=st.integers(0, 21), whiten=st.booleans(), n_components=st.sampled_from([None, 3]))
def test_a_resumed_record_of_convergence_equals_the_uninterrupted_one_bit_for_bit(
    cut, whiten, n_components
):
    """Also where the checkpoint was taken before the look at its step."""
    batches = correlated(9, 210, 9, offset=5.0).split(10)

    def go_on(convergence, pca, first):
        convergence.observe(first)
        for step, x in enumerate(batches[first:], first + 1):
            pca.partial_fit(x)
            yield step
            convergence.observe(step)
        convergence.observe(len(batches), last=True)

    whole = Convergence(StreamingPCA(n_components, whiten))
    for _ in go_on(whole, whole._pca, 0):
        pass
    assert [look["step"] for look in whole.history_] == [1, 2, 4, 8, 16, 21]
    assert all(0 <= look["reconstruction_error"] <= 1 for look in whole.history_)
    broken = Convergence(StreamingPCA(n_components, whiten))
    for step in go_on(broken, broken._pca, 0):
        if step == max(1, cut):
            tensors, state = broken.checkpoint()
            break
    resumed = Convergence(StreamingPCA(n_components, whiten)).resume(
        tensors, json.loads(json.dumps(state))
    )
    for _ in go_on(resumed, resumed._pca, max(1, cut)):
        pass
    assert resumed.history_ == whole.history_
    (found, about), (wanted, said) = resumed.checkpoint(), whole.checkpoint()
    assert about == said
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_convergence_looks_at_no_more_than_a_quarter_and_waits_for_as_many_tokens():
    x = correlated(0, 40, 8)
    pca = StreamingPCA()
    convergence = Convergence(pca)
    assert convergence.observe(1, last=True) == {}
    pca.partial_fit(x[:2])
    assert convergence.observe(1) == {}
    pca.partial_fit(x[2:])
    assert convergence.observe(3) == {}
    assert set(convergence.observe(2)) == {"reconstruction_error"}
    assert convergence.checkpoint()[0]["leading"].shape == (2, 8)
    again = convergence.observe(4, last=True)
    assert again["reconstruction_error"] == convergence.history_[0]["reconstruction_error"]
    assert again["subspace_drift"] == pytest.approx(0, abs=1e-12)
    same = StreamingPCA().partial_fit(torch.ones(5, 8, dtype=torch.float32))
    assert Convergence(same).observe(1)["reconstruction_error"] == 0


def test_drift_of_subspaces():
    axes = torch.eye(4, dtype=torch.float32)
    assert subspace_drift(axes[:2], axes[[1, 0]]) == 0
    assert subspace_drift(axes[:2], axes[2:]) == 1
    turned = torch.stack([axes[0], 0.6 * axes[1] + 0.8 * axes[2]])
    assert subspace_drift(axes[:2], turned) == pytest.approx(0.64 / 2)

"""The nearest centre against brute force in float64, in every precision and on data made to break it."""

import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.numerics import distances as module
from assay.numerics.distances import NearestCenters, chunked_distances, nearest_in_float64

PRECISIONS = [(torch.bfloat16, torch.float32), (torch.bfloat16,), (torch.float32,), ()]
KINDS = ("gaussian", "offset", "duplicates", "repeated", "norms", "clusters", "tiny", "huge", "integers")


def randn(generator, *shape):
    return torch.randn(*shape, generator=generator)


def make(kind, n, n_clusters, d, seed):
    """Tokens (n, d) and centres (n_clusters, d), float32."""
    generator = torch.Generator().manual_seed(seed)
    x, centers = randn(generator, n, d), randn(generator, n_clusters, d)
    if kind == "offset":
        return x + 1e4, centers + 1e4
    if kind == "duplicates":
        return x, centers[torch.randint(0, max(1, n_clusters // 3), (n_clusters,), generator=generator)]
    if kind == "repeated":
        return x[:1].expand(n, d).clone(), centers
    if kind == "norms":
        scales = [10 ** (8 * torch.rand(rows, 1, generator=generator) - 4) for rows in (n, n_clusters)]
        return x * scales[0], centers * scales[1]
    if kind == "clusters":
        return centers[torch.randint(0, n_clusters, (n,), generator=generator)] + 1e-3 * x, centers
    if kind in ("tiny", "huge"):
        scale = 1e-25 if kind == "tiny" else 1e25
        return x * scale, centers * scale
    if kind == "integers":
        return x.round(), centers.round()
    return x, centers


def brute_force(x, centers):
    """Squared distances by differences, float64 (n, K)."""
    return torch.stack([(x.double() - center.double()).square().sum(1) for center in centers], dim=1)


def assert_nearest(found, x, centers):
    """The nearest where the two best differ by more than 1e-5 relative, one of the best anywhere, the lower of equals."""
    squared = brute_force(x, centers)
    least = squared.amin(1, keepdim=True)
    assert bool((squared.gather(1, found[:, None]) <= least * (1 + 1e-5)).all())
    clear = ((squared <= least * (1 + 1e-5) ** 2).sum(1) == 1) & (least[:, 0] > 0)
    assert torch.equal(found[clear], squared.argmin(1)[clear])
    firsts = {tuple(center.tolist()): k for k, center in reversed(list(enumerate(centers)))}
    assert found.tolist() == [firsts[tuple(centers[k].tolist())] for k in found.tolist()], "a duplicate's lower index"


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 40),
    st.integers(1, 200),
    st.sampled_from([1, 2, 3, 17, 64]),
    st.integers(0, 999),
    st.sampled_from(PRECISIONS),
    st.sampled_from([1, 4_000, 2**23]),
    st.sampled_from([0, 1, 16]),
)
def test_find_is_brute_force_on_any_data(kind, n, n_clusters, d, seed, dtypes, tile_bytes, most_groups):
    x, centers = make(kind, n, n_clusters, d, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module._TILE_BYTES, "cpu", tile_bytes)
        patch.setattr(module, "_MOST_GROUPS", most_groups)
        found = NearestCenters(centers, dtypes).find(x)
    assert found.dtype == torch.int64
    assert found.shape == (n,)
    if n:
        assert_nearest(found, x, centers)


@pytest.mark.parametrize("kind", KINDS)
def test_precision_and_threads_do_not_change_the_answer(kind):
    x, centers = make(kind, 3000, 300, 24, 7)
    threads = torch.get_num_threads()
    found = []
    try:
        for count, dtypes in itertools.product((1, 2), PRECISIONS):
            torch.set_num_threads(count)
            found.append(NearestCenters(centers, dtypes).find(x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(labels, found[0]) for labels in found)
    assert_nearest(found[0], x, centers)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(KINDS),
    st.sampled_from([1, 5, 64, 300]),
    st.integers(0, 99),
    st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_no_score_is_farther_off_than_its_bound(kind, d, seed, dtype):
    """The exact scores of all candidates' rivals: whatever a product leaves out must be worse than the best by more than nothing."""
    x, centers = make(kind, 50, 130, d, seed)
    finder = NearestCenters(centers, (dtype,))
    product = module._Product(finder._shifted, dtype)
    rows, kept = product.candidates(x - finder._origin)
    squared = brute_force(x, centers)
    nearest = squared.argmin(1)
    for row in rows.unique().tolist():
        among = kept[rows == row]
        assert int(nearest[row]) in among.tolist() or float(squared[row][among].min()) <= float(squared[row].min()) * (
            1 + 1e-9
        )
        assert torch.equal(among, among.sort().values)


def two_best_in_torch(x, c):
    """What the fused kernel gives."""
    scores = x.float() @ c.float().T
    best, where = scores.max(1)
    return best, scores.scatter(1, where[:, None], -torch.inf).amax(1), where


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KINDS), st.integers(1, 60), st.integers(1, 200), st.sampled_from([1, 3, 64]), st.integers(0, 99))
def test_what_the_fused_kernel_settles_is_brute_force_too(kind, n, n_clusters, d, seed):
    x, centers = make(kind, n, n_clusters, d, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "fused_kernel", lambda _: two_best_in_torch)
        found = NearestCenters(centers, (torch.bfloat16, torch.float32)).find(x)
    assert_nearest(found, x, centers)


def test_there_is_no_fused_kernel_but_on_cuda(monkeypatch, caplog):
    assert module.fused_kernel(torch.device("cpu")) is None
    monkeypatch.setitem(sys.modules, "assay.numerics.fused", None)
    module.fused_kernel.cache_clear()
    assert module.fused_kernel(torch.device("cuda", 7)) is None
    assert "the fused kernel is not used" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("n", "n_clusters", "d"), [(1, 1, 1), (130, 257, 70), (1000, 4096, 388)])
def test_the_fused_kernel_is_torch(n, n_clusters, d):
    from assay.numerics.fused import two_best

    x, c = torch.randn(n, d).bfloat16().cuda(), torch.randn(n_clusters, d).bfloat16().cuda()
    best, second, _ = two_best(x, c)
    wanted = two_best_in_torch(x, c)
    torch.testing.assert_close(best, wanted[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second, wanted[1], rtol=1e-4, atol=1e-4)


def test_few_candidates_are_left_and_few_rows_are_asked_again():
    x, centers = make("gaussian", 2000, 1000, 64, 0)
    finder = NearestCenters(centers, (torch.bfloat16,))
    rows, _ = module._Product(finder._shifted, torch.bfloat16).candidates(x - finder._origin)
    assert len(rows.unique()) > 1990
    assert len(rows) < 4 * len(rows.unique())


def test_products_below_float32_are_not_trusted(monkeypatch):
    centers = torch.eye(3)
    assert torch.float32 in NearestCenters(centers)._dtypes
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert (
        torch.float32 not in NearestCenters(centers, None)._dtypes or module.fast_dtype(centers.device) == torch.float32
    )


def test_nothing_is_nearest_to_no_tokens():
    assert NearestCenters(torch.eye(3)).find(torch.empty(0, 3)).shape == (0,)


@pytest.mark.parametrize("kind", ["gaussian", "offset", "norms"])
def test_distances_in_float64(kind):
    x, centers = make(kind, 30, 20, 9, 3)
    ((squared, tie),) = chunked_distances(x, centers)
    torch.testing.assert_close(squared, brute_force(x, centers), rtol=1e-8, atol=float(tie.max()))
    assert torch.equal(nearest_in_float64(x, centers), brute_force(x, centers).argmin(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_on_cuda_the_answer_is_the_same(kind):
    x, centers = make(kind, 3000, 300, 64, 1)
    assert torch.equal(NearestCenters(centers.cuda()).find(x.cuda()).cpu(), NearestCenters(centers).find(x))

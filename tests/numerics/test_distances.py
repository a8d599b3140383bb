"""The nearest center against brute force in float64, in every precision and on data made to break
it.
"""

import functools
import itertools
from contextlib import ExitStack, contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from assay.numerics import precision
from assay.numerics.kmeans import distances, kernels, rounded_centers
from assay.numerics.kmeans import nearest as nearest_module
from assay.numerics.kmeans.distances import chunked_distances, nearest_in_float64
from assay.numerics.kmeans.nearest import NearestCenters
from hostile import KINDS, assert_nearest, brute_force, make

PRECISIONS = [
    (torch.float16, torch.bfloat16, torch.float32),
    (torch.float16,),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16,),
    (torch.float32,),
    (),
]


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
def test_find_is_brute_force_on_any_data(
    kind, n, n_clusters, d, seed, dtypes, tile_bytes, most_groups
):
    x, centers = make(kind, n, n_clusters, d, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(nearest_module._TILE_BYTES, "cpu", tile_bytes)
        patch.setattr(rounded_centers, "_MOST_GROUPS", most_groups)
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
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_no_score_is_farther_off_than_its_bound(kind, d, seed, dtype):
    """The exact scores of all candidates' rivals: whatever a product leaves out must be worse than
    the best by more than nothing.
    """
    x, centers = make(kind, 50, 130, d, seed)
    finder = NearestCenters(centers, (dtype,))
    rows, kept = candidates(
        rounded_centers.RoundedCenters(centers, finder._origin, dtype, None), x - finder._origin
    )
    squared = brute_force(x, centers)
    nearest = squared.argmin(1)
    for row in rows.unique().tolist():
        among = kept[rows == row]
        assert int(nearest[row]) in among.tolist() or float(squared[row][among].min()) <= float(
            squared[row].min()
        ) * (1 + 1e-9)
        assert len(among.unique()) == len(among)


def candidates(product, x):
    """Pairs (row, center) of a shortlist, by row."""
    rows, groups, near = product.shortlist(x)
    pairs, places = near.nonzero(as_tuple=True)
    return rows[pairs], product.members(places, groups[pairs])


def every_other_row(x, centers, *_):
    """What the fused kernels give, were they to leave every other row in question."""
    found = brute_force(x, centers).argmin(1)
    return found.where(torch.arange(len(x)) % 2 == 0, -1)


def not_asked(*_):
    raise AssertionError("a search moves no centers")


def round_centers(centers, origin, product):
    """What the fused kernel writes."""
    return product._round_centers(centers - origin)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 60),
    st.integers(1, 200),
    st.sampled_from([1, 3, 64]),
    st.integers(0, 99),
    st.sampled_from(PRECISIONS),
)
def test_what_the_fused_kernels_leave_is_asked_again(kind, n, n_clusters, d, seed, dtypes):
    x, centers = make(kind, n, n_clusters, d, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            nearest_module,
            "fused_kernels",
            lambda _: kernels.Kernels(round_centers, every_other_row, move_centers=not_asked),
        )
        found = NearestCenters(centers, dtypes).find(x)
    if n:
        assert_nearest(found, x, centers)


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("offset", [0.0, 3e4])
def test_what_float16_does_not_hold_is_left_to_the_next(monkeypatch, offset):
    """A center that overflows bars float16 for all, a token only for itself; halved norms that
    overflow are bounds that hold.
    """
    x, centers = make("gaussian", 300, 200, 16, 3)
    centers[7], x[5] = 7e4, 1e5
    counts = count_in_float64(monkeypatch)
    found = NearestCenters(centers + offset, (torch.float16, torch.float32)).find(x + offset)
    assert_nearest(found, x + offset, centers + offset)
    assert sum(counts) == 0
    origin = torch.zeros(16, dtype=torch.float32)
    assert not rounded_centers.RoundedCenters(
        centers, origin, torch.float16, None
    ).holds_the_centers
    centers[7] = 1e3  # its square is no float16
    product = rounded_centers.RoundedCenters(centers, origin, torch.float16, None)
    assert product.holds_the_centers
    assert set(range(300)) - set(product.shortlist(x)[0].tolist()) == {5}


@pytest.mark.parametrize("d", [1, 60, 384, 1024])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_that_tensor_cores_load_are_multiples_of_128_bytes(d, dtype):
    centers = make("gaussian", 5, 70, d, 0)[1]
    matrix = rounded_centers.RoundedCenters(
        centers, torch.zeros(d, dtype=torch.float32), dtype, None
    ).matrix
    assert matrix.is_contiguous()
    assert matrix.shape[1] % 64 == 0
    assert d + 4 <= matrix.shape[1] < d + 68


def test_few_candidates_are_left_and_few_rows_are_asked_again():
    x, centers = make("gaussian", 2000, 1000, 64, 0)
    finder = NearestCenters(centers, (torch.bfloat16,))
    product = rounded_centers.RoundedCenters(centers, finder._origin, torch.bfloat16, None)
    rows, _ = candidates(product, x - finder._origin)
    assert len(rows.unique()) > 1990
    assert len(rows) < 4 * len(rows.unique())


def count_in_float64(monkeypatch):
    """How many rows are settled in float64, call by call."""
    counts = []
    real = distances.nearest_in_float64
    monkeypatch.setattr(
        nearest_module, "nearest_in_float64", lambda x, c: (counts.append(len(x)), real(x, c))[1]
    )
    return counts


@pytest.mark.parametrize("length", [1e2, 1e4, 1e8, 1e20])
def test_a_far_center_costs_the_others_nothing(monkeypatch, length):
    """Its own bounds are wide, and nobody else's; neither does it draw the origin off."""
    x, centers = make("gaussian", 2000, 2048, 96, 5)
    counts = count_in_float64(monkeypatch)
    rows = {}
    for far in (False, True):
        if far:
            centers[77] = length
        finder = NearestCenters(centers, (torch.bfloat16,))
        product = rounded_centers.RoundedCenters(centers, finder._origin, torch.bfloat16, None)
        rows[far] = candidates(product, x - finder._origin)[0]
        finder.find(x)
    assert sum(counts) < 20
    assert len(rows[True]) < 1.1 * len(rows[False])


@contextmanager
def torch_setting(path, value):
    """A setting of torch's within the block: its owners have no attributes that monkeypatch would
    put back.
    """
    *path, name = path.split(".")
    owner = functools.reduce(getattr, path, torch)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("backends.cuda.matmul.fp32_precision", "tf32"),
        ("backends.fp32_precision", "tf32"),
        ("backends.mkldnn.matmul.fp32_precision", "bf16"),
        ("backends.cuda.matmul.allow_tf32", True),
        ("get_float32_matmul_precision", lambda: "medium"),
    ],
)
@pytest.mark.parametrize("dtypes", [None, (torch.float32,)])
def test_products_below_float32_are_not_trusted(monkeypatch, setting, value, dtypes):
    x, centers = make("gaussian", 50, 40, 8, 0)
    monkeypatch.setattr(nearest_module, "fast_dtypes", lambda _: ())
    finder = NearestCenters(centers, dtypes)
    counts = count_in_float64(monkeypatch)
    with torch_setting(setting, value):
        assert not precision.float32_is_exact()
        found = finder.find(x)
    assert counts == [50]
    assert not finder._products
    assert_nearest(found, x, centers)
    assert precision.float32_is_exact()
    assert torch.equal(finder.find(x), found)
    assert torch.float32 in finder._products


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("name", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
def test_onednns_own_setting_counts_too(monkeypatch, name):
    monkeypatch.setenv(name, "BF16")
    assert not precision.float32_is_exact()
    monkeypatch.setenv(name, "STRICT")
    assert precision.float32_is_exact()


def test_torch_without_onednn_multiplies_in_float32(monkeypatch):
    ask = precision._cpu_multiplies_bfloat16.__wrapped__
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    assert ask() is False

    def absent():
        raise AttributeError(
            "'_OpNamespace' 'mkldnn' object has no attribute '_is_mkldnn_bf16_supported'"
        )

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", absent)
    assert ask() is False


ROUNDING = precision._ROUNDING


def rounding():
    return {name: getattr(torch.backends.cuda.matmul, name) for name in ROUNDING}


@contextmanager
def all_rounding(value):
    with ExitStack() as stack:
        for name in ROUNDING:
            stack.enter_context(torch_setting(f"backends.cuda.matmul.{name}", value))
        yield


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_partial_sums_stay_in_float32_within_a_product_and_nowhere_else(monkeypatch, dtype, before):
    seen = []
    real = Tensor.__matmul__
    monkeypatch.setattr(
        Tensor, "__matmul__", lambda *pair: (seen.append(rounding()), real(*pair))[1]
    )
    finder = NearestCenters(torch.eye(3, dtype=torch.float32), (dtype,))
    with all_rounding(before):
        finder.find(torch.ones(2, 3, dtype=torch.float32))
        assert seen == [dict.fromkeys(ROUNDING, False)]
        assert rounding() == dict.fromkeys(ROUNDING, before)
        monkeypatch.setattr(Tensor, "__matmul__", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finder.find(torch.ones(2, 3, dtype=torch.float32))
        assert rounding() == dict.fromkeys(ROUNDING, before)


def test_the_last_of_several_threads_puts_the_settings_back():
    first, last = ExitStack(), ExitStack()
    with all_rounding(True):
        for thread in (first, last):
            thread.enter_context(precision.sums_in_float32())
        first.close()
        assert rounding() == dict.fromkeys(ROUNDING, False)
        last.close()
        assert rounding() == dict.fromkeys(ROUNDING, True)


def test_nothing_is_nearest_to_no_tokens():
    assert NearestCenters(torch.eye(3, dtype=torch.float32)).find(
        torch.empty(0, 3, dtype=torch.float32)
    ).shape == (0,)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 40),
    st.integers(1, 100),
    st.sampled_from([1, 3, 64]),
    st.integers(0, 99),
    st.sampled_from([1, 2**20]),
    st.sampled_from([0, 1 / 32, 1]),
)
def test_distances_are_right_to_a_float32_however_small_they_are(
    kind, n, n_clusters, d, seed, pairs, many
):
    x, centers = make(kind, n, n_clusters, d, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distances, "_PAIRS", pairs)
        patch.setattr(distances, "_MANY", many)
        (squared,) = chunked_distances(x, centers)
        found = nearest_in_float64(x, centers)
    if n:
        torch.testing.assert_close(squared, brute_force(x, centers), rtol=2.0**-24, atol=0)
        assert_nearest(found, x, centers)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("dtypes", PRECISIONS)
def test_many_centers_of_mixed_lengths_are_told_apart(monkeypatch, scale, dtypes):
    """More groups of them than are looked into, at lengths of 1e-4 and 1e4: what a product rounds
    is larger than all the small ones.
    """
    x, centers = make("two scales", 200, 1500, 16, 0)
    x, centers = x * scale, centers * scale
    counts = count_in_float64(monkeypatch)
    found = NearestCenters(centers, dtypes).find(x)
    assert counts == [200]
    assert len(found.unique()) > 10
    assert_nearest(found, x, centers)
    (squared,) = chunked_distances(x, centers)
    torch.testing.assert_close(squared, brute_force(x, centers), rtol=2.0**-24, atol=0)


def test_what_float64_looks_at_together_is_bounded(monkeypatch):
    monkeypatch.setattr(distances, "_PAIRS", 600)
    monkeypatch.setattr(distances, "_DISTANCE_BYTES", 8 * 100 * 50)
    largest = []
    real = distances.paired_distances
    monkeypatch.setattr(
        distances,
        "paired_distances",
        lambda x, rows, c, pairs: (largest.append(len(pairs)), real(x, rows, c, pairs))[1],
    )
    x, centers = make("repeated", 120, 50, 4, 0)[0], torch.ones(50, 4, dtype=torch.float32)
    assert nearest_in_float64(x, centers).tolist() == [0] * 120
    assert max(largest) <= 600


@pytest.mark.parametrize("n_clusters", [1, 99, 5000])
def test_the_origin_is_amid_the_most_centers(n_clusters):
    centers = make("gaussian", 1, n_clusters, 5, 0)[1] + 7
    alone = distances.origin_of(centers)
    assert alone.dtype == torch.float32
    assert bool(((centers <= alone).any(0) & (centers >= alone).any(0)).all())
    torch.testing.assert_close(
        alone, torch.full_like(alone, 7), rtol=0, atol=0.5 if n_clusters > 1 else 3
    )
    few = n_clusters // 20
    centers[:few], centers[few : 2 * few] = 1e9, -1e30
    assert (
        torch.equal(distances.origin_of(centers), alone)
        if few == 0
        else bool((distances.origin_of(centers) - 7).abs().max() < 1)
    )


def test_the_origin_of_equal_centers_is_there_and_of_nan_is_nan():
    assert distances.origin_of(torch.ones(1, 3, dtype=torch.float32)).tolist() == [1, 1, 1]
    assert bool(
        distances.origin_of(torch.full((2, 3), torch.nan, dtype=torch.float32)).isnan().all()
    )


def test_where_nothing_is_close_nothing_is_taken_by_differences(monkeypatch):
    """To no rows there is nothing to do, and all centers in float64 are much."""
    monkeypatch.setattr(distances, "_by_differences", None)
    x, centers = make("gaussian", 100, 50, 8, 0)
    (squared,) = chunked_distances(x, centers)
    torch.testing.assert_close(squared, brute_force(x, centers), rtol=2.0**-24, atol=0)


@pytest.mark.parametrize("dtypes", [None, (), (torch.bfloat16,), (torch.float16, torch.float32)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n_clusters", [1, 3, 1500])
def test_a_token_without_a_nearest_center_is_refused(bad, dtypes, n_clusters):
    x, centers = make("gaussian", 30, n_clusters, 4, 3)
    x[7, 2] = bad
    with pytest.raises(ValueError, match="row 7, dimension 2 of a batch is NaN or infinity"):
        NearestCenters(centers, dtypes).find(x)

"""Sketches: points with the moments of the rows, a bound that holds, sums that can be merged."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.numerics.probe.cells import CellMap
from assay.numerics.probe.logistic import PairLosses, slab_of_rows
from assay.numerics.probe.sketch import FeatureSketch
from assay.numerics.ranking import count_classes

KINDS = [
    "gaussian",
    "heavy",
    "skewed",
    "discrete",
    "constant",
    "narrow",
    "outlier",
    "offset",
    "tiny",
    "huge",
    "two",
    "tail",
]
N_CLASSES = 3


def _make(kind, n_rows=3000, n_features=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_rows, n_features, generator=generator, dtype=torch.float32)
    if kind == "heavy":
        x = x / torch.randn(n_rows, n_features, generator=generator, dtype=torch.float32)
    elif kind == "skewed":
        x = (3 * x).exp()
    elif kind == "discrete":
        x = (2 * x).round()
    elif kind == "constant":
        x[:] = 0.1
    elif kind == "narrow":
        x = torch.where(x > 1, 1e-6 * x, 1.0)
    elif kind == "outlier":
        x[n_rows // 2 :: 17] = 1e30
    elif kind == "tail":  # beyond the cells, and far apart there
        x[n_rows // 2 :: 5] *= 1e7
    elif kind == "two":
        x = (x > 0.3).float() * 7 - 2
    x = x * {"tiny": 1e-30, "huge": 1e30}.get(kind, 1) + (1e5 if kind == "offset" else 0)
    return x, torch.randint(-1, N_CLASSES, (n_rows,), generator=generator)


def _sketch(x, labels, cells=None, **options):
    sketch = FeatureSketch(cells or CellMap.of_rows(x.T[:, :500]), N_CLASSES, **options)
    sketch.add(x, labels)
    return sketch


def _of_zeros(x, labels, **options):
    """The sketch of sparse codes: events and rows are told apart."""
    row, feature = x.nonzero().T
    cells = CellMap.of_events(feature, x[row, feature], x.shape[1])
    sketch = FeatureSketch(cells, N_CLASSES, **options)
    sketch.add_events(feature, x[row, feature], labels[row])
    sketch.add_rows(labels)
    return sketch


@pytest.mark.parametrize("events", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_the_rows(kind, events):
    x, labels = _make(kind)
    if events:
        x = torch.where(
            torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
            < 0.9,
            0.0,
            x,
        )
        x[:, 3] = 0.0
    found = (_of_zeros(x, labels) if events else _sketch(x, labels)).statistics()
    exact = x.double()
    mean, std = exact.mean(0), exact.std(0, unbiased=False)
    constant = exact.amin(0) == exact.amax(0)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-9, atol=1e-12 * float(std.max() + 1e-300))
    np.testing.assert_allclose(found.std, torch.where(constant, 0.0, std), rtol=1e-9)
    assert torch.equal(found.low, exact.amin(0))
    assert torch.equal(found.high, exact.amax(0))
    for c in range(N_CLASSES):
        wanted = torch.where(constant, 0.0, (exact[labels == c] - found.center).sum(0))
        scale = (exact[labels == c] - found.center).abs().sum(0)
        assert ((found.class_sums[:, c] - wanted).abs() <= 1e-11 * scale).all()


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "skewed", "discrete", "two"])
def test_points_have_the_moments_of_the_rows_of_each_cell(kind):
    x, labels = _make(kind)
    sketch = _sketch(x, labels)
    points = sketch.points()
    lines, width = points.cells.counts.shape
    for feature in range(lines):
        values = x[:, feature].double()
        cell, _ = sketch.cells[feature : feature + 1].cells(
            (values[None] - sketch.cells.center[feature]) / sketch.cells.scale[feature]
        )
        for place, number in enumerate(cell.unique().tolist()):
            rows = values[cell[0] == number]
            at = torch.stack([points.values[feature, i * width + place] for i in range(3)])
            share = torch.stack([points.weights[feature, i * width + place] for i in range(3)])
            half, middle = float(points.cells.half[feature, place]), float(rows.mean())
            assert float(points.cells.counts[feature, place]) == len(rows)
            assert (rows - middle).abs().max() <= 2 * half
            for power in range(6):
                mine = (share * ((at - middle) / half) ** power).sum()
                wanted = ((rows - middle) / half).pow(power).sum()
                assert abs(float(mine - wanted)) <= 1e-9 * len(rows), (feature, place, power)


def _losses(slab, x, labels):
    scale = x.double().std(0, unbiased=False)
    scale = torch.where(scale > 0, scale, 1.0)
    counts = count_classes(labels, N_CLASSES).double()
    return PairLosses(slab, x.double().mean(0), scale, counts, len(labels))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(KINDS),
    st.booleans(),
    st.integers(1, 2000),
    st.floats(-3, 5),
    st.floats(-8, 8),
    st.integers(0, 999),
)
def test_the_loss_is_within_the_bound_of_that_of_the_rows(kind, events, n_rows, log_w, b, seed):
    x, labels = _make(kind, n_rows, seed=seed)
    if events:
        x = torch.where(
            torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
            < 0.8,
            0.0,
            x,
        )
    sketch = _of_zeros(x, labels) if events else _sketch(x, labels)
    sketched = _losses(sketch.slab(sketch.statistics()), x, labels)
    exact = _losses(slab_of_rows(x.T.contiguous(), labels), x, labels)
    pairs = torch.arange(4 * N_CLASSES)
    theta = torch.stack(
        [
            torch.full((len(pairs),), b, dtype=torch.float64),
            torch.full((len(pairs),), 10**log_w, dtype=torch.float64),
        ]
    ).double()
    theta[1, ::2] *= -1
    error = (sketched.loss(pairs, theta) - exact.loss(pairs, theta)).abs()
    size = 1 + theta.abs().sum(0) * 10
    assert (error <= sketched.bound(pairs, theta) + 1e-12 * size).all()


def test_the_bound_of_an_ordinary_probe_is_below_a_ten_billionth():
    x, labels = _make("gaussian", n_rows=20_000)
    sketch = _sketch(x, labels)
    losses = _losses(sketch.slab(sketch.statistics()), x, labels)
    pairs = torch.arange(4 * N_CLASSES)
    for w, most in ((1.0, 1e-13), (4.0, 1e-9), (40.0, 1e-7)):
        theta = torch.tensor([[-4.0], [w]], dtype=torch.float64).expand(2, len(pairs))
        bound = losses.bound(pairs, theta)
        assert (bound > 0).all()
        assert (bound < most).all()
    fine = _sketch(x, labels, CellMap.of_rows(x.T, 10))
    finer = _losses(fine.slab(fine.statistics()), x, labels)
    assert (finer.bound(pairs, theta) < 1e-8 * losses.bound(pairs, theta)).all()


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("kind", ["gaussian", "heavy", "outlier", "discrete"])
def test_merged_sketches_of_shuffled_halves_equal_one_pass(kind, by_class):
    x, labels = _make(kind)
    cells = CellMap.of_rows(x.T)
    whole = _sketch(x, labels, cells, by_class=by_class)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    first, second = (
        _sketch(x[half], labels[half], cells, by_class=by_class) for half in order.chunk(2)
    )
    first.merge(second)
    assert first.n_rows == whole.n_rows
    assert torch.equal(first.class_counts, whole.class_counts)
    mine, other = first.statistics(), whole.statistics()
    for name in ("mean", "std", "low", "high", "class_sums"):
        size = float(getattr(other, name).abs().max())
        torch.testing.assert_close(
            getattr(mine, name), getattr(other, name), rtol=1e-12, atol=1e-12 * size
        )
    scale = whole.sums.abs().amax((1, 2, 3), keepdim=True)
    assert ((first.sums - whole.sums).abs() <= 1e-12 * scale).all()
    pairs = torch.arange(4 * N_CLASSES)
    theta = torch.randn(
        2, len(pairs), generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    merged, single = (_losses(each.slab(each.statistics()), x, labels) for each in (first, whole))
    torch.testing.assert_close(
        merged.loss(pairs, theta), single.loss(pairs, theta), rtol=1e-12, atol=1e-12
    )


def test_sketches_of_other_cells_are_not_merged():
    x, labels = _make("gaussian")
    mine = _sketch(x, labels)
    for cells in (CellMap.of_rows(2 * x.T), CellMap.of_rows(x.T, 7)):
        with pytest.raises(ValueError, match="different cells, wanted the same map"):
            mine.merge(_sketch(x, labels, cells))


@pytest.mark.parametrize("by_class", [False, True])
def test_a_part_of_a_sketch_is_the_sketch_of_a_part(by_class):
    x, labels = _make("heavy")
    whole, part = (
        _sketch(x, labels, by_class=by_class),
        _sketch(x[:, 1:3], labels, by_class=by_class),
    )
    cut = whole[1:3]
    assert torch.equal(cut.sums, part.sums)
    torch.testing.assert_close(
        cut.statistics().class_sums, part.statistics().class_sums, rtol=1e-12, atol=1e-12
    )
    for mine, other in ((cut.points(), part.points()), (cut.points(nodes=1), part.points(nodes=1))):
        torch.testing.assert_close(mine.values, other.values, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mine.weights, other.weights, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["gaussian", "discrete"])
@pytest.mark.parametrize("events", [False, True])
def test_points_of_each_class_are_those_of_its_rows_alone(kind, events):
    x, labels = _make(kind)
    if events:
        x = x.clamp(min=0.5) - 0.5
    sketch = (_of_zeros if events else _sketch)(x, labels, by_class=True)
    points = sketch.points(by_class=True)
    for feature in range(4):
        for c in range(N_CLASSES):
            rows, line = x[labels == c, feature].double(), feature * N_CLASSES + c
            weights, values = points.weights[line], points.values[line]
            np.testing.assert_allclose(weights.sum(), len(rows), rtol=1e-12)
            for power in (1, 2, 3):
                np.testing.assert_allclose(
                    (weights * values**power).sum(), (rows**power).sum(), rtol=1e-9, atol=1e-9
                )


def test_what_is_not_finite_is_named_by_row_and_feature():
    for value in (torch.nan, torch.inf, -torch.inf):
        x, labels = _make("gaussian")
        x[2345, 2] = value
        with pytest.raises(
            ValueError, match="row 2355, feature 9 is NaN or infinity, wanted finite"
        ):
            FeatureSketch(CellMap.of_rows(x.T[:, :500]), N_CLASSES).add(
                x, labels, first_row=10, first_feature=7
            )


def test_values_of_hopelessly_different_sizes_are_refused():
    x = torch.tensor([[0.0, 1e-30], [0.0, 2e-30], [1.0, 1e30]], dtype=torch.float32)
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(
        ValueError,
        match=r"feature 8 has values .*e\+60 times as far apart as in its first rows, 1\.0e-30",
    ):
        FeatureSketch(CellMap.of_rows(x[:2].T), 1).add(x, labels, first_feature=7)


def test_rows_are_left_as_they_are():
    x, labels = _make("gaussian", n_rows=1)
    for rows in (x, x.double(), x.T.contiguous().T):
        before = copy.deepcopy(rows)
        _sketch(rows, labels)
        assert torch.equal(rows, before)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50), st.integers(0, 3)
)
def test_any_finite_rows_have_finite_points_in_their_range(values, seed):
    x = torch.tensor(values, dtype=torch.float32)[:, None]
    labels = torch.zeros(len(values), dtype=torch.int64)
    sample = x[: 1 + seed]
    cells = CellMap.of_rows(sample.T)
    if ((x - cells.center).abs() > 1e49 * cells.scale).any():
        return
    points = _sketch(x, labels, CellMap.of_rows(sample.T)).points()
    kept = points.values[points.weights > 1e-9]
    assert points.values.isfinite().all()
    assert points.weights.isfinite().all()
    np.testing.assert_allclose(points.weights.sum(), len(values), rtol=1e-9)
    width = (
        float(x.double().max() - x.double().min()) + 1e-6 * float(x.double().abs().max()) + 1e-30
    )
    assert kept.min() >= float(x.double().min()) - width
    assert kept.max() <= float(x.double().max()) + width


def test_cells_are_the_same_of_float32_which_stays_as_it_is():
    t = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 9
    before = t.clone()
    cells = CellMap(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    for found, wanted in zip(cells.cells(t), cells.cells(t.double()), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(t, before)

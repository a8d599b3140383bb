"""Average precision as scikit-learn counts it, and purity as a loop does."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from assay.numerics import ranking
from assay.numerics.ranking import (
    count_classes,
    purity_at_k,
    rank_features,
    rank_table,
    strongest_examples,
    top_rows,
)


def _reference(scores, labels, n_classes):
    """scikit-learn's figure, class by class; NaN for a class without rows."""
    return np.array(
        [
            average_precision_score(labels == c, scores.double()) if (labels == c).any() else np.nan
            for c in range(n_classes)
        ]
    )


@st.composite
def ranked(draw):
    """Scores of few or many distinct values, and labels of which some are -1 and some classes
    absent.
    """
    n_rows, n_classes = draw(st.integers(1, 60)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    scores = torch.randn(3, n_rows, generator=generator, dtype=torch.float32)
    distinct = draw(st.sampled_from([1, 2, 5, None]))
    if distinct is not None:
        scores = (scores * distinct / 4).round()  # rounds to 0.0 and -0.0, which are one score
    return scores, torch.randint(-1, n_classes, (n_rows,), generator=generator), n_classes


def _rank(values, labels, n_classes, thresholds=None):
    if thresholds is None:
        thresholds = torch.zeros(len(values), n_classes, dtype=torch.float64)
    return rank_features(values, labels, n_classes, thresholds)


def _thresholds(values, n_classes, generator):
    """Some on values, some between, some beyond all."""
    n_features, n_rows = values.shape
    rows = torch.randint(n_rows, (n_features, n_classes), generator=generator)
    away = (
        torch.randint(-1, 2, rows.shape, generator=generator)
        * torch.tensor([0.0, 0.3, 100.0, 1e-9], dtype=torch.float32)[rows % 4]
    )
    return values.gather(1, rows).double() + away


@settings(deadline=None, max_examples=60)
@given(ranked())
def test_average_precision_is_that_of_scikit_learn_both_ways(case):
    scores, labels, n_classes = case
    both = _rank(scores, labels, n_classes)[0]
    assert both.dtype == torch.float64
    assert both.shape == (2, 3, n_classes)
    for j, column in enumerate(scores):
        np.testing.assert_allclose(both[0, j], _reference(column, labels, n_classes), rtol=1e-12)
        np.testing.assert_allclose(both[1, j], _reference(-column, labels, n_classes), rtol=1e-12)


@settings(deadline=None, max_examples=60)
@given(ranked(), st.integers(0, 999))
def test_hits_at_a_threshold_are_those_of_a_loop(case, seed):
    scores, labels, n_classes = case
    thresholds = _thresholds(scores, n_classes, torch.Generator().manual_seed(seed))
    _, hits, predicted = _rank(scores, labels, n_classes, thresholds)
    for j, column in enumerate(scores.double()):
        for c in range(n_classes):
            for way, chosen in enumerate((column >= thresholds[j, c], column <= thresholds[j, c])):
                assert predicted[way, j, c] == int(chosen.sum())
                assert hits[way, j, c] == int((chosen & (labels == c)).sum())


@settings(deadline=None, max_examples=25)
@given(ranked(), st.integers(0, 999))
def test_the_order_of_rows_does_not_matter(case, seed):
    scores, labels, n_classes = case
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    thresholds = _thresholds(scores, n_classes, generator)
    shuffled = _rank(scores[:, order], labels[order], n_classes, thresholds)
    np.testing.assert_allclose(shuffled, _rank(scores, labels, n_classes, thresholds), rtol=1e-13)


def test_features_are_ranked_alike_in_any_block(monkeypatch):
    scores, labels = (
        torch.randn(7, 50, dtype=torch.float32).round(decimals=1),
        torch.randint(0, 3, (50,)),
    )
    thresholds = torch.randn(7, 3, dtype=torch.float32).double()
    whole = _rank(scores, labels, 3, thresholds)
    monkeypatch.setitem(ranking._BLOCK, "cpu", 100)
    assert torch.equal(_rank(scores, labels, 3, thresholds), whole)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 999))
def test_counts_of_ones_are_enough_for_binary_features(n_rows, n_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2, (3, n_rows), generator=generator)
    values[0] = 0
    labels = torch.randint(-1, n_classes, (n_rows,), generator=generator)
    thresholds = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    thresholds = thresholds[torch.randint(5, (3, n_classes), generator=generator)]
    table = torch.zeros(3, n_classes + 1, dtype=torch.int64)
    for feature in range(3):
        for row in range(n_rows):
            table[feature, labels[row]] += values[feature, row]  # label -1 is the last column
    found = rank_table(table, count_classes(labels, n_classes), n_rows, thresholds)
    np.testing.assert_allclose(
        found, _rank(values.float(), labels, n_classes, thresholds), rtol=1e-12
    )


def test_a_threshold_that_is_no_number_spoils_no_other():
    scores, labels = torch.randn(2, 30, dtype=torch.float32), torch.randint(0, 2, (30,))
    thresholds = torch.tensor([[torch.nan, 0.1], [torch.inf, -torch.inf]], dtype=torch.float64)
    found = _rank(scores, labels, 2, thresholds)
    assert found[2, 0, 0, 1] == int((scores[0] >= 0.1).sum())
    assert found[2, :, 1].tolist() == [[0.0, 30.0], [30.0, 0.0]]


def test_bad_scores_and_labels_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        _rank(torch.tensor([[0.0, torch.nan]], dtype=torch.float32), torch.tensor([0, 0]), 1)
    with pytest.raises(ValueError, match=r"torch\.int32 .*wanted torch\.int64"):
        _rank(torch.zeros(1, 2, dtype=torch.float32), torch.zeros(2, dtype=torch.int32), 1)
    with pytest.raises(ValueError, match=r"shape \(3,\), wanted .* shape \(2,\)"):
        _rank(torch.zeros(1, 2, dtype=torch.float32), torch.zeros(3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="0 rows"):
        _rank(torch.zeros(1, 0, dtype=torch.float32), torch.zeros(0, dtype=torch.int64), 1)
    for bad in (-2, 2):
        with pytest.raises(ValueError, match=rf"labels run from .*{bad}.*wanted 0 to 1"):
            _rank(torch.zeros(1, 2, dtype=torch.float32), torch.tensor([0, bad]), 2)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(-2, 2), st.integers(-1, 3)), min_size=1, max_size=40),
    st.integers(1, 20),
)
def test_purity_is_that_of_a_loop(rows, k):
    values = torch.tensor([float(value) for value, _ in rows], dtype=torch.float32)
    labels = torch.tensor([label for _, label in rows])
    order = sorted(range(len(rows)), key=lambda row: (-rows[row][0], row))[:k]
    assert top_rows(values, k).tolist() == order
    counts = Counter(rows[row][1] for row in order)
    del counts[-1]
    assert purity_at_k(values, labels, k) == max(counts.values(), default=0) / len(order)


def test_purity_is_of_the_sixteen_highest_unless_told():
    labels = torch.tensor([0] * 16 + [1] * 84)
    assert purity_at_k(torch.arange(100.0, dtype=torch.float32).flip(0), labels) == 1.0
    assert purity_at_k(torch.arange(100.0, dtype=torch.float32).flip(0), labels, 32) == 0.5
    # All equal: the lowest rows.
    assert purity_at_k(torch.zeros(100, dtype=torch.float32), labels) == 1.0
    for values, k in (
        (torch.zeros(0, dtype=torch.float32), 16),
        (torch.zeros(3, dtype=torch.float32), 0),
    ):
        with pytest.raises(ValueError, match="wanted at least 1"):
            purity_at_k(values, torch.zeros(len(values), dtype=torch.int64), k)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(0, 10_000))
def test_the_strongest_examples_are_those_of_a_loop(patches, n_examples, k, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-2, 3, (2, n_examples * patches), generator=generator).float()
    counted = torch.rand(n_examples * patches, generator=generator, dtype=torch.float32) < 0.7
    found = strongest_examples(values, counted, patches, k)
    for feature in range(2):
        ranked = []
        for example in range(n_examples):
            rows = range(example * patches, (example + 1) * patches)
            patch, top = -1, float("-inf")
            for number, row in enumerate(rows):
                if counted[row] and values[feature, row] > top:
                    patch, top = number, float(values[feature, row])
            ranked.append((-top, example, patch))
        wanted = sorted(ranked)[:k]
        assert found["example"][feature].tolist() == [example for _, example, _ in wanted]
        assert found["patch"][feature].tolist() == [patch for _, _, patch in wanted]
        maps = values[feature].view(n_examples, patches)
        assert torch.equal(found["strength"][feature], maps[found["example"][feature]])

"""Counts of predictions against those of `judge`, and against a loop over float64 rows."""

import dataclasses

import pytest
import torch

from assay.codes import Codes, Format
from assay.numerics.codes import ComputedCodes, TensorCodes, TopKCodes, sparsify
from assay.numerics.probe import LogisticProbe1d, confusion, count_predictions

N_CLASSES = 5


def some_labels(n_rows, seed=0):
    """Classes 0 to 3 of 5, and rows of no class."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, N_CLASSES - 1, (n_rows,), generator=generator)


def some_values(labels, n_features=9, seed=0):
    """Signed features, many values of them 0, that tell classes apart; the last is constant."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(labels), n_features, generator=generator)
    values += 2 * torch.randn(N_CLASSES + 1, n_features, generator=generator)[labels]
    values *= torch.rand(values.shape, generator=generator) < 0.6
    values[:, -1] = 1.5
    return values


class Sparse:
    """A tensor as top-K codes."""

    format: Format = "sparse"

    def __init__(self, values, k):
        self.values = values
        self.k: int | None = k
        self.n_rows, self.n_features = values.shape

    def batches(self, batch_size, start=0):
        for first in range(start, self.n_rows, batch_size):
            yield sparsify({"values": self.values[first : first + batch_size]}, top_k=self.k)


def loop(probe, values, labels):
    """True positives and predicted, one probe and row at a time."""
    found = torch.zeros(2, *probe.coef_.shape, dtype=torch.float64)
    for j, c in torch.cartesian_prod(*map(torch.arange, probe.coef_.shape)).tolist():
        w, b = float(probe.coef_standardized_[j, c]), float(probe.intercept_standardized_[j, c])
        std = float(probe.feature_std_[j]) or 1.0
        for x, label in zip(values[:, j].double().tolist(), labels.tolist(), strict=True):
            predicted = b + w * (x - float(probe.feature_mean_[j])) / std >= 0
            found[0, j, c] += predicted and label == c
            found[1, j, c] += predicted
    found[:, :, ~probe.fitted_classes_] = torch.nan
    return found


@pytest.mark.parametrize("form", ["dense", "sparse", "first of more"])
@pytest.mark.parametrize("slab_rows", [7, 4096])
def test_counts_are_those_of_a_loop_and_of_judge(form, slab_rows, monkeypatch):
    monkeypatch.setattr(confusion, "_FEATURES", 4)
    train, labels = some_labels(300), some_labels(200, seed=1)
    values = [some_values(train), some_values(labels, seed=2)]
    forms: dict[str, list[Codes]] = {
        "dense": [TensorCodes(each) for each in values],
        "sparse": [Sparse(each, 9) for each in values],
        "first of more": [TopKCodes(Sparse(each, 6), 3) for each in values],
    }
    codes = forms[form]
    if form == "first of more":
        values = [
            torch.zeros_like(each).scatter_(1, kept["indices"], kept["values"])
            for each in values
            for kept in [sparsify({"values": each}, top_k=3)]
        ]
    probe = LogisticProbe1d(1e-3).fit(codes[0], train, N_CLASSES)
    assert (probe.coef_ < 0).any() and (probe.coef_ > 0).any()
    assert probe.fitted_classes_.tolist() == [True] * 4 + [False]
    for each, dense, wanted in zip(codes, values, (train, labels), strict=True):
        told = []
        hits, predicted = count_predictions(
            probe.fitted_,
            each,
            wanted,
            slab_rows=slab_rows,
            progress=lambda *now, told=told: told.append(now),
        )
        assert told[-1] == ("counted", len(wanted), len(wanted))
        judged = probe.judge(each, wanted)
        for found, ours, theirs in zip(
            loop(probe, dense, wanted),
            (hits, predicted),
            (judged.true_positives, judged.predicted),
            strict=True,
        ):
            assert ours.dtype == torch.float64
            torch.testing.assert_close(ours, found, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert predicted[:, :4].sum() > 0
    assert (predicted > hits)[:, :4].any()


def test_one_hot_codes_are_counted():
    labels = some_labels(400)
    indices = torch.where(labels >= 0, labels, 4)
    indices[::5] = 5

    def stream(batch_size, start):
        for first in range(start, len(indices), batch_size):
            yield {"indices": indices[first : first + batch_size]}

    codes = ComputedCodes("onehot", len(indices), 7, 1, stream)
    probe = LogisticProbe1d(1e-3).fit(codes, labels, N_CLASSES)
    hits, predicted = count_predictions(probe.fitted_, codes, labels, slab_rows=33)
    judged = probe.judge(codes, labels)
    torch.testing.assert_close(hits, judged.true_positives, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(predicted, judged.predicted, rtol=0, atol=0, equal_nan=True)
    assert hits[:4, :4].diagonal().min() > 0
    dense = torch.nn.functional.one_hot(indices, 7).float()
    torch.testing.assert_close(
        torch.stack([hits, predicted]), loop(probe, dense, labels), equal_nan=True
    )


@pytest.mark.parametrize(("weight", "expected"), [(1.0, 3), (-1.0, 2)])
def test_values_on_the_threshold_are_predicted(weight, expected):
    values = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    fitted = LogisticProbe1d(1e-3).fit(values, torch.tensor([0, 1, 0, 1]), 2).fitted_
    one = torch.ones_like(fitted.coef_standardized)
    fitted = dataclasses.replace(
        fitted,
        coef_standardized=weight * one,
        intercept_standardized=-weight * one,
        feature_mean=torch.zeros(1, dtype=torch.float64),
        feature_std=torch.ones(1, dtype=torch.float64),
    )
    _, predicted = count_predictions(fitted, values, torch.tensor([0, 1, 0, 1]))
    assert predicted.tolist() == [[expected] * 2]


def test_codes_of_another_model_and_numbers_that_are_none_are_refused():
    labels = some_labels(50)
    values = some_values(labels)
    fitted = LogisticProbe1d(1e-3).fit(values, labels, N_CLASSES).fitted_
    with pytest.raises(ValueError, match="codes have 8 features, wanted 9, as in fit"):
        count_predictions(fitted, values[:, :8], labels)
    with pytest.raises(ValueError, match="labels"):
        count_predictions(fitted, values, labels[:-1])
    values[3, 2] = torch.nan
    with pytest.raises(ValueError, match="row 3, feature 2 is NaN"):
        count_predictions(fitted, values, labels)
    wrong = {"values": torch.ones(50, 1), "indices": torch.full((50, 1), 9)}
    codes = ComputedCodes("sparse", 50, 9, 1, lambda *_: iter([wrong]))
    with pytest.raises(ValueError, match="codes name features 9 to 9, wanted 0 to 8"):
        count_predictions(fitted, codes, labels)

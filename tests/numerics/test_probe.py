"""Probes against scikit-learn and an extended-precision solver of one pair at a time, on data easy
and hard.
"""

import dataclasses
import doctest
from itertools import product
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, precision_recall_fscore_support
from sklearn.utils.class_weight import compute_sample_weight

from assay.numerics.codes import ComputedCodes, TopKCodes, as_codes, gather_columns
from assay.numerics.probe import (
    CertificateError,
    LogisticProbe1d,
    certify_sweep,
    count_table,
    estimator,
    fit_sweep,
    judge_sweep,
    labeled,
    sketch,
    solver,
    state,
)
from assay.numerics.probe.cells import CellMap
from assay.numerics.probe.logistic import slab_of_rows
from assay.numerics.probe.passes import SketchPass
from assay.numerics.probe.sketch import FeatureSketch

KINDS = [
    "gaussian",
    "heavy",
    "sparse",
    "onehot",
    "constant",
    "separable",
    "rare",
    "invdist",
    "outlier",
    "offset",
    "scales",
]
WEIGHTS: list[Literal["balanced"] | None] = [None, "balanced"]
SCALES = {"scales": torch.tensor([1e-6, 1e-3, 1e3, 1e6], dtype=torch.float32)}


def _make(kind, n_rows=300, n_classes=3, seed=0):
    """Features (rows, 4) and labels, some of them -1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, n_classes, (n_rows,), generator=generator)
    if kind == "rare":
        labels = torch.where(
            torch.rand(n_rows, generator=generator, dtype=torch.float32) < 0.99, 0, labels
        )
    x = torch.randn(n_rows, 4, generator=generator, dtype=torch.float32)
    x = x + torch.randn(n_classes + 1, 4, generator=generator, dtype=torch.float32)[labels]
    if kind == "heavy":
        x = x / torch.randn(n_rows, 4, generator=generator, dtype=torch.float32)
    elif kind == "sparse":
        x = (x - 1).clamp(min=0)
    elif kind == "onehot":
        x = torch.nn.functional.one_hot((x[:, 0] * 2).round().long() % 4, 4).float()
    elif kind == "constant":
        x[:, 0], x[:, 1] = 0.1, 0.0
    elif kind == "separable":
        x = x * 0.01 + labels[:, None] * torch.tensor([1.0, -1.0, 0.1, 10.0], dtype=torch.float32)
    elif kind == "invdist":
        x = 1 / (x.abs() + 1e-6)
    elif kind == "outlier":
        x[0] = 1e30
    return (
        x * SCALES.get(kind, torch.ones(4, dtype=torch.float32)) + (1e5 if kind == "offset" else 0),
        labels,
        n_classes,
    )


class _Direct:
    """One probe by Newton's method with backtracking on the rows, in extended precision, from the
    definition alone.
    """

    def __init__(self, x, y, ridge, class_weight=None):
        x, self.y = x.numpy().astype(np.longdouble), y.numpy().astype(np.longdouble)
        std = x.std() if x.min() != x.max() else np.longdouble(1)
        self.x = (x - x.mean()) / std
        p = self.y.mean()
        self.weights = np.ones_like(self.x)
        self.b0 = np.log(p / (1 - p))
        if class_weight == "balanced":
            self.weights = np.where(self.y > 0, 1 / (2 * p), 1 / (2 * (1 - p)))
            self.b0 = np.longdouble(0)
        self.ridge = ridge

    def ce(self, theta):
        z = theta[0] + theta[1] * self.x
        return (self.weights * (np.maximum(z, 0) + np.log1p(np.exp(-abs(z))) - self.y * z)).mean()

    def objective(self, theta):
        return self.ce(theta) + self.ridge / 2 * (theta[1] ** 2 + (theta[0] - self.b0) ** 2)

    def solve(self):
        """The optimum b, w, and the curvature of the loss there, without the ridge, along w at the
        best b.
        """
        theta = np.array([self.b0, 0], dtype=np.longdouble)
        value = self.objective(theta)
        for _ in range(500):
            sigma = np.exp(-np.logaddexp(0, -(theta[0] + theta[1] * self.x)))
            off = self.weights * (sigma - self.y)
            gradient = np.array([off.mean(), (off * self.x).mean()]) + self.ridge * (
                theta - [self.b0, 0]
            )
            curvature = self.weights * sigma * (1 - sigma)
            bb, bw, ww = (
                curvature.mean(),
                (curvature * self.x).mean(),
                (curvature * self.x * self.x).mean(),
            )
            left = ww - bw * bw / max(bb, np.longdouble(1e-300))
            bb, ww = bb + self.ridge, ww + self.ridge
            step = np.array(
                [ww * gradient[0] - bw * gradient[1], bb * gradient[1] - bw * gradient[0]]
            )
            step = step / (bb * ww - bw * bw)
            slope, size = (step * gradient).sum(), np.longdouble(1)
            if slope < 1e-26:
                return theta, left
            # So near that the objective no longer tells, Newton's steps are right as they are.
            while (
                slope > 1e-15 and self.objective(theta - size * step) > value - size * slope / 1e4
            ):
                size /= 2
            theta = theta - size * step
            value = self.objective(theta)
        raise AssertionError("the reference did not converge")


def _theta(probe, feature, c):
    found = probe.intercept_standardized_[feature, c], probe.coef_standardized_[feature, c]
    return np.array([float(each) for each in found], dtype=np.longdouble)


def _as_format(x, code_format):
    """The same numbers as dense, sparse (every other feature slot shuffled) or one-hot codes."""
    n_rows, n_features = x.shape
    if code_format == "dense":
        arrays = {"values": x}
    elif code_format == "sparse":
        order = torch.arange(n_features).flip(0).expand(n_rows, -1)
        arrays = {"values": x.gather(1, order), "indices": order}
    else:
        arrays = {"indices": x.argmax(1)}

    def stream(batch_size, start):
        for first in range(start, n_rows, batch_size):
            yield {name: array[first : first + batch_size] for name, array in arrays.items()}

    k = next(iter(arrays.values())).shape[-1] if code_format != "onehot" else 1
    return ComputedCodes(code_format, n_rows, n_features, k, stream)


def _fit(x, labels, n_classes, class_weight=None, **settings):
    """A probe that takes a sketch for good enough, or goes on from it, as `settings` say."""
    probe = LogisticProbe1d(class_weight=class_weight)
    data = labeled.LabeledCodes(as_codes(x), labels, n_classes)
    (probe.fitted_,) = solver.Fitting(dataclasses.replace(probe.settings, **settings), data).run()
    return probe


def _everything(probe, codes, labels):
    judged = probe.judge(codes, labels)
    return {
        **probe.state_dict(),
        "loss": judged.loss,
        "ap": judged.average_precision,
        "hits": judged.true_positives,
        "predicted": judged.predicted,
    }


def _assert_same(mine, other, atol=1e-13, but=()):
    assert mine.keys() == other.keys()
    for name in mine.keys() - set(but):
        np.testing.assert_allclose(mine[name], other[name], rtol=1e-9, atol=atol, err_msg=name)


def _check_against_the_direct_solver(probe, x, labels, n_classes):
    """Every pair: the optimum, the reported loss, and w where there is one to speak of."""
    assert probe.converged_.all()
    for feature in range(x.shape[1]):
        for c in range(n_classes):
            direct = _Direct(x[:, feature], labels == c, probe.ridge, probe.class_weight)
            best, curvature = direct.solve()
            theta = _theta(probe, feature, c)
            assert direct.objective(theta) - direct.objective(best) <= 1e-9
            assert direct.ce(theta) - direct.ce(best) <= 1e-9
            assert abs(direct.ce(theta) - float(probe.loss_[feature, c])) <= 1e-8
            # Where the rows' own curvature is below the ridge's, a class is separable: w is the
            # ridge's then.
            if curvature > probe.ridge or probe.feature_std_[feature] == 0:
                assert abs(theta[1] - best[1]) <= 1e-5 * (1 + abs(best[1]))


@pytest.mark.parametrize("class_weight", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_is_at_the_optimum_of_the_direct_solver(kind, class_weight):
    x, labels, n_classes = _make(kind, n_rows=2500)
    codes = _as_format(
        x, "onehot" if kind == "onehot" else "sparse" if kind == "sparse" else "dense"
    )
    probe = LogisticProbe1d(class_weight=class_weight, slab_rows=1000).fit(codes, labels, n_classes)
    assert (probe.n_iter_ <= 60).all()
    assert probe.fitted_classes_.all()
    _check_against_the_direct_solver(probe, x, labels, n_classes)


@pytest.mark.parametrize("class_weight", WEIGHTS)
@pytest.mark.parametrize("kind", ["gaussian", "separable", "onehot", "heavy"])
def test_a_larger_ridge_too(kind, class_weight):
    x, labels, n_classes = _make(kind)
    codes = _as_format(x, "onehot" if kind == "onehot" else "dense")
    probe = LogisticProbe1d(1e-2, class_weight=class_weight).fit(codes, labels, n_classes)
    _check_against_the_direct_solver(probe, x, labels, n_classes)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(KINDS),
    st.integers(2, 40),
    st.integers(1, 3),
    st.integers(0, 9999),
    st.sampled_from(WEIGHTS),
)
def test_tiny_sets_reach_their_optimum(kind, n_rows, n_classes, seed, class_weight):
    x, labels, _ = _make(kind, n_rows, n_classes, seed)
    probe = LogisticProbe1d(class_weight=class_weight).fit(x, labels, n_classes)
    assert probe.converged_.all()
    for c in range(n_classes):
        finite = 0 < int((labels == c).sum()) < n_rows
        assert bool(probe.fitted_classes_[c]) == finite
        assert bool(probe.coef_[:, c].isfinite().all()) == finite
        if finite:
            direct = _Direct(x[:, 3], labels == c, 1e-8, class_weight)
            theta = _theta(probe, 3, c)
            assert abs(direct.objective(theta) - direct.objective(direct.solve()[0])) <= 1e-9
            assert abs(direct.ce(theta) - float(probe.loss_[3, c])) <= 1e-8


@pytest.mark.parametrize("class_weight", WEIGHTS)
@pytest.mark.parametrize(
    "kind", ["gaussian", "heavy", "sparse", "onehot", "rare", "offset", "scales"]
)
def test_the_loss_is_that_of_scikit_learn(kind, class_weight):
    x, labels, n_classes = _make(kind, n_rows=2500)
    ridge = 1e-8
    probe = LogisticProbe1d(ridge, class_weight=class_weight).fit(x, labels, n_classes)
    compared = 0
    for feature in range(4):
        column = (x[:, feature].double() - probe.feature_mean_[feature]) / probe.feature_std_[
            feature
        ]
        for c in range(n_classes):
            y = (labels == c).numpy()
            model = LogisticRegression(
                C=1 / (ridge * len(y)), tol=1e-12, max_iter=1000, class_weight=class_weight
            )
            model.fit(column[:, None].numpy(), y)
            z = model.decision_function(column[:, None].numpy())
            weights = (
                np.ones(len(y)) if class_weight is None else compute_sample_weight("balanced", y)
            )
            ce = np.average(np.logaddexp(0, z) - y * z, weights=weights)
            # scikit-learn's ridge leaves b alone: ours is the lower objective, and not by much.
            direct = _Direct(x[:, feature], labels == c, ridge, class_weight)
            theirs = np.array([model.intercept_[0], model.coef_[0, 0]])
            np.testing.assert_allclose(ce, float(direct.ce(theirs)), rtol=1e-6)
            gap = direct.objective(theirs) - direct.objective(_theta(probe, feature, c))
            assert -1e-9 <= gap <= 1e-6
            assert abs(float(probe.loss_[feature, c]) - ce) <= 1e-7 + 100 * gap
            w = float(probe.coef_standardized_[feature, c])
            if (
                abs(w) < 30
            ):  # else the class is nearly separable, and the ridge on b, which is ours alone, shows
                compared += 1
                assert abs(theirs[1] - w) <= 1e-5 * (1 + abs(w))
    assert compared >= 6


@pytest.mark.parametrize("class_weight", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_of_other_rows_is_that_of_a_loop(kind, class_weight):
    x, labels, n_classes = _make(kind)
    probe = LogisticProbe1d(class_weight=class_weight).fit(x, labels, n_classes)
    held, held_labels, _ = _make(kind, n_rows=400, seed=1)
    judged = probe.judge(held, held_labels)
    loss, precision, confusion = judged.loss, judged.average_precision, judged.confusion()
    assert loss.dtype == precision.dtype == torch.float64
    for feature in range(4):
        standard = (held[:, feature].double() - probe.feature_mean_[feature]) / (
            probe.feature_std_[feature] or 1.0
        )
        for c in range(n_classes):
            y = (held_labels == c).numpy()
            w = float(probe.coef_standardized_[feature, c])
            z = (probe.intercept_standardized_[feature, c] + w * standard).numpy()
            p = float(probe.base_rate_[c])
            weights = np.ones(len(y)) if class_weight is None else np.where(y, 1 / p, 1 / (1 - p))
            ce = np.average(np.logaddexp(0, z) - y * z, weights=weights)
            np.testing.assert_allclose(loss[feature, c], ce, rtol=1e-9, atol=2e-9)
            score = -held[:, feature] if w < 0 else held[:, feature]
            if not y.any():
                assert precision[feature, c].isnan()
                assert judged.recall[feature, c].isnan()
                assert judged.f1[feature, c].isnan()
                continue
            np.testing.assert_allclose(
                precision[feature, c], average_precision_score(y, score.double()), rtol=1e-9
            )
            clear = abs(z) > 1e-9 * (1 + abs(w))  # p is one half to the last digit otherwise
            tp, fp, fn, tn = (
                float(confusion[name][feature, c]) for name in ("tp", "fp", "fn", "tn")
            )
            if clear.all():
                assert (tp, fp) == (int(((z >= 0) & y).sum()), int(((z >= 0) & ~y).sum()))
                assert (fn, tn) == (int(((z < 0) & y).sum()), int(((z < 0) & ~y).sum()))
                found = [
                    float(getattr(judged, name)[feature, c])
                    for name in ("precision", "recall", "f1")
                ]
                wanted = precision_recall_fscore_support(
                    y, z >= 0, average="binary", zero_division=0
                )[:3]
                np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_average_precision_does_not_depend_on_the_order_of_rows(kind):
    x, labels, n_classes = _make(kind)
    probe = LogisticProbe1d().fit(x, labels, n_classes)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    found, wanted = probe.judge(x[order], labels[order]), probe.judge(x, labels)
    np.testing.assert_allclose(found.average_precision, wanted.average_precision, rtol=1e-13)


def _spikes(n_rows=2600):
    """Two features; below 1, class 0 and rows of no class are spread out, and class 1 is a little
    above 1, within a cell.
    """
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(-1, 2, (n_rows,), generator=generator)
    x = torch.randn(n_rows, 2, generator=generator, dtype=torch.float32)
    below, above = 1 - 2e-3 * x[:, 0].abs(), 1 + 1e-3 * (1 + x[:, 0].abs())
    x[:, 0] = torch.where(
        labels == 1, above, torch.where(labels == 0, below, x[:, 0].clamp(max=0.9))
    )
    return x, labels


@pytest.mark.parametrize("class_weight", WEIGHTS)
@pytest.mark.parametrize("fine_bits", [4, 10, 14])
def test_what_the_sketch_does_not_settle_is_settled_finer_or_on_the_rows(
    monkeypatch, fine_bits, class_weight
):
    x, labels = _spikes()
    sketches, rows = [], []
    monkeypatch.setattr(solver, "slab_of_rows", lambda *a: (rows.append(1), slab_of_rows(*a))[1])
    of_rows = CellMap.of_rows
    monkeypatch.setattr(CellMap, "of_rows", lambda *a: (sketches.append(a[1:]), of_rows(*a))[1])
    probe = _fit(x, labels, 2, class_weight, fine_bits=fine_bits, fine_rows=100)
    assert probe.n_refined_ > 0
    assert sketches == ([(), (fine_bits,)] if class_weight is None else [()])
    # Cells of 2^-10 units are narrower than the gap.
    assert bool(rows) == (fine_bits < 10 or class_weight is not None)
    _check_against_the_direct_solver(probe, x, labels, 2)


@pytest.mark.parametrize("code_format", ["dense", "sparse"])
@pytest.mark.parametrize("class_weight", WEIGHTS)
@pytest.mark.parametrize("scale", [1e-4, 1e-7, 1e-8, 1e-10, 1e-20, 1e-30])
def test_a_feature_that_is_0_at_first_and_tiny_later_is_not_lost(scale, class_weight, code_format):
    """The map of cells is drawn from the first rows, which say nothing of the rest."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 2, (3000,), generator=generator)
    x = scale * (labels + 0.5 * torch.randn(3000, generator=generator, dtype=torch.float32))[
        :, None
    ].repeat(1, 2)
    x[:600, 0] = 0
    codes = _as_format(x, code_format)
    probe = LogisticProbe1d(class_weight=class_weight, slab_rows=500).fit(codes, labels, 2)
    std = x[:, 0].double().std(unbiased=False)
    assert float(probe.feature_std_[0]) == pytest.approx(float(std), rel=1e-9)
    _check_against_the_direct_solver(probe, x, labels, 2)
    every = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    probe.certify(codes, labels, every)
    # The rows' own scale is what the ridge is held against, and the loss.
    probe.feature_std_.mul_(1.001)
    probe.feature_mean_.add_(0.1 * std)
    with pytest.raises(CertificateError):
        probe.certify(codes, labels, every)


@pytest.mark.parametrize("far", [1e6, 1e12, 1e15, 1e20, 1e30])
def test_the_loss_on_other_rows_stands_beside_one_that_is_far_out(far):
    x, labels, n_classes = _make("gaussian", n_rows=2500)
    probe = LogisticProbe1d().fit(x, labels, n_classes)
    held, held_labels, _ = _make("gaussian", n_rows=1200, seed=1)
    held[77] = far
    judged = probe.judge(held, held_labels)
    for feature in range(4):
        standard = (held[:, feature].double() - probe.feature_mean_[feature]) / probe.feature_std_[
            feature
        ]
        for c in range(n_classes):
            y = (held_labels == c).double()
            z = (
                probe.intercept_standardized_[feature, c]
                + probe.coef_standardized_[feature, c] * standard
            )
            exact = float((torch.nn.functional.softplus(z) - y * z).mean())
            assert float(judged.loss[feature, c]) == pytest.approx(exact, rel=1e-9, abs=2e-9)
    best = torch.tensor([2, 0, 1])
    values = held.T[best].contiguous()
    assert probe.certify_loss(values, best, held_labels, judged.loss) <= 1e-9


@pytest.mark.parametrize("class_weight", WEIGHTS)
@pytest.mark.parametrize("code_format", ["dense", "sparse"])
def test_workers_sketches_merged_are_fitted_as_one_pass(code_format, class_weight):
    x, labels, n_classes = _make("gaussian", n_rows=2500)
    probe = LogisticProbe1d(class_weight=class_weight)
    first = probe.sketch(_as_format(x[:900], code_format), labels[:900], n_classes)
    second = probe.sketch(_as_format(x[900:], code_format), labels[900:], n_classes, like=first)
    first.merge(second)
    shared = probe.fit_sketch(first)
    whole = LogisticProbe1d(class_weight=class_weight).fit(
        _as_format(x, code_format), labels, n_classes
    )
    assert shared.converged_.all()
    for name, value in whole.state_dict().items():
        if name != "n_iter":
            torch.testing.assert_close(shared.state_dict()[name], value, rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match="one-hot codes, which are counted"):
        probe.sketch(_as_format(x, "onehot"), labels, n_classes)


def test_what_a_sketch_alone_does_not_settle_is_said():
    x, labels = _spikes()
    probe = LogisticProbe1d()
    probe.fit_sketch(probe.sketch(x, labels, 2))
    assert not probe.converged_.all()


def test_a_loss_on_other_rows_that_is_not_theirs_fails():
    x, labels, n_classes = _make("gaussian", n_rows=500)
    probe = LogisticProbe1d().fit(x, labels, n_classes)
    loss = probe.judge(x, labels).loss
    best = torch.tensor([2, 0, 1])
    assert probe.certify_loss(x.T[best].contiguous(), best, labels, loss) <= 1e-9
    loss[0, 1] += 1e-6
    with pytest.raises(CertificateError, match="differs by up to 1e-06 nats"):
        probe.certify_loss(x.T[best].contiguous(), best, labels, loss)


def test_codes_that_are_mostly_0_are_cut_finely_where_they_are_not():
    """As an autoencoder's: whether they come as dense or sparse codes, few pairs are left to the
    rows.
    """
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(0, 4, (20_000,), generator=generator)
    active = torch.rand(20_000, 8, generator=generator, dtype=torch.float32) < 0.05 + 0.2 * (
        labels[:, None] == torch.arange(8) % 4
    )
    x = torch.where(
        active,
        torch.rand(20_000, 8, generator=generator, dtype=torch.float32).exp()
        * (1 + labels[:, None]),
        0.0,
    )
    x[0] = 1000.0
    probes = {
        name: LogisticProbe1d().fit(_as_format(x, name), labels, 4) for name in ("dense", "sparse")
    }
    assert probes["dense"].n_refined_ <= probes["sparse"].n_refined_ + 2
    torch.testing.assert_close(probes["dense"].coef_, probes["sparse"].coef_, rtol=1e-6, atol=1e-9)


def test_two_far_rows_do_not_send_a_feature_to_the_rows(monkeypatch):
    """1 / (d + 1e-6) of tokens on a center: the finer cells go as far as the values do."""
    rows = []
    monkeypatch.setattr(solver, "slab_of_rows", lambda *a: (rows.append(1), slab_of_rows(*a))[1])
    x, labels, n_classes = _make("gaussian", n_rows=2500)
    x[0], x[1] = 1e6, 0.7e6
    probe = _fit(x, labels, n_classes, fine_rows=100)
    assert not rows
    _check_against_the_direct_solver(probe, x, labels, n_classes)


def test_matrices_are_decomposed_in_batches_that_the_device_takes(monkeypatch):
    x, labels, n_classes = _make("gaussian", n_rows=2500)
    whole = LogisticProbe1d().fit(x, labels, n_classes)
    sizes = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(
        torch.linalg, "eigh", lambda matrices: (sizes.append(len(matrices)), eigh(matrices))[1]
    )
    monkeypatch.setattr(sketch, "_MATRICES", 100)
    parts = LogisticProbe1d().fit(x, labels, n_classes)
    assert len(sizes) > 1
    assert max(sizes) == 100
    assert torch.equal(parts.coef_, whole.coef_)


def test_row_gathering_keeps_to_the_memory_whatever_slab_features_says(monkeypatch):
    x, labels, n_classes = _make("gaussian", n_rows=2500)
    monkeypatch.setattr(labeled, "_SOLVED", 1)
    monkeypatch.setattr(labeled, "free_bytes", lambda _: 4 * 8 * 2500 * 2)  # room for two columns
    gathered = []
    monkeypatch.setattr(
        labeled,
        "gather_columns",
        lambda codes, wanted, *rest: (
            gathered.append(sum(len(f) for f, _ in wanted)),
            gather_columns(codes, wanted, *rest),
        )[1],
    )
    data = labeled.LabeledCodes(as_codes(x), labels, n_classes, slab_features=4)
    solver.Fitting(dataclasses.replace(LogisticProbe1d().settings, ce_error=0.0), data).run()
    assert max(gathered) == 2


@pytest.mark.parametrize("name", ["ce_error", "w_error"])
def test_either_error_is_enough_to_refine_a_pair(name):
    x, labels, n_classes = _make("gaussian", n_rows=2500)
    assert LogisticProbe1d().fit(x, labels, n_classes).n_refined_ == 0
    probe = _fit(x, labels, n_classes, **{name: 0.0})
    assert probe.n_refined_ == 12
    _check_against_the_direct_solver(probe, x, labels, n_classes)


def test_losses_on_other_rows_are_refined_too():
    x, labels = _spikes(400)
    held, held_labels = _spikes(2600)
    probe = LogisticProbe1d().fit(x, labels, 2)
    loss = probe.judge(held, held_labels).loss
    for feature in range(2):
        standard = (held[:, feature].double() - probe.feature_mean_[feature]) / probe.feature_std_[
            feature
        ]
        for c in range(2):
            y = (held_labels == c).double()
            z = (
                probe.intercept_standardized_[feature, c]
                + probe.coef_standardized_[feature, c] * standard
            )
            assert (
                abs(
                    float(loss[feature, c])
                    - float((torch.nn.functional.softplus(z) - y * z).mean())
                )
                <= 2e-9
            )


@pytest.mark.parametrize("class_weight", WEIGHTS)
def test_losses_on_other_rows_are_taken_on_finer_cells_and_on_the_rows_where_the_bound_wants_it(
    monkeypatch, class_weight
):
    x, labels, n_classes = _make("gaussian", n_rows=2500)
    probe = LogisticProbe1d(class_weight=class_weight).fit(x, labels, n_classes)
    sketches, rows = [], []
    of_rows = CellMap.of_rows
    monkeypatch.setattr(CellMap, "of_rows", lambda *a: (sketches.append(a[1:]), of_rows(*a))[1])
    monkeypatch.setattr(state, "slab_of_rows", lambda *a: (rows.append(1), slab_of_rows(*a))[1])
    for ce_error in (torch.inf, 0.0):
        probe.fitted_.settings = dataclasses.replace(
            probe.settings, ce_error=ce_error, fine_bits=12
        )
        np.testing.assert_allclose(probe.judge(x, labels).loss, probe.loss_, atol=1e-9)
        assert sketches == ([(), (12,)] if ce_error == 0 and class_weight is None else [()])
        assert bool(rows) == (ce_error == 0)
        sketches.clear()


def test_one_label_one_code_and_the_ridge_change_what_they_should():
    x, labels, n_classes = _make("gaussian", n_rows=2500)
    before = LogisticProbe1d().fit(x, labels, n_classes)

    flipped = labels.clone()
    row = int((labels == 0).nonzero()[7])
    flipped[row] = 1
    after = LogisticProbe1d().fit(x, flipped, n_classes)
    np.testing.assert_allclose(after.coef_[:, 2], before.coef_[:, 2], rtol=1e-9)
    for c, sign in ((0, -1), (1, 1)):
        # The loss is linear in the label: at the old optimum it falls by z / N for each label that
        # is set.
        z = before.intercept_[:, c] + before.coef_[:, c] * x[row].double()
        moved = (
            before.from_state(before.state_dict()).judge(x, flipped).loss[:, c] - before.loss_[:, c]
        )
        np.testing.assert_allclose(moved, -sign * z / len(x), rtol=1e-6, atol=1e-11)
    _check_against_the_direct_solver(after, x, flipped, n_classes)

    changed = x.clone()
    changed[row, 1] += 0.5
    after = LogisticProbe1d().fit(changed, labels, n_classes)
    for feature in (0, 2, 3):
        np.testing.assert_allclose(after.coef_[feature], before.coef_[feature], rtol=1e-9)
    np.testing.assert_allclose(
        after.feature_mean_[1] - before.feature_mean_[1],
        (changed - x)[row, 1].double() / len(x),
        rtol=1e-6,
    )
    _check_against_the_direct_solver(after, changed, labels, n_classes)

    ridge = 1e-6
    after = LogisticProbe1d(ridge).fit(x, labels, n_classes)
    # By the envelope theorem the optimum rises by the penalty at the optimum, to first order.
    penalty = (
        before.coef_standardized_.square()
        + (before.intercept_standardized_ - before.base_rate_.logit()).square()
    )
    at = (
        after.coef_standardized_.square()
        + (after.intercept_standardized_ - after.base_rate_.logit()).square()
    )
    rise = (after.loss_ + ridge / 2 * at) - (before.loss_ + 1e-8 / 2 * penalty)
    np.testing.assert_allclose(rise, (ridge - 1e-8) / 2 * penalty, rtol=1e-3, atol=1e-14)


def _pairs(n_features=4, n_classes=3):
    return torch.cartesian_prod(torch.arange(n_features), torch.arange(n_classes))


@pytest.mark.parametrize("class_weight", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_certificate_is_of_the_rows(kind, class_weight):
    x, labels, n_classes = _make(kind, n_rows=2500)
    codes = _as_format(x, "onehot" if kind == "onehot" else "dense")
    probe = LogisticProbe1d(class_weight=class_weight).fit(codes, labels, n_classes)
    found = probe.certify(codes, labels, _pairs())
    assert found.pairs == 12
    assert 0 <= found.ce_error <= 1e-9
    assert 0 <= found.gradient <= 1e-8
    few = probe.certify(codes, labels, torch.empty(0, 2, dtype=torch.int64), n_random=5, seed=1)
    assert 1 <= few.pairs <= 5


def test_the_certificate_fails_where_a_sketch_was_spoiled(monkeypatch):
    x, labels, n_classes = _make("gaussian", n_rows=2500)

    def spoiled(factor):
        whole = FeatureSketch.slab

        def slab(self, statistics, **options):
            self.sums[0, 2, 0, :9] *= factor
            return whole(self, statistics, **options)

        with monkeypatch.context() as patch:
            patch.setattr(FeatureSketch, "slab", slab)
            return LogisticProbe1d().fit(x, labels, n_classes)

    assert spoiled(1.0).certify(x, labels, _pairs()).ce_error < 1e-9
    with pytest.raises(
        CertificateError, match=r"over 12 probes the loss differs by .* wanted at most 1e-08"
    ):
        spoiled(1.001).certify(x, labels, _pairs())
    probe = LogisticProbe1d().fit(x, labels, n_classes)
    probe.certify(x, labels, _pairs())
    for codes, classes in ((x, labels.flip(0)), (x * 1.001, labels), (x.flip(0), labels)):
        with pytest.raises(CertificateError, match="are these not the codes and labels of the fit"):
            probe.certify(codes, classes, _pairs())
    probe.intercept_standardized_[1, 1] += (
        1e-6  # a loss that is right, of a probe that is not the best
    )
    probe.loss_[1, 1] = probe.judge(x, labels).loss[1, 1]
    with pytest.raises(CertificateError, match="its gradient is up to"):
        probe.certify(x, labels, _pairs())
    probe.loss_[1, 1] = torch.nan
    with pytest.raises(CertificateError, match="differs by up to inf"):
        probe.certify(x, labels, _pairs())


def _ranked(x):
    """The same numbers as sparse codes by falling magnitude."""
    order = x.abs().argsort(dim=1, descending=True, stable=True)
    arrays = {"values": x.gather(1, order), "indices": order}
    passes = []

    def stream(batch_size, start):
        passes.append(batch_size)
        for first in range(start, len(x), batch_size):
            yield {name: array[first : first + batch_size] for name, array in arrays.items()}

    n_rows, n_features = x.shape
    return ComputedCodes("sparse", n_rows, n_features, n_features, stream), passes


@pytest.mark.parametrize("class_weight", WEIGHTS)
@pytest.mark.parametrize("ks", [[4], [1, 4], [2, 1, 3], [None, 2]])
def test_every_k_of_a_sweep_is_fitted_and_judged_in_the_same_passes(ks, class_weight):
    x, labels, n_classes = _make("heavy", n_rows=1000)
    held, held_labels, _ = _make("heavy", n_rows=300, seed=1)
    codes, passes = _ranked(x)
    held_codes, held_passes = _ranked(held)
    probe = LogisticProbe1d(class_weight=class_weight, slab_rows=333)
    together = fit_sweep(probe, codes, labels, n_classes, ks)
    assert not hasattr(probe, "fitted_")
    assert list(together) == ks
    refined = any(each.n_refined_ for each in together.values())
    assert len(passes) == 1 + refined
    judged = judge_sweep(together, held_codes, held_labels)
    assert len(held_passes) == 1
    pairs = {k: _pairs() for k in ks}
    before = len(passes)
    certificates = certify_sweep(together, codes, labels, pairs)
    assert len(passes) == before + 1
    for k in ks:
        cut, held_cut = (TopKCodes(each, k or 4) for each in (codes, held_codes))
        alone = LogisticProbe1d(class_weight=class_weight).fit(cut, labels, n_classes)
        mine, other = together[k].state_dict(), alone.state_dict()
        for tensors, judgment in ((mine, judged[k]), (other, alone.judge(held_cut, held_labels))):
            tensors |= {"loss": judgment.loss, "ap": judgment.average_precision}
        _assert_same(mine, other, atol=1e-9, but=("n_iter",))
        assert certificates[k].ce_error < 1e-9
    with pytest.raises(
        ValueError, match="found sparse codes of 4 entries a row, wanted sparse ones of at least 5"
    ):
        fit_sweep(probe, codes, labels, n_classes, [1, 5])
    with pytest.raises(
        ValueError, match="found dense codes of 4 entries a row, wanted sparse ones"
    ):
        fit_sweep(probe, x, labels, n_classes, [2])


def test_raw_coefficients_give_the_same_scores_as_standardized_ones():
    x, labels, n_classes = _make("scales")
    probe = LogisticProbe1d(1e-3).fit(x, labels, n_classes)
    standard = (x.double() - x.double().mean(0)) / x.double().std(0, unbiased=False)
    z = probe.intercept_standardized_ + probe.coef_standardized_ * standard[:, :, None]
    np.testing.assert_allclose(
        probe.intercept_ + probe.coef_ * x.double()[:, :, None], z, rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(probe.feature_mean_, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(probe.feature_std_, x.double().std(0, unbiased=False), rtol=1e-12)
    np.testing.assert_array_equal(probe.max_abs_, x.double().abs().amax(0))
    assert probe.coef_.shape == probe.intercept_.shape == (4, n_classes)


def test_the_ridge_holds_the_standardized_weights():
    x, labels, n_classes = _make("scales")
    weak, strong = (LogisticProbe1d(ridge).fit(x, labels, n_classes) for ridge in (1e-8, 10.0))
    assert (strong.coef_standardized_.abs() < 0.1 * weak.coef_standardized_.abs()).all()
    np.testing.assert_allclose(
        strong.intercept_standardized_, weak.base_rate_.logit().expand(4, -1), atol=0.01
    )
    rescaled = LogisticProbe1d(10.0).fit(x * 1024, labels, n_classes)
    np.testing.assert_allclose(rescaled.coef_standardized_, strong.coef_standardized_, rtol=1e-9)


def test_a_constant_feature_has_no_weight_and_the_base_loss():
    x, labels, n_classes = _make("constant")
    probe = LogisticProbe1d().fit(x, labels, n_classes)
    assert (probe.coef_standardized_[:2] == 0).all()
    assert probe.feature_std_[:2].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(
        probe.judge(x, labels).loss[:2], probe.base_loss(labels).expand(2, -1), rtol=1e-12
    )
    balanced = LogisticProbe1d(class_weight="balanced").fit(x, labels, n_classes)
    assert (balanced.coef_standardized_[:2] == 0).all()
    assert (balanced.intercept_standardized_[:2].abs() < 1e-20).all()
    assert (balanced.judge(x, labels).predicted[:2] == len(x)).all()  # p is one half
    share = torch.stack([(labels == c).double().mean() for c in range(n_classes)])
    np.testing.assert_allclose(
        probe.judge(x, labels).average_precision[:2], share.expand(2, -1), rtol=1e-12
    )


@pytest.mark.parametrize("code_format", ["dense", "onehot"])
def test_a_weight_of_exactly_zero_ranks_the_highest_value_first(code_format):
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float32)
    probe = LogisticProbe1d().fit(_as_format(x, code_format), torch.tensor([0, 0, -1, -1]), 1)
    assert probe.coef_.tolist() == [[0.0], [0.0]]
    precision = probe.judge(_as_format(x[:2], code_format), torch.tensor([-1, 0])).average_precision
    assert precision.tolist() == [[1.0], [0.5]]


@pytest.mark.parametrize("ridge", [1e-8, 1e-3])
def test_one_hot_codes_need_no_rows(ridge):
    x, labels, n_classes = _make("onehot")
    # And a feature that no row has.
    x = torch.cat([x, torch.zeros(len(x), 1, dtype=torch.float32)], 1)
    held, held_labels, _ = _make("onehot", n_rows=60, seed=1)
    held = torch.cat([held, torch.zeros(len(held), 1, dtype=torch.float32)], 1)
    table, dense = (
        LogisticProbe1d(ridge, slab_rows=77).fit(_as_format(x, code_format), labels, n_classes)
        for code_format in ("onehot", "dense")
    )
    mine = _everything(table, _as_format(held, "onehot"), held_labels)
    other = _everything(dense, held, held_labels)
    _assert_same(mine, other, atol=1e-9, but=("n_iter",))
    assert mine["ap"].shape == (5, n_classes)


def test_formats_slabs_and_batches_do_not_change_the_result():
    x, labels, n_classes = _make("sparse")
    held, held_labels, _ = _make("sparse", n_rows=60, seed=1)
    for class_weight in WEIGHTS:
        whole = LogisticProbe1d(class_weight=class_weight).fit(x, labels, n_classes)
        expected = _everything(whole, held, held_labels)
        for code_format in ("dense", "sparse"):
            for options in (
                {"slab_features": 1},
                {"slab_features": 3},
                {"slab_rows": 7},
                {"slab_rows": 299},
            ):
                probe = LogisticProbe1d(class_weight=class_weight, **options)
                probe.fit(_as_format(x, code_format), labels, n_classes)
                mine = _everything(probe, _as_format(held, code_format), held_labels)
                _assert_same(mine, expected, atol=1e-9, but=("n_iter",))


@pytest.mark.parametrize(("slab_features", "slabs"), [(1, 4), (2, 2), (3, 2), (None, 1), (99, 1)])
def test_each_slab_is_one_pass_and_is_told(slab_features, slabs, monkeypatch):
    monkeypatch.setattr(labeled, "_SOLVED", 1)
    x, labels, n_classes = _make("gaussian")
    codes, passes, told = _as_format(x, "dense"), [], []
    stream = codes.stream

    def counted(batch_size, start):
        passes.append(batch_size)
        return stream(batch_size, start)

    codes.stream = counted
    probe = LogisticProbe1d(slab_features=slab_features, slab_rows=50)
    probe.fit(codes, labels, n_classes, lambda *what: told.append(what))
    assert passes == [50] * slabs
    assert [what for what in told if what[0] == "rows"] == [
        ("rows", min(50 * i, 300), 300) for i in range(1, 7)
    ] * slabs
    assert [what[1:] for what in told if what[0] == "probes"][-1] == (4, 4)
    passes.clear()
    told.clear()
    probe.judge(codes, labels, lambda *what: told.append(what))
    assert passes == [50] * slabs
    assert told[-1] == ("ranked", 4, 4)
    assert {what[0] for what in told} == {"gathered", "ranked"}


def test_what_a_quarter_of_the_free_memory_holds_is_worked_on_together(monkeypatch):
    monkeypatch.setattr(labeled, "_SOLVED", 1)
    x, labels, n_classes = _make("gaussian")
    widths = []
    monkeypatch.setattr(
        solver,
        "SketchPass",
        lambda data, columns, *a, **b: (
            widths.append(columns.stop - columns.start),
            SketchPass(data, columns, *a, **b),
        )[1],
    )
    for features, balanced, wanted in ((3, False, [3, 1]), (0, False, [1] * 4), (3, True, [3, 1])):
        each = FeatureSketch.bytes_per_feature(n_classes, by_class=balanced)
        monkeypatch.setattr(
            labeled, "free_bytes", lambda _, each=each, n=features: 4 * each * n + 5
        )
        LogisticProbe1d(class_weight=WEIGHTS[balanced]).fit(x, labels, n_classes)
        assert widths == wanted
        widths.clear()


def test_classes_without_a_finite_intercept_are_left_out_and_named():
    x, labels, _ = _make("gaussian")
    probe = LogisticProbe1d().fit(x, labels, 4)  # class 3 has no rows
    assert probe.fitted_classes_.tolist() == [True, True, True, False]
    judged = probe.judge(x, labels)
    for matrix in (probe.coef_, probe.intercept_, judged.loss, judged.average_precision):
        assert matrix[:, :3].isfinite().all()
        assert matrix[:, 3].isnan().all()
    assert probe.base_loss(labels)[3].isnan()
    three = LogisticProbe1d().fit(x, labels, 3)
    np.testing.assert_allclose(probe.coef_[:, :3], three.coef_, rtol=1e-12)

    everything = LogisticProbe1d().fit(x, torch.zeros(len(x), dtype=torch.int64), 1)
    assert everything.converged_.all()
    assert not everything.fitted_classes_.any()
    assert everything.coef_.isnan().all()

    absent = probe.judge(x[labels != 1], labels[labels != 1]).average_precision
    assert absent[:, 1].isnan().all()
    assert absent[:, [0, 2]].isfinite().all()


def test_the_base_loss_is_that_of_the_training_prevalence_on_other_labels():
    x, labels, n_classes = _make("gaussian")
    probe = LogisticProbe1d().fit(x, labels, n_classes)
    held = torch.tensor([0, 0, 1, -1, 2, 2, 2])
    for c in range(n_classes):
        p = float((labels == c).double().mean())
        assert float(probe.base_rate_[c]) == pytest.approx(p, rel=1e-15)
        expected = -np.mean([np.log(p) if label == c else np.log(1 - p) for label in held.tolist()])
        assert float(probe.base_loss(held)[c]) == pytest.approx(expected, rel=1e-12)


def test_tolerance_and_iterations_rule_the_fit(caplog):
    x, labels, n_classes = _make("separable")
    short = LogisticProbe1d(max_iter=2).fit(x, labels, n_classes)
    assert not short.converged_.all()
    assert int(short.n_iter_.max()) == 2
    assert (
        f"{int((~short.converged_).sum())} of 12 probes are not at their optimum after 2"
        " iterations: raise max_iter" in caplog.text
    )
    loose = LogisticProbe1d(tol=1e-2).fit(x, labels, n_classes)
    tight = LogisticProbe1d().fit(x, labels, n_classes)
    assert loose.converged_.all()
    assert (loose.loss_ > tight.loss_ + 1e-9).any()
    assert tight.converged_.shape == tight.n_iter_.shape == (4, n_classes)


def test_a_probe_comes_back_from_its_state():
    x, labels, n_classes = _make("gaussian")
    probe = LogisticProbe1d().fit(x, labels, n_classes)
    copy = LogisticProbe1d.from_state(probe.state_dict())
    assert repr(copy) == repr(probe)
    _assert_same(_everything(copy, x, labels), _everything(probe, x, labels), atol=0)
    np.testing.assert_array_equal(copy.intercept_, probe.intercept_)
    assert torch.equal(copy.n_iter_, probe.n_iter_)
    assert copy.converged_.all()


def test_a_probe_shows_its_parameters_and_its_example_runs():
    x, labels, n_classes = _make("gaussian")
    probe = LogisticProbe1d(1e-3, class_weight="balanced", slab_rows=7)
    shown = (
        "LogisticProbe1d(ridge=0.001, class_weight='balanced', max_iter=200, tol=1e-16,"
        " slab_features=None, slab_rows=7)"
    )
    assert repr(probe) == shown
    assert repr(probe.fit(x, labels, n_classes)) == shown
    ran = doctest.testmod(estimator)
    assert ran.attempted == 6
    assert ran.failed == 0


def test_a_table_counts_the_rows_of_each_class_and_of_none():
    codes = _as_format(torch.eye(3, dtype=torch.float32)[[0, 0, 2, 0, 2]], "onehot")
    table = count_table(codes, torch.tensor([1, 1, 0, -1, 1]), 2, slab_rows=2)
    assert table.tolist() == [[0, 2, 1], [0, 0, 0], [1, 1, 0]]


def test_bad_inputs_are_refused():
    x, labels, n_classes = _make("gaussian")
    for ridge in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"ridge is {ridge}, wanted more than 0"):
            LogisticProbe1d(ridge)
    with pytest.raises(ValueError, match="class_weight is 'even', wanted None or 'balanced'"):
        LogisticProbe1d(class_weight="even")  # type: ignore[arg-type]  # what is refused
    for bad in (labels.int(), labels[1:], labels - 1, labels + 1):
        with pytest.raises(ValueError, match="labels"):
            LogisticProbe1d().fit(x, bad, n_classes)
    for value in (torch.nan, torch.inf):
        broken = x.clone()
        broken[7, 2] = value
        for code_format in ("dense", "sparse"):
            with pytest.raises(
                ValueError, match="row 7, feature 2 is NaN or infinity, wanted finite"
            ):
                LogisticProbe1d(slab_features=1, slab_rows=3).fit(
                    _as_format(broken, code_format), labels, n_classes
                )
    probe = LogisticProbe1d().fit(x, labels, n_classes)
    no_pairs = torch.empty(0, 2, dtype=torch.int64)

    def certify(codes, labels):
        return probe.certify(codes, labels, no_pairs)

    for width, use in product((3, 5), (probe.judge, certify)):
        with pytest.raises(ValueError, match=f"codes have {width} features, wanted 4"):
            use(torch.cat([x, x], 1)[:, :width].contiguous(), labels)
    for use in (probe.judge, certify):
        with pytest.raises(ValueError, match="labels run from -1 to 3"):
            use(x, labels + (labels == 2))
    with pytest.raises(ValueError, match="labels run from"):
        probe.base_loss(labels + (labels == 2))
    wrong = ComputedCodes("onehot", 300, 3, 1, _as_format(x, "onehot").stream)
    with pytest.raises(ValueError, match="codes name features 0 to 3, wanted 0 to 2"):
        LogisticProbe1d().fit(wrong, labels, n_classes)


def test_validation_loss_of_a_pure_cluster_is_that_of_the_optimum():
    """Where a one-hot feature is 1 for one class only, w is bounded by the ridge alone, and
    validation rows that differ pay for each error of w in full.
    """
    n_rows, pure, ridge = 1000, 50, 1e-8
    indices = torch.arange(n_rows) % 4 + 1
    indices[:pure] = 0
    labels = torch.full((n_rows,), 1)
    labels[: 2 * pure] = 0
    codes = ComputedCodes("onehot", n_rows, 5, 1, lambda *_: iter([{"indices": indices}]))
    probe = LogisticProbe1d(ridge).fit(codes, labels, 2)
    val_labels = labels.clone()
    val_labels[:3] = 1
    found = float(probe.judge(codes, val_labels).loss[0, 0])

    x = (indices.numpy() == 0).astype(np.longdouble)
    y, y_val = ((each.numpy() == 0).astype(np.longdouble) for each in (labels, val_labels))
    x = (x - x.mean()) / x.std()
    design = np.stack([np.ones_like(x), x])
    b0 = np.log(y.mean() / (1 - y.mean()))
    theta = center = np.array([b0, np.longdouble(0)])
    for _ in range(200):
        p = 1 / (1 + np.exp(-theta @ design))
        gradient = design @ (p - y) / n_rows + ridge * (theta - center)
        (a, b), (_, d) = (design * (p * (1 - p))) @ design.T / n_rows + ridge * np.eye(2)
        step = np.array([d * gradient[0] - b * gradient[1], a * gradient[1] - b * gradient[0]]) / (
            a * d - b * b
        )
        theta = theta - step / max(1, np.abs(step).max() / 2)
    z = theta @ design
    wanted = (np.logaddexp(0, z) - y_val * z).mean()
    assert abs(found - float(wanted)) < 1e-9


@pytest.mark.gpu
@pytest.mark.parametrize("class_weight", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
def test_on_cuda_the_probes_are_the_same(kind, class_weight):
    x, labels, n_classes = _make(kind, n_rows=2500)
    for code_format in ("onehot",) if kind == "onehot" else ("dense", "sparse"):
        wanted = LogisticProbe1d(class_weight=class_weight).fit(
            _as_format(x, code_format), labels, n_classes
        )
        found = LogisticProbe1d(class_weight=class_weight).fit(
            _as_format(x, code_format), labels.cuda(), n_classes
        )
        codes = _as_format(x, code_format)
        mine = {
            name: tensor.cpu() for name, tensor in _everything(found, codes, labels.cuda()).items()
        }
        theirs = _everything(wanted, codes, labels)
        # Where p is 0.5 but for rounding, a row is predicted or not by the order of a sum.
        on_edge = (theirs["coef_standardized"] == 0) & (
            theirs["intercept_standardized"].abs() < 1e-12
        )
        for name in ("hits", "predicted"):
            mine[name], theirs[name] = (
                each[name].masked_fill(on_edge, 0) for each in (mine, theirs)
            )
        _assert_same(mine, theirs, atol=1e-8, but=("n_iter",))
        assert found.certify(codes, labels.cuda(), _pairs()).ce_error < 1e-9

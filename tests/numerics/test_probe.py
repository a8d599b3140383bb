"""Probes against scikit-learn and an extended-precision solver of one pair at a time, on data easy and hard."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from assay.numerics.codes import ComputedCodes
from assay.numerics.probe import LogisticProbe1d

KINDS = ["gaussian", "heavy", "sparse", "onehot", "constant", "separable", "rare", "outlier", "offset", "scales"]


def _make(kind, n_rows=300, n_classes=3, seed=0):
    """Features (rows, 4) and labels, some of them -1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, n_classes, (n_rows,), generator=generator)
    if kind == "rare":
        labels = torch.where(torch.rand(n_rows, generator=generator) < 0.99, 0, labels)
    x = torch.randn(n_rows, 4, generator=generator)
    x = x + torch.randn(n_classes + 1, 4, generator=generator)[labels]
    if kind == "heavy":
        x = x / torch.randn(n_rows, 4, generator=generator)
    elif kind == "sparse":
        x = (x - 1).clamp(min=0)
    elif kind == "onehot":
        x = torch.nn.functional.one_hot((x[:, 0] * 2).round().long() % 4, 4).float()
    elif kind == "constant":
        x[:, 0], x[:, 1] = 0.1, 0.0
    elif kind == "separable":
        x = x * 0.01 + labels[:, None] * torch.tensor([1.0, -1.0, 0.1, 10.0])
    elif kind == "outlier":
        x[0] = 1e30
    elif kind == "offset":
        x = x + 1e5
    elif kind == "scales":
        x = x * torch.tensor([1e-6, 1e-3, 1e3, 1e6])
    return x, labels, n_classes


def _longdouble(x, y):
    x, y = x.numpy().astype(np.longdouble), y.numpy().astype(np.longdouble)
    std = x.std() if x.min() != x.max() else np.longdouble(1)
    prevalence = y.mean()
    return (x - x.mean()) / std, y, np.log(prevalence / (1 - prevalence))


def _objective(x, y, b0, ridge, theta):
    z = theta[0] + theta[1] * x
    ce = (np.maximum(z, 0) + np.log1p(np.exp(-abs(z))) - y * z).mean()
    return ce + ridge / 2 * (theta[1] ** 2 + (theta[0] - b0) ** 2)


def _solve(x, y, b0, ridge):
    """The objective's minimum, by Newton's method with backtracking, in extended precision."""
    theta = np.array([b0, 0], dtype=np.longdouble)
    value = _objective(x, y, b0, ridge, theta)
    for _ in range(500):
        sigma = 1 / (1 + np.exp(-(theta[0] + theta[1] * x)))
        gradient = np.array([(sigma - y).mean(), ((sigma - y) * x).mean()]) + ridge * (theta - [b0, 0])
        curvature = sigma * (1 - sigma)
        bb, bw, ww = curvature.mean() + ridge, (curvature * x).mean(), (curvature * x * x).mean() + ridge
        step = np.array([ww * gradient[0] - bw * gradient[1], bb * gradient[1] - bw * gradient[0]])
        step = step / (bb * ww - bw * bw)
        slope, size = (step * gradient).sum(), np.longdouble(1)
        if slope < 1e-15:
            return value
        while _objective(x, y, b0, ridge, theta - size * step) > value - size * slope / 1e4:
            size /= 2
        theta = theta - size * step
        value = _objective(x, y, b0, ridge, theta)
    raise AssertionError("the reference did not converge")


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


def _everything(probe, codes, labels):
    return {
        **probe.state_dict(),
        "loss": probe.loss_matrix(codes, labels),
        "ap": probe.average_precision(codes, labels),
    }


def _assert_same(mine, other, atol=1e-13):
    assert mine.keys() == other.keys()
    for name in mine:
        np.testing.assert_allclose(mine[name], other[name], rtol=1e-9, atol=atol, err_msg=name)


@pytest.mark.parametrize("ridge", [1e-8, 1e-2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_is_within_1e_9_of_its_optimum(kind, ridge):
    x, labels, n_classes = _make(kind)
    probe = LogisticProbe1d(ridge).fit(_as_format(x, "onehot") if kind == "onehot" else x, labels, n_classes)
    assert probe.converged_
    assert 0 < probe.n_iter_ <= 40
    assert probe.fitted_classes_.all()
    for feature in range(4):
        for c in range(n_classes):
            data = _longdouble(x[:, feature], labels == c)
            theta = probe.intercept_standardized_[feature, c].item(), probe.coef_standardized_[feature, c].item()
            assert abs(_objective(*data, ridge, theta) - _solve(*data, ridge)) <= 1e-9 / 2


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(KINDS), st.integers(2, 40), st.integers(1, 3), st.integers(0, 9999))
def test_tiny_sets_reach_their_optimum(kind, n_rows, n_classes, seed):
    x, labels, _ = _make(kind, n_rows, n_classes, seed)
    probe = LogisticProbe1d().fit(x, labels, n_classes)
    assert probe.converged_
    for c in range(n_classes):
        finite = 0 < int((labels == c).sum()) < n_rows
        assert bool(probe.fitted_classes_[c]) == finite
        assert bool(probe.coef_[:, c].isfinite().all()) == finite
        if finite:
            data = _longdouble(x[:, 3], labels == c)
            theta = probe.intercept_standardized_[3, c].item(), probe.coef_standardized_[3, c].item()
            assert abs(_objective(*data, 1e-8, theta) - _solve(*data, 1e-8)) <= 1e-9


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "sparse", "onehot", "constant", "rare", "offset", "scales"])
def test_the_loss_is_that_of_scikit_learn(kind):
    x, labels, n_classes = _make(kind, n_rows=400)
    ridge = 1e-8
    probe = LogisticProbe1d(ridge).fit(x, labels, n_classes)
    loss = probe.loss_matrix(x, labels)
    for feature in range(4):
        column = _longdouble(x[:, feature], labels == 0)[0].astype(np.float64)[:, None]
        for c in range(n_classes):
            y = (labels == c).numpy()
            model = LogisticRegression(C=1 / (ridge * len(y)), tol=1e-10, max_iter=1000).fit(column, y)
            z = model.decision_function(column)
            ce = np.mean(np.logaddexp(0, z) - y * z)
            assert abs(float(loss[feature, c]) - ce) <= 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_average_precision_on_other_rows_are_those_of_a_loop(kind):
    x, labels, n_classes = _make(kind)
    probe = LogisticProbe1d().fit(x, labels, n_classes)
    held, held_labels, _ = _make(kind, n_rows=50, seed=1)
    loss, precision = probe.loss_matrix(held, held_labels), probe.average_precision(held, held_labels)
    assert loss.dtype == precision.dtype == torch.float64
    for feature in range(4):
        standard = (held[:, feature].double() - probe.feature_mean_[feature]) / (probe.feature_std_[feature] or 1.0)
        for c in range(n_classes):
            y = (held_labels == c).numpy()
            w = float(probe.coef_standardized_[feature, c])
            z = (probe.intercept_standardized_[feature, c] + w * standard).numpy()
            np.testing.assert_allclose(loss[feature, c], np.mean(np.logaddexp(0, z) - y * z), rtol=1e-9, atol=1e-12)
            score = -held[:, feature] if w < 0 else held[:, feature]
            expected = average_precision_score(y, score.double()) if y.any() else np.nan
            np.testing.assert_allclose(precision[feature, c], expected, rtol=1e-12)


def test_raw_coefficients_give_the_same_scores_as_standardised_ones():
    x, labels, n_classes = _make("scales")
    probe = LogisticProbe1d(1e-3).fit(x, labels, n_classes)
    standard = (x.double() - x.double().mean(0)) / x.double().std(0, unbiased=False)
    z = probe.intercept_standardized_ + probe.coef_standardized_ * standard[:, :, None]
    np.testing.assert_allclose(probe.intercept_ + probe.coef_ * x.double()[:, :, None], z, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(probe.feature_mean_, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(probe.feature_std_, x.double().std(0, unbiased=False), rtol=1e-12)
    np.testing.assert_array_equal(probe.max_abs_, x.double().abs().amax(0))
    assert probe.coef_.shape == probe.intercept_.shape == (4, n_classes)


def test_the_ridge_holds_the_standardised_weights():
    x, labels, n_classes = _make("scales")
    weak, strong = (LogisticProbe1d(ridge).fit(x, labels, n_classes) for ridge in (1e-8, 10.0))
    assert (strong.coef_standardized_.abs() < 0.1 * weak.coef_standardized_.abs()).all()
    np.testing.assert_allclose(strong.intercept_standardized_, weak.base_rate_.logit().expand(4, -1), atol=0.01)
    rescaled = LogisticProbe1d(10.0).fit(x * 1024, labels, n_classes)
    np.testing.assert_allclose(rescaled.coef_standardized_, strong.coef_standardized_, rtol=1e-9)


def test_a_constant_feature_has_no_weight_and_the_base_loss():
    x, labels, n_classes = _make("constant")
    probe = LogisticProbe1d().fit(x, labels, n_classes)
    assert (probe.coef_standardized_[:2] == 0).all()
    assert probe.feature_std_[:2].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(probe.loss_matrix(x, labels)[:2], probe.base_loss(labels).expand(2, -1), rtol=1e-12)
    share = torch.stack([(labels == c).double().mean() for c in range(n_classes)])
    np.testing.assert_allclose(probe.average_precision(x, labels)[:2], share.expand(2, -1), rtol=1e-12)


@pytest.mark.parametrize("code_format", ["dense", "onehot"])
def test_a_weight_of_exactly_zero_ranks_the_highest_value_first(code_format):
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    probe = LogisticProbe1d().fit(_as_format(x, code_format), torch.tensor([0, 0, -1, -1]), 1)
    assert probe.coef_.tolist() == [[0.0], [0.0]]
    precision = probe.average_precision(_as_format(x[:2], code_format), torch.tensor([-1, 0]))
    assert precision.tolist() == [[1.0], [0.5]]


@pytest.mark.parametrize("ridge", [1e-8, 1e-3])
def test_one_hot_codes_need_no_rows(ridge):
    x, labels, n_classes = _make("onehot")
    x = torch.cat([x, torch.zeros(len(x), 1)], 1)  # and a feature that no row has
    held, held_labels, _ = _make("onehot", n_rows=60, seed=1)
    held = torch.cat([held, torch.zeros(len(held), 1)], 1)
    table, dense = (
        LogisticProbe1d(ridge, batch_size=77).fit(_as_format(x, code_format), labels, n_classes)
        for code_format in ("onehot", "dense")
    )
    mine = _everything(table, _as_format(held, "onehot"), held_labels)
    other = _everything(dense, held, held_labels)
    for state in (mine, other):
        state.pop("n_iter")
    _assert_same(mine, other, atol=1e-9)
    assert mine["ap"].shape == (5, n_classes)


def test_formats_slabs_and_batches_do_not_change_the_result():
    x, labels, n_classes = _make("sparse")
    held, held_labels, _ = _make("sparse", n_rows=60, seed=1)
    expected = _everything(LogisticProbe1d().fit(x, labels, n_classes), held, held_labels)
    for code_format in ("dense", "sparse"):
        for options in ({"slab_bytes": 1}, {"slab_bytes": 2 * (4 * 300 + 256 * 3)}, {"batch_size": 7}):
            probe = LogisticProbe1d(**options).fit(_as_format(x, code_format), labels, n_classes)
            _assert_same(_everything(probe, _as_format(held, code_format), held_labels), expected)


@pytest.mark.parametrize(("slab_bytes", "slabs"), [(1, 4), (2 * (4 * 300 + 256 * 3), 2), (2**28, 1)])
def test_each_slab_is_one_pass_and_is_told(slab_bytes, slabs):
    x, labels, n_classes = _make("gaussian")
    codes, passes, told = _as_format(x, "dense"), [], []
    stream = codes.stream

    def counted(batch_size, start):
        passes.append(batch_size)
        return stream(batch_size, start)

    codes.stream = counted
    probe = LogisticProbe1d(slab_bytes=slab_bytes, batch_size=50)
    probe.fit(codes, labels, n_classes, on_slab=lambda done, total: told.append((done, total)))
    assert passes == [50] * slabs
    assert told == [(4 * (i + 1) // slabs, 4) for i in range(slabs)]


def test_classes_without_a_finite_intercept_are_left_out_and_named():
    x, labels, _ = _make("gaussian")
    probe = LogisticProbe1d().fit(x, labels, 4)  # class 3 has no rows
    assert probe.fitted_classes_.tolist() == [True, True, True, False]
    for matrix in (probe.coef_, probe.intercept_, probe.loss_matrix(x, labels), probe.average_precision(x, labels)):
        assert matrix[:, :3].isfinite().all()
        assert matrix[:, 3].isnan().all()
    assert probe.base_loss(labels)[3].isnan()
    three = LogisticProbe1d().fit(x, labels, 3)
    np.testing.assert_allclose(probe.coef_[:, :3], three.coef_, rtol=1e-12)

    everything = LogisticProbe1d().fit(x, torch.zeros(len(x), dtype=torch.int64), 1)
    assert everything.converged_
    assert not everything.fitted_classes_.any()
    assert everything.coef_.isnan().all()

    absent = probe.average_precision(x[labels != 1], labels[labels != 1])
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
    assert (short.n_iter_, short.converged_) == (2, False)
    assert "raise max_iter" in caplog.text
    loose = LogisticProbe1d(tol=1e-2).fit(x, labels, n_classes)
    tight = LogisticProbe1d().fit(x, labels, n_classes)
    assert loose.converged_
    assert loose.n_iter_ < tight.n_iter_


def test_a_probe_comes_back_from_its_state():
    x, labels, n_classes = _make("gaussian")
    probe = LogisticProbe1d().fit(x, labels, n_classes)
    copy = LogisticProbe1d.from_state(probe.state_dict())
    _assert_same(_everything(copy, x, labels), _everything(probe, x, labels), atol=0)
    np.testing.assert_array_equal(copy.intercept_, probe.intercept_)
    assert (copy.n_iter_, copy.converged_) == (probe.n_iter_, True)


def test_bad_inputs_are_refused():
    x, labels, n_classes = _make("gaussian")
    for ridge in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"ridge is {ridge}, wanted more than 0"):
            LogisticProbe1d(ridge).fit(x, labels, n_classes)
    for bad in (labels.int(), labels[1:], labels - 1, labels + 1):
        with pytest.raises(ValueError, match="labels"):
            LogisticProbe1d().fit(x, bad, n_classes)
    for value in (torch.nan, torch.inf):
        broken = x.clone()
        broken[7, 2] = value
        with pytest.raises(ValueError, match="feature 2 holds NaN or infinity"):
            LogisticProbe1d(slab_bytes=1).fit(broken, labels, n_classes)
    probe = LogisticProbe1d().fit(x, labels, n_classes)
    for use in (probe.loss_matrix, probe.average_precision):
        with pytest.raises(ValueError, match="codes have 3 features, wanted 4"):
            use(x[:, :3], labels)
        with pytest.raises(ValueError, match="labels run from -1 to 3"):
            use(x, labels + (labels == 2))
    with pytest.raises(ValueError, match="labels run from"):
        probe.base_loss(labels + (labels == 2))
    wrong = ComputedCodes("onehot", 300, 3, 1, _as_format(x, "onehot").stream)
    with pytest.raises(ValueError, match="codes name features 0 to 3, wanted 0 to 2"):
        LogisticProbe1d().fit(wrong, labels, n_classes)


def test_validation_loss_of_a_pure_cluster_is_that_of_the_optimum():
    """Where a one-hot feature is 1 for one class only, w is bounded by the ridge alone, and validation rows that differ
    pay for each error of w in full."""
    n_rows, pure, ridge = 1000, 50, 1e-8
    indices = torch.arange(n_rows) % 4 + 1
    indices[:pure] = 0
    labels = torch.full((n_rows,), 1)
    labels[: 2 * pure] = 0
    codes = ComputedCodes("onehot", n_rows, 5, 1, lambda *_: iter([{"indices": indices}]))
    probe = LogisticProbe1d(ridge).fit(codes, labels, 2)
    val_labels = labels.clone()
    val_labels[:3] = 1
    found = float(probe.loss_matrix(codes, val_labels)[0, 0])

    x = (indices.numpy() == 0).astype(np.longdouble)
    y, y_val = ((each.numpy() == 0).astype(np.longdouble) for each in (labels, val_labels))
    x = (x - x.mean()) / x.std()
    design = np.stack([np.ones_like(x), x])
    b0 = np.log(y.mean() / (1 - y.mean()))
    theta = centre = np.array([b0, np.longdouble(0)])
    for _ in range(200):
        p = 1 / (1 + np.exp(-theta @ design))
        gradient = design @ (p - y) / n_rows + ridge * (theta - centre)
        (a, b), (_, d) = (design * (p * (1 - p))) @ design.T / n_rows + ridge * np.eye(2)
        step = np.array([d * gradient[0] - b * gradient[1], a * gradient[1] - b * gradient[0]]) / (a * d - b * b)
        theta = theta - step / max(1, np.abs(step).max() / 2)
    z = theta @ design
    wanted = (np.logaddexp(0, z) - y_val * z).mean()
    assert abs(found - float(wanted)) < 1e-9

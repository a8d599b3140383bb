"""The solver and the loss over atoms, each alone, against closed forms, finite differences and
loops.
"""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from assay.numerics.probe import logistic
from assay.numerics.probe.logistic import (
    ClassWeights,
    PairLosses,
    Points,
    Slab,
    minimize,
    slab_of_rows,
)


def _bowls(offsets):
    """Problem p: log cosh(u - a_p) + log cosh(v + a_p), whose plain Newton steps diverge from more
    than 1.09 away.
    """

    def evaluate(problems, theta):
        a = offsets[problems]
        at = torch.stack([theta[0] - a, theta[1] + a])
        curvature = 1 / at.cosh().square()
        value = (at.abs() + (-2 * at.abs()).exp().log1p()).sum(0)
        return value, at.tanh(), torch.stack([curvature[0], torch.zeros_like(a), curvature[1]])

    return evaluate


def test_damping_brings_in_what_plain_newton_steps_would_throw_out():
    offsets = torch.tensor([0.0, 0.5, 1.2, -3.0, 6.0], dtype=torch.float64)
    start = torch.zeros(2, 5, dtype=torch.float64)
    theta, steps, done = minimize(_bowls(offsets), start, max_iter=200, tol=1e-14)
    assert done.all()
    assert steps[0] == 0
    assert (steps[1:] > 0).all()
    assert (steps < 200).all()
    assert torch.allclose(theta, torch.stack([offsets, -offsets]), rtol=0, atol=1e-6)
    assert torch.equal(start, torch.zeros(2, 5, dtype=torch.float64))


def test_a_problem_that_is_done_is_not_evaluated_again():
    offsets = torch.tensor([0.0, 6.0, 0.0], dtype=torch.float64)
    seen = []

    def evaluate(problems, theta):
        seen.append(problems.tolist())
        return _bowls(offsets)(problems, theta)

    minimize(evaluate, torch.zeros(2, 3, dtype=torch.float64), max_iter=50, tol=1e-12)
    assert seen[0] == [0, 1, 2]
    assert all(problems == [1] for problems in seen[1:])


@pytest.mark.parametrize("max_iter", [0, 1, 3])
def test_running_out_of_iterations_is_said(max_iter):
    offsets = torch.tensor([6.0], dtype=torch.float64)
    _, steps, done = minimize(
        _bowls(offsets),
        torch.zeros(2, 1, dtype=torch.float32).double(),
        max_iter=max_iter,
        tol=1e-12,
    )
    assert (steps.tolist(), done.tolist()) == ([max_iter], [False])


def test_a_problem_that_is_not_a_number_is_never_done():
    def evaluate(problems, theta):
        nan = theta[0] * torch.nan
        return nan, nan.expand(2, -1), nan.expand(3, len(problems))

    _, steps, done = minimize(
        evaluate, torch.zeros(2, 1, dtype=torch.float32).double(), max_iter=3, tol=1e-12
    )
    assert (steps.tolist(), done.tolist()) == ([3], [False])


def test_nothing_to_minimize_is_done():
    theta, steps, done = minimize(
        _bowls(torch.zeros(0, dtype=torch.float32)),
        torch.zeros(2, 0, dtype=torch.float32).double(),
        max_iter=3,
        tol=1e-12,
    )
    assert (theta.shape, steps.tolist(), done.tolist()) == ((2, 0), [], [])


def _losses(n_rows=30, n_features=3, n_classes=4, form="rows"):
    """The same losses over rows, over weighted points, or with class weights in either form."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(n_features, n_rows, generator=generator, dtype=torch.float32) * 3 + 1
    labels = torch.randint(-1, n_classes, (n_rows,), generator=generator)
    mean, scale = torch.randn(2, n_features, generator=generator, dtype=torch.float64)
    scale = scale.abs() + 0.5
    counts = torch.tensor(
        [float((labels == c).sum()) for c in range(n_classes)], dtype=torch.float64
    )
    slab = slab_of_rows(values, labels)
    weights = None
    if form.startswith("balanced"):
        weights = ClassWeights(
            torch.rand(n_classes, generator=generator, dtype=torch.float32).double() + 2,
            torch.arange(1.0, 5.0, dtype=torch.float32).double(),
        )
    if form.endswith("points"):
        twice = torch.ones(n_features, n_rows, dtype=torch.float64)  # the last row in two halves
        twice[:, -1] = 0.5
        split = Points(
            torch.cat([values.double(), values[:, -1:]], 1), torch.cat([twice, twice[:, -1:]], 1)
        )
        of_class = (labels == torch.arange(n_classes)[:, None]).double().repeat(n_features, 1)
        own = Points(values.repeat_interleave(n_classes, 0).double(), of_class)
        center = values.double().mean(1)
        sums = (values.double() - center[:, None]) @ (
            labels[:, None] == torch.arange(n_classes)
        ).double()
        slab = Slab(split, sums, center, own)
    theta = torch.randn(2, n_features * n_classes, generator=generator, dtype=torch.float64)
    return PairLosses(slab, mean, scale, counts, n_rows, weights), values, labels, theta


FORMS = ["rows", "points", "balanced rows", "balanced points"]


@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode(False)  # in which the reference has no gradients
def test_the_loss_is_that_of_a_loop_and_its_derivatives_are_those_of_autograd(form):
    losses, values, labels, theta = _losses(form=form)
    pairs = torch.tensor([11, 0, 5, 6])  # any pairs, in any order
    leaf = theta[:, pairs].clone().requires_grad_()
    expected = []
    for slot, pair in enumerate(pairs.tolist()):
        feature, c = divmod(pair, 4)
        total, norm = torch.zeros((), dtype=torch.float64), 0.0
        for row, label in enumerate(labels.tolist()):
            z = (
                leaf[0, slot]
                + leaf[1, slot]
                * (values[feature, row].double() - losses.mean[feature])
                / (losses.scale[feature])
            )
            weight = 1.0
            if losses.class_weights is not None:
                weight = float(
                    (
                        losses.class_weights.positive
                        if label == c
                        else losses.class_weights.negative
                    )[c]
                )
            total = total - weight * torch.nn.functional.logsigmoid(z if label == c else -z)
            norm += weight
        expected.append(total / norm)
    value, gradient, hessian = losses.derivatives(pairs, theta[:, pairs])
    stacked = torch.stack(expected)
    np.testing.assert_allclose(value, stacked.detach(), rtol=1e-12)
    np.testing.assert_allclose(losses.loss(pairs, theta[:, pairs]), stacked.detach(), rtol=1e-12)
    assert losses.bound(pairs, theta[:, pairs]).tolist() == [0.0] * 4

    (first,) = torch.autograd.grad(stacked.sum(), leaf, create_graph=True)
    np.testing.assert_allclose(gradient, first.detach(), rtol=1e-10, atol=1e-13)
    by_b = torch.autograd.grad(first[0].sum(), leaf, retain_graph=True)[0]
    by_w = torch.autograd.grad(first[1].sum(), leaf)[0]
    np.testing.assert_allclose(
        hessian, torch.stack([by_b[0], by_b[1], by_w[1]]), rtol=1e-10, atol=1e-13
    )


def test_balanced_weights_are_those_of_scikit_learn():
    y = np.array([1] * 3 + [0] * 9)
    found = ClassWeights.balanced(torch.tensor([3.0], dtype=torch.float64), 12)
    assert [float(found.negative), float(found.positive)] == list(
        compute_class_weight("balanced", classes=np.array([0, 1]), y=y)
    )


@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_any_size_give_the_same_sums(monkeypatch, form):
    losses, _, _, theta = _losses(n_rows=20_000, form=form)
    pairs = torch.arange(12)
    whole = [losses.loss(pairs, theta), *losses.derivatives(pairs, theta)]
    monkeypatch.setitem(logistic._BLOCK, "cpu", 1 << 13)
    for mine, other in zip(
        whole, [losses.loss(pairs, theta), *losses.derivatives(pairs, theta)], strict=True
    ):
        np.testing.assert_allclose(mine, other, rtol=1e-12, atol=1e-15)

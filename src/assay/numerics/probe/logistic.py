"""The logistic loss of many (feature, class) pairs over weighted points, and Newton's method for
all of them at once.

Labels y enter the mean over rows of softplus(b + w x) - y (b + w x) linearly, so the class's count
n_c and its sum s_jc of x are all that is needed of them. The rest is a sum over points, that is
values and how often they occur, which is the same for every class. A sketch has some hundred
points, a one-hot feature has two, 0 and 1. If nothing less will do, every row is a point, with its
label, and the terms are softplus(b + w x) or softplus(-b - w x), so that nothing cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.numerics.isolation import isolated

# Elements worked on at once: on a CPU a handful of temporaries stay in cache.
_BLOCK = {
    "cpu": 1 << 16,
    "cuda": 1 << 24,
}


@dataclass(frozen=True)
class Cells:
    """The rows of each cell of a sketch, float64 (lines, cells), on raw features."""

    counts: Tensor
    mean: Tensor
    variance: Tensor
    half: Tensor  # half the width


@dataclass(frozen=True)
class Points:
    """Weighted points, a line for each feature or for each (feature, class): exact, or in place of
    the rows in `cells`.
    """

    values: Tensor  # (lines, points) float32 or float64, on raw features
    weights: Tensor | None = None  # (lines, points) float64, how often each occurs; None: once
    cells: Cells | None = None


@dataclass(frozen=True)
class ClassWeights:
    """The weights of a row of the class and of any other row in each class's loss, float64
    (classes,).
    """

    positive: Tensor
    negative: Tensor

    @classmethod
    def balanced(cls, class_counts: Tensor, n_rows: int) -> ClassWeights:
        """n / (2 n_c) and n / (2 (n - n_c)), as scikit-learn's `class_weight="balanced"` has it for
        two classes.
        """
        return cls(n_rows / (2 * class_counts), n_rows / (2 * (n_rows - class_counts)))


@dataclass(frozen=True)
class Slab:
    """Some features as points, with the statistics of the labels that the loss needs."""

    points: Points  # of all rows, a line a feature
    class_sums: Tensor | None = (
        None  # (features, classes) float64: sum of (x - center) over the class's rows
    )
    center: Tensor | None = None  # (features,) float64
    own: Points | None = (
        None  # for class weights: of each class's own rows, a line for each (feature, class)
    )
    labels: Tensor | None = (
        None  # instead of all that: every row is a point, and these are the rows' classes, int64
    )


def slab_of_rows(values: Tensor, labels: Tensor) -> Slab:
    """Every row a point: values (features, rows) float32 and labels (rows,)."""
    return Slab(Points(values), labels=labels)


@isolated()
def moments_of_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of values (features, rows), float64 (features,);
    exactly 0 if all values are equal.
    """
    mean = torch.stack([row.double().mean() for row in values])
    std = torch.stack(
        [(row.double() - m).square().mean().sqrt() for row, m in zip(values, mean, strict=True)]
    )
    constant = values.amin(1) == values.amax(1)
    return torch.where(constant, values[:, 0].double(), mean), torch.where(constant, 0.0, std)


@isolated()
def slab_of_table(table: Tensor, class_counts: Tensor, n_rows: int) -> Slab:
    """Features that are 0 or 1: `table` (features, classes + 1) counts the ones of each class, and
    of none.
    """
    ones = table.sum(1).double()
    hits = table[:, :-1].double()
    mean = ones / n_rows
    values = mean.new_tensor([[0.0, 1.0]])
    return Slab(
        points=Points(values.expand(len(table), 2), torch.stack([n_rows - ones, ones], 1)),
        class_sums=hits - mean[:, None] * class_counts,
        center=mean,
        own=Points(
            values.expand(hits.numel(), 2),
            torch.stack([class_counts - hits, hits], -1).flatten(0, 1),
        ),
    )


@dataclass(frozen=True)
class PairLosses:
    """The loss of the pairs (feature j, class c) of a slab, where pair number p = j * classes + c.

    With `class_weights`, which are those of the training rows, it is the weighted mean: divided by
    the weights' sum over the rows at hand.
    """

    slab: Slab
    mean: Tensor  # (features,) float64, of the training rows, as is the scale
    scale: Tensor
    class_counts: Tensor  # (classes,) float64, of the slab's rows
    n_rows: int
    class_weights: ClassWeights | None = None

    @isolated()
    def loss(self, pairs: Tensor, theta: Tensor) -> Tensor:
        """Mean CE in nats, float64 (pairs,), at theta (2, pairs), which holds b and w."""
        total = theta.new_zeros(len(pairs))
        for block, z, _, weights, side in self._blocks(pairs, theta):
            if side is not None:
                z.mul_(side)
            softplus = z.abs().neg_().exp_().log1p_().add_(z.clamp_(min=0))
            total[block] += _row_sums(softplus, weights)
        return (total - (self._linear(pairs) * theta).sum(0)) / self._norm(pairs)

    @isolated()
    def derivatives(self, pairs: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean CE (pairs,), its gradient (2, pairs) and its Hessian (3, pairs): the bb, bw and ww
        entries.
        """
        total = theta.new_zeros(len(pairs))
        gradient = theta.new_zeros(2, len(pairs))
        hessian = theta.new_zeros(3, len(pairs))
        for block, z, x, weights, side in self._blocks(pairs, theta):
            if side is not None:
                z.mul_(side)
            e = z.abs().neg_().exp_()
            upper = (1 + e).reciprocal_()  # sigma(|z|)
            lower = e * upper
            curvature = lower * upper
            sigma = torch.where(z > 0, upper, lower)
            total[block] += _row_sums(e.log1p_().add_(z.clamp_(min=0)), weights)
            if side is not None:
                sigma = sigma.mul_(side)
            gradient[0, block] += _row_sums(sigma, weights)
            gradient[1, block] += _row_sums(sigma.mul_(x), weights)
            hessian[0, block] += _row_sums(curvature, weights)
            hessian[1, block] += _row_sums(curvature.mul_(x), weights)
            hessian[2, block] += _row_sums(curvature.mul_(x), weights)
        linear, norm = self._linear(pairs), self._norm(pairs)
        loss = (total - (linear * theta).sum(0)) / norm
        return loss, (gradient - linear) / norm, hessian / norm

    @isolated()
    def rounding(self, pairs: Tensor, theta: Tensor) -> Tensor:
        """How far `loss` can be off because it is a difference, nats, float64 (pairs,); 0 if every
        row is a point.
        """
        return 1e-15 * (self._linear(pairs) * theta).abs().sum(0) / self._norm(pairs)

    @isolated()
    def bound(self, pairs: Tensor, theta: Tensor) -> Tensor:
        """How far `loss` can be from that of the rows behind the points, nats, float64 (pairs,):
        see `sketch`.
        """
        features, classes = self._split(pairs)
        parts: list[tuple[Cells | None, Tensor, Tensor | None]] = [
            (self.slab.points.cells, features, None)
        ]
        if self.class_weights is not None and self.slab.own is not None:
            more = (self.class_weights.positive - self.class_weights.negative).abs()
            parts = [
                (self.slab.points.cells, features, self.class_weights.negative[classes]),
                (self.slab.own.cells, pairs, more[classes]),
            ]
        total = theta.new_zeros(len(pairs))
        for cells, lines, weight in parts:
            if cells is None:
                continue
            height = max(1, _BLOCK[theta.device.type] // max(1, cells.half.shape[1]))
            for start in range(0, len(pairs), height):
                block = slice(start, start + height)
                line, feature = lines[block], features[block]
                b, w = theta[:, block, None]
                w = w / self.scale[feature, None]
                half = w.abs() * cells.half[line]
                z = b + w * (cells.mean[line] - self.mean[feature, None])
                missed = torch.minimum(w.square() * cells.variance[line] / 2, half**6 / 11520)
                # The cell's mean is in it, so that no row is farther from the mean than its width.
                # sigma' <= exp(-|z|).
                nearest = (z.abs() - 2 * half).clamp(min=0)
                missed *= cells.counts[line] * (-nearest).exp().clamp(max=0.25)
                total[block] += missed.sum(1) if weight is None else missed.sum(1) * weight[block]
        return total / self._norm(pairs)

    def _split(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        n_classes = len(self.class_counts)
        return pairs // n_classes, pairs % n_classes

    def _norm(self, pairs: Tensor) -> Tensor | int:
        """The weights' sum over all rows: of each pair, or the number of rows."""
        if self.class_weights is None:
            return self.n_rows
        counts = self.class_counts
        total = self.class_weights.positive * counts + self.class_weights.negative * (
            self.n_rows - counts
        )
        return total[pairs % len(counts)]

    def _linear(self, pairs: Tensor) -> Tensor:
        """n_c and s_jc (2, pairs), what the labels contribute to the gradient; s_jc is of
        standardized values. 0 of rows.
        """
        features, classes = self._split(pairs)
        counts = self.class_counts[classes]
        if self.slab.class_sums is None or self.slab.center is None:
            return counts.new_zeros(2, len(pairs))
        sums = (
            self.slab.class_sums.flatten()[pairs]
            + (self.slab.center - self.mean)[features] * counts
        )
        linear = torch.stack([counts, sums / self.scale[features]])
        return (
            linear if self.class_weights is None else linear * self.class_weights.positive[classes]
        )

    def _blocks(
        self, pairs: Tensor, theta: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None, Tensor | None]]:
        """Blocks of pairs and points: which pairs, b + w x and x (pairs, points) float64, the
        points' weights, and of rows -1 for those of the class and 1 for the others.
        """
        features, classes = self._split(pairs)
        slab, weights = self.slab, self.class_weights
        if slab.labels is not None:
            for block, at, z, x, _ in self._points(slab.points, features, features, theta):
                of_class = slab.labels[at] == classes[block, None]
                side = torch.where(of_class, -1.0, 1.0).to(z.dtype)
                if weights is None:
                    yield block, z, x, None, side
                else:
                    positive, negative = (
                        weights.positive[classes[block], None],
                        weights.negative[classes[block], None],
                    )
                    yield block, z, x, torch.where(of_class, positive, negative), side
        elif weights is None:
            for block, _, z, x, weight in self._points(slab.points, features, features, theta):
                yield block, z, x, weight, None
        else:  # all rows at the weight of a negative, and the class's own at what they weigh more
            assert slab.own is not None, "class weights need the classes' own points"
            positive, negative = weights.positive[classes, None], weights.negative[classes, None]
            for lines, points, factor in (
                (features, slab.points, negative),
                (pairs, slab.own, positive - negative),
            ):
                for block, _, z, x, weight in self._points(points, lines, features, theta):
                    yield (
                        block,
                        z,
                        x,
                        factor[block] if weight is None else factor[block] * weight,
                        None,
                    )

    def _points(
        self, points: Points, lines: Tensor, features: Tensor, theta: Tensor
    ) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor | None]]:
        """Blocks of lines and points: which they are, b + w x, x and the points' weights."""
        n_points = points.values.shape[1]
        # A table's two points are taken one after the other: work along an inner dimension of 2 is
        # 10 times slower.
        width = 1 if n_points <= 4 else min(n_points, 1 << 13)
        height = _BLOCK[theta.device.type] // width
        for first in range(0, len(lines), height):
            block = slice(first, first + height)
            mean, scale = self.mean[features[block], None], self.scale[features[block], None]
            b, w = theta[:, block, None]
            for start in range(0, n_points, width):
                at = slice(start, start + width)
                x = points.values[:, at][lines[block]].double().sub_(mean).div_(scale)
                weights = None if points.weights is None else points.weights[:, at][lines[block]]
                yield block, at, (x * w).add_(b), x, weights


def _row_sums(terms: Tensor, weights: Tensor | None) -> Tensor:
    return terms.sum(1) if weights is None else torch.linalg.vecdot(terms, weights)


Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""What `minimize` asks: objective (p,), gradient (2, p) and Hessian (3, p) of problems (p,) at
theta (2, p).
"""


def penalized(losses: PairLosses, pairs: Tensor, center: Tensor, ridge: float) -> Evaluate:
    """The losses of `pairs` (problems,) and ridge/2 |theta - center|^2, `center` (2, problems), for
    `minimize`.
    """

    def evaluate(problems: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, gradient, hessian = losses.derivatives(pairs[problems], theta)
        away = theta - center[:, problems]
        hessian[::2] += ridge
        return value + 0.5 * ridge * away.square().sum(0), gradient + ridge * away, hessian

    return evaluate


@isolated()
def minimize(
    evaluate: Evaluate, start: Tensor, *, max_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimize many smooth convex functions of two variables at once by Newton's method with
    Marquardt's damping.

    A step is taken only if the objective does not rise. Half the squared Newton decrement, 1/2 g^T
    H^-1 g, is how far the objective is above its optimum. When it is at most `tol`, a problem takes
    that step as its last and is no longer evaluated: where the curvature vanishes, as in a
    separable class, the decrement is small long before theta is right.

    Args:
        evaluate: called with problems (p,) int64 and theta (2, p); gives those problems' objective
            (p,), gradient (2, p) and Hessian (3, p), float64.
        start: theta to begin with, (2, problems).
        max_iter: steps, taken or refused, at most.
        tol: see above.

    Returns:
        theta (2, problems), the steps taken or refused, int64, and which problems are done.
    """
    theta = start.clone()
    active = torch.arange(theta.shape[1], device=theta.device)
    steps = torch.zeros_like(active)
    done = torch.zeros_like(active, dtype=torch.bool)
    damping = theta.new_zeros(len(active))
    value, gradient, hessian = evaluate(active, theta)
    for n_iter in range(max_iter + 1):
        step = _newton_step(gradient, hessian, torch.zeros_like(damping))
        left = ~(0.5 * (gradient * step).sum(0) <= tol)
        now = theta[:, active]
        theta[:, active] = torch.where(left, now, now - step)
        done[active] = ~left
        # A mask would be counted for each: of all this a GPU's host waits here only.
        go_on = left.nonzero()[:, 0]
        active, damping, value = active[go_on], damping[go_on], value[go_on]
        gradient, hessian = gradient[:, go_on], hessian[:, go_on]
        if len(active) == 0 or n_iter == max_iter:
            break
        steps[active] += 1
        now = theta[:, active]
        trial = now - _newton_step(gradient, hessian, damping)
        new = evaluate(active, trial)
        # The objective is a difference of sums of about this size.
        rounding = 1e-15 * (1 + trial.abs().sum(0))
        falls = new[0] <= value + rounding
        theta[:, active] = torch.where(falls, trial, now)
        value = torch.where(falls, new[0], value)
        gradient = torch.where(falls, new[1], gradient)
        hessian = torch.where(falls, new[2], hessian)
        damping = torch.where(falls, damping / 10, (damping * 10).clamp(min=1e-2))
    return theta, steps, done


def _newton_step(gradient: Tensor, hessian: Tensor, damping: Tensor) -> Tensor:
    """(H + damping diag H)^-1 g for 2 x 2 H, float64 (2, problems)."""
    bb, bw, ww = hessian.unbind()
    bb, ww = bb * (1 + damping), ww * (1 + damping)
    g_b, g_w = gradient.unbind()
    return torch.stack([ww * g_b - bw * g_w, bb * g_w - bw * g_b]) / (bb * ww - bw * bw)

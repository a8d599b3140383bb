"""The logistic loss of many (feature, class) pairs over weighted atoms, and Newton's method for all of them at once.

The mean over rows of softplus(b + w x) - y (b + w x) takes of the labels y only the class's count n_c and sum s_jc of
x, since they enter linearly. The rest is a sum over a feature's atoms: a value and how often it occurs. Every row is an
atom; a one-hot feature has two, 0 and 1.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.numerics.codes import Codes, check_indices, checked_batches

_BLOCK = 1 << 16  # elements worked on at once: a handful of float64 temporaries of this size stay in cache


@dataclass(frozen=True)
class Slab:
    """Some features as atoms, with what of the labels the objective needs."""

    columns: slice
    values: Tensor  # (features, atoms) float32
    weights: Tensor | None  # (features, atoms) float64, how often each occurs; None: once
    mean: Tensor  # (features,) float64
    std: Tensor  # (features,) float64, population, exactly 0 for a constant feature
    max_abs: Tensor  # (features,) float64
    class_sums: Tensor  # (features, classes) float64: sum of (x - mean) over the class's rows


def slab_of_rows(columns: slice, values: Tensor, labels: Tensor, n_classes: int) -> Slab:
    """Every row an atom: values (features, rows) float32."""
    low, high = values.aminmax(dim=1)
    if not (low.isfinite() & high.isfinite()).all():
        worst = columns.start + int((low.isfinite() & high.isfinite()).int().argmin())
        raise ValueError(f"feature {worst} holds NaN or infinity, wanted finite values: look for it in the codes")
    mean = torch.stack([row.double().mean() for row in values])
    mean = torch.where(low == high, low.double(), mean)  # exact, on any device: a constant feature has std 0
    variance = [(row.double() - centre).square().mean() for row, centre in zip(values, mean, strict=True)]
    class_sums = values.new_zeros(len(values), n_classes, dtype=torch.float64)
    width = max(1, _BLOCK // max(len(values), n_classes))
    classes = torch.arange(n_classes, device=labels.device)
    for start in range(0, len(labels), width):
        rows = slice(start, start + width)
        class_sums += (values[:, rows].double() - mean[:, None]) @ (labels[rows, None] == classes).double()
    return Slab(
        columns=columns,
        values=values,
        weights=None,
        mean=mean,
        std=torch.stack(variance).sqrt(),
        max_abs=torch.maximum(low.abs(), high.abs()).double(),
        class_sums=class_sums,
    )


def slab_of_table(columns: slice, table: Tensor, class_counts: Tensor, n_rows: int) -> Slab:
    """Features that are 0 or 1: `table` (features, classes + 1) counts the ones of each class, and of none."""
    ones = table.sum(1).double()
    mean = ones / n_rows
    values = torch.tensor([0.0, 1.0], device=table.device).expand(len(table), 2)
    return Slab(
        columns=columns,
        values=values,
        weights=torch.stack([n_rows - ones, ones], 1),
        mean=mean,
        std=(mean * (1 - mean)).sqrt(),
        max_abs=(ones > 0).double(),
        class_sums=table[:, :-1] - mean[:, None] * class_counts,
    )


def count_table(codes: Codes, labels: Tensor, n_classes: int, batch_size: int) -> Tensor:
    """Rows of each (feature, class) of one-hot codes, int64 (features, n_classes + 1); the last column is label -1."""
    table = torch.zeros(codes.n_features * (n_classes + 1), dtype=torch.int64, device=labels.device)
    classes = torch.where(labels < 0, n_classes, labels)
    for rows, batch in checked_batches(codes, batch_size):
        features = batch["indices"].to(labels.device, torch.int64)
        check_indices(features, codes.n_features)
        table.scatter_add_(0, features * (n_classes + 1) + classes[rows], torch.ones_like(features))
    return table.view(codes.n_features, n_classes + 1)


@dataclass(frozen=True)
class PairLosses:
    """The loss of the pairs (feature j, class c) of a slab, where pair number p = j * classes + c."""

    slab: Slab
    mean: Tensor  # (features,) float64, of the training rows, as is the scale
    scale: Tensor
    class_counts: Tensor  # (classes,) float64, of the slab's rows
    n_rows: int

    def loss(self, pairs: Tensor, theta: Tensor) -> Tensor:
        """Mean CE in nats, float64 (pairs,), at theta (2, pairs), which holds b and w."""
        total = theta.new_zeros(len(pairs))
        for block, z, _, weights in self._blocks(pairs, theta):
            softplus = z.abs().neg_().exp_().log1p_().add_(z.clamp_(min=0))
            total[block] += _row_sums(softplus, weights)
        return (total - self._linear(pairs).mul_(theta).sum(0)) / self.n_rows

    def derivatives(self, pairs: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean CE (pairs,), its gradient (2, pairs) and its Hessian (3, pairs): the bb, bw and ww entries."""
        total = theta.new_zeros(len(pairs))
        gradient = theta.new_zeros(2, len(pairs))
        hessian = theta.new_zeros(3, len(pairs))
        for block, z, x, weights in self._blocks(pairs, theta):
            e = z.abs().neg_().exp_()
            upper = (1 + e).reciprocal_()  # sigma(|z|)
            lower = e * upper
            curvature = lower * upper
            sigma = torch.where(z > 0, upper, lower)
            total[block] += _row_sums(e.log1p_().add_(z.clamp_(min=0)), weights)
            gradient[0, block] += _row_sums(sigma, weights)
            gradient[1, block] += _row_sums(sigma.mul_(x), weights)
            hessian[0, block] += _row_sums(curvature, weights)
            hessian[1, block] += _row_sums(curvature.mul_(x), weights)
            hessian[2, block] += _row_sums(curvature.mul_(x), weights)
        linear = self._linear(pairs)
        loss = (total - (linear * theta).sum(0)) / self.n_rows
        return loss, (gradient - linear) / self.n_rows, hessian / self.n_rows

    def _linear(self, pairs: Tensor) -> Tensor:
        """n_c and s_jc (2, pairs), what the labels contribute to the gradient; s_jc is of standardised values."""
        features, counts = pairs // len(self.class_counts), self.class_counts[pairs % len(self.class_counts)]
        sums = self.slab.class_sums.flatten()[pairs] + (self.slab.mean - self.mean)[features] * counts
        return torch.stack([counts, sums / self.scale[features]])

    def _blocks(self, pairs: Tensor, theta: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """Blocks of pairs and atoms: which pairs, b + w x and x (pairs, atoms) float64, and the atoms' weights."""
        n_atoms = self.slab.values.shape[1]
        # A table's two atoms are taken one after the other: work along an inner dimension of 2 is 10 times slower.
        width = min(n_atoms, 1 << 13) if self.slab.weights is None else 1
        height = _BLOCK // width
        for first in range(0, len(pairs), height):
            block = slice(first, first + height)
            features = pairs[block] // len(self.class_counts)
            mean, scale = self.mean[features, None], self.scale[features, None]
            b, w = theta[:, block, None]
            for start in range(0, n_atoms, width):
                atoms = slice(start, start + width)
                x = self.slab.values[:, atoms][features].double().sub_(mean).div_(scale)
                weights = None if self.slab.weights is None else self.slab.weights[:, atoms][features]
                yield block, (x * w).add_(b), x, weights


def _row_sums(terms: Tensor, weights: Tensor | None) -> Tensor:
    weighted = terms if weights is None else terms * weights
    return weighted.sum(1)


Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def minimise(evaluate: Evaluate, start: Tensor, *, max_iter: int, tol: float) -> tuple[Tensor, int, bool]:
    """Minimise many smooth convex functions of two variables at once by Newton's method with Marquardt's damping.

    `evaluate(problems (p,) int64, theta (2, p))` gives those problems' objective (p,), gradient (2, p) and Hessian
    (3, p), float64. A step is taken only where the objective does not rise. A problem is done, and no longer evaluated,
    when half its squared Newton decrement, 1/2 g^T H^-1 g, which is how far the objective is above its optimum, is
    at most `tol`, and takes that step as its last: where the curvature vanishes, as in a separable class, the decrement is
    small long before theta is right. Returns theta (2, problems), the iterations taken, and whether all problems are done.
    """
    theta = start.clone()
    active = torch.arange(theta.shape[1], device=theta.device)
    damping = theta.new_zeros(len(active))
    value, gradient, hessian = evaluate(active, theta)
    for n_iter in range(max_iter + 1):
        step = _newton_step(gradient, hessian, torch.zeros_like(damping))
        left = ~(0.5 * (gradient * step).sum(0) <= tol)
        theta[:, active[~left]] -= step[:, ~left]
        active, damping, value = active[left], damping[left], value[left]
        gradient, hessian = gradient[:, left], hessian[:, left]
        if len(active) == 0 or n_iter == max_iter:
            break
        trial = theta[:, active] - _newton_step(gradient, hessian, damping)
        new = evaluate(active, trial)
        rounding = 1e-15 * (1 + trial.abs().sum(0))  # the objective is a difference of sums of about this size
        falls = new[0] <= value + rounding
        theta[:, active[falls]] = trial[:, falls]
        value = torch.where(falls, new[0], value)
        gradient = torch.where(falls, new[1], gradient)
        hessian = torch.where(falls, new[2], hessian)
        damping = torch.where(falls, damping / 10, (damping * 10).clamp(min=1e-2))
    return theta, n_iter, len(active) == 0


def _newton_step(gradient: Tensor, hessian: Tensor, damping: Tensor) -> Tensor:
    """(H + damping diag H)^-1 g for 2 x 2 H, float64 (2, problems)."""
    bb, bw, ww = hessian.unbind()
    bb, ww = bb * (1 + damping), ww * (1 + damping)
    g_b, g_w = gradient.unbind()
    return torch.stack([ww * g_b - bw * g_w, bb * g_w - bw * g_b]) / (bb * ww - bw * bw)

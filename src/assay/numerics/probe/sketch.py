"""Sketches: the rows of a feature as some hundred weighted points that give the logistic loss of
any probe on them.

The rows are sorted into cells of a fixed map, fine about the feature's middle and wider in
proportion beyond it. For each cell the count and the power sums 1 to 5 are kept. Three points with
weights, the nodes of Gauss' quadrature (Golub and Welsch 1969), have the same six sums; in place of
the rows they integrate every polynomial of degree 5 within a cell exactly. Of softplus(b + w x)
they miss, in a cell of n rows, half-width h and variance v, at most

    n sigma'(z) min(w^2 v / 2, (w h)^6 / 11520)

with z the value of b + w x in the cell that is nearest to 0. That is since the sixth derivative of
softplus is at most sigma', and no cubic with leading coefficient 1 that is orthogonal for the rows
has a larger mean square than Chebyshev's, h^6 / 16. The points are a data set of their own: any
solver takes them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from assay.numerics.codes import not_finite
from assay.numerics.isolation import isolated
from assay.numerics.probe.cells import BITS, OCTAVES, CellMap
from assay.numerics.probe.logistic import Cells, Points, Slab
from assay.numerics.ranking import count_classes

# Features and rows: on a CPU what a block needs stays in cache.
_BLOCK = {
    "cpu": (64, 1 << 10),
    "cuda": (4096, 1 << 12),
}
_POWERS = 6
_SPAN = 1e50  # times the unit: further out the fifth power is no longer a float64
_RESOLVED = 1e-4  # units: a spread below this is lost beside the 1 that is added to |t|
_MATRICES = 1 << 14  # cuSOLVER takes no larger batch


class FeatureSketch:
    """The data that probes need of the rows of some features. It is additive: sketches of parts of
    the rows can be merged.

    Args:
        cells: the map, which has to be the same for sketches that are merged.
        n_classes: labels are int64 in 0..n_classes-1, or -1.
        by_class: keep the cells of each class apart, which class weights need; that takes n_classes
            + 1 times the memory.

    Attributes:
        sums: float64 (6, features, groups, cells), the power sums 0 to 5 of |t| + 1 less the cell's
            middle.
        class_sums: float64 (features, classes), sums of t.
        low: float64 (features,), the least x.
        high: float64 (features,), the largest x.
        class_counts: float64 (classes,), rows of each.
        n_rows: rows.
    """

    @isolated()
    def __init__(self, cells: CellMap, n_classes: int, *, by_class: bool = False) -> None:
        n_features = len(cells.center)
        self.cells = cells
        self.n_classes = n_classes
        self.groups = n_classes + 1 if by_class else 1
        new_zeros = cells.center.new_zeros
        self.sums = new_zeros(_POWERS, n_features, self.groups, cells.n_cells)
        self.class_sums = new_zeros(n_features, n_classes)
        self.class_counts = new_zeros(n_classes)
        self.low = torch.full_like(cells.center, torch.inf)
        self.high = torch.full_like(cells.center, -torch.inf)
        self.n_rows = 0

    @staticmethod
    def bytes_per_feature(n_classes: int, *, by_class: bool = False) -> int:
        """Memory of a feature in a sketch and in the points made from it, as measured."""
        return 14 * 8 * _POWERS * (OCTAVES << BITS) * (n_classes + 1 if by_class else 1)

    @isolated()
    def add(self, x: Tensor, labels: Tensor, first_row: int = 0, first_feature: int = 0) -> None:
        """Add rows x (rows, features) with labels (rows,) int64.

        Raises:
            ValueError: there is NaN or infinity, or a value too far out. The message names row and
                feature, counted from `first_row` and `first_feature`.
        """
        self._count(labels)
        group = self._group(labels)
        sums_by_class = torch.nn.functional.pad(self.class_sums, (0, 1))  # the last is of no class
        wide, tall = _BLOCK[x.device.type]
        for features in ranges(len(self.low), wide):
            height = wide * tall // (features.stop - features.start)
            for rows in ranges(len(x), height):
                block = x[rows, features].T.to(
                    torch.float64, copy=True, memory_format=torch.contiguous_format
                )
                low, high = block.amin(dim=1), block.amax(dim=1)
                away = self._away(low, high, features)
                # NaN and infinity are no less: one look for all, since a GPU is waited for.
                if not away.amax() <= _SPAN:
                    wrong = (~block.isfinite()).nonzero()
                    if not len(wrong):
                        self._refuse_span(away, features, first_feature)
                    feature, row = wrong[0].tolist()
                    raise ValueError(
                        not_finite(
                            first_row + rows.start + row, first_feature + features.start + feature
                        )
                    )
                self.low[features] = torch.minimum(self.low[features], low)
                self.high[features] = torch.maximum(self.high[features], high)
                t = block.sub_(self.cells.center[features, None]).div_(
                    self.cells.scale[features, None]
                )
                sums_by_class[features].scatter_add_(1, group[rows].expand_as(t), t)
                cell, u = self.cells.cells(t)
                if self.groups > 1:
                    cell += group[rows] * self.cells.n_cells
                powers = torch.ones_like(u)
                for sums in self.sums[:, features].flatten(2):
                    sums.scatter_add_(1, cell, powers)
                    powers *= u
        self.class_sums.copy_(sums_by_class[:, :-1])

    @isolated()
    def add_events(
        self, features: Tensor, values: Tensor, classes: Tensor, first_feature: int = 0
    ) -> None:
        """Add the rows' nonzeros: feature, value and label of each (events,). The rows themselves
        are added by `add_rows`.
        """
        for events in ranges(len(values), math.prod(_BLOCK[values.device.type])):
            feature, value, label = features[events], values[events].double(), classes[events]
            self.low.scatter_reduce_(0, feature, value, "amin")
            self.high.scatter_reduce_(0, feature, value, "amax")
            t = (value - self.cells.center[feature]) / self.cells.scale[feature]
            if len(t) and t.abs().amax() > _SPAN:
                every = slice(0, len(self.low))
                self._refuse_span(
                    self._away(self.low.clamp(max=0), self.high.clamp(min=0), every),
                    every,
                    first_feature,
                )
            of_class = label >= 0
            self.class_sums.view(-1).scatter_add_(
                0, (feature * self.n_classes + label)[of_class], t[of_class]
            )
            cell, u = self.cells.cells(t)
            line = feature * self.groups + (self._group(label) if self.groups > 1 else 0)
            index = line * self.cells.n_cells + cell
            powers = torch.ones_like(u)
            for sums in self.sums.flatten(1):
                sums.scatter_add_(0, index, powers)
                powers *= u

    def _away(self, low: Tensor, high: Tensor, features: slice) -> Tensor:
        """Distance from the center to the farther of low and high (features,), in units:
        (features,).
        """
        center = self.cells.center[features]
        return torch.maximum(high - center, center - low) / self.cells.scale[features]

    def _refuse_span(self, away: Tensor, features: slice, first_feature: int) -> NoReturn:
        feature = int(away.argmax())
        raise ValueError(
            f"feature {first_feature + features.start + feature} has values"
            f" {float(away[feature]):.1e} times as far apart as in its first rows,"
            f" {float(self.cells.scale[features][feature]):.1e}, wanted less than {_SPAN:.0e}"
            " times: look for it in the codes"
        )

    @isolated()
    def add_rows(self, labels: Tensor) -> None:
        """Add rows (rows,) whose nonzeros `add_events` adds."""
        self._count(labels)

    def __getitem__(self, features: slice) -> FeatureSketch:
        """The sketch of some of the features, on the same memory."""
        part = copy.copy(self)
        part.cells = self.cells[features]
        part.sums = self.sums[:, features]
        part.class_sums, part.low, part.high = (
            self.class_sums[features],
            self.low[features],
            self.high[features],
        )
        return part

    @isolated()
    def merge(self, other: FeatureSketch) -> None:
        """Add the rows of another sketch with the same map, on whatever device, as if all had been
        added to this one.

        Raises:
            ValueError: the maps differ.
        """
        place = self.sums.device
        center, scale = other.cells.center.to(place), other.cells.scale.to(place)
        if other.sums.shape != self.sums.shape or not (
            torch.equal(center, self.cells.center) and torch.equal(scale, self.cells.scale)
        ):
            raise ValueError(
                "the sketches have different cells, wanted the same map: make both with one CellMap"
            )
        self.sums += other.sums.to(place)
        self.class_sums += other.class_sums.to(place)
        self.class_counts += other.class_counts.to(place)
        self.low = torch.minimum(self.low, other.low.to(place))
        self.high = torch.maximum(self.high, other.high.to(place))
        self.n_rows += other.n_rows

    @isolated()
    def slab(self, statistics: Statistics, *, nodes: int = 3) -> Slab:
        """The points for the losses; with `nodes` 1 every cell is only its mean, for a first
        approximation.
        """
        own = self.points(by_class=True, nodes=nodes) if self.groups > 1 else None
        return Slab(self.points(nodes=nodes), statistics.class_sums, statistics.center, own)

    @isolated()
    def statistics(self) -> Statistics:
        """Mean, spread and class sums of x; values without an event count as 0."""
        return Statistics.of(self)

    @isolated()
    def points(self, *, by_class: bool = False, nodes: int = 3) -> Points:
        """The rows of each feature as points, or those of each (feature, class) if they were kept
        apart.

        With `nodes` 1 every cell is only its mean: a third of the points, to begin with.
        """
        sums = self.sums[:, :, : self.n_classes].flatten(1, 2) if by_class else self.sums.sum(2)
        counts = sums[0]
        total = self.class_counts.repeat(len(self.low)) if by_class else self.n_rows
        zeros = (total - counts.sum(1)).clamp(min=0)
        filled = counts > 0
        width = int(filled.sum(1).max()) if len(counts) else 0
        order = filled.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        middle, half = (each[order] for each in self.cells.middles())
        sign = _signs(self.cells.n_cells, middle)[order]
        is_open = order % (self.cells.n_cells // 2) == self.cells.n_cells // 2 - 1
        reach = self._reach()[:, None].repeat_interleave(self.n_classes if by_class else 1, dim=0)
        counts, *powers = (each.gather(1, order) for each in sums)
        at, share, variance = _gauss(
            [power / counts.clamp(min=1) / half**k for k, power in enumerate(powers, 1)], nodes
        )
        groups = self.n_classes if by_class else 1
        center = self.cells.center.repeat_interleave(groups)[:, None]
        scale = self.cells.scale.repeat_interleave(groups)[:, None]
        # One more of each, for the zeros.
        values = center + scale * (sign * (middle + half * at - 1))
        mean = values[0] if nodes == 1 else (values * share).sum(0)
        none = torch.zeros_like(zeros)[:, None]
        return Points(
            values=torch.cat([*values, none], 1),
            weights=torch.cat([*(share * counts), zeros[:, None]], 1),
            cells=Cells(
                counts=counts,
                mean=mean,
                variance=variance * (scale * half).square(),
                half=scale * torch.where(is_open, torch.maximum(half, reach - middle), half),
            ),
        )

    def _reach(self) -> Tensor:
        """|t| + 1 of the farthest value (features,): how far the open cells, and no others, go."""
        farthest = torch.maximum(
            (self.high - self.cells.center).abs(), (self.low - self.cells.center).abs()
        )
        return torch.where(farthest.isfinite(), farthest / self.cells.scale + 1, 0.0)

    def _count(self, labels: Tensor) -> None:
        self.n_rows += len(labels)
        self.class_counts += count_classes(labels, self.n_classes)

    def _group(self, labels: Tensor) -> Tensor:
        return torch.where(labels < 0, self.n_classes, labels)


@dataclass(frozen=True)
class Statistics:
    """Statistics of the rows of each feature, float64 (features,).

    Attributes:
        mean: mean.
        std: population standard deviation, exactly 0 for a constant feature.
        low: least value.
        high: largest value.
        center: the point about which `class_sums` are taken.
        class_sums: (features, classes), sums of x - center over each class's rows.
        resolved: bool; False if the spread is too small for the cells.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor
    center: Tensor
    class_sums: Tensor
    resolved: Tensor

    @classmethod
    def of(cls, sketch: FeatureSketch) -> Statistics:
        """See `FeatureSketch.statistics`."""
        middle, _ = sketch.cells.middles()
        counts, first, second = sketch.sums[:3].sum(2)
        zeros = sketch.n_rows - counts.sum(1)
        low = torch.where(zeros > 0, sketch.low.clamp(max=0), sketch.low)
        high = torch.where(zeros > 0, sketch.high.clamp(min=0), sketch.high)
        sign = _signs(sketch.cells.n_cells, middle)
        origin = -sketch.cells.center / sketch.cells.scale  # t of x = 0
        in_cell = first / counts.clamp(min=1)
        t = sign * (middle + in_cell - 1)
        mean = ((counts * t).sum(1) + zeros * origin) / sketch.n_rows
        spread = (second - in_cell * first).clamp(min=0).sum(1) + (
            counts * (t - mean[:, None]).square()
        ).sum(1)
        variance = (spread + zeros * (origin - mean).square()) / sketch.n_rows
        constant = low == high
        scale = sketch.cells.scale
        return cls(
            mean=torch.where(constant, low, sketch.cells.center + scale * mean),
            std=torch.where(constant, 0.0, scale * variance.sqrt()),
            low=low,
            high=high,
            # The zeros' t are 0, since events are of maps about 0. Not about the mean, which may be
            # a single row's.
            center=torch.where(constant, low, sketch.cells.center),
            class_sums=torch.where(constant[:, None], 0.0, scale[:, None] * sketch.class_sums),
            resolved=constant | (variance.sqrt() > _RESOLVED),
        )


def ranges(stop: int, width: int) -> Iterator[slice]:
    """0 to `stop` in slices of `width`; the last may be shorter."""
    for start in range(0, stop, width):
        yield slice(start, min(start + width, stop))


def _signs(n_cells: int, like: Tensor) -> Tensor:
    """1 for the cells above the center, -1 for those below: float64 (n_cells,)."""
    sign = torch.ones(n_cells, dtype=like.dtype, device=like.device)
    sign[n_cells // 2 :] = -1
    return sign


def _gauss(moments: list[Tensor], nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes and weights (nodes, ...) with these raw moments 1 to 5 of a distribution on about [-1,
    1], and an upper bound on its variance.

    The nodes are eigenvalues of the Jacobi matrix, whose entries are those of the distribution's
    orthogonal polynomials. If the distribution has only one point or two, so do the nodes, and the
    rest has weight 0.
    """
    p1, p2, p3, p4, p5 = moments
    m = p1
    variance = (p2 - m * m).clamp(min=0)
    lost = 1e-14 * (p2 + 1)  # what rounding may hide
    bounded = variance + lost
    variance = torch.where(variance > lost, variance, 0.0)
    if nodes == 1:
        return m[None], torch.ones_like(m)[None], bounded
    std = torch.where(variance > 0, variance, 1.0).sqrt()
    m2 = m * m
    skew = (p3 - 3 * m * p2 + 2 * m2 * m) / std**3
    fourth = (p4 - 4 * m * p3 + 6 * m2 * p2 - 3 * m2 * m2) / std**4
    fifth = (p5 - 5 * m * p4 + 10 * m2 * p3 - 10 * m2 * m * p2 + 4 * m2 * m2 * m) / std**5
    second = fourth - skew * skew - 1
    three = second > 1e-10 * (fourth.abs() + 1)
    second = torch.where(three, second, 1.0)
    center = (fifth - 2 * skew * fourth + skew**3) / second
    jacobi = m.new_zeros(*m.shape, 3, 3)
    jacobi[..., 0, 1] = jacobi[..., 1, 0] = 1
    jacobi[..., 1, 1] = skew
    jacobi[..., 1, 2] = jacobi[..., 2, 1] = torch.where(three, second.sqrt(), 0.0)
    jacobi[..., 2, 2] = torch.where(three, center, 0.0)
    jacobi[variance == 0] = 0
    parts = [torch.linalg.eigh(part) for part in torch.split(jacobi.flatten(0, -3), _MATRICES)]
    y = torch.cat([values for values, _ in parts]).view(*m.shape, 3)
    weights = torch.cat([vectors[..., 0, :] for _, vectors in parts]).square().view(*m.shape, 3)
    # In exact arithmetic these sum to 1; a weight is then as exact as the sum of all rows is.
    weights /= weights.sum(-1, keepdim=True)
    return (m[..., None] + std[..., None] * y).movedim(-1, 0), weights.movedim(-1, 0), bounded

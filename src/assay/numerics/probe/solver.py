"""The fit: Newton's method on sketches of the features. Pairs that these do not settle are solved
on finer ones, and the rest on the rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.numerics.isolation import isolated
from assay.numerics.probe.cells import CellMap
from assay.numerics.probe.labeled import LabeledCodes, sketch_features, tabulate
from assay.numerics.probe.logistic import (
    Slab,
    minimize,
    moments_of_rows,
    penalized,
    slab_of_rows,
    slab_of_table,
)
from assay.numerics.probe.sketch import FeatureSketch, ranges
from assay.numerics.probe.state import FittedProbes, ProbeSettings

logger = logging.getLogger(__name__)

_FEATURES = 256  # features that are solved together


def fit(
    settings: ProbeSettings, data: LabeledCodes, ks: Sequence[int | None] = (None,)
) -> list[FittedProbes]:
    """Fit probes to the first k entries of each row, for each k (None: all of them), in the same
    passes over the codes.

    Raises:
        ValueError: codes are not finite, or a k is given for codes that are not sparse or have
            fewer entries.
    """
    data.check_ks(ks)
    n_rows, n_features = data.codes.n_rows, data.codes.n_features
    solvers = [
        _Solver(
            FittedProbes.empty(settings, n_features, data.class_counts, n_rows),
            data.class_counts.double(),
            n_rows,
        )
        for _ in ks
    ]
    if data.codes.format == "onehot":
        table = tabulate(data)
        for solver in solvers:
            solver.solve_table(table, data.telling("probes", n_features))
    else:
        _solve_sketches(solvers, data, ks)
        _refine(solvers, data, ks)
    return [_check_converged(solver.fitted) for solver in solvers]


@isolated()
def fit_sketch(settings: ProbeSettings, sketch: FeatureSketch) -> FittedProbes:
    """Fit on a sketch alone. Pairs that it does not settle, by its bound, are not `converged`: they
    need the rows.
    """
    fitted = FittedProbes.empty(settings, len(sketch.low), sketch.class_counts, sketch.n_rows)
    _Solver(fitted, sketch.class_counts, sketch.n_rows).solve_sketch(0, sketch)
    return _check_converged(fitted)


def _solve_sketches(
    solvers: Sequence[_Solver], data: LabeledCodes, ks: Sequence[int | None]
) -> None:
    by_class = solvers[0].fitted.settings.by_class
    feature_bytes = len(ks) * FeatureSketch.bytes_per_feature(data.n_classes, by_class=by_class)
    tell = data.telling("probes", data.codes.n_features)
    for columns in data.slabs(data.codes.n_features, feature_bytes):
        sketches = sketch_features(data, columns, ks, by_class=by_class)
        for solver, sketch in zip(solvers, sketches, strict=True):
            solver.solve_sketch(columns.start, sketch, tell)
        del sketches, sketch  # before there are the next slab's


def _refine(solvers: Sequence[_Solver], data: LabeledCodes, ks: Sequence[int | None]) -> None:
    """Gather the features of unsettled pairs of all solvers together, as many as the memory holds,
    and solve them again.
    """
    wanted = []
    for number, solver in enumerate(solvers):
        open_ = ~solver.fitted.converged & solver.fitted.fitted_classes
        solver.fitted.n_refined = int(open_.sum())
        wanted += [(number, feature) for feature in open_.any(1).nonzero().flatten().tolist()]
    tell = data.telling("refined", len(wanted))
    for some in data.slabs(len(wanted), 8 * data.codes.n_rows):
        groups = [
            torch.tensor(
                [f for n, f in wanted[some] if n == number],
                device=data.labels.device,
                dtype=torch.int64,
            )
            for number in range(len(solvers))
        ]
        gathered = data.gather(list(zip(groups, ks, strict=True)))
        for solver, features, values in zip(solvers, groups, gathered, strict=True):
            solver.refine(features, values, data.labels)
            tell(some.stop)


def _check_converged(fitted: FittedProbes) -> FittedProbes:
    if not fitted.converged.all():
        logger.warning(
            "%d of %d probes are not at their optimum after %d iterations: raise max_iter",
            int((~fitted.converged).sum()),
            fitted.converged.numel(),
            fitted.settings.max_iter,
        )
    return fitted


@dataclass(frozen=True)
class _Solver:
    """Fills in probes from points of `n_rows` training rows, of which `class_counts` (classes,)
    float64 are of each class.
    """

    fitted: FittedProbes
    class_counts: Tensor
    n_rows: int

    @isolated()
    def solve_table(self, table: Tensor, tell: Callable[[int], None]) -> None:
        """Fit one-hot features from their counts, as `tabulate` gives them."""
        ones = table.sum(1).double()
        fitted = self.fitted
        fitted.feature_mean = ones / self.n_rows
        fitted.feature_std = (fitted.feature_mean * (1 - fitted.feature_mean)).sqrt()
        fitted.max_abs = (ones > 0).double()
        for columns in ranges(len(table), 4 * _FEATURES):
            slab = slab_of_table(table[columns], self.class_counts, self.n_rows)
            self._solve(columns, [slab], fitted.fitted_pairs(columns))
            tell(columns.stop)

    @isolated()
    def solve_sketch(
        self, first: int, sketch: FeatureSketch, tell: Callable[[int], None] = lambda _: None
    ) -> None:
        """Fit the features from number `first` on by their sketch. Afterwards `converged` is False
        for pairs that it did not settle.
        """
        fitted = self.fitted
        for part in ranges(len(sketch.low), _FEATURES):
            here = slice(first + part.start, first + part.stop)
            some = sketch[part]
            statistics = some.statistics()
            fitted.feature_mean[here] = statistics.mean
            fitted.feature_std[here] = statistics.std
            fitted.max_abs[here] = torch.maximum(statistics.low.abs(), statistics.high.abs())
            slabs = [some.slab(statistics, nodes=nodes) for nodes in (1, 3)]
            self._solve(here, slabs, fitted.fitted_pairs(here))
            fitted.converged[here] &= statistics.resolved[:, None] | ~fitted.fitted_classes
            tell(here.stop)

    @isolated()
    def refine(self, features: Tensor, values: Tensor, labels: Tensor) -> None:
        """Fit the unsettled pairs of `features` (f,), whose `values` are (f, rows), again."""
        fitted, settings = self.fitted, self.fitted.settings
        for part in ranges(len(features), 32):
            here = features[part]
            # The sketch's may be those of too wide cells.
            fitted.feature_mean[here], fitted.feature_std[here] = moments_of_rows(values[part])
            if not settings.by_class and len(labels) > settings.fine_rows:
                sketch = FeatureSketch(
                    CellMap.of_all_rows(values[part], settings.fine_bits), fitted.n_classes
                )
                sketch.add(values[part].T, labels)
                self._solve(here, [sketch.slab(sketch.statistics())], fitted.open_pairs(here))
            left = fitted.open_pairs(here)
            if len(left):
                self._solve(here, [slab_of_rows(values[part], labels)], left)

    def _solve(self, features: slice | Tensor, slabs: Sequence[Slab], pairs: Tensor) -> None:
        """Fit `pairs` of `features` on one slab after the other, and keep the results of the last.

        `converged` is then whether a probe is at its optimum and, by the slab's bound, that is the
        optimum of the rows.
        """
        if len(pairs) == 0:
            return
        fitted, settings = self.fitted, self.fitted.settings
        center = fitted.center[:, pairs % fitted.n_classes]
        theta = center
        for number, slab in enumerate(slabs):
            losses = fitted.losses(slab, features, self.class_counts, self.n_rows)
            last = number == len(slabs) - 1
            theta, steps, done = minimize(
                penalized(losses, pairs, center, settings.ridge),
                theta,
                max_iter=settings.max_iter,
                tol=settings.tol if last else max(settings.tol, 1e-9),
            )
        loss, _, (bb, bw, ww) = losses.derivatives(pairs, theta)
        bound = losses.bound(pairs, theta)
        curvature = ww + settings.ridge - bw.square() / (bb + settings.ridge)
        w = theta[1].abs()
        settled = (bound <= settings.ce_error) & (
            8 * bound <= settings.w_error * (1 + w) * w * curvature
        )
        settled |= bound == 0
        _put(fitted.intercept_standardized, features, pairs, theta[0])
        _put(fitted.coef_standardized, features, pairs, theta[1])
        _put(fitted.train_ce, features, pairs, loss)
        _put(fitted.n_iter, features, pairs, steps)
        _put(fitted.converged, features, pairs, done & settled)


def _put(matrix: Tensor, features: slice | Tensor, pairs: Tensor, entries: Tensor) -> None:
    part = matrix[features]
    part.view(-1)[pairs] = entries
    matrix[features] = part

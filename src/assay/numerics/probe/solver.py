"""The fit: Newton's method on sketches of the features. Pairs that these do not settle are solved
on finer ones, and the rest on the rows.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assay.numerics.isolation import isolated
from assay.numerics.probe.cells import CellMap
from assay.numerics.probe.labeled import LabeledCodes, group_size, solved_together
from assay.numerics.probe.logistic import (
    Slab,
    minimize,
    moments_of_rows,
    penalized,
    slab_of_rows,
    slab_of_table,
)
from assay.numerics.probe.passes import SketchPass, TablePass
from assay.numerics.probe.sketch import FeatureSketch, ranges
from assay.numerics.probe.state import FittedProbes, ProbeSettings

logger = logging.getLogger(__name__)

_COUNTED = 1024  # features of a table that are solved together
_REFINED = 32  # features of unsettled pairs that are, at the most


class Fitting:
    """A fit of probes of some features to the first k entries of each row, for each k (None: all of
    them), in the same passes over the codes.

    It stands between two pieces of work whenever it tells of progress: `checkpoint` then says
    where, and `resume` goes on from there to the same bits, also where other slabs fit the memory.

    Args:
        settings: how they are fitted.
        data: the codes and labels.
        ks: K.
        columns: the features, whole groups of `solved_together`; None: all.

    Raises:
        ValueError: a k is given for codes that are not sparse or have fewer entries.
    """

    def __init__(
        self,
        settings: ProbeSettings,
        data: LabeledCodes,
        ks: Sequence[int | None] = (None,),
        columns: slice | None = None,
    ) -> None:
        data.check_ks(ks)
        n_rows = data.codes.n_rows
        self._data = data
        self._ks = list(ks)
        self._columns = slice(0, data.codes.n_features) if columns is None else columns
        self._solvers = [
            _Solver(
                FittedProbes.empty(settings, self._n_features, data.class_counts, n_rows),
                data.class_counts.double(),
                n_rows,
            )
            for _ in ks
        ]
        self._by_class = settings.by_class
        self._solved = self._columns.start  # the features before it are, by their sketches
        self._sketching: SketchPass | None = None
        self._table = TablePass(data) if data.codes.format == "onehot" else None
        # Of each K and feature whether the sketch left a pair open: what is refined, in groups.
        self._unsettled: Tensor | None = None
        self._refined = 0
        self._done = False

    @property
    def _n_features(self) -> int:
        return int(self._columns.stop - self._columns.start)

    def run(self) -> list[FittedProbes]:
        """Do what is left; gives the probes of each k.

        Raises:
            ValueError: codes are not finite, or name features that there are not.
        """
        if not self._done:
            if self._table is not None:
                table = self._table.run()[self._columns]
                for solver in self._solvers:
                    solver.solve_table(table, self._data.telling("probes", self._n_features))
            else:
                self._solve_sketches()
                self._refine()
            self._done = True
            for solver in self._solvers:
                _check_converged(solver.fitted)
        return [solver.fitted for solver in self._solvers]

    def _solve_sketches(self) -> None:
        data, first = self._data, self._columns.start
        feature_bytes = len(self._ks) * FeatureSketch.bytes_per_feature(
            data.n_classes, by_class=self._by_class
        )
        group = solved_together(data.n_classes, by_class=self._by_class)
        tell = data.telling("probes", self._n_features)
        while self._solved < self._columns.stop:
            if self._sketching is None:
                stop = self._solved + data.room(feature_bytes, group)
                slab = slice(self._solved, min(stop, self._columns.stop))
                self._sketching = SketchPass(data, slab, self._ks, by_class=self._by_class)
            sketches = self._sketching.run()
            begin, stop = self._sketching.columns.start, self._sketching.columns.stop
            for start in range(self._solved, stop, group):
                end = min(start + group, stop)
                for solver, sketch in zip(self._solvers, sketches, strict=True):
                    some = sketch[slice(start - begin, end - begin)]
                    solver.solve_sketch(slice(start - first, end - first), some)
                    tell(start - first)  # where it can stop, without what this group has so far
                self._solved = end
                if end == stop:
                    self._sketching = None
                tell(end - first)
            del sketches, sketch, some  # before there are the next slab's

    def _refine(self) -> None:
        """Gather the features of unsettled pairs of all solvers together, as many as the memory
        holds, and solve them again.
        """
        data = self._data
        if self._unsettled is None:
            open_ = [~each.fitted.converged & each.fitted.fitted_classes for each in self._solvers]
            for solver, pairs in zip(self._solvers, open_, strict=True):
                solver.fitted.n_refined = int(pairs.sum())
            self._unsettled = torch.stack([pairs.any(1) for pairs in open_])
        groups = self._groups(self._unsettled)
        tell = data.telling("refined", len(groups))
        while left := groups[self._refined :]:
            room = data.room(8 * data.codes.n_rows)
            ends = itertools.accumulate(len(features) for _, features in left)
            left = left[: max(1, sum(end <= room for end in ends))]
            numbers = list(dict.fromkeys(number for number, _ in left))
            wanted = [torch.cat([each for of, each in left if of == n]) for n in numbers]
            gathered = data.gather(
                [
                    (features + self._columns.start, self._ks[number])
                    for number, features in zip(numbers, wanted, strict=True)
                ]
            )
            parts = [
                part
                for number, values in zip(numbers, gathered, strict=True)
                for part in torch.split(values, [len(each) for of, each in left if of == number])
            ]
            for (number, features), values in zip(left, parts, strict=True):
                self._solvers[number].refine(features, values, data.labels)
                self._refined += 1
                tell(self._refined)
            del gathered, parts, values  # before there are the next

    def _groups(self, unsettled: Tensor) -> list[tuple[int, Tensor]]:
        """What is refined as one: the number of a K, and features counted from the first. Groups
        are of features whose sketches were solved together, so that whoever shares the fit has the
        same.
        """
        data = self._data
        solved = solved_together(data.n_classes, by_class=self._by_class)
        most = min(solved, group_size(_REFINED, 8 * data.codes.n_rows))
        return [
            (number, part)
            for number, row in enumerate(unsettled)
            for some in ranges(len(row), solved)
            for part in torch.split(row[some].nonzero().squeeze(1) + some.start, most)
            if len(part)
        ]

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Where it stands: tensors, and JSON."""
        state: dict[str, Any] = {
            "solved": self._solved,
            "refined": self._refined,
            "done": self._done,
        }
        tensors: dict[str, Tensor] = {}
        if self._table is not None and not self._done:
            tensors, state["table"] = self._table.checkpoint()
        if self._sketching is not None:
            tensors, state["sketch"] = self._sketching.checkpoint(self._solved)
        if self._unsettled is not None:
            tensors |= {"unsettled": self._unsettled}
            state["n_refined"] = [solver.fitted.n_refined for solver in self._solvers]
        for number, solver in enumerate(self._solvers):
            fitted = solver.fitted.state_dict().items()
            tensors |= {f"fitted{number}.{name}": each for name, each in fitted}
        return tensors, state

    def resume(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from what `checkpoint` gave, of a fit of the same features to the same codes."""
        place = self._data.labels.device
        self._solved, self._refined = int(state["solved"]), int(state["refined"])
        self._done = bool(state["done"])
        if self._table is not None and not self._done:
            self._table.resume(tensors, state["table"])
        if "sketch" in state:
            self._sketching = SketchPass.resume(
                self._data, self._ks, tensors, state["sketch"], by_class=self._by_class
            )
        if "unsettled" in tensors:
            self._unsettled = tensors["unsettled"].to(place)
        for number, solver in enumerate(self._solvers):
            solver.fitted.take(
                {
                    name.partition(".")[2]: each.to(place, copy=True)
                    for name, each in tensors.items()
                    if name.startswith(f"fitted{number}.")
                }
            )
            solver.fitted.n_refined = state.get("n_refined", {number: 0})[number]


@isolated()
def fit_sketch(settings: ProbeSettings, sketch: FeatureSketch) -> FittedProbes:
    """Fit on a sketch alone. Pairs that it does not settle, by its bound, are not `converged`: they
    need the rows.
    """
    fitted = FittedProbes.empty(settings, len(sketch.low), sketch.class_counts, sketch.n_rows)
    solver = _Solver(fitted, sketch.class_counts, sketch.n_rows)
    group = solved_together(sketch.n_classes, by_class=settings.by_class)
    for part in ranges(len(sketch.low), group):
        solver.solve_sketch(part, sketch[part])
    return _check_converged(fitted)


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
        for columns in ranges(len(table), _COUNTED):
            slab = slab_of_table(table[columns], self.class_counts, self.n_rows)
            self._solve(columns, [slab], fitted.fitted_pairs(columns))
            tell(columns.stop)

    @isolated()
    def solve_sketch(self, here: slice, sketch: FeatureSketch) -> None:
        """Fit some features, all together, by their sketch. Afterwards `converged` is False for
        pairs that it did not settle.
        """
        fitted = self.fitted
        statistics = sketch.statistics()
        fitted.feature_mean[here] = statistics.mean
        fitted.feature_std[here] = statistics.std
        fitted.max_abs[here] = torch.maximum(statistics.low.abs(), statistics.high.abs())
        slabs = [sketch.slab(statistics, nodes=nodes) for nodes in (1, 3)]
        self._solve(here, slabs, fitted.fitted_pairs(here))
        fitted.converged[here] &= statistics.resolved[:, None] | ~fitted.fitted_classes

    @isolated()
    def refine(self, features: Tensor, values: Tensor, labels: Tensor) -> None:
        """Fit the unsettled pairs of `features` (f,), whose `values` are (f, rows), again, all
        together.
        """
        fitted, settings = self.fitted, self.fitted.settings
        # The sketch's may be those of too wide cells.
        fitted.feature_mean[features], fitted.feature_std[features] = moments_of_rows(values)
        if not settings.by_class and len(labels) > settings.fine_rows:
            cells = CellMap.of_all_rows(values, settings.fine_bits)
            sketch = FeatureSketch(cells, fitted.n_classes)
            sketch.add(values.T, labels)
            slab = sketch.slab(sketch.statistics())
            self._solve(features, [slab], fitted.open_pairs(features))
        left = fitted.open_pairs(features)
        if len(left):
            self._solve(features, [slab_of_rows(values, labels)], left)

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

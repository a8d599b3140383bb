"""The results of fitted probes on any rows: CE, average precision, confusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from assay.numerics.isolation import isolated
from assay.numerics.probe.cells import BITS, CellMap
from assay.numerics.probe.labeled import LabeledCodes, group_size, solved_together
from assay.numerics.probe.logistic import Slab, slab_of_table
from assay.numerics.probe.passes import TablePass
from assay.numerics.probe.sketch import FeatureSketch, ranges
from assay.numerics.probe.state import FittedProbes
from assay.numerics.ranking import check_labels, count_classes, rank_features, rank_table
from assay.numerics.scores import Judgment

_COUNTED = 256  # features of a table that are judged together
_RANKED = {  # features that are ranked between two moments at which it can stop
    "cpu": 64,
    "cuda": 1024,
}


class Judging:
    """The judgment of probes of some features on the first k entries of each row, each with its own
    k (None: all of them), in the same passes.

    It stands between two pieces of work whenever it tells of progress: `checkpoint` then says
    where, and `resume` goes on from there to the same bits, also where other slabs fit the memory.

    Args:
        probes: each with its k.
        data: the codes and labels.
        columns: the features that the probes are of, whole groups of `solved_together`; None: all.

    Raises:
        ValueError: the codes have no first k entries.
    """

    def __init__(
        self,
        probes: Sequence[tuple[FittedProbes, int | None]],
        data: LabeledCodes,
        columns: slice | None = None,
    ) -> None:
        data.check_ks([k for _, k in probes])
        self._probes = list(probes)
        self._data = data
        self._columns = slice(0, data.codes.n_features) if columns is None else columns
        self._judged = self._columns.start  # the features before it are
        self._done = False
        self._table = TablePass(data) if data.codes.format == "onehot" else None
        with isolated():
            self._results = [
                torch.full_like(fitted.train_ce, torch.nan).repeat(4, 1, 1) for fitted, _ in probes
            ]
            self._thresholds = [
                fitted.feature_mean[:, None] - fitted.intercept_standardized / fitted.coef
                for fitted, _ in probes
            ]

    def run(self) -> list[Judgment]:
        """Do what is left.

        Raises:
            ValueError: there is NaN or infinity.
        """
        data = self._data
        if not self._done:
            if self._table is not None:
                self._judge_table(self._table.run()[self._columns])
            else:
                self._judge_columns()
            self._done = True
        with isolated():
            for (fitted, _), result in zip(self._probes, self._results, strict=True):
                result[:, :, ~fitted.fitted_classes] = torch.nan
            return [
                Judgment(r[0], r[1], r[2], r[3], data.class_counts.double(), data.codes.n_rows)
                for r in self._results
            ]

    @isolated()
    def _judge_table(self, table: Tensor) -> None:
        data, n_rows = self._data, self._data.codes.n_rows
        for (fitted, _), result, threshold in zip(
            self._probes, self._results, self._thresholds, strict=True
        ):
            for here in ranges(len(table), _COUNTED):
                slab = slab_of_table(table[here], data.class_counts.double(), n_rows)
                ranked = rank_table(table[here], data.class_counts, n_rows, threshold[here])
                result[0, here] = _loss(fitted, slab, here, data)
                result[1:, here] = _choose(fitted, ranked, here, data)

    def _judge_columns(self) -> None:
        data, begin = self._data, self._columns.start
        n_rows, place = data.codes.n_rows, data.labels.device
        by_class = self._probes[0][0].settings.by_class
        group = min(
            solved_together(data.n_classes, by_class=by_class),
            group_size(16 if by_class else 64, 4 * n_rows),
        )
        step = max(group, _RANKED[place.type])
        tell = data.telling("ranked", self._columns.stop - begin)
        while self._judged < self._columns.stop:
            first = self._judged
            room = data.room(4 * n_rows * len(self._probes), group)
            stop = min(first + room, self._columns.stop)
            features = torch.arange(first, stop, dtype=torch.int64, device=place)
            gathered = data.gather([(features, k) for _, k in self._probes])
            for some in ranges(stop - first, step):
                here = slice(first + some.start - begin, first + some.stop - begin)
                for number, values in enumerate(gathered):
                    self._judge_values(number, values[some], here, group)
                    tell(here.start)  # where it can stop, without what these features have so far
                self._judged = first + some.stop
                tell(here.stop)
            del gathered, values  # before there are the next slab's

    @isolated()
    def _judge_values(self, number: int, values: Tensor, here: slice, group: int) -> None:
        """Judge some probes by their features' `values` (f, rows), of which `group` have their
        losses computed together.
        """
        fitted, result, data = self._probes[number][0], self._results[number], self._data
        threshold = self._thresholds[number][here]
        ranked = rank_features(values, data.labels, data.n_classes, threshold)
        first = self._columns.start
        result[0, here] = _loss_of_values(fitted, values, here, data, group, first)
        result[1:, here] = _choose(fitted, ranked, here, data)

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Where it stands: tensors, and JSON."""
        state: dict[str, Any] = {"judged": self._judged, "done": self._done}
        tensors: dict[str, Tensor] = {}
        if self._table is not None and not self._done:
            tensors, state["table"] = self._table.checkpoint()
        tensors |= {f"judged{number}": each for number, each in enumerate(self._results)}
        return tensors, state

    def resume(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from what `checkpoint` gave, of a judgment of the same probes on the same codes."""
        place = self._data.labels.device
        self._judged = int(state["judged"])
        self._done = bool(state["done"])
        if self._table is not None and not self._done:
            self._table.resume(tensors, state["table"])
        self._results = [
            tensors[f"judged{number}"].to(place, copy=True) for number in range(len(self._probes))
        ]


@isolated()
def base_loss(fitted: FittedProbes, labels: Tensor) -> Tensor:
    """Mean CE in nats on these labels of the intercept b0 alone: float64 (classes,), NaN for a
    class not fitted.
    """
    check_labels(labels, len(labels), fitted.n_classes)
    rate = count_classes(labels, fitted.n_classes).double() / len(labels)
    loss = -rate * fitted.base_rate.log() - (1 - rate) * (-fitted.base_rate).log1p()
    if fitted.settings.by_class:
        loss = torch.full_like(loss, 2.0).log()
    return torch.where(fitted.fitted_classes, loss, torch.nan)


def _theta(fitted: FittedProbes, columns: slice) -> Tensor:
    """b and w of every pair of some features, float64 (2, pairs)."""
    return torch.stack(
        [fitted.intercept_standardized[columns], fitted.coef_standardized[columns]]
    ).flatten(1)


def _loss(fitted: FittedProbes, slab: Slab, columns: slice, data: LabeledCodes) -> Tensor:
    pairs = fitted.fitted_pairs(columns)
    losses = fitted.losses(slab, columns, data.class_counts, data.codes.n_rows)
    matrix = torch.full_like(fitted.train_ce[columns], torch.nan)
    matrix.view(-1)[pairs] = losses.loss(pairs, _theta(fitted, columns)[:, pairs])
    return matrix


def _loss_of_values(
    fitted: FittedProbes,
    values: Tensor,
    columns: slice,
    data: LabeledCodes,
    group: int,
    first_feature: int,
) -> Tensor:
    """Losses on rows, `values` (features, rows), `group` features together: on sketches of them if
    these are exact enough.
    """
    settings, by_class = fitted.settings, fitted.settings.by_class
    matrix = torch.full(
        (len(values), data.n_classes), torch.nan, dtype=torch.float64, device=values.device
    )
    for part in ranges(len(values), group):
        here = slice(columns.start + part.start, columns.start + part.stop)
        some, theta = values[part], _theta(fitted, here)
        pairs = fitted.fitted_pairs(here)
        for bits in (BITS, None) if by_class else (BITS, settings.fine_bits, None):
            if len(pairs) == 0:
                break
            if bits is None:
                losses = fitted.losses_of_rows(some, here, data.labels)
            else:
                cells = CellMap.of_rows(some) if bits == BITS else CellMap.of_all_rows(some, bits)
                sketch = FeatureSketch(cells, data.n_classes, by_class=by_class)
                sketch.add(some.T, data.labels, first_feature=first_feature + here.start)
                slab = sketch.slab(sketch.statistics())
                losses = fitted.losses(slab, here, data.class_counts, data.codes.n_rows)
            matrix[part].view(-1)[pairs] = losses.loss(pairs, theta[:, pairs])
            missed = losses.bound(pairs, theta[:, pairs]) + losses.rounding(pairs, theta[:, pairs])
            pairs = pairs[missed > 10 * settings.ce_error]
    return matrix


def _choose(fitted: FittedProbes, ranked: Tensor, columns: slice, data: LabeledCodes) -> Tensor:
    """From ranks in both directions, those that the probes' signs choose: average precision, true
    positives and predicted (3, f, classes).
    """
    w, b = fitted.coef_standardized[columns], fitted.intercept_standardized[columns]
    chosen = torch.where(w < 0, ranked[:, 1], ranked[:, 0])
    counts = data.class_counts.double()
    everything = torch.stack([counts, torch.full_like(counts, data.codes.n_rows)])[:, None]
    chosen[1:] = torch.where(w == 0, torch.where(b.sigmoid() >= 0.5, everything, 0.0), chosen[1:])
    return chosen

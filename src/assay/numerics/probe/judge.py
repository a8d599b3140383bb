"""The results of fitted probes on any rows: CE, average precision, confusion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from assay.numerics.isolation import isolated
from assay.numerics.probe.cells import BITS, CellMap
from assay.numerics.probe.labeled import LabeledCodes, tabulate
from assay.numerics.probe.logistic import Slab, slab_of_table
from assay.numerics.probe.sketch import FeatureSketch, ranges
from assay.numerics.probe.state import FittedProbes
from assay.numerics.ranking import check_labels, count_classes, rank_features, rank_table
from assay.numerics.scores import Judgment

_FEATURES = 256  # features of a table that are judged together


def judge(probes: Sequence[tuple[FittedProbes, int | None]], data: LabeledCodes) -> list[Judgment]:
    """Judge probes on the first k entries of each row, each with its own k (None: all of them), in
    the same passes.

    Raises:
        ValueError: the codes have no first k entries, or there is NaN or infinity.
    """
    data.check_ks([k for _, k in probes])
    n_rows, n_features = data.codes.n_rows, data.codes.n_features
    with isolated():
        results = [
            torch.full_like(fitted.train_ce, torch.nan).repeat(4, 1, 1) for fitted, _ in probes
        ]
        thresholds = [
            fitted.feature_mean[:, None] - fitted.intercept_standardized / fitted.coef
            for fitted, _ in probes
        ]
    if data.codes.format == "onehot":
        table = tabulate(data)
        with isolated():
            for (fitted, _), result, threshold in zip(probes, results, thresholds, strict=True):
                for columns in ranges(n_features, _FEATURES):
                    slab = slab_of_table(table[columns], data.class_counts.double(), n_rows)
                    ranked = rank_table(
                        table[columns], data.class_counts, n_rows, threshold[columns]
                    )
                    result[0, columns] = _loss(fitted, slab, columns, data)
                    result[1:, columns] = _choose(fitted, ranked, columns, data)
    else:
        tell = data.telling("ranked", n_features)
        for columns in data.slabs(n_features, 4 * n_rows * len(probes)):
            features = torch.arange(
                columns.start, columns.stop, dtype=torch.int64, device=data.labels.device
            )
            gathered = data.gather([(features, k) for _, k in probes])
            for values, (fitted, _), result, threshold in zip(
                gathered, probes, results, thresholds, strict=True
            ):
                with isolated():
                    ranked = rank_features(values, data.labels, data.n_classes, threshold[columns])
                    result[0, columns] = _loss_of_values(fitted, values, columns, data)
                    result[1:, columns] = _choose(fitted, ranked, columns, data)
                tell(columns.stop)
            del gathered, values  # before there are the next slab's
    with isolated():
        for (fitted, _), result in zip(probes, results, strict=True):
            result[:, :, ~fitted.fitted_classes] = torch.nan
        return [
            Judgment(r[0], r[1], r[2], r[3], data.class_counts.double(), n_rows) for r in results
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
    fitted: FittedProbes, values: Tensor, columns: slice, data: LabeledCodes
) -> Tensor:
    """Losses on rows, `values` (features, rows): on sketches of them if these are exact enough."""
    settings, by_class = fitted.settings, fitted.settings.by_class
    matrix = torch.full(
        (len(values), data.n_classes), torch.nan, dtype=torch.float64, device=values.device
    )
    for part in ranges(len(values), 16 if by_class else 64):
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
                sketch.add(some.T, data.labels, first_feature=here.start)
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

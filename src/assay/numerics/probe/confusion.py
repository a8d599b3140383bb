"""How often fitted probes predict their class, and are right, counted in one pass over the codes.

`judge` ranks the rows of each feature, whose columns it has to gather. Here only the side of each
threshold counts: a value is placed among the thresholds of its feature once, for all classes, and
zeros of sparse codes are counted by what is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from assay.codes import Batch, Codes, Format
from assay.numerics.codes import as_codes, check_finite, check_indices, checked_batches
from assay.numerics.isolation import isolated
from assay.numerics.probe.labeled import LabeledCodes, Progress
from assay.numerics.probe.sketch import ranges
from assay.numerics.probe.state import FittedProbes

_FEATURES = 1024  # features of dense codes that are placed together


def count_predictions(
    fitted: FittedProbes,
    codes: Codes | Tensor,
    labels: Tensor,
    *,
    slab_rows: int = 4096,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows of the class that each probe predicts to be of it, p >= 0.5, and all rows that it does:
    the true positives and predicted of `LogisticProbe1d.judge`, from one pass.

    Memory is some 24 bytes for each (feature, class), and a batch. The work is done on the labels'
    device.

    Args:
        fitted: the `fitted_` of a probe.
        codes: of any format, or a tensor (rows, features).
        labels: (rows,) int64 in 0..n_classes-1, or -1: a negative of every class.
        slab_rows: rows read at once.
        progress: called with what is done, how much of it, and of how much.

    Returns:
        Two float64 (features, classes), NaN for a class that is not fitted.

    Raises:
        ValueError: the codes have another number of features than those of the fit, labels are of
            another kind, there is NaN or infinity, or an index is no feature.
    """
    codes, n_features = as_codes(codes), len(fitted.feature_mean)
    if codes.n_features != n_features:
        raise ValueError(
            f"codes have {codes.n_features} features, wanted {n_features}, as in fit: give codes of"
            " the same model"
        )
    data = LabeledCodes(codes, labels, fitted.n_classes, slab_rows, progress=progress)
    with isolated():
        counts = _Counts(fitted, data)
    tell = data.telling("counted", data.codes.n_rows)
    for rows, batch in checked_batches(data.codes, data.slab_rows):
        with isolated():
            here = {
                name: tensor.to(data.labels.device)
                for name, tensor in batch.items()
                if name in ("values", "indices")
            }
            check_finite(here, rows.start)
            counts.add(here, data.labels[rows], data.codes.format)
        tell(rows.stop)
    with isolated():
        return counts.predictions()


class _Counts:
    """Values at or above each threshold: of all rows, and of the class's own."""

    def __init__(self, fitted: FittedProbes, data: LabeledCodes) -> None:
        self._fitted = fitted
        self._data = data
        w = fitted.coef_standardized
        threshold = fitted.feature_mean[:, None] - fitted.intercept_standardized / fitted.coef
        # Where the weight is negative, values up to the threshold are predicted: all but those
        # above it, which are those from the next number on.
        above = torch.nextafter(threshold, torch.full_like(threshold, torch.inf))
        reached = torch.where(w < 0, above, threshold).nan_to_num(torch.inf).to(data.labels.device)
        # The last is for rows of no class, and above every value.
        self._thresholds = torch.nn.functional.pad(reached, (0, 1), value=torch.inf)
        ordered, self._order = reached.sort(dim=1)
        self._sorted = torch.nn.functional.pad(ordered, (0, 1), value=torch.inf)
        # Values by feature and how many of its thresholds they are at or above.
        self._passed = torch.zeros_like(self._sorted, dtype=torch.int64).flatten()
        # By feature and class, the last for rows of no class: those at or above the threshold, and
        # all that were seen.
        self._own, self._seen_own = self._passed.clone(), self._passed.clone()

    def add(self, batch: Batch, labels: Tensor, code_format: Format) -> None:
        """Count a batch."""
        classes = torch.where(labels < 0, self._data.n_classes, labels)
        if code_format == "dense":
            for columns in ranges(self._data.codes.n_features, _FEATURES):
                self._add_columns(batch["values"][:, columns].double(), classes, columns)
            return
        indices = batch["indices"].long()
        if code_format == "onehot":
            indices = indices[:, None]
            values = torch.ones(indices.shape, dtype=torch.float64, device=indices.device)
        else:
            values = batch["values"].double()
        check_indices(indices, self._data.codes.n_features)
        kept = values != 0
        self._add_events(indices[kept], values[kept], classes[kept.nonzero()[:, 0]])

    def _add_columns(self, values: Tensor, classes: Tensor, columns: slice) -> None:
        """All rows' values (b, f) of some features."""
        x = values.T.contiguous()
        first = (
            torch.arange(columns.start, columns.stop, dtype=torch.int64, device=x.device)[:, None]
            * self._sorted.shape[1]
        )
        passed = torch.searchsorted(self._sorted[columns].contiguous(), x, right=True)
        reached = x >= self._thresholds[columns].gather(1, classes.expand_as(x))
        self._count(first + passed, first + classes, reached)

    def _add_events(self, features: Tensor, values: Tensor, classes: Tensor) -> None:
        """Nonzero values (n,), each with its feature and class."""
        width = self._sorted.shape[1]
        low, high = torch.zeros_like(features), torch.full_like(features, width - 1)
        # `searchsorted` has one row of thresholds for all values, or as many values for each row.
        for _ in range((width - 1).bit_length()):
            middle = (low + high) // 2
            passes = values >= self._sorted[features, middle]
            low, high = torch.where(passes, middle + 1, low), torch.where(passes, high, middle)
        own = features * width + classes
        self._count(features * width + low, own, values >= self._thresholds[features, classes])
        self._seen_own.scatter_add_(0, own, torch.ones_like(own))

    def _count(self, passed: Tensor, own: Tensor, reached: Tensor) -> None:
        self._passed.scatter_add_(0, passed.flatten(), torch.ones_like(passed).flatten())
        self._own.scatter_add_(0, own.flatten(), reached.long().flatten())

    def predictions(self) -> tuple[Tensor, Tensor]:
        """True positives and predicted."""
        fitted, n_rows = self._fitted, self._data.codes.n_rows
        counts = self._data.class_counts
        # Who passes p thresholds passes the p lowest.
        passed = self._passed.view_as(self._sorted)
        by_size = passed.flip(1).cumsum(1).flip(1)[:, 1:]
        above = torch.empty_like(by_size).scatter_(1, self._order, by_size)
        own = self._own.view_as(self._sorted)[:, :-1]
        if self._data.codes.format != "dense":  # what was not seen is 0
            zero = self._thresholds[:, :-1] <= 0
            seen_own = self._seen_own.view_as(self._sorted)[:, :-1]
            above = above + zero * (n_rows - passed.sum(1, keepdim=True))
            own = own + zero * (counts - seen_own)
        w = fitted.coef_standardized.to(above.device)
        everywhere = fitted.intercept_standardized.to(above.device).sigmoid() >= 0.5
        result = []
        for count, all_of in (
            (own, counts.expand_as(own)),
            (above, torch.full_like(above, n_rows)),
        ):
            beyond = torch.where(w < 0, all_of - count, count)
            beyond = torch.where(w == 0, everywhere * all_of, beyond).double()
            beyond[:, ~fitted.fitted_classes.to(above.device)] = torch.nan
            result.append(beyond)
        return result[0], result[1]

"""Codes with their labels, and the passes over them: a sketch of features, a table of counts,
columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from assay.codes import Batch, Codes
from assay.numerics.codes import (
    TopKCodes,
    check_finite,
    check_indices,
    checked_batches,
    gather_columns,
)
from assay.numerics.isolation import isolated
from assay.numerics.memory import free_bytes
from assay.numerics.probe.cells import CellMap
from assay.numerics.probe.sketch import FeatureSketch, ranges
from assay.numerics.ranking import check_labels, count_classes

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is, and of how much: rows or features."""


def check_slabs(rows: int, features: int | None) -> None:
    """Check the sizes of slabs.

    Raises:
        ValueError: they hold no rows or no features.
    """
    for name, value in (("slab_rows", rows), ("slab_features", features)):
        if value is not None and value < 1:
            raise ValueError(f"found {name} = {value}, wanted at least 1: change {name}")


@dataclass(frozen=True)
class LabeledCodes:
    """Codes with a label for each row, to be worked on in slabs, on the labels' device.

    Attributes:
        codes: of any format.
        labels: int64 (rows,) in 0..n_classes-1, or -1: a negative of every class.
        n_classes: classes.
        slab_rows: rows read at once.
        slab_features: features worked on together; None: as many as a quarter of the free memory
            holds.
        progress: called with the numbers of rows and features that are done.

    Raises:
        ValueError: labels are not int64 (rows,) in -1..n_classes-1, or slabs hold nothing.
    """

    codes: Codes
    labels: Tensor
    n_classes: int
    slab_rows: int = 4096
    slab_features: int | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        check_slabs(self.slab_rows, self.slab_features)
        check_labels(self.labels, self.codes.n_rows, self.n_classes)

    def check_ks(self, ks: Sequence[int | None]) -> None:
        """Check that the codes have first k entries for each of `ks`; None is all of them.

        Raises:
            ValueError: they have not, or there is no k.
        """
        if not ks:
            raise ValueError("found no K, wanted at least 1: give None for all entries of a row")
        for k in ks:
            if k is not None:
                TopKCodes(self.codes, k)  # raises where it cannot be

    @cached_property
    def class_counts(self) -> Tensor:
        """Rows of each class, int64 (n_classes,)."""
        return count_classes(self.labels, self.n_classes)

    def slabs(self, stop: int, feature_bytes: int) -> Iterator[slice]:
        """0 to `stop` in slices of features to work on together, `feature_bytes` of memory each."""
        fits = max(1, free_bytes(self.labels.device) // 4 // feature_bytes)
        return ranges(stop, min(self.slab_features or fits, fits))

    def telling(self, what: str, total: int) -> Callable[[int], None]:
        """A function that tells `progress`, if there is one, how much is done."""

        def tell(done: int) -> None:
            if self.progress is not None:
                self.progress(what, done, total)

        return tell

    def gather(self, wanted: Sequence[tuple[Tensor, int | None]]) -> list[Tensor]:
        """Columns as float32 (f, rows), from one pass: for each pair of features (f,) and k, these
        features of the first k entries of each row.
        """
        tell = self.telling("gathered", self.codes.n_rows)
        return gather_columns(self.codes, wanted, self.slab_rows, self.labels.device, tell)


def sketch_features(
    data: LabeledCodes,
    columns: slice,
    ks: Sequence[int | None],
    *,
    by_class: bool,
    cells: CellMap | None = None,
) -> list[FeatureSketch]:
    """Sketches of some features of dense or sparse codes: one of the first k entries of each row
    for every k, from one pass.

    All use the same cells: `cells`, or those that the first rows suggest.
    """
    order = sorted(range(len(ks)), key=lambda i: math.inf if (k := ks[i]) is None else k)
    sketches: list[FeatureSketch] = []
    tell = data.telling("rows", data.codes.n_rows)
    for rows, batch in checked_batches(data.codes, data.slab_rows):
        labels = data.labels[rows]
        here = {
            name: tensor.to(labels.device)
            for name, tensor in batch.items()
            if name in ("values", "indices")
        }
        if data.codes.format == "dense":
            x = here["values"][:, columns].float()
            if not sketches:
                sketches = [
                    FeatureSketch(cells or CellMap.of_rows(x.T), data.n_classes, by_class=by_class)
                ]
            sketches[0].add(x, labels, rows.start, columns.start)
        else:
            check_indices(here["indices"], data.codes.n_features)
            check_finite(here, rows.start)
            if not sketches:
                feature, value, _ = _events(here, columns, labels)
                cells = cells or CellMap.of_events(feature, value, columns.stop - columns.start)
                sketches = [FeatureSketch(cells, data.n_classes, by_class=by_class) for _ in ks]
            # An entry beyond the first k of a row is of the sketches with a larger k alone.
            begin: int | None = 0
            for i in order:
                part = {name: tensor[:, begin : ks[i]] for name, tensor in here.items()}
                sketches[i].add_events(*_events(part, columns, labels), columns.start)
                begin = ks[i]
            sketches[order[0]].add_rows(labels)
        tell(rows.stop)
    for smaller, larger in itertools.pairwise(order):
        sketches[larger].merge(sketches[smaller])
    return sketches


def _events(batch: Batch, columns: slice, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Feature, value and label of each nonzero of a sparse batch within the columns; features are
    counted from the first column.
    """
    values, indices = batch["values"], batch["indices"].long()
    kept = (values != 0) & (indices >= columns.start) & (indices < columns.stop)
    return indices[kept] - columns.start, values[kept].double(), labels[kept.nonzero()[:, 0]]


def tabulate(data: LabeledCodes) -> Tensor:
    """Rows of each (feature, class) of one-hot codes, int64 (features, n_classes + 1); the last
    column is label -1.
    """
    n_features, n_classes, labels = data.codes.n_features, data.n_classes, data.labels
    tell = data.telling("rows", data.codes.n_rows)
    with isolated():
        table = torch.zeros(n_features * (n_classes + 1), dtype=torch.int64, device=labels.device)
        classes = torch.where(labels < 0, n_classes, labels)
    for rows, batch in checked_batches(data.codes, data.slab_rows):
        with isolated():
            features = batch["indices"].to(labels.device, torch.int64)
            check_indices(features, n_features)
            table.scatter_add_(
                0, features * (n_classes + 1) + classes[rows], torch.ones_like(features)
            )
        tell(rows.stop)
    return table.view(n_features, n_classes + 1)


def count_table(
    codes: Codes, labels: Tensor, n_classes: int, slab_rows: int, progress: Progress | None = None
) -> Tensor:
    """Rows of each (feature, class) of one-hot codes, int64 (features, n_classes + 1); the last
    column is label -1.
    """
    return tabulate(LabeledCodes(codes, labels, n_classes, slab_rows, progress=progress))

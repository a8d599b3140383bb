"""Passes over labeled codes that can stop after any batch and go on from there: sketches of some
features, and the table of counts of one-hot codes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from assay.codes import Batch, Codes
from assay.numerics.codes import check_finite, check_indices, checked_batches
from assay.numerics.isolation import isolated
from assay.numerics.probe.cells import CellMap
from assay.numerics.probe.labeled import LabeledCodes, Progress
from assay.numerics.probe.sketch import FeatureSketch


class SketchPass:
    """One pass that sketches some features of dense or sparse codes: for every k the first k
    entries of each row.

    All use the same cells: `cells`, or those that the first rows suggest. It is between two batches
    whenever it tells of progress: `checkpoint` then says where, and `resume` goes on from there to
    the same bits.

    Attributes:
        columns: the features.
        sketches: one for each k, whole when `run` is done.
    """

    def __init__(
        self,
        data: LabeledCodes,
        columns: slice,
        ks: Sequence[int | None],
        *,
        by_class: bool,
        cells: CellMap | None = None,
    ) -> None:
        self.columns = columns
        self.sketches: list[FeatureSketch] = []
        self._data = data
        self._ks = list(ks)
        self._by_class = by_class
        self._cells = cells
        self._row = 0

    def run(self) -> list[FeatureSketch]:
        """Go over the rows that are left; gives the sketches."""
        data, ks = self._data, self._ks
        order = sorted(range(len(ks)), key=lambda i: math.inf if (k := ks[i]) is None else k)
        tell = data.telling("rows", data.codes.n_rows)
        for rows, batch in checked_batches(data.codes, data.slab_rows, self._row):
            labels = data.labels[rows]
            here = {
                name: tensor.to(labels.device)
                for name, tensor in batch.items()
                if name in ("values", "indices")
            }
            if data.codes.format == "dense":
                self._add_values(here["values"], labels, rows.start)
            else:
                self._add_entries(here, labels, rows.start, order)
            if rows.stop == data.codes.n_rows:
                for smaller, larger in itertools.pairwise(order):
                    self.sketches[larger].merge(self.sketches[smaller])
            self._row = rows.stop
            tell(rows.stop)
        return self.sketches

    def _add_values(self, values: Tensor, labels: Tensor, first_row: int) -> None:
        x = values[:, self.columns].float()
        if not self.sketches:
            cells = self._cells or CellMap.of_rows(x.T)
            self.sketches = [FeatureSketch(cells, self._data.n_classes, by_class=self._by_class)]
        self.sketches[0].add(x, labels, first_row, self.columns.start)

    def _add_entries(
        self, here: Batch, labels: Tensor, first_row: int, order: Sequence[int]
    ) -> None:
        data, columns = self._data, self.columns
        check_indices(here["indices"], data.codes.n_features)
        check_finite(here, first_row)
        if not self.sketches:
            cells = self._cells
            if cells is None:
                # Of all features: the unit of one without an entry is that of the others.
                every = slice(0, data.codes.n_features)
                feature, value, _ = _events(here, every, labels)
                cells = CellMap.of_events(feature, value, every.stop)[columns]
            self.sketches = [
                FeatureSketch(cells, data.n_classes, by_class=self._by_class) for _ in self._ks
            ]
        # An entry beyond the first k of a row is of the sketches with a larger k alone.
        begin: int | None = 0
        for i in order:
            part = {name: tensor[:, begin : self._ks[i]] for name, tensor in here.items()}
            self.sketches[i].add_events(*_events(part, columns, labels), columns.start)
            begin = self._ks[i]
        self.sketches[order[0]].add_rows(labels)

    def checkpoint(self, first: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Where it stands, without the features before `first`: tensors, and JSON."""
        state = {"columns": [first, self.columns.stop], "row": self._row}
        tensors: dict[str, Tensor] = {}
        for number, sketch in enumerate(self.sketches):
            left = sketch[slice(first - self.columns.start, None)]
            tensors |= {f"{number}.{name}": each for name, each in _pack(left).items()}
            state |= {"bits": left.cells.bits, "octaves": left.cells.octaves}
        return tensors, state

    @classmethod
    def resume(
        cls,
        data: LabeledCodes,
        ks: Sequence[int | None],
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        by_class: bool,
    ) -> SketchPass:
        """A pass that goes on from what `checkpoint` gave."""
        made = cls(data, slice(*state["columns"]), ks, by_class=by_class)
        made._row = int(state["row"])
        if made._row:
            place = data.labels.device
            made.sketches = [
                _unpack(
                    {
                        name: tensors[f"{number}.{name}"].to(place, copy=True)
                        for name in ("center", "scale", "filled", "sums", *_PLAIN)
                    },
                    int(state["bits"]),
                    int(state["octaves"]),
                    data.n_classes,
                    by_class=by_class,
                )
                for number in range(1 if data.codes.format == "dense" else len(ks))
            ]
        return made


class TablePass:
    """One pass that counts the rows of each (feature, class) of one-hot codes. It can stop and go
    on as `SketchPass`.

    Attributes:
        table: int64 (features, n_classes + 1), the last column of label -1.
    """

    @isolated()
    def __init__(self, data: LabeledCodes) -> None:
        self._data = data
        self._row = 0
        self.table = torch.zeros(
            data.codes.n_features,
            data.n_classes + 1,
            dtype=torch.int64,
            device=data.labels.device,
        )

    def run(self) -> Tensor:
        """Go over the rows that are left; gives the table."""
        data, width = self._data, self._data.n_classes + 1
        tell = data.telling("rows", data.codes.n_rows)
        with isolated():
            classes = torch.where(data.labels < 0, data.n_classes, data.labels)
        for rows, batch in checked_batches(data.codes, data.slab_rows, self._row):
            with isolated():
                features = batch["indices"].to(classes.device, torch.int64)
                check_indices(features, data.codes.n_features)
                self.table.view(-1).scatter_add_(
                    0, features * width + classes[rows], torch.ones_like(features)
                )
            self._row = rows.stop
            tell(rows.stop)
        return self.table

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Where it stands: tensors, and JSON."""
        return {"table": self.table}, {"row": self._row}

    def resume(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from what `checkpoint` gave."""
        self.table = tensors["table"].to(self.table.device, copy=True)
        self._row = int(state["row"])


def count_table(
    codes: Codes, labels: Tensor, n_classes: int, slab_rows: int, progress: Progress | None = None
) -> Tensor:
    """Rows of each (feature, class) of one-hot codes, int64 (features, n_classes + 1); the last
    column is label -1.
    """
    return TablePass(LabeledCodes(codes, labels, n_classes, slab_rows, progress=progress)).run()


def _events(batch: Batch, columns: slice, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Feature, value and label of each nonzero of a sparse batch within the columns; features are
    counted from the first column.
    """
    values, indices = batch["values"], batch["indices"].long()
    kept = (values != 0) & (indices >= columns.start) & (indices < columns.stop)
    return indices[kept] - columns.start, values[kept].double(), labels[kept.nonzero()[:, 0]]


_PLAIN = ("class_sums", "class_counts", "low", "high", "n_rows")
"""What is kept of a sketch as it is."""


@isolated()
def _pack(sketch: FeatureSketch) -> dict[str, Tensor]:
    """A sketch as tensors, without its empty cells, which are most of them."""
    sums = sketch.sums.flatten(1)
    filled = sums[0].nonzero().squeeze(1)
    return {
        "center": sketch.cells.center,
        "scale": sketch.cells.scale,
        "filled": filled,
        "sums": sums[:, filled],
        "class_sums": sketch.class_sums,
        "class_counts": sketch.class_counts,
        "low": sketch.low,
        "high": sketch.high,
        "n_rows": torch.tensor(sketch.n_rows, dtype=torch.int64, device="cpu"),
    }


@isolated()
def _unpack(
    tensors: Mapping[str, Tensor], bits: int, octaves: int, n_classes: int, *, by_class: bool
) -> FeatureSketch:
    cells = CellMap(tensors["center"], tensors["scale"], bits, octaves)
    sketch = FeatureSketch(cells, n_classes, by_class=by_class)
    sketch.sums.flatten(1)[:, tensors["filled"]] = tensors["sums"]
    for name in ("class_sums", "class_counts", "low", "high"):
        setattr(sketch, name, tensors[name])
    sketch.n_rows = int(tensors["n_rows"])
    return sketch

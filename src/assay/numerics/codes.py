"""Codes of every row, of any format and origin, as batches of named tensors.

A batch is a dict. By format it holds

- `dense`: `values` (b, n_features) float32;
- `sparse`: `values` (b, k) float32, by falling magnitude, and `indices` (b, k) int64. A feature
  that is not named is 0. Each is named once at most, but entries of value 0, which pad rows to one
  length, may name any;
- `onehot`: `indices` (b,) int64, the one feature that is 1.

Any other key rides along: its first dimension is the batch's. Encoders add `error` (b,) float64,
each row's squared reconstruction error.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from assay.codes import Batch, Codes, Format
from assay.numerics.isolation import isolated


def count_rows(batch: Batch) -> int:
    """Rows in a batch of any format."""
    return next(iter(batch.values())).shape[0]


def check_indices(indices: Tensor, n_features: int) -> None:
    """Check that all indices are features.

    Raises:
        ValueError: one is not.
    """
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= n_features):
        raise ValueError(
            f"codes name features {int(indices.min())} to {int(indices.max())}, wanted 0 to"
            f" {n_features - 1}: were they made by another model?"
        )


@isolated()
def densify(
    batch: Batch, code_format: Format, n_features: int, start: int = 0, stop: int | None = None
) -> Tensor:
    """Features `start` to `stop` (default: all the rest) of a batch as float32 (b, stop - start).

    Raises:
        ValueError: an index is not a feature.
    """
    stop = n_features if stop is None else stop
    if code_format == "dense":
        return batch["values"][:, start:stop].float()
    indices = batch["indices"].long()
    if code_format == "onehot":
        indices = indices.unsqueeze(1)
        values = torch.ones(indices.shape, dtype=torch.float32, device=indices.device)
    else:
        values = batch["values"].float()
    check_indices(indices, n_features)
    width = stop - start
    inside = (indices >= start) & (indices < stop)
    # The last column takes what is outside.
    dense = torch.zeros(indices.shape[0], width + 1, dtype=torch.float32, device=indices.device)
    # Added, since padding may name a feature again: with 0.
    return dense.scatter_add_(1, torch.where(inside, indices - start, width), values)[:, :width]


class TensorCodes:
    """A plain (rows, features) tensor as dense codes; its batches are float32."""

    format: Format = "dense"

    def __init__(self, values: Tensor) -> None:
        if values.ndim != 2:
            raise ValueError(
                f"codes have shape {tuple(values.shape)}, wanted (rows, features): reshape them"
            )
        self.values = values
        self.n_rows, self.n_features = values.shape
        self.k: int | None = self.n_features

    def batches(self, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """The rows in order, `batch_size` at a time."""
        for first in range(start, self.n_rows, batch_size):
            yield {"values": self.values[first : first + batch_size].float()}


class SelectedCodes:
    """Other codes without the rows where `rows` (n_rows,) bool is False."""

    def __init__(self, codes: Codes, rows: Tensor) -> None:
        if rows.dtype != torch.bool or tuple(rows.shape) != (codes.n_rows,):
            raise ValueError(
                f"rows are {rows.dtype} of shape {tuple(rows.shape)}, wanted torch.bool of shape"
                f" ({codes.n_rows},): give one flag for each row of the codes"
            )
        self.codes = codes
        self.rows = rows
        self.format: Format = codes.format
        self.n_rows = int(rows.sum())
        self.n_features = codes.n_features
        self.k = codes.k

    def batches(self, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """The selected rows of each batch of the other codes; none is empty.

        A pass begins at the first selected row; one from a later row on begins at a multiple of the
        batch size of the other codes, as their batches do, so that codes that are computed are
        computed from the same rows together.

        Raises:
            ValueError: there is NaN or infinity. The message counts rows of the other codes, since
                whoever reads these knows the selected ones only.
        """
        if start >= self.n_rows:
            return
        selected = self.rows.nonzero()
        wanted = int(selected[start])
        first = max(int(selected[0]), wanted - wanted % batch_size)
        for batch in self.codes.batches(batch_size, first):
            check_finite(batch, first)
            last = first + count_rows(batch)
            kept = self.rows[first:last].clone()
            kept[: max(0, wanted - first)] = False  # of a batch that was begun before
            first = last
            if kept.any():
                yield {name: tensor[kept.to(tensor.device)] for name, tensor in batch.items()}


class ComputedCodes:
    """Codes made on the fly: `stream(batch_size, start)` starts a fresh pass over the rows from
    `start` on, in order.
    """

    def __init__(
        self,
        code_format: Format,
        n_rows: int,
        n_features: int,
        k: int | None,
        stream: Callable[[int, int], Iterator[Batch]],
    ) -> None:
        self.format: Format = code_format
        self.n_rows = n_rows
        self.n_features = n_features
        self.k = k
        self.stream = stream

    def batches(self, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """A fresh pass."""
        return self.stream(batch_size, start)


class TopKCodes:
    """The first `k` entries of each row of sparse `codes` that are sorted by falling magnitude:
    top-K codes for a smaller K.

    Batch for batch, PCA's equal those of the encoder at `k` bit for bit, `error` too: it is the
    other codes' error plus the squares of the dropped entries, added in the encoder's order. Those
    of a folder of rounded values equal the folder written at `k`. Of PCA's whitened codes only the
    entries are those at `k`: their squares are no errors.

    Raises:
        ValueError: `codes` are not sparse, or their K is below `k`.
    """

    format: Format = "sparse"

    def __init__(self, codes: Codes, k: int) -> None:
        if codes.format != "sparse" or codes.k is None or not 1 <= k <= codes.k:
            raise ValueError(
                f"found {codes.format} codes of {codes.k} entries a row, wanted sparse ones of at"
                f" least {k}: encode with a larger K"
            )
        self.codes = codes
        self.n_rows = codes.n_rows
        self.n_features = codes.n_features
        self.k: int | None = k

    def batches(self, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """The other codes' batches, cut."""
        for batch in self.codes.batches(batch_size, start):
            values = batch["values"]
            cut = batch | {"values": values[:, : self.k], "indices": batch["indices"][:, : self.k]}
            if "error" in batch:
                cut["error"] = add_squares(batch["error"], values[:, self.k :])
            yield cut


@isolated()
def add_squares(error: Tensor, dropped: Tensor) -> Tensor:
    """error (b,) plus the squares of dropped (b, n), float64 (b,), added one by one from the last
    column to the first.
    """
    total = error.double().clone()
    # One by one, so that a sum that was broken off can be resumed, on any device, and give the same
    # bits.
    for column in reversed(dropped.T.contiguous()):
        total += column.double().square()
    return total


@isolated()
def sparsify(batch: Batch, *, top_k: int | None = None, margin: float | None = None) -> Batch:
    """A dense batch reduced to the `top_k` entries of largest magnitude in each row, or to those of
    magnitude `margin` or more.

    The result is sparse, by falling magnitude, ties to the lower index; with `margin` it is padded
    to the longest row of the batch.

    Raises:
        ValueError: the batch is not dense, `top_k` or `margin` is out of range, or not exactly one
            of them is given.
    """
    if "indices" in batch:
        raise ValueError("found codes with indices, wanted a dense batch: it is sparse already")
    values = batch["values"]
    if (top_k is None) == (margin is None):
        raise ValueError(
            f"found top_k = {top_k} and margin = {margin}, wanted one of them: leave the other out"
        )
    if top_k is not None and not 1 <= top_k <= values.shape[1]:
        raise ValueError(
            f"found top_k = {top_k}, wanted 1 to {values.shape[1]}, the number of features: change"
            " top_k"
        )
    if margin is not None and not margin >= 0:
        raise ValueError(f"found margin = {margin}, wanted at least 0: change margin")
    order = values.abs().argsort(dim=1, descending=True, stable=True)
    if margin is not None:
        top_k = int((values.abs() >= margin).sum(1).max()) if len(values) else 0
    order = order[:, :top_k]
    kept = values.gather(1, order)
    if margin is not None:
        kept = torch.where(kept.abs() >= margin, kept, 0.0)
    return batch | {
        "values": kept,
        "indices": torch.where(kept != 0, order, 0) if margin is not None else order,
    }


def as_codes(codes: Codes | Tensor) -> Codes:
    """Codes as they are; a tensor (rows, features) as dense codes."""
    return TensorCodes(codes) if isinstance(codes, Tensor) else codes


def checked_batches(codes: Codes, batch_size: int, start: int = 0) -> Iterator[tuple[slice, Batch]]:
    """Each batch of the rows from `start` on, with the rows it holds, detached from gradients.

    Raises:
        ValueError: the batches hold more or fewer rows than `n_rows`, or the batch size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"found batches of {batch_size} rows, wanted at least 1: raise it")
    if 0 < start == codes.n_rows:
        return
    for batch in codes.batches(batch_size, start):
        stop = start + count_rows(batch)
        if stop > codes.n_rows:
            raise ValueError(
                f"codes hold {stop} rows or more, wanted {codes.n_rows}: make them again"
            )
        yield slice(start, stop), {name: tensor.detach() for name, tensor in batch.items()}
        start = stop
    if start != codes.n_rows:
        raise ValueError(f"codes hold {start} rows, wanted {codes.n_rows}: make them again")


@isolated()
def check_finite(batch: Batch, first_row: int) -> None:
    """Check a batch of any format for NaN and infinity.

    Raises:
        ValueError: there is one. The message names the row, counted from `first_row`, and the
            feature.
    """
    values = batch.get("values")
    if values is None or bool(
        values.abs().sum(dtype=torch.float64).isfinite()
    ):  # one pass, and no tensor of flags
        return
    row, place = (~values.isfinite()).nonzero()[0].tolist()
    raise ValueError(
        not_finite(
            first_row + row, int(batch["indices"][row, place]) if "indices" in batch else place
        )
    )


def not_finite(row: int, feature: int) -> str:
    """The message about a value that is NaN or infinity."""
    return (
        f"row {row}, feature {feature} is NaN or infinity, wanted finite values: look for it in the"
        " codes, and in the activations that they were made of"
    )


def gather_columns(
    codes: Codes,
    wanted: Sequence[tuple[Tensor, int | None]],
    batch_size: int,
    device: torch.device | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Some features of all rows, one in each row of the result, from one pass over the codes.

    Args:
        codes: of any format.
        wanted: any number of pairs of features (f,) int64, which may repeat, and k: of sparse codes
            only the first k entries of each row count, or all with None.
        batch_size: rows read at once.
        device: where the result lives; None: the CPU.
        progress: called with the number of rows that are done.

    Returns:
        A float32 (f, n_rows) for each pair.

    Raises:
        ValueError: there is NaN or infinity, or an index is not a feature.
    """
    place = torch.device("cpu") if device is None else device
    with isolated():
        gathered = [
            torch.empty(len(features), codes.n_rows, dtype=torch.float32, device=place)
            for features, _ in wanted
        ]
    for rows, batch in checked_batches(codes, batch_size):
        with isolated():
            here = {
                name: tensor.to(place)
                for name, tensor in batch.items()
                if name in ("values", "indices")
            }
            check_finite(here, rows.start)
            for columns, (features, k) in zip(gathered, wanted, strict=True):
                if len(features):
                    part = (
                        {name: each[:, :k] for name, each in here.items()}
                        if codes.format == "sparse"
                        else here
                    )
                    columns[:, rows] = _columns(part, codes, features.to(place)).T
        if progress is not None:
            progress(rows.stop)
    return gathered


def _columns(batch: Batch, codes: Codes, features: Tensor) -> Tensor:
    """Features of a batch, float32 (b, f)."""
    first, last = int(features.min()), int(features.max()) + 1
    dense = densify(batch, codes.format, codes.n_features, first, last)
    if len(features) == last - first and bool((features.diff() == 1).all()):
        return dense
    return dense[:, features - first]


def measure_l0(codes: Codes, batch_size: int = 1024) -> float:
    """Mean count of nonzeros per row; a zero that a sparse code stores is not one.

    Raises:
        ValueError: there are no rows.
    """
    return float(measure_l0_by_rank(codes, batch_size)[-1])


def measure_l0_by_rank(codes: Codes, batch_size: int = 1024) -> Tensor:
    """L0 of the first 1, 2, ... entries of each row of sparse codes, float64 (k,), from one pass;
    of other codes it is (1,).

    Raises:
        ValueError: there are no rows.
    """
    if codes.n_rows == 0:
        raise ValueError("codes hold 0 rows, wanted at least 1 to measure L0")
    with isolated():
        nonzeros = torch.zeros(1, dtype=torch.int64, device="cpu")
    for _, batch in checked_batches(codes, batch_size):
        with isolated():
            if codes.format == "onehot":
                found = torch.tensor([count_rows(batch)], dtype=torch.int64, device="cpu")
            elif codes.format == "dense":
                found = batch["values"].count_nonzero().cpu()[None]
            else:
                found = batch["values"].count_nonzero(dim=0).cpu()
            width = max(len(found), len(nonzeros))
            nonzeros = torch.nn.functional.pad(nonzeros, (0, width - len(nonzeros)))
            nonzeros[: len(found)] += found
    with isolated():
        return nonzeros.cumsum(0).double() / codes.n_rows

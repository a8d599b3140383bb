"""Metrics of the order of a feature's values: average precision, and purity of the highest rows."""

import torch
from torch import Tensor

from assay.numerics.isolation import isolated

# Values sorted at once: about ten int64 temporaries of this size are alive, 2.7 GB on a GPU, which
# fewer would not keep busy.
_BLOCK = {"cpu": 1 << 20, "cuda": 1 << 25}


def check_labels(labels: Tensor, n_rows: int, n_classes: int) -> None:
    """Check that labels are int64 (n_rows,) in -1..n_classes-1, where -1 is a row of no class.

    Raises:
        ValueError: they are not, or there are none.
    """
    if labels.dtype != torch.int64 or tuple(labels.shape) != (n_rows,):
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}, wanted torch.int64 of shape"
            f" ({n_rows},): give one label for each row"
        )
    if n_rows == 0:
        raise ValueError("there are 0 rows, wanted at least 1: is every row void?")
    low, high = int(labels.min()), int(labels.max())
    if low < -1 or high >= n_classes:
        raise ValueError(
            f"labels run from {low} to {high}, wanted 0 to {n_classes - 1}, or -1 for a row of no"
            f" class: map them, or give more classes than {n_classes}"
        )


@isolated()
def count_classes(labels: Tensor, n_classes: int) -> Tensor:
    """Rows of each class, int64 (n_classes,), by labels (rows,) int64; those labeled -1 are in
    none.

    The host does not wait for a GPU, as it does twice for `bincount`.
    """
    counts = torch.zeros(n_classes + 1, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(0, labels + 1, torch.ones_like(labels))[1:]


@isolated()
def rank_features(values: Tensor, labels: Tensor, n_classes: int, thresholds: Tensor) -> Tensor:
    """Rank all rows by each feature's values, for every class: float64 (3, 2, features, n_classes).

    Along the first dimension:

    - the average precision of the values as scores, AP = sum over thresholds t of (R_t - R_{t-1})
      P_t, where equal scores are one threshold, as in scikit-learn's `average_precision_score`; NaN
      for a class without rows;
    - of the rows on `thresholds` or beyond, the number that are of the class;
    - the number of all rows on `thresholds` or beyond.

    Along the second both directions: the highest values first, and rows of the threshold or more;
    the lowest first, and rows of the threshold or less.

    All is from one sort per feature, O(rows log rows) for all classes.

    Args:
        values: (features, rows).
        labels: int64 (rows,), -1 for a row of no class.
        n_classes: classes.
        thresholds: float64 (features, n_classes).

    Raises:
        ValueError: values hold NaN, or labels are out of range.
    """
    n_features, n_rows = values.shape
    check_labels(labels, n_rows, n_classes)
    _check_not_nan(values)
    # The rows of no class: one class more, left out below.
    classes = torch.where(labels < 0, n_classes, labels)
    counts = count_classes(classes, n_classes + 1)
    ranks = torch.empty(3, 2, n_features, n_classes, dtype=torch.float64, device=values.device)
    width = max(1, _BLOCK[values.device.type] // n_rows)
    for start in range(0, n_features, width):
        block = slice(start, start + width)
        ranks[:, :, block] = _rank_block(
            values[block], classes, counts, thresholds[block].nan_to_num()
        )
    return ranks


def _check_not_nan(values: Tensor) -> None:
    # The largest of numbers with a NaN among them is NaN: one pass without a copy.
    if values.numel() and values.amax().isnan():
        raise ValueError(
            "values hold NaN, wanted numbers that can be ranked: look for it in the codes"
        )


def _rank_block(values: Tensor, classes: Tensor, counts: Tensor, thresholds: Tensor) -> Tensor:
    """As `rank_features`, of (f, rows) values, for every class in `counts` but the last.

    The sum over thresholds is a mean over the class's own rows of the precision at each row's
    threshold. After a second, stable sort by class, a row's place in its class's segment is its
    count of hits.
    """
    n_features, n_rows = values.shape
    ordered, order = values.sort(dim=1, descending=True)
    first, last = _run_bounds(ordered[:, 1:] != ordered[:, :-1])

    by_class = classes[order].argsort(dim=1, stable=True)
    first, last = first.gather(1, by_class), last.gather(1, by_class)
    segment = classes.sort().values
    hit_first, hit_last = _run_bounds(
        (first[:, 1:] != first[:, :-1]) | (segment[1:] != segment[:-1])
    )

    begins = counts.cumsum(0) - counts
    begin, end = begins[segment], counts.cumsum(0)[segment]
    descending = (hit_last + 1 - begin).double() / (last + 1)
    ascending = (end - hit_first).double() / (n_rows - first)

    sums = torch.zeros(2, n_features, len(counts), dtype=torch.float64, device=values.device)
    sums[0].scatter_add_(1, segment.expand(n_features, -1), descending)
    sums[1].scatter_add_(1, segment.expand(n_features, -1), ascending)
    precision = (sums / counts)[:, :, :-1]  # 0 / 0: an absent class is NaN

    # Within a class's segment `by_class` are the places of its rows, from the highest value on.
    rising = ordered.flip(1).double()
    low = torch.searchsorted(rising, thresholds)
    # Rows >= and > the threshold.
    above = n_rows - torch.stack([low, torch.searchsorted(rising, thresholds, right=True)])
    places = segment * n_rows + by_class
    base = torch.arange(len(counts) - 1, device=values.device) * n_rows
    hits = torch.stack(
        [torch.searchsorted(places, base + above[0]), torch.searchsorted(places, base + above[1])]
    )
    hits = hits - begins[:-1]
    hits[1], above[1] = counts[:-1] - hits[1], n_rows - above[1]
    return torch.stack([precision, hits.double(), above.double()])


def _run_bounds(changes: Tensor) -> tuple[Tensor, Tensor]:
    """First and last index of the run that each position is in; `changes` (f, n - 1) is True
    between two runs.
    """
    n = changes.shape[1] + 1
    index = torch.arange(n, device=changes.device)
    edge = changes.new_ones(changes.shape[0], 1)
    first = torch.where(torch.cat([edge, changes], 1), index, 0).cummax(1).values
    last = torch.where(torch.cat([changes, edge], 1), index, n - 1).flip(1).cummin(1).values.flip(1)
    return first, last


@isolated()
def rank_table(table: Tensor, class_counts: Tensor, n_rows: int, thresholds: Tensor) -> Tensor:
    """As `rank_features`, for features that are 0 or 1, from counts: float64 (3, 2, features,
    classes).

    `table` (features, classes + 1) counts the rows of a class where the feature is 1; its last
    column counts those of no class. `class_counts` (classes,) is without that column. There are two
    thresholds: the rows that rank first, then all.
    """
    hits, class_counts = table[:, :-1].double(), class_counts.double()
    ones = table.sum(1, keepdim=True).double()
    hits = torch.stack([hits, class_counts - hits])
    first = torch.stack([ones, n_rows - ones])
    recall = hits / class_counts
    average_precision = recall * (hits / first.clamp(min=1)) + (1 - recall) * (
        class_counts / n_rows
    )
    # The rows that rank first are beyond the threshold unless it is beyond them, and the others
    # where all are.
    high, low = (
        torch.stack([thresholds <= 1, thresholds >= 0]),
        torch.stack([thresholds <= 0, thresholds >= 1]),
    )
    of_class = high * hits + low * (class_counts - hits)
    return torch.stack(
        [average_precision, of_class, (high * first + low * (n_rows - first)).expand_as(of_class)]
    )


@isolated()
def top_rows(values: Tensor, k: int) -> Tensor:
    """The k rows (all, if there are fewer) with the highest of values (rows,), highest first, ties
    to the lower row.
    """
    if k < len(values):
        # Sorting them all takes far longer.
        candidates = (values >= values.topk(k).values[-1]).nonzero().flatten()
        return candidates[values[candidates].argsort(descending=True, stable=True)][:k]
    return values.argsort(descending=True, stable=True)


@isolated()
def strongest_examples(values: Tensor, counted: Tensor, patches: int, k: int) -> dict[str, Tensor]:
    """For each feature the k examples (all, if there are fewer) with the strongest patches, by
    falling strength of their strongest patch.

    Args:
        values: (features, rows), float; each `patches` rows on end are an example.
        counted: (rows,), bool: the patches that can be the strongest.
        patches: rows per example.
        k: examples.

    Returns:
        `example` and `patch` int64 (features, k), ties to the lower; and `strength` (features, k,
        patches), the values of all their patches. An example without a patch that counts comes
        last, with patch -1.

    Raises:
        ValueError: values hold NaN, or the rows are no whole number of examples.
    """
    n_rows = values.shape[1]
    if patches < 1 or n_rows % patches or tuple(counted.shape) != (n_rows,) or k < 1:
        raise ValueError(
            f"found {n_rows} rows, {patches} patches an example, {tuple(counted.shape)} flags and"
            f" k = {k}, wanted whole examples, a flag for each row and at least 1 of each"
        )
    maps = values.view(len(values), -1, patches)
    ranked = maps.masked_fill(~counted.view(-1, patches), -torch.inf)
    strength = ranked.amax(2)
    _check_not_nan(strength)
    example = strength.argsort(dim=1, descending=True, stable=True)[:, :k]
    rows = torch.arange(len(values), device=values.device)[:, None]
    patch = ranked[rows, example].argmax(2)
    patch = patch.masked_fill(strength[rows, example] == -torch.inf, -1)
    return {"example": example, "patch": patch, "strength": maps[rows, example]}


@isolated()
def purity_at_k(values: Tensor, labels: Tensor, k: int = 16) -> float:
    """Share of the commonest class among the k rows with the highest values, or among all rows if
    there are fewer.

    `values` (rows,), `labels` (rows,) int64. A row labeled -1 has no class: it counts among the k
    rows but for no class.

    Raises:
        ValueError: there are no rows, k is not positive, values hold NaN, or labels are not int64
            with one for each row.
    """
    if k < 1 or len(values) == 0:
        raise ValueError(
            f"purity of the {k} highest of {len(values)} rows, wanted at least 1 of at least 1"
        )
    if labels.dtype != torch.int64 or labels.shape != values.shape:
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}, wanted torch.int64 of shape"
            f" {tuple(values.shape)}: give one label for each row"
        )
    _check_not_nan(values)
    top = labels[top_rows(values, k)]
    classes = top[top >= 0]
    return int(classes.bincount(minlength=1).max()) / len(top)

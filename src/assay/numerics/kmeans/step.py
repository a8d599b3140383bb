"""One step of mini-batch k-means: Sculley (2010), "Web-scale k-means clustering", with the batch
form of its 1/n step.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from assay.numerics.isolation import isolated
from assay.numerics.kmeans.kernel_trial import fused_kernels
from assay.numerics.kmeans.nearest import NearestCenters
from assay.numerics.ranking import count_classes

# A batch's residuals are taken so many rows at a time, which stay in the cache.
_ROWS = 1024


@isolated()
def pull_centers(x: Tensor, centers: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of x - c over the tokens of each center, (K, d), and |x - c|^2 of each token, (n,), for
    tokens x (n, d) with labels (n,); float64.

    Every run gives the same bits.
    """
    if x.device.type != "cpu":
        # On a GPU index_add_ sums in an order that changes from run to run; segments of sorted rows
        # do not.
        residual = x.double() - centers[labels]
        ordered, hits = residual[labels.argsort(stable=True)], count_classes(labels, len(centers))
        # Unsafe: the lengths are not checked, which would make the host wait.
        pulls = torch.segment_reduce(ordered, "sum", lengths=hits, axis=0, unsafe=True)
        return pulls, residual.square_().sum(1)
    pulls = torch.zeros(centers.shape, dtype=torch.float64, device=x.device)
    squared = torch.empty(len(x), dtype=torch.float64, device=x.device)
    for rows, residual in _residuals(x, centers, labels):
        pulls.index_add_(0, labels[rows], residual)
        squared[rows] = residual.square_().sum(1)
    return pulls, squared


@isolated()
def squared_distances(x: Tensor, centers: Tensor, labels: Tensor) -> Tensor:
    """|x - c|^2 of each token of x (n, d), c its center of labels (n,), by differences: float64
    (n,), the same as `pull_centers` has.
    """
    squared = torch.empty(len(x), dtype=torch.float64, device=x.device)
    for rows, residual in _residuals(x, centers, labels):
        squared[rows] = residual.square_().sum(1)
    return squared


def _residuals(x: Tensor, centers: Tensor, labels: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """x - c of some rows after the other, float64 (rows, d), the caller's to change."""
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        residual = x[rows].to(torch.float64, copy=True)  # float64 tokens are the caller's
        residual -= centers[labels[rows]]
        yield rows, residual


@isolated()
def mini_batch_step(x: Tensor, centers: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step on x (n, d): new centers (K, d) and counts (K,), and the squared distances before
    it, float64 (n,).

    With b tokens in the batch nearest to a center and n in all, the center moves by b/n of the way
    to the mean of the b: as if it took the tokens one after another at a learning rate of one over
    its count (Sculley 2010).
    """
    return step_toward(x, centers, counts, NearestCenters(centers).find(x.float()))


def step_toward(
    x: Tensor, centers: Tensor, counts: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`mini_batch_step`, by the nearest centers (n,)."""
    hits = count_classes(labels, len(centers))
    counts = counts + hits
    kernels = fused_kernels(x.device)
    if kernels is not None and x.dtype == torch.float32 and len(x):
        moved, squared = kernels.move_centers(x, centers, labels, hits, counts)
        return moved, counts, squared
    pulls, squared = pull_centers(x, centers, labels)
    moved = pulls.div_(counts.clamp(min=1).double()[:, None]).add_(centers)
    return moved.float(), counts, squared


def low_count_clusters(counts: Tensor, reassignment_ratio: float) -> Tensor:
    """Which of counts (K,) are 0 or below reassignment_ratio times their mean: bool (K,).

    scikit-learn compares with the largest count. Where one cluster is large, as the background's
    is, that rule also moves small clusters that are sound.
    """
    return (counts < reassignment_ratio * counts.double().mean()) | (counts == 0)


class Step(NamedTuple):
    """A step and its metrics.

    Attributes:
        centers: new ones, float32 (K, d).
        counts: new ones, int64 (K,).
        squared: squared distances before the step, float64 (n,).
        inertia: their mean.
        rate: the share of the way that centers went, as a mean over the clusters hit.
        n_low: clusters of low count.
        has_empty: whether one has a count of 0.
    """

    centers: Tensor
    counts: Tensor
    squared: Tensor
    inertia: float
    rate: float
    n_low: float
    has_empty: bool


class QueuedStep(NamedTuple):
    """A step as it is queued on a device, before the host waits for any of it.

    Attributes:
        labels: int64 (n,), -1 where a token's center is in question. If there is any, the rest is
            void.
        centers: as in `Step`, like the next two.
        counts: int64 (K,).
        squared: float64 (n,).
        found: float64 (5,), the numbers of `Step`, and whether any label is -1.
    """

    labels: Tensor
    centers: Tensor
    counts: Tensor
    squared: Tensor
    found: Tensor


def queue_step(
    x: Tensor,
    centers: Tensor,
    counts: Tensor,
    reassignment_ratio: float,
    labels: Tensor | None = None,
) -> QueuedStep:
    """`mini_batch_step` without a wait, by known labels (n,), or else as if the first product had
    settled every row.
    """
    if labels is None:
        labels = NearestCenters(centers).guess(x.float())
    moved, new_counts, squared = step_toward(x, centers, counts, labels.clamp(min=0))
    found = _numbers(new_counts, squared, new_counts - counts, reassignment_ratio)
    return QueuedStep(labels, moved, new_counts, squared, torch.stack([*found, (labels < 0).any()]))


def _numbers(
    counts: Tensor, squared: Tensor, hits: Tensor, reassignment_ratio: float
) -> list[Tensor]:
    """The numbers of a `Step`, each (), by its counts (K,), squared distances (n,), and tokens of
    each center (K,).
    """
    rate = (hits.double() / counts.clamp(min=1)).sum() / (hits > 0).sum()
    n_low = low_count_clusters(counts, reassignment_ratio).sum()
    return [squared.mean(), rate, n_low, (counts == 0).any()]


def measured_step(
    centers: Tensor, counts: Tensor, squared: Tensor, hits: Tensor, reassignment_ratio: float
) -> Step:
    """A step with its metrics, by new centers, new counts (K,), squared distances (n,) and tokens
    of each center (K,).
    """
    found = torch.stack(_numbers(counts, squared, hits, reassignment_ratio)).tolist()
    inertia, rate, n_low, has_empty = found
    return Step(centers, counts, squared, inertia, rate, n_low, bool(has_empty))


@isolated()
def step_at_once(
    x: Tensor,
    centers: Tensor,
    counts: Tensor,
    reassignment_ratio: float,
    queue: Callable[[Tensor, Tensor, Tensor, float], QueuedStep] = queue_step,
) -> Step:
    """`mini_batch_step` with its metrics, for which the host waits once for a GPU.

    queue: `queue_step`, or a faster equivalent.
    """
    queued = queue(x, centers, counts, reassignment_ratio)
    while True:
        inertia, share, low, empty, unsettled = queued.found.tolist()
        if not unsettled:
            return Step(
                queued.centers, queued.counts, queued.squared, inertia, share, low, bool(empty)
            )
        labels = NearestCenters(centers).settle(x.float(), queued.labels)
        queued = queue_step(x, centers, counts, reassignment_ratio, labels)

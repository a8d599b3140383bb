"""One step of mini-batch k-means: Sculley (2010), "Web-scale k-means clustering", with the batch
form of its 1/n step.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from assay.numerics.isolation import isolated
from assay.numerics.kmeans.kernels import fused_kernels
from assay.numerics.kmeans.nearest import NearestCenters
from assay.numerics.ranking import count_classes

# A batch's residuals are taken so many rows at a time, which stay in the cache.
_ROWS = 1024


@isolated()
def pull_centers(x: Tensor, centers: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How tokens x (n, d) pull at their centers: sums of x - c by label (n,), (K, d), and |x -
    c|^2, (n,); float64.

    The same bits in every run.
    """
    if x.device.type != "cpu":
        # On a GPU index_add_ sums in an order that changes from run to run; segments of sorted rows
        # do not.
        residual = x.double() - centers[labels]
        ordered, hits = residual[labels.argsort(stable=True)], count_classes(labels, len(centers))
        # Unsafe: without a look at the lengths, which would make the host wait.
        pulls = torch.segment_reduce(ordered, "sum", lengths=hits, axis=0, unsafe=True)
        return pulls, residual.square_().sum(1)
    pulls = torch.zeros(centers.shape, dtype=torch.float64, device=x.device)
    squared = torch.empty(len(x), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        residual = x[rows].to(torch.float64, copy=True)  # float64 tokens are the caller's
        residual -= centers[labels[rows]]
        pulls.index_add_(0, labels[rows], residual)
        squared[rows] = residual.square_().sum(1)
    return pulls, squared


@isolated()
def mini_batch_step(x: Tensor, centers: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step on x (n, d): new centers (K, d) and counts (K,), and the squared distances before
    it, float64 (n,).

    With b tokens in the batch nearest to a center and n in all, it moves by b/n of the way to the
    mean of the b: as if it took the tokens one after another at a learning rate of one over its
    count (Sculley 2010).
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

    scikit-learn compares with the largest count, which moves small but honest clusters where one is
    large, as the background's is.
    """
    return (counts < reassignment_ratio * counts.double().mean()) | (counts == 0)


class Step(NamedTuple):
    """A step and what is to be said of it.

    New centers (K, d) and counts (K,), the squared distances before it, float64 (n,); their mean,
    the mean over the clusters hit of the share of the way they went, clusters of low count, and
    whether one has a count of 0.
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

    labels: int64 (n,), -1 where a token's center is in question, and then the rest counts for
    nothing. found: float64 (5,), what `Step` says in numbers, and whether any label is -1.
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
    """`mini_batch_step` without a wait, as if the first product had settled every row, or by labels
    (n,) that are known.
    """
    if labels is None:
        labels = NearestCenters(centers).guess(x.float())
    moved, new_counts, squared = step_toward(x, centers, counts, labels.clamp(min=0))
    hits = new_counts - counts
    rate = (hits.double() / new_counts.clamp(min=1)).sum() / (hits > 0).sum()
    n_low = low_count_clusters(new_counts, reassignment_ratio).sum()
    found = [squared.mean(), rate, n_low, (new_counts == 0).any(), (labels < 0).any()]
    return QueuedStep(labels, moved, new_counts, squared, torch.stack(found))


@isolated()
def step_at_once(
    x: Tensor,
    centers: Tensor,
    counts: Tensor,
    reassignment_ratio: float,
    queue: Callable[[Tensor, Tensor, Tensor, float], QueuedStep] = queue_step,
) -> Step:
    """`mini_batch_step` with all that is to be known of it, for which a GPU is waited once.

    queue: `queue_step`, or what gives the same sooner.
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

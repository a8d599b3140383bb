"""Centers that get no tokens, or have fallen together, are moved to far tokens."""

import math

import torch
from torch import Tensor

from assay.numerics.isolation import isolated
from assay.numerics.kmeans.distances import paired_distances
from assay.numerics.kmeans.fit_state import FitState
from assay.numerics.kmeans.progress import Progress
from assay.numerics.kmeans.step import Step, low_count_clusters

# Centers this share of the tokens' distance apart lie in one place. So many of those that follow a
# center along a line are compared with it.
_SAME = 2.0**-10

_COMPARED = 16


@isolated()
def collapsed_clusters(centers: Tensor, radius: float, generator: torch.Generator) -> Tensor:
    """Which of centers (K, d) lie in the place of one of lower index: bool (K,).

    Two centers are in one place if they are closer than 2^-10 times each of these: the root mean
    square distance of tokens to their centers, `radius`; and either center's length, from 0 and
    from the mean. Centers that share the tokens of one place do not get that near, nor do two small
    clusters where sizes differ much.

    Such a pair is nearer still along a random direction, by the root of d. So each center is
    compared with the 16 that follow it along one direction, and not with all, and only if the two
    are near along some others too. A pair that this misses is found another time. Equal centers are
    always found.
    """
    directions = torch.randn(
        centers.shape[1], 8, generator=generator, dtype=torch.float64, device="cpu"
    )
    directions = directions.to(centers.device)
    along = centers.double() @ (directions / directions.norm(dim=0))
    order = along[:, 0].argsort(stable=True)
    along = along[order]
    lengths = centers.norm(dim=1, dtype=torch.float64)[order]
    spread = (centers - centers.mean(0)).norm(dim=1, dtype=torch.float64)[order]
    near = _SAME * torch.minimum(lengths, spread).clamp(max=radius)
    rounding = 4 * torch.finfo(torch.float64).eps * centers.shape[1] * lengths
    # All pairs at once: on a GPU the host waits for their number only.
    steps = torch.arange(1, min(_COMPARED, len(centers) - 1) + 1, device=centers.device)[:, None]
    follower = torch.arange(len(centers), device=centers.device) + steps
    inside, follower = follower < len(centers), follower.clamp(max=len(centers) - 1)
    gaps = (along[follower] - along).abs_().amax(2)
    most = torch.minimum(near[follower], near)
    apart, places = (inside & (gaps <= most + rounding[follower])).nonzero(as_tuple=True)
    one, other = order[places], order[follower[apart, places]]
    same = paired_distances(centers, one, centers, other).sqrt() <= most[apart, places]
    found = torch.zeros(len(centers), dtype=torch.int64, device=centers.device)
    return found.scatter_add_(0, torch.maximum(one, other), same.long()) > 0


@isolated()
def reassign_centers(
    x: Tensor,
    squared: Tensor,
    centers: Tensor,
    counts: Tensor,
    low: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Put the clusters `low` (bool (K,)) on far tokens of x (n, d): new centers and counts.

    A token is drawn with probability proportional to `squared` (n,), its squared distance to its
    center: far tokens, but not the outliers alone (the D^2 sampling of k-means++, Arthur and
    Vassilvitskii 2007). Each moved cluster goes to a token of its own, the clusters of lowest count
    first (ties to the lower index). At most half as many move as there are tokens off their
    centers, and if all are low, the last stays. They take the lowest count among the others, so
    that they neither jump about nor are low again at once.

    Of two centers in one place the one of higher index gets no more tokens, but its count may be
    high and stay so: `collapsed_clusters` finds it.
    """
    n_low, n_off = torch.stack([low.sum(), (squared > 0).sum()]).tolist()
    n_moved = min(n_low, n_off // 2, len(low) - 1)
    if n_moved == 0:
        return centers, counts
    moved = torch.where(low, counts, torch.iinfo(counts.dtype).max).argsort(stable=True)[:n_moved]
    # Largest of u^(1/w) (Efraimidis and Spirakis 2006), as logarithms: a weighted draw without
    # replacement, of any size.
    uniform = torch.rand(len(squared), generator=generator, dtype=torch.float64, device="cpu")
    keys = uniform.log() / squared.cpu()
    tokens = keys.nan_to_num(-math.inf, -math.inf, -math.inf).topk(n_moved).indices.to(x.device)
    centers, new_counts = centers.clone(), counts.clone()
    centers[moved] = x[tokens].float()
    new_counts[moved] = counts.index_fill(0, moved, torch.iinfo(counts.dtype).max).min()
    return centers, new_counts


def is_due(step: Step, n_clusters: int, ratio: float, progress: Progress) -> bool:
    """Whether `reassign_where_due` looks for clusters to move."""
    due = step.has_empty or progress.tokens_since_reassignment >= 10 * n_clusters
    return ratio > 0 and due


@isolated()
def reassign_where_due(
    x: Tensor, step: Step, before: Tensor, ratio: float, fit: FitState
) -> tuple[Tensor, Tensor]:
    """The centers and counts of a step on x (n, d). Where that is due, clusters of low count and
    those in the place of another are moved to far tokens.

    It is due after 10 tokens per cluster, and when a count is 0. `before` are the centers (K, d)
    that the step started from.
    """
    progress = fit.progress
    if not is_due(step, len(before), ratio, progress):
        return step.centers, step.counts
    progress.tokens_since_reassignment = 0
    # A generator of its own: unless a cluster has collapsed, a fit is the same without this check.
    directions = torch.Generator().manual_seed(progress.tokens)
    low = low_count_clusters(step.counts, ratio) | collapsed_clusters(
        before, math.sqrt(step.inertia), directions
    )
    return reassign_centers(x, step.squared, step.centers, step.counts, low, fit.generator)

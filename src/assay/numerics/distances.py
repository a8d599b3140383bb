"""Squared distances of tokens to centres, in float64 and bounded memory, and the nearest centre by them."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_DISTANCE_BYTES = 64 * 2**20


def chunked_distances(x: Tensor, centers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Squared distances of x (n, d) to centers (K, d), rows in order, at most about 64 MiB of them at once.

    Yields float64 (rows, K), at least 0, and (rows, 1), how much rounding may tell equal distances among the nearest
    apart. Both sides are centred on the mean of the centres before |x|^2 - 2 x.c + |c|^2, or a large common offset
    would cancel away the digits that matter.
    """
    centers = centers.double()
    origin = centers.mean(0)
    centers = centers - origin
    center_norms = centers.square().sum(1)
    n_clusters, d = centers.shape
    rounding = 8 * math.sqrt(d) * torch.finfo(torch.float64).eps
    for chunk in torch.split(x, max(1, _DISTANCE_BYTES // (8 * max(n_clusters, d)))):
        rows = chunk.double() - origin
        row_norms = rows.square().sum(1, keepdim=True)
        distances = torch.addmm(center_norms, rows, centers.T, alpha=-2).add_(row_norms).clamp_(min=0)
        # A nearest centre is no longer than the token and its distance together, so these bound all the terms.
        yield distances, rounding * (row_norms + distances.amin(1, keepdim=True))


def nearest_centers(x: Tensor, centers: Tensor) -> Tensor:
    """Index of the nearest of centers (K, d) to each row of x (n, d): int64 (n,); ties to rounding: the lower index."""
    labels = [
        (distances <= distances.amin(1, keepdim=True) + tie).to(torch.uint8).argmax(1)
        for distances, tie in chunked_distances(x, centers)
    ]
    return torch.cat(labels)


def assign_tokens(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centre, int64 (n,), of each row of x (n, d), and the residual x - c from it, float64 (n, d)."""
    labels = nearest_centers(x, centers)
    return labels, x.double() - centers[labels].double()

"""Distances of tokens to centers in float64, all of them or some pairs, and the nearest by them."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from assay.numerics.isolation import isolated

_DISTANCE_BYTES = 64 * 2**20

# Centers whose median is the origin: at least so many, where there are as many.
_AMID = 64

# In float64, pairs of a row and a center that are looked at together; and the share of them above
# which all are taken by differences: a pair picked out costs some thirty times as much.
_PAIRS = 2**20

_MANY = 1 / 32


def origin_of(centers: Tensor) -> Tensor:
    """A point amid centers (K, d), float32 (d,): the median in each dimension of about a hundred of
    them, or of all.

    Any point would do, but bounds are tight about one that is near most tokens. A few centers far
    away do not move it.
    """
    some = centers[:: max(1, len(centers) // _AMID)]
    return some.sort(dim=0).values[len(some) // 2]  # `median` is not deterministic on a GPU


def settle_by_differences(
    labels: Tensor, x: Tensor, rows: Tensor, centers: Tensor, candidates: Tensor
) -> Tensor:
    """`labels` (n,), in which those of `rows` (pairs,) are replaced by the nearest of their
    `candidates` (pairs,), in float64; ties go to the lower index.
    """
    squared = paired_distances(x, rows, centers, candidates)
    least = squared.new_full((len(x),), math.inf).scatter_reduce_(0, rows, squared, "amin")
    lowest = torch.where(squared == least[rows], candidates, len(centers))
    nearest = torch.full_like(labels, len(centers)).scatter_reduce_(0, rows, lowest, "amin")
    return torch.where(nearest < len(centers), nearest, labels)


@isolated()
def paired_distances(x: Tensor, rows: Tensor, centers: Tensor, pairs: Tensor) -> Tensor:
    """|x[rows] - centers[pairs]|^2 by differences, float64 (pairs,): as exact as possible, however
    near they are.
    """
    chunk = max(1, _DISTANCE_BYTES // (16 * x.shape[1]))
    return torch.cat(
        [
            (x[row].double() - centers[pair].double()).square_().sum(1)
            for row, pair in zip(torch.split(rows, chunk), torch.split(pairs, chunk), strict=True)
        ]
    )


def _by_product(
    x: Tensor, centers: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
    """Squared distances of x (n, d) to centers (K, d) by |x|^2 - 2 x.c + |c|^2, rows in order, at
    most about 64 MiB at once.

    Yields rows of x, their distances, float64 (rows, K), at least 0, the lengths |x| (rows,) and
    |c| (K,) about a common origin, without which a large offset would cancel away the digits that
    matter, and g: no distance is off by more than g (|x| + |c|)^2.

    A sum of m terms is off by at most m eps / 2 times the sum of their magnitudes, in any order: 2
    |x| |c| + |x|^2 + |c|^2 here. Its d products and three sums, and what the shift to the origin
    rounds, want (d + 8) eps / 2; g is twice that, for |x| and |c| as computed.
    """
    origin = origin_of(centers).double()
    centers = centers.double() - origin
    center_norms = centers.square().sum(1)
    center_lengths = center_norms.sqrt()
    n_clusters, d = centers.shape
    g = (d + 8) * torch.finfo(torch.float64).eps
    for chunk in torch.split(x, max(1, _DISTANCE_BYTES // (8 * max(n_clusters, d)))):
        rows = chunk.double() - origin
        norms = rows.square().sum(1)
        distances = (
            torch.addmm(center_norms, rows, centers.T, alpha=-2).add_(norms[:, None]).clamp_(min=0)
        )
        yield chunk, distances, norms.sqrt(), center_lengths, g


def _by_differences(x: Tensor, centers: Tensor) -> Tensor:
    """All |x - c|^2 by differences, float64 (n, K): no more than (d + 4) eps off, relative. Some
    five times as long as by a product.
    """
    return torch.cdist(
        x.double(), centers.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).square_()


def _parts(rows: Tensor, n_clusters: int) -> Sequence[Tensor]:
    """Numbers of rows in parts, each small enough to hold all pairs of a row and a center; no part
    if there are no rows.
    """
    return torch.split(rows, max(1, _PAIRS // n_clusters)) if len(rows) else ()


def chunked_distances(x: Tensor, centers: Tensor) -> Iterator[Tensor]:
    """Squared distances of x (n, d) to centers (K, d), rows in order, at most about 64 MiB of them
    at once: float64 (rows, K).

    Each is right to 2^-24, relative, so that its root is a right float32: what a product cannot
    give so exactly, the distances that are small beside the lengths, are taken by differences.
    """
    for rows, distances, lengths, center_lengths, g in _by_product(x, centers):
        trusted = g * 2.0**24
        # By the longest center first, which is a look at each row's least distance only: as a rule
        # there is nothing to do.
        doubtful = (
            distances.amin(1) < trusted * (lengths + center_lengths.max()).square()
        ).nonzero()[:, 0]
        for part in _parts(doubtful, len(centers)):
            near = distances[part] < trusted * (lengths[part][:, None] + center_lengths).square_()
            crowded = (near.sum(1) > _MANY * len(centers)).nonzero()[:, 0]
            if len(crowded):
                distances[part[crowded]] = _by_differences(rows[part[crowded]], centers)
                near[crowded] = False
            found, pairs = near.nonzero(as_tuple=True)
            distances[part[found], pairs] = paired_distances(rows, part[found], centers, pairs)
        yield distances


@isolated()
def nearest_in_float64(x: Tensor, centers: Tensor) -> Tensor:
    """Index of the nearest of centers (K, d) to each row of x (n, d), by differences in float64:
    int64 (n,); ties: the lower index.

    A product says which centers may be the nearest. Where b is its nearest, at D off by e(b) = g
    (|x| + |b|)^2, the true one, c, is no farther than D + e(b), hence no longer than |x| and the
    root of that, and seems at most D + e(b) + e(c).
    """
    labels = [torch.empty(0, dtype=torch.int64, device=x.device)]
    for rows, distances, lengths, center_lengths, g in _by_product(x, centers):
        least, seeming = distances.min(1)
        least += g * (lengths + center_lengths[seeming]).square()
        least += g * (2 * lengths + least.sqrt()).square()
        nearest = torch.zeros_like(seeming)  # NaN has no candidates
        for part in _parts(torch.arange(len(rows), device=x.device), len(centers)):
            near = distances[part] <= least[part, None]
            if int(near.sum()) > _MANY * near.numel():
                squared = _by_differences(rows[part], centers)
                near &= squared <= squared.amin(1, keepdim=True) * (1 + 4 * g)
            found, candidates = near.nonzero(as_tuple=True)
            nearest = settle_by_differences(nearest, rows, part[found], centers, candidates)
        labels.append(nearest)
    return torch.cat(labels)

"""Tokens and centers made to break a search for the nearest, and what the nearest is."""

from collections.abc import Callable

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal float32, whatever the default dtype."""
    return torch.randn(*shape, generator=generator, dtype=torch.float32)


def _offset(x: Tensor, centers: Tensor, _: torch.Generator) -> Pair:
    return x + 1e4, centers + 1e4


def _duplicates(x: Tensor, centers: Tensor, generator: torch.Generator) -> Pair:
    n_clusters = len(centers)
    few = max(1, n_clusters // 3)
    return x, centers[torch.randint(0, few, (n_clusters,), generator=generator)]


def _repeated(x: Tensor, centers: Tensor, _: torch.Generator) -> Pair:
    return x[:1].expand_as(x).clone(), centers


def _norms(x: Tensor, centers: Tensor, generator: torch.Generator) -> Pair:
    scales = [
        10 ** (8 * torch.rand(len(rows), 1, generator=generator, dtype=torch.float32) - 4)
        for rows in (x, centers)
    ]
    return x * scales[0], centers * scales[1]


def _clusters(x: Tensor, centers: Tensor, generator: torch.Generator) -> Pair:
    own = torch.randint(0, len(centers), (len(x),), generator=generator)
    return centers[own] + 1e-3 * x, centers


def _scaled(scale: float) -> Callable[[Tensor, Tensor, torch.Generator], Pair]:
    return lambda x, centers, _: (x * scale, centers * scale)


def _two_scales(x: Tensor, centers: Tensor, _: torch.Generator) -> Pair:
    n_clusters, d = centers.shape
    far = torch.arange(n_clusters)[:, None] < n_clusters // 2
    axis = torch.eye(1, d, dtype=torch.float32)
    return 1e-4 * x / x.norm(dim=1, keepdim=True), torch.where(
        far, 1e4 * (axis + 0.1 * centers), 1e-4 * centers
    )


def _far(x: Tensor, centers: Tensor, _: torch.Generator) -> Pair:
    centers[len(centers) // 2] = 1e4
    return x, centers


def _far_and_tiny(x: Tensor, centers: Tensor, _: torch.Generator) -> Pair:
    centers[len(centers) // 2] = 1e20  # whose square is no float32
    return x * 1e-18, centers * 1e-18


_SPOILT: dict[str, Callable[[Tensor, Tensor, torch.Generator], Pair]] = {
    "gaussian": lambda x, centers, _: (x, centers),
    "offset": _offset,
    "duplicates": _duplicates,
    "repeated": _repeated,
    "norms": _norms,
    "clusters": _clusters,
    "tiny": _scaled(1e-25),
    "huge": _scaled(1e25),
    "integers": lambda x, centers, _: (x.round(), centers.round()),
    "two scales": _two_scales,
    "far": _far,
    "far and tiny": _far_and_tiny,
}
KINDS = tuple(_SPOILT)


def make(kind: str, n: int, n_clusters: int, d: int, seed: int) -> Pair:
    """Tokens (n, d) and centers (n_clusters, d), float32."""
    generator = torch.Generator().manual_seed(seed)
    x, centers = randn(generator, n, d), randn(generator, n_clusters, d)
    return _SPOILT[kind](x, centers, generator)


def brute_force(x: Tensor, centers: Tensor) -> Tensor:
    """Squared distances by differences, float64 (n, K)."""
    return torch.stack(
        [(x.double() - center.double()).square().sum(1) for center in centers], dim=1
    )


def assert_nearest(found: Tensor, x: Tensor, centers: Tensor) -> None:
    """The nearest where the two best differ by more than 1e-12 relative, one of the best anywhere,
    the lower of equals.
    """
    squared = brute_force(x, centers)
    least = squared.amin(1, keepdim=True)
    assert bool((squared.gather(1, found[:, None]) <= least * (1 + 1e-12)).all())
    clear = ((squared <= least * (1 + 1e-12) ** 2).sum(1) == 1) & (least[:, 0] > 0)
    assert torch.equal(found[clear], squared.argmin(1)[clear])
    firsts = {tuple(center.tolist()): k for k, center in reversed(list(enumerate(centers)))}
    assert found.tolist() == [firsts[tuple(centers[k].tolist())] for k in found.tolist()], (
        "a duplicate's lower index"
    )

"""Tokens and centers made to break a search for the nearest, and what the nearest is."""

import torch

KINDS = (
    *(
        "gaussian",
        "offset",
        "duplicates",
        "repeated",
        "norms",
        "clusters",
        "tiny",
        "huge",
        "integers",
    ),
    *("two scales", "far", "far and tiny"),
)


def randn(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float32)


def make(kind, n, n_clusters, d, seed):
    """Tokens (n, d) and centers (n_clusters, d), float32."""
    generator = torch.Generator().manual_seed(seed)
    x, centers = randn(generator, n, d), randn(generator, n_clusters, d)
    if kind == "offset":
        return x + 1e4, centers + 1e4
    if kind == "duplicates":
        return (
            x,
            centers[torch.randint(0, max(1, n_clusters // 3), (n_clusters,), generator=generator)],
        )
    if kind == "repeated":
        return x[:1].expand(n, d).clone(), centers
    if kind == "norms":
        scales = [
            10 ** (8 * torch.rand(rows, 1, generator=generator, dtype=torch.float32) - 4)
            for rows in (n, n_clusters)
        ]
        return x * scales[0], centers * scales[1]
    if kind == "clusters":
        return centers[torch.randint(0, n_clusters, (n,), generator=generator)] + 1e-3 * x, centers
    if kind in ("tiny", "huge"):
        scale = 1e-25 if kind == "tiny" else 1e25
        return x * scale, centers * scale
    if kind == "integers":
        return x.round(), centers.round()
    if kind == "two scales":
        far = torch.arange(n_clusters)[:, None] < n_clusters // 2
        axis = torch.eye(1, d, dtype=torch.float32)
        return 1e-4 * x / x.norm(dim=1, keepdim=True), torch.where(
            far, 1e4 * (axis + 0.1 * centers), 1e-4 * centers
        )
    if kind.startswith("far"):
        centers[n_clusters // 2] = 1e4 if kind == "far" else 1e20  # whose square is no float32
        return (x, centers) if kind == "far" else (x * 1e-18, centers * 1e-18)
    return x, centers


def brute_force(x, centers):
    """Squared distances by differences, float64 (n, K)."""
    return torch.stack(
        [(x.double() - center.double()).square().sum(1) for center in centers], dim=1
    )


def assert_nearest(found, x, centers):
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

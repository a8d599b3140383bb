"""Mini-batch k-means against scikit-learn and faiss: tokens/s of a step and of the assignment, and
the inertia reached.

    pip install -e '.[bench]'; python benchmarks/kmeans.py

Speed: rounds in which ours and the peers take turns, best against best. Quality: the mean squared
distance of held-out tokens after the same number of token visits from k-means++ seeds (scikit-learn
seeds itself; faiss draws random tokens, as it does).
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans as ScikitKMeans
from sklearn.cluster import MiniBatchKMeans as ScikitMiniBatchKMeans
from torch import Tensor

from assay.io.datasets import find_shards
from assay.io.shards import Shards
from assay.numerics.kmeans.estimator import MiniBatchKMeans
from assay.numerics.kmeans.nearest import NearestCenters
from assay.numerics.moments import standardize
from assay.numerics.precision import fast_dtypes

try:
    import faiss
except ImportError:
    raise SystemExit("faiss is missing: pip install -e '.[bench]'") from None

say = sys.stdout.write


def mixture(n: int, d: int, n_clusters: int, seed: int = 0) -> Tensor:
    """Tokens about planted centers, which are the same for every n."""
    planted = torch.randn(n_clusters, d, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    return planted[torch.randint(n_clusters, (n,), generator=generator)] + 0.7 * torch.randn(
        n, d, generator=generator
    )


def transformer_like(n: int, d: int, seed: int = 0) -> Tensor:
    """Few strong directions, many weak ones, and tokens that come in classes: like a transformer's
    residual stream.
    """
    fixed = torch.Generator().manual_seed(2)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=fixed))
    means = torch.randn(40, d, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    x = means[torch.randint(40, (n,), generator=generator)] + torch.randn(n, d, generator=generator)
    scales: Tensor = torch.arange(1, d + 1).pow(-0.8)
    scaled: Tensor = x * scales @ basis
    return scaled


def embedded_layers(root: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The embedded default's layers, standardized: tokens to fit on and to judge by. Empty where
    `make run` has not made them.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    if not root.exists():
        say(f"{root} is missing: `make run` makes it\n")
        return found
    fit, val = (Shards(find_shards(root / split)) for split in ("fit", "val"))
    for layer in fit.layers:
        train, test = (
            torch.cat(list(shards.batches(layer=layer, batch_size=8192))) for shards in (fit, val)
        )
        mean, std = train.double().mean(0), train.double().std(0, correction=0)
        found[f"embedded default, layer {layer}"] = (
            standardize(train, mean, std),
            standardize(test, mean, std),
        )
    return found


def heavy_tailed(n: int, d: int, seed: int = 0) -> Tensor:
    """Student's t with three degrees of freedom in every dimension."""
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, (n, d)).astype(np.float32))


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The best time of each, in seconds."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def compare_speed(x: Tensor, n_clusters: int, batch_size: int, rounds: int, name: str) -> None:
    """One pass of steps, and the assignment of all tokens, from the same seeds."""
    seeds = x[
        torch.randperm(len(x), generator=torch.Generator().manual_seed(3))[:n_clusters]
    ].clone()
    counts = torch.zeros(n_clusters, dtype=torch.int64)
    plain = x.numpy()

    def ours() -> None:
        model = MiniBatchKMeans.from_state({"cluster_centers": seeds, "counts": counts})
        for batch in x.split(batch_size):
            model.partial_fit(batch)

    def scikit() -> None:
        model = ScikitMiniBatchKMeans(
            n_clusters, batch_size=batch_size, init=seeds.numpy(), n_init=1
        )
        for batch in x.split(batch_size):
            model.partial_fit(batch.numpy())

    def faiss_iteration() -> None:
        options = {"niter": 1, "max_points_per_centroid": 2**30, "min_points_per_centroid": 1}
        faiss.Kmeans(x.shape[1], n_clusters, **options).train(plain, init_centroids=seeds.numpy())

    index = faiss.IndexFlatL2(x.shape[1])
    index.add(seeds.numpy())
    finder = NearestCenters(seeds)
    runs: dict[str, Callable[[], object]] = {
        "ours": ours,
        "scikit-learn": scikit,
        "faiss, one iteration": faiss_iteration,
        "our assignment": lambda: finder.find(x),
        "faiss' exact search": lambda: index.search(plain, 1),
    }
    best = interleaved(runs, rounds)
    say(f"{name}: {len(x)} tokens, d = {x.shape[1]}, K = {n_clusters}, batches of {batch_size}\n")
    for mine, peer in (
        ("ours", "scikit-learn"),
        ("ours", "faiss, one iteration"),
        ("our assignment", "faiss' exact search"),
    ):
        say(f"  {mine}: {best[peer] / best[mine]:.2f} times the tokens/s of {peer}\n")
    rate = 2 * len(x) * x.shape[1] * n_clusters / best["our assignment"] / 1e9
    say(
        f"  our assignment is {rate:.0f} GFLOPS' worth of products, in"
        f" {[*map(str, fast_dtypes(x.device))]} where it may\n"
    )


def compare_quality(
    train: Tensor, test: Tensor, n_clusters: int, batch_size: int, passes: int, name: str
) -> None:
    """Held-out inertia after `passes` visits of every token, the mean over three seeds."""

    def inertia(centers: Tensor) -> float:
        labels = NearestCenters(centers).find(test)
        return float((test.double() - centers[labels].double()).square().sum(1).mean())

    def ours(seed: int) -> Tensor:
        def stream(epoch: int) -> list[Tensor]:
            order = torch.randperm(
                len(train), generator=torch.Generator().manual_seed(1000 * seed + epoch)
            )
            return list(train[order].split(batch_size))

        model = MiniBatchKMeans(n_clusters, seed=seed, max_iter=passes, max_no_improvement=None)
        return model.fit(stream).cluster_centers_

    def scikit(seed: int) -> Tensor:
        options = {
            "max_iter": passes,
            "max_no_improvement": None,
            "n_init": 1,
            "random_state": seed,
        }
        model = ScikitMiniBatchKMeans(n_clusters, batch_size=batch_size, **options).fit(
            train.numpy()
        )
        return torch.from_numpy(model.cluster_centers_)

    def lloyd(seed: int) -> Tensor:
        model = ScikitKMeans(n_clusters, n_init=1, max_iter=passes, tol=0, random_state=seed).fit(
            train.numpy()
        )
        return torch.from_numpy(model.cluster_centers_).float()

    def by_faiss(seed: int) -> Tensor:
        options = {
            "niter": passes,
            "seed": seed,
            "max_points_per_centroid": 2**30,
            "min_points_per_centroid": 1,
        }
        model = faiss.Kmeans(train.shape[1], n_clusters, **options)
        model.train(train.numpy())
        return torch.from_numpy(model.centroids)

    found = {
        peer: float(np.mean([inertia(fit(seed)) for seed in range(3)]))
        for peer, fit in (
            ("ours", ours),
            ("scikit-learn", scikit),
            ("faiss", by_faiss),
            ("Lloyd", lloyd),
        )
    }
    best = min(value for peer, value in found.items() if peer != "ours")
    values = ", ".join(f"{peer} {value:.5g}" for peer, value in found.items())
    say(
        f"{name}: held-out inertia: {values}; ours is {100 * (found['ours'] / best - 1):+.2f} % of"
        " the best peer's\n"
    )


def main() -> None:
    """Print speed, then quality."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--d", type=int, default=384)
    parser.add_argument("--clusters", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--digits",
        type=Path,
        default=Path("data/01_raw/digits"),
        help="the embedded default's shards",
    )
    parser.add_argument(
        "--passes", type=int, default=20, help="over the tokens of the quality sets"
    )
    arguments = parser.parse_args()
    x = mixture(arguments.tokens, arguments.d, arguments.clusters)
    compare_speed(x, arguments.clusters, arguments.batch_size, arguments.rounds, "planted mixture")
    x = torch.randn(arguments.tokens, arguments.d, generator=torch.Generator().manual_seed(0))
    compare_speed(x, arguments.clusters, arguments.batch_size, arguments.rounds, "Gaussian noise")
    n, d, k = 32_768, 64, 256
    sets = {
        "planted mixture": (mixture(n, d, k), mixture(n // 4, d, k, seed=1)),
        "transformer-like": (transformer_like(n, d), transformer_like(n // 4, d, seed=1)),
        "heavy-tailed": (heavy_tailed(n, d), heavy_tailed(n // 4, d, seed=1)),
        **embedded_layers(arguments.digits),
    }
    for name, (train, test) in sets.items():
        compare_quality(train, test, k, 2048, arguments.passes, name)


if __name__ == "__main__":
    main()

"""What a GPU makes of the assignment to centres and of PCA's update, beside the products that they are made of and beside peers.

    PYTHONPATH=src python3 benchmarks/gpu.py

wants torch 2.11 or later with CUDA, and nothing else; with flash-kmeans (pip install flash-kmeans) its assignment is a peer too.
Contestants take turns; a time is the best of all rounds. `--device cpu`, with small sizes, rehearses the script itself.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from assay.numerics.distances import NearestCenters, fast_dtypes, fused_kernels, nearest_in_float64
from assay.numerics.kmeans import MiniBatchKMeans, kmeans_plus_plus
from assay.numerics.pca import StreamingPCA

say = sys.stdout.write

_BLOCK = 8192


def mixture(n: int, d: int, n_clusters: int, device: torch.device) -> Tensor:
    """Tokens about planted centres."""
    generator = torch.Generator(device).manual_seed(0)
    planted = torch.randn(n_clusters, d, generator=generator, device=device)
    members = torch.randint(n_clusters, (n,), generator=generator, device=device)
    return planted[members] + 0.7 * torch.randn(n, d, generator=generator, device=device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long `run` takes, the device's work included."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    began.record()
    run()
    ended.record()
    torch.cuda.synchronize(device)
    return began.elapsed_time(ended) / 1000


def interleaved(runs: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """The best time of each, in seconds, after one round that does not count: it compiles, and fills caches."""
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(rounds + 1):
        for name, run in runs.items():
            found = seconds(run, device)
            if turn > 0:
                best[name] = min(best[name], found)
    return best


def flash_assignment(x: Tensor, centers: Tensor) -> Callable[[], object] | None:
    """flash-kmeans' nearest centres, in bfloat16 and without a bound on its error; None, and a line that says so, where it is missing."""
    try:
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton
    except ImportError as error:
        say(f"flash-kmeans is left out ({error}): pip install flash-kmeans\n")
        return None
    tokens, seeds = x.bfloat16()[None], centers.bfloat16()[None]
    squares = tokens.float().square().sum(-1)
    return lambda: euclid_assign_triton(tokens, seeds, squares)


def compare_assignment(x: Tensor, centers: Tensor, rounds: int, name: str) -> None:
    """Ours, the bfloat16 product alone, `torch.cdist` and flash-kmeans on the same tokens and centres."""
    device = x.device
    finder = NearestCenters(centers)
    tokens, columns = x.bfloat16(), centers.bfloat16().T.contiguous()
    scores = torch.empty(min(_BLOCK, len(x)), len(centers), dtype=torch.bfloat16, device=device)

    def product() -> None:
        for rows in tokens.split(_BLOCK):
            torch.mm(rows, columns, out=scores[: len(rows)])

    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: finder.find(x),
        "product": product,
        "torch.cdist": lambda: [torch.cdist(rows, centers).argmin(1) for rows in x.split(_BLOCK)],
    }
    flash = flash_assignment(x, centers)
    if flash is not None:
        runs["flash-kmeans"] = flash
    best = interleaved(runs, rounds, device)
    work = 2 * x.shape[0] * x.shape[1] * len(centers)
    say(f"assignment, {name}: {len(x)} tokens, d = {x.shape[1]}, K = {len(centers)}\n")
    say(f"  ours: {len(x) / best['ours']:.3g} tokens/s, {work / best['ours'] / 1e12:.3g} TFLOPS' worth\n")
    say(f"  the bfloat16 product alone: {work / best['product'] / 1e12:.3g} TFLOPS\n")
    say(f"  ours is {best['product'] / best['ours']:.2f} of the product's rate\n")
    for peer in ("torch.cdist", "flash-kmeans"):
        if peer in best:
            say(f"  ours: {best[peer] / best['ours']:.2f} times the tokens/s of {peer}\n")
    sample = x[:: max(1, len(x) // 1024)]
    exact = nearest_in_float64(sample, centers)
    say(f"  as by differences in float64: ours {float((finder.find(sample) == exact).double().mean()):.4f} of a sample")
    say(f", torch.cdist {float((torch.cdist(sample, centers).argmin(1) == exact).double().mean()):.4f}\n")


def time_kmeans(x: Tensor, centers: Tensor, batch_size: int, rounds: int) -> None:
    """A step of mini-batch k-means, and a centre of k-means++."""
    counts = torch.ones(len(centers), dtype=torch.int64, device=x.device)

    def steps() -> None:
        model = MiniBatchKMeans.from_state({"cluster_centers": centers, "counts": counts})
        for batch in x.split(batch_size):
            model.partial_fit(batch)

    sample, n_seeds = x[: 3 * len(centers)], min(64, len(centers))
    runs = {"steps": steps, "seeds": lambda: kmeans_plus_plus(sample, n_seeds, torch.Generator().manual_seed(0))}
    best = interleaved(runs, rounds, x.device)
    say(f"k-means: {len(x) / best['steps']:.3g} tokens/s in steps of {batch_size}; ")
    say(f"k-means++ among {len(sample)} tokens: {1000 * best['seeds'] / n_seeds:.3g} ms a centre\n")


def compare_pca(x: Tensor, batch_size: int, rounds: int) -> None:
    """PCA's update beside the float64 product that it is made of."""
    batch = x[:batch_size]
    exact = batch.double()
    square = torch.empty(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    pca = StreamingPCA().partial_fit(batch)
    runs = {
        "ours": lambda: pca.partial_fit(batch),
        "product": lambda: torch.mm(exact.T, exact, out=square),
    }
    best = interleaved(runs, rounds, x.device)
    work = 2 * len(batch) * x.shape[1] ** 2
    say(f"PCA: {len(batch) / best['ours']:.3g} tokens/s in batches of {len(batch)}, d = {x.shape[1]}\n")
    say(f"  the float64 product alone: {work / best['product'] / 1e12:.3g} TFLOPS\n")
    say(f"  ours is {best['product'] / best['ours']:.2f} of the product's rate\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--d", type=int, default=1024)
    parser.add_argument("--clusters", type=int, default=16_384)
    parser.add_argument("--batch-size", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        say("torch sees no CUDA device: there is nothing to measure\n")
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU, in rehearsal"
    kernel = "with the fused kernels" if fused_kernels(device) is not None else "without the fused kernels"
    say(f"torch {torch.__version__} on {name}, products in {[*map(str, fast_dtypes(device))]}, {kernel}\n")
    n, d, k = arguments.tokens, arguments.d, arguments.clusters
    planted = mixture(n, d, k, device)
    noise = torch.randn(n, d, generator=torch.Generator(device).manual_seed(1), device=device)
    for x, kind in ((planted, "planted mixture"), (noise, "Gaussian noise, the worst case")):
        compare_assignment(x, x[:k].clone(), arguments.rounds, kind)
    time_kmeans(planted, planted[:k].clone(), arguments.batch_size, arguments.rounds)
    compare_pca(planted, arguments.batch_size, arguments.rounds)


if __name__ == "__main__":
    main()

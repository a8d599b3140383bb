"""Streaming PCA against scikit-learn's IncrementalPCA: tokens/s of the fit, and the accuracy of the
whole spectrum.

    pip install -e '.[bench]'; python benchmarks/pca.py

The tokens have eight decades of variance along a rotated basis and a mean 100 times the largest
standard deviation. The reference is a float64 covariance of all tokens about their mean,
diagonalised in float64.

    python benchmarks/pca.py --d 256 --batches 24 --batch-size 4096 --raw

compares two ways to the PCA of standardized tokens, both against float64 in two passes: of the
tokens, standardized and rounded to float32, which takes a pass of its own; and of the raw tokens'
scatter S, as D^-1 S D^-1, which the pass of the statistics could gather.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from sklearn.decomposition import IncrementalPCA
from torch import Tensor

from assay.numerics.moments import StreamingMoments, standardize
from assay.numerics.pca import StreamingPCA


def make_batches(d: int, n_batches: int, batch_size: int) -> Iterator[Tensor]:
    """The same float32 (batch_size, d) batches at each call."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    mean = torch.randn(d, generator=generator, dtype=torch.float64)
    mean *= 100 / mean.norm()
    scaled = torch.logspace(0, -4, d, dtype=torch.float64)[:, None] * basis
    for _ in range(n_batches):
        yield (
            torch.randn(batch_size, d, generator=generator, dtype=torch.float64) @ scaled + mean
        ).float()


def make_massive(d: int, n_batches: int, batch_size: int) -> Iterator[Tensor]:
    """Batches with massive activations: three dimensions of a thousand times the others' standard
    deviation, with means a hundred of their own from 0.
    """
    generator = torch.Generator().manual_seed(1)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    scaled = torch.logspace(0, -3, d, dtype=torch.float64)[:, None] * basis
    spread = scaled.square().sum(0).sqrt()
    mean = torch.randn(d, generator=generator, dtype=torch.float64) * spread
    mean[:3], size = 100 * spread[:3], torch.ones(d, dtype=torch.float64)
    size[:3] = 1000
    for _ in range(n_batches):
        x = torch.randn(batch_size, d, generator=generator, dtype=torch.float64)
        yield ((x @ scaled + mean) * size).float()


def compare_raw(name: str, batches: Callable[[], Iterator[Tensor]]) -> None:
    """Print how exact both ways to the PCA of standardized tokens are."""
    moments, raw, ours = StreamingMoments(), StreamingPCA(), StreamingPCA()
    for x in batches():
        moments.partial_fit(x)
        raw.partial_fit(x)
    for x in batches():
        ours.partial_fit(standardize(x, moments.mean_, moments.std_))
    tokens = torch.cat([x.double() for x in batches()])
    tokens -= tokens.mean(0)
    tokens -= tokens.mean(0)
    tokens /= tokens.square().mean(0).sqrt()
    exact = torch.linalg.eigvalsh(tokens.T @ tokens / (len(tokens) - 1)).flip(0)
    upper = raw.checkpoint()[0]["scatter"].triu()
    scatter = (upper + upper.triu(1).T) / torch.outer(moments.std_, moments.std_)
    found = torch.linalg.eigvalsh(scatter / (len(tokens) - 1)).flip(0)
    first = len(exact) // 4
    for way, spectrum in (("standardized", ours.explained_variance_), ("raw scatter", found)):
        sys.stdout.write(
            f"{name}, {way}: largest relative error of the spectrum {worst(spectrum, exact):.1e},"
            f" of its first quarter {worst(spectrum[:first], exact[:first]):.1e}\n"
        )


def exact_spectrum(batches: Callable[[], Iterator[Tensor]]) -> Tensor:
    """Variances, float64 (d,), falling, in two passes: the mean, then the covariance about it."""
    count = sum(len(x) for x in batches())
    mean = sum((x.double().sum(0) for x in batches()), torch.zeros(())) / count
    scatter = sum(((x.double() - mean).T @ (x.double() - mean) for x in batches()), torch.zeros(()))
    spectrum: Tensor = torch.linalg.eigvalsh(scatter / (count - 1))
    return spectrum.flip(0)


def float32_spectrum(batches: Callable[[], Iterator[Tensor]]) -> Tensor:
    """What a covariance summed in float32 says."""
    count, total, products = 0, torch.zeros(()), torch.zeros(())
    for x in batches():
        count, total, products = count + len(x), total + x.sum(0), products + x.T @ x
    mean = total / count
    spectrum: Tensor = torch.linalg.eigvalsh(products / count - torch.outer(mean, mean))
    return spectrum.flip(0).double()


def worst(found: Tensor, exact: Tensor) -> float:
    """Largest relative error over the spectrum."""
    return float(((found - exact) / exact).abs().max())


def main() -> None:
    """Print speed, then accuracy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument(
        "--raw", action="store_true", help="only compare with the way by the raw tokens' scatter"
    )
    arguments = parser.parse_args()
    sizes = (arguments.d, arguments.batches, arguments.batch_size)

    def batches() -> Iterator[Tensor]:
        return make_batches(*sizes)

    if arguments.raw:
        compare_raw("eight decades", batches)
        compare_raw("massive activations", lambda: make_massive(*sizes))
        return

    ours, peer = StreamingPCA(), IncrementalPCA()
    seconds = {"ours": 0.0, "IncrementalPCA": 0.0}
    product = torch.empty(arguments.d, arguments.d, dtype=torch.float64)
    gemm = []
    warnings.simplefilter("ignore", RuntimeWarning)  # scikit-learn's, on what float32 cannot hold
    for x in batches():
        began = time.perf_counter()
        ours.partial_fit(x)
        ended = time.perf_counter()
        peer.partial_fit(x.numpy())
        seconds["ours"] += ended - began
        seconds["IncrementalPCA"] += time.perf_counter() - ended
        y = x.double()
        began = time.perf_counter()
        torch.mm(y.T, y, out=product)
        gemm.append(time.perf_counter() - began)
    began = time.perf_counter()
    spectrum = ours.explained_variance_
    seconds["ours"] += time.perf_counter() - began
    exact = exact_spectrum(batches)
    say = sys.stdout.write
    n = arguments.batches * arguments.batch_size
    say(
        f"{n} tokens, d = {arguments.d}, {arguments.batches} batches, {torch.get_num_threads()}"
        " threads\n"
    )
    say(
        f"fit: {seconds['IncrementalPCA'] / seconds['ours']:.1f} times IncrementalPCA's tokens/s,"
        " decomposition included\n"
    )
    say(
        f"the float64 products of all tokens alone, whole: {sum(gemm) / seconds['ours']:.2f} of our"
        " fit's time\n"
    )
    variance = torch.from_numpy(peer.explained_variance_).double()
    say(f"largest relative error of the spectrum: ours {worst(spectrum, exact):.1e}, ")
    say(f"IncrementalPCA {worst(variance, exact):.1e}, ")
    say(f"float32 covariance {worst(float32_spectrum(batches), exact):.1e}\n")


if __name__ == "__main__":
    main()

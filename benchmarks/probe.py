"""Probes for every (feature, class): the time of fitting them all, its growth, and the direct
solver beside it.

    python benchmarks/probe.py                 # sizes of a laptop
    python benchmarks/probe.py --full          # 5.12 M patches, 151 classes: L 1,024 and 16,384
    python benchmarks/probe.py --device cuda   # also on its own

Codes are made on the fly, so that nothing large is held: heavy-tailed features of which each tells
some classes apart, or clusters that lean to a class. What is timed is fitting and the train CE of
every pair, and the making of the codes once. The direct solver is Newton's method on the rows
themselves, in float64, to the same tolerance, which is what Assay's probes were before; it goes
over all rows for each pair in each of its steps. Each measurement has a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from assay.codes import Batch
from assay.numerics.codes import ComputedCodes, TensorCodes
from assay.numerics.probe import LogisticProbe1d
from assay.numerics.probe.logistic import PairLosses, minimize, penalized, slab_of_rows
from assay.numerics.ranking import count_classes

BLOCK = 16_384


def make_labels(n_rows: int, n_classes: int) -> Tensor:
    """Classes whose prevalence falls like 1 / rank; one row in twenty is of none."""
    generator = torch.Generator().manual_seed(0)
    share = 1 / torch.arange(1, n_classes + 1, dtype=torch.float64)
    labels = torch.searchsorted(
        share.cumsum(0) / share.sum(), torch.rand(n_rows, generator=generator).double()
    )
    return torch.where(
        torch.rand(n_rows, generator=generator) < 0.05, -1, labels.clamp(max=n_classes - 1)
    )


def dense_codes(
    labels: Tensor, n_features: int, n_classes: int, device: torch.device
) -> ComputedCodes:
    """Standard normal features shifted for one class in ten, every third one cubed."""
    generator = torch.Generator().manual_seed(1)
    shift = torch.randn(n_classes + 1, n_features, generator=generator)
    shift = (shift * (torch.rand(n_classes + 1, n_features, generator=generator) < 0.1)).to(device)

    def stream(batch_size: int, start: int) -> Iterator[Batch]:
        for first in range(start, len(labels), batch_size):
            rows = labels[first : first + batch_size].to(device)
            draw = torch.Generator(device).manual_seed(first)
            x = torch.randn(len(rows), n_features, generator=draw, device=device).add_(shift[rows])
            x[:, ::3] **= 3
            yield {"values": x}

    return ComputedCodes("dense", len(labels), n_features, n_features, stream)


def onehot_codes(
    labels: Tensor, n_features: int, n_classes: int, device: torch.device
) -> ComputedCodes:
    """Half of a class's rows are in clusters of its own, the others anywhere."""

    def stream(batch_size: int, start: int) -> Iterator[Batch]:
        for first in range(start, len(labels), batch_size):
            rows = labels[first : first + batch_size].to(device)
            draw = torch.Generator(device).manual_seed(first)
            anywhere, own, spread = torch.randint(
                n_features, (3, len(rows)), generator=draw, device=device
            )
            own = (
                rows.clamp(min=0) * (n_features // n_classes)
                + spread % max(1, n_features // n_classes)
            ) % n_features
            yield {"indices": torch.where((rows >= 0) & (anywhere % 2 == 0), own, anywhere)}

    return ComputedCodes("onehot", len(labels), n_features, 1, stream)


MAKERS = {"dense": dense_codes, "onehot": onehot_codes}


def fit(kind: str, n_rows: int, n_features: int, n_classes: int, device: str) -> dict[str, float]:
    """Seconds of the fit and of making its codes, the refined pairs, and the certificate of 200
    pairs.
    """
    place = torch.device(device)
    labels = make_labels(n_rows, n_classes).to(place)
    codes = MAKERS[kind](labels, n_features, n_classes, place)
    making = timed(lambda: [None for _ in codes.batches(BLOCK)], place)
    probe = LogisticProbe1d(slab_rows=BLOCK)
    seconds = timed(lambda: probe.fit(codes, labels, n_classes), place)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    certificate = probe.certify(codes, labels, torch.empty(0, 2, dtype=torch.int64), n_random=200)
    return {
        "seconds": seconds,
        "making": making,
        "peak_mib": peak,
        "refined": probe.n_refined_,
        "converged": float(probe.converged_.double().mean()),
        "ce_error": certificate.ce_error,
        "gradient": certificate.gradient,
    }


def judge(n_rows: int, n_features: int, n_classes: int, device: str) -> dict[str, float]:
    """Seconds of loss, average precision and confusion of all pairs on rows that the probes were
    not fitted to.
    """
    place = torch.device(device)
    labels = make_labels(n_rows, n_classes).to(place)
    codes = dense_codes(labels, n_features, n_classes, place)
    few = TensorCodes(next(codes.batches(BLOCK, 0))["values"])
    probe = LogisticProbe1d(slab_rows=BLOCK).fit(few, labels[:BLOCK], n_classes)
    return {"seconds": timed(lambda: probe.judge(codes, labels), place)}


def direct(n_rows: int, n_features: int, n_classes: int, device: str) -> dict[str, float]:
    """Seconds of both solvers on the same tensor in memory, and the largest difference of their
    train CE.
    """
    place = torch.device(device)
    labels = make_labels(n_rows, n_classes).to(place)
    codes = dense_codes(labels, n_features, n_classes, place)
    values = torch.cat([batch["values"] for batch in codes.batches(BLOCK)])
    probe = LogisticProbe1d(slab_rows=BLOCK)
    sketched = timed(lambda: probe.fit(values, labels, n_classes), place)

    losses: list[Tensor] = []

    def solve() -> None:
        slab = slab_of_rows(values.T.contiguous(), labels)
        counts = count_classes(labels, n_classes).double()
        on_rows = PairLosses(slab, probe.feature_mean_, probe.feature_std_, counts, n_rows)
        pairs = torch.arange(n_features * n_classes, device=place)
        center = probe.fitted_.center[:, pairs % n_classes]
        objective = penalized(on_rows, pairs, center, probe.ridge)
        theta, _, _ = minimize(objective, center, max_iter=200, tol=probe.tol)
        losses.append(on_rows.loss(pairs, theta))

    rows = timed(solve, place)
    return {
        "sketched": sketched,
        "direct": rows,
        "ce_difference": float((losses[0] - probe.loss_.flatten()).abs().max()),
    }


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of some work, the device's included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alone(work: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    """Run it in a process of its own, so that its peak of memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def report(kind: str, n_rows: int, n_features: int, n_classes: int, device: str) -> float:
    """Print what one fit took and found; gives its seconds without those of making the codes."""
    found = alone(fit, kind, n_rows, n_features, n_classes, device)
    say(
        f"{kind:7} N {n_rows:>9,}  L {n_features:>6,}  C {n_classes:>3}: {found['seconds']:6.1f} s"
        f" (codes {found['making']:.1f} s), peak {found['peak_mib']:,.0f} MiB,"
        f" {found['refined']:,.0f} pairs refined, converged {found['converged']:.6f}, certificate"
        f" {found['ce_error']:.1e} nats, gradient {found['gradient']:.1e}",
    )
    return found["seconds"] - found["making"]


def main() -> None:
    """Print the time of the probes at several sizes, and of the direct solver at a small one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the sizes of ADE20K, and nothing else")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    device = arguments.device
    if arguments.full:
        report("dense", 5_120_000, 1024, 151, device)
        report("onehot", 5_120_000, 16_384, 151, device)
        return
    report("dense", 200_000, 1024, 151, device)
    report("onehot", 1_000_000, 16_384, 151, device)
    say(
        "\nGrowth with N (L 128, C 151), seconds without the making of the codes against the"
        " smallest:"
    )
    times = {
        n: report("dense", n, 128, 151, device) for n in (100_000, 400_000, 1_600_000, 6_400_000)
    }
    base = times[100_000]
    say(
        "  "
        + ", ".join(f"N x {n // 100_000}: {seconds / base:.1f}x" for n, seconds in times.items())
    )
    say("\nGrowth with C (N 1,600,000, L 128):")
    times = {c: report("dense", 1_600_000, 128, c, device) for c in (10, 40, 151)}
    say("  " + ", ".join(f"C {c}: {seconds / times[10]:.2f}x" for c, seconds in times.items()))
    say("\nThe direct solver on the same rows (L 8, C 151):")
    for n_rows in (200_000, 5_120_000):
        found = alone(direct, n_rows, 8, 151, device)
        say(
            f"  N {n_rows:>9,}: direct {found['direct']:.1f} s, sketched {found['sketched']:.2f} s:"
            f" {found['direct'] / found['sketched']:.0f}x; train CE differs by at most"
            f" {found['ce_difference']:.1e} nats",
        )
    found = alone(judge, 200_000, 1024, 151, device)
    say(
        "\nCE, average precision and confusion of all pairs, N 200,000, L 1,024, C 151:"
        f" {found['seconds']:.1f} s"
    )


if __name__ == "__main__":
    main()

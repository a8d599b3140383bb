"""How fast a GPU is at what Assay does, beside the products that it is made of and beside peers, in
the same run.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable

import torch
from common import ROOT, Run, mixture
from torch import Tensor

from assay.numerics.kmeans.estimator import MiniBatchKMeans
from assay.numerics.kmeans.nearest import NearestCenters
from assay.numerics.kmeans.seeding import kmeans_plus_plus
from assay.numerics.pca import StreamingPCA
from assay.numerics.precision import sums_in_float32

_BLOCK = 8192


def ceilings(run: Run) -> None:
    """What the card can do at most: products, copies, launches and waits."""
    shrink = run.size(1, 64)

    def rate(name: str, m: int, n: int, k: int, dtype: torch.dtype) -> None:
        a, b = (
            torch.randn(i // shrink, j // shrink, device=run.device).to(dtype)
            for i, j in ((m, k), (k, n))
        )
        with sums_in_float32():
            found = run.best({"product": lambda: a @ b})["product"]
        run.say(
            "ceilings",
            name,
            found=2 * a.shape[0] * b.shape[1] * b.shape[0] / found / 1e12,
            unit="TFLOPS",
        )

    rate("bfloat16, 8,192 cubed", 8192, 8192, 8192, torch.bfloat16)
    rate("bfloat16, 16,384 x 16,384 x 1,024", 16_384, 16_384, 1024, torch.bfloat16)
    rate("float32, 8,192 x 16,384 x 1,024", 8192, 16_384, 1024, torch.float32)
    rate("float64, 1,024 x 1,024 x 16,384", 1024, 1024, 16_384, torch.float64)
    n = run.size(2**28, 2**16)
    there, here = (
        torch.empty(n, device=run.device),
        torch.empty(n, pin_memory=not run.rehearsal).fill_(1),
    )
    best = run.best(
        {"to": lambda: there.copy_(here, non_blocking=True), "within": lambda: there.add_(1)}
    )
    run.say("ceilings", "copies from pinned memory", found=4 * n / best["to"] / 1e9, unit="GB/s")
    run.say(
        "ceilings",
        "read and written on the device",
        found=8 * n / best["within"] / 1e9,
        unit="GB/s",
    )
    one = torch.zeros(1, device=run.device)
    best = run.best(
        {
            "launch": lambda: [one.add_(1) for _ in range(1000)],
            "wait": lambda: [one.item() for _ in range(1000)],
        }
    )
    run.say("ceilings", "a launch from Python", found=1e3 * best["launch"], unit="us")
    run.say("ceilings", "a read that waits", found=1e3 * best["wait"], unit="us")


def _flash(run: Run, x: Tensor, centers: Tensor) -> Callable[[], object] | None:
    """flash-kmeans' nearest centers, in bfloat16 and without a bound on its error; None where it is
    missing, and in rehearsal.
    """
    if run.rehearsal:
        return None
    try:
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton
    except ImportError as error:
        run.say("assignment", "flash-kmeans", found=f"left out: {error}")
        return None
    tokens, seeds = x.bfloat16()[None], centers.bfloat16()[None]
    squares = tokens.float().square().sum(-1)
    return lambda: euclid_assign_triton(tokens, seeds, squares)


def assignment(run: Run) -> None:
    """The nearest of 16,384 centers, for many tokens and for one batch."""
    d, k = run.size(1024, 16), run.size(16_384, 100)
    for kind in ("planted", "noise"):
        x = mixture(run.size(131_072, 600), d, k, run.device, noise=kind == "noise")
        for n, of_product in (
            (run.size(131_072, 600), 0.7),
            (run.size(16_384, 500), 0.7),
            (run.size(8192, 200), 0.6),
        ):
            _assign(run, x[:n], x[:k].clone(), f"{kind}, {n:,} tokens", of_product)


def _assign(run: Run, x: Tensor, centers: Tensor, name: str, of_product: float) -> None:
    """Ours, the bfloat16 product alone, `torch.cdist` and flash-kmeans on the same tokens and
    centers.
    """
    finder, tokens, columns = (
        NearestCenters(centers),
        x.bfloat16(),
        centers.bfloat16().T.contiguous(),
    )
    scores = torch.empty(min(_BLOCK, len(x)), len(centers), dtype=torch.bfloat16, device=run.device)

    def product() -> None:
        for rows in tokens.split(_BLOCK):
            torch.mm(rows, columns, out=scores[: len(rows)])

    works: dict[str, Callable[[], object]] = {
        "ours": lambda: finder.find(x),
        "product": product,
        "torch.cdist": lambda: [torch.cdist(rows, centers).argmin(1) for rows in x.split(_BLOCK)],
    }
    flash = _flash(run, x, centers)
    best = run.best(works | ({"flash-kmeans": flash} if flash else {}))
    run.say("assignment", f"assignment, {name}", found=1e3 * best["ours"], unit="ms")
    share = best["product"] / best["ours"]
    run.judge(
        "assignment",
        f"assignment of the bfloat16 product's rate, {name}",
        share,
        at_least=of_product,
    )
    run.judge(
        "assignment",
        f"times torch.cdist's rate, {name}",
        best["torch.cdist"] / best["ours"],
        at_least=3,
    )
    if flash:
        run.judge(
            "assignment",
            f"times flash-kmeans' rate, {name}",
            best["flash-kmeans"] / best["ours"],
            at_least=1,
        )


def steps(run: Run) -> None:
    """A step of mini-batch k-means beside its own assignment; what it launches and waits for; a
    center of k-means++.
    """
    d, k = run.size(1024, 16), run.size(16_384, 100)
    for n in (run.size(8192, 200), run.size(16_384, 300)):
        _step(run, mixture(n, d, k, run.device), mixture(k, d, k, run.device))
    sample, seeds = mixture(3 * k, d, k, run.device), min(64, k)
    work = {"seeds": lambda: kmeans_plus_plus(sample, seeds, torch.Generator().manual_seed(0))}
    run.say(
        "steps", "a center of k-means++", found=1e3 * run.best(work)["seeds"] / seeds, unit="ms"
    )


def _step(run: Run, x: Tensor, centers: Tensor) -> None:
    counts = torch.full((len(centers),), 50, device=run.device)
    model = MiniBatchKMeans.from_state({"cluster_centers": centers, "counts": counts})
    model.reassignment_ratio = 0.0
    finder = NearestCenters(centers)
    best = run.best({"step": lambda: model.partial_fit(x), "find": lambda: finder.find(x)}, 20)
    name = f"a step of {len(x):,} tokens"
    run.say("steps", name, found=1e3 * best["step"], unit="ms")
    run.judge("steps", f"{name} beside its assignment", best["step"] / best["find"], at_most=1.5)
    _profile(run, name, lambda: model.partial_fit(x))


def _profile(run: Run, what: str, work: Callable[[], object]) -> None:
    """Launches and waits, and in the log where the time goes."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([] if run.rehearsal else [ProfilerActivity.CUDA])]
    with profile(activities=kinds) as profiler:
        work()
        if not run.rehearsal:
            torch.cuda.synchronize()
    events = profiler.key_averages()
    calls: Counter[str] = Counter()
    for event in events:
        calls["launches"] += event.count if "LaunchKernel" in event.key else 0
        calls["waits"] += (
            event.count
            if "StreamSynchronize" in event.key or "EventSynchronize" in event.key
            else 0
        )
    if not run.rehearsal:
        run.say("steps", f"launches of {what}", found=calls["launches"])
        run.judge("steps", f"waits of {what}", calls["waits"], at_most=6)
    by = "cpu_time_total" if run.rehearsal else "cuda_time_total"
    with (run.out / "profile.txt").open("a", encoding="utf-8") as file:
        file.write(
            f"== {what}\n{events.table(sort_by=by, row_limit=40, max_name_column_width=70)}\n"
        )


def pca(run: Run) -> None:
    """PCA's update beside the float64 product that it is made of."""
    for n in (run.size(16_384, 300), run.size(8192, 200)):
        _update(run, mixture(n, run.size(1024, 16), 100, run.device))


def _update(run: Run, x: Tensor) -> None:
    exact = x.double()
    square = torch.empty(x.shape[1], x.shape[1], dtype=torch.float64, device=run.device)
    model = StreamingPCA().partial_fit(x)
    works = {
        "ours": lambda: model.partial_fit(x),
        "product": lambda: torch.mm(exact.T, exact, out=square),
    }
    best = run.best(works, 10)
    run.say("pca", f"PCA, batches of {len(x):,}", found=len(x) / best["ours"], unit="tokens/s")
    name = f"PCA's update of the float64 product's rate, batches of {len(x):,}"
    run.judge("pca", name, best["product"] / best["ours"], at_least=0.7)


def probes(run: Run) -> None:
    """All probes of ADE20K's patches, as benchmarks/probe.py makes them: dense features, and
    one-hot clusters.
    """
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import probe

    for kind, n_features in (("dense", run.size(1024, 8)), ("onehot", run.size(16_384, 50))):
        n_rows, n_classes = run.size(5_120_000, 20_000), run.size(151, 5)
        found = probe.fit(kind, n_rows, n_features, n_classes, str(run.device))
        what = f"probes, {n_rows:,} patches x {n_features:,} features x {n_classes} classes, {kind}"
        run.judge("probes", f"{what}, s", found["seconds"], at_most=10)
        run.judge(
            "probes",
            f"error of CE by the certificate, nats, {kind}",
            found["ce_error"],
            at_most=1e-9,
        )


STAGES: dict[str, Callable[[Run], None]] = {
    "ceilings": ceilings,
    "assignment": assignment,
    "steps": steps,
    "pca": pca,
    "probes": probes,
}

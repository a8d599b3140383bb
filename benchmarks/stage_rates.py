"""How much of each stage a core does in a second, at the paper's width and number of clusters, and
what a checkpoint costs: the CPU's rates of `benchmarks/stage_costs.py`.

    python benchmarks/stage_rates.py

Seconds are the processor's, of one thread; half a minute in all.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from assay.io.checkpoints import Checkpoints
from assay.numerics.dictionary import open_dictionary
from assay.numerics.kmeans.estimator import MiniBatchKMeans
from assay.numerics.kmeans.seeding import Seeding, choose_seeds
from assay.numerics.moments import StreamingMoments, standardize
from assay.numerics.pca import StreamingPCA
from assay.numerics.probe.cells import CellMap
from assay.numerics.probe.sketch import FeatureSketch

WIDTH, CLUSTERS, CLASSES = 1024, 16_384, 150
SWEEP = (1, 4, 16, 64, 256, 1024)
FEW = 2048
"""Tokens of what is slow."""


def say(what: str, found: float, unit: str) -> None:
    """A line of what was found."""
    sys.stdout.write(f"{what:45}{found:14,.4g} {unit}\n")
    sys.stdout.flush()


def seconds(work: Callable[[], object], times: int = 2) -> float:
    """The processor's, of the best time after a first one."""
    found = []
    for _ in range(times + 1):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found[1:])


def measure_fits(x: Tensor, generator: torch.Generator) -> tuple[MiniBatchKMeans, StreamingPCA]:
    """Statistics, standardizing, PCA, seeding and steps; what was fitted."""
    zeros, ones = (make(WIDTH, dtype=torch.float64) for make in (torch.zeros, torch.ones))
    moments, pca = StreamingMoments(), StreamingPCA()
    centers = torch.randn(CLUSTERS, WIDTH, generator=generator)
    counts = torch.full((CLUSTERS,), 50)
    kmeans = MiniBatchKMeans.from_state({"cluster_centers": centers, "counts": counts})
    works: dict[str, Callable[[], object]] = {
        "statistics": lambda: moments.partial_fit(x),
        "standardizing": lambda: standardize(x, zeros, ones),
        "PCA": lambda: pca.partial_fit(x),
        "a step of k-means": lambda: kmeans.partial_fit(x),
    }
    for name, work in works.items():
        say(name, len(x) / seconds(work), "tokens/s")
    tokens = torch.randn(3 * CLUSTERS, WIDTH, generator=generator)
    seeds = choose_seeds(tokens, CLUSTERS, generator, Seeding())
    next(seeds)
    say("k-means++", 1e3 * seconds(lambda: [next(seeds) for _ in range(10)]) / 10, "ms a center")
    return kmeans, pca


def measure_dictionaries(x: Tensor, kmeans: MiniBatchKMeans, pca: StreamingPCA) -> None:
    """Errors and codes."""
    few, std = x[:FEW], torch.ones(WIDTH, dtype=torch.float64)
    centers = open_dictionary("kmeans-onehot", kmeans.state_dict())
    distances = open_dictionary("kmeans-invdist", kmeans.state_dict())
    components = open_dictionary(f"pca-topk-{WIDTH:05d}", pca.state_dict(), SWEEP)
    say("errors of centers", len(x) / seconds(lambda: centers.errors(x, std)), "tokens/s")
    say("errors of PCA's sweep", FEW / seconds(lambda: components.errors(few, std)), "tokens/s")
    say("one-hot codes", len(x) / seconds(lambda: centers.encode(x)), "tokens/s")
    say("inverse distances", FEW / seconds(lambda: distances.encode(few)), "tokens/s")
    say("all coefficients, sorted", FEW / seconds(lambda: components.encode(few)), "tokens/s")
    codes, labels = components.encode(few), torch.arange(FEW) % CLASSES
    dense = FeatureSketch(CellMap.of_rows(few.T), CLASSES)
    taken = seconds(lambda: dense.add(few, labels))
    say("the sketch of dense codes", few.numel() / taken, "codes/s")
    features, values = codes["indices"].flatten(), codes["values"].flatten().double()
    sketch = FeatureSketch(CellMap.of_events(features, values, WIDTH), CLASSES)
    classes = labels.repeat_interleave(WIDTH)
    taken = seconds(lambda: sketch.add_events(features, values, classes))
    say("the sketch of sparse codes", len(values) / taken, "codes/s")


def measure_saves(name: str, estimator: MiniBatchKMeans | StreamingPCA) -> None:
    """A checkpoint's size, and how long it takes to save and to load."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder)

        def save() -> None:
            tensors, state = estimator.checkpoint()
            checkpoints.save({}, 1, tensors, {"estimator": state})

        say(f"{name}: a checkpoint", seconds(save), "s")
        (path,) = Path(folder).rglob("*.safetensors")
        say(f"{name}: its size", path.stat().st_size / 1e6, "MB")
        say(f"{name}: loaded", seconds(lambda: checkpoints.load({})), "s")


def main() -> None:
    """Print a line for each rate."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8192, WIDTH, generator=generator)
    kmeans, pca = measure_fits(x, generator)
    measure_dictionaries(x, kmeans, pca)
    measure_saves("k-means", kmeans)
    measure_saves("PCA", pca)


if __name__ == "__main__":
    main()

"""What each stage of a layer costs at the paper's sizes: bytes, operations and seconds, on a GPU,
on eight, and on a CPU node.

Nothing is measured here: rates are those of docs/benchmarks.md and of `benchmarks/stage_rates.py`,
and what is reckoned without a measurement says so where it stands. A stage takes

    max(bytes / the file system's share, bytes / the rate of reading from memory + work)

since waiting for a disk overlaps with all else, and copying out of the page cache does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LAYERS, WIDTH, CLUSTERS, CLASSES = 6, 1024, 16_384, 151
SWEEP = (1, 4, 16, 64, 256, 1024)
N_INIT = 4
FIT, VAL, PROBE_TRAIN, PROBE_VAL = (256 * n for n in (1_281_167, 50_000, 20_210, 2_000))
"""Tokens of a layer: ImageNet-1K's train and val, ADE20K's training and validation."""
TOKEN_BYTES = 4 * WIDTH
RANKS = 8
FILE_SYSTEMS = (5, 30, 60, 150)
"""GB/s, for all layers together."""

SKETCH_BYTES = 344_064
"""Memory of a feature in a sketch: `FeatureSketch.bytes_per_feature`."""
SOLVED, RANKED = 256, 64
"""Features that are solved and ranked together: slabs are of whole groups of them."""
PAIR_BYTES = 180
"""What the probe of one (feature, class) is on disk, in tensors and in a table."""
ONE_HOT_BYTES = 12
"""What a one-hot code is on disk: int32 for its place, float64 for its error."""
CERTIFIED = 2 * CLASSES + 64
"""Features that are certified at the most: each class's best two ways, and random ones."""


@dataclass(frozen=True)
class Machine:
    """What one process works on.

    Attributes:
        in_order, shuffled: GB/s at which it reads what the page cache holds.
        free: bytes of memory that probes find free.
    """

    in_order: float
    shuffled: float
    free: float


H100 = Machine(in_order=11.0, shuffled=4.8, free=70e9)
"""With 16 cores beside it, 8 reading threads."""
NODE = Machine(in_order=12.0, shuffled=8.5, free=200e9)
"""A CPU node. Reading is that of two cores, of the newer machine."""
NODE_CORES = 64

FAR = {2: (1.50, 0.24), 16: (2.73, 1.49), 64: (1.26, 1.36)}
"""GB/s in order and shuffled, by threads, where each read takes 1 ms more, on two cores."""

# One H100.
STEP = 1.16e-3 / 8192  # a step of k-means, seconds a token
SEED = 0.95e-3  # a center of k-means++ (an H200's)
FLOAT64 = 0.6 * 60e12  # PCA's update, of the float64 product
MEMORY = 3.0e12  # bytes/s
SKETCHED = 2.4 / (5.12e6 * 1024)  # sketch and solving, seconds a code
ONE_HOT_PROBES = 1.6
OF_CORES = 53.8 * 2 / 2.4  # cores that sketch and solve as fast: for what no GPU was timed at

# One core; seconds a token, but for the seeding, the sketches and the ranking.
STANDARDIZE = 1 / 63e3
CORE_MOMENTS = 1 / 60e3
CORE_STEP = 1 / 3.7e3 + STANDARDIZE
CORE_SEED = 67e-3  # bound by memory: no more cores are reckoned with
CORE_PCA = 1 / 23e3 + STANDARDIZE
CORE_ASSIGN = 1 / 4.1e3 + STANDARDIZE
CORE_PCA_ERRORS = 1 / 1.9e3 + STANDARDIZE
CORE_DISTANCES = 1 / 940 + STANDARDIZE
CORE_TOP = 1 / 9.2e3 + STANDARDIZE
CORE_SKETCH = 53.8 * 2 / (5.12e6 * 1024)  # dense, solving included, seconds a code
CORE_EVENTS = 1 / 11e6  # sparse, without it
CORE_SOLVE = 15 * 2 / 1024  # a feature, all classes
CORE_RANK = 29.5 * 2 / (200e3 * 1024)  # CE, AP and confusion, seconds a code


@dataclass(frozen=True)
class Stage:
    """What a stage of one layer takes.

    Attributes:
        name: of the stage.
        what: what is read, for the reader of the page.
        tokens: read in all, by one process.
        operations: of its products, in all.
        gpu: seconds of work on one H100.
        ranks: seconds of work on each of eight; None: rank 0 works alone.
        core: core seconds of work.
        serial: seconds of work on a CPU that more cores do not shorten.
        shuffled: whether it is read so.
        shared: whether ranks read a share each; else each reads all, from one page cache.
        written: bytes.
    """

    name: str
    what: str
    tokens: float
    operations: float
    gpu: float
    ranks: float | None
    core: float
    serial: float = 0.0
    shuffled: bool = False
    shared: bool = False
    written: float = 0.0


def slabs(features: int, feature_bytes: float, free: float, group: int) -> int:
    """Passes over the codes where a quarter of the free memory holds as many features, in whole
    groups: `LabeledCodes.room`.
    """
    fits = int(free // 4 // feature_bytes)
    return math.ceil(features / max(group, fits // group * group))


def probe_passes(features: int, ks: int, free: float) -> tuple[int, int]:
    """Passes over the train and the validation codes to fit, judge and certify probes for so many
    K, where the sketches settle every pair.
    """
    certified = 16 * PROBE_TRAIN * ks
    train = slabs(features, ks * SKETCH_BYTES, free, SOLVED)
    train += slabs(min(features, CERTIFIED), certified, free, 1)
    val = slabs(features, 4 * PROBE_VAL * ks, free, RANKED)
    return train, val + 2  # L0, and where the best features are strongest


def probes(name: str, features: int, ks: int, free: float, *, dense: bool) -> Stage:
    """Probes of codes that are computed as they are read, twice: the fit's and the floor's."""
    train, val = probe_passes(features, ks, free)
    tokens = 2 * (train * PROBE_TRAIN + val * PROBE_VAL)
    encoding = 2 * WIDTH * features
    codes = PROBE_TRAIN * features
    solving = codes * CORE_SKETCH if dense else codes * CORE_EVENTS + ks * features * CORE_SOLVE
    apart = 2 * (solving + ks * PROBE_VAL * features * CORE_RANK)
    gpu = 2 * codes * SKETCHED if dense else 2 * solving / OF_CORES
    gpu += 2 * ks * PROBE_VAL * features * CORE_RANK / OF_CORES
    encoded = tokens * encoding / FLOAT64
    return Stage(
        name,
        f"ADE20K, train {2 * train} times, val {2 * val} times",
        tokens,
        tokens * encoding,
        gpu + encoded,
        # Each rank encodes all patches; groups are not cut.
        gpu / min(RANKS, math.ceil(features / SOLVED)) + encoded,
        apart + tokens * (CORE_DISTANCES if dense else CORE_TOP),
        written=2 * ks * features * CLASSES * PAIR_BYTES,
    )


def stages(machine: Machine, passes: float) -> list[Stage]:
    """The stages of a layer in their order; k-means makes so many passes."""
    step, squared = 2 * CLUSTERS * WIDTH, 2 * WIDTH**2
    seeding = N_INIT * CLUSTERS
    pca = squared / FLOAT64
    kmeans_tokens = passes * FIT
    # Over ranks no step is one CUDA graph: 170 launches, an eighth of the product, and 33.6 MB
    # that are gathered at 200 GB/s. None of it has run.
    by_centers = 170 * 7e-6 + STEP * 8192 / RANKS + 8192 * TOKEN_BYTES / 200e9
    onehot = 2 * (PROBE_TRAIN + PROBE_VAL)
    errors = (2 * step + 2 * (1 + len(SWEEP)) * squared) * VAL
    return [
        Stage(
            "statistics",
            "ImageNet train, once",
            FIT,
            8 * WIDTH * FIT,
            FIT * 64 * WIDTH / MEMORY,  # eight passes over float64: reckoned, not timed
            FIT * 64 * WIDTH / MEMORY / RANKS,
            FIT * CORE_MOMENTS,
            shared=True,
            written=2 * 8 * WIDTH,
        ),
        Stage(
            "k-means, seeding",
            "98,304 tokens, once",
            2 * 3 * CLUSTERS,
            seeding * 11 * 3 * CLUSTERS * 2 * WIDTH,
            seeding * SEED,
            None,
            0.0,
            serial=seeding * CORE_SEED,
            shuffled=True,
        ),
        Stage(
            "k-means, steps",
            "ImageNet train, " + ("once" if passes == 1 else f"{passes:g} times"),
            kmeans_tokens,
            kmeans_tokens * step,
            kmeans_tokens * STEP,
            kmeans_tokens / 8192 * by_centers,
            kmeans_tokens * CORE_STEP,
            shuffled=True,
            shared=True,
            written=CLUSTERS * TOKEN_BYTES,
        ),
        Stage(
            "PCA",
            "ImageNet train, once",
            FIT,
            FIT * squared,
            FIT * pca,
            FIT * pca / RANKS,
            FIT * CORE_PCA,
            shared=True,
            written=8 * WIDTH**2,
        ),
        Stage(
            "errors (NMSE)",
            "ImageNet val, 4 times",
            4 * VAL,
            errors,
            2 * VAL * STEP + 2 * VAL * (1 + len(SWEEP)) * pca,
            None,
            2 * VAL * (CORE_ASSIGN + CORE_PCA_ERRORS),
        ),
        Stage(
            "codes, one-hot",
            "ADE20K, both splits, 2 times",
            onehot,
            onehot * step,
            onehot * STEP,
            None,
            onehot * CORE_ASSIGN,
            written=onehot * ONE_HOT_BYTES,
        ),
        Stage(
            "probes, one-hot",
            "its codes",
            0,
            0,
            2 * ONE_HOT_PROBES,
            2 * ONE_HOT_PROBES,
            2 * 2.7 * 2,
            written=2 * CLUSTERS * CLASSES * PAIR_BYTES,
        ),
        probes("probes, inverse distances", CLUSTERS, 1, machine.free, dense=True),
        probes("probes, PCA's sweep", WIDTH, len(SWEEP), machine.free, dense=False),
    ]


@dataclass(frozen=True)
class Cluster:
    """Machines that work on layers, each layer in one process or in `ranks` of one node."""

    name: str
    layers_at_once: int
    ranks: int
    machine: Machine
    units: int
    """GPUs, or nodes: what is paid for."""

    def seconds(self, stage: Stage, gb_per_s: float) -> float:
        """Of a stage of one layer, at so much file system in all."""
        n_bytes = stage.tokens * TOKEN_BYTES
        by_memory = self.machine.shuffled if stage.shuffled else self.machine.in_order
        work = stage.gpu
        if self.machine is NODE:
            work = stage.core / NODE_CORES + stage.serial
        elif self.ranks > 1 and stage.ranks is not None:
            work = stage.ranks
        readers = self.ranks if stage.shared else 1
        from_disk = n_bytes / (gb_per_s * 1e9 / self.layers_at_once)
        return max(from_disk, n_bytes / (readers * by_memory * 1e9) + work)


CLUSTERS_OF_MACHINES = (
    Cluster("1 H100, one layer after another", 1, 1, H100, 1),
    Cluster("6 H100, one a layer", 6, 1, H100, 6),
    Cluster("48 H100, eight a layer", 6, RANKS, H100, 48),
    Cluster("1 node of 64 cores", 1, 1, NODE, 1),
    Cluster("6 nodes of 64 cores", 6, 1, NODE, 6),
)


def hours(cluster: Cluster, gb_per_s: float, passes: float) -> float:
    """Of all layers, without waiting for a queue."""
    layer = sum(cluster.seconds(stage, gb_per_s) for stage in stages(cluster.machine, passes))
    return layer * LAYERS / cluster.layers_at_once / 3600

"""From shards on a disk to the card: how fast they are read, how long the card waits, and all
probes of a layer.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from common import Run
from torch import Tensor

from assay.codes import Batch
from assay.numerics.codes import ComputedCodes
from assay.numerics.kmeans.estimator import MiniBatchKMeans
from assay.numerics.pca import StreamingPCA
from assay.numerics.probe import LogisticProbe1d

Read = Callable[..., Iterator[Tensor]]


def from_shards(run: Run) -> None:
    """On shards in memory, if there is a file system for that: 2 GiB of a layer of ViT-L's width,
    read ten times for all probes.
    """
    if importlib.util.find_spec("pydantic") is None:
        run.say("from_shards", "reading", found="left out: there is no pydantic (make gpu-bundle)")
        return
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        _from_shards(run, folder)


def _from_shards(run: Run, folder: str) -> None:
    sys.path.append(str(Path(__file__).parents[1]))  # what the other benchmarks share
    from random_shards import write_random

    from assay.io.shards import Shards

    d, batch = run.size(1024, 16), run.size(8192, 128)
    path = write_random(
        folder,
        run.size(2048, 64),
        layers=(3,),
        patches=run.size(256, 16),
        d_model=d,
        examples_per_shard=512,
        repeated=True,
    )
    shards = Shards(path)

    def read(**options: object) -> Iterator[Tensor]:
        return shards.batches(**{"layer": 3, "batch_size": batch, "device": run.device} | options)  # type: ignore[arg-type]

    _reading(run, read, 4 * shards.n_tokens * d)
    _passes(run, read, shards.layer(3).hold(read(), run.device), batch)
    _probes(run, read, shards.n_tokens, d)


def _read_through(read: Read, **options: object) -> None:
    for _ in read(**options):
        pass


def _reading(run: Run, read: Read, n_bytes: int) -> None:
    for shuffle, threads in itertools.product((False, True), (2, 4, 8)):
        found = run.seconds(partial(_read_through, read, shuffle=shuffle, threads=threads))
        what = f"read{', shuffled' if shuffle else ''}, {threads} threads"
        run.say("from_shards", what, found=n_bytes / found / 1e9, unit="GB/s")


def _fit(make: Callable[[], MiniBatchKMeans | StreamingPCA], read: Read, **options: object) -> None:
    model = make()
    for x in read(**options):
        model.partial_fit(x)


def _passes(run: Run, read: Read, held: Tensor, batch: int) -> None:
    """How much of a pass over the layer waits for batches: from the disk, and from the card."""
    k = run.size(16_384, 50)
    centers = held[:: max(1, len(held) // k)][:k] + 0.1
    state = {"cluster_centers": centers, "counts": torch.full((k,), 50, device=run.device)}
    models: dict[str, Callable[[], MiniBatchKMeans | StreamingPCA]] = {
        "k-means": lambda: MiniBatchKMeans.from_state(state),
        "PCA": lambda: StreamingPCA(device=run.device),
    }
    resident = list(held.split(batch))
    for name, make in models.items():
        best = run.best(
            {
                "streamed": partial(_fit, make, read, shuffle=True),
                "held": partial(_fit, make, read, shuffle=True, held=held),
                "resident": partial(_fit, make, lambda: iter(resident)),
            },
            2,
        )
        for how in ("streamed", "held"):
            run.say(
                "from_shards",
                f"a pass of {name}, {how}",
                found=len(held) / best[how],
                unit="tokens/s",
            )
            share = 1 - best["resident"] / best[how]
            what = f"share of a pass of {name} that waits for batches, {how}"
            if how == "held":
                run.judge("from_shards", what, share, at_most=0.1)
            else:  # which is the disk's
                run.say("from_shards", what, found=share)


def _probes(run: Run, read: Read, n_tokens: int, d: int) -> None:
    times, n_classes = run.size(10, 2), run.size(151, 5)

    def stream(size: int, start: int) -> Iterator[Batch]:
        for _ in range(start // n_tokens, times):
            for x in read(batch_size=size):
                yield {"values": x}

    n_rows = times * n_tokens
    labels = (torch.arange(n_rows, device=run.device) * 7919 % 100_003 % (n_classes + 1)) - 1
    codes = ComputedCodes("dense", n_rows, d, d, stream)
    probe = LogisticProbe1d(slab_rows=run.size(16_384, 256))
    seconds = run.seconds(lambda: probe.fit(codes, labels, n_classes))
    what = f"all probes from shards, {n_rows:,} patches x {d:,} features x {n_classes} classes, s"
    run.judge("from_shards", what, seconds, at_most=60)


STAGES: dict[str, Callable[[Run], None]] = {"from_shards": from_shards}

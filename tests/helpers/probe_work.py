"""The probe node on codes that are computed as they are read, slowly if wanted, and stopped by a
signal at a sign of progress: in this process or in ranks.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from assay.encodings import Form
from assay.io.checkpoints import Checkpoints
from assay.io.shards import Shards
from assay.parameters import KMeansParameters, ProbeParameters
from assay.pipelines.dictionary_nodes import Computation, SourcedCodes, encode
from assay.pipelines.probe.nodes import fit_probes
from assay.pipelines.signs_of_life import staged_bar

NAME = "kmeans-invdist"


def tokens_as_centers(n_clusters: int, shards: Shards) -> dict[str, Tensor]:
    """Statistics of a split, and some of its standardized tokens as centers, by name: features with
    values far out, which take more than a sketch.
    """
    tokens = torch.cat(list(shards.batches(layer=5, batch_size=64))).double()
    mean, std = tokens.mean(0), tokens.std(0, correction=0)
    centers = ((tokens - mean) / std)[:n_clusters].float()
    counts = torch.ones(n_clusters, dtype=torch.int64)
    return {"mean": mean, "std": std, "cluster_centers": centers, "counts": counts}


def make_codes(shards: Shards, tensors: Any) -> SourcedCodes:
    """Distances to the centers, computed as they are read."""
    statistics = {name: tensors[name] for name in ("mean", "std")}
    model = {name: tensors[name] for name in ("cluster_centers", "counts")}
    form, settings = Form("invdist"), KMeansParameters(n_clusters=len(model["counts"]))
    return encode(shards, statistics, model, "cpu", settings, layer=5, name=NAME, kind=form)


def run_probes(team: Any, request: Any, tensors: Any) -> Any:
    """The node's tensors and scores. The request says `shards` and `checkpoints`, paths, and may
    say `parameters`; `stop`, a stage, how many signs of progress in it there are until a signal to
    this process, and its number; and `pause`, seconds a batch.
    """
    del team
    checkpoints = Checkpoints(request["checkpoints"])
    train, val = (Shards(path) for path in request["shards"])
    with _stopped(*request.get("stop", ("", 0, 0))), _slowed(request.get("pause", 0)):
        found = fit_probes(
            make_codes(train, tensors),
            make_codes(val, tensors),
            train,
            val,
            ProbeParameters(**request.get("parameters", {})),
            checkpoints,
            "cpu",
            layer=5,
            method="kmeans",
            rows=((NAME, None),),
        )
    checkpoints.clear_finished()
    return [found[0], found[1], found[3]]


@contextmanager
def _stopped(stage: str, signs: int, number: int) -> Iterator[None]:
    left = [signs]

    @contextmanager
    def stopping(doing: str) -> Iterator[Any]:
        with staged_bar(doing) as show:

            def tell(at: str, done: int, total: int) -> None:
                show(at, done, total)
                left[0] -= at == stage
                if at == stage and left[0] == 0:
                    os.kill(os.getpid(), number)

            yield tell

    with mock.patch("assay.pipelines.probe.work.staged_bar", stopping):
        yield


@contextmanager
def _slowed(seconds: float) -> Iterator[None]:
    stream = Computation.stream

    def slow(*given: Any, **named: Any) -> Iterator[Any]:
        for batch in stream(*given, **named):
            time.sleep(seconds)
            yield batch

    with mock.patch.object(Computation, "stream", slow):
        yield

"""What several ranks make of one fit: CPU seconds of a rank against those of one process, one
thread each.

    python benchmarks/ranks.py

On a machine with fewer cores than ranks the clock says nothing; CPU seconds do: one process's over
the busiest rank's is how many times as fast the ranks are where each has a core. Everything is in
it: reading, standardizing, exchanging.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from random_shards import write_random
from torch import Tensor

from assay.io.checkpoints import Checkpoints
from assay.io.shards import Shards
from assay.numerics.kmeans.by_centers import KMeansByCenters
from assay.numerics.kmeans.estimator import MiniBatchKMeans
from assay.numerics.moments import StreamingMoments
from assay.numerics.pca import StreamingPCA
from assay.parameters import KMeansParameters
from assay.pipelines.kmeans.passes import Passes, hyperparameters
from assay.pipelines.one_pass import PARAMETERS, OnePass
from assay.pipelines.pca.nodes import fit_pca_part
from assay.pipelines.standardize.nodes import fit_statistics_part
from assay.team import Team, as_current, current_team

say = sys.stdout.write

METHODS: dict[str, tuple[Any, Any]] = {
    "statistics": (StreamingMoments, fit_statistics_part),
    "pca": (StreamingPCA, fit_pca_part),
}
"""The estimator of a method that is fitted in parts, and what makes one."""


def step_kmeans(
    team: Team, request: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[float]:
    """CPU seconds of each rank for so many steps of k-means."""
    del tensors
    shards = Shards(request["shards"])
    parameters = KMeansParameters(
        n_clusters=request["n_clusters"],
        batch_size=request["batch_size"],
        max_no_improvement=None,
        reassignment_ratio=request["reassignment_ratio"],
    )
    cpu = torch.device("cpu")
    given = hyperparameters(parameters, 0, cpu)
    d = shards.d_model
    statistics = {"mean": torch.zeros(d).double(), "std": torch.ones(d).double()}
    passes = Passes(shards, 0, statistics, parameters, 0, cpu)
    kmeans = (
        MiniBatchKMeans(parameters.n_clusters, **given)
        if team.size == 1
        else KMeansByCenters(parameters.n_clusters, ranks=team, **given)
    )
    with shards.batches(
        layer=0, batch_size=parameters.n_clusters, shuffle=True, max_tokens=parameters.n_clusters
    ) as tokens:
        kmeans.cluster_centers_ = next(tokens).clone()
    # As later in a fit, when no cluster is empty.
    kmeans.counts_ = torch.full((parameters.n_clusters,), 100)
    steps = kmeans.steps(
        passes.batches
        if team.size == 1
        else lambda epoch: passes.batches_of_all(team, epoch, kmeans.steps_of_pass_)
    )
    next(steps)
    began = time.process_time()
    for _, _ in zip(range(request["steps"]), steps, strict=False):
        team.any(False)
    took = torch.tensor([time.process_time() - began])
    return torch.cat(team.all_gather(took)).tolist()


def fit_parts(team: Team, request: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[float]:
    """CPU seconds of each rank for its parts of statistics or PCA; rank 0 merges them. The
    eigendecompositions are left out: they do not grow with the tokens.
    """
    del tensors
    method = request["method"]
    shards, d = Shards(request["shards"], threads=1), request["d_model"]
    statistics = {"mean": torch.zeros(d).double(), "std": torch.ones(d).double()}
    whole = OnePass(
        method,
        shards,
        0,
        PARAMETERS[method](parts=4, batch_size=request["batch_size"]),
        Checkpoints(request["checkpoints"]),
        "cpu",
        statistics if method == "pca" else {},
    )
    new, work = METHODS[method]
    began = time.process_time()
    for part in whole.parts[team.rank :: team.size]:
        work(part, whole.request(), whole.statistics)
    team.any(False)
    if team.rank == 0:
        with as_current(Team()):
            merged = new()
            for _, fitted in whole.fit_in_parts(work, new):
                merged.merge(fitted)
    took = torch.tensor([time.process_time() - began])
    return torch.cat(team.all_gather(took)).tolist()


def by(size: int, function: str, request: Mapping[str, Any]) -> list[float]:
    """What a function gives where so many ranks do it, or this process alone."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                __file__,
                "--rank",
                json.dumps([rank, size, store.port, function, request]),
            ],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(size)
    ]
    found = [rank.communicate()[0] for rank in ranks]
    seconds: list[float] = json.loads(found[0])
    return seconds


def be_rank(rank: int, size: int, port: int, function: str, request: Mapping[str, Any]) -> None:
    """Do what `by` has ranks do."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from assay.ranks.group import Group

    torch.set_num_threads(1)
    if size == 1:
        say(json.dumps(current_team().call(function, request)))
        return
    group = Group(rank, size, lambda: TCPStore("localhost", port, is_master=False))
    if rank > 0:
        group.follow()
        group.close()
        return
    say(json.dumps(group.call(function, request)))
    group.end()


def compare_parts(shards: Path, checkpoints: Path, sizes: list[int]) -> None:
    """Print the CPU seconds of statistics and PCA in four parts."""
    d_model = Shards(shards).d_model
    for method in METHODS:
        one = 0.0
        for size in (1, *sizes):
            request = {
                "method": method,
                "shards": str(shards),
                "d_model": d_model,
                "batch_size": 2048,
                "checkpoints": str(checkpoints / f"{method}-{size}"),
            }
            seconds = max(by(size, "ranks:fit_parts", request))
            one = one or seconds
            say(
                f"{method}, {size} process{'es' if size > 1 else ''}: {seconds:.2f} CPU s of the"
                f" busiest, {one / seconds:.2f} times as fast\n"
            )


def main() -> None:
    """Measure, or be a rank of what is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-clusters", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2])
    parser.add_argument("--reassignment-ratio", type=float, default=0.01)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        be_rank(*json.loads(given.rank))
        return
    with tempfile.TemporaryDirectory() as folder:
        shards = write_random(
            Path(folder),
            8 * given.batch_size // 256,
            layers=(0,),
            patches=256,
            d_model=given.d_model,
            examples_per_shard=64,
            about=given.n_clusters,
        )
        compare_parts(shards, Path(folder) / "checkpoints", given.ranks)
        request = {
            "shards": str(shards),
            "n_clusters": given.n_clusters,
            "batch_size": given.batch_size,
            "steps": given.steps,
            "reassignment_ratio": given.reassignment_ratio,
        }
        function = "ranks:step_kmeans"
        (one,) = by(1, function, request)
        say(f"k-means, 1 process:  {one / given.steps:6.2f} CPU s a step\n")
        for size in given.ranks:
            seconds = by(size, function, request)
            say(
                f"k-means, {size} ranks:    {max(seconds) / given.steps:6.2f} CPU s a step of the"
                f" busiest, {one / max(seconds):.2f} times as fast\n"
            )


if __name__ == "__main__":
    main()

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

from assay.io.shards import Shards
from assay.numerics.kmeans.by_centers import KMeansByCenters
from assay.numerics.kmeans.estimator import MiniBatchKMeans
from assay.parameters import KMeansParameters
from assay.pipelines.kmeans.passes import Passes, hyperparameters
from assay.team import Team, current_team

say = sys.stdout.write


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

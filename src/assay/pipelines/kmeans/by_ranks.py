"""The steps of a fit of k-means by several ranks, each with centers of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from assay.io.shards import Shards
from assay.numerics.kmeans.by_centers import KMeansByCenters
from assay.parameters import KMeansParameters
from assay.pipelines.fitting import Fit
from assay.pipelines.kmeans.passes import Passes, hyperparameters
from assay.pipelines.stopping import fit_in_progress, stop_is_asked
from assay.pipelines.stream import pick_device
from assay.team import Team

_STATISTICS = "statistics."


def step_by_ranks(team: Team, kmeans: KMeansByCenters, passes: Passes, fit: Fit) -> None:
    """Make the steps of a seeded fit, or the rest of them, on all ranks. On rank 0, whose `fit`
    saves them.

    Raises:
        KeyboardInterrupt: a rank was asked to stop; the step that all agreed on is saved.
    """
    tensors, state = kmeans.checkpoint()
    request = {
        "shards": str(passes.shards.path),
        "threads": passes.shards.threads,
        "layer": passes.layer,
        "parameters": passes.parameters.model_dump(mode="json"),
        "seed": passes.seed,
        "device": passes.device.type,
        "state": state,
    }
    statistics = {f"{_STATISTICS}{name}": each for name, each in passes.statistics.items()}

    def lead() -> None:
        for metrics in kmeans.steps(
            lambda epoch: fit.watch(passes.batches_of_all(team, epoch, kmeans.steps_of_pass_))
        ):
            fit.step(metrics, agree=lambda asked, due: _agree(team, kmeans, asked, due))
        kmeans.gather()

    team.call(f"{__name__}:follow", request, tensors | statistics, lead=lead)


def follow(team: Team, request: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """What the other ranks do in `step_by_ranks`."""
    parameters = KMeansParameters.model_validate(request["parameters"])
    device, seed = pick_device(request["device"]), request["seed"]
    kmeans = KMeansByCenters(
        parameters.n_clusters, ranks=team, **hyperparameters(parameters, seed, device)
    )
    kmeans.resume(tensors, request["state"])
    passes = Passes(
        Shards(request["shards"], threads=request["threads"]),
        request["layer"],
        {
            name.removeprefix(_STATISTICS): each
            for name, each in tensors.items()
            if name.startswith(_STATISTICS)
        },
        parameters,
        seed,
        device,
    )
    with fit_in_progress():
        for _ in kmeans.steps(
            lambda epoch: passes.batches_of_all(team, epoch, kmeans.steps_of_pass_)
        ):
            asked, _ = _agree(team, kmeans, stop_is_asked(), due=False)
            if asked:
                raise KeyboardInterrupt
        kmeans.gather()


def _agree(team: Team, kmeans: KMeansByCenters, asked: bool, due: bool) -> tuple[bool, bool]:
    """Whether any rank is asked to stop, and whether rank 0 has to save; if so the centers are
    gathered.
    """
    flags = torch.cat(team.all_gather(torch.tensor([[asked, due]], dtype=torch.uint8)))
    asked, due = flags.amax(0).tolist()
    if asked or due:
        kmeans.gather()
    return bool(asked), bool(due)

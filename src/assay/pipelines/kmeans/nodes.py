"""Mini-batch k-means on standardized tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from assay.io.checkpoints import Checkpoints
from assay.io.shards import Shards
from assay.numerics.kmeans.by_centers import KMeansByCenters
from assay.numerics.kmeans.estimator import MiniBatchKMeans
from assay.parameters import KMeansParameters, result_values
from assay.pipelines.fitting import Fit
from assay.pipelines.kmeans.by_ranks import step_by_ranks
from assay.pipelines.kmeans.passes import Passes, hyperparameters
from assay.pipelines.signs_of_life import staged_bar
from assay.pipelines.stream import hold_layer, judged_tokens, pick_device
from assay.team import current_team


def fit_kmeans(
    shards: Shards,
    statistics: dict[str, Tensor],
    parameters: KMeansParameters,
    checkpoints: Checkpoints,
    device: str,
    *,
    layer: int,
    seed: int | None = None,
    method: str = "kmeans",
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Fit the centers in shuffled passes, or those of an order file; returns the model's state and
    a record of each step.

    A fit that was cut off is resumed from its last checkpoint. ``seed`` takes the place of the
    parameters'; the fits of different seeds have each a ``method`` of their own.
    """
    place = pick_device(device)
    seed = parameters.seed if seed is None else seed
    team = current_team()
    given = hyperparameters(parameters, seed, place)
    kmeans = (
        MiniBatchKMeans(parameters.n_clusters, **given)
        if team.size == 1
        else KMeansByCenters(parameters.n_clusters, ranks=team, **given)
    )
    fit = Fit(
        kmeans,
        checkpoints,
        parameters.checkpoint_steps,
        parameters.checkpoint_minutes,
        method=method,
        shards=shards,
        layer=layer,
        statistics=statistics,
        parameters=result_values(parameters) | {"seed": seed},
    )

    held = (
        hold_layer(
            shards,
            layer,
            parameters.batch_size,
            place,
            passes=parameters.max_iter,
            max_tokens=parameters.max_tokens,
        )
        if team.size == 1
        else None
    )
    passes = Passes(shards, layer, statistics, parameters, seed, place, held)
    fit.resume()
    with fit.in_progress():
        if not kmeans.is_seeded_:
            with staged_bar(f"layer {layer}: k-means") as tell:
                for tried, centers in kmeans.seedings(passes.batches(0)):
                    if centers > 0:
                        tell(
                            f"seeding {tried + 1} of {parameters.n_init}",
                            centers,
                            parameters.n_clusters,
                        )
                        fit.save_if_due()
                    elif tried < parameters.n_init:
                        fit.save()
            fit.save()
        if isinstance(kmeans, KMeansByCenters):
            step_by_ranks(team, kmeans, passes, fit)
        else:
            for metrics in kmeans.steps(
                lambda epoch: fit.watch(passes.batches(epoch, kmeans.steps_of_pass_))
            ):
                fit.step(metrics)
    return kmeans.state_dict(), kmeans.history_


def compare_seeds(
    shards: Shards,
    statistics: dict[str, Tensor],
    model: dict[str, Tensor],
    again: dict[str, Tensor],
    parameters: KMeansParameters,
    device: str,
    *,
    layer: int,
    seed: int,
) -> dict[str, Any]:
    """How far a fit with another ``seed`` agrees with the first on the validation tokens.

    Mean squared distance (inertia) of each, standardized space, and the adjusted Rand index of
    their clusterings.
    """
    from sklearn.metrics import adjusted_rand_score  # which takes a second to import

    place = pick_device(device)
    fits = [
        MiniBatchKMeans.from_state({name: tensor.to(place) for name, tensor in state.items()})
        for state in (model, again)
    ]
    labels: list[list[Tensor]] = [[], []]
    inertia = [0.0, 0.0]
    for x in judged_tokens(
        shards, layer, statistics, parameters.batch_size, place, doing="k-means, seeds compared"
    ):
        for i, kmeans in enumerate(fits):
            nearest, squared = kmeans.assign(x)
            labels[i].append(nearest.to(torch.int32).cpu())
            inertia[i] += float(squared.sum())
    first, other = (torch.cat(parts) for parts in labels)
    return {
        "layer": layer,
        "seed": seed,
        "inertia_first": inertia[0] / len(first),
        "inertia": inertia[1] / len(first),
        "adjusted_rand_index": float(adjusted_rand_score(first.numpy(), other.numpy())),
    }

"""Mini-batch k-means on standardised tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from assay.io.checkpoints import Checkpoints
from assay.io.shards import Shards
from assay.numerics.errors import sum_errors
from assay.numerics.kmeans import MiniBatchKMeans
from assay.parameters import KMeansParameters
from assay.pipelines.fitting import Fit
from assay.pipelines.stream import pick_device, standardized_tokens


def fit_kmeans(
    shards: Shards,
    statistics: dict[str, Tensor],
    parameters: KMeansParameters,
    checkpoints: Checkpoints,
    device: str,
    *,
    layer: int,
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Fit the centres in shuffled passes, or those of an order file; returns the model's state and a record of each step.

    A fit that was cut off is gone on with from its last checkpoint.
    """
    place = pick_device(device)
    kmeans = MiniBatchKMeans(
        parameters.n_clusters,
        seed=parameters.seed,
        device=place,
        n_init=parameters.n_init,
        init_size=parameters.init_size,
        max_iter=parameters.max_iter,
        tol=parameters.tol,
        max_no_improvement=parameters.max_no_improvement,
        reassignment_ratio=parameters.reassignment_ratio,
        decay=parameters.decay,
    )
    fit = Fit(
        kmeans,
        checkpoints,
        parameters.checkpoint_steps,
        method="kmeans",
        shards=shards,
        layer=layer,
        statistics=statistics,
        parameters=parameters.model_dump(mode="json", exclude={"encodings", "sparsity", "checkpoint_steps"}),
    )

    def one_pass(epoch: int, batches_seen: int) -> Iterator[Tensor]:
        return standardized_tokens(
            shards,
            layer,
            statistics,
            parameters.batch_size,
            place,
            doing=f"k-means, pass {epoch + 1}",
            start=batches_seen * parameters.batch_size,
            shuffle=parameters.order is None,
            order=parameters.order,
            seed=parameters.seed + epoch,
            max_tokens=parameters.max_tokens,
        )

    if fit.resume() == 0:
        kmeans.seed_from(one_pass(0, 0))
    fit.run(
        lambda: kmeans.go_on(
            lambda epoch: fit.watch(one_pass(epoch, kmeans.steps_of_pass_)),
            lambda metrics: fit.step(lambda _: dict(metrics)),
        )
    )
    return kmeans.state_dict(), kmeans.history_


def measure_kmeans(
    shards: Shards,
    statistics: dict[str, Tensor],
    model: dict[str, Tensor],
    parameters: KMeansParameters,
    device: str,
    *,
    layer: int,
) -> dict[str, Any]:
    """NMSE on the validation tokens, each token reconstructed as its nearest centre."""
    place = pick_device(device)
    kmeans = MiniBatchKMeans.from_state({name: tensor.to(place) for name, tensor in model.items()})
    std = statistics["std"]
    batches = standardized_tokens(shards, layer, statistics, parameters.batch_size, place, doing="k-means, NMSE")
    (sums,) = sum_errors(lambda x: kmeans.reconstruction_errors(x, std), batches).values()
    row = {"k": kmeans.n_clusters, "nmse": sums.nmse, "nmse_raw": sums.nmse_raw}
    return {"layer": layer, "method": "kmeans", "n_tokens": sums.n_tokens, "rows": [row]}

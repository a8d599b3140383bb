"""Random dictionaries, and what saev measured of its own."""

from __future__ import annotations

import math
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from assay.io.shards import Shards
from assay.numerics.moments import scale_of
from assay.parameters import DictionaryParameters, KMeansParameters
from assay.pipelines.stream import judged_tokens, pick_device, standardized_tokens

SAME_BASELINE = 0.01
"""How far saev's sum of squares about the mean, which it may add up in float32, can be from ours on
the same tokens.
"""


def adopt_saev_metrics(
    metrics: dict[str, float],
    codes: Any,
    shards: Shards,
    statistics: dict[str, Tensor],
    device: str,
    *,
    layer: int,
    name: str,
    dictionary: DictionaryParameters,
) -> dict[str, Any]:
    """What saev measured of its own run on the validation tokens, as a row of errors: there is no
    NMSE in the standardized space.

    saev divides its error by that of predicting the mean of the very tokens that are judged; here,
    as in every other row, it is divided by that of predicting the train mean.

    Raises:
        ValueError: the metrics are of other activations than the shards'.
    """
    about_train, about_own = sum_squares(
        shards, statistics, device, layer, name, dictionary.batch_size
    )
    if "sse_recon" in metrics:
        if not math.isclose(metrics["sse_baseline"], about_own, rel_tol=SAME_BASELINE):
            raise ValueError(
                f"dictionaries.{name}: metrics.json of {dictionary.saev_run} says sse_baseline"
                f" {metrics['sse_baseline']:.6g}, layer {layer} of {shards.path} has"
                f" {about_own:.6g}: name the run of this layer, and run saev's inference on these"
                " shards, with no scaling and no labels ignored"
            )
        error = metrics["sse_recon"]
    else:
        error = metrics["normalized_mse"] * about_own
    row = {"k": codes.n_features, "nmse": None, "nmse_raw": error / about_train}
    return {"layer": layer, "method": name, "n_tokens": shards.n_tokens, "rows": [row]}


def sum_squares(
    shards: Shards,
    statistics: dict[str, Tensor],
    device: str,
    layer: int,
    name: str,
    batch_size: int,
) -> tuple[float, float]:
    """Of a layer's tokens, in their own units: sum ||x - mu||^2 about the train mean, and
    about their own.
    """
    place = pick_device(device)
    variance = scale_of(statistics["std"].to(place)).square()
    total, shift, n = 0.0, torch.zeros_like(variance), 0
    for tokens in judged_tokens(
        shards, layer, statistics, batch_size, place, doing=f"{name}, NMSE"
    ):
        x = tokens.double()
        total += float(x.square().sum(0) @ variance)
        shift += x.sum(0)
        n += len(x)
    return total, total - float(shift.square() @ variance) / n


def draw_centers(
    shards: Shards,
    statistics: dict[str, Tensor],
    parameters: KMeansParameters,
    device: str,
    *,
    layer: int,
    seed: int,
) -> dict[str, Tensor]:
    """As many tokens of the fit shards as k-means has clusters, drawn at random: a k-means model
    that nothing was fitted to.
    """
    place = pick_device(device)
    n_clusters = parameters.n_clusters
    shuffled = standardized_tokens(
        shards,
        layer,
        statistics,
        n_clusters,
        place,
        doing="random centers",
        shuffle=True,
        seed=seed,
    )
    # The first batch of a shuffled pass, not a sample of that size: that would be of runs of
    # neighbors.
    with closing(shuffled) as tokens:
        centers = next(tokens).cpu()
    return {"cluster_centers": centers, "counts": torch.ones(len(centers), dtype=torch.int64)}


def draw_directions(shards: Shards, *, layer: int, seed: int) -> dict[str, Tensor]:
    """A random orthonormal basis of the space, uniform over all (QR of a Gaussian matrix), as a PCA
    model about 0.
    """
    del layer
    generator = torch.Generator().manual_seed(seed)
    d = shards.d_model
    basis, upper = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    components = (basis * upper.diagonal().sign()).T.contiguous()
    return {
        "mean": torch.zeros(d, dtype=torch.float64),
        "components": components,
        "explained_variance": torch.ones(d, dtype=torch.float64),
    }

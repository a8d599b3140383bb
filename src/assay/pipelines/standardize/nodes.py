"""Mean and standard deviation of each dimension over the fit tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from assay.io.checkpoints import Checkpoints
from assay.io.shards import Shards
from assay.numerics.moments import StreamingMoments
from assay.numerics.plausibility import check_statistics
from assay.parameters import StandardizeParameters
from assay.pipelines.one_pass import OnePass, fit_part
from assay.pipelines.parts import Part

logger = logging.getLogger(__name__)


def fit_statistics(
    shards: Shards,
    parameters: StandardizeParameters,
    checkpoints: Checkpoints,
    device: str,
    *,
    layer: int,
) -> dict[str, Tensor]:
    """Mean, std and count of a layer's content tokens, float64: (d_model,), (d_model,) and ().

    A pass that was cut off is resumed from its last checkpoint.
    """
    whole = OnePass("statistics", shards, layer, parameters, checkpoints, device, statistics={})
    moments = StreamingMoments()
    if parameters.parts == 1:
        whole.fit(moments)
    else:
        for _, part in whole.fit_in_parts(fit_statistics_part, StreamingMoments):
            moments.merge(part)
    constant = int((moments.std_ == 0).sum())
    if constant:
        logger.warning(
            "layer %d: %d of %d dimensions never vary in %d tokens; their standard deviation of 0"
            " counts as 1",
            *(layer, constant, shards.d_model, moments.count_),
        )
    return moments.state_dict()


def fit_statistics_part(
    part: Part, request: dict[str, Any], statistics: Mapping[str, Tensor]
) -> None:
    """Take the moments of a part of a layer's content tokens."""
    fit_part(part, request, statistics, StreamingMoments())


def adopt_statistics(
    shards: Shards, given: dict[str, Tensor], parameters: StandardizeParameters, *, layer: int
) -> dict[str, Tensor]:
    """The user's own mean and std, float64 (d_model,), once it is clear that they can belong to
    these tokens.

    Raises:
        ValueError: names missing, wrong shapes, or a first batch that they plainly do not
            standardize.
    """
    missing = sorted({"mean", "std"} - given.keys())
    if missing:
        raise ValueError(
            f"the given statistics hold {sorted(given)}; wanted `mean` and `std`, each (d_model,):"
            f" {missing[0]} is missing"
        )
    mean, std = given["mean"].double(), given["std"].double()
    check_statistics(
        next(shards.batches(layer=layer, batch_size=parameters.batch_size, shuffle=True)), mean, std
    )
    return {"mean": mean, "std": std}

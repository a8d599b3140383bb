"""Mean and standard deviation of each dimension over the fit tokens."""

from __future__ import annotations

import logging

from torch import Tensor

from assay.io.shards import Shards
from assay.numerics.moments import StreamingMoments, check_statistics
from assay.parameters import StandardizeParameters
from assay.pipelines.stream import pick_device, raw_tokens

logger = logging.getLogger(__name__)


def fit_statistics(
    shards: Shards, parameters: StandardizeParameters, device: str, *, layer: int
) -> dict[str, Tensor]:
    """Mean, std and count of a layer's content tokens, float64: (d_model,), (d_model,) and ()."""
    moments = StreamingMoments()
    for batch in raw_tokens(
        shards,
        layer,
        parameters.batch_size,
        pick_device(device),
        doing="statistics",
        shuffle=parameters.max_tokens
        is not None,  # the first examples of a data set are seldom like the rest
        max_tokens=parameters.max_tokens,
    ):
        moments.partial_fit(batch)
    constant = int((moments.std_ == 0).sum())
    if constant:
        logger.warning(
            "layer %d: %d of %d dimensions never vary in %d tokens; their standard deviation of 0"
            " counts as 1",
            *(layer, constant, shards.d_model, moments.count_),
        )
    return moments.state_dict()


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

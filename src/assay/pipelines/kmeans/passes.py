"""A fit of k-means: the estimator by its parameters, and its passes over the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assay.io.shards import Shards
from assay.parameters import KMeansParameters
from assay.pipelines.stream import standardized_tokens


def hyperparameters(
    parameters: KMeansParameters, seed: int, device: torch.device
) -> dict[str, Any]:
    """What `MiniBatchKMeans` takes by name, beside the number of clusters."""
    return {
        "seed": seed,
        "device": device,
        "n_init": parameters.n_init,
        "init_size": parameters.init_size,
        "max_iter": parameters.max_iter,
        "tol": parameters.tol,
        "max_no_improvement": parameters.max_no_improvement,
        "reassignment_ratio": parameters.reassignment_ratio,
        "decay": parameters.decay,
    }


@dataclass(frozen=True)
class Passes:
    """The passes of a fit over its tokens: shuffled by the seed, or in the order of a file."""

    shards: Shards
    layer: int
    statistics: dict[str, Tensor]
    parameters: KMeansParameters
    seed: int
    device: torch.device
    held: Tensor | None = None

    def batches(self, epoch: int, seen: int = 0) -> Iterator[Tensor]:
        """The batches of a pass after the first that were `seen`, float32 (batch_size, d)."""
        parameters = self.parameters
        return standardized_tokens(
            self.shards,
            self.layer,
            self.statistics,
            parameters.batch_size,
            self.device,
            doing=f"k-means, pass {epoch + 1} of {parameters.max_iter} at most",
            start=seen * parameters.batch_size,
            held=self.held,
            shuffle=parameters.order is None,
            order=parameters.order,
            seed=self.seed + epoch,
            max_tokens=parameters.max_tokens,
        )

"""A fit of k-means: the estimator by its parameters, and its passes over the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assay.io.shards import OrderOptions, Shards
from assay.numerics.moments import standardize
from assay.parameters import KMeansParameters
from assay.pipelines.signs_of_life import Bar
from assay.pipelines.stream import standardized_tokens
from assay.team import Team


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
        return standardized_tokens(
            self.shards,
            self.layer,
            self.statistics,
            self.parameters.batch_size,
            self.device,
            doing=self._doing(epoch),
            start=seen * self.parameters.batch_size,
            held=self.held,
            **self._order(epoch),
        )

    def batches_of_all(self, team: Team, epoch: int, seen: int = 0) -> Iterator[Tensor]:
        """As `batches`, on every rank of a team, each of which reads and standardizes its share of
        every window.
        """
        size = self.parameters.batch_size
        mean, std = (self.statistics[name].to(self.device) for name in ("mean", "std"))
        layer = self.shards.layer(self.layer)
        order = self._order(epoch)
        with (
            layer.batches(batch_size=size, **order) as whole,
            Bar(
                desc=f"layer {self.layer}: {self._doing(epoch)}",
                total=whole.n_tokens,
                unit=" tokens",
                initial=seen * size,
            ) as bar,
            closing(
                layer.share(
                    team.rank,
                    team.size,
                    batch_size=size,
                    start=seen * size,
                    device=self.device,
                    **order,
                )
            ) as shares,
        ):
            for share in shares:
                positions = team.all_gather(share.positions.to(self.device))
                tokens = team.all_gather(standardize(share.tokens, mean, std))
                window = tokens[0].new_empty(share.size, tokens[0].shape[1])
                for place, part in zip(positions, tokens, strict=True):
                    window[place] = part
                for batch in torch.split(window, size):
                    yield batch
                    bar.update(len(batch))

    def _doing(self, epoch: int) -> str:
        return f"k-means, pass {epoch + 1} of {self.parameters.max_iter} at most"

    def _order(self, epoch: int) -> OrderOptions:
        return {
            "shuffle": self.parameters.order is None,
            "order": self.parameters.order,
            "seed": self.seed + epoch,
            "max_tokens": self.parameters.max_tokens,
        }

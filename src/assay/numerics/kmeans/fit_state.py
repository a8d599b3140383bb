"""Where a fit of k-means stands beside its centers, and what a model shows of that."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from assay.numerics.fitted import NotFittedError
from assay.numerics.kmeans.progress import Progress
from assay.numerics.kmeans.seeding import Seeding, try_seedings


@dataclass
class FitState:
    """All that a fit needs to go on, except centers and counts.

    Attributes:
        generator: of every random draw.
        progress: the steps and passes made.
        seeding: the one under way; None before it starts and when it is done.
    """

    generator: torch.Generator
    progress: Progress = field(default_factory=Progress)
    seeding: Seeding | None = None

    @classmethod
    def begin(cls, seed: int, seeding: Seeding | None = None) -> Self:
        """A fit without steps."""
        return cls(torch.Generator().manual_seed(seed), seeding=seeding)

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The `generator`'s state uint8 (n,), `history` float64 (steps, 4), and the rest as JSON.

        During a seeding its own checkpoint takes the place of the history.
        """
        generator = {"generator": self.generator.get_state()}
        if self.seeding is not None:
            tensors, state = self.seeding.checkpoint()
            return generator | tensors, {"seeding": state}
        history, state = self.progress.checkpoint()
        return generator | {"history": history}, state

    def seed(
        self, tokens: Tensor, held_out: Tensor | None, n_clusters: int, n_init: int
    ) -> Generator[tuple[int, int], None, Tensor]:
        """Finish the seeding under way, as `try_seedings` does; gives the best centers."""
        seeding = self.seeding
        assert seeding is not None
        yield from try_seedings(tokens, held_out, n_clusters, n_init, self.generator, seeding)
        assert seeding.best is not None
        self.seeding = None
        return seeding.best

    @classmethod
    def resumed(
        cls,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        n_clusters: int,
        device: torch.device | str | None,
    ) -> Self:
        """From what `checkpoint` returned.

        Raises:
            ValueError: the checkpoint is of another number of clusters.
        """
        centers = tensors.get("cluster_centers")  # a seeding may have none yet
        if centers is not None and len(centers) != n_clusters:
            raise ValueError(f"found a checkpoint of {len(centers)} clusters, wanted {n_clusters}")
        generator = torch.Generator()
        generator.set_state(tensors["generator"])
        if "seeding" in state:
            return cls(generator, seeding=Seeding.resumed(tensors, state["seeding"], device))
        return cls(generator, Progress.resumed(tensors["history"], state))


class InProgress:
    """What a model shows of its fit."""

    _fit: FitState
    max_no_improvement: int | None

    @property
    def n_steps_(self) -> int:
        """Steps made."""
        return len(self._fit.progress.history)

    @property
    def history_(self) -> list[dict[str, float]]:
        """The metrics of each step."""
        return self._fit.progress.history

    @property
    def inertia_(self) -> float:
        """Mean squared distance of the last batch, before its step.

        Raises:
            NotFittedError: there was no step yet.
        """
        if not self.history_:
            raise NotFittedError(
                "found a k-means without steps, wanted one that has seen a batch: call fit or"
                " partial_fit first"
            )
        return self.history_[-1]["inertia"]

    @property
    def epoch_(self) -> int:
        """Passes made."""
        return self._fit.progress.epoch

    @property
    def steps_of_pass_(self) -> int:
        """Steps of the pass under way."""
        return self._fit.progress.steps_of_pass

    @property
    def is_done_(self) -> bool:
        """Whether the stopping rules say so."""
        progress = self._fit.progress
        return progress.rests or progress.stalled == self.max_no_improvement

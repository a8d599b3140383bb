"""How far a fit of k-means has come, and whether it is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

METRICS = ("inertia", "ewa_inertia", "learning_rate", "dead_clusters")
"""The metrics of a step in `history_`."""


@dataclass
class Progress:
    """The steps and passes of a fit so far.

    Attributes:
        tokens: seen in all.
        tokens_since_reassignment: seen since clusters were last moved to far tokens.
        pass_size: tokens of a pass; None until the first is over.
        epoch: passes made.
        steps_of_pass: steps of the pass under way.
        stalled: steps in a row without a new `least` smoothed inertia.
        least: the least smoothed inertia.
        at_rest: a step whose summed squared distance is at most this leaves the centers at rest.
        rests: whether the last step did.
        history: the metrics of each step.
    """

    tokens: int = 0
    tokens_since_reassignment: int = 0
    pass_size: int | None = None
    epoch: int = 0
    steps_of_pass: int = 0
    stalled: int = 0
    least: float = math.inf
    at_rest: float = 0.0
    rests: bool = False
    history: list[dict[str, float]] = field(default_factory=list)

    def record(self, n: int, inertia: float, rate: float, dead: float) -> None:
        """Record a step on n tokens.

        The smoothed inertia is scikit-learn's: an exponential average with weight 2 n / (tokens +
        1), at most 1, that leaves out the first step, whose inertia is the seeding's. `tokens` is
        the size of a pass. A stream does not say it in advance, so during the first pass it is the
        number seen so far.
        """
        self.tokens += n
        self.tokens_since_reassignment += n
        first = len(self.history) < 2
        weight = 1.0 if first else min(1.0, 2 * n / ((self.pass_size or self.tokens) + 1))
        smoothed = self.history[-1]["ewa_inertia"] * (1 - weight) if self.history else 0.0
        self.history.append(
            dict(zip(METRICS, (inertia, smoothed + inertia * weight, rate, dead), strict=True))
        )

    def judge(self, moved: float | None) -> None:
        """Update the stopping rules after a step. `moved`, the summed squared distance that the
        centers went, is None unless `tol` asks for it.

        No step of the first pass counts as one without improvement: its smoothed inertia is over
        too few tokens.
        """
        smoothed = self.history[-1]["ewa_inertia"]
        self.steps_of_pass += 1
        if moved is not None:
            self.rests = moved <= self.at_rest
        if self.epoch > 0:
            self.least, self.stalled = (
                (smoothed, 0) if smoothed < self.least else (self.least, self.stalled + 1)
            )

    def end_pass(self) -> None:
        """Record the end of a pass.

        Raises:
            ValueError: the pass was empty.
        """
        if self.steps_of_pass == 0:
            raise ValueError(
                f"found 0 tokens in pass {self.epoch}, wanted all: stream(epoch) must start a fresh"
                " pass"
            )
        self.pass_size = self.pass_size or self.tokens
        self.epoch += 1
        self.steps_of_pass = 0

    def checkpoint(self) -> tuple[Tensor, dict[str, Any]]:
        """The history, float64 (steps, 4), and the rest as JSON."""
        state = {
            each.name: getattr(self, each.name) for each in fields(self) if each.name != "history"
        }
        rows = [[metrics[name] for name in METRICS] for metrics in self.history]
        history = torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(-1, len(METRICS))
        return history, state | {"least": None if math.isinf(self.least) else self.least}

    @classmethod
    def resumed(cls, history: Tensor, state: Mapping[str, Any]) -> Self:
        """From what `checkpoint` returned."""
        rows = [dict(zip(METRICS, row, strict=True)) for row in history.tolist()]
        least = math.inf if state["least"] is None else state["least"]
        return cls(**{**state, "least": least}, history=rows)

"""What long fits share: they are watched step by step, saved every so many steps and minutes and on
a signal, and resumed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from assay.io.checkpoints import Checkpoints
from assay.io.shards import Shards
from assay.io.tensors import fingerprint_tensors
from assay.pipelines.parts import Part
from assay.pipelines.stopping import fit_in_progress, stop_is_asked

logger = logging.getLogger(__name__)

FORMAT = 3
"""Raised whenever a fit would go on otherwise than the one that saved the checkpoint."""

clock = time.monotonic
"""Seconds."""


class Estimator(Protocol):
    """What can be saved within a fit."""

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Where the fit stands: tensors, and JSON."""

    def resume(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Any:
        """Go on from what `checkpoint` gave."""


class Fit:
    """One fit of an estimator to a layer: its checkpoints, its clock, and who watches it.

    Args:
        estimator: that is fitted.
        checkpoints: the folder of the fit's checkpoints.
        every: steps from one checkpoint to the next.
        minutes: the most that pass from one checkpoint to the next step, or the next `save_if_due`,
            that is saved whatever its number.
        method: the name of the model that is fitted, as `kmeans-seed-3`.
        shards, layer, statistics: what it is fitted to.
        parameters: JSON; what changes the result.
        part: that it is of a fit in parts; it says in its last checkpoint that it is made, and that
            is kept until `collect`.
    """

    def __init__(
        self,
        estimator: Estimator,
        checkpoints: Checkpoints,
        every: int,
        minutes: float,
        *,
        method: str,
        shards: Shards,
        layer: int,
        statistics: dict[str, Tensor],
        parameters: dict[str, Any],
        part: Part | None = None,
    ) -> None:
        self._estimator = estimator
        self._checkpoints = checkpoints
        self._every = every
        self._seconds = 60 * minutes
        self._saved = clock()
        self._layer = layer
        self._method = method
        self._about = {
            "method": method,
            "format": FORMAT,
            "layer": layer,
            "d": shards.d_model,
            "shards": shards.identity(),
            "statistics": fingerprint_tensors(statistics),
            "parameters": parameters,
        }
        self._part = part if part is not None and part.of > 1 else None
        if self._part is not None:
            self._about |= self._part.about
        self._done = False
        self._step = 0
        self._tokens = 0
        self._waited = 0.0
        self._began = time.perf_counter()

    @property
    def steps(self) -> int:
        """Steps made, those before a break too."""
        return self._step

    @property
    def is_done(self) -> bool:
        """Whether it is a part, and made: nothing is left but to `collect` it."""
        return self._done

    def resume(self) -> int:
        """Take up the last checkpoint of this very fit; the steps that it has seen, 0 if there is
        none.
        """
        if self._load() and not self._done:
            done = f" after step {self._step}" if self._step else ""
            logger.info("layer %d, %s: resuming%s", self._layer, self._called, done)
        return self._step

    def collect(self) -> None:
        """Take up a part that is made; its checkpoints go when what it is merged into is saved and
        recorded.

        Raises:
            ValueError: it is not there.
        """
        self._load()
        if not self._done:
            raise ValueError(
                f"layer {self._layer}, {self._called}, has no whole last checkpoint in"
                f" {self._checkpoints.folder}, wanted what was just made: run it again"
            )
        self._checkpoints.finish(self._about)

    def _load(self) -> bool:
        found = self._checkpoints.load(self._about)
        if found is None:
            return False
        self._estimator.resume(found.tensors, found.state["estimator"])
        self._step = int(found.state["step"])
        self._done = bool(found.state.get("done", False))
        return True

    @property
    def _called(self) -> str:
        if self._part is None:
            return self._method
        return f"{self._method}, part {self._part.number + 1} of {self._part.of}"

    def watch(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The batches, with an eye on how long they let the fit wait."""
        iterator = iter(batches)
        # Whatever came before was no step.
        self._tokens, self._waited, self._began = 0, 0.0, time.perf_counter()
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            self._tokens += len(batch)
            yield batch

    def step(
        self,
        metrics: Mapping[str, float],
        more: Callable[[int], Mapping[str, float]] | None = None,
        agree: Callable[[bool, bool], tuple[bool, bool]] | None = None,
    ) -> None:
        """Note a step with its `metrics`; `more`, called with its number, takes a while, and is
        left for later where the fit has to stop.

        Where several processes make the step, `agree` makes of whether this one is asked to stop,
        and has to save, what they all do.

        Raises:
            KeyboardInterrupt: the run is asked to stop; the step is saved.
        """
        self._step += 1
        asked, due = stop_is_asked(), self._step % self._every == 0 or self._is_due()
        if agree is not None:
            asked, due = agree(asked, due)
        # First of all: whoever asks does not wait for long.
        if asked or due:
            self.save()
        found = {**metrics, **(more(self._step) if more is not None and not asked else {})}
        now = time.perf_counter()
        found |= {
            "tokens_per_second": self._tokens / max(now - self._began, 1e-9),
            "data_wait": self._waited / max(now - self._began, 1e-9),
        }
        self._tokens, self._waited, self._began = 0, 0.0, now
        for observer in self._checkpoints.observers:
            observer(self._layer, self._method, self._step, found)
        if asked:
            raise KeyboardInterrupt

    def save_if_due(self) -> None:
        """Save where it is time to, and stop where that is asked for: between two pieces of work
        that are not yet a step.

        Raises:
            KeyboardInterrupt: the run is asked to stop; what there is is saved.
        """
        asked = stop_is_asked()
        if asked or self._is_due():
            self.save()
        if asked:
            raise KeyboardInterrupt

    def save(self) -> None:
        """Save where the estimator stands."""
        tensors, state = self._estimator.checkpoint()
        about: dict[str, Any] = {"step": self._step, "estimator": state}
        if self._done:
            about["done"] = True
        self._checkpoints.save(self._about, self._step, tensors, about)
        self._saved = clock()

    def _is_due(self) -> bool:
        return clock() - self._saved >= self._seconds

    @contextmanager
    def in_progress(self) -> Iterator[None]:
        """The block in which the fit is made, with `step` after every step, and `save_if_due` in
        between.

        Its checkpoints are kept until what it made is saved and recorded: a save that fails does
        not cost the fit.

        Raises:
            KeyboardInterrupt: the run is asked to stop.
        """
        with fit_in_progress():
            yield
            self._done = self._part is not None
            asked = stop_is_asked()  # since the last step: nobody else would
            if self._done or asked:
                self.save()
            if asked:
                raise KeyboardInterrupt
        if not self._done:
            self._checkpoints.finish(self._about)

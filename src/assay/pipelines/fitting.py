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
from assay.parameters import KMeansParameters, PCAParameters, changing_no_result
from assay.pipelines.stopping import fit_in_progress, stop_is_asked

logger = logging.getLogger(__name__)

FORMAT = 3
"""Raised whenever a fit would go on otherwise than the one that saved the checkpoint."""

CHANGING_NO_RESULT = {
    "kmeans": changing_no_result(KMeansParameters),
    "pca": changing_no_result(PCAParameters),
}
"""Parameters of a method that do not change its fit; its seed is bound to its node."""

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
        self._step = 0
        self._tokens = 0
        self._waited = 0.0
        self._began = time.perf_counter()

    @property
    def steps(self) -> int:
        """Steps made, those before a break too."""
        return self._step

    def resume(self) -> int:
        """Take up the last checkpoint of this very fit; the steps that it has seen, 0 if there is
        none.
        """
        found = self._checkpoints.load(self._about)
        if found is not None:
            self._estimator.resume(found.tensors, found.state["estimator"])
            self._step = int(found.state["step"])
            done = f"after step {self._step}" if self._step else "its seeding"
            logger.info("layer %d, %s: resuming %s", self._layer, self._method, done)
        return self._step

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
        self, metrics: Mapping[str, float], more: Callable[[int], Mapping[str, float]] | None = None
    ) -> None:
        """Note a step with its `metrics`; `more`, called with its number, takes a while, and is
        left for later where the fit has to stop.

        Raises:
            KeyboardInterrupt: the run is asked to stop; the step is saved.
        """
        self._step += 1
        asked = stop_is_asked()
        # First of all: whoever asks does not wait for long.
        if asked or self._step % self._every == 0 or self._is_due():
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
        self._checkpoints.save(
            self._about, self._step, tensors, {"step": self._step, "estimator": state}
        )
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
            if stop_is_asked():  # since the last step: nobody else would ask
                self.save()
                raise KeyboardInterrupt
        self._checkpoints.finish(self._about)

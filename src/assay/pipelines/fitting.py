"""What the long fits share: they are watched step by step, saved every so many steps and on SIGTERM, and gone on with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor

from assay.io.checkpoints import Checkpoints
from assay.io.shards import Shards
from assay.io.tensors import fingerprint_tensors
from assay.pipelines.stopping import fit_in_progress, stop_is_asked

FORMAT = 1
"""Raised whenever a fit would go on otherwise than the one that saved the checkpoint."""

Observer = Callable[[int, str, int, dict[str, float]], None]
"""Called with layer, method, step and metrics."""

observers: list[Observer] = []
"""Who wants to know of the steps of a fit: MLflow's hook."""


class Estimator(Protocol):
    """What can be saved within a fit."""

    def checkpoint(self) -> dict[str, Tensor]: ...
    def resume(self, checkpoint: Mapping[str, Tensor]) -> Any: ...


class Fit:
    """One fit of an estimator to a layer: its checkpoints, its clock, and who watches it.

    Args:
        estimator: that is fitted.
        checkpoints: the folder of the fit's checkpoints.
        every: steps from one checkpoint to the next.
        method: `kmeans` or `pca`.
        shards, layer, statistics: what it is fitted to.
        parameters: JSON; what changes the result.
    """

    def __init__(
        self,
        estimator: Estimator,
        checkpoints: Checkpoints,
        every: int,
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
        self._layer = layer
        self._method = method
        self._about = {
            "method": method,
            "format": FORMAT,
            "layer": layer,
            "d": shards.d_model,
            "shards": f"{shards.name} {shards.fingerprint()}",
            "statistics": fingerprint_tensors(statistics),
            "parameters": parameters,
        }
        self._step = 0
        self._tokens = 0
        self._waited = 0.0
        self._began = time.perf_counter()

    def resume(self) -> int:
        """Take up the last checkpoint of this very fit; the steps that it has seen, 0 if there is none."""
        found = self._checkpoints.load(self._about)
        if found is not None:
            self._estimator.resume(found.tensors)
            self._step = int(found.state["step"])
        return self._step

    def watch(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The batches, with an eye on how long they let the fit wait."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            self._tokens += len(batch)
            yield batch

    def step(self, metrics: Callable[[bool], dict[str, float]]) -> None:
        """Note a step; `metrics` gives what is known of it, and is told whether it is saved.

        Raises:
            KeyboardInterrupt: SIGTERM has come; the step is saved.
        """
        self._step += 1
        asked = stop_is_asked()
        saved = asked or self._step % self._every == 0
        found = metrics(saved)
        if saved:
            self._save()
        now = time.perf_counter()
        found |= {
            "tokens_per_second": self._tokens / max(now - self._began, 1e-9),
            "data_wait": self._waited / max(now - self._began, 1e-9),
        }
        self._tokens, self._waited, self._began = 0, 0.0, now
        for observer in observers:
            observer(self._layer, self._method, self._step, found)
        if asked:
            raise KeyboardInterrupt

    def run(self, work: Callable[[], object]) -> None:
        """Do the fit's `work`, which calls `step` after every step; then its checkpoints are of no more use."""
        with fit_in_progress():
            work()
            if stop_is_asked():  # since the last step: nobody else would look
                self._save()
                raise KeyboardInterrupt
        self._checkpoints.clear(self._about)

    def _save(self) -> None:
        self._checkpoints.save(self._about, self._step, self._estimator.checkpoint(), {"step": self._step})

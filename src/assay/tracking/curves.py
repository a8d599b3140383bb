"""The curves of one run: a fit's steps while it runs, the table's metrics over the layers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from assay.encodings import Encoding, child_name
from assay.pipelines.report.tables import MEASURES
from assay.tracking.children import known_metrics
from assay.tracking.connection import Connection

BATCH = 1000  # MLflow takes so many metrics in one request
LIVE_SECONDS = 5.0  # between two batches of a fit's steps
# between two steps that are shown live: a database takes a quarter of a millisecond for each number
STEP_SECONDS = 0.5


class Curves:
    """What the parent is told of, gathered here and written now and then, beside the work."""

    def __init__(self, connection: Connection) -> None:
        self._writer = connection.writer
        self._parent = connection.parent
        self._client = MlflowClient()
        self._lock = threading.Lock()
        self._curves: list[Metric] = []
        self._steps: list[Metric] = []
        self._shown: dict[tuple[int, str], float] = {}
        self._held: dict[tuple[int, str], list[Metric]] = {}
        self._sent = time.time()

    def watch_step(self, layer: int, method: str, step: int, metrics: Mapping[str, float]) -> None:
        """Take a step of a fit for the parent's live curves, two a second at the most; they are
        sent now and then, beside the fit.
        """
        now = time.time()
        found = [
            Metric(f"{child_name(layer, method)}/{name}", value, int(now * 1000), step)
            for name, value in metrics.items()
        ]
        with self._lock:
            if now - self._shown.get((layer, method), 0.0) < STEP_SECONDS:
                self._held[layer, method] = found  # the last that there is, should no other come
                return
            self._shown[layer, method] = now
            self._held.pop((layer, method), None)
            self._steps += found
            if now - self._sent < LIVE_SECONDS and len(self._steps) < BATCH - 20:
                return
        self.send_steps()

    def send_steps(self) -> None:
        """Have what steps there are written, the last one of each fit among them."""
        with self._lock:
            steps = [*self._steps, *(metric for held in self._held.values() for metric in held)]
            self._steps, self._held, self._sent = [], {}, time.time()
        self._log_to_parent("the live curves", steps)

    def _add_to_curves(self, layer: int, row: Encoding, values: Mapping[str, Any]) -> None:
        """Note the table's metrics for the parent, under the encoding's name with step = layer: a
        curve over layers.
        """
        now = int(time.time() * 1000)
        found = {name: value for name, value in known_metrics(values).items() if name in MEASURES}
        with self._lock:
            self._curves += [
                Metric(f"{row.name}/{name}", value, now, layer) for name, value in found.items()
            ]

    def _write_curves(self) -> None:
        with self._lock:
            curves, self._curves = self._curves, []
        self._log_to_parent("the curves over layers", curves)

    def _log_to_parent(self, what: str, metrics: list[Metric]) -> None:
        if self._parent is not None:
            for start in range(0, len(metrics), BATCH):
                part = metrics[start : start + BATCH]
                self._submit(what, self._client.log_batch, self._parent.run_id, metrics=part)

    def _submit(
        self, what: str, request: Callable[..., Any], *arguments: Any, **options: Any
    ) -> None:
        if self._parent is not None:
            self._writer.submit(what, request, *arguments, **options)

"""The children of one run in MLflow: an encoding of a layer each."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from mlflow.entities import Metric

from assay.encodings import Encoding, child_name
from assay.pipelines.report.tables import MEASURES

DETAILS = (
    "mean_train_ce",
    "mean_val_ce",
    "mean_feature_ce",
    "median_feature_ce",
    "mean_margin",
    "negative_weights",
    "f1",
    "purity_at_64",
    "purity_at_256",
    "max_abs_activation",
    "refined_pairs",
    "certificate_ce",
    "certificate_gradient",
    "certificate_val_ce",
)
"""What else is known of an encoding: the child's alone."""


class Child:
    """What one run of MLflow is to say of an encoding of a layer: gathered here, and written now
    and then.
    """

    def __init__(self, layer: int, row: Encoding, k: int) -> None:
        self.layer = layer
        self.row = row
        self.k = k
        self.name = child_name(layer, row.name)
        self.run_id = ""
        self.begun = False
        self.closed = False
        self.ended = False
        self.known: dict[str, float] = {}
        self.had: Mapping[str, float] = {}
        self._metrics: list[Metric] = []

    def add(self, values: Mapping[str, float], step: int = 0) -> None:
        """Add metrics of a step."""
        now = int(time.time() * 1000)
        self._metrics += [Metric(name, value, now, step) for name, value in values.items()]
        self.known.update(values)

    def take(self) -> list[Metric]:
        """What has been added since it was last asked for."""
        taken, self._metrics = self._metrics, []
        return taken


def thinned(n: int, most: int) -> list[int]:
    """At most so many of n places, evenly, with the first and the last."""
    if n <= most:
        return list(range(n))
    return sorted({round(place * (n - 1) / (most - 1)) for place in range(most)})


def known_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Those of the metrics that there are."""
    return {
        name: float(values[name]) for name in MEASURES + DETAILS if values.get(name) is not None
    }


def unlogged(metrics: list[Metric], had: Mapping[str, float]) -> list[Metric]:
    """Of the metrics of a child that is taken up those that do not end as the ones that it has."""
    last = {each.key: each.value for each in sorted(metrics, key=lambda each: each.step)}
    return [each for each in metrics if had.get(each.key) != last[each.key]]


def errors_of(errors: Mapping[str, Any], k: int | None) -> Mapping[str, Any]:
    """The row of this k. All dictionaries except PCA have one row, whose k may differ where
    `--load-versions` asked for an older result.
    """
    found = {row["k"]: row for row in errors["rows"]}
    return found[k] if k in found else next(iter(found.values()))


def agreement_metrics(agreement: Mapping[str, Any]) -> dict[str, float]:
    """What a child is told of a seed's agreement with the first."""
    return {
        "validation_inertia": agreement["inertia"],
        "adjusted_rand_index": agreement["adjusted_rand_index"],
    }

"""The table."""

from __future__ import annotations

from typing import Any

import pandas as pd

COLUMNS = (
    "layer",
    "method",
    "encoding",
    "k",
    "nmse",
    "nmse_raw",
    "l0",
    "probe_r",
    "map",
    "purity_at_16",
    "coverage_at_0.3",
    "best_layer",
)


def merge_layer(*metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The table's rows of one layer: the scores of each encoding, joined with the errors of its method and k."""
    errors = {
        (part["method"], row["k"]): {"nmse": row["nmse"], "nmse_raw": row["nmse_raw"]}
        for part in metrics
        if "rows" in part
        for row in part["rows"]
    }
    return [part | errors[part["method"], part["k"]] for part in metrics if "rows" not in part]


def tabulate_baselines(*layers: list[dict[str, Any]]) -> pd.DataFrame:
    """One row for each (layer, method, encoding, k), by layer, method, k and encoding.

    ``best_layer`` is true in the row whose layer has the lowest mean train CE of the classes' best features, among the
    rows of its (method, encoding, k); ties go to the lower layer.
    """
    table = pd.DataFrame([row for layer in layers for row in layer])
    table = table.sort_values(["layer", "method", "k", "encoding"], ignore_index=True)
    best = table.groupby(["method", "encoding", "k"])["mean_train_ce"].idxmin()
    table["best_layer"] = table.index.isin(best)
    return table[list(COLUMNS)]

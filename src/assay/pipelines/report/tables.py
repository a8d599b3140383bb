"""Views of the table: for a paper, for each class, and at equal L0."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

PAPER = ("method", "encoding", "k", "layer", "nmse", "l0", "probe_r", "map", "purity_at_16", "coverage_at_0.3")

TITLES = {
    "method": "Method",
    "encoding": "Encoding",
    "k": "k",
    "layer": "Layer",
    "nmse": "NMSE",
    "nmse_raw": "NMSE raw",
    "l0": "L0",
    "probe_r": "Probe R",
    "map": "mAP",
    "purity_at_16": "Purity@16",
    "coverage_at_0.3": "Coverage@0.3",
    "best_layer": "Best layer",
}

COUNTS = ("k", "layer", "label", "n_train", "n_val", "feature", "feature_by_val")
"""Whole numbers, also where a missing one has made floats of them."""

CLASSES = (
    "layer",
    "encoding",
    "label",
    "n_train",
    "n_val",
    "feature",
    "train_ce",
    "margin",
    "val_ce",
    "base_ce",
    "average_precision",
    "precision",
    "recall",
    "f1",
    "purity_at_16",
    "feature_by_val",
    "val_ce_by_val",
    "average_precision_by_val",
)


def tabulate_paper(baselines: pd.DataFrame) -> pd.DataFrame:
    """One row a (method, encoding, k), at the layer that is best by train CE, k-means and PCA first."""
    best = baselines[baselines["best_layer"]]
    order = best["method"].map(lambda method: {"kmeans": 0, "pca": 1}.get(method, 2))
    return best.assign(order=order).sort_values(["order", "method", "k", "encoding"], ignore_index=True)[list(PAPER)]


def tabulate_classes(*layers: list[dict[str, Any]]) -> pd.DataFrame:
    """One row for each (layer, encoding, class): its best features by train and by validation CE. CE in nats.

    A class that is absent from a split has a row of its own, with nothing but its label and ``absent_in``.
    """
    found = []
    for row in (row for layer in layers for row in layer):
        about = {"layer": row["layer"], "encoding": row["encoding"]}
        found += [about | {name: each.get(name) for name in CLASSES[2:]} | {"absent_in": ""} for each in row["classes"]]
        in_train, in_val = set(row["absent_in_train"]), set(row["absent_in_val"])
        for label in sorted(in_train | in_val):
            where = [name for name, labels in (("train", in_train), ("val", in_val)) if label in labels]
            found.append(about | {"label": label, "absent_in": " and ".join(where)})
    return pd.DataFrame(found).sort_values(["layer", "encoding", "label"], ignore_index=True)


def match_budgets(baselines: pd.DataFrame) -> pd.DataFrame:
    """Each row that is not PCA's beside the PCA row of its layer whose L0 is nearest to its own, by ratio."""
    pca = baselines[baselines["method"] == "pca"]
    shown = ["encoding", "l0", "nmse", "probe_r", "map"]
    found = []
    for row in baselines[baselines["method"] != "pca"].to_dict("records"):
        peers = pca[pca["layer"] == row["layer"]]
        if len(peers) and row["l0"] > 0:
            nearest = peers.iloc[int(np.abs(np.log(peers["l0"].to_numpy() / row["l0"])).argmin())]
            found.append(
                {"layer": row["layer"]}
                | {name: row[name] for name in shown}
                | {f"pca_{name}": nearest[name] for name in shown}
            )
    return pd.DataFrame(found, columns=["layer", *shown, *(f"pca_{name}" for name in shown)])


def to_markdown(table: pd.DataFrame) -> str:
    """A pipe table, three decimals."""
    lines = [[TITLES.get(name, name) for name in table.columns], ["---"] * len(table.columns)]
    lines += _shown(table).to_numpy().tolist()
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_latex(table: pd.DataFrame) -> str:
    """A tabular with booktabs' rules, three decimals."""
    shown = _shown(table).rename(columns=TITLES)
    styled = shown.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis="columns")
    columns = "".join("l" if name in ("method", "encoding") else "r" for name in table.columns)
    return str(styled.to_latex(hrules=True, column_format=columns))


def format_cell(value: Any, column: str) -> str:
    """A number as a table shows it: counts whole, L0 to four digits, three decimals, or one digit where those would be 0."""
    if value is None or value != value:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "*" if value else ""
    if not isinstance(value, float):
        return str(value)
    if column.endswith("l0"):
        return f"{value:.4g}"
    if column in COUNTS:
        return f"{value:.0f}"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.0e}"


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """Every cell as text."""
    return pd.DataFrame({name: [format_cell(value, name) for value in table[name]] for name in table.columns})

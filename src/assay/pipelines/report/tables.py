"""Views of the table: for a paper, for each class, at the nearest L0, and what reconstructs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from assay.encodings import KINDS, Encoding, Form, Model

MEASURES = ("nmse", "nmse_raw", "l0", "probe_r", "map", "purity_at_16", "coverage_at_0.3")
"""What a row of the table measures."""

IN_PAPER = tuple(name for name in MEASURES if name != "nmse_raw")

PAPER = (
    *("method", "encoding", "k", "layer", "seeds"),
    *IN_PAPER,
    *(f"{name}_sd" for name in IN_PAPER),
    *("nmse_raw", "nmse_raw_sd"),
)

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
    "seed": "Seed",
    "seeds": "Seeds",
    "label": "Class",
    "class_name": "Name",
    "n_train": "Patches, train",
    "n_val": "Patches, val",
    "feature": "Feature",
    "train_ce": "CE, train",
    "val_ce": "CE, val",
    "base_ce": "CE of the intercept",
    "mean_feature_ce": "Mean CE of all features",
    "median_feature_ce": "Median CE of all features",
    "margin": "Margin",
    "average_precision": "AP",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "purity_at_64": "Purity@64",
    "purity_at_256": "Purity@256",
    "feature_by_val": "Feature by val CE",
    "val_ce_by_val": "CE of that",
    "average_precision_by_val": "AP of that",
    "absent_in": "Absent in",
    "l0_ratio": "L0 / PCA L0",
    "inertia_first": "Inertia, first seed",
    "inertia": "Inertia",
    "adjusted_rand_index": "Adjusted Rand index",
}

COUNTS = ("k", "layer", "seed", "seeds", "label", "n_train", "n_val", "feature", "feature_by_val")
"""Whole numbers, also where a missing one has made floats of them."""

CLASSES = (
    "layer",
    "encoding",
    "seed",
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
    "purity_at_64",
    "purity_at_256",
    "feature_by_val",
    "val_ce_by_val",
    "average_precision_by_val",
    "absent_in",
    "mean_feature_ce",
    "median_feature_ce",
)


def pool_seeds(baselines: pd.DataFrame) -> pd.DataFrame:
    """One row per (layer, method, encoding, k), in the order of the table: ``seeds``, how many; the
    mean of each measure over them; and under its name with ``_sd`` the sample standard deviation,
    missing where there is one seed.
    """
    groups = baselines.groupby(["layer", "method", "encoding", "k", "best_layer"], sort=False)
    mean, spread = (
        groups[list(MEASURES)].mean(),
        groups[list(MEASURES)].std(ddof=1).add_suffix("_sd"),
    )
    return groups.size().rename("seeds").to_frame().join(mean).join(spread).reset_index()


def tabulate_paper(baselines: pd.DataFrame) -> pd.DataFrame:
    """One row per (method, encoding, k), at the layer that is best by train CE, k-means and PCA
    first: means over the seeds.
    """
    pooled = pool_seeds(baselines)
    best = pooled[pooled["best_layer"]]
    own = [*KINDS]
    order = best["method"].map(lambda method: own.index(method) if method in own else len(own))
    return best.assign(order=order).sort_values(
        ["order", "method", "k", "encoding"], ignore_index=True
    )[list(PAPER)]


def tabulate_classes(*layers: list[dict[str, Any]]) -> pd.DataFrame:
    """One row for each (layer, encoding, seed, class): its best features by train and by validation
    CE. CE in nats.

    A class that is absent from a split has a row of its own, with nothing but its label and
    ``absent_in``.
    """
    found = []
    for row in (row for layer in layers for row in layer):
        about = {name: row[name] for name in CLASSES[:3]}
        found += [about | {"absent_in": ""} | each for each in row["classes"]]
        in_train, in_val = set(row["absent_in_train"]), set(row["absent_in_val"])
        for label in sorted(in_train | in_val):
            where = [
                name for name, labels in (("train", in_train), ("val", in_val)) if label in labels
            ]
            found.append(about | {"label": label, "absent_in": " and ".join(where)})
    table = pd.DataFrame(found, columns=[*CLASSES]).sort_values(
        ["layer", "encoding", "seed", "label"], ignore_index=True
    )
    return table.assign(
        **{
            name: pd.to_numeric(table[name]).astype("Int64")
            for name in COUNTS
            if name in table.columns
        }
    )


def name_classes(classes: pd.DataFrame, names: dict[int, str]) -> pd.DataFrame:
    """The table of classes with a last column ``class_name``, from their labels.

    A label without a name is called by its number, and 0 is void.
    """
    names = {0: "void"} | names
    return classes.assign(
        class_name=[names.get(label, str(label)) for label in classes["label"].astype(int)]
    )


def list_reconstructions(pooled: pd.DataFrame) -> pd.DataFrame:
    """The rows of pooled seeds that have an NMSE, at the L0 of what reconstructs.

    The encodings of the same centers have one NMSE, that of the nearest center, and are one row of
    that name and of one entry per patch, however dense the codes that are probed.
    """
    rows = pooled.dropna(subset=["nmse"])
    by_center = _are(rows, lambda form: form.is_by_center)
    rows = rows.assign(
        l0=rows["l0"].mask(by_center, 1.0),
        encoding=rows["encoding"].mask(by_center, rows["method"] + ", nearest center"),
    )
    return rows.drop_duplicates(["layer", "method", "encoding", "k"], ignore_index=True)


def _are(rows: pd.DataFrame, said: Callable[[Form], bool]) -> pd.Series[bool]:
    """Which rows have a form of ours of which something is said."""
    forms = (
        Encoding.parse(encoding, Model(method)).form
        for encoding, method in zip(rows["encoding"], rows["method"], strict=True)
    )
    return pd.Series([form is not None and said(form) for form in forms], rows.index, dtype=bool)


def match_budgets(baselines: pd.DataFrame) -> pd.DataFrame:
    """Each row that is not PCA's beside the PCA row of its layer whose L0 is nearest to its own, by
    ratio; means over the seeds.

    ``l0_ratio`` says how near that is. Distances to all centers reconstruct nothing, so they have
    no NMSE here.
    """
    baselines = pool_seeds(baselines)
    distances = _are(baselines, lambda form: form.is_by_center and form.kind != "onehot")
    baselines = baselines.assign(
        **{name: baselines[name].mask(distances) for name in ("nmse", "nmse_raw")}
    )
    is_pca = baselines["method"].map(lambda method: Model(method).family == "pca").astype(bool)
    pca = baselines[is_pca]
    shown, last = ["encoding", "l0", "nmse", "probe_r", "map"], ["nmse_raw"]
    found = []
    for row in baselines[~is_pca].to_dict("records"):
        peers = pca[pca["layer"] == row["layer"]]
        if len(peers) and row["l0"] > 0:
            nearest = peers.iloc[int(np.abs(np.log(peers["l0"].to_numpy() / row["l0"])).argmin())]
            both = [
                {f"{whose}{name}": of[name] for name in shown + last}
                for whose, of in (("", row), ("pca_", nearest))
            ]
            found.append(
                {"layer": row["layer"], "l0_ratio": row["l0"] / nearest["l0"]} | both[0] | both[1]
            )
    columns = [
        f"{whose}{name}" for names in (shown, last) for whose in ("", "pca_") for name in names
    ]
    return pd.DataFrame(found, columns=["layer", *columns, "l0_ratio"])


def to_markdown(paper: pd.DataFrame) -> str:
    """The table for a paper as a pipe table, three decimals."""
    shown = show_paper(paper)
    lines = [[title_of(name) for name in shown.columns], ["---"] * len(shown.columns)]
    lines += shown.to_numpy().tolist()
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_latex(paper: pd.DataFrame) -> str:
    """The table for a paper as a tabular with booktabs' rules, three decimals."""
    shown = show_paper(paper)
    columns = "".join("l" if name in ("method", "encoding") else "r" for name in shown.columns)
    titled = shown.rename(columns=TITLES)
    styled = (
        titled.style.hide(axis="index").format(_escape).format_index(escape="latex", axis="columns")
    )
    return str(styled.to_latex(hrules=True, column_format=columns))


def title_of(column: str) -> str:
    """A column's heading."""
    if column.startswith("pca_"):
        return f"PCA {title_of(column.removeprefix('pca_'))}"
    return TITLES.get(column, column.replace("_", " "))


def format_cell(value: Any, column: str, *, narrow: bool = False) -> str:
    """A number as a table shows it: counts whole, L0 to four digits or whole, three decimals, or
    one digit where those would be 0.

    Where room is ``narrow``, as in a terminal, L0 has three digits, a whole number no decimals, and
    what is missing a hyphen, which any terminal's font has.
    """
    if value is None or pd.isna(value):
        return "-" if narrow else "–"
    if isinstance(value, bool | np.bool_):
        return "*" if value else ""
    if not isinstance(value, float):
        return str(value)
    if column in COUNTS or (narrow and value.is_integer()):
        return f"{value:.0f}"
    if column.endswith("l0"):
        digits = 3 if narrow else 4
        return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.0e}"


def show(table: pd.DataFrame) -> pd.DataFrame:
    """Every cell as text."""
    return pd.DataFrame(
        {name: [format_cell(value, name) for value in table[name]] for name in table.columns}
    )


def show_paper(paper: pd.DataFrame) -> pd.DataFrame:
    """Every cell of the table for a paper as text; a measure over several seeds as mean ± standard
    deviation.

    Where there is one seed everywhere, their number is left out; raw NMSE is there where a row has
    no other.
    """
    names = [name for name in PAPER if not name.endswith("_sd")]
    names.remove("nmse_raw")
    if paper["nmse"].isna().any():
        names.insert(names.index("nmse") + 1, "nmse_raw")
    if not (paper["seeds"] > 1).any():
        names.remove("seeds")
    shown = show(paper[names])
    for name in (name for name in MEASURES if name in names):
        spread = paper[f"{name}_sd"]
        texts = [
            f" ± {format_cell(sd, name)}" if known else ""
            for sd, known in zip(spread, spread.notna(), strict=True)
        ]
        shown[name] = [mean + text for mean, text in zip(shown[name], texts, strict=True)]
    return shown


def _escape(text: Any) -> str:
    """A cell for LaTeX."""
    for plain, escaped in (("_", r"\_"), ("±", r"$\pm$"), ("–", "--")):
        text = str(text).replace(plain, escaped)
    return str(text)

"""The table, its views, the pictures and the page."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from torch import Tensor

from assay.io.shards import Shards
from assay.pipelines.report import figures
from assay.pipelines.report.page import render_page
from assay.pipelines.report.tables import match_budgets, tabulate_classes, tabulate_paper, to_latex, to_markdown

FIGURES = ("nmse_against_l0", "layers", "prevalence", "spectrum", "clusters", "convergence")
"""The pictures' names, in the order of the page."""

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


def summarise_fits(
    pca: dict[str, Tensor], kmeans: dict[str, Tensor], history: list[dict[str, float]], *, layer: int
) -> dict[str, Any]:
    """What the pictures show of a layer's fits: PCA's spectrum, tokens a cluster by falling number, inertia by step."""
    return {
        "layer": layer,
        "spectrum": pca["explained_variance"].tolist(),
        "cluster_counts": sorted(kmeans["counts"].tolist(), reverse=True),
        "inertia": [step["ewa_inertia"] for step in history],
    }


def make_views(
    baselines: pd.DataFrame, *layers: list[dict[str, Any]]
) -> tuple[pd.DataFrame, str, str, pd.DataFrame, pd.DataFrame]:
    """The table for a paper, as numbers, Markdown and LaTeX; rows at equal L0; and the classes."""
    paper = tabulate_paper(baselines)
    return paper, to_markdown(paper), to_latex(paper), match_budgets(baselines), tabulate_classes(*layers)


def draw_figures(baselines: pd.DataFrame, classes: pd.DataFrame, *curves: dict[str, Any]) -> tuple[go.Figure, ...]:
    """The pictures, in the order of ``FIGURES``."""
    by_layer = sorted(curves, key=lambda curve: int(curve["layer"]))
    return (
        figures.draw_nmse_against_l0(baselines),
        figures.draw_layers(baselines),
        figures.draw_prevalence(baselines, classes),
        figures.draw_spectrum(by_layer),
        figures.draw_clusters(by_layer),
        figures.draw_convergence(by_layer),
    )


def write_page(
    baselines: pd.DataFrame,
    paper: pd.DataFrame,
    matched: pd.DataFrame,
    classes: pd.DataFrame,
    fit: Shards,
    val: Shards,
    probe_train: Shards,
    probe_val: Shards,
    *drawn: go.Figure,
) -> str:
    """The page, whole."""
    splits = {
        "fitted on": fit,
        "reconstruction on": val,
        "probes fitted on": probe_train,
        "probes judged on": probe_val,
    }
    about = {"model": f"{fit.metadata.family} {fit.metadata.ckpt}"}
    about |= {what: f"shards {shards.name}, {shards.n_tokens:,} patches" for what, shards in splits.items()}
    return render_page(paper, baselines, matched, classes, dict(zip(FIGURES, drawn, strict=True)), about)

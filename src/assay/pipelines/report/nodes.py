"""The table, its views, the pictures and the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from torch import Tensor

from assay.encodings import Encoding
from assay.io.shards import Shards
from assay.io.shards.provenance import Provenance
from assay.parameters import KMeansParameters, PCAParameters, ProbeParameters, StandardizeParameters
from assay.pipelines.report import figures
from assay.pipelines.report.page import render_page
from assay.pipelines.report.tables import (
    MEASURES,
    match_budgets,
    name_classes,
    pool_seeds,
    tabulate_classes,
    tabulate_paper,
    to_latex,
    to_markdown,
)

FIGURES = (
    "nmse_against_l0",
    "layers",
    "prevalence",
    "spectrum",
    "clusters",
    "convergence",
    "convergence_pca",
)
"""The pictures' names, in the order of the page."""

VOID = {
    "drop": "void patches left out",
    "negative": "void patches count as negatives",
    "class": "void is a class",
}
"""What becomes of the patches that show none of the classes, by the parameter `probe.void`."""

COLUMNS = ("layer", "method", "encoding", "k", "seed", *MEASURES, "best_layer")


def merge_layer(*metrics: dict[str, Any], encodings: Sequence[Encoding]) -> list[dict[str, Any]]:
    """The table's rows of one layer: the scores of each encoding, joined with the errors of its
    method and k.

    The rows of several seeds share the name of their encoding; ``name`` is unique to each.
    """
    known = {encoding.name: encoding for encoding in encodings}
    errors = {
        (part["method"], row["k"]): {"nmse": row["nmse"], "nmse_raw": row["nmse_raw"]}
        for part in metrics
        if "rows" in part
        for row in part["rows"]
    }
    return [
        part
        | errors[part["method"], part["k"]]
        | {"method": encoding.model.method, "encoding": encoding.shown, "name": encoding.name}
        | {"seed": encoding.model.seed}
        for part in metrics
        if "rows" not in part
        for encoding in [known[part["encoding"]]]
    ]


def tabulate_baselines(*layers: list[dict[str, Any]]) -> pd.DataFrame:
    """One row for each (layer, method, encoding, k, seed), in that order but k before encoding.

    ``best_layer`` is true in the rows whose layer has the lowest mean train CE of the classes' best
    features, averaged over the seeds, among the rows of their (method, encoding, k); ties go to the
    lower layer.
    """
    table = pd.DataFrame([row for layer in layers for row in layer])
    table = table.sort_values(["layer", "method", "k", "encoding", "seed"], ignore_index=True)
    table["seed"] = table["seed"].astype("Int64")
    series = ["method", "encoding", "k"]
    ce = table.groupby([*series, "layer"], as_index=False)["mean_train_ce"].mean()
    best = ce.loc[ce.groupby(series)["mean_train_ce"].idxmin(), [*series, "layer"]]
    table["best_layer"] = table.merge(best, how="left", on=[*series, "layer"], indicator=True)[
        "_merge"
    ].eq("both")
    return table[list(COLUMNS)]


def summarize_fits(
    pca: dict[str, Tensor],
    settled: list[dict[str, float]],
    kmeans: dict[str, Tensor],
    history: list[dict[str, float]],
    *agreements: dict[str, Any],
    layer: int,
) -> dict[str, Any]:
    """What the report says of a layer's fits: PCA's spectrum and how it settled, tokens per cluster
    by falling number, inertia by step, seeds' agreement.
    """
    return {
        "layer": layer,
        "spectrum": pca["explained_variance"].tolist(),
        "settled": settled,
        "cluster_counts": sorted(kmeans["counts"].tolist(), reverse=True),
        "inertia": [step["ewa_inertia"] for step in history],
        "agreements": list(agreements),
    }


def make_views(
    baselines: pd.DataFrame, *layers: list[dict[str, Any]]
) -> tuple[pd.DataFrame, str, str, pd.DataFrame, pd.DataFrame]:
    """The table for a paper, as numbers, Markdown and LaTeX; rows beside PCA's at the nearest L0;
    and the classes.
    """
    paper = tabulate_paper(baselines)
    return (
        paper,
        to_markdown(paper),
        to_latex(paper),
        match_budgets(baselines),
        tabulate_classes(*layers),
    )


def make_named_views(
    baselines: pd.DataFrame, names: dict[int, str], *layers: list[dict[str, Any]]
) -> tuple[pd.DataFrame, str, str, pd.DataFrame, pd.DataFrame]:
    """The same, the classes with their names."""
    paper, markdown, latex, matched, classes = make_views(baselines, *layers)
    return paper, markdown, latex, matched, name_classes(classes, names)


def tabulate_agreement(*curves: dict[str, Any]) -> pd.DataFrame:
    """A row for each (layer, further seed of k-means): validation inertia of the first fit and of
    this one, a token, and the adjusted Rand index of the two clusterings of the validation tokens.
    """
    rows = [agreement for curve in curves for agreement in curve["agreements"]]
    return pd.DataFrame(rows).sort_values(["layer", "seed"], ignore_index=True)


def draw_figures(
    baselines: pd.DataFrame, classes: pd.DataFrame, *curves: dict[str, Any]
) -> tuple[go.Figure, ...]:
    """The pictures, in the order of ``FIGURES``."""
    by_layer = sorted(curves, key=lambda curve: int(curve["layer"]))
    pooled = pool_seeds(baselines)
    return (
        figures.draw_nmse_against_l0(pooled),
        figures.draw_layers(pooled),
        figures.draw_prevalence(pooled, classes),
        figures.draw_spectrum(by_layer),
        figures.draw_clusters(by_layer),
        figures.draw_convergence(by_layer),
        figures.draw_convergence_pca(by_layer),
    )


def write_page(
    *,
    baselines: pd.DataFrame,
    paper: pd.DataFrame,
    matched: pd.DataFrame,
    classes: pd.DataFrame,
    about: dict[str, str],
    agreement: pd.DataFrame | None = None,
    gallery: list[dict[str, Any]] | None = None,
    **drawn: go.Figure,
) -> str:
    """The page, whole; with the seeds' agreement and the gallery where there are any. ``drawn`` are
    the figures.
    """
    tables = {"layers": baselines, "matched": matched, "classes": classes, "agreement": agreement}
    return render_page(
        paper, tables, {name: drawn[f"figure_{name}"] for name in FIGURES}, gallery or [], about
    )


def describe_data(
    rows: list[dict[str, Any]],
    shards_fit: Shards,
    shards_val: Shards,
    shards_probe_train: Shards,
    shards_probe_val: Shards,
    standardize: StandardizeParameters,
    kmeans: KMeansParameters,
    pca: PCAParameters,
    probe: ProbeParameters,
) -> dict[str, str]:
    """What was read for what, and how much of it was used. ``rows`` are of one layer: all are
    probed on the same patches.
    """
    fits = {
        "statistics": _say_used(shards_fit, standardize.max_tokens),
        "k-means": _say_used(shards_fit, kmeans.max_tokens),
        "PCA": _say_used(shards_fit, pca.max_tokens),
    }
    if standardize.statistics is not None:
        fits["statistics"] = standardize.statistics
    if kmeans.order is not None:
        most = "" if kmeans.max_tokens is None else f", {kmeans.max_tokens:,} at the most"
        fits["k-means"] = (
            f"shards {shards_fit.name}, the patches of {kmeans.order} in its order{most}"
        )
    fitted: dict[str, list[str]] = {}
    for what, used in fits.items():
        fitted.setdefault(used, []).append(what)
    void = VOID[probe.void]
    whitened = {"PCA codes": "each coefficient over its standard deviation"} if pca.whiten else {}
    return (
        {"model": f"{shards_fit.metadata.family} {shards_fit.metadata.ckpt}"}
        | _say_recorded(shards_fit)
        | {f"{', '.join(whats)} from": used for used, whats in fitted.items()}
        | whitened
        | {
            "reconstruction on": _say_used(shards_val, None),
            "probes fitted on": f"{_say_used(shards_probe_train, rows[0]['n_train'])}; {void}",
            "probes judged on": f"{_say_used(shards_probe_val, rows[0]['n_val'])}; {void}",
        }
    )


def _say_recorded(shards: Shards) -> dict[str, str]:
    """By which library and in which geometry, where the shards say so: all splits are alike."""
    said = Provenance.parse(shards.metadata.data)
    if said is None:
        return {}
    library = [
        said.model[name] for name in ("library", "version", "revision") if name in said.model
    ]
    told = [" ".join(library) or "code of one's own", said.describe(), said.precision]
    return {"recorded by": "; ".join(told)}


def _say_used(shards: Shards, n_used: int | None) -> str:
    n = shards.n_tokens
    share = f"{n:,}" if n_used is None or n_used >= n else f"{n_used:,} of {n:,}"
    return f"shards {shards.name}, {share} patches"

"""The pictures: plotly figures, which kedro-viz previews, MLflow keeps and the page shows."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from assay.pipelines.report.tables import list_reconstructions

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
"""Okabe and Ito's colors, which stay apart to color-blind eyes; symbols and dashes tell the same
once more.
"""

SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "triangle-down")
DASHES = ("solid", "dash", "dot", "dashdot")

METRICS = {
    "nmse": "NMSE",
    "probe_r": "Probe R",
    "map": "mAP",
    "purity_at_16": "Purity@16",
    "coverage_at_0.3": "Coverage@0.3",
}
LOG = {"type": "log", "dtick": "D2", "minor": {"showgrid": False}, "exponentformat": "power"}
MOST_POINTS = 2000
FEW_POINTS = 20
"""Of a line that has so many at most each is marked: a single one would be no line."""

EXACT = 1e-6
"""An NMSE below this is drawn here: with as many components as dimensions it is rounding, and would
take up the whole axis.
"""
EMPTY = 0.5
"""Tokens at which an empty cluster is drawn: a logarithm has no 0."""


def draw_nmse_against_l0(baselines: pd.DataFrame) -> go.Figure:
    """NMSE against L0, a point for each way to reconstruct, means over the seeds; a line joins the
    values of k of a method and layer.
    """
    figure = _figure(
        "Reconstruction against sparsity", "L0 (nonzeros per patch)", "NMSE (1: as the mean)"
    )
    methods = list(dict.fromkeys(baselines["method"]))
    layers = sorted(set(baselines["layer"]))
    for (method, layer), rows in list_reconstructions(baselines).groupby(
        ["method", "layer"], sort=False
    ):
        number = methods.index(method)
        best = bool(rows["best_layer"].any())
        by_l0 = rows.sort_values("l0")
        figure.add_scatter(
            x=by_l0["l0"],
            y=by_l0["nmse"].clip(lower=EXACT),
            mode="lines+markers" if len(set(by_l0["k"])) > 1 else "markers",
            name=f"{method}, layer {layer}",
            text=by_l0["encoding"],
            legendgroup=method,
            line={"color": _color(number), "dash": "solid" if best else "dot"},
            # A method has a color, a layer a symbol; the best layer's are large, and its line is
            # whole.
            marker={
                "symbol": SYMBOLS[layers.index(layer) % len(SYMBOLS)],
                "size": 10 if best else 7,
            },
            error_y=_spread(by_l0, "nmse"),
            hovertemplate="%{text}<br>L0 %{x:.3g}<br>NMSE %{y:.4g}<extra>layer "
            + str(layer)
            + "</extra>",
        )
    return figure.update_xaxes(LOG).update_yaxes(LOG | {"dtick": 1})


def draw_layers(baselines: pd.DataFrame) -> go.Figure:
    """Every metric over the layers, a line for each encoding, means over the seeds; of one layer,
    every metric of each encoding.
    """
    if len(set(baselines["layer"])) == 1:
        return _draw_one_layer(baselines)
    figure = make_subplots(rows=len(METRICS), cols=1, shared_xaxes=True, vertical_spacing=0.03)
    encodings = list(dict.fromkeys(baselines["encoding"]))
    for place, (metric, title) in enumerate(METRICS.items(), 1):
        for number, encoding in enumerate(encodings):
            rows = baselines[baselines["encoding"] == encoding].sort_values("layer")
            figure.add_scatter(
                x=rows["layer"].astype(str),
                y=rows[metric],
                error_y=_spread(rows, metric),
                name=encoding,
                legendgroup=encoding,
                showlegend=place == 1,
                mode="lines+markers",
                line={"color": _color(number), "dash": DASHES[number // len(COLORS) % len(DASHES)]},
                marker={"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 7},
                row=place,
                col=1,
            )
        figure.update_yaxes(title_text=title, row=place, col=1)
    layers = [str(layer) for layer in sorted(baselines["layer"].unique())]
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=layers)
    figure.update_xaxes(title_text="layer", row=len(METRICS), col=1)
    return _styled(figure, "Metrics over layers").update_layout(height=220 * len(METRICS) + 120)


def _draw_one_layer(baselines: pd.DataFrame) -> go.Figure:
    figure = _figure(f"Metrics of layer {baselines['layer'].iloc[0]}", "", "")
    for number, (metric, title) in enumerate(METRICS.items()):
        rows = baselines.dropna(subset=[metric])
        spread = _spread(rows, metric)
        figure.add_scatter(
            x=rows[metric],
            y=rows["encoding"],
            error_x=spread,
            name=title,
            mode="markers",
            marker={"symbol": SYMBOLS[number], "color": _color(number), "size": 10},
            hovertemplate="%{y}<br>" + title + " %{x:.4g}<extra></extra>",
        )
    figure.update_yaxes(
        type="category", autorange="reversed", automargin=True, title_text="encoding"
    )
    figure.update_xaxes(title_text="NMSE: lower is better; the others: higher")
    return figure.update_layout(height=200 + 28 * len(set(baselines["encoding"])))


def draw_prevalence(baselines: pd.DataFrame, classes: pd.DataFrame) -> go.Figure:
    """Each class's AP against how common it is in validation, at the best layer of every encoding;
    at first of each method's best.
    """
    figure = _figure(
        "Average precision over prevalence",
        "patches of the class in probe validation",
        "AP of the best feature",
    )
    best = baselines[baselines["best_layer"]]
    seen = set(best.loc[best.groupby("method")["map"].idxmax(), "encoding"])
    for number, row in enumerate(best.itertuples()):
        seeds = classes[
            (classes["layer"] == row.layer) & (classes["encoding"] == row.encoding)
        ].dropna(subset=["n_val"])
        called = [name for name in ("label", "class_name") if name in classes]
        mine = seeds.groupby(called, as_index=False)[["n_val", "average_precision"]].mean()
        figure.add_scatter(
            x=mine["n_val"],
            y=mine["average_precision"],
            mode="markers",
            name=f"{row.encoding}, layer {row.layer}",
            text=_escape(mine["class_name"]) if "class_name" in mine else mine["label"],
            visible=True if row.encoding in seen else "legendonly",
            marker={
                "symbol": SYMBOLS[number % len(SYMBOLS)],
                "color": _color(number),
                "size": 8,
                "opacity": 0.75,
            },
            hovertemplate="class %{text}<br>%{x} patches<br>AP %{y:.3f}<extra></extra>",
        )
    return figure.update_xaxes(type="log").update_yaxes(range=[-0.03, 1.03])


def draw_spectrum(curves: list[dict[str, Any]]) -> go.Figure:
    """Variance of each principal component, and the share that they explain together, a line for
    each layer.
    """
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for number, curve in enumerate(curves):
        spectrum = np.asarray(curve["spectrum"])
        places = _thinned(len(spectrum))
        for row, values in enumerate((spectrum, spectrum.cumsum() / spectrum.sum()), 1):
            figure.add_scatter(
                x=places + 1,
                y=values[places],
                showlegend=row == 1,
                row=row,
                col=1,
                **_layer_line(number, curve, len(places)),
            )
    # There are many decades: a tick for each.
    figure.update_yaxes(LOG | {"dtick": 1}, title_text="variance (sigma²)", row=1, col=1)
    figure.update_yaxes(title_text="cumulative share", row=2, col=1)
    figure.update_xaxes(LOG).update_xaxes(title_text="component", row=2, col=1)
    return _styled(figure, "PCA's spectrum").update_layout(height=640)


def draw_clusters(curves: list[dict[str, Any]]) -> go.Figure:
    """Tokens of each cluster, the largest first, a line for each layer."""
    figure = _figure("Cluster sizes", "rank of the cluster", "tokens (recent ones weigh more)")
    for number, curve in enumerate(curves):
        counts = np.asarray(curve["cluster_counts"])
        places = _thinned(len(counts))
        figure.add_scatter(
            x=places + 1,
            y=np.maximum(counts[places], EMPTY),
            **_layer_line(number, curve, len(places)),
        )
    return figure.update_xaxes(LOG).update_yaxes(LOG)


def draw_convergence(curves: list[dict[str, Any]]) -> go.Figure:
    """Inertia of every step of k-means, a line for each layer; words where there is one step."""
    if all(len(curve["inertia"]) < 2 for curve in curves):
        return _say("Convergence of k-means", "k-means was fitted in one step.")
    figure = _figure("Convergence of k-means", "step", "inertia per token (smoothed)")
    for number, curve in enumerate(curves):
        inertia = np.asarray(curve["inertia"])
        places = _thinned(len(inertia))
        figure.add_scatter(
            x=places + 1, y=inertia[places], **_layer_line(number, curve, len(places))
        )
    return figure


def draw_convergence_pca(curves: list[dict[str, Any]]) -> go.Figure:
    """How far PCA's leading subspace moved from one check to the next, and what it left of the
    variance, a line for each layer.

    Words where there is one step: all tokens are seen at once.
    """
    if not any("subspace_drift" in check for curve in curves for check in curve["settled"]):
        return _say("Convergence of PCA", "PCA was fitted in one step.")
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for number, curve in enumerate(curves):
        for row, name in enumerate(("subspace_drift", "reconstruction_error"), 1):
            # The first has no drift.
            checks = [check for check in curve["settled"] if name in check]
            figure.add_scatter(
                x=[check["step"] for check in checks],
                y=[check[name] for check in checks],
                showlegend=row
                == 2,  # a fit of one step has no drift, and plotly no legend for what is not there
                row=row,
                col=1,
                **_layer_line(number, curve, len(checks)),
            )
    # There are many decades: a tick for each.
    figure.update_yaxes(LOG | {"dtick": 1}, title_text="drift (mean sin²)", row=1, col=1)
    figure.update_yaxes(title_text="variance left", row=2, col=1)
    figure.update_xaxes(LOG).update_xaxes(title_text="step", row=2, col=1)
    return _styled(figure, "Convergence of PCA").update_layout(height=640)


def _layer_line(number: int, curve: dict[str, Any], n_points: int) -> dict[str, Any]:
    name = f"layer {curve['layer']}"
    line = {"color": _color(number), "dash": DASHES[number % len(DASHES)]}
    mode = "lines+markers" if n_points <= FEW_POINTS else "lines"
    return {
        "name": name,
        "legendgroup": name,
        "mode": mode,
        "line": line,
        "marker": {"symbol": SYMBOLS[number % len(SYMBOLS)]},
    }


def _thinned(n: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """At most so many of n places, spread evenly over their logarithms, with the first and the
    last.
    """
    if n <= MOST_POINTS:
        return np.arange(n)
    return np.unique(np.round(np.geomspace(1, n, MOST_POINTS)).astype(np.int64)) - 1


def _spread(rows: pd.DataFrame, measure: str) -> dict[str, Any] | None:
    """Error bars of one standard deviation over the seeds, where there are several."""
    return {"array": rows[f"{measure}_sd"]} if (rows["seeds"] > 1).any() else None


def _escape(names: pd.Series[str]) -> pd.Series[str]:
    """Names from a file, as plotly shows them: it takes tags in a text for its own."""
    return names.map(lambda name: html.escape(name, quote=False))


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _say(title: str, words: str) -> go.Figure:
    """A picture of nothing says why there is nothing to see."""
    figure = _styled(go.Figure(), title).update_xaxes(visible=False).update_yaxes(visible=False)
    figure.add_annotation(
        text=words, showarrow=False, xref="paper", yref="paper", x=0, y=1, xanchor="left"
    )
    return figure.update_layout(height=150)


def _figure(title: str, x: str, y: str) -> go.Figure:
    return _styled(go.Figure(), title).update_xaxes(title_text=x).update_yaxes(title_text=y)


def _styled(figure: go.Figure, title: str) -> go.Figure:
    return figure.update_layout(
        title={"text": title, "x": 0, "xanchor": "left"},
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 60, "r": 16, "t": 48, "b": 48},
        # At the picture's lower edge; the page makes room for as many lines as it has there
        # (page.html.jinja).
        legend={
            "orientation": "h",
            "yref": "container",
            "yanchor": "bottom",
            "y": 0,
            "x": 0,
            "maxheight": 4000,
        },
        height=480,
    )

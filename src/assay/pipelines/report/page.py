"""One page that says it all, in one file: no network, no other files."""

from __future__ import annotations

from importlib import resources
from itertools import groupby
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from assay.pipelines.report.tables import CLASSES, show, show_paper, title_of

LEGENDS = {
    "nmse_against_l0": (
        "What is lost of the standardized activations, against the entries used for a patch. Lower"
        " left is better; what is below 10⁻⁶ is drawn there. Centers reconstruct by the nearest"
        " one, whatever codes are probed. A run of saev has no NMSE of this kind."
    ),
    "layers": "Each metric of each encoding. NMSE: lower is better; all others: higher.",
    "prevalence": (
        "A class is a point, its AP the mean over the seeds. Click an encoding in the legend to"
        " show or hide it."
    ),
    "spectrum": "Variance along each principal component, and the share of all variance up to it.",
    "clusters": (
        "How many tokens each k-means cluster was given while it was fitted, recent ones weighing"
        " more; an empty one is drawn at 0.5. A flat line is an even use of the dictionary."
    ),
    "convergence": (
        "Mean squared distance of a token to its center while k-means was fitted, smoothed over the"
        " steps; of several seeds the first fit's, here and above."
    ),
    "convergence_pca": (
        "How far PCA's leading subspace moved since the check before, and the share of the variance"
        " so far outside it."
    ),
}


def render_page(
    paper: pd.DataFrame,
    tables: dict[str, pd.DataFrame | None],
    figures: dict[str, go.Figure],
    gallery: list[dict[str, Any]],
    about: dict[str, str],
) -> str:
    """The report as HTML: the tables that there are, of the classes those at the best layers;
    ``about`` is a list of what was read.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        resources.files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    baselines, matched, classes = tables["layers"], tables["matched"], tables["classes"]
    assert baselines is not None
    assert matched is not None
    assert classes is not None
    at_best = baselines.loc[baselines["best_layer"], ["layer", "encoding", "seed"]]
    shown = tables | {
        "matched": _side_by_side(matched),
        "classes": _name_beside_label(classes.merge(at_best, on=["layer", "encoding", "seed"])),
    }
    dictionaries = [
        list(items)
        for _, items in groupby(
            gallery, lambda item: (item["layer"], item["encoding"], item["seed"])
        )
    ]
    return template.render(
        paper=_cells(show_paper(paper), paper[[*show_paper(paper).columns]]),
        tables={
            name: _cells(show(table), table) for name, table in shown.items() if table is not None
        },
        gallery=dictionaries,
        plots={name: _embed(name, figure) for name, figure in figures.items()},
        legends={name: legend for name, legend in LEGENDS.items() if figures[name].data},
        about=about,
        # A script's end in a string of the script would end it.
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
    )


def _embed(name: str, figure: go.Figure) -> Markup:
    """A picture; where there is nothing to draw, its words, which take the room they need."""
    if not figure.data:
        words = figure.layout.annotations[0].text
        return Markup("<p><b>{title}.</b> {words}</p>").format(
            title=figure.layout.title.text, words=words
        )
    config = {"responsive": True, "displayModeBar": False}
    return Markup(
        figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)
    )


def _side_by_side(matched: pd.DataFrame) -> pd.DataFrame:
    """Each measure beside PCA's, the L0 first; raw NMSE only where a row has no other."""
    measures = ["nmse", "probe_r", "map"]
    if (matched["nmse"].isna() & matched["nmse_raw"].notna()).any():
        measures.insert(1, "nmse_raw")
    pairs = [f"{whose}{name}" for name in measures for whose in ("", "pca_")]
    return matched[["layer", "encoding", "pca_encoding", "l0", "pca_l0", "l0_ratio", *pairs]]


def _name_beside_label(classes: pd.DataFrame) -> pd.DataFrame:
    """The classes' names, where they have any, beside their labels: in the file they come last."""
    first = [*CLASSES[: CLASSES.index("label") + 1], "class_name"]
    columns = sorted(classes.columns, key=lambda name: name not in first)
    return classes[columns]


def _cells(
    shown: pd.DataFrame, table: pd.DataFrame
) -> dict[str, list[list[dict[str, str]]] | list[str]]:
    """Titles, and for each cell its text and what sorts it: a number in full, or the text."""
    texts, values = shown.to_numpy(object), table.to_numpy(object)
    rows = [
        [{"text": text, "sort": _sortable(value)} for text, value in zip(*pair, strict=True)]
        for pair in zip(texts, values, strict=True)
    ]
    return {"titles": [title_of(name) for name in table.columns], "rows": rows}


def _sortable(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "nan" if pd.isna(value) else repr(float(value))

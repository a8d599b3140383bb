"""One page that says it all, in one file: no network, no other files."""

from __future__ import annotations

from importlib import resources
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from assay.pipelines.report.tables import TITLES, format_cell

LEGENDS = {
    "nmse_against_l0": "What is lost of the standardised activations, against the entries used for a patch. Lower left is better.",
    "layers": "Each metric of each encoding over the layers. NMSE: lower is better; all others: higher.",
    "prevalence": "A class is a point. Click an encoding in the legend to show or hide it.",
    "spectrum": "Variance along each principal component, and the share of all variance up to it.",
    "clusters": "How many tokens each k-means cluster holds. A flat line is an even use of the dictionary.",
    "convergence": "Mean squared distance of a token to its centre while k-means was fitted.",
}


def render_page(
    paper: pd.DataFrame,
    baselines: pd.DataFrame,
    matched: pd.DataFrame,
    classes: pd.DataFrame,
    figures: dict[str, go.Figure],
    about: dict[str, str],
) -> str:
    """The report as HTML. ``about`` is shown as a list of what was read."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files(__package__).joinpath("page.html.jinja").read_text())
    best = classes.merge(baselines.loc[baselines["best_layer"], ["layer", "encoding"]], on=["layer", "encoding"])
    plots = {
        name: Markup(
            figure.to_html(
                full_html=False,
                include_plotlyjs=False,
                div_id=name,
                config={"responsive": True, "displayModeBar": False},
            )
        )
        for name, figure in figures.items()
    }
    return template.render(
        tables={
            "paper": _cells(paper),
            "layers": _cells(baselines),
            "matched": _cells(matched),
            "classes": _cells(best),
        },
        plots=plots,
        legends=LEGENDS,
        about=about,
        # A script's end in a string of the script would end it.
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
    )


def _cells(table: pd.DataFrame) -> dict[str, list[list[dict[str, str]]] | list[str]]:
    """Titles, and for each cell what is shown and what it is sorted by."""
    rows = [
        [
            {"text": format_cell(value, name), "sort": _sortable(value)}
            for name, value in zip(table.columns, row, strict=True)
        ]
        for row in table.itertuples(index=False)
    ]
    return {"titles": [TITLES.get(name, name.replace("_", " ")) for name in table.columns], "rows": rows}


def _sortable(value: Any) -> str:
    """A number in full, a text as it is."""
    return value if isinstance(value, str) else repr(float("nan" if value is None else value))

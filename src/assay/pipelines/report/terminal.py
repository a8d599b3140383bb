"""The table as the terminal shows it."""

from __future__ import annotations

import functools

import pandas as pd
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from assay.encodings import Model
from assay.pipelines.report.tables import format_cell, pool_seeds

HEADINGS = {
    "nmse_raw": "nmse\nraw",
    "l0": "L0",
    "probe_r": "probe\nR",
    "map": "mAP",
    "purity_at_16": "purity\n@16",
    "coverage_at_0.3": "cover\n@0.3",
    "best_layer": "*",
}
TABLE_WIDTH = 80


def render_table(baselines: pd.DataFrame) -> Table:
    """The table as the terminal shows it, in 80 columns: layers apart, a star at the best layer of
    each (method, encoding, k).

    Of several seeds it shows the mean. Where that is too wide, first the method, which every
    encoding's name begins with, and then k are left to the file; after that an encoding's name
    takes several lines. Nothing is cut.
    """
    several = bool(baselines.duplicated(["layer", "encoding"]).any())
    shown = [name for name in baselines.columns if name != "seed"]
    title = (
        "k-means and PCA baselines"
        if all(Model(method).family for method in baselines["method"])
        else "Baselines and dictionaries"
    )
    if several:
        baselines, title = pool_seeds(baselines), f"{title}, means over seeds"
    unbounded = Console(width=10_000)
    for hidden in ((), ("method",), ("method", "k")):
        table = _lay_out(baselines, [name for name in shown if name not in hidden], title)
        if Measurement.get(unbounded, unbounded.options, table).maximum <= TABLE_WIDTH:
            break
    return table


def _lay_out(baselines: pd.DataFrame, shown: list[str], title: str) -> Table:
    caption = "*: the layer of the lowest mean train CE of the classes' best features"
    table = Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        padding=0,
        collapse_padding=True,
        show_edge=False,
    )
    for column in shown:
        text = column in ("method", "encoding", "best_layer")
        table.add_column(
            HEADINGS.get(column, column),
            justify="left" if text else "right",
            no_wrap=column != "encoding",
            overflow="fold",
        )
    for _, rows in baselines.groupby("layer"):
        for row in rows[shown].itertuples(index=False):
            texts = map(functools.partial(format_cell, narrow=True), row, shown)
            table.add_row(*texts)
        table.add_section()
    return table

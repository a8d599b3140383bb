from collections.abc import Sequence

from kedro.pipeline import Pipeline, node

from assay.pipelines.report.nodes import (
    FIGURES,
    draw_figures,
    make_views,
    merge_layer,
    summarise_fits,
    tabulate_baselines,
    write_page,
)
from assay.pipelines.stream import bind


def create_layer_pipeline(layer: int, metrics: list[str]) -> Pipeline:
    """Join the metrics of one layer into its rows, and sum up its fits."""
    return Pipeline(
        [
            node(merge_layer, metrics, "rows", name="report.merge"),
            node(
                bind(summarise_fits, layer=layer),
                ["pca_model", "kmeans_model", "kmeans_history"],
                "curves",
                name="report.summarise",
            ),
        ]
    )


def create_pipeline(layers: Sequence[str]) -> Pipeline:
    """Gather every layer's rows into the table, its views, the pictures and the page."""
    rows, curves = ([f"{kind}_{layer}" for layer in layers] for kind in ("rows", "curves"))
    figures = [f"figure_{name}" for name in FIGURES]
    return Pipeline(
        [
            node(tabulate_baselines, rows, "baselines", name="report.tabulate"),
            node(
                make_views,
                ["baselines", *rows],
                ["paper", "paper_markdown", "paper_latex", "matched", "classes"],
                name="report.view",
            ),
            node(draw_figures, ["baselines", "classes", *curves], figures, name="report.draw"),
            node(
                write_page,
                [
                    "baselines",
                    "paper",
                    "matched",
                    "classes",
                    "shards_fit",
                    "shards_val",
                    "shards_probe_train",
                    "shards_probe_val",
                    *figures,
                ],
                "report_page",
                name="report.page",
            ),
        ]
    )

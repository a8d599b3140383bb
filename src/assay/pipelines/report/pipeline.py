"""The `report` pipeline: the table, its views, the pictures and the page."""

from collections.abc import Sequence

from kedro.pipeline import Pipeline, node

from assay.encodings import Encoding, Model
from assay.pipelines.report.gallery import draw_gallery, gather_examples
from assay.pipelines.report.nodes import (
    FIGURES,
    describe_data,
    draw_figures,
    make_named_views,
    make_views,
    merge_layer,
    summarize_fits,
    tabulate_agreement,
    tabulate_baselines,
    write_page,
)
from assay.pipelines.stream import bind


def create_layer_pipeline(
    layer: int, encodings: Sequence[Encoding], *, again: Sequence[Model]
) -> Pipeline:
    """Join the metrics of one layer's encodings into its rows, and sum up its fits; ``again`` are
    those of k-means' further seeds.
    """
    models = dict.fromkeys(encoding.model.name for encoding in encodings)
    metrics = [
        *(f"{name}_errors" for name in models),
        *(f"scores_{encoding.name}" for encoding in encodings),
    ]
    agreements = [f"{model.name}_agreement" for model in again]
    return Pipeline(
        [
            node(bind(merge_layer, encodings=encodings), metrics, "rows", name="report.merge"),
            node(
                bind(gather_examples, encodings=encodings, layer=layer),
                [f"examples_{encoding.name}" for encoding in encodings],
                "examples",
                name="report.gather",
            ),
            node(
                bind(summarize_fits, layer=layer),
                ["pca_model", "pca_history", "kmeans_model", "kmeans_history", *agreements],
                "curves",
                name="report.summarise",
            ),
        ]
    )


def create_pipeline(
    layers: Sequence[str],
    *,
    several_seeds: bool,
    gallery_classes: int | None,
    named_classes: bool,
) -> Pipeline:
    """Gather every layer's rows into the table, its views, the pictures and the page.

    Where k-means has several seeds their agreement is part of it, where the images are at hand a
    gallery of so many classes; where classes have names, all of it says them.
    """
    rows, curves, examples = (
        [f"{kind}_{layer}" for layer in layers] for kind in ("rows", "curves", "examples")
    )
    figures = [f"figure_{name}" for name in FIGURES]
    splits = [f"shards_{split}" for split in ("fit", "val", "probe_train", "probe_val")]
    shown = ["paper", "matched", "classes", "about"]
    optional = []
    if several_seeds:
        shown.append("agreement")
        optional.append(node(tabulate_agreement, curves, "agreement", name="report.agree"))
    if gallery_classes is not None:
        shown.append("gallery")
        optional.append(
            node(
                bind(draw_gallery, most_classes=gallery_classes),
                ["baselines", "classes", "images_probe_val", "shards_probe_val", *examples],
                "gallery",
                name="report.illustrate",
            )
        )
    return Pipeline(
        [
            node(tabulate_baselines, rows, "baselines", name="report.tabulate"),
            node(
                make_named_views if named_classes else make_views,
                ["baselines", *(["class_names"] if named_classes else []), *rows],
                ["paper", "paper_markdown", "paper_latex", "matched", "classes"],
                name="report.view",
            ),
            node(draw_figures, ["baselines", "classes", *curves], figures, name="report.draw"),
            node(
                describe_data,
                [
                    rows[0],
                    *splits,
                    *(f"params:{name}" for name in ("standardize", "kmeans", "pca", "probe")),
                ],
                "about",
                name="report.describe",
            ),
            node(
                write_page,
                {name: name for name in ("baselines", *shown, *figures)},
                "report_page",
                name="report.page",
            ),
            *optional,
        ]
    )

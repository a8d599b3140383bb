"""The `kmeans` pipeline: centers of every seed, what they lose, and how far they agree."""

from collections.abc import Sequence

from kedro.pipeline import Pipeline, node
from kedro.pipeline.node import Node

from assay.encodings import Form, Model
from assay.pipelines.dictionary_nodes import measuring_node
from assay.pipelines.kmeans.nodes import compare_seeds, fit_kmeans
from assay.pipelines.stream import bind


def create_pipeline(layer: int, models: Sequence[Model]) -> Pipeline:
    """Fit k-means with each model's seed and measure its reconstruction; compare each fit after the
    first with it.
    """
    first, *others = models
    fits = [made for model in models for made in _fit_and_measure(layer, model)]
    comparisons = [
        node(
            bind(compare_seeds, layer=layer, seed=model.seed),
            [
                "shards_val",
                "statistics",
                f"{first.name}_model",
                f"{model.name}_model",
                "params:kmeans",
                "params:device",
            ],
            f"{model.name}_agreement",
            name=f"{model.name}.compare",
        )
        for model in others
    ]
    return Pipeline([*fits, *comparisons])


def _fit_and_measure(layer: int, model: Model) -> list[Node]:
    name = model.name
    return [
        node(
            bind(fit_kmeans, layer=layer, seed=model.seed, method=name),
            ["shards_fit", "statistics", "params:kmeans", f"{name}_checkpoints", "params:device"],
            [f"{name}_model", f"{name}_history"],
            name=f"{name}.fit",
        ),
        measuring_node(name, f"{name}_model", layer=layer, name=name, kind=Form("onehot")),
    ]

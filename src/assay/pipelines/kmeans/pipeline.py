from collections.abc import Mapping

from kedro.pipeline import Pipeline, node
from kedro.pipeline.node import Node

from assay.pipelines.kmeans.nodes import compare_seeds, fit_kmeans, measure_kmeans
from assay.pipelines.stream import bind


def create_pipeline(layer: int, *, seeds: Mapping[str, int]) -> Pipeline:
    """Fit k-means with each named seed and measure its reconstruction; compare each fit after the first with it."""
    first, *others = seeds
    fits = [made for name, seed in seeds.items() for made in _fit_and_measure(layer, name, seed)]
    comparisons = [
        node(
            bind(compare_seeds, layer=layer, seed=seeds[name]),
            ["shards_val", "statistics", f"{first}_model", f"{name}_model", "params:kmeans", "params:device"],
            f"{name}_agreement",
            name=f"{name}.compare",
        )
        for name in others
    ]
    return Pipeline([*fits, *comparisons])


def _fit_and_measure(layer: int, name: str, seed: int) -> list[Node]:
    return [
        node(
            bind(fit_kmeans, layer=layer, seed=seed, method=name),
            ["shards_fit", "statistics", "params:kmeans", f"{name}_checkpoints", "params:device"],
            [f"{name}_model", f"{name}_history"],
            name=f"{name}.fit",
        ),
        node(
            bind(measure_kmeans, layer=layer, method=name),
            ["shards_val", "statistics", f"{name}_model", "params:kmeans", "params:device"],
            f"{name}_errors",
            name=f"{name}.measure",
        ),
    ]

from kedro.pipeline import Pipeline, node

from assay.pipelines.kmeans.nodes import compare_seeds, fit_kmeans, measure_kmeans
from assay.pipelines.stream import bind


def create_pipeline(layer: int, *, second_seed: int | None) -> Pipeline:
    """Fit k-means and measure its reconstruction; with a second seed, fit it twice and compare."""
    pipeline = Pipeline(
        [
            node(
                bind(fit_kmeans, layer=layer),
                ["shards_fit", "statistics", "params:kmeans", "kmeans_checkpoints", "params:device"],
                ["kmeans_model", "kmeans_history"],
                name="kmeans.fit",
            ),
            node(
                bind(measure_kmeans, layer=layer),
                ["shards_val", "statistics", "kmeans_model", "params:kmeans", "params:device"],
                "kmeans_errors",
                name="kmeans.measure",
            ),
        ]
    )
    if second_seed is None:
        return pipeline
    return pipeline + Pipeline(
        [
            node(
                bind(fit_kmeans, layer=layer, seed=second_seed),
                ["shards_fit", "statistics", "params:kmeans", "kmeans-second_checkpoints", "params:device"],
                ["kmeans-second_model", "kmeans-second_history"],
                name="kmeans.fit_second",
            ),
            node(
                bind(compare_seeds, layer=layer),
                ["shards_val", "statistics", "kmeans_model", "kmeans-second_model", "params:kmeans", "params:device"],
                "kmeans_agreement",
                name="kmeans.compare",
            ),
        ]
    )

from kedro.pipeline import Pipeline, node

from assay.pipelines.kmeans.nodes import fit_kmeans, measure_kmeans
from assay.pipelines.stream import bind


def create_pipeline(layer: int) -> Pipeline:
    """Fit k-means and measure its reconstruction."""
    return Pipeline(
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

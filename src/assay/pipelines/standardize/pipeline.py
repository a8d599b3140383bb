"""The `standardize` pipeline: mean and standard deviation of each dimension."""

from kedro.pipeline import Pipeline, node

from assay.pipelines.standardize.nodes import adopt_statistics, fit_statistics
from assay.pipelines.stream import bind


def create_pipeline(layer: int, *, given_statistics: bool) -> Pipeline:
    """Fit the statistics, or check and adopt the user's own."""
    if given_statistics:
        fit = node(
            bind(adopt_statistics, layer=layer),
            ["shards_fit", "given_statistics", "params:standardize"],
            "statistics",
            name="standardize.adopt",
        )
    else:
        fit = node(
            bind(fit_statistics, layer=layer),
            ["shards_fit", "params:standardize", "statistics_checkpoints", "params:device"],
            "statistics",
            name="standardize.fit",
        )
    return Pipeline([fit])

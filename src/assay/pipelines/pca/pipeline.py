from kedro.pipeline import Pipeline, node

from assay.pipelines.encode.pipeline import encode_both_splits
from assay.pipelines.pca.nodes import fit_pca, measure_pca
from assay.pipelines.stream import bind


def create_pipeline(layer: int, *, ks: tuple[int, ...], codes: str) -> Pipeline:
    """Fit PCA, measure its reconstruction at every K, and leave the codes of the labelled patches in one encoding."""
    return Pipeline(
        [
            node(
                bind(fit_pca, layer=layer),
                ["shards_fit", "statistics", "params:pca", "pca_checkpoints", "params:device"],
                ["pca_model", "pca_history"],
                name="pca.fit",
            ),
            node(
                bind(measure_pca, layer=layer, ks=ks),
                ["shards_val", "statistics", "pca_model", "params:pca", "params:device"],
                "pca_errors",
                name="pca.measure",
            ),
            *encode_both_splits(layer, "pca", codes),
        ]
    )

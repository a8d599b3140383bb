"""The `pca` pipeline: components, what they lose, and their codes."""

from kedro.pipeline import Pipeline, node

from assay.encodings import Form
from assay.pipelines.dictionary_nodes import encoding_nodes, measuring_node
from assay.pipelines.pca.nodes import fit_pca
from assay.pipelines.stream import bind


def create_pipeline(layer: int, *, ks: tuple[int, ...], form: Form) -> Pipeline:
    """Fit PCA, measure its reconstruction at every K, and leave the codes of the labeled patches in
    one form; where that is whitened, so is what is measured.
    """
    fit = node(
        bind(fit_pca, layer=layer),
        ["shards_fit", "statistics", "params:pca", "pca_checkpoints", "params:device"],
        ["pca_model", "pca_history"],
        name="pca.fit",
    )
    measured = Form("dense", whiten=form.whiten)
    measure = measuring_node("pca", "pca_model", layer=layer, name="pca", kind=measured, ks=ks)
    codes = encoding_nodes(
        f"encode.{form.name}", "pca_model", layer=layer, name=form.name, kind=form
    )
    return Pipeline([fit, measure, *codes])

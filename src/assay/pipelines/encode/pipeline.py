"""The `encode` pipeline: codes of the labeled patches."""

from collections.abc import Iterable

from kedro.pipeline import Pipeline

from assay.encodings import Encoding
from assay.parameters import SparsityParameters
from assay.pipelines.dictionary_nodes import encoding_nodes


def create_pipeline(
    layer: int,
    encodings: Iterable[Encoding],
    *,
    sparsity: SparsityParameters | None = None,
) -> Pipeline:
    """Encode the labeled patches in every encoding whose codes no other stage leaves; ``sparsity``
    says what is kept on a small disk.
    """
    # The rows of PCA share the codes of their largest K, unless they are whitened.
    stored = {row.codes: row for row in encodings}
    return Pipeline(
        [
            made
            for codes, row in stored.items()
            if row.codes_form is not None
            for made in encoding_nodes(
                f"encode.{codes}",
                f"{row.model.name}_model",
                layer=layer,
                name=codes,
                kind=row.codes_form,
                seed=row.model.seed,
                sparsity=sparsity,
            )
        ]
    )

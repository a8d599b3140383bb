from collections.abc import Callable

from kedro.pipeline import Pipeline, node
from kedro.pipeline.node import Node

from assay.numerics.codes import ComputedCodes
from assay.parameters import SparsityParameters
from assay.pipelines.encode.nodes import encode_with_kmeans, encode_with_pca
from assay.pipelines.stream import bind

ENCODE: dict[str, Callable[..., ComputedCodes]] = {"kmeans": encode_with_kmeans, "pca": encode_with_pca}


def encode_both_splits(
    layer: int, method: str, encoding: str, sparsity: SparsityParameters | None = None
) -> list[Node]:
    """The nodes that leave one encoding of both probe splits; `sparsity` says what is kept of k-means codes on a small disk."""
    # Bound, it is part of these nodes' fingerprints alone: a fit stays up to date when it changes.
    options = {"sparsity": sparsity} if sparsity and method == "kmeans" else {}
    return [
        node(
            bind(ENCODE[method], layer=layer, encoding=encoding, **options),
            [f"shards_{split}", "statistics", f"{method}_model", f"params:{method}", "params:device"],
            f"codes_{encoding}_{split}",
            name=f"encode.{encoding}.{split}",
        )
        for split in ("probe_train", "probe_val")
    ]


def create_pipeline(
    layer: int, *, encodings: tuple[tuple[str, str], ...], sparsity: SparsityParameters | None = None
) -> Pipeline:
    """Encode the labelled patches in every (method, encoding) that no other stage leaves."""
    return Pipeline(
        [made for method, encoding in encodings for made in encode_both_splits(layer, method, encoding, sparsity)]
    )

from collections.abc import Callable

from kedro.pipeline import Pipeline, node
from kedro.pipeline.node import Node

from assay.numerics.codes import ComputedCodes
from assay.parameters import SparsityParameters
from assay.pipelines.encode.nodes import encode_with_kmeans, encode_with_pca
from assay.pipelines.stream import bind

ENCODE: dict[str, Callable[..., ComputedCodes]] = {"kmeans": encode_with_kmeans, "pca": encode_with_pca}


def encode_both_splits(
    layer: int,
    model: str,
    encoding: str,
    as_: str | None = None,
    seed: int | None = None,
    *,
    stage: str = "encode",
    sparsity: SparsityParameters | None = None,
) -> list[Node]:
    """The nodes that leave one encoding of both probe splits by a model, made as ``as_`` where it has another name.

    ``seed`` is the model's, for the record; ``sparsity`` says what is kept of k-means codes on a small disk.
    """
    as_ = as_ or encoding
    method = as_.partition("-")[0]
    # Bound, it is part of these nodes' fingerprints alone: a fit stays up to date when it changes.
    options = {"sparsity": sparsity} if sparsity and method == "kmeans" else {}
    return [
        node(
            bind(ENCODE[method], layer=layer, encoding=as_, seed=seed, **options),
            [f"shards_{split}", "statistics", f"{model}_model", f"params:{method}", "params:device"],
            f"codes_{encoding}_{split}",
            name=f"{stage}.{encoding}.{split}",
        )
        for split in ("probe_train", "probe_val")
    ]


def create_pipeline(
    layer: int,
    *,
    encodings: tuple[tuple[str, str, str | None, int | None], ...],
    sparsity: SparsityParameters | None = None,
) -> Pipeline:
    """Encode the labelled patches in every (model, encoding, encoding that makes it, seed) that no other stage leaves."""
    return Pipeline([made for each in encodings for made in encode_both_splits(layer, *each, sparsity=sparsity)])

from kedro.pipeline import Pipeline, node
from kedro.pipeline.node import Node

from assay.pipelines.encode.nodes import encode_patches
from assay.pipelines.stream import bind


def encode_both_splits(layer: int, method: str, encoding: str) -> list[Node]:
    """The nodes that leave one encoding of both probe splits."""
    return [
        node(
            bind(encode_patches, layer=layer, encoding=encoding),
            [f"shards_{split}", "statistics", f"{method}_model", "params:device"],
            f"codes_{encoding}_{split}",
            name=f"encode.{encoding}.{split}",
        )
        for split in ("probe_train", "probe_val")
    ]


def create_pipeline(layer: int, *, encodings: tuple[tuple[str, str], ...]) -> Pipeline:
    """Encode the labelled patches in every (method, encoding) that no other stage leaves."""
    return Pipeline([made for method, encoding in encodings for made in encode_both_splits(layer, method, encoding)])

"""Codes of the labelled patches."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from assay.io.shards import Shards
from assay.io.tensors import fingerprint_tensors
from assay.numerics.codes import Batch, ComputedCodes
from assay.numerics.encoders import make_encoder
from assay.pipelines.stream import pick_device, standardized_tokens


def encode_patches(
    shards: Shards,
    statistics: dict[str, Tensor],
    model: dict[str, Tensor],
    device: str,
    *,
    layer: int,
    encoding: str,
) -> ComputedCodes:
    """Codes of every content token of a layer, in order, computed as they are read: nothing is done yet when this returns.

    Where the catalog gives the codes a folder they are written there; where it gives them memory, each reader computes them.
    """
    place = pick_device(device)
    encoder = make_encoder(encoding, {name: tensor.to(place) for name, tensor in model.items()})

    def stream(batch_size: int) -> Iterator[Batch]:
        for tokens in standardized_tokens(shards, layer, statistics, batch_size, place, doing=encoding):
            yield encoder.encode(tokens)

    provenance = {
        "encoding": encoding,
        "layer": layer,
        "shards": shards.name,
        "model": fingerprint_tensors(model),
        "statistics": fingerprint_tensors(statistics),
    }
    return ComputedCodes(encoder.format, shards.n_tokens, encoder.n_features, stream, provenance)

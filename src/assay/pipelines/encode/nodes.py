"""Codes of the labelled patches."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from assay.io.shards import Shards
from assay.io.tensors import fingerprint_tensors
from assay.numerics.codes import Batch, ComputedCodes, sparsify
from assay.numerics.encoders import make_encoder
from assay.parameters import KMeansParameters, PCAParameters, SparsityParameters
from assay.pipelines.fitting import NOT_FITTED
from assay.pipelines.stream import judged_tokens, pick_device

FORMAT = 2
"""Raised whenever the same tokens and model would give other codes: what was begun of older ones is not gone on with."""


def made_from(shards: Shards) -> str:
    """What codes of these shards are made of, beside their provenance: a shard that was recorded again has its old name."""
    return f"{FORMAT} {shards.fingerprint()}"


def encode_with_kmeans(
    shards: Shards,
    statistics: dict[str, Tensor],
    model: dict[str, Tensor],
    parameters: KMeansParameters,
    device: str,
    *,
    layer: int,
    encoding: str,
    seed: int | None = None,
    sparsity: SparsityParameters | None = None,
) -> ComputedCodes:
    """Codes of every content token of a layer, in order, computed as they are read: nothing is done yet when this returns.

    Where the catalog gives the codes a folder they are written there, on a disk that is too small with `sparsity`; where it
    gives them memory, each reader computes them. ``seed`` is the model's.
    """
    made_with = parameters.model_dump(mode="json", exclude=NOT_FITTED["kmeans"] | {"seed"}), seed
    return _encode(shards, statistics, model, *made_with, device, layer=layer, encoding=encoding, sparsity=sparsity)


def encode_with_pca(
    shards: Shards,
    statistics: dict[str, Tensor],
    model: dict[str, Tensor],
    parameters: PCAParameters,
    device: str,
    *,
    layer: int,
    encoding: str,
    seed: int | None = None,
) -> ComputedCodes:
    """As `encode_with_kmeans`, by PCA."""
    made_with = parameters.model_dump(mode="json", exclude=NOT_FITTED["pca"]), seed
    return _encode(shards, statistics, model, *made_with, device, layer=layer, encoding=encoding)


def _encode(
    shards: Shards,
    statistics: dict[str, Tensor],
    model: dict[str, Tensor],
    fitted_with: dict[str, Any],
    seed: int | None,
    device: str,
    *,
    layer: int,
    encoding: str,
    sparsity: SparsityParameters | None = None,
) -> ComputedCodes:
    place = pick_device(device)
    encoder = make_encoder(encoding, {name: tensor.to(place) for name, tensor in model.items()})

    def stream(batch_size: int, start: int, encode: Callable[[Tensor], Batch] = encoder.encode) -> Iterator[Batch]:
        for tokens in judged_tokens(shards, layer, statistics, batch_size, place, doing=encoding, start=start):
            yield encode(tokens)

    provenance = {
        "encoding": encoding,
        "layer": layer,
        "shards": shards.name,
        "model": fingerprint_tensors(model),
        "statistics": fingerprint_tensors(statistics),
        "parameters": json.dumps(fitted_with, sort_keys=True),
        "seed": seed,
    }
    codes = functools.partial(
        ComputedCodes, n_rows=shards.n_tokens, n_features=encoder.n_features, made_from=made_from(shards)
    )
    whole = functools.partial(codes, encoder.format, k=encoder.k, provenance=provenance)

    encode_rounded = encoder.encode_rounded

    def rounded(dtype: torch.dtype) -> ComputedCodes:
        assert encode_rounded is not None
        return whole(stream=functools.partial(stream, encode=lambda tokens: encode_rounded(tokens, dtype)))

    return whole(
        stream=stream,
        fallback=_sparser(codes, stream, sparsity, provenance) if sparsity and encoder.zero_is_far else None,
        rounded=rounded if encode_rounded else None,
    )


def _sparser(
    codes: Callable[..., ComputedCodes],
    stream: Callable[[int, int], Iterator[Batch]],
    sparsity: SparsityParameters,
    provenance: dict[str, Any],
) -> Callable[[], ComputedCodes]:
    """What makes the codes with their largest entries only."""
    kept = sparsity.model_dump()

    def sparse_stream(batch_size: int, start: int) -> Iterator[Batch]:
        for batch in stream(batch_size, start):
            yield sparsify(batch, **kept)

    about = provenance | {"sparsity": json.dumps(kept)}
    return functools.partial(codes, "sparse", k=sparsity.top_k, stream=sparse_stream, provenance=about)

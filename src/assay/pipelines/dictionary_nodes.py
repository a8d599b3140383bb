"""What every dictionary goes through, whoever trained it: its reconstruction is measured, and its
codes are made.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from kedro.pipeline import node
from kedro.pipeline.node import Node
from torch import Tensor

from assay.codes import Batch, Format
from assay.encodings import Form
from assay.io.saes import StoredSae
from assay.io.shards import Shards
from assay.io.tensors import fingerprint_tensors
from assay.numerics.codes import ComputedCodes, sparsify
from assay.numerics.dictionary import Dictionary, open_dictionary
from assay.numerics.reconstruction_error import sum_errors
from assay.parameters import SparsityParameters, result_values
from assay.pipelines.stream import bind, judged_tokens, pick_device
from assay.sae import open_sae

FORMAT = 2
"""Raised whenever the same tokens and model would give other codes: what was begun of older ones is
not resumed.
"""

OpenedAs = Form | Literal["standardized", "raw"]
"""How a model is opened: its tensors as centers or components of a form, or an autoencoder by the
activations that it was trained on.
"""

Stored = dict[str, Tensor] | StoredSae
"""A fitted model's tensors, or an autoencoder as it was read."""


class SourcedCodes(ComputedCodes):
    """Computed codes with their provenance, for the writer: see `assay.io.codes.layout`."""

    def __init__(
        self,
        code_format: Format,
        n_rows: int,
        n_features: int,
        k: int | None,
        stream: Callable[[int, int], Iterator[Batch]],
        *,
        provenance: Mapping[str, object],
        made_from: str,
        fallback: Callable[[], SourcedCodes] | None = None,
        rounded: Callable[[torch.dtype], SourcedCodes] | None = None,
        computation: Computation | None = None,
    ) -> None:
        super().__init__(code_format, n_rows, n_features, k, stream)
        self.provenance = provenance
        self.made_from = made_from
        self.fallback = fallback
        self.rounded = rounded
        self.computation = computation


class Computation:
    """What codes are computed from, batch by batch.

    Args:
        shards: whose content tokens of the layer are read.
        statistics: ``mean``, ``std`` (d_model,) that they are standardized with.
        model: the dictionary's tensors, or the autoencoder.
        device: as the parameter has it: `auto`, `cpu` or `cuda`.
        layer: the block number.
        name: the encoding's.
        kind: how the model is opened.

    Attributes:
        dictionary: the model, opened on the device.
    """

    def __init__(
        self,
        shards: Shards,
        statistics: dict[str, Tensor],
        model: Stored,
        device: str,
        *,
        layer: int,
        name: str,
        kind: OpenedAs,
    ) -> None:
        self.shards = shards
        self.statistics = statistics
        self.model = model
        self.device = device
        self.layer = layer
        self.name = name
        self.kind = kind
        self._place = pick_device(device)
        self.dictionary = _open(model, statistics, kind, self._place)

    def stream(
        self, batch_size: int, start: int, encode: Callable[[Tensor], Batch] | None = None
    ) -> Iterator[Batch]:
        """A pass over the tokens from `start` on, with their codes, or what else `encode` makes."""
        encode = self.dictionary.encode if encode is None else encode
        for tokens in judged_tokens(
            self.shards,
            self.layer,
            self.statistics,
            batch_size,
            self._place,
            doing=self.name,
            start=start,
        ):
            yield encode(tokens)

    def codes(self, encode: Callable[[Tensor], Batch] | None = None, **about: Any) -> SourcedCodes:
        """The codes, computed as they are read; `about` is what else `SourcedCodes` is told."""
        return SourcedCodes(
            self.dictionary.format,
            self.shards.n_tokens,
            self.dictionary.n_features,
            self.dictionary.k,
            functools.partial(self.stream, encode=encode),
            **about,
        )


def measure(
    shards: Shards,
    statistics: dict[str, Tensor],
    model: Stored,
    device: str,
    parameters: Any = None,
    *,
    layer: int,
    name: str,
    kind: OpenedAs,
    ks: tuple[int, ...] = (),
    batch_size: int | None = None,
) -> dict[str, Any]:
    """NMSE of a dictionary on the validation tokens, in the standardized space and raw, in one
    pass.

    Args:
        shards: whose content tokens of the layer are read.
        statistics: ``mean``, ``std`` (d_model,) that they are standardized with.
        model: the dictionary's tensors, or the autoencoder.
        device: as the parameter has it: `auto`, `cpu` or `cuda`.
        parameters: of the method, which say how many tokens a batch has.
        layer: the block number.
        name: the model's, which the result goes by.
        kind: how the model is opened.
        ks: numbers of coefficients that components are measured with.
        batch_size: tokens per batch, where no method's parameters say it.
    """
    place = pick_device(device)
    dictionary = _open(model, statistics, kind, place, ks)
    batch_size = batch_size or parameters.batch_size
    batches = judged_tokens(shards, layer, statistics, batch_size, place, doing=f"{name}, NMSE")
    sums = sum_errors(lambda x: dictionary.errors(x, statistics["std"]), batches)
    rows = [{"k": k, "nmse": sums[k].nmse, "nmse_raw": sums[k].nmse_raw} for k in dictionary.ks]
    return {
        "layer": layer,
        "method": name,
        "n_tokens": sums[dictionary.ks[0]].n_tokens,
        "rows": rows,
    }


def encode(
    shards: Shards,
    statistics: dict[str, Tensor],
    model: Stored,
    device: str,
    parameters: Any = None,
    *,
    layer: int,
    name: str,
    kind: OpenedAs,
    seed: int | None = None,
    sparsity: SparsityParameters | None = None,
) -> SourcedCodes:
    """Codes of every content token of a layer, in order, computed as they are read: nothing is done
    yet when this returns.

    Where the catalog gives the codes a folder they are written there, on a disk that is too small
    with `sparsity`; where it gives them memory, each reader computes them.

    Args:
        shards: whose content tokens of the layer are read.
        statistics: ``mean``, ``std`` (d_model,) that they are standardized with.
        model: the dictionary's tensors, or the autoencoder.
        device: as the parameter has it: `auto`, `cpu` or `cuda`.
        parameters: what the method was fitted with, for the record.
        layer: the block number.
        name: the encoding's.
        kind: how the model is opened.
        seed: the model's, for the record.
        sparsity: what is kept where the disk is too small; None: such codes are refused.
    """
    computation = Computation(shards, statistics, model, device, layer=layer, name=name, kind=kind)
    dictionary = computation.dictionary
    provenance = {
        "encoding": kind.name if isinstance(kind, Form) else name,
        "layer": layer,
        "shards": shards.name,
        "model": (
            model.fingerprint() if isinstance(model, StoredSae) else fingerprint_tensors(model)
        ),
        "statistics": fingerprint_tensors(statistics),
        "parameters": json.dumps(_made_with(model, kind, parameters), sort_keys=True),
        "seed": seed,
    }
    made = functools.partial(computation.codes, provenance=provenance, made_from=made_from(shards))
    encode_rounded = dictionary.encode_rounded

    def rounded(dtype: torch.dtype) -> SourcedCodes:
        assert encode_rounded is not None
        return made(encode=lambda tokens: encode_rounded(tokens, dtype))

    return made(
        fallback=(
            _sparser(computation, sparsity, provenance)
            if sparsity and dictionary.zero_is_far
            else None
        ),
        rounded=rounded if encode_rounded else None,
        computation=computation,
    )


def made_from(shards: Shards) -> str:
    """The shards' contents, which go with the provenance: shards recorded again keep their name."""
    return f"{FORMAT} {shards.fingerprint()}"


def measuring_node(
    stage: str,
    model: str,
    *,
    layer: int,
    name: str,
    kind: OpenedAs,
    ks: tuple[int, ...] = (),
    batch_size: int | None = None,
) -> Node:
    """The node that measures the dictionary ``name``, whose tensors are the dataset ``model``."""
    # Bound where it is said: see `encoding_nodes`.
    options = {} if batch_size is None else {"batch_size": batch_size}
    return node(
        bind(measure, layer=layer, name=name, kind=kind, ks=ks, **options),
        ["shards_val", *_inputs(model, kind)],
        f"{name}_errors",
        name=f"{stage}.measure",
    )


def encoding_nodes(
    stage: str,
    model: str,
    *,
    layer: int,
    name: str,
    kind: OpenedAs,
    seed: int | None = None,
    sparsity: SparsityParameters | None = None,
) -> list[Node]:
    """The nodes that leave the encoding ``name`` of both probe splits, by the dictionary whose
    tensors are the dataset ``model``.
    """
    # Bound, each is part of the fingerprints of those nodes alone whose codes it may change.
    options: dict[str, Any] = (
        {"sparsity": sparsity} if sparsity and isinstance(kind, Form) and kind.zero_is_far else {}
    )
    return [
        node(
            bind(encode, layer=layer, name=name, kind=kind, seed=seed, **options),
            [f"shards_{split}", *_inputs(model, kind)],
            f"codes_{name}_{split}",
            name=f"{stage}.{split}",
        )
        for split in ("probe_train", "probe_val")
    ]


def _inputs(model: str, kind: OpenedAs) -> list[str]:
    shared = ["statistics", model, "params:device"]
    return [*shared, f"params:{kind.family}"] if isinstance(kind, Form) else shared


def _open(
    model: Stored,
    statistics: dict[str, Tensor],
    kind: OpenedAs,
    place: torch.device,
    ks: tuple[int, ...] = (),
) -> Dictionary:
    tensors = model.tensors if isinstance(model, StoredSae) else model
    tensors = {name: tensor.to(place) for name, tensor in tensors.items()}
    if not isinstance(model, StoredSae):
        assert isinstance(kind, Form)
        return open_dictionary(kind, tensors, ks)
    space = {name: statistics[name].to(place) for name in ("mean", "std")} if kind == "raw" else {}
    return open_sae(replace(model, tensors=tensors), **space)


def _made_with(model: Stored, kind: OpenedAs, parameters: Any) -> dict[str, Any]:
    if isinstance(model, StoredSae):
        return {"library": model.library, "formula": model.formula, "trained_on": kind}
    assert isinstance(kind, Form)
    return result_values(parameters) | ({"whiten": True} if kind.whiten else {})


def _sparser(
    computation: Computation, sparsity: SparsityParameters, provenance: dict[str, Any]
) -> Callable[[], SourcedCodes]:
    """What makes the codes with their largest entries only."""
    kept = sparsity.model_dump()

    def sparse_stream(batch_size: int, start: int) -> Iterator[Batch]:
        for batch in computation.stream(batch_size, start):
            yield sparsify(batch, **kept)

    return functools.partial(
        SourcedCodes,
        "sparse",
        computation.shards.n_tokens,
        computation.dictionary.n_features,
        sparsity.top_k,
        sparse_stream,
        provenance=provenance | {"sparsity": json.dumps(kept)},
        made_from=made_from(computation.shards),
    )

"""Weights that somebody saved by hand: safetensors under saev's, SAELens' or torch's names.

They say nothing but themselves, so the activation, and what is taken off the input, are typed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.architecture import WITH_K, Architecture
from assay.io.saes.stored import Settings, StoredSae
from assay.io.tensors import read_tensors


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


def _turned(tensor: Tensor) -> Tensor:
    return tensor.T


NAMES: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "W_enc": {"W_enc": _as_is, "encoder.weight": _turned},
    "b_enc": {"b_enc": _as_is, "encoder.bias": _as_is},
    "W_dec": {"W_dec": _as_is, "decoder.weight": _turned},
    "b_out": {"b_dec": _as_is, "decoder.bias": _as_is, "bias": _as_is},
    "threshold": {"threshold": _as_is, "activation.threshold": _as_is, "log_threshold": Tensor.exp},
}
"""saev's and SAELens' names, (d, n) encoders and (n, d) decoders; and those of torch's linear
layers, which are the other way round.
"""


def read(weights: Path, settings: Settings, *, input_bias: bool) -> StoredSae:
    """Read weights whose formula is typed.

    Args:
        weights: a safetensors file; single numbers in it, such as `k`, are left alone.
        settings: the activation, and k for `topk`.
        input_bias: whether b_dec is taken off a token before it is encoded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, tensors are missing, or some belong to another formula.
    """
    found = read_tensors(weights, any_schema=True)
    known = {alias for aliases in NAMES.values() for alias in aliases}
    strange = sorted(name for name in found.keys() - known if found[name].ndim > 0)
    if strange:
        raise ValueError(
            f"{weights}: found {', '.join(strange)} as well: an autoencoder of another kind; wanted"
            " one encoder and one decoder under relu, topk, batchtopk or jumprelu"
        )
    activation: Any = settings.canonical_activation
    wanted = [name for name in NAMES if name != "threshold" or activation == "jumprelu"]
    tensors = {name: tensor for name in wanted if (tensor := _find(found, name)) is not None}
    missing = [name for name in wanted if name not in tensors and name != "b_enc"]
    if missing:
        aliases = "; ".join(" or ".join(NAMES[name]) for name in missing)
        raise ValueError(
            f"{weights} holds {', '.join(sorted(found))}, wanted {aliases} for {activation}: save"
            " it too"
        )
    if input_bias:
        tensors["center"] = tensors["b_out"]
    k = settings.k if activation in WITH_K else None
    stored = StoredSae("hand-made", Architecture(activation, k), tensors, files=(weights,))
    stored.check(settings, None, None)
    return stored


def _find(found: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The tensor of a name, under any of its aliases; if there are several, they must be equal."""
    given = {alias: change(found[alias]) for alias, change in NAMES[name].items() if alias in found}
    if not given:
        return None
    (first, tensor), *others = given.items()
    for alias, other in others:
        # Not bit for bit: the logarithm of a threshold is rounded.
        if other.shape != tensor.shape or not torch.allclose(
            other.double(), tensor.double(), rtol=1e-6, atol=0
        ):
            raise ValueError(
                f"found {first} and another {alias}, wanted one {name}: save the one that it was"
                " trained with"
            )
    return tensor

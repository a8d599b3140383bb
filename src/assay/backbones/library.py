"""The libraries that models are of: found by their installed versions, and imported at use."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn

from assay.backbones.description import Preprocessing


def library_identity(library: str, remedy: str) -> dict[str, str]:
    """The library and its version, without an import of it.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return {"library": library, "version": version(library)}
    except PackageNotFoundError:
        raise ValueError(f"found no {library}, which computes this model: {remedy}") from None


def normalization_identity(preprocessing: Preprocessing) -> dict[str, str]:
    """What is done to a pixel."""
    mean, std = (" ".join(map(repr, each)) for each in (preprocessing.mean, preprocessing.std))
    return {"mean": mean, "std": std}


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model in place, but for the frequencies of rotary positions: rounded to bfloat16, they
    would turn the last patches of a row by other angles.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and "rope" not in name:
            tensor.data = tensor.data.to(dtype)

"""Decisions between pre-activations that float32 cannot tell apart, settled in float64.

An activation decides: which k are the largest, what is above a threshold, whether a gate is open.
Where two numbers are closer than the rounding of a float32 product, the order of its sums decides,
which depends on the machine, the threads and the batch. A token in some thousands has such a pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from assay.architecture import Architecture

_ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Error of a float32 product, relative to the lengths of its factors."""

_MOST = 16
"""Undecided pre-activations per token. More are equal, and not by rounding."""


def undecided(
    pre: Tensor, architecture: Architecture, threshold: Tensor | None, rounding: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows and columns of the pre-activations that are too near to what decides about them.

    Args:
        pre: pre-activations (b, n).
        architecture: the activation.
        threshold: of `jumprelu`.
        rounding: how far a pre-activation may be from the exact one (b, 1).

    Returns:
        Two int64 tensors of one length; empty where all is decided.
    """
    k = architecture.k
    match architecture.activation:
        case "topk" | "abstopk":
            assert k is not None
            by = pre if architecture.activation == "topk" else pre.abs()
            if k == by.shape[1]:
                return _none(pre)
            most = by.topk(min(k + _MOST, by.shape[1]), dim=1)
            # Halfway between the last that is kept and the first that is not.
            cut = most.values[:, k - 1 : k + 1].mean(1, keepdim=True)
            rows, ranks = ((most.values - cut).abs() <= rounding).nonzero().unbind(1)
            return rows, most.indices[rows, ranks]
        case "groupmax":
            assert k is not None
            groups = pre.view(len(pre), k, pre.shape[1] // k)
            near = groups >= groups.amax(2, keepdim=True) - 2 * rounding[:, None]
            return _places((near & (near.sum(2, keepdim=True) > 1)).flatten(1))
        case "jumprelu":
            assert threshold is not None
            return near_to(threshold, pre, rounding)
        case _:
            return _none(pre)


def near_to(threshold: Tensor | float, values: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the values (b, n) that are within rounding (b, 1) of a threshold, as
    `undecided` gives them.
    """
    return _places((values - threshold).abs() <= rounding)


def _places(near: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns where a mask (b, n) is true; none if those are too many."""
    rows, columns = near.nonzero().unbind(1)
    return (rows, columns) if len(rows) <= _MOST * len(near) else _none(near)


def rounding_of(x: Tensor, longest: Tensor) -> Tensor:
    """How far a float32 product of x (b, d) and the encoder, whose longest column has that length,
    may be from the exact one: (b, 1).
    """
    lengths: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return _ROUNDING * longest * lengths


def exact_products(x: Tensor, encoder: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Entries of x W of x (b, d), float64, and the encoder W (d, n), float32: float64."""
    entries: Tensor = (x[rows] * encoder.T[columns].double()).sum(1)
    return entries


def _none(like: Tensor) -> tuple[Tensor, Tensor]:
    none = torch.zeros(0, dtype=torch.int64, device=like.device)
    return none, none

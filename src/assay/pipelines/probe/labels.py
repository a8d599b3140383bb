"""The classes of patches, and which patches take part."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.codes import Codes
from assay.io.shards import Shards
from assay.numerics.codes import SelectedCodes

VOID = 0
"""The label of a patch that shows none of the classes."""


def read_labels(shards: Shards) -> Tensor:
    """The patches' labels, int64 (rows,). ValueError where all of them are void."""
    labels = shards.labels()
    if (labels == VOID).all():
        raise ValueError(
            f"{shards.path}: all {len(labels)} labels are {VOID}, void; wanted patches of a class:"
            " label them, or name other shards"
        )
    return labels


def classify(codes: Codes, labels: Tensor, void: str) -> tuple[Codes, Tensor, Tensor]:
    """The codes that take part, the class of each, int64 (label - 1 and -1 for void, or the label
    where void is a class), and which patches they are, bool.
    """
    if codes.n_rows != len(labels):
        raise ValueError(
            f"there are codes of {codes.n_rows} patches and labels of {len(labels)}: encode the"
            " patches again"
        )
    if void == "class":
        return codes, labels, torch.ones_like(labels, dtype=torch.bool)
    if void == "negative":
        return codes, labels - 1, torch.ones_like(labels, dtype=torch.bool)
    kept = labels != VOID
    return SelectedCodes(codes, kept), labels[kept] - 1, kept

"""Activations in saev's folders of shards: reading, writing, labels, and what is checked.

The names below are imported at use: labeling and checking shards needs no torch, which takes
    seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.io.shards.handle import (
        MAX_THREADS,
        LayerActivations,
        OrderOptions,
        ReadOptions,
        Shards,
        default_threads,
    )
    from assay.io.shards.writing import write_shards

__all__ = [
    "MAX_THREADS",
    "LayerActivations",
    "OrderOptions",
    "ReadOptions",
    "Shards",
    "default_threads",
    "write_shards",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "writing" if name == "write_shards" else "handle"
    return getattr(importlib.import_module(f"{__name__}.{room}"), name)

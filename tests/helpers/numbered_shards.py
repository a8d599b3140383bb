"""Shards whose tokens say their number, read by small windows and reads: what the reader's tests
are of.
"""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from assay.io.shards import order as orders
from assay.io.shards import windows
from shards import make_shards

N_EXAMPLES, TOKENS, D_MODEL, LAYERS = 23, 6, 3, (1, 4, 8)
N_TOKENS = N_EXAMPLES * TOKENS


def write_numbered(
    root: Path, n_examples: int = N_EXAMPLES, d_model: int = D_MODEL, dataset: str = "none"
) -> Path:
    """Shards of 5 examples; a token of layer i is (its number, i, ...), a CLS token -1."""
    examples = np.full((n_examples, len(LAYERS), TOKENS + 1, d_model), -1, dtype=np.float32)
    examples[:, :, 1:, 0] = np.arange(n_examples * TOKENS).reshape(n_examples, 1, TOKENS)
    examples[:, :, 1:, 1] = np.array(LAYERS)[:, None]
    budget = 5 * len(LAYERS) * (TOKENS + 1)
    return make_shards(root, examples, layers=LAYERS, max_tokens_per_shard=budget, dataset=dataset)


def numbers(batches: list[torch.Tensor]) -> list[int]:
    return [int(number) for batch in batches for number in batch[:, 0]]


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("assay-read")]


def shrink(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(orders, "WINDOW_TOKENS", 20)
    patch.setattr(orders, "WINDOW_BATCHES", 2)
    patch.setattr(orders, "RUN_TOKENS", 4)
    patch.setattr(windows, "READ_BYTES", 7 * D_MODEL * 4)
    patch.setattr(windows, "IOV_MAX", 2)

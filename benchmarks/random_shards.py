"""Folders of shards of random activations, for the benchmarks that read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt


def write_random(
    root: str | os.PathLike[str],
    n_examples: int,
    *,
    layers: tuple[int, ...],
    patches: int,
    d_model: int,
    examples_per_shard: int,
    cls_token: bool = False,
    at_once: int = 64,
    repeated: bool = False,
    about: int = 0,
) -> Path:
    """Write a folder of shards of standard normal float32 under `root`, and give its path.

    Args:
        root: the folder that will hold it.
        n_examples: examples in all.
        layers: block numbers.
        patches: content tokens of an example.
        d_model: the width of a token.
        examples_per_shard: examples in a shard.
        cls_token: whether a CLS token comes before the patches.
        at_once: examples that are drawn at once, which is what is held.
        repeated: write what was drawn first again and again: drawing takes longer than writing.
        about: so many places, standard normal, that tokens lie about, at 0.7 of that in each
            dimension; 0: about none.
    """
    # A GPU machine may lack what these import; the benchmark of reading says so.
    from assay.io.shards import write_shards
    from assay.io.shards.metadata import Metadata

    metadata = Metadata(
        family="benchmark",
        ckpt="random",
        layers=layers,
        content_tokens_per_example=patches,
        cls_token=cls_token,
        d_model=d_model,
        n_examples=n_examples,
        max_tokens_per_shard=examples_per_shard * len(layers) * (patches + cls_token),
        data="",
        dtype="float32",
        protocol="2.1",
    )
    rng = np.random.default_rng(0)
    places = np.random.default_rng(1).standard_normal((about, d_model), dtype=np.float32)

    def examples() -> Iterator[npt.NDArray[np.float32]]:
        drawn = None
        for start in range(0, n_examples, at_once):
            n = min(at_once, n_examples - start)
            if drawn is None or not repeated:
                drawn = rng.standard_normal((n, *metadata.example_shape), dtype=np.float32)
                if about:
                    drawn *= np.float32(0.7)
                    drawn += places[rng.integers(about, size=drawn.shape[:-1])]
            yield drawn[:n]

    return write_shards(root, metadata, examples())

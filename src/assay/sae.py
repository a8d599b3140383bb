"""Autoencoders without Kedro: a path goes in, codes come out."""

from __future__ import annotations

import os
from typing import Any

from assay.io.saes import Settings, StoredSae, read_sae
from assay.io.saes.hub import find
from assay.numerics import SparseAutoencoder


def load_sae(path: str | os.PathLike[str], **settings: Any) -> SparseAutoencoder:
    """Load an autoencoder as its library saved it: saev, SAELens, dictionary_learning,
    overcomplete, sparsify or ViT-Prisma. Nothing in its files is run.

    Args:
        path: its file or folder, or `hf:owner/name[@revision][/subfolder]` on the Hugging Face Hub.
        settings: what the file does not say: `activation`, `k`, `threshold`, `normalization`.

    Returns:
        The autoencoder: `encode_dense(x)` gives codes (b, n_features) of tokens as it saw them
        (b, d_model), `reconstruct(x)` what they decode to; `n_features`, `k` and `formula` say
        what it is.

    Raises:
        FileNotFoundError: there is none, or the Hub has it and it cannot be reached.
        ValueError: it is damaged, not understood, or contradicts a setting.

    Examples:
        ```python
        from assay import load_sae

        sae = load_sae("runs/z55bntm1/checkpoint/sae.pt")
        codes = sae.encode_dense(tokens)
        ```
    """
    return open_sae(read_sae(find(path)[0], Settings(**settings)))


def open_sae(stored: StoredSae, **space: Any) -> SparseAutoencoder:
    """The autoencoder of what a file says.

    Args:
        stored: as it was read.
        space: `mean` and `std` of the tokens, where they are standardized and those of its
            training were not.

    Raises:
        ValueError: its weights are not finite, or disagree.
    """
    return SparseAutoencoder(stored.tensors, stored.architecture, **space)

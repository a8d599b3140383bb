"""Autoencoders as a library saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def write_sparsify(
    folder: Path, *, d: int = 80, n: int = 100, seed: int = 0, **config: Any
) -> Path:
    """One of sparsify's, which records its layer by its folder's name."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.nn.functional.normalize(torch.randn(n, d, generator=generator))
    tensors = {
        "encoder.weight": decoder.clone(),
        "encoder.bias": torch.randn(n, generator=generator) / 10,
        "W_dec": decoder,
        "b_dec": torch.randn(d, generator=generator) / 10,
    }
    save_file(tensors, folder / "sae.safetensors")
    said = {"activation": "topk", "k": 4, "d_in": d} | config
    (folder / "cfg.json").write_text(json.dumps(said), encoding="utf-8")
    return folder


def write_saev(path: Path, *, d: int = 80, n: int = 100, seed: int = 0) -> Path:
    """One of saev's, with relu."""
    path.parent.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.nn.functional.normalize(torch.randn(n, d, generator=generator))
    tensors = {
        "W_enc": decoder.T.contiguous(),
        "b_enc": torch.randn(n, generator=generator) / 10,
        "W_dec": decoder,
        "b_dec": torch.randn(d, generator=generator) / 10,
    }
    cfg = {"d_model": d, "d_sae": n, "activation": {"cls": "Relu", "params": {}}}
    with path.open("wb") as file:
        file.write(json.dumps({"schema": 5, "cfg": cfg}).encode() + b"\n")
        torch.save(tensors, file)
    return path

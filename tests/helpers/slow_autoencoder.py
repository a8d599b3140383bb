"""An autoencoder's formula token by token in float64, with tensors under the libraries' names."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.io.saes import Settings, StoredSae, read_sae
from assay.sae import open_sae

D, N, TOKENS = 6, 12, 40

Act = Callable[[Tensor], Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32)


def weights() -> dict[str, Tensor]:
    """Random ones, whose decoder's rows are of many lengths."""
    return {
        "W_enc": randn(D, N, seed=1),
        "b_enc": 0.3 * randn(N, seed=2),
        "W_dec": randn(N, D, seed=3),
        "b_dec": randn(D, seed=4),
    }


def tokens() -> Tensor:
    return 2 * randn(TOKENS, D, seed=5) + 1


def relu(pre: Tensor) -> Tensor:
    return torch.stack([value if value > 0 else 0 * value for value in pre])


def top(k: int, *, by: Act = lambda pre: pre, last: Act = lambda pre: pre) -> Act:
    """The k largest by something, and then something else of them."""

    def act(pre: Tensor) -> Tensor:
        kept = sorted(range(len(pre)), key=lambda i: -float(by(pre)[i]))[:k]
        return last(torch.stack([pre[i] if i in kept else 0 * pre[i] for i in range(len(pre))]))

    return act


def above(threshold: Tensor) -> Act:
    def act(pre: Tensor) -> Tensor:
        limits = threshold.double().expand(len(pre))
        return relu(torch.stack([p if p > t else 0 * p for p, t in zip(pre, limits, strict=True)]))

    return act


def moved(x: Tensor, norm: str) -> tuple[Tensor, Act]:
    """A token under a normalization, and the way back."""
    if norm == "layer_norm":
        mean, std = x.mean(), x.std()
        return (x - mean) / (std + 1e-5), lambda out: out * std + mean
    if norm == "constant_norm_rescale":
        factor = len(x) ** 0.5 / x.norm()
        return x * factor, lambda out: out / factor
    return x, lambda out: out


def run(
    given: Mapping[str, Tensor],
    act: Act,
    *,
    centers: bool = True,
    norm: str = "none",
    rescales: bool = False,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes and reconstruction of `tokens`."""
    tensors = {name: tensor.double() for name, tensor in given.items()}
    lengths = tensors["W_dec"].norm(dim=1) if rescales else torch.ones(N, dtype=torch.float64)
    codes, found = [], []
    for token in tokens().double():
        x, back = moved(token, norm)
        inner = x - tensors["b_dec"] if centers else x
        if "b_gate" in tensors:
            product = inner @ tensors["W_enc"]
            is_open = product + tensors["b_gate"] > 0
            code = act(product * tensors["r_mag"].exp() + tensors["b_mag"]) * is_open
        else:
            code = act((inner @ tensors["W_enc"] + tensors["b_enc"]) * lengths)
        decoded = code / lengths * (1 if factors is None else factors.double())
        codes.append(code)
        found.append(back(decoded @ tensors["W_dec"] + tensors["b_dec"]))
    return torch.stack(codes), torch.stack(found)


def check(path: Path, wanted: tuple[Tensor, Tensor], **settings: Any) -> StoredSae:
    """Read what lies at a path, and compare its codes and reconstruction."""
    stored = read_sae(path, Settings(**settings))
    sae = open_sae(stored)
    for found, exact in zip(
        (sae.encode_dense(tokens()), sae.reconstruct(tokens())), wanted, strict=True
    ):
        assert (found.double() - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert torch.equal(sae.encode_dense(tokens()) != 0, wanted[0] != 0)
    assert (wanted[0] != 0).any()
    assert (wanted[0] == 0).any()
    return stored

"""Modules that torch saves as overcomplete's: its classes by name, with their tensors and attributes
and none of their code.
"""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SAE = "overcomplete.sae"


@cache
def _class(where: str, name: str) -> type[nn.Module]:
    return type(name, (nn.Module,), {"__module__": where, "__qualname__": name})


def module(name: str, **attributes: Any) -> nn.Module:
    """A module of the class of a name, such as topk_sae.TopKSAE."""
    where, _, cls = f"{SAE}.{name}".rpartition(".")
    made = _class(where, cls)()
    for key, value in attributes.items():
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            made.register_buffer(key, value)
        else:
            setattr(made, key, value)
    return made


@cache
def function(name: str) -> Any:
    """A function of a name, such as dictionary.normalize_l2."""
    where, _, called = f"{SAE}.{name}".rpartition(".")

    def made() -> None:
        raise AssertionError

    made.__module__, made.__qualname__, made.__name__ = where, called, called
    return made


def linear(encoder: Tensor, bias: Tensor, second: nn.Module | None = None) -> nn.Module:
    """An encoder (n, d) of one linear layer, as overcomplete's MLPEncoder."""
    first = nn.Linear(encoder.shape[1], encoder.shape[0])
    first.weight, first.bias = nn.Parameter(encoder), nn.Parameter(bias)
    made = module(
        "modules.MLPEncoder",
        input_size=encoder.shape[1],
        n_components=encoder.shape[0],
        hidden_dim=encoder.shape[1],
        nb_blocks=0,
        hidden_activation=nn.ReLU,
        output_activation=nn.ReLU,
        norm_layer=nn.Identity,
        residual=False,
    )
    made.mlp_blocks = nn.ModuleList()
    made.final_block = nn.Sequential(first, nn.Identity() if second is None else second)
    made.final_activation = nn.ReLU()
    return made


def dictionary(
    rows: Tensor, normalization: str = "l2", multiplier: float = 0.0, fused: Tensor | None = None
) -> nn.Module:
    """A dictionary (n, d); in evaluation mode with what it came to."""
    made = module(
        "dictionary.DictionaryLayer",
        in_dimensions=rows.shape[1],
        nb_concepts=rows.shape[0],
        device="cpu",
        normalization=function(f"dictionary.normalize_{normalization}"),
        _weights=nn.Parameter(rows),
        multiplier=torch.tensor(multiplier),
    )
    made.__dict__["_fused_dictionary"] = fused
    return made.train(fused is None)


def autoencoder(name: str, encoder: nn.Module, decoder: nn.Module, **attributes: Any) -> nn.Module:
    """An autoencoder of a class, such as topk_sae.TopKSAE."""
    made = module(name, nb_concepts=4, device="cpu", fitted=False, _fitted_info={})
    made.encoder, made.dictionary = encoder, decoder
    for key, value in attributes.items():
        if isinstance(value, nn.Parameter):
            made.register_parameter(key, value)
        else:
            made.__dict__[key] = value
    return made


def save(saved: nn.Module, path: Path) -> Path:
    """What torch.save(module, path) writes where the library is installed."""
    with _installed(_classes(saved)):
        torch.save(saved, path)
    return path


def _classes(saved: nn.Module) -> Iterator[Any]:
    for part in saved.modules():
        for each in (type(part), *vars(part).values()):
            if getattr(each, "__module__", "").startswith(SAE):
                yield each


@contextmanager
def _installed(names: Iterator[Any]) -> Iterator[None]:
    before = set(sys.modules)
    for each in names:
        where = each.__module__
        for parent in (where.rsplit(".", count)[0] for count in range(2, -1, -1)):
            sys.modules.setdefault(parent, types.ModuleType(parent))
        setattr(sys.modules[where], each.__qualname__, each)
    try:
        yield
    finally:
        for name in sys.modules.keys() - before:
            del sys.modules[name]

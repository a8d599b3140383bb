"""What `torch.save` wrote, without anything in it being run.

torch reads a file's tensors and plain values only (`weights_only`). Where a library saves objects,
the names of its classes, and of no others, stand for `Inert`: something that keeps what it is given
and does nothing.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.io.strict_json import shown


class Inert:
    """Stands for an object of a library's class: its attributes, and no behavior."""

    def __init__(self, *given: Any) -> None:
        self.given = given

    def __setstate__(self, state: Any) -> None:
        """Keep what the object held."""
        if isinstance(state, Mapping):
            self.__dict__.update(state)
        else:
            self.state = state


def load_pickle(source: Path | bytes, named: Path, inert: Collection[str] = ()) -> Any:
    """What a file of `torch.save` holds, on the CPU.

    Args:
        source: the file, or its bytes.
        named: the file, for messages.
        inert: full names of the classes and functions that `Inert` may stand for.

    Raises:
        ValueError: it is no such file, a damaged one, or one that needs anything else to be run.
    """
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    stand_ins: list[Any] = [
        (type(name.rpartition(".")[2], (Inert,), {"stands_for": name}), name) for name in inert
    ]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    # What damaged and hostile files come to is open-ended: torch's reader raises whatever it ran
    # into.
    except Exception as error:
        raise ValueError(
            f"{named} is not a whole file of tensors as torch.save writes it, or needs code to be"
            f" run, which is not done ({shown(error).splitlines()[0][:200]}): save its state_dict"
        ) from None


def check_tensors(found: Any, named: Path) -> dict[str, Tensor]:
    """The tensors of a state dict.

    Raises:
        ValueError: it is none, or a tensor claims more numbers than the file has for it.
    """
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
    ):
        raise ValueError(
            f"{named} holds a {type(found).__name__} that is no state dict, wanted tensors by name:"
            " save the model's state_dict()"
        )
    for name, tensor in found.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ValueError(f"{named}: {shown(name)} is no dense tensor: save it as one")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{named}: {shown(name)} claims {tensor.numel()} numbers, the file has"
                f" {tensor.untyped_storage().nbytes() // tensor.element_size()}: save it again"
            )
    return dict(found)

"""Named tensors in one safetensors file, with a header that says what they are. Never a pickle."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from assay.io.publish import publish_file

SCHEMA = {"schema": "assay.tensors", "version": "1"}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors to ``path``, atomically: a reader sees the old file or the new one, whole."""
    write_with_header(path, tensors, SCHEMA)


def write_with_header(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write named tensors and a header of strings to ``path``, atomically.

    Raises:
        OSError: the disk is full, say; it names ``path``.
    """
    # Cloned, because the format refuses tensors that share memory.
    stored = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    with publish_file(path) as partial:
        try:
            save_file(stored, partial, metadata=header)
        except SafetensorError as error:
            system = re.search(r"os error ([0-9]+)", str(error))
            if system is None:
                raise
            raise OSError(int(system[1]), os.strerror(int(system[1])), str(path)) from error


def read_tensors(path: Path, *, any_schema: bool = False) -> dict[str, Tensor]:
    """Read every tensor of ``path`` onto the CPU.

    Args:
        path: a safetensors file.
        any_schema: accept a file that somebody else wrote (the user's own mu and sigma).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or one of another schema or version.
    """
    return read_with_header(path, None if any_schema else SCHEMA)[0]


def read_with_header(path: Path, wanted: dict[str, str] | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read every tensor of ``path`` onto the CPU, and its header, which must hold what is ``wanted`` of it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or one of another schema or version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; make it first, or correct the path")
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            if wanted is not None and not wanted.items() <= found.items():
                raise ValueError(
                    f"{path} is {found.get('schema')} version {found.get('version')}; this reader wants {wanted['schema']} version"
                    f" {wanted['version']}: make the file again with this version, or read it with the one that wrote it"
                )
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, found
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): make it again") from None


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of ``path``, from its header alone.

    Raises:
        ValueError: it is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): make it again") from None


def fingerprint_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()

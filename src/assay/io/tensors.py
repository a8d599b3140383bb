"""Named tensors in one safetensors file, with a header that says what they are and their checksum.
Never a pickle.
"""

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
from assay.io.strict_json import parse_json, shown

SCHEMA = {"schema": "assay.tensors", "version": "2"}
SHA256 = "sha256"
"""The header's name for the checksum of everything else in the file."""


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors to ``path``, atomically: a reader sees the old file or the new one,
    whole.
    """
    write_with_header(path, tensors, SCHEMA)


def write_with_header(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write named tensors, a header of strings and the checksum of both to ``path``, atomically.

    Raises:
        OSError: the disk is full, say; it names ``path``.
    """
    # Cloned, because the format refuses tensors that share memory.
    stored = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    with publish_file(path) as partial:
        try:
            save_file(stored, partial, metadata=header | {SHA256: _checksum(stored, header)})
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
        ValueError: it is no safetensors file, one of another schema or version, or one that was
            changed after it was written.
    """
    return read_with_header(path, None if any_schema else SCHEMA)[0]


def read_with_header(
    path: Path, wanted: dict[str, str] | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read every tensor of ``path`` onto the CPU, and its header, which must hold what is
    ``wanted`` of it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, one of another schema or version, or one that was
            changed after it was written.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; make it first, or correct the path")
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            if wanted is not None and not wanted.items() <= found.items():
                raise ValueError(
                    f"{path} is {shown(found.get('schema'))} version {shown(found.get('version'))};"
                    f" this reader wants {wanted['schema']} version {wanted['version']}: make the"
                    " file again with this version, or read it with the one that wrote it"
                )
            _check_keys(path)
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({shown(error)}): make it again"
        ) from None
    said = found.pop(SHA256, None)
    if (wanted is not None or said is not None) and said != (counted := _checksum(tensors, found)):
        raise ValueError(
            f"{path} has checksum {counted}, wanted {shown(said)}: it was changed after it was"
            " written; remove it, and the next run makes it again"
        )
    return tensors, found


def read_header(path: Path) -> dict[str, str]:
    """The header of a safetensors file, without its tensors; raises ValueError if it is none. No
    checksum is compared.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({shown(error)}): make it again"
        ) from None


def _check_keys(path: Path) -> None:
    """Raise ValueError where the header, JSON after its length in 8 bytes, names a tensor twice:
    which one is meant?
    """
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    try:
        parse_json(header)
    except ValueError as error:
        raise ValueError(
            f"{path} has a header that is no valid JSON ({error}): make it again"
        ) from None


def _checksum(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    """SHA-256 (hex) over tensors and header."""
    return hashlib.sha256(
        repr((fingerprint_tensors(tensors), sorted(header.items()))).encode()
    ).hexdigest()


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of ``path``, from its header alone.

    Raises:
        ValueError: it is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): make it again"
        ) from None


def fingerprint_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

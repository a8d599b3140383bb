"""Autoencoders on the Hugging Face Hub: `hf:owner/name[@revision][/subfolder]`."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from assay.io.hub import Address, commit_of, fetch_snapshot, is_address, parse_address
from assay.io.saes.locate import LAYOUTS

__all__ = ["Address", "fetch", "find", "is_address", "parse_address"]

_WEIGHTS = tuple(weights for weights, _, _ in LAYOUTS)
_KNOWN = tuple(dict.fromkeys([*_WEIGHTS, *(config for _, config, _ in LAYOUTS if config)]))
"""What is fetched of a folder: a repository may have a hundred autoencoders of gigabytes."""


def find(path: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """Where the files of an autoencoder lie on this machine, and their commit where they are from
    the Hub: those are fetched, or taken from its cache where there is no network.

    Raises:
        FileNotFoundError: they are neither in the cache nor to be reached, or the folder holds no
            autoencoder.
        ValueError: an address is none.
    """
    return fetch(os.fspath(path)) if is_address(path) else (Path(path), None)


@functools.cache
def fetch(typed: str) -> tuple[Path, str]:
    """The folder or file of an address in the Hub's cache, and its commit, 40 hexadecimal digits.
    Within a process an address stays what it was, whatever its branch becomes.

    Raises:
        FileNotFoundError: it is neither in the cache nor to be reached, or the folder holds no
            autoencoder.
        ValueError: it is no address.
    """
    address = parse_address(typed)
    snapshot = fetch_snapshot(typed, address, _patterns(address.inside))
    path = snapshot / address.inside
    # Not what lies below: of that the cache has what was fetched earlier, and nothing else.
    if not (path.is_file() or any((path / name).is_file() for name in _WEIGHTS)):
        raise FileNotFoundError(
            f"{typed}: found none of {', '.join(sorted(set(_WEIGHTS)))} in"
            f" {address.inside or 'its own folder'}, nor a file of that name; name the subfolder,"
            f" or the file\nwithout a network only what was fetched before is there: {path}"
        )
    return path, commit_of(typed, snapshot)


def _patterns(inside: str) -> list[str]:
    """The files that are wanted: of a folder those of the known names, and of a file itself with
    the configuration beside it.
    """
    if not inside:
        return list(_KNOWN)
    beside = inside.rpartition("/")[0]
    configs = {config for _, config, _ in LAYOUTS if config}
    return [
        inside,
        *(f"{inside}/{name}" for name in _KNOWN),
        *sorted(f"{beside}/{name}" if beside else name for name in configs),
    ]

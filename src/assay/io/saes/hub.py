"""Autoencoders on the Hugging Face Hub: `hf:owner/name[@revision][/subfolder]`."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path

from assay.io.saes.locate import LAYOUTS
from assay.io.strict_json import shown

PREFIX = "hf:"

_NAME = r"[\w-][\w.-]*"
_ADDRESS = re.compile(rf"({_NAME}/{_NAME})(?:@({_NAME}))?((?:/{_NAME})*)/?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")

_WEIGHTS = tuple(weights for weights, _, _ in LAYOUTS)
_KNOWN = tuple(dict.fromkeys([*_WEIGHTS, *(config for _, config, _ in LAYOUTS if config)]))
"""What is fetched of a folder: a repository may have a hundred autoencoders of gigabytes."""


@dataclass(frozen=True)
class Address:
    """A folder or file of a repository.

    Attributes:
        repository: owner and name.
        revision: branch, tag or commit; None: the default branch.
        inside: the folder or file in it; empty: the repository's own folder.
    """

    repository: str
    revision: str | None
    inside: str


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address on the Hub, and none of a disk."""
    return os.fspath(path).startswith(PREFIX)


def parse_address(typed: str) -> Address:
    """The parts of `hf:owner/name[@revision][/subfolder]`.

    Raises:
        ValueError: it is none.
    """
    found = _ADDRESS.fullmatch(typed.removeprefix(PREFIX))
    if not found:
        raise ValueError(
            f"found {typed!r}, wanted hf:owner/name, hf:owner/name@revision or either with"
            " /subfolder: a revision is a branch, a tag or a commit, without a slash"
        )
    return Address(found[1], found[2], found[3].strip("/"))


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
    snapshot = _fetch(typed, address)
    path = snapshot / address.inside
    # Not what lies below: of that the cache has what was fetched earlier, and nothing else.
    if not (path.is_file() or any((path / name).is_file() for name in _WEIGHTS)):
        raise FileNotFoundError(
            f"{typed}: found none of {', '.join(sorted(set(_WEIGHTS)))} in"
            f" {address.inside or 'its own folder'}, nor a file of that name; name the subfolder,"
            f" or the file\nwithout a network only what was fetched before is there: {path}"
        )
    if not _COMMIT.fullmatch(snapshot.name):
        raise ValueError(
            f"{typed}: found it in {snapshot}, wanted a folder that is named by its commit: clear"
            " the cache"
        )
    return path, snapshot.name


def _fetch(typed: str, address: Address) -> Path:
    """The folder of a commit in the cache, with what is wanted of it."""
    # Read when it is imported, so it comes first.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download

    reason: Exception | None = None
    for from_cache in (False, True):
        try:
            return Path(
                snapshot_download(
                    address.repository,
                    revision=address.revision,
                    allow_patterns=_patterns(address.inside),
                    local_files_only=from_cache,
                )
            )
        # The Hub's errors are of several libraries, by its version.
        except Exception as error:
            reason = reason or error
    said = shown((str(reason).strip().splitlines() or [""])[0])
    raise FileNotFoundError(
        f"{typed}: found neither in the cache of the Hub nor on the Hub; correct it, or fetch it"
        f" where there is a network\n{type(reason).__name__}: {said}"
    ) from reason


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

"""Files of the Hugging Face Hub: `hf:owner/name[@revision][/inside]`, fetched or from its cache."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from assay.io.strict_json import shown

PREFIX = "hf:"

_NAME = r"[\w-][\w.-]*"
_ADDRESS = re.compile(rf"({_NAME}/{_NAME})(?:@({_NAME}))?((?:/{_NAME})*)/?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


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


def fetch_snapshot(typed: str, address: Address, patterns: Sequence[str]) -> Path:
    """The folder of a commit in the Hub's cache, with the files of some patterns.

    Args:
        typed: the address, for messages.
        address: the same, parsed.
        patterns: globs of the files that are wanted.

    Raises:
        FileNotFoundError: it is neither in the cache nor to be reached.
    """
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
                    allow_patterns=list(patterns),
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


def commit_of(typed: str, snapshot: Path) -> str:
    """The commit of such a folder, 40 hexadecimal digits.

    Raises:
        ValueError: the folder is not named so.
    """
    if not _COMMIT.fullmatch(snapshot.name):
        raise ValueError(
            f"{typed}: found it in {snapshot}, wanted a folder that is named by its commit: clear"
            " the cache"
        )
    return snapshot.name

"""What files hold, told from samples of their bytes: a terabyte cannot be hashed before each run.

Neither times nor places count: files that were copied to another disk are the same files.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER_BYTES = 4 * 2**20
"""Read of all files of a folder together, where they are not very many."""

PAGE = 4096
PIECES = 16


def sample_bytes(n_files: int) -> int:
    """How much to read of each of so many files."""
    return max(PAGE, FOLDER_BYTES // max(1, n_files))


def sampled_digest(path: Path, most: int = FOLDER_BYTES, end: int | None = None) -> str:
    """SHA-256 (hex) of a file's bytes, or where they are more than ``most``, of pieces from the
    first to the last, or one in the middle.

    ``end`` is where to stop; what comes after is not read. Raises ValueError if the file
    cannot be read.
    """
    with _naming(path):
        size, touched = _touched(path)
        return _digest(path, most, size if end is None else min(end, size), touched)


def whole_digest(path: Path) -> str:
    """SHA-256 (hex) of all of a file's bytes, a gigabyte a second or so.

    Raises ValueError if the file cannot be read.
    """
    with _naming(path):
        return _digest_whole(path, _touched(path)[1])


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}; restore it") from error


def _touched(path: Path) -> tuple[int, tuple[int, ...]]:
    """The size of a file, and what changes whenever somebody touches it: until then it is read
    once, as the same file is asked for again and again.
    """
    status = path.stat()
    times = status.st_mtime_ns, status.st_ctime_ns
    return status.st_size, (status.st_dev, status.st_ino, status.st_size, *times)


@functools.lru_cache(maxsize=2**10)
def _digest_whole(path: Path, touched: tuple[int, ...]) -> str:
    del touched
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=2**16)
def _digest(path: Path, most: int, end: int, touched: tuple[int, ...]) -> str:
    del touched
    n_pieces = 1 if end <= most else max(1, min(PIECES, most // PAGE))
    piece = min(end, most // n_pieces)
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for number in range(n_pieces):
            # A single one from the middle: files begin alike.
            start = (end - piece) * number // (n_pieces - 1) if n_pieces > 1 else (end - piece) // 2
            digest.update(os.pread(descriptor, piece, start))
    finally:
        os.close(descriptor)
    return digest.hexdigest()

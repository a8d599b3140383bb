"""Codes that saev wrote: `token_acts.npz`, a CSR matrix of (tokens, features) as scipy saves it,
and `metrics.json` beside it.

The file is read as a stream, a few thousand rows at a time, and nothing in it is unpickled.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from assay.io.npy import NpyHeader, read_npy_header
from assay.io.strict_json import read_json_file, shown

CODES_NAME = "token_acts.npz"
METRICS_NAME = "metrics.json"

MAX_EXPANSION = 1024
"""Features a dimension: autoencoders have some 8 to 64."""
MAX_PADDED = 2**24
"""Entries of a batch with what pads it."""

DAMAGE = (zipfile.BadZipFile, zlib.error, KeyError, EOFError, ValueError, NotImplementedError)
"""What reading a file that is none, or was made to do harm, comes to."""


class SaevCodes:
    """Sparse codes of `n_rows` tokens over `n_features` features.

    Args:
        folder: saev's `<run>/inference/<shard hash>`, with `token_acts.npz` in it.
        n_rows: tokens of the shards that it is of.
        d_model: their width. Nothing is unpacked that is larger than these two allow.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no CSR matrix of so many rows of float32 or float64, or its parts
            disagree; while it is read, for indices that are no features, and values that are not
            finite.
    """

    format: Literal["sparse"] = "sparse"
    k: int | None = None

    def __init__(self, folder: Path, n_rows: int, d_model: int) -> None:
        self.n_rows = n_rows
        self._most_features = MAX_EXPANSION * d_model
        self.path = folder / CODES_NAME
        if not self.path.is_file():
            raise FileNotFoundError(
                f"{self.path} does not exist: run saev's inference on these shards, or correct the"
                " path"
            )
        try:
            with zipfile.ZipFile(self.path) as archive:
                self.n_features = self._check_headers(archive)
                with archive.open("indptr.npy") as file:
                    self._indptr = _read_array(file).astype(np.int64)
            n_entries = self._n_entries
            if (
                self._indptr[0] != 0
                or (np.diff(self._indptr) < 0).any()
                or self._indptr[-1] != n_entries
            ):
                raise ValueError(
                    f"indptr from {self._indptr[0]} to {self._indptr[-1]} and {n_entries} entries"
                    f" do not make a matrix of {self.n_rows} x {self.n_features}"
                )
        except DAMAGE as error:
            raise ValueError(
                f"{self.path}: {shown(error) or type(error).__name__}; wanted a CSR matrix as"
                " scipy.sparse.save_npz writes it"
            ) from error

    def batches(self, batch_size: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Rows from `start` on: `values` float32 and `indices` int64 (b, longest row), by falling
        magnitude, padded with 0.
        """
        with ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(self.path))
            files = [
                stack.enter_context(archive.open(name)) for name in ("indices.npy", "data.npy")
            ]
            kinds = [read_npy_header(file).dtype for file in files]
            for file, kind in zip(files, kinds, strict=True):
                _skip(file, int(self._indptr[start]) * kind.itemsize)
            for first, last in self._cut(start, batch_size):
                ends = self._indptr[first : last + 1]
                indices, values = (
                    np.frombuffer(_exactly(file, int(ends[-1] - ends[0]) * kind.itemsize), kind)
                    for file, kind in zip(files, kinds, strict=True)
                )
                yield self._pad(
                    first, np.diff(ends), indices.astype(np.int64), values.astype(np.float32)
                )

    def _cut(self, start: int, batch_size: int) -> Iterator[tuple[int, int]]:
        """First and last row of each batch, fewer rows where they are so long that padding them
        would fill the memory.
        """
        lengths = np.diff(self._indptr)
        while start < self.n_rows:
            stop = min(start + batch_size, self.n_rows)
            stop = min(stop, start + max(1, MAX_PADDED // max(1, int(lengths[start:stop].max()))))
            yield start, stop
            start = stop

    def _pad(
        self,
        first: int,
        lengths: npt.NDArray[np.int64],
        indices: npt.NDArray[np.int64],
        values: npt.NDArray[np.float32],
    ) -> dict[str, Tensor]:
        if len(indices) and not (indices.min() >= 0 and indices.max() < self.n_features):
            raise ValueError(
                f"{self.path}: rows from {first} on name features outside 0 to"
                f" {self.n_features - 1}: write it again"
            )
        if not np.isfinite(values).all():
            raise ValueError(
                f"{self.path}: rows from {first} on hold NaN or infinity, wanted finite codes:"
                " write it again"
            )
        rows = np.repeat(np.arange(len(lengths)), lengths)
        order = np.lexsort((indices, -np.abs(values), rows))
        place = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        shape = (len(lengths), int(lengths.max()) if len(lengths) else 0)
        padded, named = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
        padded[rows, place] = values[order]
        named[rows, place] = indices[order]
        return {"values": torch.from_numpy(padded), "indices": torch.from_numpy(named)}

    def _check_headers(self, archive: zipfile.ZipFile) -> int:
        """Check the beginnings of all arrays, and unpack only the smallest: how many features the
        matrix has.
        """
        found = {
            name: _header(archive, f"{name}.npy")
            for name in ("format", "shape", "indptr", "indices", "data")
        }
        kinds = {"format": "SU", "shape": "iu", "indptr": "iu", "indices": "iu", "data": "f"}
        for name, header in found.items():
            if header.dtype.kind not in kinds[name] or header.dtype.itemsize > 64:
                raise ValueError(f"{name}.npy of {header.dtype}")
        shapes = {name: header.shape for name, header in found.items()}
        if (shapes["format"], shapes["shape"]) != ((), (2,)):
            raise ValueError(
                f"format and shape of {shapes['format']} and {shapes['shape']} numbers"
            )
        with archive.open("format.npy") as file:
            kind = _read_array(file).tobytes().decode("latin-1").replace("\0", "")
        if kind != "csr":
            raise ValueError(f"a matrix of format {kind!r}")
        with archive.open("shape.npy") as file:
            n_rows, n_features = (int(size) for size in _read_array(file))
        if n_rows != self.n_rows or not 1 <= n_features <= self._most_features:
            raise ValueError(
                f"a matrix of {n_rows} x {n_features}, wanted {self.n_rows} rows, the tokens of the"
                f" shards, and 1 to {self._most_features} features"
            )
        (self._n_entries,) = shapes["data"]
        if (
            shapes["indptr"] != (n_rows + 1,)
            or shapes["indices"] != shapes["data"]
            or self._n_entries > n_rows * n_features
        ):
            raise ValueError(
                f"indptr, indices and data of {shapes['indptr']}, {shapes['indices']} and"
                f" {shapes['data']} entries do not make a matrix of {n_rows} x {n_features}"
            )
        return n_features


def read_metrics(folder: Path) -> dict[str, float]:
    """What the `metrics.json` of a folder says of the error, on the activations as saev read them.

    Returns:
        `sse_recon` = sum ||x - x^||^2 and `sse_baseline` = sum ||x - x_bar||^2, x_bar the mean of
        these very tokens; of an older saev `normalized_mse` alone, which is their ratio.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not say.
    """
    path = folder / METRICS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: run saev's inference on the validation shards, or correct the"
            " path"
        )
    metrics = read_json_file(path)
    try:
        names = ("sse_recon", "sse_baseline") if "sse_recon" in metrics else ("normalized_mse",)
        found = {name: float(metrics[name]) for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: {error!r}; wanted `sse_recon` and `sse_baseline`, or `normalized_mse`"
        ) from error
    for name, value in found.items():
        if not (math.isfinite(value) and value >= 0) or (name == "sse_baseline" and value == 0):
            least = "above 0" if name == "sse_baseline" else "of at least 0"
            raise ValueError(f"{path}: found {name} {value}, wanted a finite number {least}")
    return found


def _header(archive: zipfile.ZipFile, name: str) -> NpyHeader:
    with archive.open(name) as file:
        return read_npy_header(file)


def _read_array(file: IO[bytes]) -> npt.NDArray[Any]:
    header = read_npy_header(file)
    n_bytes = header.dtype.itemsize * math.prod(header.shape)
    return np.frombuffer(_exactly(file, n_bytes), header.dtype).reshape(header.shape)


def _skip(file: IO[bytes], n_bytes: int) -> None:
    while n_bytes > 0:
        n_bytes -= len(_exactly(file, min(n_bytes, 1 << 24)))


def _exactly(file: IO[bytes], n_bytes: int) -> bytes:
    try:
        found = file.read(n_bytes)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{getattr(file, 'name', 'it')} is damaged ({error}): write it again"
        ) from error
    if len(found) != n_bytes:
        raise ValueError(f"{getattr(file, 'name', 'it')} is cut short: write it again")
    return found

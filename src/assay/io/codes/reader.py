"""Codes read back from a folder of `io/codes/layout.py`, a batch at a time, checked as they are
read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from assay.codes import Format
from assay.io.codes.layout import (
    REMEDY,
    SCHEMA,
    SHARDS,
    VERSION,
    CodesMetadata,
    CodesShard,
    Dtype,
    check_numbers,
    check_shard,
    file_name,
    read_json,
    validated,
)
from assay.io.strict_json import shown

LESS = "read fewer rows at once, or encode the patches again"


class StoredCodes:
    """Codes in a folder that `write_codes` left. Opening reads the two JSON files and the sizes of
    the others.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: another schema or version, or files that are not as long as the metadata says.
    """

    fallback = None
    rounded = None

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        raw = read_json(self.path, "metadata.json")
        found = (
            (raw.get("schema_name"), raw.get("version"))
            if isinstance(raw, dict)
            else (type(raw).__name__, None)
        )
        if found != (SCHEMA, VERSION):
            raise ValueError(
                f"{self.path} holds {shown(found[0])} version {shown(found[1])}; this reader wants"
                f" {SCHEMA} version {VERSION}: encode the patches again with this version, or read"
                " them with the one that wrote them"
            )
        self.metadata = validated(self.path / "metadata.json", TypeAdapter(CodesMetadata), raw)
        index = self.path / "shards.json"
        self.shards = validated(index, SHARDS, read_json(self.path, index.name))
        rows = sum(shard.rows for shard in self.shards)
        if rows != self.n_rows:
            raise ValueError(
                f"{self.path}: shards.json has {rows} rows, metadata.json {self.n_rows}: encode the"
                " patches again"
            )
        for number, shard in enumerate(self.shards):
            check_shard(self.path, self.metadata, number, shard)

    @property
    def format(self) -> Format:
        """How a batch holds the codes."""
        return self.metadata.format

    @property
    def n_rows(self) -> int:
        """Rows in all files."""
        return self.metadata.n_rows

    @property
    def n_features(self) -> int:
        """Columns of the codes."""
        return self.metadata.n_features

    @property
    def k(self) -> int | None:
        """Entries per row; None where sparse rows vary in length."""
        return self.metadata.k

    @property
    def dtype(self) -> Dtype:
        """Of the values on disk."""
        return self.metadata.dtype

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where the codes come from, as their writer noted it."""
        return self.metadata.provenance

    @property
    def made_from(self) -> str:
        """What the files held when they were written."""
        return json.dumps([shard.sha256 for shard in self.shards], sort_keys=True)

    def batches(self, batch_size: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Yield the rows from ``start`` on, in order, ``batch_size`` at a time (fewer at a shard's
        end).

        Values are float32, indices int64, error float64. Rows that vary in length are padded with
        value 0 and index 0 to the longest of the batch. Every shard that is read to its last row is
        checked against its SHA-256 before its last batch is given out, that which ``start`` lies in
        as well: what comes before is read, and dropped.

        Raises:
            FileNotFoundError: a file has gone since the folder was opened.
            ValueError: one has been cut or changed since it was written, or holds a number that is
                not finite or an index that is no feature.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: wanted at least 1")
        if not 0 <= start <= self.n_rows:
            raise ValueError(f"start is {start}: wanted 0 to {self.n_rows}, the rows")
        return self._batches(batch_size, start)

    def _batches(self, batch_size: int, start: int) -> Iterator[dict[str, Tensor]]:
        for number, shard in enumerate(self.shards):
            if start < shard.rows:
                with _ShardReader(self.path, self.metadata, number, shard, start) as reader:
                    for first in range(start, shard.rows, batch_size):
                        yield reader.read(min(batch_size, shard.rows - first))
            start = max(0, start - shard.rows)


def _open(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be opened: {error.strerror or error}; {REMEDY}") from error


class _ShardReader:
    """The open files of one shard, hashed as they are read."""

    def __init__(
        self, folder: Path, metadata: CodesMetadata, number: int, shard: CodesShard, start: int
    ) -> None:
        self._metadata = metadata
        self._shard = shard
        self._row = start
        self._digests = {name: hashlib.sha256() for name in metadata.arrays}
        with ExitStack() as opened:
            self._files: dict[str, BufferedReader] = {
                name: opened.enter_context(_open(folder / file_name(name, number)))
                for name in metadata.arrays
            }
            self._lengths = self._read_lengths() if metadata.k is None else None
            entries = (
                start * metadata.k
                if metadata.k is not None
                else int(self._entries_of(0, start).sum())
            )
            for name in self._files:
                if name != "lengths":
                    self._pass_over(name, metadata.n_bytes(name, start, entries))
            self._open = opened.pop_all()

    def __enter__(self) -> _ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(self, rows: int) -> dict[str, Tensor]:
        """The next rows, which must be there."""
        lengths = None if self._lengths is None else self._entries_of(self._row, rows)
        entries = rows * (self._metadata.k or 0) if lengths is None else int(lengths.sum())
        where = f", rows {self._row} to {self._row + rows - 1}"
        batch = {
            name: self._take(name, rows, entries, where)
            for name in self._metadata.arrays
            if name != "lengths"
        }
        self._row += rows
        if self._row == self._shard.rows:
            for name in self._digests:
                self._check_sum(name)
        if lengths is None:
            return {
                name: tensor.reshape(self._metadata.shape(name, rows))
                for name, tensor in batch.items()
            }
        filled = torch.arange(int(lengths.max())) < lengths[:, None]
        for name in ("values", "indices"):
            batch[name] = torch.zeros(filled.shape, dtype=batch[name].dtype).masked_scatter_(
                filled, batch[name]
            )
        return batch

    def _entries_of(self, row: int, rows: int) -> Tensor:
        assert self._lengths is not None
        return self._lengths[row : row + rows]

    def _read_lengths(self) -> Tensor:
        """Entries of each row of the shard, int64 (rows,)."""
        lengths = self._load("lengths", self._shard.rows, 0).long()
        self._check_sum("lengths")
        n_features = self._metadata.n_features
        if (
            (lengths < 0).any()
            or (lengths > n_features).any()
            or int(lengths.sum()) != self._shard.entries
        ):
            raise ValueError(
                f"{self._files['lengths'].name}: lengths {int(lengths.min())} to"
                f" {int(lengths.max())}, in all {int(lengths.sum())}; wanted 0 to {n_features}, in"
                f" all {self._shard.entries}: encode the patches again"
            )
        return lengths

    def _take(self, name: str, rows: int, entries: int, where: str) -> Tensor:
        tensor = self._load(name, rows, entries)
        tensor = (
            tensor.long() if name == "indices" else tensor.float() if name == "values" else tensor
        )
        check_numbers(name, tensor, self._metadata.n_features, self._files[name].name + where)
        return tensor

    def _pass_over(self, name: str, n_bytes: int) -> None:
        """Read bytes for nothing but their checksum."""
        while n_bytes > 0:
            try:
                raw = self._files[name].read(min(n_bytes, 2**20))
            except OSError as error:
                raise ValueError(
                    f"{self._files[name].name} cannot be read: {error.strerror or error}; {REMEDY}"
                ) from error
            if not raw:
                return  # it was cut, as reading on will say
            self._digests[name].update(raw)
            n_bytes -= len(raw)

    def _load(self, name: str, rows: int, entries: int) -> Tensor:
        dtype, file = self._metadata.stored_dtype(name), self._files[name]
        wanted = self._metadata.n_bytes(name, rows, entries)
        try:
            raw = bytearray(wanted)
            found = file.readinto(raw)
        except OSError as error:
            raise ValueError(
                f"{file.name} cannot be read: {error.strerror or error}; {REMEDY}"
            ) from error
        except MemoryError:
            raise ValueError(
                f"{file.name}: {rows} rows are {wanted} bytes, more than there is memory: {LESS}"
            ) from None
        if found != wanted:
            raise ValueError(f"{file.name} ended early: it was cut while it was read; {REMEDY}")
        self._digests[name].update(raw)
        array = np.frombuffer(raw, dtype)
        tensor = torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))
        return (
            tensor.view(torch.bfloat16)
            if name == "values" and self._metadata.dtype == "bfloat16"
            else tensor
        )

    def _check_sum(self, name: str) -> None:
        found, wanted = self._digests[name].hexdigest(), self._shard.sha256[name]
        if found != wanted:
            raise ValueError(
                f"{self._files[name].name} has SHA-256 {found}, wanted {wanted}: it was changed"
                " after it was written; encode the patches again"
            )

"""Codes on disk: one folder for an encoding of the patches of one shard folder.

::

    <inference>/<shard hash>/<encoding>/<layer>/
        metadata.json          schema and version, format, shapes, and where the codes come from
        shards.json            a row a shard: rows, bytes, SHA-256, and how many features are used how often
        values000000.bin       float32 little-endian: (rows, n_features) dense, (rows, k) sparse, none for one-hot
        indices000000.bin      int32 little-endian: (rows, k) sparse, (rows,) one-hot, none for dense
        error000000.bin        float32 little-endian, (rows,): squared reconstruction error of each row, standardised space

``format`` is ``dense``, ``sparse`` (k entries a row, by falling magnitude) or ``onehot``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from torch import Tensor

from assay.io.publish import publishing_folder

SCHEMA = "assay.codes"
VERSION = 1
ARRAYS = {"dense": ("values", "error"), "sparse": ("values", "indices", "error"), "onehot": ("indices", "error")}
DTYPES = {"values": np.dtype("<f4"), "indices": np.dtype("<i4"), "error": np.dtype("<f4")}


class Codes(Protocol):
    """What is written: batches of named tensors in row order, and where they come from (JSON scalars)."""

    @property
    def format(self) -> Literal["dense", "sparse", "onehot"]: ...
    @property
    def n_rows(self) -> int: ...
    @property
    def n_features(self) -> int: ...
    @property
    def provenance(self) -> Mapping[str, Any]: ...
    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]: ...


class CodesMetadata(BaseModel):
    """``metadata.json`` of a folder of codes."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    schema_name: str
    version: int
    format: Literal["dense", "sparse", "onehot"]
    n_rows: NonNegativeInt
    n_features: PositiveInt
    k: PositiveInt = Field(description="entries a row: n_features dense, k sparse, 1 one-hot")
    dtype: Literal["float32"] = "float32"
    provenance: dict[str, Any] = Field(description="encoding, layer, shard hash, model fingerprint, parameters, seed")


class CodesShard(BaseModel):
    """A row of ``shards.json``."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    rows: PositiveInt
    bytes: PositiveInt
    sha256: dict[str, str]
    utilisation: list[int] = Field(description="features nonzero in 0, 1, 2-3, 4-7, ... rows of the shard")


def write_codes(path: Path, codes: Codes, *, batch_size: int, rows_per_shard: int = 2**20) -> None:
    """Stream ``codes`` into the folder ``path``, which appears whole or not at all and replaces an older one.

    Args:
        path: the folder.
        codes: what to write; every batch carries ``error`` (rows,).
        batch_size: rows held in memory at once.
        rows_per_shard: rows a ``.bin`` file at the most, rounded down to whole batches.
    """
    batches_per_shard = max(1, rows_per_shard // batch_size)
    shards: list[CodesShard] = []
    k = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    with publishing_folder(path, replace=True) as folder:
        batches = codes.batches(batch_size)
        written = 0
        while written < codes.n_rows:
            writer = _ShardWriter(folder, len(shards), codes.format, codes.n_features)
            with writer:
                for _, batch in zip(range(batches_per_shard), batches, strict=False):
                    k = writer.write(batch)
            if writer.rows == 0:
                raise ValueError(f"{path}: the codes ended after {written} rows; {codes.n_rows} were promised")
            written += writer.rows
            shards.append(writer.summary())
        metadata = CodesMetadata(
            schema_name=SCHEMA,
            version=VERSION,
            format=codes.format,
            n_rows=codes.n_rows,
            n_features=codes.n_features,
            k=k,
            provenance=dict(codes.provenance),
        )
        (folder / "shards.json").write_text(json.dumps([shard.model_dump() for shard in shards], indent=1))
        (folder / "metadata.json").write_text(metadata.model_dump_json(indent=1))


class _ShardWriter:
    """The open files of one shard, hashed and counted as they are written."""

    def __init__(self, folder: Path, number: int, format_: str, n_features: int) -> None:
        self.rows = 0
        self._names = ARRAYS[format_]
        self._files: dict[str, BinaryIO] = {
            name: (folder / f"{name}{number:06d}.bin").open("wb") for name in self._names
        }
        self._digests = {name: hashlib.sha256() for name in self._names}
        self._bytes = 0
        self._used = torch.zeros(n_features, dtype=torch.int64)

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def write(self, batch: Mapping[str, Tensor]) -> int:
        for name in self._names:
            data = batch[name].cpu().numpy().astype(DTYPES[name]).tobytes()
            self._files[name].write(data)
            self._digests[name].update(data)
            self._bytes += len(data)
        self._used += _used(batch, len(self._used))
        self.rows += len(batch["error"])
        widest = batch.get("values", batch["error"])
        return widest.shape[1] if widest.ndim == 2 else 1

    def summary(self) -> CodesShard:
        octaves = torch.zeros_like(self._used)
        used = self._used > 0
        octaves[used] = self._used[used].double().log2().floor().long() + 1
        return CodesShard(
            rows=self.rows,
            bytes=self._bytes,
            sha256={name: digest.hexdigest() for name, digest in self._digests.items()},
            utilisation=torch.bincount(octaves).tolist(),
        )


def _used(batch: Mapping[str, Tensor], n_features: int) -> Tensor:
    """In how many rows of the batch each feature is nonzero, int64 (n_features,)."""
    if "indices" not in batch:
        return (batch["values"] != 0).sum(dim=0).cpu()
    indices = batch["indices"]
    if "values" in batch:
        indices = indices[batch["values"] != 0]
    return torch.bincount(indices.reshape(-1).cpu(), minlength=n_features)


class StoredCodes:
    """Codes read back from a folder, a batch at a time.

    Args:
        path: a folder that :func:`write_codes` left.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: another schema or version, or files that are not as long as the metadata says.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        raw = _read_json(self.path / "metadata.json")
        if not isinstance(raw, dict) or (raw.get("schema_name"), raw.get("version")) != (SCHEMA, VERSION):
            found = (raw.get("schema_name"), raw.get("version")) if isinstance(raw, dict) else type(raw).__name__
            raise ValueError(
                f"{self.path} holds {found}; this reader wants {SCHEMA} version {VERSION}: encode the patches again"
                " with this version, or read them with the one that wrote them"
            )
        try:
            self.metadata = CodesMetadata.model_validate(raw)
            self.shards = [CodesShard.model_validate(shard) for shard in _read_json(self.path / "shards.json")]
        except (ValidationError, TypeError) as error:
            raise ValueError(f"{self.path}: {error}: encode the patches again") from None
        self._check_sizes()

    @property
    def format(self) -> Literal["dense", "sparse", "onehot"]:
        return self.metadata.format

    @property
    def n_rows(self) -> int:
        return self.metadata.n_rows

    @property
    def n_features(self) -> int:
        return self.metadata.n_features

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self.metadata.provenance

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Yield the rows in order, ``batch_size`` at a time (fewer at a shard's end): values float32, indices int64, error float32."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: wanted at least 1")
        return self._batches(batch_size)

    def _batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        for number, shard in enumerate(self.shards):
            for start in range(0, shard.rows, batch_size):
                rows = min(batch_size, shard.rows - start)
                yield {name: self._read(name, number, start, rows) for name in ARRAYS[self.format]}

    def _read(self, name: str, number: int, start: int, rows: int) -> Tensor:
        dtype, width = DTYPES[name], self._width(name)
        file = self._file(name, number)
        array = np.fromfile(file, dtype, rows * width, offset=start * width * dtype.itemsize)
        if len(array) != rows * width:
            raise ValueError(f"{file} ended early: it was cut while it was read; encode the patches again")
        tensor = torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))
        tensor = tensor.long() if name == "indices" else tensor
        return tensor if self._shape(name) == () else tensor.reshape(rows, width)

    def _check_sizes(self) -> None:
        rows = sum(shard.rows for shard in self.shards)
        if rows != self.n_rows:
            raise ValueError(
                f"{self.path}: shards.json has {rows} rows, metadata.json {self.n_rows}: encode the patches again"
            )
        for number, shard in enumerate(self.shards):
            for name in ARRAYS[self.format]:
                file = self._file(name, number)
                if not file.is_file():
                    raise FileNotFoundError(
                        f"{file}: no such file, but {self.path}/shards.json lists it: encode the patches again"
                    )
                wanted = shard.rows * self._width(name) * DTYPES[name].itemsize
                if file.stat().st_size != wanted:
                    raise ValueError(
                        f"{file} has {file.stat().st_size} bytes; wanted {wanted}: encode the patches again"
                    )

    def _file(self, name: str, number: int) -> Path:
        return self.path / f"{name}{number:06d}.bin"

    def _shape(self, name: str) -> tuple[int, ...]:
        return () if name == "error" or self.format == "onehot" else (self.metadata.k,)

    def _width(self, name: str) -> int:
        return int(np.prod(self._shape(name), dtype=int))


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; wanted a folder of codes, as the `encode` pipeline leaves it")
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON ({error}): encode the patches again") from None

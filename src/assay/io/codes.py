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
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from torch import Tensor

from assay.io.publish import publishing_folder

SCHEMA = "assay.codes"
VERSION = 1
ARRAYS = {"dense": ("values", "error"), "sparse": ("values", "indices", "error"), "onehot": ("indices", "error")}
DTYPES = {"values": np.dtype("<f4"), "indices": np.dtype("<i4"), "error": np.dtype("<f4")}

Format = Literal["dense", "sparse", "onehot"]
Arrays = dict[str, npt.NDArray[Any]]
T = TypeVar("T")


class Codes(Protocol):
    """What is written: batches of named tensors in row order, and where they come from (JSON scalars)."""

    @property
    def format(self) -> Format: ...
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
    format: Format
    n_rows: NonNegativeInt
    n_features: PositiveInt
    k: PositiveInt = Field(description="entries a row: n_features dense, k sparse, 1 one-hot")
    dtype: Literal["float32"] = "float32"
    provenance: dict[str, str | int | FiniteFloat | bool | None] = Field(
        description="encoding, layer, shard hash, model fingerprint, parameters, seed"
    )

    @model_validator(mode="after")
    def _k_fits(self) -> CodesMetadata:
        most = 1 if self.format == "onehot" else self.n_features
        least = 1 if self.format == "sparse" else most
        if not least <= self.k <= most:
            raise ValueError(
                f"k is {self.k}; wanted {least} to {most}: {self.format} codes, {self.n_features} features"
            )
        return self

    def shape(self, name: str, rows: int) -> tuple[int, ...]:
        """Of ``rows`` rows of an array."""
        return (rows,) if name == "error" or self.format == "onehot" else (rows, self.k)


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

    Raises:
        ValueError: there are more or fewer rows than the codes promise, or a batch lacks an array, or holds one of another
            shape, a number that is not finite, or an index that is no feature. An older folder then stays as it was.
    """
    for name, size in (("batch_size", batch_size), ("rows_per_shard", rows_per_shard)):
        if size < 1:
            raise ValueError(f"{name} is {size}: wanted at least 1")
    batch_size = min(batch_size, rows_per_shard)
    stream = codes.batches(batch_size)
    head = list(islice(stream, 1))
    metadata = CodesMetadata(
        schema_name=SCHEMA,
        version=VERSION,
        format=codes.format,
        n_rows=codes.n_rows,
        n_features=codes.n_features,
        k=_entries(codes, head),
        provenance=dict(codes.provenance),
    )
    shards: list[CodesShard] = []
    with publishing_folder(path, replace=True) as folder:
        batches = _stored_batches(path, metadata, chain(head, stream))
        while first := next(batches, None):
            with _ShardWriter(folder, len(shards), metadata) as writer:
                for arrays in chain([first], islice(batches, rows_per_shard // batch_size - 1)):
                    writer.write(arrays)
            shards.append(writer.summary())
        summaries = json.dumps([shard.model_dump() for shard in shards], indent=1)
        (folder / "shards.json").write_text(summaries, encoding="utf-8")
        (folder / "metadata.json").write_text(metadata.model_dump_json(indent=1), encoding="utf-8")


def _entries(codes: Codes, head: list[dict[str, Tensor]]) -> int:
    """How many entries a row has; sparse codes say it by their first batch."""
    if codes.format == "sparse" and head and "values" in head[0]:
        return head[0]["values"].shape[-1]
    return codes.n_features if codes.format == "dense" else 1


def _stored_batches(path: Path, metadata: CodesMetadata, batches: Iterable[dict[str, Tensor]]) -> Iterator[Arrays]:
    """Batches checked and as the files hold them, without those that have no rows."""
    n_rows = 0
    for batch in batches:
        lacking = [name for name in ARRAYS[metadata.format] if name not in batch]
        if lacking:
            raise ValueError(f"{path}: {metadata.format} codes came as {sorted(batch)}; wanted {lacking[0]} as well")
        rows = len(batch["error"])
        where = f"{path}: rows {n_rows} to {n_rows + rows - 1} of the codes"
        n_rows += rows
        if n_rows > metadata.n_rows:
            raise ValueError(f"{where} came, but {metadata.n_rows} rows were promised: correct either")
        arrays = {name: _stored(name, batch[name], metadata, rows, where) for name in ARRAYS[metadata.format]}
        if rows:
            yield arrays
    if n_rows < metadata.n_rows:
        raise ValueError(f"{path}: the codes ended after {n_rows} rows; {metadata.n_rows} were promised")


def _stored(name: str, tensor: Tensor, metadata: CodesMetadata, rows: int, where: str) -> npt.NDArray[Any]:
    wanted = metadata.shape(name, rows)
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{where}: {name} has shape {tuple(tensor.shape)}; wanted {wanted}")
    tensor = tensor.detach().to("cpu", torch.int64 if name == "indices" else torch.float32)
    _check_numbers(name, tensor, metadata.n_features, where)
    return np.ascontiguousarray(tensor.numpy(), dtype=DTYPES[name])


def _check_numbers(name: str, tensor: Tensor, n_features: int, where: str) -> None:
    """Raise ValueError for an index that is no feature, or a value that is not finite."""
    if name != "indices":
        if not tensor.isfinite().all():
            raise ValueError(f"{where}: {name} holds a NaN or an infinity; wanted finite numbers: encode again")
    elif ((tensor < 0) | (tensor >= n_features)).any():
        low, high = int(tensor.min()), int(tensor.max())
        raise ValueError(f"{where}: indices are {low} to {high}; wanted 0 to {n_features - 1}: encode again")


class _ShardWriter:
    """The open files of one shard, hashed and counted as they are written."""

    def __init__(self, folder: Path, number: int, metadata: CodesMetadata) -> None:
        names = ARRAYS[metadata.format]
        self._files: dict[str, BinaryIO] = {name: (folder / _file_name(name, number)).open("wb") for name in names}
        self._digests = {name: hashlib.sha256() for name in names}
        self._rows = 0
        self._bytes = 0
        self._used = np.zeros(metadata.n_features, dtype=np.int64)

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def write(self, arrays: Arrays) -> None:
        for name, array in arrays.items():
            self._files[name].write(array.data)
            self._digests[name].update(array.data)
            self._bytes += array.nbytes
        self._rows += len(arrays["error"])
        self._used += _used(arrays, len(self._used))

    def summary(self) -> CodesShard:
        octaves = np.frexp(self._used)[1]  # 0, 1, 2-3, 4-7, ... are 0, 1, 2, 3, ...
        return CodesShard(
            rows=self._rows,
            bytes=self._bytes,
            sha256={name: digest.hexdigest() for name, digest in self._digests.items()},
            utilisation=np.bincount(octaves).tolist(),
        )


def _used(arrays: Arrays, n_features: int) -> npt.NDArray[np.int64]:
    """In how many rows of the batch each feature is nonzero, int64 (n_features,)."""
    if "indices" not in arrays:
        return np.asarray(np.count_nonzero(arrays["values"], axis=0))
    indices = arrays["indices"]
    if "values" in arrays:
        indices = indices[arrays["values"] != 0]
    return np.bincount(indices.reshape(-1), minlength=n_features)


def _file_name(name: str, number: int) -> str:
    return f"{name}{number:06d}.bin"


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
        found = (raw.get("schema_name"), raw.get("version")) if isinstance(raw, dict) else (type(raw).__name__, None)
        if found != (SCHEMA, VERSION):
            raise ValueError(
                f"{self.path} holds {found[0]} version {found[1]}; this reader wants {SCHEMA} version {VERSION}: encode the"
                " patches again with this version, or read them with the one that wrote them"
            )
        self.metadata = _validated(self.path / "metadata.json", TypeAdapter(CodesMetadata), raw)
        index = self.path / "shards.json"
        self.shards = _validated(index, TypeAdapter(list[CodesShard]), _read_json(index))
        self._check_sizes()

    @property
    def format(self) -> Format:
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
        """Yield the rows in order, ``batch_size`` at a time (fewer at a shard's end): float32, indices int64.

        Raises:
            FileNotFoundError: a file has gone since the folder was opened.
            ValueError: one has been cut since, or holds a number that is not finite or an index that is no feature.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: wanted at least 1")
        return self._batches(batch_size)

    def _batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        for number, shard in enumerate(self.shards):
            for start in range(0, shard.rows, batch_size):
                rows = min(batch_size, shard.rows - start)
                yield {name: self._read(name, number, start, rows) for name in ARRAYS[self.format]}

    def _read(self, name: str, number: int, start: int, rows: int) -> Tensor:
        dtype, shape = DTYPES[name], self.metadata.shape(name, rows)
        file = self.path / _file_name(name, number)
        array = np.fromfile(file, dtype, math.prod(shape), offset=self._bytes(name, start))
        if array.size != math.prod(shape):
            raise ValueError(f"{file} ended early: it was cut while it was read; encode the patches again")
        tensor = torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False)).reshape(shape)
        _check_numbers(name, tensor, self.n_features, f"{file}, rows {start} to {start + rows - 1}")
        return tensor.long() if name == "indices" else tensor

    def _bytes(self, name: str, rows: int) -> int:
        return math.prod(self.metadata.shape(name, rows)) * DTYPES[name].itemsize

    def _check_sizes(self) -> None:
        rows = sum(shard.rows for shard in self.shards)
        if rows != self.n_rows:
            raise ValueError(
                f"{self.path}: shards.json has {rows} rows, metadata.json {self.n_rows}: encode the patches again"
            )
        for number, shard in enumerate(self.shards):
            for name in ARRAYS[self.format]:
                file, wanted = self.path / _file_name(name, number), self._bytes(name, shard.rows)
                if not file.is_file():
                    raise FileNotFoundError(
                        f"{file}: no such file, but {self.path}/shards.json lists it: encode the patches again"
                    )
                if file.stat().st_size != wanted:
                    raise ValueError(
                        f"{file} has {file.stat().st_size} bytes; wanted {wanted}: encode the patches again"
                    )


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; wanted a folder of codes, as the `encode` pipeline leaves it")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON ({error}): encode the patches again") from None


def _validated(path: Path, wanted: TypeAdapter[T], raw: Any) -> T:
    try:
        return wanted.validate_python(raw)
    except ValidationError as error:
        raise ValueError(f"{path}: {error}: encode the patches again") from None

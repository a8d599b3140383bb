"""Codes on disk: one folder for an encoding of the patches of one shard folder.

::

    <inference>/<shard hash>/<encoding>/<layer>/
        metadata.json          schema and version, format, shapes, dtype, and where the codes come
        from shards.json            a row per shard: rows, entries, bytes, SHA-256 of each file, and
        how many features are used how often values000000.bin       float32, float16 or bfloat16
        (its 16 bits): (rows, n_features) dense, (entries,) sparse, none for one-hot
        indices000000.bin      int32: (entries,) sparse, (rows,) one-hot, none for dense
        lengths000000.bin      int32, (rows,): entries of each row, for sparse codes whose rows vary
        in length error000000.bin        float64, (rows,): squared reconstruction error of each row,
        standardized space

All numbers are little-endian. ``format`` is ``dense``, ``sparse`` (entries by falling magnitude;
``k`` per row, or ``k`` is null and rows vary) or ``onehot``. So the first K entries of the rows of
top-K codes are top-K codes for every smaller K.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from torch import Tensor

from assay.codes import Codes, Format
from assay.io.files import contained_file, read_json_bytes
from assay.io.shards.metadata import explain
from assay.io.strict_json import parse_json

SCHEMA = "assay.codes"
VERSION = 2

Dtype = Literal["float32", "float16", "bfloat16"]
T = TypeVar("T")

FIXED_DTYPES: dict[str, np.dtype[Any]] = {
    "indices": np.dtype("<i4"),
    "lengths": np.dtype("<i4"),
    "error": np.dtype("<f8"),
}
# numpy has no bfloat16: its bits are kept as uint16.
VALUES_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class SourcedCodes(Codes, Protocol):
    """What is written: codes, and where they come from."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where the codes come from, JSON scalars, written into their metadata."""

    @property
    def made_from(self) -> str:
        """What tells the codes from others of the same provenance, those of files that have changed
        since, say; it is never written down.
        """

    @property
    def fallback(self) -> Callable[[], SourcedCodes] | None:
        """Makes a sparser form of the codes, for a disk that is too small for them; None: there is
        none.
        """

    @property
    def rounded(self) -> Callable[[torch.dtype], SourcedCodes] | None:
        """Makes the codes with the error that goes with values rounded to a dtype; None: it is the
        same.
        """


REMEDY = "encode the patches again"

# int32 holds every index and every number of entries; more rows than this are a mistake, and
# numbers of any size are costly.
Width = Annotated[int, Field(ge=1, le=2**31 - 1)]
Rows = Annotated[int, Field(ge=0, le=2**40)]


class CodesMetadata(BaseModel):
    """``metadata.json`` of a folder of codes."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    schema_name: str
    version: int
    format: Format
    n_rows: Rows
    n_features: Width
    k: Width | None = Field(
        description="entries per row: n_features dense, 1 one-hot; null: sparse rows vary"
    )
    dtype: Dtype = Field(description="of the values")
    provenance: dict[str, str | int | FiniteFloat | bool | None] = Field(
        description=(
            "encoding, layer, shard hash, fingerprints of model and statistics, parameters, seed"
        )
    )

    @model_validator(mode="after")
    def _k_fits(self) -> CodesMetadata:
        most = 1 if self.format == "onehot" else self.n_features
        least = 1 if self.format == "sparse" else most
        if self.k is None and self.format == "sparse":
            return self
        if self.k is None or not least <= self.k <= most:
            raise ValueError(
                f"k is {self.k}; wanted {least} to {most}: {self.format} codes, {self.n_features}"
                " features"
            )
        return self

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of a shard's files, as a batch names its tensors."""
        if self.format == "dense":
            return ("values", "error")
        if self.format == "onehot":
            return ("indices", "error")
        return (
            ("values", "indices", "error")
            if self.k is not None
            else ("lengths", "values", "indices", "error")
        )

    def stored_dtype(self, name: str) -> np.dtype[Any]:
        """Of an array on disk."""
        return VALUES_DTYPES[self.dtype] if name == "values" else FIXED_DTYPES[name]

    def shape(self, name: str, rows: int) -> tuple[int, ...]:
        """Of ``rows`` rows of an array in a batch; -1 for the longest where lengths vary."""
        if name in ("error", "lengths") or self.format == "onehot":
            return (rows,)
        return (rows, -1 if self.k is None else self.k)

    def n_bytes(self, name: str, rows: int, entries: int) -> int:
        """Of an array's file that holds so many rows and entries."""
        return (rows if name in ("error", "lengths") else entries) * self.stored_dtype(
            name
        ).itemsize

    def predict_bytes(self, mean_entries: float) -> int:
        """Of all files of arrays, were rows to have so many entries in the mean."""
        entries = int(np.ceil(self.n_rows * mean_entries))
        return sum(self.n_bytes(name, self.n_rows, entries) for name in self.arrays)


class CodesShard(BaseModel):
    """A row of ``shards.json``."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    rows: Annotated[Rows, Field(ge=1)]
    entries: NonNegativeInt = Field(
        description="stored values, or indices where there are no values"
    )
    bytes: PositiveInt
    sha256: dict[str, str]
    # Codes written before the key was spelled so are as good, and take days to write again.
    utilization: list[NonNegativeInt] = Field(
        validation_alias=AliasChoices("utilization", "utilisation"),
        description="features nonzero in 0, 1, 2-3, 4-7, ... rows of the shard",
    )


SHARDS = TypeAdapter(Annotated[list[CodesShard], FailFast()])


def file_name(name: str, number: int) -> str:
    """Of an array of a shard."""
    return f"{name}{number:06d}.bin"


def read_json(folder: Path, name: str) -> Any:
    """What a JSON file of at most 64 MiB in ``folder`` holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is too large, no JSON, or lies elsewhere.
    """
    raw = read_json_bytes(
        folder, name, f"wanted a folder of codes, as the `encode` pipeline leaves it: {REMEDY}"
    )
    try:
        return parse_json(raw)
    except ValueError as error:
        raise ValueError(f"{folder / name} is no valid JSON ({error}): {REMEDY}") from None


def validated(path: Path, wanted: TypeAdapter[T], raw: Any) -> T:
    """``raw`` as it is wanted; ValueError naming ``path`` and what is wrong."""
    try:
        return wanted.validate_python(raw)
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}: {REMEDY}") from None


def check_shard(folder: Path, metadata: CodesMetadata, number: int, shard: CodesShard) -> None:
    """Check that a shard's files are there, inside the folder and as long as its row says, and that
    the row agrees with itself.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: one has another size or lies elsewhere, or the row contradicts the metadata.
    """
    where, sizes = f"{folder / 'shards.json'}: shard {number}", {}
    k = metadata.n_features if metadata.k is None else metadata.k
    if not (0 if metadata.k is None else shard.rows * k) <= shard.entries <= shard.rows * k:
        most = "at most " if metadata.k is None else ""
        raise ValueError(
            f"{where} has {shard.entries} entries, wanted {most}{shard.rows} rows x {k}: {REMEDY}"
        )
    if set(shard.sha256) != set(metadata.arrays):
        raise ValueError(
            f"{where} has checksums of {sorted(shard.sha256)}, wanted {sorted(metadata.arrays)}:"
            f" {REMEDY}"
        )
    for name in metadata.arrays:
        wanted = sizes[name] = metadata.n_bytes(name, shard.rows, shard.entries)
        file, info = contained_file(
            folder, file_name(name, number), f"shards.json lists it: {REMEDY}"
        )
        if info.st_size != wanted:
            raise ValueError(f"{file} has {info.st_size} bytes; wanted {wanted}: {REMEDY}")
    if shard.bytes != sum(sizes.values()):
        raise ValueError(f"{where} has bytes {shard.bytes}, wanted {sum(sizes.values())}: {REMEDY}")
    if (
        sum(shard.utilization) != metadata.n_features
        or len(shard.utilization) > shard.rows.bit_length() + 1
    ):
        raise ValueError(
            f"{where} has a utilization of {sum(shard.utilization)} features in"
            f" {len(shard.utilization)} classes, wanted {metadata.n_features} in at most"
            f" {shard.rows.bit_length() + 1}: {REMEDY}"
        )


def check_numbers(name: str, tensor: Tensor, n_features: int, where: str) -> None:
    """Raise ValueError for an index that is no feature, or a value that is not finite."""
    if name != "indices":
        if not tensor.isfinite().all():
            raise ValueError(
                f"{where}: {name} holds a NaN or an infinity; wanted finite numbers: encode again"
            )
    elif ((tensor < 0) | (tensor >= n_features)).any():
        low, high = int(tensor.min()), int(tensor.max())
        raise ValueError(
            f"{where}: indices are {low} to {high}; wanted 0 to {n_features - 1}: encode again"
        )

"""Writing codes: streamed, only where they fit, published whole, and resumed after the last whole
shard.

A shard counts once its files are flushed to the device and `progress.json`, in the folder that is
not yet published, lists it. A writer that is killed leaves that folder; the next one of the same
codes checks the shards that it lists, by their SHA-256, and asks the codes for the rows that
follow.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from assay.io.codes.layout import (
    SCHEMA,
    SHARDS,
    TORCH_DTYPES,
    VERSION,
    CodesMetadata,
    CodesShard,
    Dtype,
    SourcedCodes,
    check_numbers,
    check_shard,
    file_name,
    read_json,
    validated,
)
from assay.io.publish import (
    free_bytes,
    naming,
    publish_file,
    publishing_folder,
    resumable_folder,
)

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"
KEPT = "; the shards that are whole are kept, and the next run goes on after them"

Arrays = dict[str, npt.NDArray[Any]]


def write_codes(
    path: Path,
    codes: SourcedCodes,
    *,
    batch_size: int,
    rows_per_shard: int = 2**20,
    dtype: Dtype = "float32",
    about: Mapping[str, Any] | None = None,
) -> None:
    """Stream ``codes`` into the folder ``path``, which appears whole or not at all and replaces an
    older one.

    Codes that will not fit on the disk are written in their sparser form, if they have one. Where
    an earlier call with the same codes and arguments was cut off, this one goes on after its last
    whole shard; the bytes are the same.

    Args:
        path: the folder.
        codes: what to write; every batch carries ``error`` (rows,).
        batch_size: rows held in memory at once.
        rows_per_shard: rows a ``.bin`` file at the most, rounded down to whole batches.
        dtype: of the values on disk.
        about: JSON scalars that the metadata are to say beside the codes' own provenance.

    Raises:
        ValueError: neither the codes nor their sparser form fit on the disk, and nothing was
            written. Or there are more or fewer rows than the codes promise, or a batch lacks an
            array, or holds one of another shape, a number that is not finite in ``dtype``, or an
            index that is no feature. An older folder then stays as it was.
        OSError: the disk is full after all; it names ``path``. What is whole is kept for the next
            call.
    """
    for name, size in (("batch_size", batch_size), ("rows_per_shard", rows_per_shard)):
        if size < 1:
            raise ValueError(f"{name} is {size}: wanted at least 1")
    batch_size = min(batch_size, rows_per_shard)
    sizes = {"batch_size": batch_size, "rows_per_shard": rows_per_shard}
    codes, metadata = _choose_form(path, codes, dtype, sizes, about or {})
    if codes.rounded is not None:
        codes = codes.rounded(TORCH_DTYPES[dtype])
    with publishing_folder(
        path, replace=True, resume=_resume_key(codes, metadata, sizes)
    ) as folder:
        shards = _whole_shards(folder, metadata)
        done = sum(shard.rows for shard in shards)
        batches = _stored_batches(path, metadata, codes.batches(batch_size, done), done)
        while first := next(batches, None):
            with _ShardWriter(folder, len(shards), metadata, named=path) as writer:
                for arrays in chain([first], islice(batches, rows_per_shard // batch_size - 1)):
                    writer.write(arrays)
            shards.append(writer.summary())
            _write_index(folder / PROGRESS, shards)
        _write_index(folder / "shards.json", shards)
        with naming(path):
            (folder / "metadata.json").write_text(
                metadata.model_dump_json(indent=1), encoding="utf-8"
            )
        (folder / PROGRESS).unlink(missing_ok=True)


def _resume_key(codes: SourcedCodes, metadata: CodesMetadata, sizes: dict[str, int]) -> str:
    return json.dumps([metadata.model_dump(mode="json"), codes.made_from, sizes], sort_keys=True)


def _choose_form(
    path: Path, codes: SourcedCodes, dtype: Dtype, sizes: dict[str, int], about: Mapping[str, Any]
) -> tuple[SourcedCodes, CodesMetadata]:
    """The codes or their sparser form, whichever is the first to fit on the disk."""
    metadata = _describe(codes, dtype, about)
    predicted, free = (
        _predict(codes, metadata, sizes),
        _free_bytes(path, _resume_key(codes, metadata, sizes)),
    )
    if predicted <= free:
        return codes, metadata
    found = (
        f"{path}: {codes.format} {dtype} codes of {codes.n_rows} rows take {_gb(predicted)},"
        f" {_gb(free)} are free"
    )
    if codes.fallback is None:
        raise ValueError(
            f"{found}: give the catalog entry `dtype: float16` or another disk, keep fewer entries"
            " a row (kmeans.sparsity), or make it a MemoryDataset, so that the codes are computed"
            " as they are read"
        )
    sparser = codes.fallback()
    logger.warning("%s; writing their sparser form", found)
    return _choose_form(path, sparser, dtype, sizes, about)


def _describe(codes: SourcedCodes, dtype: Dtype, about: Mapping[str, Any]) -> CodesMetadata:
    return CodesMetadata(
        schema_name=SCHEMA,
        version=VERSION,
        format=codes.format,
        n_rows=codes.n_rows,
        n_features=codes.n_features,
        k=codes.k,
        dtype=dtype,
        provenance={**codes.provenance, **about},
    )


def _predict(codes: SourcedCodes, metadata: CodesMetadata, sizes: dict[str, int]) -> int:
    """Bytes that the codes take; where rows vary in length, if all are as long as those of the
    first batch.
    """
    if metadata.k is not None:
        return metadata.predict_bytes(metadata.k)
    head = next(codes.batches(sizes["batch_size"]), None)
    return (
        0
        if head is None
        else metadata.predict_bytes(
            int(head["values"].count_nonzero()) / max(1, len(head["error"]))
        )
    )


def _free_bytes(path: Path, resume: str) -> int:
    """What the disk has room for, counting what an earlier call has written of these codes."""
    begun = resumable_folder(path, resume)
    mine = sum(entry.lstat().st_size for entry in begun.iterdir()) if begun.is_dir() else 0
    return free_bytes(path) + mine


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.3g} GB"


def _whole_shards(folder: Path, metadata: CodesMetadata) -> list[CodesShard]:
    """The shards that an earlier call finished; everything else is removed."""
    shards: list[CodesShard] = []
    progress = folder / PROGRESS
    # One that was cut off as it was moved into place has its final index already.
    index = progress if progress.exists() else folder / "shards.json"
    if index.exists():
        try:
            shards = validated(index, SHARDS, read_json(folder, index.name))
            for number, shard in enumerate(shards):
                check_shard(folder, metadata, number, shard)
                _check_sums(folder, number, shard)
        except (ValueError, OSError) as error:
            logger.warning("what was begun of these codes is of no use, starting again: %s", error)
            shards = []
    whole = {
        file_name(name, number) for number in range(len(shards)) for name in metadata.arrays
    } | {PROGRESS}
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name not in whole:
            entry.unlink()
    _write_index(progress, shards)
    if shards:
        logger.info(
            "going on after %d rows in %d whole shards",
            sum(shard.rows for shard in shards),
            len(shards),
        )
    return shards


def _check_sums(folder: Path, number: int, shard: CodesShard) -> None:
    for name, wanted in shard.sha256.items():
        with open(folder / file_name(name, number), "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wanted:
            raise ValueError(
                f"{folder / file_name(name, number)} has SHA-256 {found}, wanted {wanted}"
            )


def _write_index(path: Path, shards: list[CodesShard]) -> None:
    text = json.dumps([shard.model_dump() for shard in shards], indent=1)
    with publish_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _stored_batches(
    path: Path, metadata: CodesMetadata, batches: Iterable[dict[str, Tensor]], n_rows: int
) -> Iterator[Arrays]:
    """Batches from row ``n_rows`` on, checked and as the files hold them, without those that have
    no rows.
    """
    wanted = [name for name in metadata.arrays if name != "lengths"]
    for batch in batches:
        lacking = [name for name in wanted if name not in batch]
        if lacking:
            raise ValueError(
                f"{path}: {metadata.format} codes came as {sorted(batch)}; wanted {lacking[0]} as"
                " well"
            )
        rows = len(batch["error"])
        where = f"{path}: rows {n_rows} to {n_rows + rows - 1} of the codes"
        n_rows += rows
        if n_rows > metadata.n_rows:
            raise ValueError(
                f"{where} came, but {metadata.n_rows} rows were promised: correct either"
            )
        tensors = {name: _checked(name, batch[name], metadata, rows, where) for name in wanted}
        if rows:
            yield _as_stored(tensors, metadata)
    if n_rows < metadata.n_rows:
        raise ValueError(
            f"{path}: the codes ended after {n_rows} rows; {metadata.n_rows} were promised"
        )


def _checked(name: str, tensor: Tensor, metadata: CodesMetadata, rows: int, where: str) -> Tensor:
    """A tensor of a batch on the CPU in its stored dtype, in the shape that it must have."""
    wanted = metadata.shape(name, rows)
    shape = tuple(tensor.shape)
    if len(shape) != len(wanted) or any(
        size not in (found, -1) for found, size in zip(shape, wanted, strict=True)
    ):
        raise ValueError(f"{where}: {name} has shape {shape}; wanted {wanted}")
    dtypes = {
        "indices": torch.int64,
        "error": torch.float64,
        "values": TORCH_DTYPES[metadata.dtype],
    }
    converted = tensor.detach().to("cpu", dtypes[name])
    if name == "values" and tensor.isfinite().all() and not converted.isfinite().all():
        raise ValueError(
            f"{where}: {name} reach {float(tensor.abs().max()):.4g}, more than {metadata.dtype}"
            " holds: write float32 or bfloat16"
        )
    check_numbers(name, converted, metadata.n_features, where)
    if name == "values" and metadata.format == "sparse" and (converted.abs().diff(dim=1) > 0).any():
        raise ValueError(f"{where}: the entries of a row are not by falling magnitude: sort them")
    return converted


def _as_stored(tensors: dict[str, Tensor], metadata: CodesMetadata) -> Arrays:
    if metadata.k is None:
        kept = tensors["values"] != 0
        tensors |= {
            "lengths": kept.sum(1),
            "values": tensors["values"][kept],
            "indices": tensors["indices"][kept],
        }
    arrays = {}
    for name in metadata.arrays:
        bits = (
            tensors[name].view(torch.uint16)
            if tensors[name].dtype == torch.bfloat16
            else tensors[name]
        )
        arrays[name] = np.ascontiguousarray(bits.numpy(), dtype=metadata.stored_dtype(name))
    return arrays


class _ShardWriter:
    """The open files of one shard, hashed and counted as they are written, flushed to the device at
    the end.

    A disk that is full is an OSError that names ``named``.
    """

    def __init__(self, folder: Path, number: int, metadata: CodesMetadata, named: Path) -> None:
        self._named = named
        self._files: dict[str, BinaryIO] = {
            name: (folder / file_name(name, number)).open("wb") for name in metadata.arrays
        }
        self._digests = {name: hashlib.sha256() for name in metadata.arrays}
        self._rows = 0
        self._entries = 0
        self._bytes = 0
        self._used = np.zeros(metadata.n_features, dtype=np.int64)

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with naming(self._named, KEPT), ExitStack() as closing:
            for file in self._files.values():
                closing.callback(file.close)
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())

    def write(self, arrays: Arrays) -> None:
        for name, array in arrays.items():
            with naming(self._named, KEPT):
                self._files[name].write(array.data)
            self._digests[name].update(array.data)
            self._bytes += array.nbytes
        self._rows += len(arrays["error"])
        self._entries += arrays["values" if "values" in arrays else "indices"].size
        self._used += _used(arrays, len(self._used))

    def summary(self) -> CodesShard:
        octaves = np.frexp(self._used)[1]  # 0, 1, 2-3, 4-7, ... are 0, 1, 2, 3, ...
        return CodesShard(
            rows=self._rows,
            entries=self._entries,
            bytes=self._bytes,
            sha256={name: digest.hexdigest() for name, digest in self._digests.items()},
            utilization=np.bincount(octaves).tolist(),
        )


def _used(arrays: Arrays, n_features: int) -> npt.NDArray[np.int64]:
    """In how many rows of the batch each feature is nonzero, int64 (n_features,)."""
    if "indices" not in arrays:
        return np.asarray(np.count_nonzero(_magnitude_bits(arrays["values"]), axis=0))
    indices = arrays["indices"]
    if "values" in arrays:
        indices = indices[_magnitude_bits(arrays["values"]) != 0]
    return np.bincount(indices.reshape(-1), minlength=n_features)


def _magnitude_bits(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Something that is 0 where a value is: bfloat16, which comes as bits, has a -0 as well."""
    return values & np.uint16(0x7FFF) if values.dtype.kind == "u" else values

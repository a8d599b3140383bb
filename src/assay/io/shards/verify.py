"""Read a folder of shards once, whole, and say what is wrong with it. Memory does not grow with the
data.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from assay.io.files import COPY_AGAIN, contained_file, real_folder
from assay.io.shards.doubts import doubt_labels
from assay.io.shards.metadata import (
    LabelsFile,
    Metadata,
    ShardEntry,
    find_labels,
    read_index,
    read_metadata,
    sized_labels,
    sized_shard,
)

CHUNK_BYTES = 8 * 2**20
"""Read at a time, or one token if that is more."""

MOST_MISSING = 1000
"""Shards that are named one by one where they are missing; of more, only the first."""

Progress: TypeAlias = Callable[[int, int], object]
"""Called with the bytes read since the last call, and those of the whole folder."""

Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found in a file.

    Attributes:
        faults: what makes its numbers unfit for use; none, if it is sound.
        remarks: what is unusual in it and harmless.
    """

    faults: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is at fault."""
        return not self.faults


@dataclass(frozen=True, kw_only=True)
class ShardVerdict(Verdict):
    """What was found in the shard `name` of `rows` examples."""

    name: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class LabelsVerdict(Verdict):
    """What was found in the file of the labels: `counts`, the patches of each label that occurs,
    lowest label first; 0 is void.
    """

    name: str
    counts: dict[int, int]


@dataclass(frozen=True)
class FolderVerdict:
    """What was found in a folder of shards.

    Attributes:
        path: as it was given.
        shards: a verdict each, in their order; none if the JSON files are at fault.
        labels: None if there are none.
        constant: for each layer, the dimensions that are the same in every content token of the
            folder.
        faults: of the folder as a whole, a layer without any variation among them.
        remarks: on the folder as a whole: that void voted in its labels.
    """

    path: Path
    shards: tuple[ShardVerdict, ...] = ()
    labels: LabelsVerdict | None = None
    constant: dict[int, tuple[int, ...]] | None = None
    faults: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether folder, shards and labels are all without a fault."""
        labels_ok = self.labels is None or self.labels.ok
        return not self.faults and labels_ok and all(shard.ok for shard in self.shards)


class _Extent:
    """Smallest and largest value of each dimension over the finite content tokens of each layer,
    float32 (d_model,).
    """

    def __init__(self) -> None:
        # Filled as layers are met: a damaged metadata.json may claim any number of them.
        self.low: dict[int, Floats] = {}
        self.high: dict[int, Floats] = {}
        self.n_tokens: Counter[int] = Counter()

    def add(self, layer: int, low: Floats, high: Floats, n_tokens: int) -> None:
        self.low[layer] = np.minimum(self.low.get(layer, low), low)
        self.high[layer] = np.maximum(self.high.get(layer, high), high)
        self.n_tokens[layer] += n_tokens

    def constant(self, layer: int) -> tuple[int, ...]:
        """The dimensions that never vary; none while there are fewer than two tokens."""
        if self.n_tokens[layer] < 2:
            return ()
        return tuple(np.flatnonzero(self.low[layer] == self.high[layer]).tolist())


class _Reading(NamedTuple):
    """How files are read: bytes at a time, and who is told of how many came."""

    chunk_bytes: int
    advance: Callable[[int], None]


def verify_shards(
    path: str | os.PathLike[str],
    progress: Progress,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    most_missing: int = MOST_MISSING,
) -> FolderVerdict:
    """Read every byte of a folder of shards, once and in order, and judge it. What is wrong is
    returned, never raised.

    A shard is at fault if it is missing, of a wrong size or unreadable, or holds a NaN or an
    infinity; a folder, if its JSON files are, or if a layer is the same in all its tokens; labels,
    if they are not one a content token. Some constant dimensions, and padding that is not zero, are
    remarks.

    Args:
        path: the folder of shards.
        progress: called with the bytes read since the last call, and those of the whole folder.
        chunk_bytes: read at a time, or one token if that is more.
        most_missing: shards that are named one by one where they are missing.
    """
    try:
        folder = real_folder(path)
        metadata = read_metadata(folder)
        entries = read_index(folder, metadata)
    except (ValueError, OSError) as error:
        return FolderVerdict(Path(path), faults=(str(error),))
    labels_file = find_labels(folder, metadata)
    missing = _missing(folder, entries)
    if len(missing) > most_missing:
        return FolderVerdict(
            Path(path),
            faults=(
                (
                    f"{len(missing)} of {len(entries)} shards are missing, {missing[0]} the first;"
                    f" {COPY_AGAIN}"
                ),
            ),
        )
    total = sum(
        _size(folder, name)
        for name in [
            *(entry.name for entry in entries),
            *([labels_file.name] if labels_file else []),
        ]
    )
    extent = _Extent()

    def advance(n: int) -> None:
        progress(n, total)

    reading = _Reading(chunk_bytes, advance)
    seen: dict[Path, str] = {}
    shards, first = [], 0
    for entry in entries:
        shards.append(_verify_shard(folder, metadata, entry, first, extent, seen, reading))
        first += entry.n_examples
    constant = {number: extent.constant(layer) for layer, number in enumerate(metadata.layers)}
    faults = tuple(
        f"layer {number} is the same in all {extent.n_tokens[layer]} tokens; record the activations"
        " again"
        for layer, number in enumerate(metadata.layers)
        if len(constant[number]) == metadata.d_model
    )
    labels = None if labels_file is None else _verify_labels(folder, metadata, labels_file, reading)
    doubt = doubt_labels(folder, metadata)
    return FolderVerdict(
        Path(path), tuple(shards), labels, constant, faults, () if doubt is None else (doubt,)
    )


def _missing(folder: Path, entries: list[ShardEntry]) -> list[str]:
    present = set(os.listdir(folder))
    return [entry.name for entry in entries if entry.name not in present]


def _size(folder: Path, name: str) -> int:
    try:
        return contained_file(folder, name)[1].st_size
    except (ValueError, OSError):
        return 0


def _check_own(path: Path, name: str, seen: dict[Path, str]) -> None:
    """Note whose a file is; raises ValueError where it is another shard's."""
    other = seen.setdefault(path, name)
    if other != name:
        raise ValueError(f"{name} and {other} are links to one file; wanted a file for each shard")


def _verify_shard(
    folder: Path,
    metadata: Metadata,
    entry: ShardEntry,
    first: int,
    extent: _Extent,
    seen: dict[Path, str],
    reading: _Reading,
) -> ShardVerdict:
    """Judge one shard, whose first example has the number `first`; its content tokens are added to
    `extent`.
    """
    faults: list[str] = []
    remarks: list[str] = []
    try:
        path = sized_shard(folder, metadata, entry)
        _check_own(path, entry.name, seen)
        n_data = entry.n_examples * metadata.example_bytes
        not_finite = _NotFinite(metadata, first)
        for start, tokens in _tokens(path, n_data, metadata.d_model, reading):
            _judge(start, tokens, metadata, extent, not_finite)
        if not_finite.count:
            faults.append(not_finite.describe())
        n_nonzero = sum(
            int(np.count_nonzero(chunk)) for chunk in _bytes(path, n_data, None, reading)
        )
        if n_nonzero:
            remarks.append(f"padding is not zero ({n_nonzero} bytes); it is never read")
    except (ValueError, OSError) as error:
        faults.append(str(error))
    return ShardVerdict(
        name=entry.name, rows=entry.n_examples, faults=tuple(faults), remarks=tuple(remarks)
    )


class _NotFinite:
    """How many numbers of a shard are not finite, and where the first is."""

    def __init__(self, metadata: Metadata, first_example: int) -> None:
        self.metadata = metadata
        self.first_example = first_example
        self.count = 0
        self.where = ""

    def add(self, block: int, token: int, tokens: Floats) -> None:
        """Tokens from `token` on, the CLS token counted, of the `block`-th (example, layer) of the
        shard.
        """
        finite = np.isfinite(tokens)
        if not self.count:
            row, dimension = np.argwhere(~finite)[0].tolist()
            example, layer = divmod(block, len(self.metadata.layers))
            number = token + row - self.metadata.cls_token
            value = "NaN" if np.isnan(tokens[row, dimension]) else "infinity"
            self.where = (
                f"{value} in example {self.first_example + example},"
                f" {f'content token {number}' if number >= 0 else 'the CLS token'}, layer"
                f" {self.metadata.layers[layer]}, dimension {dimension}"
            )
        self.count += finite.size - int(finite.sum())

    def describe(self) -> str:
        return f"{self.where}; {self.count} such numbers in all; record these examples again"


def _judge(
    start: int, tokens: Floats, metadata: Metadata, extent: _Extent, not_finite: _NotFinite
) -> None:
    """Take in tokens, the first of them the `start`-th of the shard, run by run of one (example,
    layer).
    """
    per_block, end = metadata.tokens_per_example, start + len(tokens)
    for block in range(start // per_block, (end - 1) // per_block + 1):
        low, high = max(start, block * per_block), min(end, (block + 1) * per_block)
        token = low - block * per_block
        run = tokens[low - start : high - start]
        content = run[1:] if metadata.cls_token and token == 0 else run
        # NaN passes through min and max, and infinities are extremes: no other check of the numbers
        # is needed.
        with np.errstate(invalid="ignore"):
            extremes = (content.min(axis=0), content.max(axis=0)) if len(content) else ()
        if not all(np.isfinite(values).all() for values in (run[0], *extremes)):
            not_finite.add(block, token, run)
        elif extremes:
            extent.add(block % len(metadata.layers), *extremes, len(content))


def _tokens(
    path: Path, n_bytes: int, d_model: int, reading: _Reading
) -> Iterator[tuple[int, Floats]]:
    """The first `n_bytes` of a shard as (number of its first token, tokens (n, d_model)), all
    layers in file order.
    """
    per_chunk = max(1, reading.chunk_bytes // (4 * d_model))
    whole_tokens = reading._replace(chunk_bytes=per_chunk * 4 * d_model)
    start = 0
    for chunk in _bytes(path, 0, n_bytes, whole_tokens):
        tokens = chunk.view("<f4").reshape(-1, d_model)
        yield start, tokens
        start += len(tokens)


def _bytes(
    path: Path, start: int, end: int | None, reading: _Reading
) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes from `start` to `end` (None: of the file), uint8, in one buffer that is filled
    again and again.

    Raises:
        ValueError: the file ends before `end`.
    """
    buffer = np.empty(reading.chunk_bytes, dtype=np.uint8)
    with open(path, "rb") as file:
        file.seek(start)
        while end is None or start < end:
            wanted = len(buffer) if end is None else min(len(buffer), end - start)
            n = file.readinto(buffer[:wanted].data)
            if n < wanted and end is not None:
                raise ValueError(
                    f"{path} ends at byte {start + n}, wanted {end}: it became shorter while it was"
                    " read"
                )
            if n == 0:
                return
            yield buffer[:n]
            reading.advance(n)
            start += n


def _verify_labels(
    folder: Path, metadata: Metadata, labels: LabelsFile, reading: _Reading
) -> LabelsVerdict:
    dtype = np.dtype(labels.dtype).newbyteorder("<")
    counts = np.zeros(2 ** (8 * dtype.itemsize), dtype=np.int64)
    try:
        path = sized_labels(folder, metadata, labels)
        for chunk in _bytes(path, 0, labels.n_bytes, reading):
            counts += np.bincount(chunk.view(dtype), minlength=len(counts))
    except (ValueError, OSError) as error:
        return LabelsVerdict(name=labels.name, counts={}, faults=(str(error),))
    found = {int(label): int(counts[label]) for label in np.flatnonzero(counts)}
    remarks = ("every patch is void",) if set(found) == {0} else ()
    return LabelsVerdict(name=labels.name, counts=found, remarks=remarks)

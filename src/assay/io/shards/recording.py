"""Recording shards piece by piece, so that nothing that is whole is made twice.

The unit of work is a shard. Once its bytes are on the device a note beside the folder, which is not
published yet, says what it is of. Whatever ends a recording, a signal, a full disk or a damaged
image, the next one of the same key goes on after the shards that are whole, and ends with the same
bytes; a shard counts as long as the files of its own examples are as they were.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from assay.io.files import METADATA_NAME
from assay.io.publish import flush, free_bytes, naming, publish_file, publishing_pieces
from assay.io.shards.metadata import LABELS_NAME, WIDE_LABELS_NAME, Metadata
from assay.io.shards.writing import as_stored, find_not_finite, finish_shards, shard_name

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raised whenever a recording must not go on from what an older version of this module began."""

KEPT = "; the shards that are whole are kept, and the next run goes on after them"

AT_ONCE = 2
"""Batches that wait to be written, at the most."""


class ImageBatch(NamedTuple):
    """Some examples of one shard, in any order.

    Attributes:
        examples: their numbers in the recording.
        activations: float32 (n, n_layers, tokens, d_model), the CLS token first where there is one.
        labels: uint16 (n, content_tokens_per_example), 0 for void; None for all batches or none.
    """

    examples: list[int]
    activations: torch.Tensor | npt.NDArray[np.float32]
    labels: npt.NDArray[np.uint16] | None


@runtime_checkable
class Source(Protocol):
    """Activations that can be recorded from any shard on."""

    @property
    def metadata(self) -> Metadata:
        """What is recorded."""

    @property
    def key(self) -> str:
        """What the activations and labels of an example depend on beside its files: the model, the
        geometry, the batch size and the like.
        """

    def digest(self, first: int, stop: int) -> str:
        """What the files of the examples from `first` to `stop` - 1 are."""

    def name(self, example: int) -> str:
        """What an example is called in errors."""

    def batches(self, spans: Sequence[tuple[int, int]]) -> Generator[ImageBatch]:
        """The examples of each span (first, stop), which is a shard: span by span, and the batches
        of a span depend on it alone.
        """


def record_shards(root: Path, source: Source) -> Path:
    """Record `source` into `<root>/<hash>/`, as `write_shards` would, and return its path.

    `root` is replaced whole at the end; until then an older recording stays as it was. Labels that
    are all below 256 lie in labels.bin, others in labels16.bin.

    Raises:
        ValueError: `root` holds more than an older recording, another live process is writing it,
            the disk has no room for what is still to be made, or a batch has another shape, dtype
            or examples than it should, or a NaN or an infinity.
        OSError: the disk is full after all; it names `root`. What is whole is kept in any case.
    """
    refuse_others(root)
    metadata = source.metadata
    pieces = _divide(source)
    with publishing_pieces(root, resume=_resume_key(source)) as (content, notes):
        folder = _take_up(content, metadata.hash)
        todo = _left_to_do([_Place(piece, folder, notes, metadata) for piece in pieces])
        _check_room(root, metadata, todo)
        if todo:
            _record(root, source, todo)
        with naming(root, KEPT):
            _join_labels(folder, [notes / f"{piece.name}{LABELS}" for piece in pieces])
            finish_shards(folder, metadata)
    logger.debug("recorded %d examples in %s", metadata.n_examples, root)
    return root / metadata.hash


def refuse_others(root: Path) -> None:
    """Raise ValueError where a folder holds more than one older recording, since saving replaces it
    whole.
    """
    held = sorted(child for child in root.glob("*") if not child.name.startswith("."))
    if len(held) > 1 or not all((child / METADATA_NAME).is_file() for child in held):
        raise ValueError(
            f"{root} holds {', '.join(child.name for child in held)}; wanted one older recording at"
            " the most, as saving replaces the folder whole: give the recording a folder of its own"
        )


LABELS = ".labels"
"""Ends the name of the file that keeps a shard's labels, little-endian uint16."""


@dataclass(frozen=True)
class _Piece:
    """A shard of the examples from `first` to `stop` - 1, whose files are as `digest` says."""

    number: int
    first: int
    stop: int
    digest: str

    @property
    def name(self) -> str:
        return shard_name(self.number)

    @property
    def note(self) -> str:
        return json.dumps({"examples": self.stop - self.first, "digest": self.digest})


@dataclass(frozen=True)
class _Place:
    """Where a piece is written, and its note."""

    piece: _Piece
    folder: Path
    notes: Path
    metadata: Metadata

    @property
    def data(self) -> Path:
        return self.folder / self.piece.name

    @property
    def labels(self) -> Path:
        return self.notes / f"{self.piece.name}{LABELS}"

    @property
    def note(self) -> Path:
        return self.notes / f"{self.piece.name}.json"

    @property
    def n_bytes(self) -> int:
        return self.metadata.examples_per_shard * self.metadata.example_bytes

    def is_whole(self) -> bool:
        try:
            return (
                self.note.read_text(encoding="utf-8") == self.piece.note
                and self.data.stat().st_size == self.n_bytes
            )
        except (OSError, UnicodeDecodeError):
            return False


def _divide(source: Source) -> list[_Piece]:
    n, per_shard = source.metadata.n_examples, source.metadata.examples_per_shard
    spans = [(first, min(first + per_shard, n)) for first in range(0, n, per_shard)]
    return [
        _Piece(number, first, stop, source.digest(first, stop))
        for number, (first, stop) in enumerate(spans)
    ]


def _resume_key(source: Source) -> str:
    # Not what changes with the list of files, of which each shard's note says its part.
    said = source.metadata.model_dump(mode="json", exclude={"n_examples", "data", "dataset"})
    return json.dumps([FORMAT, source.key, said], sort_keys=True)


def _take_up(content: Path, name: str) -> Path:
    """The folder that an earlier recording began, under its name of now, or a new one."""
    folder = content / name
    for begun in content.iterdir():
        if begun != folder:
            begun.rename(folder)
    folder.mkdir(exist_ok=True)
    return folder


def _left_to_do(places: list[_Place]) -> list[_Place]:
    """The pieces that are not whole; everything that is not of a whole one is removed."""
    whole = [place for place in places if place.is_whole()]
    kept = {path for place in whole for path in (place.data, place.labels, place.note)}
    # Notes first: a piece without its data has none.
    for entry in (*places[0].notes.iterdir(), *places[0].folder.iterdir()):
        if entry not in kept:
            entry.unlink()
    flush(places[0].notes)
    if whole:
        logger.info(
            "going on after %d examples in %d whole shards",
            sum(place.piece.stop - place.piece.first for place in whole),
            len(whole),
        )
    return [place for place in places if place not in whole]


def _check_room(root: Path, metadata: Metadata, todo: list[_Place]) -> None:
    # Labels are kept as uint16 beside a shard, and joined at the end.
    per_example = metadata.example_bytes + 4 * metadata.content_tokens_per_example
    wanted = per_example * sum(place.piece.stop - place.piece.first for place in todo)
    free = free_bytes(root)
    if wanted > free:
        older = "; the older recording stays until this one is whole" if root.exists() else ""
        raise ValueError(
            f"{root}: what is to be recorded takes {wanted / 1e9:.3g} GB, {free / 1e9:.3g} GB are"
            f" free{older}: record fewer examples or fewer layers, or name a folder on another disk"
        )


def _record(root: Path, source: Source, todo: list[_Place]) -> None:
    spans = [(place.piece.first, place.piece.stop) for place in todo]
    with (
        closing(source.batches(spans)) as batches,
        _Writer(root, source, todo) as writer,
    ):
        for batch in batches:
            writer.put(batch)
        writer.finish()


class _Writer:
    """Writes batches with a thread of its own, while the next ones are made."""

    def __init__(self, root: Path, source: Source, todo: list[_Place]) -> None:
        self._root = root
        self._source = source
        self._todo = deque(todo)
        self._open: _OpenPiece | None = None
        self._has_labels: bool | None = None
        self._pending: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="assay-record")

    def __enter__(self) -> _Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error that is not in writing what is there may end a shard.
        self._pool.shutdown(cancel_futures=not isinstance(error, Exception))
        if self._open is not None:
            self._open.close()

    def put(self, batch: ImageBatch) -> None:
        """Have a batch written; raises what went wrong in writing those before it."""
        self._pending.append(self._pool.submit(self._write, batch))
        while len(self._pending) > AT_ONCE or (self._pending and self._pending[0].done()):
            self._pending.popleft().result()

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            ValueError: examples are missing.
        """
        while self._pending:
            self._pending.popleft().result()
        if self._open is not None or self._todo:
            piece = self._open.place.piece if self._open is not None else self._todo[0].piece
            raise ValueError(
                f"the batches ended within the examples {piece.first} to {piece.stop - 1}; wanted"
                f" all {self._source.metadata.n_examples}"
            )

    def _write(self, batch: ImageBatch) -> None:
        array = as_stored(batch.activations, self._source.metadata)
        if (bad := find_not_finite(array)) is not None:
            raise ValueError(
                f"{self._source.name(batch.examples[bad])}: the model's activations hold a NaN or"
                " an infinity; wanted finite ones: look at this image and at the model's precision"
            )
        if self._has_labels is None:
            self._has_labels = batch.labels is not None
        if self._has_labels != (batch.labels is not None):
            raise ValueError("some batches have labels and some have none; wanted all or none")
        if self._open is None and not self._todo:
            raise ValueError(f"examples {batch.examples} came after the last one that was wanted")
        with naming(self._root, KEPT):
            if self._open is None:
                self._open = _OpenPiece(self._todo.popleft())
            self._open.write(batch.examples, array, batch.labels)
            if self._open.is_full:
                self._open.finish()
                self._open = None


class _OpenPiece:
    """A shard that is being written: its file, its labels, and which examples are there."""

    def __init__(self, place: _Place) -> None:
        self.place = place
        n_examples = place.piece.stop - place.piece.first
        self._there = np.zeros(n_examples, dtype=np.bool_)
        self._labels = np.zeros((n_examples, place.metadata.content_tokens_per_example), "<u2")
        self._labeled = False
        self._file: BinaryIO = place.data.open("wb")
        self._file.truncate(place.n_bytes)

    @property
    def is_full(self) -> bool:
        return bool(self._there.all())

    def write(
        self,
        examples: Sequence[int],
        array: npt.NDArray[np.float32],
        labels: npt.NDArray[np.uint16] | None,
    ) -> None:
        piece = self.place.piece
        rows = np.array(examples, dtype=np.int64) - piece.first
        if (
            len(rows) != len(array)
            or ((rows < 0) | (rows >= len(self._there))).any()
            or len(np.unique(rows)) < len(rows)
            or self._there[rows].any()
        ):
            raise ValueError(
                f"a batch of {len(array)} examples is numbered {list(examples)}; wanted each of"
                f" {piece.first} to {piece.stop - 1} once"
            )
        # Neighbors are written at once.
        for run in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1):
            if len(run):
                self._file.seek(int(rows[run[0]]) * self.place.metadata.example_bytes)
                self._file.write(array[run[0] : run[-1] + 1].data)
        if labels is not None:
            wanted = (len(rows), self._labels.shape[1])
            if labels.dtype != np.uint16 or labels.shape != wanted:
                raise ValueError(
                    f"labels are {labels.dtype} {labels.shape}, wanted uint16 {wanted}, one per"
                    " content token"
                )
            self._labels[rows] = labels
            self._labeled = True
        self._there[rows] = True

    def finish(self) -> None:
        """Have the shard and its labels on the device, and then its note."""
        self.close()
        flush(self.place.data)
        if self._labeled:
            self.place.labels.write_bytes(self._labels.tobytes())
            flush(self.place.labels)
        with publish_file(self.place.note) as partial:
            partial.write_text(self.place.piece.note, encoding="utf-8")

    def close(self) -> None:
        self._file.close()


def _join_labels(folder: Path, parts: list[Path]) -> None:
    """Write the labels of all shards as one file, where they have any, a shard at a time."""
    if not parts[0].exists():
        return
    most = max(int(np.fromfile(part, "<u2").max()) for part in parts)
    name, dtype = (LABELS_NAME, "u1") if most < 2**8 else (WIDE_LABELS_NAME, "<u2")
    with ExitStack() as stack:
        file = stack.enter_context(open(folder / name, "wb"))
        for part in parts:
            file.write(np.fromfile(part, "<u2").astype(dtype).data)

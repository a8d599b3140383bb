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
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from assay.io.files import METADATA_NAME
from assay.io.publish import discard_partials, flush, free_bytes, naming, publishing_pieces
from assay.io.shards.metadata import INDEX_NAME, LABELS_NAME, WIDE_LABELS_NAME, Metadata
from assay.io.shards.pieces import OpenPiece, Piece
from assay.io.shards.writing import as_stored, find_not_finite, finish_shards, shard_name

logger = logging.getLogger(__name__)

FORMAT = 2
"""Raised whenever a recording must not go on from what an older version of this module began."""

KEPT = "; the shards that are whole are kept, and the next run goes on after them"

ANEW = ".anew"
"""In a folder of recordings: what is there is made again, though it be the same."""

AT_ONCE = 2
"""Batches that wait to be written, at the most."""


class ImageBatch(NamedTuple):
    """Some examples of one shard, in any order.

    Attributes:
        examples: their numbers in the recording.
        activations: float32 (n, n_layers, tokens, d_model), the CLS token first where there is one.
        labels: uint16 (n, content_tokens_per_example), 0 for void; None where the source has none.
    """

    examples: list[int]
    activations: torch.Tensor | npt.NDArray[np.float32]
    labels: npt.NDArray[np.uint16] | None


@runtime_checkable
class Source(Protocol):
    """Activations that can be recorded from any shard on."""

    @property
    def metadata(self) -> Metadata:
        """What is recorded. Its `data` tells the files that it is of from others."""

    @property
    def labeled(self) -> bool:
        """Whether the batches have labels."""

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

    `root` is replaced whole at the end; until then an older recording stays as it was. One that is
    the same, by its metadata, and whole, by its files' sizes, is not made again, unless
    `forget_recording` was asked for that. Labels that are all below 256 lie in labels.bin, others
    in labels16.bin.

    Raises:
        ValueError: `root` holds more than an older recording, another live process is writing it,
            the disk has no room for what is still to be made, or a batch has another shape, dtype
            or examples than it should, or a NaN or an infinity.
        OSError: the disk is full after all; it names `root`. What is whole is kept in any case.
    """
    refuse_others(root)
    metadata = source.metadata
    if is_recorded(root, source):
        discard_partials(root)
        logger.info("%s is recorded already", root / metadata.hash)
        return root / metadata.hash
    with publishing_pieces(root, resume=_resume_key(source)) as (content, notes):
        folder = _take_up(content, metadata.hash)
        pieces = _divide(source, folder, notes)
        todo = _left_to_do(pieces)
        _check_room(root, metadata, todo)
        if todo:
            _record(root, source, todo)
        with naming(root, KEPT):
            if source.labeled:
                _join_labels(pieces)
            finish_shards(folder, metadata)
    logger.debug("recorded %d examples in %s", metadata.n_examples, root)
    return root / metadata.hash


def is_recorded(root: Path, source: Source) -> bool:
    """Whether `root` holds the same recording already, by its metadata, and whole, by its files'
    sizes, which `record_shards` would leave as it is.
    """
    metadata, folder = source.metadata, root / source.metadata.hash
    n_labels = metadata.n_examples * metadata.content_tokens_per_example
    labels = {LABELS_NAME: n_labels, WIDE_LABELS_NAME: 2 * n_labels}
    n_shards = metadata.n_examples // metadata.examples_per_shard + 1  # the last may be empty
    n_bytes = metadata.examples_per_shard * metadata.example_bytes
    return (
        not (root / ANEW).exists()
        and _says(folder / METADATA_NAME, metadata.to_json())
        and (folder / INDEX_NAME).is_file()
        and all(_is_of(folder / shard_name(shard), n_bytes) for shard in range(n_shards))
        and (not source.labeled or any(_is_of(folder / name, n) for name, n in labels.items()))
    )


def forget_recording(root: Path) -> None:
    """Have the next recording into `root` start anew, whatever was begun of it or is there; what is
    there stays until then.

    Raises:
        ValueError: another live process is writing it.
    """
    discard_partials(root)
    if root.is_dir():
        (root / ANEW).touch()


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


def _says(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


def _is_of(path: Path, n_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == n_bytes


def _divide(source: Source, folder: Path, notes: Path) -> list[Piece]:
    metadata = source.metadata
    n, per_shard = metadata.n_examples, metadata.examples_per_shard
    spans = [(first, min(first + per_shard, n)) for first in range(0, n, per_shard)]
    return [
        Piece(
            *(number, first, stop, source.digest(first, stop)),
            *(folder, notes, metadata, source.labeled),
        )
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


def _left_to_do(pieces: list[Piece]) -> list[Piece]:
    """Those that are not whole; everything that is not of a whole one is removed."""
    whole = [piece for piece in pieces if piece.is_whole()]
    kept = {path for piece in whole for path in (piece.data, piece.labels, piece.note)}
    folder, notes = pieces[0].folder, pieces[0].notes
    # Notes first: a piece without its data has none.
    for entry in (*notes.iterdir(), *folder.iterdir()):
        if entry not in kept:
            entry.unlink()
    flush(notes)
    if whole:
        n_examples = sum(map(len, whole))
        logger.info("going on after %d examples in %d whole shards", n_examples, len(whole))
    numbers = {piece.number for piece in whole}
    return [piece for piece in pieces if piece.number not in numbers]


def _check_room(root: Path, metadata: Metadata, todo: list[Piece]) -> None:
    # Labels are kept as uint16 beside a shard, and joined at the end.
    per_example = metadata.example_bytes + 4 * metadata.content_tokens_per_example
    wanted = per_example * sum(map(len, todo))
    free = free_bytes(root)
    if wanted > free:
        older = "; the older recording stays until this one is whole" if root.exists() else ""
        raise ValueError(
            f"{root}: what is to be recorded takes {wanted / 1e9:.3g} GB, {free / 1e9:.3g} GB are"
            f" free{older}: record fewer examples or fewer layers, or name a folder on another disk"
        )


def _record(root: Path, source: Source, todo: list[Piece]) -> None:
    spans = [(piece.first, piece.stop) for piece in todo]
    with (
        closing(source.batches(spans)) as batches,
        _Writer(root, source, todo) as writer,
    ):
        for batch in batches:
            writer.put(batch)
        writer.finish()


class _Writer:
    """Writes batches with a thread of its own, while the next ones are made, and has a shard on the
    device with another, while the next one is written.
    """

    def __init__(self, root: Path, source: Source, todo: list[Piece]) -> None:
        self._root = root
        self._source = source
        self._todo = deque(todo)
        self._open: OpenPiece | None = None
        self._pending: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="assay-record")
        self._finishing: Future[None] | None = None
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="assay-flush")

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
        self._finisher.shutdown()
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
        if self._finishing is not None:
            self._finishing.result()
        if self._open is not None or self._todo:
            piece = self._open.piece if self._open is not None else self._todo[0]
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
        if self._source.labeled != (batch.labels is not None):
            found, wanted = ("no", "some") if self._source.labeled else ("some", "none")
            raise ValueError(f"a batch has {found} labels, wanted {wanted}, as its source says")
        if self._open is None and not self._todo:
            raise ValueError(f"examples {batch.examples} came after the last one that was wanted")
        with naming(self._root, KEPT):
            if self._open is None:
                self._open = OpenPiece(self._todo.popleft())
            self._open.write(batch.examples, array, batch.labels)
        if self._open.is_full:
            if self._finishing is not None:
                self._finishing.result()
            self._finishing = self._finisher.submit(self._finish, self._open)
            self._open = None

    def _finish(self, piece: OpenPiece) -> None:
        with naming(self._root, KEPT):
            piece.finish()


def _join_labels(pieces: list[Piece]) -> None:
    """Write the labels of all shards as one file, a shard at a time."""
    most = max(int(np.fromfile(piece.labels, "<u2").max()) for piece in pieces)
    name, dtype = (LABELS_NAME, "u1") if most < 2**8 else (WIDE_LABELS_NAME, "<u2")
    with (pieces[0].folder / name).open("wb") as file:
        for piece in pieces:
            file.write(np.fromfile(piece.labels, "<u2").astype(dtype).data)

"""One shard of a recording: where it lies, whether it is whole, and how it is written.

What is noted of it lies in a folder of its own, which is not published.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from assay.io.publish import flush, publish_file
from assay.io.shards.metadata import Metadata
from assay.io.shards.writing import shard_name


@dataclass(frozen=True)
class Piece:
    """A shard of a recording.

    Attributes:
        number: from 0.
        first, stop: its examples are those from `first` to `stop` - 1.
        digest: of their files.
        folder: of the shards.
        notes: the folder of what is noted of them.
        metadata: of the recording.
        labeled: whether its patches have labels.
    """

    number: int
    first: int
    stop: int
    digest: str
    folder: Path
    notes: Path
    metadata: Metadata
    labeled: bool

    def __len__(self) -> int:
        return self.stop - self.first

    @property
    def data(self) -> Path:
        """The shard's file."""
        return self.folder / shard_name(self.number)

    @property
    def labels(self) -> Path:
        """Where its labels are kept, little-endian uint16, until there are those of all shards."""
        return self.notes / f"{self.number:06d}.labels"

    @property
    def note(self) -> Path:
        """What says that it is whole."""
        return self.notes / f"{self.number:06d}.json"

    @property
    def said(self) -> str:
        """What the note says."""
        said = {"examples": len(self), "digest": self.digest, "labeled": self.labeled}
        return json.dumps(said)

    @property
    def n_bytes(self) -> int:
        """The size of its file."""
        return self.metadata.examples_per_shard * self.metadata.example_bytes

    @property
    def label_bytes(self) -> int:
        """The size of the file of its labels."""
        return 2 * len(self) * self.metadata.content_tokens_per_example

    def is_whole(self) -> bool:
        """Whether an earlier recording wrote all of it, from the same files."""
        try:
            said = self.note.read_text(encoding="utf-8")
            return (
                said == self.said
                and self.data.stat().st_size == self.n_bytes
                and (not self.labeled or self.labels.stat().st_size == self.label_bytes)
            )
        except (OSError, UnicodeDecodeError):
            return False


class OpenPiece:
    """A shard that is being written: its file, its labels, and which examples are there."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self._there = np.zeros(len(piece), dtype=np.bool_)
        self._labels = np.zeros((len(piece), piece.metadata.content_tokens_per_example), "<u2")
        self._file: BinaryIO = piece.data.open("wb")
        self._file.truncate(piece.n_bytes)

    @property
    def is_full(self) -> bool:
        """Whether all examples are there."""
        return bool(self._there.all())

    def write(
        self,
        examples: Sequence[int],
        array: npt.NDArray[np.float32],
        labels: npt.NDArray[np.uint16] | None,
    ) -> None:
        """Write some examples, by their numbers in the recording.

        Args:
            examples: n of them.
            array: float32 (n, n_layers, tokens, d_model), as the files have it.
            labels: uint16 (n, content_tokens_per_example), or None.

        Raises:
            ValueError: an example is of another shard, or has been written, or the labels have
                another shape or dtype.
        """
        rows = np.array(examples, dtype=np.int64) - self.piece.first
        if (
            len(rows) != len(array)
            or ((rows < 0) | (rows >= len(self._there))).any()
            or len(np.unique(rows)) < len(rows)
            or self._there[rows].any()
        ):
            raise ValueError(
                f"a batch of {len(array)} examples is numbered {list(examples)}; wanted each of"
                f" {self.piece.first} to {self.piece.stop - 1} once"
            )
        # Neighbors are written at once.
        for run in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1):
            if len(run):
                self._file.seek(int(rows[run[0]]) * self.piece.metadata.example_bytes)
                self._file.write(array[run[0] : run[-1] + 1].data)
        if labels is not None:
            wanted = (len(rows), self._labels.shape[1])
            if labels.dtype != np.uint16 or labels.shape != wanted:
                raise ValueError(
                    f"labels are {labels.dtype} {labels.shape}, wanted uint16 {wanted}, one per"
                    " content token"
                )
            self._labels[rows] = labels
        self._there[rows] = True

    def finish(self) -> None:
        """Have the shard and its labels on the device, and then its note."""
        self.close()
        flush(self.piece.data)
        if self.piece.labeled:
            self.piece.labels.write_bytes(self._labels.tobytes())
            flush(self.piece.labels)
        with publish_file(self.piece.note) as partial:
            partial.write_text(self.piece.said, encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

"""Activations as saev wrote them: a folder of float32 shards, read one layer at a time.

A shard is a C-contiguous little-endian float32 array (examples_per_shard, n_layers, tokens,
d_model). The content tokens of one (example, layer) are one run of bytes. They are read by `preadv`
(io/shards/windows.py), not through a memory map: a file that shrinks while it is read gives a
ValueError here, and would kill the process there.
"""

import json
import logging
import os
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np
import torch

from assay.io.files import METADATA_NAME, contained_file, read_file, read_json_bytes, real_folder
from assay.io.sampling import sample_bytes, sampled_digest
from assay.io.shards.metadata import (
    INDEX_NAME,
    LABELS_NAME,
    find_labels,
    read_index,
    read_metadata,
    sized_labels,
    sized_shard,
)
from assay.io.shards.order import Order, OrderFile, Sequential, Shuffled, shuffled_window
from assay.io.shards.shares import Share, shares_from
from assay.io.shards.stream_reader import Batches
from assay.io.shards.windows import LayerBytes
from assay.io.shards.writing import _hash, _short_hash

logger = logging.getLogger(__name__)

MAX_THREADS = 64


def default_threads() -> int:
    """Reading threads where none are asked for: half the processors that the process may run on, 2
    to 8.
    """
    allowed = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    )
    return min(8, max(2, allowed // 2))


class OrderOptions(TypedDict, total=False):
    """Which tokens of a layer to read and in which order; every option may be left out.

    Attributes:
        shuffle: in random order; false by default.
        seed: of the shuffling, 0 <= seed < 2^63; 0 by default.
        order: a .npy file of int64 token numbers (example * content_tokens_per_example + content
            token) to read instead, each at most once.
        max_tokens: only so many tokens: the first of the order; shuffled, a random sample that is
            the same for every seed.
    """

    shuffle: bool
    seed: int
    order: str | os.PathLike[str] | None
    max_tokens: int | None


class ReadOptions(OrderOptions, total=False):
    """How to read a layer; every option may be left out.

    Attributes:
        stop: end the pass before that place in the order: what comes before is as in a whole pass.
        threads: that read ahead; by default the folder's. They do not change what is read.
        cursor: `Batches.state()` of a pass with the same folder and options, to go on with its next
            batch.
        device: where the batches are wanted; the CPU by default. On CUDA they are copied there from
            pinned memory, asynchronously.
        held: the layer as `LayerActivations.hold` read it: batches are taken from it and are where
            it is.
    """

    stop: int | None
    threads: int
    cursor: Mapping[str, Any] | None
    device: torch.device | str
    held: torch.Tensor | None


class Shards:
    """A published folder of shards, opened read-only. Opening reads the two JSON files and no
    array.

    Args:
        path: the folder.
        threads: that read ahead in a pass that asks for no other number, 1 to 64; None: half the
            processors that the process may run on, 2 to 8.

    Attributes:
        path: the folder, symbolic links resolved.
        name: its name, which is the identity of the data.
        metadata: the validated metadata.json.
        layers: block numbers held.
        d_model: width of an activation.
        n_examples: examples over all shards.
        content_tokens_per_example: patches in an example; the CLS token is not counted and never
            read.
        n_tokens: n_examples * content_tokens_per_example, the tokens of one layer.
        has_labels: whether there is a labels.bin or a labels16.bin.

    Raises:
        FileNotFoundError: the folder or a file that it lists is missing.
        ValueError: anything else is wrong with it; the message names the file, what was found and
            what was wanted.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None) -> None:
        self.path = real_folder(path)
        self.threads = threads
        self.name = self.path.name
        self.metadata = read_metadata(self.path)
        self.layers = self.metadata.layers
        self.d_model = self.metadata.d_model
        self.n_examples = self.metadata.n_examples
        self.content_tokens_per_example = self.metadata.content_tokens_per_example
        self.n_tokens = self.n_examples * self.content_tokens_per_example
        self._entries = read_index(self.path, self.metadata)
        self._files = [sized_shard(self.path, self.metadata, entry) for entry in self._entries]
        if len(set(self._files)) < len(self._files):
            raise ValueError(
                f"{self.path / INDEX_NAME} lists two links to one file; wanted a file for each"
                " shard"
            )
        self._labels = find_labels(self.path, self.metadata)
        self.has_labels = self._labels is not None
        if self._labels is not None:
            sized_labels(self.path, self.metadata, self._labels)

    def __repr__(self) -> str:
        return (
            f"Shards({self.name}: {self.metadata.family}/{self.metadata.ckpt}, layers"
            f" {list(self.layers)}, {self.n_examples} examples x {self.content_tokens_per_example}"
            f" tokens x {self.d_model}{', labels' if self.has_labels else ''})"
        )

    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) of the `identity` and the labels, as they are now."""
        found = self.identity()
        if self._labels is not None:
            found["labels"] = _hash(read_file(contained_file(self.path, self._labels.name)[0]))
        return _hash(json.dumps(found).encode())

    def identity(self) -> dict[str, str]:
        """What tells these activations from others, by part: the folder's name, hashes of its JSON
        files, of the shards' sizes, and of a sample of their content, some MiB in all
        (io/sampling.py). It is taken from the folder as it is now.

        A copy of the folder has the same. A change to one of many numbers may go unseen; another
        recording does not.
        """
        described = {
            n: _short_hash(read_json_bytes(self.path, n)) for n in (METADATA_NAME, INDEX_NAME)
        }
        sizes = [contained_file(self.path, entry.name)[1].st_size for entry in self._entries]
        most, example = sample_bytes(len(self._files)), self.metadata.example_bytes
        content = [
            sampled_digest(file, most, entry.n_examples * example)
            for file, entry in zip(self._files, self._entries, strict=True)
        ]
        return {
            "name": self.name,
            **described,
            "sizes": _short_hash(json.dumps(sizes).encode()),
            "content": _short_hash(json.dumps(content).encode()),
        }

    def labels(self) -> torch.Tensor:
        """Patch labels, int64 (n_tokens,), in the order of unshuffled batches; 0 is void.

        Raises:
            FileNotFoundError: the folder has no labels.bin.
            ValueError: labels.bin cannot be read, or has changed its size since the folder was
                opened.
        """
        if self._labels is None:
            raise FileNotFoundError(
                f"{self.path} has no {LABELS_NAME}; record a segmentation dataset to have labels"
            )
        path = sized_labels(self.path, self.metadata, self._labels)
        content = read_file(path)
        if len(content) != self._labels.n_bytes:
            raise ValueError(
                f"{path} has {len(content)} bytes, wanted {self._labels.n_bytes}: it changed while"
                " it was read; restore the file"
            )
        raw = np.frombuffer(content, dtype=np.dtype(self._labels.dtype).newbyteorder("<"))
        return torch.from_numpy(raw.astype(np.int64))

    def layer(self, layer: int) -> "LayerActivations":
        """One layer of the folder, by its block number; raises ValueError if the folder does not
        hold it.
        """
        return LayerActivations(self, layer)

    def batches(self, *, layer: int, batch_size: int, **options: Unpack[ReadOptions]) -> Batches:
        """Batches of one layer; see `LayerActivations.batches`."""
        return self.layer(layer).batches(batch_size=batch_size, **options)

    def layer_bytes(self, layer: int) -> LayerBytes:
        """Where the content tokens of a layer lie."""
        metadata = self.metadata
        first = self.layers.index(layer) * metadata.tokens_per_example + metadata.cls_token
        return LayerBytes(
            name=self.name,
            fingerprint=_hash(json.dumps(self.identity()).encode()),
            layer=layer,
            files=self._files,
            examples_per_shard=metadata.examples_per_shard,
            content_tokens_per_example=self.content_tokens_per_example,
            example_bytes=metadata.example_bytes,
            first_byte=first * self.d_model * 4,
            d_model=self.d_model,
        )


@dataclass(frozen=True)
class LayerActivations:
    """The content tokens of one layer of a folder of shards.

    Raises:
        ValueError: the folder does not hold that layer.
    """

    shards: Shards
    layer: int

    def __post_init__(self) -> None:
        if self.layer not in self.shards.layers:
            wanted = list(self.shards.layers)
            raise ValueError(
                f"layer {self.layer} is not in {self.shards.path}; wanted one of {wanted}"
            )

    @property
    def n_tokens(self) -> int:
        """Tokens in a pass."""
        return self.shards.n_tokens

    @property
    def d_model(self) -> int:
        """Width of an activation."""
        return self.shards.d_model

    def batches(self, *, batch_size: int, **options: Unpack[ReadOptions]) -> Batches:
        """One pass: every content token once, in float32 batches (batch_size, d_model); only the
        last may be shorter.

        Unshuffled, tokens come in the order of the examples. Shuffled, runs of 32 tokens of all
        shards are visited in a random order and their tokens are permuted within windows of max(2 *
        batch_size, 16,384) tokens, rounded up to whole batches; at most two windows are in memory.
        A batch is the caller's to keep. See docs/reading.md.

        Args:
            batch_size: tokens in a batch.
            options: see `ReadOptions` and `OrderOptions`.

        Raises:
            FileNotFoundError: there is no such order file, or a file of the folder has gone.
            ValueError: at the call, for an option out of its bounds, options that exclude each
                other, an order file that does not fit or a cursor of another pass; while reading,
                for a NaN, an infinity or a file that has become shorter. Errors in reading threads
                are raised here.
            OSError: the device does not give the bytes; it names the file and the place.
        """
        given = ReadOptions(**options)
        held, stop = given.get("held"), given.get("stop")
        if stop is not None and stop < 1:
            raise ValueError(f"stop is {stop}, wanted at least 1 token, or None for the end")
        if held is not None and held.shape != (self.n_tokens, self.d_model):
            raise ValueError(
                f"held is {tuple(held.shape)}, wanted all of the layer,"
                f" {(self.n_tokens, self.d_model)}: pass what hold() returned"
            )
        order, threads = self._order(batch_size, given), self._threads(given)
        return Batches(
            self.shards.layer_bytes(self.layer),
            order,
            batch_size=batch_size,
            threads=threads,
            max_tokens=given.get("max_tokens"),
            stop=stop,
            cursor=given.get("cursor"),
            device=torch.device(given.get("device", "cpu")),
            held=held,
        )

    def share(
        self,
        rank: int,
        ranks: int,
        *,
        batch_size: int,
        start: int = 0,
        **options: Unpack[ReadOptions],
    ) -> Generator[Share, None, None]:
        """One of `ranks` shares of a pass: of every window the tokens of `rank`, whole runs of
        neighbors on disk. The shares of all ranks together are the window, each token once.

        The windows are those of `batches` with the same options: whole batches, whatever the number
        of ranks, in the same order. A batch of a window is its tokens at [k batch_size,
        (k + 1) batch_size). Close it, or drop it, to end its threads.

        Args:
            rank: 0 to ranks - 1.
            ranks: how many share the pass.
            batch_size: tokens in a batch.
            start: a place in the order to begin at, a multiple of the batch size; the first window
                is what is left of the one that it is in.
            options: as in `batches`, but for `cursor`, `held` and `stop`.

        Raises:
            ValueError, OSError: as `batches`; those of `options` at the call.
        """
        given = ReadOptions(**options)
        excluded = sorted({"cursor", "held", "stop"} & given.keys())
        if excluded:
            raise ValueError(f"found {excluded[0]}, wanted none of it: a share begins at `start`")
        if not 0 <= rank < ranks:
            raise ValueError(f"found rank {rank} of {ranks}, wanted 0 to {ranks - 1}")
        order, threads = self._order(batch_size, given), self._threads(given)
        if start < 0 or start % batch_size:
            raise ValueError(f"start is {start}, wanted a multiple of the batch size, {batch_size}")
        n_tokens = min(order.n_tokens, given.get("max_tokens") or order.n_tokens)
        return shares_from(
            self.shards.layer_bytes(self.layer),
            order,
            batch_size,
            n_tokens,
            threads,
            start // batch_size,
            torch.device(given.get("device", "cpu")),
            rank,
            ranks,
        )

    def _threads(self, given: ReadOptions) -> int:
        threads = given.get("threads", self.shards.threads or default_threads())
        if not 1 <= threads <= MAX_THREADS:
            raise ValueError(f"threads is {threads}, wanted 1 to {MAX_THREADS}")
        return threads

    def _order(self, batch_size: int, given: ReadOptions) -> Order:
        """The order of a pass."""
        shuffle, seed, path = given.get("shuffle", False), given.get("seed", 0), given.get("order")
        max_tokens = given.get("max_tokens")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, wanted at least 1 token")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}, wanted 0 <= seed < 2^63")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(
                f"max_tokens is {max_tokens}, wanted at least 1 token, or None for all"
            )
        if shuffle and path is not None:
            raise ValueError(f"shuffle is set and so is the order file {path}; wanted one of them")
        if path is not None:
            return OrderFile(path, self.n_tokens)
        if shuffle:
            return Shuffled(
                self.shards.n_examples,
                self.shards.content_tokens_per_example,
                batch_size,
                seed,
                max_tokens,
            )
        return Sequential(self.n_tokens)

    def window(self, batch_size: int) -> int:
        """Tokens that a shuffled pass permutes together, a multiple of the batch size: where the
        work of one is best cut.
        """
        return shuffled_window(batch_size)

    def hold(self, batches: Iterable[torch.Tensor], device: torch.device | str) -> torch.Tensor:
        """All content tokens in one tensor on the device, float32 (n_tokens, d_model), of one
        unshuffled pass: for passes `held`.
        """
        held = torch.empty(self.n_tokens, self.d_model, dtype=torch.float32, device=device)
        start = 0
        for batch in batches:
            held[start : start + len(batch)] = batch
            start += len(batch)
        return held

"""Activations as saev wrote them: a folder of float32 shards, read one layer at a time.

A shard is a C-contiguous little-endian float32 array (examples_per_shard, n_layers, tokens, d_model). The content
tokens of one (example, layer) are one run of bytes, so that is the unit of reading. It is read by `pread`, not through
a memory map: a file that shrinks while it is read gives a ValueError here, and would kill the process there.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from assay.io.metadata import (
    INDEX_NAME,
    LABELS_NAME,
    METADATA_NAME,
    Metadata,
    contained_file,
    read_index,
    read_json_bytes,
    read_metadata,
    real_folder,
    sized_shard,
)
from assay.io.publish import publishing_folder

logger = logging.getLogger(__name__)

# A shuffled pass mixes within a pool of so many tokens (256 MiB at d_model 1024) or of so many batches, if more.
POOL_TOKENS = 65_536
POOL_BATCHES = 8


class Shards:
    """A published folder of shards, opened read-only. Opening reads the two JSON files and no array.

    Attributes:
        path: the folder, symbolic links resolved.
        name: its name, which is the identity of the data.
        metadata: the validated metadata.json.
        layers: block numbers held.
        d_model: width of an activation.
        n_examples: examples over all shards.
        content_tokens_per_example: patches in an example; the CLS token is not counted and never read.
        n_tokens: n_examples * content_tokens_per_example, the tokens of one layer.
        has_labels: whether there is a labels.bin.

    Raises:
        FileNotFoundError: the folder or a file that it lists is missing.
        ValueError: anything else is wrong with it; the message names the file, what was found and what was wanted.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = real_folder(path)
        self.name = self.path.name
        self.metadata = read_metadata(self.path)
        self.layers = self.metadata.layers
        self.d_model = self.metadata.d_model
        self.n_examples = self.metadata.n_examples
        self.content_tokens_per_example = self.metadata.content_tokens_per_example
        self.n_tokens = self.n_examples * self.content_tokens_per_example
        self._files = [sized_shard(self.path, self.metadata, entry) for entry in read_index(self.path, self.metadata)]
        if len(set(self._files)) < len(self._files):
            raise ValueError(f"{self.path / INDEX_NAME} lists two links to one file; wanted a file for each shard")
        self.has_labels = os.path.lexists(self.path / LABELS_NAME)
        if self.has_labels:
            self._labels_file()

    def __repr__(self) -> str:
        return (
            f"Shards({self.name}: {self.metadata.family}/{self.metadata.ckpt}, layers {list(self.layers)}, "
            f"{self.n_examples} examples x {self.content_tokens_per_example} tokens x {self.d_model}"
            f"{', labels' if self.has_labels else ''})"
        )

    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) of the folder's name, its JSON files, and every data file's name, size and mtime.

        Changed data has a changed fingerprint without a terabyte being read. It is taken from the folder as it is now.
        """
        described = [hashlib.sha256(read_json_bytes(self.path, n)).hexdigest() for n in (METADATA_NAME, INDEX_NAME)]
        names = [file.name for file in self._files] + [LABELS_NAME] * self.has_labels
        status = [contained_file(self.path, name)[1] for name in names]
        files = [(name, info.st_size, info.st_mtime_ns) for name, info in zip(names, status, strict=True)]
        return hashlib.sha256(json.dumps([self.name, described, files]).encode()).hexdigest()

    def labels(self) -> torch.Tensor:
        """Patch labels, int64 (n_tokens,), in the order of unshuffled batches; 0 is void.

        Raises:
            FileNotFoundError: the folder has no labels.bin.
            ValueError: labels.bin has changed its size since the folder was opened.
        """
        raw = np.fromfile(self._labels_file(), dtype=f"<u{self.metadata.labels_bytes}")
        return torch.from_numpy(raw.astype(np.int64))

    def layer(self, layer: int) -> "LayerActivations":
        """One layer of the folder, by its block number; raises ValueError if the folder does not hold it."""
        return LayerActivations(self, layer)

    def batches(self, *, layer: int, batch_size: int, shuffle: bool = False, seed: int = 0) -> Iterator[torch.Tensor]:
        """Batches of one layer; see `LayerActivations.batches`."""
        return self.layer(layer).batches(batch_size=batch_size, shuffle=shuffle, seed=seed)

    def read_block(self, layer: int, example: int, token: int, out: npt.NDArray[np.float32]) -> None:
        """Fill `out`, "<f4" (n, d_model), with the content tokens [token, token + n) of one example in one layer.

        Raises:
            ValueError: a number is not finite, or the file has become shorter since the folder was opened.
        """
        shard, row = divmod(example, self.metadata.examples_per_shard)
        first = (row * len(self.layers) + self.layers.index(layer)) * self.metadata.tokens_per_example
        offset = (first + self.metadata.cls_token + token) * self.d_model * 4
        path = self._files[shard]
        with open(path, "rb", buffering=0) as file:
            n_read = _pread(file.fileno(), out.data.cast("B"), offset)
        if n_read < out.nbytes:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, wanted at least {offset + out.nbytes}: it became shorter "
                "after it was opened; published shards must not change, restore the file"
            )
        finite = np.isfinite(out).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"{path}: NaN or infinity in example {example}, content token {token + int(finite.argmin())}, "
                f"layer {layer}; wanted finite activations, record that example again"
            )

    def _labels_file(self) -> Path:
        if not os.path.lexists(self.path / LABELS_NAME):
            raise FileNotFoundError(f"{self.path} has no {LABELS_NAME}; record a segmentation dataset to have labels")
        path, info = contained_file(self.path, LABELS_NAME)
        wanted = self.n_tokens * self.metadata.labels_bytes
        if info.st_size != wanted:
            raise ValueError(
                f"{path} has {info.st_size} bytes, wanted {wanted} ({self.n_examples} examples x {self.content_tokens_per_example} "
                f"content tokens, {self.metadata.labels_dtype or 'uint8'}); restore the file"
            )
        return path


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
            raise ValueError(f"layer {self.layer} is not in {self.shards.path}; wanted one of {wanted}")

    @property
    def n_tokens(self) -> int:
        """Tokens in a pass."""
        return self.shards.n_tokens

    @property
    def d_model(self) -> int:
        """Width of an activation."""
        return self.shards.d_model

    def batches(self, *, batch_size: int, shuffle: bool = False, seed: int = 0) -> Iterator[torch.Tensor]:
        """One pass: every content token once, in float32 batches (batch_size, d_model); only the last may be shorter.

        Unshuffled, tokens come in the order of the examples. Shuffled, the examples of all shards are visited in a
        random order and their tokens are mixed in a pool of max(8 * batch_size, 65,536) tokens and up to a batch more.
        That order depends on `seed` and `batch_size` only.

        Raises:
            ValueError: at the call, for a batch_size below 1 or a seed outside [0, 2^63); while reading, for a NaN, an
                infinity or a file that has become shorter.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, wanted at least 1 token")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}, wanted 0 <= seed < 2^63")
        return self._shuffled(batch_size, seed) if shuffle else self._in_order(batch_size)

    def _in_order(self, batch_size: int) -> Iterator[torch.Tensor]:
        order = range(self.shards.n_examples)
        for start in range(0, self.n_tokens, batch_size):
            yield torch.from_numpy(self._read(order, start, min(start + batch_size, self.n_tokens)))

    def _shuffled(self, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.shards.n_examples, generator=generator).tolist()
        size = max(POOL_BATCHES * batch_size, POOL_TOKENS)
        # What lies outside the pool is then a whole number of batches, so that every hole in the pool is filled again.
        size = min(self.n_tokens, size + (self.n_tokens - size) % batch_size)
        # The pool is numpy's: copying rows is bound by memory, and torch's threads cost more than they give.
        pool = self._read(order, 0, size)
        turn = torch.randperm(size, generator=generator).numpy()
        for start in range(size, self.n_tokens, batch_size):
            if len(turn) < batch_size:
                turn = torch.randperm(size, generator=generator).numpy()
            picks, turn = turn[:batch_size], turn[batch_size:]
            yield torch.from_numpy(pool[picks])
            pool[picks] = self._read(order, start, start + batch_size)
        rest = torch.randperm(size, generator=generator).numpy()
        for start in range(0, size, batch_size):
            yield torch.from_numpy(pool[rest[start : start + batch_size]])

    def _read(self, order: Sequence[int], start: int, stop: int) -> npt.NDArray[np.float32]:
        """Tokens [start, stop) of the stream that visits the examples in `order`, float32 (stop - start, d_model)."""
        per_example = self.shards.content_tokens_per_example
        out = np.empty((stop - start, self.d_model), dtype="<f4")
        filled = 0
        while filled < len(out):
            position, token = divmod(start + filled, per_example)
            n = min(per_example - token, len(out) - filled)
            self.shards.read_block(self.layer, order[position], token, out[filled : filled + n])
            filled += n
        return out.astype(np.float32, copy=False)


def write_shards(
    root: str | os.PathLike[str],
    metadata: Metadata,
    examples: Iterable[npt.NDArray[np.float32] | torch.Tensor],
    labels: npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | torch.Tensor | None = None,
) -> Path:
    """Publish `<root>/<hash>/` as saev would have written it, holding one batch at a time, and return its path.

    Every shard is full-sized, the last one padded with zeros; if that would be exactly full, an empty one more follows.

    Args:
        root: the folder that holds the folders of shards; made if it is missing.
        metadata: what is recorded. Its n_examples must be what `examples` yields in all.
        examples: batches, float32 (n, n_layers, tokens, d_model), the CLS token first where there is one.
        labels: patch labels (n_examples, content_tokens_per_example) of the metadata's labels_dtype, 0 for void.

    Raises:
        FileExistsError: that folder exists already: published shards are immutable.
        ValueError: a batch or the labels have another shape or dtype, hold a NaN or an infinity, or are not n_examples
            in all. Nothing is left behind.
    """
    folder = Path(root) / metadata.hash
    per_shard = metadata.examples_per_shard
    with publishing_folder(folder) as partial:
        if labels is not None:
            (partial / LABELS_NAME).write_bytes(_checked_labels(labels, metadata).tobytes())
        n_written = 0
        for batch in examples:
            array = _checked_batch(batch, metadata, n_written)
            while len(array):
                shard, row = divmod(n_written, per_shard)
                part, array = array[: per_shard - row], array[per_shard - row :]
                with open(partial / _shard_name(shard), "ab") as file:
                    file.write(part.data)
                n_written += len(part)
        if n_written != metadata.n_examples:
            raise ValueError(f"{n_written} examples came, wanted n_examples = {metadata.n_examples}; correct either")
        n_full, n_last = divmod(n_written, per_shard)
        with open(partial / _shard_name(n_full), "ab") as file:
            file.truncate(per_shard * metadata.example_bytes)
        counts = [per_shard] * n_full + [n_last]
        index = [{"name": _shard_name(shard), "n_examples": count} for shard, count in enumerate(counts)]
        (partial / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
        (partial / METADATA_NAME).write_text(metadata.to_json(), encoding="utf-8")
    logger.info("published %d examples in %s", metadata.n_examples, folder)
    return folder


def _pread(descriptor: int, out: memoryview, offset: int) -> int:
    """Fill `out` from `offset`; returns the bytes read, fewer than asked for only at the end of the file."""
    n_read = 0
    while n_read < len(out):
        n = os.preadv(descriptor, [out[n_read:]], offset + n_read)
        if n == 0:
            break
        n_read += n
    return n_read


def _shard_name(shard: int) -> str:
    return f"acts{shard:06d}.bin"


def _checked_labels(
    labels: npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | torch.Tensor, metadata: Metadata
) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """The labels as a little-endian array."""
    array = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else labels
    dtype, wanted = metadata.labels_dtype or "uint8", (metadata.n_examples, metadata.content_tokens_per_example)
    if array.dtype != dtype or array.shape != wanted:
        raise ValueError(f"labels are {array.dtype} {array.shape}, wanted {dtype} {wanted}, one a content token")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _checked_batch(
    batch: npt.NDArray[np.float32] | torch.Tensor, metadata: Metadata, first: int
) -> npt.NDArray[np.float32]:
    """The batch as a C-contiguous little-endian array; `first` is the number of its first example."""
    wanted = metadata.example_shape
    if batch.dtype not in (torch.float32, np.float32) or batch.ndim != 4 or tuple(batch.shape[1:]) != wanted:
        raise ValueError(f"a batch is {batch.dtype} {tuple(batch.shape)}, wanted float32 {('n', *wanted)}")
    if first + len(batch) > metadata.n_examples:
        raise ValueError(
            f"at least {first + len(batch)} examples came, wanted n_examples = {metadata.n_examples}; correct either"
        )
    array = np.ascontiguousarray(
        batch.detach().cpu().numpy() if isinstance(batch, torch.Tensor) else batch, dtype="<f4"
    )
    finite = np.isfinite(array).all(axis=(1, 2, 3))
    if not finite.all():
        number = first + int(finite.argmin())
        raise ValueError(f"example {number} holds a NaN or an infinity; wanted finite activations, record it again")
    return array

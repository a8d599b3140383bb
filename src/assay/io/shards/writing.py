"""Writing shards as saev does: whole folders, hashed and published at once."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from assay.io.files import METADATA_NAME
from assay.io.publish import naming, publishing_folder
from assay.io.shards.metadata import INDEX_NAME, LABELS_NAME, WIDE_LABELS_NAME, Metadata

logger = logging.getLogger(__name__)


def write_shards(
    root: str | os.PathLike[str],
    metadata: Metadata,
    examples: Iterable[npt.NDArray[np.float32] | torch.Tensor],
    labels: npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | torch.Tensor | None = None,
) -> Path:
    """Publish `<root>/<hash>/` as saev would have written it, holding one batch at a time, and
    return its path.

    Every shard is full-sized, the last one padded with zeros; if that would be exactly full, an
    empty one more follows.

    Args:
        root: the folder that holds the folders of shards; made if it is missing.
        metadata: what is recorded. Its n_examples must be what `examples` yields in all.
        examples: batches, float32 (n, n_layers, tokens, d_model), the CLS token first where there
            is one.
        labels: patch labels (n_examples, content_tokens_per_example), 0 for void; uint16 lie in
            labels16.bin.

    Raises:
        FileExistsError: that folder exists already: published shards are immutable.
        ValueError: a batch or the labels have another shape or dtype, hold a NaN or an infinity, or
            are not n_examples in all. Nothing is left behind.
        OSError: the disk is full, say; it names the folder.
    """
    folder = Path(root) / metadata.hash
    per_shard = metadata.examples_per_shard
    with publishing_folder(folder) as partial:
        if labels is not None:
            with naming(folder):
                checked = _checked_labels(labels, metadata)
                name = LABELS_NAME if checked.dtype == np.uint8 else WIDE_LABELS_NAME
                (partial / name).write_bytes(checked.tobytes())
        n_written = 0
        for batch in examples:
            array = as_stored(batch, metadata)
            if n_written + len(array) > metadata.n_examples:
                raise ValueError(
                    f"at least {n_written + len(array)} examples came, wanted n_examples ="
                    f" {metadata.n_examples}; correct either"
                )
            if (bad := find_not_finite(array)) is not None:
                raise ValueError(
                    f"example {n_written + bad} holds a NaN or an infinity; wanted finite"
                    " activations, record it again"
                )
            while len(array):
                shard, row = divmod(n_written, per_shard)
                part, array = array[: per_shard - row], array[per_shard - row :]
                with naming(folder), open(partial / shard_name(shard), "ab") as file:
                    file.write(part.data)
                n_written += len(part)
        if n_written != metadata.n_examples:
            raise ValueError(
                f"{n_written} examples came, wanted n_examples = {metadata.n_examples}; correct"
                " either"
            )
        with naming(folder):
            finish_shards(partial, metadata)
    logger.debug("published %d examples in %s", metadata.n_examples, folder)
    return folder


def _hash(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _short_hash(raw: bytes) -> str:
    return _hash(raw)[:16]


def shard_name(shard: int) -> str:
    """The file of a shard, by its number."""
    return f"acts{shard:06d}.bin"


def finish_shards(folder: Path, metadata: Metadata) -> None:
    """Write what a folder of shards wants beside its examples: zeros after the last of them,
    shards.json and metadata.json.
    """
    per_shard = metadata.examples_per_shard
    n_full, n_last = divmod(metadata.n_examples, per_shard)
    with open(folder / shard_name(n_full), "ab") as file:
        file.truncate(per_shard * metadata.example_bytes)
    index = [
        {"name": shard_name(shard), "n_examples": count}
        for shard, count in enumerate([per_shard] * n_full + [n_last])
    ]
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
    (folder / METADATA_NAME).write_text(metadata.to_json(), encoding="utf-8")


def _checked_labels(
    labels: npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | torch.Tensor, metadata: Metadata
) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """The labels as a little-endian array."""
    array = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else labels
    wanted = (metadata.n_examples, metadata.content_tokens_per_example)
    if array.dtype not in (np.uint8, np.uint16) or array.shape != wanted:
        raise ValueError(
            f"labels are {array.dtype} {array.shape}, wanted uint8 {wanted}, one per content token,"
            " or uint16"
        )
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def as_stored(
    batch: npt.NDArray[np.float32] | torch.Tensor, metadata: Metadata
) -> npt.NDArray[np.float32]:
    """A batch as a C-contiguous little-endian array; raises ValueError for another shape than the
    metadata's examples, float32 (n, n_layers, tokens, d_model), or another dtype.
    """
    wanted = metadata.example_shape
    if (
        batch.dtype not in (torch.float32, np.float32)
        or batch.ndim != 4
        or tuple(batch.shape[1:]) != wanted
    ):
        raise ValueError(
            f"a batch is {batch.dtype} {tuple(batch.shape)}, wanted float32 {('n', *wanted)}"
        )
    return np.ascontiguousarray(
        batch.detach().cpu().numpy() if isinstance(batch, torch.Tensor) else batch, dtype="<f4"
    )


def find_not_finite(array: npt.NDArray[np.float32]) -> int | None:
    """The first row of a batch (n, n_layers, tokens, d_model) that holds a NaN or an infinity."""
    finite = np.isfinite(array).all(axis=(1, 2, 3))
    return None if finite.all() else int(finite.argmin())

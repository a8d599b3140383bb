"""Codes, errors and probes as saev's notebooks read them: `token_acts.npz`, a CSR matrix of
(tokens, features) as `scipy.sparse.save_npz` writes a `csr_array`, `metrics.json` and
`probe1d_metrics.npz`.

The matrix is written without scipy, from one pass over the codes: its entries wait in two files
beside it, since an array's header says how many there are.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib import format as npy

from assay.codes import Batch, Codes
from assay.io.codes.saev import CODES_NAME, METRICS_NAME
from assay.io.publish import free_bytes, naming

PROBES_NAME = "probe1d_metrics.npz"
COUNTS = ("tp", "fp", "tn", "fn")
PROBE_ARRAYS = ("loss", "weights", "biases", *COUNTS)

MOST_INT32 = 2**31 - 1
EXACT_FLOAT32 = 2**24
"""Up to which float32 holds every whole number."""

LOOKED_AT = 8
"""Batches that tell how many entries the rows have, where only reading does."""
CHUNK = 1 << 24

LEVEL = 1
"""Of compression: more takes several times as long, and gains nothing on floats."""

Arrays = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]


def write_token_acts(
    folder: Path,
    codes: Codes,
    *,
    batch_size: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Stream codes into `token_acts.npz` in a folder; entries that are 0 are left out.

    Rows are the content tokens in order. Values are float32, indices are sorted within a row and
    int32 where the entries can be counted in it, else int64, as scipy chooses. Memory holds a batch
    and 8 bytes a row; the disk, on the way, 12 bytes an entry.

    Args:
        folder: where the file is written. It appears there unfinished: publish the folder.
        codes: of any format.
        batch_size: rows read at once.
        progress: called with the number of rows that are done.

    Returns:
        The number of entries.

    Raises:
        ValueError: there are more or fewer rows than the codes promise, a value is not finite, or
            an index is no feature.
        OSError: the disk is full; it names the file.
    """
    target = folder / CODES_NAME
    waiting = {name: folder / f".{name}" for name in ("indices", "data")}
    lengths = np.zeros(codes.n_rows, dtype=np.int64)
    done = 0
    with naming(target), ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in waiting.values()]
        for batch in codes.batches(batch_size):
            of_rows, *entries = _entries(batch, codes, done)
            stop = done + len(of_rows)
            if stop > codes.n_rows:
                raise ValueError(
                    f"codes hold {stop} rows or more, wanted {codes.n_rows}: make them again"
                )
            lengths[done:stop] = of_rows
            for file, array in zip(files, entries, strict=True):
                file.write(array.data)
            done = stop
            if progress is not None:
                progress(done)
    if done != codes.n_rows:
        raise ValueError(f"codes hold {done} rows, wanted {codes.n_rows}: make them again")
    with naming(target):
        _assemble(target, lengths, codes.n_features, waiting)
    return int(lengths.sum())


def write_probe_metrics(folder: Path, arrays: Mapping[str, npt.NDArray[np.float64]]) -> None:
    """Write `probe1d_metrics.npz` in a folder.

    Args:
        folder: where the file is written.
        arrays: (features, classes) each, by saev's names, which are `PROBE_ARRAYS`. They are
            written as float32, as saev does, but for counts that float32 would round.

    Raises:
        ValueError: a name is missing or none of saev's, or the shapes differ.
    """
    if set(arrays) != set(PROBE_ARRAYS) or len({array.shape for array in arrays.values()}) != 1:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ValueError(f"found {shapes}, wanted {', '.join(PROBE_ARRAYS)} of one shape")
    large = any(np.nanmax(arrays[name], initial=0) > EXACT_FLOAT32 for name in COUNTS)
    with naming(folder / PROBES_NAME), zipfile.ZipFile(folder / PROBES_NAME, "w") as archive:
        for name in PROBE_ARRAYS:
            dtype = np.dtype("<f8" if large and name in COUNTS else "<f4")
            array = np.ascontiguousarray(arrays[name], dtype)
            _add(archive, name, dtype, array.shape, [array.tobytes()])


def write_metrics(
    folder: Path, *, sse_recon: float, sse_baseline: float, n_tokens: int, d_model: int
) -> None:
    """Write `metrics.json` in a folder: `sse_recon` = sum ||x - x^||^2 and `sse_baseline` =
    sum ||x - x_bar||^2 in the activations' own units, x_bar the mean of these very tokens, and what
    saev derives of them.
    """
    n_elements = n_tokens * d_model
    metrics = {
        "mse_per_dim": sse_recon / n_elements,
        "mse_per_token": sse_recon / n_tokens,
        "normalized_mse": sse_recon / sse_baseline,
        "baseline_mse_per_dim": sse_baseline / n_elements,
        "baseline_mse_per_token": sse_baseline / n_tokens,
        "sse_recon": sse_recon,
        "sse_baseline": sse_baseline,
        "n_tokens": n_tokens,
        "d_model": d_model,
        "n_elements": n_elements,
    }
    (folder / METRICS_NAME).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


def check_room(target: Path, codes: Iterable[Codes]) -> None:
    """Check that the disk has room for the `token_acts.npz` of some codes, written one after the
    other, before any of them is.

    Entries are counted exactly where every row has as many, and else in a few batches.

    Raises:
        ValueError: it has not; naming both sizes.
    """
    sizes = [(each, _count_entries(each)) for each in codes]
    free = free_bytes(target)
    needed = most = 0
    for each, entries in sizes:
        size = _entry_bytes(entries) * entries + 8 * each.n_rows
        most = max(most, needed + size + 4 * entries)
        needed += size
    if most > free:
        n_rows, entries = sum(each.n_rows for each, _ in sizes), sum(found for _, found in sizes)
        raise ValueError(
            f"{target}: {entries:.3g} entries, {entries / max(1, n_rows):.4g} of"
            f" {sizes[0][0].n_features} features in each of {n_rows} tokens, take up to"
            f" {most / 1e9:.3g} GB as CSR, {free / 1e9:.3g} GB are free: name a folder on another"
            " disk with --out, or an encoding with fewer entries"
        )


def _entry_bytes(entries: int) -> int:
    return 8 if entries <= MOST_INT32 else 12


def _count_entries(codes: Codes) -> int:
    if codes.format == "onehot":
        return codes.n_rows
    if codes.format == "sparse" and codes.k is not None:
        return codes.n_rows * codes.k
    rows = found = 0
    for start in sorted({codes.n_rows * part // LOOKED_AT for part in range(LOOKED_AT)}):
        for batch in codes.batches(256, start):
            rows += len(batch["values"])
            found += int(batch["values"].count_nonzero())
            break
    return -(-codes.n_rows * found // max(1, rows))


def _entries(batch: Batch, codes: Codes, first_row: int) -> Arrays:
    """How many entries each row of a batch has, int64 (b,); and their features and values, row by
    row and sorted by feature.
    """
    here = {name: batch[name].detach().cpu() for name in ("values", "indices") if name in batch}
    if codes.format == "onehot":
        indices = here["indices"].long()[:, None]
        values = torch.ones(indices.shape, dtype=torch.float32)
    elif codes.format == "dense":
        values = here["values"].float()
        indices = torch.arange(codes.n_features, dtype=torch.int64).expand_as(values)
    else:
        values, indices = here["values"].float(), here["indices"].long()
        order = indices.argsort(dim=1)
        values, indices = values.gather(1, order), indices.gather(1, order)
    kept = values != 0  # entries of 0 only pad, and may name any feature
    lengths, indices, values = kept.sum(1), indices[kept], values[kept]
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"rows from {first_row} on hold NaN or infinity, wanted finite codes: look for it in"
            " the codes, and in the activations that they were made of"
        )
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < codes.n_features:
        raise ValueError(
            f"rows from {first_row} on name features {int(indices.min())} to {int(indices.max())},"
            f" wanted 0 to {codes.n_features - 1}: make the codes again"
        )
    return lengths.numpy(), indices.numpy().astype(np.int32), values.numpy()


def _assemble(
    target: Path, lengths: npt.NDArray[np.int64], n_features: int, waiting: Mapping[str, Path]
) -> None:
    """Put the matrix together of its rows' lengths and the files of its entries, which go."""
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    n_entries = int(indptr[-1])
    index = np.dtype("<i4" if max(n_entries, len(lengths), n_features) <= MOST_INT32 else "<i8")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=LEVEL) as archive:
        for name, stored, wanted in (
            ("indices", np.dtype("<i4"), index),
            ("data", np.dtype("<f4"), np.dtype("<f4")),
        ):
            _add(archive, name, wanted, (n_entries,), _chunks(waiting[name], stored, wanted))
            waiting[name].unlink()
        for name, array in {
            "indptr": indptr.astype(index),
            "format": np.array(b"csr"),
            "shape": np.array([len(lengths), n_features], dtype="<i8"),
            "_is_array": np.array(True),
        }.items():
            _add(archive, name, array.dtype, array.shape, [array.tobytes()])


def _add(
    archive: zipfile.ZipFile,
    name: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    chunks: Iterable[bytes],
) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(file, header)
        for chunk in chunks:
            file.write(chunk)


def _chunks(path: Path, stored: np.dtype[Any], wanted: np.dtype[Any]) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield (
                chunk if stored == wanted else np.frombuffer(chunk, stored).astype(wanted).tobytes()
            )

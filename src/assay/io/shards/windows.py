"""Reading ahead: windows of batches, each read by a few threads straight into its buffers.

A batch is a buffer, and where each of its tokens lies on disk follows from its number. Tokens that
are neighbors on disk are one `preadv`, whose pieces are the rows that they go to: the kernel's copy
out of the page cache is the only one. It is C's `preadv` and not Python's, which wants an object
for each piece: making them took as long as the reading, one thread at a time. The plan of the
reading depends on the order alone and every row has one writer, so the number of threads cannot
change a batch.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from assay.io.shards.buffers import Buffers, Rows
from assay.io.shards.gpu_copies import HostBatch, copied_ahead
from assay.io.shards.order import Numbers, Order, numbers_from
from assay.io.shards.preadv import Pieces, read_pieces

# What one thread reads at a time, and the least that is read at once: larger than a call costs,
# smaller than the memory. Where a window is read by many threads each has less of it, so that all
# have some, but no less than the second.
READ_BYTES = 8 * 2**20
LEAST_BYTES = 2**19

# Pieces that the kernel takes in one preadv.
IOV_MAX = 1024


@dataclass(frozen=True)
class LayerBytes:
    """Where the content tokens of one layer lie.

    Attributes:
        name: what the folder is called in messages and cursors.
        fingerprint: what tells the folder from others.
        layer: the block number.
        files: the shards, in order.
        examples_per_shard: examples in a full shard.
        content_tokens_per_example: tokens of an example that are read.
        example_bytes: bytes of an example over all layers.
        first_byte: of the layer's first content token within an example.
        d_model: float32 numbers in a token.
    """

    name: str
    fingerprint: str
    layer: int
    files: list[Path]
    examples_per_shard: int
    content_tokens_per_example: int
    example_bytes: int
    first_byte: int
    d_model: int

    def place(self, number: int) -> tuple[Path, int]:
        """The file and the offset of a token."""
        example, token = divmod(number, self.content_tokens_per_example)
        shard, row = divmod(example, self.examples_per_shard)
        return (
            self.files[shard],
            row * self.example_bytes + self.first_byte + token * self.d_model * 4,
        )


@dataclass(frozen=True)
class Window:
    """Batches that are read together, their token numbers, and the reading in progress."""

    buffers: list[torch.Tensor]
    arrays: list[Rows]
    numbers: list[Numbers]
    reads: list[Future[list[int] | None]]


def windows_from(
    source: LayerBytes,
    order: Order,
    batch_size: int,
    n_tokens: int,
    threads: int,
    first: int,
    device: torch.device,
) -> Generator[Window, None, None]:
    """The windows from that of batch number `first` on, the reading of some more in progress."""
    window = window_of(source, order, batch_size)
    # Of large windows one is read, by all threads, while one is given out; a small one is a
    # thread's.
    large = window * source.d_model * 4 >= 2 * READ_BYTES or order.window > 0
    return read_ahead(
        source,
        numbers_from(order, window, batch_size, n_tokens, first),
        batch_size,
        threads,
        ahead=1 if large else threads + 1,
        most=window // batch_size,
        device=device,
    )


def window_of(source: LayerBytes, order: Order, batch_size: int) -> int:
    """Tokens that are read together: those that the order has together, or 8 MiB of batches."""
    return order.window or max(1, READ_BYTES // (batch_size * source.d_model * 4)) * batch_size


def read_ahead(
    source: LayerBytes,
    pieces: Iterator[Numbers],
    rows: int,
    threads: int,
    *,
    ahead: int,
    most: int,
    device: torch.device,
) -> Generator[Window, None, None]:
    """A window for each piece, which is token numbers, in buffers of so many `rows`, `most` of them
    a window; some `ahead` are being read.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="assay-read")
    pending: deque[Window] = deque()
    memory = Buffers(rows, source.d_model, device, most=(ahead + 2) * most)
    checks = device.type != "cuda"
    # Where several windows are being read, each is a thread's.
    readers = threads if ahead == 1 else 1
    try:
        while True:
            while len(pending) <= ahead and (numbers := next(pieces, None)) is not None:
                pending.append(_begin(pool, source, numbers, rows, memory, checks, readers))
            if not pending:
                return
            yield pending.popleft()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(
    pool: ThreadPoolExecutor,
    source: LayerBytes,
    numbers: Numbers,
    batch_size: int,
    memory: Buffers,
    checks: bool,
    readers: int,
) -> Window:
    """Make the buffers of a window and start reading into them."""
    parts = [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
    buffers = [memory.take(len(part)) for part in parts]
    arrays: list[Rows] = [buffer.numpy() for buffer in buffers]
    by_place = np.argsort(numbers)
    reads = [
        pool.submit(_read, source, numbers, rows, arrays, batch_size, checks)
        for rows in _shares(source, numbers, by_place, readers)
    ]
    return Window(buffers, arrays, parts, reads)


def _shares(
    source: LayerBytes, numbers: Numbers, by_place: Numbers, readers: int
) -> Iterator[Numbers]:
    """What of a window a thread reads at a time, in the order on disk."""
    width = source.d_model * 4
    most, least = (max(1, n_bytes // width) for n_bytes in (READ_BYTES, LEAST_BYTES))
    share = min(most, max(least, -(-len(numbers) // readers)))
    # What is less than a thread could read is cut between two runs, if they are as short as those
    # of a shuffled pass: to cut one costs a read.
    begins = np.flatnonzero(new_runs(source, numbers[by_place])) if share < most else None
    start = 0
    while start < len(numbers):
        stop = start + share
        if begins is not None and stop < len(numbers):
            run = int(begins[np.searchsorted(begins, stop, side="right") - 1])
            stop = run if run > start + share // 2 else stop
        yield by_place[start:stop]
        start = stop


def new_runs(source: LayerBytes, ascending: Numbers) -> npt.NDArray[np.bool_]:
    """Where a run of neighbors on disk begins, of token numbers in their order."""
    new: npt.NDArray[np.bool_] = np.diff(ascending, prepend=ascending[:1] - 2) != 1
    new |= ascending % source.content_tokens_per_example == 0
    return new


def given_out(
    source: LayerBytes, windows: Iterator[Window], device: torch.device
) -> Iterator[torch.Tensor]:
    """The batches of windows, checked for NaN and infinity, on the device."""
    if device.type == "cuda":
        refuse = functools.partial(check_finite, source)
        batches = (batch for window in windows for batch in _unlooked(window))
        yield from copied_ahead(batches, device, refuse)
    else:
        for window in windows:
            yield from _finish(source, window)


def _finish(source: LayerBytes, window: Window) -> Iterator[torch.Tensor]:
    """Await a window's reads, then give out its batches, each checked for a NaN or an infinity
    and let go.
    """
    seen = [read.result() for read in window.reads]
    checked = [found for found in seen if found is not None]
    doubtful = list(itertools.chain.from_iterable(checked))
    window.buffers.reverse()
    window.arrays.reverse()
    start = 0
    for numbers in window.numbers:
        array = window.arrays.pop()
        if sys.byteorder == "big":
            array.byteswap(inplace=True)
        if len(checked) < len(seen) or any(start <= row < start + len(numbers) for row in doubtful):
            check_finite(source, array, numbers)
        start += len(numbers)
        del array
        yield window.buffers.pop()


def _unlooked(window: Window) -> Iterator[HostBatch]:
    """Await a window's reads, then give out its batches; the GPU checks them."""
    for read in window.reads:
        read.result()
    for buffer, array, numbers in zip(window.buffers, window.arrays, window.numbers, strict=True):
        if sys.byteorder == "big":
            array.byteswap(inplace=True)
        yield buffer, numbers


def _read(
    source: LayerBytes,
    numbers: Numbers,
    rows: Numbers,
    arrays: list[Rows],
    batch_size: int,
    checks: bool,
) -> list[int] | None:
    """Read the window's tokens at `rows`, which are in the order of their numbers, each into its
    row.

    Where they are neighbors there too and `checks` is set, what is read is checked at once, while
    the processor's cache holds it: gives those that may hold a NaN or an infinity. None: they have
    yet to be checked.

    Raises:
        ValueError: a file is gone or has become shorter since the folder was opened.
        OSError: the device does not give the bytes.
    """
    width = source.d_model * 4
    ascending = numbers[rows]
    # Runs are neighbors on disk; pieces are neighbors there and in one buffer.
    new_run = new_runs(source, ascending)
    new_piece = new_run | (np.diff(rows, prepend=rows[0]) != 1) | (rows % batch_size == 0)
    first = np.flatnonzero(new_piece)
    buffers, starts = np.divmod(rows[first], batch_size)
    addresses = np.array([array.ctypes.data for array in arrays], dtype=np.uintp)
    pieces = np.empty((len(first), 2), dtype=np.uintp)
    pieces[:, 0] = addresses[buffers] + (starts * width).astype(np.uintp)
    pieces[:, 1] = np.diff(first, append=len(rows)) * width
    bounds = [*np.flatnonzero(new_run[first]).tolist(), len(pieces)]
    runs = np.flatnonzero(new_run)
    run_bytes = (np.diff(runs, append=len(rows)) * width).tolist()
    run_numbers = ascending[runs].tolist()
    descriptor, opened = -1, None
    in_order = checks and sys.byteorder == "little" and bool((np.diff(rows) == 1).all())
    doubtful: list[int] = []
    try:
        for number, n_bytes, start, stop in zip(
            run_numbers, run_bytes, bounds[:-1], bounds[1:], strict=True
        ):
            path, offset = source.place(number)
            if path is not opened:
                if opened is not None:
                    os.close(descriptor)
                    opened = None
                descriptor, opened = _open(path), path
            _read_run(descriptor, path, pieces[start:stop], offset, n_bytes)
            if in_order:
                for piece in range(start, stop):
                    row = int(rows[first[piece]])
                    array = arrays[row // batch_size][row % batch_size :][
                        : int(pieces[piece, 1]) // width
                    ]
                    doubtful += (row + _doubtful(array)).tolist()
    finally:
        if opened is not None:
            os.close(descriptor)
    return doubtful if in_order else None


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be opened any more: {error.strerror}; restore the file"
        ) from error


def _read_run(descriptor: int, path: Path, pieces: Pieces, offset: int, left: int) -> None:
    """Fill `pieces`, `left` bytes in all, one after the other from `offset` on; an error names the
    file and the place.
    """
    while left:
        try:
            n = read_pieces(descriptor, pieces[:IOV_MAX], offset)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}, reading {left} bytes from byte {offset} on",
                str(path),
            ) from error
        if n == 0:
            raise ValueError(
                f"{path} has {os.fstat(descriptor).st_size} bytes, wanted at least {offset + left}:"
                " it became shorter after it was opened; published shards must not change, restore"
                " the file"
            )
        offset += n
        left -= n
        if left:
            ends = pieces[:, 1].cumsum()
            full = int(np.searchsorted(ends, n, side="right"))
            part = n - (int(ends[full - 1]) if full else 0)
            pieces = pieces[full:].copy()
            pieces[0] += np.array([part, -part]).astype(np.uintp)


def _doubtful(array: Rows) -> Numbers:
    """The rows that may hold a NaN or an infinity, int64."""
    # A finite sum of squares has finite terms, and costs a fraction of testing each. Large
    # finite terms may overflow it.
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return np.flatnonzero(~np.isfinite(np.vecdot(array, array)))


def check_finite(source: LayerBytes, array: Rows | torch.Tensor, numbers: Numbers) -> None:
    """Raise ValueError naming the first token, in the order on disk, that holds a NaN or an
    infinity.
    """
    array = np.asarray(array)
    doubtful = _doubtful(array)
    wrong = numbers[doubtful[~np.isfinite(array[doubtful]).all(axis=1)]]
    if not len(wrong):
        return
    number = int(wrong.min())
    example, token = divmod(number, source.content_tokens_per_example)
    raise ValueError(
        f"{source.place(number)[0]}: NaN or infinity in example {example}, content token {token},"
        f" layer {source.layer}; wanted finite activations, record that example again"
    )

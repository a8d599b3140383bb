"""The orders that tokens are read in. Token number = example * content tokens per example + content
token.

An order gives the token numbers of any stretch of its stream without those before it, so that
reading can start at any batch. A permutation sorts PCG64's raw words: numpy promises that stream
for all versions, but not that of its `permutation`.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from assay.io.npy import read_npy_header

Numbers = npt.NDArray[np.int64]

# A shuffled pass mixes within windows of so many tokens (64 MiB at d_model 1024) or of so many
# batches, if more.
WINDOW_TOKENS = 16_384
WINDOW_BATCHES = 2
# A window is made of runs of so many tokens of an example, or of whole ones, if shorter: 128 KiB a
# read at d_model 1024.
RUN_TOKENS = 32
# Which of a seed's streams of random words chooses the sample: one that no window has.
_SAMPLE = 2**32 - 1
# An order file is checked this many numbers at a time.
CHECKED_AT_ONCE = 2**20


class Order(Protocol):
    """A stream of distinct token numbers."""

    @property
    def n_tokens(self) -> int:
        """Tokens in the stream."""
        ...

    @property
    def window(self) -> int:
        """Positions that must be read together, a multiple of the batch size; 0 if there is no
        need.
        """
        ...

    @property
    def identity(self) -> dict[str, str | int | None]:
        """What tells it from other orders, JSON scalars: shuffle seed, or the digest of the order
        file.
        """
        ...

    def numbers(self, start: int, stop: int) -> Numbers:
        """Token numbers at [start, stop), int64; `start` is a multiple of the window, `stop` at
        most one window on.
        """
        ...


def numbers_from(
    order: Order, window: int, batch_size: int, n_tokens: int, first: int
) -> Iterator[Numbers]:
    """Token numbers from batch number `first` on, window by window; of the first window those of
    its batches that are left.
    """
    start = first * batch_size // window * window
    skip = first * batch_size - start
    for begin in range(start, n_tokens, window):
        yield order.numbers(begin, min(begin + window, n_tokens))[skip:]
        skip = 0


def shuffled_window(batch_size: int) -> int:
    """Tokens that are permuted together: whole batches of that size."""
    return max(WINDOW_BATCHES, -(-WINDOW_TOKENS // batch_size)) * batch_size


class Sequential:
    """Example after example."""

    window = 0

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.identity: dict[str, str | int | None] = {"seed": None, "order": None}

    def numbers(self, start: int, stop: int) -> Numbers:
        """See `Order.numbers`."""
        return np.arange(start, stop, dtype=np.int64)


class Shuffled:
    """Short runs of tokens, drawn from all shards in random order, their tokens permuted within
    windows.

    With `max_tokens`, only those of a random sample of the runs, which is the same for every seed;
    that of a smaller number is part of it. Holds 16 bytes per run. The order depends on `seed`,
    `max_tokens` and the window alone, and the window is the same for every batch size that divides
    WINDOW_TOKENS and is at most a WINDOW_BATCHES-th of it.
    """

    def __init__(
        self,
        n_examples: int,
        tokens_per_example: int,
        batch_size: int,
        seed: int,
        max_tokens: int | None = None,
    ) -> None:
        n_known = n_examples * tokens_per_example
        self.n_tokens = n_known if max_tokens is None else min(max_tokens, n_known)
        self.window = shuffled_window(batch_size)
        self.identity: dict[str, str | int | None] = {"seed": seed, "order": None}
        self._seed = seed
        self._run = min(RUN_TOKENS, tokens_per_example)
        n_runs = -(-n_known // self._run)
        runs, lengths = np.arange(n_runs), np.full(n_runs, self._run)
        lengths[-1] -= n_runs * self._run - n_known
        if self.n_tokens < n_known:
            runs = _permutation(n_runs, 0, _SAMPLE)
            lengths = lengths[runs]
            kept = int(np.searchsorted(lengths.cumsum(), self.n_tokens)) + 1
            runs, lengths = runs[:kept], lengths[:kept]
            lengths[-1] -= lengths.sum() - self.n_tokens
        order = _permutation(len(runs), seed, 0)
        self._first_tokens = runs[order] * self._run
        self._ends = lengths[order].cumsum()

    def numbers(self, start: int, stop: int) -> Numbers:
        """See `Order.numbers`."""
        # The whole window is permuted even where its end is not wanted: what comes before must not
        # change.
        end = min(start + self.window, self.n_tokens)
        first, last = np.searchsorted(self._ends, [start, end - 1], side="right")
        ends = self._ends[first : last + 1]
        begins = np.concatenate([self._ends[first - 1 : first] if first else [0], ends[:-1]])
        numbers = np.repeat(self._first_tokens[first : last + 1] - begins, ends - begins)
        numbers = (numbers + np.arange(begins[0], ends[-1]))[start - begins[0] : end - begins[0]]
        return numbers[
            _permutation(len(numbers), self._seed, 1 + start // self.window)[: stop - start]
        ]


class OrderFile:
    """The order in a .npy file: 1-D little-endian int64 token numbers, some or all of the layer's,
    none twice.

    Opening reads the file once, `at_once` numbers at a time, and holds one bit per token meanwhile;
    batches read it piece by piece.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file; the message names it and the first wrong position.
    """

    window = 0

    def __init__(
        self, path: str | os.PathLike[str], n_tokens: int, *, at_once: int = CHECKED_AT_ONCE
    ) -> None:
        self._path = Path(path)
        self._n_known = n_tokens
        self.n_tokens, self._offset = _npy_header(self._path)
        seen = np.zeros(-(-n_tokens // 8), dtype=np.uint8)
        digest = hashlib.sha256()
        for start in range(0, self.n_tokens, at_once):
            numbers = self.numbers(start, min(start + at_once, self.n_tokens))
            digest.update(numbers.data)
            order = np.argsort(numbers, kind="stable")
            ascending = numbers[order]
            byte, bit = ascending >> 3, np.left_shift(1, ascending & 7).astype(np.uint8)
            again = (seen[byte] & bit) > 0
            again[1:] |= ascending[1:] == ascending[:-1]
            if again.any():
                place = int(order[again].min())
                raise ValueError(
                    f"{self._path} has token number {numbers[place]} a second time at position"
                    f" {start + place}; wanted each at most once, remove the repeats"
                )
            np.bitwise_or.at(seen, byte, bit)
        self.identity: dict[str, str | int | None] = {"seed": None, "order": digest.hexdigest()}

    def numbers(self, start: int, stop: int) -> Numbers:
        """See `Order.numbers`; raises ValueError where the file holds what is no token number, or
        too little.
        """
        found = np.fromfile(
            self._path, dtype="<i8", count=stop - start, offset=self._offset + 8 * start
        )
        numbers = found.astype(np.int64, copy=False)
        if len(numbers) < stop - start:
            raise ValueError(
                f"{self._path} ends at position {start + len(numbers)}, wanted {stop}; restore the"
                " file"
            )
        wrong = (numbers < 0) | (numbers >= self._n_known)
        if wrong.any():
            place = int(wrong.argmax())
            raise ValueError(
                f"{self._path} has token number {numbers[place]} at position {start + place},"
                f" wanted 0 <= number < {self._n_known} (example * content tokens per example +"
                " content token); make the file for this folder"
            )
        return numbers


def _permutation(n: int, seed: int, which: int) -> Numbers:
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(which,))).random_raw(n)
    # Each index rides in its word's low bits, so that a plain sort, several times faster than
    # argsort, puts them in order.
    low = np.uint64(2 ** n.bit_length() - 1)
    words = np.sort((words & ~low) | np.arange(n, dtype=np.uint64))
    return (words & low).astype(np.int64)


# The header as numpy.save writes it. numpy's own reader evaluates it as Python, which fails in many
# ways on what is none.
def _npy_header(path: Path) -> tuple[int, int]:
    """How many numbers a .npy file of int64 holds and where the first one lies. Nothing is
    unpickled or evaluated.
    """
    wanted = (
        "wanted a .npy file of a 1-D little-endian int64 array with at least one number, as"
        " numpy.save writes it"
    )
    try:
        with open(path, "rb") as file:
            found = read_npy_header(file)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise FileNotFoundError(f"the order file {path} is missing; check the path") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an order: {error}; {wanted}") from error
    if found.dtype.str != "<i8" or len(found.shape) != 1:
        raise ValueError(
            f"{path} cannot be read as an order: it holds {found.dtype.str} of shape {found.shape};"
            f" {wanted}"
        )
    (n,) = found.shape
    if n < 1 or size != found.offset + 8 * n:
        raise ValueError(
            f"{path} says that it holds {n} numbers and has {size} bytes, not"
            f" {found.offset + 8 * n}; {wanted}"
        )
    return n, found.offset

"""A pass shared between processes: each reads its part of every window, whole runs of neighbors on
disk, and says where in the window its tokens belong.

To slice the rows of a window would cut its runs: an eighth of 16,384 tokens that way is some 1,800
reads of a few KiB, and by runs 64 of 128 KiB.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch

from assay.io.shards.order import Numbers, Order, numbers_from
from assay.io.shards.windows import (
    LayerBytes,
    given_out,
    new_runs,
    read_ahead,
    window_of,
)


class Share(NamedTuple):
    """One rank's tokens of a window.

    Attributes:
        start: the window's place in the order, a multiple of the batch size: of its first token
            that is asked for.
        size: its tokens, those of all ranks.
        positions: where in the window these belong, int64 (m,), 0 to size - 1; on the CPU. Each
            position is one rank's.
        tokens: float32 (m, d_model), in their order on disk, on the device; m may be 0.
    """

    start: int
    size: int
    positions: torch.Tensor
    tokens: torch.Tensor


def shares_from(
    source: LayerBytes,
    order: Order,
    batch_size: int,
    n_tokens: int,
    threads: int,
    first: int,
    device: torch.device,
    rank: int,
    ranks: int,
) -> Generator[Share, None, None]:
    """A rank's share of each window from batch number `first` on, the next window's being read."""
    window = window_of(source, order, batch_size)
    planned: deque[tuple[int, int, Numbers]] = deque()

    def pieces() -> Iterator[Numbers]:
        start = first * batch_size
        for numbers in numbers_from(order, window, batch_size, n_tokens, first):
            mine = share_of(source, numbers, rank, ranks)
            planned.append((start, len(numbers), mine))
            start += len(numbers)
            if len(mine):
                yield numbers[mine]

    # No share has more than its part and a run, and no run is longer than an example.
    most = min(window, -(-window // ranks) + source.content_tokens_per_example)
    windows = read_ahead(source, pieces(), most, threads, ahead=1, most=1, device=device)
    with closing(windows):
        for batch in given_out(source, windows, device):
            yield from _without(planned, source, device)
            yield _share(planned.popleft(), batch)
        yield from _without(planned, source, device)


def _without(
    planned: deque[tuple[int, int, Numbers]], source: LayerBytes, device: torch.device
) -> Iterator[Share]:
    """The shares that come next and hold nothing."""
    while planned and not len(planned[0][2]):
        empty = torch.empty(0, source.d_model, dtype=torch.float32, device=device)
        yield _share(planned.popleft(), empty)


def _share(plan: tuple[int, int, Numbers], tokens: torch.Tensor) -> Share:
    start, size, mine = plan
    return Share(start, size, torch.from_numpy(mine), tokens)


def share_of(source: LayerBytes, numbers: Numbers, rank: int, ranks: int) -> Numbers:
    """Where in a window, whose token numbers are given, a rank's are: whole runs of neighbors on
    disk, in their order there, as even as these allow; int64 (m,).
    """
    by_place = np.argsort(numbers)
    begins = np.append(np.flatnonzero(new_runs(source, numbers[by_place])), len(numbers))
    # Each rank begins with the run that is nearest to where it would begin of single tokens.
    wanted = np.arange(rank, rank + 2) * len(numbers) / ranks
    later = np.searchsorted(begins, wanted).clip(max=len(begins) - 1)
    earlier = (later - 1).clip(min=0)
    nearer = wanted - begins[earlier] < begins[later] - wanted
    start, stop = begins[np.where(nearer, earlier, later)]
    return by_place[start:stop]

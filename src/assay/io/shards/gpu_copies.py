"""Batches on a GPU: copied there by a stream of their own while the one before is worked on, or
taken from a layer that is held there.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch

from assay.io.shards.order import Numbers, Order, numbers_from

# Batches that are being copied, besides the one that is worked on.
_AHEAD = 1


HostBatch = tuple[torch.Tensor, Numbers]
"""A batch in pinned memory and its token numbers, not yet checked for NaN."""


@dataclass(frozen=True)
class _Copy:
    """A batch on its way: where it goes, the largest magnitude in it, pinned, and the event after
    which both are there.
    """

    batch: HostBatch
    tokens: torch.Tensor
    largest: torch.Tensor
    done: torch.cuda.Event


def copied_ahead(
    batches: Iterator[HostBatch],
    device: torch.device,
    refuse: Callable[[torch.Tensor, Numbers], None],
) -> Generator[torch.Tensor, None, None]:
    """Each batch on the device, float32 (batch, d_model), while the next is being copied.

    It is checked for NaN and infinity there, which takes a hundredth of the copy's time, and
    the host waits for the answer before a batch is given out: it was asked for one batch ago.
    `refuse` names the token and raises. What goes wrong in reading ahead is raised after the
    batches before it.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    copies: deque[_Copy] = deque()
    failure: Exception | None = None
    more = True
    while True:
        while more and len(copies) <= _AHEAD:
            try:
                batch = next(batches, None)
            except Exception as error:  # raised below, when it is its batch's turn
                batch, failure = None, error
            more = batch is not None
            if batch is not None:
                copies.append(_copy(batch, stream, device))
        if not copies:
            if failure is not None:
                raise failure
            return
        yield _arrived(copies.popleft(), device, refuse)


def _copy(batch: HostBatch, stream: torch.cuda.Stream, device: torch.device) -> _Copy:
    largest = torch.empty((), dtype=torch.float32, pin_memory=True)
    with torch.cuda.stream(stream):
        tokens = batch[0].to(device, non_blocking=True)
        # The norm of what holds a NaN is NaN.
        largest.copy_(torch.linalg.vector_norm(tokens, math.inf), non_blocking=True)
        return _Copy(batch, tokens, largest, stream.record_event())


def _arrived(
    copy: _Copy, device: torch.device, refuse: Callable[[torch.Tensor, Numbers], None]
) -> torch.Tensor:
    copy.done.synchronize()
    if not math.isfinite(float(copy.largest)):
        refuse(*copy.batch)
    # Its memory belongs to the copying stream, which must not use it again while the caller's still
    # reads.
    current = torch.cuda.current_stream(device)
    current.wait_event(copy.done)
    copy.tokens.record_stream(current)
    return copy.tokens


def of_held(
    held: torch.Tensor, order: Order, batch_size: int, n_tokens: int, first: int
) -> Generator[torch.Tensor, None, None]:
    """The batches of a pass from number `first` on, out of a layer's content tokens (all of the
    layer's tokens, d_model).
    """
    for of_window in numbers_from(order, order.window or batch_size, batch_size, n_tokens, first):
        numbers = torch.from_numpy(of_window)
        if held.is_cuda:
            numbers = numbers.pin_memory().to(held.device, non_blocking=True)
        for place in range(0, len(numbers), batch_size):
            yield held.index_select(0, numbers[place : place + batch_size])

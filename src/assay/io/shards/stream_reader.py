"""The streaming reader: one pass over a layer, in batches of any order, that another process can go
on with. `windows.py` reads ahead.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from types import TracebackType
from typing import Any

import torch

from assay.io.shards.gpu_copies import of_held
from assay.io.shards.order import Order
from assay.io.shards.windows import LayerBytes, given_out, windows_from

CURSOR_FORMAT = 1


class Batches(Iterator[torch.Tensor]):
    """One pass over a layer: float32 (batch_size, d_model), only the last shorter. See
    `LayerActivations.batches`.

    Threads run from the first batch asked for to the last one, to `close` or to the iterator's end
    of life, whichever comes first; it is a context manager, too. An error ends the pass.
    """

    def __init__(
        self,
        source: LayerBytes,
        order: Order,
        *,
        batch_size: int,
        threads: int,
        max_tokens: int | None,
        cursor: Mapping[str, Any] | None,
        device: torch.device,
        held: torch.Tensor | None = None,
        stop: int | None = None,
    ) -> None:
        self.n_tokens = min(n for n in (order.n_tokens, max_tokens, stop) if n is not None)
        self._key = {
            "format": CURSOR_FORMAT,
            "folder": source.name,
            "fingerprint": source.fingerprint,
            "layer": source.layer,
            "batch_size": batch_size,
            **order.identity,
            "max_tokens": max_tokens,
        }
        self._batch = (
            0 if cursor is None else _resumed(cursor, self._key, -(-self.n_tokens // batch_size))
        )
        if held is not None:
            self._stream = of_held(held, order, batch_size, self.n_tokens, self._batch)
        else:
            self._stream = _stream(
                source, order, batch_size, self.n_tokens, threads, self._batch, device
            )

    def __next__(self) -> torch.Tensor:
        batch = next(self._stream)
        self._batch += 1
        return batch

    def state(self) -> dict[str, str | int | None]:
        """The cursor, JSON scalars: `batches(..., cursor=state)` goes on with the batch after the
        last one given out.
        """
        return {**self._key, "batch": self._batch}

    def close(self) -> None:
        """End the pass: reads in progress are awaited, those ahead dropped, the threads gone.
        Harmless twice.
        """
        self._stream.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _resumed(cursor: Mapping[str, Any], key: Mapping[str, str | int | None], n_batches: int) -> int:
    """The batch that a cursor stands at; raises ValueError naming the field in which it belongs to
    another pass.
    """
    wanted = {*key, "batch"}
    if not isinstance(cursor, Mapping) or set(cursor) != wanted:
        found = sorted(map(str, cursor)) if isinstance(cursor, Mapping) else type(cursor).__name__
        raise ValueError(
            f"the cursor holds {found}, wanted {sorted(wanted)}: pass what state() returned"
        )
    for name, value in key.items():
        if type(cursor[name]) is not type(value) or cursor[name] != value:
            raise ValueError(
                f"the cursor's {name} is {cursor[name]!r}, this pass's is {value!r}: resume with"
                " what it was saved with, or start again without a cursor"
            )
    batch = cursor["batch"]
    if type(batch) is not int or not 0 <= batch <= n_batches:
        raise ValueError(
            f"the cursor's batch is {batch!r}, wanted 0 to {n_batches}: pass what state() returned"
        )
    return batch


def _stream(
    source: LayerBytes,
    order: Order,
    batch_size: int,
    n_tokens: int,
    threads: int,
    first: int,
    device: torch.device,
) -> Generator[torch.Tensor, None, None]:
    """The batches from number `first` on."""
    with closing(
        windows_from(source, order, batch_size, n_tokens, threads, first, device)
    ) as windows:
        yield from given_out(source, windows, device)

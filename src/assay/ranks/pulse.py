"""What a rank shows of itself through torchrun's store, and sees of the others there: whether they
live, where they stand, and whether one was asked to stop.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Collection

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from assay.pipelines import stopping

EVERY = 0.25
"""Seconds from one sign of life to the next."""

QUIET = 2.0
"""Seconds after which a rank that should be heard of four times each is suspect."""


class Pulse:
    """A thread of each rank that says that it lives, spreads a stop that it was asked for, and
    heeds one that another was.

    A rank that is stopped or killed is told so from one that has much to do: this one's thread goes
    on.

    Args:
        store: of all ranks.
        rank: this one's number.
        size: ranks in all.

    Attributes:
        entered: exchanges among the ranks that this one has begun.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank = store, rank
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._others = [other for other in range(size) if other != rank]
        self._began = time.monotonic()
        self.entered = 0

    def start(self) -> None:
        """Begin."""
        self.beat()
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._over.set()
        self._thread.join()

    def beat(self) -> None:
        """Say that this rank lives; heed, and spread, what asks for a stop."""
        self._store.set(f"beat/{self._rank}", f"{time.monotonic()} {self.entered}")
        came = stopping.signal_that_came()
        if came is not None:
            self._store.set("stop", str(came))
        elif self._store.check(["stop"]):
            os.kill(os.getpid(), int(self._store.get("stop")))
        if self._store.check(["failed"]):
            stopping.ask()  # so that fits save themselves; no signal: it is a failure

    def _run(self) -> None:
        while not self._over.wait(EVERY):
            try:
                self.beat()
            except DistError:  # the store went with torchrun, as all should
                if not self._over.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)
                return

    def silence(self, rank: int) -> float:
        """Seconds since a rank was heard of, or since this one began to listen."""
        # One machine has one monotonic clock.
        return time.monotonic() - self._beat(rank)[0]

    def suspects(self) -> list[int]:
        """The other ranks that keep all waiting: those that are silent, or else those that have
        begun the fewest exchanges.
        """
        if quiet := self.silent():
            return quiet
        least = min(self._beat(rank)[1] for rank in self._others)
        return [rank for rank in self._others if self._beat(rank)[1] == least]

    def silent(self) -> list[int]:
        """The other ranks that should have been heard of."""
        return [rank for rank in self._others if self.silence(rank) > QUIET]

    def _beat(self, rank: int) -> tuple[float, int]:
        if not self._store.check([f"beat/{rank}"]):
            return self._began, 0
        when, entered = self._store.get(f"beat/{rank}").decode().split()
        return float(when), int(entered)


def named(ranks: Collection[int]) -> str:
    """Ranks as an error names them."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"

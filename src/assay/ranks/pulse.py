"""What a rank shows of itself through torchrun's store, and sees of the others there: whether they
live, where they stand, and whether one was asked to stop. One that hangs is ended.
"""

from __future__ import annotations

import math
import os
import select
import signal
import threading
import time
from collections.abc import Collection
from contextlib import suppress

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from assay.pipelines import stopping

EVERY = 0.25
"""Seconds from one sign of life to the next."""

QUIET = 2.0
"""Seconds after which a rank that should be heard of four times each is suspect."""

LAST = 20.0
"""Seconds that a rank has to save what it makes after another is gone: torchrun gives it 30."""


class Pulse:
    """A thread of each rank that says that it lives, spreads a stop that it was asked for, heeds
    one that another was, and ends a rank of which nothing is heard: torchrun asks one that hangs to
    stop, and waits 30 s for it.

    A rank that is stopped or killed is told so from one that has much to do: this one's thread goes
    on.

    Args:
        store: of all ranks.
        rank: this one's number.
        size: ranks in all.
        timeout_seconds: see the attribute.

    Attributes:
        entered: exchanges among the ranks that this one has begun.
        timeout_seconds: of silence after which a rank is ended. Followers take rank 0's.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout_seconds: float) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._others = [other for other in range(size) if other != rank]
        self._held: dict[int, tuple[int, float]] = {}  # a handle of a process, and since when
        self._gone: dict[int, float] = {}
        self._began = self._last = time.monotonic()
        self.entered = 0
        self.timeout_seconds = timeout_seconds
        self._store.set(f"process/{rank}", str(os.getpid()))

    def start(self) -> None:
        """Begin."""
        self.beat()
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._over.set()
        self._thread.join()
        for handle, _ in self._held.values():
            os.close(handle)
        self._held.clear()

    def beat(self) -> None:
        """Say that this rank lives; heed, and spread, what asks for a stop; see to the others."""
        now = time.monotonic()
        if now - self._last > QUIET:
            self._began = now  # all may have been suspended: the others have a new start as well
        self._last = now
        said = f"{now} {self.entered} {self.timeout_seconds}"
        self._store.set(f"beat/{self._rank}", said)
        came = stopping.signal_that_came()
        if came is not None:
            self._store.set("stop", str(came))
        elif self._store.check(["stop"]):
            os.kill(os.getpid(), int(self._store.get("stop")))
        if self._store.check(["failed"]):
            stopping.ask()  # so that fits save themselves; no signal: it is a failure
        for rank in self._others:
            self._see_to(rank)

    def _run(self) -> None:
        there, late = True, math.inf
        while not self._over.wait(EVERY):
            try:
                if there:
                    self.beat()
            except DistError:  # the store went with torchrun, as all should
                there, late = False, time.monotonic() + LAST
                if not self._over.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)
            if self._gone:
                late = min(late, LAST + min(self._gone.values()))
            if time.monotonic() > late:
                os._exit(1)

    def _see_to(self, rank: int) -> None:
        """Keep hold of a rank's process, and end it where it hangs."""
        if rank in self._held:
            self._see_whether_gone(rank)
        elif hasattr(os, "pidfd_open") and self._store.check([f"process/{rank}"]):
            # Unlike its number, a handle is never another process's.
            with suppress(OSError):
                handle = os.pidfd_open(int(self._store.get(f"process/{rank}")))
                self._held[rank] = handle, time.monotonic()
        if self.silence(rank) > self.timeout_seconds:
            self._kill(rank)

    def _see_whether_gone(self, rank: int) -> None:
        looked = select.poll()
        looked.register(self._held[rank][0], select.POLLIN)
        if rank not in self._gone and looked.poll(0):
            self._gone[rank] = time.monotonic()

    def _kill(self, rank: int) -> None:
        handle, since = self._held.get(rank, (None, 0.0))
        # It lived after the handle was taken: that is no other process that got its number.
        if handle is None or rank in self._gone or self._beat(rank)[0] < since:
            return
        if self._store.add(f"ended/{rank}", 1) == 1:  # one of the others says so
            said = (
                f"\nError: rank {rank} of {self._size} hangs: nothing was heard of it for"
                f" {self.timeout_seconds:.0f} s (ranks_timeout_seconds), so rank {self._rank} ends"
                " it. The same command goes on from here.\n"
            )
            os.write(2, said.encode())
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)

    def silence(self, rank: int) -> float:
        """Seconds since a rank was heard of, or since this one began to listen; infinite for one
        that is gone.
        """
        if rank in self._gone:
            return math.inf
        # One machine has one monotonic clock. This one's own thread may have been held up too.
        return max(0.0, self._last - max(self._began, self._beat(rank)[0]))

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
        when, entered, timeout = self._store.get(f"beat/{rank}").decode().split()
        if rank == 0:
            self.timeout_seconds = float(timeout)
        return float(when), int(entered)


def named(ranks: Collection[int]) -> str:
    """Ranks as an error names them."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"

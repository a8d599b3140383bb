"""Signals that ask a run to stop: a fit in progress saves where it stands at its next step and then
stops, everything else stops at once.

SIGTERM comes from a queue, SIGINT from Ctrl-C, SIGHUP from a terminal that is closed. A second one
stops a fit at once; to one of several ranks it is as the first.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from assay.team import current_team

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_asked = threading.Event()
_lock = threading.Lock()


class _Noted:
    """What this process knows: how many fits are in progress, and the signal that came last."""

    fits = 0
    came: int | None = None


@contextmanager
def signals_stop() -> Iterator[None]:
    """Within the block `SIGNALS` raise KeyboardInterrupt, or let a fit in progress do so. In other
    threads than the main one: no change.

    A signal that is ignored, as nohup and shells have it, stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked.clear()
    _Noted.came = None
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heeded = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, _on_signal)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])
        _asked.clear()


def ask(number: int | None = None) -> None:
    """Ask for a stop as a signal does, of the same number where one came to another rank, but let
    whoever is not in a fit go on.
    """
    if number is not None:
        _Noted.came = number
    _asked.set()


def signal_that_came() -> int | None:
    """The number of the signal that came last; None where none came."""
    return _Noted.came


def exit_code() -> int | None:
    """What a process that a signal came to exits with, as shells have it: 128 and the signal's
    number; None where none came.
    """
    return None if _Noted.came is None else 128 + _Noted.came


def _on_signal(number: int, frame: FrameType | None) -> None:
    del frame
    in_team = current_team().size > 1
    if in_team and _asked.is_set():
        return  # torchrun repeats to each rank what srun sent to all, while they save themselves
    _Noted.came = number
    at_once = _Noted.fits == 0 or _asked.is_set()  # nobody will ask, or nobody has
    _asked.set()
    if at_once:
        raise KeyboardInterrupt
    if current_team().rank > 0:
        return
    once_more = b"" if in_team else b" Once more stops it at once."
    # Not by print, whose buffer the signal may have come into.
    os.write(2, b"\nStopping: the fit in progress saves itself first." + once_more + b"\n")


def stop_if_asked() -> None:
    """Stop between two steps of a run where a signal has come: library code in which it came may
    have dropped the interrupt.

    Raises:
        KeyboardInterrupt: one has.
    """
    if _asked.is_set():
        raise KeyboardInterrupt


@contextmanager
def fit_in_progress() -> Iterator[None]:
    """Within the block somebody asks `stop_is_asked` after every step."""
    with _lock:
        _Noted.fits += 1
    try:
        yield
    finally:
        with _lock:
            _Noted.fits -= 1


@contextmanager
def heeded() -> Iterator[None]:
    """Within the block, which is in a `fit_in_progress`, signals stop at once, unless a fit of the
    block's own is in progress.
    """
    with _lock:
        _Noted.fits -= 1
    try:
        yield
    finally:
        with _lock:
            _Noted.fits += 1


def stop_is_asked() -> bool:
    """Whether a signal has come."""
    return _asked.is_set()

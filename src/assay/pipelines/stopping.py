"""Signals that ask a run to stop: a fit in progress saves where it stands at its next step and then
stops, everything else stops at once.

SIGTERM comes from a queue, SIGINT from Ctrl-C, SIGHUP from a terminal that is closed. A second one
stops a fit at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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


def exit_code() -> int | None:
    """What a process that a signal came to exits with, as shells have it: 128 and the signal's
    number; None where none came.
    """
    return None if _Noted.came is None else 128 + _Noted.came


def _on_signal(number: int, frame: FrameType | None) -> None:
    del frame
    _Noted.came = number
    at_once = _Noted.fits == 0 or _asked.is_set()  # nobody will ask, or nobody has
    _asked.set()
    if at_once:
        raise KeyboardInterrupt
    # Not by print, whose buffer the signal may have come into.
    os.write(
        2, b"\nStopping: the fit in progress saves itself first. Once more stops it at once.\n"
    )


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


def stop_is_asked() -> bool:
    """Whether a signal has come."""
    return _asked.is_set()

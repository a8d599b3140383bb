"""Signals that ask a run to stop: a fit in progress saves where it stands at its next step and then stops, everything else stops at once.

SIGTERM comes from a queue, SIGINT from Ctrl-C, SIGHUP from a terminal that is closed. A second one stops a fit at once.
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
_fits = 0
_last: int = signal.SIGINT


@contextmanager
def signals_stop() -> Iterator[None]:
    """Within the block `SIGNALS` raise KeyboardInterrupt, or let a fit in progress do so. In other threads than the main one: no change.

    A signal that is ignored, as nohup and shells have it, stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked.clear()
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


def exit_code() -> int:
    """What a process that was stopped exits with, as shells have it: 128 and the signal's number, 143 for SIGTERM, 130 for Ctrl-C."""
    return 128 + _last


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _last
    del frame
    _last = number
    if _fits == 0 or _asked.is_set():  # nobody will look, or nobody has
        raise KeyboardInterrupt
    _asked.set()
    # Not by print, whose buffer the signal may have come into.
    os.write(2, b"\nStopping: the fit in progress saves itself first. Once more stops it at once.\n")


@contextmanager
def fit_in_progress() -> Iterator[None]:
    """Within the block somebody looks at `stop_is_asked` after every step."""
    global _fits
    with _lock:
        _fits += 1
    try:
        yield
    finally:
        with _lock:
            _fits -= 1


def stop_is_asked() -> bool:
    """Whether a signal has come that nobody has stopped for yet."""
    return _asked.is_set()

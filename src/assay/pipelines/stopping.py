"""SIGTERM between two steps: a fit in progress saves where it stands and then stops, everything else stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = threading.Event()
_lock = threading.Lock()
_fits = 0


@contextmanager
def sigterm_stops() -> Iterator[None]:
    """Within the block SIGTERM raises KeyboardInterrupt, or lets a fit in progress do so. In other threads than the main one: no change."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked.clear()
    before = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _asked.clear()


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    del number, frame
    if _fits == 0 or _asked.is_set():  # nobody will look, or nobody has
        raise KeyboardInterrupt
    _asked.set()


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
    """Whether SIGTERM has come."""
    return _asked.is_set()

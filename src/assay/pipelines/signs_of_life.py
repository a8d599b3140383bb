"""Signs of life: bars on a terminal, lines in a log. Imports without kedro, for the commands that
need no project.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from assay.team import current_team

EVERY = 30.0
"""Seconds from one line of a long step in a log to the next."""

LINE = "{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"

clock = time.monotonic
"""Seconds."""

_open: list[Bar] = []


class Bar(tqdm):  # type: ignore[type-arg] # which it has for the type checker alone
    """How much of a piece of work is done. It is drawn on a terminal; without one it only counts,
    for `Lines` to say now and then.
    """

    monitor_interval = 0

    def __init__(
        self, *, desc: str, total: int | None = None, unit: str = "it", **options: Any
    ) -> None:
        super().__init__(desc=desc, total=total, unit=unit, unit_scale=True, leave=False, **options)
        _open.append(self)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Draw the bar where there is a terminal."""
        return super().display(msg, pos) if on_terminal() else False

    def clear(self, *arguments: Any, **options: Any) -> None:
        """Wipe the bar off a terminal."""
        # else a line that is logged beside two bars would bring blank lines and escape sequences
        if on_terminal():
            super().clear(*arguments, **options)

    def close(self) -> None:
        """Take the bar away, on a terminal and from what `Lines` says."""
        if self in _open:
            _open.remove(self)
        super().close()

    def line(self) -> str:
        """What there is to say of it in a log."""
        return (
            self.desc
            if not self.total
            else str(self.format_meter(**{**self.format_dict, "bar_format": LINE}))
        )


def on_terminal() -> bool:
    """Whether somebody sees bars: those of the ranks' first, where there are several."""
    return current_team().rank == 0 and sys.stderr.isatty()


@contextmanager
def staged_bar(doing: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for work in several stages; what it gives is called with the stage, how much of it is
    done, and of how much.
    """
    with Bar(desc=doing) as bar:
        last = ""

        def tell(stage: str, done: int, total: int) -> None:
            nonlocal last
            if stage != last or total != bar.total or done < bar.n:
                bar.reset(total)
                bar.set_description_str(f"{doing}: {stage}")
                last = stage
            bar.update(done - bar.n)

        yield tell


class Lines:
    """The lines that a log has instead of bars.

    Args:
        say: writes a line.
    """

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._said = clock()

    def tell(self, line: str) -> None:
        """Write a line, with the time of day."""
        self._said = clock()
        self._say(f"{time.strftime('%H:%M:%S')} {line}")

    def show(self, otherwise: Iterable[str] = ()) -> None:
        """Say how far the open bars have come, or ``otherwise`` where there is none, if nothing was
        said for a while.
        """
        if clock() - self._said >= EVERY:
            for line in [bar.line() for bar in list(_open)] or otherwise:
                self.tell(line)


@contextmanager
def beside(tick: Callable[[], object]) -> Iterator[None]:
    """Have a thread call ``tick`` once a second while the block is at work."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(1):
            tick()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def told(say: Callable[[str], object]) -> Iterator[None]:
    """Have ``say`` write a line of the open bars every so often, where no terminal shows them."""
    if on_terminal():
        yield
    else:
        with beside(Lines(say).show):
            yield

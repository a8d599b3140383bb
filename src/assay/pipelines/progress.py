"""Signs of life: bars on a terminal, and lines in a log where there is none."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from kedro.framework.hooks import hook_impl
from kedro.pipeline.node import Node
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)

EVERY = 30.0
"""Seconds from one line of a long step in a log to the next."""

LINE = "{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"

clock = time.monotonic
"""Seconds."""

_open: list[Bar] = []


class Bar(tqdm):  # type: ignore[type-arg] # which it has for the type checker alone
    """How much of a piece of work is done. It is drawn on a terminal; without one it only counts, for `Watch` to say now and then."""

    monitor_interval = 0

    def __init__(self, *, desc: str, total: int | None = None, unit: str = "it", **options: Any) -> None:
        super().__init__(desc=desc, total=total, unit=unit, unit_scale=True, leave=False, **options)
        _open.append(self)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        return super().display(msg, pos) if on_terminal() else False

    def close(self) -> None:
        if self in _open:
            _open.remove(self)
        super().close()

    def line(self) -> str:
        """What there is to say of it in a log."""
        return self.desc if not self.total else str(self.format_meter(**{**self.format_dict, "bar_format": LINE}))


def on_terminal() -> bool:
    """Whether somebody sees bars."""
    return sys.stderr.isatty()


@contextmanager
def staged_bar(doing: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for work in several stages; what it gives is called with the stage, how much of it is done, and of how much."""
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


class Watch:
    """A Kedro hook that says which steps of a run are done, and how far those that take long have come.

    Args:
        steps: of the run.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._done = 0
        self._began: dict[str, float] = {}
        self._saved: dict[str, set[str]] = {}
        self._said = clock()

    @hook_impl
    def before_node_run(self, node: Node) -> None:
        self._began[node.name] = clock()

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, node: Node) -> None:
        # What a node gives may be computed as it is saved: codes are.
        saved = self._saved.setdefault(node.name, set())
        saved.add(dataset_name)
        if saved != set(node.outputs):
            return
        self._done += 1
        took = tqdm.format_interval(clock() - self._began.pop(node.name))
        if not on_terminal():
            self._say(f"{self._done} of {self._steps} steps done: {node.name} in {took}")

    def look(self) -> None:
        """Say how far what is being done has come, where nothing was said for a while."""
        if clock() - self._said < EVERY:
            return
        bars = [bar.line() for bar in list(_open)]
        now = clock()
        names = [f"{name}: for {tqdm.format_interval(now - began)}" for name, began in list(self._began.items())]
        for line in bars or names:
            self._say(line)

    def head(self) -> str:
        """The steps that are being done, for a terminal."""
        return f"step {min(self._done + 1, self._steps)} of {self._steps}: {', '.join(list(self._began))}"

    def _say(self, line: str) -> None:
        self._said = clock()
        logger.info("%s %s", time.strftime("%H:%M:%S"), line)


@contextmanager
def watched(hooks: Any, steps: int) -> Iterator[Watch]:
    """Have a run of so many ``steps``, whose hook manager is ``hooks``, show signs of life."""
    watch, over = Watch(steps), threading.Event()
    hooks.register(watch)

    def tick(show: Callable[[], object]) -> None:
        while not over.wait(1):
            show()

    def show_on(bar: tqdm[NoReturn]) -> Callable[[], object]:
        return lambda: bar.set_description_str(watch.head())

    with (
        logging_redirect_tqdm([logging.getLogger("assay")]),
        tqdm(bar_format="{desc} [{elapsed}]", leave=False, disable=None) as head,
    ):
        beside = threading.Thread(target=tick, args=(watch.look if head.disable else show_on(head),), daemon=True)
        beside.start()
        try:
            yield watch
        finally:
            over.set()
            beside.join()
            hooks.unregister(watch)

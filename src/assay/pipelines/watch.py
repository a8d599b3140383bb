"""What a run shows of itself: which step it is at, which are done, and how far those that take long
have come.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kedro.framework.hooks import hook_impl
from kedro.pipeline.node import Node
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from assay.pipelines import signs_of_life
from assay.pipelines.signs_of_life import Lines, beside, on_terminal
from assay.pipelines.stopping import stop_if_asked

logger = logging.getLogger(__name__)


class Watch:
    """A Kedro hook that knows which steps of a run are being done, and says without a terminal when
    one is done.

    Args:
        steps: of the run.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._done = 0
        self._began: dict[str, float] = {}
        self._saved: dict[str, set[str]] = {}
        self._lines = Lines(logger.info)

    @hook_impl
    def before_node_run(self, node: Node) -> None:
        """Stop where a signal has come; otherwise note when the node began."""
        stop_if_asked()
        self._began[node.name] = signs_of_life.clock()

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, node: Node) -> None:
        """Count a node as done when its last result is saved, and log it where there is no
        terminal.
        """
        # What a node gives may be computed as it is saved: codes are.
        saved = self._saved.setdefault(node.name, set())
        saved.add(dataset_name)
        if saved != set(node.outputs):
            return
        self._done += 1
        took = self._since(self._began.pop(node.name))
        if not on_terminal():
            self._lines.tell(f"{self._done} of {self._steps} steps done: {node.name} in {took}")

    def show(self) -> None:
        """Say how far the steps that take long have come, where nothing was said for a while."""
        self._lines.show(
            [f"{name}: for {self._since(began)}" for name, began in list(self._began.items())]
        )

    def head(self) -> str:
        """The steps that are being done, for a terminal."""
        return (
            f"step {min(self._done + 1, self._steps)} of {self._steps}:"
            f" {', '.join(list(self._began))}"
        )

    def _since(self, began: float) -> str:
        return tqdm.format_interval(signs_of_life.clock() - began)


@contextmanager
def watched(hooks: Any, steps: int) -> Iterator[Watch]:
    """Have a run of so many ``steps``, whose hook manager is ``hooks``, show signs of life."""
    watch = Watch(steps)
    hooks.register(watch)
    try:
        with (
            logging_redirect_tqdm([logging.getLogger("assay")]),
            tqdm(bar_format="{desc} [{elapsed}]", leave=False, disable=None) as head,
            beside(watch.show if head.disable else lambda: head.set_description_str(watch.head())),
        ):
            yield watch
    finally:
        hooks.unregister(watch)

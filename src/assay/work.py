"""What a run has to make, settled and locked before it begins, so that two at once neither mix nor
do the same work twice.

A run holds the lock of every node that it is to run, and shares those of the nodes whose results it
only reads. Locks are by node and fingerprint: runs of other settings, or of other layers, go on
side by side. A run waits for what another process holds, and then settles again what is left to
do. A lock is shared as soon as its results are recorded.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node

from assay.configuration import current_configuration
from assay.freshness import Freshness
from assay.io.checkpoints import Checkpoints
from assay.io.datasets import ShardsDataset
from assay.io.locks import Locks
from assay.runnable import check_runnable

logger = logging.getLogger(__name__)

FOLDER = Path("data/.locks")
PUBLISHING = "publishing"
POLL = 0.2
"""Seconds between two tries to take a lock that another process holds."""


@dataclass
class Work:
    """What a run has to make: ``todo``, whose results and inputs are locked, and the places of
    everything.
    """

    todo: Pipeline
    freshness: Freshness
    locks: Locks
    unrecorded: dict[str, set[str]] = field(default_factory=dict)
    """The outputs of each node that are not yet recorded."""
    checkpoints: dict[str, list[Checkpoints]] = field(default_factory=dict)
    """The checkpoints that each node was given."""

    def note_saved(self, name: str, node: Node) -> None:
        """Record a result; with a node's last, its fit's checkpoints are of no more use, and others
        may read what it left.
        """
        self.freshness.record(name, node)
        left = self.unrecorded.setdefault(node.name, set(node.outputs))
        left.discard(name)
        if left:
            return
        for checkpoints in self.checkpoints.pop(node.name, []):
            checkpoints.clear_finished()
        lock = self.freshness.lock_of(node)
        if lock is not None and self.locks.holds(lock):
            self.locks.share(lock)

    def publish(self, names: set[str]) -> None:
        """Publish what was made under the paths that people know, all of a run's files at once."""
        if not self.freshness.unpublished(names):
            return
        _await(self.locks, PUBLISHING, False, lambda: False, set())
        try:
            self.freshness.publish(names)
        finally:
            self.locks.release(PUBLISHING)


class _Current:
    """The catalog that was made last, and the work in hand: one run at a time in a process."""

    freshness: Freshness | None = None
    work: Work | None = None


def current_freshness() -> Freshness:
    """Of the catalog that was made last."""
    assert _Current.freshness is not None
    return _Current.freshness


@contextmanager
def taken_on(freshness: Freshness, selected: Pipeline, *, force: bool = False) -> Iterator[Work]:
    """Settle what of ``selected``, all of it with ``force``, has to run; yield it with its locks
    held.

    Raises:
        FileNotFoundError: something that it reads is missing.
        ValueError: something cannot be read, or is in the way.
    """
    locks = Locks(freshness.project / FOLDER)
    try:
        todo = _settle(freshness, locks, selected, force)
        freshness.place(freshness.catalog, renewed=todo.all_outputs())
        _Current.work = Work(todo, freshness, locks)
        yield _Current.work
    finally:
        _Current.work = None
        locks.release()


def _settle(freshness: Freshness, locks: Locks, selected: Pipeline, force: bool) -> Pipeline:
    """What has to run; its locks are held when it is given."""
    told: set[str] = set()
    while True:
        todo = selected if force else freshness.stale(selected)
        check_runnable(freshness, todo)
        makers = {freshness.lock_of(node): node for node in todo.nodes}
        readers = {
            freshness.lock_of(freshness.made_by[name])
            for name in todo.inputs() & freshness.made_by.keys()
        }
        wanted = {lock: lock not in makers for lock in makers.keys() | readers if lock is not None}
        if all(locks.holds(lock, shared=shared) for lock, shared in wanted.items()):
            return todo
        locks.release()
        for lock, shared in sorted(wanted.items()):
            node = makers.get(lock)

            def is_made(node: Node | None = node) -> bool:
                if force or node is None or freshness.stale(Pipeline([node])).nodes:
                    return False
                # It may also be wanted for what it leaves in memory.
                return node not in freshness.stale(selected).nodes

            if not _await(locks, lock, shared, is_made, told):
                break


def _await(
    locks: Locks, lock: str, shared: bool, is_made: Callable[[], bool], told: set[str]
) -> bool:
    """Take a lock, waiting for whoever holds it; False where that has made what was to do."""
    while not locks.take(lock, shared=shared):
        if is_made():
            return False
        holder = locks.holder(lock)
        process = holder.partition(" (")[0]
        if process not in told:  # one line for each, however many locks it holds
            told.add(process)
            logger.info(
                "waiting for `%s` and whatever else is in the hands of %s",
                lock.partition("@")[0],
                holder,
            )
        time.sleep(POLL)
    return True


class WorkHook:
    """Points results at their places, checks what is loaded and records what is saved."""

    def __init__(self) -> None:
        self._own: Any = None
        self._shell: Any = None

    @hook_impl(trylast=True)  # when everything is in the catalog
    def after_catalog_created(
        self, catalog: DataCatalog, save_version: str | None, load_versions: dict[str, str] | None
    ) -> None:
        """Point every result at its place, and have the shards read by as many threads as the
        parameters say.
        """
        from kedro.framework.project import pipelines

        # of a run that was interrupted in this process: Kedro calls no hook for that
        self._let_go()
        project, parameters = current_configuration()
        for name in pipelines["__default__"].datasets():
            dataset = catalog.get(name) if name in catalog else None
            if isinstance(dataset, ShardsDataset):
                dataset.threads = parameters.threads
        if _Current.work is not None:
            _Current.work.freshness.place(catalog)
            return
        _Current.freshness = Freshness(
            project, catalog, pipelines["__default__"], load_versions, save_version
        )
        _Current.freshness.place(catalog)

    @hook_impl
    def before_pipeline_run(self, pipeline: Pipeline) -> None:
        """Take on all nodes of a run that did not come by the command line, as in a notebook."""
        if _Current.work is None:
            self._own = taken_on(current_freshness(), pipeline, force=True)
            self._own.__enter__()
            # Whoever interrupts a cell reloads Kedro next, and with it this module: what is still
            # held then, nobody can let go.
            self._shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
            if self._shell is not None:
                self._shell.events.register("post_execute", self._let_go)

    @hook_impl(tryfirst=True)
    def before_dataset_loaded(self, dataset_name: str) -> None:
        """Check that a result is what was saved.

        Raises:
            ValueError: it is not.
        """
        if _Current.work is not None:
            _Current.work.freshness.verify(dataset_name)

    @hook_impl
    def after_dataset_loaded(self, data: Any, node: Node) -> None:
        """Note the checkpoints that a node was given, for them to be removed when it is done."""
        if _Current.work is not None and isinstance(data, Checkpoints):
            _Current.work.checkpoints.setdefault(node.name, []).append(data)

    @hook_impl
    def before_dataset_saved(self, dataset_name: str) -> None:
        """Have what is about to be overwritten count as missing."""
        if _Current.work is not None:
            _Current.work.freshness.forget(dataset_name)

    @hook_impl(tryfirst=True)
    def after_dataset_saved(self, dataset_name: str, node: Node) -> None:
        """Record a result that was saved whole."""
        if _Current.work is not None:
            _Current.work.note_saved(dataset_name, node)

    @hook_impl(trylast=True)
    def after_pipeline_run(self, pipeline: Pipeline) -> None:
        """Publish what a run without the command line made, and let its locks go."""
        if self._own is not None and _Current.work is not None:
            _Current.work.publish(pipeline.all_outputs())
        self._let_go()

    @hook_impl(trylast=True)
    def on_pipeline_error(self) -> None:
        """Let the locks go of a run without the command line."""
        self._let_go()

    def _let_go(self) -> None:
        own, self._own = self._own, None
        shell, self._shell = self._shell, None
        if shell is not None:
            shell.events.unregister("post_execute", self._let_go)
        if own is not None:
            own.__exit__(None, None, None)

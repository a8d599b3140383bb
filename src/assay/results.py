"""Results of a run by name, for what is no run: found, checked and locked as a run does it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from assay.fingerprints import is_parameter
from assay.freshness import Freshness
from assay.io.locks import Locks
from assay.work import FOLDER


class Results:
    """Loads results, sources and parameters by name. A result on disk is checked against its
    record; what the catalog keeps in memory alone is made as a run makes it.
    """

    def __init__(self, freshness: Freshness) -> None:
        self._freshness = freshness

    def __call__(self, name: str) -> Any:
        """Load something.

        Raises:
            FileNotFoundError: it is a source, and not there.
            ValueError: it is not what was saved.
        """
        catalog = self._freshness.catalog
        if name not in self._freshness.made_by:
            if not is_parameter(name) and not catalog.exists(name):
                raise FileNotFoundError(
                    f"`{name}` does not exist ({catalog.get(name)!r}): correct its path"
                )
            return catalog.load(name)
        if self._freshness.is_kept(name):
            self._freshness.verify(name)
            return catalog.load(name)
        return self.make(name)

    def make(self, name: str, others: Mapping[str, str] | None = None) -> Any:
        """What the node of a result gives, from its inputs or, for some of them, `others`."""
        maker = self._freshness.made_by[name]
        given = {source: self((others or {}).get(source, source)) for source in maker.inputs}
        return maker.run(given)[name]

    def on_disk(self, name: str) -> set[str]:
        """The results on disk that something is, or is made of where it is not on disk itself."""
        if name in self._freshness.made_by and self._freshness.is_kept(name):
            return {name}
        return self.behind(name)

    def behind(self, name: str) -> set[str]:
        """The results on disk that something is made of."""
        maker = self._freshness.made_by.get(name)
        sources = [] if maker is None else maker.inputs
        return {found for source in sources for found in self.on_disk(source)}


@contextmanager
def held(
    freshness: Freshness, wanted: Iterable[str], made_again: Iterable[str] = ()
) -> Iterator[Results]:
    """Results that are there and up to date, locked so that neither a run nor `kedro prune` takes
    them away.

    Args:
        freshness: of the configuration in force.
        wanted: names to be loaded.
        made_again: names to be made from their inputs.

    Raises:
        FileNotFoundError: one is missing or out of date; naming the node that makes it.
        ValueError: another process is making it.
    """
    results, locks = Results(freshness), Locks(freshness.project / FOLDER)
    found = set().union(*map(results.on_disk, wanted), *map(results.behind, made_again))
    try:
        for name in sorted(found):
            node = freshness.made_by[name]
            lock = freshness.lock_of(node)
            if lock is not None and not locks.holds(lock, shared=True):  # a node may leave several
                _take(locks, lock, name)
            if not freshness.is_current(name):
                raise FileNotFoundError(
                    f"`{name}` does not exist for these shards and parameters, or is out of date:"
                    f" `kedro run` makes it (`{node.name}`); type the same --env and --params as"
                    " there"
                )
        yield results
    finally:
        locks.release()


def _take(locks: Locks, lock: str, name: str) -> None:
    if not locks.take(lock, shared=True):
        raise ValueError(f"`{name}` is in the hands of {locks.holder(lock)}: wait for it")

"""Versions, codes and records that the configuration in force does not name: what other settings
and broken-off saves left.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from kedro.config import MissingConfigException
from kedro.framework.project import pipelines
from kedro.framework.session import KedroSession
from kedro.io import AbstractVersionedDataset, DatasetError
from kedro.pipeline import Pipeline

from assay.configuration import current_configuration
from assay.freshness import Freshness, folder_of
from assay.io.datasets import CodesDataset
from assay.io.locks import Locks
from assay.io.records import Record
from assay.preflight import check_shards
from assay.runnable import check_runnable
from assay.work import FOLDER as LOCKS
from assay.work import current_freshness, taken_on

RAW = Path("data/01_raw")
"""Nothing in here is ever removed."""


@dataclass(frozen=True)
class Leftover:
    """The folder of a version or of codes, or a file of an older version of Assay, and its records
    by (name, fingerprint).
    """

    path: Path
    size: int
    locks: frozenset[str]
    records: frozenset[tuple[str, str]]


def find_leftovers(freshness: Freshness) -> list[Leftover]:
    """Every version, folder of codes and record of the project that the configuration in force does
    not name, by path.
    """
    kept = {_place(freshness, record) for record in _wanted(freshness)}
    found: dict[Path, list[tuple[str, Record]]] = {}
    for name in freshness.records.names():
        for record in freshness.records.of_name(name):
            found.setdefault(_place(freshness, record), []).append((name, record))
    for path in _unrecorded(freshness):
        found.setdefault(path, [])
    return [
        Leftover(
            path,
            sum(each.lstat().st_size for each in (path, *path.rglob("*")) if not each.is_dir()),
            frozenset(record.lock for _, record in records) | _locks_by_name(freshness, path),
            frozenset((name, record.fingerprint) for name, record in records),
        )
        for path, records in sorted(found.items())
        if path not in kept and _is_ours(freshness, path)
    ]


def remove(freshness: Freshness, leftover: Leftover) -> bool:
    """Remove a leftover and its records; False where a run is at work on it."""
    locks = Locks(freshness.project / LOCKS)
    try:
        if not all(locks.take(lock) for lock in sorted(leftover.locks)):
            return False
        for name, fingerprint in leftover.records:
            freshness.records.forget(name, fingerprint)
        if leftover.path.is_dir():
            shutil.rmtree(leftover.path)
        else:
            leftover.path.unlink()
        return True
    finally:
        locks.release()


def _wanted(freshness: Freshness) -> Iterator[Record]:
    for name in freshness.made_by:
        record = (
            freshness.records.read(name, freshness.fingerprint(name))
            if freshness.is_kept(name)
            else None
        )
        if record is not None:
            yield record


def _place(freshness: Freshness, record: Record) -> Path:
    """The folder of what a record is of."""
    path = freshness.project / record.path
    return path.parent if record.version is not None else path


def _unrecorded(freshness: Freshness) -> Iterator[Path]:
    """Versions, codes and records that nothing is recorded of: a save that was cut off left them,
    or an older version of Assay.
    """
    yield from freshness.records.folder.glob("*.json")
    for name in freshness.made_by:
        dataset = freshness.catalog.get(name) if freshness.is_kept(name) else None
        if isinstance(dataset, AbstractVersionedDataset):
            yield from (path for path in folder_of(dataset).glob("[!.]*") if path.is_dir())
        elif isinstance(dataset, CodesDataset):
            try:
                layer = dataset.folder.parent
            except (FileNotFoundError, ValueError):
                # There are no shards yet, so there are no codes of them.
                continue
            yield from layer.glob("[!.]*")


def _locks_by_name(freshness: Freshness, path: Path) -> frozenset[str]:
    """The locks that are held of what a folder is named after: it may be in the making."""
    digits = path.name.rpartition(".")[2][:8]
    if not re.fullmatch(r"[0-9a-f]{8}", digits):
        return frozenset()
    return frozenset(lock.stem for lock in (freshness.project / LOCKS).glob(f"*@{digits}*.lock"))


def _is_ours(freshness: Freshness, path: Path) -> bool:
    """Whether a folder lies where results do, whatever a record says: inside the project's data,
    and not among what is raw.
    """
    real, project = path.resolve(), freshness.project.resolve()
    return (
        path.exists()
        and real.is_relative_to(project / "data")
        and not real.is_relative_to(project / RAW)
    )


def prune(env: str | None, params: dict[str, Any], dry_run: bool) -> None:
    """Remove the results of other settings than those in force: versions, codes and their records,
    but nothing raw.
    """
    with KedroSession.create(env=env, runtime_params=params) as session:
        assert isinstance(session, KedroSession)
        try:
            session.load_context()._get_catalog()
            project, parameters = current_configuration()
            check_shards(parameters, project)
            freshness = current_freshness()
            check_runnable(freshness, pipelines["__default__"])
            # what is shown of other settings is told from somebody's own by its version, which is
            # to go
            if not dry_run:
                with taken_on(freshness, Pipeline([])) as work:
                    work.publish(set(freshness.made_by))
            leftovers = find_leftovers(freshness)
            removed = [each for each in leftovers if dry_run or remove(freshness, each)]
        except (ValueError, OSError, MissingConfigException, DatasetError) as error:
            raise click.ClickException(str(error)) from error
    for each in leftovers:
        note = "" if each in removed else "  stays: a run is at work on it"
        click.echo(f"{each.size / 1e6:10.1f} MB  {each.path.relative_to(project)}{note}")
    size = sum(each.size for each in removed) / 1e6
    click.echo(f"{size:10.1f} MB in {len(removed)} places {'to remove' if dry_run else 'removed'}")

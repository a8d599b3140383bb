"""What is up to date, and where it lies: a fingerprint for every result, known before anything is
made.

Results of different fingerprints (`fingerprints.py`) lie in different places, so those of one
setting never meet another's: nothing is loaded because it is the newest. A record says where the
result of a fingerprint lies and what its bytes were, and is written when they have been saved
whole. A node is run again when one of its results has no record for the fingerprint that is wanted,
or is not as its record says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from kedro.io import AbstractVersionedDataset, DataCatalog, Version
from kedro.io.core import generate_timestamp
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node

from assay.fingerprints import UNKNOWN, Fingerprints
from assay.io.datasets import CodesDataset
from assay.io.publish import publish_file
from assay.io.records import Record, Records

FOLDER = Path("data/.fingerprints")

VERSIONS = ".versions"
"""Beside a file whose path people point at: the folder of what was ever published there."""


class Freshness(Fingerprints):
    """The results that a project's configuration asks for: which of them exist, and where.

    Args:
        project: the project's root folder.
        catalog: the datasets.
        pipeline: every node there is, so that inputs can be followed to their sources.
        load_versions: versions that are asked for by the datasets' names, whatever they were made
            from.
        timestamp: begins the names of the versions that are made; now, if it is not given.
    """

    def __init__(
        self,
        project: Path,
        catalog: DataCatalog,
        pipeline: Pipeline,
        load_versions: Mapping[str, str] | None = None,
        timestamp: str | None = None,
    ) -> None:
        self.project = project
        super().__init__(catalog, pipeline, load_versions)
        self.records = Records(project / FOLDER)
        self._versions: dict[str, str] = {}
        self._published: dict[str, Path] = {}
        self._timestamp = timestamp or generate_timestamp()

    def stale(self, pipeline: Pipeline) -> Pipeline:
        """The part of ``pipeline`` that has to run: results missing or out of date, and what feeds
        them from memory alone.
        """
        needed: set[str] = set()
        fed: set[str] = set()
        for node in reversed(pipeline.nodes):
            kept = [output for output in node.outputs if self.is_kept(output)]
            passed_on = fed.intersection(node.outputs) - set(kept)
            if passed_on or not all(self.is_current(output) for output in kept) or not node.outputs:
                needed.add(node.name)
                fed.update(node.inputs)
        return pipeline.only_nodes(*needed) if needed else Pipeline([])

    def place(self, catalog: DataCatalog, renewed: Collection[str] = ()) -> None:
        """Point every result in ``catalog`` at its place: where its record says, or where it is to
        be made.

        What is in ``renewed`` is to be made whether it is there or not.
        """
        for name in self.made_by:
            dataset: Any = catalog.get(name) if self.is_kept(name) else None
            if isinstance(dataset, CodesDataset):
                dataset.place(self._told(name))
            elif isinstance(dataset, AbstractVersionedDataset):
                if catalog is self.catalog or name not in self._versions:
                    self._versions[name] = self._choose_version(name, name in renewed)
                if dataset._version is None:  # its path is what people point at
                    self._published[name] = Path(dataset._filepath)
                    dataset._filepath = type(dataset._filepath)(folder_of(dataset))
                dataset._version = Version(self._versions[name], self._versions[name])
                dataset._clear_version_cache()

    def _choose_version(self, name: str, renewed: bool) -> str:
        if name in self.pinned:
            return self.pinned[name]
        wanted = self._told(name)
        record = self.records.read(name, wanted)
        if (
            record is not None
            and record.version is not None
            and not renewed
            and self.is_current(name)
        ):
            return record.version
        return wanted if wanted == UNKNOWN else f"{self._timestamp}.{wanted[:8]}"

    def publish(self, names: Collection[str]) -> None:
        """Put those results in place, each whole, that people know by a fixed path; withdraw those
        that these settings do not have.
        """
        for target, made in self.unpublished(names).items():
            if made is None:
                target.unlink(missing_ok=True)
            else:
                with publish_file(target) as partial:
                    partial.write_bytes(made)

    def unpublished(self, names: Collection[str]) -> dict[Path, bytes | None]:
        """What is to lie under the paths that people know, and does not; None for what lies
        there and is another setting's alone.

        The latter only where all is published that these settings have, and only what is kept as a
        version.
        """
        mine = self._published.keys() & set(names)
        found: dict[Path, bytes | None] = {}
        for name in sorted(mine):
            record = self.records.read(name, self.fingerprint(name))
            made = (
                (self.project / record.path).read_bytes()
                if record is not None and self.is_current(name)
                else None
            )
            if made is not None and _bytes_of(self._published[name]) != made:
                found[self._published[name]] = made
        others = (
            self.catalog.keys() - self.made_by.keys() if mine == self._published.keys() else set()
        )
        for dataset in map(self.catalog.get, others):
            if isinstance(dataset, AbstractVersionedDataset) and dataset._version is None:
                shown = Path(dataset._filepath)
                kept = map(_bytes_of, folder_of(dataset).glob(f"*/{shown.name}"))
                if shown.is_file() and shown.read_bytes() in kept:
                    found[shown] = None
        return found

    def published(self, name: str) -> Path:
        """The path of a result that people point at."""
        return self._published[name]

    def lock_of(self, node: Node) -> str | None:
        """What whoever runs a node locks; None where it leaves nothing.

        Of what has one place for all settings it is the node, of everything else the node and its
        fingerprint.
        """
        kept = [output for output in node.outputs if self.is_kept(output)]
        if not kept:
            return None
        if any(self._is_fixed(output) for output in kept):
            return node.name
        return f"{node.name}@{self._of_node(node)[:16]}"

    def record(self, name: str, node: Node) -> None:
        """Note that ``node`` has saved ``name`` whole, from inputs of the fingerprints that were
        told when it was placed.
        """
        dataset = self.kept(name)
        if dataset is None:
            return
        path = self._path(name)
        stat = path.stat() if path.is_file() else None
        self.records.write(
            name,
            Record(
                fingerprint=self.fingerprint(name),
                node=node.name,
                lock=self.lock_of(node) or "",
                path=str(
                    path.relative_to(self.project) if path.is_relative_to(self.project) else path
                ),
                version=self._versions.get(name),
                content=_content_of(dataset, path),
                size=stat.st_size if stat else None,
                mtime_ns=stat.st_mtime_ns if stat else None,
                inputs={source: self.fingerprint(source) for source in node.inputs},
            ),
        )

    def forget(self, name: str) -> None:
        """Note that ``name`` is about to be overwritten, if it is: until it is saved whole it
        counts as missing.
        """
        if self._is_fixed(name):
            self.records.forget_all(name)
        elif isinstance(self.kept(name), CodesDataset):
            self.records.forget(name, self.fingerprint(name))

    def verify(self, name: str) -> None:
        """Check that a result, which is about to be loaded, is what was saved.

        Raises:
            ValueError: it is not.
        """
        dataset = self.kept(name)
        if dataset is None or name not in self.made_by:
            return
        record = self._record(name)
        path = self._path(name)
        if (
            record is not None
            and record.content is not None
            and _content_of(dataset, path) != record.content
        ):
            raise ValueError(
                f"{path} is not what `{record.node}` saved (its SHA-256 is another): it is damaged,"
                " or somebody else's; remove it, and the next run makes it again"
            )

    def is_current(self, name: str) -> bool:
        """Whether a result is there, as its record says, for the fingerprint that is wanted."""
        record = self._record(name)
        dataset = self.kept(name)
        if name in self.pinned and record is None:
            return self._path(name).is_file()
        if record is None or dataset is None:
            return False
        if not isinstance(dataset, AbstractVersionedDataset):
            return self._exists(dataset, name) and _content_of(dataset, Path()) == record.content
        path = folder_of(dataset) / str(record.version) / folder_of(dataset).name
        try:
            stat = path.stat()
        except OSError:
            return False
        if stat.st_size != record.size:
            return False
        return stat.st_mtime_ns == record.mtime_ns or _content_of(dataset, path) == record.content

    def _record(self, name: str) -> Record | None:
        if name not in self.pinned:
            return self.records.read(name, self.fingerprint(name))
        return next(
            (found for found in self.records.of_name(name) if found.version == self.pinned[name]),
            None,
        )

    def _is_fixed(self, name: str) -> bool:
        """Whether a result has one place for all settings."""
        dataset = self.kept(name)
        return dataset is not None and not isinstance(
            dataset, AbstractVersionedDataset | CodesDataset
        )

    def _exists(self, dataset: Any, name: str) -> bool:
        if isinstance(dataset, CodesDataset):
            dataset.place(self.fingerprint(name))
        return bool(dataset.exists())

    def _path(self, name: str) -> Path:
        """The file or folder of a result, once it is placed."""
        dataset = self.kept(name)
        if isinstance(dataset, AbstractVersionedDataset):
            version = self.pinned.get(name) or self._versions[name]
            return folder_of(dataset) / version / folder_of(dataset).name
        return Path(dataset.folder if isinstance(dataset, CodesDataset) else dataset._filepath)


def _bytes_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def folder_of(dataset: Any) -> Path:
    """The folder of a dataset's versions."""
    path = Path(dataset._filepath)
    return path if dataset._version is not None else path.parent / VERSIONS / path.name


def _content_of(dataset: Any, path: Path) -> str | None:
    """What tells a result's bytes from others: SHA-256 of a file, or what a dataset says of its
    folder; None where there is no telling.
    """
    if not isinstance(dataset, AbstractVersionedDataset):
        return str(dataset.fingerprint()) if hasattr(dataset, "fingerprint") else None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

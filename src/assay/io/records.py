"""What is known of results: a small file for each, by its name and its fingerprint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from assay.io.publish import publish_file


class Record(BaseModel):
    """A result that was saved whole.

    Attributes:
        fingerprint: of the result.
        node: that made it.
        lock: which whoever makes it holds, and whoever reads it shares.
        path: the file or folder, relative to the project.
        version: where it has one.
        content: SHA-256 (hex) of the file, or what the dataset says of a folder; None: nothing is
            known.
        size: of the file, in bytes.
        mtime_ns: when the file was written.
        inputs: the fingerprints of what it was made from.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    fingerprint: str
    node: str
    lock: str
    path: str
    version: str | None = None
    content: str | None = None
    size: int | None = None
    mtime_ns: int | None = None
    inputs: dict[str, str]


class Records:
    """The records in a folder: ``<folder>/<name>/<fingerprint>.json``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str, fingerprint: str) -> Record | None:
        """The record of a result; None where it was not made, or nothing good is written of it."""
        found = _read(self._path(name, fingerprint))
        return found if found is not None and found.fingerprint == fingerprint else None

    def of_name(self, name: str) -> Iterator[Record]:
        """Every record of a name."""
        for path in sorted((self.folder / name).glob("*.json")):
            found = _read(path)
            if found is not None and found.fingerprint == path.stem:
                yield found

    def names(self) -> list[str]:
        """The names that there are records of."""
        return sorted(path.name for path in self.folder.glob("*") if path.is_dir())

    def write(self, name: str, record: Record) -> None:
        """Note a result. It takes the place of an older record of the same fingerprint."""
        with publish_file(self._path(name, record.fingerprint)) as partial:
            partial.write_text(json.dumps(record.model_dump(), indent=1), encoding="utf-8")

    def forget(self, name: str, fingerprint: str) -> None:
        """Remove a record, if there is one."""
        self._path(name, fingerprint).unlink(missing_ok=True)

    def forget_all(self, name: str) -> None:
        """Remove every record of a name."""
        for path in (self.folder / name).glob("*.json"):
            path.unlink(missing_ok=True)

    def _path(self, name: str, fingerprint: str) -> Path:
        return self.folder / name / f"{fingerprint}.json"


def _read(path: Path) -> Record | None:
    try:
        return Record.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None

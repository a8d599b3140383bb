"""Checkpoints of a fit: safetensors files that appear whole, the last two kept, and never used for another fit.

::

    <folder>/<hash of what is fitted>/step000001200.safetensors

A file's header holds its schema and version, and as JSON `about`, what is being fitted (layer, width, shards, statistics,
parameters), and `state`, JSON scalars beside the tensors such as the reader's cursor. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from assay.io.tensors import read_with_header, write_with_header

logger = logging.getLogger(__name__)

SCHEMA = {"schema": "assay.checkpoint", "version": "1"}
KEPT = 2
EXPIRE = 30 * 24 * 3600.0
"""Seconds after which an interrupted fit's checkpoints are taken for forgotten."""

State = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """Where a fit stood: `tensors` by name and `state`, JSON."""

    tensors: dict[str, Tensor]
    state: State


class Checkpoints:
    """The checkpoints of one fit after another in a folder of their own, which need not exist."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._finished: list[Mapping[str, Any]] = []

    def save(self, about: Mapping[str, Any], step: int, tensors: dict[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write where the fit that `about` (JSON) describes stands after `step` steps; the last two are kept."""
        folder = self._folder(about)
        path = folder / f"step{step:09d}.safetensors"
        write_with_header(path, tensors, SCHEMA | {"about": _canonical(about), "state": json.dumps(state)})
        for older in _newest_first(folder)[KEPT:]:
            older.unlink(missing_ok=True)

    def load(self, about: Mapping[str, Any]) -> Checkpoint | None:
        """The last whole checkpoint of the fit that `about` describes; None where it has none.

        A damaged file is passed over, with a warning, for the one before it.

        Raises:
            ValueError: a file in the fit's folder is of another fit: other shards, layer, width, statistics or parameters.
        """
        folder = self._folder(about)
        for path in _newest_first(folder):
            try:
                tensors, header = read_with_header(path, SCHEMA)
                found, state = json.loads(header["about"]), json.loads(header["state"])
            except (ValueError, KeyError, OSError) as error:
                logger.warning("%s is passed over: %s", path, error)
                continue
            if found != json.loads(_canonical(about)):
                raise ValueError(
                    f"{path} is a checkpoint of another fit: {_difference(found, about)}; remove {folder} to start again"
                )
            logger.info("going on from %s", path)
            return Checkpoint(tensors, state)
        if self._fits():
            logger.warning(
                "%s holds no whole checkpoint of this fit, but of others (other shards, layer, statistics or parameters); "
                "starting from the beginning",
                self.folder,
            )
        return None

    def finish(self, about: Mapping[str, Any]) -> None:
        """Note that the fit that `about` describes is done; its checkpoints stay until `clear_finished`, when what it made is saved."""
        self._finished.append(about)

    def clear_finished(self) -> None:
        """Clear what was noted by `finish`."""
        while self._finished:
            self.clear(self._finished.pop())

    def clear(self, about: Mapping[str, Any]) -> None:
        """Remove the checkpoints of the fit that `about` describes, which is done, and those that nobody has written to for 30 days.

        Other fits' are kept till then: a quick one must not cost an interrupted one that took days.
        """
        own = self._folder(about)
        for folder in self._fits():
            if folder == own or time.time() - _last_written(folder) > EXPIRE:
                shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # it is not there, or not empty
            self.folder.rmdir()

    def _fits(self) -> list[Path]:
        """The folders of fits: others' files are no concern of ours."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return [path for path in found if path.is_dir() and re.fullmatch(r"[0-9a-f]{16}", path.name)]

    def _folder(self, about: Mapping[str, Any]) -> Path:
        return self.folder / hashlib.sha256(_canonical(about).encode()).hexdigest()[:16]


def _canonical(about: Mapping[str, Any]) -> str:
    return json.dumps(about, sort_keys=True)


def _newest_first(folder: Path) -> list[Path]:
    files = [path for path in folder.glob("step*.safetensors") if re.fullmatch(r"step\d{9,}\.safetensors", path.name)]
    return sorted(files, key=lambda path: int(path.stem.removeprefix("step")), reverse=True)


def _last_written(folder: Path) -> float:
    """When a fit last saved anything, or made its folder; seconds since the epoch. Now, where it goes while we look."""
    try:
        return max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
    except OSError:
        return time.time()


def _difference(found: Any, wanted: Mapping[str, Any]) -> str:
    if not isinstance(found, dict):
        return f"it is about {found!r}"
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    return ", ".join(f"its {name} is {found.get(name)!r}, wanted {wanted.get(name)!r}" for name in names)

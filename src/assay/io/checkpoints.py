"""Checkpoints of a fit: safetensors files that appear whole, the last two kept, and never used for
another fit.

::

    <folder>/<hash of what is fitted>/step000001200.safetensors

A file's header holds its schema and version, the checksum of all that is in the file, and as JSON
`about`, what is being fitted (layer, width, shards, statistics, parameters), and `state`, JSON
scalars beside the tensors such as the reader's cursor. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from assay.io.strict_json import parse_json
from assay.io.tensors import read_header, read_with_header, write_with_header

logger = logging.getLogger(__name__)

SCHEMA = {"schema": "assay.checkpoint", "version": "2"}
KEPT = 2
EXPIRE = 30 * 24 * 3600.0
"""Seconds after which an interrupted fit's checkpoints are taken for forgotten."""

State = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """Where a fit stood: `tensors` by name and `state`, JSON."""

    tensors: dict[str, Tensor]
    state: State


Observer = Callable[[int, str, int, dict[str, float]], None]
"""Called with layer, method, step and metrics."""


class Checkpoints:
    """The checkpoints of one fit after another in a folder of their own, which need not exist; and
    who is told of the fits' steps.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.observers: list[Observer] = []
        self._finished: list[Mapping[str, Any]] = []

    def save(
        self,
        about: Mapping[str, Any],
        step: int,
        tensors: dict[str, Tensor],
        state: Mapping[str, Any],
    ) -> None:
        """Write where the fit that `about` (JSON) describes stands after `step` steps; the last two
        are kept.

        Those of later steps go as well: a fit that went on from before them found them damaged, and
        they would take the place of whole ones.
        """
        folder = self._folder(about)
        path = folder / f"step{step:09d}.safetensors"
        write_with_header(
            path, tensors, SCHEMA | {"about": _canonical(about), "state": json.dumps(state)}
        )
        files = _newest_first(folder)
        kept = [each for each in files if _step_of(each) <= step][:KEPT]
        for other in files:
            if other not in kept:
                other.unlink(missing_ok=True)

    def load(self, about: Mapping[str, Any]) -> Checkpoint | None:
        """The last whole checkpoint of the fit that `about` describes; None where it has none.

        A damaged file is passed over, with a warning, for the one before it.

        Raises:
            ValueError: a file in the fit's folder is of another fit: other shards, layer, width,
                statistics or parameters.
        """
        folder = self._folder(about)
        for path in _newest_first(folder):
            try:
                tensors, header = read_with_header(path, SCHEMA)
                found, state = parse_json(header["about"]), parse_json(header["state"])
            except (ValueError, KeyError, OSError) as error:
                logger.warning("%s is passed over: %s", path, error)
                continue
            if differences := _differences(found, json.loads(_canonical(about))):
                raise ValueError(
                    f"{path} is a checkpoint of another fit: {', '.join(differences)}; remove"
                    f" {folder} to start again"
                )
            return Checkpoint(tensors, state)
        others = [
            said
            for other in self._fits()
            if other != folder and (said := _newest_about(other)) is not None
        ]
        if others:
            wanted = json.loads(_canonical(about))
            nearest = min(others, key=lambda said: len(_differences(said, wanted)))
            if not _is_other_part(nearest, wanted):
                logger.warning(
                    "%s holds no whole checkpoint of this fit, but of others, and of the nearest of"
                    " them %s; starting from the beginning",
                    self.folder,
                    ", ".join(_differences(nearest, wanted)),
                )
        return None

    def finish(self, about: Mapping[str, Any]) -> None:
        """Note that the fit that `about` describes is done; its checkpoints stay until
        `clear_finished`, when what it made is saved.
        """
        self._finished.append(about)

    def clear_finished(self) -> None:
        """Clear what was noted by `finish`."""
        while self._finished:
            self.clear(self._finished.pop())

    def clear(self, about: Mapping[str, Any]) -> None:
        """Remove the checkpoints of the fit that `about` describes, which is done, and those that
        nobody has written to for 30 days.

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
        return [
            path for path in found if path.is_dir() and re.fullmatch(r"[0-9a-f]{16}", path.name)
        ]

    def _folder(self, about: Mapping[str, Any]) -> Path:
        return self.folder / hashlib.sha256(_canonical(about).encode()).hexdigest()[:16]


def _canonical(about: Mapping[str, Any]) -> str:
    return json.dumps(about, sort_keys=True)


def _newest_first(folder: Path) -> list[Path]:
    files = [
        path
        for path in folder.glob("step*.safetensors")
        if re.fullmatch(r"step\d{9,}\.safetensors", path.name)
    ]
    return sorted(files, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step"))


def _last_written(folder: Path) -> float:
    """When a fit last saved anything, or made its folder; seconds since the epoch. Now, where it
    is removed meanwhile.
    """
    try:
        return max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
    except OSError:
        return time.time()


def _newest_about(folder: Path) -> Any:
    """What the newest checkpoint of a folder that has a header says that it is about; None where
    none has.
    """
    for path in _newest_first(folder):
        with contextlib.suppress(ValueError, KeyError):
            return parse_json(read_header(path)["about"])
    return None


def _is_other_part(found: Any, wanted: Any) -> bool:
    """Whether one checkpoint is of another part of the same fit as the other's."""
    return all(
        isinstance(about, Mapping) and "part" in about for about in (found, wanted)
    ) and not _differences({**found, "part": wanted["part"]}, wanted)


def _differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """What differs, by the names of the innermost fields."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        inner = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        return [
            each
            for key in inner
            for each in _differences(
                found.get(key), wanted.get(key), f"{name}.{key}" if name else key
            )
        ]
    if found == wanted:
        return []
    return [f"its {name} is {found!r}, wanted {wanted!r}" if name else f"it is about {found!r}"]

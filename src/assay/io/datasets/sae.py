"""Autoencoders that others trained."""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Never

from kedro.io import AbstractDataset, DatasetError

from assay.io.saes import Settings, StoredSae, hand_made, read_sae
from assay.io.saes.hub import find, is_address
from assay.io.saes.locate import locate


@dataclass(frozen=True)
class Look:
    """What is known of an autoencoder that was read, without its numbers.

    Attributes:
        stored: as it was read, but its tensors are on the meta device.
        fingerprint: of the autoencoder.
        is_finite: whether all its numbers are.
    """

    stored: StoredSae
    fingerprint: str
    is_finite: bool


_looks: dict[Hashable, Look] = {}
"""By the files, as they are on the disk, and how they are read."""


class SaeDataset(AbstractDataset[Never, StoredSae]):
    """An autoencoder as its library saved it, or weights whose formula is typed. It is read and
    never written.

    Args:
        filepath: its file or folder, or `hf:owner/name[@revision][/subfolder]`.
        settings: what the file does not say: `activation`, `k`, `threshold`, `normalization`.
        input_bias: of weights whose formula is typed: `b_dec` or `none`. Without it the file is
            read as its library saved it.
        parameter: that names the file, for messages.
        typed: what it says, for the record.
        metadata: for plugins, unused here.

    Examples:
        YAML::

            "layer_23.sae_relu-16k":
              type: assay.io.datasets.sae.SaeDataset
              filepath: runs/z55bntm1/checkpoint/sae.pt

        Python::

            formula = SaeDataset(filepath="runs/z55bntm1/checkpoint/sae.pt").load().formula
    """

    def __init__(
        self,
        *,
        filepath: str,
        settings: dict[str, Any] | None = None,
        input_bias: Literal["b_dec", "none"] | None = None,
        parameter: str | None = None,
        typed: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.filepath = filepath
        self.said: dict[str, Any] | None = None
        """What was read, as JSON; None: nothing yet."""
        self._settings = settings or {}
        self._input_bias = input_bias
        self._parameter = parameter
        self._typed = typed or filepath
        self.metadata = metadata

    def load(self) -> StoredSae:
        """What the file says, its tensors on the CPU.

        Raises:
            DatasetError: it is missing, damaged or not understood.
        """
        try:
            stored, commit = self._read()
        except (ValueError, OSError) as error:
            kinds = (FileNotFoundError, OSError, ValueError)
            kind = next(each for each in kinds if isinstance(error, each))
            named = (self._parameter, None if self.filepath in str(error) else self.filepath)
            raise kind(": ".join([*filter(None, named), str(error)])) from error
        self.said = {"path": self._typed, "commit": commit, **stored.describe()}
        return stored

    def _read(self) -> tuple[StoredSae, str | None]:
        settings = Settings(**self._settings)
        path, commit = find(self.filepath)
        if self._input_bias is None:
            return read_sae(path, settings), commit
        has_bias = self._input_bias == "b_dec"
        return hand_made.read(path, settings, input_bias=has_bias), commit

    def save(self, data: Never) -> None:
        """Refuse: only the library writes here.

        Raises:
            DatasetError: always.
        """
        raise DatasetError(
            f"{self.filepath}: found {type(data).__name__} to save; the file is another library's"
        )

    def look(self) -> Look:
        """What it is. A file is read for it once in a process, while it stays as it is on the disk:
        the command line, the session and the fingerprints all ask, of files of gigabytes.

        Raises:
            DatasetError: it is missing, damaged or not understood.
        """
        key = self._key()
        if key is None or key not in _looks:
            stored = self.load()
            look = Look(
                replace(stored, tensors={n: t.to("meta") for n, t in stored.tensors.items()}),
                stored.fingerprint(),
                all(bool(tensor.isfinite().all()) for tensor in stored.tensors.values()),
            )
            # One that was written meanwhile is looked at again.
            if key is None or self._key() != key:
                return look
            _looks[key] = look
        look, commit = _looks[key], find(self.filepath)[1]
        self.said = {"path": self._typed, "commit": commit, **look.stored.describe()}
        return look

    def _key(self) -> Hashable | None:
        """What tells whether anything was written since; None: it cannot be read as it is."""
        try:
            found = locate(find(self.filepath)[0])
            files = [file for file in (found.weights, found.config) if file and file.exists()]
            there = tuple((str(file), str(file.resolve()), *_written(file)) for file in files)
        except (ValueError, OSError):
            return None
        typed = json.dumps([self._settings, self._input_bias], sort_keys=True)
        return found.library, there, typed

    def fingerprint(self) -> str:
        """What it says, hashed: the same for the same autoencoder elsewhere, or saved again."""
        return self.look().fingerprint

    def _exists(self) -> bool:
        # What is on the Hub, reading it tells, and why it cannot.
        return is_address(self.filepath) or Path(self.filepath).exists()

    def __repr__(self) -> str:
        """The parameter and its path: what is missing is told so, before any work."""
        return ": ".join(filter(None, (self._parameter, self.filepath)))

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self.filepath, "parameter": self._parameter}


def _written(file: Path) -> tuple[int, ...]:
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

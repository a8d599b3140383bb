"""Names of classes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Never

from kedro.io import AbstractDataset, DatasetError

from assay.io.class_names import read_class_names


class ClassNamesDataset(AbstractDataset[Never, dict[int, str]]):
    """The names of labels, by label, from a file that comes with the data. It is read and never
    written.

    Args:
        filepath: the file; `assay.io.class_names.read_class_names` says what it may hold.
        metadata: for plugins, unused here.

    Examples:
        YAML::

            class_names:
              type: assay.io.datasets.class_names.ClassNamesDataset
              filepath: ADEChallengeData2016/objectInfo150.txt

        Python::

            names = ClassNamesDataset(filepath="ADEChallengeData2016/objectInfo150.txt").load()
            names[1]  # "wall"
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> dict[int, str]:
        """The names, by label.

        Raises:
            DatasetError: the file is missing, or does not name classes.
        """
        return read_class_names(self._filepath)

    def save(self, data: Never) -> None:
        """Refuse: the names are the user's.

        Raises:
            DatasetError: always.
        """
        raise DatasetError(
            f"{self._filepath}: found {type(data).__name__} to save; names of classes are only read"
        )

    def fingerprint(self) -> str:
        """A hash of the names: the same however the file writes them."""
        names = sorted(self.load().items())
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()

    def _exists(self) -> bool:
        return self._filepath.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}

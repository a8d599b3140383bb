"""Checkpoints of a fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Never

from kedro.io import AbstractDataset, DatasetError

from assay.io.checkpoints import Checkpoints


class CheckpointsDataset(AbstractDataset[Never, Checkpoints]):
    """The folder of a fit's checkpoints. Loading gives a handle; it is the fit that saves, while it
    goes on.

    Args:
        filepath: a folder, which need not exist.
        metadata: for plugins, unused here.

    Examples:
        YAML::

            "{layer}.pca_checkpoints":
              type: assay.io.datasets.checkpoints.CheckpointsDataset
              filepath: data/06_models/.checkpoints/{layer}/pca

        Python::

            folder = "data/06_models/.checkpoints/layer_23/pca"
            checkpoints = CheckpointsDataset(filepath=folder).load()
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> Checkpoints:
        """A handle on the folder; the fit reads a checkpoint when it asks for one."""
        return Checkpoints(self._filepath)

    def save(self, data: Never) -> None:
        """Refuse: the fit saves its checkpoints itself.

        Raises:
            DatasetError: always.
        """
        raise DatasetError(
            f"{self._filepath}: found {type(data).__name__} to save; checkpoints are saved by"
            " the fit"
        )

    def fingerprint(self) -> str:
        """Always the same: where a fit goes on from does not change what it ends with."""
        return "checkpoints"

    def _exists(self) -> bool:
        return True

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}

"""Named tensors, safetensors files."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from kedro.io import AbstractVersionedDataset, DatasetError, Version
from torch import Tensor

from assay.io.tensors import fingerprint_tensors, read_tensors, write_tensors


class TensorsDataset(AbstractVersionedDataset[dict[str, Tensor], dict[str, Tensor]]):
    """Named tensors in one safetensors file: statistics, fitted models, probes.

    Args:
        filepath: a local safetensors file.
        version: which version, where the entry is ``versioned: true``.
        load_args: ``any_schema: true`` to read a file that somebody else wrote.
        metadata: for plugins, unused here.

    Examples:
        YAML::

            "{layer}.pca_model":
              type: assay.io.datasets.tensors.TensorsDataset
              filepath: data/06_models/{layer}/pca.safetensors
              versioned: true

        Python::

            model = TensorsDataset(filepath="data/06_models/layer_23/pca.safetensors").load()
            components = model["components"]
    """

    def __init__(
        self,
        *,
        filepath: str,
        version: Version | None = None,
        load_args: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        local = fsspec.filesystem("file")
        super().__init__(
            PurePosixPath(filepath), version, exists_function=local.exists, glob_function=local.glob
        )
        self._load_args = load_args or {}
        self.metadata = metadata

    def load(self) -> dict[str, Tensor]:
        """The tensors by name, on the CPU.

        Raises:
            DatasetError: there is no file, or it is not one of such tensors.
        """
        return read_tensors(Path(self._get_load_path()), **self._load_args)

    def save(self, data: dict[str, Tensor]) -> None:
        """Write the tensors as a safetensors file, whole or not at all."""
        write_tensors(Path(self._get_save_path()), data)

    def fingerprint(self) -> str:
        """What the tensors are, hashed from their names, shapes and bytes."""
        return fingerprint_tensors(self.load())

    def _exists(self) -> bool:
        try:
            return Path(self._get_load_path()).is_file()
        except DatasetError:  # no version has been saved yet
            return False

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath), "version": self._version}

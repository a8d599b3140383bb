"""Autoencoders that others trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Never

from kedro.io import AbstractDataset, DatasetError

from assay.io.saes import Settings, StoredSae, hand_made, read_sae


class SaeDataset(AbstractDataset[Never, StoredSae]):
    """An autoencoder as its library saved it, or weights whose formula is typed. It is read and
    never written.

    Args:
        filepath: its file or folder.
        settings: what the file does not say: `activation`, `k`, `threshold`, `normalization`.
        input_bias: of weights whose formula is typed: `b_dec` or `none`. Without it the file is
            read as its library saved it.
        parameter: that names the file, for messages.
        metadata: for plugins, unused here.

    Examples:
        YAML::

            "layer_23.sae_relu-16k":
              type: assay.io.datasets.sae.SaeDataset
              filepath: runs/z55bntm1/checkpoint/sae.pt

        Python::

            stored = SaeDataset(filepath="runs/z55bntm1/checkpoint/sae.pt").load()
            stored.formula
    """

    def __init__(
        self,
        *,
        filepath: str,
        settings: dict[str, Any] | None = None,
        input_bias: Literal["b_dec", "none"] | None = None,
        parameter: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.path = Path(filepath)
        self._settings = settings or {}
        self._input_bias = input_bias
        self._parameter = parameter
        self.metadata = metadata

    def load(self) -> StoredSae:
        """What the file says, its tensors on the CPU.

        Raises:
            DatasetError: it is missing, damaged or not understood.
        """
        settings = Settings(**self._settings)
        try:
            if self._input_bias is None:
                return read_sae(self.path, settings)
            return hand_made.read(self.path, settings, input_bias=self._input_bias == "b_dec")
        except (ValueError, OSError) as error:
            kinds = (FileNotFoundError, OSError, ValueError)
            kind = next(each for each in kinds if isinstance(error, each))
            said = (self._parameter, None if str(self.path) in str(error) else str(self.path))
            raise kind(": ".join([*filter(None, said), str(error)])) from error

    def save(self, data: Never) -> None:
        """Refuse: only the library writes here.

        Raises:
            DatasetError: always.
        """
        raise DatasetError(
            f"{self.path}: found {type(data).__name__} to save; the file is another library's"
        )

    def fingerprint(self) -> str:
        """What it says, hashed: the same for the same autoencoder elsewhere, or saved again."""
        return self.load().fingerprint()

    def _exists(self) -> bool:
        return self.path.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self.path), "parameter": self._parameter}

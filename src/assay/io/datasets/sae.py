"""Autoencoders that others trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Never

from kedro.io import AbstractDataset, DatasetError

from assay.io.saes import Settings, StoredSae, hand_made, read_sae
from assay.io.saes.hub import find, is_address


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

    def fingerprint(self) -> str:
        """What it says, hashed: the same for the same autoencoder elsewhere, or saved again."""
        return self.load().fingerprint()

    def _exists(self) -> bool:
        # What is on the Hub, reading it tells, and why it cannot.
        return is_address(self.filepath) or Path(self.filepath).exists()

    def __repr__(self) -> str:
        """The parameter and its path: what is missing is told so, before any work."""
        return ": ".join(filter(None, (self._parameter, self.filepath)))

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self.filepath, "parameter": self._parameter}

"""Codes and metrics as saev's inference left them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Never

from kedro.io import AbstractDataset, DatasetError

from assay.io.codes.saev import CODES_NAME, METRICS_NAME, SaevCodes, read_metrics
from assay.io.datasets.shards import find_shards
from assay.io.sampling import sampled_digest
from assay.io.shards import Shards


class SaevInferenceDataset(AbstractDataset[Never, Any]):
    """What saev's inference left of one of its runs: ``<run>/inference/<shard hash>/``. It is read
    and never written.

    Args:
        run: saev's folder of the run.
        shards: the shards that it was run on, as `ShardsDataset` names them.
        part: ``codes``, a handle on ``token_acts.npz``; or ``metrics``, the NMSE that
            ``metrics.json`` says.
        metadata: for plugins, unused here.

    Examples:
        YAML::

            "layer_23.codes_relu-16k_probe_val":
              type: assay.io.datasets.saev.SaevInferenceDataset
              run: runs/z55bntm1
              shards: data/01_raw/saev/shards/687023f7
              part: codes

        Python::

            token_acts = SaevInferenceDataset(
                run="runs/z55bntm1", shards="data/01_raw/saev/shards/687023f7", part="codes"
            ).load()
    """

    def __init__(
        self,
        *,
        run: str,
        shards: str,
        part: Literal["codes", "metrics"],
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self._run = Path(run)
        self._shards = shards
        self._part = part
        self.metadata = metadata

    @property
    def folder(self) -> Path:
        """Where the inference on these shards lies."""
        return self._run / "inference" / find_shards(self._shards).name

    def load(self) -> SaevCodes | dict[str, float]:
        """A handle on the codes, or the metrics by name.

        Raises:
            DatasetError: the file is missing, or not what saev writes for these shards.
        """
        if self._part == "metrics":
            return read_metrics(self.folder)
        shards = Shards(find_shards(self._shards))
        return SaevCodes(self.folder, shards.n_tokens, shards.d_model)

    def save(self, data: Never) -> None:
        """Refuse: only saev writes here.

        Raises:
            DatasetError: always.
        """
        raise DatasetError(
            f"{self._run}: found {type(data).__name__} to save; the folder is saev's"
        )

    def fingerprint(self) -> str:
        """Name, size and a sample of the file."""
        return f"{self.folder.name} {self._file().stat().st_size} {sampled_digest(self._file())}"

    def _file(self) -> Path:
        return self.folder / (CODES_NAME if self._part == "codes" else METRICS_NAME)

    def _exists(self) -> bool:
        try:
            return self._file().is_file()
        except (FileNotFoundError, ValueError):  # the shards are not there
            return False

    def _describe(self) -> dict[str, Any]:
        return {"run": str(self._run), "shards": self._shards, "part": self._part}

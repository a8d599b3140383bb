"""Codes in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from kedro.io import AbstractDataset

from assay.io.codes import StoredCodes, write_codes
from assay.io.codes.layout import Dtype, SourcedCodes
from assay.io.datasets.shards import find_shards
from assay.io.publish import discard_partials


class CodesDataset(AbstractDataset[SourcedCodes, StoredCodes]):
    """The codes of one shard folder's patches in one encoding and layer: ``<filepath>/<shard
    hash>/<encoding>/<layer>/``.

    Codes of different models or parameters have each a folder of their own inside it, by the first
    16 digits of the ``fingerprint`` of what they were made from. A run sets it (`place`); the
    metadata say it in full, and codes of another are not loaded.

    Args:
        filepath: the folder of all codes.
        shards: ``{"path": ...}``: the shard folder that the codes are of (Kedro makes a ``path``
            absolute).
        encoding: e.g. ``pca-topk-00064``.
        layer: e.g. ``layer_23``.
        batch_size: rows held in memory while writing.
        rows_per_shard: rows per file at the most; what an interrupted run wrote is kept by whole
            files.
        dtype: of the values on disk: float32, float16 or bfloat16.
        fingerprint: of what the codes are made from, hex; None: they lie in the layer's folder
            itself.
        metadata: for plugins, unused here.

    Examples:
        YAML::

            "{layer}.codes_{encoding}_probe_val":
              type: assay.io.datasets.codes.CodesDataset
              filepath: data/07_model_output/inference
              shards: {path: data/01_raw/saev/shards/687023f7}
              encoding: "{encoding}"
              layer: "{layer}"

        Python::

            codes = CodesDataset(
                filepath="data/07_model_output/inference",
                shards={"path": "data/01_raw/saev/shards/687023f7"},
                encoding="pca-topk-00064",
                layer="layer_23",
            ).load()
            for batch in codes.batches(batch_size=4096):
                # values, indices (4096, 64) and error (4096,)
                ...
    """

    def __init__(
        self,
        *,
        filepath: str,
        shards: Mapping[str, str],
        encoding: str,
        layer: str,
        batch_size: int = 4096,
        rows_per_shard: int = 2**18,
        dtype: Dtype = "float32",
        fingerprint: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        if dtype not in get_args(Dtype):
            raise ValueError(f"dtype is {dtype!r}: wanted one of {', '.join(get_args(Dtype))}")
        self._filepath = Path(filepath)
        self._shards = Path(shards["path"])
        self._encoding = encoding
        self._layer = layer
        self._batch_size = batch_size
        self._rows_per_shard = rows_per_shard
        self._dtype: Dtype = dtype
        self._fingerprint = fingerprint
        self.metadata = metadata

    @property
    def dtype(self) -> Dtype:
        """Of the values on disk."""
        return self._dtype

    def place(self, fingerprint: str) -> None:
        """Settle what the codes are made from, and with it their folder."""
        self._fingerprint = fingerprint

    @property
    def folder(self) -> Path:
        """Where the codes lie. Raises FileNotFoundError where the shards do not, ValueError where
        several do.
        """
        shards = find_shards(self._shards).resolve()  # two links may have one name
        layer = self._filepath / shards.name / self._encoding / self._layer
        return layer if self._fingerprint is None else layer / self._fingerprint[:16]

    def load(self) -> StoredCodes:
        """A handle on the codes, which reads when it is iterated.

        Raises:
            DatasetError: they are not there, not whole, or of another fingerprint.
        """
        return self._open()

    def save(self, data: SourcedCodes) -> None:
        """Compute the codes batch by batch and stream them to the folder, going on with what an
        interrupted run wrote of the same codes.

        Raises:
            DatasetError: they do not fit on the disk or into the dtype, or another process writes
                them.
        """
        about = {} if self._fingerprint is None else {"fingerprint": self._fingerprint}
        write_codes(
            self.folder,
            data,
            batch_size=self._batch_size,
            rows_per_shard=self._rows_per_shard,
            dtype=self._dtype,
            about=about,
        )

    def fingerprint(self) -> str:
        """What the codes are: SHA-256 of their metadata and of their index, which holds that of
        every file.
        """
        digest = hashlib.sha256()
        for name in ("metadata.json", "shards.json"):
            digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()

    def forget_begun(self) -> None:
        """Remove what an interrupted run began of these codes, so that saving them starts anew."""
        # There may be no shards yet, and then nothing was begun of their codes.
        with suppress(FileNotFoundError):
            discard_partials(self.folder)

    def _open(self) -> StoredCodes:
        codes = StoredCodes(self.folder)
        found = codes.provenance.get("fingerprint")
        if found != self._fingerprint:
            raise ValueError(
                f"{self.folder} holds codes of fingerprint {found}, wanted {self._fingerprint}:"
                " they were made from another model or other parameters; remove the folder, and"
                " the next run makes it again"
            )
        return codes

    def _exists(self) -> bool:
        try:
            # load() would raise Kedro's DatasetError for whatever went wrong
            return self._open().dtype == self._dtype
        except (FileNotFoundError, ValueError):
            return False

    def _describe(self) -> dict[str, Any]:
        return {
            "filepath": str(self._filepath),
            "shards": str(self._shards),
            "encoding": self._encoding,
            "layer": self._layer,
            "dtype": self._dtype,
            "fingerprint": self._fingerprint,
        }

"""Vision transformers in the catalog."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Never

from kedro.io import AbstractDataset, DatasetError

from assay.backbones.opening import BackboneHandle


class BackboneDataset(AbstractDataset[Never, BackboneHandle]):
    """A vision transformer whose activations are recorded. Loading gives a handle that loads the
    weights when it is asked for them. It is read and never written.

    Args:
        model: a folder that transformers saved, `owner/name` or `hf:owner/name[@revision]` of the
            Hub, `timm:NAME`, or `python:package.module:function`.
        revision: branch, tag or commit on the Hub; None: the default branch.
        parameter: that names it, for messages.
        metadata: for plugins, unused here.

    Examples:
        YAML::

            backbone:
              type: assay.backbones.dataset.BackboneDataset
              model: facebook/dinov2-with-registers-base

        Python::

            handle = BackboneDataset(model="facebook/dinov2-with-registers-base").load()
            backbone = handle.open(device=torch.device("cuda"), precision="float32")
    """

    def __init__(
        self,
        *,
        model: str,
        revision: str | None = None,
        parameter: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self._handle = BackboneHandle(model, revision)
        self._parameter = parameter
        self.metadata = metadata

    def load(self) -> BackboneHandle:
        """A handle on the model: no file is read yet."""
        return self._handle

    def save(self, data: Never) -> None:
        """Refuse: models are made elsewhere.

        Raises:
            DatasetError: always.
        """
        raise DatasetError(
            f"{self._handle.model}: found {type(data).__name__} to save; the model is only read"
        )

    def fingerprint(self) -> str:
        """A hash of what the activations depend on besides the images: the library, its version
        and the model's files.

        Raises:
            FileNotFoundError: the model is neither there nor to be fetched.
            ValueError: it cannot be read.
        """
        try:
            identity = self._handle.description.identity
        except (FileNotFoundError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(": ".join(filter(None, (self._parameter, str(error))))) from error
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def _exists(self) -> bool:
        # What is no path, reading it tells, and why it cannot.
        model = self._handle.model
        return not model.startswith(("/", ".", "~")) or Path(model).is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"model": self._handle.model, "revision": self._handle.revision}

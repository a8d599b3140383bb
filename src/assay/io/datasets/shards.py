"""Folders of shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from kedro.io import AbstractDataset
from torch import Tensor

from assay.io.files import METADATA_NAME
from assay.io.publish import publishing_folder
from assay.io.shards import Shards, write_shards
from assay.io.shards.metadata import Metadata
from assay.io.shards.recording import Source, forget_recording, record_shards, refuse_others


class Recording(Protocol):
    """Activations to be written."""

    @property
    def metadata(self) -> dict[str, Any]:
        """What metadata.json is to say, under the protocol's names."""

    @property
    def examples(self) -> Iterator[Tensor]:
        """A fresh pass over the activations, float32 batches (n, n_layers, tokens, d_model)."""

    @property
    def labels(self) -> npt.NDArray[np.uint8]:
        """Patch labels, (n_examples, patches)."""


def find_shards(path: str | Path) -> Path:
    """The shard folder at ``path``: the folder itself, or the only one inside it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.
    """
    path = Path(path)
    if (path / METADATA_NAME).exists():
        return path
    found = sorted(
        child.parent
        for child in path.glob(f"*/{METADATA_NAME}")
        if not child.parent.name.startswith(".")
    )
    if not found:
        raise FileNotFoundError(
            f"{path}: no shard folder (none with a {METADATA_NAME}) here or one level down; correct"
            " the path"
        )
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise ValueError(f"{path} holds {len(found)} shard folders ({names}): name one of them")
    return found[0]


class ShardsDataset(AbstractDataset[Recording | Source, Shards]):
    """A folder of saev activation shards. Loading gives a handle that reads when it is iterated,
    never the array.

    Saving streams a recording into ``<filepath>/<hash>/`` and then replaces ``<filepath>`` whole,
    so it wants a folder of its own, as the embedded default has, and refuses one that holds more
    than an older recording; shards that saev wrote are only read.

    Args:
        filepath: a shard folder, or a folder that holds exactly one.
        threads: that read ahead, as `Shards` has them.
        metadata: for plugins, unused here.

    Attributes:
        threads: as given.

    Examples:
        YAML::

            shards_fit:
              type: assay.io.datasets.shards.ShardsDataset
              filepath: data/01_raw/saev/shards/08e569e2

        Python::

            shards = ShardsDataset(filepath="data/01_raw/saev/shards/08e569e2").load()
            for tokens in shards.batches(layer=23, batch_size=8192):  # float32 (8192, d_model)
                ...
    """

    def __init__(
        self,
        *,
        filepath: str,
        threads: int | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self._filepath = Path(filepath)
        self.threads = threads
        self.metadata = metadata

    def load(self) -> Shards:
        """A handle on the folder, which reads when it is iterated.

        Raises:
            DatasetError: there is no shard folder or more than one, or its JSON files are not as
                the protocol has them.
        """
        return self._open()

    def save(self, data: Recording | Source) -> None:
        """Record the activations batch by batch, and replace the folder by them whole.

        What is a `Source` is recorded shard by shard, and goes on where it was broken off; one that
        is there already is not made again.

        Raises:
            DatasetError: the folder holds more than an older recording, the recording is not as its
                metadata say, or the disk has no room for it.
        """
        if isinstance(data, Source):
            record_shards(self._filepath, data)
            return
        metadata = Metadata.model_validate(data.metadata)
        refuse_others(self._filepath)
        with publishing_folder(self._filepath, replace=True) as folder:
            write_shards(folder, metadata, data.examples, data.labels)

    def fingerprint(self) -> str:
        """What the shards are, hashed from names, sizes and the JSON files."""
        return self.load().fingerprint()

    def forget_begun(self) -> None:
        """Have saving start anew, whatever an interrupted run began or an older one recorded."""
        forget_recording(self._filepath)

    def _open(self) -> Shards:
        return Shards(find_shards(self._filepath), threads=self.threads)

    def _exists(self) -> bool:
        try:
            self._open()  # load() would raise Kedro's DatasetError for whatever went wrong
        except (FileNotFoundError, ValueError):
            return False
        return True

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}

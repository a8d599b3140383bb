"""Folders of images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from kedro.io import AbstractDataset

from assay.io.images import ImageLayout, Images, write_images
from assay.io.publish import publishing_folder


class ImagesDataset(AbstractDataset[npt.NDArray[np.uint8], Images]):
    """The images behind a shard folder, in a folder of their own. Loading gives a handle that reads
    one when it is asked for.

    Saving writes gray images, uint8 (n, height, width), as PNG files and replaces the folder whole.

    Args:
        filepath: the folder.
        layout: which files, and how they lie on the patches: the arguments of
            `assay.io.images.ImageLayout`.
        metadata: for plugins, unused here.

    Examples:
        YAML::

            images_probe_val:
              type: assay.io.datasets.images.ImagesDataset
              filepath: ADEChallengeData2016/images/validation
              layout: {patch_size: 16, resize: 256, crop: true}

        Python::

            images = ImagesDataset(
                filepath="ADEChallengeData2016/images/validation",
                layout={"patch_size": 16, "resize": 256, "crop": True},
            ).load()
            image = images.read(7, n_patches=256)  # uint8 (256, 256, 3)
    """

    def __init__(
        self, *, filepath: str, layout: Mapping[str, Any], metadata: dict[str, Any] | None = None
    ) -> None:
        self._filepath = Path(filepath)
        self._layout = ImageLayout.model_validate(layout)
        self.metadata = metadata

    def load(self) -> Images:
        """A handle on the images, which reads one when it is asked for.

        Raises:
            DatasetError: the folder, the list of its files or one of them is missing.
        """
        return self._open()

    def save(self, data: npt.NDArray[np.uint8]) -> None:
        """Write gray images, uint8 (n, height, width), as PNG files, and replace the folder by them
        whole.
        """
        with publishing_folder(self._filepath, replace=True) as folder:
            write_images(folder, data)

    def fingerprint(self) -> str:
        """A hash of file names, sizes, sampled content and the layout."""
        return self.load().fingerprint()

    def _open(self) -> Images:
        return Images(self._filepath, self._layout)

    def _exists(self) -> bool:
        try:
            # load() would raise Kedro's DatasetError for whatever went wrong
            return len(self._open()) > 0
        except (FileNotFoundError, ValueError):
            return False

    def _describe(self) -> dict[str, Any]:
        return {
            "filepath": str(self._filepath),
            "layout": self._layout.model_dump(mode="json", exclude_none=True),
        }

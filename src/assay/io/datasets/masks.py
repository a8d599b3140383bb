"""Folders of segmentation masks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Never

from kedro.io import AbstractDataset, DatasetError

from assay.io.datasets.images import ImagesDataset
from assay.io.images.masks import MaskLayout
from assay.io.shards.labels import ImageMasks


class MasksDataset(AbstractDataset[Never, ImageMasks]):
    """The masks of a folder of images, in a folder of their own. Loading gives a handle that labels
    the patches of one when it is asked to. They are only read.

    Args:
        filepath: the folder.
        layout: what their ids mean, and how they lie on the patches: the arguments of
            `assay.io.images.masks.MaskLayout`.
        images: the arguments of the `ImagesDataset` that they are of.
        metadata: for plugins, unused here.

    Examples:
        YAML::

            extract_masks_probe_val:
              type: assay.io.datasets.masks.MasksDataset
              filepath: ADEChallengeData2016/annotations/validation
              layout: {patch_size: 16, geometry: aspect}
              images:
                filepath: ADEChallengeData2016/images/validation
                layout: {patch_size: 16, geometry: aspect, pattern: null}

        Python::

            place = {"patch_size": 16, "geometry": "aspect"}
            masks = MasksDataset(
                filepath="ADEChallengeData2016/annotations/validation",
                layout=place,
                images={
                    "filepath": "ADEChallengeData2016/images/validation",
                    "layout": {**place, "pattern": None},
                },
            ).load()
            labels = masks.label(7, n_patches=256)  # uint16 (256,)
    """

    def __init__(
        self,
        *,
        filepath: str,
        layout: Mapping[str, Any],
        images: Mapping[str, Any],
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self._filepath = Path(filepath)
        self._layout = MaskLayout.model_validate(layout)
        self._images = ImagesDataset(**images)
        self.metadata = metadata

    def load(self) -> ImageMasks:
        """A handle on the masks, which reads one when it is asked for.

        Raises:
            DatasetError: the folder or a mask is missing.
        """
        return self._open()

    def save(self, data: Never) -> None:
        """Refuse: masks are made elsewhere.

        Raises:
            DatasetError: always.
        """
        raise DatasetError(
            f"{self._filepath}: found {type(data).__name__} to save; masks are only read"
        )

    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) of every mask's name, size and a sample of its content, and of
        the layout.
        """
        return self.load().fingerprint()

    def _open(self) -> ImageMasks:
        return ImageMasks(self._filepath, self._layout, self._images._open())

    def _exists(self) -> bool:
        try:
            self._open()  # load() would raise Kedro's DatasetError for whatever went wrong
        except (FileNotFoundError, ValueError):
            return False
        return True

    def _describe(self) -> dict[str, Any]:
        return {
            "filepath": str(self._filepath),
            "layout": self._layout.model_dump(mode="json", exclude_none=True),
            "images": self._images._describe(),
        }

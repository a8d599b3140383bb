"""One folder of images, recorded without a project."""

from __future__ import annotations

from pathlib import Path

from assay.backbones import look
from assay.backbones.dataset import BackboneDataset
from assay.io.datasets import find_shards
from assay.io.images import ImageLayout, Images
from assay.io.images.masks import MaskLayout
from assay.io.shards import Shards
from assay.io.shards.labels import ImageMasks
from assay.io.shards.metadata import Metadata
from assay.io.shards.provenance import Provenance
from assay.io.shards.recording import forget_recording, is_recorded, record_shards
from assay.parameters import FolderParameters
from assay.pipelines.extract.geometry import check_recording, image_layout, mask_layout
from assay.pipelines.extract.nodes import record_images


class FolderRecording:
    """A folder of images, and how it is recorded into another.

    Args:
        folder: the images, the model and how.
        out: a folder of its own, which comes to hold ``<hash>/``.
        device: that the model runs on, by its name.

    Raises:
        FileNotFoundError: the model, the images or a mask is missing.
        ValueError: the model is not understood, or the images cannot be recorded by it so.
    """

    def __init__(self, folder: FolderParameters, out: Path, device: str) -> None:
        model = look(folder.model, folder.revision)
        check_recording(folder, model, folder.layers)
        image = ImageLayout.model_validate(image_layout(folder, model, folder, Path()))
        self._images = Images(Path(folder.images), image)
        if not len(self._images):
            raise ValueError(f"{folder.images} holds no image: correct the path, pattern or names")
        self._masks = None
        if folder.masks is not None:
            mask = MaskLayout.model_validate(mask_layout(folder, model, folder))
            self._masks = ImageMasks(Path(folder.masks), mask, self._images)
        self._out = out
        self._recording = record_images(
            BackboneDataset(model=folder.model, revision=folder.revision).load(),
            self._images,
            device,
            self._masks,
            layers=folder.layers,
            how=folder,
        )

    @property
    def metadata(self) -> Metadata:
        """What the shards are of."""
        return self._recording.metadata

    def is_there(self, *, force: bool) -> bool:
        """Whether these images are recorded already, by this model and so.

        Raises:
            ValueError: the place holds shards that were not made by `assay extract`, or, but with
                ``force``, that are another recording.
        """
        try:
            shards = Shards(find_shards(self._out))
        except FileNotFoundError:
            return False
        said = shards.metadata
        if shards.path == self._out or Provenance.parse(said.data) is None:
            raise ValueError(
                f"{self._out} holds shards that this cannot replace ({said.family} {said.ckpt}):"
                " name a folder of its own"
            )
        if _settings(said) != _settings(self.metadata) and not force:
            raise ValueError(
                f"{self._out} holds another recording, {shards.path.name}: name another folder, or"
                " --force to replace it"
            )
        return is_recorded(self._out, self._recording)

    def record(self, *, force: bool) -> Path:
        """Record what is not there yet, or with ``force`` all of it, and give the folder of the
        shards.
        """
        if force:
            forget_recording(self._out)
        return record_shards(self._out, self._recording)


def _settings(metadata: Metadata) -> tuple[Metadata, Provenance | None]:
    """What is recorded and how, but for the files' content and what masks mean."""
    said = Provenance.parse(metadata.data)
    if said is not None:
        files = said.images.model_copy(update={"sha256": ""})
        said = said.model_copy(update={"images": files, "masks": None})
    return metadata.model_copy(update={"data": ""}), said

"""A split's images, shown to a vision transformer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from assay.backbones import Backbone, BackboneHandle, Description, Precision
from assay.io.images import Images
from assay.io.shards.labels import ImageMasks
from assay.parameters import RecordingParameters
from assay.pipelines.extract.geometry import find_grid
from assay.pipelines.extract.recording import ImageRecording
from assay.pipelines.stream import pick_device


def record_images(
    model: BackboneHandle,
    images: Images,
    device: str,
    masks: ImageMasks | None = None,
    *,
    layers: tuple[int, ...],
    how: RecordingParameters,
) -> ImageRecording:
    """A recording of the residual stream after some blocks, which is made as it is saved; with the
    patches' labels where there are masks.

    Args:
        model: whose weights are loaded when there is something to record.
        images: that it is shown.
        device: the name of where it computes.
        masks: of the images.
        layers: block numbers, from 0.
        how: everything else.

    Raises:
        ValueError: the images cannot lie on the model's patches so, or there is no such device.
    """
    found = pick_device(device)
    return ImageRecording(
        images,
        masks,
        _OpenedWhenNeeded(model, found, how.precision),
        layers=layers,
        n_patches=prod(find_grid(how, model.description)),
        batch_size=how.batch_size,
        max_tokens_per_shard=how.max_tokens_per_shard,
        cls_token=how.cls_token,
        # However the folder is named, and from wherever: the same images are the same recording.
        dataset=str(images.folder.resolve()),
        precision=how.precision,
        device=found.type,
    )


class _OpenedWhenNeeded:
    """A backbone whose weights, and library, are loaded with the first images."""

    def __init__(self, model: BackboneHandle, device: torch.device, precision: Precision) -> None:
        self._model = model
        self._device = device
        self._precision = precision

    @property
    def description(self) -> Description:
        """What it is."""
        return self._model.description

    def record(self, images: Tensor, layers: Sequence[int]) -> Tensor:
        """See `Backbone`."""
        return self._opened.record(images, layers)

    @functools.cached_property
    def _opened(self) -> Backbone:
        return self._model.open(device=self._device, precision=self._precision)

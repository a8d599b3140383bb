"""A folder of images as a source of shards: decoded, resized and labeled by threads ahead of the
model, in batches that depend on their shard's files alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError
from torch import Tensor

from assay.backbones import Backbone
from assay.io.images import Images
from assay.io.shards.labels import ImageMasks
from assay.io.shards.metadata import OWN_VOTE, Metadata, explain
from assay.io.shards.provenance import (
    Provenance,
    RecordedFiles,
    RecordedGeometry,
    RecordedMasks,
)
from assay.io.shards.recording import ImageBatch
from assay.pipelines.signs_of_life import Bar
from assay.pipelines.stopping import stop_if_asked

FORMAT = 1
"""Raised whenever the same files and model would give other batches: what an older version began is
not gone on with.
"""

FILES = {"images", "masks", "examples", "seed"}
"""What provenance says of the files, of which each shard has its part."""

AHEAD = 2
"""Batches that are decoded ahead of the model, at the least."""

Labels = npt.NDArray[np.uint16]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Read:
    """A batch that the model is to see: uint8 (n, height, width, 3), in pinned memory where there
    is a GPU.
    """

    examples: list[int]
    images: Tensor
    labels: Labels | None


class ImageRecording:
    """The activations of a folder of images, for `assay.io.shards.recording.record_shards`.

    A batch holds images of one size and one shard: the shard's images by their grids, in the order
    in which the grids come first, and then by their numbers. So whoever goes on with a recording
    makes the same batches. Memory does not grow with the folder.

    Args:
        images: what is shown to the model.
        masks: what the patches are labeled from; None: they are not.
        backbone: the model.
        layers: numbers of the blocks, in the order of the layer axis.
        n_patches: patches of an image.
        batch_size: images that the model sees at once, at the most.
        max_tokens_per_shard: the budget of a shard in tokens, counted over all layers.
        cls_token: whether the CLS token is kept, where the model has one.
        dataset: what metadata.json calls the images.
        precision: of the model, as metadata.json is to say it.
        device: the kind of device that the model computes on: a recording that was begun on another
            is not gone on with.
        threads: that decode, resize and label; None: half of the cores.
    """

    def __init__(
        self,
        images: Images,
        masks: ImageMasks | None,
        backbone: Backbone,
        *,
        layers: Sequence[int],
        n_patches: int,
        batch_size: int,
        max_tokens_per_shard: int,
        cls_token: bool,
        dataset: str,
        precision: str,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        self._images = images
        self._masks = masks
        self._backbone = backbone
        self._layers = tuple(layers)
        self._n_patches = n_patches
        self._batch_size = batch_size
        self._max_tokens_per_shard = max_tokens_per_shard
        self._cls_token = cls_token
        self._dataset = dataset
        self._precision = precision
        self._device = device
        self._threads = threads or default_threads()

    @functools.cached_property
    def metadata(self) -> Metadata:
        """What metadata.json is to say.

        Raises:
            ValueError: a shard has no room for one image.
        """
        description = self._backbone.description
        try:
            return Metadata(
                family=description.family,
                ckpt=description.ckpt,
                layers=self._layers,
                content_tokens_per_example=self._n_patches,
                cls_token=description.cls_token and self._cls_token,
                d_model=description.d_model,
                n_examples=len(self._images),
                max_tokens_per_shard=self._max_tokens_per_shard,
                data=self._provenance.to_text(),
                dataset=self._dataset,
                pixel_agg=OWN_VOTE,
                dtype="float32",
                protocol="2.1",
            )
        except ValidationError as error:
            raise ValueError(
                f"{self._images.folder} cannot be recorded: {explain(error)}"
            ) from None

    @property
    def labeled(self) -> bool:
        """Whether there are masks."""
        return self._masks is not None

    @property
    def key(self) -> str:
        """What activations and labels depend on beside the files, as JSON."""
        masks = self._masks
        said = self._provenance.model_dump(mode="json", exclude=FILES)
        labels = None if masks is None else masks.layout.model_dump(mode="json")
        return json.dumps([FORMAT, said, labels, self._device], sort_keys=True)

    def digest(self, first: int, stop: int) -> str:
        """SHA-256 (64 hex digits) of the places, sizes and times of some examples' images and
        masks: a file of the same name elsewhere, or one that was touched, is another.
        """
        paths = [
            path
            for files in (self._images, self._masks)
            if files is not None
            for path in files.paths[first:stop]
        ]
        statuses = ((os.path.realpath(path), os.stat(path)) for path in paths)
        said = [(place, status.st_size, status.st_mtime_ns) for place, status in statuses]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def name(self, example: int) -> str:
        """The path of an image."""
        return str(self._images.paths[example])

    def batches(self, spans: Sequence[tuple[int, int]]) -> Generator[ImageBatch]:
        """The images of each span (first, stop), recorded, under a progress bar.

        Raises:
            ValueError, OSError: an image or a mask is damaged or missing, or is not as the layout
                has it; the message names the file.
            KeyboardInterrupt: the run is asked to stop.
        """
        todo = sum(stop - first for first, stop in spans)
        n = self.metadata.n_examples
        with (
            Bar(desc="recording", total=n, initial=n - todo, unit=" images") as bar,
            closing(self._read_ahead(spans)) as read,
            closing(_fetched(self._record(read))) as recorded,
        ):
            for batch in recorded:
                yield batch
                bar.update(len(batch.examples))
                stop_if_asked()

    def _record(self, read: Iterable[_Read]) -> Iterator[tuple[_Read, Tensor]]:
        model, n = self._backbone.description, self._n_patches
        for batch in read:
            activations = self._backbone.record(batch.images, self._layers)
            found, wanted = (
                tuple(activations.shape),
                (len(batch.examples), len(self._layers), n + model.cls_token, model.d_model),
            )
            if found != wanted:
                raise ValueError(
                    f"{model.ckpt} gave {found} for images {tuple(batch.images.shape)}, wanted"
                    f" {wanted}: images, layers, tokens{' with CLS' * model.cls_token} and"
                    " dimensions; the grid or the model's description is not the model's"
                )
            yield batch, activations if self.metadata.cls_token else activations[:, :, -n:]

    def _read_ahead(self, spans: Sequence[tuple[int, int]]) -> Generator[_Read]:
        """The batches, read by threads: some ahead, whatever the shards' ends."""
        ahead = max(AHEAD, -(-2 * self._threads // self._batch_size))
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="assay-decode")
        reading: deque[tuple[list[int], list[Future[tuple[Pixels, Labels | None]]]]] = deque()
        failure: Exception | None = None
        planned = self._planned(pool, spans)
        try:
            while True:
                try:
                    examples = next(planned, None)
                except Exception as error:  # raised below, after the batches before it
                    failure = error
                    break
                if examples is None:
                    break
                reading.append((examples, [pool.submit(self._read, each) for each in examples]))
                if len(reading) > ahead:
                    yield _collect(*reading.popleft())
            while reading:
                yield _collect(*reading.popleft())
            if failure is not None:
                raise failure
        finally:
            pool.shutdown(cancel_futures=True)

    def _planned(
        self, pool: ThreadPoolExecutor, spans: Sequence[tuple[int, int]]
    ) -> Iterator[list[int]]:
        """The examples of each batch. The headers that decide about it are read a shard ahead."""
        plans: deque[Future[list[list[int]]]] = deque()
        for first, stop in spans:
            plans.append(pool.submit(self._plan, first, stop))
            if len(plans) > 1:
                yield from plans.popleft().result()
        while plans:
            yield from plans.popleft().result()

    def _plan(self, first: int, stop: int) -> list[list[int]]:
        by_grid: dict[tuple[int, int] | None, list[int]] = {}
        for example in range(first, stop):
            by_grid.setdefault(self._grid(example), []).append(example)
        size = self._batch_size
        return [
            examples[start : start + size]
            for examples in by_grid.values()
            for start in range(0, len(examples), size)
        ]

    def _grid(self, example: int) -> tuple[int, int] | None:
        """(rows, columns) of an image's patches; None where all have the same."""
        layout = self._images.layout
        if layout.geometry != "aspect":
            return None
        return layout.place(self._images.shape(example), self._n_patches).grid

    def _read(self, example: int) -> tuple[Pixels, Labels | None]:
        labels = None if self._masks is None else self._masks.label(example, self._n_patches)
        return self._images.read(example, self._n_patches), labels

    @functools.cached_property
    def _provenance(self) -> Provenance:
        images, masks, layout = self._images, self._masks, self._images.layout
        return Provenance(
            model=self._backbone.description.identity,
            geometry=RecordedGeometry(
                patch_size=layout.patch_size,
                n_patches=self._n_patches,
                grid=layout.grid_of(self._n_patches),
                geometry=layout.geometry,
                resize=layout.resize,
                resample=layout.resample,
            ),
            precision=self._precision,
            batch_size=self._batch_size,
            images=RecordedFiles.of(images.folder, images.paths),
            masks=None
            if masks is None
            else RecordedMasks.labeled(masks.folder, masks.paths, masks.layout),
            examples=layout.examples,
            seed=None if layout.examples is None else layout.seed,
        )


def default_threads() -> int:
    """Threads that decode where nobody says how many: half of the cores that the process may use,
    and two at the least.
    """
    return max(2, len(os.sched_getaffinity(0)) // 2)


def _collect(examples: list[int], reading: list[Future[tuple[Pixels, Labels | None]]]) -> _Read:
    """A batch of what the threads have read, which is waited for."""
    read = [each.result() for each in reading]
    images = torch.empty(
        (len(read), *read[0][0].shape), dtype=torch.uint8, pin_memory=torch.cuda.is_available()
    )
    np.stack([pixels for pixels, _ in read], out=images.numpy())
    labels = [each for _, each in read if each is not None]
    return _Read(examples, images, np.stack(labels) if labels else None)


def _fetched(recorded: Iterator[tuple[_Read, Tensor]]) -> Generator[ImageBatch]:
    """The batches in the host's memory. A GPU's are copied by a stream of their own, while the
    model works on the next.
    """
    copies: deque[tuple[ImageBatch, torch.cuda.Event]] = deque()
    for read, activations in recorded:
        if not activations.is_cuda:
            yield ImageBatch(read.examples, activations, read.labels)
            continue
        copies.append(_copy(read, activations))
        if len(copies) > 1:
            yield _arrived(*copies.popleft())
    while copies:
        yield _arrived(*copies.popleft())


@functools.cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _copy(read: _Read, activations: Tensor) -> tuple[ImageBatch, torch.cuda.Event]:
    stream = _copying(activations.device)
    host = torch.empty(activations.shape, dtype=activations.dtype, pin_memory=True)
    stream.wait_event(torch.cuda.current_stream(activations.device).record_event())
    with torch.cuda.stream(stream):
        host.copy_(activations, non_blocking=True)
        # Its memory must not be used again before it is copied.
        activations.record_stream(stream)
        return ImageBatch(read.examples, host, read.labels), stream.record_event()


def _arrived(batch: ImageBatch, done: torch.cuda.Event) -> ImageBatch:
    done.synchronize()
    return batch

"""What is recorded here from images: the model, the files and the places, and whether they go
together, which is said before any work.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset

from assay.backbones import Description, look
from assay.backbones.dataset import BackboneDataset
from assay.io.copies import find_copies
from assay.io.datasets import ImagesDataset, MasksDataset, find_shards
from assay.io.images import ImageLayout, Images
from assay.io.images.masks import MaskLayout
from assay.io.publish import existing, free_bytes
from assay.io.shards import Shards
from assay.io.shards.labels import ImageMasks
from assay.io.shards.provenance import Provenance, RecordedGeometry
from assay.io.strict_json import shown
from assay.parameters import LabeledImagesToRecord, Parameters
from assay.pipelines.extract.geometry import check_recording, find_grid, image_layout, mask_layout

logger = logging.getLogger(__name__)

MOST_COPIES = 3
"""Pairs of equal files that a warning names."""

MOST_TOLD = 5
"""Of what is another between two recordings, that a message names."""

LONGEST = 80
"""Characters of a name or value that a file says, in a message."""


@dataclass(frozen=True)
class MadeOf:
    """What splits must have in common that Assay records: the model's identity, the geometry and
    the precision of the forward pass.
    """

    model: dict[str, str]
    geometry: RecordedGeometry
    precision: str

    @classmethod
    def parse(cls, data: str) -> MadeOf | None:
        """What shards say of it; None where Assay did not record them."""
        said = Provenance.parse(data)
        return None if said is None else cls(said.model, said.geometry, said.precision)

    def differs(self, other: MadeOf) -> str | None:
        """What is another in them, in words, which a terminal can print; None: nothing."""
        for what, mine, others in (
            ("model or revision", self.model, other.model),
            ("geometry", self.geometry.model_dump(), other.geometry.model_dump()),
        ):
            apart = [
                f"{shown(name[:LONGEST])} {_clipped(mine, name)} and {_clipped(others, name)}"
                for name in sorted(mine.keys() | others.keys())
                if mine.get(name) != others.get(name)
            ]
            if apart:
                more = "; ..." if len(apart) > MOST_TOLD else ""
                return f"another {what} ({', '.join(apart[:MOST_TOLD])}{more})"
        if self.precision != other.precision:
            one, another = (shown(each.precision[:LONGEST]) for each in (self, other))
            return f"another precision ({one} and {another})"
        return None


@dataclass(frozen=True)
class Extraction:
    """The recordings that the parameters ask for. Nothing is opened before it is asked for."""

    parameters: Parameters
    project: Path

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are recorded here."""
        return self.parameters.extract.splits

    @property
    def address(self) -> str:
        """The model as it is looked for: a folder, relative to the project, or as it is typed."""
        typed = self.parameters.extract.model
        assert typed is not None
        folder = self.project / typed
        return str(folder) if folder.is_dir() else typed

    @property
    def model(self) -> Description:
        """What the model's files say of it.

        Raises:
            ValueError, FileNotFoundError: they are not there, or not understood.
        """
        with _naming("extract.model"):
            return look(self.address, self.parameters.extract.revision)

    @property
    def n_patches(self) -> int:
        """Patches of an image; raises ValueError where the grid does not go with the model."""
        model = self.model
        with _naming("extract"):
            return prod(find_grid(self.parameters.extract.recording, model))

    def place(self, split: str) -> Path:
        """Where a split's shards are."""
        path: str = getattr(self.parameters.shards, split)
        return self.project / path

    def images(self, split: str) -> tuple[Path, dict[str, Any]]:
        """The folder of a split's images, and the arguments of their `ImageLayout`."""
        extract, model = self.parameters.extract, self.model
        wanted = extract.split(split)
        assert wanted.images is not None
        with _naming("extract"):
            layout = image_layout(extract.recording, model, wanted, self.project)
        return self.project / wanted.images, layout

    def masks(self, split: str) -> tuple[Path, dict[str, Any]]:
        """The folder of a probe split's masks, and the arguments of their `MaskLayout`."""
        extract, model = self.parameters.extract, self.model
        wanted = extract.split(split)
        assert isinstance(wanted, LabeledImagesToRecord) and wanted.masks is not None
        with _naming("extract"):
            layout = mask_layout(extract.recording, model, extract.labels)
        return self.project / wanted.masks, layout

    def datasets(self) -> dict[str, AbstractDataset[Any, Any]]:
        """What the nodes read, by the names in the catalog."""
        found: dict[str, AbstractDataset[Any, Any]] = {}
        if self.splits:
            found["extract_model"] = BackboneDataset(
                model=self.address, revision=self.parameters.extract.revision
            )
        for split in self.splits:
            folder, layout = self.images(split)
            images: dict[str, Any] = {"filepath": str(folder), "layout": layout}
            found[f"extract_images_{split}"] = ImagesDataset(**images)
            if split.startswith("probe"):
                folder, layout = self.masks(split)
                found[f"extract_masks_{split}"] = MasksDataset(
                    filepath=str(folder), layout=layout, images=images
                )
        return found

    def layers(self, split: str) -> tuple[int, ...]:
        """The layers that a split is recorded at: those that are wanted; or those that its
        recording holds, where it was made so and holds all of them and more.
        """
        wanted = tuple(sorted(self.parameters.layers))
        extract = self.parameters.extract
        try:
            shards = Shards(find_shards(self.place(split)))
            said = Provenance.parse(shards.metadata.data)
            same = (
                said is not None
                and MadeOf(said.model, said.geometry, said.precision) == self.made_of(split)
                and said.batch_size == extract.batch_size
            )
        except (FileNotFoundError, ValueError):
            return wanted
        return shards.layers if same and set(wanted) <= set(shards.layers) else wanted

    def made_of(self, split: str) -> MadeOf:
        """What the shards of a split will say of how they were made."""
        _, layout = self.images(split)
        said = {name: layout[name] for name in RecordedGeometry.model_fields if name in layout}
        geometry = RecordedGeometry.model_validate(said | {"n_patches": self.n_patches})
        return MadeOf(self.model.identity, geometry, self.parameters.extract.precision)

    def n_bytes(self, split: str, n_examples: int) -> int:
        """What the shards of so many images take on the disk while they are recorded."""
        tokens = self.n_patches + (self.model.cls_token and self.parameters.extract.cls_token)
        activations = len(self.layers(split)) * tokens * self.model.d_model * 4
        labels = 4 * self.n_patches if split.startswith("probe") else 0
        return n_examples * (activations + labels)


def check_extraction(parameters: Parameters, project: Path) -> dict[str, int]:
    """Check that what is to be recorded can be: places, model, layers, grid, files.

    Returns:
        How many images each split has that is recorded here.

    Raises:
        FileNotFoundError: the model, a folder, an image of a list or a mask is missing.
        ValueError: two splits have one place, or one is somebody else's; the model is not
            understood, or has no such layer; images do not go with its patches.
    """
    extraction = Extraction(parameters, project)
    if not extraction.splits:
        return {}
    _check_places(extraction)
    if "probe_val" in extraction.splits and parameters.images.path is not None:
        raise ValueError(
            f"images.path is {parameters.images.path}, and shards.probe_val is recorded from"
            f" {parameters.extract.probe_val.images}, whose images the gallery shows: say"
            " images.path:null"
        )
    model = extraction.model
    with _naming("extract"):
        check_recording(parameters.extract.recording, model, parameters.layers)
    return {split: _check_files(extraction, split) for split in extraction.splits}


def check_room(parameters: Parameters, project: Path, splits: Collection[str]) -> None:
    """Check, once it is known which splits are to be recorded, that the disks hold them all, and
    warn of images that are in both of the probes' splits.

    Raises:
        ValueError: a disk is too small.
    """
    extraction = Extraction(parameters, project)
    images = {split: Images(*_opened(*extraction.images(split))) for split in extraction.splits}
    wanted: dict[int, int] = {}
    free: dict[int, int] = {}
    for split in splits:
        place = extraction.place(split)
        disk = os.stat(existing(place)).st_dev
        wanted[disk] = wanted.get(disk, 0) + extraction.n_bytes(split, len(images[split]))
        # What was begun is gone on with, or removed.
        free.setdefault(disk, free_bytes(place))
        free[disk] += _begun_bytes(place)
    for disk, n_bytes in wanted.items():
        if n_bytes > free[disk]:
            raise ValueError(
                f"extract: the shards of {', '.join(splits)} take {n_bytes / 1e9:.3g} GB,"
                f" {free[disk] / 1e9:.3g} GB are free: record fewer examples"
                " (extract.<split>.examples) or fewer layers, or name places on another disk"
                " (shards.<split>)"
            )
    probes = [images[split] for split in ("probe_train", "probe_val") if split in images]
    if len(probes) == 2 and any(split.startswith("probe") for split in splits):
        _warn_of_copies(*probes)


def _clipped(said: Mapping[str, object], name: str) -> str:
    """A value that files say, for a message."""
    return shown(str(said.get(name))[:LONGEST])


@contextmanager
def _naming(parameter: str) -> Iterator[None]:
    """Have what is wrong begin with the parameter that it is about."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{parameter}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{parameter}: {error}") from error


def _check_places(extraction: Extraction) -> None:
    """Each split that is recorded has a place that is nobody else's."""
    for split in extraction.splits:
        path: str = getattr(extraction.parameters.shards, split)
        for other, _ in extraction.parameters.shards:
            mine, others = (
                Path(os.path.abspath(extraction.place(name))) for name in (split, other)
            )
            if other != split and (mine.is_relative_to(others) or others.is_relative_to(mine)):
                raise ValueError(
                    f"shards.{split} is {path}, and shards.{other} is"
                    f" {getattr(extraction.parameters.shards, other)}: what is recorded replaces"
                    " its folder whole; give each split a folder of its own"
                )
        _check_own(split, extraction.place(split))


def _check_own(split: str, place: Path) -> None:
    """What is in a place already is Assay's own recording, or nothing."""
    try:
        found = find_shards(place)
    except FileNotFoundError:
        return
    except ValueError as error:
        raise ValueError(f"shards.{split}: {error}") from error
    metadata = Shards(found).metadata
    if found == place or Provenance.parse(metadata.data) is None:
        raise ValueError(
            f"extract.{split}.images: shards.{split} is {place}, where shards are that this cannot"
            f" replace ({metadata.family} {metadata.ckpt}): give shards.{split} a folder of its"
            f" own, or leave extract.{split}.images out to read them"
        )


def _check_files(extraction: Extraction, split: str) -> int:
    """How many images there are, each with its mask where it needs one."""
    with _naming(f"extract.{split}.images"):
        images = Images(*_opened(*extraction.images(split)))
        if not len(images):
            raise ValueError(
                f"{images.folder} holds no image: correct the path, extract.{split}.pattern or"
                f" extract.{split}.names"
            )
    if split.startswith("probe"):
        with _naming(f"extract.{split}.masks"):
            folder, layout = extraction.masks(split)
            ImageMasks(folder, MaskLayout.model_validate(layout), images)
    return len(images)


def _opened(folder: Path, layout: dict[str, Any]) -> tuple[Path, ImageLayout]:
    return folder, ImageLayout.model_validate(layout)


def _begun_bytes(place: Path) -> int:
    """What unfinished recordings take beside a place."""
    begun = place.parent.glob(f".{place.name}.partial-*/**/*")
    return sum(each.stat().st_blocks * 512 for each in begun if each.is_file())


def _warn_of_copies(train: Images, val: Images) -> None:
    pairs = find_copies(train.paths, val.paths)
    if pairs:
        named = "; ".join(f"{one} and {other}" for one, other in pairs[:MOST_COPIES])
        logger.warning(
            "%d images of probe_train are in probe_val as well, byte for byte, so that probes are"
            " judged on what they were fitted on: %s%s",
            len(pairs),
            named,
            "; ..." if len(pairs) > MOST_COPIES else "",
        )

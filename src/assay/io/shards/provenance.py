"""How activations were recorded here: a JSON text in metadata.json's `data`, where saev keeps a
pickle, which nobody here ever decodes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from assay.geometry import Geometry, Grid, PatchSize, Resample, Resize
from assay.io.images.files import digest_files
from assay.io.images.masks import MaskLayout
from assay.io.strict_json import parse_json

SAMPLE = ("examples", "seed")

LABELING = ("void", "offset", "mapping", "n_classes", "replace")
"""What decides about labels beside the masks' files and the geometry."""


class _Said(BaseModel):
    # Names that a later version adds are no reason not to know the others.
    model_config = ConfigDict(frozen=True, extra="ignore")


class RecordedGeometry(_Said):
    """How images lay on the patches: the arguments of `assay.io.images.ImageLayout`, with how many
    patches there were.
    """

    patch_size: PatchSize
    n_patches: Annotated[int, Field(gt=0, le=2**20)]
    grid: Grid | None = None
    geometry: Geometry | None = None
    resize: Resize | None = None
    resample: Resample | None = None


class RecordedFiles(_Said):
    """Which files were recorded: how many, and SHA-256 (64 hex digits) of their names relative to
    their folder, their sizes, and a sample of their content.
    """

    n: PositiveInt
    sha256: str

    @classmethod
    def of(cls, folder: Path, paths: Sequence[Path]) -> RecordedFiles:
        """Those of a folder, in their order."""
        return cls(n=len(paths), sha256=digest_files(folder, paths))


class RecordedMasks(RecordedFiles):
    """Which masks the patches were labeled from, and SHA-256 (64 hex digits) of how."""

    labeling: str

    @classmethod
    def labeled(cls, folder: Path, paths: Sequence[Path], layout: MaskLayout) -> RecordedMasks:
        """Those of a folder, in their order."""
        said = json.dumps(layout.model_dump(mode="json", include=set(LABELING)), sort_keys=True)
        labeling = hashlib.sha256(said.encode()).hexdigest()
        return cls(n=len(paths), sha256=digest_files(folder, paths), labeling=labeling)


class Provenance(_Said):
    """What a recording was made of.

    Args:
        writer: who wrote this.
        model: what tells the model from others: library, version, revision or digest.
        geometry: how images lay on the patches.
        precision: of the forward pass.
        batch_size: images of a forward pass.
        images: the files.
        masks: of the images; None: the patches were not labeled.
        examples: how many of the folder's files were drawn; None: all were taken.
        seed: of that sample.
    """

    writer: Literal["assay"] = "assay"
    model: dict[str, str]
    geometry: RecordedGeometry
    precision: str
    batch_size: PositiveInt
    images: RecordedFiles
    masks: RecordedMasks | None = None
    examples: PositiveInt | None = None
    seed: int | None = Field(None, ge=0)

    def to_text(self) -> str:
        """As one line of JSON, the same for the same values."""
        return self.model_dump_json()

    @classmethod
    def parse(cls, data: str) -> Provenance | None:
        """What metadata.json's `data` says, or None where it is not written here."""
        if not data.startswith("{"):  # a pickle in base64 is not looked at
            return None
        try:
            return cls.model_validate(parse_json(data))
        except (ValidationError, ValueError):
            return None

    def layout(self, typed: Mapping[str, Any], *, resample: bool = False) -> dict[str, Any]:
        """The arguments of a layout: those that are typed, and for all others about the geometry
        and the sample what was recorded.

        Args:
            typed: what was typed; a value that is None was not.
            resample: how images are resized is of interest too.

        Raises:
            ValueError: what is typed contradicts what was recorded.
        """
        names = ("patch_size", "grid", "geometry", "resize", *(("resample",) if resample else ()))
        recorded = {name: getattr(self.geometry, name) for name in names}
        if self.examples is not None:
            recorded |= {name: getattr(self, name) for name in SAMPLE}
        given = {name: value for name, value in typed.items() if value is not None}
        if given.pop("crop", False):
            given = {"geometry": "crop"} | given
        for name in recorded.keys() & given.keys():
            found = tuple(given[name]) if isinstance(given[name], list) else given[name]
            if found != recorded[name]:
                raise ValueError(
                    f"found {name} {found}, and the shards were recorded with {name}"
                    f" {recorded[name]}, {self.describe()}: leave it out, and it is as recorded"
                )
        return given | recorded

    def describe(self) -> str:
        """The geometry in a few words."""
        how = self.geometry
        grid = "" if how.grid is None else f" on {how.grid[0]} x {how.grid[1]}"
        resize = "" if how.resize is None else f", resize {how.resize}"
        return f"geometry {how.geometry}{grid} patches of {how.patch_size} pixels{resize}"

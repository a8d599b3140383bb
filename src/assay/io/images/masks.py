"""Segmentation masks: what their pixels mean, and how they are brought to the activations' grid.

A mask is a PNG with one class id per pixel. Ids become labels, 0 for void, by a `MaskLayout`, which
is all that differs between ADE20K, COCO-Stuff, FishVista and the like.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
import yaml
from PIL import Image
from pydantic import Field, ValidationError, model_validator

from assay.io.images.images import UNREADABLE, check_png, explain
from assay.io.images.layout import Layout, Placement

VOID = 0
MAX_LABEL = 2**16 - 1
UNKNOWN = -1

MAX_CONFIG_BYTES = 4 * 2**20
MAX_DEPTH = 20

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_HEADER_BYTES = 26
COLOR_TYPES = {0: "gray", 2: "RGB", 3: "palette", 4: "gray with alpha", 6: "RGB with alpha"}

Id = Annotated[int, Field(ge=0, le=MAX_LABEL)]


class MaskLayout(Layout):
    """Where a dataset's masks are, what their ids mean and how they lie on the patches.

    Args:
        patch_size, grid, geometry, resize, crop, pattern, names, examples, seed: as in
            `assay.io.images.layout.Layout`, of the masks. The pixels are the nearest ones.
        void: ids that have no vote.
        offset: added to every other id to make its label. A label is at least 1.
        mapping: label of each id, in the place of an offset. Several ids may share a label; 0 is
            void.
        n_classes: labels there may be, void counted; None: as many as are found.
        replace: text that is replaced in an image's path to make its mask's, one after the other,
            where masks are found by the images (`assay.io.shards.labels.ImageMasks`).

    Raises:
        ValueError: a value is out of bounds or unknown, or two contradict each other (pydantic's
            subclass).
    """

    things: ClassVar[str] = "masks"

    pattern: Annotated[str, Field(min_length=1)] | None = "*.png"
    void: tuple[Id, ...] = (0,)
    offset: Annotated[int, Field(ge=-MAX_LABEL, le=MAX_LABEL)] = 0
    mapping: dict[Id, Id] | None = None
    n_classes: Annotated[int, Field(ge=2, le=MAX_LABEL + 1)] | None = None
    replace: dict[Annotated[str, Field(min_length=1)], str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_way_to_label(self) -> "MaskLayout":
        if self.mapping is not None and self.offset:
            raise ValueError(
                f"found a mapping and offset {self.offset}, want one of them: add the offset to the"
                " mapping"
            )
        for id_ in self.void:
            if (self.mapping or {}).get(id_, VOID) != VOID:
                raise ValueError(f"id {id_} is both void and mapped to a label; want one of them")
        return self

    def labels_of_ids(self) -> npt.NDArray[np.int32]:
        """Label of every id from 0 to 65,535, int32 (65536,): 0 for void, -1 for an id that has
        none.
        """
        ids = np.arange(MAX_LABEL + 1, dtype=np.int32)
        if self.mapping is None:
            labels = ids + np.int32(self.offset)
            labels[(labels <= VOID) | (labels > MAX_LABEL)] = UNKNOWN
        else:
            labels = np.full_like(ids, UNKNOWN)
            labels[list(self.mapping)] = list(self.mapping.values())
        labels[list(self.void)] = VOID
        return labels


def parse_layout(raw: Mapping[str, object]) -> MaskLayout:
    """The checked layout of a configuration; raises ValueError, in one line that names what is
    wrong and what there is.
    """
    try:
        return MaskLayout.model_validate(raw)
    except ValidationError as error:
        faults = {
            f"{fault['loc'][0] if fault['loc'] else 'the whole'}: {fault['msg']}"
            for fault in error.errors()
        }
        fields = ", ".join(MaskLayout.model_fields)
        raise ValueError(
            f"wrong mask layout: {'; '.join(sorted(faults))}. There are {fields}"
        ) from None


class _StrictLoader(yaml.SafeLoader):
    """YAML of bounded depth in which each key is there once."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):  # a merge key's have been flattened by now
            keys = Counter(str(self.construct_object(key)) for key, _ in node.value)
            raise yaml.YAMLError(f"the key {keys.most_common(1)[0][0]!r} is there twice; keep one")
        return found


def _parse_yaml(raw: bytes) -> object:
    """What a file says; raises ValueError or YAMLError, which do not name it."""
    if len(raw) > MAX_CONFIG_BYTES:
        raise ValueError(f"it has more than {MAX_CONFIG_BYTES} bytes")
    return yaml.load(raw.decode("utf-8-sig"), _StrictLoader)


def read_config(path: Path) -> dict[str, object]:
    """The names and values in a YAML file of a mask layout, not yet checked.

    Raises:
        ValueError: it is no YAML of names and values, larger than 4 MiB, deeply nested, or has a
            key twice; the message names the file.
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing; wanted a YAML file of a mask layout, check the path"
        ) from None
    try:
        found = _parse_yaml(raw)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(
            f"{path} is no YAML: {' '.join(str(error).split())}; correct the file"
        ) from None
    if isinstance(found, dict):
        return found
    raise ValueError(
        f"{path} holds {type(found).__name__}, wanted names and values, as in `patch_size: 16`"
    )


def read_mask(path: Path) -> npt.NDArray[np.integer]:
    """Class ids of the pixels of a PNG, unsigned (height, width): its gray values, or its places in
    the palette.

    Raises:
        ValueError: it is no whole PNG of one channel; the message names the file.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        header = file.read(PNG_HEADER_BYTES)
    if len(header) < PNG_HEADER_BYTES or not header.startswith(PNG_SIGNATURE):
        raise ValueError(f"{path} is no PNG; wanted a PNG with one class id per pixel")
    depth, color = header[-2:]
    if color not in (0, 3):
        raise ValueError(
            f"{path} is a PNG of {COLOR_TYPES.get(color, 'no known color')}; wanted one of a single"
            " channel, gray or palette: one class id per pixel"
        )
    try:
        with Image.open(path, formats=["PNG"]) as image:
            ids: npt.NDArray[np.integer] = np.asarray(image)
        check_png(path)
    except UNREADABLE as error:
        raise ValueError(
            f"{path} is damaged or too large ({explain(error)}); restore the file"
        ) from None
    if color == 0 and depth in (2, 4):
        # Pillow stretches these grays to 0 to 255.
        ids = (ids // (255 // (2**depth - 1))).astype(np.uint8)
    return ids.astype(np.uint8) if depth == 1 else ids


def fit_mask(
    mask: npt.NDArray[np.integer], placement: Placement, patch_size: int
) -> npt.NDArray[np.integer]:
    """Resize to the nearest pixel, then cut out the patches.

    An output pixel takes the input pixel that its center lies in; on the border of two, that which
    Pillow takes, and so saev and torchvision.
    """
    rows, columns = (
        _sources(n, resized, first, n_patches * patch_size)
        for n, resized, first, n_patches in zip(
            mask.shape, placement.resized, placement.first, placement.grid, strict=True
        )
    )
    return mask[rows[:, None], columns]


def _sources(n: int, resized: int, first: int, wanted: int) -> npt.NDArray[np.int64]:
    """The input pixel of each output pixel, along one axis."""
    # Pillow's own sums decide where a center falls on a border, as it does for every other of 14
    # pixels that 256 come to.
    line = Image.fromarray(np.arange(n, dtype=np.int32)[None])
    nearest = np.asarray(line.resize((resized, 1), Image.Resampling.NEAREST))[0]
    sources: npt.NDArray[np.int64] = nearest[first : first + wanted].astype(np.int64)
    return sources

"""Patch labels: the majority of a patch's pixels, and `labels.bin`, where they are kept.

`labels.bin` is uint8 (n_examples, content_tokens_per_example) without a header, 0 for void. Labels
above 255 lie in `labels16.bin` in its place, little-endian uint16.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from assay.io.files import METADATA_NAME, read_json_bytes, real_folder
from assay.io.images import Images
from assay.io.images.files import (
    check_folder,
    digest_files,
    fingerprint_files,
    leads_out,
    list_files,
    name_some,
    relative_names,
)
from assay.io.images.masks import UNKNOWN, VOID, MaskLayout, fit_mask, read_mask
from assay.io.publish import publish_file
from assay.io.shards.metadata import INDEX_NAME, LABELS_NAME, OWN_VOTE, WIDE_LABELS_NAME, Metadata
from assay.io.shards.provenance import Provenance
from assay.io.strict_json import parse_json

LABELS_NAMES = (LABELS_NAME, WIDE_LABELS_NAME)

MOST_COUNTED = 2**22
"""Pixels and votes that are counted at once, so that a mask of many classes takes no more memory
than others.
"""

Label = TypeVar("Label", np.uint8, np.uint16)


def patch_labels(masks: npt.NDArray[Label], patch_size: int) -> npt.NDArray[Label]:
    """Class of each patch: the commonest class of its pixels that are not void.

    Ties go to the lower class. A patch of nothing but void is void (0).

    Args:
        masks: uint8 or uint16 (n, height, width), the class of each pixel, 0 for void.
        patch_size: height and width of a patch, in pixels.

    Returns:
        (n, patches) of the masks' dtype, patches in reading order.

    Raises:
        ValueError: patches do not tile the masks.
    """
    n, height, width = masks.shape
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            f"found patch_size {patch_size}, want a positive divisor of masks' {height} x {width}"
            " pixels"
        )
    rows, columns = height // patch_size, width // patch_size
    tiles = masks.reshape(n, rows, patch_size, columns, patch_size).swapaxes(2, 3)
    patches = tiles.reshape(n * rows * columns, patch_size**2)
    # Only classes that occur are counted: there may be 65,536 of them, and a mask has a few.
    occurs = np.bincount(masks.ravel(), minlength=1) > 0
    occurs[VOID] = True
    classes = np.flatnonzero(occurs)
    ranks = np.cumsum(occurs) - 1
    labels = np.empty(len(patches), dtype=masks.dtype)
    size = max(1, MOST_COUNTED // (patch_size**2 + len(classes)))
    for start in range(0, len(patches), size):
        some = patches[start : start + size]
        ids = np.arange(len(some))[:, None] * len(classes) + ranks[some]
        votes = np.bincount(ids.ravel(), minlength=len(some) * len(classes)).reshape(
            len(some), len(classes)
        )
        # Void has no vote, yet wins where there is no other: argmax takes the lowest class of equal
        # counts.
        votes[:, VOID] = 0
        labels[start : start + size] = classes[votes.argmax(axis=1)]
    return labels.reshape(n, rows * columns)


@dataclass(frozen=True, eq=False)
class PatchLabels:
    """Labels of a whole dataset.

    Attributes:
        labels: uint8 or uint16 (n_examples, content_tokens_per_example), 0 for void.
    """

    labels: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

    @property
    def dtype(self) -> Literal["uint8", "uint16"]:
        """By name."""
        return "uint8" if self.labels.dtype == np.uint8 else "uint16"

    def counts(self) -> npt.NDArray[np.int64]:
        """Patches of each label, int64 (largest label + 1,)."""
        return np.bincount(self.labels.ravel(), minlength=1)


def label_patches(
    metadata: Metadata, folder: Path, layout: MaskLayout, progress: Callable[[int], object]
) -> PatchLabels:
    """Label the patches of recorded images from their masks, one mask per example, in the same
    order.

    The labels are uint16 if `layout.n_classes`, or without it the largest label found, asks for it;
    uint8 otherwise.

    Args:
        metadata: of the shards.
        folder: where the masks are.
        layout: what they mean.
        progress: called with 1 after each mask.

    Raises:
        FileNotFoundError: there is no such folder, or a listed mask is missing.
        ValueError: there are more or fewer masks than examples, or a mask is unreadable, of another
            size, or holds an id that has no label; the message names the file.
    """
    n_patches = metadata.content_tokens_per_example
    layout.grid_of(n_patches)  # what does not make it is no mask's fault
    paths = list_files(folder, layout)
    if len(paths) != metadata.n_examples:
        gaps = _gaps(paths, metadata.n_examples)
        raise ValueError(
            f"{folder} has {len(paths)} masks ({layout.names or layout.pattern}), and the shards"
            f" have {metadata.n_examples} examples; wanted a mask for each, "
            + (
                f"but by their numbers {name_some(gaps)} missing: "
                + ("restore them" if layout.names is None else "add them to the list")
                if gaps
                else "correct the folder or the pattern"
            )
        )
    _check_sample(metadata, folder, layout, paths)
    labels_of_ids = layout.labels_of_ids()
    most = VOID if layout.n_classes is None else layout.n_classes - 1
    labels = np.empty((metadata.n_examples, n_patches), dtype=np.uint16)
    for path, row in zip(paths, labels, strict=True):
        ids = read_mask(path)
        try:
            row[:] = _label(ids, layout, n_patches, labels_of_ids)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        progress(1)
    most = max(most, int(labels.max()))
    return PatchLabels(labels.astype(np.uint8) if most < 2**8 else labels)


def _check_sample(metadata: Metadata, folder: Path, layout: MaskLayout, paths: list[Path]) -> None:
    """Raise ValueError where a sample of images was recorded with other masks than these: drawn
    from a folder that holds more of them, they would be those of other images.
    """
    said = Provenance.parse(metadata.data)
    if said is None or said.examples is None or said.masks is None or layout.names is not None:
        return
    if said.masks.sha256 != digest_files(folder, paths):
        raise ValueError(
            f"{folder} gives other masks than those that these shards were recorded with, which are"
            f" of a sample of {said.examples} images: list the sample's masks in the examples'"
            " order, and give the list as --names"
        )


def _gaps(paths: list[Path], n_examples: int) -> list[str]:
    """The names of the masks that are not there, where the numbers at the end of the others' names
    leave just so many out.
    """
    found = [re.fullmatch(r"(.*?)(\d+)(\.\w+)", path.name) for path in paths]
    numbers = {int(each[2]): len(each[2]) for each in found if each is not None}
    around = {(each[1], each[3]) for each in found if each is not None}
    if len(numbers) < len(paths) or len(around) != 1:
        return []
    first, last = min(numbers), max(numbers)
    if last - first + 1 != n_examples:
        return []
    (stem, suffix), width = around.pop(), numbers[first]
    absent = (number for number in range(first, last) if number not in numbers)
    return [f"{stem}{number:0{width}d}{suffix}" for number in absent]


def _label(
    ids: npt.NDArray[np.integer],
    layout: MaskLayout,
    n_patches: int,
    labels_of_ids: npt.NDArray[np.int32],
) -> npt.NDArray[np.uint16]:
    """Labels of one mask's patches, uint16 (patches,)."""
    fitted = fit_mask(ids, layout.place(ids.shape, n_patches), layout.patch_size)
    pixels = labels_of_ids[fitted]
    if (pixels == UNKNOWN).any():
        id_ = fitted[pixels == UNKNOWN].min()
        raise ValueError(
            f"id {id_} has no label above 0; name it in void or mapping, or correct offset"
        )
    if layout.n_classes is not None and pixels.max() >= layout.n_classes:
        raise ValueError(
            f"label {pixels.max()} is found, wanted less than n_classes = {layout.n_classes};"
            " correct either"
        )
    labels: npt.NDArray[np.uint16] = patch_labels(
        pixels.astype(np.uint16)[None], layout.patch_size
    )[0]
    return labels


class ImageMasks:
    """The masks of a folder of images, from which the images' patches are labeled; each is read
    when it is asked for, by several threads at once if need be.

    The mask of an image is the PNG of the same path, in the folder of the masks, after what
    `layout.replace` replaces in it.

    Args:
        folder: of the masks.
        layout: what they mean, and how they lie on the patches: as the images do.
        images: that they are of.

    Attributes:
        paths: of the masks, one per image.

    Raises:
        FileNotFoundError: there is no such folder, or an image has no mask.
        ValueError: the layout is not that of the images, or leads out of the folder, to the images
            themselves, or to one mask for two of them.
    """

    def __init__(self, folder: Path, layout: MaskLayout, images: Images) -> None:
        for name in ("patch_size", "grid", "geometry", "resize"):
            found, wanted = getattr(layout, name), getattr(images.layout, name)
            if found != wanted:
                raise ValueError(
                    f"the masks in {folder} have {name} {found}, wanted {wanted}, as the images in"
                    f" {images.folder} have: give both the same"
                )
        check_folder(folder, layout.things)
        self.folder = folder
        self.layout = layout
        self._images = images
        self._labels_of_ids = layout.labels_of_ids()
        self.paths = [
            folder / self._name_mask(name) for name in relative_names(images.folder, images.paths)
        ]
        self._check_paths()

    def label(self, example: int, n_patches: int) -> npt.NDArray[np.uint16]:
        """Labels of an image's patches, uint16 (n_patches,), 0 for void.

        Raises:
            ValueError: the mask is unreadable, of another size than its image, or holds an id that
                has no label; the message names the file.
        """
        path = self.paths[example]
        ids = read_mask(path)
        shape = self._images.shape(example)
        if ids.shape != shape:
            raise ValueError(
                f"{path}: {ids.shape[0]} x {ids.shape[1]} pixels; wanted {shape[0]} x {shape[1]},"
                f" the size of its image, {self._images.paths[example]}: restore the mask"
            )
        try:
            return _label(ids, self.layout, n_patches, self._labels_of_ids)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) of the masks' names and sizes, a sample of their content, and the
        layout.
        """
        return fingerprint_files(self.folder, self.paths, self.layout)

    def _name_mask(self, image: str) -> str:
        name = image
        for old, new in self.layout.replace.items():
            name = name.replace(old, new)
        if leads_out(name):
            raise ValueError(
                f"the mask of {self._images.folder / image} would be {name}, wanted a path inside"
                f" {self.folder}: correct replace"
            )
        stem, suffix = os.path.splitext(name)
        return name if suffix.lower() == ".png" else f"{stem}.png"

    def _check_paths(self) -> None:
        image_of: dict[Path, Path] = {}
        for path, image in zip(self.paths, self._images.paths, strict=True):
            other = image_of.setdefault(path, image)
            if other != image:  # a list may have one twice
                raise ValueError(
                    f"{other} and {image} have one mask, {path}; wanted one for each: leave one of"
                    " them out, by pattern or names, or correct replace"
                )
        missing = [str(path) for path in self.paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{name_some(missing)} missing; wanted a mask for each of the {len(self.paths)}"
                f" images in {self._images.folder}, under the image's path: restore them, or say in"
                " replace what their paths have in another way"
            )
        images = set(self._images.paths)
        same = next((path for path in self.paths if path in images), None)
        if same is not None:
            raise ValueError(
                f"{same} is both an image and a mask; wanted masks in a folder of their own, or a"
                " pattern that leaves them out"
            )


def check_target(out: Path, shards: Path, *, force: bool) -> None:
    """Refuse to write labels to `out` over a file, unless `force`, and in any case over what a
    shard folder is made of.

    Raises:
        FileExistsError: `out` exists, and `force` is false.
        ValueError: `out` lies in a folder of shards or codes, however deep, and is not the labels
            of these shards.
    """
    parent = Path(os.path.realpath(out.parent))
    published = next(
        (folder for folder in (parent, *parent.parents) if os.path.lexists(folder / INDEX_NAME)),
        None,
    )
    own = parent == shards and out.name in LABELS_NAMES
    if published is not None and not own:
        raise ValueError(
            f"{out} lies in a folder of shards, which are immutable ({published}); wanted"
            f" {shards / LABELS_NAME} or a place outside"
        )
    there = next(
        (
            path
            for path in ([shards / name for name in LABELS_NAMES] if own else [out])
            if os.path.lexists(path)
        ),
        None,
    )
    if there is not None and not force:
        raise FileExistsError(
            f"{there} exists already and is not replaced; choose another name, or --force"
        )


def publish_labels(
    labels: PatchLabels, out: Path, shards: str | os.PathLike[str], *, force: bool = False
) -> Path:
    """Write labels to `out`, whole or not at all.

    Where `out` is that of the shards themselves, they go to `labels.bin` or to `labels16.bin`, as
    their dtype wants it, the other is removed, and the shards' metadata.json comes to say how they
    were made; nothing else in it changes. A process killed in between leaves the older labels or
    the newer, or a pair that is refused for its size, never labels misread.

    Returns:
        the file that was written.

    Raises:
        FileExistsError, ValueError: see `check_target`.
    """
    folder = real_folder(shards)
    check_target(out, folder, force=force)
    own = Path(os.path.realpath(out.parent)) == folder
    name, other = LABELS_NAMES if labels.dtype == "uint8" else reversed(LABELS_NAMES)
    path = out.with_name(name) if own else out
    with publish_file(path) as partial:
        partial.write_bytes(
            labels.labels.astype(labels.labels.dtype.newbyteorder("<"), copy=False).tobytes()
        )
    if own:
        path.with_name(other).unlink(missing_ok=True)
        said = parse_json(read_json_bytes(folder, METADATA_NAME))
        says = {key: value for key, value in said.items() if key != "labels_dtype"} | {
            "pixel_agg": OWN_VOTE
        }
        if says != said:
            with publish_file(folder / METADATA_NAME) as partial:
                partial.write_text(json.dumps(says, indent=2), encoding="utf-8")
    return path

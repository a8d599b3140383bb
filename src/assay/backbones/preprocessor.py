"""How a checkpoint wants its images, from the file that transformers' image processors save.

Their code is not used: that of DINOv3 needs torchvision, and what they do is little. Every form of
the file that the families' published checkpoints have is read, the oldest included, and what is not
understood is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from assay.backbones.description import Preprocessing
from assay.io.strict_json import read_json_file, shown

FILE, OF_PROCESSOR = "preprocessor_config.json", "processor_config.json"

RESAMPLES = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""By Pillow's numbers."""


def read_preprocessing(folder: Path) -> Preprocessing:
    """What the folder's preprocessor_config.json says, or the image processor's part of
    processor_config.json.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: it says something that is not understood, or leaves out something that is
            needed.
    """
    path = folder / FILE
    if not path.is_file() and (folder / OF_PROCESSOR).is_file():
        path = folder / OF_PROCESSOR
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: found no {FILE}, wanted the mean, the standard deviation and the size of"
            " the images that the model was trained on: take that of the checkpoint, or write"
            ' {"image_mean": [...], "image_std": [...], "size": 224, "resample": 3}'
        )
    said = read_json_file(path)
    if path.name == OF_PROCESSOR and isinstance(said, dict):
        said = said.get("image_processor")
    if not isinstance(said, dict):
        raise ValueError(  # noqa: TRY004
            f"{path}: found {shown(said)[:80]}, wanted an object: restore the file"
        )
    try:
        return parse_preprocessing(said)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_preprocessing(said: Mapping[str, Any]) -> Preprocessing:
    """What such a file says.

    A size of one number is that of the shorter side where a crop follows, and of both sides where
    none does. Of a square that a crop follows, as DeiT's, the shorter side is taken, as those who
    trained it did.

    Raises:
        ValueError: a key has another value than is understood.
    """
    _refuse_other_steps(said)
    size, is_square = _size(said.get("size"))
    resize: int | None = None
    if said.get("do_center_crop"):
        resize = min(size)
        if size[0] != size[1]:
            raise ValueError(f"found size {said['size']} before a crop, wanted a square")
        size, _ = _size(said.get("crop_size"), "crop_size")
    elif not is_square:
        resize = size[0]
    mean = std = None
    if said.get("do_normalize") is not False:
        mean, std = _numbers(said, "image_mean"), _numbers(said, "image_std")
        if min(std) <= 0:
            raise ValueError(f"found image_std {said['image_std']}, wanted numbers above 0")
    resample = said.get("resample")
    if not isinstance(resample, int) or resample is True or resample not in RESAMPLES:
        raise ValueError(
            f"found resample {shown(resample)}, wanted 1 (Lanczos), 2 (bilinear) or 3 (bicubic)"
        )
    return Preprocessing(
        mean or (0.0, 0.0, 0.0), std or (1.0, 1.0, 1.0), size, resize, RESAMPLES[resample]
    )


def _refuse_other_steps(said: Mapping[str, Any]) -> None:
    for key in ("do_resize", "do_rescale"):
        # Null is the processor's own default, which is true; that of do_normalize as well.
        if said.get(key) not in (None, True):
            raise ValueError(f"found {key} {shown(said[key])}, wanted true")
    factor = said.get("rescale_factor")
    is_a_byte = isinstance(factor, int | float) and math.isclose(factor, 1 / 255, rel_tol=1e-6)
    if not (factor is None or is_a_byte):
        raise ValueError(f"found rescale_factor {shown(factor)}, wanted 1/255")
    if said.get("do_pad"):
        raise ValueError("found do_pad, wanted images that are resized, and cropped at most")


def _size(said: Any, key: str = "size") -> tuple[tuple[int, int], bool]:
    """(Height, width), and whether both are meant and not the shorter side."""
    if isinstance(said, dict):
        # Processors of other models fill in further keys with null.
        there = {name: value for name, value in said.items() if value is not None}
        if there.keys() == {"height", "width"}:
            return (_pixels(there["height"], key), _pixels(there["width"], key)), True
        if there.keys() == {"shortest_edge"}:
            return (_pixels(there["shortest_edge"], key),) * 2, False
    elif isinstance(said, list) and len(said) == 2:
        return (_pixels(said[0], key), _pixels(said[1], key)), True
    elif said is not None:
        return (_pixels(said, key),) * 2, True
    raise ValueError(
        f"found {key} {shown(said)}, wanted a number of pixels, {{height, width}} or"
        " {shortest_edge}"
    )


def _pixels(said: Any, key: str) -> int:
    if not isinstance(said, int) or isinstance(said, bool) or said < 1:
        raise ValueError(f"found {key} {shown(said)}, wanted whole numbers of pixels")
    return said


def _numbers(said: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    found = said.get(key)
    if (
        isinstance(found, list)
        and len(found) == 3
        and all(isinstance(each, int | float) and math.isfinite(each) for each in found)
    ):
        return float(found[0]), float(found[1]), float(found[2])
    raise ValueError(f"found {key} {shown(found)}, wanted three numbers, of red, green and blue")

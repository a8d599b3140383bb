"""The images behind shards, as the model saw them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from assay.io.images.files import fingerprint_files, list_files
from assay.io.images.layout import ImageLayout

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000")
"""That are decoded, whatever a file's name ends in.
"""

PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Numbers per pixel, by a PNG's color type."""

ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
"""First column and row, and steps, of the passes of an interlaced PNG."""

UNREADABLE = (
    *(OSError, SyntaxError, ValueError, zlib.error, struct.error),
    *(EOFError, IndexError, KeyError, MemoryError, OverflowError, TypeError),
    *(Image.DecompressionBombError, Warning),
)
"""What Pillow and zlib raise for an image that is damaged or too large, and warnings where these
are made errors.
"""


def explain(error: BaseException) -> str:
    """What went wrong, where Python has no words for it too."""
    return str(error) or (
        "it takes more memory than there is"
        if isinstance(error, MemoryError)
        else type(error).__name__
    )


def check_png(path: Path) -> None:
    """Raise ValueError for a whole PNG whose image data end before the image does: decoders fill up
    the rest with zeros.
    """
    raw = path.read_bytes()
    width, height, depth, color, _, _, interlaced = struct.unpack(">IIBBBBB", raw[16:29])
    bits = depth * PNG_CHANNELS[color]
    sizes = [
        (-(-(width - x) // dx), -(-(height - y) // dy))
        for x, y, dx, dy in (ADAM7 if interlaced else [(0, 0, 1, 1)])
    ]
    wanted = sum(
        rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if columns > 0 and rows > 0
    )
    found, start, inflate = 0, 8, zlib.decompressobj()
    while found < wanted and start + 8 <= len(raw):
        length, kind = struct.unpack(">I4s", raw[start : start + 8])
        data = raw[start + 8 : start + 8 + length] if kind == b"IDAT" else b""
        while data and found < wanted:
            found += len(inflate.decompress(data, min(wanted - found, 2**20)))
            data = inflate.unconsumed_tail
        start += length + 12
    if found < wanted:
        raise ValueError(f"its image data end after {found} of {wanted} bytes")


class Images:
    """The images behind a folder of shards, in the order of its examples; each is read when it is
    asked for, by several threads at once if need be.

    Args:
        folder: of the images.
        layout: which they are, and how they lie on the patches.

    Attributes:
        paths: of the images.

    Raises:
        FileNotFoundError, ValueError: as `list_files`.
    """

    def __init__(self, folder: Path, layout: ImageLayout) -> None:
        self.folder = folder
        self.layout = layout
        self.paths = list_files(folder, layout)

    def __len__(self) -> int:
        return len(self.paths)

    def check(self, n_patches: int) -> None:
        """Check the size of every image, which is in its first bytes; raises ValueError as
        `read`.
        """
        for example in range(len(self)):
            with self._opened(example) as image:
                self.layout.place((image.height, image.width), n_patches)

    def shape(self, example: int) -> tuple[int, int]:
        """(height, width) of an image as it is in its file, from its first bytes; raises ValueError
        as `read`.
        """
        with self._opened(example) as image:
            return image.height, image.width

    def read(self, example: int, n_patches: int) -> npt.NDArray[np.uint8]:
        """One image as the model saw it, uint8 (height, width, 3), resized and cropped to its
        patches.

        Gray images and palettes become RGB, CMYK as Pillow converts it. Transparency is dropped. 16
        bits of gray are scaled to 8; of 16 bits a color Pillow reads the upper 8. An orientation
        that EXIF data give is not applied, as torchvision does not; but for a TIFF's, which Pillow
        applies for both.

        Raises:
            ValueError: the file is no whole image, or does not come to the grid; it is named.
        """
        with self._opened(example) as image:
            placement = self.layout.place((image.height, image.width), n_patches)
            pixels = as_rgb(image).resize(
                placement.resized[::-1], Image.Resampling[str(self.layout.resample).upper()]
            )
            if image.format == "PNG":
                check_png(self.paths[example])
        (top, left), patch = placement.first, self.layout.patch_size
        height, width = (n * patch for n in placement.grid)
        return np.asarray(pixels.crop((left, top, left + width, top + height)))

    @contextmanager
    def _opened(self, example: int) -> Iterator[Image.Image]:
        path = self.paths[example]
        try:
            with Image.open(path, formats=FORMATS) as image:
                yield image
        except UNREADABLE as error:
            said = explain(error)
            if isinstance(error, UnidentifiedImageError):
                said = "it is no image that is known here" if path.stat().st_size else "it is empty"
            raise ValueError(f"{path}: {said}; wanted the image of example {example}") from None

    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) of the files' names and sizes, a sample of their content, and the
        layout.
        """
        return fingerprint_files(self.folder, self.paths, self.layout)


def as_rgb(image: Image.Image) -> Image.Image:
    """An image in 8-bit RGB.

    Raises:
        ValueError: its pixels are of a kind that has no bounds, as floats are.
        OSError: it is damaged.
    """
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in {"PNG", "PPM"}):
        # Pillow would clip at 255.
        gray = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((gray + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in {"I", "F"}:
        raise ValueError(
            f"its pixels are {'floats' if image.mode == 'F' else '32-bit integers'}; save it with 8"
            " or 16 bits a channel"
        )
    # Pillow warns of a palette that has it, and drops it in any case.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def write_images(folder: Path, pixels: npt.NDArray[np.uint8]) -> None:
    """Write gray images, uint8 (n, height, width), as PNG files whose names are in their order."""
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:06d}.png")

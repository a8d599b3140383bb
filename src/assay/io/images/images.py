"""How the images behind shards, and their segmentation masks, lie on the grid of patches; and the
images themselves.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Annotated, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from assay.io.sampling import sample_bytes, sampled_digest

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

MOST_NAMED = 5
"""Files that a message names, of those that are missing."""

Size = tuple[PositiveInt, PositiveInt]


class ImageLayout(BaseModel):
    """Where a dataset's images are, and how they lie on the patches.

    An image is resized, then cropped, as it was before the activations were recorded: to `grid`
    patches in all.

    Args:
        patch_size: height and width of a patch, in pixels.
        grid: (rows, columns) of patches in an example; None: a square, from the shards.
        resize: shorter side in pixels, the other in proportion and rounded down; or (height,
            width); None: as it is.
        crop: cut out the center, of the grid's size. Without, an image that then has another size
            is an error.
        pattern: glob of the files inside their folder; they are taken in the order of their paths,
            folder by folder.
        names: a text file that lists the files instead, one path inside their folder a line, in the
            examples' order.

    Raises:
        ValueError: a value is out of bounds or unknown (pydantic's subclass).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    things: ClassVar[str] = "images"

    patch_size: PositiveInt
    grid: Size | None = None
    resize: PositiveInt | Size | None = None
    crop: bool = False
    pattern: Annotated[str, Field(min_length=1)] = "*.jpg"
    names: Path | None = None

    def grid_of(self, n_patches: int) -> Size:
        """(rows, columns) of an example of so many patches; raises ValueError if they do not make
        that grid.
        """
        side = int(n_patches**0.5)
        rows, columns = self.grid or (side, side)
        if rows * columns != n_patches:
            found = f"grid is {rows} x {columns}" if self.grid else "no grid is given"
            raise ValueError(
                f"{found}, and the shards have {n_patches} patches per example; give grid, the rows"
                f" and columns that make {n_patches}"
            )
        return rows, columns

    def resized(
        self, shape: tuple[int, ...], grid: Size
    ) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """(height, width) that an image of a shape is resized to, where the crop begins, and its
        size, all in pixels.

        A crop of odd remainder is placed as torchvision's CenterCrop places it.

        Raises:
            ValueError: the image then has another size than the grid, or is smaller than the crop.
        """
        resized = _resized(shape, self.resize)
        wanted = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        fits = all(have >= want for have, want in zip(resized, wanted, strict=True))
        if resized != wanted and not (self.crop and fits):
            raise ValueError(
                f"{shape[0]} x {shape[1]}"
                f" pixels{f', {resized[0]} x {resized[1]} resized' if self.resize else ''}; wanted"
                f" {wanted[0]} x {wanted[1]}, {grid[0]} x {grid[1]} patches of {self.patch_size}:"
                " resize and crop as the images were"
            )
        first = round((resized[0] - wanted[0]) / 2), round((resized[1] - wanted[1]) / 2)
        return resized, first, wanted


def list_files(folder: Path, layout: ImageLayout) -> list[Path]:
    """The files of a dataset, in the order of its examples.

    Raises:
        FileNotFoundError: there is no such folder or list, or a listed file is missing.
        ValueError: the pattern is not one, or it or the list leads out of the folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder; wanted that of the {layout.things}, check the path"
        )
    if layout.names is not None:
        names = _read_names(layout.names)
        outside = next((name for name in names if _leads_out(name)), None)
        if outside is not None:
            raise ValueError(
                f"{layout.names} lists {outside!r}; wanted paths inside {folder}, without ..:"
                f" correct the list or name the folder that holds all {layout.things}"
            )
        paths = [folder / name for name in names]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{name_some(map(str, missing))} missing, listed by {layout.names}; wanted all of"
                f" the list among the {layout.things}, correct it or restore them"
            )
        return paths
    try:
        found = _match(folder, layout.pattern)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(
            f"pattern {layout.pattern!r}: {error}; wanted a glob inside the folder, as in '*.png'"
        ) from None
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def name_some(names: Iterable[str]) -> str:
    """The first few of the names, at least one, with how many more there are, and the verb."""
    first, *others = names
    named = [first, *others[: MOST_NAMED - 1]]
    if len(others) >= MOST_NAMED:
        named.append(f"{len(others) + 1 - MOST_NAMED} more")
    return f"{', '.join(named[:-1])} and {named[-1]} are" if others else f"{first} is"


def _match(folder: Path, pattern: str) -> list[Path]:
    """The files that match; raises ValueError, or NotImplementedError as Python has it, where the
    pattern is none or leads out of the folder.
    """
    if _leads_out(pattern):
        raise ValueError("it leads out of the folder")
    return [path for path in folder.glob(pattern) if path.is_file()]


def _read_names(path: Path) -> list[str]:
    """The lines of a list of files, without the byte order mark that some editors write."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing; wanted a list of files, check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no UTF-8 text ({error}); wanted a list of files, save it as UTF-8"
        ) from None
    names = [line.strip() for line in lines if line.strip()]
    odd = next((name for name in names if not name.isprintable()), None)
    if odd is not None:
        raise ValueError(
            f"{path} lists {odd!r}; wanted names of printable characters, correct the list"
        )
    return names


UNREADABLE = (
    *(OSError, SyntaxError, ValueError, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
"""What Pillow and zlib raise for an image that is damaged or too large."""


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


def _leads_out(path: str) -> bool:
    return PurePath(path).is_absolute() or ".." in PurePath(path).parts


class Images:
    """The images behind a folder of shards, in the order of its examples; each is read when it is
    asked for.

    Args:
        folder: of the images.
        layout: which they are, and how they lie on the patches.

    Raises:
        FileNotFoundError, ValueError: as `list_files`.
    """

    def __init__(self, folder: Path, layout: ImageLayout) -> None:
        self.folder = folder
        self.layout = layout
        self._paths = list_files(folder, layout)

    def __len__(self) -> int:
        return len(self._paths)

    def check(self, n_patches: int) -> None:
        """Check the size of every image, which is in its first bytes; raises ValueError as
        `read`.
        """
        for example in range(len(self)):
            with self._opened(example, n_patches):
                pass

    def read(self, example: int, n_patches: int) -> npt.NDArray[np.uint8]:
        """One image as the model saw it, uint8 (height, width, 3), resized (bicubic) and cropped to
        its patches.

        Raises:
            ValueError: the file is no image, or does not come to the grid; it is named.
        """
        with self._opened(example, n_patches) as (image, resized, (top, left), (height, width)):
            pixels = image.convert("RGB").resize(resized[::-1], Image.Resampling.BICUBIC)
            if image.format == "PNG":
                check_png(self._paths[example])
        return np.asarray(pixels)[top : top + height, left : left + width]

    @contextmanager
    def _opened(
        self, example: int, n_patches: int
    ) -> Iterator[tuple[Image.Image, tuple[int, int], tuple[int, int], tuple[int, int]]]:
        path = self._paths[example]
        grid = self.layout.grid_of(n_patches)
        try:
            with Image.open(path) as image:
                yield image, *self.layout.resized((image.height, image.width), grid)
        except UNREADABLE as error:
            raise ValueError(f"{path}: {error}; wanted the image of example {example}") from None

    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) of every file's name, size and a sample of its content, and of
        the layout.
        """
        described, most = [self.layout.model_dump_json(exclude={"names"})], sample_bytes(len(self))
        for path in self._paths:
            content = sampled_digest(path, most)
            described.append(f"{path.relative_to(self.folder)} {path.stat().st_size} {content}")
        return hashlib.sha256("\n".join(described).encode()).hexdigest()


def write_images(folder: Path, pixels: npt.NDArray[np.uint8]) -> None:
    """Write gray images, uint8 (n, height, width), as PNG files whose names are in their order."""
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:06d}.png")


def _resized(shape: tuple[int, ...], resize: int | Size | None) -> tuple[int, int]:
    height, width = shape
    if resize is None:
        return height, width
    if isinstance(resize, tuple):
        return resize
    if height <= width:
        return resize, resize * width // height
    return resize * height // width, resize

"""Which files of a folder are a dataset's, in what order, and what tells them from others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath

import numpy as np

from assay.io.images.layout import Layout
from assay.io.sampling import sample_bytes, sampled_digest

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Of image files, in any case: those that torchvision's folders take."""

MOST_NAMED = 5
"""Files that a message names, of those that are missing."""

MOST_SAMPLED = 1000
"""Files of a folder whose content is looked at for its fingerprint; of all others names and sizes
are.
"""


def list_files(folder: Path, layout: Layout) -> list[Path]:
    """The files of a dataset, in the order of its examples.

    Raises:
        FileNotFoundError: there is no such folder or list, or a listed file is missing.
        ValueError: the pattern is not one, it or the list leads out of the folder, or there are
            fewer files than are to be drawn.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder; wanted that of the {layout.things}, check the path"
        )
    found = _list_all(folder, layout)
    if layout.examples is None:
        return found
    if len(found) < layout.examples:
        raise ValueError(
            f"{folder} has {len(found)} {layout.things}, wanted at least the {layout.examples} that"
            " examples asks for: ask for fewer, or correct the folder, the pattern or the list"
        )
    return [found[number] for number in _draw(len(found), layout.examples, layout.seed)]


def fingerprint_files(folder: Path, paths: Sequence[Path], layout: Layout) -> str:
    """SHA-256 (64 hex digits) of every file's name and size, of a sample of the content of a
    thousand of them at the most, evenly spread, and of the layout.
    """
    step = -(-len(paths) // MOST_SAMPLED) or 1
    most = sample_bytes(-(-len(paths) // step))
    digest = hashlib.sha256(layout.model_dump_json(exclude={"names"}).encode())
    for number, (name, size) in enumerate(names_and_sizes(folder, paths)):
        content = sampled_digest(paths[number], most) if number % step == 0 else ""
        digest.update(f"\n{name} {size} {content}".encode())
    return digest.hexdigest()


def relative_names(folder: Path, paths: Iterable[Path]) -> Iterator[str]:
    """The paths of files inside their folder, with slashes."""
    # Path.relative_to takes ten times as long, and there may be a million files.
    prefix = "" if folder == Path() else os.path.join(folder, "")
    return (str(path)[len(prefix) :] for path in paths)


def names_and_sizes(folder: Path, paths: Sequence[Path]) -> Iterator[tuple[str, int]]:
    """The paths of files inside their folder, and their bytes."""
    names = relative_names(folder, paths)
    return ((name, os.stat(path).st_size) for name, path in zip(names, paths, strict=True))


def name_some(names: Iterable[str]) -> str:
    """The first few of the names, at least one, with how many more there are, and the verb."""
    first, *others = names
    named = [first, *others[: MOST_NAMED - 1]]
    if len(others) >= MOST_NAMED:
        named.append(f"{len(others) + 1 - MOST_NAMED} more")
    return f"{', '.join(named[:-1])} and {named[-1]} are" if others else f"{first} is"


def leads_out(path: str) -> bool:
    """Whether a path inside a folder leaves it."""
    return PurePath(path).is_absolute() or ".." in PurePath(path).parts


def _list_all(folder: Path, layout: Layout) -> list[Path]:
    if layout.names is not None:
        return _listed(folder, layout, layout.names)
    if layout.pattern is None:
        names = sorted(_walk(str(folder), "", ()), key=lambda name: name.split("/"))
        return [folder / name for name in names]
    try:
        found = _match(folder, layout.pattern)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(
            f"pattern {layout.pattern!r}: {error}; wanted a glob inside the folder, as in '*.png'"
        ) from None
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _listed(folder: Path, layout: Layout, listing: Path) -> list[Path]:
    names = _read_names(listing)
    outside = next((name for name in names if leads_out(name)), None)
    if outside is not None:
        raise ValueError(
            f"{listing} lists {outside!r}; wanted paths inside {folder}, without ..: correct the"
            f" list or name the folder that holds all {layout.things}"
        )
    paths = [folder / name for name in names]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{name_some(map(str, missing))} missing, listed by {listing}; wanted all of the list"
            f" among the {layout.things}, correct it or restore them"
        )
    return paths


def _match(folder: Path, pattern: str) -> list[Path]:
    """The files that match; raises ValueError, or NotImplementedError as Python has it, where the
    pattern is none or leads out of the folder.
    """
    if leads_out(pattern):
        raise ValueError("it leads out of the folder")
    return [path for path in folder.glob(pattern) if path.is_file()]


def _walk(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Names of the image files in a folder and those inside it; links are followed, but for one to
    a folder that it lies in.
    """
    status = os.stat(folder)
    here = status.st_dev, status.st_ino
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{name}/", (*above, here))
            elif name.lower().endswith(SUFFIXES) and entry.is_file():
                yield prefix + name


def _draw(n: int, size: int, seed: int) -> list[int]:
    """Numbers below n, in their order: those whose random keys are smallest."""
    # numpy promises the same bits from a bit generator in all versions, and no more than that.
    keys = np.random.PCG64(seed).random_raw(n)
    numbers: list[int] = np.sort(np.argsort(keys, kind="stable")[:size]).tolist()
    return numbers


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

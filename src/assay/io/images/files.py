"""Which files of a folder are a dataset's, in what order, and what tells them from others."""

from __future__ import annotations

import hashlib
import os
import re
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

NOT_UTF8 = re.compile(r"[\ud800-\udfff]")
"""What Python has in place of bytes of a file's name that are no UTF-8."""


def list_files(folder: Path, layout: Layout) -> list[Path]:
    """The files of a dataset, in the order of its examples.

    Raises:
        FileNotFoundError: there is no such folder or list, or a listed file is missing.
        ValueError: the pattern is not one, it or the list leads out of the folder, something is
            among the files that is none, as a link that leads nowhere, a name is no UTF-8, or there
            are fewer files than are to be drawn.
    """
    check_folder(folder, layout.things)
    found = _list_all(folder, layout)
    _check_names(found, layout.things)
    if layout.examples is None:
        return found
    if len(found) < layout.examples:
        raise ValueError(
            f"{folder} has {len(found)} {layout.things}, wanted at least the {layout.examples} that"
            " examples asks for: ask for fewer, or correct the folder, the pattern or the list"
        )
    return [found[number] for number in _draw(len(found), layout.examples, layout.seed)]


def check_folder(folder: Path, things: str) -> None:
    """Raise FileNotFoundError where there is no such folder of some things, and ValueError where
    its name is no UTF-8.
    """
    _check_names([folder], things)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder; wanted that of the {things}, check the path"
        )


def fingerprint_files(folder: Path, paths: Sequence[Path], layout: Layout) -> str:
    """SHA-256 (64 hex digits) of the layout and of what `digest_files` says."""
    said = layout.model_dump_json(exclude={"names"}) + digest_files(folder, paths)
    return hashlib.sha256(said.encode()).hexdigest()


def digest_files(folder: Path, paths: Sequence[Path]) -> str:
    """SHA-256 (64 hex digits) of every file's name and size, and of a sample of the content of a
    thousand of them at the most, evenly spread. What was read is not read twice in a process.
    """
    step = -(-len(paths) // MOST_SAMPLED) or 1
    most = sample_bytes(-(-len(paths) // step))
    digest = hashlib.sha256()
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


def _check_names(paths: Iterable[Path], things: str) -> None:
    """Raise ValueError for names that neither JSON nor a terminal can have."""
    odd = [_escape(str(path)) for path in paths if NOT_UTF8.search(str(path))]
    if odd:
        raise ValueError(
            f"{name_some(odd)} among the {things} by a name that is no UTF-8 (escaped here); wanted"
            " names that can be written down as text: rename what is not, or list the others with"
            " names"
        )


def _escape(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _list_all(folder: Path, layout: Layout) -> list[Path]:
    if layout.names is not None:
        return _listed(folder, layout, layout.names)
    odd: list[str] = []
    if layout.pattern is None:
        names = sorted(_walk(str(folder), "", (), odd), key=lambda name: name.split("/"))
        found = [folder / name for name in names]
    else:
        found = _match(folder, layout.pattern, odd)
        found.sort(key=lambda path: path.relative_to(folder).parts)
    if odd:
        raise ValueError(
            f"{name_some(map(_describe, sorted(odd)))} among the {layout.things} and no file that"
            " can be read: restore or remove what is none, or list the others with names"
        )
    return found


def _describe(path: str) -> str:
    """A path that is neither a file nor a folder, with what it is."""
    what = f"a link to {_escape(os.readlink(path))}" if os.path.islink(path) else ""
    try:
        os.stat(path)
    except OSError as error:
        what += f": {error.strerror}"
    return f"{_escape(path)} ({what or 'a device, socket or pipe'})"


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
            f"{name_some(map(str, missing))} missing or no file, listed by {listing}; wanted all of"
            f" the list among the {layout.things}, correct it or restore them"
        )
    return paths


def _match(folder: Path, pattern: str, odd: list[str]) -> list[Path]:
    """The files that match; what matches and is neither a file nor a folder comes to ``odd``."""
    found = []
    for path in _glob(folder, pattern):
        if os.path.isfile(path):
            found.append(path)
        elif not os.path.isdir(path):
            odd.append(str(path))
    return found


def _glob(folder: Path, pattern: str) -> list[Path]:
    fault: object = "it leads out of the folder"
    if not leads_out(pattern):
        try:
            return list(folder.glob(pattern))
        except (NotImplementedError, ValueError) as error:
            fault = error
    raise ValueError(
        f"pattern {pattern!r}: {fault}; wanted a glob inside the folder, as in '*.png'"
    )


def _walk(
    folder: str, prefix: str, above: tuple[tuple[int, int], ...], odd: list[str]
) -> Iterator[str]:
    """Names of the image files in a folder and those inside it; links are followed, but for one to
    a folder that it lies in. What has an image's name and is neither a file nor a folder comes to
    ``odd``, and any link that leads nowhere: a folder of images may have been there.
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
            is_image = name.lower().endswith(SUFFIXES)
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself, or to where one may not look
                is_folder = is_file = False
            if is_folder:
                yield from _walk(entry.path, f"{prefix}{name}/", (*above, here), odd)
            elif is_image and is_file:
                yield prefix + name
            elif not is_file and (is_image or entry.is_symlink()):
                odd.append(entry.path)


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

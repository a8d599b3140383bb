"""Atomic publishing: what is written appears under its name whole, or not at all.

Everything is written into a sibling `.<name>.partial-<random>`, flushed to the device and renamed
into place. While it works a writer holds an advisory lock (flock) on `.<name>.partial-lock`. The
kernel drops that lock with the process, so whoever holds it knows that every partial of that name
was left by a dead writer, and removes it, unless it can go on from it.
"""

import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from assay.io.locks import try_flock

logger = logging.getLogger(__name__)

INTERRUPTIONS = (OSError, KeyboardInterrupt, SystemExit, GeneratorExit)
"""What ends a writer through no fault of what it writes: a full disk, a signal."""


@contextmanager
def publishing_folder(
    path: str | os.PathLike[str], *, replace: bool = False, resume: str | None = None
) -> Iterator[Path]:
    """Yield a folder that becomes `path` when the block ends, and is deleted if the block raises.

    With `replace` an existing folder is swapped out: it is moved aside, the new one moved in, the
    old one deleted. A process killed between these two renames leaves no `path`, and both folders
    as partials: a reader sees the old, the new or nothing, never a mixture.

    The folder is empty; but with `resume`, which says what is written, it holds what an interrupted
    block with the same `path` and `resume` left in it. Such a block is one that was killed or
    raised one of `INTERRUPTIONS`.

    Raises:
        FileExistsError: `path` exists, and `replace` is false.
        ValueError: `path` is something else than a folder, or another live process is writing it.
    """
    target = _target(path)
    partial = _new_partial(target) if resume is None else resumable_folder(target, resume)
    with _sole_writer(target, spared=partial):
        _refuse_occupied(target, replace)
        partial.mkdir(exist_ok=resume is not None)
        try:
            yield partial
            _fsync_tree(partial)
            _refuse_occupied(target, replace)
            _move_in(partial, target)
        except BaseException as error:
            if resume is None or not isinstance(error, INTERRUPTIONS):
                shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def publishing_pieces(path: str | os.PathLike[str], *, resume: str) -> Iterator[tuple[Path, Path]]:
    """Yield a folder that replaces `path` when the block ends, and a folder for notes of which
    pieces of it are whole, which is deleted then.

    If the block raises, whatever it raises, or is killed, both are kept for the next block with the
    same `path` and `resume`, which says what is written; but they are deleted where there is no
    note. The block has every piece on the device before its note.

    Raises:
        ValueError: `path` is something else than a folder, or another live process is writing it.
    """
    target = _target(path)
    partial = resumable_folder(target, resume)
    content, notes = partial / "content", partial / "notes"
    with _sole_writer(target, spared=partial):
        _refuse_occupied(target, replace=True)
        try:
            for folder in (content, notes):
                folder.mkdir(parents=True, exist_ok=True)
            yield content, notes
            _fsync_tree(content)
            _refuse_occupied(target, replace=True)
            _move_in(content, target)
        except BaseException:
            if not (notes.is_dir() and any(notes.iterdir())):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(partial, ignore_errors=True)


def resumable_folder(path: str | os.PathLike[str], resume: str) -> Path:
    """Where `publishing_folder` keeps `path` until it is whole; it need not exist."""
    return _partial(Path(os.path.abspath(path)), hashlib.sha256(resume.encode()).hexdigest()[:16])


def discard_partials(path: str | os.PathLike[str]) -> None:
    """Remove what interrupted writers of `path` left; raises ValueError if a live process is
    writing it.
    """
    target = Path(os.path.abspath(path))
    if target.parent.is_dir():
        with _sole_writer(target):
            logger.debug("nothing is left that was begun of %s", target)


@contextmanager
def publish_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a file to write, which replaces `path` when the block ends, and is deleted
    if the block raises.

    Raises:
        FileNotFoundError: the block wrote nothing.
        ValueError: `path` is a folder, or another live process is writing it.
    """
    target = _target(path)
    with _sole_writer(target):
        if target.is_dir():
            raise ValueError(
                f"{target} is a folder, wanted a file; choose another name or remove the folder"
            )
        partial = _new_partial(target)
        try:
            with naming(target):
                yield partial
            flush(partial)
            os.replace(partial, target)
            flush(target.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def free_bytes(path: str | os.PathLike[str]) -> int:
    """What the disk has room for where `path` is, or is to be."""
    return shutil.disk_usage(existing(path)).free


def existing(path: str | os.PathLike[str]) -> Path:
    """The place, or the nearest folder above it that exists."""
    place = Path(os.path.abspath(path))
    while not place.exists():
        place = place.parent
    return place


def _target(path: str | os.PathLike[str]) -> Path:
    target = Path(os.path.abspath(path))
    if not target.name:
        raise ValueError(
            f"found {str(path)!r}, wanted the path of a file or folder that has a name"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _refuse_occupied(target: Path, replace: bool) -> None:
    if not os.path.lexists(target):
        return
    if not replace:
        raise FileExistsError(
            f"{target} exists already and is not replaced; remove it or publish under another name"
        )
    if target.is_symlink() or not target.is_dir():
        raise ValueError(
            f"{target} is not a folder, so no folder can replace it; remove it or choose another"
            " name"
        )


def _move_in(partial: Path, target: Path) -> None:
    old = _new_partial(target) if target.exists() else None
    if old:
        os.rename(target, old)
    try:
        os.rename(partial, target)
    except BaseException:
        if old:
            os.rename(old, target)
        raise
    flush(target.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _sole_writer(target: Path, spared: Path | None = None) -> Iterator[None]:
    """Hold the right to write `target`, having removed what dead writers of it left, but for
    `spared`.
    """
    lock = target.with_name(f".{target.name}.partial-lock")
    descriptor = _acquire(lock, target)
    try:
        _remove_stale(target, spared)
        yield
    finally:
        # It may be another user's, in a folder where everyone removes only what is theirs.
        with suppress(PermissionError):
            lock.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(lock: Path, target: Path) -> int:
    while True:
        descriptor = _open_lock(lock, target)
        with ExitStack() as unless_held:
            unless_held.callback(os.close, descriptor)
            if not try_flock(descriptor, fcntl.LOCK_EX, lock):
                raise ValueError(
                    f"{target} is being written by another live process; wait for it or stop it"
                )
            # The previous holder unlinks the file before it lets go: a lock on an unlinked file
            # guards nothing.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                    unless_held.pop_all()
                    return descriptor


def _open_lock(lock: Path, target: Path) -> int:
    """A descriptor to lock; raises ValueError if the file is another user's, who lets nobody see
    whether the writer lives.
    """
    try:
        return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except PermissionError:
        if not os.path.lexists(lock):
            raise
    # What another user's dead writer left: to be locked it need only be read.
    try:
        return os.open(lock, os.O_RDONLY | os.O_NOFOLLOW)
    except PermissionError:
        raise ValueError(
            f"{lock} belongs to user {lock.lstat().st_uid}, who is writing {target} or was killed"
            " while writing it; wait for their run, or if there is none remove the file"
        ) from None


def _new_partial(target: Path) -> Path:
    return _partial(target, secrets.token_hex(8))


def _partial(target: Path, digits: str) -> Path:
    return target.with_name(f".{target.name}.partial-{digits}")


def _remove_stale(target: Path, spared: Path | None) -> None:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.partial-[0-9a-f]{{16}}")
    for entry in target.parent.iterdir():
        if not pattern.fullmatch(entry.name) or entry == spared:
            continue
        logger.info("removing %s, left by a writer that died", entry)
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with suppress(PermissionError):  # another user's
                entry.unlink(missing_ok=True)


@contextmanager
def naming(path: str | os.PathLike[str], note: str = "") -> Iterator[None]:
    """Have an OSError that names no file, as that of a full disk does not, name `path`; `note` is
    added to what it says.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, f"{error.strerror}{note}", os.fspath(path)) from error


def flush(path: str | os.PathLike[str]) -> None:
    """Have what was written to a file or folder on the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            flush(os.path.join(parent, name))
        flush(parent)

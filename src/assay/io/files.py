"""Files in a folder that came from elsewhere: read only where they lie inside it."""

import os
import re
import stat
from pathlib import Path

from assay.io.strict_json import MAX_JSON_BYTES

METADATA_NAME = "metadata.json"
"""What a folder says of itself: of shards, and of codes."""

COPY_AGAIN = "copy the folder of shards again, whole"


def real_folder(path: str | os.PathLike[str]) -> Path:
    """The folder at `path`, symbolic links resolved; raises FileNotFoundError, or ValueError if it
    is not a folder.
    """
    try:
        folder = Path(os.path.realpath(path, strict=True))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing; wanted a folder of shards, check the path"
        ) from None
    except OSError as error:
        raise ValueError(
            f"{path} cannot be opened: {error.strerror}; wanted a folder of shards"
        ) from error
    if not folder.is_dir():
        raise ValueError(
            f"{path} is not a folder; wanted the folder of shards, that which holds {METADATA_NAME}"
        )
    return folder


def contained_file(
    folder: Path, name: str, remedy: str = COPY_AGAIN
) -> tuple[Path, os.stat_result]:
    """The real path and the status of a regular file that lies inside `folder`.

    `remedy` says what to do where the file is missing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a regular file, or a symbolic link that leads out of the folder, and
            not to a blob of the hub's cache that the folder lies in.
    """
    path = folder / name
    try:
        real = Path(os.path.realpath(path, strict=True))
        info = real.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; {remedy}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; restore it") from error
    home = Path(os.path.realpath(folder))
    if home not in real.parents and real.parent != _blobs(home):
        raise ValueError(
            f"{path} leads out of the folder to {real}; wanted a file inside it, put it there"
        )
    if not stat.S_ISREG(info.st_mode):
        raise ValueError(f"{path} is not a regular file; restore it")
    return real, info


def _blobs(folder: Path) -> Path | None:
    """Where Hugging Face's cache keeps what a folder in it links to:
    <repository>/snapshots/<revision>/... and <repository>/blobs.
    """
    for revision in (folder, *folder.parents):
        repository = revision.parent.parent
        if revision.parent.name == "snapshots" and re.match(
            r"(models|datasets|spaces)--", repository.name
        ):
            return repository / "blobs"
    return None


def read_json_bytes(folder: Path, name: str, remedy: str = COPY_AGAIN) -> bytes:
    """The bytes of a file of at most 64 MiB; raises FileNotFoundError, or ValueError if it is
    larger or cannot be read.
    """
    path, info = contained_file(folder, name, remedy)
    if info.st_size > MAX_JSON_BYTES:
        raise ValueError(
            f"{path} has {info.st_size} bytes, wanted at most {MAX_JSON_BYTES}; restore the file"
        )
    return read_file(path)


def read_file(path: Path) -> bytes:
    """The bytes of a file; raises FileNotFoundError, or ValueError if it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}; restore it") from error

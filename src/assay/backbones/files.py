"""A checkpoint's files: a folder on a disk, or fetched from the Hub. Weights are safetensors; a
pickle is never opened.
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from assay.io.hub import PREFIX, commit_of, fetch_snapshot, parse_address
from assay.io.sampling import sample_bytes, sampled_digest, whole_digest
from assay.io.strict_json import read_json_file, shown

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
WANTED = (CONFIG, "preprocessor_config.json", "processor_config.json", INDEX, "model*.safetensors")
"""What is fetched of a repository."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


@dataclass(frozen=True)
class Checkpoint:
    """Files of a model.

    Attributes:
        typed: what was asked for, for messages.
        name: its name on the Hub, or its folder's.
        folder: where it lies.
        commit: of the Hub; None: it is from a disk.
        config: what config.json says.
        shapes: of the weights, by name.
        weights: the files that hold them.
    """

    typed: str
    name: str
    folder: Path
    commit: str | None
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    weights: tuple[Path, ...]

    def identity(self) -> dict[str, str]:
        """The commit, and digests (SHA-256) of config.json and of the weights. Those of a folder
        are hashed whole, since who edits a model may edit one block; a commit of the Hub tells its
        files already, and a sample of them is enough.
        """
        digest = hashlib.sha256()
        for path in self.weights:
            content = (
                whole_digest(path)
                if self.commit is None
                else sampled_digest(path, sample_bytes(len(self.weights)))
            )
            digest.update(f"{path.name} {path.stat().st_size} {content}\n".encode())
        config = hashlib.sha256((self.folder / CONFIG).read_bytes()).hexdigest()
        commit = {} if self.commit is None else {"revision": self.commit}
        return commit | {"config": config, "weights": digest.hexdigest()}


def find_checkpoint(typed: str, revision: str | None) -> Checkpoint:
    """The files of a folder, or of `owner/name` or `hf:owner/name[@revision]` on the Hub: fetched,
    or from its cache where there is no network.

    Args:
        typed: which. What names a folder is that folder.
        revision: branch, tag or commit on the Hub; None: that of ``typed``, or the default branch.

    Raises:
        FileNotFoundError: there is no such folder and no such repository, or a file is missing.
        ValueError: it is no address, a folder with a revision, or a file that cannot be read;
            the weights are pickled.
    """
    folder, commit = Path(typed), None
    if typed.startswith(PREFIX) or not folder.is_dir():
        folder, commit = _fetch(typed, revision)
    elif revision is not None:
        raise ValueError(
            f"{typed}: found a folder and the revision {revision}, wanted no revision, which is of"
            " the Hub: leave it out"
        )
    name = parse_address(typed).repository if commit else Path(os.path.abspath(typed)).name
    weights = _weights(typed, folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weights:
        shapes |= _shapes(path)
    return Checkpoint(typed, name, folder, commit, _config(folder), shapes, weights)


@functools.cache
def _fetch(typed: str, revision: str | None) -> tuple[Path, str]:
    """Within a process an address stays what it was, whatever its branch becomes."""
    plain = typed.removeprefix(PREFIX)
    if plain == typed and (typed.count("/") != 1 or typed.startswith((".", "/", "~"))):
        raise FileNotFoundError(
            f"found no folder {typed}; wanted one that transformers saved, owner/name or"
            " hf:owner/name[@revision] of the Hub, timm:NAME, or python:package.module:function"
        )
    address = parse_address(f"{plain}@{revision}" if revision else plain)
    if address.inside:
        raise ValueError(
            f"found {typed} with revision {revision}, wanted hf:owner/name[@revision]: a repository"
            " holds one model, and a revision has no slash"
        )
    snapshot = fetch_snapshot(typed, address, WANTED)
    return snapshot, commit_of(typed, snapshot)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: found no {CONFIG}, wanted a folder as save_pretrained leaves it"
        )
    config = read_json_file(path)
    if not isinstance(config, dict):
        raise ValueError(  # noqa: TRY004
            f"{path}: found {shown(config)[:80]}, wanted an object: restore the file"
        )
    return config


def _weights(typed: str, folder: Path) -> tuple[Path, ...]:
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    if (folder / INDEX).is_file():
        return _indexed(folder)
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickled:
        raise ValueError(
            f"{typed}: found {pickled[0]}, wanted {WEIGHTS}: a pickle runs code when it is opened,"
            " so none is; where you trust it, load it and save it with save_pretrained"
        )
    raise FileNotFoundError(
        f"{typed}: found neither {WEIGHTS} nor {INDEX} in {folder}, wanted a model that"
        " save_pretrained left, as safetensors"
    )


def _indexed(folder: Path) -> tuple[Path, ...]:
    index = read_json_file(folder / INDEX)
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict) or not named:
        raise ValueError(f"{folder / INDEX}: found no weight_map, wanted the file of each weight")
    names = {str(name) for name in named.values()}
    for name in names:
        # A name comes from a file: it leads nowhere else.
        if PurePosixPath(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{folder / INDEX}: found {shown(name)}, wanted the name of a safetensors file"
                " beside it"
            )
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise FileNotFoundError(
            f"{folder}: found no {missing[0]}, which {INDEX} names: fetch it again"
        )
    return tuple(folder / name for name in sorted(names))


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """From the header alone: a file that was cut off is told as well."""
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: found no whole safetensors file ({shown(error)}): fetch it again"
        ) from error

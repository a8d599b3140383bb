"""Which library's files lie at a path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from assay.io.saes.stored import Library

DEEPEST = 4
"""Folders below a path that are searched: `runs/<id>/checkpoint/sae.pt` is two deep."""


@dataclass(frozen=True)
class Found:
    """Files of one autoencoder: its weights and, where there is one, its configuration."""

    library: Library | None
    weights: Path
    config: Path | None = None


LAYOUTS: tuple[tuple[str, str | None, Library | None], ...] = (
    ("sae_weights.safetensors", "cfg.json", "SAELens"),
    ("sae.safetensors", "cfg.json", "sparsify"),
    ("ae.pt", "config.json", "dictionary_learning"),
    ("weights.pt", "config.json", "ViT-Prisma"),
    ("sae.pt", None, "saev"),
    ("model.pt", None, "overcomplete"),
    ("state_dict.pt", None, "overcomplete"),
)
"""By the names of the weights, in this order: the configuration beside them, and whose they are."""


def locate(path: Path) -> Found:
    """The files of the one autoencoder at a path: a file, a folder of its files, or a folder that
    holds such a folder somewhere below.

    Raises:
        FileNotFoundError: there is nothing, or no autoencoder in it.
        ValueError: there are several.
    """
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder; correct the path")
    found = _below(path, DEEPEST)
    if not found:
        names = ", ".join(sorted({weights for weights, _, _ in LAYOUTS}))
        raise FileNotFoundError(
            f"{path} holds no autoencoder: found none of {names}, and no other .pt or .safetensors:"
            " name the file"
        )
    if len(found) > 1:
        some = ", ".join(str(each.weights.relative_to(path)) for each in found[:5])
        raise ValueError(
            f"{path} holds {len(found)} autoencoders ({some}{', ...' if len(found) > 5 else ''}),"
            " wanted one: name its folder or file"
        )
    return found[0]


def _of_file(path: Path) -> Found:
    for weights, config, library in LAYOUTS:
        if path.name == weights:
            beside = path.with_name(config) if config else None
            return Found(library, path, beside)
    beside = path.with_name("config.json")
    return Found(None, path, beside if beside.is_file() else None)


def _below(folder: Path, depth: int) -> list[Found]:
    """The autoencoders in a folder; if there is none, those in the folders in it."""
    for weights, _, _ in LAYOUTS:
        if (folder / weights).is_file():
            return [_of_file(folder / weights)]
    alone = sorted(file for file in folder.iterdir() if file.suffix in (".pt", ".safetensors"))
    if alone:
        return [_of_file(file) for file in alone]
    if not depth:
        return []
    folders = sorted(
        each for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")
    )
    return [found for each in folders for found in _below(each, depth - 1)]

"""Which library's files lie at a path."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from assay.io.saes import saev
from assay.io.saes.configs import read_config
from assay.io.saes.stored import Library

DEEPEST = 4
"""Folders below a path that are searched: `runs/<id>/checkpoint/sae.pt` is two deep."""


WEIGHTS = (".pt", ".pth", ".safetensors")

BESIDE = re.compile(
    r"(optimizer|lr_scheduler)(_\d+)?\.pt|((rank_\d+|trainer)_)?state\.pt"
    r"|.*log_feature_sparsity\.pt|sparsity\.safetensors|activations_store_state\.safetensors"
)
"""What trainers leave beside an autoencoder, or above the folders of several."""


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
    found = _below(path, DEEPEST, set())
    if not found:
        names = ", ".join(sorted({weights for weights, _, _ in LAYOUTS}))
        raise FileNotFoundError(
            f"{path} holds no autoencoder: found none of {names}, and no other .pt, .pth or"
            " .safetensors: name the file"
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
        # Of these names, which anyone may give, the content and what is beside decide.
        if path.name == weights and (config or _is_named_well(path, library)):
            beside = path.with_name(config) if config else None
            if library == "dictionary_learning" and beside is not None and not beside.is_file():
                beside = None
            return Found(library, path, beside)
    return _of_other_name(path)


def _is_named_well(path: Path, library: Library | None) -> bool:
    """Whether a file that has its configuration in it is of the library that its name says."""
    if library == "saev":
        return not _is_archive(path)
    return not saev.begins(path) and not path.with_name("config.json").is_file()


def _is_archive(path: Path) -> bool:
    """Whether a file begins as those of torch.save do, and saev's do not."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _of_other_name(path: Path) -> Found:
    """Whose a file is that bears no library's name, by how it begins and what is beside it."""
    if path.suffix not in (".pt", ".pth"):
        return Found(None, path)
    if saev.begins(path):
        return Found("saev", path)
    if path.parent.name == "checkpoints" and re.fullmatch(r"ae_\d+\.pt", path.name):
        # dictionary_learning's, of an unfinished training.
        config = path.parent.with_name("config.json")
        return Found("dictionary_learning", path, config if config.is_file() else None)
    config = path.with_name("config.json")
    said = read_config(config) if config.is_file() else {}
    if "trainer" in said:
        return Found("dictionary_learning", path, config)
    if "layer_subtype" in said or re.fullmatch(r"n_images_\d+\.pt", path.name):
        # Its checkpoints are called so, and early ones have their configuration in them only.
        return Found("ViT-Prisma", path, config)
    return Found("overcomplete", path)


def _below(folder: Path, depth: int, seen: set[str]) -> list[Found]:
    """The autoencoders in a folder; if there is none, those in the folders in it."""
    real = os.path.realpath(folder)
    if real in seen:
        return []
    seen.add(real)
    named: dict[Library | None, Path] = {}
    for weights, _, library in LAYOUTS:
        # Others save a state dict beside theirs, too.
        is_beside = weights == "state_dict.pt" and named
        if not is_beside and (folder / weights).is_file():
            named.setdefault(library, folder / weights)
    if named:
        return [_of_file(file) for file in named.values()]
    within = sorted(folder.iterdir())
    alone = [
        file
        for file in within
        if file.suffix in WEIGHTS and not BESIDE.fullmatch(file.name) and file.is_file()
    ]
    if alone:
        return [_of_file(file) for file in alone]
    if not depth:
        return []
    folders = [each for each in within if each.is_dir() and not each.name.startswith(".")]
    return [found for each in folders for found in _below(each, depth - 1, seen)]

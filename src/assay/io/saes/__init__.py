"""Autoencoders as the libraries that trained them saved them: a module for each library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from assay.io.saes import (
    dictionary_learning,
    hand_made,
    overcomplete,
    prisma,
    saelens,
    saev,
    sparsify,
)
from assay.io.saes.locate import Found, locate
from assay.io.saes.stored import Library, Recorded, Settings, StoredSae

__all__ = ["Library", "Recorded", "Settings", "StoredSae", "hand_made", "read_sae"]


def read_sae(path: Path, settings: Settings | None = None) -> StoredSae:
    """Read an autoencoder as its library saved it. Nothing in a file is run.

    Args:
        path: its file, its folder, or a folder with one autoencoder somewhere below.
        settings: what the file does not say.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, is of no library that is known here, has something that the
            formula would pass over, or contradicts what is typed.
    """
    try:
        found = locate(path)
        stored = _read(found, settings or Settings())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}; restore it") from error
    files = (file for file in (found.weights, found.config) if file and file.is_file())
    return replace(stored, files=tuple(files))


def _read(found: Found, settings: Settings) -> StoredSae:
    match found.library:
        case "saev":
            return saev.read(found.weights, settings)
        case "sparsify":
            assert found.config is not None
            return sparsify.read(found.weights, found.config, settings)
        case "SAELens":
            assert found.config is not None
            return saelens.read(found.weights, found.config, settings)
        case "ViT-Prisma":
            assert found.config is not None
            return prisma.read(found.weights, found.config, settings)
        case "dictionary_learning":
            return dictionary_learning.read(found.weights, found.config, settings)
        case "overcomplete":
            return overcomplete.read(found.weights, settings)
        case _:
            if found.weights.name.endswith((".pkl", ".pkl.gz")):
                raise ValueError(
                    f"{found.weights} is a bare pickle, which would have to be run: load it in"
                    " ViT-Prisma, and save_model it as weights.pt"
                )
            raise ValueError(
                f"{found.weights} is of no library that is known here: save it as saev, SAELens,"
                " dictionary_learning, overcomplete, sparsify or ViT-Prisma do, or give it as"
                " `weights` with its formula typed"
            )

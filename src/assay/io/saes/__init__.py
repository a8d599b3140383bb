"""Autoencoders as the libraries that trained them saved them: a module for each library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from assay.io.saes import hand_made, prisma, saelens, saev, sparsify
from assay.io.saes.configs import read_config
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
    found = locate(path)
    stored = _read(found, settings or Settings())
    files = (file for file in (found.weights, found.config) if file and file.is_file())
    return replace(stored, files=tuple(files))


def _read(found: Found, settings: Settings) -> StoredSae:
    match found.library or _guess(found):
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


def _guess(found: Found) -> Library | None:
    """Whose a file of another name is, by how it begins, or by the configuration beside it."""
    if found.weights.suffix != ".pt":
        return None
    if saev.begins(found.weights):
        return "saev"
    if found.config is not None and "layer_subtype" in read_config(found.config):
        return "ViT-Prisma"
    return None

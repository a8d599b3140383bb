"""The libraries that models are of: found by their installed versions, and imported at use."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from assay.backbones.description import Preprocessing


def library_identity(library: str, remedy: str) -> dict[str, str]:
    """The library and its version, without an import of it.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return {"library": library, "version": version(library)}
    except PackageNotFoundError:
        raise ValueError(f"found no {library}, which computes this model: {remedy}") from None


def normalization_identity(preprocessing: Preprocessing) -> dict[str, str]:
    """What is done to a pixel."""
    mean, std = (" ".join(map(repr, each)) for each in (preprocessing.mean, preprocessing.std))
    return {"mean": mean, "std": std}

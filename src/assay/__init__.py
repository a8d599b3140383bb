"""Assay: what a dictionary of vision features is worth, beside k-means and PCA."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.sae import load_sae

__all__ = ["__version__", "load_sae"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: numerics, which are in this package, run where neither
    # pydantic nor safetensors is installed.
    if name == "load_sae":
        from assay.sae import load_sae

        return load_sae
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""From what is typed to a model."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch

from assay.backbones import own, timm_models, transformers_models
from assay.backbones.description import Backbone, Description, Precision


def look(model: str, revision: str | None = None) -> Description:
    """What a model is, from its files alone: neither transformers nor timm is imported.

    Args:
        model: a folder that transformers saved, `owner/name` or `hf:owner/name[@revision]` of the
            Hub, `timm:NAME`, or `python:package.module:function` of one's own.
        revision: branch, tag or commit on the Hub; None: the default branch.

    Raises:
        FileNotFoundError: it is neither there nor to be fetched, or a file is missing.
        ValueError: it cannot be read: its weights are pickled, it needs code of its own, it is of
            no family that is known, or its library is not installed.
    """
    description: Description = _library(model).look(model, revision)
    return description


def open_backbone(
    model: str, revision: str | None, *, device: torch.device, precision: Precision
) -> Backbone:
    """A model that is ready to be shown images.

    Args:
        model: as in `look`.
        revision: as in `look`.
        device: where it computes.
        precision: of its weights and what it computes with them.

    Raises:
        FileNotFoundError: as in `look`.
        ValueError: as in `look`; weights are missing or do not fit.
    """
    backbone: Backbone = _library(model).open_backbone(
        model, revision, device=device, precision=precision
    )
    return backbone


@dataclass(frozen=True)
class BackboneHandle:
    """A model that has not been loaded.

    Attributes:
        model: which; see `look`.
        revision: on the Hub.
    """

    model: str
    revision: str | None = None

    @property
    def description(self) -> Description:
        """What it is. Raises what `look` raises."""
        return look(self.model, self.revision)

    def open(self, *, device: torch.device, precision: Precision) -> Backbone:
        """Load it. Raises what `open_backbone` raises."""
        return open_backbone(self.model, self.revision, device=device, precision=precision)


def _library(model: str) -> ModuleType:
    for library in (timm_models, own):
        if model.startswith(library.PREFIX):
            return library
    return transformers_models

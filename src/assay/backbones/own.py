"""Backbones of the user's own code: `python:package.module:function`."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

import torch

from assay.backbones.description import Backbone, Description, Precision
from assay.io.strict_json import shown

PREFIX = "python:"


@functools.cache
def look(typed: str, revision: str | None) -> Description:
    """What the function's model is: it is made once, on the CPU, and thrown away.

    Raises:
        ValueError: see `open_backbone`.
    """
    return open_backbone(
        typed, revision, device=torch.device("cpu"), precision="float32"
    ).description


def open_backbone(
    typed: str, revision: str | None, *, device: torch.device, precision: Precision
) -> Backbone:
    """What the function gives for a device and a precision.

    Raises:
        ValueError: there is no such function, it gives no backbone, or a revision is asked for,
            which it would not see.
    """
    if revision is not None:
        raise ValueError(
            f"{typed}: found the revision {revision}, wanted none: the function says what its model"
            " is"
        )
    backbone = _function(typed)(device, precision)
    description = getattr(backbone, "description", None)
    if not isinstance(description, Description) or not callable(getattr(backbone, "record", None)):
        raise ValueError(  # noqa: TRY004
            f"{typed}: found {type(backbone).__name__}, wanted an assay.backbones.Backbone, as"
            " CallableBackbone is"
        )
    return backbone  # type: ignore[no-any-return]


def _function(typed: str) -> Any:
    module, _, name = typed.removeprefix(PREFIX).partition(":")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{typed}: found no such function ({shown(error)}), wanted"
            " python:package.module:function, of a module that Python finds: add its folder to"
            " PYTHONPATH"
        ) from error
    if not callable(function):
        raise ValueError(  # noqa: TRY004
            f"{typed}: found {type(function).__name__}, wanted a function of a device and a"
            " precision that returns a backbone"
        )
    return function

"""Hooks whose modules, with torch and MLflow behind them, are imported when a session begins, and not by `kedro --help`."""

from __future__ import annotations

import functools
import importlib
from typing import Any


class LateHook:
    """Stands in Kedro's settings for a hook that is imported and made when a session looks for its methods.

    Args:
        module, name: of the hook's class, which is made without arguments.
    """

    def __init__(self, module: str, name: str) -> None:
        self._where = module, name

    @functools.cached_property
    def _hook(self) -> Any:
        module, name = self._where
        return getattr(importlib.import_module(module), name)()

    def __dir__(self) -> list[str]:
        return dir(self._hook)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # Kedro's settings and pluggy ask for such; no hook's name begins so
            raise AttributeError(name)
        return getattr(self._hook, name)

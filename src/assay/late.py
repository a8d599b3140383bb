"""Hooks whose modules, with torch and MLflow behind them, are imported when a session begins, and
not by `kedro --help`.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl


class LateHooks:
    """The one hook in Kedro's settings, which are read for any command: it registers the others.

    Args:
        names: of the hooks' classes, `assay.tracking:TrackingHook`, which are made without
            arguments, once per process.
    """

    def __init__(self, *names: str) -> None:
        self._names = names

    @hook_impl(tryfirst=True)
    def after_context_created(self, context: KedroContext) -> None:
        """Import and register the other hooks, and pass this first call on to them."""
        for hook in self.hooks:
            if not context._hook_manager.is_registered(hook):
                context._hook_manager.register(hook)
                if hasattr(hook, "after_context_created"):  # the call in progress is not to it
                    hook.after_context_created(context=context)

    @functools.cached_property
    def hooks(self) -> tuple[Any, ...]:
        """The others."""
        pairs = (name.split(":") for name in self._names)
        return tuple(getattr(importlib.import_module(module), name)() for module, name in pairs)

"""The configuration that is in force: typed, checked, and known before the pipelines are built from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from kedro.config import OmegaConfigLoader
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.framework.project import settings
from kedro.utils import find_kedro_project

from assay.parameters import Parameters, parse_parameters
from assay.plan import check_shards

_current: dict[str, tuple[Path, Parameters]] = {}


def current_configuration() -> tuple[Path, Parameters]:
    """The project's root folder and its typed parameters.

    Inside a session they are the session's. Outside of one (`kedro registry list`, `kedro viz`, which runs no hooks) they are read
    from the environment that the command line or KEDRO_ENV names.
    """
    if "session" not in _current:
        project = find_kedro_project(Path.cwd()) or Path.cwd()
        loader = OmegaConfigLoader(str(project / "conf"), env=_named_environment(), **settings.CONFIG_LOADER_ARGS)
        return project, parse_parameters(loader["parameters"])
    return _current["session"]


def _named_environment() -> str | None:
    context = click.get_current_context(silent=True)
    named = context.params.get("env") if context else None
    return named or os.environ.get("KEDRO_ENV")


class ConfigurationHook:
    """Checks the parameters of a session, and the shards that they name, before its pipelines are built."""

    @hook_impl(tryfirst=True)  # before kedro-mlflow opens its database
    def after_context_created(self, context: KedroContext) -> None:
        raw: dict[str, Any] = context.config_loader["parameters"]
        parameters = parse_parameters(raw)
        project = Path(context.project_path)
        check_shards(parameters, project)
        _current["session"] = project, parameters

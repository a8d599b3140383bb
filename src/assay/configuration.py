"""The configuration that is in force: typed, checked, and known before the pipelines are built from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from kedro.config import OmegaConfigLoader
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.framework.project import pipelines, settings
from kedro.io import AbstractDataset, DataCatalog
from kedro.utils import find_kedro_project

from assay.io.datasets import ImagesDataset, SaevInferenceDataset, TensorsDataset
from assay.parameters import DictionaryParameters, Parameters, parse_parameters
from assay.plan import check_shards, find_images

_current: dict[str, tuple[Path, Parameters]] = {}


def current_configuration() -> tuple[Path, Parameters]:
    """The project's root folder and its typed parameters.

    Inside a session they are the session's. Outside of one (`kedro registry list`, `kedro viz`, which runs no hooks) they are read
    from the environment that the command line or KEDRO_ENV names.
    """
    if "session" not in _current:
        project = find_kedro_project(Path.cwd()) or Path.cwd()
        context = click.get_current_context(silent=True)
        return project, read_parameters(project, context.params.get("env") if context else None)
    return _current["session"]


def read_parameters(project: Path, environment: str | None) -> Parameters:
    """The typed parameters of a project's environment; without one, of that which KEDRO_ENV names."""
    environment = environment or os.environ.get("KEDRO_ENV")
    loader = OmegaConfigLoader(str(project / "conf"), env=environment, **settings.CONFIG_LOADER_ARGS)
    return parse_parameters(loader["parameters"])


class ConfigurationHook:
    """Checks the parameters of a session before its pipelines are built, and the shards that they name before it runs."""

    @hook_impl(tryfirst=True)  # before kedro-mlflow opens its database
    def after_context_created(self, context: KedroContext) -> None:
        raw: dict[str, Any] = context.config_loader["parameters"]
        parameters = parse_parameters(raw)
        _check_paths(parameters, context.config_loader["catalog"])
        _current["session"] = Path(context.project_path), parameters
        pipelines.configure("assay.pipeline_registry")  # a second session in one process has layers of its own

    @hook_impl
    def after_catalog_created(self, catalog: DataCatalog) -> None:
        """Add the images and what the user's own dictionaries are read from: how many there are, and where, only the parameters say."""
        project, parameters = current_configuration()
        images = find_images(parameters, project)
        if images is not None:
            catalog["images_probe_val"] = ImagesDataset(filepath=str(images[0]), layout=images[1])
        for shared, dictionary in parameters.dictionaries.items():
            for name, seed in dictionary.by_seed(shared).items():
                for layer in parameters.layers:
                    for entry, dataset in _sources(f"layer_{layer}", name, seed, dictionary, parameters, project):
                        catalog[entry] = dataset

    @hook_impl(tryfirst=True)
    def before_pipeline_run(self) -> None:
        project, parameters = current_configuration()
        check_shards(parameters, project)


def _sources(
    layer: str,
    name: str,
    seed: int | None,
    dictionary: DictionaryParameters,
    parameters: Parameters,
    project: Path,
) -> Iterator[tuple[str, AbstractDataset[Any, Any]]]:
    def place(path: str) -> str:
        return str(project / path.replace("{layer}", layer).replace("{seed}", str(seed)))

    if dictionary.weights is not None:
        path = place(dictionary.weights)
        yield f"{layer}.weights_{name}", TensorsDataset(filepath=path, load_args={"any_schema": True})
    if dictionary.saev_run is not None:
        run = place(dictionary.saev_run)
        for split in ("probe_train", "probe_val"):
            shards = str(project / getattr(parameters.shards, split))
            yield f"{layer}.codes_{name}_{split}", SaevInferenceDataset(run=run, shards=shards, part="codes")
        shards = str(project / parameters.shards.val)
        yield f"{layer}.metrics_{name}", SaevInferenceDataset(run=run, shards=shards, part="metrics")


def _check_paths(parameters: Parameters, catalog: dict[str, Any]) -> None:
    """What is checked must be what is read: the parameters and the catalog take their paths from the same globals."""
    wanted = {f"shards.{split}": (f"shards_{split}", path) for split, path in parameters.shards}
    if parameters.standardize.statistics is not None:
        wanted["standardize.statistics"] = ("{layer}.given_statistics", parameters.standardize.statistics)
    for name, (entry, path) in wanted.items():
        if str(catalog[entry]["filepath"]) != path:
            raise ValueError(
                f"Parameter `{name}` is {path}, but the catalog reads {catalog[entry]['filepath']}:"
                " set it in globals.yml or with --params, not in parameters.yml."
            )

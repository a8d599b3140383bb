"""The configuration that is in force: typed, checked, and known before the pipelines are built from
it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml
from kedro.config import OmegaConfigLoader
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.framework.project import pipelines, settings
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline
from kedro.utils import find_kedro_project
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from assay.encodings import Model, layer_name
from assay.parameters import DictionaryParameters, Parameters, parse_parameters
from assay.yaml_files import check_yaml

if TYPE_CHECKING:
    from kedro.io import AbstractDataset

GLOBALS: dict[str, Any] = {
    "shards": dict.fromkeys(("fit", "val", "probe_train", "probe_val")),
    "statistics": None,
}
"""The names in globals.yml, and those inside them."""

_current: dict[str, tuple[Path, Parameters]] = {}


class ConfigurationError(click.ClickException, ValueError):
    """What is wrong with the configuration, which any command tells in these words, without a
    traceback.
    """


@contextmanager
def _told_shortly() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigurationError(str(error)) from None


def current_configuration() -> tuple[Path, Parameters]:
    """The project's root folder and its typed parameters.

    Inside a session they are the session's. Outside of one (`kedro registry list`, `kedro viz`,
    which runs no hooks) they are read from the environment that the command line or KEDRO_ENV
    names.
    """
    if "session" not in _current:
        project = find_kedro_project(Path.cwd()) or Path.cwd()
        context = click.get_current_context(silent=True)
        return project, read_parameters(project, context.params.get("env") if context else None)
    return _current["session"]


def read_parameters(
    project: Path, environment: str | None, runtime_params: dict[str, Any] | None = None
) -> Parameters:
    """The typed parameters of an environment, with some overridden as by --params; without one, of
    that which KEDRO_ENV names.
    """
    environment = environment or os.environ.get("KEDRO_ENV")
    loader = ConfigLoader(
        str(project / "conf"), environment, runtime_params, **settings.CONFIG_LOADER_ARGS
    )
    with _told_shortly():
        return parse_parameters(loader["parameters"])


class ConfigLoader(OmegaConfigLoader):
    """Kedro's loader, with `~/` for the home folder and `${oc.env:NAME}`, and files that are
    checked before anything else.

    Raises:
        ConfigurationError: there is no such environment; or a file is no YAML, names a key twice or
            a global that there is none of, or has a name that nobody reads; a line, with the file's
            path.
    """

    def __init__(
        self,
        conf_source: str | Path,
        env: str | None = None,
        runtime_params: dict[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        if env is not None and not (Path(conf_source) / env).is_dir():
            there = sorted(each.name for each in Path(conf_source).glob("[!.]*/"))
            raise ConfigurationError(
                f"{conf_source} has no environment `{env}`, want one of {', '.join(there)}"
            )
        with _told_shortly():
            for path in _files(
                Path(conf_source), (rest.get("base_env"), env or rest.get("default_run_env"))
            ):
                check_yaml(path, are_names=True)
                _check_file_name(path)
                if path.stem == "globals":
                    _check_globals(
                        path, yaml.safe_load(path.read_text(encoding="utf-8")) or {}, GLOBALS
                    )
        rest["custom_resolvers"] = {"oc.env": oc.env, **(rest.get("custom_resolvers") or {})}
        super().__init__(conf_source, env, expand_home(runtime_params), **rest)

    def __getitem__(self, key: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = expand_home(super().__getitem__(key))
        except OmegaConfBaseException as error:
            where = f", `{error.full_key}`" if error.full_key else ""
            raise ConfigurationError(
                f"{self.conf_source}, {key}{where}: {str(error.msg or error).splitlines()[0]}"
            ) from None
        except ValueError as error:  # a key that two files have
            raise ConfigurationError(str(error)) from None
        return found


def expand_home(value: Any) -> Any:
    """The value with `~/` and `~user/` at the beginning of any text in it replaced by the home
    folder.
    """
    if isinstance(value, dict):
        return {key: expand_home(each) for key, each in value.items()}
    if isinstance(value, list):
        return [expand_home(each) for each in value]
    if isinstance(value, str) and re.match(r"~[\w.-]*/", value):
        return os.path.expanduser(value)
    return value


def _files(conf: Path, environments: tuple[str | None, ...]) -> list[Path]:
    """The YAML files of some environments that are not hidden, as Kedro has it; none where the
    configuration is no folder.
    """
    found = [
        path
        for name in dict.fromkeys(environments)
        if name
        for path in sorted((conf / name).rglob("*.y*ml"))
    ]
    return [
        path
        for path in found
        if path.is_file() and not any(part[0] == "." for part in path.relative_to(conf).parts)
    ]


def _check_file_name(path: Path) -> None:
    kinds = ("catalog", "credentials", "globals", "mlflow", "parameters", "slurm")
    read = path.name == "globals.yml" or (
        path.stem.startswith(kinds) and not path.stem.startswith("globals")
    )
    near = get_close_matches(path.stem, kinds, n=1, cutoff=0.8)
    if near and not read:
        raise ValueError(f"{path} would not be read: call it {near[0]}.yml")


def _check_globals(path: Path, given: Any, names: Mapping[str, Any], section: str = "") -> None:
    """Check that a file of globals, or a section of it, has no names but these."""
    if not isinstance(given, dict):
        raise ValueError(  # noqa: TRY004
            f"{path}: `{section.rstrip('.') or 'globals'}` is {given!r}, want {', '.join(names)}"
        )
    for name, value in given.items():
        if name not in names:
            near = get_close_matches(str(name), names, n=1)
            hint = f"did you mean `{section}{near[0]}`? " if near else ""
            raise ValueError(
                f"{path}: there is no global `{section}{name}`: {hint}There are"
                f" {', '.join(section + each for each in names)}."
            )
        if names[name] is not None:
            _check_globals(path, value, names[name], f"{name}.")


class ConfigurationHook:
    """Checks the parameters of a session before its pipelines are built, and the shards that they
    name before it runs.
    """

    @hook_impl(tryfirst=True)  # before kedro-mlflow opens its database
    def after_context_created(self, context: KedroContext) -> None:
        """Read the session's parameters strictly, and have its pipelines built from them.

        Raises:
            ConfigurationError: a parameter, or a path that the catalog reads, is not as it
                should be.
        """
        raw: dict[str, Any] = context.config_loader["parameters"]
        with _told_shortly():
            parameters = parse_parameters(raw)
            _check_paths(parameters, context.config_loader["catalog"])
            _check_dictionaries(parameters, context.config_loader["catalog"])
        _current["session"] = Path(context.project_path), parameters
        # A second session in one process has layers of its own.
        pipelines.configure("assay.pipeline_registry")

    @hook_impl
    def after_catalog_created(self, catalog: DataCatalog) -> None:
        """Add what is recorded from, the gallery's images, the names of classes and what the user's
        own dictionaries are read from: how many there are, and where, only the parameters say.
        """
        from assay.autoencoders import given_autoencoders
        from assay.extraction import Extraction
        from assay.io.datasets import ClassNamesDataset, ImagesDataset
        from assay.plan import find_images

        project, parameters = current_configuration()
        extraction = Extraction(parameters, project)
        for name, source in extraction.datasets().items():
            catalog[name] = source
        images = find_images(parameters, project)
        if images is None and "probe_val" in extraction.splits:
            images = extraction.images("probe_val")
        if images is not None:
            catalog["images_probe_val"] = ImagesDataset(filepath=str(images[0]), layout=images[1])
        if parameters.class_names is not None:
            path = project / parameters.class_names
            catalog["class_names"] = ClassNamesDataset(filepath=str(path))
        for shared, dictionary in parameters.dictionaries.items():
            for model in dictionary.models(shared):
                for layer in parameters.layers:
                    for entry, dataset in _sources(layer, model, dictionary, parameters, project):
                        catalog[entry] = dataset
        for given in given_autoencoders(parameters, project):
            catalog[given.entry] = given.dataset

    @hook_impl(tryfirst=True)
    def before_pipeline_run(self, pipeline: Pipeline) -> None:
        """Check the shards before any work, those that are to be recorded as well.

        Raises:
            ValueError: a folder is not what its split needs, or a disk has no room for what is
                recorded.
            OSError: it cannot be read.
        """
        from assay.extraction import check_room
        from assay.preflight import check_pipeline, check_recorded_labels

        project, parameters = current_configuration()
        check_pipeline(parameters, project, pipeline)
        made = pipeline.all_outputs()
        todo = [split for split in parameters.extract.splits if f"shards_{split}" in made]
        check_room(parameters, project, todo)
        probed = {
            split
            for split in ("probe_train", "probe_val")
            if f"shards_{split}" in pipeline.inputs()
        }
        if probed & set(parameters.extract.splits):
            check_recorded_labels(parameters, project, probed)

    @hook_impl
    def after_dataset_saved(self, dataset_name: str) -> None:
        """Check what masks have made of a split, before anything is fitted.

        Raises:
            ValueError: every label is void.
        """
        from assay.preflight import check_recorded_labels

        project, parameters = current_configuration()
        split = dataset_name.removeprefix("shards_")
        if split in parameters.extract.splits and split.startswith("probe"):
            check_recorded_labels(parameters, project, [split])


def _sources(
    layer: int,
    model: Model,
    dictionary: DictionaryParameters,
    parameters: Parameters,
    project: Path,
) -> Iterator[tuple[str, AbstractDataset[Any, Any]]]:
    from assay.io.datasets import SaevInferenceDataset
    from assay.plan import place

    if dictionary.saev_run is not None:
        run = str(place(project, dictionary.saev_run, layer, model.seed))
        for split in ("probe_train", "probe_val"):
            shards = str(project / getattr(parameters.shards, split))
            yield (
                f"{layer_name(layer)}.codes_{model.name}_{split}",
                SaevInferenceDataset(run=run, shards=shards, part="codes"),
            )
        shards = str(project / parameters.shards.val)
        yield (
            f"{layer_name(layer)}.metrics_{model.name}",
            SaevInferenceDataset(run=run, shards=shards, part="metrics"),
        )


def _check_paths(parameters: Parameters, catalog: dict[str, Any]) -> None:
    """What is checked must be what is read: the parameters and the catalog take their paths from
    the same globals.
    """
    wanted = {f"shards.{split}": (f"shards_{split}", path) for split, path in parameters.shards}
    if parameters.standardize.statistics is not None:
        wanted["standardize.statistics"] = (
            "{layer}.given_statistics",
            parameters.standardize.statistics,
        )
    for name, (entry, path) in wanted.items():
        if str(catalog[entry]["filepath"]) != path:
            raise ValueError(
                f"Parameter `{name}` is {path}, but the catalog reads {catalog[entry]['filepath']}:"
                " set it in globals.yml or with --params, not in parameters.yml."
            )


def _check_dictionaries(parameters: Parameters, catalog: dict[str, Any]) -> None:
    """A dictionary's name becomes that of datasets and files, which the catalog must not take for
    others.
    """
    names, endings = _reserved_names(catalog)
    for name in parameters.dictionaries:
        taken = (
            name if name in names else next((each for each in endings if name.endswith(each)), None)
        )
        if taken is not None:
            raise ValueError(
                f"dictionaries: the catalog takes `{name}` for something of its own; give it"
                f" another name than {', '.join(sorted(names))}, and another end than"
                f" {', '.join(sorted(endings))}."
            )


def _reserved_names(catalog: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Names, and ends of names, that the catalog's patterns have for a layer's datasets and their
    files.
    """
    names, endings = set(), set()
    for entry, config in catalog.items():
        for pattern in (
            r"\{layer\}\.([a-z]+)_\{.*",
            r"\{layer\}\.\{\w+\}_([a-z]+)",
            r"([a-z]+)_\{layer\}",
        ):
            names.update(re.findall(f"^{pattern}$", entry))
        stem = Path(str(config.get("filepath", "") if isinstance(config, dict) else "")).stem
        endings.update(re.findall(r"^\{\w+\}(-[a-z]+)$", stem))
    return names, endings

"""The project's own `kedro run`: Kedro's, with `key:value` parameters, checks before any work, and nothing made twice."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pandas as pd
from kedro.config import MissingConfigException
from kedro.framework.cli.project import run as kedro_run
from kedro.framework.project import pipelines as registered
from kedro.framework.session import KedroSession
from kedro.io import DataCatalog, DatasetError
from kedro.pipeline import Pipeline
from kedro.runner import AbstractRunner
from kedro.utils import find_kedro_project, load_obj
from mlflow.exceptions import MlflowException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from rich import box
from rich.console import Console
from rich.table import Table
from yaml import YAMLError

from assay.configuration import current_configuration
from assay.freshness import Freshness
from assay.io.datasets import CodesDataset
from assay.pipelines.report.tables import pool_seeds
from assay.pipelines.stopping import sigterm_stops
from assay.plan import check_shards
from assay.tracking import close_interrupted_runs

FILTERS = ("tags", "from_nodes", "to_nodes", "node_names", "from_inputs", "to_outputs")


@click.group(name="Assay")
def cli() -> None:
    """Assay's commands."""


def parse_params(context: click.Context, parameter: click.Parameter, value: str | dict[str, Any]) -> dict[str, Any]:
    """Turn ``a:1,b.c=2,layers:[3,5]`` into nested parameters; ``key:value`` and ``key=value`` mean the same."""
    del context
    if isinstance(value, dict):  # from --config
        return value
    parsed = OmegaConf.create({})
    for item in split_outside(value):
        pair = re.fullmatch(r"([\w.-]+)\s*[:=]\s*(.*)", item, flags=re.DOTALL)
        if pair is None:
            raise click.BadParameter(f"`{item}` is no key:value or key=value", param=parameter)
        try:
            _set(parsed, pair[1], pair[2])
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise click.BadParameter(f"`{item}`: {error}", param=parameter) from None
    plain = OmegaConf.to_container(parsed)
    assert isinstance(plain, dict)
    return {str(key): inner for key, inner in plain.items()}


def _set(parsed: DictConfig, key: str, value: str) -> None:
    try:
        parsed.merge_with_dotlist([f"{key}={value}"])
    except (GrammarParseError, YAMLError):  # no YAML, so it is text: a path with {layer} in it, say
        OmegaConf.update(parsed, key, value)


def split_outside(text: str) -> list[str]:
    """Split at the commas that are in no brackets and no quoted value; leave out empty items."""
    items, depth, quote, before = [""], 0, "", ","
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and before in ":=,[{":  # an apostrophe inside a path is none
            quote = character
        else:
            depth = max(0, depth + (character in "[{") - (character in "]}"))
        before = before if character.isspace() else character
        if character == "," and depth == 0 and not quote:
            items.append("")
        else:
            items[-1] += character
    return [item.strip() for item in items if item.strip()]


def _options() -> list[click.Parameter]:
    """Kedro's own options of `run`, with our reading of --params, and --force."""
    options = [option for option in kedro_run.params if option.name != "params"]
    params = click.Option(
        ["--params"],
        type=click.UNPROCESSED,
        default="",
        callback=parse_params,
        help="Parameters that override the configuration: key:value or key=value, nested keys with dots, comma-separated.",
    )
    force = click.Option(["--force"], is_flag=True, help="Make everything again, also what is up to date.")
    return [*options, params, force]


def _check_place(project: Path | None) -> None:
    odd = sorted(set("*?[]{}") & set(str(project)))
    if odd:
        raise click.ClickException(
            f"{project} has {' '.join(odd)} in its path, which Kedro takes for patterns, and finds no configuration: rename the folder."
        )


def _run(force: bool, **options: Any) -> None:
    """Run the pipeline. What is complete and up to date is not made again."""
    began = time.perf_counter()
    _check_place(find_kedro_project(Path.cwd()))
    runner = _runner(options["runner"], options["runner_params"], is_async=options["is_async"])
    names = _pipeline_names(options["pipeline"], options["pipelines"])
    with KedroSession.create(
        env=options["env"], conf_source=options["conf_source"], runtime_params=options["params"]
    ) as session:
        assert isinstance(session, KedroSession)
        try:
            catalog = session.load_context()._get_catalog(load_versions=options["load_versions"])
            assert isinstance(catalog, DataCatalog)
            selected = _select(names, options)
            project, parameters = current_configuration()
            check_shards(parameters, project)
            freshness = Freshness(project, catalog, registered["__default__"] + selected, options["load_versions"])
            todo = selected if force else freshness.stale(selected)
            freshness.check_inputs(todo)
            if force:
                _forget_begun(todo, catalog)
        except (ValueError, OSError, MissingConfigException, DatasetError) as error:
            raise click.ClickException(str(error)) from error
        console = Console()
        kept = len(selected.nodes) - len(todo.nodes)
        if todo.nodes:
            console.print(
                f"{len(todo.nodes)} of {len(selected.nodes)} steps to do; {kept} are up to date.", highlight=False
            )
            everything = not names and len(todo.nodes) == len(registered["__default__"].nodes)
            with _ended_cleanly(session, todo, catalog):
                session.run(
                    pipeline_names=names,
                    # kedro-viz follows a run only where no filter is given
                    node_names=None if everything else [node.name for node in todo.nodes],
                    runner=runner,
                    load_versions=options["load_versions"],
                    only_missing_outputs=options["only_missing_outputs"],
                )
        else:
            console.print(
                f"Nothing to do: all {kept} steps are up to date (same shards, parameters and version); --force makes them again.",
                highlight=False,
            )
        _say_results(console, selected, catalog, project, time.perf_counter() - began)


def _forget_begun(pipeline: Pipeline, catalog: DataCatalog) -> None:
    """Have codes that an interrupted run began started anew."""
    for name in sorted(pipeline.all_outputs()):
        dataset: object = catalog.get(name) if name in catalog else None
        if isinstance(dataset, CodesDataset):
            dataset.forget_begun()


@contextmanager
def _ended_cleanly(session: KedroSession, pipeline: Pipeline, catalog: DataCatalog) -> Iterator[None]:
    """Give bad input and a bad or full disk two lines, not a traceback, which is in the manifest; close the runs in MLflow when
    we are interrupted."""
    try:
        with sigterm_stops():
            yield
    except KeyboardInterrupt:
        close_interrupted_runs(session._hook_manager, pipeline, catalog)
        raise
    except (ValueError, OSError, DatasetError, MlflowException) as error:
        raise click.ClickException(str(error)) from error


cli.add_command(click.Command("run", params=_options(), callback=_run, help=_run.__doc__))
run = cli.commands["run"]


def _pipeline_names(pipeline: str | None, pipelines: Sequence[str]) -> list[str]:
    if pipeline and pipelines:
        raise click.UsageError("Options '--pipeline' and '--pipelines' cannot be used together.")
    return [pipeline] if pipeline else list(dict.fromkeys(pipelines))


def _runner(name: str | None, params: dict[str, Any], *, is_async: bool) -> AbstractRunner:
    name = name or "SequentialRunner"
    if name.rpartition(".")[2] == "ParallelRunner":
        raise click.ClickException(
            "ParallelRunner is not supported: its processes lose track of the MLflow runs. Use SequentialRunner or ThreadRunner,"
            " or run layers side by side with --namespaces."
        )
    try:
        runner = load_obj(name, "kedro.runner")(**{"is_async": is_async, **params})
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise click.ClickException(f"--runner={name} with {params}: {error}") from error
    assert isinstance(runner, AbstractRunner)
    return runner


def _select(names: list[str], options: dict[str, Any]) -> Pipeline:
    """The nodes that the options name, as Kedro would choose them."""
    unknown = [name for name in names if name not in registered]
    if unknown:
        raise ValueError(f"There is no pipeline `{unknown[0]}`; there are {', '.join(sorted(registered))}.")
    whole = sum((registered[name] for name in names or ["__default__"]), Pipeline([]))
    filters = {name: options[name] or None for name in FILTERS}
    return whole.filter(**filters, node_namespaces=options["namespaces"] or None)


def _say_results(console: Console, selected: Pipeline, catalog: DataCatalog, project: Path, seconds: float) -> None:
    if "baselines" in selected.all_outputs():
        console.print(render_table(catalog.load("baselines")))
        table: Any = catalog.get("baselines")
        console.print(f"Table:   {_relative(Path(str(table._filepath)), project)}", soft_wrap=True)
        page: Any = catalog.get("report_page")
        console.print(f"Report:  {_relative(Path(str(page._filepath)), project)}", soft_wrap=True)
    else:
        console.print(f"Results: {', '.join(sorted(selected.outputs()))}", soft_wrap=True, highlight=False)
    console.print("Runs:    mlflow ui          Graph:   kedro viz", highlight=False)
    console.print(f"Done in {seconds:.0f} s.", highlight=False)
    sys.stdout.flush()


def _relative(path: Path, project: Path) -> Path:
    return path.relative_to(project) if path.is_relative_to(project) else path


HEADINGS = {
    "nmse_raw": "nmse\nraw",
    "l0": "L0",
    "probe_r": "probe\nR",
    "map": "mAP",
    "purity_at_16": "purity\n@16",
    "coverage_at_0.3": "cover\n@0.3",
    "best_layer": "best",
}


def render_table(baselines: pd.DataFrame) -> Table:
    """The table as the terminal shows it, in 80 columns: layers apart, a star at the best layer of each (method, encoding, k).

    Of several seeds it shows the mean. The names of other dictionaries are long, and say method and k: with them these two columns
    and the raw NMSE are left to the file.
    """
    several = bool(baselines.duplicated(["layer", "encoding"]).any())
    hidden = ["seed"]
    if several or not set(baselines["method"]) <= {"kmeans", "pca"}:
        hidden += ["method", "k", "nmse_raw"]
    shown = [name for name in baselines.columns if name not in hidden]
    if several:
        baselines = pool_seeds(baselines)
    title = "k-means and PCA baselines" + (", means over seeds" if several else "")
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, collapse_padding=True)
    for column in shown:
        text = column in ("method", "encoding", "best_layer")
        table.add_column(HEADINGS.get(column, column), justify="left" if text else "right", no_wrap=True)
    for _, rows in baselines.groupby("layer"):
        for row in rows[shown].itertuples(index=False):
            table.add_row(*map(_cell, row, shown))
        table.add_section()
    return table


def _cell(value: Any, column: str) -> str:
    if isinstance(value, bool):
        return "*" if value else ""
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "-"
    if value.is_integer():
        return f"{value:.0f}"
    if column == "l0":
        return f"{value:.3g}"
    return f"{value:.3f}" if abs(value) >= 0.001 else f"{value:.0e}"

"""The project's own `kedro run`: Kedro's, with `key:value` parameters, checks before any work, and
nothing made twice.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
import yaml
from kedro.config import MissingConfigException
from kedro.framework.cli.jupyter import jupyter as kedro_jupyter
from kedro.framework.cli.project import run as kedro_run
from kedro.framework.cli.utils import KedroCliError, _config_file_callback
from kedro.framework.project import pipelines as registered
from kedro.framework.session import KedroSession
from kedro.io import DataCatalog, DatasetError
from kedro.pipeline import Pipeline
from kedro.runner import AbstractRunner
from kedro.utils import find_kedro_project, load_obj
from rich.console import Console

from assay.pipelines.stopping import exit_code, signals_stop
from assay.pipelines.watch import watched
from assay.slurm.commands import slurm_group
from assay.team import current_team

if TYPE_CHECKING:
    from assay.work import Work

FILTERS = ("tags", "from_nodes", "to_nodes", "node_names", "from_inputs", "to_outputs")


@click.group(name="Assay")
def cli() -> None:
    """Assay's commands."""


def _show(error: KedroCliError, file: IO[Any] | None = None) -> None:
    """Kedro's own would show the exception that is being handled, which is none here: `NoneType:
    None`.
    """
    if KedroCliError.VERBOSE_ERROR:
        traceback.print_exception(error, file=file)
    click.ClickException.show(error, file)


KedroCliError.show = _show  # type: ignore[method-assign, assignment]


@cli.group("jupyter", commands=kedro_jupyter.commands, help=kedro_jupyter.help)
@click.pass_context
def jupyter(context: click.Context) -> None:
    """Open Jupyter Lab or a notebook with the project, or set it up as a kernel."""
    wanted = {"lab": "jupyterlab", "notebook": "notebook", "setup": "ipykernel"}.get(
        context.invoked_subcommand or ""
    )
    if wanted and importlib.util.find_spec(wanted) is None:
        raise click.ClickException(
            f"{wanted} is not installed: {sys.executable} -m pip install {wanted}"
        )


def parse_params(
    context: click.Context, parameter: click.Parameter, value: str | dict[str, Any]
) -> dict[str, Any]:
    """The parameters of `--params`, nested."""
    del context
    from assay.arguments import parse_pairs
    from assay.configuration import expand_home

    try:
        # A dict comes from --config.
        return dict(expand_home(value if isinstance(value, dict) else parse_pairs(value)))
    except ValueError as error:
        raise click.BadParameter(str(error), param=parameter) from None


def read_config(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    """Take the options of the file that `--config` names, as Kedro does, where it can be read."""
    if value is None:
        return None
    from assay.yaml_files import check_yaml

    try:
        check_yaml(Path(value))
    except ValueError as error:
        raise click.BadParameter(str(error), param=parameter) from None
    found = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get("run"), dict):
        raise click.BadParameter(
            f"{value} has no section `run` with options of `kedro run`", param=parameter
        )
    _config_file_callback(context, parameter, value)
    return value


def _options() -> list[click.Parameter]:
    """Kedro's own options of `run`, with our reading of --params and --config, and --force."""
    options = [copy.copy(option) for option in kedro_run.params if option.name != "params"]
    for option in options:
        if option.name == "config":
            option.callback = read_config
    params = click.Option(
        ["--params"],
        type=click.UNPROCESSED,
        default="",
        callback=parse_params,
        help=(
            "Parameters that override the configuration: key:value or key=value, nested keys with"
            " dots, comma-separated."
        ),
    )
    force = click.Option(
        ["--force"], is_flag=True, help="Make everything again, also what is up to date."
    )
    return [*options, params, force]


def _check_place(project: Path | None) -> None:
    odd = sorted(set("*?[]{}") & set(str(project)))
    if odd:
        raise click.ClickException(
            f"{project} has {' '.join(odd)} in its path, which Kedro takes for patterns, and finds"
            " no configuration: rename the folder."
        )


def _run_and_exit(**options: Any) -> None:
    """Run the pipeline. What is complete and up to date is not made again."""
    try:
        with signals_stop():
            _run(**options)
    except (KeyboardInterrupt, Exception) as error:
        if not isinstance(error, KeyboardInterrupt):
            if exit_code() is None:
                raise
            click.echo(f"Error: {error}", err=True)  # what the signal came into made of it
        click.echo("Stopped. The same command goes on from here.", err=True)
        raise click.exceptions.Exit(exit_code() or 130) from None


def _run(force: bool, **options: Any) -> None:
    from assay.configuration import current_configuration
    from assay.preflight import check_pipeline
    from assay.tracking import finish_taken_up
    from assay.work import current_freshness, taken_on

    began = time.perf_counter()
    _check_place(find_kedro_project(Path.cwd()))
    runner = _runner(options["runner"], options["runner_params"], is_async=options["is_async"])
    names = _pipeline_names(options["pipeline"], options["pipelines"])
    with (
        KedroSession.create(
            env=options["env"], conf_source=options["conf_source"], runtime_params=options["params"]
        ) as session,
        ExitStack() as stack,
    ):
        assert isinstance(session, KedroSession)
        try:
            context = session.load_context()
            catalog = context._get_catalog(
                save_version=session.session_id, load_versions=options["load_versions"]
            )
            assert isinstance(catalog, DataCatalog)
            selected = _select(names, options)
            project, parameters = current_configuration()
            current_team().timeout_seconds = parameters.ranks_timeout_seconds
            check_pipeline(parameters, project, selected)
            work = stack.enter_context(taken_on(current_freshness(), selected, force=force))
            todo = work.todo
            if force:
                _forget_begun(todo, catalog)
        except (ValueError, OSError, MissingConfigException, DatasetError) as error:
            raise click.ClickException(str(error)) from error
        console = Console()
        kept = len(selected.nodes) - len(todo.nodes)
        if todo.nodes:
            console.print(
                f"{len(todo.nodes)} of {len(selected.nodes)} steps to do; {kept} are up to date.",
                highlight=False,
            )
            everything = not names and len(todo.nodes) == len(registered["__default__"].nodes)
            with (
                _ended_cleanly(session, todo, catalog),
                watched(session._hook_manager, len(todo.nodes)),
            ):
                session.run(
                    pipeline_names=names,
                    # kedro-viz follows a run only where no filter is given
                    node_names=None if everything else [node.name for node in todo.nodes],
                    namespaces=options["namespaces"] or None,  # MLflow has it as a part
                    runner=runner,
                    load_versions=options["load_versions"],
                    only_missing_outputs=options["only_missing_outputs"],
                )
        else:
            console.print(
                f"Nothing to do: all {kept} steps are up to date (same shards, parameters and"
                " version); --force makes them again.",
                highlight=False,
            )
        with _ended_cleanly(session, todo, catalog):
            work.publish(selected.all_outputs())
            if not todo.nodes:
                about = {
                    "run_id": session.session_id,
                    "env": context.env,
                    "pipeline_names": names,
                    "runner": str(runner),
                }
                finish_taken_up(session._hook_manager, {**options, **about}, selected, catalog)
            seconds = time.perf_counter() - began
            _say_results(console, selected, catalog, work, seconds, options["env"])


def _forget_begun(pipeline: Pipeline, catalog: DataCatalog) -> None:
    """Have codes and recordings that an interrupted run began started anew."""
    from assay.io.datasets import CodesDataset, ShardsDataset

    for name in sorted(pipeline.all_outputs()):
        dataset: object = catalog.get(name) if name in catalog else None
        if isinstance(dataset, CodesDataset | ShardsDataset):
            dataset.forget_begun()


@contextmanager
def _ended_cleanly(
    session: KedroSession, pipeline: Pipeline, catalog: DataCatalog
) -> Iterator[None]:
    """Give bad input and a bad or full disk two lines, not a traceback, which is in the manifest;
    close the runs in MLflow when we are interrupted.
    """
    from mlflow.exceptions import MlflowException

    from assay.tracking import close_interrupted_runs

    try:
        yield
    except KeyboardInterrupt:
        close_interrupted_runs(session._hook_manager, pipeline, catalog)
        raise
    except (ValueError, OSError, DatasetError, MlflowException) as error:
        raise click.ClickException(str(error)) from error


cli.add_command(
    click.Command("run", params=_options(), callback=_run_and_exit, help=_run_and_exit.__doc__)
)
run = cli.commands["run"]


def _prune(**options: Any) -> None:
    """Remove the results of other settings than those in force: versions, codes and their records,
    but nothing raw.
    """
    from assay.prune import prune

    prune(**options)


def _prune_options() -> list[click.Parameter]:
    kept = [option for option in _options() if option.name in ("env", "params")]
    return [
        *kept,
        click.Option(["--dry-run"], is_flag=True, help="Only say what would be removed."),
    ]


cli.add_command(
    click.Command("prune", params=_prune_options(), callback=_prune, help=_prune.__doc__)
)
cli.add_command(slurm_group)


def _pipeline_names(pipeline: str | None, pipelines: Sequence[str]) -> list[str]:
    if pipeline and pipelines:
        raise click.UsageError("Options '--pipeline' and '--pipelines' cannot be used together.")
    return [pipeline] if pipeline else list(dict.fromkeys(pipelines))


def _runner(name: str | None, params: dict[str, Any], *, is_async: bool) -> AbstractRunner:
    name = name or "SequentialRunner"
    if name.rpartition(".")[2] == "ParallelRunner":
        raise click.ClickException(
            "ParallelRunner is not supported: its processes lose track of the MLflow runs. Use"
            " SequentialRunner or ThreadRunner, or run layers side by side with --namespaces."
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
        raise ValueError(
            f"There is no pipeline `{unknown[0]}`; there are {', '.join(sorted(registered))}."
        )
    whole = sum((registered[name] for name in names or ["__default__"]), Pipeline([]))
    filters = {name: options[name] or None for name in FILTERS}
    return whole.filter(**filters, node_namespaces=options["namespaces"] or None)


def _say_results(
    console: Console,
    selected: Pipeline,
    catalog: DataCatalog,
    work: Work,
    seconds: float,
    env: str | None,
) -> None:
    if "baselines" in selected.all_outputs():
        from assay.pipelines.report.terminal import render_table

        work.freshness.verify("baselines")
        console.print(render_table(catalog.load("baselines")))
        for what, name in {"Table:": "baselines", "Report:": "report_page"}.items():
            path = work.freshness.published(name)
            console.print(f"{what:8} {_relative(path, work.freshness.project)}", soft_wrap=True)
    else:
        console.print(
            f"Results: {', '.join(sorted(selected.outputs()))}", soft_wrap=True, highlight=False
        )
    # kedro-viz tells the registry no environment that it is given as an option.
    viz = f"{'' if env is None else f'KEDRO_ENV={env} '}kedro viz"
    console.print(f"Runs:    mlflow ui          Graph:   {viz}", highlight=False)
    console.print(f"Done in {seconds:.0f} s.", highlight=False)
    sys.stdout.flush()


def _relative(path: Path, project: Path) -> Path:
    return path.relative_to(project) if path.is_relative_to(project) else path

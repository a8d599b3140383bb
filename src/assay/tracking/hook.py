"""What Kedro calls."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import AbstractVersionedDataset, DataCatalog
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node

from assay.configuration import current_configuration
from assay.encodings import layer_name
from assay.io.checkpoints import Checkpoints
from assay.plan import Plan, make_plan
from assay.preflight import find_d_model
from assay.tracking.connection import Connection
from assay.tracking.run import Run

REPORT = (
    "paper",
    "paper_markdown",
    "paper_latex",
    "matched",
    "agreement",
    "classes",
    "report_page",
)


class InterruptedRunError(Exception):
    """Somebody, or the queue, ended the run."""


def close_interrupted_runs(hooks: Any, pipeline: Pipeline, catalog: DataCatalog) -> None:
    """Mark the runs that are open in MLflow as killed: Kedro calls no hook for an interrupt."""
    error = InterruptedRunError("the run was interrupted")
    hooks.hook.on_pipeline_error(error=error, run_params={}, pipeline=pipeline, catalog=catalog)


def finish_taken_up(
    hooks: Any, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog
) -> None:
    """Finish the run of MLflow that MLFLOW_RUN_ID names, if any, where nothing of ``pipeline`` is
    left to do: Kedro calls no hook then.
    """
    if os.environ.get("MLFLOW_RUN_ID"):
        hook = next(each for each in hooks.get_plugins() if isinstance(each, TrackingHook))
        hook.finish_taken_up(run_params, pipeline, catalog)


class TrackingHook:
    """Logs the parent's manifest, and every layer's results to children named like
    ``layer_23/pca-topk-00064``.

    It takes the place of kedro-mlflow's own hook, which it has called where that can break no run
    (`connection.py`).
    """

    def __init__(self) -> None:
        self._session: Any = None
        self._connection: Connection | None = None
        self._run: Run | None = None
        self._logged: dict[str, Callable[[Any], None]] = {}

    @property
    def connection(self) -> Connection | None:
        """To MLflow, of the session that has a context; None without one."""
        return self._connection

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Make the connection to MLflow that a session has, or lend it a further context."""
        if self._connection is None or context._hook_manager is not self._session:
            self._end()
            self._session, self._connection = context._hook_manager, Connection(context)
        else:  # Kedro makes a context when a session begins and another when it runs
            self._connection.lend(context)

    @hook_impl
    def after_catalog_created(self, catalog: DataCatalog) -> None:
        """Have kedro-mlflow's own datasets in the catalog named as it names them."""
        if self._connection:
            self._connection.adjust(catalog)

    @hook_impl(trylast=True)
    def before_pipeline_run(
        self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog
    ) -> None:
        """Open the parent run, and follow what is fitted and saved."""
        assert self._connection is not None
        project, parameters = current_configuration()
        plan = make_plan(parameters, find_d_model(parameters, project))
        self._connection.open(run_params, pipeline, catalog)
        run = Run(
            project,
            run_params,
            parameters.model_dump(mode="json"),
            catalog,
            plan.rows,
            self._connection,
        )
        self.follow(run, plan)

    def follow(self, run: Run, plan: Plan) -> None:
        """Have a run told of what is fitted and saved from now on."""
        self._run = run
        self._logged = logged_results(plan, run)

    @hook_impl
    def before_node_run(self, node: Node, inputs: dict[str, Any]) -> None:
        """Note when a node begins, and watch the steps of a fit."""
        if self._run:
            self._run.started[node.name] = time.perf_counter()
            for given in inputs.values():
                if isinstance(given, Checkpoints):  # of a fit, whose steps are shown live
                    given.observers.append(self._run.watch_step)

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any, node: Node) -> None:
        """Log a result, and how long its node has taken so far."""
        if not self._run:
            return
        self._run.seconds[node.name] = time.perf_counter() - self._run.started[node.name]
        if dataset_name in self._logged:
            self._logged[dataset_name](data)

    @hook_impl(tryfirst=True)
    def after_pipeline_run(self, pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Close the parent and its children, with the files of the report."""
        if self._run:
            self._run.finish("FINISHED", kept=_kept(pipeline, catalog))
        self._end()

    def finish_taken_up(
        self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog
    ) -> None:
        """Open a run that an earlier process began and close it, with what that did not come to
        log.
        """
        self.before_pipeline_run(run_params, pipeline, catalog)
        assert self._run is not None
        for name in sorted(pipeline.all_outputs()):
            if self._logged.get(name) == self._run.complete_children:
                self._run.complete_children(catalog.load(name))
        self.after_pipeline_run(pipeline, catalog)

    @hook_impl(tryfirst=True)
    def on_pipeline_error(self, error: Exception) -> None:
        """Close the parent and its children as FAILED, or as KILLED where somebody ended the
        run.
        """
        status = "KILLED" if isinstance(error, InterruptedRunError) else "FAILED"
        if self._run:
            self._run.finish(status, error=error)
        elif self._connection:  # whose run may be open already
            self._connection.close(status, f"{type(error).__name__}: {error}")
            self._connection.writer.wait()
        self._end()

    def _end(self) -> None:
        if self._connection:
            self._connection.writer.stop()
        self._session = self._connection = self._run = None


def logged_results(plan: Plan, run: Run) -> dict[str, Callable[[Any], None]]:
    """Who is told of which dataset when it is saved."""
    found: dict[str, Callable[[Any], None]] = {}
    for layer in plan.layers:
        at, rows = layer_name(layer), plan.rows_of(layer)
        found |= {
            f"{at}.{model.name}_model": functools.partial(run.log_utilization, at, model.name)
            for model in plan.kmeans
        }
        found |= {f"{at}.{model.name}_agreement": run.log_agreement for model in plan.kmeans}
        found |= {f"{at}.{row.model.name}_errors": run.log_errors for row in rows}
        found |= {f"{at}.scores_{row.name}": run.log_scores for row in rows}
        found[f"rows_{at}"] = run.complete_children
    return found


def _kept(pipeline: Pipeline, catalog: DataCatalog) -> list[Path]:
    """The files of the report that this run made: the tables, the figures and the page."""
    made = pipeline.all_outputs()
    found = []
    for name in (
        "baselines",
        *REPORT,
        *sorted(each for each in made if each.startswith("figure_")),
    ):
        if name in made:
            dataset: Any = catalog.get(name)
            versioned = (
                isinstance(dataset, AbstractVersionedDataset) and dataset._version is not None
            )
            found.append(Path(str(dataset._get_load_path() if versioned else dataset._filepath)))
    return found

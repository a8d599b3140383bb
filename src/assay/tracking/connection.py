"""What a session has of MLflow: its experiment and its parent run, opened by kedro-mlflow in the
thread that writes.
"""

from __future__ import annotations

import os
import re
import sqlite3
import warnings
from pathlib import Path
from typing import Any

import mlflow
from kedro.config import MissingConfigException
from kedro.framework.context import KedroContext
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline
from mlflow.entities import Run, RunInfo
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.tracking.context.registry import resolve_tags
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from assay.tracking import process
from assay.tracking.database import file_of, prepare, settle
from assay.tracking.ownership import (
    FAILURE,
    NOT_LOGGED,
    close_runs_of_the_dead,
    end_part,
    of_part,
    take_up,
)
from assay.tracking.writer import Writer

# Where kedro-mlflow defines its classes MLflow and pydantic warn, the first whatever the filters
# say: unheard here.
with warnings.catch_warnings(record=True):
    warnings.simplefilter("always")
    from kedro_mlflow.config.kedro_mlflow_config import KedroMlflowConfig
    from kedro_mlflow.framework.hooks.mlflow_hook import MlflowHook

PARENT = "mlflow.parentRunId"


class Connection:
    """A session's MLflow. Its requests, those of kedro-mlflow's hook too, are made by the
    `writer`'s thread, which the work waits for as long as its patience lasts: no server, and no
    database that is locked, ends a run or holds it up.

    So the parent is the active run of no thread of Kedro's.

    Raises:
        ValueError: `mlflow.yml` says what kedro-mlflow does not know.
    """

    def __init__(self, context: KedroContext) -> None:
        self.writer = Writer()
        self.parent: RunInfo | None = None
        """The run that was opened; None before, and where nothing is logged."""
        self.taken_up = False
        """Whether an earlier process began it."""
        self.children: dict[str, Run] = {}
        """The parent's children by their names, as they were when it was taken up again."""
        self._hook = MlflowHook()
        self._run_id: str | None = None
        self._part = ""
        active = mlflow.active_run()
        self._given = active.info.run_id if active else None
        uri = self._prepare(context)
        self.writer.submit("the experiment", self._connect, context, uri)
        self.writer.wait()

    @property
    def settings(self) -> Any:
        """The section `tracking` of mlflow.yml, once MLflow has said which its experiment is."""
        return self._hook.mlflow_config.tracking

    def lend(self, context: KedroContext) -> None:
        """Give another context of the session kedro-mlflow's configuration, which the first one
        has.
        """
        if hasattr(self._hook, "mlflow_config"):
            context.__setattr__("mlflow", self._hook.mlflow_config)

    def adjust(self, catalog: DataCatalog) -> None:
        """Have kedro-mlflow's own datasets in the catalog named as it names them."""
        self._hook.after_catalog_created(catalog, {}, {}, {}, "", {})

    def open(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Open the parent run, or take up that which MLFLOW_RUN_ID or mlflow.yml names."""
        self._given = self._given or os.environ.pop("MLFLOW_RUN_ID", None)
        self.writer.submit("the run", self._open, _plain(run_params), pipeline, catalog)
        self.writer.wait()

    def close(self, status: str, reason: str | None) -> None:
        """Close the parent run, also one that could not be opened whole."""
        self.writer.submit_always("the end of the run", self._close, status, reason)

    def _prepare(self, context: KedroContext) -> str:
        """Check the configuration, and see to the database where it is a file; gives its URI."""
        project = Path(context.project_path)
        loader: Any = context.config_loader
        loader.config_patterns.setdefault("mlflow", ["mlflow*", "mlflow*/**", "**/mlflow*"])
        try:
            config = KedroMlflowConfig.model_validate({**loader["mlflow"]})
        except MissingConfigException:
            config = KedroMlflowConfig()
        except ValidationError as error:
            faults = [
                f"`{'.'.join(map(str, fault['loc']))}`: {fault['msg']}" for fault in error.errors()
            ]
            raise ValueError(f"mlflow.yml in {project / 'conf'}: {'; '.join(faults)}") from None
        uri = config.server.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        path = file_of(uri)
        if path is not None:
            try:
                prepare(uri)
                if path == project / "mlflow.db":
                    settle(path, project / "mlruns")
            except (OSError, ValueError, sqlite3.Error, SQLAlchemyError, MlflowException) as error:
                self.writer.fail("its database", error)
        return uri

    def _connect(self, context: KedroContext, uri: str) -> None:
        if file_of(uri) is None:
            prepare(uri, self.writer.heard)
        try:
            self._hook.after_context_created(context)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            # Another process has made the experiment in the meantime.
            self._hook.after_context_created(context)
        close_runs_of_the_dead(
            self._hook.mlflow_config.tracking.experiment._experiment.experiment_id
        )

    def _open(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> None:
        config = self._hook.mlflow_config.tracking
        if not set(run_params["pipeline_names"] or ["__default__"]) <= set(
            config.disable_tracking.pipelines
        ):
            if self._run_id is None:
                given = config.run.id or self._given
                part = " ".join(run_params.get("namespaces") or ())
                self._run_id = self._take_up(given, part) if given else self._create()
            config.run.id = self._run_id
        if mlflow.active_run() is not None:  # this request did not come to its end before
            mlflow.end_run("RUNNING")
        self._hook.before_pipeline_run(run_params, pipeline, catalog)
        active = mlflow.active_run()
        self.parent = active.info if active else None

    def _close(self, status: str, reason: str | None) -> None:
        if self._run_id is None:
            return
        if self.parent is None and status == "FINISHED":
            status, reason = "KILLED", f"not logged: {self.writer.failure}"
        client = MlflowClient()
        if reason is not None:
            client.set_tag(self._run_id, of_part(FAILURE, self._part), reason[:5000])
        elif self.writer.failure is not None:
            tag = of_part(NOT_LOGGED, self._part)
            client.set_tag(self._run_id, tag, self.writer.failure)
        if self._part:
            ends = end_part(self._run_id, self._part, status)
            if ends is None:
                return
            status = ends
        client.set_terminated(self._run_id, status)
        if mlflow.active_run() is not None:
            mlflow.end_run(status)

    def _create(self) -> str:
        """A run that says from its first moment whose it is."""
        experiment = self._hook.mlflow_config.tracking.experiment._experiment.experiment_id
        created = MlflowClient().create_run(
            experiment, tags=resolve_tags({process.TAG: process.own_process()})
        )
        return str(created.info.run_id)

    def _take_up(self, given: str, part: str) -> str:
        """Make another run's record this process's, or that of one of several that make a part
        each, with the name it has and without the reasons for which it ended before.
        """
        client = MlflowClient()
        run = client.get_run(given)
        take_up(run, part)
        self.writer.heard()
        self._part = part
        mlflow.set_experiment(experiment_id=run.info.experiment_id)
        self._hook.mlflow_config.tracking.run.name = run.info.run_name
        self.taken_up = True
        found = client.search_runs([run.info.experiment_id], f"tags.`{PARENT}` = '{given}'")
        self.children = {child.info.run_name: child for child in reversed(found)}
        self.writer.heard()
        return given


def _plain(run_params: dict[str, Any]) -> dict[str, Any]:
    """Kedro's record of a run, without the place that an object has in memory."""
    runner = re.sub(r"<([\w.]+) object at 0x[0-9a-f]+>", r"\1", str(run_params["runner"]))
    return {**run_params, "runner": runner}

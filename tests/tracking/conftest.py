"""A session's MLflow without a session, on a database of its own."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from kedro.config import OmegaConfigLoader
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline
from mlflow import MlflowClient

from assay.tracking.connection import Connection

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_params() -> dict[str, Any]:
    """What Kedro says of a run."""
    names = (
        "tags",
        "node_names",
        "from_nodes",
        "to_nodes",
        "from_inputs",
        "load_versions",
        "pipeline_names",
    )
    runner = "<kedro.runner.SequentialRunner object at 0x7f00>"
    return dict.fromkeys(names) | {
        "run_id": "2026-01-01T00.00.00.000Z",
        "env": "local",
        "runner": runner,
    }


@pytest.fixture
def project(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder with MLflow's database in it, which is the one in force."""
    root = tmp_path / "project"
    (root / "conf/base").mkdir(parents=True)
    (root / "conf/local").mkdir()
    shutil.copy(ROOT / "conf/base/mlflow.yml", root / "conf/base")
    shutil.copy(empty_database, root / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", (root / "mlruns").as_uri())
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return root


def make_context(project: Path) -> Any:
    """What of Kedro's context kedro-mlflow asks for."""
    return SimpleNamespace(
        project_path=project,
        _package_name="assay",
        _get_config_credentials=dict,
        _hook_manager=object(),
        config_loader=OmegaConfigLoader(
            str(project / "conf"), base_env="base", default_run_env="local"
        ),
    )


@pytest.fixture
def connect(
    project: Path, run_params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Connection]]:
    """Connects as a session does, and opens the parent run."""
    monkeypatch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None)
    made = []

    def make(*, opened: bool = True) -> Connection:
        connection = Connection(make_context(project))
        made.append(connection)
        if opened:
            connection.open(run_params, Pipeline([]), DataCatalog())
        return connection

    yield make
    for each in made:
        each.writer.stop()
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # which MLflow takes: the default again


@pytest.fixture
def runs(project: Path) -> Callable[[], dict[str, Any]]:
    """The runs of the project's database by their names, whatever becomes of the one in force."""

    def find() -> dict[str, Any]:
        client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
        numbers = [each.experiment_id for each in client.search_experiments()]
        return {run.info.run_name: run for run in reversed(client.search_runs(numbers))}

    return find


@contextmanager
def serve(answer: bytes | None) -> Iterator[tuple[str, list[str]]]:
    """Answers every request with the same bytes; None: with nothing, while it lasts. Gives its
    address and what was asked.
    """
    asked: list[str] = []
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if answer is None:
                over.wait(20)
            else:
                self.wfile.write(answer)
            self.close_connection = True

        do_POST = do_GET  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            del arguments

    serving = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{serving.server_port}", asked
    finally:
        over.set()
        serving.shutdown()
        serving.server_close()
        thread.join()


@pytest.fixture
def server() -> Callable[[bytes | None], AbstractContextManager[tuple[str, list[str]]]]:
    """A server on this machine that answers as it is told."""
    return serve

"""Processes that each log one layer's run to MLflow at the same moment, without its work.

Forks of one process that has imported what they need, and has logged once to find what that is. It
reads a request a line, {project, shards, uri, parent, n, rows}, and answers with a line of JSON:
what each of the `n` processes had MLflow not take.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  # takes a second, once for all
from kedro.config import OmegaConfigLoader
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Pipeline
from kedro_datasets.json import JSONDataset

from assay.encodings import Encoding, Form, Model
from assay.io.shards import Shards
from assay.tracking import writer
from assay.tracking.connection import Connection
from assay.tracking.run import Run

SPLITS = ("fit", "val", "probe_train", "probe_val")
NAMES = ("tags", "node_names", "from_nodes", "to_nodes", "from_inputs", "load_versions")


def make_rows(n: int) -> dict[str, Encoding]:
    """So many encodings of k-means, of several seeds."""
    models = [Model("kmeans", seed, True) for seed in range(n)]
    rows = [Encoding(model, Form("onehot"), 8) for model in models]
    return {row.name: row for row in rows}


def log_layer(request: dict[str, Any], layer: int) -> str | None:
    """Log a run that makes one layer; gives what MLflow did not take."""
    project, rows = Path(request["project"]), make_rows(request["rows"])
    shards = [Shards(Path(path)) for path in request["shards"]]
    catalog = DataCatalog(
        {
            **{
                f"shards_{split}": MemoryDataset(shards[split.endswith("val")], copy_mode="assign")
                for split in SPLITS
            },
            **{
                f"layer_{layer}.{row.model.name}_model": JSONDataset(filepath="model.json")
                for row in rows.values()
            },
        }
    )
    context: Any = SimpleNamespace(
        project_path=project,
        _package_name="assay",
        _get_config_credentials=dict,
        config_loader=OmegaConfigLoader(
            str(project / "conf"), base_env="base", default_run_env="local"
        ),
    )
    run_params = dict.fromkeys(NAMES) | {
        "run_id": f"layer_{layer}",
        "env": "local",
        "runner": "SequentialRunner",
        "pipeline_names": None,
        "namespaces": [f"layer_{layer}"],
    }
    parameters = {
        "layers": [layer],
        "shards": dict.fromkeys(SPLITS, ""),
        "kmeans": {"seed": 0, "decay": 0.1},
    }
    connection = Connection(context)
    connection.open(run_params, Pipeline([]), catalog)
    run = Run(project, run_params, parameters, catalog, rows, connection)
    told = []
    for name, row in rows.items():
        run.watch_step(layer, row.model.name, 1, {"inertia": 3.0})
        scores = {"layer": layer, "encoding": name, "k": 8, "map": 0.5, "probe_r": 0.1}
        run.log_scores(scores)
        told.append(scores | {"name": name, "nmse": 0.9, "l0": 1.0})
    run.complete_children(told)
    run.finish("FINISHED")
    connection.writer.stop()
    return connection.writer.failure


def rehearse(request: dict[str, Any]) -> None:
    """Log to the project's file, and leave no thread, since forks follow."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{request['project']}/mlflow.db"
    assert log_layer(request, 0) is None
    until = time.monotonic() + 10
    while threading.active_count() > 1 and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() == 1, threading.enumerate()


def write_at_once(request: dict[str, Any]) -> list[str | None]:
    """Fork so many processes, let them go at one moment, and await what they say."""
    closed, gate = os.pipe()
    pipes = []
    for layer in range(request["n"]):
        out, end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(gate)
            os.read(closed, 1)  # until the parent closes its end
            _be_one(request, layer, end)
        os.close(end)
        pipes.append((pid, out))
    time.sleep(0.2)
    os.close(gate)
    os.close(closed)
    found = []
    for pid, out in pipes:
        with os.fdopen(out) as said:
            found.append(json.loads(said.read() or '"died"'))
        os.waitpid(pid, 0)
    return found


def _be_one(request: dict[str, Any], layer: int, end: int) -> NoReturn:
    os.environ["MLFLOW_TRACKING_URI"] = request["uri"]
    if request["parent"] is not None:
        os.environ["MLFLOW_RUN_ID"] = request["parent"]
    try:
        os.write(end, json.dumps(log_layer(request, layer)).encode())
    finally:
        os._exit(0)


if __name__ == "__main__":
    writer.PATIENCE = 60.0  # the server shares its processors with those that ask it
    rehearsed = False
    for line in sys.stdin:
        if not rehearsed:
            rehearse(json.loads(line))
            rehearsed = True
        sys.stdout.write(json.dumps(write_at_once(json.loads(line))) + "\n")
        sys.stdout.flush()

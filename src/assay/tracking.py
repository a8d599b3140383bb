"""MLflow, as one Kedro hook: a parent run a `kedro run`, which kedro-mlflow opens, and a child for each (layer, encoding).

Children are made and written by explicit id through a client, never by MLflow's stack of active runs, so that threads cannot mix them up.
What is logged of a child is gathered first and written by a thread of its own beside the work: a database takes its time for
each request.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import re
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
from kedro.framework.hooks import hook_impl
from kedro.io import AbstractVersionedDataset, DataCatalog
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from assay.configuration import current_configuration
from assay.io.publish import publish_file
from assay.io.shards import Shards
from assay.parameters import seeded, seedless
from assay.pipelines import fitting
from assay.plan import Encoding, find_d_model, make_plan

logger = logging.getLogger(__name__)

METRICS = ("nmse", "nmse_raw", "l0", "probe_r", "map", "purity_at_16", "coverage_at_0.3")
"""The table's, which are the parent's curves over layers as well."""

DETAILS = (
    "mean_train_ce",
    "mean_val_ce",
    "mean_feature_ce",
    "mean_margin",
    "negative_weights",
    "f1",
    "purity_at_64",
    "purity_at_256",
    "max_abs_activation",
    "refined_pairs",
    "certificate_ce",
    "certificate_gradient",
    "certificate_val_ce",
)
"""What else is known of an encoding: the child's alone."""

REPORT = ("paper", "paper_markdown", "paper_latex", "matched", "classes", "report_page")
MANIFESTS = Path("data/08_reporting/manifests")
BATCH = 1000  # MLflow takes so many metrics in one request
LIVE_SECONDS = 5.0  # between two batches of a fit's steps


class InterruptedRunError(Exception):
    """Somebody, or the queue, ended the run."""


def close_interrupted_runs(hooks: Any, pipeline: Pipeline, catalog: DataCatalog) -> None:
    """Mark the runs that are open in MLflow as killed. Kedro calls no hook for an interrupt, and MLflow would say finished."""
    active = mlflow.active_run()
    if active is None:
        return
    error = InterruptedRunError("the run was interrupted")
    hooks.hook.on_pipeline_error(error=error, run_params={}, pipeline=pipeline, catalog=catalog)
    MlflowClient().set_terminated(active.info.run_id, "KILLED")  # kedro-mlflow knows only failures


class TrackingHook:
    """Logs the parent's manifest, and every layer's results to children named like ``layer_23/pca-topk-00064``."""

    def __init__(self) -> None:
        self._run: _Run | None = None

    @hook_impl(trylast=True)
    def before_pipeline_run(self, run_params: dict[str, Any], catalog: DataCatalog) -> None:
        project, parameters = current_configuration()
        plan = make_plan(parameters, find_d_model(parameters, project))
        self._run = _Run(project, run_params, parameters.model_dump(mode="json"), catalog, plan.rows)
        fitting.observers.append(self._run.watch_step)

    @hook_impl
    def before_node_run(self, node: Node) -> None:
        if self._run:
            self._run.started[node.name] = time.perf_counter()

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any, node: Node) -> None:
        if not self._run:
            return
        self._run.seconds[node.name] = time.perf_counter() - self._run.started[node.name]
        layer, _, name = dataset_name.partition(".")
        if name.endswith("_model") and seedless(name) == "kmeans_model":
            self._run.log_utilisation(layer, name.removesuffix("_model"), data["counts"])
        elif dataset_name.endswith("_agreement"):
            self._run.log_agreement(data)
        elif dataset_name.endswith("_history"):
            self._run.keep_history(dataset_name, data)
        elif dataset_name.endswith("_errors"):
            self._run.log_errors(data)
        elif ".scores_" in dataset_name:
            self._run.log_scores(data)
        elif dataset_name.startswith("rows_"):
            self._run.complete_children(data)

    @hook_impl(tryfirst=True)
    def after_pipeline_run(self, pipeline: Pipeline, catalog: DataCatalog) -> None:
        if self._run:
            self._run.finish("FINISHED", kept=_kept(pipeline, catalog))
        self._run = None

    @hook_impl(tryfirst=True)
    def on_pipeline_error(self, error: Exception) -> None:
        if self._run:
            status = "KILLED" if isinstance(error, InterruptedRunError) else "FAILED"
            self._run.finish(status, error=error)
        self._run = None


def _kept(pipeline: Pipeline, catalog: DataCatalog) -> list[Path]:
    """The files of the report that this run made: the tables, the figures and the page."""
    made = pipeline.all_outputs()
    found = []
    for name in ("baselines", *REPORT, *sorted(each for each in made if each.startswith("figure_"))):
        if name in made:
            dataset: Any = catalog.get(name)
            versioned = isinstance(dataset, AbstractVersionedDataset) and dataset._version is not None
            found.append(Path(str(dataset._get_load_path() if versioned else dataset._filepath)))
    return found


class _Child:
    """What one run of MLflow is to say of an encoding of a layer: gathered here, and written now and then."""

    def __init__(self, layer: int, row: Encoding, k: int | None) -> None:
        self.layer = layer
        self.row = row
        self.k = k
        self.name = f"layer_{layer}/{row.name}"
        self.run_id = ""
        self.begun = False
        self.closed = False
        self.known: set[str] = set()
        self._metrics: list[Metric] = []

    def add(self, values: Mapping[str, float], step: int = 0) -> list[Metric]:
        """Add metrics of a step, and give them."""
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self.known.update(values)
        self._metrics += metrics
        return metrics

    def take(self) -> list[Metric]:
        """What has been added since it was last asked for."""
        taken, self._metrics = self._metrics, []
        return taken


class _Run:
    """What one `kedro run` logs."""

    def __init__(
        self,
        project: Path,
        run_params: Mapping[str, Any],
        parameters: dict[str, Any],
        catalog: DataCatalog,
        rows: Mapping[str, Encoding],
    ) -> None:
        self.started: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self._project = project
        self._parameters = parameters
        self._catalog = catalog
        self._shards: dict[str, Any] = {split: catalog.get(f"shards_{split}") for split in parameters["shards"]}
        self._rows = rows
        self._histories: dict[tuple[int, str], list[dict[str, float]]] = {}
        self._children: dict[tuple[int, str], _Child] = {}
        self._curves: list[Metric] = []
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
        self._written: list[Future[Any]] = []
        self._lock = threading.Lock()
        self._steps: list[Metric] = []
        self._sent = time.time()
        self._began = time.perf_counter()
        self._client = MlflowClient()
        active = mlflow.active_run()
        self._parent = active.info if active else None
        self._manifest = {
            "run_id": run_params["run_id"],
            "command": sys.argv[1:],
            "environment": run_params["env"],
            "parameters": parameters,
            "versions": _versions(),
            "git": _git(project),
        }
        if self._parent:
            tags = [RunTag("command", " ".join(["kedro", *sys.argv[1:]]))]
            self._client.log_batch(self._parent.run_id, params=_flat_params(parameters), tags=tags)

    def keep_history(self, dataset_name: str, history: list[dict[str, float]]) -> None:
        """Hold the record of a fit for the children of its layer and method."""
        namespace, _, name = dataset_name.partition(".")
        self._histories[int(namespace.removeprefix("layer_")), name.removesuffix("_history")] = history

    def watch_step(self, layer: int, method: str, step: int, metrics: Mapping[str, float]) -> None:
        """Take a step of a fit for the parent's live curves; they are sent now and then, beside the fit."""
        now = time.time()
        with self._lock:
            self._steps += [
                Metric(f"layer_{layer}/{method}/{name}", value, int(now * 1000), step)
                for name, value in metrics.items()
            ]
            if now - self._sent < LIVE_SECONDS and len(self._steps) < BATCH - 20:
                return
        self.send_steps()

    def send_steps(self) -> None:
        """Send what steps there are; MLflow's own thread does the writing."""
        with self._lock:
            steps, self._steps, self._sent = self._steps, [], time.time()
        if self._parent:
            for start in range(0, len(steps), BATCH):
                self._client.log_batch(self._parent.run_id, metrics=steps[start : start + BATCH], synchronous=False)

    def log_utilisation(self, layer: str, method: str, counts: Any) -> None:
        """Log how many clusters of a fit hold 0, 1, 2-3, 4-7, ... tokens of the counts that it ended with."""
        if self._parent:
            octaves = Counter(int(count).bit_length() for count in counts.tolist())
            histogram = {
                "counts": "tokens of a cluster, multiplied by the decay before each further pass and rounded up: late ones weigh more",
                "decay": self._parameters["kmeans"]["decay"],
                "clusters": {str(2**octave // 2): octaves[octave] for octave in range(max(octaves) + 1)},
            }
            self._client.log_dict(self._parent.run_id, histogram, f"{layer}/{method}-utilisation.json")

    def log_agreement(self, agreement: Mapping[str, Any]) -> None:
        """Log how far a seed's fit agrees with the first to its children."""
        names = {"inertia": "validation_inertia", "adjusted_rand_index": "adjusted_rand_index"}
        values = {shown: agreement[name] for name, shown in names.items()}
        for row in self._rows_of(seeded("kmeans", agreement["seed"])):
            self._child(agreement["layer"], row.name, row.k).add(values)

    def log_errors(self, errors: Mapping[str, Any]) -> None:
        """Log the NMSE of every K, and the fit's steps, to the children that they belong to."""
        layer, method = errors["layer"], errors["method"]
        found = {row["k"]: row for row in errors["rows"]}
        for row in self._rows_of(method):
            # A dictionary but PCA has one row, whose k may be that of an older version that was asked for.
            k, values = (row.k, found[row.k]) if row.k in found else next(iter(found.items()))
            child = self._child(layer, row.name, k)
            for number, metrics in enumerate(self._histories.get((layer, method), [])):
                known = dict(metrics)
                # PCA's record is of some steps only, and says which.
                child.add(known, int(known.pop("step", number)))
            self._log(child, values)

    def log_scores(self, scores: Mapping[str, Any]) -> None:
        """Log what the probes say of an encoding to its child."""
        child = self._child(scores["layer"], scores["encoding"], scores["k"])
        self._log(child, scores)
        self._write(child)

    def complete_children(self, rows: list[dict[str, Any]]) -> None:
        """Log what this run's children lack of a layer's rows, as part of a row may have been up to date already, and close them."""
        for row in rows:
            child = self._children.get((row["layer"], row["name"]))
            if child is not None:
                self._log(child, row)
                self._write(child, status="FINISHED")
        self._write_curves()

    def finish(self, status: str, *, kept: Sequence[Path] = (), error: Exception | None = None) -> None:
        """Close the children and write the manifest, also as an artifact of the parent beside the table."""
        fitting.observers.remove(self.watch_step)
        self.send_steps()
        path = self._write_manifest(status, "".join(traceback.format_exception(error)) if error else None)
        for child in self._children.values():
            if not child.closed:
                self._write(child, status=status)
        self._write_curves()
        self._writer.shutdown(wait=True)
        for written in self._written:
            if failure := written.exception():
                logger.error("MLflow did not take all of this run: %s", failure)
        if self._parent:
            self._client.log_artifact(self._parent.run_id, str(path))
            if error:
                self._client.set_tag(self._parent.run_id, "failure", f"{type(error).__name__}: {error}"[:5000])
            for each in kept:
                self._client.log_artifact(self._parent.run_id, str(each))
                if each.suffix == ".md":  # the table for a paper, where MLflow shows a run's description
                    self._client.set_tag(self._parent.run_id, "mlflow.note.content", each.read_text())

    def _rows_of(self, method: str) -> list[Encoding]:
        return [row for row in self._rows.values() if row.method == method]

    def _child(self, layer: int, encoding: str, k: int | None) -> _Child:
        with self._lock:
            return self._children.setdefault((layer, encoding), _Child(layer, self._rows[encoding], k))

    def _log(self, child: _Child, values: Mapping[str, Any]) -> None:
        """Log metrics to the child, and to the parent under the encoding's name with step = layer: a curve over layers."""
        found = {name: float(values[name]) for name in METRICS + DETAILS if values.get(name) is not None}
        new = child.add({name: value for name, value in found.items() if name not in child.known})
        with self._lock:
            self._curves += [
                Metric(f"{child.row.name}/{metric.key}", metric.value, metric.timestamp, child.layer)
                for metric in new
                if metric.key in METRICS
            ]

    def _write(self, child: _Child, status: str | None = None) -> None:
        """Have what is new of a child written, and the child closed where there is a status."""
        child.closed = child.closed or status is not None
        if self._parent is None:
            return
        metrics = child.take()
        about = None
        if not child.begun:
            child.begun = True
            shards = {split: dataset.load() for split, dataset in self._shards.items()}
            about = self._tags_of(child, shards), _params_of(child), _lineage(shards)
        self._written.append(self._writer.submit(self._send, child, about, metrics, status))

    def _send(
        self,
        child: _Child,
        about: tuple[dict[str, str], list[Param], list[DatasetInput]] | None,
        metrics: list[Metric],
        status: str | None,
    ) -> None:
        """In the thread that writes: begin the child with what it is `about`, log to it, close it."""
        assert self._parent is not None
        params: list[Param] = []
        if about is not None:
            tags, params, inputs = about
            created = self._client.create_run(self._parent.experiment_id, run_name=child.name, tags=tags)
            child.run_id = created.info.run_id
            self._client.log_inputs(child.run_id, inputs)
        for start in range(0, max(len(metrics), len(params)), BATCH):
            part = metrics[start : start + BATCH]
            self._client.log_batch(child.run_id, metrics=part, params=params if start == 0 else [])
        if status is not None:
            self._client.set_terminated(child.run_id, status)

    def _write_curves(self) -> None:
        with self._lock:
            curves, self._curves = self._curves, []
        if self._parent is not None:
            parent = self._parent.run_id
            for start in range(0, len(curves), BATCH):
                part = curves[start : start + BATCH]
                self._written.append(self._writer.submit(self._client.log_batch, parent, metrics=part))

    def _tags_of(self, child: _Child, shards: Mapping[str, Shards]) -> dict[str, str]:
        assert self._parent is not None
        return {
            "mlflow.parentRunId": self._parent.run_id,
            "model_family": shards["fit"].metadata.family,
            "model_ckpt": shards["fit"].metadata.ckpt,
            **{f"shards.{split}": handle.name for split, handle in shards.items()},
            "dictionary": self._source_of(child.layer, child.row.method),
            "mlflow.note.content": _describe(child.layer, child.row, shards),
        }

    def _source_of(self, layer: int, method: str) -> str:
        """Where a dictionary lies: the version of the fitted model, the weights, or saev's folder; relative where it is the project's."""
        kept = self._catalog.keys()
        name = next(
            (name for kind in ("weights", "metrics") if (name := f"layer_{layer}.{kind}_{method}") in kept), None
        )
        dataset: Any = self._catalog.get(name or f"layer_{layer}.{method}_model")
        path = dataset.folder if hasattr(dataset, "folder") else Path(str(dataset._get_load_path()))
        return str(path.relative_to(self._project) if path.is_relative_to(self._project) else path)

    def _write_manifest(self, status: str, reason: str | None) -> Path:
        shards = {split: dataset.load() for split, dataset in self._shards.items() if dataset.exists()}
        manifest = self._manifest | {
            "status": status,
            "failure": reason,
            "shards": {
                split: {"name": handle.name, "fingerprint": handle.fingerprint(), "ckpt": handle.metadata.ckpt}
                for split, handle in shards.items()
            },
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "seconds_by_stage": {name: round(value, 3) for name, value in _by_stage(self.seconds).items()},
            "seconds_in_all": round(time.perf_counter() - self._began, 3),
        }
        path = self._project / MANIFESTS / f"{self._manifest['run_id']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with publish_file(path) as partial:
            partial.write_text(json.dumps(manifest, indent=1))
        return path


def _describe(layer: int, row: Encoding, shards: Mapping[str, Shards]) -> str:
    """A child's description in MLflow, Markdown."""
    k = "" if row.k is None else f", k = {row.k}"
    seed = "" if row.seed is None else f", seed {row.seed}"
    return (
        f"**{seedless(row.name)}**{k}{seed}: codes of layer {layer} of {shards['fit'].metadata.family} {shards['fit'].metadata.ckpt}. "
        f"NMSE on shards `{shards['val'].name}`; probes fitted on `{shards['probe_train'].name}` and judged on "
        f"`{shards['probe_val'].name}`."
    )


def _params_of(child: _Child) -> list[Param]:
    method = seedless(child.row.method)
    params = {"layer": child.layer, "method": method, "encoding": seedless(child.row.name)}
    params[{"kmeans": "n_clusters", "pca": "latent_topk"}.get(method, "k")] = child.k
    if child.row.seed is not None:
        params["seed"] = child.row.seed
    return [Param(key, str(value)) for key, value in params.items()]


def _lineage(shards: Mapping[str, Shards]) -> list[DatasetInput]:
    """The splits' shards as MLflow's datasets: one that serves several splits is one of them, in the context of all."""
    splits: dict[str, list[str]] = {}
    for split, handle in shards.items():
        splits.setdefault(handle.fingerprint(), []).append(split)
    found = []
    for fingerprint, serves in splits.items():
        handle = shards[serves[0]]
        profile = {"tokens": handle.n_tokens, "examples": handle.n_examples, "d_model": handle.d_model}
        dataset = Dataset(
            name=f"shards {handle.name}",
            digest=fingerprint[:8],
            source_type="local",
            source=json.dumps({"uri": str(handle.path)}),
            profile=json.dumps(profile),
        )
        found.append(DatasetInput(dataset, [InputTag("mlflow.data.context", ", ".join(serves))]))
    return found


def _by_stage(seconds: Mapping[str, float]) -> dict[str, float]:
    """The sum over the nodes of each stage; a node is named ``layer_23.pca.fit`` or ``report.page``."""
    found: dict[str, float] = {}
    for name, value in seconds.items():
        stage = seedless(re.sub(r"^layer_\d+\.", "", name).partition(".")[0])
        found[stage] = found.get(stage, 0.0) + value
    return found


def _flat_params(parameters: Mapping[str, Any], prefix: str = "") -> list[Param]:
    flat: list[Param] = []
    for name, value in parameters.items():
        if isinstance(value, dict):
            flat += _flat_params(value, f"{prefix}{name}.")
        else:
            flat.append(Param(f"{prefix}{name}", str(value)))
    return flat


def _versions() -> dict[str, str]:
    names = ("assay-baselines", "torch", "numpy", "kedro", "mlflow")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def _git(project: Path) -> dict[str, Any] | None:
    """The commit and whether files differ from it; None outside a git checkout."""

    def ask(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(project), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD"),
            "modified": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None

"""What one `kedro run` logs."""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kedro.io import DataCatalog
from mlflow.entities import DatasetInput, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient

from assay.encodings import Encoding, child_name, layer_name
from assay.io.publish import publish_file
from assay.io.shards import Shards
from assay.pipelines.report.tables import MEASURES
from assay.tracking import process
from assay.tracking.connection import FAILURE, PARENT, Connection, end_with_reason, forget_failure
from assay.tracking.describe import describe, flat_params, git_state, lineage, params_of, sum_by_stage, versions

DETAILS = (
    "mean_train_ce",
    "mean_val_ce",
    "mean_feature_ce",
    "median_feature_ce",
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

MANIFESTS = Path("data/08_reporting/manifests")
PARAMS = 100  # and so many parameters
BATCH = 1000  # MLflow takes so many metrics in one request
LIVE_SECONDS = 5.0  # between two batches of a fit's steps
STEP_SECONDS = 0.5  # between two steps that are shown live: a database takes a quarter of a millisecond for each number
STEPS = 40  # of a fit that each of its children is told


class Child:
    """What one run of MLflow is to say of an encoding of a layer: gathered here, and written now and then."""

    def __init__(self, layer: int, row: Encoding, k: int) -> None:
        self.layer = layer
        self.row = row
        self.k = k
        self.name = child_name(layer, row.name)
        self.run_id = ""
        self.begun = False
        self.closed = False
        self.ended = False
        self.known: dict[str, float] = {}
        self.had: Mapping[str, float] = {}
        self._metrics: list[Metric] = []

    def add(self, values: Mapping[str, float], step: int = 0) -> None:
        """Add metrics of a step."""
        now = int(time.time() * 1000)
        self._metrics += [Metric(name, value, now, step) for name, value in values.items()]
        self.known.update(values)

    def take(self) -> list[Metric]:
        """What has been added since it was last asked for."""
        taken, self._metrics = self._metrics, []
        return taken


class Run:
    """What one `kedro run` logs."""

    def __init__(
        self,
        project: Path,
        run_params: Mapping[str, Any],
        parameters: dict[str, Any],
        catalog: DataCatalog,
        rows: Mapping[str, Encoding],
        connection: Connection,
    ) -> None:
        self.started: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self._project = project
        self._parameters = parameters
        self._catalog = catalog
        self._shards: dict[str, Any] = {split: catalog.get(f"shards_{split}") for split in parameters["shards"]}
        self._rows = rows
        self._children: dict[tuple[int, str], Child] = {}
        self._told = {child_name(layer, name): (layer, name) for layer in parameters["layers"] for name in rows}
        self._curves: list[Metric] = []
        self._connection = connection
        self._writer = connection.writer
        self._parent = connection.parent
        self._lock = threading.Lock()
        self._steps: list[Metric] = []
        self._shown: dict[tuple[int, str], float] = {}
        self._held: dict[tuple[int, str], list[Metric]] = {}
        self._sent = time.time()
        self._began = time.perf_counter()
        self._client = MlflowClient()
        self._manifest = {
            "run_id": run_params["run_id"],
            "command": sys.argv[1:],
            "environment": run_params["env"],
            "parameters": parameters,
            "versions": versions(),
            "git": git_state(project),
        }
        if self._parent:
            self._log_parameters(self._parent.run_id, flat_params(parameters))

    def _log_parameters(self, parent: str, params: list[Param]) -> None:
        """Log what is new; a run that is taken up keeps in MLflow the parameters that it had, and a tag says which are others now."""
        had = self._connection.params
        tags = [RunTag("command", " ".join(["kedro", *sys.argv[1:]]))]
        changed = [
            f"{each.key}: {had[each.key]} -> {each.value}"
            for each in params
            if had.get(each.key, each.value) != each.value
        ]
        if changed:
            tags.append(RunTag("changed_params", "\n".join(changed)[:5000]))
        new = [each for each in params if each.key not in had]
        for start in range(0, len(new), PARAMS):
            self._submit("the parameters", self._client.log_batch, parent, params=new[start : start + PARAMS])
        self._submit("the command", self._client.log_batch, parent, tags=tags)

    def _submit(self, what: str, request: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        if self._parent is not None:
            self._writer.submit(what, request, *arguments, **options)

    def watch_step(self, layer: int, method: str, step: int, metrics: Mapping[str, float]) -> None:
        """Take a step of a fit for the parent's live curves, two a second at the most; they are sent now and then, beside the fit."""
        now = time.time()
        found = [
            Metric(f"{child_name(layer, method)}/{name}", value, int(now * 1000), step)
            for name, value in metrics.items()
        ]
        with self._lock:
            if now - self._shown.get((layer, method), 0.0) < STEP_SECONDS:
                self._held[layer, method] = found  # the last that there is, should no other come
                return
            self._shown[layer, method] = now
            self._held.pop((layer, method), None)
            self._steps += found
            if now - self._sent < LIVE_SECONDS and len(self._steps) < BATCH - 20:
                return
        self.send_steps()

    def send_steps(self) -> None:
        """Have what steps there are written, the last one of each fit among them."""
        with self._lock:
            steps = [*self._steps, *(metric for held in self._held.values() for metric in held)]
            self._steps, self._held, self._sent = [], {}, time.time()
        self._log_to_parent("the live curves", steps)

    def log_utilisation(self, layer: str, method: str, model: Mapping[str, Any]) -> None:
        """Log how many clusters of a fit hold 0, 1, 2-3, 4-7, ... tokens of the counts that it ended with."""
        if self._parent is None:
            return
        octaves = Counter(int(count).bit_length() for count in model["counts"].tolist())
        histogram = {
            "counts": "tokens of a cluster, multiplied by the decay before each further pass and rounded up: late ones weigh more",
            "decay": self._parameters["kmeans"]["decay"],
            "clusters": {str(2**octave // 2): octaves[octave] for octave in range(max(octaves) + 1)},
        }
        name = f"{layer}/{method}-utilisation.json"
        self._submit(name, self._client.log_dict, self._parent.run_id, histogram, name)

    def log_errors(self, errors: Mapping[str, Any]) -> None:
        """Log the NMSE of every K to the parent; the children, which are made when they are probed, find it in the catalog."""
        for row in self._rows.values():
            if row.model.name == errors["method"]:
                self._add_to_curves(errors["layer"], row, _of_k(errors, row.k))
                child = self._children.get((errors["layer"], row.name))
                if child is not None:  # it was probed first, and found what an earlier run had measured, if anything
                    child.add(_known(_of_k(errors, row.k)))

    def log_agreement(self, agreement: Mapping[str, Any]) -> None:
        """Log how far a seed's fit agrees with the first to those of its children that are there already."""
        for child in self._children.values():
            of = child.row.model
            if (child.layer, of.method, of.seed) == (agreement["layer"], "kmeans", agreement["seed"]):
                child.add(_agreement_metrics(agreement))

    def log_scores(self, scores: Mapping[str, Any]) -> None:
        """Make the child of an encoding that was probed: what the probes say, and the fit's steps, errors and agreement."""
        self._add_to_curves(scores["layer"], self._rows[scores["encoding"]], scores)
        self._write(self._gather(scores))

    def _gather(self, scores: Mapping[str, Any]) -> Child:
        """The child of an encoding with all that the catalog has of it."""
        layer, row = scores["layer"], self._rows[scores["encoding"]]
        child = Child(layer, row, scores["k"])
        history = self._load(layer, f"{row.model.name}_history") or []
        for number in thinned(len(history), STEPS):
            known = dict(history[number])
            child.add(known, int(known.pop("step", number + 1)))  # PCA's record is of some steps only, and says which
        errors = self._load(layer, f"{row.model.name}_errors")
        if errors is not None:
            child.add(_known(_of_k(errors, row.k)))
        agreement = self._load(layer, f"{row.model.name}_agreement")
        if agreement is not None:
            child.add(_agreement_metrics(agreement))
        child.add(_known(scores))
        with self._lock:
            self._children[layer, row.name] = child
        return child

    def complete_children(self, rows: list[dict[str, Any]]) -> None:
        """Close the children of a layer whose rows are whole."""
        for row in rows:
            child = self._children.get((row["layer"], row["name"])) or self._find_begun(row)
            if child is not None:
                child.add({name: value for name, value in _known(row).items() if child.known.get(name) != value})
                self._write(child, status="FINISHED")
        self._write_curves()

    def _find_begun(self, row: Mapping[str, Any]) -> Child | None:
        """The child of a row that an earlier process of the same parent probed, and did not come to make or to close."""
        begun = self._connection.children.get(child_name(row["layer"], row["name"]))
        if not self._connection.taken_up or (begun is not None and begun.info.status == "FINISHED"):
            return None
        scores = self._load(row["layer"], f"scores_{row['name']}")
        if scores is None:
            return None
        child = self._gather(scores)
        self._add_to_curves(child.layer, child.row, row)
        return child

    def finish(self, status: str, *, kept: Sequence[Path] = (), error: Exception | None = None) -> None:
        """Close the children and write the manifest, also as an artifact of the parent beside the table.

        A run that was interrupted as it finished is finished once more, as one that was interrupted.
        """
        self.send_steps()
        self._write_curves()
        reason = f"{type(error).__name__}: {error}" if error else None
        for child in self._children.values():
            if not child.closed:
                self._write(child, status=status, reason=reason)
        if status == "FINISHED":
            self._close_whole_children()
        trace = "".join(traceback.format_exception(error)) if error else None
        if self._parent:
            parent = self._parent.run_id
            for each in kept:
                self._submit(each.name, self._client.log_artifact, parent, str(each))
                if each.suffix == ".md":  # the table for a paper, where MLflow shows a run's description
                    note = each.read_text(encoding="utf-8")
                    self._submit(each.name, self._client.set_tag, parent, "mlflow.note.content", note)
            path = self._write_manifest(status, trace)
            self._submit(path.name, self._client.log_artifact, parent, str(path))
        self._writer.submit_always("the end of the children", self._end_children, reason)
        self._connection.close(status, reason)
        self._writer.wait()
        # Once more: it says by now whether MLflow took everything.
        self._write_manifest(status, trace)

    def _close_whole_children(self) -> None:
        """Close those children that an earlier process of the same parent had nothing more to tell, but did not come to close."""
        for name, begun in self._connection.children.items():
            if (
                begun.info.status not in ("KILLED", "FAILED")
                or name not in self._told
                or self._told[name] in self._children
            ):
                continue
            layer, encoding = self._told[name]
            rows = f"rows_{layer_name(layer)}"
            found = self._catalog.load(rows) if self._catalog.exists(rows) else []
            row = next((row for row in found if row["name"] == encoding), None)
            if row is not None and _known(row).keys() <= begun.data.metrics.keys():
                self._submit(name, forget_failure, begun)
                self._submit(name, self._client.set_terminated, begun.info.run_id, "FINISHED")

    def _end_children(self, reason: str | None) -> None:
        """In the thread that writes: close the children that MLflow did not take whole."""
        for child in self._children.values():
            if child.run_id and not child.ended:
                end_with_reason(child.run_id, "KILLED", reason or f"not logged: {self._writer.failure}")
                child.ended = True

    def _load(self, layer: int, name: str) -> Any:
        """A result of a layer, made in this run or before; None where there is none."""
        name = f"{layer_name(layer)}.{name}"
        return self._catalog.load(name) if name in self._catalog and self._catalog.exists(name) else None

    def _add_to_curves(self, layer: int, row: Encoding, values: Mapping[str, Any]) -> None:
        """Note the table's metrics for the parent, under the encoding's name with step = layer: a curve over layers."""
        now = int(time.time() * 1000)
        found = {name: value for name, value in _known(values).items() if name in MEASURES}
        with self._lock:
            self._curves += [Metric(f"{row.name}/{name}", value, now, layer) for name, value in found.items()]

    def _write(self, child: Child, status: str | None = None, reason: str | None = None) -> None:
        """Have what is new of a child written, and the child closed where there is a status."""
        child.closed = child.closed or status is not None
        if self._parent is None:
            return
        metrics = child.take()
        if not child.begun:
            child.begun = True
            shards = {split: dataset.load() for split, dataset in self._shards.items()}
            params = params_of(child.layer, child.row, child.k)
            self._submit(child.name, self._begin, child, self._tags_of(child, shards), params)
            self._submit(child.name, self._describe, child, params, lineage(shards))
        self._submit(child.name, self._send, child, metrics, status, reason)

    def _begin(self, child: Child, tags: dict[str, str], params: list[Param]) -> None:
        """In the thread that writes: make a child, or take up that of an earlier process with the same parameters."""
        begun = self._connection.children.get(child.name)
        if begun is not None and begun.data.params == {each.key: each.value for each in params}:
            self._take_up(begun, tags)
            child.run_id, child.had = begun.info.run_id, begun.data.metrics
        else:
            assert self._parent is not None
            child.run_id = self._client.create_run(
                self._parent.experiment_id, run_name=child.name, tags=tags
            ).info.run_id

    def _describe(self, child: Child, params: list[Param], inputs: list[DatasetInput]) -> None:
        self._client.log_inputs(child.run_id, inputs)
        self._client.log_batch(child.run_id, params=params)

    def _send(self, child: Child, metrics: list[Metric], status: str | None, reason: str | None) -> None:
        """In the thread that writes: log to a child, and close it where there is a status."""
        metrics = _unlogged(metrics, child.had)
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(child.run_id, metrics=metrics[start : start + BATCH])
        if status is not None:
            if reason is not None:
                self._client.set_tag(child.run_id, FAILURE, reason[:5000])
            self._client.set_terminated(child.run_id, status)
            child.ended = True

    def _take_up(self, begun: MlflowRun, tags: dict[str, str]) -> None:
        """Go on with a child of an earlier process of the same parent."""
        self._client.log_batch(begun.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        self._client.update_run(begun.info.run_id, status="RUNNING")
        forget_failure(begun)

    def _write_curves(self) -> None:
        with self._lock:
            curves, self._curves = self._curves, []
        self._log_to_parent("the curves over layers", curves)

    def _log_to_parent(self, what: str, metrics: list[Metric]) -> None:
        if self._parent is not None:
            for start in range(0, len(metrics), BATCH):
                part = metrics[start : start + BATCH]
                self._submit(what, self._client.log_batch, self._parent.run_id, metrics=part)

    def _tags_of(self, child: Child, shards: Mapping[str, Shards]) -> dict[str, str]:
        assert self._parent is not None
        return {
            PARENT: self._parent.run_id,
            process.TAG: process.own_process(),
            "model_family": shards["fit"].metadata.family,
            "model_ckpt": shards["fit"].metadata.ckpt,
            **{f"shards.{split}": handle.name for split, handle in shards.items()},
            "dictionary": self._source_of(child.layer, child.row.model.name),
            "mlflow.note.content": describe(child.layer, child.row, shards),
        }

    def _source_of(self, layer: int, method: str) -> str:
        """Where a dictionary lies: the version of the fitted model, the weights, or saev's folder; relative where it is the project's."""
        kept = self._catalog.keys()
        name = next(
            (name for kind in ("weights", "metrics") if (name := f"{layer_name(layer)}.{kind}_{method}") in kept), None
        )
        dataset: Any = self._catalog.get(name or f"{layer_name(layer)}.{method}_model")
        path = dataset.folder if hasattr(dataset, "folder") else Path(str(dataset._get_load_path()))
        return str(path.relative_to(self._project) if path.is_relative_to(self._project) else path)

    def _write_manifest(self, status: str, reason: str | None) -> Path:
        shards = {split: dataset.load() for split, dataset in self._shards.items() if dataset.exists()}
        manifest = self._manifest | {
            "status": status,
            "failure": reason,
            "not_logged": self._writer.failure,
            "shards": {
                split: {"name": handle.name, "fingerprint": handle.fingerprint(), "ckpt": handle.metadata.ckpt}
                for split, handle in shards.items()
            },
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "seconds_by_stage": {name: round(value, 3) for name, value in sum_by_stage(self.seconds).items()},
            "seconds_in_all": round(time.perf_counter() - self._began, 3),
        }
        path = self._project / MANIFESTS / f"{self._manifest['run_id']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with publish_file(path) as partial:
            partial.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        return path


def thinned(n: int, most: int) -> list[int]:
    """At most so many of n places, evenly, with the first and the last."""
    if n <= most:
        return list(range(n))
    return sorted({round(place * (n - 1) / (most - 1)) for place in range(most)})


def _known(values: Mapping[str, Any]) -> dict[str, float]:
    """Those of the metrics that there are."""
    return {name: float(values[name]) for name in MEASURES + DETAILS if values.get(name) is not None}


def _unlogged(metrics: list[Metric], had: Mapping[str, float]) -> list[Metric]:
    """Of the metrics of a child that is taken up those that do not end as the ones that it has."""
    last = {each.key: each.value for each in sorted(metrics, key=lambda each: each.step)}
    return [each for each in metrics if had.get(each.key) != last[each.key]]


def _of_k(errors: Mapping[str, Any], k: int | None) -> Mapping[str, Any]:
    """A dictionary but PCA has one row of errors, whose k may be that of an older version that was asked for."""
    found = {row["k"]: row for row in errors["rows"]}
    return found[k] if k in found else next(iter(found.values()))


def _agreement_metrics(agreement: Mapping[str, Any]) -> dict[str, float]:
    return {
        "validation_inertia": agreement["inertia"],
        "adjusted_rand_index": agreement["adjusted_rand_index"],
    }

"""What one `kedro run` logs."""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kedro.io import DataCatalog
from mlflow.entities import Param, RunTag

from assay.encodings import Encoding, child_name, layer_name
from assay.io.datasets import SaeDataset
from assay.tracking.child_runs import ChildRuns
from assay.tracking.children import Child, agreement_metrics, errors_of, known_metrics, thinned
from assay.tracking.connection import Connection
from assay.tracking.describe import flat_params
from assay.tracking.manifest import Manifest
from assay.tracking.ownership import end_with_reason, forget_failure

PARAMS = 100  # and so many parameters
STEPS = 40  # of a fit that each of its children is told


class Run(ChildRuns):
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
        super().__init__(project, catalog, parameters["shards"], connection)
        self._parameters = parameters
        self._rows = rows
        self._children: dict[tuple[int, str], Child] = {}
        self._told = {
            child_name(layer, name): (layer, name)
            for layer in parameters["layers"]
            for name in rows
        }
        self._manifest = Manifest(project, run_params, parameters)
        if self._parent:
            parent = self._parent.run_id
            self._submit("the parameters", self._log_parameters, parent, flat_params(parameters))

    def _log_parameters(self, parent: str, params: list[Param]) -> None:
        """In the thread that writes: log what is new; a run that is taken up, or that another
        process has just logged its own to, keeps in MLflow the parameters that it had, and a tag
        says which are others now.
        """
        taken_up = self._connection.taken_up
        had = self._client.get_run(parent).data.params if taken_up else {}
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
            self._client.log_batch(parent, params=new[start : start + PARAMS])
        self._client.log_batch(parent, tags=tags)

    def log_utilization(self, layer: str, method: str, model: Mapping[str, Any]) -> None:
        """Log how many clusters of a fit hold 0, 1, 2-3, 4-7, ... tokens of the counts that it
        ended with.
        """
        if self._parent is None:
            return
        octaves = Counter(int(count).bit_length() for count in model["counts"].tolist())
        histogram = {
            "counts": (
                "tokens of a cluster, multiplied by the decay before each further pass and rounded"
                " up: late ones weigh more"
            ),
            "decay": self._parameters["kmeans"]["decay"],
            "clusters": {
                str(2**octave // 2): octaves[octave] for octave in range(max(octaves) + 1)
            },
        }
        name = f"{layer}/{method}-utilisation.json"
        self._submit(name, self._client.log_dict, self._parent.run_id, histogram, name)

    def log_errors(self, errors: Mapping[str, Any]) -> None:
        """Log the NMSE of every K to the parent; the children, which are made when they are probed,
        find it in the catalog.
        """
        for row in self._rows.values():
            if row.model.name == errors["method"]:
                self._add_to_curves(errors["layer"], row, errors_of(errors, row.k))
                child = self._children.get((errors["layer"], row.name))
                # It was probed first, and found what an earlier run had measured, if anything.
                if child is not None:
                    child.add(known_metrics(errors_of(errors, row.k)))

    def log_agreement(self, agreement: Mapping[str, Any]) -> None:
        """Log how far a seed's fit agrees with the first to those of its children that are there
        already.
        """
        for child in self._children.values():
            of = child.row.model
            told = child.layer == agreement["layer"] and of.seed == agreement["seed"]
            if told and of.family == "kmeans":
                child.add(agreement_metrics(agreement))

    def log_scores(self, scores: Mapping[str, Any]) -> None:
        """Make the child of an encoding that was probed: what the probes say, and the fit's steps,
        errors and agreement.
        """
        self._add_to_curves(scores["layer"], self._rows[scores["encoding"]], scores)
        self._write(self._gather(scores))

    def _gather(self, scores: Mapping[str, Any]) -> Child:
        """The child of an encoding with all that the catalog has of it."""
        layer, row = scores["layer"], self._rows[scores["encoding"]]
        child = Child(layer, row, scores["k"])
        history = self._load(layer, f"{row.model.name}_history") or []
        for number in thinned(len(history), STEPS):
            known = dict(history[number])
            # PCA's record is of some steps only, and says which.
            child.add(known, int(known.pop("step", number + 1)))
        errors = self._load(layer, f"{row.model.name}_errors")
        if errors is not None:
            child.add(known_metrics(errors_of(errors, row.k)))
        agreement = self._load(layer, f"{row.model.name}_agreement")
        if agreement is not None:
            child.add(agreement_metrics(agreement))
        child.add(known_metrics(scores))
        with self._lock:
            self._children[layer, row.name] = child
        return child

    def complete_children(self, rows: list[dict[str, Any]]) -> None:
        """Close the children of a layer whose rows are whole."""
        for row in rows:
            child = self._children.get((row["layer"], row["name"])) or self._find_begun(row)
            if child is not None:
                child.add(
                    {
                        name: value
                        for name, value in known_metrics(row).items()
                        if child.known.get(name) != value
                    }
                )
                self._write(child, status="FINISHED")
        self._write_curves()

    def _find_begun(self, row: Mapping[str, Any]) -> Child | None:
        """The child of a row that an earlier process of the same parent probed, and did not come to
        make or to close.
        """
        begun = self._connection.children.get(child_name(row["layer"], row["name"]))
        if not self._connection.taken_up or (begun is not None and begun.info.status == "FINISHED"):
            return None
        scores = self._load(row["layer"], f"scores_{row['name']}")
        if scores is None:
            return None
        child = self._gather(scores)
        self._add_to_curves(child.layer, child.row, row)
        return child

    def finish(
        self, status: str, *, kept: Sequence[Path] = (), error: Exception | None = None
    ) -> None:
        """Close the children and write the manifest, also as an artifact of the parent beside the
        table.

        A run that was interrupted as it finished is finished once more, as one that was
        interrupted.
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
                # The table for a paper is what MLflow shows as the run's description.
                if each.suffix == ".md":
                    note = each.read_text(encoding="utf-8")
                    self._submit(
                        each.name, self._client.set_tag, parent, "mlflow.note.content", note
                    )
            self._write_manifest(status, trace)
            path = self._manifest.path
            self._submit(path.name, self._client.log_artifact, parent, str(path))
        self._writer.submit_always("the end of the children", self._end_children, reason)
        self._connection.close(status, reason)
        self._writer.wait()
        # Once more: it says by now whether MLflow took everything.
        self._write_manifest(status, trace)

    def _close_whole_children(self) -> None:
        """Close those children that an earlier process of the same parent had nothing more to tell,
        but did not come to close.
        """
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
            if row is not None and known_metrics(row).keys() <= begun.data.metrics.keys():
                self._submit(name, forget_failure, begun)
                self._submit(name, self._client.set_terminated, begun.info.run_id, "FINISHED")

    def _end_children(self, reason: str | None) -> None:
        """In the thread that writes: close the children that MLflow did not take whole."""
        for child in self._children.values():
            if child.run_id and not child.ended:
                end_with_reason(
                    child.run_id, "KILLED", reason or f"not logged: {self._writer.failure}"
                )
                child.ended = True

    def _load(self, layer: int, name: str) -> Any:
        """A result of a layer, made in this run or before; None where there is none."""
        name = f"{layer_name(layer)}.{name}"
        return (
            self._catalog.load(name)
            if name in self._catalog and self._catalog.exists(name)
            else None
        )

    def _write_manifest(self, status: str, trace: str | None) -> None:
        self._manifest.write(
            status,
            failure=trace,
            not_logged=self._writer.failure,
            shards={
                split: dataset.load() for split, dataset in self._shards.items() if dataset.exists()
            },
            dictionaries=self._dictionaries(),
            seconds=self.seconds,
        )

    def _dictionaries(self) -> dict[str, dict[str, Any]]:
        """What the autoencoders are that were read, by layer and name."""
        found: dict[str, dict[str, Any]] = {}
        for entry in self._catalog.keys():  # noqa: SIM118
            layer, _, name = entry.partition(".sae_")
            dataset = self._catalog.get(entry) if name else None
            if isinstance(dataset, SaeDataset) and dataset.said is not None:
                found.setdefault(layer, {})[name] = dataset.said
        return found

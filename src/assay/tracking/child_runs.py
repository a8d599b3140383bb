"""Creates, updates and closes child runs, in the thread that talks to MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kedro.io import DataCatalog
from mlflow.entities import DatasetInput, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun

from assay.encodings import layer_name
from assay.io.datasets import SaeDataset
from assay.io.shards import Shards
from assay.tracking import process
from assay.tracking.children import Child, unlogged
from assay.tracking.connection import PARENT, Connection
from assay.tracking.curves import BATCH, Curves
from assay.tracking.describe import describe, lineage, params_of
from assay.tracking.ownership import FAILURE, forget_failure


class ChildRuns(Curves):
    """Writes the children of a run."""

    def __init__(
        self, project: Path, catalog: DataCatalog, splits: Mapping[str, Any], connection: Connection
    ) -> None:
        super().__init__(connection)
        self._project = project
        self._catalog = catalog
        self._shards: dict[str, Any] = {split: catalog.get(f"shards_{split}") for split in splits}
        self._connection = connection

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
        """In the thread that writes: make a child, or take up that of an earlier process with the
        same parameters.
        """
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

    def _send(
        self, child: Child, metrics: list[Metric], status: str | None, reason: str | None
    ) -> None:
        """In the thread that writes: log to a child, and close it where there is a status."""
        metrics = unlogged(metrics, child.had)
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(child.run_id, metrics=metrics[start : start + BATCH])
        if status is not None:
            if reason is not None:
                self._client.set_tag(child.run_id, FAILURE, reason[:5000])
            self._client.set_terminated(child.run_id, status)
            child.ended = True

    def _take_up(self, begun: MlflowRun, tags: dict[str, str]) -> None:
        """Go on with a child of an earlier process of the same parent."""
        self._client.log_batch(
            begun.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()]
        )
        self._client.update_run(begun.info.run_id, status="RUNNING")
        forget_failure(begun)

    def _tags_of(self, child: Child, shards: Mapping[str, Shards]) -> dict[str, str]:
        assert self._parent is not None
        return {
            PARENT: self._parent.run_id,
            process.TAG: process.own_process(),
            "model_family": shards["fit"].metadata.family,
            "model_ckpt": shards["fit"].metadata.ckpt,
            **{f"shards.{split}": handle.name for split, handle in shards.items()},
            **self._source_of(child.layer, child.row.model.name),
            "mlflow.note.content": describe(child.layer, child.row, shards),
        }

    def _source_of(self, layer: int, method: str) -> dict[str, str]:
        """Where a dictionary lies: the version of the fitted model, the autoencoder's file, or
        saev's folder; relative where it is the project's. Of an autoencoder, what it is as well.
        """
        kept = self._catalog.keys()
        name = next(
            (
                name
                for kind in ("sae", "metrics")
                if (name := f"{layer_name(layer)}.{kind}_{method}") in kept
            ),
            None,
        )
        dataset: Any = self._catalog.get(name or f"{layer_name(layer)}.{method}_model")
        about = {}
        if isinstance(dataset, SaeDataset):
            path, said = Path(dataset.filepath), dataset.said or {}
            about = {
                f"dictionary.{key}": str(said[key])
                for key in ("commit", "library", "formula")
                if said.get(key) is not None
            }
        elif hasattr(dataset, "folder"):
            path = dataset.folder
        else:
            path = Path(str(dataset._get_load_path()))
        path = path.relative_to(self._project) if path.is_relative_to(self._project) else path
        return {"dictionary": str(path)} | about

"""What is up to date: a fingerprint beside every result, so that nothing is made twice from the same inputs.

The fingerprint of a result is a hash over the node that makes it (its name and what its function is bound to), the values of
its parameters, the fingerprints of its inputs and the format version. It is recorded when the result has been saved whole. A node is
run again when one of its results is missing or was recorded with another fingerprint.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kedro.framework.hooks import hook_impl
from kedro.io import AbstractVersionedDataset, DataCatalog, DatasetError
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from pydantic import BaseModel

logger = logging.getLogger(__name__)

FORMAT = 12
"""Raised whenever the same inputs and parameters would give other results: everything older is then made again."""

UNHASHED = frozenset({"params:device"})
"""Inputs that choose where the work is done, not what it is."""

SHAPING = {
    "params:kmeans": {"encodings", "sparsity", "checkpoint_steps", "checkpoint_minutes", "seed", "more_seeds"},
    "params:pca": {"topk", "checkpoint_steps", "checkpoint_minutes"},
    "params:probe": {"slab_features"},
}
"""Parameters that change no result: they say which nodes there are, each bound to its own part of them, or how often to save."""

FOLDER = Path("data/.fingerprints")


class Freshness:
    """The fingerprints of a project's results.

    Args:
        project: the project's root folder.
        catalog: the datasets.
        pipeline: every node there is, so that inputs can be followed to their sources.
    """

    def __init__(
        self,
        project: Path,
        catalog: DataCatalog,
        pipeline: Pipeline,
        load_versions: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = project / FOLDER
        self._catalog = catalog
        self._made_by = {output: node for node in pipeline.nodes for output in node.outputs}
        self._wanted: dict[str, str] = {}
        self._pinned = load_versions or {}

    def stale(self, pipeline: Pipeline) -> Pipeline:
        """The part of ``pipeline`` that has to run: results missing or out of date, and what feeds them from memory alone."""
        needed: set[str] = set()
        fed: set[str] = set()
        for node in reversed(pipeline.nodes):
            kept = [output for output in node.outputs if self._is_kept(output)]
            passed_on = fed.intersection(node.outputs) - set(kept)
            if passed_on or not all(self._is_current(output) for output in kept) or not node.outputs:
                needed.add(node.name)
                fed.update(node.inputs)
        return pipeline.only_nodes(*needed) if needed else Pipeline([])

    def check_inputs(self, pipeline: Pipeline) -> None:
        """Check that what ``pipeline`` reads and does not make is there; warn where it is out of date.

        Raises:
            FileNotFoundError: naming what is missing and the node that makes it.
        """
        for name, version in self._pinned.items():
            if not self._catalog.exists(name):
                raise FileNotFoundError(
                    f"`{name}` has no version {version}: leave --load-versions out, or name one it has."
                )
        for name in sorted(pipeline.inputs()):
            if _is_parameter(name):
                continue
            maker = self._made_by.get(name)
            remedy = f"run `{maker.name}` first, or leave the filters out" if maker else "correct its path"
            if not self._catalog.exists(name):
                raise FileNotFoundError(f"`{name}` does not exist ({self._catalog.get(name)!r}): {remedy}.")
            if maker and not self._is_current(name):
                logger.warning("`%s` was made from other inputs or parameters, and is used as it is: %s.", name, remedy)

    def note_sources(self, pipeline: Pipeline) -> None:
        """Take the fingerprints of what ``pipeline`` reads and no node makes, for all that is recorded from now on.

        A source that changes while it is read then leaves results that are out of date, not results of what it has become.
        """
        for name in sorted(pipeline.inputs()):
            if name not in self._made_by:
                self._fingerprint(name)

    def record(self, name: str, node: Node) -> None:
        """Note that ``node`` has saved ``name`` whole, from its inputs: sources as they were noted, results as they are now."""
        if not self._is_kept(name):
            return
        inputs = {source: self._found(source) for source in node.inputs}
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        record = {
            "fingerprint": _combine(node, inputs),
            "file": _file_of(self._catalog.get(name)),
            "node": node.name,
            "inputs": inputs,
        }
        partial.write_text(json.dumps(record, indent=1))
        partial.replace(path)

    def forget(self, name: str) -> None:
        """Note that ``name`` is about to be overwritten: until it is saved whole it counts as missing."""
        self._path(name).unlink(missing_ok=True)

    def _is_kept(self, name: str) -> bool:
        return name in self._catalog and type(self._catalog.get(name)).__name__ != "MemoryDataset"

    def _is_current(self, name: str) -> bool:
        if name in self._pinned:
            return self._catalog.exists(name)
        found = self._record(name)
        return (
            found.get("fingerprint") == self._fingerprint(name)
            and self._catalog.exists(name)
            and found.get("file") == _file_of(self._catalog.get(name))
        )

    def _fingerprint(self, name: str) -> str:
        """The fingerprint that ``name`` has when it is made from the inputs and parameters as they are now."""
        if name in self._pinned:
            return f"version {self._pinned[name]}"
        if name not in self._wanted:
            self._wanted[name] = self._compute(name)
        return self._wanted[name]

    def _found(self, name: str) -> str:
        """The fingerprint that ``name`` has as it is: not the one above where it was made from other inputs."""
        node = self._made_by.get(name)
        if node is None or name in self._pinned:
            return self._fingerprint(name)
        if self._is_kept(name):
            return str(self._record(name).get("fingerprint", "unknown"))
        return _combine(node, {source: self._found(source) for source in node.inputs})

    def _compute(self, name: str) -> str:
        if name in UNHASHED:
            return ""
        if _is_parameter(name):
            values = _plain(self._catalog.load(name))
            return _digest({key: values[key] for key in values.keys() - SHAPING[name]} if name in SHAPING else values)
        if name in self._made_by:
            node = self._made_by[name]
            return _combine(node, {source: self._fingerprint(source) for source in node.inputs})
        if not self._catalog.exists(name):
            return "missing"
        source: Any = self._catalog.get(name)
        try:
            return str(source.fingerprint())
        except DatasetError as error:
            raise ValueError(f"`{name}` cannot be read: {error.__cause__ or error}") from error

    def _record(self, name: str) -> dict[str, Any]:
        """What was recorded of a result; nothing where it was not, or not whole."""
        try:
            record = json.loads(self._path(name).read_text())
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"


class FreshnessHook:
    """Takes the sources' fingerprints before a run, and records that of every result as soon as it has been saved."""

    def __init__(self) -> None:
        self._freshness: Freshness | None = None

    @hook_impl
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> None:
        from kedro.framework.project import pipelines

        self._freshness = Freshness(
            Path(run_params["project_path"]),
            catalog,
            pipelines["__default__"] + pipeline,
            run_params.get("load_versions"),
        )
        self._freshness.note_sources(pipeline)

    @hook_impl
    def before_dataset_saved(self, dataset_name: str) -> None:
        if self._freshness:
            self._freshness.forget(dataset_name)

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, node: Node) -> None:
        if self._freshness:
            self._freshness.record(dataset_name, node)


def _is_parameter(name: str) -> bool:
    return name == "parameters" or name.startswith("params:")


def _file_of(dataset: Any) -> list[Any] | None:
    """Version and bytes of a dataset that is one file, so that a cut file, or the loss of the newest version, is seen."""
    if not isinstance(dataset, AbstractVersionedDataset):
        return None
    try:
        path = Path(dataset._get_load_path())
        return [path.parent.name, path.stat().st_size]
    except (DatasetError, OSError):
        return None


def _combine(node: Node, inputs: dict[str, str]) -> str:
    bound = node.func.keywords if isinstance(node.func, functools.partial) else {}
    return _digest({"format": FORMAT, "node": node.name, "bound": bound, "inputs": inputs})


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _digest(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()

"""Fingerprints: what a result is to be, known before anything is made.

The fingerprint of a result is a hash over the node that makes it (its name and what its function is
bound to), the values of its parameters, the fingerprints of its inputs down to the shards, and the
format version.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from kedro.io import DataCatalog, DatasetError
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from pydantic import BaseModel

from assay.io.datasets import CodesDataset
from assay.parameters import Parameters, added_defaults, changing_no_result

FORMAT = 12
"""Raised whenever the same inputs and parameters would give other results: everything older is then
made again.
"""

UNHASHED = frozenset(f"params:{name}" for name in changing_no_result(Parameters))
"""Parameters that choose where the work is done, not what it is."""

_SECTIONS = {
    f"params:{name}": field.annotation
    for name, field in Parameters.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}

SHAPING = {
    name: names for name, section in _SECTIONS.items() if (names := changing_no_result(section))
}
"""Per section, the parameters left out of fingerprints, since they change no result: they say which
nodes there are, or how often to save.
"""

ADDED = {
    name: defaults for name, section in _SECTIONS.items() if (defaults := added_defaults(section))
}
"""Per section, the parameters left out of fingerprints at these defaults: results that are older
than they were made so.
"""

UNKNOWN = "unknown"
"""The version of what cannot be told, because its sources cannot be read. It never equals a real
one.
"""


class Fingerprints:
    """The fingerprints of the results of a pipeline under the configuration in force.

    Args:
        catalog: the datasets.
        pipeline: every node there is, so that inputs can be followed to their sources.
        load_versions: versions that are asked for by the datasets' names, whatever they were made
            from: ``pinned``.
    """

    def __init__(
        self,
        catalog: DataCatalog,
        pipeline: Pipeline,
        load_versions: Mapping[str, str] | None = None,
    ) -> None:
        self.catalog = catalog
        self.made_by = {output: node for node in pipeline.nodes for output in node.outputs}
        self._wanted: dict[str, str] = {}
        self.pinned = load_versions or {}

    def fingerprint(self, name: str) -> str:
        """The fingerprint that ``name`` has when it is made from the inputs and parameters as they
        are now.
        """
        if name in self.pinned:
            return f"version {self.pinned[name]}"
        if name not in self._wanted:
            self._wanted[name] = self._compute(name)
        return self._wanted[name]

    def _compute(self, name: str) -> str:
        if name in UNHASHED:
            return ""
        if is_parameter(name):
            values = _plain(self.catalog.load(name))
            return _digest(
                {
                    key: value
                    for key, value in values.items()
                    if key not in SHAPING.get(name, ())
                    and (key, value) not in ADDED.get(name, {}).items()
                }
                if name in _SECTIONS
                else values
            )
        if name in self.made_by:
            made = self._of_node(self.made_by[name])
            dataset = self.kept(name)
            # Codes that are rounded as they are saved are not those of the node.
            rounded = isinstance(dataset, CodesDataset) and dataset.dtype != "float32"
            return _digest([made, dataset.dtype]) if rounded else made
        if not self.catalog.exists(name):
            return "missing"
        source: Any = self.catalog.get(name)
        try:
            return str(source.fingerprint())
        except DatasetError as error:
            raise ValueError(f"`{name}` cannot be read: {error.__cause__ or error}") from error

    def _of_node(self, node: Node) -> str:
        bound = node.func.keywords if isinstance(node.func, functools.partial) else {}
        inputs = {
            source: self.fingerprint(source) for source in node.inputs if not is_progress(source)
        }
        return _digest({"format": FORMAT, "node": node.name, "bound": bound, "inputs": inputs})

    def _told(self, name: str) -> str:
        """The fingerprint of a result, or `UNKNOWN` where it cannot be told: whoever needs it is
        told why elsewhere.
        """
        try:
            return self.fingerprint(name)
        except (ValueError, OSError, DatasetError):
            return UNKNOWN

    def is_kept(self, name: str) -> bool:
        """Whether a result is more than memory."""
        return self.kept(name) is not None

    def kept(self, name: str) -> Any:
        """The dataset of a result that is more than memory."""
        dataset = self.catalog.get(name) if name in self.catalog else None
        return None if type(dataset).__name__ == "MemoryDataset" else dataset


def is_progress(name: str) -> bool:
    """Whether an input of a node is where its work goes on from, which does not change what it ends
    with.

    Those of k-means and PCA have a part in fingerprints, always the same one, as they had in those
    of results that are there: until `FORMAT` is raised.
    """
    return name.endswith("_checkpoints") and not re.search(
        r"\.(pca|kmeans(-seed-\d+)?)_checkpoints$", name
    )


def is_parameter(name: str) -> bool:
    """Whether an input of a node is a parameter, and no dataset."""
    return name == "parameters" or name.startswith("params:")


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _digest(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=_fields).encode()).hexdigest()


def _fields(value: Any) -> Any:
    """The fields of what a node is bound to: how it is printed may leave some out, or change."""
    if isinstance(value, BaseModel):
        return _plain(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    raise TypeError(
        f"a node is bound to {value!r}, a {type(value).__name__}; expected JSON, a dataclass or a"
        " section of parameters, whose fields tell it from others"
    )

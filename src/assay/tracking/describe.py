"""What MLflow and the manifest are told of a run: names, sources and versions."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Param

import assay
from assay.encodings import Encoding, Family, Model
from assay.io.shards import Shards

OWN_K: dict[Family, str] = {"kmeans": "n_clusters", "pca": "latent_topk"}
"""What a method calls its k."""


def describe(layer: int, row: Encoding, shards: Mapping[str, Shards]) -> str:
    """A child's description in MLflow, Markdown."""
    k = "" if row.k is None else f", k = {row.k}"
    seed = "" if row.model.seed is None else f", seed {row.model.seed}"
    return (
        f"**{row.shown}**{k}{seed}: codes of layer {layer} of {shards['fit'].metadata.family}"
        f" {shards['fit'].metadata.ckpt}. Reconstruction on shards `{shards['val'].name}`; probes"
        f" fitted on `{shards['probe_train'].name}` and judged on `{shards['probe_val'].name}`."
    )


def params_of(layer: int, row: Encoding, k: int) -> list[Param]:
    """The parameters of a child, `k` among them whatever the method calls it, so that methods share
    an axis.
    """
    method = row.model.method
    params = {"layer": layer, "method": method, "encoding": row.shown, "k": k}
    if row.model.family is not None:
        params[OWN_K[row.model.family]] = k
    if row.model.seed is not None:
        params["seed"] = row.model.seed
    return [Param(key, str(value)) for key, value in params.items()]


def lineage(shards: Mapping[str, Shards]) -> list[DatasetInput]:
    """The splits' shards as MLflow's datasets: one that serves several splits is one of them, in
    the context of all.
    """
    splits: dict[str, list[str]] = {}
    for split, handle in shards.items():
        splits.setdefault(handle.fingerprint(), []).append(split)
    found = []
    for fingerprint, serves in splits.items():
        handle = shards[serves[0]]
        profile = {
            "tokens": handle.n_tokens,
            "examples": handle.n_examples,
            "d_model": handle.d_model,
        }
        dataset = Dataset(
            name=f"shards {handle.name}",
            digest=fingerprint[:8],
            source_type="local",
            source=json.dumps({"uri": str(handle.path)}),
            profile=json.dumps(profile),
        )
        found.append(DatasetInput(dataset, [InputTag("mlflow.data.context", ", ".join(serves))]))
    return found


def sum_by_stage(seconds: Mapping[str, float]) -> dict[str, float]:
    """The sum over the nodes of each stage; a node is named ``layer_23.pca.fit`` or
    ``report.page``.
    """
    found: dict[str, float] = {}
    for name, value in seconds.items():
        stage = Model.parse(re.sub(r"^layer_-?\d+\.", "", name).partition(".")[0]).method
        found[stage] = found.get(stage, 0.0) + value
    return found


def flat_params(parameters: Mapping[str, Any], prefix: str = "") -> list[Param]:
    """Nested parameters under dotted names."""
    flat: list[Param] = []
    for name, value in parameters.items():
        if isinstance(value, dict):
            flat += flat_params(value, f"{prefix}{name}.")
        else:
            flat.append(Param(f"{prefix}{name}", str(value)))
    return flat


def versions() -> dict[str, str]:
    """Of what decides the results."""
    others = {
        name: importlib.metadata.version(name) for name in ("torch", "numpy", "kedro", "mlflow")
    }
    return {"python": platform.python_version(), "assay-baselines": assay.__version__, **others}


def git_state(project: Path) -> dict[str, Any] | None:
    """The commit and whether files differ from it; None outside a git checkout."""

    def ask(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(project), *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD"),
            "modified": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None

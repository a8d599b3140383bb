"""The manifest: a file per run that says what it was, how it ended and where its time went."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from assay.io.publish import publish_file
from assay.io.shards import Shards
from assay.io.shards.provenance import Provenance
from assay.tracking.describe import git_state, sum_by_stage, versions

MANIFESTS = Path("data/08_reporting/manifests")


class Manifest:
    """The manifest of one run, begun with it.

    Args:
        project: the project's root folder.
        run_params: what Kedro tells of the run: its ``run_id`` names the file.
        parameters: those in force, as plain values.
    """

    def __init__(
        self, project: Path, run_params: Mapping[str, Any], parameters: Mapping[str, Any]
    ) -> None:
        self.path = project / MANIFESTS / f"{run_params['run_id']}.json"
        self._began = time.perf_counter()
        self._about = {
            "run_id": run_params["run_id"],
            "command": sys.argv[1:],
            "environment": run_params["env"],
            "parameters": parameters,
            "versions": versions(),
            "git": git_state(project),
        }

    def write(
        self,
        status: str,
        *,
        failure: str | None,
        not_logged: str | None,
        shards: Mapping[str, Shards],
        dictionaries: Mapping[str, Mapping[str, Any]],
        seconds: Mapping[str, float],
    ) -> None:
        """Write the file whole, in the place of an earlier one of the same run.

        Args:
            status: as MLflow calls it.
            failure: the traceback of what ended the run, if anything did.
            not_logged: the first thing that MLflow did not take, if any.
            shards: those of the splits that are there.
            dictionaries: what the autoencoders are that were read, by layer and name.
            seconds: of each node that has run.
        """
        manifest = self._about | {
            "status": status,
            "failure": failure,
            "not_logged": not_logged,
            "shards": {
                split: {
                    "name": handle.name,
                    "fingerprint": handle.fingerprint(),
                    "ckpt": handle.metadata.ckpt,
                    "recorded_by": _recorder(handle),
                }
                for split, handle in shards.items()
            },
            "dictionaries": dictionaries,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "seconds_by_stage": {
                name: round(value, 3) for name, value in sum_by_stage(seconds).items()
            },
            "seconds_in_all": round(time.perf_counter() - self._began, 3),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with publish_file(self.path) as partial:
            partial.write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _recorder(shards: Shards) -> dict[str, str] | None:
    """What tells the model from others, its library among it, that Assay recorded shards of."""
    said = Provenance.parse(shards.metadata.data)
    return None if said is None else said.model

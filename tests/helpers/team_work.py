"""What teams are asked to do in tests."""

import time
from typing import Any

from assay.pipelines.stopping import fit_in_progress, stop_is_asked


def gather(team: Any, request: Any, tensors: Any) -> Any:
    """Tensors of different lengths and dtypes, gathered; flags; what was sent."""
    import torch

    found = []
    for dtype in (torch.float32, torch.int64, torch.bfloat16, torch.bool):
        own = torch.arange(3 * (team.rank + request["more"])).reshape(-1, 3).to(dtype)
        found.append(team.all_gather(own))
    flags = [team.any(team.rank == 1), team.any(False)]
    return [found, flags, tensors["sent"]]


def fail(team: Any, request: Any, tensors: Any) -> Any:
    """One rank fails as ``request`` says, while the others wait for it in an exchange."""
    del tensors
    if team.rank == request["rank"]:
        raise {"ValueError": ValueError, "TypeError": TypeError}[request["error"]]("found rot")
    team.any(False)


def wait_for_stop(team: Any, request: Any, tensors: Any) -> Any:
    """Steps that end when all have agreed to, or when each is asked, without exchanges."""
    del tensors
    with fit_in_progress():
        team.any(False)
        team.at_work()
        while True:
            time.sleep(0.02)
            if request["apart"] and stop_is_asked():
                raise KeyboardInterrupt
            if not request["apart"] and team.any(stop_is_asked()):
                raise KeyboardInterrupt


def fit_kmeans_until(team: Any, request: Any, tensors: Any) -> Any:
    """The node, stopped by a signal to rank 0 after so many steps where ``request`` says so."""
    import os
    import signal

    from assay.io.checkpoints import Checkpoints
    from assay.io.shards import Shards
    from assay.parameters import KMeansParameters
    from assay.pipelines.kmeans.nodes import fit_kmeans

    del team
    checkpoints = Checkpoints(request["checkpoints"])

    def stop(layer: int, method: str, step: int, metrics: dict[str, float]) -> None:
        del layer, method, metrics
        if step == request["stop_after"]:
            os.kill(os.getpid(), signal.SIGTERM)

    checkpoints.observers.append(stop)
    found = fit_kmeans(
        Shards(request["shards"]),
        tensors,
        KMeansParameters.model_validate(request["parameters"]),
        checkpoints,
        "cpu",
        layer=5,
    )
    checkpoints.clear_finished()
    return found


def fit_one_pass(team: Any, request: Any, tensors: Any) -> Any:
    """The node of statistics or PCA; ``request`` may say which part gets a signal, and when."""
    import json
    from pathlib import Path
    from unittest import mock

    from assay.io.checkpoints import Checkpoints
    from assay.io.shards import Shards
    from assay.pipelines.one_pass import PARAMETERS
    from assay.pipelines.pca import nodes as pca
    from assay.pipelines.standardize import nodes as standardize

    del team
    folder, method = Path(request["checkpoints"]), request["method"]
    folder.parent.joinpath("signal.json").write_text(json.dumps(request["signal"]))
    shards, checkpoints = Shards(request["shards"]), Checkpoints(folder)
    parameters: Any = PARAMETERS[method].model_validate(request["parameters"])
    node = {"statistics": standardize, "pca": pca}[method]
    with mock.patch.object(node, f"fit_{method}_part", fit_part_until):
        found = (
            standardize.fit_statistics(shards, parameters, checkpoints, "cpu", layer=5)
            if method == "statistics"
            else pca.fit_pca(shards, tensors, parameters, checkpoints, "cpu", layer=5)[0]
        )
    checkpoints.clear_finished()
    return found


def fit_part_until(part: Any, request: Any, statistics: Any) -> None:
    """A part, which sends its process a signal after some batches if it is the one."""
    import json
    import os
    from pathlib import Path

    from assay.numerics.moments import StreamingMoments
    from assay.numerics.pca import StreamingPCA
    from assay.pipelines.one_pass import fit_part

    signal = json.loads(Path(request["checkpoints"]).with_name("signal.json").read_text())
    estimator: Any = StreamingPCA() if request["method"] == "pca" else StreamingMoments()
    partial_fit, seen = estimator.partial_fit, []

    def counting(x: Any) -> None:
        partial_fit(x)
        seen.append(1)
        if signal and signal["part"] == part.number and len(seen) == signal["after"]:
            os.kill(os.getpid(), signal["number"])

    estimator.partial_fit = counting
    fit_part(part, request, statistics, estimator)

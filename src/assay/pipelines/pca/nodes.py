"""Full-rank PCA on standardized tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from assay.io.checkpoints import Checkpoints
from assay.io.shards import Shards
from assay.numerics.pca import Convergence, StreamingPCA
from assay.parameters import PCAParameters
from assay.pipelines.one_pass import OnePass, fit_part
from assay.pipelines.parts import Part
from assay.pipelines.stream import pick_device


def fit_pca(
    shards: Shards,
    statistics: dict[str, Tensor],
    parameters: PCAParameters,
    checkpoints: Checkpoints,
    device: str,
    *,
    layer: int,
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Mean (d,), oriented components (d, d) and spectrum (d,), float64, from one pass over all
    tokens or a random sample.

    With them a record of how the leading subspace settled (`Convergence`): after 1, 2, 4, ... steps
    and the last; of a fit in parts, when 1, 2, 4, ... of them are merged, and all. A fit that was
    cut off is resumed from its last checkpoint.
    """
    place = pick_device(device)
    whole = OnePass("pca", shards, layer, parameters, checkpoints, device, statistics)
    pca = StreamingPCA(device=place)
    convergence = Convergence(pca)
    if parameters.parts == 1:
        whole.fit(pca, convergence)
        return pca.state_dict(), convergence.history_
    history = []
    parts = whole.fit_in_parts(fit_pca_part, lambda: StreamingPCA(device=place))
    for merged, (part, fitted) in enumerate(parts, start=1):
        pca.merge(fitted)
        step = whole.steps(part)
        if seen := convergence.observe(merged, last=part.stop == whole.n_tokens):
            history.append({"step": float(step), **seen})
            whole.tell(step, seen)
    return pca.state_dict(), history


def fit_pca_part(part: Part, request: dict[str, Any], statistics: Mapping[str, Tensor]) -> None:
    """Add up the scatter of a part of a layer's tokens."""
    pca = StreamingPCA(device=pick_device(request["device"]))
    fit_part(part, request, statistics, pca)

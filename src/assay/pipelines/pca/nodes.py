"""Full-rank PCA on standardised tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from assay.io.shards import Shards
from assay.numerics.errors import sum_errors
from assay.numerics.pca import StreamingPCA
from assay.parameters import PCAParameters
from assay.pipelines.stream import pick_device, standardized_tokens


def fit_pca(
    shards: Shards, statistics: dict[str, Tensor], parameters: PCAParameters, device: str, *, layer: int
) -> dict[str, Tensor]:
    """Mean (d,), oriented components (d, d) and spectrum (d,), float64, from one pass over all tokens or a random sample."""
    pca = StreamingPCA()
    for batch in standardized_tokens(
        shards,
        layer,
        statistics,
        parameters.batch_size,
        pick_device(device),
        doing="PCA",
        shuffle=parameters.max_tokens is not None,  # the first examples of a data set are seldom like the rest
        max_tokens=parameters.max_tokens,
    ):
        pca.partial_fit(batch)
    return pca.state_dict()


def measure_pca(
    shards: Shards,
    statistics: dict[str, Tensor],
    model: dict[str, Tensor],
    parameters: PCAParameters,
    device: str,
    *,
    layer: int,
    ks: tuple[int, ...],
) -> dict[str, Any]:
    """NMSE on the validation tokens at every K of ``ks``, in one pass."""
    place = pick_device(device)
    pca = StreamingPCA.from_state({name: tensor.to(place) for name, tensor in model.items()})
    std = statistics["std"]
    batches = standardized_tokens(shards, layer, statistics, parameters.batch_size, place, doing="PCA, NMSE")
    sums = sum_errors(lambda x: pca.reconstruction_errors(x, std, ks), batches)
    rows = [{"k": k, "nmse": sums[k].nmse, "nmse_raw": sums[k].nmse_raw} for k in ks]
    return {"layer": layer, "method": "pca", "n_tokens": sums[ks[0]].n_tokens, "rows": rows}

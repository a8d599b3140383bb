"""Full-rank PCA on standardized tokens."""

from __future__ import annotations

from torch import Tensor

from assay.io.checkpoints import Checkpoints
from assay.io.shards import Shards
from assay.numerics.pca import Convergence, StreamingPCA
from assay.parameters import PCAParameters
from assay.pipelines.fitting import CHANGING_NO_RESULT, Fit
from assay.pipelines.stream import pick_device, standardized_tokens


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

    With them a record of how the leading subspace settled (`Convergence`). A fit that was cut off
    is resumed from its last checkpoint.
    """
    place = pick_device(device)
    pca = StreamingPCA(device=place)
    convergence = Convergence(pca)
    fit = Fit(
        convergence,
        checkpoints,
        parameters.checkpoint_steps,
        parameters.checkpoint_minutes,
        method="pca",
        shards=shards,
        layer=layer,
        statistics=statistics,
        parameters=parameters.model_dump(mode="json", exclude=set(CHANGING_NO_RESULT["pca"])),
    )
    step = fit.resume()
    tokens = standardized_tokens(
        shards,
        layer,
        statistics,
        parameters.batch_size,
        place,
        doing="PCA",
        start=step * parameters.batch_size,
        shuffle=parameters.max_tokens
        is not None,  # the first examples of a data set are seldom like the rest
        max_tokens=parameters.max_tokens,
    )

    with fit.in_progress():
        convergence.observe(step)  # where a checkpoint was taken first
        for x in fit.watch(tokens):
            pca.partial_fit(x)
            fit.step({}, convergence.observe)
        convergence.observe(fit.steps, last=True)
    return pca.state_dict(), convergence.history_

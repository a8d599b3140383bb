"""The parameters of k-means: their ranges, and how they are kept and shown."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from assay.numerics.isolation import isolated, snapshot

PARAMETERS = {
    **dict.fromkeys(("seed", "n_init", "init_size", "max_iter", "max_no_improvement"), torch.int64),
    **dict.fromkeys(("tol", "reassignment_ratio", "decay"), torch.float64),
}
"""The parameters that a state holds, as tensors of these dtypes."""


class KMeansHyperparameters(Protocol):
    """Parameters by name: see `MiniBatchKMeans`."""

    n_clusters: int
    seed: int
    n_init: int
    init_size: int | None
    max_iter: int
    tol: float
    max_no_improvement: int | None
    reassignment_ratio: float
    decay: float


def check_parameters(model: KMeansHyperparameters) -> None:
    """Check the ranges of all parameters.

    Raises:
        ValueError: one is out of range.
    """
    least = {"n_clusters": 1, "n_init": 1, "max_iter": 1, "tol": 0}
    least |= {"init_size": model.n_clusters} if model.init_size is not None else {}
    least |= {"max_no_improvement": 1} if model.max_no_improvement is not None else {}
    for name, bound in least.items():
        if not getattr(model, name) >= bound:
            raise ValueError(
                f"found {name} = {getattr(model, name)}, wanted at least {bound}: change {name}"
            )
    if not -(2**63) <= model.seed < 2**63:
        raise ValueError(f"found seed = {model.seed}, wanted an int64: change seed")
    if not 0 < model.decay <= 1:
        raise ValueError(
            f"found decay = {model.decay}, wanted more than 0 and at most 1, which forgets nothing"
        )
    if not 0 <= model.reassignment_ratio <= 1:
        raise ValueError(
            f"found reassignment_ratio = {model.reassignment_ratio}, wanted 0 to 1: it is a share"
        )


def show_parameters(model: KMeansHyperparameters) -> str:
    """As they are written in a call."""
    names = ("n_clusters", *PARAMETERS)
    return ", ".join(f"{name}={getattr(model, name)!r}" for name in names)


def parameter_tensors(model: KMeansHyperparameters) -> dict[str, Tensor]:
    """The parameters by name, int64 or float64 (), as a state holds them: 0 stands for None."""
    return {
        name: torch.tensor(getattr(model, name) or 0, dtype=dtype, device="cpu")
        for name, dtype in PARAMETERS.items()
    }


def read_parameters(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The parameters that `parameter_tensors` left in a state, by name."""
    found = {name: state[name].item() for name in PARAMETERS if name in state}
    return {
        name: None if value == 0 and name in ("init_size", "max_no_improvement") else value
        for name, value in found.items()
    }


@isolated()
def read_centers(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Copies of a state's centers, float32 (n_clusters, d), and counts, int64 (n_clusters,).

    Raises:
        ValueError: the shapes do not fit, or centers are not finite.
    """
    centers, counts = state["cluster_centers"], state["counts"]
    if centers.ndim != 2 or 0 in centers.shape or counts.shape != centers.shape[:1]:
        raise ValueError(
            f"found cluster_centers {tuple(centers.shape)} and counts {tuple(counts.shape)}, "
            "wanted (n_clusters, d) and (n_clusters,): is it a k-means' state?"
        )
    if not centers.is_floating_point() or not bool(centers.isfinite().all()):
        raise ValueError(
            f"found cluster_centers of {centers.dtype} that hold NaN, infinity or no real numbers,"
            " wanted finite ones: fit it again"
        )
    return snapshot(centers).float(), snapshot(counts).to(torch.int64)

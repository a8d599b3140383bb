"""The passes of a fit of k-means, step by step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from assay.numerics.isolation import isolated
from assay.numerics.kmeans.progress import Progress

logger = logging.getLogger(__name__)


class Stepping(Protocol):
    """What passes need of `MiniBatchKMeans`."""

    max_iter: int
    tol: float
    decay: float
    cluster_centers_: Tensor
    counts_: Tensor

    @property
    def is_done_(self) -> bool:
        """Whether the fit has come to its end."""

    @property
    def n_steps_(self) -> int:
        """Steps made."""

    def partial_fit(self, x: Tensor) -> object:
        """Take a step with a batch (batch, d)."""


def make_passes(
    kmeans: Stepping, progress: Progress, stream: Callable[[int], Iterable[Tensor]]
) -> Iterator[dict[str, float]]:
    """See `MiniBatchKMeans.steps`. progress: how far the fit has come."""
    while progress.epoch < kmeans.max_iter and not kmeans.is_done_:
        for x in stream(progress.epoch):
            if x.shape[0] > 0:
                before = kmeans.cluster_centers_ if kmeans.tol > 0 else None
                kmeans.partial_fit(x)
                progress.judge(None if before is None else _moved(before, kmeans.cluster_centers_))
                yield progress.history[-1]
            if kmeans.is_done_:
                break
        else:
            progress.end_pass()
            if progress.epoch < kmeans.max_iter:
                kmeans.counts_ = _decayed(kmeans.counts_, kmeans.decay)
    why = "no better inertia or centers at rest" if kmeans.is_done_ else "max_iter"
    logger.info(
        "k-means stops in pass %d after %d steps: %s", progress.epoch + 1, kmeans.n_steps_, why
    )


@isolated()
def _moved(before: Tensor, after: Tensor) -> float:
    """The summed squared distance between centers (K, d)."""
    return float((after - before).double().square().sum())


@isolated()
def _decayed(counts: Tensor, decay: float) -> Tensor:
    """counts (K,) times `decay`, rounded up: int64 (K,)."""
    return (counts.float() * decay).ceil().to(torch.int64)

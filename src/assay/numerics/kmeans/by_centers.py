"""Mini-batch k-means by several processes, each with centers of its own: the bits are those of one
process.
"""

from __future__ import annotations

from typing import Any, Protocol, Self

import torch
from torch import Tensor

from assay.numerics.isolation import isolated
from assay.numerics.kmeans.estimator import MiniBatchKMeans
from assay.numerics.kmeans.nearest import NearestCenters
from assay.numerics.kmeans.prediction import LARGEST
from assay.numerics.kmeans.reassignment import is_due, reassign_where_due
from assay.numerics.kmeans.step import measured_step, squared_distances, step_toward
from assay.numerics.moments import check_batch
from assay.numerics.ranking import count_classes


class Ranks(Protocol):
    """The processes, as the estimator sees them."""

    rank: int
    size: int

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, by rank; their first dimensions may differ."""


class KMeansByCenters(MiniBatchKMeans):
    """`MiniBatchKMeans` whose steps are shared by `ranks`: each finds the best of its own centers
    for every token, and moves its own.

    Of the n_clusters centers rank r of W has the r-th of W runs of neighbors. All ranks take the
    same steps on the same batches, and come to the same counts, history and stop, bit for bit those
    of one process: a token's exact squared distance to a center is the same number wherever it is
    computed, the least one wins, ties go to the lower index, and a center's tokens are summed in
    their order by the one rank that has it.

    What a step exchanges are 16 bytes a token and rank. Whoever reads `cluster_centers_`, a
    `checkpoint` or a `state_dict` after a step has to do so on all ranks, or to `gather` there
    before. Seeding is the work of one process, whose `checkpoint` the others `resume`.

    Args:
        n_clusters: centers.
        ranks: who shares the steps.
        parameters: those of `MiniBatchKMeans`.
    """

    def __init__(self, n_clusters: int, *, ranks: Ranks, **parameters: Any) -> None:
        super().__init__(n_clusters, **parameters)
        self._ranks = ranks
        start, stop = (n_clusters * (ranks.rank + i) // ranks.size for i in (0, 1))
        self._own = slice(start, stop)
        self._moved: Tensor | None = None  # own centers, where they are newer than all together

    @property
    def cluster_centers_(self) -> Tensor:
        """The centers, float32 (n_clusters, d), gathered where they have moved."""
        self.gather()
        return super().cluster_centers_

    @cluster_centers_.setter
    def cluster_centers_(self, centers: Tensor) -> None:
        self._centers, self._moved = centers, None

    def gather(self) -> None:
        """Give all ranks all centers, if they have moved."""
        if self._moved is not None:
            self.cluster_centers_ = torch.cat(self._ranks.all_gather(self._moved))

    @isolated()
    def partial_fit(self, x: Tensor) -> Self:
        """Take one step on a batch (batch, d), the same on all ranks; an empty one changes nothing.

        Raises:
            ValueError: d changes, or this rank's share of the batch holds NaN or infinity.
        """
        own = self.cluster_centers_[self._own] if self._moved is None else self._moved
        check_batch(self._share(x), own.shape[1], largest=LARGEST)
        if len(x) == 0:
            return self
        x = x.to(own.device)
        labels, squared = self._nearest_of_all(x, own)
        hits = count_classes(labels, self.n_clusters)
        counts = self.counts_ + hits
        rows = ((labels >= self._own.start) & (labels < self._own.stop)).nonzero()[:, 0]
        moved, _, _ = step_toward(
            x[rows], own, self.counts_[self._own], labels[rows] - self._own.start
        )
        step = measured_step(moved, counts, squared, hits, self.reassignment_ratio)
        progress = self._fit.progress
        progress.record(len(x), step.inertia, step.rate, step.n_low)
        if is_due(step, self.n_clusters, self.reassignment_ratio, progress):
            before = self.cluster_centers_
            self._moved = moved
            self.cluster_centers_, self.counts_ = reassign_where_due(
                x,
                step._replace(centers=self.cluster_centers_),
                before,
                self.reassignment_ratio,
                self._fit,
            )
        else:
            self._moved, self.counts_ = moved, counts
        return self

    def _share(self, x: Tensor) -> Tensor:
        """The rows of a batch that this rank looks at for all."""
        start, stop = (len(x) * (self._ranks.rank + i) // self._ranks.size for i in (0, 1))
        return x[start:stop]

    def _nearest_of_all(self, x: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest of all ranks' centers, int64 (n,), and its squared distance, float64 (n,)."""
        squared = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
        labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        if len(own):
            labels = NearestCenters(own).find(x.float())
            squared = squared_distances(x, own, labels)
            labels += self._own.start
        found = self._ranks.all_gather(torch.stack([squared.view(torch.int64), labels], dim=1))
        squared, labels = found[0][:, 0].view(torch.float64), found[0][:, 1]
        for other in found[1:]:
            theirs = other[:, 0].contiguous().view(torch.float64)
            closer = theirs < squared  # of equal ones the lower index is a lower rank's
            squared = torch.where(closer, theirs, squared)
            labels = torch.where(closer, other[:, 1], labels)
        return labels, squared

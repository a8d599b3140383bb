"""Mini-batch k-means by several processes, each with centers of its own: the bits are those of one
process.
"""

from __future__ import annotations

from typing import Any, Protocol, Self

import torch
from torch import Tensor

from assay.numerics.isolation import isolated
from assay.numerics.kmeans.distances import origin_of
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

    Of the n_clusters centers rank r of W has every W-th from the r-th on: the first of a seeding,
    and the first of several in one place, have more tokens than the last. All ranks take the same
    steps on the same batches, and come to the same counts, history and stop, bit for bit those of
    one process. A token that is surely nearest to one rank's center by the bounds of all is that
    rank's. Of others the exact squared distances decide, which are the same numbers wherever they
    are computed: the least one wins, ties go to the lower index. A center's tokens are summed in
    their order by the one rank that has it.

    What a step exchanges are 12 bytes a token and rank, 8 for each token that is in question among
    ranks, and 8 for each that is a rank's in the end. Whoever reads `cluster_centers_`, a
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
        self._own = slice(ranks.rank, None, ranks.size)
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
            centers = self._moved.new_empty(self.n_clusters, self._moved.shape[1])
            for rank, moved in enumerate(self._ranks.all_gather(self._moved)):
                centers[rank :: self._ranks.size] = moved
            self.cluster_centers_ = centers

    @isolated()
    def partial_fit(self, x: Tensor) -> Self:
        """Take one step on a batch (batch, d), the same on all ranks; an empty one changes nothing.

        Raises:
            ValueError: d changes, or the batch holds NaN or infinity.
        """
        if self._moved is None:
            self._origin = origin_of(self.cluster_centers_)
        own = self.cluster_centers_[self._own] if self._moved is None else self._moved
        check_batch(x, own.shape[1], largest=LARGEST)
        if len(x) == 0:
            return self
        x = x.to(own.device)
        labels = self._nearest_of_all(x, own)
        hits = count_classes(labels, self.n_clusters)
        counts = self.counts_ + hits
        ranks = labels % self._ranks.size
        rows = (ranks == self._ranks.rank).nonzero()[:, 0]
        moved, _, distances = step_toward(
            x[rows], own, self.counts_[self._own], labels[rows] // self._ranks.size
        )
        squared = distances.new_empty(len(x))
        for rank, theirs in enumerate(self._ranks.all_gather(distances)):
            squared[ranks == rank] = theirs
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

    def _nearest_of_all(self, x: Tensor, own: Tensor) -> Tensor:
        """The nearest of all ranks' centers, int64 (n,)."""
        rank, size = self._ranks.rank, self._ranks.size
        found = NearestCenters(own, origin=self._origin).find_among(
            x.float(), self._most_of_all, most_centers=-(-self.n_clusters // size)
        )
        candidates = self._stacked(torch.where(found < 0, -1, found * size + rank))
        labels = candidates.amax(0)
        contested = ((candidates >= 0).sum(0) > 1).nonzero()[:, 0]
        if len(contested):
            mine = (found[contested] >= 0).nonzero()[:, 0]
            rows = contested[mine]
            squared = torch.full((len(contested),), torch.inf, dtype=torch.float64, device=x.device)
            squared[mine] = squared_distances(x[rows], own, found[rows])
            of_all = self._stacked(squared)
            nearest = of_all == of_all.amin(0)
            labels[contested] = torch.where(
                nearest, candidates[:, contested], self.n_clusters
            ).amin(0)
        return labels

    def _most_of_all(self, scores: Tensor) -> Tensor:
        return self._stacked(scores).amax(0)

    def _stacked(self, values: Tensor) -> Tensor:
        """What all ranks have, (ranks, n)."""
        return torch.stack(self._ranks.all_gather(values))

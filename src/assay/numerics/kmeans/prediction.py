"""The nearest of fitted centers to each token, the distances to all, and reconstruction errors."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.numerics.fitted import NotFittedError
from assay.numerics.isolation import isolated, snapshot
from assay.numerics.kmeans.distances import chunked_distances
from assay.numerics.kmeans.nearest import NearestCenters
from assay.numerics.moments import check_batch
from assay.numerics.reconstruction_error import ErrorSums, error_sums

LARGEST = torch.finfo(torch.float32).max
"""The magnitude that a token's entry may have: centers are float32."""


class CenterModel:
    """Centers that tokens are assigned to."""

    n_clusters: int

    def __init__(self) -> None:
        self._centers: Tensor | None = None
        self._counts: Tensor | None = None
        self._ready: tuple[Tensor, NearestCenters] | None = None

    @property
    def is_seeded_(self) -> bool:
        """Whether there are centers to assign to."""
        return self._centers is not None

    @property
    def cluster_centers_(self) -> Tensor:
        """The centers, float32 (n_clusters, d).

        Raises:
            NotFittedError: there are none yet.
        """
        return _fitted(self._centers)

    @cluster_centers_.setter
    def cluster_centers_(self, centers: Tensor) -> None:
        self._centers = centers

    @property
    def counts_(self) -> Tensor:
        """How many tokens each center stands for in its learning rate 1/n: int64 (n_clusters,).

        Raises:
            NotFittedError: there are none yet.
        """
        return _fitted(self._counts)

    @counts_.setter
    def counts_(self, counts: Tensor) -> None:
        self._counts = counts

    @isolated()
    def predict(self, x: Tensor) -> Tensor:
        """Nearest center of each row of x (batch, d), ties to the lower index: int64 (batch,)."""
        x = self._checked(x)
        return self._nearest().find(x.float())

    @isolated()
    def assign(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest center, int64 (batch,), and squared distance to it, float64 (batch,), of each row
        of x (batch, d).
        """
        x = self._checked(x)
        labels = self._nearest().find(x.float())
        return labels, (x.double() - self.cluster_centers_[labels]).square_().sum(1)

    @isolated()
    def transform(self, x: Tensor) -> Tensor:
        """Euclidean distances of x (batch, d) to every center: float32 (batch, n_clusters), never
        negative or NaN.
        """
        x = self._checked(x)
        found = torch.empty(len(x), self.n_clusters, dtype=torch.float32, device=x.device)
        start = 0
        for squared in chunked_distances(x, self.cluster_centers_):
            found[start : start + len(squared)] = squared.sqrt_()
            start += len(squared)
        return found

    @isolated()
    def reconstruction_errors(self, x: Tensor, std: Tensor) -> dict[int, ErrorSums]:
        """Errors of a batch (batch, d) of standardized tokens, each reconstructed as its nearest
        center, under K = 1: one latent is active.

        std (d,) is the divisor that standardized the tokens.
        """
        x = self._checked(x)
        return {
            1: error_sums(
                x, x.double() - self.cluster_centers_[self._nearest().find(x.float())], std
            )
        }

    def _checked(self, x: Tensor) -> Tensor:
        if not self.is_seeded_:
            _fitted(None)
        check_batch(x, self.cluster_centers_.shape[1], largest=LARGEST)
        return x.to(self.cluster_centers_.device)

    def _nearest(self) -> NearestCenters:
        """The prepared centers, kept until a step or an edit in place changes them."""
        centers = self.cluster_centers_
        if (
            self._ready is None
            or self._ready[0].device != centers.device
            or not torch.equal(self._ready[0], centers)
        ):
            centers = snapshot(centers)
            self._ready = centers, NearestCenters(centers)
        return self._ready[1]


def _fitted(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise NotFittedError(
            "found a k-means without centers, wanted a fitted one: call fit or partial_fit first"
        )
    return tensor

"""Encoders: a fitted dictionary's state and a batch of standardised tokens give a batch of codes.

Every batch of codes carries `error` (b,) float32, the squared error of the dictionary's reconstruction of each token.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from assay.numerics.codes import Batch, Format
from assay.numerics.kmeans import MiniBatchKMeans
from assay.numerics.pca import StreamingPCA, top_k

DISTANCE_FLOOR = 1e-6
"""Added to a distance before it is inverted."""


@dataclass(frozen=True)
class Encoder:
    """What one encoding makes of tokens: `encode` maps float32 (b, d) to a batch of `format` over `n_features` features."""

    format: Format
    n_features: int
    encode: Callable[[Tensor], Batch]


def kmeans_onehot(state: Mapping[str, Tensor]) -> Encoder:
    """1 for the nearest centre, 0 for the others."""
    kmeans = MiniBatchKMeans.from_state(state)

    def encode(x: Tensor) -> Batch:
        labels, squared_distances = kmeans.assign(x)
        return {"indices": labels, "error": squared_distances.float()}

    return Encoder("onehot", kmeans.n_clusters, encode)


def kmeans_invdist(state: Mapping[str, Tensor]) -> Encoder:
    """1 / (d + 1e-6) for the euclidean distance d to every centre."""
    kmeans = MiniBatchKMeans.from_state(state)

    def encode(x: Tensor) -> Batch:
        distances = kmeans.transform(x)
        # The distance to the nearest again, by differences: rounding is as large as the floor where a token is a centre.
        nearest = distances.argmin(dim=1)
        residual = x.to(distances.device).double() - kmeans.cluster_centers_[nearest].double()
        squared = residual.square().sum(dim=1)
        distances.scatter_(1, nearest[:, None], squared.sqrt().float()[:, None])
        return {"values": 1 / (distances + DISTANCE_FLOOR), "error": squared.float()}

    return Encoder("dense", kmeans.n_clusters, encode)


def pca_dense(state: Mapping[str, Tensor]) -> Encoder:
    """Every coefficient z = U^T (x~ - mean)."""
    pca = StreamingPCA.from_state(state)
    n_components = len(pca.components_)

    def encode(x: Tensor) -> Batch:
        return {"values": pca.transform(x), "error": pca.squared_errors(x, n_components).float()}

    return Encoder("dense", n_components, encode)


def pca_topk(state: Mapping[str, Tensor], k: int) -> Encoder:
    """The k coefficients of largest magnitude, by falling magnitude; ties to the lower index.

    Raises ValueError unless k is 1 to the number of components.
    """
    pca = StreamingPCA.from_state(state)
    n_components = len(pca.components_)
    if not 1 <= k <= n_components:
        raise ValueError(f"found K = {k}, wanted 1 to {n_components}, the number of components: change K")

    def encode(x: Tensor) -> Batch:
        values, indices = top_k(pca.transform(x), k)
        return {"values": values, "indices": indices, "error": pca.squared_errors(x, k).float()}

    return Encoder("sparse", n_components, encode)


def make_encoder(encoding: str, state: Mapping[str, Tensor]) -> Encoder:
    """The encoder of a name: `kmeans-onehot`, `kmeans-invdist`, `pca-dense`, or `pca-topk-00064` for K = 64.

    Raises ValueError for any other name, and for a K above the number of components.
    """
    makers = {"kmeans-onehot": kmeans_onehot, "kmeans-invdist": kmeans_invdist, "pca-dense": pca_dense}
    if encoding in makers:
        return makers[encoding](state)
    topk = re.fullmatch(r"pca-topk-([0-9]{5,})", encoding)
    if topk:
        return pca_topk(state, int(topk[1]))
    raise ValueError(
        f"the encoding is {encoding!r}; wanted one of {', '.join(makers)} or pca-topk-KKKKK, K in five digits or more"
    )

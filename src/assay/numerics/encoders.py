"""Encoders: a fitted dictionary's state and a batch of standardised tokens give a batch of codes.

Every batch of codes carries `error` (b,) float64, the squared error of the dictionary's reconstruction of each token.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.numerics.codes import Batch, Format, add_squares
from assay.numerics.distances import paired_distances
from assay.numerics.isolation import isolated
from assay.numerics.kmeans import MiniBatchKMeans
from assay.numerics.pca import StreamingPCA, top_k

DISTANCE_FLOOR = 1e-6
"""Added to a distance before it is inverted."""


@dataclass(frozen=True)
class Encoder:
    """What one encoding makes of tokens: `encode` maps float32 (b, d) to a batch of `format` over `n_features` features.

    `k` is the entries a row. `zero_is_far` says that a code of 0 stands for what is far away or absent, so that small entries
    may be left out. `encode_rounded` is for whoever rounds values to a dtype: it gives the same values, with the error that goes
    with rounded ones; None: that is the same.
    """

    format: Format
    n_features: int
    k: int
    encode: Callable[[Tensor], Batch]
    zero_is_far: bool = False
    encode_rounded: Callable[[Tensor, torch.dtype], Batch] | None = None


def kmeans_onehot(state: Mapping[str, Tensor]) -> Encoder:
    """1 for the nearest centre, 0 for the others."""
    kmeans = MiniBatchKMeans.from_state(state)

    @isolated()
    def encode(x: Tensor) -> Batch:
        labels, squared_distances = kmeans.assign(x)
        return {"indices": labels, "error": squared_distances}

    return Encoder("onehot", kmeans.n_clusters, 1, encode)


@isolated()
def invert(distances: Tensor) -> Tensor:
    """1 / (d + 1e-6)."""
    return 1 / (distances + DISTANCE_FLOOR)


@isolated()
def unit(distances: Tensor) -> Tensor:
    """1 - d / d_max, d_max the distance to the centre that is farthest from the token; 1 where all are at 0."""
    farthest = distances.amax(1, keepdim=True)
    return 1 - distances / torch.where(farthest > 0, farthest, 1.0)


TRANSFORMS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "kmeans-invdist": (invert, True),
    "kmeans-distance-sqeuclidean": (Tensor.square, False),
    "kmeans-distance-neg_euclidean": (Tensor.neg, False),
    "kmeans-distance-unit": (unit, True),
}
"""What is made of the euclidean distances d of a token to every centre, and whether 0 is far."""


def kmeans_distances(state: Mapping[str, Tensor], transform: Callable[[Tensor], Tensor], zero_is_far: bool) -> Encoder:
    """`transform` of the euclidean distances to every centre, float32."""
    kmeans = MiniBatchKMeans.from_state(state)
    centers = kmeans.cluster_centers_

    @isolated()
    def encode(x: Tensor) -> Batch:
        distances = kmeans.transform(x)
        rows = torch.arange(len(x), device=centers.device)
        error = paired_distances(x.to(centers.device), rows, centers, distances.argmin(1))
        return {"values": transform(distances), "error": error}

    return Encoder("dense", kmeans.n_clusters, kmeans.n_clusters, encode, zero_is_far)


def kmeans_cosine(state: Mapping[str, Tensor]) -> Encoder:
    """Cosine similarity x~.c / (|x~| |c|) to every centre, float32; 0 where either is 0."""
    kmeans = MiniBatchKMeans.from_state(state)
    directions = _directions(kmeans.cluster_centers_)

    @isolated()
    def encode(x: Tensor) -> Batch:
        _, error = kmeans.assign(x)
        return {"values": (_directions(x.to(directions.device)) @ directions.T).float(), "error": error}

    return Encoder("dense", kmeans.n_clusters, kmeans.n_clusters, encode, zero_is_far=True)


@isolated()
def _directions(vectors: Tensor) -> Tensor:
    """Rows (n, d) over their lengths, float64; 0 where the length is, NaN where there is a NaN."""
    vectors = vectors.double()
    lengths = vectors.norm(dim=1, keepdim=True)
    return vectors / torch.where(lengths == 0, 1.0, lengths)


def pca_dense(state: Mapping[str, Tensor]) -> Encoder:
    """Every coefficient z = U^T (x~ - mean)."""
    pca = StreamingPCA.from_state(state)
    n_components = len(pca.components_)

    @isolated()
    def encode(x: Tensor) -> Batch:
        values, error = pca.project(x)
        return {"values": values, "error": error}

    return Encoder("dense", n_components, n_components, encode)


def pca_topk(state: Mapping[str, Tensor], k: int) -> Encoder:
    """The k coefficients of largest magnitude, by falling magnitude; ties to the lower index.

    The error is what all components leave plus the squares of the coefficients that are dropped. To go with values that are
    rounded it has the squares of rounded ones, too: then the error at a smaller k follows from the values that were kept.

    Raises ValueError unless k is 1 to the number of components, and for whitened coefficients.
    """
    pca = StreamingPCA.from_state(state)
    n_components = len(pca.components_)
    if not 1 <= k <= n_components:
        raise ValueError(f"found K = {k}, wanted 1 to {n_components}, the number of components: change K")

    if pca.whiten:
        raise ValueError(
            "found a PCA that whitens, wanted coefficients whose squares are errors: fit it with whiten=False"
        )

    @isolated()
    def encode(x: Tensor, dtype: torch.dtype = torch.float32) -> Batch:
        z, left = pca.project(x)
        values, indices = top_k(z, n_components)
        error = add_squares(left, values[:, k:].to(dtype))
        return {"values": values[:, :k], "indices": indices[:, :k], "error": error}

    return Encoder("sparse", n_components, k, encode, encode_rounded=encode)


def make_encoder(encoding: str, state: Mapping[str, Tensor]) -> Encoder:
    """The encoder of a name, by a dictionary's state.

    `kmeans-onehot`; `kmeans-invdist`; `kmeans-distance-` and `sqeuclidean`, `neg_euclidean`, `cosine` or `unit`; `pca-dense`;
    `pca-topk-00064` for K = 64.

    Raises ValueError for any other name, and for a K above the number of components.
    """
    makers = {"kmeans-onehot": kmeans_onehot, "kmeans-distance-cosine": kmeans_cosine, "pca-dense": pca_dense}
    if encoding in makers:
        return makers[encoding](state)
    if encoding in TRANSFORMS:
        return kmeans_distances(state, *TRANSFORMS[encoding])
    topk = re.fullmatch(r"pca-topk-([0-9]{5,})", encoding)
    if topk:
        return pca_topk(state, int(topk[1]))
    known = ", ".join(sorted([*makers, *TRANSFORMS]))
    raise ValueError(f"the encoding is {encoding!r}; wanted one of {known} or pca-topk-KKKKK, K in five digits or more")

"""Dictionaries, which write standardized tokens as codes and reconstruct them.

k-means' centers, PCA's components, autoencoders and random vectors are all of one kind here,
`Dictionary`; the code that measures, encodes and probes knows no other. Every batch of codes
carries `error` (b,) float64, the squared error of the reconstruction of each token.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, assert_never

import torch
from torch import Tensor

from assay.codes import Batch, Format
from assay.encodings import KINDS, Form
from assay.numerics.codes import add_squares
from assay.numerics.isolation import isolated
from assay.numerics.kmeans.distances import paired_distances
from assay.numerics.kmeans.estimator import MiniBatchKMeans
from assay.numerics.pca import StreamingPCA, top_k
from assay.numerics.reconstruction_error import ErrorSums

DISTANCE_FLOOR = 1e-6
"""Added to a distance before it is inverted."""


class Dictionary(Protocol):
    """Vectors with rules to write tokens as codes over them and to reconstruct tokens again."""

    @property
    def n_features(self) -> int:
        """Features of a code."""

    @property
    def format(self) -> Format:
        """The format of the codes."""

    @property
    def k(self) -> int | None:
        """Entries per row; None where rows vary."""

    @property
    def ks(self) -> tuple[int, ...]:
        """The numbers under which reconstructions are measured, a row of the table each: entries
        that are kept, or features.
        """

    @property
    def zero_is_far(self) -> bool:
        """Whether a code of 0 stands for what is far away or absent, so that small entries may be
        left out.
        """

    @property
    def encode_rounded(self) -> Callable[[Tensor, torch.dtype], Batch] | None:
        """Encodes tokens for storage in a rounded dtype: the same values, with the error that goes
        with rounded ones. None: the error does not change.
        """

    def encode(self, x: Tensor) -> Batch:
        """Codes of standardized tokens x (b, d), float32: a batch of `format`, with `error` (b,)
        float64.
        """

    def errors(self, x: Tensor, std: Tensor) -> dict[int, ErrorSums]:
        """Errors of the reconstruction of x (b, d) for each of `ks`; std (d,) is the divisor that
        standardized the tokens.
        """


@isolated()
def invert(distances: Tensor) -> Tensor:
    """1 / (d + 1e-6)."""
    return 1 / (distances + DISTANCE_FLOOR)


@isolated()
def unit(distances: Tensor) -> Tensor:
    """1 - d / d_max, where d_max is the distance to the center farthest from the token; 1 where all
    are at 0.
    """
    farthest = distances.amax(1, keepdim=True)
    return 1 - distances / torch.where(farthest > 0, farthest, 1.0)


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "invdist": invert,
    "distance-sqeuclidean": Tensor.square,
    "distance-neg_euclidean": Tensor.neg,
    "distance-unit": unit,
}
"""What is made of the euclidean distances d of a token to every center."""


@isolated()
def _directions(vectors: Tensor) -> Tensor:
    """Rows (n, d) over their lengths, float64; 0 where the length is, NaN where there is one."""
    vectors = vectors.double()
    lengths = vectors.norm(dim=1, keepdim=True)
    return vectors / torch.where(lengths == 0, 1.0, lengths)


class Centers:
    """Centers as a dictionary: codes say which is nearest, or how near each is; a token is
    reconstructed as the nearest.

    Args:
        state: `MiniBatchKMeans.state_dict`.
        kind: one of ``KINDS["kmeans"]``: `onehot`; `invdist`, 1 / (d + 1e-6); `distance-` and
            `sqeuclidean`, `neg_euclidean`, `unit` (1 - d / d_max) or `cosine` (x~.c / (|x~| |c|), 0
            where either is 0), float32.

    Raises:
        ValueError: the kind is another, or the state is no k-means'.
    """

    encode_rounded = None

    def __init__(self, state: Mapping[str, Tensor], kind: str = "onehot") -> None:
        if kind not in KINDS["kmeans"]:
            raise ValueError(
                f"found the kind {kind!r}, wanted one of {', '.join(KINDS['kmeans'])}: change kind"
            )
        self.kmeans = MiniBatchKMeans.from_state(state)
        self.kind = kind
        self.n_features = self.kmeans.n_clusters
        self.format: Format = "onehot" if kind == "onehot" else "dense"
        self.k = 1 if kind == "onehot" else self.n_features
        self.ks = (self.n_features,)
        self.zero_is_far = Form(kind).zero_is_far
        self._directions = (
            _directions(self.kmeans.cluster_centers_) if kind == "distance-cosine" else None
        )

    @isolated()
    def encode(self, x: Tensor) -> Batch:
        """Codes of standardized tokens (b, d)."""
        centers = self.kmeans.cluster_centers_
        if self.kind == "onehot":
            labels, squared_distances = self.kmeans.assign(x)
            return {"indices": labels, "error": squared_distances}
        if self._directions is not None:
            _, error = self.kmeans.assign(x)
            cosines = (_directions(x.to(centers.device)) @ self._directions.T).float()
            return {"values": cosines, "error": error}
        distances = self.kmeans.transform(x)
        rows = torch.arange(len(x), device=centers.device)
        error = paired_distances(x.to(centers.device), rows, centers, distances.argmin(1))
        return {"values": TRANSFORMS[self.kind](distances), "error": error}

    @isolated()
    def errors(self, x: Tensor, std: Tensor) -> dict[int, ErrorSums]:
        """Errors of tokens (b, d) reconstructed as their nearest centers, under the number of
        centers.
        """
        return dict.fromkeys(self.ks, *self.kmeans.reconstruction_errors(x, std).values())


class Components:
    """Principal components, or any orthonormal basis, as a dictionary: codes are coefficients, all
    or the largest.

    The error of the k largest is the error of all components plus the squares of the dropped
    coefficients. With rounded values it takes the squares of rounded coefficients, so that the
    error at a smaller k follows from the values that were kept.

    From whitened values it does not follow without the standard deviations. So their error at k is
    no other when they are rounded: the squares are those of the dropped coefficients themselves.

    Args:
        state: `StreamingPCA.state_dict`.
        k: how many coefficients a code keeps, the largest in magnitude, by falling magnitude, ties
            to the lower index; None: all, dense.
        ks: numbers of coefficients that reconstructions are measured with; by default k, or all.
        whiten: whether a coefficient is divided by the standard deviation along its component, and
            is large or small as that; None: as the state says.

    Raises:
        ValueError: k is not 1 to the number of components.
    """

    zero_is_far = False

    def __init__(
        self,
        state: Mapping[str, Tensor],
        k: int | None = None,
        ks: Sequence[int] = (),
        *,
        whiten: bool | None = None,
    ) -> None:
        self.pca = StreamingPCA.from_state(state)
        if whiten is not None:
            self.pca.whiten = whiten
        self.n_features = len(self.pca.components_)
        if k is not None and not 1 <= k <= self.n_features:
            raise ValueError(
                f"found K = {k}, wanted 1 to {self.n_features}, the number of components: change K"
            )
        self.format: Format = "dense" if k is None else "sparse"
        self.k = self.n_features if k is None else k
        self.ks = tuple(ks) or (self.k,)

    @property
    def encode_rounded(self) -> Callable[[Tensor, torch.dtype], Batch] | None:
        """See `Dictionary`; None where all coefficients are kept, since no square is left out, and
        where they are whitened, since no other error is worked out from those that are kept.
        """
        return self._encode_top if self.format == "sparse" and not self.pca.whiten else None

    @isolated()
    def encode(self, x: Tensor) -> Batch:
        """Codes of standardized tokens (b, d)."""
        if self.format == "sparse":
            return self._encode_top(x, torch.float32)
        values, error = self.pca.project(x)
        return {"values": values, "error": error}

    @isolated()
    def _encode_top(self, x: Tensor, dtype: torch.dtype) -> Batch:
        z, left = self.pca.project(x)
        values, indices = top_k(z, self.n_features)
        dropped = values[:, self.k :].to(dtype)
        if self.pca.whiten:  # an error is of the coefficients themselves
            dropped = dropped * self.pca.scale_[indices[:, self.k :]]
        error = add_squares(left, dropped)
        return {"values": values[:, : self.k], "indices": indices[:, : self.k], "error": error}

    def errors(self, x: Tensor, std: Tensor) -> dict[int, ErrorSums]:
        """Errors of tokens (b, d) for each number of coefficients kept, from one projection and one
        sort.
        """
        return self.pca.reconstruction_errors(x, std, self.ks)


def open_dictionary(
    form: Form | str,
    state: Mapping[str, Tensor],
    ks: Sequence[int] = (),
) -> Dictionary:
    """The dictionary of a fitted state under a form, or the name of one: ``kmeans-onehot``,
    ``pca-topk-00064``.

    Args:
        form: how codes are made, or the name of that.
        state: of `MiniBatchKMeans` or `StreamingPCA`, as the form says.
        ks: numbers of coefficients that reconstructions of components are measured with.

    Raises:
        ValueError: there is no form of that name, K is above the number of components, a form of
            top-K codes has no K, or another form has one.
    """
    found = form if isinstance(form, Form) else Form.parse_name(form)
    if (found.kind == "topk") != (found.k is not None):
        raise ValueError(
            f"found {found}, wanted a K for topk and for nothing else: write"
            ' Form("topk", k), or pca-topk-KKKKK'
        )
    family = found.family
    match family:
        case "kmeans":
            return Centers(state, found.kind)
        case "pca":
            return Components(state, found.k, ks, whiten=found.whiten)
        case _:
            assert_never(family)

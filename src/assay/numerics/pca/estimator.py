"""Principal components of a stream of activations, exactly."""

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from assay.numerics.fitted import NotFittedError
from assay.numerics.isolation import isolated, snapshot
from assay.numerics.moments import Moments, check_batch, check_later, merge_moments
from assay.numerics.pca.axes import (
    Axes,
    check_n_components,
    principal_axes,
    read_axes,
    read_sums,
    scatter_step,
)
from assay.numerics.pca.reconstruction import (
    project,
    reconstruction_errors,
    squared_errors,
    unit,
)
from assay.numerics.reconstruction_error import ErrorSums


class StreamingPCA:
    """PCA from the exact covariance of a stream: one (d, d) matrix in float64, whatever the number
    of tokens.

    A token takes d^2 operations in float64, half of that on a CPU. The eigendecomposition, some 20
    d^3, is made when a fitted attribute is first read after a batch was added. Before 2 tokens were
    seen, reading one raises NotFittedError.

    Args:
        n_components: how many to keep, at most d; None keeps all d. More than d is a ValueError at
            the first batch.
        whiten: divide coefficients by their standard deviation over the train tokens, which
            `inverse_transform` multiplies by again; a component without variance is left as it is.
            Of whitened coefficients others are the largest, so errors of keeping K change.
        device: where the model lives, by default that of its first batch or checkpoint; inputs are
            moved there.

    Attributes:
        mean_: float64 (d,).
        components_: orthonormal, in rows by falling variance, signs by `orient`: float64
            (n_components, d).
        explained_variance_: float64 (n_components,).
        n_samples_seen_: tokens.

    Examples:
        >>> tokens = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
        >>> pca = StreamingPCA().partial_fit(tokens[:500]).partial_fit(tokens[500:])
        >>> pca.transform(tokens).shape, pca.n_samples_seen_
        (torch.Size([1000, 8]), 1000)
    """

    def __init__(
        self,
        n_components: int | None = None,
        whiten: bool = False,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        self.n_components = n_components
        self.whiten = whiten
        self.device = device
        self._moments: Moments | None = None
        self._axes: Axes | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n_components={self.n_components!r}, whiten={self.whiten!r})"

    @isolated()
    def partial_fit(self, x: Tensor) -> Self:
        """Add a batch (batch, d) of real numbers; an empty one changes nothing.

        Raises:
            ValueError: d changes, the batch holds NaN or infinity, or the model is restored from
                its state.
        """
        seen = self._moments
        if seen is None and self._axes is not None:
            raise ValueError(
                "found a PCA restored from its components, wanted its sums to go on: fit a new one"
            )
        check_numbers = check_later(x, None if seen is None else seen.mean.shape[0])
        check_n_components(self.n_components, x.shape[1])
        if x.shape[0] == 0:
            return self
        if seen is None:
            mean = x.to(self.device or x.device).double().mean(0)
            seen = Moments(
                0, mean, torch.zeros(len(mean), len(mean), dtype=mean.dtype, device=mean.device)
            )
        if seen.mean.is_cuda:
            # The sums of a copy, so that the GPU is waited for when all is queued, and a bad batch
            # is in none that are kept.
            added = scatter_step(
                Moments(seen.count, seen.mean, seen.second.clone()), x.to(seen.mean.device)
            )
            check_numbers()
        else:
            check_numbers()
            added = scatter_step(seen, x.to(seen.mean.device))
        self._axes = None
        self._moments = added
        return self

    @isolated()
    def merge(self, other: Self) -> Self:
        """Add the tokens that `other` was fitted on; `other` stays as it is. Two halves equal
        one pass, to rounding.

        Raises:
            ValueError: `other` has seen another width, or one of the two is restored from its
                state.
        """
        theirs, mine = other._moments, self._moments
        if (theirs is None and other._axes is not None) or (
            mine is None and self._axes is not None
        ):
            raise ValueError(
                "found a PCA restored from its components, wanted its sums to merge: fit a new one"
            )
        if theirs is None:
            return self
        check_n_components(self.n_components, len(theirs.mean))
        self._axes = None
        place = mine.mean.device if mine is not None else self.device or theirs.mean.device
        moved = Moments(theirs.count, theirs.mean.to(place), theirs.second.to(place, copy=True))
        if mine is not None:
            check_batch(moved.mean[None], len(mine.mean))
            moved = merge_moments(mine, moved)
        self._moments = moved
        return self

    @isolated()
    def _solution(self) -> Axes:
        if self._axes is None:
            if self._moments is None or self._moments.count < 2:
                raise NotFittedError(
                    f"found {self.n_samples_seen_} tokens, wanted at least 2: call partial_fit with"
                    " more"
                )
            self._axes = principal_axes(
                self._moments, self.n_components or self._moments.mean.shape[0]
            )
        return self._axes

    @property
    def n_samples_seen_(self) -> int:
        """Tokens seen by partial_fit; 0 for a model restored from its state."""
        return 0 if self._moments is None else self._moments.count

    @property
    def mean_(self) -> Tensor:
        """Mean of the tokens, float64 (d,)."""
        return self._solution().mean

    @property
    def components_(self) -> Tensor:
        """Orthonormal components in rows, by falling variance, signs by `orient`: float64
        (n_components, d).
        """
        return self._solution().components

    @property
    def explained_variance_(self) -> Tensor:
        """Variance along each component over count - 1, as scikit-learn has it: float64
        (n_components,).
        """
        return self._solution().variance

    @property
    def scale_(self) -> Tensor:
        """What a coefficient of 1 is worth along each component: float64 (n_components,)."""
        return unit(self._solution(), whiten=self.whiten)

    @isolated()
    def transform(self, x: Tensor) -> Tensor:
        """Coefficients z = (x - mean) U / scale_, computed in float64: (batch, d) to float32
        (batch, n_components).
        """
        return self.project(x)[0]

    @isolated()
    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `transform`, with each token's squared error when all components reconstruct it,
        float64 (batch,).

        That is ||x - mean||^2 - sum z^2, clamped at 0 against rounding, and exactly 0 with d
        components.
        """
        z, left = project(self._solution(), x)
        return (z / self.scale_).float(), left

    @isolated()
    def inverse_transform(self, z: Tensor) -> Tensor:
        """z U^T + mean, computed in float64: (batch, n_components) to float32 (batch, d)."""
        check_batch(z, self.components_.shape[0])
        return (z.to(self.mean_) * self.scale_ @ self.components_ + self.mean_).float()

    @isolated()
    def squared_errors(self, x: Tensor, k: int) -> Tensor:
        """||x - x^||^2 of each token with its k largest coefficients kept: float64 (batch,).

        Since the components are orthonormal, that is ||x - mean||^2 minus the kept z^2, clamped at
        0 against rounding.
        """
        return squared_errors(self._solution(), x, k, whiten=self.whiten)

    @isolated()
    def reconstruction_errors(
        self, x: Tensor, std: Tensor, ks: Iterable[int]
    ) -> dict[int, ErrorSums]:
        """Errors at every K of `ks` for a batch (batch, d) of standardized tokens; std (d,) is the
        divisor that standardized them.

        One projection and one sort serve all K. The raw error weighs dimensions unequally, so it
        needs the residual itself: one more product per K, which subtracts only the coefficients
        between the last K and this one.
        """
        return reconstruction_errors(self._solution(), x, std, ks, whiten=self.whiten)

    @isolated()
    def state_dict(self) -> dict[str, Tensor]:
        """`mean` (d,), `components` (n_components, d) and `explained_variance` (n_components,),
        float64; `whiten`, bool (): copies.
        """
        return {
            "mean": snapshot(self.mean_),
            "components": snapshot(self.components_),
            "explained_variance": snapshot(self.explained_variance_),
            "whiten": torch.tensor(self.whiten, dtype=torch.bool, device="cpu"),
        }

    @isolated()
    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `resume` needs to continue exactly: copies of `mean` float64 (d,) and `scatter`
        float64 (d, d), and `count` as JSON.
        """
        if self._moments is None:
            raise NotFittedError(
                "found a PCA without sums, wanted one that has seen tokens: call partial_fit first"
            )
        tensors = {"mean": snapshot(self._moments.mean), "scatter": snapshot(self._moments.second)}
        return tensors, {"count": self._moments.count}

    @isolated()
    def resume(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Self:
        """Continue from what `checkpoint` returned, bit for bit as if there had been no break.

        Raises:
            ValueError: the shapes do not fit.
        """
        self._moments = read_sums(tensors, state["count"], self.device)
        self._axes = None
        return self

    @classmethod
    @isolated()
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """A model that transforms as the one that left `state`; it cannot be fitted further.

        Raises:
            ValueError: the shapes do not fit, or the state holds NaN or infinity.
        """
        axes = read_axes(state)
        restored = cls(
            len(axes.variance), whiten=bool(state["whiten"]) if "whiten" in state else False
        )
        restored._axes = axes
        return restored

"""Principal components of a stream of activations, exactly, and their top-K codes."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor

from assay.numerics.errors import ErrorSums, error_sums
from assay.numerics.moments import Moments, batch_moments, check_batch, merge_moments

# Entries this near the largest count as tied with it: with two dimensions, say, both are 1/sqrt(2) but for rounding.
_TIE = 1e-6


class _Axes(NamedTuple):
    """Mean (d,), orthonormal components (r, d) in rows and the variance (r,) along each, falling; float64."""

    mean: Tensor
    components: Tensor
    variance: Tensor


def top_k(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k entries of each row of z (batch, r) with the largest |z|: values (batch, k), int64 indices (batch, k).

    Ordered by falling |z|, ties to the lower index; torch.topk promises no order among ties. ValueError unless
    1 <= k <= r.
    """
    _check_k(k, z.shape[1])
    indices = z.abs().argsort(dim=1, descending=True, stable=True)[:, :k]
    return z.gather(1, indices), indices


def _check_k(k: int, n_components: int) -> None:
    if not 1 <= k <= n_components:
        raise ValueError(f"found K = {k}, wanted 1 to {n_components}, the number of components: change K")


def orient(components: Tensor) -> Tensor:
    """Flip rows of components (r, d) so that the entry of largest magnitude is positive; ties to the lower index.

    The rule is that a component's mean coefficient over the train tokens is nonnegative, and that this one decides
    where that mean is below rounding. About the train tokens' own mean it always is: they are centred.
    """
    magnitude = components.abs()
    largest = magnitude >= magnitude.amax(1, keepdim=True) * (1 - _TIE)
    first = largest.to(torch.uint8).argmax(1, keepdim=True)
    return components * components.gather(1, first).sign()


def principal_axes(moments: Moments, n_components: int) -> _Axes:
    """Leading eigenvectors of the covariance scatter / (count - 1), by one float64 eigendecomposition, oriented."""
    variance, vectors = torch.linalg.eigh(moments.second / (moments.count - 1))
    components = vectors.T.flip(0)[:n_components]
    # A covariance has no negative eigenvalue: what is below 0 is rounding.
    return _Axes(moments.mean, orient(components), variance.flip(0)[:n_components].clamp(min=0))


class StreamingPCA:
    """PCA from the exact covariance of a stream: one (d, d) matrix in float64, whatever the number of tokens.

    The eigendecomposition is made when a fitted attribute is first read after a batch was added. Computed on the
    device of the first batch; later inputs are moved there. Reading raises ValueError before 2 tokens were seen.

    n_components: how many to keep, at most d; None keeps all d. More than d is a ValueError at the first batch.
    """

    def __init__(self, n_components: int | None = None) -> None:
        self.n_components = n_components
        self._moments: Moments | None = None
        self._axes: _Axes | None = None

    def partial_fit(self, x: Tensor) -> Self:
        """Add a batch (batch, d); an empty one changes nothing. ValueError when d changes, or on a restored model."""
        seen = self._moments
        if seen is None and self._axes is not None:
            raise ValueError("found a PCA restored from its components, wanted its sums to go on: fit a new one")
        check_batch(x, None if seen is None else seen.mean.shape[0])
        if self.n_components is not None and not 1 <= self.n_components <= x.shape[1]:
            raise ValueError(
                f"found n_components = {self.n_components}, wanted 1 to {x.shape[1]}, the dimensions: change it"
            )
        if x.shape[0] == 0:
            return self
        self._axes = None
        self._moments = (
            batch_moments(x, cross=True)
            if seen is None
            else merge_moments(seen, batch_moments(x.to(seen.mean.device), cross=True))
        )
        return self

    def _solution(self) -> _Axes:
        if self._axes is None:
            if self._moments is None or self._moments.count < 2:
                raise ValueError(f"found {self.n_samples_seen_} tokens, wanted at least 2: call partial_fit with more")
            self._axes = principal_axes(self._moments, self.n_components or self._moments.mean.shape[0])
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
        """Orthonormal components in rows, by falling variance, signs by `orient`: float64 (n_components, d)."""
        return self._solution().components

    @property
    def explained_variance_(self) -> Tensor:
        """Variance along each component over count - 1, as scikit-learn has it: float64 (n_components,)."""
        return self._solution().variance

    def transform(self, x: Tensor) -> Tensor:
        """Coefficients z = (x - mean) U, computed in float64: (batch, d) to float32 (batch, n_components)."""
        return (self._centre(x) @ self.components_.T).float()

    def inverse_transform(self, z: Tensor) -> Tensor:
        """z U^T + mean, computed in float64: (batch, n_components) to float32 (batch, d)."""
        check_batch(z, self.components_.shape[0])
        return (z.to(self.mean_) @ self.components_ + self.mean_).float()

    def _centre(self, x: Tensor) -> Tensor:
        check_batch(x, self.mean_.shape[0])
        return x.to(self.mean_) - self.mean_

    def squared_errors(self, x: Tensor, k: int) -> Tensor:
        """||x - x^||^2 of each token with its k largest coefficients kept: float64 (batch,).

        As the components are orthonormal, that is ||x - mean||^2 minus the kept z^2; clamped at 0 against rounding.
        """
        centred = self._centre(x)
        values, _ = top_k(centred @ self.components_.T, k)
        return (centred.square().sum(1) - values.square().sum(1)).clamp(min=0)

    def reconstruction_errors(self, x: Tensor, std: Tensor, ks: Iterable[int]) -> dict[int, ErrorSums]:
        """Errors at every K of `ks` for a batch (batch, d) of standardised tokens, std (d,) what they were divided by.

        One projection and one sort serve all K. The raw error weighs dimensions unequally, so it needs the residual
        itself: one more product a K, in which only the coefficients between the last K and this one are taken off.
        """
        residual = self._centre(x)
        z = residual @ self.components_.T
        values, indices = top_k(z, z.shape[1])
        errors: dict[int, ErrorSums] = {}
        done = 0
        for k in sorted(set(ks)):
            _check_k(k, z.shape[1])
            newly_kept = torch.zeros_like(z).scatter(1, indices[:, done:k], values[:, done:k])
            residual = residual - newly_kept @ self.components_
            errors[k] = error_sums(x.to(residual), residual, std)
            done = k
        return errors

    def state_dict(self) -> dict[str, Tensor]:
        """`mean` (d,), `components` (n_components, d) and `explained_variance` (n_components,), float64."""
        return {"mean": self.mean_, "components": self.components_, "explained_variance": self.explained_variance_}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """A model that transforms as the one that left `state`, not to be fitted further. ValueError on bad shapes."""
        axes = _Axes(*(state[name].double() for name in ("mean", "components", "explained_variance")))
        r, d = axes.variance.numel(), axes.mean.numel()
        if axes.mean.shape != (d,) or axes.components.shape != (r, d) or axes.variance.shape != (r,) or not 1 <= r <= d:
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in axes._asdict().items())
            raise ValueError(f"found {shapes}, wanted (d,), (n_components, d), (n_components,): is it a PCA's state?")
        restored = cls(n_components=r)
        restored._axes = axes
        return restored

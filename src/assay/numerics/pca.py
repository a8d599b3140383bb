"""Principal components of a stream of activations, exactly, and their top-K codes."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from assay.numerics.errors import ErrorSums, error_sums
from assay.numerics.isolation import isolated, snapshot
from assay.numerics.moments import Moments, check_batch, check_later, merge_moments

# A batch is taken so many rows at a time, which stay in the cache, and the scatter matrix in blocks
# of so many rows.
_ROWS = 1024
_BLOCK = 128

# Entries this near the largest count as tied with it: with two dimensions, say, both are 1/sqrt(2)
# but for rounding.
_TIE = 1e-6


class _Axes(NamedTuple):
    """Mean (d,), orthonormal components (r, d) in rows and the variance (r,) along each, falling;
    float64.
    """

    mean: Tensor
    components: Tensor
    variance: Tensor


@isolated()
def top_k(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k entries of each row of z (batch, r) with the largest |z|: values (batch, k), int64
    indices (batch, k).

    Ordered by falling |z|, ties to the lower index; torch.topk promises no order among ties.
    ValueError unless 1 <= k <= r.
    """
    _check_k(k, z.shape[1])
    indices = z.abs().argsort(dim=1, descending=True, stable=True)[:, :k]
    return z.gather(1, indices), indices


def _check_k(k: int, n_components: int) -> None:
    if not 1 <= k <= n_components:
        raise ValueError(
            f"found K = {k}, wanted 1 to {n_components}, the number of components: change K"
        )


@isolated()
def orient(components: Tensor) -> Tensor:
    """Flip rows of components (r, d) so that the entry of largest magnitude is positive; ties to
    the lower index.

    The rule is that a component's mean coefficient over the train tokens is nonnegative, and that
    this one decides where that mean is below rounding. About the train tokens' own mean it always
    is: they are centered.
    """
    magnitude = components.abs()
    largest = magnitude >= magnitude.amax(1, keepdim=True) * (1 - _TIE)
    first = largest.to(torch.uint8).argmax(1, keepdim=True)
    return components * components.gather(1, first).sign()


@isolated()
def scatter_step(seen: Moments, x: Tensor) -> Moments:
    """Moments with the tokens x (n, d) as well; the scatter matrix is updated in place, on and
    above its diagonal only.

    Products are taken about the mean so far, m, and moved to the new one, m + delta, by one outer
    product: with Y = x - m,

        delta = sum(Y) / count,    M <- M + Y^T Y - count delta delta^T        (count with x)

    which is Chan et al. (1979, eq. 2.1) without a pass for the batch's own mean. delta is a batch's
    small share of the spread, so that nothing cancels however far the mean is from 0.
    """
    total = torch.zeros_like(seen.mean)
    d = len(total)
    # A GPU's float64 units are best fed whole; on the CPU the half below the diagonal is not worth
    # its time.
    block = _BLOCK if x.device.type == "cpu" else d
    for rows in torch.split(x, _ROWS if x.device.type == "cpu" else len(x)):
        y = rows - seen.mean
        total += y.sum(0)
        for start in range(0, d, block):
            seen.second[start : start + block, start:].addmm_(
                y[:, start : start + block].T, y[:, start:]
            )
    count = seen.count + len(x)
    delta = total / count
    seen.second.addr_(delta, delta, alpha=-count)
    return Moments(count, seen.mean + delta, seen.second)


@isolated()
def principal_axes(moments: Moments, n_components: int) -> _Axes:
    """Leading eigenvectors of the covariance scatter / (count - 1), by one float64
    eigendecomposition, oriented.

    Of the scatter matrix (d, d) only what is on and above the diagonal is read.
    """
    variance, vectors = torch.linalg.eigh(moments.second / (moments.count - 1), UPLO="U")
    components = vectors.T.flip(0)[:n_components]
    # A covariance has no negative eigenvalue: what is below 0 is rounding.
    return _Axes(moments.mean, orient(components), variance.flip(0)[:n_components].clamp(min=0))


@isolated()
def subspace_drift(components: Tensor, others: Tensor) -> float:
    """How far two subspaces of one dimension are apart, 0 (the same) to 1 (orthogonal).

    Both are orthonormal rows (k, d). It is the mean squared sine of their principal angles, 1 - ||A
    B^T||_F^2 / k (Bjorck and Golub 1973, "Numerical methods for computing angles between linear
    subspaces").
    """
    shared = (components.double() @ others.double().T).square().sum()
    return max(0.0, 1 - float(shared) / len(components))


class StreamingPCA:
    """PCA from the exact covariance of a stream: one (d, d) matrix in float64, whatever the number
    of tokens.

    A token takes d^2 operations in float64, half of them on a CPU. The eigendecomposition, some 20
    d^3, is made when a fitted attribute is first read after a batch was added. Reading raises
    ValueError before 2 tokens were seen.

    Parameters
    ----------
    n_components: how many to keep, at most d; None keeps all d. More than d is a ValueError at the
        first batch.
    whiten: coefficients are divided by their standard deviation over the train tokens, and
        multiplied again by `inverse_transform`; a component without variance is left as it is.
        Errors of reconstruction do not change.
    device: where the model lives, by default that of its first batch or checkpoint; inputs are
        moved there.

    Attributes
    ----------
    mean_: float64 (d,).
    components_: orthonormal, in rows by falling variance, signs by `orient`: float64 (n_components,
        d).
    explained_variance_: float64 (n_components,).
    n_samples_seen_: tokens.

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
        self._axes: _Axes | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n_components={self.n_components!r}, whiten={self.whiten!r})"

    @isolated()
    def partial_fit(self, x: Tensor) -> Self:
        """Add a batch (batch, d) of real numbers; an empty one changes nothing.

        ValueError when d changes, for NaN and infinity, or on a restored model.
        """
        seen = self._moments
        if seen is None and self._axes is not None:
            raise ValueError(
                "found a PCA restored from its components, wanted its sums to go on: fit a new one"
            )
        check_numbers = check_later(x, None if seen is None else seen.mean.shape[0])
        self._check_n_components(x.shape[1])
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
        """Add the tokens that `other` was fitted on: two halves merged equal one pass, to rounding.
        `other` stays as it is.

        ValueError when it has seen another width, or is restored from its components.
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
        self._check_n_components(len(theirs.mean))
        self._axes = None
        place = mine.mean.device if mine is not None else self.device or theirs.mean.device
        moved = Moments(theirs.count, theirs.mean.to(place), theirs.second.to(place, copy=True))
        if mine is not None:
            check_batch(moved.mean[None], len(mine.mean))
            moved = merge_moments(mine, moved)
        self._moments = moved
        return self

    def _check_n_components(self, d: int) -> None:
        if self.n_components is not None and not 1 <= self.n_components <= d:
            raise ValueError(
                f"found n_components = {self.n_components}, wanted 1 to {d}, the dimensions:"
                " change it"
            )

    @isolated()
    def _solution(self) -> _Axes:
        if self._axes is None:
            if self._moments is None or self._moments.count < 2:
                raise ValueError(
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

    @isolated()
    def transform(self, x: Tensor) -> Tensor:
        """Coefficients z = (x - mean) U, computed in float64: (batch, d) to float32 (batch,
        n_components).
        """
        return self.project(x)[0]

    @isolated()
    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `transform`, and what the reconstruction by all components leaves of each token,
        squared: float64 (batch,).

        That is ||x - mean||^2 - sum z^2, clamped at 0 against rounding, and exactly 0 where there
        are d components.
        """
        centered = self._center(x)
        z = centered @ self.components_.T
        full_rank = z.shape[1] == centered.shape[1]
        left = (
            z.new_zeros(len(z))
            if full_rank
            else (centered.square().sum(1) - z.square().sum(1)).clamp(min=0)
        )
        return (z / self._unit()).float(), left

    @isolated()
    def inverse_transform(self, z: Tensor) -> Tensor:
        """z U^T + mean, computed in float64: (batch, n_components) to float32 (batch, d)."""
        check_batch(z, self.components_.shape[0])
        return (z.to(self.mean_) * self._unit() @ self.components_ + self.mean_).float()

    @isolated()
    def _unit(self) -> Tensor:
        """What a coefficient of 1 is worth along each component, float64 (n_components,)."""
        variance = self.explained_variance_
        # As in the rank of a matrix: below this an eigenvalue is the decomposition's rounding.
        rounding = variance.max() * self.mean_.shape[0] * torch.finfo(torch.float64).eps
        return (
            torch.where(variance > rounding, variance.sqrt(), 1.0)
            if self.whiten
            else torch.ones_like(variance)
        )

    @isolated()
    def _center(self, x: Tensor) -> Tensor:
        check_batch(x, self.mean_.shape[0])
        return x.to(self.mean_) - self.mean_

    @isolated()
    def squared_errors(self, x: Tensor, k: int) -> Tensor:
        """||x - x^||^2 of each token with its k largest coefficients kept: float64 (batch,).

        As the components are orthonormal, that is ||x - mean||^2 minus the kept z^2; clamped at 0
        against rounding.
        """
        centered = self._center(x)
        values, _ = top_k(centered @ self.components_.T, k)
        return (centered.square().sum(1) - values.square().sum(1)).clamp(min=0)

    @isolated()
    def reconstruction_errors(
        self, x: Tensor, std: Tensor, ks: Iterable[int]
    ) -> dict[int, ErrorSums]:
        """Errors at every K of `ks` for a batch (batch, d) of standardized tokens, std (d,) what
        they were divided by.

        One projection and one sort serve all K. The raw error weighs dimensions unequally, so it
        needs the residual itself: one more product a K, in which only the coefficients between the
        last K and this one are taken off.
        """
        residual = self._center(x)
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
        """What `resume` needs to go on exactly: copies of `mean` float64 (d,) and `scatter` float64
        (d, d), and `count` as JSON.
        """
        if self._moments is None:
            raise ValueError(
                "found a PCA without sums, wanted one that has seen tokens: call partial_fit first"
            )
        tensors = {"mean": snapshot(self._moments.mean), "scatter": snapshot(self._moments.second)}
        return tensors, {"count": self._moments.count}

    @isolated()
    def resume(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Self:
        """Go on from what `checkpoint` returned, bit for bit as if there had been no break.
        ValueError on bad shapes.
        """
        mean, scatter, count = tensors["mean"], tensors["scatter"], state["count"]
        if mean.ndim != 1 or scatter.shape != (len(mean), len(mean)) or count < 1:
            raise ValueError(
                f"found mean {tuple(mean.shape)}, scatter {tuple(scatter.shape)} and count {count},"
                " wanted (d,), (d, d) and at least 1: is it a PCA's checkpoint?"
            )
        place = self.device or mean.device
        self._axes = None
        self._moments = Moments(
            count,
            snapshot(mean).to(place, torch.float64),
            snapshot(scatter).to(place, torch.float64),
        )
        return self

    @classmethod
    @isolated()
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """A model that transforms as the one that left `state`, not to be fitted further.
        ValueError on bad shapes.
        """
        axes = _Axes(
            *(
                snapshot(state[name]).double()
                for name in ("mean", "components", "explained_variance")
            )
        )
        r, d = axes.variance.numel(), axes.mean.numel()
        if (
            axes.mean.shape != (d,)
            or axes.components.shape != (r, d)
            or axes.variance.shape != (r,)
            or not 1 <= r <= d
        ):
            shapes = ", ".join(
                f"{name} {tuple(value.shape)}" for name, value in axes._asdict().items()
            )
            raise ValueError(
                f"found {shapes}, wanted (d,), (n_components, d), (n_components,): is it a PCA's"
                " state?"
            )
        if not all(bool(value.isfinite().all()) for value in axes):
            raise ValueError(
                "found a PCA's state that holds NaN or infinity, wanted finite numbers: fit it"
                " again"
            )
        restored = cls(r, whiten=bool(state["whiten"]) if "whiten" in state else False)
        restored._axes = axes
        return restored


class Convergence:
    """How a PCA settles while it is fitted: its leading subspace at steps 1, 2, 4, 8, ... and at
    the last one.

    pca: that is fitted; a checkpoint is of both.
    watched: leading components that are looked at, and no more than a quarter of the dimensions:
        the whole space would never drift.

    `history_` has a dict of floats for each look: `step`; `reconstruction_error`, the share of the
    variance of the tokens so far that the leading components leave; and `subspace_drift` since the
    look before, which the first has not. There is none before there are more tokens than
    components.
    """

    def __init__(self, pca: StreamingPCA, watched: int = 64) -> None:
        self.history_: list[dict[str, float]] = []
        self._pca = pca
        self._watched = watched
        self._leading: Tensor | None = None

    @isolated()
    def observe(self, step: int, last: bool = False) -> dict[str, float]:
        """What there is to say after `step` steps, also in `history_`; nothing where it is not
        time, or was said already.

        It follows from the sums alone: a fit that is resumed from its checkpoint of a step can take
            this look later.
        """
        due = step > 0 and (last or step & (step - 1) == 0)
        moments = self._pca._moments
        if not due or moments is None or (self.history_ and self.history_[-1]["step"] >= step):
            return {}
        watched = min(self._watched, max(1, len(moments.mean) // 4))
        if moments.count <= watched:
            return {}
        leading = self._pca.components_[:watched].clone()
        total = float(moments.second.diagonal().sum()) / (moments.count - 1)
        kept = float(self._pca.explained_variance_[:watched].sum())
        found = {"reconstruction_error": max(0.0, 1 - kept / total) if total > 0 else 0.0}
        if self._leading is not None:
            found["subspace_drift"] = subspace_drift(leading, self._leading)
        self._leading = leading
        self.history_.append({"step": float(step), **found})
        return found

    @isolated()
    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The PCA's, with a copy of the `leading` components, float64 (components, d), where there
        are any, and `history` as JSON.
        """
        tensors, state = self._pca.checkpoint()
        leading = {} if self._leading is None else {"leading": snapshot(self._leading)}
        return tensors | leading, state | {"history": [dict(look) for look in self.history_]}

    @isolated()
    def resume(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Self:
        """Go on from what `checkpoint` returned, the PCA too, bit for bit as if there had been no
        break.
        """
        self._pca.resume(tensors, state)
        self._leading = None
        if "leading" in tensors and self._pca._moments is not None:
            self._leading = snapshot(tensors["leading"]).to(self._pca._moments.mean.device)
        self.history_ = [dict(look) for look in state["history"]]
        return self

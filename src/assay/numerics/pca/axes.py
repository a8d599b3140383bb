"""Scatter matrices, their principal axes, and the coefficients along them."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from assay.numerics.isolation import isolated, snapshot
from assay.numerics.moments import Moments

# A batch is taken so many rows at a time, which stay in the cache, and the scatter matrix in blocks
# of so many rows.
_ROWS = 1024
_BLOCK = 128

# Entries this near the largest count as tied with it: with two dimensions, say, both are 1/sqrt(2)
# but for rounding.
_TIE = 1e-6


class Axes(NamedTuple):
    """The mean (d,), orthonormal components (r, d) in rows, and the variance (r,) along each,
    falling; float64.
    """

    mean: Tensor
    components: Tensor
    variance: Tensor


@isolated()
def top_k(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k entries of each row of z (batch, r) with the largest |z|: values (batch, k), int64
    indices (batch, k).

    Ordered by falling |z|, ties to the lower index; torch.topk promises no order among ties.

    Raises:
        ValueError: k is not 1 to r.
    """
    check_k(k, z.shape[1])
    indices = z.abs().argsort(dim=1, descending=True, stable=True)[:, :k]
    return z.gather(1, indices), indices


def check_k(k: int, n_components: int) -> None:
    """Check that so many components have k largest ones.

    Raises:
        ValueError: they have not.
    """
    if not 1 <= k <= n_components:
        raise ValueError(
            f"found K = {k}, wanted 1 to {n_components}, the number of components: change K"
        )


@isolated()
def orient(components: Tensor) -> Tensor:
    """Flip rows of components (r, d) so that the entry of largest magnitude is positive; ties to
    the lower index.

    The rule is that a component's mean coefficient over the train tokens is nonnegative; this one
    decides where that mean is below rounding. That is always so, since the train tokens are
    centered about their own mean.
    """
    magnitude = components.abs()
    largest = magnitude >= magnitude.amax(1, keepdim=True) * (1 - _TIE)
    first = largest.to(torch.uint8).argmax(1, keepdim=True)
    return components * components.gather(1, first).sign()


@isolated()
def scatter_step(seen: Moments, x: Tensor) -> Moments:
    """Add the tokens x (n, d) to the moments; the scatter matrix is updated in place, on and above
    its diagonal only.

    Products are taken about the mean so far, m, and moved to the new one, m + delta, by one outer
    product: with Y = x - m,

        delta = sum(Y) / count,    M <- M + Y^T Y - count delta delta^T        (count with x)

    which is Chan et al. (1979, eq. 2.1) without a pass for the batch's own mean. delta is small
    beside the spread, so nothing cancels, however far the mean is from 0.
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
def principal_axes(moments: Moments, n_components: int) -> Axes:
    """Leading eigenvectors of the covariance scatter / (count - 1), by one float64
    eigendecomposition, oriented.

    Only the part of the scatter matrix (d, d) on and above the diagonal is read.
    """
    variance, vectors = torch.linalg.eigh(moments.second / (moments.count - 1), UPLO="U")
    components = vectors.T.flip(0)[:n_components]
    # A covariance has no negative eigenvalue: what is below 0 is rounding.
    return Axes(moments.mean, orient(components), variance.flip(0)[:n_components].clamp(min=0))


def check_n_components(n_components: int | None, d: int) -> None:
    """Check that d dimensions have so many components; None is all of them.

    Raises:
        ValueError: they have not.
    """
    if n_components is not None and not 1 <= n_components <= d:
        raise ValueError(
            f"found n_components = {n_components}, wanted 1 to {d}, the dimensions: change it"
        )


@isolated()
def read_axes(state: Mapping[str, Tensor]) -> Axes:
    """The axes of a state, copied.

    Raises:
        ValueError: the shapes do not fit, or there is NaN or infinity.
    """
    axes = Axes(
        *(snapshot(state[name]).double() for name in ("mean", "components", "explained_variance"))
    )
    r, d = axes.variance.numel(), axes.mean.numel()
    if (
        axes.mean.shape != (d,)
        or axes.components.shape != (r, d)
        or axes.variance.shape != (r,)
        or not 1 <= r <= d
    ):
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in axes._asdict().items())
        raise ValueError(
            f"found {shapes}, wanted (d,), (n_components, d), (n_components,): is it a PCA's state?"
        )
    if not all(bool(value.isfinite().all()) for value in axes):
        raise ValueError(
            "found a PCA's state that holds NaN or infinity, wanted finite numbers: fit it again"
        )
    return axes


@isolated()
def read_sums(
    tensors: Mapping[str, Tensor], count: int, device: torch.device | str | None
) -> Moments:
    """The sums of a checkpoint, copied to `device` (None: where they are).

    Raises:
        ValueError: the shapes do not fit.
    """
    mean, scatter = tensors["mean"], tensors["scatter"]
    if mean.ndim != 1 or scatter.shape != (len(mean), len(mean)) or count < 1:
        raise ValueError(
            f"found mean {tuple(mean.shape)}, scatter {tuple(scatter.shape)} and count {count},"
            " wanted (d,), (d, d) and at least 1: is it a PCA's checkpoint?"
        )
    place = device or mean.device
    return Moments(
        count, snapshot(mean).to(place, torch.float64), snapshot(scatter).to(place, torch.float64)
    )

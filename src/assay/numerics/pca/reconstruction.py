"""The coefficients of tokens, and the errors of reconstructing them from the leading ones."""

from collections.abc import Iterable

import torch
from torch import Tensor

from assay.numerics.isolation import isolated
from assay.numerics.moments import check_batch
from assay.numerics.pca.axes import Axes, check_k, top_k
from assay.numerics.reconstruction_error import ErrorSums, error_sums


@isolated()
def center(axes: Axes, x: Tensor) -> Tensor:
    """x (batch, d) less the mean: float64, on the device of the axes."""
    check_batch(x, axes.mean.shape[0])
    return x.to(axes.mean) - axes.mean


@isolated()
def project(axes: Axes, x: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients (batch, r) of x (batch, d), and squared errors (batch,); float64."""
    centered = center(axes, x)
    z = centered @ axes.components.T
    full_rank = z.shape[1] == centered.shape[1]
    left = (
        z.new_zeros(len(z))
        if full_rank
        else (centered.square().sum(1) - z.square().sum(1)).clamp(min=0)
    )
    return z, left


@isolated()
def unit(axes: Axes, *, whiten: bool) -> Tensor:
    """What a coefficient of 1 is worth along each component, float64 (r,): 1, or if coefficients
    are whitened, the standard deviation where there is any.
    """
    if not whiten:
        return torch.ones_like(axes.variance)
    # As in the rank of a matrix: below this an eigenvalue is the decomposition's rounding.
    rounding = axes.variance.max() * axes.mean.shape[0] * torch.finfo(torch.float64).eps
    return torch.where(axes.variance > rounding, axes.variance.sqrt(), 1.0)


def _largest(axes: Axes, z: Tensor, k: int, *, whiten: bool) -> tuple[Tensor, Tensor]:
    """As `top_k` of coefficients z (batch, r), raw ones; if they are whitened, those that are the
    largest then.
    """
    if not whiten:
        return top_k(z, k)
    _, indices = top_k(z / unit(axes, whiten=True), k)
    return z.gather(1, indices), indices


@isolated()
def squared_errors(axes: Axes, x: Tensor, k: int, *, whiten: bool) -> Tensor:
    """See `StreamingPCA.squared_errors`."""
    centered = center(axes, x)
    values, _ = _largest(axes, centered @ axes.components.T, k, whiten=whiten)
    return (centered.square().sum(1) - values.square().sum(1)).clamp(min=0)


@isolated()
def reconstruction_errors(
    axes: Axes, x: Tensor, std: Tensor, ks: Iterable[int], *, whiten: bool
) -> dict[int, ErrorSums]:
    """See `StreamingPCA.reconstruction_errors`."""
    residual = center(axes, x)
    z = residual @ axes.components.T
    values, indices = _largest(axes, z, z.shape[1], whiten=whiten)
    errors: dict[int, ErrorSums] = {}
    done = 0
    for k in sorted(set(ks)):
        check_k(k, z.shape[1])
        newly_kept = torch.zeros_like(z).scatter(1, indices[:, done:k], values[:, done:k])
        residual = residual - newly_kept @ axes.components
        errors[k] = error_sums(x.to(residual), residual, std)
        done = k
    return errors

"""Tokens and centers made ready for the product: less the origin, rounded, with the bounds that
ride along, in two Triton kernels.

What the bounds are, and why they hold: `assay.numerics.kmeans.rounded_centers.RoundedCenters`.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from assay.numerics.kmeans.kernels import Product

# Rows of tokens and of centers that are rounded at a time.
ROUNDED = 4


@triton.jit
def _shifted(rows, origin, dims, inside, d):  # type: ignore[no-untyped-def]
    """Of some dimensions the values less the origin's, and 0 where there are none."""
    values = tl.load(rows + dims[None, :], mask=inside, other=0.0)
    return tl.where(inside, values - tl.load(origin + dims, mask=dims < d, other=0.0)[None, :], 0.0)


@triton.jit
def _store_bounds(out, bound, rest, is_row, d, width):  # type: ignore[no-untyped-def]
    """Behind the d dimensions of each row its bounds, (rows, 64), and zeros up to the width."""
    for begin in range(d, width, 64):
        place = begin + rest
        value = tl.where(begin == d, bound, 0.0)
        tl.store(
            out + place, value.to(out.dtype.element_ty), mask=is_row[:, None] & (place < width)
        )


@triton.jit  # type: ignore[untyped-decorator]
def _round_centers(  # type: ignore[no-untyped-def]
    centers,
    origin,
    matrix,
    bounds,
    overflown,
    n_centers,
    d,
    width,
    c_stride,
    share,
    most_halved,
    largest,
    unit,
    least_step,
    underflow,
    ROWS: tl.constexpr,  # noqa: N803
    DIMS: tl.constexpr,  # noqa: N803
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_center = rows < n_centers
    c_rows = centers + rows.to(tl.int64)[:, None] * c_stride
    out = matrix + rows.to(tl.int64)[:, None] * width
    squared = tl.zeros((ROWS,), tl.float64)
    lost_squared = tl.zeros((ROWS,), tl.float64)
    for begin in range(0, d, DIMS):
        dims = begin + tl.arange(0, DIMS)
        inside = is_center[:, None] & (dims < d)[None, :]
        shifted = _shifted(c_rows, origin, dims, inside, d)
        rounded = shifted.to(matrix.dtype.element_ty)
        exact = shifted.to(tl.float64)
        away = exact - rounded.to(tl.float64)
        squared += tl.sum(exact * exact, 1)
        lost_squared += tl.sum(away * away, 1)
        tl.store(out + dims[None, :], rounded, mask=(dims < d)[None, :])
    half = -0.5 * squared
    norm = tl.sqrt(squared)
    lost = tl.sqrt(lost_squared) + underflow
    most = tl.maximum(half - half * share, -most_halved)
    high = most.to(tl.float32).to(matrix.dtype.element_ty)
    low = most - high.to(tl.float64)
    low = (low + 2 * unit * tl.abs(low) + least_step).to(tl.float32).to(matrix.dtype.element_ty)
    norm_up = (norm * (1 + 4 * unit) + least_step).to(tl.float32).to(matrix.dtype.element_ty)
    lost_up = (lost * (1 + 4 * unit) + least_step).to(tl.float32).to(matrix.dtype.element_ty)
    # What fills the last tile up is never near: below -|x| |c| and the halved norm of all that
    # fits.
    rest = tl.arange(0, 64)[None, :]
    bound = tl.where(rest == 0, high[:, None], tl.where(rest == 1, low[:, None], norm_up[:, None]))
    bound = tl.where(rest == 3, lost_up[:, None], bound).to(tl.float32)
    bound = tl.where(rest < 4, tl.where(is_center[:, None], bound, -largest), 0.0)
    _store_bounds(out, bound, rest, rows >= 0, d, width)
    tl.store(bounds + 3 * rows, norm.to(tl.float32), mask=is_center)
    tl.store(bounds + 3 * rows + 1, lost.to(tl.float32), mask=is_center)
    raised = high.to(tl.float64) + low.to(tl.float64) - half
    tl.store(bounds + 3 * rows + 2, raised.to(tl.float32), mask=is_center)
    # Of a dimension that overflows, infinity is lost; NaN is no number below.
    held = (
        (lost < largest)
        & (norm_up.to(tl.float32) < float("inf"))
        & (low.to(tl.float32) < float("inf"))
    )
    tl.store(overflown + tl.zeros((ROWS,), tl.int32), 1, mask=is_center & ~held)


@triton.jit  # type: ignore[untyped-decorator]
def prepare_tokens(  # type: ignore[no-untyped-def]
    x,
    origin,
    tokens,
    norms,
    lost,
    n,
    d,
    width,
    x_stride,
    margin,
    sums,
    underflow,
    raised,
    least_step,
    ROWS: tl.constexpr,  # noqa: N803
    DIMS: tl.constexpr,  # noqa: N803
):
    """Rows of x less the origin, rounded, with their bounds, norms and what rounding lost."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = (rows < n)[:, None]
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    out = tokens + rows.to(tl.int64)[:, None] * width
    kept_squared = tl.zeros((ROWS,), tl.float32)
    lost_squared = tl.zeros((ROWS,), tl.float32)
    for begin in range(0, d, DIMS):
        dims = begin + tl.arange(0, DIMS)
        inside = is_row & (dims < d)[None, :]
        shifted = _shifted(x_rows, origin, dims, inside, d)
        rounded = shifted.to(tokens.dtype.element_ty)
        kept = rounded.to(tl.float32)
        kept_squared += tl.sum(kept * kept, 1)
        lost_squared += tl.sum((shifted - kept) * (shifted - kept), 1)
        tl.store(out + dims[None, :], rounded, mask=inside)
    norm = margin * tl.sqrt(kept_squared)
    loss = margin * tl.sqrt(lost_squared) + sums * norm + underflow
    norm = norm + underflow
    # Two ones for the halved norm, then the bounds.
    rest = tl.arange(0, 64)[None, :]
    loss_up = (loss * raised + least_step)[:, None]
    norm_up = (norm * raised + least_step)[:, None]
    bound = tl.where(rest < 2, 1.0, tl.where(rest == 2, loss_up, tl.where(rest == 3, norm_up, 0.0)))
    _store_bounds(out, bound, rest, rows < n, d, width)
    tl.store(norms + rows, norm, mask=rows < n)
    tl.store(lost + rows, loss, mask=rows < n)


def round_centers(centers: Tensor, origin: Tensor, product: Product) -> tuple[Tensor, Tensor]:
    """Write centers (K, d), float32, less the origin (d,), into `product.matrix`, with their
    bounds.

    Returns `bounds` float32 (K, 3), and whether the matrix holds them all, bool (). Nothing is
    synchronized.
    """
    n_centers, d = centers.shape
    matrix = product.matrix
    centers = centers if centers.stride(-1) == 1 else centers.contiguous()
    bounds = torch.empty(n_centers, 3, dtype=torch.float32, device=centers.device)
    overflown = torch.zeros((), dtype=torch.int32, device=centers.device)
    with on_device_of(centers):
        _round_centers[(len(matrix) // ROUNDED,)](
            centers,
            origin,
            matrix,
            bounds,
            overflown,
            n_centers,
            d,
            matrix.shape[1],
            centers.stride(0),
            product.margin * product.sums,
            product.most_halved,
            torch.finfo(matrix.dtype).max,
            product.unit,
            product.least_step,
            d**0.5 * 2.0**-126,
            ROWS=ROUNDED,
            DIMS=256,
        )
    return bounds, overflown == 0


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()

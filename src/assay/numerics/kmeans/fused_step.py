"""A step of mini-batch k-means, once the nearest centers are known, in two Triton kernels.

1. `_move`: of a center and some of its dimensions the residuals of its tokens, summed in float64 in
the tokens' order, and where they take it. 2. `_squared`: a token's squared distance to the center
that it had.

What is computed is what `assay.numerics.kmeans.step.pull_centers` says. The same bits in every run:
nothing is added atomically.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from assay.numerics.kmeans.fused_rounding import on_device_of

# Tokens and dimensions of a center at a time: few centers have many tokens of one batch.
_TOKENS, _DIMS = 2, 512


@triton.jit  # type: ignore[untyped-decorator]
def _move(  # type: ignore[no-untyped-def]
    x,
    centers,
    order,
    begins,
    counts,
    moved,
    d,
    x_stride,
    c_stride,
    TOKENS: tl.constexpr,  # noqa: N803
    DIMS: tl.constexpr,  # noqa: N803
):
    center = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    own = tl.load(centers + center * c_stride + dims, mask=dims < d, other=0.0).to(tl.float64)
    begin, end = tl.load(begins + center), tl.load(begins + center + 1)
    pulls = tl.zeros((TOKENS, DIMS), tl.float64)
    for first in range(begin, end, TOKENS):
        places = first + tl.arange(0, TOKENS)
        tokens = tl.load(order + places, mask=places < end, other=0)
        inside = (places < end)[:, None] & (dims < d)[None, :]
        values = tl.load(x + tokens[:, None] * x_stride + dims[None, :], mask=inside, other=0.0).to(
            tl.float64
        )
        pulls += tl.where(inside, values - own[None, :], 0.0)
    count = tl.maximum(tl.load(counts + center), 1).to(tl.float64)
    tl.store(
        moved + center * d + dims, (tl.sum(pulls, 0) / count + own).to(tl.float32), mask=dims < d
    )


@triton.jit  # type: ignore[untyped-decorator]
def _squared(  # type: ignore[no-untyped-def]
    x,
    centers,
    labels,
    squared,
    d,
    x_stride,
    c_stride,
    DIMS: tl.constexpr,  # noqa: N803
):
    token = tl.program_id(0).to(tl.int64)
    own = centers + tl.load(labels + token) * c_stride
    sums = tl.zeros((DIMS,), tl.float64)
    for begin in range(0, d, DIMS):
        dims = begin + tl.arange(0, DIMS)
        values = tl.load(x + token * x_stride + dims, mask=dims < d, other=0.0).to(tl.float64)
        away = values - tl.load(own + dims, mask=dims < d, other=0.0).to(tl.float64)
        sums += away * away
    tl.store(squared + token, tl.sum(sums, 0))


def move_centers(
    x: Tensor, centers: Tensor, labels: Tensor, hits: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Where centers (K, d) go, float32, and |x - c|^2 before it, float64 (n,), for tokens x (n, d),
    n >= 1, float32, by label (n,).

    hits: tokens of each center, int64 (K,). counts: what the sum of its residuals is divided by,
    int64 (K,); 0 counts as 1. Nothing is synchronized.
    """
    x, centers = (each if each.stride(-1) == 1 else each.contiguous() for each in (x, centers))
    (n, d), n_centers = x.shape, len(centers)
    # A sort takes a pass for each byte of a key.
    order = labels.to(torch.int16 if n_centers <= 2**15 else torch.int32).argsort(stable=True)
    begins = torch.zeros(n_centers + 1, dtype=torch.int64, device=x.device)
    torch.cumsum(hits, 0, out=begins[1:])
    moved = torch.empty(n_centers, d, dtype=torch.float32, device=x.device)
    squared = torch.empty(n, dtype=torch.float64, device=x.device)
    strides = x.stride(0), centers.stride(0)
    with on_device_of(x):
        _move[(n_centers, triton.cdiv(d, _DIMS))](
            x, centers, order, begins, counts, moved, d, *strides, TOKENS=_TOKENS, DIMS=_DIMS
        )
        _squared[(n,)](x, centers, labels, squared, d, *strides, DIMS=_DIMS)
    return moved, squared

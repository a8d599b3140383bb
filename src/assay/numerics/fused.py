"""The two largest entries of each row of a product, without the product: a Triton kernel for CUDA.

A block of rows meets one block of centres after the other; only the running best, the second best and the place of the best are kept.
Its logic was run in Triton's interpreter, and it compiles for compute capability 8.0 and 9.0; it has not yet been run on a GPU.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_ROWS, _BLOCK_CENTERS, _BLOCK_DIMS = 128, 128, 64
# What is left of the dimensions beyond whole blocks, by the least that a tensor core takes: bounds are a few dimensions more than d.
_BLOCK_REST = 16
# With four, registers are spilled.
_WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    x,
    c,
    best,
    second,
    where,
    n,
    n_centers,
    d,
    whole,
    x_stride,
    c_stride,
    ROWS: tl.constexpr,  # noqa: N803
    CENTERS: tl.constexpr,  # noqa: N803
    DIMS: tl.constexpr,  # noqa: N803
    REST: tl.constexpr,  # noqa: N803
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.full((ROWS,), float("-inf"), tl.float32)
    runner_up = tl.full((ROWS,), float("-inf"), tl.float32)
    place = tl.zeros((ROWS,), tl.int32)
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    is_row = (rows < n)[:, None]
    for start in range(0, n_centers, CENTERS):
        centers = start + tl.arange(0, CENTERS)
        c_columns = c + centers.to(tl.int64)[None, :] * c_stride
        is_center = (centers < n_centers)[None, :]
        scores = tl.zeros((ROWS, CENTERS), tl.float32)
        for begin in range(0, whole, DIMS):
            dims = begin + tl.arange(0, DIMS)
            a = tl.load(x_rows + dims[None, :], mask=is_row, other=0.0)
            b = tl.load(c_columns + dims[:, None], mask=is_center, other=0.0)
            scores = tl.dot(a, b, scores)
        for begin in range(whole, d, REST):
            dims = begin + tl.arange(0, REST)
            a = tl.load(x_rows + dims[None, :], mask=is_row & (dims < d)[None, :], other=0.0)
            b = tl.load(c_columns + dims[:, None], mask=is_center & (dims < d)[:, None], other=0.0)
            scores = tl.dot(a, b, scores)
        scores = tl.where(is_center, scores, float("-inf"))
        here = tl.max(scores, 1)
        j = tl.argmax(scores, 1)
        others = tl.where(tl.arange(0, CENTERS)[None, :] == j[:, None], float("-inf"), scores)
        runner_up = tl.maximum(tl.maximum(tl.minimum(first, here), runner_up), tl.max(others, 1))
        place = tl.where(here > first, start + j, place)
        first = tl.maximum(first, here)
    tl.store(best + rows, first, mask=rows < n)
    tl.store(second + rows, runner_up, mask=rows < n)
    tl.store(where + rows, place, mask=rows < n)


def two_best(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of x @ c.T, x (n, d) and c (K, d) bfloat16: largest and second largest float32 (n,), and where, int64 (n,).

    Entries of a row lie side by side; rows may be apart, and are loaded fastest 128 bytes or a multiple of it apart.
    """
    n, d = x.shape
    best, second = torch.empty(2, n, dtype=torch.float32, device=x.device)
    where = torch.empty(n, dtype=torch.int32, device=x.device)
    if n == 0:
        return best, second, where.long()
    grid = (triton.cdiv(n, _BLOCK_ROWS),)
    sizes = {"ROWS": _BLOCK_ROWS, "CENTERS": _BLOCK_CENTERS, "DIMS": _BLOCK_DIMS, "REST": _BLOCK_REST}
    whole = d // _BLOCK_DIMS * _BLOCK_DIMS
    # Triton launches on the current device, whatever the tensors'.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _kernel[grid](
            x, c, best, second, where, n, len(c), d, whole, x.stride(0), c.stride(0), **sizes, num_warps=_WARPS
        )
    return best, second, where.long()

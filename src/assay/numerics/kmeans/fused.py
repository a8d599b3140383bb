"""The nearest center of every token in five Triton kernels, with nothing for the host to look at in
between.

1. `prepare_tokens`: a token less the origin, rounded, with the bounds that ride along in the
product, and their float32 norms. 2. `_two_best`: of each tile of 256 centers the largest score and
the second, as float32 whose low eight bits say which column it is. The scores themselves are never
written down. 3. `_shortlist`: which centers a row leaves in question: one as a rule, a few at
times, too many seldom. 4. `_settle`: of a few the nearest by differences in float64; and
`_settle_crowded`, where a tile has two of them, among all of the tile.

`_round_centers` makes the centers ready for it. What the bounds are, and why they hold:
`assay.numerics.kmeans.rounded_centers.RoundedCenters`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from assay.numerics.kmeans.fused_rounding import ROUNDED, on_device_of, prepare_tokens
from assay.numerics.kmeans.kernels import FUSED_TILE, Product

_TILE, _DIMS = FUSED_TILE, 64


class _Shape(NamedTuple):
    """How `_two_best` is cut: rows a program, warps, stages of the pipeline; and whether the
    hardware has tensor descriptors.
    """

    rows: int
    warps: int
    stages: int
    descriptors: bool


# By compute capability, from this one on, the latest first. Hopper's is the fastest of those that
# fit an H200 (docs/benchmarks.md); Ampere's spills no registers and fits its smallest
# multiprocessors, and has not yet run on a card.
_SHAPES = {(9, 0): _Shape(128, 8, 4, True), (8, 0): _Shape(128, 8, 3, False)}

# What a float32 loses where a column takes its low bits, relative.
_PACKING = 2.0**-15

# More candidates than this, or tiles with two, and a row is better asked again in the next
# precision.
_MOST_NEAR, _MOST_CROWDED = 16, 4

# Tokens at a time, for the memory of the results by tile.
_CHUNK = 65_536


@triton.jit  # type: ignore[untyped-decorator]
def _two_best(  # type: ignore[no-untyped-def]
    tokens,
    matrix,
    best,
    second,
    n,
    n_tiles,
    WIDTH: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    DIMS: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
    MAY_OVERFLOW: tl.constexpr,  # noqa: N803
    DESCRIPTORS: tl.constexpr,  # noqa: N803
):
    program = tl.program_id(0)
    row = program // SPLITS * ROWS
    share = tl.cdiv(n_tiles, SPLITS)
    first = program % SPLITS * share
    last = tl.minimum(first + share, n_tiles)
    rows = row + tl.arange(0, ROWS)
    columns = tl.arange(0, TILE)
    dims = tl.arange(0, DIMS)
    if not DESCRIPTORS:
        a_rows = tokens + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * WIDTH + dims[None, :]
    for tile in tl.range(first, last, flatten=DESCRIPTORS):
        scores = tl.zeros((ROWS, TILE), tl.float32)
        if not DESCRIPTORS:
            b_columns = (
                matrix + (tile * TILE + columns).to(tl.int64)[None, :] * WIDTH + dims[:, None]
            )
        for k in range(WIDTH // DIMS):
            if DESCRIPTORS:
                scores = tl.dot(
                    tokens.load([row, k * DIMS]), matrix.load([tile * TILE, k * DIMS]).T, scores
                )
            else:
                scores = tl.dot(tl.load(a_rows + k * DIMS), tl.load(b_columns + k * DIMS), scores)
        if MAY_OVERFLOW:
            # What overflows may be the largest; low bits would make it NaN.
            scores = tl.where(
                scores == scores,  # noqa: PLR0124 - which NaN is not
                tl.minimum(tl.maximum(scores, -3.0e38), 3.0e38),
                3.0e38,
            )
        bits = (scores.to(tl.int32, bitcast=True) & ~(TILE - 1)) | columns[None, :]
        packed = bits.to(tl.float32, bitcast=True)
        top = tl.max(packed, 1)
        rest = tl.max(tl.where(packed == top[:, None], float("-inf"), packed), 1)
        place = rows.to(tl.int64) * n_tiles + tile
        tl.store(best + place, top, mask=rows < n)
        tl.store(second + place, rest, mask=rows < n)


@triton.jit  # type: ignore[untyped-decorator]
def _shortlist(  # type: ignore[no-untyped-def]
    best,
    second,
    norms,
    lost,
    bounds,
    least_of,
    labels,
    queue,
    queued,
    n,
    n_centers,
    n_tiles,
    grown,
    packing,
    least_error,
    ROWS: tl.constexpr,  # noqa: N803
    TILES: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    MOST_NEAR: tl.constexpr,  # noqa: N803
    MOST_CROWDED: tl.constexpr,  # noqa: N803
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tiles = tl.arange(0, TILES)[None, :]
    place = rows.to(tl.int64)[:, None] * n_tiles + tiles
    inside = (rows < n)[:, None] & (tiles < n_tiles)
    tops = tl.load(best + place, mask=inside, other=float("-inf"))
    rests = tl.load(second + place, mask=inside, other=float("-inf"))
    columns = tops.to(tl.int32, bitcast=True) & (TILE - 1)
    top = tl.max(tops, 1)
    tile = tl.min(tl.where(tops == top[:, None], tiles, TILES), 1)
    seeming = tile * TILE + tl.sum(tl.where(tiles == tile[:, None], columns, 0), 1)
    # What fills up can only seem the best where all is lost.
    clear = (rows < n) & (seeming < n_centers)
    of_best = bounds + 3 * tl.where(clear, seeming, 0)
    norm, loss = (
        tl.load(norms + rows, mask=rows < n, other=0.0),
        tl.load(lost + rows, mask=rows < n, other=0.0),
    )
    error = loss * tl.load(of_best) + norm * tl.load(of_best + 1) + tl.load(of_best + 2)
    size = tl.abs(top)
    least = top - 2.02 * (error * grown + packing * (size + 3 * error) + least_error)
    clear = clear & (tl.abs(least) < 2.9e38) & (size < 2.9e38)  # neither infinite nor NaN
    n_near = tl.sum((tops >= least[:, None]).to(tl.int32), 1)
    n_crowded = tl.sum((rests >= least[:, None]).to(tl.int32), 1)
    few = clear & (n_near <= MOST_NEAR)
    label = tl.where(few & (n_crowded == 0), tl.where(n_near == 1, seeming, -2), -1)
    tl.store(labels + rows, label.to(tl.int64), mask=rows < n)
    tl.store(least_of + rows, least, mask=rows < n)
    # In which order the queue is filled changes no answer.
    crowded = few & (n_crowded > 0) & (n_crowded <= MOST_CROWDED)
    place = tl.atomic_add(queued + tl.zeros((ROWS,), tl.int32), 1, mask=crowded)
    tl.store(queue + place, rows, mask=crowded)


@triton.jit  # type: ignore[untyped-decorator]
def _squared(x, centers, members, wanted, d, c_stride, DIMS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """|x - c|^2 of the wanted members, float64, infinite for the others."""
    rows = centers + members.to(tl.int64)[:, None] * c_stride
    squared = tl.zeros(members.shape, tl.float64)
    for begin in range(0, d, DIMS):
        dims = begin + tl.arange(0, DIMS)
        inside = wanted[:, None] & (dims < d)[None, :]
        a = tl.load(x + dims, mask=dims < d, other=0.0).to(tl.float64)
        b = tl.load(rows + dims[None, :], mask=inside, other=0.0).to(tl.float64)
        away = tl.where(inside, a[None, :] - b, 0.0)
        squared += tl.sum(away * away, 1)
    return tl.where(wanted, squared, float("inf"))


@triton.jit
def _lowest(squared, members, n_centers, d):  # type: ignore[no-untyped-def]
    """The least, and the lowest index whose distance differs from it by no more than rounding."""
    least = tl.min(squared, 0)
    return least, tl.min(tl.where(squared * _alike(d) <= least, members, n_centers), 0)


@triton.jit
def _alike(d):  # type: ignore[no-untyped-def]
    return 1.0 - tl.cast((d + 4) * 2.3e-16, tl.float64)


@triton.jit  # type: ignore[untyped-decorator]
def _settle(  # type: ignore[no-untyped-def]
    x,
    centers,
    best,
    least_of,
    labels,
    n_centers,
    n_tiles,
    d,
    x_stride,
    c_stride,
    TILES: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    DIMS: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(labels + row) == -2:
        tiles = tl.arange(0, TILES)
        tops = tl.load(best + row * n_tiles + tiles, mask=tiles < n_tiles, other=float("-inf"))
        members = tiles * TILE + (tops.to(tl.int32, bitcast=True) & (TILE - 1))
        near = tops >= tl.load(least_of + row)
        squared = _squared(x + row * x_stride, centers, members, near, d, c_stride, DIMS)
        _, label = _lowest(squared, members, n_centers, d)
        tl.store(labels + row, label.to(tl.int64))


@triton.jit  # type: ignore[untyped-decorator]
def _settle_crowded(  # type: ignore[no-untyped-def]
    x,
    centers,
    best,
    second,
    least_of,
    labels,
    queue,
    queued,
    n_centers,
    n_tiles,
    d,
    x_stride,
    c_stride,
    PROGRAMS: tl.constexpr,  # noqa: N803
    TILES: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    DIMS: tl.constexpr,  # noqa: N803
):
    tiles = tl.arange(0, TILES)
    for place in range(tl.program_id(0), tl.load(queued), PROGRAMS):
        row = tl.load(queue + place).to(tl.int64)
        tops = tl.load(best + row * n_tiles + tiles, mask=tiles < n_tiles, other=float("-inf"))
        rests = tl.load(second + row * n_tiles + tiles, mask=tiles < n_tiles, other=float("-inf"))
        least = tl.load(least_of + row)
        crowded = rests >= least
        number = tl.cumsum(crowded.to(tl.int32), 0)
        members = tiles * TILE + (tops.to(tl.int32, bitcast=True) & (TILE - 1))
        alone = (tops >= least) & (rests < least)
        nearest, label = _lowest(
            _squared(x + row * x_stride, centers, members, alone, d, c_stride, DIMS),
            members,
            n_centers,
            d,
        )
        label = tl.where(nearest < float("inf"), label, n_centers)
        for index in range(1, tl.sum(crowded.to(tl.int32), 0) + 1):
            tile = tl.sum(tl.where(crowded & (number == index), tiles, 0), 0)
            block = tile * TILE + tl.arange(0, TILE)
            closest, member = _lowest(
                _squared(x + row * x_stride, centers, block, block < n_centers, d, c_stride, DIMS),
                block,
                n_centers,
                d,
            )
            closer = (closest < nearest * _alike(d)) | (
                (closest * _alike(d) <= nearest) & (member < label)
            )
            label = tl.where(closer, member, label)
            nearest = tl.minimum(closest, nearest)
        tl.store(labels + row, label.to(tl.int64))


def nearest(x: Tensor, centers: Tensor, origin: Tensor, product: Product) -> Tensor:
    """Index of the nearest of centers (K, d) to each row of x (n, d), float32: int64 (n,), -1 where
    too many are left in question.

    Ties by float64's rounding go to the lower index. Nothing is synchronized.
    """
    x, centers = (each if each.stride(-1) == 1 else each.contiguous() for each in (x, centers))
    with on_device_of(x):
        parts = [
            _nearest(part, centers, origin, product) for part in torch.split(x, _CHUNK) if len(part)
        ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=x.device)


def _nearest(x: Tensor, centers: Tensor, origin: Tensor, product: Product) -> Tensor:
    n, d = x.shape
    matrix = product.matrix
    width, n_tiles = matrix.shape[1], len(matrix) // _TILE
    tokens = torch.empty(n, width, dtype=matrix.dtype, device=x.device)
    norms, lost, least = torch.empty(3, n, dtype=torch.float32, device=x.device)
    best, second = torch.empty(2, n, n_tiles, dtype=torch.float32, device=x.device)
    labels = torch.empty(n, dtype=torch.int64, device=x.device)
    prepare_tokens[(triton.cdiv(n, ROUNDED),)](
        x,
        origin,
        tokens,
        norms,
        lost,
        n,
        d,
        width,
        x.stride(0),
        product.margin,
        product.sums,
        product.underflow,
        1 + 4 * product.unit,
        product.least_step,
        ROWS=ROUNDED,
        DIMS=256,
    )
    shape = _shape(x.device)
    blocks = triton.cdiv(n, shape.rows)
    splits = max(1, min(n_tiles, _multiprocessors(x.device) // blocks))
    _two_best[(blocks * splits,)](
        TensorDescriptor.from_tensor(tokens, [shape.rows, _DIMS]) if shape.descriptors else tokens,
        TensorDescriptor.from_tensor(matrix, [_TILE, _DIMS]) if shape.descriptors else matrix,
        best,
        second,
        n,
        n_tiles,
        WIDTH=width,
        ROWS=shape.rows,
        TILE=_TILE,
        DIMS=_DIMS,
        SPLITS=splits,
        MAY_OVERFLOW=matrix.dtype != torch.float16,
        DESCRIPTORS=shape.descriptors,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    tiles = triton.next_power_of_2(n_tiles)
    rows = max(1, 512 // tiles)
    queue = torch.empty(n, dtype=torch.int32, device=x.device)
    queued = torch.zeros(1, dtype=torch.int32, device=x.device)
    _shortlist[(triton.cdiv(n, rows),)](
        best,
        second,
        norms,
        lost,
        product.bounds,
        least,
        labels,
        queue,
        queued,
        n,
        len(centers),
        n_tiles,
        1 + 8 * product.unit,
        _PACKING,
        (d + 8) * 2.0**-120,
        ROWS=rows,
        TILES=tiles,
        TILE=_TILE,
        MOST_NEAR=_MOST_NEAR,
        MOST_CROWDED=_MOST_CROWDED,
    )
    sizes = (len(centers), n_tiles, d, x.stride(0), centers.stride(0))
    shapes = {"TILES": tiles, "TILE": _TILE, "DIMS": 16}
    _settle[(n,)](x, centers, best, least, labels, *sizes, **shapes)
    programs = 2 * _multiprocessors(x.device)
    _settle_crowded[(programs,)](
        x,
        centers,
        best,
        second,
        least,
        labels,
        queue,
        queued,
        *sizes,
        PROGRAMS=programs,
        **shapes,
        num_warps=16,
    )
    return labels


def _shape(device: torch.device) -> _Shape:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else min(_SHAPES)
    return next(shape for least, shape in _SHAPES.items() if capability >= least)


def _multiprocessors(device: torch.device) -> int:
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )

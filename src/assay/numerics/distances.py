"""The nearest centre of every token, exactly, at the rate of the fastest product there is; and all distances, in float64.

The score of a centre c for a token x is x.c - |c|^2 / 2 about a common origin: the nearest centre has the largest. A product in
low precision gives every score with a bound on its error, so only centres within twice the bound of the best can be nearest:
a token with one such candidate is settled, one with a few is settled by its float64 distances to them, and one with many is asked again in
the next higher precision. Only tiles of the (n, K) scores are ever held.
"""

import logging
import math
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_DISTANCE_BYTES = 64 * 2**20
# Scores held at a time: they stay in the processor's cache, or are few launches on a GPU.
_TILE_BYTES = {"cpu": 8 * 2**20, "cuda": 512 * 2**20}
# Centres are looked at in so many groups first, by the best score of each: only groups with a candidate are looked into.
_GROUP = 64
_MOST_GROUPS = 16


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, float32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and _cpu_multiplies_bfloat16() else torch.float32


@cache
def _cpu_multiplies_bfloat16() -> bool:
    # oneDNN takes bfloat16 wherever there is AVX-512, and multiplies it faster only with instructions of its own: ask the clock.
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    from time import perf_counter

    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(512, 512, dtype=dtype)
        x @ x
        began = perf_counter()
        for _ in range(4):
            x @ x
        times[dtype] = perf_counter() - began
    return times[torch.bfloat16] < 0.7 * times[torch.float32]


TwoBest = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@cache
def fused_kernel(device: torch.device) -> TwoBest | None:
    """The kernel of `fused.py` where there is CUDA, Triton, and the kernel agrees with torch on a product of random numbers.

    Not yet run on a GPU, hence the trial; elsewhere, and where it fails, torch writes the scores down.
    """
    if device.type != "cuda":
        return None
    try:
        from assay.numerics.fused import two_best

        generator = torch.Generator().manual_seed(0)
        x, c = (torch.randn(rows, 100, generator=generator).bfloat16().to(device) for rows in (300, 200))
        best, second, where = two_best(x, c)
        wanted, places = (x.float() @ c.float().T).topk(2, dim=1)
        torch.testing.assert_close(torch.stack([best, second], dim=1), wanted, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(where, places[:, 0])
    except Exception as error:  # whatever goes wrong in a compiler that is not ours
        logger.warning("the fused kernel is not used: %s", error)
        return None
    return two_best


class NearestCenters:
    """Centres made ready to find the nearest of them for many tokens.

    centers: float32 (K, d). dtypes: of the products that are tried, in this order, before float64 settles what is left; by
    default the fastest of the device, then float32. They change the time, never the answer.
    """

    def __init__(self, centers: Tensor, dtypes: tuple[torch.dtype, ...] | None = None) -> None:
        self._centers = centers
        # Where the user lets float32 products be less than that, their bound does not hold.
        exact = (torch.float32,) if torch.get_float32_matmul_precision() == "highest" else ()
        wanted = (fast_dtype(centers.device), *exact) if dtypes is None else dtypes
        # A large common offset would cancel away the digits that matter. As float32, it is the same for tokens and centres.
        self._origin = centers.mean(0, dtype=torch.float64).float()
        self._shifted = centers - self._origin
        self._dtypes = tuple(dict.fromkeys(wanted))
        self._products: dict[torch.dtype, _Product] = {}

    def find(self, x: Tensor) -> Tensor:
        """Index of the nearest centre to each row of x (n, d), float32: int64 (n,); ties: the lower index.

        It is that of float64 distances by differences but where the two best differ by float64's rounding.
        """
        labels = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
        left = torch.arange(len(x), device=x.device)
        for dtype in self._dtypes:
            if dtype not in self._products:
                self._products[dtype] = _Product(self._shifted, dtype)
            for rows in torch.split(left, max(1, _TILE_BYTES[x.device.type] // (2 * len(self._centers)))):
                self._settle(x, rows, labels, self._products[dtype])
            left = left[labels[left] < 0]
            if not len(left):
                return labels
        labels[left] = nearest_in_float64(x[left], self._centers)
        return labels

    def _settle(self, x: Tensor, rows: Tensor, labels: Tensor, product: "_Product") -> None:
        """Label those of `rows` of which the product leaves few candidates."""
        whole = len(rows) > 0 and int(rows[-1] - rows[0]) == len(rows) - 1  # a view then, and no copy
        tokens = x[rows[0] : rows[0] + len(rows)] if whole else x[rows]
        found, candidates = product.candidates(tokens - self._origin)
        settled, nearest = _nearest_of_candidates(tokens, found, self._centers, candidates)
        labels[rows[settled]] = nearest


class _Product:
    """Scores of shifted centres c (K, d), float32, by a product in `dtype`: how large they may be, and where they may be the largest.

    Rounding x to x' and c to c' changes x.c by at most |x - x'| |c| + |x'| |c - c'| (Cauchy-Schwarz). These norms ride along as two
    more dimensions of the product, after two for the halved norm of c: what comes out is the most that a score may be.
    """

    def __init__(self, centers: Tensor, dtype: torch.dtype) -> None:
        n_clusters, self._d = centers.shape
        self._n_groups = -(-n_clusters // _GROUP)
        self._dtype = dtype
        self._unit = float(torch.finfo(dtype).eps) / 2  # the relative error of one rounding
        halves = -0.5 * centers.double().square_().sum(1)
        high = halves.to(dtype)
        low = (halves - high.double()).to(dtype)
        # What fills the last group up is never near.
        matrix = torch.zeros(self._n_groups * _GROUP, self._d + 4, dtype=dtype, device=centers.device)
        matrix[:, self._d] = -torch.finfo(dtype).max
        matrix[:n_clusters, : self._d] = centers
        kept = matrix[:n_clusters, : self._d].float()
        norms, lost = centers.norm(dim=1), (centers - kept).norm(dim=1)
        matrix[:n_clusters, self._d :] = torch.stack([high, low, self._round_up(norms), self._round_up(lost)], dim=1)
        self._rows, self._matrix = matrix, matrix.T
        self._norms = torch.stack([norms, lost], dim=1)
        self._largest = float(norms.max())
        self._lost_halves = float((halves - high.double() - low.double()).abs().max())

    def _round_up(self, values: Tensor) -> Tensor:
        return (values * (1 + 4 * self._unit)).to(self._dtype)

    def candidates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs (row, centre), int64, by row and then centre, of all that may be nearest to rows of x (n, d), shifted.

        Rows with candidates in too many groups have none. Overflow makes a bound infinite or a score NaN: such a row has none, too.
        """
        n = len(x)
        tokens = torch.ones(n, self._d + 4, dtype=self._dtype, device=x.device)
        tokens[:, : self._d] = x
        kept = tokens[:, : self._d].float()
        norms = kept.norm(dim=1)
        lost = (x - kept).norm(dim=1) + 2.0**-23 * norms  # of the conversion; of the shift
        tokens[:, self._d + 2] = self._round_up(lost)
        tokens[:, self._d + 3] = self._round_up(norms)
        two_best = fused_kernel(x.device) if self._dtype == torch.bfloat16 else None
        if two_best is None:
            return self._among_all(tokens, norms, lost)
        # The kernel settles the rows in which no second centre is near; only the others' scores are ever written down.
        best, second, seeming = two_best(tokens, self._rows)
        least = self._least(best, seeming, norms, lost)
        single = (second < least) & least.isfinite() & (seeming < len(self._norms))
        several = (~single).nonzero()[:, 0]
        rows, centers = self._among_all(tokens[several], norms[several], lost[several])
        rows, centers = torch.cat([single.nonzero()[:, 0], several[rows]]), torch.cat([seeming[single], centers])
        order = rows.argsort(stable=True)
        return rows[order], centers[order]

    def _among_all(self, tokens: Tensor, norms: Tensor, lost: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates by all scores of the tokens, as the product takes them."""
        n = len(tokens)
        most = (tokens @ self._matrix).view(n, _GROUP, self._n_groups)  # centre j * n_groups + g is the j-th of group g
        most_of_group = most.amax(1)
        best, group = most_of_group.max(1)
        seeming = most.gather(2, group[:, None, None].expand(n, _GROUP, 1)).argmax(1)[:, 0] * self._n_groups + group
        least = self._least(best.float(), seeming, norms, lost)
        promising = most_of_group >= least[:, None]
        promising &= (promising.sum(1) <= _MOST_GROUPS)[:, None] & least.isfinite()[:, None]
        rows, groups = promising.nonzero(as_tuple=True)
        pairs, members = (most[rows, :, groups] >= least[rows, None]).nonzero(as_tuple=True)
        rows, centers = rows[pairs], members * self._n_groups + groups[pairs]
        order = (rows * (_GROUP * self._n_groups) + centers).argsort()
        return rows[order], centers[order]

    def _least(self, best: Tensor, seeming: Tensor, norms: Tensor, lost: Tensor) -> Tensor:
        """What a score must seem at least to be the largest in truth, float32 (n,), by the best and the centre whose it is."""
        # What fills up can only seem the best where all is lost.
        norm_of_best, lost_of_best = self._norms[seeming.clamp(max=len(self._norms) - 1)].unbind(1)
        # The best may be less than it seems, by twice the bound that was added.
        return best - self._slack(best, norms, lost * norm_of_best + norms * lost_of_best)

    def _slack(self, best: Tensor, norms: Tensor, error: Tensor) -> Tensor:
        """How far below the best seeming score one may be that is larger in truth, float32 (n,)."""
        # Of sums in float32, and of the centres' shift, which is less; of the halves; and of underflow.
        sums = (self._d + 6) * 2.0**-23 * (norms * self._largest + 0.5 * self._largest**2) + (self._d + 6) * 2.0**-120
        # A score is rounded to `dtype`, and so is one as far below the best as this.
        rounding = self._unit * (best.abs() + 3 * error)
        slack: Tensor = 2.02 * (error * (1 + 8 * self._unit) + rounding + sums + self._lost_halves)
        return slack


def _nearest_of_candidates(x: Tensor, rows: Tensor, centers: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that have candidates, each once, and the nearest of these, by distances in float64; ties: the lower index."""
    found, counts = torch.unique_consecutive(rows, return_counts=True)
    nearest = torch.zeros_like(found)
    ends = counts.cumsum(0)
    single = counts == 1
    nearest[single] = candidates[ends[single] - 1]
    several = ~single
    if bool(several.any()):
        contested = several.repeat_interleave(counts)
        pairs, group = (
            candidates[contested],
            torch.arange(len(found), device=x.device).repeat_interleave(counts)[contested],
        )
        squared = paired_distances(x, rows[contested], centers, pairs)
        least = squared.new_full((len(found),), math.inf).scatter_reduce_(0, group, squared, "amin")
        lowest = torch.where(squared == least[group], pairs, len(centers))
        nearest = torch.full_like(found, len(centers)).scatter_reduce_(0, group, lowest, "amin").where(several, nearest)
    return found, nearest


def paired_distances(x: Tensor, rows: Tensor, centers: Tensor, pairs: Tensor) -> Tensor:
    """|x[rows] - centers[pairs]|^2 by differences, float64 (pairs,): as exact as can be, however near they are."""
    chunk = max(1, _DISTANCE_BYTES // (16 * x.shape[1]))
    return torch.cat(
        [
            (x[row].double() - centers[pair].double()).square_().sum(1)
            for row, pair in zip(torch.split(rows, chunk), torch.split(pairs, chunk), strict=True)
        ]
    )


def chunked_distances(x: Tensor, centers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Squared distances of x (n, d) to centers (K, d), rows in order, at most about 64 MiB of them at once.

    Yields float64 (rows, K), at least 0, and (rows, 1), how much rounding may tell equal distances among the nearest
    apart. Both sides are centred on the mean of the centres before |x|^2 - 2 x.c + |c|^2, or a large common offset
    would cancel away the digits that matter.
    """
    centers = centers.double()
    origin = centers.mean(0)
    centers = centers - origin
    center_norms = centers.square().sum(1)
    n_clusters, d = centers.shape
    rounding = 8 * math.sqrt(d) * torch.finfo(torch.float64).eps
    for chunk in torch.split(x, max(1, _DISTANCE_BYTES // (8 * max(n_clusters, d)))):
        rows = chunk.double() - origin
        row_norms = rows.square().sum(1, keepdim=True)
        distances = torch.addmm(center_norms, rows, centers.T, alpha=-2).add_(row_norms).clamp_(min=0)
        # A nearest centre is no longer than the token and its distance together, so these bound all the terms.
        yield distances, rounding * (row_norms + distances.amin(1, keepdim=True))


def nearest_in_float64(x: Tensor, centers: Tensor) -> Tensor:
    """Index of the nearest of centers (K, d) to each row of x (n, d): int64 (n,); ties to rounding: the lower index."""
    labels = [
        (distances <= distances.amin(1, keepdim=True) + tie).to(torch.uint8).argmax(1)
        for distances, tie in chunked_distances(x, centers)
    ]
    return torch.cat(labels)

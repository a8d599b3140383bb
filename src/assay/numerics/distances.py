"""The nearest centre of every token, exactly, at the rate of the fastest product there is; and all distances, in float64.

The score of a centre c for a token x is x.c - |c|^2 / 2 about a common origin: the nearest centre has the largest. A product in
low precision gives every score with a bound on its error, so only centres within twice the bound of the best can be nearest:
a token with one such candidate is settled, one with a few is settled by its float64 distances to them, and one with many is asked again in
the next higher precision. Only tiles of the (n, K) scores are ever held.
"""

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property

import torch
from torch import Tensor

from assay.numerics.isolation import isolated
from assay.numerics.kernels import FUSED_TILE, Kernels, fused_kernels

_DISTANCE_BYTES = 64 * 2**20
# Scores held at a time: they stay in the processor's cache, or are few launches on a GPU.
_TILE_BYTES = {"cpu": 8 * 2**20, "cuda": 512 * 2**20}
# Centres are looked at in so many groups first, by the best score of each: only groups with a candidate are looked into.
_GROUP = 64
_MOST_GROUPS = 16
# Centres whose median is the origin: at least so many, where there are as many.
_AMID = 64
# In float64, pairs of a row and a centre that are looked at together; and the share of them above which all are taken by differences:
# a pair picked out costs some thirty times as much.
_PAIRS = 2**20
_MANY = 1 / 32


def fast_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """What the hardware multiplies faster than float32, in the order in which it is worth a try.

    Tensor cores take float16 and bfloat16 at one rate, and float16 leaves fewer candidates; where it overflows, bfloat16 does not.
    """
    if device.type == "cuda":
        return (torch.float16, torch.bfloat16) if torch.cuda.get_device_capability(device) >= (8, 0) else ()
    return (torch.bfloat16,) if device.type == "cpu" and _cpu_multiplies_bfloat16() else ()


@cache
def _cpu_multiplies_bfloat16() -> bool:
    # oneDNN takes bfloat16 wherever there is AVX-512, and multiplies it faster only with instructions of its own: ask the clock.
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
    except AttributeError:  # torch without oneDNN
        return False
    from time import perf_counter

    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(512, 512, dtype=dtype, device="cpu")
        x @ x
        began = perf_counter()
        for _ in range(4):
            x @ x
        times[dtype] = perf_counter() - began
    return times[torch.bfloat16] < 0.7 * times[torch.float32]


def float32_is_exact() -> bool:
    """Whether torch multiplies float32 as float32: the user may have let it round to TF32 or bfloat16 first, where no bound holds."""
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # one of torch's newer settings, by backend, is not the default
        return False
    # oneDNN's own, which torch does not see.
    mode = os.environ.get("ONEDNN_DEFAULT_FPMATH_MODE", os.environ.get("DNNL_DEFAULT_FPMATH_MODE", "strict"))
    return exact and mode.lower() == "strict"


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of float32 matrices (n, d) and (d, m), to float32's rounding whatever the process lets torch round: float32 (n, m)."""
    return a @ b if float32_is_exact() else (a.double() @ b.double()).float()


# Whether cuBLAS may round partial sums, by the dtype of a product; and whether it may keep them in float16 all along.
_ROUNDING = (
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)
_rounding_lock = threading.Lock()
_within = 0
_before: dict[str, bool | tuple[bool, bool]] = {}


@contextmanager
def sums_in_float32() -> Iterator[None]:
    """Within the block cuBLAS keeps the partial sums of bfloat16 and float16 products in float32, which torch by default lets it round.

    The settings are the process's: the last thread to leave the block puts them back.
    """
    global _within
    settings = torch.backends.cuda.matmul
    with _rounding_lock:
        if _within == 0:
            for name in _ROUNDING:
                split = getattr(settings, f"{name}_split_k", None)  # set together in newer versions of torch
                _before[name] = getattr(settings, name) if split is None else (getattr(settings, name), split)
                setattr(settings, name, False if split is None else (False, split))
        _within += 1
    try:
        yield
    finally:
        with _rounding_lock:
            _within -= 1
            if _within == 0:
                for name, before in _before.items():
                    setattr(settings, name, before)


class NearestCenters:
    """Centres made ready to find the nearest of them for many tokens.

    centers: float32 (K, d), which must not change while this is in use. dtypes: of the products that are tried, in this order, before
    float64 settles what is left; by default the fastest of the device, then float32. They change the time, never the answer.
    """

    @isolated()
    def __init__(self, centers: Tensor, dtypes: tuple[torch.dtype, ...] | None = None) -> None:
        self._centers = centers
        wanted = (*fast_dtypes(centers.device), torch.float32) if dtypes is None else dtypes
        # A large common offset would cancel away the digits that matter.
        self._origin = _origin(centers)
        self._dtypes = tuple(dict.fromkeys(wanted))
        self._products: dict[torch.dtype, _Product] = {}

    @isolated()
    def find(self, x: Tensor) -> Tensor:
        """Index of the nearest centre to each row of x (n, d), float32: int64 (n,); ties: the lower index.

        It is that of float64 distances by differences but where the two best differ by float64's rounding.
        """
        return self._find_left(x, torch.empty(0, dtype=torch.int64, device=x.device), None, self._dtypes)

    @isolated()
    def guess(self, x: Tensor) -> Tensor:
        """As `find`, but on a GPU with kernels of our own the first product's answers alone, and -1 where it leaves a row in question.

        The host does not wait for them. `settle` gives those that are missing.
        """
        product = self._product(self._dtypes[0]) if self._dtypes else None
        if product is None or product.kernels is None:
            return self.find(x)
        labels = product.kernels.nearest(x, self._centers, self._origin, product)
        return torch.where(product.holds, labels, -1)

    @isolated()
    def settle(self, x: Tensor, labels: Tensor) -> Tensor:
        """What `find` gives, from what `guess` gave for the same x."""
        left = (labels < 0).nonzero()[:, 0]
        return self._find_left(x, labels, left, self._dtypes[1:]) if len(left) else labels

    def _find_left(self, x: Tensor, labels: Tensor, left: Tensor | None, dtypes: tuple[torch.dtype, ...]) -> Tensor:
        """`labels` with those of the rows that are `left`, or of all, by products of these dtypes and then in float64."""
        exact = float32_is_exact()
        for dtype in dtypes:
            if (dtype == torch.float32 and not exact) or not self._product(dtype).holds_the_centers:
                continue
            found = self._settle(x, left, self._product(dtype))
            labels = found if left is None else labels.index_copy_(0, left, found)
            left = (labels < 0).nonzero()[:, 0]
            if not len(left):
                return labels
        if left is None:
            return nearest_in_float64(x, self._centers)
        return labels.index_copy_(0, left, nearest_in_float64(x[left], self._centers))

    def _product(self, dtype: torch.dtype) -> "_Product":
        if dtype not in self._products:
            self._products[dtype] = _Product(self._centers, self._origin, dtype, fused_kernels(self._centers.device))
        return self._products[dtype]

    def _settle(self, x: Tensor, left: Tensor | None, product: "_Product") -> Tensor:
        """Labels of the rows `left` of x, all by default, and -1 where the product leaves too many candidates: int64 (rows,)."""
        if product.kernels is not None:
            return product.kernels.nearest(x if left is None else x[left], self._centers, self._origin, product)
        n = max(1, _TILE_BYTES[x.device.type] // (2 * len(self._centers)))
        parts = torch.split(x, n) if left is None else (x[rows] for rows in torch.split(left, n))
        return torch.cat([self._settle_part(part, product) for part in parts])

    def _settle_part(self, x: Tensor, product: "_Product") -> Tensor:
        rows, groups, near = product.shortlist(x - self._origin)
        counts = rows.new_zeros(len(x)).index_add_(0, rows, near.sum(1))
        alone = counts[rows] == 1
        centers = torch.where(alone, product.members(near.to(torch.uint8).argmax(1), groups), -1)
        labels = torch.full_like(counts, -1).scatter_reduce_(0, rows, centers, "amax")
        pairs, places = (near & ~alone[:, None]).nonzero(as_tuple=True)
        if not len(pairs):
            return labels
        return _settle_by_differences(labels, x, rows[pairs], self._centers, product.members(places, groups[pairs]))


def _origin(centers: Tensor) -> Tensor:
    """A point amid centers (K, d), float32 (d,): of each dimension the median of a hundred of them, or all.

    Any would do; bounds are tight about one that is near most tokens. A few centres far away do not draw it off.
    """
    some = centers[:: max(1, len(centers) // _AMID)]
    return some.sort(dim=0).values[len(some) // 2]  # `median` is not deterministic on a GPU


class _Product:
    """Scores of shifted centres c (K, d), float32, by a product in `dtype`: how large they may be, and where they may be the largest.

    What comes out is no score but the most that it may be: bounds ride along as more dimensions of the product, a centre's own each, so
    that a far centre widens no other's. With x' and c' as rounded to `dtype`, the score is off by

    - |x - x'| |c| + |x'| |c - c'| at most, by rounding (Cauchy-Schwarz);
    - g (|x'| |c| + |c|^2 / 2) at most, by summing d + 4 terms in float32, in any order, whether sums are rounded or cut off: m terms want
      m 2^-23 times the sum of their magnitudes, and g = (d + 8) 2^-23 leaves enough for x and c, which the shift has rounded.

    So |x - x'| + g |x'| meets |c|, |x'| meets |c - c'|, and g |c|^2 / 2 and whatever rounding takes off are added to the halved norm. All
    are raised by `margin`, for the rounding of the bounds themselves and of norms in float32. Where b seems the best, with p(b), twice
    what b may be too large is `_slack`: p(c) >= s(c) >= s(b) >= p(b) - slack for the c that is nearest.
    """

    @isolated()
    def __init__(self, centers: Tensor, origin: Tensor, dtype: torch.dtype, kernels: Kernels | None) -> None:
        n_clusters, self._d = centers.shape
        rows = FUSED_TILE if centers.is_cuda else _GROUP
        self._n_groups = -(-n_clusters // rows) * rows // _GROUP
        self._dtype = dtype
        limits = torch.finfo(dtype)
        self.unit = limits.eps / 2  # the relative error of one rounding
        self.least_step = limits.tiny * limits.eps  # twice its absolute error where it underflows
        self.sums = (self._d + 8) * 2.0**-23
        self.margin = 1 + 2.0**-6 + 2 * self.sums
        # A square below the least float32 is lost: a norm may be so much larger.
        self.underflow = math.sqrt(self._d) * 2.0**-62
        # A score that would overflow may seem larger than it is: then it is asked again, and no other centre's is lost.
        self.most_halved = min(1e38, 0.9 * limits.max)
        self.kernels = kernels if dtype != torch.float32 else None
        self.matrix = self._allocate(self._n_groups * _GROUP, centers.device)
        if self.kernels is not None:
            self.bounds, self.holds = self.kernels.round_centers(centers, origin, self)
        else:
            self.bounds, self.holds = self._round_centers(centers - origin)

    def _round_centers(self, centers: Tensor) -> tuple[Tensor, Tensor]:
        """Write shifted centers (K, d) into the matrix, with their bounds; gives `bounds` (K, 3), and whether it holds them all, ()."""
        self.matrix.zero_()
        own, rest = self.matrix[: len(centers)], self.matrix[len(centers) :]
        norms = centers.norm(dim=1, dtype=torch.float64)
        halves = -0.5 * norms.square()
        most = (halves * (1 - self.margin * self.sums)).clamp(min=-self.most_halved)
        high = most.to(self._dtype)
        low = most - high.double()
        low = (low + 2 * self.unit * low.abs() + self.least_step).to(self._dtype)  # rounded up
        own[:, : self._d] = centers
        kept = own[:, : self._d].float()
        lost = (centers - kept).norm(dim=1, dtype=torch.float64) + math.sqrt(self._d) * 2.0**-126  # and of underflow
        own[:, self._d : self._d + 4] = torch.stack([high, low, self._round_up(norms), self._round_up(lost)], dim=1)
        # What fills the last group up is never near: below -|x| |c| and the halved norm of all that fits.
        rest[:, self._d : self._d + 4] = -torch.finfo(self._dtype).max
        bounds = torch.stack([norms, lost, high.double() + low.double() - halves], dim=1).float()
        return bounds, own.isfinite().all()

    @cached_property
    def holds_the_centers(self) -> bool:
        """Whether every centre, rounded, is finite. On a GPU the host is waited for when it is first asked."""
        return bool(self.holds)

    def _allocate(self, rows: int, device: torch.device) -> Tensor:
        """(rows, at least d + 4); every row is a multiple of 128 bytes, as tensor cores load it fastest."""
        return torch.empty(rows, -(-(self._d + 4) // 64) * 64, dtype=self._dtype, device=device)

    def _round_up(self, values: Tensor) -> Tensor:
        return (values * (1 + 4 * self.unit) + self.least_step).to(self._dtype)

    @isolated()
    def shortlist(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where the centres lie that may be nearest to rows of x (n, d), shifted: pairs (row, group), int64, by row, and bool (pairs, 64).

        The latter says which of the group's `members` may be. Rows with candidates in too many groups have none. Overflow makes a bound
        infinite or a score NaN: such a row has none, too.
        """
        tokens = self._allocate(len(x), x.device).fill_(1)
        tokens[:, : self._d] = x
        kept = tokens[:, : self._d].float()
        norms = self.margin * kept.norm(dim=1)
        lost = self.margin * (x - kept).norm(dim=1) + self.sums * norms + self.underflow
        norms = norms + self.underflow
        tokens[:, self._d + 2] = self._round_up(lost)
        tokens[:, self._d + 3] = self._round_up(norms)
        n, used = len(x), -(-(self._d + 4) // 8) * 8
        with sums_in_float32():
            scores = tokens[:, :used] @ self.matrix[:, :used].T
        most = scores.view(n, _GROUP, self._n_groups)
        most_of_group = most.amax(1)
        best, group = most_of_group.max(1)
        seeming = self.members(most.gather(2, group[:, None, None].expand(n, _GROUP, 1)).argmax(1)[:, 0], group)
        least = self._least(best.float(), seeming, norms, lost, self._dtype)
        promising = most_of_group >= least[:, None]
        promising &= (promising.sum(1) <= _MOST_GROUPS)[:, None] & least.isfinite()[:, None]
        rows, groups = promising.nonzero(as_tuple=True)
        return rows, groups, most[rows, :, groups] >= least[rows, None]

    def members(self, places: Tensor, groups: Tensor) -> Tensor:
        """The centres at these places of these groups: neighbours are in groups of their own, so that those of a group are far apart."""
        return places * self._n_groups + groups

    def _least(self, best: Tensor, seeming: Tensor, norms: Tensor, lost: Tensor, scores: torch.dtype) -> Tensor:
        """What a score must seem at least to be the largest in truth, float32 (n,), by the best and the centre whose it is.

        `scores`: the dtype that scores are written down in.
        """
        # What fills up can only seem the best where all is lost.
        norm_of_best, lost_of_best, raised = self.bounds[seeming.clamp(max=len(self.bounds) - 1)].unbind(1)
        return best - self._slack(best, lost * norm_of_best + norms * lost_of_best + raised, torch.finfo(scores))

    def _slack(self, best: Tensor, error: Tensor, scores: torch.finfo) -> Tensor:
        """How far below the best seeming score one may seem that is larger in truth, float32 (n,). `error`: what was added to the best."""
        # A score is rounded as it is written down, and so is one as far below the best as this. What underflows is lost without a
        # relative bound.
        rounding = scores.eps / 2 * (best.abs() + 3 * error) + scores.tiny * scores.eps
        slack: Tensor = 2.02 * (error * (1 + 8 * self.unit) + rounding + (self._d + 8) * 2.0**-120)
        return slack


def _settle_by_differences(labels: Tensor, x: Tensor, rows: Tensor, centers: Tensor, candidates: Tensor) -> Tensor:
    """`labels` (n,) with those of `rows` (pairs,) as the nearest of their `candidates` (pairs,), in float64; ties: the lower index."""
    squared = paired_distances(x, rows, centers, candidates)
    least = squared.new_full((len(x),), math.inf).scatter_reduce_(0, rows, squared, "amin")
    lowest = torch.where(squared == least[rows], candidates, len(centers))
    nearest = torch.full_like(labels, len(centers)).scatter_reduce_(0, rows, lowest, "amin")
    return torch.where(nearest < len(centers), nearest, labels)


@isolated()
def paired_distances(x: Tensor, rows: Tensor, centers: Tensor, pairs: Tensor) -> Tensor:
    """|x[rows] - centers[pairs]|^2 by differences, float64 (pairs,): as exact as can be, however near they are."""
    chunk = max(1, _DISTANCE_BYTES // (16 * x.shape[1]))
    return torch.cat(
        [
            (x[row].double() - centers[pair].double()).square_().sum(1)
            for row, pair in zip(torch.split(rows, chunk), torch.split(pairs, chunk), strict=True)
        ]
    )


def _by_product(x: Tensor, centers: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
    """Squared distances of x (n, d) to centers (K, d) by |x|^2 - 2 x.c + |c|^2, rows in order, at most about 64 MiB at once.

    Yields rows of x, their distances, float64 (rows, K), at least 0, the lengths |x| (rows,) and |c| (K,) about a common origin, without
    which a large offset would cancel away the digits that matter, and g: no distance is off by more than g (|x| + |c|)^2.

    A sum of m terms is off by at most m eps / 2 times the sum of their magnitudes, in any order: 2 |x| |c| + |x|^2 + |c|^2 here. Its d
    products and three sums, and what the shift to the origin rounds, want (d + 8) eps / 2; g is twice that, for |x| and |c| as computed.
    """
    origin = _origin(centers).double()
    centers = centers.double() - origin
    center_norms = centers.square().sum(1)
    center_lengths = center_norms.sqrt()
    n_clusters, d = centers.shape
    g = (d + 8) * torch.finfo(torch.float64).eps
    for chunk in torch.split(x, max(1, _DISTANCE_BYTES // (8 * max(n_clusters, d)))):
        rows = chunk.double() - origin
        norms = rows.square().sum(1)
        distances = torch.addmm(center_norms, rows, centers.T, alpha=-2).add_(norms[:, None]).clamp_(min=0)
        yield chunk, distances, norms.sqrt(), center_lengths, g


def _by_differences(x: Tensor, centers: Tensor) -> Tensor:
    """All |x - c|^2 by differences, float64 (n, K): no more than (d + 4) eps off, relative. Some five times as long as by a product."""
    return torch.cdist(x.double(), centers.double(), compute_mode="donot_use_mm_for_euclid_dist").square_()


def _parts(rows: Tensor, n_clusters: int) -> Sequence[Tensor]:
    """Numbers of rows, so many together that all pairs of a row and a centre are no burden; of no rows there is no part."""
    return torch.split(rows, max(1, _PAIRS // n_clusters)) if len(rows) else ()


def chunked_distances(x: Tensor, centers: Tensor) -> Iterator[Tensor]:
    """Squared distances of x (n, d) to centers (K, d), rows in order, at most about 64 MiB of them at once: float64 (rows, K).

    Each is right to 2^-24, relative, so that its root is a right float32: what a product cannot give so exactly, the distances that
    are small beside the lengths, are taken by differences.
    """
    for rows, distances, lengths, center_lengths, g in _by_product(x, centers):
        trusted = g * 2.0**24
        # By the longest centre first, which is a look at each row's least distance only: as a rule there is nothing to do.
        doubtful = (distances.amin(1) < trusted * (lengths + center_lengths.max()).square()).nonzero()[:, 0]
        for part in _parts(doubtful, len(centers)):
            near = distances[part] < trusted * (lengths[part][:, None] + center_lengths).square_()
            crowded = (near.sum(1) > _MANY * len(centers)).nonzero()[:, 0]
            if len(crowded):
                distances[part[crowded]] = _by_differences(rows[part[crowded]], centers)
                near[crowded] = False
            found, pairs = near.nonzero(as_tuple=True)
            distances[part[found], pairs] = paired_distances(rows, part[found], centers, pairs)
        yield distances


@isolated()
def nearest_in_float64(x: Tensor, centers: Tensor) -> Tensor:
    """Index of the nearest of centers (K, d) to each row of x (n, d), by differences in float64: int64 (n,); ties: the lower index.

    A product says which centres may be the nearest. Where b is its nearest, at D off by e(b) = g (|x| + |b|)^2, the true one, c, is no
    farther than D + e(b), hence no longer than |x| and the root of that, and seems at most D + e(b) + e(c).
    """
    labels = [torch.empty(0, dtype=torch.int64, device=x.device)]
    for rows, distances, lengths, center_lengths, g in _by_product(x, centers):
        least, seeming = distances.min(1)
        least += g * (lengths + center_lengths[seeming]).square()
        least += g * (2 * lengths + least.sqrt()).square()
        nearest = torch.zeros_like(seeming)  # NaN has no candidates
        for part in _parts(torch.arange(len(rows), device=x.device), len(centers)):
            near = distances[part] <= least[part, None]
            if int(near.sum()) > _MANY * near.numel():
                squared = _by_differences(rows[part], centers)
                near &= squared <= squared.amin(1, keepdim=True) * (1 + 4 * g)
            found, candidates = near.nonzero(as_tuple=True)
            nearest = _settle_by_differences(nearest, rows, part[found], centers, candidates)
        labels.append(nearest)
    return torch.cat(labels)

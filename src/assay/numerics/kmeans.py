"""Mini-batch k-means over a stream of activations.

Sculley (2010), "Web-scale k-means clustering", with the batch form of its 1/n step, the low-count reassignment and the
smoothed-inertia stopping of scikit-learn's MiniBatchKMeans, and the greedy k-means++ seeding of Arthur and
Vassilvitskii (2007), "k-means++: the advantages of careful seeding".
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from assay.numerics.distances import NearestCenters, chunked_distances, float32_is_exact, paired_distances
from assay.numerics.errors import ErrorSums, error_sums
from assay.numerics.isolation import isolated, snapshot
from assay.numerics.kernels import fused_kernels
from assay.numerics.moments import batch_moments, check_batch, check_later
from assay.numerics.ranking import count_classes

logger = logging.getLogger(__name__)

METRICS = ("inertia", "ewa_inertia", "learning_rate", "dead_clusters")
"""Of a step, in `history_`."""

# A batch's residuals are taken so many rows at a time, which stay in the cache.
_ROWS = 1024
# Squared distances below this share of the squared norms have lost most of their digits to cancellation in float32.
_CLOSE = 1e-4
# Squared norms between which float32 holds squared distances, and, up to as many times less as there are tokens, their sum.
_LEAST_SQUARE, _MOST_SQUARE = 2.0**-100, 2.0**125
# Centres are float32.
_LARGEST = torch.finfo(torch.float32).max
# Centres this share of the tokens' distance apart lie in one place; so many that follow each other along a line are compared.
_SAME = 2.0**-10
_LOOKED_AT = 16


@dataclass
class Seeding:
    """Where seedings stand that are not done: `tried`, and the `least` inertia among them.

    Of the one under way: the numbers of the tokens `chosen` so far, and the squared distance of every token to the `closest` of
    them, float32 (n,), or float64 where float32 does not hold it.
    """

    tried: int = 0
    least: float = math.inf
    chosen: list[int] = field(default_factory=list)
    closest: Tensor | None = None


@isolated()
def kmeans_plus_plus(
    x: Tensor,
    n_clusters: int,
    generator: torch.Generator,
    seeding: Seeding | None = None,
    on_centre: Callable[[], None] | None = None,
) -> Tensor:
    """Seed centres among the tokens x (n, d) by greedy k-means++: float32 (n_clusters, d).

    Each next centre is the best of 2 + floor(ln n_clusters) tokens drawn with probability proportional to the squared
    distance to the nearest centre so far. Draws are made on the CPU, so that one seed gives the
    same draws anywhere, and on one device the same centres; on another, distances that are rounded otherwise lead to other tokens.
    `on_centre` is called after each centre; with `seeding` as it then was, and the generator, the rest can be made later, to the bit.
    ValueError where x has fewer distinct tokens than clusters, holds NaN, infinity or what float32 does not hold, or is not what
    `seeding` was begun on.
    """
    check_batch(x, largest=_LARGEST)
    n = x.shape[0]
    if n < n_clusters:
        raise ValueError(
            f"found {n} tokens to seed from, wanted at least n_clusters = {n_clusters}: "
            "lower n_clusters, or give more tokens (a larger init_size or first batch)"
        )
    n_trials = 2 + int(math.log(n_clusters))
    seeding = seeding or Seeding()
    chosen, closest = seeding.chosen, seeding.closest
    tokens, norms = _centred(x, torch.float32)
    begun_in_float64 = closest is not None and closest.dtype == torch.float64
    if begun_in_float64 or not float32_is_exact() or not _LEAST_SQUARE < float(norms.max()) < _MOST_SQUARE / n:
        tokens, norms = _centred(x, torch.float64)
    if closest is None:
        chosen.append(int(torch.randint(n, (1,), generator=generator, device="cpu")))
        closest = seeding.closest = (x.double() - x[chosen[0]].double()).square().sum(1).to(tokens.dtype)
    elif len(closest) != n:
        raise ValueError(
            f"found {n} tokens, wanted the {len(closest)} that the seeding was begun on: give the same stream"
        )
    closest = closest.to(tokens.dtype)
    while len(chosen) < n_clusters:
        cumulative = closest.cpu().double().cumsum(0)
        if cumulative[-1] == 0 and tokens.dtype == torch.float32 and len(_distinct(x)) > len(chosen):
            # What is left differs by less than float32 has squares for.
            tokens, norms = _centred(x, torch.float64)
            closest = torch.cat([squared.amin(1) for squared in chunked_distances(x, x[chosen])])
            continue
        if cumulative[-1] == 0:
            raise ValueError(
                f"found {len(chosen)} distinct tokens among the {n} to seed from, wanted at least n_clusters = "
                f"{n_clusters}: lower n_clusters, or raise init_size"
            )
        draws = torch.rand(n_trials, generator=generator, dtype=torch.float64, device="cpu") * cumulative[-1]
        drawn = torch.searchsorted(cumulative, draws, right=True).clamp_(max=n - 1)
        trials = drawn.to(x.device)
        distances = torch.addmm(norms, tokens[trials], tokens.T, alpha=-2).add_(norms[trials, None]).clamp_(min=0)
        best = int(torch.minimum(distances, closest).sum(1).argmin())
        chosen.append(int(drawn[best]))
        # A token equal to a centre must be at exactly 0, or it could be drawn again: by differences where it is close.
        close = distances[best] <= _CLOSE * (norms + norms[chosen[-1]])
        distances[best, close] = (x[close].double() - x[chosen[-1]].double()).square().sum(1).to(tokens.dtype)
        closest = seeding.closest = torch.minimum(closest, distances[best])
        if on_centre is not None:
            on_centre()
    return x[chosen].float()


def _centred(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tokens (n, d) about their mean, and their squared norms (n,), of `dtype`."""
    tokens = (x.double() - x.double().mean(0)).to(dtype)
    return tokens, tokens.square().sum(1)


def _distinct(x: Tensor) -> Tensor:
    """The rows of x (n, d), each once."""
    return x.unique(dim=0)  # type: ignore[no-untyped-call, no-any-return]


@isolated()
def pull_centers(x: Tensor, centers: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How tokens x (n, d) pull at their centres: sums of x - c by label (n,), (K, d), and |x - c|^2, (n,); float64.

    The same bits in every run.
    """
    if x.device.type != "cpu":
        # On a GPU index_add_ sums in an order that changes from run to run; segments of sorted rows do not.
        residual = x.double() - centers[labels]
        ordered, hits = residual[labels.argsort(stable=True)], count_classes(labels, len(centers))
        # Unsafe: without a look at the lengths, which would make the host wait.
        pulls = torch.segment_reduce(ordered, "sum", lengths=hits, axis=0, unsafe=True)
        return pulls, residual.square_().sum(1)
    pulls = torch.zeros(centers.shape, dtype=torch.float64, device=x.device)
    squared = torch.empty(len(x), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        residual = x[rows].to(torch.float64, copy=True)  # float64 tokens are the caller's
        residual -= centers[labels[rows]]
        pulls.index_add_(0, labels[rows], residual)
        squared[rows] = residual.square_().sum(1)
    return pulls, squared


@isolated()
def mini_batch_step(x: Tensor, centers: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step on x (n, d): new centers (K, d) and counts (K,), and the squared distances before it, float64 (n,).

    With b tokens in the batch nearest to a centre and n in all, it moves by b/n of the way to the mean of the b: as if
    it took the tokens one after another at a learning rate of one over its count (Sculley 2010).
    """
    return _step_of(x, centers, counts, NearestCenters(centers).find(x.float()))


def _step_of(x: Tensor, centers: Tensor, counts: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`mini_batch_step`, by the nearest centres (n,)."""
    hits = count_classes(labels, len(centers))
    counts = counts + hits
    kernels = fused_kernels(x.device)
    if kernels is not None and x.dtype == torch.float32 and len(x):
        moved, squared = kernels.move_centers(x, centers, labels, hits, counts)
        return moved, counts, squared
    pulls, squared = pull_centers(x, centers, labels)
    moved = pulls.div_(counts.clamp(min=1).double()[:, None]).add_(centers)
    return moved.float(), counts, squared


def low_count_clusters(counts: Tensor, reassignment_ratio: float) -> Tensor:
    """Which of counts (K,) are 0 or below reassignment_ratio times their mean: bool (K,).

    scikit-learn compares with the largest count, which moves small but honest clusters where one is large, as the
    background's is.
    """
    return (counts < reassignment_ratio * counts.double().mean()) | (counts == 0)


@isolated()
def collapsed_clusters(centers: Tensor, radius: float, generator: torch.Generator) -> Tensor:
    """Which of centers (K, d) lie in the place of one of lower index: bool (K,).

    That is closer by 2^-10 than tokens lie about centres, `radius` in the root mean square, and than either centre's length, from 0 and
    from the mean: so near are no two that share the tokens of one place, and where clusters differ much in size, no two small ones.
    What is so near is nearer still along a random direction, by the root of d. Along one each is held against the 16 that follow it,
    in place of all, where it is near along some others too; what more part is found another time. Equal centres are always found.
    """
    directions = torch.randn(centers.shape[1], 8, generator=generator, dtype=torch.float64, device="cpu")
    directions = directions.to(centers.device)
    along = centers.double() @ (directions / directions.norm(dim=0))
    order = along[:, 0].argsort(stable=True)
    along = along[order]
    lengths = centers.norm(dim=1, dtype=torch.float64)[order]
    spread = (centers - centers.mean(0)).norm(dim=1, dtype=torch.float64)[order]
    near = _SAME * torch.minimum(lengths, spread).clamp(max=radius)
    rounding = 4 * torch.finfo(torch.float64).eps * centers.shape[1] * lengths
    # All pairs at once: on a GPU the host waits for their number only.
    steps = torch.arange(1, min(_LOOKED_AT, len(centers) - 1) + 1, device=centers.device)[:, None]
    follower = torch.arange(len(centers), device=centers.device) + steps
    inside, follower = follower < len(centers), follower.clamp(max=len(centers) - 1)
    gaps = (along[follower] - along).abs_().amax(2)
    most = torch.minimum(near[follower], near)
    apart, places = (inside & (gaps <= most + rounding[follower])).nonzero(as_tuple=True)
    one, other = order[places], order[follower[apart, places]]
    same = paired_distances(centers, one, centers, other).sqrt() <= most[apart, places]
    found = torch.zeros(len(centers), dtype=torch.int64, device=centers.device)
    return found.scatter_add_(0, torch.maximum(one, other), same.long()) > 0


@isolated()
def reassign_centers(
    x: Tensor, squared: Tensor, centers: Tensor, counts: Tensor, low: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Put the clusters `low` (bool (K,)) on far tokens of x (n, d): new centers and counts.

    A token is drawn with probability proportional to `squared` (n,), its squared distance to its centre: far ones, but not the
    outliers alone (the D^2 sampling of k-means++, Arthur and Vassilvitskii 2007). At most half as many as there are tokens off their
    centres, the clusters of lowest count first (ties to the lower index), each to a token of its own; where all are low, the last
    stays. They take the lowest count among the others, so that they neither jump about nor are at once low again. Of two centres that
    have fallen together the one of higher index gets no more tokens, but its count may be high and stay so: `collapsed_clusters` finds it.
    """
    n_low, n_off = torch.stack([low.sum(), (squared > 0).sum()]).tolist()
    n_moved = min(n_low, n_off // 2, len(low) - 1)
    if n_moved == 0:
        return centers, counts
    moved = torch.where(low, counts, torch.iinfo(counts.dtype).max).argsort(stable=True)[:n_moved]
    # Largest of u^(1/w) (Efraimidis and Spirakis 2006), as logarithms: a weighted draw without replacement, of any size.
    uniform = torch.rand(len(squared), generator=generator, dtype=torch.float64, device="cpu")
    keys = uniform.log() / squared.cpu()
    tokens = keys.nan_to_num(-math.inf, -math.inf, -math.inf).topk(n_moved).indices.to(x.device)
    centers, new_counts = centers.clone(), counts.clone()
    centers[moved] = x[tokens].float()
    new_counts[moved] = counts.index_fill(0, moved, torch.iinfo(counts.dtype).max).min()
    return centers, new_counts


@isolated()
def _decayed(counts: Tensor, decay: float) -> Tensor:
    """counts (K,) times `decay`, rounded up: int64 (K,)."""
    return (counts.float() * decay).ceil().to(torch.int64)


# What a state holds of the parameters, as tensors of these dtypes.
_PARAMETERS = {
    **dict.fromkeys(("seed", "n_init", "init_size", "max_iter", "max_no_improvement"), torch.int64),
    **dict.fromkeys(("tol", "reassignment_ratio", "decay"), torch.float64),
}


class MiniBatchKMeans:
    """k-means by mini-batches, for data that is seen as a stream of batches (batch, d) of real numbers, within float32's range.

    Centres are float32, and so are tokens when the nearest is sought; what is summed is float64. NaN and infinity are a ValueError.

    n_clusters: centres. seed: of every random draw; one seed and one stream give one result.
    device: where the model lives, by default that of its first batch; inputs are moved there.
    n_init: seedings tried; the one with the least mean squared distance on held-out tokens is kept.
    init_size: tokens to seed from; None means 3 max(n_clusters, tokens of the first batch): more tokens hold more outliers, which
        make poor seeds.
    max_iter: passes over the data at most.
    tol: stop when a step moves the centres by a summed squared distance of at most tol times the mean variance of a
        dimension among the seeding tokens; 0 never stops so.
    max_no_improvement: stop after as many steps on end without a new least smoothed inertia; None never stops so.
    reassignment_ratio: clusters with a count below this share of the mean, and those in the place of another, are moved to far tokens
        (see `reassign_centers`), every 10 n_clusters tokens and after any step that leaves a count of 0; 0 never moves any.

    decay: what the counts are multiplied by before each further pass of `fit` (and rounded up). With 1 the learning rate is 1/n
        over all tokens ever seen, and early ones, which were nearest to other centres, hold centres back; below 1 centres are
        exponential moving averages over passes.

    Fitted: `cluster_centers_` float32 (n_clusters, d); `counts_` int64 (n_clusters,), the n of the learning rate 1/n;
    `is_seeded_`; `n_steps_`, and of them `steps_of_pass_` in the pass under way; `inertia_`, the last batch's mean squared distance
    before its step; and `history_`, a dict of floats a step: `inertia`, `ewa_inertia` (smoothed), `learning_rate` (mean over
    the clusters hit of the share of the way they went) and `dead_clusters` (count 0 or below reassignment_ratio times the
    mean, before they are moved).

    The smoothed inertia is scikit-learn's: an exponential average with weight 2 batch / (tokens + 1), at most 1, that
    leaves out the first step, whose inertia is the seeding's. `tokens` is the size of a pass, which a stream does not
    tell: in the first pass it is the number seen so far, and max_no_improvement is judged from the second pass on.
    """

    cluster_centers_: Tensor
    counts_: Tensor
    inertia_: float
    n_steps_: int
    history_: list[dict[str, float]]
    _pass_size: int | None
    _tokens_seen: int
    _tokens_since_reassignment: int
    _epoch: int
    steps_of_pass_: int
    _stalled: int
    _least: float
    _at_rest: float
    _rests: bool

    def __init__(
        self,
        n_clusters: int,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        n_init: int = 1,
        init_size: int | None = None,
        max_iter: int = 100,
        tol: float = 0.0,
        max_no_improvement: int | None = 10,
        reassignment_ratio: float = 0.01,
        decay: float = 0.1,
    ) -> None:
        self.n_clusters = n_clusters
        self.seed = seed
        self.device = device
        self.n_init = n_init
        self.init_size = init_size
        self.max_iter = max_iter
        self.tol = tol
        self.max_no_improvement = max_no_improvement
        self.reassignment_ratio = reassignment_ratio
        self.decay = decay
        self._ready: tuple[Tensor, NearestCenters] | None = None
        self._seeding: Seeding | None = None

    def fit(
        self, stream: Callable[[int], Iterable[Tensor]], on_step: Callable[[dict[str, float]], None] | None = None
    ) -> Self:
        """Fit anew on passes `stream(0)`, `stream(1)`, ...: each the same tokens, best shuffled differently.

        The first tokens of `stream(0)` seed the centres before the passes start, so that they should be a fair sample.
        `on_step` is called after each step with its entry of `history_`. ValueError for a pass without tokens, fewer
        tokens or distinct tokens than clusters, and parameters out of range.
        """
        self._seeding = None
        return self.seed_from(stream(0)).go_on(stream, on_step)

    @property
    def is_seeded_(self) -> bool:
        """Whether there are centres to go on with: not before the last seeding is done."""
        return self._seeding is None and hasattr(self, "cluster_centers_")

    def seed_from(self, batches: Iterable[Tensor], on_seed: Callable[[int, int], None] | None = None) -> Self:
        """Start a fit anew: seed the centres from the first tokens of `batches`; `go_on` then makes the passes.

        A seeding that was broken off, or resumed, is gone on with, bit for bit; `batches` must then begin with the same tokens. `on_seed`
        is called with the number of seedings tried and of centres of the one under way, after each centre, and with 0 centres
        after a whole seeding: moments at which a `checkpoint` can be taken.
        """
        self._check_parameters()
        tokens, held_out = self._seeding_tokens(batches)
        self._seed_centers(tokens, held_out, on_seed)
        sample = batch_moments(tokens)
        self._at_rest = self.tol * float(sample.second.mean()) / sample.count
        return self

    def go_on(
        self, stream: Callable[[int], Iterable[Tensor]], on_step: Callable[[dict[str, float]], None] | None = None
    ) -> Self:
        """Make the passes of a fit that was seeded, or go on with one that was resumed, bit for bit as if there had been no break.

        The first pass asked of `stream` must then begin after the first `steps_of_pass_` batches; it may be empty.
        """
        while self._epoch < self.max_iter and not self._is_done():
            for x in stream(self._epoch):
                if x.shape[0] == 0:
                    continue
                self._fit_step(x)
                if on_step is not None:
                    on_step(self.history_[-1])
                if self._is_done():
                    break
            else:
                if self.steps_of_pass_ == 0:
                    raise ValueError(
                        f"found 0 tokens in pass {self._epoch}, wanted all: stream(epoch) must start a fresh pass"
                    )
                self._pass_size = self._pass_size or self._tokens_seen
                self._epoch += 1
                self.steps_of_pass_ = 0
                if self._epoch < self.max_iter:
                    self.counts_ = _decayed(self.counts_, self.decay)
        why = "no better inertia or centres at rest" if self._is_done() else "max_iter"
        logger.info("k-means stops in pass %d after %d steps: %s", self._epoch + 1, self.n_steps_, why)
        return self

    def _fit_step(self, x: Tensor) -> None:
        """`partial_fit`, and what it says of stopping."""
        centers = self.cluster_centers_
        smoothed = self.partial_fit(x).history_[-1]["ewa_inertia"]
        self.steps_of_pass_ += 1
        if self.tol > 0:
            self._rests = float((self.cluster_centers_ - centers).double().square().sum()) <= self._at_rest
        if self._epoch > 0:
            self._least, self._stalled = (smoothed, 0) if smoothed < self._least else (self._least, self._stalled + 1)

    def _is_done(self) -> bool:
        return self._rests or self._stalled == self.max_no_improvement

    @isolated()
    def partial_fit(self, x: Tensor) -> Self:
        """One step on a batch (batch, d); an empty one changes nothing. The first batch also seeds, where fit did not.

        ValueError when d changes, for NaN and infinity, or when it must seed from fewer (distinct) rows than clusters.
        """
        fitted = self.is_seeded_
        check_numbers = check_later(x, self.cluster_centers_.shape[1] if fitted else None, largest=_LARGEST)
        if x.shape[0] == 0:
            return self
        if not fitted:
            self._check_parameters()
            self._seed_centers(x.to(self.device or x.device), None)
        x = x.to(self.cluster_centers_.device)
        (centers, counts, distances), low, found = self._step(x)
        check_numbers()
        empty = self._record_step(x.shape[0], found)
        self._tokens_since_reassignment += x.shape[0]
        due = empty or self._tokens_since_reassignment >= 10 * self.n_clusters
        if self.reassignment_ratio > 0 and due:
            self._tokens_since_reassignment = 0
            # A generator of its own: where none has collapsed, a fit is what it would be without the look.
            look = torch.Generator().manual_seed(self._tokens_seen)
            low |= collapsed_clusters(self.cluster_centers_, math.sqrt(self.inertia_), look)
            centers, counts = reassign_centers(x, distances, centers, counts, low, self._generator)
        self.cluster_centers_, self.counts_ = centers, counts
        return self

    def _step(self, x: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, list[float]]:
        """A step on x, the clusters of low count after it, and what `_record_step` wants to know.

        All is queued as if the first product had settled every row, and whether it did is read with the rest: a GPU is waited for once.
        """
        finder, tokens = NearestCenters(self.cluster_centers_), x.float()
        labels = finder.guess(tokens)
        while True:
            step = _, counts, distances = _step_of(x, self.cluster_centers_, self.counts_, labels.clamp(min=0))
            low = low_count_clusters(counts, self.reassignment_ratio)
            hits = counts - self.counts_
            rate = (hits.double() / counts.clamp(min=1)).sum() / (hits > 0).sum()
            found = [distances.mean(), rate, low.sum(), (counts == 0).any(), (labels < 0).any()]
            *known, unsettled = torch.stack(found).tolist()
            if not unsettled:
                return step, low, known
            labels = finder.settle(tokens, labels)

    def _record_step(self, n: int, found: list[float]) -> bool:
        """Write a step on n tokens into `history_`; gives whether a cluster has a count of 0."""
        self._tokens_seen += n
        self.n_steps_ += 1
        self.inertia_ = found[0]
        weight = min(1.0, 2 * n / ((self._pass_size or self._tokens_seen) + 1)) if self.n_steps_ > 2 else 1.0
        smoothed = self.history_[-1]["ewa_inertia"] * (1 - weight) if self.history_ else 0.0
        self.history_.append(
            {
                "inertia": self.inertia_,
                "ewa_inertia": smoothed + self.inertia_ * weight,
                "learning_rate": found[1],
                "dead_clusters": found[2],
            }
        )
        return bool(found[3])

    def _check_parameters(self) -> None:
        least = {"n_clusters": 1, "n_init": 1, "max_iter": 1, "tol": 0}
        least |= {"init_size": self.n_clusters} if self.init_size is not None else {}
        least |= {"max_no_improvement": 1} if self.max_no_improvement is not None else {}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"found {name} = {getattr(self, name)}, wanted at least {bound}: change {name}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"found seed = {self.seed}, wanted an int64: change seed")
        if not 0 < self.decay <= 1:
            raise ValueError(f"found decay = {self.decay}, wanted more than 0 and at most 1, which forgets nothing")
        if not 0 <= self.reassignment_ratio <= 1:
            raise ValueError(f"found reassignment_ratio = {self.reassignment_ratio}, wanted 0 to 1: it is a share")

    def _seeding_tokens(self, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The first init_size tokens and, to judge several seedings by, up to as many of those that follow."""
        found: list[Tensor] = []
        size, n = self.init_size or 0, 0
        for x in batches:
            check_batch(x, found[0].shape[1] if found else None, largest=_LARGEST)
            if x.shape[0] == 0:
                continue
            size = size or 3 * max(self.n_clusters, x.shape[0])
            found.append(
                x.detach().to(self.device or x.device, copy=True)
            )  # a stream may fill one buffer again and again
            n += x.shape[0]
            if n >= (size if self.n_init == 1 else 2 * size):
                break
        if not found:
            raise ValueError("found 0 tokens in stream(0), wanted at least n_clusters: is the split empty?")
        with isolated():
            tokens = torch.cat(found)
        return tokens[:size], tokens[size : 2 * size] if n > size else None

    @isolated()
    def _seed_centers(
        self, tokens: Tensor, held_out: Tensor | None, on_seed: Callable[[int, int], None] | None = None
    ) -> None:
        """Seed from the best of n_init seedings, judged on the held-out tokens or, without any, on `tokens`."""
        if self._seeding is None:
            self._start(torch.Generator().manual_seed(self.seed))
            self._seeding = Seeding()
        seeding, judges = self._seeding, tokens if held_out is None else held_out

        def tell() -> None:
            if on_seed is not None:
                on_seed(seeding.tried, len(seeding.chosen))

        while seeding.tried < self.n_init:
            centers = kmeans_plus_plus(tokens, self.n_clusters, self._generator, seeding, tell)
            inertia = -math.inf
            if self.n_init > 1:
                labels = NearestCenters(centers).find(judges.float())
                inertia = float(pull_centers(judges, centers, labels)[1].sum())
            if inertia < seeding.least or seeding.tried == 0:
                seeding.least, self.cluster_centers_ = inertia, centers
            seeding.tried, seeding.chosen, seeding.closest = seeding.tried + 1, [], None
            tell()
        self.counts_ = torch.zeros(self.n_clusters, dtype=torch.int64, device=tokens.device)
        self._seeding = None

    def _start(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._seeding = None
        self._tokens_seen = 0
        self._tokens_since_reassignment = 0
        self._pass_size = None
        self._epoch = self.steps_of_pass_ = self._stalled = 0
        self._least, self._at_rest, self._rests = math.inf, 0.0, False
        self.n_steps_ = 0
        self.history_ = []

    def _prepare(self, x: Tensor) -> Tensor:
        if not self.is_seeded_:
            raise ValueError("found a k-means without centres, wanted a fitted one: call fit or partial_fit first")
        check_batch(x, self.cluster_centers_.shape[1], largest=_LARGEST)
        return x.to(self.cluster_centers_.device)

    @isolated()
    def predict(self, x: Tensor) -> Tensor:
        """Nearest centre of each row of x (batch, d), ties to the lower index: int64 (batch,)."""
        x = self._prepare(x)
        return self._nearest().find(x.float())

    def _nearest(self) -> NearestCenters:
        """The centres made ready, once for all batches until they change: by a step, or by whoever edits them in place."""
        centers = self.cluster_centers_
        if self._ready is None or self._ready[0].device != centers.device or not torch.equal(self._ready[0], centers):
            centers = snapshot(centers)
            self._ready = centers, NearestCenters(centers)
        return self._ready[1]

    @isolated()
    def assign(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest centre, int64 (batch,), and squared distance to it, float64 (batch,), of each row of x (batch, d)."""
        x = self._prepare(x)
        labels = self._nearest().find(x.float())
        return labels, (x.double() - self.cluster_centers_[labels]).square_().sum(1)

    @isolated()
    def transform(self, x: Tensor) -> Tensor:
        """Euclidean distances of x (batch, d) to every centre: float32 (batch, n_clusters), never negative or NaN."""
        x = self._prepare(x)
        found = torch.empty(len(x), self.n_clusters, dtype=torch.float32, device=x.device)
        start = 0
        for squared in chunked_distances(x, self.cluster_centers_):
            found[start : start + len(squared)] = squared.sqrt_()
            start += len(squared)
        return found

    @isolated()
    def reconstruction_errors(self, x: Tensor, std: Tensor) -> dict[int, ErrorSums]:
        """Errors of a batch (batch, d) of standardised tokens put on their centres, under K = 1: one latent is active.

        std (d,) is what the tokens were divided by.
        """
        x = self._prepare(x)
        return {1: error_sums(x, x.double() - self.cluster_centers_[self._nearest().find(x.float())], std)}

    @isolated()
    def state_dict(self) -> dict[str, Tensor]:
        """`cluster_centers` float32 (n_clusters, d), `counts` int64 (n_clusters,), and the parameters by name, int64 or float64 (): copies.

        0 stands for None.
        """
        kept = {name: getattr(self, name) or 0 for name in _PARAMETERS}
        return {
            **self._centers_and_counts(),
            **{name: torch.tensor(kept[name], dtype=dtype, device="cpu") for name, dtype in _PARAMETERS.items()},
        }

    def _centers_and_counts(self) -> dict[str, Tensor]:
        return {"cluster_centers": snapshot(self.cluster_centers_), "counts": snapshot(self.counts_)}

    @isolated()
    def checkpoint(self) -> dict[str, Tensor]:
        """What `resume` needs to go on exactly, as copies; the parameters are not in it.

        `cluster_centers` and `counts` as in `state_dict`, the random `generator`'s state uint8 (n,), `history` float64 (steps, 4),
        `counters` int64 (7,) and `levels` float64 (2,). Before the last seeding is done: `generator`; `tried` int64 (), `least` float64 (),
        `chosen` int64 (m,) and `closest` float32 or float64 (n,), of 0 tokens between two seedings; and the best centres so far.
        """
        if self._seeding is not None:
            return self._seeding_checkpoint(self._seeding)
        counters = [
            *(self._tokens_seen, self._tokens_since_reassignment, self._pass_size or 0),
            *(self._epoch, self.steps_of_pass_, self._stalled, self._rests),
        ]
        history = [[metrics[name] for name in METRICS] for metrics in self.history_]
        return {
            **self._centers_and_counts(),
            "generator": self._generator.get_state(),
            "history": torch.tensor(history, dtype=torch.float64, device="cpu").reshape(-1, len(METRICS)),
            "counters": torch.tensor(counters, dtype=torch.int64, device="cpu"),
            "levels": torch.tensor([self._least, self._at_rest], dtype=torch.float64, device="cpu"),
        }

    def _seeding_checkpoint(self, seeding: Seeding) -> dict[str, Tensor]:
        none = torch.empty(0, dtype=torch.float32, device="cpu")
        return {
            "generator": self._generator.get_state(),
            "tried": torch.tensor(seeding.tried, dtype=torch.int64, device="cpu"),
            "least": torch.tensor(seeding.least, dtype=torch.float64, device="cpu"),
            "chosen": torch.tensor(seeding.chosen, dtype=torch.int64, device="cpu"),
            "closest": none if seeding.closest is None else snapshot(seeding.closest),
            **({"cluster_centers": snapshot(self.cluster_centers_)} if seeding.tried else {}),
        }

    @isolated()
    def resume(self, checkpoint: Mapping[str, Tensor]) -> Self:
        """Take up what `checkpoint` returned, on this one's parameters; then `go_on`, or `partial_fit`.

        Where it `is_seeded_` not yet, `seed_from` goes on first. ValueError for other shapes, or another number of clusters.
        """
        if "tried" in checkpoint:
            return self._resume_seeding(checkpoint)
        restored = self.from_state(checkpoint)
        self._check_clusters(restored.n_clusters)
        self._start(torch.Generator())
        self._generator.set_state(checkpoint["generator"])
        place = restored.cluster_centers_.device if self.device is None else self.device
        self.cluster_centers_ = restored.cluster_centers_.to(place)
        self.counts_ = restored.counts_.to(place)
        self.history_ = [dict(zip(METRICS, row, strict=True)) for row in checkpoint["history"].tolist()]
        self.n_steps_ = len(self.history_)
        if self.history_:
            self.inertia_ = self.history_[-1]["inertia"]
        seen, since, size, self._epoch, self.steps_of_pass_, self._stalled, rests = checkpoint["counters"].tolist()
        self._tokens_seen, self._tokens_since_reassignment, self._pass_size = seen, since, size or None
        self._rests = bool(rests)
        self._least, self._at_rest = checkpoint["levels"].tolist()
        return self

    def _resume_seeding(self, checkpoint: Mapping[str, Tensor]) -> Self:
        tried, chosen, closest = int(checkpoint["tried"]), checkpoint["chosen"].tolist(), checkpoint["closest"]
        place = closest.device if self.device is None else self.device
        self._start(torch.Generator())
        self._generator.set_state(checkpoint["generator"])
        self._seeding = Seeding(
            tried, float(checkpoint["least"]), chosen, snapshot(closest.to(place)) if chosen else None
        )
        if tried:
            self.cluster_centers_ = snapshot(checkpoint["cluster_centers"].to(place))
            self._check_clusters(len(self.cluster_centers_))
        return self

    def _check_clusters(self, n_clusters: int) -> None:
        if n_clusters != self.n_clusters:
            raise ValueError(f"found a checkpoint of {n_clusters} clusters, wanted {self.n_clusters}")

    @classmethod
    @isolated()
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """A model that predicts as the one that left `state`, and whose partial_fit goes on at the same learning rates.

        What of the parameters is not in it is the default. Random draws begin anew with the seed, and the record of steps is empty: to go
        on with a fit, `resume` its checkpoint. ValueError for shapes that do not fit and centres that are not finite.
        """
        centers, counts = state["cluster_centers"], state["counts"]
        if centers.ndim != 2 or 0 in centers.shape or counts.shape != centers.shape[:1]:
            raise ValueError(
                f"found cluster_centers {tuple(centers.shape)} and counts {tuple(counts.shape)}, "
                "wanted (n_clusters, d) and (n_clusters,): is it a k-means' state?"
            )
        if not centers.is_floating_point() or not bool(centers.isfinite().all()):
            raise ValueError(
                f"found cluster_centers of {centers.dtype} that hold NaN, infinity or no real numbers, wanted finite ones: fit it again"
            )
        restored = cls(centers.shape[0])
        for name in _PARAMETERS.keys() & state.keys():
            value = state[name].item()
            setattr(restored, name, None if value == 0 and name in ("init_size", "max_no_improvement") else value)
        restored._start(torch.Generator().manual_seed(restored.seed))
        restored.cluster_centers_, restored.counts_ = snapshot(centers).float(), snapshot(counts).to(torch.int64)
        return restored


def adjusted_rand_index(a: Tensor, b: Tensor) -> float:
    """How far two clusterings of the same tokens, labels int64 (n,), agree: 1 if they are one, about 0 if by chance.

    Hubert and Arabie (1985), "Comparing partitions"; only pairs of clusters that occur are held. ValueError for other lengths or none.
    """
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"found labels {tuple(a.shape)} and {tuple(b.shape)}, wanted two of one length, at least 1")

    def pairs(counts: Tensor) -> int:
        return int((counts * (counts - 1) // 2).sum())

    together = pairs(torch.unique(torch.stack([a, b]), dim=1, return_counts=True)[1])
    in_a, in_b = (pairs(torch.unique(labels, return_counts=True)[1]) for labels in (a, b))
    by_chance = in_a * in_b / max(1, len(a) * (len(a) - 1) // 2)
    most = (in_a + in_b) / 2
    return 1.0 if most == by_chance else (together - by_chance) / (most - by_chance)

"""Greedy k-means++: Arthur and Vassilvitskii (2007), "k-means++: the advantages of careful
seeding".
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from assay.numerics.isolation import isolated, snapshot
from assay.numerics.kmeans.distances import chunked_distances
from assay.numerics.kmeans.nearest import NearestCenters
from assay.numerics.kmeans.prediction import LARGEST
from assay.numerics.kmeans.step import pull_centers
from assay.numerics.moments import check_batch
from assay.numerics.precision import float32_is_exact

# Squared distances below this share of the squared norms have lost most of their digits to
# cancellation in float32.
_CLOSE = 1e-4

# Squared norms between which float32 holds squared distances, and, up to as many times less as
# there are tokens, their sum.
_LEAST_SQUARE, _MOST_SQUARE = 2.0**-100, 2.0**125


@dataclass
class Seeding:
    """Seedings that are not done.

    Attributes:
        tried: seedings that are finished.
        least: the least inertia among them.
        chosen: of the seeding under way, the numbers of the tokens chosen so far.
        closest: the squared distance of every token to the closest of those: float32 (n,), or
            float64 where float32 cannot represent it.
        best: the centers with the least inertia, float32 (n_clusters, d).
    """

    tried: int = 0
    least: float = math.inf
    chosen: list[int] = field(default_factory=list)
    closest: Tensor | None = None
    best: Tensor | None = None

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of `closest` and, as `cluster_centers`, of `best`, if there are any; and the rest
        as JSON, in which None stands for infinity.
        """
        found = {"closest": self.closest, "cluster_centers": self.best}
        tensors = {name: snapshot(tensor) for name, tensor in found.items() if tensor is not None}
        least = self.least if math.isfinite(self.least) else None
        return tensors, {"tried": self.tried, "least": least, "chosen": list(self.chosen)}

    @classmethod
    def resumed(
        cls,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        device: torch.device | str | None,
    ) -> Self:
        """From what `checkpoint` returned."""
        closest, best = (
            (
                snapshot(tensors[name].to(tensors[name].device if device is None else device))
                if name in tensors
                else None
            )
            for name in ("closest", "cluster_centers")
        )
        least = state["least"]
        if least is None:
            least = -math.inf if state["tried"] else math.inf  # one seeding is not judged
        return cls(state["tried"], least, list(state["chosen"]), closest, best)


def kmeans_plus_plus(x: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Seed centers among the tokens x (n, d) by greedy k-means++: float32 (n_clusters, d).

    Each next center is the best of 2 + floor(ln n_clusters) tokens drawn with probability
    proportional to the squared distance to the nearest center so far. Draws are made on the CPU, so
    that one seed gives the same draws everywhere, and the same centers on one device. Another
    device rounds distances differently, which may lead to other tokens.

    Raises:
        ValueError: n_clusters is below 1, or x has fewer distinct tokens than clusters, or holds
            NaN, infinity or a number beyond float32's range.
    """
    seeding = Seeding()
    for _ in choose_seeds(x, n_clusters, generator, seeding):
        pass
    with isolated():
        return x[seeding.chosen].float()


def choose_seeds(
    x: Tensor, n_clusters: int, generator: torch.Generator, seeding: Seeding
) -> Iterator[None]:
    """`kmeans_plus_plus` one center at a time: `seeding.chosen` grows by one whenever this is
    asked, by the first of all before that.

    With `seeding` and the generator as they then are, the rest can be chosen later, to the bit.
    ValueError, too, where x is not what `seeding` was begun on.
    """
    with isolated():
        tokens, norms = _begin(x, n_clusters, generator, seeding)
    while len(seeding.chosen) < n_clusters:
        with isolated():
            tokens, norms = _choose_next(x, n_clusters, tokens, norms, generator, seeding)
        yield


def _begin(
    x: Tensor, n_clusters: int, generator: torch.Generator, seeding: Seeding
) -> tuple[Tensor, Tensor]:
    """Tokens about their mean and their squared norms; a new seeding draws its first center."""
    check_batch(x, largest=LARGEST)
    n = x.shape[0]
    if n_clusters < 1:
        raise ValueError(f"found n_clusters = {n_clusters}, wanted 1 or more")
    if n < n_clusters:
        raise ValueError(
            f"found {n} tokens to seed from, wanted at least n_clusters = {n_clusters}: "
            "lower n_clusters, or give more tokens (a larger init_size or first batch)"
        )
    closest = seeding.closest
    tokens, norms = _centered(x, torch.float32)
    begun_in_float64 = closest is not None and closest.dtype == torch.float64
    if (
        begun_in_float64
        or not float32_is_exact()
        or not _LEAST_SQUARE < float(norms.max()) < _MOST_SQUARE / n
    ):
        tokens, norms = _centered(x, torch.float64)
    if closest is None:
        seeding.chosen.append(int(torch.randint(n, (1,), generator=generator, device="cpu")))
        closest = (x.double() - x[seeding.chosen[0]].double()).square().sum(1)
    elif len(closest) != n:
        raise ValueError(
            f"found {n} tokens, wanted the {len(closest)} that the seeding was begun on: give the"
            " same stream"
        )
    seeding.closest = closest.to(tokens.dtype)
    return tokens, norms


def _choose_next(
    x: Tensor,
    n_clusters: int,
    tokens: Tensor,
    norms: Tensor,
    generator: torch.Generator,
    seeding: Seeding,
) -> tuple[Tensor, Tensor]:
    """Choose one more token. Returns tokens and norms as given, or in float64 if float32 no longer
    tells the tokens apart.
    """
    chosen, closest = seeding.chosen, seeding.closest
    assert closest is not None
    cumulative = closest.cpu().double().cumsum(0)
    if cumulative[-1] == 0 and tokens.dtype == torch.float32 and len(_distinct(x)) > len(chosen):
        # What is left differs by less than float32 has squares for.
        tokens, norms = _centered(x, torch.float64)
        closest = torch.cat([squared.amin(1) for squared in chunked_distances(x, x[chosen])])
        cumulative = closest.cpu().cumsum(0)
    if cumulative[-1] == 0:
        raise ValueError(
            f"found {len(chosen)} distinct tokens among the {len(x)} to seed from, wanted at least"
            f" n_clusters = {n_clusters}: lower n_clusters, or raise init_size"
        )
    n_trials = 2 + int(math.log(n_clusters))
    draws = (
        torch.rand(n_trials, generator=generator, dtype=torch.float64, device="cpu")
        * cumulative[-1]
    )
    drawn = torch.searchsorted(cumulative, draws, right=True).clamp_(max=len(x) - 1)
    trials = drawn.to(x.device)
    distances = (
        torch.addmm(norms, tokens[trials], tokens.T, alpha=-2)
        .add_(norms[trials, None])
        .clamp_(min=0)
    )
    best = int(torch.minimum(distances, closest).sum(1).argmin())
    chosen.append(int(drawn[best]))
    # A token equal to a center must be at exactly 0, or it could be drawn again: by differences
    # where it is close.
    close = distances[best] <= _CLOSE * (norms + norms[chosen[-1]])
    distances[best, close] = (
        (x[close].double() - x[chosen[-1]].double()).square().sum(1).to(tokens.dtype)
    )
    seeding.closest = torch.minimum(closest, distances[best])
    return tokens, norms


def try_seedings(
    tokens: Tensor,
    held_out: Tensor | None,
    n_clusters: int,
    n_init: int,
    generator: torch.Generator,
    seeding: Seeding,
) -> Iterator[tuple[int, int]]:
    """Find the best of n_init seedings, judged on the held-out tokens or, without any, on `tokens`.
    In the end it is `seeding.best`.

    Yields the number of seedings tried and of centers chosen in the current one: after each center,
    and with 0 centers after a whole seeding.
    """
    judges = tokens if held_out is None else held_out
    while seeding.tried < n_init:
        for _ in choose_seeds(tokens, n_clusters, generator, seeding):
            yield seeding.tried, len(seeding.chosen)
        with isolated():
            centers = tokens[seeding.chosen].float()
            inertia = -math.inf
            if n_init > 1:
                labels = NearestCenters(centers).find(judges.float())
                inertia = float(pull_centers(judges, centers, labels)[1].sum())
        if inertia < seeding.least or seeding.tried == 0:
            seeding.least, seeding.best = inertia, centers
        seeding.tried, seeding.chosen, seeding.closest = seeding.tried + 1, [], None
        yield seeding.tried, 0


def seeding_tokens(
    batches: Iterable[Tensor],
    n_clusters: int,
    init_size: int | None,
    device: torch.device | str | None,
    *,
    judge: bool,
) -> tuple[Tensor, Tensor | None]:
    """The first init_size tokens, by default 3 max(n_clusters, tokens of the first batch). With
    `judge`, also up to as many of those that follow, to compare several seedings on.

    Raises:
        ValueError: there are no tokens, or a batch does not fit.
    """
    found: list[Tensor] = []
    size, n = init_size or 0, 0
    for x in batches:
        check_batch(x, found[0].shape[1] if found else None, largest=LARGEST)
        if x.shape[0] == 0:
            continue
        size = size or 3 * max(n_clusters, x.shape[0])
        # A stream may fill one buffer again and again.
        found.append(x.detach().to(device or x.device, copy=True))
        n += x.shape[0]
        if n >= (2 * size if judge else size):
            break
    if not found:
        raise ValueError(
            "found 0 tokens in stream(0), wanted at least n_clusters: is the split empty?"
        )
    with isolated():
        tokens = torch.cat(found)
    return tokens[:size], tokens[size : 2 * size] if n > size else None


def _centered(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tokens (n, d) about their mean, and their squared norms (n,), of `dtype`."""
    tokens = (x.double() - x.double().mean(0)).to(dtype)
    return tokens, tokens.square().sum(1)


def _distinct(x: Tensor) -> Tensor:
    """The rows of x (n, d), each once."""
    return x.unique(dim=0)  # type: ignore[no-untyped-call, no-any-return]

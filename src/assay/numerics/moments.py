"""Mean and standard deviation of a stream of activations, and standardization with them.

Batches are merged with the pairwise update of Chan, Golub and LeVeque (1979, "Updating formulae and
a pairwise algorithm for computing sample variances"), which does not lose digits when the mean is
large beside the spread.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from assay.numerics.fitted import NotFittedError
from assay.numerics.isolation import isolated, snapshot

# A second moment below this share of the squared mean may be rounding alone: whether the tokens
# differ has to be looked at.
_ROUNDING = (64 * torch.finfo(torch.float64).eps) ** 2


@dataclass(frozen=True)
class Moments:
    """The count, the mean (d,) and the second moment about it, both float64. The second moment is
    (d,) by dimension, or (d, d) with the cross terms.
    """

    count: int
    mean: Tensor
    second: Tensor


def check_batch(x: Tensor, d: int | None = None, *, largest: float = math.inf) -> None:
    """Check that x is (batch, d), of finite real numbers.

    Args:
        x: the batch.
        d: its width; None: any but 0.
        largest: the largest magnitude that a number may have.

    Raises:
        ValueError: it is not.
    """
    check_later(x, d, largest=largest)()


@isolated()
def check_later(
    x: Tensor, d: int | None = None, *, largest: float = math.inf
) -> Callable[[], None]:
    """`check_batch` in two halves: the call checks the shape, and the function that it returns
    checks the numbers.

    The scan of the numbers starts at once. The host waits for a GPU only when it calls that
    function, by which time more work is queued behind the scan.
    """
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(
            f"found a batch of shape {tuple(x.shape)}, wanted (batch, d): flatten all axes but the"
            " last"
        )
    if d is not None and x.shape[1] != d:
        raise ValueError(
            f"found a batch of {x.shape[1]} dimensions, wanted {d}: was it fitted on another layer?"
        )
    if x.dtype == torch.bool or x.is_complex():
        raise ValueError(f"found a batch of {x.dtype}, wanted real numbers: are these activations?")
    if len(x) == 0 or x.is_meta:
        return lambda: None
    extremes = torch.stack(x.aminmax())  # in one pass; a NaN is both
    return lambda: _check_numbers(x, extremes, largest)


@isolated()
def _check_numbers(x: Tensor, extremes: Tensor, largest: float) -> None:
    low, high = map(float, extremes.tolist())
    if math.isfinite(low) and math.isfinite(high) and -largest <= low and high <= largest:
        return
    wrong = ~x.isfinite() | (x.double().abs() > largest)
    row, dimension = wrong.nonzero()[0].tolist()
    found = float(x[row, dimension])
    if math.isfinite(found):
        raise ValueError(
            f"row {row}, dimension {dimension} is {found:g}, wanted at most {largest:g}: scale the"
            " activations"
        )
    raise ValueError(
        f"row {row}, dimension {dimension} of a batch is NaN or infinity, wanted finite"
        " activations: record that example again"
    )


@isolated()
def batch_moments(x: Tensor) -> Moments:
    """Moments of each dimension of a batch (n, d), n >= 1, in float64; exact for a dimension in
    which all tokens are equal.
    """
    x = x.double()
    mean = x.mean(0)
    second = (x - mean).square().sum(0)
    doubtful = (second <= _ROUNDING * len(x) * mean.square()).nonzero()[:, 0]
    if len(doubtful):
        constant = doubtful[(x[:, doubtful] == x[0, doubtful]).all(0)]
        mean[constant], second[constant] = x[0, constant] + 0.0, 0.0  # and not -0.0
    return Moments(x.shape[0], mean, second)


@isolated()
def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of two sets of tokens together (Chan et al. 1979, eq. 2.1): M = M_a + M_b + delta^2
    n_a n_b / n.
    """
    count = a.count + b.count
    delta = b.mean - a.mean
    square = torch.outer(delta, delta) if a.second.ndim == 2 else delta.square()
    mean = a.mean + delta * (b.count / count)
    return Moments(count, mean, a.second + b.second + square * (a.count * b.count / count))


class StreamingMoments:
    """Per-dimension mean and population standard deviation (ddof = 0) over a stream of batches.

    Reading `mean_` or `std_`, both float64 (d,), raises NotFittedError before any token was seen;
    `count_` is then 0. Sums are kept in float64 on the device of the latest batch.
    """

    def __init__(self) -> None:
        self._moments: Moments | None = None

    @isolated()
    def partial_fit(self, x: Tensor) -> Self:
        """Add a batch (batch, d) of any real dtype; an empty one changes nothing.

        Raises:
            ValueError: d changes, or the batch holds NaN or infinity.
        """
        seen = self._moments
        check_batch(x, None if seen is None else seen.mean.shape[0])
        if x.shape[0] == 0:
            return self
        self._moments = batch_moments(x)
        if seen is not None:
            # Of a state that was read from a file the sums are on the CPU: they are small, and
            # batches are not.
            here = Moments(seen.count, seen.mean.to(x.device), seen.second.to(x.device))
            self._moments = merge_moments(here, self._moments)
        return self

    @isolated()
    def merge(self, other: Self) -> Self:
        """Add the tokens that `other` has seen; `other` stays as it is. Two halves equal one pass,
        to rounding.

        Raises:
            ValueError: `other` has seen another width.
        """
        theirs, mine = other._moments, self._moments
        if theirs is None:
            return self
        place = (theirs if mine is None else mine).mean.device
        added = Moments(
            theirs.count, snapshot(theirs.mean).to(place), snapshot(theirs.second).to(place)
        )
        if mine is not None:
            check_batch(added.mean[None], len(mine.mean))
            added = merge_moments(mine, added)
        self._moments = added
        return self

    @property
    def count_(self) -> int:
        """Tokens seen."""
        return 0 if self._moments is None else self._moments.count

    @property
    def mean_(self) -> Tensor:
        """Mean, float64 (d,)."""
        return self._fitted().mean

    @property
    @isolated()
    def std_(self) -> Tensor:
        """Population standard deviation, float64 (d,); exactly 0 where all tokens are equal."""
        moments = self._fitted()
        return (moments.second / moments.count).sqrt()

    def _fitted(self) -> Moments:
        if self._moments is None:
            raise NotFittedError(
                "found 0 tokens, wanted at least 1: call partial_fit with a batch that is not empty"
            )
        return self._moments

    @isolated()
    def state_dict(self) -> dict[str, Tensor]:
        """`mean` and `std`, float64 (d,), and `count`, int64 ()."""
        count = torch.tensor(self.count_, dtype=torch.int64, device="cpu")
        return {"mean": snapshot(self.mean_), "std": self.std_, "count": count}

    @isolated()
    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `resume` needs to continue exactly: copies of `mean` and `second`, the second moment
        about it, both float64 (d,), and `count` as JSON.
        """
        moments = self._fitted()
        tensors = {"mean": snapshot(moments.mean), "second": snapshot(moments.second)}
        return tensors, {"count": moments.count}

    @isolated()
    def resume(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Self:
        """Continue from what `checkpoint` returned, bit for bit as if there had been no break.

        Raises:
            ValueError: the shapes do not fit.
        """
        mean, second, count = tensors["mean"], tensors["second"], int(state["count"])
        if mean.ndim != 1 or second.shape != mean.shape or count < 1:
            raise ValueError(
                f"found mean {tuple(mean.shape)}, second moment {tuple(second.shape)} and count"
                f" {count}, wanted (d,), (d,) and at least 1: is it a checkpoint of statistics?"
            )
        self._moments = Moments(count, snapshot(mean).double(), snapshot(second).double())
        return self

    @classmethod
    @isolated()
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """The estimator that left `state`; it can continue with partial_fit, to rounding:
        `checkpoint` keeps the bits.

        Raises:
            ValueError: no statistics can be so.
        """
        check_mean_std(state["mean"], state["std"])
        mean, std, count = (
            snapshot(state["mean"]).double(),
            state["std"].double(),
            int(state["count"]),
        )
        if count < 1:
            raise ValueError(
                f"found statistics over {count} tokens, wanted at least 1: compute them again"
            )
        restored = cls()
        restored._moments = Moments(count, mean, std.square() * count)
        return restored


@isolated()
def scale_of(std: Tensor) -> Tensor:
    """The divisor that standardizes: std in float64, with 1 where it is 0."""
    std = std.double()
    return torch.where(std == 0, torch.ones_like(std), std)


@isolated()
def standardize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std, computed in float64: (..., d) to float32 (..., d). A std of 0 counts as 1.

    Raises:
        ValueError: mean or std are not (d,).
    """
    check_same_dimensions(x, mean=mean, std=std)
    return ((x.double() - mean.to(x.device, torch.float64)) / scale_of(std.to(x.device))).float()


@isolated()
def unstandardize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """x std + mean, computed in float64, the inverse of `standardize`: (..., d) to float32
    (..., d).

    Raises:
        ValueError: mean or std are not (d,).
    """
    check_same_dimensions(x, mean=mean, std=std)
    return (x.double() * scale_of(std.to(x.device)) + mean.to(x.device, torch.float64)).float()


def check_same_dimensions(x: Tensor, **statistics: Tensor) -> None:
    """Check for one number per dimension: torch would take a single one for all of them."""
    for name, each in statistics.items():
        if each.shape != x.shape[-1:]:
            raise ValueError(
                f"found tokens of shape {tuple(x.shape)} and a {name} of shape"
                f" {tuple(each.shape)}, wanted (..., d) and (d,): are they of one layer?"
            )


@isolated()
def check_mean_std(mean: Tensor, std: Tensor) -> None:
    """Check that mean and std are real, finite and (d,), and that no std is below 0.

    Raises:
        ValueError: they are not.
    """
    if mean.ndim != 1 or mean.shape != std.shape:
        raise ValueError(
            f"found mean {tuple(mean.shape)} and std {tuple(std.shape)}, wanted (d,) for both"
        )
    for name, value in (("mean", mean), ("std", std)):
        if value.dtype == torch.bool or value.is_complex():
            raise ValueError(
                f"found a {name} of {value.dtype}, wanted real numbers: compute it again"
            )
        bad = int((~value.isfinite()).sum())
        if bad:
            raise ValueError(
                f"found {bad} values of {name} that are not finite, wanted none: compute it again"
            )
    if bool((std < 0).any()):
        raise ValueError(
            f"found a std of {float(std.min()):g}, wanted none below 0: is it a log or a precision?"
        )

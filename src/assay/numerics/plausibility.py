"""Whether statistics belong to the tokens that are standardized with them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from assay.numerics.isolation import isolated
from assay.numerics.moments import batch_moments, check_batch, check_mean_std

# Tokens of one image are alike and a small batch may hold few images, so only a plain mismatch may
# trip these.
_MAX_SHIFT = 1.5
_MAX_SPREAD_RATIO = 4.0
_MIN_TOKENS_FOR_SPREAD = 32
_MIN_TOKENS_FOR_LIMITS = 512


@dataclass(frozen=True)
class _Limits:
    """Limits that a random sample of tokens has to keep.

    Attributes:
        spread_ratio: the largest median over dimensions of the sample's std over the given one, or
            of the inverse.
        correlation: the least correlation over dimensions between the logarithms of both.
        dimensions: how many dimensions it takes to check the correlation.
        variation: the least standard deviation of the logarithms that it takes.
    """

    spread_ratio: float
    correlation: float
    dimensions: int
    variation: float


# Measured on layers 3 and 5 of a vision transformer, recorded on two splits: with the right
# statistics, of either split, the ratio is at most 1.15 and the correlation at least 0.53; with
# those of the other layer 1.75 and more; permuted, the correlation is about 0.
_OF_THESE_TOKENS = _Limits(spread_ratio=1.5, correlation=0.25, dimensions=16, variation=0.05)
# Another data set has other spreads, though they are large and small in the same dimensions.
_OF_THIS_MODEL = _Limits(spread_ratio=2.7, correlation=0.1, dimensions=64, variation=0.1)


@isolated()
def check_statistics(x: Tensor, mean: Tensor, std: Tensor, *, same_data: bool = True) -> None:
    """Refuse mean and std (d,) that plainly do not belong to the data of the batch x (batch, d).

    These are medians over dimensions, so that a few outlier dimensions decide nothing. The batch's
    mean must lie within 1.5 + 3 / sqrt(batch) std of `mean`. From 32 tokens on, the batch's std
    must be within [1/4, 4] of `std`. And no more than half of the dimensions may have a std of 0
    although they vary. An empty x passes these three checks.

    From 512 tokens on, which have to be a random sample, `std` must be within a factor of 1.5, and
    the logarithms of both must correlate over dimensions by 0.25 or more: statistics of another
    layer or of permuted dimensions do not. If `mean` and `std` are of other data of the same layer
    and model (`same_data` false), the factor is 2.7 and the correlation 0.1.

    Raises:
        ValueError: a check fails.
    """
    check_mean_std(mean, std)
    check_batch(x, mean.shape[0])
    n = x.shape[0]
    if n == 0:
        return
    batch = batch_moments(x)
    batch_std = (batch.second / n).sqrt()
    mean, std = mean.to(x.device, torch.float64), std.to(x.device, torch.float64)
    wrongly_constant = int(((std == 0) & (batch_std > 0)).sum())
    if 2 * wrongly_constant > x.shape[1]:
        raise ValueError(
            f"found std 0 for {wrongly_constant} of {x.shape[1]} dimensions that vary in the first"
            f" {n} tokens, wanted their spread: are these statistics of the same layer and model?"
        )
    live = std > 0
    if not bool(live.any()):
        return
    shift = float(((batch.mean - mean)[live] / std[live]).abs().median())
    bound = _MAX_SHIFT + 3 / n**0.5
    if not shift <= bound:
        raise ValueError(
            f"found the first {n} tokens a median of {shift:.3g} std from the mean given, wanted at"
            f" most {bound:.3g}: are these statistics of the same layer, model and preprocessing?"
        )
    _check_spread(batch_std[live], std[live], n, _OF_THESE_TOKENS if same_data else _OF_THIS_MODEL)


def _check_spread(found: Tensor, given: Tensor, n: int, limits: _Limits) -> None:
    """Compare the std found in n tokens with that given, both (d,), the latter above 0."""
    if n < _MIN_TOKENS_FOR_SPREAD:
        return
    spread = float((found / given).median())
    most = limits.spread_ratio if n >= _MIN_TOKENS_FOR_LIMITS else _MAX_SPREAD_RATIO
    if not 1 / most <= spread <= most:
        raise ValueError(
            f"found a spread in the first {n} tokens that is a median of {spread:.3g} times the std"
            f" given, wanted {1 / most:.3g} to {most:g} times: is it a variance, or of another"
            " layer?"
        )
    logarithms = torch.stack([found, given])[:, found > 0].log()
    dimensions = logarithms.shape[1]
    if (
        n < _MIN_TOKENS_FOR_LIMITS
        or dimensions < limits.dimensions
        or float(logarithms[1].std()) < limits.variation
    ):
        return
    correlation = float(torch.corrcoef(logarithms)[0, 1])
    if correlation < limits.correlation:
        raise ValueError(
            f"found the spreads of {dimensions} dimensions in the first {n} tokens to correlate by"
            f" {correlation:.2f} with the std given (logarithms), wanted at least"
            f" {limits.correlation}: is it of another layer or model, or in another order?"
        )

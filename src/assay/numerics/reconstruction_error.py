"""Reconstruction error of a dictionary: sums that merge over batches, and the normalized mean
squared error (NMSE).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from assay.numerics.isolation import isolated
from assay.numerics.moments import check_same_dimensions, scale_of


@dataclass(frozen=True)
class ErrorSums:
    """Squared error over `n_tokens` tokens, summed over tokens and dimensions in float64.

    Attributes:
        residual: sum ||x~ - x^||^2, in standardized units.
        total: sum ||x~||^2, the error of predicting the train mean, which is 0 in this space.
        residual_raw: sum over dimensions of sigma^2 (x~ - x^)^2, in the activations' own units.
        total_raw: sum over dimensions of sigma^2 x~^2 = ||x - mu||^2.
        n_tokens: tokens.

    Raises:
        ValueError: a sum is negative or not finite.
    """

    residual: float
    total: float
    residual_raw: float
    total_raw: float
    n_tokens: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"found {name} = {value}, wanted a finite number of at least 0: is the input"
                    " finite?"
                )

    def __add__(self, other: Self) -> Self:
        return type(self)(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    @property
    def nmse(self) -> float:
        """residual / total: 0 is perfect, 1 is no better than the train mean.

        Raises:
            ValueError: total is 0.
        """
        return _ratio(self.residual, self.total, self.n_tokens)

    @property
    def nmse_raw(self) -> float:
        """residual_raw / total_raw, the same in the activations' own units.

        Raises:
            ValueError: total_raw is 0.
        """
        return _ratio(self.residual_raw, self.total_raw, self.n_tokens)


def _ratio(residual: float, total: float, n_tokens: int) -> float:
    if total == 0:
        raise ValueError(
            f"found no variance in {n_tokens} tokens, wanted some to normalize by: is the split"
            " empty?"
        )
    return residual / total


@isolated()
def error_sums(x: Tensor, residual: Tensor, std: Tensor) -> ErrorSums:
    """Errors of one batch.

    Args:
        x: standardized tokens x~, (batch, d).
        residual: x~ - x^, (batch, d), on the same device.
        std: the sigma that the tokens were divided by, (d,); 0 counts as 1.

    Raises:
        ValueError: the shapes do not fit, or a sum is not finite.
    """
    check_same_dimensions(x, std=std)
    if residual.shape != x.shape:
        raise ValueError(
            f"found tokens of shape {tuple(x.shape)} and what is left of them"
            f" {tuple(residual.shape)}, wanted one shape: are they of one batch?"
        )
    residual_squares = residual.double().square().sum(0)
    total_squares = x.double().square().sum(0)
    variance = scale_of(std.to(x.device)).square()
    return ErrorSums(
        residual=float(residual_squares.sum()),
        total=float(total_squares.sum()),
        residual_raw=float(residual_squares @ variance),
        total_raw=float(total_squares @ variance),
        n_tokens=x.shape[0],
    )


def sum_errors(
    measure: Callable[[Tensor], dict[int, ErrorSums]], batches: Iterable[Tensor]
) -> dict[int, ErrorSums]:
    """Add up the errors of all batches (batch, d), in one pass, for each number of active latents
    K.

    Args:
        measure: the errors of one batch by K.
        batches: standardized tokens.

    Raises:
        ValueError: there is no token at all.
    """
    sums: dict[int, ErrorSums] = {}
    for x in batches:
        for k, found in measure(x).items():
            sums[k] = sums[k] + found if k in sums else found
    if not any(total.n_tokens for total in sums.values()):
        raise ValueError("found 0 tokens to reconstruct, wanted at least 1: is the split empty?")
    return sums

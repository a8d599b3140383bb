"""What the fused kernels are to the code around them, which runs without Triton."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

FUSED_TILE = 256
"""Centers that the fused kernels look at together: on a GPU they are filled up to whole tiles."""


class Product(Protocol):
    """The properties of a product in low precision that the kernels need: see
    `assay.numerics.kmeans.rounded_centers.RoundedCenters`.

    Attributes:
        matrix: float16 or bfloat16 (whole tiles of rows, width), the width a multiple of 64, with
            four bounds behind the d dimensions.
        bounds: float32 (K, 3).
        unit: the relative error of one rounding.
        least_step: twice its absolute error where it underflows.
        sums: g, the relative error of a sum.
        margin: the factor that raises bounds.
        underflow: how far squares that underflow may lower a norm.
        most_halved: the cap on halved norms.
    """

    matrix: Tensor
    bounds: Tensor
    unit: float
    least_step: float
    sums: float
    margin: float
    underflow: float
    most_halved: float


class Kernels(NamedTuple):
    """Triton's kernels on a GPU, which prepare centers, find the nearest of them, and move them.
    See `fused` and `fused_step`.
    """

    round_centers: Callable[[Tensor, Tensor, Product], tuple[Tensor, Tensor]]
    nearest: Callable[[Tensor, Tensor, Tensor, Product], Tensor]
    move_centers: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

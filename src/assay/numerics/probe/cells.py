"""Maps from a feature's values to cells, fine about the middle and wider in proportion beyond."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.numerics.isolation import isolated

BITS = 5
"""Cells from one power of 2 to the next, as a power of 2, unless finer ones are asked for."""

OCTAVES = 16
"""Powers of 2 that have cells of their own, on either side of the middle, unless the values are
known to go further.
"""

_MOST_OCTAVES = 64
_ONE = 0x3F800000  # the bits of 1.0 as float32
_MANTISSA = 23
_SAMPLE = 4096


@dataclass(frozen=True)
class CellMap:
    """The cell of a value x: with t = (x - center) / scale there are `2^bits` cells between one
    power of 2 of |t| + 1 and the next.

    Within a cell, |t| + 1 as a float32 has the same `bits` first places, so that a cell's number is
    read off the float's bits. The last cell of either side is open.

    Attributes:
        center: float64 (features,).
        scale: float64 (features,).
        bits: cells from one power of 2 to the next, as a power of 2.
        octaves: powers of 2 that have cells of their own.
    """

    center: Tensor
    scale: Tensor
    bits: int = BITS
    octaves: int = OCTAVES

    @property
    def n_cells(self) -> int:
        """Cells of both sides."""
        return 2 * (self.octaves << self.bits)

    @classmethod
    @isolated()
    def of_rows(cls, sample: Tensor, bits: int = BITS) -> CellMap:
        """A map about the median of (features, rows), with the median distance of the other values
        from it as the unit.
        """
        stride = -(-sample.shape[1] // _SAMPLE)
        ordered = sample[:, ::stride].double().sort(dim=1).values
        n = ordered.shape[1]
        center = ordered[:, round((n - 1) / 2)]
        away = (ordered - center[:, None]).abs().sort(dim=1).values
        # Half may be one value, as the zeros of an autoencoder's codes are: the unit is that of the
        # rest.
        same = (away == 0).sum(1)
        unit = away.gather(1, ((same + n - 1) // 2).clamp(max=n - 1)[:, None])[:, 0]
        # All are one value: whatever comes next is in its own cell, or not far from it.
        return cls(center, _first_positive(unit, center.abs()), bits)

    @classmethod
    @isolated()
    def of_all_rows(cls, values: Tensor, bits: int) -> CellMap:
        """As `of_rows`, if these (features, rows) are all there are: no cell is open."""
        cells = cls.of_rows(values, bits)
        farthest = ((values.double() - cells.center[:, None]).abs().amax(1) / cells.scale).amax()
        octaves = math.frexp(float(farthest) + 1)[1] if bool(farthest.isfinite()) else OCTAVES
        return dataclasses.replace(cells, octaves=min(max(octaves, OCTAVES), _MOST_OCTAVES))

    @classmethod
    @isolated()
    def of_events(
        cls, features: Tensor, values: Tensor, n_features: int, bits: int = BITS
    ) -> CellMap:
        """A map about 0, with the mean magnitude of a feature's `values` (events,) as the unit."""
        sums = values.new_zeros(2, n_features, dtype=torch.float64)
        sums[0].scatter_add_(0, features, values.double().abs())
        sums[1].scatter_add_(0, features, values.double().abs().sign())
        everywhere = sums[0].sum() / sums[1].sum().clamp(min=1)
        return cls(
            torch.zeros_like(sums[0]),
            _first_positive(sums[0] / sums[1], everywhere.expand(n_features)),
            bits,
        )

    def __getitem__(self, features: slice | Tensor) -> CellMap:
        return dataclasses.replace(self, center=self.center[features], scale=self.scale[features])

    @isolated()
    def cells(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The cell of every t, int64, and |t| + 1 less the middle of that cell, float64."""
        t = t.double()  # so that the float32s below are copies
        shift = _MANTISSA - self.bits
        last = (_ONE >> shift) + (self.octaves << self.bits) - 1
        v = t.abs().add_(1)
        cell = v.float().view(torch.int32)
        cell >>= shift
        cell.clamp_(max=last)
        middle = (cell << shift).bitwise_or_(1 << (shift - 1)).view(torch.float32)
        cell -= _ONE >> shift
        negative = t.float().view(torch.int32)  # all ones where the sign is set
        negative >>= 31
        cell += negative.bitwise_and_(self.octaves << self.bits)
        return cell.long(), v.sub_(middle)

    @isolated()
    def middles(self) -> tuple[Tensor, Tensor]:
        """The middle of every cell as |t| + 1, and half its width, float64 (n_cells,)."""
        shift = _MANTISSA - self.bits
        cells = torch.arange(
            self.octaves << self.bits, dtype=torch.int32, device=self.center.device
        ) + (_ONE >> shift)
        middle = (cells << shift).bitwise_or(1 << (shift - 1)).view(torch.float32).double()
        half = middle - (cells << shift).view(torch.float32).double()
        return middle.repeat(2), half.repeat(2)


def _first_positive(*choices: Tensor) -> Tensor:
    """For each place the first choice that is a positive number; 1 if none is."""
    scale = torch.ones_like(choices[0])
    for choice in reversed(choices):
        scale = torch.where(choice > 0, choice, scale)
    return scale

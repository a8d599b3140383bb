"""The nearest center of every token, exactly, at the rate of the fastest product there is.

The score of a center c for a token x is x.c - |c|^2 / 2 about a common origin: the nearest center
has the largest. A product in low precision gives every score with a bound on its error, so only
centers within twice the bound of the best can be nearest: a token with one such candidate is
settled, one with a few is settled by its float64 distances to them, and one with many is asked
again in the next higher precision. Only tiles of the (n, K) scores are ever held.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from assay.numerics.isolation import isolated
from assay.numerics.kmeans.distances import nearest_in_float64, origin_of, settle_by_differences
from assay.numerics.kmeans.kernel_trial import fused_kernels
from assay.numerics.kmeans.rounded_centers import RoundedCenters
from assay.numerics.moments import check_batch
from assay.numerics.precision import fast_dtypes, float32_is_exact

# Scores held at a time: they stay in the processor's cache, or are few launches on a GPU.
_TILE_BYTES = {"cpu": 8 * 2**20, "cuda": 512 * 2**20}


class NearestCenters:
    """Centers prepared for finding the nearest of them for many tokens.

    Args:
        centers: float32 (K, d), which must not change while this is in use.
        dtypes: of the products that are tried, in this order, before float64 settles what is left;
            by default the fastest of the device, then float32. They change the time, never the
            answer.
        origin: what tokens and centers are shifted by, float32 (d,), by default a point amid the
            centers. It changes the time, never the answer.
    """

    @isolated()
    def __init__(
        self,
        centers: Tensor,
        dtypes: tuple[torch.dtype, ...] | None = None,
        origin: Tensor | None = None,
    ) -> None:
        self._centers = centers
        wanted = (*fast_dtypes(centers.device), torch.float32) if dtypes is None else dtypes
        # A large common offset would cancel away the digits that matter.
        self._origin = origin_of(centers) if origin is None else origin
        self._dtypes = tuple(dict.fromkeys(wanted))
        self._products: dict[torch.dtype, RoundedCenters] = {}

    @isolated()
    def find(self, x: Tensor) -> Tensor:
        """Index of the nearest center to each row of x (n, d), float32: int64 (n,); ties go to the
        lower index.

        Float64 distances by differences give the same answer, except where the two best differ by
        float64's rounding.

        Raises:
            ValueError: x holds NaN or infinity.
        """
        return self._find_left(
            x, torch.empty(0, dtype=torch.int64, device=x.device), None, self._dtypes
        )

    @isolated()
    def find_among(
        self, x: Tensor, most_of_all: Callable[[Tensor], Tensor], most_centers: int
    ) -> Tensor:
        """As `find`, where others have more centers, shifted by the same origin: the nearest of
        these, or -1 for a row to which another's is nearer for certain.

        A score's bounds hold whoever computes it, so that a row whose best score here may be no
        more than another's is for certain needs no more looks.

        Args:
            x: (n, d), float32, the same everywhere.
            most_of_all: the elementwise maximum of what all give, float32 (rows,). All call it
                equally often.
            most_centers: the most that any has. These may be none.
        """
        n = _rows_at_once(x.device, most_centers)
        if not self._bounds_are_here():
            for part in torch.split(x, n):
                most_of_all(part.new_full((len(part),), -torch.inf))
            if len(self._centers):
                return self.find(x)
            return torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
        product = self._product(self._dtypes[0])
        found = [self._settle_among(part, product, most_of_all) for part in torch.split(x, n)]
        labels, beaten = (torch.cat(each) for each in zip(*found, strict=True))
        left = ((labels < 0) & ~beaten).nonzero()[:, 0]
        return self._find_left(x, labels, left, self._dtypes[1:]) if len(left) else labels

    def _bounds_are_here(self) -> bool:
        """Whether the first product gives bounds, which the fused kernels keep to themselves."""
        return (
            len(self._centers) > 0
            and len(self._dtypes) > 0
            and self._is_of_use(self._dtypes[0])
            and self._product(self._dtypes[0]).kernels is None
        )

    def _settle_among(
        self, x: Tensor, product: "RoundedCenters", most_of_all: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Labels as of `_settle_part`, and -1 as well for a row that another has for certain, bool
        (n,).
        """
        beaten = torch.zeros(len(x), dtype=torch.bool, device=x.device)

        def agree(best: Tensor, least: Tensor) -> Tensor:
            known = least.isfinite()
            most = most_of_all(torch.where(known, least, -torch.inf))
            beaten.copy_(known & (best < most))
            return torch.where(known, most, least)

        return self._settle_part(x, product, agree), beaten

    @isolated()
    def guess(self, x: Tensor) -> Tensor:
        """As `find`, but with the fused GPU kernels only the first product's answers, and -1 for a
        row that it leaves in question.

        The host does not wait for them. `settle` finds the missing ones.
        """
        product = self._product(self._dtypes[0]) if self._dtypes else None
        if product is None or product.kernels is None:
            return self.find(x)
        labels = product.kernels.nearest(x, self._centers, self._origin, product)
        return torch.where(product.holds, labels, -1)

    @isolated()
    def settle(self, x: Tensor, labels: Tensor) -> Tensor:
        """The answer of `find`, given that of `guess` for the same x."""
        left = (labels < 0).nonzero()[:, 0]
        return self._find_left(x, labels, left, self._dtypes[1:]) if len(left) else labels

    def _find_left(
        self, x: Tensor, labels: Tensor, left: Tensor | None, dtypes: tuple[torch.dtype, ...]
    ) -> Tensor:
        """`labels` with those of the rows that are `left`, or of all, by products of these dtypes
        and then in float64.
        """
        for dtype in dtypes:
            if not self._is_of_use(dtype):
                continue
            found = self._settle(x, left, self._product(dtype))
            labels = found if left is None else labels.index_copy_(0, left, found)
            left = (labels < 0).nonzero()[:, 0]
            if not len(left):
                return labels
        # No product settles a token that holds NaN or infinity: only here is one looked for.
        check_batch(x, len(self._origin))
        if left is None:
            return nearest_in_float64(x, self._centers)
        return labels.index_copy_(0, left, nearest_in_float64(x[left], self._centers))

    def _is_of_use(self, dtype: torch.dtype) -> bool:
        """Whether a product's bounds hold."""
        if dtype == torch.float32 and not float32_is_exact():
            return False
        return self._product(dtype).holds_the_centers

    def _product(self, dtype: torch.dtype) -> "RoundedCenters":
        if dtype not in self._products:
            self._products[dtype] = RoundedCenters(
                self._centers, self._origin, dtype, fused_kernels(self._centers.device)
            )
        return self._products[dtype]

    def _settle(self, x: Tensor, left: Tensor | None, product: "RoundedCenters") -> Tensor:
        """Labels of the rows `left` of x, all by default, and -1 where the product leaves too many
        candidates: int64 (rows,).
        """
        if product.kernels is not None:
            return product.kernels.nearest(
                x if left is None else x[left], self._centers, self._origin, product
            )
        n = _rows_at_once(x.device, len(self._centers))
        parts = torch.split(x, n) if left is None else (x[rows] for rows in torch.split(left, n))
        return torch.cat([self._settle_part(part, product) for part in parts])

    def _settle_part(
        self,
        x: Tensor,
        product: "RoundedCenters",
        agree: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        rows, groups, near = product.shortlist(x - self._origin, agree)
        counts = rows.new_zeros(len(x)).index_add_(0, rows, near.sum(1))
        alone = counts[rows] == 1
        centers = torch.where(alone, product.members(near.to(torch.uint8).argmax(1), groups), -1)
        labels = torch.full_like(counts, -1).scatter_reduce_(0, rows, centers, "amax")
        pairs, places = (near & ~alone[:, None]).nonzero(as_tuple=True)
        if not len(pairs):
            return labels
        return settle_by_differences(
            labels, x, rows[pairs], self._centers, product.members(places, groups[pairs])
        )


def _rows_at_once(device: torch.device, n_centers: int) -> int:
    """Rows whose scores of so many centers are held at a time."""
    return max(1, _TILE_BYTES[device.type] // (2 * n_centers))

"""Scores of centers by a product in low precision, each with a bound on its error."""

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from assay.numerics.isolation import isolated
from assay.numerics.kmeans.kernels import FUSED_TILE, Kernels
from assay.numerics.precision import sums_in_float32

# Centers are looked at in so many groups first, by the best score of each: only groups with a
# candidate are looked into.
GROUP = 64

_MOST_GROUPS = 16


class RoundedCenters:
    """Upper bounds on the scores of shifted centers c (K, d), float32, by a product in `dtype`, and
    which of them may be the largest.

    The product gives not a score but the most that it may be. The bounds ride along in it as more
    dimensions, one set per center, so that a far center widens no other's. With x' and c' as
    rounded to `dtype`, the score is off by

    - |x - x'| |c| + |x'| |c - c'| at most, by rounding (Cauchy-Schwarz);
    - g (|x'| |c| + |c|^2 / 2) at most, by summing d + 4 terms in float32, in any order, whether
      sums are rounded or cut off: m terms take m 2^-23 times the sum of their magnitudes, and g =
      (d + 8) 2^-23 leaves enough for x and c, which the shift has rounded.

    So |x - x'| + g |x'| is multiplied by |c|, and |x'| by |c - c'|; g |c|^2 / 2 and any loss by
    rounding are added to the halved norm. All are raised by `margin`, for the rounding of the
    bounds themselves and of norms in float32. If b seems the best, with p(b), then `_slack` is
    twice the excess that p(b) may have: p(c) >= s(c) >= s(b) >= p(b) - slack for the nearest c.
    """

    @isolated()
    def __init__(
        self, centers: Tensor, origin: Tensor, dtype: torch.dtype, kernels: Kernels | None
    ) -> None:
        n_clusters, self._d = centers.shape
        rows = FUSED_TILE if centers.is_cuda else GROUP
        self._n_groups = -(-n_clusters // rows) * rows // GROUP
        self._dtype = dtype
        limits = torch.finfo(dtype)
        self.unit = limits.eps / 2  # the relative error of one rounding
        self.least_step = limits.tiny * limits.eps  # twice its absolute error where it underflows
        self.sums = (self._d + 8) * 2.0**-23
        self.margin = 1 + 2.0**-6 + 2 * self.sums
        # A square below the least float32 is lost: a norm may be so much larger.
        self.underflow = math.sqrt(self._d) * 2.0**-62
        # A score that would overflow may seem larger than it is: then it is asked again, and no
        # other center's is lost.
        self.most_halved = min(1e38, 0.9 * limits.max)
        self.kernels = kernels if dtype != torch.float32 else None
        self.matrix = self._allocate(self._n_groups * GROUP, centers.device)
        if self.kernels is not None:
            self.bounds, self.holds = self.kernels.round_centers(centers, origin, self)
        else:
            self.bounds, self.holds = self._round_centers(centers - origin)

    def _round_centers(self, centers: Tensor) -> tuple[Tensor, Tensor]:
        """Write shifted centers (K, d) into the matrix, with their bounds. Returns `bounds` (K, 3),
        and whether the matrix holds all centers, ().
        """
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
        lost = (centers - kept).norm(dim=1, dtype=torch.float64) + math.sqrt(
            self._d
        ) * 2.0**-126  # and of underflow
        own[:, self._d : self._d + 4] = torch.stack(
            [high, low, self._round_up(norms), self._round_up(lost)], dim=1
        )
        # What fills the last group up is never near: below -|x| |c| and the halved norm of all that
        # fits.
        rest[:, self._d : self._d + 4] = -torch.finfo(self._dtype).max
        bounds = torch.stack([norms, lost, high.double() + low.double() - halves], dim=1).float()
        return bounds, own.isfinite().all()

    @cached_property
    def holds_the_centers(self) -> bool:
        """Whether every rounded center is finite. When this is first asked, the host waits for a
        GPU.
        """
        return bool(self.holds)

    def _allocate(self, rows: int, device: torch.device) -> Tensor:
        """(rows, at least d + 4); every row is a multiple of 128 bytes, as tensor cores load it
        fastest.
        """
        return torch.empty(rows, -(-(self._d + 4) // 64) * 64, dtype=self._dtype, device=device)

    def _round_up(self, values: Tensor) -> Tensor:
        return (values * (1 + 4 * self.unit) + self.least_step).to(self._dtype)

    @isolated()
    def shortlist(
        self, x: Tensor, agree: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The centers that may be nearest to rows of x (n, d), shifted: pairs (row, group), int64,
        by row, and bool (pairs, 64), which of the group's `members` they are.

        Rows with candidates in too many groups get none, and so do rows for which overflow makes a
        bound infinite or a score NaN.

        agree: given the most that the best score may be, and the least that it is for certain, both
            float32 (n,), the least that the best of these and of other centers is.
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
        most = scores.view(n, GROUP, self._n_groups)
        # In two, of rows that are longer: torch's maximum is ten times as slow over short ones.
        most_of_group = (
            most.view(n, 8, 8 * self._n_groups).amax(1).view(n, 8, self._n_groups).amax(1)
        )
        best, group = most_of_group.max(1)
        seeming = self.members(
            most.gather(2, group[:, None, None].expand(n, GROUP, 1)).argmax(1)[:, 0], group
        )
        best = best.float()
        least = self._least(best, seeming, norms, lost, self._dtype)
        if agree is not None:
            least = agree(best, least)
        promising = most_of_group >= least[:, None]
        promising &= (promising.sum(1) <= _MOST_GROUPS)[:, None] & least.isfinite()[:, None]
        rows, groups = promising.nonzero(as_tuple=True)
        return rows, groups, most[rows, :, groups] >= least[rows, None]

    def members(self, places: Tensor, groups: Tensor) -> Tensor:
        """The centers at these places of these groups. Neighbors are in different groups, so that
        the centers of one group are far apart.
        """
        return places * self._n_groups + groups

    def _least(
        self, best: Tensor, seeming: Tensor, norms: Tensor, lost: Tensor, scores: torch.dtype
    ) -> Tensor:
        """The least score that may be the largest in truth, float32 (n,), given the best score and
        its center.

        `scores`: the dtype that scores are written in.
        """
        # What fills up can only seem the best where all is lost.
        norm_of_best, lost_of_best, raised = self.bounds[
            seeming.clamp(max=len(self.bounds) - 1)
        ].unbind(1)
        return best - self._slack(
            best, lost * norm_of_best + norms * lost_of_best + raised, torch.finfo(scores)
        )

    def _slack(self, best: Tensor, error: Tensor, scores: torch.finfo) -> Tensor:
        """How far below the best score a score may seem and still be larger in truth, float32 (n,).
        `error`: what was added to the best.
        """
        # A score is rounded as it is written down, and so is one as far below the best as this.
        # What underflows is lost without a relative bound.
        rounding = scores.eps / 2 * (best.abs() + 3 * error) + scores.tiny * scores.eps
        slack: Tensor = 2.02 * (error * (1 + 8 * self.unit) + rounding + (self._d + 8) * 2.0**-120)
        return slack

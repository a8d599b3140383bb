"""The fused kernels of a device, once a trial there has shown them to be right."""

import logging
from functools import cache

import torch
from torch import Tensor

from assay.numerics.kmeans.distances import nearest_in_float64
from assay.numerics.kmeans.kernels import Kernels
from assay.numerics.kmeans.rounded_centers import RoundedCenters

logger = logging.getLogger(__name__)


@cache
def fused_kernels(device: torch.device) -> Kernels | None:
    """The kernels, if there are Triton and a GPU of the Ampere generation or later, and a trial
    shows that they are right there.

    Compilers have been wrong. Elsewhere, and if the trial fails, torch does the same with more
    memory and launches.
    """
    if device.type != "cuda":
        return None
    try:
        if torch.cuda.get_device_capability(device) < (8, 0):
            return None
        from assay.numerics.kmeans.fused import nearest
        from assay.numerics.kmeans.fused_rounding import round_centers
        from assay.numerics.kmeans.fused_step import move_centers

        kernels = Kernels(round_centers, nearest, move_centers)
        for dtype in (torch.float16, torch.bfloat16):
            try_nearest(kernels, device, dtype)
        try_move(kernels, device)
    except Exception as error:  # whatever goes wrong in a compiler that is not ours
        logger.warning("the fused kernels are not used: %s", error)
        return None
    return kernels


def _drawn(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """300 tokens, 1,100 distinct centers and 1,100 of which many are equal, float32, of 100
    dimensions.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(1400, 100, generator=generator, dtype=torch.float32, device="cpu").to(
        device
    )
    again = torch.randint(0, 300, (1100,), generator=generator, device="cpu").to(device)
    return drawn[:300], drawn[300:], drawn[300:][again]


def try_nearest(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    """Try rows with one candidate, with a few, and with several in several tiles."""
    x, *both = _drawn(device)
    origin = torch.zeros(x.shape[1], dtype=torch.float32, device=device)
    for centers in both:
        product = RoundedCenters(centers, origin, dtype, kernels)
        found = kernels.nearest(x, centers, origin, product)
        right, settled = found == nearest_in_float64(x, centers), found >= 0
        if not bool(right[settled].all()) or int(settled.sum()) < 200:
            raise ArithmeticError(
                f"of 300 in {dtype} it settled {int(settled.sum())}, {int(right.sum())} right"
            )


def try_move(kernels: Kernels, device: torch.device) -> None:
    """Try centers without tokens, with a few, and with a third of all."""
    x, centers, _ = _drawn(device)
    labels = torch.arange(300, device=device) * 7 % 1000
    labels[::3] = 5
    hits = torch.zeros(len(centers), dtype=torch.int64, device=device)
    hits.scatter_add_(0, labels, torch.ones_like(labels))
    counts = 2 * hits + 1
    moved, squared = kernels.move_centers(x, centers, labels, hits, counts)
    away = x.double() - centers[labels]
    pulls = torch.zeros_like(centers, dtype=torch.float64).index_add_(0, labels, away)
    wanted = centers + pulls / counts[:, None]
    worst = (
        float((moved - wanted).abs().max()),
        float((squared / away.square().sum(1) - 1).abs().max()),
    )
    if not (worst[0] < 1e-6 and worst[1] < 1e-12):
        raise ArithmeticError(
            f"of 1,100 centers one was moved {worst[0]:.1e} off, by distances {worst[1]:.1e} off"
        )

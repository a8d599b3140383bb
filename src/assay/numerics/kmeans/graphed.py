"""Steps of mini-batch k-means as CUDA graphs: a step is some sixty launches, which for small
batches take the host longer than the card.
"""

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from assay.numerics.isolation import isolated
from assay.numerics.kmeans.kernel_trial import fused_kernels
from assay.numerics.kmeans.step import QueuedStep, queue_step

logger = logging.getLogger(__name__)


class _Like(NamedTuple):
    """The properties that steps must share to use one graph."""

    device: torch.device
    tokens: torch.Size
    centers: torch.Size
    reassignment_ratio: float


class GraphedSteps:
    """`queue_step`, captured when a second batch of one shape follows the first, and replayed for
    later ones.

    The same kernels on the same numbers give the same bits. Graphs are used only with the fused
    kernels: everything else waits for the host in between. The graph's inputs and results stay on
    the card with it, and are as large as the centers and the batch once more.
    """

    def __init__(self) -> None:
        self._last: _Like | None = None
        self._graph: _StepGraph | None = None
        self._fails = False

    def __reduce__(self) -> tuple[type["GraphedSteps"], tuple[()]]:
        """A copy captures a graph of its own."""
        return GraphedSteps, ()

    def __call__(
        self, x: Tensor, centers: Tensor, counts: Tensor, reassignment_ratio: float
    ) -> QueuedStep:
        """`queue_step` on x (n, d), centers (K, d) and counts (K,), of one device."""
        if self._fails or x.dtype != torch.float32 or fused_kernels(x.device) is None:
            return queue_step(x, centers, counts, reassignment_ratio)
        like = _Like(x.device, x.shape, centers.shape, reassignment_ratio)
        follows, self._last = like == self._last, like
        if self._graph is None or self._graph.like != like:
            if not follows:
                return queue_step(x, centers, counts, reassignment_ratio)
            self._graph = None  # lets its memory go before the next takes as much
            try:
                self._graph = _StepGraph(like, x, centers, counts)
            except RuntimeError as error:  # of memory, or of a driver that captures less than ours
                self._fails = True
                logger.warning(
                    "steps are queued one launch at a time, as they could not be captured: %s",
                    error,
                )
                return queue_step(x, centers, counts, reassignment_ratio)
        return self._graph.replay(x, centers, counts)


class _StepGraph:
    """A captured step, with fixed places for its inputs and results."""

    def __init__(self, like: _Like, *inputs: Tensor) -> None:
        self.like = like
        with torch.cuda.device(like.device):
            self._inputs = [each.clone(memory_format=torch.contiguous_format) for each in inputs]
            # Once outside of the graph, on the same memory: kernels are compiled for how it is
            # aligned.
            self._queue()
            self._graph = torch.cuda.CUDAGraph()
            # Threads that copy batches may allocate meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._queued = self._queue()

    def _queue(self) -> QueuedStep:
        x, centers, counts = self._inputs
        return queue_step(x, centers, counts, self.like.reassignment_ratio)

    @isolated()
    def replay(self, *inputs: Tensor) -> QueuedStep:
        """The step on these inputs, in memory of its own."""
        for place, value in zip(self._inputs, inputs, strict=True):
            place.copy_(value)
        with torch.cuda.device(self.like.device):
            self._graph.replay()
        return QueuedStep(*(each.clone() for each in self._queued))

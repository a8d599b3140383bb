"""Memory of batches, used again once nobody holds it."""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import numpy.typing as npt
import torch

_LINE = 64

Rows = npt.NDArray[np.float32]


class Buffers:
    """Memory for batches, used again once the caller has let a batch go: to fault in fresh pages
    costs more than to read.
    """

    def __init__(self, batch_size: int, d_model: int, device: torch.device, most: int) -> None:
        self._shape = (batch_size, d_model)
        self._device = device
        # A batch's view, and its memory. No callback says when the view ends: what a signal's
        # handler raised in one would be lost.
        self._lent: deque[tuple[weakref.ref[Rows], Rows]] = deque(maxlen=most)

    def take(self, n: int) -> torch.Tensor:
        """A float32 (n, d_model) tensor that nobody else holds, pinned for CUDA; what is in it is
        undefined.
        """
        shape = (n, self._shape[1])
        if self._device.type == "cuda":
            # torch's allocator of pinned memory gives a block out again only after the copies
            # queued from it.
            return torch.empty(shape, dtype=torch.float32, pin_memory=True)
        if 2 * n < self._shape[0]:  # which would hold on to much that is empty
            return torch.from_numpy(np.empty(shape, dtype=np.float32))
        memory = self._take_back()
        if memory is None:
            memory = _aligned(self._shape)
        # The tensor's storage holds this view, and so does whatever shares it: its end is that of
        # the last of them.
        handed = memory[:n]
        self._lent.append((weakref.ref(handed), memory))
        return torch.from_numpy(handed)

    def _take_back(self) -> Rows | None:
        """The memory of a batch that nobody holds any longer, or none."""
        for place, (handed, memory) in enumerate(self._lent):
            if handed() is None:
                del self._lent[place]
                return memory
        return None


def _aligned(shape: tuple[int, int]) -> Rows:
    """Memory that begins with a line of the cache: rows that begin within one are written a fifth
    slower.
    """
    n_bytes = 4 * shape[0] * shape[1]
    # numpy asks the kernel for huge pages, torch does not.
    memory = np.empty(n_bytes + _LINE, dtype=np.uint8)
    begin = -memory.ctypes.data % _LINE
    return memory[begin : begin + n_bytes].view(np.float32).reshape(shape)

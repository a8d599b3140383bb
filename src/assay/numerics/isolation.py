"""Results that depend neither on the settings that the process gave torch, nor on later changes to
tensors.

Autocast and the gradient modes are switched off here while something is computed. Settings for all
of torch cannot be: so every tensor is made with a dtype and a device, and
`precision.float32_is_exact` is asked before a product of float32.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


@contextmanager
def isolated() -> Iterator[None]:
    """A block, or a decorated function, without autocast and gradients, whose tensors are plain
    ones even in inference mode.

    It is not for code that makes the caller's batches, which may want their settings. Nor may a
    generator yield from within it, since that would leave it on for the caller. So it goes around
    the work on each batch.
    """
    autocast = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    if not autocast and not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        yield
        return
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in autocast:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@isolated()
def snapshot(tensor: Tensor) -> Tensor:
    """A copy that shares neither memory nor history with the tensor."""
    return tensor.detach().clone()

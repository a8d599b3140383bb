"""Results that do not depend on what the process has set torch to, nor on what is done to tensors
afterwards.

Autocast and the gradient modes are switched off here, for as long as something is computed. What
the process sets for all of torch cannot be: every dtype and device is given where a tensor is made,
and `precision.float32_is_exact` is asked before a product of float32.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


@contextmanager
def isolated() -> Iterator[None]:
    """A block, or a decorated function, outside of autocast, without gradients, whose tensors are
    plain ones in inference mode too.

    Not around batches that the caller makes, which may want their settings; and a generator of the
    caller's that yields from within such a setting leaves it on for whoever asked. So it is around
    what is done with each batch.
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

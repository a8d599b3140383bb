"""A backbone of a function: what every model has in common, and all that one's own needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from assay.backbones.description import Description, Preprocessing

States = Callable[[Tensor, Sequence[int]], Sequence[Tensor] | Tensor]
"""Of pixels and block numbers: the tokens after each of these blocks."""


class CallableBackbone:
    """A vision transformer as a function, with what is the same for all: checks, normalization and
    the layers put together.

    Args:
        function: takes pixels, float32 (n, 3, height, width), normalized and on ``device``, and
            block numbers; gives the tokens after each of these blocks, in their order, each
            (n, tokens, d_model) of any float dtype: the CLS token first where the description has
            one, then the patches in reading order, and nothing else.
        description: what the model is. ``identity`` has to change whenever the activations do.
        device: where it computes.

    Examples:
        A module with a list of blocks::

            def backbone(device, precision):
                model = MyModel().eval().to(device, getattr(torch, precision))

                def states(pixels, layers):
                    tokens, found = model.embed(pixels.to(model.dtype)), {}
                    for number, block in enumerate(model.blocks[: max(layers) + 1]):
                        found[number] = tokens = block(tokens)
                    return [found[layer] for layer in layers]

                return CallableBackbone(states, DESCRIPTION, device)
    """

    def __init__(self, function: States, description: Description, device: torch.device) -> None:
        self.description = description
        self._function = function
        self._device = device

    def record(self, images: Tensor, layers: Sequence[int]) -> Tensor:
        """The tokens after each of some blocks; see `Backbone`.

        Args:
            images: uint8 (n, height, width, 3), on any device.
            layers: block numbers, each once.

        Returns:
            float32 (n, n_layers, tokens, d_model) on the model's device.

        Raises:
            ValueError: the images are none, or no multiple of the patch size; there is no such
                layer; the function gives tokens of another shape.
        """
        check_layers(layers, self.description)
        tokens = check_images(images, self.description)
        with (
            torch.inference_mode(),
            torch.autocast(self._device.type, enabled=False),
            exact_convolutions(self._device),
        ):
            shown = images.to(self._device, non_blocking=True)  # of pinned ones, without a wait
            pixels = normalize(shown, self.description.preprocessing)
            states = self._function(pixels, list(layers))
            wanted = (len(images), tokens, self.description.d_model)
            found = [tuple(state.shape) for state in states]
            if found != [wanted] * len(layers):
                raise ValueError(
                    f"{self.description.ckpt}: found tokens of shape {found}, expected"
                    f" {len(layers)} x {wanted}, (n, tokens, d_model), for images of"
                    f" {tuple(images.shape[1:3])} pixels"
                )
            return torch.stack([state.float() for state in states], dim=1)


def normalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Pixels as a model sees them, float32 (n, 3, height, width).

    They are of images, uint8 (n, height, width, 3).
    """
    mean, std = (
        torch.tensor(each, dtype=torch.float32).to(images.device, non_blocking=True)
        for each in (preprocessing.mean, preprocessing.std)
    )
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def check_layers(layers: Sequence[int], description: Description) -> None:
    """Raises ValueError if a layer is not there, or twice, or there is none."""
    if (
        not layers
        or len(set(layers)) < len(layers)
        or not set(layers) <= set(range(description.n_blocks))
    ):
        raise ValueError(
            f"found layers {list(layers)}, expected block numbers from 0 to"
            f" {description.n_blocks - 1}, each once: {description.ckpt} has"
            f" {description.n_blocks} blocks"
        )


def check_images(images: Tensor, description: Description) -> int:
    """How many tokens a model keeps of each image, CLS token counted.

    Raises:
        ValueError: they are not uint8 (n, height, width, 3) on whole patches.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(
            f"found images of {images.dtype} {tuple(images.shape)}, expected uint8 (n, height,"
            " width, 3)"
        )
    height, width = images.shape[1:3]
    side = description.patch_size
    if height < side or width < side or height % side or width % side:
        raise ValueError(
            f"found images of {height} x {width} pixels, expected multiples of the patch size"
            f" {side} of {description.ckpt}: change the grid"
        )
    return (height // side) * (width // side) + description.cls_token


def exact_convolutions(device: torch.device) -> AbstractContextManager[None]:
    """A block in which a GPU neither rounds what goes into a convolution of float32, as patches
    are embedded by one, to 10 bits, nor picks its algorithm by the clock. It does both by default.
    """
    if device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )

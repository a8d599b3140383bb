"""What a vision transformer is, and what it does for a recording: the same for every library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Preprocessing:
    """How a checkpoint wants its images.

    Attributes:
        mean: of each channel, of values from 0 to 1.
        std: likewise; (value - mean) / std is what the model sees.
        size: (height, width) in pixels of what it is shown, after any crop.
        resize: pixels of the shorter side before a center crop; None: the image is stretched to
            ``size``.
        resample: `bilinear`, `bicubic` or `lanczos`.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: tuple[int, int]
    resize: int | None
    resample: str


@dataclass(frozen=True)
class Description:
    """What a vision transformer is, known before its weights are loaded.

    Attributes:
        family: `dinov2`, `dinov3`, `clip` or `siglip`, as saev says, or `vit`, `deit`, `beit`,
            `mae`, `ijepa`; another model's own.
        ckpt: its name on the Hub, or its folder's.
        d_model: numbers per token.
        n_blocks: layers that can be recorded: 0 to n_blocks - 1.
        patch_size: pixels of a patch's side.
        cls_token: whether it has a CLS token.
        preprocessing: how it wants its images.
        identity: what its activations depend on besides the images: the library and its version,
            the commit where the Hub gave one, digests of the configuration and the weights, and
            the normalization. Two backbones of equal identity are the same.
    """

    family: str
    ckpt: str
    d_model: int
    n_blocks: int
    patch_size: int
    cls_token: bool
    preprocessing: Preprocessing
    identity: dict[str, str]


class Backbone(Protocol):
    """A vision transformer that is ready to be shown images."""

    @property
    def description(self) -> Description:
        """What it is."""

    def record(self, images: Tensor, layers: Sequence[int]) -> Tensor:
        """The tokens after each of some blocks, float32 (n, n_layers, tokens, d_model), on the
        model's device, the layers as they are given.

        The CLS token comes first where there is one, then the patches in reading order. Registers
        and a distillation token are left out. What comes after the last of the blocks is not
        computed.

        Args:
            images: uint8 (n, height, width, 3), on any device. Both sides are multiples of the
                patch size; they may be other than the checkpoint's.
            layers: block numbers, from 0, each once.

        Raises:
            ValueError: a layer or a size that the model does not have.
        """

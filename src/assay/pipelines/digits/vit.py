"""A small vision transformer, its training on patch classification, and the recording of its
residual stream.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional

from assay.pipelines.digits.canvases import VOID
from assay.pipelines.signs_of_life import Bar

logger = logging.getLogger(__name__)

MLP_RATIO = 2
INK_STD = 0.2
"""Roughly the standard deviation of a canvas's pixels. Unscaled ink makes learning slow."""

WARMUP = 0.1
WEIGHT_DECAY = 0.01


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Maps float32 (n, tokens, d_model) to the same shape.
    """

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1 = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, MLP_RATIO * d_model),
            nn.GELU(),
            nn.Linear(MLP_RATIO * d_model, d_model),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add what attention and the perceptron make of the stream to it."""
        n, tokens, d_model = x.shape
        heads = self.qkv(self.norm1(x)).view(n, tokens, 3, self.n_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attended.transpose(1, 2).reshape(n, tokens, d_model))
        hidden: Tensor = self.mlp(self.norm2(x))
        return x + hidden


class VisionTransformer(nn.Module):
    """Patch embedding, a CLS token, learned positions, pre-norm blocks and a linear head on every
    patch.

    After Dosovitskiy et al. 2021, "An Image Is Worth 16x16 Words", with the head on the patches.

    Args:
        image_size: height and width of the one-channel images, in pixels.
        patch_size: height and width of a patch, in pixels; divides image_size.
        d_model: width of the residual stream; n_heads divides it.
        n_blocks: transformer blocks.
        n_heads: attention heads a block.
        n_classes: outputs of the head, void included.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        d_model: int,
        n_blocks: int,
        n_heads: int,
        n_classes: int,
    ) -> None:
        super().__init__()
        n_patches = (image_size // patch_size) ** 2
        self.embed = nn.Conv2d(1, d_model, kernel_size=patch_size, stride=patch_size)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, d_model))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + n_patches, d_model))
        self.blocks = nn.ModuleList(Block(d_model, n_heads) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, n_classes)

    def residual_stream(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the residual stream after each block, float32 (n, 1 + patches, d_model), CLS first.

        Args:
            images: float32 (n, image_size, image_size), ink in [0, 1].
        """
        patches = self.embed(images.unsqueeze(1) / INK_STD).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(images), -1, -1), patches], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
            yield x

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every patch, float32 (n, patches, n_classes), for images as in
        `residual_stream`.
        """
        *_, last = self.residual_stream(images)
        logits: Tensor = self.head(self.norm(last[:, 1:]))
        return logits


def schedule(step: int, n_steps: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up over the first tenth, then half a
    cosine to 0.
    """
    warmup = max(1, round(WARMUP * n_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup)))


def train(
    model: VisionTransformer,
    images: Tensor,
    labels: Tensor,
    *,
    n_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> list[float]:
    """Train the model in place to name the class of every patch that is not void.

    AdamW with warm-up and cosine decay on mini-batches drawn with replacement from a generator of
    its own.

    Args:
        model: the model, changed in place and left in eval mode.
        images: float32 (n, image_size, image_size), ink in [0, 1].
        labels: uint8 (n, patches), the class of each patch; void (0) counts for nothing.
        n_steps: optimizer steps.
        batch_size: images per step.
        learning_rate: peak learning rate.
        seed: of the mini-batches.

    Returns:
        The loss at each step: cross-entropy in nats, mean over the batch's patches that are not
            void.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True
    )
    losses: list[float] = []
    model.train()
    with Bar(desc="training the vision transformer", total=n_steps, unit=" steps") as bar:
        for step in range(n_steps):
            batch = torch.randint(len(images), (batch_size,), generator=generator)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule(step, n_steps)
            logits, wanted = model(images[batch]).flatten(0, 1), labels[batch].flatten().long()
            loss = functional.cross_entropy(logits, wanted, ignore_index=VOID)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.item())
            bar.update()
    model.eval()
    logger.info(
        "trained a vision transformer for %d steps: loss %.3f to %.3f nats",
        n_steps,
        losses[0],
        losses[-1],
    )
    return losses


def record(
    model: VisionTransformer, images: Tensor, layers: Sequence[int], batch_size: int
) -> Iterator[Tensor]:
    """Stream the residual stream after the given blocks.

    Args:
        model: the model, put in eval mode.
        images: float32 (n, image_size, image_size), ink in [0, 1].
        layers: numbers of the blocks, from 0, in the order wanted on the layer axis.
        batch_size: images per batch.

    Yields:
        float32 (batch, n_layers, 1 + patches, d_model), CLS first, in the images' order.
    """
    model.eval()
    for batch in torch.split(images, batch_size):
        with torch.no_grad():
            stream = list(islice(model.residual_stream(batch), max(layers) + 1))
            recorded = torch.stack([stream[layer] for layer in layers], dim=1)
        yield recorded

"""The embedded default."""

from __future__ import annotations

import hashlib
import json
from typing import Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from assay.parameters.fields import Section


class DigitsParameters(Section):
    """The embedded default: digits on canvases, and a small vision transformer. Equal parameters
    give equal bytes on one machine.
    """

    seed: int = Field(
        0, ge=0, lt=2**32, description="seed of the digits' deal, the canvases and the training"
    )
    image_size: PositiveInt = Field(32, description="height and width of a canvas, in pixels")
    patch_size: PositiveInt = Field(
        4, description="height and width of a patch, in pixels; divides image_size"
    )
    digits_per_image: PositiveInt = Field(3, description="digits on a canvas")
    d_model: PositiveInt = Field(96, description="width of the residual stream")
    n_blocks: PositiveInt = Field(4, description="transformer blocks")
    n_heads: PositiveInt = Field(4, description="attention heads a block; divides d_model")
    layers: tuple[int, ...] = Field((0, 2, 3), description="blocks recorded after, numbered from 0")
    train_images: PositiveInt = Field(2000, description="canvases to train on")
    train_steps: PositiveInt = Field(200, description="optimizer steps")
    train_batch: PositiveInt = Field(16, description="canvases an optimizer step")
    learning_rate: PositiveFloat = Field(3e-3, description="peak learning rate of AdamW")
    n_fit: PositiveInt = Field(500, description="images of the split fit")
    n_val: PositiveInt = Field(200, description="images of the split val")
    n_probe_train: PositiveInt = Field(400, description="images of the split probe_train")
    n_probe_val: PositiveInt = Field(200, description="images of the split probe_val")
    max_tokens_per_shard: PositiveInt = Field(
        25_000, description="tokens per shard file, counted once for every layer"
    )

    @model_validator(mode="after")
    def check_together(self) -> Self:
        """Check what only several fields can say."""
        if self.image_size % self.patch_size:
            raise ValueError(
                f"found image_size {self.image_size} and patch_size {self.patch_size}, want one"
                " that divides it"
            )
        if self.d_model % self.n_heads:
            raise ValueError(
                f"found d_model {self.d_model} and n_heads {self.n_heads}, want n_heads that"
                " divide it"
            )
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"found layers {list(self.layers)}, want at least one, and none twice")
        if not all(0 <= layer < self.n_blocks for layer in self.layers):
            raise ValueError(
                f"found layers {list(self.layers)}, want block numbers from 0 to"
                f" {self.n_blocks - 1}, or more blocks than n_blocks {self.n_blocks}"
            )
        tokens = len(self.layers) * (1 + self.n_patches)
        if self.max_tokens_per_shard < tokens:
            raise ValueError(
                f"found max_tokens_per_shard {self.max_tokens_per_shard}, want at least {tokens},"
                " one image's tokens"
            )
        return self

    @property
    def n_patches(self) -> int:
        """Patches per image."""
        return (self.image_size // self.patch_size) ** 2

    def n_images(self, split: str) -> int:
        """Images of a split."""
        return {
            "fit": self.n_fit,
            "val": self.n_val,
            "probe_train": self.n_probe_train,
            "probe_val": self.n_probe_val,
        }[split]

    @property
    def model_family(self) -> str:
        """What the shards' metadata calls the vision transformer's family: one that saev knows, or
        it would not open them.
        """
        return "fake-clip"

    @property
    def model_ckpt(self) -> str:
        """What the shards' metadata calls the vision transformer: other parameters make another."""
        return f"digits-vit-{self.fingerprint()}"

    def fingerprint(self) -> str:
        """First 12 hex digits of a SHA-256 over all the parameters."""
        return hashlib.sha256(
            json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()
        ).hexdigest()[:12]

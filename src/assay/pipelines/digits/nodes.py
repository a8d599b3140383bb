"""The embedded default data: a small vision transformer trained on canvases of digits, and its
activations.

Four splits play the parts of the real data sets: ``fit`` that of IN1K/train, ``val`` of IN1K/val,
``probe_train`` of ADE20K/train and ``probe_val`` of ADE20K/val. scikit-learn's 1,797 digits are
dealt out to them once, by the seed, so that no source digit is in two splits. The transformer is
trained on the digits of ``fit``, on canvases of their own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay.io.shards.labels import patch_labels
from assay.parameters import DigitsParameters
from assay.pipelines.digits.canvases import DIGIT_SIZE, N_CLASSES, Canvases, draw_canvases
from assay.pipelines.digits.vit import VisionTransformer, record, train

SOURCE_SHARES = {"fit": 0.5, "val": 0.1, "probe_train": 0.25, "probe_val": 0.15}
"""Share of the source digits that each split draws from."""

RECORD_BATCH = 64
"""Images a recorded batch."""


@dataclass(frozen=True, eq=False)
class Recording:
    """One split's activations and labels, as a shard writer wants them.

    Attributes:
        metadata: JSON scalars and lists, under the names of the shard protocol.
        labels: uint8 (n_images, patches), 0 for void, digit + 1 otherwise.
        images: float32 (n_images, image_size, image_size), ink in [0, 1].
        model: the trained transformer, in eval mode.
    """

    metadata: dict[str, Any]
    labels: NDArray[np.uint8]
    images: NDArray[np.float32]
    model: VisionTransformer

    @property
    def examples(self) -> Iterator[Tensor]:
        """A fresh stream of float32 (batch, n_layers, 1 + patches, d_model), CLS first, in the
        images' order.
        """
        return record(
            self.model, torch.from_numpy(self.images), self.metadata["layers"], RECORD_BATCH
        )


def deal_digits(seed: int, n_digits: int) -> dict[str, NDArray[np.int64]]:
    """Deal the source digits' indices out to the splits, each to one, as `SOURCE_SHARES` says."""
    order = np.random.default_rng(seed).permutation(n_digits)
    ends = np.round(np.cumsum(list(SOURCE_SHARES.values())) * n_digits).astype(int)
    return dict(zip(SOURCE_SHARES, np.split(order, ends[:-1]), strict=True))


def draw_split(parameters: DigitsParameters, split: str, *, n_images: int, stream: int) -> Canvases:
    """Draw canvases from a split's source digits; streams of one seed are independent."""
    from sklearn.datasets import load_digits  # a second of imports that no other run needs

    digits, targets = load_digits(return_X_y=True)
    dealt = deal_digits(parameters.seed, len(digits))[split]
    return draw_canvases(
        digits[dealt].reshape(-1, DIGIT_SIZE, DIGIT_SIZE),
        targets[dealt],
        n_images=n_images,
        size=parameters.image_size,
        digits_per_image=parameters.digits_per_image,
        # A transformer this small learns in seconds only if a digit is cut into patches in one way,
        # not in sixteen.
        stride=parameters.patch_size,
        seed=np.random.SeedSequence([parameters.seed, stream]),
    )


def draw_images(parameters: DigitsParameters, *, split: str) -> NDArray[np.uint8]:
    """The canvases that `record_split` shows the transformer, uint8 (n_images, image_size,
    image_size), ink dark on white.
    """
    images = _draw_canvases(parameters, split).images
    return np.round(255 * (1 - images)).astype(np.uint8)


def train_vit(parameters: DigitsParameters) -> VisionTransformer:
    """Train the vision transformer on canvases of the digits of ``fit``. Global random state is
    left as it was.
    """
    canvases = draw_split(
        parameters, "fit", n_images=parameters.train_images, stream=len(SOURCE_SHARES)
    )
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which seeds accelerators as well, and fork_rng restores none of
        # those here.
        torch.default_generator.manual_seed(parameters.seed)
        model = VisionTransformer(
            image_size=parameters.image_size,
            patch_size=parameters.patch_size,
            d_model=parameters.d_model,
            n_blocks=parameters.n_blocks,
            n_heads=parameters.n_heads,
            n_classes=N_CLASSES,
        )
    train(
        model,
        torch.from_numpy(canvases.images),
        torch.from_numpy(patch_labels(canvases.masks, parameters.patch_size)),
        n_steps=parameters.train_steps,
        batch_size=parameters.train_batch,
        learning_rate=parameters.learning_rate,
        seed=parameters.seed,
    )
    return model


def record_split(model: VisionTransformer, parameters: DigitsParameters, split: str) -> Recording:
    """Draw a split's canvases and label their patches; the activations are streamed as they are
    read.

    Args:
        model: what `train_vit` made of the same parameters.
        parameters: all of them, named in the metadata by their fingerprint.
        split: ``fit``, ``val``, ``probe_train`` or ``probe_val``.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SOURCE_SHARES:
        raise ValueError(f"found split {split!r}, want one of {', '.join(SOURCE_SHARES)}")
    canvases = _draw_canvases(parameters, split)
    metadata = {
        "family": parameters.model_family,
        "ckpt": parameters.model_ckpt,
        "layers": list(parameters.layers),
        "content_tokens_per_example": parameters.n_patches,
        "cls_token": True,
        "d_model": parameters.d_model,
        "n_examples": len(canvases.images),
        "max_tokens_per_shard": parameters.max_tokens_per_shard,
        "data": "",
        "dataset": f"digits/{split}",
        "pixel_agg": "prefer-fg",
        "dtype": "float32",
        "protocol": "2.1",
    }
    return Recording(
        metadata, patch_labels(canvases.masks, parameters.patch_size), canvases.images, model
    )


def _draw_canvases(parameters: DigitsParameters, split: str) -> Canvases:
    return draw_split(
        parameters,
        split,
        n_images=parameters.n_images(split),
        stream=list(SOURCE_SHARES).index(split),
    )

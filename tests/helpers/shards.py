"""Folders of shards, made and read back without the reader that is under test."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from assay.io.shards import write_shards
from assay.io.shards.metadata import Metadata

FIELDS: dict[str, Any] = {
    "family": "fake",
    "ckpt": "tiny",
    "layers": [3, 5],
    "content_tokens_per_example": 3,
    "cls_token": True,
    "d_model": 2,
    "n_examples": 5,
    "max_tokens_per_shard": 17,
    "data": "Z2FyYmFnZQ==",
    "dataset": "none",
    "pixel_agg": "majority",
    "dtype": "float32",
    "protocol": "2.1",
}
"""A metadata.json as saev writes it: 5 examples in shards of 2, so that the last of 3 is padded."""
OLD_NAMES = {
    "family": ["vit_family", "model_family"],
    "ckpt": ["vit_ckpt", "model_ckpt"],
    "content_tokens_per_example": ["patches_per_ex", "n_patches_per_img"],
    "n_examples": ["n_imgs"],
    "max_tokens_per_shard": ["patches_per_shard", "max_patches_per_shard"],
}
"""What older files call them."""

PLANTED_LAYERS, PLANTED_TOKENS, PLANTED_WIDTH, PLANTED_CLASSES = (3, 5), 16, 80, 4


def make_metadata(**changes: Any) -> Metadata:
    """`FIELDS`, with these changes."""
    return Metadata.model_validate(FIELDS | changes)


def make_examples(metadata: Metadata, seed: int = 0) -> npt.NDArray[np.float32]:
    """Normal numbers (n_examples, layers, tokens, d_model)."""
    shape = (metadata.n_examples, *metadata.example_shape)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make_labels(metadata: Metadata) -> npt.NDArray[np.uint8]:
    """Labels (n_examples, content_tokens_per_example) of all 256 classes."""
    shape = (metadata.n_examples, metadata.content_tokens_per_example)
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def make_shards(
    root: Path,
    examples: npt.NDArray[np.float32] | torch.Tensor | None = None,
    labels: npt.NDArray[Any] | torch.Tensor | None = None,
    **changes: Any,
) -> Path:
    """Write a folder of shards under `root`, and give its path.

    Args:
        root: the folder that will hold it.
        examples: float32 (n_examples, layers, tokens, d_model), whose sizes are those of the
            metadata unless `changes` says otherwise; without them `make_examples`.
        labels: (n_examples, content_tokens_per_example); without them there are none.
        changes: of `FIELDS`.
    """
    if examples is not None:
        n_examples, _, tokens, d_model = examples.shape
        patches = tokens - (FIELDS | changes)["cls_token"]
        sizes = {"n_examples": n_examples, "content_tokens_per_example": patches}
        changes = sizes | {"d_model": d_model} | changes
    metadata = make_metadata(**changes)
    if examples is None:
        examples = make_examples(metadata)
    return write_shards(root, metadata, [examples], labels)


def make_labeled(root: Path, **changes: Any) -> Path:
    """Shards of `make_examples`, with `make_labels`."""
    return make_shards(root, labels=make_labels(make_metadata(**changes)), **changes)


def content(
    examples: npt.NDArray[np.float32], metadata: Metadata, layer: int
) -> npt.NDArray[np.float32]:
    """A layer's content tokens (n, d_model), by plain indexing of the whole array."""
    return examples[:, metadata.layers.index(layer), int(metadata.cls_token) :].reshape(
        -1, metadata.d_model
    )


def read_content(folder: Path, layer: int) -> npt.NDArray[np.float64]:
    """A layer's content tokens (n, d_model), float64, straight from the files: all of them are full
    but for zeros at the end.
    """
    metadata = Metadata.model_validate_json((folder / "metadata.json").read_bytes())
    stored = [np.fromfile(file, "<f4") for file in sorted(folder.glob("acts*.bin"))]
    examples = np.concatenate(stored).reshape(-1, *metadata.example_shape)
    return content(examples[: metadata.n_examples], metadata, layer).astype(np.float64)


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Write a JSON file again as `change` leaves its value, or with the value that it gives."""
    value = json.loads(path.read_text(encoding="utf-8"))
    changed = change(value)
    path.write_text(json.dumps(value if changed is None else changed), encoding="utf-8")


def write_planted(root: Path, n_examples: int, seed: int) -> Path:
    """Shards of labeled tokens whose class moves their mean, far in the second layer and a little
    in the first; 0 is void.
    """
    directions = np.random.default_rng(7).normal(
        size=(len(PLANTED_LAYERS), PLANTED_CLASSES, PLANTED_WIDTH)
    )
    directions *= np.array([0.05, 1.0])[:, None, None]
    scales = np.geomspace(3, 0.1, PLANTED_WIDTH)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, PLANTED_CLASSES, size=(n_examples, PLANTED_TOKENS)).astype(np.uint8)
    noise = (
        rng.normal(size=(n_examples, len(PLANTED_LAYERS), PLANTED_TOKENS, PLANTED_WIDTH)) * scales
        + 5
    )
    content = noise + np.moveaxis(directions[:, labels], 0, 1)
    cls_token = np.full((n_examples, len(PLANTED_LAYERS), 1, PLANTED_WIDTH), 1e3)
    return make_shards(
        root,
        np.concatenate([cls_token, content], axis=2).astype(np.float32),
        labels,
        family="planted",
        ckpt="planted-tiny",
        layers=list(PLANTED_LAYERS),
        max_tokens_per_shard=10 * len(PLANTED_LAYERS) * (PLANTED_TOKENS + 1),
        data="",
        dataset=f"planted/{seed}",
        pixel_agg=None,
    )

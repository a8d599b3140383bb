"""Vision transformers of random weights, small, as transformers saves them; and images of classes
that can be told by their color.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE, PATCH, WIDTH, BLOCKS = 32, 8, 32, 3

COLORS = ((128, 128, 128), (255, 0, 0), (0, 255, 0), (0, 0, 255))
"""Of the ids in masks; 0 is void."""

PREFIX = {"dinov2_with_registers": 5, "dinov3_vit": 5, "clip": 1, "siglip": 0}
"""Tokens before the patches: CLS and registers."""

PREPROCESSING = {
    "do_resize": True,
    "size": {"height": SIZE, "width": SIZE},
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.3],
    "resample": 3,
}


def make_model(kind: str) -> Any:
    """A model of random weights, of `BLOCKS` blocks, in eval mode."""
    import torch
    import transformers

    classes = {
        "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"),
        "dinov3_vit": ("DINOv3ViTConfig", "DINOv3ViTModel"),
        "clip": ("CLIPVisionConfig", "CLIPVisionModel"),
        "siglip": ("SiglipVisionConfig", "SiglipVisionModel"),
    }
    config, model = (getattr(transformers, name) for name in classes[kind])
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": PATCH,
    }
    sizes |= {"mlp_ratio": 2} if kind == "dinov2_with_registers" else {"intermediate_size": 64}
    if kind.startswith("dino"):
        sizes["num_register_tokens"] = PREFIX[kind] - 1
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(7)
        return model(config(**sizes)).eval()


def write_model(folder: Path, kind: str = "dinov2_with_registers") -> Path:
    """A checkpoint as a folder: config.json, model.safetensors and preprocessor_config.json."""
    make_model(kind).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    return folder


def write_images(root: Path, n: int, seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> Path:
    """Images and masks of colored squares, `root/images/a/000.png` and `root/masks/a/000.png`."""
    rng = np.random.default_rng(seed)
    for number in range(n):
        ids = np.kron(rng.integers(0, len(COLORS), (4, 4)), np.ones((size[0] // 4, size[1] // 4)))
        noise = rng.integers(-20, 21, (*ids.shape, 3))
        pixels = np.clip(np.array(COLORS)[ids.astype(int)] + noise, 0, 255)
        for name, array in (("images", pixels), ("masks", ids)):
            path = root / name / "ab"[number % 2] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(path)
    return root

"""Backbones of timm: `timm:NAME`. Its own files are read, safetensors alone, so that what a model
is can be told without timm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.backbones.callable import CallableBackbone
from assay.backbones.description import Backbone, Description, Precision, Preprocessing
from assay.backbones.files import Checkpoint, find_checkpoint
from assay.backbones.library import cast_weights, library_identity, normalization_identity
from assay.io.strict_json import shown

PREFIX = "timm:"
LIBRARY = "timm"
REMEDY = "pip install timm, and the torchvision that fits your torch"

AFTER_THE_BLOCKS = ("attn_pool.", "fc_norm.", "head.", "head_dist.", "norm.")
"""Weights that no block's output depends on."""

_BLOCK = re.compile(r"blocks\.(\d+)\.")


def look(typed: str, revision: str | None) -> Description:
    """What a model of timm is, from its files.

    Raises:
        FileNotFoundError: see `find_checkpoint`.
        ValueError: see `find_checkpoint`; timm is not installed; the files are no plain vision
            transformer's.
    """
    return _describe(_find(typed, revision), library_identity(LIBRARY, REMEDY))


def open_backbone(
    typed: str, revision: str | None, *, device: torch.device, precision: Precision
) -> Backbone:
    """A model of timm, in eval mode on a device, its weights in a precision.

    Raises:
        FileNotFoundError: see `look`.
        ValueError: see `look`; weights are missing or of another shape; timm knows no such
            architecture.
    """
    library = library_identity(LIBRARY, REMEDY)
    checkpoint = _find(typed, revision)
    description = _describe(checkpoint, library)
    model = _load(checkpoint)
    cast_weights(model, getattr(torch, precision))
    model.eval().to(device)

    def states(pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        found = model.forward_intermediates(
            pixels.to(getattr(torch, precision)),
            indices=sorted(layers),
            return_prefix_tokens=True,
            norm=False,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        by_layer = dict(zip(sorted(layers), found, strict=True))
        return [_with_cls_token(by_layer[layer], description.cls_token) for layer in layers]

    return CallableBackbone(states, description, device)


def _with_cls_token(found: Tensor | tuple[Tensor, Tensor], cls_token: bool) -> Tensor:
    """Patches with the CLS token before them, of what timm gives: patches and the tokens before
    them, of which registers come after the CLS token, or patches alone where a model has no such.
    """
    if isinstance(found, Tensor):
        return found
    patches, prefix = found
    return torch.cat([prefix[:, : int(cls_token)], patches], dim=1)


def _find(typed: str, revision: str | None) -> Checkpoint:
    """timm's own models are those of its owner on the Hub."""
    name = typed.removeprefix(PREFIX)
    is_own = "/" not in name and not Path(name).is_dir()
    return find_checkpoint(f"hf:{LIBRARY}/{name}" if is_own else name, revision)


def _describe(checkpoint: Checkpoint, library: dict[str, str]) -> Description:
    shapes = checkpoint.shapes
    embedding = shapes.get("patch_embed.proj.weight", ())
    blocks = {int(found[1]) for name in shapes if (found := _BLOCK.match(name))}
    if len(embedding) != 4 or embedding[2] != embedding[3] or blocks != set(range(len(blocks))):
        raise ValueError(
            f"{checkpoint.typed}: found no weights of square patches and numbered blocks, wanted a"
            " vision transformer of timm's"
        )
    try:
        preprocessing = parse_timm_preprocessing(checkpoint.config.get("pretrained_cfg"))
    except ValueError as error:
        raise ValueError(f"{checkpoint.typed}: config.json: {error}") from None
    return Description(
        family="timm",
        ckpt=checkpoint.name,
        d_model=embedding[0],
        n_blocks=len(blocks),
        patch_size=embedding[2],
        cls_token="cls_token" in shapes,
        preprocessing=preprocessing,
        identity=library | checkpoint.identity() | normalization_identity(preprocessing),
    )


def parse_timm_preprocessing(said: Any) -> Preprocessing:
    """What `pretrained_cfg` says of images.

    Raises:
        ValueError: it leaves something out, or crops in another way than the center.
    """
    if not isinstance(said, dict):
        raise ValueError(  # noqa: TRY004
            "found no pretrained_cfg, wanted what push_to_hf_hub writes"
        )
    mode = said.get("crop_mode", "center")
    if mode not in ("center", "squash"):
        raise ValueError(f"found crop_mode {shown(mode)}, wanted center or squash")
    resample = said.get("interpolation")
    if resample not in ("bilinear", "bicubic", "lanczos"):
        raise ValueError(
            f"found interpolation {shown(resample)}, wanted bilinear, bicubic or lanczos"
        )
    try:
        _, height, width = map(int, said["input_size"])
        red, green, blue = map(float, said["mean"])
        of_red, of_green, of_blue = map(float, said["std"])
        side = math.floor(min(height, width) / float(said.get("crop_pct", 1)))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"found no such numbers ({shown(error)}), wanted input_size (3, height, width), mean"
            " and std of three channels and crop_pct"
        ) from None
    return Preprocessing(
        (red, green, blue),
        (of_red, of_green, of_blue),
        (height, width),
        side if mode == "center" else None,
        resample,
    )


def _load(checkpoint: Checkpoint) -> Any:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # torchvision's, of another build of torch
        raise ValueError(
            f"{checkpoint.typed}: found timm, which cannot be imported ({shown(error)}): {REMEDY}"
        ) from error
    from safetensors.torch import load_file

    config = checkpoint.config
    weights = {
        name: weight
        for path in checkpoint.weights
        for name, weight in load_file(path).items()
        if not name.startswith(AFTER_THE_BLOCKS)
    }
    try:
        model = timm.create_model(
            config["architecture"],
            pretrained=False,
            **(config.get("model_args") or {}) | {"num_classes": 0, "dynamic_img_size": True},
        )
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except (KeyError, TypeError, RuntimeError, ValueError, AssertionError) as error:
        said = shown((str(error).strip().splitlines() or [""])[0])
        raise ValueError(
            f"{checkpoint.typed}: found what timm cannot load ({said}), wanted a vision transformer"
            " of any size of image, and weights that fit config.json"
        ) from error
    missing = [name for name in missing if not name.startswith(AFTER_THE_BLOCKS)]
    if wrong := [*missing, *unexpected]:
        raise ValueError(
            f"{checkpoint.typed}: found weights that do not fit, {', '.join(wrong[:3])}"
            f" ({len(missing)} missing, {len(unexpected)} unexpected), wanted all of"
            f" {config['architecture']}: fetch it again"
        )
    return model

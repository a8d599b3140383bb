"""The families of vision transformers that transformers has and this reads: what of a configuration
says how large a model is and which tokens it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from assay.io.strict_json import shown


@dataclass(frozen=True)
class Family:
    """Models of one `model_type`.

    Attributes:
        name: `dinov2`, `dinov3`, `clip` or `siglip`, as saev says, or our own.
        model_class: transformers' class of the vision model alone.
        defaults: what transformers takes where the configuration is silent: it leaves out what
            is as these within a larger model's.
        cls_token: whether there is one, the first token.
        extra_tokens: further tokens before the patches: their number, or the key that says it.
        interpolates: whether another size of image has to be asked for.
        arguments: of the class, for what is not needed.
    """

    name: str
    model_class: str
    defaults: Mapping[str, int]
    cls_token: bool = True
    extra_tokens: int | str = 0
    interpolates: bool = True
    arguments: Mapping[str, Any] | None = None


def _sizes(image_size: int, patch_size: int, **more: int) -> dict[str, int]:
    base = {"hidden_size": 768, "num_hidden_layers": 12}
    return base | {"image_size": image_size, "patch_size": patch_size} | more


_REGISTERS = "num_register_tokens"
_NO_POOLER = {"add_pooling_layer": False}
_CLIP = Family("clip", "CLIPVisionModel", _sizes(224, 32))
_SIGLIP = Family("siglip", "SiglipVisionModel", _sizes(224, 16), cls_token=False)

FAMILIES = {
    "dinov2": Family("dinov2", "Dinov2Model", _sizes(224, 14), interpolates=False),
    "dinov2_with_registers": Family(
        "dinov2",
        "Dinov2WithRegistersModel",
        _sizes(224, 16, num_register_tokens=4),
        extra_tokens=_REGISTERS,
        interpolates=False,
    ),
    "dinov3_vit": Family(
        "dinov3",
        "DINOv3ViTModel",
        _sizes(224, 16, hidden_size=384, num_register_tokens=0),
        extra_tokens=_REGISTERS,
        interpolates=False,
    ),
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "vit": Family("vit", "ViTModel", _sizes(224, 16), arguments=_NO_POOLER),
    "deit": Family("deit", "DeiTModel", _sizes(224, 16), extra_tokens=1, arguments=_NO_POOLER),
    "beit": Family("beit", "BeitModel", _sizes(224, 16), arguments=_NO_POOLER),
    # A mask would leave out patches.
    "vit_mae": Family("mae", "ViTMAEModel", _sizes(224, 16), arguments={"mask_ratio": 0.0}),
    "ijepa": Family("ijepa", "IJepaModel", _sizes(224, 16), cls_token=False, arguments=_NO_POOLER),
}


@dataclass(frozen=True)
class Sizes:
    """What a configuration says of a model.

    Attributes:
        d_model: numbers per token.
        n_blocks: layers.
        patch_size: pixels of a patch's side.
        image_size: (height, width) in pixels that its positions are of.
        n_extra: tokens between the CLS token, if there is one, and the patches.
    """

    d_model: int
    n_blocks: int
    patch_size: int
    image_size: tuple[int, int]
    n_extra: int


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a model, by its config.json.

    Raises:
        ValueError: it has code of its own, is quantized, or is of no family that is known.
    """
    if "auto_map" in config:
        raise ValueError(
            f"found code of its own ({shown(config['auto_map'])[:80]}), which is never run; wanted"
            " a model of transformers', or python:package.module:function for what you trust"
        )
    if config.get("quantization_config") is not None:
        raise ValueError("found quantized weights, wanted those of float32, float16 or bfloat16")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"found model_type {shown(kind)}, wanted one of {', '.join(FAMILIES)}; timm:NAME and"
            " python:package.module:function give others"
        )
    return FAMILIES[kind]


def read_sizes(config: Mapping[str, Any], family: Family) -> Sizes:
    """How large a model is, by its config.json.

    Raises:
        ValueError: a number is missing or none.
    """
    if config["model_type"] in ("clip", "siglip"):
        config = config.get("vision_config") or {}
    image_size, patch_size = (_pair(config, family, key) for key in ("image_size", "patch_size"))
    if patch_size[0] != patch_size[1]:
        raise ValueError(f"found patch_size {patch_size}, wanted square patches")
    extra = family.extra_tokens
    return Sizes(
        _number(config, family, "hidden_size"),
        _number(config, family, "num_hidden_layers"),
        patch_size[0],
        image_size,
        extra if isinstance(extra, int) else _number(config, family, extra, least=0),
    )


def _number(config: Mapping[str, Any], family: Family, key: str, least: int = 1) -> int:
    return _whole(config.get(key, family.defaults[key]), key, least)


def _pair(config: Mapping[str, Any], family: Family, key: str) -> tuple[int, int]:
    found = config.get(key, family.defaults[key])
    if isinstance(found, list) and len(found) == 2:
        return _whole(found[0], key), _whole(found[1], key)
    return (_whole(found, key),) * 2


def _whole(found: Any, key: str, least: int = 1) -> int:
    if not isinstance(found, int) or isinstance(found, bool) or found < least:
        raise ValueError(f"found {key} {shown(found)}, wanted a whole number from {least}")
    return found

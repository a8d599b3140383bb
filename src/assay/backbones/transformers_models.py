"""Backbones of transformers, from safetensors alone, and without code that comes with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from assay.backbones.callable import CallableBackbone
from assay.backbones.description import Backbone, Description, Precision
from assay.backbones.families import Family, Sizes, find_family, read_sizes
from assay.backbones.files import Checkpoint, find_checkpoint
from assay.backbones.library import cast_weights, library_identity, normalization_identity
from assay.backbones.preprocessor import read_preprocessing
from assay.io.strict_json import shown

LIBRARY = "transformers"
REMEDY = "pip install 'assay-baselines[extract]'"

AFTER_THE_BLOCKS = {"head", "layernorm", "norm", "pooler", "post_layernorm"}
"""Modules that no block's output depends on: their weights may be missing."""


def look(typed: str, revision: str | None) -> Description:
    """What a checkpoint of transformers is, from its files.

    Raises:
        FileNotFoundError: see `find_checkpoint`; there is no preprocessor_config.json.
        ValueError: see `find_checkpoint`; transformers is not installed; the model is of no family
            that is known.
    """
    identity = library_identity(LIBRARY, REMEDY)
    return _describe(find_checkpoint(typed, revision), identity)[0]


def open_backbone(
    typed: str, revision: str | None, *, device: torch.device, precision: Precision
) -> Backbone:
    """A checkpoint of transformers, in eval mode on a device, its weights in a precision.

    Raises:
        FileNotFoundError: see `look`.
        ValueError: see `look`; weights are missing or of another shape.
    """
    checkpoint = find_checkpoint(typed, revision)
    identity = library_identity(LIBRARY, REMEDY)
    description, family, sizes = _describe(checkpoint, identity)
    model = _load(checkpoint, family)
    cast_weights(model, getattr(torch, precision))
    model.eval().to(device)
    blocks = find_blocks(model, sizes.n_blocks)
    return CallableBackbone(Blocks(model, blocks, family, sizes), description, device)


def _describe(checkpoint: Checkpoint, library: dict[str, str]) -> tuple[Description, Family, Sizes]:
    try:
        family = find_family(checkpoint.config)
        sizes = read_sizes(checkpoint.config, family)
    except ValueError as error:
        raise ValueError(f"{checkpoint.typed}: config.json: {error}") from None
    preprocessing = read_preprocessing(checkpoint.folder)
    description = Description(
        family=family.name,
        ckpt=checkpoint.name,
        d_model=sizes.d_model,
        n_blocks=sizes.n_blocks,
        patch_size=sizes.patch_size,
        cls_token=family.cls_token,
        preprocessing=preprocessing,
        identity=library | checkpoint.identity() | normalization_identity(preprocessing),
    )
    return description, family, sizes


def _load(checkpoint: Checkpoint, family: Family) -> nn.Module:
    """The vision model, float32. What a checkpoint has beyond it is left out."""
    import transformers

    with _quiet():
        try:
            model, loaded = getattr(transformers, family.model_class).from_pretrained(
                checkpoint.folder,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                dtype=torch.float32,
                # As a configuration may ask for more, or for an implementation that is fetched.
                attn_implementation="sdpa",
                output_hidden_states=False,
                output_attentions=False,
                output_loading_info=True,
                **(family.arguments or {}),
            )
        except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
            said = shown((str(error).strip().splitlines() or [""])[0])
            raise ValueError(
                f"{checkpoint.typed}: found what transformers cannot load ({said}), wanted weights"
                " that fit config.json: fetch it again"
            ) from error
    # transformers only warns, and makes up random ones.
    missing = sorted(name for name in loaded["missing_keys"] if not _is_unused(name))
    if missing:
        raise ValueError(
            f"{checkpoint.typed}: found no weights {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''} ({len(missing)} missing), wanted all of"
            f" {family.model_class}: fetch it again, or save the whole model"
        )
    return model  # type: ignore[no-any-return]


def _is_unused(name: str) -> bool:
    """Whether no block's output depends on a weight."""
    parts = name.split(".")
    in_block = any(part.isdigit() for part in parts)
    return not in_block and (bool(AFTER_THE_BLOCKS & set(parts)) or parts[-1] == "mask_token")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bar and its report of weights: what is wrong is told by us."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def find_blocks(model: nn.Module, n_blocks: int) -> nn.ModuleList:
    """The list of a model's blocks, wherever its version of the library has it.

    Raises:
        ValueError: there is none of that length, or several.
    """
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_blocks
    ]
    if len(lists) != 1:
        raise ValueError(
            f"found {len(lists)} lists of {n_blocks} modules in {type(model).__name__}, wanted one,"
            " of its blocks: install another version of transformers"
        )
    return lists[0]


class _Done(Exception):  # noqa: N818
    """All that is wanted was computed; no error."""


class Blocks:
    """Gives the tokens after some blocks of a model: hooks on them keep what they give, and the
    last one ends the forward pass.
    """

    def __init__(
        self, model: nn.Module, blocks: nn.ModuleList, family: Family, sizes: Sizes
    ) -> None:
        self._model = model
        self._blocks = blocks
        self._family = family
        self._sizes = sizes
        self._dtype = next(model.parameters()).dtype

    def __call__(self, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """The tokens after these blocks, (n, tokens, d_model), CLS first, without registers."""
        found: dict[int, Tensor] = {}
        last = max(layers)

        def keep(layer: int, given: Any) -> None:
            # Older versions give a tuple.
            found[layer] = given[0] if isinstance(given, tuple) else given
            if layer == last:
                raise _Done

        hooks = [
            self._blocks[layer].register_forward_hook(
                lambda _module, _taken, given, layer=layer: keep(layer, given)
            )
            for layer in layers
        ]
        try:
            self._model(pixels.to(self._dtype), **self._arguments(pixels))
        except _Done:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return [self._without_extra(found[layer]) for layer in layers]

    def _arguments(self, pixels: Tensor) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        height, width = pixels.shape[2:]
        if self._family.interpolates and (height, width) != self._sizes.image_size:
            arguments["interpolate_pos_encoding"] = True
        if self._family.name == "mae":
            # It would shuffle the patches, by noise that it draws, even where it masks none.
            n_patches = (height // self._sizes.patch_size) * (width // self._sizes.patch_size)
            order = torch.arange(n_patches, dtype=torch.float32, device=pixels.device)
            arguments["noise"] = order.expand(len(pixels), -1)
        return arguments

    def _without_extra(self, tokens: Tensor) -> Tensor:
        n_extra, n_cls = self._sizes.n_extra, int(self._family.cls_token)
        if not n_extra:
            return tokens
        return torch.cat([tokens[:, :n_cls], tokens[:, n_cls + n_extra :]], dim=1)

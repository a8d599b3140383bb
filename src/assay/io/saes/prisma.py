"""ViT-Prisma: `weights.pt`, with its configuration in `config.json` or pickled in it.

The formula is that of SAELens 3, which it grew out of: b_dec is taken off the normalized input,
always. A gated one has a b_enc as well, which its code has no term for.

Source: github.com/soniajoseph/ViT-Prisma, sae/sae.py and sae/config.py. Some early versions took
b_dec off the input as it was, with a normalization said; a file does not tell which wrote it, and
today's code reads all of them alike, as is done here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from assay.architecture import Architecture, Norm
from assay.io.saes.configs import Config, read_config, take_tensors
from assay.io.saes.pickles import Inert, check_tensors, load_pickle
from assay.io.saes.saelens import GATED, PLAIN, take_activation
from assay.io.saes.stored import Recorded, Settings, StoredSae
from assay.io.strict_json import shown

PICKLED = "vit_prisma.sae.config.VisionModelSAERunnerConfig"
CLASSES = (PICKLED, "vit_prisma.configs.HookedViTConfig.HookedViTConfig")
"""The configuration's class, and that of the vision transformer's, which it may hold."""

TRAINING = (
    "_device",
    "_dtype",
    "b_dec_init_method",
    "cached_activations_path",
    "checkpoint_path",
    "context_size",
    "d_out",
    "dataset_name",
    "dataset_path",
    "dataset_train_path",
    "dataset_val_path",
    "dead_feature_threshold",
    "dead_feature_window",
    "device",
    "dtype",
    "feature_sampling_window",
    "from_pretrained_path",
    "image_size",
    "initialization_method",
    "is_training",
    "l1_coefficient",
    "layer_out_subtype",
    "log_to_wandb",
    "lp_norm",
    "lr",
    "lr_scheduler_name",
    "lr_warm_up_steps",
    "max_grad_norm",
    "min_explained_variance",
    "min_l0",
    "model_class_name",
    "model_name",
    "model_path",
    "n_batches_in_buffer",
    "n_checkpoints",
    "n_validation_runs",
    "num_epochs",
    "num_workers",
    "out_hook_point_layer",
    "return_out_only",
    "seed",
    "store_batch_size",
    "tokens_per_buffer",
    "total_training_images",
    "total_training_steps",
    "total_training_tokens",
    "train_batch_size",
    "transcoder_with_skip_connection",
    "use_cached_activations",
    "use_ghost_grads",
    "use_patches_only",
    "verbose",
    "vit_model_cfg",
    "wandb_entity",
    "wandb_log_frequency",
    "wandb_project",
)
"""What says how an autoencoder was trained, and on what. What it says of transcoders, such as
`transcoder_with_skip_connection`, which is true by default, counts only where `is_transcoder` is.
"""


@dataclass(frozen=True)
class _Said:
    """What a configuration says of the formula, and of where it was trained."""

    architecture: Architecture
    gated: bool
    sizes: tuple[int, int | None]
    recorded: Recorded
    notes: tuple[str, ...]


def read(weights: Path, config: Path, settings: Settings) -> StoredSae:
    """Read an autoencoder of ViT-Prisma's.

    Raises:
        FileNotFoundError: a file is missing, or no configuration is in `weights.pt` or beside it.
        ValueError: one is damaged or not understood, or the configurations disagree.
    """
    loaded = load_pickle(weights, weights, CLASSES)
    holds = loaded if isinstance(loaded, dict) else {}
    said: dict[Path, _Said] = {}
    if {"config", "autoencoder"} <= holds.keys():
        raise ValueError(
            f"{weights} holds `config` and `autoencoder`, as SAELens 2 saved it: load it in"
            " ViT-Prisma by load_from_pretrained_legacy_saelens_v2, and save_model it"
        )
    if {"cfg", "state_dict"} <= holds.keys():
        said[weights] = _understand(Config(_plain(holds["cfg"], weights), weights))
        loaded = holds["state_dict"]
    if config.is_file() or not said:
        said[config] = _understand(Config(read_config(config), config))
    one, *others = said.values()
    notes = one.notes
    for other in others:
        if differs := _disagreement(one, other):
            raise ValueError(
                f"{weights} and {config.name} disagree on {differs}: remove the configuration that"
                " it was not trained with"
            )
        if one.recorded != other.recorded:
            notes += (f"{config.name} says another hook point: {shown(other.recorded.hook)}",)
    found = check_tensors(loaded, weights)
    if one.gated and (unused := found.pop("b_enc", None)) is not None and bool(unused.any()):
        notes += ("its b_enc is not used: a gated one has b_gate and b_mag",)
    tensors = take_tensors(found, GATED if one.gated else PLAIN, weights)
    tensors["center"] = tensors["b_out"]
    stored = StoredSae("ViT-Prisma", one.architecture, tensors, one.recorded, notes=notes)
    stored.check(settings, *one.sizes)
    return stored


def _plain(cfg: object, named: Path) -> dict[str, Any]:
    """The attributes of a pickled configuration, as JSON would have them."""
    if not isinstance(cfg, Inert) or getattr(cfg, "stands_for", None) != PICKLED:
        raise ValueError(
            f"{named} holds a `cfg` that is a {type(cfg).__name__}, wanted ViT-Prisma's"
            " VisionModelSAERunnerConfig: save it again"
        )
    found: dict[str, Any] = {}
    for key, value in vars(cfg).items():
        if key in ("given", *TRAINING):
            continue
        try:
            found[str(key)] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError):
            raise ValueError(
                f"{named}: `{shown(key)}` of its configuration is a {type(value).__name__}, wanted"
                " a plain value: save it again"
            ) from None
    return found


def _understand(said: Config) -> _Said:
    said.require(
        "is_transcoder",
        False,
        why="a transcoder predicts another activation than its input: name an autoencoder",
    )
    said.require(
        "hook_point_head_index",
        None,
        why="it was trained on a single head of an attention layer: name another",
    )
    named = said.need("architecture", str) if "architecture" in said else "standard"
    activation, k = take_activation(said, None)
    norm: Any = said.take("normalize_activations", str)
    # The library's defaults for these two have changed.
    if activation is None or norm is None:
        raise ValueError(
            f"{said.named} does not say activation_fn_str and normalize_activations, wanted both:"
            " save it with today's ViT-Prisma"
        )
    if (named, activation) not in (("standard", "relu"), ("standard", "topk"), ("gated", "relu")):
        raise ValueError(
            f"{said.named}: the activation is {shown(activation)} in architecture {shown(named)},"
            " wanted relu in a standard or gated one, or topk in a standard one: no other is read"
        )
    if activation == "topk" and k is None:
        raise ValueError(f"{said.named}: topk has no `k` in `activation_fn_kwargs`, wanted one")
    if norm not in get_args(Norm):
        raise ValueError(
            f"{said.named}: `normalize_activations` is {shown(norm)}, wanted one of"
            f" {', '.join(get_args(Norm))}: this version does not know it"
        )
    d_in, d_sae = said.need("d_in", int), said.take("d_sae", int)
    expansion = said.take("expansion_factor", (int, float, list))
    if d_sae is None and isinstance(expansion, int):
        d_sae = d_in * expansion
    layer, subtype = said.take("hook_point_layer", int), said.take("layer_subtype", str)
    hook = said.take("hook_point", str)
    hook = said.take("_custom_hook_point", str, hook)
    if hook is None and None not in (layer, subtype):
        hook = f"blocks.{layer}.{subtype}"
    # Early versions have the second name.
    on_class = {said.take(name, bool, False) for name in ("cls_token_only", "cls_token")}
    said.ignore(TRAINING)
    said.finish()
    top = Architecture("topk", k, norm=norm) if activation == "topk" else None
    return _Said(
        architecture=top or Architecture("relu", norm=norm),
        gated=named == "gated",
        sizes=(d_in, d_sae),
        recorded=Recorded(layer, hook),
        notes=("it was trained on class tokens only",) if True in on_class else (),
    )


def _disagreement(one: _Said, other: _Said) -> str | None:
    """Where configurations say another formula."""
    for name in ("architecture", "gated", "sizes"):
        found, wanted = getattr(one, name), getattr(other, name)
        if found != wanted:
            return f"{name} ({found} and {wanted})"
    return None

"""dictionary_learning: `ae.pt`, a state dict, and `config.json` beside it.

Which of its classes a file is of, its tensors say. The configuration names a class too, but its
trainers write one name whatever they were given. Only top-K and batch top-K have the same tensors:

- AutoEncoder (`bias`): relu; bias is taken off the input, and added to the output
- AutoEncoderNew (`decoder.bias`): relu; nothing is taken off
- AutoEncoderTopK (`b_dec`, `k`): relu, then the k largest; its `threshold` is not used by `encode`
- BatchTopKSAE (`b_dec`, `k`), MatryoshkaBatchTopKSAE (`group_sizes`): relu where above `threshold`
- JumpReluAutoEncoder (`W_enc`, a threshold per feature): nothing is taken off
- GatedAutoEncoder (`decoder_bias`)

Codes are those of the class's `encode`. The library's `load_dictionary` scales an AutoEncoder to
decoder rows of length 1 first, which multiplies the codes of each feature by one number and leaves
reconstruction, L0 and probes as they are. Activations may have been divided by a `norm_factor` in
training; the weights are saved for activations that are not.

Source: github.com/saprmarks/dictionary_learning, dictionary.py, utils.py and trainers/, 0.1.0.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from assay.architecture import Architecture
from assay.io.saes.configs import Config, read_config, take_tensors
from assay.io.saes.pickles import check_tensors, load_pickle
from assay.io.saes.stored import Recorded, Settings, StoredSae
from assay.io.strict_json import shown

LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
DIRECT = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_out"}
TOP_K = {"k": "k", "threshold": "threshold"}

LAYOUTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    (
        "decoder_bias",
        "GatedAutoEncoder",
        {
            "encoder.weight": "W_enc",
            "mag_bias": "b_enc",
            "gate_bias": "b_gate",
            "r_mag": "r_mag",
            "decoder.weight": "W_dec",
            "decoder_bias": "b_out",
        },
    ),
    ("bias", "AutoEncoder", LINEAR | {"bias": "b_out"}),
    ("decoder.bias", "AutoEncoderNew", LINEAR | {"decoder.bias": "b_out"}),
    ("group_sizes", "MatryoshkaBatchTopKSAE", DIRECT | TOP_K | {"group_sizes": "group_sizes"}),
    ("W_enc", "JumpReluAutoEncoder", DIRECT | {"threshold": "threshold"}),
    ("b_dec", "AutoEncoderTopK", LINEAR | TOP_K | {"b_dec": "b_out"}),
)
"""A tensor that no class further down has, the class, and its tensors: in this order. BatchTopKSAE
has those of AutoEncoderTopK.
"""

CENTERED = ("GatedAutoEncoder", "AutoEncoder", "MatryoshkaBatchTopKSAE", "AutoEncoderTopK")
"""Classes that take the bias of their output off their input."""

ACTIVATIONS = {
    "AutoEncoderTopK": "topk",
    "TopKTrainer": "topk",
    "BatchTopKSAE": "jumprelu",
    "BatchTopKTrainer": "jumprelu",
}

CLASSES = (*(name for _, name, _ in LAYOUTS), "BatchTopKSAE")

TRAINING = (
    "anneal_start",
    "auxk_alpha",
    "bandwidth",
    "decay_start",
    "device",
    "group_fractions",
    "group_weights",
    "l1_penalty",
    "lm_name",
    "lr",
    "n_sparsity_updates",
    "norm_factor",
    "p_end",
    "p_start",
    "resample_steps",
    "seed",
    "sparsity_function",
    "sparsity_penalty",
    "sparsity_queue_length",
    "sparsity_warmup_steps",
    "steps",
    "target_l0",
    "threshold_beta",
    "threshold_start_step",
    "top_k_aux",
    "wandb_name",
    "warmup_steps",
)
"""What says how an autoencoder was trained; the weights have `norm_factor` in them already."""

BUFFER = ("ctx_len", "device", "n_ctxs", "out_batch_size", "refresh_batch_size")


def read(weights: Path, config: Path | None, settings: Settings) -> StoredSae:
    """Read an autoencoder of dictionary_learning's.

    Args:
        weights: its state dict.
        config: its configuration; None: it was not saved.
        settings: the activation, where there is no configuration and the tensors are top-K's.

    Raises:
        ValueError: a file is damaged, or not understood.
    """
    said = Config({} if config is None else read_config(config), config or weights)
    trainer = Config(said.take("trainer", dict, {}), said.named)
    buffer = Config(said.take("buffer", dict, {}), said.named)
    said.finish()
    found = check_tensors(load_pickle(weights, weights), weights)
    cls, names = _layout(found, weights)
    tensors = take_tensors(found, names, weights, optional={"threshold"} & names.keys())
    if "encoder.weight" in names:
        tensors |= {name: tensors[name].T for name in ("W_enc", "W_dec")}
    k = _number("k", tensors.pop("k", None), weights)
    groups = tensors.pop("group_sizes", None)
    architecture, notes = _architecture(cls, k, tensors, trainer, settings)
    if architecture.activation == "topk":
        tensors.pop("threshold", None)
    if cls in CENTERED:
        tensors["center"] = tensors["b_out"]
    d, n = trainer.take("activation_dim", int), trainer.take("dict_size", int)
    if trainer.take("k", int, k) != k:
        raise ValueError(f"{said.named}: `k` is another than the weights' {k}: not of one model?")
    _check_groups(groups, trainer, tensors["W_dec"], weights)
    recorded = _recorded(trainer, buffer)
    trainer.ignore(TRAINING)
    trainer.finish()
    buffer.finish()
    stored = StoredSae("dictionary_learning", architecture, tensors, recorded, notes=notes)
    # Batch top-K has a k, of its training, and its codes have not.
    typed = replace(settings, k=None) if settings.k == k != architecture.k else settings
    stored.check(typed, d, n)
    return stored


def _layout(found: dict[str, Tensor], weights: Path) -> tuple[str, dict[str, str]]:
    """The class that the tensors are of, and what they are called here."""
    for marker, cls, names in LAYOUTS:
        if marker in found:
            return cls, names
    raise ValueError(
        f"{weights} holds {shown(', '.join(sorted(found))) or 'no tensor'}, wanted the tensors of"
        f" {', '.join(CLASSES)}: of another library, or another kind?"
    )


def _number(name: str, tensor: Tensor | None, weights: Path) -> int | None:
    if tensor is None:
        return None
    if tensor.numel() != 1 or tensor.is_floating_point():
        raise ValueError(
            f"{weights}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, wanted one"
            " integer: save it again"
        )
    return int(tensor.item())


def _architecture(
    cls: str, k: int | None, tensors: dict[str, Tensor], trainer: Config, settings: Settings
) -> tuple[Architecture, tuple[str, ...]]:
    """How codes are made, and what is worth a note."""
    dict_class, trainer_class = trainer.take("dict_class", str), trainer.take("trainer_class", str)
    if dict_class not in (None, *CLASSES):
        raise ValueError(
            f"{trainer.named}: `dict_class` is {shown(dict_class)}, wanted one of"
            f" {', '.join(CLASSES)}: this version does not know it"
        )
    match cls:
        case "AutoEncoderTopK":
            said = {
                ACTIVATIONS[name] for name in (dict_class, trainer_class) if name in ACTIVATIONS
            }
            activation = said.pop() if len(said) == 1 else settings.canonical_activation
            if activation not in ("topk", "jumprelu"):
                raise ValueError(
                    f"{trainer.named}: top-K and batch top-K have the same tensors, and the"
                    f" configuration says {' and '.join(sorted(said)) or 'neither'}: type"
                    " activation: topk, or batchtopk"
                )
        case "JumpReluAutoEncoder" | "MatryoshkaBatchTopKSAE":
            activation = "jumprelu"
        case _:
            activation = "relu"
    if activation == "topk":
        return Architecture("topk", k), ()
    if activation == "relu":
        return Architecture("relu"), ()
    threshold = tensors.get("threshold")
    if threshold is None:
        raise ValueError(f"{trainer.named}: the weights hold no threshold: save it too")
    if cls != "JumpReluAutoEncoder" and bool((threshold < 0).any()):
        return Architecture("jumprelu"), (
            "training has not set the threshold yet: every positive code is kept",
        )
    return Architecture("jumprelu"), ()


def _check_groups(groups: Tensor | None, trainer: Config, decoder: Tensor, weights: Path) -> None:
    """Check that the groups of a matryoshka are all of its features: then all are active."""
    said = trainer.take("group_sizes", list)
    if groups is None:
        if said is not None:
            raise ValueError(
                f"{trainer.named}: `group_sizes` is there, and the weights have none: not of one"
                " model?"
            )
        return
    sizes = groups.flatten().tolist()
    if sum(sizes) != len(decoder) or said not in (None, sizes):
        raise ValueError(
            f"{weights}: the group sizes add up to {sum(sizes)}, wanted {len(decoder)}, and those"
            " of the configuration: not of one model?"
        )


def _recorded(trainer: Config, buffer: Config) -> Recorded:
    """Where it was trained: a block's output, unless a submodule is named."""
    layer, hook = trainer.take("layer", int), trainer.take("submodule_name", str)
    buffer.ignore(BUFFER)
    buffer.ignore(("d_submodule",))
    io = buffer.take("io", str, "out")
    if io not in ("in", "out", "in_and_out"):
        raise ValueError(
            f"{buffer.named}: `io` is {shown(io)}, wanted in, out or in_and_out: this version does"
            " not know it"
        )
    if io == "in":
        hook = f"the input of {hook or 'the block'}"
    if buffer.take("layer", int) is not None:
        hook = "attention heads"
    predicts = "what a module makes of its input (in_and_out)" if io == "in_and_out" else None
    return Recorded(layer, hook, predicts)

"""What a whole module of overcomplete's says, without the library: its parts by their places."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from assay.architecture import Architecture
from assay.io.saes.pickles import Inert, check_tensors
from assay.io.saes.stored import Normalization
from assay.io.strict_json import shown

BATCH_NORM_EPS = 1e-5
"""torch's default, which the library leaves as it is."""

PLACES: dict[str, tuple[str, ...]] = {
    "": (
        "overcomplete.sae.base.SAE",
        "overcomplete.sae.batchtopk_sae.BatchTopKSAE",
        "overcomplete.sae.jump_sae.JumpSAE",
        "overcomplete.sae.rasae.RAJumpSAE",
        "overcomplete.sae.rasae.RATopKSAE",
        "overcomplete.sae.topk_sae.TopKSAE",
    ),
    "encoder": (
        "overcomplete.sae.modules.MLPEncoder",
        "overcomplete.sae.modules.TieableEncoder",
    ),
    "encoder.mlp_blocks": ("torch.nn.modules.container.ModuleList",),
    "encoder.final_block": ("torch.nn.modules.container.Sequential",),
    "encoder.final_block.0": ("torch.nn.modules.linear.Linear",),
    "encoder.final_block.1": (
        "torch.nn.modules.linear.Identity",
        "torch.nn.modules.batchnorm.BatchNorm1d",
    ),
    "encoder.final_activation": ("torch.nn.modules.activation.ReLU",),
    "encoder.tied_to": (
        "overcomplete.sae.dictionary.DictionaryLayer",
        "overcomplete.sae.archetypal_dictionary.RelaxedArchetypalDictionary",
    ),
    "dictionary": (
        "overcomplete.sae.dictionary.DictionaryLayer",
        "overcomplete.sae.archetypal_dictionary.RelaxedArchetypalDictionary",
    ),
}
"""Where a module may be, and of which classes."""

REFUSED = (
    "overcomplete.sae.modules.AttentionBlock",
    "overcomplete.sae.modules.AttentionEncoder",
    "overcomplete.sae.modules.IdentityEncoder",
    "overcomplete.sae.modules.ResNetBlock",
    "overcomplete.sae.modules.ResNetEncoder",
    "overcomplete.sae.mp_sae.MpSAE",
    "overcomplete.sae.omp_sae.OMPSAE",
    "overcomplete.sae.qsae.QSAE",
    "torch.nn.modules.activation.GELU",
    "torch.nn.modules.activation.MultiheadAttention",
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.conv.Conv2d",
    "torch.nn.modules.dropout.Dropout",
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
    "torch.nn.modules.normalization.LayerNorm",
)
"""Other classes that the library's modules hold, to be refused by their place."""

CLASSES = (*sorted({name for names in PLACES.values() for name in names}), *REFUSED)

NORMALIZATIONS: dict[str, Normalization] = {
    f"overcomplete.sae.dictionary.normalize_{name}": name for name in get_args(Normalization)
}

KERNELS = ("cauchy", "cosine", "epanechnikov", "gaussian", "quartic", "rectangle", "silverman")

FUNCTIONS = (
    *NORMALIZATIONS,
    *(f"overcomplete.sae.kernels.{name}_kernel" for name in (*KERNELS, "triangular")),
)

ATTRIBUTES = frozenset(
    (
        *("training", "device", "nb_concepts", "fitted"),
        *("top_k", "running_threshold", "threshold_momentum", "kernel_fn", "bandwidth"),
        *("in_dimensions", "normalization", "delta", "nb_candidates", "tied_to"),
        *("input_size", "n_components", "hidden_dim", "nb_blocks", "residual"),
        *("hidden_activation", "output_activation", "norm_layer"),
        *("in_features", "out_features", "inplace"),
        *("num_features", "eps", "momentum", "affine", "track_running_stats"),
    )
)
"""What modules of these classes have; others, but torch's own with an underscore, are refused."""


@dataclass(frozen=True)
class Said:
    """What is said of a module beside its tensors.

    Attributes:
        architecture: how codes are made.
        normalization: of the dictionary; None: it is one of archetypes.
        threshold: one number, of batch top-K.
        k: of the training of batch top-K.
        eps: of the batch normalization.
        delta: of a dictionary of archetypes, the bound of Relax's rows; None: not known.
        dictionary: what it came to in evaluation mode.
        notes: what is worth knowing.
    """

    architecture: Architecture
    normalization: Normalization | None = None
    threshold: Tensor | None = None
    k: int | None = None
    eps: float = BATCH_NORM_EPS
    delta: float | None = None
    dictionary: Tensor | None = None
    notes: tuple[str, ...] = ()


def understand(module: Inert, named: Path) -> tuple[Said, dict[str, Tensor]]:
    """What a module says, and its state dict.

    Raises:
        ValueError: something in it is not understood.
    """
    parts = dict(_parts(module, "", named))
    classes = {place: part.stands_for for place, part in parts.items()}
    if "encoder.final_activation" not in parts and "MLPEncoder" in classes.get("encoder", ""):
        raise ValueError(f"{named}: its encoder has no activation, wanted relu")
    if not {"encoder", "dictionary"} <= parts.keys():
        raise ValueError(f"{named} holds no encoder and dictionary, wanted an autoencoder's")
    if parts.get("encoder.tied_to", parts["dictionary"]) is not parts["dictionary"]:
        raise ValueError(f"{named}: its encoder is tied to another dictionary than its own")
    state = {
        f"{place}.{name}".removeprefix("."): tensor
        for place, part in parts.items()
        for held in ("_parameters", "_buffers")
        for name, tensor in _mapping(part, held, named).items()
        if tensor is not None
    }
    normalizer = parts.get("encoder.final_block.1")
    eps = BATCH_NORM_EPS
    if normalizer is not None and normalizer.stands_for.endswith("BatchNorm1d"):
        eps = _number(normalizer, "eps", named)
        if "encoder.final_block.1.running_mean" not in state:
            raise ValueError(
                f"{named}: its batch normalization has no running statistics, so codes depend on"
                " what else is in a batch: name an autoencoder with track_running_stats"
            )
    architecture, threshold, k = _activation(module, named)
    dictionary = vars(parts["dictionary"])
    fused = None
    if dictionary.get("training") is not True:
        fused = check_tensors({"_fused_dictionary": dictionary.get("_fused_dictionary")}, named)[
            "_fused_dictionary"
        ]
    archetypal = "Archetypal" in classes["dictionary"]
    said = Said(
        architecture,
        normalization=None if archetypal else _normalization(dictionary, named),
        threshold=threshold,
        k=k,
        eps=eps,
        delta=_number(parts["dictionary"], "delta", named) if archetypal else None,
        dictionary=fused,
    )
    return said, state


def _parts(module: Inert, place: str, named: Path) -> Iterator[tuple[str, Inert]]:
    """The modules in a module, itself first, by their places."""
    if module.stands_for not in PLACES.get(place, ()):
        wanted = " or ".join(name.rpartition(".")[2] for name in PLACES.get(place, ()))
        raise ValueError(
            f"{named}: found {module.stands_for.rpartition('.')[2]} {_at(place)}, wanted"
            f" {wanted or 'nothing'}: it is no autoencoder with a linear encoder and relu, top-K,"
            " batch top-K or jumprelu, and no other is read"
        )
    held = vars(module)
    strange = sorted(
        name for name in held.keys() - ATTRIBUTES - {"given"} if not name.startswith("_")
    )
    if strange:
        raise ValueError(
            f"{named}: found the attribute {shown(strange[0])} {_at(place)}, which could change the"
            " codes and is not known here"
        )
    if held.get("_forward_hooks") or held.get("_forward_pre_hooks"):
        raise ValueError(
            f"{named}: found hooks {_at(place)}, which may change the codes: remove them, and save"
            " it again"
        )
    yield place, module
    for name, part in _mapping(module, "_modules", named).items():
        if part is None:
            continue
        below = f"{place}.{name}".removeprefix(".")
        if not isinstance(part, Inert):
            raise ValueError(  # noqa: TRY004
                f"{named}: found no module {_at(below)}: save it again"
            )
        yield from _parts(part, below, named)


def _at(place: str) -> str:
    return f"at {shown(place)}" if place else "as the whole"


def _mapping(module: Inert, name: str, named: Path) -> dict[str, Any]:
    found = vars(module).get(name)
    if not isinstance(found, dict):
        raise ValueError(  # noqa: TRY004
            f"{named}: found no {name} in a module, wanted torch's: save it again"
        )
    return {str(key): value for key, value in dict.items(found)}


def _number(module: Inert, name: str, named: Path) -> float:
    found = vars(module).get(name)
    if not isinstance(found, int | float):
        raise ValueError(  # noqa: TRY004
            f"{named}: {name} is a {type(found).__name__}, wanted a number: save it again"
        )
    return float(found)


def _activation(module: Inert, named: Path) -> tuple[Architecture, Tensor | None, int | None]:
    """How codes are made; and of a batch top-K its threshold, and the k of its training."""
    kind, held = module.stands_for.rpartition(".")[2], vars(module)
    k = held.get("top_k")
    if "TopK" in kind and type(k) is not int:
        raise ValueError(f"{named}: top_k is a {type(k).__name__}, wanted an integer")
    match kind:
        case "TopKSAE" | "RATopKSAE":
            return Architecture("topk", k), None, None
        case "BatchTopKSAE":
            found = held.get("running_threshold")
            if isinstance(found, int | float):
                found = torch.tensor(float(found))
            if found is None:
                raise ValueError(
                    f"{named}: its running_threshold is not set, which training does: train it"
                )
            threshold = check_tensors({"running_threshold": found}, named)["running_threshold"]
            if threshold.numel() != 1:
                raise ValueError(f"{named}: running_threshold is no single number: save it again")
            return Architecture("jumprelu", keeps_equal=True), threshold, k
        case "JumpSAE" | "RAJumpSAE":
            return Architecture("jumprelu", keeps_equal=True), None, None
        case _:
            return Architecture("relu"), None, None


def _normalization(dictionary: dict[str, Any], named: Path) -> Normalization:
    found = dictionary.get("normalization")
    name = found.stands_for if isinstance(found, type) and issubclass(found, Inert) else ""
    if name not in NORMALIZATIONS:
        raise ValueError(
            f"{named}: the dictionary's normalization is not known here, wanted one of"
            f" {', '.join(get_args(Normalization))}"
        )
    return NORMALIZATIONS[name]

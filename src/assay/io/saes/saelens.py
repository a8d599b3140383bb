"""SAELens: `cfg.json` and `sae_weights.safetensors`.

b_dec is taken off the input, after its normalization, unless `apply_b_dec_to_input` is false. The
architecture is one of

- standard, gated, topk (never negative), abstopk
- jumprelu, strictly above the threshold; batchtopk and matryoshka_batchtopk are saved as it
- matching_pursuit, which adds b_dec only if it has taken it off

Files of before version 6 say the same in other words: the configuration of `LEGACY`, with the
activation apart from the architecture, and sometimes a factor that codes are multiplied by before
they are decoded.

Source: github.com/decoderesearch/SAELens, versions 1 to 6.54: saes/ (once sae.py) and the loaders.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from assay.architecture import WITH_K, Architecture, Norm
from assay.io.saes.configs import Config, read_config, take_tensors
from assay.io.saes.saelens_keys import LEGACY, TRAINING
from assay.io.saes.stored import Recorded, Settings, StoredSae
from assay.io.strict_json import shown
from assay.io.tensors import read_tensors

PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_out"}
GATED = {
    "W_enc": "W_enc",
    "b_gate": "b_gate",
    "r_mag": "r_mag",
    "b_mag": "b_enc",
    "W_dec": "W_dec",
    "b_dec": "b_out",
}
ARCHITECTURES: dict[str, tuple[Any, dict[str, str]]] = {
    "standard": ("relu", PLAIN),
    "topk": ("topk", PLAIN),
    "abstopk": ("abstopk", PLAIN),
    "jumprelu": ("jumprelu", PLAIN | {"threshold": "threshold"}),
    "gated": ("relu", GATED),
    "matching_pursuit": ("matching_pursuit", {"W_dec": "W_dec", "b_dec": "b_out"}),
}
"""The activation of each architecture, and what its tensors are called here."""

_UNTIL_SAVED = "a checkpoint of training, whose top-K spans a batch: save_inference_model() saves"
_PREDICTS = "a transcoder predicts another activation than its input: name an autoencoder"
REFUSED = {
    "batchtopk": f"{_UNTIL_SAVED} it as jumprelu",
    "matryoshka_batchtopk": f"{_UNTIL_SAVED} it as jumprelu",
    "transcoder": _PREDICTS,
    "skip_transcoder": _PREDICTS,
    "jumprelu_transcoder": _PREDICTS,
    "jumprelu_skip_transcoder": _PREDICTS,
    "temporal": "its codes depend on the tokens before: name another autoencoder",
}
"""Architectures whose codes are none of a token alone, and what to do."""

_FACTOR = (
    "the factor that training multiplied tokens by is not in the file: save it after"
    " fold_activation_norm_scaling_factor(factor), or, if the weights have it folded in, as those"
    " of a finished training do, say none in a copy of the configuration"
)
NOT_FOLDED: dict[str | bool, str] = {
    True: _FACTOR,
    "expected_average_only_in": _FACTOR,
    "covariance_whitening": (
        "the matrices that tokens were whitened with are not in the file: save it after"
        " fold_activation_whitening(...)"
    ),
}
"""Normalizations that the file lacks the numbers of, and what to do."""

RESHAPES = "it takes the heads of an attention layer apart, (heads, d_head): name another"


@dataclass(frozen=True)
class _Said:
    """What a configuration says.

    Attributes:
        named: the architecture, one of `ARCHITECTURES`.
        architecture: the same, in this project's words.
        centers: whether b_dec is taken off the input.
        rescales: whether a feature's scale is the length of its row of W_dec.
        has_factors: whether codes are multiplied by a factor before they are decoded.
        sizes: d and n.
        recorded: where it was trained.
    """

    named: str
    architecture: Architecture
    centers: bool
    rescales: bool
    has_factors: bool
    sizes: tuple[int, int | None]
    recorded: Recorded


def read(weights: Path, config: Path, settings: Settings) -> StoredSae:
    """Read an autoencoder of SAELens'.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: one is damaged, or not understood.
    """
    said = _understand(Config(read_config(config), config), settings)
    found = read_tensors(weights, any_schema=True)
    factors = _take_factors(found, weights, said=said.has_factors)
    if said.named == "jumprelu" and "log_threshold" in found and "threshold" not in found:
        found["threshold"] = found.pop("log_threshold").float().exp()
    tensors = take_tensors(found, ARCHITECTURES[said.named][1], weights)
    if factors is not None:
        tensors["W_dec"] = factors[:, None] * tensors["W_dec"]
    if said.centers:
        tensors["center"] = tensors["b_out"]
    elif said.named == "matching_pursuit":
        del tensors["b_out"]
    if said.rescales:
        tensors["scale"] = tensors["W_dec"].float().norm(dim=-1)
    stored = StoredSae("SAELens", said.architecture, tensors, said.recorded)
    stored.check(settings, *said.sizes)
    return stored


def _understand(said: Config, settings: Settings) -> _Said:
    metadata = said.take("metadata", dict, {})
    legacy = _is_legacy(said, metadata)
    named = said.take("architecture", str, "standard" if legacy else None)
    if named in REFUSED:
        raise ValueError(f"{said.named}: `architecture` is {named}: {REFUSED[named]}")
    has_factors, k = False, None
    if legacy:
        named, k = _of_legacy(said, named)
        has_factors = said.take("finetuning_scaling_factor", bool, False)
        # A run's configuration says which way it was fine-tuned; each way has the factors.
        has_factors |= said.take("finetuning_method", str) is not None
        recorded = take_recorded(said)
        said.ignore(LEGACY)
    else:
        if named in ("topk", "abstopk"):
            k = said.take("k", int)
        # Metadata is free-form; the rest of it is left alone.
        recorded = take_recorded(Config(metadata, said.named))
        said.ignore(TRAINING)
    if named not in ARCHITECTURES:
        raise ValueError(
            f"{said.named}: `architecture` is {shown(named)}, wanted one of"
            f" {', '.join(ARCHITECTURES)}: this version does not know it"
        )
    said.require("reshape_activations", "none", why=RESHAPES)
    if legacy and (recorded.hook or "").endswith("_z"):
        raise ValueError(f"{said.named}: it was trained at {shown(recorded.hook)}: {RESHAPES}")
    understood = _Said(
        named,
        _architecture(said, named, settings.k if k is None else k, _norm(said, legacy=legacy)),
        centers=said.flag("apply_b_dec_to_input", default=True),
        rescales=said.take("rescale_acts_by_decoder_norm", bool, False),
        has_factors=has_factors,
        sizes=(said.need("d_in", int), said.take("d_sae", int)),
        recorded=recorded,
    )
    if understood.rescales and named not in ("topk", "abstopk"):
        raise ValueError(
            f"{said.named}: `rescale_acts_by_decoder_norm` is true for {named}, wanted false: only"
            " topk and abstopk are rescaled"
        )
    said.ignore(("device", "dtype"))
    said.finish()
    return understood


def _is_legacy(said: Config, metadata: dict[str, Any]) -> bool:
    """Whether a configuration is of before version 6."""
    version = said.take("sae_lens_version", str) or metadata.get("sae_lens_version")
    if version is None:
        return "metadata" not in said
    major = re.match(r"(\d{1,9})\.", str(version))
    if major is None:
        raise ValueError(
            f"{said.named}: `sae_lens_version` is {shown(version)}, wanted one such as 6.54.12:"
            " save it again"
        )
    return int(major[1]) < 6


def _architecture(said: Config, named: str, k: int | None, norm: Norm) -> Architecture:
    activation = ARCHITECTURES[named][0]
    if activation == "matching_pursuit":
        left = said.take("residual_threshold", (int, float), 1e-2)
        if not -1e30 < left < 1e30:
            raise ValueError(
                f"{said.named}: `residual_threshold` is {left}, wanted a length: save it again"
            )
        return Architecture(
            activation,
            norm=norm,
            residual_threshold=float(left),
            max_iterations=said.take("max_iterations", int),
            stop_on_duplicate_support=said.flag("stop_on_duplicate_support", default=True),
        )
    if activation not in WITH_K:
        return Architecture(activation, norm=norm)
    if k is None:
        raise ValueError(f"{said.named} says no k for {named}: type it (k)")
    return Architecture(activation, k, norm=norm)


def _of_legacy(said: Config, architecture: str) -> tuple[str, int | None]:
    """The architecture by its name in version 6, and k."""
    activation, k = take_activation(said, "topk" if architecture == "topk" else "relu")
    if activation == "topk" and architecture in ("standard", "topk"):
        return "topk", k
    if activation != "relu" or architecture == "topk":
        raise ValueError(
            f"{said.named}: the activation is {shown(activation)} in architecture"
            f" {shown(architecture)}, wanted relu, or topk in a standard one: no other is read"
        )
    return architecture, None


def take_activation(said: Config, default: str | None) -> tuple[str | None, int | None]:
    """The activation's name, as versions before 6 and ViT-Prisma say it, and its k."""
    activation = _either(said, "activation_fn_str", "activation_fn") or default
    kwargs = Config(said.take("activation_fn_kwargs", dict, {}), said.named)
    k = kwargs.take("k", int)
    kwargs.finish()
    return activation, k


def _norm(said: Config, *, legacy: bool) -> Norm:
    """What is done to a token first."""
    found = said.take("normalize_activations", (str, bool) if legacy else str, "none")
    if found is False:
        return "none"
    if found in get_args(Norm):
        norm: Norm = found
        return norm
    raise ValueError(
        f"{said.named}: `normalize_activations` is {shown(found)}, wanted one of"
        f" {', '.join(get_args(Norm))}: {NOT_FOLDED.get(found, 'this version does not know it')}"
    )


def take_recorded(said: Config) -> Recorded:
    """Where it was trained: of version 6's free-form metadata, or of older configurations.

    Raises:
        ValueError: at a single head, or from one place to another.
    """
    hook = _either(said, "hook_name", "hook_point")
    layers = (said.take(name, int) for name in ("hook_layer", "hook_point_layer"))
    layer = next((each for each in layers if each is not None), None)
    for name in ("hook_head_index", "hook_point_head_index", "hook_head_index_out"):
        if (head := said.take(name, int)) is not None:
            raise ValueError(
                f"{said.named}: `{name}` is {head}, wanted none: it was trained on a single head of"
                " an attention layer: name another"
            )
    elsewhere = said.take("hf_hook_name", str)
    for name, here in (("hook_name_out", hook), ("hf_hook_name_out", elsewhere)):
        if (out := said.take(name, str)) not in (None, "", here):
            raise ValueError(f"{said.named}: `{name}` is {shown(out)}: {_PREDICTS}")
    if (out_layer := said.take("hook_layer_out", int)) not in (None, layer):
        raise ValueError(f"{said.named}: `hook_layer_out` is {out_layer}: {_PREDICTS}")
    return Recorded(layer, hook or elsewhere)


def _either(said: Config, *names: str) -> str | None:
    """What a key says under any of its names."""
    found = {name: value for name in names if (value := said.take(name, str)) is not None}
    if len(set(found.values())) > 1:
        raise ValueError(
            f"{said.named}: found {' and '.join(f'{name} {shown(found[name])}' for name in found)},"
            " wanted one: remove what it was not trained with from a copy"
        )
    return next(iter(found.values()), None)


def _take_factors(found: dict[str, Tensor], weights: Path, *, said: bool) -> Tensor | None:
    """What codes are multiplied by before they are decoded (n,), taken out of ``found``.

    For a while a `scaling_factor` of ones was saved with every autoencoder.
    """
    names = [name for name in ("scaling_factor", "finetuning_scaling_factor") if name in found]
    factors = [found.pop(name).float() for name in names]
    factors = [each for each in factors if not torch.allclose(each, torch.ones_like(each))]
    if not factors:
        return None
    decoder = found.get("W_dec", torch.empty(0))
    if len(factors) > 1 or not said or decoder.ndim != 2 or factors[0].shape != decoder.shape[:1]:
        raise ValueError(
            f"{weights}: found {' and '.join(names)}, not all 1, which codes are multiplied by"
            " before they are decoded, wanted one number for each feature, and"
            " `finetuning_scaling_factor` true in the configuration: save it again"
        )
    return factors[0]

"""Dictionaries that are not Assay's own."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from assay.encodings import Model
from assay.parameters.fields import Choices, Layer, Section, Seed

SOURCES = ("sae", "weights", "saev_run", "random")

OF_WEIGHTS = ("relu", "topk", "batchtopk", "jumprelu")
"""Activations of weights whose formula is typed."""


class DictionaryParameters(Section):
    """Another dictionary for the same table, judged by the same code: one of `sae`, `weights`,
    `saev_run` and `random`.

    In paths `{layer}` is replaced, as in layer_23, and `{seed}`.
    """

    sae: str | None = Field(
        None,
        min_length=1,
        description=(
            "an autoencoder as saev, SAELens, dictionary_learning, overcomplete, sparsify or"
            " ViT-Prisma saved it: its file or folder, or hf:owner/name[@revision][/subfolder]"
        ),
    )
    weights: str | None = Field(
        None,
        min_length=1,
        description=(
            "an autoencoder's weights alone, a safetensors file under saev's, SAELens' or torch's"
            " names, whose formula is typed: `activation`, `trained_on` and `input_bias`"
        ),
    )
    activation: (
        Literal[
            "relu",
            "topk",
            "batchtopk",
            "jumprelu",
            "abstopk",
            "groupmax",
            "matching_pursuit",
        ]
        | None
    ) = Field(
        None,
        description=(
            "of weights: relu, topk, or batchtopk and jumprelu, which want `threshold` among the"
            " tensors; of `sae` where its file does not say"
        ),
    )
    k: PositiveInt | None = Field(
        None,
        description=(
            "entries per patch: of weights with `topk`, and of `sae` where its file does not say"
        ),
    )
    threshold: float | None = Field(
        None, description="of `sae` where its file does not say: one number for all features"
    )
    normalization: Literal["l2", "max_l2", "l1", "max_l1", "identity"] | None = Field(
        None, description="of overcomplete's dictionary, where the file of `sae` does not say"
    )
    trained_on: Literal["standardized", "raw"] | None = Field(
        None,
        description=(
            "the activations that the autoencoder was trained on; null: raw for `sae`, and for"
            " weights it has to be said"
        ),
    )
    input_bias: Literal["b_dec", "none"] | None = Field(
        None,
        description="what is taken off the input of weights before they encode; has to be said",
    )
    saev_run: str | None = Field(
        None,
        min_length=1,
        description=(
            "a folder of saev's with inference/<shard hash>/token_acts.npz, and metrics.json for"
            " shards.val"
        ),
    )
    random: Literal["centres", "directions"] | None = Field(
        None,
        description=(
            "the floor: tokens drawn as centers and coded as k-means, or random directions coded"
            " as PCA"
        ),
    )
    seeds: Choices[Seed] = Field(
        (0,),
        description=(
            "of the random centers or directions, or what stands for `{seed}` in the path: a row"
            " each, pooled for the paper"
        ),
    )
    layers: Choices[Layer] | None = Field(None, description="layers that it is of; null: all")
    batch_size: PositiveInt = Field(
        8_192, description="tokens per batch, where its reconstruction is measured"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"found {' and '.join(given) or 'none'}, want one of {', '.join(SOURCES[:-1])} and"
                f" {SOURCES[-1]}"
            )
        self._check_placeholders()
        self._check_settings(given[0])
        if self.weights is not None:
            self._check_formula()
        if len(self.seeds) > 1 and not self.has_seeds:
            raise ValueError(
                f"found seeds {list(self.seeds)} and no {{seed}} in the path, want it there, or one"
                " seed"
            )
        return self

    def _check_placeholders(self) -> None:
        """Nothing but a layer and a seed is replaced in a path."""
        unknown = set(re.findall(r"\{.*?\}", self.path or "")) - {"{layer}", "{seed}"}
        if unknown:
            raise ValueError(
                f"found {', '.join(sorted(unknown))} in the path, want no other in braces than"
                " {layer} and {seed}"
            )

    def _check_settings(self, source: str) -> None:
        """Every setting belongs to the source that there is."""
        settings = {
            "activation": ("sae", "weights"),
            "k": ("sae", "weights"),
            "trained_on": ("sae", "weights"),
            "threshold": ("sae",),
            "normalization": ("sae",),
            "input_bias": ("weights",),
        }
        for name, sources in settings.items():
            if getattr(self, name) is not None and source not in sources:
                raise ValueError(
                    f"found {name} beside {source}, want it beside {' or '.join(sources)} alone"
                )

    def _check_formula(self) -> None:
        """What no file of weights says is typed."""
        missing = [
            name
            for name in ("activation", "trained_on", "input_bias")
            if getattr(self, name) is None
        ]
        if missing:
            raise ValueError(
                f"found weights without {' and '.join(missing)}, want activation, trained_on"
                " (standardized or raw) and input_bias (b_dec or none) said: the file does not"
                " say them"
            )
        if self.activation not in OF_WEIGHTS:
            raise ValueError(
                f"found weights with activation {self.activation}, want {', '.join(OF_WEIGHTS)},"
                " or `sae` for a file that says its formula"
            )
        if (self.k is None) == (self.activation == "topk"):
            raise ValueError(
                f"found k {self.k} and activation {self.activation}, want k for topk, and only for"
                " that"
            )

    @property
    def is_autoencoder(self) -> bool:
        """Whether it is read from a file of an autoencoder's."""
        return self.sae is not None or self.weights is not None

    @property
    def path(self) -> str | None:
        """Where it lies, `{layer}` and `{seed}` as typed; None: it is drawn."""
        return self.sae or self.weights or self.saev_run

    @property
    def has_seeds(self) -> bool:
        """Whether its seeds make a difference."""
        return self.random is not None or "{seed}" in (self.path or "")

    def of_seed(self, seed: int | None) -> Self:
        """What the errors of one seed depend on: of the seeds that one, and no choice of layers, as
        each layer is measured on its own.

        Args:
            seed: of one of the `models`; None where its seeds make no difference.
        """
        default = type(self).model_fields["seeds"].default
        return self.model_copy(
            update={"seeds": default if seed is None else (seed,), "layers": None}
        )

    def models(self, name: str) -> tuple[Model, ...]:
        """The models of its seeds: of its own ``name`` alone where there is one seed, which is None
        where it is unknown.
        """
        if len(self.seeds) == 1:
            return (Model(name, self.seeds[0] if self.has_seeds else None),)
        return tuple(Model(name, seed, is_of_several=True) for seed in self.seeds)

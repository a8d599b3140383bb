"""Dictionaries that are not Assay's own."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from assay.encodings import Model
from assay.parameters.fields import Choices, Layer, Section, Seed


class DictionaryParameters(Section):
    """Another dictionary for the same table, judged by the same code: one of `weights`, `saev_run`
    and `random`.

    In paths `{layer}` is replaced, as in layer_23, and `{seed}`.
    """

    weights: str | None = Field(
        None,
        description=(
            "an autoencoder's weights, a safetensors file under saev's, SAELens' or torch's names"
        ),
    )
    activation: Literal["relu", "topk", "batchtopk", "jumprelu"] | None = Field(
        None,
        description="of the autoencoder; batchtopk and jumprelu want `threshold` among its tensors",
    )
    k: PositiveInt | None = Field(
        None, description="entries per patch of an autoencoder with `topk`"
    )
    trained_on: Literal["standardized", "raw"] = Field(
        "standardized", description="the activations that the autoencoder was trained on"
    )
    input_bias: Literal["b_dec", "none"] = Field(
        "b_dec", description="what the autoencoder takes off its input before it encodes"
    )
    saev_run: str | None = Field(
        None,
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
        given = [
            name for name in ("weights", "saev_run", "random") if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                f"found {' and '.join(given) or 'none'}, want one of weights, saev_run and random"
            )
        if (self.activation is None) != (self.weights is None):
            raise ValueError("want an activation where weights are given, and only there")
        if (self.k is None) == (self.activation == "topk"):
            raise ValueError(
                f"found k {self.k} and activation {self.activation}, want k for topk, and only for"
                " that"
            )
        if len(self.seeds) > 1 and not self.has_seeds:
            raise ValueError(
                f"found seeds {list(self.seeds)} and no {{seed}} in the path, want it there, or one"
                " seed"
            )
        return self

    @property
    def has_seeds(self) -> bool:
        """Whether its seeds make a difference."""
        return self.random is not None or "{seed}" in (self.weights or self.saev_run or "")

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

    def of_codes(self, seed: int | None) -> Self:
        """What the codes of one seed depend on: the same but for the batch size."""
        default = type(self).model_fields["batch_size"].default
        return self.of_seed(seed).model_copy(update={"batch_size": default})

    def models(self, name: str) -> tuple[Model, ...]:
        """The models of its seeds: of its own ``name`` alone where there is one seed, which is None
        where it is unknown.
        """
        if len(self.seeds) == 1:
            return (Model(name, self.seeds[0] if self.has_seeds else None),)
        return tuple(Model(name, seed, is_of_several=True) for seed in self.seeds)

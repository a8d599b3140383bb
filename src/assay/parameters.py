"""Every parameter of a run: its unit, its default and what it may be, in one place.

The YAML in ``conf/`` and ``--params`` on the command line only override what stands here. Everything is checked before any
work starts; an unknown name is an error that says which names there are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from assay.encodings import Model

T = TypeVar("T")

NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
"""A number as it is written where text is read as one: no leading zeros, which YAML takes for octal, no 1:30, no 1_000."""


def _check_name(name: str) -> str:
    if (
        re.fullmatch(r"[a-z][a-z0-9-]{0,79}", name)
        and not name.startswith(("kmeans", "pca"))
        and not re.search(r"-seed-[0-9]", name)
    ):
        return name
    raise ValueError(
        f"found {name!r}, want lower-case letters, digits and hyphens, 80 at the most, another start than kmeans and pca, and no"
        " -seed-N, which `seeds` adds"
    )


DictionaryName = Annotated[str, AfterValidator(_check_name)]
"""A dictionary's name is that of its row in the table, and of files."""


def _check_choices(values: tuple[T, ...]) -> tuple[T, ...]:
    if not values or len(set(values)) < len(values):
        raise ValueError(f"found {list(values)}, want at least one, and none twice")
    return values


Choices = Annotated[tuple[T, ...], AfterValidator(_check_choices)]
"""At least one value, and none twice."""


Layer = Annotated[int, Field(ge=-(2**16), le=2**16)]
"""A block's number as it was recorded: saev counts from the end as well, and -2 is then the layer's name."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Seeds = tuple[Seed, ...]


class _Section(BaseModel):
    """A group of parameters: immutable, and closed to names that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_what_it_looks_like(cls, value: Any, info: ValidationInfo) -> Any:
        values = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(each, bool) for each in values):
            raise ValueError(f"found {value}: no parameter is a boolean")
        if info.field_name is not None and str not in _types(cls.model_fields[info.field_name].annotation):
            for each in values:
                if isinstance(each, str) and re.match(r"\s*[-+.]?[0-9]", each) and not NUMBER.fullmatch(each):
                    raise ValueError(f"found {each!r}, want a number, written as 10, 0.1 or 1e-3")
        return value


def _check_braces(path: str | None) -> str | None:
    if path is None or not {"{", "}"} & set(path.replace("{layer}", "")):
        return path
    raise ValueError(f"found {path!r}, want a path without braces, which Kedro would replace: name it by a link")


class ShardsParameters(_Section):
    """The four shard folders: each a saev shard folder, or a folder that holds exactly one. Relative to the project's root."""

    _no_braces = field_validator("*")(_check_braces)

    fit: str = Field(description="fitted on (IN1K/train): statistics, k-means, PCA")
    val: str = Field(description="validation tokens (IN1K/val): NMSE")
    probe_train: str = Field(description="labelled patches the probes are fitted on (ADE20K/train)")
    probe_val: str = Field(description="labelled patches the probes are judged on (ADE20K/val)")


class StandardizeParameters(_Section):
    """Mean and standard deviation of each dimension."""

    _no_braces = field_validator("statistics")(_check_braces)

    statistics: str | None = Field(
        None,
        description="the user's own mu/sigma: a safetensors file with `mean`, `std` (d_model,); `{layer}` in it is replaced",
    )
    batch_size: PositiveInt = Field(16_384, description="tokens a batch")
    max_tokens: PositiveInt | None = Field(
        None, description="tokens that they are taken over, a random sample; null: all of them"
    )


class SparsityParameters(_Section):
    """What is kept of dense k-means codes whose file would not fit on the disk, where a code of 0 means far: one of the two."""

    top_k: PositiveInt | None = Field(None, description="the so many largest entries of each patch")
    margin: PositiveFloat | None = Field(None, description="the entries of at least this magnitude")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.top_k is None) == (self.margin is None):
            raise ValueError(f"found top_k {self.top_k} and margin {self.margin}, want one of them")
        return self


class KMeansParameters(_Section):
    """Mini-batch k-means (Sculley 2010), with scikit-learn's names."""

    n_clusters: PositiveInt = Field(16_384, description="clusters")
    batch_size: PositiveInt = Field(8_192, description="tokens a step")
    n_init: PositiveInt = Field(4, description="k-means++ initialisations, judged on held-out tokens")
    init_size: PositiveInt | None = Field(
        None, description="tokens of the reservoir; null: 3 x max(n_clusters, batch_size)"
    )
    max_iter: PositiveInt = Field(200, description="passes over the tokens at the most")
    max_tokens: PositiveInt | None = Field(
        None, description="tokens that it is fitted on, the same random sample in each pass; null: all of them"
    )
    order: str | None = Field(
        None,
        description="a .npy file of token numbers to read in each pass (docs/reading.md); null: shuffled by the seed",
    )
    tol: float = Field(0.0, ge=0, description="stop when centres move less, relative to the variance; 0: never")
    max_no_improvement: PositiveInt | None = Field(
        10, description="stop after so many steps without a lower smoothed inertia"
    )
    reassignment_ratio: float = Field(
        0.01, ge=0, le=1, description="clusters below this share of the mean count are reseeded"
    )
    decay: float = Field(
        0.1, gt=0, le=1, description="of the counts before each further pass; 1: learning rate 1/n over all tokens ever"
    )
    checkpoint_steps: PositiveInt = Field(500, description="steps from one checkpoint to the next")
    checkpoint_minutes: PositiveFloat = Field(
        1.0,
        description="minutes from one checkpoint to the next at the most, seeding included; a fit that is killed loses no more",
    )
    encodings: Choices[
        Literal[
            "kmeans-onehot",
            "kmeans-invdist",
            "kmeans-distance-sqeuclidean",
            "kmeans-distance-neg_euclidean",
            "kmeans-distance-cosine",
            "kmeans-distance-unit",
        ]
    ] = Field(("kmeans-onehot", "kmeans-invdist"), description="codes that are made and probed")
    sparsity: SparsityParameters | None = Field(
        None,
        description="written of `kmeans-invdist`, `-distance-cosine` and `-distance-unit` if the disk is too small for all; null: nothing",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of the seeding, the shuffling and the reseeding")
    more_seeds: Seeds = Field(
        (),
        description="fit again with each of these: rows of their own, spread in the paper's table, agreement with the first",
    )

    @model_validator(mode="after")
    def _sizes_fit_the_clusters(self) -> Self:
        if self.init_size is not None and self.init_size < self.n_clusters:
            raise ValueError(f"found init_size {self.init_size}, want at least n_clusters, {self.n_clusters}, or null")
        if len({self.seed, *self.more_seeds}) <= len(self.more_seeds):
            raise ValueError(f"found seed {self.seed} and more_seeds {list(self.more_seeds)}, want none twice")
        if self.sparsity is not None and (self.sparsity.top_k or 0) > self.n_clusters:
            raise ValueError(f"found sparsity.top_k {self.sparsity.top_k}, want at most n_clusters, {self.n_clusters}")
        return self


class PCAParameters(_Section):
    """Full-rank PCA and its top-K codes."""

    topk: Choices[PositiveInt] = Field(
        (1, 4, 16, 64, 256, 1024), description="values of K that are reported; those above d_model are left out"
    )
    batch_size: PositiveInt = Field(16_384, description="tokens a batch")
    max_tokens: PositiveInt | None = Field(
        None, description="tokens that it is fitted on, a random sample; null: all of them"
    )
    checkpoint_steps: PositiveInt = Field(100, description="batches from one checkpoint to the next")
    checkpoint_minutes: PositiveFloat = Field(
        1.0, description="minutes from one checkpoint to the next at the most; a fit that is killed loses no more"
    )


class ProbeParameters(_Section):
    """1-D logistic probes, one for every (feature, class)."""

    void: Literal["drop", "negative", "class"] = Field(
        "drop", description="void patches: left out; negatives of every class; or class 0, as saev has it"
    )
    ridge: float = Field(1e-8, gt=0, description="lambda of the ridge lambda/2 (w^2 + (b - b0)^2), nats")
    class_weight: Literal["balanced"] | None = Field(
        None,
        description="null: every patch weighs the same, as saev has it; balanced: by inverse frequency of the class",
    )
    max_iter: PositiveInt = Field(200, description="Newton steps at the most")
    slab_rows: PositiveInt = Field(16_384, description="patches a batch")
    slab_features: PositiveInt | None = Field(
        None,
        description="features worked on together, a pass over the codes each; null: what a quarter of free memory holds",
    )
    certified_pairs: PositiveInt = Field(
        64, description="random probes held against the patches themselves, beside each class's best"
    )
    top_features: PositiveInt = Field(10, description="features of the highest AP that are named for each class")
    examples: PositiveInt = Field(
        6, description="validation examples where a class's best feature is strongest that are kept"
    )


class DictionaryParameters(_Section):
    """Another dictionary for the same table, judged by the same code: one of `weights`, `saev_run` and `random`.

    In paths `{layer}` is replaced, as in layer_23, and `{seed}`.
    """

    weights: str | None = Field(
        None, description="an autoencoder's weights, a safetensors file under saev's, SAELens' or torch's names"
    )
    activation: Literal["relu", "topk", "batchtopk", "jumprelu"] | None = Field(
        None, description="of the autoencoder; batchtopk and jumprelu want `threshold` among its tensors"
    )
    k: PositiveInt | None = Field(None, description="entries a patch of an autoencoder with `topk`")
    trained_on: Literal["standardized", "raw"] = Field(
        "standardized", description="the activations that the autoencoder was trained on"
    )
    input_bias: Literal["b_dec", "none"] = Field(
        "b_dec", description="what the autoencoder takes off its input before it encodes"
    )
    saev_run: str | None = Field(
        None,
        description="a folder of saev's with inference/<shard hash>/token_acts.npz, and metrics.json for shards.val",
    )
    random: Literal["centres", "directions"] | None = Field(
        None, description="the floor: tokens drawn as centres and coded as k-means, or random directions coded as PCA"
    )
    seeds: Choices[Seed] = Field(
        (0,),
        description="of the random centres or directions, or what stands for `{seed}` in the path: a row each, pooled for the paper",
    )
    layers: Choices[Layer] | None = Field(None, description="layers that it is of; null: all")
    batch_size: PositiveInt = Field(8_192, description="tokens a batch, where its reconstruction is measured")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("weights", "saev_run", "random") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"found {' and '.join(given) or 'none'}, want one of weights, saev_run and random")
        if (self.activation is None) != (self.weights is None):
            raise ValueError("want an activation where weights are given, and only there")
        if (self.k is None) == (self.activation == "topk"):
            raise ValueError(f"found k {self.k} and activation {self.activation}, want k for topk, and only for that")
        if len(self.seeds) > 1 and not self.has_seeds:
            raise ValueError(f"found seeds {list(self.seeds)} and no {{seed}} in the path, want it there, or one seed")
        return self

    @property
    def has_seeds(self) -> bool:
        """Whether its seeds make a difference."""
        return self.random is not None or "{seed}" in (self.weights or self.saev_run or "")

    def models(self, name: str) -> tuple[Model, ...]:
        """The models of its seeds: of its own ``name`` alone where there is one seed, which is None where it is unknown."""
        if len(self.seeds) == 1:
            return (Model(name, self.seeds[0] if self.has_seeds else None),)
        return tuple(Model(name, seed, is_of_several=True) for seed in self.seeds)


class ImagesParameters(_Section):
    """The images of shards.probe_val, for the report's gallery: the patches where a class's best feature is strongest.

    The embedded default draws its own, whatever stands here. The names are those of `assay labels`.
    """

    path: str | None = Field(None, description="the folder; null: no gallery, but on the embedded default")
    patch_size: PositiveInt = Field(16, description="height and width of a patch, in pixels")
    grid: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="(rows, columns) of patches; null: as many of each"
    )
    resize: PositiveInt | tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="the shorter side, or (height, width), as it was for the activations, in pixels; null: none"
    )
    crop: Literal["centre"] | None = Field(None, description="centre: the grid is cut out of the middle; null: no crop")
    pattern: str = Field(
        "*.jpg", min_length=1, description="glob of the images, which are taken in the order of their names"
    )
    names: str | None = Field(None, description="a text file that lists the images instead, one a line")
    classes: PositiveInt = Field(12, description="classes a dictionary, those of the highest AP")


class DigitsParameters(_Section):
    """The embedded default: digits on canvases, and a small vision transformer. Equal parameters give equal bytes on one machine."""

    seed: int = Field(0, ge=0, lt=2**32, description="seed of the digits' deal, the canvases and the training")
    image_size: PositiveInt = Field(32, description="height and width of a canvas, in pixels")
    patch_size: PositiveInt = Field(4, description="height and width of a patch, in pixels; divides image_size")
    digits_per_image: PositiveInt = Field(3, description="digits on a canvas")
    d_model: PositiveInt = Field(96, description="width of the residual stream")
    n_blocks: PositiveInt = Field(4, description="transformer blocks")
    n_heads: PositiveInt = Field(4, description="attention heads a block; divides d_model")
    layers: tuple[int, ...] = Field((0, 2, 3), description="blocks recorded after, numbered from 0")
    train_images: PositiveInt = Field(2000, description="canvases to train on")
    train_steps: PositiveInt = Field(200, description="optimiser steps")
    train_batch: PositiveInt = Field(16, description="canvases an optimiser step")
    learning_rate: PositiveFloat = Field(3e-3, description="peak learning rate of AdamW")
    n_fit: PositiveInt = Field(500, description="images of the split fit")
    n_val: PositiveInt = Field(200, description="images of the split val")
    n_probe_train: PositiveInt = Field(400, description="images of the split probe_train")
    n_probe_val: PositiveInt = Field(200, description="images of the split probe_val")
    max_tokens_per_shard: PositiveInt = Field(25_000, description="tokens a shard file, counted once for every layer")

    @model_validator(mode="after")
    def check_together(self) -> Self:
        """Check what only several fields can say."""
        if self.image_size % self.patch_size:
            raise ValueError(
                f"found image_size {self.image_size} and patch_size {self.patch_size}, want one that divides it"
            )
        if self.d_model % self.n_heads:
            raise ValueError(f"found d_model {self.d_model} and n_heads {self.n_heads}, want n_heads that divide it")
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"found layers {list(self.layers)}, want at least one, and none twice")
        if not all(0 <= layer < self.n_blocks for layer in self.layers):
            raise ValueError(
                f"found layers {list(self.layers)}, want block numbers from 0 to {self.n_blocks - 1}, "
                f"or more blocks than n_blocks {self.n_blocks}"
            )
        tokens = len(self.layers) * (1 + self.n_patches)
        if self.max_tokens_per_shard < tokens:
            raise ValueError(
                f"found max_tokens_per_shard {self.max_tokens_per_shard}, want at least {tokens}, one image's tokens"
            )
        return self

    @property
    def n_patches(self) -> int:
        """Patches an image."""
        return (self.image_size // self.patch_size) ** 2

    def n_images(self, split: str) -> int:
        """Images of a split."""
        return {"fit": self.n_fit, "val": self.n_val, "probe_train": self.n_probe_train, "probe_val": self.n_probe_val}[
            split
        ]

    @property
    def model_family(self) -> str:
        """What the shards' metadata calls the vision transformer's family: one that saev knows, or it would not open them."""
        return "fake-clip"

    @property
    def model_ckpt(self) -> str:
        """What the shards' metadata calls the vision transformer: other parameters make another."""
        return f"digits-vit-{self.fingerprint()}"

    def fingerprint(self) -> str:
        """First 12 hex digits of a SHA-256 over all the parameters."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:12]


class Parameters(_Section):
    """All parameters of a run."""

    layers: Choices[Layer] = Field(description="block numbers, as the shards name them: -2 if they say -2")
    latent_topk: PositiveInt | None = Field(
        None, description="K of the codes that the `pca` pipeline leaves; null: dense codes"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where tensors live; auto: cuda where there is one"
    )
    shards: ShardsParameters = Field(description="fit, val, probe_train and probe_val, the four shard folders")
    standardize: StandardizeParameters = StandardizeParameters()
    kmeans: KMeansParameters = KMeansParameters()
    pca: PCAParameters = PCAParameters()
    probe: ProbeParameters = ProbeParameters()
    dictionaries: dict[DictionaryName, DictionaryParameters] = Field(
        {}, description="other dictionaries for the same table, by the name that they have there"
    )
    images: ImagesParameters = ImagesParameters()
    digits: DigitsParameters = DigitsParameters()


def parse_parameters(raw: Mapping[str, Any]) -> Parameters:
    """The typed parameters of a configuration.

    Raises:
        ValueError: one line a fault, naming the parameter, what was found, and what there is or was wanted.
    """
    try:
        return Parameters.model_validate(raw)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(fault) for fault in error.errors())) from None


def _explain(fault: Any) -> str:
    location = tuple(str(part) for part in fault["loc"])
    name = ".".join(location)
    if fault["type"] == "extra_forbidden":
        section = _section(location[:-1])
        known = [".".join((*location[:-1], field)) for field in section.model_fields]
        # Compared without the section, which all of them share.
        near = get_close_matches(location[-1], section.model_fields, n=1)
        hint = f"did you mean `{'.'.join((*location[:-1], near[0]))}`? " if near else ""
        return f"Unknown parameter `{name}`: {hint}There are {', '.join(known)}."
    if fault["type"] == "missing":
        return f"Parameter `{name}` is missing: {_section(location[:-1]).model_fields[location[-1]].description}."
    if fault["type"] == "value_error":
        return f"Parameter `{name}`: {fault['ctx']['error']}."
    return f"Parameter `{name}` is {fault['input']!r}: {fault['msg']}.{_help(name, fault)}"


def _help(name: str, fault: Any) -> str:
    """A sentence on what was probably meant."""
    value = fault["input"]
    if fault["type"] == "tuple_type" and isinstance(value, int | str):
        return f" Several may be given, so write brackets: {name}:[{value}]."
    if isinstance(value, list) and fault["type"] in ("int_type", "float_type") and value:
        return f" It is one value a run: run {name}:{value[0]} first, then the others, each with its own `kedro run`."
    if fault["type"] == "string_type" and isinstance(value, int | float):
        return " It is text: put it in quotes in the YAML."
    return ""


def text_or_null(path: tuple[str, ...]) -> tuple[bool, bool]:
    """Whether the parameter of this name is text, and whether it may be null; neither where there is no such parameter."""
    try:
        types = _types(_section(path[:-1]).model_fields[path[-1]].annotation)
    except KeyError:
        return False, False
    return str in types, type(None) in types


def _types(annotation: Any) -> tuple[Any, ...]:
    return annotation, *get_args(annotation)


def _section(location: tuple[str, ...]) -> type[BaseModel]:
    """The section of this name.

    Raises:
        KeyError: there is none.
    """
    section: type[BaseModel] = Parameters
    if location[:1] == ("dictionaries",):
        return DictionaryParameters
    for part in location:
        annotation = section.model_fields[part].annotation
        inner = next(
            (each for each in _types(annotation) if isinstance(each, type) and issubclass(each, BaseModel)), None
        )
        if inner is None:
            raise KeyError(part)
        section = inner
    return section

"""The stages' sections."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    StrictBool,
    field_validator,
    model_validator,
)

from assay.parameters.fields import (
    ADDED,
    OPERATIONAL,
    SELECTS,
    Choices,
    Parts,
    Section,
    Seeds,
    check_braces,
)


class ShardsParameters(Section):
    """The four shard folders: each a saev shard folder, or a folder that holds exactly one.
    Relative to the project's root.
    """

    _no_braces = field_validator("*")(check_braces)

    fit: str = Field(description="fitted on (IN1K/train): statistics, k-means, PCA")
    val: str = Field(description="validation tokens (IN1K/val): NMSE")
    probe_train: str = Field(description="labeled patches the probes are fitted on (ADE20K/train)")
    probe_val: str = Field(description="labeled patches the probes are judged on (ADE20K/val)")


class StandardizeParameters(Section):
    """Mean and standard deviation of each dimension."""

    _no_braces = field_validator("statistics")(check_braces)

    statistics: str | None = Field(
        None,
        description=(
            "the user's own mu/sigma: a safetensors file with `mean`, `std` (d_model,); `{layer}`"
            " in it is replaced"
        ),
    )
    batch_size: PositiveInt = Field(16_384, description="tokens per batch")
    max_tokens: PositiveInt | None = Field(
        None, description="tokens that they are taken over, a random sample; null: all of them"
    )
    parts: Parts = Field(
        1,
        description=(
            "contiguous parts that they are taken in, and merged in order; several processes share"
            " them (docs/ranks.md)"
        ),
        json_schema_extra=ADDED,
    )
    checkpoint_steps: PositiveInt = Field(
        100, description="batches from one checkpoint to the next", json_schema_extra=OPERATIONAL
    )
    checkpoint_minutes: PositiveFloat = Field(
        1.0,
        description=(
            "minutes from one checkpoint to the next at the most; a pass that is killed loses no"
            " more"
        ),
        json_schema_extra=OPERATIONAL,
    )


class SparsityParameters(Section):
    """What is kept of dense k-means codes whose file would not fit on the disk, where a code of 0
    means far: one of the two.
    """

    top_k: PositiveInt | None = Field(
        None, description="how many of the largest entries of each patch are kept"
    )
    margin: PositiveFloat | None = Field(
        None, description="entries of at least this magnitude are kept"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.top_k is None) == (self.margin is None):
            raise ValueError(f"found top_k {self.top_k} and margin {self.margin}, want one of them")
        return self


class KMeansParameters(Section):
    """Mini-batch k-means (Sculley 2010), with scikit-learn's names."""

    n_clusters: PositiveInt = Field(16_384, description="clusters")
    batch_size: PositiveInt = Field(8_192, description="tokens per step")
    n_init: PositiveInt = Field(
        4, description="k-means++ initializations, judged on held-out tokens"
    )
    init_size: PositiveInt | None = Field(
        None, description="tokens of the reservoir; null: 3 x max(n_clusters, batch_size)"
    )
    max_iter: PositiveInt = Field(200, description="passes over the tokens at the most")
    max_tokens: PositiveInt | None = Field(
        None,
        description=(
            "tokens that it is fitted on, the same random sample in each pass; null: all of them"
        ),
    )
    order: str | None = Field(
        None,
        description=(
            "a .npy file of token numbers to read in each pass (docs/reading.md); null: shuffled by"
            " the seed"
        ),
    )
    tol: float = Field(
        0.0, ge=0, description="stop when centers move less, relative to the variance; 0: never"
    )
    max_no_improvement: PositiveInt | None = Field(
        10, description="stop after so many steps without a lower smoothed inertia"
    )
    reassignment_ratio: float = Field(
        0.01, ge=0, le=1, description="clusters below this share of the mean count are reseeded"
    )
    decay: float = Field(
        0.1,
        gt=0,
        le=1,
        description=(
            "of the counts before each further pass; 1: learning rate 1/n over all tokens ever"
        ),
    )
    checkpoint_steps: PositiveInt = Field(
        500, description="steps from one checkpoint to the next", json_schema_extra=OPERATIONAL
    )
    checkpoint_minutes: PositiveFloat = Field(
        1.0,
        description=(
            "minutes from one checkpoint to the next at the most, seeding included; a fit that is"
            " killed loses no more"
        ),
        json_schema_extra=OPERATIONAL,
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
    ] = Field(
        ("kmeans-onehot", "kmeans-invdist"),
        description="codes that are made and probed",
        json_schema_extra=SELECTS,
    )
    sparsity: SparsityParameters | None = Field(
        None,
        description=(
            "written of `kmeans-invdist`, `-distance-cosine` and `-distance-unit` if the disk is"
            " too small for all; null: nothing"
        ),
        json_schema_extra=SELECTS,
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="of the seeding, the shuffling and the reseeding",
        json_schema_extra=SELECTS,
    )
    more_seeds: Seeds = Field(
        (),
        description=(
            "fit again with each of these: rows of their own, spread in the paper's table,"
            " agreement with the first"
        ),
        json_schema_extra=SELECTS,
    )

    @model_validator(mode="after")
    def _sizes_fit_the_clusters(self) -> Self:
        if self.init_size is not None and self.init_size < self.n_clusters:
            raise ValueError(
                f"found init_size {self.init_size}, want at least n_clusters, {self.n_clusters}, or"
                " null"
            )
        if len({self.seed, *self.more_seeds}) <= len(self.more_seeds):
            raise ValueError(
                f"found seed {self.seed} and more_seeds {list(self.more_seeds)}, want none twice"
            )
        if self.sparsity is not None and (self.sparsity.top_k or 0) > self.n_clusters:
            raise ValueError(
                f"found sparsity.top_k {self.sparsity.top_k}, want at most n_clusters,"
                f" {self.n_clusters}"
            )
        return self


class PCAParameters(Section):
    """Full-rank PCA and its top-K codes."""

    topk: Choices[PositiveInt] = Field(
        (1, 4, 16, 64, 256, 1024),
        description="values of K that are reported; those above d_model are left out",
        json_schema_extra=SELECTS,
    )
    whiten: StrictBool = Field(
        False,
        description=(
            "codes are coefficients over the standard deviation along each component, and the K"
            " largest are those that are the largest so"
        ),
        json_schema_extra=SELECTS,
    )
    batch_size: PositiveInt = Field(16_384, description="tokens per batch")
    max_tokens: PositiveInt | None = Field(
        None, description="tokens that it is fitted on, a random sample; null: all of them"
    )
    parts: Parts = Field(
        1,
        description=(
            "contiguous parts that it is fitted in, and merged in order; several processes share"
            " them (docs/ranks.md)"
        ),
        json_schema_extra=ADDED,
    )
    checkpoint_steps: PositiveInt = Field(
        100, description="batches from one checkpoint to the next", json_schema_extra=OPERATIONAL
    )
    checkpoint_minutes: PositiveFloat = Field(
        1.0,
        description=(
            "minutes from one checkpoint to the next at the most; a fit that is killed loses no"
            " more"
        ),
        json_schema_extra=OPERATIONAL,
    )


class ProbeParameters(Section):
    """1-D logistic probes, one for every (feature, class)."""

    void: Literal["drop", "negative", "class"] = Field(
        "drop",
        description="void patches: left out; negatives of every class; or class 0, as saev has it",
    )
    ridge: float = Field(
        1e-8, gt=0, description="lambda of the ridge lambda/2 (w^2 + (b - b0)^2), nats"
    )
    class_weight: Literal["balanced"] | None = Field(
        None,
        description=(
            "null: every patch weighs the same, as saev has it; balanced: by inverse frequency of"
            " the class"
        ),
    )
    max_iter: PositiveInt = Field(200, description="Newton steps at the most")
    slab_rows: PositiveInt = Field(16_384, description="patches per batch")
    slab_features: PositiveInt | None = Field(
        None,
        description=(
            "features worked on together, a pass over the codes each; null: what a quarter of free"
            " memory holds"
        ),
        json_schema_extra=OPERATIONAL,
    )
    parts: Parts = Field(
        1,
        description=(
            "contiguous slabs of features that are worked on one after the other, or shared by"
            " several processes (docs/ranks.md)"
        ),
        json_schema_extra=OPERATIONAL,
    )
    checkpoint_minutes: PositiveFloat = Field(
        1.0,
        description=(
            "minutes from one checkpoint to the next at the most; work that is killed loses no more"
        ),
        json_schema_extra=OPERATIONAL,
    )
    certified_pairs: PositiveInt = Field(
        64,
        description="random probes held against the patches themselves, beside each class's best",
    )
    top_features: PositiveInt = Field(
        10, description="features of the highest AP that are named for each class"
    )
    examples: PositiveInt = Field(
        6, description="validation examples where a class's best feature is strongest that are kept"
    )

"""Every parameter of a run: its unit, its default and what it may be, in one place.

The YAML in ``conf/`` and ``--params`` on the command line only override what stands here.
Everything is checked before any work starts; an unknown name is an error that says which names
there are.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from assay.parameters.dictionaries import DictionaryParameters
from assay.parameters.digits import DigitsParameters
from assay.parameters.extract import ExtractParameters
from assay.parameters.fields import OPERATIONAL, Choices, DictionaryName, Layer, Section
from assay.parameters.images import ImagesParameters
from assay.parameters.stages import (
    KMeansParameters,
    PCAParameters,
    ProbeParameters,
    ShardsParameters,
    StandardizeParameters,
)


class Parameters(Section):
    """All parameters of a run."""

    layers: Choices[Layer] = Field(
        description="block numbers, as the shards name them: -2 if they say -2"
    )
    latent_topk: PositiveInt | None = Field(
        None, description="K of the codes that the `pca` pipeline leaves; null: dense codes"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="where tensors live; auto: cuda where there is one",
        json_schema_extra=OPERATIONAL,
    )
    ranks_timeout_seconds: PositiveFloat = Field(
        120.0,
        description="for how long ranks wait for one that hangs (docs/ranks.md), before all end",
        json_schema_extra=OPERATIONAL,
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=64,
        description=(
            "threads that read ahead in each pass; null: half the processors, 2 to 8. More of them"
            " where the file system is far away: they wait for it side by side"
        ),
        json_schema_extra=OPERATIONAL,
    )
    shards: ShardsParameters = Field(
        description="fit, val, probe_train and probe_val, the four shard folders"
    )
    extract: ExtractParameters = ExtractParameters()
    standardize: StandardizeParameters = StandardizeParameters()
    kmeans: KMeansParameters = KMeansParameters()
    pca: PCAParameters = PCAParameters()
    probe: ProbeParameters = ProbeParameters()
    dictionaries: dict[DictionaryName, DictionaryParameters] = Field(
        {}, description="other dictionaries for the same table, by the name that they have there"
    )
    images: ImagesParameters = ImagesParameters()
    class_names: str | None = Field(
        None,
        min_length=1,
        description="a file that names the labels, for tables and pictures; null: numbers alone",
    )
    digits: DigitsParameters = DigitsParameters()

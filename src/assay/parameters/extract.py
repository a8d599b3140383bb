"""What is recorded here: images, the model that is shown them, and how."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, StrictBool, model_validator

from assay.geometry import Geometry, Resample, Side, check_resize
from assay.parameters.fields import Choices, Section, Seed

SPLITS = ("fit", "val", "probe_train", "probe_val")

Id = Annotated[int, Field(ge=0, lt=2**16)]
"""Of a mask's pixel, or a label."""


class RecordingParameters(Section):
    """How images become activations, whatever the model is."""

    geometry: Geometry = Field(
        "crop",
        description=(
            "crop: the shorter side resized, then the center; stretch: the whole image on the grid;"
            " aspect: on the grid of as many patches that is nearest in aspect, image by image, as"
            " saev does for DINOv3"
        ),
    )
    resize: Side | None = Field(
        None,
        description=(
            "of crop: the shorter side before the crop, in pixels; null: the checkpoint's, or the"
            " crop's longer side where that is more"
        ),
    )
    grid: tuple[PositiveInt, PositiveInt] | None = Field(
        None,
        description=(
            "(rows, columns) of patches; null: the checkpoint's size over its patch size, and 16 x"
            " 16 for aspect, which takes their product alone"
        ),
    )
    resample: Resample | None = Field(
        None, description="how images are resized; null: as the checkpoint says, lanczos for aspect"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the forward pass; activations are float32 on disk"
    )
    cls_token: StrictBool = Field(
        True, description="the CLS token is recorded too, where the model has one; nothing reads it"
    )
    batch_size: PositiveInt = Field(
        32, description="images a forward pass; another rounds activations otherwise"
    )
    max_tokens_per_shard: PositiveInt = Field(
        400_000, description="tokens per shard file, counted once for every layer"
    )

    @model_validator(mode="after")
    def _resize_goes_with_crop(self) -> Self:
        check_resize(self.geometry, self.resize)
        return self


class ImagesToRecord(Section):
    """The images of a split."""

    images: str | None = Field(
        None,
        min_length=1,
        description="their folder; null: nothing is recorded, and shards.<split> is read",
    )
    pattern: str | None = Field(
        None, min_length=1, description="glob of the images inside it; null: all, at any depth"
    )
    names: str | None = Field(
        None,
        min_length=1,
        description="a text file that lists the images instead, one per line",
    )
    examples: PositiveInt | None = Field(
        None, description="images of a random sample, in the order of their paths; null: all"
    )
    seed: Seed = Field(0, description="of that sample")


class LabeledImagesToRecord(ImagesToRecord):
    """The images of a split that probes need, and their segmentation masks."""

    masks: str | None = Field(
        None,
        min_length=1,
        description="folder of the masks, under the images' paths in it, with another suffix",
    )


class LabelsParameters(Section):
    """What the ids in both probe splits' masks mean. The names are those of `assay labels`."""

    void: tuple[Id, ...] = Field((0,), description="ids that have no vote")
    offset: int = Field(
        0, gt=-(2**16), lt=2**16, description="added to every other id to make its label"
    )
    mapping: dict[Id, Id] | None = Field(
        None, description="label of each id, in the place of an offset; 0 is void"
    )
    n_classes: int | None = Field(
        None, ge=2, le=2**16, description="labels there may be, void counted; null: as are found"
    )
    replace: dict[str, str] = Field(
        {},
        description=(
            "text that is replaced in an image's path to make its mask's: {leftImg8bit:"
            " gtFine_labelIds}"
        ),
    )


class ModelToShow(Section):
    """The model that images are shown."""

    model: str | None = Field(
        None,
        min_length=1,
        description=(
            "a vision transformer: a folder as transformers saves it, hf:owner/name[@revision] of"
            " the Hub, timm:NAME, or python:package.module:function of your own; null: none"
        ),
    )
    revision: str | None = Field(
        None, min_length=1, description="branch, tag or commit on the Hub; null: the default branch"
    )


class FolderParameters(RecordingParameters, ModelToShow, LabeledImagesToRecord, LabelsParameters):
    """One folder of images, as `assay extract` records it."""

    images: str = Field(min_length=1, description="their folder")
    model: str = Field(min_length=1, description="as extract.model")
    layers: Choices[Annotated[int, Field(ge=0)]] = Field(description="block numbers from 0")


class ExtractParameters(RecordingParameters, ModelToShow):
    """Shards that are recorded here from images: those of every split that names some, by one model
    and in one geometry.
    """

    fit: ImagesToRecord = Field(ImagesToRecord(), description="images of shards.fit")
    val: ImagesToRecord = Field(ImagesToRecord(), description="images of shards.val")
    probe_train: LabeledImagesToRecord = Field(
        LabeledImagesToRecord(), description="images and masks of shards.probe_train"
    )
    probe_val: LabeledImagesToRecord = Field(
        LabeledImagesToRecord(), description="images and masks of shards.probe_val"
    )
    labels: LabelsParameters = Field(
        LabelsParameters(), description="what the ids in the masks of both probe splits mean"
    )

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        splits = self.splits
        if splits and self.model is None:
            raise ValueError(
                f"found {splits[0]}.images {self.split(splits[0]).images} and no model, want"
                " extract.model: the vision transformer that is shown them"
            )
        if self.model is not None and not splits:
            raise ValueError(
                f"found model {self.model} and no images, want extract.fit.images or another"
                " split's: the folder that is to be recorded"
            )
        for name in ("probe_train", "probe_val"):
            split: LabeledImagesToRecord = getattr(self, name)
            if (split.images is None) != (split.masks is None):
                raise ValueError(
                    f"found {name}.images {split.images} and {name}.masks {split.masks}, want both:"
                    " probes need a label for each patch"
                )
        return self

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are recorded here."""
        return tuple(name for name in SPLITS if self.split(name).images is not None)

    def split(self, name: str) -> ImagesToRecord:
        """The images of a split, by its name."""
        split: ImagesToRecord = getattr(self, name)
        return split

    @property
    def recording(self) -> RecordingParameters:
        """What is the same for every split, whatever the model is."""
        return RecordingParameters(
            **{name: getattr(self, name) for name in RecordingParameters.model_fields}
        )

"""The `extract` pipeline: the shards of every split whose images are named."""

from collections.abc import Mapping

from kedro.pipeline import Pipeline, node

from assay.parameters import RecordingParameters
from assay.pipelines.extract.nodes import record_images
from assay.pipelines.stream import bind


def create_pipeline(splits: Mapping[str, tuple[int, ...]], how: RecordingParameters) -> Pipeline:
    """Record each split, of which the layers are given; those of the probes with labels."""
    return Pipeline(
        [
            node(
                bind(record_images, layers=layers, how=how),
                [
                    "extract_model",
                    f"extract_images_{split}",
                    "params:device",
                    *([f"extract_masks_{split}"] if split.startswith("probe") else []),
                ],
                f"shards_{split}",
                name=f"extract.record.{split}",
            )
            for split, layers in splits.items()
        ]
    )

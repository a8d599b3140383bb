"""The `digits` pipeline: the embedded default's shards and images."""

from kedro.pipeline import Pipeline, node

from assay.pipelines.digits.nodes import draw_images, record_split, train_vit
from assay.pipelines.stream import bind


def create_pipeline(splits: tuple[str, ...]) -> Pipeline:
    """Train the small vision transformer and record the splits that are wanted of it, with the
    images of probe_val.
    """
    train = node(train_vit, "params:digits", "digits_vit", name="digits.train")
    recordings = [
        node(
            bind(record_split, split=split),
            ["digits_vit", "params:digits"],
            f"shards_{split}",
            name=f"digits.record.{split}",
        )
        for split in splits
    ]
    draw = node(
        bind(draw_images, split="probe_val"),
        "params:digits",
        "images_probe_val",
        name="digits.draw.probe_val",
    )
    return Pipeline([train, *recordings, *([draw] if "probe_val" in splits else [])])

from kedro.pipeline import Pipeline, node

from assay.pipelines.digits.nodes import record_split, train_vit
from assay.pipelines.stream import bind


def create_pipeline(splits: tuple[str, ...]) -> Pipeline:
    """Train the small vision transformer and record the splits that are wanted of it."""
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
    return Pipeline([train, *recordings])

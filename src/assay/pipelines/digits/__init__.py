"""The `digits` pipeline."""

from assay.pipelines.digits.pipeline import create_pipeline

__all__ = ["create_pipeline"]

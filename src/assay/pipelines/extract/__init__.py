"""The `extract` pipeline."""

from assay.pipelines.extract.pipeline import create_pipeline

__all__ = ["create_pipeline"]

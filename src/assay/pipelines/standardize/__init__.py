"""The `standardize` pipeline."""

from assay.pipelines.standardize.pipeline import create_pipeline

__all__ = ["create_pipeline"]

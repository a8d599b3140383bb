"""The `encode` pipeline."""

from assay.pipelines.encode.pipeline import create_pipeline

__all__ = ["create_pipeline"]

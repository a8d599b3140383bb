"""The `dictionaries` pipeline."""

from assay.pipelines.dictionaries.pipeline import create_pipeline

__all__ = ["create_pipeline"]

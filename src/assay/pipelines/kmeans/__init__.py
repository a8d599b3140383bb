"""The `kmeans` pipeline."""

from assay.pipelines.kmeans.pipeline import create_pipeline

__all__ = ["create_pipeline"]

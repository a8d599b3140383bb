"""The `pca` pipeline."""

from assay.pipelines.pca.pipeline import create_pipeline

__all__ = ["create_pipeline"]

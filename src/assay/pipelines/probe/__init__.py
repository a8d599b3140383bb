"""The `probe` pipeline."""

from assay.pipelines.probe.pipeline import create_pipeline

__all__ = ["create_pipeline"]

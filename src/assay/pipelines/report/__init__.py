"""The `report` pipeline."""

from assay.pipelines.report.pipeline import create_layer_pipeline, create_pipeline

__all__ = ["create_layer_pipeline", "create_pipeline"]

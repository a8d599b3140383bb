"""The `extract` pipeline."""

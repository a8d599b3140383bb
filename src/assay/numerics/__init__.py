"""Estimators, probes and metrics on tensors: no files, no pipelines, so that it also runs alone on a GPU machine."""

"""Assay: what a dictionary of vision features is worth, beside k-means and PCA."""

__version__ = "0.1.0"

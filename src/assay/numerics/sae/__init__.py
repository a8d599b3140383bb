"""Sparse autoencoders that were trained elsewhere: codes and reconstruction."""

from assay.numerics.sae.autoencoder import SparseAutoencoder

__all__ = ["SparseAutoencoder"]

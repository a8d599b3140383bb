"""Principal components of a stream of activations, exactly, and their top-K codes."""

from assay.numerics.pca.axes import orient, principal_axes, scatter_step, top_k
from assay.numerics.pca.convergence import Convergence, subspace_drift
from assay.numerics.pca.estimator import StreamingPCA

__all__ = [
    "Convergence",
    "StreamingPCA",
    "orient",
    "principal_axes",
    "scatter_step",
    "subspace_drift",
    "top_k",
]

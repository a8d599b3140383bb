"""Estimators, dictionaries, probes and metrics on tensors: no files, no pipelines, so that it also
runs alone on a GPU machine.
"""

from assay.architecture import Architecture
from assay.codes import Codes
from assay.numerics.codes import (
    SelectedCodes,
    TensorCodes,
    TopKCodes,
    densify,
    measure_l0,
    sparsify,
)
from assay.numerics.dictionary import Centers, Components, Dictionary, open_dictionary
from assay.numerics.fitted import NotFittedError
from assay.numerics.kmeans import MiniBatchKMeans, NearestCenters, kmeans_plus_plus
from assay.numerics.moments import StreamingMoments, standardize, unstandardize
from assay.numerics.pca import StreamingPCA, top_k
from assay.numerics.probe import (
    Certificate,
    CertificateError,
    LogisticProbe1d,
    certify_sweep,
    fit_sweep,
    judge_sweep,
)
from assay.numerics.ranking import purity_at_k
from assay.numerics.reconstruction_error import ErrorSums, sum_errors
from assay.numerics.sae import SparseAutoencoder
from assay.numerics.scores import ClassScores, Judgment, Scores, best_features, score_encoding

__all__ = [
    "Architecture",
    "Centers",
    "Certificate",
    "CertificateError",
    "ClassScores",
    "Codes",
    "Components",
    "Dictionary",
    "ErrorSums",
    "Judgment",
    "LogisticProbe1d",
    "MiniBatchKMeans",
    "NearestCenters",
    "NotFittedError",
    "Scores",
    "SelectedCodes",
    "SparseAutoencoder",
    "StreamingMoments",
    "StreamingPCA",
    "TensorCodes",
    "TopKCodes",
    "best_features",
    "certify_sweep",
    "densify",
    "fit_sweep",
    "judge_sweep",
    "kmeans_plus_plus",
    "measure_l0",
    "open_dictionary",
    "purity_at_k",
    "score_encoding",
    "sparsify",
    "standardize",
    "sum_errors",
    "top_k",
    "unstandardize",
]

"""k-means on a GPU or a CPU: the estimator, seeding, steps, and the nearest of many centers."""

from assay.numerics.kmeans.distances import chunked_distances, nearest_in_float64, paired_distances
from assay.numerics.kmeans.estimator import MiniBatchKMeans
from assay.numerics.kmeans.nearest import NearestCenters
from assay.numerics.kmeans.progress import METRICS
from assay.numerics.kmeans.reassignment import collapsed_clusters, reassign_centers
from assay.numerics.kmeans.seeding import Seeding, kmeans_plus_plus
from assay.numerics.kmeans.step import low_count_clusters, mini_batch_step, pull_centers

__all__ = [
    "METRICS",
    "MiniBatchKMeans",
    "NearestCenters",
    "Seeding",
    "chunked_distances",
    "collapsed_clusters",
    "kmeans_plus_plus",
    "low_count_clusters",
    "mini_batch_step",
    "nearest_in_float64",
    "paired_distances",
    "pull_centers",
    "reassign_centers",
]

"""The Kedro datasets around the bytes on disk."""

from assay.io.datasets.checkpoints import CheckpointsDataset
from assay.io.datasets.class_names import ClassNamesDataset
from assay.io.datasets.codes import CodesDataset
from assay.io.datasets.images import ImagesDataset
from assay.io.datasets.masks import MasksDataset
from assay.io.datasets.sae import SaeDataset
from assay.io.datasets.saev import SaevInferenceDataset
from assay.io.datasets.shards import ShardsDataset, find_shards
from assay.io.datasets.tensors import TensorsDataset

__all__ = [
    "CheckpointsDataset",
    "ClassNamesDataset",
    "CodesDataset",
    "ImagesDataset",
    "MasksDataset",
    "SaeDataset",
    "SaevInferenceDataset",
    "ShardsDataset",
    "TensorsDataset",
    "find_shards",
]

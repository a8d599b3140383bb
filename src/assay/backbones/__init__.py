"""Vision transformers whose activations are recorded. Their libraries are imported where a model is
opened, and nowhere else.
"""

from assay.backbones.callable import CallableBackbone
from assay.backbones.description import Backbone, Description, Precision, Preprocessing
from assay.backbones.opening import BackboneHandle, look, open_backbone

__all__ = [
    "Backbone",
    "BackboneHandle",
    "CallableBackbone",
    "Description",
    "Precision",
    "Preprocessing",
    "look",
    "open_backbone",
]

"""Vision transformers whose activations are recorded. Their libraries are imported where a model is
opened, and nowhere else.
"""

from assay.backbones.description import Backbone, Description, Precision, Preprocessing

__all__ = ["Backbone", "Description", "Precision", "Preprocessing"]

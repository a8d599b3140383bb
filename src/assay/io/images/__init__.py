"""Images of a split, and masks."""

from assay.io.images.images import Images, write_images
from assay.io.images.layout import ImageLayout, Placement

__all__ = ["ImageLayout", "Images", "Placement", "write_images"]

"""Images of a split, and masks."""

from assay.io.images.images import ImageLayout, Images, write_images

__all__ = ["ImageLayout", "Images", "write_images"]

"""Canvases of handwritten digits with void between them, and the pixels' classes."""

from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
from numpy.typing import NDArray

DIGIT_SIZE = 8
"""Height and width of scikit-learn's digits, in pixels."""

MAX_VALUE = 16.0
"""Ink of a full pixel in scikit-learn's digits."""

INK_THRESHOLD = 0.25
"""A pixel whose ink (0 to 1) is above this belongs to its digit; below, it is void."""

VOID = 0
N_CLASSES = 11
"""Void (0) and the ten digits, each as its value plus one."""


@dataclass(frozen=True)
class Canvases:
    """Images and the class of every pixel.

    Attributes:
        images: float32 (n_images, size, size), ink in [0, 1].
        masks: uint8 (n_images, size, size), 0 for void and digit + 1, thus 1 to 10, for ink.
    """

    images: NDArray[np.float32]
    masks: NDArray[np.uint8]


def cell_size(size: int, digits_per_image: int, stride: int) -> int:
    """Side, in pixels, of the cells of the smallest square grid that has a cell for every digit of
    a canvas.

    Args:
        size: height and width of the canvas, in pixels.
        digits_per_image: digits on the canvas.
        stride: the cells' corners lie on multiples of this many pixels.

    Raises:
        ValueError: a cell is too small for a digit.
    """
    cells = ceil(sqrt(digits_per_image))
    cell = size // cells // stride * stride
    if cell < DIGIT_SIZE:
        raise ValueError(
            f"found a canvas of {size} x {size} pixels for {digits_per_image} digits, want at least"
            f" {cells * ceil(DIGIT_SIZE / stride) * stride} pixels a side: enlarge the canvas or"
            " lower digits_per_image"
        )
    return cell


def draw_canvases(
    digits: NDArray[np.floating],
    targets: NDArray[np.integer],
    *,
    n_images: int,
    size: int,
    digits_per_image: int,
    stride: int,
    seed: int | np.random.SeedSequence,
) -> Canvases:
    """Lay random digits at random places that do not overlap.

    A canvas is cut into square cells, as large as leaves one for every digit (see `cell_size`).
    Each digit gets a cell of its own, drawn without replacement, and a random place inside it. The
    digits are drawn with replacement.

    Args:
        digits: float (n_digits, 8, 8), ink from 0 to 16, as ``sklearn.datasets.load_digits`` gives
            it.
        targets: int (n_digits,), the digits' values, 0 to 9.
        n_images: canvases to draw.
        size: height and width of a canvas, in pixels.
        digits_per_image: digits on every canvas.
        stride: step between the places a digit may take, in pixels: 1 for any place.
        seed: the only source of randomness.

    Raises:
        ValueError: the canvas is too small for its digits, or there are no digits to draw from.
    """
    if len(digits) == 0 or len(digits) != len(targets):
        raise ValueError(
            f"found {len(digits)} digits and {len(targets)} targets, want as many of each, at"
            " least one"
        )
    cell = cell_size(size, digits_per_image, stride)
    side = size // cell
    places = (cell - DIGIT_SIZE) // stride + 1
    rng = np.random.default_rng(seed)
    shape = (n_images, digits_per_image)
    chosen = rng.integers(len(digits), size=shape)
    cells = rng.permuted(np.tile(np.arange(side * side), (n_images, 1)), axis=1)[
        :, :digits_per_image
    ]
    tops = cells // side * cell + stride * rng.integers(places, size=shape)
    lefts = cells % side * cell + stride * rng.integers(places, size=shape)

    span = np.arange(DIGIT_SIZE)
    pixels = (
        np.arange(n_images)[:, None, None, None],
        tops[:, :, None, None] + span[:, None],
        lefts[:, :, None, None] + span,
    )
    ink = (digits[chosen] / MAX_VALUE).astype(np.float32)
    images = np.zeros((n_images, size, size), dtype=np.float32)
    masks = np.full((n_images, size, size), VOID, dtype=np.uint8)
    images[pixels] = ink
    masks[pixels] = np.where(ink > INK_THRESHOLD, targets[chosen][:, :, None, None] + 1, VOID)
    return Canvases(images, masks)

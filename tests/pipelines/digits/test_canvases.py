import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.pipelines.digits.canvases import DIGIT_SIZE, INK_THRESHOLD, draw_canvases

FULL = np.full((3, DIGIT_SIZE, DIGIT_SIZE), 16.0)
TARGETS = np.array([0, 4, 9])


@given(
    digits_per_image=st.integers(1, 9),
    slack=st.integers(0, 20),
    stride=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=40)
def test_digits_lie_whole_apart_and_on_the_stride(digits_per_image, slack, stride, seed):
    size = 3 * 12 + slack
    canvases = draw_canvases(
        FULL,
        TARGETS,
        n_images=4,
        size=size,
        digits_per_image=digits_per_image,
        stride=stride,
        seed=seed,
    )
    assert canvases.images.shape == canvases.masks.shape == (4, size, size)
    assert canvases.images.dtype == np.float32
    assert canvases.masks.dtype == np.uint8
    # Full squares of ink keep their area only if none covers another or is cut off.
    assert (canvases.images.sum(axis=(1, 2)) == digits_per_image * DIGIT_SIZE**2).all()
    for mask in canvases.masks:
        uncovered = mask.copy()
        while uncovered.any():
            top, left = np.argwhere(uncovered)[0]
            square = uncovered[top : top + DIGIT_SIZE, left : left + DIGIT_SIZE]
            assert square.shape == (DIGIT_SIZE, DIGIT_SIZE)
            assert np.unique(square).size == 1 and square[0, 0] in TARGETS + 1
            assert top % stride == 0 and left % stride == 0
            square[:] = 0


def test_every_place_is_taken_sooner_or_later():
    canvases = draw_canvases(
        FULL, TARGETS, n_images=500, size=12, digits_per_image=1, stride=1, seed=0
    )
    corners = {tuple(np.argwhere(mask)[0].tolist()) for mask in canvases.masks}
    assert corners == {(top, left) for top in range(5) for left in range(5)}


def test_mask_is_the_ink_above_the_threshold():
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 17, size=(20, DIGIT_SIZE, DIGIT_SIZE)).astype(float)
    canvases = draw_canvases(
        digits, np.arange(20) % 10, n_images=30, size=24, digits_per_image=4, stride=2, seed=1
    )
    np.testing.assert_array_equal(canvases.masks > 0, canvases.images > INK_THRESHOLD)
    assert canvases.images.min() == 0 and canvases.images.max() == 1
    assert set(np.unique(canvases.masks)) == set(range(11))


def test_canvases_come_from_the_seed_alone():
    def draw(seed):
        return draw_canvases(
            FULL, TARGETS, n_images=5, size=32, digits_per_image=3, stride=1, seed=seed
        )

    np.testing.assert_array_equal(draw(1).masks, draw(1).masks)
    assert not np.array_equal(draw(1).masks, draw(2).masks)


def test_a_canvas_too_small_for_its_digits_is_refused():
    with pytest.raises(
        ValueError, match="found a canvas of 15 x 15 pixels for 2 digits, want at least 16 pixels"
    ):
        draw_canvases(FULL, TARGETS, n_images=1, size=15, digits_per_image=2, stride=1, seed=0)
    draw_canvases(FULL, TARGETS, n_images=1, size=16, digits_per_image=2, stride=1, seed=0)


@pytest.mark.parametrize("n_targets", [0, 2])
def test_digits_without_targets_are_refused(n_targets):
    with pytest.raises(ValueError, match=re.escape(f"found 3 digits and {n_targets} targets")):
        draw_canvases(
            FULL, TARGETS[:n_targets], n_images=1, size=16, digits_per_image=1, stride=1, seed=0
        )

"""The gallery: the classes and images that the table says, with the right patch outlined and the
map in color.
"""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from assay.encodings import Encoding, Form, Model
from assay.io.images import ImageLayout, Images
from assay.io.shards import Shards
from assay.pipelines.report.gallery import COLOR, draw_gallery, draw_map, gather_examples

ROWS = [
    # layer, method, encoding, seed, map, best
    (3, "kmeans", "kmeans-onehot", 0, 0.9, False),
    (5, "kmeans", "kmeans-onehot", 0, 0.2, True),
    (5, "kmeans", "kmeans-onehot", 1, 0.3, True),
    (5, "kmeans", "kmeans-invdist", 0, 0.1, True),
    (3, "pca", "pca-topk-00004", None, 0.5, True),
    (5, "pca", "pca-topk-00004", None, 0.7, False),
]
ENCODINGS = (
    Encoding(Model("kmeans", 0), Form("onehot"), 8),
    Encoding(Model("kmeans", 1, is_of_several=True), Form("onehot"), 8),
    Encoding(Model("kmeans", 0), Form("invdist"), 8),
    Encoding(Model("pca"), Form("topk", 4), 4),
)


@pytest.fixture
def baselines():
    table = pd.DataFrame(ROWS, columns=["layer", "method", "encoding", "seed", "map", "best_layer"])
    return table.astype({"seed": "Int64"})


@pytest.fixture
def classes(baselines):
    """Three classes a row, the second of the highest AP, and one that was not scored."""
    found = []
    for row in baselines.to_dict("records"):
        about = {name: row[name] for name in ("layer", "encoding", "seed")}
        for label, ap in ((1, 0.2), (2, 0.6), (4, 0.4), (9, float("nan"))):
            found.append(about | {"label": label, "feature": 10 * label, "average_precision": ap})
    return pd.DataFrame(found)


def examples(marker: int) -> dict[str, torch.Tensor]:
    """Classes 1, 2 and 4; the images of a class begin at its label, the strongest patch is the
    marker.
    """
    label = torch.tensor([1, 2, 4])
    example = label[:, None] + torch.arange(2)
    strength = torch.zeros(3, 2, 16)
    strength[:, :, marker] = torch.tensor([2.0, 1.0])
    return {
        "label": label,
        "feature": label,
        "example": example,
        "patch": torch.full((3, 2), marker),
        "strength": strength,
    }


@pytest.fixture
def drawn(baselines, classes, planted, photographs):
    def run(most_classes=12):
        layers = [
            gather_examples(
                *(examples(layer + number) for number in range(len(ENCODINGS))),
                encodings=ENCODINGS,
                layer=layer,
            )
            for layer in (3, 5)
        ]
        images = Images(photographs, ImageLayout(patch_size=2, pattern="*.png"))
        return draw_gallery(
            baselines, classes, images, Shards(planted[1]), *layers, most_classes=most_classes
        )

    return run


def test_each_method_shows_its_best_row_at_its_best_layer(drawn):
    shown = [
        (item["method"], item["layer"], item["encoding"], item["seed"], item["label"])
        for item in drawn()
    ]
    kmeans = [("kmeans", 5, "kmeans-onehot", 1, label) for label in (2, 4, 1)]
    assert shown == kmeans + [("pca", 3, "pca-topk-00004", None, label) for label in (2, 4, 1)]
    assert [(item["label"], item["feature"]) for item in drawn(most_classes=1)] == [
        (2, 20),
        (2, 20),
    ]


def test_an_item_holds_its_classes_images(drawn):
    items = drawn()
    assert json.loads(json.dumps(items)) == items
    for item, patch in ((items[0], 6), (items[-1], 6)):  # layer 5, second name; layer 3, fourth
        assert [image["example"] for image in item["images"]] == [item["label"], item["label"] + 1]
        assert {image["patch"] for image in item["images"]} == {patch}
        kind, _, data = item["images"][0]["source"].partition(",")
        assert kind == "data:image/webp;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.size == (128, 128)


def test_an_item_has_the_name_of_its_class_where_there_are_names(drawn, classes):
    assert all("class_name" not in item for item in drawn())
    classes["class_name"] = classes["label"].map({1: "wall", 2: "sky", 4: "4", 9: "sea"})
    shown = [(item["label"], item["class_name"]) for item in drawn()]
    assert shown == [(2, "sky"), (4, "4"), (1, "wall")] * 2


def test_an_example_without_a_patch_that_counts_is_not_shown(
    baselines, classes, planted, photographs
):
    some = examples(3)
    some["patch"][:, 1] = -1
    layers = [
        gather_examples(*[some] * len(ENCODINGS), encodings=ENCODINGS, layer=layer)
        for layer in (3, 5)
    ]
    images = Images(photographs, ImageLayout(patch_size=2, pattern="*.png"))
    items = draw_gallery(baselines, classes, images, Shards(planted[1]), *layers, most_classes=1)
    assert [len(item["images"]) for item in items] == [1, 1]


def test_a_map_colors_patches_by_their_share_and_outlines_the_strongest():
    pixels = np.full((200, 200, 3), 255, dtype=np.uint8)
    share = np.zeros(16, dtype=np.float32)
    share[[5, 10]] = 1, 0.5
    drawn = draw_map(pixels, share, 5, 50).astype(int)
    assert drawn.shape == (200, 200, 3)
    np.testing.assert_array_equal(drawn[10, 10], 255)
    whole, half = drawn[75, 75], drawn[125, 125]  # the middles of patches 5 and 10
    assert np.abs(whole - (0.7 * np.array(COLOR) + 0.3 * 255)).max() <= 1
    assert np.abs(half - (0.35 * np.array(COLOR) + 0.65 * 255)).max() <= 1
    black = np.argwhere((drawn == 0).all(axis=2))
    assert black.min(axis=0).tolist() == [51, 51]
    assert black.max(axis=0).tolist() == [98, 98]


@pytest.mark.parametrize(
    ("grid", "shape"), [((8, 32), (130, 500)), ((32, 8), (900, 300)), ((16, 16), (333, 500))]
)
def test_a_map_lies_on_the_patches_of_an_images_own_grid(tmp_path, grid, shape):
    rows, columns = grid
    # The red and green of a patch tell its row and its column.
    down, across = np.indices(grid)
    colors = np.dstack([down * (255 // rows), across * (255 // columns), np.zeros(grid)])
    colors = colors.astype(np.uint8)
    whole = Image.fromarray(colors).resize(shape[::-1], Image.Resampling.NEAREST)
    whole.save(tmp_path / "a.png")
    images = Images(tmp_path, ImageLayout(patch_size=16, geometry="aspect", pattern="*.png"))
    pixels = images.read(0, 256)
    assert pixels.shape == (16 * rows, 16 * columns, 3)
    for strongest in (0, 37, 255):
        share = np.zeros(256, dtype=np.float32)
        share[strongest] = 1
        drawn = draw_map(pixels, share, strongest, 16).astype(int)
        colored = np.abs(drawn - pixels).sum(axis=2) > 60
        row, column = divmod(strongest, columns)
        inside = np.zeros_like(colored)
        inside[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = True
        assert not (colored & ~inside)[::4, ::4].any()
        assert (colored & inside).sum() > 200
        middle = pixels[16 * row + 8, 16 * column + 8].astype(int)
        np.testing.assert_allclose(middle, colors[row, column], atol=6)


def test_small_images_are_enlarged_by_a_whole_factor():
    drawn = draw_map(np.zeros((8, 16, 3), dtype=np.uint8), np.zeros(8, dtype=np.float32), 0, 4)
    assert drawn.shape == (128, 256, 3)

"""How checkpoints want their images: the forms that the families' published files have."""

import json

import pytest

from assay.backbones import Preprocessing
from assay.backbones.preprocessor import parse_preprocessing, read_preprocessing

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
STEPS = {"do_resize": True, "do_normalize": True}
NEWER = {"do_rescale": True, "rescale_factor": 0.00392156862745098, "do_convert_rgb": None}
BASE = {"size": 224, "resample": 3, **HALF}

PUBLISHED: dict = {
    "clip, old": (
        STEPS | IMAGENET | {"size": 224, "do_center_crop": True, "crop_size": 224, "resample": 3},
        (224, 224),
        224,
        "bicubic",
    ),
    "clip": (
        STEPS
        | NEWER
        | HALF
        | {
            "size": {"shortest_edge": 336},
            "do_center_crop": True,
            "crop_size": {"height": 336, "width": 336},
            "resample": 3,
        },
        (336, 336),
        336,
        "bicubic",
    ),
    "dinov2": (
        STEPS
        | NEWER
        | IMAGENET
        | {
            "size": {"shortest_edge": 256},
            "do_center_crop": True,
            "crop_size": {"height": 224, "width": 224},
            "resample": 3,
        },
        (224, 224),
        256,
        "bicubic",
    ),
    "dinov3": (
        STEPS
        | NEWER
        | IMAGENET
        | {
            "size": {"height": 224, "width": 224, "longest_edge": None},
            "do_center_crop": None,
            "crop_size": None,
            "default_to_square": True,
            "resample": 2,
            "image_processor_type": "DINOv3ViTImageProcessorFast",
            "data_format": "channels_first",
        },
        (224, 224),
        None,
        "bilinear",
    ),
    "siglip": (
        STEPS | NEWER | HALF | {"size": {"height": 384, "width": 384}, "resample": 3},
        (384, 384),
        None,
        "bicubic",
    ),
    "vit and mae, old": (STEPS | HALF | {"size": 224, "resample": 2}, (224, 224), None, "bilinear"),
    "deit, old": (
        STEPS | IMAGENET | {"size": 256, "do_center_crop": True, "crop_size": 224, "resample": 3},
        (224, 224),
        256,
        "bicubic",
    ),
    "deit": (
        STEPS
        | NEWER
        | IMAGENET
        | {
            "size": {"height": 256, "width": 256},
            "do_center_crop": True,
            "crop_size": {"height": 224, "width": 224},
            "resample": 3,
        },
        (224, 224),
        256,
        "bicubic",
    ),
    "beit, old": (
        STEPS | HALF | {"size": 384, "do_center_crop": False, "crop_size": 224, "resample": 2},
        (384, 384),
        None,
        "bilinear",
    ),
    "an oblong one": (
        HALF | {"size": [192, 384], "resample": 1},
        (192, 384),
        None,
        "lanczos",
    ),
    "a shorter side alone": (
        HALF | {"size": {"shortest_edge": 224}, "resample": 3},
        (224, 224),
        224,
        "bicubic",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_form_is_read(name):
    said, size, resize, resample = PUBLISHED[name]
    wanted = Preprocessing(
        tuple(said["image_mean"]), tuple(said["image_std"]), size, resize, resample
    )
    assert parse_preprocessing(said) == wanted


def test_images_that_are_not_normalized_stay_as_they_are():
    found = parse_preprocessing({"do_normalize": False, "size": 32, "resample": 3})
    assert (found.mean, found.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert parse_preprocessing(BASE | {"do_normalize": None}).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"do_resize": False}, "found do_resize False, wanted true"),
        ({"do_rescale": False}, "found do_rescale False, wanted true"),
        ({"rescale_factor": 1 / 127.5}, "found rescale_factor 0.0078.*, wanted 1/255"),
        ({"rescale_factor": "1/255"}, "wanted 1/255"),
        ({"do_pad": True}, "found do_pad"),
        ({"size": None}, "found size None, wanted a number"),
        ({"size": {"longest_edge": 224}}, "found size .*longest_edge"),
        ({"size": 0}, "found size 0, wanted whole"),
        ({"size": 2.5}, "found size 2.5, wanted whole"),
        ({"size": True}, "found size True, wanted whole"),
        ({"size": [224, 224, 3]}, "wanted whole numbers of pixels"),
        ({"do_center_crop": True}, "found crop_size None"),
        ({"do_center_crop": True, "size": [256, 224], "crop_size": 224}, "wanted a square"),
        ({"resample": 0}, "found resample 0, wanted 1"),
        ({"resample": None}, "found resample None"),
        ({"resample": True}, "found resample True"),
        ({"resample": [3]}, r"found resample \[3\]"),
        ({"image_mean": None}, "found image_mean None, wanted three"),
        ({"image_mean": [0.5]}, "found image_mean"),
        ({"image_mean": [0.5, 0.5, "x"]}, "found image_mean"),
        ({"image_std": [0.5, 0.5, 0.0]}, "wanted numbers above 0"),
    ],
)
def test_what_is_not_understood_is_refused(said, message):
    with pytest.raises(ValueError, match=message):
        parse_preprocessing(BASE | said)


def test_the_file_may_be_that_of_the_whole_processor(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found no preprocessor_config.json, wanted the m"):
        read_preprocessing(tmp_path)
    whole = tmp_path / "processor_config.json"
    whole.write_text(json.dumps({"image_processor": BASE, "processor_class": "CLIPProcessor"}))
    assert read_preprocessing(tmp_path).size == (224, 224)
    own = tmp_path / "preprocessor_config.json"
    own.write_text(json.dumps(BASE | {"size": 96}))
    assert read_preprocessing(tmp_path).size == (96, 96)
    own.write_text(json.dumps(BASE | {"size": -1}))
    with pytest.raises(ValueError, match=r"preprocessor_config.json: found size -1"):
        read_preprocessing(tmp_path)
    own.write_text("[]")
    with pytest.raises(ValueError, match=r"found \[\], wanted an object"):
        read_preprocessing(tmp_path)

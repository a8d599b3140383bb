"""A split's images become shards: by the node, through the dataset, as a run has it."""

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from assay.backbones import Description, Preprocessing, look
from assay.backbones.dataset import BackboneDataset
from assay.io.datasets import ImagesDataset, MasksDataset, ShardsDataset
from assay.io.shards import Shards
from assay.io.shards.provenance import Provenance
from assay.parameters import (
    ImagesToRecord,
    LabelsParameters,
    RecordingParameters,
    parse_parameters,
)
from assay.pipelines.extract.geometry import (
    check_recording,
    find_grid,
    image_layout,
    mask_layout,
)
from assay.pipelines.extract.nodes import record_images
from assay.pipelines.extract.pipeline import create_pipeline
from vits import BLOCKS, PATCH, PREFIX, PREPROCESSING, WIDTH, make_model, write_images, write_model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"), 5, seed=0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: write_model(root / kind, kind) for kind in PREFIX}


def record(
    place: Path, model: Path, data: Path, *, layers=(0, 2), masks=False, **how: object
) -> Shards:
    """What a run does for one split."""
    parameters = RecordingParameters.model_validate({"batch_size": 2} | how)
    description = look(str(model))
    images: dict[str, Any] = {
        "filepath": str(data / "images"),
        "layout": image_layout(parameters, description, ImagesToRecord(), data),
    }
    labels = MasksDataset(
        filepath=str(data / "masks"),
        layout=mask_layout(parameters, description, LabelsParameters()),
        images=images,
    )
    dataset = ShardsDataset(filepath=str(place))
    dataset.save(
        record_images(
            BackboneDataset(model=str(model), revision=None).load(),
            ImagesDataset(**images).load(),
            "cpu",
            labels.load() if masks else None,
            layers=layers,
            how=parameters,
        )
    )
    return dataset.load()


def activations(shards: Shards) -> np.ndarray:
    """All that is recorded, (n_examples, n_layers, tokens, d_model)."""
    said = shards.metadata
    raw = np.concatenate([np.fromfile(path, "<f4") for path in sorted(shards.path.glob("acts*"))])
    return raw.reshape(-1, *said.example_shape)[: said.n_examples]


def hidden_states(kind: str, data: Path, layers=(0, 2)) -> np.ndarray:
    """What transformers gives, (n, n_layers, prefix + patches, d_model), of images of its size."""
    pixels = np.stack(
        [np.asarray(Image.open(path)) for path in sorted((data / "images").rglob("*.png"))]
    )
    mean, std = (torch.tensor(PREPROCESSING[f"image_{name}"]) for name in ("mean", "std"))
    given = ((torch.from_numpy(pixels).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    model = make_model(kind)
    with torch.inference_mode():
        batches = [model(each, output_hidden_states=True).hidden_states for each in given.split(2)]
    found = [torch.cat(states).numpy() for states in zip(*batches, strict=True)]
    return np.stack([found[layer + 1] for layer in layers], axis=1)


@pytest.mark.parametrize("kind", PREFIX)
@pytest.mark.parametrize("cls_token", [True, False])
def test_shards_are_the_blocks_outputs_with_the_cls_token_first_and_without_registers(
    kind, cls_token, models, data, tmp_path
):
    shards = record(tmp_path / "out", models[kind], data, cls_token=cls_token, masks=True)
    wanted = hidden_states(kind, data)
    patches = wanted[:, :, PREFIX[kind] :]
    has_cls = cls_token and PREFIX[kind] > 0
    assert shards.metadata.cls_token is has_cls
    if has_cls:
        patches = np.concatenate([wanted[:, :, :1], patches], axis=2)
    assert (shards.metadata.layers, shards.metadata.d_model) == ((0, 2), WIDTH)
    found = activations(shards)
    np.testing.assert_allclose(found, patches, rtol=0, atol=1e-6)
    for register in range(1, PREFIX[kind]):
        gap = np.abs(found - wanted[:, :, register, None]).max(axis=-1)
        assert gap.min() > 1e-3
    masks = [np.asarray(Image.open(path)) for path in sorted((data / "masks").rglob("*.png"))]
    votes = np.stack([mask[::PATCH, ::PATCH].ravel() for mask in masks])
    np.testing.assert_array_equal(shards.labels().reshape(votes.shape), votes)


def test_what_is_recorded_says_the_model_its_revision_and_the_geometry(models, data, tmp_path):
    shards = record(tmp_path / "out", models["dinov3_vit"], data)
    said = Provenance.parse(shards.metadata.data)
    assert said is not None
    assert said.model == look(str(models["dinov3_vit"])).identity
    assert (shards.metadata.family, shards.metadata.ckpt) == ("dinov3", "dinov3_vit")
    assert not shards.has_labels
    json.loads(shards.metadata.data)


def test_bfloat16_a_grid_and_batches_change_what_is_recorded(models, data, tmp_path):
    model = models["dinov3_vit"]
    plain = record(tmp_path / "plain", model, data)
    rounded = record(tmp_path / "rounded", model, data, precision="bfloat16")
    gap = np.abs(activations(plain) - activations(rounded)).max()
    assert 1e-4 < gap < 1
    wide = record(tmp_path / "wide", model, data, geometry="stretch", grid=(2, 8))
    assert wide.metadata.content_tokens_per_example == 16
    assert not np.allclose(activations(plain)[:, :, 1:], activations(wide)[:, :, 1:])
    assert plain.metadata.hash != wide.metadata.hash


def described(**changes: Any) -> Description:
    preprocessing: dict[str, Any] = {
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "size": (224, 224),
        "resize": 256,
        "resample": "bicubic",
    }
    own = {name: changes.pop(name) for name in list(changes) if name in preprocessing}
    given: dict[str, Any] = {
        "family": "dinov2",
        "ckpt": "own/vit",
        "d_model": 8,
        "n_blocks": 12,
        "patch_size": 16,
        "cls_token": True,
        "identity": {"library": "none"},
    }
    return Description(preprocessing=Preprocessing(**(preprocessing | own)), **(given | changes))


@pytest.mark.parametrize(
    ("how", "model", "wanted"),
    [
        ({}, {}, ("crop", (14, 14), 256, "bicubic")),
        ({"resize": 224}, {}, ("crop", (14, 14), 224, "bicubic")),
        ({}, {"resize": None}, ("crop", (14, 14), 224, "bicubic")),
        ({"grid": (20, 10)}, {}, ("crop", (20, 10), 320, "bicubic")),
        ({"grid": (4, 2)}, {"resample": "bilinear"}, ("crop", (4, 2), 256, "bilinear")),
        ({"geometry": "stretch"}, {}, ("stretch", (14, 14), None, "bicubic")),
        ({"geometry": "aspect"}, {}, ("aspect", None, None, "lanczos")),
        (
            {"geometry": "aspect", "grid": (4, 8), "resample": "bicubic"},
            {},
            ("aspect", None, None, "bicubic"),
        ),
    ],
    ids=str,
)
def test_what_the_parameters_leave_open_the_checkpoint_says(how, model, wanted):
    parameters, description = RecordingParameters.model_validate(how), described(**model)
    layout = image_layout(parameters, description, ImagesToRecord(names="list.txt"), Path("/at"))
    assert tuple(layout[name] for name in ("geometry", "grid", "resize", "resample")) == wanted
    assert layout["names"] == Path("/at/list.txt")
    masks = mask_layout(parameters, description, LabelsParameters(void=(255,)))
    assert tuple(masks[name] for name in ("geometry", "grid", "resize")) == wanted[:3]
    assert masks["void"] == (255,)


@pytest.mark.parametrize(
    ("how", "patches"),
    [({}, 196), ({"geometry": "aspect"}, 256), ({"geometry": "aspect", "grid": (4, 8)}, 32)],
    ids=str,
)
def test_patches_of_an_image(how, patches):
    parameters = RecordingParameters.model_validate(how)
    assert prod(find_grid(parameters, described())) == patches
    assert check_recording(parameters, described(), [0, 11]) == patches


@pytest.mark.parametrize(
    ("how", "model", "layers", "words"),
    [
        ({}, {"patch_size": 15}, [0], ["224 x 224 pixels", "patches of 15", "give grid"]),
        ({}, {"patch_size": 2000, "size": (4000, 4000)}, [0], ["2 x 2 patches of 2000", "1024 a"]),
        ({"grid": (1, 1025)}, {}, [0], ["1 x 1025 patches of 16 pixels of own/vit", "1024 a side"]),
        ({"resize": 100}, {}, [0], ["resize 100", "224 x 224", "give resize 224 or more"]),
        ({}, {}, [3, 12], ["layer 12", "0 to 11", "own/vit has 12 blocks"]),
        ({}, {}, [-1], ["layer -1", "0 to 11"]),
        (
            {"max_tokens_per_shard": 393},
            {},
            [0, 1],
            ["max_tokens_per_shard 393", "at least 394", "2 layers"],
        ),
    ],
    ids=str,
)
def test_what_cannot_be_recorded_is_a_line(how, model, layers, words):
    with pytest.raises(ValueError, match=words[0]) as caught:
        check_recording(RecordingParameters.model_validate(how), described(**model), layers)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_node_for_each_split_and_masks_for_the_probes():
    how = parse_parameters(
        {
            "layers": [3],
            "shards": {"fit": "a", "val": "b", "probe_train": "c", "probe_val": "d"},
        }
    ).extract.recording
    nodes = {
        node.name: node for node in create_pipeline({"fit": (3,), "probe_val": (3,)}, how).nodes
    }
    assert set(nodes) == {"extract.record.fit", "extract.record.probe_val"}
    assert nodes["extract.record.fit"].outputs == ["shards_fit"]
    assert "extract_masks_probe_val" in nodes["extract.record.probe_val"].inputs
    assert not any("masks" in name for name in nodes["extract.record.fit"].inputs)
    assert BLOCKS == 3

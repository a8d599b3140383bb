import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from assay.parameters import DigitsParameters
from assay.pipelines.digits.nodes import (
    SOURCE_SHARES,
    deal_digits,
    draw_images,
    draw_split,
    record_split,
    train_vit,
)

TINY = {
    "image_size": 16,
    "d_model": 8,
    "n_blocks": 2,
    "n_heads": 2,
    "layers": (0, 1),
    "digits_per_image": 2,
    "train_images": 20,
    "train_steps": 3,
    "train_batch": 4,
    "n_fit": 70,
    "n_val": 3,
    "n_probe_train": 5,
    "n_probe_val": 4,
}
CHANGES = {
    "seed": 1,
    "image_size": 24,
    "patch_size": 8,
    "digits_per_image": 1,
    "d_model": 16,
    "n_blocks": 3,
    "n_heads": 4,
    "layers": (1, 0),
    "train_images": 21,
    "train_steps": 4,
    "train_batch": 5,
    "learning_rate": 1e-4,
    "n_fit": 6,
    "n_val": 4,
    "n_probe_train": 6,
    "n_probe_val": 5,
    "max_tokens_per_shard": 1000,
}
SPLIT_OF_SIZE = {"n_val": "val", "n_probe_train": "probe_train", "n_probe_val": "probe_val"}


@pytest.fixture(scope="module")
def parameters():
    return DigitsParameters(**TINY)


@pytest.fixture(scope="module")
def model(parameters):
    return train_vit(parameters)


def activations(recording):
    return torch.cat(list(recording.examples))


@pytest.mark.parametrize("split", SOURCE_SHARES)
def test_recording_is_what_its_metadata_says(model, parameters, split):
    recording = record_split(model, parameters, split)
    metadata = recording.metadata
    assert json.loads(json.dumps(metadata)) == metadata
    assert metadata["n_examples"] == parameters.n_images(split) == len(recording.labels)
    assert metadata == {
        "family": "fake-clip",
        "ckpt": f"digits-vit-{parameters.fingerprint()}",
        "layers": [0, 1],
        "content_tokens_per_example": 16,
        "cls_token": True,
        "d_model": 8,
        "n_examples": metadata["n_examples"],
        "max_tokens_per_shard": 25_000,
        "data": "",
        "dataset": f"digits/{split}",
        "pixel_agg": "prefer-fg",
        "dtype": "float32",
        "protocol": "2.1",
    }
    assert activations(recording).shape == (metadata["n_examples"], 2, 17, 8)
    assert recording.labels.shape == (metadata["n_examples"], 16)
    assert recording.labels.dtype == np.uint8 and 1 <= recording.labels.max() <= 10


def test_examples_can_be_read_again(model, parameters):
    recording = record_split(model, parameters, "fit")
    assert torch.equal(activations(recording), activations(recording))


def test_labels_belong_to_the_images(model, parameters):
    recording = record_split(model, parameters, "fit")
    brightest = (
        recording.images.reshape(-1, 4, 4, 4, 4).max(axis=(2, 4)).reshape(len(recording.images), -1)
    )
    np.testing.assert_array_equal(recording.labels > 0, brightest > 0.25)


def test_the_images_that_are_shown_are_those_that_were_recorded(model, parameters):
    recording = record_split(model, parameters, "probe_val")
    images = draw_images(parameters, split="probe_val")
    assert images.dtype == np.uint8
    np.testing.assert_allclose(1 - images / 255, recording.images, atol=0.5 / 255 + 1e-6)


def test_same_parameters_give_the_same_bytes_whatever_the_global_seed(model, parameters):
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    again = DigitsParameters(**TINY)
    retrained = train_vit(again)
    assert torch.equal(torch.get_rng_state(), before)
    for split in SOURCE_SHARES:
        first, second = (
            record_split(model, parameters, split),
            record_split(retrained, again, split),
        )
        assert first.metadata == second.metadata
        assert first.labels.tobytes() == second.labels.tobytes()
        assert activations(first).numpy().tobytes() == activations(second).numpy().tobytes()


def test_every_parameter_has_a_change_here():
    assert set(CHANGES) == set(DigitsParameters.model_fields)


@pytest.mark.parametrize("name", CHANGES)
def test_every_parameter_changes_the_checkpoint_and_the_data(model, parameters, name):
    changed = DigitsParameters(**{**TINY, name: CHANGES[name]})
    split = SPLIT_OF_SIZE.get(name, "fit")
    first, second = (
        record_split(model, parameters, split),
        record_split(train_vit(changed), changed, split),
    )
    assert first.metadata["ckpt"] != second.metadata["ckpt"]
    if name == "max_tokens_per_shard":
        assert second.metadata[name] == 1000
    else:
        assert activations(first).numpy().tobytes() != activations(second).numpy().tobytes()


def test_no_source_digit_is_in_two_splits():
    dealt = deal_digits(0, 1797)
    assert list(dealt) == ["fit", "val", "probe_train", "probe_val"]
    assert sorted(np.concatenate(list(dealt.values())).tolist()) == list(range(1797))
    for split, share in SOURCE_SHARES.items():
        assert len(dealt[split]) == pytest.approx(share * 1797, abs=1)
    assert not np.array_equal(dealt["fit"], deal_digits(1, 1797)["fit"])


def test_streams_of_one_seed_differ(parameters):
    drawn = [
        draw_split(parameters, "fit", n_images=3, stream=stream).images.tobytes()
        for stream in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_unknown_split_is_refused(model, parameters):
    with pytest.raises(
        ValueError, match="found split 'test', want one of fit, val, probe_train, probe_val"
    ):
        record_split(model, parameters, "test")


def test_defaults_are_valid_and_truncate_at_64():
    parameters = DigitsParameters()
    assert parameters.d_model > 64
    assert DigitsParameters(**parameters.model_dump(mode="json")) == parameters


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"patch_size": 5}, "found image_size 32 and patch_size 5, want one that divides it"),
        ({"n_heads": 5}, "found d_model 96 and n_heads 5, want n_heads that divide it"),
        ({"layers": ()}, r"found layers \[\], want at least one"),
        ({"layers": (1, 1)}, r"found layers \[1, 1\], want at least one, and none twice"),
        ({"layers": (0, 4)}, r"found layers \[0, 4\], want block numbers from 0 to 3"),
        ({"layers": (-1,)}, r"found layers \[-1\], want block numbers from 0 to 3"),
        (
            {"max_tokens_per_shard": 194},
            "found max_tokens_per_shard 194, want at least 195, one image's tokens",
        ),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"seed": -1}, "seed"),
        ({"latent_topk": 64}, "latent_topk"),
        *(({name: 0}, name) for name in CHANGES if name not in ("seed", "layers", "learning_rate")),
    ],
)
def test_wrong_parameters_are_refused_by_name(wrong, message):
    with pytest.raises(ValidationError, match=message):
        DigitsParameters(**wrong)


def test_parameters_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        DigitsParameters().seed = 1  # type: ignore[misc]  # what is refused

"""What is refused before a run begins, by a look at the disks."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from assay.io.saes import hub
from assay.io.shards.provenance import Provenance, RecordedFiles, RecordedGeometry
from assay.parameters import parse_parameters
from assay.plan import find_images, make_plan
from assay.preflight import check_shards, find_d_model
from saes import write_sparsify
from shards import edit_json, make_shards

SPLITS = ("fit", "val", "probe_train", "probe_val")
DIGITS = {split: f"data/01_raw/digits/{split}" for split in SPLITS}
GOOD = {"W_enc": (80, 100), "W_dec": (100, 80), "b_dec": (80,)}
TORCH = {"encoder__weight": (100, 80), "decoder__weight": (80, 100), "decoder__bias": (80,)}


def parse(shards, **changes):
    return parse_parameters(
        {"layers": [3, 5], "shards": shards, "kmeans": {"n_clusters": 4}} | changes
    )


def write(
    root: Path, *, layers=(3, 5), d_model=80, labels=1, family="planted", ckpt="planted-tiny"
) -> Path:
    return make_shards(
        root,
        np.ones((3, len(layers), 2, d_model), dtype=np.float32),
        labels * np.ones((3, 2), dtype=np.uint8) if labels is not None else None,
        family=family,
        ckpt=ckpt,
        layers=layers,
        cls_token=False,
        max_tokens_per_shard=100,
        pixel_agg=None,
    )


@pytest.fixture
def shards(planted):
    fit, val = map(str, planted)
    return {"fit": fit, "val": val, "probe_train": fit, "probe_val": val}


def save(path: Path, **shapes: tuple[int, ...]) -> None:
    save_file({name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}, path)


def photograph(folder: Path, n: int, shape: tuple[int, int], suffix: str = "jpg") -> None:
    folder.mkdir()
    for number in range(n):
        Image.fromarray(np.full(shape, 9 * number, dtype=np.uint8)).save(
            folder / f"{number}.{suffix}"
        )


def test_the_width_is_that_of_the_fit_shards(shards, tmp_path):
    assert find_d_model(parse(shards), tmp_path) == 80
    assert find_d_model(parse(DIGITS, digits={"d_model": 48}), tmp_path) == 48
    assert find_d_model(parse(shards | {"fit": "nowhere"}), tmp_path) is None
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metadata.json").write_text("{}")
    assert find_d_model(parse(shards | {"fit": "broken"}), tmp_path) is None


def test_paths_are_relative_to_the_project(tmp_path):
    write(tmp_path / "own", d_model=24)
    parameters = parse(dict.fromkeys(SPLITS, "own"))
    assert find_d_model(parameters, tmp_path) == 24
    check_shards(parameters, tmp_path)


def test_what_fits_together_passes(shards, tmp_path):
    check_shards(parse(shards), tmp_path)
    check_shards(parse(shards, latent_topk=80, pca={"topk": [80, 81]}), tmp_path)
    check_shards(parse(DIGITS, layers=[0, 3]), tmp_path)


@pytest.mark.parametrize("split", SPLITS)
def test_a_missing_folder_is_named(shards, tmp_path, split):
    with pytest.raises(FileNotFoundError, match=rf"^shards\.{split}: /.*/nowhere: no shard folder"):
        check_shards(parse(shards | {split: "nowhere"}), tmp_path)


def test_a_damaged_folder_is_named_with_its_parameter(shards, tmp_path):
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"^shards\.val: {tmp_path}.*metadata\.json"):
        check_shards(parse(shards | {"val": str(tmp_path)}), tmp_path)


@pytest.mark.parametrize("split", ["fit", "probe_val"])
def test_a_layer_that_is_not_held_is_named_with_those_that_are(shards, tmp_path, split):
    other = str(write(tmp_path, layers=(5,)))
    with pytest.raises(
        ValueError,
        match=rf"^layers: shards\.{split}, {other}, does not hold layer 3; it holds \[5\]\.$",
    ):
        check_shards(parse(shards | {split: other}), tmp_path)
    check_shards(parse(shards | {split: other}, layers=[5]), tmp_path)


def test_a_layer_that_the_digits_are_not_recorded_at_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"does not hold layer 5; it holds \[0, 2, 3\]"):
        check_shards(parse(DIGITS), tmp_path)


@pytest.mark.parametrize("split", ["val", "probe_train", "probe_val"])
def test_shards_of_another_width_are_named(shards, tmp_path, split):
    other = str(write(tmp_path, d_model=40))
    with pytest.raises(
        ValueError,
        match=rf"^shards\.{split}, {other}, has 40 dimensions, shards\.fit, {shards['fit']}, 80: ",
    ):
        check_shards(parse(shards | {split: other}), tmp_path)


@pytest.mark.parametrize("split", ["val", "probe_train", "probe_val"])
@pytest.mark.parametrize(
    "other", [{"family": "clip"}, {"ckpt": "planted-large"}, {"ckpt": "models/planted-tiny"}]
)
def test_shards_of_another_model_are_named_with_both(shards, tmp_path, split, other):
    named = " ".join(({"family": "planted", "ckpt": "planted-tiny"} | other).values())
    path = str(write(tmp_path, **other))
    message = (
        rf"^shards\.{split}, {path}, is of {named}, shards\.fit, {shards['fit']}, of planted"
        r" planted-tiny: .*; name shards"
    )
    with pytest.raises(ValueError, match=message):
        check_shards(parse(shards | {split: path}), tmp_path)


def test_a_file_of_weights_is_the_same_model_wherever_it_lay(tmp_path):
    first, second, other = (
        str(write(tmp_path, ckpt=ckpt))
        for ckpt in ("/home/a/dinov3.pth", "/scratch/b/dinov3.pth", "/home/a/dinov2.pth")
    )
    splits = dict.fromkeys(SPLITS, first) | {"val": second}
    check_shards(parse(splits), tmp_path)
    with pytest.raises(
        ValueError, match=r"shards\.val, .*, is of planted /home/a/dinov2\.pth, shards\.fit, .*, of"
    ):
        check_shards(parse(splits | {"val": other}), tmp_path)


def test_labels_that_void_voted_for_are_warned_of_before_the_run(tmp_path, caplog):
    folder = write(tmp_path)
    edit_json(folder / "metadata.json", lambda raw: raw | {"pixel_agg": "majority"})
    check_shards(parse(dict.fromkeys(SPLITS, str(folder))), tmp_path)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [message.partition(":")[0] for message in warned] == [
        "shards.probe_train",
        "shards.probe_val",
    ]
    assert (
        f"assay labels {folder} --masks MASKS --patch-size PIXELS --out {folder}/labels.bin --force"
        in warned[0]
    )


def test_the_defaults_own_shards_go_with_those_of_its_model_alone(tmp_path):
    digits = parse(DIGITS, layers=[0, 3]).digits
    sizes = {"layers": (0, 2, 3), "d_model": digits.d_model}
    own = write(tmp_path, family=digits.model_family, ckpt=digits.model_ckpt, **sizes)
    check_shards(parse(DIGITS | {"probe_train": str(own)}, layers=[0, 3]), tmp_path)
    with pytest.raises(
        ValueError,
        match=(
            r"shards\.probe_train, .*, is of planted planted-tiny, shards\.fit, .*, of fake-clip"
            r" digits-vit"
        ),
    ):
        check_shards(
            parse(DIGITS | {"probe_train": str(write(tmp_path, **sizes))}, layers=[0, 3]), tmp_path
        )


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_wanted_of_the_probes_shards_only(shards, tmp_path, split):
    parameters = parse(shards | {split: str(write(tmp_path, labels=None))})
    if split.startswith("probe"):
        with pytest.raises(ValueError, match=rf"^shards\.{split}: .* has no labels\.bin; "):
            check_shards(parameters, tmp_path)
    else:
        check_shards(parameters, tmp_path)


def test_a_latent_topk_above_the_width_is_refused(shards, tmp_path):
    with pytest.raises(
        ValueError, match=r"^latent_topk is 81; it can be at most d_model, 80 in /.*\.$"
    ):
        check_shards(parse(shards, latent_topk=81), tmp_path)


def test_a_sweep_wholly_above_the_width_is_refused(shards, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"^pca\.topk is \[81, 256\]; at least one K must not be above d_model, 80 in /.*\.$",
    ):
        check_shards(parse(shards, pca={"topk": [81, 256]}), tmp_path)


def test_a_canvas_too_small_for_its_digits_is_refused_where_digits_are_made(shards, tmp_path):
    crowded = {"digits_per_image": 17, "image_size": 32}
    with pytest.raises(ValueError, match="32 x 32 pixels for 17 digits"):
        check_shards(parse(DIGITS, layers=[0], digits=crowded), tmp_path)
    check_shards(parse(shards, digits=crowded), tmp_path)


def test_two_splits_are_not_made_in_one_folder(tmp_path):
    parameters = parse(DIGITS | {"probe_val": "./data/01_raw/digits/val"}, layers=[0])
    with pytest.raises(
        ValueError, match=r"^shards\.val and shards\.probe_val are both data/01_raw/digits/val: "
    ):
        check_shards(parameters, tmp_path)


def test_more_clusters_than_tokens_are_refused(shards, tmp_path):
    check_shards(parse(shards, kmeans={"n_clusters": 768}), tmp_path)
    with pytest.raises(
        ValueError, match=r"kmeans.n_clusters is 769; shards.fit, /.*, has only 768 tokens"
    ):
        check_shards(parse(shards, kmeans={"n_clusters": 769}), tmp_path)


def test_labels_that_leave_nothing_to_probe_are_refused_before_anything_is_fitted(shards, tmp_path):
    void, other = (
        str(write(tmp_path / name, labels=label)) for name, label in (("void", 0), ("other", 9))
    )
    with pytest.raises(
        ValueError, match=rf"^shards\.probe_val: every label of {void} is 0, void; "
    ):
        check_shards(parse(shards | {"probe_val": void}), tmp_path)
    with pytest.raises(
        ValueError,
        match=(
            r"no class is in both .*shards\.probe_train has \[1, 2, 3\]; shards\.probe_val has"
            r" \[9\]: "
        ),
    ):
        check_shards(parse(shards | {"probe_val": other}), tmp_path)
    with pytest.raises(ValueError, match=r"shards\.probe_train has \[0, 1, 2, 3\]; "):
        check_shards(parse(shards | {"probe_val": other}, probe={"void": "class"}), tmp_path)


def test_statistics_of_another_width_are_refused_before_any_work(shards, tmp_path):
    given = {"statistics": str(tmp_path / "{layer}.safetensors")}
    for layer in (3, 5):
        save(tmp_path / f"layer_{layer}.safetensors", mean=(80,), std=(80,))
    check_shards(parse(shards, standardize=given), tmp_path)
    save(tmp_path / "layer_5.safetensors", mean=(80,), std=(40,))
    with pytest.raises(
        ValueError,
        match=(
            r"^standardize\.statistics: .*layer_5\.safetensors: `std` is 40, want 80 for these"
            r" shards\.$"
        ),
    ):
        check_shards(parse(shards, standardize=given), tmp_path)
    save(tmp_path / "layer_5.safetensors", mean=(80,), sigma=(80,))
    with pytest.raises(
        ValueError, match=r"layer_5\.safetensors holds mean, sigma, want std: save it too\.$"
    ):
        check_shards(parse(shards, standardize=given), tmp_path)
    (tmp_path / "layer_5.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"layer_5\.safetensors is not a whole safetensors file"):
        check_shards(parse(shards, standardize=given), tmp_path)


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        (GOOD, None),
        (TORCH, None),
        (
            GOOD | {"W_enc": (100, 80), "W_dec": (80, 100)},
            "is of 100 dimensions, want 80 for these shards: it is the other way round.",
        ),
        (
            {"W_enc": (64, 100), "W_dec": (100, 64), "b_dec": (64,)},
            "is of 64 dimensions, want 80 for these shards.",
        ),
        (GOOD | {"W_enc": (100, 80)}, "found an encoder 100 x 80 and a decoder 100 x 80"),
        (TORCH | {"encoder__weight": (80, 100)}, "found an encoder 100 x 80 and a decoder"),
        (GOOD | {"W_dec": (80, 100)}, "found an encoder 80 x 100 and a decoder 80 x 100"),
        (GOOD | {"b_dec": (100,)}, "b_out (100,), wanted (80,)"),
        (GOOD | {"b_dec": ()}, "b_out (), wanted (80,)"),
        (GOOD | {"W_skip": (80, 80)}, "found W_skip as well: an autoencoder of another kind"),
        ({"W_enc": (80, 100), "b_dec": (80,)}, "wanted W_dec or decoder.weight for relu: save it"),
    ],
)
def test_weights_that_are_turned_or_of_another_width_are_refused_before_any_work(
    shards, tmp_path, tensors, fault
):
    sae = {
        "weights": "saes/{layer}-{seed}.safetensors",
        "activation": "relu",
        "trained_on": "standardized",
        "input_bias": "none",
        "seeds": [1, 2],
        "layers": [5],
    }
    (tmp_path / "saes").mkdir()
    save(tmp_path / "saes/layer_5-1.safetensors", **GOOD)
    save(tmp_path / "saes/layer_5-2.safetensors", **tensors)
    parameters = parse(shards, dictionaries={"mine": sae})
    if fault is None:
        check_shards(parameters, tmp_path)
    else:
        with pytest.raises(ValueError, match=re.escape(fault)) as caught:
            check_shards(parameters, tmp_path)
        assert str(caught.value).startswith("dictionaries.mine.weights: ")
        assert "layer_5-2.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("folder", "changes", "typed", "fault"),
    [
        ("layers.5", {}, {}, None),
        ("layers.5", {}, {"k": 4, "activation": "topk", "layers": [5]}, None),
        ("layers.4", {}, {}, "trained on layers.4 of layer 4, the residual stream after block 4"),
        ("layers.5", {"transcode": True}, {}, "it predicts what a module makes of its input"),
        ("layers.5", {"d": 64}, {}, "is of 64 dimensions, want 80 for these shards."),
        ("layers.5", {"d": 40, "n": 80}, {}, "is of 40 dimensions, want 80 for these shards."),
        ("layers.5", {"k": 101}, {}, "found k = 101 for topk of 100 features"),
        ("layers.5", {"new": 3}, {}, "found new, which could change the codes"),
        ("layers.5", {}, {"k": 5}, "found k 5 typed, and the file says 4"),
        ("layers.5", {}, {"activation": "batchtopk"}, "found activation batchtopk typed, and the"),
    ],
)
def test_an_autoencoder_of_other_activations_is_refused_before_any_work(
    shards, tmp_path, folder, changes, typed, fault
):
    write_sparsify(tmp_path / "saes" / folder, **changes)
    given = {"sae": f"saes/{folder}", "layers": [5]} | typed
    parameters = parse(shards, dictionaries={"mine": given})
    if fault is None:
        check_shards(parameters, tmp_path)
        return
    with pytest.raises(ValueError, match=re.escape(fault)) as caught:
        check_shards(parameters, tmp_path)
    assert str(caught.value).startswith("dictionaries.mine.sae: ")
    assert folder in str(caught.value)


def test_an_autoencoder_that_the_hub_does_not_give_is_told_before_any_work(
    shards, tmp_path, monkeypatch
):
    def refuse(typed):
        raise FileNotFoundError(f"{typed}: found neither\nConnectError: no network")

    monkeypatch.setattr(hub, "fetch", refuse)
    parameters = parse(shards, dictionaries={"mine": {"sae": "hf:owner/name/{layer}"}})
    with pytest.raises(FileNotFoundError) as caught:
        check_shards(parameters, tmp_path)
    assert str(caught.value) == (
        "dictionaries.mine.sae: hf:owner/name/layer_3: found neither\nConnectError: no network"
    )
    monkeypatch.setattr(hub, "fetch", lambda _: (tmp_path / "cache", "c" * 40))
    write_sparsify(tmp_path / "cache")
    check_shards(parameters, tmp_path)


def test_weights_with_nan_are_refused_before_any_work(shards, tmp_path):
    write_sparsify(tmp_path / "layers.5")
    tensors = load_file(tmp_path / "layers.5/sae.safetensors")
    tensors["W_dec"][3, 2] = torch.nan
    save_file(tensors, tmp_path / "layers.5/sae.safetensors")
    parameters = parse(shards, dictionaries={"mine": {"sae": "layers.5", "layers": [5]}})
    with pytest.raises(
        ValueError, match=r"^dictionaries\.mine\.sae: .* W_dec with NaN or infinity"
    ):
        check_shards(parameters, tmp_path)


def test_a_configuration_that_is_missing_is_told_before_any_work(shards, tmp_path):
    write_sparsify(tmp_path / "layers.5")
    (tmp_path / "layers.5/cfg.json").unlink()
    parameters = parse(shards, dictionaries={"mine": {"sae": "layers.5", "layers": [5]}})
    with pytest.raises(FileNotFoundError, match=r"^dictionaries\.mine\.sae: .*cfg.json: no such"):
        check_shards(parameters, tmp_path)


def test_a_layer_that_is_counted_from_the_end_cannot_be_compared_which_is_said(tmp_path, caplog):
    fit = str(write(tmp_path / "fit", layers=(-2, -1)))
    write_sparsify(tmp_path / "layers.5")
    given = {"mine": {"sae": "layers.5", "layers": [-2]}}
    parameters = parse(dict.fromkeys(SPLITS, fit), layers=[-2], dictionaries=given)
    check_shards(parameters, tmp_path)
    check_shards(parameters, tmp_path)
    (said,) = (record.message for record in caplog.records if "sae" in record.message)
    assert re.fullmatch(
        r"dictionaries\.mine\.sae: /.*layers\.5 records layers\.5, and the shards count layer -2 from"
        r" the end: whether they are the same cannot be told\.",
        said,
    )


def test_an_order_of_other_shards_is_refused_before_any_work(shards, tmp_path):
    np.save(tmp_path / "order.npy", np.arange(700))
    for kmeans in ({}, {"order": str(tmp_path / "order.npy")}):
        check_shards(parse(shards, kmeans={"n_clusters": 4} | kmeans), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"the order file nowhere\.npy is missing"):
        check_shards(parse(shards, kmeans={"n_clusters": 4, "order": "nowhere.npy"}), tmp_path)


def test_names_of_classes_are_read_before_any_work(shards, tmp_path):
    (tmp_path / "names.txt").write_text("wall\nsky")
    check_shards(parse(shards, class_names="names.txt"), tmp_path)  # inside the project
    (tmp_path / "names.txt").write_text("1: wall\n1: sky")
    with pytest.raises(ValueError, match=r"^class_names: .*names\.txt, line 2: label 1 has a name"):
        check_shards(parse(shards, class_names="names.txt"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^class_names: .*nowhere is no file; wanted one"):
        check_shards(parse(shards, class_names="nowhere"), tmp_path)


def test_the_images_are_the_defaults_own_or_the_users_or_none(shards, tmp_path):
    assert find_images(parse(DIGITS), tmp_path) == (
        tmp_path / "data/01_raw/digits/probe_val-images",
        {"patch_size": 4, "pattern": "*.png"},
    )
    assert find_images(parse(shards), tmp_path) is None
    given = {
        "path": "photos",
        "resize": 256,
        "crop": "centre",
        "patch_size": 14,
        "names": "list.txt",
        "grid": [1, 2],
    }
    found = find_images(parse(shards, images=given), tmp_path)
    assert found is not None
    path, layout = found
    assert path == tmp_path / "photos"
    assert layout == {
        "patch_size": 14,
        "grid": (1, 2),
        "resize": 256,
        "crop": True,
        "geometry": None,
        "resample": None,
        "pattern": "*.jpg",
        "names": tmp_path / "list.txt",
    }
    assert make_plan(parse(shards)).gallery_classes is None
    assert make_plan(parse(shards, images={"path": "photos", "classes": 5})).gallery_classes == 5


def test_images_that_are_not_those_of_the_shards_are_refused(shards, tmp_path):
    photograph(tmp_path / "photos", 24, (8, 8))
    images = {"path": "photos", "patch_size": 2}
    check_shards(parse(shards, images=images), tmp_path)
    with pytest.raises(
        ValueError, match=r"has 0 images of \*.png, shards.probe_val 24 examples: name the folder"
    ):
        check_shards(parse(shards, images=images | {"pattern": "*.png"}), tmp_path)
    with pytest.raises(
        ValueError, match=r"0\.jpg: 8 x 8 pixels; wanted 64 x 64, 4 x 4 patches of 16"
    ):
        check_shards(parse(shards, images={"path": "photos"}), tmp_path)
    (tmp_path / "photos/9.jpg").write_bytes(b"damaged")
    with pytest.raises(
        ValueError, match=r"9\.jpg: .*; wanted the image of example 23"
    ):  # not only the first is looked at
        check_shards(parse(shards, images=images), tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder; wanted that of the images"):
        check_shards(parse(shards, images={"path": "nowhere"}), tmp_path)


def record(folder: Path, root: Path, **changes) -> Path:
    """Shards of 24 examples of 16 patches that say that they were recorded from these images."""
    geometry = {"patch_size": 2, "n_patches": 16, "geometry": "aspect", "resample": "bilinear"}
    said = Provenance(
        model={"library": "none"},
        geometry=RecordedGeometry.model_validate(geometry),
        precision="float32",
        batch_size=4,
        images=RecordedFiles.of(folder, sorted(folder.iterdir())),
        **changes,
    )
    return make_shards(
        root,
        np.ones((24, 2, 16, 80), dtype=np.float32),
        np.ones((24, 16), dtype=np.uint8),
        family="planted",
        ckpt="planted-tiny",
        cls_token=False,
        max_tokens_per_shard=1000,
        pixel_agg=None,
        data=said.to_text(),
    )


def test_images_lie_as_they_were_recorded_and_what_contradicts_it_is_refused(shards, tmp_path):
    photograph(tmp_path / "photos", 24, (9, 33), "png")
    mine = shards | {"probe_val": str(record(tmp_path / "photos", tmp_path / "mine"))}
    given = {"path": "photos", "pattern": "*.png"}
    found = find_images(parse(mine, images=given), tmp_path)
    assert found is not None
    assert found[1] == {
        "patch_size": 2,
        "grid": None,
        "geometry": "aspect",
        "resize": None,
        "resample": "bilinear",
        "pattern": "*.png",
    }
    assert found == find_images(parse(mine, images=given | {"geometry": "aspect"}), tmp_path)
    for pattern in ("*.png", None):
        check_shards(parse(mine, images=given | {"pattern": pattern}), tmp_path)
    with pytest.raises(ValueError, match=r"^images: found geometry crop, .* geometry aspect"):
        check_shards(parse(mine, images=given | {"crop": "centre"}), tmp_path)
    with pytest.raises(ValueError, match=r"^images: found patch_size 16, and .* patch_size 2"):
        check_shards(parse(mine, images=given | {"patch_size": 16}), tmp_path)
    with pytest.raises(ValueError, match=r"^images: found resample lanczos, .* resample bilinear"):
        check_shards(parse(mine, images=given | {"resample": "lanczos"}), tmp_path)
    (tmp_path / "photos/3.png").rename(tmp_path / "photos/30.png")
    with pytest.raises(ValueError, match=r"photos have other names or sizes than those that"):
        check_shards(parse(mine, images=given), tmp_path)


def test_images_of_a_sample_are_those_of_the_sample(shards, tmp_path):
    photograph(tmp_path / "photos", 28, (8, 8))
    shards |= {
        "probe_val": str(record(tmp_path / "photos", tmp_path / "mine", examples=24, seed=3))
    }
    found = find_images(parse(shards, images={"path": "photos"}), tmp_path)
    assert found is not None
    assert (found[1]["examples"], found[1]["seed"]) == (24, 3)


def test_the_shards_of_a_split_that_is_recorded_anew_say_nothing_of_its_images(shards, tmp_path):
    photograph(tmp_path / "photos", 24, (8, 8))
    mine = shards | {"probe_val": str(record(tmp_path / "photos", tmp_path / "mine"))}
    extract = {"model": "a", "probe_val": {"images": "photos", "masks": "b"}}
    images = {"path": "photos", "geometry": "stretch"}
    found = find_images(parse(mine, images=images, extract=extract), tmp_path)
    assert found is not None
    assert found[1]["geometry"] == "stretch"
    assert found[1]["patch_size"] == 16


def test_images_of_dinov3_that_do_not_lie_as_saev_has_them_are_doubted(tmp_path, caplog):
    shards = {}
    for split, labels in (("fit", None), ("val", None), ("probe_train", 1), ("probe_val", 1)):
        root = write(tmp_path / split, labels=labels, family="dinov3", ckpt="dinov3_vits16")
        shards[split] = str(root)
    photograph(tmp_path / "photos", 3, (8, 16))
    images = {"path": "photos", "patch_size": 8, "geometry": "stretch", "grid": [1, 2]}
    check_shards(parse(shards, images=images), tmp_path)
    assert "images: dinov3_vits16 is a DINOv3, for which saev stretches each image" in caplog.text
    caplog.clear()
    aspect = {"path": "photos", "patch_size": 8, "geometry": "aspect"}
    check_shards(parse(shards, images=aspect), tmp_path)
    assert "DINOv3" not in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(shards, tmp_path):
    with pytest.raises(ValueError, match="torch sees no GPU"):
        check_shards(parse(shards, device="cuda"), tmp_path)

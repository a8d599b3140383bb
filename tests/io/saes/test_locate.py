"""Which file of a folder is meant, and whose it is."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from assay.io.saes import Settings, read_sae
from assay.io.saes.configs import Config, read_config, take_tensors
from assay.io.saes.locate import DEEPEST, LAYOUTS, locate


def touch(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(("weights", "config", "library"), LAYOUTS)
@pytest.mark.parametrize("below", ["", "runs/z55bntm1/checkpoint"])
@pytest.mark.parametrize("whole", [True, False])
def test_by_the_names_of_the_weights(
    tmp_path: Path, weights: str, config: str | None, library: str, below: str, whole: bool
) -> None:
    file = touch(tmp_path / below / weights)
    beside = touch(file.with_name(config)) if config else None
    found = locate(tmp_path if whole else file)
    assert (found.library, found.weights, found.config) == (library, file, beside)


def test_a_folder_of_nothing_and_no_folder(tmp_path: Path) -> None:
    touch(tmp_path / "readme.md")
    with pytest.raises(FileNotFoundError, match=r"holds no autoencoder: found none of ae\.pt"):
        locate(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder; correct the path"):
        locate(tmp_path / "other")
    os.mkfifo(tmp_path / "ae.pt")
    with pytest.raises(FileNotFoundError, match="holds no autoencoder"):
        locate(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        locate(tmp_path / "ae.pt")


def test_one_of_several_has_to_be_named(tmp_path: Path) -> None:
    for number in range(7):
        touch(tmp_path / f"layers.{number}" / "sae.safetensors")
    with pytest.raises(ValueError, match=r"7 autoencoders \(layers.0/sae.*layers.4.*, \.\.\.\)"):
        locate(tmp_path)
    assert locate(tmp_path / "layers.3").library == "sparsify"


def test_two_libraries_in_one_folder(tmp_path: Path) -> None:
    touch(tmp_path / "sae_weights.safetensors")
    touch(tmp_path / "ae.pt")
    with pytest.raises(ValueError, match=r"2 autoencoders \(sae_weights.safetensors, ae.pt\)"):
        locate(tmp_path)


def test_a_state_dict_beside_is_of_the_same_one(tmp_path: Path) -> None:
    touch(tmp_path / "state_dict.pt")
    assert locate(tmp_path).weights.name == "state_dict.pt"
    touch(tmp_path / "model.pt")
    assert locate(tmp_path).weights.name == "model.pt"
    (tmp_path / "model.pt").rename(tmp_path / "weights.pt")
    assert locate(tmp_path).library == "ViT-Prisma"


@pytest.mark.parametrize(
    "beside",
    [
        ["optimizer_0.pt", "lr_scheduler_0.pt", "state.pt", "rank_0_state.pt"],
        ["optimizer.pt", "trainer_state.pt", "sparsity.safetensors"],
        ["activations_store_state.safetensors", "n_images_100_log_feature_sparsity.pt"],
    ],
)
def test_what_trainers_leave_beside_is_no_autoencoder(tmp_path: Path, beside: list[str]) -> None:
    for name in beside:
        touch(tmp_path / name, "PK")
    with pytest.raises(FileNotFoundError, match="holds no autoencoder"):
        locate(tmp_path)
    touch(tmp_path / "layers.3" / "sae.safetensors")
    assert locate(tmp_path).library == "sparsify"
    touch(tmp_path / "n_images_100.pt", "PK")
    assert locate(tmp_path).weights.name == "n_images_100.pt"


def test_what_is_further_down_is_not_searched(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*"abcd"[:DEEPEST])
    touch(deep / "ae.pt")
    touch(tmp_path / ".cache" / "sae.pt")
    assert locate(tmp_path).weights.parent == deep
    (deep / "ae.pt").unlink()
    touch(deep / "e" / "ae.pt")
    with pytest.raises(FileNotFoundError, match="holds no autoencoder"):
        locate(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "beside", "library"),
    [
        ("dino.pt", '{"schema": 5}', None, "saev"),
        ("dino.pth", "PK", None, "overcomplete"),
        ("dino.pt", "PK", {"model": "vit"}, "overcomplete"),
        ("dino.pt", "PK", {"trainer": {}}, "dictionary_learning"),
        ("dino.pt", "PK", {"layer_subtype": "hook_resid_post"}, "ViT-Prisma"),
        ("dino.safetensors", "PK", {"trainer": {}}, None),
        ("dino.bin", "PK", None, None),
        ("n_images_100.pt", "PK", None, "ViT-Prisma"),
        ("sae.pt", "PK", None, "overcomplete"),
        ("sae.pt", "PK", {"layer_subtype": "hook_resid_post"}, "ViT-Prisma"),
        ("sae.pt", "{", {"trainer": {}}, "saev"),
        ("model.pt", '{"schema": 5}', None, "saev"),
        ("state_dict.pt", '{"schema": 5}', {"trainer": {}}, "saev"),
        ("state_dict.pt", "PK", {"layer_subtype": "hook_resid_post"}, "ViT-Prisma"),
        ("model.pt", "PK", {"trainer": {}}, "dictionary_learning"),
        ("model.pt", "PK", {"model": "vit"}, "overcomplete"),
        ("checkpoints/ae_100.pt", "PK", None, "dictionary_learning"),
    ],
)
def test_a_file_of_another_name(
    tmp_path: Path, name: str, text: str, beside: dict[str, Any] | None, library: str | None
) -> None:
    file = touch(tmp_path / name, text)
    if beside is not None:
        touch(file.with_name("config.json"), json.dumps(beside))
    assert locate(file).library == library


def test_a_cache_of_links(tmp_path: Path) -> None:
    blob = touch(tmp_path / "blobs" / "0a1b", "PK")
    snapshot = tmp_path / "snapshots" / "c0ffee" / "layers.3"
    snapshot.mkdir(parents=True)
    for name in ("sae.safetensors", "cfg.json"):
        (snapshot / name).symlink_to(blob)
    found = locate(snapshot.parent)
    assert (found.library, found.weights) == ("sparsify", snapshot / "sae.safetensors")
    assert found.config == snapshot / "cfg.json"


def test_links_that_lead_back_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path / "runs" / "ae.pt")
    for name in ("again", "and_again"):
        (tmp_path / name).symlink_to(tmp_path)
    (tmp_path / "same").symlink_to(tmp_path / "runs")
    assert locate(tmp_path).library == "dictionary_learning"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        locate(tmp_path / "loop")


def test_what_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    touch(tmp_path / "sae.pt", "{}")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(ValueError, match="cannot be read: Permission denied"):
            read_sae(tmp_path)
    (tmp_path / "sae.pt").unlink()
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ValueError, match="cannot be read: Permission denied"):
        read_sae(tmp_path)


def test_a_file_of_no_library_is_refused(tmp_path: Path) -> None:
    file = touch(tmp_path / "dino.safetensors")
    with pytest.raises(ValueError, match="is of no library that is known here"):
        read_sae(file)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ({"activation": 3}, "found activation = 3, wanted a name such as topk"),
        ({"k": "16"}, "found k = '16', wanted an integer of at least 1"),
        ({"k": True}, "found k = True, wanted an integer of at least 1"),
        ({"k": 16.0}, "found k = 16.0, wanted an integer of at least 1"),
        ({"k": 0}, "found k = 0, wanted an integer of at least 1"),
        ({"threshold": "1"}, "found threshold = '1', wanted a number"),
        ({"threshold": True}, "found threshold = True, wanted a number"),
    ],
)
def test_a_setting_of_another_type_is_refused(typed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**typed)


NAMED = Path("config.json")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("four", '"four"'),
        (True, "true"),
        (2.5, "2.5"),
        ({"a": [1]}, "a mapping of 1"),
        ([[[]]], "a list of 1"),
        (Path("x"), "of PosixPath"),
        ("x" * 200, '"' + "x" * 79 + r"\.\.\."),
        ("\x1b[2J", r'"\\u001b\[2J"'),
    ],
)
def test_a_value_of_another_type_is_shown(value: object, shown: str) -> None:
    with pytest.raises(ValueError, match=f"`k` is {shown}, wanted int: save it again"):
        Config({"k": value}, NAMED).take("k", int)
    with pytest.raises(ValueError, match=f"`k` is {shown}, wanted null or 1: so it is"):
        Config({"k": value}, NAMED).require("k", None, 1, why="so it is")


def test_keys_that_are_left_are_named() -> None:
    said = Config({f"key{number:02}": 1 for number in range(30)} | {"\x1b": 1}, NAMED)
    said.ignore(["key00"])
    with pytest.raises(ValueError, match=r"found '\\x1b', key01, .*key19 and 10 more, which"):
        said.finish()


def test_a_configuration_is_an_object_of_bounded_size(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="it belongs to the weights beside it"):
        read_config(tmp_path / "cfg.json")
    with pytest.raises(ValueError, match="that is a list, wanted a JSON object"):
        read_config(touch(tmp_path / "cfg.json", "[]"))
    with pytest.raises(ValueError, match="has 4194305 bytes, wanted at most 4194304"):
        read_config(touch(tmp_path / "cfg.json", " " * (2**22 + 1)))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(2, 3).to(torch.float8_e5m2), "b is of torch.float8_e5m2, wanted floating-poi"),
        (torch.ones(2, 3, dtype=torch.complex64), "b is of torch.complex64, wanted floating-poi"),
        (torch.ones(2), r"b is of shape \(2,\), wanted features and dimensions"),
        (torch.ones(2, 0), r"b is of shape \(2, 0\), wanted features and dimensions"),
    ],
)
def test_an_encoder_is_a_matrix_of_numbers(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        take_tensors({"b": tensor}, {"b": "W_enc"}, NAMED)

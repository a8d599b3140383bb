"""A checkpoint's files, on a disk and in the Hub's cache."""

import json

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from assay.backbones import files as checkpoint_files
from assay.backbones import look, open_backbone
from assay.backbones.files import find_checkpoint

COMMIT, OLDER = "0123456789abcdef" * 2 + "01234567", "f" * 40
CONFIG = {
    "model_type": "vit",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "image_size": 32,
    "patch_size": 8,
}
PREPROCESSOR = {
    "size": 32,
    "resample": 3,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def write(folder, config=None, weights=True):
    """A folder that says what it is; its weights are not looked at."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    if weights:
        save_file({"a": torch.arange(6.0).reshape(2, 3)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "vit-tiny")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Two commits of a repository, the newer of which is that of its main branch."""
    repository = tmp_path / "hub/models--owner--name"
    for commit, d_model in ((COMMIT, 8), (OLDER, 16)):
        write(repository / "snapshots" / commit, {"hidden_size": d_model})
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    (repository / "refs/v1").write_text(OLDER)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    checkpoint_files._fetch.cache_clear()
    yield repository
    checkpoint_files._fetch.cache_clear()


def test_a_folder_is_read_and_named_as_it_is_called(folder, monkeypatch):
    found = find_checkpoint(str(folder), None)
    assert (found.name, found.commit, found.config["hidden_size"]) == ("vit-tiny", None, 8)
    assert found.shapes == {"a": (2, 3)}
    monkeypatch.chdir(folder)
    assert find_checkpoint(".", None).name == "vit-tiny"
    # A folder is one, though it may look like a name on the Hub.
    monkeypatch.chdir(folder.parent)
    (folder.parent / "owner").mkdir()
    folder.rename(folder.parent / "owner/name")
    assert find_checkpoint("owner/name", None).commit is None


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("typed", "revision", "commit", "d_model"),
    [
        ("owner/name", None, COMMIT, 8),
        ("hf:owner/name", None, COMMIT, 8),
        ("hf:owner/name@v1", None, OLDER, 16),
        ("owner/name", "v1", OLDER, 16),
        ("hf:owner/name", OLDER, OLDER, 16),
    ],
)
def test_the_hub_gives_a_commit_from_the_cache_without_a_network(typed, revision, commit, d_model):
    said = look(typed, revision)
    assert (said.ckpt, said.d_model) == ("owner/name", d_model)
    assert said.identity["revision"] == commit


@pytest.mark.usefixtures("cache")
def test_an_address_that_is_none_is_told():
    for typed, revision, said in (
        ("hf:owner/name/inside", None, "a repository holds one model"),
        ("hf:owner/name@v1", "v2", "wanted hf:owner/name"),
        ("hf:owner", None, "wanted hf:owner/name"),
        ("owner/name", "a/b", "a revision has no slash"),
    ):
        with pytest.raises(ValueError, match=said):
            look(typed, revision)
    with pytest.raises(FileNotFoundError, match="neither in the cache of the Hub nor on the Hub"):
        look("owner/other")
    for typed in ("no-such-folder", "./owner/name", "/owner/name", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=r"found no folder .*; wanted one that"):
            look(typed)


def test_only_what_is_read_is_fetched(cache, monkeypatch):
    asked = []

    def download(repository, *, revision, allow_patterns, local_files_only):
        asked.append((repository, revision, allow_patterns, local_files_only))
        return str(cache / "snapshots" / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for _ in range(2):
        find_checkpoint("owner/name", "v3")
    ((repository, revision, patterns, from_cache),) = asked
    assert (repository, revision, from_cache) == ("owner/name", "v3", False)
    assert {"config.json", "model.safetensors.index.json", "model*.safetensors"} <= set(patterns)
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in patterns)


def test_a_folder_has_no_revision(folder):
    with pytest.raises(ValueError, match=r"found a folder and the revision v1, wanted no revision"):
        look(str(folder), "v1")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt", "tf_model.h5"])
def test_a_pickle_is_refused_by_its_name(tmp_path, name):
    folder = write(tmp_path / "pickled", weights=False)
    (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"found {name}, wanted model.safetensors: a pickle runs"):
        look(str(folder))


def test_one_number_of_the_weights_changes_the_identity(folder):
    weights = {f"layer.{n}": torch.zeros(2**19) for n in range(8)}  # more than any sample reads
    save_file(weights, folder / "model.safetensors")
    before = find_checkpoint(str(folder), None).identity()
    for name in ("layer.0", "layer.3", "layer.6"):
        for place in (0, 70_001, 2**19 - 1):
            tensor = weights[name].clone()
            tensor[place] = 1
            save_file(weights | {name: tensor}, folder / "model.safetensors")
            assert find_checkpoint(str(folder), None).identity() != before
    save_file(weights, folder / "model.safetensors")
    assert find_checkpoint(str(folder), None).identity() == before


def test_weights_in_several_files_are_those_that_the_index_names(folder):
    (folder / "model.safetensors").unlink()
    for number in (1, 2):
        save_file({f"a{number}": torch.zeros(number)}, folder / f"model-{number}.safetensors")
    save_file({"other": torch.zeros(3)}, folder / "other.safetensors")
    index = folder / "model.safetensors.index.json"
    named = {"a1": "model-1.safetensors", "a2": "model-2.safetensors"}
    index.write_text(json.dumps({"weight_map": named}))
    found = find_checkpoint(str(folder), None)
    assert found.shapes == {"a1": (1,), "a2": (2,)}
    before = found.identity()["weights"]
    save_file({"a2": torch.ones(2)}, folder / "model-2.safetensors")
    assert find_checkpoint(str(folder), None).identity()["weights"] != before

    (folder / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"found no model-2.safetensors, which .* names"):
        look(str(folder))
    for name in ("../model-1.safetensors", "/etc/x.safetensors", "model.bin"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match=r"wanted the name of a safetensors file"):
            look(str(folder))
    index.write_text("{}")
    with pytest.raises(ValueError, match="found no weight_map"):
        look(str(folder))


def test_a_file_that_is_missing_or_cut_off_is_named(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-1], whole[:4], b"version https://git-lfs.github.com/spec/v1"):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model.safetensors: found no whole safetensors file"):
            look(str(folder))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"found neither model.safetensors nor"):
        look(str(folder))
    weights.write_bytes(whole)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json: found \[\], wanted an object"):
        look(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"found no config.json"):
        look(str(folder))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"auto_map": {"AutoModel": "modeling.Own"}}, "found code of its own .*modeling.Own"),
        ({"model_type": "llama"}, r"found model_type llama, wanted one of dinov2, .*python:pack"),
        ({"model_type": None}, "found model_type None"),
        ({"model_type": ["vit"]}, "found model_type"),
        ({"quantization_config": {"bits": 4}}, "found quantized weights"),
        ({"patch_size": [8, 16]}, r"found patch_size .*, wanted square patches"),
        ({"hidden_size": "8"}, "found hidden_size 8, wanted a whole number"),
        ({"num_hidden_layers": 0}, "found num_hidden_layers 0"),
        ({"image_size": True}, "found image_size True"),
    ],
)
def test_a_configuration_that_is_not_known_is_refused(tmp_path, config, said):
    folder = write(tmp_path / "odd", config)
    with pytest.raises(ValueError, match=f"odd: config.json: {said}"):
        look(str(folder))


def test_sizes_may_be_pairs_and_null(tmp_path):
    pairs = write(tmp_path / "a", {"patch_size": [8, 8], "image_size": [32, 64]})
    assert look(str(pairs)).patch_size == 8
    whole = write(tmp_path / "b", {"model_type": "clip", "vision_config": None})
    assert (look(str(whole)).d_model, look(str(whole)).patch_size) == (768, 32)


def test_a_library_that_is_not_installed_says_how(folder, monkeypatch):
    monkeypatch.setattr("assay.backbones.transformers_models.LIBRARY", "no-such-library")
    said = r"found no no-such-library, which computes this model: pip install 'assay-baselines\["
    with pytest.raises(ValueError, match=said):
        look(str(folder))
    with pytest.raises(ValueError, match=said):
        open_backbone(str(folder), None, device=torch.device("cpu"), precision="float32")

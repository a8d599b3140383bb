"""Backbones of timm, by a stand-in of its interface: timm needs torchvision."""

import json
import sys
from importlib.metadata import version
from types import ModuleType

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn

from assay.backbones import Preprocessing, look, open_backbone
from assay.backbones import files as checkpoint_files
from assay.backbones.callable import normalize
from assay.backbones.timm_models import parse_timm_preprocessing

CPU = torch.device("cpu")
PRETRAINED = {
    "input_size": [3, 32, 32],
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.25, 0.3],
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}


class Embedding(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, d, 8, 8)


class Model(nn.Module):
    """A stack of linear blocks with timm's names and `forward_intermediates`."""

    def __init__(self, d: int, depth: int, n_registers: int, class_token: bool, num_classes: int):
        super().__init__()
        assert num_classes == 0
        self.patch_embed = Embedding(d)
        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        if n_registers:
            self.reg_token = nn.Parameter(torch.zeros(1, n_registers, d))
        self.blocks = nn.ModuleList(nn.Linear(d, d) for _ in range(depth))
        self.norm = nn.LayerNorm(d)
        self.asked: list[dict] = []

    def forward_intermediates(self, x, *, indices, return_prefix_tokens, **options):
        self.asked.append({"indices": indices, "training": self.training, **options})
        assert return_prefix_tokens
        patches = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        before = [getattr(self, name) for name in ("cls_token", "reg_token") if hasattr(self, name)]
        n_prefix = sum(each.shape[1] for each in before)
        tokens = torch.cat([*(each.expand(len(x), -1, -1) for each in before), patches], dim=1)
        found = []
        for number, block in enumerate(self.blocks):
            tokens = block(tokens)
            if number in indices:
                split = tokens[:, n_prefix:], tokens[:, :n_prefix]
                found.append(split if n_prefix else split[0])
        return found


def create_model(architecture, *, pretrained, dynamic_img_size, **options):
    assert (pretrained, dynamic_img_size) == (False, True)
    made = {
        "plain": (4, 3, 0, False),
        "cls": (4, 3, 0, True),
        "registers": (4, 3, 2, True),
    }
    if architecture not in made:
        raise RuntimeError(f"Unknown model ({architecture})")
    return Model(*made[architecture], **options)


@pytest.fixture
def timm(monkeypatch):
    module = ModuleType("timm")
    module.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", module)
    monkeypatch.setattr(
        "assay.backbones.library.version", lambda name: "1.0" if name == "timm" else version(name)
    )


def write(folder, architecture="registers", **config):
    folder.mkdir(parents=True, exist_ok=True)
    model = create_model(architecture, pretrained=False, dynamic_img_size=True, num_classes=0)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(each.shape, generator=generator) * 0.5
        for name, each in model.state_dict().items()
    }
    weights |= {"head.weight": torch.zeros(7, 4), "head.bias": torch.zeros(7)}
    save_file(weights, folder / "model.safetensors")
    said = {"architecture": architecture, "num_classes": 7, "pretrained_cfg": PRETRAINED} | config
    (folder / "config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("architecture", ["plain", "cls", "registers"])
def test_patches_come_after_the_cls_token_and_registers_not_at_all(tmp_path, architecture):
    folder = write(tmp_path / architecture, architecture)
    typed = f"timm:{folder}"
    said = look(typed)
    assert (said.family, said.ckpt) == ("timm", architecture)
    assert (said.d_model, said.n_blocks, said.patch_size) == (4, 3, 8)
    assert said.cls_token == (architecture != "plain")
    assert (said.identity["library"], said.identity["version"]) == ("timm", "1.0")

    weights = load_file(folder / "model.safetensors")
    # Two images: as many as timm gives tensors for each block.
    shown = torch.randint(0, 256, (2, 16, 24, 3), dtype=torch.uint8)
    tokens = nn.functional.conv2d(
        normalize(shown, said.preprocessing),
        weights["patch_embed.proj.weight"],
        weights["patch_embed.proj.bias"],
        stride=8,
    )
    tokens = tokens.flatten(2).transpose(1, 2)
    if said.cls_token:
        tokens = torch.cat([weights["cls_token"].expand(2, -1, -1), tokens], dim=1)
    wanted = []
    for number in range(3):
        weight, bias = (weights[f"blocks.{number}.{name}"] for name in ("weight", "bias"))
        tokens = nn.functional.linear(tokens, weight, bias)
        wanted.append(tokens)

    backbone = open_backbone(typed, None, device=CPU, precision="float32")
    recorded = backbone.record(shown, [2, 0])
    torch.testing.assert_close(recorded, torch.stack([wanted[2], wanted[0]], dim=1))
    assert backbone.description == said
    rounded = open_backbone(typed, None, device=CPU, precision="bfloat16").record(shown, [2, 0])
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - recorded).norm() / recorded.norm() < 0.03


@pytest.mark.usefixtures("timm")
def test_raw_states_are_asked_for_and_nothing_after_them(tmp_path, monkeypatch):
    made = []

    def noting(*given, **options):
        made.append(create_model(*given, **options))
        return made[-1]

    monkeypatch.setattr(sys.modules["timm"], "create_model", noting)
    backbone = open_backbone(f"timm:{write(tmp_path / 'm')}", None, device=CPU, precision="float32")
    backbone.record(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), [1, 0])
    assert made[0].asked == [
        {
            "indices": [0, 1],
            "training": False,
            "norm": False,
            "stop_early": True,
            "output_fmt": "NLC",
            "intermediates_only": True,
        }
    ]


@pytest.mark.usefixtures("timm")
def test_a_name_is_that_of_timms_repository_on_the_hub(tmp_path, monkeypatch):
    commit = "a" * 40
    repository = tmp_path / "hub/models--timm--vit_tiny.in1k"
    write(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    checkpoint_files._fetch.cache_clear()
    said = look("timm:vit_tiny.in1k")
    assert (said.ckpt, said.identity["revision"]) == ("timm/vit_tiny.in1k", commit)
    assert look("timm:timm/vit_tiny.in1k", commit).identity == said.identity


@pytest.mark.usefixtures("timm")
def test_weights_that_do_not_fit_are_refused(tmp_path):
    def refused(said, folder, look_too=False):
        typed = f"timm:{folder}"
        with pytest.raises(ValueError, match=said):
            open_backbone(typed, None, device=CPU, precision="float32")
        if look_too:
            with pytest.raises(ValueError, match=said):
                look(typed)

    folder = write(tmp_path / "a", "registers")
    weights = load_file(folder / "model.safetensors")

    def save(changed):
        save_file(changed, folder / "model.safetensors")

    save({key: value for key, value in weights.items() if not key.startswith("norm")})
    open_backbone(f"timm:{folder}", None, device=CPU, precision="float32")
    save({key: value for key, value in weights.items() if key != "reg_token"})
    refused(r"do not fit, reg_token \(1 missing, 0 unexpected\)", folder)
    save(weights | {"pos_embed": torch.zeros(1)})
    refused(r"do not fit, pos_embed \(0 missing, 1 unexpected\)", folder)
    save(weights | {"cls_token": torch.zeros(1, 1, 5)})
    refused("found what timm cannot load", folder)
    save({key: value for key, value in weights.items() if not key.startswith("blocks.0")})
    refused("found no weights of square patches and numbered blocks", folder, look_too=True)
    save({"stem.weight": torch.zeros(1)})
    refused("found no weights of square patches and numbered blocks", folder, look_too=True)
    other = write(tmp_path / "b")
    said = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(said | {"architecture": "odd"}))
    refused(r"found what timm cannot load \(Unknown model \(odd\)\)", other)
    (other / "config.json").write_text(json.dumps(said | {"pretrained_cfg": None}))
    refused("config.json: found no pretrained_cfg", other, look_too=True)


def test_a_timm_that_is_not_there_or_cannot_be_imported_says_how(tmp_path, monkeypatch):
    folder = write(tmp_path / "a")
    monkeypatch.setattr("assay.backbones.timm_models.LIBRARY", "no-such-timm")
    with pytest.raises(
        ValueError, match=r"found no no-such-timm, .* pip install timm, and the torc"
    ):
        look(f"timm:{folder}")
    monkeypatch.setattr("assay.backbones.library.version", lambda _: "1.0")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"found timm, which cannot be imported .*torchvision"):
        open_backbone(f"timm:{folder}", None, device=CPU, precision="float32")


@pytest.mark.parametrize(
    ("said", "size", "resize", "resample"),
    [
        ({}, (32, 32), 35, "bicubic"),
        ({"crop_pct": 1.0, "interpolation": "bilinear"}, (32, 32), 32, "bilinear"),
        ({"crop_mode": "squash"}, (32, 32), None, "bicubic"),
        ({"input_size": [3, 32, 64], "crop_pct": 1}, (32, 64), 32, "bicubic"),
    ],
)
def test_timms_transform_is_read(said, size, resize, resample):
    assert parse_timm_preprocessing(PRETRAINED | said) == Preprocessing(
        (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), size, resize, resample
    )


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"crop_mode": "border"}, "found crop_mode border"),
        ({"interpolation": "random"}, "found interpolation random"),
        ({"input_size": [3, 32]}, "found no such numbers"),
        ({"mean": None}, "found no such numbers"),
        ({"crop_pct": 0}, "found no such numbers"),
    ],
)
def test_a_transform_that_is_not_understood_is_refused(said, message):
    with pytest.raises(ValueError, match=message):
        parse_timm_preprocessing(PRETRAINED | said)

"""Models of the user's own, by a function, and backbones in the catalog."""

from dataclasses import replace

import pytest
import torch
from kedro.io import DatasetError

from assay.backbones import (
    BackboneHandle,
    CallableBackbone,
    Description,
    Preprocessing,
    look,
    open_backbone,
)
from assay.backbones.dataset import BackboneDataset

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), (16, 16), None, "bicubic")
DESCRIPTION = Description("own", "tiny", 4, 3, 8, False, PREPROCESSING, {"library": "own"})

MODULE = """
import torch
from torch import nn

from assay.backbones import CallableBackbone, Description, Preprocessing

DESCRIPTION = Description(
    family="own",
    ckpt="tiny",
    d_model=4,
    n_blocks=3,
    patch_size=8,
    cls_token=False,
    preprocessing=Preprocessing((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), (16, 16), None, "bicubic"),
    identity={"library": "mine", "weights": "first"},
)
made = []


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 4, 8, 8)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))


def backbone(device, precision):
    dtype = getattr(torch, precision)
    model = Tiny().eval().to(device, dtype)
    made.append(model)

    def states(pixels, layers):
        tokens = model.embed(pixels.to(dtype)).flatten(2).transpose(1, 2)
        found = {}
        for number, block in enumerate(model.blocks[: max(layers) + 1]):
            found[number] = tokens = block(tokens)
        return [found[layer] for layer in layers]

    return CallableBackbone(states, DESCRIPTION, device)


def nothing(device, precision):
    return DESCRIPTION


number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """A module of a name of its own, as imports stay."""
    name = "own_" + "".join(c for c in request.node.name if c.isalnum())
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.parametrize(("precision", "within"), [("float32", 1e-6), ("bfloat16", 0.05)])
def test_a_function_of_ones_own_gives_a_backbone(module, precision, within):
    typed = f"python:{module}:backbone"
    backbone = open_backbone(typed, None, device=CPU, precision=precision)
    shown = torch.randint(0, 256, (2, 16, 24, 3), dtype=torch.uint8)
    recorded = backbone.record(shown, [2, 0])
    assert recorded.shape == (2, 2, 6, 4) and recorded.dtype == torch.float32

    import importlib

    model = importlib.import_module(module).Tiny()
    pixels = shown.permute(0, 3, 1, 2).float() / 255
    for channel, (mean, std) in enumerate([(0.5, 0.2), (0.4, 0.25), (0.3, 0.3)]):
        pixels[:, channel] = (pixels[:, channel] - mean) / std
    with torch.no_grad():
        tokens = model.embed(pixels).flatten(2).transpose(1, 2)
        states = [tokens := block(tokens) for block in model.blocks]
    torch.testing.assert_close(
        recorded, torch.stack([states[2], states[0]], 1), rtol=within, atol=within
    )


def test_a_look_makes_it_once(module):
    import importlib

    typed = f"python:{module}:backbone"
    assert look(typed) == look(typed)
    assert look(typed).identity == {"library": "mine", "weights": "first"}
    assert len(importlib.import_module(module).made) == 1


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [
        ("missing", None, "found no such function"),
        ("", None, "found no such function"),
        ("number", None, "found int, wanted a function"),
        ("nothing", None, "found Description, wanted an assay.backbones.Backbone"),
        ("backbone", "v1", "found the revision v1, wanted none"),
    ],
)
def test_what_is_no_such_function_is_told(module, name, revision, said):
    with pytest.raises(ValueError, match=said):
        look(f"python:{module}:{name}", revision)
    with pytest.raises(ValueError, match="add its folder to PYTHONPATH"):
        look("python:no_such_package.module:function")
    with pytest.raises(ValueError, match="found no such function"):
        look("python::")


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 1, 5, 4),
        torch.zeros(2, 1, 4, 5),
        [torch.zeros(1, 4, 4)],
        torch.zeros(3, 1, 4, 4),
    ],
)
def test_tokens_of_another_shape_are_told(wrong):
    backbone = CallableBackbone(lambda *_: wrong, DESCRIPTION, CPU)
    with pytest.raises(
        ValueError, match=r"tiny: found tokens of shape .* expected 2 x \(1, 4, 4\)"
    ):
        backbone.record(torch.zeros(1, 16, 16, 3, dtype=torch.uint8), [0, 1])


def test_a_cls_token_is_counted():
    backbone = CallableBackbone(
        lambda pixels, layers: torch.ones(len(layers), len(pixels), 5, 4, dtype=torch.bfloat16),
        replace(DESCRIPTION, cls_token=True),
        CPU,
    )
    recorded = backbone.record(torch.zeros(2, 16, 16, 3, dtype=torch.uint8), range(3))
    assert recorded.shape == (2, 3, 5, 4) and recorded.dtype == torch.float32


# In the catalog


def test_the_catalogs_entry_gives_a_handle_and_its_identity(module, tmp_path):
    typed = f"python:{module}:backbone"
    dataset = BackboneDataset(model=typed)
    handle = dataset.load()
    assert handle == BackboneHandle(typed) and dataset.exists()
    assert handle.description == look(typed)
    backbone = handle.open(device=CPU, precision="float32")
    assert backbone.description == handle.description

    first = dataset.fingerprint()
    assert first == BackboneDataset(model=typed).fingerprint()
    (tmp_path / f"{module}2.py").write_text(MODULE.replace('"first"', '"second"'))
    assert BackboneDataset(model=f"python:{module}2:backbone").fingerprint() != first


def test_the_catalogs_entry_names_the_parameter_and_is_never_written(tmp_path):
    missing = BackboneDataset(model=str(tmp_path / "none"), parameter="extract.model")
    assert not missing.exists()
    with pytest.raises(FileNotFoundError, match=r"extract.model: found no folder .*none"):
        missing.fingerprint()
    with pytest.raises(ValueError, match=r"extract.model: .* found no such function"):
        BackboneDataset(model="python:x:y", parameter="extract.model").fingerprint()
    with pytest.raises(ValueError, match=r"extract.model: .*the revision v1"):
        BackboneDataset(model="python:x:y", revision="v1", parameter="extract.model").fingerprint()
    with pytest.raises(DatasetError, match="the model is only read"):
        missing.save("x")  # type: ignore[arg-type]
    assert "none" in repr(missing)

"""Backbones of transformers, on tiny random checkpoints that the tests save."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from assay.backbones import open_backbone
from assay.backbones.families import FAMILIES

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {k: v for k, v in SIZES.items() if "size" not in k or k in ("hidden_size", "intermediate_size")} | {"vocab_size": 16, "max_position_embeddings": 8}  # fmt: skip
PREPROCESSOR = {
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.3],
}


def clip(name: str) -> transformers.PreTrainedModel:
    """With the text model, as whole checkpoints are published."""
    config = getattr(transformers, f"{name}Config")(vision_config=SIZES, text_config=TEXT)
    return getattr(transformers, f"{name}Model")(config)


def alone(name: str, model: str | None = None, **more) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**SIZES | more)
    return getattr(transformers, model or f"{name}Model")(config)


MODELS = {
    "dinov2": lambda: alone("Dinov2"),
    "dinov2 with registers": lambda: alone("Dinov2WithRegisters", num_register_tokens=4),
    "dinov3": lambda: alone("DINOv3ViT", num_register_tokens=4),
    "clip": lambda: clip("CLIP"),
    "clip, vision alone": lambda: alone("CLIPVision"),
    "siglip": lambda: clip("Siglip"),
    "siglip, vision alone": lambda: alone("SiglipVision"),
    "vit": lambda: alone("ViT", "ViTForImageClassification"),
    "deit": lambda: alone("DeiT", "DeiTForImageClassificationWithTeacher"),
    "beit": lambda: alone(
        "Beit",
        "BeitForImageClassification",
        use_relative_position_bias=True,
        layer_scale_init_value=0.1,
    ),
    "mae": lambda: alone(
        "ViTMAE",
        "ViTMAEForPreTraining",
        decoder_hidden_size=8,
        decoder_num_hidden_layers=3,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=8,
    ),
    "ijepa": lambda: alone("IJepa"),
}
PREFIX = {"dinov2 with registers": 5, "dinov3": 5, "siglip": 0, "siglip, vision alone": 0, "deit": 2, "ijepa": 0}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder of each kind as save_pretrained leaves it. All weights are random: a library starts
    some of them as zeros or ones, whose use nothing would show.
    """
    root = tmp_path_factory.mktemp("checkpoints")
    generator = torch.Generator().manual_seed(0)
    for name, make in MODELS.items():
        model = make()
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        folder = root / name
        model.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return root


@pytest.fixture
def copy(checkpoints, tmp_path):
    """Makes a copy of one, which may be broken."""

    def make(name: str = "vit") -> Path:
        folder = tmp_path / "copied"
        folder.mkdir()
        for path in (checkpoints / name).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    return make


def images(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator)


def opened(folder: Path, precision="float32"):
    return open_backbone(str(folder), None, device=CPU, precision=precision)


def hidden_states(folder: Path, shown: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What transformers itself says: (n, prefix + patches, d) after the embeddings and each block."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    name = FAMILIES[kind].model_class
    options: dict = {}
    given: dict = {}
    if kind == "vit_mae":
        options["mask_ratio"] = 0.0
        n_patches = shown.shape[1] * shown.shape[2] // 64
        given["noise"] = torch.arange(n_patches).expand(len(shown), -1).float()
    model = getattr(transformers, name).from_pretrained(folder, **options).eval()
    if shown.shape[1:3] != (32, 32) and "dino" not in kind:
        given["interpolate_pos_encoding"] = True
    pixels = shown.permute(0, 3, 1, 2).float() / 255
    for channel, (mean, std) in enumerate([(0.5, 0.2), (0.4, 0.25), (0.3, 0.3)]):
        pixels[:, channel] = (pixels[:, channel] - mean) / std
    with torch.no_grad():
        return model(pixels, output_hidden_states=True, **given).hidden_states


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 64), (1, 48, 24)])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_recorded_are_the_hidden_states_without_registers(checkpoints, name, shape):
    shown = images(*shape)
    states = hidden_states(checkpoints / name, shown)
    n_patches = shape[1] * shape[2] // 64
    prefix, cls = PREFIX.get(name, 1), PREFIX.get(name, 1) > 0
    assert states[0].shape[1] == prefix + n_patches
    recorded = opened(checkpoints / name).record(shown, [2, 0, 1])
    assert recorded.dtype == torch.float32 and not recorded.requires_grad
    assert recorded.shape == (shape[0], 3, cls + n_patches, 16)
    for place, layer in enumerate((2, 0, 1)):
        wanted = torch.cat(
            [states[layer + 1][:, :1][:, :cls], states[layer + 1][:, prefix:]], dim=1
        )
        torch.testing.assert_close(recorded[:, place], wanted, rtol=1e-6, atol=1e-6)
        # Each token is another, so that an order or a register would show.
        assert torch.pdist(recorded[0, place]).min() > 1e-3

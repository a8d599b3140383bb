"""Backbones of transformers, on tiny random checkpoints that the tests save."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from assay.backbones import look, open_backbone
from assay.backbones.families import FAMILIES, read_sizes

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


def reference(folder: Path) -> tuple[str, transformers.PreTrainedModel]:
    """The model as transformers opens it, and its kind."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    options = {"mask_ratio": 0.0} if kind == "vit_mae" else {}
    model = getattr(transformers, FAMILIES[kind].model_class).from_pretrained(folder, **options)
    return kind, model.eval()


def hidden_states(
    kind: str, model: transformers.PreTrainedModel, shown: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """What transformers itself says: (n, prefix + patches, d) after the embeddings and each block."""
    given: dict = {}
    if kind == "vit_mae":
        n_patches = shown.shape[1] * shown.shape[2] // 64
        given["noise"] = torch.arange(n_patches).expand(len(shown), -1).float()
    if shown.shape[1:3] != (32, 32) and "dino" not in kind:
        given["interpolate_pos_encoding"] = True
    pixels = shown.permute(0, 3, 1, 2).float() / 255
    for channel, (mean, std) in enumerate([(0.5, 0.2), (0.4, 0.25), (0.3, 0.3)]):
        pixels[:, channel] = (pixels[:, channel] - mean) / std
    with torch.no_grad():
        return model(pixels, output_hidden_states=True, **given).hidden_states


@pytest.mark.parametrize("name", MODELS)
def test_what_is_recorded_are_the_hidden_states_without_registers(checkpoints, name):
    library, backbone = reference(checkpoints / name), opened(checkpoints / name)
    prefix, cls = PREFIX.get(name, 1), PREFIX.get(name, 1) > 0
    for shape in ((3, 32, 32), (2, 16, 64), (1, 48, 24)):
        shown = images(*shape)
        states = hidden_states(*library, shown)
        n_patches = shape[1] * shape[2] // 64
        assert states[0].shape[1] == prefix + n_patches
        recorded = backbone.record(shown, [2, 0, 1])
        assert recorded.dtype == torch.float32 and not recorded.requires_grad
        assert recorded.shape == (shape[0], 3, cls + n_patches, 16)
        for place, layer in enumerate((2, 0, 1)):
            state = states[layer + 1]
            wanted = torch.cat([state[:, : int(cls)], state[:, prefix:]], dim=1)
            torch.testing.assert_close(recorded[:, place], wanted, rtol=1e-6, atol=1e-6)
            # Each token is another, so that an order or a register would show.
            assert torch.pdist(recorded[0, place]).min() > 1e-3


def test_nothing_after_the_last_wanted_block_is_computed(checkpoints):
    backbone = opened(checkpoints / "dinov2")
    calls = []
    for number, block in enumerate(backbone._function._blocks):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    norm = backbone._function._model.layernorm
    norm.register_forward_hook(lambda *_: calls.append("norm"))
    first = backbone.record(images(1, 32, 32), [1])
    assert calls == [0, 1]
    assert torch.equal(backbone.record(images(1, 32, 32), [0, 1])[:, 1], first[:, 0])
    backbone.record(images(1, 32, 32), [2])
    assert calls == [0, 1, 0, 1, 0, 1, 2]
    assert all(len(block._forward_hooks) == 1 for block in backbone._function._blocks)


def test_dropout_is_off_and_autocast_and_gradients_change_nothing(copy):
    folder = copy("vit")
    config = json.loads((folder / "config.json").read_text())
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        config[key] = 0.5
    config |= {"output_hidden_states": True, "output_attentions": True}
    (folder / "config.json").write_text(json.dumps(config))
    backbone, shown = opened(folder), images(2, 32, 32)
    plain = backbone.record(shown, [2])
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        again = backbone.record(shown, [2])
    assert torch.equal(plain, again) and not again.requires_grad
    torch.testing.assert_close(
        plain[:, 0], hidden_states(*reference(folder), shown)[3], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", ["dinov3", "vit"])
def test_bfloat16_is_of_the_weights_and_gives_float32(checkpoints, name):
    shown = images(2, 32, 32)
    exact = opened(checkpoints / name).record(shown, [0, 1])
    backbone = opened(checkpoints / name, "bfloat16")
    rounded = backbone.record(shown, [0, 1])
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.03
    dtypes = {n: b.dtype for n, b in backbone._function._model.named_buffers() if "rope" in n}
    assert set(dtypes.values()) <= {torch.float32}
    assert bool(dtypes) == (name == "dinov3")


@pytest.mark.parametrize("layers", [[], [3], [-1], [0, 0]])
def test_layers_that_are_not_there_are_named(checkpoints, layers):
    with pytest.raises(ValueError, match=r"found layers .*, expected block numbers from 0 to 2"):
        opened(checkpoints / "vit").record(images(1, 32, 32), layers)


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        (torch.zeros(1, 32, 36, 3, dtype=torch.uint8), "32 x 36 pixels, expected multiples"),
        (torch.zeros(1, 0, 8, 3, dtype=torch.uint8), "0 x 8 pixels, expected multiples"),
        (torch.zeros(1, 32, 32, 3), "torch.float32"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"expected uint8 \(n, height, width, 3\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(checkpoints, shown, said):
    with pytest.raises(ValueError, match=said):
        opened(checkpoints / "vit").record(shown, [0])


@pytest.mark.parametrize("name", MODELS)
def test_a_look_says_what_a_model_is(checkpoints, name):
    folder = checkpoints / name
    said = look(str(folder))
    family = {"dinov2 with registers": "dinov2"}.get(name, name.removesuffix(", vision alone"))
    assert (said.family, said.ckpt) == (family, name)
    assert (said.d_model, said.n_blocks, said.patch_size) == (16, 3, 8)
    assert said.cls_token == (PREFIX.get(name, 1) > 0)
    assert said.preprocessing.size == (32, 32)
    assert said == opened(folder).description


PROGRAM = """
import sys
from assay.backbones import BackboneHandle, look
import assay.backbones.dataset
print(look(sys.argv[1]).n_blocks, BackboneHandle(sys.argv[1]).description == look(sys.argv[1]))
print([name for name in ("transformers", "timm") if name in sys.modules])
"""


def test_a_look_imports_no_library(checkpoints):
    command = [sys.executable, "-c", PROGRAM, str(checkpoints / "vit")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split("\n")[:2] == ["3 True", "[]"]


def test_what_changes_the_activations_changes_the_identity(copy, monkeypatch):
    folder = copy("vit")
    first = look(str(folder)).identity
    assert first["library"] == "transformers" and first["version"] == transformers.__version__
    elsewhere = folder.rename(folder.with_name("moved"))
    assert look(str(elsewhere)).identity == first

    weights = load_file(elsewhere / "model.safetensors")
    weights["vit.embeddings.cls_token"] += 1
    save_file(weights, elsewhere / "model.safetensors", {"format": "pt"})
    second = look(str(elsewhere)).identity
    assert {key for key in first if first[key] != second[key]} == {"weights"}

    for name, key, value, changed in (
        ("config.json", "layer_norm_eps", 0.1, {"config"}),
        ("preprocessor_config.json", "image_mean", [0.1, 0.2, 0.3], {"mean"}),
        ("preprocessor_config.json", "size", 64, set()),
    ):
        said = json.loads((elsewhere / name).read_text()) | {key: value}
        (elsewhere / name).write_text(json.dumps(said))
        third = look(str(elsewhere)).identity
        assert {each for each in first if second[each] != third[each]} == changed
        second = third
    monkeypatch.setattr("assay.backbones.library.version", lambda _: "9.9")
    assert look(str(elsewhere)).identity["version"] == "9.9"


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_a_configuration_leaves_out_is_as_in_the_library(kind):
    family = FAMILIES[kind]
    model = getattr(transformers, family.model_class)
    config = model.config_class()
    for key, value in family.defaults.items():
        assert getattr(config, key) == value, key
    inner = {} if config.model_type == kind else {"vision_config": {}}
    sizes = read_sizes({"model_type": kind, **inner}, family)
    assert (sizes.d_model, sizes.n_blocks) == (384 if kind == "dinov3_vit" else 768, 12)


# What is missing


def without(folder: Path, *names: str) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if not key.endswith(names)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("vit", "layernorm_before.weight"),
        ("vit", "cls_token"),
        ("dinov2", "layer.1.norm1.weight"),
        ("dinov3", "register_tokens"),
        ("clip", "layrnorm.weight"),
        ("siglip", "position_embedding.weight"),
    ],
)
def test_weights_that_are_missing_are_never_made_up(copy, name, missing):
    folder = copy(name)
    without(folder, missing)
    with pytest.raises(ValueError, match=rf"found no weights .*{missing}.* missing\), wanted all"):
        opened(folder)


@pytest.mark.parametrize(
    ("name", "unused"),
    [
        ("vit", ("vit.layernorm.weight", "vit.layernorm.bias", "classifier.weight")),
        ("dinov2", ("embeddings.mask_token", "layernorm.weight", "layernorm.bias")),
        ("clip", ("post_layernorm.weight", "visual_projection.weight")),
        ("siglip", ("head.probe", "head.mlp.fc1.weight")),
    ],
)
def test_weights_that_no_block_needs_may_be_missing(copy, name, unused):
    folder = copy(name)
    shown = images(1, 32, 32)
    whole = opened(folder).record(shown, [2])
    without(folder, *unused)
    assert torch.equal(opened(folder).record(shown, [2]), whole)


def test_weights_of_another_shape_are_refused(copy):
    folder = copy("vit")
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if "layernorm_before" in key)
    weights[name] = weights[name][:8].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"found what transformers cannot load"):
        opened(folder)


def test_loading_says_nothing_and_leaves_its_settings(checkpoints, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    opened(checkpoints / "clip")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    said = capfd.readouterr()
    assert said.out == said.err == ""


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dinov2", "dinov3", "mae"])
def test_a_gpu_gives_the_same(checkpoints, name):
    shown = images(2, 32, 64)
    on_cpu = opened(checkpoints / name).record(shown, [0, 2])
    cuda = torch.device("cuda")
    for given in (shown, shown.to(cuda)):
        model = open_backbone(str(checkpoints / name), None, device=cuda, precision="float32")
        on_gpu = model.record(given, [0, 2])
        assert on_gpu.device.type == "cuda"
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-4)
        assert torch.equal(model.record(given, [0, 2]), on_gpu)

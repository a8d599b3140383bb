"""ViT-Prisma's files: the configuration beside the weights, pickled with them, or both."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.io.saes import Settings, read_sae
from assay.io.saes.prisma import PICKLED, TRAINING
from slow_autoencoder import D, N, check, randn, relu, run, top, weights

CONFIG: dict[str, Any] = {
    "architecture": "standard",
    "d_in": D,
    "expansion_factor": 2,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "normalize_activations": "none",
    "hook_point_layer": 9,
    "layer_subtype": "hook_resid_post",
    "hook_point_head_index": None,
    "is_transcoder": False,
    "transcoder_with_skip_connection": True,
    "out_hook_point_layer": 9,
    "cls_token_only": False,
    "use_patches_only": False,
    "vit_model_cfg": None,
    "_device": "cpu",
    "_dtype": "float32",
}
MISSING = object()
NORMS = ["none", "layer_norm", "constant_norm_rescale"]


def said(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (CONFIG | changes).items() if value is not MISSING}


def pickled(monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], name: str = PICKLED) -> Any:
    """An object of one of the library's classes, which torch.save pickles by its name."""
    module, _, of = name.rpartition(".")
    for part in range(1, module.count(".") + 2):
        package = ".".join(module.split(".")[:part])
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    made: Any = type(of, (), {"__module__": module})
    monkeypatch.setattr(sys.modules[module], of, made, raising=False)
    config = made()
    config.__dict__.update(values)
    return config


def save(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    beside: dict[str, Any] | None = None,
    within: Any = None,
    name: str = "weights.pt",
) -> Path:
    """Weights with a configuration beside them, within them, or both."""
    if beside is not None:
        (folder / "config.json").write_text(json.dumps(beside))
    holds = tensors if within is None else {"cfg": within, "state_dict": tensors}
    torch.save(holds, folder / name)
    return folder


def gated() -> dict[str, Tensor]:
    return weights() | {
        "b_enc": torch.zeros(N),
        "b_gate": 0.5 * randn(N, seed=6),
        "b_mag": 0.5 * randn(N, seed=7),
        "r_mag": 0.5 * randn(N, seed=8),
    }


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("named", ["standard", "topk", "gated"])
@pytest.mark.parametrize("where", ["beside", "within", "both"])
def test_every_architecture_as_the_library_computes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, norm: str, where: str
) -> None:
    tensors = gated() if named == "gated" else weights()
    wanted = run(tensors, top(3, last=relu) if named == "topk" else relu, norm=norm)
    config = said(normalize_activations=norm, architecture="gated" if named == "gated" else MISSING)
    if named == "topk":
        config |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    given: dict[str, Any] = {}
    if where != "within":
        given["beside"] = config
    if where != "beside":
        given["within"] = pickled(monkeypatch, config)
    stored = check(save(tmp_path, tensors, **given), wanted)
    assert stored.library == "ViT-Prisma"
    assert (stored.recorded.layer, stored.recorded.hook) == (9, "blocks.9.hook_resid_post")
    assert stored.notes == ()
    files = ["weights.pt"] if where == "within" else ["weights.pt", "config.json"]
    assert [path.name for path in stored.files] == files


def test_an_early_pickled_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = pickled(monkeypatch, {"d_model": D}, "vit_prisma.configs.HookedViTConfig.HookedViTConfig")
    config = said(_device=MISSING, _dtype=MISSING, activation_fn_kwargs=MISSING)
    config |= {
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "vit_model_cfg": vit,
        "d_sae": N,
        "expansion_factor": [2, 4],
        "hook_point": "blocks.9.hook_mlp_out",
        "tokens_per_buffer": 640,
    }
    monkeypatch.setitem(sys.modules, "vit_prisma", types.ModuleType("vit_prisma"))
    within = pickled(monkeypatch, config)
    monkeypatch.setitem(sys.modules, type(vit).__module__, types.ModuleType("x"))
    monkeypatch.setattr(
        sys.modules[type(vit).__module__], "HookedViTConfig", type(vit), raising=False
    )
    stored = check(save(tmp_path, weights(), within=within), run(weights(), relu))
    assert stored.recorded.hook == "blocks.9.hook_mlp_out"
    within._custom_hook_point = "blocks.9.hook_attn_out"
    stored = read_sae(save(tmp_path, weights(), within=within))
    assert stored.recorded.hook == "blocks.9.hook_attn_out"


def test_an_early_configuration_beside_the_weights(tmp_path: Path) -> None:
    config = said(device={"__type__": "torch.device", "value": "cpu"}, _device=MISSING, d_sae=N)
    check(save(tmp_path, weights(), beside=config), run(weights(), relu))


def test_the_bias_that_a_gated_one_has_no_term_for(tmp_path: Path) -> None:
    tensors = gated() | {"b_enc": randn(N, seed=12)}
    config = said(architecture="gated")
    stored = check(save(tmp_path, tensors, beside=config), run(tensors, relu))
    assert stored.notes == ("its b_enc is not used: a gated one has b_gate and b_mag",)
    del tensors["b_enc"]
    assert check(save(tmp_path, tensors, beside=config), run(tensors, relu)).notes == ()


@pytest.mark.parametrize("name", ["cls_token_only", "cls_token"])
def test_tokens_that_it_was_trained_on_are_noted_or_left_alone(tmp_path: Path, name: str) -> None:
    wanted = run(weights(), relu)
    stored = check(save(tmp_path, weights(), beside=said() | {name: True}), wanted)
    assert stored.notes == ("it was trained on class tokens only",)
    stored = check(save(tmp_path, weights(), beside=said(use_patches_only=True)), wanted)
    assert stored.notes == ()


def test_what_training_says_changes_nothing(tmp_path: Path) -> None:
    check(
        save(tmp_path, weights(), beside=said() | dict.fromkeys(TRAINING, 1)), run(weights(), relu)
    )


def test_a_checkpoint_of_another_name_with_its_configuration(tmp_path: Path) -> None:
    save(tmp_path, weights(), beside=said(), name="n_images_2600058.pt")
    assert check(tmp_path, run(weights(), relu)).library == "ViT-Prisma"


def test_two_configurations_have_to_say_one_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    within = pickled(monkeypatch, said())
    for changes, message in (
        ({"normalize_activations": "layer_norm"}, r"disagree on architecture \(.*'none'.*'layer_"),
        ({"architecture": "gated"}, r"disagree on gated \(False and True\)"),
        ({"expansion_factor": 4}, r"disagree on sizes \(\(6, 12\) and \(6, 24\)\)"),
    ):
        with pytest.raises(ValueError, match=message):
            read_sae(save(tmp_path, weights(), beside=said(**changes), within=within))
    other = said(layer_subtype="hook_mlp_out")
    stored = check(save(tmp_path, weights(), beside=other, within=within), run(weights(), relu))
    assert stored.recorded.hook == "blocks.9.hook_resid_post"
    assert stored.notes == ("config.json says another hook point: blocks.9.hook_mlp_out",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_transcoder": True}, "predicts another activation"),
        ({"hook_point_head_index": 2}, "a single head"),
        ({"architecture": "jumprelu"}, "relu in architecture jumprelu"),
        ({"activation_fn_str": "tanh-relu"}, "is tanh-relu in architecture standard"),
        ({"activation_fn_str": "topk"}, "topk has no `k`"),
        (
            {"architecture": "gated", "activation_fn_str": "topk"},
            "is topk in architecture gated",
        ),
        ({"activation_fn_str": MISSING}, "does not say activation_fn_str"),
        ({"normalize_activations": MISSING}, "and normalize_activations, wanted both"),
        ({"normalize_activations": "expected_average_only_in"}, "does not know it"),
        ({"activation_fn_kwargs": {"slope": 1}}, "found slope"),
        ({"rescale": 1}, "found rescale, which could change the codes"),
        ({"architecture": None}, "says no `architecture`"),
        ({"d_in": MISSING}, "says no `d_in`"),
        ({"d_in": 7}, "found 7 dimensions in the configuration and 6"),
        ({"expansion_factor": 4}, "found 24 features in the configuration and 12"),
        ({"hook_point_layer": "9"}, '`hook_point_layer` is "9", wanted int'),
    ],
)
@pytest.mark.parametrize("where", ["beside", "within"])
def test_what_the_formula_cannot_say_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    config = said(**changes)
    given: dict[str, Any] = {where: pickled(monkeypatch, config) if where == "within" else config}
    with pytest.raises(ValueError, match=message):
        read_sae(save(tmp_path, weights(), **given))


def test_files_that_are_something_else_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        read_sae(save(tmp_path, weights()))
    torch.save({"config": {}, "autoencoder": {"state_dict": weights()}}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="as SAELens 2 saved it: load it in ViT-Prisma"):
        read_sae(tmp_path)
    with pytest.raises(ValueError, match="holds a `cfg` that is a dict, wanted ViT-Prisma's"):
        read_sae(save(tmp_path, weights(), within=said()))
    strange = said(d_in=torch.device("cpu"))
    with pytest.raises(ValueError, match="`d_in` of its configuration is a device, wanted a plain"):
        read_sae(save(tmp_path, weights(), within=pickled(monkeypatch, strange)))
    other = pickled(monkeypatch, said(), "vit_prisma.sae.config.AnotherConfig")
    with pytest.raises(ValueError, match="needs code to be run"):
        read_sae(save(tmp_path, weights(), within=other))
    more = weights() | {"W_skip": torch.eye(D)}
    with pytest.raises(ValueError, match="found W_skip as well"):
        read_sae(save(tmp_path, more, beside=said()))
    bare = tmp_path / "weights.pkl.gz"
    bare.write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match="is a bare pickle, which would have to be run"):
        read_sae(bare)
    with pytest.raises(ValueError, match="found activation topk typed, and the file says relu"):
        read_sae(save(tmp_path, weights(), beside=said()), Settings(activation="topk"))


def test_other_dtypes_are_computed_in_float32(tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in weights().items()}
    check(save(tmp_path, tensors, beside=said(_dtype="float16")), run(tensors, relu))

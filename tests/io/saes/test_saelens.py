"""SAELens' files: every architecture, normalization and key, of version 6 and of those before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from assay.io.saes import Settings, StoredSae, read_sae
from assay.io.saes.saelens_keys import LEGACY, TRAINING
from slow_autoencoder import D, N, above, check, randn, relu, run, tokens, top, weights

VERSION = {"sae_lens_version": "6.54.12", "sae_lens_training_version": "6.54.12"}
NOW: dict[str, Any] = {
    "architecture": "standard",
    "d_in": D,
    "d_sae": N,
    "dtype": "float32",
    "device": "cuda",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": VERSION | {"model_name": "vit", "prepend_bos": True},
}
BEFORE: dict[str, Any] = {
    "architecture": "standard",
    "d_in": D,
    "d_sae": N,
    "dtype": "torch.float32",
    "device": "cpu",
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "normalize_activations": "none",
    "hook_name": "blocks.3.hook_resid_post",
    "hook_layer": 3,
    "hook_head_index": None,
}
MISSING = object()
NORMS = ["none", "layer_norm", "constant_norm_rescale"]


def save(
    folder: Path, base: dict[str, Any], tensors: dict[str, Tensor] | None = None, **changes: Any
) -> Path:
    said = {key: value for key, value in (base | changes).items() if value is not MISSING}
    (folder / "cfg.json").write_text(json.dumps(said))
    given = weights() if tensors is None else tensors
    save_file(given, folder / "sae_weights.safetensors")
    return folder


def gated() -> dict[str, Tensor]:
    tensors = weights()
    del tensors["b_enc"]
    return tensors | {
        "b_gate": 0.5 * randn(N, seed=6),
        "b_mag": 0.5 * randn(N, seed=7),
        "r_mag": 0.5 * randn(N, seed=8),
    }


THRESHOLDS = randn(N, seed=9)
THREE = top(3, last=relu)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("centers", [True, False])
@pytest.mark.parametrize("named", ["standard", "topk", "abstopk", "jumprelu", "gated"])
def test_every_architecture_as_the_library_computes_it(
    tmp_path: Path, named: str, centers: bool, norm: str
) -> None:
    tensors = gated() if named == "gated" else weights()
    acts = {"topk": THREE, "abstopk": top(3, by=Tensor.abs), "jumprelu": above(THRESHOLDS)}
    wanted = run(tensors, acts.get(named, relu), centers=centers, norm=norm)
    more = {"threshold": THRESHOLDS} if named == "jumprelu" else {}
    k = {"k": 3} if "topk" in named else {}
    said = {
        "architecture": named,
        "apply_b_dec_to_input": centers,
        "normalize_activations": norm,
    }
    stored = check(save(tmp_path, NOW, tensors | more, **k, **said), wanted)
    assert stored.library == "SAELens"
    assert (stored.d_model, stored.n_features) == (D, N)
    assert [path.name for path in stored.files] == ["sae_weights.safetensors", "cfg.json"]


@pytest.mark.parametrize("named", ["topk", "abstopk"])
def test_top_k_rescaled_by_the_decoders_rows(tmp_path: Path, named: str) -> None:
    act = THREE if named == "topk" else top(3, by=Tensor.abs)
    wanted = run(weights(), act, rescales=True)
    plain = run(weights(), act)
    assert not torch.equal(wanted[0] != 0, plain[0] != 0)
    folder = save(tmp_path, NOW, architecture=named, k=3, rescale_acts_by_decoder_norm=True)
    check(folder, wanted)
    check(save(tmp_path, NOW, architecture=named, k=3, rescale_acts_by_decoder_norm=False), plain)


@pytest.mark.parametrize("centers", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 1.5])
@pytest.mark.parametrize("stops", [True, False])
@pytest.mark.parametrize("most", [None, 2])
def test_matching_pursuit(
    tmp_path: Path, centers: bool, threshold: float, stops: bool, most: int | None
) -> None:
    tensors = {name: weights()[name] for name in ("W_dec", "b_dec")}
    tensors["W_dec"] = tensors["W_dec"] / tensors["W_dec"].norm(dim=1, keepdim=True)
    W_dec, b_dec = (tensor.double() for tensor in tensors.values())  # noqa: N806
    codes = torch.zeros(len(tokens()), N, dtype=torch.float64)
    for token, code in zip(tokens().double(), codes, strict=True):
        left = token - b_dec if centers else token.clone()
        for _ in range(most or D):
            support = code != 0
            best = int((W_dec @ left).clamp(min=0).argmax())
            value = (left @ W_dec[best]).clamp(min=0)
            code[best] += value
            left = left - value * W_dec[best]
            unchanged = stops and torch.equal(code != 0, support)
            if unchanged or (threshold > 0 and left.norm() < threshold):
                break
    wanted = codes, codes @ W_dec + (b_dec if centers else 0)
    said: dict[str, Any] = {"apply_b_dec_to_input": centers, "residual_threshold": threshold}
    said |= {"stop_on_duplicate_support": stops, "max_iterations": most}
    check(save(tmp_path, NOW, tensors, architecture="matching_pursuit", **said), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in weights().items()}
    check(save(tmp_path, NOW, tensors, dtype=str(dtype)), run(tensors, relu))


@pytest.mark.parametrize("version", ["6.0.0-rc.0", "6.54.12", "10.0.0"])
def test_version_6_by_its_number(tmp_path: Path, version: str) -> None:
    folder = save(tmp_path, NOW, metadata={"sae_lens_version": version}, activation_fn="relu")
    with pytest.raises(ValueError, match="found activation_fn, which could change the codes"):
        read_sae(folder)
    check(save(tmp_path, NOW, metadata={"sae_lens_version": version}), run(weights(), relu))


def test_metadata_are_of_version_6_whatever_they_say(tmp_path: Path) -> None:
    said: dict[str, Any] = {"metadata": {"hook_name": "layers.3"}, "architecture": "topk", "k": 3}
    stored = check(save(tmp_path, NOW, **said), run(weights(), THREE))
    assert stored.recorded.hook == "layers.3"


@pytest.mark.parametrize("version", ["3.23.4", "5.11.0", MISSING])
def test_versions_before_6(tmp_path: Path, version: Any) -> None:
    stored = check(save(tmp_path, BEFORE, sae_lens_version=version), run(weights(), relu))
    assert (stored.recorded.layer, stored.recorded.hook) == (3, "blocks.3.hook_resid_post")


def test_a_bare_configuration_of_version_1(tmp_path: Path) -> None:
    said = {
        "hook_point": "blocks.2.hook_resid_pre",
        "hook_point_layer": 2,
        "hook_point_head_index": None,
        "activation_fn": "relu",
        "d_in": D,
        "d_sae": N,
        "normalize_activations": False,
    }
    ones = {"scaling_factor": torch.ones(N) + 1e-6}
    stored = check(save(tmp_path, said, weights() | ones), run(weights(), relu))
    assert (stored.recorded.layer, stored.recorded.hook) == (2, "blocks.2.hook_resid_pre")


def test_old_top_k_is_an_activation(tmp_path: Path) -> None:
    wanted = run(weights(), THREE)
    kwargs = {"activation_fn_kwargs": {"k": 3}}
    for changes in (
        {"activation_fn_str": "topk"},
        {"activation_fn_str": MISSING, "activation_fn": "topk"},
        {"activation_fn_str": "topk", "architecture": "topk"},
        {"activation_fn_str": MISSING, "architecture": "topk"},
        {"activation_fn_str": "topk", "architecture": MISSING},
    ):
        check(save(tmp_path, BEFORE, **kwargs | changes), wanted)


@pytest.mark.parametrize("norm", [None, False, MISSING, "none"])
def test_old_ways_to_say_no_normalization(tmp_path: Path, norm: Any) -> None:
    check(save(tmp_path, BEFORE, normalize_activations=norm), run(weights(), relu))


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
@pytest.mark.parametrize("norm", NORMS)
def test_factors_of_fine_tuning_multiply_the_codes_before_they_are_decoded(
    tmp_path: Path, name: str, norm: str
) -> None:
    factors = randn(N, seed=10).abs() + 0.5
    wanted = run(weights(), relu, norm=norm, factors=factors)
    tensors = weights() | {name: factors}
    said = {"normalize_activations": norm, "finetuning_scaling_factor": True}
    check(save(tmp_path, BEFORE, tensors, **said), wanted)
    said["finetuning_scaling_factor"] = MISSING
    check(save(tmp_path, BEFORE, tensors, finetuning_method="scale", **said), wanted)
    for base, changes in ((BEFORE, {"finetuning_scaling_factor": False}), (NOW, {})):
        with pytest.raises(ValueError, match=f"found {name}, not all 1.*factor` true in the conf"):
            read_sae(save(tmp_path, base, tensors, **changes))
    said["finetuning_scaling_factor"] = True
    for wrong in (factors[:-1], factors[:, None]):
        with pytest.raises(ValueError, match="wanted one number for each feature"):
            read_sae(save(tmp_path, BEFORE, weights() | {name: wrong}, **said))
    flat = weights() | {"W_dec": 2 * factors, "W_enc": torch.eye(N), name: factors}
    with pytest.raises(ValueError, match="wanted one number for each feature"):
        read_sae(save(tmp_path, BEFORE, flat, **said))
    both = {"scaling_factor": factors, "finetuning_scaling_factor": 2 * factors}
    with pytest.raises(ValueError, match="found scaling_factor and finetuning_scaling_factor"):
        read_sae(save(tmp_path, BEFORE, weights() | both, **said))


def test_a_factor_that_is_said_and_not_saved_is_none(tmp_path: Path) -> None:
    check(save(tmp_path, BEFORE, finetuning_scaling_factor=True), run(weights(), relu))


@pytest.mark.parametrize("base", [NOW, BEFORE])
def test_log_thresholds(tmp_path: Path, base: dict[str, Any]) -> None:
    logarithms = randn(N, seed=11)
    tensors = weights() | {"log_threshold": logarithms}
    wanted = run(weights(), above(logarithms.double().exp()))
    check(save(tmp_path, base, tensors, architecture="jumprelu"), wanted)
    with pytest.raises(ValueError, match="found log_threshold as well"):
        read_sae(save(tmp_path, base, tensors))
    tensors["threshold"] = THRESHOLDS
    with pytest.raises(ValueError, match="found log_threshold as well"):
        read_sae(save(tmp_path, base, tensors, architecture="jumprelu"))


def test_what_training_says_changes_nothing(tmp_path: Path) -> None:
    wanted = run(weights(), relu)
    training: dict[str, Any] = dict.fromkeys(TRAINING, 0.5)
    check(save(tmp_path, NOW, **training), wanted)
    runs: dict[str, Any] = {key: "x" for key in LEGACY if key != "sae_lens_version"}
    check(save(tmp_path, BEFORE, **runs, sae_lens_version="5.1.0"), wanted)
    with pytest.raises(ValueError, match="found adam_beta1, which could change the codes"):
        read_sae(save(tmp_path, NOW, adam_beta1=0.9))


def refused(folder: Path) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_sae(folder)
    assert "cfg.json" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "batchtopk", "k": 3.0}, "save_inference_model"),
        ({"architecture": "matryoshka_batchtopk"}, "save_inference_model"),
        ({"architecture": "transcoder"}, "predicts another activation"),
        ({"architecture": "skip_transcoder"}, "predicts another activation"),
        ({"architecture": "jumprelu_transcoder"}, "predicts another activation"),
        ({"architecture": "jumprelu_skip_transcoder"}, "predicts another activation"),
        ({"architecture": "temporal"}, "depend on the tokens before"),
        ({"architecture": "crosscoder"}, "wanted one of standard, topk"),
        ({"architecture": MISSING}, "`architecture` is None"),
        ({"architecture": "topk"}, "says no k for topk: type it"),
        ({"architecture": "topk", "k": True}, "`k` is true, wanted int"),
        ({"architecture": "topk", "k": 2.5}, "`k` is 2.5, wanted int"),
        ({"k": 3}, "found k, which could"),
        ({"d_in": MISSING}, "says no `d_in`"),
        ({"rescale_acts_by_decoder_norm": True}, "only topk and abstopk are rescaled"),
        ({"residual_threshold": 0.1}, "found residual_threshold"),
        (
            {"architecture": "matching_pursuit", "residual_threshold": 10**400},
            "`residual_threshold` is 1000",
        ),
        ({"reshape_activations": "hook_z"}, r"(heads, d_head)"),
        ({"apply_b_dec_to_input": "no"}, '`apply_b_dec_to_input` is "no", wanted bool'),
        ({"apply_b_dec_to_input": None}, "says no `apply_b_dec_to_input`"),
        (
            {"architecture": "matching_pursuit", "stop_on_duplicate_support": None},
            "says no `stop_on_duplicate_support`",
        ),
        ({"normalize_activations": "expected_average_only_in"}, "fold_activation_norm_scaling"),
        ({"normalize_activations": "covariance_whitening"}, "fold_activation_whitening"),
        ({"normalize_activations": "rms"}, "this version does not know it"),
        ({"normalize_activations": False}, "wanted str"),
        ({"activation_scale": 2}, "found activation_scale, which could change the codes"),
        ({"metadata": VERSION | {"hook_head_index": 0}}, "a single head"),
        ({"metadata": VERSION | {"hook_name": "a", "hook_name_out": "b"}}, "predicts another"),
        ({"metadata": VERSION | {"hf_hook_name_out": "b"}}, "predicts another"),
        ({"metadata": VERSION | {"hook_layer": 2, "hook_layer_out": 3}}, "predicts another"),
        ({"metadata": {"sae_lens_version": "six"}}, "`sae_lens_version` is six"),
        ({"metadata": ["x"]}, "wanted dict"),
    ],
)
def test_what_the_formula_cannot_say_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert message in refused(save(tmp_path, NOW, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, "is tanh-relu in architecture standard"),
        ({"activation_fn_str": "topk"}, "says no k for topk"),
        ({"activation_fn_str": "topk", "architecture": "gated"}, "is topk in architecture gated"),
        ({"activation_fn_str": "topk", "architecture": "jumprelu"}, "topk in architecture jump"),
        ({"architecture": "topk"}, "is relu in architecture topk"),
        ({"activation_fn": "topk"}, "found activation_fn_str relu and activation_fn topk"),
        ({"activation_fn_kwargs": {"postact_fn": "x"}}, "found postact_fn"),
        ({"normalize_activations": True}, "fold_activation_norm_scaling_factor"),
        ({"normalize_activations": "expected_average_only_in"}, "say none in a copy"),
        ({"hook_name": "blocks.3.attn.hook_z"}, "was trained at blocks.3.attn.hook_z"),
        ({"hook_head_index": 3}, "a single head"),
        ({"hook_point": "blocks.4.hook_resid_post"}, "found hook_name blocks.3"),
        ({"k": 3}, "found k, which could"),
        ({"metadata_": {}}, "found metadata_"),
    ],
)
def test_what_an_old_configuration_cannot_say_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert message in refused(save(tmp_path, BEFORE, **changes))


@pytest.mark.parametrize(
    ("metadata", "layer", "hook"),
    [
        ({}, None, None),
        ({"hook_name": "blocks.3.hook_resid_post"}, None, "blocks.3.hook_resid_post"),
        ({"hook_name": "blocks.3.hook_mlp_out", "hook_layer": 3}, 3, "blocks.3.hook_mlp_out"),
        ({"hf_hook_name": "layers.3"}, None, "layers.3"),
        ({"hook_name": "a", "hook_name_out": "a", "hook_layer_out": None}, None, "a"),
        ({"hook_name": "a", "anything": [1], "seqpos_slice": [None]}, None, "a"),
    ],
)
def test_where_it_was_trained(
    tmp_path: Path, metadata: dict[str, Any], layer: int | None, hook: str | None
) -> None:
    recorded = read_sae(save(tmp_path, NOW, metadata=VERSION | metadata)).recorded
    assert (recorded.layer, recorded.hook, recorded.predicts) == (layer, hook, None)


def test_sizes_tensors_and_typed_settings_have_to_agree(tmp_path: Path) -> None:
    def read(settings: Settings | None = None, **changes: Any) -> StoredSae:
        return read_sae(save(tmp_path, NOW, **changes), settings)

    with pytest.raises(ValueError, match=f"found 7 dimensions in the configuration and {D}"):
        read(d_in=7)
    with pytest.raises(ValueError, match=f"found 11 features in the configuration and {N}"):
        read(d_sae=11)
    with pytest.raises(ValueError, match="found W_skip as well"):
        read(tensors=weights() | {"W_skip": torch.eye(D)})
    with pytest.raises(ValueError, match="wanted threshold as well"):
        read(architecture="jumprelu")
    with pytest.raises(ValueError, match="found threshold as well"):
        read(tensors=weights() | {"threshold": THRESHOLDS})
    with pytest.raises(ValueError, match="b_gate, b_mag, r_mag as well"):
        read(architecture="gated")
    with pytest.raises(ValueError, match="found k 4 typed, and the file says 3"):
        read(Settings(k=4), architecture="topk", k=3)
    assert read(Settings(k=4), architecture="topk").architecture.k == 4
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"cfg\.json: no such file"):
        read_sae(tmp_path)

"""sparsify's files: top-K and groups, b_dec taken off or not, and older configurations."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from assay.io.saes import Settings, read_sae
from slow_autoencoder import D, N, check, relu, run, top, weights

CONFIG: dict[str, Any] = {
    "activation": "topk",
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": N,
    "k": 3,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": D,
}
MISSING = object()
THREE = top(3, last=relu)


def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under sparsify's names."""
    return {
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "encoder.bias": tensors["b_enc"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }


def save(folder: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    said = {key: value for key, value in (CONFIG | changes).items() if value is not MISSING}
    (folder / "cfg.json").write_text(json.dumps(said))
    save_file(named(weights()) if tensors is None else tensors, folder / "sae.safetensors")
    return folder


def test_top_k_is_never_negative(tmp_path: Path) -> None:
    tensors = weights() | {"b_enc": weights()["b_enc"] - 5}
    wanted = run(tensors, THREE)
    assert ((wanted[0] != 0).sum(1) < 3).any()
    check(save(tmp_path, named(tensors)), wanted)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_largest_of_each_group(tmp_path: Path, groups: int) -> None:
    def act(pre: Tensor) -> Tensor:
        parts = [top(1, last=relu)(part) for part in pre.split(N // groups)]
        return torch.cat(parts)

    check(save(tmp_path, activation="groupmax", k=groups), run(weights(), act))


def test_a_transcoder_without_a_skip_takes_nothing_off_and_is_recorded(tmp_path: Path) -> None:
    stored = check(save(tmp_path, transcode=True), run(weights(), THREE, centers=False))
    assert stored.recorded.predicts == "what a module makes of its input (transcode)"


@pytest.mark.parametrize(
    ("folder", "layer", "hook"),
    [
        ("layers.3", 3, "layers.3"),
        ("layers_3", 3, "layers.3"),
        ("layers.3.mlp", 3, "layers.3.mlp"),
        ("encoder.layers.11.attn.proj", 11, "encoder.layers.11.attn.proj"),
        ("h.0", 0, "h.0"),
        ("mine", None, None),
        ("layers.x", None, None),
    ],
)
def test_where_it_was_trained_is_the_folders_name(
    tmp_path: Path, folder: str, layer: int | None, hook: str | None
) -> None:
    save(tmp_path / folder)
    stored = check(tmp_path / folder, run(weights(), THREE))
    assert (stored.recorded.layer, stored.recorded.hook) == (layer, hook)
    assert stored.recorded.predicts is None


def test_older_configurations_say_less(tmp_path: Path) -> None:
    less: dict[str, Any] = dict.fromkeys(
        ("activation", "skip_connection", "transcode", "multi_topk"), MISSING
    )
    check(save(tmp_path, **less), run(weights(), THREE))
    check(save(tmp_path, **less, signed=False), run(weights(), THREE))


@pytest.mark.parametrize("said", [0, MISSING])
def test_as_many_features_as_the_factor_of_expansion_says(tmp_path: Path, said: Any) -> None:
    stored = read_sae(save(tmp_path, num_latents=said, expansion_factor=2))
    assert stored.n_features == N
    with pytest.raises(ValueError, match="found 24 features in the configuration and 12"):
        read_sae(save(tmp_path, num_latents=said, expansion_factor=4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in weights().items()}
    check(save(tmp_path, named(tensors)), run(tensors, THREE))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip_connection": True}, "W_skip is a transcoder's"),
        ({"signed": True}, "signed top-K of older versions"),
        ({"activation": "relu"}, "`activation` is relu, wanted topk or groupmax"),
        ({"rescale": 1}, "found rescale, which could change"),
        ({"activation": None}, "says no `activation`"),
        ({"d_in": MISSING}, "says no `d_in`"),
        ({"d_in": 7}, "found 7 dimensions in the configuration and 6"),
        ({"num_latents": 11}, "found 11 features in the configuration and 12"),
        ({"k": 0}, "found k = 0 for topk"),
        ({"k": MISSING}, r"says no k: type it \(k\)"),
        ({"k": 3.0}, "`k` is 3.0, wanted int"),
        ({"transcode": 1}, "`transcode` is 1, wanted bool"),
    ],
)
def test_what_the_formula_cannot_say_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_sae(save(tmp_path, **changes))


def test_tensors_and_typed_settings_have_to_agree(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found W_skip as well"):
        read_sae(save(tmp_path, named(weights()) | {"W_skip": torch.eye(D)}))
    tensors = named(weights())
    del tensors["W_dec"]
    with pytest.raises(ValueError, match="wanted W_dec as well"):
        read_sae(save(tmp_path, tensors))
    with pytest.raises(ValueError, match="found k 4 typed, and the file says 3"):
        read_sae(save(tmp_path), Settings(k=4))
    assert read_sae(save(tmp_path, k=MISSING), Settings(k=4)).architecture.k == 4
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"cfg\.json: no such file"):
        read_sae(tmp_path)

"""dictionary_learning's files: each class by its tensors, every key, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.io.saes import Settings, read_sae
from assay.io.saes.dictionary_learning import BUFFER, TRAINING
from slow_autoencoder import D, N, above, check, randn, relu, run, top, weights

TRAINER: dict[str, Any] = {
    "trainer_class": "StandardTrainer",
    "dict_class": "AutoEncoder",
    "activation_dim": D,
    "dict_size": N,
    "lr": 1e-3,
    "device": "cuda:0",
    "layer": 3,
    "lm_name": "vit",
    "wandb_name": "x",
    "submodule_name": None,
}
MISSING = object()


def save(
    folder: Path, tensors: dict[str, Tensor], buffer: object = MISSING, **changes: Any
) -> Path:
    """What trainSAE leaves: a folder for the trainer, with a file for what was said of it."""
    (folder / "trainer_0").mkdir(exist_ok=True)
    torch.save(tensors, folder / "trainer_0" / "ae.pt")
    trainer = {key: value for key, value in (TRAINER | changes).items() if value is not MISSING}
    said = {"trainer": trainer} | ({} if buffer is MISSING else {"buffer": buffer})
    (folder / "trainer_0" / "config.json").write_text(json.dumps(said))
    return folder


def unit() -> dict[str, Tensor]:
    found = weights()
    found["W_dec"] = found["W_dec"] / found["W_dec"].norm(dim=1, keepdim=True)
    return found


def linear(found: dict[str, Tensor], **more: Tensor) -> dict[str, Tensor]:
    return {
        "encoder.weight": found["W_enc"].T.contiguous(),
        "encoder.bias": found["b_enc"],
        "decoder.weight": found["W_dec"].T.contiguous(),
    } | more


def top_k(threshold: float | None = 0.8, k: int = 4) -> dict[str, Tensor]:
    found = linear(unit(), b_dec=unit()["b_dec"], k=torch.tensor(k, dtype=torch.int32))
    return found if threshold is None else found | {"threshold": torch.tensor(threshold)}


def matryoshka(threshold: float = 0.8) -> dict[str, Tensor]:
    counts = {"k": torch.tensor(4, dtype=torch.int32), "group_sizes": torch.tensor([4, 8])}
    return unit() | counts | {"threshold": torch.tensor(threshold)}


def test_a_plain_one(tmp_path: Path) -> None:
    found = unit()
    stored = check(save(tmp_path, linear(found, bias=found["b_dec"])), run(found, relu))
    assert stored.library == "dictionary_learning"
    assert (stored.recorded.layer, stored.recorded.hook) == (3, None)
    assert stored.recorded.predicts is None
    assert [file.name for file in stored.files] == ["ae.pt", "config.json"]


def test_a_plain_one_is_not_scaled_to_unit_rows_as_load_dictionary_does(tmp_path: Path) -> None:
    found = weights()
    stored = check(save(tmp_path, linear(found, bias=found["b_dec"])), run(found, relu))
    assert "scale" not in stored.tensors


@pytest.mark.parametrize("cls", ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder"])
def test_the_tensors_say_the_class_and_not_the_configuration(tmp_path: Path, cls: str) -> None:
    found = weights()
    folder = save(tmp_path, linear(found, **{"decoder.bias": found["b_dec"]}), dict_class=cls)
    check(folder, run(found, relu, centers=False))


@pytest.mark.parametrize("threshold", [None, -1.0, 0.8])
def test_top_k_has_no_use_for_its_threshold(tmp_path: Path, threshold: float | None) -> None:
    said = {"dict_class": "AutoEncoderTopK", "trainer_class": "TopKTrainer", "k": 4}
    folder = save(tmp_path, top_k(threshold), **said)
    stored = check(folder, run(unit(), top(4, last=relu)))
    assert stored.architecture.k == 4
    assert stored.notes == ()


@pytest.mark.parametrize("cls", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
@pytest.mark.parametrize("threshold", [0.0, 0.8])
def test_batch_top_k_by_the_threshold_that_training_left(
    tmp_path: Path, cls: str, threshold: float
) -> None:
    tensors = matryoshka(threshold) if "Matryoshka" in cls else top_k(threshold)
    trainer = cls.replace("SAE", "Trainer")
    folder = save(tmp_path, tensors, dict_class=cls, trainer_class=trainer, k=4)
    stored = check(folder, run(unit(), above(torch.tensor(threshold))))
    assert stored.architecture.k is None
    assert stored.notes == ()
    check(folder, run(unit(), above(torch.tensor(threshold))), activation="batchtopk", k=4)


@pytest.mark.parametrize("tensors", [matryoshka(-1.0), top_k(-1.0)])
def test_a_threshold_that_is_not_set_keeps_every_positive_code(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    folder = save(tmp_path, tensors, dict_class="BatchTopKSAE", trainer_class=MISSING)
    stored = check(folder, run(unit(), relu))
    assert stored.notes == ("training has not set the threshold yet: every positive code is kept",)


def test_jumprelu_takes_nothing_off(tmp_path: Path) -> None:
    limits = 0.5 * randn(N, seed=9)
    stored = check(
        save(tmp_path, weights() | {"threshold": limits}, dict_class="JumpReluAutoEncoder"),
        run(weights(), above(limits), centers=False),
    )
    assert stored.notes == ()


def test_gated(tmp_path: Path) -> None:
    gate = {"b_gate": 0.5 * randn(N, seed=6), "b_mag": 0.5 * randn(N, seed=7)}
    found = weights() | gate | {"r_mag": 0.5 * randn(N, seed=8)}
    tensors = {name: found[name] for name in ("r_mag",)} | {
        "decoder_bias": found["b_dec"],
        "gate_bias": found["b_gate"],
        "mag_bias": found["b_mag"],
    }
    both = linear(found)
    del both["encoder.bias"]
    check(save(tmp_path, tensors | both, dict_class="GatedAutoEncoder"), run(found, relu))


def test_without_a_configuration_the_tensors_and_what_is_typed_have_to_do(tmp_path: Path) -> None:
    found = unit()
    for tensors in (linear(found, bias=found["b_dec"]), top_k()):
        save(tmp_path, tensors)
        (tmp_path / "trainer_0" / "config.json").unlink()
        if "bias" in tensors:
            stored = check(tmp_path, run(found, relu))
    assert [file.name for file in stored.files] == ["ae.pt"]
    with pytest.raises(ValueError, match=r"says neither: type activation: topk, or batchtopk"):
        read_sae(tmp_path)
    check(tmp_path, run(found, top(4, last=relu)), activation="topk")
    check(tmp_path, run(found, above(torch.tensor(0.8))), activation="batchtopk")
    with pytest.raises(ValueError, match=r"says neither: type activation"):
        read_sae(tmp_path, Settings(activation="relu"))


def test_a_checkpoint_of_an_unfinished_training(tmp_path: Path) -> None:
    save(tmp_path, top_k(), dict_class="AutoEncoderTopK", k=4)
    checkpoint = tmp_path / "trainer_0" / "checkpoints" / "ae_100.pt"
    checkpoint.parent.mkdir()
    (tmp_path / "trainer_0" / "ae.pt").rename(checkpoint)
    stored = check(checkpoint, run(unit(), top(4, last=relu)))
    assert stored.recorded.layer == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    found = {name: tensor.to(dtype) for name, tensor in weights().items()}
    tensors = linear(found, **{"decoder.bias": found["b_dec"]})
    check(save(tmp_path, tensors), run(found, relu, centers=False))


@pytest.mark.parametrize("key", TRAINING)
@pytest.mark.parametrize("value", [None, 7.5, "text", [1, 2]])
def test_what_says_how_it_was_trained_changes_nothing(
    tmp_path: Path, key: str, value: object
) -> None:
    found = unit()
    folder = save(tmp_path, linear(found, bias=found["b_dec"]), **{key: value})
    assert (
        read_sae(folder).formula == "code = relu((x - c) W_enc + b_enc);  x^ = code W_dec + b_out"
    )


@pytest.mark.parametrize(
    ("buffer", "hook", "predicts"),
    [
        ({"io": "out", "d_submodule": D} | dict.fromkeys(BUFFER, 1), "mlp", None),
        ({"io": "in"}, "the input of mlp", None),
        ({"io": "in_and_out"}, "mlp", "what a module makes of its input (in_and_out)"),
        ({"layer": 3, "n_ctxs": 5}, "attention heads", None),
    ],
)
def test_where_it_was_trained(
    tmp_path: Path, buffer: dict[str, Any], hook: str, predicts: str | None
) -> None:
    recorded = read_sae(
        save(tmp_path, matryoshka(), buffer, submodule_name="mlp", group_sizes=[4, 8])
    ).recorded
    assert (recorded.layer, recorded.hook, recorded.predicts) == (3, hook, predicts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dict_class": "IdentityDict"}, "`dict_class` is IdentityDict, wanted one of"),
        ({"dict_class": 3}, "`dict_class` is 3, wanted str"),
        ({"trainer_class": "BatchTopKTrainer"}, "says jumprelu and topk: type activation"),
        ({"k": 5}, "`k` is another than the weights' 4"),
        ({"k": "4"}, '`k` is "4", wanted int'),
        ({"activation_dim": D + 1}, f"found {D + 1} dimensions in the configuration and {D}"),
        ({"dict_size": N + 1}, f"found {N + 1} features in the configuration and {N}"),
        ({"layer": "3"}, '`layer` is "3", wanted int'),
        ({"group_sizes": [4, 8]}, "`group_sizes` is there, and the weights have none"),
        ({"rescales": True}, "found rescales, which could change the codes"),
        ({"buffer": {"io": "both"}}, "`io` is both, wanted in, out or in_and_out"),
        ({"buffer": {"whitens": 1}}, "found whitens, which could change the codes"),
        ({"buffer": 1}, "`buffer` is 1, wanted dict"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = save(tmp_path, top_k(), **{"dict_class": "AutoEncoderTopK"} | changes)
    with pytest.raises(ValueError, match=message):
        read_sae(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (top_k() | {"log_scale": torch.ones(N)}, "found log_scale as well"),
        (top_k() | {"bias": torch.ones(D)}, "found b_dec, k, threshold as well"),
        (top_k() | {"k": torch.tensor(4.0)}, "wanted one integer"),
        (top_k() | {"k": torch.tensor([4, 4])}, "wanted one integer"),
        (top_k() | {"encoder.weight": torch.ones(N)}, r"encoder.weight is of shape \(12,\)"),
        (top_k() | {"encoder.weight": torch.ones(N, D + 1)}, "found an encoder 7 x 12"),
        (top_k() | {"decoder.weight": torch.ones(0, N)}, "decoder.weight is of shape"),
        ({"weight": torch.ones(3)}, "holds weight, wanted the tensors of"),
        (matryoshka() | {"group_sizes": torch.tensor([4, 7])}, "add up to 11, wanted 12"),
        (unit() | {"b_enc2": torch.ones(2)}, "wanted threshold as well|found b_enc2"),
    ],
)
def test_tensors_of_another_formula_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    folder = save(tmp_path, tensors, dict_class="AutoEncoderTopK")
    with pytest.raises(ValueError, match=message):
        read_sae(folder)


def test_batch_top_k_without_a_threshold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the weights hold no threshold"):
        read_sae(save(tmp_path, top_k(None), dict_class="BatchTopKSAE"))


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ({"activation": "batchtopk"}, "found activation batchtopk typed, and the file says topk"),
        ({"k": 3}, "found k 3 typed, and the file says 4"),
        ({"threshold": 0.8}, "found threshold 0.8 typed, and there is none"),
    ],
)
def test_what_is_typed_may_not_contradict_the_file(
    tmp_path: Path, typed: dict[str, Any], message: str
) -> None:
    folder = save(tmp_path, top_k(), dict_class="AutoEncoderTopK", k=4)
    with pytest.raises(ValueError, match=message):
        read_sae(folder, Settings(**typed))


def test_one_trainer_of_several_has_to_be_named(tmp_path: Path) -> None:
    save(tmp_path, top_k(), dict_class="AutoEncoderTopK")
    (tmp_path / "run").mkdir()
    save(tmp_path / "run", top_k(), dict_class="AutoEncoderTopK")
    with pytest.raises(ValueError, match=r"holds 2 autoencoders \(run/trainer_0/ae.pt, trainer_0"):
        read_sae(tmp_path)

"""saev's files: every schema and activation, and headers that are something else."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.io.saes import Settings, read_sae
from slow_autoencoder import D, N, above, check, relu, run, top, weights

NEW = {
    "d_model": D,
    "d_sae": N,
    "reinit_blend": 0.8,
    "reinit_enc_dec_tranpose": True,
    "remove_parallel_grads": True,
    "normalize_w_dec": True,
}
OLD = {"d_vit": D, "exp_factor": 2, "n_reinit_samples": 4, "seed": 0}
SCHEMAS = [1, 2, 3, 4, 5]


def save(path: Path, header: Any, tensors: dict[str, Tensor]) -> Path:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(header).encode() + b"\n" + buffer.getvalue())
    return path


def header(schema: int, activation: dict[str, Any], cfg: dict[str, Any] = NEW) -> dict[str, Any]:
    said = {"schema": schema, "cfg": cfg | {"activation": activation}}
    return said | {"commit": "0", "lib": "0.1.0"}


def params(schema: int, **given: Any) -> dict[str, Any]:
    if schema < 5:
        return given
    sparsity = {"cls": "L1Sparsity", "params": {"key": "l1-sparsity", "coeff": 4e-4}}
    return given | {"key": "x", "sparsity": sparsity, "aux": {"cls": "NoAux", "params": {}}}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_relu_takes_nothing_off_since_schema_2(tmp_path: Path, schema: int) -> None:
    said = header(schema, {"cls": "Relu", "params": params(schema)})
    stored = check(
        save(tmp_path / "sae.pt", said, weights()), run(weights(), relu, centers=schema == 1)
    )
    assert stored.library == "saev"
    assert stored.recorded.layer is None


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("k", [3, 7])
def test_top_k_keeps_signs(tmp_path: Path, schema: int, k: int) -> None:
    tensors = weights() | {"b_enc": weights()["b_enc"] - 3}
    wanted = run(tensors, top(k), centers=schema == 1)
    assert (wanted[0] < 0).any()
    said = header(schema, {"cls": "TopK", "params": params(schema, top_k=k)})
    check(save(tmp_path / "sae.pt", said, tensors), wanted)


def test_top_k_of_more_than_there_are_keeps_all(tmp_path: Path) -> None:
    said = header(5, {"cls": "TopK", "params": params(5, top_k=500)})
    stored = read_sae(save(tmp_path / "sae.pt", said, weights()))
    assert stored.architecture.k == N


def test_a_k_that_no_file_says_is_typed(tmp_path: Path) -> None:
    path = save(tmp_path / "sae.pt", header(4, {"cls": "TopK", "params": {}}), weights())
    check(path, run(weights(), top(3), centers=False), k=3)


@pytest.mark.parametrize("schema", SCHEMAS[1:])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 1.5])
def test_batch_top_k_is_what_exceeds_the_trained_threshold(
    tmp_path: Path, schema: int, threshold: float
) -> None:
    limit = torch.tensor(threshold)
    wanted = run(weights(), above(limit.clamp(min=0)), centers=False)
    said = header(schema, {"cls": "BatchTopK", "params": params(schema, top_k=3, momentum=0.1)})
    path = save(tmp_path / "sae.pt", said, weights() | {"activation.threshold": limit})
    check(path, wanted)
    check(path, wanted, activation="batchtopk", threshold=threshold)
    with pytest.raises(ValueError, match=r"wanted activation\.threshold as well"):
        read_sae(save(tmp_path / "sae.pt", said, weights()))


def test_schema_1_may_name_the_activation_in_the_header(tmp_path: Path) -> None:
    said = {"schema": 1, "cls": "TopK", "cfg": OLD | {"top_k": 3}, "commit": "0", "lib": "0"}
    check(save(tmp_path / "sae.pt", said, weights()), run(weights(), top(3)))
    said |= {"cls": "Relu", "cfg": OLD}
    check(save(tmp_path / "sae.pt", said, weights()), run(weights(), relu))
    said |= {"cls": "SparseAutoencoderConfig"}
    said["cfg"] = OLD | {"activation": {"cls": "TopK", "params": {"top_k": 3}}}
    check(save(tmp_path / "sae.pt", said, weights()), run(weights(), top(3)))


def test_no_schema_is_relu_that_takes_b_dec_off(tmp_path: Path) -> None:
    said = OLD | {"sparsity_coeff": 4e-4, "ghost_grads": False, "l1_coeff": 1, "use_ghost_grads": 0}
    check(save(tmp_path / "sae.pt", said, weights()), run(weights(), relu))


@pytest.mark.parametrize(
    ("saved", "read"),
    [
        ("runs/z55/checkpoint/sae.pt", "runs/z55"),
        ("runs/z55/checkpoint/sae.pt", "runs/z55/checkpoint/sae.pt"),
        ("runs/z55/checkpoint/sae.pt", "runs"),
        ("sae.pt", "."),
        ("mine.pt", "mine.pt"),
        ("mine.pt", "."),
    ],
)
def test_where_the_file_may_lie(tmp_path: Path, saved: str, read: str) -> None:
    said = header(5, {"cls": "Relu", "params": params(5)})
    save(tmp_path / saved, said, weights())
    stored = check(tmp_path / read, run(weights(), relu, centers=False))
    assert stored.files == (tmp_path / saved,)


RELU = {"cls": "Relu", "params": {}}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (header(6, RELU), "saev's schema 6, wanted one of 1, 2, 3, 4, 5 or none"),
        (header(4, RELU) | {"schema": "4"}, '`schema` is "4", wanted int'),
        (header(4, RELU) | {"more": 1}, "found more, which could change"),
        (header(4, RELU, NEW | {"scale": 2}), "found scale, which could change"),
        (header(4, RELU, NEW | {"d_sae": 11}), "found 11 features in the configuration and 12"),
        (header(4, RELU, OLD | {"exp_factor": 4}), "found 24 features in the configuration and 12"),
        (header(4, RELU, NEW | {"d_model": 5}), "found 5 dimensions in the configuration and 6"),
        (header(4, {"cls": "AbsBatchTopK", "params": {}}), "the activation is AbsBatchTopK"),
        (header(4, {"cls": "TopK", "params": {"top_k": 0}}), "found k = 0 for topk"),
        (header(4, {"cls": "TopK", "params": {"top_k": "3"}}), '`top_k` is "3", wanted int'),
        (header(4, {"cls": "TopK", "params": {"alpha": 3}}), "found alpha, which could"),
        (header(4, RELU | {"more": 1}), "found more, which could"),
        (header(4, {"cls": "TopK", "params": {}}), r"says no top_k: type it \(k\)"),
        (header(4, {"cls": "TopK"}), "says no top_k"),
        (header(4, {"params": {}}), "says no `cls`"),
        ({"schema": 4, "cfg": NEW}, "says no `activation`"),
        ({"schema": 4}, "says no `cfg`"),
        ({"schema": 1, "cls": "TopK", "cfg": OLD}, "says no top_k"),
        ({}, "says no `d_model`"),
        ([1], "is a list, wanted a JSON object"),
        (OLD | {"cfg": {}}, "found cfg, which could change"),
    ],
)
def test_headers_that_are_not_understood_are_refused(
    tmp_path: Path, said: Any, message: str
) -> None:
    path = save(tmp_path / "sae.pt", said, weights())
    with pytest.raises(ValueError, match=message):
        read_sae(path)


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sae.pt"
    path.write_bytes(b"x" * 2**21)
    with pytest.raises(ValueError, match="begins with no line of JSON of at most"):
        read_sae(path)
    path.write_bytes(b"{]\n")
    with pytest.raises(ValueError, match="begins with a line that is no valid JSON"):
        read_sae(path)
    said = header(5, {"cls": "Relu", "params": params(5)})
    whole = save(path, said, weights()).read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match="is not a whole file of tensors"):
        read_sae(path)
    with pytest.raises(ValueError, match="found b_mystery as well"):
        read_sae(save(path, said, weights() | {"b_mystery": torch.zeros(N)}))
    with pytest.raises(ValueError, match="found activation topk typed, and the file says relu"):
        read_sae(save(path, said, weights()), Settings(activation="topk"))

"""Autoencoders of all activations and names against the definitions, token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.numerics import sae as module
from assay.numerics.codes import densify
from assay.numerics.sae import SparseAutoencoder

D, N = 6, 20
ACTIVATIONS = ["relu", "topk", "batchtopk", "jumprelu"]


def _tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "W_enc": torch.randn(D, N, generator=generator),
        "b_enc": torch.randn(N, generator=generator) - 0.5,
        "W_dec": torch.randn(N, D, generator=generator),
        "b_dec": torch.randn(D, generator=generator),
        "threshold": torch.rand(N, generator=generator) * 2,
    }


def _options(activation, k=3):
    return {"activation": activation, "k": k if activation == "topk" else None}


def _by_hand(x, tensors, activation, k=3, input_bias="b_dec"):
    """Dense codes and reconstructions, float64, a token at a time."""
    t = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    codes, back = [], []
    for token in x.double().numpy():
        pre = (token - (t["b_dec"] if input_bias == "b_dec" else 0)) @ t["W_enc"] + t["b_enc"]
        code = np.zeros(N)
        for j in range(N):
            if activation == "relu" or (activation == "topk" and j in np.argsort(-pre, kind="stable")[:k]):
                code[j] = max(pre[j], 0)
            elif activation in ("batchtopk", "jumprelu") and pre[j] > t["threshold"][j]:
                code[j] = pre[j]
        codes.append(code)
        back.append(code @ t["W_dec"] + t["b_dec"])
    return np.stack(codes), np.stack(back)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(ACTIVATIONS),
    st.sampled_from(["b_dec", "none"]),
    st.integers(1, 30),
    st.integers(1, N),
    st.integers(0, 99),
)
def test_codes_and_reconstruction_are_those_of_the_definition(activation, input_bias, n_rows, k, seed):
    tensors = _tensors(seed)
    x = torch.randn(n_rows, D, generator=torch.Generator().manual_seed(seed + 1)) * 2
    sae = SparseAutoencoder(tensors, **_options(activation, k), input_bias=input_bias)
    batch = sae.encode(x)
    codes, back = _by_hand(x, tensors, activation, k, input_bias)
    np.testing.assert_allclose(densify(batch, "sparse", N), codes, atol=1e-4)
    assert (batch["values"].diff(dim=1) <= 0).all()
    np.testing.assert_allclose(batch["error"], ((x.double().numpy() - back) ** 2).sum(1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sae.residual(x), x.double().numpy() - back, atol=1e-4)
    if activation == "topk":
        assert batch["values"].shape[1] == k
    for row, values in zip(batch["indices"], batch["values"], strict=True):
        named = row[values != 0].tolist()
        assert len(set(named)) == len(named)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_that_are_coded_in_parts_give_the_same(monkeypatch, activation):
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(3))
    sae = SparseAutoencoder(_tensors(), **_options(activation))
    whole, left = sae.encode(x), sae.residual(x)
    monkeypatch.setattr(module, "_ROWS", 7 * N)
    parts = sae.encode(x)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.residual(x), left, rtol=1e-5, atol=1e-5)
    assert sae.encode(x[:0])["error"].shape == (0,)


def test_tensors_go_by_the_names_of_saev_saelens_and_torch():
    tensors = _tensors()
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(3))
    wanted = SparseAutoencoder(tensors, activation="jumprelu").encode(x)
    linear = {
        "encoder.weight": tensors["W_enc"].T,
        "encoder.bias": tensors["b_enc"],
        "decoder.weight": tensors["W_dec"].T,
        "decoder.bias": tensors["b_dec"],
        "log_threshold": tensors["threshold"].log(),
        "steps": torch.zeros(()),
    }
    found = SparseAutoencoder({name: tensor.double() for name, tensor in linear.items()}, activation="jumprelu").encode(
        x
    )
    torch.testing.assert_close(found["values"], wanted["values"], rtol=1e-5, atol=1e-5)
    bare = {name: tensors[name] for name in ("W_enc", "W_dec", "b_dec")}
    zero = SparseAutoencoder(tensors | {"b_enc": torch.zeros(N)}, activation="relu").encode(x)
    torch.testing.assert_close(SparseAutoencoder(bare, activation="relu").encode(x)["values"], zero["values"])
    one = torch.tensor(0.7)
    same = SparseAutoencoder(tensors | {"threshold": one.expand(N)}, activation="batchtopk").encode(x)
    torch.testing.assert_close(
        SparseAutoencoder(tensors | {"threshold": one}, activation="batchtopk").encode(x)["values"], same["values"]
    )


def test_an_autoencoder_of_raw_activations_sees_them_raw():
    mean, std = torch.arange(6.0), torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0, 1.0])
    scale = torch.where(std > 0, std, 1.0)
    raw = torch.randn(40, D, generator=torch.Generator().manual_seed(1)) * scale + mean
    x = ((raw.double() - mean) / scale).float()
    tensors = _tensors()
    sae = SparseAutoencoder(tensors, activation="relu", mean=mean, std=std)
    codes, back = _by_hand(raw, tensors, "relu")
    np.testing.assert_allclose(densify(sae.encode(x), "sparse", N), codes, atol=1e-3)
    residual = (raw.double().numpy() - back) / scale.numpy()
    np.testing.assert_allclose(sae.residual(x), residual, atol=1e-3)
    (sums,) = sae.reconstruction_errors(x, std).values()
    assert sums.residual == pytest.approx((residual**2).sum(), rel=1e-5)
    assert sums.residual_raw == pytest.approx(((raw.double().numpy() - back) ** 2).sum(), rel=1e-5)
    np.testing.assert_allclose(sae.encode(x)["error"], (residual**2).sum(1), rtol=1e-4)


def test_errors_go_by_the_entries_a_token_where_they_are_fixed():
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    for activation, key in (("topk", 3), ("relu", N)):
        assert [*SparseAutoencoder(_tensors(), **_options(activation)).reconstruction_errors(x, torch.ones(D))] == [key]


def test_what_is_missing_or_disagrees_is_named():
    tensors = _tensors()
    with pytest.raises(
        ValueError, match=r"found tensors W_enc, .*wanted W_dec \(W_dec or decoder.weight\); b_dec .*for relu"
    ):
        SparseAutoencoder({"W_enc": tensors["W_enc"]}, activation="relu")
    no_threshold = {name: tensor for name, tensor in tensors.items() if name != "threshold"}
    for activation in ("jumprelu", "batchtopk"):
        with pytest.raises(
            ValueError, match=r"wanted threshold \(threshold or activation.threshold or log_threshold\) for"
        ):
            SparseAutoencoder(no_threshold, activation=activation)
    SparseAutoencoder(no_threshold, activation="relu")
    for name, shape in {"W_dec": (D, N), "b_enc": (D,), "b_dec": (N,)}.items():
        with pytest.raises(ValueError, match=f"found W_enc {D} x {N} and {name} .*are they of one model"):
            SparseAutoencoder(tensors | {name: torch.zeros(shape)}, activation="relu")
    for activation, k in (("topk", None), ("topk", 0), ("topk", N + 1), ("relu", 3)):
        with pytest.raises(ValueError, match=f"found k = {k} for {activation} of {N} features"):
            SparseAutoencoder(tensors, activation=activation, k=k)


def test_batchtopk_of_saev_names_its_threshold_by_the_module_that_holds_it():
    tensors = _tensors()
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    wanted = SparseAutoencoder(tensors, activation="batchtopk").encode(x)
    tensors["activation.threshold"] = tensors.pop("threshold")
    found = SparseAutoencoder(tensors, activation="batchtopk").encode(x)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)

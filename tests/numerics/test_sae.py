"""Autoencoders of all activations and names against the definitions, token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.numerics import precision
from assay.numerics import sae as module
from assay.numerics.codes import densify
from assay.numerics.sae import Activation, SparseAutoencoder

D, N = 6, 20
ACTIVATIONS = ["relu", "topk", "batchtopk", "jumprelu"]


def _tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "W_enc": torch.randn(D, N, generator=generator, dtype=torch.float32),
        "b_enc": torch.randn(N, generator=generator, dtype=torch.float32) - 0.5,
        "W_dec": torch.randn(N, D, generator=generator, dtype=torch.float32),
        "b_dec": torch.randn(D, generator=generator, dtype=torch.float32),
        "threshold": torch.rand(N, generator=generator, dtype=torch.float32) * 2,
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
            among_most = activation != "topk" or j in np.argsort(-pre, kind="stable")[:k]
            above = activation not in ("batchtopk", "jumprelu") or pre[j] > t["threshold"][j]
            code[j] = max(pre[j], 0) if among_most and above else 0
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
    st.sampled_from([0.0, -0.5, -1.0, -100.0]),
)
def test_codes_and_reconstruction_are_those_of_the_definition(
    activation, input_bias, n_rows, k, seed, shift
):
    tensors = _tensors(seed)
    tensors["threshold"] = tensors["threshold"] + shift
    x = (
        torch.randn(
            n_rows, D, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float32
        )
        * 2
    )
    sae = SparseAutoencoder(tensors, **_options(activation, k), input_bias=input_bias)
    batch = sae.encode(x)
    codes, back = _by_hand(x, tensors, activation, k, input_bias)
    np.testing.assert_allclose(densify(batch, "sparse", N), codes, atol=1e-4)
    assert (batch["values"].diff(dim=1) <= 0).all()
    np.testing.assert_allclose(
        batch["error"], ((x.double().numpy() - back) ** 2).sum(1), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(sae.residual(x), x.double().numpy() - back, atol=1e-4)
    if activation == "topk":
        assert batch["values"].shape[1] == k
    for row, values in zip(batch["indices"], batch["values"], strict=True):
        named = row[values != 0].tolist()
        assert len(set(named)) == len(named)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_that_are_coded_in_parts_give_the_same(monkeypatch, activation):
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
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
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    wanted = SparseAutoencoder(tensors, activation="jumprelu").encode(x)
    linear = {
        "encoder.weight": tensors["W_enc"].T,
        "encoder.bias": tensors["b_enc"],
        "decoder.weight": tensors["W_dec"].T,
        "decoder.bias": tensors["b_dec"],
        "log_threshold": tensors["threshold"].log(),
        "steps": torch.zeros((), dtype=torch.float32),
    }
    found = SparseAutoencoder(
        {name: tensor.double() for name, tensor in linear.items()}, activation="jumprelu"
    ).encode(x)
    torch.testing.assert_close(found["values"], wanted["values"], rtol=1e-5, atol=1e-5)
    bare = {name: tensors[name] for name in ("W_enc", "W_dec", "b_dec")}
    zero = SparseAutoencoder(
        tensors | {"b_enc": torch.zeros(N, dtype=torch.float32)}, activation="relu"
    ).encode(x)
    torch.testing.assert_close(
        SparseAutoencoder(bare, activation="relu").encode(x)["values"], zero["values"]
    )
    one = torch.tensor(0.7, dtype=torch.float32)
    same = SparseAutoencoder(tensors | {"threshold": one.expand(N)}, activation="batchtopk").encode(
        x
    )
    torch.testing.assert_close(
        SparseAutoencoder(tensors | {"threshold": one}, activation="batchtopk").encode(x)["values"],
        same["values"],
    )


def test_an_autoencoder_of_raw_activations_sees_them_raw():
    mean, std = (
        torch.arange(6.0, dtype=torch.float32),
        torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0, 1.0], dtype=torch.float32),
    )
    scale = torch.where(std > 0, std, 1.0)
    raw = (
        torch.randn(40, D, generator=torch.Generator().manual_seed(1), dtype=torch.float32) * scale
        + mean
    )
    x = ((raw.double() - mean) / scale).float()
    tensors = _tensors()
    sae = SparseAutoencoder(tensors, activation="relu", mean=mean, std=std)
    codes, back = _by_hand(raw, tensors, "relu")
    np.testing.assert_allclose(densify(sae.encode(x), "sparse", N), codes, atol=1e-3)
    residual = (raw.double().numpy() - back) / scale.numpy()
    np.testing.assert_allclose(sae.residual(x), residual, atol=1e-3)
    (sums,) = sae.errors(x, std).values()
    assert sums.residual == pytest.approx((residual**2).sum(), rel=1e-5)
    assert sums.residual_raw == pytest.approx(((raw.double().numpy() - back) ** 2).sum(), rel=1e-5)
    np.testing.assert_allclose(sae.encode(x)["error"], (residual**2).sum(1), rtol=1e-4)


def test_errors_go_by_the_entries_a_token_where_they_are_fixed():
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    for activation, key in (("topk", 3), ("relu", N)):
        assert [
            *SparseAutoencoder(_tensors(), **_options(activation)).errors(
                x, torch.ones(D, dtype=torch.float32)
            )
        ] == [key]


def test_what_is_missing_or_disagrees_is_named():
    tensors = _tensors()
    with pytest.raises(
        ValueError,
        match=r"found tensors W_enc, .*wanted W_dec \(W_dec or decoder.weight\); b_dec .*for relu",
    ):
        SparseAutoencoder({"W_enc": tensors["W_enc"]}, activation="relu")
    no_threshold = {name: tensor for name, tensor in tensors.items() if name != "threshold"}
    for activation in ("jumprelu", "batchtopk"):
        with pytest.raises(
            ValueError,
            match=r"wanted threshold \(threshold or activation.threshold or log_threshold\) for",
        ):
            SparseAutoencoder(no_threshold, activation=activation)
    SparseAutoencoder(no_threshold, activation="relu")
    for name, shape in {"W_dec": (D, N), "b_enc": (D,), "b_dec": (N,)}.items():
        with pytest.raises(
            ValueError, match=f"found W_enc {D} x {N} and {name} .*are they of one model"
        ):
            SparseAutoencoder(
                tensors | {name: torch.zeros(shape, dtype=torch.float32)}, activation="relu"
            )
    wrong: tuple[tuple[Activation, int | None], ...] = (
        *(("topk", k) for k in (None, 0, N + 1)),
        ("relu", 3),
    )
    for activation, k in wrong:
        with pytest.raises(ValueError, match=f"found k = {k} for {activation} of {N} features"):
            SparseAutoencoder(tensors, activation=activation, k=k)


def test_a_threshold_below_0_lets_no_negative_code_through():
    """dictionary_learning saves -1 until training has set it."""
    x = torch.randn(200, D, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    unset = _tensors() | {"threshold": torch.tensor(-1.0, dtype=torch.float32)}
    relu = SparseAutoencoder(_tensors(), activation="relu")
    for activation in ("batchtopk", "jumprelu"):
        sae = SparseAutoencoder(unset, activation=activation)
        for name, wanted in relu.encode(x).items():
            assert torch.equal(sae.encode(x)[name], wanted), name
        assert torch.equal(sae.residual(x), relu.residual(x))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_weights_that_are_not_finite_are_refused(name, bad):
    tensors = _tensors()
    tensors[name].view(-1)[2] = bad
    with pytest.raises(
        ValueError, match=f"found {name} with NaN or infinity, wanted finite numbers"
    ):
        SparseAutoencoder(tensors, activation="jumprelu")


def test_a_threshold_that_is_not_used_is_not_looked_at():
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    plain = SparseAutoencoder(_tensors(), activation="relu").encode(x)
    nan = _tensors() | {"threshold": torch.full((N,), torch.nan, dtype=torch.float32)}
    assert torch.equal(
        SparseAutoencoder(nan, activation="relu").encode(x)["values"], plain["values"]
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.int8])
def test_weights_and_statistics_that_are_no_real_numbers_are_refused(dtype):
    for name in _tensors():
        with pytest.raises(
            ValueError, match=f"found {name} of {dtype}, wanted floating-point numbers"
        ):
            SparseAutoencoder(
                _tensors() | {name: _tensors()[name].to(dtype)}, activation="jumprelu"
            )
    if dtype == torch.int8:
        return
    ones = torch.ones(D, dtype=torch.float32)
    for name in ("mean", "std"):
        with pytest.raises(ValueError, match=f"found a {name} of {dtype}, wanted real numbers"):
            SparseAutoencoder(
                _tensors(),
                activation="relu",
                mean=ones.to(dtype) if name == "mean" else ones,
                std=ones.to(dtype) if name == "std" else ones,
            )


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"mean": [0.0] * D}, "found a mean or a std alone, wanted both"),
        ({"std": [1.0] * D}, "found a mean or a std alone, wanted both"),
        ({"mean": [torch.nan] * D, "std": [1.0] * D}, "6 values of mean that are not finite"),
        ({"mean": [0.0] * D, "std": [-1.0] * D}, "found a std of -1"),
        ({"mean": [0.0], "std": [1.0]}, r"and mean \(1,\), wanted \(6,\)"),
    ],
)
def test_statistics_that_cannot_be_are_refused(statistics, message):
    given = {name: torch.tensor(values, dtype=torch.float64) for name, values in statistics.items()}
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder(
            _tensors(), activation="relu", mean=given.get("mean"), std=given.get("std")
        )


def test_a_tensor_that_stands_there_twice_has_to_be_the_same():
    tensors = _tensors()
    twice = tensors | {
        "encoder.weight": tensors["W_enc"].T,
        "bias": tensors["b_dec"].double(),
        "log_threshold": tensors["threshold"].log(),
    }
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    found = SparseAutoencoder(twice, activation="jumprelu").encode(x)
    assert torch.equal(
        found["values"], SparseAutoencoder(tensors, activation="jumprelu").encode(x)["values"]
    )
    for first, other in (
        ("W_enc", "encoder.weight"),
        ("b_dec", "bias"),
        ("threshold", "log_threshold"),
    ):
        for change in (twice[other] * 1.001, twice[other][1:]):
            with pytest.raises(
                ValueError, match=f"found {first} and another {other}, wanted one {first}"
            ):
                SparseAutoencoder(twice | {other: change}, activation="jumprelu")


def test_a_threshold_of_another_model_is_refused():
    with pytest.raises(
        ValueError, match=rf"and threshold \({N + 1},\), wanted \({N},\) or one number"
    ):
        SparseAutoencoder(
            _tensors() | {"threshold": torch.ones(N + 1, dtype=torch.float32)},
            activation="jumprelu",
        )
    with pytest.raises(ValueError, match="found W_enc of shape"):
        SparseAutoencoder(
            _tensors() | {"W_enc": torch.ones(N, dtype=torch.float32)}, activation="relu"
        )


def test_products_are_of_float32_whatever_torch_may_round_them_to(monkeypatch):
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    sae = SparseAutoencoder(_tensors(), activation="topk", k=3)
    wanted = sae.encode(x)
    real = torch.Tensor.__matmul__

    def rounded(a, b):
        return (
            real(a.bfloat16().float(), b.bfloat16().float())
            if a.dtype == torch.float32
            else real(a, b)
        )

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    monkeypatch.setattr(precision, "float32_is_exact", lambda: False)
    found = sae.encode(x)
    assert torch.equal(found["indices"], wanted["indices"])
    torch.testing.assert_close(found["values"], wanted["values"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["error"], wanted["error"], rtol=1e-5, atol=1e-5)


def test_batchtopk_of_saev_names_its_threshold_by_the_module_that_holds_it():
    tensors = _tensors()
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    wanted = SparseAutoencoder(tensors, activation="batchtopk").encode(x)
    tensors["activation.threshold"] = tensors.pop("threshold")
    found = SparseAutoencoder(tensors, activation="batchtopk").encode(x)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", ["b_gate", "r_mag", "W_skip"])
def test_tensors_of_a_formula_that_is_not_ours_are_refused(name):
    """A gated one was taken for relu without `b_enc`, and a skip connection left out."""
    # What a single number says, `k` says too.
    wanted = SparseAutoencoder(_tensors() | {"k": torch.tensor(3)}, activation="relu")
    assert wanted.n_features == N
    with pytest.raises(ValueError, match=f"found {name} as well: an autoencoder of another kind"):
        SparseAutoencoder(
            _tensors() | {name: torch.ones(N, dtype=torch.float32)}, activation="relu"
        )

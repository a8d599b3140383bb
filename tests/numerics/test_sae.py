"""Autoencoders of every activation against the definitions, token by token in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.architecture import TENSORS, Architecture, Norm
from assay.numerics import precision
from assay.numerics.codes import densify
from assay.numerics.sae import SparseAutoencoder
from assay.numerics.sae import autoencoder as module
from assay.numerics.sae.activations import largest

D, N = 6, 20

PLAIN = ("W_enc", "b_enc", "W_dec", "b_out", "center")

KINDS: dict[str, tuple[Architecture, tuple[str, ...]]] = {
    "relu": (Architecture("relu"), PLAIN),
    "relu, least": (Architecture("relu"), ("W_enc", "W_dec")),
    "relu, scaled": (Architecture("relu"), (*PLAIN, "scale")),
    "topk": (Architecture("topk", 3), PLAIN),
    "topk, large k": (Architecture("topk", 13), PLAIN),
    "topk, all": (Architecture("topk", N), PLAIN),
    "topk, scaled": (Architecture("topk", 4), (*PLAIN, "scale")),
    "topk, signed": (Architecture("topk", 15, signed=True), PLAIN),
    "topk, signed, all": (Architecture("topk", N, signed=True), PLAIN),
    "abstopk": (Architecture("abstopk", 3), PLAIN),
    "abstopk, scaled": (Architecture("abstopk", 9), (*PLAIN, "scale")),
    "jumprelu": (Architecture("jumprelu"), (*PLAIN, "threshold")),
    "jumprelu, equal": (Architecture("jumprelu", keeps_equal=True), (*PLAIN, "threshold")),
    "groupmax": (Architecture("groupmax", 5), PLAIN),
    "groupmax, scaled": (Architecture("groupmax", 10), (*PLAIN, "scale")),
    "gated": (Architecture("relu"), (*PLAIN, "b_gate", "r_mag")),
    "gated, scaled": (Architecture("relu"), (*PLAIN, "b_gate", "r_mag", "scale")),
    "gated topk": (Architecture("topk", 4), (*PLAIN, "b_gate", "r_mag")),
    "pursuit": (Architecture("matching_pursuit"), ("W_dec", "b_out", "center")),
    "pursuit, least": (Architecture("matching_pursuit", max_iterations=1), ("W_dec",)),
    "pursuit, until a norm": (
        Architecture(
            "matching_pursuit",
            residual_threshold=1.5,
            max_iterations=9,
            stop_on_duplicate_support=False,
        ),
        ("W_dec", "center"),
    ),
    "pursuit, for 7 steps": (
        Architecture(
            "matching_pursuit",
            residual_threshold=0.0,
            max_iterations=7,
            stop_on_duplicate_support=False,
        ),
        ("W_dec", "b_out"),
    ),
    "pursuit, until nothing new": (
        Architecture("matching_pursuit", residual_threshold=0.0, max_iterations=9),
        ("W_dec", "b_out"),
    ),
}
"""Without a norm all sums are exact in float32, so that equals are equal: see `draw`."""

NORMS: tuple[Norm, ...] = ("layer_norm", "constant_norm_rescale")

NORMED = {
    f"{name}, {norm}": (replace(KINDS[name][0], norm=norm), KINDS[name][1])
    for norm in NORMS
    for name in ("relu", "topk, scaled", "abstopk", "jumprelu", "gated", "topk, signed")
}

ALL = KINDS | NORMED


def draw(names, seed=0):
    """Weights that are whole multiples of 1/2 or 1/4, which float32 multiplies and adds exactly;
    the decoder's rows have length 1, as matching pursuit wants them.
    """
    generator = torch.Generator().manual_seed(seed)

    def eighths(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=generator).float()

    signs = eighths(0, 1, N, D) * 2 - 1
    outside = torch.rand(N, D, generator=generator).argsort(1)[:, :2]
    tensors = {
        "W_enc": eighths(-4, 4, D, N) / 4,
        "b_enc": eighths(-4, 2, N) / 2,
        "W_dec": (signs / 2).scatter_(1, outside, 0.0),
        "b_out": eighths(-4, 4, D) / 4,
        "center": eighths(-4, 4, D) / 4,
        "scale": eighths(0, 4, N) / 2,
        "threshold": eighths(-2, 6, N) / 2,
        "b_gate": eighths(-4, 4, N) / 2,
        "r_mag": eighths(-4, 4, N) / 4,
    }
    return {name: tensors[name] for name in names}


def draw_tokens(n_rows, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-12, 13, (n_rows, D), generator=generator).float() / 4


def make(kind, seed=0, **space):
    architecture, names = ALL[kind]
    return SparseAutoencoder(draw(names, seed), architecture, **space)


class Slow:
    """The formulas, a token at a time, float64."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        self.a, names = ALL[kind]
        self.t = {name: tensor.double().numpy() for name, tensor in draw(names, seed).items()}

    def norm(self, token):
        """The token as it is encoded, and what undoes this."""
        if self.a.norm == "layer_norm":
            mean, std = token.mean(), token.std(ddof=1)
            return (token - mean) / (std + 1e-5), lambda back: back * std + mean
        if self.a.norm == "constant_norm_rescale":
            factor = np.sqrt(D) / np.sqrt((token**2).sum()) if token.any() else np.sqrt(D)
            return token * factor, lambda back: back / factor
        return token, lambda back: back

    def encode(self, token):
        x, _ = self.norm(token)
        x = x - self.t.get("center", 0)
        if self.a.activation == "matching_pursuit":
            return self._pursue(x)
        pre = x @ self.t["W_enc"]
        is_open = pre + self.t["b_gate"] > 0 if "b_gate" in self.t else np.full(N, True)
        pre = pre * np.exp(self.t.get("r_mag", 0)) + self.t.get("b_enc", 0)
        pre = pre * self.t.get("scale", 1)
        code = np.zeros(N)
        for j in range(N):
            if is_open[j] and self._is_kept(pre, j):
                signed = self.a.signed or self.a.activation == "abstopk"
                code[j] = pre[j] if signed else max(pre[j], 0)
        return code

    def _is_kept(self, pre, j):
        match self.a.activation:
            case "topk":
                return j in sorted(range(N), key=lambda i: (-pre[i], i))[: self.a.k]
            case "abstopk":
                return j in sorted(range(N), key=lambda i: (-abs(pre[i]), i))[: self.a.k]
            case "jumprelu":
                threshold = self.t["threshold"][j]
                return pre[j] > threshold or (self.a.keeps_equal and pre[j] == threshold)
            case "groupmax":
                size = N // (self.a.k or 1)
                group = range(j // size * size, j // size * size + size)
                return j == min(group, key=lambda i: (-pre[i], i))
            case _:
                return True

    def _pursue(self, x):
        left, code = x.copy(), np.zeros(N)
        for _ in range(self.a.max_iterations or D):
            products = [left @ row for row in self.t["W_dec"]]
            best = min(range(N), key=lambda i: (-products[i], i))
            value = max(products[best], 0)
            support = set(code.nonzero()[0])
            code[best] += value
            left = left - value * self.t["W_dec"][best]
            if self.a.stop_on_duplicate_support and set(code.nonzero()[0]) == support:
                break
            if self.a.residual_threshold and np.linalg.norm(left) < self.a.residual_threshold:
                break
        return code

    def decode(self, token, code):
        scale = self.t.get("scale", np.ones(N))
        back = np.zeros(D) + self.t.get("b_out", 0)
        for j in code.nonzero()[0]:
            back += code[j] / scale[j] * self.t["W_dec"][j]
        return self.norm(token)[1](back)

    def all(self, tokens):
        """Dense codes and reconstructions."""
        tokens = tokens.double().numpy()
        codes = [self.encode(token) for token in tokens]
        back = [self.decode(*pair) for pair in zip(tokens, codes, strict=True)]
        return np.stack(codes), np.stack(back)


def dense(batch):
    """Codes (b, N), float64, of stored entries, each of which names a feature once."""
    found = np.zeros((len(batch["values"]), N))
    for row, values, indices in zip(found, batch["values"], batch["indices"], strict=True):
        assert (values.abs().diff() <= 0).all()  # by falling magnitude
        entries = [(float(v), int(i)) for v, i in zip(values, indices, strict=True) if v != 0]
        assert len({i for _, i in entries}) == len(entries)
        for value, feature in entries:
            row[feature] = value
    return found


def check(kind, x, seed=0):
    """Everything that an autoencoder says of tokens, against the slow formulas."""
    sae, slow = make(kind, seed), Slow(kind, seed)
    codes, back = slow.all(x)
    batch = sae.encode(x)
    np.testing.assert_allclose(dense(batch), codes, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(dense(batch) != 0, codes != 0)
    np.testing.assert_array_equal(sae.encode_dense(x), densify(batch, "sparse", N))
    np.testing.assert_allclose(sae.reconstruct(x), back, rtol=1e-5, atol=1e-5)
    left = x.double().numpy() - back
    np.testing.assert_allclose(sae.residual(x), left, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(batch["error"], (left**2).sum(1), rtol=1e-5, atol=1e-5)
    (sums,) = sae.errors(x, torch.ones(D)).values()
    assert sums.residual == pytest.approx((left**2).sum(), rel=1e-5)
    width = batch["values"].shape[1]
    wanted = sae.k or int((codes != 0).sum(1).max())
    assert batch["indices"].shape == (len(x), width) == (len(x), wanted)


@pytest.mark.parametrize("kind", ALL)
def test_codes_and_reconstruction_are_those_of_the_definition(kind):
    for seed in range(3):
        check(kind, draw_tokens(30, seed + 50), seed)


@pytest.mark.property
@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(sorted(KINDS)),
    st.lists(st.lists(st.integers(-12, 12), min_size=D, max_size=D), min_size=1, max_size=6),
    st.integers(0, 99),
)
def test_equals_go_to_the_lower_index_whatever_the_tokens(kind, tokens, seed):
    check(kind, torch.tensor(tokens).float() / 4, seed)


@pytest.mark.property
@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(sorted(ALL)),
    st.integers(1, 8),
    st.integers(0, 999),
    st.booleans(),
    st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_the_error_is_that_of_the_codes_as_they_are_stored(kind, n_rows, seed, is_raw, size):
    """||x~ - decode(codes)||^2, with a decoder of its own, in the space of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_rows, D, generator=generator) * size
    mean = torch.randn(D, generator=generator, dtype=torch.float64)
    std = torch.rand(D, generator=generator, dtype=torch.float64) + 0.1
    std[0] = 0.0  # a constant dimension, which is divided by 1
    sae = make(kind, seed, **({"mean": mean, "std": std} if is_raw else {}))
    batch = sae.encode(x)
    scale = torch.where(std > 0, std, 1.0)
    seen = (x.double() * scale + mean if is_raw else x.double()).numpy()
    slow = Slow(kind, seed)
    back = np.stack([slow.decode(*pair) for pair in zip(seen, dense(batch), strict=True)])
    if is_raw:
        back = (back - mean.numpy()) / scale.numpy()
    left = x.double().numpy() - back
    length = (x.double().numpy() ** 2).sum(1).max()
    np.testing.assert_allclose(batch["error"], (left**2).sum(1), rtol=1e-6, atol=1e-6 * length)
    np.testing.assert_allclose(sae.residual(x), left, rtol=1e-6, atol=1e-6 * length**0.5)


@pytest.mark.parametrize("kind", ALL)
def test_rows_that_are_coded_in_parts_or_alone_give_the_same(monkeypatch, kind):
    x, sae = draw_tokens(23), make(kind)
    whole, left, back = sae.encode(x), sae.residual(x), sae.reconstruct(x)
    alone = [sae.encode(row[None]) for row in x]
    monkeypatch.setattr(module, "_ROWS", 7 * N)
    parts = sae.encode(x)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.residual(x), left, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.reconstruct(x), back, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.encode_dense(x), densify(whole, "sparse", N).float())
    for row, one in enumerate(alone):
        np.testing.assert_allclose(dense(one)[0], dense(whole)[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_no_tokens_give_no_codes(kind):
    x, sae = draw_tokens(0), make(kind)
    batch = sae.encode(x)
    assert batch["values"].shape == batch["indices"].shape == (0, 0)
    assert batch["error"].shape == (0,)
    assert sae.residual(x).shape == sae.reconstruct(x).shape == (0, D)
    assert sae.encode_dense(x).shape == (0, N)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "pursuit, for 7 steps", "gated"])
def test_a_batch_without_any_code_is_reconstructed_by_the_biases_alone(kind):
    architecture, names = KINDS[kind]
    tensors = draw(names)
    if "b_enc" in tensors:
        tensors["b_enc"] = torch.full((N,), -100.0)
    x = draw_tokens(5) if "b_enc" in tensors else torch.zeros(5, D)
    sae = SparseAutoencoder(tensors, architecture)
    batch = sae.encode(x)
    assert batch["values"].shape == batch["indices"].shape == (5, 0)
    left = (x - tensors["b_out"]).double()
    torch.testing.assert_close(batch["error"], left.square().sum(1))
    torch.testing.assert_close(sae.residual(x), left)
    assert not densify(batch, "sparse", N).any()


@pytest.mark.parametrize("kind", ["topk", "topk, signed", "abstopk", "groupmax"])
def test_what_pads_a_row_names_the_first_feature_and_is_no_code(kind):
    architecture, _ = KINDS[kind]
    tensors = {"W_enc": torch.zeros(D, N), "W_dec": torch.ones(N, D)}
    batch = SparseAutoencoder(tensors, architecture).encode(draw_tokens(4))
    assert batch["values"].shape == (4, architecture.k)
    assert not batch["values"].any()
    assert not batch["indices"].any()


def test_a_feature_of_scale_0_is_never_active():
    tensors = draw((*PLAIN, "scale"))
    tensors["scale"] = torch.zeros(N)
    for architecture in (Architecture("relu"), Architecture("abstopk", 3)):
        sae = SparseAutoencoder(tensors, architecture)
        assert not sae.encode_dense(draw_tokens(9)).any()
        torch.testing.assert_close(sae.reconstruct(draw_tokens(9)), tensors["b_out"].expand(9, D))


@pytest.mark.property
@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 30).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=1, max_size=4
        )
    ),
    st.data(),
)
def test_the_largest_are_those_of_a_stable_sort(rows, data):
    by = torch.tensor(rows).float()
    k = data.draw(st.integers(1, by.shape[1]))
    found = largest(by, k)
    wanted = by.argsort(dim=1, descending=True, stable=True)[:, :k]
    assert torch.equal(by.gather(1, found), by.gather(1, wanted))
    # Which zeros are named is left open.
    is_named = by.gather(1, wanted) != 0
    assert torch.equal(found[is_named], wanted[is_named])


@pytest.mark.parametrize("n", [64, 65])
@pytest.mark.parametrize("lowest", [-3, 0])
def test_many_equals_in_a_wide_code_go_to_the_lower_index(n, lowest):
    values = (lowest, lowest + 3)
    by = torch.randint(*values, (50, n), generator=torch.Generator().manual_seed(0)).float()
    wanted = by.argsort(dim=1, descending=True, stable=True)[:, :8]
    found = largest(by, 8)
    is_named = by.gather(1, wanted) != 0
    assert torch.equal(found[is_named], wanted[is_named])


def test_a_wide_code_is_never_sorted_whole(monkeypatch):
    sorted_widths = []
    argsort = torch.Tensor.argsort

    def watched(tensor, *args, **kwargs):
        sorted_widths.append(tensor.shape[1])
        return argsort(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "argsort", watched)
    assert torch.equal(largest(torch.ones(3, 100), 4), torch.arange(4).expand(3, 4))
    assert sorted_widths == [4]


@pytest.mark.parametrize(
    "kind", ["relu", "topk, signed", "topk, scaled", "topk, scaled, layer_norm"]
)
def test_an_autoencoder_of_raw_activations_sees_them_raw(kind):
    mean, std = torch.arange(6.0), torch.tensor([1.0, 2.0, 0.0, 0.5, 4.0, 1.0])
    scale = torch.where(std > 0, std, 1.0)
    raw = draw_tokens(40) * scale + mean
    x = (raw - mean) / scale
    sae, slow = make(kind, mean=mean, std=std), Slow(kind)
    codes, back = slow.all(raw)
    batch = sae.encode(x)
    np.testing.assert_allclose(dense(batch), codes, rtol=1e-5, atol=1e-5)
    left = (raw.double().numpy() - back) / scale.numpy()
    np.testing.assert_allclose(sae.residual(x), left, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(batch["error"], (left**2).sum(1), rtol=1e-5)
    (sums,) = sae.errors(x, std).values()
    assert sums.residual == pytest.approx((left**2).sum(), rel=1e-5)
    assert sums.residual_raw == pytest.approx(((raw.double().numpy() - back) ** 2).sum(), rel=1e-5)
    np.testing.assert_allclose(sae.encode_dense(raw), codes, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae.reconstruct(raw), back, rtol=1e-5, atol=1e-5)


def test_errors_go_by_the_entries_a_token_where_they_are_fixed():
    for kind, key in (("topk", 3), ("abstopk", 3), ("groupmax", 5), ("relu", N), ("pursuit", N)):
        sae = make(kind)
        assert [*sae.errors(draw_tokens(4), torch.ones(D))] == [key] == [*sae.ks]
        assert sae.k == (None if key == N else key)
        assert sae.n_features == N


def test_one_threshold_is_that_of_every_feature():
    for one in (torch.tensor(0.5), torch.tensor([0.5])):
        found = [
            SparseAutoencoder(draw(PLAIN) | {"threshold": each}, Architecture("jumprelu"))
            for each in (one, one.expand(N))
        ]
        x = draw_tokens(30)
        assert torch.equal(found[0].encode_dense(x), found[1].encode_dense(x))
        assert found[0].encode_dense(x).any()


def test_a_threshold_below_0_lets_no_negative_code_through():
    """dictionary_learning saves -1 until training has set it."""
    x, relu = draw_tokens(200), make("relu")
    for keeps_equal in (False, True):
        sae = SparseAutoencoder(
            draw(PLAIN) | {"threshold": torch.tensor(-1.0)},
            Architecture("jumprelu", keeps_equal=keeps_equal),
        )
        for name, wanted in relu.encode(x).items():
            assert torch.equal(sae.encode(x)[name], wanted), name
        assert torch.equal(sae.residual(x), relu.residual(x))


def test_products_are_of_float32_whatever_torch_may_round_them_to(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, D, generator=generator)
    saes = [make(kind) for kind in ("topk", "pursuit")]
    wanted = [sae.encode(x) for sae in saes]
    real = torch.Tensor.__matmul__

    def rounded(a, b):
        return (
            real(a.bfloat16().float(), b.bfloat16().float())
            if a.dtype == torch.float32
            else real(a, b)
        )

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    monkeypatch.setattr(precision, "float32_is_exact", lambda: False)
    for sae, each in zip(saes, wanted, strict=True):
        found = sae.encode(x)
        assert torch.equal(found["indices"], each["indices"])
        torch.testing.assert_close(found["values"], each["values"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["error"], each["error"], rtol=1e-5, atol=1e-5)


FORMULAS = {
    "relu": "code = relu((x - c) W_enc + b_enc);  x^ = code W_dec + b_out",
    "relu, least": "code = relu(x W_enc);  x^ = code W_dec",
    "topk, scaled": (
        "code = relu top-4(((x - c) W_enc + b_enc) s);  x^ = (code / s) W_dec + b_out"
    ),
    "topk, signed": "code = top-15((x - c) W_enc + b_enc);  x^ = code W_dec + b_out",
    "abstopk": "code = top-3 by magnitude((x - c) W_enc + b_enc);  x^ = code W_dec + b_out",
    "jumprelu": (
        "code = relu where pre > threshold ((x - c) W_enc + b_enc);  x^ = code W_dec + b_out"
    ),
    "jumprelu, equal": (
        "code = relu where pre >= threshold ((x - c) W_enc + b_enc);  x^ = code W_dec + b_out"
    ),
    "groupmax": "code = relu groupmax-5((x - c) W_enc + b_enc);  x^ = code W_dec + b_out",
    "gated": (
        "code = relu((x - c) W_enc exp(r_mag) + b_enc) where (x - c) W_enc + b_gate > 0;"
        "  x^ = code W_dec + b_out"
    ),
    "pursuit": "code = matching_pursuit((x - c), W_dec);  x^ = code W_dec + b_out",
    "relu, layer_norm": ("code = relu((ln(x) - c) W_enc + b_enc);  x^ = ln^-1(code W_dec + b_out)"),
    "topk, scaled, constant_norm_rescale": (
        "code = relu top-4(((rescale(x) - c) W_enc + b_enc) s);"
        "  x^ = rescale^-1((code / s) W_dec + b_out)"
    ),
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_the_formula_has_those_terms_that_there_are_tensors_for(kind):
    architecture, names = ALL[kind]
    assert architecture.formula(names) == FORMULAS[kind] == make(kind).formula


def refuse(message, tensors, architecture=None, **space: Any):
    architecture = architecture or Architecture("relu")
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder(tensors, architecture, **space)


def test_what_is_missing_is_named():
    least = draw(("W_enc", "W_dec"))
    refuse("found tensors W_enc, wanted W_dec as well for relu", {"W_enc": least["W_enc"]})
    refuse("found tensors W_dec, wanted W_enc as well for relu", {"W_dec": least["W_dec"]})
    refuse("found tensors none, wanted W_dec as well for matching", {}, KINDS["pursuit"][0])
    refuse("wanted threshold as well for jumprelu", least, Architecture("jumprelu"))
    for one, other in (("b_gate", "r_mag"), ("r_mag", "b_gate")):
        refuse(f"wanted {other} as well for relu", least | draw((one,)))


def test_what_the_formula_has_no_use_for_is_refused():
    least = draw(("W_enc", "W_dec"))
    refuse("found tensors W_skip, wanted none but W_enc, ", least | {"W_skip": torch.ones(D, D)})
    refuse("found threshold, which relu has no use for", least | draw(("threshold",)))
    pursuit = KINDS["pursuit"][0]
    for name in ("W_enc", "b_enc", "scale"):
        refuse(
            f"found {name}, which matching_pursuit has no use for",
            draw(("W_dec", name)),
            pursuit,
        )


def test_what_disagrees_is_named():
    every = draw((*PLAIN, "scale", "threshold"))
    wrong = {
        "W_enc": (N, D),
        "b_enc": (D,),
        "b_out": (N,),
        "center": (N,),
        "scale": (1,),
        "threshold": (N + 1,),
    }
    for name, shape in wrong.items():
        refuse(
            rf"found W_dec {N} x {D} and {name} \(.*are they of one model",
            every | {name: torch.zeros(shape)},
            Architecture("jumprelu"),
        )
    for shape in ((N,), (0, D), (N, 0)):
        refuse(
            "found W_dec of shape", every | {"W_dec": torch.ones(shape)}, Architecture("jumprelu")
        )
    for architecture in (
        Architecture("topk", N + 1),
        Architecture("abstopk", N + 1),
        Architecture("groupmax", N + 1),
        Architecture("groupmax", 3),
    ):
        refuse(
            f"found k = {architecture.k} for {architecture.activation} of {N} features, wanted 1",
            draw(PLAIN),
            architecture,
        )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", sorted(TENSORS))
def test_weights_that_are_not_finite_are_refused(name, bad):
    kind = "gated, scaled" if name != "threshold" else "jumprelu"
    architecture, names = KINDS[kind]
    tensors = draw(names)
    tensors[name].view(-1)[2] = bad
    refuse(f"found {name} with NaN or infinity, wanted finite numbers", tensors, architecture)


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.int8])
def test_weights_that_are_no_real_numbers_are_refused(dtype):
    for name in PLAIN:
        tensors = draw(PLAIN)
        tensors[name] = tensors[name].to(dtype)
        refuse(f"found {name} of {dtype}, wanted floating-point numbers", tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_are_computed_with_in_float32(dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in draw(PLAIN).items()}
    sae = SparseAutoencoder(tensors, Architecture("relu"))
    x = draw_tokens(9)
    assert torch.equal(sae.encode_dense(x), make("relu").encode_dense(x))
    assert sae.encode_dense(x).dtype == sae.reconstruct(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"mean": [0.0] * D}, "found a mean or a std alone, wanted both"),
        ({"std": [1.0] * D}, "found a mean or a std alone, wanted both"),
        ({"mean": [torch.nan] * D, "std": [1.0] * D}, "6 values of mean that are not finite"),
        ({"mean": [0.0] * D, "std": [-1.0] * D}, "found a std of -1"),
        ({"mean": [0.0], "std": [1.0]}, r"and mean \(1,\), wanted \(6,\)"),
        ({"mean": [False] * D, "std": [1.0] * D}, "found a mean of torch.bool, wanted real"),
        ({"mean": [0.0] * D, "std": [1j] * D}, "found a std of torch.complex64, wanted real"),
    ],
)
def test_statistics_that_cannot_be_are_refused(statistics, message):
    given = {name: torch.tensor(values) for name, values in statistics.items()}
    refuse(message, draw(PLAIN), mean=given.get("mean"), std=given.get("std"))


@pytest.mark.parametrize("kind", ["relu", "pursuit", "relu, layer_norm"])
def test_tokens_of_another_width_or_not_finite_are_refused(kind):
    sae = make(kind)
    bad = draw_tokens(4)
    bad[2, 3] = torch.nan
    for call in (sae.encode, sae.encode_dense, sae.reconstruct, sae.residual):
        with pytest.raises(ValueError, match="NaN or infinity"):
            call(bad)
        with pytest.raises(ValueError, match=f"wanted .*{D}"):
            call(torch.ones(3, D + 1))


def nearly_equal(d: int = 256, n: int = 64) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Tokens (200, d), and weights under which the pre-activations of features 2j and 2j + 1 are
    some roundings apart: less than what a float32 product is off by.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, d, generator=generator) + 3
    encoder = torch.randn(d, n, generator=generator)
    encoder[:, 1::2] = encoder[:, ::2]
    at = encoder[:8, 1::2]
    encoder[:8, 1::2] = at + at.abs() * 2e-6 * torch.randn(at.shape, generator=generator)
    return x, {"W_enc": encoder, "W_dec": torch.randn(n, d, generator=generator)}


@pytest.mark.parametrize(
    "kind", ["topk", "topk, signed", "abstopk", "groupmax", "jumprelu", "gated", "scaled"]
)
def test_what_float32_cannot_decide_is_decided_as_in_float64(kind):
    x, tensors = nearly_equal()
    n = tensors["W_enc"].shape[1]
    products = (x.double() @ tensors["W_enc"].double()).numpy()
    exact = products.astype(np.float32)  # rounded once
    wanted: Any = np.zeros_like(exact)
    k = 5
    if kind in ("topk", "topk, signed", "scaled"):
        architecture = Architecture("topk", k, signed=kind == "topk, signed")
        if kind == "scaled":
            tensors["scale"] = torch.full((n,), 3.0)
            exact = (products * 3).astype(np.float32)
        np.put_along_axis(wanted, np.argsort(-exact, axis=1, kind="stable")[:, :k], 1, axis=1)
    elif kind == "abstopk":
        architecture = Architecture("abstopk", k)
        np.put_along_axis(
            wanted, np.argsort(-np.abs(exact), axis=1, kind="stable")[:, :k], 1, axis=1
        )
    elif kind == "groupmax":
        architecture = Architecture("groupmax", 4)
        groups = exact.reshape(len(x), 4, -1)
        np.put_along_axis(wanted.reshape(groups.shape), groups.argmax(2)[..., None], 1, axis=2)
        wanted *= exact > 0
    elif kind == "jumprelu":
        architecture = Architecture("jumprelu")
        # Just below, at or just above the pre-activation of a token, if positive.
        near = exact.diagonal() * (1 + 1e-7 * np.arange(-n // 2, n // 2)).astype(np.float32)
        tensors["threshold"] = torch.from_numpy(near)
        wanted = (exact > near) & (exact > 0)
    else:
        architecture = Architecture("relu")
        gate = -exact.diagonal() * (1 + 1e-7 * np.arange(-n // 2, n // 2)).astype(np.float32)
        tensors |= {"b_gate": torch.from_numpy(gate), "r_mag": torch.zeros(n)}
        tensors["b_enc"] = torch.full((n,), 1000.0)
        wanted = products + gate > 0
    sae = SparseAutoencoder(tensors, architecture)
    found = densify(sae.encode(x), "sparse", n).numpy() != 0
    plain = sae.encode_dense(x).numpy() != 0
    np.testing.assert_array_equal(found, wanted.astype(bool))
    assert (plain != found).any(), "float32 decides them all: no test"


def test_many_equals_are_no_matter_of_rounding():
    """Features that are all the same are not computed again, each for each token."""
    tensors = {"W_enc": torch.ones(4, 300), "W_dec": torch.ones(300, 4)}
    sae = SparseAutoencoder(tensors, Architecture("topk", 2))
    assert sae.encode(torch.ones(5, 4))["indices"].tolist() == [[0, 1]] * 5

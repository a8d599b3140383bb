"""overcomplete's files: whole modules and state dicts, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assay.io.saes import Settings, read_sae
from assay.sae import open_sae
from overcomplete_stubs import autoencoder, dictionary, function, linear, module, save
from slow_autoencoder import Act, D, N, check, randn, relu, run, top

Codes = tuple[Tensor, Tensor]

K = 3
POINTS = 5
NORMALIZATIONS = ["l2", "max_l2", "l1", "max_l1", "identity"]


def encoder() -> Tensor:
    return randn(N, D, seed=1)


def bias() -> Tensor:
    return 0.3 * randn(N, seed=2)


def rows() -> Tensor:
    return randn(N, D, seed=3)


def normalized(weights: Tensor, by: str) -> Tensor:
    """Row by row, in float64."""
    exact = weights.double()
    order = 1 if by.endswith("1") else 2
    lengths = [sum(abs(float(value)) ** order for value in row) ** (1 / order) for row in exact]
    if by == "identity":
        return exact
    if by.startswith("max"):
        return exact / max(lengths)
    return torch.stack([row / (length + 1e-8) for row, length in zip(exact, lengths, strict=True)])


def not_below(threshold: Tensor) -> Act:
    def act(pre: Tensor) -> Tensor:
        limits = threshold.double().expand(len(pre))
        kept = [p if p >= t else 0 * p for p, t in zip(pre, limits, strict=True)]
        return relu(torch.stack(kept))

    return act


def exact(act: Act, weights: Tensor, decoder: Tensor, shift: Tensor | None = None) -> Codes:
    """Codes and reconstruction by an encoder (n, d) and a decoder (n, d), nothing taken off."""
    nothing = torch.zeros(D)
    shift = torch.zeros(N) if shift is None else shift
    tensors = {"W_enc": weights.T, "b_enc": shift, "W_dec": decoder, "b_dec": nothing}
    return run(tensors, act, centers=False)


THRESHOLDS = 0.5 * randn(N, seed=9) - 1
TOP = top(K, last=relu)
KINDS: dict[str, tuple[dict[str, Any], Act, dict[str, Any]]] = {
    "base.SAE": ({}, relu, {"activation": "relu"}),
    "topk_sae.TopKSAE": ({"top_k": K}, TOP, {"activation": "topk", "k": K}),
    "batchtopk_sae.BatchTopKSAE": (
        {"top_k": 50, "threshold_momentum": 0.9, "running_threshold": torch.tensor(1.25)},
        not_below(torch.tensor(1.25)),
        {"activation": "batchtopk", "threshold": 1.25},
    ),
    "jump_sae.JumpSAE": (
        {
            "thresholds": nn.Parameter(THRESHOLDS),
            "kernel_fn": function("kernels.silverman_kernel"),
            "bandwidth": torch.tensor(1e-3),
        },
        not_below(THRESHOLDS.exp()),
        {},
    ),
}
"""Attributes, the activation, and what has to be typed of a state dict, with a normalization."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_every_kind(tmp_path: Path, kind: str, trains: bool, whole: bool) -> None:
    attributes, act, typed = KINDS[kind]
    decoder = normalized(rows(), "l2").float()
    stored = None if trains else decoder
    made = autoencoder(
        kind, linear(encoder(), bias()), dictionary(rows(), fused=stored), **attributes
    ).train(trains)
    wanted = exact(act, encoder(), decoder, bias())
    if whole:
        read = check(save(made, tmp_path / "model.pt"), wanted)
    else:
        torch.save(made.state_dict(), tmp_path / "state_dict.pt")
        read = check(tmp_path / "state_dict.pt", wanted, normalization="l2", **typed)
    assert read.library == "overcomplete"
    assert read.normalization == "l2"
    assert not {"b_out", "center"} & read.tensors.keys()


@pytest.mark.parametrize("by", NORMALIZATIONS)
@pytest.mark.parametrize("whole", [True, False])
def test_the_dictionary_is_normalized_and_multiplied(tmp_path: Path, by: str, whole: bool) -> None:
    wanted = exact(relu, encoder(), normalized(rows(), by) * torch.tensor(0.7).exp(), bias())
    made = autoencoder("base.SAE", linear(encoder(), bias()), dictionary(rows(), by, 0.7))
    if whole:
        check(save(made, tmp_path / "any.pt"), wanted)
        check(tmp_path / "any.pt", wanted, activation="relu", normalization=by)
    else:
        torch.save(made.state_dict(), tmp_path / "any.pth")
        check(tmp_path / "any.pth", wanted, activation="relu", normalization=by)


def test_in_evaluation_mode_the_dictionary_is_what_it_came_to(tmp_path: Path) -> None:
    fused = randn(N, D, seed=12)
    made = autoencoder("base.SAE", linear(encoder(), bias()), dictionary(rows(), fused=fused))
    check(save(made, tmp_path / "model.pt"), exact(relu, encoder(), fused, bias()))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.2])
@pytest.mark.parametrize("whole", [True, False])
def test_batch_normalization_is_that_of_its_running_statistics(
    tmp_path: Path, affine: bool, eps: float, whole: bool
) -> None:
    normalizer = nn.BatchNorm1d(N, eps=eps, affine=affine)
    normalizer.running_mean, normalizer.running_var = randn(N, seed=6), randn(N, seed=7).abs() + 0.1
    gain, shift = torch.ones(N), torch.zeros(N)
    if affine:
        gain, shift = randn(N, seed=8), randn(N, seed=10)
        normalizer.weight, normalizer.bias = nn.Parameter(gain), nn.Parameter(shift)
    scale = gain.double() / (normalizer.running_var.double() + (eps if whole else 1e-5)).sqrt()
    weights = encoder().double() * scale[:, None]
    moved = (bias().double() - normalizer.running_mean.double()) * scale + shift.double()
    wanted = exact(relu, weights, normalized(rows(), "l2"), moved)
    made = autoencoder("base.SAE", linear(encoder(), bias(), normalizer), dictionary(rows()))
    if whole:
        read = check(save(made, tmp_path / "model.pt"), wanted)
        assert read.notes == ()
    else:
        torch.save(made.state_dict(), tmp_path / "model.pt")
        read = check(tmp_path / "model.pt", wanted, activation="relu", normalization="l2")
        assert "eps of the batch normalization" in read.notes[0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_an_encoder_that_may_be_tied(
    tmp_path: Path, tied: bool, has_bias: bool, whole: bool
) -> None:
    decoder = dictionary(rows(), "max_l2", 0.3)
    coder = module("modules.TieableEncoder")
    coder.register_parameter("weight", None if tied else nn.Parameter(encoder()))
    coder.register_parameter("bias", nn.Parameter(bias()) if has_bias else None)
    if tied:
        coder.tied_to = decoder
    exact_rows = normalized(rows(), "max_l2") * torch.tensor(0.3).exp()
    weights = exact_rows if tied else encoder()
    wanted = exact(TOP, weights, exact_rows, bias() if has_bias else None)
    made = autoencoder("topk_sae.TopKSAE", coder, decoder, top_k=K)
    if whole:
        check(save(made, tmp_path / "model.pt"), wanted)
    else:
        torch.save(made.state_dict(), tmp_path / "model.pt")
        typed = {"activation": "topk", "k": K, "normalization": "max_l2"}
        check(tmp_path / "model.pt", wanted, **typed)


def archetypes(
    combinations: Tensor, *, delta: float = 0.5, fused: Tensor | None = None
) -> nn.Module:
    made = module(
        "archetypal_dictionary.RelaxedArchetypalDictionary",
        in_dimensions=D,
        nb_concepts=N,
        device="cpu",
        delta=delta,
        nb_candidates=POINTS,
        C=randn(POINTS, D, seed=20),
        W=nn.Parameter(combinations),
        Relax=nn.Parameter(0.2 * randn(N, D, seed=21)),
        multiplier=nn.Parameter(torch.tensor(0.4)),
    )
    made.__dict__["_fused_dictionary"] = fused
    return made.train(fused is None)


def combined(combinations: Tensor, delta: float) -> Tensor:
    """Archetypes row by row: convex combinations, and Relax of at most delta."""
    found = []
    for weights, moved in zip(combinations, 0.2 * randn(N, D, seed=21), strict=True):
        positive = weights.double().clamp(min=0)
        far = min(1.0, delta / float(moved.double().norm()))
        convex = positive / (positive.sum() + 1e-8) @ randn(POINTS, D, seed=20).double()
        found.append((convex + moved.double() * far) * torch.tensor(0.4).double().exp())
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["topk_sae.TopKSAE", "jump_sae.JumpSAE"])
@pytest.mark.parametrize("delta", [0.3, 10.0])
def test_archetypes_as_they_come_to_in_evaluation(tmp_path: Path, kind: str, delta: float) -> None:
    attributes, act, _ = KINDS[kind]
    weights = randn(N, POINTS, seed=22)
    wanted = exact(act, encoder(), combined(weights, delta), bias())
    decoder = archetypes(weights, delta=delta)
    made = autoencoder(
        f"rasae.RA{kind.partition('.')[2]}", linear(encoder(), bias()), decoder, **attributes
    )
    read = check(save(made, tmp_path / "model.pt"), wanted)
    assert read.normalization is None
    fused = randn(N, D, seed=23)
    made.dictionary = archetypes(weights, delta=delta, fused=fused)
    wanted = exact(act, encoder(), fused, bias())
    check(save(made, tmp_path / "model.pt"), wanted)


def test_a_state_dict_of_archetypes_has_to_be_one_of_evaluation(tmp_path: Path) -> None:
    weights = randn(N, POINTS, seed=22)
    weights[0] = -1  # A row without points stays without.
    convex = weights.clamp(min=0) / (weights.clamp(min=0).sum(1, keepdim=True) + 1e-8)
    path = tmp_path / "state_dict.pt"
    made = autoencoder("rasae.RATopKSAE", linear(encoder(), bias()), archetypes(convex), top_k=K)
    torch.save(made.state_dict(), path)
    wanted = exact(TOP, encoder(), combined(convex, 1e9), bias())
    check(path, wanted, activation="topk", k=K)
    with pytest.raises(ValueError, match="found normalization l2 typed, and the file says none"):
        read_sae(path, Settings(activation="topk", k=K, normalization="l2"))
    for spoilt in (weights, 1.01 * convex, 0.5 * convex):
        made.dictionary = archetypes(spoilt)
        torch.save(made.state_dict(), path)
        with pytest.raises(ValueError, match=r"rows of W do not sum to 1 yet"):
            read_sae(path, Settings(activation="topk", k=K))


@pytest.mark.parametrize(
    ("typed", "missing"),
    [
        ({}, "normalization and activation (relu, topk with k, or batchtopk with threshold)"),
        ({"activation": "topk"}, "normalization and k"),
        ({"activation": "topk", "normalization": "l2"}, "k"),
        ({"activation": "topk", "k": K}, "normalization"),
        ({"activation": "batchtopk", "normalization": "l2"}, "threshold"),
        ({"k": K, "normalization": "l2"}, "activation (relu, topk"),
    ],
)
def test_what_a_state_dict_does_not_say_has_to_be_typed(
    tmp_path: Path, typed: dict[str, Any], missing: str
) -> None:
    made = autoencoder("base.SAE", linear(encoder(), bias()), dictionary(rows()))
    torch.save(made.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="is a state dict, which does not say") as refused:
        read_sae(tmp_path, Settings(**typed))
    assert f"does not say {missing}" in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "typed", "message"),
    [
        ("topk_sae.TopKSAE", {"k": 4}, "found k 4 typed, and the file says 3"),
        ("topk_sae.TopKSAE", {"activation": "relu"}, "found activation relu typed"),
        ("base.SAE", {"normalization": "l1"}, "found normalization l1 typed, and the file says l2"),
        ("batchtopk_sae.BatchTopKSAE", {"threshold": 1.0}, "found threshold 1.0 typed, and the"),
        ("batchtopk_sae.BatchTopKSAE", {"k": 4}, "found k 4 typed"),
        ("jump_sae.JumpSAE", {"threshold": 1.0}, "found threshold 1.0 typed, and the file says"),
    ],
)
def test_what_is_typed_may_not_contradict_a_module(
    tmp_path: Path, kind: str, typed: dict[str, Any], message: str
) -> None:
    attributes, *_ = KINDS[kind]
    made = autoencoder(kind, linear(encoder(), bias()), dictionary(rows()), **attributes)
    save(made, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message):
        read_sae(tmp_path, Settings(**typed))


def test_the_k_that_a_batch_top_k_was_trained_with_may_be_typed(tmp_path: Path) -> None:
    attributes, act, typed = KINDS["batchtopk_sae.BatchTopKSAE"]
    made = autoencoder(
        "batchtopk_sae.BatchTopKSAE", linear(encoder(), bias()), dictionary(rows()), **attributes
    )
    wanted = exact(act, encoder(), normalized(rows(), "l2"), bias())
    check(save(made, tmp_path / "model.pt"), wanted, k=50, **typed)
    torch.save(made.state_dict(), tmp_path / "model.pt")
    check(tmp_path, wanted, k=50, normalization="l2", **typed)


def norms(second: nn.Module) -> nn.Module:
    return autoencoder("base.SAE", linear(encoder(), bias(), second), dictionary(rows()))


def changed(change: Callable[[Any], object]) -> nn.Module:
    made = autoencoder("topk_sae.TopKSAE", linear(encoder(), bias()), dictionary(rows()), top_k=K)
    change(made)
    return made


def deeper(made: Any) -> None:
    made.encoder.mlp_blocks.append(nn.Sequential(nn.Linear(D, D), nn.Identity(), nn.ReLU()))


def hooked(made: Any) -> None:
    made.encoder._forward_hooks[0] = function("dictionary.normalize_l2")


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "layer norm": (norms(nn.LayerNorm(N)), "found LayerNorm at encoder.final_block.1, wanted"),
    "no statistics": (norms(nn.BatchNorm1d(N, track_running_stats=False)), "no running statistics"),
    "blocks": (changed(deeper), "found Sequential at encoder.mlp_blocks.0, wanted nothing"),
    "hook": (changed(hooked), "found hooks at encoder, which may change the codes"),
    "gelu": (
        changed(lambda made: setattr(made.encoder, "final_activation", nn.GELU())),
        "found GELU at encoder.final_activation, wanted ReLU",
    ),
    "no activation": (
        changed(lambda made: delattr(made.encoder, "final_activation")),
        "its encoder has no activation, wanted relu",
    ),
    "no linear layer": (
        changed(lambda made: setattr(made.encoder, "final_block", nn.Sequential(nn.Identity()))),
        "found Identity at encoder.final_block.0, wanted Linear",
    ),
    "attribute": (
        changed(lambda made: setattr(made, "temperature", 2.0)),
        "found the attribute temperature as the whole, which could change the codes",
    ),
    "module": (
        changed(lambda made: setattr(made, "second", nn.Identity())),
        "found Identity at second, wanted nothing",
    ),
    "tensor": (
        changed(lambda made: made.register_buffer("shift", torch.ones(D))),
        "found shift as well",
    ),
    "no dictionary": (
        changed(lambda made: delattr(made, "dictionary")),
        "holds no encoder and dictionary",
    ),
    "no top_k": (changed(lambda made: setattr(made, "top_k", None)), "top_k is a NoneType"),
    "top_k of 0": (changed(lambda made: setattr(made, "top_k", 0)), "found k = 0 for topk"),
    "no threshold": (
        autoencoder(
            "batchtopk_sae.BatchTopKSAE",
            linear(encoder(), bias()),
            dictionary(rows()),
            top_k=5,
            running_threshold=None,
        ),
        "its running_threshold is not set, which training does",
    ),
    "thresholds": (
        autoencoder(
            "batchtopk_sae.BatchTopKSAE",
            linear(encoder(), bias()),
            dictionary(rows()),
            top_k=5,
            running_threshold=torch.ones(2),
        ),
        "running_threshold is no single number",
    ),
    "fused": (
        autoencoder(
            "base.SAE", linear(encoder(), bias()), dictionary(rows(), fused=torch.ones(N, D + 1))
        ),
        r"_fused_dictionary is \(12, 7\), wanted \(12, 6\)",
    ),
    "not fused": (
        changed(lambda made: made.dictionary.train(False)),
        "holds a dict that is no state dict",
    ),
    "identity": (
        autoencoder("base.SAE", module("modules.IdentityEncoder"), dictionary(rows())),
        "found IdentityEncoder at encoder",
    ),
    "normalization": (
        changed(lambda made: setattr(made.dictionary, "normalization", "l2")),
        "the dictionary's normalization is not known here",
    ),
    "another dictionary": (
        changed(
            lambda made: setattr(
                made, "encoder", module("modules.TieableEncoder", tied_to=dictionary(rows()))
            )
        ),
        "its encoder is tied to another dictionary than its own",
    ),
    "a part": (linear(encoder(), bias()), "found MLPEncoder as the whole, wanted SAE or"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_module_that_is_not_understood_is_refused(tmp_path: Path, name: str) -> None:
    made, message = REFUSED[name]
    save(made, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message):
        read_sae(tmp_path)


@pytest.mark.parametrize("kind", ["mp_sae.MpSAE", "omp_sae.OMPSAE", "qsae.QSAE"])
def test_other_kinds_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    made = autoencoder(kind, linear(encoder(), bias()), dictionary(rows()), k=5, dropout=None)
    save(made, tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match=f"found {kind.partition('.')[2]} as the whole, wanted SAE"
    ):
        read_sae(tmp_path)


STATE = {
    "encoder.final_block.0.weight": encoder(),
    "encoder.final_block.0.bias": bias(),
    "dictionary._weights": rows(),
    "dictionary.multiplier": torch.tensor(0.0),
}
NORMALIZER = ("bias", "weight", "running_mean", "running_var")
WITHOUT = {name: tensor for name, tensor in STATE.items() if not name.startswith("encoder")}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (STATE | {"Q": torch.ones(4)}, "found Q as well"),
        (WITHOUT, "has no linear encoder, wanted"),
        (STATE | {"encoder.final_block.1.weight": torch.ones(N)}, "found encoder.final_block.1.w"),
        (
            STATE | {f"encoder.final_block.1.{name}": torch.ones(N) for name in NORMALIZER[1:]},
            "wanted encoder.final_block.1.bias as well",
        ),
        (STATE | {"encoder.mlp_blocks.0.0.weight": rows()}, "found encoder.mlp_blocks.0.0.weight"),
        (STATE | {"encoder.tied_to._weights": 2 * rows()}, "is not the dictionary's, to which"),
        (STATE | {"encoder.tied_to.bias": rows()}, "is not the dictionary's, to which"),
        (STATE | {"dictionary._weights": torch.ones(N)}, "the dictionary's tensors are no matrice"),
        (STATE | {"dictionary._weights": torch.ones(0, D)}, "the dictionary's tensors are no"),
        (STATE | {"dictionary.multiplier": torch.ones(2)}, "the dictionary's tensors are no"),
        (STATE | {"dictionary._weights": torch.ones(N, D + 1)}, "found an encoder 6 x 12 and a"),
        (
            WITHOUT | {"dictionary._weights": rows().to(torch.complex64)},
            "it needs torch.ComplexFloatStorage",
        ),
        (
            STATE
            | {f"encoder.final_block.1.running_{name}": torch.ones(3) for name in ("mean", "var")},
            r"the batch normalization is of \(3,\) features, wanted 12",
        ),
    ],
)
def test_a_state_dict_of_another_formula_is_refused(
    tmp_path: Path, state: dict[str, Tensor], message: str
) -> None:
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message):
        read_sae(tmp_path, Settings(activation="relu", normalization="max_l1"))


def test_archetypes_that_disagree_are_refused(tmp_path: Path) -> None:
    made = archetypes(torch.ones(N, POINTS + 1) / (POINTS + 1))
    path = save(
        autoencoder("rasae.RATopKSAE", linear(encoder(), bias()), made, top_k=K),
        tmp_path / "model.pt",
    )
    with pytest.raises(ValueError, match=r"found W 12 x 6, C \(5, 6\) and Relax \(12, 6\)"):
        read_sae(path)


def test_another_activation_than_the_library_has_is_refused(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="found activation abstopk typed, wanted relu, topk or"):
        read_sae(tmp_path, Settings(activation="abstopk", k=3, normalization="l2"))


def test_a_code_at_its_threshold_is_kept(tmp_path: Path) -> None:
    ones = linear(encoder(), torch.ones(N))
    thresholds = nn.Parameter(torch.zeros(N))
    jump = autoencoder("jump_sae.JumpSAE", ones, dictionary(rows()), thresholds=thresholds)
    batch = autoencoder(
        "batchtopk_sae.BatchTopKSAE", ones, dictionary(rows()), top_k=5, running_threshold=1.0
    )
    path = tmp_path / "model.pt"
    typed = Settings("batchtopk", threshold=1.0, normalization="l2")
    for made, said in ((jump, Settings(normalization="l2")), (batch, typed)):
        save(made, path)
        stored = [read_sae(path)]
        torch.save(made.state_dict(), path)
        stored.append(read_sae(path, said))
        for each in stored:
            codes = open_sae(each).encode_dense(torch.zeros(1, D))
            assert torch.equal(codes, torch.ones(1, N))

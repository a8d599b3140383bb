"""Every entry point on every kind of tensor and under every setting of torch's: the same results,
and the caller's own are left alone.
"""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from assay.architecture import Architecture
from assay.encodings import KINDS, Form
from assay.numerics.codes import ComputedCodes, TensorCodes, gather_columns, measure_l0, sparsify
from assay.numerics.dictionary import open_dictionary
from assay.numerics.kmeans.estimator import MiniBatchKMeans
from assay.numerics.kmeans.seeding import kmeans_plus_plus
from assay.numerics.kmeans.step import mini_batch_step
from assay.numerics.moments import StreamingMoments, standardize, unstandardize
from assay.numerics.pca import Convergence, StreamingPCA
from assay.numerics.plausibility import check_statistics
from assay.numerics.probe import LogisticProbe1d
from assay.numerics.ranking import rank_features
from assay.numerics.reconstruction_error import sum_errors
from assay.numerics.sae import SparseAutoencoder

N, D, K, CLASSES = 120, 6, 8, 3
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32]


def _tokens():
    """Whole numbers that every dtype holds, (N, D) float32, about planted centers; the last
    dimension is constant.
    """
    generator = torch.Generator().manual_seed(0)
    planted = torch.randint(-90, 90, (5, D), generator=generator)
    x = planted[torch.randint(5, (N,), generator=generator)] + torch.randint(
        -9, 9, (N, D), generator=generator
    )
    x[:, -1] = 7
    return x.float()


def _labels():
    return torch.randint(-1, CLASSES, (N,), generator=torch.Generator().manual_seed(1))


def _stream(x):
    return lambda epoch: x[torch.randperm(N, generator=torch.Generator().manual_seed(epoch))].split(
        40
    )


def _as_sparse(x):
    return ComputedCodes(
        "sparse",
        N,
        D,
        4,
        lambda size, start: (
            sparsify({"values": each.float()}, top_k=4) for each in x[start:].split(size)
        ),
    )


@dataclass(frozen=True)
class _Fitted:
    kmeans: MiniBatchKMeans
    pca: StreamingPCA
    weights: dict[str, torch.Tensor]
    statistics: dict[str, torch.Tensor]
    probes: dict[str, LogisticProbe1d]


@cache
def _fitted():
    x, generator = _tokens(), torch.Generator().manual_seed(2)
    shapes = {"W_enc": (D, 16), "b_enc": (16,), "W_dec": (16, D), "b_out": (D,)}
    weights = {
        name: torch.randn(shape, generator=generator, dtype=torch.float32)
        for name, shape in shapes.items()
    }
    return _Fitted(
        MiniBatchKMeans(K, max_iter=2).fit(_stream(x)),
        StreamingPCA().partial_fit(x),
        weights,
        StreamingMoments().partial_fit(x).state_dict(),
        {
            str(weight): LogisticProbe1d(1e-3, class_weight=weight).fit(x, _labels(), CLASSES)
            for weight in (None, "balanced")
        },
    )


def _fit_kmeans(x, **parameters):
    model = MiniBatchKMeans(K, **parameters).fit(_stream(x))
    return model.checkpoint()[0] | model.state_dict()


def _step_kmeans(x):
    model = MiniBatchKMeans(K)
    for batch in x.split(40):
        model.partial_fit(batch)
    return model.checkpoint()[0]


def _fit_pca(x):
    pca = StreamingPCA(whiten=True)
    convergence = Convergence(pca)
    for step, batch in enumerate(x.split(40), 1):
        pca.partial_fit(batch)
        convergence.observe(step)
    return (
        convergence.checkpoint()[0]
        | pca.merge(StreamingPCA().partial_fit(x)).state_dict()
        | {"z": pca.transform(x)}
    )


def _errors(measure, x):
    sums = sum_errors(measure, x.split(50))
    return {
        str(k): torch.tensor([each.residual, each.total_raw], dtype=torch.float64)
        for k, each in sums.items()
    }


ARCHITECTURES = {
    "relu": Architecture("relu"),
    "topk": Architecture("topk", 3),
    "signed topk": Architecture("topk", 3, signed=True),
    "abstopk": Architecture("abstopk", 3),
    "jumprelu": Architecture("jumprelu"),
    "groupmax": Architecture("groupmax", 4),
    "matching pursuit": Architecture("matching_pursuit", max_iterations=4),
    "gated": Architecture("relu"),
    "layer norm": Architecture("relu", norm="layer_norm"),
    "rescaled": Architecture("topk", 3, norm="constant_norm_rescale"),
}


def _autoencoder(kind, **options):
    weights, per_feature = _fitted().weights, torch.linspace(-5, 5, 16, dtype=torch.float32)
    if kind == "jumprelu":
        weights = weights | {"threshold": per_feature}
    if kind == "gated":
        weights = weights | {"b_gate": per_feature, "r_mag": per_feature / 5}
    if kind == "matching pursuit":
        weights = {"W_dec": torch.nn.functional.normalize(weights["W_dec"])}
    if kind == "topk":
        weights = weights | {"center": weights["b_out"], "scale": per_feature.abs()}
    return SparseAutoencoder(weights, ARCHITECTURES[kind], **options)


def _fit_probe(codes, **parameters):
    probe = LogisticProbe1d(1e-3, slab_rows=50, **parameters).fit(codes, _labels(), CLASSES)
    judged = probe.judge(codes, _labels())
    probe.certify(codes, _labels(), torch.tensor([[0, 0]]))
    found = {
        "loss": judged.loss,
        "ap": judged.average_precision,
        "f1": judged.f1,
        "coef": probe.coef_,
        "base": probe.base_loss(_labels()),
    }
    return probe.state_dict() | found


def _merge_sketches(x):
    probe = LogisticProbe1d(1e-3)
    first = probe.sketch(x[:60], _labels()[:60], CLASSES)
    first.merge(probe.sketch(x[60:], _labels()[60:], CLASSES, like=first))
    return probe.fit_sketch(first).state_dict()


def _encoded(form, x):
    state = _fitted().kmeans.state_dict() if form.is_by_center else _fitted().pca.state_dict()
    return open_dictionary(form, state).encode(x)


def _whitened():
    return StreamingPCA.from_state(_fitted().pca.state_dict() | {"whiten": torch.tensor(True)})


def _of_autoencoder(activation, x):
    sae = _autoencoder(activation)
    return sae.encode(x) | {
        "left": sae.residual(x),
        "codes": sae.encode_dense(x),
        "back": sae.reconstruct(x),
    }


ENTRIES: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "moments": lambda x: StreamingMoments().partial_fit(x[:50]).partial_fit(x[50:]).state_dict(),
    "statistics": lambda x: (
        check_statistics(x, _fitted().statistics["mean"], _fitted().statistics["std"]) or {}
    ),
    "kmeans fit": _fit_kmeans,
    "kmeans fit, several seedings": partial(
        _fit_kmeans, n_init=2, init_size=40, tol=1e-3, max_iter=3, reassignment_ratio=0.3
    ),
    "kmeans steps": _step_kmeans,
    "kmeans predict": lambda x: {"labels": _fitted().kmeans.predict(x)},
    "kmeans assign": lambda x: dict(zip("ls", _fitted().kmeans.assign(x), strict=True)),
    "kmeans transform": lambda x: {"distances": _fitted().kmeans.transform(x)},
    "kmeans errors": lambda x: _errors(
        partial(_fitted().kmeans.reconstruction_errors, std=_fitted().statistics["std"]), x
    ),
    "pca fit": _fit_pca,
    "pca project": lambda x: dict(zip("zl", _fitted().pca.project(x), strict=True)),
    "pca inverse": lambda x: {"x": _fitted().pca.inverse_transform(x)},
    "pca squared errors": lambda x: {"errors": _fitted().pca.squared_errors(x, 2)},
    "pca errors": lambda x: _errors(
        partial(_fitted().pca.reconstruction_errors, std=_fitted().statistics["std"], ks=[1, 3]), x
    ),
    "pca squared errors, whitened": lambda x: {"errors": _whitened().squared_errors(x, 2)},
    "pca errors, whitened": lambda x: _errors(
        partial(_whitened().reconstruction_errors, std=_fitted().statistics["std"], ks=[1, 3]), x
    ),
    "pca-topk-00003, whitened": partial(_encoded, Form("topk", 3, whiten=True)),
    **{
        name: partial(_encoded, Form.parse_name(name))
        for name in (*(f"kmeans-{kind}" for kind in KINDS["kmeans"]), "pca-dense", "pca-topk-00003")
    },
    **{f"sae {activation}": partial(_of_autoencoder, activation) for activation in ARCHITECTURES},
    "sae of raw tokens": (
        lambda x: _autoencoder(
            "relu",
            mean=_fitted().statistics["mean"],
            std=_fitted().statistics["std"],
        ).encode(x)
    ),
    "sae errors": lambda x: _errors(
        partial(_autoencoder("relu").errors, std=_fitted().statistics["std"]), x
    ),
    "probe": _fit_probe,
    "probe, balanced": partial(_fit_probe, class_weight="balanced"),
    "probe of sparse codes": lambda x: _fit_probe(_as_sparse(x)),
    "probe of sketches": _merge_sketches,
    "probe judges": lambda x: {
        name: probe.judge(x, _labels()).loss for name, probe in _fitted().probes.items()
    },
    "gathered": lambda x: {
        "columns": gather_columns(TensorCodes(x), [(torch.tensor([2, 0]), None)], 50)[0]
    },
}
"""What takes tokens (N, D) that have to be finite, and gives tensors by name."""

MORE: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "standardize": lambda x: {
        "x": standardize(x, _fitted().statistics["mean"], _fitted().statistics["std"])
    },
    "unstandardize": lambda x: {
        "x": unstandardize(x, _fitted().statistics["mean"], _fitted().statistics["std"])
    },
    "seeds": lambda x: {"centers": kmeans_plus_plus(x, K, torch.Generator().manual_seed(0))},
    "step": lambda x: dict(
        zip(
            "cns",
            mini_batch_step(x, _fitted().kmeans.cluster_centers_, torch.ones(K, dtype=torch.int64)),
            strict=True,
        )
    ),
    "l0": lambda x: {"l0": torch.tensor(measure_l0(TensorCodes(x)), dtype=torch.float64)},
    "ranks": lambda x: {
        "ranks": rank_features(
            x.T.contiguous(), _labels(), CLASSES, torch.zeros(D, CLASSES, dtype=torch.float64)
        )
    },
    "onehot": lambda x: _fit_probe(
        ComputedCodes(
            "onehot",
            N,
            D,
            1,
            lambda size, start: ({"indices": each.argmax(1)} for each in x[start:].split(size)),
        )
    ),
}
"""What takes any."""


def _alone(batch, _):
    """A pass of one batch."""
    return [batch]


def _battery(x):
    return {
        f"{entry}: {name}": tensor
        for entry, call in (ENTRIES | MORE).items()
        for name, tensor in call(x).items()
    }


@cache
def _wanted():
    return _battery(_tokens())


def _assert_same(found, rtol=0.0, atol=0.0):
    assert found.keys() == _wanted().keys()
    for name, wanted in _wanted().items():
        assert not found[name].requires_grad, name
        torch.testing.assert_close(
            found[name],
            wanted,
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            msg=partial("{}: {}".format, name),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_entry_point_changes_its_input_and_every_dtype_gives_the_same(dtype):
    x = _tokens().to(dtype)
    before = x.clone()
    _assert_same(_battery(x))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_numpys_that_cannot_be_written_are_not(dtype):
    if dtype == torch.bfloat16:  # which numpy has not
        return
    array = _tokens().to(dtype).numpy()
    before = array.copy()
    _assert_same(_battery(torch.from_numpy(array)))
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_that_are_not_contiguous_give_the_same_but_for_rounding(dtype):
    wide = torch.full((2 * N, 2 * D), -3.0, dtype=dtype)
    x = wide[::2, 1::2]
    x.copy_(_tokens())
    before = wide.clone()
    _assert_same(_battery(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(wide, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tokens_that_want_gradients_give_the_same_and_are_let_go(dtype):
    with torch.inference_mode(False), torch.enable_grad():
        x = _tokens().to(dtype).requires_grad_()
        _assert_same(_battery(x))
        assert x.grad is None
        batch = x * 1  # of a graph, as a model's activations are
        seen = weakref.ref(batch)
        models = (
            MiniBatchKMeans(K).partial_fit(batch),
            MiniBatchKMeans(K, max_iter=1).fit(partial(_alone, batch)),
            StreamingPCA().partial_fit(batch),
            StreamingMoments().partial_fit(batch),
            LogisticProbe1d(1e-3).fit(batch, _labels(), CLASSES),
        )
        del batch
        gc.collect()
        assert seen() is None, models


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_process_settings_of_torch_change_nothing(setting, dtype, request):
    wanted = _wanted()  # before the setting is in force
    with setting:
        found = _battery(_tokens().to(dtype))
    by_rounding = any(name in request.node.name for name in ("medium", "threads"))
    _assert_same(found, **({"rtol": 1e-5, "atol": 1e-4} if by_rounding else {}))
    made_here = ("kmeans errors", "pca errors", "sae errors", "l0")
    assert not [
        name
        for name, tensor in found.items()
        if tensor.is_inference() and not name.startswith(made_here)
    ]
    assert found.keys() == wanted.keys()


def test_a_default_device_moves_nothing():
    wanted = _wanted()
    tokens, labels = _tokens(), _labels()
    with torch.device("meta"):
        model = MiniBatchKMeans(K, max_iter=2).fit(
            lambda epoch: tokens.split(40) if epoch else tokens.flip(0).split(40)
        )
        assert {
            each.device.type for each in (model.checkpoint()[0] | model.state_dict()).values()
        } == {"cpu"}
        pca = StreamingPCA().partial_fit(tokens)
        assert {each.device.type for each in (pca.checkpoint()[0] | pca.state_dict()).values()} == {
            "cpu"
        }
        probe = LogisticProbe1d(1e-3, slab_rows=50).fit(tokens, labels, CLASSES)
        assert torch.equal(probe.state_dict()["train_ce"], wanted["probe: train_ce"])
        probe.certify(tokens, labels, labels.new_zeros(1, 2))
        assert measure_l0(TensorCodes(tokens)) > 0


def test_what_was_begun_in_inference_mode_goes_on_outside_of_it_and_the_other_way_round():
    x, labels = _tokens(), _labels()
    with torch.inference_mode():
        kmeans, pca, moments = (
            MiniBatchKMeans(K).partial_fit(x),
            StreamingPCA().partial_fit(x),
            StreamingMoments().partial_fit(x),
        )
        sketch = LogisticProbe1d().sketch(x, labels, CLASSES)
        sae = _autoencoder("topk")
    for again in (torch.inference_mode(False), torch.inference_mode()):
        with again, torch.enable_grad():
            kmeans.partial_fit(x)
            pca.partial_fit(x).merge(pca)
            moments.partial_fit(x)
            sketch.merge(LogisticProbe1d().sketch(x, labels, CLASSES, like=sketch))
            assert not sae.encode(x * 1)["values"].requires_grad


def test_batches_are_made_under_the_settings_of_whoever_makes_them():
    seen = []

    def batches(*_):
        with torch.autocast("cpu", torch.bfloat16):  # which stays in force between two batches
            for batch in _tokens().split(40):
                seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
                yield batch

    codes = ComputedCodes(
        "dense", N, D, D, lambda size, start: ({"values": batch} for batch in batches(size, start))
    )
    with torch.inference_mode(False), torch.enable_grad():
        model = MiniBatchKMeans(K, max_iter=1).fit(batches)
        LogisticProbe1d(1e-3).fit(codes, _labels(), CLASSES)
    assert set(seen) == {(True, True)}
    plain = MiniBatchKMeans(K, max_iter=1).fit(lambda _: _tokens().split(40))
    assert torch.equal(model.cluster_centers_, plain.cluster_centers_)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_token_that_is_not_finite_is_refused_and_named(entry, bad):
    x = _tokens()
    x[3, 2] = bad
    with pytest.raises(ValueError, match=r"NaN or infinity, wanted finite"):
        ENTRIES[entry](x)


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
@pytest.mark.parametrize(
    "entry", ["moments", "kmeans steps", "kmeans predict", "pca fit", "sae relu"]
)
def test_tokens_that_are_no_real_numbers_are_refused(entry, dtype):
    with pytest.raises(ValueError, match=f"found a batch of {dtype}, wanted real numbers"):
        ENTRIES[entry](_tokens().to(dtype))


@pytest.mark.parametrize(
    "entry", ["kmeans fit", "kmeans steps", "kmeans predict", "kmeans transform"]
)
def test_tokens_beyond_float32_are_refused_where_centers_are_float32(entry):
    x = _tokens().double()
    x[3, 2] = -1e39
    with pytest.raises(
        ValueError, match=r"row \d+, dimension 2 is -1e\+39, wanted at most 3.40282e\+38"
    ):
        ENTRIES[entry](x)


def _spoil(tensors):
    for tensor in tensors.values():
        tensor.zero_() if tensor.dtype in (torch.bool, torch.uint8) else tensor.mul_(0).sub_(1)


def _copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[name].double().nan_to_num(), b[name].double().nan_to_num()) for name in a
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_and_checkpoints_are_snapshots(dtype):
    """Neither does a model that goes on write to what it gave, nor reach it what is done to that."""
    x = _tokens().to(dtype)
    pca = StreamingPCA().partial_fit(x[:40])
    convergence = Convergence(pca)
    convergence.observe(1)
    takers = [
        (pca.partial_fit, lambda: pca.checkpoint()[0]),
        (pca.partial_fit, pca.state_dict),
        (
            lambda x: (pca.partial_fit(x), convergence.observe(2)),
            lambda: convergence.checkpoint()[0],
        ),
    ]
    kmeans, moments = MiniBatchKMeans(K).partial_fit(x[:40]), StreamingMoments().partial_fit(x[:40])
    takers += [
        (kmeans.partial_fit, lambda: kmeans.checkpoint()[0]),
        (kmeans.partial_fit, kmeans.state_dict),
    ]
    takers += [(moments.partial_fit, moments.state_dict)]
    probe = LogisticProbe1d(1e-3).fit(x, _labels(), CLASSES)
    takers += [(lambda x: probe.fit(x, _labels().flip(0), CLASSES), probe.state_dict)]
    for go_on, take in takers:
        given = take()
        before = _copies(given)
        go_on(x)
        assert _equal(given, before), take
        now = _copies(take())
        assert not _equal(now, before), take
        _spoil(take())
        assert _equal(take(), now), take


def _resumed(make, model):
    state = model.checkpoint()[1]

    def restore(tensors):
        resumed = make().resume(tensors, state)
        return lambda: resumed.checkpoint()[0]

    return restore, lambda: model.checkpoint()[0]


def test_what_is_restored_shares_nothing_with_the_state():
    x = _tokens()
    for restore, give in (
        (lambda s: MiniBatchKMeans.from_state(s).state_dict, _fitted().kmeans.state_dict),
        _resumed(lambda: MiniBatchKMeans(K), MiniBatchKMeans(K).partial_fit(x)),
        (lambda s: StreamingPCA.from_state(s).state_dict, _fitted().pca.state_dict),
        _resumed(StreamingPCA, _fitted().pca),
        (
            lambda s: StreamingMoments.from_state(s).state_dict,
            StreamingMoments().partial_fit(x).state_dict,
        ),
        (
            lambda s: LogisticProbe1d.from_state(s).state_dict,
            _fitted().probes["balanced"].state_dict,
        ),
    ):
        state = give()
        take = restore(state)
        _spoil(state)
        for name, tensor in give().items():
            torch.testing.assert_close(take()[name], tensor, rtol=1e-15, atol=0, equal_nan=True)


@settings(deadline=None, max_examples=12)
@given(st.data())
def test_a_restored_estimator_does_all_that_the_one_it_was_made_of_does(data):
    """What a state leaves out changes nothing."""
    x, draw = _tokens(), data.draw
    std = torch.full((D,), 2.0, dtype=torch.float64)
    kmeans = MiniBatchKMeans(
        K,
        seed=draw(st.integers(0, 2**63 - 1)),
        n_init=draw(st.integers(1, 2)),
        init_size=draw(st.sampled_from([None, 40])),
        max_iter=draw(st.integers(1, 3)),
        tol=draw(st.sampled_from([0.0, 1e-2])),
        max_no_improvement=draw(st.sampled_from([None, 1])),
        reassignment_ratio=draw(st.sampled_from([0.0, 0.5])),
        decay=draw(st.sampled_from([0.1, 1.0])),
    ).partial_fit(x)
    restored = MiniBatchKMeans.from_state(kmeans.state_dict())
    assert vars(restored).keys() - {"_ready"} <= vars(kmeans).keys()
    assert {name: vars(restored)[name] for name in kmeans.state_dict() if name in vars(kmeans)} == {
        name: vars(kmeans)[name] for name in kmeans.state_dict() if name in vars(kmeans)
    }
    assert torch.equal(restored.transform(x), kmeans.transform(x))
    assert restored.reconstruction_errors(x, std) == kmeans.reconstruction_errors(x, std)
    assert torch.equal(
        restored.fit(_stream(x)).cluster_centers_, kmeans.fit(_stream(x)).cluster_centers_
    )

    pca = StreamingPCA(draw(st.sampled_from([None, 3])), whiten=draw(st.booleans())).partial_fit(x)
    other = StreamingPCA.from_state(pca.state_dict())
    assert torch.equal(other.transform(x), pca.transform(x))
    assert torch.equal(
        other.inverse_transform(pca.transform(x)), pca.inverse_transform(pca.transform(x))
    )
    assert other.reconstruction_errors(x, std, [1, 2]) == pca.reconstruction_errors(x, std, [1, 2])

    probe = LogisticProbe1d(
        draw(st.sampled_from([1e-8, 0.5])),
        class_weight=draw(st.sampled_from([None, "balanced"])),
        max_iter=draw(st.sampled_from([50, 200])),
        tol=draw(st.sampled_from([1e-16, 1e-6])),
    ).fit(x, _labels(), CLASSES)
    again = LogisticProbe1d.from_state(probe.state_dict())
    for found, wanted in zip(
        vars(again.judge(x, _labels())).values(),
        vars(probe.judge(x, _labels())).values(),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(
        again.base_loss(_labels()), probe.base_loss(_labels()), rtol=0, atol=0
    )
    pairs = torch.tensor([[0, 0], [1, 2]])
    assert again.certify(x, _labels(), pairs, bound=1.0) == probe.certify(
        x, _labels(), pairs, bound=1.0
    )
    torch.testing.assert_close(
        again.fit(x, _labels(), CLASSES).loss_,
        probe.fit(x, _labels(), CLASSES).loss_,
        rtol=0,
        atol=0,
        equal_nan=True,
    )


def test_a_probes_state_without_how_it_was_fitted_is_refused():
    state = _fitted().probes["balanced"].state_dict()
    del state["balanced"], state["ridge"]
    with pytest.raises(
        ValueError,
        match="found a probe's state without ridge, balanced, wanted all that state_dict gives",
    ):
        LogisticProbe1d.from_state(state)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_states_that_are_not_finite_are_refused(bad):
    state = _fitted().kmeans.state_dict()
    state["cluster_centers"][1, 1] = bad
    with pytest.raises(
        ValueError, match=r"found cluster_centers of torch.float32 that hold NaN, infinity"
    ):
        MiniBatchKMeans.from_state(state)
    with pytest.raises(ValueError, match=r"found cluster_centers of torch.bool"):
        MiniBatchKMeans.from_state(state | {"cluster_centers": state["cluster_centers"] > 0})
    for name in ("mean", "components", "explained_variance"):
        state = _fitted().pca.state_dict()
        state[name].view(-1)[0] = bad
        with pytest.raises(ValueError, match="found a PCA's state that holds NaN or infinity"):
            StreamingPCA.from_state(state)

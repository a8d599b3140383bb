"""What the numerics refuse: arguments out of range, and what was not fitted yet."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from assay.encodings import Form
from assay.numerics import (
    Architecture,
    Centers,
    LogisticProbe1d,
    MiniBatchKMeans,
    StreamingMoments,
    StreamingPCA,
    TensorCodes,
    best_features,
    measure_l0,
    open_dictionary,
    purity_at_k,
    sparsify,
    standardize,
    unstandardize,
)
from assay.numerics.codes import gather_columns
from assay.numerics.pca import Convergence
from assay.numerics.probe import certify_sweep, count_table, fit_sweep, judge_sweep
from assay.numerics.ranking import strongest_examples
from assay.numerics.reconstruction_error import error_sums


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


TOKENS = draw(60, 4)
LABELS = torch.arange(60) % 3


def test_a_k_means_that_was_not_fitted_says_what_to_call():
    model = MiniBatchKMeans(3)
    for read in (
        lambda: model.inertia_,
        lambda: model.cluster_centers_,
        lambda: model.counts_,
        lambda: model.predict(TOKENS),
        model.state_dict,
        model.checkpoint,
    ):
        with pytest.raises(ValueError, match="call fit or partial_fit first"):
            read()
    assert not hasattr(model, "cluster_centers_")
    assert (model.n_steps_, model.epoch_, model.history_) == (0, 0, [])
    model.seed_from([TOKENS])
    with pytest.raises(ValueError, match=r"without steps.*call fit or partial_fit first"):
        _ = model.inertia_


def test_a_probe_that_was_not_fitted_says_what_to_call():
    probe = LogisticProbe1d()
    for read in (lambda: probe.coef_, lambda: probe.fitted_, probe.state_dict):
        with pytest.raises(ValueError, match="call fit or fit_sketch first"):
            read()
    assert not hasattr(probe, "coef_")


@pytest.mark.parametrize("estimator", [StreamingPCA, StreamingMoments])
def test_streams_without_tokens_say_what_to_call(estimator):
    with pytest.raises(ValueError, match="call partial_fit"):
        _ = estimator().mean_
    assert not hasattr(estimator(), "mean_")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (TOKENS[:2], "found 2 tokens to seed from"),
        (TOKENS[:1].repeat(5, 1), "found 1 distinct tokens"),
        (torch.full((5, 4), torch.nan), "NaN or infinity"),
    ],
)
def test_a_seeding_that_fails_leaves_the_model_as_it_was(bad, message):
    wanted = MiniBatchKMeans(3).partial_fit(TOKENS)
    model = MiniBatchKMeans(3)
    with pytest.raises(ValueError, match=message):
        model.partial_fit(bad)
    assert not model.is_seeded_
    model.partial_fit(TOKENS)
    assert torch.equal(model.cluster_centers_, wanted.cluster_centers_)

    before, history = model.cluster_centers_, model.history_
    with pytest.raises(ValueError, match=message):
        model.seed_from([bad])
    assert model.is_seeded_
    assert model.cluster_centers_ is before
    assert model.history_ is history
    again = model.seed_from([TOKENS])
    assert torch.equal(
        again.cluster_centers_, MiniBatchKMeans(3).seed_from([TOKENS]).cluster_centers_
    )


def test_a_seeding_that_is_resumed_on_other_tokens_can_still_go_on():
    begun = MiniBatchKMeans(4)
    next(begun.seedings([TOKENS]))
    kept = begun.checkpoint()
    model = MiniBatchKMeans(4).resume(*kept)
    with pytest.raises(ValueError, match="give the same stream"):
        model.seed_from([TOKENS[:9]])
    for fit in (begun, model):
        fit.seed_from([TOKENS])
    assert torch.equal(model.cluster_centers_, begun.cluster_centers_)


def test_what_is_made_in_inference_mode_can_be_worked_on_after_it():
    with torch.inference_mode():
        model = MiniBatchKMeans(3).seed_from([TOKENS])
        l0 = measure_l0(TensorCodes(TOKENS))
    model.counts_ += 1
    assert model.counts_.tolist() == [1, 1, 1]
    assert l0 == 4


def test_dictionaries_of_no_known_kind_are_refused():
    kmeans = MiniBatchKMeans(3).partial_fit(TOKENS).state_dict()
    pca = StreamingPCA().partial_fit(TOKENS).state_dict()
    with pytest.raises(ValueError, match=r"found the kind 'bogus', wanted one of onehot, invdist"):
        Centers(kmeans, "bogus")
    for form in (Form("topk"), Form("dense", 2)):
        with pytest.raises(ValueError, match="wanted a K for topk and for nothing else"):
            open_dictionary(form, pca)
    with pytest.raises(ValueError, match="wanted a K for topk and for nothing else"):
        open_dictionary(Form("onehot", 1), kmeans)
    with pytest.raises(ValueError, match=r"of the kind 'bogus'; wanted one of onehot"):
        open_dictionary(Form("bogus"), kmeans)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"activation": "bogus"}, "found activation = 'bogus', wanted one of relu, topk, abstopk"),
        (
            {"activation": "relu", "norm": "bogus"},
            "found norm = 'bogus', wanted one of none, layer_norm, constant_norm_rescale",
        ),
        ({"activation": "relu", "k": 3}, "found k = 3 for relu, wanted at least 1 for topk"),
        ({"activation": "topk"}, "found k = None for topk, wanted at least 1 for topk, abstopk"),
        ({"activation": "abstopk", "k": 0}, "found k = 0 for abstopk"),
        (
            {"activation": "matching_pursuit", "max_iterations": 0},
            "found max_iterations = 0, wanted at least 1",
        ),
    ],
)
def test_an_autoencoder_of_no_known_kind_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Architecture(**given)


@pytest.mark.parametrize("move", [standardize, unstandardize])
@pytest.mark.parametrize("shape", [(1,), (), (3,), (1, 4)])
def test_statistics_are_one_number_a_dimension(move, shape):
    whole, other = torch.ones(4), torch.ones(shape)
    for name, mean, std in (("mean", other, whole), ("std", whole, other)):
        with pytest.raises(ValueError, match=rf"a {name} of shape .*wanted .\.\.\., d. and .d,."):
            move(TOKENS, mean, std)


def test_errors_are_of_one_batch_and_one_layer():
    with pytest.raises(ValueError, match="a std of shape"):
        error_sums(TOKENS, TOKENS, torch.ones(1))
    with pytest.raises(ValueError, match="wanted one shape"):
        error_sums(TOKENS, TOKENS[:1], torch.ones(4))


def test_convergence_watches_a_component_at_least():
    with pytest.raises(ValueError, match="found watched = 0, wanted at least 1"):
        Convergence(StreamingPCA(), watched=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "found top_k = None and margin = None, wanted one of them"),
        ({"top_k": 1, "margin": 1.0}, "wanted one of them"),
        ({"top_k": 0}, "found top_k = 0, wanted 1 to 4"),
        ({"top_k": 5}, "found top_k = 5, wanted 1 to 4"),
        ({"margin": -1.0}, "found margin = -1.0, wanted at least 0"),
        ({"margin": math.nan}, "found margin = nan"),
    ],
)
def test_sparsify_takes_one_rule_within_range(given, message):
    with pytest.raises(ValueError, match=message):
        sparsify({"values": TOKENS}, **given)


def test_sparsify_takes_dense_codes():
    sparse = sparsify({"values": TOKENS}, top_k=2)
    with pytest.raises(ValueError, match="wanted a dense batch"):
        sparsify(sparse, top_k=1)


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        (torch.tensor([1.0, torch.nan]), torch.tensor([0, 1]), "values hold NaN"),
        (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1]), "one label for each row"),
        (torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]), "wanted torch.int64"),
    ],
)
def test_purity_is_of_numbers_with_a_label_each(values, labels, message):
    with pytest.raises(ValueError, match=message):
        purity_at_k(values, labels, 1)


def test_examples_are_whole_and_of_numbers():
    counted = torch.ones(6, dtype=torch.bool)
    for patches, k, flags in (
        (4, 1, counted),
        (0, 1, counted),
        (3, 0, counted),
        (3, 1, counted[1:]),
    ):
        with pytest.raises(ValueError, match="wanted whole examples"):
            strongest_examples(draw(2, 6), flags, patches, k)
    with pytest.raises(ValueError, match="values hold NaN"):
        strongest_examples(torch.full((2, 6), torch.nan), counted, 3, 1)


@pytest.mark.parametrize("value", [0, -1])
def test_slabs_and_batches_hold_something(value):
    for name in ("slab_rows", "slab_features"):
        with pytest.raises(ValueError, match=f"found {name} = {value}, wanted at least 1"):
            LogisticProbe1d(**{name: value})
        probe = LogisticProbe1d()
        setattr(probe, name, value)
        with pytest.raises(ValueError, match=f"found {name} = {value}, wanted at least 1"):
            probe.fit(TOKENS, LABELS, 3)
    codes = TensorCodes(TOKENS)
    for read in (
        lambda: count_table(codes, LABELS, 3, value),
        lambda: measure_l0(codes, value),
        lambda: gather_columns(codes, [(torch.tensor([0]), None)], value),
    ):
        with pytest.raises(ValueError, match=f"{value}.*wanted at least 1"):
            read()


@pytest.mark.parametrize(
    "parameters",
    [
        {"ridge": math.inf},
        {"ridge": math.nan},
        {"max_iter": 0},
        {"tol": -1e-9},
        {"tol": math.inf},
        {"tol": math.nan},
    ],
)
def test_parameters_of_probes_have_ranges(parameters):
    (name,) = parameters
    with pytest.raises(ValueError, match=f"{name} is .*wanted"):
        LogisticProbe1d(**parameters)


def sparse_codes():
    class Codes:
        format, n_rows, n_features, k = "sparse", 60, 4, 2

        def batches(self, batch_size, start=0):
            for first in range(start, 60, batch_size):
                yield sparsify({"values": TOKENS[first : first + batch_size]}, top_k=2)

    return Codes()


def test_probes_are_of_a_k_that_the_codes_have():
    probe, codes = LogisticProbe1d(), sparse_codes()
    (fitted,) = fit_sweep(probe, codes, LABELS, 3, [2]).values()
    pairs = torch.tensor([[0, 0]])
    for act in (
        lambda k: fit_sweep(probe, codes, LABELS, 3, [k]),
        lambda k: judge_sweep({k: fitted}, codes, LABELS),
        lambda k: certify_sweep({k: fitted}, codes, LABELS, {k: pairs}),
    ):
        for k in (3, 0):
            with pytest.raises(ValueError, match=rf"of 2 entries a row, wanted .* {k}"):
                act(k)
    with pytest.raises(ValueError, match="found dense codes"):
        judge_sweep({2: fitted}, TOKENS, LABELS)


def test_no_probes_and_no_pairs_are_refused():
    probe = LogisticProbe1d().fit(TOKENS, LABELS, 3)
    others: Any = {2: torch.tensor([[0, 0]])}
    with pytest.raises(ValueError, match="found no K"):
        fit_sweep(probe, TOKENS, LABELS, 3, ks=())
    for act in (
        lambda: judge_sweep({}, TOKENS, LABELS),
        lambda: certify_sweep({}, TOKENS, LABELS, {}),
    ):
        with pytest.raises(ValueError, match="found no probes"):
            act()
    with pytest.raises(ValueError, match=r"found no pairs for K = \[None\]"):
        certify_sweep({None: probe}, TOKENS, LABELS, others)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([[0, -1]], "pairs name classes -1 to -1, wanted 0 to 2"),
        ([[0, 3]], "pairs name classes 3 to 3, wanted 0 to 2"),
        ([[-1, 0]], "pairs name features -1 to -1, wanted 0 to 3"),
        ([[4, 0]], "pairs name features 4 to 4, wanted 0 to 3"),
        ([[0.0, 1.0]], "pairs are torch.float32"),
        ([0, 1], r"wanted torch.int64 of shape \(p, 2\)"),
    ],
)
def test_pairs_that_are_certified_are_pairs(pairs, message):
    probe = LogisticProbe1d().fit(TOKENS, LABELS, 3)
    with pytest.raises(ValueError, match=message):
        probe.certify(TOKENS, LABELS, torch.tensor(pairs), n_random=0)
    with pytest.raises(ValueError, match="found n_random = -1"):
        probe.certify(TOKENS, LABELS, torch.tensor([[0, 0]]), n_random=-1)


def test_losses_that_are_certified_have_a_feature_for_each_class():
    probe = LogisticProbe1d().fit(TOKENS, LABELS, 3)
    loss, features = probe.judge(TOKENS, LABELS).loss, torch.tensor([0, 1, 2])
    good = (TOKENS.T[features], features, LABELS, loss)
    assert probe.certify_loss(*good) < 1e-8
    for place, bad, message in (
        (0, TOKENS.T, "wanted"),
        (1, features[:2], "wanted"),
        (1, features - 1, "found features -1 to 1, wanted 0 to 3"),
        (1, features + 2, "found features 2 to 4, wanted 0 to 3"),
        (2, LABELS + 1, "labels run from 1 to 3"),
        (3, loss[:, :1], "wanted"),
    ):
        given = list(good)
        given[place] = bad
        with pytest.raises(ValueError, match=message):
            probe.certify_loss(*given)


def test_settings_keep_what_they_check():
    probe = LogisticProbe1d(max_iter=3, tol=0.0)
    assert dataclasses.astuple(probe.settings)[:4] == (1e-8, None, 3, 0.0)


def test_the_feature_of_a_class_without_a_probe_is_left_out():
    x, labels = draw(60, 4), torch.arange(60) % 2
    probe = LogisticProbe1d().fit(x, labels, 3)
    best = best_features(probe.loss_)
    assert best.tolist()[2] == -1
    assert probe.certify_loss(x.T[best], best, labels, probe.judge(x, labels).loss) < 1e-12
    pairs = torch.stack([best, torch.arange(3)], 1)
    probe.certify(x, labels, pairs).check()
    with pytest.raises(ValueError, match="features -6 to"):
        probe.certify(x, labels, pairs - torch.tensor([[9, 0]]))


def test_a_number_too_large_for_float32_is_named_as_such_in_a_later_batch_too():
    x = draw(60, 4).double()
    kmeans = MiniBatchKMeans(3).partial_fit(x)
    x[7, 2] = 1e300
    with pytest.raises(ValueError, match=r"1e\+300"):
        kmeans.partial_fit(x)


def test_tokens_of_several_images_are_standardized_alike():
    x, mean, std = draw(3, 10, 6), draw(6, seed=1), draw(6, seed=2).abs()
    flat = standardize(x.view(30, 6), mean, std)
    assert torch.equal(standardize(x, mean, std).view(30, 6), flat)
    assert torch.equal(
        unstandardize(flat.view(3, 10, 6), mean, std).view(30, 6), unstandardize(flat, mean, std)
    )


def test_nan_in_patches_that_do_not_count_is_ranked_nowhere():
    values = draw(1, 8)
    values[0, 3] = torch.nan
    counted = torch.arange(8) != 3
    found = strongest_examples(values, counted, 4, 2)
    assert sorted(found["example"][0].tolist()) == [0, 1]
    assert bool((found["patch"] >= 0).all())
    with pytest.raises(ValueError, match="NaN"):
        strongest_examples(values, torch.ones(8, dtype=torch.bool), 4, 2)

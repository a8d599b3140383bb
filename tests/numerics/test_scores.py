"""The table's figures against the definitions, written as loops."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.numerics.scores import best_features, score_encoding


def _inputs(n_features, n_classes, seed, levels=4):
    """Matrices of few distinct values, so that ties are common."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(1, levels + 1, shape, generator=generator).double() / (levels + 1)

    return {
        "train_ce": draw(n_features, n_classes),
        "val_ce": draw(n_features, n_classes),
        "base_ce": draw(n_classes),
        "val_ap": draw(n_features, n_classes),
        "purity": draw(n_classes),
        "present_in_val": torch.rand(n_classes, generator=generator) < 0.8,
        "fitted": torch.rand(n_classes, generator=generator) < 0.8,
    }


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 9999), st.sampled_from([0.3, 0.5]))
def test_scores_are_those_of_a_loop(n_features, n_classes, seed, threshold):
    given_ = _inputs(n_features, n_classes, seed)
    scored = [c for c in range(n_classes) if given_["present_in_val"][c] and given_["fitted"][c]]
    for c in set(range(n_classes)) - set(scored):  # what is not looked at may be anything
        for name in ("train_ce", "val_ce", "val_ap"):
            given_[name][:, c] = torch.nan
        given_["base_ce"][c] = given_["purity"][c] = torch.nan
    if not scored:
        with pytest.raises(ValueError, match=f"none of {n_classes} classes"):
            score_encoding(**given_)
        return
    scores = score_encoding(**given_, coverage_threshold=threshold)

    best, best_by_val = {}, {}
    for c in scored:
        best[c] = min(range(n_features), key=lambda j: (float(given_["train_ce"][j, c]), j))
        best_by_val[c] = min(range(n_features), key=lambda j: (float(given_["val_ce"][j, c]), j))

    def mean(values):
        return sum(float(value) for value in values) / len(scored)

    val = mean(given_["val_ce"][best[c], c] for c in scored)
    base = mean(given_["base_ce"][c] for c in scored)
    aps = [float(given_["val_ap"][best[c], c]) for c in scored]
    assert scores.probe_r == pytest.approx(1 - val / base, rel=1e-12, abs=1e-12)
    assert scores.mean_val_ce == pytest.approx(val, rel=1e-12)
    assert scores.mean_base_ce == pytest.approx(base, rel=1e-12)
    assert scores.mean_train_ce == pytest.approx(mean(given_["train_ce"][best[c], c] for c in scored), rel=1e-12)
    assert scores.map == pytest.approx(mean(aps), rel=1e-12)
    assert scores.purity_at_16 == pytest.approx(mean(given_["purity"][c] for c in scored), rel=1e-12)
    assert scores.coverage == sum(ap >= threshold for ap in aps) / len(scored)
    assert scores.coverage_threshold == threshold
    assert scores.absent_in_val == tuple(c for c in range(n_classes) if not given_["present_in_val"][c])
    assert scores.absent_in_train == tuple(c for c in range(n_classes) if not given_["fitted"][c])

    assert [row.class_id for row in scores.classes] == scored
    for row in scores.classes:
        c, j, j_val = row.class_id, best[row.class_id], best_by_val[row.class_id]
        assert (row.feature, row.feature_by_val) == (j, j_val)
        assert row.train_ce == given_["train_ce"][j, c]
        assert row.val_ce == given_["val_ce"][j, c]
        assert row.base_ce == given_["base_ce"][c]
        assert row.average_precision == given_["val_ap"][j, c]
        assert row.purity_at_16 == given_["purity"][c]
        assert row.val_ce_by_val == given_["val_ce"][j_val, c]
        assert row.average_precision_by_val == given_["val_ap"][j_val, c]
        assert row.probe_r == 1 - row.val_ce / row.base_ce
        assert row.probe_r_by_val == 1 - row.val_ce_by_val / row.base_ce


def test_coverage_counts_an_average_precision_of_exactly_the_threshold():
    given_ = _inputs(1, 4, 0)
    given_["present_in_val"][:] = given_["fitted"][:] = True
    given_["val_ap"] = torch.tensor([[0.3, 0.29, 0.31, 0.0]], dtype=torch.float64)
    assert score_encoding(**given_).coverage == 0.5


def test_best_features_go_to_the_lower_at_a_tie_and_are_none_without_a_probe():
    nan = torch.nan
    ce = torch.tensor([[2.0, nan, 1.0], [1.0, nan, 1.0], [1.0, nan, 3.0]], dtype=torch.float64)
    assert best_features(ce).tolist() == [1, -1, 0]
    ce[0, 2] = nan
    with pytest.raises(ValueError, match="CE of class 2 is NaN for some"):
        best_features(ce)


def test_inputs_that_disagree_are_refused():
    given_ = _inputs(3, 2, 0)
    given_["present_in_val"][:] = given_["fitted"][:] = True
    with pytest.raises(ValueError, match=r"val_ap has shape \(2, 2\), wanted \(3, 2\)"):
        score_encoding(**given_ | {"val_ap": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"purity has shape \(3,\), wanted \(2,\)"):
        score_encoding(**given_ | {"purity": torch.zeros(3)})
    unfitted = given_["train_ce"].clone()
    unfitted[:, 1] = torch.nan
    with pytest.raises(ValueError, match="marked as fitted is NaN"):
        score_encoding(**given_ | {"train_ce": unfitted})
    with pytest.raises(ValueError, match="map is nan"):
        score_encoding(**given_ | {"val_ap": torch.full((3, 2), torch.nan)})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("probe_r", 1.5),
        ("probe_r", math.nan),
        ("mean_train_ce", -0.1),
        ("mean_val_ce", math.inf),
        ("mean_base_ce", math.nan),
        ("map", 1.1),
        ("purity_at_16", -0.1),
        ("coverage", math.nan),
        ("classes", ()),
        ("absent_in_val", (0,)),
        ("absent_in_train", (1,)),
    ],
)
def test_scores_that_cannot_be_are_refused(field, value):
    given_ = _inputs(3, 2, 0)
    given_["present_in_val"][:] = given_["fitted"][:] = True
    scores = score_encoding(**given_)
    with pytest.raises(ValueError, match="wanted"):
        dataclasses.replace(scores, **{field: value})

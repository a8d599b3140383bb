"""The table's figures against the definitions, written as loops."""

import dataclasses
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.numerics.scores import Judgment, best_features, score_encoding


def _inputs(n_features, n_classes, seed, levels=4):
    """Matrices of few distinct values, so that ties are common."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(1, levels + 1, shape, generator=generator).double() / (levels + 1)

    present = torch.rand(n_classes, generator=generator, dtype=torch.float32) < 0.8
    predicted = (draw(n_features, n_classes) * 40).round()
    positives = present * (draw(n_classes) * 40).round()
    val = Judgment(
        loss=draw(n_features, n_classes),
        average_precision=draw(n_features, n_classes),
        true_positives=torch.minimum(predicted, positives) - (predicted % 2),
        predicted=predicted,
        positives=positives,
        n_rows=1000,
    )
    return {
        "train_ce": draw(n_features, n_classes),
        "coef": draw(n_features, n_classes) - 0.5,
        "val": val,
        "base_ce": draw(n_classes),
        "purity": draw(n_classes, 3),
        "train_counts": torch.randint(1, 50, (n_classes,), generator=generator),
        "fitted": torch.rand(n_classes, generator=generator, dtype=torch.float32) < 0.8,
    }


def _all_present(n_features, n_classes, seed=0):
    given_ = _inputs(n_features, n_classes, seed)
    given_["fitted"][:] = True
    given_["val"].positives.clamp_(min=5)
    given_["val"].true_positives.clamp_(min=0)
    return given_


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 9999),
    st.sampled_from([0.3, 0.5]),
    st.integers(1, 4),
)
def test_scores_are_those_of_a_loop(n_features, n_classes, seed, threshold, n_top):
    given_ = _inputs(n_features, n_classes, seed)
    val = given_["val"]
    val.true_positives.clamp_(min=0)
    scored = [c for c in range(n_classes) if val.positives[c] > 0 and given_["fitted"][c]]
    for c in set(range(n_classes)) - set(scored):  # what is not looked at may be anything
        for matrix in (given_["train_ce"], given_["coef"], val.loss, val.average_precision):
            matrix[:, c] = torch.nan
        given_["base_ce"][c] = torch.nan
        given_["purity"][c] = torch.nan
    if not scored:
        with pytest.raises(ValueError, match=f"none of {n_classes} classes"):
            score_encoding(**given_)
        return
    scores = score_encoding(**given_, coverage_threshold=threshold, n_top=n_top)

    best, best_by_val, second = {}, {}, {}
    for c in scored:
        ranked = sorted(range(n_features), key=lambda j: (float(given_["train_ce"][j, c]), j))
        best[c], second[c] = ranked[0], ranked[1] if n_features > 1 else None
        best_by_val[c] = min(range(n_features), key=lambda j: (float(val.loss[j, c]), j))

    def mean(values):
        values = [float(value) for value in values]
        return sum(values) / len(values)

    val_ce = mean(val.loss[best[c], c] for c in scored)
    base = mean(given_["base_ce"][c] for c in scored)
    aps = [float(val.average_precision[best[c], c]) for c in scored]
    assert scores.probe_r == pytest.approx(1 - val_ce / base, rel=1e-12, abs=1e-12)
    assert scores.mean_val_ce == pytest.approx(val_ce, rel=1e-12)
    assert scores.mean_base_ce == pytest.approx(base, rel=1e-12)
    assert scores.mean_train_ce == pytest.approx(
        mean(given_["train_ce"][best[c], c] for c in scored), rel=1e-12
    )
    assert scores.mean_feature_ce == pytest.approx(mean(val.loss[:, c].mean() for c in scored))
    assert scores.median_feature_ce == pytest.approx(
        mean(statistics.median(val.loss[:, c].tolist()) for c in scored)
    )
    assert scores.negative_weights == pytest.approx(
        mean(given_["coef"][j, c] < 0 for j in range(n_features) for c in scored)
    )
    assert scores.map == pytest.approx(mean(aps), rel=1e-12)
    assert scores.coverage == sum(ap >= threshold for ap in aps) / len(scored)
    assert scores.coverage_threshold == threshold
    for i, k in enumerate((16, 64, 256)):
        assert getattr(scores, f"purity_at_{k}") == pytest.approx(
            mean(given_["purity"][c, i] for c in scored)
        )
    assert scores.absent_in_val == tuple(c for c in range(n_classes) if not val.positives[c] > 0)
    assert scores.absent_in_train == tuple(c for c in range(n_classes) if not given_["fitted"][c])

    assert [row.class_id for row in scores.classes] == scored
    margins, f1s = [], []
    for row in scores.classes:
        c, j, j_val = row.class_id, best[row.class_id], best_by_val[row.class_id]
        assert (row.feature, row.feature_by_val) == (j, j_val)
        assert (row.n_train, row.n_val) == (int(given_["train_counts"][c]), int(val.positives[c]))
        assert row.train_ce == given_["train_ce"][j, c]
        assert row.val_ce == val.loss[j, c]
        assert row.base_ce == given_["base_ce"][c]
        assert row.average_precision == val.average_precision[j, c]
        assert [row.purity_at_16, row.purity_at_64, row.purity_at_256] == given_["purity"][
            c
        ].tolist()
        assert row.mean_feature_ce == pytest.approx(mean(val.loss[:, c]))
        assert row.median_feature_ce == statistics.median(val.loss[:, c].tolist())
        assert row.val_ce_by_val == val.loss[j_val, c]
        assert row.average_precision_by_val == val.average_precision[j_val, c]
        assert row.probe_r == 1 - row.val_ce / row.base_ce
        assert row.probe_r_by_val == 1 - row.val_ce_by_val / row.base_ce
        hits, predicted = float(val.true_positives[j, c]), float(val.predicted[j, c])
        assert row.precision == pytest.approx(hits / predicted if predicted else 0.0)
        assert row.recall == pytest.approx(hits / float(val.positives[c]))
        f1s.append(2 * hits / (predicted + float(val.positives[c])))
        assert row.f1 == pytest.approx(f1s[-1])
        if second[c] is None:
            assert row.margin is None
        else:
            margins.append(float(given_["train_ce"][second[c], c] - given_["train_ce"][j, c]))
            assert row.margin == margins[-1]
        falling = (-val.average_precision[:, c]).tolist()
        order = sorted(range(n_features), key=falling.__getitem__)[:n_top]  # and by number
        assert list(row.top_features) == order
        assert list(row.top_average_precisions) == [
            float(val.average_precision[j, c]) for j in order
        ]
    assert scores.f1 == pytest.approx(mean(f1s))
    assert scores.mean_margin == (pytest.approx(mean(margins)) if margins else None)


def test_coverage_counts_an_average_precision_of_exactly_the_threshold():
    given_ = _all_present(1, 4)
    given_["val"].average_precision[:] = torch.tensor([[0.3, 0.29, 0.31, 0.0]], dtype=torch.float64)
    assert score_encoding(**given_).coverage == 0.5


def test_one_pair_that_is_confident_and_wrong_is_seen_in_its_class_alone():
    """Its CE of 539 nats makes the mean over all features and classes many times that of any other
    pair.
    """
    given_ = _all_present(4, 3)
    given_["val"].loss[:] = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    given_["val"].loss[2, 1] = 539.0
    scores = score_encoding(**given_)
    assert [row.mean_feature_ce for row in scores.classes] == pytest.approx([0.1, 134.9, 0.3])
    assert [row.median_feature_ce for row in scores.classes] == pytest.approx([0.1, 0.2, 0.3])
    assert scores.mean_feature_ce == pytest.approx((0.1 + 134.9 + 0.3) / 3)
    assert scores.median_feature_ce == pytest.approx(0.2)


def test_best_features_go_to_the_lower_at_a_tie_and_are_none_without_a_probe():
    nan = torch.nan
    ce = torch.tensor([[2.0, nan, 1.0], [1.0, nan, 1.0], [1.0, nan, 3.0]], dtype=torch.float64)
    assert best_features(ce).tolist() == [1, -1, 0]
    ce[0, 2] = nan
    with pytest.raises(ValueError, match="CE of class 2 is NaN for some"):
        best_features(ce)


@pytest.mark.parametrize(
    "given_", [{"coverage_threshold": torch.nan}, {"coverage_threshold": 2.0}, {"n_top": 0}]
)
def test_what_is_counted_has_a_range(given_):
    with pytest.raises(ValueError, match="wanted 0 to 1 and at least 1"):
        score_encoding(**_all_present(2, 2), **given_)


def test_inputs_that_disagree_are_refused():
    given_ = _all_present(3, 2)
    with pytest.raises(ValueError, match=r"coef has shape \(2, 2\), wanted \(3, 2\)"):
        score_encoding(**given_ | {"coef": torch.zeros(2, 2, dtype=torch.float32)})
    with pytest.raises(ValueError, match=r"purity has shape \(3,\), wanted \(2, 3\)"):
        score_encoding(**given_ | {"purity": torch.zeros(3, dtype=torch.float32)})
    with pytest.raises(ValueError, match=r"loss has shape \(2, 2\), wanted \(3, 2\)"):
        score_encoding(
            **given_
            | {
                "val": dataclasses.replace(
                    given_["val"], loss=torch.zeros(2, 2, dtype=torch.float32)
                )
            }
        )
    unfitted = given_["train_ce"].clone()
    unfitted[:, 1] = torch.nan
    with pytest.raises(ValueError, match="marked as fitted is NaN"):
        score_encoding(**given_ | {"train_ce": unfitted})
    nowhere = dataclasses.replace(
        given_["val"], average_precision=torch.full((3, 2), torch.nan, dtype=torch.float32)
    )
    with pytest.raises(ValueError, match="map is nan"):
        score_encoding(**given_ | {"val": nowhere})


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
        ("purity_at_256", 1.1),
        ("mean_feature_ce", -0.1),
        ("median_feature_ce", math.nan),
        ("negative_weights", 1.1),
        ("f1", math.nan),
        ("coverage", math.nan),
        ("classes", ()),
        ("absent_in_val", (0,)),
        ("absent_in_train", (1,)),
    ],
)
def test_scores_that_cannot_be_are_refused(field, value):
    given_ = _all_present(3, 2)
    scores = score_encoding(**given_)
    with pytest.raises(ValueError, match="wanted"):
        dataclasses.replace(scores, **{field: value})

"""The table: one row for each (layer, method, encoding, k), with the errors of its method and k beside its scores."""

import copy
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.pipelines.report.nodes import COLUMNS, merge_layer, tabulate_baselines

METRICS = ("probe_r", "map", "purity_at_16", "coverage_at_0.3")
ROWS = (
    ("kmeans", "kmeans-onehot", 8),
    ("kmeans", "kmeans-invdist", 8),
    ("pca", "pca-topk-00001", 1),
    ("pca", "pca-topk-00016", 16),
)


def scores(layer, method, encoding, k, mean_train_ce=0.5, **values):
    about = {"layer": layer, "method": method, "encoding": encoding, "k": k, "l0": 1.0}
    rest = {"mean_train_ce": mean_train_ce, "classes": [{"label": 1}], "converged": True}
    return about | dict.fromkeys(METRICS, 0.25) | rest | values


def errors(layer, method, ks):
    rows = [{"k": k, "nmse": 1 / (1 + k), "nmse_raw": 2 / (3 + k)} for k in ks]
    return {"layer": layer, "method": method, "n_tokens": 9, "rows": rows}


def layer_of(layer, ces):
    """A layer's rows with these train CEs, in the order of ROWS."""
    parts = [scores(layer, *row, mean_train_ce=ce) for row, ce in zip(ROWS, ces, strict=True)]
    return merge_layer(errors(layer, "kmeans", [8]), errors(layer, "pca", [1, 16]), *parts)


def test_scores_are_joined_with_the_errors_of_their_method_and_k():
    metrics = [
        errors(3, "kmeans", [1, 16]),
        errors(3, "pca", [16, 1]) | {"rows": [{"k": 1, "nmse": 0.9, "nmse_raw": 0.8}]},
    ]
    parts = [scores(3, "kmeans", "kmeans-onehot", 1), scores(3, "pca", "pca-topk-00001", 1)]
    kmeans, pca = merge_layer(*metrics, *parts)
    assert (kmeans["encoding"], kmeans["nmse"], kmeans["nmse_raw"]) == ("kmeans-onehot", 1 / 2, 2 / 4)
    assert (pca["encoding"], pca["nmse"], pca["nmse_raw"]) == ("pca-topk-00001", 0.9, 0.8)
    assert kmeans | parts[0] == kmeans


def test_the_order_of_the_metrics_does_not_matter_to_the_join():
    metrics = [errors(3, "kmeans", [8]), errors(3, "pca", [1, 16]), *(scores(3, *row) for row in ROWS)]
    before = copy.deepcopy(metrics)
    shuffled = random.Random(0).sample(metrics, len(metrics))
    by_encoding = {row["encoding"]: row for row in merge_layer(*metrics)}
    assert {row["encoding"]: row for row in merge_layer(*shuffled)} == by_encoding
    assert len(by_encoding) == len(ROWS)
    assert metrics == before


def test_columns_are_those_that_papers_point_at():
    assert ",".join(COLUMNS) == (
        "layer,method,encoding,k,nmse,nmse_raw,l0,probe_r,map,purity_at_16,coverage_at_0.3,best_layer"
    )
    table = tabulate_baselines(layer_of(3, [0.5] * 4))
    assert tuple(table.columns) == COLUMNS
    assert table["best_layer"].dtype == bool
    assert table["layer"].dtype == table["k"].dtype == "int64"


def test_rows_are_sorted_by_layer_method_k_and_encoding():
    table = tabulate_baselines(layer_of(23, [0.5] * 4)[::-1], layer_of(5, [0.5] * 4))
    one_layer = ["kmeans-invdist", "kmeans-onehot", "pca-topk-00001", "pca-topk-00016"]
    assert table["layer"].tolist() == [5] * 4 + [23] * 4
    assert table["encoding"].tolist() == one_layer * 2
    assert table.index.tolist() == list(range(8))
    parts = [scores(3, "pca", "pca-topk-100000", 100_000), scores(3, "pca", "pca-topk-99999", 99_999)]
    table = tabulate_baselines(merge_layer(errors(3, "pca", [99_999, 100_000]), *parts))
    assert table["k"].tolist() == [99_999, 100_000]


def test_values_stay_with_their_row():
    rows = layer_of(3, [0.5] * 4)
    for number, row in enumerate(rows):
        row["map"] = number / 10
    table = tabulate_baselines(rows).set_index("encoding")
    for row in rows:
        for name in ("nmse", "nmse_raw", "l0", *METRICS):
            assert table.loc[row["encoding"], name] == row[name]


def test_the_best_layer_is_picked_on_train_ce_for_each_encoding_apart():
    table = tabulate_baselines(layer_of(3, [0.1, 0.5, 0.3, 0.2]), layer_of(5, [0.2, 0.4, 0.3, 0.1]))
    best = table[table["best_layer"]].set_index("encoding")["layer"].to_dict()
    assert best == {"kmeans-onehot": 3, "kmeans-invdist": 5, "pca-topk-00001": 3, "pca-topk-00016": 5}


def test_other_scores_do_not_pick_the_best_layer():
    better = layer_of(3, [0.1] * 4)
    worse = [row | dict.fromkeys(METRICS, 1.0) for row in layer_of(5, [0.2] * 4)]
    table = tabulate_baselines(worse, better)
    assert (table["best_layer"] == (table["layer"] == 3)).all()


@pytest.mark.parametrize("turned", [False, True])
def test_a_tie_goes_to_the_lower_layer(turned):
    layers = [layer_of(5, [0.3] * 4), layer_of(12, [0.3] * 4), layer_of(3, [0.4] * 4)]
    table = tabulate_baselines(*(layers[::-1] if turned else layers))
    assert (table["best_layer"] == (table["layer"] == 5)).all()


@settings(deadline=None, max_examples=25)
@given(ces=st.lists(st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=4, max_size=4), min_size=1, max_size=5))
def test_each_encoding_has_one_best_layer_and_none_lower_is_as_good(ces):
    table = tabulate_baselines(*(layer_of(layer, each) for layer, each in enumerate(ces)))
    for column, (_, encoding, _) in enumerate(ROWS):
        (row,) = table[(table["encoding"] == encoding) & table["best_layer"]].to_dict("records")
        series = [each[column] for each in ces]
        assert row["layer"] == series.index(min(series))

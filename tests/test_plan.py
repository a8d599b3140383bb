"""What a run will do."""

import dataclasses
from pathlib import Path

import pytest

from assay.encodings import Encoding, Form, Model
from assay.parameters import parse_parameters
from assay.plan import make_plan, place

SPLITS = ("fit", "val", "probe_train", "probe_val")
DIGITS = {split: f"data/01_raw/digits/{split}" for split in SPLITS}


def parse(shards, **changes):
    return parse_parameters(
        {"layers": [3, 5], "shards": shards, "kmeans": {"n_clusters": 4}} | changes
    )


@pytest.fixture
def shards(planted):
    fit, val = map(str, planted)
    return {"fit": fit, "val": val, "probe_train": fit, "probe_val": val}


def test_the_table_has_a_row_for_each_kmeans_encoding_and_each_k():
    plan = make_plan(parse(DIGITS, kmeans={"n_clusters": 8, "seed": 3}), d_model=80)
    kmeans, pca = Model("kmeans", 3), Model("pca")
    assert plan.encodings == (
        Encoding(kmeans, Form("onehot"), 8),
        Encoding(kmeans, Form("invdist"), 8),
        *(Encoding(pca, Form("topk", k), k, stored_k=64) for k in (1, 4, 16, 64)),
    )
    assert [row.name for row in plan.encodings] == [
        *("kmeans-onehot", "kmeans-invdist"),
        *("pca-topk-00001", "pca-topk-00004", "pca-topk-00016", "pca-topk-00064"),
    ]
    assert {row.codes for row in plan.encodings if row.model == pca} == {"pca-topk-00064"}
    assert plan.layers == (3, 5)
    assert plan.kmeans == (kmeans,)


def test_whitened_coefficients_of_each_k_have_codes_of_their_own():
    floor = {"floor": {"random": "directions"}}
    raw = make_plan(parse(DIGITS, dictionaries=floor), d_model=80)
    white = make_plan(parse(DIGITS, dictionaries=floor, pca={"whiten": True}), d_model=80)
    assert (raw.pca_form, white.pca_form) == (Form("dense"), Form("dense", whiten=True))
    assert white.encodings[2:] == tuple(
        Encoding(Model("pca"), Form("topk", k, whiten=True), k) for k in (1, 4, 16, 64)
    )
    assert all(row.codes == row.name for row in white.encodings)
    assert list(white.rows) == list(raw.rows)
    assert white.dictionaries == raw.dictionaries, "random directions have no spread"


def test_random_directions_have_rows_where_every_k_is_too_large():
    """Preflight refuses such a K; a plan without rows broke off before it, with a traceback."""
    plan = make_plan(
        parse(DIGITS, dictionaries={"floor": {"random": "directions"}}, pca={"topk": [81, 256]}),
        d_model=80,
    )
    assert [row.k for row in plan.dictionaries[0].encodings] == [81, 256]


def test_more_seeds_are_rows_of_their_own_made_by_models_of_their_own():
    changes = {"kmeans": {"n_clusters": 8, "more_seeds": [7]}, "pca": {"topk": [4]}}
    dictionaries = {
        "random-directions": {"random": "directions", "seeds": [1, 2]},
        "relu": {
            "weights": "saes/{layer}-{seed}.safetensors",
            "activation": "relu",
            "trained_on": "raw",
            "input_bias": "none",
            "seeds": [5, 6],
        },
        "one": {"sae": "saes/{seed}/sae.pt", "seeds": [5]},
        "unknown": {"sae": "saes/a/sae.pt"},
    }
    plan = make_plan(parse(DIGITS, dictionaries=dictionaries, **changes), d_model=80)
    assert {model.name: model.seed for model in plan.kmeans} == {"kmeans": 0, "kmeans-seed-7": 7}
    again = Encoding(Model("kmeans", 7, is_of_several=True), Form("invdist"), 8)
    assert plan.rows["kmeans-seed-7-invdist"] == again
    assert again in plan.encodings
    drawn = Model("random-directions", 2, is_of_several=True)
    assert plan.rows["random-directions-seed-2-topk-00004"] == Encoding(
        drawn, Form("topk", 4), 4, stored_k=4
    )
    assert {name: row.model.seed for name, row in plan.rows.items() if row.form is None} == {
        "relu-seed-5": 5,
        "relu-seed-6": 6,
        "one": 5,
        "unknown": None,
    }
    assert {row.shown for row in plan.rows.values()} == {
        "kmeans-onehot",
        "kmeans-invdist",
        "pca-topk-00004",
        "random-directions-topk-00004",
        "relu",
        "one",
        "unknown",
    }


@pytest.mark.parametrize(
    ("d_model", "kept"), [(None, 6), (1024, 6), (1023, 5), (64, 4), (63, 3), (1, 1)]
)
def test_a_k_above_the_width_is_left_out(d_model, kept):
    plan = make_plan(parse(DIGITS), d_model)
    assert [row.k for row in plan.encodings if row.model.method == "pca"] == [
        1,
        4,
        16,
        64,
        256,
        1024,
    ][:kept]


@pytest.mark.parametrize(
    ("latent_topk", "ks"), [(None, [1, 16]), (16, [1, 16]), (5, [1, 5, 16]), (70, [1, 16, 70])]
)
def test_latent_topk_joins_the_sweep_and_names_the_codes_that_pca_leaves(latent_topk, ks):
    plan = make_plan(parse(DIGITS, latent_topk=latent_topk, pca={"topk": [1, 16]}), d_model=80)
    assert [row.k for row in plan.encodings if row.model.method == "pca"] == ks
    assert plan.pca_form == (Form("dense") if latent_topk is None else Form("topk", latent_topk))
    assert latent_topk is None or plan.pca_form.name in [row.name for row in plan.encodings]


def test_the_plan_has_one_kmeans_row_where_one_encoding_is_asked_for():
    plan = make_plan(parse(DIGITS, kmeans={"encodings": ["kmeans-invdist"]}), d_model=80)
    assert [row.name for row in plan.encodings if row.model.method == "kmeans"] == [
        "kmeans-invdist"
    ]


def test_only_shards_inside_the_defaults_folder_are_made(shards):
    assert make_plan(parse(DIGITS)).digits == SPLITS
    assert make_plan(parse(shards)).digits == ()
    assert make_plan(parse(shards | {"val": "./data/01_raw/digits/val"})).digits == ("val",)
    assert make_plan(parse(shards | {"val": "data/01_raw/digits/val/deeper"})).digits == ()


def test_given_statistics_are_planned_for():
    assert not make_plan(parse(DIGITS)).given_statistics
    assert make_plan(parse(DIGITS, standardize={"statistics": "own.safetensors"})).given_statistics


def test_names_of_classes_are_planned_for():
    assert not make_plan(parse(DIGITS)).named_classes
    assert make_plan(parse(DIGITS, class_names="names.txt")).named_classes


def test_a_plan_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_plan(parse(DIGITS)).given_statistics = True  # type: ignore[misc]  # what is refused


def test_two_rows_of_one_name_are_refused():
    dictionaries = {
        "a": {"random": "centres"},
        "a-onehot": {"sae": "a/sae.pt"},
    }
    with pytest.raises(
        ValueError,
        match="two rows would be called `a-onehot`; give one of the dictionaries another name",
    ):
        make_plan(parse(DIGITS, dictionaries=dictionaries))


def test_a_path_is_the_projects_and_an_address_on_the_hub_stays_one(tmp_path):
    assert place(tmp_path, "saes/{layer}-{seed}", 3, 7) == tmp_path / "saes/layer_3-7"
    assert place(tmp_path, "/saes/{layer}", -2) == Path("/saes/layer_-2")
    address = str(place(tmp_path, "hf:owner/name@v1/{layer}/{seed}", 3, 7))
    assert address == "hf:owner/name@v1/layer_3/7"

"""Names of encodings, in both directions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.encodings import KINDS, Encoding, Form, Model, child_name, layer_name

MODELS = st.builds(
    Model,
    st.sampled_from(["kmeans", "pca", "relu-16k", "random-centres"]),
    st.integers(0, 99),
    st.just(True),
)
FORMS = st.one_of(
    st.sampled_from([Form(kind) for kinds in KINDS.values() for kind in kinds if kind != "topk"]),
    st.builds(Form, st.just("topk"), st.integers(1, 200_000)),
)


@given(MODELS)
def test_a_models_name_says_it_all_where_it_is_one_of_several(model):
    assert Model.parse(model.name) == model
    alone = Model(model.method, model.seed)
    assert Model.parse(alone.name) == Model(model.method)


@given(FORMS)
def test_a_forms_name_says_it_all(form):
    assert Form.parse(form.suffix) == Form.parse_name(form.name) == form


@given(MODELS, st.one_of(st.none(), FORMS))
def test_an_encodings_name_says_its_form_beside_its_model(model, form):
    k = None if form is None else form.k
    encoding = Encoding(model, form, k)
    assert Encoding.parse(encoding.name, model) == encoding
    assert Encoding.parse(encoding.shown, Model(model.method)) == Encoding(
        Model(model.method), form, k
    )


def test_names_are_those_of_files():
    several = Model("kmeans", 3, is_of_several=True)
    rows = [
        Encoding(Model("kmeans", 3), Form("distance-cosine"), 128),
        Encoding(several, Form("onehot"), 128),
        Encoding(Model("pca"), Form("topk", 16), 16, stored_k=64),
        Encoding(Model("relu-16k"), None, None),
    ]
    assert [(row.name, row.shown, row.codes) for row in rows] == [
        ("kmeans-distance-cosine", "kmeans-distance-cosine", "kmeans-distance-cosine"),
        ("kmeans-seed-3-onehot", "kmeans-onehot", "kmeans-seed-3-onehot"),
        ("pca-topk-00016", "pca-topk-00016", "pca-topk-00064"),
        ("relu-16k", "relu-16k", "relu-16k"),
    ]
    assert (layer_name(-2), child_name(23, "pca-dense")) == ("layer_-2", "layer_23/pca-dense")


def test_names_of_topk_codes_sort_by_k():
    names = [Form("topk", k).name for k in (1, 9, 10, 64, 1024, 99_999)]
    assert sorted(names) == names
    assert Form("topk", 100_000).name == "pca-topk-100000"


@pytest.mark.parametrize(
    "name", ["mine-topk", "mine-topk-64", "kmeans-onehot", "mine-dense-more", "mines"]
)
def test_what_is_no_encoding_of_a_model_is_refused(name):
    with pytest.raises(
        ValueError, match=f"the encoding is '{name}', wanted mine, or that and a form"
    ):
        Encoding.parse(name, Model("mine"))


def test_what_is_by_center_is_of_k_means():
    assert {form.name: form.is_by_center for form in (Form("invdist"), Form("dense"))} == {
        "kmeans-invdist": True,
        "pca-dense": False,
    }


def test_only_what_is_fitted_here_has_a_family():
    assert [Model(name, 3, True).family for name in ("kmeans", "pca", "pca-like", "random")] == [
        "kmeans",
        "pca",
        None,
        None,
    ]

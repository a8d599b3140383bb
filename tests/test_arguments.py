"""What is typed after `--params` is what it looks like."""

from __future__ import annotations

import pytest

from assay.arguments import parse_pairs
from assay.parameters import parse_parameters

LEAST = {"layers": [3], "shards": {"fit": "a", "val": "b", "probe_train": "c", "probe_val": "d"}}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", {}),
        ("latent_topk:64", {"latent_topk": 64}),
        ("latent_topk=64", {"latent_topk": 64}),
        (" latent_topk : 64 , device=cpu,", {"latent_topk": 64, "device": "cpu"}),
        ("kmeans.n_clusters:512,kmeans.tol=1e-3", {"kmeans": {"n_clusters": 512, "tol": 1e-3}}),
        ("layers:[3,5],pca.topk=[1]", {"layers": [3, 5], "pca": {"topk": [1]}}),
        (
            "pca:{batch_size: 5, topk: [1,4]},layers:[3]",
            {"pca": {"batch_size": 5, "topk": [1, 4]}, "layers": [3]},
        ),
        ("pca:{batch_size: 5},pca.topk:[1]", {"pca": {"batch_size": 5, "topk": [1]}}),
        ("kmeans.sparsity:{top_k: 3}", {"kmeans": {"sparsity": {"top_k": 3}}}),
        ("kmeans.sparsity.top_k:3", {"kmeans": {"sparsity": {"top_k": 3}}}),
        (
            "dictionaries.a.weights:007,dictionaries.a.k:7",
            {"dictionaries": {"a": {"weights": "007", "k": 7}}},
        ),
        (
            "dictionaries.a.sae:hf:owner/name@main/layers.3,dictionaries.a.k:7",
            {"dictionaries": {"a": {"sae": "hf:owner/name@main/layers.3", "k": 7}}},
        ),
        (
            "extract.model:hf:owner/name@main,extract.revision=0123",
            {"extract": {"model": "hf:owner/name@main", "revision": "0123"}},
        ),
        ("extract.model=python:a.b:f", {"extract": {"model": "python:a.b:f"}}),
        ("extract.model:timm:a_b.c=d", {"extract": {"model": "timm:a_b.c=d"}}),
        (
            "extract.model:owner/name,extract.fit.images:a b/c",
            {"extract": {"model": "owner/name", "fit": {"images": "a b/c"}}},
        ),
        (
            "extract.labels:{replace: {leftImg8bit: gtFine}, mapping: {7: 1}, void: [0,255]}",
            {
                "extract": {
                    "labels": {
                        "replace": {"leftImg8bit": "gtFine"},
                        "mapping": {"7": 1},
                        "void": [0, 255],
                    }
                }
            },
        ),
        ("extract.labels.replace:{a-b:c}", {"extract": {"labels": {"replace": {"a-b": "c"}}}}),
        ("extract.grid:[16,8]", {"extract": {"grid": [16, 8]}}),
        ("latent_topk:null", {"latent_topk": None}),
        ("kmeans.tol:-1.5E+3", {"kmeans": {"tol": -1500.0}}),
        ("kmeans.tol:.5", {"kmeans": {"tol": 0.5}}),
        ("layers:[true]", {"layers": [True]}),
        ("shards.fit:/a=b/c:d,shards.val:/e f", {"shards": {"fit": "/a=b/c:d", "val": "/e f"}}),
        ("shards.fit:'/a,b'", {"shards": {"fit": "/a,b"}}),
        (
            "standardize.statistics:{layer}.safetensors",
            {"standardize": {"statistics": "{layer}.safetensors"}},
        ),
        ("standardize.statistics:{layer}", {"standardize": {"statistics": "{layer}"}}),
        ("shards.fit:/o'brien/x,layers:[3]", {"shards": {"fit": "/o'brien/x"}, "layers": [3]}),
        ("device:x],layers:[3]", {"device": "x]", "layers": [3]}),
        ("shards.fit:@x", {"shards": {"fit": "@x"}}),
    ],
)
def test_both_separators_nested_keys_lists_and_text(text, wanted):
    assert parse_pairs(text) == wanted


TEXTS = """/a #2|/a: b|12345678|12e45678|01234567|1_000|1:30|2026-01-02|0x1f|~|null|true|yes|off|.nan|{fit}|[1]|*a|&a|!a|%a|>|- a|? a"""


@pytest.mark.parametrize("path", TEXTS.split("|"))
def test_a_parameter_that_is_text_is_the_text(path):
    """None of what YAML would make of it: a comment, a number, a date, nothing."""
    assert parse_pairs(f"shards.fit:{path},layers:[3]") == {"shards": {"fit": path}, "layers": [3]}
    assert parse_pairs(f"shards:{{fit: {path}, val: b}}") == {"shards": {"fit": path, "val": "b"}}


def test_text_that_may_be_missing_can_be_null_and_the_word_in_quotes():
    assert parse_pairs("images.path:null") == {"images": {"path": None}}
    assert parse_pairs("images.path:'null'") == {"images": {"path": "null"}}


@pytest.mark.parametrize("value", ["1:30", "010", "1_000", "0x10", "0o7", "1e", "3 #4", "1 2"])
def test_what_is_no_plain_number_is_none_and_refused_by_name(value):
    parsed = parse_pairs(f"kmeans.seed:{value}")
    assert parsed == {"kmeans": {"seed": value}}
    with pytest.raises(
        ValueError,
        match=(
            r"^Parameter `kmeans\.seed`: found '.*', want a number, written as 10, 0\.1 or 1e-3\.$"
        ),
    ):
        parse_parameters(LEAST | parsed)


@pytest.mark.parametrize("value", ["yes", "no", "on", "off", "~", "NULL", "True", "2026-01-02"])
def test_words_that_yaml_has_a_meaning_for_are_text(value):
    assert parse_pairs(f"latent_topk:{value}") == {"latent_topk": value}


@pytest.mark.parametrize(
    "text", ["layers:[0],layers.a:3", "layers:[0],layers:[3]", "pca.topk:[1],pca:{topk: [2]}"]
)
def test_keys_that_contradict_each_other_are_refused(text):
    with pytest.raises(ValueError, match=r"^`(layers|pca).*` is set twice; name it once$"):
        parse_pairs(text)


@pytest.mark.parametrize(
    "text", ["latent_topk", ":64", "a b:1", "[3]", "a..b:1", ".a:1", "kmeans.n_clusters:64,128"]
)
def test_what_is_no_pair_is_refused_by_name(text):
    with pytest.raises(
        ValueError, match=r"is no key:value or key=value; write a list in brackets, \[1,2\]"
    ):
        parse_pairs(text)

"""How `--params` is read."""

from __future__ import annotations

import click
import pytest

from assay.cli import parse_params, run

(OPTION,) = (option for option in run.params if option.name == "params")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", {}),
        ("latent_topk:64", {"latent_topk": 64}),
        ("latent_topk=64", {"latent_topk": 64}),
        (" latent_topk : 64 , device=cpu,", {"latent_topk": 64, "device": "cpu"}),
        ("kmeans.n_clusters:512,kmeans.tol=1e-3", {"kmeans": {"n_clusters": 512, "tol": 1e-3}}),
        ("layers:[3,5],pca.topk=[1]", {"layers": [3, 5], "pca": {"topk": [1]}}),
        ("pca:{batch_size: 5, topk: [1,4]},layers:[3]", {"pca": {"batch_size": 5, "topk": [1, 4]}, "layers": [3]}),
        ("latent_topk:null", {"latent_topk": None}),
        ("shards.fit:/a=b/c:d,shards.val:/e f", {"shards": {"fit": "/a=b/c:d", "val": "/e f"}}),
        ("shards.fit:'/a,b'", {"shards": {"fit": "/a,b"}}),
        ("standardize.statistics:{layer}.safetensors", {"standardize": {"statistics": "{layer}.safetensors"}}),
        ("shards.fit:/o'brien/x,layers:[3]", {"shards": {"fit": "/o'brien/x"}, "layers": [3]}),
        ("device:x],layers:[3]", {"device": "x]", "layers": [3]}),
        ("shards.fit:@x", {"shards": {"fit": "@x"}}),
    ],
)
def test_both_separators_nested_keys_lists_and_text(text, wanted):
    assert parse_params(click.Context(run), OPTION, text) == wanted


def test_keys_that_contradict_each_other_are_refused():
    with pytest.raises(click.BadParameter, match=r"layers\.a:3"):
        parse_params(click.Context(run), OPTION, "layers:[0],layers.a:3")


@pytest.mark.parametrize("text", ["latent_topk", ":64", "a b:1", "[3]"])
def test_what_is_no_pair_is_refused_by_name(text):
    with pytest.raises(click.BadParameter, match="is no key:value or key=value"):
        parse_params(click.Context(run), OPTION, text)

"""How `--params` is read, what `--force` begins anew, and the table in the terminal."""

from __future__ import annotations

import io
from pathlib import Path

import click
import pandas as pd
import pytest
from kedro.io import DataCatalog, DatasetError, MemoryDataset
from kedro.pipeline import Pipeline, node
from rich.console import Console

from assay.cli import _check_place, _ended_cleanly, _forget_begun, parse_params, render_table, run
from assay.io.datasets import CodesDataset
from assay.io.publish import resumable_folder

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


def rows(*shown):
    """A table's rows of (layer, method, encoding, k, seed, map)."""
    columns = ["layer", "method", "encoding", "k", "seed", "map"]
    rest = {"nmse": 0.25, "nmse_raw": 0.5, "l0": 16.477, "probe_r": 2e-4, "purity_at_16": 1.0, "coverage_at_0.3": 0.5}
    table = pd.DataFrame(shown, columns=columns).assign(**rest, best_layer=True)
    return table[
        [*columns[:5], "nmse", "nmse_raw", "l0", "probe_r", "map", "purity_at_16", "coverage_at_0.3", "best_layer"]
    ]


def printed(table):
    console = Console(width=80, file=io.StringIO())
    console.print(render_table(table))
    return console.file.getvalue().splitlines()


def test_the_table_fits_in_80_columns_whatever_is_in_it():
    """The longest names that there are, several seeds or one: no cell is cut."""
    long = "random-directions-topk-01024"
    one = rows((23, "kmeans", "kmeans-invdist", 16_384, 0, 0.123), (23, "random-directions", long, 1024, 0, 0.5))
    several = rows(*((23, "random-directions", long, 1024, seed, 0.1 * seed) for seed in (1, 2, 6)))
    for table in (one, several):
        lines = printed(table)
        assert max(map(len, lines)) <= 80
        assert "…" not in "".join(lines)
        assert any(long in line and "2e-04" in line and "16.5" in line for line in lines)
    assert sum(long in line for line in printed(several)) == 1
    assert any("0.300" in line for line in printed(several))  # the mean of 0.1, 0.2 and 0.6
    assert "means over seeds" in "".join(printed(several))
    plain = printed(rows((3, "kmeans", "kmeans-onehot", 128, 0, 0.5), (3, "pca", "pca-topk-00004", 4, None, 0.5)))
    assert any("kmeans kmeans-onehot  128 0.250 0.500" in line for line in plain)
    assert "…" not in "".join(plain)


def test_force_forgets_what_was_begun_of_the_codes_that_it_makes(planted, tmp_path):
    def codes_of(encoding, shards):
        return CodesDataset(filepath=str(tmp_path), shards={"path": str(shards)}, encoding=encoding, layer="layer_3")

    made, other = codes_of("kmeans-onehot", planted[0]), codes_of("pca-dense", planted[0])
    for folder in (made.folder, other.folder):
        partial = resumable_folder(folder, "what is written")
        partial.mkdir(parents=True)
        (partial / "values000000.bin").write_bytes(b"half")
    catalog = DataCatalog({"made": made, "other": other, "memory": MemoryDataset(1), "early": codes_of("a", "nowhere")})
    outputs = ["made", "memory", "early", "elsewhere"]
    _forget_begun(Pipeline([node(lambda codes: [codes] * 4, "other", outputs, name="encode")]), catalog)
    assert list(made.folder.parent.iterdir()) == []
    assert [path.name[:17] for path in other.folder.parent.iterdir()] == [".layer_3.partial-"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device", "models/pca.safetensors"), ValueError("bad"), DatasetError("bad")]
)
def test_bad_input_and_a_full_disk_are_told_and_not_traced(error):
    with pytest.raises(click.ClickException) as caught, _ended_cleanly(None, Pipeline([]), DataCatalog()):
        raise error
    assert caught.value.message == str(error)


@pytest.mark.parametrize(("name", "odd"), [("od[1]d", "[ ]"), ("{a,b}", "{ }"), ("what?", "?"), ("a*", "*")])
def test_a_project_whose_path_kedro_takes_for_a_pattern_is_told_so(name, odd):
    _check_place(Path("/home/me/my project-1 (copy)"))
    with pytest.raises(click.ClickException, match="takes for patterns") as caught:
        _check_place(Path(f"/home/{name}/project"))
    assert f"/home/{name}/project has {odd} in its path" in caught.value.message

"""Codes of the labeled patches: computed as they are read, the same from disk, and true to a loop
in float64.
"""

import itertools
import json
import shutil
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from assay.encodings import Encoding, Form, Model
from assay.io.checkpoints import Checkpoints
from assay.io.codes import StoredCodes, write_codes
from assay.io.codes.layout import Dtype
from assay.io.shards import Shards, windows
from assay.io.shards.preadv import read_pieces
from assay.io.tensors import fingerprint_tensors
from assay.numerics.codes import TopKCodes, densify
from assay.parameters import (
    KMeansParameters,
    PCAParameters,
    SparsityParameters,
    StandardizeParameters,
)
from assay.pipelines import dictionary_nodes
from assay.pipelines.encode.pipeline import create_pipeline
from assay.pipelines.kmeans.nodes import fit_kmeans
from assay.pipelines.pca.nodes import fit_pca
from assay.pipelines.standardize.nodes import fit_statistics
from shards import read_content

TOKENS, D_MODEL = 16, 80
ENCODINGS = {
    "kmeans-onehot": ("onehot", 8),
    "kmeans-invdist": ("dense", 8),
    "kmeans-distance-sqeuclidean": ("dense", 8),
    "pca-dense": ("dense", D_MODEL),
    "pca-topk-00001": ("sparse", D_MODEL),
    "pca-topk-00016": ("sparse", D_MODEL),
}


PARAMETERS: dict[str, Any] = {
    "kmeans": KMeansParameters(n_clusters=8, batch_size=64, n_init=1, max_iter=2, seed=3),
    "pca": PCAParameters(),
}


@pytest.fixture(scope="module")
def fitted(planted, tmp_path_factory):
    """Statistics and both models of layer 5."""
    shards = Shards(planted[0])
    checkpoints = Checkpoints(tmp_path_factory.mktemp("checkpoints"))
    statistics = fit_statistics(shards, StandardizeParameters(), checkpoints, "cpu", layer=5)
    kmeans, _ = fit_kmeans(shards, statistics, PARAMETERS["kmeans"], checkpoints, "cpu", layer=5)
    return statistics, {
        "kmeans": kmeans,
        "pca": fit_pca(shards, statistics, PCAParameters(), checkpoints, "cpu", layer=5)[0],
    }


@pytest.fixture
def encode(planted, fitted):
    statistics, models = fitted

    def run(encoding, model=None, statistics=statistics, path=planted[1], whiten=None, **options):
        form = replace(Form.parse_name(encoding), whiten=whiten)
        made_of = (
            Shards(path),
            statistics,
            model or models[form.family],
            "cpu",
            PARAMETERS[form.family],
        )
        return dictionary_nodes.encode(*made_of, layer=5, name=encoding, kind=form, **options)

    return run


def gather(codes, batch_size):
    """All rows of each array."""
    batches = list(codes.batches(batch_size))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def oracle(encoding, tokens, models, *, whiten=False):
    """Each token's dense code and squared error, one at a time in float64."""
    centers = models["kmeans"]["cluster_centers"].double().numpy()
    mean, components = models["pca"]["mean"].numpy(), models["pca"]["components"].numpy()
    sigma = np.sqrt(models["pca"]["explained_variance"].numpy()) if whiten else np.ones(D_MODEL)
    values, errors = [], []
    for token in tokens:
        if encoding.startswith("kmeans"):
            distances = np.sqrt(((token - centers) ** 2).sum(axis=1))
            nearest = distances == distances.min()
            values.append(
                {
                    "kmeans-onehot": 1.0 * nearest,
                    "kmeans-invdist": 1 / (distances + 1e-6),
                    "kmeans-distance-sqeuclidean": distances**2,
                }[encoding]
            )
            errors.append(distances.min() ** 2)
        else:
            z = components @ (token - mean)
            k = D_MODEL if encoding == "pca-dense" else int(encoding[-5:])
            z[np.argsort(-np.abs(z / sigma), kind="stable")[k:]] = 0
            values.append(z / sigma)
            errors.append(((token - mean - z @ components) ** 2).sum())
    return np.array(values), np.array(errors)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_codes_are_those_of_the_tokens_in_order(planted, fitted, encode, encoding):
    statistics, models = fitted
    codes = encode(encoding)
    assert (codes.format, codes.n_features) == ENCODINGS[encoding]
    assert codes.n_rows == 24 * TOKENS
    tokens = (read_content(planted[1], 5) - statistics["mean"].numpy()) / statistics["std"].numpy()
    values, errors = oracle(encoding, tokens, models)
    found = gather(codes, 100)
    dense = np.zeros_like(values)
    if codes.format == "dense":
        dense = found["values"].numpy()
    elif codes.format == "onehot":
        np.put_along_axis(dense, found["indices"].numpy()[:, None], 1, axis=1)
    else:
        assert found["indices"].shape[1] == int(encoding[-5:])
        np.put_along_axis(dense, found["indices"].numpy(), found["values"].numpy(), axis=1)
    np.testing.assert_allclose(dense, values, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(found["error"].numpy(), errors, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("encoding", ["pca-dense", "pca-topk-00001", "pca-topk-00016"])
@pytest.mark.parametrize("dtype", get_args(Dtype))
def test_whitened_codes_are_those_of_the_tokens_and_their_errors_stay_on_any_disk(
    planted, fitted, encode, tmp_path, encoding, dtype
):
    """No K but their own is read from them, so rounding what is stored changes no error."""
    statistics, models = fitted
    codes = encode(encoding, whiten=True)
    assert json.loads(codes.provenance["parameters"])["whiten"] is True
    assert "whiten" not in json.loads(encode(encoding).provenance["parameters"])
    tokens = (read_content(planted[1], 5) - statistics["mean"].numpy()) / statistics["std"].numpy()
    values, errors = oracle(encoding, tokens, models, whiten=True)
    found = gather(codes, 64)
    dense = densify(found, codes.format, D_MODEL)
    np.testing.assert_allclose(dense.numpy(), values, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(found["error"].numpy(), errors, rtol=1e-5, atol=1e-5)
    write_codes(tmp_path / "codes", codes, batch_size=64, rows_per_shard=128, dtype=dtype)
    stored = gather(StoredCodes(tmp_path / "codes"), 64)
    assert torch.equal(stored["error"], found["error"])
    relative = {"float32": 0, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
    torch.testing.assert_close(stored["values"].float(), found["values"], rtol=relative, atol=1e-6)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_codes_computed_on_the_fly_equal_stored_ones(encode, encoding, tmp_path):
    codes = encode(encoding)
    write_codes(tmp_path / "codes", codes, batch_size=64, rows_per_shard=128)
    stored = StoredCodes(tmp_path / "codes")
    assert len(stored.shards) == 3
    assert (stored.format, stored.n_rows, stored.n_features) == (
        codes.format,
        codes.n_rows,
        codes.n_features,
    )
    assert stored.provenance == codes.provenance
    computed, from_disk = gather(codes, 64), gather(stored, 50)
    assert computed.keys() == from_disk.keys()
    for name, tensor in computed.items():
        assert torch.equal(tensor, from_disk[name])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_pass_can_be_made_again_in_batches_of_any_size(encode, encoding):
    codes = encode(encoding)
    first, again, whole = gather(codes, 64), gather(codes, 64), gather(codes, 1_000)
    assert [len(batch["error"]) for batch in codes.batches(100)] == [100, 100, 100, 84]
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", get_args(Dtype))
def test_the_folder_of_the_largest_k_holds_that_of_a_smaller_one_bit_for_bit(
    encode, tmp_path, dtype
):
    stored = {}
    for k in (D_MODEL, 16, 1):
        codes = encode(f"pca-topk-{k:05d}")
        write_codes(tmp_path / f"{k}", codes, batch_size=64, rows_per_shard=128, dtype=dtype)
        stored[k] = StoredCodes(tmp_path / f"{k}")
        exact, relative = (
            gather(codes, 64)["error"],
            {"float32": 0, "float16": 2**-10, "bfloat16": 2**-7}[dtype],
        )
        torch.testing.assert_close(gather(stored[k], 64)["error"], exact, rtol=relative, atol=1e-9)
    for largest, k in ((D_MODEL, 16), (D_MODEL, 1), (16, 1)):
        found, wanted = gather(TopKCodes(stored[largest], k), 50), gather(stored[k], 70)
        assert found.keys() == wanted.keys() == {"values", "indices", "error"}
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), (largest, k, name)


@pytest.mark.parametrize("changed", ["a shard", "the format", "nothing"])
def test_what_was_begun_of_older_shards_or_by_older_code_is_not_gone_on_with(
    planted, encode, tmp_path, monkeypatch, changed
):
    path = tmp_path / planted[1].name
    shutil.copytree(planted[1], path)

    def until_the_power_goes(codes):
        stream = codes.stream

        def cut(batch_size, start):
            yield from itertools.islice(stream(batch_size, start), 3)
            raise OSError("the power went")

        codes.stream = cut
        return codes

    with pytest.raises(OSError, match="the power went"):
        write_codes(
            tmp_path / "codes",
            until_the_power_goes(encode("pca-dense", path=path)),
            batch_size=64,
            rows_per_shard=128,
        )
    if changed == "a shard":
        tokens = np.fromfile(path / "acts000000.bin", "<f4")
        (tokens * np.float32(1.01)).tofile(path / "acts000000.bin")
    elif changed == "the format":
        monkeypatch.setattr(dictionary_nodes, "FORMAT", dictionary_nodes.FORMAT + 1)
    codes = encode("pca-dense", path=path)
    stream, asked = codes.stream, []
    codes.stream = lambda batch_size, start: (asked.append(start), stream(batch_size, start))[1]
    write_codes(tmp_path / "codes", codes, batch_size=64, rows_per_shard=128)
    assert asked == [128 if changed == "nothing" else 0]
    found, wanted = (
        gather(StoredCodes(tmp_path / "codes"), 64),
        gather(encode("pca-dense", path=path), 64),
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert [child.name for child in tmp_path.iterdir() if child != path] == ["codes"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("start", [1, 99, 100, 383, 384])
def test_a_pass_can_start_at_any_patch(encode, encoding, start):
    codes = encode(encoding)
    whole, rest = gather(codes, 100), list(codes.batches(100, start))
    for name, tensor in whole.items():
        found = torch.cat([tensor[:0], *(batch[name] for batch in rest)])
        torch.testing.assert_close(found, tensor[start:], rtol=1e-6, atol=1e-6)


def test_nothing_is_read_before_the_first_batch(encode, monkeypatch):
    seen = []
    monkeypatch.setattr(
        windows, "read_pieces", lambda *args: (seen.append(args), read_pieces(*args))[1]
    )
    codes = encode("kmeans-invdist")
    assert not seen
    next(codes.batches(10))
    assert seen


@pytest.mark.parametrize("node", ["encode", "pca", "kmeans"])
def test_codes_and_errors_are_made_of_the_model_that_was_fitted_alone(
    planted, fitted, encode, node
):
    statistics, models = fitted
    wrong = {"mean": statistics["mean"], "std": statistics["std"].flip(0)}

    def measure(kind):
        made_of = Shards(planted[0]), wrong, models[kind.family], "cpu", PARAMETERS[kind.family]
        return dictionary_nodes.measure(*made_of, layer=5, name=kind.family, kind=kind, ks=(1,))

    make = {
        "encode": lambda: next(
            encode("pca-topk-00016", statistics=wrong, path=planted[0]).batches(10)
        ),
        "pca": lambda: measure(Form("dense")),
        "kmeans": lambda: measure(Form("onehot")),
    }
    with pytest.raises(
        ValueError, match=rf"{planted[0]}, layer 5, does not go with the statistics of shards\.fit"
    ):
        make[node]()


def test_provenance_says_what_the_codes_are_of(planted, fitted, encode):
    statistics, models = fitted
    assert encode("pca-topk-00016").provenance == {
        "encoding": "pca-topk-00016",
        "layer": 5,
        "shards": planted[1].name,
        "model": fingerprint_tensors(models["pca"]),
        "statistics": fingerprint_tensors(statistics),
        "parameters": '{"batch_size": 16384, "max_tokens": null}',
        "seed": None,
    }
    kmeans = encode("kmeans-onehot", seed=3).provenance
    assert kmeans["seed"] == 3
    assert json.loads(kmeans["parameters"])["n_clusters"] == 8
    assert (
        encode("kmeans-onehot", seed=3, sparsity=SparsityParameters(top_k=2)).provenance == kmeans
    )


@pytest.mark.parametrize(
    "encoding", ["kmeans-invdist", "kmeans-distance-cosine", "kmeans-distance-unit"]
)
@pytest.mark.parametrize("sparsity", [{"top_k": 3}, {"margin": 0.1}])
def test_a_disk_too_small_gets_the_largest_entries(encode, encoding, sparsity):
    dense = encode(encoding, sparsity=SparsityParameters.model_validate(sparsity))
    assert Form.parse_name(encoding).zero_is_far
    sparse = dense.fallback()
    assert (sparse.format, sparse.k, sparse.fallback) == ("sparse", sparsity.get("top_k"), None)
    assert json.loads(sparse.provenance["sparsity"]) == {"top_k": None, "margin": None} | sparsity
    for found, whole in zip(sparse.batches(100, 100), dense.batches(100, 100), strict=True):
        values, wanted = densify(found, "sparse", 8), whole["values"]
        least = (
            wanted.abs().sort(dim=1).values[:, -3:-2] if "top_k" in sparsity else torch.tensor(0.1)
        )
        assert torch.equal(values, torch.where(wanted.abs() >= least, wanted, 0.0))


@pytest.mark.parametrize(
    "encoding", ["kmeans-onehot", "kmeans-distance-sqeuclidean", "kmeans-distance-neg_euclidean"]
)
def test_codes_in_which_0_is_not_far_have_no_sparser_form(encode, encoding):
    assert encode(encoding, sparsity=SparsityParameters(top_k=2)).fallback is None
    assert not Form.parse_name(encoding).zero_is_far
    assert encode("kmeans-invdist").fallback is None, "it was not asked for"


def test_provenance_tells_models_and_statistics_apart(fitted, encode):
    statistics, models = fitted
    first = encode("pca-dense").provenance
    other = encode(
        "pca-dense", {**models["pca"], "components": models["pca"]["components"].flip(0)}
    ).provenance
    assert {name for name in first if first[name] != other[name]} == {"model"}
    other = encode(
        "pca-dense", statistics={**statistics, "mean": statistics["mean"] + 1}
    ).provenance
    assert {name for name in first if first[name] != other[name]} == {"statistics"}


def test_an_encoding_that_is_none_or_has_too_large_a_k_is_refused_at_once(fitted, encode):
    _, models = fitted
    with pytest.raises(ValueError, match="'kmeans-cosine'; wanted one of kmeans-distance-cosine"):
        encode("kmeans-cosine")
    with pytest.raises(ValueError, match="found K = 81, wanted 1 to 80"):
        encode("pca-topk-00081", models["pca"])


def test_both_probe_splits_are_encoded():
    rows = (
        Encoding(Model("kmeans", 3), Form("onehot"), 8),
        Encoding(Model("pca"), Form("topk", 16), 16),
    )
    pipeline = create_pipeline(5, rows)
    assert {node.name: sorted(node.inputs)[-1] for node in pipeline.nodes} == dict.fromkeys(
        (
            f"encode.{name}.{split}"
            for name in ("kmeans-onehot", "pca-topk-00016")
            for split in ("probe_train", "probe_val")
        ),
        "statistics",
    )
    for node in pipeline.nodes:
        _, encoding, split = node.name.split(".")
        assert node.outputs == [f"codes_{encoding}_{split}"]
        assert {f"shards_{split}", f"{encoding.partition('-')[0]}_model"} < set(node.inputs)

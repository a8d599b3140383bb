"""Encoders against the formulas written out in float64 numpy, a token at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.encodings import Form
from assay.numerics.codes import ComputedCodes, TopKCodes, densify
from assay.numerics.dictionary import open_dictionary
from assay.numerics.pca import StreamingPCA

D = 6


def _tokens(n, seed, scale=1.0, offset=0.0):
    generator = np.random.default_rng(seed)
    return torch.from_numpy((scale * generator.standard_normal((n, D)) + offset).astype(np.float32))


def _kmeans_state(n_clusters=4, seed=1, scale=1.0, offset=0.0):
    return {
        "cluster_centers": _tokens(n_clusters, seed, scale, offset),
        "counts": torch.ones(n_clusters, dtype=torch.int64),
    }


def _pca_state(n_components=D, seed=2):
    x = _tokens(40, seed) @ _tokens(D, seed + 1) + 3
    return StreamingPCA(n_components).partial_fit(x).state_dict()


def _distances(x, state):
    """Euclidean distances (tokens, centers) by differences."""
    x, centers = x.double().numpy(), state["cluster_centers"].double().numpy()
    return np.array(
        [
            [np.sqrt(sum((a - b) ** 2 for a, b in zip(t, c, strict=True))) for c in centers]
            for t in x
        ]
    )


def _coefficients(x, state):
    """z = U^T (x~ - mean) of each token."""
    x, mean, components = x.double().numpy(), state["mean"].numpy(), state["components"].numpy()
    return np.array([[float(np.dot(u, token - mean)) for u in components] for token in x]).reshape(
        len(x), len(components)
    )


def _kept(z, k):
    """The k largest |z| of each row, by falling |z|, ties to the lower index: by Python's sort."""
    return np.array(
        [sorted(range(len(row)), key=lambda j: (-abs(row[j]), j))[:k] for row in z], dtype=np.int64
    ).reshape(len(z), k)


def _residuals(x, state, z, kept):
    """||x~ - x^||^2 from the reconstruction itself."""
    mean, components = state["mean"].numpy(), state["components"].numpy()
    errors = []
    for token, row, indices in zip(x.double().numpy(), z, kept, strict=True):
        reconstruction = mean + sum((row[j] * components[j] for j in indices), np.zeros(D))
        errors.append(float(np.sum((token - reconstruction) ** 2)))
    return np.array(errors)


def _assert_error(batch, wanted, atol=1e-10):
    assert batch["error"].dtype == torch.float64
    np.testing.assert_allclose(batch["error"].numpy(), wanted, rtol=1e-6, atol=atol)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 9),
    st.integers(1, 7),
    st.integers(0, 99),
    st.sampled_from([(1.0, 0.0), (1.0, 50.0), (30.0, 0.0)]),
)
def test_kmeans_encoders_follow_the_formulas(n, n_clusters, seed, where):
    scale, offset = where
    state = _kmeans_state(n_clusters, seed + 1, scale, offset)
    x = _tokens(n, seed, scale, offset)
    distances = _distances(x, state).reshape(n, n_clusters)

    onehot = open_dictionary("kmeans-onehot", state)
    batch = onehot.encode(x)
    assert (onehot.format, onehot.n_features, set(batch)) == (
        "onehot",
        n_clusters,
        {"indices", "error"},
    )
    assert batch["indices"].dtype == torch.int64
    assert batch["indices"].tolist() == distances.argmin(axis=1).tolist()
    _assert_error(batch, distances.min(axis=1) ** 2)

    invdist = open_dictionary("kmeans-invdist", state)
    batch = invdist.encode(x)
    assert (invdist.format, invdist.n_features, set(batch)) == (
        "dense",
        n_clusters,
        {"values", "error"},
    )
    assert batch["values"].dtype == torch.float32
    assert batch["values"].shape == (n, n_clusters)
    np.testing.assert_allclose(batch["values"].numpy(), 1 / (distances + 1e-6), rtol=1e-6)
    _assert_error(batch, distances.min(axis=1) ** 2)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 9), st.integers(1, D), st.integers(0, 99))
def test_pca_dense_follows_the_formula(n, n_components, seed):
    state, x = _pca_state(n_components), _tokens(n, seed, 3.0)
    z = _coefficients(x, state)
    encoder = open_dictionary("pca-dense", state)
    batch = encoder.encode(x)
    assert (encoder.format, encoder.n_features, set(batch)) == (
        "dense",
        n_components,
        {"values", "error"},
    )
    assert batch["values"].dtype == torch.float32
    assert batch["values"].shape == (n, n_components)
    np.testing.assert_allclose(batch["values"].numpy(), z, rtol=1e-6, atol=1e-10)
    _assert_error(batch, _residuals(x, state, z, _kept(z, n_components)))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9), st.integers(1, D), st.integers(0, 99), st.data())
def test_pca_topk_follows_the_formula(n, n_components, seed, data):
    k = data.draw(st.integers(1, n_components))
    state, x = _pca_state(n_components), _tokens(n, seed, 3.0)
    z = _coefficients(x, state)
    kept = _kept(z, k)
    encoder = open_dictionary(f"pca-topk-{k:05d}", state)
    batch = encoder.encode(x)
    assert (encoder.format, encoder.n_features) == ("sparse", n_components)
    assert set(batch) == {"values", "indices", "error"}
    assert batch["values"].dtype == torch.float32
    assert batch["indices"].dtype == torch.int64
    assert batch["indices"].tolist() == kept.tolist()
    np.testing.assert_allclose(
        batch["values"].numpy(), np.take_along_axis(z, kept, 1), rtol=1e-6, atol=1e-10
    )
    _assert_error(batch, _residuals(x, state, z, kept))

    plain = np.zeros_like(z)
    np.put_along_axis(plain, kept, np.take_along_axis(z, kept, 1), 1)
    np.testing.assert_allclose(
        densify(batch, "sparse", n_components).numpy(), plain, rtol=1e-6, atol=1e-10
    )


def test_topk_of_all_components_is_the_dense_code():
    state, x = _pca_state(), _tokens(7, 3)
    dense, topk = (open_dictionary(name, state) for name in ("pca-dense", f"pca-topk-{D:05d}"))
    found = densify(topk.encode(x), "sparse", D)
    assert torch.equal(found, dense.encode(x)["values"])
    assert torch.equal(topk.encode(x)["error"], dense.encode(x)["error"])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9), st.integers(1, D), st.integers(0, 99), st.data())
def test_whitened_codes_follow_the_formula_and_their_errors_are_of_the_coefficients_themselves(
    n, n_components, seed, data
):
    k = data.draw(st.integers(1, n_components))
    state, x = _pca_state(n_components), _tokens(n, seed, 3.0)
    z = _coefficients(x, state)
    white = z / np.sqrt(state["explained_variance"].numpy())
    kept = _kept(white, k)
    encoder = open_dictionary(Form("topk", k, whiten=True), state)
    batch = encoder.encode(x)
    assert batch["indices"].tolist() == kept.tolist()
    np.testing.assert_allclose(
        batch["values"].numpy(), np.take_along_axis(white, kept, 1), rtol=1e-6, atol=1e-10
    )
    _assert_error(batch, _residuals(x, state, z, kept))
    dense = open_dictionary(Form("dense", whiten=True), state).encode(x)
    np.testing.assert_allclose(dense["values"].numpy(), white, rtol=1e-6, atol=1e-10)
    _assert_error(dense, _residuals(x, state, z, _kept(z, n_components)))
    if k == D:
        assert batch["error"].tolist() == [0.0] * n
        assert torch.equal(densify(batch, "sparse", D), dense["values"])


def test_a_component_without_variance_is_whitened_by_nothing():
    state = {
        "mean": torch.zeros(3, dtype=torch.float64),
        "components": torch.eye(3, dtype=torch.float64),
        "explained_variance": torch.tensor([16.0, 0.25, 0.0], dtype=torch.float64),
    }
    x = torch.tensor([[4.0, 3.0, 2.0], [4.0, 0.25, 2.0]], dtype=torch.float32)
    batch = open_dictionary(Form("topk", 2, whiten=True), state).encode(x)
    assert batch["indices"].tolist() == [[1, 2], [2, 0]]
    assert batch["values"].tolist() == [[6.0, 2.0], [2.0, 1.0]]
    assert batch["error"].tolist() == [16.0, 0.0625]


def test_codes_are_whitened_as_the_state_says_unless_it_is_said_when_it_is_opened():
    x = _tokens(40, 2) * torch.arange(1, D + 1)
    states = {
        whiten: StreamingPCA(whiten=whiten).partial_fit(x).state_dict() for whiten in (False, True)
    }
    for name in ("pca-dense", "pca-topk-00002"):
        raw, white = (open_dictionary(name, states[each]).encode(x) for each in (False, True))
        assert not torch.equal(raw["values"], white["values"])
        for state in states.values():
            for whiten, wanted in ((False, raw), (True, white)):
                encoder = open_dictionary(replace(Form.parse_name(name), whiten=whiten), state)
                found = encoder.encode(x)
                assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
                top = name != "pca-dense"
                assert (encoder.encode_rounded is not None) == (top and not whiten)


def test_ties_go_to_the_lower_index():
    state = {
        "mean": torch.zeros(4, dtype=torch.float32),
        "components": torch.eye(4, dtype=torch.float32),
        "explained_variance": torch.ones(4, dtype=torch.float32),
    }
    x = torch.tensor(
        [[1.0, -2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0], [3.0, -3.0, 3.0, -3.0]], dtype=torch.float32
    )
    batch = open_dictionary("pca-topk-00003", state).encode(x)
    assert batch["indices"].tolist() == [[1, 2, 0], [0, 1, 2], [0, 1, 2]]
    assert batch["values"].tolist() == [[-2.0, 2.0, 1.0], [0.0, 0.0, 0.0], [3.0, -3.0, 3.0]]
    assert batch["error"].tolist() == [1.0, 0.0, 9.0]
    centers = {
        "cluster_centers": torch.tensor([[1.0], [-1.0], [1.0]], dtype=torch.float32),
        "counts": torch.ones(3, dtype=torch.int64),
    }
    assert open_dictionary("kmeans-onehot", centers).encode(
        torch.tensor([[0.0], [1.0], [-3.0]], dtype=torch.float32)
    )["indices"].tolist() == [
        0,
        0,
        1,
    ]


def _transformed(name, x, state):
    """Each transform of the distances, a token and a center at a time."""
    distances, centers = _distances(x, state), state["cluster_centers"].double().numpy()
    found = np.zeros_like(distances)
    for i, token in enumerate(x.double().numpy()):
        for j, center in enumerate(centers):
            d, norms = distances[i, j], np.linalg.norm(token) * np.linalg.norm(center)
            found[i, j] = {
                "sqeuclidean": d**2,
                "neg_euclidean": -d,
                "cosine": token @ center / norms if norms else 0.0,
                "unit": 1 - d / distances[i].max() if distances[i].max() else 1.0,
            }[name]
    return found


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["sqeuclidean", "neg_euclidean", "cosine", "unit"]),
    st.integers(1, 7),
    st.integers(0, 99),
    st.sampled_from([(1.0, 0.0), (1.0, 50.0), (30.0, 0.0), (0.0, 0.0), (0.0, 2.0)]),
)
def test_distances_in_four_transforms_follow_the_formulas(name, n_clusters, seed, where):
    scale, offset = where
    state = _kmeans_state(n_clusters, seed + 1, scale, offset)
    x = torch.cat(
        [
            _tokens(5, seed, scale, offset),
            state["cluster_centers"][:2],
            torch.zeros(1, D, dtype=torch.float32),
        ]
    )
    encoder = open_dictionary(f"kmeans-distance-{name}", state)
    assert (encoder.format, encoder.n_features, encoder.k) == ("dense", n_clusters, n_clusters)
    assert encoder.zero_is_far == (name in ("cosine", "unit"))
    batch = encoder.encode(x)
    assert batch["values"].dtype == torch.float32
    np.testing.assert_allclose(
        batch["values"].numpy(), _transformed(name, x, state), rtol=1e-5, atol=2e-6
    )
    _assert_error(batch, _distances(x, state).min(axis=1) ** 2)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, D), st.integers(0, 99), st.data())
def test_one_folder_of_topk_codes_serves_every_smaller_k_bit_for_bit(n_components, seed, data):
    largest = data.draw(st.integers(1, n_components))
    k = data.draw(st.integers(1, largest))
    state, x = _pca_state(n_components), _tokens(9, seed, 3.0)

    def codes(k):
        encode = open_dictionary(f"pca-topk-{k:05d}", state).encode
        return ComputedCodes(
            "sparse", 9, n_components, k, lambda b, start: iter(map(encode, x[start:].split(b)))
        )

    cut = TopKCodes(codes(largest), k)
    assert (cut.format, cut.k, cut.n_rows, cut.n_features) == ("sparse", k, 9, n_components)
    for found, wanted in zip(cut.batches(4, 1), codes(k).batches(4, 1), strict=True):
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("offset", [0.0, 1.0, 300.0])
@pytest.mark.parametrize("name", ["kmeans-onehot", "kmeans-invdist"])
def test_a_token_on_a_center_has_no_distance(name, offset):
    state = _kmeans_state(5, scale=20.0, offset=offset)
    batch = open_dictionary(name, state).encode(state["cluster_centers"])
    assert batch["error"].tolist() == [0.0] * 5
    if name == "kmeans-invdist":
        torch.testing.assert_close(
            batch["values"].diagonal(), torch.full((5,), 1e6, dtype=torch.float32)
        )
    else:
        assert batch["indices"].tolist() == list(range(5))


@pytest.mark.parametrize("offset", [0.0, 1.0, 300.0, 1e4])
@pytest.mark.parametrize(
    "name", ["invdist", "distance-sqeuclidean", "distance-neg_euclidean", "distance-unit"]
)
def test_every_center_that_lies_where_a_token_does_is_at_no_distance(name, offset):
    state = _kmeans_state(5, scale=20.0, offset=offset)
    state["cluster_centers"][3] = state["cluster_centers"][1]
    state["cluster_centers"][4] = torch.nextafter(
        state["cluster_centers"][1], torch.tensor(torch.inf, dtype=torch.float32)
    )
    x = state["cluster_centers"][1:2].repeat(7, 1)
    batch = open_dictionary(f"kmeans-{name}", state).encode(x)
    distances = _distances(x, state)
    nowhere = {
        "invdist": 1e6,
        "distance-sqeuclidean": 0.0,
        "distance-neg_euclidean": 0.0,
        "distance-unit": 1.0,
    }[name]
    torch.testing.assert_close(
        batch["values"][:, [1, 3]],
        torch.full((7, 2), nowhere, dtype=torch.float32),
        rtol=1e-7,
        atol=0,
    )
    wanted = (
        1 / (distances + 1e-6)
        if name == "invdist"
        else _transformed(name.partition("-")[2], x, state)
    )
    np.testing.assert_allclose(batch["values"].numpy(), wanted, rtol=1e-6, atol=0)
    assert batch["error"].tolist() == [0.0] * 7


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name",
    ["kmeans-onehot", "kmeans-invdist", "kmeans-distance-cosine", "pca-dense", "pca-topk-00002"],
)
def test_a_token_that_is_not_finite_has_no_code(name, bad):
    x = _tokens(3, 0)
    x[1, 2] = bad
    encoder = open_dictionary(name, _kmeans_state() if name.startswith("kmeans") else _pca_state())
    with pytest.raises(
        ValueError,
        match="row 1, dimension 2 of a batch is NaN or infinity, wanted finite activations",
    ):
        encoder.encode(x)


def test_a_token_near_a_center_has_its_distance():
    state = {
        "cluster_centers": torch.tensor([[0.0, 900.0], [0.0, -900.0]], dtype=torch.float32),
        "counts": torch.ones(2, dtype=torch.int64),
    }
    x = torch.tensor([[1e-6, 900.0], [-3e-5, -900.0]], dtype=torch.float32)
    batch = open_dictionary("kmeans-invdist", state).encode(x)
    wanted = 1 / (_distances(x, state) + 1e-6)
    np.testing.assert_allclose(batch["values"].numpy(), wanted, rtol=1e-5)


@pytest.mark.parametrize("name", ["kmeans-onehot", "kmeans-invdist", "pca-dense", "pca-topk-00002"])
def test_codes_of_a_token_do_not_depend_on_its_batch(name):
    encoder = open_dictionary(name, _kmeans_state() if name.startswith("kmeans") else _pca_state())
    x = _tokens(9, 4)
    untouched = x.clone()
    whole = encoder.encode(x)
    for sizes in ([1] * 9, [4, 5], [0, 9]):
        parts = [encoder.encode(part) for part in x.split(sizes)]
        for key, tensor in whole.items():
            torch.testing.assert_close(
                torch.cat([part[key] for part in parts]), tensor, rtol=1e-6, atol=1e-10
            )
    assert torch.equal(x, untouched)


@pytest.mark.parametrize("name", ["kmeans-onehot", "kmeans-invdist", "pca-dense", "pca-topk-00002"])
def test_tokens_of_another_width_are_refused(name):
    encoder = open_dictionary(name, _kmeans_state() if name.startswith("kmeans") else _pca_state())
    with pytest.raises(ValueError, match=f"{D + 1}"):
        encoder.encode(torch.ones(2, D + 1, dtype=torch.float32))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "kmeans",
        "kmeans-distance",
        "kmeans-distance-euclidean",
        "KMEANS-onehot",
        "kmeans-onehot ",
        "pca-topk",
        "pca-topk-",
        "pca-topk-64",
        "pca-topk--0064",
        "pca-topk-00064.0",
        "pca-topk-00064\n",
        "pca-topk-٠٠٠٦٤",
        "x-pca-topk-00064",
        "pca-topk-0x040",
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(
        ValueError,
        match=(
            r"wanted one of kmeans-distance-cosine, .*, kmeans-onehot, pca-dense or pca-topk-KKKKK"
        ),
    ) as caught:
        open_dictionary(name, {**_kmeans_state(), **_pca_state()})
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(("n_components", "k"), [(D, D + 1), (D, 100_000), (3, 4), (D, 0)])
def test_k_is_1_to_the_number_of_components_at_once(n_components, k):
    with pytest.raises(ValueError, match=f"found K = {k}, wanted 1 to {n_components}"):
        open_dictionary(f"pca-topk-{k:05d}", _pca_state(n_components))

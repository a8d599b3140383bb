"""On a GPU the numerics give what they give on the CPU.

With torch, numpy and pytest alone: `pytest -m gpu tests/numerics/test_on_cuda.py
    tests/numerics/test_kernels.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from assay.architecture import Architecture
from assay.codes import Batch
from assay.encodings import Form
from assay.numerics.codes import ComputedCodes
from assay.numerics.dictionary import open_dictionary
from assay.numerics.kmeans.distances import chunked_distances
from assay.numerics.kmeans.estimator import MiniBatchKMeans
from assay.numerics.kmeans.nearest import NearestCenters
from assay.numerics.kmeans.seeding import kmeans_plus_plus
from assay.numerics.kmeans.step import mini_batch_step
from assay.numerics.moments import StreamingMoments
from assay.numerics.pca import StreamingPCA
from assay.numerics.probe import LogisticProbe1d
from assay.numerics.probe.cells import CellMap
from assay.numerics.probe.sketch import FeatureSketch
from assay.numerics.ranking import rank_features, strongest_examples, top_rows
from assay.numerics.sae import SparseAutoencoder
from hostile import KINDS, make

pytestmark = pytest.mark.gpu

N_CLUSTERS, D = 40, 24


@pytest.fixture
def tokens() -> Tensor:
    """Clusters of different sizes and spreads about a mean, float32 (2000, 24)."""
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(2000, D, generator=generator, dtype=torch.float32) * torch.linspace(0.1, 1.5, D)
        + 3
    )
    return (
        x
        + 2
        * torch.randn(60, D, generator=generator, dtype=torch.float32)[torch.arange(2000) ** 2 % 60]
    )


def assert_same(found: Tensor, wanted: Tensor, rtol: float = 0.0, atol: float = 0.0) -> None:
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_centers_are_the_same(kind: str) -> None:
    x, centers = make(kind, 3000, 300, 64, 1)
    assert_same(NearestCenters(centers.cuda()).find(x.cuda()), NearestCenters(centers).find(x))


@pytest.mark.parametrize("kind", KINDS)
def test_distances_are_the_same_to_their_bound(kind: str) -> None:
    x, centers = make(kind, 200, 300, 64, 1)
    found, wanted = (
        torch.cat(list(chunked_distances(*each)))
        for each in ((x.cuda(), centers.cuda()), (x, centers))
    )
    assert_same(found, wanted, rtol=2.0**-23)


def test_a_step_of_k_means_is_the_same(tokens: Tensor) -> None:
    centers, counts = tokens[:N_CLUSTERS].clone(), torch.arange(N_CLUSTERS)
    found = mini_batch_step(tokens.cuda(), centers.cuda(), counts.cuda())
    for mine, theirs in zip(found, mini_batch_step(tokens, centers, counts), strict=True):
        assert_same(mine, theirs, rtol=1e-6 if mine.dtype == torch.float32 else 1e-12)


def fit(tokens: Tensor, **options: int) -> MiniBatchKMeans:
    model = MiniBatchKMeans(
        N_CLUSTERS, device="cuda", max_iter=3, max_no_improvement=None, **options
    )
    return model.fit(lambda _: iter(tokens.split(200)))


def test_a_fit_of_k_means_is_the_same_bits_again(tokens: Tensor) -> None:
    one, other = fit(tokens), fit(tokens)
    assert torch.equal(one.cluster_centers_, other.cluster_centers_)
    assert one.history_ == other.history_


@pytest.mark.parametrize("break_after", [1, 10, 17])
def test_k_means_is_gone_on_with_to_the_bit(tokens: Tensor, break_after: int) -> None:
    """Through the CPU, as a checkpoint on disk goes."""
    whole = fit(tokens)

    model = MiniBatchKMeans(N_CLUSTERS, device="cuda", max_iter=3, max_no_improvement=None)
    for _ in model.seed_from(tokens.split(200)).steps(lambda _: iter(tokens.split(200))):
        if model.n_steps_ == break_after:
            break
    tensors, state = model.checkpoint()
    resumed = MiniBatchKMeans(N_CLUSTERS, device="cuda", max_iter=3, max_no_improvement=None)
    resumed.resume({name: tensor.cpu() for name, tensor in tensors.items()}, state)
    left = resumed.steps_of_pass_
    passes = {resumed.epoch_: tokens.split(200)[left:]}
    for _ in resumed.steps(lambda epoch: iter(passes.get(epoch, tokens.split(200)))):
        pass
    assert torch.equal(resumed.cluster_centers_, whole.cluster_centers_)
    assert torch.equal(resumed.counts_, whole.counts_)


def test_k_means_plus_plus_is_the_same_again(tokens: Tensor) -> None:
    one, other = (
        kmeans_plus_plus(tokens.cuda(), N_CLUSTERS, torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(one, other)
    assert bool((one.cpu()[:, None] == tokens).all(2).any(1).all()), "seeds are tokens"


def test_pca_is_the_same_and_gone_on_with_to_the_bit(tokens: Tensor) -> None:
    def pca(device: str) -> StreamingPCA:
        model = StreamingPCA(device=device)
        for batch in tokens.split(300):
            model.partial_fit(batch)
        return model

    one, other, wanted = pca("cuda"), pca("cuda"), pca("cpu")
    assert torch.equal(one.components_, other.components_)
    assert_same(one.explained_variance_, wanted.explained_variance_, rtol=1e-9)
    assert_same(one.components_, wanted.components_, atol=1e-7)
    half = StreamingPCA(device="cuda")
    for batch in tokens.split(300)[:3]:
        half.partial_fit(batch)
    tensors, state = half.checkpoint()
    resumed = StreamingPCA(device="cuda").resume(
        {name: each.cpu() for name, each in tensors.items()}, state
    )
    for batch in tokens.split(300)[3:]:
        resumed.partial_fit(batch)
    assert torch.equal(resumed.components_, one.components_)


@pytest.mark.parametrize(
    "name",
    [
        "kmeans-onehot",
        "kmeans-invdist",
        *(f"kmeans-distance-{each}" for each in ("sqeuclidean", "neg_euclidean", "unit", "cosine")),
        "pca-dense",
        "pca-topk-00005",
        "pca-dense, whitened",
        "pca-topk-00005, whitened",
    ],
)
def test_codes_are_the_same(tokens: Tensor, name: str) -> None:
    name, _, whiten = name.partition(", ")
    if name.startswith("pca"):
        state = StreamingPCA().partial_fit(tokens).state_dict()
    else:
        state = {
            "cluster_centers": tokens[:N_CLUSTERS].clone(),
            "counts": torch.ones(N_CLUSTERS, dtype=torch.int64),
        }
    there = {key: each.cuda() for key, each in state.items()}
    form = replace(Form.parse_name(name), whiten=bool(whiten))
    found = open_dictionary(form, there).encode(tokens.cuda())
    for key, wanted in open_dictionary(form, state).encode(tokens).items():
        assert_same(found[key], wanted, rtol=1e-6, atol=1e-6 * float(wanted.double().abs().max()))


@pytest.mark.parametrize(
    "architecture",
    [
        Architecture("relu", norm="layer_norm"),
        Architecture("topk", 8, signed=True),
        Architecture("abstopk", 8, norm="constant_norm_rescale"),
        Architecture("jumprelu", keeps_equal=True),
        Architecture("groupmax", 4),
        Architecture("matching_pursuit", max_iterations=5),
    ],
    ids=str,
)
def test_autoencoders_encode_the_same(tokens: Tensor, architecture: Architecture) -> None:
    n, d = 512, tokens.shape[1]
    generator = torch.Generator().manual_seed(0)
    weights = {
        "W_enc": torch.randn(d, n, generator=generator),
        "W_dec": torch.nn.functional.normalize(torch.randn(n, d, generator=generator)),
        "center": torch.randn(d, generator=generator),
        "threshold": torch.rand(n, generator=generator),
    }
    if architecture.activation == "matching_pursuit":
        del weights["W_enc"]
    if architecture.activation != "jumprelu":
        del weights["threshold"]
    there = {name: tensor.cuda() for name, tensor in weights.items()}
    wanted = SparseAutoencoder(weights, architecture)
    found = SparseAutoencoder(there, architecture)
    for method in ("encode_dense", "reconstruct"):
        on_cpu = getattr(wanted, method)(tokens)
        close = 1e-4 * float(on_cpu.abs().max())
        assert_same(getattr(found, method)(tokens.cuda()), on_cpu, rtol=1e-4, atol=close)
    error = wanted.encode(tokens)["error"]
    assert_same(found.encode(tokens.cuda())["error"], error, rtol=1e-3, atol=1e-3)


def test_moments_are_the_same_wherever_they_were_begun(tokens: Tensor) -> None:
    begun = StreamingMoments().partial_fit(tokens[:700])
    found = StreamingMoments.from_state(begun.state_dict()).partial_fit(tokens[700:].cuda())
    wanted = StreamingMoments().partial_fit(tokens)
    assert_same(found.mean_, wanted.mean_, rtol=1e-12)
    assert_same(found.std_, wanted.std_, rtol=1e-12)


def test_ranks_are_the_same(tokens: Tensor) -> None:
    values = tokens.T.round(decimals=1).contiguous()  # with ties
    labels = torch.arange(len(tokens)) % 4 - 1
    thresholds = torch.full((D, 3), 3.0, dtype=torch.float64)
    found = rank_features(values.cuda(), labels.cuda(), 3, thresholds.cuda())
    wanted = rank_features(values, labels, 3, thresholds)
    assert_same(found[0], wanted[0], rtol=1e-12)
    assert_same(found[1:], wanted[1:])
    assert_same(top_rows(values[0].cuda(), 17), top_rows(values[0], 17))
    counted = labels >= 0
    shown = strongest_examples(values.cuda(), counted.cuda(), 20, 5)
    for name, each in strongest_examples(values, counted, 20, 5).items():
        assert_same(shown[name], each)


def test_sketches_are_the_same_and_merge_across_devices(tokens: Tensor) -> None:
    labels = torch.arange(len(tokens)) % 4 - 1
    cells = CellMap.of_rows(tokens.T)
    moved = CellMap(cells.center.cuda(), cells.scale.cuda(), cells.bits, cells.octaves)
    whole, here, there = FeatureSketch(cells, 3), FeatureSketch(cells, 3), FeatureSketch(moved, 3)
    whole.add(tokens, labels)
    here.add(tokens[:500], labels[:500])
    there.add(tokens[500:].cuda(), labels[500:].cuda())
    there.merge(here)
    for name in ("sums", "class_sums", "class_counts", "low", "high"):
        assert_same(getattr(there, name), getattr(whole, name), rtol=1e-9, atol=1e-9)
    here.merge(there)
    assert here.n_rows == 2500
    assert here.sums.device.type == "cpu"


@pytest.mark.parametrize("one_hot", [False, True])
def test_probes_are_the_same(tokens: Tensor, one_hot: bool) -> None:
    labels = (tokens[:, -1] > 3).long() + 2 * (tokens[:, -2] > 3)
    labels[::7] = -1

    def codes() -> ComputedCodes:
        if one_hot:
            nearest = NearestCenters(tokens[:N_CLUSTERS]).find(tokens)
            return ComputedCodes("onehot", len(tokens), N_CLUSTERS, 1, batches(nearest, "indices"))
        return ComputedCodes("dense", len(tokens), D, D, batches(tokens, "values"))

    def batches(rows: Tensor, name: str) -> Callable[[int, int], Iterator[Batch]]:
        return lambda size, start: ({name: part} for part in rows[start:].split(size))

    found, wanted = (
        LogisticProbe1d().fit(codes(), labels.cuda(), 4),
        LogisticProbe1d().fit(codes(), labels, 4),
    )
    assert_same(
        found.judge(codes(), labels.cuda()).loss, wanted.judge(codes(), labels).loss, atol=1e-9
    )
    assert_same(found.coef_standardized_, wanted.coef_standardized_, atol=1e-7)

"""What a small run gives, to the digits: who changes it raises FORMAT, so that nobody's older
results are taken for new ones.
"""

import pytest
import torch

from assay.numerics import (
    LogisticProbe1d,
    MiniBatchKMeans,
    StreamingMoments,
    StreamingPCA,
    open_dictionary,
    standardize,
)
from assay.numerics.codes import TensorCodes

CHANGED = (
    "results changed: if that is meant, raise FORMAT in fingerprints.py (for fits and codes also in"
    " pipelines/), and pin the new ones"
)


def small_numbers(n: int, d: int, seed: int) -> torch.Tensor:
    """Whole numbers from -8 to 7, float32 (n, d), by a generator that is the same everywhere."""
    state, found = seed, []
    for _ in range(n * d):
        state = (1_103_515_245 * state + 12_345) % 2**31
        found.append((state >> 16) % 16 - 8)
    return torch.tensor(found, dtype=torch.float32).reshape(n, d)


@pytest.fixture(scope="module")
def found() -> dict[str, float | list[int]]:
    group = torch.arange(400) % 5
    raw = small_numbers(400, 6, 1) / 4 + 12 * small_numbers(5, 6, 7)[group]
    moments = StreamingMoments()
    for batch in raw.split(70):
        moments.partial_fit(batch)
    tokens = standardize(raw, moments.mean_, moments.std_)
    kmeans = MiniBatchKMeans(
        5, seed=3, n_init=2, init_size=100, max_iter=3, max_no_improvement=None
    )
    kmeans.fit(lambda epoch: tokens.roll(37 * epoch, 0).split(80))
    pca = StreamingPCA()
    for batch in tokens.split(90):
        pca.partial_fit(batch)
    probes = {}
    for name, state in {
        "kmeans-invdist": kmeans.state_dict(),
        "pca-dense": pca.state_dict(),
    }.items():
        codes = TensorCodes(open_dictionary(name, state).encode(tokens)["values"])
        # A seventh is wrong, so that losses are finite.
        labels = torch.where(torch.arange(400) % 7 == 0, (group + 1) % 5, group)
        probes[name] = LogisticProbe1d(1e-3).fit(codes, labels, 5).loss_.sum()
    onehot = open_dictionary("kmeans-onehot", kmeans.state_dict())
    topk = open_dictionary("pca-topk-00002", pca.state_dict())
    return {
        "mean": float(moments.mean_.sum()),
        "std": float(moments.std_.sum()),
        "inertia": kmeans.inertia_,
        "counts": kmeans.counts_.tolist(),
        "centers": float(kmeans.cluster_centers_.double().abs().sum()),
        "spectrum": float(pca.explained_variance_[:3].sum()),
        "components": float(pca.components_[:3].sum()),
        "nmse, k-means": onehot.errors(tokens, moments.std_)[5].nmse,
        "nmse, PCA": topk.errors(tokens, moments.std_)[2].nmse,
        **{f"loss, {name}": float(loss) for name, loss in probes.items()},
    }


COUNTS = [89] * 5

PINNED = {
    "mean": -79.908125,
    "std": 258.33390583765146,
    "inertia": 0.017502066095315856,
    "centers": 25.0386267711001,
    "spectrum": 5.834820108598254,
    "components": 2.373935257900536,
    "nmse, k-means": 0.0031895641599962764,
    "nmse, PCA": 0.03935344253037035,
    "loss, kmeans-invdist": 10.451524960891057,
    "loss, pca-dense": 12.729058031187275,
}


def test_what_a_small_run_gives_is_what_it_gave(found):
    assert found.pop("counts") == COUNTS, CHANGED
    assert found == pytest.approx(PINNED, rel=1e-6), CHANGED

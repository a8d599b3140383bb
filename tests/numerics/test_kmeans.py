"""Mini-batch k-means against brute force, a slow loop and scikit-learn."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import MiniBatchKMeans as ScikitMiniBatchKMeans

from assay.numerics.kmeans import distances as distances_module
from assay.numerics.kmeans import seeding as seeding_module
from assay.numerics.kmeans.distances import nearest_in_float64 as nearest_centers
from assay.numerics.kmeans.estimator import MiniBatchKMeans
from assay.numerics.kmeans.reassignment import collapsed_clusters, reassign_centers
from assay.numerics.kmeans.seeding import kmeans_plus_plus, seeding_tokens
from assay.numerics.kmeans.step import low_count_clusters, mini_batch_step
from assay.numerics.reconstruction_error import sum_errors


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def mixture(seed, n, n_clusters, d, spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    planted = torch.randn(n_clusters, d, generator=generator, dtype=torch.float32) * 2
    labels = torch.randint(n_clusters, (n,), generator=generator)
    return planted[labels] + spread * torch.randn(n, d, generator=generator, dtype=torch.float32)


def shuffled(x, batch):
    """A stream of x, in another order every pass."""

    def stream(epoch):
        return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))].split(
            batch
        )

    return stream


def with_centers(centers, counts=None):
    counts = torch.ones(len(centers), dtype=torch.int64) if counts is None else counts
    return MiniBatchKMeans.from_state({"cluster_centers": centers, "counts": counts})


def brute_force(x, centers):
    """All squared distances by differences in float64, and the first of the smallest."""
    difference = x.double().numpy()[:, None] - centers.double().numpy()[None]
    squares = (difference**2).sum(2)
    return squares.argmin(1), squares


# ---- nearest centers


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(0, 40),
    d=st.integers(1, 6),
    n_clusters=st.integers(1, 20),
    offset=st.sampled_from([0.0, 1e3, 1e6]),
    grid=st.booleans(),
)
def test_predict_assign_and_transform_are_brute_force(seed, n, d, n_clusters, offset, grid):
    x, centers = randn(seed, n, d), randn(seed + 1, n_clusters, d)
    if grid:  # exact ties and duplicates, that float64 keeps exact
        x, centers = x.round(), centers.round()
    x, centers = x + offset, centers + offset
    model = with_centers(centers)
    labels, squares = brute_force(x, centers)
    assert model.predict(x).dtype == torch.int64
    np.testing.assert_array_equal(model.predict(x), labels)
    assigned, nearest = model.assign(x)
    np.testing.assert_array_equal(assigned, labels)
    np.testing.assert_allclose(nearest, squares.min(1), rtol=1e-14)
    transformed = model.transform(x)
    assert transformed.dtype == torch.float32
    assert transformed.shape == (n, n_clusters)
    assert bool((transformed >= 0).all())
    np.testing.assert_allclose(transformed, np.sqrt(squares), rtol=1.2e-7)


def test_what_is_a_tie_but_for_a_hair_goes_to_the_nearer_one():
    x = torch.tensor([[1e-5, 1e3], [-1e-5, 1e3], [0.0, 1e3]], dtype=torch.float32)
    assert with_centers(torch.tensor([[-1e-3, 0.0], [1e-3, 0.0]], dtype=torch.float32)).predict(
        x
    ).tolist() == [1, 0, 0]


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_duplicate_centers_go_to_the_lower_index_in_wide_data(offset):
    x, centers = randn(0, 300, 193) + offset, randn(1, 31, 193) + offset
    labels = with_centers(torch.cat([centers, centers, centers[:7]])).predict(x)
    np.testing.assert_array_equal(labels, brute_force(x, centers)[0])


def test_an_outlying_center_does_not_blur_the_others():
    centers = torch.cat([torch.full((1, 16), 1e4, dtype=torch.float32), randn(0, 40, 16)])
    x = torch.cat([randn(1, 200, 16), torch.full((1, 16), 9e3, dtype=torch.float32)])
    np.testing.assert_array_equal(with_centers(centers).predict(x), brute_force(x, centers)[0])


def test_the_distances_held_at_once_are_bounded_and_the_bound_changes_nothing(monkeypatch):
    x, centers = randn(0, 101, 3), randn(1, 8, 3)
    model = with_centers(centers)
    before = model.predict(x), model.transform(x)
    monkeypatch.setattr(distances_module, "_DISTANCE_BYTES", 8 * 8 * 10)
    sizes = [len(part) for part in distances_module.chunked_distances(x, centers)]
    assert sizes == [10] * 10 + [1]
    assert torch.equal(model.predict(x), before[0])
    np.testing.assert_allclose(model.transform(x), before[1], atol=1e-6)


# ---- one step


def slow_step(x, centers, counts):
    """Sculley's algorithm 1: cache the nearest centers, then one token after another at rate 1/n."""
    centers, counts = centers.double().numpy().copy(), counts.clone()
    labels, _ = brute_force(x, torch.from_numpy(centers))
    for token, label in zip(x.double().numpy(), labels, strict=True):
        counts[label] += 1
        rate = 1 / int(counts[label])
        centers[label] = (1 - rate) * centers[label] + rate * token
    return centers, counts


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 50),
    n_clusters=st.integers(1, 9),
    offset=st.sampled_from([0.0, 50.0]),
)
def test_a_step_is_sculleys_loop(seed, n, n_clusters, offset):
    x, centers = randn(seed, n, 4) + offset, randn(seed + 1, n_clusters, 4) + offset
    counts = torch.randint(0, 30, (n_clusters,), generator=torch.Generator().manual_seed(seed))
    new_centers, new_counts, squares = mini_batch_step(x, centers, counts)
    expected_centers, expected_counts = slow_step(x, centers, counts)
    assert new_centers.dtype == torch.float32
    assert torch.equal(new_counts, expected_counts)
    np.testing.assert_allclose(new_centers, expected_centers, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(squares, brute_force(x, centers)[1].min(1), rtol=1e-12)


def test_partial_fit_records_what_the_step_did():
    x, centers = randn(0, 30, 3), randn(1, 4, 3)
    counts = torch.tensor([0, 10, 20, 1000])
    model = with_centers(centers, counts)
    model.reassignment_ratio = 0.05
    assert model.partial_fit(x) is model
    expected_centers, expected_counts = slow_step(x, centers, counts)
    low = expected_counts.numpy() < 0.05 * expected_counts.double().numpy().mean()
    assert 0 < low.sum() < 4
    labels, squares = brute_force(x, centers)
    hits = np.bincount(labels, minlength=4)
    rates = (hits / expected_counts.numpy())[hits > 0]
    entry = model.history_[-1]
    assert all(type(value) is float for value in entry.values())
    assert entry == pytest.approx(
        {
            "inertia": squares.min(1).mean(),
            "ewa_inertia": squares.min(1).mean(),
            "learning_rate": rates.mean(),
            "dead_clusters": low.sum(),
        }
    )
    assert model.inertia_ == entry["inertia"]
    assert model.n_steps_ == len(model.history_) == 1
    np.testing.assert_allclose(model.cluster_centers_, expected_centers, atol=1e-6)
    model.partial_fit(x[:0])
    assert model.n_steps_ == 1


def test_the_smoothed_inertia_is_scikit_learns_rule():
    x = mixture(0, 600, 5, 3)
    model = MiniBatchKMeans(5, max_iter=3, max_no_improvement=None).fit(shuffled(x, 100))
    smoothed = 0.0
    for step, entry in enumerate(model.history_, start=1):
        weight = min(1, 2 * 100 / (min(step * 100, 600) + 1))
        inertia = entry["inertia"]
        smoothed = inertia if step <= 2 else (1 - weight) * smoothed + weight * inertia
        assert entry["ewa_inertia"] == pytest.approx(smoothed, rel=1e-12)
    assert len(model.history_) == 18


# ---- reassignment


def test_low_counts_are_zeros_and_those_below_the_share_of_the_mean():
    counts = torch.tensor([0, 9, 10, 11, 970])  # 200 in the mean
    assert low_count_clusters(counts, 0.05).tolist() == [True, True, False, False, False]
    assert low_count_clusters(counts, 0.0).tolist() == [True, False, False, False, False]


def test_reassigned_centers_are_distinct_tokens_and_take_the_lowest_other_count():
    x, centers, counts = randn(0, 40, 2), randn(1, 5, 2) + 100, torch.tensor([3, 900, 0, 50, 8])
    low = low_count_clusters(counts, 0.05)
    moved, new_counts = reassign_centers(
        x,
        torch.ones(len(x), dtype=torch.float32),
        centers,
        counts,
        low,
        torch.Generator().manual_seed(0),
    )
    assert new_counts.tolist() == [50, 900, 50, 50, 50]
    assert torch.equal(moved[[1, 3]], centers[[1, 3]])
    sources = [(x == moved[cluster]).all(1).nonzero().flatten().tolist() for cluster in (0, 2, 4)]
    assert all(len(found) == 1 for found in sources)
    assert len({found[0] for found in sources}) == 3
    again, _ = reassign_centers(
        x,
        torch.ones(len(x), dtype=torch.float32),
        centers,
        counts,
        low,
        torch.Generator().manual_seed(0),
    )
    other, _ = reassign_centers(
        x,
        torch.ones(len(x), dtype=torch.float32),
        centers,
        counts,
        low,
        torch.Generator().manual_seed(1),
    )
    assert torch.equal(again, moved)
    assert not torch.equal(other, moved)
    assert counts.tolist() == [3, 900, 0, 50, 8]


def test_at_most_half_a_batch_is_reassigned_lowest_counts_first():
    x, centers, counts = randn(0, 5, 2), randn(1, 5, 2) + 100, torch.tensor([3, 900, 0, 1, 1])
    low = low_count_clusters(counts, 0.01)
    moved, new_counts = reassign_centers(
        x,
        torch.ones(len(x), dtype=torch.float32),
        centers,
        counts,
        low,
        torch.Generator().manual_seed(0),
    )
    assert (moved != centers).any(1).tolist() == [False, False, True, True, False]
    assert new_counts.tolist() == [3, 900, 1, 1, 1]
    unmoved, _ = reassign_centers(
        x[:1], torch.ones(1, dtype=torch.float32), centers, counts, low, torch.Generator()
    )
    assert torch.equal(unmoved, centers)


@pytest.mark.parametrize("counts", [[0, 900, 900], [7, 900, 900], [0, 0, 0]])
def test_where_every_cluster_is_low_the_one_of_the_highest_count_stays(counts):
    """One has no tokens, or few, and the others lie in the place of each other."""
    x, centers, counts = randn(0, 40, 2), randn(1, 3, 2) + 100, torch.tensor(counts)
    low = torch.ones(3, dtype=torch.bool)
    moved, new_counts = reassign_centers(
        x, x.new_ones(40), centers, counts, low, torch.Generator().manual_seed(0)
    )
    assert (moved != centers).any(1).tolist() == [True, True, False]
    assert new_counts.tolist() == [int(counts.max())] * 3
    alone = reassign_centers(x, x.new_ones(40), centers[:1], counts[:1], low[:1], torch.Generator())
    assert torch.equal(alone[0], centers[:1])


def test_a_fit_in_which_every_cluster_is_low_goes_on():
    """All lie in one place; the first has all tokens, but few so far."""
    x = mixture(0, 400, 3, 2)
    model = with_centers(x[:1].repeat(3, 1), torch.tensor([1, 5000, 5000]))
    model.reassignment_ratio = 1.0
    model.partial_fit(x)
    assert len(model.cluster_centers_.unique(dim=0)) == 3
    assert model.counts_.tolist() == [5000] * 3


def test_centers_are_reassigned_to_far_tokens_as_often_as_their_squared_distance_says():
    x, squared = (
        torch.arange(4.0, dtype=torch.float32)[:, None],
        torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float32),
    )
    centers, counts, low = (
        torch.tensor([[9.0], [8.0]], dtype=torch.float32),
        torch.tensor([5, 0]),
        torch.tensor([False, True]),
    )
    generator = torch.Generator().manual_seed(0)
    drawn = [
        int(reassign_centers(x, squared, centers, counts, low, generator)[0][1])
        for _ in range(4000)
    ]
    found = torch.bincount(torch.tensor(drawn), minlength=4).float() / 4000
    torch.testing.assert_close(found, squared / 8, rtol=0, atol=0.03)
    unmoved, _ = reassign_centers(
        x, torch.zeros(4, dtype=torch.float32), centers, counts, low, generator
    )
    assert torch.equal(unmoved, centers)


def test_reassignment_waits_for_ten_tokens_a_cluster_or_a_count_of_zero():
    centers, x = torch.tensor([[0.0], [1e3]], dtype=torch.float32), randn(0, 18, 1)
    model = with_centers(centers, torch.tensor([10_000, 1]))
    assert float(model.partial_fit(x).cluster_centers_[1]) == 1e3
    assert float(model.partial_fit(x[:2]).cluster_centers_[1]) < 10
    at_once = with_centers(centers, torch.tensor([10_000, 0])).partial_fit(x)
    assert float(at_once.cluster_centers_[1]) < 10
    never = with_centers(centers, torch.tensor([10_000, 0]))
    never.reassignment_ratio = 0.0
    for _ in range(6):
        never.partial_fit(x)
    assert float(never.cluster_centers_[1]) == 1e3


def planes(seed, n_clusters, d, kind):
    """Honest centers, however they lie."""
    centers = randn(seed, n_clusters, d)
    if kind == "offset":
        return centers + 1e6
    if kind == "two scales":
        return torch.where(
            torch.arange(n_clusters)[:, None] % 2 == 0, 1e4 * (1 + 0.1 * centers), 1e-4 * centers
        )
    if kind == "close":
        return 1 + 1e-4 * centers
    if kind == "along an axis":
        return centers[:, :1] * torch.eye(1, d, dtype=torch.float32)
    return centers * 1e25 if kind == "huge" else centers


@pytest.mark.parametrize(
    "kind", ["gaussian", "offset", "two scales", "close", "along an axis", "huge"]
)
@pytest.mark.parametrize(("n_clusters", "d"), [(1, 3), (2, 1), (300, 2), (900, 48)])
@pytest.mark.parametrize("radius", [0.0, 1.0, math.inf])
def test_centers_in_one_place_are_found_and_no_others(kind, n_clusters, d, radius):
    centers = planes(0, n_clusters, d, kind)
    # Three copies of every fifth, and of the last more than are compared.
    copies = torch.arange(n_clusters).repeat_interleave(
        torch.where(torch.arange(n_clusters) % 5 == 0, 3, 1)
    )
    copies = torch.cat([copies, torch.full((20,), n_clusters - 1)])
    copies = copies[torch.randperm(len(copies), generator=torch.Generator().manual_seed(1))]
    centers = centers[copies]
    found = collapsed_clusters(centers, radius, torch.Generator().manual_seed(2))
    exact = centers.double()
    lengths = torch.minimum(exact.norm(dim=1), (exact - centers.mean(0)).norm(dim=1)).clamp(
        max=radius
    )
    apart = torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist")
    may = (apart <= 1.0001 * 2**-10 * torch.minimum(lengths, lengths[:, None])).tril(-1).any(1)
    must = (apart == 0).tril(-1).any(1)
    assert bool(must.any())
    assert bool(found[must].all())
    assert not bool(found[~may].any())


@pytest.mark.parametrize(("apart", "wanted"), [(1e-6, True), (1e-4, True), (1e-2, False)])
def test_centers_a_hair_apart_are_in_one_place_and_those_that_share_a_cluster_are_not(
    apart, wanted
):
    centers = randn(0, 300, 32)
    difference = randn(1, 300, 32)
    again = centers + apart * difference / difference.norm(dim=1, keepdim=True)
    both = torch.cat([centers, again])
    found = torch.zeros(600, dtype=torch.bool)
    for look in range(3):  # what others part along one direction is found along another
        found |= collapsed_clusters(both, 1.0, torch.Generator().manual_seed(look))
    assert found.tolist() == [False] * 300 + [wanted] * 300
    assert not collapsed_clusters(both, apart, torch.Generator().manual_seed(0)).any()


def test_a_center_that_has_fallen_on_another_is_moved_however_high_its_count():
    x = mixture(0, 4000, 6, 3)
    centers = MiniBatchKMeans(6, max_iter=3).fit(shuffled(x, 100)).cluster_centers_
    centers = torch.cat([centers[:3], centers])  # the fourth to sixth are copies of the first three

    def go_on(count, batch):
        model = with_centers(centers, torch.full((9,), count))
        for part in x[:300].split(batch):
            model.partial_fit(part)
        return model.cluster_centers_

    # Ten small steps, in which those of lower index moved on a little; and one large step.
    for count, batch in ((100_000, 30), (1000, 300)):
        found = go_on(count, batch)
        moved = (found - centers).norm(dim=1) > 0.2
        assert moved.tolist() == [False] * 3 + [True] * 3 + [False] * 3
        assert torch.equal(go_on(count, batch), found)
    alone = with_centers(centers[3:], torch.full((6,), 100_000)).partial_fit(x[:300])
    assert bool(((alone.cluster_centers_ - centers[3:]).norm(dim=1) < 0.2).all())


# ---- seeding


def test_seeds_are_distinct_tokens_and_one_in_each_far_cluster():
    x = torch.cat([randn(i, 30, 2) * 0.01 + 100 * i for i in range(12)])
    centers = kmeans_plus_plus(x, 12, torch.Generator().manual_seed(0))
    assert sorted((centers[:, 0] / 100).round().int().tolist()) == list(range(12))
    assert all(bool((x == center).all(1).any()) for center in centers)


@pytest.mark.parametrize(
    "distinct",
    [
        torch.arange(7.0, dtype=torch.float32)[:, None] * 0.0625 + 1e6,
        randn(0, 7, 193),
        randn(0, 7, 50) + 1e4,
    ],
)
def test_every_distinct_token_is_found_once(distinct):
    x = distinct.repeat(20, 1)
    centers = kmeans_plus_plus(x, 7, torch.Generator().manual_seed(3))
    assert sorted(centers.tolist()) == sorted(distinct.tolist())
    with pytest.raises(ValueError, match="found 7 distinct tokens among the 140 to seed from"):
        kmeans_plus_plus(x, 8, torch.Generator())
    with pytest.raises(ValueError, match="found n_clusters = 0, wanted 1 or more"):
        kmeans_plus_plus(x, 0, torch.Generator())


def slow_seeding(x, n_clusters, seed):
    """Greedy k-means++ by differences, with the same draws."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    while len(chosen) < n_clusters:
        closest = brute_force(x, x[chosen])[1].min(1)
        draws = torch.rand(
            2 + int(math.log(n_clusters)), generator=generator, dtype=torch.float64
        ).numpy()
        trials = np.searchsorted(np.cumsum(closest), draws * closest.sum(), side="right")
        potentials = [brute_force(x, x[[*chosen, trial]])[1].min(1).sum() for trial in trials]
        chosen.append(int(trials[np.argmin(potentials)]))
    return x[chosen]


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_seeding_is_the_slow_loops(offset):
    x = mixture(0, 150, 6, 3) + offset
    for seed in range(3):
        assert torch.equal(
            kmeans_plus_plus(x, 12, torch.Generator().manual_seed(seed)), slow_seeding(x, 12, seed)
        )


@pytest.mark.parametrize("scale", [1e-40, 1e-24, 1e-19, 1e15, 1e19, 1e30, 1e37])
def test_seeds_of_huge_and_of_tiny_tokens_are_those_of_plain_ones(scale):
    """Squares of 1e19 are more than float32 holds, and those of 1e-24 less."""
    x = mixture(0, 150, 6, 3)
    x = (x.double() * scale).float()
    for seed in range(3):
        found = kmeans_plus_plus(x, 10, torch.Generator().manual_seed(seed))
        assert len(found.unique(dim=0)) == 10
        assert torch.equal(found, slow_seeding(x, 10, seed))


def test_a_stream_may_fill_one_buffer_again_and_again():
    x = mixture(0, 150, 6, 3)
    buffer = torch.empty(50, x.shape[1], dtype=x.dtype)

    def stream(_):
        for part in x[:450].split(50):
            yield buffer.copy_(part)

    fitted = MiniBatchKMeans(6, max_iter=2, n_init=2).fit(stream)
    wanted = MiniBatchKMeans(6, max_iter=2, n_init=2).fit(lambda _: iter(x[:450].split(50)))
    assert torch.equal(fitted.cluster_centers_, wanted.cluster_centers_)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (math.nan, "row 3, dimension 1 of a batch is NaN or infinity, wanted finite activations"),
        (-math.inf, "row 3, dimension 1 of a batch is NaN or infinity, wanted finite activations"),
        (1e39, r"row 3, dimension 1 is 1e\+39, wanted at most"),
    ],
)
def test_seeds_are_not_drawn_from_tokens_that_float32_does_not_hold(wrong, message):
    """One NaN makes every sum of distances NaN, and with it every draw the last token."""
    x = mixture(0, 40, 4, 3).double()
    x[3, 1] = wrong
    with pytest.raises(ValueError, match=message):
        kmeans_plus_plus(x, 10, torch.Generator().manual_seed(0))


def test_tokens_that_differ_by_less_than_float32_has_squares_for_are_found_beside_far_ones():
    x = torch.tensor([0.0, 1e-24, 2e-24, 1.0, 3.0], dtype=torch.float32)[:, None].repeat(8, 2)
    found = kmeans_plus_plus(x, 5, torch.Generator().manual_seed(0))
    assert sorted(found[:, 0].tolist()) == sorted(x[:5, 0].tolist())
    with pytest.raises(ValueError, match="found 5 distinct tokens among the 40"):
        kmeans_plus_plus(x, 6, torch.Generator())


@pytest.mark.parametrize("scale", [1e-24, 1.0, 1e19])
@pytest.mark.parametrize("stop", [1, 4])
def test_a_seeding_of_any_size_of_tokens_is_gone_on_with_to_the_bit(scale, stop):
    x = mixture(0, 150, 6, 3) * scale
    whole, broken = MiniBatchKMeans(7).seed_from([x]), MiniBatchKMeans(7)
    next(moment for moment in broken.seedings([x]) if moment == (0, stop + 1))
    resumed = MiniBatchKMeans(7).resume(*broken.checkpoint()).seed_from([x])
    assert torch.equal(resumed.cluster_centers_, whole.cluster_centers_)


def test_seeds_do_not_hang_on_what_products_of_float32_may_be_rounded_to(monkeypatch):
    asked = []
    real = torch.addmm

    def rounded(bias, a, b, **options):
        asked.append(a.dtype)
        if a.dtype == torch.float32:
            a, b = a.bfloat16().float(), b.bfloat16().float()
        return real(bias, a, b, **options)

    x = randn(0, 400, 16)
    wanted = slow_seeding(x, 20, 0)
    monkeypatch.setattr(torch, "addmm", rounded)
    monkeypatch.setattr(seeding_module, "float32_is_exact", lambda: False)
    assert torch.equal(kmeans_plus_plus(x, 20, torch.Generator().manual_seed(0)), wanted)
    assert set(asked) == {torch.float64}


@pytest.mark.parametrize("with_held_out", [True, False])
def test_the_seeding_kept_is_the_best_on_held_out_tokens(with_held_out):
    x = mixture(2, 200 if with_held_out else 100, 30, 4, spread=0.5)
    judges = x[100:] if with_held_out else x
    model = MiniBatchKMeans(30, n_init=6, init_size=100, seed=5)
    model.seed_from(x.split(30))
    generator = torch.Generator().manual_seed(5)
    tried = [kmeans_plus_plus(x[:100], 30, generator) for _ in range(6)]
    judged = [brute_force(judges, centers)[1].min(1).mean() for centers in tried]
    best = int(np.argmin(judged))
    assert best > 0
    assert torch.equal(model.cluster_centers_, tried[best])


def test_one_seeding_needs_no_held_out_tokens():
    x, read = randn(0, 100, 2), []
    MiniBatchKMeans(3, init_size=20).seed_from(read.append(0) or part for part in x.split(10))
    assert len(read) == 2


def test_the_default_init_size_is_three_times_clusters_or_batch():
    x = randn(0, 1000, 2)
    for n_clusters, batch, size in ((20, 10, 60), (5, 40, 120)):
        tokens, _ = seeding_tokens(x.split(batch), n_clusters, None, None, judge=False)
        assert len(tokens) == size


# ---- fit


def test_fit_is_as_good_as_scikit_learns():
    x = mixture(0, 6000, 12, 6)
    model = MiniBatchKMeans(12, n_init=3).fit(shuffled(x, 256))
    ours = float(model.assign(x)[1].mean())
    theirs = min(
        ScikitMiniBatchKMeans(12, n_init=3, batch_size=256, random_state=seed)
        .fit(x.numpy())
        .inertia_
        / len(x)
        for seed in range(2)
    )
    assert ours <= 1.03 * theirs
    assert model.cluster_centers_.dtype == torch.float32
    assert model.counts_.dtype == torch.int64


def test_one_cluster_is_the_mean():
    x = randn(0, 500, 3) + 5
    model = MiniBatchKMeans(1, max_iter=1).fit(lambda _: x.split(50))
    np.testing.assert_allclose(model.cluster_centers_[0], x.mean(0), atol=1e-5)
    assert model.counts_.tolist() == [500]


def test_one_seed_one_result_another_seed_another():
    x = mixture(1, 800, 40, 5, spread=1.0)

    def fit(seed):
        return MiniBatchKMeans(20, seed=seed, n_init=2, max_iter=2).fit(shuffled(x, 64))

    first, again, other = fit(0), fit(0), fit(1)
    assert torch.equal(first.cluster_centers_, again.cluster_centers_)
    assert torch.equal(first.counts_, again.counts_)
    assert first.history_ == again.history_
    assert not torch.equal(first.cluster_centers_, other.cluster_centers_)
    assert torch.equal(first.fit(shuffled(x, 64)).cluster_centers_, again.cluster_centers_)


def test_fit_takes_a_fresh_pass_an_epoch_and_reports_each_step():
    x = mixture(0, 300, 4, 2)
    epochs, steps = [], []

    def stream(epoch):
        epochs.append(epoch)
        yield x[:0]
        yield from x.split(100)

    model = MiniBatchKMeans(4, max_iter=3, max_no_improvement=None).fit(
        stream, on_step=steps.append
    )
    assert epochs == [0, 0, 1, 2]  # the first is the seeding's
    assert steps == model.history_
    assert model.n_steps_ == 9


def test_max_iter_tol_and_patience_stop_the_passes():
    x = mixture(0, 500, 5, 3)

    def steps(**parameters):
        return MiniBatchKMeans(5, **parameters).fit(shuffled(x, 50)).n_steps_

    assert steps(max_iter=4, max_no_improvement=None) == 40
    assert steps(max_iter=6, max_no_improvement=None) == 60
    few, some = steps(max_no_improvement=2), steps(max_no_improvement=15)
    assert 10 < few < some < 1000
    loose, tight = (
        steps(max_iter=30, max_no_improvement=None, tol=tol, decay=1.0) for tol in (1e-2, 1e-4)
    )
    assert loose < tight < 300


def test_patience_counts_steps_without_a_new_least_smoothed_inertia():
    x = mixture(0, 500, 5, 3)
    model = MiniBatchKMeans(5, max_no_improvement=4).fit(shuffled(x, 50))
    smoothed = [entry["ewa_inertia"] for entry in model.history_[10:]]
    best = smoothed.index(min(smoothed))
    assert len(smoothed) - 1 - best == 4


def test_tol_is_the_centers_movement_over_the_variance_of_the_seeding_tokens():
    x = mixture(0, 500, 5, 3) * 10
    tol = 1e-3
    variance = float(
        x[torch.randperm(500, generator=torch.Generator().manual_seed(0))][:150]
        .double()
        .numpy()
        .var(0)
        .mean()
    )
    before: list[torch.Tensor] = []
    moves = []
    model = MiniBatchKMeans(5, tol=tol, max_no_improvement=None)

    def watch(_):
        if before:
            moves.append(float((model.cluster_centers_ - before.pop()).double().square().sum()))
        before.append(model.cluster_centers_)

    model.fit(shuffled(x, 50), on_step=watch)
    assert moves[-1] <= tol * variance
    assert all(move > tol * variance for move in moves[:-1])


def test_reassignment_ratio_changes_the_fit():
    x = torch.cat(
        [mixture(0, 900, 3, 2), torch.full((4, 2), 50.0, dtype=torch.float32) + randn(0, 4, 2)]
    )
    ends = [
        MiniBatchKMeans(12, reassignment_ratio=ratio, max_iter=2)
        .fit(shuffled(x, 100))
        .cluster_centers_
        for ratio in (0.0, 0.5)
    ]
    assert not torch.allclose(ends[0], ends[1])


def test_init_size_changes_the_seeding():
    x = mixture(0, 600, 10, 3)
    fits = [
        MiniBatchKMeans(10, init_size=size, max_iter=1).fit(lambda _: x.split(50))
        for size in (20, 500)
    ]
    assert not torch.allclose(fits[0].cluster_centers_, fits[1].cluster_centers_)


def test_partial_fit_alone_seeds_from_the_first_batch():
    x = mixture(0, 600, 4, 2)
    model = MiniBatchKMeans(4, device="cpu").partial_fit(x[:0])
    for batch in x.split(60):
        model.partial_fit(batch)
    assert model.n_steps_ == 10
    assert float(model.assign(x)[1].mean()) < 0.5 * float(x.var(0).sum())
    with pytest.raises(
        ValueError, match="found 5 tokens to seed from, wanted at least n_clusters = 6"
    ):
        MiniBatchKMeans(6).partial_fit(x[:5])


# ---- state, errors


def test_a_fit_on_float64_tokens_is_that_on_float32_ones():
    x = mixture(0, 500, 5, 3)
    plain = MiniBatchKMeans(5, max_iter=5, max_no_improvement=None).fit(lambda _: x.split(50))
    numbers = x.double()
    found = MiniBatchKMeans(5, max_iter=5, max_no_improvement=None).fit(lambda _: numbers.split(50))
    assert torch.equal(numbers.float(), x)
    assert torch.equal(found.cluster_centers_, plain.cluster_centers_)
    assert float(found.assign(x)[1].mean()) == float(plain.assign(x)[1].mean())


@pytest.mark.parametrize("through", ["torch", "numpy"])
def test_centers_that_are_edited_in_place_are_seen_by_all_that_use_them(through):
    x, model = randn(0, 300, 4), with_centers(randn(1, 9, 4))
    model.predict(x)
    centers = model.cluster_centers_ if through == "torch" else model.cluster_centers_.numpy()
    centers *= -1
    labels, squares = brute_force(x, model.cluster_centers_)
    np.testing.assert_array_equal(model.predict(x), labels)
    np.testing.assert_allclose(model.assign(x)[1], squares.min(1), rtol=1e-14)
    assert torch.equal(model.transform(x).argmin(1), model.predict(x))


def test_a_restored_model_predicts_alike_and_goes_on():
    x = mixture(0, 600, 4, 2)
    model = MiniBatchKMeans(4, max_iter=2).fit(shuffled(x, 60))
    state = model.state_dict()
    assert {name: value.dtype for name, value in state.items() if value.ndim} == {
        "cluster_centers": torch.float32,
        "counts": torch.int64,
    }
    restored = MiniBatchKMeans.from_state(state)
    assert restored.n_clusters == 4
    assert torch.equal(restored.predict(x), model.predict(x))
    assert torch.equal(restored.partial_fit(x[:50]).counts_, model.partial_fit(x[:50]).counts_)
    assert torch.equal(restored.cluster_centers_, model.cluster_centers_)
    with pytest.raises(ValueError, match=r"cluster_centers \(4, 2\) and counts \(3,\)"):
        MiniBatchKMeans.from_state(state | {"counts": state["counts"][:3]})


def test_nmse_is_that_of_putting_tokens_on_their_centers():
    x, std = mixture(0, 300, 4, 3), torch.tensor([0.0, 2.0, 0.5], dtype=torch.float32)
    model = MiniBatchKMeans(6, max_iter=2).fit(shuffled(x, 64))
    labels, squares = brute_force(x, model.cluster_centers_)
    exact, weights = x.double().numpy(), np.array([1.0, 2.0, 0.5]) ** 2
    left = (exact - model.cluster_centers_.double().numpy()[labels]) ** 2
    for batch in (300, 7):
        sums = sum_errors(lambda part: model.reconstruction_errors(part, std), x.split(batch))
        assert list(sums) == [1]
        assert sums[1].n_tokens == 300
        assert sums[1].residual == pytest.approx(squares.min(1).sum(), rel=1e-12)
        assert sums[1].nmse == pytest.approx(left.sum() / (exact**2).sum(), rel=1e-12)
        assert sums[1].nmse_raw == pytest.approx(
            (left * weights).sum() / (exact**2 * weights).sum(), rel=1e-12
        )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_clusters": 0}, "found n_clusters = 0, wanted at least 1"),
        ({"n_init": 0}, "found n_init = 0"),
        ({"max_iter": 0}, "found max_iter = 0"),
        ({"tol": -1.0}, "found tol = -1.0"),
        ({"tol": math.nan}, "found tol = nan"),
        ({"init_size": 2}, "found init_size = 2, wanted at least 3"),
        ({"max_no_improvement": 0}, "found max_no_improvement = 0"),
        ({"reassignment_ratio": 1.5}, "found reassignment_ratio = 1.5"),
        ({"seed": 2**63}, "found seed = 9223372036854775808, wanted an int64"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters, message):
    x = randn(0, 20, 2)
    for fit in (lambda model: model.fit(lambda _: [x]), lambda model: model.partial_fit(x)):
        with pytest.raises(ValueError, match=message):
            fit(MiniBatchKMeans(**({"n_clusters": 3} | parameters)))


def test_errors_of_fit_and_predict():
    x = randn(0, 20, 2)
    with pytest.raises(ValueError, match="without centers"):
        MiniBatchKMeans(3).predict(x)
    with pytest.raises(ValueError, match=r"found 0 tokens in stream\(0\)"):
        MiniBatchKMeans(3).fit(lambda _: [])
    with pytest.raises(
        ValueError, match="found 20 tokens to seed from, wanted at least n_clusters = 21"
    ):
        MiniBatchKMeans(21).fit(lambda _: x.split(6))
    with pytest.raises(ValueError, match="found 1 distinct tokens"):
        MiniBatchKMeans(3).fit(lambda _: [torch.ones(9, 2, dtype=torch.float32)])
    with pytest.raises(ValueError, match="found 0 tokens in pass 1"):
        MiniBatchKMeans(3).fit(lambda epoch: [x] if epoch == 0 else [])
    model = MiniBatchKMeans(3).partial_fit(x)
    for method in (model.partial_fit, model.predict, model.assign, model.transform):
        with pytest.raises(ValueError, match="found a batch of 3 dimensions, wanted 2"):
            method(randn(0, 4, 3))
    assert nearest_centers(x[:0], model.cluster_centers_).shape == (0,)


# ---- learning rates, checkpoints, agreement


@pytest.mark.parametrize("decay", [1.0, 0.75, 0.5])
def test_counts_decay_before_each_further_pass_and_no_other_time(decay):
    x = randn(0, 90, 3)
    model = MiniBatchKMeans(
        4, decay=decay, max_iter=3, init_size=40, max_no_improvement=None, reassignment_ratio=0.0
    )
    seen = []
    model.fit(lambda _: x.split(30), lambda _: seen.append(model.counts_.clone()))
    assert len(seen) == 9
    for step in range(1, 9):
        before = (seen[step - 1] * decay).ceil().long() if step % 3 == 0 else seen[step - 1]
        hits = seen[step] - before
        assert int(hits.sum()) == 30
        assert bool((hits >= 0).all())
    assert torch.equal(model.counts_, seen[-1])


@pytest.mark.parametrize("decay", [0.0, -1.0, 1.1])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(
        ValueError, match=f"found decay = {decay}, wanted more than 0 and at most 1"
    ):
        MiniBatchKMeans(2, decay=decay).partial_fit(randn(0, 9, 2))


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 30),
    st.sampled_from([1.0, 0.8]),
    st.sampled_from([0.0, 2.0]),
    st.sampled_from([None, 2]),
    st.integers(0, 99),
)
def test_a_resumed_fit_equals_the_uninterrupted_one_bit_for_bit(stop, decay, tol, patience, seed):
    x = randn(seed, 160, 3)
    parameters = {
        "seed": seed,
        "max_iter": 4,
        "decay": decay,
        "tol": tol,
        "max_no_improvement": patience,
    }
    parameters |= {"n_init": 2, "init_size": 40, "reassignment_ratio": 0.3}

    def stream(epoch, start=0):
        order = torch.randperm(160, generator=torch.Generator().manual_seed(epoch))
        return x[order].split(16)[start:]

    whole = MiniBatchKMeans(6, **parameters).fit(stream)
    broken = MiniBatchKMeans(6, **parameters)
    for metrics in broken.seed_from(stream(0)).steps(stream):
        assert metrics is broken.history_[-1]
        if broken.n_steps_ == stop:
            tensors, state = broken.checkpoint()
            resumed = MiniBatchKMeans(6, **parameters).resume(
                tensors, json.loads(json.dumps(state))
            )
            begun = []

            def rest(epoch, begun=begun):
                begun.append(epoch)
                return stream(epoch, (stop - 1) % 10 + 1 if len(begun) == 1 else 0)

            for step in resumed.steps(rest):
                assert step is resumed.history_[-1]
            broken = resumed
            break
    assert torch.equal(broken.cluster_centers_, whole.cluster_centers_)
    assert torch.equal(broken.counts_, whole.counts_)
    assert broken.history_ == whole.history_
    assert (broken.n_steps_, broken.inertia_) == (whole.n_steps_, whole.inertia_)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 24), st.sampled_from([1, 3]), st.integers(0, 99))
def test_a_seeding_that_is_broken_off_anywhere_goes_on_to_the_same_bits(stop, n_init, seed):
    x = mixture(seed, 200, 9, 3)
    parameters = {"n_clusters": 7, "seed": seed, "n_init": n_init, "init_size": 60, "max_iter": 2}
    whole = MiniBatchKMeans(**parameters).fit(shuffled(x, 32))
    calls = []
    broken = MiniBatchKMeans(**parameters)
    every = [
        (tried + (centers == 0), centers)
        for tried in range(n_init)
        for centers in (*range(2, 8), 0)
    ]
    for call in broken.seedings(shuffled(x, 32)(0)):
        calls.append(call)
        assert not broken.is_seeded_
        if len(calls) == stop:
            tensors, state = broken.checkpoint()
            broken = MiniBatchKMeans(**parameters).resume(tensors, json.loads(json.dumps(state)))
            with pytest.raises(ValueError, match="without centers"):
                broken.predict(x)
            calls += broken.seedings(shuffled(x, 32)(0))
            break
    assert calls == every
    assert broken.is_seeded_
    broken = MiniBatchKMeans(**parameters).resume(*broken.checkpoint())
    assert len([*broken.steps(shuffled(x, 32))]) == broken.n_steps_
    assert torch.equal(broken.cluster_centers_, whole.cluster_centers_)
    assert torch.equal(broken.counts_, whole.counts_)
    assert broken.history_ == whole.history_
    # What is fitted anew is seeded anew.
    assert torch.equal(broken.fit(shuffled(x, 32)).cluster_centers_, whole.cluster_centers_)


def test_a_seeding_on_other_tokens_or_of_other_clusters_is_refused():
    x = randn(0, 90, 2)
    model = MiniBatchKMeans(4, n_init=2, init_size=30)
    next(moment for moment in model.seedings([x]) if moment == (1, 2))
    with pytest.raises(
        ValueError, match="found 20 tokens, wanted the 30 that the seeding was begun on"
    ):
        MiniBatchKMeans(4, n_init=2, init_size=20).resume(*model.checkpoint()).seed_from([x])
    with pytest.raises(ValueError, match="found a checkpoint of 4 clusters, wanted 5"):
        MiniBatchKMeans(5, n_init=2, init_size=30).resume(*model.checkpoint())


def test_a_model_that_is_seeded_anew_says_nothing_of_tokens_until_it_is():
    x = randn(0, 90, 2)
    model = MiniBatchKMeans(4, max_iter=1).fit(lambda _: x.split(30))
    seeding = model.seedings(x.split(30))
    next(seeding)
    with pytest.raises(ValueError, match="wanted a fitted one"):
        model.predict(x)
    for _ in seeding:
        pass
    assert len(model.predict(x)) == 90


def test_a_checkpoint_of_other_clusters_is_refused():
    checkpoint = MiniBatchKMeans(3).partial_fit(randn(0, 20, 2)).checkpoint()
    with pytest.raises(ValueError, match="found a checkpoint of 3 clusters, wanted 4"):
        MiniBatchKMeans(4).resume(*checkpoint)


def test_it_shows_its_parameters():
    assert (
        repr(MiniBatchKMeans(3, tol=0.5))
        == "MiniBatchKMeans(n_clusters=3, seed=0, n_init=1, init_size=None, max_iter=100,"
        " max_no_improvement=10, tol=0.5, reassignment_ratio=0.01, decay=0.1)"
    )

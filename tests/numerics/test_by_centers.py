"""k-means by several ranks, here threads: to the bit what one process has."""

import threading
from typing import Any

import pytest
import torch

from assay.numerics.kmeans.by_centers import KMeansByCenters
from assay.numerics.kmeans.distances import nearest_in_float64
from assay.numerics.kmeans.estimator import MiniBatchKMeans
from assay.numerics.kmeans.nearest import NearestCenters

N, BATCH = 1050, 100  # the last batch is half as long

TOKENS = {
    "apart": torch.randn(N, 16, generator=torch.Generator().manual_seed(1)),
    "tied": torch.randint(0, 3, (N, 4), generator=torch.Generator().manual_seed(2)).float(),
}


class Threads:
    """Ranks that are threads, and count the bytes that each gives."""

    def __init__(self, size):
        self.size = size
        self.given = []
        self._barrier = threading.Barrier(size, timeout=60)
        self._slots: list[Any] = [None] * size

    def rank(self, number):
        return Thread(self, number)

    def exchange(self, number, tensor):
        self._slots[number] = tensor
        self._barrier.wait()
        found = [each.clone() for each in self._slots]
        self._barrier.wait()
        if number == 0:
            self.given.append(tensor.numel() * tensor.element_size())
        return found

    def run(self, work):
        """What each thread's `work` gives, by rank."""
        found: list[Any] = [None] * self.size

        def do(number):
            try:
                found[number] = work(self.rank(number))
            except BaseException as error:
                found[number] = error
                self._barrier.abort()

        threads = [threading.Thread(target=do, args=(number,)) for number in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return found


class Thread:
    """One of them."""

    def __init__(self, threads, rank):
        self._threads, self.rank, self.size = threads, rank, threads.size

    def all_gather(self, tensor):
        return self._threads.exchange(self.rank, tensor)


def passes(x):
    """Of all tokens in batches, and an empty one."""

    def stream(epoch):
        order = torch.randperm(N, generator=torch.Generator().manual_seed(epoch))
        return [*x[order].split(BATCH), x[:0]]

    return stream


def seeded(x, n_clusters, parameters):
    """One process's k-means before its first step."""
    return MiniBatchKMeans(n_clusters, **parameters).seed_from(passes(x)(0))


def assert_equal(found, wanted):
    assert found[1] == wanted[1]
    assert found[0].keys() == wanted[0].keys()
    for name, tensor in wanted[0].items():
        assert torch.equal(found[0][name], tensor), name


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    ("tokens", "n_clusters", "parameters"),
    [
        ("apart", 50, {"max_iter": 4, "n_init": 2, "seed": 3}),
        ("tied", 41, {"max_iter": 3}),  # many centers in one place, and tokens between two
        ("apart", 3, {"max_iter": 3, "tol": 1e-3, "decay": 1.0}),  # fewer than ranks
        ("apart", 300, {"max_iter": 3, "max_no_improvement": None, "reassignment_ratio": 0.5}),
        ("apart", 1, {"max_iter": 2, "reassignment_ratio": 0.0}),
    ],
)
def test_ranks_take_the_steps_of_one_process(size, tokens, n_clusters, parameters):
    x = TOKENS[tokens]
    one = seeded(x, n_clusters, parameters)
    begun = one.checkpoint()
    steps = list(one.steps(passes(x)))
    assert len(steps) > 10

    def work(rank):
        kmeans = KMeansByCenters(n_clusters, ranks=rank, **parameters).resume(*begun)
        assert list(kmeans.steps(passes(x))) == steps
        return kmeans.checkpoint()

    for found in Threads(size).run(work):
        assert_equal(found, one.checkpoint())


def test_ranks_and_one_process_go_on_from_each_other():
    """In the middle of a pass."""
    x = TOKENS["apart"]
    parameters: dict[str, Any] = {"max_iter": 3, "max_no_improvement": None}
    one = seeded(x, 40, parameters)
    begun = one.checkpoint()
    for _ in one.steps(passes(x)):
        pass

    def some(kmeans, at, steps):
        """The checkpoint of a fit that goes on for so many steps."""
        kmeans.resume(*at)

        def rest(epoch):
            return passes(x)(epoch)[kmeans.steps_of_pass_ :]

        for _, _ in zip(range(steps), kmeans.steps(rest), strict=False):
            pass
        return kmeans.checkpoint()

    def by(size, at, steps):
        def work(rank):
            return some(KMeansByCenters(40, ranks=rank, **parameters), at, steps)

        return Threads(size).run(work)[0]

    at = by(2, begun, 7)
    at = some(MiniBatchKMeans(40, **parameters), at, 5)
    at = by(4, at, 6)
    at = by(3, at, 99)
    assert_equal(at, one.checkpoint())


@pytest.fixture
def begin():
    """What a fit of 50 centers begins with, given those of every other number."""
    tensors, state = seeded(TOKENS["apart"], 50, {"reassignment_ratio": 0.0}).checkpoint()

    def at(even, odd):
        centers = torch.stack([even, odd], dim=1).reshape(50, 16)
        return tensors | {"cluster_centers": centers}, state

    return at


def steps_by_two(begun, batches):
    """What ranks have after steps, and the bytes that the first of them gives."""
    threads = Threads(2)

    def work(rank):
        kmeans = KMeansByCenters(50, ranks=rank, reassignment_ratio=0.0).resume(*begun)
        for batch in batches:
            kmeans.partial_fit(batch)
        return kmeans.checkpoint()

    return threads.run(work), threads.given


def steps_by_one(begun, batches):
    one = MiniBatchKMeans(50, reassignment_ratio=0.0).resume(*begun)
    for batch in batches:
        one.partial_fit(batch)
    return one.checkpoint()


def test_a_step_gives_a_score_a_label_and_a_distance_a_token_and_centers_where_asked_for(begin):
    even, odd = 40 * torch.randn(2, 25, 16, generator=torch.Generator().manual_seed(4))
    begun = begin(even, odd)
    noise = torch.randn(N, 16, generator=torch.Generator().manual_seed(5))
    batches = (begun[0]["cluster_centers"][torch.arange(N) % 50] + noise).split(
        BATCH
    )  # each center has as many
    found, given = steps_by_two(begun, batches)
    steps = [(4 * n, 8 * n, 8 * n // 2) for n in [*[BATCH] * 10, N % BATCH]]
    assert given == [*(each for step in steps for each in step), 4 * 16 * 25]
    assert_equal(found[0], steps_by_one(begun, batches))


@pytest.mark.parametrize("off", [0.0, 1e-5, -1e-5])  # far within the bounds of a product
def test_of_a_token_between_two_ranks_centers_exact_distances_decide(begin, off):
    whole = torch.randint(-40, 40, (25, 16), generator=torch.Generator().manual_seed(4)).float()
    even, odd = whole - 1, whole + 1  # of one rank and of the other
    begun = begin(even, odd)
    between = whole + off
    batch = torch.cat([between, even, odd])
    found, given = steps_by_two(begun, [batch])
    assert given[2] >= 8 * len(between)
    one = steps_by_one(begun, [batch])
    assert_equal(found[0], one)
    hits = one[0]["counts"] - begun[0]["counts"]
    assert hits.reshape(-1, 2).sum(0).tolist() == ([50, 25] if off <= 0 else [25, 50])


def test_ranks_without_bounds_or_centers_look_for_all_tokens():
    x = TOKENS["apart"]
    centers = x[:60]
    own = [centers[:20], centers[20:], centers[:0]]
    dtypes: list[tuple[torch.dtype, ...]] = [(), (torch.bfloat16, torch.float32), (torch.float32,)]

    def work(rank):
        nearest = NearestCenters(own[rank.rank], dtypes[rank.rank], origin=x[0])
        return nearest.find_among(x, lambda each: torch.stack(rank.all_gather(each)).amax(0), 40)

    unbounded, bounded, none = Threads(3).run(work)
    nearest = nearest_in_float64(x, centers)
    theirs = nearest >= 20
    assert torch.equal(unbounded, nearest_in_float64(x, own[0]))
    assert torch.equal(bounded, nearest_in_float64(x, own[1]))
    assert torch.equal(bounded[theirs] + 20, nearest[theirs])
    assert (none == -1).all()


def test_a_rank_leaves_a_token_that_is_surely_nearer_to_anothers_center():
    x = TOKENS["apart"]
    centers = x[:60]

    def work(rank):
        nearest = NearestCenters(centers[rank.rank :: 2], (torch.float32,), origin=x[0])
        return nearest.find_among(x, lambda each: torch.stack(rank.all_gather(each)).amax(0), 30)

    found = torch.stack(Threads(2).run(work))
    nearest = nearest_in_float64(x, centers)
    assert torch.equal(found[nearest % 2, torch.arange(N)], nearest // 2)
    assert (found[1 - nearest % 2, torch.arange(N)] == -1).float().mean() > 0.99


def test_a_token_with_candidates_in_too_many_groups_is_looked_for_again():
    """Seventeen groups and more: a rank's bounds say that it may win, and not with which center."""
    generator = torch.Generator().manual_seed(6)
    centers = 1 + 1e-4 * torch.randn(2 * 1100, 4, generator=generator)
    x = 1 + 1e-4 * torch.randn(50, 4, generator=generator)

    def work(rank):
        nearest = NearestCenters(
            centers[rank.rank :: 2], (torch.bfloat16, torch.float32), origin=torch.zeros(4)
        )
        return nearest.find_among(x, lambda each: torch.stack(rank.all_gather(each)).amax(0), 1100)

    found = torch.stack(Threads(2).run(work))
    nearest = nearest_in_float64(x, centers)
    assert torch.equal(found[nearest % 2, torch.arange(50)], nearest // 2)


def test_a_bad_number_is_an_error_and_no_step():
    begun = seeded(TOKENS["apart"], 50, {}).checkpoint()
    bad = TOKENS["apart"][:BATCH].clone()
    bad[BATCH - 1, 3] = torch.nan

    def work(rank):
        kmeans = KMeansByCenters(50, ranks=rank).resume(*begun)
        with pytest.raises(ValueError, match="NaN or infinity"):
            kmeans.partial_fit(bad)
        return kmeans.checkpoint()

    for found in Threads(4).run(work):
        assert_equal(found, begun)

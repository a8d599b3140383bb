"""k-means by several ranks, here threads: to the bit what one process has."""

import threading
from typing import Any

import pytest
import torch

from assay.numerics.kmeans.by_centers import KMeansByCenters
from assay.numerics.kmeans.estimator import MiniBatchKMeans

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


def test_a_step_gives_sixteen_bytes_a_token_and_the_centers_only_where_they_are_asked_for():
    x = TOKENS["apart"]
    parameters: dict[str, Any] = {"reassignment_ratio": 0.0}
    begun = seeded(x, 50, parameters).checkpoint()
    threads = Threads(2)

    def work(rank):
        kmeans = KMeansByCenters(50, ranks=rank, **parameters).resume(*begun)
        for batch in x.split(BATCH):
            kmeans.partial_fit(batch)
        return kmeans.checkpoint()

    threads.run(work)
    rows = [*[BATCH] * 10, N % BATCH]
    assert threads.given == [*(16 * n for n in rows), 4 * 16 * 25]


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

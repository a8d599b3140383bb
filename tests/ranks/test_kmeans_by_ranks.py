"""The k-means node by real processes: the bits, the stops and the checkpoints of one."""

from typing import Any

import pytest
import torch

from assay.io.checkpoints import Checkpoints
from assay.io.shards import Shards
from assay.parameters import KMeansParameters, StandardizeParameters
from assay.pipelines.kmeans.passes import Passes
from assay.pipelines.standardize.nodes import fit_statistics
from assay.pipelines.stopping import signals_stop
from assay.team import Team, current_team
from team_work import fit_kmeans_until
from teams import Ranks, in_ranks

PARAMETERS: dict[str, Any] = {
    "n_clusters": 9,
    "batch_size": 40,
    "n_init": 2,
    "init_size": 100,
    "max_iter": 3,
    "max_no_improvement": None,
}


@pytest.fixture
def statistics(planted, tmp_path):
    return fit_statistics(
        Shards(planted[0]), StandardizeParameters(), Checkpoints(tmp_path / "s"), "cpu", layer=5
    )


@pytest.fixture
def fit(planted, statistics, tmp_path):
    """Fits by so many ranks, until so many steps are made; what the node gives, None where it was
    stopped.
    """

    def run(size, folder="here", stop_after=None, **parameters):
        request = {
            "shards": str(planted[0]),
            "checkpoints": str(tmp_path / folder),
            "parameters": PARAMETERS | parameters,
            "stop_after": stop_after,
        }
        try:
            if size > 1:
                return in_ranks(
                    size, "team_work:fit_kmeans_until", request, statistics, session=True
                )
            with signals_stop():
                return fit_kmeans_until(current_team(), request, statistics)
        except KeyboardInterrupt:
            return None

    return run


def assert_equal(found, wanted):
    assert found[1] == wanted[1]
    assert found[0].keys() == wanted[0].keys()
    for name, tensor in wanted[0].items():
        assert torch.equal(found[0][name], tensor), name


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_fit_what_one_process_fits(fit, size):
    assert_equal(fit(size, "a"), fit(1, "b"))


def test_ranks_follow_an_order_file_and_a_limit(fit, tmp_path):
    import numpy as np

    np.save(tmp_path / "order.npy", np.random.default_rng(0).permutation(768))
    given = {"order": str(tmp_path / "order.npy"), "max_iter": 2}
    assert_equal(fit(2, "a", **given), fit(1, "b", **given))
    given = {"max_tokens": 500, "batch_size": 64}
    assert_equal(fit(2, "a", **given), fit(1, "b", **given))


@pytest.mark.crash
def test_what_one_process_began_ranks_go_on_with_and_back(fit):
    whole = fit(1, "whole")
    assert fit(1, stop_after=5) is None
    assert fit(2, stop_after=24) is None
    assert fit(1, stop_after=31) is None
    assert_equal(fit(4), whole)


@pytest.mark.crash
def test_a_rank_that_is_killed_leaves_the_checkpoints(planted, statistics, tmp_path):
    request = {
        "shards": str(planted[0]),
        "checkpoints": str(tmp_path / "here"),
        "parameters": PARAMETERS | {"max_iter": 10_000, "checkpoint_steps": 3},
        "stop_after": None,
    }
    ranks = Ranks(2, "team_work:fit_kmeans_until", request, statistics, 4, session=True)
    ranks.wait_for(lambda: sorted((tmp_path / "here").rglob("step*3.safetensors")))
    ranks.kill(1)
    with pytest.raises(ChildProcessError, match=r"^rank 1 of 2 is gone"):
        ranks.result()
    files = sorted(each.name for each in (tmp_path / "here").rglob("step*.safetensors"))
    assert len(files) == 2


class Counting(Team):
    """A team of one that counts what it gives."""

    def __init__(self):
        self.given = 0

    def all_gather(self, tensor):
        self.given += tensor.numel() * tensor.element_size()
        return super().all_gather(tensor)


def test_a_pass_gives_each_token_once_as_float32_with_its_place(planted, statistics):
    """At the paper's size 33 MB a step: 8,192 tokens of 1,024 numbers and 8 bytes."""
    shards, team = Shards(planted[0]), Counting()
    parameters = KMeansParameters(**PARAMETERS)
    passes = Passes(shards, 5, statistics, parameters, 0, torch.device("cpu"))
    found = list(passes.batches_of_all(team, 1, seen=2))
    wanted = list(passes.batches(1, seen=2))
    assert len(found) == len(wanted)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert team.given == (768 - 2 * 40) * (4 * shards.d_model + 8)

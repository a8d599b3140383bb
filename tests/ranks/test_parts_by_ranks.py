"""Statistics and PCA in parts by real processes: the bits, the stops and the checkpoints of one."""

import signal

import pytest
import torch

from assay.io.checkpoints import Checkpoints
from assay.io.shards import Shards
from assay.parameters import StandardizeParameters
from assay.pipelines.standardize.nodes import fit_statistics
from assay.pipelines.stopping import signals_stop
from assay.team import current_team
from team_work import fit_one_pass
from teams import Ranks

METHODS = ("statistics", "pca")
PARAMETERS = {"batch_size": 32, "parts": 5, "checkpoint_steps": 3}  # of 24 batches


@pytest.fixture
def fit(planted, tmp_path):
    """Fits by so many ranks, until a part gets a signal; what the node gives, None where it was
    stopped.
    """
    statistics = fit_statistics(
        Shards(planted[0]), StandardizeParameters(), Checkpoints(tmp_path / "s"), "cpu", layer=5
    )

    def run(method, size, folder="here", signal=None, **parameters):
        request = {
            "method": method,
            "shards": str(planted[0]),
            "checkpoints": str(tmp_path / folder),
            "parameters": PARAMETERS | parameters,
            "signal": signal,
        }
        try:
            if size > 1:
                asked = ("team_work:fit_one_pass", request, statistics)
                return Ranks(size, *asked, session=True).result()
            with signals_stop():
                return fit_one_pass(current_team(), request, statistics)
        except KeyboardInterrupt:
            return None

    return run


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_make_what_one_process_makes(fit, method, size):
    assert_equal(fit(method, size, "a"), fit(method, 1, "b"))


def test_a_sample_is_shared_as_well(fit):
    assert_equal(fit("pca", 2, "a", max_tokens=700), fit("pca", 1, "b", max_tokens=700))


@pytest.mark.crash
@pytest.mark.parametrize("method", METHODS)
def test_what_one_process_began_ranks_go_on_with_and_back(fit, method, tmp_path):
    def saved():
        return sorted((tmp_path / "here").rglob("step*.safetensors"))

    whole = fit(method, 1, "whole")
    stop = {"number": signal.SIGTERM, "after": 2}
    assert fit(method, 1, signal={"part": 1, **stop}) is None
    # The first part, of four batches, and what there is of the second.
    assert [path.name for path in saved()].count("step000000002.safetensors") == 1
    assert fit(method, 2, signal={"part": 3, **stop}) is None
    if method == "pca":
        with pytest.raises(ChildProcessError, match=r"^rank 1 of 2 is gone"):
            fit(method, 2, signal={"part": 3, "number": signal.SIGKILL, "after": 1})
    assert saved()
    assert_equal(fit(method, 1), whole)
    assert not saved()

"""Teams of real processes: what they exchange, and that the failure, the stop or the death of one is
all ranks', and named.
"""

import signal

import pytest
import torch

from assay.team import as_current, current_team
from teams import Ranks, in_ranks


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_give_each_other_tensors_of_any_dtype_and_number(size):
    sent = torch.randn(5, 2)
    gathered, flags, seen = in_ranks(size, "team_work:gather", {"more": size % 3}, {"sent": sent})
    assert torch.equal(seen, sent)
    assert flags == [True, False]
    for found, dtype in zip(
        gathered, (torch.float32, torch.int64, torch.bfloat16, torch.bool), strict=True
    ):
        for rank, each in enumerate(found):
            wanted = torch.arange(3 * (rank + size % 3)).reshape(-1, 3).to(dtype)
            assert torch.equal(each, wanted)


def test_one_process_is_a_team():
    team = current_team()
    sent = {"sent": torch.ones(2)}
    gathered, flags, seen = team.call("team_work:gather", {"more": 1}, sent)
    assert (team.rank, team.size, flags) == (0, 1, [False, False])
    assert torch.equal(gathered[0][0], torch.arange(3.0)[None])
    assert seen is sent["sent"]
    with as_current(team):
        assert current_team() is team


@pytest.mark.parametrize(
    ("rank", "error", "wanted"),
    [
        (0, "TypeError", (TypeError, "^found rot$")),
        (1, "ValueError", (ValueError, "^rank 1: found rot$")),
        (2, "TypeError", (ChildProcessError, "^rank 2: TypeError: found rot$")),
    ],
)
def test_the_error_of_a_rank_is_raised_and_named(rank, error, wanted):
    ranks = Ranks(3, "team_work:fail", {"rank": rank, "error": error})
    with pytest.raises(wanted[0], match=wanted[1]):
        ranks.result()
    assert ranks.exit_codes() == [0, 0, 0]


@pytest.mark.crash
@pytest.mark.parametrize(("rank", "apart"), [(1, False), (0, True), (2, True)])
def test_a_signal_to_one_rank_stops_all(rank, apart):
    ranks = Ranks(3, "team_work:wait_for_stop", {"apart": apart})
    ranks.wait_until_at_work()
    ranks.kill(rank, signal.SIGTERM)
    ranks.kill(rank, signal.SIGTERM)  # which is as one
    with pytest.raises(KeyboardInterrupt):
        ranks.result()
    assert ranks.exit_codes() == [0, 0, 0]


@pytest.mark.crash
@pytest.mark.parametrize(
    ("number", "timeout", "apart"),
    [(signal.SIGKILL, 60, False), (signal.SIGKILL, 60, True), (signal.SIGSTOP, 5, False)],
)
def test_a_rank_that_is_killed_or_hangs_ends_all_and_is_named(number, timeout, apart):
    ranks = Ranks(3, "team_work:wait_for_stop", {"apart": apart}, timeout_seconds=timeout)
    ranks.wait_until_at_work()
    ranks.kill(1, number)
    if apart:
        ranks.kill(0, signal.SIGTERM)
    ranks.processes[0].join(60)
    ranks.processes[1].kill()
    with pytest.raises(ChildProcessError, match=r"^ranks? 1\b.* of 3 is gone, or hangs"):
        ranks.result()
    assert ranks.exit_codes() == [0, -signal.SIGKILL, 0]


@pytest.mark.crash
def test_followers_end_when_rank_0_is_gone():
    ranks = Ranks(3, "team_work:wait_for_stop", {"apart": False})
    ranks.wait_until_at_work()
    ranks.kill(0)
    for process in ranks.processes:
        process.join(60)
    assert ranks.exit_codes() == [-signal.SIGKILL, 1, 1]
    ranks.close()


def test_a_call_of_what_is_not_there_is_an_error_of_the_caller():
    with pytest.raises(ImportError):
        in_ranks(2, "no.such:function", {})

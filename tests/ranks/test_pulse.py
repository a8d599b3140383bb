"""Signs of life: who is ended, and who is not."""

import math
import os
import signal
import subprocess
import time

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from assay.ranks import pulse
from assay.ranks.pulse import Pulse


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def pair(sleeper):
    """The pulse of rank 1, and the store where the sleeper is rank 0."""
    store = HashStore()
    store.set("process/0", str(sleeper.pid))
    found = Pulse(store, 1, 2, timeout_seconds=60)
    found.beat()
    heard(store)
    found.beat()
    yield found, store
    found._thread.start()
    found.stop()


def heard(store, timeout=60.0):
    store.set("beat/0", f"{time.monotonic()} 0 {timeout}")


def let_pass(found, seconds, *, asleep=False):
    """As if so much time had passed since the last beats of both."""
    found._began -= seconds
    store = found._store
    when, entered, timeout = store.get("beat/0").decode().split()
    store.set("beat/0", f"{float(when) - seconds} {entered} {timeout}")
    if asleep:
        found._last -= seconds
    if 0 in found._held:
        found._held[0] = found._held[0][0], found._held[0][1] - seconds


@pytest.mark.crash
def test_a_rank_that_hangs_is_ended_by_another_which_says_so_once(pair, sleeper, capfd):
    found, _ = pair
    let_pass(found, 59)
    found.beat()
    assert sleeper.poll() is None
    let_pass(found, 2)
    found.beat()
    assert sleeper.wait(10) == -signal.SIGKILL
    found.beat()
    found.beat()
    said = capfd.readouterr().err
    assert said.count("Error: rank 0 of 2 hangs: nothing was heard of it for 60 s") == 1
    assert found.silence(0) == math.inf


def test_the_timeout_is_rank_0s(pair, sleeper):
    found, store = pair
    heard(store, timeout=5)
    let_pass(found, 6)
    found.beat()
    assert sleeper.wait(10) == -signal.SIGKILL


def test_ranks_that_were_suspended_together_do_not_end_each_other(pair, sleeper):
    found, _ = pair
    let_pass(found, 1000, asleep=True)
    assert found.silence(0) < 1
    found.beat()
    assert found.silence(0) == 0
    assert sleeper.poll() is None


def test_another_process_of_the_same_number_is_left_alone(sleeper):
    """The rank was last heard of before its process was looked for."""
    store = HashStore()
    heard(store)
    store.set("process/0", str(sleeper.pid))
    found = Pulse(store, 1, 2, timeout_seconds=1)
    found.beat()
    let_pass(found, 1000)
    found._held[0] = found._held[0][0], time.monotonic()
    found.beat()
    assert found.silence(0) > 1
    assert sleeper.poll() is None


def test_a_rank_that_is_gone_is_known_at_once(pair, sleeper):
    found, _ = pair
    assert found.silent() == []
    sleeper.kill()
    sleeper.wait()
    found.beat()
    assert found.silent() == [0]
    assert found.silence(0) == math.inf


def test_a_rank_that_cannot_stop_ends_before_torchrun_kills_it(pair, sleeper, monkeypatch):
    found, _ = pair
    ended = []
    monkeypatch.setattr(pulse, "LAST", 0.0)
    monkeypatch.setattr(pulse, "EVERY", 0.01)
    monkeypatch.setattr(os, "_exit", lambda code: (ended.append(code), found._over.set()))
    sleeper.kill()
    sleeper.wait()
    found._run()
    assert ended == [1]
    found._over.clear()

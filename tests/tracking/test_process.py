"""Whose a run of MLflow is."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from assay.tracking.process import is_gone, own_process


@pytest.fixture
def other():
    """A process that lives, and what is noted of it."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with open(f"/proc/{child.pid}/stat") as stat:
        began = int(stat.read().rpartition(")")[2].split()[19])
    yield child, json.loads(own_process()) | {"pid": child.pid, "began": began}
    child.kill()
    child.communicate()


def test_a_process_is_gone_when_it_has_ended_and_not_before(other):
    child, noted = other
    assert not is_gone(own_process())
    assert not is_gone(json.dumps(noted))
    child.kill()
    # A zombie, which nobody has asked for yet.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(json.dumps(noted))
    child.wait()
    assert is_gone(json.dumps(noted))


def test_a_pid_that_was_given_to_another_process_is_another_process():
    assert is_gone(json.dumps(json.loads(own_process()) | {"began": 1}))


@pytest.mark.parametrize(
    ("changed", "gone"),
    [
        ({"host": "elsewhere"}, False),
        ({"host": "elsewhere", "boot": "before"}, False),
        ({"machine": "elsewhere", "boot": "before"}, False),
        ({"namespace": "pid:[1]"}, False),
        ({"boot": "before"}, True),
        ({"boot": None}, False),
        ({"began": None}, False),
        ({"pid": "none"}, False),
    ],
)
def test_only_what_is_certain_counts(other, changed, gone):
    child, noted = other
    child.kill()
    child.wait()
    assert is_gone(json.dumps(noted | changed)) is gone


@pytest.mark.parametrize("noted", ["", "{}", "[]", "no JSON", "1"])
def test_of_unknown_origin_nothing_is_certain(noted):
    assert not is_gone(noted)

"""What is free is the least of what the system and the control group leave."""

import pytest
import torch

from assay.numerics import memory

CPU = torch.device("cpu")


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def test_it_is_what_the_system_says(files):
    (files / "meminfo").write_text("MemTotal:  9000 kB\nMemFree: 5 kB\nMemAvailable:   3000 kB\n")
    assert memory.free_bytes(CPU) == 3000 * 1024


def test_a_control_group_that_leaves_less_rules(files):
    (files / "meminfo").write_text("MemAvailable: 3000 kB\n")
    (files / "memory.current").write_text("1000000\n")
    for limit, wanted in (("max", 3000 * 1024), ("1500000", 500000), ("900000", 0), ("99000000000", 3000 * 1024)):
        (files / "memory.max").write_text(f"{limit}\n")
        assert memory.free_bytes(CPU) == wanted


@pytest.mark.usefixtures("files")
def test_where_nothing_is_said_it_is_4_gib():
    assert memory.free_bytes(CPU) == 4 * 2**30


def test_here_it_is_something():
    assert memory.free_bytes(CPU) > 0

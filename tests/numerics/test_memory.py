"""What is free is the least of what the system and the control groups leave."""

from types import SimpleNamespace

import pytest
import torch

from assay.numerics import memory

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Writes files of /proc and /sys/fs/cgroup."""
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")

    def write(**texts):
        for name, text in texts.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def group(folder, limit, used, cached=0, version=2):
        names = (
            ("memory.max", "memory.current")
            if version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        place = tmp_path / "cgroup" / folder
        place.mkdir(parents=True, exist_ok=True)
        inactive = "inactive_file" if version == 2 else "total_inactive_file"
        for name, text in (
            (names[0], limit),
            (names[1], used),
            ("memory.stat", f"anon 5\n{inactive} {cached}\n"),
        ):
            (place / name).write_text(f"{text}\n")

    return SimpleNamespace(write=write, group=group)


def test_it_is_what_the_system_says(files):
    files.write(
        proc__meminfo=(
            "MemTotal:  900000 kB\nMemFree: 5 kB\nMemAvailable:   300000 kB\nHugePages_Total: 0\n"
        )
    )
    assert memory.free_bytes(CPU) == 300_000 * 1024


@pytest.mark.parametrize(
    ("limit", "wanted"), [("max", 1000), (700 * MIB, 600), (9999 * MIB, 1000), (50 * MIB, 64)]
)
def test_a_control_group_that_leaves_less_rules(files, limit, wanted):
    files.write(proc__meminfo=f"MemAvailable: {1000 * 1024} kB\n", proc__self__cgroup="0::/\n")
    files.group("", limit, 100 * MIB)
    assert memory.free_bytes(CPU) == wanted * MIB


def test_the_groups_above_count_as_well(files):
    files.write(
        proc__meminfo=f"MemAvailable: {1000 * 1024} kB\n",
        proc__self__cgroup="0::/slurm/job_7/step_0\n",
    )
    files.group("slurm/job_7", 500 * MIB, 200 * MIB)
    files.group("slurm/job_7/step_0", "max", 100 * MIB)
    assert memory.free_bytes(CPU) == 300 * MIB


def test_the_page_cache_can_be_had(files):
    files.write(proc__meminfo=f"MemAvailable: {1000 * 1024} kB\n", proc__self__cgroup="0::/job\n")
    files.group("job", 500 * MIB, 480 * MIB, cached=400 * MIB)
    assert memory.free_bytes(CPU) == 420 * MIB


def test_groups_of_the_first_version_count_too(files):
    files.write(
        proc__meminfo=f"MemAvailable: {1000 * 1024} kB\n",
        proc__self__cgroup="5:cpu:/a\n3:memory,hugetlb:/job\n",
    )
    files.group("memory/job", 500 * MIB, 300 * MIB, cached=50 * MIB, version=1)
    assert memory.free_bytes(CPU) == 250 * MIB


@pytest.mark.usefixtures("files")
def test_where_nothing_is_said_it_is_4_gib():
    assert memory.free_bytes(CPU) == 4 * 2**30


def test_here_it_is_something():
    assert memory.free_bytes(CPU) > 0


@pytest.mark.gpu
def test_what_torch_keeps_for_itself_is_free():
    before = memory.free_bytes(torch.device("cuda"))
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    assert memory.free_bytes(torch.device("cuda")) <= before - 2**27
    del held
    assert memory.free_bytes(torch.device("cuda")) >= before - 2**27

"""How much memory is free, for defaults that decide how much is worked on at once."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
_LEAST = 2**26  # a job whose group is full still has to go on, with as little as will do


def free_bytes(device: torch.device) -> int:
    """Bytes available on the device; on a CPU those that the system and the control groups, as
    Slurm sets them, leave.
    """
    if device.type == "cuda":
        # Torch's own, to use again.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    free = 4 * 2**30  # where nothing is known
    system = _numbers(_PROC / "meminfo")
    if "MemAvailable:" in system:
        free = system["MemAvailable:"] * 1024
    return max(_LEAST, min([free, *_left_by_groups()]))


def _left_by_groups() -> Iterator[int]:
    """Bytes left under the limit of each control group of this process, in both versions of Linux'
    control groups.
    """
    groups = _PROC / "self" / "cgroup"
    for line in (
        groups.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        if groups.exists()
        else []
    ):
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root, limit, used, inactive = _CGROUP, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used = _CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            inactive = "total_inactive_file"
        else:
            continue
        own = PurePosixPath(path.lstrip("/"))
        for folder in [root / own, *(root / parent for parent in own.parents)]:
            most, now = (_number(folder / name) for name in (limit, used))
            if most is not None and now is not None:
                # The page cache counts as used, and is given up when it is asked for.
                yield max(0, most - now + _numbers(folder / "memory.stat").get(inactive, 0))


def _number(path: Path) -> int | None:
    """The number that a file holds; None where it holds none, as `max`, or is not there."""
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _numbers(path: Path) -> dict[str, int]:
    """The numbers of a file's lines, by the word before them."""
    if not path.exists():
        return {}
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}

"""Whose a run of MLflow is: the process that writes it, as a tag, so that another can tell when it
is gone.
"""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from pathlib import Path

TAG = "process"


def own_process() -> str:
    """This process, as JSON: its host, by name and the number that it was installed with, that
    host's boot, its pid, the namespace in which the pid is its, and when it began.
    """
    return json.dumps(
        {
            "host": platform.node(),
            "machine": _read("/etc/machine-id"),
            "boot": _read("/proc/sys/kernel/random/boot_id"),
            "namespace": _namespace(),
            "pid": os.getpid(),
            "began": _began(os.getpid()),
        }
    )


def is_gone(process: str) -> bool:
    """Whether it is certain that a process that was noted so has ended: on this host, which was
    started anew or has no such process.

    One of another host, of another container or of unknown origin is never gone.
    """
    try:
        noted = json.loads(process)
        here = json.loads(own_process())
        # Many a host is called localhost. Older notes have no machine.
        if "machine" in noted and noted["machine"] != here["machine"]:
            return False
        if noted["host"] != here["host"] or None in (noted["boot"], here["boot"], noted["began"]):
            return False
        if noted["boot"] != here["boot"]:
            return True
        return bool(
            noted["namespace"] == here["namespace"] and _began(int(noted["pid"])) != noted["began"]
        )
    except (ValueError, TypeError, KeyError):
        return False


def describe(process: str) -> str:
    """A process that was noted so, for people."""
    noted = json.loads(process)
    return f"pid {noted['pid']} on {noted['host']}"


def _began(pid: int) -> int | None:
    """When a process began, in the kernel's ticks since its boot; None where there is none, or only
    what its parent has yet to reap.
    """
    text = _read(f"/proc/{pid}/stat")
    if text is None:
        return None
    fields = text.rpartition(")")[2].split()  # a program's name may hold spaces and brackets
    return None if fields[0] in "ZX" else int(fields[19])


def _namespace() -> str | None:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return None


def _read(path: str) -> str | None:
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8").strip()
    return None

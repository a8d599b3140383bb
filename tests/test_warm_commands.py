"""A command that is forked from the warm process is as one that a shell starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from warm_commands import WarmCommands, parse

PROGRAM = """\
import atexit, json, os, signal, sys, threading, time
case = sys.argv[2]
if case == "told":
    print(json.dumps({
        "argv": sys.argv, "cwd": os.getcwd(), "environment": dict(os.environ), "path": sys.path,
        "group": os.getpgrp(), "session": os.getsid(0), "main": [__name__, __file__],
        "signals": [str(signal.getsignal(number)) for number in signal.valid_signals()],
        "files": sorted(os.listdir("/proc/self/fd")), "threads": threading.active_count(),
        "input": os.stat(0).st_ino, "mask": str(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "out": [sys.stdout.encoding, sys.stdout.line_buffering, sys.stderr.line_buffering],
        "own": sys.modules["__main__"].__dict__ is globals(),
    }, sort_keys=True))
elif case == "said":
    sys.exit("this went wrong")
elif case == "code":
    sys.exit(300)
elif case == "error":
    raise ValueError("unforeseen")
elif case == "late":
    atexit.register(lambda: print("at exit"))
    threading.Thread(target=lambda: (time.sleep(0.2), print("a thread"))).start()
    print("the end of the script")
elif case == "interrupted":
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
elif case == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
elif case == "lines":
    sys.stdout.write("one\\rtwo\\r\\nthree\\n" + "x" * 200_000)
elif case == "stands":
    print("ready", flush=True)
    time.sleep(60)
"""

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="commands are forked on Linux alone")


@pytest.fixture(scope="module")
def warm(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a program that goes by the name of kedro, warm or in a shell."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "kedro").write_text(f"#!{sys.executable}\n{PROGRAM}")
    (folder / "kedro").chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    commands = WarmCommands(environment, imports=())

    def start(command: str, cwd: Path, *, cold: bool = False) -> subprocess.Popen[str]:
        if cold:
            return subprocess.Popen(
                command,
                shell=True,
                cwd=cwd,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        process = commands.start(command, cwd, environment)
        assert process is not None
        return process

    yield start
    commands.close()


@ON_LINUX
@pytest.mark.parametrize(
    "case", ["told", "said", "code", "error", "late", "interrupted", "killed", "lines"]
)
def test_it_finds_and_leaves_what_one_in_a_shell_does(warm, tmp_path, case):
    command = f"MLFLOW_RUN_ID=abc kedro run {case} --params=layers:[3,5],a.b=1"
    ended = []
    for cold in (False, True):
        process = warm(f"exec env {command}" if cold else command, tmp_path, cold=cold)
        out, err = process.communicate(timeout=60)
        # The interpreter's own lines of a traceback are those of runpy's as well.
        told = json.loads(out) if case == "told" else out
        ended.append((process.returncode, told, err.splitlines()[-1:]))
    assert ended[0] == ended[1]


@ON_LINUX
def test_signals_reach_it_and_a_timeout_is_told(warm, tmp_path):
    process = warm("kedro run stands", tmp_path)
    assert process.stdout.readline() == "ready\n"
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.01)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.01)
    process.send_signal(signal.SIGSTOP)
    stat = Path(f"/proc/{process.pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
    process.kill()
    assert process.wait(timeout=60) == process.poll() == -signal.SIGKILL
    process.communicate()


def test_what_needs_a_shell_or_other_imports_has_a_process_of_its_own():
    assert parse("MLFLOW_TRACKING_URI=http://127.0.0.1:80 kedro run --params=a:1") == (
        {"MLFLOW_TRACKING_URI": "http://127.0.0.1:80"},
        ["kedro", "run", "--params=a:1"],
    )
    assert parse("assay export saev a --layer 3") == (
        {},
        ["assay", "export", "saev", "a", "--layer", "3"],
    )
    assert parse("assay labels shards") is None
    assert parse("exec kedro prune --dry-run") == ({}, ["kedro", "prune", "--dry-run"])
    for command in (
        "",
        "A=1",
        "kedro",
        "kedro --help",
        "kedro viz build",
        "kedro run | cat",
        "kedro run; true",
        "exec env kedro run",
        "kedro run 'a b'",
        "kedro run $HOME",
        "kedro run *",
        "KEDRO_LOGGING_CONFIG=a.yml kedro run",
        "OMP_NUM_THREADS=2 kedro run",
        "python a.py -m kedro run",
    ):
        assert parse(command) is None, command

"""Command lines as forks of a process that has imported what they import.

Importing torch, MLflow and pandas takes five seconds of CPU, more than most runs of the tests. So
one process, which never runs a command itself, imports them once, and each `kedro run` is a fork of
it. A fork has the folder, variables, arguments and pipes that a process started by a shell would
have, runs the same script, takes the same signals and leaves the same exit code. What reads the
environment or the folder as it is imported (Kedro's logging, our settings) is imported by the fork.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import inspect
import io
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

IMPORTS = (
    "assay.io.datasets",
    "assay.numerics",
    "dynaconf",
    "git",
    "IPython",
    "kedro_datasets.json",
    "kedro_datasets.pandas.csv_dataset",
    "kedro_datasets.pandas.parquet_dataset",
    "kedro_datasets.plotly",
    "kedro_datasets.text",
    "jinja2",
    "kedro.config",
    "kedro.pipeline",
    "kedro.validation",
    "mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
    "pandas",
    "pathspec",
    "PIL.Image",
    "plotly.graph_objects",
    "plotly.io",
    "rich.console",
    "sklearn",
)
"""What a run imports that takes long, and looks at neither the environment nor the folder."""

QUIET = {
    "DO_NOT_TRACK": "true",
    "GOMP_SPINCOUNT": "1000",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
}
"""What `assay.settings` sets before a run imports torch and MLflow, which read it then."""

LATE = frozenset({"KEDRO_ENV", "MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "SLURM_CONF"})
"""Variables that nothing reads as it is imported: a command may set them."""

WARM = (["kedro", "run"], ["kedro", "prune"], ["kedro", "slurm"], ["assay", "export"])
"""How the commands begin that need no process of their own."""

STATUS = struct.Struct("i")


def parse(command: str) -> tuple[dict[str, str], list[str]] | None:
    """Take apart a command line that needs no shell: NAME=value ... kedro run|prune ..., or
    assay export ...

    Returns:
        The variables that it sets and its words; None where a process of its own has to run it.
    """
    if re.search(r"[^\w ./:=,@%+\[\]{}-]", command, flags=re.ASCII):
        return None
    words = command.split()
    variables = {}
    while words and (assigned := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", words[0])):
        variables[assigned[1]] = assigned[2]
        del words[0]
    if words[:1] == ["exec"]:
        del words[0]
    warm = words[:2] in WARM and variables.keys() <= LATE
    return (variables, words) if warm else None


class WarmCommands:
    """The process that commands are forked from, started when the first one is.

    Args:
        environment: what commands are started with; one that is started with another gets a
            process of its own.
        imports: the modules that it imports.
    """

    def __init__(self, environment: Mapping[str, str], imports: tuple[str, ...] = IMPORTS) -> None:
        self._environment = dict(environment)
        self._imports = imports
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._server: subprocess.Popen[bytes] | None = None

    def start(
        self, command: str, folder: Path, environment: Mapping[str, str]
    ) -> subprocess.Popen[str] | None:
        """Start a command line; None where that needs a process of its own."""
        parsed = parse(command)
        if parsed is None or environment != self._environment or sys.platform != "linux":
            return None
        variables, (program, *arguments) = parsed
        script = shutil.which(program, path=environment["PATH"])
        assert script is not None, f"{program} is not in {environment['PATH']}"
        request = {"argv": [script, *arguments], "cwd": str(folder), "variables": variables}
        with self._lock:
            control = self._warmed()
            out, out_end = os.pipe()
            err, err_end = os.pipe()
            status, status_end = os.pipe()
            ends = [out_end, err_end, status_end]
            socket.send_fds(control, [json.dumps(request).encode()], ends)
            for end in ends:
                os.close(end)
            return WarmProcess(command, out, err, status)

    def _warmed(self) -> socket.socket:
        if self._control is None:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._server = subprocess.Popen(
                    [sys.executable, __file__, str(theirs.fileno()), *self._imports],
                    env=self._environment,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
        return self._control

    def close(self) -> None:
        """End the process; commands that run go on."""
        if self._control is not None and self._server is not None:
            self._control.close()
            self._server.wait(60)


class WarmProcess(subprocess.Popen[str]):
    """A fork of the warm process, with what the tests use of `subprocess.Popen`."""

    def __init__(self, command: str, out: int, err: int, status: int) -> None:
        # Popen's own would start a process.
        self.args = command
        self.stdin = None
        self.stdout = os.fdopen(out)
        self.stderr = os.fdopen(err)
        self.returncode = None
        self._status = os.fdopen(status, "rb", buffering=0)
        self.pid = self._read_status()

    def _read_status(self) -> int:
        found = self._status.read(STATUS.size)
        if not found:
            raise RuntimeError(
                f"`{self.args!s}` was to be forked from the process that tests/helpers/warm_commands.py keeps"
                " warm, which ended instead: see what it printed"
            )
        (number,) = STATUS.unpack(found)
        return int(number)

    def poll(self) -> int | None:
        """The exit code; None as long as the process runs."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self._end()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process; gives its exit code.

        Raises:
            subprocess.TimeoutExpired: the process runs longer than that.
        """
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self._end()
        return self.returncode

    def _end(self) -> None:
        self.returncode = os.waitstatus_to_exitcode(self._read_status())
        self._status.close()

    def communicate(
        self,
        input: None = None,  # type: ignore[override]  # noqa: A002
        timeout: float | None = None,
    ) -> tuple[str, str]:
        """Read both pipes to their ends, and wait for the process.

        Raises:
            subprocess.TimeoutExpired: that takes longer than asked for.
        """
        assert input is None, "a warm command has the standard input of the tests"
        assert self.stdout is not None
        assert self.stderr is not None
        ends = None if timeout is None else time.monotonic() + timeout
        pipes = {self.stdout.fileno(): bytearray(), self.stderr.fileno(): bytearray()}
        opened = list(pipes)

        def left() -> float | None:
            return None if ends is None else max(0.0, ends - time.monotonic())

        while opened:
            ready = select.select(opened, [], [], left())[0]
            if not ready:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            for pipe in ready:
                found = os.read(pipe, 1 << 16)
                pipes[pipe] += found
                if not found:
                    opened.remove(pipe)
        self.stdout.close()
        self.stderr.close()
        self.wait(left())
        out, err = (
            io.TextIOWrapper(io.BytesIO(found), newline=None).read() for found in pipes.values()
        )
        return out, err

    def send_signal(self, sig: int) -> None:
        """Send a signal, where the process has not ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, sig)


def serve(control: int, imports: tuple[str, ...]) -> None:
    """Import, then fork for each request and tell of each fork's end, until nobody asks any more.

    Args:
        control: the socket that requests come by, each with the writing ends of its three pipes:
            standard output, standard error, and where its process id and exit status go.
        imports: the modules to import before any fork.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, whose end is ours
    given = dict(os.environ)
    os.environ.update(QUIET)
    for name in imports:
        importlib.import_module(name)
    os.environ.clear()
    os.environ.update(given)
    inspect.stack()  # which reads the source of all modules, once
    assert threading.active_count() == 1, threading.enumerate()
    assert "kedro.framework.project" not in sys.modules  # sets logging up by the folder it is in
    assert not {"transformers", "timm"} & sys.modules.keys()  # only what records imports them
    gc.collect()
    gc.freeze()  # so that a fork does not copy the pages of what it never touches
    running: dict[int, tuple[int, int]] = {}
    with socket.socket(fileno=control) as requests:
        while True:
            for ready in select.select([control, *running], [], [])[0]:
                if ready in running:
                    pid, status = running.pop(ready)
                    os.write(status, STATUS.pack(os.waitpid(pid, 0)[1]))
                    os.close(status)
                    os.close(ready)
                    continue
                message, fds, _, _ = socket.recv_fds(requests, 1 << 16, 3)
                if not message:
                    os._exit(0)  # what the imports would do at exit is the forks'
                out, err, status = fds
                # Before the command can take it, a Ctrl-C would be lost.
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
                pid = os.fork()
                if pid == 0:
                    ours = [control, status, *running, *(end for _, end in running.values())]
                    _become(json.loads(message), out, err, ours)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
                os.write(status, STATUS.pack(pid))
                os.close(out)
                os.close(err)
                running[os.pidfd_open(pid)] = pid, status


def _become(request: dict[str, Any], out: int, err: int, ours: list[int]) -> NoReturn:
    """Be the process that a shell would have started."""
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        for end in (out, err, *ours):
            os.close(end)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request["cwd"])
        os.environ.update(request["variables"], PWD=request["cwd"])
        sys.argv = request["argv"]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        # A process has seeds of its own; strings' hashes alone are those of the warm process.
        if "torch" in sys.modules:
            import numpy as np
            import torch

            np.random.seed()  # noqa: NPY002
            torch.seed()
        code = _run(sys.argv[0])
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        os._exit(code)


def _run(script: str) -> int:
    """Run a script and end as the interpreter does, up to the taking down of what is imported."""
    code: object = None
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        main.__file__ = script
        exec(compile(Path(script).read_bytes(), script, "exec"), vars(main))
    except SystemExit as ended:
        code = ended.code
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        code = -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if not isinstance(code, int | None):
        sys.stderr.write(f"{code}\n")
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return (code or 0) & 0xFF


if __name__ == "__main__":
    import warm_commands  # Python warns of a fork beside C's threads in __main__ alone

    warm_commands.serve(int(sys.argv[1]), tuple(sys.argv[2:]))

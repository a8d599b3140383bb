"""A Slurm of a test's own on this one machine: slurmctld, slurmd and munge, on loopback alone;
without systemd, cgroups and a database.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol", "scancel")

CONF = """\
ClusterName=assay
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
MaxArraySize={max_array_size}
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=8000
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=20 MaxTime=INFINITE
PartitionName=graceless Nodes=ALL PriorityTier=1 GraceTime=0 MaxTime=INFINITE
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
"""


def why_not() -> str | None:
    """Why no Slurm can be started here; None where one can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    return None if os.geteuid() == 0 else "needs root"


class Cluster:
    """A running Slurm of one node, within a `with` block.

    Args:
        cpus: that the node says it has, whatever this machine has.
        max_array_size: above the largest index of a job array.
    """

    def __init__(self, *, cpus: int = 4, max_array_size: int = 1001) -> None:
        # Short, since it is in the path of a socket.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o711)
        self._host = socket.gethostname().partition(".")[0]
        self._conf = CONF.format(
            host=self._host,
            folder=self.folder,
            cpus=cpus,
            max_array_size=max_array_size,
            **dict(zip(("controller", "daemon"), _free_ports(2), strict=True)),
        )
        self.variables: Mapping[str, str] = {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        with ExitStack() as stack:
            stack.callback(self._stop)
            self._start()
            stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        return subprocess.run(
            command,
            env={**os.environ, **self.variables},
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout.strip()

    def jobs(self) -> dict[str, str]:
        """The states of the jobs that have not ended, by their ids, each element of an array."""
        lines = self.ask("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def show(self, job: str) -> dict[str, str]:
        """What slurmctld knows of a job, also one that has ended."""
        line = self.ask("scontrol", "--oneliner", "show", "job", job).splitlines()[0]
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def wait_for(self, holds: Callable[[], object], seconds: float = 240) -> None:
        """Wait until something holds; fail with the queue as it is where it never does."""
        until = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < until, self.ask("scontrol", "show", "job")
            time.sleep(0.1)

    def _start(self) -> None:
        folder = self.folder
        for name, mode in {"state": 0o700, "spool": 0o755, "log": 0o700, "munge": 0o711}.items():
            (folder / name).mkdir(mode=mode)
        (folder / "munge.key").touch(mode=0o600)
        (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
        (folder / "slurm.conf").write_text(self._conf)
        self.ask(
            "munged",
            "--force",
            f"--key-file={folder}/munge.key",
            f"--socket={folder}/munge/socket",
            f"--pid-file={folder}/munge/pid",
            f"--log-file={folder}/munge/log",
            f"--seed-file={folder}/munge/seed",
            "--num-threads=2",
        )
        for program in ("slurmctld", "slurmd"):
            subprocess.run(
                [program, "-c"],
                env={**os.environ, **self.variables},
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=60,
            )
        until = time.monotonic() + 30
        while self._state() != "idle":
            logs = "".join(each.read_text() for each in (folder / "log").iterdir())
            assert time.monotonic() < until, logs[-3000:]
            time.sleep(0.1)

    def _state(self) -> str:
        try:
            return self.ask("sinfo", "--noheader", "--partition=main", "--format=%t")
        except subprocess.CalledProcessError:  # slurmctld is not there yet
            return ""

    def _stop(self) -> None:
        """End every job, since a slurmstepd that cannot report would stay for good; then the
        daemons.
        """
        with suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired, AssertionError):
            self.wait_for(self._cancel_all, 30)
        pids = []
        for name in ("slurmd.pid", "slurmctld.pid", "munge/pid"):
            with suppress(FileNotFoundError, ProcessLookupError, ValueError):
                pids.append(int((self.folder / name).read_text()))
                os.kill(pids[-1], signal.SIGTERM)
        for pid in pids:
            _await_end(pid)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _cancel_all(self) -> bool:
        jobs = self.jobs()
        for job in jobs:
            with suppress(subprocess.CalledProcessError):  # it has just ended
                self.ask("scancel", job)
        return not jobs


def _await_end(pid: int) -> None:
    until = time.monotonic() + 10
    with suppress(ProcessLookupError):
        while time.monotonic() < until:
            os.kill(pid, 0)
            time.sleep(0.05)


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]

"""Teams of ranks for tests: processes that are forked from one that has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["assay.ranks.group", "assay.pipelines.kmeans.nodes", "assay.pipelines.probe.nodes"]
)


class Ranks:
    """Ranks that do one call.

    Args:
        size: ranks in all.
        function: by name, see `Team.call`, like the next two.
        request: JSON.
        tensors: by name.
        timeout_seconds: of the group.
        session: that rank 0 does the function by itself, which may call others.
    """

    def __init__(
        self,
        size: int,
        function: str,
        request: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        timeout_seconds: float = 60.0,
        *,
        session: bool = False,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.processes = [
            _FORKS.Process(
                target=_be_rank,
                args=(
                    rank,
                    size,
                    self._store.port,
                    self._result,
                    (function, dict(request), dict(tensors or {})),
                    timeout_seconds,
                    session,
                ),
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    @property
    def _result(self) -> Path:
        return Path(self._folder.name) / "result.pkl"

    def result(self) -> Any:
        """What rank 0's call gave; what it raised is raised."""
        for process in self.processes:
            process.join(120)
        found = pickle.loads(self._result.read_bytes())  # noqa: S301 # this test wrote it
        self.close()
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        """Forget the result."""
        self._folder.cleanup()

    def wait_until_at_work(self) -> None:
        """Wait until every rank has said so."""
        keys = [f"at-work/{rank}" for rank in range(len(self.processes))]
        self.wait_for(lambda: self._store.check(keys))

    def wait_for(self, seen: Callable[[], object]) -> None:
        """Wait until something is seen, or a process has ended."""
        while not seen() and all(process.is_alive() for process in self.processes):
            time.sleep(0.02)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a rank a signal."""
        os.kill(self.processes[rank].pid or 0, number)

    def exit_codes(self) -> list[int | None]:
        """Of all ranks."""
        return [process.exitcode for process in self.processes]


def in_ranks(
    size: int,
    function: str,
    request: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
    *,
    session: bool = False,
) -> Any:
    """What so many ranks do when rank 0 calls: see `Team.call` and `Ranks`."""
    return Ranks(size, function, request, tensors, session=session).result()


def _be_rank(
    rank: int,
    size: int,
    port: int,
    result: Path,
    call: tuple[str, dict[str, Any], dict[str, Tensor]],
    timeout_seconds: float,
    session: bool,
) -> None:
    from assay.pipelines.stopping import signals_stop
    from assay.ranks.group import Group, RankLostError
    from assay.team import as_current, find_function

    torch.set_num_threads(1)
    group = Group(
        rank, size, lambda: TCPStore("localhost", port, is_master=False, wait_for_workers=False)
    )
    group.at_work = lambda: group._store.set(f"at-work/{rank}", "")  # type: ignore[attr-defined]
    with as_current(group), signals_stop():
        if rank > 0:
            try:
                group.follow()
            except RankLostError:
                sys.exit(1)
            finally:
                group.close()
            return
        group.timeout_seconds = timeout_seconds
        try:
            function, request, tensors = call
            found: Any = (
                find_function(function)(group, request, tensors) if session else group.call(*call)
            )
        except BaseException as error:  # the test raises it
            found = error
        result.write_bytes(pickle.dumps(found))
        group.end()

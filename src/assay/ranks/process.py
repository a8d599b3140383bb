"""What a process that torchrun started does: `kedro run` on rank 0, what that calls on the
others.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from assay.pipelines.stopping import SIGNALS, exit_code, signals_stop
from assay.ranks.group import Group, RankLostError
from assay.team import as_current

_CONNECTING = timedelta(seconds=60)


def be_rank() -> int:
    """Be the rank that torchrun says; the exit code."""
    try:
        rank, size = _place()
        _take_own_gpu()
        group = Group(rank, size, connect)
    except (ValueError, dist.DistError) as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    with as_current(group):
        return _lead(group) if rank == 0 else _follow(group)


def connect() -> Store:
    """A connection to torchrun's store."""
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=_CONNECTING,
    )


def _place() -> tuple[int, int]:
    """This process's rank, and how many there are.

    Raises:
        ValueError: what is to be run is not `kedro run`, or ranks are on several machines.
    """
    if sys.argv[1:2] != ["run"]:
        raise ValueError(
            f"found {' '.join(sys.argv[1:2]) or 'no command'}, wanted run: ranks do no other of"
            " Kedro's commands"
        )
    size = int(os.environ["WORLD_SIZE"])
    if size != int(os.environ["LOCAL_WORLD_SIZE"]):
        raise ValueError(
            f"found {size} ranks on several machines, wanted all on one: run layers side by side"
            " with --namespaces, each on a machine"
        )
    return int(os.environ["RANK"]), size


def _take_own_gpu() -> None:
    """Let this process see one GPU of those it is given, where there are any: all its threads use
    the same.

    Raises:
        ValueError: there are fewer than ranks.
    """
    found, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if found == 0:
        return
    if found < int(os.environ["LOCAL_WORLD_SIZE"]):
        raise ValueError(
            f"found {found} GPUs for {os.environ['LOCAL_WORLD_SIZE']} ranks, wanted one for each:"
            " lower --nproc-per-node, or set CUDA_VISIBLE_DEVICES to nothing to use none"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(found)))
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local]


def _lead(group: Group) -> int:
    from kedro.framework.cli import main

    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    else:
        code = 0
    finally:
        _ignore_signals()
        group.end()
    return code


def _follow(group: Group) -> int:
    # Rank 0 says what there is to say.
    logging.getLogger().addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")
    with signals_stop():
        try:
            group.follow()
        except KeyboardInterrupt:
            return exit_code() or 130
        except (RankLostError, dist.DistError) as error:
            sys.stderr.write(f"Error: {error}\n")
            return 1
        finally:
            _ignore_signals()
            group.close()
    return 0


def _ignore_signals() -> None:
    """Let nothing spoil the exit code: what is to be saved is saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

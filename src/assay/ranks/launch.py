"""torchrun on this machine, with the exit code that a queue understands: its own is 1 whatever
happened.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import determine_local_world_size, parse_args, run

USAGE = """\
Usage: python -m assay.ranks --nproc-per-node=N [OPTIONS OF TORCHRUN] run [OPTIONS OF KEDRO RUN]

`kedro run` by N processes on this machine, one a GPU.
"""


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments, without its `--standalone -m assay.ranks`.

    Returns the exit code: that of the rank that ended first with another than 0; 128 and the
    signal's number where one came to this process, or ended that rank.
    """
    if not arguments or {"-h", "--help"} & set(arguments[:1]):
        sys.stdout.write(USAGE)
        return 0 if arguments else 2
    options = parse_args(["--standalone", *arguments])  # type: ignore[no-untyped-call]
    options.training_script_args = [options.training_script, *options.training_script_args]
    options.training_script, options.module = "assay.ranks", True
    ranks = determine_local_world_size(options.nproc_per_node)
    # torchrun's own default is 1, however many cores there are.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // ranks)))
    try:
        run(options)  # type: ignore[no-untyped-call]
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        sys.stderr.write(
            f"Error: rank {rank} was ended by {name}, so all ended. The same command goes on from"
            " here.\n"
        )
        return 128 - int(failure.exitcode)
    return 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""What a GPU is asked, in one call: whether it is right, and how fast it is.

    PYTHONPATH=src python3 benchmarks/gpu/run.py --seconds 450 --out FOLDER

docs/benchmarks.md says what has to travel to a bare machine. Each stage is a process with a limit,
so that one that crashes or hangs costs its own time only. What is found is a line of
FOLDER/results.jsonl at once, and in the end a table in FOLDER/table.md. `--only` names stages;
`--rehearse` runs all of it, small, on the CPU.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import from_shards
import right
import speed
import table
import torch
from common import Run

STAGES = {**right.STAGES, **speed.STAGES, **from_shards.STAGES}
# Seconds at most. What is not timed runs together, and compiles what is timed afterwards, one by
# one.
TOGETHER = {"answers": 150, "killed": 150, "tests": 170, "pipeline": 170, "sanitizer": 120}
ONE_BY_ONE = {
    "ceilings": 40,
    "assignment": 60,
    "steps": 60,
    "pca": 30,
    "probes": 60,
    "from_shards": 150,
}


def start(name: str, run: Run) -> subprocess.Popen[bytes]:
    """A stage as a process, and group, of its own."""
    command = [sys.executable, __file__, "--stage", name, "--out", str(run.out)]
    return subprocess.Popen(
        [*command, *(["--rehearse"] if run.rehearsal else [])], start_new_session=True
    )


def wait(name: str, process: subprocess.Popen[bytes], seconds: float, run: Run) -> None:
    """Wait for a stage, and say how it failed where it did."""
    try:
        code = process.wait(max(1.0, seconds))
        if code != 0:
            run.say("stage", name, found=f"failed: exit code {code}")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        run.say("stage", name, found=f"was stopped after {seconds:.0f} s")


def describe(run: Run) -> None:
    """The machine, for the table's head."""
    about = {
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "processors": str(os.cpu_count()),
    }
    if not run.rehearsal:
        card = torch.cuda.get_device_properties(0)
        about = {
            "card": f"{card.name} ({card.multi_processor_count} multiprocessors)",
            "CUDA": str(torch.version.cuda),
            **about,
        }
    for name, value in about.items():
        run.say("machine", name, found=value)


def run_stages(run: Run, seconds: float, only: set[str]) -> None:
    """All stages, or some, within so many seconds."""
    end = time.monotonic() + seconds

    def wanted(stages: dict[str, int]) -> dict[str, int]:
        return {name: most for name, most in stages.items() if not only or name in only}

    began = {name: (start(name, run), most) for name, most in wanted(TOGETHER).items()}
    for name, (process, most) in began.items():
        wait(
            name,
            process,
            min(most - (seconds - (end - time.monotonic())), end - time.monotonic()),
            run,
        )
    for name, most in wanted(ONE_BY_ONE).items():
        left = end - time.monotonic()
        if left < 5:
            run.say("stage", name, found="was left out: there was no time")
            continue
        wait(name, start(name, run), min(most, left), run)


def main() -> None:
    """Run the stages that the command line asks for, or one of them in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=450)
    parser.add_argument("--only", nargs="+", choices=[*TOGETHER, *ONE_BY_ONE], default=[])
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--stage", choices=STAGES, help="this one alone, in this process")
    arguments = parser.parse_args()
    run = Run(arguments.out, arguments.rehearse)
    if not run.rehearsal and not torch.cuda.is_available():
        sys.stdout.write(
            "torch sees no CUDA device: there is nothing to measure (--rehearse runs all of it,"
            " small, on the CPU)\n"
        )
        return
    run.out.mkdir(parents=True, exist_ok=True)
    if arguments.stage:
        STAGES[arguments.stage](run)
        return
    (run.out / "results.jsonl").unlink(missing_ok=True)
    describe(run)
    run_stages(run, arguments.seconds, set(arguments.only))
    sys.stdout.write("\n" + table.write(run.out, run.rehearsal))


if __name__ == "__main__":
    main()

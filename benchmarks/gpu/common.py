"""What the stages share: where findings go, how long something takes, and how large it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Run:
    """A run of the stages. `rehearsal`: everything small, on the CPU. `out`: the folder of what is
    found.
    """

    out: Path
    rehearsal: bool

    @property
    def device(self) -> torch.device:
        """Where the stages measure."""
        return torch.device("cpu") if self.rehearsal else torch.device("cuda", 0)

    def size(self, full: int, small: int) -> int:
        """The one or the other."""
        return small if self.rehearsal else full

    def say(self, stage: str, what: str, **found: object) -> None:
        """Write a finding down at once, as a line of JSON: what comes later may crash."""
        line = json.dumps({"stage": stage, "what": what, **found})
        with (self.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def judge(
        self,
        stage: str,
        what: str,
        found: float,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """A finding that is wanted to be at least, or at most, so much."""
        met = (at_least is None or found >= at_least) and (at_most is None or found <= at_most)
        wanted = f"at least {at_least:g}" if at_least is not None else f"at most {at_most:g}"
        self.say(stage, what, found=found, wanted=wanted, met=met)

    def seconds(self, work: Callable[[], object]) -> float:
        """How long `work` takes, the device's work included."""
        if self.rehearsal:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        began_at, ended_at = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began_at.record()
        work()
        ended_at.record()
        torch.cuda.synchronize()
        return float(began_at.elapsed_time(ended_at)) / 1000

    def best(self, works: Mapping[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
        """The best time of each, which take turns, after one round that does not count: it
        compiles, and fills caches.
        """
        best = dict.fromkeys(works, float("inf"))
        for turn in range(2 if self.rehearsal else rounds + 1):
            for name, work in works.items():
                found = self.seconds(work)
                if turn > 0:
                    best[name] = min(best[name], found)
        return best


def mixture(
    n: int, d: int, n_clusters: int, device: torch.device, *, noise: bool = False
) -> Tensor:
    """Tokens about planted centers, float32 (n, d), or noise alone, which is the worst case."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, d, generator=generator, device=device)
    if noise:
        return x
    planted = torch.randn(n_clusters, d, generator=generator, device=device)
    return x.mul_(0.7).add_(
        planted[torch.randint(n_clusters, (n,), generator=generator, device=device)]
    )


def with_sources(root: Path) -> dict[str, str]:
    """The environment in which Assay is that of a checkout."""
    paths = [
        str(Path(path).resolve())
        for path in os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if path
    ]
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(root / "src"), *paths])}


def logged(run: Run, stage: str, command: list[str]) -> int:
    """The exit status of a command whose output goes into the stage's log."""
    with (run.out / f"{stage}.log").open("a", encoding="utf-8") as log:
        return subprocess.run(
            command,
            cwd=ROOT,
            env=with_sources(ROOT) | {"OMP_NUM_THREADS": "2"},  # several run at once
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode

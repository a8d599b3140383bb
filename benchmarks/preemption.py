"""How long work takes that is preempted now and then: in closed form, and simulated."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Preemption:
    """Seconds: the mean time to preemption while a job runs, the wait in the queue after it, the
    start until there is work again, from one save to the next, and a save.
    """

    mean: float
    queue: float = 600.0
    start: float = 20.0
    every: float = 60.0
    save: float = 0.3


def expected(work: float, how: Preemption, *, saves: bool = True) -> tuple[float, float]:
    """Expected seconds of running and of wall time in closed form (Daly 2006, "A higher order
    estimate of the optimum checkpoint interval for restart dumps"): preemptions come by chance at a
    constant rate, while a job starts, too.
    """
    every, save = (how.every, how.save) if saves else (work, 0.0)
    growth = math.expm1((every + save) / how.mean) * work / every
    running = how.mean * (
        math.expm1(how.start / how.mean) + math.exp(how.start / how.mean) * growth
    )
    return running, running + how.queue * (1 + running / how.mean)


def simulate(
    work: float, how: Preemption, *, saves: bool = True, asked: bool = False, n: int = 10_000
) -> tuple[float, float]:
    """Mean seconds of running and of wall time over `n` simulated jobs.

    asked: a job is asked to stop before it is preempted (SIGTERM, and time to save): what it has
    done until then is kept.
    """
    rng = random.Random(0)
    every, save = (how.every, how.save) if saves else (work, 0.0)
    total = 0.0
    n_preempted = 0
    for _ in range(n):
        done = 0.0
        while True:
            until = -how.mean * math.log(1 - rng.random())
            left = how.start + (work - done) / every * (every + save)
            if until >= left:
                total += left
                break
            total += until
            n_preempted += 1
            worked = max(0.0, until - how.start) / (every + save)
            done += every * (worked if asked else math.floor(worked))
    return total / n, total / n + how.queue * (1 + n_preempted / n)

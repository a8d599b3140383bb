"""What the paper's experiment takes on machines of several sizes: bytes, operations, time and money
of each stage, and what preemption adds.

    python benchmarks/scale.py                    # the tables
    python benchmarks/scale.py --write            # puts them into docs/scale.md
    python benchmarks/scale.py --gpu-hour 2.5 --passes 3 --queue-minutes 60
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from preemption import Preemption, expected, simulate
from stage_costs import (
    CLUSTERS_OF_MACHINES,
    FAR,
    FILE_SYSTEMS,
    FIT,
    H100,
    LAYERS,
    NODE,
    TOKEN_BYTES,
    Cluster,
    hours,
    stages,
)

PAGE = Path(__file__).parents[1] / "docs/scale.md"
MEANS = (1800.0, 7200.0, 28_800.0)
"""Seconds from one preemption to the next."""


@dataclass(frozen=True)
class Options:
    """What the tables are made for: passes of k-means, dollars an hour, minutes in the queue."""

    passes: float = 1.0
    gpu_hour: float = 3.0
    node_hour: float = 4.0
    queue_minutes: float = 10.0


def rounded(value: float) -> str:
    """Two digits, or whole where there are more."""
    if value == 0:
        return "0"
    digits = max(0, 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}" if value < 100 else f"{value:,.0f}"


def scaled(value: float, unit: str = "") -> str:
    """Bytes or operations, with a prefix."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{rounded(value / size)} {prefix}{unit}"
    return rounded(value)


def duration(seconds: float) -> str:
    """In the unit that is read best."""
    if seconds < 100:
        return f"{rounded(seconds)} s"
    return f"{rounded(seconds / 60)} min" if seconds < 7200 else f"{rounded(seconds / 3600)} h"


def table(heading: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> list[str]:
    """Lines of Markdown."""
    return [f"| {' | '.join(row)} |" for row in (heading, ("---",) * len(heading), *rows)]


def cost(cluster: Cluster, gb_per_s: float, options: Options, passes: float) -> str:
    """Time and money of all layers."""
    price = options.node_hour if cluster.machine is NODE else options.gpu_hour
    found = hours(cluster, gb_per_s, passes)
    return f"{duration(3600 * found)}, ${found * cluster.units * price:,.0f}"


def answers(options: Options) -> list[str]:
    """How long and how much, whole."""
    return table(
        ("six layers", *(f"{each} GB/s" for each in FILE_SYSTEMS)),
        (
            (
                cluster.name,
                *(cost(cluster, each, options, options.passes) for each in FILE_SYSTEMS),
            )
            for cluster in CLUSTERS_OF_MACHINES
        ),
    )


def by_passes(options: Options) -> list[str]:
    """The same at one file system, where k-means makes more passes."""
    passes = (1, 2, 10, 200)
    return table(
        ("six layers at 30 GB/s", *(f"{each} pass{'es' * (each > 1)}" for each in passes)),
        (
            (cluster.name, *(cost(cluster, 30, options, each) for each in passes))
            for cluster in CLUSTERS_OF_MACHINES
        ),
    )


def of_stages(options: Options) -> list[str]:
    """What each stage of a layer reads and computes."""

    def rows() -> Iterator[tuple[str, ...]]:
        here = (stages(machine, options.passes) for machine in (H100, NODE))
        for gpu, cpu in zip(*here, strict=True):
            n_bytes = gpu.tokens * TOKEN_BYTES
            read = n_bytes / 1e9 / (H100.shuffled if gpu.shuffled else H100.in_order)
            core = f"{rounded(cpu.core / 3600)} h" if cpu.core else f"{duration(cpu.serial)} in all"
            yield (
                *(gpu.name, gpu.what, scaled(n_bytes, "B"), scaled(gpu.written, "B")),
                *(scaled(gpu.operations), duration(read), duration(gpu.gpu), core),
            )

    heading = (
        "stage",
        "reads",
        "bytes",
        "written",
        "operations",
        "H100: reading",
        "work",
        "a core",
    )
    return table(heading, rows())


def by_file_system(options: Options) -> list[str]:
    """Minutes of each stage where six layers are worked on at once."""
    clusters = [each for each in CLUSTERS_OF_MACHINES if each.layers_at_once > 1]
    speeds = " / ".join(map(str, FILE_SYSTEMS))

    def rows() -> Iterator[tuple[str, ...]]:
        for number, stage in enumerate(stages(H100, options.passes)):
            cells = []
            for cluster in clusters:
                here = stages(cluster.machine, options.passes)[number]
                found = (cluster.seconds(here, each) / 60 for each in FILE_SYSTEMS)
                cells.append(
                    " / ".join(rounded(each) if each >= 0.1 else "< 0.1" for each in found)
                )
            yield stage.name, *cells

    names = (each.name.partition(",")[0] for each in clusters)
    return table((f"minutes at {speeds} GB/s in all", *names), rows())


def limits(options: Options) -> list[str]:
    """From which file system on a second GPU a layer is of any use."""

    def rows() -> Iterator[tuple[str, ...]]:
        for stage in stages(H100, options.passes):
            if stage.shared:
                n_bytes = stage.tokens * TOKEN_BYTES / 1e9
                read = n_bytes / (H100.shuffled if stage.shuffled else H100.in_order)
                pace, work = n_bytes / (read + stage.gpu), n_bytes / stage.gpu
                yield (
                    stage.name,
                    *(f"{rounded(each)} GB/s" for each in (pace, LAYERS * pace, LAYERS * work)),
                )

    heading = ("stage", "one GPU takes", "six take", "six would, were reading free")
    return table(heading, rows())


def from_afar(_: Options) -> list[str]:
    """A pass of one process where each read takes a millisecond more, by threads."""
    layer = FIT * TOKEN_BYTES / 1e9

    def rows() -> Iterator[tuple[str, ...]]:
        for threads, rates in FAR.items():
            yield str(threads), *(f"{rate:g} GB/s, {duration(layer / rate)}" for rate in rates)

    return table(("threads", "in order", "shuffled"), rows())


def of_preemption(options: Options) -> list[str]:
    """Wall time and wasted share of work of some lengths, with saves and without."""
    _, gpus, _, _, nodes = CLUSTERS_OF_MACHINES
    found = {stage.name: stage for stage in stages(NODE, options.passes)}
    works = {
        "a pass at 5 GB/s in all": gpus.seconds(found["statistics"], 5),
        "seeding on a node": nodes.seconds(found["k-means, seeding"], 5),
        "a pass at 0.24 GB/s a process": gpus.seconds(found["statistics"], 6 * 0.24),
    }

    def rows() -> Iterator[tuple[str, ...]]:
        for name, work in works.items():
            for saves in (True, False):
                cells = []
                for mean in MEANS:
                    how = Preemption(mean, 60 * options.queue_minutes)
                    running, wall = expected(work, how, saves=saves)
                    cells.append(f"{duration(wall)}, {100 * (1 - work / running):.0f} %")
                how_saved = "each minute" if saves else "never"
                yield f"{name}: {duration(work)}", how_saved, *cells

    return table(("work", "saved", *(f"every {duration(mean)}" for mean in MEANS)), rows())


def of_saves(options: Options) -> list[str]:
    """The share of the time that is wasted on an hour's work, by formula and by simulation."""

    def rows() -> Iterator[tuple[str, ...]]:
        for mean in MEANS:
            best = math.sqrt(2 * Preemption(mean).save * mean)  # Young 1974
            for every in (best, 60.0, 600.0):
                how = Preemption(mean, 60 * options.queue_minutes, every=every)
                running = (
                    expected(3600.0, how)[0],
                    simulate(3600.0, how)[0],
                    simulate(3600.0, how, asked=True)[0],
                )
                said = f"{rounded(every)} s{', the best' * (every == best)}"
                yield (
                    duration(mean),
                    said,
                    *(f"{100 * (1 - 3600 / each):.1f} %" for each in running),
                )

    heading = ("preempted every", "saved every", "closed form", "simulated", "asked to stop first")
    return table(heading, rows())


TABLES: dict[str, Callable[[Options], list[str]]] = {
    "answers": answers,
    "passes": by_passes,
    "stages": of_stages,
    "file systems": by_file_system,
    "limits": limits,
    "far": from_afar,
    "preemption": of_preemption,
    "saves": of_saves,
}


def filled(page: str, options: Options) -> str:
    """The page with each table between its marks.

    Raises:
        ValueError: marks are missing.
    """
    for name, make in TABLES.items():
        before, mark, rest = page.partition(f"<!-- {name}: benchmarks/scale.py -->\n\n")
        _, end, after = rest.partition("\n\n<!-- end -->")
        if not mark or not end:
            raise ValueError(f"found no place for the table {name!r}, wanted its two marks")
        page = before + mark + "\n".join(make(options)) + end + after
    return page


def main() -> None:
    """Print the tables, or put them into the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passes", type=float, default=1.0, help="of k-means")
    parser.add_argument("--gpu-hour", type=float, default=3.0, help="dollars")
    parser.add_argument("--node-hour", type=float, default=4.0, help="dollars")
    parser.add_argument("--queue-minutes", type=float, default=10.0)
    parser.add_argument("--write", action="store_true", help="into docs/scale.md")
    given = vars(parser.parse_args())
    write = given.pop("write")
    options = Options(**given)
    if write:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), options), encoding="utf-8")
        return
    for name, make in TABLES.items():
        sys.stdout.write("\n".join([f"## {name}", "", *make(options), "", ""]))


if __name__ == "__main__":
    main()

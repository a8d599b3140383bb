"""Wheels that have to travel to a GPU machine without a network: of wheels.txt, in the versions of
constraints.txt, and Assay's own.

python benchmarks/gpu/bundle.py --to FOLDER [--dry-run]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MOST_MIB = 60
"""Of all wheels together, so that they travel easily."""
TARGET = [
    "--python-version",
    "3.12",
    "--implementation",
    "cp",
    "--platform",
    "manylinux_2_28_x86_64",
    "--platform",
    "manylinux2014_x86_64",
]
ONLY_SOURCES = ("antlr4-python3-runtime",)
"""Of these there are no wheels to download: they are made here, and are of any platform."""


def canonical(name: str) -> str:
    """A project's name as it is compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def lines(path: Path) -> list[str]:
    """The lines that are no comments."""
    return [
        line.strip()
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip() and line[0] != "#"
    ]


def requirements() -> list[str]:
    """Each with its version; ValueError for one without."""
    pinned = {canonical(line.split("==")[0]): line for line in lines(ROOT / "constraints.txt")}
    wanted = [
        line if "==" in line else pinned.get(canonical(line), line)
        for line in lines(HERE / "wheels.txt")
    ]
    loose = [line for line in wanted if "==" not in line]
    if loose:
        raise ValueError(
            f"wheels.txt names {loose} without a version, and constraints.txt does not pin them:"
            " give one"
        )
    return wanted


def commands(folder: Path) -> list[list[str]]:
    """What fills the folder, by pip."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    here = [line for line in requirements() if canonical(line.split("==")[0]) in ONLY_SOURCES]
    there = [line for line in requirements() if line not in here]
    return [
        [
            *pip,
            "download",
            "--no-deps",
            "--only-binary=:all:",
            *TARGET,
            "--dest",
            str(folder),
            *there,
        ],
        [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), *here],
        [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)],
    ]


def main() -> None:
    """Download and build the wheels, or say with what commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    arguments = parser.parse_args()
    for command in commands(arguments.to):
        if arguments.dry_run:
            sys.stdout.write(" ".join(command[1:]) + "\n")
        else:
            arguments.to.mkdir(parents=True, exist_ok=True)
            subprocess.run(command, check=True)
    if arguments.dry_run:
        return
    sizes = [path.stat().st_size for path in arguments.to.glob("*.whl")]
    mib = sum(sizes) / 2**20
    sys.stdout.write(f"{len(sizes)} wheels, {mib:.0f} MiB, in {arguments.to}\n")
    if mib > MOST_MIB:
        sys.exit(
            f"found {mib:.0f} MiB of wheels, wanted at most {MOST_MIB}: take out of wheels.txt what"
            " the machine has"
        )


if __name__ == "__main__":
    main()

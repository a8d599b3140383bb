"""Whether two runs gave the same bits: their tables, tensors, codes and scores.

Run one version of Assay, keep its `data` folder, run the other on the same shards, then

    python benchmarks/same_results.py BEFORE/data AFTER/data

lists what differs and ends with 1 where anything does. Times and names of runs are left out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file

VERSION = re.compile(r"/(\d{4}-\d\d-\d\dT[^/]*|[0-9a-f]{16})(?=/)")
"""A folder of one version of a result, or of codes with one fingerprint."""

TIMED = re.compile(r"/(seconds|cpu_seconds|tokens_per_second|data_wait|run|time)$")
"""Numbers of a result that no two runs share."""

SUFFIXES = (".bin", ".csv", ".json", ".parquet", ".safetensors", ".tex", ".md")
LEFT_OUT = ("/.", "/manifests/", "/figures/", "/metadata.json", "/about.json", "/gallery.json")


def results(data: Path) -> dict[str, Path]:
    """The results of a folder, by their path without the version; the newest of several."""
    found: dict[str, Path] = {}
    for path in sorted(data.rglob("*"), key=lambda path: path.stat().st_mtime):
        name = f"/{path.relative_to(data)}"
        if (
            path.is_file()
            and path.suffix in SUFFIXES
            and not any(part in name for part in LEFT_OUT)
        ):
            found[VERSION.sub("", name)] = path
    return found


def read(path: Path) -> dict[str, Any]:
    """A result's values by name: tensors as their bits, all else as it compares."""
    if path.suffix == ".safetensors":
        return {
            name: (
                tensor.dtype,
                tuple(tensor.shape),
                tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
            )
            for name, tensor in load_file(path).items()
        }
    if path.suffix == ".parquet":
        frame = pd.read_parquet(path)
        return {
            str(name): (
                str(column.dtype),
                column.tolist() if column.dtype == object else column.to_numpy().tobytes(),
            )
            for name, column in frame.items()
        }
    if path.suffix == ".json":
        return {
            name: value
            for name, value in _leaves(json.loads(path.read_text(encoding="utf-8"))).items()
            if not TIMED.search(name)
        }
    return {"": path.read_bytes()}


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            at: leaf for key, each in items for at, leaf in _leaves(each, f"{name}/{key}").items()
        }
    # Codes of before 2026-11 spell it so.
    return {name.replace("utilisation", "utilization"): repr(value)}


def main() -> None:
    """Compare two folders and say what differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args()
    before, after = results(options.before), results(options.after)
    values = 0
    differences = [
        f"only in {options.before}: {name}" for name in sorted(before.keys() - after.keys())
    ]
    differences += [
        f"only in {options.after}: {name}" for name in sorted(after.keys() - before.keys())
    ]
    for name in sorted(before.keys() & after.keys()):
        old, new = read(before[name]), read(after[name])
        values += len(old)
        differences += [
            f"{name}: {key or 'its bytes'} differs"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
    say = sys.stdout.write
    say(f"{len(before.keys() & after.keys())} results with {values} values compared\n")
    if not before.keys() & after.keys():
        differences.append("nothing to compare: wanted two data folders of runs")
    say("\n".join(differences or ["all the same, to the bit"]) + "\n")
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()

"""What was found, as Markdown that goes into docs/benchmarks.md as it is."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def markdown(lines: Iterable[str], rehearsal: bool) -> str:
    """From JSON lines to tables: what was wanted, what else was found, and what did not end."""
    found = [json.loads(line) for line in lines if line.strip()]
    about = {each["what"]: each["found"] for each in found if each["stage"] == "machine"}
    title = ", ".join(f"{name} {value}" for name, value in about.items())
    parts = [f"{'A REHEARSAL, WHOSE FIGURES SAY NOTHING: ' if rehearsal else ''}{title}.", ""]
    wanted = [each for each in found if "met" in each]
    parts += _table(("what", "found", "wanted", "met"), [_judged(each) for each in wanted])
    others = [
        each for each in found if "met" not in each and each["stage"] not in ("machine", "stage")
    ]
    parts += _table(("what else", "found"), [(each["what"], _shown(each)) for each in others])
    broken = [each for each in found if each["stage"] == "stage"]
    parts += [f"- **{each['what']}** {each['found']}" for each in broken]
    missed = sum(not each["met"] for each in wanted)
    parts += [
        "",
        (
            f"{len(wanted) - missed} of {len(wanted)} as wanted; {len(broken)} stages did not end"
            " well."
        ),
    ]
    return "\n".join(parts) + "\n"


def _judged(each: dict[str, Any]) -> tuple[str, ...]:
    met = "yes" if each["met"] else "**no**"
    return each["what"], _shown(each), each["wanted"], met


def _shown(each: dict[str, Any]) -> str:
    value = each["found"]
    shown = f"{value:.3g}" if isinstance(value, float) else str(value)
    return f"{shown} {each['unit']}" if "unit" in each else shown


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows] if rows else []
    return [*(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines), ""]


def write(out: Path, rehearsal: bool) -> str:
    """Write `table.md` beside the results, and return it."""
    text = markdown((out / "results.jsonl").read_text(encoding="utf-8").splitlines(), rehearsal)
    (out / "table.md").write_text(text, encoding="utf-8")
    return text

"""JSON that is read strictly: of bounded size and depth, and each key once. What is ambiguous is
refused, never guessed at.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic_core import from_json

MAX_JSON_BYTES = 64 * 2**20


def parse_json(raw: bytes | str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is larger than 64 MiB, no JSON, nested more than some 200 deep, or an object
            has a key twice, of which parsers silently take one or the other.
    """
    if len(raw) > MAX_JSON_BYTES:
        raise ValueError(f"it has {len(raw)} bytes, wanted at most {MAX_JSON_BYTES}")
    # This parser bounds the depth, and would take the last of two keys; Python's finds those, and
    # knows no bound.
    from_json(raw)
    return json.loads(raw, object_pairs_hook=_distinct)


def read_json_file(path: Path) -> Any:
    """What a JSON file says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `parse_json`, or it cannot be read; the message names the file.
    """
    try:
        with path.open("rb") as file:
            return parse_json(file.read(MAX_JSON_BYTES + 1))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(
            f"{path}: {error}; wanted valid JSON, each key once: write it again"
        ) from None


def shown(value: object) -> str:
    """What a file says, for a message: a terminal obeys control characters, so they are escaped."""
    text = str(value)
    return text if text.isprintable() else ascii(text)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, times = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(
            f"the key {twice!r} is there {'twice' if times == 2 else f'{times} times'}; keep one"
        )
    return found

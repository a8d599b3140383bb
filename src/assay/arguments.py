"""What is typed after `--params`: ``key:value`` pairs, whose values are what they look like and
nothing else.

YAML would make 90 of `1:30`, 8 of `010`, a date of `2026-01-02`, and end a path at ` #`. Here a
number is written in decimals, `[...]` is a list, `{key: value}` a section, `null`, `true` and
`false` are themselves, and everything else is text, as it stands. A parameter that is text takes
everything as text, so that shards may be called `12345678`.
"""

from __future__ import annotations

import re
from typing import Any

from assay.parameters import NUMBER, text_or_null

PAIR = re.compile(r"([\w-]+(?:\.[\w-]+)*)\s*[:=]\s*(.*)", flags=re.DOTALL)
WORDS = {"null": None, "true": True, "false": False}


def parse_pairs(text: str) -> dict[str, Any]:
    """Turn ``a:1,b.c=2,layers:[3,5]`` into nested parameters; ``key:value`` and ``key=value`` mean
    the same.

    Raises:
        ValueError: an item is no pair, or two pairs contradict each other.
    """
    return _parse_items(split_outside(text), ())


def _parse_items(items: list[str], path: tuple[str, ...]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for item in items:
        pair = PAIR.fullmatch(item)
        if pair is None:
            raise ValueError(
                f"`{item}` is no key:value or key=value; write a list in brackets, [1,2], and text"
                " that has a comma in quotes"
            )
        keys = (*path, *pair[1].split("."))
        _put(parsed, keys[len(path) :], _parse_value(pair[2], keys), item)
    return parsed


def _put(parsed: dict[str, Any], keys: tuple[str, ...], value: Any, item: str) -> None:
    """Set a nested value where nothing else is."""
    key, *rest = keys
    if rest:
        value = _nested(rest, value)
    if key not in parsed:
        parsed[key] = value
    elif isinstance(value, dict) and isinstance(parsed[key], dict):
        for inner, each in value.items():
            _put(parsed[key], (inner,), each, item)
    else:
        raise ValueError(f"`{item}`: `{key}` is set twice; name it once")


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def _parse_value(text: str, path: tuple[str, ...]) -> Any:
    """What a value says; ``path`` is the name of its parameter."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    takes_text, takes_null = text_or_null(path)
    if takes_text:
        return None if text == "null" and takes_null else text
    return _parse_typed(text, path)


def _parse_typed(text: str, path: tuple[str, ...]) -> Any:
    """What a value without quotes says where a parameter takes more than text."""
    if text in WORDS:
        return WORDS[text]
    if NUMBER.fullmatch(text):
        return float(text) if re.search(r"[.eE]", text) else int(text)
    if text.startswith("[") and text.endswith("]"):
        return [_parse_value(item, path) for item in split_outside(text[1:-1])]
    if text.startswith("{") and text.endswith("}"):
        items = split_outside(text[1:-1])
        if all(PAIR.fullmatch(item) for item in items):  # or it is text, as {layer} is
            return _parse_items(items, path)
    return text


def split_outside(text: str) -> list[str]:
    """Split at the commas that are in no brackets and no quoted value; leave out empty items."""
    items, depth, quote, before = [""], 0, "", ","
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and before in ":=,[{":  # an apostrophe inside a path is none
            quote = character
        else:
            depth = max(0, depth + (character in "[{") - (character in "]}"))
        before = before if character.isspace() else character
        if character == "," and depth == 0 and not quote:
            items.append("")
        else:
            items[-1] += character
    return [item.strip() for item in items if item.strip()]

"""What classes are called: a file that names labels, as data sets come with one."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from assay.io.strict_json import parse_json, shown
from assay.yaml_files import check_yaml

MOST_LABEL = 65_535
"""The largest label that shards can hold."""

LONGEST_NAME = 200
MOST_BYTES = 2**24

Entry = tuple[str, str, str]
"""Where it stands in the file, for messages; the label as it is written; the name."""

NUMBERED = re.compile(r"([0-9]+)(?:[ \t]*[:,][ \t]*|[ \t]+)(.*)")
"""A line that names a label: `3: floor`, `3,floor`, `3 floor`."""

HEADER = re.compile(r"Idx[\t,](?:.*[\t,])?Name[ \t]*", flags=re.IGNORECASE)
"""How ADE20K's table begins, whatever separates its columns."""


def read_class_names(path: Path) -> dict[int, str]:
    """The names of labels, by label.

    The file is UTF-8 text in one of these forms:

    - `.yml`, `.yaml` or `.json`: a mapping, `{label: name}`.
    - A table with a header from `Idx` to `Name`, separated by tabs or commas: ADE20K's
      objectInfo150.txt.
    - A label and a name in each line, as `3: floor`, `3,floor` or `3 floor`: COCO-Stuff's
      labels.txt.
    - A name in each line: line n names label n, from 1 on. Label 0 is void, and has no line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has none of these forms, names a label twice, or none; or a name is empty,
            longer than 200 characters or not printable. The message names the file and the line.
    """
    text = _read_text(path)
    kind = path.suffix.casefold()
    if kind == ".json":
        entries: Iterable[Entry] = _of_json(path, text)
    elif kind in (".yml", ".yaml"):
        entries = _of_yaml(path, text)
    else:
        entries = _of_lines(path, text)
    return _checked(path, entries)


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; wanted one that names the classes")
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(raw) > MOST_BYTES:
        raise ValueError(
            f"{path} has more than {MOST_BYTES} bytes: it is no list of classes; name another file"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: found byte {raw[error.start]:#x}, wanted UTF-8 text: save it as"
            " that, or name another file"
        ) from None


def _of_json(path: Path, text: str) -> Iterator[Entry]:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise ValueError(
            f"{path}: {error}; wanted valid JSON, {{label: name}}, each label once"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(  # noqa: TRY004  # of a file's content, not of an argument
            f"{path}: found a {type(found).__name__}, wanted a mapping, {{label: name}}"
        )
    for label, name in found.items():
        where = f"{path}, label {shown(label[:LONGEST_NAME])}"
        if not isinstance(name, str):
            raise ValueError(  # noqa: TRY004
                f"{where}: found a {type(name).__name__}, wanted its name: put it in quotes"
            )
        yield where, label, name


def _of_yaml(path: Path, text: str) -> Iterator[Entry]:
    check_yaml(path)
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        return
    for key, value in root.value:
        where = f"{path}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(  # noqa: TRY004
                f"{where}: found a {key.id}, wanted a label, as in `3: floor`"
            )
        if not isinstance(value, yaml.ScalarNode):
            raise ValueError(  # noqa: TRY004
                f"{where}: found a {value.id}, wanted a name, as in `3: floor`"
            )
        kind = value.tag.rpartition(":")[2]
        if kind not in ("str", "null"):
            raise ValueError(
                f"{where}: found {shown(value.value[:LONGEST_NAME])}, which YAML takes for a"
                f" {kind}, wanted a name: put it in quotes"
            )
        yield where, key.value, value.value if kind == "str" else ""


def _of_lines(path: Path, text: str) -> Iterable[Entry]:
    # Not splitlines(), which takes characters for ends of lines that no editor does.
    lines = [line.strip(" \t") for line in re.split(r"\r\n|\n|\r", text)]
    while lines and not lines[-1]:
        lines.pop()
    if lines and HEADER.fullmatch(lines[0]):
        return _of_table(path, lines)
    numbered = [NUMBERED.fullmatch(line) for line in lines]
    if not any(numbered):
        return ((f"{path}, line {n}", str(n), line) for n, line in enumerate(lines, 1))
    without = next((n for n, found in enumerate(numbered, 1) if found is None), None)
    if without is not None:
        first = next(n for n, found in enumerate(numbered, 1) if found is not None)
        raise ValueError(
            f"{path}, line {without}: found {lines[without - 1][:LONGEST_NAME]!r}, without a"
            f" label, where line {first} begins with one; wanted a label in each line, as in"
            " `3: floor`, or in none"
        )
    return (
        (f"{path}, line {n}", found[1], _unquoted(found[2]))
        for n, found in enumerate(numbered, 1)
        if found is not None
    )


def _unquoted(name: str) -> str:
    """A name that quotes keep together, as in a CSV file."""
    quoted = re.fullmatch(r'"((?:[^"]|"")*)"', name)
    return name if quoted is None else quoted[1].replace('""', '"')


def _of_table(path: Path, lines: list[str]) -> Iterator[Entry]:
    delimiter = "\t" if "\t" in lines[0] else ","
    heads = [head.strip().casefold() for head in lines[0].split(delimiter)]
    label, name = heads.index("idx"), heads.index("name")
    for n, line in enumerate(lines[1:], 2):
        where = f"{path}, line {n}"
        # Between tabs a quote is a name's own. A line at a time: one that is never closed ends
        # with its line.
        cells = line.split("\t") if delimiter == "\t" else _csv_cells(where, line)
        if len(cells) != len(heads):
            raise ValueError(
                f"{where}: found {len(cells)} columns, wanted the {len(heads)} of the header,"
                f" {', '.join(shown(head) for head in heads)}"
            )
        yield where, cells[label].strip(" \t"), cells[name]


def _csv_cells(where: str, line: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error as error:  # a cell of more than 128 KiB
        raise ValueError(f"{where}: {error}; wanted a line of a CSV file") from None


def _checked(path: Path, entries: Iterable[Entry]) -> dict[int, str]:
    names: dict[int, str] = {}
    places: dict[int, str] = {}
    for where, written, given in entries:
        label, name = _label(where, written), given.strip(" \t")
        if label in names:
            raise ValueError(
                f"{where}: label {label} has a name already, in"
                f" {places[label].removeprefix(f'{path}, ')}; wanted each label once"
            )
        if not name:
            raise ValueError(f"{where}: found no name of label {label}; wanted one, or no line")
        if len(name) > LONGEST_NAME:
            raise ValueError(
                f"{where}: found a name of {len(name)} characters, wanted at most {LONGEST_NAME}:"
                " shorten it"
            )
        if not name.isprintable():
            raise ValueError(
                f"{where}: found {name!a}, wanted a name of printable characters: take the"
                " others out"
            )
        names[label], places[label] = name, where
    if not names:
        raise ValueError(f"{path} names no label; wanted a name for each class")
    return names


def _label(where: str, written: str) -> int:
    if not re.fullmatch(r"[0-9]+", written):
        raise ValueError(
            f"{where}: found {written[:LONGEST_NAME]!r}, wanted a label, a whole number of"
            f" at most {MOST_LABEL:,}"
        )
    # Python reads no number of thousands of digits.
    digits = written.lstrip("0") or "0"
    if len(digits) > len(str(MOST_LABEL)) or int(digits) > MOST_LABEL:
        raise ValueError(
            f"{where}: found label {digits[:LONGEST_NAME]}, wanted at most {MOST_LABEL:,}, the"
            " largest that shards hold"
        )
    return int(digits)

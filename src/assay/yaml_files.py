"""What is wrong with a YAML file, in a line that names the file and the line, counted from 1."""

from __future__ import annotations

import re
from pathlib import Path

import yaml


class _Loader(yaml.SafeLoader):
    """As OmegaConf reads: a date is text."""


_Loader.yaml_implicit_resolvers = {
    first: [each for each in resolvers if each[0] != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

KNOWN = {*_Loader.yaml_constructors, "tag:yaml.org,2002:merge", "tag:yaml.org,2002:value"}
"""Tags that can be read: `<<` is a merge."""

MISREAD = re.compile(r"[-+]?(?:0[0-9_]+|[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?)")
"""Numbers that are not what they look like: YAML reads 010 in base 8 and 1:30 in base 60."""


def check_yaml(path: Path, *, are_names: bool = False) -> None:
    """Check that a file is YAML with keys, or empty, names no key twice, and has no number that
    reads as another.

    Args:
        path: the file.
        are_names: whether its keys, not those within them, have to be text.

    Raises:
        ValueError: it is not so, or not in UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=_Loader)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: found byte {error.object[error.start]:#x}, want UTF-8: save it"
            " as that"
        ) from None
    except yaml.MarkedYAMLError as error:
        raise ValueError(
            f"{path}, {_place(error.problem_mark or error.context_mark)}: {_explain(error, text)}"
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(
            f"{path}, line {line}: found the character {error.character:#x}, which YAML has no"
            " place for"
        ) from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be read") from None
    if root is not None:
        _check_nodes(path, root)
        if root.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:null"):
            raise ValueError(f"{path}, {_place(root.start_mark)}: found no key, want `name: value`")
        for key, _ in root.value if are_names else ():
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                said = key.value if isinstance(key, yaml.ScalarNode) else "of several"
                raise ValueError(
                    f"{path}, {_place(key.start_mark)}: found the key {said}, want a name"
                )


def _check_nodes(path: Path, root: yaml.Node) -> None:
    todo, seen = [root], set()
    while todo:
        node = todo.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if node.tag not in KNOWN:
            raise ValueError(
                f"{path}, {_place(node.start_mark)}: found the tag {node.tag}, want plain YAML"
            )
        if isinstance(node, yaml.MappingNode):
            _check_keys(path, node)
            todo += [each for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            todo += node.value
        elif node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and MISREAD.fullmatch(
            node.value
        ):
            read = yaml.load(node.value, _Loader)  # a SafeLoader
            raise ValueError(
                f"{path}, {_place(node.start_mark)}: {node.value} is {read} in YAML; write that, or"
                f" '{node.value}' in quotes"
            )


def _check_keys(path: Path, node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
            continue
        line = key.start_mark.line + 1
        if key.value in lines:
            raise ValueError(
                f"{path}, line {line}: `{key.value}` is there already, in line {lines[key.value]};"
                " name it once"
            )
        lines[key.value] = line


def _place(mark: yaml.Mark | None) -> str:
    return "line 1" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}"


def _explain(error: yaml.MarkedYAMLError, text: str) -> str:
    mark = error.problem_mark
    if mark is not None and mark.index is not None and text[mark.index : mark.index + 1] == "\t":
        return "found a tab; indent with spaces"
    first = error.context_mark.line if error.context_mark and error.context else None
    begun = "" if first is None or (mark and mark.line == first) else f", begun in line {first + 1}"
    return " ".join(f"{error.context or ''} {error.problem or ''}{begun}".split())

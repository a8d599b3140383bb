"""Reading parameters, and what is said of those that cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from assay.parameters.dictionaries import DictionaryParameters
from assay.parameters.fields import types_of
from assay.parameters.whole import Parameters


def parse_parameters(raw: Mapping[str, Any]) -> Parameters:
    """The typed parameters of a configuration.

    Raises:
        ValueError: one line a fault, naming the parameter, what was found, and what there is or was
            wanted.
    """
    try:
        return Parameters.model_validate(raw)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(fault) for fault in error.errors())) from None


def _explain(fault: Any) -> str:
    location = tuple(str(part) for part in fault["loc"])
    name = ".".join(location)
    if fault["type"] == "extra_forbidden":
        section = _section(location[:-1])
        known = [".".join((*location[:-1], field)) for field in section.model_fields]
        # Compared without the section, which all of them share.
        near = get_close_matches(location[-1], section.model_fields, n=1)
        hint = f"did you mean `{'.'.join((*location[:-1], near[0]))}`? " if near else ""
        return f"Unknown parameter `{name}`: {hint}There are {', '.join(known)}."
    if fault["type"] == "missing" and location[-1].isdecimal():
        return (
            f"Parameter `{'.'.join(location[:-1])}` is {fault['input']!r}: it wants"
            f" {int(location[-1]) + 1} values at least."
        )
    if fault["type"] == "missing":
        return (
            f"Parameter `{name}` is missing:"
            f" {_section(location[:-1]).model_fields[location[-1]].description}."
        )
    if fault["type"] == "value_error":
        return f"Parameter `{name}`: {fault['ctx']['error']}."
    return f"Parameter `{name}` is {fault['input']!r}: {fault['msg']}.{_help(name, fault)}"


def _help(name: str, fault: Any) -> str:
    """A sentence on what was probably meant."""
    value = fault["input"]
    if fault["type"] == "tuple_type" and isinstance(value, int | str):
        return f" Several may be given, so write brackets: {name}:[{value}]."
    if isinstance(value, list) and fault["type"] in ("int_type", "float_type") and value:
        return (
            f" It is one value a run: run {name}:{value[0]} first, then the others, each with its"
            " own `kedro run`."
        )
    if fault["type"] == "bool_type":
        return " Write true or false, without quotes."
    if fault["type"] == "string_type" and isinstance(value, int | float):
        return " It is text: put it in quotes in the YAML."
    return ""


def text_or_null(path: tuple[str, ...]) -> tuple[bool, bool]:
    """Whether the parameter of this name is text, and whether it may be null; neither where there
    is no such parameter.
    """
    try:
        annotation = _section(path[:-1]).model_fields[path[-1]].annotation
    except KeyError:
        return False, False
    types = types_of(annotation)
    return str in types and get_origin(annotation) is not dict, type(None) in types


def _section(location: tuple[str, ...]) -> type[BaseModel]:
    """The section of this name.

    Raises:
        KeyError: there is none.
    """
    section: type[BaseModel] = Parameters
    if location[:1] == ("dictionaries",):
        return DictionaryParameters
    for part in location:
        annotation = section.model_fields[part].annotation
        inner = next(
            (
                each
                for each in types_of(annotation)
                if isinstance(each, type) and issubclass(each, BaseModel)
            ),
            None,
        )
        if inner is None:
            raise KeyError(part)
        section = inner
    return section

"""What sections of parameters are made of: kinds of values, how they are read, and what a change of
them changes.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.config import JsonDict

from assay.encodings import KINDS

T = TypeVar("T")

NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
"""A number as it is written where text is read as one: no leading zeros, which YAML takes for
octal, no 1:30, no 1_000.
"""


def _check_name(name: str) -> str:
    if (
        re.fullmatch(r"[a-z][a-z0-9-]{0,79}", name)
        and not name.startswith(tuple(KINDS))
        and not re.search(r"-seed-[0-9]", name)
    ):
        return name
    raise ValueError(
        f"found {name!r}, want lower-case letters, digits and hyphens, 80 at the most, another"
        f" start than {' and '.join(KINDS)}, and no -seed-N, which `seeds` adds"
    )


DictionaryName = Annotated[str, AfterValidator(_check_name)]
"""A dictionary's name is that of its row in the table, and of files."""


def _check_choices(values: tuple[T, ...]) -> tuple[T, ...]:
    if not values or len(set(values)) < len(values):
        raise ValueError(f"found {list(values)}, want at least one, and none twice")
    return values


Choices = Annotated[tuple[T, ...], AfterValidator(_check_choices)]
"""At least one value, and none twice."""

Layer = Annotated[int, Field(ge=-(2**16), le=2**16)]
"""A block's number as it was recorded: saev counts from the end as well, and -2 is then the layer's
name.
"""

Seed = Annotated[int, Field(ge=0, lt=2**32)]

Seeds = tuple[Seed, ...]

Parts = Annotated[int, Field(ge=1, le=4096)]
"""Into how many pieces work is cut: each has a checkpoint of its own, so no more than a file system
bears.
"""


OPERATIONAL: JsonDict = {"changes": "how the work is done"}
"""Of a field that changes no result: how often to save, or what is held in memory together."""

SELECTS: JsonDict = {"changes": "which nodes there are"}
"""Of a field that only selects which nodes there are, or what some are bound to: a change of it
leaves the results that are there as they are.
"""


ADDED: JsonDict = {"changes": "results, where it is not the default"}
"""Of a field that is younger than results that are there, which its default leaves as they are: at
its default it has no part in what they are known by.
"""


def changing_no_result(section: type[BaseModel]) -> frozenset[str]:
    """The fields of a section that are marked as one of these; every other changes results, which
    are then made again.
    """
    fields = section.model_fields.items()
    return frozenset(
        name for name, field in fields if field.json_schema_extra in (OPERATIONAL, SELECTS)
    )


def added_defaults(section: type[BaseModel]) -> dict[str, Any]:
    """The defaults of the fields that are marked as `ADDED`, by name."""
    fields = section.model_fields.items()
    return {name: field.default for name, field in fields if field.json_schema_extra == ADDED}


def result_values(section: BaseModel) -> dict[str, Any]:
    """The values that results follow from, JSON by name: what they are known by."""
    values = section.model_dump(mode="json", exclude=set(changing_no_result(type(section))))
    at_default = added_defaults(type(section)).items()
    return {name: value for name, value in values.items() if (name, value) not in at_default}


class Section(BaseModel):
    """A group of parameters: immutable, and closed to names that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_what_it_looks_like(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        types = types_of(cls.model_fields[info.field_name].annotation)
        if bool in types:  # a StrictBool, which nothing else looks like
            return value
        values = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(each, bool) for each in values):
            raise ValueError(f"found {value}, want no boolean")
        if str not in types:
            for each in values:
                if (
                    isinstance(each, str)
                    and re.match(r"\s*[-+.]?[0-9]", each)
                    and not NUMBER.fullmatch(each)
                ):
                    raise ValueError(f"found {each!r}, want a number, written as 10, 0.1 or 1e-3")
        return value


def check_braces(path: str | None) -> str | None:
    """Give a path back unless it holds braces other than ``{layer}``'s: raises ValueError."""
    if path is None or not {"{", "}"} & set(path.replace("{layer}", "")):
        return path
    raise ValueError(
        f"found {path!r}, want a path without braces, which Kedro would replace: name it by a link"
    )


def types_of(annotation: Any) -> tuple[Any, ...]:
    """An annotation and what it is made of: of ``str | None`` also str and None."""
    return annotation, *get_args(annotation)

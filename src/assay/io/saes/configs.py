"""Configurations that libraries save beside weights, of which nothing is passed over."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from assay.io.saes.pickles import DTYPES
from assay.io.strict_json import read_json_file, shown


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it belongs to the weights beside it")
    if (size := path.stat().st_size) > LONGEST_CONFIG:
        raise ValueError(
            f"{path} has {size} bytes, wanted at most {LONGEST_CONFIG}: is it a configuration?"
        )
    return checked_object(read_json_file(path), path)


def checked_object(found: Any, named: Path) -> dict[str, Any]:
    """A JSON object that was read from ``named``.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(found, dict):
        raise ValueError(  # noqa: TRY004
            f"{named} has a configuration that is a {type(found).__name__}, wanted a JSON object:"
            " save it again"
        )
    return found


LONGEST_CONFIG = 2**22
"""Bytes; those of the libraries have some thousands."""

_LONGEST = 80
_MOST = 20


class Config:
    """The keys of a configuration, each of which has to be used or known to change nothing.

    Args:
        values: as read.
        named: the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], named: Path) -> None:
        self._values = dict(values)
        self._left = set(self._values)
        self.named = named

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The value of a key that the formula uses, and ``default`` where it is missing or null.

        Raises:
            ValueError: it is of another type. True is no number.
        """
        self._left.discard(key)
        found = self._values.get(key)
        if found is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(found, kinds) or (isinstance(found, bool) and bool not in kinds):
            raise ValueError(
                f"{self.named}: `{key}` is {_short(found)}, wanted"
                f" {' or '.join(each.__name__ for each in kinds)}: save it again"
            )
        return found

    def need(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """The value of a key that every configuration has.

        Raises:
            ValueError: it is missing, null or of another type.
        """
        found = self.take(key, kind)
        if found is None:
            raise ValueError(f"{self.named} says no `{key}`, wanted one: save it again")
        return found

    def flag(self, key: str, *, default: bool) -> bool:
        """The value of a key that is true or false, and ``default`` only where it is missing: the
        libraries take null for false.

        Raises:
            ValueError: it is null, or of another type.
        """
        found: bool = self.need(key, bool) if key in self else default
        return found

    def require(self, key: str, *wanted: Any, why: str) -> None:
        """Check that a key, if it is there, has one of the values that the formula is right for.

        Raises:
            ValueError: it has another; ``why`` says what that would change.
        """
        self._left.discard(key)
        if key in self._values and not any(
            type(self._values[key]) is type(each) and self._values[key] == each for each in wanted
        ):
            raise ValueError(
                f"{self.named}: `{key}` is {_short(self._values[key])}, wanted"
                f" {' or '.join(json.dumps(each) for each in wanted)}: {why}"
            )

    def ignore(self, keys: Iterable[str]) -> None:
        """Note keys that change neither codes nor reconstruction, whatever they say."""
        self._left.difference_update(keys)

    def finish(self) -> None:
        """Check that no key is left.

        Raises:
            ValueError: there are some that no formula here knows.
        """
        if self._left:
            raise ValueError(
                f"{self.named}: found {_names(self._left)}, which could change the codes and"
                " is not known here; remove it from a copy of the file if it changes nothing"
            )


def take_tensors(
    tensors: Mapping[str, Any], names: Mapping[str, str], named: Path, optional: Iterable[str] = ()
) -> dict[str, Any]:
    """The tensors of a file under other names.

    Args:
        tensors: as read.
        names: what each of the file's tensors is called here; all have to be there.
        named: the file, for messages.
        optional: of the file's names, those that may be missing.

    Raises:
        ValueError: some are missing, others are there, which belong to another formula, or an
            encoder or decoder is no matrix.
    """
    missing = names.keys() - tensors.keys() - set(optional)
    if missing:
        raise ValueError(
            f"{named} holds {_names(tensors) or 'no tensor'}, wanted"
            f" {', '.join(sorted(missing))} as well: save it too"
        )
    strange = tensors.keys() - names.keys()
    if strange:
        raise ValueError(
            f"{named}: found {_names(strange)} as well, which the formula of these"
            " weights has no place for: an autoencoder of another kind?"
        )
    found = {here: tensors[there] for there, here in names.items() if there in tensors}
    for there, here in names.items():
        if there not in tensors:
            continue
        dtype, shape = tensors[there].dtype, tuple(tensors[there].shape)
        if dtype not in DTYPES:
            raise ValueError(
                f"{named}: {there} is of {dtype}, wanted floating-point numbers of at least 16 bits"
            )
        if here in ("W_enc", "W_dec") and (len(shape) != 2 or 0 in shape):
            raise ValueError(
                f"{named}: {there} is of shape {shape}, wanted features and dimensions: save it"
                " again"
            )
    return found


def _short(value: object) -> str:
    """What a configuration says, for a message: of what may be nested or long, not all."""
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)}"
    # A pickled configuration holds things that JSON has no form for.
    is_json = value is None or isinstance(value, str | int | float)
    text = json.dumps(value) if is_json else f"of {type(value).__name__}"
    return shown(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")


def _names(names: Iterable[object]) -> str:
    """Some names that a file holds, for a message."""
    found = sorted(map(str, names))
    return ", ".join(shown(name[:_LONGEST]) for name in found[:_MOST]) + (
        f" and {len(found) - _MOST} more" if len(found) > _MOST else ""
    )

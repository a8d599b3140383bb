"""Headers of .npy files that came from elsewhere: read by one pattern, and never evaluated as numpy
does.
"""

from __future__ import annotations

import re
from typing import IO, Any, NamedTuple

import numpy as np

MOST_HEADER_BYTES = 10_000
"""That are read: numpy pads to 64 bytes, and a header says three things."""

_HEADER = re.compile(
    rb"\{'descr': '([<>|=][A-Za-z][0-9]{0,4})', 'fortran_order': (False|True), "
    rb"'shape': \(((?:[0-9]{1,18},(?: ?[0-9]{1,18},)*(?: ?[0-9]{1,18})?)?)\), \} *\n"
)


class NpyHeader(NamedTuple):
    """What a header says, and where the array begins, in bytes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int


def read_npy_header(file: IO[bytes]) -> NpyHeader:
    """Read the header at the beginning of a file, which is left behind it.

    Raises:
        ValueError: it is none, or one of pickled objects or of fields; saying what was found.
    """
    start = file.read(8)
    # Version 1 says the header's length in two bytes, version 2 in four.
    width = {b"\x93NUMPY\1\0": 2, b"\x93NUMPY\2\0": 4}.get(start, 0)
    if not width:
        raise ValueError(f"it begins with {start!r}")
    length = int.from_bytes(file.read(width), "little")
    header = file.read(min(length, MOST_HEADER_BYTES))
    found = _HEADER.fullmatch(header) if len(header) == length else None
    if found is None:
        raise ValueError(f"its header of {length} bytes is {header[:80]!r}")
    shape = tuple(int(size) for size in found[3].split(b",") if size.strip())
    if found[2] == b"True" and len(shape) > 1:
        raise ValueError("its numbers are in Fortran's order")
    try:
        dtype = np.dtype(found[1].decode())
    except TypeError as error:
        raise ValueError(f"its header names no type: {found[1]!r}") from error
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which are never read")
    return NpyHeader(dtype, shape, 8 + width + length)

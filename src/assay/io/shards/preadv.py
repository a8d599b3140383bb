"""Reading into many pieces of memory at once: POSIX's `preadv`.

C's and not Python's, which wants an object for each piece: making them took as long as the reading,
one thread at a time. Where the C library has none that ctypes finds, Python's is taken. Neither is
there on Windows.
"""

from __future__ import annotations

import ctypes
import errno
import os

import numpy as np
import numpy.typing as npt

Pieces = npt.NDArray[np.uintp]


def _load() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None, use_errno=True)
        library.preadv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
        library.preadv.restype = ctypes.c_ssize_t
    except (OSError, AttributeError, TypeError):
        return None
    return library


_LIBC = _load()


def read_pieces(descriptor: int, pieces: Pieces, offset: int) -> int:
    """Fill pieces of memory, an (address, bytes) each as C's iovec has them, from `offset` of a
    file on: the bytes read.

    Raises:
        OSError: as `os.preadv`.
    """
    if _LIBC is None:
        return os.preadv(descriptor, [_memory(*piece) for piece in pieces.tolist()], offset)
    n = int(_LIBC.preadv(descriptor, pieces.ctypes.data, len(pieces), offset))
    while n < 0 and ctypes.get_errno() == errno.EINTR:
        n = int(_LIBC.preadv(descriptor, pieces.ctypes.data, len(pieces), offset))
    if n < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return n


def _memory(address: int, n_bytes: int) -> ctypes.Array[ctypes.c_char]:
    return (ctypes.c_char * n_bytes).from_address(address)

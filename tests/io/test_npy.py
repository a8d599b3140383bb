"""Headers of .npy files: numpy's are read, and nothing else."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from assay.io.npy import read_npy_header


@given(
    st.sampled_from(["<i8", ">f4", "<f8", "|u1", "|S3", "<U3", "|b1"]),
    numpy_strategies.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    st.sampled_from([(1, 0), (2, 0)]),
)
def test_what_numpy_writes_is_read(dtype, shape, version):
    file = io.BytesIO()
    array = np.zeros(shape, dtype)
    np.lib.format.write_array(file, array, version=version)
    file.seek(0)
    header = read_npy_header(file)
    assert (header.dtype, header.shape) == (array.dtype, array.shape)
    assert file.tell() == header.offset == len(file.getvalue()) - array.nbytes


def header(text: bytes) -> bytes:
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "it begins with b''"),
        (b"\x93NUMPY\3\0" + bytes(80), "it begins with"),
        (
            header(
                b"{'descr': '<i8', 'fortran_order': False, 'shape': (9999999999999999999,), }\n"
            ),
            "its header of",
        ),
        (header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (2), }\n"), "its header of"),
        (
            header(b"{'descr': __import__('os'), 'fortran_order': False, 'shape': (1,), }\n"),
            "its header of",
        ),
        (
            header(b"{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': (1,), }\n"),
            "its header of",
        ),
        (
            header(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"),
            "pickled objects, which are never read",
        ),
        (header(b"{'descr': '<q77', 'fortran_order': False, 'shape': (1,), }\n"), "names no type"),
        (
            header(b"{'descr': '<i8', 'fortran_order': True, 'shape': (2, 2), }\n"),
            "Fortran's order",
        ),
        (b"\x93NUMPY\2\0" + b"\xff\xff\xff\xff" + b"{" * 100, "its header of 4294967295 bytes"),
    ],
)
def test_anything_else_is_refused(content, match):
    with pytest.raises(ValueError, match=match):
        read_npy_header(io.BytesIO(content))

"""Codes that saev wrote, read as scipy reads them; damage of every part is an error that names the
file.
"""

import json
import tracemalloc
import zipfile

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.io.codes.saev import SaevCodes, read_metrics
from assay.numerics.codes import densify, gather_columns, measure_l0


def _matrix(n_rows, n_features, density=0.3, seed=0, dtype=np.float32):
    return scipy.sparse.random(
        n_rows, n_features, density, "csr", dtype, np.random.default_rng(seed)
    )


def _write(folder, matrix, compressed=True):
    folder.mkdir(exist_ok=True)
    scipy.sparse.save_npz(folder / "token_acts.npz", matrix, compressed=compressed)
    return SaevCodes(folder, matrix.shape[0], 4)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 30),
    st.integers(1, 12),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.booleans(),
    st.data(),
)
def test_batches_are_the_rows_of_the_matrix(
    tmp_path_factory, n_rows, n_features, batch_size, density, compressed, data
):
    matrix = _matrix(n_rows, n_features, density)
    matrix.data -= 0.5
    codes = _write(tmp_path_factory.mktemp("acts"), matrix, compressed)
    assert (codes.format, codes.n_rows, codes.n_features, codes.k) == (
        "sparse",
        n_rows,
        n_features,
        None,
    )
    start = data.draw(st.integers(0, n_rows))
    batches = list(codes.batches(batch_size, start))
    assert all(len(batch["values"]) <= batch_size for batch in batches)
    found = [densify(batch, "sparse", n_features) for batch in batches]
    wanted = torch.from_numpy(matrix.toarray())[start:]
    assert torch.equal(torch.cat([wanted[:0], *found]), wanted)
    for batch in batches:
        assert (batch["values"].abs().diff(dim=1) <= 0).all()
        assert batch["values"].dtype == torch.float32
    assert measure_l0(codes, batch_size) == pytest.approx(matrix.count_nonzero() / n_rows)
    (columns,) = gather_columns(codes, [(torch.arange(n_features), None)], batch_size)
    assert torch.equal(columns.T, torch.from_numpy(matrix.toarray()))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_indices_of_any_integer_and_values_of_any_float_are_read(tmp_path, dtype):
    matrix = _matrix(8, 5, dtype=dtype)
    matrix.indptr, matrix.indices = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64)
    codes = _write(tmp_path, matrix)
    np.testing.assert_array_equal(
        densify(next(codes.batches(8)), "sparse", 5), matrix.toarray().astype(np.float32)
    )


def _rewrite(path, **changes):
    """The archive with some arrays replaced, or bytes; None: left out."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            change = changes.get(name.removesuffix(".npy"), content)
            if isinstance(change, bytes):
                archive.writestr(name, change)
            elif change is not None:
                with archive.open(name, "w") as file:
                    np.lib.format.write_array(file, np.asanyarray(change), allow_pickle=True)


def npy(header):
    """An array's file with this header, and nothing behind it."""
    text = f"{header}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": np.array(b"csc")}, "format 'csc'; wanted a CSR matrix as"),
        ({"format": None}, "format.npy.*wanted a CSR matrix"),
        ({"data": np.array([{}] * 12)}, "pickled objects, which are never read"),
        ({"indptr": np.array([{}] * 9)}, "wanted a CSR matrix"),
        ({"data": np.zeros(12, np.int32)}, r"data.npy of int32"),
        ({"indices": np.zeros(12)}, r"indices.npy of float64"),
        ({"data": np.zeros(11, np.float32)}, "do not make a matrix of 8 x 5"),
        ({"indptr": np.array([0, 3, 2, 4, 5, 6, 7, 8, 12])}, "do not make a matrix of 8 x 5"),
        ({"indptr": np.array([0, 12])}, "do not make a matrix of 8 x 5"),
        ({"shape": np.array([9, 5])}, "a matrix of 9 x 5, wanted 8 rows, the tokens of the shards"),
        (
            {"shape": np.array([8, 4097])},
            "a matrix of 8 x 4097, wanted 8 rows, .* and 1 to 4096 features",
        ),
        ({"indptr": np.zeros(10**6, np.int64)}, "do not make a matrix of 8 x 5"),
        ({"shape": np.array([8])}, "wanted a CSR matrix"),
        ({"data": b"nonsense"}, "wanted a CSR matrix"),
        ({"data": npy("(" * 9000)}, "wanted a CSR matrix"),
        ({"data": npy("{[]: 1}")}, "wanted a CSR matrix"),
        (
            {
                "data": npy(
                    "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "-" * 5000 + "1,)}"
                )
            },
            "wanted a CSR matrix",
        ),
        (
            {
                "indptr": npy(
                    "{'descr': '<i8', 'fortran_order': False, 'shape': (1" + "0" * 17 + ",), }"
                )
            },
            "wanted a CSR matrix",
        ),
    ],
    ids=str,
)
def test_damage_is_named_when_the_file_is_opened(tmp_path, changes, match):
    _write(tmp_path, _matrix(8, 5))
    _rewrite(tmp_path / "token_acts.npz", **changes)
    with pytest.raises(ValueError, match=rf"token_acts.npz: .*{match}"):
        SaevCodes(tmp_path, 8, 4)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"indices": np.full(12, 5)}, "rows from 0 on name features outside 0 to 4"),
        ({"indices": np.full(12, -1)}, "rows from 0 on name features outside 0 to 4"),
        ({"data": np.full(12, np.nan, np.float32)}, "rows from 0 on hold NaN or infinity"),
    ],
    ids=str,
)
def test_damage_of_values_is_named_when_they_are_read(tmp_path, changes, match):
    _write(tmp_path, _matrix(8, 5))
    _rewrite(tmp_path / "token_acts.npz", **changes)
    with pytest.raises(ValueError, match=match):
        list(SaevCodes(tmp_path, 8, 4).batches(3))


def test_a_file_that_is_cut_short_or_missing_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"token_acts.npz does not exist: run saev's inference"
    ):
        SaevCodes(tmp_path, 8, 4)
    _write(tmp_path, _matrix(8, 5))
    path = tmp_path / "token_acts.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="wanted a CSR matrix as scipy"):
        SaevCodes(tmp_path, 8, 4)
    _rewrite_cut = _matrix(8, 5)
    _write(tmp_path, _rewrite_cut)
    with zipfile.ZipFile(path) as archive:
        data = archive.read("data.npy")
    _rewrite(path, data=data[:-8])
    with pytest.raises(ValueError, match="is cut short: write it again"):
        list(SaevCodes(tmp_path, 8, 4).batches(8))


def test_metrics_are_those_of_saev_old_and_new(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics.json does not exist"):
        read_metrics(tmp_path)
    for metrics, found in (
        ({"normalized_mse": 0.25, "l0": 3}, {"normalized_mse": 0.25}),
        (
            {"sse_recon": 3, "sse_baseline": 4.0, "normalized_mse": 0.7},
            {"sse_recon": 3.0, "sse_baseline": 4.0},
        ),
    ):
        (tmp_path / "metrics.json").write_text(json.dumps(metrics))
        assert read_metrics(tmp_path) == found
    for text in (
        "{",
        "[]",
        "{}",
        '{"normalized_mse": -1}',
        '{"normalized_mse": NaN}',
        '{"sse_recon": 1, "sse_baseline": 0}',
        '{"sse_recon": NaN, "sse_baseline": 1}',
        '{"sse_recon": 1, "sse_baseline": Infinity}',
        '{"sse_recon": 1, "normalized_mse": 0.5}',
    ):
        (tmp_path / "metrics.json").write_text(text)
        with pytest.raises(ValueError, match=r"metrics.json: .*(wanted)"):
            read_metrics(tmp_path)


@pytest.mark.parametrize("name", ["format", "shape", "indptr", "indices", "data"])
def test_what_the_shards_do_not_allow_is_never_unpacked(tmp_path, name):
    _write(tmp_path, _matrix(8, 5))
    path, size = tmp_path / "token_acts.npz", 2**26
    with zipfile.ZipFile(path) as archive:
        members = {each: archive.read(each) for each in archive.namelist()}
    kind = {"format": "|S1", "data": "<f4"}.get(name, "<i8")
    for large in (
        npy(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': ({size // int(kind[-1])},), }}")
        + bytes(size),
        b"\x93NUMPY\x02\x00" + (2**26).to_bytes(4, "little") + b" " * 2**26,  # a header of 64 MiB
    ):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for each, content in members.items():
                archive.writestr(each, large if each == f"{name}.npy" else content)
        assert path.stat().st_size < 2**20
        tracemalloc.start()
        with pytest.raises(ValueError, match="wanted a CSR matrix"):
            SaevCodes(tmp_path, 8, 4)
        assert tracemalloc.get_traced_memory()[1] < 2**22
        tracemalloc.stop()


def test_long_rows_come_in_batches_that_memory_holds(tmp_path, monkeypatch):
    monkeypatch.setattr("assay.io.codes.saev.MAX_PADDED", 12)
    matrix = _matrix(9, 5, density=1.0)
    batches = list(_write(tmp_path, matrix).batches(4))
    assert [len(batch["values"]) for batch in batches] == [2, 2, 2, 2, 1]
    found = torch.cat([densify(batch, "sparse", 5) for batch in batches])
    assert torch.equal(found, torch.from_numpy(matrix.toarray()))


def test_a_flipped_bit_is_seen_by_the_archives_checksum_when_all_is_read(tmp_path):
    codes = _write(tmp_path, _matrix(400, 50), compressed=False)
    raw = (tmp_path / "token_acts.npz").read_bytes()
    first = next(codes.batches(400, 2))["values"][-1].max().numpy().tobytes()
    assert raw.count(first) == 1
    (tmp_path / "token_acts.npz").write_bytes(raw.replace(first, bytes([first[0] ^ 1]) + first[1:]))
    with pytest.raises(ValueError, match=r"data.npy is damaged \(Bad CRC-32"):
        list(SaevCodes(tmp_path, 400, 4).batches(3, 2))

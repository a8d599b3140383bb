"""Codes written for saev: scipy reads them, so does our own reader, and what has no room is refused
before it is written.
"""

import shutil
import tracemalloc
import zipfile
from collections import namedtuple

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.codes import Codes, Format
from assay.io.codes import saev_writer
from assay.io.codes.saev import SaevCodes
from assay.io.codes.saev_writer import (
    PROBE_ARRAYS,
    check_room,
    write_probe_metrics,
    write_token_acts,
)
from assay.numerics.codes import ComputedCodes, TensorCodes, TopKCodes, densify, sparsify


class Sparse:
    """A matrix as sparse codes, by falling magnitude and padded with entries of 0 that name the
    last feature.
    """

    format: Format = "sparse"

    def __init__(self, matrix, k=None):
        self.matrix, self.k = matrix, k
        self.n_rows, self.n_features = matrix.shape

    def batches(self, batch_size, start=0):
        for first in range(start, self.n_rows, batch_size):
            rows = self.matrix[first : first + batch_size]
            width = self.k or int((rows != 0).sum(1).max())
            batch = sparsify({"values": rows}, top_k=max(1, width))
            padding = batch["values"] == 0
            batch["indices"] = batch["indices"].masked_fill(padding, self.n_features - 1)
            yield batch


def some_codes(n_rows, n_features, density=0.3, seed=0):
    """Signed values, most of them 0."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n_rows, n_features, generator=generator)
    return values * (torch.rand(n_rows, n_features, generator=generator) < density)


def one_hot(indices, n_features):
    def stream(batch_size, start):
        for first in range(start, len(indices), batch_size):
            yield {"indices": indices[first : first + batch_size]}

    return ComputedCodes("onehot", len(indices), n_features, 1, stream)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["dense", "sparse", "top-k"]),
    st.integers(1, 30),
    st.integers(1, 12),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_scipy_and_our_reader_read_what_was_written(
    tmp_path_factory, code_format, n_rows, n_features, batch_size, density
):
    values = some_codes(n_rows, n_features, density)
    folder = tmp_path_factory.mktemp("acts")
    forms: dict[str, Codes] = {
        "dense": TensorCodes(values),
        "sparse": Sparse(values),
        "top-k": Sparse(values, k=n_features),
    }
    codes = forms[code_format]
    done = []
    entries = write_token_acts(folder, codes, batch_size=batch_size, progress=done.append)
    assert done[-1] == n_rows
    assert [path.name for path in folder.iterdir()] == ["token_acts.npz"]
    found = scipy.sparse.load_npz(folder / "token_acts.npz")
    assert isinstance(found, scipy.sparse.csr_array)
    assert (found.shape, found.dtype, found.nnz) == ((n_rows, n_features), np.float32, entries)
    assert found.has_canonical_format
    assert entries == int(values.count_nonzero())
    np.testing.assert_array_equal(found.toarray(), values.numpy())
    ours = SaevCodes(folder, n_rows, n_features)
    read = torch.cat([densify(batch, "sparse", n_features) for batch in ours.batches(7)])
    assert torch.equal(read, values)


def test_the_file_has_the_arrays_that_scipy_writes(tmp_path):
    values = some_codes(9, 5)
    write_token_acts(tmp_path, TensorCodes(values))
    scipy.sparse.save_npz(tmp_path / "theirs.npz", scipy.sparse.csr_array(values.numpy()))
    with np.load(tmp_path / "token_acts.npz") as ours, np.load(tmp_path / "theirs.npz") as theirs:
        assert set(ours.files) == set(theirs.files)
        for name in theirs.files:
            assert ours[name].dtype == theirs[name].dtype, name
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_one_hot_codes_are_ones(tmp_path):
    indices = torch.tensor([3, 0, 3, 2])
    assert write_token_acts(tmp_path, one_hot(indices, 5), batch_size=3) == 4
    found = scipy.sparse.load_npz(tmp_path / "token_acts.npz").toarray()
    np.testing.assert_array_equal(found, np.eye(5, dtype=np.float32)[indices.numpy()])


def test_the_first_entries_of_larger_codes_are_those_of_a_smaller_k(tmp_path):
    values = some_codes(20, 8, density=1.0)
    write_token_acts(tmp_path, TopKCodes(Sparse(values, k=6), 2))
    found = scipy.sparse.load_npz(tmp_path / "token_acts.npz").toarray()
    kept = values.abs() >= values.abs().sort(1, descending=True).values[:, 1:2]
    np.testing.assert_array_equal(found, torch.where(kept, values, 0.0).numpy())
    assert (found < 0).any()


def test_indices_are_int64_where_entries_cannot_be_counted_in_int32(tmp_path, monkeypatch):
    values = some_codes(20, 8)
    monkeypatch.setattr(saev_writer, "MOST_INT32", int(values.count_nonzero()) - 1)
    monkeypatch.setattr(saev_writer, "CHUNK", 20)
    write_token_acts(tmp_path, TensorCodes(values))
    with np.load(tmp_path / "token_acts.npz") as arrays:
        assert arrays["indices"].dtype == arrays["indptr"].dtype == np.int64
    found = scipy.sparse.load_npz(tmp_path / "token_acts.npz")
    np.testing.assert_array_equal(found.toarray(), values.numpy())


def test_memory_holds_a_batch_and_not_the_matrix(tmp_path):
    values = torch.ones(64, 1000)

    def stream(batch_size, start):
        for _ in range(start, 6400, batch_size):
            yield {"values": values}

    codes = ComputedCodes("dense", 6400, 1000, 1000, stream)
    tracemalloc.start()
    try:
        assert write_token_acts(tmp_path, codes, batch_size=64) == 6_400_000
        assert tracemalloc.get_traced_memory()[1] < 40e6  # the matrix takes 51 MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ({"values": [[1.0, float("nan")]], "indices": [[0, 1]]}, "rows from 0 on hold NaN"),
        ({"values": [[1.0, 2.0]], "indices": [[0, 4]]}, "name features 0 to 4, wanted 0 to 3"),
        ({"values": [[1.0, 2.0]], "indices": [[-1, 3]]}, "name features -1 to 3, wanted 0 to 3"),
        ({"values": [[1.0]] * 3, "indices": [[0]] * 3}, "hold 3 rows or more, wanted 2"),
        ({"values": [[1.0]], "indices": [[0]]}, "hold 1 rows, wanted 2"),
    ],
)
def test_codes_that_are_not_what_they_promise_are_refused(tmp_path, batch, match):
    tensors = {name: torch.tensor(value) for name, value in batch.items()}
    codes = ComputedCodes("sparse", 2, 4, None, lambda *_: iter([tensors]))
    with pytest.raises(ValueError, match=match):
        write_token_acts(tmp_path, codes)


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "open", full)
    with pytest.raises(OSError, match=r"token_acts\.npz"):
        write_token_acts(tmp_path, TensorCodes(torch.ones(2, 2)))


Usage = namedtuple("Usage", "total used free")


def test_room_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    dense = TensorCodes(torch.ones(1000, 50))
    sparse = Sparse(some_codes(1000, 50, 0.1))
    fixed = Sparse(some_codes(1000, 50), k=5)
    hot = one_hot(torch.zeros(1000, dtype=torch.int64), 50)
    needed = {
        "dense": (dense, 12 * 50_000 + 8000),
        "fixed": (fixed, 12 * 5000 + 8000),
        "one-hot": (hot, 12 * 1000 + 8000),
    }
    for name, (codes, size) in needed.items():
        monkeypatch.setattr(shutil, "disk_usage", lambda _, size=size: Usage(0, 0, size))
        check_room(tmp_path / "not/there/yet", [codes])
        monkeypatch.setattr(shutil, "disk_usage", lambda _, size=size: Usage(0, 0, size - 1))
        with pytest.raises(ValueError, match=r"features in each of 1000 tokens, take up to .* GB"):
            check_room(tmp_path / name, [codes])
    # Rows that vary are judged by some of them; the second matrix comes beside the first.
    about = 12 * 5000 + 8000
    for factor, fits in ((1.3, True), (0.7, False)):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _, size=factor * about: Usage(0, 0, int(size))
        )
        if fits:
            check_room(tmp_path, [sparse])
        else:
            with pytest.raises(ValueError, match="another disk with --out"):
                check_room(tmp_path, [sparse])
    both = 8 * 50_000 + 8000 + needed["dense"][1]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, both))
    check_room(tmp_path, [dense, dense])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, both - 1))
    with pytest.raises(ValueError, match="1e\\+05 entries, 50 of 50 features in each of 2000"):
        check_room(tmp_path, [dense, dense])
    assert list(tmp_path.iterdir()) == []


def test_probes_are_float32_by_saevs_names_and_counts_exact(tmp_path):
    arrays = {name: np.full((3, 2), number / 3) for number, name in enumerate(PROBE_ARRAYS)}
    arrays["loss"][:, 0] = np.nan
    write_probe_metrics(tmp_path, arrays)
    with np.load(tmp_path / "probe1d_metrics.npz") as found:
        assert found.files == ["loss", "weights", "biases", "tp", "fp", "tn", "fn"]
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array.astype(np.float32))
            assert found[name].dtype == np.float32
    arrays["tn"][1, 1] = 2**24 + 1
    write_probe_metrics(tmp_path, arrays)
    with np.load(tmp_path / "probe1d_metrics.npz") as found:
        assert found["tn"][1, 1] == 2**24 + 1
        assert found["loss"].dtype == np.float32


@pytest.mark.parametrize("change", [{"loss": None}, {"other": 3}, {"tp": 2}])
def test_other_names_or_shapes_of_probes_are_refused(tmp_path, change):
    sizes = dict.fromkeys(PROBE_ARRAYS, 3) | change
    arrays = {name: np.zeros((size, 2)) for name, size in sizes.items() if size is not None}
    with pytest.raises(ValueError, match="wanted loss, weights, biases, tp, fp, tn, fn of one"):
        write_probe_metrics(tmp_path, arrays)
    assert list(tmp_path.iterdir()) == []

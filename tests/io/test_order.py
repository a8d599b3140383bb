"""The orders: permutations, stretches without what is before them, and order files that are not
believed.
"""

import pickle
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.io.shards import order as module
from assay.io.shards.order import OrderFile, Shuffled


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 60),
    st.integers(1, 9),
    st.integers(1, 30),
    st.integers(0, 2**63 - 1),
    st.integers(1, 50),
)
def test_shuffled_is_a_permutation(
    n_examples: int, tokens: int, batch_size: int, seed: int, window: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WINDOW_TOKENS", window)
        patch.setattr(module, "WINDOW_BATCHES", 1)
        patch.setattr(module, "RUN_TOKENS", 4)
        order = Shuffled(n_examples, tokens, batch_size, seed)
        n = n_examples * tokens
        assert order.window % batch_size == 0 and order.window >= max(window, batch_size)
        starts = list(range(0, n, order.window))
        parts = [order.numbers(start, min(start + order.window, n)) for start in reversed(starts)]
        assert sorted(np.concatenate(parts).tolist()) == list(range(n))
        # A window holds whole runs but for those that it shares with its neighbors, and the short
        # one.
        run = min(4, tokens)
        assert all(len(np.unique(part // run)) <= order.window // run + 3 for part in parts)
        assert order.numbers(0, min(3, n)).tolist() == parts[-1][:3].tolist()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 30),
    st.integers(1, 9),
    st.integers(1, 30),
    st.integers(0, 99),
    st.integers(1, 50),
    st.data(),
)
def test_a_shuffled_sample_is_the_same_for_every_seed_and_window(
    n_examples: int, tokens: int, batch_size: int, seed: int, window: int, data: st.DataObject
) -> None:
    n = n_examples * tokens
    wanted = data.draw(st.integers(1, n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WINDOW_TOKENS", window)
        patch.setattr(module, "WINDOW_BATCHES", 1)
        patch.setattr(module, "RUN_TOKENS", 4)
        order = Shuffled(n_examples, tokens, batch_size, seed, wanted)
        assert order.n_tokens == wanted
        starts = range(0, wanted, order.window)
        found = np.concatenate(
            [order.numbers(start, min(start + order.window, wanted)) for start in starts]
        )
        assert len(np.unique(found)) == wanted
        assert found.min() >= 0 and found.max() < n
        other = Shuffled(n_examples, tokens, wanted, seed + 1, wanted)
        patch.setattr(module, "WINDOW_TOKENS", wanted)
        assert np.array_equal(np.sort(found), np.sort(other.numbers(0, wanted)))


def test_a_sample_is_drawn_from_all_over() -> None:
    """Each token is as often in a sample of half of them as any other: sampled runs are drawn
    without regard to their place.
    """
    numbers = Shuffled(4000, 64, 64, 0, 64 * 2000).numbers(0, 16_384)
    assert abs(numbers.mean() / (4000 * 64) - 0.5) < 0.05
    assert len(np.unique(numbers // 64)) > 400


def test_shuffled_permutes_uniformly() -> None:
    """Each number is as often at each place: chi-squared of 4,000 seeds over 8 x 8 cells."""
    counts = np.zeros((8, 8))
    for seed in range(4000):
        counts[np.arange(8), Shuffled(4, 2, 1, seed).numbers(0, 8)] += 1
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert chi_squared < 49 + 6 * np.sqrt(2 * 49)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[object], Path]:
    def to_file(array: Any) -> Path:
        np.save(tmp_path / "order.npy", array, allow_pickle=True)
        return tmp_path / "order.npy"

    return to_file


@pytest.mark.parametrize("chunk", [3, 2**20])
def test_order_file(save: Callable[[object], Path], chunk: int) -> None:
    wanted = np.random.default_rng(0).permutation(100)[:70]
    order = OrderFile(save(wanted), 100, at_once=chunk)
    assert (order.n_tokens, order.window) == (70, 0)
    assert order.numbers(5, 33).tolist() == wanted[5:33].tolist()
    assert (
        order.identity["order"]
        != OrderFile(save(wanted[::-1]), 100, at_once=chunk).identity["order"]
    )
    for n, found in ((0, wanted[-1]), (69, wanted[0])):
        again = wanted.copy()
        again[n] = found
        with pytest.raises(
            ValueError, match=f"has token number {found} a second time at position 69"
        ):
            OrderFile(save(again), 100, at_once=chunk)
    for wrong in (-1, 100, 2**62, -(2**62)):
        broken = wanted.copy()
        broken[8] = wrong
        with pytest.raises(
            ValueError,
            match=re.escape(f"has token number {wrong} at position 8, wanted 0 <= number < 100"),
        ):
            OrderFile(save(broken), 100, at_once=chunk)


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return open, (str(self.path), "w")


def test_what_is_no_order_file(save: Callable[[object], Path], tmp_path: Path) -> None:
    trap = Trap(tmp_path / "made")
    for array in (
        np.arange(5, dtype=np.int32),
        np.arange(5, dtype=">i8"),
        np.arange(5.0),
        np.arange(6).reshape(2, 3),
        np.array(3),
        np.array([], dtype=np.int64),
        np.array([trap, trap], dtype=object),
    ):
        with pytest.raises(
            ValueError, match=r"order\.npy .*wanted a \.npy file of a 1-D little-endian int64 array"
        ):
            OrderFile(save(array), 100)
    whole = save(np.arange(50)).read_bytes()
    for content in (
        pickle.dumps(trap),
        b"",
        b"0\n1\n2\n",
        whole[:-1],
        whole + b"\0",
        whole[:9],
        whole[:40],
        whole.replace(b"50", b"-5"),
    ):
        (tmp_path / "order.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"order\.npy .*wanted a \.npy file"):
            OrderFile(tmp_path / "order.npy", 100)
    assert not (tmp_path / "made").exists()
    with pytest.raises(ValueError, match="cannot be read as an order"):
        OrderFile(tmp_path, 100)


def npy(header: bytes, version: int = 1) -> bytes:
    """A .npy file with a header of one's own, and a number."""
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + len(header).to_bytes(2 * version, "little")
        + header
        + bytes(8)
    )


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "header",
    [
        b"[" * 9000,
        b"(" * 60_000,
        b"-" * 9000 + b"1",
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (1,), ",
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (1,), [}\n",
        b"{'descr': '<i8', 'fortran_order': False, 'shape': ([],), }\n",
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (%s,), }\n" % (b"9" * 9000),
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (9**9**9,), }\n",
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (0,), }\n",
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (999999999999999999,), }\n",
        b"{'descr': {}, 'fortran_order': False, 'shape': (1,), }\n",
        b"{'descr': [('', '<i8', (1, 1, 99999999999))], 'fortran_order': False, 'shape': (1,), }\n",
        b"{[]: 1}",
        b'"""',
        b"\0\xff",
        b"",
    ],
)
def test_a_header_is_matched_and_never_evaluated(
    tmp_path: Path, header: bytes, version: int
) -> None:
    (tmp_path / "order.npy").write_bytes(npy(header, version))
    with pytest.raises(ValueError, match=r"order\.npy .*wanted a \.npy file") as caught:
        OrderFile(tmp_path / "order.npy", 100)
    assert len(str(caught.value)) < 1000


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 70), st.integers(0, 255)), max_size=3))
def test_fuzz_of_order_files_raises_only_value_errors(changes: list[tuple[int, int]]) -> None:
    whole = bytearray(
        npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (1,), }" + b" " * 60 + b"\n")
    )
    for place, value in changes:
        whole[place] = value
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "order.npy"
        path.write_bytes(whole)
        try:
            message = f"{path} has {OrderFile(path, 100).n_tokens} token"
        except ValueError as error:
            message = str(error)
        assert str(path) in message


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_both_versions_of_the_format_are_read(tmp_path: Path, version: tuple[int, int]) -> None:
    with open(tmp_path / "order.npy", "wb") as file:
        np.lib.format.write_array(file, np.array([4, 0, 2]), version=version)
    assert OrderFile(tmp_path / "order.npy", 5).numbers(0, 3).tolist() == [4, 0, 2]


def test_an_order_file_that_changes_after_opening(save: Callable[[object], Path]) -> None:
    path = save(np.arange(50))
    order = OrderFile(path, 50)
    whole = path.read_bytes()
    path.write_bytes(whole[:-80])
    with pytest.raises(ValueError, match=r"ends at position 40, wanted 50"):
        order.numbers(30, 50)
    save(np.arange(50) + 9)
    with pytest.raises(ValueError, match="has token number 50 at position 41"):
        order.numbers(30, 50)

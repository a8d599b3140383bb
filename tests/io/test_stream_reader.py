"""The streaming reader: one order for any number of threads, resumed at any batch; errors, threads
and memory left behind.
"""

import gc
import itertools
import json
import os
import re
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.io.shards import Shards, buffers, default_threads, preadv, windows
from assay.io.shards.preadv import Pieces, read_pieces
from numbered_shards import (
    D_MODEL,
    LAYERS,
    N_TOKENS,
    TOKENS,
    numbers,
    reading_threads,
    shrink,
    write_numbered,
)
from shards import make_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return Shards(write_numbered(tmp_path_factory.mktemp("shards")))


@pytest.fixture
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many windows, many shares of a window and many calls a run, in a folder of a few tokens."""
    shrink(monkeypatch)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_threads_and_resuming_change_no_bit(shards: Shards, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["sequential", "shuffled", "file"]))
    options: dict[str, Any] = {
        "layer": data.draw(st.sampled_from(LAYERS)),
        "batch_size": data.draw(st.integers(1, 40)),
        "max_tokens": data.draw(st.none() | st.integers(1, N_TOKENS + 9)),
        "shuffle": kind == "shuffled",
        "seed": data.draw(st.integers(0, 2**63 - 1)),
    }
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        shrink(patch)
        wanted = N_TOKENS
        if kind == "file":
            order = data.draw(st.permutations(range(N_TOKENS)))[
                : data.draw(st.integers(1, N_TOKENS))
            ]
            np.save(f"{folder}/order.npy", np.array(order, dtype=np.int64))
            options["order"] = f"{folder}/order.npy"
            wanted = len(order)
        first = list(shards.batches(**options, threads=1))
        for threads in (2, 8):
            again = list(shards.batches(**options, threads=threads))
            assert [batch.tolist() for batch in again] == [batch.tolist() for batch in first]
        stop = data.draw(st.integers(0, len(first)))
        stream = shards.batches(**options, threads=data.draw(st.sampled_from([1, 2, 8])))
        head = [next(stream) for _ in range(stop)]
        cursor = json.loads(json.dumps(stream.state()))
        stream.close()
        resumed = shards.batches(
            **options, cursor=cursor, threads=data.draw(st.sampled_from([1, 2, 8]))
        )
        assert resumed.state() == cursor
        assert [batch.tolist() for batch in [*head, *resumed]] == [
            batch.tolist() for batch in first
        ]
        layer = shards.layer(options["layer"])
        held = layer.hold(layer.batches(batch_size=options["batch_size"]), "cpu")
        from_there = [*shards.batches(**options, held=held)][:stop]
        from_there += shards.batches(**options, held=held, cursor=cursor)
        assert [batch.tolist() for batch in from_there] == [batch.tolist() for batch in first]
    assert not reading_threads()
    limit = min(wanted, options["max_tokens"] or wanted)
    assert [len(batch) for batch in first[:-1]] == [options["batch_size"]] * (len(first) - 1)
    assert sum(map(len, first)) == limit
    found = numbers(first)
    assert len(set(found)) == limit
    assert all(
        (batch[:, 1] == options["layer"]).all() and (batch[:, 2] == -1).all() for batch in first
    )
    if kind == "sequential":
        assert found == list(range(limit))
    if kind == "file":
        assert found == list(order[:limit])


@pytest.mark.usefixtures("small_reads")
def test_max_tokens_is_the_beginning_of_the_whole_order(shards: Shards) -> None:
    whole = numbers(list(shards.batches(layer=4, batch_size=8)))
    assert sorted(whole) == list(range(N_TOKENS))
    for n in (1, 8, 31, N_TOKENS):
        assert numbers(list(shards.batches(layer=4, batch_size=8, max_tokens=n))) == whole[:n]


@pytest.mark.usefixtures("small_reads")
def test_max_tokens_of_a_shuffled_pass_are_one_sample_in_another_order_for_each_seed(
    shards: Shards,
) -> None:
    before: set[int] = set()
    for n in (1, 8, 31, N_TOKENS - 1, N_TOKENS):
        options: dict[str, Any] = {"layer": 4, "batch_size": 8, "shuffle": True, "max_tokens": n}
        first, second = (numbers(list(shards.batches(seed=seed, **options))) for seed in (5, 6))
        assert len(first) == len(set(first)) == n
        assert set(first) == set(second)
        assert n == 1 or first != second
        assert before <= set(first), "a smaller sample is part of a larger one"
        before = set(first)


def test_the_shuffled_order_is_settled(shards: Shards) -> None:
    """Cursors and published runs depend on it: a change here is a change of the cursor's format."""
    batch = next(shards.batches(layer=1, batch_size=8, shuffle=True, seed=0))
    assert numbers([batch]) == SETTLED
    for batch_size in (16, 64):  # divisors of the window have one order
        assert (
            numbers([next(shards.batches(layer=1, batch_size=batch_size, shuffle=True))])[:8]
            == SETTLED
        )


SETTLED = [62, 124, 47, 2, 113, 63, 69, 109]


@pytest.mark.usefixtures("small_reads")
def test_a_batch_is_the_callers_to_keep(shards: Shards) -> None:
    """Memory is used again only when no tensor, view or array of it is left."""
    kept: list[Any] = []
    copies: list[Any] = []
    for i, batch in enumerate(shards.batches(layer=1, batch_size=4, shuffle=True)):
        if i % 3 == 0:
            kept.append((batch.numpy()[0], batch, batch[1:, :1])[i // 3 % 3])
            copies.append(kept[-1].tolist())
    for found, copy in zip(kept, copies, strict=True):
        assert found.tolist() == copy


@pytest.mark.usefixtures("small_reads")
def test_memory_is_used_again(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    aligned = buffers._aligned

    def counting(shape: tuple[int, int]) -> Any:
        nonlocal made
        made += 1
        assert shape == (2, D_MODEL)
        assert aligned(shape).ctypes.data % 64 == 0
        return aligned(shape)

    monkeypatch.setattr(buffers, "_aligned", counting)
    places = {batch.data_ptr() for batch in shards.batches(layer=1, batch_size=2, shuffle=True)}
    assert len(places) <= made <= 3 * 10 + 2 < N_TOKENS // 2


@pytest.mark.usefixtures("small_reads")
def test_closing_early_stops_the_threads(shards: Shards) -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    stream = shards.batches(layer=1, batch_size=2, threads=8)
    assert not reading_threads()  # none before the first batch is asked for
    next(stream)
    assert 1 <= len(reading_threads()) <= 8
    stream.close()
    assert not reading_threads()
    stream.close()
    assert list(stream) == []
    with shards.batches(layer=1, batch_size=2, shuffle=True) as opened:
        next(opened)
    assert not reading_threads()
    next(shards.batches(layer=1, batch_size=2, shuffle=True))  # dropped
    gc.collect()
    assert not reading_threads()
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.usefixtures("small_reads")
@pytest.mark.parametrize("shuffle", [False, True])
def test_errors_in_a_reading_thread_reach_the_caller(
    shards: Shards, shuffle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def failing(descriptor: int, pieces: Pieces, offset: int) -> int:
        nonlocal calls
        calls += 1
        assert threading.current_thread() is not threading.main_thread()
        if calls == 12:
            raise OSError(5, "the disk is on fire")
        return read_pieces(descriptor, pieces, offset)

    monkeypatch.setattr(windows, "read_pieces", failing)
    stream = shards.batches(layer=1, batch_size=4, shuffle=shuffle)
    with pytest.raises(
        OSError, match=r"the disk is on fire, reading [0-9]+ bytes from byte [0-9]+ on: '.*acts"
    ) as caught:
        list(stream)
    assert caught.value.errno == 5
    assert Path(caught.value.filename).parent == shards.path
    assert not reading_threads()
    assert list(stream) == []


@pytest.mark.usefixtures("small_reads")
def test_a_file_that_goes_away(tmp_path: Path) -> None:
    shards = Shards(write_numbered(tmp_path))
    stream = shards.batches(layer=1, batch_size=4)
    (shards.path / "acts000002.bin").unlink()
    with pytest.raises(
        ValueError, match=r"acts000002\.bin cannot be opened any more: No such file"
    ):
        list(stream)
    with pytest.raises(FileNotFoundError, match=r"acts000002\.bin is missing"):
        shards.batches(layer=1, batch_size=4)


@pytest.mark.usefixtures("small_reads")
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("threads", [1, 8])
def test_the_first_nan_is_named_and_what_comes_before_it_is_given_out(
    tmp_path: Path, shuffle: bool, threads: int
) -> None:
    shards = Shards(write_numbered(tmp_path))
    sound = [batch.clone() for batch in shards.batches(layer=4, batch_size=4, shuffle=shuffle)]
    place = next(i for i, batch in enumerate(sound) if 77 in numbers([batch]))
    path, offset = shards.layer_bytes(4).place(77)
    with open(path, "r+b") as file:
        file.seek(offset + 8)
        file.write(np.float32(np.nan).tobytes())
    stream = shards.batches(layer=4, batch_size=4, shuffle=shuffle, threads=threads)
    for batch in sound[:place]:
        assert torch.equal(next(stream), batch)
    with pytest.raises(
        ValueError, match=r"acts000002\.bin: NaN .* example 12, content token 5, layer 4;"
    ):
        next(stream)


def test_large_finite_numbers_are_no_infinity(tmp_path: Path) -> None:
    shards = Shards(write_numbered(tmp_path))
    path, offset = shards.layer_bytes(4).place(77)
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(np.full(3, np.finfo(np.float32).max).tobytes())
    assert sum(map(len, shards.batches(layer=4, batch_size=50))) == N_TOKENS


def test_options_are_checked_at_the_call(shards: Shards, tmp_path: Path) -> None:
    for options, message in (
        ({"threads": 0}, "threads is 0, wanted 1 to 64"),
        ({"threads": 65}, "threads is 65"),
        ({"max_tokens": 0}, "max_tokens is 0, wanted at least 1"),
        ({"shuffle": True, "order": "x.npy"}, "shuffle is set and so is the order file x.npy"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            shards.batches(layer=1, batch_size=4, **options)
    with pytest.raises(FileNotFoundError, match=r"order file .*x\.npy is missing"):
        shards.batches(layer=1, batch_size=4, order=tmp_path / "x.npy")


def test_a_cursor_of_another_pass_is_refused_by_name(shards: Shards, tmp_path: Path) -> None:
    def save(name: str, order: npt.NDArray[np.int64]) -> Path:
        np.save(tmp_path / name, order)
        return tmp_path / name

    one, other = save("one.npy", np.arange(9)), save("other.npy", np.arange(9)[::-1].copy())
    base: dict[str, Any] = {"layer": 1, "batch_size": 4, "shuffle": True, "seed": 3}
    cursor = shards.batches(**base).state()
    for change, name in (
        ({"layer": 4}, "layer is 1, this pass's is 4"),
        ({"batch_size": 5}, "batch_size is 4, this pass's is 5"),
        ({"seed": 4}, "seed is 3, this pass's is 4"),
        ({"shuffle": False}, "seed is 3, this pass's is None"),
        ({"shuffle": False, "order": one}, "seed is 3"),
        ({"max_tokens": 40}, "max_tokens is None, this pass's is 40"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"the cursor's {name}")):
            shards.batches(**{**base, **change}, cursor=cursor)
    given_order = shards.batches(layer=1, batch_size=4, order=one).state()
    with pytest.raises(ValueError, match="the cursor's order is"):
        shards.batches(layer=1, batch_size=4, order=other, cursor=given_order)
    elsewhere = Shards(write_numbered(tmp_path, dataset="other"))
    with pytest.raises(
        ValueError,
        match=f"the cursor's folder is '{shards.name}', this pass's is '{elsewhere.name}'",
    ):
        elsewhere.batches(**base, cursor=cursor)
    touched = Shards(write_numbered(tmp_path))
    first = touched.path / "acts000000.bin"
    first.write_bytes(b"\x01" + first.read_bytes()[1:])
    with pytest.raises(ValueError, match="the cursor's fingerprint is"):
        touched.batches(**base, cursor=cursor)

    def edit(**changes: object) -> dict[str, Any]:
        return {**cursor, **changes}

    broken_ones: tuple[Any, ...] = (
        {},
        edit(more=1),
        edit(batch=True),
        edit(batch=-1),
        edit(batch=36),
        edit(batch=1.0),
        edit(layer=1.0),
        [1],
    )
    for broken in broken_ones:
        with pytest.raises(ValueError, match="cursor"):
            shards.batches(**base, cursor=broken)
    assert list(shards.batches(**base, cursor=edit(batch=35))) == []


def test_a_resumed_pass_reads_only_what_is_left(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    read = 0

    def counting(descriptor: int, pieces: Pieces, offset: int) -> int:
        nonlocal read
        read += int(pieces[:, 1].sum())
        return read_pieces(descriptor, pieces, offset)

    monkeypatch.setattr(windows, "read_pieces", counting)
    stream = shards.batches(layer=1, batch_size=4, shuffle=True)
    for _ in range(7):
        next(stream)
    cursor = stream.state()
    stream.close()
    read = 0
    assert (
        sum(map(len, shards.batches(layer=1, batch_size=4, shuffle=True, cursor=cursor)))
        == N_TOKENS - 28
    )
    assert read == (N_TOKENS - 28) * D_MODEL * 4


def test_only_a_whole_layer_can_be_held(shards: Shards) -> None:
    with pytest.raises(
        ValueError, match=r"held is \(5, 3\), wanted all of the layer, \(138, 3\): pass what hold"
    ):
        shards.batches(layer=1, batch_size=4, held=torch.zeros(5, 3))


@pytest.mark.parametrize(("processors", "threads"), [(1, 2), (2, 2), (8, 4), (16, 8), (128, 8)])
def test_half_the_processors_read(
    monkeypatch: pytest.MonkeyPatch, processors: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(processors), raising=False)
    assert default_threads() == threads
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    assert default_threads() == threads


@pytest.mark.gpu
@pytest.mark.usefixtures("small_reads")
@pytest.mark.parametrize("shuffle", [False, True])
def test_on_cuda_the_batches_are_the_same(shards: Shards, shuffle: bool) -> None:
    wanted = list(shards.batches(layer=1, batch_size=4, shuffle=shuffle))
    found = list(shards.batches(layer=1, batch_size=4, shuffle=shuffle, device="cuda"))
    assert all(batch.is_cuda for batch in found)
    assert [batch.tolist() for batch in found] == [batch.tolist() for batch in wanted]
    layer = shards.layer(1)
    held = layer.hold(layer.batches(batch_size=7, device="cuda"), "cuda")
    again = list(shards.batches(layer=1, batch_size=4, shuffle=shuffle, held=held))
    assert [batch.tolist() for batch in again] == [batch.tolist() for batch in wanted]


@pytest.mark.gpu
@pytest.mark.usefixtures("small_reads")
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_on_cuda_a_wrong_number_is_named_at_its_batch(
    tmp_path: Path, shuffle: bool, value: float
) -> None:
    path = write_numbered(tmp_path)
    options: dict[str, Any] = {"layer": 4, "batch_size": 5, "shuffle": shuffle}
    whole = numbers(list(Shards(path).batches(**options)))
    wrong = whole[40]
    example, token = divmod(wrong, TOKENS)
    with open(path / f"acts{example // 5:06d}.bin", "r+b") as file:
        file.seek(
            4 * D_MODEL * ((example % 5 * len(LAYERS) + LAYERS.index(4)) * (TOKENS + 1) + 1 + token)
            + 4
        )
        file.write(np.float32(value).tobytes())
    batches = Shards(path).batches(**options, device="cuda")
    assert numbers([next(batches) for _ in range(8)]) == whole[:40]
    with pytest.raises(
        ValueError, match=rf"NaN or infinity in example {example}, content token {token}, layer 4"
    ):
        next(batches)
    assert not reading_threads()


@pytest.mark.gpu
@pytest.mark.usefixtures("small_reads")
def test_on_cuda_what_fails_ahead_is_raised_in_its_turn(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, begun = windows._begin, []

    def begin(*given: Any) -> Any:
        begun.append(given)
        if len(begun) == 3:
            raise OSError("the disk is gone")
        return real(*given)

    monkeypatch.setattr(windows, "_begin", begin)
    batches = shards.batches(layer=1, batch_size=4, shuffle=True, device="cuda")
    found = list(itertools.islice(batches, 5))
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert len(found) == 5, "those of the first window"
    assert not reading_threads()


@pytest.mark.gpu
@pytest.mark.usefixtures("small_reads")
def test_on_cuda_a_pass_can_be_left_anywhere(shards: Shards) -> None:
    whole = list(shards.batches(layer=1, batch_size=4, device="cuda"))
    for stop in range(0, len(whole), 5):
        batches = shards.batches(layer=1, batch_size=4, device="cuda")
        head = [next(batches) for _ in range(stop)]
        cursor = batches.state()
        batches.close()
        assert not reading_threads()
        rest = list(shards.batches(layer=1, batch_size=4, device="cuda", cursor=cursor))
        assert numbers([*head, *rest]) == numbers(whole)


def test_pythons_preadv_reads_the_same_where_the_c_library_has_none(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [batch.clone() for batch in shards.batches(layer=1, batch_size=3, shuffle=True)]
    monkeypatch.setattr(preadv, "_LIBC", None)
    found = list(shards.batches(layer=1, batch_size=3, shuffle=True))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_memory_that_anything_still_holds_is_not_used_again() -> None:
    memory = buffers.Buffers(2, D_MODEL, torch.device("cpu"), most=4)
    batch = memory.take(2)
    place, view = batch.data_ptr(), batch[1:].numpy()
    del batch
    assert memory.take(2).data_ptr() != place
    del view
    assert memory.take(2).data_ptr() == place


def test_letting_a_batch_go_runs_no_code_in_which_a_signal_could_be_lost() -> None:
    """What a signal's handler raises within a finalizer is printed and forgotten: a fit would go on
    after its SIGTERM.
    """
    memory = buffers.Buffers(2, D_MODEL, torch.device("cpu"), most=4)
    batch, called = memory.take(2), []
    sys.setprofile(
        lambda frame, event, _: called.append(frame.f_code.co_name) if event == "call" else None
    )
    try:
        del batch
    finally:
        sys.setprofile(None)
    assert called == []


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Two windows of 16,384 tokens of 8 numbers, in 128 examples."""
    examples = np.random.default_rng(0).standard_normal((128, 1, 257, 8)).astype(np.float32)
    folder = tmp_path_factory.mktemp("wide")
    return Shards(make_shards(folder, examples, layers=[3], max_tokens_per_shard=20 * 257))


@pytest.mark.parametrize("threads", [2, 16, 64])
def test_all_threads_read_at_once_and_however_slowly_it_is_the_same_bits(
    wide: Shards, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that is far away, whose answers come when all have asked."""
    options: dict[str, Any] = {"layer": 3, "batch_size": 8192, "shuffle": True}
    wanted = list(wide.batches(**options, threads=1))
    monkeypatch.setattr(windows, "LEAST_BYTES", 32 * 8 * 4)  # as at the paper's width
    all_have_asked = threading.Barrier(threads)
    calls = itertools.count()

    def waiting(descriptor: int, pieces: Pieces, offset: int) -> int:
        if next(calls) < threads:
            all_have_asked.wait(timeout=60)
        return read_pieces(descriptor, pieces, offset)

    monkeypatch.setattr(windows, "read_pieces", waiting)
    found = list(wide.batches(**options, threads=threads))
    assert [batch.tolist() for batch in found] == [batch.tolist() for batch in wanted]


@pytest.mark.parametrize("threads", [2, 16, 64])
def test_more_threads_ask_for_no_more_reads(
    wide: Shards, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each has of a window is cut between runs."""
    monkeypatch.setattr(windows, "LEAST_BYTES", 32 * 8 * 4)
    monkeypatch.setattr(windows, "READ_BYTES", 2**30)
    reads = []

    def counting(descriptor: int, pieces: Pieces, offset: int) -> int:
        reads.append(read_pieces(descriptor, pieces, offset))
        return reads[-1]

    monkeypatch.setattr(windows, "read_pieces", counting)
    list(wide.batches(layer=3, batch_size=8192, shuffle=True, threads=threads))
    assert len(reads) <= 2 * 512
    assert sum(reads) == wide.n_tokens * 8 * 4


def test_the_folders_threads_are_those_of_a_pass_that_asks_for_no_others(
    wide: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        windows,
        "ThreadPoolExecutor",
        lambda n, **options: (asked.append(n), ThreadPoolExecutor(n, **options))[1],
    )
    shards = Shards(wide.path, threads=5)
    next(shards.batches(layer=3, batch_size=64))
    next(shards.batches(layer=3, batch_size=64, threads=3))
    next(shards.layer(3).share(0, 2, batch_size=64))
    next(wide.batches(layer=3, batch_size=64))
    assert asked == [5, 3, 5, default_threads()]
    with pytest.raises(ValueError, match="threads is 65, wanted 1 to 64"):
        Shards(wide.path, threads=65).batches(layer=3, batch_size=64)

"""A pass shared between processes: every token of a window is one rank's, read by whole runs."""

import itertools
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch as patched

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.io.shards import Shards, shares, windows
from assay.io.shards.preadv import Pieces, read_pieces
from numbered_shards import LAYERS, N_TOKENS, reading_threads, shrink, write_numbered
from shards import make_shards


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return Shards(write_numbered(tmp_path_factory.mktemp("shards")))


def joined(layer: Any, ranks: int, **options: Any) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """The tokens of all ranks in their order, and the windows' places and sizes."""
    every = [list(layer.share(rank, ranks, **options)) for rank in range(ranks)]
    found, places = [], []
    for window in zip(*every, strict=True):
        assert len({(share.start, share.size) for share in window}) == 1
        tokens = torch.full((window[0].size, layer.d_model), -7.0)
        seen = torch.zeros(window[0].size, dtype=torch.int64)
        for share in window:
            assert share.positions.dtype == torch.int64
            assert share.tokens.dtype == torch.float32
            tokens[share.positions] = share.tokens
            seen[share.positions] += 1
        assert (seen == 1).all(), "each token once"
        found.append(tokens)
        places.append((window[0].start, window[0].size))
    return torch.cat(found), places


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_the_shares_of_all_ranks_are_the_pass(small: Shards, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["sequential", "shuffled", "file"]))
    batch_size = data.draw(st.integers(1, 40))
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "max_tokens": data.draw(st.none() | st.integers(1, N_TOKENS + 9)),
        "shuffle": kind == "shuffled",
        "seed": data.draw(st.integers(0, 9)),
    }
    layer = small.layer(data.draw(st.sampled_from(LAYERS)))
    ranks = data.draw(st.integers(1, 9))
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        shrink(patch)
        if kind == "file":
            order = data.draw(st.permutations(range(N_TOKENS)))
            np.save(f"{folder}/order.npy", np.array(order, dtype=np.int64))
            options["order"] = f"{folder}/order.npy"
        batches = list(layer.batches(**options))
        first = data.draw(st.integers(0, len(batches) - 1))
        start = first * batch_size
        threads = data.draw(st.sampled_from([1, 2, 8]))
        tokens, places = joined(layer, ranks, start=start, threads=threads, **options)
    assert torch.equal(tokens, torch.cat(batches[first:]))
    assert places[0][0] == start
    assert all(place % batch_size == 0 for place, _ in places)
    for (place, size), (following, _) in itertools.pairwise(places):
        assert place + size == following
    assert not reading_threads()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """160 examples of 256 tokens of 8 numbers: a window of 16,384 tokens has 512 runs of 32."""
    rng = np.random.default_rng(0)
    examples = rng.standard_normal((160, 1, 257, 8)).astype(np.float32)
    folder = tmp_path_factory.mktemp("wide")
    return Shards(make_shards(folder, examples, layers=[3], max_tokens_per_shard=20 * 257))


def test_a_share_is_of_whole_runs(wide: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 reads of 32 tokens or more, 128 KiB at the paper's width; rows of the window would be
    some 1,800 reads.
    """
    reads: list[int] = []

    def counting(descriptor: int, pieces: Pieces, offset: int) -> int:
        reads.append(read_pieces(descriptor, pieces, offset))
        return reads[-1]

    monkeypatch.setattr(windows, "read_pieces", counting)
    for rank in range(8):
        del reads[:]
        options: dict[str, Any] = {"batch_size": 8192, "shuffle": True, "max_tokens": 32_768}
        (share, _) = list(wide.layer(3).share(rank, 8, **options))
        assert share.size == 16_384
        assert abs(len(share.tokens) - 2048) <= 32
        run = 32 * 8 * 4
        assert abs(sum(reads) - 2 * 64 * run) <= 2 * run
        assert len(reads) <= 2 * 65
        assert min(reads) >= run
    source = wide.layer_bytes(3)
    numbers = np.random.default_rng(0).permutation(16_384)
    whole = shares.share_of(source, numbers, 0, 1)
    assert numbers[whole].tolist() == list(range(16_384)), "in the order on disk"


def test_a_rank_that_has_nothing_of_a_window_says_so(wide: Shards) -> None:
    """Of one run there are no two halves."""
    layer = wide.layer(3)
    options: dict[str, Any] = {"batch_size": 32, "max_tokens": 96}
    with patched.object(windows, "READ_BYTES", 32 * 8 * 4):
        found = [list(layer.share(rank, 4, **options)) for rank in range(4)]
    lengths = [[len(share.tokens) for share in rank] for rank in found]
    assert sorted(map(tuple, lengths)) == [(0, 0, 0)] * 3 + [(32, 32, 32)]
    assert all(share.tokens.shape[1:] == (8,) for rank in found for share in rank)


def test_a_nan_is_named_by_the_rank_that_reads_it(tmp_path: Path) -> None:
    shards = Shards(write_numbered(tmp_path))
    path, offset = shards.layer_bytes(4).place(77)
    with open(path, "r+b") as file:
        file.seek(offset + 8)
        file.write(np.float32(np.nan).tobytes())
    mine = [
        list(Shards(path.parent).layer(1).share(rank, 3, batch_size=4, shuffle=True))
        for rank in range(3)
    ]
    reader = [(77 in [int(n) for share in rank for n in share.tokens[:, 0]]) for rank in mine]
    assert sum(reader) == 1
    for rank, reads_it in enumerate(reader):
        stream = shards.layer(4).share(rank, 3, batch_size=4, shuffle=True)
        if reads_it:
            with pytest.raises(ValueError, match="NaN or infinity in example 12, content token 5"):
                list(stream)
        else:
            list(stream)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 2}, "found rank 2 of 2, wanted 0 to 1"),
        ({"rank": -1}, "found rank -1 of 2"),
        ({"start": 5}, "start is 5, wanted a multiple of the batch size, 4"),
        ({"start": -4}, "start is -4"),
        ({"held": torch.zeros(1)}, "found held, wanted none of it"),
        ({"threads": 65}, "threads is 65, wanted 1 to 64"),
        ({"max_tokens": 0}, "max_tokens is 0"),
    ],
    ids=str,
)
def test_what_cannot_be_a_share_is_refused(
    small: Shards, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        small.layer(1).share(**{"rank": 0, "ranks": 2, "batch_size": 4, **given})


def test_closing_early_stops_the_threads(small: Shards) -> None:
    stream = small.layer(1).share(0, 2, batch_size=2)
    assert not reading_threads()
    next(stream)
    stream.close()
    assert not reading_threads()
    assert list(stream) == []

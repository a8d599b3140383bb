"""Shards: round trips, what is read and in what order, and changes after opening."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.io.shards import LayerActivations, Shards, windows, write_shards
from assay.io.shards import order as module
from assay.io.shards.metadata import Metadata
from assay.io.shards.preadv import Pieces, read_pieces
from shards import (
    FIELDS,
    OLD_NAMES,
    content,
    edit_json,
    make_examples,
    make_labeled,
    make_labels,
    make_metadata,
    make_shards,
)


def rows(array: npt.NDArray[np.float32] | torch.Tensor) -> list[tuple[float, ...]]:
    return [tuple(row) for row in array.tolist()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_labeled(tmp_path)


@st.composite
def recordings(draw: st.DrawFn) -> tuple[Metadata, npt.NDArray[np.float32]]:
    layers = draw(st.lists(st.integers(-3, 30), min_size=1, max_size=3, unique=True))
    cls_token, patches = draw(st.booleans()), draw(st.integers(1, 5))
    budget = (patches + cls_token) * len(layers) * draw(st.integers(1, 4)) + draw(
        st.integers(0, len(layers))
    )
    metadata = make_metadata(
        layers=layers,
        content_tokens_per_example=patches,
        cls_token=cls_token,
        d_model=draw(st.integers(1, 4)),
        n_examples=draw(st.integers(1, 9)),
        max_tokens_per_shard=budget,
    )
    return metadata, make_examples(metadata, draw(st.integers(0, 99)))


@settings(deadline=None, max_examples=40)
@given(recordings(), st.integers(1, 50), st.booleans(), st.booleans(), st.data())
def test_round_trip(
    recording: tuple[Metadata, npt.NDArray[np.float32]],
    batch_size: int,
    cut: bool,
    with_labels: bool,
    data: st.DataObject,
) -> None:
    metadata, examples = recording
    splits = sorted(data.draw(st.lists(st.integers(0, len(examples)), max_size=3)))
    parts = np.split(examples, splits)
    labels = make_labels(metadata) if with_labels else None
    with tempfile.TemporaryDirectory() as root:
        path = write_shards(root, metadata, (torch.from_numpy(part) for part in parts), labels)
        index = json.loads((path / "shards.json").read_text())
        files = [path / entry["name"] for entry in index]
        full = metadata.examples_per_shard * metadata.example_bytes
        n_files = metadata.n_examples // metadata.examples_per_shard + 1
        assert [file.stat().st_size for file in files] == [full] * n_files
        assert b"".join(file.read_bytes() for file in files).rstrip(
            b"\0"
        ) == examples.tobytes().rstrip(b"\0")
        assert list(Path(root).iterdir()) == [path]
        assert path.name == metadata.hash
        if cut:
            os.truncate(files[-1], index[-1]["n_examples"] * metadata.example_bytes)
        renamed = {
            data.draw(st.sampled_from([key, *OLD_NAMES.get(key, [])])): key for key in FIELDS
        }
        edit_json(
            path / "metadata.json", lambda old: {new: old[key] for new, key in renamed.items()}
        )

        shards = Shards(path)
        assert shards.metadata == metadata
        assert (shards.name, shards.layers, shards.d_model) == (
            path.name,
            metadata.layers,
            metadata.d_model,
        )
        assert (shards.n_examples, shards.has_labels) == (len(examples), with_labels)
        assert shards.n_tokens == len(examples) * metadata.content_tokens_per_example
        for layer in metadata.layers:
            batches = list(shards.batches(layer=layer, batch_size=batch_size))
            assert all(len(batch) == batch_size for batch in batches[:-1])
            assert all(batch.dtype == torch.float32 for batch in batches)
            np.testing.assert_array_equal(
                torch.cat(batches), content(examples, metadata, layer), strict=False
            )
        if labels is not None:
            assert shards.labels().dtype == torch.int64
            assert shards.labels().tolist() == labels.ravel().tolist()


def test_exact_fill_leaves_an_empty_shard_and_padding_is_never_read(tmp_path: Path) -> None:
    path = make_shards(tmp_path, n_examples=4)
    entries = json.loads((path / "shards.json").read_text())
    assert [(entry["name"], entry["n_examples"]) for entry in entries] == [
        ("acts000000.bin", 2),
        ("acts000001.bin", 2),
        ("acts000002.bin", 0),
    ]
    assert not any((path / "acts000002.bin").read_bytes())
    (path / "acts000002.bin").write_bytes(b"\xff" * 2 * make_metadata().example_bytes)
    assert sum(map(len, Shards(path).batches(layer=3, batch_size=5))) == 12


def test_arguments_are_checked_at_the_call(folder: Path) -> None:
    shards = Shards(folder)
    with pytest.raises(ValueError, match=re.escape("layer 4 is not in") + r".*\[3, 5\]"):
        shards.batches(layer=4, batch_size=2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        shards.batches(layer=3, batch_size=0)
    with pytest.raises(ValueError, match="seed is -1"):
        shards.layer(3).batches(batch_size=2, shuffle=True, seed=-1)
    (folder / "labels.bin").unlink()
    assert not Shards(folder).has_labels
    with pytest.raises(FileNotFoundError, match=r"has no labels\.bin"):
        Shards(folder).labels()


def test_handle_and_repr(folder: Path) -> None:
    shards = Shards(folder)
    handle = shards.layer(5)
    assert handle == LayerActivations(shards, 5)
    assert (handle.n_tokens, handle.d_model) == (15, 2)
    assert (
        repr(shards)
        == f"Shards({folder.name}: fake/tiny, layers [3, 5], 5 examples x 3 tokens x 2, labels)"
    )


@pytest.mark.parametrize("layer", [3, 5])
@pytest.mark.parametrize("shuffle", [False, True])
def test_only_the_asked_layer_is_read(
    folder: Path, layer: int, shuffle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []

    def noting(descriptor: int, pieces: Pieces, offset: int) -> int:
        read.append((offset, int(pieces[:, 1].sum())))
        return read_pieces(descriptor, pieces, offset)

    monkeypatch.setattr(windows, "read_pieces", noting)
    shards = Shards(folder)
    assert read == []
    assert sum(map(len, shards.batches(layer=layer, batch_size=2, shuffle=shuffle))) == 15
    token, tokens = 8, 4  # bytes of a token; tokens of an example in a layer, the CLS token first
    assert sum(n for _, n in read) == 15 * token
    for offset, n in read:
        assert offset // (tokens * token) % 2 == (3, 5).index(layer)
        assert tokens * token - offset % (tokens * token) >= n
        assert offset % (tokens * token) >= token


def test_reads_that_come_in_pieces_are_put_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        windows,
        "read_pieces",
        lambda fd, pieces, offset: read_pieces(
            fd, np.minimum(pieces[:1], np.array([2**64 - 1, 5], np.uintp)), offset
        ),
    )
    read = torch.cat(list(Shards(folder).batches(layer=5, batch_size=4)))
    np.testing.assert_array_equal(read, content(make_examples(make_metadata()), make_metadata(), 5))


@settings(deadline=None, max_examples=40)
@given(recordings(), st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**63 - 1))
def test_shuffle_gives_every_token_once_and_depends_on_the_seed_alone(
    recording: tuple[Metadata, npt.NDArray[np.float32]], batch_size: int, pool: int, seed: int
) -> None:
    metadata, examples = recording
    layer = metadata.layers[-1]
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WINDOW_TOKENS", pool)
        patch.setattr(module, "WINDOW_BATCHES", 1)
        shards = Shards(write_shards(root, metadata, [examples]))
        torch.manual_seed(0)
        first = list(shards.batches(layer=layer, batch_size=batch_size, shuffle=True, seed=seed))
        assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(0))
        again = list(shards.batches(layer=layer, batch_size=batch_size, shuffle=True, seed=seed))
    assert [rows(batch) for batch in first] == [rows(batch) for batch in again]
    assert [len(batch) for batch in first[:-1]] == [batch_size] * (len(first) - 1)
    assert 1 <= len(first[-1]) <= batch_size
    assert sorted(rows(torch.cat(first))) == sorted(rows(content(examples, metadata, layer)))


@pytest.fixture
def numbered(tmp_path: Path) -> Shards:
    """400 examples of 16 tokens, 10 a shard; a token is (example, its number in the example)."""
    tokens = np.indices((400, 1, 16)).astype(np.float32)
    examples = np.stack([tokens[0], tokens[2]], axis=-1)
    return Shards(
        make_shards(tmp_path, examples, layers=[0], cls_token=False, max_tokens_per_shard=160)
    )


@pytest.mark.parametrize("pool", [256, 65_536])
def test_shuffled_batches_are_mixed(
    numbered: Shards, pool: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WINDOW_TOKENS", pool)
    monkeypatch.setattr(module, "WINDOW_BATCHES", 4)
    batches = list(numbered.batches(layer=0, batch_size=64, shuffle=True, seed=3))
    per_batch = [len(np.unique(batch[:, 0])) for batch in batches]
    shards_per_batch = [len(np.unique(batch[:, 0] // 10)) for batch in batches]
    assert len(batches) == 100
    # In order, 4; of the 16 or 400 in the pool.
    assert np.mean(per_batch) > (14 if pool == 256 else 50)
    assert np.mean(shards_per_batch) > (11 if pool == 256 else 28)  # in order, 1; of 40
    other = torch.cat(list(numbered.batches(layer=0, batch_size=64, shuffle=True, seed=4)))
    assert (torch.cat(batches) == other).all(dim=1).float().mean() < 0.05
    # Early and late batches see the whole data, and a token's place tells nothing of its number in
    # the example.
    stream = torch.cat(batches)
    assert abs(stream[:3200, 0].mean() - 199.5) < 15
    assert abs(torch.corrcoef(torch.stack([torch.arange(6400.0), stream[:, 1]]))[0, 1]) < 0.1


def test_shuffle_holds_two_windows_at_the_most(
    numbered: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WINDOW_TOKENS", 200)
    monkeypatch.setattr(module, "WINDOW_BATCHES", 2)
    n_read = 0

    def noting(descriptor: int, pieces: Pieces, offset: int) -> int:
        nonlocal n_read
        n_read += int(pieces[:, 1].sum()) // 8
        return read_pieces(descriptor, pieces, offset)

    monkeypatch.setattr(windows, "read_pieces", noting)
    given_out = 0
    for batch in numbered.batches(layer=0, batch_size=48, shuffle=True, threads=1):
        assert n_read - given_out <= 2 * 240  # 200 tokens, rounded up to whole batches
        given_out += len(batch)
    assert given_out == n_read == 6400


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused_by_place(folder: Path, value: float) -> None:
    metadata = make_metadata()
    array = np.fromfile(folder / "acts000001.bin", dtype="<f4").reshape(2, *metadata.example_shape)
    array[1, 1, 0] = value  # the CLS token is not read
    array[1, 1, 2:] = value
    array.tofile(folder / "acts000001.bin")
    shards = Shards(folder)
    list(shards.batches(layer=3, batch_size=4))
    for shuffle in (False, True):
        with pytest.raises(
            ValueError, match=r"acts000001.bin: .* example 3, content token 1, layer 5"
        ):
            list(shards.batches(layer=5, batch_size=15, shuffle=shuffle))


def test_file_that_shrinks_after_opening(folder: Path) -> None:
    shards = Shards(folder)
    os.truncate(folder / "acts000001.bin", 100)
    os.truncate(folder / "labels.bin", 3)
    batches = shards.batches(layer=5, batch_size=3)
    with pytest.raises(ValueError, match=r"acts000001\.bin has 100 bytes, wanted at least 128"):
        list(batches)
    with pytest.raises(ValueError, match=r"labels\.bin has 3 bytes, wanted 15"):
        shards.labels()


def test_fingerprint_follows_names_sizes_and_content(folder: Path) -> None:
    known = Shards(folder).fingerprint()

    def changed() -> bool:
        nonlocal known
        before, known = known, Shards(folder).fingerprint()
        return known != before

    assert re.fullmatch("[0-9a-f]{64}", known)
    assert not changed()
    for name in ("acts000001.bin", "labels.bin"):
        raw = bytearray((folder / name).read_bytes())
        raw[-1] ^= 1
        (folder / name).write_bytes(raw)
        assert changed()
    edit_json(folder / "metadata.json", lambda raw: raw.update(dataset="other"))
    assert changed()
    edit_json(folder / "shards.json", lambda raw: [{**entry, "extra": 1} for entry in raw])
    assert changed()
    os.truncate(folder / "acts000002.bin", 64)
    assert changed()
    os.truncate(folder / "acts000002.bin", 128)
    assert changed()
    folder = folder.rename(folder.parent / "other")
    assert changed()


def test_a_copy_has_the_same_fingerprint_whatever_its_times_and_a_cursor_goes_on_in_it(
    folder: Path, tmp_path: Path
) -> None:
    copy = Path(
        shutil.copytree(folder, tmp_path / "scratch" / folder.name, copy_function=shutil.copyfile)
    )
    for path in copy.iterdir():
        os.utime(path, ns=(0, 12345))
    assert Shards(copy).fingerprint() == Shards(folder).fingerprint()
    with Shards(folder).batches(layer=5, batch_size=3) as batches:
        next(batches)
        wanted, cursor = next(batches), {**batches.state(), "batch": 1}
    (copy / "labels.bin").write_bytes(bytes(15))  # which no fit looks at
    assert torch.equal(next(Shards(copy).batches(layer=5, batch_size=3, cursor=cursor)), wanted)


def test_another_recording_of_the_same_sizes_has_another_fingerprint_though_little_of_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    pread = os.pread

    def count(descriptor: int, size: int, start: int) -> bytes:
        read.append(size)
        return pread(descriptor, size, start)

    monkeypatch.setattr("assay.io.sampling.os.pread", count)
    monkeypatch.setattr("assay.io.sampling.FOLDER_BYTES", 96)
    monkeypatch.setattr("assay.io.sampling.PAGE", 8)
    known = Shards(folder).identity()
    assert sum(read) <= 96
    file = folder / "acts000001.bin"
    np.random.default_rng(1).normal(size=file.stat().st_size // 4).astype("<f4").tofile(file)
    found = Shards(folder).identity()
    assert {name for name in known if known[name] != found[name]} == {"content"}
    assert sum(read) <= 96 + 32

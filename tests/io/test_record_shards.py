"""Recording shard by shard: the bytes are those of `write_shards`, and nothing that is whole is lost
or made twice.
"""

import json
import os
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from kedro.io import DatasetError

from assay.io.datasets import ShardsDataset, find_shards
from assay.io.publish import discard_partials, resumable_folder
from assay.io.shards import Shards, recording, write_shards
from assay.io.shards.metadata import Metadata
from assay.io.shards.pieces import OpenPiece
from assay.io.shards.recording import ImageBatch, forget_recording, record_shards
from shards import make_examples, make_metadata

PER_SHARD = 3
"""Examples in a shard: 24 tokens in 2 layers of 4."""


class MadeSource:
    """Examples of chosen contents, in batches of two of which the second comes first."""

    def __init__(
        self,
        contents: Sequence[int],
        *,
        key: str = "model",
        most_label: int = 255,
        spoil: Callable[[ImageBatch], ImageBatch] = lambda batch: batch,
        **changes: Any,
    ) -> None:
        self.contents = list(contents)
        self.metadata = make_metadata(
            n_examples=len(self.contents), max_tokens_per_shard=8 * PER_SHARD + 7, **changes
        )
        self.key = key
        self.most_label = most_label
        self.labeled = most_label > 0
        self.spoil = spoil
        self.made: list[int] = []

    def digest(self, first: int, stop: int) -> str:
        return json.dumps(self.contents[first:stop])

    def name(self, example: int) -> str:
        return f"{self.contents[example]}.jpg"

    def array(self, example: int) -> npt.NDArray[np.float32]:
        own = make_metadata(n_examples=1)
        return make_examples(own, seed=self.contents[example])[0]

    def label(self, example: int) -> npt.NDArray[np.uint16]:
        rng = np.random.default_rng(self.contents[example])
        return np.append(rng.integers(0, self.most_label, 2), self.most_label).astype(np.uint16)

    def batches(self, spans: Sequence[tuple[int, int]]) -> Generator[ImageBatch]:
        for first, stop in spans:
            for examples in ([*range(first + 1, stop)], [first]):
                if examples:
                    self.made += examples
                    yield self.spoil(self.batch(examples))

    def batch(self, examples: list[int]) -> ImageBatch:
        return ImageBatch(
            examples,
            torch.from_numpy(np.stack([self.array(example) for example in examples])),
            np.stack([self.label(example) for example in examples]) if self.most_label else None,
        )


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def written(root: Path, source: MadeSource) -> dict[str, bytes]:
    """The files that `write_shards` makes of the same."""
    numbers = range(len(source.contents))
    labels = np.stack([source.label(number) for number in numbers]) if source.most_label else None
    if labels is not None and source.most_label < 256:
        labels = labels.astype(np.uint8)
    examples = [np.stack([source.array(number) for number in numbers])]
    return tree(write_shards(root, source.metadata, examples, labels).parent)


@pytest.mark.parametrize("n_examples", [1, 5, 6])
@pytest.mark.parametrize("most_label", [0, 255, 256])
def test_the_files_are_those_of_the_other_writer(tmp_path, n_examples, most_label):
    source = MadeSource(range(n_examples), most_label=most_label)
    path = record_shards(tmp_path / "made" / "here", source)
    assert path == tmp_path / "made" / "here" / source.metadata.hash
    assert tree(path.parent) == written(tmp_path / "wanted", source)
    assert os.listdir(tmp_path / "made") == ["here"]
    assert Shards(path).n_examples == n_examples


def failing_at(batch: int, error: BaseException) -> Callable[[ImageBatch], ImageBatch]:
    """Raise instead of giving the batch of a number."""
    left = [batch]

    def spoil(given: ImageBatch) -> ImageBatch:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return given

    return spoil


@pytest.mark.parametrize("error", [ValueError("a damaged image"), KeyboardInterrupt(), OSError(28)])
def test_whatever_ends_a_recording_whole_shards_are_kept(tmp_path, error):
    older = MadeSource([70, 71])
    record_shards(tmp_path / "a", older)
    source = MadeSource(range(8), spoil=failing_at(5, error))
    with pytest.raises(type(error)):
        record_shards(tmp_path / "a", source)
    # The older one is as it was; what is half made is hidden, also from who looks for shards.
    assert tree(tmp_path / "a") == written(tmp_path / "older", older)
    assert find_shards(tmp_path / "a").name == older.metadata.hash
    (hidden,) = (path for path in tmp_path.iterdir() if path.name not in ("a", "older"))
    assert hidden.name.startswith(".a.partial-")
    with pytest.raises((FileNotFoundError, ValueError)):
        find_shards(hidden)

    again = MadeSource(range(8))
    record_shards(tmp_path / "a", again)
    # Of the second shard both batches were made, and a write or two may have been dropped.
    assert again.made[-2:] == [7, 6]
    assert len(again.made) < 8
    assert tree(tmp_path / "a") == written(tmp_path / "wanted", again)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "older", "wanted"]


def test_what_was_given_before_an_error_is_still_written(tmp_path, monkeypatch):
    write = OpenPiece.write

    def slow(*given: Any) -> None:
        time.sleep(0.02)
        write(*given)

    source = MadeSource(range(8), spoil=failing_at(2, ValueError("damaged")))
    with monkeypatch.context() as patch:
        patch.setattr(OpenPiece, "write", slow)
        with pytest.raises(ValueError, match="damaged"):
            record_shards(tmp_path / "a", source)
    again = MadeSource(range(8))
    record_shards(tmp_path / "a", again)
    assert again.made == [4, 5, 3, 7, 6]


def break_off(root: Path, source: MadeSource, after: int) -> None:
    """Record so many batches, all of them written, and fail."""
    given = source.batches

    def batches(spans: Sequence[tuple[int, int]]) -> Generator[ImageBatch]:
        for number, batch in enumerate(given(spans)):
            if number == after:
                raise RuntimeError("broken off")
            yield batch

    source.batches = batches  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "AT_ONCE", 0)  # nothing waits
        with pytest.raises(RuntimeError, match="broken off"):
            record_shards(root, source)


@pytest.mark.parametrize(
    ("contents", "made"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], [7, 6]),  # the same
        ([0, 1, 2, 3, 4, 5], []),  # fewer: only what ends differently
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [7, 8, 6, 9]),  # more
        ([0, 1, 2, 3, 40, 5, 6, 7], [4, 5, 3, 7, 6]),  # another image among them
        ([0, 1, 2, 3], [3]),
        ([9, 0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 0, 4, 5, 3, 7, 8, 6]),  # all of them moved
    ],
)
def test_a_changed_list_makes_only_the_shards_that_it_changes(tmp_path, contents, made):
    break_off(tmp_path / "a", MadeSource(range(8), data="a list"), after=4)
    source = MadeSource(contents, data="another list", dataset="elsewhere")
    record_shards(tmp_path / "a", source)
    assert source.made == made
    assert tree(tmp_path / "a") == written(tmp_path / "wanted", source)


@pytest.mark.parametrize(
    "changes", [{"key": "other"}, {"layers": [3, 7]}, {"max_tokens_per_shard": 16}]
)
def test_another_recording_takes_nothing_over(tmp_path, changes):
    break_off(tmp_path / "a", MadeSource(range(8)), after=4)
    source = MadeSource(range(8), key=changes.pop("key", "model"))
    source.metadata = Metadata.model_validate(source.metadata.model_dump() | changes)
    record_shards(tmp_path / "a", source)
    assert sorted(source.made) == list(range(8))
    assert tree(tmp_path / "a") == written(tmp_path / "wanted", source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "wanted"]


@pytest.mark.parametrize("damage", ["shorter", "gone", "note", "labels", "no labels"])
def test_a_shard_that_is_not_as_it_was_left_is_made_again(tmp_path, damage):
    break_off(tmp_path / "a", MadeSource(range(8)), after=4)
    (data,) = tmp_path.rglob("acts000000.bin")
    (note,) = tmp_path.rglob("000000.json")
    if damage == "shorter":
        os.truncate(data, data.stat().st_size - 1)
    elif damage == "gone":
        data.unlink()
    elif damage.endswith("labels"):
        (labels,) = tmp_path.rglob("000000.labels")
        labels.unlink() if damage == "no labels" else os.truncate(labels, 16)
    else:
        note.write_bytes(b"\xff")
    source = MadeSource(range(8))
    record_shards(tmp_path / "a", source)
    assert source.made == [1, 2, 0, 7, 6]
    assert tree(tmp_path / "a") == written(tmp_path / "wanted", source)


def test_what_is_broken_off_within_the_first_shard_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        record_shards(tmp_path / "a", MadeSource(range(8), spoil=failing_at(1, RuntimeError())))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_an_error_before_the_first_image(tmp_path, monkeypatch):
    source = MadeSource(range(8))
    per_example = source.metadata.example_bytes + 4 * 3
    break_off(tmp_path / "a", source, after=4)
    monkeypatch.setattr(recording, "free_bytes", lambda _: 2 * per_example - 1)
    source = MadeSource(range(8))
    message = r"a: what is to be recorded takes 1.52e-07 GB, 1.51e-07 GB are free: record fewer"
    with pytest.raises(ValueError, match=message):
        record_shards(tmp_path / "a", source)
    assert source.made == []
    # What is whole is neither lost nor counted.
    monkeypatch.setattr(recording, "free_bytes", lambda _: 2 * per_example)
    record_shards(tmp_path / "a", source)
    assert source.made == [7, 6]
    monkeypatch.setattr(recording, "free_bytes", lambda _: 0)
    with pytest.raises(ValueError, match="the older recording stays until this one is whole"):
        record_shards(tmp_path / "a", MadeSource(range(9)))


def test_a_full_disk_names_the_folder(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OpenPiece, "write", full)
    with pytest.raises(OSError, match=r"No space left on device; the shards .*/a'"):
        record_shards(tmp_path / "a", MadeSource(range(8)))


def changed(**changes: Any) -> Callable[[ImageBatch], ImageBatch]:
    return lambda batch: batch._replace(
        **{name: change(getattr(batch, name)) for name, change in changes.items()}
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (changed(activations=lambda x: x * torch.nan), "1.jpg: the model's activations hold a NaN"),
        (changed(activations=lambda x: x[:, :, 1:]), r"\(2, 2, 3, 2\), wanted float32 \('n', 2, 4"),
        (changed(activations=lambda x: x.double()), "a batch is torch.float64"),
        (changed(examples=lambda x: [3, *x[1:]]), r"numbered \[3, 2\]; wanted each of 0 to 2 once"),
        (changed(examples=lambda x: x[1:] * 2), r"numbered \[2, 2\]; wanted each of 0 to 2 once"),
        (changed(examples=lambda x: x[1:]), r"a batch of 2 examples is numbered \[2\]"),
        (changed(labels=lambda x: x[:, 1:]), r"labels are uint16 \(2, 2\), wanted uint16 \(2, 3\)"),
        (changed(labels=lambda x: x.astype(np.uint8)), "labels are uint8"),
    ],
)
def test_a_batch_that_is_not_what_it_should_be_is_an_error(tmp_path, spoil, message):
    with pytest.raises(ValueError, match=message):
        record_shards(tmp_path / "a", MadeSource(range(8), spoil=spoil))
    assert list(tmp_path.iterdir()) == []


def test_labels_are_of_all_batches_or_of_none(tmp_path):
    seen: list[ImageBatch] = []

    def spoil(batch: ImageBatch) -> ImageBatch:
        seen.append(batch)
        return batch._replace(labels=None) if len(seen) == 2 else batch

    with pytest.raises(ValueError, match="a batch has no labels, wanted some"):
        record_shards(tmp_path / "a", MadeSource(range(8), spoil=spoil))
    source = MadeSource(range(8))
    source.labeled = False
    with pytest.raises(ValueError, match="a batch has some labels, wanted no"):
        record_shards(tmp_path / "a", source)


@pytest.mark.parametrize("most_label", [0, 255, 256])
@pytest.mark.parametrize("n_examples", [5, 6])
def test_a_recording_that_is_there_is_not_made_again(tmp_path, n_examples, most_label):
    source = MadeSource(range(n_examples), most_label=most_label)
    path = record_shards(tmp_path / "a", source)
    left = resumable_folder(tmp_path / "a", "by a process killed after publishing")
    left.mkdir()
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    again = MadeSource(range(n_examples), most_label=most_label)
    assert record_shards(tmp_path / "a", again) == path
    assert again.made == []
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before
    assert not left.exists()
    for changes in ({"data": "other images"}, {"layers": [3, 7]}):
        other = MadeSource(range(n_examples), most_label=most_label, **changes)
        record_shards(tmp_path / "a", other)
        assert len(other.made) == n_examples


@pytest.mark.parametrize(
    ("damaged", "gone"),
    [
        *(
            (name, gone)
            for name in ("acts000000.bin", "acts000002.bin", "labels.bin")
            for gone in (True, False)
        ),
        ("shards.json", True),  # its size says nothing
        ("metadata.json", False),
    ],
)
def test_a_recording_that_is_not_whole_is_made_again(tmp_path, damaged, gone):
    path = record_shards(tmp_path / "a", MadeSource(range(6)))
    wanted = tree(path)
    if gone:
        (path / damaged).unlink()
    else:
        os.truncate(path / damaged, (path / damaged).stat().st_size - 1)
    again = MadeSource(range(6))
    record_shards(tmp_path / "a", again)
    assert len(again.made) == 6
    assert tree(path) == wanted


def test_what_is_forgotten_is_made_again_and_is_there_until_then(tmp_path):
    forget_recording(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    path = record_shards(tmp_path / "a", MadeSource(range(8)))
    break_off(tmp_path / "a", MadeSource(range(9)), after=4)
    dataset = ShardsDataset(filepath=str(tmp_path / "a"))
    dataset.forget_begun()
    assert dataset.load().path == path
    assert [each.name for each in tmp_path.iterdir()] == ["a"]
    # Killed in between, it goes on, and ends.
    break_off(tmp_path / "a", MadeSource(range(8)), after=4)
    again = MadeSource(range(8))
    record_shards(tmp_path / "a", again)
    assert again.made == [7, 6]
    assert tree(tmp_path / "a") == written(tmp_path / "wanted", again)
    record_shards(tmp_path / "a", again)
    assert again.made == [7, 6]


def test_examples_that_lack_or_are_too_many_are_an_error(tmp_path):
    def record(*batches: list[int]) -> None:
        source = MadeSource(range(4))
        made = [source.batch(examples) for examples in batches]
        source.batches = lambda _: (batch for batch in made)  # type: ignore[method-assign, assignment]
        record_shards(tmp_path / "a", source)

    with pytest.raises(ValueError, match="ended within the examples 0 to 2; wanted all 4"):
        record([0, 1])
    with pytest.raises(ValueError, match="ended within the examples 3 to 3; wanted all 4"):
        record([0, 1, 2])
    discard_partials(tmp_path / "a")
    with pytest.raises(ValueError, match=r"examples \[3\] came after the last one"):
        record([0, 1, 2], [3], [3])


def test_the_dataset_records_a_source_and_refuses_what_is_no_recording(tmp_path):
    dataset = ShardsDataset(filepath=str(tmp_path / "a"))
    source = MadeSource(range(5))
    dataset.save(source)
    assert dataset.load().n_examples == 5
    assert tree(tmp_path / "a") == written(tmp_path / "wanted", source)
    (tmp_path / "a" / "mine.txt").touch()
    with pytest.raises(DatasetError, match="wanted one older recording at the most"):
        dataset.save(source)
    assert (tmp_path / "a" / "mine.txt").exists()


def test_two_at_once_are_refused(tmp_path):
    def spoil(batch: ImageBatch) -> ImageBatch:
        with pytest.raises(ValueError, match="is being written by another live process"):
            record_shards(tmp_path / "a", MadeSource(range(5)))
        return batch

    record_shards(tmp_path / "a", MadeSource(range(5), spoil=spoil))

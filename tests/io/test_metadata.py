"""What a folder says about itself: spellings, damage, bombs, and pickles left alone."""

import base64
import copy
import errno
import io
import json
import os
import pickle
import re
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from assay.codes import Format
from assay.io.codes import write_codes
from assay.io.shards import Shards, write_shards
from assay.io.shards.labels import PatchLabels, publish_labels
from assay.io.shards.metadata import Metadata
from assay.io.shards.verify import verify_shards
from shards import (
    FIELDS,
    OLD_NAMES,
    edit_json,
    make_examples,
    make_labeled,
    make_labels,
    make_metadata,
    make_shards,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_labeled(tmp_path)


def test_metadata_gives_back_the_names_that_the_code_writes() -> None:
    old = {(OLD_NAMES.get(key) or [key])[0]: value for key, value in FIELDS.items()}
    assert json.loads(Metadata.model_validate({**old, "unknown": 1}).to_json()) == FIELDS


def test_first_release_wrote_other_names_and_an_object_as_data(folder: Path) -> None:
    def as_old(raw: dict[str, Any]) -> None:
        raw.pop("dataset")
        raw.update(protocol="1.0.0", d_vit=raw.pop("d_model"), data={"__class__": "Imagenet"})

    edit_json(folder / "metadata.json", as_old)
    edit_json(
        folder / "shards.json",
        lambda entries: [{"name": e["name"], "n_imgs": e["n_examples"]} for e in entries],
    )
    assert Shards(folder).metadata.data == '{"__class__": "Imagenet"}'


@pytest.mark.parametrize("old", OLD_NAMES["content_tokens_per_example"])
def test_spellings_may_agree_but_not_differ(old: str) -> None:
    assert make_metadata(**{old: 3}) == make_metadata()
    with pytest.raises(
        ValueError, match=f"content_tokens_per_example and {old} are one field and differ"
    ):
        make_metadata(**{old: 4})


def set_field(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "metadata.json", lambda raw: raw.update(changes))


def set_entry(number: int, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "shards.json", lambda raw: raw[number].update(changes))


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).write_bytes(data)].clear()


def resize(name: str, n_bytes: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size + n_bytes)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def link(name: str, target: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder.parent / "outside.bin").write_bytes((folder / name).read_bytes())
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return change


def swap_names(folder: Path) -> None:
    edit_json(
        folder / "shards.json",
        lambda raw: [
            entry | {"name": raw[i]["name"]} for i, entry in zip((1, 0, 2), raw, strict=True)
        ],
    )


def write_nan(folder: Path) -> None:
    file = folder / "acts000002.bin"  # one example, and one of padding
    array = np.fromfile(file, "<f4").reshape(2, 2, 4, 2)
    array[0, 1, -1, -1] = np.nan
    array.tofile(file)


def many_shards(folder: Path) -> None:
    (folder / "shards.json").write_bytes(
        b"[" + b'{"name":"a","n_examples":1},' * (10**6 - 1) + b"{}]"
    )


def make_fifo(folder: Path) -> None:
    (folder / "metadata.json").unlink()
    os.mkfifo(folder / "metadata.json")


def make_bomb(folder: Path) -> None:
    os.truncate(folder / "metadata.json", 65 * 2**20)


DAMAGE: list[tuple[str, Callable[[Path], None], type[Exception], str]] = [
    ("no metadata", remove("metadata.json"), FileNotFoundError, "metadata.json is missing"),
    ("no index", remove("shards.json"), FileNotFoundError, "shards.json is missing"),
    ("no shard", remove("acts000001.bin"), FileNotFoundError, "acts000001.bin is missing"),
    ("not JSON", write("metadata.json", b"{"), ValueError, "metadata.json is not valid JSON"),
    ("a key twice", write("metadata.json", b'{"layers": [3, 5], "layers": [5, 3]}'), ValueError, "'layers' is there twice"),
    ("a key twice within", write("shards.json", b'[{"name": "a", "name": "b"}]'), ValueError, "'name' is there twice"),
    ("a family that clears the screen", set_field(family="\x1b[2J"), ValueError, r"family: .*found '\\x1b\[2J'"),
    ("a checkpoint of two lines", set_field(ckpt="a\nb"), ValueError, r"ckpt: .*found 'a\\nb'"),
    ("many shards", many_shards, ValueError, "shards.json: it lists 1000000 shards, wanted at most 3 for 5 examples"),
    ("not UTF-8", write("metadata.json", b'{"family": "\xff"}'), ValueError, "metadata.json is not valid JSON"),
    ("empty file", write("shards.json", b""), ValueError, "shards.json is not valid JSON"),
    ("deep nesting", write("shards.json", b"[" * 10**6), ValueError, "shards.json is not valid JSON"),
    ("deep objects", write("metadata.json", b'{"a":' * 10**5), ValueError, "metadata.json is not valid JSON"),
    ("long number", write("metadata.json", b'{"n_examples": %s}' % (b"9" * 9999)), ValueError, "metadata.json"),
    ("bomb", make_bomb, ValueError, "metadata.json has 68157440 bytes, wanted at most 67108864"),
    ("fifo", make_fifo, ValueError, "metadata.json is not a regular file"),
    ("a list", write("metadata.json", b"[]"), ValueError, "metadata.json: the whole"),
    ("null", write("shards.json", b"null"), ValueError, "shards.json: the whole"),
    ("an object", write("shards.json", b'{"name": "a"}'), ValueError, "shards.json: the whole"),
    ("no field", write("metadata.json", b"{}"), ValueError, "metadata.json: family: Field required"),
    ("another byte order", set_field(byteorder="big"), ValueError, "byteorder: Input should be 'little' or '<', found 'big'"),
    ("an endianness flag", set_field(endianness=">"), ValueError, "byteorder: .*found '>'"),
    ("a big-endian dtype", set_field(dtype=">f4"), ValueError, "metadata.json: dtype.*'>f4'"),
    ("dtype", set_field(dtype="float16"), ValueError, "metadata.json: dtype.*float16"),
    ("protocol", set_field(protocol="3.0"), ValueError, "metadata.json: protocol.*'1.1'.*found '3.0'"),
    ("no layers", set_field(layers=[]), ValueError, "layers"),
    ("layer twice", set_field(layers=[3, 3]), ValueError, "layers: .*distinct"),
    ("layer a float", set_field(layers=[3.0, 5]), ValueError, "layers.0: .*integer"),
    ("layer a bool", set_field(layers=[True, 5]), ValueError, "layers.0: .*integer"),
    ("int as text", set_field(d_model="2"), ValueError, "d_model: .*found '2'"),
    ("bool as int", set_field(d_model=True), ValueError, "d_model: .*found True"),
    ("int as bool", set_field(cls_token=1), ValueError, "cls_token: .*found 1"),
    ("negative", set_field(d_model=-1), ValueError, "d_model: .*found -1"),
    ("huge", set_field(d_model=10**30), ValueError, "d_model"),
    ("nothing", set_field(n_examples=0), ValueError, "n_examples: .*found 0"),
    ("two spellings", set_field(n_imgs=6), ValueError, "n_examples and n_imgs are one field and differ"),
    ("no room", set_field(max_tokens_per_shard=7), ValueError, "max_tokens_per_shard 7 .*wanted at least 8"),
    ("data a list", set_field(data=[1]), ValueError, "metadata.json: data"),
    ("shuffled names", swap_names, ValueError, "lists acts000000.bin after one of a higher number; wanted them in order"),
    ("NaN in the last token", write_nan, ValueError, "NaN or infinity in example 4, content token 2, layer 5"),
    ("other count", set_field(n_examples=6), ValueError, "shards.json lists 5 examples, metadata.json says 6"),
    ("no shards", write("shards.json", b"[]"), ValueError, "shards.json lists 0 examples"),
    ("path up", set_entry(0, name="../outside.bin"), ValueError, "shards.json: 0.name.*outside.bin"),
    ("absolute path", set_entry(0, name="/etc/passwd"), ValueError, "shards.json: 0.name.*/etc/passwd"),
    ("backslash", set_entry(0, name="..\\a"), ValueError, "shards.json: 0.name"),
    ("dots", set_entry(0, name=".."), ValueError, "shards.json: 0.name"),
    ("no name", set_entry(0, name=""), ValueError, "shards.json: 0.name"),
    ("newline", set_entry(0, name="acts000000.bin\n"), ValueError, "shards.json: 0.name"),
    ("zero byte", set_entry(0, name="a\0b"), ValueError, "shards.json: 0.name"),
    ("long name", set_entry(0, name="a" * 9999), ValueError, "shards.json: 0.name"),
    ("same name", set_entry(0, name="acts000001.bin"), ValueError, "shards.json lists 'acts000001.bin'"),
    ("labels as shard", set_entry(0, name="labels.bin"), ValueError, "shards.json lists 'labels.bin'"),
    ("negative count", set_entry(0, n_examples=-2), ValueError, "shards.json: 0.n_examples.*found -2"),
    ("count a float", set_entry(0, n_examples=2.0), ValueError, "shards.json: 0.n_examples"),
    ("moved count", lambda f: (set_entry(0, n_examples=1)(f), set_entry(2, n_examples=2)(f))[0], ValueError,
     "acts000000.bin has n_examples 1, wanted 2"),
    ("early empty", lambda f: (set_entry(0, n_examples=0)(f), set_entry(2, n_examples=3)(f))[0], ValueError,
     "acts000000.bin has n_examples 0, wanted 2"),
    ("byte missing", resize("acts000000.bin", -1), ValueError, "acts000000.bin has 127 bytes, wanted 128"),
    ("byte more", resize("acts000002.bin", 1), ValueError, "acts000002.bin has 129 bytes, wanted 128 .* or 64"),
    ("cut full shard", resize("acts000000.bin", -64), ValueError, "acts000000.bin has 64 bytes, wanted 128"),
    ("labels short", resize("labels.bin", -1), ValueError, "labels.bin has 14 bytes, wanted 15"),
    ("labels long", resize("labels.bin", 1), ValueError, "labels.bin has 16 bytes, wanted 15"),
    ("link out", link("acts000000.bin", "../outside.bin"), ValueError, "acts000000.bin leads out of the folder"),
    ("JSON link out", link("metadata.json", "../outside.bin"), ValueError, "metadata.json leads out of the folder"),
    ("labels link out", link("labels.bin", "../outside.bin"), ValueError, "labels.bin leads out of the folder"),
    ("broken link", link("acts000000.bin", "nowhere"), FileNotFoundError, "acts000000.bin is missing"),
    ("link to itself", link("acts000000.bin", "acts000000.bin"), ValueError, "acts000000.bin cannot be read"),
    ("two links", link("acts000000.bin", "acts000001.bin"), ValueError, "shards.json lists two links to one file"),
]  # fmt: skip


@dataclass
class Converted:
    """Both layers' tokens side by side as codes, with the labels: what an encoder makes of a folder
    of shards.
    """

    folder: Path
    format: Format = "dense"
    n_features: int = 5
    k: int = 5
    n_rows: int = 15
    made_from: str = ""
    fallback: None = None
    rounded: None = None

    def __post_init__(self) -> None:
        self.shards = Shards(self.folder)
        self.labels = self.shards.labels()
        self.provenance = {"shards": self.shards.name}

    def batches(self, batch_size: int, start: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        assert start == 0
        layers = [self.shards.batches(layer=layer, batch_size=batch_size) for layer in (3, 5)]
        for *tokens, labels in zip(*layers, self.labels.split(batch_size), strict=True):
            yield {
                "values": torch.cat([*tokens, labels[:, None]], 1),
                "error": torch.zeros(len(labels)),
            }


def tree(folder: Path) -> dict[str, bytes]:
    """Everything under a folder, hidden files too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("case", "change", "error", "message"), DAMAGE, ids=[case[0] for case in DAMAGE]
)
def test_damage_is_named_and_leaves_what_was_made_before_untouched(
    folder: Path, case: str, change: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    out = folder.parent / "out"
    write_codes(out / "codes", Converted(folder), batch_size=4)
    before = tree(out)
    change(folder)
    with pytest.raises(error, match=message) as caught:
        write_codes(out / "codes", Converted(folder), batch_size=4)
    assert type(caught.value) is error, case
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert tree(out) == before


def write_again(root: Path) -> None:
    metadata = make_metadata(data="b3RoZXI=")
    write_shards(
        root,
        metadata,
        (part for part in np.split(make_examples(metadata), 5)),
        make_labels(metadata),
    )


def label_again(root: Path) -> None:
    (shards,) = (path.parent for path in root.glob("*/acts000002.bin"))
    publish_labels(
        PatchLabels(np.ones((5, 3), np.uint16) * 300), root / "labels.bin", shards, force=True
    )


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("work", [write_again, label_again])
def test_a_disk_that_is_full_leaves_nothing(folder: Path, work: Callable[[Path], None]) -> None:
    before = tree(folder.parent)
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:  # a limit on the size of files is as near to a full disk as a test can come
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
        try:
            work(folder.parent)
        except OSError as error:
            os.write(said, str(error).encode())
            os._exit(error.errno or 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == errno.EFBIG
    os.close(said)
    with open(heard, "rb") as pipe:
        assert re.search(
            f"File too large: '{re.escape(str(folder.parent))}/.+'$", pipe.read().decode()
        )
    assert tree(folder.parent) == before
    work(folder.parent)
    assert tree(folder.parent) != before


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("work", [write_again, label_again])
def test_of_two_writers_at_once_the_second_is_refused(
    folder: Path, work: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(folder.parent)
    heard, said = os.pipe()
    fsync = os.fsync

    def wait(descriptor: int) -> None:
        os.write(said, b"x")
        time.sleep(1)
        fsync(descriptor)

    child = os.fork()
    if child == 0:  # the first writer dawdles where all is written and nothing is published
        monkeypatch.setattr(os, "fsync", wait)
        try:
            work(folder.parent)
        finally:
            os._exit(0)
    os.read(heard, 1)
    with pytest.raises(ValueError, match="is being written by another live process"):
        work(folder.parent)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(heard)
    os.close(said)
    assert {name for name in tree(folder.parent) if ".partial-" not in name} == before.keys()
    work(folder.parent)
    assert not [name for name in tree(folder.parent) if ".partial-" in name]


def test_folder_that_is_none(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is missing"):
        Shards(folder / "nowhere")
    with pytest.raises(ValueError, match=r"labels\.bin is not a folder"):
        Shards(folder / "labels.bin")
    with pytest.raises(ValueError, match="cannot be opened"):
        Shards(folder / "labels.bin" / "below")


@pytest.mark.parametrize("name", ["metadata.json", "shards.json", "labels.bin"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_a_file_that_cannot_be_read_is_named(
    folder: Path, name: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, open_file = Shards(folder), io.open

    def fail(file: Any, *rest: Any, **options: Any) -> Any:
        if Path(file).name == name:
            raise OSError(code, os.strerror(code), str(file))
        return open_file(file, *rest, **options)

    monkeypatch.setattr(io, "open", fail)
    message = f"^{re.escape(str(folder / name))} cannot be read: {os.strerror(code)}; restore it"
    with pytest.raises(ValueError, match=message):
        Shards(folder).labels()
    if name != "labels.bin":
        with pytest.raises(ValueError, match=message):
            shards.fingerprint()


def test_labels_that_change_as_they_are_read_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = Shards(folder)
    monkeypatch.setattr(Path, "read_bytes", lambda _: bytes(14))
    with pytest.raises(ValueError, match=r"labels\.bin has 14 bytes, wanted 15: it changed"):
        shards.labels()


def test_a_link_to_the_folder_or_within_it_is_legal(folder: Path) -> None:
    (folder / "acts000000.bin").rename(folder / "moved.bin")
    (folder / "acts000000.bin").symlink_to("moved.bin")
    (folder.parent / "train").symlink_to(folder)
    assert Shards(folder.parent / "train").name == folder.name


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["float32", "2.1"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
entries = st.lists(
    st.fixed_dictionaries({"name": st.text() | json_values, "n_examples": json_values}), max_size=3
)


@settings(deadline=None, max_examples=60)
@given(
    metadata=st.binary(max_size=40)
    | st.dictionaries(st.sampled_from([*FIELDS, "n_imgs", "d_vit"]), json_values, max_size=3).map(
        FIELDS.__or__
    ),
    index=st.none() | st.binary(max_size=40) | json_values | entries,
)
@example(metadata=b'"\\ud800"', index=None)
@example(metadata={**FIELDS, "ckpt": "\ud800"}, index=None)
def test_fuzz_raises_only_the_two_errors(metadata: Any, index: Any) -> None:
    with tempfile.TemporaryDirectory() as root:
        path = make_shards(Path(root))
        for name, value in (("metadata.json", metadata), ("shards.json", index)):
            if value is not None:
                (path / name).write_bytes(
                    value if isinstance(value, bytes) else json.dumps(value).encode()
                )
        try:
            shards = Shards(path)
            for layer in shards.layers:
                list(shards.batches(layer=layer, batch_size=4, shuffle=True))
            message = str(shards.path)
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
        assert str(path) in message


@settings(deadline=None, max_examples=80)
@given(name=st.sampled_from(["metadata.json", "shards.json"]), data=st.data())
def test_fuzz_of_a_byte_or_a_field_raises_only_the_two_errors(
    name: str, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as root:
        path = make_shards(Path(root))
        raw = bytearray((path / name).read_bytes())
        if data.draw(st.booleans()):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        else:
            value = json.loads(raw)
            record = (
                value[data.draw(st.integers(0, len(value) - 1))]
                if isinstance(value, list)
                else value
            )
            record[data.draw(st.sampled_from(sorted(record)))] = data.draw(json_values)
            raw = bytearray(json.dumps(value).encode())
        (path / name).write_bytes(raw)
        try:
            shards = Shards(path)
            for layer in shards.layers:
                list(shards.batches(layer=layer, batch_size=4, shuffle=True))
            message = str(path)
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
        assert str(path) in message


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickle_in_data_is_never_run(folder: Path, tmp_path: Path) -> None:
    text = base64.b64encode(pickle.dumps(Bomb(tmp_path / "ran"))).decode()
    set_field(data=text)(folder)
    shards = Shards(folder)
    list(shards.batches(layer=3, batch_size=4, shuffle=True))
    assert (shards.labels().shape, len(shards.fingerprint()), shards.metadata.data) == (
        (15,),
        64,
        text,
    )
    make_shards(tmp_path / "again", data=text)
    assert not (tmp_path / "ran").exists()
    copy.copy(Bomb(tmp_path / "ran"))  # builds the object as unpickling would
    assert (tmp_path / "ran").exists()


def test_links_of_a_hubs_cache_lead_to_its_blobs_and_nowhere_else(tmp_path: Path) -> None:
    repository = tmp_path / "hub/datasets--us--activations"
    plain = make_labeled(tmp_path / "plain")
    snapshot = repository / "snapshots/0f3a" / plain.name
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(plain.iterdir())):
        (repository / f"blobs/{number:064x}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../../blobs/{number:064x}")
    assert verify_shards(snapshot, max).ok
    assert Shards(snapshot).fingerprint() == Shards(plain).fingerprint()
    (tmp_path / "hub/other").mkdir()
    (tmp_path / "hub/other/labels.bin").write_bytes(bytes(15))
    for target in ("../../../../other/labels.bin", "../../../labels.bin"):
        (repository / "labels.bin").write_bytes(bytes(15))
        (snapshot / "labels.bin").unlink()
        (snapshot / "labels.bin").symlink_to(target)
        with pytest.raises(ValueError, match=r"labels.bin leads out of the folder"):
            Shards(snapshot)

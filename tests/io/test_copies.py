"""Files of equal content are found by size, a page and all they hold, in that order."""

import os

import pytest

from assay.io import copies
from assay.io.copies import find_copies
from assay.io.sampling import PAGE


def write(folder, **contents: bytes):
    folder.mkdir()
    paths = []
    for name, content in contents.items():
        paths.append(folder / name)
        paths[-1].write_bytes(content)
    return paths


def test_pairs_are_in_the_order_of_the_files_and_each_file_is_in_one(tmp_path):
    files = write(tmp_path / "a", d=b"two", b=b"one", c=b"only", e=b"two", f=b"")
    others = write(tmp_path / "b", x=b"one", y=b"two", z=b"six", v=b"one", u=b"")
    found = [(one.name, other.name) for one, other in find_copies(files, others)]
    assert found == [("d", "y"), ("b", "x"), ("f", "u")]
    assert find_copies(files, []) == find_copies([], others) == []


@pytest.mark.parametrize("at", [0, 3 * PAGE // 2, 3 * PAGE - 1])
def test_a_byte_anywhere_makes_files_differ(tmp_path, at):
    content = os.urandom(3 * PAGE)
    other = bytearray(content)
    other[at] ^= 1
    files = write(tmp_path / "a", same=content, other=bytes(other))
    assert [one.name for one, _ in find_copies(files, write(tmp_path / "b", x=content))] == ["same"]


def test_only_what_is_as_large_and_begins_to_look_alike_is_read_whole(tmp_path, monkeypatch):
    read = []
    real = copies._content
    monkeypatch.setattr(copies, "_content", lambda path: (read.append(path.name), real(path))[1])
    files = write(tmp_path / "a", a=b"same", b=b"else", c=b"longer")
    assert len(find_copies(files, write(tmp_path / "b", x=b"same", y=b"longest"))) == 1
    assert sorted(read) == ["a", "x"]

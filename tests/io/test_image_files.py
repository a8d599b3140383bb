"""Which files are a dataset's: at any depth, samples, and what tells one folder from another."""

from __future__ import annotations

import itertools
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from assay.io.images import ImageLayout, Images, files
from assay.io.images.masks import MaskLayout
from assay.io.shards.labels import ImageMasks


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.fsencode(name))


def names(folder: Path, **layout: Any) -> list[str]:
    images = Images(folder, ImageLayout(patch_size=1, **{"pattern": None} | layout))
    return [path.relative_to(folder).as_posix() for path in images.paths]


def test_every_image_at_any_depth_in_the_order_of_paths(tmp_path: Path) -> None:
    wanted = ["a/z.JPG", "a-b/a.tiff", "b/c/d.webp", "b.jpeg", "c.ppm", "d.Png", "e.bmp", "f.pgm"]
    touch(tmp_path, *wanted, "g.tif", "list.txt", "a/.hidden.jpg", ".cache/a.jpg", "h.jpg.part")
    (tmp_path / "folder.jpg").mkdir()
    assert names(tmp_path) == [*wanted, "g.tif"]
    assert names(tmp_path, pattern="*.jpg") == []
    assert names(tmp_path, pattern="**/*.JPG") == ["a/z.JPG"]


def test_links_are_followed_but_for_one_to_where_it_lies(tmp_path: Path) -> None:
    touch(tmp_path, "real/a.jpg", "real/b/c.jpg")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real/b/up").symlink_to("..")
    inside = ["a.jpg", "b/c.jpg"]
    assert names(tmp_path) == [f"{top}/{name}" for top in ("link", "real") for name in inside]


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (lambda path: path.symlink_to("/no/where"), "a link to /no/where: No such file"),
    "itself": (lambda path: path.symlink_to(path.name), "a link to odd[.]jpg: Too many levels"),
    "file/": (lambda path: path.symlink_to("a.jpg/b"), "a link to a.jpg/b: Not a directory"),
    "pipe": (os.mkfifo, "a device, socket or pipe"),
    "socket": (bind, "a device, socket or pipe"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("pattern", [None, "*.jpg", "**/*", "o*"])
def test_what_is_no_file_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, pattern: str | None
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path has to be short
    touch(tmp_path, "a.jpg", "z.jpg")
    make, said = ODD[kind]
    make(Path("odd.jpg"))
    with pytest.raises(
        ValueError,
        match=rf"/odd\.jpg \({said}.*\) is among the images and no file .*: restore or remove",
    ):
        names(tmp_path, pattern=pattern)
    (tmp_path / "list.txt").write_text("a.jpg\nz.jpg\n")
    assert names(tmp_path, names=tmp_path / "list.txt") == ["a.jpg", "z.jpg"]


def test_a_link_that_leads_nowhere_may_have_led_to_a_folder_of_images(tmp_path: Path) -> None:
    touch(tmp_path, "a/a.jpg", "notes.txt")
    (tmp_path / "a/n01440764").symlink_to("/no/where")
    (tmp_path / "b").symlink_to("b")
    with pytest.raises(
        ValueError, match=r"a/n01440764 \(a link .*\) and .*/b \(a .*\) are among the images"
    ):
        names(tmp_path)
    assert names(tmp_path, pattern="*/*.jpg") == ["a/a.jpg"]
    (tmp_path / "b").unlink()
    (tmp_path / "a/n01440764").unlink()
    # None of these is an image, wherever it leads.
    (tmp_path / ".#a.jpg").symlink_to("user@host")
    (tmp_path / "also.txt").symlink_to("notes.txt")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "more.jpg").symlink_to("a")
    assert names(tmp_path) == ["a/a.jpg", "more.jpg/a.jpg"]
    assert names(tmp_path, pattern="[!.]*.jpg") == []
    assert names(tmp_path, pattern="*.txt") == ["also.txt", "notes.txt"]


def test_a_name_that_is_no_utf8_is_refused_escaped(tmp_path: Path) -> None:
    folder, odd = tmp_path / "images", os.fsdecode(b"caf\xe9")
    touch(folder, "caf\u00e9.jpg", "a.jpg")
    assert names(folder) == ["a.jpg", "caf\u00e9.jpg"]
    (folder / "list.txt").write_text("a.jpg\n")
    touch(folder, f"{odd}/b.jpg", f"{odd}.jpg")
    said = re.escape(r"images/caf\xe9.jpg") + " is among the images by a name that is no UTF-8"
    with pytest.raises(ValueError, match=said) as caught:
        names(folder, pattern="*.jpg")
    assert str(caught.value).isprintable()
    with pytest.raises(ValueError, match=r"images/caf\\xe9/b\.jpg and .* are among"):
        names(folder)
    assert names(folder, names=folder / "list.txt") == ["a.jpg"]
    with pytest.raises(ValueError, match=r"/caf\\xe9 is among the images by a name that"):
        names(folder / odd)
    images = Images(folder, ImageLayout(patch_size=1, names=folder / "list.txt"))
    with pytest.raises(ValueError, match=r"/caf\\xe9 is among the masks by a name that"):
        ImageMasks(folder / odd, MaskLayout(patch_size=1), images)
    (folder / f"{odd}.jpg").unlink()
    (folder / f"{odd}.jpg").symlink_to(f"{odd}.png")
    with pytest.raises(ValueError, match=r"caf\\xe9\.jpg \(a link to caf\\xe9\.png: No such file"):
        names(folder, pattern="*.jpg")


def test_a_path_is_relative_to_its_folder_however_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "sub/a.jpg")
    monkeypatch.chdir(tmp_path)
    for folder in (Path(), Path("sub/.."), tmp_path, Path("/")):
        path = folder / "sub/a.jpg"
        assert list(files.relative_names(folder, [path])) == [str(path.relative_to(folder))]


def test_a_sample_is_drawn_by_its_seed_and_kept_in_order(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number:03d}.jpg" for number in range(100)))
    found = names(tmp_path, examples=30)
    assert len(set(found)) == 30
    assert found == sorted(found)
    assert found == names(tmp_path, examples=30, seed=0) != names(tmp_path, examples=30, seed=1)
    assert set(found) < set(names(tmp_path, examples=60))
    assert names(tmp_path, examples=100) == names(tmp_path)
    gaps = [int(b[:3]) - int(a[:3]) for a, b in itertools.pairwise(found)]
    assert max(gaps) < 20  # from all over
    with pytest.raises(
        ValueError, match="has 100 images, wanted at least the 101 that examples asks"
    ):
        names(tmp_path, examples=101)


def test_a_sample_is_the_same_everywhere() -> None:
    assert files._draw(10, 4, 0) == [1, 2, 3, 8]


def test_a_sample_of_a_list(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number}.jpg" for number in range(9)))
    (tmp_path / "list.txt").write_text("\n".join(f"{number}.jpg" for number in range(8, 0, -1)))
    found = names(tmp_path, names=tmp_path / "list.txt", examples=5)
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 5


def test_the_content_of_a_thousand_files_at_the_most_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MOST_SAMPLED", 10)
    touch(tmp_path, *(f"{number:03d}.jpg" for number in range(95)))
    read = []

    def digest(path: Path, most: int) -> str:
        read.append(path.name)
        return path.read_bytes()[:most].hex()

    monkeypatch.setattr(files, "sampled_digest", digest)
    images = Images(tmp_path, ImageLayout(patch_size=1))
    found = [images.fingerprint()]
    assert read == [f"{number:03d}.jpg" for number in range(0, 95, 10)]
    (tmp_path / "050.jpg").write_bytes(b"050.jpG")
    found.append(images.fingerprint())
    (tmp_path / "051.jpg").write_bytes(b"051.jpg.")  # of another size
    found.append(images.fingerprint())
    (tmp_path / "094.jpg").rename(tmp_path / "0945.jpg")
    found.append(Images(tmp_path, images.layout).fingerprint())
    assert len(set(found)) == 4

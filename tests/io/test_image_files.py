"""Which files are a dataset's: at any depth, samples, and what tells one folder from another."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from assay.io.images import ImageLayout, Images, files


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


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

"""Publishing: whole or not at all, one writer at a time, nothing of the dead left."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from assay.io.publish import publish_file, publishing_folder, publishing_pieces


def write_folder(path: Path, text: str, *, replace: bool = False) -> None:
    with publishing_folder(path, replace=replace) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "a.txt").write_text(text)


def start_writer(opening: str) -> subprocess.Popen[str]:
    """A process that enters `opening`, writes half, says so and then waits to be killed."""
    script = f"""
        import sys, time
        from pathlib import Path
        from assay.io.publish import publish_file, publishing_folder, publishing_pieces
        with {opening} as partial:
            (partial / "half" if partial.is_dir() else partial).write_text("half")
            print("writing", flush=True)
            time.sleep(60)
    """
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    with process:
        process.send_signal(signal.SIGKILL)


def test_folder_appears_whole_and_alone(tmp_path: Path) -> None:
    target = tmp_path / "made" / "on the way"
    with publishing_folder(target) as partial:
        (partial / "a.txt").write_text("a")
        assert not target.exists()
        assert partial.parent == target.parent
        assert partial.name.startswith(".on the way.partial-")
    assert [p.name for p in target.parent.iterdir()] == ["on the way"]
    assert (target / "a.txt").read_text() == "a"


def test_file_appears_whole_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    for text in ("one", "two"):
        with publish_file(target) as partial:
            partial.write_text(text)
            assert not target.exists() or target.read_text() == "one"
        assert target.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail_in_folder() -> None:
        with publishing_folder(tmp_path / "a") as partial:
            (partial / "half").write_text("half")
            raise error

    def fail_in_file() -> None:
        with publish_file(tmp_path / "a") as partial:
            partial.write_text("half")
            raise error

    for fail in (fail_in_folder, fail_in_file):
        with pytest.raises(error):
            fail()
    assert list(tmp_path.iterdir()) == []


def test_exception_keeps_the_old(tmp_path: Path) -> None:
    def fail() -> None:
        with publishing_folder(tmp_path / "a", replace=True) as partial:
            (partial / "half").write_text("half")
            raise KeyError

    write_folder(tmp_path / "a", "old")
    with pytest.raises(KeyError):
        fail()
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "inner", "a.txt"]


def test_existing_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", "old")
    with (
        pytest.raises(FileExistsError, match="a exists already"),
        publishing_folder(tmp_path / "a"),
    ):
        pytest.fail("the block ran")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_replace_swaps_the_whole_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", "old")
    (tmp_path / "a" / "only in the old").touch()
    write_folder(tmp_path / "a", "new", replace=True)
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "inner", "a.txt"]
    assert (tmp_path / "a" / "inner" / "a.txt").read_text() == "new"


def test_failed_swap_puts_the_old_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "a", "old")
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if target.name == "a" and (source / "inner" / "a.txt").read_text() == "new":
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no"):
        write_folder(tmp_path / "a", "new", replace=True)
    assert (tmp_path / "a" / "inner" / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_made_meanwhile_by_others_is_not_overwritten(tmp_path: Path) -> None:
    def work() -> None:
        with publishing_folder(tmp_path / "a") as partial:
            (partial / "mine").touch()
            (tmp_path / "a").mkdir()

    with pytest.raises(FileExistsError, match="a exists already"):
        work()
    assert [p.name for p in tmp_path.rglob("*")] == ["a"]


def test_kinds_do_not_replace_each_other(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with pytest.raises(ValueError, match="folder is a folder"), publish_file(tmp_path / "folder"):
        pytest.fail("the block ran")
    for name in ("file", "link"):
        with (
            pytest.raises(ValueError, match=name),
            publishing_folder(tmp_path / name, replace=True),
        ):
            pytest.fail("the block ran")
    with pytest.raises(ValueError, match="has a name"), publish_file("/"):
        pytest.fail("the block ran")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "link"]


def test_file_never_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), publish_file(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_all_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noting_rename(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    write_folder(tmp_path / "a", "text")
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert {"a.txt", "inner"} <= set(before)
    assert any(name.startswith(".a.partial-") for name in before)
    assert after == [tmp_path.name]


@pytest.mark.parametrize("second", [publish_file, publishing_folder])
def test_second_live_writer_is_refused_and_the_first_untouched(tmp_path: Path, second: Any) -> None:
    with publishing_folder(tmp_path / "a") as partial:
        (partial / "mine").touch()
        with (
            pytest.raises(ValueError, match="a is being written by another live process"),
            second(tmp_path / "a"),
        ):
            pytest.fail("the block ran")
        assert (partial / "mine").exists()
        write_folder(tmp_path / "b", "another name is free")
    assert (tmp_path / "a" / "mine").exists()


@pytest.mark.parametrize("gone", [1, 2])
def test_a_lock_that_its_last_holder_removes_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: int
) -> None:
    stat, calls = os.stat, 0

    def losing(path: Any, **options: Any) -> os.stat_result:
        nonlocal calls
        if str(path).endswith(".partial-lock"):
            calls += 1
            if calls == gone:
                os.unlink(path)
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", losing)
    with publish_file(tmp_path / "a") as partial:
        partial.write_text("whole")
        monkeypatch.undo()
        with pytest.raises(ValueError, match="another live process"), publish_file(tmp_path / "a"):
            pytest.fail("the block ran")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("call", ["publishing_folder", "publish_file"])
def test_killed_writer_leaves_only_partials_and_the_next_one_clears_them(
    tmp_path: Path, call: str
) -> None:
    process = start_writer(f"{call}({str(tmp_path / 'a')!r})")
    try:
        with pytest.raises(ValueError, match="live process"):
            write_folder(tmp_path / "a", "too early")
        with publish_file(tmp_path / "b") as partial:
            partial.write_text("b")
    finally:
        kill(process)
    left = [p.name for p in tmp_path.iterdir() if p.name != "b"]
    assert len(left) == 2
    assert all(name.startswith(".a.partial-") for name in left)
    write_folder(tmp_path / "a", "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert not (tmp_path / "a" / "half").exists()


def test_partials_of_other_names_are_left_alone(tmp_path: Path) -> None:
    others = [
        ".ab.partial-0123456789abcdef",
        ".a.partial-x.partial-0123456789abcdef",
        "a.partial-0123456789abcdef",
    ]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".a.partial-0123456789abcdef").mkdir()
    write_folder(tmp_path / "a", "text")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "a"])


@pytest.fixture
def foreign_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock that another user's dead writer of `tmp_path/a` left: it can be read, and neither be
    written nor removed.
    """
    lock = tmp_path / ".a.partial-lock"
    lock.touch()
    opened, unlink = os.open, Path.unlink

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if Path(path) == lock and flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *rest, **more)

    def keep(path: Path, missing_ok: bool = False) -> None:
        if path == lock:
            raise PermissionError(1, "Operation not permitted", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "unlink", keep)
    return lock


def test_another_users_dead_lock_is_in_nobodys_way(tmp_path: Path, foreign_lock: Path) -> None:
    for text in ("one", "two"):
        with publish_file(tmp_path / "a") as partial:
            partial.write_text(text)
    assert (tmp_path / "a").read_text() == "two"
    assert {path.name for path in tmp_path.iterdir()} == {"a", foreign_lock.name}


def test_another_users_live_lock_is_respected(tmp_path: Path, foreign_lock: Path) -> None:
    with foreign_lock.open("rb") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        with (
            pytest.raises(ValueError, match="is being written by another live process"),
            publish_file(tmp_path / "a") as partial,
        ):
            partial.write_text("mine")
    assert {path.name for path in tmp_path.iterdir()} == {foreign_lock.name}


def test_a_lock_that_nobody_else_may_read_is_named_with_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / ".a.partial-lock"
    lock.touch()

    def refuse(path: Any, *_: Any) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with (
        pytest.raises(
            ValueError,
            match=rf"{lock} belongs to user {os.getuid()}, .* or if there is none remove the file",
        ),
        publish_file(tmp_path / "a"),
    ):
        raise AssertionError("it is not ours to write")
    lock.rename(tmp_path / "gone")
    with pytest.raises(PermissionError), publish_file(tmp_path / "a"):
        raise AssertionError("nothing can be made here")


def test_where_the_file_system_has_no_locks_it_is_published_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some network file systems have none; then nobody knows of another writer, which is said once."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for name in ("a", "b"):
        with publish_file(tmp_path / name) as partial:
            partial.write_text(name)
        write_folder(tmp_path / f"folder-{name}", name)
    assert [(tmp_path / name).read_text() for name in ("a", "folder-b/inner/a.txt")] == ["a", "b"]
    (record,) = caplog.records
    assert f"{tmp_path} knows no locks" in record.getMessage()


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_pieces_are_kept_by_their_notes_alone(tmp_path: Path, error: type[BaseException]) -> None:
    def write(*, noted: bool, broken: bool) -> list[str]:
        with publishing_pieces(tmp_path / "a", resume="the same") as (content, notes):
            found = sorted(path.name for path in content.iterdir())
            (content / f"{len(found)}.bin").write_text("piece")
            if noted:
                (notes / f"{len(found)}.json").touch()
            if broken:
                raise error
        return found

    write_folder(tmp_path / "a", "old")
    with pytest.raises(error):
        write(noted=False, broken=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(error):
        write(noted=True, broken=True)
    assert (tmp_path / "a" / "inner" / "a.txt").read_text() == "old"
    assert write(noted=True, broken=False) == ["0.bin"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["0.bin", "1.bin"]

"""Locks by name: alone or shared, named holders, and nothing of the dead."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from assay.io.locks import Locks


def test_one_has_a_lock_alone_or_several_share_it(tmp_path: Path) -> None:
    first, second, third = (Locks(tmp_path / "locks") for _ in range(3))
    assert first.take("fit@0123")
    assert first.holds("fit@0123")
    assert second.take("fit@4567")
    assert not second.take("fit@0123")
    assert not second.take("fit@0123", shared=True)
    first.share("fit@0123")
    assert first.holds("fit@0123", shared=True)
    assert not first.holds("fit@0123")
    assert second.take("fit@0123", shared=True)
    assert not third.take("fit@0123")
    first.release()
    assert not third.take("fit@0123")
    second.release("fit@0123")
    assert third.take("fit@0123")
    third.release()
    second.release()
    assert list((tmp_path / "locks").iterdir()) == []


def test_the_holder_is_named_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    script = f"""
        import time
        from pathlib import Path
        from assay.io.locks import Locks
        locks = Locks(Path({str(tmp_path)!r}))
        assert locks.take("fit")
        print("taken", flush=True)
        time.sleep(60)
    """
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), "--params=a b"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    mine = Locks(tmp_path)
    assert not mine.take("fit")
    assert f"process {process.pid} on " in mine.holder("fit")
    assert "(`-c '--params=a b'`) since 20" in mine.holder("fit")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / "fit.lock").exists()
    assert mine.take("fit")
    assert f"process {os.getpid()} on " in mine.holder("fit")


def test_a_lock_file_that_is_removed_before_it_is_taken_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who held it lets go, and removes the file, between our opening and our locking it."""
    first, second, third = (Locks(tmp_path) for _ in range(3))
    assert first.take("fit")
    flock, stages = fcntl.flock, []

    def late(descriptor: int, kind: int) -> None:
        if not stages:
            stages.append("opened")
            first.release()
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    assert second.take("fit")
    assert not third.take("fit")


def test_who_holds_it_is_told_even_where_nothing_good_is_written(tmp_path: Path) -> None:
    theirs, mine = Locks(tmp_path), Locks(tmp_path)
    assert theirs.take("fit")
    for text in ("", "[]", "{}", "\xff"):
        (tmp_path / "fit.lock").write_text(text, encoding="latin-1")
        assert mine.holder("fit") == f"another process ({tmp_path / 'fit.lock'})"


def test_anothers_lock_file_that_can_only_be_read_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that cannot even be read is named, with what to do. Whoever tests may be root, who can
    open everything.
    """
    (tmp_path / "fit.lock").write_text("theirs")
    real = os.open

    def opened(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_ACCMODE not in allowed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", opened)
    allowed = [os.O_RDONLY]
    theirs, mine = Locks(tmp_path), Locks(tmp_path)
    assert theirs.take("fit")
    assert not mine.take("fit")
    assert (tmp_path / "fit.lock").read_text() == "theirs"
    allowed = []
    with pytest.raises(
        PermissionError, match=r"another user's cannot be opened.*or remove it.*fit\.lock"
    ):
        mine.take("fit")


def test_a_file_system_without_locks_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    locks = Locks(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert locks.take("a")
        assert locks.take("b", shared=True)
        locks.share("a")
        locks.release()
    (record,) = caplog.records
    assert f"{tmp_path} knows no locks (No locks available)" in record.getMessage()


def test_a_name_is_a_file_name_whatever_is_in_it(tmp_path: Path) -> None:
    locks, name = Locks(tmp_path), "../layer_3." + "x" * 400 + "@0123456789abcdef"
    assert locks.take(name)
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("@0123456789abcdef.lock")
    locks.release()

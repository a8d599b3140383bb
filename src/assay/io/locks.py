"""Advisory locks by name (flock) that several processes share: who has one is told, and a dead
process has none.

The kernel drops a lock with its process, so a lock file that is left over blocks nobody. What is
written in it says who took it last.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shlex
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What flock answers where the file system has no locks."""


class Locks:
    """The locks that a process holds in a folder, which is made when the first is taken."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, tuple[int, bool]] = {}

    def holds(self, name: str, *, shared: bool = False) -> bool:
        """Whether this holds a lock: alone, or, with ``shared``, at least together with others."""
        return name in self._held and (shared or not self._held[name][1])

    def take(self, name: str, *, shared: bool = False) -> bool:
        """Take a lock that this does not hold, alone or ``shared``, without waiting; False where
        another holds it against us.

        Raises:
            PermissionError: the lock file is another user's, and cannot be opened.
        """
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = _open(path)
            try:
                if not try_flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, path):
                    os.close(descriptor)
                    return False
                # Who holds a lock alone removes the file before letting go: a lock on a removed
                # file guards nothing.
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                        _sign(descriptor)
                        self._held[name] = descriptor, shared
                        return True
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def share(self, name: str) -> None:
        """Let others share a lock that is held alone."""
        descriptor, shared = self._held[name]
        if not shared and try_flock(descriptor, fcntl.LOCK_SH, self._path(name)):
            self._held[name] = descriptor, True

    def release(self, *names: str) -> None:
        """Let go of some locks, or of all."""
        for name in names or tuple(self._held):
            descriptor, shared = self._held.pop(name)
            try:
                # Where one that was shared can be had alone, nobody else shares it any more.
                if not shared or try_flock(descriptor, fcntl.LOCK_EX, self._path(name)):
                    with suppress(OSError):  # another user's, say
                        self._path(name).unlink()
            finally:
                os.close(descriptor)

    def holder(self, name: str) -> str:
        """Who took a lock last, in words."""
        try:
            said = json.loads(self._path(name).read_bytes())
            return (
                f"process {said['pid']} on {said['host']} (`{said['command']}`) since"
                f" {said['since']}"
            )
        except (OSError, ValueError, KeyError, TypeError):
            return f"another process ({self._path(name)})"

    def _path(self, name: str) -> Path:
        return self._folder / (re.sub(r"[^\w.@-]", "_", name)[-200:] + ".lock")


def _open(path: Path) -> int:
    # To hold a lock it is enough to read.
    for flags in (os.O_RDWR | os.O_CREAT, os.O_RDWR, os.O_RDONLY):
        with suppress(PermissionError):
            return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    raise PermissionError(
        errno.EACCES,
        "this lock of another user's cannot be opened; have it made readable, or remove it",
        str(path),
    )


def try_flock(descriptor: int, kind: int, path: Path) -> bool:
    """Whether the lock of an open file, of `kind` LOCK_EX or LOCK_SH, is ours; it counts as ours
    where the file system has none.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _say_unsupported(path.parent, error.strerror or str(error))
    return True


_said: set[Path] = set()


def _say_unsupported(folder: Path, reason: str) -> None:
    if folder not in _said:
        _said.add(folder)
        logger.warning(
            "%s knows no locks (%s): do not start two runs at once that make the same.",
            folder,
            reason,
        )


def _sign(descriptor: int) -> None:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    text = json.dumps(
        {"pid": os.getpid(), "host": socket.gethostname(), "command": command[:500], "since": since}
    )
    with suppress(OSError):  # it is another user's, or the disk is full: nobody is named then
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)

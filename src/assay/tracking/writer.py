"""The thread that speaks to MLflow beside the work."""

from __future__ import annotations

import logging
import queue
import random
import re
import threading
import time
from collections.abc import Callable
from typing import Any

from assay.tracking.database import shown

logger = logging.getLogger(__name__)

PATIENCE = 8.0
"""Seconds of a server's silence that the work waits through, in all: when it begins, when it ends.
"""


COMPUTES = 0.05
"""Seconds of a processor's time after which a thread has done more than ask whether there is an
answer.
"""

POLL = 0.1
"""Seconds from one glance at the thread's progress to the next."""

RETRY = 1.0
"""Seconds from one try of a database that is locked or away to the next."""

LOCKED = "database is locked"

AWAY = re.compile(
    "(?i:connection refused)|the database system is|too many clients"
    "|terminating connection due to administrator command"
)
"""What is said of a server that has not taken a request, and may take it later."""

CONFLICT = re.compile(
    "duplicate key value|UNIQUE constraint failed|deadlock detected|could not serialize"
    "|expected to (update|delete) \\d|No tag with name|Changing param values"
)
"""What is said where two processes wrote one thing of one run at once: MLflow looks whether it is
there, then writes it.
"""

CONFLICTS = 8
"""Tries of a request after such an answer."""


class Writer:
    """Does one request after the other in a thread of its own, and never stands in the work's way.

    A request that fails is reported once, and everything after it is left out: the results are on
    disk, and a server that is down would hold the run up with every further request. So is a server
    that is waited for and says nothing. The thread is a daemon's: one that hangs is left behind
    when the process ends. A database that another process has locked, or a server that has answered
    before and is being started again, is asked again for as long as nobody waits: a request has to
    bear being made twice.
    """

    def __init__(self) -> None:
        self.failure: str | None = None
        """What went wrong; None: nothing has."""
        self._requests: queue.SimpleQueue[tuple[str, Callable[[], Any], bool] | None] = (
            queue.SimpleQueue()
        )
        self._changed = threading.Condition()
        self._pending = 0
        self._doing = ""
        self._heard = time.monotonic()
        self._patience = PATIENCE
        self._deaf = False
        self._answered = False
        self._awaited = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()
        self._clock = time.pthread_getcpuclockid(self._thread.ident or 0)

    def submit(
        self, what: str, request: Callable[..., Any], *arguments: Any, **options: Any
    ) -> None:
        """Have a request done, after those before it; `what` names to people what it logs."""
        self._put(what, lambda: request(*arguments, **options), False)

    def submit_always(
        self, what: str, request: Callable[..., Any], *arguments: Any, **options: Any
    ) -> None:
        """Have a request tried even where one before it failed, unless such a one has failed as
        well.
        """
        self._put(what, lambda: request(*arguments, **options), True)

    def wait(self) -> None:
        """Await what was submitted, for as long as it gets on; give it up when nothing has been
        heard for too long.

        A thread that computes gets on, however few of a processor's turns it is given: it waits for
        nobody.
        """
        worked = time.monotonic()
        used = time.clock_gettime(self._clock)
        self._awaited.set()
        with self._changed:
            while self._pending and not self._deaf:
                now = time.monotonic()
                if time.clock_gettime(self._clock) - used > COMPUTES:
                    used, worked = time.clock_gettime(self._clock), now
                if now - max(worked, self._heard) >= self._patience:
                    self._deaf = True
                    self._fail(self._doing, TimeoutError(f"no answer for {PATIENCE:.0f} s"))
                else:
                    self._changed.wait(POLL)
            self._patience = max(
                0.0, self._patience - (time.monotonic() - max(worked, self._heard))
            )
        self._awaited.clear()

    def heard(self) -> None:
        """Note a sign of life within a request."""
        self._heard = time.monotonic()

    def stop(self) -> None:
        """End the thread when it has done what was submitted."""
        self._requests.put(None)

    def fail(self, what: str, error: Exception) -> None:
        """Leave out everything from now on, for a reason that is not a request's."""
        with self._changed:
            self._fail(what, error)

    def _put(self, what: str, request: Callable[[], Any], always: bool) -> None:
        with self._changed:
            self._pending += 1
        self._requests.put((what, request, always))

    def _work(self) -> None:
        while (found := self._requests.get()) is not None:
            what, request, always = found
            with self._changed:
                wanted = not self._deaf and (always or self.failure is None)
                self._doing = what
            error = self._attempt(request) if wanted else None
            with self._changed:
                if error is not None:
                    self._deaf = self._deaf or always
                    self._fail(what, error)
                self._pending -= 1
                self._heard = time.monotonic()
                self._changed.notify_all()

    def _attempt(self, request: Callable[[], Any]) -> Exception | None:
        conflicts = 0
        while True:
            last = self._awaited.is_set()
            try:
                request()
            except Exception as error:  # whatever MLflow and its databases raise
                said = str(error)
                if CONFLICT.search(said) and conflicts < CONFLICTS:
                    conflicts += 1
                    self.heard()
                    time.sleep(random.uniform(0, 0.05 * conflicts))
                elif last or not (LOCKED in said or (self._answered and AWAY.search(said))):
                    return error
                else:
                    self._awaited.wait(RETRY)
            else:
                self._answered = True
                return None

    def _fail(self, what: str, error: Exception) -> None:
        if self.failure is not None:
            return
        # A server may answer with a page.
        said = shown(" ".join(f"{type(error).__name__}: {error}".split()))
        self.failure = f"{what}: {said if len(said) <= 300 else f'{said[:150]} ... {said[-150:]}'}"
        logger.error(
            "MLflow does not take what this run logs, which goes on without, from %s. The results"
            " are in data/; `kedro run --force` logs them again.",
            self.failure,
        )

"""The thread that writes to MLflow beside the work."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

logger = logging.getLogger(__name__)


class Writer:
    """Does one request after the other in a thread of its own, and never stands in the work's way.

    A request that fails is reported once, and everything after it is left out: the results are on disk, and a server that is down
    would hold the run up with every further request.
    """

    def __init__(self) -> None:
        self.failure: str | None = None
        """What went wrong; None: nothing has."""
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")

    def submit(self, request: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Have a request done, after those before it."""
        self._pool.submit(self._do, request, arguments, options)

    def finish(self) -> None:
        """Await what was submitted."""
        self._pool.shutdown(wait=True)

    def _do(self, request: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if self.failure is not None:
            return
        try:
            request(*arguments, **options)
        except Exception as error:  # whatever MLflow and its databases raise
            self.failure = f"{type(error).__name__}: {error}"
            logger.error(
                "MLflow does not take what this run logs, which goes on without: %s. The results are in data/; "
                "`kedro run --force` logs them again.",
                self.failure,
            )

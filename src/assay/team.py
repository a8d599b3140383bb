"""The processes that share one run's work, as pipelines see them: one alone, or the ranks that
`python -m assay.ranks` starts.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


class Team:
    """One process alone, and what it has in common with many.

    Attributes:
        rank: this process's number. Rank 0 runs the one Kedro session; the others, its followers,
            do what it calls.
        size: processes in all.
        timeout_seconds: for how long the others wait for one of which nothing is heard.
    """

    rank = 0
    size = 1
    timeout_seconds = 120.0

    def call(
        self,
        function: str,
        request: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        *,
        lead: Callable[[], Any] | None = None,
    ) -> Any:
        """Have every rank, this one too, do ``function``, and give what it gives on this one, when
        all are done. On rank 0 alone.

        Args:
            function: by name, `assay.pipelines.pca.nodes:fit_parts`. It is called with this team,
                ``request`` and ``tensors``.
            request: JSON.
            tensors: which travel as bytes of safetensors.
            lead: what this rank does in the place of ``function``, with what it alone has.

        Raises:
            ChildProcessError: a rank is gone, or was not heard of; or one failed otherwise than by
                bad data or a bad disk. It names the rank.
            ValueError, OSError: of a rank, whose number it says.
            KeyboardInterrupt: a rank, or this one, was asked to stop.
        """
        if lead is not None:
            return lead()
        return find_function(function)(self, json.loads(json.dumps(request)), tensors or {})

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, by rank: of one dtype and device, and of the same shape but for
        the first dimension.

        Raises:
            ChildProcessError: a rank is gone, or was not heard of.
        """
        return [tensor]

    def any(self, flag: bool) -> bool:
        """Whether any rank's flag is true: the same answer on all of them.

        Raises:
            ChildProcessError: a rank is gone, or was not heard of.
        """
        return flag


def find_function(name: str) -> Callable[..., Any]:
    """What a name, `assay.pipelines.pca.nodes:fit_parts`, is of."""
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


class _Current:
    team = Team()


def current_team() -> Team:
    """The team that this process is of: one of its own, unless it is a rank."""
    return _Current.team


@contextmanager
def as_current(team: Team) -> Iterator[None]:
    """Within the block this process is of ``team``."""
    before, _Current.team = _Current.team, team
    try:
        yield
    finally:
        _Current.team = before

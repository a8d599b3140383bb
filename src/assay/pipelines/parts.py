"""Work in parts: independent pieces, each with a checkpoint of its own, made by whoever comes to
them and merged in order.

What comes of it depends on the number of parts and not on who made which, when, or in how many
processes: work that one process began is gone on with by several, and the other way round. Rank r
of W makes the parts r, r + W, ...; a process by itself makes them all, one after the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from assay.team import Team, current_team, find_function


@dataclass(frozen=True)
class Part:
    """A contiguous piece of some work, of the tokens of a pass or of the features of a probe.

    Attributes:
        number: from 0.
        of: how many parts there are.
        start, stop: the tokens or features that it holds, from `start` to `stop` - 1.
    """

    number: int
    of: int
    start: int
    stop: int

    @property
    def about(self) -> dict[str, Any]:
        """What tells its checkpoints from those of the other parts, JSON: nothing where it is
        all.
        """
        return {"part": [self.number, self.of]} if self.of > 1 else {}


def cut(n: int, parts: int, multiple: int = 1) -> list[Part]:
    """Cut n tokens or features into so many parts, as even as multiples of `multiple` allow.

    Where there are fewer multiples than parts, those that would be empty are left out, so there is
    always at least one.
    """
    pieces = -(-n // multiple)
    ends = [min(n, pieces * number // parts * multiple) for number in range(parts + 1)]
    return [
        Part(number, parts, start, stop)
        for number, (start, stop) in enumerate(itertools.pairwise(ends))
        if start < stop
    ]


Work = Callable[[Part, dict[str, Any], Mapping[str, Tensor]], None]
"""Makes a part from a request, JSON, and tensors by name, and leaves what it made in a checkpoint:
it may be in another process than whoever asked.
"""


def make_parts(
    work: Work, parts: Sequence[Part], request: dict[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Have the ranks of this process' team make the parts, each its share, by a function of a
    module; gives when all are made.

    Raises:
        KeyboardInterrupt: a rank was asked to stop; the parts in progress are saved.
    """
    asked = {
        "work": f"{work.__module__}:{work.__qualname__}",
        "parts": [asdict(part) for part in parts],
        "request": request,
    }
    current_team().call(f"{make_share.__module__}:{make_share.__qualname__}", asked, tensors)


def make_share(team: Team, asked: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Make the parts that fall to this rank: what `make_parts` has every rank run."""
    work: Work = find_function(asked["work"])
    for part in asked["parts"][team.rank :: team.size]:
        work(Part(**part), asked["request"], tensors)

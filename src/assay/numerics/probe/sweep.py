"""Probes of some features that are fitted to some codes and judged on others: a piece of work that
can stop anywhere and be shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from assay.numerics.probe.judge import Judging
from assay.numerics.probe.labeled import LabeledCodes
from assay.numerics.probe.solver import Fitting
from assay.numerics.probe.state import FittedProbes, ProbeSettings
from assay.numerics.scores import Judgment


class Sweep:
    """Probes of some features on the first k entries of each row, for each k, fitted to `train` and
    judged on `val` in the same passes.

    It stands between two pieces of work whenever it tells of progress: `checkpoint` then says
    where, and `resume` goes on from there to the same bits. So do sweeps of ranges of features that
    are whole groups of `solved_together`: joined in order they are a sweep of all.

    Args:
        settings: how they are fitted.
        train, val: codes with labels.
        ks: K; None: all entries of a row.
        columns: the features; None: all.

    Raises:
        ValueError: a k is given for codes that are not sparse or have fewer entries.
    """

    def __init__(
        self,
        settings: ProbeSettings,
        train: LabeledCodes,
        val: LabeledCodes,
        ks: Sequence[int | None] = (None,),
        columns: slice | None = None,
    ) -> None:
        self._val = val
        self._ks = list(ks)
        self._columns = columns
        self._fitting = Fitting(settings, train, ks, columns)
        self._judging: Judging | None = None
        self._left: tuple[dict[str, Tensor], Mapping[str, Any]] | None = None  # of a judgment

    def run(self) -> tuple[list[FittedProbes], list[Judgment]]:
        """Do what is left; gives the probes of each k, and what they are on `val`.

        Raises:
            ValueError: codes are not finite, or name features that there are not.
        """
        fits = self._fitting.run()
        if self._judging is None:
            self._judging = Judging(
                list(zip(fits, self._ks, strict=True)), self._val, self._columns
            )
            if self._left is not None:
                self._judging.resume(*self._left)
        return fits, self._judging.run()

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Where it stands: tensors, and JSON."""
        tensors, fitting = self._fitting.checkpoint()
        if self._judging is None:
            return tensors, {"fitting": fitting}
        judged, judging = self._judging.checkpoint()
        tensors |= {f"val.{name}": tensor for name, tensor in judged.items()}
        return tensors, {"fitting": fitting, "judging": judging}

    def resume(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from what `checkpoint` gave, of a sweep of the same features and codes."""
        self._fitting.resume(tensors, state["fitting"])
        if "judging" in state:
            judged = {
                name.removeprefix("val."): tensor
                for name, tensor in tensors.items()
                if name.startswith("val.")
            }
            self._left = judged, state["judging"]

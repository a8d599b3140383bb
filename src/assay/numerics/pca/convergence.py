"""Whether the leading components of a PCA still move while it is fitted."""

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor

from assay.numerics.isolation import isolated, snapshot
from assay.numerics.pca.estimator import StreamingPCA


@isolated()
def subspace_drift(components: Tensor, others: Tensor) -> float:
    """How far apart two subspaces of one dimension are, from 0 (the same) to 1 (orthogonal).

    Both are given as orthonormal rows (k, d). The distance is the mean squared sine of their
    principal angles, 1 - ||A B^T||_F^2 / k (Bjorck and Golub 1973, "Numerical methods for computing
    angles between linear subspaces").
    """
    shared = (components.double() @ others.double().T).square().sum()
    return max(0.0, 1 - float(shared) / len(components))


class Convergence:
    """How a PCA settles while it is fitted, by its leading subspace after 1, 2, 4, 8, ... steps and
    after the last.

    Args:
        pca: the one that is fitted; a checkpoint holds both.
        watched: how many leading components to compare, but at most a quarter of the dimensions:
            the whole space would never drift.

    Attributes:
        history_: a dict of floats for each comparison: `step`; `reconstruction_error`, the share of
            the variance of the tokens so far that the leading components leave; and, except in the
            first, `subspace_drift` since the comparison before. There is none until there are more
            tokens than components.
    """

    def __init__(self, pca: StreamingPCA, watched: int = 64) -> None:
        if watched < 1:
            raise ValueError(f"found watched = {watched}, wanted at least 1 component: raise it")
        self.history_: list[dict[str, float]] = []
        self._pca = pca
        self._watched = watched
        self._leading: Tensor | None = None

    @isolated()
    def observe(self, step: int, last: bool = False) -> dict[str, float]:
        """The entry of `history_` that is due after `step` steps; empty if none is due, or it was
        made before.

        It follows from the sums alone, so a fit that resumes from its checkpoint of a step can make
        it later.
        """
        due = step > 0 and (last or step & (step - 1) == 0)
        moments = self._pca._moments
        if not due or moments is None or (self.history_ and self.history_[-1]["step"] >= step):
            return {}
        watched = min(self._watched, max(1, len(moments.mean) // 4))
        if moments.count <= watched:
            return {}
        leading = self._pca.components_[:watched].clone()
        total = float(moments.second.diagonal().sum()) / (moments.count - 1)
        kept = float(self._pca.explained_variance_[:watched].sum())
        found = {"reconstruction_error": max(0.0, 1 - kept / total) if total > 0 else 0.0}
        if self._leading is not None:
            found["subspace_drift"] = subspace_drift(leading, self._leading)
        self._leading = leading
        self.history_.append({"step": float(step), **found})
        return found

    @isolated()
    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The PCA's checkpoint, with `history` as JSON and, if there are any, a copy of the
        `leading` components, float64 (components, d).
        """
        tensors, state = self._pca.checkpoint()
        leading = {} if self._leading is None else {"leading": snapshot(self._leading)}
        return tensors | leading, state | {"history": [dict(look) for look in self.history_]}

    @isolated()
    def resume(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Self:
        """Continue from what `checkpoint` returned, with the PCA, bit for bit as if there had been
        no break.
        """
        self._pca.resume(tensors, state)
        self._leading = None
        if "leading" in tensors and self._pca._moments is not None:
            self._leading = snapshot(tensors["leading"]).to(self._pca._moments.mean.device)
        self.history_ = [dict(look) for look in state["history"]]
        return self

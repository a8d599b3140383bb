"""Mini-batch k-means over a stream of activations.

Steps are Sculley's (2010), with the low-count reassignment and the smoothed-inertia stopping of
scikit-learn's MiniBatchKMeans.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from assay.numerics.isolation import isolated, snapshot
from assay.numerics.kmeans.fit_state import FitState, InProgress
from assay.numerics.kmeans.graphed import GraphedSteps
from assay.numerics.kmeans.hyperparameters import (
    check_parameters,
    parameter_tensors,
    read_centers,
    read_parameters,
    show_parameters,
)
from assay.numerics.kmeans.passes import make_passes
from assay.numerics.kmeans.prediction import LARGEST, CenterModel
from assay.numerics.kmeans.reassignment import reassign_where_due
from assay.numerics.kmeans.seeding import Seeding, seeding_tokens
from assay.numerics.kmeans.step import step_at_once
from assay.numerics.moments import batch_moments, check_later


class MiniBatchKMeans(CenterModel, InProgress):
    """k-means by mini-batches, for data that is seen as a stream of batches (batch, d) of real
    numbers, within float32's range.

    Centers are float32, and so are tokens when the nearest is sought; sums are float64. NaN and
    infinity are a ValueError. A step on b tokens takes 2 b K d operations in the fastest precision
    there is, and memory for the centers twice and a tile of scores.

    Args:
        n_clusters: centers.
        seed: of every random draw; one seed and one stream give one result.
        device: where the model lives, by default that of its first batch; inputs are moved there.
        n_init: seedings tried; the one with the least mean squared distance on held-out tokens is
            kept.
        init_size: tokens to seed from; None means 3 max(n_clusters, tokens of the first batch).
            More tokens hold more outliers, which make poor seeds.
        max_iter: passes over the data at most.
        tol: stop when a step moves the centers by a summed squared distance of at most tol times
            the mean variance of a dimension among the seeding tokens; 0 never stops so.
        max_no_improvement: stop after this many steps in a row without a new least smoothed
            inertia, from the second pass on; None never stops so.
        reassignment_ratio: clusters with a count below this share of the mean, and those in the
            place of another, are moved to far tokens (see `reassign_centers`), every 10 n_clusters
            tokens and after any step that leaves a count of 0; 0 never moves any.
        decay: factor by which the counts shrink before each further pass of `fit` (rounded up).
            With 1 the learning rate is 1/n over all tokens ever seen, and early ones, which were
            nearest to other centers, hold centers back; below 1 centers are exponential moving
            averages over passes.

    Attributes:
        cluster_centers_: float32 (n_clusters, d).
        counts_: int64 (n_clusters,), the n of the learning rate 1/n.
        is_seeded_: whether there are centers to go on with.
        n_steps_: steps made.
        epoch_: passes made.
        steps_of_pass_: steps of the pass under way.
        inertia_: the last batch's mean squared distance before its step.
        history_: a dict of floats for each step: `inertia`, `ewa_inertia` (smoothed),
            `learning_rate` (the share of the way to their tokens' mean that centers went, as a mean
            over the clusters hit) and `dead_clusters` (those with count 0 or below
            reassignment_ratio times the mean, before they are moved).

    Examples:
        >>> tokens = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
        >>> kmeans = MiniBatchKMeans(4, max_iter=2).fit(lambda epoch: tokens.split(100))
        >>> kmeans.predict(tokens).shape, kmeans.n_steps_
        (torch.Size([1000]), 20)
    """

    def __init__(
        self,
        n_clusters: int,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        n_init: int = 1,
        init_size: int | None = None,
        max_iter: int = 100,
        tol: float = 0.0,
        max_no_improvement: int | None = 10,
        reassignment_ratio: float = 0.01,
        decay: float = 0.1,
    ) -> None:
        super().__init__()
        self.n_clusters = n_clusters
        self.seed = seed
        self.device = device
        self.n_init = n_init
        self.init_size = init_size
        self.max_iter = max_iter
        self.tol = tol
        self.max_no_improvement = max_no_improvement
        self.reassignment_ratio = reassignment_ratio
        self.decay = decay
        self._fit = FitState(torch.Generator())
        self._queue = GraphedSteps()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({show_parameters(self)})"

    def fit(
        self,
        stream: Callable[[int], Iterable[Tensor]],
        on_step: Callable[[dict[str, float]], None] | None = None,
    ) -> Self:
        """Fit anew on passes `stream(0)`, `stream(1)`, ...: each the same tokens, preferably
        shuffled differently.

        The first tokens of `stream(0)` seed the centers before the passes start, so they should be
        a fair sample. `on_step` is called after each step with its entry of `history_`.

        Raises:
            ValueError: a pass has no tokens, there are fewer distinct tokens than clusters, or a
                parameter is out of range.
        """
        self._fit.seeding = None
        self.seed_from(stream(0))
        for metrics in self.steps(stream):
            if on_step is not None:
                on_step(metrics)
        return self

    @property
    def is_seeded_(self) -> bool:
        """Whether there are centers to go on with: not before the last seeding is done."""
        return self._fit.seeding is None and super().is_seeded_

    def seed_from(self, batches: Iterable[Tensor]) -> Self:
        """Start a fit anew: seed the centers from the first tokens of `batches`. `steps` then makes
        the passes.
        """
        for _ in self.seedings(batches):
            pass
        return self

    def seedings(self, batches: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
        """As `seed_from`, one center at a time: yields the number of seedings tried and of centers
        chosen in the current one, 0 after a whole one.

        A `checkpoint` can be taken at each yield. A resumed seeding continues bit for bit if
        `batches` begin with the same tokens.
        """
        check_parameters(self)
        tokens, held_out = seeding_tokens(
            batches, self.n_clusters, self.init_size, self.device, judge=self.n_init > 1
        )
        yield from self._seed(tokens, held_out)
        with isolated():
            sample = batch_moments(tokens)
            self._fit.progress.at_rest = self.tol * float(sample.second.mean()) / sample.count

    def _seed(self, tokens: Tensor, held_out: Tensor | None) -> Iterator[tuple[int, int]]:
        before = self._fit
        if before.seeding is None:
            self._fit = FitState.begin(self.seed, Seeding())
        try:
            centers = yield from self._fit.seed(tokens, held_out, self.n_clusters, self.n_init)
        except Exception:
            self._fit = before  # tokens that cannot be seeded from leave the model as it was
            raise
        self.cluster_centers_ = centers
        with isolated():
            self.counts_ = torch.zeros(self.n_clusters, dtype=torch.int64, device=tokens.device)

    def steps(self, stream: Callable[[int], Iterable[Tensor]]) -> Iterator[dict[str, float]]:
        """Make the passes of a seeded fit, or the rest of a resumed one, one step at a time: yields
        each step's metrics.

        A `checkpoint` can be taken at each yield, and a fit resumed from it continues bit for bit.
        The first pass asked of `stream` must then begin after the first `steps_of_pass_` batches,
        and may be empty.
        """
        yield from make_passes(self, self._fit.progress, stream)

    @isolated()
    def partial_fit(self, x: Tensor) -> Self:
        """Take one step on a batch (batch, d); an empty one changes nothing. The first batch also
        seeds the centers, unless fit did.

        Raises:
            ValueError: d changes, the batch holds NaN or infinity, or it has to seed and has fewer
                distinct rows than clusters.
        """
        fitted = self.is_seeded_
        check_numbers = check_later(
            x, self.cluster_centers_.shape[1] if fitted else None, largest=LARGEST
        )
        if x.shape[0] == 0:
            return self
        if not fitted:
            check_parameters(self)
            for _ in self._seed(x.to(self.device or x.device), None):
                pass
        x = x.to(self.cluster_centers_.device)
        try:
            step = step_at_once(
                x, self.cluster_centers_, self.counts_, self.reassignment_ratio, self._queue
            )
        finally:
            check_numbers()  # first: a step on bad numbers fails with less to say
        self._fit.progress.record(len(x), step.inertia, step.rate, step.n_low)
        self.cluster_centers_, self.counts_ = reassign_where_due(
            x, step, self.cluster_centers_, self.reassignment_ratio, self._fit
        )
        return self

    @isolated()
    def state_dict(self) -> dict[str, Tensor]:
        """`cluster_centers` float32 (n_clusters, d), `counts` int64 (n_clusters,), and the
        parameters by name, int64 or float64 (): copies.

        0 stands for None.
        """
        return self._centers_and_counts() | parameter_tensors(self)

    def _centers_and_counts(self) -> dict[str, Tensor]:
        return {
            "cluster_centers": snapshot(self.cluster_centers_),
            "counts": snapshot(self.counts_),
        }

    @isolated()
    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `resume` needs to continue exactly: copies of tensors, and JSON; parameters are not
        in it.

        Tensors: `cluster_centers` and `counts` as in `state_dict`, the random `generator`'s state
        uint8 (n,), `history` float64 (steps, 4). JSON: the rest of the progress. Before the last
        seeding is done: `generator` and the contents of `Seeding.checkpoint`.
        """
        tensors, state = self._fit.checkpoint()
        if self._fit.seeding is None:
            tensors = self._centers_and_counts() | tensors
        return tensors, state

    @isolated()
    def resume(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Self:
        """Restore what `checkpoint` returned, under this model's parameters; continue with `steps`
        or `partial_fit`, or, if `is_seeded_` is False, first with `seedings`.

        Raises:
            ValueError: the shapes, or the number of clusters, are others.
        """
        fit = FitState.resumed(tensors, state, self.n_clusters, self.device)
        if fit.seeding is None:
            centers, counts = read_centers(tensors)
            place = centers.device if self.device is None else self.device
            self.cluster_centers_, self.counts_ = centers.to(place), counts.to(place)
        self._fit = fit
        return self

    @classmethod
    @isolated()
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """A model that predicts as the one that left `state`; its partial_fit continues at the same
        learning rates.

        Parameters missing from the state take their defaults. Random draws begin anew with the
        seed, and the record of steps is empty: to continue a fit, `resume` its checkpoint.

        Raises:
            ValueError: the shapes do not fit, or centers are not finite.
        """
        centers, counts = read_centers(state)
        restored = cls(len(centers), **read_parameters(state))
        restored.cluster_centers_, restored.counts_ = centers, counts
        restored._fit = FitState.begin(restored.seed)
        return restored

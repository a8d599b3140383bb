"""One-dimensional logistic probes: b + w x for every (feature, class), at the optimum of the data.

For feature j and class c a probe minimises, over b and w, with x standardised over the training rows,

    mean_i [ softplus(b + w x_ij) - y_ic (b + w x_ij) ] + ridge/2 (w^2 + (b - b0_c)^2)        (nats)

where b0_c is the log-odds of the class's prevalence: the objective of saev's SAE probes. The labels enter through sums, and
softplus through the distribution of x_j, which is the same for all classes: one pass over the codes leaves a sketch of each
feature (see `sketch`), and Newton's method goes over that, whatever the number of rows. What the sketch does not settle, by
its own bound, is settled on finer sketches of the features concerned, and what those do not, on the rows themselves. One-hot
codes need no sketch: a table of counts says all.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from assay.numerics.codes import (
    Batch,
    Codes,
    TopKCodes,
    as_codes,
    check_finite,
    check_indices,
    checked_batches,
    gather_columns,
)
from assay.numerics.isolation import isolated, snapshot
from assay.numerics.logistic import (
    ClassWeights,
    PairLosses,
    Slab,
    minimise,
    moments_of_rows,
    slab_of_rows,
    slab_of_table,
)
from assay.numerics.memory import free_bytes
from assay.numerics.ranking import check_labels, count_classes, rank_features, rank_table
from assay.numerics.scores import Judgement
from assay.numerics.sketch import CellMap, FeatureSketch

logger = logging.getLogger(__name__)

FINE_BITS = 10
"""Cells from one power of 2 to the next, as a power of 2, in the sketches of features that need more than the first."""

FINE_ROWS = 1 << 14
"""With no more rows than these the rows themselves are as few."""

CE_ERROR = 1e-10
"""Nats that a sketch may miss in a probe's loss, by its bound, without being refined."""

W_ERROR = 1e-6
"""The share of 1 + |w| that it may miss in w, as the bound and the curvature have it."""

CERTIFIED = 1e-8
"""Nats between the loss as reported and that of the rows, and the length of its gradient, at the most."""

_FEATURES = 256  # features that are solved together

_FITTED = {
    "coef_standardized": "coef_standardized_",
    "intercept_standardized": "intercept_standardized_",
    "train_ce": "loss_",
    "base_rate": "base_rate_",
    "feature_mean": "feature_mean_",
    "feature_std": "feature_std_",
    "max_abs": "max_abs_",
    "n_iter": "n_iter_",
    "converged": "converged_",
}
"""What a state calls the fitted attributes."""

_HOW = ("ridge", "balanced", "max_iter", "tol")
"""What else is in a state."""

K = TypeVar("K", int, int | None)
"""How many entries of each row are looked at; None: all."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is, and of how much: rows or features."""


class CertificateError(RuntimeError):
    """A loss that was reported is not that of the data."""


@dataclass(frozen=True)
class Certificate:
    """The largest differences between what was fitted and the rows themselves, over `pairs` probes: nats, and the
    length of the objective's gradient, which at the optimum is 0."""

    pairs: int
    ce_error: float
    gradient: float

    def check(self, bound: float = CERTIFIED) -> None:
        """Raise CertificateError where a difference is above `bound`."""
        if not max(self.ce_error, self.gradient) <= bound:
            raise CertificateError(
                f"over {self.pairs} probes the loss differs by up to {self.ce_error:.3g} nats from that of the rows, and its "
                f"gradient is up to {self.gradient:.3g}, wanted at most {bound:g}: raise max_iter, or are these not the codes "
                "and labels of the fit?"
            )


class LogisticProbe1d:
    """A logistic probe for every feature and class, by Newton's method on sketches of the features.

    The ridge acts on the standardised scale: on w and b - b0 of features with mean 0 and variance 1 over the training
    rows. A constant feature has scale 1 and w = 0. A class that no training row or every training row belongs to has no
    finite b0: it is not fitted and its entries are NaN.

    Parameters
    ----------
    ridge: lambda > 0, nats.
    class_weight: None, every row weighs the same; `balanced`, rows of the class weigh n / (2 n_c) and others
        n / (2 (n - n_c)), as in scikit-learn: b0 is then 0, and losses are weighted means, with these weights on other rows too.
    max_iter: Newton steps, taken or refused, at most.
    tol: nats above the optimum, by the Newton decrement, at which a probe is done.
        Values being standardised, the gradient is then at most sqrt(tol).
    slab_features: features worked on together, with a pass over the codes for each such slab; None: what a quarter of the
        free memory holds.
    slab_rows: rows read at once.

    Fitted attributes, float64 (features, classes) unless it is said: `coef_standardized_`, `intercept_standardized_`;
    `coef_`, `intercept_` (on raw features); `loss_`, mean CE in nats without the ridge on the training rows; `n_iter_`
    int64, Newton steps on the last points; `converged_` bool; `base_rate_` (classes,), the prevalence; `fitted_classes_`
    (classes,) bool; `feature_mean_`, `feature_std_` (population; 0 if constant) and `max_abs_` (features,).
    """

    base_rate_: Tensor
    coef_standardized_: Tensor
    intercept_standardized_: Tensor
    loss_: Tensor
    feature_mean_: Tensor
    feature_std_: Tensor
    max_abs_: Tensor
    n_iter_: Tensor
    converged_: Tensor
    n_refined_: int

    def __init__(
        self,
        ridge: float = 1e-8,
        *,
        class_weight: Literal["balanced"] | None = None,
        max_iter: int = 200,
        tol: float = 1e-16,
        slab_features: int | None = None,
        slab_rows: int = 4096,
    ) -> None:
        if not ridge > 0:
            raise ValueError(f"ridge is {ridge}, wanted more than 0: without it separable classes have no optimum")
        if class_weight not in (None, "balanced"):
            raise ValueError(f"class_weight is {class_weight!r}, wanted None or 'balanced'")
        self.ridge = ridge
        self.class_weight = class_weight
        self.max_iter = max_iter
        self.tol = tol
        self.slab_features = slab_features
        self.slab_rows = slab_rows

    def fit(
        self, codes: Codes | Tensor, labels: Tensor, n_classes: int, progress: Progress | None = None
    ) -> LogisticProbe1d:
        """Fit on codes (rows, features) and labels (rows,) int64 in 0..n_classes-1, or -1: a negative of every class.

        The work is done on the labels' device. Raises ValueError for labels of another kind and codes that are not finite.
        """
        codes = as_codes(codes)
        if codes.format == "onehot":
            check_labels(labels, codes.n_rows, n_classes)
            counts = count_classes(labels, n_classes)
            self._begin(codes.n_features, codes.n_rows, counts)
            table = count_table(codes, labels, n_classes, self.slab_rows, progress)
            self._solve_table(table, counts, progress)
        else:
            _fit([(self, codes.k)], codes, labels, n_classes, progress)
        return self._finish()

    def fit_nested(
        self, codes: Codes, labels: Tensor, n_classes: int, ks: Sequence[int], progress: Progress | None = None
    ) -> dict[int, LogisticProbe1d]:
        """As `fit` on `TopKCodes(codes, k)` for every k, from the same passes over `codes`: sparse, by falling magnitude."""
        for k in ks:
            TopKCodes(codes, k)  # raises where it cannot be
        probes = {k: self._unfitted() for k in ks}
        _fit([(probe, k) for k, probe in probes.items()], codes, labels, n_classes, progress)
        return {k: probe._finish() for k, probe in probes.items()}

    def sketch(
        self, codes: Codes | Tensor, labels: Tensor, n_classes: int, like: FeatureSketch | None = None
    ) -> FeatureSketch:
        """One pass over some of the rows, for workers that share them: with the first one's sketch as `like`, the others' can be
        merged with it, and `fit_sketch` fits what comes of it. Of dense or sparse codes; all features are held at once.
        """
        codes = as_codes(codes)
        check_labels(labels, codes.n_rows, n_classes)
        if codes.format == "onehot":
            raise ValueError(
                "found one-hot codes, which are counted and need no sketch: add up `count_table` of the parts"
            )
        columns, by_class = slice(0, codes.n_features), self.class_weight is not None
        cells = None if like is None else like.cells
        (sketch,) = _sketch(columns, [codes.k], codes, labels, n_classes, by_class, self.slab_rows, None, cells)
        return sketch

    @isolated()
    def fit_sketch(self, sketch: FeatureSketch) -> LogisticProbe1d:
        """Fit on a sketch alone. Pairs that it does not settle, by its bound, are not `converged_`: they want the rows."""
        self._begin(len(sketch.low), sketch.n_rows, sketch.class_counts)
        self._solve_sketch(slice(0, len(sketch.low)), sketch, None, len(sketch.low))
        return self._finish()

    @staticmethod
    def judge_nested(
        probes: Mapping[K, LogisticProbe1d], codes: Codes, labels: Tensor, progress: Progress | None = None
    ) -> dict[K, Judgement]:
        """As `judge` of each probe on `TopKCodes(codes, k)`, from the same passes over `codes`."""
        judged = _judge([(probe, k) for k, probe in probes.items()], codes, labels, progress)
        return dict(zip(probes, judged, strict=True))

    @staticmethod
    def certify_nested(
        probes: Mapping[K, LogisticProbe1d],
        codes: Codes,
        labels: Tensor,
        pairs: Mapping[K, Tensor],
        n_random: int = 64,
        seed: int = 0,
    ) -> dict[K, Certificate]:
        """As `certify` of each probe on `TopKCodes(codes, k)`, from the same passes over `codes`; nothing is raised yet."""
        wanted = [(probe, k, pairs[k]) for k, probe in probes.items()]
        return dict(zip(probes, _certify(wanted, codes, labels, n_random, seed), strict=True))

    @property
    @isolated()
    def fitted_classes_(self) -> Tensor:
        """Classes (classes,) bool with both positives and negatives among the training rows."""
        return (self.base_rate_ > 0) & (self.base_rate_ < 1)

    @property
    @isolated()
    def coef_(self) -> Tensor:
        """w on raw features."""
        return self.coef_standardized_ / self._scale()[:, None]

    @property
    @isolated()
    def intercept_(self) -> Tensor:
        """b on raw features."""
        return self.intercept_standardized_ - self.coef_ * self.feature_mean_[:, None]

    def loss_matrix(self, codes: Codes | Tensor, labels: Tensor, progress: Progress | None = None) -> Tensor:
        """Mean CE in nats, without the ridge, of every probe on these rows: float64 (features, classes)."""
        return self.judge(codes, labels, progress).loss

    def average_precision(self, codes: Codes | Tensor, labels: Tensor, progress: Progress | None = None) -> Tensor:
        """Average precision of every probe on these rows: float64 (features, classes).

        Rows are ranked by sign(w) x, which is the order of b + w x; w = 0 counts as positive. NaN for a class that
        is not fitted or has none of these rows.
        """
        return self.judge(codes, labels, progress).average_precision

    def confusion(self, codes: Codes | Tensor, labels: Tensor, progress: Progress | None = None) -> dict[str, Tensor]:
        """`tp`, `fp`, `fn`, `tn` of every probe at p >= 0.5 on these rows: float64 (features, classes)."""
        return self.judge(codes, labels, progress).confusion()

    def judge(self, codes: Codes | Tensor, labels: Tensor, progress: Progress | None = None) -> Judgement:
        """Loss, average precision and confusion of every probe, from the same passes over the codes."""
        codes = as_codes(codes)
        return _judge([(self, codes.k)], codes, labels, progress)[0]

    @isolated()
    def base_loss(self, labels: Tensor) -> Tensor:
        """Mean CE in nats on these labels of the intercept b0 alone: float64 (classes,), NaN for a class not fitted.

        With class weights b0 is 0, and the weighted mean log 2.
        """
        check_labels(labels, len(labels), len(self.base_rate_))
        rate = count_classes(labels, len(self.base_rate_)).double() / len(labels)
        loss = -rate * self.base_rate_.log() - (1 - rate) * (-self.base_rate_).log1p()
        if self.class_weight is not None:
            loss = torch.full_like(loss, 2.0).log()
        return torch.where(self.fitted_classes_, loss, torch.nan)

    def certify(
        self,
        codes: Codes | Tensor,
        labels: Tensor,
        pairs: Tensor,
        n_random: int = 64,
        seed: int = 0,
        bound: float = CERTIFIED,
    ) -> Certificate:
        """Hold `loss_` and the optimum against the training rows themselves, for `pairs` (p, 2) int64, feature and class,
        and as many random ones of the first's classes as `n_random` says: one pass.

        The loss is the CE without the ridge; the gradient, which is 0 at the optimum, is the objective's.

        Raises:
            CertificateError: a difference is above `bound`.
        """
        codes = as_codes(codes)
        certificate = _certify([(self, codes.k, pairs)], codes, labels, n_random, seed)[0]
        certificate.check(bound)
        return certificate

    @isolated()
    def certify_loss(self, values: Tensor, features: Tensor, labels: Tensor, loss: Tensor) -> float:
        """Largest difference in nats, or as a share of a loss above 1, between a loss that was reported and the rows themselves.

        `loss` (features, classes) is that of these rows as `judge` gives it; it is held over every class's own feature: `features`
        (classes,), and `values` (classes, rows) theirs.

        Classes that are not fitted are left out. Raises CertificateError above the bound.
        """
        classes = self.fitted_classes_.nonzero().flatten()
        error = 0.0
        for c in classes.tolist():
            losses = self._losses_of_rows(values[c : c + 1], features[c : c + 1], labels)
            theta = torch.stack(
                [matrix[features[c], c] for matrix in (self.intercept_standardized_, self.coef_standardized_)]
            )
            exact = losses.loss(classes.new_tensor([c]), theta[:, None])
            off = (exact - loss[features[c], c]).abs() / exact.clamp(min=1)
            error = max(error, float(off.nan_to_num(torch.inf)))
        if error > CERTIFIED:
            raise CertificateError(
                f"the loss on rows that were not fitted differs by up to {error:.3g} nats from that of the rows, wanted at most "
                f"{CERTIFIED:g}: are these the codes and labels that were judged?"
            )
        return error

    @isolated()
    def state_dict(self) -> dict[str, Tensor]:
        """What was fitted and how, as tensors by name, copies: float64 but for `n_iter` and `max_iter` int64, and `converged` and
        `balanced` bool. What is held in memory together, `slab_features` and `slab_rows`, changes no result, and is not in it."""
        fitted = {name: snapshot(getattr(self, attribute)) for name, attribute in _FITTED.items()}
        how = {
            "ridge": torch.tensor(self.ridge, dtype=torch.float64, device="cpu"),
            "balanced": torch.tensor(self.class_weight == "balanced", dtype=torch.bool, device="cpu"),
            "max_iter": torch.tensor(self.max_iter, dtype=torch.int64, device="cpu"),
            "tol": torch.tensor(self.tol, dtype=torch.float64, device="cpu"),
        }
        return fitted | how

    @classmethod
    @isolated()
    def from_state(cls, state: Mapping[str, Tensor]) -> LogisticProbe1d:
        """A fitted probe from its `state_dict`, that judges, certifies and fits as the one that left it.

        ValueError where something of the state is missing.
        """
        missing = [name for name in (*_FITTED, *_HOW) if name not in state]
        if missing:
            raise ValueError(
                f"found a probe's state without {', '.join(missing)}, wanted all that state_dict gives: fit it again"
            )
        probe = cls(
            float(state["ridge"]),
            class_weight="balanced" if bool(state["balanced"]) else None,
            max_iter=int(state["max_iter"]),
            tol=float(state["tol"]),
        )
        for name, attribute in _FITTED.items():
            setattr(probe, attribute, snapshot(state[name]))
        return probe

    def _unfitted(self) -> LogisticProbe1d:
        return LogisticProbe1d(
            self.ridge,
            class_weight=self.class_weight,
            max_iter=self.max_iter,
            tol=self.tol,
            slab_features=self.slab_features,
            slab_rows=self.slab_rows,
        )

    @isolated()
    def _begin(self, n_features: int, n_rows: int, counts: Tensor) -> None:
        self._counts = counts.double()
        self._n_rows = n_rows
        self.base_rate_ = self._counts / n_rows
        shape = (n_features, len(counts))
        self.coef_standardized_ = self.base_rate_.new_full(shape, torch.nan)
        self.intercept_standardized_ = self.base_rate_.new_full(shape, torch.nan)
        self.loss_ = self.base_rate_.new_full(shape, torch.nan)
        self.feature_mean_, self.feature_std_, self.max_abs_ = self.base_rate_.new_zeros(3, n_features)
        self.n_iter_ = torch.zeros(shape, dtype=torch.int64, device=counts.device)
        self.converged_ = torch.ones(shape, dtype=torch.bool, device=counts.device)
        self.n_refined_ = 0

    def _finish(self) -> LogisticProbe1d:
        if not self.converged_.all():
            logger.warning(
                "%d of %d probes are not at their optimum after %d iterations: raise max_iter",
                int((~self.converged_).sum()),
                self.converged_.numel(),
                self.max_iter,
            )
        return self

    @isolated()
    def _solve_table(self, table: Tensor, counts: Tensor, progress: Progress | None) -> None:
        ones = table.sum(1).double()
        self.feature_mean_ = ones / self._n_rows
        self.feature_std_ = (self.feature_mean_ * (1 - self.feature_mean_)).sqrt()
        self.max_abs_ = (ones > 0).double()
        for columns in _ranges(len(table), 4 * _FEATURES):
            slab = slab_of_table(table[columns], counts.double(), self._n_rows)
            self._solve(columns, [slab], self._fitted_pairs(columns))
            _tell(progress, "probes", columns.stop, len(table))

    @isolated()
    def _solve_sketch(self, columns: slice, sketch: FeatureSketch, progress: Progress | None, total: int) -> None:
        """Fit the features of `columns` on their sketch; afterwards `converged_` is False where it did not settle them."""
        for part in _ranges(len(sketch.low), _FEATURES):
            here = slice(columns.start + part.start, columns.start + part.stop)
            some = sketch[part]
            statistics = some.statistics()
            self.feature_mean_[here] = statistics.mean
            self.feature_std_[here] = statistics.std
            self.max_abs_[here] = torch.maximum(statistics.low.abs(), statistics.high.abs())
            slabs = [some.slab(statistics, nodes=nodes) for nodes in (1, 3)]
            self._solve(here, slabs, self._fitted_pairs(here))
            self.converged_[here] &= statistics.resolved[:, None] | ~self.fitted_classes_
            _tell(progress, "probes", here.stop, total)

    @isolated()
    def _refine(self, features: Tensor, values: Tensor, labels: Tensor) -> None:
        """Fit what is not settled of `features` (f,) again: `values` (f, rows) are theirs."""
        n_classes = len(self.base_rate_)
        for part in _ranges(len(features), 32):
            here = features[part]
            # The sketch's may be those of too wide cells.
            self.feature_mean_[here], self.feature_std_[here] = moments_of_rows(values[part])
            if self.class_weight is None and len(labels) > FINE_ROWS:
                sketch = FeatureSketch(CellMap.of_all_rows(values[part], FINE_BITS), n_classes)
                sketch.add(values[part].T, labels)
                self._solve(here, [sketch.slab(sketch.statistics())], self._open_pairs(here))
            left = self._open_pairs(here)
            if len(left):
                self._solve(here, [slab_of_rows(values[part], labels)], left)

    def _solve(self, features: slice | Tensor, slabs: list[Slab], pairs: Tensor) -> None:
        """Fit `pairs` of `features`, on one slab after the other, and keep what the last says.

        `converged_` is then whether a probe is at its optimum, and the slab's bound says that it is the rows' optimum.
        """
        if len(pairs) == 0:
            return
        classes = pairs % len(self.base_rate_)
        centre = self._centre()[:, classes]
        theta = centre
        for number, slab in enumerate(slabs):
            losses = self._losses(slab, features, self._counts, self._n_rows)

            def evaluate(problems: Tensor, theta: Tensor, losses: PairLosses = losses) -> tuple[Tensor, Tensor, Tensor]:
                value, gradient, hessian = losses.derivatives(pairs[problems], theta)
                away = theta - centre[:, problems]
                hessian[::2] += self.ridge
                return value + 0.5 * self.ridge * away.square().sum(0), gradient + self.ridge * away, hessian

            last = number == len(slabs) - 1
            theta, steps, done = minimise(
                evaluate, theta, max_iter=self.max_iter, tol=self.tol if last else max(self.tol, 1e-9)
            )
        loss, _, (bb, bw, ww) = losses.derivatives(pairs, theta)
        bound = losses.bound(pairs, theta)
        curvature = ww + self.ridge - bw.square() / (bb + self.ridge)
        w = theta[1].abs()
        settled = (bound <= CE_ERROR) & (8 * bound <= W_ERROR * (1 + w) * w * curvature)
        settled |= bound == 0
        self._put(self.intercept_standardized_, features, pairs, theta[0])
        self._put(self.coef_standardized_, features, pairs, theta[1])
        self._put(self.loss_, features, pairs, loss)
        self._put(self.n_iter_, features, pairs, steps)
        self._put(self.converged_, features, pairs, done & settled)

    def _put(self, matrix: Tensor, features: slice | Tensor, pairs: Tensor, entries: Tensor) -> None:
        part = matrix[features]
        part.view(-1)[pairs] = entries
        matrix[features] = part

    def _centre(self) -> Tensor:
        """b0 and 0 of each class, float64 (2, classes)."""
        b0 = self.base_rate_.logit() if self.class_weight is None else torch.zeros_like(self.base_rate_)
        return torch.stack([b0, torch.zeros_like(b0)])

    def _scale(self) -> Tensor:
        return torch.where(self.feature_std_ > 0, self.feature_std_, 1.0)

    def _fitted_pairs(self, features: slice) -> Tensor:
        """Numbers of the slab's pairs whose class is fitted, int64 (pairs,)."""
        return self.fitted_classes_.expand(features.stop - features.start, -1).flatten().nonzero().squeeze(1)

    def _open_pairs(self, features: Tensor) -> Tensor:
        """Numbers of the pairs of some features that are not settled, int64 (pairs,)."""
        return (~self.converged_[features] & self.fitted_classes_).flatten().nonzero().squeeze(1)

    def _losses(self, slab: Slab, features: slice | Tensor, counts: Tensor, n_rows: int) -> PairLosses:
        weights = None
        if self.class_weight == "balanced":
            # Of the training rows, whichever rows these are: up to a factor, which the mean takes out again.
            weights = ClassWeights.balanced(self.base_rate_, 1)
        return PairLosses(slab, self.feature_mean_[features], self._scale()[features], counts.double(), n_rows, weights)

    @isolated()
    def _differences(self, values: Tensor, features: Tensor, pairs: Tensor, labels: Tensor) -> Tensor:
        """Largest CE error and gradient over `pairs` (p, 2), all of `features` (f,), whose `values` are (f, rows).

        The features' mean and scale are the rows' own here, so that what the fit took for them is held against these too.
        """
        feature, label = pairs.T.contiguous()
        place = torch.searchsorted(features, feature)
        mean, std = moments_of_rows(values)
        scale = torch.where(std > 0, std, 1.0)
        w = self.coef_standardized_[feature, label] / self._scale()[feature]
        b = self.intercept_standardized_[feature, label] + w * (mean[place] - self.feature_mean_[feature])
        theta = torch.stack([b, w * scale[place]])
        losses = dataclasses.replace(self._losses_of_rows(values, features, labels), mean=mean, scale=scale)
        loss, gradient, _ = losses.derivatives(place * len(self.base_rate_) + label, theta)
        gradient += self.ridge * (theta - self._centre()[:, label])
        error = (loss - self.loss_[feature, label]).abs()
        return torch.stack([error, gradient.norm(dim=0)]).nan_to_num(torch.inf).amax(1).cpu()

    @isolated()
    def _losses_of_rows(self, values: Tensor, features: slice | Tensor, labels: Tensor) -> PairLosses:
        """The losses of features, whose `values` are (features, rows), on every row."""
        counts = count_classes(labels, len(self.base_rate_))
        return self._losses(slab_of_rows(values, labels), features, counts, len(labels))

    @isolated()
    def _loss(self, slab: Slab, columns: slice, counts: Tensor, n_rows: int) -> Tensor:
        pairs = self._fitted_pairs(columns)
        theta = torch.stack([self.intercept_standardized_[columns], self.coef_standardized_[columns]]).flatten(1)
        matrix = torch.full_like(self.loss_[columns], torch.nan)
        matrix.view(-1)[pairs] = self._losses(slab, columns, counts, n_rows).loss(pairs, theta[:, pairs])
        return matrix

    @isolated()
    def _loss_of_values(self, values: Tensor, columns: slice, labels: Tensor, counts: Tensor) -> Tensor:
        """Losses on rows at hand, `values` (features, rows): on sketches of them, where these are exact enough."""
        n_classes = len(self.base_rate_)
        by_class = self.class_weight is not None
        matrix = torch.full((len(values), n_classes), torch.nan, dtype=torch.float64, device=values.device)
        theta = torch.stack([self.intercept_standardized_[columns], self.coef_standardized_[columns]]).flatten(1)
        width = 16 if by_class else 64
        for part in _ranges(len(values), width):
            here = slice(columns.start + part.start, columns.start + part.stop)
            some, mine = values[part], theta[:, part.start * n_classes : part.stop * n_classes]
            pairs = self._fitted_pairs(here)
            for bits in (5, FINE_BITS, None):
                if len(pairs) == 0 or (bits == FINE_BITS and by_class):
                    continue
                if bits is None:
                    losses = self._losses_of_rows(some, here, labels)
                else:
                    cells = CellMap.of_rows(some, bits) if bits != FINE_BITS else CellMap.of_all_rows(some, bits)
                    sketch = FeatureSketch(cells, n_classes, by_class=by_class)
                    sketch.add(some.T, labels, first_feature=here.start)
                    losses = self._losses(sketch.slab(sketch.statistics()), here, counts, len(labels))
                matrix[part].view(-1)[pairs] = losses.loss(pairs, mine[:, pairs])
                missed = losses.bound(pairs, mine[:, pairs]) + losses.rounding(pairs, mine[:, pairs])
                pairs = pairs[missed > 10 * CE_ERROR]
        return matrix

    @isolated()
    def _choose(self, ranked: Tensor, columns: slice, counts: Tensor, n_rows: int) -> Tensor:
        """Of ranks both ways those of the probes' signs: average precision, true positives and predicted (3, f, classes)."""
        w, b = self.coef_standardized_[columns], self.intercept_standardized_[columns]
        chosen = torch.where(w < 0, ranked[:, 1], ranked[:, 0])
        everything = torch.stack([counts.double(), torch.full_like(counts, n_rows).double()])[:, None]
        chosen[1:] = torch.where(w == 0, torch.where(b.sigmoid() >= 0.5, everything, 0.0), chosen[1:])
        return chosen

    def _width(self, feature_bytes: int, device: torch.device) -> int:
        """Features worked on together, each of which takes so much memory."""
        fits = max(1, free_bytes(device) // 4 // feature_bytes)
        return min(self.slab_features or fits, fits)


def _fit(
    probes: list[tuple[LogisticProbe1d, int | None]],
    codes: Codes,
    labels: Tensor,
    n_classes: int,
    progress: Progress | None,
) -> None:
    """Fit probes to the first k entries of each row, for each its own k, in the same passes over the codes."""
    check_labels(labels, codes.n_rows, n_classes)
    for probe, _ in probes:
        probe._begin(codes.n_features, codes.n_rows, count_classes(labels, n_classes))
    first = probes[0][0]
    by_class = first.class_weight is not None
    feature_bytes = len(probes) * FeatureSketch.bytes_per_feature(n_classes, by_class=by_class)
    for columns in _ranges(codes.n_features, first._width(feature_bytes, labels.device)):
        sketches = _sketch(
            columns, [k for _, k in probes], codes, labels, n_classes, by_class, first.slab_rows, progress
        )
        for (probe, _), sketch in zip(probes, sketches, strict=True):
            probe._solve_sketch(columns, sketch, progress, codes.n_features)
        del sketches
    wanted = []
    for number, (probe, _) in enumerate(probes):
        open_ = ~probe.converged_ & probe.fitted_classes_
        probe.n_refined_ = int(open_.sum())
        wanted += [(number, feature) for feature in open_.any(1).nonzero().flatten().tolist()]
    for some in _ranges(len(wanted), first._width(8 * codes.n_rows, labels.device)):
        groups = [
            (
                probe,
                torch.tensor([f for n, f in wanted[some] if n == number], device=labels.device, dtype=torch.int64),
                k,
            )
            for number, (probe, k) in enumerate(probes)
        ]
        columns_of = _gather([(features, k) for _, features, k in groups], codes, labels, first.slab_rows, progress)
        for (probe, features, _), values in zip(groups, columns_of, strict=True):
            probe._refine(features, values, labels)
            _tell(progress, "refined", some.stop, len(wanted))


def _judge(
    probes: Sequence[tuple[LogisticProbe1d, int | None]], codes: Codes, labels: Tensor, progress: Progress | None
) -> list[Judgement]:
    """Judge probes on the first k entries of each row, for each its own k, in the same passes over the codes."""
    first = probes[0][0]
    n_features, n_classes = first.coef_standardized_.shape
    if codes.n_features != n_features:
        raise ValueError(
            f"codes have {codes.n_features} features, wanted {n_features}, as in fit: give codes of the same model"
        )
    check_labels(labels, codes.n_rows, n_classes)
    counts = count_classes(labels, n_classes)
    with isolated():
        matrices = [torch.full_like(first.coef_standardized_, torch.nan).repeat(4, 1, 1) for _ in probes]
        thresholds = [p.feature_mean_[:, None] - p.intercept_standardized_ / p.coef_ for p, _ in probes]
    if codes.format == "onehot":
        table = count_table(codes, labels, n_classes, first.slab_rows, progress)
        with isolated():
            for columns in _ranges(n_features, _FEATURES):
                slab = slab_of_table(table[columns], counts.double(), codes.n_rows)
                ranked = rank_table(table[columns], counts, codes.n_rows, thresholds[0][columns])
                matrices[0][0, columns] = first._loss(slab, columns, counts, codes.n_rows)
                matrices[0][1:, columns] = first._choose(ranked, columns, counts, codes.n_rows)
    else:
        for columns in _ranges(n_features, first._width(4 * codes.n_rows * len(probes), labels.device)):
            features = torch.arange(columns.start, columns.stop, dtype=torch.int64, device=labels.device)
            wanted = [(features, k) for _, k in probes]
            for values, (probe, _), matrix, threshold in zip(
                _gather(wanted, codes, labels, first.slab_rows, progress), probes, matrices, thresholds, strict=True
            ):
                with isolated():
                    ranked = rank_features(values, labels, n_classes, threshold[columns])
                    matrix[0, columns] = probe._loss_of_values(values, columns, labels, counts)
                    matrix[1:, columns] = probe._choose(ranked, columns, counts, codes.n_rows)
                _tell(progress, "ranked", columns.stop, n_features)
    with isolated():
        for (probe, _), matrix in zip(probes, matrices, strict=True):
            matrix[:, :, ~probe.fitted_classes_] = torch.nan
        return [Judgement(m[0], m[1], m[2], m[3], counts.double(), codes.n_rows) for m in matrices]


def _certify(
    probes: Sequence[tuple[LogisticProbe1d, int | None, Tensor]],
    codes: Codes,
    labels: Tensor,
    n_random: int,
    seed: int,
) -> list[Certificate]:
    """Certify probes on the first k entries of each row, for each its own k and pairs, in the same passes over the codes."""
    generator = torch.Generator().manual_seed(seed)
    place = labels.device
    chosen = []
    for probe, _, pairs in probes:
        fitted = probe.fitted_classes_.nonzero().flatten().cpu()
        n_drawn = n_random if len(fitted) else 0
        features = torch.randint(codes.n_features, (n_drawn,), generator=generator, device="cpu")
        classes = torch.randint(max(1, len(fitted)), (n_drawn,), generator=generator, device="cpu")
        both = torch.cat([pairs.cpu(), torch.stack([features, fitted[classes]], 1)]).unique(dim=0)  # type: ignore[no-untyped-call]
        chosen.append(both[probe.fitted_classes_.cpu()[both[:, 1]]].to(place))
    worst = torch.zeros(len(probes), 2, dtype=torch.float64, device="cpu")
    first = probes[0][0]
    most = max(int(pairs[:, 0].unique().numel()) for pairs in chosen)
    for some in _ranges(most, max(1, first._width(16 * codes.n_rows * len(probes), place))):
        columns = [pairs[:, 0].unique()[some] for pairs in chosen]
        wanted = [(features, k) for features, (_, k, _) in zip(columns, probes, strict=True)]
        gathered = _gather(wanted, codes, labels, first.slab_rows, None)
        for number, (values, features, (probe, _, _)) in enumerate(zip(gathered, columns, probes, strict=True)):
            pairs = chosen[number]
            pairs = pairs[torch.isin(pairs[:, 0], features)]
            if len(pairs):
                worst[number] = torch.maximum(worst[number], probe._differences(values, features, pairs, labels))
    return [Certificate(len(pairs), *map(float, each)) for pairs, each in zip(chosen, worst, strict=True)]


def _gather(
    wanted: Sequence[tuple[Tensor, int | None]],
    codes: Codes,
    labels: Tensor,
    slab_rows: int,
    progress: Progress | None,
) -> list[Tensor]:
    def tell(done: int) -> None:
        _tell(progress, "gathered", done, codes.n_rows)

    return gather_columns(codes, wanted, slab_rows, labels.device, tell)


def _sketch(
    columns: slice,
    ks: list[int | None],
    codes: Codes,
    labels: Tensor,
    n_classes: int,
    by_class: bool,
    slab_rows: int,
    progress: Progress | None,
    cells: CellMap | None = None,
) -> list[FeatureSketch]:
    """Sketches of some features, of the first k entries of each row for every k, from one pass; on `cells`, if they are given."""
    order = sorted(range(len(ks)), key=lambda i: ks[i] or 0)
    sketches: list[FeatureSketch] = []
    for rows, batch in checked_batches(codes, slab_rows):
        batch = {name: tensor.to(labels.device) for name, tensor in batch.items() if name in ("values", "indices")}
        if codes.format == "dense":
            x = batch["values"][:, columns].float()
            if not sketches:
                sketches = [FeatureSketch(cells or CellMap.of_rows(x.T), n_classes, by_class=by_class)]
            sketches[0].add(x, labels[rows], rows.start, columns.start)
        else:
            check_indices(batch["indices"], codes.n_features)
            check_finite(batch, rows.start)
            if not sketches:
                feature, value, _, _ = _events(batch, columns, labels[rows])
                cells = cells or CellMap.of_events(feature, value, columns.stop - columns.start)
                sketches = [FeatureSketch(cells, n_classes, by_class=by_class) for _ in ks]
            # An entry beyond the first k of a row is of the sketches with a larger k alone.
            begin: int | None = 0
            for i in order:
                part = {name: tensor[:, begin : ks[i]] for name, tensor in batch.items()}
                feature, value, label, _ = _events(part, columns, labels[rows])
                sketches[i].add_events(feature, value, label, columns.start)
                begin = ks[i]
            sketches[order[0]].add_rows(labels[rows])
        _tell(progress, "rows", rows.stop, codes.n_rows)
    for smaller, larger in itertools.pairwise(order):
        sketches[larger].merge(sketches[smaller])
    return sketches


def _events(batch: Batch, columns: slice, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Feature, value, label and row of each nonzero of a sparse batch that is of the columns, counted from the first."""
    values, indices = batch["values"], batch["indices"].long()
    kept = (values != 0) & (indices >= columns.start) & (indices < columns.stop)
    row = kept.nonzero()[:, 0]
    return indices[kept] - columns.start, values[kept].double(), labels[row], row


def count_table(
    codes: Codes, labels: Tensor, n_classes: int, slab_rows: int, progress: Progress | None = None
) -> Tensor:
    """Rows of each (feature, class) of one-hot codes, int64 (features, n_classes + 1); the last column is label -1."""
    with isolated():
        table = torch.zeros(codes.n_features * (n_classes + 1), dtype=torch.int64, device=labels.device)
        classes = torch.where(labels < 0, n_classes, labels)
    for rows, batch in checked_batches(codes, slab_rows):
        with isolated():
            features = batch["indices"].to(labels.device, torch.int64)
            check_indices(features, codes.n_features)
            table.scatter_add_(0, features * (n_classes + 1) + classes[rows], torch.ones_like(features))
        _tell(progress, "rows", rows.stop, codes.n_rows)
    return table.view(codes.n_features, n_classes + 1)


def _ranges(stop: int, width: int) -> Iterator[slice]:
    for start in range(0, stop, width):
        yield slice(start, min(start + width, stop))


def _tell(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)

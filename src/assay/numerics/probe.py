"""One-dimensional logistic probes: b + w x for every (feature, class), fitted to the optimum on the data itself.

For feature j and class c a probe minimises, over b and w, with x standardised over the training rows,

    mean_i [ softplus(b + w x_ij) - y_ic (b + w x_ij) ] + ridge/2 (w^2 + (b - b0_c)^2)        (nats)

where b0_c is the log-odds of the class's prevalence: the objective of saev's SAE probes. The solver goes over all rows
in each iteration; but for one-hot codes a table of counts, made in one pass, stands in for the rows, exactly.
"""

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from assay.numerics.codes import Codes, as_codes, gather_features
from assay.numerics.logistic import PairLosses, Slab, count_table, minimise, slab_of_rows, slab_of_table
from assay.numerics.ranking import average_precision_both_ways, average_precision_of_table, check_labels, count_classes

logger = logging.getLogger(__name__)

_PAIR_BYTES = 256  # what the solver holds for one (feature, class)


class LogisticProbe1d:
    """A logistic probe for every feature and class, by Newton's method over slabs of features.

    The ridge acts on the standardised scale: on w and b - b0 of features with mean 0 and variance 1 over the training
    rows. A constant feature has scale 1 and w = 0. A class that no training row or every training row belongs to has no
    finite b0: it is not fitted and its entries are NaN.

    Parameters
    ----------
    ridge: lambda > 0, nats.
    max_iter: Newton steps, taken or refused, at most.
    tol: nats above the optimum, by the Newton decrement, at which a probe is done.
        Values being standardised, the gradient is then at most sqrt(tol).
    slab_bytes: memory for the features that are worked on together; a pass over the codes is made for each slab.
    batch_size: rows read at once.

    Fitted attributes, float64 (features, classes) unless it is said: `coef_standardized_`, `intercept_standardized_`;
    `coef_`, `intercept_` (on raw features); `base_rate_` (classes,), the prevalence; `fitted_classes_` (classes,) bool;
    `feature_mean_`, `feature_std_` (population; 0 if constant) and `max_abs_` (features,); `n_iter_`, `converged_`.
    """

    base_rate_: Tensor
    coef_standardized_: Tensor
    intercept_standardized_: Tensor
    feature_mean_: Tensor
    feature_std_: Tensor
    max_abs_: Tensor
    n_iter_: int
    converged_: bool

    def __init__(
        self,
        ridge: float = 1e-8,
        *,
        max_iter: int = 200,
        tol: float = 1e-16,
        slab_bytes: int = 256 * 2**20,
        batch_size: int = 4096,
    ) -> None:
        self.ridge = ridge
        self.max_iter = max_iter
        self.tol = tol
        self.slab_bytes = slab_bytes
        self.batch_size = batch_size

    def fit(
        self,
        codes: Codes | Tensor,
        labels: Tensor,
        n_classes: int,
        on_slab: Callable[[int, int], None] | None = None,
    ) -> "LogisticProbe1d":
        """Fit on codes (rows, features) and labels (rows,) int64 in 0..n_classes-1, or -1: a negative of every class.

        The work is done on the labels' device. `on_slab(done, total)` is called with features after each slab. Raises
        ValueError for labels of another kind, codes that are not finite, and a ridge that is not positive.
        """
        if not self.ridge > 0:
            raise ValueError(f"ridge is {self.ridge}, wanted more than 0: without it separable classes have no optimum")
        codes = as_codes(codes)
        check_labels(labels, codes.n_rows, n_classes)
        counts = count_classes(labels, n_classes)
        self.base_rate_ = counts.double() / codes.n_rows
        shape = (codes.n_features, n_classes)
        self.coef_standardized_ = self.base_rate_.new_full(shape, torch.nan)
        self.intercept_standardized_ = self.base_rate_.new_full(shape, torch.nan)
        self.feature_mean_, self.feature_std_, self.max_abs_ = self.base_rate_.new_zeros(3, codes.n_features)
        self.n_iter_, self.converged_ = 0, True
        for slab in self._slabs(codes, labels, n_classes):
            self.feature_mean_[slab.columns] = slab.mean
            self.feature_std_[slab.columns] = slab.std
            self.max_abs_[slab.columns] = slab.max_abs
            self._fit_slab(slab, counts, codes.n_rows)
            if on_slab is not None:
                on_slab(slab.columns.stop, codes.n_features)
        if not self.converged_:
            logger.warning("probes not at their optimum after %d iterations: raise max_iter", self.n_iter_)
        return self

    def _fit_slab(self, slab: Slab, counts: Tensor, n_rows: int) -> None:
        losses = self._losses(slab, counts, n_rows)
        pairs = self._fitted_pairs(slab)
        b0 = self.base_rate_.logit()[pairs % len(counts)]
        centre = torch.stack([b0, torch.zeros_like(b0)])

        def evaluate(problems: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            value, gradient, hessian = losses.derivatives(pairs[problems], theta)
            away = theta - centre[:, problems]
            hessian[::2] += self.ridge
            return value + 0.5 * self.ridge * away.square().sum(0), gradient + self.ridge * away, hessian

        theta, n_iter, converged = minimise(evaluate, centre, max_iter=self.max_iter, tol=self.tol)
        self.intercept_standardized_[slab.columns].view(-1)[pairs] = theta[0]
        self.coef_standardized_[slab.columns].view(-1)[pairs] = theta[1]
        self.n_iter_ = max(self.n_iter_, n_iter)
        self.converged_ = self.converged_ and converged

    @property
    def fitted_classes_(self) -> Tensor:
        """Classes (classes,) bool with both positives and negatives among the training rows."""
        return (self.base_rate_ > 0) & (self.base_rate_ < 1)

    @property
    def coef_(self) -> Tensor:
        """w on raw features."""
        return self.coef_standardized_ / self._scale()[:, None]

    @property
    def intercept_(self) -> Tensor:
        """b on raw features."""
        return self.intercept_standardized_ - self.coef_ * self.feature_mean_[:, None]

    def loss_matrix(self, codes: Codes | Tensor, labels: Tensor) -> Tensor:
        """Mean CE in nats, without the ridge, of every probe on these rows: float64 (features, classes)."""
        codes = self._check(codes, labels)
        counts = count_classes(labels, len(self.base_rate_))
        matrix = torch.full_like(self.coef_standardized_, torch.nan)
        for slab in self._slabs(codes, labels, len(counts)):
            theta = torch.stack([self.intercept_standardized_[slab.columns], self.coef_standardized_[slab.columns]])
            pairs = self._fitted_pairs(slab)
            losses = self._losses(slab, counts, codes.n_rows)
            matrix[slab.columns].view(-1)[pairs] = losses.loss(pairs, theta.flatten(1)[:, pairs])
        return matrix

    def base_loss(self, labels: Tensor) -> Tensor:
        """Mean CE in nats on these labels of the intercept b0 alone: float64 (classes,), NaN for a class not fitted."""
        check_labels(labels, len(labels), len(self.base_rate_))
        rate = count_classes(labels, len(self.base_rate_)).double() / len(labels)
        loss = -rate * self.base_rate_.log() - (1 - rate) * (-self.base_rate_).log1p()
        return torch.where(self.fitted_classes_, loss, torch.nan)

    def average_precision(self, codes: Codes | Tensor, labels: Tensor) -> Tensor:
        """Average precision of every probe on these rows: float64 (features, classes).

        Rows are ranked by sign(w) x, which is the order of b + w x; w = 0 counts as positive. NaN for a class that
        is not fitted or has none of these rows.
        """
        codes = self._check(codes, labels)
        n_classes = len(self.base_rate_)
        counts = count_classes(labels, n_classes)
        if codes.format == "onehot":
            table = count_table(codes, labels, n_classes, self.batch_size)
            descending, ascending = average_precision_of_table(table, counts, codes.n_rows)
        else:
            descending, ascending = self.base_rate_.new_empty(2, codes.n_features, n_classes)
            for columns, values in self._gathered(codes, labels, n_classes):
                descending[columns], ascending[columns] = average_precision_both_ways(values, labels, n_classes)
        chosen = torch.where(self.coef_standardized_ < 0, ascending, descending)
        return torch.where(self.fitted_classes_, chosen, torch.nan)

    def state_dict(self) -> dict[str, Tensor]:
        """What was fitted, as tensors by name: float64, `n_iter` int64 and `converged` bool of shape ()."""
        return {
            "coef_standardized": self.coef_standardized_,
            "intercept_standardized": self.intercept_standardized_,
            "base_rate": self.base_rate_,
            "feature_mean": self.feature_mean_,
            "feature_std": self.feature_std_,
            "max_abs": self.max_abs_,
            "n_iter": torch.tensor(self.n_iter_),
            "converged": torch.tensor(self.converged_),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "LogisticProbe1d":
        """A fitted probe from its `state_dict`, with default hyper-parameters."""
        probe = cls()
        probe.coef_standardized_ = state["coef_standardized"]
        probe.intercept_standardized_ = state["intercept_standardized"]
        probe.base_rate_ = state["base_rate"]
        probe.feature_mean_ = state["feature_mean"]
        probe.feature_std_ = state["feature_std"]
        probe.max_abs_ = state["max_abs"]
        probe.n_iter_ = int(state["n_iter"])
        probe.converged_ = bool(state["converged"])
        return probe

    def _check(self, codes: Codes | Tensor, labels: Tensor) -> Codes:
        codes = as_codes(codes)
        if codes.n_features != len(self.coef_standardized_):
            raise ValueError(
                f"codes have {codes.n_features} features, wanted {len(self.coef_standardized_)}, "
                "as in fit: give codes of the same model"
            )
        check_labels(labels, codes.n_rows, len(self.base_rate_))
        return codes

    def _scale(self) -> Tensor:
        return torch.where(self.feature_std_ > 0, self.feature_std_, 1.0)

    def _fitted_pairs(self, slab: Slab) -> Tensor:
        """Numbers of the slab's pairs whose class is fitted, int64 (pairs,)."""
        return self.fitted_classes_.expand(len(slab.mean), -1).flatten().nonzero().squeeze(1)

    def _losses(self, slab: Slab, counts: Tensor, n_rows: int) -> PairLosses:
        mean, scale = self.feature_mean_[slab.columns], self._scale()[slab.columns]
        return PairLosses(slab, mean, scale, counts.double(), n_rows)

    def _slabs(self, codes: Codes, labels: Tensor, n_classes: int) -> Iterator[Slab]:
        """Features as atoms, a slab at a time: one pass over one-hot codes in all, else one pass a slab."""
        if codes.format == "onehot":
            table = count_table(codes, labels, n_classes, self.batch_size)
            counts = count_classes(labels, n_classes)
            for columns in self._columns(codes, n_classes, 0):
                yield slab_of_table(columns, table[columns], counts, codes.n_rows)
        else:
            for columns, values in self._gathered(codes, labels, n_classes):
                yield slab_of_rows(columns, values, labels, n_classes)

    def _gathered(self, codes: Codes, labels: Tensor, n_classes: int) -> Iterator[tuple[slice, Tensor]]:
        for columns in self._columns(codes, n_classes, 4 * codes.n_rows):
            yield columns, gather_features(codes, columns.start, columns.stop, self.batch_size, labels.device)

    def _columns(self, codes: Codes, n_classes: int, feature_bytes: int) -> Iterator[slice]:
        width = max(1, self.slab_bytes // (feature_bytes + _PAIR_BYTES * n_classes))
        for start in range(0, codes.n_features, width):
            yield slice(start, min(start + width, codes.n_features))

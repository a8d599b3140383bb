"""The estimator, and functions that fit, judge and certify several of them, each on its own K, in
the same passes over the codes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from torch import Tensor

from assay.codes import Codes
from assay.numerics.codes import as_codes
from assay.numerics.fitted import NotFittedError
from assay.numerics.probe.certificate import CERTIFIED, Certificate, Certifying, certify_loss
from assay.numerics.probe.judge import Judging, base_loss
from assay.numerics.probe.labeled import LabeledCodes, Progress, check_slabs
from assay.numerics.probe.passes import SketchPass
from assay.numerics.probe.sketch import FeatureSketch
from assay.numerics.probe.solver import Fitting, fit_sketch
from assay.numerics.probe.state import FittedProbes, ProbeSettings
from assay.numerics.scores import Judgment

K = TypeVar("K", bound=int | None)
"""How many entries of each row are looked at; None: all."""


def _fitted(name: str) -> Any:
    """A read-only attribute of the estimator: the one of that name in `FittedProbes`."""
    return property(lambda probe: getattr(probe.fitted_, name))


class LogisticProbe1d:
    """A logistic probe for every feature and class, by Newton's method on sketches of the features.

    One pass over the codes sorts the values of each feature into cells; the probes of all classes
    are solved on these, and a bound says which have to be solved again, on finer cells or on the
    rows. The pass takes O(rows x features); the solving takes O(features x classes x cells) for
    each Newton step, whatever the number of rows. Memory is some 350 KB a feature, times classes +
    1 with class weights; where that is too much for all features, there are more passes. A feature
    that needs its rows takes 8 bytes a row. One-hot codes take a table of counts, features x
    classes. Judging sorts the rows of each feature, in slabs of features.

    The ridge acts on the standardized scale: on w and b - b0 of features with mean 0 and variance 1
    over the training rows. A constant feature has scale 1 and w = 0. A class that no training row
    or every training row belongs to has no finite b0: it is not fitted and its entries are NaN.

    Several K of the same top-K codes are fitted, judged and certified in the same passes by
    `fit_sweep`, `judge_sweep` and `certify_sweep`; the methods are the case of one.

    Args:
        ridge: lambda > 0, nats.
        class_weight: None: every row weighs the same. "balanced": rows of the class weigh n / (2
            n_c) and others n / (2 (n - n_c)), as in scikit-learn; b0 is then 0, and losses are
            weighted means, with these weights on other rows too.
        max_iter: Newton steps, taken or refused, at most.
        tol: nats above the optimum, by the Newton decrement, at which a probe is done. Values being
            standardized, the gradient is then at most sqrt(tol).
        slab_features: features worked on together, in whole groups (256 where classes are not
            weighted), with a pass over the codes for each such slab. None: as many as a quarter of
            the free memory holds. No bit depends on it.
        slab_rows: rows read at once.

    Attributes:
        coef_standardized_: w on standardized features, float64 (features, classes).
        intercept_standardized_: b on standardized features, float64 (features, classes).
        coef_: w on raw features, float64 (features, classes).
        intercept_: b on raw features, float64 (features, classes).
        loss_: mean CE on the training rows, nats, without the ridge: float64 (features, classes).
        n_iter_: Newton steps on the last points, int64 (features, classes).
        converged_: whether a probe is at the optimum of the rows, bool (features, classes).
        base_rate_: the prevalence, float64 (classes,).
        fitted_classes_: classes with both positives and negatives among the training rows, bool
            (classes,).
        feature_mean_: mean over the training rows, float64 (features,).
        feature_std_: population standard deviation over them, 0 of a constant: float64 (features,).
        max_abs_: largest magnitude over them, float64 (features,).
        n_refined_: pairs that the first sketch did not settle; 0 of a probe that comes from its
            state.
        fitted_: all of these as one value, `FittedProbes`.

    Raises:
        ValueError: a parameter is out of range.

    Examples:
        >>> import torch
        >>> from assay.numerics.probe import LogisticProbe1d
        >>> codes = torch.tensor([[1.0, 4.0], [1.0, 9.0], [2.0, 5.0], [2.0, 8.0]])
        >>> labels = torch.tensor([0, 1, 0, 1])
        >>> probe = LogisticProbe1d(ridge=1e-3).fit(codes, labels, n_classes=2)
        >>> probe.loss_.argmin(0).tolist(), probe.judge(codes, labels).average_precision[1].tolist()
        ([1, 1], [1.0, 1.0])
    """

    coef_standardized_: Tensor = _fitted("coef_standardized")
    intercept_standardized_: Tensor = _fitted("intercept_standardized")
    coef_: Tensor = _fitted("coef")
    intercept_: Tensor = _fitted("intercept")
    loss_: Tensor = _fitted("train_ce")
    n_iter_: Tensor = _fitted("n_iter")
    converged_: Tensor = _fitted("converged")
    base_rate_: Tensor = _fitted("base_rate")
    fitted_classes_: Tensor = _fitted("fitted_classes")
    feature_mean_: Tensor = _fitted("feature_mean")
    feature_std_: Tensor = _fitted("feature_std")
    max_abs_: Tensor = _fitted("max_abs")
    n_refined_: int = _fitted("n_refined")

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
        self.ridge = ridge
        self.class_weight = class_weight
        self.max_iter = max_iter
        self.tol = tol
        self.slab_features = slab_features
        self.slab_rows = slab_rows
        self._fitted: FittedProbes | None = None
        check_slabs(slab_rows, slab_features)
        _ = self.settings  # which refuses what cannot be

    def __repr__(self) -> str:
        parameters = (
            f"{name}={value!r}" for name, value in vars(self).items() if name != "_fitted"
        )
        return f"LogisticProbe1d({', '.join(parameters)})"

    @property
    def fitted_(self) -> FittedProbes:
        """All that was fitted, as one value.

        Raises:
            NotFittedError: nothing was.
        """
        if self._fitted is None:
            raise NotFittedError(
                "found a probe without a fit, wanted a fitted one: call fit or fit_sketch first"
            )
        return self._fitted

    @fitted_.setter
    def fitted_(self, fitted: FittedProbes) -> None:
        self._fitted = fitted

    @property
    def settings(self) -> ProbeSettings:
        """The settings of the fit that the parameters give."""
        return ProbeSettings(self.ridge, self.class_weight, self.max_iter, self.tol)

    def fit(
        self,
        codes: Codes | Tensor,
        labels: Tensor,
        n_classes: int,
        progress: Progress | None = None,
    ) -> LogisticProbe1d:
        """Fit on codes (rows, features) and labels (rows,) int64 in 0..n_classes-1, or -1: a
        negative of every class. The work is done on the labels' device.

        Raises:
            ValueError: labels are of another kind, or codes are not finite.
        """
        self.fitted_ = fit_sweep(self, codes, labels, n_classes, progress=progress)[None].fitted_
        return self

    def judge(
        self, codes: Codes | Tensor, labels: Tensor, progress: Progress | None = None
    ) -> Judgment:
        """Loss, average precision and confusion of every probe on these rows, from the same passes
        over the codes.

        Rows are ranked by sign(w) x, which is the order of b + w x; w = 0 counts as positive.
        """
        return judge_sweep({None: self}, codes, labels, progress)[None]

    def certify(
        self,
        codes: Codes | Tensor,
        labels: Tensor,
        pairs: Tensor,
        n_random: int = 64,
        seed: int = 0,
        bound: float = CERTIFIED,
    ) -> Certificate:
        """Compare `loss_` and the optimum with the training rows themselves, for `pairs` (p, 2)
        int64, feature and class, and `n_random` random ones: one pass.

        The loss is the CE without the ridge; the gradient, which is 0 at the optimum, is the
        objective's.

        Raises:
            CertificateError: a difference is above `bound`.
            ValueError: pairs are of another kind, or out of range.
        """
        certificate = certify_sweep({None: self}, codes, labels, {None: pairs}, n_random, seed)[
            None
        ]
        certificate.check(bound)
        return certificate

    def certify_loss(self, values: Tensor, features: Tensor, labels: Tensor, loss: Tensor) -> float:
        """Largest difference between a reported loss and that of the rows themselves: in nats, or
        as a share of a loss above 1. Classes that are not fitted are left out.

        Args:
            values: (classes, rows), the values of every class's own feature.
            features: int64 (classes,), which features these are.
            labels: int64 (rows,).
            loss: (features, classes), of these rows, as `judge` gives it.

        Raises:
            CertificateError: the difference is above the bound.
            ValueError: the shapes do not fit.
        """
        return certify_loss(self.fitted_, values, features, labels, loss)

    def base_loss(self, labels: Tensor) -> Tensor:
        """Mean CE in nats on these labels of the intercept b0 alone: float64 (classes,), NaN for a
        class not fitted.

        With class weights b0 is 0, and the weighted mean log 2.
        """
        return base_loss(self.fitted_, labels)

    def sketch(
        self,
        codes: Codes | Tensor,
        labels: Tensor,
        n_classes: int,
        like: FeatureSketch | None = None,
    ) -> FeatureSketch:
        """One pass over some of the rows of dense or sparse codes, for workers that share them.
        With the first worker's sketch as `like`, the others' can be merged with it, and
        `fit_sketch` fits the result. All features are held at once.

        Raises:
            ValueError: the codes are one-hot, which need no sketch.
        """
        data = _label(self, codes, labels, n_classes)
        if data.codes.format == "onehot":
            raise ValueError(
                "found one-hot codes, which are counted and need no sketch: add up `count_table` of"
                " the parts"
            )
        columns, cells = slice(0, data.codes.n_features), None if like is None else like.cells
        by_class = self.settings.by_class
        return SketchPass(data, columns, [None], by_class=by_class, cells=cells).run()[0]

    def fit_sketch(self, sketch: FeatureSketch) -> LogisticProbe1d:
        """Fit on a sketch alone. Pairs that it does not settle, by its bound, are not `converged_`:
        they need the rows.
        """
        self.fitted_ = fit_sketch(self.settings, sketch)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the fit's tensors and settings by name: float64, except `n_iter` and `max_iter`
        int64, and `converged` and `balanced` bool. `slab_features` and `slab_rows` change no result
        and are not in it.
        """
        return self.fitted_.state_dict()

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> LogisticProbe1d:
        """A fitted probe from its `state_dict`, which judges, certifies and fits as the one that
        left it.

        Raises:
            ValueError: the state lacks something.
        """
        fitted = FittedProbes.from_state(state)
        how = fitted.settings
        probe = cls(how.ridge, class_weight=how.class_weight, max_iter=how.max_iter, tol=how.tol)
        probe.fitted_ = fitted
        return probe


def fit_sweep(
    probe: LogisticProbe1d,
    codes: Codes | Tensor,
    labels: Tensor,
    n_classes: int,
    ks: Sequence[int | None] = (None,),
    progress: Progress | None = None,
) -> dict[int | None, LogisticProbe1d]:
    """Probes with the parameters of `probe`, one for each k, fitted to the first k entries of each
    row, from the same passes.

    As `LogisticProbe1d.fit` on `TopKCodes(codes, k)`: of sparse codes by falling magnitude; None:
    all entries, of any codes. `probe` is left as it is.

    Raises:
        ValueError: as `LogisticProbe1d.fit`; or there is no k, or codes have no first k entries.
    """
    ks = list(dict.fromkeys(ks))
    data = _label(probe, codes, labels, n_classes, progress)
    probes = {k: copy.copy(probe) for k in ks}
    for each, fitted in zip(probes.values(), Fitting(probe.settings, data, ks).run(), strict=True):
        each.fitted_ = fitted
    return probes


def judge_sweep(
    probes: Mapping[K, LogisticProbe1d],
    codes: Codes | Tensor,
    labels: Tensor,
    progress: Progress | None = None,
) -> dict[K, Judgment]:
    """As `LogisticProbe1d.judge` of each k's probe on `TopKCodes(codes, k)`, from the same passes
    over the codes.

    Raises:
        ValueError: there are no probes, the codes have another number of features than those of the
            fit or no first k entries, or labels are of another kind.
    """
    data = _label_as_fitted(_first(probes), codes, labels, progress)
    judging = Judging([(probe.fitted_, k) for k, probe in probes.items()], data)
    return dict(zip(probes, judging.run(), strict=True))


def certify_sweep(
    probes: Mapping[K, LogisticProbe1d],
    codes: Codes | Tensor,
    labels: Tensor,
    pairs: Mapping[K, Tensor],
    n_random: int = 64,
    seed: int = 0,
) -> dict[K, Certificate]:
    """As `LogisticProbe1d.certify` of each k's probe and pairs on `TopKCodes(codes, k)`, from the
    same passes over the codes. Differences raise nothing here: see `Certificate.check`.

    Raises:
        ValueError: as `judge_sweep`; or pairs are missing, of another kind, or out of range.
    """
    data = _label_as_fitted(_first(probes), codes, labels)
    missing = [k for k in probes if k not in pairs]
    if missing:
        raise ValueError(f"found no pairs for K = {missing}, wanted them for every probe's K")
    certifying = Certifying(
        [(probe.fitted_, k) for k, probe in probes.items()],
        data,
        [pairs[k] for k in probes],
        n_random,
        seed,
    )
    return dict(zip(probes, certifying.run(), strict=True))


def _first(probes: Mapping[K, LogisticProbe1d]) -> LogisticProbe1d:
    if not probes:
        raise ValueError("found no probes, wanted at least 1: give a probe for each K")
    return next(iter(probes.values()))


def _label_as_fitted(
    probe: LogisticProbe1d, codes: Codes | Tensor, labels: Tensor, progress: Progress | None = None
) -> LabeledCodes:
    """As `_label`, for codes of the model that the probe was fitted to."""
    codes, n_features = as_codes(codes), len(probe.fitted_.feature_mean)
    if codes.n_features != n_features:
        raise ValueError(
            f"codes have {codes.n_features} features, wanted {n_features}, as in fit: give codes of"
            " the same model"
        )
    return _label(probe, codes, labels, probe.fitted_.n_classes, progress)


def _label(
    probe: LogisticProbe1d,
    codes: Codes | Tensor,
    labels: Tensor,
    n_classes: int,
    progress: Progress | None = None,
) -> LabeledCodes:
    """The codes with their labels, under the probe's parameters."""
    return LabeledCodes(
        as_codes(codes), labels, n_classes, probe.slab_rows, probe.slab_features, progress
    )

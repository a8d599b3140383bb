"""One row of the table: how well an encoding's best features tell the classes apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.numerics.isolation import isolated

PURITY = (16, 64, 256)
"""How many of the rows with a feature's highest values its purity is taken over."""


@dataclass(frozen=True)
class Judgment:
    """The results of probes on some rows, float64 (features, classes); NaN for classes that are not
    fitted.

    Attributes:
        loss: mean CE, nats, without the ridge; with class weights the weighted mean.
        average_precision: NaN also for classes without rows.
        true_positives: rows of the class with p >= 0.5.
        predicted: all rows with p >= 0.5.
        positives: rows of each class, (classes,).
        n_rows: rows in all.
    """

    loss: Tensor
    average_precision: Tensor
    true_positives: Tensor
    predicted: Tensor
    positives: Tensor
    n_rows: int

    @classmethod
    @isolated()
    def join(cls, parts: Sequence[Judgment]) -> Judgment:
        """The results of all features, from those of one range of them after the other, on the same
        rows.
        """
        return cls(
            torch.cat([part.loss for part in parts]),
            torch.cat([part.average_precision for part in parts]),
            torch.cat([part.true_positives for part in parts]),
            torch.cat([part.predicted for part in parts]),
            parts[0].positives,
            parts[0].n_rows,
        )

    @property
    @isolated()
    def precision(self) -> Tensor:
        """TP / (TP + FP), 0 where nothing is predicted."""
        return self.true_positives / self.predicted.clamp(min=1)

    @property
    @isolated()
    def recall(self) -> Tensor:
        """TP / (TP + FN), NaN for a class without rows."""
        return self.true_positives / self.positives

    @property
    @isolated()
    def f1(self) -> Tensor:
        """2 TP / (2 TP + FP + FN), 0 where nothing is predicted, NaN for a class without rows."""
        f1 = 2 * self.true_positives / (self.predicted + self.positives)
        return torch.where(self.positives > 0, f1, torch.nan)

    @isolated()
    def confusion(self) -> dict[str, Tensor]:
        """`tp`, `fp`, `fn`, `tn`, float64 (features, classes)."""
        tp, fp = self.true_positives, self.predicted - self.true_positives
        fn = self.positives - tp
        return {"tp": tp, "fp": fp, "fn": fn, "tn": self.n_rows - tp - fp - fn}


@dataclass(frozen=True)
class ClassScores:
    """A class's best feature, picked on train CE, or on validation CE in the `_by_val` fields. CE
    in nats.

    `margin` is how much lower its train CE is than the second best feature's, None if there is only
    one feature. Precision, recall and F1 are on validation, at p >= 0.5. `mean_feature_ce` and
    `median_feature_ce` are of the validation CE over all features: a single feature that is
    confident and wrong can ruin the mean. `top_features` are those of the highest validation AP,
    best first. `n_train` and `n_val` count the class's rows.
    """

    class_id: int
    n_train: int
    n_val: int
    feature: int
    train_ce: float
    margin: float | None
    val_ce: float
    base_ce: float
    mean_feature_ce: float
    median_feature_ce: float
    average_precision: float
    precision: float
    recall: float
    f1: float
    purity_at_16: float
    purity_at_64: float
    purity_at_256: float
    feature_by_val: int
    val_ce_by_val: float
    average_precision_by_val: float
    top_features: tuple[int, ...]
    top_average_precisions: tuple[float, ...]

    @property
    def probe_r(self) -> float:
        """1 - CE / CE of the intercept alone, for the feature picked on train CE."""
        return 1 - self.val_ce / self.base_ce

    @property
    def probe_r_by_val(self) -> float:
        """The same for the feature picked on validation CE."""
        return 1 - self.val_ce_by_val / self.base_ce


@dataclass(frozen=True)
class Scores:
    """An encoding's scores: means over `classes`, those present in validation and fitted in train.
    CE in nats.

    - `probe_r` = 1 - mean_c CE_val[best_c, c] / mean_c CE_base_val[c], best_c picked on train CE
    - `map`, `purity_at_16`: means over classes of the best feature's validation AP and purity
    - `coverage`: the share of classes whose best feature has AP of at least `coverage_threshold`
    - `mean_train_ce`: mean train CE of the best features, by which the best layer is picked
    - `mean_feature_ce`, `median_feature_ce`: means over classes of a class's mean and median
      validation CE over all features
    - `mean_margin`, `f1`: means over classes of the best feature's; no margin if there is only one
      feature
    - `negative_weights`: the share of w below 0, over all features and classes

    `absent_in_val` and `absent_in_train` name the classes left out.

    Raises:
        ValueError: a value is impossible.
    """

    probe_r: float
    mean_train_ce: float
    mean_val_ce: float
    mean_base_ce: float
    mean_feature_ce: float
    median_feature_ce: float
    mean_margin: float | None
    negative_weights: float
    map: float
    f1: float
    purity_at_16: float
    purity_at_64: float
    purity_at_256: float
    coverage: float
    coverage_threshold: float
    classes: tuple[ClassScores, ...]
    absent_in_val: tuple[int, ...]
    absent_in_train: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in (
            "mean_train_ce",
            "mean_val_ce",
            "mean_base_ce",
            "mean_feature_ce",
            "median_feature_ce",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}, wanted a finite number of nats, at least 0")
        for name in (
            "map",
            "f1",
            *(f"purity_at_{k}" for k in PURITY),
            "coverage",
            "negative_weights",
        ):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, wanted a share from 0 to 1")
        if not (math.isfinite(self.probe_r) and self.probe_r <= 1):
            raise ValueError(f"probe_r is {self.probe_r}, wanted a finite number, at most 1")
        if not self.classes:
            raise ValueError("there are scores of 0 classes, wanted at least 1")
        both = {row.class_id for row in self.classes} & {*self.absent_in_val, *self.absent_in_train}
        if both:
            raise ValueError(
                f"classes {sorted(both)} are both scored and absent, wanted one or the other"
            )


@isolated()
def best_features(ce: Tensor) -> Tensor:
    """Each class's feature of least CE, ties to the lower: int64 (classes,) from (features,
    classes).

    A class without a probe, all of whose CE is NaN, gets -1.

    Raises:
        ValueError: only some of a class's CE is NaN.
    """
    missing = ce.isnan()
    partly = missing.any(0) & ~missing.all(0)
    if partly.any():
        raise ValueError(
            f"CE of class {int(partly.int().argmax())} is NaN for some features, wanted all or none"
        )
    return torch.where(missing.all(0), -1, ce.argmin(0))


@isolated()
def score_encoding(
    *,
    train_ce: Tensor,
    coef: Tensor,
    val: Judgment,
    base_ce: Tensor,
    purity: Tensor,
    train_counts: Tensor,
    fitted: Tensor,
    coverage_threshold: float = 0.3,
    n_top: int = 10,
) -> Scores:
    """Score an encoding. Entries of classes that are absent from either split are ignored.

    Args:
        train_ce: float64 (features, classes), nats.
        coef: float64 (features, classes).
        val: the probes' results on the validation rows.
        base_ce: (classes,), the intercept-only CE on validation.
        purity: (classes, 3), the purity on validation of `best_features(train_ce)` at the k of
            `PURITY`.
        train_counts: int64 (classes,), the train rows of each class.
        fitted: bool (classes,), the classes that have probes.
        coverage_threshold: the AP at which a class counts as covered.
        n_top: how many features of the highest AP to list.

    Raises:
        ValueError: shapes disagree, no class is left, or a value is impossible or out of range.
    """
    if not 0 <= coverage_threshold <= 1 or n_top < 1:
        raise ValueError(
            f"found coverage_threshold = {coverage_threshold} and n_top = {n_top}, wanted 0 to 1"
            " and at least 1: change them"
        )
    _check_shapes(train_ce, coef=coef, loss=val.loss, average_precision=val.average_precision)
    _check_shapes(
        train_ce[0],
        base_ce=base_ce,
        positives=val.positives,
        fitted=fitted,
        train_counts=train_counts,
    )
    _check_shapes(train_ce.new_empty(len(fitted), len(PURITY)), purity=purity)
    present = val.positives > 0
    absent_in_val = tuple(torch.nonzero(~present).flatten().tolist())
    absent_in_train = tuple(torch.nonzero(~fitted).flatten().tolist())
    scored = torch.nonzero(present & fitted).flatten()
    if len(scored) == 0:
        raise ValueError(
            f"none of {len(fitted)} classes is both fitted in train and present in validation,"
            f" wanted at least 1: {len(absent_in_train)} have no rows in train or no others beside"
            f" them, {len(absent_in_val)} none in validation: label more, or count void rows as"
            " negatives"
        )
    train_ce, val_ce, val_ap = (
        each[:, scored] for each in (train_ce, val.loss, val.average_precision)
    )
    best, best_by_val = best_features(train_ce), best_features(val_ce)
    if min(int(best.min()), int(best_by_val.min())) < 0:
        raise ValueError(
            "CE of a class that is marked as fitted is NaN, wanted numbers: give the mask of the"
            " probes"
        )
    n_features = len(train_ce)
    lowest = train_ce.topk(min(2, n_features), dim=0, largest=False).values
    margins = (lowest[1] - lowest[0]).tolist() if n_features > 1 else [None] * len(scored)
    means = val_ce.mean(0).tolist()
    medians = val_ce.sort(dim=0).values[[(n_features - 1) // 2, n_features // 2]].mean(0).tolist()
    top = val_ap.argsort(dim=0, descending=True, stable=True)[:n_top]
    at_half = [each[:, scored] for each in (val.precision, val.recall, val.f1)]
    classes = tuple(
        ClassScores(
            class_id=c,
            n_train=int(train_counts[c]),
            n_val=int(val.positives[c]),
            feature=j,
            train_ce=float(train_ce[j, i]),
            margin=margins[i],
            val_ce=float(val_ce[j, i]),
            base_ce=float(base_ce[c]),
            mean_feature_ce=means[i],
            median_feature_ce=medians[i],
            average_precision=float(val_ap[j, i]),
            precision=float(at_half[0][j, i]),
            recall=float(at_half[1][j, i]),
            f1=float(at_half[2][j, i]),
            purity_at_16=float(purity[c, 0]),
            purity_at_64=float(purity[c, 1]),
            purity_at_256=float(purity[c, 2]),
            feature_by_val=j_val,
            val_ce_by_val=float(val_ce[j_val, i]),
            average_precision_by_val=float(val_ap[j_val, i]),
            top_features=tuple(top[:, i].tolist()),
            top_average_precisions=tuple(val_ap[top[:, i], i].tolist()),
        )
        for i, (c, j, j_val) in enumerate(
            zip(scored.tolist(), best.tolist(), best_by_val.tolist(), strict=True)
        )
    )

    def mean(name: str) -> float:
        return math.fsum(getattr(row, name) for row in classes) / len(classes)

    return Scores(
        probe_r=1 - mean("val_ce") / mean("base_ce"),
        mean_train_ce=mean("train_ce"),
        mean_val_ce=mean("val_ce"),
        mean_base_ce=mean("base_ce"),
        mean_feature_ce=mean("mean_feature_ce"),
        median_feature_ce=mean("median_feature_ce"),
        mean_margin=mean("margin") if n_features > 1 else None,
        negative_weights=float((coef[:, scored] < 0).double().mean()),
        map=mean("average_precision"),
        f1=mean("f1"),
        purity_at_16=mean("purity_at_16"),
        purity_at_64=mean("purity_at_64"),
        purity_at_256=mean("purity_at_256"),
        coverage=sum(row.average_precision >= coverage_threshold for row in classes) / len(classes),
        coverage_threshold=coverage_threshold,
        classes=classes,
        absent_in_val=absent_in_val,
        absent_in_train=absent_in_train,
    )


def _check_shapes(like: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != like.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, wanted {tuple(like.shape)} as of train_ce"
            )

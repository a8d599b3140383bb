"""One row of the table: how well an encoding's best features tell the classes apart."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassScores:
    """A class's best feature, picked on train CE and, as the `_by_val` fields say, on validation CE. CE in nats."""

    class_id: int
    feature: int
    train_ce: float
    val_ce: float
    base_ce: float
    average_precision: float
    purity_at_16: float
    feature_by_val: int
    val_ce_by_val: float
    average_precision_by_val: float

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
    """An encoding's scores, means over `classes`: those present in validation and fitted in train. CE in nats.

    - `probe_r` = 1 - mean_c CE_val[best_c, c] / mean_c CE_base_val[c], best_c picked on train CE
    - `map`, `purity_at_16`: means over classes of the best feature's validation AP and purity
    - `coverage`: the share of classes whose best feature has AP of at least `coverage_threshold`
    - `mean_train_ce`: mean train CE of the best features, by which the best layer is picked

    `absent_in_val` and `absent_in_train` name the classes left out. Raises ValueError for values that cannot be.
    """

    probe_r: float
    mean_train_ce: float
    mean_val_ce: float
    mean_base_ce: float
    map: float
    purity_at_16: float
    coverage: float
    coverage_threshold: float
    classes: tuple[ClassScores, ...]
    absent_in_val: tuple[int, ...]
    absent_in_train: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("mean_train_ce", "mean_val_ce", "mean_base_ce"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}, wanted a finite number of nats, at least 0")
        for name in ("map", "purity_at_16", "coverage"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, wanted a share from 0 to 1")
        if not (math.isfinite(self.probe_r) and self.probe_r <= 1):
            raise ValueError(f"probe_r is {self.probe_r}, wanted a finite number, at most 1")
        if not self.classes:
            raise ValueError("there are scores of 0 classes, wanted at least 1")
        both = {row.class_id for row in self.classes} & {*self.absent_in_val, *self.absent_in_train}
        if both:
            raise ValueError(f"classes {sorted(both)} are both scored and absent, wanted one or the other")


def best_features(ce: Tensor) -> Tensor:
    """Each class's feature of least CE, ties to the lower: int64 (classes,) from (features, classes).

    -1 for a class without a probe, all of whose CE is NaN. Raises ValueError where only some of it is.
    """
    missing = ce.isnan()
    partly = missing.any(0) & ~missing.all(0)
    if partly.any():
        raise ValueError(f"CE of class {int(partly.int().argmax())} is NaN for some features, wanted all or none")
    return torch.where(missing.all(0), -1, ce.argmin(0))


def score_encoding(
    *,
    train_ce: Tensor,
    val_ce: Tensor,
    base_ce: Tensor,
    val_ap: Tensor,
    purity: Tensor,
    present_in_val: Tensor,
    fitted: Tensor,
    coverage_threshold: float = 0.3,
) -> Scores:
    """Score an encoding.

    `train_ce`, `val_ce`, `val_ap` are float64 (features, classes): CE in nats on both splits, average precision on
    validation. `base_ce` (classes,) is the intercept-only CE on validation; `purity` (classes,) the purity on
    validation of `best_features(train_ce)`; `present_in_val` and `fitted` (classes,) are bool. Entries of classes that
    are absent from either split are not looked at. Raises ValueError for shapes that disagree, where no class is left,
    and for values that cannot be.
    """
    _check_shapes(train_ce, val_ce=val_ce, val_ap=val_ap)
    _check_shapes(train_ce[0], base_ce=base_ce, purity=purity, present_in_val=present_in_val, fitted=fitted)
    absent_in_val = tuple(torch.nonzero(~present_in_val).flatten().tolist())
    absent_in_train = tuple(torch.nonzero(~fitted).flatten().tolist())
    scored = torch.nonzero(present_in_val & fitted).flatten()
    if len(scored) == 0:
        raise ValueError(
            f"none of {len(fitted)} classes is both fitted in train and present in validation, wanted at least 1: "
            f"absent in validation {absent_in_val}, in train {absent_in_train}"
        )
    best, best_by_val = best_features(train_ce[:, scored]), best_features(val_ce[:, scored])
    if min(int(best.min()), int(best_by_val.min())) < 0:
        raise ValueError("CE of a class that is marked as fitted is NaN, wanted numbers: give the mask of the probes")
    classes = tuple(
        ClassScores(
            class_id=c,
            feature=j,
            train_ce=float(train_ce[j, c]),
            val_ce=float(val_ce[j, c]),
            base_ce=float(base_ce[c]),
            average_precision=float(val_ap[j, c]),
            purity_at_16=float(purity[c]),
            feature_by_val=j_val,
            val_ce_by_val=float(val_ce[j_val, c]),
            average_precision_by_val=float(val_ap[j_val, c]),
        )
        for c, j, j_val in zip(scored.tolist(), best.tolist(), best_by_val.tolist(), strict=True)
    )
    n = len(classes)
    mean_val_ce = math.fsum(row.val_ce for row in classes) / n
    mean_base_ce = math.fsum(row.base_ce for row in classes) / n
    return Scores(
        probe_r=1 - mean_val_ce / mean_base_ce,
        mean_train_ce=math.fsum(row.train_ce for row in classes) / n,
        mean_val_ce=mean_val_ce,
        mean_base_ce=mean_base_ce,
        map=math.fsum(row.average_precision for row in classes) / n,
        purity_at_16=math.fsum(row.purity_at_16 for row in classes) / n,
        coverage=sum(row.average_precision >= coverage_threshold for row in classes) / n,
        coverage_threshold=coverage_threshold,
        classes=classes,
        absent_in_val=absent_in_val,
        absent_in_train=absent_in_train,
    )


def _check_shapes(like: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != like.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, wanted {tuple(like.shape)} as of train_ce")

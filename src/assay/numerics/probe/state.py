"""The result of a fit: the probes' tensors as one value, its settings, and losses on any rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from assay.numerics.isolation import isolated, snapshot
from assay.numerics.probe.logistic import ClassWeights, PairLosses, Slab, slab_of_rows
from assay.numerics.ranking import count_classes

_HOW = ("ridge", "balanced", "max_iter", "tol")
"""What is in a state beside the tensors."""


@dataclass(frozen=True)
class ProbeSettings:
    """The objective of a fit, its tolerances, and the errors that a sketch may make. The first four
    are parameters of `LogisticProbe1d`, and in its state.

    Raises:
        ValueError: one is out of range.
    """

    ridge: float = 1e-8
    class_weight: Literal["balanced"] | None = None
    max_iter: int = 200
    tol: float = 1e-16
    ce_error: float = (
        1e-10  # nats that a sketch may miss in a probe's loss, by its bound, without being refined
    )
    w_error: float = (
        1e-6  # the share of 1 + |w| that it may miss in w, as the bound and the curvature have it
    )
    fine_bits: int = (
        10  # of the cells of features that need more than the first sketch: see `CellMap`
    )
    fine_rows: int = 1 << 14  # with no more rows than these the rows themselves are as few

    def __post_init__(self) -> None:
        if not 0 < self.ridge < math.inf:
            raise ValueError(
                f"ridge is {self.ridge}, wanted more than 0, and finite: without it separable"
                " classes have no optimum"
            )
        if self.class_weight not in (None, "balanced"):
            raise ValueError(f"class_weight is {self.class_weight!r}, wanted None or 'balanced'")
        if not self.max_iter >= 1:
            raise ValueError(f"max_iter is {self.max_iter}, wanted at least 1: raise max_iter")
        if not 0 <= self.tol < math.inf:
            raise ValueError(f"tol is {self.tol}, wanted a finite number of nats, at least 0")

    @property
    def by_class(self) -> bool:
        """Whether the rows of each class have to be told apart."""
        return self.class_weight is not None


@dataclass
class FittedProbes:
    """The fitted probes: float64 (features, classes) unless noted; NaN for a class that is not
    fitted.

    Attributes:
        settings: how they were fitted.
        coef_standardized: w on standardized features.
        intercept_standardized: b on standardized features.
        train_ce: mean CE on the training rows, nats, without the ridge.
        base_rate: prevalence among the training rows, (classes,).
        feature_mean: mean over the training rows, (features,).
        feature_std: population standard deviation over them, 0 of a constant, (features,).
        max_abs: largest magnitude over them, (features,).
        n_iter: int64, Newton steps on the last points.
        converged: bool, at the optimum of the rows.
        n_refined: pairs that the first sketch did not settle. It is not in a state: 0.
    """

    settings: ProbeSettings
    coef_standardized: Tensor
    intercept_standardized: Tensor
    train_ce: Tensor
    base_rate: Tensor
    feature_mean: Tensor
    feature_std: Tensor
    max_abs: Tensor
    n_iter: Tensor
    converged: Tensor
    n_refined: int = dataclasses.field(default=0, kw_only=True)

    @classmethod
    @isolated()
    def empty(
        cls, settings: ProbeSettings, n_features: int, class_counts: Tensor, n_rows: int
    ) -> FittedProbes:
        """Probes before the fit to `n_rows` rows, of which `class_counts` (classes,) are of each
        class: filled with NaN.
        """
        base_rate = class_counts.double() / n_rows
        shape = (n_features, len(base_rate))
        return cls(
            settings,
            coef_standardized=base_rate.new_full(shape, torch.nan),
            intercept_standardized=base_rate.new_full(shape, torch.nan),
            train_ce=base_rate.new_full(shape, torch.nan),
            base_rate=base_rate,
            feature_mean=base_rate.new_zeros(n_features),
            feature_std=base_rate.new_zeros(n_features),
            max_abs=base_rate.new_zeros(n_features),
            n_iter=torch.zeros(shape, dtype=torch.int64, device=base_rate.device),
            converged=torch.ones(shape, dtype=torch.bool, device=base_rate.device),
        )

    @classmethod
    @isolated()
    def from_state(cls, state: Mapping[str, Tensor]) -> FittedProbes:
        """Fitted probes from their `state_dict`, whose tensors are copied.

        Raises:
            ValueError: the state lacks something.
        """
        missing = [name for name in (*_TENSORS, *_HOW) if name not in state]
        if missing:
            raise ValueError(
                f"found a probe's state without {', '.join(missing)}, wanted all that state_dict"
                " gives: fit it again"
            )
        settings = ProbeSettings(
            float(state["ridge"]),
            class_weight="balanced" if bool(state["balanced"]) else None,
            max_iter=int(state["max_iter"]),
            tol=float(state["tol"]),
        )
        return cls(settings, *(snapshot(state[name]) for name in _TENSORS))

    @isolated()
    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all tensors and settings by name: see `LogisticProbe1d.state_dict`."""
        how = {
            "ridge": torch.tensor(self.settings.ridge, dtype=torch.float64, device="cpu"),
            "balanced": torch.tensor(
                self.settings.class_weight == "balanced", dtype=torch.bool, device="cpu"
            ),
            "max_iter": torch.tensor(self.settings.max_iter, dtype=torch.int64, device="cpu"),
            "tol": torch.tensor(self.settings.tol, dtype=torch.float64, device="cpu"),
        }
        return {name: snapshot(getattr(self, name)) for name in _TENSORS} | how

    def take(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of a `state_dict` for one's own: of a fit that was begun before."""
        for name in _TENSORS:
            setattr(self, name, state[name])

    @classmethod
    @isolated()
    def join(cls, parts: Sequence[FittedProbes]) -> FittedProbes:
        """The probes of all features, from those of one range of them after the other, which were
        fitted to the same rows.
        """
        first = parts[0]
        joined = [
            first.base_rate if name == "base_rate" else torch.cat([getattr(p, name) for p in parts])
            for name in _TENSORS
        ]
        return cls(first.settings, *joined, n_refined=sum(part.n_refined for part in parts))

    @property
    def n_classes(self) -> int:
        """Classes, fitted or not."""
        return len(self.base_rate)

    @property
    @isolated()
    def fitted_classes(self) -> Tensor:
        """Classes (classes,) bool with both positives and negatives among the training rows."""
        return (self.base_rate > 0) & (self.base_rate < 1)

    @property
    @isolated()
    def scale(self) -> Tensor:
        """The divisor of a feature, float64 (features,): its std, or 1 if it is constant."""
        return torch.where(self.feature_std > 0, self.feature_std, 1.0)

    @property
    @isolated()
    def coef(self) -> Tensor:
        """w on raw features."""
        return self.coef_standardized / self.scale[:, None]

    @property
    @isolated()
    def intercept(self) -> Tensor:
        """b on raw features."""
        return self.intercept_standardized - self.coef * self.feature_mean[:, None]

    @property
    @isolated()
    def center(self) -> Tensor:
        """The point to which the ridge draws b and w, float64 (2, classes): b0, the log-odds of the
        prevalence, and 0.
        """
        b0 = torch.zeros_like(self.base_rate) if self.settings.by_class else self.base_rate.logit()
        return torch.stack([b0, torch.zeros_like(b0)])

    @isolated()
    def fitted_pairs(self, features: slice) -> Tensor:
        """Numbers of the pairs of some features whose class is fitted, int64 (pairs,): see
        `PairLosses`.
        """
        return (
            self.fitted_classes.expand(features.stop - features.start, -1)
            .flatten()
            .nonzero()
            .squeeze(1)
        )

    @isolated()
    def open_pairs(self, features: Tensor) -> Tensor:
        """Numbers of the pairs of some features (f,) that are not settled, int64 (pairs,)."""
        return (~self.converged[features] & self.fitted_classes).flatten().nonzero().squeeze(1)

    @isolated()
    def losses(
        self, slab: Slab, features: slice | Tensor, class_counts: Tensor, n_rows: int
    ) -> PairLosses:
        """The losses of features whose points are in `slab`, on any `n_rows` rows, of which
        `class_counts` (classes,) are of each class.
        """
        weights = None
        if self.settings.by_class:
            # Of the training rows, whichever rows these are: up to a factor, which the mean takes
            # out again.
            weights = ClassWeights.balanced(self.base_rate, 1)
        return PairLosses(
            slab,
            self.feature_mean[features],
            self.scale[features],
            class_counts.double(),
            n_rows,
            weights,
        )

    @isolated()
    def losses_of_rows(
        self, values: Tensor, features: slice | Tensor, labels: Tensor
    ) -> PairLosses:
        """The losses of features with `values` (features, rows), on every row."""
        counts = count_classes(labels, self.n_classes)
        return self.losses(slab_of_rows(values, labels), features, counts, len(labels))


_TENSORS = tuple(field.name for field in dataclasses.fields(FittedProbes) if field.type == "Tensor")
"""What is fitted, as a state names it."""

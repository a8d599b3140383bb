"""Certificates: reported losses compared with the rows themselves, and gradients, which at the
optimum are 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assay.numerics.isolation import isolated
from assay.numerics.probe.labeled import LabeledCodes
from assay.numerics.probe.logistic import moments_of_rows
from assay.numerics.probe.state import FittedProbes
from assay.numerics.ranking import check_labels

CERTIFIED = 1e-8
"""Nats between the loss as reported and that of the rows, and the length of its gradient, at the
most.
"""


class CertificateError(RuntimeError):
    """A reported loss differs from that of the data."""


@dataclass(frozen=True)
class Certificate:
    """The largest differences over `pairs` probes between the fit and the rows themselves: nats,
    and the length of the objective's gradient, which at the optimum is 0.
    """

    pairs: int
    ce_error: float
    gradient: float

    def check(self, bound: float = CERTIFIED) -> None:
        """Check the differences against `bound`.

        Raises:
            CertificateError: one is above it.
        """
        if not max(self.ce_error, self.gradient) <= bound:
            raise CertificateError(
                f"over {self.pairs} probes the loss differs by up to {self.ce_error:.3g} nats from"
                f" that of the rows, and its gradient is up to {self.gradient:.3g}, wanted at most"
                f" {bound:g}: raise max_iter, or are these not the codes and labels of the fit?"
            )


class Certifying:
    """The certification of probes on the first k entries of each row, each with its own k and
    `pairs` (p, 2), in the same passes. For each probe, `n_random` pairs more are drawn.

    It stands between two pieces of work whenever it tells of progress: `checkpoint` then says
    where, and `resume` goes on from there to the same bits, also where other slabs fit the memory.

    Raises:
        ValueError: pairs are not int64 (p, 2), or name features or classes that do not exist; or
            the codes have no first k entries.
    """

    def __init__(
        self,
        probes: Sequence[tuple[FittedProbes, int | None]],
        data: LabeledCodes,
        pairs: Sequence[Tensor],
        n_random: int = 64,
        seed: int = 0,
    ) -> None:
        data.check_ks([k for _, k in probes])
        for (fitted, _), given in zip(probes, pairs, strict=True):
            _check_pairs(given, data, fitted.fitted_classes)
        if n_random < 0:
            raise ValueError(f"found n_random = {n_random}, wanted at least 0: change n_random")
        generator = torch.Generator().manual_seed(seed)
        self._probes = list(probes)
        self._data = data
        self._chosen = [
            _choose(fitted, given, data.codes.n_features, n_random, generator).to(
                data.labels.device
            )
            for (fitted, _), given in zip(probes, pairs, strict=True)
        ]
        self._worst = torch.zeros(len(probes), 2, dtype=torch.float64, device="cpu")
        self._done = 0  # features of each probe's

    def run(self) -> list[Certificate]:
        """Do what is left. Differences raise nothing here: see `Certificate.check`."""
        data, probes = self._data, self._probes
        features: list[Tensor] = [torch.unique(each[:, 0]) for each in self._chosen]
        longest = max(map(len, features))
        tell = data.telling("certified", longest)
        while self._done < longest:
            stop = self._done + data.room(16 * data.codes.n_rows * len(probes))
            columns = [each[self._done : stop] for each in features]
            gathered = data.gather(
                [(each, k) for each, (_, k) in zip(columns, probes, strict=True)]
            )
            for number, (values, here) in enumerate(zip(gathered, columns, strict=True)):
                chosen = self._chosen[number]
                of_these = chosen[torch.isin(chosen[:, 0], here)]
                if len(of_these):
                    found = _differences(probes[number][0], values, here, of_these, data.labels)
                    self._worst[number] = torch.maximum(self._worst[number], found)
            self._done = min(stop, longest)
            tell(self._done)
        return [
            Certificate(len(each), *map(float, most))
            for each, most in zip(self._chosen, self._worst, strict=True)
        ]

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Where it stands: tensors, and JSON."""
        return {"worst": self._worst}, {"certified": self._done}

    def resume(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from what `checkpoint` gave, of a certification of the same probes and pairs."""
        self._worst = tensors["worst"].to("cpu", copy=True)
        self._done = int(state["certified"])


@isolated()
def certify_loss(
    fitted: FittedProbes, values: Tensor, features: Tensor, labels: Tensor, loss: Tensor
) -> float:
    """See `LogisticProbe1d.certify_loss`."""
    n_features, n_classes = fitted.train_ce.shape
    wanted = ((n_classes, len(labels)), (n_classes,), (n_features, n_classes))
    if (values.shape, features.shape, loss.shape) != wanted:
        found = ", ".join(str(tuple(each.shape)) for each in (values, features, loss))
        raise ValueError(
            f"found values, features and loss of shapes {found}, wanted"
            f" {', '.join(map(str, wanted))}: give every class's own feature"
        )
    own = features[fitted.fitted_classes]  # -1, as `best_features` has it, for the others
    if len(own) and not 0 <= int(own.min()) <= int(own.max()) < n_features:
        raise ValueError(
            f"found features {int(own.min())} to {int(own.max())}, wanted 0 to"
            f" {n_features - 1}: give one that was judged"
        )
    check_labels(labels, len(labels), n_classes)
    classes = fitted.fitted_classes.nonzero().flatten()
    error = 0.0
    for c in classes.tolist():
        losses = fitted.losses_of_rows(values[c : c + 1], features[c : c + 1], labels)
        theta = torch.stack(
            [
                matrix[features[c], c]
                for matrix in (fitted.intercept_standardized, fitted.coef_standardized)
            ]
        )
        exact = losses.loss(classes.new_tensor([c]), theta[:, None])
        off = (exact - loss[features[c], c]).abs() / exact.clamp(min=1)
        error = max(error, float(off.nan_to_num(torch.inf)))
    if error > CERTIFIED:
        raise CertificateError(
            f"the loss on rows that were not fitted differs by up to {error:.3g} nats from that of"
            f" the rows, wanted at most {CERTIFIED:g}: are these the codes and labels that were"
            " judged?"
        )
    return error


def _check_pairs(pairs: Tensor, data: LabeledCodes, fitted_classes: Tensor) -> None:
    if pairs.dtype != torch.int64 or pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(
            f"pairs are {pairs.dtype} of shape {tuple(pairs.shape)}, wanted torch.int64 of shape"
            " (p, 2): give a feature and a class for each"
        )
    _check_range("classes", pairs[:, 1], data.n_classes)
    # `best_features` has -1 for the other classes, whose pairs are left out.
    is_fitted = fitted_classes.to(pairs.device)[pairs[:, 1]]
    _check_range("features", pairs[is_fitted, 0], data.codes.n_features)


def _check_range(name: str, column: Tensor, n: int) -> None:
    if len(column) and not 0 <= int(column.min()) <= int(column.max()) < n:
        raise ValueError(
            f"pairs name {name} {int(column.min())} to {int(column.max())}, wanted 0 to"
            f" {n - 1}: leave the others out"
        )


def _choose(
    fitted: FittedProbes, given: Tensor, n_features: int, n_random: int, generator: torch.Generator
) -> Tensor:
    """The given pairs and random ones, each once, if their class is fitted: int64 (p, 2) on the
    CPU.
    """
    classes = fitted.fitted_classes.nonzero().flatten().cpu()
    n_drawn = n_random if len(classes) else 0
    features = torch.randint(n_features, (n_drawn,), generator=generator, device="cpu")
    places = torch.randint(max(1, len(classes)), (n_drawn,), generator=generator, device="cpu")
    both: Tensor = torch.unique(
        torch.cat([given.cpu(), torch.stack([features, classes[places]], 1)]), dim=0
    )
    return both[fitted.fitted_classes.cpu()[both[:, 1]]]


@isolated()
def _differences(
    fitted: FittedProbes, values: Tensor, features: Tensor, pairs: Tensor, labels: Tensor
) -> Tensor:
    """Largest CE error and gradient over `pairs` (p, 2), all of `features` (f,), whose `values` are
    (f, rows).

    The features' mean and scale are computed from the rows here, so that those of the fit are
    checked, too.
    """
    feature, label = pairs.T.contiguous()
    place = torch.searchsorted(features, feature)
    mean, std = moments_of_rows(values)
    scale = torch.where(std > 0, std, 1.0)
    w = fitted.coef_standardized[feature, label] / fitted.scale[feature]
    b = fitted.intercept_standardized[feature, label] + w * (
        mean[place] - fitted.feature_mean[feature]
    )
    theta = torch.stack([b, w * scale[place]])
    losses = dataclasses.replace(
        fitted.losses_of_rows(values, features, labels), mean=mean, scale=scale
    )
    loss, gradient, _ = losses.derivatives(place * fitted.n_classes + label, theta)
    gradient += fitted.settings.ridge * (theta - fitted.center[:, label])
    error = (loss - fitted.train_ce[feature, label]).abs()
    return torch.stack([error, gradient.norm(dim=0)]).nan_to_num(torch.inf).amax(1).cpu()

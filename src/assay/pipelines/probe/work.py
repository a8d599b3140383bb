"""The long work of the probes, sketches, ranking and certificates: it saves itself, is gone on
with, and is made in parts, slabs of features that the ranks share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from assay.codes import Codes
from assay.io.checkpoints import Checkpoints
from assay.io.shards import Shards
from assay.io.tensors import fingerprint_tensors
from assay.numerics.probe import (
    Certificate,
    Certifying,
    FittedProbes,
    LabeledCodes,
    LogisticProbe1d,
    Progress,
    Sweep,
    solved_together,
)
from assay.numerics.scores import Judgment
from assay.parameters import ProbeParameters, result_values
from assay.pipelines.fitting import Estimator, Fit
from assay.pipelines.parts import Part, cut, make_parts
from assay.pipelines.probe.labels import classify, read_labels
from assay.pipelines.recipes import describe_codes, remake_codes
from assay.pipelines.signs_of_life import staged_bar
from assay.pipelines.stream import pick_device
from assay.team import current_team

_OF_SCORES = ("top_features", "examples")
"""Parameters of what is made of the probes."""


class ProbeWork:
    """The probes of one or several encodings that share codes: fitted on one split, judged on the
    other, and certified.

    Args:
        codes, shards: of probe train and probe val.
        parameters: of the probes.
        checkpoints: where the work saves itself.
        device: where it is done, by name.
        layer: the block number.
        method: the work's name, as ``probe-kmeans-onehot``.
        ks: the entries of a row that each encoding has; None: all.

    Attributes:
        train, val: the codes that take part, with their classes.
        counted: the patches of probe val that take part, bool.
        n_classes: classes; the labels of the first is `first`.

    Raises:
        ValueError: every patch of a split is void, codes and labels differ in number, or the two
            splits' codes are of different models.
    """

    def __init__(
        self,
        codes: tuple[Codes, Codes],
        shards: tuple[Shards, Shards],
        parameters: ProbeParameters,
        checkpoints: Checkpoints,
        device: str,
        *,
        layer: int,
        method: str,
        ks: Sequence[int | None],
    ) -> None:
        _check_alike(*codes)
        self.device = pick_device(device)
        labels = [read_labels(each).to(self.device) for each in shards]
        self.first = 0 if parameters.void == "class" else 1
        self.n_classes = int(torch.stack([each.max() for each in labels]).max()) + 1 - self.first
        (train, train_classes, _), (val, val_classes, self.counted) = (
            classify(some, of, parameters.void) for some, of in zip(codes, labels, strict=True)
        )
        self._codes, self._shards = codes, shards
        self._parameters = parameters
        self._checkpoints = checkpoints
        self._device = device
        self._layer, self._method, self._ks = layer, method, list(ks)
        self._settings = as_estimator(parameters).settings
        self.train = self._label(train, train_classes)
        self.val = self._label(val, val_classes)

    def sweep(self) -> tuple[list[FittedProbes], list[Judgment]]:
        """Fit and judge the probes of every feature, for each K: each rank its share of the parts,
        where there are several.

        Raises:
            ValueError: values are not finite.
            KeyboardInterrupt: the run is asked to stop; what there is is saved.
        """
        parts = self._parts()
        asked = self._request() if current_team().size > 1 else None
        if asked is None:
            for part in parts:
                self.sweep_part(part)
        else:
            make_parts(sweep_part, parts, *asked)
        found = []
        for part in parts:
            sweep = self._sweep(part)
            self._fit(part, sweep).collect()
            found.append(sweep.run())
        return (
            [FittedProbes.join(each) for each in zip(*(fits for fits, _ in found), strict=True)],
            [Judgment.join(each) for each in zip(*(of for _, of in found), strict=True)],
        )

    def sweep_part(self, part: Part) -> None:
        """Fit and judge the probes of a part's features, and leave them in its last checkpoint."""
        self._make(part, lambda progress: self._sweep(part, progress))

    def certify(self, fits: Sequence[FittedProbes], pairs: Sequence[Tensor]) -> list[Certificate]:
        """Certify the probes of each K, for its pairs (p, 2) and as many random ones as the
        parameters say.

        Raises:
            KeyboardInterrupt: the run is asked to stop; what there is is saved.
        """

        def make(progress: Progress | None = None) -> Certifying:
            return Certifying(
                list(zip(fits, self._ks, strict=True)),
                self._label(self.train.codes, self.train.labels, progress),
                pairs,
                self._parameters.certified_pairs,
            )

        # After the parts of the sweep.
        n_features = self.train.codes.n_features
        part = Part(self._parameters.parts, self._parameters.parts + 1, 0, n_features)
        self._make(part, make)
        certifying = make()
        self._fit(part, certifying).collect()
        return certifying.run()

    def _make(self, part: Part, make: Callable[[Progress], Sweep | Certifying]) -> None:
        """Do a part of the work, or go on with it, and leave it in its last checkpoint."""
        with self._telling(part) as (watch, progress):
            work = make(progress)
            fit = self._fit(part, work)
            fit.resume()
            if not fit.is_done:
                with fit.in_progress():
                    watch.append(fit.save_if_due)
                    work.run()

    @contextmanager
    def _telling(self, part: Part) -> Iterator[tuple[list[Callable[[], None]], Progress]]:
        """A bar, and progress that it shows and that then calls what is in the list."""
        name = self._method.removeprefix("probe-")
        of = part.of - 1  # one is the certificates
        number = f", part {part.number + 1} of {of}" if 1 < of > part.number else ""

        watch: list[Callable[[], None]] = []
        with staged_bar(f"layer {self._layer}, {name}: probes{number}") as show:

            def tell(stage: str, done: int, total: int) -> None:
                show(stage, done, total)
                for each in watch:
                    each()

            yield watch, tell

    def _parts(self) -> list[Part]:
        """Slabs of features, whole groups; the certificates are one part more."""
        of, by_class = self._parameters.parts, self._settings.by_class
        group = solved_together(self.n_classes, by_class=by_class)
        return [
            Part(part.number, of + 1, part.start, part.stop)
            for part in cut(self.train.codes.n_features, of, group)
        ]

    def _sweep(self, part: Part, progress: Progress | None = None) -> Sweep:
        return Sweep(
            self._settings,
            self._label(self.train.codes, self.train.labels, progress),
            self._label(self.val.codes, self.val.labels, progress),
            self._ks,
            slice(part.start, part.stop),
        )

    def _label(
        self, codes: Codes, classes: Tensor, progress: Progress | None = None
    ) -> LabeledCodes:
        rows, features = self._parameters.slab_rows, self._parameters.slab_features
        return LabeledCodes(codes, classes, self.n_classes, rows, features, progress)

    def _fit(self, part: Part, work: Estimator) -> Fit:
        train, _ = self._shards
        return Fit(
            work,
            self._checkpoints,
            1,
            self._parameters.checkpoint_minutes,
            method=self._method,
            shards=train,
            layer=self._layer,
            statistics={},
            parameters=self._about,
            part=part,
        )

    @cached_property
    def _about(self) -> dict[str, Any]:
        values = result_values(self._parameters)
        return {
            **{name: value for name, value in values.items() if name not in _OF_SCORES},
            "ks": self._ks,
            "codes": [_identify(codes) for codes in self._codes],
            "classes": [
                fingerprint_tensors({"classes": each.labels}) for each in (self.train, self.val)
            ],
        }

    def _request(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What another rank makes the same work of, JSON and tensors; None where the codes are this
        process' own, in memory.
        """
        train, val = (describe_codes(codes) for codes in self._codes)
        if train is None or val is None:
            return None
        request = {
            "codes": [train[0], val[0]],
            "shards": [[str(each.path), each.threads] for each in self._shards],
            "parameters": self._parameters.model_dump(mode="json"),
            "checkpoints": str(self._checkpoints.folder),
            "device": self._device,
            "layer": self._layer,
            "method": self._method,
            "ks": self._ks,
        }
        # Those of both splits are of one model.
        return request, train[1]


def sweep_part(part: Part, request: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Fit and judge the probes of a part's features: in whatever process, from what `ProbeWork`
    asks of it.
    """
    train, val = (remake_codes(each, tensors) for each in request["codes"])
    shards_train, shards_val = (
        Shards(path, threads=threads) for path, threads in request["shards"]
    )
    ProbeWork(
        (train, val),
        (shards_train, shards_val),
        ProbeParameters.model_validate(request["parameters"]),
        Checkpoints(request["checkpoints"]),
        request["device"],
        layer=request["layer"],
        method=request["method"],
        ks=request["ks"],
    ).sweep_part(part)


def as_estimator(
    parameters: ProbeParameters, fitted: FittedProbes | None = None
) -> LogisticProbe1d:
    """The estimator of these parameters, with a fit if one is given."""
    probe = LogisticProbe1d(
        parameters.ridge,
        class_weight=parameters.class_weight,
        max_iter=parameters.max_iter,
        slab_features=parameters.slab_features,
        slab_rows=parameters.slab_rows,
    )
    if fitted is not None:
        probe.fitted_ = fitted
    return probe


def _check_alike(train: Codes, val: Codes) -> None:
    """The codes of both splits are of one model, as far as they say what they are of."""
    of_train, of_val = (getattr(codes, "provenance", {}) for codes in (train, val))
    for name in ("encoding", "layer", "model", "statistics"):
        if of_train.get(name) != of_val.get(name):
            raise ValueError(
                f"the codes of the two splits are of different models: their {name} is"
                f" {of_train.get(name)} and {of_val.get(name)}; encode the patches of both again"
            )


def _identify(codes: Codes) -> dict[str, Any]:
    """What codes are, JSON, as far as they say it."""
    return {
        "format": codes.format,
        "n_features": codes.n_features,
        "provenance": dict(getattr(codes, "provenance", {})),
        "made_from": hashlib.sha256(getattr(codes, "made_from", "").encode()).hexdigest(),
    }

"""1-D logistic probes for every (feature, class), and what they say of an encoding."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from assay.io.shards import Shards
from assay.numerics.codes import Codes, SelectedCodes, TopKCodes, measure_l0, select_features
from assay.numerics.probe import LogisticProbe1d
from assay.numerics.ranking import purity_at_k
from assay.numerics.scores import Scores, best_features, score_encoding
from assay.parameters import ProbeParameters
from assay.pipelines.stream import pick_device

VOID = 0
"""The label of a patch that shows none of the classes."""


def fit_probes(
    codes_train: Codes,
    codes_val: Codes,
    shards_train: Shards,
    shards_val: Shards,
    parameters: ProbeParameters,
    device: str,
    *,
    layer: int,
    method: str,
    encoding: str,
    k: int,
    kept: int | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fit the probes on probe train and judge them on probe val.

    With ``kept``, the codes are top-K codes for a larger K, and only so many entries of each row are looked at.

    Returns:
        The probes: the fitted state on standardised features, `coef` and `intercept` on raw ones, and float64
        (features, classes) `train_ce`, `val_ce` (nats) and `val_ap`, with the intercept-only `base_ce` (classes,) on
        validation. And the encoding's scores, as JSON scalars.

    Raises:
        ValueError: every patch of a split is void, codes and labels differ in number, or no class is in both splits.
    """
    if kept is not None:
        codes_train, codes_val = TopKCodes(codes_train, kept), TopKCodes(codes_val, kept)
    place = pick_device(device)
    train_labels, val_labels = _read_labels(shards_train).to(place), _read_labels(shards_val).to(place)
    first = 0 if parameters.void == "class" else 1
    n_classes = int(torch.stack([train_labels.max(), val_labels.max()]).max()) + 1 - first
    l0 = measure_l0(codes_val, parameters.batch_size)
    train, train_classes = _classify(codes_train, train_labels, parameters.void)
    val, val_classes = _classify(codes_val, val_labels, parameters.void)
    probe = LogisticProbe1d(
        parameters.ridge,
        max_iter=parameters.max_iter,
        slab_bytes=parameters.slab_mib * 2**20,
        batch_size=parameters.batch_size,
    ).fit(train, train_classes, n_classes)
    results = {
        "train_ce": probe.loss_matrix(train, train_classes),
        "val_ce": probe.loss_matrix(val, val_classes),
        "val_ap": probe.average_precision(val, val_classes),
        "base_ce": probe.base_loss(val_classes),
    }
    scores = score_encoding(
        train_ce=results["train_ce"],
        val_ce=results["val_ce"],
        base_ce=results["base_ce"],
        val_ap=results["val_ap"],
        purity=_purity_of_best(results["train_ce"], val, val_classes, parameters.batch_size),
        present_in_val=torch.bincount(val_classes[val_classes >= 0], minlength=n_classes) > 0,
        fitted=probe.fitted_classes_,
    )
    about = {"layer": layer, "method": method, "encoding": encoding, "k": k, "l0": l0}
    raw_scale = {"coef": probe.coef_, "intercept": probe.intercept_}
    return {**probe.state_dict(), **raw_scale, **results}, about | _as_json(scores, first) | {
        "converged": probe.converged_
    }


def _read_labels(shards: Shards) -> Tensor:
    labels = shards.labels()
    if (labels == VOID).all():
        raise ValueError(
            f"{shards.path}: all {len(labels)} labels are {VOID}, void; wanted patches of a class: label them, or name other shards"
        )
    return labels


def _classify(codes: Codes, labels: Tensor, void: str) -> tuple[Codes, Tensor]:
    """The codes that take part and the class of each, int64: label - 1 and -1 for void, or the label where void is a class."""
    if codes.n_rows != len(labels):
        raise ValueError(
            f"there are codes of {codes.n_rows} patches and labels of {len(labels)}: encode the patches again"
        )
    if void == "class":
        return codes, labels
    if void == "negative":
        return codes, labels - 1
    kept = labels != VOID
    return SelectedCodes(codes, kept), labels[kept] - 1


def _purity_of_best(train_ce: Tensor, val: Codes, classes: Tensor, batch_size: int) -> Tensor:
    """Purity@16 of each class's best feature on validation, float64 (classes,)."""
    best = best_features(train_ce).clamp(min=0)
    values = select_features(val, best, batch_size, classes.device)
    return torch.tensor([purity_at_k(row, classes, 16) for row in values], dtype=torch.float64, device=classes.device)


def _as_json(scores: Scores, first_label: int) -> dict[str, Any]:
    """The scores with classes named by their labels."""
    fields = dataclasses.asdict(scores)
    threshold = fields.pop("coverage_threshold")
    fields[f"coverage_at_{threshold:g}"] = fields.pop("coverage")
    for row in fields["classes"]:
        row["label"] = row.pop("class_id") + first_label
    for name in ("absent_in_val", "absent_in_train"):
        fields[name] = [class_id + first_label for class_id in fields[name]]
    return fields

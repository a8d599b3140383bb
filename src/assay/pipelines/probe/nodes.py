"""1-D logistic probes for every (feature, class), and what they say of an encoding."""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from assay.codes import Codes
from assay.io.checkpoints import Checkpoints
from assay.io.shards import Shards
from assay.numerics.codes import gather_columns, measure_l0_by_rank
from assay.numerics.probe import LogisticProbe1d
from assay.numerics.ranking import count_classes, purity_at_k, strongest_examples
from assay.numerics.scores import PURITY, Judgment, Scores, best_features, score_encoding
from assay.parameters import ProbeParameters
from assay.pipelines.probe.work import ProbeWork, as_estimator


def fit_probes(
    codes_train: Codes,
    codes_val: Codes,
    shards_train: Shards,
    shards_val: Shards,
    parameters: ProbeParameters,
    checkpoints: Checkpoints,
    device: str,
    *,
    layer: int,
    method: str,
    rows: tuple[tuple[str, int | None], ...],
) -> tuple[dict[str, Tensor] | dict[str, Any] | pd.DataFrame, ...]:
    """Fit the probes of one or several encodings, named in ``rows`` with their k, on probe train
    and judge them on probe val.

    The codes are those of the largest k; of more than one encoding, all are fitted in the same
    passes over them, part by part. Work that was cut off goes on from its last checkpoints. A k of
    None is that of the codes, or the number of features where their rows
    are of any length.

    Returns:
        For each encoding, one after the other:
        - The probes: the fitted state on standardized features, `coef` and `intercept` on raw ones,
          and float64 (features, classes) `train_ce`, `val_ce` (nats), `val_ap`,
          `val_true_positives` and `val_predicted`, with `base_ce`, the intercept-only CE on
          validation, and `train_counts`, `val_counts` (classes,).
        - The encoding's scores, as JSON scalars; `n_train` and `n_val` are the patches that took
          part.
        - A table with a row for each (class, feature), by class.
        - Where each class's best feature is strongest, for the class or against it as its weight
          says: for each class that is fitted, `label` and `feature` int64 (n,), and `example`,
          `patch`, `strength` as `strongest_examples` has them.

    Raises:
        ValueError: every patch of a split is void, codes and labels differ in number, the two
            splits' codes are of different models, no class is in both splits, or values are not
            finite.
        CertificateError: a loss is not that of the data.
    """
    # The codes of one encoding are its own, all of them.
    ks = [k for _, k in rows] if len(rows) > 1 else [None]
    work = ProbeWork(
        (codes_train, codes_val),
        (shards_train, shards_val),
        parameters,
        checkpoints,
        device,
        layer=layer,
        method=f"probe-{rows[0][0] if len(rows) == 1 else method}",
        ks=ks,
    )
    first, n_classes, place = work.first, work.n_classes, work.device
    train_classes, val_classes, counted = work.train.labels, work.val.labels, work.counted
    fits, judgments = work.sweep()
    probes = [as_estimator(parameters, fitted) for fitted in fits]
    best = [best_features(fitted.train_ce).clamp(min=0) for fitted in fits]
    by_val = [best_features(judgment.loss).clamp(min=0) for judgment in judgments]
    every = torch.arange(n_classes, device=place)
    certificates = work.certify(
        fits,
        [
            torch.cat([torch.stack([of, every], 1) for of in both])
            for both in zip(best, by_val, strict=True)
        ],
    )
    l0 = measure_l0_by_rank(codes_val, parameters.slab_rows)
    strongest = gather_columns(
        codes_val, list(zip(best, ks, strict=True)), parameters.slab_rows, place
    )
    results: list[dict[str, Tensor] | dict[str, Any] | pd.DataFrame] = []
    for (encoding, k), probe, judgment, certificate, own, values in zip(
        rows, probes, judgments, certificates, best, strongest, strict=True
    ):
        certificate.check()
        of_classes = values[:, counted]
        val_error = probe.certify_loss(of_classes, own, val_classes, judgment.loss)
        scores = score_encoding(
            train_ce=probe.loss_,
            coef=probe.coef_standardized_,
            val=judgment,
            base_ce=probe.base_loss(val_classes),
            purity=torch.tensor(
                [[purity_at_k(row, val_classes, n) for n in PURITY] for row in of_classes],
                dtype=torch.float64,
            ),
            train_counts=count_classes(train_classes, n_classes),
            fitted=probe.fitted_classes_,
            n_top=parameters.top_features,
        )
        tensors = _as_tensors(probe, judgment, train_classes, val_classes)
        about = {
            "layer": layer,
            "method": method,
            "encoding": encoding,
            "k": k or codes_val.k or codes_val.n_features,
        }
        about |= {"n_train": len(train_classes), "n_val": len(val_classes)}
        results += [
            tensors,
            about
            | {"l0": float(l0[min(k or len(l0), len(l0)) - 1])}
            | _as_json(scores, first)
            | {
                "max_abs_activation": float(probe.max_abs_.max()),
                "refined_pairs": probe.n_refined_,
                "converged": bool(probe.converged_.all()),
                "certified_pairs": certificate.pairs,
                "certificate_ce": certificate.ce_error,
                "certificate_gradient": certificate.gradient,
                "certificate_val_ce": val_error,
            },
            tabulate_pairs(tensors, first),
            _show_examples(probe, own, values, counted, shards_val, parameters.examples, first),
        ]
    return tuple(results)


def _as_tensors(
    probe: LogisticProbe1d, judgment: Judgment, train_classes: Tensor, val_classes: Tensor
) -> dict[str, Tensor]:
    return {
        **probe.state_dict(),
        "coef": probe.coef_,
        "intercept": probe.intercept_,
        "val_ce": judgment.loss,
        "val_ap": judgment.average_precision,
        "val_true_positives": judgment.true_positives,
        "val_predicted": judgment.predicted,
        "base_ce": probe.base_loss(val_classes),
        "train_counts": count_classes(train_classes, len(probe.base_rate_)),
        "val_counts": count_classes(val_classes, len(probe.base_rate_)),
    }


def tabulate_pairs(tensors: dict[str, Tensor], first_label: int) -> pd.DataFrame:
    """A row for each (class, feature), by class, of what `fit_probes` gives as tensors; a class has
    the name of its label.

    `weight`, `bias` are on raw features, CE is in nats; a class that is not fitted has NaN.
    """
    names = {
        "weight": "coef",
        "bias": "intercept",
        "train_ce": "train_ce",
        "val_ce": "val_ce",
        "val_ap": "val_ap",
        "val_true_positives": "val_true_positives",
        "val_predicted": "val_predicted",
    }
    n_features, n_classes = tensors["coef"].shape
    columns = {name: tensors[key].T.flatten().cpu().numpy() for name, key in names.items()}
    counts = {
        name: tensors[name].cpu().repeat_interleave(n_features).numpy()
        for name in ("train_counts", "val_counts")
    }
    labels = torch.arange(first_label, first_label + n_classes, dtype=torch.int32)
    return pd.DataFrame(
        {
            "label": labels.repeat_interleave(n_features).numpy(),
            "feature": torch.arange(n_features, dtype=torch.int32).repeat(n_classes).numpy(),
            **columns,
            **counts,
        }
    )


def _show_examples(
    probe: LogisticProbe1d,
    best: Tensor,
    values: Tensor,
    counted: Tensor,
    shards: Shards,
    n_examples: int,
    first_label: int,
) -> dict[str, Tensor]:
    classes = probe.fitted_classes_.nonzero().flatten()
    sign = torch.where(
        probe.coef_standardized_[best, torch.arange(len(best), device=best.device)] < 0, -1.0, 1.0
    )
    patches = shards.metadata.content_tokens_per_example
    shown = strongest_examples((values * sign[:, None])[classes], counted, patches, n_examples)
    return {"label": classes + first_label, "feature": best[classes], **shown}


def _as_json(scores: Scores, first_label: int) -> dict[str, Any]:
    """The scores with classes named by their labels."""
    fields = dataclasses.asdict(scores)
    threshold = fields.pop("coverage_threshold")
    fields[f"coverage_at_{threshold:g}"] = fields.pop("coverage")
    fields["classes"] = list(fields["classes"])
    for row in fields["classes"]:
        row["label"] = row.pop("class_id") + first_label
        for name in ("top_features", "top_average_precisions"):
            row[name] = list(row[name])
    for name in ("absent_in_val", "absent_in_train"):
        fields[name] = [class_id + first_label for class_id in fields[name]]
    return fields

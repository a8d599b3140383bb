"""The probe node against Newton's method on one (feature, class) at a time, scikit-learn's AP, and
loops.
"""

import dataclasses
import json
import logging
import tempfile
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from assay.encodings import Form
from assay.io.checkpoints import Checkpoints
from assay.numerics.codes import TensorCodes
from assay.numerics.dictionary import open_dictionary
from assay.numerics.pca import StreamingPCA
from assay.numerics.probe import CertificateError, labeled
from assay.parameters import ProbeParameters
from assay.pipelines.probe.nodes import fit_probes
from shards import read_content

LAYERS, TOKENS, N_FEATURES = (3, 5), 16, 6
ABOUT = {"layer": 5, "method": "pca", "encoding": "pca-dense", "k": 80}
VOID_MODES = ("drop", "negative", "class")


@dataclass
class Labelled:
    """As much of a folder of shards as probes look at."""

    patches: torch.Tensor
    path: str = "somewhere"
    metadata: SimpleNamespace = dataclasses.field(
        default_factory=lambda: SimpleNamespace(content_tokens_per_example=TOKENS)
    )

    d_model: int = 0

    def labels(self):
        return self.patches

    def identity(self):
        return {"name": self.path}


class Told(TensorCodes):
    """Codes that say where they come from."""

    provenance: dict[str, object]


class Counted(TensorCodes):
    """Codes that keep the batch size of every pass over them."""

    def __init__(self, values):
        super().__init__(values)
        self.passes = []

    def batches(self, batch_size, start=0):
        self.passes.append(batch_size)
        return super().batches(batch_size, start)


class Narrow(TensorCodes):
    """Sparse or one-hot codes, from two tensors."""

    def __init__(self, code_format, n_features, **arrays):
        self.format, self.n_features, self.arrays = code_format, n_features, arrays
        self.n_rows = len(arrays["indices"])
        self.k = 1 if code_format == "onehot" else arrays["indices"].shape[1]

    def batches(self, batch_size, start=0):
        for first in range(start, self.n_rows, batch_size):
            yield {name: array[first : first + batch_size] for name, array in self.arrays.items()}


@pytest.fixture(scope="module", params=LAYERS)
def split(planted, request):
    """Features (rows, 6) and labels 0 to 3 of both probe splits: a layer's where classes are alike,
    and one's where they are not.
    """
    features = [
        torch.from_numpy(read_content(path, request.param)[:, [0, 10, 20, 25, 30, 35]]).float()
        for path in planted
    ]
    for values in features:
        values[:, 2] = values[:, 2].round()
    labels = [
        torch.from_numpy(np.fromfile(path / "labels.bin", np.uint8).astype(np.int64))
        for path in planted
    ]
    return features, labels


@pytest.fixture
def probe(split, tmp_path):
    """Runs the node on these codes and labels, or others, with these parameters."""

    def run(codes=None, labels=None, rows=(("pca-dense", 80),), whole=False, **parameters):
        train, val = codes or [TensorCodes(values) for values in split[0]]
        shards: list[Any] = [
            Labelled(patches, name)
            for patches, name in zip(labels or split[1], ("train", "val"), strict=True)
        ]
        settings = ProbeParameters(**parameters)
        found = fit_probes(
            train,
            val,
            shards[0],
            shards[1],
            settings,
            Checkpoints(tempfile.mkdtemp(dir=tmp_path)),  # tensors do not say what codes they are
            "cpu",
            layer=5,
            method="pca",
            rows=rows,
        )
        return found if whole else found[:2]

    return run


def newton(x, y, ridge):
    """w and b of one probe on standardized x, float64, by Newton's method."""
    b0 = np.log(y.mean() / (1 - y.mean()))
    design = np.stack([np.ones_like(x), x])
    theta = np.array([b0, 0.0])
    for _ in range(50):
        p = 1 / (1 + np.exp(-theta @ design))
        gradient = design @ (p - y) / len(x) + ridge * (theta - [b0, 0])
        hessian = (design * p * (1 - p)) @ design.T / len(x) + ridge * np.eye(2)
        theta -= np.linalg.solve(hessian, gradient)
    assert np.abs(gradient).max() < 1e-10
    return theta


def cross_entropy(logits, y):
    return np.mean(np.logaddexp(0, logits) - y * logits)


def oracle(split, void, ridge=1e-8):
    """What the node should find, for every class of ``names``."""
    features = [values.double().numpy() for values in split[0]]
    labels = [patches.numpy() for patches in split[1]]
    if void == "drop":
        features = [values[patches > 0] for values, patches in zip(features, labels, strict=True)]
        labels = [patches[patches > 0] for patches in labels]
    (x, x_val), (patches, patches_val) = features, labels
    names = range(0 if void == "class" else 1, 4)
    mean, std = x.mean(axis=0), x.std(axis=0)
    shape = (x.shape[1], len(names))
    found = {name: np.empty(shape) for name in ("w", "b", "train_ce", "val_ce", "val_ap")}
    found["base_ce"] = np.empty(len(names))
    for c, name in enumerate(names):
        y, y_val = 1.0 * (patches == name), 1.0 * (patches_val == name)
        rate = y.mean()
        found["base_ce"][c] = -np.mean(y_val * np.log(rate) + (1 - y_val) * np.log(1 - rate))
        for j in range(x.shape[1]):
            b, w = newton((x[:, j] - mean[j]) / std[j], y, ridge)
            logits, logits_val = (
                (values[:, j] - mean[j]) / std[j] * w + b for values in (x, x_val)
            )
            found["w"][j, c], found["b"][j, c] = w, b
            found["train_ce"][j, c] = cross_entropy(logits, y)
            found["val_ce"][j, c] = cross_entropy(logits_val, y_val)
            found["val_ap"][j, c] = average_precision_score(y_val, np.sign(w) * x_val[:, j])
    best = found["train_ce"].argmin(axis=0)
    purity = []
    for j in best:
        top = patches_val[np.argsort(-x_val[:, j], kind="stable")[:16]]
        purity.append(max(int((top == name).sum()) for name in names) / 16)
    return found, list(names), best, purity


@pytest.mark.parametrize("void", VOID_MODES)
def test_every_probe_is_at_the_optimum(split, probe, void):
    found, _ = probe(void=void)
    wanted, names, *_ = oracle(split, void)
    assert found["train_ce"].shape == (N_FEATURES, len(names))
    assert found["converged"].all()
    for name, key in {"coef_standardized": "w", "intercept_standardized": "b"}.items():
        np.testing.assert_allclose(found[name].numpy(), wanted[key], rtol=1e-4, atol=1e-5)
    for name in ("train_ce", "val_ce", "val_ap", "base_ce"):
        assert found[name].dtype == torch.float64
        np.testing.assert_allclose(found[name].numpy(), wanted[name], rtol=1e-6)


@pytest.mark.parametrize("void", VOID_MODES)
def test_scores_are_those_of_the_classes_best_features(split, probe, void):
    _, scores = probe(void=void)
    wanted, names, best, purity = oracle(split, void)
    every = range(len(names))
    train_ce, val_ce, ap = (wanted[name][best, every] for name in ("train_ce", "val_ce", "val_ap"))
    assert [row["label"] for row in scores["classes"]] == names
    assert [row["feature"] for row in scores["classes"]] == best.tolist()
    for row, c in zip(scores["classes"], every, strict=True):
        assert row["train_ce"] == pytest.approx(train_ce[c])
        assert row["val_ce"] == pytest.approx(val_ce[c])
        assert row["base_ce"] == pytest.approx(wanted["base_ce"][c])
        assert row["average_precision"] == pytest.approx(ap[c])
        assert row["purity_at_16"] == purity[c]
        by_val = wanted["val_ce"][:, c].argmin()
        assert row["feature_by_val"] == by_val
        assert row["average_precision_by_val"] == pytest.approx(wanted["val_ap"][by_val, c])
    assert scores["mean_train_ce"] == pytest.approx(train_ce.mean())
    assert scores["probe_r"] == pytest.approx(
        1 - val_ce.mean() / wanted["base_ce"].mean(), abs=1e-7
    )
    assert scores["map"] == pytest.approx(ap.mean())
    assert scores["purity_at_16"] == pytest.approx(np.mean(purity))
    assert scores["coverage_at_0.3"] == pytest.approx(
        sum(value >= 0.3 for value in ap) / len(names)
    )
    assert scores["absent_in_val"] == scores["absent_in_train"] == []
    assert {name: scores[name] for name in ABOUT} == ABOUT
    assert scores["converged"] is True
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_l0_counts_the_nonzeros_of_every_validation_patch(split, probe):
    train, val = (values.clone() for values in split[0])
    val[:5] = 0
    _, scores = probe([TensorCodes(train), TensorCodes(val)])
    assert scores["l0"] == np.count_nonzero(val.numpy()) / len(val)


def test_void_decides_what_void_patches_are(split, probe):
    found = {void: probe(void=void)[1] for void in VOID_MODES}
    assert {
        void: [row["label"] for row in scores["classes"]] for void, scores in found.items()
    } == {
        "drop": [1, 2, 3],
        "negative": [1, 2, 3],
        "class": [0, 1, 2, 3],
    }
    assert len({scores["mean_train_ce"] for scores in found.values()}) == 3
    for split_name, labels in zip(
        ("n_train", "n_val"), split[1], strict=True
    ):  # how many patches took part
        kept = int((labels > 0).sum())
        assert 0 < kept < len(labels)
        counted = {void: scores[split_name] for void, scores in found.items()}
        assert counted == {"drop": kept, "negative": len(labels), "class": len(labels)}
    # Negatives or a class of their own, void patches are the same to the probes of the others;
    # purity tells them apart.
    for as_class, as_negative in zip(
        found["class"]["classes"][1:], found["negative"]["classes"], strict=True
    ):
        purities = {f"purity_at_{k}" for k in (16, 64, 256)}
        assert {
            name for name in as_class if as_class[name] != pytest.approx(as_negative[name])
        } <= purities


def test_dropped_void_patches_change_nothing(split, probe):
    features = [values.clone() for values in split[0]]
    for values, patches in zip(features, split[1], strict=True):
        values[patches == 0] = 1e4
    (found, scores), (wanted, same) = probe([TensorCodes(values) for values in features]), probe()
    assert scores == same
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_ridge_draws_the_weights_to_0(probe):
    weights = [probe(ridge=ridge)[0]["coef_standardized"].abs() for ridge in (1e-8, 0.1)]
    assert (weights[1] < weights[0]).all()


def test_ridge_is_that_of_the_objective(split, probe):
    found, _ = probe(ridge=0.1)
    wanted, *_ = oracle(split, "drop", ridge=0.1)
    np.testing.assert_allclose(
        found["coef_standardized"].numpy(), wanted["w"], rtol=1e-5, atol=1e-6
    )


def test_max_iter_bounds_the_newton_steps(probe, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(CertificateError, match="raise max_iter"):
        probe(max_iter=1)
    assert "raise max_iter" in caplog.text
    found, scores = probe(max_iter=100)
    assert scores["converged"] is True
    assert found["n_iter"].shape == found["coef"].shape


@pytest.mark.parametrize("slab_rows", [7, 500])
def test_slab_rows_are_the_patches_read_at_once_and_change_no_result(split, probe, slab_rows):
    codes = [Counted(values) for values in split[0]]
    found, _ = probe(codes, slab_rows=slab_rows)
    assert {size for each in codes for size in each.passes} == {slab_rows}
    wanted, _ = probe()
    torch.testing.assert_close(found["train_ce"], wanted["train_ce"], rtol=1e-9, atol=0)


def test_slab_features_decide_how_many_passes_are_made(split, probe, monkeypatch):
    monkeypatch.setattr(labeled, "_SOLVED", 1)
    results = {}
    for slab_features in (1, 6, None):
        codes = [Counted(values) for values in split[0]]
        found, _ = probe(codes, slab_features=slab_features, certified_pairs=1)
        results[slab_features] = [len(each.passes) for each in codes], found["val_ap"]
    assert results[6][0] == results[None][0]
    assert results[1][0][0] >= results[6][0][0] + 5
    assert results[1][0][1] == results[6][0][1] + 5
    torch.testing.assert_close(results[1][1], results[6][1], rtol=0, atol=0)


def test_classes_of_equal_weight_are_those_of_scikit_learn(split, probe):
    found, scores = probe(class_weight="balanced")
    kept = [patches > 0 for patches in split[1]]
    x = split[0][0][kept[0]].double().numpy()
    y = (split[1][0][kept[0]] == 2).numpy()
    for j in range(N_FEATURES):
        column = ((x[:, j] - x[:, j].mean()) / x[:, j].std())[:, None]
        model = LogisticRegression(
            C=1e8 / len(y), class_weight="balanced", tol=1e-12, max_iter=1000
        ).fit(column, y)
        assert float(found["coef_standardized"][j, 1]) == pytest.approx(
            model.coef_[0, 0], rel=1e-3, abs=1e-4
        )
    assert scores["mean_base_ce"] == pytest.approx(np.log(2))


def test_certified_pairs_are_drawn_beside_each_classes_best(probe):
    for drawn in (1, 200):
        _, scores = probe(certified_pairs=drawn)
        assert 3 <= scores["certified_pairs"] <= 6 + drawn  # the best by train and by validation CE
        assert 0 <= scores["certificate_ce"] < 1e-9
        assert 0 <= scores["certificate_gradient"] < 1e-8
        assert 0 <= scores["certificate_val_ce"] < 1e-9
    assert scores["certified_pairs"] == 3 * N_FEATURES


def test_top_features_are_those_of_the_highest_average_precision(probe):
    for n in (2, 99):
        found, scores = probe(top_features=n)
        for c, row in enumerate(scores["classes"]):
            order = found["val_ap"][:, c].argsort(descending=True, stable=True)[:n].tolist()
            assert list(row["top_features"]) == order
            assert list(row["top_average_precisions"]) == found["val_ap"][order, c].tolist()


def test_those_are_all_the_parameters():
    assert set(ProbeParameters.model_fields) == {
        "void",
        "ridge",
        "class_weight",
        "max_iter",
        "slab_rows",
        "slab_features",
        "parts",
        "checkpoint_minutes",
        "certified_pairs",
        "top_features",
        "examples",
    }


@pytest.mark.parametrize("void", VOID_MODES)
def test_the_table_of_pairs_has_a_row_for_each_class_and_feature(split, probe, void, tmp_path):
    found, scores, pairs, _ = probe(void=void, whole=True)
    pairs.to_parquet(tmp_path / "pairs.parquet", index=False)
    pairs = pd.read_parquet(tmp_path / "pairs.parquet")
    names = [row["label"] for row in scores["classes"]]
    assert pairs["label"].tolist() == [name for name in names for _ in range(N_FEATURES)]
    assert pairs["feature"].tolist() == [*range(N_FEATURES)] * len(names)
    columns = {
        "weight": "coef",
        "bias": "intercept",
        "train_ce": "train_ce",
        "val_ce": "val_ce",
        "val_ap": "val_ap",
    }
    for row in pairs.itertuples():
        c = names.index(row.label)
        for column, name in columns.items():
            assert getattr(row, column) == float(found[name][row.feature, c])
        for column, patches in zip(("train_counts", "val_counts"), split[1], strict=True):
            assert getattr(row, column) == int((patches == row.label).sum())
        logits = row.weight * split[0][1][:, row.feature].double() + row.bias
        taking_part = (
            torch.ones_like(split[1][1], dtype=torch.bool) if void != "drop" else split[1][1] > 0
        )
        assert row.val_predicted == int(((logits >= 0) & taking_part).sum())
        assert row.val_true_positives == int(((logits >= 0) & (split[1][1] == row.label)).sum())


@pytest.mark.parametrize("void", VOID_MODES)
def test_examples_are_the_images_where_a_classes_best_feature_speaks_most_for_it(
    split, probe, void
):
    """Against a loop: the best feature's values, turned where its weight is negative; void patches
    show but do not count.
    """
    _, scores, _, examples = probe(void=void, whole=True, examples=3)
    found, *_ = probe(void=void)
    values, labels = split[0][1], split[1][1]
    first = 0 if void == "class" else 1
    assert examples["label"].tolist() == [row["label"] for row in scores["classes"]]
    for place, row in enumerate(scores["classes"]):
        feature = row["feature"]
        assert examples["feature"][place] == feature
        speaks = values[:, feature] * (
            -1 if found["coef"][feature, row["label"] - first] < 0 else 1
        )
        strength = [[float(value) for value in image] for image in speaks.view(-1, TOKENS)]
        counted = [
            [void != "drop" or label != 0 for label in image] for image in labels.view(-1, TOKENS)
        ]
        best = []
        for number, (image, counts) in enumerate(zip(strength, counted, strict=True)):
            top = max(value for value, counts_ in zip(image, counts, strict=True) if counts_)
            patch = next(i for i, value in enumerate(image) if counts[i] and value == top)
            best.append((-top, number, patch))
        wanted = sorted(best)[:3]
        assert examples["example"][place].tolist() == [number for _, number, _ in wanted]
        assert examples["patch"][place].tolist() == [patch for _, _, patch in wanted]
        assert examples["strength"][place].tolist() == [strength[number] for _, number, _ in wanted]
    assert probe(whole=True, examples=5)[3]["example"].shape[1] == 5


def test_a_class_absent_from_a_split_is_named_by_its_label_and_not_scored(split, probe):
    train, val = (patches.clone() for patches in split[1])
    train[train == 1] = 5  # 1 and 6 are in validation alone, 3 and 5 in train alone, 4 nowhere
    val[val == 3] = 6
    for void in ("drop", "negative"):
        _, scores = probe(labels=[train, val], void=void)
        assert [row["label"] for row in scores["classes"]] == [2]
        assert scores["absent_in_val"] == [3, 4, 5]
        assert scores["absent_in_train"] == [1, 4, 6]
    _, scores = probe(labels=[train, val], void="class")
    assert [row["label"] for row in scores["classes"]] == [0, 2]
    assert scores["absent_in_val"] == [3, 4, 5]
    assert scores["absent_in_train"] == [1, 4, 6]


def test_absent_classes_do_not_pull_the_means_down(split, probe):
    train, val = (patches.clone() for patches in split[1])
    val[val == 3] = 0
    _, scores = probe(labels=[train, val], void="negative")
    rows = scores["classes"]
    assert [row["label"] for row in rows] == [1, 2]
    assert scores["map"] == pytest.approx(np.mean([row["average_precision"] for row in rows]))
    assert scores["probe_r"] == pytest.approx(
        1 - sum(r["val_ce"] for r in rows) / sum(r["base_ce"] for r in rows)
    )


@pytest.mark.parametrize("void", VOID_MODES)
@pytest.mark.parametrize("where", [0, 1])
def test_labels_that_are_all_void_are_refused(split, probe, void, where):
    labels = list(split[1])
    labels[where] = torch.zeros_like(labels[where])
    with pytest.raises(
        ValueError, match=rf"^{('train', 'val')[where]}: all \d+ labels are 0, void; wanted patches"
    ):
        probe(labels=labels, void=void)


def test_splits_without_a_common_class_are_refused(split, probe):
    train, val = (
        torch.where(patches == 0, 0, patches % 2 + start)
        for patches, start in zip(split[1], (1, 3), strict=True)
    )
    with pytest.raises(
        ValueError, match="none of 4 classes is both fitted in train and present in validation"
    ):
        probe(labels=[train, val])


@pytest.mark.parametrize("where", [0, 1])
def test_codes_of_other_patches_than_the_labels_are_refused(split, probe, where):
    codes = [TensorCodes(values) for values in split[0]]
    codes[where] = TensorCodes(split[0][where][1:])
    n = len(split[1][where])
    with pytest.raises(
        ValueError, match=f"codes of {n - 1} patches and labels of {n}: encode the patches again"
    ):
        probe(codes)


def test_codes_of_any_format_give_the_same_probes(split, probe):
    indices = [values[:, 2:4].abs().long() % 5 for values in split[0]]
    narrow, dense = [], []
    for each in indices:
        narrow.append(Narrow("onehot", 5, indices=each[:, 0]))
        dense.append(TensorCodes(torch.nn.functional.one_hot(each[:, 0], 5).float()))
    (found, scores), (wanted, same) = probe(narrow), probe(dense)
    torch.testing.assert_close(found["val_ce"], wanted["val_ce"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found["val_ap"], wanted["val_ap"], rtol=1e-12, atol=0)
    assert scores["l0"] == same["l0"] == 1
    narrow, dense = [], []
    for values in split[0]:
        kept, order = values.abs().topk(2)
        narrow.append(Narrow("sparse", N_FEATURES, values=kept, indices=order))
        dense.append(TensorCodes(torch.zeros_like(values).scatter(1, order, kept)))
    (found, scores), (wanted, same) = probe(narrow), probe(dense)
    assert scores["l0"] == same["l0"] == 2
    for name in ("train_ce", "val_ce", "val_ap", "base_ce"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-10)


def test_codes_of_a_larger_k_serve_every_row_of_a_sweep(split, probe):
    ranked = [values.abs().topk(4) for values in split[0]]
    wide = [Narrow("sparse", N_FEATURES, values=values, indices=order) for values, order in ranked]
    together = probe(wide, rows=(("two", 2), ("four", 4)), whole=True)
    for place, (encoding, k) in enumerate((("two", 2), ("four", 4))):
        narrow = [
            Narrow("sparse", N_FEATURES, values=values[:, :k], indices=order[:, :k])
            for values, order in ranked
        ]
        found, scores, pairs = together[4 * place : 4 * place + 3]
        wanted, same, table, _ = probe(narrow, rows=((encoding, k),), whole=True)
        assert scores["l0"] == same["l0"] == pytest.approx(k, abs=0.1)
        assert (scores["encoding"], scores["k"], len(pairs)) == (encoding, k, len(table))
        for name in ("train_ce", "val_ce", "val_ap", "base_ce"):
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-10)


def test_scores_of_whitened_coefficients_are_those_of_the_raw_ones(split, probe):
    """Of all of them: features are standardized before they are probed."""
    tokens = [values.double() for values in split[0]]
    pca = StreamingPCA().partial_fit(tokens[0])
    both = []
    for whiten in (False, True):
        encoder = open_dictionary(Form("dense", whiten=whiten), pca.state_dict())
        both.append(probe([TensorCodes(encoder.encode(x)["values"]) for x in tokens]))
    (raw, raw_scores), (white, white_scores) = both
    for name in ("train_ce", "val_ce", "val_ap"):
        torch.testing.assert_close(white[name], raw[name], rtol=1e-5, atol=1e-6)
    scale = pca.explained_variance_.sqrt()[:, None]
    torch.testing.assert_close(white["coef"], raw["coef"] * scale, rtol=1e-3, atol=1e-5)
    for name in ("probe_r", "map", "purity_at_16", "coverage_at_0.3", "l0"):
        assert white_scores[name] == pytest.approx(raw_scores[name], rel=1e-5), name


@pytest.mark.parametrize("name", ["model", "statistics", "encoding", "layer"])
def test_codes_of_two_models_are_refused(split, probe, name):
    about = {
        "model": "ab",
        "statistics": "cd",
        "encoding": "pca-dense",
        "layer": 5,
        "shards": "train",
    }
    train, val = (Told(values) for values in split[0])
    train.provenance, val.provenance = about, about | {"shards": "val"}
    probe([train, val], rows=(("pca-dense", 6),))
    val.provenance = about | {name: "other"}
    with pytest.raises(
        ValueError,
        match=f"codes of the two splits are of different models: their {name} is .* and other",
    ):
        probe([train, val])

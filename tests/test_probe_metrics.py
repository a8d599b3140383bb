"""What an export says of probes against a loop in float64; and an export that is cut off leaves
nothing that looks whole.
"""

import json
import os
import signal
import tempfile
from typing import Any

import numpy as np
import pytest
import torch

from assay.codes import Format
from assay.encodings import Encoding, Form, Model
from assay.export import _export, probe_metrics
from assay.io.checkpoints import Checkpoints
from assay.io.shards import Shards
from assay.numerics.codes import ComputedCodes, sparsify
from assay.parameters import ProbeParameters, parse_parameters
from assay.pipelines.probe.nodes import fit_probes
from assay.results import Results
from shards import read_content

ENCODING = Encoding(Model("pca"), Form("topk", 2), 2, stored_k=4)
SPLITS = ("probe_train", "probe_val")


class Sparse:
    """A tensor as signed top-4 codes; `at` is called before each batch."""

    format: Format = "sparse"
    k: int | None = 4

    def __init__(self, values, at=lambda _: None):
        self.values, self.at = values, at
        self.n_rows, self.n_features = values.shape

    def batches(self, batch_size, start=0):
        for first in range(start, self.n_rows, min(50, batch_size)):
            self.at(first)
            yield sparsify({"values": self.values[first : first + min(50, batch_size)]}, top_k=4)


def stored(planted):
    """The signed values of some features, of both splits."""
    return [
        torch.from_numpy(read_content(path, 5)[:, [0, 10, 20, 25, 30, 35]] - 5).float()
        for path in planted
    ]


def fitted(planted, void, k=2):
    """The probes of the first k entries, as the node leaves them."""
    train, val = map(Sparse, stored(planted))
    found = fit_probes(
        train,
        val,
        Shards(planted[0]),
        Shards(planted[1]),
        ProbeParameters(void=void),
        Checkpoints(tempfile.mkdtemp(dir=planted[0].parent)),
        "cpu",
        layer=5,
        method="pca",
        rows=((f"pca-topk-{k:05d}", k), ("pca-topk-00004", 4)),
    )
    return found[0]


def test_the_numbers_are_those_of_a_loop_in_float64(planted):
    for void in ("drop", "negative", "class"):
        probes = fitted(planted, void)
        for number, (path, values) in enumerate(zip(planted, stored(planted), strict=True)):
            top = sparsify({"values": values}, top_k=2)
            x = torch.zeros_like(values).scatter_(1, top["indices"], top["values"]).double()
            assert (x < 0).any()
            labels = Shards(path).labels()
            codes = ComputedCodes("sparse", len(x), 6, 2, lambda *_, top=top: iter([top]))
            found = probe_metrics(probes, codes, labels, void, train=number == 0)
            assert list(found) == ["loss", "weights", "biases", "tp", "fp", "tn", "fn"]
            part = labels > 0 if void == "drop" else torch.ones_like(labels, dtype=torch.bool)
            assert {array.shape for array in found.values()} == {(6, 4)}
            for j in range(6):
                for c in range(4):
                    if c == 0 and void != "class":
                        assert all(np.isnan(array[j, 0]) for array in found.values())
                        continue
                    w, b = found["weights"][j, c], found["biases"][j, c]
                    z, y = (b + w * x[part, j]).numpy(), (labels[part] == c).numpy()
                    loss = np.mean(np.logaddexp(0, z) - y * z)
                    assert found["loss"][j, c] == pytest.approx(loss, abs=1e-9)
                    counts = [
                        np.sum((z >= 0) & y),
                        np.sum((z >= 0) & ~y),
                        np.sum((z < 0) & ~y),
                        np.sum((z < 0) & y),
                    ]
                    assert [found[name][j, c] for name in ("tp", "fp", "tn", "fn")] == counts
            assert np.nansum(found["tp"]) > 0


class Loaded(Results):
    """What was made, by name."""

    def __init__(self, found):
        self.found = found

    def __call__(self, name):
        return self.found[name]


WANTED = {split: f"layer_5.codes_pca-topk-00004_{split}" for split in SPLITS}
WANTED["probes"] = "layer_5.probes_pca-topk-00002"


def exporting(planted, project, codes):
    """Runs the export of these codes into a folder of the project; with more arguments."""
    fit, val = map(str, planted)
    parameters = parse_parameters(
        {
            "layers": [5],
            "shards": {"fit": fit, "val": val, "probe_train": fit, "probe_val": val},
            "device": "cpu",
        }
    )
    loaded: dict[str, Any] = {
        f"shards_{split}": Shards(path) for split, path in zip(SPLITS, planted, strict=True)
    }
    loaded |= {WANTED[split]: each for split, each in zip(SPLITS, codes, strict=True)}
    loaded[WANTED["probes"]] = fitted(planted, "drop")

    def export(force=False):
        return _export(
            Loaded(loaded),
            WANTED,
            ENCODING,
            5,
            parameters,
            project,
            project / "run",
            force=force,
        )

    return export


def test_what_is_cut_off_leaves_the_older_export_or_none(planted, tmp_path):
    train, val = stored(planted)

    def break_off(row):
        if row >= 100:
            raise KeyboardInterrupt

    broken = exporting(planted, tmp_path, [Sparse(train), Sparse(val, break_off)])
    with pytest.raises(KeyboardInterrupt):
        broken()
    assert list(tmp_path.iterdir()) == []
    exporting(planted, tmp_path, [Sparse(train), Sparse(val)])()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*") if path.is_file()}
    assert len(before) == 5
    with pytest.raises(KeyboardInterrupt):
        broken(force=True)
    assert {path: path.read_bytes() for path in before} == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_process_that_is_killed_leaves_no_export_and_the_next_clears_up(planted, tmp_path):
    train, val = stored(planted)

    def kill(row):
        if row >= 100:
            os.kill(os.getpid(), signal.SIGKILL)

    broken = exporting(planted, tmp_path, [Sparse(train), Sparse(val, kill)])
    child = os.fork()
    if child == 0:
        try:
            broken()
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert [path.name[:13] for path in tmp_path.glob(".run.partial-?*[!k]")] == [".run.partial-"]
    assert not (tmp_path / "run").exists()
    lines = exporting(planted, tmp_path, [Sparse(train), Sparse(val)])()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert f"inference/{planted[1].name}: probe_val, 384 tokens, 768 entries" in lines[2]
    assert "column 0 is NaN" in lines[-1]
    about = json.loads((tmp_path / "run/export.json").read_text())
    assert (about["encoding"], about["k"], about["void"]) == ("pca-topk-00002", 2, "drop")
    assert (tmp_path / "run/links/train-shards").resolve() == planted[0].resolve()


def test_probes_with_class_weights_and_two_splits_of_one_name_are_refused(planted, tmp_path):
    fit = str(planted[0])
    least: dict[str, Any] = {"layers": [5], "shards": dict.fromkeys(("fit", "val", *SPLITS), fit)}
    for change, match in (
        ({}, f"both probe splits are called {planted[0].name}"),
        ({"probe_val": str(planted[1])}, "saev's probes weigh every patch alike"),
    ):
        least["shards"] |= change
        parameters = parse_parameters(least | {"probe": {"class_weight": "balanced"}})
        with pytest.raises(ValueError, match=match):
            _export(
                Loaded({}), WANTED, ENCODING, 5, parameters, tmp_path, tmp_path / "a", force=False
            )
    assert list(tmp_path.iterdir()) == []

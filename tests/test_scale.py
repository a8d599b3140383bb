"""docs/scale.md says what its model prints, of the experiment that conf/ade20k describes."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from assay.codes import Format
from assay.io.codes.layout import CodesMetadata
from assay.numerics.codes import ComputedCodes, gather_columns, measure_l0_by_rank
from assay.numerics.probe import LogisticProbe1d, certify_sweep, fit_sweep, judge_sweep
from assay.numerics.probe.sketch import FeatureSketch
from assay.parameters import KMeansParameters, PCAParameters, ProbeParameters

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/scale.md"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def find(name: str) -> ModuleType:
        return importlib.import_module(name)

    return find


def test_the_tables_of_the_page_are_those_that_the_model_prints(module):
    scale = module("scale")
    page = PAGE.read_text(encoding="utf-8")
    assert scale.filled(page, scale.Options()) == page
    assert scale.filled(page, scale.Options(passes=2)) != page
    with pytest.raises(ValueError, match="no place for the table 'limits'"):
        scale.filled(page.replace("limits: bench", ""), scale.Options())


def test_the_model_is_of_the_papers_experiment(module):
    costs, preemption = module("stage_costs"), module("preemption")
    given = yaml.safe_load((ROOT / "conf/ade20k/parameters.yml").read_text(encoding="utf-8"))
    kmeans, pca = KMeansParameters(**given["kmeans"]), PCAParameters(**given["pca"])
    assert (len(given["layers"]), kmeans.n_clusters) == (costs.LAYERS, costs.CLUSTERS)
    assert (costs.N_INIT, kmeans.init_size, kmeans.batch_size) == (kmeans.n_init, None, 8192)
    assert pca.topk == costs.SWEEP
    assert given["extract"]["labels"]["n_classes"] == costs.CLASSES
    assert 2 * costs.CLASSES + ProbeParameters().certified_pairs == costs.CERTIFIED
    assert FeatureSketch.bytes_per_feature(costs.CLASSES) == costs.SKETCH_BYTES
    onehot = CodesMetadata(
        schema_name="assay.codes",
        version=2,
        format="onehot",
        n_rows=1,
        n_features=costs.CLUSTERS,
        k=1,
        dtype="float32",
        provenance={},
    )
    assert onehot.predict_bytes(1) == costs.ONE_HOT_BYTES
    floors = [each["random"] for each in given["dictionaries"].values()]
    assert floors == ["centres", "directions"]
    how = preemption.Preemption(1.0)
    assert how.every == 60 * kmeans.checkpoint_minutes == 60 * pca.checkpoint_minutes


@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("mean", [900.0, 7200.0])
def test_simulated_preemption_takes_what_the_closed_form_says(module, mean, saves):
    preemption = module("preemption")
    how = preemption.Preemption(mean, queue=300.0, start=45.0, every=120.0, save=5.0)
    found = preemption.simulate(1800.0, how, saves=saves)
    assert found == pytest.approx(preemption.expected(1800.0, how, saves=saves), rel=0.03)
    alone = preemption.Preemption(1e12, queue=300.0, start=45.0, every=120.0, save=5.0)
    whole = 45 + 1800 / 120 * 125 if saves else 45 + 1800
    assert preemption.simulate(1800.0, alone, saves=saves, n=10) == (whole, whole + 300)


def test_a_second_gpu_a_layer_buys_nothing_below_what_one_reads_and_works_on(module):
    costs = module("stage_costs")
    _, single, many, *_ = costs.CLUSTERS_OF_MACHINES
    for stage in costs.stages(costs.H100, 1):
        if stage.shared:
            n_bytes = stage.tokens * costs.TOKEN_BYTES
            rate = costs.H100.shuffled if stage.shuffled else costs.H100.in_order
            pace = 6 * n_bytes / 1e9 / (n_bytes / 1e9 / rate + stage.gpu)
            below, above = (each * pace for each in (0.99, 1.2))
            assert many.seconds(stage, below) == single.seconds(stage, below)
            assert many.seconds(stage, above) < single.seconds(stage, above)


class Counted:
    """Dense or sparse codes of random values that count the passes over them."""

    def __init__(self, code_format: Format, n_rows: int, n_features: int) -> None:
        self.passes = 0
        self._sparse = code_format == "sparse"
        values = torch.randn(n_rows, n_features, generator=torch.Generator().manual_seed(n_rows))
        self._order = values.abs().argsort(1, descending=True)
        self._values = values.gather(1, self._order) if self._sparse else values
        self.codes = ComputedCodes(code_format, n_rows, n_features, n_features, self._batches)

    def _batches(self, size, start):
        self.passes += 1
        for values, order in zip(
            self._values[start:].split(size), self._order[start:].split(size), strict=True
        ):
            yield {"values": values} | ({"indices": order} if self._sparse else {})


@pytest.mark.parametrize(
    ("code_format", "ks", "free"),
    [("dense", (None,), 5e8), ("dense", (None,), 5e9), ("sparse", (1, 520), 4e6)],
)
def test_probes_go_over_the_codes_as_often_as_the_model_says(
    module, monkeypatch, code_format, ks, free
):
    costs, n_features = module("stage_costs"), 520
    sizes = {"PROBE_TRAIN": 120, "PROBE_VAL": 60, "CERTIFIED": n_features}
    for name, size in sizes.items():
        monkeypatch.setattr(costs, name, size)
    monkeypatch.setattr("assay.numerics.probe.labeled.free_bytes", lambda _: int(free))
    train, val = (Counted(code_format, n, n_features) for n in (120, 60))
    labels, val_labels = torch.arange(120) % 2, torch.arange(60) % 2
    probes = fit_sweep(LogisticProbe1d(ridge=1.0), train.codes, labels, 2, ks)
    judge_sweep(probes, val.codes, val_labels)
    pairs = torch.stack([torch.arange(n_features), torch.arange(n_features) % 2], 1)
    certify_sweep(probes, train.codes, labels, dict.fromkeys(ks, pairs), n_random=0)
    # The two passes more of the node, which are for all features.
    measure_l0_by_rank(val.codes, 100)
    gather_columns(val.codes, [(torch.arange(2), k) for k in ks], 100, torch.device("cpu"))
    assert (train.passes, val.passes) == costs.probe_passes(n_features, len(ks), free)

"""What a run logs: its children, also those that an earlier process of the same run began, and how
it ends when it is interrupted.
"""

from __future__ import annotations

import itertools
import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from kedro.io import DataCatalog, MemoryDataset
from kedro_datasets.json import JSONDataset
from mlflow import MlflowClient

import assay
from assay.encodings import Encoding, Form, Model
from assay.io.checkpoints import Checkpoints
from assay.io.datasets import SaeDataset
from assay.io.saes import hub
from assay.io.shards import Shards
from assay.tracking import TrackingHook, finish_taken_up, manifest, process
from assay.tracking.children import thinned
from assay.tracking.describe import flat_params, versions
from assay.tracking.hook import InterruptedRunError
from assay.tracking.ownership import FAILURE
from assay.tracking.run import Run
from assay.tracking.writer import Writer
from saes import write_sparsify

ROWS = {
    row.name: row
    for row in (Encoding(Model("kmeans", 0), Form(kind), 8) for kind in ("onehot", "invdist"))
}
PLAN: Any = SimpleNamespace(
    layers=(3,), kmeans=(Model("kmeans", 0),), rows_of=lambda _: tuple(ROWS.values())
)
HISTORY = [{"inertia": 3.0}, {"inertia": 2.0}, {"inertia": 1.5}]


def scores(name, layer=3):
    return {"layer": layer, "encoding": name, "k": 8, "map": 0.5, "probe_r": 0.1}


def row(name, layer=3):
    return {"layer": layer, "name": name, "nmse": 0.9, "map": 0.5, "probe_r": 0.1, "l0": 1.0}


@pytest.fixture
def begin(project, planted, connect, run_params):
    """Begins a run of two encodings of a layer; gives Kedro's hook that has it, and the run."""
    shards = dict(
        zip(
            ("fit", "val", "probe_train", "probe_val"),
            map(Shards, [*planted, *planted]),
            strict=True,
        )
    )

    def kept(name):
        return JSONDataset(filepath=str(project / f"{name}.json"))

    (project / "layer_3.kmeans_model.json").write_text("{}")
    catalog = DataCatalog(
        {
            **{
                f"shards_{split}": MemoryDataset(handle, copy_mode="assign")
                for split, handle in shards.items()
            },
            **{
                f"layer_3.kmeans_{name}": kept(f"layer_3.kmeans_{name}")
                for name in ("model", "history", "errors")
            },
            **{f"layer_3.scores_{name}": kept(f"layer_3.scores_{name}") for name in ROWS},
            "rows_layer_3": kept("rows_layer_3"),
        }
    )
    catalog.save("layer_3.kmeans_history", HISTORY)

    def start(seed=0):
        parameters = {
            "layers": [3],
            "shards": dict.fromkeys(shards, ""),
            "kmeans": {"seed": seed, "decay": 0.1},
        }
        hook, connection = TrackingHook(), connect()
        hook._connection = connection
        hook.follow(Run(project, run_params, parameters, catalog, ROWS, connection), PLAN)
        return hook

    made: Any = start
    made.catalog = catalog
    return made


def save(hook, begin, name, data):
    """What Kedro does when a node has made something."""
    begin.catalog.save(name, data)
    node = SimpleNamespace(name="a")
    hook.before_node_run(node, {})
    hook.after_dataset_saved(name, data, node)


def finish(hook):
    hook.after_pipeline_run(SimpleNamespace(all_outputs=set), DataCatalog())


def parent_of(runs):
    (found,) = [run for run in runs().values() if "mlflow.parentRunId" not in run.data.tags]
    return found


def test_a_child_has_the_record_of_its_fit_and_is_closed_with_its_row(begin, runs):
    hook = begin()
    for name in ROWS:
        save(hook, begin, f"layer_3.scores_{name}", scores(name))
    save(hook, begin, "rows_layer_3", [row(name) for name in ROWS])
    hook._run._writer.wait()
    child = runs()["layer_3/kmeans-onehot"]
    assert child.info.status == "FINISHED"
    assert child.data.metrics == {
        "inertia": 1.5,
        "nmse": 0.9,
        "map": 0.5,
        "probe_r": 0.1,
        "l0": 1.0,
    }
    assert child.data.tags[process.TAG] == process.own_process()
    finish(hook)
    assert set(runs()) == {"__default__", "layer_3/kmeans-onehot", "layer_3/kmeans-invdist"}
    assert {each.info.status for each in runs().values()} == {"FINISHED"}


def test_the_parent_and_the_child_count_steps_alike_and_end_alike(begin, runs):
    """A step that comes right after another is not shown at once, but the last one is not lost."""
    hook, checkpoints = begin(), Checkpoints("nowhere")
    hook.before_node_run(
        SimpleNamespace(name="layer_3.kmeans.fit"), {"layer_3.kmeans_checkpoints": checkpoints}
    )
    for step, metrics in enumerate(HISTORY, start=1):
        for observer in checkpoints.observers:
            observer(3, "kmeans", step, metrics)
    save(hook, begin, "layer_3.scores_kmeans-onehot", scores("kmeans-onehot"))
    finish(hook)
    client = MlflowClient()

    def points(name, key):
        found = client.get_metric_history(runs()[name].info.run_id, key)
        return sorted((point.step, point.value) for point in found)

    assert points("layer_3/kmeans-onehot", "inertia") == [(1, 3.0), (2, 2.0), (3, 1.5)]
    assert points("__default__", "layer_3/kmeans/inertia") == [(1, 3.0), (3, 1.5)]


def interrupt(hook):
    hook.on_pipeline_error(InterruptedRunError("the run was interrupted"))


def test_an_interrupt_closes_parent_and_children_as_killed_with_the_reason(begin, runs):
    hook = begin()
    save(hook, begin, "layer_3.scores_kmeans-onehot", scores("kmeans-onehot"))
    interrupt(hook)
    assert {each.info.status for each in runs().values()} == {"KILLED"}
    assert {each.data.tags[FAILURE] for each in runs().values()} == {
        "InterruptedRunError: the run was interrupted"
    }


def once_interrupted(monkeypatch, owner, name):
    """Stands in for a method: is interrupted when it is called, and next time it is the method."""
    original = getattr(owner, name)

    def method(*_):
        monkeypatch.setattr(owner, name, original)
        raise KeyboardInterrupt

    return method


@pytest.mark.parametrize(
    "place", ["send_steps", "_write_curves", "_close_whole_children", "_write_manifest"]
)
def test_an_interrupt_while_a_run_is_finished_leaves_nothing_open(
    project, begin, runs, monkeypatch, place
):
    hook = begin()
    save(hook, begin, "layer_3.scores_kmeans-onehot", scores("kmeans-onehot"))
    monkeypatch.setattr(Run, place, once_interrupted(monkeypatch, Run, place))
    with pytest.raises(KeyboardInterrupt):
        finish(hook)
    interrupt(hook)
    assert "RUNNING" not in {each.info.status for each in runs().values()}
    assert parent_of(runs).info.status == "KILLED"
    (written,) = (project / manifest.MANIFESTS).iterdir()
    assert json.loads(written.read_text())["status"] == "KILLED"


def test_an_interrupt_while_mlflow_is_waited_for_leaves_nothing_open(begin, runs, monkeypatch):
    hook = begin()
    save(hook, begin, "layer_3.scores_kmeans-onehot", scores("kmeans-onehot"))
    monkeypatch.setattr(Writer, "wait", once_interrupted(monkeypatch, Writer, "wait"))
    with pytest.raises(KeyboardInterrupt):
        finish(hook)
    interrupt(hook)
    assert {name: each.info.status for name, each in runs().items()} == {
        "__default__": "KILLED",
        "layer_3/kmeans-onehot": "FINISHED",
    }


def test_an_interrupt_between_the_parent_and_the_run_closes_the_parent(connect, runs):
    hook = TrackingHook()
    hook._connection = connect()
    interrupt(hook)
    assert parent_of(runs).info.status == "KILLED"


def test_a_run_that_is_taken_up_goes_on_with_the_children_that_it_has(begin, runs, monkeypatch):
    hook = begin()
    for name in ROWS:
        save(hook, begin, f"layer_3.scores_{name}", scores(name))
    interrupt(hook)
    before = {name: each.info.run_id for name, each in runs().items()}
    monkeypatch.setenv("MLFLOW_RUN_ID", before["__default__"])
    hook = begin()
    # Probed again, the other one not.
    save(hook, begin, "layer_3.scores_kmeans-onehot", scores("kmeans-onehot"))
    save(hook, begin, "rows_layer_3", [row(name) for name in ROWS])
    finish(hook)
    after = runs()
    assert {name: each.info.run_id for name, each in after.items()} == before
    for each in after.values():
        assert each.info.status == "FINISHED"
        assert FAILURE not in each.data.tags
    for name in ROWS:
        child = after[f"layer_3/{name}"]
        assert child.data.metrics == {
            "inertia": 1.5,
            "nmse": 0.9,
            "map": 0.5,
            "probe_r": 0.1,
            "l0": 1.0,
        }
        history = MlflowClient().get_metric_history(child.info.run_id, "inertia")
        assert [point.step for point in history] == [1, 2, 3]
        inputs = MlflowClient().get_run(child.info.run_id).inputs
        assert inputs is not None
        assert len(inputs.dataset_inputs) == 2


def test_a_child_that_a_killed_process_did_not_come_to_make_is_made_by_the_next(
    begin, runs, monkeypatch
):
    begin.catalog.save("layer_3.scores_kmeans-onehot", scores("kmeans-onehot"))
    interrupt(begin())
    monkeypatch.setenv("MLFLOW_RUN_ID", parent_of(runs).info.run_id)
    hook = begin()
    save(hook, begin, "rows_layer_3", [row("kmeans-onehot")])
    finish(hook)
    child = runs()["layer_3/kmeans-onehot"]
    assert child.info.status == "FINISHED"
    assert child.data.metrics["inertia"] == 1.5
    assert parent_of(runs).data.metrics["kmeans-onehot/map"] == 0.5


def test_an_autoencoder_from_the_hub_is_told_with_its_commit(begin, runs, project, monkeypatch):
    """In the manifest and to MLflow; one that the run did not read is in neither."""
    write_sparsify(project / "cache/layers.3")
    monkeypatch.setattr(hub, "fetch", lambda _: (project / "cache/layers.3", "c" * 40))
    row = Encoding(Model("mine"), None, None)
    monkeypatch.setitem(ROWS, "mine", row)
    begin.catalog["layer_3.sae_mine"] = SaeDataset(
        filepath="hf:owner/name/layers.3", typed="hf:owner/name/layers.3"
    )
    begin.catalog["layer_3.sae_other"] = SaeDataset(filepath=str(project / "cache/layers.3"))
    begin.catalog["layer_3.scores_mine"] = MemoryDataset()
    hook = begin()
    begin.catalog.load("layer_3.sae_mine")
    save(hook, begin, "layer_3.scores_mine", scores("mine"))
    finish(hook)
    tags = runs()["layer_3/mine"].data.tags
    assert tags["dictionary"] == "hf:owner/name/layers.3"
    assert tags["dictionary.commit"] == "c" * 40
    assert tags["dictionary.library"] == "sparsify"
    (path,) = (project / manifest.MANIFESTS).iterdir()
    said = json.loads(path.read_text())["dictionaries"]
    assert said.keys() == {"layer_3"}
    assert said["layer_3"].keys() == {"mine"}
    assert said["layer_3"]["mine"]["path"] == "hf:owner/name/layers.3"
    assert said["layer_3"]["mine"]["commit"] == "c" * 40


def test_a_run_of_its_own_makes_no_children_of_what_it_did_not_probe(begin, runs):
    begin.catalog.save("layer_3.scores_kmeans-onehot", scores("kmeans-onehot"))
    hook = begin()
    save(hook, begin, "rows_layer_3", [row("kmeans-onehot")])
    finish(hook)
    assert set(runs()) == {"__default__"}


@pytest.mark.parametrize("whole", [True, False])
def test_of_the_children_with_nothing_left_to_do_those_that_are_whole_are_closed(
    begin, runs, monkeypatch, whole
):
    hook = begin()
    save(hook, begin, "layer_3.scores_kmeans-onehot", scores("kmeans-onehot"))
    if whole:
        hook._run._children[3, "kmeans-onehot"].add({"nmse": 0.9, "l0": 1.0})
    interrupt(hook)
    begin.catalog.save("rows_layer_3", [row("kmeans-onehot")])
    monkeypatch.setenv("MLFLOW_RUN_ID", parent_of(runs).info.run_id)
    finish(begin())
    child = runs()["layer_3/kmeans-onehot"]
    assert child.info.status == ("FINISHED" if whole else "KILLED")
    assert (FAILURE in child.data.tags) is not whole


def test_a_run_that_is_taken_up_with_nothing_left_to_do_is_finished(begin, runs, monkeypatch):
    """Killed when all was made and not all was logged; Kedro, which has nothing to run, calls no
    hook.
    """
    hook = begin()
    save(hook, begin, "layer_3.scores_kmeans-onehot", scores("kmeans-onehot"))
    interrupt(hook)
    begin.catalog.save("layer_3.scores_kmeans-invdist", scores("kmeans-invdist"))
    begin.catalog.save("rows_layer_3", [row(name) for name in ROWS])
    hooks = SimpleNamespace(get_plugins=lambda: {object(), hook})
    outputs: Any = SimpleNamespace(all_outputs=lambda: {"rows_layer_3"})

    def begin_again(*_):
        begun = begin()
        hook._run, hook._logged = begun._run, begun._logged

    monkeypatch.setattr(hook, "before_pipeline_run", begin_again)
    finish_taken_up(hooks, {}, outputs, begin.catalog)
    assert parent_of(runs).info.status == "KILLED", (
        "a run of its own is begun only where there is something to do"
    )
    monkeypatch.setenv("MLFLOW_RUN_ID", parent_of(runs).info.run_id)
    finish_taken_up(hooks, {}, outputs, begin.catalog)
    after = runs()
    assert set(after) == {"__default__", *(f"layer_3/{name}" for name in ROWS)}
    for each in after.values():
        assert each.info.status == "FINISHED"
        assert FAILURE not in each.data.tags
    for name in ROWS:
        assert after[f"layer_3/{name}"].data.metrics == {
            "inertia": 1.5,
            "nmse": 0.9,
            "map": 0.5,
            "probe_r": 0.1,
            "l0": 1.0,
        }


def test_a_run_that_is_taken_up_with_other_parameters_says_so(begin, runs, monkeypatch):
    interrupt(begin())
    monkeypatch.setenv("MLFLOW_RUN_ID", parent_of(runs).info.run_id)
    hook = begin(seed=7)
    finish(hook)
    found = parent_of(runs)
    assert found.data.params["kmeans.seed"] == "0"  # MLflow changes none
    assert found.data.tags["changed_params"] == "kmeans.seed: 0 -> 7"
    assert found.info.status == "FINISHED"


def test_a_child_that_mlflow_did_not_take_whole_is_not_finished(begin, runs):
    hook = begin()
    save(hook, begin, "layer_3.scores_kmeans-onehot", scores("kmeans-onehot"))
    hook._run._writer.submit("a file", lambda: 1 / 0)
    save(hook, begin, "rows_layer_3", [row(name) for name in ROWS])
    finish(hook)
    child = runs()["layer_3/kmeans-onehot"]
    assert (child.info.status, child.data.tags[FAILURE]) == (
        "KILLED",
        "not logged: a file: ZeroDivisionError: division by zero",
    )


def test_more_parameters_than_mlflow_takes_at_once_are_logged(begin, runs):
    hook = begin()
    hook._run._log_parameters(
        hook._connection.parent.run_id, flat_params({"many": {f"p{n}": n for n in range(250)}})
    )
    finish(hook)
    assert len([name for name in parent_of(runs).data.params if name.startswith("many.p")]) == 250


def test_the_versions_are_known_where_the_package_is_not_installed(monkeypatch):
    def missing(name):
        if name == "assay-baselines":
            raise AssertionError("asked for the package")
        return "1"

    monkeypatch.setattr("importlib.metadata.version", missing)
    assert versions()["assay-baselines"] == assay.__version__


@pytest.mark.parametrize(("n", "most"), [(0, 5), (1, 5), (5, 5), (6, 5), (12_000, 40)])
def test_a_long_record_is_thinned_evenly_and_keeps_its_ends(n, most):
    places = thinned(n, most)
    assert len(places) == min(n, most)
    assert places == sorted(set(places))
    if n:
        assert (places[0], places[-1]) == (0, n - 1)
        assert max((b - a for a, b in itertools.pairwise(places)), default=0) <= -(-n // (most - 1))


def test_a_child_that_was_probed_first_is_told_what_is_measured_after_it():
    """The catalog still has what an earlier run measured, with other parameters."""

    def errors(nmse_raw):
        return {
            "layer": 3,
            "method": "theirs",
            "rows": [{"k": 7, "nmse": None, "nmse_raw": nmse_raw}],
        }

    logged: Any = Run.__new__(Run)
    catalog = DataCatalog({"layer_3.theirs_errors": MemoryDataset(errors(5.3))})
    rows = {"theirs": Encoding(Model("theirs"), None, None)}
    vars(logged).update(
        _rows=rows, _catalog=catalog, _children={}, _curves=[], _lock=threading.Lock(), _parent=None
    )
    logged._connection = SimpleNamespace(children={}, taken_up=False)
    logged.log_scores({"layer": 3, "encoding": "theirs", "k": 7, "map": 0.5})
    logged.log_errors(errors(4.8))
    (child,) = logged._children.values()
    assert child.known == {"map": 0.5, "nmse_raw": 4.8}
    told = [(metric.key, metric.value) for metric in child.take()]
    assert told == [("nmse_raw", 5.3), ("map", 0.5), ("nmse_raw", 4.8)]
    logged.complete_children(
        [{"layer": 3, "name": "theirs", "map": 0.5, "nmse_raw": 4.8, "nmse": 0.4}]
    )
    assert [(metric.key, metric.value) for metric in child.take()] == [("nmse", 0.4)]

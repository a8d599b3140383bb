"""Nothing is made twice from the same inputs, and nothing made from other inputs passes for up to
date.
"""

import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kedro.framework.hooks.manager import _create_hook_manager
from kedro.io import AbstractDataset, DataCatalog, DatasetError, MemoryDataset, Version
from kedro.pipeline import Pipeline, node
from kedro.pipeline.node import Node
from kedro.runner import SequentialRunner, ThreadRunner
from kedro_datasets.json import JSONDataset

from assay import fingerprints, freshness, work
from assay.fingerprints import Fingerprints
from assay.freshness import Freshness
from assay.io.checkpoints import Checkpoints
from assay.io.datasets import CheckpointsDataset, ShardsDataset
from assay.io.locks import Locks
from assay.parameters import (
    KMeansParameters,
    PCAParameters,
    ProbeParameters,
    SparsityParameters,
    StandardizeParameters,
)
from assay.prune import find_leftovers, remove
from assay.runnable import check_runnable
from assay.work import FOLDER as LOCKS
from assay.work import WorkHook, taken_on

KEPT = ("statistics", "kmeans_model", "pca_model", "errors", "probes", "scores", "table")
SETTINGS: dict[str, Any] = {
    "params:device": "cpu",
    "params:kmeans": KMeansParameters(n_clusters=8),
    "params:pca": PCAParameters(topk=(1, 4)),
    "params:probe": ProbeParameters(),
    "params:standardize": StandardizeParameters(),
}


class Source(AbstractDataset):
    """The user's own file, which can say what it is."""

    def __init__(self, path):
        self.path = path

    def load(self):
        return self.path.read_text()

    def save(self, data):
        raise NotImplementedError

    def fingerprint(self):
        return f"source of {self.load()}"

    def _exists(self):
        return self.path.exists()

    def _describe(self):
        return {"path": str(self.path)}


def tell(*inputs, made):
    """What was made of what: any change upstream shows in every value below it."""
    return f"{made}({', '.join(map(str, inputs))})"


def tell_all(*inputs, made):
    return [tell(*inputs, made=name) for name in made]


def make(name, inputs, outputs, made=None):
    function = tell_all if isinstance(outputs, list) else tell
    bound = functools.update_wrapper(functools.partial(function, made=made or outputs), function)
    return node(bound, inputs, outputs, name=name)


PIPELINE = Pipeline(
    [
        make("standardize", ["shards", "params:standardize"], "statistics"),
        make(
            "fit_kmeans", ["shards", "statistics", "params:kmeans", "params:device"], "kmeans_model"
        ),
        make("fit_pca", ["shards", "statistics", "params:pca", "params:device"], "pca_model"),
        make("measure", ["kmeans_model", "pca_model"], "errors"),
        # The only one that memory alone holds.
        make("encode", ["kmeans_model", "params:device"], "codes"),
        make("probe", ["codes", "params:probe"], ["probes", "scores"]),
        make("report", ["errors", "scores"], "table"),
    ]
)
FED_BY = {
    "shards": {"standardize", "fit_kmeans", "fit_pca", "measure", "encode", "probe", "report"},
    "params:standardize": {
        *("standardize", "fit_kmeans", "fit_pca", "measure", "encode", "probe", "report"),
    },
    "params:kmeans": {"fit_kmeans", "measure", "encode", "probe", "report"},
    "params:pca": {"fit_pca", "measure", "report"},
    "params:probe": {"encode", "probe", "report"},
}
CHANGED = {
    "params:kmeans": KMeansParameters(n_clusters=9),
    "params:pca": PCAParameters(topk=(1, 4), batch_size=9),
    "params:probe": ProbeParameters(void="class"),
    "params:standardize": StandardizeParameters(batch_size=9),
}


class Project:
    """A folder of results, and the parameters in force."""

    def __init__(self, folder):
        self.folder = folder
        self.data = folder / "data"
        self.settings = dict(SETTINGS)
        (folder / "shards.txt").write_text("tokens")

    def catalog(self):
        """The table lies where people point at it, the recording in one place for all settings; the
        rest has versions.
        """
        versioned = Version(None, None)
        entries = {
            name: JSONDataset(
                filepath=str(self.data / f"{name}.json"),
                version=None if name == "table" else versioned,
            )
            for name in KEPT
        }
        entries |= {name: MemoryDataset(value) for name, value in self.settings.items()}
        return DataCatalog(
            {"shards": Source(self.folder / "shards.txt"), "codes": MemoryDataset(), **entries}
        )

    def freshness(self, **options):
        """The results under the settings in force, placed."""
        catalog = self.catalog()
        freshness = Freshness(self.folder, catalog, PIPELINE, **options)
        freshness.place(catalog)
        return freshness

    def stale(self, pipeline=PIPELINE):
        return {node.name for node in self.freshness().stale(pipeline).nodes}

    def run(self, pipeline=PIPELINE, runner=None, *, force=True, **options):
        """Run nodes as the command line does, with the hook; gives the names of those that were
        run.
        """
        hooks, freshness = _create_hook_manager(), self.freshness(**options)
        hooks.register(WorkHook())
        with taken_on(freshness, pipeline, force=force) as work:
            if work.todo.nodes:
                (runner or SequentialRunner()).run(work.todo, freshness.catalog, hooks)
            work.publish(pipeline.all_outputs())
            return {node.name for node in work.todo.nodes}

    def run_stale(self, pipeline=PIPELINE, **options):
        return self.run(pipeline, force=False, **options)

    def results(self):
        catalog = self.freshness().catalog
        return {name: catalog.load(name) for name in KEPT}

    def path(self, name):
        """The file of a result under the settings in force."""
        return Path(self.freshness().catalog.get(name)._get_load_path())

    def delete(self, name):
        self.path(name).unlink(missing_ok=True)

    def expected(self):
        """The results, told without any files."""
        values = {"shards": (self.folder / "shards.txt").read_text(), **self.settings}
        for each in PIPELINE.nodes:
            values |= each.run({name: values[name] for name in each.inputs})
        return {name: values[name] for name in KEPT}


@pytest.fixture
def project(tmp_path):
    """A project after a whole run."""
    made = Project(tmp_path)
    made.run()
    return made


def test_everything_is_stale_before_the_first_run(tmp_path):
    assert Project(tmp_path).stale() == {node.name for node in PIPELINE.nodes}


@pytest.mark.parametrize("runner", [SequentialRunner, ThreadRunner])
def test_nothing_is_stale_after_a_run(tmp_path, runner):
    project = Project(tmp_path)
    project.run(runner=runner())
    assert project.stale() == set()
    assert project.results() == project.expected()


@pytest.mark.parametrize("name", FED_BY)
def test_a_change_makes_exactly_what_depends_on_it_stale(project, name):
    if name == "shards":
        (project.folder / "shards.txt").write_text("other tokens")
    else:
        project.settings[name] = CHANGED[name]
    assert project.stale() == FED_BY[name]
    assert project.run_stale() == FED_BY[name]
    assert project.stale() == set()
    assert project.results() == project.expected()
    shown = json.loads((project.data / "table.json").read_text())
    assert shown == project.expected()["table"]


def test_the_device_changes_nothing(project):
    project.settings["params:device"] = "cuda"
    assert project.stale() == set()


def test_parameters_that_only_shape_the_pipeline_are_left_to_the_nodes_they_shape(project):
    project.settings["params:kmeans"] = KMeansParameters(
        n_clusters=8, encodings=("kmeans-onehot",), sparsity=SparsityParameters(top_k=2)
    )
    project.settings["params:pca"] = PCAParameters(topk=(1, 4, 16))
    assert project.stale() == set()
    for section, names in fingerprints.SHAPING.items():
        assert names < type(SETTINGS[section]).model_fields.keys()


def test_where_work_goes_on_from_is_no_part_of_what_its_results_are_known_by(project):
    others = [node for node in PIPELINE.nodes if node.name != "standardize"]
    inputs = ["shards", "params:standardize", "statistics_checkpoints"]
    whole = Pipeline([*others, make("standardize", inputs, "statistics")])
    assert not Freshness(project.folder, project.catalog(), whole).stale(whole).nodes


@pytest.mark.parametrize("name", ["pca", "kmeans", "kmeans-seed-3"])
def test_checkpoints_that_older_results_are_known_by_as_well_still_count(name):
    assert not fingerprints.is_progress(f"layer_3.{name}_checkpoints")
    assert fingerprints.is_progress(f"layer_3.{name}-onehot_checkpoints")


def test_a_parameter_that_was_added_makes_stale_where_it_is_not_its_default(project):
    project.settings["params:pca"] = PCAParameters(topk=(1, 4), parts=1)
    assert project.stale() == set()
    project.settings["params:pca"] = PCAParameters(topk=(1, 4), parts=2)
    assert project.stale() == {"fit_pca", "measure", "report"}


def test_results_are_known_by_what_they_were_known_by_before_fields_were_added():
    def digest(values):
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    old = {
        "params:standardize": {"statistics": None, "batch_size": 16_384, "max_tokens": None},
        "params:pca": {"batch_size": 16_384, "max_tokens": None},
    }
    catalog = DataCatalog({name: MemoryDataset(SETTINGS[name]) for name in old})
    found = fingerprints.Fingerprints(catalog, Pipeline([]))
    assert {name: found.fingerprint(name) for name in old} == {
        name: digest(values) for name, values in old.items()
    }


def test_a_node_bound_to_other_values_is_stale(project):
    others = [node for node in PIPELINE.nodes if node.name != "measure"]
    whole = Pipeline(
        [*others, make("measure", ["kmeans_model", "pca_model"], "errors", made="other errors")]
    )
    stale = Freshness(project.folder, project.catalog(), whole).stale(whole)
    assert {node.name for node in stale.nodes} == {"measure", "report"}


@dataclass(frozen=True)
class Bound:
    """What a node may be bound to, of which one field is not printed."""

    shown: int
    hidden: Any = field(default=None, repr=False)


def test_a_node_is_told_by_the_fields_of_what_it_is_bound_to(project):
    def fingerprint(bound):
        made = make("measure", ["params:kmeans"], "errors", made=bound)
        return Fingerprints(project.catalog(), Pipeline([made])).fingerprint("errors")

    found = [
        *(Bound(1), Bound(2), Bound(1, hidden=(Bound(1),)), Bound(1, hidden=(Bound(2),))),
        *(SparsityParameters(top_k=2), SparsityParameters(margin=2)),
    ]
    assert len({fingerprint(each) for each in found}) == len(found)
    assert fingerprint(Bound(1, (Bound(2),))) == fingerprint(found[3])
    for opaque in (object(), {1, 2}, Bound):
        with pytest.raises(
            TypeError, match=r"a node is bound to .*; expected JSON, a dataclass or"
        ):
            fingerprint(opaque)


def test_a_raised_format_makes_everything_stale(project, monkeypatch):
    monkeypatch.setattr(fingerprints, "FORMAT", fingerprints.FORMAT + 1)
    assert project.stale() == {node.name for node in PIPELINE.nodes}


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("statistics", {"standardize"}),
        ("kmeans_model", {"fit_kmeans"}),
        ("errors", {"measure"}),
        # Codes are in memory: they are made again to feed the probes.
        (
            "scores",
            {"probe", "encode"},
        ),
        ("probes", {"probe", "encode"}),
        ("table", {"report"}),
    ],
)
def test_a_deleted_result_is_made_again_and_what_feeds_it_from_memory(project, name, nodes):
    project.delete(name)
    assert project.stale() == nodes
    project.run_stale()
    assert project.stale() == set()
    assert project.results() == project.expected()


@pytest.mark.parametrize("text", [None, "", "[]", "{}", "not json", '{"fingerprint": "other"}'])
def test_a_result_without_a_good_record_is_made_again(project, text):
    (record,) = (project.folder / freshness.FOLDER / "errors").iterdir()
    if text is None:
        record.unlink()
    else:
        record.write_text(text)
    assert project.stale() == {"measure"}
    project.run_stale()
    assert project.results() == project.expected()


def test_records_of_older_versions_count_as_missing_and_are_left(tmp_path):
    (tmp_path / freshness.FOLDER).mkdir(parents=True)
    older = tmp_path / freshness.FOLDER / "errors.json"
    older.write_text('{"fingerprint": "x", "file": ["2026", 3], "node": "measure", "inputs": {}}')
    project = Project(tmp_path)
    assert "measure" in project.run_stale()
    assert project.stale() == set()
    assert older.exists()


def test_what_memory_holds_leaves_no_record(project):
    assert {path.name for path in (project.folder / freshness.FOLDER).iterdir()} == set(KEPT)


@pytest.mark.parametrize(
    ("nodes", "missing"),
    [({"measure"}, "fit_kmeans"), ({"encode", "probe", "report"}, "(fit_kmeans|measure)")],
)
def test_what_was_made_from_other_parameters_is_not_there(project, nodes, missing):
    """Nor is it where it comes through memory."""
    project.settings["params:kmeans"] = CHANGED["params:kmeans"]
    with pytest.raises(
        FileNotFoundError,
        match=f"does not exist for these shards and parameters: run `{missing}` first",
    ):
        project.run(PIPELINE.only_nodes(*nodes))
    assert project.stale() == FED_BY["params:kmeans"]
    project.run_stale()
    assert project.results() == project.expected()


def test_a_file_of_unknown_origin_is_not_loaded(project):
    shutil.rmtree(project.folder / freshness.FOLDER / "kmeans_model")
    other = project.data / "kmeans_model.json/2999-01-01T00.00.00.000Z/kmeans_model.json"
    other.parent.mkdir()
    other.write_text('"somebody else\'s model"')
    with pytest.raises(FileNotFoundError, match="run `fit_kmeans` first"):
        project.run(PIPELINE.only_nodes("measure"))
    assert project.run_stale() == {"fit_kmeans"}
    assert project.results() == project.expected()


def test_a_version_that_is_dated_in_the_future_shadows_nothing(tmp_path):
    """As by a clock that was a day ahead."""
    project = Project(tmp_path)
    project.run(timestamp="2999-01-01T00.00.00.000Z")
    project.settings["params:kmeans"] = CHANGED["params:kmeans"]
    assert project.run_stale(timestamp="2026-01-01T00.00.00.000Z") == FED_BY["params:kmeans"]
    assert project.results() == project.expected()
    assert json.loads((tmp_path / "data/table.json").read_text()) == project.expected()["table"]
    assert project.run_stale() == set()
    project.run(timestamp="2026-01-02T00.00.00.000Z")  # by force
    assert "2026-01-02" in str(project.path("kmeans_model"))
    assert project.results() == project.expected()


def test_what_was_made_before_is_found_again_and_shown_again(project):
    first = project.expected()
    project.settings["params:kmeans"] = CHANGED["params:kmeans"]
    project.run_stale()
    second = project.expected()
    assert first["table"] != second["table"]
    for chosen, wanted in ((SETTINGS, first), (CHANGED, second), (SETTINGS, first)):
        project.settings["params:kmeans"] = chosen["params:kmeans"]
        assert project.run_stale() == set()
        assert project.results() == wanted
        assert json.loads((project.data / "table.json").read_text()) == wanted["table"]


def test_what_is_shown_already_is_not_written_again(project):
    shown = project.data / "table.json"
    before = shown.stat().st_mtime_ns
    project.run_stale()
    assert shown.stat().st_mtime_ns == before
    shown.write_text('"edited"')
    project.run_stale()
    assert json.loads(shown.read_text()) == project.expected()["table"]


def test_what_only_other_settings_have_is_withdrawn_and_comes_back_with_them(project):
    """As the agreement of seeds does, beside a table of one seed."""
    whole = PIPELINE + Pipeline([make("compare", "kmeans_model", "agreement")])
    shown = project.data / "agreement.json"

    def run(pipeline, selected=None):
        catalog, hooks = project.catalog(), _create_hook_manager()
        catalog["agreement"] = JSONDataset(filepath=str(shown))
        freshness = Freshness(project.folder, catalog, pipeline)
        freshness.place(catalog)
        hooks.register(WorkHook())
        with taken_on(freshness, selected or pipeline) as taken:
            SequentialRunner().run(taken.todo, catalog, hooks)
            taken.publish((selected or pipeline).all_outputs())

    run(whole)
    assert shown.exists()
    run(PIPELINE, PIPELINE.only_nodes("fit_pca"))  # this shows nothing, and touches nothing
    assert shown.exists()
    run(PIPELINE)
    assert not shown.exists()
    run(whole)
    assert shown.exists()
    shown.write_text('"somebody\'s own"')
    run(PIPELINE)
    assert shown.exists()


def test_a_run_that_stands_still_while_another_writes_keeps_its_own(tmp_path, monkeypatch):
    """The first is stopped between a fit and its save, and the second, of other parameters, runs
    from beginning to end.
    """
    project, run = Project(tmp_path), Node.run
    other = Project(tmp_path)
    other.settings["params:kmeans"] = CHANGED["params:kmeans"]
    # What both read; else the second would wait for it.
    project.run(PIPELINE.only_nodes("standardize", "fit_pca"))

    def stand_still(node, inputs):
        made = run(node, inputs)
        if node.name == "fit_kmeans":
            with monkeypatch.context() as patch:
                patch.setattr(Node, "run", run)
                in_the_first = work._Current.work
                assert other.run_stale() >= {"fit_kmeans", "report"}
                work._Current.work = in_the_first  # they are two processes
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Node, "run", stand_still)
        project.run_stale()
    assert project.results() == project.expected()
    assert other.results() == other.expected()
    assert json.loads((tmp_path / "data/table.json").read_text()) == project.expected()["table"]
    assert (project.run_stale(), other.run_stale()) == (set(), set())


@pytest.mark.parametrize("keep_time", [True, False])
def test_bytes_that_are_not_those_that_were_saved_are_not_believed(project, keep_time):
    """One letter is another, the size is the same: seen before anything is done where the time
    tells, and as it is loaded where not.
    """
    path = project.path("kmeans_model")
    stat = path.stat()
    path.write_text(path.read_text().replace("kmeans", "kmeanz"))
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with pytest.raises(
            ValueError, match=r"kmeans_model.json is not what `fit_kmeans` saved.*remove it"
        ):
            project.run(PIPELINE.only_nodes("measure"))
        path.unlink()
    assert project.stale() == {"fit_kmeans"}
    project.run_stale()
    assert project.results() == project.expected()


def test_a_copy_is_as_good_as_what_was_copied(project, tmp_path_factory):
    """Its times are others; its bytes are the same."""
    copy = tmp_path_factory.mktemp("copies") / "copy"
    shutil.copytree(project.folder, copy, copy_function=shutil.copyfile)
    copied = Project(copy)
    assert copied.stale() == set()
    assert copied.results() == project.results()


def test_a_result_that_another_run_is_making_is_awaited_and_not_made_twice(
    project, monkeypatch, caplog
):
    project.settings["params:kmeans"] = CHANGED["params:kmeans"]
    theirs = Locks(project.folder / LOCKS)
    freshness = project.freshness()
    lock = freshness.lock_of(next(node for node in PIPELINE.nodes if node.name == "fit_kmeans"))
    assert theirs.take(lock)
    other = freshness.lock_of(freshness.made_by["table"])
    assert theirs.take(other)
    waited = []

    def meanwhile(seconds):
        waited.append(seconds)
        if len(waited) == 3:  # they are done, and go on to read it
            node = freshness.made_by["kmeans_model"]
            inputs = {name: freshness.catalog.load(name) for name in node.inputs}
            freshness.catalog.save("kmeans_model", node.run(inputs)["kmeans_model"])
            freshness.record("kmeans_model", node)
            theirs.share(lock)
        if len(waited) == 5:
            theirs.release(other)  # which they have not made after all

    monkeypatch.setattr(time, "sleep", meanwhile)
    with caplog.at_level(logging.INFO):
        assert project.run_stale() == FED_BY["params:kmeans"] - {"fit_kmeans"}
    (said,) = [record.getMessage() for record in caplog.records if "waiting" in record.getMessage()]
    assert said.startswith(
        f"waiting for `fit_kmeans` and whatever else is in the hands of process {os.getpid()} on "
    )
    assert len(waited) == 5
    assert project.results() == project.expected()


def test_a_run_of_other_parameters_and_one_of_other_nodes_wait_for_nobody(project):
    theirs = Locks(project.folder / LOCKS)
    for each in PIPELINE.nodes:
        lock = project.freshness().lock_of(each)
        assert lock is None or theirs.take(lock)
    project.settings["params:kmeans"] = CHANGED["params:kmeans"]
    # What they hold as well, and has been made, is read at the same time once they do no more than
    # read it.
    for name in ("standardize", "fit_pca"):
        theirs.share(
            project.freshness().lock_of(next(node for node in PIPELINE.nodes if node.name == name))
        )
    project.run_stale()
    assert project.results() == project.expected()


def test_no_lock_is_left_of_a_run_or_of_one_that_fails(project, monkeypatch):
    project.settings["params:kmeans"] = CHANGED["params:kmeans"]
    with monkeypatch.context() as patch:
        patch.setattr(JSONDataset, "save", None)
        with pytest.raises(TypeError):
            project.run_stale()
    assert list((project.folder / LOCKS).iterdir()) == []
    project.run_stale()
    assert list((project.folder / LOCKS).iterdir()) == []


def test_a_file_in_the_way_is_named_before_any_work(project):
    project.settings["params:kmeans"] = CHANGED["params:kmeans"]
    shutil.rmtree(project.data / "kmeans_model.json")
    (project.data / "kmeans_model.json").write_text("a file")
    with pytest.raises(
        ValueError,
        match=r"kmeans_model.json is a file, wanted the folder of the versions of `kmeans_model`",
    ):
        project.run_stale()


def test_a_version_that_is_asked_for_is_loaded_and_only_then(project):
    older = project.path("kmeans_model").parent.name
    project.settings["params:kmeans"] = CHANGED["params:kmeans"]
    project.run_stale()
    wanted, errors = project.expected(), SETTINGS["params:kmeans"]
    for version, seen in ((older, True), (None, False)):
        pins = {"kmeans_model": version} if version else {}
        project.run_stale(load_versions=pins)
        loaded = project.freshness(load_versions=pins).catalog
        assert (str(errors) in loaded.load("errors")) is seen
        assert (str(errors) in json.loads((project.data / "table.json").read_text())) is seen
    assert project.results() == wanted
    faults = {
        "kmeans_model": "no version",
        "codes": "has no versions",
        "kmeens_model": "no result of this pipeline",
    }
    for name, fault in faults.items():
        with pytest.raises((FileNotFoundError, ValueError), match=fault):
            project.run_stale(load_versions={name: "2000-01-01T00.00.00.000Z"})
    with pytest.raises(ValueError, match="is to be made, and --load-versions asks for"):
        project.run(load_versions={"kmeans_model": older})


@pytest.mark.parametrize("reader", ["standardize", "fit_pca"])
def test_a_source_that_changes_while_it_is_read_leaves_results_that_are_out_of_date(
    tmp_path, monkeypatch, reader
):
    project, run = Project(tmp_path), Node.run

    def change_after(node, inputs):
        made = run(node, inputs)
        if node.name == reader:
            (tmp_path / "shards.txt").write_text("other tokens")
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Node, "run", change_after)
        project.run()
    assert project.stale() == FED_BY["shards"]
    project.run_stale()
    assert project.stale() == set()
    assert project.results() == project.expected()


def test_a_save_that_dies_midway_counts_as_missing(project, monkeypatch):
    def die(self, data):
        path = Path(self._get_save_path())
        path.parent.mkdir(parents=True)
        path.write_text(f'"half of {data}')
        raise OSError("no space left on device")

    project.settings["params:pca"] = CHANGED["params:pca"]
    with monkeypatch.context() as patch:
        patch.setattr(JSONDataset, "save", die)
        with pytest.raises((OSError, DatasetError)):
            project.run(PIPELINE.only_nodes("fit_pca"))
    assert project.stale() == FED_BY["params:pca"]
    project.run_stale()
    assert project.results() == project.expected()
    project.settings["params:pca"] = SETTINGS["params:pca"]  # of this nothing was lost
    assert project.stale() == set()
    assert project.results() == project.expected()


def test_a_run_that_fails_keeps_what_it_finished(tmp_path):
    project = Project(tmp_path)
    project.run(PIPELINE.only_nodes("standardize", "fit_kmeans"))
    assert project.stale() == {node.name for node in PIPELINE.nodes} - {"standardize", "fit_kmeans"}
    project.run_stale()
    assert project.results() == project.expected()


def test_a_node_without_results_always_runs(project):
    say = Pipeline([node(logging.debug, "table", None, name="say")])
    assert project.stale(say) == {"say"}


def test_a_missing_input_is_named_with_the_node_that_makes_it(tmp_path):
    project = Project(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"`kmeans_model` does not exist .*run `fit_kmeans` first"
    ):
        check_runnable(project.freshness(), PIPELINE.only_nodes("encode"))
    project.run()
    with pytest.raises(FileNotFoundError, match=r"`codes` does not exist .*run `encode` first"):
        check_runnable(project.freshness(), PIPELINE.only_nodes("probe"))


def test_a_missing_source_is_named_with_its_path(project):
    (project.folder / "shards.txt").unlink()
    todo = project.freshness().stale(PIPELINE)
    with pytest.raises(
        FileNotFoundError, match=r"`shards` does not exist .*shards\.txt.*: correct its path"
    ):
        check_runnable(project.freshness(), todo)


def test_a_source_that_cannot_be_read_is_named_with_the_reason(project):
    (project.folder / "shards.txt").write_bytes(b"\xff")
    with pytest.raises(
        ValueError, match=r"^`shards` cannot be read: [^\n]*can't decode byte 0xff[^\n]*$"
    ):
        project.freshness().stale(PIPELINE)


def test_pruning_leaves_what_the_settings_in_force_name_and_what_a_run_is_at_work_on(project):
    first = project.expected()
    half = project.data / "scores.json/2026-01-01T00.00.00.000Z.01234567/scores.json"
    half.parent.mkdir()
    half.write_text("half of it")
    (project.folder / freshness.FOLDER / "scores.json").write_text("of an older version")
    project.settings["params:kmeans"] = CHANGED["params:kmeans"]
    project.run_stale()
    freshly = project.freshness()
    found = find_leftovers(freshly)
    places = {path.parent.name.removesuffix(".json") for path in paths_of(found)}
    assert places == {"kmeans_model", "errors", "probes", "scores", "table", ".fingerprints"}
    assert half.parent in paths_of(found)
    theirs = Locks(project.folder / LOCKS)
    (busy,) = [each for each in found if each.path.parent.name == "kmeans_model.json"]
    assert all(theirs.take(lock, shared=True) for lock in busy.locks)
    assert {each.path for each in found if not remove(freshly, each)} == {busy.path}
    assert project.results() == project.expected()
    assert project.stale() == set()
    theirs.release()
    assert paths_of(find_leftovers(freshly)) == {busy.path}
    assert remove(freshly, busy)
    assert find_leftovers(freshly) == []
    project.settings["params:kmeans"] = SETTINGS["params:kmeans"]
    assert project.run_stale() == FED_BY["params:kmeans"]
    assert project.results() == first


def paths_of(leftovers):
    return {each.path for each in leftovers}


def test_pruning_touches_nothing_raw_and_nothing_outside_whatever_a_record_says(
    project, tmp_path_factory
):
    outside = tmp_path_factory.mktemp("outside")
    (project.folder / "data/01_raw/digits").mkdir(parents=True)
    (record,) = (project.folder / freshness.FOLDER / "errors").iterdir()
    said = json.loads(record.read_text())
    for number, path in enumerate(
        (str(outside), "data/01_raw/digits", "data/../../outside", "data/gone")
    ):
        other = said | {"fingerprint": f"{number:064}", "path": path, "version": None}
        record.with_name(f"{number:064}.json").write_text(json.dumps(other))
    assert find_leftovers(project.freshness()) == []


class Recording(AbstractDataset):
    """Lies in one place for all settings, as the digits do, and cannot say what it is."""

    def __init__(self, path):
        self._filepath = path

    def load(self):
        return self._filepath.read_text()

    def save(self, data):
        self._filepath.parent.mkdir(exist_ok=True)
        self._filepath.write_text(data)

    def _exists(self):
        return self._filepath.exists()

    def _describe(self):
        return {"path": str(self._filepath)}


class KnownRecording(Recording):
    """One that can."""

    def fingerprint(self):
        return self.load()


RECORDED = Pipeline(
    [
        make("record", "params:probe", "recording"),
        make("look", ["recording", "params:pca"], "errors"),
    ],
)


class RecordedProject(Project):
    """A project that makes its own shards."""

    kind = KnownRecording

    def freshness(self, **options):
        catalog = self.catalog()
        catalog["recording"] = self.kind(self.data / "recording.txt")
        freshness = Freshness(self.folder, catalog, RECORDED, **options)
        freshness.place(catalog)
        return freshness

    def errors(self):
        return self.freshness().catalog.load("errors")


@pytest.mark.parametrize("kind", [Recording, KnownRecording])
def test_a_recording_has_one_place_for_all_settings_and_one_record(tmp_path, kind):
    project = RecordedProject(tmp_path)
    project.kind = kind
    assert project.run_stale(RECORDED) == {"record", "look"}
    first = project.errors()
    project.settings["params:probe"] = CHANGED["params:probe"]
    assert project.run_stale(RECORDED) == {"record", "look"}
    assert "class" in project.errors()
    project.settings["params:probe"] = SETTINGS["params:probe"]
    assert project.errors() == first
    assert project.stale(RECORDED) == {"record"}  # what was made of it is found again
    project.settings["params:pca"] = CHANGED["params:pca"]
    assert project.run_stale(RECORDED) == {"record", "look"}
    (tmp_path / "data/recording.txt").write_text("somebody's own")
    assert project.stale(RECORDED) == ({"record"} if kind is KnownRecording else set())


def test_whoever_reads_a_recording_keeps_its_maker_waiting_and_no_other_reader(
    tmp_path, monkeypatch
):
    project = RecordedProject(tmp_path)
    project.run_stale(RECORDED)
    theirs = Locks(tmp_path / LOCKS)
    assert theirs.take("record", shared=True)
    waited = []
    monkeypatch.setattr(time, "sleep", lambda _: waited.append(theirs.release()))
    project.settings["params:pca"] = CHANGED["params:pca"]
    assert project.run_stale(RECORDED) == {"look"}
    assert waited == []
    project.settings["params:probe"] = CHANGED["params:probe"]
    assert project.run_stale(RECORDED) == {"record", "look"}
    assert len(waited) == 1


@pytest.mark.parametrize("failing", [None, "kmeans_model", "kmeans_history"])
def test_a_fits_checkpoints_go_when_all_that_it_left_is_recorded(tmp_path, monkeypatch, failing):
    about = {"method": "kmeans"}

    def fit(checkpoints):
        checkpoints.save(about, 1, {"centers": torch.zeros(2)}, {"step": 1})
        checkpoints.finish(about)
        return ["centers", "steps"]

    pipeline = Pipeline([node(fit, "checkpoints", ["kmeans_model", "kmeans_history"], name="fit")])
    versioned = {
        name: JSONDataset(filepath=str(tmp_path / f"data/{name}.json"), version=Version(None, None))
        for name in ("kmeans_model", "kmeans_history")
    }
    catalog = DataCatalog(
        {"checkpoints": CheckpointsDataset(filepath=str(tmp_path / "fit")), **versioned}
    )
    freshness, hooks, save = (
        Freshness(tmp_path, catalog, pipeline),
        _create_hook_manager(),
        JSONDataset.save,
    )
    freshness.place(catalog)
    hooks.register(WorkHook())

    def save_most(self, data):
        if failing and Path(self._filepath).stem == failing:
            raise OSError("no space left on device")
        save(self, data)

    monkeypatch.setattr(JSONDataset, "save", save_most)
    with taken_on(freshness, pipeline):
        try:
            SequentialRunner().run(pipeline, catalog, hooks)
        except (OSError, DatasetError):
            assert failing
    found = Checkpoints(tmp_path / "fit").load(about)
    assert (found is None) is (failing is None)


@pytest.fixture
def in_a_notebook(project, monkeypatch):
    """Makes a catalog as `kedro ipython` does; gives it with the hook."""
    monkeypatch.setattr(work, "current_configuration", lambda: (project.folder, None))
    monkeypatch.setattr("kedro.framework.project.pipelines", {"__default__": PIPELINE})
    monkeypatch.setattr(work._Current, "freshness", None)

    def make_catalog(hook=None):
        catalog, hook = project.catalog(), hook or WorkHook()
        hook.after_catalog_created(catalog=catalog, save_version=None, load_versions=None)
        return catalog, hook

    return make_catalog


@pytest.mark.usefixtures("in_a_notebook")
@pytest.mark.parametrize("threads", [None, 16])
def test_shards_are_read_by_as_many_threads_as_the_parameters_say(
    project, planted, monkeypatch, threads
):
    """In every catalog of a session, a run's own one too."""
    parameters = SimpleNamespace(threads=threads)
    monkeypatch.setattr(work, "current_configuration", lambda: (project.folder, parameters))
    catalog = project.catalog()

    def make_catalog():
        catalog["shards"] = ShardsDataset(filepath=str(planted[0]))
        WorkHook().after_catalog_created(catalog=catalog, save_version=None, load_versions=None)
        return catalog.load("shards").threads

    assert make_catalog() == threads
    with taken_on(work.current_freshness(), PIPELINE, force=True):
        assert make_catalog() == threads


def test_a_catalog_in_a_notebook_loads_what_belongs_to_its_settings_and_not_the_newest(
    project, in_a_notebook
):
    project.settings["params:kmeans"] = CHANGED["params:kmeans"]
    project.run_stale()
    for chosen in (SETTINGS, CHANGED):
        project.settings["params:kmeans"] = chosen["params:kmeans"]
        catalog, _ = in_a_notebook()
        assert {name: catalog.load(name) for name in KEPT} == project.expected()
    project.settings["params:pca"] = CHANGED["params:pca"]  # of this nothing is made
    catalog, _ = in_a_notebook()
    assert not catalog.exists("pca_model")
    with pytest.raises(DatasetError, match="No such file"):
        catalog.load("pca_model")
    (project.folder / "shards.txt").write_bytes(b"\xff")  # what cannot be told is not guessed
    catalog, _ = in_a_notebook()
    with pytest.raises(DatasetError, match=r"No such file.*unknown"):
        catalog.load("statistics")


@pytest.mark.parametrize("failing", [False, True])
def test_a_session_that_runs_in_a_notebook_makes_all_of_it_under_locks(
    project, in_a_notebook, monkeypatch, failing
):
    catalog, hook = in_a_notebook()
    hooks, fit = (
        _create_hook_manager(),
        PIPELINE.only_nodes("fit_pca", "measure", "encode", "probe", "report"),
    )
    hooks.register(hook)
    before = project.path("pca_model")
    shown = project.data / "table.json"
    shown.unlink()
    hook.before_pipeline_run(pipeline=fit)
    (lock,) = (project.freshness().lock_of(each) for each in fit.nodes if each.name == "fit_pca")
    assert not Locks(project.folder / LOCKS).take(lock)
    try:
        if failing:
            monkeypatch.setattr(JSONDataset, "save", None)
        SequentialRunner().run(fit, catalog, hooks)
        hook.after_pipeline_run(pipeline=fit)
        assert not failing
    except TypeError:
        hook.on_pipeline_error()
        assert failing
    assert (project.path("pca_model") == before) is failing
    assert shown.exists() is not failing
    assert project.results() == project.expected()
    assert list((project.folder / LOCKS).iterdir()) == []


def test_a_session_after_one_that_was_interrupted_in_a_notebook_records_what_it_made_as_its_own(
    project, in_a_notebook, monkeypatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    def run(clusters, hook):
        project.settings["params:kmeans"] = KMeansParameters(n_clusters=clusters)
        catalog, made = in_a_notebook(hook)
        hooks = _create_hook_manager()
        hooks.register(made)
        made.before_pipeline_run(pipeline=PIPELINE)
        SequentialRunner().run(PIPELINE, catalog, hooks)
        made.after_pipeline_run(pipeline=PIPELINE)

    # Kedro's settings have one a process, and no hook of it is called for an interrupt.
    hook = WorkHook()
    with monkeypatch.context() as patch:
        patch.setattr(JSONDataset, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(9, hook)
    run(10, hook)
    assert project.stale() == set()
    assert project.results() == project.expected()
    project.settings["params:kmeans"] = KMeansParameters(n_clusters=9)
    assert project.stale() == FED_BY["params:kmeans"]
    assert list((project.folder / LOCKS).iterdir()) == []


def test_a_cell_that_is_interrupted_holds_no_locks_when_it_has_ended(
    project, in_a_notebook, monkeypatch
):
    from IPython.core.interactiveshell import InteractiveShell

    _, hook = in_a_notebook()
    shell = InteractiveShell.instance()
    monkeypatch.setattr(shell, "showtraceback", lambda *_, **__: None)

    def run():
        hook.before_pipeline_run(pipeline=PIPELINE)
        assert list((project.folder / LOCKS).iterdir()) != []
        raise KeyboardInterrupt

    shell.push({"run": run})
    try:
        assert isinstance(shell.run_cell("run()").error_in_exec, KeyboardInterrupt)
    finally:
        InteractiveShell.clear_instance()
    assert list((project.folder / LOCKS).iterdir()) == []
    assert work._Current.work is None


ACTIONS = st.one_of(
    st.tuples(st.just("set"), st.sampled_from(sorted(CHANGED)), st.booleans()),
    st.tuples(st.just("shards"), st.sampled_from(["tokens", "other tokens"])),
    st.tuples(st.just("delete"), st.sampled_from(KEPT)),
    st.tuples(
        st.just("some"),
        st.sets(st.sampled_from(sorted(node.name for node in PIPELINE.nodes)), min_size=1),
    ),
)


@settings(deadline=None, max_examples=40)
@given(actions=st.lists(ACTIONS, min_size=1, max_size=5))
def test_whatever_came_before_a_run_leaves_what_a_first_run_would(actions):
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder))
        project.run()
        for action, *what in actions:
            if action == "set":
                name, changed = what
                project.settings[name] = CHANGED[name] if changed else SETTINGS[name]
            elif action == "shards":
                (project.folder / "shards.txt").write_text(what[0])
            elif action == "delete":
                project.delete(what[0])
            else:
                try:
                    project.run_stale(PIPELINE.only_nodes(*what[0]))
                except FileNotFoundError:
                    continue
        project.run_stale()
        assert project.stale() == set()
        assert project.results() == project.expected()
        assert json.loads((project.data / "table.json").read_text()) == project.expected()["table"]

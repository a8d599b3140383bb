"""Nothing is made twice from the same inputs, and nothing made from other inputs passes for up to date."""

import functools
import logging
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kedro.framework.hooks.manager import _create_hook_manager
from kedro.io import AbstractDataset, DataCatalog, DatasetError, MemoryDataset
from kedro.pipeline import Pipeline, node
from kedro.pipeline.node import Node
from kedro.runner import SequentialRunner, ThreadRunner
from kedro_datasets.json import JSONDataset

from assay import freshness
from assay.freshness import Freshness, FreshnessHook
from assay.parameters import KMeansParameters, PCAParameters, ProbeParameters, SparsityParameters

KEPT = ("statistics", "kmeans_model", "pca_model", "errors", "probes", "scores", "table")
SETTINGS = {
    "params:device": "cpu",
    "params:kmeans": KMeansParameters(n_clusters=8),
    "params:pca": PCAParameters(topk=(1, 4)),
    "params:probe": ProbeParameters(),
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
        make("standardize", ["shards"], "statistics"),
        make("fit_kmeans", ["shards", "statistics", "params:kmeans", "params:device"], "kmeans_model"),
        make("fit_pca", ["shards", "statistics", "params:pca", "params:device"], "pca_model"),
        make("measure", ["kmeans_model", "pca_model"], "errors"),
        make("encode", ["kmeans_model", "params:device"], "codes"),  # the only one that memory alone holds
        make("probe", ["codes", "params:probe"], ["probes", "scores"]),
        make("report", ["errors", "scores"], "table"),
    ]
)
FED_BY = {
    "shards": {"standardize", "fit_kmeans", "fit_pca", "measure", "encode", "probe", "report"},
    "params:kmeans": {"fit_kmeans", "measure", "encode", "probe", "report"},
    "params:pca": {"fit_pca", "measure", "report"},
    "params:probe": {"encode", "probe", "report"},
}
CHANGED = {
    "params:kmeans": KMeansParameters(n_clusters=9),
    "params:pca": PCAParameters(topk=(1, 4), batch_size=9),
    "params:probe": ProbeParameters(void="class"),
}


class Project:
    """A folder of results, and the parameters in force."""

    def __init__(self, folder):
        self.folder = folder
        self.settings = dict(SETTINGS)
        (folder / "shards.txt").write_text("tokens")

    def catalog(self):
        entries = {name: JSONDataset(filepath=str(self.folder / f"{name}.json")) for name in KEPT}
        entries |= {name: MemoryDataset(value) for name, value in self.settings.items()}
        return DataCatalog({"shards": Source(self.folder / "shards.txt"), "codes": MemoryDataset(), **entries})

    def freshness(self):
        return Freshness(self.folder, self.catalog(), PIPELINE)

    def stale(self, pipeline=PIPELINE):
        return {node.name for node in self.freshness().stale(pipeline).nodes}

    def run(self, pipeline, runner=None):
        """Run nodes in a session of their own, with the hook."""
        catalog, hooks, hook = self.catalog(), _create_hook_manager(), FreshnessHook()
        hooks.register(hook)
        hook.before_pipeline_run(run_params={"project_path": str(self.folder)}, pipeline=pipeline, catalog=catalog)
        (runner or SequentialRunner()).run(pipeline, catalog, hooks)

    def run_stale(self, pipeline=PIPELINE):
        todo = self.freshness().stale(pipeline)
        self.freshness().check_inputs(todo)
        if todo.nodes:
            self.run(todo)

    def results(self):
        catalog = self.catalog()
        return {name: catalog.load(name) for name in KEPT}

    def delete(self, name):
        (self.folder / f"{name}.json").unlink(missing_ok=True)

    def expected(self):
        """The results, told without any files."""
        values = {"shards": (self.folder / "shards.txt").read_text(), **self.settings}
        for each in PIPELINE.nodes:
            values |= each.run({name: values[name] for name in each.inputs})
        return {name: values[name] for name in KEPT}


@pytest.fixture(autouse=True, scope="module")
def _registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kedro.framework.project.pipelines", {"__default__": PIPELINE})
        yield


@pytest.fixture
def project(tmp_path):
    """A project after a whole run."""
    made = Project(tmp_path)
    made.run(PIPELINE)
    return made


def test_everything_is_stale_before_the_first_run(tmp_path):
    assert Project(tmp_path).stale() == {node.name for node in PIPELINE.nodes}


@pytest.mark.parametrize("runner", [SequentialRunner, ThreadRunner])
def test_nothing_is_stale_after_a_run(tmp_path, runner):
    project = Project(tmp_path)
    project.run(PIPELINE, runner())
    assert project.stale() == set()
    assert project.results() == project.expected()


@pytest.mark.parametrize("name", FED_BY)
def test_a_change_makes_exactly_what_depends_on_it_stale(project, name):
    if name == "shards":
        (project.folder / "shards.txt").write_text("other tokens")
    else:
        project.settings[name] = CHANGED[name]
    assert project.stale() == FED_BY[name]
    project.run_stale()
    assert project.stale() == set()
    assert project.results() == project.expected()


def test_the_device_changes_nothing(project):
    project.settings["params:device"] = "cuda"
    assert project.stale() == set()


def test_parameters_that_only_shape_the_pipeline_are_left_to_the_nodes_they_shape(project):
    project.settings["params:kmeans"] = KMeansParameters(
        n_clusters=8, encodings=("kmeans-onehot",), sparsity=SparsityParameters(top_k=2)
    )
    project.settings["params:pca"] = PCAParameters(topk=(1, 4, 16))
    assert project.stale() == set()
    for section, names in freshness.SHAPING.items():
        assert names < type(SETTINGS[section]).model_fields.keys()


def test_a_node_bound_to_other_values_is_stale(project):
    others = [node for node in PIPELINE.nodes if node.name != "measure"]
    whole = Pipeline([*others, make("measure", ["kmeans_model", "pca_model"], "errors", made="other errors")])
    stale = Freshness(project.folder, project.catalog(), whole).stale(whole)
    assert {node.name for node in stale.nodes} == {"measure", "report"}


def test_a_raised_format_makes_everything_stale(project, monkeypatch):
    monkeypatch.setattr(freshness, "FORMAT", freshness.FORMAT + 1)
    assert project.stale() == {node.name for node in PIPELINE.nodes}


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("statistics", {"standardize"}),
        ("kmeans_model", {"fit_kmeans"}),
        ("errors", {"measure"}),
        ("scores", {"probe", "encode"}),  # codes are in memory: they are made again to feed the probes
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
    record = project.folder / freshness.FOLDER / "errors.json"
    if text is None:
        record.unlink()
    else:
        record.write_text(text)
    assert project.stale() == {"measure"}


def test_what_memory_holds_leaves_no_record(project):
    assert {path.name for path in (project.folder / freshness.FOLDER).iterdir()} == {f"{name}.json" for name in KEPT}


def test_a_result_saved_from_stale_inputs_is_not_taken_for_current(project):
    project.settings["params:kmeans"] = CHANGED["params:kmeans"]
    project.run(PIPELINE.only_nodes("measure"))
    assert project.stale() == FED_BY["params:kmeans"]
    project.run_stale()
    assert project.results() == project.expected()


def test_nor_is_one_that_came_from_them_through_memory(project):
    project.settings["params:kmeans"] = CHANGED["params:kmeans"]
    project.run(PIPELINE.only_nodes("encode", "probe", "report"))
    assert project.stale() == FED_BY["params:kmeans"]
    project.run_stale()
    assert project.results() == project.expected()


def test_nor_is_one_made_from_inputs_of_unknown_origin(project):
    (project.folder / freshness.FOLDER / "kmeans_model.json").unlink()
    (project.folder / "kmeans_model.json").write_text('"somebody else\'s model"')
    project.run(PIPELINE.only_nodes("measure"))
    assert project.stale() >= {"fit_kmeans", "measure"}
    project.run_stale()
    assert project.results() == project.expected()


@pytest.mark.parametrize("reader", ["standardize", "fit_pca"])
def test_a_source_that_changes_while_it_is_read_leaves_results_that_are_out_of_date(tmp_path, monkeypatch, reader):
    project, run = Project(tmp_path), Node.run

    def change_after(node, inputs):
        made = run(node, inputs)
        if node.name == reader:
            (tmp_path / "shards.txt").write_text("other tokens")
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Node, "run", change_after)
        project.run(PIPELINE)
    assert project.stale() == FED_BY["shards"]
    project.run_stale()
    assert project.stale() == set()
    assert project.results() == project.expected()


def test_a_save_that_dies_midway_counts_as_missing(project, monkeypatch):
    def die(self, data):
        Path(self._filepath).write_text(f'"half of {data}')
        raise OSError("no space left on device")

    project.settings["params:pca"] = CHANGED["params:pca"]
    with monkeypatch.context() as patch:
        patch.setattr(JSONDataset, "save", die)
        with pytest.raises((OSError, DatasetError)):
            project.run(PIPELINE.only_nodes("fit_pca"))
    project.settings["params:pca"] = SETTINGS["params:pca"]  # the older record would agree with this
    assert project.stale() == {"fit_pca"}
    project.run_stale()
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
    with pytest.raises(FileNotFoundError, match=r"`kmeans_model` does not exist .*run `fit_kmeans` first"):
        project.freshness().check_inputs(PIPELINE.only_nodes("encode"))
    project.run(PIPELINE)
    with pytest.raises(FileNotFoundError, match=r"`codes` does not exist .*run `encode` first"):
        project.freshness().check_inputs(PIPELINE.only_nodes("probe"))


def test_a_missing_source_is_named_with_its_path(project):
    (project.folder / "shards.txt").unlink()
    todo = project.freshness().stale(PIPELINE)
    with pytest.raises(FileNotFoundError, match=r"`shards` does not exist .*shards\.txt.*: correct its path"):
        project.freshness().check_inputs(todo)


def test_a_source_that_cannot_be_read_is_named_with_the_reason(project):
    (project.folder / "shards.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"^`shards` cannot be read: [^\n]*can't decode byte 0xff[^\n]*$"):
        project.freshness().stale(PIPELINE)


def test_a_stale_input_is_warned_of_and_used(project, caplog):
    project.freshness().check_inputs(PIPELINE.only_nodes("measure"))
    assert not caplog.records
    project.settings["params:kmeans"] = CHANGED["params:kmeans"]
    with caplog.at_level(logging.WARNING):
        project.freshness().check_inputs(PIPELINE.only_nodes("measure"))
    (record,) = caplog.records
    assert "`kmeans_model` was made from other inputs" in record.message
    assert "run `fit_kmeans` first" in record.message


ACTIONS = st.one_of(
    st.tuples(st.just("set"), st.sampled_from(sorted(CHANGED)), st.booleans()),
    st.tuples(st.just("shards"), st.sampled_from(["tokens", "other tokens"])),
    st.tuples(st.just("delete"), st.sampled_from(KEPT)),
    st.tuples(st.just("some"), st.sets(st.sampled_from(sorted(node.name for node in PIPELINE.nodes)), min_size=1)),
)


@settings(deadline=None, max_examples=40)
@given(actions=st.lists(ACTIONS, min_size=1, max_size=5))
def test_whatever_came_before_a_run_leaves_what_a_first_run_would(actions):
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder))
        project.run(PIPELINE)
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

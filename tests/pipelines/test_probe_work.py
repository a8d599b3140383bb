"""The probe node that saves itself: stopped and killed anywhere and gone on with, in parts, and by
several processes, always with the bits of one that was left alone.
"""

import functools
import json
import os
import pickle
import random
import signal
import time

import pytest
import torch

from assay.architecture import Architecture
from assay.io.checkpoints import Checkpoints
from assay.io.codes import StoredCodes, write_codes
from assay.io.saes import StoredSae
from assay.io.shards import Shards
from assay.numerics.codes import TensorCodes
from assay.numerics.probe import Sweep, certificate, estimator, labeled
from assay.numerics.probe.judge import Judging
from assay.numerics.probe.passes import SketchPass
from assay.numerics.probe.state import ProbeSettings
from assay.pipelines import stopping
from assay.pipelines.dictionary_nodes import SourcedCodes, encode
from assay.pipelines.recipes import describe_codes, remake_codes
from assay.team import Team, as_current, current_team
from probe_work import make_codes, run_probes, tokens_as_centers
from teams import Ranks, in_ranks

N_CLUSTERS = 12


@pytest.fixture(autouse=True)
def small_groups_of_strict_probes(monkeypatch):
    """Four features are solved together; hardly any sketch is good enough."""
    monkeypatch.setattr(labeled, "_SOLVED", 4)
    strict = functools.partial(ProbeSettings, ce_error=1e-16, fine_rows=300)
    monkeypatch.setattr(estimator, "ProbeSettings", strict)


@pytest.fixture
def model(planted):
    return tokens_as_centers(N_CLUSTERS, Shards(planted[0]))


@pytest.fixture
def probes(planted, model, tmp_path):
    """What the node gives; None where a signal stopped it."""

    def run(folder="here", **given):
        request = {
            "shards": [str(path) for path in planted],
            "checkpoints": str(tmp_path / folder),
            "parameters": {"slab_rows": 100, "parts": 2} | given.pop("parameters", {}),
            **given,
        }
        with stopping.signals_stop():
            try:
                return run_probes(current_team(), request, model)
            except KeyboardInterrupt:
                return None

    return run


def assert_same(found, wanted):
    assert json.dumps(found[1]) == json.dumps(wanted[1])
    for mine, other in ((found[0], wanted[0]), (found[2], wanted[2])):
        assert mine.keys() == other.keys()
        for name, each in mine.items():
            torch.testing.assert_close(each, other[name], rtol=0, atol=0, equal_nan=True, msg=name)


STAGES = [("rows", 3), ("probes", 2), ("gathered", 2), ("refined", 1), ("ranked", 1)]


@pytest.mark.parametrize("stop", [*STAGES, ("certified", 1)], ids=str)
def test_a_signal_in_each_stage_saves_and_the_rest_is_made_to_the_same_bits(
    probes, stop, tmp_path, capfd
):
    wanted = probes("whole")
    assert wanted[1]["refined_pairs"] > 0
    assert probes(stop=(*stop, signal.SIGTERM)) is None
    assert "Stopping: the fit in progress saves itself first" in capfd.readouterr().err
    assert list((tmp_path / "here").rglob("step*.safetensors"))
    assert_same(probes(parameters={"slab_features": 4}), wanted)
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("void", ["drop", "negative", "class"])
@pytest.mark.parametrize("parts", [1, 3, 99])
def test_no_bit_depends_on_the_parts(probes, parts, void):
    wanted = probes("two", parameters={"void": void})
    assert_same(probes(parameters={"parts": parts, "void": void}), wanted)


def test_what_is_made_but_not_saved_is_not_made_again(probes, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "clear_finished", lambda _: None)  # its results were not saved
        wanted = probes()
    assert len(list((tmp_path / "here").iterdir())) == 3  # two parts, and the certificates
    monkeypatch.setattr(SketchPass, "run", None)
    monkeypatch.setattr(Judging, "_judge_values", None)
    monkeypatch.setattr(certificate, "_differences", None)
    assert_same(probes(), wanted)
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    "change", [{"ridge": 1e-3}, {"void": "class"}, {"slab_rows": 99}, {"class_weight": "balanced"}]
)
def test_other_settings_are_other_work(probes, change):
    assert probes(stop=("ranked", 1, signal.SIGTERM)) is None
    assert_same(probes(parameters=change), probes("other", parameters=change))


@pytest.mark.crash
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_killed_and_stopped_at_random_moments_it_ends_with_the_same_bits(probes, tmp_path):
    """Half the signals are SIGKILL, half SIGTERM; each time other slabs fit the memory."""
    wanted, out = probes("whole"), tmp_path / "out"
    chance, lives = random.Random(0), 0

    def live(seconds, number):
        child = os.fork()
        if child == 0:
            status = 130
            try:
                torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
                slabs = {"slab_features": chance.choice([None, 4, 8]), "checkpoint_minutes": 1e-5}
                if (found := probes(parameters=slabs, pause=0.01)) is not None:
                    out.write_bytes(pickle.dumps(found))
                    status = 0
            finally:
                os._exit(status)
        time.sleep(seconds)
        os.kill(child, number)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    while not out.exists():
        lives += 1
        assert lives < 60, "it does not come to an end"
        number = signal.SIGKILL if lives % 2 else signal.SIGTERM
        status = live(chance.uniform(0.05, 0.6), number)
        assert status in {0, -number, 130 if number == signal.SIGTERM else 0}
    assert lives > 3, "too few of the signals came while it was at work"
    assert_same(pickle.loads(out.read_bytes()), wanted)  # noqa: S301 # this test wrote it


def same_codes(found, wanted):
    for mine, other in zip(found.batches(50, 100), wanted.batches(50, 100), strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(each, other[name]) for name, each in mine.items())
    return (found.format, found.k, found.provenance) == (wanted.format, wanted.k, wanted.provenance)


def told(codes):
    """The recipe as another process has it."""
    described = describe_codes(codes)
    assert described is not None
    recipe, tensors = described
    return json.loads(json.dumps(recipe)), tensors


def test_another_process_comes_by_the_same_codes(planted, model, tmp_path):
    shards = Shards(planted[1])
    codes = make_codes(shards, model)
    again = remake_codes(*told(codes))
    assert isinstance(again, SourcedCodes)
    assert same_codes(again, codes)
    assert again.made_from == codes.made_from
    write_codes(tmp_path / "codes", codes, batch_size=64, rows_per_shard=256)
    stored = remake_codes(*told(StoredCodes(tmp_path / "codes")))
    assert same_codes(stored, StoredCodes(tmp_path / "codes"))
    assert describe_codes(TensorCodes(torch.ones(2, 3))) is None


def test_another_process_comes_by_the_codes_of_an_autoencoder(planted, model):
    stored = StoredSae(
        "saev",
        Architecture("topk", k=3),
        {"W_enc": model["cluster_centers"].T.contiguous(), "W_dec": model["cluster_centers"]},
    )
    statistics = {name: model[name] for name in ("mean", "std")}
    codes = encode(Shards(planted[1]), statistics, stored, "cpu", layer=5, name="mine", kind="raw")
    assert same_codes(remake_codes(*told(codes)), codes)


class OneOf(Team):
    """A rank without the others, which are ranks of other teams at other times."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def test_what_one_process_began_ranks_go_on_with_and_back(probes, monkeypatch):
    wanted = probes("whole", parameters={"parts": 3})
    made, sweep = [], Sweep.run
    monkeypatch.setattr(
        Sweep, "run", lambda self: (made.append(self._columns.start), sweep(self))[1]
    )
    given = {"parameters": {"parts": 3}}
    assert probes(stop=("ranked", 4, signal.SIGTERM), **given) is None  # the second part's first
    with as_current(OneOf(1, 2)), pytest.raises(ValueError, match="has no whole last checkpoint"):
        probes(**given)  # which has the second part
    with as_current(OneOf(0, 2)):
        assert_same(probes(**given), wanted)
    assert made[:3] == [0, 4, 4]
    assert made[-4:] == [8, 0, 4, 8]  # the last part, and then all of them are joined


@pytest.mark.crash
@pytest.mark.parametrize("size", [2, 4])
def test_real_ranks_have_the_bits_of_one_process(planted, tmp_path, monkeypatch, size):
    """Groups of 256 features; they are stopped once on their way."""
    monkeypatch.undo()
    model = tokens_as_centers(600, Shards(planted[0]))
    request = {
        "shards": [str(path) for path in planted],
        "checkpoints": str(tmp_path / "here"),
        "parameters": {"slab_rows": 100, "parts": 3},
    }
    wanted = run_probes(current_team(), request | {"checkpoints": str(tmp_path / "one")}, model)
    stop = {"stop": ("rows", 4, signal.SIGTERM)}
    with pytest.raises(KeyboardInterrupt):
        in_ranks(size, "probe_work:run_probes", request | stop, model, session=True)
    assert list((tmp_path / "here").rglob("step*.safetensors"))
    found = in_ranks(size, "probe_work:run_probes", request, model, session=True)
    assert_same(found, wanted)


@pytest.mark.crash
def test_a_rank_that_is_killed_is_named_and_leaves_the_checkpoints(planted, tmp_path):
    model = tokens_as_centers(300, Shards(planted[0]))
    request = {
        "shards": [str(path) for path in planted],
        "checkpoints": str(tmp_path / "here"),
        # Saved after each of many batches, it takes long enough on every rank.
        "parameters": {"slab_rows": 20, "parts": 2, "checkpoint_minutes": 1e-9},
    }
    ranks = Ranks(2, "probe_work:run_probes", request, model, 4, session=True)
    ranks.wait_for(lambda: len(list((tmp_path / "here").rglob("step*.safetensors"))) == 2)
    ranks.kill(1)
    with pytest.raises(ChildProcessError, match=r"^rank 1 of 2 is gone"):
        ranks.result()
    assert list((tmp_path / "here").rglob("step*.safetensors"))

"""Sweeps of probes that stop anywhere and are gone on with, or shared: always the same bits."""

import dataclasses
import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load, save

from assay.numerics.codes import ComputedCodes, SelectedCodes, sparsify
from assay.numerics.probe import Certifying, FittedProbes, LabeledCodes, Sweep, labeled, solver
from assay.numerics.probe.state import ProbeSettings

N_ROWS, N_VAL, N_FEATURES, CLASSES, BATCH = 130, 70, 11, 3, 32
FORMATS = ("dense", "sparse", "onehot")


class StopError(Exception):
    """The process is asked to."""


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Four features are solved together, of which two are refined together."""
    monkeypatch.setattr(labeled, "_SOLVED", 4)
    monkeypatch.setattr(solver, "_REFINED", 2)


def make_codes(code_format, n_rows, seed):
    """Features of many shapes, so that their points are padded, and labels, some of them -1."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, CLASSES, (n_rows,), generator=draw)
    x = torch.randn(n_rows, N_FEATURES, generator=draw, dtype=torch.float32)
    x = x + 0.3 * labels[:, None] * torch.arange(N_FEATURES)
    x[:, 1::3] **= 3
    x[:, 2::3] = x[:, 2::3].round()
    # So late that its first batch has no entry of it.
    x[:BATCH, 5] = 0 if code_format == "sparse" else x[:BATCH, 5]

    def stream(batch_size, start):
        for first in range(start, n_rows, batch_size):
            batch = {"values": x[first : first + batch_size]}
            if code_format == "sparse":
                batch = sparsify(batch, top_k=6)
            elif code_format == "onehot":
                batch = {"indices": batch["values"].argmax(1)}
            yield batch

    k = {"dense": N_FEATURES, "sparse": 6, "onehot": 1}[code_format]
    codes = ComputedCodes(code_format, n_rows, N_FEATURES, k, stream)
    kept = torch.rand(n_rows, generator=draw, dtype=torch.float32) < 0.8
    return SelectedCodes(codes, kept), labels[kept]


@pytest.fixture(params=[(each, None) for each in FORMATS] + [("sparse", "balanced")], ids=str)
def sweep(request):
    """Makes a sweep with these slabs, this progress and these features."""
    code_format, class_weight = request.param
    train, val = make_codes(code_format, N_ROWS, 0), make_codes(code_format, N_VAL, 1)
    settings = ProbeSettings(class_weight=class_weight, ce_error=1e-13, fine_rows=20)
    ks = (2, 6, None) if code_format == "sparse" else (None,)

    def make(slab_features=None, progress=None, columns=None):
        data = [
            LabeledCodes(codes, labels, CLASSES, BATCH, slab_features, progress)
            for codes, labels in (train, val)
        ]
        return Sweep(settings, data[0], data[1], ks, columns)

    return make


@pytest.fixture(scope="module")
def made():
    """Whole sweeps, by the kind of their codes."""
    return {}


@pytest.fixture
def whole(sweep, made, request):
    """What a sweep gives that nothing stops, and its signs of progress."""
    kind = str(request.node.callspec.params["sweep"])
    if kind not in made:
        told = []
        made[kind] = sweep(None, lambda *what: told.append(what[0])).run(), told
    return made[kind]


def flat(found):
    fits, judged = found
    tensors = {}
    for number, (fitted, judgment) in enumerate(zip(fits, judged, strict=True)):
        tensors |= {f"{number}.{name}": each for name, each in fitted.state_dict().items()}
        tensors[f"{number}.refined"] = torch.tensor(fitted.n_refined)
        tensors |= {
            f"{number}.{name}": each
            for name, each in dataclasses.asdict(judgment).items()
            if isinstance(each, torch.Tensor)
        }
    return tensors


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, each in found.items():
        torch.testing.assert_close(each, wanted[name], rtol=0, atol=0, equal_nan=True, msg=name)


def saved(work):
    """Where some work stands, as a file would have it."""
    tensors, state = work.checkpoint()
    stored = {
        name: each.clone(memory_format=torch.contiguous_format) for name, each in tensors.items()
    }
    return load(save(stored)), json.loads(json.dumps(state))


class Stopping:
    """Progress that stops some work at a sign of it, and keeps where it stands."""

    def __init__(self):
        self.work, self.left = None, None

    def go_on(self, work, stage, signs):
        """Go on with the work until so many signs of progress in that stage."""
        self.work, self.stage, self.signs = work, stage, signs
        if self.left is not None:
            work.resume(*self.left)
        return work.run()

    def __call__(self, stage, *_):
        self.signs -= stage == self.stage
        if self.signs == 0:
            self.left = saved(self.work)
            raise StopError


def run_in_pieces(make, stops, slabs=(None,)):
    """Stop at each of these signs of progress, and go on in another with the slabs in turn."""
    stopping = Stopping()
    for number, stop in enumerate(stops):
        with pytest.raises(StopError):
            stopping.go_on(make(slabs[number % len(slabs)], stopping), *stop)
    return stopping.go_on(make(None, stopping), "none", 1)


STOPS = [
    ("rows", 2),
    ("rows", 2),
    ("probes", 3),
    ("refined", 1),
    ("gathered", 2),
    ("refined", 2),
    ("ranked", 1),
    ("gathered", 3),
    ("ranked", 2),
]


@pytest.mark.parametrize("slabs", [(None,), (4, None, 8)], ids=str)
def test_what_is_stopped_and_gone_on_with_ends_with_the_same_bits(sweep, whole, slabs):
    wanted, _ = whole
    is_table = len(wanted[0]) == 1 and wanted[0][0].n_refined == 0
    stops = [("rows", 2), ("rows", 1), ("probes", 1), ("rows", 2)] if is_table else STOPS
    assert_equal(flat(run_in_pieces(sweep, stops, slabs)), flat(wanted))


@pytest.mark.parametrize("stage", ["rows", "probes", "refined", "ranked"])
def test_it_can_stop_at_the_last_sign_of_a_stage(sweep, whole, stage):
    wanted, told = whole
    if stage in told:
        assert_equal(flat(run_in_pieces(sweep, [(stage, told.count(stage))])), flat(wanted))


@pytest.mark.parametrize("slab_features", [1, 5, 99])
def test_slabs_change_no_bit(sweep, whole, slab_features):
    assert_equal(flat(sweep(slab_features).run()), flat(whole[0]))


@pytest.mark.parametrize("ends", [(0, 8, 11), (0, 4, 8, 11)], ids=str)
def test_ranges_of_whole_groups_joined_are_a_sweep_of_all(sweep, whole, ends):
    wanted, _ = whole
    parts = [sweep(None, None, slice(*some)).run() for some in pairwise(ends)]
    fits, judged = (list(zip(*each, strict=True)) for each in zip(*parts, strict=True))
    joined = (
        [FittedProbes.join(each) for each in fits],
        [type(each[0]).join(each) for each in judged],
    )
    assert_equal(flat(joined), flat(wanted))


def test_groups_are_what_the_bits_depend_on(sweep, whole, monkeypatch):
    """Otherwise the tests above could not fail."""
    wanted = flat(whole[0])
    monkeypatch.setattr(labeled, "_SOLVED", 1)
    found = flat(sweep().run())
    same = all(torch.equal(found[name].nan_to_num(), wanted[name].nan_to_num()) for name in found)
    assert same == ("0.refined" in found and int(found["0.refined"]) == 0)


def test_a_certification_goes_on_after_the_last_slab():
    codes, labels = make_codes("dense", N_ROWS, 0)
    data = LabeledCodes(codes, labels, CLASSES, BATCH, 2)
    (fitted,), _ = Sweep(ProbeSettings(), data, data).run()
    pairs = torch.tensor([[0, 0], [3, 1], [7, 2], [9, 2]])

    def make(slab_features=None, progress=None):
        some = LabeledCodes(codes, labels, CLASSES, BATCH, slab_features, progress)
        return Certifying([(fitted, None)], some, [pairs], n_random=3)

    (wanted,) = make().run()
    stops = [("gathered", 3), ("certified", 1), ("certified", 2), ("certified", 1)]
    (found,) = run_in_pieces(make, stops, (1, 2))
    assert found == wanted

"""The fused kernels: on a card, in Triton's interpreter where it is installed, and what their trial
lets through; and steps as graphs.
"""

import copy
import importlib.metadata
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib import NumpyVersion

from assay.numerics.kmeans import distances, graphed, kernel_trial, kernels, rounded_centers
from assay.numerics.kmeans import nearest as nearest_module
from assay.numerics.kmeans.step import mini_batch_step, pull_centers, queue_step, step_at_once
from assay.numerics.ranking import count_classes
from hostile import KINDS, assert_nearest, make


def by_torch(move_off=0.0, label_off=0):
    """What the kernels give, by torch: right, or off by so much."""

    def nearest(x, centers, *_):
        return (distances.nearest_in_float64(x, centers) + label_off) % len(centers)

    def move_centers(x, centers, labels, _, counts):
        pulls, squared = pull_centers(x, centers, labels)
        return (pulls / counts[:, None] + centers).float() + move_off, squared

    def round_centers(centers, origin, product):
        return product._round_centers(centers - origin)

    return kernels.Kernels(round_centers, nearest, move_centers)


def test_there_are_none_but_on_cuda(monkeypatch, caplog):
    assert kernel_trial.fused_kernels(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setitem(sys.modules, "assay.numerics.kmeans.fused", None)
    kernel_trial.fused_kernels.cache_clear()
    assert kernel_trial.fused_kernels(torch.device("cuda", 7)) is None
    assert "the fused kernels are not used" in caplog.text


def test_the_trial_lets_the_right_ones_through_and_no_others():
    cpu = torch.device("cpu")
    kernel_trial.try_nearest(by_torch(), cpu, torch.float16)
    kernel_trial.try_move(by_torch(), cpu)
    with pytest.raises(ArithmeticError, match=r"of 300 in torch\.float16 it settled 300, 0 right"):
        kernel_trial.try_nearest(by_torch(label_off=1), cpu, torch.float16)
    with pytest.raises(ArithmeticError, match=r"one was moved 1\.0e-03 off"):
        kernel_trial.try_move(by_torch(move_off=1e-3), cpu)


def test_a_step_with_kernels_is_the_step_without(monkeypatch):
    """The kernels' place in a step: what they are given, and what is made of it."""
    generator = torch.Generator().manual_seed(0)
    x, centers = (torch.randn(n, 12, generator=generator, dtype=torch.float32) for n in (200, 30))
    counts = torch.randint(0, 5, (30,), generator=generator)
    wanted = mini_batch_step(x, centers, counts)
    monkeypatch.setattr("assay.numerics.kmeans.step.fused_kernels", lambda _: by_torch())
    monkeypatch.setattr(nearest_module, "fused_kernels", lambda _: by_torch())
    for found, each in zip(mini_batch_step(x, centers, counts), wanted, strict=True):
        torch.testing.assert_close(found, each, rtol=1e-6, atol=0)


class FakeGraph:
    """A graph that is none, and how often one was made and replayed."""

    made, replayed = 0, 0

    def __init__(self, like, *_):
        FakeGraph.made += 1
        self.like = like

    def replay(self, x, centers, counts):
        FakeGraph.replayed += 1
        return queue_step(x, centers, counts, self.like.reassignment_ratio)


def step_inputs(n=200, n_clusters=30, d=12, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, centers = (
        torch.randn(rows, d, generator=generator, dtype=torch.float32) for rows in (n, n_clusters)
    )
    return tuple(
        each.to(device)
        for each in (x, centers, torch.randint(0, 5, (n_clusters,), generator=generator))
    )


def test_a_step_is_captured_where_a_second_of_its_shape_follows(monkeypatch):
    """The odd batch at a pass's end neither makes a graph nor costs the one there is."""
    monkeypatch.setattr(graphed, "_StepGraph", FakeGraph)
    monkeypatch.setattr(graphed, "fused_kernels", lambda _: by_torch())
    monkeypatch.setattr(FakeGraph, "made", 0)
    monkeypatch.setattr(FakeGraph, "replayed", 0)
    steps = graphed.GraphedSteps()
    for n, made, replayed in [
        (200, 0, 0),
        (200, 1, 1),
        (200, 1, 2),
        (70, 1, 2),
        (200, 1, 3),
        (70, 1, 3),
        (70, 2, 4),
    ]:
        inputs = (*step_inputs(n), 0.01)
        found, wanted = steps(*inputs), queue_step(*inputs)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        assert (FakeGraph.made, FakeGraph.replayed) == (made, replayed)
    for other in (copy.deepcopy(steps), pickle.loads(pickle.dumps(steps))):  # noqa: S301
        assert other._graph is None
    x, centers, counts = step_inputs(70)
    steps(x, centers, counts, 0.5)
    steps(x.double(), centers, counts, 0.01)
    assert (FakeGraph.made, FakeGraph.replayed) == (
        2,
        4,
    ), "another ratio, and tokens that the kernels do not take"


def test_a_step_that_cannot_be_captured_is_queued_as_it_is(monkeypatch, caplog):
    def refuse(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(graphed, "_StepGraph", refuse)
    monkeypatch.setattr(graphed, "fused_kernels", lambda _: by_torch())
    steps, (x, centers, counts) = graphed.GraphedSteps(), step_inputs()
    wanted = step_at_once(x, centers, counts, 0.01)
    for _ in range(4):
        found = step_at_once(x, centers, counts, 0.01, steps)
        assert torch.equal(found.centers, wanted.centers)
        assert found.inertia == wanted.inertia
    assert caplog.text.count("could not be captured: out of memory") == 1


@pytest.mark.gpu
def test_on_cuda_a_captured_step_is_the_same_bits():
    """Batches of two shapes in turn, some with rows that the first product leaves in question, and
    a step in another's results.
    """
    if kernel_trial.fused_kernels(torch.device("cuda", torch.cuda.current_device())) is None:
        pytest.skip("no kernels of our own on this card")
    steps, n_replayed, kept = graphed.GraphedSteps(), 0, []
    for number, n in enumerate([300, 300, 300, 70, 300, 300, 70, 70, 300]):
        x, centers, counts = step_inputs(n, 1000, 70, "cuda", seed=number)
        if number % 3 == 2:
            centers[500:] = centers[:500]  # of many that are equal all are in question
            x = x * 0 + centers[:n] + x / 100
        found, wanted = (step_at_once(x, centers, counts, 0.01, *queue) for queue in ((steps,), ()))
        n_replayed += steps._graph is not None
        kept.append((found, wanted))
    assert n_replayed == 8
    for found, wanted in kept:
        for mine, theirs in zip(found[:3], wanted[:3], strict=True):
            assert torch.equal(mine, theirs)
        assert found[3:] == wanted[3:]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "n_clusters", "d"), [(1, 1, 1), (130, 257, 70), (1000, 4096, 388)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_cuda_they_settle_rows_by_brute_force(kind, n, n_clusters, d, dtype):
    fused = kernel_trial.fused_kernels(torch.device("cuda"))
    assert fused is not None
    x, centers = (each.cuda() for each in make(kind, n, n_clusters, d, 1))
    origin = distances.origin_of(centers)
    product = rounded_centers.RoundedCenters(centers, origin, dtype, fused)
    if not product.holds_the_centers:
        pytest.skip(f"{kind} does not fit {dtype}")
    found = fused.nearest(x, centers, origin, product)
    settled = found >= 0
    # Bounds overflow, underflow or are wide.
    in_question = (
        "huge",
        "norms",
        "two scales",
        "tiny",
        "far and tiny",
    )
    assert float(settled.double().mean()) > 0.95 or kind in in_question
    assert_nearest(found[settled].cpu(), x[settled].cpu(), centers.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("of_one", [0.0, 0.9])
@pytest.mark.parametrize(("n", "n_clusters", "d"), [(1, 1, 1), (130, 257, 70), (8192, 500, 1024)])
def test_on_cuda_centers_move_as_on_the_cpu(n, n_clusters, d, of_one):
    x, centers = make("offset", n, n_clusters, d, 1)
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, n_clusters, (n,), generator=generator)
    labels[: int(of_one * n)] = n_clusters // 2
    hits = count_classes(labels, n_clusters)
    given = x, centers, labels, hits, 2 * hits + 1
    fused = kernel_trial.fused_kernels(torch.device("cuda"))
    assert fused is not None
    moved, squared = fused.move_centers(*(each.cuda() for each in given))
    again, _ = fused.move_centers(*(each.cuda() for each in given))
    assert torch.equal(moved, again)
    for found, wanted in zip((moved, squared), by_torch().move_centers(*given), strict=True):
        torch.testing.assert_close(
            found.cpu(), wanted, rtol=1e-6 if found.dtype == torch.float32 else 1e-12, atol=0
        )


INTERPRETED = """
import sys
import torch
sys.path[:0] = sys.argv[1:]
import hostile, test_kernels
from assay.numerics.kmeans import distances, fused, fused_rounding, kernels, rounded_centers
from assay.numerics.kmeans.fused_step import move_centers
rounded_centers.GROUP = 256  # whole tiles, as on a GPU
fused.ROUNDED = fused_rounding.ROUNDED = 64  # the interpreter's time is the programs' number
all_of_them = kernels.Kernels(fused_rounding.round_centers, fused.nearest, move_centers)
torch_alone = test_kernels.by_torch()
shapes = list(fused._SHAPES.values())
left = 0
for number, kind in enumerate(hostile.KINDS):
    for n, n_clusters, d in ((5, 3, 3), (30, 300, 64), (7, 1, 1), (70, 530, 70))[: 4 if kind in ("duplicates", "norms") else 2]:
        x, centers = hostile.make(kind, n, n_clusters, d, 1)
        origin = distances.origin_of(centers)
        for dtype in (torch.float16, torch.bfloat16):
            product = rounded_centers.RoundedCenters(centers, origin, dtype, all_of_them)
            same = rounded_centers.RoundedCenters(centers, origin, dtype, torch_alone)
            assert product.holds_the_centers == same.holds_the_centers
            if not product.holds_the_centers:
                continue
            if dtype == torch.float16:
                assert torch.equal(product.matrix, same.matrix), kind
                torch.testing.assert_close(product.bounds, same.bounds, rtol=1e-6, atol=0)
            else:  # which the interpreter cuts off in place of rounding, and does not multiply: its values, as float32
                product.matrix = product.matrix.float()
            fused._SHAPES = {(0, 0): shapes[(number + (dtype == torch.float16)) % len(shapes)]}
            found = fused.nearest(x, centers, origin, product)
            settled = found >= 0
            left += 0 if kind == "huge" else int((~settled).sum())
            hostile.assert_nearest(found[settled], x[settled], centers)
        if kind == "norms":
            for bad in (torch.nan, torch.inf, -torch.inf):
                strange = x.clone()
                strange[2, 0] = bad
                # Left to float64's turn, which refuses it.
                assert fused.nearest(strange, centers, origin, product)[2] == -1
            labels = torch.arange(n) ** 2 % n_clusters
            hits = torch.bincount(labels, minlength=n_clusters)
            given = x, centers, labels, hits, hits.clamp(min=1)
            for found, wanted in zip(move_centers(*given), torch_alone.move_centers(*given)):
                torch.testing.assert_close(found, wanted, rtol=1e-6 if found.dtype == torch.float32 else 1e-12, atol=0)
print("left:", left)
"""


def interpreter_works() -> bool:
    """Triton before 3.7 does not interpret with numpy 2.4 or later."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return False
    return NumpyVersion(version) >= "3.7.0" or NumpyVersion(np.__version__) < "2.4.0"


@pytest.mark.e2e  # a process of its own, for 20 seconds
@pytest.mark.skipif(
    not interpreter_works(), reason="needs Triton, and before its 3.7 numpy before 2.4"
)
def test_their_logic_is_brute_force_in_tritons_interpreter():
    source = Path(distances.__file__).parents[3]
    paths = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "1"}
    program = [sys.executable, "-c", INTERPRETED, str(here), str(here.parent / "helpers")]
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert ended.stdout.strip() == "left: 0", ended.stderr

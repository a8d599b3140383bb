"""On a pretended GPU: no devices are mixed, and the host waits no more often than it has to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(TESTS / "helpers"), str(TESTS.parent / "src")])
}

PROGRAM = """
import json
import torch
import pretended_cuda
from assay.numerics.codes import TensorCodes
from assay.numerics.kmeans.nearest import NearestCenters
from assay.numerics.kmeans.estimator import MiniBatchKMeans
from assay.numerics.kmeans.seeding import kmeans_plus_plus
from assay.numerics.moments import StreamingMoments
from assay.numerics.pca import StreamingPCA
from assay.numerics.probe import LogisticProbe1d
from assay.numerics.probe.cells import CellMap
from assay.numerics.probe.sketch import FeatureSketch
counts = pretended_cuda.install()
generator = torch.Generator().manual_seed(0)
centers = torch.randn(300, 64, generator=generator)
tokens = centers[torch.arange(600) % 300] + 0.3 * torch.randn(600, 64, generator=generator)
centers, tokens = centers.cuda(), tokens.cuda()
finder = NearestCenters(centers)
kmeans = MiniBatchKMeans.from_state({"cluster_centers": centers, "counts": torch.ones(300, dtype=torch.int64).cuda()})
due = MiniBatchKMeans.from_state({"cluster_centers": centers, "counts": torch.ones(300, dtype=torch.int64).cuda()})
moments, pca = StreamingMoments(), StreamingPCA()
probed = (tokens[:, 0] > 0).long() + 2 * (tokens[:, 1] > 0)
sketch, labels = FeatureSketch(CellMap.of_rows(tokens.T), 3), torch.zeros(600, dtype=torch.int64).cuda()

def reassigning():
    due._fit.progress.tokens_since_reassignment = 10**9
    due.partial_fit(tokens)

asked = {
    "find": lambda: finder.find(tokens),
    "step": lambda: kmeans.partial_fit(tokens),
    "step that reassigns": reassigning,
    "ten centers of k-means++": lambda: kmeans_plus_plus(tokens, 11, torch.Generator().manual_seed(0)),
    "moments": lambda: moments.partial_fit(tokens),
    "PCA": lambda: pca.partial_fit(tokens),
    "sketch": lambda: sketch.add(tokens, labels),
    "probes": lambda: LogisticProbe1d().fit(TensorCodes(tokens), probed, 4),
}
found = {}
for name, ask in asked.items():
    ask()
    counts.reset()
    ask()
    found[name] = {"launches": counts.launches, "waits": dict(counts.waits), "atomics": dict(counts.atomics)}
print(json.dumps(found))
"""


def pretended(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def counted() -> dict[str, dict]:
    """Launches, waits and float atomics by what was asked."""
    ended = pretended(PROGRAM)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize(
    ("asked", "most"),
    {
        "find": 3,
        "step": 6,
        "step that reassigns": 9,
        "moments": 2,
        "PCA": 1,
        "sketch": 1,
        "probes": 22,
    }.items(),
)
def test_the_host_waits_no_more_often_than_it_has_to(counted, asked, most):
    assert sum(counted[asked]["waits"].values()) <= most, counted[asked]["waits"]


def test_a_center_of_k_means_plus_plus_is_a_few_waits(counted):
    waits = counted["ten centers of k-means++"]["waits"]
    assert sum(waits.values()) <= 10 * 4 + 3, waits


def test_no_sum_of_a_dictionary_is_made_in_an_order_of_chance(counted):
    """Of probes some are, which docs/probes.md says."""
    atomics = {asked: each["atomics"] for asked, each in counted.items() if each["atomics"]}
    assert set(atomics) == {"sketch", "probes"}


STRICT = """
import threading
import numpy
import torch
import pretended_cuda
counts = pretended_cuda.install()
x = torch.ones(3, device="cuda")
cpu = torch.ones(3)

def wanted(kind, ask):
    try:
        ask()
    except kind as error:
        return str(error)
    raise AssertionError("nothing was refused")

mixed = pretended_cuda.MixedDevicesError
assert wanted(mixed, lambda: x + cpu).startswith("aten.add.Tensor of cuda(3,), cpu(3,)")
wanted(mixed, lambda: cpu[x.long()])
wanted(mixed, lambda: cpu.add_(x))
wanted(mixed, lambda: torch.cat([x, cpu]))
wanted(mixed, lambda: x.index_put_((torch.zeros(3, dtype=torch.int64),), cpu))
wanted(TypeError, lambda: x.numpy())
wanted(TypeError, lambda: numpy.asarray(x))
assert x.is_cuda and x.device == torch.device("cuda", 0) and (2 * x).cpu().tolist() == [2, 2, 2]
assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2], "a number may be the CPU's"

def count(ask):
    counts.reset()
    ask()
    return sum(counts.waits.values())

assert count(lambda: x[0].item()) == count(lambda: float(x.sum())) == count(lambda: x.nonzero()) == 1
assert count(lambda: x[x > 0]) == count(lambda: x.cpu()) == count(lambda: cpu.cuda()) == 1
assert count(lambda: x[torch.tensor([1])]) == count(lambda: x[[1, 2]]) == count(lambda: cpu.copy_(x)) == 1
assert count(lambda: torch.bincount(x.long())) == 2
assert count(lambda: cpu.to("cuda", non_blocking=True) + 1 + x.double()) == 0
assert count(lambda: x.masked_fill(x > 0, 2.0)) == 0
counts.reset()
assert (x + 1).exp().view(3, 1).shape == (3, 1) and counts.launches == 2
torch.zeros(3, device="cuda").scatter_add_(0, x.long(), x)
torch.zeros(3, device="cuda").scatter_reduce_(0, x.long(), x, "amin")
torch.zeros(3, dtype=torch.int64, device="cuda").scatter_add_(0, x.long(), x.long())
assert sum(counts.atomics.values()) == 1
seen = []
thread = threading.Thread(target=lambda: seen.append(torch.ones(1, device="cuda").is_cuda))
thread.start()
thread.join()
assert seen == [True]
"""


def test_the_pretended_device_is_as_strict_as_a_gpu():
    ended = pretended(STRICT)
    assert ended.returncode == 0, ended.stderr


def test_what_is_tested_on_a_gpu_holds_on_the_pretended_one():
    """A rehearsal, so that they run on a card at the first try; the others need Triton, or a card's
    memory.
    """
    command = (
        "-m pytest -q -p no:cacheprovider -p pretended_cuda -m gpu tests/numerics/test_on_cuda.py "
    )
    command += "tests/io/test_stream_reader.py"
    ended = subprocess.run(
        [sys.executable, *command.split()],
        cwd=TESTS.parent,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    assert "skipped" not in ended.stdout.splitlines()[-1]


def test_on_a_bare_machine_pytest_finds_what_wants_a_gpu():
    missing = [
        "mlflow",
        "kedro",
        "pandas",
        "pydantic",
        "PIL",
        "safetensors",
        "sklearn",
        "scipy",
        "hypothesis",
        "tqdm",
    ]
    program = f"import sys; sys.modules.update(dict.fromkeys({missing})); import pytest; "
    program += "sys.exit(pytest.main('-q --collect-only -p no:cacheprovider -m gpu "
    program += "tests/numerics/test_on_cuda.py tests/numerics/test_kernels.py'.split()))"
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=TESTS.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "test_probes_are_the_same[True]" in ended.stdout
    assert "test_on_cuda_centers_move_as_on_the_cpu" in ended.stdout

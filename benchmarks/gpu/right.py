"""Whether a GPU gives what the CPU gives, and again the same: answers, bits, tests, and a whole
run.
"""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import ROOT, Run, logged, mixture, with_sources
from torch import Tensor

from assay.numerics.kmeans.distances import nearest_in_float64
from assay.numerics.kmeans.estimator import MiniBatchKMeans
from assay.numerics.kmeans.kernel_trial import fused_kernels
from assay.numerics.kmeans.nearest import NearestCenters
from assay.numerics.pca import StreamingPCA

_BATCHES = 40


def answers(run: Run) -> None:
    """The nearest centers at a size that fills the card, of data that is hard in several ways."""
    n, d, k = run.size(32_768, 600), run.size(1024, 64), run.size(16_384, 300)
    fused = fused_kernels(run.device) is not None
    if not run.rehearsal:
        run.judge("answers", "fused kernels that passed their trial", float(fused), at_least=1)
    for kind in ("planted", "noise", "far center", "duplicates", "offset"):
        x = mixture(n, d, k, run.device, noise=kind == "noise")
        centers = x[:k].clone()
        if kind == "far center":
            centers[7] *= 1e4
        if kind == "duplicates":
            centers[k // 2 :] = centers[: k - k // 2].clone()
        if kind == "offset":
            x, centers = x + 1e3, centers + 1e3
        finder = NearestCenters(centers)
        found, again = finder.find(x), finder.find(x)
        some = slice(0, n, n // 512)
        right = float((found[some] == nearest_in_float64(x[some], centers)).double().mean())
        run.judge("answers", f"nearest centers found of a sample, {kind}", right, at_least=1)
        run.judge(
            "answers", f"the same again, {kind}", float(torch.equal(found, again)), at_least=1
        )


def _batches(run: Run) -> list[Tensor]:
    n = run.size(4096, 100)
    return list(torch.split(mixture(_BATCHES * n, run.size(128, 16), 500, torch.device("cpu")), n))


def _kmeans(run: Run) -> MiniBatchKMeans:
    return MiniBatchKMeans(
        run.size(1024, 40), device=run.device, max_iter=1, max_no_improvement=None
    )


def _fit(run: Run, kind: str, path: Path | None, pause: float = 0.0) -> dict[str, Tensor]:
    """The whole fit, resumed from `path` where that is there, and saved there after each step."""
    batches = _batches(run)
    model: MiniBatchKMeans | StreamingPCA = (
        _kmeans(run) if kind == "k-means" else StreamingPCA(device=run.device)
    )
    done = 0
    if path is not None and path.exists():
        saved = torch.load(path, weights_only=True)
        done = saved["done"]
        model.resume(saved["tensors"], saved["state"])
    elif isinstance(model, MiniBatchKMeans):
        model.seed_from(batches)
    for number, batch in enumerate(batches[done:], done + 1):
        model.partial_fit(batch)
        if path is not None:
            tensors, state = model.checkpoint()
            here = {name: tensor.cpu() for name, tensor in tensors.items()}
            torch.save({"tensors": here, "state": state, "done": number}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
            time.sleep(pause)
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def to_be_killed(run: Run) -> None:
    """A fit that saves itself, slowly, until it is killed; which one the environment says."""
    _fit(run, os.environ["KIND"], Path(os.environ["CHECKPOINT"]), pause=0.05)


def killed(run: Run) -> None:
    """A fit whose process is killed, taken up by another: the bits of one that was not."""
    for kind in ("k-means", "PCA"):
        whole = _fit(run, kind, None)
        again = _fit(run, kind, None)
        run.judge("killed", f"{kind} twice: the same bits", float(_equal(whole, again)), at_least=1)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint.pt"
            command = [
                sys.executable,
                str(Path(__file__).parent / "run.py"),
                "--stage",
                "to_be_killed",
            ]
            command += ["--out", str(run.out), *(["--rehearse"] if run.rehearsal else [])]
            process = subprocess.Popen(
                command, env=os.environ | {"KIND": kind, "CHECKPOINT": str(path)}
            )
            end = time.monotonic() + 60
            while not (
                path.exists() and int(torch.load(path, weights_only=True)["done"]) >= _BATCHES // 4
            ):
                if time.monotonic() > end or process.poll() is not None:
                    raise RuntimeError(
                        f"the fit of {kind} to be killed saved nothing: exit code {process.poll()}"
                    )
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            process.wait()
            done = int(torch.load(path, weights_only=True)["done"])
            resumed = _fit(run, kind, path)
        what = f"{kind} killed and gone on with: the same bits"
        run.judge("killed", what, float(_equal(whole, resumed) and done < _BATCHES), at_least=1)


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def tests(run: Run) -> None:
    """The tests that want a GPU: all of them where the project's packages are there, else those
    that need torch alone.
    """
    has = {
        name: importlib.util.find_spec(name) is not None
        for name in ("pydantic", "hypothesis", "sklearn", "xdist")
    }
    whole = has["pydantic"] and has["hypothesis"] and has["sklearn"]
    where = (
        ["tests/numerics", "tests/io"]
        if whole
        else [f"tests/numerics/test_{name}.py" for name in ("on_cuda", "kernels")]
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
        "-W",
        "default",
    ]
    command += ["--durations=10", *(["-n", "6"] if has["xdist"] else []), *where]
    code = logged(run, "tests", command)
    said = (run.out / "tests.log").read_text(encoding="utf-8").strip().splitlines()[-1:]
    run.say(
        "tests", "tests that want a GPU", found=" ".join(said), wanted="all pass", met=code == 0
    )


def pipeline(run: Run) -> None:
    """The embedded default, whole, here and on the CPU, at once: two tables."""
    if importlib.util.find_spec("kedro") is None:
        run.say("pipeline", "a whole run", found="left out: there is no kedro (make gpu-bundle)")
        return
    small = (
        "digits.n_fit:40,digits.n_val:20,digits.n_probe_train:40,digits.n_probe_val:24,"
        "digits.train_steps:4"
    )
    small += ",digits.train_images:100,kmeans.n_clusters:24,kmeans.n_init:1,kmeans.max_iter:2"
    processes: dict[str, tuple[Path, subprocess.Popen[bytes]]] = {}
    with tempfile.TemporaryDirectory() as folder, (run.out / "pipeline.log").open("ab") as log:
        for name in ("cpu", "cuda") if not run.rehearsal else ("cpu",):
            copy = Path(folder) / name
            for part in ("conf", "src", "pyproject.toml", "README.md", ".telemetry"):
                source = ROOT / part
                (shutil.copytree if source.is_dir() else shutil.copy)(source, _made(copy) / part)
            command = [sys.executable, "-m", "kedro", "run"]
            command += [f"--params=device:{name}{',' + small if run.rehearsal else ''}"]
            environment = with_sources(copy) | {"OMP_NUM_THREADS": "4", "DO_NOT_TRACK": "true"}
            environment |= {"KEDRO_DISABLE_TELEMETRY": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
            processes[name] = (
                copy,
                subprocess.Popen(command, cwd=copy, env=environment, stdout=log, stderr=log),
            )
        codes = {name: process.wait() for name, (_, process) in processes.items()}
        run.say(
            "pipeline",
            "whole runs",
            found=f"exit codes {codes}",
            wanted="0",
            met=not any(codes.values()),
        )
        if any(codes.values()):
            return
        tables = {name: _table(copy) for name, (copy, _) in processes.items()}
    for column in ("nmse", "probe_r"):
        off = _largest_difference(tables["cpu"], tables.get("cuda", tables["cpu"]), column)
        run.judge(
            "pipeline",
            f"a whole run's {column} beside the CPU's, largest difference",
            off,
            at_most=1e-6,
        )


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data").mkdir(exist_ok=True)
    return folder


def _table(project: Path) -> list[dict[str, str]]:
    with (project / "data/08_reporting/baselines.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _largest_difference(
    one: list[dict[str, str]], other: list[dict[str, str]], column: str
) -> float:
    if [row["encoding"] for row in one] != [row["encoding"] for row in other]:
        return math.inf
    pairs = [(row[column], mate[column]) for row, mate in zip(one, other, strict=True)]
    return max(abs(float(a or "nan") - float(b or "nan")) for a, b in pairs if a or b)


STEP = """
import torch
from assay.numerics.kmeans import mini_batch_step
x, centers = torch.randn(300, 100, device={device!r}), torch.randn(1000, 100, device={device!r})
mini_batch_step(x, centers, torch.ones(1000, dtype=torch.int64, device={device!r}))[0].sum().item()
"""
"""All kernels once."""


def sanitizer(run: Run) -> None:
    """NVIDIA's memcheck over all kernels, where it is installed; the rehearsal runs what it would
    watch.
    """
    tool = shutil.which("compute-sanitizer")
    if tool is None and not run.rehearsal:
        run.say("sanitizer", "memcheck", found="left out: there is no compute-sanitizer")
        return
    watched = [] if run.rehearsal else [str(tool), "--tool", "memcheck", "--error-exitcode", "9"]
    code = logged(
        run, "sanitizer", [*watched, sys.executable, "-c", STEP.format(device=run.device.type)]
    )
    run.say("sanitizer", "memcheck", found=f"exit code {code}", wanted="0", met=code == 0)


STAGES: dict[str, Callable[[Run], None]] = {
    "answers": answers,
    "killed": killed,
    "tests": tests,
    "pipeline": pipeline,
    "sanitizer": sanitizer,
    "to_be_killed": to_be_killed,
}

"""What many tests need: a small planted data set in saev's format, and a copy of the project to run
commands in.

What not every machine has is imported where it is used: tests that want a GPU run where there are
    torch, numpy and pytest alone.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from warm_commands import WarmCommands

ROOT = Path(__file__).parents[1]
TOKENS = 16  # in an example

# What is started beside a shell, or with nohup, ignores them, and so would all that the tests
# start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


LONG = ("test_command_line.py", "test_two_at_once.py", "test_whole_runs.py")
"""Files that start many whole runs."""


WAITING = ("test_jobs.py", "test_submit.py")
"""Files that wait for a Slurm."""


LOOK_AT_THE_WHOLE_RUN = ("test_command_line.py", "test_export.py", "test_notebooks.py")


WHOLE_RUNS = (
    *LONG,
    "test_cli.py",
    "test_commands.py",
    "test_export.py",
    "test_extract_run.py",
    "test_notebooks.py",
    "test_benchmarks.py",
    "test_gpu_benchmark.py",
    "test_pretended_cuda.py",
)
"""Files whose tests run the project's commands as a user would."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: a process that took one last would be waited for. And no test that wants a
    GPU where there is none.
    """
    import torch

    items.sort(key=lambda item: item.path.name not in (*LONG, *WAITING))
    for item in items:
        if item.path.name in WHOLE_RUNS:
            item.add_marker(pytest.mark.e2e)
        if re.search(r"kill|sigterm|signal|interrupt|broken_off|crash", item.name):
            item.add_marker(pytest.mark.crash)
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker(pytest.mark.property)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(optionalhook=True)  # xdist's
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist=loadfile` the files that look at the whole run are one file, so that one process
    makes it.
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "whole_run" if Path(file).name in LOOK_AT_THE_WHOLE_RUN else file

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two shard folders of one planted distribution: 48 examples to fit on, 24 to judge on."""
    from shards import write_planted

    root = tmp_path_factory.mktemp("planted")
    return write_planted(root, 48, seed=1), write_planted(root, 24, seed=2)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gray image of 4 x 4 patches for each example to judge on, with a dark patch of its own."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photographs")
    for number in range(24):
        pixels = np.full((TOKENS // 2, TOKENS // 2), 255, dtype=np.uint8)
        row, column = divmod(number % TOKENS, 4)
        pixels[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 0
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs: making one takes seconds."""
    import mlflow

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def new_project(
    tmp_path_factory: pytest.TempPathFactory,
    planted: tuple[Path, Path],
    photographs: Path,
    empty_database: Path,
) -> Callable[[], Path]:
    """Makes a copy of the project's configuration that points at the planted shards."""

    def make() -> Path:
        project = tmp_path_factory.mktemp("project")
        # Whoever tests may have settings there.
        shutil.copytree(ROOT / "conf", project / "conf", ignore=lambda *_: ["local"])
        (project / "conf/local").mkdir()
        for name in ("pyproject.toml", ".telemetry"):
            shutil.copy(ROOT / name, project / name)
        shutil.copy(empty_database, project / "mlflow.db")
        (project / "src").mkdir()
        fit, val = planted
        for environment in ("base", "ade20k"):
            (project / "conf" / environment / "globals.yml").write_text(
                f"shards: {{fit: {fit}, val: {val}, probe_train: {fit}, probe_val:"
                f" {val}}}\nstatistics: null\n"
            )
        parameters = project / "conf/base/parameters.yml"
        text = parameters.read_text()
        assert "layers: [0, 2, 3]" in text
        assert "n_clusters: 128" in text
        assert "  path: null\n" in text
        for old, new in {
            "layers: [0, 2, 3]": "layers: [3, 5]",
            "n_clusters: 128": "n_clusters: 8",
            "  path: null\n": f'  path: {photographs}\n  patch_size: 2\n  pattern: "*.png"\n',
        }.items():
            text = text.replace(old, new)
        parameters.write_text(text)
        return project

    return make


def start_cold(command: str, project: Path) -> subprocess.Popen[str]:
    """Start a command line as a user types it, in the project's folder."""
    return subprocess.Popen(
        command,
        shell=True,
        cwd=project,
        env=command_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command_environment() -> dict[str, str]:
    """What a user's shell has: nothing of MLflow's and Kedro's."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MLFLOW", "KEDRO", "DO_NOT", "PYTEST_CURRENT"))
    }
    return environment | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "80",
    }


@pytest.fixture(scope="session")
def start_command() -> Iterator[Callable[[str, Path], subprocess.Popen[str]]]:
    """Start a command line as a user types it, in the project's folder."""
    warm = WarmCommands(command_environment())

    def start(command: str, project: Path) -> subprocess.Popen[str]:
        return warm.start(command, project, command_environment()) or start_cold(command, project)

    yield start
    warm.close()


@pytest.fixture(scope="session")
def run_command(
    start_command: Callable[[str, Path], subprocess.Popen[str]],
) -> Callable[[str, Path], subprocess.CompletedProcess[str]]:
    """Run a command line as a user types it; gives its exit code and what it printed."""

    def run(command: str, project: Path) -> subprocess.CompletedProcess[str]:
        return ended(start_command(command, project))

    return run


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a command; gives its exit code and what it printed."""
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def whole_run(
    new_project: Callable[[], Path],
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of everything on the planted shards, in a process of its own, and what it printed. Who
    breaks something in it mends it.
    """
    project = new_project()
    return project, ended(start_cold("kedro run", project))

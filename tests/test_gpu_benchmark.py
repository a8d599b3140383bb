"""The benchmark for a GPU: it leaves where there is none, and its script is sound without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script as it is typed on a machine that has torch and nothing else."""
    forbidden = ["kedro", "mlflow", "pandas", "pydantic", "sklearn", "safetensors", "tqdm", "flash_kmeans"]
    program = f"import runpy, sys; sys.modules.update(dict.fromkeys({forbidden})); sys.argv = sys.argv[1:]; "
    program += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", program, str(ROOT / "benchmarks/gpu.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_leaves_with_a_line():
    ended = run()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "torch sees no CUDA device: there is nothing to measure\n"


def test_it_can_be_rehearsed_on_the_cpu():
    sizes = {"tokens": 600, "d": 16, "clusters": 100, "batch-size": 200, "rounds": 1}
    ended = run("--device", "cpu", *(word for name, value in sizes.items() for word in (f"--{name}", str(value))))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("flash-kmeans is left out") == 2
    assert ended.stdout.count("ours 1.0000 of a sample") == 2
    for part in ("the bfloat16 product alone", "torch.cdist", "k-means++", "the float64 product alone"):
        assert part in ended.stdout

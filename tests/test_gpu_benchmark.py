"""What a GPU is asked: it leaves where there is none, its stages are sound without one, and one
that fails costs only itself.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks/gpu"
MISSING = [
    "kedro",
    "mlflow",
    "pandas",
    "pydantic",
    "sklearn",
    "safetensors",
    "tqdm",
    "flash_kmeans",
]


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program on a machine that has torch and nothing else."""
    begin = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({MISSING})); sys.path.insert(0,"
        f" {str(FOLDER)!r}); "
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", begin + program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script as it is typed."""
    script = str(FOLDER / "run.py")
    return run(
        f"sys.argv = {[script, *arguments]!r}; runpy.run_path({script!r}, run_name='__main__')"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_leaves_with_a_line(tmp_path):
    ended = ask("--out", str(tmp_path))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("torch sees no CUDA device: there is nothing to measure")
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_leaves_lines_and_a_table(tmp_path):
    ended = ask("--rehearse", "--out", str(tmp_path), "--only", "answers", "steps")
    assert ended.returncode == 0, ended.stderr
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {each["stage"] for each in found} == {"machine", "answers", "steps"}
    assert all(each["met"] for each in found if each["stage"] == "answers")
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("A REHEARSAL, WHOSE FIGURES SAY NOTHING: torch 2.")
    assert "| nearest centers found of a sample, far center | 1 | at least 1 | yes |" in table
    assert "0 stages did not end well" in table
    assert ended.stdout.endswith(table)


STAGES = """
import subprocess, sys
from pathlib import Path
import run, table
from common import Run
here = Run(Path(sys.argv[1]), rehearsal=True)
assert {*run.TOGETHER, *run.ONE_BY_ONE} | {"to_be_killed"} == set(run.STAGES)
run.TOGETHER, run.ONE_BY_ONE = {"crashes": 30, "hangs": 1}, {"is sound": 30}
programs = {"crashes": "sys.exit(3)", "hangs": "time.sleep(60)", "is sound": "pass"}
run.start = lambda name, _: subprocess.Popen([sys.executable, "-c", "import sys, time; " + programs[name]], start_new_session=True)
here.judge("x", "a | b", 0.69, at_least=0.7)
here.judge("x", "c", 1.5, at_most=1.5)
run.run_stages(here, 50, set())
run.run_stages(here, 0, {"is sound"})
print(table.write(here.out, True))
"""


def test_a_stage_that_crashes_or_hangs_is_named_and_costs_no_other(tmp_path):
    ended = run(STAGES, str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert "- **crashes** failed: exit code 3\n- **hangs** was stopped after 1 s\n" in ended.stdout
    assert "- **is sound** was left out: there was no time\n" in ended.stdout
    assert (
        "| a / b | 0.69 | at least 0.7 | **no** |\n| c | 1.5 | at most 1.5 | yes |" in ended.stdout
    )
    assert "1 of 2 as wanted; 3 stages did not end well." in ended.stdout


def test_the_bundle_is_wheels_of_the_projects_versions_and_its_own():
    command = [sys.executable, str(FOLDER / "bundle.py"), "--to", "somewhere", "--dry-run"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    download, source, own = ended.stdout.splitlines()
    assert "--only-binary=:all: --python-version 3.12" in download
    assert " kedro==" in download
    assert " torch==" not in download
    assert " antlr4-python3-runtime==" in source
    assert own.endswith(str(ROOT))

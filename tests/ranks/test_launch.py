"""`python -m assay.ranks`: a run by ranks as a user starts it, and what its exit code says."""

import os
import signal
import subprocess
import sys
import time

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from assay.ranks import launch, process


@pytest.fixture
def launched(monkeypatch):
    """Launches with torchrun's part replaced: the exit code, and the options that it was given."""

    def run(error=None, arguments=("--nproc-per-node=2", "run", "--env=ade20k")):
        given = []

        def torchrun(options):
            given.append(options)
            if error is not None:
                raise error

        monkeypatch.setattr(launch, "run", torchrun)
        return launch.launch(arguments), given

    return run


def failed(**codes):
    failures = {
        int(name[-1]): ProcessFailure(
            local_rank=int(name[-1]), pid=1, exitcode=code, error_file="none"
        )
        for name, code in codes.items()
    }
    return ChildFailedError("assay.ranks", failures)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (SignalException("", signal.SIGTERM), 143),
        (failed(rank0=143), 143),
        (failed(rank0=1), 1),
        (failed(rank1=-9), 137),
    ],
)
def test_the_exit_code_is_what_a_queue_understands(launched, monkeypatch, capsys, error, code):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found, (options,) = launched(error)
    assert found == code
    assert (options.module, options.training_script) == (True, "assay.ranks")
    assert options.training_script_args == ["run", "--env=ade20k"]
    assert (options.standalone, options.nproc_per_node) == (True, "2")
    assert os.environ["OMP_NUM_THREADS"] == str(max(1, launch._cores() // 2))
    assert ("rank 1 was ended by SIGKILL" in capsys.readouterr().err) == (code == 137)


def test_without_a_command_it_says_how_it_is_used(launched, capsys):
    assert launched(arguments=()) == (2, [])
    assert launched(arguments=("--help",)) == (0, [])
    assert capsys.readouterr().out.count("python -m assay.ranks --nproc-per-node=N") == 2


@pytest.mark.parametrize(
    ("argv", "environment", "message"),
    [
        (["prune"], {}, "found prune, wanted run"),
        ([], {}, "found no command, wanted run"),
        (["run"], {"LOCAL_WORLD_SIZE": "1"}, "found 2 ranks on several machines"),
    ],
)
def test_a_rank_that_cannot_be_is_one_line(monkeypatch, capsys, argv, environment, message):
    monkeypatch.setattr(sys, "argv", ["ranks", *argv])
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, environment.get(name, value))
    assert process.be_rank() == 2
    said = capsys.readouterr().err
    assert said.startswith(f"Error: {message}")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("visible", "found", "wanted"), [(None, 3, "1"), ("4,6", 2, "6"), ("", 0, "")]
)
def test_each_rank_sees_one_gpu(monkeypatch, visible, found, wanted):
    monkeypatch.setattr("torch.cuda.device_count", lambda: found)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    process._take_own_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == wanted


def test_fewer_gpus_than_ranks_are_an_error(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="found 1 GPUs for 2 ranks"):
        process._take_own_gpu()


@pytest.mark.crash
@pytest.mark.e2e
def test_a_run_by_ranks_stops_and_a_plain_one_goes_on(new_project, run_command):
    project = new_project()
    options = "run --nodes=layer_5.standardize.fit,layer_5.kmeans.fit --params="
    given = "kmeans.max_iter=800,kmeans.max_no_improvement=1000000,kmeans.checkpoint_steps=40"
    ranks = subprocess.Popen(
        [sys.executable, "-m", "assay.ranks", "--nproc-per-node=2", *f"{options}{given}".split()],
        cwd=project,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not list(project.rglob("step*[48]0.safetensors")) and ranks.poll() is None:
        time.sleep(0.05)
    ranks.send_signal(signal.SIGTERM)
    said, _ = ranks.communicate(timeout=120)
    assert ranks.returncode == 143, said
    assert "Traceback" not in said
    assert said.count("Stopped. The same command goes on from here.") == 1
    assert said.count("steps to do") == 1

    found = run_command(f"kedro {options}{given}", project)
    assert found.returncode == 0, found.stderr
    assert "layer 5, kmeans: resuming after step" in found.stdout + found.stderr

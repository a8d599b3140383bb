"""Scripts, and what becomes of jobs that are preempted, queued again, too long or cancelled: on a
real Slurm, with a program in the place of `kedro` that saves itself as a fit does.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from assay.configuration import read_parameters
from assay.plan import make_plan
from assay.slurm import queue
from assay.slurm.jobs import Job, plan_jobs, render, split
from assay.slurm.options import SlurmOptions

ROOT = Path(__file__).parents[2]

# Begins, is asked to stop, saves itself; the second time it comes to its end.
FAKE = """\
#!/bin/bash
name=${2#*=}
echo "$OMP_NUM_THREADS $*" >> "ran/$name"
[ "$name" = report ] || [ $(wc -l < "ran/$name") -gt 1 ] && exit 0
trap 'exit 143' TERM
for i in $(seq 1200); do sleep 0.1; done
exit 1
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "ran").mkdir()
    (tmp_path / "kedro").write_text(FAKE)
    (tmp_path / "kedro").chmod(0o755)
    return tmp_path


def layers(first, second):
    return Job(
        "layers", "", ' --namespaces="layer_${layers[SLURM_ARRAY_TASK_ID]}"', (first, second)
    )


def queued(job, folder, *more, **options):
    script = render(job, "test", SlurmOptions(cpus_per_task=2, **options), [])
    where = [f"--chdir={folder}", f"--output={folder}/%x-%A_%a.log"]
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return queue.submit(script, [*where, *more], {"PATH": path})


def ran(folder, layer):
    path = folder / f"ran/layer_{layer}"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.e2e
def test_jobs_that_are_stopped_go_on_and_cancelled_ones_stay_away(slurm, folder):
    """All at once, since most of it is waiting; of each kind the array's last too."""
    late = queued(layers(8, 9), folder, partition="urgent", time=1, signal_seconds=59)
    graceful = queued(layers(0, 1), folder, partition="main")
    graceless = queued(layers(2, 3), folder, partition="graceless")
    report = Job("report", "", " --nodes=report")
    report = queued(report, folder, f"--dependency=afterok:{graceful}:{graceless}")
    slurm.wait_for(lambda: all(ran(folder, layer) for layer in (0, 1, 2, 3, 8, 9)))
    # The node is full: these are given the room of those that can be preempted.
    again = queued(layers(4, 5), folder, partition="urgent")
    away = queued(layers(6, 7), folder, partition="urgent")
    slurm.wait_for(lambda: all(ran(folder, layer) for layer in (4, 5, 6, 7)))
    assert queue.find([report])[0].state == "PENDING"
    for index in (0, 1):
        slurm.ask("scontrol", "requeue", f"{again}_{index}")
    queue.cancel([away])
    slurm.wait_for(lambda: not slurm.jobs())
    ended = {
        each.id: each
        for each in queue.find([late, graceful, graceless, again, away, report], ended=True)
    }
    states = {number: (each.state, each.restarts) for number, each in ended.items()}
    stopped = [
        f"{array}_{index}" for array in (late, graceful, graceless, again) for index in (0, 1)
    ]
    assert states == {
        **dict.fromkeys(stopped, ("COMPLETED", 1)),
        **dict.fromkeys((f"{away}_0", f"{away}_1"), ("CANCELLED", 0)),
        report: ("COMPLETED", 0),
    }
    assert all(len(ran(folder, layer)) == 2 for layer in (0, 1, 2, 3, 4, 5, 8, 9))
    assert ran(folder, 1)[0] == "2 run --namespaces=layer_1"  # with as many threads as CPUs
    assert [len(ran(folder, layer)) for layer in (6, 7)] == [1, 1]


def planned(environment=None, **more):
    parameters = read_parameters(ROOT, environment, more or None)
    return plan_jobs(make_plan(parameters))


def test_the_scripts_to_submit_by_hand_are_those_that_are_submitted():
    """`kedro slurm submit --dry-run` prints them: to write them anew, split that."""
    jobs = planned()
    folder = ROOT / "scripts"
    assert {path.name for path in folder.iterdir()} == {f"slurm_{job.step}.sh" for job in jobs}
    for job in jobs:
        found = (folder / f"slurm_{job.step}.sh").read_text()
        assert found == render(job, "assay", SlurmOptions(), [])


@pytest.mark.parametrize(
    ("environment", "more", "steps"),
    [
        (None, {}, [("digits", None), ("layers", "digits"), ("report", "layers")]),
        ("ade20k", {}, [("layers", None), ("report", "layers")]),
        (
            "images",
            {"extract": {"model": "m", "fit": {"images": "i"}}},
            [("extract", None), ("layers", "extract"), ("report", "layers")],
        ),
    ],
)
def test_what_layers_need_is_made_before_them_and_the_report_after(environment, more, steps):
    if more:  # which splits are recorded, and none of digits
        images = {"images": "i", "masks": "m"}
        more["extract"] |= {"val": {"images": "i"}, "probe_train": images, "probe_val": images}
    jobs = planned(environment, **more)
    assert [(job.step, job.after) for job in jobs] == steps


def test_arrays_are_split_where_slurm_has_none_so_long():
    job = Job("layers", "", layers=(0, 2, 3, 5, 7))
    assert [each.layers for each in split(job, 2)] == [(0, 2), (3, 5), (7,)]
    assert split(job, 5) == [job]
    assert split(Job("report", ""), 1) == [Job("report", "")]


EVERYTHING = {
    "partition": "main",
    "account": "vision",
    "time": "1-12:00:00",
    "cpus_per_task": 3,
    "gpus": "h100:2",
    "mem": "64G",
    "parallel": 2,
    "ranks": 2,
    "signal_seconds": 300,
    "setup": ["module load python", "source .venv/bin/activate"],
    "extra": {"qos": "low", "exclusive": None, "nice": 10},
}


def test_what_slurm_yml_asks_for_is_in_the_scripts():
    layers, report = (
        render(job, "x", SlurmOptions.model_validate(EVERYTHING), ["--env=ade20k"])
        for job in planned("ade20k")
    )
    asked = set(re.findall("^#SBATCH --(.*)$", layers, re.MULTILINE))
    assert asked == {
        "job-name=x-layers",
        "array=0-5%2",
        "requeue",
        "open-mode=append",
        "kill-on-invalid-dep=yes",
        "signal=TERM@300",
        "partition=main",
        "account=vision",
        "time=1-12:00:00",
        "cpus-per-task=3",
        "mem=64G",
        "gpus=h100:2",
        "qos=low",
        "exclusive",
        "nice=10",
    }
    assert "\nmodule load python\nsource .venv/bin/activate\n" in layers
    assert "\nexport OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / 2))\n" in layers
    ranks = "python -m assay.ranks --nproc-per-node=2 --shutdown-timeout=300"
    assert f' {ranks} run --env=ade20k --namespaces="layer_' in layers
    # The report is one process, and has no use for a GPU.
    assert "--gpus" not in report and " kedro run --env=ade20k #" in report
    assert "\nexport OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK\n" in report


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize("environment", [None, "ade20k"])
def test_slurm_takes_the_scripts(environment):
    # The arrays of this Slurm have two elements, and its node 12 CPUs and no GPU.
    options = SlurmOptions.model_validate(
        EVERYTHING | {"gpus": None, "mem": None, "account": None, "extra": {"nice": 10}}
    )
    for script in (
        render(each, "x", options, ["--params=layers:[0,1],class_names:it's here"])
        for job in planned(environment)
        for each in split(job, 2)
    ):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        said = subprocess.run(
            ["sbatch", "--test-only"], input=script, text=True, capture_output=True, check=False
        )
        assert said.returncode == 0, said.stderr
        assert "to start at" in said.stderr


def test_where_there_is_no_slurm_that_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"no `squeue` here.*docs/slurm\.md"):
        queue.find(["1"])


@pytest.mark.usefixtures("slurm")
def test_a_job_that_slurm_refuses_is_told_in_its_words():
    with pytest.raises(ValueError, match="sbatch: error: invalid partition specified: nowhere"):
        queue.submit(render(Job("report", ""), "x", SlurmOptions(partition="nowhere"), []), [], {})
    assert queue.find(["4711"]) == []
    assert queue.max_array_size() == 2


def test_a_job_has_nothing_of_the_job_that_it_was_submitted_in(slurm, tmp_path, monkeypatch):
    for name, value in {"SLURM_NTASKS": "7", "SLURM_MEM_PER_CPU": "99", "MINE": "yes"}.items():
        monkeypatch.setenv(name, value)
    script = "#!/bin/bash\necho $MINE $SLURM_NTASKS $SLURM_MEM_PER_CPU $PATH\n"
    queue.submit(script, [f"--output={tmp_path}/out"], {"MLFLOW_RUN_ID": "0"})
    slurm.wait_for(lambda: not slurm.jobs())
    assert (tmp_path / "out").read_text().startswith(f"yes {Path(sys.executable).parent}:")

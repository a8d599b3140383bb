"""Everything that can happen to an array, with real fits on a real Slurm: `python
tests/slurm/scenario.py [KILLS [ONLY]]`. Takes minutes; the tests beside it have the short of it.

Preempted with 20 s of grace and with none, queued again by hand, past its time limit, cancelled,
and killed (SIGKILL) at KILLS moments; ONLY is a part of what one of them is called. After each the
table must be that of a plain `kedro run`, and every child in MLflow FINISHED, once.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/helpers"))

from slurm_cluster import Cluster  # noqa: E402

PARAMS = (
    "layers:[0,2],kmeans.n_clusters:64,kmeans.batch_size:128,kmeans.max_iter:8,"
    "kmeans.max_no_improvement:null,kmeans.encodings:[kmeans-onehot],pca.topk:[4,16]"
)
CHILDREN = 2 * 3
TABLE = "data/08_reporting/baselines.csv"


def say(line: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


def make_project(folder: Path) -> Path:
    shutil.copytree(ROOT / "conf", folder / "conf", ignore=lambda *_: ["local"])
    (folder / "conf/local").mkdir()
    (folder / "src").mkdir()
    for name in ("pyproject.toml", ".telemetry"):
        shutil.copy(ROOT / name, folder / name)
    return folder


class Project:
    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster

    def kedro(self, arguments: str, code: int = 0) -> str:
        ended = subprocess.run(
            f"kedro {arguments}",
            shell=True,
            cwd=self.folder,
            env={**os.environ, **self.cluster.variables, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended.stdout + ended.stderr

    def submit(self, partition: str = "main") -> str:
        conf = self.folder / "conf/base/slurm.yml"
        conf.write_text(f"cpus_per_task: 1\npartition: {partition}\n")
        said = self.kedro(f"slurm submit --params={PARAMS}")
        return next(line.split()[0] for line in said.splitlines() if "-layers" in line)

    def wait_for_fit(self, array: str, index: int) -> None:
        """Until an element is in the middle of k-means."""
        layer = (0, 2)[index]
        begun = self.folder / f"data/06_models/.checkpoints/layer_{layer}/kmeans"
        self.cluster.wait_for(lambda: self.cluster.jobs().get(f"{array}_{index}") == "RUNNING", 180)
        self.cluster.wait_for(lambda: list(begun.rglob("*.safetensors")) or self.fitted(layer), 180)
        time.sleep(1)

    def fitted(self, layer: int) -> bool:
        return any(
            (self.folder / f"data/.fingerprints/layer_{layer}.kmeans_history").glob("*.json")
        )

    def end(self) -> None:
        self.cluster.wait_for(lambda: not self.cluster.jobs(), 600)

    def check(self, table: bytes) -> None:
        assert (self.folder / TABLE).read_bytes() == table, "another table"
        with sqlite3.connect(self.folder / "mlflow.db") as database:
            runs = database.execute(
                "select name, status from runs where run_uuid in (select run_uuid from tags where"
                " key = 'mlflow.parentRunId')"
            ).fetchall()
            parents = database.execute(
                "select name, status from runs where run_uuid not in (select run_uuid from tags"
                " where key = 'mlflow.parentRunId')"
            ).fetchall()
        assert len(runs) == CHILDREN and {status for _, status in runs} == {"FINISHED"}, runs
        assert not [name for name, times in Counter(name for name, _ in runs).items() if times > 1]
        assert parents == [("assay", "FINISHED")], parents

    def logs(self) -> str:
        return "".join(
            f"==> {path.name}\n{path.read_text()}"
            for path in sorted((self.folder / "data/slurm/assay").glob("*.log"))
        )


def python_processes(folder: Path) -> list[int]:
    """The `kedro run` of a project's jobs."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (each / "cmdline").read_bytes().split(b"\0")
            if (
                len(command) > 2
                and command[1].endswith(b"kedro")
                and command[2] == b"run"
                and Path(os.readlink(each / "cwd")) == folder
            ):
                found.append(int(each.name))
    return found


def main(kills: int, only: str) -> None:
    top = Path(tempfile.mkdtemp(prefix="assay-slurm-"))
    with Cluster() as cluster:
        plain = Project(make_project(top / "plain"), cluster)
        plain.kedro("run --pipelines=digits")
        say("the digits are there")
        count = iter(range(1000))

        def new() -> Project:
            folder = top / f"project{next(count)}"
            shutil.copytree(digits, folder)
            return Project(folder, cluster)

        digits = top / "digits"
        shutil.copytree(plain.folder, digits)
        for path in digits.glob("mlflow.db*"):
            path.unlink()
        plain.kedro(f"run --params={PARAMS}")
        table = (plain.folder / TABLE).read_bytes()
        say("a plain run")

        for name, scenario in {
            "preempted, 20 s of grace": preempted("main"),
            "preempted, no grace": preempted("graceless"),
            "scontrol requeue": requeued,
            "past its time limit": late,
            "cancelled": cancelled,
        }.items():
            if only not in name:
                continue
            began = time.time()
            project = new()
            try:
                scenario(project)
                project.check(table)
            except BaseException:
                say(project.logs())
                raise
            say(f"{name}: {time.time() - began:.0f} s")
        killed(new(), table, kills)
    shutil.rmtree(top)


def preempted(partition: str):
    def scenario(project: Project) -> None:
        array = project.submit(partition)
        project.wait_for_fit(array, 1)  # the array's last
        urgent = project.cluster.ask(
            "sbatch", "--parsable", "--partition=urgent", "--cpus-per-task=4", "--output=/dev/null",
            "--wrap=sleep 3",
        )  # fmt: skip
        cluster = project.cluster
        cluster.wait_for(lambda: cluster.show(urgent)["JobState"] == "COMPLETED")
        project.end()
        shown = [cluster.show(f"{array}_{index}") for index in range(2)]
        say(str([(each["JobState"], each["Restarts"], each["ExitCode"]) for each in shown]))
        assert {each["JobState"] for each in shown} == {"COMPLETED"}
        assert all(int(each["Restarts"]) >= 1 for each in shown[1:])

    return scenario


def requeued(project: Project) -> None:
    array = project.submit()
    for index in (1, 0):
        project.wait_for_fit(array, index)
        project.cluster.ask("scontrol", "requeue", f"{array}_{index}")
    project.end()
    shown = [project.cluster.show(f"{array}_{index}") for index in (0, 1)]
    say(str([(each["JobState"], each["Restarts"]) for each in shown]))
    assert [each["Restarts"] for each in shown] == ["1", "1"]


def late(project: Project) -> None:
    array = project.submit()
    project.wait_for_fit(array, 1)
    project.cluster.ask("scontrol", "update", f"JobId={array}_1", "TimeLimit=1")
    project.end()
    shown = project.cluster.show(f"{array}_1")
    say(str((shown["JobState"], shown["Restarts"])))
    assert int(shown["Restarts"]) >= 1


def cancelled(project: Project) -> None:
    array = project.submit()
    project.wait_for_fit(array, 1)
    say(project.kedro("slurm cancel assay").strip())
    assert not project.cluster.jobs()
    time.sleep(15)
    assert not project.cluster.jobs()
    with sqlite3.connect(project.folder / "mlflow.db") as database:
        assert "FINISHED" not in {row[0] for row in database.execute("select status from runs")}
    project.submit()
    project.end()


def killed(project: Project, table: bytes, times: int) -> None:
    """Kill everything that runs in the array, at moments by chance, and submit again."""
    chance = random.Random(0)
    hits = 0
    while hits < times:
        array = project.submit()
        element = f"{array}_{chance.randrange(2)}"
        while project.cluster.jobs().get(element) == "PENDING":
            time.sleep(0.2)
        time.sleep(chance.uniform(0, 25))
        pids = python_processes(project.folder)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        hits += bool(pids)
        project.end()
        say(f"kill {hits}: {len(pids)} processes")
        if not pids:  # it came to the end: from the beginning
            project.check(table)
            say("whole in between")
            shutil.rmtree(project.folder / "data/06_models")
            shutil.rmtree(project.folder / "data/07_model_output")
    project.submit()
    project.end()
    project.check(table)
    say(f"killed {hits} times")


if __name__ == "__main__":
    main(int([*sys.argv, "3"][1]), "".join(sys.argv[2:]))

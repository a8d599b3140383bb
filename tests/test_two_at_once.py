"""Real runs of different parameters at the same time in one project: each has the table that it
would have alone.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

Run = Callable[[str, Path], subprocess.CompletedProcess[str]]
Start = Callable[[str, Path], subprocess.Popen[str]]

SMALL = (
    "kedro run"
    " --params=layers:[5],pca.topk:[4],kmeans.encodings:[kmeans-onehot],kmeans.max_iter:3,kmeans.seed:"
)
SEEDS = (1, 2, 3, 4, 5, 6, 7, 8)


def tables(project: Path) -> dict[int, pd.DataFrame]:
    """Every table that a run in a project left, by its seed; all of one seed are the same, or this
    fails.
    """
    found: dict[int, pd.DataFrame] = {}
    for path in sorted(
        (project / "data/08_reporting/.versions/baselines.csv").glob("*/baselines.csv")
    ):
        table = pd.read_csv(path)
        (seed,) = table["seed"].dropna().unique()
        pd.testing.assert_frame_equal(found.setdefault(int(seed), table), table, check_exact=True)
    return found


def shown(project: Path) -> int:
    """The seed of the table that lies where people look for it; the page beside it is of the same
    run.
    """
    reporting = project / "data/08_reporting"
    text = (reporting / "baselines.csv").read_text()
    (version,) = (
        path
        for path in (reporting / ".versions/baselines.csv").glob("*/baselines.csv")
        if path.read_text() == text
    )
    run = version.parent.name.rpartition(".")[0]
    (page,) = (reporting / ".versions/report.html").glob(f"{run}.*/report.html")
    assert (reporting / "report.html").read_bytes() == page.read_bytes()
    (seed,) = pd.read_csv(reporting / "baselines.csv")["seed"].dropna().unique()
    return int(seed)


@pytest.fixture(scope="module")
def alone(new_project: Callable[[], Path], run_command: Run) -> dict[int, pd.DataFrame]:
    """What runs one after the other give: the rows of each seed, all of one run, which fits them
    one by one.
    """
    project = new_project()
    more = ",".join(map(str, SEEDS[1:]))
    ended = run_command(f"{SMALL}{SEEDS[0]},kmeans.more_seeds:[{more}]", project)
    assert ended.returncode == 0, ended.stderr
    table = pd.read_csv(project / "data/08_reporting/baselines.csv")
    of = {
        seed: table[table["seed"].isna() | (table["seed"] == seed)].reset_index(drop=True)
        for seed in SEEDS
    }
    assert len({frame["nmse"].sum() for frame in of.values()}) == len(SEEDS), (
        "the seeds differ, or this tests nothing"
    )
    return of


def assert_as_alone(project: Path, alone: dict[int, pd.DataFrame], seeds: tuple[int, ...]) -> None:
    found = tables(project)
    assert found.keys() == set(seeds)
    for seed in seeds:
        pd.testing.assert_frame_equal(found[seed], alone[seed], check_exact=True)


def made_by(project: Path) -> dict[int, list[str]]:
    """The nodes that each seed's runs ran, by their manifests."""
    made: dict[int, list[str]] = {}
    for path in sorted((project / "data/08_reporting/manifests").iterdir()):
        manifest = json.loads(path.read_text())
        made.setdefault(manifest["parameters"]["kmeans"]["seed"], []).extend(manifest["seconds"])
    return made


def test_pairs_of_runs_with_different_seeds(
    new_project: Callable[[], Path],
    run_command: Run,
    start_command: Start,
    alone: dict[int, pd.DataFrame],
) -> None:
    """Started 0, 1 and 3 s apart, and one that stands still (SIGSTOP) in the middle while the other
    runs to its end.
    """
    project, wanted = new_project(), alone
    for delay, seeds in ((0, (1, 2)), (1, (3, 4)), (3, (5, 6))):
        # The page once: it takes a while.
        part = "" if delay == 0 else " --to-nodes=report.tabulate"
        first = start_command(f"{SMALL}{seeds[0]}{part}", project)
        time.sleep(delay)
        second = start_command(f"{SMALL}{seeds[1]}{part}", project)
        for process in (first, second):
            _, err = process.communicate(timeout=240)
            assert process.returncode == 0, err
            assert "did not match" not in err
    assert_as_alone(project, wanted, (1, 2, 3, 4, 5, 6))
    made = Counter(name for names in made_by(project).values() for name in names)
    assert {made[name] for name in made if re.search(r"standardize|pca\.|pca-topk", name)} == {1}, (
        "the same work, twice"
    )
    assert {made[name] for name in made if "kmeans" in name or name == "report.tabulate"} == {6}
    for seed in (1, 2):
        ended = run_command(f"{SMALL}{seed}", project)
        assert "Nothing to do" in ended.stdout, ended.stdout + ended.stderr
        assert shown(project) == seed
    # What is not by seed is there, so that nobody waits.
    stopped = start_command(f"exec {SMALL}7", project)
    while not list(
        (project / "data/06_models/layer_5/kmeans.safetensors").glob("*/kmeans.safetensors")
    )[6:]:
        assert stopped.poll() is None
        time.sleep(0.01)
    stopped.send_signal(signal.SIGSTOP)
    ended = run_command(f"{SMALL}8", project)
    assert ended.returncode == 0, ended.stderr
    assert shown(project) == 8
    stopped.send_signal(signal.SIGCONT)
    _, err = stopped.communicate(timeout=240)
    assert stopped.returncode == 0, err
    assert shown(project) == 7
    assert_as_alone(project, wanted, SEEDS)

"""MLflow's database as a file: made once, whole, by one of many; and where the files of its runs
lie.
"""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from assay.tracking import database
from assay.tracking.database import file_of, prepare_file, settle


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """A database that was half made was left so long ago."""
    monkeypatch.setattr(database, "SETTLED", 0.3)


@pytest.fixture
def made(monkeypatch, empty_database):
    """Who made a database: threads, by copying one, since MLflow takes seconds."""
    makers = []

    def make(path):
        makers.append(threading.current_thread().name)
        partial = path.with_name("partial")
        time.sleep(0.2)
        shutil.copy(empty_database, partial)
        database._remove(path)
        partial.replace(path)

    monkeypatch.setattr(database, "_make", make)
    return makers


def execute(path, *statements):
    with closing(sqlite3.connect(path)) as connection, connection:
        return [connection.execute(each).fetchall() for each in statements]


def test_mlflows_tables_are_made_aside_and_appear_whole(tmp_path, monkeypatch):
    path = tmp_path / "a #1 %41?" / "mlflow.db"
    path.parent.mkdir()
    monkeypatch.chdir(path.parent)
    appeared = []
    rename = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (appeared.append(path.exists()), rename(self, to))
    )
    prepare_file(path)
    assert appeared == [False]
    assert execute(path, "SELECT name FROM experiments") == [[("Default",)]]
    assert not [each.name for each in path.parent.iterdir() if "partial" in each.name]


def test_of_many_that_start_on_nothing_one_makes_the_database(tmp_path, made):
    path = tmp_path / "mlflow.db"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(prepare_file, [path] * 8))
    assert len(made) == 1


@pytest.mark.parametrize("revision", [None, "451aebb31d03"])
def test_what_was_left_half_made_is_made_again_with_nothing_of_the_old_taken_up(
    tmp_path, made, revision
):
    path = tmp_path / "mlflow.db"
    execute(
        path, "CREATE TABLE runs (run_uuid TEXT)", "CREATE TABLE _alembic_tmp_metrics (step INT)"
    )
    if revision:
        execute(
            path,
            "CREATE TABLE alembic_version (version_num TEXT)",
            f"INSERT INTO alembic_version VALUES ('{revision}')",
        )
    path.with_name("mlflow.db-journal").write_bytes(b"")
    time.sleep(0.4)
    prepare_file(path)
    assert len(made) == 1
    assert not path.with_name("mlflow.db-journal").exists()
    assert execute(path, "SELECT name FROM experiments") == [[("Default",)]]


def test_a_database_that_another_program_is_just_making_is_left_to_it(
    tmp_path, made, empty_database
):
    path = tmp_path / "mlflow.db"
    execute(path, "CREATE TABLE runs (run_uuid TEXT)")

    def finish():
        time.sleep(0.15)
        shutil.copy(empty_database, path)

    other = threading.Thread(target=finish)
    other.start()
    prepare_file(path)
    other.join()
    assert made == []


def test_runs_behind_other_tables_are_never_removed_and_the_way_out_is_said(tmp_path, made):
    path = tmp_path / "mlflow.db"
    execute(path, "CREATE TABLE runs (run_uuid TEXT)", "INSERT INTO runs VALUES ('a')")
    time.sleep(0.4)
    with pytest.raises(ValueError, match="holds runs") as raised:
        prepare_file(path)
    assert len(str(raised.value).splitlines()) == 2
    assert f"mlflow db upgrade sqlite:///{path}" in str(raised.value)
    assert "mv mlflow.db mlflow.db.old" in str(raised.value)
    assert execute(path, "SELECT * FROM runs") == [[("a",)]]
    assert made == []


def test_what_is_no_database_is_named_and_left(tmp_path, made):
    path = tmp_path / "mlflow.db"
    path.write_text("a" * 5000)
    with pytest.raises(ValueError, match=r"mlflow\.db is no database.*\n.*mv mlflow\.db"):
        prepare_file(path)
    assert path.read_text() == "a" * 5000
    assert made == []


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite:////a/b%41 c#d/mlflow.db", "/a/b%41 c#d/mlflow.db"),
        ("sqlite:////a/mlflow.db?timeout=3", "/a/mlflow.db"),
        ("sqlite:///:memory:", None),
        ("sqlite://", None),
        ("http://localhost:5000", None),
        ("postgresql://a/b", None),
        ("", None),
    ],
)
def test_which_uris_are_files(uri, path):
    assert file_of(uri) == (Path(path) if path else None)


def add_runs(path, location, *runs):
    """An experiment with its number behind its location, and runs in it."""
    number = location.rpartition("/")[2]
    execute(
        path,
        "INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage,"
        f" workspace) VALUES ({number}, 'n{number}', '{location}', 'active', 'default')",
        *(
            f"INSERT INTO runs (run_uuid, experiment_id, artifact_uri) VALUES ('{run}', {number},"
            f" '{location}/{run}/artifacts')"
            for run in runs
        ),
    )


def locations(path):
    experiments, runs = execute(
        path,
        "SELECT experiment_id, artifact_location FROM experiments WHERE experiment_id > 0",
        "SELECT run_uuid, artifact_uri FROM runs",
    )
    return dict(experiments), dict(runs)


def test_the_files_of_a_project_that_was_moved_are_sought_and_written_where_it_is_now(
    tmp_path, empty_database
):
    old, new = tmp_path / "old", tmp_path / "a %41 #?b"
    (new / "mlruns/1/moved/artifacts").mkdir(parents=True)
    (old / "mlruns/1/left/artifacts").mkdir(parents=True)
    path = new / "mlflow.db"
    shutil.copy(empty_database, path)
    add_runs(path, f"{old}/mlruns/1", "moved", "left", "bare")
    add_runs(path, "/elsewhere/2", "other")
    add_runs(path, "s3://bucket/mlruns/3")
    add_runs(path, f"{(old / 'mlruns').as_uri()}/4", "quoted")
    settle(path, new / "mlruns")
    here = (new / "mlruns").as_uri()
    assert locations(path) == (
        {1: f"{here}/1", 2: "/elsewhere/2", 3: "s3://bucket/mlruns/3", 4: f"{here}/4"},
        {
            "moved": f"{here}/1/moved/artifacts",
            "left": f"{old}/mlruns/1/left/artifacts",
            "bare": f"{here}/1/bare/artifacts",
            "other": "/elsewhere/2/other/artifacts",
            "quoted": f"{here}/4/quoted/artifacts",
        },
    )
    before = path.stat().st_mtime_ns
    settle(path, new / "mlruns")
    assert path.stat().st_mtime_ns == before

"""MLflow's database: of many processes that begin on nothing one makes its tables. Where it is a
file, it appears whole or not at all, and what it says of the project's folder is kept true.
"""

from __future__ import annotations

import fcntl
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import mlflow
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from mlflow.exceptions import MlflowException
from sqlalchemy import Engine, NullPool, create_engine, event, text
from sqlalchemy.exc import SQLAlchemyError

SCHEME = "sqlite:///"
LOCKED = 20.0
"""Seconds that a statement waits for a database that another process has locked, as MLflow has it.
"""

SETTLED = 5.0
"""Seconds without a change after which nobody else, `mlflow ui` say, is still making a database."""

MAKING = 120.0
"""Seconds that a process waits for another one that makes the tables on a server."""

LOCK = int.from_bytes(b"assay.db")
"""The key of PostgreSQL's advisory lock under which they are made."""


def shown(text: str) -> str:
    """A text as it may be printed: without the passwords of the URIs in it."""
    text = re.sub(r"(://[^/\s:@]*):\S*@", r"\1:***@", text)
    return re.sub(r"(\bpassword=)[^&\s]+", r"\1***", text)


def file_of(uri: str) -> Path | None:
    """The file of a database's URI; None: it is none."""
    path = uri.removeprefix(SCHEME).partition("?")[0]
    return Path(path).absolute() if uri.startswith(SCHEME) and path and path != ":memory:" else None


def prepare(uri: str, heard: Callable[[], None] = lambda: None) -> None:
    """Have MLflow's tables in the database that a URI names, a file or one of a PostgreSQL server:
    one process makes them, others wait for it. A tracking server (http) sees to its own.

    Args:
        uri: as in MLFLOW_TRACKING_URI.
        heard: called now and then while another process makes them.

    Raises:
        ValueError: it is no database, or one with runs and other tables than this version of MLflow
            wants; or what speaks to the server is not installed.
        OSError, sqlite3.Error, SQLAlchemyError, MlflowException: the database cannot be reached or
            written to.
    """
    path = file_of(uri)
    if path is not None:
        prepare_file(path)
    elif uri.startswith("postgresql"):
        _prepare_server(uri, heard)


def _prepare_server(uri: str, heard: Callable[[], None]) -> None:
    """As `prepare`, under a lock of the server's that ends with this process.

    MLflow makes all but its first tables in one transaction, and goes on with what a killed process
    left. It takes no lock itself: eight that begin at once fail, but for one.
    """
    try:
        engine = create_engine(uri, poolclass=NullPool)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"found no {error.name}, through which MLflow speaks to PostgreSQL, wanted it: `pip"
            " install 'assay-baselines[postgresql]'`"
        ) from error
    with engine.connect() as connection:
        if MigrationContext.configure(connection).get_current_revision() is not None:
            return  # should it be another version's, MLflow says what to do
    with engine.begin() as connection:
        until = time.monotonic() + MAKING
        lock = text("SELECT pg_try_advisory_xact_lock(:key)")
        while not connection.scalar(lock, {"key": LOCK}):
            if time.monotonic() > until:
                raise TimeoutError(
                    f"another process has been making MLflow's tables for {MAKING:.0f} s; wanted"
                    " them whole: see `SELECT * FROM pg_locks WHERE locktype = 'advisory'`"
                )
            heard()
            time.sleep(0.1)
        for _ in range(2):
            # An `mlflow server` that begins at the same time takes no lock.
            with suppress(SQLAlchemyError, MlflowException):
                _open_store(uri)
                return
        _open_store(uri)


def _open_store(uri: str) -> Any:
    """MLflow's store; it makes what tables are missing."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # takes a second

    return SqlAlchemyStore(uri, os.environ.get("_MLFLOW_SERVER_ARTIFACT_ROOT", "./mlruns"))  # type: ignore[no-untyped-call]


def prepare_file(path: Path) -> None:
    """Have MLflow's tables in a file. One process makes them, in another file that is renamed when
    it is whole; others wait for it.

    What an earlier process left half made is made again where it holds no runs.

    Raises:
        ValueError: it is no database, or one with runs and other tables than this version of MLflow
            wants.
    """
    newest = ScriptDirectory(
        str(Path(mlflow.__file__).parent / "store" / "db_migrations")
    ).get_current_head()
    if _revision(path) == newest:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        while (revision := _revision(path)) != newest and time.time() - _changed(path) < SETTLED:
            time.sleep(0.1)
        if revision == newest:
            return
        if _has_runs(path):
            raise ValueError(
                f"{path} holds runs, but its tables are those of another version of MLflow or were"
                f" left half made (found {revision}, wanted {newest}).\nCopy it, then try `mlflow"
                f" db upgrade {SCHEME}{path}`; if that fails, begin a new one: `mv {path.name}"
                f" {path.name}.old`."
            )
        _make(path)


def settle(path: Path, artifacts: Path) -> None:
    """Have the runs' files in the folder `artifacts` beside the database, which may have been moved
    or copied with it since.

    MLflow notes for each experiment and run where its files lie, absolutely. An experiment that has
    them in a folder of this name and its own number, as MLflow chooses it, has them here from now
    on; so have its runs, but for those whose files were left where they are.
    """
    with closing(sqlite3.connect(path, timeout=5)) as database, database:
        for number, noted in database.execute(
            "SELECT experiment_id, artifact_location FROM experiments"
        ).fetchall():
            wanted = f"{artifacts.as_uri()}/{number}"
            found = _folder_of(noted or "")
            if (
                noted == wanted
                or found is None
                or found.parts[-2:] != (artifacts.name, str(number))
            ):
                continue
            database.execute(
                "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?",
                (wanted, number),
            )
            runs = database.execute(
                "SELECT run_uuid, artifact_uri FROM runs WHERE experiment_id = ?", (number,)
            )
            for run, uri in runs.fetchall():
                rest = (uri or "").removeprefix(f"{noted}/")
                left = not (artifacts / str(number) / rest).exists() and (found / rest).exists()
                if rest != uri and not left:
                    database.execute(
                        "UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?",
                        (f"{wanted}/{rest}", run),
                    )


def _folder_of(location: str) -> Path | None:
    """The folder of an artifact location as MLflow means it, a path or a file's URI; None where it
    is elsewhere.
    """
    if location.startswith("file:"):
        location = urlsplit(location).path
    return Path(unquote(location)) if location.startswith("/") else None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes out; the kernel lets them in when this one dies."""
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    _remove(partial)
    uri = (  # which cannot hold a question mark: one above the project is not in it
        f"{SCHEME}{os.path.relpath(partial)}"
    )
    store = _open_store(uri)
    store.engine.dispose()
    _remove(path)
    partial.replace(path)


def _remove(path: Path) -> None:
    """Remove a database, first what SQLite would take up again in one that takes its place."""
    for suffix in ("-journal", "-wal", "-shm", ""):
        path.with_name(f"{path.name}{suffix}").unlink(missing_ok=True)


def _revision(path: Path) -> str | None:
    """Which version of MLflow's tables a file holds whole; None where there are none."""
    if "alembic_version" not in _tables(path):
        return None
    found = _ask(path, "SELECT version_num FROM alembic_version")
    return str(found[0][0]) if found else None


def _has_runs(path: Path) -> bool:
    return "runs" in _tables(path) and bool(_ask(path, "SELECT 1 FROM runs LIMIT 1"))


def _tables(path: Path) -> set[str]:
    return {name for (name,) in _ask(path, "SELECT name FROM sqlite_master WHERE type = 'table'")}


def _ask(path: Path, question: str) -> list[tuple[str]]:
    if not path.exists():
        return []
    try:
        with closing(
            sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=5)
        ) as database:
            return database.execute(question).fetchall()
    except sqlite3.OperationalError:  # locked, say
        raise
    except sqlite3.DatabaseError as error:
        raise ValueError(
            f"{path} is no database that SQLite can read ({error}).\nBegin a new one: `mv"
            f" {path.name} {path.name}.old`."
        ) from error


def _changed(path: Path) -> float:
    """When a database was last written to, in seconds since the epoch; 0 where there is none."""
    beside = [path, path.with_name(f"{path.name}-journal")]
    return max((each.stat().st_mtime for each in beside if each.exists()), default=0.0)


def _patiently(ask: Callable[..., Any], *arguments: Any) -> Any:
    """Ask a locked database again and again from here: a thread that SQLite has waiting cannot be
    left behind when a process ends.
    """
    until, pause = time.monotonic() + LOCKED, 0.01
    while True:
        try:
            return ask(*arguments)
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 0.25)


class _Cursor(sqlite3.Cursor):
    def execute(self, statement: str, *parameters: Any) -> Any:
        if not statement.startswith("PRAGMA busy_timeout"):  # which MLflow sets to 20 s
            return _patiently(super().execute, statement, *parameters)
        return self

    def executemany(self, statement: str, parameters: Any) -> Any:
        return _patiently(super().executemany, statement, parameters)


class _Connection(sqlite3.Connection):
    def cursor(self, factory: Any = _Cursor) -> Any:
        return super().cursor(factory)

    def commit(self) -> None:
        _patiently(super().commit)


@event.listens_for(Engine, "do_connect")
def _connect_patiently(dialect: Any, record: Any, arguments: Any, options: dict[str, Any]) -> None:
    del record, arguments
    if dialect.name == "sqlite":
        options |= {"factory": _Connection, "timeout": 0.1}

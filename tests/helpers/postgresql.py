"""A PostgreSQL server of the tests' own, and MLflow's tracking server before it."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PASSWORD = "Tr0ub4dor"
"""Of the server's one user, so that what is printed can be searched for it."""

QUIET = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""What the project's settings have processes that speak to MLflow read."""


def find_programs() -> Path | None:
    """Where initdb and pg_ctl lie, of the newest version; None where they cannot be run."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    named = shutil.which("initdb")
    program = found[-1] if found else Path(named) if named else None
    if program is None or (os.geteuid() == 0 and _other_user() is None):
        return None
    return program.parent


class PostgreSQL:
    """A server in a folder of its own, on a port of this machine.

    Args:
        programs: where initdb and pg_ctl lie.
    """

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._user = _other_user() if os.geteuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="assay-postgresql-"))
        self.port = free_port()
        secret = self._folder / "password"
        secret.write_text(PASSWORD)
        if self._user is not None:
            for path in (self._folder, secret):
                shutil.chown(path, self._user)
        self._run("initdb", "-U", "assay", "-A", "scram-sha-256", f"--pwfile={secret}", "--no-sync")
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-p {self.port} -h 127.0.0.1 -k {self._folder} -F"
        log = str(self._folder / "log")
        self._run("pg_ctl", "start", "-w", "-l", log, "-o", options)

    def stop(self) -> None:
        """End it as a restart does: what is connected is cut off."""
        self._run("pg_ctl", "stop", "-w", "-m", "fast")

    def new_database(self, name: str) -> str:
        """Make an empty database; gives its URI."""
        import sqlalchemy

        engine = sqlalchemy.create_engine(self._uri("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return self._uri(name)

    def remove(self) -> None:
        """End it and remove its folder."""
        with suppress(subprocess.CalledProcessError):
            self._run("pg_ctl", "stop", "-w", "-m", "immediate")
        shutil.rmtree(self._folder)

    def _uri(self, database: str) -> str:
        return f"postgresql://assay:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self._programs / program), "-D", str(self._folder / "data"), *arguments],
            check=True,
            cwd=self._folder,
            user=self._user,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


@contextmanager
def serve_mlflow(store: str, files: Path) -> Iterator[str]:
    """Run `mlflow server` on a database; gives its address."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = ["server", "--backend-store-uri", store, "--artifacts-destination", files.as_uri()]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *command, "--workers", "1", "--port", str(port)],
        cwd=files.parent,
        # Its jobs, which nobody asks for, would be nine processes that all import MLflow.
        env=os.environ | QUIET | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _await(f"{address}/health", server)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _await(address: str, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while True:
        assert server.poll() is None, "`mlflow server` has ended"
        with suppress(OSError), urllib.request.urlopen(address) as answer:
            answer.read()
            return
        assert time.monotonic() < until, "`mlflow server` does not answer"
        time.sleep(0.1)


def _other_user() -> str | None:
    """Whom root has to be for PostgreSQL."""
    with suppress(KeyError):
        return pwd.getpwnam("postgres").pw_name
    return None

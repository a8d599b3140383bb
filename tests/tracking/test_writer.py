"""The thread that asks MLflow."""

from __future__ import annotations

import logging
import threading
import time

from assay.tracking.writer import Writer


def test_requests_are_done_in_order_by_one_thread():
    writer, done = Writer(), []
    for number in range(50):
        writer.submit(
            "a", lambda n, *, by: done.append((n, by, threading.current_thread())), number, by="x"
        )
    writer.wait()
    assert [number for number, _, _ in done] == list(range(50))
    assert len({thread for _, _, thread in done} - {threading.current_thread()}) == 1
    assert writer.failure is None


def test_after_a_failure_nothing_more_is_asked_of_the_server_and_nothing_is_raised(caplog):
    writer, done = Writer(), []

    def fails():
        time.sleep(0.05)
        raise ConnectionError("<html>\n the server is down")

    writer.submit("one", done.append, 1)
    writer.submit("the curves", fails)
    for _ in range(100):
        writer.submit("two", done.append, 2)
    with caplog.at_level(logging.ERROR):
        writer.wait()
    assert done == [1]
    assert writer.failure == "the curves: ConnectionError: <html> the server is down"
    (record,) = caplog.records
    assert "kedro run --force" in record.getMessage()
    assert "from the curves" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_locked_database_is_asked_again_until_the_run_waits_for_it(monkeypatch):
    monkeypatch.setattr("assay.tracking.writer.RETRY", 0.02)
    writer, tries, free = Writer(), [], threading.Event()

    def locked():
        tries.append(1)
        if not free.is_set():
            raise OSError("(sqlite3.OperationalError) database is locked")

    writer.submit("a", locked)
    time.sleep(0.2)
    free.set()
    writer.wait()
    assert writer.failure is None
    assert len(tries) > 2
    free.clear()
    writer.submit("b", locked)
    writer.wait()
    assert writer.failure == "b: OSError: (sqlite3.OperationalError) database is locked"


def test_what_closes_a_run_is_tried_after_a_failure_until_that_fails_too():
    writer, done = Writer(), []
    writer.submit("a", lambda: 1 / 0)
    writer.submit_always("the end", done.append, "closed")
    writer.submit_always("the end", lambda: 1 / 0)
    writer.submit_always("the end", done.append, "closed")
    writer.wait()
    assert done == ["closed"]
    assert writer.failure == "a: ZeroDivisionError: division by zero"


def test_a_server_that_hangs_is_waited_for_once_and_not_for_long(monkeypatch, caplog):
    monkeypatch.setattr("assay.tracking.writer.PATIENCE", 0.4)
    writer, done, hang = Writer(), [], threading.Event()
    began = time.monotonic()
    writer.submit("the run", hang.wait, 30)
    writer.submit_always("the end", done.append, "closed")
    with caplog.at_level(logging.ERROR):
        writer.wait()
        writer.submit_always("the end", done.append, "closed")
        writer.wait()
    assert 0.4 <= time.monotonic() - began < 2
    assert writer.failure == "the run: TimeoutError: no answer for 0 s"
    assert len(caplog.records) == 1
    hang.set()
    time.sleep(0.05)
    assert done == []


def test_a_thread_that_computes_is_no_server_that_hangs(monkeypatch):
    """As on a machine whose processors are shared: MLflow's own work takes longer than a server's
    answer.
    """
    monkeypatch.setattr("assay.tracking.writer.PATIENCE", 0.3)
    writer = Writer()

    def compute():
        began = time.monotonic()
        while time.monotonic() - began < 1:
            sum(range(1000))

    writer.submit("the experiment", compute)
    writer.wait()
    assert writer.failure is None


def test_a_server_that_is_slow_but_gets_on_is_waited_for(monkeypatch):
    monkeypatch.setattr("assay.tracking.writer.PATIENCE", 0.3)
    writer, done = Writer(), []
    for number in range(10):
        writer.submit("a", lambda n: (time.sleep(0.06), done.append(n)), number)
    writer.wait()
    assert done == list(range(10))
    assert writer.failure is None

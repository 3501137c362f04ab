"""A disk that is slow to flush: writes in worker threads share a transaction, and its flush."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import taskd
from support import DEADLINE, Process, at_once, sql, stored, until, written

pytestmark = pytest.mark.sqlite("PostgreSQL itself shares its flushes")

Start = Callable[..., Process]
Write = Callable[[], Any]


def new_task(title: str) -> dict[str, object]:
    return taskd.decode(json.dumps({"title": title}), taskd.NewTask)


class Batch:
    """Writes of so many threads that wait for their turn, and then share a transaction."""

    def __init__(self, path: Path) -> None:
        self.database = taskd.Sqlite(str(path), waiting=10)
        self.store = taskd.TaskStore(self.database, max_tasks=5)
        self.statements: list[str] = []
        self.database._writer.connection().set_trace_callback(self.statements.append)
        self.database._writer.execute_sql("PRAGMA foreign_keys = 1")

    def run(self, *writes: Write) -> list[Future[Any]]:
        """Start the writes one after another while the turn is taken, and return their results."""
        with ThreadPoolExecutor(len(writes)) as pool:
            assert self.database._turn.try_acquire()
            try:
                futures = []
                for write in writes:
                    futures.append(pool.submit(write))
                    until(lambda: self.database._turn._waiting == len(futures), "it waits")
            finally:
                self.database._turn.release()
        return futures

    def add(self, title: str, key: str | None = None) -> Write:
        def write() -> int:
            stored = self.store.add("alice", new_task(title), key)
            assert stored
            return stored.id

        return write

    def commits(self) -> int:
        return self.statements.count("COMMIT")


@pytest.fixture
def batch(path: Path) -> Iterator[Batch]:
    made = Batch(path)
    yield made
    made.store.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "taskd.db"


def test_waiting_writes_share_a_commit(batch: Batch, path: Path) -> None:
    writes = [batch.add("one"), batch.add("two", "key"), batch.add("three")]
    assert sorted(future.result() for future in batch.run(*writes)) == [1, 2, 3]
    assert batch.commits() == 1
    assert sorted(task["title"] for task in stored(path).values()) == ["one", "three", "two"]
    assert batch.add("four")() == 4
    assert batch.commits() == 2


def test_a_write_that_is_refused_leaves_the_others_of_its_transaction(
    batch: Batch, path: Path
) -> None:
    for number in range(4):
        batch.add(f"old {number}")()
    before = batch.commits()
    results = batch.run(batch.add("last", "a"), batch.add("too many", "b"), batch.add("more", "c"))
    failed = [future.exception() for future in results if future.exception()]
    assert [type(ex) for ex in failed] == [taskd.TooManyTasks] * 2
    assert batch.commits() == before + 1
    assert len(stored(path)) == 5
    assert sql(path, "SELECT COUNT(*) FROM idempotency_key") == [(1,)]


def test_a_write_whose_statement_fails_leaves_the_others_of_its_transaction(
    batch: Batch, path: Path
) -> None:
    sql(path, FAILS.format("SELECT RAISE(ABORT, 'no')"))
    results = batch.run(batch.add("one"), batch.add("bad"), batch.add("bad", "k"), batch.add("two"))
    assert [bool(future.exception()) for future in results].count(True) == 2
    assert sorted(task["title"] for task in stored(path).values()) == ["one", "two"]
    assert sql(path, "SELECT COUNT(*) FROM idempotency_key") == [(0,)]
    assert batch.commits() == 1
    assert batch.add("three")()


@pytest.mark.parametrize("when", ["at a statement", "at the commit"])
def test_all_writes_of_a_transaction_that_fails_are_unavailable(
    batch: Batch, path: Path, when: str
) -> None:
    sql(path, "CREATE TABLE thing (id INTEGER PRIMARY KEY)")
    sql(path, "CREATE TABLE odd (thing INTEGER REFERENCES thing DEFERRABLE INITIALLY DEFERRED)")
    at_commit = when == "at the commit"
    sql(
        path,
        FAILS.format("INSERT INTO odd VALUES (7)" if at_commit else "SELECT RAISE(ROLLBACK, 'no')"),
    )
    results = batch.run(batch.add("one"), batch.add("two"), batch.add("bad"))
    for future in results:
        assert isinstance(future.exception(), taskd.Unavailable | taskd.peewee.IntegrityError)
    assert sum(isinstance(future.exception(), taskd.Unavailable) for future in results) >= 2
    assert stored(path) == {}
    assert batch.add("later")()
    assert len(stored(path)) == 1


FAILS = """
CREATE TRIGGER fails AFTER INSERT ON task WHEN new.title = 'bad' BEGIN {}; END
"""


def test_a_thread_that_gave_up_its_turn_is_not_waited_for(batch: Batch, path: Path) -> None:
    for _ in range(200):
        ready = threading.Barrier(2)

        def give_up(ready: threading.Barrier = ready) -> bool:
            ready.wait(DEADLINE)
            acquired = batch.database._turn.acquire(0.0005)
            if acquired:
                batch.database._turn.release()
            return acquired

        with ThreadPoolExecutor(1) as pool:
            assert batch.database._turn.try_acquire()
            other = pool.submit(give_up)
            ready.wait(DEADLINE)
            passed_on = batch.database._turn.pass_on()
            if not passed_on:
                batch.database._turn.release()
            assert other.result(DEADLINE) or not passed_on


def test_the_event_loop_commits_a_batch_that_no_thread_continues(
    batch: Batch, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = batch.database._turn
    with ThreadPoolExecutor(1) as pool:
        turn._waiting += 1  # a thread that gives up after the turn was passed on to it
        added = pool.submit(batch.add("one"))
        until(lambda: batch.database._batch and not turn._lock.locked(), "the batch is left open")
        turn._waiting -= 1
        monkeypatch.setattr(taskd.thread_state, "in_event_loop", True)
        with pytest.raises(taskd.WouldBlock):
            batch.add("two")()
        assert added.result(DEADLINE) == 1
    assert len(stored(path)) == 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_a_hundred_creates_at_once_wait_for_far_fewer_flushes(start: Start, path: Path) -> None:
    trace = path.with_name("trace")
    delay = ["-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:delay_exit=20000"]
    server = start(command=["strace", "-D", "-f", "-o", str(trace), *delay])
    creates = [
        written("POST", "/api/alice/tasks", {"title": f"Task {number}"}, user="alice")
        for number in range(110)
    ]
    at_once([server], creates[:10])  # and the disk has been found to be slow
    before = len(re.findall("sync", trace.read_text()))
    statuses = Counter(answer.status_code for answer in at_once([server], creates[10:]))
    flushes = len(re.findall("sync", trace.read_text())) - before
    assert statuses[201] + statuses[503] == 100, statuses
    assert statuses[201] >= 50
    assert flushes < statuses[201] / 2
    assert server.terminate() == 0
    assert len(stored(path)) == 10 + statuses[201]

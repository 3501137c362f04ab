"""The writes of many requests share a transaction in the event loop, and its flush of the disk."""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

import event_loop
import taskd
from support import (
    DEADLINE,
    Process,
    Wire,
    assert_problem,
    at_once,
    bearer,
    locked,
    stored,
    traced,
    until,
    written,
)

pytestmark = pytest.mark.sqlite("PostgreSQL itself shares its flushes")

Start = Callable[..., Process]
SlowDisk = Callable[[float], Process]
FAILS = """
CREATE TRIGGER fails AFTER INSERT ON task WHEN new.title = 'bad' BEGIN SELECT RAISE({}, 'no'); END
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "taskd.db"


# --- In one thread --------------------------------------------------------------------------------


class Loop:
    """The event loop's side of a database, and the statements that run there."""

    def __init__(self, path: Path) -> None:
        self.database = taskd.Sqlite(str(path), waiting=10)
        self.store = taskd.TaskStore(self.database, max_tasks=3)
        self.statements: list[str] = []
        self.threads: list[threading.Thread] = []
        self.database._writer.connection().set_trace_callback(self._note)

    def _note(self, statement: str) -> None:
        self.statements.append(statement)
        self.threads.append(threading.current_thread())

    def add(self, title: str, key: str | None = None) -> int:
        """Create a task, as one request of a batch."""
        taskd.thread_state.after_commit = None
        made = self.store.add("alice", new_task(title), key)
        assert made
        return made.id


def new_task(title: str) -> dict[str, Any]:
    return taskd.parse_body(json.dumps({"title": title}), taskd.NEW_TASK)


@pytest.fixture
def loop(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    monkeypatch.setattr(taskd.thread_state, "in_event_loop", True)
    made = Loop(path)
    yield made
    made.database.close()


def test_writes_share_a_transaction_and_its_commit(loop: Loop, path: Path) -> None:
    assert [loop.add("one"), loop.add("two", "key")] == [1, 2]
    assert stored(path) == {}
    assert loop.database.commit().result()
    assert [task["title"] for task in stored(path).values()] == ["one", "two"]
    assert [loop.statements.count(one) for one in ("BEGIN IMMEDIATE", "COMMIT")] == [1, 1]


def test_a_write_that_is_refused_leaves_the_others_of_its_batch(loop: Loop, path: Path) -> None:
    for title in ("one", "two"):
        loop.add(title, title)
    loop.add("three")
    for key in ("a", None):
        with pytest.raises(taskd.TooManyTasks):
            loop.add("too many", key)
    assert loop.database.commit().result()
    assert [task["title"] for task in stored(path).values()] == ["one", "two", "three"]
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT name FROM idempotency_key").fetchall() == [
            ("one",),
            ("two",),
        ]


def test_a_write_sees_the_writes_before_it_in_its_batch_and_a_read_does_not(loop: Loop) -> None:
    number = loop.add("one")
    first = loop.store.change("alice", number, {"title": "two"})
    assert first
    taskd.thread_state.after_commit = None
    with pytest.raises(taskd.Changed) as caught:
        loop.store.toggle("alice", number, taskd.Conditions(match='"1-x"'))
    assert caught.value.args == (first.tag,)
    taskd.thread_state.after_commit = None
    assert loop.store.get("alice", number) is None
    assert loop.database.commit().result()
    assert loop.store.get("alice", number) == first


@pytest.mark.parametrize("how", ["ABORT", "ROLLBACK"])
def test_a_statement_that_fails_undoes_its_batch(loop: Loop, path: Path, how: str) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute(FAILS.format(how))
    loop.add("one")
    with pytest.raises(taskd.BatchFailed):
        loop.add("bad")
    assert stored(path) == {}
    assert loop.add("two") == 1
    assert loop.database.commit().result()


def test_a_commit_that_fails_undoes_its_batch(loop: Loop, path: Path) -> None:
    loop.add("one")
    loop.database._writer.execute_sql("ROLLBACK")  # a commit without a transaction fails
    assert not loop.database.commit().result()
    assert stored(path) == {}
    assert loop.add("two") == 1
    assert loop.database.commit().result()


@pytest.mark.parametrize("disk", ["fast", "slow"])
def test_only_where_commits_are_slow_another_thread_makes_them(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, disk: str
) -> None:
    monkeypatch.setattr(taskd, "SLOW_COMMIT", -1 if disk == "slow" else 99)
    loop.add("one")
    assert loop.database.commit().result(DEADLINE)
    is_ours = loop.threads[loop.statements.index("COMMIT")] is threading.current_thread()
    assert is_ours == (disk == "fast")


def test_what_follows_a_write_waits_for_its_commit(loop: Loop) -> None:
    calls: list[str] = []
    taskd.when_on_disk(lambda: calls.append("read"))
    assert calls == ["read"]
    loop.add("one")
    taskd.when_on_disk(lambda: calls.append("written"))
    assert calls == ["read"]
    assert event_loop.commit(loop.database)
    assert calls == ["read", "written"]


# --- Over sockets ---------------------------------------------------------------------------------


def creates(count: int) -> list[bytes]:
    return [
        written("POST", "/api/alice/tasks", {"title": f"Task {number}"}, user="alice")
        for number in range(count)
    ]


def test_a_request_that_fails_fails_alone_and_each_is_answered_and_logged_once(
    server: Process, path: Path
) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute(FAILS.format("ABORT"))
    bad = written("POST", "/api/alice/tasks", {"title": "bad"}, user="alice")
    answers = at_once([server], [*creates(20), bad, *creates(20), bad])
    assert Counter(answer.status_code for answer in answers) == {201: 40, 500: 2}
    assert len(stored(path)) == 40
    assert server.log.count("POST /api/{user_id}/tasks 201") == 40
    assert server.log.count("POST /api/{user_id}/tasks 500") == 2


def test_after_a_commit_that_failed_each_request_is_done_once(start: Start, path: Path) -> None:
    failing = """
commit, count = taskd.Sqlite._commit, 0
def fail_every_second(self, done):
    global count
    count += 1
    if count % 2:
        self._writer.execute_sql("ROLLBACK")
    return commit(self, done)
taskd.Sqlite._commit = fail_every_second
"""
    server = start(before=failing, TASKD_METRICS="1")
    answers = at_once([server], creates(60))
    assert [answer.status_code for answer in answers] == [201] * 60
    assert sorted(task["title"] for task in stored(path).values()) == sorted(
        f"Task {number}" for number in range(60)
    )
    assert server.log.count(" 201 ") == 60
    assert 'taskd_tasks_written_total{change="created"} 60.0' in (
        server.request("GET", "/metrics").text
    )


def test_a_write_waits_for_the_lock_of_another_process_and_nothing_else_does(
    server: Process, path: Path
) -> None:
    good, bad = creates(1)[0], written("POST", "/api/alice/tasks", {"title": "x"}, user="bob")
    with Wire(server) as blocked, Wire(server) as other:
        with locked(path):
            blocked.send(good)
            for request, status in ((bad, 403), (written("GET", "/readyz"), 200)):
                assert other.send(request).answer().status_code == status
            assert stored(path) == {}
        assert blocked.answer().status_code == 201
    assert len(stored(path)) == 1


def test_a_write_that_waited_too_long_for_a_lock_is_unavailable(start: Start, path: Path) -> None:
    server = start(before="taskd.LOCK_TIMEOUT = 0.3")
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(server)) for _ in range(50)]
        with locked(path):
            for wire, create in zip(wires, creates(50), strict=True):
                wire.send(create)
            for wire in wires:
                answer = wire.answer()
                assert_problem(answer, 503)
                assert int(answer.headers["retry-after"]) > 0
        assert wires[0].send(creates(1)[0]).answer().status_code == 201
    assert len(stored(path)) == 1


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
def test_a_request_whose_client_has_left_is_done_and_logged(
    server: Process, path: Path, reset: bool
) -> None:
    wires = [Wire(server) for _ in range(5)]
    with locked(path):
        for wire, create in zip(wires, creates(5), strict=True):
            wire.send(create)
        assert server.request("GET", "/healthz").status_code == 200
        for wire in wires:
            wire.reset() if reset else wire.close()
        assert server.request("GET", "/healthz").status_code == 200
    until(lambda: server.log.count("POST /api/{user_id}/tasks 201") == 5, "a line for each")
    assert len(stored(path)) == 5


ONE_A_ROUND = """
answer = Server._answer
def slow(self, channel):
    answer(self, channel)
    time.sleep(ROUND_TIME)
Server._answer = slow
"""


def commits_of_creates_in_30_rounds(server: Process, path: Path) -> float:
    """Create 30 tasks, one in each round of the event loop, and return how many commits it took."""
    answers = at_once([server], creates(30), path)
    assert [answer.status_code for answer in answers] == [201] * 30
    metrics = server.request("GET", "/metrics").text
    return float(re.findall(r'seconds_count{statement="commit"} (.+)', metrics)[0])


def test_a_batch_is_committed_after_a_while_although_each_round_adds_a_write(
    start: Start, path: Path
) -> None:
    short, long = (
        commits_of_creates_in_30_rounds(
            start(before=f"{ONE_A_ROUND}taskd.BATCH_TIME = {seconds}", TASKD_METRICS="1"), path
        )
        for seconds in (0, 10)
    )
    assert short > 2 * long


def test_the_time_of_a_pipelined_request_starts_when_it_was_received(
    server: Process, path: Path
) -> None:
    with Wire(server) as wire:
        with locked(path):
            wire.send(creates(1)[0] + written("GET", "/readyz"))
            assert server.request("GET", "/healthz").status_code == 200  # it has been received
            time.sleep(0.3)
        assert [wire.answer().status_code for _ in range(2)] == [201, 200]
    times = re.findall(r" (?:POST \S+ 201|GET /readyz 200) ([0-9.]+)ms", server.log)
    assert len(times) == 2
    assert all(float(milliseconds) >= 250 for milliseconds in times)


WATCHES_ITS_CLIENT = """
page = TaskStore.page
def watch(self, *arguments):
    log.warning("a search begins")
    end = time.monotonic() + 10
    while not thread_state.client_has_left() and time.monotonic() < end:
        time.sleep(0.01)
    log.warning("the client has left: %s", time.monotonic() < end)
    return page(self, *arguments)
TaskStore.page = watch
"""


@pytest.mark.parametrize("more", [b"", b"G"], ids=["nothing more", "some of another request"])
def test_a_search_is_told_that_its_client_has_left(start: Start, more: bytes) -> None:
    server = start(before=WATCHES_ITS_CLIENT)
    with Wire(server) as wire:
        wire.send(written("GET", "/api/alice/tasks?q=x", user="alice") + more)
        until(lambda: "a search begins" in server.log, "it begins")
        wire.reset()
    until(lambda: "the client has left: True" in server.log, "it is told")


def test_a_search_is_told_in_time_that_its_client_has_closed(start: Start) -> None:
    server = start(before=WATCHES_ITS_CLIENT)
    with Wire(server) as wire:
        wire.send(written("GET", "/api/alice/tasks?q=x", user="alice"))
        until(lambda: "a search begins" in server.log, "it begins")
    until(lambda: "the client has left: True" in server.log, "it is told")


@pytest.mark.parametrize("query", ["", "?q=task", "?sort=-title", "?limit=101"])
def test_a_client_that_sends_no_more_gets_its_answer(start: Start, query: str) -> None:
    with Wire(start(before="taskd.HALF_CLOSED_TIME = 10")) as wire:
        for create in creates(101):
            assert wire.send(create).answer().status_code == 201
        wire.send(written("GET", f"/api/alice/tasks{query}", user="alice"))
        wire.socket.shutdown(socket.SHUT_WR)
        answer = wire.answer()
    assert (answer.status_code, len(answer.json)) == (200, 101)


SENDS_SLOWLY = """
send = taskd.ServerChannel.send
def slow(self, *arguments, **options):
    if not thread_state.in_event_loop:
        descriptor = self._fileno
        time.sleep(0.3)
        if self._fileno != descriptor:
            log.error("closed while it sends")
    return send(self, *arguments, **options)
taskd.ServerChannel.send = slow
"""


def test_a_connection_is_not_closed_while_a_worker_thread_sends(start: Start) -> None:
    server = start(before=SENDS_SLOWLY)
    with Wire(server) as wire:
        wire.send(written("GET", "/api/alice/tasks?q=x", user="alice"))
        until(lambda: " 200 " in server.log, "it is answered")
        wire.reset()
        assert server.request("GET", "/healthz").status_code == 200
    assert server.terminate() == 0
    assert "ERROR" not in server.log


def test_a_lock_is_not_kept_for_a_client_that_has_left(server: Process, path: Path) -> None:
    with Wire(server) as wire, locked(path):
        wire.send(creates(1)[0])
        until(lambda: server.request("GET", "/readyz").status_code == 200, "it is served")
        descriptors = Path(f"/proc/{server.popen.pid}/fd")
        before = len(list(descriptors.iterdir()))
        wire.reset()
        until(lambda: len(list(descriptors.iterdir())) < before, "taskd closes the connection")
    for _ in range(3):  # each is a round of the event loop
        assert server.request("GET", "/readyz").status_code == 200
    with locked(path):
        pass
    answer = server.request("POST", "/api/alice/tasks", {"title": "x"}, bearer("alice"))
    assert answer.status_code == 201


# --- A slow disk ----------------------------------------------------------------------------------


@pytest.fixture
def slow_disk(make_app: Callable[..., taskd.App], start: Start, path: Path) -> SlowDisk:
    """Start a taskd whose flushes, listed in the file trace, take so many seconds more."""
    make_app().database.close()  # the flushes of the first start are done

    def start_slow(seconds: float) -> Process:
        delay = f"inject=fsync,fdatasync:delay_exit={1_000_000 * seconds:.0f}"
        calls = "-e", "trace=fsync,fdatasync", "-e", delay
        return start(before=traced("-o", str(path.with_name("trace")), *calls))

    return start_slow


@pytest.mark.slow
def test_a_hundred_creates_at_once_wait_for_few_flushes(slow_disk: SlowDisk, path: Path) -> None:
    trace, server = path.with_name("trace"), slow_disk(0.02)
    at_once([server], creates(10))  # and the disk has been found to be slow
    before = len(re.findall("sync", trace.read_text()))
    statuses = Counter(answer.status_code for answer in at_once([server], creates(100)))
    flushes = len(re.findall("sync", trace.read_text())) - before
    assert statuses == {201: 100}
    assert flushes < 30
    assert server.terminate() == 0
    assert len(stored(path)) == 110


@pytest.mark.slow
def test_nothing_but_writes_waits_for_a_slow_disk(slow_disk: SlowDisk) -> None:
    server = slow_disk(0.5)
    with Wire(server) as writer, Wire(server) as reader:
        assert writer.send(creates(1)[0]).answer().status_code == 201
        served, done = 0, threading.Event()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(writer.send(creates(1)[0]).answer)
            answer.add_done_callback(lambda _: done.set())
            while not done.is_set():
                assert reader.send(written("GET", "/readyz")).answer().status_code == 200
                served += 1
        assert answer.result(DEADLINE).status_code == 201
        assert served > 5


@pytest.mark.slow
def test_a_client_that_sends_on_during_a_slow_commit_costs_nothing(slow_disk: SlowDisk) -> None:
    server = slow_disk(0.5)
    with Wire(server) as wire:
        assert wire.send(creates(1)[0]).answer().status_code == 201
        before = server.processor_time()
        wire.send(creates(1)[0])
        time.sleep(0.1)  # so that what follows is not read together with it
        wire.send(written("GET", "/readyz"))
        assert [wire.answer().status_code for _ in range(2)] == [201, 200]
        assert server.processor_time() - before < 0.2


@pytest.mark.slow
def test_a_sigterm_during_a_slow_commit_answers_what_was_sent(
    slow_disk: SlowDisk, path: Path
) -> None:
    server = slow_disk(0.5)
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(server)) for _ in range(20)]
        assert wires[0].send(creates(1)[0]).answer().status_code == 201
        for wire, create in zip(wires, creates(20), strict=True):
            wire.send(create)
            time.sleep(0.01)  # so that some of them come during the commit
        assert server.terminate() == 0
        assert [wire.answer().status_code for wire in wires] == [201] * 20
    assert len(stored(path)) == 21

"""A primary and its synchronous standby: the primary fails, and the standby takes its place."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

import psycopg
import pytest

from cluster import Cluster
from conftest import DIRECTORY
from support import Answer, Process, bearer, until
from test_postgresql import TASKS, ask, assert_unavailable, create, made

pytestmark = [pytest.mark.postgresql, pytest.mark.slow]

Start = Callable[..., Process]
Pair = tuple[Cluster, Cluster]
CLIENTS = 16
CONNECTING = 6  # seconds of connect_timeout where a server is silent; 3 is taskd's default
STATEMENT = 9  # seconds until taskd gives up a statement that the server does not end
TOLERANCE = 2  # seconds, for a busy machine
BETWEEN_READS = 0.05  # seconds
SOON = 1.0  # seconds within which a request is answered 503 while there is no primary


@pytest.fixture
def servers() -> Iterator[Pair]:
    """A primary that answers a commit only when its standby has it on disk, and that standby."""
    primary = Cluster(within=os.environ[DIRECTORY])
    try:
        standby = Cluster(within=os.environ[DIRECTORY], primary=primary)
        try:
            primary.wait_for_standby()
            yield primary, standby
        finally:
            standby.remove()
    finally:
        primary.remove()


def has_first_task(url: str) -> bool:
    """Say whether a standby has replayed the database, its tables and the first task."""
    with contextlib.suppress(psycopg.Error):
        return ask(url, "SELECT id FROM task") == [(1,)]
    return False


def address(servers: Pair, database: str) -> str:
    """Return an address that names both servers and means the one that accepts writes."""
    hosts = ",".join(f"127.0.0.1:{server.port}" for server in servers)
    return f"postgresql://taskd@{hosts}/{database}?target_session_attrs=read-write"


class Clients:
    """Create tasks, each with a key and repeated until it is done, and toggle each of them."""

    def __init__(self, server: Process) -> None:
        self._server = server
        self._enough = threading.Event()
        self.created: dict[str, int] = {}  # the id of each title whose create was answered 201
        self.toggled: set[int] = set()  # the ids whose toggle was answered 200
        self.toggle_unknown: set[int] = set()  # 503: it may have been done
        self.refused: list[float] = []  # seconds until each 503
        self._pool = ThreadPoolExecutor(CLIENTS)

    def __enter__(self) -> Clients:
        self._working = [self._pool.submit(self._work, client) for client in range(CLIENTS)]
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._pool.shutdown()

    def _work(self, client: int) -> None:
        number = 0
        while not self._enough.is_set():
            name = f"{client}-{number}"
            answer = self._answer(lambda: create(self._server, name, key=name))  # noqa: B023
            if answer.status_code == 503:
                self._enough.wait(0.05)
                continue
            task = answer.json["id"]
            self.created[f"Task {name}"] = task
            number += 1
            path = f"{TASKS}/{task}/complete"
            answer = self._answer(
                lambda: self._server.request("PATCH", path, headers=bearer())  # noqa: B023
            )
            (self.toggled if answer.status_code == 200 else self.toggle_unknown).add(task)

    def _answer(self, send: Callable[[], Answer]) -> Answer:
        started = time.monotonic()
        answer = send()
        if answer.status_code == 503:
            self.refused.append(time.monotonic() - started)
            assert_unavailable(answer)
        else:
            assert answer.status_code in (200, 201), answer.text
        return answer

    def wait_for(self, creates: int) -> None:
        """Wait until so many more creates are done; a client that failed fails the test."""
        wanted = len(self.created) + creates

        def done() -> bool:
            for client in self._working:
                if client.done():
                    client.result()
            return len(self.created) >= wanted

        until(done, "the clients work")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGQUIT], ids=["killed", "stopped at once"])
def test_the_standby_replaces_a_primary_without_a_restart_of_taskd_and_nothing_is_lost(
    servers: Pair, start: Start, how: signal.Signals
) -> None:
    primary, standby = servers
    url = made(primary.url())
    server = start(DATABASE_URL=address(servers, url.rpartition("/")[2]))
    with Clients(server) as clients:
        clients.wait_for(100)
        primary.stop(how)
        until(lambda: len(clients.refused) > 3 * CLIENTS, "they are refused")
        for method, path in (("GET", TASKS), ("GET", f"{TASKS}/1"), ("DELETE", f"{TASKS}/1")):
            started = time.monotonic()
            assert_unavailable(server.request(method, path, headers=bearer()))
            assert time.monotonic() - started < SOON
        assert_unavailable(server.request("GET", "/readyz"))
        assert server.request("GET", "/healthz").status_code == 200
        standby.promote()
        clients.wait_for(100)
    assert max(clients.refused) < SOON
    assert server.request("GET", "/readyz").status_code == 200
    new = standby.url(url.rpartition("/")[2])
    rows = ask(new, "SELECT title, id, completed FROM task")
    assert len(rows) == len({title for title, _, _ in rows}), "each key made one task"
    tasks = {title: task for title, task, _ in rows}
    assert clients.created.items() <= tasks.items()
    assert len(tasks.keys() - clients.created) <= CLIENTS, "at most the last one of each client"
    done = {task for _, task, completed in rows if completed}
    assert clients.toggled <= done <= clients.toggled | clients.toggle_unknown
    title, task = min(clients.created.items())  # it was made on the primary that is gone
    again = create(server, title.removeprefix("Task "), key=title.removeprefix("Task "))
    assert (again.status_code, again.json["id"]) == (201, task)
    assert again.headers["idempotency-replayed"] == "true"
    assert "Traceback" not in server.log


def refusal(server: Process, number: int) -> float:
    """Return the seconds until a create is answered 503."""
    started = time.monotonic()
    assert_unavailable(create(server, number))
    return time.monotonic() - started


def test_a_primary_that_is_silent_makes_no_request_wait_for_long(
    servers: Pair, start: Start
) -> None:
    """As after the loss of a machine or its disk: no connection is refused, and none is closed."""
    primary, standby = servers
    url = made(primary.url())
    both = f"{address(servers, url.rpartition('/')[2])}&connect_timeout={CONNECTING}"
    server = start(DATABASE_URL=both)
    with primary.frozen():
        many = 5 * CLIENTS  # more than worker threads
        with ThreadPoolExecutor(many) as pool:
            for _ in range(2):  # no request waits for the connection that is being made
                seconds = list(pool.map(lambda number: refusal(server, number), range(many)))
                assert max(seconds) < SOON + TOLERANCE < CONNECTING
        standby.promote()
        until(lambda: create(server, 1, "key").status_code == 201, "it writes to the other one")
        with ThreadPoolExecutor(CLIENTS) as pool:  # new connections begin with the other one
            answers = list(pool.map(lambda number: create(server, number), range(CLIENTS)))
            assert {answer.status_code for answer in answers} == {201}


def test_a_server_that_falls_silent_within_a_statement_is_503_after_the_statement_timeout(
    servers: Pair, start: Start
) -> None:
    primary, _ = servers
    server = start(DATABASE_URL=made(primary.url()))
    with ThreadPoolExecutor(CLIENTS) as pool:  # so that there are idle connections
        assert {answer.status_code for answer in pool.map(partial(create, server), range(8))} == {
            201
        }
        with primary.frozen():
            asked = time.monotonic()
            for waiting in [pool.submit(create, server, number) for number in range(CLIENTS)]:
                assert_unavailable(waiting.result())
            assert time.monotonic() - asked < STATEMENT + 2 * TOLERANCE
    until(lambda: create(server, 1).status_code == 201, "it works again")


def test_while_the_standby_is_silent_reads_go_on_and_no_change_is_answered_as_done(
    servers: Pair, start: Start
) -> None:
    primary, standby = servers
    server = start(DATABASE_URL=made(primary.url()))
    task = create(server, 1).json
    with standby.frozen(), ThreadPoolExecutor(CLIENTS) as pool:
        asked = time.monotonic()
        waiting = [pool.submit(create, server, 2, "key") for _ in range(CLIENTS)]
        while wait(waiting, BETWEEN_READS).not_done:
            assert server.request("GET", TASKS, headers=bearer()).json == [task]
        assert time.monotonic() - asked < STATEMENT + TOLERANCE
        for answer in waiting:
            assert_unavailable(answer.result())
    until(lambda: create(server, 2, "key").status_code == 201, "its standby is back")
    titles = [task["title"] for task in server.request("GET", TASKS, headers=bearer()).json]
    assert titles == ["Task 1", "Task 2"]


def test_taskd_at_the_standby_reads_all_the_time_and_writes_when_it_is_the_primary(
    servers: Pair, start: Start
) -> None:
    primary, standby = servers
    url = made(primary.url())
    task = create(start(DATABASE_URL=url), 1).json
    here = standby.url(url.rpartition("/")[2])
    until(lambda: has_first_task(here), "the standby has it")
    server = start(DATABASE_URL=here)
    pids = "SELECT pid FROM pg_stat_activity WHERE application_name = 'taskd'"
    assert server.request("GET", TASKS, headers=bearer()).json == [task]
    before = ask(here, pids)
    assert_unavailable(create(server, 2))
    until(
        lambda: not set(before) & set(ask(here, pids)), "a connection that cannot write is closed"
    )
    primary.stop(signal.SIGKILL)
    assert server.request("GET", TASKS, headers=bearer()).json == [task]
    assert_unavailable(create(server, 2))
    standby.promote()
    assert create(server, 2).json["id"] > 1
    assert server.request("GET", "/readyz").status_code == 200

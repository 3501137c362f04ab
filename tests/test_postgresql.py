"""What only PostgreSQL can do: go away and come back, reject, be shared by several processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from falcon import testing

import taskctl
import taskd
from cluster import Cluster, free_port
from conftest import DIRECTORY, Person
from support import (
    DEADLINE,
    ROOT,
    SECRET,
    Answer,
    ForkServer,
    Process,
    assert_problem,
    at_once,
    bearer,
    database_url,
    environment,
    locked,
    sql,
    stored,
    until,
    written,
)

pytestmark = pytest.mark.postgresql

Start = Callable[..., Process]
TASKS = "/api/alice/tasks"
PATIENCE = 10  # seconds until every answer, whatever fails: more than twice the longest wait
PASSWORD = "correct-horse-battery"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A server for these tests only: they may stop it, and it flushes its files as usual."""
    cluster = Cluster(within=os.environ[DIRECTORY])
    yield cluster
    cluster.remove()


@pytest.fixture
def empty(cluster: Cluster) -> str:
    """The address of an unused database on that server."""
    return made(cluster.url())


def made(server: str, more: str = "") -> str:
    name = f"database_{time.monotonic_ns()}"
    with psycopg.connect(server, autocommit=True) as session:
        session.execute(f"CREATE DATABASE {name} {more}".encode())
    return f"{server.rpartition('/')[0]}/{name}"


def ask(url: str, statement: str) -> list[Any]:
    with psycopg.connect(url, autocommit=True) as session:
        return session.execute(statement.encode()).fetchall()


def create(server: Process, number: object, key: str = "") -> Answer:
    headers = bearer() | ({"Idempotency-Key": key} if key else {})
    return server.request("POST", TASKS, {"title": f"Task {number}"}, headers, timeout=2 * DEADLINE)


def assert_unavailable(answer: Answer | testing.Result) -> None:
    problem = assert_problem(answer, 503)
    assert int(answer.headers["retry-after"]) > 0
    assert not [
        word
        for word in ("FATAL", "psycopg", "connection", "127.0.0.1")
        if word in problem["detail"]
    ]


# --- Connections ---------------------------------------------------------------------------------


def test_a_request_takes_a_connection_that_becomes_idle_while_a_new_one_is_made(
    empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = taskd.open_database(taskd.Settings(database_url=empty))
    assert isinstance(database, taskd.Postgres)
    pool, begun, end = database._pool, threading.Barrier(2), threading.Event()
    monkeypatch.setattr(pool, "wait_limit", DEADLINE)

    def hold() -> None:
        with database._connected():
            begun.wait(DEADLINE)
            end.wait(DEADLINE)

    with ThreadPoolExecutor(2) as threads:
        holding = threads.submit(hold)
        begun.wait(DEADLINE)
        never = threading.Event()
        monkeypatch.setattr(pool, "new_connection", lambda: never.wait(2 * DEADLINE))
        waiting = threads.submit(database.run, "SELECT 1")
        until(lambda: pool._new is not None and not pool._new.done(), "it asks for a new one")
        end.set()
        assert waiting.result(DEADLINE / 2) == [(1,)]
        holding.result(DEADLINE)
    database.close()
    never.set()


# --- The server goes away -------------------------------------------------------------------------


def test_a_crash_of_the_server_is_503_until_it_is_back_and_loses_nothing(
    cluster: Cluster, empty: str, start: Start
) -> None:
    server, enough = start(DATABASE_URL=empty), threading.Event()
    statuses: Counter[int] = Counter()
    acknowledged: dict[str, int] = {}

    def work(customer: int) -> int:
        """Create tasks one after another, each repeated until it is acknowledged."""
        number = 0
        while not enough.is_set():
            title = f"Task {customer}-{number}"
            answer = create(server, f"{customer}-{number}", key=title.replace(" ", "-"))
            statuses[answer.status_code] += 1
            if answer.status_code == 201:
                acknowledged[title] = answer.json["id"]
                number += 1
            else:
                assert_unavailable(answer)
                enough.wait(0.05)
        return number

    with ThreadPoolExecutor(8) as pool:
        customers = [pool.submit(work, customer) for customer in range(8)]
        try:
            for _ in range(2):
                before = len(acknowledged)
                until(lambda: len(acknowledged) > before + 20, "they work")  # noqa: B023
                cluster.stop()
                refused = statuses[503]
                until(lambda: statuses[503] > refused + 8, "they are refused")  # noqa: B023
                assert_unavailable(server.request("GET", TASKS, headers=bearer()))
                assert_problem(server.request("GET", TASKS), 401)
                assert server.request("GET", "/healthz").status_code == 200
                assert_unavailable(server.request("GET", "/readyz"))
                cluster.start()
            before = len(acknowledged)
            until(lambda: len(acknowledged) > before + 20, "they work again")
        finally:
            enough.set()
    assert set(statuses) == {201, 503}
    assert sum(customer.result() for customer in customers) == len(acknowledged)
    tasks = {
        task["title"]: task["id"] for task in server.request("GET", TASKS, headers=bearer()).json
    }
    assert acknowledged.items() <= tasks.items()
    assert len(tasks.keys() - acknowledged) <= 8, (
        "at most the last one of each customer was not acknowledged"
    )
    assert ask(empty, "SELECT COUNT(*), COUNT(DISTINCT title) FROM task") == [
        (len(tasks), len(tasks))
    ]
    assert server.terminate() == 0
    assert "Traceback" not in server.log


# Of this database: other tests may wait in others of the server.
WAITING = """
SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
"""


def begun(
    pool: ThreadPoolExecutor, url: str, call: Callable[..., Any], *arguments: Any, **options: Any
) -> Future[Any]:
    """Call a function in a thread, and return when it waits for a lock of the database."""
    called = pool.submit(call, *arguments, **options)
    until(lambda: ask(url, WAITING), "it waits for a lock")
    return called


def hold_key(session: psycopg.Connection[Any], name: str) -> None:
    """Let a create of alice with this key wait until the transaction ends, with its task added."""
    session.execute(
        "INSERT INTO idempotency_key (user_id, name, body, answer, created_at)"
        " VALUES ('alice', %s, '', '', '2026-11-20T21:00:00.000Z')",
        [name],
    )


def test_a_crash_in_the_middle_of_a_transaction_leaves_nothing_of_it(
    cluster: Cluster, empty: str, start: Start
) -> None:
    server = start(DATABASE_URL=empty)
    with psycopg.connect(empty) as other, ThreadPoolExecutor(1) as pool:
        hold_key(other, "once")
        # The task is added, and waits for its key.
        creating = begun(pool, empty, create, server, 1, "once")
        cluster.stop()
        assert_unavailable(creating.result())
        other.close()
    cluster.start()
    assert ask(empty, "SELECT id FROM task UNION ALL SELECT id FROM idempotency_key") == []
    answers = [create(server, 1, "once") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 201]
    assert [answer.headers.get("idempotency-replayed") for answer in answers] == [None, "true"]
    assert ask(empty, "SELECT title FROM task") == [("Task 1",)]


def test_a_create_with_a_key_does_not_wait_for_one_with_another_key(
    empty: str, start: Start
) -> None:
    server = start(DATABASE_URL=empty)
    with psycopg.connect(empty) as other, ThreadPoolExecutor(1) as pool:
        hold_key(other, "slow")
        slow = begun(pool, empty, create, server, 1, "slow")
        assert create(server, 2, "quick").status_code == 201
        assert not slow.done()
        other.rollback()
        assert slow.result().status_code == 201


def test_a_repeated_create_does_not_wait_for_another_create_of_a_user_with_a_limit(
    empty: str, start: Start
) -> None:
    server = start(DATABASE_URL=empty, TASKD_MAX_TASKS="9")
    first = create(server, 1, "once")
    with psycopg.connect(empty) as other, ThreadPoolExecutor(1) as pool:
        other.execute("LOCK TABLE task IN EXCLUSIVE MODE")
        # It has the lock of the user, and waits for that of the table.
        adding = begun(pool, empty, create, server, 2)
        assert create(server, 1, "once").json == first.json
        assert not adding.done()
        other.rollback()
        assert adding.result().status_code == 201


def test_idle_connections_that_the_server_ended_are_replaced_without_an_error(
    start: Start, tmp_path: Path
) -> None:
    server = start()
    assert {create(server, number).status_code for number in range(5)} == {201}
    sql(
        tmp_path / "taskd.db",
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    assert {create(server, number).status_code for number in range(5)} == {201}


def test_a_lock_held_elsewhere_is_503_within_the_time_limit_and_stops_no_read(
    start: Start, tmp_path: Path
) -> None:
    server = start(TASKD_THREADS="4")
    task = create(server, 1).json
    with locked(tmp_path / "taskd.db"), ThreadPoolExecutor(2) as pool:
        started = time.monotonic()
        writes = [pool.submit(create, server, number) for number in (2, 3)]
        assert server.request("GET", TASKS, headers=bearer()).json == [task]
        assert not any(write.done() for write in writes), "it waits before it gives up"
        for write in writes:
            assert_unavailable(write.result())
        assert time.monotonic() - started < PATIENCE
    assert create(server, 4).status_code == 201
    assert [task["title"] for task in stored(tmp_path / "taskd.db").values()] == [
        "Task 1",
        "Task 4",
    ]


def test_a_read_only_database_is_503_for_writes_and_readyz_and_goes_on_reading(
    start: Start, tmp_path: Path
) -> None:
    database = tmp_path / "taskd.db"
    task = create(start(), 1).json
    name = sql(database, "SELECT current_database()")[0][0]
    sql(database, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    server = start()
    until(
        lambda: server.request("GET", "/readyz").status_code == 503,
        "taskd has failed to delete the old idempotency keys, as at every start",
    )
    for method, path, body in (
        ("POST", "", {"title": "x"}),
        ("PUT", "/1", {"title": "x"}),
        ("DELETE", "/1", None),
    ):
        assert_unavailable(server.request(method, TASKS + path, body, bearer()))
    assert_unavailable(create(server, 2, "key"))
    assert_unavailable(server.request("PATCH", f"{TASKS}/1/complete", headers=bearer()))
    assert server.request("GET", TASKS, headers=bearer()).json == [task]
    assert "stores no writes" in assert_problem(server.request("GET", "/readyz"), 503)["detail"]
    assert "Traceback" not in server.log
    with psycopg.connect(database_url(database), autocommit=True) as session:
        session.execute("SET default_transaction_read_only = off")
        session.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only".encode())
        session.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    until(lambda: server.request("GET", "/readyz").status_code == 200, "it is ready again")


def test_a_column_that_changes_under_a_prepared_statement_causes_no_500(
    start: Start, tmp_path: Path
) -> None:
    server = start(TASKD_THREADS="2")
    create(server, 1)
    for _ in range(20):
        assert server.request("GET", f"{TASKS}/1", headers=bearer()).status_code == 200
    sql(tmp_path / "taskd.db", "ALTER TABLE task ALTER COLUMN title TYPE varchar(300)")
    answers = [server.request("GET", f"{TASKS}/1", headers=bearer()) for _ in range(8)]
    assert {answer.status_code for answer in answers} <= {200, 503}
    assert answers[-1].status_code == 200


# --- The start ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(cluster: Cluster) -> str:
    """The address, with the password, of a database that needs one."""
    with psycopg.connect(cluster.url(), autocommit=True) as session:
        session.execute(f"CREATE ROLE guarded LOGIN SUPERUSER PASSWORD '{PASSWORD}'".encode())
    cluster.ask_for_password("guarded")
    return cluster.url(user=f"guarded:{PASSWORD}")


def run(
    directory: Path, program: str, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    settings = environment(BETTER_AUTH_SECRET=SECRET, TASKD_PORT="0", **variables)
    forks = ForkServer.of(program, settings)
    return forks.run(*arguments, directory=directory, variables=settings)


def test_with_the_right_password_it_serves_and_nothing_shows_it(
    guarded: str, start: Start, tmp_path: Path
) -> None:
    server = start(DATABASE_URL=made(guarded), TASKD_LOG="debug")
    assert create(server, 1).status_code == 201
    assert server.terminate() == 0
    assert PASSWORD not in server.log
    for url in (guarded, f"postgresql://h/d?user=u&password={PASSWORD}&sslmode=require"):
        shown = run(tmp_path, "taskctl", "settings", DATABASE_URL=url)
        assert shown.returncode == 0
        assert "postgresql://" in shown.stdout
        assert PASSWORD not in shown.stdout + shown.stderr
    assert PASSWORD not in taskd.Settings(database_url=guarded).database


UNUSABLE = {
    "a wrong password": (
        "postgresql://guarded:wrong-{password}@127.0.0.1:{port}/postgres",
        "password",
    ),
    "a password in the query": (
        "postgresql://127.0.0.1:{free}/postgres?user=guarded&password=x@{password}",
        "refused",
    ),
    "a question mark in the password": (
        "postgresql://guarded:{password}?x@127.0.0.1:{port}/postgres",
        "password",
    ),
    "no such user": ("postgresql://nobody:{password}@127.0.0.1:{port}/postgres", "nobody"),
    "no such database": ("postgresql://guarded:{password}@127.0.0.1:{port}/nowhere", "nowhere"),
    "no such host": ("postgresql://guarded:{password}@host.invalid/postgres", "host.invalid"),
    "nobody listens": ("postgresql://guarded:{password}@127.0.0.1:{free}/postgres", "refused"),
    "a percent sign in the password": (
        "postgresql://guarded:{password}%zz@127.0.0.1:{port}/postgres",
        "read",
    ),
    "a slash in the password": (
        "postgresql://guarded:{password}/x@127.0.0.1:{port}/postgres",
        "DATABASE_URL",
    ),
    "an @ in the password": (
        "postgresql://guarded:{password}@x@127.0.0.1:{port}/postgres",
        "DATABASE_URL",
    ),
    "an unknown parameter": (
        "postgresql://guarded:{password}@127.0.0.1:{port}/postgres?hurry=1",
        "read",
    ),
    "a wrong password as a parameter": (
        "postgresql://127.0.0.1:{port}/d?user=guarded&password=x{password}",
        "pass",
    ),
}


@pytest.mark.parametrize(("url", "named"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_server_that_cannot_be_used_stops_the_start_with_one_line_without_the_password(
    cluster: Cluster, guarded: str, tmp_path: Path, url: str, named: str
) -> None:
    url = url.format(port=cluster.port, free=free_port(), password=PASSWORD)
    programs: list[tuple[str, list[str]]] = [("taskd", [])]
    if named == "password":
        programs.append(("taskctl", ["users"]))
    for program, arguments in programs:
        ended = run(tmp_path, program, *arguments, DATABASE_URL=url)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr.startswith(f"{program.removesuffix('.py')}: ")
        assert ended.stderr.count("\n") == 1, ended.stderr
        assert named in ended.stderr
        assert PASSWORD not in ended.stderr


UNFIT = {
    "a column is gone": (
        "ALTER TABLE task DROP COLUMN description",
        "it lacks task.description TEXT",
    ),
    "a column may be null": (
        "ALTER TABLE task ALTER COLUMN title DROP NOT NULL",
        "it lacks task.title TEXT NOT NULL",
    ),
    "an index is gone": ("DROP INDEX task_id", "it lacks index on task (user_id, id)"),
    "a column has come": ("ALTER TABLE task ADD COLUMN mood INTEGER", "it has task.mood INTEGER"),
    "it is newer": (
        "ALTER TABLE about ALTER version TYPE integer USING 99",
        "was made by a newer taskd",
    ),
}


@pytest.mark.parametrize(("change", "named"), UNFIT.values(), ids=UNFIT)
def test_a_schema_that_does_not_fit_stops_the_start_naming_the_difference(
    start: Start, tmp_path: Path, change: str, named: str
) -> None:
    assert start().terminate() == 0
    sql(tmp_path / "taskd.db", change)
    ended = run(tmp_path, "taskd", DATABASE_URL=database_url(tmp_path / "taskd.db"))
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert named in ended.stderr


def test_processes_that_start_at_once_on_an_empty_database_all_serve(
    empty: str, start: Start
) -> None:
    servers = [start(DATABASE_URL=empty, wait=False) for _ in range(3)]
    for server in servers:
        server.port = server._wait_for_port()
    assert [create(server, number).json["id"] for number, server in enumerate(servers)] == [1, 2, 3]
    assert ask(empty, "SELECT COUNT(*) FROM about") == [(1,)]


# --- Two processes --------------------------------------------------------------------------------


@pytest.fixture
def two(start: Start) -> list[Process]:
    return [start(TASKD_THREADS="32"), start(TASKD_THREADS="32")]


def test_every_toggle_of_a_storm_across_two_processes_counts(
    two: list[Process], tmp_path: Path
) -> None:
    create(two[0], 1)
    toggle = written("PATCH", f"{TASKS}/1/complete", user="alice")
    answers = at_once(two, [toggle] * 25, tmp_path / "taskd.db")
    assert Counter(answer.json["completed"] for answer in answers) == {True: 13, False: 12}
    assert two[0].request("GET", f"{TASKS}/1", headers=bearer()).json["completed"] is True
    assert sql(tmp_path / "taskd.db", "SELECT version FROM task") == [(26,)]


def test_of_16_keyed_creates_across_two_processes_one_is_done_and_all_get_its_answer(
    two: list[Process], tmp_path: Path
) -> None:
    keyed = written("POST", TASKS, {"title": "once"}, "Idempotency-Key: k", user="alice")
    answers = at_once(two, [keyed] * 16, tmp_path / "taskd.db")
    assert {(answer.status_code, answer.content, answer.headers["etag"]) for answer in answers} == {
        (201, answers[0].content, answers[0].headers["etag"])
    }
    assert sum("idempotency-replayed" in answer.headers for answer in answers) == 15
    assert len(stored(tmp_path / "taskd.db")) == 1


def test_of_16_conditional_changes_across_two_processes_one_wins(
    two: list[Process], tmp_path: Path
) -> None:
    tag = create(two[0], 1).headers["etag"]
    puts = [
        written("PUT", f"{TASKS}/1", {"title": f"of {n}"}, f"If-Match: {tag}", user="alice")
        for n in range(16)
    ]
    answers = at_once(two, puts, tmp_path / "taskd.db")
    assert Counter(answer.status_code for answer in answers) == {200: 1, 412: 15}
    [won] = [answer.json for answer in answers if answer.status_code == 200]
    assert [server.request("GET", f"{TASKS}/1", headers=bearer()).json for server in two] == [
        won,
        won,
    ]


def test_users_of_two_processes_see_their_own_tasks_and_nothing_else(two: list[Process]) -> None:
    def live(user: str) -> list[int]:
        """Make changes, in turn at either process, and return the ids that must be left."""
        mine: list[int] = []
        for turn in range(12):
            server, other = two[turn % 2], two[1 - turn % 2]
            answer = server.request(
                "POST", f"/api/{user}/tasks", {"title": f"{user} {turn}"}, bearer(user)
            )
            mine.append(answer.json["id"])
            listed = other.request("GET", f"/api/{user}/tasks", headers=bearer(user)).json
            assert [(task["user_id"], task["id"]) for task in listed] == [
                (user, key) for key in mine
            ]
            foreign = other.request(
                "DELETE", f"/api/{user}/tasks/{mine[-1]}", headers=bearer(f"not-{user}")
            )
            assert foreign.status_code == 403
            stolen = other.request(
                "PUT", f"/api/thief/tasks/{mine[-1]}", {"title": "x"}, bearer("thief")
            )
            assert stolen.status_code == 404
            if turn % 3 == 2:
                assert (
                    other.request(
                        "DELETE", f"/api/{user}/tasks/{mine[0]}", headers=bearer(user)
                    ).status_code
                    == 200
                )
                del mine[0]
        return mine

    with ThreadPoolExecutor(8) as pool:
        left = list(pool.map(live, [f"user-{number}" for number in range(8)]))
    assert len({key for keys in left for key in keys}) == 8 * 8


def test_more_requests_at_once_than_connections_are_all_answered(
    start: Start, tmp_path: Path
) -> None:
    server = start(TASKD_THREADS="2")
    answers = at_once([server], [written("POST", TASKS, {"title": "x"}, user="alice")] * 64)
    assert {answer.status_code for answer in answers} == {201}
    open_sessions = "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database()"
    assert sql(tmp_path / "taskd.db", open_sessions)[0][0] <= 2 + 1


def test_a_sigterm_with_requests_waiting_in_the_threads_answers_them_all(
    two: list[Process], tmp_path: Path
) -> None:
    puts = [written("POST", TASKS, {"title": f"{number}"}, user="alice") for number in range(40)]
    with ThreadPoolExecutor(1) as pool:
        with locked(tmp_path / "taskd.db"):
            answering = pool.submit(at_once, [two[0]], puts)
            until(lambda: len(sql(tmp_path / "taskd.db", WAITING)) >= 20, "they wait for the lock")
            two[0].popen.terminate()
        statuses = [answer.status_code for answer in answering.result()]
    assert set(statuses) <= {201, 503}, "503 for those beyond the write queue"
    assert statuses.count(201) >= 20
    assert two[0].popen.wait(DEADLINE) == 0
    assert len(two[1].request("GET", TASKS, headers=bearer()).json) == statuses.count(201)


# --- Processors -----------------------------------------------------------------------------------

PROCESSORS = sorted(os.sched_getaffinity(0))
several = pytest.mark.skipif(len(PROCESSORS) < 2, reason="there is only one processor here")


def masks(server: Process) -> set[frozenset[int]]:
    """Return the processors that the threads of a process may use."""
    found = set()
    for thread in Path(f"/proc/{server.popen.pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            found.add(frozenset(os.sched_getaffinity(int(thread.name))))
    return found


def on(processor: int) -> set[frozenset[int]]:
    return {frozenset([processor])}


@several
def test_all_threads_use_the_same_processor_and_move_together_from_a_busy_one(start: Start) -> None:
    busy, other = PROCESSORS[:2]
    clock = f"taskd.busy_times = lambda: {{{busy}: taskd.time.monotonic(), {other}: 0}}"
    server = start(before=f"{clock}; taskd.BALANCE_INTERVAL = 0.5")
    at_once([server], [written("POST", TASKS, {"title": "x"}, user="alice")] * 16)
    until(lambda: masks(server) == on(other), "all of them are where nothing else runs")
    with pytest.raises(AssertionError, match="it moves"):
        until(lambda: masks(server) != on(other), "it moves", seconds=2)
    assert create(server, 1).status_code == 201


@several
@pytest.mark.slow
def test_a_loop_on_the_processor_of_taskd_makes_it_move(start: Start) -> None:
    server = start()
    create(server, 1)
    until(lambda: masks(server) in map(on, PROCESSORS), "all threads are on one processor")
    [[here]] = masks(server)
    before, started = taskd.busy_times(), time.monotonic()
    command = ["taskset", "-c", str(here), sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(command) as loop:
        try:
            until(lambda: on(here) != masks(server) in map(on, PROCESSORS), "it moves", seconds=8)
        except AssertionError:
            seconds = {one: busy - before[one] for one, busy in taskd.busy_times().items()}
            least = min(seconds[one] for one in PROCESSORS if one != here)
            if least > 0.6 * (time.monotonic() - started):
                pytest.skip("the other processors are busy too")
            raise
        finally:
            loop.kill()


@pytest.mark.parametrize("most", [1, 2])
def test_taskd_uses_only_the_processors_that_it_was_started_with(start: Start, most: int) -> None:
    allowed = PROCESSORS[-most:]
    server = start(before=f"os.sched_setaffinity(0, {allowed})")
    at_once([server], [written("POST", TASKS, {"title": "x"}, user="alice")] * 16)
    until(lambda: masks(server) in map(on, allowed), "all threads are on one of them")


def test_on_sqlite_taskd_uses_all_processors(start: Start, tmp_path: Path) -> None:
    server = start(DATABASE_URL=f"sqlite:///{tmp_path}/own.db")
    assert {create(server, number).status_code for number in range(3)} == {201}
    assert masks(server) == {frozenset(PROCESSORS)}


# --- What is kept ---------------------------------------------------------------------------------


def test_titles_are_sorted_by_code_point_whatever_the_language_of_the_server(
    cluster: Cluster, make_app: Callable[..., taskd.App]
) -> None:
    german = made(cluster.url(), "TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'de-DE'")
    assert ask(german, "SELECT 'B' > 'a'") == [(True,)], (
        "this server would sort otherwise by itself"
    )
    alice = Person(testing.TestClient(make_app(database_url=german)), "alice")
    titles = [*"bBaAäéßZ_~9", "a\u0308", "ss", " x", "10", "\uffee", "\U0001f600"]
    for title in titles:
        alice.add(title=title)
    for sort, wanted in (("title", sorted(titles)), ("-title", sorted(titles, reverse=True))):
        assert [
            task["title"] for task in alice.call("GET", query_string=f"sort={sort}").json
        ] == wanted
        paged = alice.call("GET", query_string=f"sort={sort}&limit=5")
        assert [task["title"] for task in paged.json] == wanted[:5]


@pytest.mark.parametrize(
    "user", ["%", "' OR ''='", "\\", "%s %(id)s :id", "\u202e\U0001f600", "x" * 1000]
)
def test_users_with_odd_names_keep_their_tasks(client: testing.TestClient, user: str) -> None:
    path = f"/api/{quote(user, safe='')}/tasks"
    title = "".join(chr(0x1F300 + number) for number in range(200))  # four bytes each
    created = client.simulate_post(
        path, headers=bearer(user) | {"Idempotency-Key": "k" * 255}, json={"title": title}
    )
    assert created.status_code == 201, created.text
    assert client.simulate_get(path, headers=bearer(user)).json == [created.json]
    assert client.simulate_get(path, params={"q": title[:9]}, headers=bearer(user)).json == [
        created.json
    ]


def test_the_longest_user_id_and_title_fit_into_the_indexes_even_if_nothing_repeats_in_them(
    client: testing.TestClient,
) -> None:
    user = os.urandom(500).hex()  # 1,000 bytes: Better Auth's have 32
    title = "".join(chr(0x20000 + int.from_bytes(os.urandom(2))) for _ in range(200))
    headers = bearer(user) | {"Idempotency-Key": os.urandom(127).hex()}
    assert (
        client.simulate_post(
            f"/api/{user}/tasks", headers=headers, json={"title": title}
        ).status_code
        == 201
    )


@pytest.mark.parametrize(
    "user", ["\0", "alice\0", os.urandom(2000).hex()], ids=["a NUL", "one at the end", "too long"]
)
def test_a_user_id_that_postgresql_cannot_store_is_403_and_stops_nobody(
    client: testing.TestClient, alice: Person, user: str
) -> None:
    path = f"/api/{quote(user, safe='')}/tasks"
    for headers in ({}, {"Idempotency-Key": "k"}):
        response = client.simulate_post(
            path, headers=bearer(user, email=None, name=None) | headers, json={"title": "x"}
        )
        assert "too long or contains U+0000" in assert_problem(response, 403)["detail"]
    assert client.simulate_get(path, headers=bearer(user, email=None, name=None)).status_code in (
        200,
        403,
    )
    assert alice.call("GET").json == []
    assert alice.add()["user_id"] == "alice"


# --- taskctl --------------------------------------------------------------------------------------


def test_taskctl_makes_no_tables_where_it_only_looks(
    cluster: Cluster, empty: str, tmp_path: Path
) -> None:
    made_empty = made(cluster.url())
    for command in (["users"], ["stats"], ["export"], ["purge", "alice", "--yes"]):
        ended = run(tmp_path, "taskctl", *command, DATABASE_URL=empty)
        assert ended.returncode == 1
        assert "there is no database" in ended.stderr
    for said in ("created", "is there already"):
        ended = run(tmp_path, "taskctl", "init", DATABASE_URL=made_empty)
        assert said in ended.stderr.splitlines()[-1]
    ended = run(tmp_path, "taskctl", "check", "--json", DATABASE_URL=empty)
    found = {row["found"]: row["result"] for row in taskd.json.loads(ended.stdout)}
    assert found["no tables yet; taskd makes them at its start"] == "warning"
    assert ask(empty, "SELECT to_regclass('task')::text") == [(None,)]


def test_taskctl_shows_and_seeds_what_taskd_serves(start: Start, tmp_path: Path) -> None:
    server = start()

    def taskctl(*arguments: str) -> Any:
        ended = run(
            tmp_path,
            "taskctl",
            *arguments,
            "--json",
            DATABASE_URL=database_url(tmp_path / "taskd.db"),
        )
        assert (ended.returncode, ended.stderr) == (0, "")
        return taskd.json.loads(ended.stdout)

    assert taskctl("seed", "alice", "bob", "--count", "3") == {"users": 2, "tasks": 6}
    listed = server.request("GET", TASKS, headers=bearer()).json
    assert taskctl("tasks", "alice") == listed
    done = {user["user_id"]: (user["tasks"], user["done"]) for user in taskctl("users")}
    assert done["alice"] == (3, sum(task["completed"] for task in listed))
    assert set(done) == {"alice", "bob"}
    [[result]] = [[row["result"] for row in taskctl("check") if "postgresql:" in row["about"]]]
    assert result == "ok"
    assert {name: taskctl("stats")[name] for name in ("users", "tasks")} == {"users": 2, "tasks": 6}
    assert all(row["result"] == "ok" for row in taskctl("smoke", f"http://127.0.0.1:{server.port}"))
    assert server.request("GET", TASKS, headers=bearer()).json == listed
    assert create(server, 1).json["id"] > 6


def test_taskctl_imports_new_tasks_after_those_that_are_there(start: Start, tmp_path: Path) -> None:
    server = start()
    first = create(server, 1).json["id"]
    (tmp_path / "new.jsonl").write_text('{"user_id": "alice", "title": "New"}\n' * 2)
    for _ in range(2):
        url = database_url(tmp_path / "taskd.db")
        ended = run(tmp_path, "taskctl", "import", "--new", "new.jsonl", DATABASE_URL=url)
        assert (ended.returncode, ended.stderr) == (0, "taskctl: 2 imported\n")
    ids = [task["id"] for task in server.request("GET", TASKS, headers=bearer()).json]
    assert ids == list(range(first, first + 5))
    assert create(server, 2).json["id"] == first + 5


@pytest.mark.parametrize("meanwhile", [5, 12])
def test_an_import_never_sets_the_sequence_of_ids_back(
    app: taskd.App, alice: Person, monkeypatch: pytest.MonkeyPatch, meanwhile: int
) -> None:
    def last_id(*arguments: Any) -> int:
        monkeypatch.setattr(taskctl, "last_id", read)
        found = read(*arguments)
        ids.extend(alice.add()["id"] for _ in range(meanwhile))
        return found

    ids = [alice.add()["id"]]
    read = taskctl.last_id
    for last in (ids[0], ids[0] + 10 + meanwhile):
        monkeypatch.setattr(taskctl, "last_id", last_id)
        opened = app.store._database
        with opened.transaction():
            taskctl.raise_last_id(opened.peewee, taskd.Task, last)
            ids.append(alice.add()["id"])
    assert ids == sorted(set(ids))


def test_an_import_does_not_overwrite_a_task_that_is_created_meanwhile(
    start: Start, tmp_path: Path
) -> None:
    server = start()
    task = create(server, 1).json
    newer = task | {"id": task["id"] + 1, "updated_at": "2126-01-01T00:00:00.000Z"}
    (tmp_path / "tasks.jsonl").write_bytes(taskd.to_json(newer))
    url = database_url(tmp_path / "taskd.db")
    with psycopg.connect(url) as other, ThreadPoolExecutor(1) as pool:
        columns = "user_id, title, completed, tags, created_at, updated_at, version"
        values = "'bob', title, completed, tags, 'now', updated_at, version"
        extra = ", ".join(f"{name}_folded" for name in taskd.SEARCHED)
        select = f"SELECT {values}, {extra} FROM task"
        other.execute(f"INSERT INTO task ({columns}, {extra}) {select}".encode())
        arguments = ("taskctl", "import", "tasks.jsonl")
        ending = begun(pool, url, run, tmp_path, *arguments, DATABASE_URL=url)
        other.commit()
    ended = ending.result()
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.endswith("; nothing was imported; repeat it\n")
    assert stored(tmp_path / "taskd.db")[newer["id"]]["user_id"] == "bob"


def test_a_purge_leaves_a_task_that_is_created_meanwhile_its_key(
    empty: str, start: Start, tmp_path: Path
) -> None:
    server = start(DATABASE_URL=empty)
    create(server, 1, "old")
    with psycopg.connect(empty) as other, ThreadPoolExecutor(1) as pool:
        other.execute("SELECT 1 FROM task FOR UPDATE")
        arguments = ("taskctl", "purge", "alice", "--yes")
        ending = begun(pool, empty, run, tmp_path, *arguments, DATABASE_URL=empty)
        assert create(server, 2, "new").status_code == 201
        other.rollback()
    assert ending.result().returncode == 0
    repeated = create(server, 2, "new")
    assert (repeated.status_code, repeated.headers["idempotency-replayed"]) == (201, "true")
    assert ask(empty, "SELECT title FROM task") == [("Task 2",)]


def test_an_export_says_in_one_line_that_its_connection_was_lost(
    start: Start, tmp_path: Path
) -> None:
    create(start(), "x" * 190)
    url, more = database_url(tmp_path / "taskd.db"), "FROM task, generate_series(1000, 30000) n"
    columns = ", ".join(name for name in taskd.Task._meta.fields if name != "id")
    sql(tmp_path / "taskd.db", f"INSERT INTO task (id, {columns}) SELECT n, {columns} {more}")
    command = [sys.executable, str(ROOT / "taskctl.py"), "export"]
    variables = environment(BETTER_AUTH_SECRET=SECRET, DATABASE_URL=url)
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=variables, **streams) as export:
        assert export.stdout
        export.stdout.readline()
        there = "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        ask(url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity {there}")
        _, messages = export.communicate(timeout=DEADLINE)
    assert (export.returncode, messages.count("\n")) == (1, 1), messages
    assert messages.startswith("taskctl: the database cannot be used: ")


def test_taskctl_says_in_one_line_what_postgresql_cannot_store(
    tmp_path: Path, start: Start
) -> None:
    start()
    user, url = os.urandom(2000).hex(), database_url(tmp_path / "taskd.db")
    ended = run(tmp_path, "taskctl", "seed", user, DATABASE_URL=url)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert ended.stderr.startswith("taskctl: the database cannot be used: index row")
    own = f"sqlite:///{tmp_path / 'own.db'}"
    assert run(tmp_path, "taskctl", "seed", user, DATABASE_URL=own).returncode == 0
    ended = run(tmp_path, "taskctl", "copy", own, url)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert ended.stderr.startswith("taskctl: the database cannot be used: index row")
    assert stored(tmp_path / "taskd.db") == {}


@pytest.mark.parametrize("arguments", [["backup", "copy.db"], ["restore", "copy.db"]])
def test_taskctl_says_that_pg_dump_is_the_way(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "copy.db").touch()
    ended = run(tmp_path, "taskctl", *arguments, DATABASE_URL=database_url(tmp_path / "taskd.db"))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "pg_dump" in ended.stderr
    assert ended.stderr.count("\n") == 1

"""What the role, the database, the environment or a pooler set for a session does no harm."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

import taskd
from cluster import Cluster, _exists, free_port
from conftest import DIRECTORY
from support import DEADLINE, SECRET, Process, at_once, bearer, until, written
from test_postgresql import create, made, run

pytestmark = pytest.mark.postgresql

Start = Callable[..., Process]
TASKS = "/api/alice/tasks"
TABLES = "SELECT schemaname FROM pg_tables WHERE tablename IN ('task', 'about', 'idempotency_key')"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A server for these tests only, because roles and their settings are the server's."""
    cluster = Cluster("fsync=off", "listen_addresses=*", within=os.environ[DIRECTORY])
    yield cluster
    cluster.remove()


@pytest.fixture
def empty(cluster: Cluster) -> str:
    return made(cluster.url())


def execute(url: str, *statements: str) -> list[Any]:
    """Run statements, and return the rows of the last one."""
    with psycopg.connect(url, autocommit=True) as session:
        for statement in statements:
            cursor = session.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


IN_OWN = "options=-c%20search_path%3Down"


@pytest.mark.parametrize(
    ("query", "variables"),
    [
        (f"?{IN_OWN}", {}),
        ("", {"PGOPTIONS": "-c search_path=own"}),
        (f"?{IN_OWN}%20-c%20geqo%3Doff", {"PGOPTIONS": "-c search_path=public"}),
    ],
    ids=["in the URL", "in the environment", "in both"],
)
def test_options_are_honoured_and_the_tables_land_in_that_schema(
    empty: str, start: Start, tmp_path: Path, query: str, variables: dict[str, str]
) -> None:
    execute(empty, "CREATE SCHEMA own")
    server = start(DATABASE_URL=empty + query, **variables)
    assert create(server, 1, "key").status_code == 201
    assert create(server, 1, "key").headers["idempotency-replayed"] == "true"
    assert server.request("GET", "/readyz").status_code == 200
    assert set(execute(empty, TABLES)) == {("own",)}
    ended = run(tmp_path, "taskctl", "stats", DATABASE_URL=empty + query, **variables)
    assert (ended.returncode, ended.stderr) == (0, "")
    again = start(DATABASE_URL=empty + query, **variables)
    assert len(again.request("GET", TASKS, headers=bearer()).json) == 1


def test_a_search_path_of_the_role_is_honoured(empty: str, start: Start) -> None:
    name = empty.rpartition("/")[2]
    execute(empty, "CREATE SCHEMA own", f"ALTER DATABASE {name} SET search_path = own, public")
    assert create(start(DATABASE_URL=empty), 1).status_code == 201
    assert set(execute(empty, TABLES)) == {("own",)}


def test_a_schema_that_came_in_front_of_the_tables_is_refused_and_stays_empty(
    empty: str, start: Start, tmp_path: Path
) -> None:
    assert create(start(DATABASE_URL=empty), 1).status_code == 201
    execute(empty, "CREATE SCHEMA taskd")  # named as the user, it is the first that is searched
    ended = run(tmp_path, "taskd", DATABASE_URL=empty)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "search path" in ended.stderr
    assert set(execute(empty, TABLES)) == {("public",)}


def test_a_search_path_without_a_schema_is_refused_in_one_line(empty: str, tmp_path: Path) -> None:
    ended = run(tmp_path, "taskd", DATABASE_URL=f"{empty}?options=-csearch_path%3Dnowhere")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "schema" in ended.stderr


ROLE = (  # defaults that a role or a database may have
    "default_transaction_isolation = 'serializable'",
    "statement_timeout = '1ms'",
    "synchronous_commit = off",
    "client_encoding = 'LATIN1'",
    "standard_conforming_strings = off",
    "default_transaction_deferrable = on",
    "DateStyle = 'German'",
    "quote_all_identifiers = on",
)


def test_defaults_of_the_role_change_nothing(empty: str, start: Start) -> None:
    name = empty.rpartition("/")[2]
    for default in ROLE:
        execute(empty, "SET statement_timeout = 0", f"ALTER DATABASE {name} SET {default}")
    server = start(DATABASE_URL=empty, TASKD_THREADS="30", PGCLIENTENCODING="LATIN1")
    body = {"title": "🌧 Σίσυφος", "description": "C:\\new"}
    requests = [
        written("POST", TASKS, body, f"Idempotency-Key: key-{number}", user="alice")
        for number in range(40)
        for _ in range(2)
    ]
    answers = at_once([server], requests)
    assert Counter(answer.status_code for answer in answers) == {201: 80}
    shown = server.request("GET", TASKS, headers=bearer()).json
    assert [(task["title"], task["description"]) for task in shown] == [tuple(body.values())] * 40
    with closing(psycopg.connect(empty, options="-c statement_timeout=0")) as session:
        [(plan,)] = session.execute("SELECT current_setting('synchronous_commit')").fetchall()
    assert plan == "off", "it was the default of the database"


def test_a_commit_is_on_disk_even_if_the_server_is_told_otherwise_later(empty: str) -> None:
    settings = taskd.Settings(secret=SECRET, database_url=empty)
    with closing(taskd.open_database(settings)) as database:
        shown = "SELECT current_setting('synchronous_commit'), pg_backend_pid()"
        [(before, backend)] = database.run(shown)
        execute(empty, "ALTER SYSTEM SET synchronous_commit = off", "SELECT pg_reload_conf()")
        try:
            until(
                lambda: execute(empty, "SHOW synchronous_commit") == [("off",)], "it is turned off"
            )
            assert database.run(shown) == [(before, backend)] == [("on", backend)]
        finally:
            execute(empty, "ALTER SYSTEM RESET synchronous_commit", "SELECT pg_reload_conf()")


def test_rows_of_a_server_that_stops_are_waited_for_once(empty: str) -> None:
    settings = taskd.Settings(secret=SECRET, database_url=empty)
    with closing(taskd.Postgres(settings, statement_timeout=8)) as database:
        database._pool.answer_timeout = 0.5
        with closing(database.rows("SELECT generate_series(1, 1000)")) as rows:
            assert next(rows) == (1,)
        [[backend]] = database.run("SELECT pg_backend_pid()")
        assert len(database._pool._idle) == 1, "it is used again"
        os.kill(backend, signal.SIGSTOP)
        try:
            started = time.monotonic()
            with pytest.raises(taskd.Unavailable):
                list(database.rows("SELECT generate_series(1, 1000)"))
            assert time.monotonic() - started < 1.2, "one time-out, and not three"
        finally:
            os.kill(backend, signal.SIGCONT)


def test_a_start_needs_one_connection_however_long_that_takes(
    empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = taskd.PostgresPool.new_connection

    def connect_slowly(pool: taskd.PostgresPool) -> Any:
        time.sleep(taskd.CONNECT_WAIT + 0.3)
        return connect(pool)

    monkeypatch.setattr(taskd.PostgresPool, "new_connection", connect_slowly)
    app = taskd.create_app(taskd.Settings(secret=SECRET, database_url=empty))
    with closing(app.database):
        assert app.store.get("alice", 1) is None


def test_sorted_lists_run_in_the_threads_for_searches(
    empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = taskd.Settings(secret=SECRET, database_url=empty)
    with closing(taskd.open_database(settings)) as database:
        store, listing = taskd.TaskStore(database), taskd.Listing(sort="title")
        with store.page_reader("alice", listing) as read:
            assert read(listing) == (b"[]", None)
        monkeypatch.setattr(taskd.thread_state, "in_event_loop", True)
        with pytest.raises(taskd.SearchWouldBlock), store.page_reader("alice", listing):
            pass


def test_a_role_that_may_only_read_finds_that_the_schema_fits(empty: str, tmp_path: Path) -> None:
    with closing(taskd.open_database(taskd.Settings(secret=SECRET, database_url=empty))):
        pass
    role = f"reader_{time.monotonic_ns()}"
    execute(empty, f"CREATE ROLE {role} LOGIN")
    execute(empty, f"GRANT SELECT ON task, idempotency_key, about TO {role}")
    url = f"{empty}?user={role}" if "@" not in empty else re.sub("//[^@]*@", f"//{role}@", empty)
    for command in ("stats", "users", "check"):
        ended = run(tmp_path, "taskctl", command, DATABASE_URL=url)
        assert "does not fit" not in ended.stdout + ended.stderr
        assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_of_another_encoding_is_refused_in_one_line(
    cluster: Cluster, tmp_path: Path, encoding: str
) -> None:
    url = made(cluster.url(), f"ENCODING {encoding} TEMPLATE template0")
    for program, arguments in (("taskd", []), ("taskctl", ["stats"])):
        ended = run(tmp_path, program, *arguments, DATABASE_URL=url)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr.count("\n") == 1, ended.stderr
        assert f"has the encoding {encoding}, and taskd needs UTF8" in ended.stderr
    assert execute(url, TABLES) == []


def test_a_server_elsewhere_without_tls_is_warned_of_and_one_here_is_not(
    cluster: Cluster, empty: str, start: Start
) -> None:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but its loopback one")
        address = probe.getsockname()[0]
    rules = cluster.directory / "data" / "pg_hba.conf"
    rules.write_text(f"host all all {address}/32 trust\n{rules.read_text()}")
    execute(cluster.url(), "SELECT pg_reload_conf()")
    warning = "is not encrypted on its way"
    assert warning not in start(DATABASE_URL=empty).log
    elsewhere = empty.replace("127.0.0.1", address)
    until(lambda: _connects(elsewhere), "the server has read its rules")
    server = start(DATABASE_URL=elsewhere, TASKD_LOG_FORMAT="json")
    assert server.log.count(warning) == 1
    assert server.log.startswith("{")


def _connects(url: str) -> bool:
    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError:
        return False
    return True


def test_a_connect_timeout_of_the_url_is_honoured(tmp_path: Path) -> None:
    with closing(socket.socket()) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"postgresql://127.0.0.1:{silent.getsockname()[1]}/x?connect_timeout=2"
        started = time.monotonic()
        ended = run(tmp_path, "taskd", DATABASE_URL=url + "&gssencmode=disable")
        assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
        assert time.monotonic() - started < DEADLINE / 2


# --- PgBouncer ------------------------------------------------------------------------------------


@contextmanager
def pgbouncer(cluster: Cluster, database: str, mode: str) -> Iterator[str]:
    """Run a PgBouncer with its defaults, and give the address of a database behind it."""
    if not shutil.which("pgbouncer"):
        pytest.skip("PgBouncer is not installed here")
    port = free_port()
    # Not in tmp_path, because every run of pytest closes the directories above that to others.
    with tempfile.TemporaryDirectory(prefix="taskd-pgbouncer-") as name:
        directory = Path(name)
        (directory / "users").write_text('"taskd" ""\n')
        (directory / "pgbouncer.ini").write_text(
            f"[databases]\n* = host=127.0.0.1 port={cluster.port}\n[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = trust\n"
            f"auth_file = {directory}/users\npool_mode = {mode}\ndefault_pool_size = 40\n"
        )
        command = ["setpriv", "--pdeathsig=KILL", "pgbouncer", str(directory / "pgbouncer.ini")]
        if os.geteuid() == 0:
            user = next(name for name in ("postgres", "nobody") if _exists(name))
            command[1:1] = [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
            for place in (directory, *directory.iterdir()):
                place.chmod(0o755 if place.is_dir() else 0o644)
        with (directory / "log").open("wb") as log:
            pooler = subprocess.Popen(command, stdout=log, stderr=log)
        url = database.replace(f":{cluster.port}/", f":{port}/")
        until(lambda: pooler.poll() is not None or _connects(url), "PgBouncer listens")
        assert pooler.poll() is None, (directory / "log").read_text()
        try:
            yield url
        finally:
            pooler.kill()
            pooler.wait()


@pytest.fixture
def pooled(cluster: Cluster, empty: str) -> Iterator[str]:
    """The address of an empty database behind a PgBouncer in session mode."""
    with pgbouncer(cluster, empty, "session") as url:
        yield url


def test_behind_pgbouncer_in_transaction_mode_it_does_not_start_however_busy_that_is(
    cluster: Cluster, empty: str, tmp_path: Path
) -> None:
    with pgbouncer(cluster, empty, "transaction") as url, ExitStack() as others:
        for busy in range(3):
            ended = run(tmp_path, "taskd", DATABASE_URL=url)
            assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
            assert "is behind a pooler that is not in session mode" in ended.stderr, busy
            others.enter_context(running("SELECT pg_sleep(0.001)", url))
            others.enter_context(running("SELECT 1", url))
    assert execute(empty, TABLES) == []


@contextmanager
def running(statement: str, url: str) -> Iterator[None]:
    """Run a statement again and again."""
    enough = threading.Event()

    def run_it() -> None:
        with psycopg.connect(url, autocommit=True, prepare_threshold=None) as session:
            while not enough.is_set():
                session.execute(statement.encode())

    with ThreadPoolExecutor(1) as pool:
        repeated = pool.submit(run_it)
        try:
            yield
        finally:
            enough.set()
    repeated.result()


def test_behind_pgbouncer_in_session_mode_it_serves(
    pooled: str, empty: str, start: Start, tmp_path: Path
) -> None:
    server = start(DATABASE_URL=pooled, TASKD_THREADS="6")
    for number in range(12):
        assert create(server, number, f"key-{number}").status_code == 201
        assert create(server, number, f"key-{number}").headers["idempotency-replayed"] == "true"
    requests = [written("PATCH", f"{TASKS}/1/complete", user="alice") for _ in range(40)]
    assert Counter(answer.status_code for answer in at_once([server], requests)) == {200: 40}
    assert server.request("GET", f"{TASKS}/1", headers=bearer()).json["completed"] is False
    assert server.request("GET", "/readyz").status_code == 200
    assert server.terminate() == 0
    ended = run(tmp_path, "taskctl", "stats", DATABASE_URL=pooled)
    assert (ended.returncode, ended.stderr) == (0, "")
    again = start(DATABASE_URL=pooled, TASKD_THREADS="6")
    assert len(again.request("GET", TASKS, headers=bearer()).json) == 12
    assert execute(empty, "SELECT count(*) FROM task") == [(12,)]


@pytest.fixture
def four(pooled: str, start: Start) -> list[Process]:
    """Four taskd behind one PgBouncer, which has a connection to PostgreSQL for each of theirs."""
    return [start(DATABASE_URL=pooled, TASKD_THREADS="6") for _ in range(4)]


def test_behind_pgbouncer_every_toggle_of_a_storm_across_four_processes_counts(
    four: list[Process], empty: str
) -> None:
    create(four[0], 1)
    toggle = written("PATCH", f"{TASKS}/1/complete", user="alice")
    answers = at_once(four, [toggle] * 41)
    assert Counter(answer.json["completed"] for answer in answers) == {True: 21, False: 20}
    assert execute(empty, "SELECT completed, version FROM task") == [(True, 42)]


def test_behind_pgbouncer_of_16_keyed_creates_across_four_processes_one_is_done(
    four: list[Process], empty: str
) -> None:
    keyed = written("POST", TASKS, {"title": "once"}, "Idempotency-Key: k", user="alice")
    answers = at_once(four, [keyed] * 16)
    assert {(answer.status_code, answer.content) for answer in answers} == {
        (201, answers[0].content)
    }
    assert sum("idempotency-replayed" in answer.headers for answer in answers) == 15
    assert execute(empty, "SELECT count(*) FROM task") == [(1,)]


def test_behind_pgbouncer_no_user_sees_or_changes_a_task_of_another_across_four_processes(
    four: list[Process], empty: str
) -> None:
    users = [f"user{number}" for number in range(8)]
    creates = [
        written("POST", f"/api/{user}/tasks", {"title": user}, "Idempotency-Key: same", user=user)
        for user in users
    ]
    ids = [answer.json["id"] for answer in at_once(four, creates)]
    assert len(set(ids)) == len(users)
    for server in four:
        for user, task in zip(users, ids, strict=True):
            own = f"/api/{user}/tasks"
            listed = server.request("GET", own, headers=bearer(user)).json
            assert [(shown["id"], shown["title"]) for shown in listed] == [(task, user)]
            other = ids[ids.index(task) - 1]
            for method in ("GET", "DELETE"):
                answer = server.request(method, f"{own}/{other}", headers=bearer(user))
                assert answer.status_code == 404
            assert server.request("GET", own, headers=bearer("mallory")).status_code == 403
    assert execute(empty, "SELECT count(*) FROM task WHERE user_id = title") == [(len(users),)]

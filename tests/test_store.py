"""The database: it fits, it keeps users apart, and what happens when it cannot be used."""

from __future__ import annotations

import itertools
import json
import re
import resource
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import peewee
import pytest
from falcon import testing

import taskd
from conftest import Person
from event_loop import commit
from support import DEADLINE, NEW_TASK, ROOT, SECRET, assert_problem, bearer

pytestmark = pytest.mark.sqlite("it is about SQLite's file, locks and pragmas")

SCHEMA = (ROOT / "schema.sql").read_text()
GOOD = (
    " ".join(re.sub("--.*", "", SCHEMA).split())
    + f" INSERT INTO about VALUES ({taskd.VERSION}, 'secret');"
)


def altered(old: str, new: str) -> str:
    """Return the statements of a database with one difference."""
    assert old in GOOD
    return GOOD.replace(old, new, 1)


@pytest.fixture
def path(tmp_path):
    """The path of the database of these tests."""
    return tmp_path / "taskd.db"


@pytest.fixture
def small_patience(monkeypatch):
    """Make applications wait briefly for a lock; name this fixture before `app`."""
    monkeypatch.setattr(taskd, "LOCK_TIMEOUT", 0.05)


@contextmanager
def connected(path, **options):
    with closing(sqlite3.connect(path, isolation_level=None, **options)) as connection:
        yield connection


def make_database(path, statements, journal="DELETE"):
    with connected(path) as connection:
        connection.execute(f"PRAGMA journal_mode={journal}")
        connection.executescript(statements)


def columns(path, table="task"):
    """Return name, type, NOT NULL and primary key of a table's columns from SQLite."""
    with connected(path) as connection:
        return [
            (name, kind, bool(required), bool(key))
            for _, name, kind, required, _, key in connection.execute(f"PRAGMA table_info({table})")
        ]


def databases(store):
    """Return the databases that the store uses, on which this thread has its connections."""
    return [value for value in vars(store._database).values() if isinstance(value, peewee.Database)]


def assert_unavailable(response):
    problem = assert_problem(response, 503)
    assert problem["title"] == "Service Unavailable"
    assert int(response.headers["retry-after"]) >= 1
    for hidden in ("sqlite", "locked", "disk", "readonly", "read-only", ".db", "malformed"):
        assert hidden not in response.text.lower()


def every_write(person, number):
    """Send every request that writes."""
    return [
        person.call("POST", json={"title": "x"}),
        person.call("PUT", f"/{number}", json={"title": "x"}),
        person.call("PATCH", f"/{number}/complete"),
        person.call("PATCH", f"/{number}/complete", json={"completed": True}),
        person.call("DELETE", f"/{number}"),
    ]


# --- The schema -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [taskd.Task, taskd.IdempotencyKey, taskd.About])
def test_the_peewee_models_and_schema_sql_are_the_same_tables(tmp_path, model):
    make_database(tmp_path / "schema.db", SCHEMA)
    database = peewee.SqliteDatabase(tmp_path / "model.db")
    with database.bind_ctx([model]):
        database.create_tables([model])
    database.close()
    table = model._meta.table_name
    of_schema, of_model = (
        sorted(columns(tmp_path / name, table)) for name in ("schema.db", "model.db")
    )
    assert [row[0] for row in of_schema] == [row[0] for row in of_model]
    for (name, kind, required, key), (_, *of_model_column) in zip(of_schema, of_model, strict=True):
        model_kind, model_required, model_key = of_model_column
        assert (name, key) == (name, model_key)
        assert key or required == model_required
        # Peewee calls a boolean of SQLite an integer.
        assert model_kind == {"BOOLEAN": "INTEGER"}.get(kind, kind)


def test_a_new_database_has_the_schema_of_schema_sql(app, path, tmp_path):
    make_database(tmp_path / "schema.db", SCHEMA)
    with connected(path) as found, connected(tmp_path / "schema.db") as wanted:
        query = "SELECT type, name, sql FROM sqlite_master ORDER BY name"
        assert found.execute(query).fetchall() == wanted.execute(query).fetchall()
    assert columns(path) == [
        ("id", "INTEGER", False, True),
        ("user_id", "TEXT", True, False),
        ("title", "TEXT", True, False),
        ("description", "TEXT", False, False),
        ("completed", "BOOLEAN", True, False),
        ("priority", "TEXT", False, False),
        ("due_date", "TEXT", False, False),
        ("tags", "TEXT", True, False),
        ("created_at", "TEXT", True, False),
        ("updated_at", "TEXT", True, False),
        ("version", "INTEGER", True, False),
        ("title_folded", "TEXT", True, False),
        ("description_folded", "TEXT", False, False),
        ("tags_folded", "TEXT", True, False),
    ]


def test_ids_are_autoincrement(app, path):
    with connected(path) as connection:
        assert (
            "AUTOINCREMENT"
            in connection.execute("SELECT sql FROM sqlite_master WHERE name='task'").fetchone()[0]
        )
        assert connection.execute("SELECT count(*) FROM sqlite_sequence").fetchone() == (0,)


def test_a_new_database_is_readable_by_its_owner_alone(app, alice, path):
    alice.add()
    files = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert files["taskd.db"] == 0o600
    assert set(files.values()) == {0o600}, files


def test_the_mode_of_an_old_database_is_left_alone(make_app, path):
    make_database(path, GOOD)
    path.chmod(0o640)
    make_app()
    assert path.stat().st_mode & 0o777 == 0o640


def test_every_connection_writes_ahead_and_syncs_fully(app, alice, path):
    alice.add()
    assert databases(app.store)
    for database in databases(app.store):
        assert database.execute_sql("PRAGMA journal_mode").fetchone() == ("wal",)
        assert database.execute_sql("PRAGMA synchronous").fetchone() == (2,)  # FULL
    with ThreadPoolExecutor(1) as pool:  # a connection of another thread

        def pragmas():
            try:
                return [
                    database.execute_sql("PRAGMA synchronous").fetchone()
                    for database in databases(app.store)
                ]
            finally:
                app.database.close()

        assert pool.submit(pragmas).result() == [(2,)] * len(databases(app.store))


DIFFERENT = {  # the statements of a database, and what the message must name
    "another table": ("CREATE TABLE task (x INTEGER);", ["user_id", "title"]),
    "no description": (altered("description TEXT,", ""), ["description"]),
    "no completed": (
        re.sub(
            "CREATE INDEX task_completed.*?;",
            "",
            altered("completed BOOLEAN NOT NULL DEFAULT FALSE,", ""),
        ),
        ["task.completed"],
    ),
    "no version": (altered("version INTEGER NOT NULL DEFAULT 1,", ""), ["task.version"]),
    "an extra column": (altered("title TEXT", "colour INTEGER, title TEXT"), ["colour"]),
    "an extra column that is required": (
        altered("title TEXT", "colour INTEGER NOT NULL, title TEXT"),
        ["colour"],
    ),
    "a column of another type": (altered("title TEXT", "title BLOB"), ["title", "BLOB"]),
    "a time that is a number": (altered("created_at TEXT", "created_at REAL"), ["created_at"]),
    "an owner that is a number": (altered("user_id TEXT", "user_id INTEGER"), ["user_id"]),
    "an owner that may be null": (altered("user_id TEXT NOT NULL", "user_id TEXT"), ["user_id"]),
    "a description that may not": (
        altered("description TEXT", "description TEXT NOT NULL"),
        ["description"],
    ),
    "an owner without case": (
        altered("user_id TEXT NOT NULL", "user_id TEXT NOT NULL COLLATE NOCASE"),
        ["user_id"],
    ),
    "a column of another name": (
        altered("completed BOOLEAN", "done BOOLEAN").replace(", completed", ", done"),
        ["done"],
    ),
    "no index": (altered("CREATE INDEX task_id ON task (user_id, id);", ""), ["index", "task_id"]),
    "an index on another column": (
        altered("task_id ON task (user_id, id)", "task_id ON task (title)"),
        ["index task_id"],
    ),
    "an index the other way round": (
        altered("ON task (user_id, id)", "ON task (id, user_id)"),
        ["index task_id"],
    ),
    "ids that are used again": (altered(" AUTOINCREMENT", ""), ["task.id"]),
    "ids that are used again, beside others that are not": (
        "CREATE TABLE other (id INTEGER PRIMARY KEY AUTOINCREMENT);"
        + altered(" AUTOINCREMENT", ""),
        ["id"],
    ),
    "ids that are no key": (
        "CREATE TABLE other (id INTEGER PRIMARY KEY AUTOINCREMENT);"
        + altered(" PRIMARY KEY AUTOINCREMENT", ""),
        ["id"],
    ),
    "keys that are not their user's": (
        altered("UNIQUE (user_id, name)", "UNIQUE (name)"),
        ["it lacks idempotency_key.UNIQUE (user_id, name;"],
    ),
    "a cursor key that may be null": (
        altered("cursor_key TEXT NOT NULL", "cursor_key TEXT"),
        ["about.cursor_key"],
    ),
}


@pytest.mark.parametrize("journal", ["DELETE", "WAL"])
@pytest.mark.parametrize("name", DIFFERENT)
def test_a_database_that_does_not_fit_is_refused_by_name_and_left_as_it_was(
    make_app, path, name, journal
):
    statements, named = DIFFERENT[name]
    make_database(path, statements, journal)
    before, files = path.read_bytes(), sorted(file.name for file in path.parent.iterdir())
    with pytest.raises(taskd.DatabaseError) as caught:
        make_app()
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert "schema.sql" in message
    assert all(word in message for word in named), message
    assert path.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == files


@pytest.mark.parametrize(
    "content",
    [
        b"This is a letter to my grandmother.\n",
        b"\x89PNG\r\n\x1a\n" + b"x" * 5000,
        b"SQLite format 2\0" + b"\0" * 5000,
    ],
    ids=["text", "picture", "older"],
)
def test_a_file_that_is_not_a_database_is_rejected_and_not_changed(make_app, path, content):
    path.write_bytes(content)
    with pytest.raises(taskd.DatabaseError) as caught:
        make_app()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == ["taskd.db"]


def test_a_directory_that_does_not_exist_is_refused_and_not_made(make_app, tmp_path):
    with pytest.raises(taskd.DatabaseError, match=r": .*nowhere.$"):  # and not the file in it
        make_app(database_url=f"sqlite:///{tmp_path}/nowhere/taskd.db")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_in_the_databases_place_is_refused(make_app, path):
    path.mkdir()
    with pytest.raises(taskd.DatabaseError, match=re.escape(str(path))):
        make_app()
    assert list(path.iterdir()) == []


def test_an_empty_file_becomes_a_database(make_app, path):
    path.touch()
    assert Person(testing.TestClient(make_app()), "alice").add()["id"] == 1


def test_tables_and_indexes_of_others_are_left_alone(make_app, path):
    make_database(
        path,
        "CREATE TABLE note (id INTEGER PRIMARY KEY, text); INSERT INTO note (text) VALUES ('keep');"
        + GOOD
        + "CREATE INDEX mine ON task (title); "
        + "CREATE VIEW open_tasks AS SELECT * FROM task WHERE NOT completed;",
    )
    assert Person(testing.TestClient(make_app()), "alice").add()["id"] == 1
    with connected(path) as connection:
        assert connection.execute("SELECT text FROM note").fetchall() == [("keep",)]
        names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    assert {"note", "mine", "open_tasks", "task"} <= names


def test_an_old_database_is_opened_with_its_tasks(make_app, path):
    make_database(path, GOOD)
    with connected(path) as connection:
        connection.execute(
            "INSERT INTO task (id, user_id, title, completed, created_at, updated_at)"
            " VALUES (41, 'alice', 'Milk', TRUE,"
            " '2026-01-01T00:00:00.000Z', '2026-01-02T00:00:00.000Z')"
        )
    alice = Person(testing.TestClient(make_app()), "alice")
    assert alice.call("GET").json == [
        {
            "id": 41,
            "user_id": "alice",
            "title": "Milk",
            **NEW_TASK,
            "completed": True,
            "created_at": "2026-01-01T00:00:00.000Z",
            "updated_at": "2026-01-02T00:00:00.000Z",
        }
    ]
    assert alice.add()["id"] == 42


# --- Whose task is this? --------------------------------------------------------------------------


def changes(store):
    """Return the statements of changes that the store can compile, by what they change."""
    names = [(name,) for name in taskd.FIELDS] + [tuple(taskd.FIELDS)]
    return {("change", *fields): store._change(*fields) for fields in names}


def lists(store):
    """Return statements of a page that the store can compile, by their shape."""
    sorts = [f"{sign}{name}" for sign in ("", "-") for name in taskd.ORDERS]
    filters = [(), ("completed",), ("q",), tuple(taskd.FILTERS)]
    return {
        shape: store._page(*shape)
        for shape in itertools.product(filters, [0, 2], sorts, [True, False])
    }


EXPIRY = ("old_key_ids", "delete_old_keys")  # they read the keys of all users, and only their age


def test_every_statement_of_the_store_names_the_owner(app):
    found = app.store._sql | changes(app.store) | lists(app.store)
    assert len(found) >= 40
    for name, statement in found.items():
        if statement.startswith("INSERT"):
            assert re.match(
                r'INSERT (OR IGNORE )?INTO "\w+" \("user_id",.*\) VALUES \(:user_id,', statement
            ), name
        elif name not in EXPIRY:
            assert re.match(
                r'\(*"\w+"."user_id" = :user_id\)( AND | ORDER| LIMIT)',
                statement.partition(" WHERE ")[2],
            ), statement


def test_every_statement_finds_its_rows_by_an_index_and_pages_by_id_follow_it(app, path):
    found = app.store._sql | changes(app.store) | lists(app.store)
    with connected(path) as connection:
        for name, statement in found.items():
            values = dict.fromkeys(re.findall(":([a-z][a-z_0-9]*)", statement), 1)
            rows = connection.execute(f"EXPLAIN QUERY PLAN {statement}", values)
            plan = [row[3] for row in rows]
            uses_an_index = name == "old_key_ids" or any("USING" in step for step in plan)
            assert statement.startswith("INSERT") or uses_an_index, plan
            if name != "old_key_ids":  # it takes no lock
                assert not any(re.match("SCAN t(ask|1)", step) for step in plan), (name, plan)
            if name in lists(app.store):
                filters, _, sort, first = name
                assert re.match(r"SEARCH t1 USING INDEX task_\w+ \(user_id=\?", plan[0]), plan
                assert ("completed=?" in plan[0]) == ("completed" in filters), (name, plan)
                by_id = sort.lstrip("-") == "id"
                assert by_id != any("TEMP B-TREE" in step for step in plan), (name, plan)
                assert first or not by_id or re.search(r"[<>]", plan[0]), (name, plan)
            else:
                assert not any("TEMP B-TREE" in step for step in plan), (name, plan)


def test_no_method_of_the_store_reaches_anothers_task(app, alice):
    task = alice.add()
    store, number = app.store, task["id"]
    assert store.page("bob", taskd.Listing()) == (b"[]", None)
    assert store.get("bob", number) is None
    assert store.change("bob", number, {"title": "Bob's"}) is None
    assert store.change("bob", number, {}) is None
    assert store.toggle("bob", number) is None
    assert store.change("bob", number, {"completed": True}) is None
    assert store.remove("bob", number) is None
    assert alice.call("GET").json == [task]


def test_what_was_answered_is_in_the_file_for_everyone_to_see(alice, path):
    task = alice.add(title="Milk", description="2 litres", completed=True)
    with connected(path) as connection:
        rows = connection.execute(
            "SELECT id, user_id, title, description, completed, created_at FROM task"
        ).fetchall()
    assert rows == [(1, "alice", "Milk", "2 litres", 1, task["created_at"])]
    alice.call("DELETE", "/1")
    with connected(path) as connection:
        assert connection.execute("SELECT count(*) FROM task").fetchone() == (0,)


# --- When the database cannot be used -------------------------------------------------------------


def test_a_locked_database_is_503_for_writes_while_reads_go_on(small_patience, app, alice, path):
    task = alice.add()
    with connected(path) as other:
        other.execute("BEGIN IMMEDIATE")
        for response in every_write(alice, 1):
            assert_unavailable(response)
            assert alice.call("GET").json == [task]
            assert alice.call("GET", "/1").json == task
        assert alice.call("PUT", "/1", json={}).json == task
        assert_problem(alice.call("GET", "/2"), 404)
        other.execute("COMMIT")
    assert alice.call("GET").json == [task]
    assert [response.status_code for response in every_write(alice, 1)] == [201, 200, 200, 200, 200]


def test_refusals_do_not_wait_for_a_locked_database(small_patience, client, alice, path):
    alice.add()
    with connected(path) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert_problem(client.simulate_post("/api/alice/tasks", json={"title": "x"}), 401)
        assert_problem(
            client.simulate_post("/api/alice/tasks", headers=bearer("bob"), json={"title": "x"}),
            403,
        )
        assert_problem(alice.call("POST", json={}), 422)
        assert_problem(alice.call("DELETE", "/x"), 404)
        assert client.simulate_get("/healthz").status_code == 200
        other.execute("ROLLBACK")


def test_a_write_waits_for_a_lock_that_goes_away_in_time(app, alice, path):
    alice.add()

    def toggle():
        try:
            return alice.call("PATCH", "/1/complete")
        finally:
            app.database.close()

    with connected(path) as other, ThreadPoolExecutor(1) as pool:
        other.execute("BEGIN IMMEDIATE")
        toggled = pool.submit(toggle)
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline:
            assert alice.call("GET", "/1").json["completed"] is False
        assert not toggled.done()
        other.execute("COMMIT")
        assert toggled.result(DEADLINE).json["completed"] is True


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "", {"title": "x"}),
        ("PUT", "/1", {"title": "x"}),
        ("PATCH", "/1/complete", None),
        ("PATCH", "/1/complete", {"completed": True}),
        ("DELETE", "/1", None),
    ],
)
def test_a_read_only_database_is_503_for_writes_and_recovers(app, alice, method, path, body):
    task = alice.add()
    for _ in range(2):
        for database in databases(app.store):
            database.execute_sql("PRAGMA query_only = 1")
        assert alice.call("GET").json == [task]
        assert_unavailable(alice.call(method, path, json=body))
        assert alice.call("GET").json == [task]
    for database in databases(app.store):
        database.execute_sql("PRAGMA query_only = 0")
    assert alice.call(method, path, json=body).status_code in (200, 201)


def test_a_full_database_is_503_for_what_needs_room_and_recovers(app, alice):
    task = alice.add()
    for database in databases(app.store):
        # SQLite raises the number to that of the pages in use.
        database.execute_sql("PRAGMA max_page_count = 1")
    responses = []
    while len(responses) < 20 and (not responses or responses[-1].status_code == 201):
        responses.append(alice.call("POST", json={"title": "x", "description": "x" * 10_000}))
    assert_unavailable(responses[-1])
    assert alice.call("GET", "/1").json == task
    response = alice.call("POST", json={"title": "x", "description": "x" * 10_000})
    # The limit was of the old connection, which was closed; a new one has none.
    assert response.status_code == 201
    numbers = [task["id"] for task in alice.call("GET").json]
    assert len(numbers) == len(set(numbers)) == len(responses) + 1


def test_a_failed_write_is_not_forgotten_for_another_error(app):
    database = app.database
    for sql in (database.probe, "SELECT nothing"):
        # The connection is another one after an error.
        database.peewee.execute_sql("PRAGMA query_only = 1")
        with pytest.raises(taskd.Unavailable):
            database.write(sql)
    database.peewee.execute_sql("PRAGMA query_only = 1")
    with pytest.raises(taskd.Unavailable, match="stores no writes"):
        database.check()
    database.close()
    database.check()


def test_a_database_that_is_away_is_503_and_comes_back_without_a_restart(app, alice, path):
    task = alice.add()
    app.database.close()
    away = path.parent.with_name("away")
    path.parent.rename(away)
    try:
        for _ in range(2):
            assert_unavailable(alice.call("GET"))
            assert_unavailable(alice.call("GET", "/1"))
            for response in every_write(alice, 1):
                assert_unavailable(response)
        assert not path.parent.exists()
    finally:
        away.rename(path.parent)
    assert alice.call("GET").json == [task]
    assert alice.call("PATCH", "/1/complete").json["completed"] is True


def test_a_database_file_that_is_away_is_not_replaced_by_an_empty_one(app, alice, path):
    task = alice.add()
    app.database.close()
    path.rename(path.with_name("away.db"))
    assert_unavailable(alice.call("GET"))
    assert_unavailable(alice.call("POST", json={"title": "x"}))
    assert not path.exists()
    path.with_name("away.db").rename(path)
    assert alice.call("GET").json == [task]


def test_a_damaged_database_is_503_and_recovers_when_it_is_mended(app, alice, path):
    task = alice.add()
    app.database.close()
    good = path.read_bytes()
    for damaged in (b"x" * len(good), good[:100] + b"\xff" * (len(good) - 100), good[:50]):
        path.write_bytes(damaged)
        assert_unavailable(alice.call("GET"))
        for response in every_write(alice, 1):
            assert_unavailable(response)
        app.database.close()
        path.write_bytes(good)
        assert alice.call("GET").json == [task]
        app.database.close()


def test_a_full_disk_is_503_and_the_server_goes_on_when_there_is_room_again(server):
    """Let no file of this process grow, as if the disk were full."""
    answered = [
        server.request("POST", "/api/alice/tasks", {"title": "x"}, bearer("alice"))
        for _ in range(3)
    ]
    assert [response.status_code for response in answered] == [201, 201, 201]
    tasks = [response.json for response in answered]
    unlimited = resource.prlimit(server.popen.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.popen.pid, resource.RLIMIT_FSIZE, (1, unlimited[1]))
    for _ in range(3):
        response = server.request("POST", "/api/alice/tasks", {"title": "x"}, bearer("alice"))
        assert_unavailable(response)
        assert_unavailable(
            server.request("PATCH", "/api/alice/tasks/1/complete", headers=bearer("alice"))
        )
    assert server.request("GET", "/healthz").status_code == 200
    reads = [server.request("GET", "/api/alice/tasks", headers=bearer("alice")) for _ in range(3)]
    resource.prlimit(server.popen.pid, resource.RLIMIT_FSIZE, unlimited)
    response = server.request("PATCH", "/api/alice/tasks/1/complete", headers=bearer("alice"))
    assert (response.status_code, response.json["completed"]) == (200, True)
    listed = server.request("GET", "/api/alice/tasks", headers=bearer("alice")).json
    assert [task["id"] for task in listed] == [1, 2, 3]
    assert listed[1:] == tasks[1:]
    assert [response.status_code for response in reads] == [200, 200, 200]
    assert reads[0].json == tasks


def test_concurrent_writers_of_one_process_never_meet_a_locked_database(app, alice):
    alice.add()

    def write(_):
        try:
            return [alice.call("PATCH", "/1/complete").status_code for _ in range(20)]
        finally:
            app.database.close()

    with ThreadPoolExecutor(6) as pool:
        statuses = [status for statuses in pool.map(write, range(6)) for status in statuses]
    assert statuses == [200] * 120


def test_a_store_can_be_closed_twice_and_used_again(app, alice):
    alice.add()
    app.database.close()
    app.database.close()
    assert len(alice.call("GET").json) == 1
    assert SECRET not in repr(app.store)


# --- The event loop -------------------------------------------------------------------------------


@pytest.fixture
def in_event_loop(app, monkeypatch):
    """Let this thread be the event loop, which must not wait."""
    monkeypatch.setattr(taskd.thread_state, "in_event_loop", True)
    yield
    app.database.close()


def titles(store: taskd.TaskStore) -> list[str]:
    return [task["title"] for task in json.loads(store.page("alice", taskd.Listing())[0])]


def new_task(title: str = "Buy milk") -> dict[str, object]:
    return taskd.parse_body(json.dumps({"title": title}), taskd.NEW_TASK)


@pytest.mark.usefixtures("in_event_loop")
def test_what_the_event_loop_writes_is_seen_when_it_is_committed(app):
    for number in range(1, 4):
        assert app.store.add("alice", new_task()).task.id == number
        taskd.thread_state.after_commit = None
    assert titles(app.store) == []
    assert app.database.commit().result()
    assert titles(app.store) == ["Buy milk"] * 3


@pytest.mark.usefixtures("in_event_loop")
def test_the_event_loop_adds_no_write_to_a_batch_that_is_being_committed(app, monkeypatch):
    monkeypatch.setattr(taskd, "SLOW_COMMIT", -1)
    app.store.add("alice", new_task())
    taskd.thread_state.after_commit = None
    database, may_end = app.store._database, threading.Event()
    execute = database._writer.execute_sql

    def commit_later(*statement: Any) -> Any:
        may_end.wait(DEADLINE)
        return execute(*statement)

    monkeypatch.setattr(database._writer, "execute_sql", commit_later)
    committed = app.database.commit()
    with pytest.raises(taskd.WriteWouldBlock):
        app.store.add("alice", new_task())
    assert titles(app.store) == []
    may_end.set()
    assert committed.result(DEADLINE)
    assert titles(app.store) == ["Buy milk"]
    monkeypatch.undo()


@pytest.mark.usefixtures("in_event_loop")
def test_the_event_loop_lets_a_thread_that_writes_go_first(app):
    with app.store._database._write_lock, pytest.raises(taskd.WriteWouldBlock):
        app.store.add("alice", new_task())
    app.store.add("alice", new_task())
    with app.store._database._write_lock:
        app.store.add("alice", new_task())
    commit(app.database)
    assert titles(app.store) == ["Buy milk"] * 2


@pytest.mark.usefixtures("in_event_loop")
def test_it_does_not_wait_for_a_lock_held_elsewhere(app, path):
    app.store.add("alice", new_task())
    commit(app.database)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    with pytest.raises(taskd.WriteWouldBlock):
        app.store.add("alice", new_task())
    assert time.monotonic() - started < taskd.LOCK_TIMEOUT / 2
    assert len(titles(app.store)) == 1, "reads go on"
    other.execute("ROLLBACK")
    other.close()
    assert app.store.add("alice", new_task()).task.id == 2
    commit(app.database)


# --- Waiting --------------------------------------------------------------------------------------


def test_a_write_waits_for_those_before_it_and_no_longer_than_it_should(app, monkeypatch):
    monkeypatch.setattr(taskd, "LOCK_TIMEOUT", 0.05)
    for _ in range(3):  # each gives its place in the queue back
        with app.store._database._write_lock, pytest.raises(taskd.Unavailable) as caught:
            app.store.add("alice", new_task())
        assert caught.value.args == ("the database", "the writes before this one took too long")
    assert app.store.add("alice", new_task()).task.id == 1


def test_only_so_many_writes_wait(path, monkeypatch):
    monkeypatch.setattr(taskd, "LOCK_TIMEOUT", DEADLINE)
    monkeypatch.setattr(taskd, "PLACE_TIMEOUT", 0.05)
    database = taskd.Sqlite(str(path), waiting=1)
    store = taskd.TaskStore(database)
    with ThreadPoolExecutor(1) as another:
        database._write_lock.acquire()
        waiting = another.submit(lambda: (store.add("alice", new_task()), database.close()))
        deadline = time.monotonic() + DEADLINE
        while database._queue._free and time.monotonic() < deadline:
            time.sleep(0.001)
        started = time.monotonic()
        with pytest.raises(taskd.Unavailable) as caught:
            store.add("alice", new_task())
        assert time.monotonic() - started < DEADLINE / 2
        assert caught.value.args == ("the database", "too many writes are waiting")
        database._write_lock.release()
        assert waiting.result(DEADLINE)[0].task.id == 1
    assert store.add("alice", new_task()).task.id == 2
    database.close()


def pragma(database: peewee.SqliteDatabase, name: str) -> object:
    return database.execute_sql(f"PRAGMA {name}").fetchone()[0]


def test_a_search_is_rejected_until_a_log_that_is_too_long_can_be_emptied(app, path, monkeypatch):
    monkeypatch.setattr(taskd, "MAX_WAL_PAGES", 1)
    search, database = taskd.Listing(q="x"), app.store._database

    def search_alone() -> None:
        with app.store.page_reader("alice", search) as read:
            read(search)

    with connected(path) as other:
        other.execute("BEGIN")
        other.execute("SELECT 1 FROM task").fetchall()
        for _ in range(3):
            app.store.add("alice", new_task())
        with pytest.raises(taskd.Busy, match="other readers must end first"):
            search_alone()
    search_alone()
    before = (path.with_name("taskd.db-wal").stat().st_size - 32) // 4120  # pages in the log
    app.store.add("alice", new_task())
    [[_, pages, _]] = database.run("PRAGMA wal_checkpoint")
    assert pages < before, "SQLite writes to the beginning of the log again"


def test_the_connection_of_the_event_loop_caches_more_pages_and_waits_for_no_lock(app):
    in_event_loop, patient = (
        app.store._database._event_loop_connection,
        app.store._database._worker_connection,
    )
    assert (pragma(in_event_loop, "cache_size"), pragma(in_event_loop, "busy_timeout")) == (
        -16000,
        0,
    )
    assert (pragma(patient, "cache_size"), pragma(patient, "busy_timeout")) == (
        -500,
        taskd.LOCK_TIMEOUT * 1000,
    )
    for database in (in_event_loop, patient):
        assert (pragma(database, "journal_mode"), pragma(database, "synchronous")) == ("wal", 2)


def test_comments_and_layout_are_ignored_and_several_differences_are_listed(path):
    with closing(sqlite3.connect(path)) as database:
        database.executescript(GOOD)
    taskd.prepare_database(str(path))
    with closing(sqlite3.connect(path)) as database:
        database.executescript(
            "ALTER TABLE task ADD COLUMN a TEXT; ALTER TABLE task ADD COLUMN b TEXT;"
        )
    with pytest.raises(
        taskd.DatabaseError,
        match=r"does not fit schema\.sql: it has task\.a TEXT; it has task\.b TEXT$",
    ):
        taskd.prepare_database(str(path))

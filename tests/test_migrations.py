"""A database of an earlier version is migrated, and one of a later version is not changed."""

from __future__ import annotations

import random
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import peewee
import pytest
from falcon import testing

import taskd
from conftest import Person
from support import DEADLINE, ROOT, Process, bearer, environment, until

pytestmark = pytest.mark.sqlite("PostgreSQL has had no earlier version of the schema")

Start = Callable[..., Process]
OLD = (
    ROOT / "tests" / "version-1.sql"
).read_text()  # made by 0.1.0's schema.sql, with tasks of three users
MANY = 60_000  # tasks, so that a migration takes long enough to be killed in the middle
COLUMNS = "id, user_id, title, description, completed, created_at, updated_at"


def make(path: Path, journal: str, script: str) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA journal_mode = {journal}")
        database.executescript(script)


def make_old(path: Path, journal: str = "WAL") -> list[tuple[Any, ...]]:
    """Make a database of version 0.1.0, and return its tasks."""
    make(path, journal, OLD)
    return tasks(path)


def tasks(path: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute(f"SELECT {COLUMNS} FROM task ORDER BY id").fetchall()


def fill(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        when = "2026-11-04T00:00:00.000Z"
        rows = ((f"user-{n % 100}", f"Task {n}", "x" * 50, n % 2, when, when) for n in range(MANY))
        database.executemany(
            "INSERT INTO task (user_id, title, description, completed, created_at, updated_at)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            rows,
        )


def copies(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.v*"))


def version(path: Path) -> object:
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT version FROM about").fetchall()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "taskd.db"


@pytest.mark.parametrize("journal", ["WAL", "DELETE"])
def test_an_old_database_is_brought_up_to_date_with_all_that_it_has(
    make_app: Callable[..., taskd.App], path: Path, journal: str
) -> None:
    before = make_old(path, journal)
    client = testing.TestClient(make_app())
    assert tasks(path) == before
    assert version(path) == [(taskd.VERSION,)]
    alice, bob = Person(client, "alice"), Person(client, "bob")
    assert [tuple(task[name] for name in taskd.VERSION_1) for task in alice.call("GET").json] == [
        row for row in before if row[1] == "alice"
    ]
    assert bob.call("GET", "/2").headers["etag"] == '"1-2026-11-02T09:30:00.250Z"'
    for query, found in (
        ("q=éCOLE", [5]),
        ("q=ΣΊΣΥΦΟΣ", [5]),
        ("q=LITRES", [1]),
        ("q=%25", [5]),
        ("sort=-title", [5, 1]),
    ):
        assert [task["id"] for task in alice.call("GET", query_string=query).json] == found, query
    assert [task["id"] for task in bob.call("GET", query_string="q=STRASSE").json] == [2]
    assert alice.add()["id"] == 10, "an id that was used is used again"
    toggled = alice.call(
        "PATCH", "/1/complete", headers={"If-Match": '"1-2026-11-01T08:00:00.000Z"'}
    )
    assert toggled.json["completed"] is True


@pytest.mark.parametrize("journal", ["WAL", "DELETE"])
def test_a_copy_of_what_it_was_stays_beside_it_and_is_its_owners_alone(
    make_app: Callable[..., taskd.App], path: Path, journal: str
) -> None:
    before = make_old(path, journal)
    make_app()
    [copy] = copies(path)
    assert re.fullmatch(r"taskd\.db\.v1-\d{8}T\d{6}\.\d{6}Z", copy.name)
    assert copy.stat().st_mode & 0o777 == 0o600
    assert tasks(copy) == before
    with closing(sqlite3.connect(copy)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        names = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    assert "about" not in names
    make_app()
    assert copies(path) == [copy], "the second start made another"


def test_the_copy_can_be_brought_up_to_date_too(
    make_app: Callable[..., taskd.App], path: Path
) -> None:
    make_old(path)
    make_app()
    [copy] = copies(path)
    app = make_app(database_url=f"sqlite:///{copy}")
    assert [task["id"] for task in Person(testing.TestClient(app), "alice").call("GET").json] == [
        1,
        5,
    ]


def test_a_new_database_leaves_no_copy(make_app: Callable[..., taskd.App], path: Path) -> None:
    make_app()
    assert version(path) == [(taskd.VERSION,)]
    assert copies(path) == []


def test_a_migrated_database_and_a_new_one_have_the_same_tables(
    make_app: Callable[..., taskd.App], path: Path
) -> None:
    make_old(path)
    make_app()
    make_app(database_url=f"sqlite:///{path}.new")
    for describe in (taskd.sqlite_definitions, taskd.portable_definitions):
        found = []
        for name in (str(path), f"{path}.new"):
            database = taskd.connect(name, 1)
            found.append(describe(database))
            database.close()
        assert found[0] == found[1]
    with closing(sqlite3.connect(path)) as connection:
        names = [
            name
            for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'index'")
        ]
    assert "task_user_id_id" not in names


MISFITS = {
    "an extra column": OLD + "ALTER TABLE task ADD COLUMN colour INTEGER;",
    "a column less": OLD + "ALTER TABLE task DROP COLUMN description;",
    "a column of another name": OLD + "ALTER TABLE task RENAME COLUMN completed TO done;",
    "another type": OLD.replace("updated_at  TEXT", "updated_at  REAL"),
    "ids that are used again": OLD.replace(" AUTOINCREMENT", ""),
    "another's table about": OLD
    + "CREATE TABLE about (version TEXT); INSERT INTO about VALUES ('two');",
    "a table in the place of ours": OLD + "CREATE TABLE idempotency_key (x);",
}


@pytest.mark.parametrize("journal", ["WAL", "DELETE"])
@pytest.mark.parametrize("name", MISFITS)
def test_an_old_database_that_does_not_fit_is_refused_and_left_as_it_was(
    make_app: Callable[..., taskd.App], path: Path, name: str, journal: str
) -> None:
    make(path, journal, MISFITS[name])
    before = path.read_bytes()
    with pytest.raises(taskd.DatabaseError) as caught:
        make_app()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["taskd.db"]


def test_a_newer_database_is_refused_in_one_line_and_left_as_it_was(
    start: Start, path: Path
) -> None:
    assert start().terminate() == 0
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE about SET version = version + 1")
        database.execute("ALTER TABLE task ADD COLUMN colour INTEGER")
    before = path.read_bytes()
    process = start(wait=False)
    assert process.popen.wait(DEADLINE) == 2
    assert re.fullmatch(
        r"taskd: taskd\.db was made by a newer taskd: [^\n]* update taskd\n", process.log
    )
    assert path.read_bytes() == before
    assert copies(path) == []


def test_a_database_that_somebody_is_writing_to_is_refused_and_left_as_it_was(
    make_app: Callable[..., taskd.App], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taskd, "MIGRATION_TIMEOUT", 0.1)
    make_old(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(taskd.DatabaseError, match="locked"):
            make_app()
        other.execute("ROLLBACK")
    assert copies(path) == []
    make_app()
    assert len(copies(path)) == 1


@pytest.mark.slow
def test_kill_9_in_the_middle_loses_nothing_and_the_next_start_goes_on(
    start: Start, path: Path
) -> None:
    make_old(path)
    fill(path)
    before = tasks(path)
    chance = random.Random()
    killed = 0
    for attempt in range(8):
        process, seconds = start(wait=False), chance.random() * 0.7
        if attempt == 0:
            until(lambda: copies(path), "it begins to migrate")
            seconds = 0
        try:
            process.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            killed += "listening" not in process.log
        process.kill()
        assert tasks(path) == before
    server = start()
    assert tasks(path) == before
    assert version(path) == [(taskd.VERSION,)]
    assert all(tasks(copy) == before for copy in copies(path))
    assert (
        server.request(
            "GET", "/api/user-7/tasks?q=TASK%207&limit=1", headers=bearer("user-7")
        ).json[0]["title"]
        == "Task 7"
    )
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert killed, "no kill came in time"


def test_a_start_waits_while_another_one_begins_the_log(
    make_app: Callable[..., taskd.App], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite does not wait by itself: of 1,600 starts at the same time one failed."""
    locked = [peewee.OperationalError("database is locked")] * 3
    look = taskd.Sqlite._open_files
    monkeypatch.setattr(taskd.Sqlite, "_open_files", lambda self: again(locked) or look(self))
    assert Person(testing.TestClient(make_app()), "alice").add()["id"] == 1
    assert not locked
    locked += [peewee.OperationalError("database is locked")] * 1000
    monkeypatch.setattr(taskd, "LOCK_TIMEOUT", 0.1)
    with pytest.raises(taskd.DatabaseError, match="locked"):
        make_app()


def again(errors: list[peewee.OperationalError]) -> None:
    """Raise the next error, if there is one."""
    if errors:
        raise errors.pop()


@pytest.mark.parametrize("old", [True, False])
def test_processes_that_start_at_the_same_time_all_serve(
    start: Start, path: Path, old: bool
) -> None:
    if old:
        make_old(path)
        fill(path)
    servers: list[Process] = []
    threads = [threading.Thread(target=lambda: servers.append(start())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(servers) == 3
    for number, server in enumerate(servers):
        assert (
            server.request(
                "POST", "/api/dora/tasks", {"title": str(number)}, bearer("dora")
            ).status_code
            == 201
        )
    assert len(servers[0].request("GET", "/api/dora/tasks", headers=bearer("dora")).json) == 3
    assert version(path) == [(taskd.VERSION,)]
    assert len(copies(path)) == old


@pytest.mark.slow
@pytest.mark.parametrize("command", [["users"], ["stats"], ["tasks", "alice", "--search", "MILK"]])
def test_taskctl_brings_an_old_database_up_to_date_too(path: Path, command: list[str]) -> None:
    before = make_old(path)
    finished = subprocess.run(
        [sys.executable, str(ROOT / "taskctl.py"), *command, "--json"],
        cwd=path.parent,
        env=environment(BETTER_AUTH_SECRET="x" * 40),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert tasks(path) == before
    assert len(copies(path)) == 1

"""A database saved by any earlier version is migrated to the newest, on both engines."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from falcon import testing

import support
import taskd
from conftest import Person
from support import ROOT, Process, bearer, database_url, sql

Start = Callable[..., Process]
MakeApp = Callable[..., taskd.App]
TESTS = ROOT / "tests"
ON_SQLITE_ONLY = pytest.mark.sqlite("PostgreSQL began with version 2")
VERSIONS = [pytest.param(1, marks=ON_SQLITE_ONLY), *range(2, taskd.VERSION)]
ANSWER = "SELECT user_id, name, answer FROM idempotency_key ORDER BY id"
COLUMNS = "id, user_id, title, description, completed, created_at, updated_at"
# The bodies of the creates with a key in the saved databases of version 2.
REPEATED: dict[tuple[str, str], dict[str, Any]] = {
    ("alice", "key-1"): {"title": "Buy milk", "description": "2 litres"},
    ("bob", "key-1"): {"title": "Hauptstraße 5"},
    ("alice", "key-2"): {
        "title": "ÉCOLE  \" ' % _",
        "description": "Σίσυφος\n🌧",
        "completed": True,
    },
    ("alice", "key-3"): {"title": "changed since"},
    ("carol", "key-4"): {"title": "deleted since", "completed": False},
}


def load(path: Path, version: int) -> None:
    """Make a database of this version of the schema."""
    if support.postgresql:
        with support.postgresql.connect(str(path)) as session:
            support.postgresql.spoiled.add(str(path))
            session.execute("DROP TABLE IF EXISTS task, idempotency_key, about")
            session.execute((TESTS / f"version-{version}-postgresql.sql").read_bytes())
    else:
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.executescript((TESTS / f"version-{version}.sql").read_text())
    if version > 1:  # the keys are as old as the saved database
        now = taskd.timestamp(taskd.datetime.now(taskd.UTC))
        sql(path, "UPDATE idempotency_key SET created_at = ?", now)


def tasks(path: Path) -> list[tuple[Any, ...]]:
    return sql(path, f"SELECT {COLUMNS} FROM task ORDER BY id")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "taskd.db"


def opened(make_app: MakeApp, path: Path) -> Callable[[str], Person]:
    client = testing.TestClient(make_app(database_url=database_url(path)))
    return lambda name: Person(client, name)


@pytest.fixture
def next_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Add a version of the schema after the newest."""
    number, scripts = taskd.VERSION + 1, tmp_path / "migrations"
    shutil.copytree(taskd.MIGRATIONS, scripts)
    added = "ALTER TABLE task ADD COLUMN note TEXT NOT NULL DEFAULT '50 %'; -- a new column\n"
    (scripts / f"{number}.sql").write_text(
        f"-- The next one.\n{added}UPDATE task SET note = '100 %' WHERE CAST(id AS TEXT) = '1';\n"
    )
    schema = tmp_path / "schema.sql"
    text = taskd.SCHEMA.read_text()
    schema.write_text(
        text.replace(
            "CREATE TABLE task (", "CREATE TABLE task (\n note TEXT NOT NULL DEFAULT '50 %',"
        )
    )
    monkeypatch.setattr(taskd, "VERSION", number)
    monkeypatch.setattr(taskd, "MIGRATIONS", scripts)
    monkeypatch.setattr(taskd, "SCHEMA", schema)
    taskd._wanted_definitions.cache_clear()
    yield number
    taskd._wanted_definitions.cache_clear()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_saved_database_of_every_version_is_migrated_with_all_that_it_has(
    make_app: MakeApp, path: Path, version: int
) -> None:
    load(path, version)
    before = tasks(path)
    keys = sql(path, "SELECT cursor_key FROM about") if version > 1 else []
    person = opened(make_app, path)
    assert tasks(path) == before
    [(found, key)] = sql(path, "SELECT version, cursor_key FROM about")
    assert found == taskd.VERSION
    assert [(key,)] == keys or version == 1
    assert re.fullmatch("[0-9a-f]{64}", key)
    for name in ("alice", "bob", "carol"):
        shown = person(name).call("GET").json
        assert [task["id"] for task in shown] == [row[0] for row in before if row[1] == name]
    assert person("bob").call("GET", query_string="q=STRASSE").json[0]["id"] == 2
    assert person("alice").add()["id"] == (10 if version == 1 else 8), "an id is used again"


@pytest.mark.parametrize("version", [2])
def test_a_key_from_before_the_migration_replays_byte_for_byte_what_was_answered_then(
    make_app: MakeApp, path: Path, version: int
) -> None:
    load(path, version)
    answers = {(user, name): answer for user, name, answer in sql(path, ANSWER)}
    person = opened(make_app, path)
    before = tasks(path)
    for (user, name), body in REPEATED.items():
        headers = {"Idempotency-Key": name}
        again = person(user).call("POST", json=body, headers=headers)
        assert (again.status_code, again.text) == (201, answers[user, name])
        assert again.headers["idempotency-replayed"] == "true"
        created = json.loads(answers[user, name])
        assert again.headers["etag"] == f'"1-{created["updated_at"]}"'
        assert again.headers["location"].endswith(f"/api/{user}/tasks/{created['id']}")
        other = person(user).call("POST", json=body | {"title": "other"}, headers=headers)
        assert other.status_code == 422
    assert tasks(path) == before
    new = person("dora").call("POST", json={"title": "x"}, headers={"Idempotency-Key": "key-9"})
    assert (new.status_code, new.headers.get("idempotency-replayed")) == (201, None)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_migration_after_the_newest_keeps_one_row_in_about_and_every_key(
    make_app: MakeApp, path: Path, version: int, next_version: int
) -> None:
    load(path, version)
    keys = sql(path, "SELECT cursor_key FROM about") if version > 1 else []
    person = opened(make_app, path)
    [(found, key)] = sql(path, "SELECT version, cursor_key FROM about")
    assert found == next_version
    assert [(key,)] == keys or version == 1
    assert sql(path, "SELECT note FROM task ORDER BY id")[:2] == [("100 %",), ("50 %",)]
    assert person("alice").add()["title"] == "Buy milk"
    if version > 1:
        headers = {"Idempotency-Key": "key-1"}
        again = person("bob").call("POST", json=REPEATED["bob", "key-1"], headers=headers)
        assert again.headers["idempotency-replayed"] == "true"
    opened(make_app, path)  # again, when nothing is left to do


def test_a_migration_that_fails_leaves_the_database_as_it_was(
    make_app: MakeApp, path: Path, next_version: int
) -> None:
    load(path, 2)
    before = tasks(path), sql(path, "SELECT * FROM about")
    with (taskd.MIGRATIONS / f"{next_version}.sql").open("a") as script:
        script.write("UPDATE nowhere SET x = 1;\n")
    with pytest.raises(taskd.DatabaseError, match="nowhere") as caught:
        opened(make_app, path)
    assert "\n" not in str(caught.value)
    assert (tasks(path), sql(path, "SELECT * FROM about")) == before
    assert list(path.parent.glob("taskd.db.v*")) == []


@pytest.mark.parametrize("rows", [0, 2])
def test_a_table_about_without_exactly_one_row_is_refused(
    make_app: MakeApp, path: Path, rows: int
) -> None:
    load(path, 2)
    statement = (
        "INSERT INTO about SELECT 1, 'other' FROM about" if rows else "DELETE FROM about WHERE 1=1"
    )
    sql(path, statement)
    with pytest.raises(taskd.DatabaseError, match="about must have one row"):
        opened(make_app, path)


def test_processes_that_start_at_once_on_an_old_database_all_serve(
    start: Start, path: Path
) -> None:
    load(path, 2)
    support.ForkServer.of("taskd", support.environment())  # one, for any number of threads
    servers: list[Process] = []
    threads = [threading.Thread(target=lambda: servers.append(start())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(servers) == 3
    for server in servers:
        found = server.request("GET", "/api/bob/tasks", headers=bearer("bob")).json
        assert [task["title"] for task in found] == ["Hauptstraße 5"]
    assert sql(path, "SELECT version FROM about") == [(taskd.VERSION,)]


# --- A disk without room --------------------------------------------------------------------------

FILLED = 5_000  # tasks of a database of about 1.2 MB, which the migration doubles


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Give a separate file system, whose size can be changed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def resize(disk: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)


def version_1(path: Path, journal: str) -> None:
    """Make a database of version 1 with FILLED tasks more."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript((TESTS / "version-1.sql").read_text())
        when = "2026-11-04T00:00:00.000Z"
        row = "INSERT INTO task (user_id, title, description, created_at, updated_at)"
        with database:
            database.executemany(
                f"{row} VALUES (?, ?, ?, ?, ?)",
                ((f"u{n % 9}", f"Task {n}", "X" * 150, when, when) for n in range(FILLED)),
            )
        database.execute(f"PRAGMA journal_mode = {journal}")


@pytest.fixture
def seems_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the check before a migration find room, so that the disk becomes full in it."""
    copy, room = taskd._copy_beside, shutil.disk_usage("/")._replace(free=2**40)

    def copy_anyway(path: str, version: int) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: room)
            return copy(path, version)

    monkeypatch.setattr(taskd, "_copy_beside", copy_anyway)


@pytest.mark.sqlite("the disk is the server's")
def test_a_migration_does_not_begin_without_the_space_for_it(
    disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = disk / "taskd.db"
    version_1(path, "WAL")
    before, size = tasks(path), path.stat().st_size // 1024
    resize(disk, int(6.9 * size))
    with pytest.raises(taskd.DatabaseError, match=r"disk is full: [0-9]+ bytes must be free"):
        taskd.prepare_database(str(path))
    assert [file.name for file in disk.iterdir() if ".v1-" in file.name] == []
    assert sql(path, "SELECT count(*) FROM sqlite_master WHERE name = 'about'") == [(0,)]
    caplog.set_level("INFO", "taskd")
    resize(disk, int(7.3 * size))
    taskd.prepare_database(str(path))
    [copy] = disk.glob("taskd.db.v1-*")
    assert caplog.messages == [f"{path} is kept as {copy} before its migration"]
    assert tasks(path) == before == tasks(copy)


@pytest.mark.sqlite("the disk is the server's")
@pytest.mark.parametrize("journal", ["WAL", "DELETE"])
def test_a_disk_that_is_full_in_the_middle_of_a_migration_loses_nothing(
    disk: Path, journal: str, seems_empty: None
) -> None:
    path = disk / "taskd.db"
    version_1(path, journal)
    before, size = tasks(path), path.stat().st_size // 1024
    messages: list[str] = []
    for room in (20, *range(size // 2, 6 * size, size // 2)):
        resize(disk, size + room)
        try:
            taskd.prepare_database(str(path))
            break
        except taskd.DatabaseError as ex:
            messages.append(str(ex))
        left = {file.name for file in disk.iterdir()}
        assert left <= {"taskd.db", "taskd.db-wal", "taskd.db-shm"}
        resize(disk, 32 * 1024)
        alone = disk / "alone"
        shutil.copy(path, alone)  # without the files beside it
        assert tasks(alone) == before
        alone.unlink()
    assert set(messages) == {f"{path} cannot be opened: database or disk is full"}
    assert len(messages) > 2
    resize(disk, 32 * 1024)
    assert tasks(path) == before
    assert sql(path, "SELECT version FROM about") == [(taskd.VERSION,)]
    [copy] = disk.glob("taskd.db.v1-*")
    assert tasks(copy) == before


@pytest.mark.sqlite("the disk is the server's")
@pytest.mark.slow
def test_a_migration_that_cannot_leave_the_log_for_want_of_room_says_so_and_is_whole_with_it(
    disk: Path, caplog: pytest.LogCaptureFixture, seems_empty: None
) -> None:
    saved, path, warned = disk / "saved", disk / "taskd.db", []
    version_1(saved, "WAL")
    before, size = tasks(saved), saved.stat().st_size // 1024
    for room in range(2 * size, 8 * size, size // 5):
        resize(disk, 32 * 1024)
        shutil.copy(saved, path)
        resize(disk, 2 * size + room)
        caplog.clear()
        with contextlib.suppress(taskd.DatabaseError):
            taskd.prepare_database(str(path))
            warned.append(f"{path} is not whole without the file {path}-wal: " in caplog.text)
            assert Path(f"{path}-wal").exists() == warned[-1]
        resize(disk, 32 * 1024)
        assert tasks(path) == before
        for file in disk.glob("taskd.db*"):
            file.unlink()
    assert set(warned) == {True, False}


@pytest.mark.sqlite("it is SQLite's")
def test_a_rollback_that_did_not_succeed_keeps_the_copy(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(path, 1)
    monkeypatch.setattr(taskd, "_is_whole", lambda *_: False)
    monkeypatch.setattr(taskd, "SCHEMA", path.with_name("schema.sql"))
    taskd.SCHEMA.write_text("CREATE TABLE other (x);")
    taskd._wanted_definitions.cache_clear()
    with pytest.raises(taskd.DatabaseError, match="does not fit"):
        taskd.prepare_database(str(path))
    taskd._wanted_definitions.cache_clear()
    assert len(list(path.parent.glob("taskd.db.v1-*"))) == 1


@pytest.mark.sqlite("it is SQLite's")
def test_an_sqlite_without_returning_is_refused_by_name_before_anything_is_made(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    monkeypatch.setattr(sqlite3, "sqlite_version", "3.34.1")
    with pytest.raises(taskd.DatabaseError, match=r"^SQLite 3\.34\.1 is too old"):
        taskd.open_database(taskd.Settings(database_url=f"sqlite:///{path}"))
    assert not path.exists()

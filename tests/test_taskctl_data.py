"""The commands of taskctl that keep the data safe, beside real servers with writes going on."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import taskctl
import taskd
from support import (
    DEADLINE,
    NEW_TASK,
    TASK_KEYS,
    Process,
    bearer,
    locked,
    sql,
    stored,
    traced,
    until,
)
from test_taskctl import (
    NO_KEY_SET,
    Answer,
    Start,
    Taskctl,
    data,
    launched,
    on_a_terminal,
    one_line,
    run,
)

pytestmark = pytest.mark.sqlite("it is about SQLite's files")

PEOPLE = ["alice", "bob", "zoë/ünïcode"]
MILK = {
    "id": 7, "user_id": "alice", "title": "Buy milk", **NEW_TASK, "description": "2 litres",
    "created_at": "2026-11-20T21:00:00.000Z", "updated_at": "2026-11-20T21:00:00.000Z",
}  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of 15,000 tasks of 100 users, some MB; tests take a copy."""
    home = tmp_path_factory.mktemp("large")
    data(run(home, "seed", "--users", "100", "--count", "150", "--json"))
    return home / "taskd.db"


def path_of(user: str, task_id: object = None) -> str:
    quoted = "".join(f"%{byte:02X}" for byte in user.encode())
    return f"/api/{quoted}/tasks" + (f"/{task_id}" if task_id else "")


def listed(server: Process, user: str) -> list[dict[str, Any]]:
    """Return this user's tasks from the API."""
    answer = server.request("GET", path_of(user), headers=bearer(user))
    assert answer.status_code == 200
    return list(answer.json)


def add(server: Process, user: str = "alice", **task: Any) -> dict[str, Any]:
    answer = server.request("POST", path_of(user), {"title": "Buy milk"} | task, bearer(user))
    assert answer.status_code == 201, answer.text
    return dict(answer.json)


def fill(server: Process) -> dict[str, list[dict[str, Any]]]:
    """Create tasks of every kind for some users, delete one, and return the API's answers."""
    for user in PEOPLE:
        add(
            server,
            user,
            description=f"“2 litres”\n\t\\ of {user} \U0001f95b",
            completed=user == "bob",
        )
        gone = add(server, user, title="x" * 200, description="y" * 10_000)["id"]
        add(server, user, title="z" * 200, description="")
        assert (
            server.request("DELETE", path_of(user, gone), headers=bearer(user)).status_code == 200
        )
    return {user: listed(server, user) for user in PEOPLE}


def answers(server: Process) -> dict[str, list[dict[str, Any]]]:
    return {user: listed(server, user) for user in PEOPLE}


@contextlib.contextmanager
def writing(server: Process, user: str = "busy", threads: int = 2) -> Iterator[list[int]]:
    """Have a user create tasks over several connections; yield the ids that were answered."""
    acknowledged: list[int] = []
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            acknowledged.append(add(server, user)["id"])

    writers = [threading.Thread(target=write) for _ in range(threads)]
    for writer in writers:
        writer.start()
    try:
        until(lambda: len(acknowledged) > 5, "the writes have begun")
        yield acknowledged
    finally:
        stop.set()
        for writer in writers:
            writer.join()


def dump(path: Path) -> list[str]:
    """Return the whole content of a database as SQL."""
    with contextlib.closing(sqlite3.connect(path, timeout=DEADLINE)) as connection:
        return list(connection.iterdump())


def lines(*tasks: dict[str, Any]) -> str:
    return "".join(json.dumps(task) + "\n" for task in tasks)


def said(answer: Answer) -> str:
    """Return the messages of a command that succeeded and printed nothing."""
    assert (answer.returncode, answer.stdout) == (0, ""), answer
    return answer.stderr


def names(directory: Path) -> list[str]:
    """Return the names of the files in a directory, except for the logs of its servers."""
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("stderr-"))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- backup ---------------------------------------------------------------------------------------


def test_a_server_on_the_backup_answers_as_the_first_did_though_it_was_made_amid_writes(
    taskctl: Taskctl, server: Process, start: Start, tmp_path: Path
) -> None:
    before = fill(server)
    with writing(server) as acknowledged:
        earlier = set(acknowledged)
        said(taskctl("backup", "copy.db"))
        later = len(acknowledged)
        until(lambda: len(acknowledged) > later, "the writes go on")
    copy = start(DATABASE_URL="sqlite:///copy.db")
    assert answers(copy) == before == answers(server)
    kept = [task["id"] for task in listed(copy, "busy")]
    assert earlier <= set(kept)
    assert kept == [task["id"] for task in listed(server, "busy")][: len(kept)], (
        "one moment, not several"
    )


def slowed(seconds: float) -> str:
    """Return a statement after which each write to a file takes so many seconds more."""
    delay = f"inject=pwrite64:delay_enter={1_000_000 * seconds:.0f}"
    return traced("-o", os.devnull, "-e", "trace=pwrite64", "-e", delay)


@pytest.mark.slow
def test_a_backup_holds_up_no_write_and_is_of_the_moment_at_which_it_began(
    taskctl: Taskctl, large: Path, start: Start, tmp_path: Path
) -> None:
    shutil.copy(large, tmp_path / "taskd.db")
    server = start()
    before = add(server)["id"]
    backup = launched(tmp_path, "backup", "copy.db", before=slowed(0.002))
    until(
        lambda: any(path.stat().st_size for path in tmp_path.glob(".copy.db.*/copy.db")),
        "it has begun",
    )
    during = [add(server)["id"] for _ in range(20)]
    assert not (tmp_path / "copy.db").exists(), "too late to tell"
    _, messages = backup.communicate(timeout=DEADLINE)
    assert backup.returncode == 0, messages
    kept = stored(tmp_path / "copy.db")
    assert before in kept
    assert set(during).isdisjoint(kept)
    assert set(during) <= set(stored(tmp_path / "taskd.db"))


HASTY = """
import itertools, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=10)
connection.execute("PRAGMA synchronous = OFF")
print(connection.execute("PRAGMA journal_mode = WAL").fetchone(), flush=True)
for number in itertools.count():
    number = number * 997 % 3000 + 1
    connection.execute("UPDATE task SET completed = NOT completed WHERE id = ?", [number])
"""


@pytest.mark.sqlite("it is about a file")
def test_a_database_that_goes_on_changing_is_copied_again_in_the_place_of_the_last_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, path = tmp_path / "made.db", tmp_path / "taskd.db"
    with contextlib.closing(sqlite3.connect(made)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.executescript("CREATE TABLE x (y); INSERT INTO x VALUES (1);")
        for suffix in ("", "-wal"):  # as a killed server leaves it
            shutil.copy(f"{made}{suffix}", f"{path}{suffix}")
    times = itertools.count()
    monkeypatch.setattr(taskctl, "fingerprint", lambda _: next(times))
    scratch, seen = tmp_path / "scratch" / "taskd.db", list[Any]()
    scratch.parent.mkdir()

    def read() -> None:
        for reading in taskctl.readings(path, scratch):
            seen.extend(reading.execute_sql("SELECT y FROM x").fetchall())
            assert len([*scratch.parent.iterdir()]) == 1

    with taskctl.at_end, pytest.raises(taskctl.Refused, match="goes on writing"):
        read()
    assert seen == [(1,)] * taskctl.ATTEMPTS
    assert [*scratch.parent.iterdir()] == []


def test_a_database_that_is_changed_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    path, seen = tmp_path / "taskd.db", list[Any]()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript("CREATE TABLE x (y); INSERT INTO x VALUES (1);")
    for reading in taskctl.readings(path, path):
        seen.extend(reading.execute_sql("SELECT y FROM x").fetchall())
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.executescript("UPDATE x SET y = 2 WHERE y = 1;")
    assert seen == [(1,), (2,)]


def test_a_check_looks_again_at_what_another_program_changed_while_it_looked(
    taskctl: Taskctl, tmp_path: Path
) -> None:
    taskctl("init")
    change = """
import taskctl

def damage(database, whole=taskctl.damage):
    taskctl.damage = whole
    Path("taskd.db").touch()
    return "it looks damaged"

taskctl.damage = damage
"""
    check = launched(tmp_path, "check", before=change)
    assert "whole, and fits schema.sql" in check.communicate(timeout=DEADLINE)[0]


@pytest.mark.slow
def test_a_backup_ends_though_another_process_writes_without_a_pause(
    taskctl: Taskctl, tmp_path: Path
) -> None:
    taskctl("init")
    wordy = MILK | {"description": "x" * 10_000}
    said(
        taskctl("import", "-", stdin=lines(*(wordy | {"id": number} for number in range(1, 3001))))
    )
    command = [sys.executable, "-c", HASTY, str(tmp_path / "taskd.db")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout
        writer.stdout.readline()
        try:
            started = time.monotonic()
            said(taskctl("backup", "copy.db"))
            assert time.monotonic() - started < 6, "seconds; it started again and again"
            assert writer.poll() is None
        finally:
            writer.kill()
    assert sorted(stored(tmp_path / "copy.db")) == list(range(1, 3001))


def test_a_backup_is_one_file_for_its_owner_alone(
    taskctl: Taskctl, server: Process, tmp_path: Path
) -> None:
    fill(server)
    (tmp_path / "backups").mkdir()
    message = said(taskctl("backup", "backups/copy.db"))
    copy = tmp_path / "backups" / "copy.db"
    assert names(tmp_path / "backups") == ["copy.db"]
    assert (mode(copy), copy.stat().st_nlink) == (0o600, 1)
    assert (
        message == f"taskctl: backed up taskd.db to backups/copy.db, {copy.stat().st_size} bytes\n"
    )
    copy.chmod(0o400)
    with contextlib.closing(
        sqlite3.connect(f"{copy.as_uri()}?immutable=1", uri=True)
    ) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA journal_mode").fetchall() == [("delete",)], (
            "it needs no log beside it"
        )
    assert dump(copy) == dump(tmp_path / "taskd.db")


def test_a_backup_to_stdout_is_the_same_file(
    taskctl: Taskctl, server: Process, tmp_path: Path
) -> None:
    fill(server)
    said(taskctl("backup", "copy.db"))
    (tmp_path / "tmp").mkdir()
    before = names(tmp_path)
    variables = {"TMPDIR": f"{tmp_path}/tmp"}
    process = launched(tmp_path, "backup", "-", text=False, variables=variables)
    written, messages = process.communicate(timeout=DEADLINE)
    assert (process.returncode, messages) == (0, b"")
    assert written == (tmp_path / "copy.db").read_bytes()
    assert (names(tmp_path), names(tmp_path / "tmp")) == (before, [])


def test_the_empty_name_is_the_directory_which_a_backup_does_not_replace(taskctl: Taskctl) -> None:
    taskctl("seed", "alice")
    assert one_line(taskctl("backup", ""), 1) == ". exists already, and is never overwritten"


@pytest.mark.parametrize(
    "there", ["a file", "an empty file", "a directory", "a link to nowhere", "the database"]
)
def test_a_backup_never_overwrites(taskctl: Taskctl, tmp_path: Path, there: str) -> None:
    taskctl("seed", "alice")
    path = tmp_path / ("taskd.db" if there == "the database" else "copy.db")
    make: dict[str, Callable[[], object]] = {
        "a file": lambda: path.write_text("precious"), "an empty file": path.touch,
        "a directory": path.mkdir, "a link to nowhere": lambda: path.symlink_to("nowhere"),
        "the database": lambda: None,
    }  # fmt: skip
    make[there]()
    before, database = names(tmp_path), (tmp_path / "taskd.db").read_bytes()
    assert (
        one_line(taskctl("backup", path.name), 1)
        == f"{path.name} exists already, and is never overwritten"
    )
    assert (names(tmp_path), (tmp_path / "taskd.db").read_bytes()) == (before, database)
    assert there != "a file" or path.read_text() == "precious"


@pytest.mark.slow
def test_a_file_that_appears_while_the_backup_is_made_is_not_overwritten(
    large: Path, tmp_path: Path
) -> None:
    shutil.copy(large, tmp_path / "taskd.db")
    backup = launched(tmp_path, "backup", "copy.db", before=slowed(0.002))
    until(
        lambda: any(path.stat().st_size for path in tmp_path.glob(".copy.db.*/copy.db")),
        "it has begun",
    )
    (tmp_path / "copy.db").write_text("precious")
    _, messages = backup.communicate(timeout=DEADLINE)
    assert (backup.returncode, messages) == (
        1,
        "taskctl: copy.db exists already, and is never overwritten\n",
    )
    assert (tmp_path / "copy.db").read_text() == "precious"
    assert [name for name in names(tmp_path) if name.startswith(".")] == []


@pytest.mark.slow
def test_a_file_system_without_links_is_good_enough_for_a_backup(
    taskctl: Taskctl, tmp_path: Path
) -> None:
    taskctl("seed", "alice")
    fault = traced("-o", os.devnull, "-e", "inject=link,linkat:error=EPERM")
    backup = launched(tmp_path, "backup", "copy.db", before=fault)
    assert backup.communicate(timeout=DEADLINE)[1].startswith("taskctl: backed up")
    assert dump(tmp_path / "copy.db") == dump(tmp_path / "taskd.db")


@pytest.mark.parametrize("arguments", [["backup", "new.db"], ["restore", "copy.db"]])
def test_the_last_to_go_to_disk_is_the_name(
    taskctl: Taskctl, tmp_path: Path, arguments: list[str]
) -> None:
    taskctl("seed", "alice")
    taskctl("backup", "copy.db")
    trace = tmp_path / "trace"
    before = traced("-y", "-e", "trace=fsync,fdatasync", "-o", str(trace))
    launched(tmp_path, *arguments, before=before).communicate(timeout=DEADLINE)
    calls = [line for line in trace.read_text().splitlines() if "sync(" in line]
    assert f"<{tmp_path}>" in calls[-1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_backup_that_is_stopped_leaves_nothing(
    large: Path, tmp_path: Path, number: signal.Signals
) -> None:
    shutil.copy(large, tmp_path / "taskd.db")
    backup = launched(tmp_path, "backup", "copy.db", before=slowed(0.005))
    until(
        lambda: any(path.stat().st_size for path in tmp_path.glob(".copy.db.*/copy.db")),
        "it has begun",
    )
    backup.send_signal(number)
    assert "Traceback" not in backup.communicate(timeout=DEADLINE)[1]
    assert backup.returncode == 128 + number
    assert set(names(tmp_path)) <= {"taskd.db", "taskd.db-wal", "taskd.db-shm"}


def test_a_damaged_database_gives_no_backup(taskctl: Taskctl, large: Path, tmp_path: Path) -> None:
    content = bytearray(large.read_bytes())
    content[4096 * 5 : 4096 * 500] = os.urandom(4096 * 495)
    (tmp_path / "taskd.db").write_bytes(content)
    assert one_line(taskctl("backup", "copy.db"), 1).startswith(
        "taskd.db cannot be backed up: it is damaged: "
    )
    assert names(tmp_path) == ["taskd.db"]


def test_a_full_disk_gives_no_backup(large: Path, tmp_path: Path) -> None:
    shutil.copy(large, tmp_path / "taskd.db")
    limit = large.stat().st_size // 2
    backup = launched(tmp_path, "backup", "copy.db", command=["prlimit", f"--fsize={limit}"])
    written, messages = backup.communicate(timeout=DEADLINE)
    assert (backup.returncode, written, messages.count("\n")) == (1, "", 1)
    assert messages.startswith("taskctl: ")
    assert names(tmp_path) == ["taskd.db"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (
            ["backup", "copy.db"],
            "there is no database taskd.db; make it with: python taskctl.py init",
        ),
        (["backup", "-"], "there is no database taskd.db; make it with: python taskctl.py init"),
        (["restore", "copy.db"], "there is no file copy.db"),
        (["restore", "."], "there is no file ."),
        (["export"], "there is no database taskd.db; make it with: python taskctl.py init"),
        (["import", "-"], "there is no database taskd.db; make it with: python taskctl.py init"),
        (
            ["purge", "alice", "--yes"],
            "there is no database taskd.db; make it with: python taskctl.py init",
        ),
    ],
)
def test_what_is_not_there_is_named_and_not_made(
    taskctl: Taskctl, tmp_path: Path, arguments: list[str], why: str
) -> None:
    assert one_line(taskctl(*arguments), 1) == why
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["backup", "no/such/copy.db"], "there is no directory no/such"),
        (["import", "no/such/tasks.jsonl"], "no/such/tasks.jsonl: No such file or directory"),
        (["import", "."], ".: Is a directory"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(
    taskctl: Taskctl, tmp_path: Path, arguments: list[str], why: str
) -> None:
    taskctl("seed", "alice")
    assert one_line(taskctl(*arguments), 1) == why


def test_a_terminal_is_spared_the_bytes_of_a_backup(taskctl: Taskctl, tmp_path: Path) -> None:
    taskctl("seed", "alice")
    messages, seen = on_a_terminal(tmp_path, "backup", "-", stream="stdout", status=1)
    assert seen == ""
    assert messages.startswith(b"taskctl: a database is not written to a terminal")


def test_a_backup_shows_its_progress_on_a_terminal(
    taskctl: Taskctl, large: Path, tmp_path: Path
) -> None:
    shutil.copy(large, tmp_path / "taskd.db")
    _, seen = on_a_terminal(tmp_path, "backup", "copy.db", stream="stderr")
    assert "reading taskd.db" in seen
    assert "100%" in seen
    assert "backed up taskd.db to copy.db" in seen


# --- restore --------------------------------------------------------------------------------------


def before_restore(directory: Path) -> Path:
    """Return the database that a restore has kept."""
    [kept] = directory.glob("taskd.db.before-restore-*")
    return kept


def test_a_restored_server_answers_as_it_did_when_the_backup_was_made(
    taskctl: Taskctl, start: Start, tmp_path: Path
) -> None:
    server = start()
    before = fill(server)
    with writing(server):
        said(taskctl("backup", "copy.db"))
    busy = {task["id"]: task for task in listed(server, "busy")}
    for user, tasks in before.items():
        server.request("DELETE", path_of(user, tasks[0]["id"]), headers=bearer(user))
        server.request("PUT", path_of(user, tasks[1]["id"]), {"title": "changed"}, bearer(user))
    newest, after = add(server, "carol"), answers(server)
    server.terminate()

    message = said(taskctl("restore", "copy.db"))
    kept = before_restore(tmp_path)
    assert message == (
        f"taskctl: the old database is kept as {kept.name}\n"
        "taskctl: restored taskd.db from copy.db\n"
    )
    assert (mode(kept), mode(tmp_path / "taskd.db")) == (0o600, 0o600)
    assert names(tmp_path) == ["copy.db", "taskd.db", kept.name]

    restored = start()
    assert answers(restored) == before
    assert listed(restored, "carol") == []
    assert all(busy[task["id"]] == task for task in listed(restored, "busy"))
    assert add(restored)["id"] == newest["id"] + 1, (
        "somebody may still know a task made since by its id"
    )
    restored.terminate()

    said(taskctl("restore", kept.name))
    assert (answers(again := start()), listed(again, "carol")) == (after, [newest])


def test_what_only_the_log_of_a_killed_server_holds_is_kept_too(
    taskctl: Taskctl, start: Start, tmp_path: Path
) -> None:
    taskctl("seed", "alice", "--count", "3")
    taskctl("backup", "copy.db")
    server = start()
    newest = add(server)
    server.kill()
    assert (tmp_path / "taskd.db-wal").stat().st_size > 0
    said(taskctl("restore", "copy.db"))
    assert sorted(stored(before_restore(tmp_path))) == [1, 2, 3, newest["id"]]
    assert sorted(stored(tmp_path / "taskd.db")) == [1, 2, 3]


def test_a_database_with_a_log_beside_it_is_restored_with_what_the_log_holds(
    taskctl: Taskctl, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "old").mkdir()
    server = start(directory=tmp_path / "old")
    tasks = [add(server), add(server)]
    server.kill()
    said(taskctl("restore", "old/taskd.db"))
    assert listed(start(), "alice") == tasks


def test_a_backup_of_what_a_killed_writer_left_has_nothing_of_its_last_transaction(
    taskctl: Taskctl, tmp_path: Path
) -> None:
    taskctl("seed", "alice", "--count", "500")
    path, before = tmp_path / "taskd.db", dump(tmp_path / "taskd.db")
    (tmp_path / "old").mkdir()
    with contextlib.closing(sqlite3.connect(path)) as writer:
        writer.executescript("PRAGMA journal_mode = DELETE; PRAGMA cache_size = 1; BEGIN")
        writer.execute("UPDATE task SET title = 'half'")
        for suffix in ("", "-journal"):  # some of the change is in the file
            shutil.copy(f"{path}{suffix}", tmp_path / "old" / f"taskd.db{suffix}")
    assert b"half" in (tmp_path / "old" / "taskd.db").read_bytes()
    said(taskctl("backup", "copy.db", DATABASE_URL="sqlite:///old/taskd.db"))
    assert dump(tmp_path / "copy.db") == before


def test_an_idle_server_is_enough_for_a_restore_to_be_refused(
    taskctl: Taskctl, server: Process, tmp_path: Path
) -> None:
    before = fill(server)
    taskctl("backup", "copy.db")
    newest = add(server, "carol")
    changed = (tmp_path / "taskd.db").stat().st_mtime_ns
    for _ in range(3):
        assert (
            one_line(taskctl("restore", "copy.db"), 1)
            == "taskd.db is open elsewhere: stop the server first"
        )
    assert (tmp_path / "taskd.db").stat().st_mtime_ns == changed
    assert (answers(server), listed(server, "carol")) == (before, [newest])
    assert add(server, "carol")["id"] == newest["id"] + 1
    assert set(names(tmp_path)) == {"copy.db", "taskd.db", "taskd.db-wal", "taskd.db-shm"}


def test_a_server_that_has_not_answered_anything_yet_is_enough_too(
    taskctl: Taskctl, start: Start, tmp_path: Path
) -> None:
    taskctl("seed", "alice", "--count", "3")
    taskctl("backup", "copy.db")
    start()
    assert (
        one_line(taskctl("restore", "copy.db"), 1)
        == "taskd.db is open elsewhere: stop the server first"
    )


def other_database(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


NOT_TO_RESTORE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a text": (
        lambda path: path.write_text("Dear diary, today I bought milk. " * 100),
        "file is not a database",
    ),
    "an empty file": (lambda path: path.touch(), "it is not a database of taskd"),
    "another program's": (
        lambda path: other_database(path, "CREATE TABLE t (a)"),
        "it is not a database of taskd",
    ),
    "other columns": (
        lambda path: other_database(path, "CREATE TABLE task (id INTEGER PRIMARY KEY, title TEXT)"),
        "does not fit schema.sql: it lacks",
    ),
    "half a file": (
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "malformed",
    ),
    "damaged": (
        lambda path: path.write_bytes(
            path.read_bytes()[: -4096 * 500] + bytes(range(256)) * 16 * 500
        ),
        "it is damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "why"), NOT_TO_RESTORE.values(), ids=NOT_TO_RESTORE)
def test_a_file_that_is_not_a_sound_database_of_taskd_is_not_restored(
    taskctl: Taskctl, large: Path, tmp_path: Path, spoil: Callable[[Path], object], why: str
) -> None:
    taskctl("seed", "alice")
    if "file" in why or "damaged" in why or "malformed" in why:
        shutil.copy(large, tmp_path / "copy.db")
    spoil(tmp_path / "copy.db")
    before, database = names(tmp_path), (tmp_path / "taskd.db").read_bytes()
    message = one_line(taskctl("restore", "copy.db"), 1)
    assert why in message
    assert "copy.db" in message
    assert (names(tmp_path), (tmp_path / "taskd.db").read_bytes()) == (before, database)


VERSION_1 = [
    """CREATE TABLE task (
        id          INTEGER PRIMARY KEY AUTOINCREMENT,  -- the schema of taskd's first days
        user_id     TEXT NOT NULL,
        title       TEXT NOT NULL,
        description TEXT,
        completed   BOOLEAN NOT NULL DEFAULT FALSE,
        created_at  TEXT NOT NULL,
        updated_at  TEXT NOT NULL
    )""",
    "CREATE INDEX task_user_id_id ON task (user_id, id)",
    """INSERT INTO task VALUES
        (7, 'alice', 'Buy milk', '2 litres', 0,
         '2026-11-20T21:00:00.000Z', '2026-11-20T21:00:00.000Z')""",
]


def test_a_backup_from_before_an_upgrade_is_restored_and_brought_up_to_date(
    taskctl: Taskctl, start: Start, tmp_path: Path
) -> None:
    other_database(tmp_path / "taskd.db", *VERSION_1)
    before = dump(tmp_path / "taskd.db")
    said(taskctl("backup", "copy.db"))
    assert dump(tmp_path / "taskd.db") == dump(tmp_path / "copy.db") == before, (
        "a backup upgrades nothing"
    )
    (tmp_path / "taskd.db").unlink()
    taskctl("seed", "bob", "--count", "3")
    said(taskctl("restore", "copy.db"))
    assert dump(tmp_path / "copy.db") == before
    server = start()
    assert (listed(server, "alice"), listed(server, "bob")) == ([MILK], [])


def test_check_says_that_a_database_awaits_its_upgrade_and_leaves_it(
    taskctl: Taskctl, tmp_path: Path
) -> None:
    other_database(tmp_path / "taskd.db", *VERSION_1)
    (tmp_path / "taskd.db").chmod(0o600)
    before = state(tmp_path)
    answer = taskctl("check", "--json")
    assert (answer.returncode, findings(answer)["sqlite:///taskd.db"]) == (0, "warning")
    assert "of an earlier version" in answer.stdout
    assert state(tmp_path) == before


@pytest.mark.parametrize("command", ["backup copy.db", "backup -", "restore copy.db"])
def test_a_postgresql_database_is_left_to_its_own_tools(
    taskctl: Taskctl, tmp_path: Path, command: str
) -> None:
    (tmp_path / "copy.db").touch()
    message = one_line(
        taskctl(*command.split(), DATABASE_URL="postgresql://taskd:hunter2@localhost/tasks"), 1
    )
    assert "pg_dump" in message
    assert "hunter2" not in message
    assert names(tmp_path) == ["copy.db"]


def test_check_does_not_show_the_password_of_a_database_elsewhere(taskctl: Taskctl) -> None:
    url = "postgresql://taskd:hunter2@127.0.0.1:1/tasks"
    answer = taskctl("check", "--json", DATABASE_URL=url)
    assert answer.returncode == 1
    assert findings(answer)["postgresql://…@127.0.0.1:1/tasks"] == "FAIL"
    assert "hunter2" not in answer.stdout + answer.stderr


def test_a_restore_makes_a_database_that_is_not_there(taskctl: Taskctl, tmp_path: Path) -> None:
    taskctl("seed", "alice", "--count", "3")
    taskctl("backup", "copy.db")
    (tmp_path / "taskd.db").unlink()
    assert said(taskctl("restore", "copy.db")) == "taskctl: restored taskd.db from copy.db\n"
    assert (names(tmp_path), mode(tmp_path / "taskd.db")) == (["copy.db", "taskd.db"], 0o600)
    assert dump(tmp_path / "taskd.db") == dump(tmp_path / "copy.db")


def test_a_restore_leaves_out_the_ids_that_lost_tasks_may_have_had(
    taskctl: Taskctl, start: Start, tmp_path: Path
) -> None:
    server = start()
    add(server)
    said(taskctl("backup", "copy.db"))
    lost = [add(server)["id"] for _ in range(3)]
    server.kill()
    (tmp_path / "lost").mkdir()
    for path in tmp_path.glob("taskd.db*"):
        path.rename(tmp_path / "lost" / path.name)
    said(taskctl("restore", "copy.db", "--skip-ids", "1000"))
    restored = start()
    assert (lost, add(restored)["id"]) == ([2, 3, 4], 1002)
    restored.terminate()
    said(taskctl("restore", "copy.db", "--skip-ids", "500"))
    assert add(start())["id"] == 1003, "those that the old database used are left out too"


def test_a_damaged_database_is_replaced_and_kept_as_it_is(
    taskctl: Taskctl, large: Path, tmp_path: Path
) -> None:
    damaged = large.read_bytes()[: 4096 * 5] + os.urandom(large.stat().st_size - 4096 * 5)
    (tmp_path / "taskd.db").write_bytes(damaged)
    shutil.copy(large, tmp_path / "copy.db")
    assert "its last ids cannot be read" not in said(taskctl("restore", "copy.db"))
    assert before_restore(tmp_path).read_bytes()[100:] == damaged[100:], (
        "all but the header, which counts changes"
    )
    assert dump(tmp_path / "taskd.db") == dump(large)


def test_a_restore_says_that_the_damaged_database_does_not_tell_its_last_ids(
    taskctl: Taskctl, tmp_path: Path
) -> None:
    taskctl("seed", "alice", "--count", "3")
    taskctl("backup", "copy.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "taskd.db")) as connection:
        query = "SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_sequence'"
        [[page]] = connection.execute(query)
    content = bytearray((tmp_path / "taskd.db").read_bytes())
    content[4096 * (page - 1) : 4096 * page] = b"\xff" * 4096
    (tmp_path / "taskd.db").write_bytes(content)
    first, second, last = said(taskctl("restore", "copy.db")).splitlines()
    assert first.startswith("taskctl: the old database is kept as ")
    assert second == (
        "taskctl: its last ids cannot be read;"
        " so that none is used again, restore once more with --skip-ids"
    )
    assert last == "taskctl: restored taskd.db from copy.db"


def test_a_restore_from_stdin_names_it(taskctl: Taskctl, tmp_path: Path) -> None:
    taskctl("seed", "alice", "--count", "3")
    taskctl("backup", "copy.db")
    copy = (tmp_path / "copy.db").read_bytes()
    assert said(taskctl("restore", "-", stdin=copy)).endswith(
        "taskctl: restored taskd.db from stdin\n"
    )
    half = gzip.compress(copy)[:-100]
    assert one_line(taskctl("restore", "-", stdin=half), 1).startswith("stdin cannot be unpacked: ")
    assert one_line(taskctl("restore", "-", stdin=b"x" * 100), 1).startswith("stdin cannot be ")


def test_a_full_disk_is_not_said_to_be_the_output(
    taskctl: Taskctl, large: Path, tmp_path: Path
) -> None:
    taskctl("init")
    limit = large.stat().st_size // 2
    with large.open("rb") as stdin:
        command = ["prlimit", f"--fsize={limit}"]
        restore = launched(tmp_path, "restore", "-", command=command, stdin=stdin)
        _, messages = restore.communicate(timeout=DEADLINE)
    assert (restore.returncode, messages.count("\n")) == (1, 1)
    assert messages.startswith("taskctl: stdin cannot be unpacked: ")
    assert "File too large" in messages


def test_another_file_in_the_databases_place_is_left_to_the_operator(
    taskctl: Taskctl, tmp_path: Path
) -> None:
    taskctl("seed", "alice", "--count", "3")
    taskctl("backup", "copy.db")
    (tmp_path / "taskd.db").write_text("Dear diary, today I bought milk. " * 100)
    message = one_line(taskctl("restore", "copy.db"), 1)
    assert message == (
        "taskd.db: file is not a database; "
        "stop the server, move all taskd.db* away, and restore again"
    )
    assert (tmp_path / "taskd.db").read_text().startswith("Dear diary")
    assert names(tmp_path) == ["copy.db", "taskd.db"]


def test_a_log_that_lost_its_database_is_not_mixed_into_the_restored_one(
    taskctl: Taskctl, tmp_path: Path
) -> None:
    taskctl("seed", "alice", "--count", "3")
    taskctl("backup", "copy.db")
    (tmp_path / "taskd.db").rename(tmp_path / "elsewhere.db")
    (tmp_path / "taskd.db-wal").write_text("who knows what is in it")
    assert "taskd.db-wal exists without its database" in one_line(taskctl("restore", "copy.db"), 1)
    assert names(tmp_path) == ["copy.db", "elsewhere.db", "taskd.db-wal"]


@pytest.mark.slow
def test_a_restore_that_is_killed_leaves_the_old_database_or_the_new(
    taskctl: Taskctl, large: Path, tmp_path: Path
) -> None:
    taskctl("seed", "alice", "--count", "3000")
    shutil.copy(large, tmp_path / "copy.db")
    shutil.copy(tmp_path / "taskd.db", tmp_path / "old.db")
    before, after = dump(tmp_path / "old.db"), dump(large)
    trace = tmp_path / "trace"
    counted = launched(
        tmp_path, "restore", "copy.db", before=traced("-e", "pwrite64,fsync", "-o", str(trace))
    )
    assert counted.communicate(timeout=DEADLINE)[1].endswith("restored taskd.db from copy.db\n")
    writes, syncs = (trace.read_text().count(f"{call}(") for call in ("pwrite64", "fsync"))
    moments = [("pwrite64", writes - back) for back in (writes // 2, 800, 100, 5, 1, 0)]
    seen = set()
    for call, when in [*moments, ("fsync", syncs - 1), ("fsync", syncs)]:
        for left in tmp_path.glob("*taskd.db*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        shutil.copy(tmp_path / "old.db", tmp_path / "taskd.db")
        fault = ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={when}"]
        killed = launched(tmp_path, "restore", "copy.db", before=traced("-o", os.devnull, *fault))
        killed.communicate(timeout=DEADLINE)
        assert killed.returncode != 0
        with contextlib.closing(sqlite3.connect(tmp_path / "taskd.db")) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        found = dump(tmp_path / "taskd.db")
        assert found in (before, after), f"killed at {call} {when} of {writes}, {syncs}"
        seen.add(found == after)
    assert seen == {True, False}, "some were killed before the end of the restore, one after it"


# --- check ----------------------------------------------------------------------------------------


def findings(answer: Answer) -> dict[str, str]:
    return {finding["about"]: finding["result"] for finding in json.loads(answer.stdout)}


def test_check_finds_a_good_server_good_while_it_writes(
    taskctl: Taskctl, server: Process, tmp_path: Path
) -> None:
    fill(server)
    with writing(server):
        result = {
            finding["about"]: finding["result"] for finding in data(taskctl("check", "--json"))
        }
    assert result == dict.fromkeys(
        [
            "secret 1",
            "sqlite:///taskd.db",
            "taskd.db",
            "taskd.db-wal",
            "taskd.db-shm",
            "TASKD_JWKS_URL",
        ],
        "ok",
    )


def state(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        path.name: (mode(path), path.stat().st_mtime_ns, path.read_bytes())
        for path in directory.iterdir()
    }


@pytest.mark.parametrize(
    "logged", [False, True], ids=["closed properly", "left by a killed server"]
)
def test_check_changes_nothing(
    taskctl: Taskctl, start: Start, tmp_path: Path, logged: bool
) -> None:
    server = start()
    fill(server)
    server.kill() if logged else server.terminate()
    before = state(tmp_path)
    assert ("taskd.db-wal" in before) == logged
    assert taskctl("check").returncode == 0
    after = state(tmp_path)
    if logged:  # readers share the index of the log as memory
        assert before.pop("taskd.db-shm")
        assert after.pop("taskd.db-shm")
    assert after == before


CHECKED_OFF: dict[str, tuple[Callable[[Path], object], str]] = {
    "damaged": (
        lambda path: path.write_bytes(
            path.read_bytes()[:8192] + b"x" * (path.stat().st_size - 8192)
        ),
        "it is damaged",
    ),
    "an empty file": (lambda path: path.write_bytes(b""), "it is not a database of taskd"),
    "another program's": (
        lambda path: (path.unlink(), other_database(path, "CREATE TABLE t (a)")),
        "it is not a database of taskd",
    ),
    "a column too many": (
        lambda path: other_database(path, "ALTER TABLE task ADD COLUMN colour TEXT"),
        "colour",
    ),
    "an index too few": (
        lambda path: other_database(path, "DROP INDEX task_completed_id"),
        "it lacks",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "why"), CHECKED_OFF.values(), ids=CHECKED_OFF)
def test_check_says_what_is_off_with_the_database(
    taskctl: Taskctl, tmp_path: Path, spoil: Callable[[Path], object], why: str
) -> None:
    taskctl("seed", "alice", "--count", "100")
    spoil(tmp_path / "taskd.db")
    (tmp_path / "taskd.db").chmod(0o600)
    before = state(tmp_path)
    answer = taskctl("check", "--json")
    assert (answer.returncode, answer.stderr) == (1, "taskctl: 1 of 4 checks failed\n")
    assert findings(answer)["sqlite:///taskd.db"] == "FAIL"
    assert why in answer.stdout
    assert state(tmp_path) == before


@pytest.mark.parametrize("name", [".env", "taskd.db", "taskd.db-wal"])
@pytest.mark.parametrize(
    ("bits", "result"), [(0o600, "ok"), (0o640, "warning"), (0o604, "FAIL"), (0o666, "FAIL")]
)
def test_check_says_whose_files_others_can_read(
    taskctl: Taskctl, start: Start, tmp_path: Path, name: str, bits: int, result: str
) -> None:
    taskctl("init", secret="")
    server = start()
    add(server)
    server.kill()
    (tmp_path / name).chmod(bits)
    answer = taskctl("check", "--json")
    assert findings(answer)[name] == result
    assert {found for about, found in findings(answer).items() if about != name} == {"ok"}
    assert answer.returncode == (result == "FAIL")
    assert (f"chmod 600 {name}" in answer.stdout) == (result != "ok")


def test_check_counts_all_that_is_off(taskctl: Taskctl, tmp_path: Path) -> None:
    (tmp_path / "taskd.db").write_text("Dear diary, today I bought milk. " * 100)
    (tmp_path / "taskd.db").chmod(0o644)
    answer = taskctl("check")
    assert (answer.returncode, answer.stderr) == (1, "taskctl: 2 of 4 checks failed\n")
    assert NO_KEY_SET  # its table covers the key set


# --- export ---------------------------------------------------------------------------------------


def exported(answer: Answer) -> list[dict[str, Any]]:
    assert (answer.returncode, answer.stderr) == (0, ""), answer
    assert answer.stdout == "" or answer.stdout.endswith("\n")
    return [json.loads(line) for line in answer.stdout.split("\n")[:-1]]


def test_an_export_has_every_task_as_the_api_shows_it(taskctl: Taskctl, server: Process) -> None:
    before = fill(server)
    with writing(server):
        tasks = exported(taskctl("export"))
    assert {user: [task for task in tasks if task["user_id"] == user] for user in PEOPLE} == before
    assert [task["id"] for task in tasks] == sorted(task["id"] for task in tasks)
    assert {tuple(task) for task in tasks} == {tuple(TASK_KEYS)}
    assert {task["user_id"] for task in tasks} == {*PEOPLE, "busy"}


def test_an_export_of_one_user_has_nobody_elses_tasks(taskctl: Taskctl, server: Process) -> None:
    before = fill(server)
    for user in PEOPLE:
        assert exported(taskctl("export", user)) == before[user]
    assert one_line(taskctl("export", "Alice"), 1) == "Alice has no tasks"


def test_an_export_of_no_tasks_is_empty(taskctl: Taskctl) -> None:
    taskctl("init")
    assert exported(taskctl("export")) == []


def test_an_export_is_of_one_moment(
    taskctl: Taskctl, large: Path, start: Start, tmp_path: Path
) -> None:
    shutil.copy(large, tmp_path / "taskd.db")
    server = start()
    with launched(tmp_path, "export") as export:
        first = export.stdout.readline()  # the pipe is full: it waits for a reader now
        add(server, "carol")
        assert (
            server.request(
                "DELETE", path_of("user-100", 15_000), headers=bearer("user-100")
            ).status_code
            == 200
        )
        rest, messages = export.stdout.read(), export.stderr.read()
    assert (export.returncode, messages) == (0, "")
    tasks = [json.loads(line) for line in (first + rest).splitlines()]
    assert [task["id"] for task in tasks] == list(range(1, 15_001))


MEASURED = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.slow
def test_export_and_import_take_no_more_memory_for_more_tasks(tmp_path: Path) -> None:
    def most(home: Path, *arguments: str) -> int:
        process = launched(home, *arguments, command=[sys.executable, "-c", MEASURED])
        return int(process.communicate(timeout=DEADLINE)[0])

    taken = []
    for count in (2000, 6000):
        home = tmp_path / str(count)
        home.mkdir()
        run(home, "init")
        large = MILK | {"description": "x" * 10_000}
        (home / "tasks.jsonl").write_text(
            lines(*(large | {"id": number} for number in range(1, count + 1)))
        )
        taken.append([most(home, "import", "tasks.jsonl"), most(home, "export")])
    more = [after - before for before, after in zip(*taken, strict=True)]
    assert max(more) < 20_000, f"KB, and 40,000 are in the 4,000 tasks more: {taken}"


@pytest.mark.parametrize("command", ["export", "backup -"])
def test_a_reader_who_stops_reading_an_export_or_a_backup_causes_no_complaint(
    large: Path, tmp_path: Path, command: str
) -> None:
    shutil.copy(large, tmp_path / "taskd.db")
    # It is started, not forked, because Python complains of its output when it ends.
    process = launched(tmp_path, *command.split(), command=["env"], text=False)
    assert process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(DEADLINE) == 1


# --- import ---------------------------------------------------------------------------------------


def test_what_was_exported_can_be_imported_into_another_database_and_answers_the_same(
    taskctl: Taskctl, server: Process, start: Start, tmp_path: Path
) -> None:
    before = fill(server)
    text = taskctl("export").stdout
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "tasks.jsonl").write_text(text)
    run(tmp_path / "new", "init")
    imported = run(tmp_path / "new", "import", "tasks.jsonl")
    assert said(imported) == "taskctl: 6 imported, 0 already there, 0 updated\n"
    other = start(directory=tmp_path / "new")
    assert answers(other) == before
    found = other.request("GET", f"{path_of('bob')}?q=2%20LITRES", headers=bearer("bob")).json
    assert found == [task for task in before["bob"] if "litres" in task["description"]]
    assert add(other)["id"] == max(task["id"] for tasks in before.values() for task in tasks) + 1
    assert run(tmp_path / "new", "export", "bob").stdout == taskctl("export", "bob").stdout


def test_an_import_can_be_repeated_without_doubling_while_a_server_writes(
    taskctl: Taskctl, server: Process
) -> None:
    before = fill(server)
    text = taskctl("export").stdout
    with writing(server):
        for _ in range(3):
            assert (
                said(taskctl("import", "-", stdin=text))
                == "taskctl: 0 imported, 6 already there, 0 updated\n"
            )
    assert answers(server) == before


def test_an_import_brings_back_what_was_deleted_under_its_old_id(
    taskctl: Taskctl, server: Process
) -> None:
    before = fill(server)
    text = taskctl("export").stdout
    newest = add(server, "carol")["id"]
    for task in before["bob"]:
        server.request("DELETE", path_of("bob", task["id"]), headers=bearer("bob"))
    assert (
        said(taskctl("import", "-", stdin=text))
        == "taskctl: 2 imported, 4 already there, 0 updated\n"
    )
    assert answers(server) == before
    assert add(server)["id"] == newest + 1


def test_of_the_task_and_the_line_the_newer_one_stays(taskctl: Taskctl, server: Process) -> None:
    tasks = [
        add(server, title=title) for title in ("same", "older here", "newer here", "as new here")
    ]
    later, earlier = "2126-01-01T00:00:00.000Z", tasks[0]["created_at"]
    changes: list[dict[str, Any]] = [
        {},
        {"completed": True, "description": "n", "updated_at": later},
        {"completed": True},
        {"title": "x"},
    ]
    renamed = server.request(
        "PUT", path_of("alice", tasks[2]["id"]), {"title": "newest here"}, bearer()
    ).json
    assert renamed["updated_at"] >= earlier
    until(
        lambda: (
            server.request(
                "PUT", path_of("alice", tasks[2]["id"]), {"completed": False}, bearer()
            ).json["updated_at"]
            > tasks[2]["updated_at"]
        ),
        "the clock has gone on",
    )
    here = listed(server, "alice")
    given = [task | change for task, change in zip(tasks, changes, strict=True)]
    assert said(taskctl("import", "-", stdin=lines(*given))) == (
        "taskctl: 0 imported, 2 already there, 1 updated, 1 skipped: the existing task is newer\n"
    )
    assert listed(server, "alice") == [here[0], given[1], here[2], here[3]]


FULL_DISK = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
"""


@pytest.mark.parametrize("options", [["--new"], []])
def test_an_import_that_cannot_be_stored_does_not_say_that_it_is_done(
    taskctl: Taskctl, tmp_path: Path, options: list[str]
) -> None:
    taskctl("init")
    long = (MILK | {"id": number, "description": "x" * 9000} for number in range(1, 41))
    (tmp_path / "tasks.jsonl").write_text(lines(*long))
    with launched(tmp_path, "import", "tasks.jsonl", *options, before=FULL_DISK) as process:
        said = process.stderr.read()
        assert process.wait(DEADLINE) == 1
    assert said.startswith("taskctl: the database cannot be used")
    assert "imported" not in said
    assert stored(tmp_path / "taskd.db") == {}


NEW_LINES: list[dict[str, Any]] = [
    {"user_id": "alice", "title": "Buy milk", "created_at": None, "updated_at": None},
    {"user_id": "bob", "title": "Dig", "tags": ["x"], "created_at": "2020-01-01T01:00:00+01:00"},
    {"user_id": "alice", "title": "Buy milk", "id": 1, "updated_at": "2020-01-01T00:00:00Z"},
    {"user_id": "alice", "title": "Buy tea", "id": "another program's", "priority": "low",
     "created_at": "2020-01-01T00:00:00Z", "updated_at": "2021-01-01T00:00:00Z"},
]  # fmt: skip


def test_new_tasks_are_imported_without_ids_and_times(
    taskctl: Taskctl, server: Process, tmp_path: Path
) -> None:
    first = server.request("POST", "/api/alice/tasks", {"title": "First"}, bearer()).json
    (tmp_path / "new.jsonl").write_text(lines(*NEW_LINES))
    before = taskd.timestamp(datetime.now(UTC))
    for _ in range(2):
        answer = taskctl("import", "--new", "new.jsonl")
        assert (answer.returncode, answer.stderr) == (0, "taskctl: 4 imported\n")
    exported = [json.loads(line) for line in taskctl("export").stdout.splitlines()]
    assert exported[0] == first
    ids = [task["id"] for task in exported]
    assert ids == list(range(first["id"], first["id"] + 9))
    titles = [task["title"] for task in exported[1:]]
    assert titles == [line["title"] for line in NEW_LINES] * 2
    milk, dig, old, tea = exported[1:5]
    assert old["created_at"] == old["updated_at"] == "2020-01-01T00:00:00.000Z"
    assert before <= milk["created_at"] == milk["updated_at"]
    assert (dig["user_id"], dig["tags"]) == ("bob", ["x"])
    assert dig["created_at"] == dig["updated_at"] == "2020-01-01T00:00:00.000Z"
    assert (tea["priority"], tea["created_at"][:4], tea["updated_at"][:4]) == (
        "low",
        "2020",
        "2021",
    )
    created = server.request("POST", "/api/alice/tasks", {"title": "Last"}, bearer()).json
    assert created["id"] == ids[-1] + 1


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"title": "x"}, "user_id must be a string that is not empty"),
        ({"user_id": "", "title": "x"}, "user_id must be a string that is not empty"),
        ({"user_id": "alice"}, "title is missing"),
        ({"user_id": "alice", "title": "x", "created_at": "x"}, "created_at must be a time"),
        ({"user_id": "alice", "title": "x", "colour": 1}, "colour"),
    ],
)
def test_a_bad_line_of_new_tasks_is_named(bad: dict[str, Any], why: str) -> None:
    text = lines({"user_id": "alice", "title": "x"}, bad).encode()
    with pytest.raises(taskctl.Refused, match=rf"^line 2: {why}.*; nothing was imported$"):
        list(taskctl.parsed(io.BytesIO(text), new=True))


def test_ids_go_on_after_the_highest_that_was_imported(taskctl: Taskctl, server: Process) -> None:
    assert said(taskctl("import", "-", stdin=lines(MILK | {"id": 5000}, MILK))).startswith(
        "taskctl: 2 imported"
    )
    assert server.request("DELETE", path_of("alice", 5000), headers=bearer()).status_code == 200
    assert add(server)["id"] == 5001
    assert [task["id"] for task in listed(server, "alice")] == [7, 5001]


def test_lines_made_by_other_tools_are_understood(taskctl: Taskctl, server: Process) -> None:
    plain = {
        name: value for name, value in MILK.items() if name not in ("description", "completed")
    }
    abroad = {
        "created_at": "2026-11-20T22:00:00+01:00",
        "updated_at": "2026-11-20T22:00:00.0009+01:00",
    }
    text = (
        "\r\n"
        + json.dumps(plain | abroad, indent=None, ensure_ascii=True)
        + "\r\n\n  \n"
        + json.dumps(MILK | {"id": 8})
    )
    assert (
        said(taskctl("import", "-", stdin=text))
        == "taskctl: 2 imported, 0 already there, 0 updated\n"
    )
    assert listed(server, "alice") == [MILK | {"description": None}, MILK | {"id": 8}]


TIME_RULE = "must be a time with its offset from UTC, such as 2026-11-20T21:00:00.000Z"
ID_RULE = "must be a whole number from 1 to 9007199254740991"
TITLE_RULE = "title must be a string of 1 to 200 characters"
BAD_LINES: dict[str, tuple[Any, str]] = {
    "a blank title": ({"title": " \t"}, "title must not be blank"),
    "a long title": ({"title": "x" * 201}, TITLE_RULE),
    "an empty title": ({"title": ""}, "title must not be blank"),
    "no title": ({"title": ...}, "title is missing"),
    "a title with U+0000": ({"title": "a\0"}, "title must not contain U+0000"),
    "a long description": (
        {"description": "x" * 10_001},
        "description must be a string of at most 10,000 characters",
    ),
    "a number for a description": (
        {"description": 5},
        "description must be a string of at most 10,000 characters",
    ),
    "completed as a number": ({"completed": 1}, "completed must be true or false"),
    "two faults": (
        {"title": 1, "completed": None},
        f"{TITLE_RULE}; completed must be true or false",
    ),
    "a member too many": ({"colour": "red"}, "colour is not a field that can be set here"),
    "no id": ({"id": ...}, f"id {ID_RULE}"),
    "id 0": ({"id": 0}, f"id {ID_RULE}"),
    "an id that leaves none for new tasks": ({"id": 2**63 - 1}, f"id {ID_RULE}"),
    "an id beyond SQLite": ({"id": 2**64}, f"id {ID_RULE}"),
    "an id as a string": ({"id": "7"}, f"id {ID_RULE}"),
    "an empty user": ({"user_id": ""}, "user_id must be a string that is not empty"),
    "no user": ({"user_id": ...}, "user_id must be a string that is not empty"),
    "no time": ({"created_at": ...}, f"created_at {TIME_RULE}"),
    "a day that is not": ({"updated_at": "2026-02-30T00:00:00.000Z"}, f"updated_at {TIME_RULE}"),
    "a time without an offset": (
        {"created_at": "2026-11-20T21:00:00.000"},
        f"created_at {TIME_RULE}",
    ),
    "a time before all times": (
        {"created_at": "0001-01-01T00:00:00+01:00"},
        f"created_at {TIME_RULE}",
    ),
    "no object": ("[]", "body must be a JSON object"),
    "no JSON": ("{'id': 7}", "it must be JSON in UTF-8: "),
    "half a line": ('{"id": 7, "user_id"', "it must be JSON in UTF-8: "),
    "two on a line": (json.dumps(MILK) * 2, "it must be JSON in UTF-8: "),
    "no UTF-8": (b'{"title": "\xff"}', "it must be JSON in UTF-8: "),
    "bottomless": ("[" * 100_000, "it must be JSON in UTF-8: "),
    "a line of 2 MB": (
        json.dumps(MILK | {"description": "x" * 2_000_000}),
        "it must be JSON in UTF-8: ",
    ),
}


@pytest.mark.parametrize(("bad", "why"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named_with_what_is_wrong(bad: Any, why: str) -> None:
    if isinstance(bad, dict):
        bad = json.dumps({name: value for name, value in (MILK | bad).items() if value is not ...})
    bad = bad if isinstance(bad, bytes) else bad.encode()
    with pytest.raises(taskctl.Refused) as caught:
        list(taskctl.parsed(io.BytesIO(lines(MILK, MILK).encode() + bad + b"\n")))
    message = str(caught.value)
    assert message.startswith(f"line 3: {why}")
    assert message.endswith("; nothing was imported")


@pytest.mark.parametrize("bad", ["{'id': 7}", json.dumps(MILK | {"id": 0})])
def test_nothing_is_imported_if_one_line_is_bad(taskctl: Taskctl, tmp_path: Path, bad: str) -> None:
    taskctl("seed", "bob", "--count", "3")
    before = dump(tmp_path / "taskd.db")
    good = (MILK | {"id": number} for number in range(10, 1510))
    text = f"{lines(*itertools.islice(good, 1200))}\n{bad}\n{lines(*good)}"
    message = one_line(taskctl("import", "-", stdin=text), 1)
    assert message.startswith("line 1202: ")
    assert message.endswith("; nothing was imported")
    assert dump(tmp_path / "taskd.db") == before


@pytest.mark.parametrize("change", [{"user_id": "bob"}, {"created_at": "2026-11-20T21:00:00.001Z"}])
def test_a_line_with_the_id_of_another_task_is_refused_and_named(
    taskctl: Taskctl, tmp_path: Path, change: dict[str, str]
) -> None:
    taskctl("init")
    said(taskctl("import", "-", stdin=lines(MILK)))
    before = dump(tmp_path / "taskd.db")
    newer = MILK | {"updated_at": "2126-01-01T00:00:00.000Z"}
    message = one_line(
        taskctl("import", "-", stdin=lines(MILK | {"id": 1}, newer | change, MILK | {"id": 9})), 1
    )
    assert message == "line 2: id 7 is that of another task here; nothing was imported"
    assert dump(tmp_path / "taskd.db") == before


def test_an_id_that_stands_twice_is_refused_and_named(taskctl: Taskctl, tmp_path: Path) -> None:
    taskctl("init")
    text = (
        lines(MILK | {"id": 1}, MILK, MILK | {"id": 2}) + "\n" + lines(MILK | {"completed": True})
    )
    assert (
        one_line(taskctl("import", "-", stdin=text), 1)
        == "line 5: id 7 is on line 2 already; nothing was imported"
    )
    assert stored(tmp_path / "taskd.db") == {}


@pytest.mark.slow
def test_an_import_waits_for_no_lock_until_all_lines_are_read_and_then_imports_all_or_nothing(
    taskctl: Taskctl, server: Process, tmp_path: Path
) -> None:
    process = launched(tmp_path, "import", "-", stdin=subprocess.PIPE)
    assert process.stdin
    process.stdin.write(lines(*(MILK | {"id": number} for number in range(1, 3001))))
    process.stdin.flush()
    assert add(server, "bob")["id"] == 1, "the server goes on writing"
    process.stdin.close()
    process.stdin = None
    _, messages = process.communicate(timeout=DEADLINE)
    assert (process.returncode, messages) == (
        1,
        "taskctl: line 1: id 1 is that of another task here; nothing was imported\n",
    )
    with locked(tmp_path / "taskd.db"):
        assert "locked" in one_line(taskctl("import", "-", stdin=lines(MILK)), 1)
    assert sorted(stored(tmp_path / "taskd.db")) == [1]


def test_an_import_shows_its_progress_on_a_terminal(
    taskctl: Taskctl, large: Path, tmp_path: Path
) -> None:
    taskctl("init")
    (tmp_path / "tasks.jsonl").write_text(
        lines(*(MILK | {"id": number} for number in range(1, 3001)))
    )
    _, seen = on_a_terminal(tmp_path, "import", "tasks.jsonl", stream="stderr")
    assert "reading" in seen
    assert "100%" in seen
    assert "3000 imported, 0 already there, 0 updated" in seen


# --- purge ----------------------------------------------------------------------------------------


def test_a_purge_deletes_one_users_tasks_and_nobody_elses(
    taskctl: Taskctl, server: Process
) -> None:
    before = fill(server)
    with writing(server):
        assert said(taskctl("purge", "bob", "--yes")) == "taskctl: deleted 2 tasks of bob\n"
    assert answers(server) == before | {"bob": []}
    assert add(server, "bob")["id"] > max(task["id"] for task in listed(server, "busy"))


def test_a_purge_leaves_no_row_of_this_user_in_any_table(
    taskctl: Taskctl, server: Process, tmp_path: Path
) -> None:
    fill(server)
    headers = bearer("bob") | {"Idempotency-Key": "once"}
    assert server.request("POST", path_of("bob"), {"title": "Buy milk"}, headers).status_code == 201
    said(taskctl("purge", "bob", "--yes"))
    rows = [line for line in dump(tmp_path / "taskd.db") if line.startswith("INSERT")]
    assert [line for line in rows if "'bob'" in line] == []
    assert [line for line in rows if "'alice'" in line]


def test_a_user_without_tasks_cannot_be_purged(taskctl: Taskctl, server: Process) -> None:
    before = fill(server)
    for user in ("carol", "Bob", "b%", "bob "):
        assert one_line(taskctl("purge", user, "--yes"), 1) == f"{user} has no tasks"
    assert answers(server) == before


def test_without_a_terminal_a_purge_wants_a_yes(taskctl: Taskctl, server: Process) -> None:
    before = fill(server)
    message = one_line(taskctl("purge", "bob", stdin="y\n"), 1)
    assert message == "bob has 2 tasks; cannot ask without a terminal; repeat it with --yes"
    assert answers(server) == before


@pytest.mark.parametrize(
    ("answer", "deleted"), [(b"y\n", True), (b"n\n", False), (b"\n", False), (b"\x04", False)]
)
def test_a_purge_asks_first_and_says_how_many(
    taskctl: Taskctl, server: Process, tmp_path: Path, answer: bytes, deleted: bool
) -> None:
    before = fill(server)
    keyboard, terminal = os.openpty()
    process = launched(tmp_path, "purge", "bob", stdin=terminal)
    os.write(keyboard, answer)
    written, messages = process.communicate(timeout=DEADLINE)
    os.close(keyboard)
    os.close(terminal)
    assert messages.startswith("Delete all 2 tasks of bob? [y/N] ")
    assert (written, process.returncode) == ("", 0 if deleted else 1)
    assert answers(server) == (before | {"bob": []} if deleted else before)
    assert ("deleted 2 tasks of bob" in messages) == deleted


# --- Copy to another database ---------------------------------------------------------------------


def test_a_copy_has_all_that_the_original_has_and_never_uses_an_id_again(
    taskctl: Taskctl, start: Start, tmp_path: Path
) -> None:
    server = start()
    made = fill(server)
    keyed = bearer() | {"Idempotency-Key": "once"}
    first = server.request("POST", path_of("alice"), {"title": "once"}, keyed)
    last = add(server)["id"]
    assert server.request("DELETE", path_of("alice", last), headers=bearer()).status_code == 200
    page = server.request("GET", path_of("alice") + "?limit=1", headers=bearer()).headers["link"]
    before = answers(server)
    assert server.terminate() == 0
    answer = taskctl("copy", "sqlite:///taskd.db", "sqlite:///other.db")
    assert answer.returncode == 0, answer.stderr
    assert (
        f"copied {sum(map(len, made.values())) + 1} tasks and 1 idempotency key from"
        in answer.stderr
    )
    assert "checksums agree" in answer.stderr
    assert stored(tmp_path / "other.db") == stored(tmp_path / "taskd.db")
    other = start(DATABASE_URL="sqlite:///other.db")
    assert answers(other) == before
    again = other.request("POST", path_of("alice"), {"title": "once"}, keyed)
    assert (again.json, again.headers["idempotency-replayed"]) == (first.json, "true")
    path = page.removeprefix("<").partition(">")[0]
    assert other.request("GET", path, headers=bearer()).status_code == 200, (
        "a cursor of before is refused"
    )
    assert add(other)["id"] == last + 1
    assert listed(other, "alice")[-1]["id"] == last + 1


def test_a_copy_of_more_rows_than_a_statement_takes_has_all_of_them_or_none(
    taskctl: Taskctl, tmp_path: Path
) -> None:
    taskctl("seed", "alice", "--count", "2001")
    assert taskctl("copy", "sqlite:///taskd.db", "sqlite:///other.db").returncode == 0
    assert stored(tmp_path / "other.db") == stored(tmp_path / "taskd.db")
    sql(tmp_path / "taskd.db", "UPDATE task SET version = -1 << 63 WHERE id = 2001")
    taskctl("init", DATABASE_URL="sqlite:///new.db")
    sql(tmp_path / "new.db", "CREATE INDEX fails_then ON task (ABS(version))")
    one_line(taskctl("copy", "sqlite:///taskd.db", "sqlite:///new.db"), 1)
    assert stored(tmp_path / "new.db") == {}


def test_a_copy_into_a_database_with_keys_alone_is_refused(
    taskctl: Taskctl, start: Start, tmp_path: Path
) -> None:
    server = start(DATABASE_URL="sqlite:///keys.db")
    keyed = bearer() | {"Idempotency-Key": "k"}
    made = server.request("POST", path_of("alice"), {"title": "x"}, keyed).json["id"]
    server.request("DELETE", path_of("alice", made), headers=bearer())
    assert server.terminate() == 0
    taskctl("seed", "alice")
    message = one_line(taskctl("copy", "sqlite:///taskd.db", "sqlite:///keys.db"), 1)
    assert message.endswith("keys.db has tasks or keys already; nothing was copied")


def test_a_copy_without_tasks_uses_no_id_again_either(taskctl: Taskctl, start: Start) -> None:
    server = start()
    last = add(server)["id"]
    assert server.request("DELETE", path_of("alice", last), headers=bearer()).status_code == 200
    assert server.terminate() == 0
    assert taskctl("copy", "sqlite:///taskd.db", "sqlite:///other.db").returncode == 0
    assert add(start(DATABASE_URL="sqlite:///other.db"))["id"] == last + 1


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (["sqlite:///taskd.db", "sqlite:///taskd.db"], 2, "same"),
        (["sqlite:///nowhere.db", "sqlite:///other.db"], 1, "no database nowhere.db"),
        (["taskd.db", "sqlite:///other.db"], 2, "DATABASE_URL must be"),
        (["sqlite:///taskd.db", "mysql://x"], 2, "DATABASE_URL must be"),
        (
            ["sqlite:///taskd.db", "sqlite:///full.db"],
            1,
            "full.db has tasks or keys already; nothing was copied",
        ),
    ],
)
def test_a_copy_that_cannot_be_made_changes_nothing(
    taskctl: Taskctl, tmp_path: Path, arguments: list[str], status: int, why: str
) -> None:
    for name in ("taskd.db", "full.db"):
        assert (
            taskctl("seed", "alice", "--count", "3", DATABASE_URL=f"sqlite:///{name}").returncode
            == 0
        )
    before = {name: dump(tmp_path / name) for name in ("taskd.db", "full.db")}
    answer = taskctl("copy", *arguments)
    assert (answer.returncode, answer.stdout) == (status, "")
    assert why in " ".join(answer.stderr.split())
    assert {name: dump(tmp_path / name) for name in before} == before
    assert not (tmp_path / "nowhere.db").exists()

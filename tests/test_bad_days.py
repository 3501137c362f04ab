"""What operators meet: readers with few rights, links, full disks, hang-ups, odd surroundings."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import taskctl as taskctl_program
import taskd
from support import (
    DEADLINE,
    ROOT,
    SECRET,
    ForkServer,
    Process,
    assert_problem,
    bearer,
    database_url,
    environment,
    sql,
    stored,
    until,
)
from test_taskctl import COMMAND, launched, one_line
from test_taskctl_data import add, names, said

pytestmark = pytest.mark.sqlite("these are about a file")

Start = Callable[..., Process]
Taskctl = Callable[..., subprocess.CompletedProcess[str]]
TASKS = "/api/alice/tasks"


# --- Nothing is made beside the database ----------------------------------------------------------


def as_user(user: str) -> list[str]:
    return ["setpriv", f"--reuid={user}", "--regid=daemon", "--clear-groups"]


@pytest.fixture(scope="module")
def other_users() -> None:
    """Skip a test if other users cannot run the programs: not as root, or with root's Python."""
    look = [sys.executable, "-c", f"import falcon; open({str(ROOT / 'taskd.py')!r})"]
    if os.geteuid() or subprocess.run([*as_user("nobody"), *look], check=False).returncode:
        pytest.skip("only root can be another user, who must be able to run the programs")


@pytest.fixture
def shared(other_users: None) -> Iterator[Path]:
    """A directory in which a group may write, for a database and its backups.

    It is not in tmp_path, because every run of pytest closes the directories above that to others.
    """
    with tempfile.TemporaryDirectory(prefix="taskd-shared-") as name:
        directory = Path(name)
        directory.chmod(0o775)
        shutil.chown(directory, "daemon", "daemon")
        yield directory


@pytest.mark.slow
@pytest.mark.parametrize("running", [True, False])
def test_a_backup_and_a_check_by_a_reader_leave_nothing_that_stops_a_write(
    shared: Path, start: Start, running: bool
) -> None:
    server = start(command=as_user("daemon"), directory=shared)
    add(server)
    if not running:
        assert server.terminate() == 0
    for path in shared.glob("taskd.db*"):
        path.chmod(0o640)
    before = {path.name: path.stat().st_uid for path in shared.glob("taskd.db*")}
    for number, arguments in enumerate((["backup", "copy.db"], ["check"], ["backup", "-"])):
        command = launched(shared, *arguments, command=as_user("nobody"), text=False)
        printed, messages = command.communicate(timeout=DEADLINE)
        assert command.returncode == 0 or arguments == ["check"], messages
        assert number < 2 or printed.startswith(b"SQLite format 3\0")
    assert {path.name: path.stat().st_uid for path in shared.glob("taskd.db*")} == before
    if not running:
        server = start(command=as_user("daemon"), directory=shared)
    assert server.request("POST", TASKS, {"title": "x"}, bearer()).status_code == 201
    assert len(sql(shared / "copy.db", "SELECT id FROM task")) == 1


def test_a_check_by_somebody_who_may_not_read_the_database_says_so_beside_the_rest(
    shared: Path,
) -> None:
    (shared / "taskd.db").touch(mode=0o600)
    check = launched(shared, "check", "--json", command=as_user("nobody"))
    rows = json.loads(check.communicate(timeout=DEADLINE)[0])
    found = {row["about"]: (row["result"], row["found"]) for row in rows}
    assert found["sqlite:///taskd.db"] == ("FAIL", "[Errno 13] Permission denied: 'taskd.db'")
    assert found["secret 1"][0] == "ok"
    assert check.returncode == 1


@pytest.mark.slow
def test_a_check_by_a_reader_of_what_a_killed_server_left_needs_no_right_to_write_beside_it(
    shared: Path, start: Start
) -> None:
    server = start(directory=shared)
    add(server)
    server.kill()
    (shared / "taskd.db-shm").unlink()
    for path in (shared, *shared.iterdir()):
        path.chmod(0o755)
    check = launched(shared, "check", "--json", command=as_user("nobody"))
    rows = json.loads(check.communicate(timeout=DEADLINE)[0])
    found = {row["about"]: row["found"] for row in rows}
    assert found["sqlite:///taskd.db"] == "whole, and fits schema.sql"


def test_a_check_of_a_log_that_no_server_has_open_creates_nothing(
    taskctl: Taskctl, start: Start, tmp_path: Path
) -> None:
    server = start()
    add(server)
    server.kill()
    (tmp_path / "taskd.db-shm").unlink()
    before = names(tmp_path)
    row = next(row for row in json.loads(taskctl("check", "--json").stdout) if "db" in row["about"])
    assert (row["result"], row["found"]) == ("ok", "whole, and fits schema.sql")
    assert names(tmp_path) == before
    said(taskctl("backup", "copy.db"))
    assert len(sql(tmp_path / "copy.db", "SELECT id FROM task")) == 1


def test_a_check_through_a_symbolic_link_sees_what_is_in_the_log(
    taskctl: Taskctl, start: Start, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "link.db").symlink_to(home / "taskd.db")
    url = f"sqlite:///{tmp_path}/link.db"
    server = start(directory=home)
    add(server)

    def check() -> tuple[str, str]:
        rows = json.loads(taskctl("check", "--json", DATABASE_URL=url).stdout)
        row = next(row for row in rows if row["about"] == url)
        assert any(row["about"].endswith("home/taskd.db-wal") for row in rows)
        return row["result"], row["found"]

    assert check()[0] == "ok"
    with contextlib.closing(sqlite3.connect(home / "taskd.db")) as other:
        other.execute("DROP INDEX task_id")
    result, found = check()
    assert (result, "it lacks index task_id" in found) == ("FAIL", True), found
    said(taskctl("backup", "copy.db", DATABASE_URL=url))
    assert names(tmp_path) == ["copy.db", "home", "link.db"]


# --- Files that are gone --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gone", [[""], ["-wal"], ["-shm"], ["", "-wal", "-shm"]], ids=lambda gone: " ".join(gone)
)
def test_no_write_is_answered_2xx_after_a_file_of_the_database_was_deleted(
    server: Process, tmp_path: Path, gone: list[str]
) -> None:
    task = server.request("POST", TASKS, {"title": "x"}, bearer()).json
    assert server.request("GET", TASKS, headers=bearer()).json == [task]
    for suffix in gone:
        (tmp_path / f"taskd.db{suffix}").unlink()
    path = f"{TASKS}/{task['id']}"
    for _ in range(2):
        for method, where, body in [
            ("POST", TASKS, {"title": "y"}),
            ("PUT", path, {"title": "y"}),
            ("PATCH", f"{path}/complete", None),
            ("DELETE", path, None),
        ]:
            answer = server.request(method, where, body, bearer())
            assert_problem(answer, 503)
            assert int(answer.headers["retry-after"]) > 0
    assert_problem(server.request("GET", "/readyz"), 503)
    assert server.request("GET", TASKS, headers=bearer()).status_code == 200
    assert server.terminate() == 0


def test_writes_go_on_when_the_directory_of_the_database_is_back(
    start: Start, tmp_path: Path
) -> None:
    data, away = tmp_path / "data", tmp_path / "away"
    data.mkdir()
    server = start(DATABASE_URL=f"sqlite:///{data / 'taskd.db'}")
    data.rename(away)
    data.mkdir()
    assert_problem(server.request("POST", TASKS, {"title": "x"}, bearer()), 503)
    data.rmdir()
    away.rename(data)
    assert server.request("POST", TASKS, {"title": "x"}, bearer()).status_code == 201
    server.kill()
    assert [task["title"] for task in stored(data / "taskd.db").values()] == ["x"]


# --- Full and read-only disks ---------------------------------------------------------------------


def test_readyz_says_that_no_writes_are_stored_until_they_are_and_reads_go_on(
    server: Process, tmp_path: Path
) -> None:
    def limit_files(size: int) -> None:
        resource.prlimit(server.popen.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    assert server.request("POST", TASKS, {"title": "x"}, bearer()).status_code == 201
    limit_files(4096)
    assert_problem(server.request("POST", TASKS, {"title": "y"}, bearer()), 503)
    problem = assert_problem(server.request("GET", "/readyz"), 503)
    assert problem["detail"] == (
        "the database, which stores no writes, cannot be used right now; try again"
    )
    assert 'reason="the database, which stores no writes, cannot be used: ' in server.log
    assert len(server.request("GET", TASKS, headers=bearer()).json) == 1
    limit_files(resource.RLIM_INFINITY)
    assert server.request("GET", "/readyz").status_code == 200
    written = (tmp_path / "taskd.db-wal").read_bytes()
    assert server.request("GET", "/readyz").status_code == 200
    assert (tmp_path / "taskd.db-wal").read_bytes() == written, "nothing is written any more"
    assert server.request("POST", TASKS, {"title": "z"}, bearer()).status_code == 201


def test_readyz_says_that_the_disk_is_full_until_there_is_room(
    start: Start, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        server = start(DATABASE_URL=f"sqlite:///{disk}/taskd.db")
        assert server.request("GET", "/readyz").status_code == 200
        with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(b"x" * 4096)
        body = {"title": "x", "description": "x" * 10_000}

        def refused() -> bool:
            return server.request("POST", TASKS, body, bearer()).status_code == 503

        until(refused, "the disk is full")
        detail = assert_problem(server.request("GET", "/readyz"), 503)["detail"]
        assert detail.startswith("the database, whose disk is full, cannot be used right now")
        assert server.request("GET", TASKS, headers=bearer()).status_code == 200
        (disk / "ballast").unlink()
        until(lambda: server.request("GET", "/readyz").status_code == 200, "there is room")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=False, capture_output=True)
        server.terminate()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# --- Idempotency keys go when they are said to go -------------------------------------------------


def plant_key(path: Path, user: str, hours: float) -> None:
    when = taskd.timestamp(datetime.now(UTC) - timedelta(hours=hours))
    columns = "idempotency_key (user_id, name, body, answer, created_at)"
    sql(path, f"INSERT INTO {columns} VALUES (?, ?, '', 'secret text', ?)", user, str(hours), when)


def plant_keys(path: Path, count: int, hours: float) -> None:
    """Insert so many keys of this age at once."""
    when = taskd.timestamp(datetime.now(UTC) - timedelta(hours=hours))
    numbers = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count})"
    columns = "idempotency_key (user_id, name, body, answer, created_at)"
    sql(path, f"INSERT INTO {columns} {numbers} SELECT 'x', 'k' || i, '', '', '{when}' FROM n")


@pytest.mark.both_engines
def test_old_keys_go_without_anybody_creating_even_behind_two_from_the_future(
    start: Start, tmp_path: Path
) -> None:
    path = tmp_path / "taskd.db"
    assert start().terminate() == 0
    for hours in (-50, -49, 25, 30, 23):
        plant_key(path, "carol", hours)
    start()
    query = "SELECT name FROM idempotency_key ORDER BY id"
    until(lambda: len(sql(path, query)) < 4, "the old ones are deleted")
    assert sql(path, query) == [("-50",), ("-49",), ("23",)]


@pytest.mark.both_engines
def test_old_keys_go_behind_any_number_from_the_future(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "taskd.db"
    assert start().terminate() == 0
    plant_keys(path, 700, -50)
    for hours in (25, 30):
        plant_key(path, "carol", hours)
    start()
    until(lambda: sql(path, "SELECT count(*) FROM idempotency_key") == [(700,)], "they are deleted")


@pytest.mark.both_engines
def test_many_old_keys_go_a_few_at_a_time(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "taskd.db"
    assert start().terminate() == 0
    plant_keys(path, 1200, 25)
    start()
    until(lambda: sql(path, "SELECT count(*) FROM idempotency_key") == [(0,)], "all are deleted")


def test_while_many_old_keys_go_tasks_are_created(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "taskd.db"
    assert start().terminate() == 0
    plant_keys(path, 60_000, 25)
    server = start()
    for _ in range(5):
        before = server.processor_time()
        body = {"title": "Buy milk"}
        assert server.request("POST", TASKS, body, bearer()).status_code == 201
        assert server.processor_time() - before < 0.3
    assert sql(path, "SELECT count(*) FROM idempotency_key") != [(0,)]


@pytest.mark.both_engines
def test_a_user_who_has_only_keys_can_be_purged(
    taskctl: Taskctl, server: Process, tmp_path: Path
) -> None:
    path = tmp_path / "taskd.db"
    url = {"DATABASE_URL": database_url(path)}
    plant_key(path, "carol", 1)
    add(server)
    assert said(taskctl("purge", "carol", "--yes", **url)) == (
        "taskctl: deleted no tasks and 1 idempotency key of carol\n"
    )
    assert sql(path, "SELECT count(*) FROM idempotency_key") == [(0,)]
    assert one_line(taskctl("purge", "carol", "--yes", **url), 1) == "carol has no tasks"


@pytest.mark.parametrize("name", ["file:abc", "file:abc%20d", "data://abc"])
def test_a_path_that_looks_like_a_uri_is_taken_as_it_is(
    taskctl: Taskctl, tmp_path: Path, name: str
) -> None:
    url = {"DATABASE_URL": f"sqlite:///{name}"}
    (tmp_path / "data:").mkdir()
    for command in (["seed", "alice"], ["backup", "copy.db"], ["check"], ["restore", "copy.db"]):
        assert taskctl(*command, **url).returncode == 0, command
    made = {path.name for path in tmp_path.iterdir()}
    assert not {"abc", "abc d"} & made
    assert "copy.db" in made
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.both_engines
def test_smoke_leaves_no_key_behind_but_those_of_others(
    taskctl: Taskctl, server: Process, tmp_path: Path
) -> None:
    key = bearer() | {"Idempotency-Key": "k"}
    assert server.request("POST", TASKS, {"title": "x"}, key).status_code == 201
    url = {"DATABASE_URL": database_url(tmp_path / "taskd.db")}
    assert taskctl("smoke", f"http://127.0.0.1:{server.port}", **url).returncode == 0
    assert sql(tmp_path / "taskd.db", "SELECT user_id FROM idempotency_key") == [("alice",)]


# --- Hang-ups, pipes and packed backups -----------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_hang_up_during_a_backup_or_restore_leaves_no_hidden_copy(
    taskctl: Taskctl, tmp_path: Path, number: signal.Signals
) -> None:
    taskctl("seed", "alice", "--count", "2000")
    before = names(tmp_path)
    restore = launched(tmp_path, "restore", "-", stdin=subprocess.PIPE, text=False)
    restore.stdin.write((tmp_path / "taskd.db").read_bytes()[:8192])
    restore.stdin.flush()
    until(lambda: names(tmp_path) != before, "it has begun to copy")
    restore.send_signal(number)
    restore.communicate(timeout=DEADLINE)
    assert restore.returncode == 128 + number
    assert names(tmp_path) == before


def test_a_hang_up_that_is_to_be_ignored_stops_no_restore(taskctl: Taskctl, tmp_path: Path) -> None:
    taskctl("seed", "alice")
    whole = (tmp_path / "taskd.db").read_bytes()
    before = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"  # as nohup does
    restore = launched(tmp_path, "restore", "-", before=before, stdin=subprocess.PIPE, text=False)
    restore.stdin.write(whole[:8192])
    restore.stdin.flush()
    until(lambda: [*tmp_path.glob(".taskd.db.*")], "it has begun to copy")
    restore.send_signal(signal.SIGHUP)
    restore.stdin.write(whole[8192:])
    restore.communicate(timeout=DEADLINE)
    assert restore.returncode == 0


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("piped", [True, False])
def test_a_backup_is_restored_from_stdin_and_from_gzip(
    taskctl: Taskctl, tmp_path: Path, packed: bool, piped: bool
) -> None:
    taskctl("seed", "alice", "--count", "5")
    said(taskctl("backup", "copy.db"))
    content = (tmp_path / "copy.db").read_bytes()
    content = gzip.compress(content) if packed else content
    (tmp_path / "copy.db").write_bytes(content)
    taskctl("seed", "bob")
    if piped:
        said(taskctl("restore", "-", stdin=content))
    else:
        said(taskctl("restore", "copy.db"))
    assert set(sql(tmp_path / "taskd.db", "SELECT DISTINCT user_id FROM task")) == {("alice",)}


@pytest.mark.parametrize(
    "content",
    [gzip.compress(b"x" * 10_000)[:30], b"", b"no database at all"],
    ids=["cut gzip", "empty", "text"],  # gzip's output has the time in it
)
def test_input_on_stdin_that_is_not_a_backup_is_rejected_in_one_line(
    taskctl: Taskctl, tmp_path: Path, content: bytes
) -> None:
    taskctl("seed", "alice", "--count", "5")
    before = names(tmp_path)
    one_line(taskctl("restore", "-", stdin=content), 1)
    assert names(tmp_path) == before


# --- Odd surroundings -----------------------------------------------------------------------------

PROGRAMS = {"taskd": [sys.executable, str(ROOT / "taskd.py")], "taskctl": [*COMMAND, "stats"]}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_working_directory_that_cannot_be_entered_is_one_line(
    tmp_path: Path, other_users: None, name: str
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    script = 'cd "$1" && shift && exec "$@"'
    finished = subprocess.run(
        ["sh", "-c", script, "sh", str(closed), *as_user("nobody"), *PROGRAMS[name]],
        env=environment(BETTER_AUTH_SECRET=SECRET, TASKD_PORT="0"),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert finished.returncode in (1, 2), finished
    assert finished.stderr.startswith(f"{name}: ")
    assert finished.stderr.count("\n") == 1, finished.stderr


CLOSED = [("stdin",), ("stdout",), ("stderr",), ("stdin", "stdout", "stderr")]


@pytest.mark.parametrize("closed", CLOSED, ids=" ".join)
def test_closed_streams_disturb_no_command(tmp_path: Path, closed: tuple[str, ...]) -> None:
    streams: Any = dict.fromkeys(closed)
    for arguments in (["seed", "alice"], ["tasks", "alice"], ["export"], ["check"]):
        finished = launched(tmp_path, *arguments, **streams)
        messages = finished.communicate(timeout=DEADLINE)[1]
        assert finished.returncode == 0, messages
        assert "Traceback" not in (messages or "")
    variables = environment(BETTER_AUTH_SECRET=SECRET, TASKD_PORT="0")
    server = ForkServer.of("taskd", environment()).launch(
        directory=tmp_path, variables=variables, **streams
    )
    no_stream_is_taken(server, tmp_path)


def test_streams_that_are_closed_at_the_start_disturb_no_program(tmp_path: Path) -> None:
    def closed(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *PROGRAMS[name]], cwd=tmp_path,
            env=environment(BETTER_AUTH_SECRET=SECRET, TASKD_PORT="0"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    no_stream_is_taken(closed("taskd"), tmp_path)
    with closed("taskctl") as process:
        assert process.wait(DEADLINE) == 0


def no_stream_is_taken(server: Any, directory: Path) -> None:
    """Check that no socket or database of a taskd has the place of a standard stream; end it."""
    until(lambda: (directory / "taskd.db-wal").exists(), "it has opened its database")
    with contextlib.suppress(FileNotFoundError):
        links = [str(Path(f"/proc/{server.pid}/fd/{number}").readlink()) for number in range(3)]
        assert not any("socket" in link or "taskd.db" in link for link in links), links
    server.terminate()
    messages = server.communicate(timeout=DEADLINE)[1]
    assert "Traceback" not in (messages or "")


def test_a_latin_1_locale_shows_an_emoji_as_an_escape(tmp_path: Path, taskctl: Taskctl) -> None:
    line = {"id": 1, "user_id": "alice", "title": "🌧", "created_at": "2026-11-20T21:00:00Z"}
    line["updated_at"] = line["created_at"]
    taskctl("init")
    taskctl("import", "-", stdin=json.dumps(line))
    latin_1 = {"PYTHONIOENCODING": "latin-1", "LC_ALL": "C"}
    cold = ["env", *(f"{name}={value}" for name, value in latin_1.items())]
    for arguments, before in [
        (["tasks", "alice"], cold),
        (["tasks", "alice"], None),
        (["purge", "🌧"], None),
        (["tasks", "alice", "--csv"], None),
        (["export"], None),
    ]:
        finished = launched(tmp_path, *arguments, command=before, variables=latin_1, text=False)
        shown = b"".join(finished.communicate(timeout=DEADLINE))
        assert finished.returncode in (0, 1)
        assert b"Traceback" not in shown, shown
        assert b"U0001f327" in shown or arguments == ["export"]


def test_a_piped_table_is_about_as_large_as_what_is_in_it(taskctl: Taskctl, tmp_path: Path) -> None:
    line = {"user_id": "alice", "title": "x", "created_at": "2026-11-20T21:00:00Z"}
    line["updated_at"] = line["created_at"]
    lines = [line | {"id": number} for number in range(1, 2001)]
    lines.append(line | {"id": 2001, "description": "x" * 10_000})  # type: ignore[arg-type]
    taskctl("init")
    taskctl("import", "-", stdin="\n".join(map(json.dumps, lines)))
    shown = taskctl("tasks", "alice").stdout
    assert len(shown.splitlines()) == 2002
    assert "x" * 10_000 in shown
    assert len(shown) < 2002 * 200 + 10_000


# --- What a checkout and the unit keep out --------------------------------------------------------

PRIVATE = (
    ".env", ".env.before", "taskd.db", "taskd.db-wal", "taskd.db-journal", "taskd.db.part",
    "taskd.db.before-restore-20261125T043521.049051Z", "taskd.db.v1-20261125T043521.049051Z",
    "backup.db.gz", ".taskd.db.abc123/taskd.db", "tasks.jsonl", "tasks.jsonl.gz", "data.sqlite3",
    "taskd.db.v2-20261125T043521.049051Z-wal", "data/taskd.db.before-restore-20261125T0435Z",
)  # fmt: skip


@pytest.mark.parametrize("name", PRIVATE)
def test_git_add_takes_no_tasks_or_secrets(name: str) -> None:
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("this is not a checkout")
    checked = subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT, check=False)
    assert checked.returncode == 0


def test_git_ignores_nothing_that_is_part_of_the_project() -> None:
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("this is not a checkout")
    command = ["git", "ls-files", "-i", "-c", "--exclude-standard"]
    assert subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout == b""


def test_the_unit_leaves_the_metrics_of_the_process_what_they_read() -> None:
    unit = (ROOT / "deploy" / "taskd.service").read_text()
    assert "\nProcSubset=" not in unit, "process_* metrics need /proc/stat"


# --- PostgreSQL: copies, imports and exports ------------------------------------------------------

KEYED = {"Idempotency-Key": "once"}


@pytest.mark.postgresql
def test_after_a_copy_in_either_direction_keyed_creates_go_on(
    taskctl: Taskctl, start: Start, tmp_path: Path
) -> None:
    server, path = start(DATABASE_URL="sqlite:///old.db"), tmp_path / "taskd.db"
    for number in range(5):
        headers = bearer() | {"Idempotency-Key": f"key-{number}"}
        assert server.request("POST", TASKS, {"title": "x"}, headers).status_code == 201
    assert server.terminate() == 0
    (tmp_path / "url").write_text(database_url(path) + "\n")
    there = taskctl("copy", "env:OLD", "@url", OLD="sqlite:///old.db")
    assert "copied 5 tasks and 5 idempotency keys" in there.stderr, there
    server = start(DATABASE_URL=database_url(path))
    keyed_creates_go_on(server)
    assert server.terminate() == 0
    back = taskctl("copy", "@url", "env:NEW", NEW="sqlite:///new.db")
    assert "copied 7 tasks and 7 idempotency keys" in back.stderr, back
    keyed_creates_go_on(start(DATABASE_URL="sqlite:///new.db"), first=7)


def keyed_creates_go_on(server: Process, first: int = 5) -> None:
    for number in range(first + 2):
        headers = bearer() | {"Idempotency-Key": f"key-{number}"}
        answer = server.request("POST", TASKS, {"title": "x"}, headers)
        assert answer.status_code == 201, answer.text
        assert ("idempotency-replayed" in answer.headers) == (number < first)


@pytest.mark.parametrize("url", ["env:NOWHERE", "@nowhere", "mysql://x/y"])
def test_a_url_that_cannot_be_fetched_is_named(taskctl: Taskctl, url: str) -> None:
    answer = taskctl("copy", url, "sqlite:///other.db")
    assert answer.returncode in (1, 2)
    assert "Traceback" not in answer.stderr


@pytest.mark.postgresql
def test_the_time_out_of_a_request_does_not_bound_taskctl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BETTER_AUTH_SECRET", SECRET)
    monkeypatch.setenv("DATABASE_URL", database_url(tmp_path / "taskd.db"))
    monkeypatch.chdir(tmp_path)
    opened = taskctl_program.database()
    try:
        assert opened.run("SHOW statement_timeout") == [("0",)]
    finally:
        opened.close()


@pytest.mark.postgresql
def test_an_export_from_postgresql_takes_no_more_memory_for_more_tasks(
    taskctl: Taskctl, tmp_path: Path
) -> None:
    path = tmp_path / "taskd.db"
    url = database_url(path)
    assert taskctl("seed", "alice", "--count", "1", DATABASE_URL=url).returncode == 0
    columns = "user_id, title, description, created_at, updated_at"
    when = "'2026-11-20T21:00:00.000Z'"
    sql(
        path,
        f"INSERT INTO task ({columns}) SELECT 'bob', 'x', repeat('x', 9000), {when}, {when}"
        " FROM generate_series(1, 12000)",
    )
    measure = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    measured = subprocess.run(
        [sys.executable, "-c", measure, *COMMAND, "export"],
        cwd=tmp_path,
        env=environment(BETTER_AUTH_SECRET=SECRET, DATABASE_URL=url, COVERAGE_PROCESS_CONFIG=""),
        capture_output=True,
        text=True,
        timeout=3 * DEADLINE,
        check=True,
    )
    assert int(measured.stdout) < 150 * 1024, "KiB; all of them are 108 MB"

"""taskd as a process: how it starts, serves, logs and ends."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path

import pytest

import taskd
from support import (
    COLD,
    DEADLINE,
    OTHER_SECRET,
    ROOT,
    SECRET,
    ForkServer,
    Process,
    Wire,
    assert_problem,
    bearer,
    empty,
    environment,
    locked,
    sql,
    stored,
    token,
    until,
    written,
)

Start = Callable[..., Process]

EXIT = 10  # seconds that the contract gives taskd after SIGTERM
SOON = 5  # seconds for what takes milliseconds unless it hangs
PUBLIC_SECRET = "better-auth-secret-12345678901234567890"
TASKS = "/api/alice/tasks"
SAME_ON_ALL = pytest.mark.sqlite("a request is parsed, and logged, without the database")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(tmp_path_factory.mktemp("shared"))
    yield process
    assert process.terminate() == 0


@pytest.fixture
def server(shared: Process) -> Process:
    """Give a server without tasks, shared by the tests of this file."""
    assert shared.request("GET", TASKS, headers=bearer()).status_code == 200
    empty(database_of(shared))
    return shared


def database_of(server: Process) -> Path:
    return server.log_path.with_name("taskd.db")


def milk(number: int = 0) -> dict[str, str]:
    return {"title": f"Buy milk {number}"}


# --- Starting -------------------------------------------------------------------------------------


def has_started_or_ended(server: Process) -> bool:
    return "listening" in server.log or server.popen.poll() is not None


@pytest.mark.sqlite("it is about settings")
def test_the_start_line_names_the_port_that_the_system_chose(start: Start) -> None:
    server = start(command=COLD, TASKD_PORT="0")
    url = rf"http://127\.0\.0\.1:{server.port}"
    assert re.fullmatch(rf"taskd: listening on {url} \(try it at {url}/docs\)\n", server.log)
    assert server.port > 0
    answer = server.request("GET", "/healthz")
    assert (answer.status_code, answer.json) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    "variables", [{"TASKD_LOG": "debug"}, {"DATABASE_URL": "nonsense"}], ids=["good", "bad"]
)
def test_a_forked_server_is_like_one_from_the_start(
    start: Start, variables: dict[str, str]
) -> None:
    seen = []
    for command in (COLD, None):
        server = start(command=command, wait=False, **variables)
        until(partial(has_started_or_ended, server), "it listens, or not")
        seen.append((server.terminate(), re.sub(r":\d+\b", "", server.log)))
    assert seen[0] == seen[1]
    assert seen[0][0] == (2 if "DATABASE_URL" in variables else 0)


@pytest.mark.sqlite("it is about settings")
def test_two_servers_with_port_0_get_different_ports(start: Start, tmp_path: Path) -> None:
    first = start(DATABASE_URL=f"sqlite:///{tmp_path}/first.db")
    second = start(DATABASE_URL=f"sqlite:///{tmp_path}/second.db")
    assert first.port != second.port
    assert first.request("POST", TASKS, milk(), bearer()).status_code == 201
    assert second.request("GET", TASKS, headers=bearer()).json == []


@pytest.mark.sqlite("it is about settings")
def test_the_dotenv_file_of_the_working_directory_is_read(start: Start, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        f"# ours\nBETTER_AUTH_SECRET='{OTHER_SECRET}'\nTASKD_PORT=0\n"
        "DATABASE_URL=sqlite:///from-dotenv.db\n"
    )
    server = start(before="del os.environ['BETTER_AUTH_SECRET'], os.environ['TASKD_PORT']")
    assert server.request("GET", TASKS, headers=bearer(secret=OTHER_SECRET)).status_code == 200
    assert server.request("GET", TASKS, headers=bearer()).status_code == 401
    assert (tmp_path / "from-dotenv.db").exists()
    assert not (tmp_path / "taskd.db").exists()


@pytest.mark.sqlite("it is about settings")
def test_the_environment_wins_over_the_dotenv_file(start: Start, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        f"BETTER_AUTH_SECRET={OTHER_SECRET}\nDATABASE_URL=sqlite:///from-dotenv.db\n"
    )
    server = start(DATABASE_URL="sqlite:///from-environment.db")
    assert server.request("GET", TASKS, headers=bearer()).status_code == 200
    assert server.request("GET", TASKS, headers=bearer(secret=OTHER_SECRET)).status_code == 401
    assert (tmp_path / "from-environment.db").exists()
    assert not (tmp_path / "from-dotenv.db").exists()


@pytest.mark.sqlite("it is about a file")
def test_the_database_is_readable_by_its_owner_alone_whatever_the_umask(
    start: Start, tmp_path: Path
) -> None:
    server = start(before="os.umask(0)")
    assert server.request("POST", TASKS, milk(), bearer()).status_code == 201
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("taskd.db*")}
    assert modes == {"taskd.db": 0o600, "taskd.db-wal": 0o600, "taskd.db-shm": 0o600}


def test_tasks_are_still_there_after_a_restart(start: Start) -> None:
    first = start()
    task = first.request("POST", TASKS, milk(), bearer()).json
    assert first.terminate() == 0
    assert start().request("GET", TASKS, headers=bearer()).json == [task]


# --- Refusing to start ----------------------------------------------------------------------------


def contents(directory: Path) -> dict[str, tuple[int, int, bytes | None]]:
    """Return the entries of a directory with modes and times, to see whether any was touched."""
    return {
        str(path.relative_to(directory)): (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in directory.rglob("*")
    }


def refusal(directory: Path, **variables: str) -> str:
    """Start taskd, which must refuse with exit status 2 and one line, and return that line."""
    before = contents(directory)
    defaults = {"BETTER_AUTH_SECRET": SECRET, "TASKD_PORT": "0"}
    done = ForkServer.of("taskd", environment()).run(
        directory=directory, variables=environment(**(defaults | variables))
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert re.fullmatch(r"taskd: [^\n]+\n", done.stderr), done.stderr
    assert contents(directory) == before
    return done.stderr


UNUSABLE = [
    ("BETTER_AUTH_SECRET", ""),
    ("BETTER_AUTH_SECRET", "just-under-32-bytes-which-is-it"),
    ("BETTER_AUTH_SECRET", PUBLIC_SECRET),
    ("BETTER_AUTH_SECRETS", f"{OTHER_SECRET}"),
    ("BETTER_AUTH_SECRETS", f"2:{OTHER_SECRET},1:too-short-a-secret"),
    ("DATABASE_URL", "sqlite:///:memory:"),
    ("DATABASE_URL", "mysql://127.0.0.1/tasks"),
    ("TASKD_HOST", "two..dots"),
    ("TASKD_HOST", "a-label-is-at-most-63-characters-long" * 2),
    ("TASKD_HOST", "192.0.2.1"),  # RFC 5737: an address for documentation
    ("TASKD_PORT", "http"),
    ("TASKD_PORT", "65536"),
    ("TASKD_THREADS", "0"),
    ("TASKD_CORS_ORIGINS", "no origin"),
    ("TASKD_LOG", "loud"),
]


@pytest.mark.sqlite("it is about settings")
@pytest.mark.parametrize(("variable", "value"), UNUSABLE)
def test_an_unusable_setting_stops_the_start_and_touches_nothing(
    tmp_path: Path, variable: str, value: str
) -> None:
    line = refusal(tmp_path, **{variable: value})
    assert variable in line
    if value and "SECRET" in variable:
        for secret in re.split(r"[,:]", value):
            assert len(secret) < 8 or secret not in line


def test_updated_at_is_never_earlier_than_before(server: Process) -> None:
    made, future = server.request("POST", TASKS, milk(), bearer()), "2999-01-01T00:00:00.000Z"
    sql(database_of(server), f"UPDATE task SET updated_at = '{future}'")
    for method, path, body in (("PUT", "", {"title": "x"}), ("PATCH", "/complete", None)):
        answer = server.request(method, f"{TASKS}/{made.json['id']}{path}", body, bearer())
        assert answer.json["updated_at"] == future
    assert answer.headers["etag"] == f'"3-{future}"'


def test_a_wait_that_is_not_rejected_yet_ends_before_the_drain() -> None:
    longest = max(taskd.LOCK_TIMEOUT, taskd.KEYS_WAIT)
    assert 3 < taskd.REJECT_BLOCKED_AFTER < taskd.DRAIN_TIMEOUT - longest


@pytest.mark.sqlite("it is about settings")
def test_the_setting_says_how_many_threads_there_are(start: Start) -> None:
    few, many = (
        len(list(Path(f"/proc/{start(TASKD_THREADS=number).popen.pid}/task").iterdir()))
        for number in ("2", "40")
    )
    assert many - few == 38


@pytest.mark.sqlite("it is about settings")
def test_an_unusable_setting_in_the_dotenv_file_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("TASKD_THREADS=none\n")
    assert "TASKD_THREADS" in refusal(tmp_path)


@pytest.mark.sqlite("it is about settings")
def test_a_dotenv_file_that_is_not_text_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"BETTER_AUTH_SECRET=\xff\xfe\n")
    assert ".env" in refusal(tmp_path)


@pytest.mark.sqlite("it is about settings")
def test_a_port_in_use_stops_the_start_before_a_database_is_made(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal(tmp_path, TASKD_PORT=str(port))
    assert "TASKD_PORT" in line
    assert str(port) in line


@pytest.mark.sqlite("it is about a file")
def test_a_directory_that_does_not_exist_stops_the_start(tmp_path: Path) -> None:
    assert "nowhere/taskd.db" in refusal(tmp_path, DATABASE_URL="sqlite:///nowhere/taskd.db")


@pytest.mark.sqlite("it is about a file")
def test_a_path_with_a_line_break_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "DATABASE_URL must be sqlite:///" in refusal(
        tmp_path, DATABASE_URL="sqlite:///nowhere\ntaskd: all is well/taskd.db"
    )


@pytest.mark.sqlite("it is about a file")
def test_a_directory_in_the_place_of_the_database_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "taskd.db").mkdir()
    assert "taskd.db" in refusal(tmp_path)


@pytest.mark.sqlite("it is about a file")
def test_a_file_that_is_not_a_database_stops_the_start_and_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "taskd.db").write_text("Buy milk\n" * 1000)
    assert "taskd.db" in refusal(tmp_path)


MISFITS = [
    ("delete", "CREATE TABLE task (id INTEGER PRIMARY KEY, title TEXT)", "user_id"),
    ("wal", "CREATE TABLE task (id INTEGER PRIMARY KEY, title TEXT)", "user_id"),
    ("delete", "{schema} DROP INDEX task_id;", "task_id"),
    ("wal", "{schema} ALTER TABLE task DROP COLUMN description;", "description"),
    ("delete", "{schema} ALTER TABLE task ADD COLUMN mood INTEGER NOT NULL DEFAULT 0;", "mood"),
]


@pytest.mark.sqlite("it is about a file")
@pytest.mark.parametrize(("journal", "script", "named"), MISFITS)
def test_a_schema_that_does_not_fit_stops_the_start_naming_the_difference(
    tmp_path: Path, journal: str, script: str, named: str
) -> None:
    database = sqlite3.connect(tmp_path / "taskd.db")
    database.execute(f"PRAGMA journal_mode = {journal}")
    database.executescript(
        script.replace(
            "{schema}",
            (ROOT / "schema.sql").read_text() + f"INSERT INTO about VALUES ({taskd.VERSION}, 'x');",
        )
    )
    database.close()
    assert named in refusal(tmp_path)


# --- Importing and embedding ----------------------------------------------------------------------

IMPORT = """
import os, sys, threading
seen = []
class Watched(os._Environ):
    def __getitem__(self, name):
        if name.startswith(("TASKD_", "BETTER_AUTH", "DATABASE_URL")):
            seen.append(f"reads {name}")
        return super().__getitem__(name)
os.environ.__class__ = Watched
def watch(event, arguments):
    if event.startswith(("sqlite3.connect", "socket.", "subprocess.", "os.mkdir", "os.rename")):
        seen.append(event)
    if event == "open" and (arguments[1] is None or set(arguments[1]) & set("wax+")):
        seen.append(f"opens {arguments}")
    if event == "open" and str(arguments[0]).endswith((".env", ".sql", ".db")):
        seen.append(f"opens {arguments}")
sys.addaudithook(watch)
sys.path.insert(0, sys.argv[1])
import taskd
print(seen, threading.active_count(), os.listdir("."))
"""


@pytest.mark.sqlite("it is about settings")
def test_importing_taskd_does_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-B", "-W", "error", "-c", IMPORT, str(ROOT)],
        cwd=tmp_path,
        env=environment(BETTER_AUTH_SECRET="short", TASKD_PORT="nonsense", DATABASE_URL="nonsense"),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("[] 1 []\n", "", 0)


EMBED = """
import logging, sys
from wsgiref.simple_server import make_server
sys.path.insert(0, sys.argv[1])
import taskd
server = make_server("127.0.0.1", 0, taskd.wsgi())
logging.basicConfig(format="%(process)d %(thread)d %(message)s")
logging.getLogger("its.own").warning("has ids")
print(f"taskd: listening on http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
"""


@SAME_ON_ALL
def test_another_wsgi_server_can_run_it(start: Start) -> None:
    server = start(command=[sys.executable, "-c", EMBED, str(ROOT)])
    assert re.search(r"^\d+ \d+ has ids$", server.log, re.MULTILINE)
    created = server.request("POST", TASKS, milk(), bearer())
    assert created.status_code == 201
    assert created.headers["location"] == f"{TASKS}/{created.json['id']}"
    assert server.request("GET", TASKS, headers=bearer()).json == [created.json]
    assert_problem(server.request("GET", TASKS), 401)
    assert_problem(
        server.request("POST", TASKS, b"{", {"Content-Type": "application/json"} | bearer()), 400
    )
    assert_problem(server.request("POST", TASKS, b"x" * 70_000, bearer()), 413)


# --- Ending ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_status_0(start: Start, number: signal.Signals) -> None:
    server = start()
    assert server.request("POST", TASKS, milk(), bearer()).status_code == 201
    assert server.terminate(number) == 0
    assert "Traceback" not in server.log
    with pytest.raises(ConnectionRefusedError):
        server.request("GET", "/healthz")


def test_signals_again_and_again_while_it_ends_change_nothing(start: Start) -> None:
    server = start()
    assert server.request("POST", TASKS, milk(), bearer()).status_code == 201
    while server.popen.poll() is None:
        server.popen.send_signal(signal.SIGTERM)
        server.popen.send_signal(signal.SIGINT)
        time.sleep(0.0005)
    assert server.popen.returncode == 0, server.log
    assert "Traceback" not in server.log


@pytest.mark.parametrize(("threads", "writes"), [("4", 24), ("16", 48)])
def test_every_write_in_flight_at_sigterm_is_answered(
    start: Start, tmp_path: Path, threads: str, writes: int
) -> None:
    server = start(TASKD_THREADS=threads)
    assert server.request("POST", "/api/bob/tasks", milk(), bearer("bob")).status_code == 201
    wires = [Wire(server) for _ in range(writes)]
    with locked(tmp_path / "taskd.db"):
        for number, wire in enumerate(wires):
            wire.send(written("POST", TASKS, milk(number), user="alice"))
        server.popen.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        time.sleep(1)
    answers = [wire.answer() for wire in wires]
    assert server.popen.wait(DEADLINE) == 0
    assert time.monotonic() - asked < EXIT
    assert Counter(answer.status_code for answer in answers).keys() <= {201, 503}
    made = {
        answer.json["id"]: answer.json["title"] for answer in answers if answer.status_code == 201
    }
    assert made, "one of them at least had the time to be written"
    tasks = stored(tmp_path / "taskd.db")
    assert {key: task["title"] for key, task in tasks.items() if task["user_id"] == "alice"} == made
    for answer in answers:
        if answer.status_code == 503:
            assert_problem(answer, 503)
            assert int(answer.headers["retry-after"]) > 0
    for wire in wires:
        assert wire.is_closed()
        wire.close()


@pytest.mark.parametrize("sends", [1, 6])
def test_requests_that_were_pipelined_before_sigterm_are_answered_in_order(
    start: Start, tmp_path: Path, sends: int
) -> None:
    server = start()
    requests = [written("POST", TASKS, milk(number), user="alice") for number in range(5)]
    requests.append(written("GET", TASKS, user="alice"))
    with Wire(server) as wire:
        assert wire.send(written("GET", TASKS, user="alice")).answer().json == []
        with locked(tmp_path / "taskd.db"):
            for part in range(sends):
                wire.send(b"".join(requests[part * 6 // sends : (part + 1) * 6 // sends]))
                # When this is answered, the part has arrived alone.
                assert server.request("GET", "/healthz").status_code == 200
            server.popen.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        made = [wire.answer().json["title"] for _ in range(5)]
        assert made == [milk(number)["title"] for number in range(5)]
        assert [task["title"] for task in wire.answer().json] == made
    assert server.popen.wait(EXIT) == 0


def test_pipelined_writes_that_wait_longer_than_the_end_lasts_are_all_answered(
    start: Start, tmp_path: Path
) -> None:
    # Two seconds instead of nine: two waits for the lock fit into it, and the third does not.
    times = "taskd.LOCK_TIMEOUT, taskd.REJECT_BLOCKED_AFTER, taskd.DRAIN_TIMEOUT = 0.8, 1.0, 2.0"
    server = start(before=times)
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(Wire(server)) for _ in range(40)]
        with locked(tmp_path / "taskd.db"):
            for wire in wires:
                wire.send(written("POST", TASKS, milk(), user="alice") * 3)
            assert server.request("GET", "/healthz").status_code == 200
            server.popen.send_signal(signal.SIGTERM)
            for wire in wires:
                for _ in range(3):
                    assert_problem(wire.answer(), 503)
            assert server.popen.wait(DEADLINE) == 0


def test_idle_and_half_sent_connections_do_not_hold_sigterm_up(start: Start) -> None:
    server = start()
    idle = [Wire(server) for _ in range(20)]
    for wire in idle:
        assert wire.send(written("GET", "/healthz")).answer().status_code == 200
    whole = written("POST", TASKS, milk(), user="alice")
    halves = [
        Wire(server).send(whole[:cut]) for cut in (1, 10, 40, len(whole) - 20, len(whole) - 1)
    ]
    assert server.request("GET", "/healthz").status_code == 200
    asked = time.monotonic()
    assert server.terminate() == 0
    assert time.monotonic() - asked < SOON
    for wire in idle + halves:
        assert wire.is_closed()
        wire.close()


# --- The log --------------------------------------------------------------------------------------

LINE = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) INFO"
    r" (?P<method>[A-Z]+) (?P<route>\S+) (?P<status>\d{3}) "
    r"(?P<ms>\d+\.\d)ms id=(?P<id>[A-Za-z0-9._-]{1,64}) user=(?P<user>'.*'|-)( reason=\"[^\"]+\")?"
)


def log_lines(server: Process) -> list[str]:
    return server.log.splitlines()


def test_each_request_has_one_line_in_the_log(start: Start) -> None:
    server = start()
    requests = [
        ("POST", TASKS, milk(), "/api/{user_id}/tasks", 201, "'alice'"),
        ("GET", f"{TASKS}/1?title=private", None, "/api/{user_id}/tasks/{task_id}", 200, "'alice'"),
        (
            "PATCH",
            f"{TASKS}/1/complete",
            None,
            "/api/{user_id}/tasks/{task_id}/complete",
            200,
            "'alice'",
        ),
        ("GET", f"{TASKS}/2", None, "/api/{user_id}/tasks/{task_id}", 404, "'alice'"),
        ("PUT", f"{TASKS}/1", {"title": ""}, "/api/{user_id}/tasks/{task_id}", 422, "'alice'"),
        ("GET", "/api/bob/tasks", None, "/api/{user_id}/tasks", 403, "'alice'"),
        ("GET", "/healthz", None, "/healthz", 200, "-"),
        ("GET", "/nowhere", None, "-", 404, "-"),
    ]
    for number, (method, path, body, _, status, _) in enumerate(requests):
        answer = server.request(
            method, path, body, bearer() | {"X-Request-ID": f"request-{number}"}
        )
        assert answer.status_code == status
        assert answer.headers["x-request-id"] == f"request-{number}"
    matches = [LINE.fullmatch(line) for line in log_lines(server)[1:]]
    found = [
        match.group("method", "route", "status", "id", "user") if match else None
        for match in matches
    ]
    assert found == [
        (method, route, str(status), f"request-{number}", user)
        for number, (method, _, _, route, status, user) in enumerate(requests)
    ]


@SAME_ON_ALL
def test_the_log_tells_the_time_in_utc(start: Start) -> None:
    server = start(TZ="Asia/Tokyo")
    before = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    server.request("GET", "/healthz")
    after = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    line = LINE.fullmatch(log_lines(server)[1])
    assert line
    assert before <= line["time"][:19] <= after


def test_no_secret_token_or_content_reaches_the_log_or_an_answer(start: Start) -> None:
    server = start(TASKD_LOG="debug", BETTER_AUTH_SECRETS=f"2:{SECRET},1:{OTHER_SECRET}")
    tokens = [
        token(),
        token(secret=OTHER_SECRET),
        token(secret="not-one-of-the-two-that-this-server-knows"),
    ]
    task = {"title": "Buy nitroglycerine", "description": "for the old bridge"}
    seen = ""
    for sent in tokens:
        headers = {
            "Authorization": f"Bearer {sent}",
            "X-Request-ID": sent[:80],
            "Cookie": f"session={sent}",
        }
        for method, path, body in [
            ("POST", TASKS, task),
            ("POST", TASKS, task | {"nitroglycerine": 1}),
            ("GET", f"{TASKS}/1?token={sent}", None),
            ("GET", f"/{sent}", None),
        ]:
            answer = server.request(method, path, body, headers)
            seen += f"{answer.headers}" + (answer.text if answer.status_code >= 400 else "")
    assert server.terminate() == 0
    assert "nitroglycerine" not in server.log
    assert "old bridge" not in server.log
    for sent in tokens:
        for part in sent.split("."):
            assert part not in server.log
            assert part not in seen
    for secret in (SECRET, OTHER_SECRET):
        assert secret not in server.log + seen


FORGED = "2026-11-20T21:00:00.000Z INFO DELETE - 200 1.0ms id=forged user='mallory'"


@pytest.mark.parametrize(
    "line_break", ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"]
)
@SAME_ON_ALL
def test_a_user_id_with_line_breaks_cannot_forge_a_log_line(
    server: Process, line_break: str
) -> None:
    user = f"mallory{line_break}{FORGED}"
    path = "/api/" + "".join(f"%{byte:02x}" for byte in user.encode()) + "/tasks"
    before = len(log_lines(server))
    assert server.request("GET", path, headers=bearer(user)).status_code == 200
    assert server.request("GET", path).status_code == 401
    lines = log_lines(server)[before:]
    assert len(lines) == 2
    assert all(LINE.fullmatch(line) for line in lines)


@pytest.mark.parametrize("given", [f"a\u0085{FORGED}", f"a {FORGED}", "a" * 65, "ä", ""])
@SAME_ON_ALL
def test_a_request_id_that_cannot_stand_in_a_log_is_replaced(server: Process, given: str) -> None:
    with Wire(server) as wire:
        answer = wire.send(written("GET", "/healthz", None, f"X-Request-ID: {given}")).answer()
    assert answer.status_code == 200
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", answer.headers["x-request-id"])
    assert answer.headers["x-request-id"] != given
    line = log_lines(server)[-1]
    assert f" id={answer.headers['x-request-id']} " in line


def test_a_client_that_leaves_while_its_write_waits_cannot_forge_a_log_line(
    start: Start, tmp_path: Path
) -> None:
    server = start()
    user = f"mallory\n{FORGED}"
    tasks = "/api/" + "".join(f"%{byte:02x}" for byte in user.encode()) + "/tasks"
    for _ in range(10):
        task = {"title": "Dig", "description": "x" * 10_000}
        assert server.request("POST", tasks, task, bearer(user)).status_code == 201
    with locked(tmp_path / "taskd.db"):
        wires = [Wire(server, receive_buffer=4096) for _ in range(8)]
        for number, wire in enumerate(wires):
            wire.send(
                written("GET", tasks, user=user) * number
                + written("POST", tasks, milk(), user=user) * 2
            )
        time.sleep(0.3)
        for wire in wires:
            wire.reset()
        assert server.request("GET", "/healthz").status_code == 200
    assert server.terminate() == 0
    assert not [line for line in log_lines(server) if line.startswith(FORGED[:30])]


def test_a_reader_of_the_log_that_goes_away_does_not_stop_the_service(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, str(ROOT / "taskd.py")],
        cwd=tmp_path,
        env=environment(BETTER_AUTH_SECRET=SECRET, TASKD_PORT="0"),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr
        try:
            server = Process.__new__(Process)
            server.port = int(re.findall(r":(\d+)", process.stderr.readline())[0])
            process.stderr.close()
            assert server.request("POST", TASKS, milk(), bearer()).status_code == 201
            assert server.request("GET", TASKS, headers=bearer()).status_code == 200
            process.terminate()
            assert process.wait(DEADLINE) == 0
        finally:
            process.kill()


# --- HTTP -----------------------------------------------------------------------------------------


@SAME_ON_ALL
def test_no_answer_names_the_server(server: Process) -> None:
    with Wire(server) as wire:
        assert "server" not in wire.send(written("GET", "/healthz")).answer().headers
        assert "server" not in wire.send(written("GET", TASKS)).answer().headers
        answer = wire.send(b"nonsense\r\n\r\n").answer()
        assert "server" not in answer.headers
        assert "waitress" not in answer.text.lower()


@SAME_ON_ALL
@pytest.mark.parametrize("request_bytes", [written("GET", "/healthz"), b"nonsense\r\n\r\n"])
def test_the_date_of_an_answer_is_that_at_which_it_was_made(
    server: Process, request_bytes: bytes
) -> None:
    with Wire(server) as wire:
        before = int(time.time())
        date = wire.send(request_bytes).answer().headers["date"]
        assert before <= parsedate_to_datetime(date).timestamp() <= time.time()


SEARCHES_SLOWLY = """
page = TaskStore.page
def slow(self, *arguments):
    time.sleep(1.1)
    return page(self, *arguments)
TaskStore.page = slow
"""


@SAME_ON_ALL
def test_an_answer_that_takes_long_has_the_date_of_its_end(start: Start) -> None:
    server, before = start(before=SEARCHES_SLOWLY), int(time.time())
    answer = server.request("GET", f"{TASKS}?q=x", headers=bearer())
    assert parsedate_to_datetime(answer.headers["date"]).timestamp() > before


def test_a_connection_serves_many_requests(server: Process) -> None:
    with Wire(server) as wire:
        for number in range(1, 21):
            created = wire.send(written("POST", TASKS, milk(number), user="alice")).answer()
            assert (created.status_code, created.json["id"]) == (201, number)
            assert (
                wire.send(written("GET", f"{TASKS}/99", user="alice")).answer().status_code == 404
            )
            assert wire.send(written("GET", TASKS)).answer().status_code == 401
            assert (
                wire.send(written("DELETE", f"{TASKS}/{number}", user="alice")).answer().status_code
                == 200
            )


def test_pipelined_requests_are_answered_in_order(server: Process) -> None:
    with Wire(server) as wire:
        requests = [written("POST", TASKS, milk(number), user="alice") for number in range(50)]
        reads = [written("GET", f"{TASKS}/{number + 1}", user="alice") for number in range(50)]
        wire.send(b"".join(post + get for post, get in zip(requests, reads, strict=True)))
        for number in range(50):
            created, read = wire.answer(), wire.answer()
            assert (created.status_code, read.status_code) == (201, 200)
            assert created.json == read.json
            assert read.json["title"] == milk(number)["title"]


def test_a_read_that_was_pipelined_behind_a_waiting_write_stays_behind_it(server: Process) -> None:
    with Wire(server) as wire:
        assert wire.send(written("GET", TASKS, user="alice")).answer().json == []
        with locked(database_of(server)):
            wire.send(
                written("POST", TASKS, milk(), user="alice") + written("GET", TASKS, user="alice")
            )
            time.sleep(0.3)
        created, listed = wire.answer(), wire.answer()
        assert created.status_code == 201
        assert listed.json == [created.json]


def test_connection_close_is_honoured(server: Process) -> None:
    with Wire(server) as wire:
        answer = wire.send(written("GET", "/healthz", None, "Connection: close")).answer()
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert wire.is_closed()


def test_http_1_0_is_answered_and_closed(server: Process) -> None:
    with Wire(server) as wire:
        answer = wire.send(written("POST", TASKS, milk(), user="alice", version="1.0")).answer()
        assert (answer.line, answer.json["title"]) == ("HTTP/1.0 201 Created", "Buy milk 0")
        assert wire.is_closed()


def test_http_1_0_may_keep_the_connection(server: Process) -> None:
    with Wire(server) as wire:
        for _ in range(3):
            wire.send(
                written("GET", TASKS, None, "Connection: keep-alive", user="alice", version="1.0")
            )
            answer = wire.answer()
            assert (answer.json, answer.headers["connection"].lower()) == ([], "keep-alive")


def test_head_has_no_body_and_keeps_the_connection(server: Process) -> None:
    with Wire(server) as wire:
        assert (
            wire.send(written("HEAD", TASKS, user="alice")).answer(bodiless=True).status_code == 200
        )
        assert wire.send(written("GET", TASKS, user="alice")).answer().json == []


def chunked(content: bytes, size: int) -> bytes:
    pieces = [content[at : at + size] for at in range(0, len(content), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


CHUNKED = ("Transfer-Encoding: chunked", "Content-Type: application/json")


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_chunked_body_is_read(server: Process, size: int) -> None:
    content = json.dumps({"title": "Übung", "description": "€" * 100}, ensure_ascii=False).encode()
    with Wire(server) as wire:
        answer = wire.send(
            written("POST", TASKS, chunked(content, size), *CHUNKED, user="alice")
        ).answer()
        assert answer.status_code == 201, answer.text
        assert (answer.json["title"], answer.json["description"]) == ("Übung", "€" * 100)
        assert wire.send(written("GET", TASKS, user="alice")).answer().json == [answer.json]


def test_a_chunked_body_may_set_completion_and_an_empty_one_toggles(server: Process) -> None:
    with Wire(server) as wire:
        wire.send(written("POST", TASKS, milk(), user="alice")).answer()
        path = f"{TASKS}/1/complete"
        states = []
        for body in (b'{"completed": true}', b'{"completed": true}', b"", b""):
            answer = wire.send(
                written("PATCH", path, chunked(body, 5), *CHUNKED, user="alice")
            ).answer()
            states.append(answer.json["completed"])
        assert states == [True, True, False, True]


@SAME_ON_ALL
def test_expect_100_continue_is_answered_before_the_body(server: Process) -> None:
    content = json.dumps(milk()).encode()
    with Wire(server) as wire:
        lines = (
            "Expect: 100-continue",
            "Content-Type: application/json",
            f"Content-Length: {len(content)}",
        )
        assert (
            wire.send(written("POST", TASKS, None, *lines, user="alice")).answer().status_code
            == 100
        )
        assert wire.send(content).answer().status_code == 201
        assert wire.send(written("GET", "/healthz")).answer().status_code == 200


@SAME_ON_ALL
def test_expect_100_continue_of_http_1_0_is_ignored(server: Process) -> None:
    head = written("POST", TASKS, None, "Expect: 100-continue", "Content-Length: 2", version="1.0")
    with Wire(server) as wire:
        wire.send(head)
        assert server.request("GET", "/healthz").status_code == 200  # the head is read
        assert wire.send(b"{}").answer().status_code == 401


EXPECTATIONS = [
    ("GET", "/healthz", (), 200),
    ("GET", TASKS, ("Content-Length: 0",), 401),
    ("POST", TASKS, ("Content-Length: 2000000",), 413),
    ("POST", TASKS, ("Content-Length: none",), 400),
    ("POST", TASKS, ("Transfer-Encoding: gzip",), 400),
]


@pytest.mark.parametrize(("method", "path", "lines", "status"), EXPECTATIONS)
@SAME_ON_ALL
def test_expect_100_continue_without_a_body_to_wait_for_gets_its_answer_at_once(
    server: Process, method: str, path: str, lines: tuple[str, ...], status: int
) -> None:
    with Wire(server, timeout=SOON) as wire:
        answer = wire.send(written(method, path, None, "Expect: 100-continue", *lines)).answer()
        if answer.status_code == 100:
            answer = wire.answer()
        assert answer.status_code == status


REFUSED = [
    ("nonsense", b"nonsense\r\n\r\n", 400),
    ("no method", b" /healthz HTTP/1.1\r\n\r\n", 400),
    ("a small method", b"get /healthz HTTP/1.1\r\n\r\n", 400),
    ("a header without a name", b"GET /healthz HTTP/1.1\r\n: x\r\n\r\n", 400),
    ("a header with a space", b"GET /healthz HTTP/1.1\r\nX Y: x\r\n\r\n", 400),
    ("a folded header", written("GET", "/healthz", None, "X-Folded: a", " b"), 400),
    ("a body over 64 KiB", written("POST", TASKS, None, "Content-Length: 65537"), 413),
    ("a body over 1 MiB", written("POST", TASKS, None, "Content-Length: 1048577"), 413),
    ("a body of a petabyte", written("POST", TASKS, None, "Content-Length: 1125899906842624"), 413),
    ("headers over 64 KiB", written("GET", "/healthz", None, f"X-Long: {'x' * 70_000}"), 431),
    ("a path over 64 KiB", written("GET", f"/{'x' * 70_000}"), 431),
    ("Transfer-Encoding: gzip", written("POST", TASKS, None, "Transfer-Encoding: gzip"), 400),
    (
        "Transfer-Encoding: gzip, chunked",
        written("POST", TASKS, None, "Transfer-Encoding: gzip, chunked"),
        400,
    ),
    (
        "Transfer-Encoding: identity",
        written("POST", TASKS, None, "Transfer-Encoding: identity"),
        400,
    ),
    ("chunks that are none", written("POST", TASKS, b"zz\r\n", "Transfer-Encoding: chunked"), 400),
]


@pytest.mark.parametrize(
    ("sent", "status"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
@SAME_ON_ALL
def test_what_the_server_refuses_by_its_own_hand_has_the_shape_of_all_errors(
    server: Process, sent: bytes, status: int
) -> None:
    with Wire(server) as wire:
        body = assert_problem(wire.send(sent).answer(), status)
        assert body["detail"]
        assert wire.is_closed()
    assert server.request("GET", "/healthz").status_code == 200


@pytest.mark.parametrize("size", [64 * 1024 + 1, 600_000, 1_048_500])
@pytest.mark.parametrize("framed", ["as a whole", "in chunks of 1,000", "in one chunk"])
@SAME_ON_ALL
def test_a_body_over_64_kib_is_413_and_its_client_may_send_it_all(
    server: Process, size: int, framed: str
) -> None:
    content = b"x" * size
    lines, body = (f"Content-Length: {size}", content)
    if framed != "as a whole":
        lines, body = CHUNKED[0], chunked(content, 1000 if "1,000" in framed else size)
    with Wire(server) as wire:
        wire.send(written("POST", TASKS, body, CHUNKED[1], lines, user="alice"))
        answer = wire.answer()
        assert "65536 bytes" in assert_problem(answer, 413)["detail"]
        assert (answer.line, answer.headers["connection"]) == (
            "HTTP/1.1 413 Content Too Large",
            "close",
        )
        assert wire.is_closed()


def test_a_body_of_64_kib_is_taken(server: Process) -> None:
    body = json.dumps(milk()).encode().ljust(64 * 1024)
    with Wire(server) as wire:
        for content, line in (
            (body, f"Content-Length: {len(body)}"),
            (chunked(body, 1000), CHUNKED[0]),
        ):
            wire.send(written("POST", TASKS, content, CHUNKED[1], line, user="alice"))
            assert wire.answer().status_code == 201


@SAME_ON_ALL
def test_a_client_that_sends_2_mb_before_it_reads_gets_the_reason_of_the_rejection(
    server: Process,
) -> None:
    with Wire(server) as wire:
        sent = written("POST", TASKS, b"x" * 2_000_000, "Content-Length: 2000000", user="alice")
        with contextlib.suppress(ConnectionError):  # the server need not accept all of them
            wire.send(sent)
        assert_problem(wire.answer(), 413)


# --- Concurrency ----------------------------------------------------------------------------------


def test_8_users_at_once_each_see_their_own_tasks_and_nothing_else(server: Process) -> None:
    def live(user: str) -> list[int]:
        path, titles, done = f"/api/{user}/tasks", [], []
        with Wire(server) as wire:
            for number in range(15):
                created = wire.send(
                    written("POST", path, {"title": f"{user} {number}"}, user=user)
                ).answer()
                assert created.status_code == 201
                task = created.json
                titles.append(f"{user} {number}")
                assert (
                    wire.send(written("GET", f"{path}/{task['id']}", user=user)).answer().json
                    == task
                )
                wire.send(written("PATCH", f"{path}/{task['id']}/complete", user=user))
                assert wire.answer().json["completed"] is True
                done.append(task["id"])
            listed = wire.send(written("GET", path, user=user)).answer().json
        assert [(task["user_id"], task["title"], task["completed"]) for task in listed] == [
            (user, title, True) for title in titles
        ]
        return done

    with ThreadPoolExecutor(8) as pool:
        keys = [
            key
            for keys in pool.map(live, [f"user-{number}" for number in range(8)])
            for key in keys
        ]
    assert len(set(keys)) == 8 * 15


def test_every_toggle_of_a_storm_counts(server: Process) -> None:
    task = server.request("POST", TASKS, milk(), bearer()).json
    request = written("PATCH", f"{TASKS}/{task['id']}/complete", user="alice")

    def toggle(times: int) -> list[tuple[int, bool]]:
        with Wire(server) as wire:
            answers = [wire.send(request).answer() for _ in range(times)]
        return [(answer.status_code, answer.json["completed"]) for answer in answers]

    with ThreadPoolExecutor(9) as pool:
        answers = [answer for answers in pool.map(toggle, [31] * 9) for answer in answers]
    assert Counter(answers) == {(200, True): 140, (200, False): 139}
    assert stored(database_of(server))[task["id"]]["completed"] == 1


def test_of_16_deletes_of_one_task_exactly_one_succeeds(server: Process) -> None:
    barrier = threading.Barrier(16)

    def remove(request: bytes) -> int:
        with Wire(server) as wire:
            barrier.wait(DEADLINE)
            return wire.send(request).answer().status_code

    for _ in range(5):
        task = server.request("POST", TASKS, milk(), bearer()).json
        with ThreadPoolExecutor(16) as pool:
            request = written("DELETE", f"{TASKS}/{task['id']}", user="alice")
            assert Counter(pool.map(remove, [request] * 16)) == {200: 1, 404: 15}
    assert server.request("GET", TASKS, headers=bearer()).json == []


def test_a_restart_on_the_same_port_follows_at_once(start: Start) -> None:
    first = start()
    with Wire(first) as wire:
        assert wire.send(written("GET", "/healthz")).answer().status_code == 200
        assert first.terminate() == 0
        assert start(TASKD_PORT=str(first.port)).port == first.port


def test_descriptors_do_not_grow_with_connections(server: Process) -> None:
    assert server.request("POST", TASKS, milk(), bearer()).status_code == 201
    descriptors = Path(f"/proc/{server.popen.pid}/fd")
    if not descriptors.exists():
        pytest.skip("this system has no /proc")
    before = len(list(descriptors.iterdir()))
    for _ in range(100):
        assert server.request("GET", TASKS, headers=bearer()).status_code == 200
    until(lambda: len(list(descriptors.iterdir())) <= before, "the connections are closed")

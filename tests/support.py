"""What the tests share: tokens made without taskd's own code, and real taskd processes on real sockets."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.client
import itertools
import json
import os
import re
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

import pytest

if TYPE_CHECKING:
    from cluster import Databases

ROOT = Path(__file__).parent.parent
SECRET = "a-secret-for-the-tests-of-at-least-32-bytes"
OTHER_SECRET = "another-secret-of-at-least-32-bytes-indeed"
TASK_KEYS = [
    "id",
    "user_id",
    "title",
    "description",
    "completed",
    "priority",
    "due_date",
    "tags",
    "created_at",
    "updated_at",
]
DEADLINE = 20  # seconds that anything here may take before it counts as failed

# The first line of a log, as text or as JSON.
LISTENING = r'^(?:\{.*"message": ")?taskd: listening on http://.*:(\d+)'

postgresql: Databases | None = None  # where the tests' databases are in a run with --postgresql


def database_url(file: Path) -> str:
    """Return the address of a database: this file or, in a run on PostgreSQL, the one that stands for this file."""
    return postgresql.url(str(file)) if postgresql else f"sqlite:///{file}"


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def sign(header: object, payload: object, secret: str = SECRET) -> str:
    """Return a compact JWS of any header and payload, HMAC SHA-256; bytes are taken as they are, others as JSON."""
    parts = [
        base64url(part if isinstance(part, bytes) else json.dumps(part).encode())
        for part in (header, payload)
    ]
    signing_input = ".".join(parts)
    return f"{signing_input}.{base64url(hmac.digest(secret.encode(), signing_input.encode(), hashlib.sha256))}"


def token(user: str = "alice", secret: str = SECRET, **claims: object) -> str:
    """Return a token as Better Auth's own would be; a claim that is None is left out."""
    now = int(time.time())
    claims = {
        "sub": user,
        "iat": now,
        "exp": now + 900,
        "email": f"{user}@example.com",
        "name": user,
    } | claims
    return sign(
        {"alg": "HS256", "typ": "JWT"},
        {name: value for name, value in claims.items() if value is not None},
        secret,
    )


def bearer(user: str = "alice", **claims: object) -> dict[str, str]:
    return {"Authorization": f"Bearer {token(user, **claims)}"}


def assert_problem(response: Any, status: int) -> dict[str, Any]:
    """Check the shape of an error (contract, section 6) and return its body. Takes falcon's results and ours."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = json.loads(response.text)
    assert set(body) <= {"title", "status", "detail", "errors"}, body
    assert body["status"] == status
    assert isinstance(body["title"], str)
    assert body["title"]
    assert re.search("(?i)[a-z]{2} [a-z]", body["detail"]), (
        "every refusal says in words what is wrong"
    )
    assert "XX" not in body["detail"], "and leaves no gap to be filled in"
    assert ("errors" in body) == (status == 422), body
    return body


# The modules whose processes are measured for coverage, which takes them half of their time again.
MEASURED = (
    "test_server.py",
    "test_operations.py",
    "test_faults.py",
    "test_listing.py",
    "test_taskctl",
)


def environment(**variables: str) -> dict[str, str]:
    """Return a process environment with these variables and none of taskd's own that happen to be set here."""
    dropped = ["TASKD_", "BETTER_AUTH", "DATABASE_URL"]
    if not any(module in os.environ.get("PYTEST_CURRENT_TEST", "") for module in MEASURED):
        dropped.append("COVERAGE_PROCESS_")
    return {
        name: value for name, value in os.environ.items() if not name.startswith(tuple(dropped))
    } | variables


# Forks a process of taskd or taskctl for each order that it reads. To start Python and import all takes 0.5 s of a
# processor, and to fork a process that has done so some ms.
NURSERY = """
import gc, json, os, signal, sys, time
root, name, prepare = sys.argv[1:]
sys.path[0] = root
program = __import__(name)
exec(prepare)
gc.freeze()  # so that a child does not copy it all only to tidy it up
running = set()
for line in iter(sys.stdin.readline, ""):
    order = json.loads(line)
    if "ended" in order:
        child, status = os.waitpid(order["ended"], os.WNOHANG)
        running.discard(child)
        print(json.dumps(os.waitstatus_to_exitcode(status) if child else None), flush=True)
        continue
    if child := os.fork():
        running.add(child)
        print(child, flush=True)
        continue
    os.chdir(order["directory"])
    os.environ.clear()
    os.environ.update(order["environment"])
    time.tzset()
    for number, (name, mode) in enumerate([("stdin", "r"), ("stdout", "a"), ("stderr", "a")]):
        with open(order[name], mode + "b") as file:
            os.dup2(file.fileno(), number)
        of_its_kind = {"errors": "backslashreplace", "buffering": 1} if name == "stderr" else {}
        setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False, **of_its_kind))
    sys.argv = [os.path.join(root, program.__name__ + ".py"), *order["arguments"]]
    sys.exit(program.main())  # and leave as any process does: what it keeps open is closed only then
for child in running:  # the tests were broken off
    os.kill(child, signal.SIGKILL)
"""


class Nursery:
    """A process from which those of a program are forked."""

    all: ClassVar[dict[tuple[str, bool], Nursery]] = {}

    def __init__(self, program: str, prepare: str, variables: dict[str, str]) -> None:
        self._lock = threading.Lock()
        self._popen = subprocess.Popen(
            [sys.executable, "-c", NURSERY, str(ROOT), program, prepare],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @classmethod
    def of(cls, program: str, prepare: str, variables: dict[str, str]) -> Nursery:
        """Return the one of this program, started once in a run, or twice where some tests are measured."""
        measured = any(name.startswith("COVERAGE_PROCESS_") for name in variables)
        if (program, measured) not in cls.all:
            cls.all[program, measured] = cls(program, prepare, variables)
        return cls.all[program, measured]

    def order(self, **order: object) -> int | None:
        """Send an order and return the number that comes back."""
        assert self._popen.stdin
        assert self._popen.stdout
        with self._lock:
            print(json.dumps(order), file=self._popen.stdin, flush=True)
            return json.loads(self._popen.stdout.readline())

    def fork(
        self, *arguments: str, directory: Path, variables: dict[str, str], **streams: Path | str
    ) -> Child:
        """Fork a process there; what it writes is appended to these files."""
        files = {name: str(path) for name, path in streams.items()}
        pid = self.order(
            arguments=arguments, directory=str(directory), environment=variables, **files
        )
        assert pid
        return Child(pid, self.order)

    @classmethod
    def close(cls) -> None:
        """End them all."""
        while cls.all:
            cls.all.popitem()[1]._popen.communicate()


class Child:
    """A process that another one forked, with what the tests use of subprocess.Popen."""

    def __init__(self, pid: int, order: Callable[..., int | None]) -> None:
        self.pid, self._order = pid, order
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, or the signal's number below zero, or None while it runs."""
        if self.returncode is None:
            self.returncode = self._order(ended=self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.005)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Answer:
    """An HTTP answer off a socket, with the names that falcon's test results have."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status_code = response.status
        self.names = [
            name.lower() for name, _ in response.getheaders()
        ]  # one that comes twice is there twice
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.content = response.read()

    @property
    def text(self) -> str:
        return self.content.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.content)


def ask(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: object,
    headers: dict[str, str] | None,
) -> Answer:
    """Send a request and return its answer; a body that is no bytes goes as JSON."""
    headers = dict(headers or {})
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
        headers.setdefault("Content-Type", "application/json")
    connection.request(method, path, body, headers)
    return Answer(connection.getresponse())


COLD: list[str] = []  # as the command of a Process: let it start Python and import all for itself


class Process:
    """A taskd process of its own, in a directory of its own: forked, unless there is a command to start it with."""

    def __init__(
        self,
        directory: Path,
        *,
        wait: bool = True,
        command: list[str] | None = None,
        **variables: str,
    ) -> None:
        if "MUTANT_UNDER_TEST" in os.environ:
            pytest.skip("a mutant lives in the process of the tests")
        defaults = {"BETTER_AUTH_SECRET": SECRET, "TASKD_PORT": "0"}
        if postgresql:
            defaults["DATABASE_URL"] = database_url(directory / "taskd.db")
        self.log_path = directory / f"stderr-{time.monotonic_ns()}.log"
        self.log_path.touch()
        self.popen = self._start(command, directory, environment(**(defaults | variables)))
        self.port = self._wait_for_port() if wait else 0

    def _start(
        self, command: list[str] | None, directory: Path, variables: dict[str, str]
    ) -> Child | subprocess.Popen[bytes]:
        if command is None:
            return Nursery.of("taskd", "", environment()).fork(
                directory=directory,
                variables=variables,
                stdin=os.devnull,
                stdout=self.log_path,
                stderr=self.log_path,
            )
        with self.log_path.open("wb") as log:
            return subprocess.Popen(
                [*command, sys.executable, str(ROOT / "taskd.py")],
                cwd=directory,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def _wait_for_port(self) -> int:
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline and self.popen.poll() is None:
            if started := re.search(LISTENING, self.log, re.MULTILINE):
                return int(started[1])
            time.sleep(0.01)
        self.kill()
        raise AssertionError(f"taskd did not start: {self.log}")

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: dict[str, str] | None = None,
        timeout: float = DEADLINE,
    ) -> Answer:
        """Send one request on a connection of its own; a body that is no bytes goes as JSON."""
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        ) as connection:
            return ask(connection, method, path, body, headers)

    def terminate(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(DEADLINE)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(DEADLINE)


# What the tests of a real process share.


class WireAnswer(Answer):
    """One answer of several on a connection, with its status line as it came."""

    def __init__(self, line: bytes, file: BinaryIO, bodiless: bool) -> None:
        self.line = line.decode("latin-1").rstrip("\r\n")
        self.status_code = int(self.line.split(" ")[1])
        self.headers = {
            name.lower(): value for name, value in http.client.parse_headers(file).items()
        }
        length = 0 if bodiless or self.status_code < 200 else int(self.headers["content-length"])
        self.content = file.read(length)
        assert len(self.content) == length, "the answer was cut short"


class Wire:
    """A connection on which anything can be sent, and from which answers are read one after another."""

    def __init__(self, server: Process, timeout: float = DEADLINE, receive_buffer: int = 0) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(timeout)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(("127.0.0.1", server.port))
        self._file = self.socket.makefile("rb")

    def send(self, data: bytes) -> Wire:
        self.socket.sendall(data)
        return self

    def answer(self, bodiless: bool = False) -> WireAnswer:
        """Return the next answer; the connection must not end before it."""
        line = self._file.readline()
        assert line, "the connection was closed without an answer"
        return WireAnswer(line, self._file, bodiless)

    def is_closed(self) -> bool:
        """Wait for the server to end the connection; whatever it sends instead makes this false."""
        try:
            return self._file.read(1) == b""
        except ConnectionError:
            return True

    def reset(self) -> None:
        """Break the connection off as a crashed client would."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self._file.close()
        self.socket.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def written(
    method: str, path: str, body: object = None, *lines: str, user: str = "", version: str = "1.1"
) -> bytes:
    """Return a request as it goes over the wire; a body that is no bytes goes as JSON, with its length."""
    head = [f"{method} {path} HTTP/{version}", "Host: tasks.example", *lines]
    if user:
        head.append(f"Authorization: Bearer {token(user)}")
    content = (
        body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    )
    if body is not None and not isinstance(body, bytes):
        head += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + content


@contextlib.contextmanager
def locked(database: Path) -> Iterator[Any]:
    """Hold the database's write lock, or the lock of the tables on PostgreSQL, as another process would."""
    if postgresql:
        with postgresql.connect(str(database)) as session, session.transaction():
            session.execute("LOCK TABLE task, idempotency_key IN EXCLUSIVE MODE")
            yield session
        return
    with contextlib.closing(
        sqlite3.connect(database, timeout=DEADLINE, isolation_level=None)
    ) as connection:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        finally:
            connection.execute("ROLLBACK")


def stored(database: Path) -> dict[int, dict[str, Any]]:
    """Return the tasks that are in the database, read by another process than taskd, by their ids."""
    if postgresql:
        with postgresql.connect(str(database)) as session:
            rows = session.execute(
                f"SELECT {', '.join(TASK_KEYS)} FROM task ORDER BY id"
            ).fetchall()
        return {row[0]: dict(zip(TASK_KEYS, row, strict=True)) for row in rows}
    with contextlib.closing(sqlite3.connect(database, timeout=DEADLINE)) as connection:
        connection.row_factory = sqlite3.Row
        return {
            row["id"]: dict(row)
            for row in connection.execute(f"SELECT {', '.join(TASK_KEYS)} FROM task")
        }


def sql(database: Path, statement: str, *values: object) -> list[Any]:
    """Run a statement as another process than taskd, and return its rows."""
    if postgresql:
        if statement.startswith(("ALTER", "CREATE", "DROP")):
            postgresql.spoiled.add(str(database))
        with postgresql.connect(str(database)) as session:
            cursor = session.execute(statement.replace("?", "%s").encode(), values)
            return cursor.fetchall() if cursor.description else []
    with contextlib.closing(sqlite3.connect(database, timeout=DEADLINE)) as connection, connection:
        return connection.execute(statement, values).fetchall()


def empty(database: Path) -> None:
    """Delete all tasks; the next one has the id 1."""
    if postgresql:
        sql(database, "TRUNCATE task RESTART IDENTITY")
        return
    sql(database, "DELETE FROM task")
    sql(database, "DELETE FROM sqlite_sequence")


def release(database: Path) -> None:
    """Let another test have the database before this one ends, where it is no file."""
    if postgresql:
        postgresql.release(str(database))


def until(condition: Callable[[], object], why: str, seconds: float = DEADLINE) -> None:
    """Look again and again until the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {why}"
        time.sleep(0.01)


def at_once(
    servers: list[Process], requests: list[bytes], database: Path | None = None
) -> list[WireAnswer]:
    """Send the requests on connections of their own, in turn to these servers, and return the answers.

    With a database, its lock is held until all have been sent, so that they meet in the worker threads.
    """
    with contextlib.ExitStack() as stack:
        wires = [
            stack.enter_context(Wire(server))
            for server, _ in zip(itertools.cycle(servers), requests, strict=False)
        ]
        with locked(database) if database else contextlib.nullcontext():
            for wire, request in zip(wires, requests, strict=True):
                wire.send(request)
            for server in servers * 2:  # when this is answered, those before it have been looked at
                assert server.request("GET", "/healthz").status_code == 200
        return [wire.answer() for wire in wires]

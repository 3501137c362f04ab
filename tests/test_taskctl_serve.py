"""taskctl serve and wait: a server for other people's tests, which leaves nothing behind."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import taskctl as program
from cluster import free_port
from processes import ROOT, Process, environment
from test_taskctl import Taskctl, answering, dead_port, fork_server, http_answer, run
from tokens import OTHER_SECRET, bearer
from waiting import DEADLINE, until
from wire import assert_problem

pytestmark = pytest.mark.sqlite("it is about a database of its own, which is SQLite")

NO_SECRET = ["--set", "BETTER_AUTH_SECRET=", "--set", "TASKD_JWKS_URL=http://127.0.0.1:1/jwks"]
COMMAND = [sys.executable, str(ROOT / "taskctl.py"), "serve", "--ephemeral"]


class Ephemeral(Process):
    """A server for tests, and the settings that it printed; forked unless a command starts it."""

    popen: Any

    def __init__(
        self,
        directory: Path,
        *options: str,
        stdin: Any = subprocess.PIPE,
        command: list[str] | None = None,
    ) -> None:
        self.temporary = directory / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self.log_path = directory / "stderr.log"
        variables = environment(
            TMPDIR=str(self.temporary),
            BETTER_AUTH_SECRET="far too short",
            DATABASE_URL="sqlite:///not-this-one.db",
            TASKD_PORT="no port",
            TASKD_THREADS="0",
        )
        with self.log_path.open("wb") as log:
            self.popen = (
                subprocess.Popen(
                    [*command, *options], cwd=directory, env=variables, stdin=stdin,
                    stdout=subprocess.PIPE, stderr=log,
                )
                if command
                else fork_server().launch(
                    "serve", "--ephemeral", *options, directory=directory, variables=variables,
                    stdin=stdin, stderr=log.fileno(), text=False,
                )
            )  # fmt: skip
        line = self.popen.stdout.readline()
        assert line, self.log
        self.told: dict[str, Any] = json.loads(line)
        self.port = int(self.told["url"].rpartition(":")[2])

    def files(self) -> list[Path]:
        return list(self.temporary.iterdir())

    def close_stdin(self) -> None:
        self.popen.stdin.close()


Serve = Callable[..., Ephemeral]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start servers in this test's directory, whose .env they must ignore."""
    (tmp_path / ".env").write_text("BETTER_AUTH_SECRET=short\nTASKD_THREADS=0\n")
    started: list[Ephemeral] = []

    def serve(*options: str, **streams: Any) -> Ephemeral:
        started.append(Ephemeral(tmp_path, *options, **streams))
        return started[-1]

    yield serve
    for server in started:
        if server.popen.poll() is None:
            server.kill()
        for stream in (server.popen.stdin, server.popen.stdout):
            if stream:
                stream.close()


def test_it_prints_one_line_and_each_user_has_a_token_and_the_tasks_that_were_asked_for(
    serve: Serve, tmp_path: Path
) -> None:
    options = ["--user", "alice", "--user", "bob/é", "--seed", "3", "--port-file", "port"]
    server = serve(*options, "--set", "TASKD_CORS_ORIGINS=http://localhost:5173")
    told = server.told
    assert list(told) == ["url", "secret", "pid", "tokens"]
    assert told["url"] == f"http://127.0.0.1:{server.port}"
    assert told["pid"] == server.popen.pid
    assert list(told["tokens"]) == ["alice", "bob/é"]
    assert (tmp_path / "port").read_text() == f"{server.port}\n"
    for path, user in [("/api/alice/tasks", "alice"), ("/api/bob%2F%C3%A9/tasks", "bob/é")]:
        headers = {
            "Authorization": f"Bearer {told['tokens'][user]}",
            "Origin": "http://localhost:5173",
        }
        answer = server.request("GET", path, headers=headers)
        assert (answer.status_code, len(answer.json)) == (200, 3)
        assert answer.headers["access-control-allow-origin"] == "http://localhost:5173"
    assert len(told["secret"]) >= 32
    claims = json.loads(base64.urlsafe_b64decode(told["tokens"]["alice"].split(".")[1] + "=="))
    assert claims["exp"] - claims["iat"] == 24 * 3600
    minted = bearer("carol", secret=told["secret"])
    assert server.request("GET", "/api/carol/tasks", headers=minted).json == []
    assert_problem(
        server.request("GET", "/api/alice/tasks", headers=bearer("alice", secret=OTHER_SECRET)), 401
    )
    server.close_stdin()
    assert server.popen.wait(DEADLINE) == 0
    assert server.popen.stdout.read() == b""
    assert server.files() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [".env", "stderr.log", "tmp"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_without_a_pipe_as_stdin_it_serves_until_a_signal(serve: Serve, number: int) -> None:
    server = serve(stdin=subprocess.DEVNULL)
    assert server.request("GET", "/readyz").status_code == 200
    assert server.told["tokens"] == {}
    assert len(server.files()) == 1
    assert server.terminate(number) == 0
    assert server.files() == []


def test_with_stdin_closed_at_the_start_it_serves_and_a_kill_leaves_nothing_behind(
    serve: Serve, tmp_path: Path
) -> None:
    close = "import os, sys; os.close(0); os.execv(sys.argv[1], sys.argv[1:])"
    server = serve("--port-file", "port", command=[sys.executable, "-c", close, *COMMAND])
    headers = bearer("alice", secret=server.told["secret"])
    created = server.request("POST", "/api/alice/tasks", {"title": "Buy milk"}, headers)
    assert created.status_code == 201
    assert (tmp_path / "port").exists()
    server.kill()
    until(lambda: not server.files() and not (tmp_path / "port").exists(), "all is removed")


def test_it_ends_with_a_socket_as_stdin_and_when_that_was_at_its_end_from_the_start(
    serve: Serve,
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs_at_its_end = os.dup(theirs.fileno())
        ours.shutdown(socket.SHUT_WR)
        server = serve(stdin=theirs_at_its_end, command=COMMAND)
        os.close(theirs_at_its_end)
    assert server.popen.wait(DEADLINE) == 0
    assert server.files() == []


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ([], 2, "--ephemeral is required"),
        (["--ephemeral", "--seed", "3"], 2, "name one"),
        (["--ephemeral", "--set", "TASKD_PROT=1"], 2, "TASKD_PROT"),
        (["--ephemeral", "--set", "DATABASE_URL=sqlite:///mine.db"], 2, "DATABASE_URL"),
        (["--ephemeral", "--set", "TASKD_THREADS=0"], 2, "TASKD_THREADS must be"),
        (["--ephemeral", "--set", "TASKD_PORT"], 2, "VARIABLE=VALUE"),
        (["--ephemeral", *NO_SECRET], 2, "leaves no secret"),
        (["--ephemeral", "--port-file", "."], 2, "is a directory"),
        (["--ephemeral", "--port-file", "nowhere/port"], 1, "taskctl: nowhere/port"),
    ],
)
def test_what_it_cannot_do_is_refused_and_leaves_nothing_behind(
    tmp_path: Path, options: list[str], status: int, words: str
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    (tmp_path / "here").mkdir()
    answer = run(tmp_path / "here", "serve", *options, TMPDIR=str(temporary))
    assert (answer.returncode, answer.stdout) == (status, "")
    assert words in " ".join(answer.stderr.split())
    assert list(temporary.iterdir()) == list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("name", ["-", "-z", "a b"])
def test_a_port_file_of_an_odd_name_is_removed_and_its_neighbours_stay(
    serve: Serve, tmp_path: Path, name: str
) -> None:
    (tmp_path / f"{name}.new").write_text("precious")
    server = serve(f"--port-file={name}")
    assert (tmp_path / name).read_text() == f"{server.port}\n"
    server.close_stdin()
    assert server.popen.wait(DEADLINE) == 0
    until(lambda: not (tmp_path / name).exists(), "it is removed")
    assert (tmp_path / f"{name}.new").read_text() == "precious"


def test_a_port_file_that_another_has_written_stays(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "port"
    file.write_text("8123\n")
    options = ["--ephemeral", "--port-file", "port"]
    assert run(tmp_path, "serve", *options, "--set", "TASKD_PORT=x").returncode == 2
    assert file.read_text() == "8123\n"
    server = serve("--port-file", "port")
    assert file.read_text() == f"{server.port}\n"
    file.write_text("8124\n")
    assert server.terminate() == 0
    until(lambda: not list((tmp_path / "tmp").iterdir()), "all is removed")
    assert file.read_text() == "8124\n"


def test_wait_returns_when_the_server_is_ready(
    taskctl: Taskctl, start: Callable[..., Process], tmp_path: Path
) -> None:
    port = free_port()
    longest = ["--timeout", "999999999d"]
    waiting = threading.Thread(target=lambda: answers.append(taskctl("wait", url, *longest)))
    url, answers = f"http://127.0.0.1:{port}/", []
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive(), "it waits until a server is there"
    start(TASKD_PORT=str(port))
    waiting.join(DEADLINE)
    [answer] = answers
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


def test_wait_says_in_one_line_why_a_server_was_not_ready_in_time(taskctl: Taskctl) -> None:
    away = answering(http_answer(b"the database is away", "503 Service Unavailable"))
    other = answering(http_answer(b"another program", "404 Not Found"))
    silent = socket.create_server(("127.0.0.1", 0))
    with away as url, other as other_url, dead_port() as port, silent:
        for address, why in [
            (f"http://127.0.0.1:{port}", "Connection refused"),
            (url, "/readyz answers 503: the database is away"),
            (other_url, "/readyz answers 404: another program"),
            (f"http://127.0.0.1:{silent.getsockname()[1]}", "timed out"),
        ]:
            answer = taskctl("wait", address, "--timeout", "0s")
            assert (answer.returncode, answer.stdout) == (1, "")
            assert answer.stderr == f"taskctl: {address} is not ready after 0s: {why}\n"


@pytest.mark.parametrize("url", ["http://[::1]", "http://[2001:db8::abcd]", "https://127.0.0.1"])
def test_an_address_without_a_port_has_that_of_its_scheme(url: str) -> None:
    connection, prefix = program.connection_to(url, timeout=1)
    assert (connection.host, connection.port, prefix) == (
        url.partition("//")[2].strip("[]"),
        443 if url.startswith("https") else 80,
        "",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ftp://x"], "URL must look like"),
        (["127.0.0.1:8000"], "URL must look like"),
        (["http://x", "--timeout", "soon"], "a duration must look like"),
    ],
)
def test_wait_rejects_a_bad_address_and_a_bad_duration(
    taskctl: Taskctl, arguments: list[str], words: str
) -> None:
    answer = taskctl("wait", *arguments)
    assert answer.returncode == 2
    assert words in " ".join(answer.stderr.split())

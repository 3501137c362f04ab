"""Real taskd processes, started or forked, each in its own directory and on its own port."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest

import database
from tokens import SECRET
from waiting import DEADLINE
from wire import Answer, ask

ROOT = Path(__file__).parent.parent

# The first line of a log, as text or as JSON.
LISTENING = r'^(?:\{.*"message": ")?taskd: listening on http://.*:(\d+)'

# Tests whose processes are not measured for coverage: they are about processor time, or cannot
# write to the directory of the coverage data.
UNMEASURED = ("test_costs.py", "cannot_be_entered")


# Run once by a fork server, so that no child has to: taskctl loads parts of Typer and Rich late.
PREPARE = {
    "taskd": "",
    "taskctl": """
import contextlib, dotenv, functools, io, typer
typer.main.get_command = functools.cache(typer.main.get_command)
with contextlib.redirect_stdout(io.StringIO()):
    program.show_all([{"a": "b"}], False)
    program.progress()
    for arguments in ["mint", "alice"], ["--help"]:
        with contextlib.suppress(SystemExit):
            program.app(arguments)
""",
}


def environment(**variables: str) -> dict[str, str]:
    """Return this process's environment, without taskd's variables, and with these."""
    dropped = ["TASKD_", "BETTER_AUTH", "DATABASE_URL"]
    if any(name in os.environ.get("PYTEST_CURRENT_TEST", "") for name in UNMEASURED):
        dropped.append("COVERAGE_PROCESS_")
    return {
        name: value for name, value in os.environ.items() if not name.startswith(tuple(dropped))
    } | variables


class ForkServer:
    """A process that has imported a program and forks it (fork_server.py); threads may share it."""

    all: ClassVar[dict[tuple[str, bool], ForkServer]] = {}
    starting: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, program: str, variables: dict[str, str]) -> None:
        self._lock = threading.Lock()
        starts = [sys.executable, str(ROOT / "tests" / "fork_server.py")]
        self._popen = subprocess.Popen(
            [*starts, str(ROOT), program, PREPARE[program]],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @classmethod
    def of(cls, program: str, variables: dict[str, str]) -> ForkServer:
        """Return the fork server of this program and measurement, started once in a run."""
        measured = any(name.startswith("COVERAGE_PROCESS_") for name in variables)
        with cls.starting:
            if (program, measured) not in cls.all:
                cls.all[program, measured] = cls(program, variables)
            return cls.all[program, measured]

    def order(self, **order: object) -> int | None:
        """Send an order and return the number in its answer."""
        assert self._popen.stdin
        assert self._popen.stdout
        with self._lock:
            print(json.dumps(order), file=self._popen.stdin, flush=True)
            answer: int | None = json.loads(self._popen.stdout.readline())
            return answer

    def fork(
        self,
        *arguments: str,
        directory: Path,
        variables: dict[str, str],
        before: str = "",
        **streams: Path | str | None,
    ) -> Child:
        """Fork a process in a directory, which runs a statement before the program.

        Its output is appended to these files; a stream that is None is closed.
        """
        files = {name: path and str(path) for name, path in streams.items()}
        pid = self.order(
            arguments=arguments,
            directory=str(directory),
            environment=variables,
            before=before,
            **files,
        )
        assert pid
        return Child(pid, self.order)

    def launch(
        self, *arguments: str, text: bool = True, stdin: int | None = subprocess.DEVNULL,
        stdout: int | None = subprocess.PIPE, stderr: int | None = subprocess.PIPE, **options: Any,
    ) -> Launched:  # fmt: skip
        """Fork a process whose streams are given as to subprocess.Popen; None closes a stream."""
        return Launched(
            lambda **streams: self.fork(*arguments, **options, **streams),
            {"stdin": stdin, "stdout": stdout, "stderr": stderr},
            text,
        )

    def run(
        self, *arguments: str, directory: Path, variables: dict[str, str], stdin: bytes = b""
    ) -> subprocess.CompletedProcess[str]:
        """Fork a process in a directory, wait for its end, and return its status and output."""
        with tempfile.TemporaryDirectory() as name:
            files = {stream: Path(name, stream) for stream in ("stdin", "stdout", "stderr")}
            files["stdin"].write_bytes(stdin)
            child = self.fork(
                *arguments, directory=directory, variables=variables, before="", **files
            )
            try:
                status = child.wait(DEADLINE)
            finally:
                child.kill()
            output = [
                files[stream].read_bytes().decode(errors="surrogateescape")
                for stream in ("stdout", "stderr")
            ]
        return subprocess.CompletedProcess(arguments, status, *output)

    @classmethod
    def close(cls) -> None:
        """End all fork servers."""
        while cls.all:
            cls.all.popitem()[1]._popen.communicate()


FORKING = """#!{python} -IS
import json, os, socket, sys
if not sys.argv[1].endswith(".py"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as end:
    end.connect({address})
    order = dict(pid=os.getpid(), arguments=sys.argv[2:], directory=os.getcwd())
    order |= dict(variables=dict(os.environ), umask=os.umask(0))
    end.sendall(json.dumps(order).encode() + b"\\n")
    sys.exit(int(end.recv(100)))
"""


class Forking:
    """A file that runs a program as `python program.py` does, but forked: for shell scripts.

    The process that they start waits for the forked one, which has its streams and its umask.
    """

    def __init__(self, server: ForkServer, file: Path) -> None:
        self._server, self._listener = server, socket.socket(socket.AF_UNIX)
        self._listener.bind("")  # Linux gives it an address that is no file
        self._listener.listen()
        address = self._listener.getsockname()
        file.write_text(FORKING.format(python=sys.executable, address=address))
        file.chmod(0o755)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._run, args=[connection], daemon=True).start()

    def _run(self, connection: socket.socket) -> None:
        with connection, connection.makefile() as file:
            order = json.loads(file.readline())
            names = enumerate(("stdin", "stdout", "stderr"))
            child = self._server.fork(
                *order["arguments"],
                directory=Path(order["directory"]),
                variables=order["variables"],
                before=f"import os; os.umask({order['umask']})",
                **{name: f"/proc/{order['pid']}/fd/{number}" for number, name in names},
            )
            connection.sendall(str(child.wait(DEADLINE)).encode())


class Child:
    """A process of a fork server, with those methods of subprocess.Popen that the tests use."""

    def __init__(self, pid: int, order: Callable[..., int | None]) -> None:
        self.pid, self._order = pid, order
        self.returncode: int | None = None
        self._asking = threading.Lock()  # a child's status can be read only once

    def poll(self) -> int | None:
        """Return the exit status, or the signal's number below zero, or None while it runs."""
        with self._asking:
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


class Launched:
    """A forked process with pipes: those methods and attributes of subprocess.Popen in use."""

    def __init__(
        self, fork: Callable[..., Child], streams: dict[str, int | None], text: bool
    ) -> None:
        self.stdin: Any = None
        self.stdout: Any = None
        self.stderr: Any = None
        theirs: dict[str, str | None] = {}
        ends: list[int] = []
        for name, stream in streams.items():
            if stream == subprocess.PIPE:
                pipe = os.pipe()
                ours, stream = pipe if name != "stdin" else reversed(pipe)
                mode = "w" if name == "stdin" else "r"
                setattr(
                    self,
                    name,
                    os.fdopen(
                        ours, mode if text else f"{mode}b", encoding="utf-8" if text else None
                    ),
                )
                ends.append(stream)
            if stream == subprocess.DEVNULL:
                theirs[name] = os.devnull
            else:  # the fork server opens the other end of a pipe, or a terminal, by its name
                theirs[name] = None if stream is None else f"/proc/{os.getpid()}/fd/{stream}"
        self._child = fork(**theirs)
        for end in ends:
            os.close(end)

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream:
                stream.close()
        self._child.wait(DEADLINE)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._child, name)

    def communicate(self, timeout: float) -> tuple[Any, Any]:
        """Close stdin, read both other streams to their end, wait, and return what was read."""
        if self.stdin and not self.stdin.closed:
            self.stdin.close()
        with ThreadPoolExecutor(2) as reading:
            seen = [
                reading.submit(stream.read) if stream else None
                for stream in (self.stdout, self.stderr)
            ]
            try:
                self._child.wait(timeout)
            finally:
                self._child.kill()
        written, messages = (future and future.result() for future in seen)
        for stream in filter(None, (self.stdout, self.stderr)):
            stream.close()
        return written, messages


COLD: list[str] = []  # as the command of a Process: start Python, do not fork


def limited(descriptors: int) -> str:
    """Return a statement that limits how many descriptors its process may have."""
    return f"resource.setrlimit(resource.RLIMIT_NOFILE, ({descriptors}, {descriptors}))"


def traced(*options: str) -> str:
    """Return a statement after which strace traces its process."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    return rf"""
import ctypes, subprocess
ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER: any process may
subprocess.Popen(["strace", "-f", "-q", *{options!r}, "-p", str(os.getpid())])
until = time.monotonic() + {DEADLINE}
while not re.search(r"TracerPid:\s[1-9]", Path("/proc/self/status").read_text()):
    assert time.monotonic() < until, "strace does not attach"
    time.sleep(0.005)
"""


class Process:
    """A taskd process in a directory: forked, unless a command is given to start it.

    A forked one can run a statement before it serves: with the names in taskd, and taskd itself.
    """

    def __init__(
        self,
        directory: Path,
        *,
        wait: bool = True,
        command: list[str] | None = None,
        before: str = "",
        **variables: str,
    ) -> None:
        if "MUTANT_UNDER_TEST" in os.environ:
            pytest.skip("a mutant lives in the process of the tests")
        defaults = {"BETTER_AUTH_SECRET": SECRET, "TASKD_PORT": "0"}
        if database.postgresql:
            defaults["DATABASE_URL"] = database.database_url(directory / "taskd.db")
        self.log_path = directory / f"stderr-{time.monotonic_ns()}.log"
        self.log_path.touch()
        variables = environment(**(defaults | variables))
        self.popen = self._start(command, directory, variables, before)
        self.port = self._wait_for_port() if wait else 0

    def _start(
        self, command: list[str] | None, directory: Path, variables: dict[str, str], before: str
    ) -> Child | subprocess.Popen[bytes]:
        if command is None:
            return ForkServer.of("taskd", environment()).fork(
                directory=directory,
                variables=variables,
                before=before,
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
        """Send one request on a new connection; a body that is not bytes is sent as JSON."""
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        ) as connection:
            return ask(connection, method, path, body, headers)

    def processor_time(self) -> float:
        """Return the seconds of processor time that the process has used, as the kernel counts."""
        fields = Path(f"/proc/{self.popen.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def terminate(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(DEADLINE)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(DEADLINE)

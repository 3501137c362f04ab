"""What taskd keeps when it is killed, when its database is locked, full, read-only or damaged.

TASKD_TEST_ROUNDS=100 makes the random tests go on for longer.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support import (
    DEADLINE,
    SECRET,
    Answer,
    Process,
    Wire,
    assert_problem,
    bearer,
    locked,
    sign,
    stored,
    token,
    traced,
    until,
    written,
)

pytestmark = pytest.mark.sqlite(
    "it is about SQLite's files, locks and disk; test_postgresql.py has its like"
)

ROUNDS = int(os.environ.get("TASKD_TEST_ROUNDS", "6"))
WRITERS = 8  # at work when taskd is killed
RESTART = 10  # seconds; it takes half of one
ANSWERED = 15  # seconds until a write is answered, even if another process holds the lock
EXIT = 10  # seconds that the contract gives taskd after SIGTERM
P99 = 1  # second for reads and rejections, even if another process holds the lock
TASKS = "/api/alice/tasks"

Start = Callable[..., Process]
Tasks = dict[int, tuple[str, bool]]


@pytest.fixture(autouse=True)
def _no_secret_in_any_log(tmp_path: Path) -> Iterator[None]:
    """Check that no fault made taskd log the secret, a token or a traceback."""
    yield
    for log in tmp_path.rglob("stderr-*.log"):
        text = log.read_text(errors="replace")
        assert SECRET not in text
        assert "eyJ" not in text, "that is how a token begins"
        assert "Traceback" not in text, text


def sound(database: Path) -> None:
    """Check a copy of the file; taskd itself must recover the original."""
    with tempfile.TemporaryDirectory() as copy:
        for file in database.parent.glob("taskd.db*"):
            if not file.name.endswith("-shm"):
                shutil.copy(file, copy)
        with contextlib.closing(sqlite3.connect(Path(copy) / database.name)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def assert_unavailable(answer: Answer) -> None:
    body = assert_problem(answer, 503)
    assert int(answer.headers["retry-after"]) > 0
    assert not [
        word for word in ("sqlite", "disk", "/", "SELECT", "INSERT") if word in body["detail"]
    ]


# --- kill -9 --------------------------------------------------------------------------------------


class Writer:
    """A client that changes tasks one after another, and remembers what was answered."""

    def __init__(self, user: str, chance: random.Random) -> None:
        self.user, self.chance, self.path = user, chance, f"/api/{user}/tasks"
        self.tasks: Tasks = {}
        self.acknowledged = self.count = 0
        self.asked: tuple[str, int, str] | None = (
            None  # the request without an answer: method, task, title
        )

    def work(self, server: Process) -> None:
        """Change tasks until the server is gone."""
        with contextlib.suppress(OSError, AssertionError), Wire(server) as wire:
            while True:
                self._change(wire)

    def _change(self, wire: Wire) -> None:
        self.count += 1
        method = (
            self.chance.choice(["POST", "POST", "PUT", "PATCH", "DELETE"]) if self.tasks else "POST"
        )
        task = self.chance.choice(sorted(self.tasks)) if method != "POST" else 0
        title = f"{self.user} {self.count} " + "x" * self.chance.randrange(150)
        path = self.path + (f"/{task}" if task else "") + ("/complete" if method == "PATCH" else "")
        self.asked = (method, task, title)
        wire.send(
            written(
                method,
                path,
                {"title": title} if method in ("POST", "PUT") else None,
                user=self.user,
            )
        )
        answer = wire.answer()
        if answer.status_code not in (200, 201):
            raise RuntimeError(f"{method} was answered {answer.status_code}: {answer.text}")
        self.tasks = self._then(answer.json["id"])
        self.asked = None
        self.acknowledged += 1

    def _then(self, key: int) -> Tasks:
        """Return the tasks after the last, unanswered request."""
        assert self.asked
        method, task, title = self.asked
        then = dict(self.tasks)
        if method == "POST":
            then[key] = (title, False)
        elif method == "PUT":
            then[task] = (title, then[task][1])
        elif method == "PATCH":
            then[task] = (then[task][0], not then[task][1])
        else:
            del then[task]
        return then

    def check(self, server: Process) -> None:
        """Check that each answered change is stored, and the other one wholly or not at all."""
        listed = server.request("GET", self.path, headers=bearer(self.user)).json
        found = {task["id"]: (task["title"], task["completed"]) for task in listed}
        expected = [self.tasks]
        if self.asked:
            new = set(found) - set(self.tasks)
            expected.append(self._then(max(new, default=0)))
        assert found in expected
        self.tasks, self.asked = found, None


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["fast", "slow"])
def test_whatever_was_answered_survives_kill_9(start: Start, tmp_path: Path, disk: str) -> None:
    slow = {"before": "taskd.SLOW_COMMIT = -1"}  # another thread commits
    options = slow if disk == "slow" else {}
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    writers = [Writer(f"user-{number}", random.Random(seed + number)) for number in range(WRITERS)]
    for _ in range(ROUNDS // 2):
        before = time.monotonic()
        server = start(**options)
        for writer in writers:
            writer.check(server)
        assert time.monotonic() - before < RESTART
        acknowledged = sum(writer.acknowledged for writer in writers)
        with ThreadPoolExecutor(WRITERS) as pool:
            working = [pool.submit(writer.work, server) for writer in writers]
            until(
                lambda: sum(one.acknowledged for one in writers) > acknowledged + 20,  # noqa: B023
                "they work",
            )
            time.sleep(chance.uniform(0, 0.4))
            server.kill()
        for work in working:
            work.result()
        sound(tmp_path / "taskd.db")
    server = start(**options)
    for writer in writers:
        writer.check(server)
    assert server.terminate() == 0
    sound(tmp_path / "taskd.db")


@pytest.mark.slow
def test_a_kill_during_the_very_first_start_does_no_harm(start: Start, tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance, early = random.Random(seed), 0
    for number in range(ROUNDS):
        directory = tmp_path / str(number)
        directory.mkdir()
        server = start(directory=directory, wait=False)
        moment = ("taskd.db", "taskd.db-journal", "taskd.db-wal", "")[number % 4]
        latest = time.monotonic() + (chance.uniform(0.2, 0.8) if moment else chance.uniform(0, 0.1))
        while time.monotonic() < latest and not (moment and (directory / moment).exists()):
            pass  # without a pause: the file may exist for a millisecond only
        time.sleep(chance.uniform(0, 0.003))
        server.kill()
        early += "listening" not in server.log
        if (directory / "taskd.db").exists():
            sound(directory / "taskd.db")
        again = start(directory=directory)
        task = again.request("POST", TASKS, {"title": "Buy milk"}, bearer()).json
        assert again.request("GET", TASKS, headers=bearer()).json == [task]
        assert again.terminate() == 0
    assert early, "some are killed before they serve"


def test_a_write_is_on_disk_before_it_is_answered(start: Start, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    calls = "trace=fsync,fdatasync,sendto,sendmsg,write,writev"
    server = start(before=traced("-y", "-s", "16", "-o", str(trace), "-e", calls))
    with Wire(server) as wire:
        for key in (1, 2, 3):
            for method, path, body in (
                ("POST", "", {"title": "Buy milk"}),
                ("PUT", f"/{key}", {"title": "Buy tea"}),
                ("PATCH", f"/{key}/complete", None),
                ("DELETE", f"/{key}", None),
            ):
                answer = wire.send(written(method, TASKS + path, body, user="alice")).answer()
                assert answer.status_code in (200, 201), answer.text
        with locked(tmp_path / "taskd.db"):  # the same in a worker thread
            wire.send(written("POST", TASKS, {"title": "later"}, user="alice"))
            time.sleep(0.3)
        assert wire.answer().status_code == 201
    assert server.terminate() == 0
    until(lambda: "exited with 0" in trace.read_text(), "strace has written everything")
    answered, synced = 0, False
    for line in trace.read_text().splitlines():
        if re.search(
            r"f(data)?sync\([0-9]+<[^>]*taskd\.db-wal>\) += 0|<\.\.\. f(data)?sync resumed>.* = 0",
            line,
        ):
            synced = True
        elif re.search(r'(send|write)\S*\(.*"HTTP/1.1 20', line):
            assert synced, f"answer {answered} went out before the log was on disk: {line}"
            answered, synced = answered + 1, False
    assert answered == 13


# --- The write lock is elsewhere ------------------------------------------------------------------


def keep_asking(
    server: Process, headers: dict[str, str], status: int, ended: threading.Event, pause: float
) -> list[float]:
    """Request the list again and again, and return the seconds of each answer."""
    taken = []
    while not ended.is_set():
        started = time.monotonic()
        assert server.request("GET", TASKS, headers=headers).status_code == status
        taken.append(time.monotonic() - started)
        ended.wait(pause)
    return sorted(taken)


def write(server: Process, number: int) -> tuple[Answer, float]:
    started = time.monotonic()
    answer = server.request(
        "POST", TASKS, {"title": f"Buy milk {number}"}, bearer(), timeout=2 * DEADLINE
    )
    return answer, time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [2, 12])
def test_a_lock_held_elsewhere_delays_writes_alone(
    start: Start, tmp_path: Path, seconds: int
) -> None:
    server, ended = start(), threading.Event()
    write(server, 0)
    with ThreadPoolExecutor(20) as pool:
        with locked(tmp_path / "taskd.db"):
            writes = [pool.submit(write, server, number) for number in range(1, 17)]
            pause = seconds / 400  # some hundred requests, however long the lock is held
            reads = pool.submit(keep_asking, server, bearer(), 200, ended, pause)
            nonsense = {"Authorization": "Bearer nonsense"}
            refusals = pool.submit(keep_asking, server, nonsense, 401, ended, pause)
            time.sleep(seconds)
        done = [work.result() for work in writes]
        ended.set()
        for taken in (reads.result(), refusals.result()):
            assert len(taken) > 100
            assert taken[len(taken) * 99 // 100] < P99
    assert max(took for _, took in done) < ANSWERED
    answers = [answer for answer, _ in done]
    assert Counter(answer.status_code for answer in answers).keys() <= {201, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert_unavailable(answer)
    made = {
        answer.json["id"]: answer.json["title"] for answer in answers if answer.status_code == 201
    }
    kept = {key: task["title"] for key, task in stored(tmp_path / "taskd.db").items()}
    assert kept == made | {1: "Buy milk 0"}
    if seconds < 4:
        assert len(made) >= 8, "a write waits for a lock as short as this"
    answer, took = write(server, 99)
    assert (answer.status_code, took < 1) == (201, True)


@pytest.mark.slow
def test_sigterm_while_the_lock_is_held_elsewhere_still_answers_every_write_and_ends(
    start: Start, tmp_path: Path
) -> None:
    server = start(TASKD_THREADS="4")
    write(server, 0)
    wires = [Wire(server, timeout=2 * DEADLINE) for _ in range(24)]
    with locked(tmp_path / "taskd.db"):
        for wire in wires:
            wire.send(written("POST", TASKS, {"title": "Buy milk"}, user="alice"))
        server.popen.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        answers = [wire.answer() for wire in wires]
        assert server.popen.wait(DEADLINE) == 0
        assert time.monotonic() - asked < EXIT + 0.5
    for answer in answers:
        assert_unavailable(answer)
    for wire in wires:
        wire.close()
    assert list(stored(tmp_path / "taskd.db")) == [1]


def test_sigterm_does_not_wait_for_a_client_that_does_not_read(start: Start) -> None:
    server = start()
    for number in range(60):
        task = {"title": f"Dig {number}", "description": "€" * 10_000}
        assert server.request("POST", TASKS, task, bearer()).status_code == 201
    with Wire(server, receive_buffer=4096) as wire:
        wire.send(written("GET", TASKS, user="alice"))
        until(lambda: "GET /api" in server.log, "it has been answered")
        asked = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - asked < EXIT + 0.5


def test_a_lock_held_elsewhere_at_the_start_does_not_stop_it(start: Start, tmp_path: Path) -> None:
    first = start()
    task = first.request("POST", TASKS, {"title": "Buy milk"}, bearer()).json
    assert first.terminate() == 0
    with locked(tmp_path / "taskd.db"):
        second = start()
        assert second.request("GET", TASKS, headers=bearer()).json == [task]
    assert second.request("POST", TASKS, {"title": "Buy tea"}, bearer()).status_code == 201


@pytest.mark.slow
def test_a_lock_held_elsewhere_before_the_first_request_stops_no_read(
    start: Start, tmp_path: Path
) -> None:
    server = start()
    with locked(tmp_path / "taskd.db"):
        answer = server.request("GET", TASKS, headers=bearer())
        assert (answer.status_code, answer.text) == (200, "[]")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(write, server, 1)
            time.sleep(0.5)
            assert not waiting.done(), "a write waits for a lock before it gives up"
    assert server.request("GET", TASKS, headers=bearer()).status_code == 200


# --- The disk is full, read-only, broken ----------------------------------------------------------


def refuses_writes(server: Process, made: list[int]) -> None:
    """Write until the fault has an effect, and check that it is a 503, and that reads succeed."""
    deadline, refused = time.monotonic() + DEADLINE, 0
    while refused < 5:
        assert time.monotonic() < deadline, "the fault does not show"
        answer = server.request(
            "POST", TASKS, {"title": "Buy milk", "description": "x" * 10_000}, bearer()
        )
        if answer.status_code == 201:
            made.append(answer.json["id"])
            continue
        assert_unavailable(answer)
        refused += 1
        listed = server.request("GET", TASKS, headers=bearer())
        assert listed.status_code == 200, listed.text
        assert [task["id"] for task in listed.json] == made
        one = server.request("GET", f"{TASKS}/{made[0]}", headers=bearer())
        assert one.json == listed.json[0]
        assert_problem(server.request("GET", TASKS), 401)
    for method, path, body in (("PUT", "", {"title": "x" * 200}), ("PATCH", "/complete", None)):
        answer = server.request(method, f"{TASKS}/{made[0]}{path}", body, bearer())
        assert answer.status_code in (200, 503), answer.text


def recovers(server: Process, made: list[int]) -> None:
    """Check that writes succeed again without a restart, and that a restart finds the same."""
    tea = {"title": "Buy tea"}
    until(
        lambda: server.request("POST", TASKS, tea, bearer()).status_code == 201,
        "writes work again",
        5,
    )
    listed = server.request("GET", TASKS, headers=bearer()).json
    assert [task["id"] for task in listed][: len(made)] == made


def few_tasks(server: Process) -> list[int]:
    made = []
    for _ in range(20):
        answer = server.request(
            "POST", TASKS, {"title": "Buy milk", "description": "x" * 10_000}, bearer()
        )
        made.append(answer.json["id"])
    return made


def test_a_file_that_may_not_grow_is_503_until_it_may(start: Start, tmp_path: Path) -> None:
    server = start()
    made = few_tasks(server)
    size = max(path.stat().st_size for path in tmp_path.glob("taskd.db*"))
    _, most = resource.prlimit(server.popen.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.popen.pid, resource.RLIMIT_FSIZE, (size, most))
    refuses_writes(server, made)
    resource.prlimit(server.popen.pid, resource.RLIMIT_FSIZE, (most, most))
    recovers(server, made)
    server.kill()
    sound(tmp_path / "taskd.db")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Give a separate file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if (
        not shutil.which("mount")
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting a small file system is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_503_until_there_is_room(
    start: Start, tmp_path: Path, small_disk: Path
) -> None:
    server = start(DATABASE_URL=f"sqlite:///{small_disk}/taskd.db")
    made = few_tasks(server)
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
    refuses_writes(server, made)
    ballast.unlink()
    recovers(server, made)
    server.kill()
    sound(small_disk / "taskd.db")
    again = start(DATABASE_URL=f"sqlite:///{small_disk}/taskd.db")
    assert [task["id"] for task in again.request("GET", TASKS, headers=bearer()).json][
        : len(made)
    ] == made
    assert again.terminate() == 0


@contextlib.contextmanager
def failing(server: Process, calls: str, error: str) -> Iterator[None]:
    """Let system calls of a running taskd fail, as those of a broken or read-only disk do."""
    faults = ["-e", f"trace={calls}", "-e", f"inject={calls}:error={error}"]
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-o", os.devnull, *faults, "-p", str(server.popen.pid)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    status = Path(f"/proc/{server.popen.pid}/task")

    def attached() -> bool:
        if tracer.poll() is not None:
            pytest.skip("strace may not attach to a process here")
        return all(
            "TracerPid:\t0" not in (task / "status").read_text() for task in status.iterdir()
        )

    try:
        until(attached, "strace is attached to every thread")
        yield
    finally:
        tracer.terminate()
        tracer.wait(DEADLINE)


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.parametrize(
    ("calls", "error"),
    [
        ("pwrite64", "ENOSPC"),
        ("pwrite64", "EROFS"),
        ("pwrite64", "EIO"),
        ("pwrite64", "EDQUOT"),
        ("fsync,fdatasync", "EIO"),
    ],
)
def test_a_disk_that_fails_is_503_and_taskd_recovers(
    start: Start, tmp_path: Path, calls: str, error: str
) -> None:
    server = start()
    made = few_tasks(server)
    with failing(server, calls, error):
        for _ in range(5):
            answer = server.request(
                "POST", TASKS, {"title": "Buy milk", "description": "x" * 10_000}, bearer()
            )
            assert_unavailable(answer)
            listed = server.request("GET", TASKS, headers=bearer())
            assert listed.status_code == 200, listed.text
            keys = [task["id"] for task in listed.json]
            assert keys[: len(made)] == made
            # A commit that was written but not synced may be there or not.
            if "sync" not in calls:
                assert keys == made
            assert_problem(server.request("GET", TASKS), 401)
    recovers(server, made)
    listed = server.request("GET", TASKS, headers=bearer()).json
    server.kill()
    sound(tmp_path / "taskd.db")
    again = start().request("GET", TASKS, headers=bearer()).json
    assert [task for task in again if task["title"] == "Buy tea"] == [
        task for task in listed if task["title"] == "Buy tea"
    ]
    assert [task["id"] for task in again][: len(made)] == made


DAMAGE = [
    ("zeros in every page but the first", b"\0", 4096),
    ("ones in every page but the first", b"\xff", 4096),
    ("zeros in the whole file", b"\0", 0),
    ("text in the whole file", b"x", 0),
    ("the second half cut off", b"", 4096),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("filling", "kept"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE]
)
def test_a_database_that_is_damaged_is_503_or_correct_and_never_500(
    start: Start, tmp_path: Path, filling: bytes, kept: int
) -> None:
    server = start()
    tasks = {}
    for number in range(60):
        body = {"title": f"Buy milk {number}", "description": "x" * 2000}
        task = server.request("POST", TASKS, body, bearer()).json
        tasks[task["id"]] = task
    database = tmp_path / "taskd.db"
    with contextlib.closing(sqlite3.connect(database, timeout=DEADLINE)) as connection:
        assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
    with database.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if filling:
            file.seek(kept)
            file.write(filling * (size - kept))
        else:
            file.truncate(size // 2 // kept * kept)
    new = {"title": "Buy tea", "description": "y" * 9000}
    with ThreadPoolExecutor(8) as pool:  # so that every thread's connection is tried
        answers = list(pool.map(lambda _: server.request("POST", TASKS, new, bearer()), range(24)))
        lists = list(pool.map(lambda _: server.request("GET", TASKS, headers=bearer()), range(8)))
    for answer in answers:
        assert answer.status_code in (201, 503), answer.text
        if answer.status_code == 503:
            assert_unavailable(answer)
    for answer in lists:
        assert answer.status_code in (200, 503), answer.text
        if answer.status_code == 200:
            assert [task for task in answer.json if task["title"] != "Buy tea"] == list(
                tasks.values()
            )
    for key, task in tasks.items():
        answer = server.request("GET", f"{TASKS}/{key}", headers=bearer())
        assert answer.status_code in (200, 503), answer.text
        if answer.status_code == 200:
            assert answer.json == task
    for method, path, changes in (
        ("PUT", "/2", new),
        ("PATCH", "/3/complete", None),
        ("DELETE", "/4", None),
    ):
        answer = server.request(method, TASKS + path, changes, bearer())
        assert answer.status_code in (200, 503), answer.text
    assert server.request("GET", "/healthz").status_code == 200
    assert server.terminate() == 0


def test_tokens_are_checked_as_usual_while_the_database_is_away(
    start: Start, tmp_path: Path
) -> None:
    server = start()
    with locked(tmp_path / "taskd.db"):
        for sent, status in (
            (token("alice", exp=1), 401),
            (sign({"alg": "none"}, {"sub": "alice", "exp": time.time() + 60}), 401),
            (token("bob"), 403),
        ):
            headers = {"Authorization": f"Bearer {sent}"}
            assert_problem(server.request("POST", TASKS, {"title": "Buy milk"}, headers), status)

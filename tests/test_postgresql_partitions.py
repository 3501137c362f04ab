"""Two taskd, each with a database of its own, behind an nginx that chooses one by the user."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

import taskd
from cluster import free_port
from support import DEADLINE, Answer, Process, assert_problem, bearer, database_url, sql, until
from support import ask as send
from test_postgresql import run

pytestmark = [
    pytest.mark.postgresql,
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed here"),
]

Start = Callable[..., Process]
SECOND = 1_000_000_000_000_000  # ids of the second partition begin here
RANGES = {"one": (1, SECOND - 1), "two": (SECOND, 2 * SECOND - 1)}
# As in docs/scaling.md. "$uri" is decoded, so that /api/%61lice is Alice's partition too.
CONFIGURATION = """
{user} daemon off; pid {home}/pid; error_log stderr; events {{}}
http {{
    access_log off; {temporary}
    map $uri $taskd_user {{ "~^/api/(?<name>[^/]+)" $name; }}
    split_clients $taskd_user $taskd_hash {{ 50% one; * two; }}
    map $taskd_user $taskd_partition {{
        default $taskd_hash;
        {moved}
    }}
    upstream one {{ server 127.0.0.1:{one}; }}
    upstream two {{ server 127.0.0.1:{two}; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            if ($taskd_partition = moving) {{ return 503; }}
            proxy_pass http://$taskd_partition;
        }}
        error_page 503 /moving;
        location = /moving {{
            internal;
            default_type application/problem+json;
            add_header Retry-After 2 always;
            return 503 '{{"title":"503 Service Unavailable","status":503,
                "detail":"the tasks of this user are being moved; try again"}}';
        }}
    }}
}}
"""


class Partitions:
    """Two taskd with a database each, and the proxy before them."""

    def __init__(self, start: Start, directory: Path) -> None:
        self.home, self.port, self.moved = directory, free_port(), dict[str, str]()
        self.files = {name: directory / f"{name}.db" for name in ("one", "two")}
        self.taskd = {
            name: start(DATABASE_URL=database_url(file)) for name, file in self.files.items()
        }
        for name, (first, last) in RANGES.items():
            alter = "ALTER SEQUENCE task_id_seq MINVALUE {0} MAXVALUE {1} START {0} RESTART"
            sql(self.files[name], alter.format(first, last))
        self._write()
        command = ["nginx", "-p", str(directory), "-e", "stderr", "-c", str(directory / "conf")]
        with (directory / "proxy.log").open("wb") as log:
            self.nginx = subprocess.Popen(
                ["setpriv", "--pdeathsig=TERM", *command], stdout=log, stderr=log
            )
        until(lambda: self._serves() or self.nginx.poll() is not None, "nginx serves")
        assert self.nginx.poll() is None, (directory / "proxy.log").read_text()

    def _write(self) -> None:
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        text = CONFIGURATION.format(
            user="user root;" if os.geteuid() == 0 else "",
            home=self.home,
            temporary=" ".join(f"{kind}_temp_path {self.home}/{kind};" for kind in kinds),
            moved=" ".join(f'"{user}" {place};' for user, place in self.moved.items()),
            port=self.port,
            **{name: server.port for name, server in self.taskd.items()},
        )
        (self.home / "conf").write_text(text)

    def _serves(self) -> bool:
        try:
            return self.request("GET", "/healthz").status_code == 200
        except OSError:
            return False

    def request(self, method: str, path: str, body: object = None, user: str = "") -> Answer:
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)) as connection:
            return send(connection, method, path, body, bearer(user) if user else None)

    def create(self, user: str, title: str) -> dict[str, Any]:
        answer = self.request("POST", f"/api/{user}/tasks", {"title": title}, user)
        assert answer.status_code == 201, answer.text
        task: dict[str, Any] = answer.json
        return task

    def listed(self, user: str) -> Any:
        return self.request("GET", f"/api/{user}/tasks", user=user).json

    def send_to(self, user: str, place: str) -> None:
        """Let nginx send this user's requests to a partition, or answer 503 while it is moved."""
        self.moved[user] = place
        self._write()
        before = self._workers()
        self.nginx.send_signal(signal.SIGHUP)
        # The workers with the old configuration first answer the requests that they have.
        until(lambda: not before & self._workers(), "the old workers have ended")
        until(self._workers, "the new ones have started")

    def _workers(self) -> set[str]:
        pid = self.nginx.pid
        return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())

    def taskctl(self, place: str, *arguments: str) -> str:
        ended = run(self.home, "taskctl", *arguments, DATABASE_URL=database_url(self.files[place]))
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def move(self, user: str, source: str, target: str) -> None:
        """Move a user as docs/scaling.md says."""
        self.send_to(user, "moving")
        answer = self.request("POST", f"/api/{user}/tasks", {"title": "x"}, user)
        assert_problem(answer, 503)
        assert answer.headers["retry-after"] == "2"
        (self.home / "moving.jsonl").write_text(self.taskctl(source, "export", user))
        self.taskctl(target, "import", "moving.jsonl")
        self.send_to(user, target)
        self.taskctl(source, "purge", user, "--yes")


@pytest.fixture
def partitions(start: Start, tmp_path: Path) -> Iterator[Partitions]:
    partitions = Partitions(start, tmp_path)
    yield partitions
    partitions.nginx.terminate()
    partitions.nginx.wait(DEADLINE)


def owners(partitions: Partitions, place: str) -> set[str]:
    return {user for (user,) in sql(partitions.files[place], "SELECT user_id FROM task")}


def test_the_user_in_the_path_chooses_the_partition_however_it_is_spelled(
    partitions: Partitions,
) -> None:
    users = [f"user{number}" for number in range(12)]
    created = {user: partitions.create(user, user) for user in users}
    one, two = owners(partitions, "one"), owners(partitions, "two")
    assert one | two == set(users)
    assert one
    assert two
    assert not one & two
    assert {task["id"] >= SECOND for user, task in created.items() if user in two} == {True}
    assert {task["id"] < SECOND for user, task in created.items() if user in one} == {True}
    for user in users:
        assert partitions.listed(user) == [created[user]]
        spelled = f"/api/%{ord('u'):x}{user[1:]}/tasks"
        assert partitions.request("GET", spelled, user=user).json == [created[user]]
        answer = partitions.request("GET", f"/api/{user}/tasks", user="mallory")
        assert_problem(answer, 403)


def test_a_user_moves_to_the_other_partition_and_back_with_ids_and_times(
    partitions: Partitions,
) -> None:
    partitions.moved |= {"alice": "one", "bob": "two"}
    partitions.send_to("alice", "one")
    tasks = [partitions.create("alice", f"Task {number}") for number in range(3)]
    partitions.create("bob", "Bob's")
    path = f"/api/alice/tasks/{tasks[1]['id']}"
    partitions.request("PATCH", f"{path}/complete", user="alice")
    before = partitions.listed("alice")
    first = partitions.request("GET", "/api/alice/tasks?limit=1", user="alice")
    page = first.headers["link"].partition("<")[2].partition(">")[0]
    assert partitions.request("GET", page, user="alice").json == before[1:2]
    partitions.move("alice", "one", "two")
    assert partitions.listed("alice") == before
    after = partitions.request("GET", page, user="alice")
    assert after.status_code == 422, "a cursor is of one partition: the client begins again"
    assert (owners(partitions, "one"), owners(partitions, "two")) == (set(), {"alice", "bob"})
    there = partitions.create("alice", "made in the second one")
    assert there["id"] >= SECOND
    partitions.move("alice", "two", "one")
    assert partitions.listed("alice") == [*before, there]
    here = partitions.create("alice", "made in the first one again")
    assert tasks[-1]["id"] < here["id"] < SECOND, "its sequence has kept to its own range"
    assert partitions.create("bob", "again")["id"] > there["id"]
    assert partitions.request("PATCH", f"{path}/complete", user="alice").json["completed"] is False


def test_an_import_raises_the_sequence_only_by_ids_of_its_own_range(partitions: Partitions) -> None:
    task = partitions.create("alice", "x") | {"user_id": "carol"}
    moved = [{**task, "id": key} for key in (40, SECOND - 1, SECOND + 40, 3 * SECOND)]
    lines = b"".join(taskd.to_json(each) + b"\n" for each in moved)
    (partitions.home / "moved.jsonl").write_bytes(lines)
    partitions.moved["carol"] = "two"
    partitions.taskctl("two", "import", "moved.jsonl")
    partitions.send_to("carol", "two")
    assert partitions.listed("carol") == moved
    assert partitions.create("carol", "new")["id"] == SECOND + 41
    partitions.taskctl("two", "import", "moved.jsonl")
    assert partitions.create("carol", "newer")["id"] == SECOND + 42

"""The servers that are compared: their start, their guarantees, and the same requests for each."""

from __future__ import annotations

import http.client
import os
import secrets
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jwt

from common import BENCH, HOST, ROOT, Answer, Request, Server, environment, free_port, require

SECRET = secrets.token_urlsafe(32)
TASKS = 20  # of each reader
READERS = [f"reader-{number}" for number in range(16)]
# Only their lists grow; those of the readers stay as they are.
WRITERS = [f"writer-{number}" for number in range(16)]
DAY = 86_400  # seconds
READS, WRITES = ("list", "get"), ("create", "toggle")
REFUSALS = ("401", "401 without a token")
OPERATIONS = READS + WRITES + REFUSALS


def task_title(number: int) -> str:
    return f"Task {number} of {TASKS}: water the plants"


def sign(user: str) -> str:
    now = int(time.time())
    claims = {
        "sub": user,
        "iat": now,
        "exp": now + DAY,
        "email": f"{user}@example.com",
        "name": user,
    }
    return jwt.encode(claims, SECRET, "HS256")


def tampered(token: str) -> str:
    """Return the token with another signature."""
    head, _, signature = token.rpartition(".")
    return f"{head}.{'A' if signature[0] != 'A' else 'B'}{signature[1:]}"


class Peer:
    """A server whose routes are taskd's."""

    name: str
    title: str
    runs_as: str
    durability = "every commit (SQLite in WAL, synchronous=FULL)"
    health = "/healthz"

    def __init__(self, directory: Path) -> None:
        self.directory = directory / self.name
        self.directory.mkdir(exist_ok=True)
        self.port = free_port()
        self.ids: dict[str, list[Any]] = {}
        self.tokens: dict[str, str] = {}

    @property
    def ports(self) -> list[int]:
        """The ports for requests; each connection stays with one of them."""
        return [self.port]

    def prepare(self, running: ExitStack) -> None:
        """Start the other servers that this one needs; `running` stops them."""

    def start(self) -> Server:
        return Server(self.command(), self.directory, self.port, **self.variables())

    def command(self) -> list[str]:
        raise NotImplementedError

    def variables(self) -> dict[str, str]:
        return {
            "BETTER_AUTH_SECRET": SECRET,
            "DATABASE_URL": f"sqlite:///{self.directory}/taskd.db",
            "TASKD_PORT": str(self.port),
            "PYTHONPATH": str(ROOT),
        }

    def fill(self) -> None:
        """Make the users, and the readers' tasks."""
        self.tokens = {user: sign(user) for user in READERS + WRITERS}
        for user in READERS:
            self.ids[user] = [
                self.ask(self.create(user, task_title(number)))["id"] for number in range(TASKS)
            ]

    def send(self, request: Request) -> Answer:
        try:
            return request.send(self.port)
        except (OSError, http.client.HTTPException) as ex:
            sys.exit(f"bench: {self.name}: {request.method} {request.path}: {ex}")

    def ask(self, request: Request) -> Any:
        """Return the answer to a request that must succeed."""
        answer = self.send(request)
        require(
            answer.status in (200, 201), f"{self.name}: {request.method} {request.path}: {answer}"
        )
        return answer.json

    def list(self, user: str) -> Request:
        return Request("GET", f"/api/{user}/tasks", self.tokens[user])

    def get(self, user: str, task: Any, as_user: str | None = None) -> Request:
        return Request("GET", f"/api/{user}/tasks/{task}", self.tokens[as_user or user])

    def create(self, user: str, name: str) -> Request:
        return Request("POST", f"/api/{user}/tasks", self.tokens[user], {"title": name})

    def toggle(self, user: str, task: Any, completed: bool) -> Request:
        """Return the request that changes `completed` to the opposite of this."""
        return Request("PATCH", f"/api/{user}/tasks/{task}/complete", self.tokens[user])

    def refused(self, user: str, token: str) -> Request:
        return Request("GET", f"/api/{user}/tasks", token)

    def tasks(self, answer: Answer) -> list[dict[str, Any]]:
        """Return the tasks of an answer to `list`."""
        found: list[dict[str, Any]] = answer.json
        return found


class Bare(Peer):
    """No work: two bytes for every request."""

    name = "bare"
    title = "bare waitress"
    runs_as = "two bytes from waitress 3, its defaults, its queue warnings off"
    durability = "stores nothing"

    def command(self) -> list[str]:
        return [sys.executable, str(BENCH / "bare_app.py"), str(self.port)]

    def fill(self) -> None:
        self.tokens = {user: sign(user) for user in READERS + WRITERS}
        self.ids = {user: list(range(1, TASKS + 1)) for user in READERS}


class Taskd(Peer):
    name = "taskd"
    title = "taskd"
    runs_as = "python taskd.py, its defaults"

    def command(self) -> list[str]:
        return [sys.executable, str(ROOT / "taskd.py")]


class SlowDisk(Taskd):
    """taskd on a disk whose flush takes 5 ms longer: strace delays it."""

    name = "slow-disk"
    title = "taskd, slow disk"
    runs_as = "strace -f -e inject=fsync,fdatasync:delay_exit=5000 python taskd.py"
    durability = "every commit (SQLite in WAL, synchronous=FULL), 5 ms later"

    def command(self) -> list[str]:
        strace, *options = self.runs_as.split()[:-2]
        options += ["--seccomp-bpf", "-e", "trace=fsync,fdatasync", "-D", "-o", os.devnull]
        return [strace, *options, *super().command()]


class Granian(Peer):
    name = "granian"
    title = "taskd, Granian"
    workers = 1
    # One blocking thread reads fastest, because more threads compete for the interpreter's lock;
    # but a write that waits for the database then delays every request.
    threads = 1

    @property
    def runs_as(self) -> str:
        options = f"--workers {self.workers} --blocking-threads {self.threads}"
        return f"granian --interface wsgi --factory {options} taskd:wsgi"

    def command(self) -> list[str]:
        return [
            sys.executable,
            "-m",
            *self.runs_as.split(),
            "--host",
            HOST,
            "--port",
            str(self.port),
        ]


class Gunicorn(Peer):
    """Two processes on one SQLite file."""

    name = "gunicorn"
    title = "taskd, gunicorn"
    runs_as = "gunicorn --workers 2 --threads 8 taskd:wsgi()"

    def command(self) -> list[str]:
        program, *options = self.runs_as.split()
        return [sys.executable, "-m", program, "--bind", f"{HOST}:{self.port}", *options]


class Postgres(Taskd):
    """taskd on its own PostgreSQL server, with that server's defaults."""

    name = "postgresql"
    title = "taskd, PostgreSQL"
    runs_as = "python taskd.py, with DATABASE_URL=postgresql://…"
    durability = "every commit (PostgreSQL, synchronous_commit=on, its default)"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.database_port = free_port()

    def prepare(self, running: ExitStack) -> None:
        # PostgreSQL does not run as root, and its user needs access to its directory.
        as_user = (
            ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
            if os.geteuid() == 0
            else []
        )
        data = self.directory / "data"
        data.mkdir()
        if as_user:
            shutil.chown(data, "postgres")
            for place in (self.directory, self.directory.parent):
                place.chmod(0o755)
        options = ["-A", "trust", "-U", "taskd", "-E", "UTF8", "--locale=C.UTF-8", "-D", str(data)]
        subprocess.run(
            [*as_user, postgresql("initdb"), *options], cwd="/", check=True, capture_output=True
        )
        where = ["-p", str(self.database_port), "-c", "unix_socket_directories=", "-D", str(data)]
        server = Server([*as_user, postgresql("postgres"), *where], Path("/"), self.database_port)
        running.callback(server.stop)
        subprocess.run(
            [sys.executable, "-c", UNTIL_IT_ANSWERS], check=True, env=environment(self.variables())
        )

    def variables(self) -> dict[str, str]:
        url = f"postgresql://taskd@{HOST}:{self.database_port}/postgres"
        path = f"{ROOT}{os.pathsep}{DRIVER}"
        return super().variables() | {"DATABASE_URL": url, "PYTHONPATH": path}


class PostgresPinned(Postgres):
    """The same, which may use only one processor."""

    name = "postgresql-pinned"
    title = "taskd, PostgreSQL, pinned"
    runs_as = "the same with taskset -c 0"

    def command(self) -> list[str]:
        return ["taskset", "-c", str(min(os.sched_getaffinity(0))), *super().command()]


class PostgresPair(Postgres):
    """Two taskd processes, each with half of the connections."""

    name = "postgresql-2"
    title = "two taskd, PostgreSQL"
    runs_as = "the same, and another"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.second_port = free_port()

    @property
    def ports(self) -> list[int]:
        return [self.port, self.second_port]

    def prepare(self, running: ExitStack) -> None:
        super().prepare(running)
        variables = self.variables() | {"TASKD_PORT": str(self.second_port)}
        second = Server(self.command(), self.directory, self.second_port, **variables)
        running.callback(second.stop)
        second.wait(self.health)


class PostgresGranian(Granian, Postgres):  # type: ignore[misc]
    """Two taskd processes that Granian starts, on all processors."""

    name = "postgresql-granian"
    title = "Granian, PostgreSQL"
    workers, threads = 2, 4


# psycopg is kept apart: Peewee imports it if it is installed, which would make taskd on SQLite
# larger.
DRIVER = Path(sys.prefix) / "postgresql"
UNTIL_IT_ANSWERS = """
import os, psycopg, time
while True:
    try:
        psycopg.connect(os.environ["DATABASE_URL"]).close()
        break
    except psycopg.OperationalError:
        time.sleep(0.1)
"""


def postgresql(program: str) -> str:
    """Return the path of a program of PostgreSQL, which Debian keeps out of PATH, or ""."""
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
    return shutil.which(program) or (str(installed[-1]) if installed else "")


class FastAPI(Peer):
    name = "fastapi"
    title = "FastAPI + SQLModel"
    runs_as = "uvicorn, 1 process, uvloop, httptools; a session per request, plain functions"
    durability = "every commit (SQLite in WAL, synchronous=FULL, its default)"
    health = "/openapi.json"

    def command(self) -> list[str]:
        speed = ["--loop", "uvloop", "--http", "httptools"]
        where = ["--app-dir", str(BENCH), "--host", HOST, "--port", str(self.port)]
        return [sys.executable, "-m", "uvicorn", "sqlmodel_app:app", *speed, *where]


ADMIN = {"identity": "admin@example.com", "password": SECRET}


class PocketBase(Peer):
    """A collection `tasks` in which users see their own. PocketBase makes the ids and tokens."""

    name = "pocketbase"
    title = "PocketBase"
    runs_as = (
        "pocketbase serve, its defaults; list without counting, by @rowid; 401 from auth-refresh"
    )
    durability = (
        "not the last commits before a power cut (SQLite in WAL, synchronous=NORMAL, its default)"
    )
    health = "/api/health"
    program = str(Path(sys.executable).with_name("pocketbase"))

    def command(self) -> list[str]:
        return [
            self.program,
            "serve",
            "--http",
            f"{HOST}:{self.port}",
            "--dir",
            str(self.directory / "data"),
        ]

    def start(self) -> Server:
        command = [
            self.program,
            "superuser",
            "upsert",
            *ADMIN.values(),
            "--dir",
            str(self.directory / "data"),
        ]
        subprocess.run(command, cwd=self.directory, check=True, capture_output=True)
        return super().start()

    def variables(self) -> dict[str, str]:
        return {}

    def fill(self) -> None:
        admin = self._login("_superusers", ADMIN)["token"]
        users = self.ask(Request("GET", "/api/collections/users", admin))["id"]
        self.ask(Request("POST", "/api/collections", admin, self._collection(users)))
        self.owners: dict[str, str] = {}
        for user in READERS + WRITERS:
            self._add_user(user)
        for user in READERS:
            self.ids[user] = [
                self.ask(self.create(user, task_title(number)))["id"] for number in range(TASKS)
            ]

    def _login(self, collection: str, who: dict[str, str]) -> dict[str, Any]:
        found: dict[str, Any] = self.ask(
            Request("POST", f"/api/collections/{collection}/auth-with-password", body=who)
        )
        return found

    def _add_user(self, user: str) -> None:
        email = f"{user}@example.com"
        new = {"email": email, "password": SECRET, "passwordConfirm": SECRET}
        self.owners[user] = self.ask(Request("POST", "/api/collections/users/records", body=new))[
            "id"
        ]
        self.tokens[user] = self._login("users", {"identity": email, "password": SECRET})["token"]

    def _collection(self, users: str) -> dict[str, Any]:
        mine = "owner = @request.auth.id"
        owner = {
            "type": "relation",
            "collectionId": users,
            "maxSelect": 1,
            "required": True,
            "cascadeDelete": True,
        }
        return {
            "name": "tasks",
            "type": "base",
            "fields": [
                {"name": "owner", **owner},
                {"name": "title", "type": "text", "required": True, "max": 200},
                {"name": "description", "type": "text", "max": 10_000},
                {"name": "completed", "type": "bool"},
                {"name": "created", "type": "autodate", "onCreate": True},
                {"name": "updated", "type": "autodate", "onCreate": True, "onUpdate": True},
            ],
            "indexes": ["CREATE INDEX tasks_owner ON tasks (owner)"],
            **{f"{what}Rule": mine for what in ("list", "view", "create", "update", "delete")},
        }

    def list(self, user: str) -> Request:
        return Request(
            "GET", "/api/collections/tasks/records?sort=@rowid&skipTotal=1", self.tokens[user]
        )

    def get(self, user: str, task: Any, as_user: str | None = None) -> Request:
        return Request(
            "GET", f"/api/collections/tasks/records/{task}", self.tokens[as_user or user]
        )

    def create(self, user: str, name: str) -> Request:
        new = {"title": name, "owner": self.owners[user]}
        return Request("POST", "/api/collections/tasks/records", self.tokens[user], new)

    def toggle(self, user: str, task: Any, completed: bool) -> Request:
        path = f"/api/collections/tasks/records/{task}"
        return Request("PATCH", path, self.tokens[user], {"completed": completed})

    def refused(self, user: str, token: str) -> Request:
        return Request("POST", "/api/collections/users/auth-refresh", token)

    def tasks(self, answer: Answer) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = answer.json["items"]
        return found


PEERS: list[type[Peer]] = [Bare, Taskd, Granian, Gunicorn, FastAPI, PocketBase]
if shutil.which("strace"):
    PEERS += [SlowDisk]
if postgresql("initdb"):
    PEERS += [Postgres, PostgresPinned, PostgresPair, PostgresGranian]


def start(peer: Peer, running: ExitStack) -> Server:
    """Start the peer, fill it and check its answers; `running` stops it."""
    peer.prepare(running)
    server = peer.start()
    running.callback(server.stop)
    server.wait(peer.health)
    peer.fill()
    check(peer)
    return server


def operations(peer: Peer, readers: list[str], writers: list[str]) -> dict[str, list[Request]]:
    """Return the requests of each operation: for many users' tasks, so that caches help little."""
    owned = [
        (user, task)
        for row in zip(*(peer.ids[user] for user in readers), strict=True)
        for user, task in zip(readers, row, strict=True)
    ]
    return {
        "list": [peer.list(user) for user in readers],
        "get": [peer.get(user, task) for user, task in owned],
        "create": [peer.create(user, "Buy milk") for user in writers],
        "toggle": [
            peer.toggle(user, task, state) for state in (True, False) for user, task in owned
        ],
        "401": [peer.refused(user, tampered(peer.tokens[user])) for user in readers],
        "401 without a token": [peer.refused(user, "") for user in readers],
    }


def check(peer: Peer) -> None:
    """Check the peer's answers before its speed is measured."""
    if isinstance(peer, Bare):
        return require(peer.send(peer.list(READERS[0])) == (200, b"ok"), "bare: two bytes")
    user, other, writer = READERS[3], READERS[5], WRITERS[0]
    task = peer.ids[user][7]
    listed = peer.tasks(peer.send(peer.list(user)))
    require(
        [each["title"] for each in listed] == [task_title(number) for number in range(TASKS)],
        f"{peer.name}: list",
    )
    require([each["id"] for each in listed] == peer.ids[user], f"{peer.name}: ids of the list")
    require(peer.ask(peer.get(user, task))["title"] == task_title(7), f"{peer.name}: get")
    require(
        peer.send(peer.get(user, task, other)).status in (403, 404), f"{peer.name}: another's token"
    )
    for _ in range(2):
        before = peer.ask(peer.get(user, task))["completed"]
        peer.ask(peer.toggle(user, task, not before))
        require(peer.ask(peer.get(user, task))["completed"] is not before, f"{peer.name}: toggle")
    new = peer.ask(peer.create(writer, "Buy bread"))
    require(peer.ask(peer.get(writer, new["id"]))["title"] == "Buy bread", f"{peer.name}: create")
    for token in ("", tampered(peer.tokens[user])):
        require(peer.send(peer.refused(user, token)).status == 401, f"{peer.name}: 401")

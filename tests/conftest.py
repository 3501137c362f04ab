from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from falcon import testing

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.pop("PYTHONUNBUFFERED", None)  # with it no program has anything left to write at its end

import database
import taskd
from database import database_url
from event_loop import as_the_event_loop
from processes import ForkServer, Process
from tokens import SECRET, bearer

Pair = tuple[list[Process], Path]
# The address and the directory of the PostgreSQL server, for the processes that share the tests.
SERVER, DIRECTORY = "TASKD_TEST_POSTGRESQL", "TASKD_TEST_DIRECTORY"
ENGINES = ("sqlite", "postgresql", "both_engines")
SLOW = {"browser", "installed", "machine", "proxy", "schemathesis"}  # fixtures; see tests/README.md
cluster = None
MEMORY = Path("/dev/shm")  # Linux keeps its files in memory
ROOM = 4 << 30  # bytes that must be free there; a run takes less than a tenth of it at a time


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--postgresql",
        action="store_true",
        help="run on a PostgreSQL server, which is made for the run",
    )
    parser.addoption(
        "--shuffle",
        metavar="SEED",
        help="run the files, and the tests of each file, in an order that depends on SEED",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start a PostgreSQL server if the tests are to run on one, or end if it is not installed."""
    global cluster
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    if MEMORY.is_dir() and not {"TMPDIR", "PYTEST_DEBUG_TEMPROOT"} & set(os.environ):
        memory = os.statvfs(MEMORY)
        if memory.f_bavail * memory.f_frsize > ROOM and not memory.f_flag & os.ST_NOEXEC:
            os.environ["PYTEST_DEBUG_TEMPROOT"] = str(MEMORY)  # where pytest makes tmp_path
    if not config.getoption("postgresql"):
        return
    from cluster import CARELESS, Cluster, Databases, binaries

    if not binaries():
        pytest.exit("PostgreSQL is not installed here: the tests do not run on it", 0)
    if not hasattr(config, "workerinput"):
        # SIGTERM ends the tests in the same way as Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        cluster = Cluster(*CARELESS, above=os.environ.get("PYTEST_DEBUG_TEMPROOT"))
        os.environ[SERVER], os.environ[DIRECTORY] = cluster.url(), str(cluster.directory)
    database.postgresql = Databases(os.environ[SERVER])


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """End the fork servers before coverage combines their files."""
    ForkServer.close()


def pytest_unconfigure() -> None:
    if database.postgresql:
        database.postgresql.close()
    if cluster:
        cluster.remove()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests of the other engine, and put the slow ones before the others."""
    for item in items:
        if SLOW & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
    other = "sqlite" if config.getoption("postgresql") else "postgresql"
    left_out = [item for item in items if _engine(item) == other]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if _engine(item) != other]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if seed := config.getoption("shuffle"):
        _shuffle(items, seed)


def pytest_collection_finish() -> None:
    """Keep the collector of garbage from the tests themselves, which are many."""
    gc.collect()
    gc.freeze()


def _shuffle(items: list[pytest.Item], seed: str) -> None:
    """Reorder the files and the tests within each file: a fixture of a file is still made once."""
    chance = random.Random(seed)
    files = list(dict.fromkeys(item.path for item in items))
    place = {path: chance.random() for path in files}
    items.sort(key=lambda item: (place[item.path], chance.random()))


def _engine(item: pytest.Item) -> str:
    """Return the engine that the marker nearest to a test names."""
    names = [marker.name for marker in item.iter_markers()]
    return next((name for name in names if name in ENGINES), "both_engines")


@pytest.fixture(autouse=True)
def _databases() -> Iterator[None]:
    """Give the databases of a test to the next one."""
    with database.postgresql.until_the_end() if database.postgresql else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def _thread_state() -> Iterator[None]:
    """Forget what a test has said of its thread, such as that it is the event loop."""
    yield
    vars(taskd.thread_state).clear()


def pytest_make_parametrize_id(val: object) -> str | None:
    """Give every row of a table an id that can be typed, and is the same in every process."""
    if not isinstance(val, str | bytes):
        return None
    # Long numbers are times, which differ between processes.
    plain = re.sub(r"[^A-Za-z0-9 .=-]+", "_", re.sub("[0-9]{6,}", "N", repr(val)))
    return plain if len(val) < 60 else f"{len(val)} characters"


class Person:
    """A user with a good token, who calls the application without a socket."""

    def __init__(self, client: testing.TestClient, name: str) -> None:
        self.client, self.name, self.tasks = client, name, f"/api/{name}/tasks"

    def call(self, method: str, path: str = "", **options: Any) -> testing.Result:
        """Send a request to a path below this person's tasks, or to an absolute one."""
        path = path if path.startswith("/api") else self.tasks + path
        headers = bearer(self.name) | options.pop("headers", {})
        return self.client.simulate_request(method, path, headers=headers, **options)

    def add(self, **task: Any) -> dict[str, Any]:
        """Create a task and return it."""
        response = self.call("POST", json={"title": "Buy milk"} | task)
        assert response.status_code == 201, response.text
        return dict(response.json)


@pytest.fixture
def make_app(tmp_path: Path) -> Iterator[Callable[..., taskd.App]]:
    """Make applications on the database of this test, and close them at its end."""
    made: list[taskd.App] = []

    def make(**settings: Any) -> taskd.App:
        url = database_url(tmp_path / "taskd.db")
        if database.postgresql and not made and not settings:
            made.append(database.postgresql.app(url))
        else:
            made.append(
                taskd.create_app(
                    taskd.Settings(**({"secret": SECRET, "database_url": url} | settings))
                )
            )
        return made[-1]

    yield make
    taskd.thread_state.in_event_loop = True  # only the event loop closes its writer
    for app in made:
        app.database.close()


@pytest.fixture
def app(make_app: Callable[..., taskd.App]) -> taskd.App:
    return make_app()


@pytest.fixture
def client(app: taskd.App) -> testing.TestClient:
    return testing.TestClient(app)


@pytest.fixture
def alice(client: testing.TestClient) -> Person:
    return Person(client, "alice")


@pytest.fixture
def bob(client: testing.TestClient) -> Person:
    return Person(client, "bob")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start taskd processes in this test's directory, and end those that run at its end."""
    started: list[Process] = []

    def start(**options: Any) -> Process:
        started.append(Process(options.pop("directory", tmp_path), **options))
        return started[-1]

    yield start
    for process in started:
        if process.popen.poll() is None:
            process.kill()


@pytest.fixture
def server(start: Callable[..., Process]) -> Process:
    return start()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two servers on one database, and its file; each test has its own users in it."""
    directory = tmp_path_factory.mktemp("pair")
    servers = [Process(directory, TASKD_THREADS="80") for _ in range(2)]
    yield servers, directory / "taskd.db"
    for server in servers:
        server.kill()


BY_ITSELF = pytest.mark.sqlite("the event loop leaves PostgreSQL to the worker threads")


@pytest.fixture(
    params=["in_a_worker_thread", pytest.param("in_the_thread_of_the_sockets", marks=BY_ITSELF)]
)
def either_thread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in_the_thread_of_the_sockets":
        monkeypatch.setattr(taskd.App, "__call__", as_the_event_loop(taskd.App.__call__))


@pytest.fixture
def taskctl(tmp_path: Path) -> Callable[..., Any]:
    """Run taskctl in this test's directory."""
    from test_taskctl import run

    return partial(run, tmp_path)

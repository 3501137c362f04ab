"""What taskd costs with few tasks and with millions: requests, start time, memory, file size."""

from __future__ import annotations

import itertools
import os
import random
import sqlite3
import statistics
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import report
import taskd
from common import (
    Load,
    Request,
    Run,
    Server,
    medians,
    options,
    parse,
    progress,
    require,
    run_interleaved,
    setup,
    target,
    workplace,
    write_script,
)
from peers import READS, TASKS, WRITES, Taskd, operations, sign

ORDINARY = 50  # users whose requests are timed, the same number in each case, with 20 tasks each
GIANT = "giant"  # one user with very many tasks
BATCH = 10_000  # rows
PAGE = 50  # tasks
STARTS = 5
LONG_CONNECTIONS, MIXED = 16, 500  # requests of each kind
GROWN, START = 1.2, 0.7  # at most so many times; seconds
IDLE, LOADED = 60, 100  # megabytes
COLUMNS = (
    "user_id",
    "title",
    "description",
    "completed",
    "created_at",
    "updated_at",
    *taskd.search_columns({"title": "", "description": None}),
)
INSERT = f"INSERT INTO task ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"


class Case(NamedTuple):
    """A database: 20 tasks of each ordinary user, and those of one user with very many."""

    title: str
    tasks: int
    giant: int = 0

    @property
    def users(self) -> int:
        return self.tasks // TASKS


def make_cases(arguments: Namespace) -> list[Case]:
    """Return the cases; the others are compared with the first."""
    few = ORDINARY * TASKS
    sizes = [few, *(size for size in arguments.tasks if size > few)]
    ordinary = [Case(f"{size:,} tasks", size // TASKS * TASKS) for size in sizes]
    return [*ordinary, Case(f"one user with {arguments.giant:,}", few, arguments.giant)]


# --- Databases ------------------------------------------------------------------------------------


def rows(case: Case) -> Iterator[tuple[Any, ...]]:
    """Yield tasks in the order of real use: each user's are scattered over the whole file."""
    now = "2026-11-20T21:00:00.000Z"
    for number in range(case.tasks + case.giant):
        user = f"user-{number % case.users}" if number < case.tasks else GIANT
        description = "Every second day, in the evening, with rain water." if number % 2 else None
        title = f"Task {number}: water the plants"
        yield (
            user,
            title,
            description,
            number % 3 == 0,
            now,
            now,
            *taskd.search_columns({"title": title, "description": description}).values(),
        )


def seed(path: Path, case: Case) -> float:
    """Make the database as taskd makes it; return the seconds that it took."""
    started = time.perf_counter()
    taskd.prepare_database(str(path))
    database = sqlite3.connect(path)
    database.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF;")
    tasks, total = rows(case), case.tasks + case.giant
    with progress() as bar:
        task = bar.add_task(f"seeding {case.title}", total=total)
        while not bar.finished:
            with database:
                inserted = database.executemany(INSERT, itertools.islice(tasks, BATCH)).rowcount
            bar.advance(task, inserted)
    require(
        database.execute("SELECT count(*) FROM task").fetchone() == (total,), "seeding lost tasks"
    )
    database.close()
    with path.open("rb+") as file:
        os.fsync(file.fileno())  # otherwise the disk is still busy when writes are timed
    return time.perf_counter() - started


def ordinary_users(case: Case) -> dict[str, list[int]]:
    """Return some users from all over the database, and their tasks."""
    step = case.users // ORDINARY
    numbers = range(0, step * ORDINARY, step)
    return {f"user-{user}": list(range(user + 1, case.tasks + 1, case.users)) for user in numbers}


# --- Measuring ------------------------------------------------------------------------------------


class Grown:
    """A taskd on a database of one case."""

    def __init__(self, case: Case, directory: Path, number: int) -> None:
        place = directory / str(number)
        place.mkdir()
        self.case = case
        self.peer = Taskd(place)
        self.path = self.peer.directory / "taskd.db"
        self.seconds = seed(self.path, case)
        self.file_mb = round(self.path.stat().st_size / 1e6, 1)
        self.peer.ids = ordinary_users(case)
        self.writers = [f"writer-{user}" for user in range(ORDINARY)]
        self.peer.tokens = {user: sign(user) for user in [*self.peer.ids, *self.writers, GIANT]}
        self.server: Server
        self.start_s = self.idle_mb = 0.0

    def start(self, running: ExitStack) -> None:
        """Start it several times, to measure the start, and leave it running."""
        times = [self._start_once() for _ in range(STARTS)]
        self.start_s = round(statistics.median(times), 3)
        self.server = self.peer.start()
        running.callback(self.server.stop)
        self.server.wait(self.peer.health)
        self.idle_mb = self.server.memory()

    def _start_once(self) -> float:
        server = self.peer.start()
        try:
            return server.wait(self.peer.health)
        finally:
            server.stop()

    def requests(self) -> dict[str, Any]:
        asked = operations(self.peer, list(self.peer.ids), self.writers)
        return {name: asked[name] for name in READS + WRITES}

    def check(self) -> None:
        """Check that it answers with the tasks of the database."""
        for user, ids in self.peer.ids.items():
            listed = self.peer.tasks(self.peer.list(user).send(self.peer.port))
            require(
                [each["id"] for each in listed] == ids, f"{self.case.title}: the list of {user}"
            )

    def load(self, name: str) -> Load:
        """Return an operation over one connection: the cost of a request that never waits."""
        return self._load(name, self.requests()[name], 1)

    def long_load(self) -> Load:
        """Return a load of all operations in turn, each as often."""
        choose = random.Random(1)
        mixed = [
            request
            for asked in self.requests().values()
            for request in choose.choices(asked, k=MIXED)
        ]
        choose.shuffle(mixed)
        return self._load("mixed", mixed, LONG_CONNECTIONS)

    def _load(self, name: str, asked: list[Request], connections: int) -> Load:
        script = write_script(self.path.parent / f"{name}.lua", self.peer.port, asked)
        return Load(self.peer.ports, script, connections)

    def result(self, runs: dict[tuple[str, str], list[Run]]) -> dict[str, Any]:
        found = {name: medians(runs[self.case.title, name]) for name in READS + WRITES}
        return {
            "title": self.case.title,
            "tasks": self.case.tasks + self.case.giant,
            "users": self.case.users + bool(self.case.giant),
            "seeding_s": round(self.seconds, 1),
            "file_mb": self.file_mb,
            "start_s": self.start_s,
            "rss_idle_mb": self.idle_mb,
            "rss_loaded_mb": self.server.memory(),
            "p50_ms": {name: each["p50_ms"] for name, each in found.items()},
            "unexpected": sum(each["unexpected"] for each in found.values()),
        }


def list_giant(grown: Grown) -> str:
    """Return a sentence about the cost of a very long list without a limit."""
    started = time.perf_counter()
    answer = grown.peer.list(GIANT).send(grown.peer.port)
    seconds = time.perf_counter() - started
    require(len(grown.peer.tasks(answer)) == grown.case.giant, "the giant's list")
    return (
        f"One list of {grown.case.giant:,} tasks: "
        f"{seconds:.2f} s, {len(answer.body) / 1e6:.0f} MB; "
        f"memory afterwards {grown.server.memory():.0f} MB.\n"
    )


def pages(grown: Grown) -> dict[str, str]:
    """Return queries for pages of the long list, by their name."""
    with sqlite3.connect(grown.path) as database:
        [key] = database.execute("SELECT cursor_key FROM about").fetchone()
        middle = "SELECT id FROM task WHERE user_id = ? ORDER BY id LIMIT 1 OFFSET ?"
        [last] = database.execute(middle, (GIANT, grown.case.giant // 2 - 1)).fetchone()
    cursor = taskd.Cursors(key).write((last, last), GIANT, "id")
    return {
        "the first": "",
        f"number {grown.case.giant // 2 // PAGE + 1:,}": f"&after={cursor}",
        "the first of the open ones": "&completed=false",
        "by title, from the end": "&sort=-title",
        "the done ones by their last change": "&completed=true&sort=updated_at",
        "a search that finds one": f"&q=task%20{last - 1}:",
    }


def page_loads(grown: Grown) -> dict[str, Load]:
    """Return a load of each page, over one connection."""
    path, token = f"/api/{GIANT}/tasks?limit={PAGE}", grown.peer.tokens[GIANT]
    asked = {name: Request("GET", path + query, token) for name, query in pages(grown).items()}
    for name, request in asked.items():
        require(grown.peer.tasks(request.send(grown.peer.port)), f"the giant's page: {name}")
    return {
        name: grown._load(f"page-{number}", [asked[name]], 1) for number, name in enumerate(asked)
    }


def compare(cases: list[dict[str, Any]], runs: dict[tuple[str, str], list[Run]]) -> None:
    """Add to each case how many times slower it is than the first: the median over the rounds."""
    first = cases[0]["title"]
    for case in cases:
        pairs = {
            name: zip(runs[case["title"], name], runs[first, name], strict=True)
            for name in READS + WRITES
        }
        case["ratio"] = {
            name: statistics.median(one.p50_ms / few.p50_ms for one, few in of)
            for name, of in pairs.items()
        }


def reach(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the targets of this part, and the results."""
    most = max(cases, key=lambda case: int(case["tasks"]))
    compared = f"p50, {most['title']} to {cases[0]['title']}"
    slower = [
        target(f"{name}, {compared}", ratio, under=GROWN, unit=" times")
        for name, ratio in most["ratio"].items()
    ]
    worst = {
        name: max(case[name] for case in cases)
        for name in ("rss_idle_mb", "rss_loaded_mb", "start_s")
    }
    return [
        *slower,
        target("memory, idle", worst["rss_idle_mb"], under=IDLE, unit=" MB"),
        target("memory, after a long load", worst["rss_loaded_mb"], under=LOADED, unit=" MB"),
        target("start to first answer", worst["start_s"], under=START, unit=" s"),
    ]


def measure(arguments: Namespace) -> dict[str, Any]:
    with workplace() as (directory, running):
        circumstances = setup(arguments, directory)
        all_grown = [
            Grown(case, directory, number) for number, case in enumerate(make_cases(arguments))
        ]
        for grown in all_grown:
            grown.start(running)
            grown.check()
        loads = {
            (grown.case.title, name): grown.load(name)
            for name in READS + WRITES
            for grown in all_grown
        }
        runs = run_interleaved(loads, arguments.rounds, arguments.seconds)
        run_interleaved(
            {f"long load, {grown.case.title}": grown.long_load() for grown in all_grown},
            1,
            arguments.long,
        )
        cases = [grown.result(runs) for grown in all_grown]
        giant = list_giant(all_grown[-1])
        paged = run_interleaved(page_loads(all_grown[-1]), arguments.rounds, 1)
    compare(cases, runs)
    found = {
        "cases": cases,
        "giant": giant,
        "pages": {name: medians(of)["p50_ms"] for name, of in paged.items()},
    }
    return {**circumstances, "long_load_s": arguments.long, **found, "targets": reach(cases)}


def main() -> None:
    parser = options(str(__doc__))
    parser.add_argument(
        "--tasks", nargs="+", type=int, default=[1_000, 100_000, 2_000_000], help="how many tasks"
    )
    parser.add_argument(
        "--giant", type=int, default=100_000, help="how many tasks one user has (%(default)s)"
    )
    parser.add_argument(
        "--long", type=int, default=60, help="seconds of the long load (%(default)s)"
    )
    arguments = parse(parser)
    if arguments.quick:
        arguments.tasks, arguments.giant, arguments.long = [1_000, 20_000], 5_000, 2
    report.publish("growth", measure(arguments), arguments.output)


if __name__ == "__main__":
    main()

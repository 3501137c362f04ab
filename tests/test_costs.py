"""What one user may cost: pages, searches and writes of one, and what another gets meanwhile."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from falcon import testing

import support
import taskd
from conftest import Person
from support import Process, Wire, assert_problem, bearer, written

TEXT = "lorem ipsum dolor sit amet " * 370 + "zebra 0123"  # 10,000 characters
WHEN = "2026-11-20T21:00:00.000Z"
MEGABYTE = 1024 * 1024


def fill(database: Path, user: str, count: int, text: str = TEXT) -> None:
    """Put tasks into the database without taskd, because many creates take long."""
    marks = ", ".join("?" * 7)
    columns = (
        "user_id, title, description, created_at, updated_at, title_folded, description_folded"
    )
    support.sql(
        database,
        f"INSERT INTO task ({columns}) WITH RECURSIVE number(n) AS "
        f"(SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < {count}) "
        f"SELECT {marks} FROM number",
        *(user, "big", text, WHEN, WHEN, "big", text.casefold()),
    )


def peak_memory(server: Process) -> int:
    """Return the most memory that a process has had, in MB."""
    status = Path(f"/proc/{server.popen.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


# Pages


@pytest.mark.parametrize("character", ["a", "\U0001f600", "\x01"])
def test_a_page_ends_after_about_a_mebibyte_of_json_and_its_link_leads_to_all(
    alice, tmp_path, character
):
    fill(tmp_path / "taskd.db", "alice", 240 if character == "a" else 60, character * 10_000)
    query, seen, sizes = "limit=1000", [], []
    while query:
        page = alice.call("GET", query_string=query)
        seen += [task["id"] for task in page.json]
        sizes.append(len(page.content))
        query = page.headers.get("Link", "").partition("?")[2].partition(">")[0]
    assert seen == sorted(support.stored(tmp_path / "taskd.db"))
    assert len(sizes) > 1
    assert all(MEGABYTE * 0.95 < size < MEGABYTE * 1.1 for size in sizes[:-1])


def test_a_page_of_a_thousand_small_tasks_is_whole(alice, tmp_path):
    fill(tmp_path / "taskd.db", "alice", 1000, "a")
    page = alice.call("GET", query_string="limit=1000")
    assert len(page.json) == 1000
    assert "Link" not in page.headers


def test_a_page_holds_one_task_at_least(alice, monkeypatch):
    monkeypatch.setattr(taskd, "MAX_PAGE_BYTES", 1)
    added = [alice.add()["id"] for _ in range(3)]
    page = alice.call("GET", query_string="limit=3")
    assert [task["id"] for task in page.json] == added[:1]
    assert 'rel="next"' in page.headers["Link"]


# Searches


def many(calls: list[Callable[[], Any]]) -> list[Any]:
    """Make the calls at the same time, each in its own thread, and return their results."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(lambda call: call(), calls))


@contextlib.contextmanager
def searching(app: taskd.App, user: str, count: int) -> Iterator[None]:
    """Keep so many searches of a user running, each in its own thread."""
    begun, end = threading.Barrier(count + 1), threading.Event()

    def search() -> None:
        with app.store.page_reader(user, taskd.Listing(q="a")):
            begun.wait(support.DEADLINE)
            end.wait(support.DEADLINE)

    threads = [threading.Thread(target=search) for _ in range(count)]
    for thread in threads:
        thread.start()
    begun.wait(support.DEADLINE)
    try:
        yield
    finally:
        end.set()
        for thread in threads:
            thread.join()


def test_a_users_third_search_at_once_is_refused_and_other_users_may_search(app, alice, bob):
    alice.add()
    with searching(app, "alice", 2):
        refused = alice.call("GET", query_string="q=milk")
        assert_problem(refused, 503)
        assert refused.headers["Retry-After"] == "2"
        assert "wait until one ends" in refused.json["detail"]
        started = time.monotonic()
        for _ in range(40):  # only the first of them waits
            assert alice.call("GET", query_string="q=milk").status_code == 503
        assert time.monotonic() - started < 40 * taskd.PLACE_TIMEOUT / 2
        assert alice.call("GET").status_code == 200
        assert bob.call("GET", query_string="q=milk").status_code == 200
    assert len(alice.call("GET", query_string="q=milk").json) == 1
    gc.collect()  # the errors refer to it
    assert not app.store._searches


@pytest.mark.both_engines
def test_short_searches_of_a_user_at_once_wait_for_each_other(start):
    server = start()
    for number in range(101):
        body = {"title": f"Task {number}", "tags": ["x"]}
        assert server.request("POST", "/api/alice/tasks", body, bearer()).status_code == 201
    queries = ["q=task", "sort=due_date", "priority=high", "sort=-updated_at&limit=9", "tag=x"]
    calls = [
        partial(server.request, "GET", f"/api/alice/tasks?{query}", headers=bearer())
        for query in queries
    ]
    for _ in range(10):
        assert [answer.status_code for answer in many(calls)] == [200] * len(queries)


def test_a_search_that_takes_too_long_is_refused_and_the_next_one_is_served(
    app, alice, tmp_path, monkeypatch
):
    fill(tmp_path / "taskd.db", "alice", 2000)
    monkeypatch.setattr(taskd, "SEARCH_TIME", 0.001)
    for query in ("q=nothing", "q=zebra&limit=1000", "q=nothing&sort=-title&completed=false"):
        refused = alice.call("GET", query_string=query)
        assert_problem(refused, 503)
        assert refused.headers["Retry-After"] == "2"
        assert "narrow it" in refused.json["detail"]
        assert len(alice.call("GET", query_string="limit=1000").json) > 90
        assert alice.call("GET", query_string="limit=1").status_code == 200
    monkeypatch.setattr(taskd, "SEARCH_TIME", 30)
    assert alice.call("GET", query_string="q=nothing").json == []
    assert alice.call("POST", json={"title": "Buy milk"}).status_code == 201


@pytest.mark.postgresql("SQLite reads all rows with one statement")
def test_rows_that_are_fetched_fast_end_at_the_deadline_too(app):
    end, seen = time.monotonic() + 0.3, list[Any]()

    def read() -> None:
        for row in app.database.rows("SELECT generate_series(1, 200)", end):
            seen.append(row)
            time.sleep(0 if len(seen) > 1 else 0.4)

    with pytest.raises(taskd.Unavailable), app.database.deadline(end):
        read()
    assert len(seen) == 50, "what was fetched before"


def test_a_search_does_not_wait_longer_than_its_limit_while_places_move():
    places, over = taskd.Semaphore(1, partial(taskd.Busy, "wait"), 0.2), threading.Event()
    started = time.monotonic()

    def take_again_and_again() -> None:
        while not over.is_set():
            with places.place():
                places._last_change = time.monotonic() + 60  # others move all the time
                over.wait(0.5)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(take_again_and_again)
        try:
            support.until(lambda: not places._free, "the place is taken")
            with pytest.raises(taskd.Busy), places.place():
                pass
        finally:
            over.set()
    assert time.monotonic() - started < 30


@pytest.mark.postgresql("SQLite reads all rows with one statement")
def test_all_statements_of_a_search_together_have_its_time(app, alice, monkeypatch):
    for _ in range(101):
        alice.add()
    rows = app.database.rows

    def slow_rows(sql: str, end: float, **values: Any) -> Iterator[Any]:
        slow = sql.replace("ORDER BY", "AND pg_sleep(0.01) IS NOT NULL ORDER BY", 1)
        yield from rows(slow, end, **values)

    monkeypatch.setattr(app.database, "rows", slow_rows)
    query = "q=milk&limit=1000"
    started = time.monotonic()
    assert len(alice.call("GET", query_string=query).json) == 101
    assert time.monotonic() - started > 1
    monkeypatch.setattr(taskd, "SEARCH_TIME", 0.8)  # enough for the first rows, not for all
    started = time.monotonic()
    assert "took over" in assert_problem(alice.call("GET", query_string=query), 503)["detail"]
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize("q", ["a" * 200, "\U0001f600" * 200])
def test_a_search_text_may_have_two_hundred_characters(alice, q):
    title = alice.add(title=q)["title"]
    [found] = alice.call("GET", params={"q": q}).json
    assert found["title"] == title
    assert_problem(alice.call("GET", params={"q": q + "a"}), 422)


@pytest.mark.parametrize(
    "text", ["a" * 10_000, "ab" * 5_000, "\u00e4" * 10_000, TEXT], ids=["a", "ab", "ae", "words"]
)
@pytest.mark.sqlite("PostgreSQL spends its own processor time")
def test_a_search_costs_at_most_half_a_millisecond_for_each_long_task(alice, tmp_path, text):
    fill(tmp_path / "taskd.db", "alice", 200, text)
    started = time.thread_time()
    for q in (text[:199] + "x", "x" + text[:199], text[:100] + "x" + text[:99]):
        assert alice.call("GET", params={"q": q}).json == []
    assert time.thread_time() - started < 3 * 200 * 0.0005


# What another user gets at the same time


OTHERS = [
    ("GET", "/api/bob/tasks", None, 1.0),
    ("GET", "/api/bob/tasks?q=milk", None, 1.0),
    ("GET", "/api/bob/tasks?limit=5&sort=-title", None, 1.0),
    ("POST", "/api/bob/tasks", {"title": "Buy bread"}, 2.0),
    ("GET", "/readyz", None, 1.0),
]
GREEDY = [
    "q=nothing&limit=1000", "q=zebra&limit=1000", "limit=1000", "q=zebra&sort=-title&limit=1000",
    f"q={'lorem%20ipsum%20dolor%20sit%20amet%20' * 7}x", "limit=1000&sort=-updated_at",
]  # fmt: skip


@contextlib.contextmanager
def greedy(server: Process, count: int, answers: list[Any]) -> Iterator[None]:
    """Send expensive requests of alice on so many connections, again and again."""
    stop, headers = threading.Event(), bearer("alice")

    def ask(query: str) -> None:
        while not stop.is_set():
            answers.append(server.request("GET", f"/api/alice/tasks?{query}", None, headers))

    with ThreadPoolExecutor(count) as threads:
        futures = [threads.submit(ask, GREEDY[number % len(GREEDY)]) for number in range(count)]
        try:
            yield
        finally:
            stop.set()
    for future in futures:
        future.result()


@pytest.mark.slow
def test_searches_and_pages_of_one_user_keep_nobody_else_waiting(start, tmp_path):
    # A fast machine would end a search of two before the third has waited for 0.25 s.
    server = start(before="taskd.PLACE_TIMEOUT = 0.05")
    for number in range(20):
        body = {"title": f"Buy milk {number}"}
        assert server.request("POST", "/api/bob/tasks", body, bearer("bob")).status_code == 201
    fill(tmp_path / "taskd.db", "alice", 4_000)
    answers: list[Any] = []
    with greedy(server, 8, answers):
        support.until(lambda: len(answers) > 20, "alice is answered")
        end = time.monotonic() + 2
        while time.monotonic() < end:
            for method, path, body, seconds in OTHERS:
                started = time.monotonic()
                answer = server.request(method, path, body, bearer("bob"))
                assert answer.status_code in (200, 201), (path, answer.text)
                assert time.monotonic() - started < seconds, path
    statuses = {answer.status_code for answer in answers}
    assert statuses == {200, 503} or (support.postgresql and statuses == {200})
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 503)
    assert max(len(answer.content) for answer in answers) < MEGABYTE * 1.1
    assert peak_memory(server) < 200
    assert "Traceback" not in server.log


LISTS = ["q=lorem", "q=lorem", "sort=-title", ""]


@pytest.mark.slow
def test_long_lists_of_one_user_keep_nobody_else_waiting(start, tmp_path, monkeypatch):
    server = start()
    for number in range(20):
        body = {"title": f"Buy milk {number}"}
        assert server.request("POST", "/api/bob/tasks", body, bearer("bob")).status_code == 201
    fill(tmp_path / "taskd.db", "alice", 5_000)
    monkeypatch.setattr("test_costs.GREEDY", LISTS)
    answers: list[Any] = []
    with greedy(server, 8, answers):
        support.until(lambda: len(answers) > 8, "alice is answered")
        for _ in range(3):
            for method, path, body, seconds in OTHERS:
                before = server.processor_time()
                answer = server.request(method, path, body, bearer("bob"))
                assert answer.status_code in (200, 201), (path, answer.text)
                assert server.processor_time() - before < seconds, path
    assert {answer.status_code for answer in answers} == {200, 503}
    assert peak_memory(server) < 200


@pytest.mark.slow
@pytest.mark.sqlite("on PostgreSQL the worker threads read the lists")
def test_many_long_lists_of_a_user_at_once_stay_in_bounded_memory(start, tmp_path):
    server = start()
    fill(tmp_path / "taskd.db", "alice", 4_000)
    call = partial(server.request, "GET", "/api/alice/tasks", headers=bearer("alice"))
    statuses = [many([lambda: call().status_code] * 16) for _ in range(5)]
    assert {status for statuses_of_round in statuses for status in statuses_of_round} == {200, 503}
    assert peak_memory(server) < 200


@pytest.mark.slow
@pytest.mark.sqlite("PostgreSQL spends its own processor time, at most 2 s for a search")
def test_a_search_ends_when_its_client_leaves(start, tmp_path):
    server = start()
    fill(tmp_path / "taskd.db", "alice", 20_000)  # half a second for a search
    search = written("GET", "/api/alice/tasks?q=nothing", user="alice")
    before = server.processor_time()
    for count in range(1, 11):
        with Wire(server) as wire:
            started = server.processor_time()
            wire.send(search)
            support.until(
                lambda start=started: server.processor_time() > start + 0.03,
                "the search is under way",
            )
            if count % 2:
                wire.reset()
        # The port and an id may have these digits too.
        support.until(lambda n=count: server.log.count(" 503 ") == n, "the search has ended")
    assert server.processor_time() - before < 2
    assert "unhandled exception" not in server.log


@pytest.mark.both_engines
def test_more_searches_at_sigterm_than_there_is_time_for_are_all_answered(start):
    slow = "taskd.TaskStore.page = lambda *_: time.sleep(1) or (b'[]', None)"
    server = start(before=f"taskd.REJECT_BLOCKED_AFTER = 0.0; {slow}")
    users = [f"user-{number}" for number in range(12)]
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(Wire(server)) for _ in users]
        for user, wire in zip(users, wires, strict=True):
            wire.send(written("GET", f"/api/{user}/tasks?q=nothing", user=user))
        assert server.request("GET", "/healthz").status_code == 200
        server.popen.terminate()
        answers = [wire.answer() for wire in wires]
    rejected = [answer for answer in answers if answer.status_code != 200]
    assert len(rejected) >= len(users) - taskd.SEARCHES
    for answer in rejected:
        assert "the server is stopping" in assert_problem(answer, 503)["detail"]
        assert answer.headers["retry-after"] == "2"
    assert server.popen.wait(support.DEADLINE) == 0


# How many tasks a user may have


def test_one_task_more_than_the_operator_allows_is_refused(make_app):
    app = make_app(max_tasks=3)
    alice, bob = (Person(testing.TestClient(app), name) for name in ("alice", "bob"))
    added = [alice.add()["id"] for _ in range(3)]
    refused = alice.call("POST", json={"title": "Buy milk"})
    problem = assert_problem(refused, 403)
    assert problem["detail"] == "you have as many tasks as this server allows, 3; delete one first"
    assert bob.add()["title"] == "Buy milk"
    assert alice.call("PUT", f"/{added[0]}", json={"title": "Buy tea"}).status_code == 200
    assert alice.call("DELETE", f"/{added[0]}").status_code == 200
    alice.add()
    assert_problem(alice.call("POST", json={"title": "Buy milk"}), 403)
    assert len(alice.call("GET").json) == 3


def test_a_repeated_create_is_answered_at_the_limit_and_a_refused_one_leaves_its_key_unused(
    make_app,
):
    alice = Person(testing.TestClient(make_app(max_tasks=1)), "alice")
    create = {"json": {"title": "Buy milk"}, "headers": {"Idempotency-Key": "first"}}
    first = alice.call("POST", **create)
    again = alice.call("POST", **create)
    assert (again.status_code, again.json) == (201, first.json)
    assert again.headers["Idempotency-Replayed"] == "true"
    other = {"json": {"title": "Buy tea"}, "headers": {"Idempotency-Key": "second"}}
    assert_problem(alice.call("POST", **other), 403)
    alice.call("DELETE", f"/{first.json['id']}")
    created = alice.call("POST", **other)
    assert created.status_code == 201
    assert "Idempotency-Replayed" not in created.headers


def test_a_user_at_once_on_two_servers_gets_exactly_as_many_tasks_as_are_allowed(start, tmp_path):
    servers = [start(TASKD_MAX_TASKS="30"), start(TASKD_MAX_TASKS="30")]
    requests = [
        written("POST", "/api/alice/tasks", {"title": "x"}, *key, user="alice")
        for number in range(40)
        for key in ((), (f"Idempotency-Key: {number}",))
    ]
    statuses = [answer.status_code for answer in support.at_once(servers, requests)]
    assert set(statuses) <= {201, 403, 503}
    assert statuses.count(201) == len(support.stored(tmp_path / "taskd.db")) <= 30
    for server in servers:
        last = server.request("POST", "/api/alice/tasks", {"title": "x"}, bearer("alice"))
        assert last.status_code == (403 if statuses.count(201) == 30 else 201)


def test_tasks_that_another_program_adds_count_too(make_app, tmp_path):
    alice = Person(testing.TestClient(make_app(max_tasks=5_000)), "alice")
    alice.add()
    fill(tmp_path / "taskd.db", "alice", 4_998, "")
    alice.add()
    assert_problem(alice.call("POST", json={"title": "Buy milk"}), 403)


# Writes that wait for another process


@pytest.mark.slow
def test_many_writes_that_wait_for_another_process_keep_nobody_else_waiting(server, tmp_path):
    assert (
        server.request("POST", "/api/bob/tasks", {"title": "x"}, bearer("bob")).status_code == 201
    )
    create = written("POST", "/api/alice/tasks", {"title": "x"}, user="alice")
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(Wire(server)) for _ in range(300)]
        with support.locked(tmp_path / "taskd.db"):
            for wire in wires:
                wire.send(create)
            for path in ("/readyz", "/api/bob/tasks", "/api/bob/tasks?q=x", "/readyz"):
                started = time.monotonic()
                assert server.request("GET", path, headers=bearer("bob")).status_code == 200
                assert time.monotonic() - started < 1
            refused = server.request("POST", "/api/bob/tasks", {"title": "x"}, bearer("bob"))
            assert refused.status_code == 503
        answers = [wire.answer() for wire in wires]
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(503) + statuses.count(201) == 300
    assert len(support.stored(tmp_path / "taskd.db")) == 1 + statuses.count(201)

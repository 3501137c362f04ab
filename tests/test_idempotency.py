"""Idempotency-Key: a create that is repeated is done once, whatever happens in between.

TASKD_TEST_ROUNDS=100 makes the random test go on for longer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from falcon import testing

import taskd
from conftest import Pair, Person
from support import (
    DEADLINE,
    OTHER_SECRET,
    Answer,
    Process,
    Wire,
    WireAnswer,
    assert_problem,
    at_once,
    bearer,
    locked,
    sql,
    stored,
    traced,
    until,
    written,
)

ROUNDS = int(os.environ.get("TASKD_TEST_ROUNDS", "6"))
CLIENTS = 8  # clients that create tasks when taskd is killed
TASKS = "/api/alice/tasks"
DAY = timedelta(hours=24)
SAME_ON_ALL = pytest.mark.sqlite("the header is parsed before the database is asked")

Start = Callable[..., Process]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of the database of these tests."""
    return tmp_path / "taskd.db"


def create(person: Person, key: str, task: object = None, **options: Any) -> testing.Result:
    headers = {"Idempotency-Key": key} | options.pop("headers", {})
    if "body" not in options:
        options["json"] = {"title": "Buy milk"} if task is None else task
    return person.call("POST", headers=headers, **options)


def shown(answer: testing.Result | Answer) -> tuple[object, ...]:
    """Return the parts of an answer that are the same for a repeated create."""
    assert answer.status_code == 201, answer.text
    return answer.status_code, answer.content, answer.headers["location"], answer.headers["etag"]


def is_replayed(answer: testing.Result | Answer) -> bool:
    given = answer.headers.get("idempotency-replayed")
    assert given in (None, "true")
    return given == "true"


def keys(path: Path) -> list[tuple[str, str]]:
    """Return the users and keys in the database, in the order of their creation."""
    return sql(path, "SELECT user_id, name FROM idempotency_key ORDER BY id")


def run(path: Path, statement: str, *values: object) -> None:
    sql(path, statement, *values)


def age(path: Path, by: timedelta) -> None:
    """Set the age of all keys in the database."""
    run(path, "UPDATE idempotency_key SET created_at = ?", taskd.timestamp(datetime.now(UTC) - by))


# --- The same key again ---------------------------------------------------------------------------


@pytest.mark.usefixtures("either_thread")
def test_a_repeated_create_gets_the_first_answer_again_and_creates_nothing(alice: Person) -> None:
    task = {"title": "Grüße \u2028 \"'", "description": "two\nlines", "completed": True}
    first = create(alice, "k", task)
    assert (first.status_code, is_replayed(first)) == (201, False)
    assert first.headers["location"] == f"{TASKS}/{first.json['id']}"
    assert first.json["title"] == task["title"]
    for _ in range(3):
        again = create(alice, "k", task)
        assert shown(again) == shown(first)
        assert is_replayed(again)
        assert again.headers["content-type"] == "application/json"
        assert again.headers["cache-control"] == "no-store"
    assert alice.call("GET").json == [first.json]
    shown_now = alice.call("GET", f"/{first.json['id']}")
    assert shown_now.headers["etag"] == first.headers["etag"]


@pytest.mark.usefixtures("either_thread")
def test_a_replay_says_what_the_task_was_after_it_has_changed_and_after_it_is_gone(
    alice: Person,
) -> None:
    first = create(alice, "k")
    one = f"/{first.json['id']}"
    for change in (
        lambda: alice.call("PUT", one, json={"title": "Buy tea", "description": "green"}),
        lambda: alice.call("PATCH", f"{one}/complete"),
        lambda: alice.call("DELETE", one),
    ):
        assert change().status_code == 200
        again = create(alice, "k")
        assert shown(again) == shown(first)
        assert is_replayed(again)
    assert alice.call("GET").json == []
    assert_problem(alice.call("GET", one), 404)


def test_a_replay_leaves_the_number_of_the_next_task_alone(alice: Person) -> None:
    assert create(alice, "k").json["id"] == 1
    for _ in range(3):
        create(alice, "k")
        create(alice, "k", {"title": "another"})
    assert alice.add()["id"] == 2


def test_creates_without_a_key_and_with_different_keys_are_different_creates(alice: Person) -> None:
    answers = [create(alice, "k"), create(alice, "K"), create(alice, "k "), create(alice, "kk")]
    alone = [alice.call("POST", json={"title": "Buy milk"}) for _ in range(2)]
    assert [is_replayed(answer) for answer in answers + alone] == [
        False,
        False,
        True,
        False,
        False,
        False,
    ]
    assert len(alice.call("GET").json) == 5


@pytest.mark.usefixtures("either_thread")
def test_a_key_is_its_users_own(path: Path, client: testing.TestClient) -> None:
    names = ["alice", "Alice", "alice ", "bob", "%", "o'hara", "ålice"]
    people = {name: Person(client, name) for name in names}
    for person in people.values():
        person.tasks = f"/api/{falcon_path(person.name)}/tasks"
    first = {name: create(person, "k", {"title": name}) for name, person in people.items()}
    again = {name: create(person, "k", {"title": name}) for name, person in people.items()}
    for name, person in people.items():
        assert not is_replayed(first[name])
        assert is_replayed(again[name])
        assert shown(again[name]) == shown(first[name])
        assert (first[name].json["user_id"], first[name].json["title"]) == (name, name)
        assert person.call("GET").json == [first[name].json]
    assert keys(path) == [(name, "k") for name in names]


def falcon_path(name: str) -> str:
    return name.replace("%", "%25").replace(" ", "%20")


# --- The same key, another body -------------------------------------------------------------------

OTHER_BODIES: list[dict[str, Any]] = [
    {"title": "Buy tea"},
    {"title": "Buy milk "},
    {"title": "buy milk"},
    {"title": "Buy milk", "description": ""},
    {"title": "Buy milk", "description": "2 litres"},
    {"title": "Buy milk", "completed": True},
]


@pytest.mark.parametrize("other", OTHER_BODIES, ids=json.dumps)
@pytest.mark.usefixtures("either_thread")
def test_the_same_key_with_another_body_is_422(alice: Person, other: dict[str, Any]) -> None:
    first = create(alice, "k")
    refused = create(alice, "k", other)
    problem = assert_problem(refused, 422)
    assert problem["errors"] == [
        {
            "field": "Idempotency-Key",
            "message": "was used for another task; send a new one with a new task",
        }
    ]
    assert not {"location", "etag", "idempotency-replayed"} & {
        name.lower() for name in refused.headers
    }
    assert alice.call("GET").json == [first.json]
    assert shown(create(alice, "k")) == shown(first)
    assert create(alice, "k2", other).status_code == 201


SAME_BODIES = [
    b'{"title":"Buy milk"}',
    b' \n{\t"title" : "Buy milk"\r\n}  ',
    b'{"title": "\\u0042uy\\u0020milk"}',
    b'{"completed": false, "title": "Buy milk"}',
    b'{"description": null, "completed": false, "title": "Buy milk"}',
    b'{"title": "Buy tea", "title": "Buy milk"}',
    b'{"id": 7, "user_id": "bob", "title": "Buy milk", "created_at": null, "updated_at": [1e999]}',
]


def test_a_body_that_means_the_same_is_the_same_however_it_is_written(alice: Person) -> None:
    headers = {"Content-Type": "application/json"}
    answers = [create(alice, "k", body=body, headers=headers) for body in SAME_BODIES]
    assert {shown(answer) for answer in answers} == {shown(answers[0])}
    assert [is_replayed(answer) for answer in answers] == [False] + [True] * (len(answers) - 1)
    assert len(alice.call("GET").json) == 1


def test_a_task_that_was_answered_can_be_sent_back_with_its_key(alice: Person) -> None:
    first = create(alice, "k", {"title": "Buy milk", "description": "2 litres", "completed": True})
    assert shown(create(alice, "k", first.json)) == shown(first)


REFUSED: list[tuple[int, dict[str, Any]]] = [
    (400, {"body": b""}),
    (400, {"body": b'{"title": "Buy milk"'}),
    (400, {"body": b'{"title": "\xff"}'}),
    (413, {"body": b'{"title": "Buy milk"}' + b" " * 65536}),
    (415, {"body": b'{"title": "Buy milk"}', "headers": {"Content-Type": "text/plain"}}),
    (415, {"body": b'{"title": "Buy milk"}', "headers": {"Content-Encoding": "gzip"}}),
    (422, {"task": {}}),
    (422, {"task": []}),
    (422, {"task": {"title": " "}}),
    (422, {"task": {"title": "Buy milk", "descripton": "typo"}}),
    (422, {"task": {"title": "Buy milk", "description": "\0"}}),
]


@pytest.mark.parametrize(("status", "options"), REFUSED)
def test_a_create_that_is_refused_leaves_no_key_behind(
    alice: Person, path: Path, status: int, options: dict[str, Any]
) -> None:
    headers = {"Content-Type": "application/json"} | options.get("headers", {})
    for _ in range(2):
        assert_problem(create(alice, "k", **{**options, "headers": headers}), status)
    assert keys(path) == []
    answer = create(alice, "k")
    assert (answer.status_code, is_replayed(answer)) == (201, False)


# --- The form of a key, and the order of the checks -----------------------------------------------


@pytest.fixture(scope="module")
def bad_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server on which no test creates a task."""
    server = Process(tmp_path_factory.mktemp("bad"))
    yield server
    server.kill()


VISIBLE = "".join(map(chr, range(0x21, 0x7F)))
GOOD_KEYS = [
    "a",
    "0",
    "*",
    ",",
    "a,b",
    '"8e03978e-40d5-43e8-bc93-6894a57f9324"',
    "8e03978e-40d5-43e8-bc93-6894a57f9324",
    "'; DROP TABLE task; --",
    "%_%",
    "\\",
    "W/",
    "x" * 255,
    VISIBLE,
]
BAD_KEYS = [
    "",
    " ",
    "\t",
    "x" * 256,
    "x" * 9999,
    "a b",
    "a\tb",
    "é",
    "\xa0",
    "a\xad",
    "\x80",
    "\xff",
    "ключ".encode().decode("latin-1"),
]
CONTROLS = ["a\x01b", "a\x0bb", "a\x1fb", "a\x7fb", "\x7f", "\x85", "a\rb"]
FORM = "send one Idempotency-Key, of 1 to 255 visible ASCII characters"


@pytest.mark.parametrize("key", [key.replace(" ", "") for key in GOOD_KEYS])
def test_a_key_may_be_any_visible_ascii(alice: Person, path: Path, key: str) -> None:
    first, again = create(alice, key), create(alice, key)
    assert shown(again) == shown(first)
    assert [is_replayed(first), is_replayed(again)] == [False, True]
    assert keys(path) == [("alice", key)]


@pytest.mark.parametrize(
    "values", [*([key] for key in BAD_KEYS), ["a", "b"], ["a", "a"], ["a", ""], ["", ""]]
)
@SAME_ON_ALL
def test_a_malformed_key_is_400_and_the_create_is_not_done(
    bad_server: Process, values: list[str]
) -> None:
    lines = [f"Idempotency-Key: {value}" for value in values]
    with Wire(bad_server) as wire:
        problem = assert_problem(
            wire.send(written("POST", TASKS, {"title": "x"}, *lines, user="alice")).answer(), 400
        )
        assert problem["detail"] == FORM
        assert wire.send(written("GET", TASKS, user="alice")).answer().json == []


@pytest.mark.parametrize("key", CONTROLS)
@SAME_ON_ALL
def test_a_key_with_a_control_character_is_400_in_every_layer(
    bad_server: Process, key: str
) -> None:
    with Wire(bad_server) as wire:
        wire.send(written("POST", TASKS, {"title": "x"}, f"Idempotency-Key: {key}", user="alice"))
        assert_problem(wire.answer(), 400)
    assert bad_server.request("GET", TASKS, headers=bearer()).json == []


def test_white_space_around_a_key_is_not_part_of_it(server: Process, path: Path) -> None:
    with Wire(server) as wire:
        answers = [
            wire.send(written("POST", TASKS, {"title": "x"}, line, user="alice")).answer()
            for line in ("Idempotency-Key:k", "idempotency-key:  k\t", "IDEMPOTENCY-KEY:\tk ")
        ]
    assert {shown(answer) for answer in answers} == {shown(answers[0])}
    assert keys(path) == [("alice", "k")]


def test_who_calls_is_checked_before_the_key_and_the_key_before_the_body(
    alice: Person, bob: Person, path: Path
) -> None:
    used = create(alice, "used")
    for key in ("used", "new", "not good"):
        for headers in (
            {"Authorization": ""},
            bearer("alice", secret=OTHER_SECRET),
            bearer("alice", exp=1),
        ):
            assert_problem(create(alice, key, headers=headers), 401)
        assert_problem(create(bob, key, path=TASKS), 403)
    for _, options in REFUSED:
        problem = assert_problem(create(alice, "not good", **options), 400)
        assert "Idempotency-Key" in problem["detail"]
    assert keys(path) == [("alice", "used")]
    assert alice.call("GET").json == [used.json]


def test_a_key_means_nothing_where_nothing_is_created(alice: Person, path: Path) -> None:
    number = alice.add()["id"]
    for key in ("k", "k", "not good"):
        for method, one in (("GET", ""), ("GET", f"/{number}"), ("PATCH", f"/{number}/complete")):
            answer = alice.call(method, one, headers={"Idempotency-Key": key})
            assert (answer.status_code, is_replayed(answer)) == (200, False)
    assert alice.call("GET", f"/{number}").json["completed"] is True, "each of three toggles counts"
    assert keys(path) == []


DIGESTS = {  # as version 0.2.0 kept them, whose tasks had three fields
    '{"title":"Buy milk","description":null,"completed":false}': {"title": "Buy milk"},
    '{"title":"\u00e9 \\"","description":"","completed":true}': {
        "title": 'é "',
        "description": "",
        "completed": True,
    },
    '{"title":"x","description":null,"completed":false,"priority":"low","tags":["b","a"]}': {
        "title": "x",
        "priority": "low",
        "due_date": None,
        "tags": ["b", "a"],
    },
}


def test_a_digest_is_of_the_first_three_fields_and_of_those_that_were_given(
    alice: Person, path: Path
) -> None:
    for number, (asked, task) in enumerate(DIGESTS.items()):
        create(alice, f"k{number}", task)
        kept = sql(path, "SELECT body FROM idempotency_key WHERE name = ?", f"k{number}")
        assert kept == [(hashlib.sha256(asked.encode()).hexdigest(),)], asked


# --- 24 hours -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("either_thread")
def test_a_key_is_good_for_24_hours_and_then_makes_a_new_task(alice: Person, path: Path) -> None:
    first = create(alice, "k")
    age(path, DAY - timedelta(seconds=60))
    assert shown(create(alice, "k")) == shown(first)
    age(path, DAY + timedelta(seconds=1))
    second = create(alice, "k")
    assert not is_replayed(second)
    assert second.json["id"] > first.json["id"]
    again = create(alice, "k")
    assert shown(again) == shown(second)
    assert is_replayed(again)
    assert alice.call("GET").json == [first.json, second.json]
    assert keys(path) == [("alice", "k")]


def test_an_expired_key_can_be_used_for_another_body(alice: Person, path: Path) -> None:
    create(alice, "k")
    age(path, DAY + timedelta(seconds=1))
    assert create(alice, "k", {"title": "Buy tea"}).status_code == 201
    assert_problem(create(alice, "k"), 422)


def test_a_replay_does_not_prolong_a_key(alice: Person, path: Path) -> None:
    create(alice, "k")
    age(path, DAY - timedelta(seconds=60))
    assert is_replayed(create(alice, "k"))
    [[created_at]] = rows(path, "SELECT created_at FROM idempotency_key")
    assert datetime.fromisoformat(created_at) < datetime.now(UTC) - DAY + timedelta(seconds=61)


def rows(path: Path, statement: str) -> list[Any]:
    return sql(path, statement)


def plant(path: Path, count: int, age: timedelta, user: str = "carol") -> None:
    """Put keys of a user into the database, as if they had been used so long ago."""
    when = taskd.timestamp(datetime.now(UTC) - age)
    numbers = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count})"
    columns = "idempotency_key (user_id, name, body, answer, created_at)"
    run(
        path,
        f"INSERT INTO {columns} {numbers} SELECT ?, ? || i, '', '', ? FROM n",
        user,
        f"{user}-{age}-",
        when,
    )


def test_all_expired_keys_are_deleted_in_batches_and_no_other_wherever_the_server_stands(
    app: taskd.App, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(path, 1001, DAY + timedelta(hours=1))
    plant(path, 20, DAY - timedelta(hours=1), user="dave")
    for zone in ("Pacific/Kiritimati", "Pacific/Midway"):
        with monkeypatch.context() as patch:
            patch.setenv("TZ", zone)
            time.tzset()
            app.store.expire_keys()
        time.tzset()
        assert {user for user, _ in keys(path)} == {"dave"}
        assert len(keys(path)) == 20


@pytest.mark.sqlite("it needs a trigger in SQLite's words")
@pytest.mark.parametrize("user", ["alice", "carol"])
def test_a_create_without_a_key_does_not_touch_the_keys(
    alice: Person, path: Path, user: str
) -> None:
    alice.add()
    plant(path, 10, DAY + timedelta(hours=1), user=user)
    everything = "SELECT * FROM idempotency_key ORDER BY id"
    before = rows(path, everything)
    run(
        path,
        "CREATE TRIGGER touched BEFORE INSERT ON idempotency_key "
        "BEGIN SELECT RAISE(ABORT, 'touched'); END",
    )
    for _ in range(3):
        alice.add()
    for refused in ("not good", "x" * 256):
        assert_problem(create(alice, refused), 400)
    assert rows(path, everything) == before


@pytest.mark.sqlite("it is about SQLite's file")
def test_a_keyed_create_looks_at_no_more_of_the_keys_however_many_there_are(
    alice: Person, path: Path
) -> None:
    def work() -> int:
        """Return the hundreds of SQLite's instructions for a create and for its replay."""
        steps = 0

        def step() -> None:
            nonlocal steps
            steps += 1

        app: Any = alice.client.app
        connection = app.store._database._worker_connection.connection()
        connection.set_progress_handler(step, 10)
        for _ in range(2):
            assert create(alice, f"k{len(keys(path))}").status_code == 201
        connection.set_progress_handler(None, 0)
        return steps

    create(alice, "first")
    plant(path, 10, timedelta(hours=1))
    few = work()
    plant(path, 20_000, timedelta(hours=1), user="erin")
    plant(path, 20_000, DAY + timedelta(hours=1), user="dave")
    assert few > 0
    assert work() <= 2 * few


# --- At the same time, over real sockets ----------------------------------------------------------


def keyed(key: str, title: str = "Buy milk", user: str = "alice") -> bytes:
    return written(
        "POST", f"/api/{user}/tasks", {"title": title}, f"Idempotency-Key: {key}", user=user
    )


def titles(path: Path, user: str) -> Counter[str]:
    return Counter(task["title"] for task in stored(path).values() if task["user_id"] == user)


@pytest.mark.parametrize("meeting", ["as they come", "in the worker threads"])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("count", [2, 16])
def test_of_simultaneous_creates_with_one_key_exactly_one_is_done_and_all_get_its_answer(
    pair: Pair, processes: int, meeting: str, count: int
) -> None:
    servers, path = pair
    user = f"{count}-{processes}-{meeting[:2]}"
    for key in ("1", "2", "3"):
        lock = path if meeting == "in the worker threads" else None
        answers = at_once(servers[:processes], [keyed(key, key, user)] * count, lock)
        assert {shown(answer) for answer in answers} == {shown(answers[0])}
        assert [is_replayed(answer) for answer in answers].count(False) == 1
    assert titles(path, user) == {"1": 1, "2": 1, "3": 1}


def test_of_simultaneous_creates_with_one_key_and_different_bodies_one_wins(pair: Pair) -> None:
    servers, path = pair
    answers = at_once(
        servers, [keyed("k", f"Buy {number}", "one-wins") for number in range(16)], path
    )
    assert Counter(answer.status_code for answer in answers) == {201: 1, 422: 15}
    [winner] = [answer.json["title"] for answer in answers if answer.status_code == 201]
    assert titles(path, "one-wins") == {winner: 1}
    for answer in answers:
        if answer.status_code == 422:
            assert assert_problem(answer, 422)["errors"][0]["field"] == "Idempotency-Key"


def test_simultaneous_creates_of_many_users_and_keys_do_not_disturb_each_other(pair: Pair) -> None:
    servers, path = pair
    wanted = [
        (user, key) for user in ("many-1", "many-2", "many-3") for key in ("1", "2", "3", "4")
    ]
    requests = [keyed(key, f"{user} {key}", user) for user, key in wanted * 3]
    answers = at_once(servers, requests, path)
    assert len({shown(answer) for answer in answers}) == len(wanted)
    assert [is_replayed(answer) for answer in answers].count(False) == len(wanted)
    for user in ("many-1", "many-2", "many-3"):
        assert titles(path, user) == {f"{user} {key}": 1 for key in "1234"}


def test_16_clients_that_each_repeat_the_same_keys_make_each_task_once(pair: Pair) -> None:
    servers, path = pair

    def work(number: int) -> list[tuple[object, ...]]:
        with Wire(servers[number % 2]) as wire:
            return [
                shown(wire.send(keyed(f"k{key}", f"task {key}", "sixteen")).answer())
                for key in range(25)
            ]

    with ThreadPoolExecutor(16) as pool:
        seen = list(pool.map(work, range(16)))
    assert seen == [seen[0]] * 16
    assert titles(path, "sixteen") == {f"task {key}": 1 for key in range(25)}


# --- When the database cannot be written ----------------------------------------------------------


@pytest.fixture
def small_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make applications wait briefly for a lock; name this fixture before `app`."""
    monkeypatch.setattr(taskd, "LOCK_TIMEOUT", 0.05)


@pytest.mark.usefixtures("small_patience")
def test_a_create_that_finds_the_database_locked_is_503_and_succeeds_when_repeated(
    alice: Person, path: Path
) -> None:
    alice.add()
    with locked(path):
        for _ in range(2):
            answer = assert_problem(create(alice, "k"), 503)
            assert answer["detail"] == "the database cannot be used right now; try again"
    assert keys(path) == []
    first = create(alice, "k")
    assert not is_replayed(first)
    with locked(path):
        assert_problem(create(alice, "new"), 503)
    assert shown(create(alice, "k")) == shown(first)
    assert [task["id"] for task in alice.call("GET").json] == [1, first.json["id"]]
    assert keys(path) == [("alice", "k")]


def test_the_event_loop_waits_for_no_lock_and_leaves_no_key(
    alice: Person, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice.add()
    with locked(path), monkeypatch.context() as hurried:
        hurried.setattr(taskd.thread_state, "in_event_loop", True)
        with pytest.raises(taskd.WouldBlock):
            create(alice, "k")
    assert keys(path) == []
    assert not is_replayed(create(alice, "k"))
    assert len(alice.call("GET").json) == 2


# What fails, between the first statement of the transaction and its end.
FAILURES = {
    "the task": "CREATE TRIGGER fails AFTER INSERT ON task BEGIN SELECT RAISE(ABORT, 'no'); END",
    "the key": (
        "CREATE TRIGGER fails AFTER INSERT ON idempotency_key BEGIN SELECT RAISE(ABORT, 'no'); END"
    ),
}


@pytest.mark.sqlite("it needs a trigger in SQLite's words")
@pytest.mark.parametrize("statement", FAILURES.values(), ids=FAILURES)
@pytest.mark.usefixtures("either_thread")
def test_whatever_fails_halfway_neither_a_task_nor_a_key_stays_behind(
    alice: Person, path: Path, statement: str
) -> None:
    first = create(alice, "first")
    age(path, DAY - timedelta(seconds=60))
    run(path, statement)
    for key in ("k", "k", "other"):
        assert_problem(create(alice, key), 500)
    assert alice.call("GET").json == [first.json]
    assert keys(path) == [("alice", "first")]
    run(path, "DROP TRIGGER fails")
    assert shown(create(alice, "first")) == shown(first)
    answers = [create(alice, "k") for _ in range(2)]
    assert [is_replayed(answer) for answer in answers] == [False, True]
    assert alice.call("GET").json == [first.json, answers[0].json]


@pytest.mark.sqlite("it is about SQLite's file")
@pytest.mark.usefixtures("either_thread")
def test_on_a_full_database_a_create_is_503_and_leaves_no_key(
    alice: Person, app: taskd.App, path: Path
) -> None:
    assert isinstance(app.store._database, taskd.Sqlite)
    sqlite = app.store._database
    for connection in (sqlite._writer, sqlite._worker_connection):
        [[pages]] = connection.execute_sql("PRAGMA page_count").fetchall()
        connection.execute_sql(f"PRAGMA max_page_count = {pages + 2}")
    task = {"title": "Dig", "description": "x" * 10_000}
    assert_problem(create(alice, "k", task), 503)
    assert keys(path) == []
    assert alice.call("GET").json == []
    # On a new connection, which does not have that limit.
    answers = [create(alice, "k", task) for _ in range(2)]
    assert [is_replayed(answer) for answer in answers] == [False, True]


# --- Restart, kill -9, and the disk ---------------------------------------------------------------


def test_a_key_survives_a_restart(start: Start, path: Path) -> None:
    server = start()
    with Wire(server) as wire:
        first = wire.send(keyed("k")).answer()
    assert server.terminate() == 0
    with Wire(start()) as wire:
        again = wire.send(keyed("k")).answer()
        assert_problem(wire.send(keyed("k", "Buy tea")).answer(), 422)
    assert shown(again) == shown(first)
    assert [is_replayed(first), is_replayed(again)] == [False, True]
    assert list(stored(path)) == [1]


class Customer:
    """A client that creates tasks one after another, and repeats each until it is answered."""

    def __init__(self, user: str, chance: random.Random) -> None:
        self.user, self.chance = user, chance
        self.answers: dict[str, tuple[Any, ...]] = {}  # by key, which is also the title
        self.waiting: str | None = None
        self.unanswered = self.found = 0

    def work(self, server: Process) -> None:
        """Create tasks until the server is gone."""
        with contextlib.suppress(OSError, AssertionError), Wire(server) as wire:
            while True:
                again = self.answers and self.chance.random() < 0.2
                self._create(
                    wire,
                    self.chance.choice(list(self.answers)) if again else f"k{len(self.answers)}",
                )

    def _create(self, wire: Wire, key: str) -> WireAnswer:
        self.waiting = key
        answer = wire.send(keyed(key, f"{self.user} {key}", self.user)).answer()
        if key in self.answers and not (is_replayed(answer) and shown(answer) == self.answers[key]):
            raise RuntimeError(f"{key} was answered otherwise: {answer.text}")
        if answer.status_code != 201:
            raise RuntimeError(f"{key} was answered {answer.status_code}: {answer.text}")
        self.answers[key] = shown(answer)
        self.waiting = None
        return answer

    def check(self, server: Process) -> None:
        """Repeat what was not answered; each key has exactly one task, that of the answer."""
        with Wire(server) as wire:
            if self.waiting:
                self.unanswered += 1
                self.found += is_replayed(self._create(wire, self.waiting))
            for key in self.chance.sample(sorted(self.answers), min(5, len(self.answers))):
                assert is_replayed(self._create(wire, key))
        tasks = server.request("GET", f"/api/{self.user}/tasks", headers=bearer(self.user)).json
        assert Counter(task["title"] for task in tasks) == {
            f"{self.user} {key}": 1 for key in self.answers
        }
        assert sorted(task["id"] for task in tasks) == sorted(
            json.loads(str(content, "utf-8"))["id"] for _, content, *_ in self.answers.values()
        )


def test_after_kill_9_at_any_moment_a_client_that_repeats_has_exactly_one_task_for_each_key(
    start: Start,
) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    customers = [
        Customer(f"user-{number}", random.Random(seed + number)) for number in range(CLIENTS)
    ]
    server = start()
    for _ in range(ROUNDS):
        done = sum(len(customer.answers) for customer in customers)
        with ThreadPoolExecutor(CLIENTS) as pool:
            working = [pool.submit(customer.work, server) for customer in customers]
            until(
                lambda: sum(len(one.answers) for one in customers) > done + 20,  # noqa: B023
                "they work",
            )
            moment = time.monotonic() + chance.uniform(0, 0.1)
            until(lambda: time.monotonic() > moment, "the moment comes")  # noqa: B023
            server.kill()
        for work in working:
            work.result()
        server = start()
        for customer in customers:
            customer.check(server)
    unanswered = sum(customer.unanswered for customer in customers)
    print(
        f"{unanswered} were not answered, "
        f"{sum(customer.found for customer in customers)} of them had been done"
    )
    assert unanswered >= ROUNDS
    assert server.terminate() == 0


# The system call of a create, on the log or to the client, at which the process dies; and whether
# the task was made.
MOMENTS = {
    "before anything is written": ("pwrite64", 1, False),
    "between the pages of the transaction": ("pwrite64", 6, False),
    "when the head of the log goes to disk": ("fsync,fdatasync", 1, False),
    "when all is written and not yet on disk": ("fsync,fdatasync", 2, True),
    "before the answer": ("sendto", 1, True),
}


@pytest.mark.sqlite("it is about SQLite's file")
@pytest.mark.parametrize(("call", "number", "done"), MOMENTS.values(), ids=MOMENTS)
def test_whatever_a_create_was_doing_when_it_died_repeating_it_makes_one_task(
    start: Start, make_app: Callable[..., taskd.App], path: Path, call: str, number: int, done: bool
) -> None:
    make_app().database.close()  # the writes of the start are done
    only = [] if call == "sendto" else ["-P", f"{path}-wal"]
    inject = ["-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={number}"]
    server = start(before=traced("-o", f"{path}.trace", *only, *inject))
    with Wire(server) as wire:
        assert wire.send(keyed("k")).is_closed()
    assert server.popen.wait(DEADLINE) == -9
    alice = Person(testing.TestClient(make_app()), "alice")
    answers = [create(alice, "k") for _ in range(2)]
    assert shown(answers[1]) == shown(answers[0])
    assert [is_replayed(answer) for answer in answers] == [done, True]
    assert alice.call("GET").json == [answers[0].json]


@pytest.mark.sqlite("it is about SQLite's file")
def test_a_create_and_its_key_reach_the_disk_together_before_the_answer(
    start: Start, path: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    calls = "trace=fsync,fdatasync,sendto,sendmsg,write,writev"
    server = start(before=traced("-y", "-s", "16", "-o", str(trace), "-e", calls))
    with Wire(server) as wire:
        assert wire.send(
            written("POST", TASKS, {"title": "the first writes the log's head"}, user="alice")
        ).answer()
        for key in ("1", "2", "3"):
            assert wire.send(keyed(key)).answer().status_code == 201
        for key in ("1", "2", "3"):
            assert is_replayed(wire.send(keyed(key)).answer())
        with locked(path):  # the same in a worker thread
            wire.send(keyed("4"))
            assert server.request("GET", "/healthz").status_code == 200
        assert not is_replayed(wire.answer())
    assert server.terminate() == 0
    until(lambda: "exited with 0" in trace.read_text(), "strace has written everything")
    synced = [0]  # number of syncs of the log before each answer to a create
    for line in trace.read_text().splitlines():
        if re.search(
            r"f(data)?sync\([0-9]+<[^>]*taskd\.db-wal>\) += 0|<\.\.\. f(data)?sync resumed>.* = 0",
            line,
        ):
            synced[-1] += 1
        elif re.search(r'(send|write)\S*\(.*"HTTP/1.1 201', line):
            synced.append(0)
    assert synced[0] >= 1
    assert synced[1:8] == [1, 1, 1, 0, 0, 0, 1], (
        "one transaction each, and none to repeat an answer"
    )

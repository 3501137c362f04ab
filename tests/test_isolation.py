"""Users see only their own tasks: checked with a model of all calls, and by the SQL that runs."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from falcon import testing
from hypothesis import HealthCheck, settings, strategies
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

import support
import taskd
from conftest import Person
from event_loop import as_the_event_loop
from support import (
    NEW_TASK,
    OTHER_SECRET,
    SECRET,
    TASK_KEYS,
    assert_problem,
    bearer,
    database_url,
    release,
)

# Ids that a careless comparison would confuse: by case, by composition (NFC, NFD), by white space,
# by a wild card, by quotes, as a number.
USERS = ["alice", "Alice", "é", "e\u0301", "alice ", "%", "1", "1.0", "' OR 1=1 --"]
FEW = "8" if support.postgresql else "25"
EXPIRED = -60  # seconds from now
TITLES = strategies.text(
    strategies.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    min_size=1,
    max_size=200,
).filter(lambda title: title.strip() != "")
TEXTS = strategies.none() | strategies.text(
    strategies.characters(exclude_categories=["Cs"], exclude_characters="\0")
)
CHANGES = strategies.fixed_dictionaries(
    {},
    optional={
        "title": TITLES,
        "description": TEXTS,
        "completed": strategies.booleans(),
        "priority": strategies.sampled_from(["low", "medium", "high", None]),
        "due_date": strategies.none()
        | strategies.dates().map(str)
        | strategies.datetimes().map(taskd.timestamp).map("{}Z".format),
        "tags": strategies.lists(
            TITLES.map(lambda title: title[:50]).filter(str.strip), max_size=3, unique=True
        ),
    },
)
PEOPLE = strategies.sampled_from(USERS)
# Each request for one task, with a body that would change it.
ON_ONE_TASK: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "", {}),
    ("HEAD", "", {}),
    ("PUT", "", {"json": {"title": "taken over"}}),
    ("PUT", "", {"json": {}}),
    ("PATCH", "", {"json": {"tags": ["taken over"]}}),
    ("DELETE", "", {}),
    ("PATCH", "/complete", {}),
    ("PATCH", "/complete", {"json": {}}),
    ("PATCH", "/complete", {"json": {"completed": True}}),
]
ON_ALL_TASKS: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "", {}),
    ("POST", "", {"json": {"title": "planted"}}),
]


def tasks_of(user: str) -> str:
    return f"/api/{quote(user, safe='')}/tasks"


class Isolation(RuleBasedStateMachine):
    """Several users on one database, and the lists they must see: `model[user]` is one list."""

    known = Bundle("known")  # (owner, id) of tasks that exist or existed

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        url = database_url(Path(self.directory.name, "taskd.db"))
        self.app = taskd.create_app(taskd.Settings(secret=SECRET, database_url=url))
        self.client = testing.TestClient(self.app)
        self.model: dict[str, list[dict[str, Any]]] = {user: [] for user in USERS}

    def teardown(self) -> None:
        self.app.database.close()
        release(Path(self.directory.name, "taskd.db"))
        self.directory.cleanup()

    def call(
        self,
        user: str,
        method: str,
        path: str,
        headers: dict[str, str] | None = None,
        **options: Any,
    ) -> testing.Result:
        return self.client.simulate_request(
            method, path, headers=headers or bearer(user), **options
        )

    def find(self, owner: str, task_id: int) -> dict[str, Any] | None:
        return next((task for task in self.model[owner] if task["id"] == task_id), None)

    def check_change(
        self, response: testing.Result, owner: str, task_id: int, changes: dict[str, Any]
    ) -> None:
        """Check the answer to a change, and make the same change to the model."""
        task = self.find(owner, task_id)
        if task is None:
            assert_problem(response, 404)
            return
        assert response.status_code == 200, response.text
        answer = response.json
        assert list(answer) == TASK_KEYS
        assert (
            answer["updated_at"] >= task["updated_at"]
            if changes
            else answer["updated_at"] == task["updated_at"]
        )
        assert answer == task | changes | {"updated_at": answer["updated_at"]}
        task.update(answer)

    # Requests of the owner.

    @initialize(target=known)
    def each_user_has_a_task(self) -> Any:
        return multiple(*(self.create(user, f"of {user}", {}) for user in USERS[:3]))

    def create(self, owner: str, title: str, more: dict[str, Any]) -> tuple[str, int]:
        new = {"title": title} | NEW_TASK | more
        response = self.call(owner, "POST", tasks_of(owner), json={"title": title} | more)
        assert response.status_code == 201, response.text
        answer = response.json
        ids = [task["id"] for tasks in self.model.values() for task in tasks]
        assert answer["id"] not in ids
        assert answer["created_at"] == answer["updated_at"]
        assert answer == {key: answer[key] for key in TASK_KEYS} | new | {"user_id": owner}
        self.model[owner].append(answer)
        return owner, answer["id"]

    @rule(target=known, owner=PEOPLE, title=TITLES, more=CHANGES)
    def the_owner_creates(self, owner: str, title: str, more: dict[str, Any]) -> tuple[str, int]:
        return self.create(owner, more.pop("title", title), more)

    @rule(target=known, owner=PEOPLE, pretended=PEOPLE, task=known)
    def the_owner_creates_in_the_name_of_another(
        self, owner: str, pretended: str, task: tuple[str, int]
    ) -> Any:
        body = {"title": "mine", "user_id": pretended, "id": task[1]}
        response = self.call(owner, "POST", tasks_of(owner), json=body)
        assert response.status_code == 201
        assert response.json["user_id"] == owner
        assert response.json["id"] != task[1]
        self.model[owner].append(response.json)
        return owner, response.json["id"]

    @rule(task=known)
    def the_owner_reads(self, task: tuple[str, int]) -> None:
        owner, task_id = task
        response = self.call(owner, "GET", f"{tasks_of(owner)}/{task_id}")
        expected = self.find(owner, task_id)
        if expected is None:
            assert_problem(response, 404)
        else:
            assert (response.status_code, response.json) == (200, expected)

    @rule(task=known, changes=CHANGES, pretended=PEOPLE)
    def the_owner_updates(
        self, task: tuple[str, int], changes: dict[str, Any], pretended: str
    ) -> None:
        owner, task_id = task
        body = changes | {"user_id": pretended, "id": 1}
        self.check_change(
            self.call(owner, "PUT", f"{tasks_of(owner)}/{task_id}", json=body),
            owner,
            task_id,
            changes,
        )

    @rule(task=known)
    def the_owner_toggles(self, task: tuple[str, int]) -> None:
        owner, task_id = task
        before = self.find(owner, task_id)
        changes = {"completed": not before["completed"]} if before else {}
        self.check_change(
            self.call(owner, "PATCH", f"{tasks_of(owner)}/{task_id}/complete"),
            owner,
            task_id,
            changes,
        )

    @rule(task=known, completed=strategies.booleans())
    def the_owner_sets(self, task: tuple[str, int], completed: bool) -> None:
        owner, task_id = task
        body = {"completed": completed}
        response = self.call(owner, "PATCH", f"{tasks_of(owner)}/{task_id}/complete", json=body)
        self.check_change(response, owner, task_id, body)

    @rule(task=consumes(known))
    def the_owner_deletes(self, task: tuple[str, int]) -> None:
        self.delete(*task)

    @rule(task=known)
    def the_owner_deletes_and_remembers(self, task: tuple[str, int]) -> None:
        self.delete(*task)

    def delete(self, owner: str, task_id: int) -> None:
        response = self.call(owner, "DELETE", f"{tasks_of(owner)}/{task_id}")
        expected = self.find(owner, task_id)
        if expected is None:
            assert_problem(response, 404)
        else:
            assert (response.status_code, response.json) == (200, expected)
            self.model[owner].remove(expected)

    # Requests of other users.

    @rule(task=known, other=PEOPLE, call=strategies.sampled_from(ON_ONE_TASK))
    def another_tries_on_the_owners_path(
        self, task: tuple[str, int], other: str, call: Any
    ) -> None:
        owner, task_id = task
        if other == owner:
            return
        method, path, options = call
        response = self.call(other, method, f"{tasks_of(owner)}/{task_id}{path}", **options)
        self.check_refusal(response, method, 403)

    @rule(owner=PEOPLE, other=PEOPLE, call=strategies.sampled_from(ON_ALL_TASKS))
    def another_lists_or_plants(self, owner: str, other: str, call: Any) -> None:
        if other == owner:
            return
        method, _, options = call
        self.check_refusal(self.call(other, method, tasks_of(owner), **options), method, 403)

    @rule(task=known, other=PEOPLE, call=strategies.sampled_from(ON_ONE_TASK))
    def another_tries_on_their_own_path(self, task: tuple[str, int], other: str, call: Any) -> None:
        owner, task_id = task
        if other == owner:
            return
        method, path, options = call
        response = self.call(other, method, f"{tasks_of(other)}/{task_id}{path}", **options)
        self.check_refusal(response, method, 404)

    @rule(
        task=known,
        foreign=strategies.booleans(),
        call=strategies.sampled_from(ON_ONE_TASK + ON_ALL_TASKS),
    )
    def a_bad_token_for_the_owner_is_tried(
        self, task: tuple[str, int], foreign: bool, call: Any
    ) -> None:
        owner, task_id = task
        method, path, options = call
        one = f"/{task_id}{path}" if call in ON_ONE_TASK else ""
        bad = {"secret": OTHER_SECRET} if foreign else {"exp": int(time.time()) + EXPIRED}
        response = self.call(
            owner, method, tasks_of(owner) + one, headers=bearer(owner, **bad), **options
        )
        self.check_refusal(response, method, 401)

    @staticmethod
    def check_refusal(response: testing.Result, method: str, status: int) -> None:
        assert response.status_code == status, response.text
        if method != "HEAD":
            assert_problem(response, status)

    # Checks after each step.

    @invariant()
    def every_user_sees_exactly_what_is_theirs(self) -> None:
        for user, tasks in self.model.items():
            response = self.call(user, "GET", tasks_of(user))
            assert (response.status_code, response.json) == (200, tasks), user


TestIsolation = pytest.mark.slow(Isolation.TestCase)
TestIsolation.settings = settings(
    max_examples=int(os.environ.get("TASKD_FUZZ_EXAMPLES", FEW)),
    stateful_step_count=30,
    deadline=None,
    derandomize=os.environ.get("CI") == "true",
    suppress_health_check=[HealthCheck.too_slow],  # a database on disk for each example
)


# --- From the inside: each statement that runs ----------------------------------------------------

COLUMNS = ", ".join(f'"{{0}}"."{name}"' for name in TASK_KEYS)
SHOWN, RETURNED = COLUMNS.format("t1"), COLUMNS.format("task") + ', "task"."version"'
# Besides those that name the owner: the statements that open a connection.
HARMLESS = re.compile(
    r"PRAGMA (journal_mode|synchronous) ?= ?\w+|BEGIN( IMMEDIATE)?|COMMIT|ROLLBACK"
    r"|(SAVEPOINT|RELEASE|ROLLBACK TO) write|SELECT 1"
)


class Recorder:
    """Every statement that SQLite runs on any connection of this process, with its values in it.

    An audit hook is told of each connection that sqlite3 makes. It cannot be removed, so there is
    one, and it does nothing while no recorder is active.
    """

    current: Recorder | None = None
    hooked = False

    def __init__(self) -> None:
        self.connections: list[sqlite3.Connection] = []
        self.statements: list[str] = []

    def start(self) -> None:
        """Listen to the open connections; it is not possible while a connection is being made."""
        for connection in self.connections:
            with contextlib.suppress(sqlite3.ProgrammingError):  # it is closed
                connection.set_trace_callback(self.statements.append)
        self.connections.clear()

    def finish(self) -> list[str]:
        """Return the statements that ran; no connection was opened in the meantime."""
        assert self.connections == []
        return [statement for statement in self.statements if not HARMLESS.fullmatch(statement)]

    @classmethod
    def hook(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "sqlite3.connect/handle" and cls.current:
            cls.current.connections.append(arguments[0])


class PostgresRecorder(Recorder):
    """Every statement that psycopg sends, with its values in it."""

    def start(self) -> None:
        """Listen to all connections."""
        import psycopg

        execute = psycopg.Cursor.execute

        def listening(cursor: Any, query: Any, values: Any = None, **options: Any) -> Any:
            text = (
                psycopg.ClientCursor(cursor.connection).mogrify(query, values) if values else query
            )
            self.statements.append(
                re.sub(r"(?<=[ (])E(?=')", "", text.replace("( E'", "(E'").replace("  E'", " E'"))
            )
            return execute(cursor, query, values, **options)

        self.undo.setattr(psycopg.Cursor, "execute", listening)

    def __init__(self, undo: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.undo = undo


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    if support.postgresql:
        yield PostgresRecorder(monkeypatch)
        return
    if not Recorder.hooked:
        sys.addaudithook(Recorder.hook)
        Recorder.hooked = True
    Recorder.current = Recorder()
    yield Recorder.current
    Recorder.current = None


def literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def bound_to(user: str) -> re.Pattern[str]:
    """Return the pattern of all statements that can touch only this user's tasks."""
    text = r"'(?:[^']|'')*'"
    name, value = re.escape(literal(user)), rf"(?:{text}|\d+|NULL|true|false)"
    columns, key_name = r'\([a-z_", ]+\)', rf'"idempotency_key"\."name" = {text}'

    def mine(table: str) -> str:
        return rf'\("{table}"\."user_id" = {name}\)'

    def this(table: str) -> str:
        return rf'\({mine(table)} AND \("{table}"\."id" = \d+\)\)'

    tag = """'%"' \\|\\| version \\|\\| '-' \\|\\| updated_at \\|\\| '"%'"""
    expected = rf"\(\({text} = '\*' OR {text} LIKE {tag}\)"
    expected += rf" AND NOT \({text} = '\*' OR {text} LIKE {tag}\)\)"
    key = rf"\({mine('idempotency_key')} AND \({key_name}\)\)"

    # Other conditions of a list only remove tasks: each OR is in its own brackets.
    searched = [
        rf"REPLACE\({name}_folded, {text}, ''\) <> {name}_folded" for name in taskd.SEARCHED
    ]
    key_of = (
        r"(?:[a-z_]+|(?:CASE|COALESCE\(|due_date \|\|)(?:(?!WHERE|user_id| OR |').|" + text + ")+?)"
    )
    more = [
        rf"\({' OR '.join(searched)}\)",
        rf"completed = {value}",
        rf"priority = {text}",
        rf"{key_of} [<>] {text}",
        rf"REPLACE\(tags, {text}, ''\) <> tags",
        r"id [<>] \d+",
        rf"\({key_of}, id\) [<>] \({text}, \d+\)",
    ]
    conditions = rf"\(*{mine('t1')}(?: AND (?:{'|'.join(more)})\)?)*"

    shown, returned = re.escape(SHOWN), re.escape(RETURNED)
    settings = rf"(?:(?!WHERE|user_id|').|{text})+"
    return re.compile(
        rf'SELECT {shown}, {key_of} FROM "task" AS "t1" WHERE {conditions}'
        rf" ORDER BY {key_of}(?: DESC)?(?:, id(?: DESC)?)? LIMIT \d+"
        rf'|SELECT "t1"\."id" FROM "task" AS "t1" WHERE {mine("t1")} LIMIT 1 OFFSET \d+'
        rf'|SELECT {shown}, "t1"\."version" FROM "task" AS "t1" WHERE {this("t1")}'
        rf'|INSERT INTO "task" \("user_id", {columns[2:]} VALUES \({name}(?:, {value})+\)'
        rf" RETURNING {returned}"
        rf'|UPDATE "task" SET {settings} WHERE \({this("task")} AND {expected}\)'
        rf" RETURNING {returned}"
        rf'|DELETE FROM "task" WHERE \({this("task")} AND {expected}\) RETURNING {returned}'
        rf'|DELETE FROM "idempotency_key"'
        rf' WHERE \({key} AND \("idempotency_key"\."created_at" < {text}\)\)'
        rf'|INSERT INTO "idempotency_key"'
        rf' \("user_id", {columns[2:]} VALUES \({name}(?:, {value})+\)'
        rf"|SELECT pg_advisory_xact_lock\(hashtext\({name}\), hashtext\({text}\)\)"
        rf'|SELECT "t1"\."body", "t1"\."answer" FROM "idempotency_key" AS "t1"'
        rf" WHERE {key.replace('idempotency_key', 't1')}",
        re.DOTALL,
    )


LISTINGS = [
    "completed=true",
    "q='",
    "sort=-title",
    "sort=updated_at&q=%25'&completed=false&limit=1",
    "sort=title&q=m",
    "priority=high&tag=it's&tag=b&due_before=2026-12-01&due_after=2020-01-01T00:00:00Z",
    "sort=due_date&completed=true",
    "sort=-priority&limit=1",
]
ROUTES: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "", {}),
    ("HEAD", "", {}),
    ("POST", "", {"json": {"title": "it's", "description": "' OR 1=1 --", "completed": True}}),
    ("POST", "", {"json": {"title": "it's"}, "headers": {"Idempotency-Key": "it's"}}),
    *(("GET", "", {"query_string": query}) for query in LISTINGS),
    *(
        (method, f"/{{id}}{path}", options)
        for method, path, options in ON_ONE_TASK
        if method != "DELETE"
    ),
    ("PUT", "/{id}", {"json": {"title": "a", "description": None, "completed": False}}),
    (
        "PUT",
        "/{id}",
        {"json": {"title": "x"}, "headers": {"If-Match": '"1-2026-11-21T00:00:00.000Z"'}},
    ),
    ("PATCH", "/{id}", {"json": {"priority": "low", "due_date": "2026-12-01", "tags": ["it's"]}}),
    ("PATCH", "/{id}/complete", {"json": {}}),
    ("DELETE", "/{id}", {"headers": {"If-Match": '"it\'s"'}}),
    ("DELETE", "/{id}", {"headers": {"If-None-Match": "*"}}),
    ("DELETE", "/{id}", {}),
]


def serve(person: Person, method: str, path: str, **options: Any) -> testing.Result:
    """Call as the server does: in the event loop, and again in a worker thread if it blocks."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(taskd.App, "__call__", as_the_event_loop(taskd.App.__call__))
        return person.call(method, path, **options)


def everything_by(person: Person, ids: list[int], call: Callable[..., testing.Result]) -> list[int]:
    """Call every route for each id, and return the statuses."""
    return [
        call(person, method, tasks_of(person.name) + path.format(id=task_id), **options).status_code
        for task_id in ids
        for method, path, options in ROUTES
    ]


THREADS = pytest.mark.parametrize(
    "call", [Person.call, serve], ids=["in_a_worker_thread", "in_the_thread_of_the_sockets"]
)


@THREADS
@pytest.mark.parametrize("name", ["alice", "o'hara", "%", "x' OR '1'='1"])
def test_every_statement_that_runs_for_a_user_is_bound_to_that_user(
    recorder: Recorder, client: testing.TestClient, name: str, call: Callable[..., testing.Result]
) -> None:
    person, other = Person(client, name), Person(client, "bob")
    theirs = [other.add()["id"] for _ in range(2)]
    mine = [
        call(person, "POST", tasks_of(name), json={"title": "mine"}).json["id"] for _ in range(2)
    ]
    assert call(person, "GET", tasks_of(name)).status_code == 200
    recorder.start()
    statuses = everything_by(person, [*mine, *theirs, 2**63 - 1], call)
    # A search's time-out on PostgreSQL is a statement that reads no rows.
    ran = [statement for statement in recorder.finish() if not statement.startswith("SET LOCAL")]
    assert set(statuses) == {200, 201, 404, 412}
    assert len(ran) >= len(statuses)
    assert {statement.split(" ", 1)[0].lstrip("(") for statement in ran} == {
        "SELECT",
        "INSERT",
        "UPDATE",
        "DELETE",
    }
    bound = bound_to(name)
    assert [statement for statement in ran if not bound.fullmatch(statement)] == []
    assert [task["id"] for task in other.call("GET").json] == theirs


@THREADS
def test_no_statement_runs_for_a_rejected_token(
    recorder: Recorder, client: testing.TestClient, call: Callable[..., testing.Result]
) -> None:
    alice, bob = Person(client, "alice"), Person(client, "bob")
    task = alice.add()
    assert call(alice, "GET", tasks_of("alice")).json == [task]
    recorder.start()
    for method, path, options in ROUTES:
        url = tasks_of("alice") + path.format(id=task["id"])
        assert call(bob, method, url, **options).status_code == 403
        for headers in (
            {"Authorization": ""},
            bearer("alice", secret=OTHER_SECRET),
            bearer("alice", exp=1),
        ):
            assert call(alice, method, url, **{**options, "headers": headers}).status_code == 401
    assert recorder.finish() == []
    assert call(alice, "GET", tasks_of("alice")).json == [task]


@pytest.mark.parametrize(
    "unbound",
    [
        f'SELECT {SHOWN} FROM "task" AS "t1" ORDER BY "t1"."id"',
        f'SELECT {SHOWN} FROM "task" AS "t1" WHERE ("t1"."id" = 1)',
        f'SELECT {SHOWN} FROM "task" AS "t1" WHERE ("t1"."user_id" = \'bob\') ORDER BY "t1"."id"',
        f'SELECT {SHOWN} FROM "task" AS "t1"'
        ' WHERE (("t1"."user_id" = \'alice\') OR ("t1"."id" = 1))',
        f'SELECT {SHOWN} FROM "task" AS "t1"'
        ' WHERE ("t1"."user_id" LIKE \'alice\') ORDER BY "t1"."id"',
        f'UPDATE "task" SET "title" = \'a\' WHERE ("task"."id" = 1) RETURNING {RETURNED}',
        'UPDATE "task" SET "user_id" = \'bob\''
        ' WHERE (("task"."user_id" = \'alice\') AND ("task"."id" = 1))'
        f" RETURNING {RETURNED}",
        'UPDATE "task" SET "title" = \'\' WHERE 1 --\''
        ' WHERE (("task"."user_id" = \'alice\') AND ("task"."id" = 1))'
        f" RETURNING {RETURNED}",
        f'DELETE FROM "task" WHERE ("task"."id" = 1) RETURNING {RETURNED}',
        'DELETE FROM "task"',
    ],
)
def test_the_form_of_a_bound_statement_does_not_fit_one_that_is_not(unbound: str) -> None:
    assert not bound_to("alice").fullmatch(unbound)
    assert not HARMLESS.fullmatch(unbound)


@pytest.mark.sqlite("it is about SQLite's connections")
def test_the_statements_of_any_connection_are_recorded(recorder: Recorder, tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "other.db")
    recorder.start()
    connection.execute("SELECT ?", ["it's"])
    connection.close()
    assert recorder.finish() == ["SELECT 'it''s'"]

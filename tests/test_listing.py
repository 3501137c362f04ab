"""A list as its parameters ask for it: narrowed, sorted, in pages, and of any length."""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import re
import sqlite3
import string
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from falcon import testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import support
import taskd
from conftest import Person
from support import (
    DEADLINE,
    Process,
    Wire,
    assert_problem,
    base64url,
    bearer,
    database_url,
    sql,
    until,
    written,
)

Start = Callable[..., Process]
TASKS = "/api/alice/tasks"
SORTS = [
    f"{sign}{name}" for sign in ("", "-") for name in ("id", "created_at", "updated_at", "title")
]


def listed(person: Person, **query: Any) -> list[dict[str, Any]]:
    response = person.call("GET", query_string=urlencode(query))
    assert response.status_code == 200, response.text
    return list(response.json)


def titles(person: Person, **query: Any) -> list[str]:
    return [task["title"] for task in listed(person, **query)]


def next_query(response: Any) -> str | None:
    """Return the query of the link to the next page (RFC 8288), or None."""
    link = response.headers.get("link")
    if link is None:
        return None
    found = re.fullmatch(r'<([^<>\s"]+)>; rel="next"', link)
    assert found, link
    path, _, query = found[1].partition("?")
    assert path.endswith("/tasks")
    return query


def walk(person: Person, **query: Any) -> Iterator[list[dict[str, Any]]]:
    """Yield the pages from the first to the last, following the links."""
    text: str | None = urlencode(query)
    while text is not None:
        response = person.call("GET", query_string=text)
        assert response.status_code == 200, response.text
        yield list(response.json)
        text = next_query(response)


def keep(path: Path, count: int, user: str = "alice") -> None:
    """Put that many tasks into the database, in taskd's form."""
    when = "2026-11-21T00:00:00.000Z"
    rows = (
        (user, f"Task {n}", f"note {n}", n % 3 == 0, when, when, f"task {n}", f"note {n}")
        for n in range(count)
    )
    columns = (
        "user_id, title, description, completed, created_at, updated_at, "
        "title_folded, description_folded"
    )
    if support.postgresql:
        copying = f"COPY task ({columns}) FROM STDIN".encode()
        with (
            support.postgresql.connect(str(path)) as session,
            session.cursor().copy(copying) as copy,
        ):
            for row in rows:
                copy.write_row(row)
        return
    with closing(sqlite3.connect(path)) as database, database:
        database.executemany(f"INSERT INTO task ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)


# --- Parameters -----------------------------------------------------------------------------------

WRONG = [
    *[("completed", value) for value in ("", "True", "1", "yes", "true ", "null", "true,false")],
    *[("q", value) for value in ("a" * 201, "\0", "a\0b")],
    *[("tag", value) for value in ("", " ", "\u2003\xa0", "a" * 51, "a\0b")],
    *[
        ("sort", value)
        for value in (
            "",
            "Id",
            "--id",
            "+id",
            "user_id",
            "id,title",
            "completed",
            "id;",
            "version",
            "-",
        )
    ],
    *[
        ("limit", value)
        for value in ("", "0", "1001", "-1", "1.0", "1e2", "05", "+5", " 5", "٣", "9" * 400, "x")
    ],
    *[("after", value) for value in ("", "x", "AAAA", "é", "a b", "=", "A" * 5000)],
]


@pytest.mark.sqlite("it is not about the database")
@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_422_and_named(alice: Person, name: str, value: str) -> None:
    for method in ("GET", "HEAD"):
        response = alice.call(method, query_string=urlencode({name: value}))
        assert response.status_code == 422
    problem = assert_problem(alice.call("GET", query_string=urlencode({name: value})), 422)
    assert [error["field"] for error in problem["errors"]] == [name]
    assert problem["errors"][0]["message"].startswith("must ")


@pytest.mark.sqlite("it is not about the database")
@pytest.mark.parametrize("name", [name for name in taskd.PARAMETERS if name != "tag"])
def test_a_parameter_that_is_given_twice_is_422_even_with_one_value(
    alice: Person, name: str
) -> None:
    good = {"completed": "true", "priority": "low", "sort": "id", "limit": "5"}.get(
        name, "2026-12-01"
    )
    problem = assert_problem(alice.call("GET", query_string=f"{name}={good}&{name}={good}"), 422)
    assert [error["field"] for error in problem["errors"]] == [name]


@pytest.mark.sqlite("it is not about the database")
@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("&".join(f"tag={n}" for n in range(21)), "must be given at most 20 times, not 21 times"),
        ("q=a&q=b&q=c", "must be given at most once, not 3 times"),
        ("q=%E9", "must be UTF-8"),
        ("tag=home&tag=%C3", "must be UTF-8"),
        ("STATUS=open", "send completed=true or completed=false"),
        ("sortBy=id", "send sort, with - before it for descending"),
        ("dueAfter=2026-12-01", "send due_after"),
        ("created_after=2026-12-01", "send one of completed, "),
    ],
)
def test_what_is_wrong_with_a_parameter_is_said(alice: Person, query: str, message: str) -> None:
    [error] = assert_problem(alice.call("GET", query_string=query), 422)["errors"]
    assert error["field"] == query.partition("=")[0]
    assert message in error["message"]


def test_a_replacement_character_can_be_searched_for(alice: Person) -> None:
    alice.add(title="\ufffd")
    assert titles(alice, q="\ufffd") == ["\ufffd"]


def test_a_query_may_have_utf_8_that_is_not_percent_encoded(server: Process) -> None:
    found = server.request("POST", TASKS, {"title": "Café", "tags": ["é"]}, bearer()).json
    for query in (b"q=caf\xc3\xa9", b"tag=\xc3\xa9&q=%C3%A9&limit=1", b"q=\xc3%A9"):
        with Wire(server) as wire:
            path = f"{TASKS}?{query.decode('latin-1')}"
            assert wire.send(written("GET", path, user="alice")).answer().json == [found]


def test_all_that_is_wrong_is_named_at_once(alice: Person) -> None:
    problem = assert_problem(
        alice.call("GET", query_string="limit=0&sort=x&completed=maybe&q=%00&unknown=1&_=1"), 422
    )
    wrong = [error["field"] for error in problem["errors"]]
    assert wrong == ["limit", "sort", "completed", "q", "unknown"]


def test_a_cursor_is_not_blamed_for_an_order_that_is_wrong_but_beside_any_other_fault(
    alice: Person,
) -> None:
    for _ in range(2):
        alice.add()
    good = cursor(alice)
    for query, wrong in (
        (f"sort=x&after={good}", ["sort"]),
        ("limit=0&after=AAAA", ["limit", "after"]),
    ):
        problem = assert_problem(alice.call("GET", query_string=query), 422)
        assert [error["field"] for error in problem["errors"]] == wrong


def test_a_cursor_behind_many_wrong_parameters_is_read_without_an_error(alice: Person) -> None:
    wrong = "&".join(f"a{number}=1" for number in range(20))
    position = base64.urlsafe_b64encode(bytes(16) + b'["aa",1]').decode()
    refused = alice.call("GET", query_string=f"{wrong}&after={position}%C3%A9%C3%A9")
    assert len(assert_problem(refused, 422)["errors"]) == 20


@pytest.mark.parametrize("query", ["", "&&", "_=1764547200", "_x=1&_x=2", "%5Fcompleted=true"])
def test_what_begins_with_an_underscore_is_ignored(alice: Person, query: str) -> None:
    tasks = [alice.add() for _ in range(3)]
    assert alice.call("GET", query_string=query).json == tasks


def test_the_token_is_looked_at_first(client: testing.TestClient, bob: Person) -> None:
    assert_problem(client.simulate_get(TASKS, query_string="limit=0"), 401)
    assert_problem(bob.call("GET", TASKS, query_string="limit=0"), 403)


def test_only_open_and_only_done_tasks(alice: Person) -> None:
    for number in range(6):
        alice.add(title=str(number), completed=number % 2 == 1)
    assert titles(alice, completed="true") == ["1", "3", "5"]
    assert titles(alice, completed="false") == ["0", "2", "4"]
    alice.call("PATCH", "/1/complete")
    assert titles(alice, completed="true") == ["0", "1", "3", "5"]


FOUND = [  # the search text, the text of the task, and whether it is found
    ("milk", "Buy Milk", True),
    ("MILK", "buy milk", True),
    ("y m", "Buy Milk", True),
    ("milk ", "Buy milk", False),
    ("%", "100 % sure", True),
    ("%", "sure", False),
    ("b%k", "Buy milk", False),
    ("_", "snake_case", True),
    ("_", "snake", False),
    ("b_y", "Buy", False),
    ("\\", "C:\\temp", True),
    ("\\", "temp", False),
    ("\\%", "100 %", False),
    ("'", "it's", True),
    ("' OR 1=1 --", "it's", False),
    ('"', 'say "ah"', True),
    ("STRASSE", "Hauptstraße 5", True),
    ("straße", "HAUPTSTRASSE", True),
    ("éCOLE", "École", True),
    ("ΣΊΣΥΦΟς", "σίσυφος", True),
    ("ПРИВЕТ", "привет", True),
    ("e\u0301", "é", False),  # composed and decomposed are two texts
    ("🌧", "Umbrella 🌧️", True),
    ("\uffff", "\ufffd", False),
    ("a", "", False),
]


@pytest.mark.parametrize("where", ["title", "description"])
@pytest.mark.parametrize(("text", "content", "there"), FOUND)
def test_a_search_takes_each_letter_as_it_is_but_for_its_case(
    alice: Person, text: str, content: str, there: bool, where: str
) -> None:
    alice.add(**{"title": "another", where: content or "another"})
    if not content:
        text = "zzz"
    assert bool(listed(alice, q=text)) == there
    alice.call("PUT", "/1", json={where: "§"})
    assert listed(alice, q=text) == []
    alice.call("PUT", "/1", json={where: content or "another"})
    assert bool(listed(alice, q=text)) == there


def test_a_change_of_one_text_leaves_the_other_to_be_found(alice: Person) -> None:
    alice.add(title="Milk", description="2 litres")
    alice.call("PUT", "/1", json={"completed": True})
    alice.call("PATCH", "/1/complete")
    assert titles(alice, q="MILK") == titles(alice, q="LITRES") == ["Milk"]
    alice.call("PUT", "/1", json={"description": "3 litres"})
    assert titles(alice, q="milk") == titles(alice, q="3") == ["Milk"]
    alice.call("PUT", "/1", json={"title": "Tea"})
    assert titles(alice, q="tea") == titles(alice, q="3") == ["Tea"]
    assert listed(alice, q="milk") == []


def test_a_description_that_is_cleared_is_found_no_more(alice: Person) -> None:
    alice.add(description="2 litres")
    alice.call("PUT", "/1", json={"description": None})
    assert listed(alice, q="litres") == []


def test_a_search_sees_nobody_elses_tasks(alice: Person, bob: Person) -> None:
    alice.add(title="secret plan")
    for query in (
        {"q": "secret"},
        {"q": "%"},
        {"q": ""},
        {"sort": "-title"},
        {"completed": "false", "limit": 1},
    ):
        assert listed(bob, **query) == []


@pytest.mark.parametrize("sort", SORTS)
def test_each_order_and_its_reverse_with_the_id_where_tasks_are_equal(
    alice: Person, sort: str
) -> None:
    for title in ("b", "a", "C", "ä", "b", "🌧", "a", "\uffff"):
        alice.add(title=title)
    for number in (3, 1, 3):
        alice.call("PATCH", f"/{number}/complete")
    everything = listed(alice)
    key = sort.lstrip("-")
    expected = sorted(
        everything, key=lambda task: (task[key], task["id"]), reverse=sort.startswith("-")
    )
    assert listed(alice, sort=sort) == expected
    assert [task for page in walk(alice, sort=sort, limit=3) for task in page] == expected


# --- Pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "limit", "sizes"), [
    (0, 1, [0]), (1, 1, [1]), (2, 1, [1, 1]), (5, 2, [2, 2, 1]), (4, 2, [2, 2]), (3, 1000, [3]),
    (7, 7, [7]),
])  # fmt: skip
def test_there_is_a_link_exactly_as_long_as_there_is_more(
    alice: Person, count: int, limit: int, sizes: list[int]
) -> None:
    tasks = [alice.add() for _ in range(count)]
    pages = list(walk(alice, limit=limit))
    assert [len(page) for page in pages] == sizes
    assert [task for page in pages for task in page] == tasks


@pytest.mark.parametrize("limit", [99, 100, 101, 999, 1000])
@pytest.mark.parametrize("sort", ["id", "-title"])
def test_a_page_of_any_size_has_as_many_tasks_and_a_link_if_one_more_follows(
    alice: Person, tmp_path: Path, limit: int, sort: str
) -> None:
    keep(tmp_path / "taskd.db", limit)
    assert [len(page) for page in walk(alice, limit=limit, sort=sort)] == [limit]
    alice.add()
    assert [len(page) for page in walk(alice, limit=limit, sort=sort)] == [limit, 1]


def test_a_list_without_a_limit_has_no_link(alice: Person) -> None:
    for _ in range(3):
        alice.add()
    assert "link" not in alice.call("GET").headers
    assert "link" not in alice.call("GET", query_string="sort=title").headers


def test_head_has_the_link_too(alice: Person) -> None:
    for _ in range(3):
        alice.add()
    link = alice.call("GET", query_string="limit=2").headers["link"]
    assert alice.call("HEAD", query_string="limit=2").headers["link"] == link


def test_the_link_keeps_the_other_parameters(alice: Person) -> None:
    for number in range(3):
        alice.add(title=f"100 % & #{number} ä+b")
    query = [
        ("q", "% & #"),
        ("sort", "-title"),
        ("limit", "1"),
        ("completed", "false"),
        ("_x", "é&="),
        ("_y", ""),
        ("_z", "1"),
        ("_z", "2"),
    ]
    following = next_query(alice.call("GET", query_string=urlencode(query)))
    assert following
    *kept, (name, _) = parse_qsl(following, keep_blank_values=True)
    assert (kept, name) == (query, "after")
    *again, (name, _) = parse_qsl(
        next_query(alice.call("GET", query_string=following)) or "", keep_blank_values=True
    )
    assert sorted([*again, (name, "")]) == sorted([*query, ("after", "")])


@pytest.mark.parametrize("name", ["a/b", "ä ö", "%", "?x=y", "<>", "a b", "."])
def test_the_link_leads_back_whatever_the_user_is_called(server: Process, name: str) -> None:
    path = f"/api/{quote(name, safe='')}/tasks"
    for _ in range(3):
        assert server.request("POST", path, {"title": "x"}, bearer(name)).status_code == 201
    answer = server.request("GET", f"{path}?limit=2", headers=bearer(name))
    link = re.fullmatch(r'<(.*)>; rel="next"', answer.headers["link"])
    assert link
    assert [task["id"] for task in server.request("GET", link[1], headers=bearer(name)).json] == [3]


def test_a_cursor_can_be_used_without_a_limit(alice: Person) -> None:
    tasks = [alice.add() for _ in range(5)]
    following = dict(parse_qsl(next_query(alice.call("GET", query_string="limit=2")) or ""))
    assert listed(alice, after=following["after"]) == tasks[2:]


def cursor(person: Person, sort: str = "id") -> str:
    following = next_query(person.call("GET", query_string=f"limit=1&sort={sort}"))
    return dict(parse_qsl(following or ""))["after"]


def refusal(person: Person, after: str, sort: str = "id") -> str:
    response = person.call("GET", query_string=urlencode({"after": after, "sort": sort}))
    problem = assert_problem(response, 422)
    assert [error["field"] for error in problem["errors"]] == ["after"]
    return str(response.text)


def test_a_cursor_that_was_tampered_with_is_422_and_reveals_nothing(alice: Person) -> None:
    for _ in range(3):
        alice.add()
    good = cursor(alice)
    letters = string.ascii_letters + string.digits + "-_"
    changed = [
        f"{good[:at]}{letters[(letters.index(good[at]) + 1) % 64]}{good[at + 1 :]}"
        for at in range(len(good))
    ]
    changed += [base64url(b"x" * 16 + end) for end in (b"", b"[1,2]", b'"x"', b"[" * 5000)]
    changed += [good[:at] for at in range(1, len(good))] + [
        f"{good}A",
        f"A{good}",
        f"{good}AAAA",
        good.swapcase(),
    ]
    assert len({refusal(alice, after) for after in changed}) == 1
    assert listed(alice, after=good)


def test_a_cursor_of_another_user_order_or_database_is_422_with_the_same_words(
    alice: Person, bob: Person, make_app: Callable[..., taskd.App], tmp_path: Path
) -> None:
    elsewhere = Person(
        testing.TestClient(make_app(database_url=database_url(tmp_path / "other.db"))), "alice"
    )
    for person in (alice, bob, elsewhere):
        for _ in range(3):
            person.add()
    refusals = {
        refusal(bob, cursor(alice)),
        refusal(alice, cursor(bob)),
        refusal(alice, cursor(elsewhere)),
    }
    for sort in SORTS:
        refusals |= {refusal(alice, cursor(alice, sort), other) for other in SORTS if other != sort}
    assert len(refusals) == 1


@pytest.mark.sqlite("it is not about the database")
def test_a_cursor_reads_as_the_position_that_it_was_written_for() -> None:
    cursors = taskd.Cursors("key")
    for number in range(500):  # so that cursors end with each letter
        for position in ((number, number), ("x" * number, number), ("é\0", number)):
            assert cursors.read(cursors.write(position, "alice", "id"), "alice", "id") == position


def test_a_sorted_page_ends_after_about_1_mib_and_its_link_leads_on(alice: Person) -> None:
    for number in range(30):
        alice.add(title=f"{number:02}", description="🌧" * 10_000)
    size = len(json.dumps(alice.call("GET", "/1").json, ensure_ascii=False).encode())
    pages = list(walk(alice, sort="-title", limit=1000))
    assert [len(page) for page in pages] == [(full := -(-(1024 * 1024) // size)), 30 - full]
    assert [task for page in pages for task in page] == listed(alice, sort="-title")


def test_a_cursor_survives_a_restart(start: Start) -> None:
    server = start()
    for _ in range(3):
        server.request("POST", TASKS, {"title": "x"}, bearer())
    link = re.fullmatch(
        "<(.*)>.*", server.request("GET", f"{TASKS}?limit=1", headers=bearer()).headers["link"]
    )
    assert link
    assert server.terminate() == 0
    assert [task["id"] for task in start().request("GET", link[1], headers=bearer()).json] == [2]


@pytest.mark.parametrize("sort", ["id", "-id", "created_at", "-created_at", "title", "-title"])
def test_a_walk_shows_what_was_there_all_the_time_exactly_once(alice: Person, sort: str) -> None:
    for number in range(60):
        alice.add(title=f"{number * 7 % 60:02}")
    stay = {task["id"] for task in listed(alice) if task["id"] % 3}
    seen: list[int] = []
    for turn, page in enumerate(walk(alice, sort=sort, limit=7)):
        seen += [task["id"] for task in page]
        gone = (turn + 1) * 3
        alice.call("DELETE", f"/{gone}")
        alice.call("DELETE", f"/{60 - gone}" if (60 - gone) % 3 == 0 else "/x")
        alice.add(title=f"{turn * 11 % 60:02}")
        alice.call("PATCH", f"/{turn * 2 + 1}/complete")
        alice.call("PUT", f"/{turn * 5 + 1}", json={"description": "changed"})
    assert sorted(number for number in seen if number in stay) == sorted(stay)
    assert len(seen) == len(set(seen))


@pytest.mark.sqlite("it counts SQLite's instructions")
def test_page_1000_costs_what_page_1_costs(app: taskd.App, tmp_path: Path) -> None:
    keep(tmp_path / "taskd.db", 20_000)
    database = app.store._database._worker_connection  # type: ignore[union-attr]
    steps: list[int] = []
    for sort, completed in itertools.product(("id", "-id"), (None, False)):
        listing: taskd.Listing | None = taskd.Listing(sort=sort, limit=10, completed=completed)
        for page in range(1000):
            assert listing
            if page in (0, 1, 999):
                steps.append(0)

                def count() -> int:
                    steps[-1] += 1
                    return 0

                database.connection().set_progress_handler(count, 10)
            _, listing = app.store.page("alice", listing)
            database.connection().set_progress_handler(None, 0)
    assert max(steps) < 2 * min(steps) + 20, steps  # tens of SQLite's instructions


texts = st.text(alphabet="aAbBßẞéÉ%_\\ ", min_size=1, max_size=4).filter(str.strip)
new_tasks = st.tuples(texts, st.none() | texts, st.booleans())
queries = st.fixed_dictionaries(
    {},
    optional={
        "completed": st.sampled_from(["true", "false"]),
        "q": st.text(alphabet="aAbBßsé%_\\", max_size=2),
        "sort": st.sampled_from(SORTS),
        "limit": st.integers(1, 4),
    },
)


@given(
    tasks=st.lists(new_tasks, max_size=9),
    asked=st.lists(queries, min_size=1, max_size=6),
    data=st.data(),
)
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_list_is_what_a_model_of_it_says(
    client: testing.TestClient,
    tasks: list[tuple[str, str | None, bool]],
    asked: list[dict[str, Any]],
    data: st.DataObject,
) -> None:
    person = Person(client, f"user-{time.monotonic_ns()}")
    model = [
        person.add(title=title, description=text, completed=done) for title, text, done in tasks
    ]
    for _ in range(data.draw(st.integers(0, 3)) if model else 0):
        at = data.draw(st.integers(0, len(model) - 1))
        model[at] = dict(person.call("PATCH", f"/{model[at]['id']}/complete").json)
    for query in asked:
        sort, q = query.get("sort", "id"), query.get("q", "").casefold()
        expected = [
            task
            for task in model
            if str(task["completed"]).lower()
            == query.get("completed", str(task["completed"]).lower())
            and any(q in (task[name] or "").casefold() for name in ("title", "description"))
        ]
        expected.sort(
            key=lambda task: (task[sort.lstrip("-")], task["id"]), reverse=sort.startswith("-")
        )
        assert [task for page in walk(person, **query) for task in page] == expected
        if "limit" in query:
            assert listed(person, **query) == expected[: query["limit"]]


# --- Lists of any length --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 99, 100, 101, 200, 201, 1001])
def test_a_list_around_the_size_of_a_piece_is_whole(
    app: taskd.App, alice: Person, tmp_path: Path, count: int
) -> None:
    keep(tmp_path / "taskd.db", count)
    assert titles(alice) == [f"Task {number}" for number in range(count)]
    assert len(listed(alice, q="TASK", sort="-title")) == count
    assert alice.call("HEAD").text == ""


@pytest.mark.parametrize(("tasks", "size"), [(7, 2**20), (1000, 1000)])
@pytest.mark.parametrize("sort", ["-title", "priority", "-due_date"])
def test_a_sorted_list_that_is_read_in_several_pages_is_whole(
    alice: Person, monkeypatch: pytest.MonkeyPatch, tasks: int, size: int, sort: str
) -> None:
    for number in range(30):
        alice.add(
            title=f"{number % 4}",
            priority=[None, "low", "high"][number % 3],
            due_date=[None, "2026-12-01"][number % 2],
        )
    expected = listed(alice, sort=sort)
    monkeypatch.setattr(taskd, "NEXT_PAGE", tasks)
    monkeypatch.setattr(taskd, "MAX_SORTED_PAGE_BYTES", size)
    assert listed(alice, sort=sort) == expected
    assert len(expected) == 30


@pytest.mark.parametrize(
    "query", ["", "?q=note", "?sort=-title", "?completed=false&sort=created_at"]
)
def test_a_long_list_over_a_socket_is_one_array(start: Start, tmp_path: Path, query: str) -> None:
    server = start()
    keep(tmp_path / "taskd.db", 9000)
    answer = server.request("GET", TASKS + query, headers=bearer())
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert len({task["id"] for task in answer.json}) == (6000 if "completed" in query else 9000)
    assert answer.content.startswith(b"[{")
    assert answer.content.endswith(b"}]")


def test_a_client_of_http_1_0_gets_it_whole(start: Start, tmp_path: Path) -> None:
    server = start()
    keep(tmp_path / "taskd.db", 1000)
    with Wire(server) as wire:
        wire.send(written("GET", TASKS, user="alice", version="1.0"))
        head, _, body = wire._file.read().partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert len(json.loads(body)) == 1000


def test_head_of_a_long_list_has_no_body(start: Start, tmp_path: Path) -> None:
    server = start()
    keep(tmp_path / "taskd.db", 3000)
    length = server.request("GET", TASKS, headers=bearer()).headers["content-length"]
    assert int(length) > taskd.MAX_LIST_IN_MEMORY
    with Wire(server) as wire:
        for _ in range(taskd.MAX_LISTS + 1):
            answer = wire.send(written("HEAD", TASKS, user="alice")).answer(bodiless=True)
            assert (answer.status_code, answer.headers["content-length"]) == (200, length)


def test_a_list_is_whole_under_another_wsgi_server_too(app: taskd.App, tmp_path: Path) -> None:
    keep(tmp_path / "taskd.db", 1000)

    class Quiet(WSGIRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with make_server("127.0.0.1", 0, app, handler_class=Quiet) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=DEADLINE)
        connection.request("GET", TASKS, headers=bearer())
        server.handle_request()
        assert len(json.loads(connection.getresponse().read())) == 1000
        connection.close()


def resident(server: Process, what: str = "VmRSS") -> int:
    """Return the resident memory in kilobytes."""
    status = Path(f"/proc/{server.popen.pid}/status").read_text()
    return int(re.findall(rf"{what}:\s+(\d+)", status)[0])


@pytest.mark.slow
@pytest.mark.sqlite("it is not about the database")
def test_a_hundred_thousand_tasks_take_no_memory_and_hold_nobody_up(
    start: Start, tmp_path: Path
) -> None:
    server = start()
    keep(tmp_path / "taskd.db", 100_000)
    assert server.request("GET", f"{TASKS}/1", headers=bearer()).status_code == 200
    idle = resident(server)
    slow = [
        Wire(server, receive_buffer=4096).send(written("GET", TASKS, user="alice"))
        for _ in range(5)
    ]
    for wire in slow:
        assert wire.socket.recv(1000).startswith(b"HTTP/1.1 200 OK")
    for _ in range(50):
        assert server.request("GET", f"{TASKS}/7", headers=bearer()).json["id"] == 7
        assert server.request("PATCH", f"{TASKS}/7/complete", headers=bearer()).status_code == 200
    answer = server.request("GET", TASKS, headers=bearer())
    assert [task["id"] for task in answer.json] == list(range(1, 100_001))
    for wire in slow:
        wire.reset()
    assert resident(server, "VmHWM") - idle < 32 * 1024
    assert server.request("GET", f"{TASKS}/7", headers=bearer()).status_code == 200


@pytest.mark.sqlite("it is not about the database")
def test_clients_that_break_off_leave_nothing_behind(start: Start, tmp_path: Path) -> None:
    server = start()
    keep(tmp_path / "taskd.db", 20_000)
    assert server.request("GET", f"{TASKS}?limit=1", headers=bearer()).status_code == 200

    def sockets() -> int:
        descriptors = Path(f"/proc/{server.popen.pid}/fd").iterdir()
        # Some may be closed in the meantime.
        return sum("socket:" in str(descriptor.resolve()) for descriptor in descriptors)

    before = sockets()
    for query in ("", "?q=note") * (taskd.MAX_LISTS_OF_USER // 2 + 1):
        wire = Wire(server, receive_buffer=4096).send(written("GET", TASKS + query, user="alice"))
        assert wire.socket.recv(100)
        wire.reset()
    until(lambda: sockets() <= before, "the connections are gone")
    assert server.request("GET", f"{TASKS}?limit=1", headers=bearer()).status_code == 200
    assert "Traceback" not in server.log


def test_sigterm_lets_a_list_be_finished_by_a_client_that_reads(
    start: Start, tmp_path: Path
) -> None:
    server = start()
    keep(tmp_path / "taskd.db", 50_000)
    with Wire(server, receive_buffer=4096) as wire:
        wire.send(written("GET", TASKS, user="alice"))
        assert wire.socket.recv(9) == b"HTTP/1.1 "
        server.popen.terminate()
        head, _, body = wire._file.read().partition(b"\r\n\r\n")
    assert head.startswith(b"200 OK\r\n")
    assert len(json.loads(body)) == 50_000
    assert server.popen.wait(DEADLINE) == 0


class Failing:
    """A store that calls a function before it reads the page of this number."""

    def __init__(self, store: taskd.TaskStore, pages: int, fail: Callable[[], object]) -> None:
        self._store, self._pages, self._fail = store, pages, fail

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    @contextlib.contextmanager
    def page_reader(self, user_id: str, listing: taskd.Listing) -> Iterator[Callable[..., Any]]:
        with self._store.page_reader(user_id, listing) as read:

            def read_or_fail(listing: taskd.Listing) -> Any:
                self._pages -= 1
                if self._pages == 0:
                    self._fail()
                return read(listing)

            yield read_or_fail


@pytest.mark.parametrize("pages", [2, 150])
def test_a_list_whose_tasks_all_vanish_in_the_middle_is_an_array_all_the_same(
    app: taskd.App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: int
) -> None:
    monkeypatch.setattr(taskd, "NEXT_PAGE", taskd.FIRST_PAGE)
    keep(tmp_path / "taskd.db", 20_000)
    store: Any = Failing(app.store, pages, lambda: sql(tmp_path / "taskd.db", "DELETE FROM task"))
    resource = taskd.TaskResource(store)
    app.add_route("/api/{user_id}/vanishing", resource, suffix="collection")
    answer = testing.TestClient(app).simulate_get("/api/alice/vanishing", headers=bearer())
    assert len(answer.json) == taskd.FIRST_PAGE * (pages - 1)


@pytest.mark.parametrize("pages", [2, 150])
def test_a_database_that_fails_in_the_middle_of_a_list_is_503(
    app: taskd.App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: int
) -> None:
    monkeypatch.setattr(taskd, "NEXT_PAGE", taskd.FIRST_PAGE)
    keep(tmp_path / "taskd.db", 20_000)

    def fail() -> None:
        raise taskd.Unavailable("the database", "it is away")

    resource = taskd.TaskResource(Failing(app.store, pages, fail))  # type: ignore[arg-type]
    app.add_route("/api/{user_id}/failing", resource, suffix="collection")
    answer = testing.TestClient(app).simulate_get("/api/alice/failing", headers=bearer())
    assert_problem(answer, 503)
    assert taskd.ListFile._sizes == {}


def test_a_long_list_is_not_read_to_its_end_when_its_client_has_left(
    app: taskd.App, alice: Person, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(tmp_path / "taskd.db", 20_000)
    monkeypatch.setattr(taskd.thread_state, "client_has_left", lambda: True, raising=False)
    for query in ("", "sort=-title", "q=note"):
        assert_problem(alice.call("GET", query_string=query), 503)
    assert taskd.ListFile._sizes == {}
    assert len(alice.call("GET", query_string="limit=9").json) == 9


def test_a_disk_without_room_for_a_long_list_is_503(
    app: taskd.App, alice: Person, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(tmp_path / "taskd.db", 20_000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    detail = assert_problem(alice.call("GET"), 503)["detail"]
    assert detail == "the disk for temporary files cannot be used right now; try again"
    with pytest.raises(taskd.Unavailable, match="No such file or directory"):
        taskd.ListFile("alice", [])
    assert taskd.ListFile._sizes == {}


@pytest.mark.sqlite("it is not about the database")
def test_the_files_of_long_lists_are_bounded_in_number_and_together_in_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(taskd, "MAX_LISTS", 3)
    monkeypatch.setattr(taskd, "MAX_LISTS_OF_USER", 2)
    monkeypatch.setattr(taskd, "MAX_LIST_BYTES", 12)
    many = ("too many long lists are being read; wait until one ends", "")
    large = ("the long lists being read are too large; wait until one ends", "")

    def refusal(user: str, *pieces: bytes) -> tuple[object, ...]:
        with pytest.raises(taskd.Busy) as caught:
            taskd.ListFile(user, pieces)
        return caught.value.args

    with taskd.ListFile("alice", [b"12", b"34"]) as first, taskd.ListFile("alice", []) as second:
        assert (first.size, first.read(), second.size, second.read()) == (4, b"1234", 0, b"")
        assert refusal("alice") == many
        with taskd.ListFile("bob", [b"123", b"456"]):
            assert refusal("carol") == many
    with taskd.ListFile("alice", [b"1234"]), taskd.ListFile("bob", [b"123"]):
        assert refusal("carol", b"123", b"456") == large
        assert refusal("alice", b"123") == large, "a user has half of the room"
    with taskd.ListFile("alice", [b"123456"]) as whole:
        assert whole.size == 6
    whole.close()  # again
    with pytest.warns(ResourceWarning):
        taskd.ListFile("alice", [b"1"])  # nobody has it: it is closed
    assert taskd.ListFile._sizes == {}


def test_more_simultaneous_long_lists_than_allowed_are_503(start: Start, tmp_path: Path) -> None:
    server = start()
    keep(tmp_path / "taskd.db", 25_000)
    sql(tmp_path / "taskd.db", "UPDATE task SET user_id = 'bob' WHERE id > 20000")
    wires = [Wire(server, receive_buffer=4096) for _ in range(taskd.MAX_LISTS_OF_USER)]
    for wire in wires:
        assert wire.send(written("GET", TASKS, user="alice")).socket.recv(12)
    refused = server.request("GET", TASKS, headers=bearer())
    assert_problem(refused, 503)
    short = server.request("GET", f"{TASKS}?completed=true&due_after=2030-01-01", headers=bearer())
    assert short.json == []
    assert "ERROR" not in server.log
    assert int(refused.headers["retry-after"]) > 0
    assert len(server.request("GET", "/api/bob/tasks", headers=bearer("bob")).json) == 5000
    wires.pop().reset()
    until(
        lambda: server.request("GET", TASKS, headers=bearer()).status_code == 200,
        "one that was broken off makes room",
    )
    for wire in wires:
        wire.close()

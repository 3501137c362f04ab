"""Priority, due date and tags: what is taken, how it is kept, and lists by them."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from falcon import testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import support
import taskd
from conftest import Person
from support import assert_problem, sql
from test_listing import listed, next_query, walk

DUE_DATES = [  # as sent, as kept
    ("2026-12-01T10:00:00Z", "2026-12-01T10:00:00.000Z"),
    ("2026-12-01t10:00:00z", "2026-12-01T10:00:00.000Z"),
    ("2026-12-01T10:00:00+02:00", "2026-12-01T08:00:00.000Z"),
    ("2026-12-31T23:30:00-01:00", "2027-01-01T00:30:00.000Z"),
    ("2026-12-01T10:00:00-00:00", "2026-12-01T10:00:00.000Z"),
    ("2026-12-01T10:00:00+23:59", "2026-11-30T10:01:00.000Z"),
    ("2026-12-01T10:00:00.1Z", "2026-12-01T10:00:00.100Z"),
    ("2026-12-01T10:00:00.9999999999999999Z", "2026-12-01T10:00:00.999Z"),
    ("2026-12-01T23:59:59.000001Z", "2026-12-01T23:59:59.000Z"),
    ("2016-12-31T23:59:60Z", "2017-01-01T00:00:00.000Z"),
    ("2016-12-31T15:59:60.5-08:00", "2017-01-01T00:00:00.000Z"),
    ("2015-06-30T23:59:60Z", "2015-07-01T00:00:00.000Z"),
    ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000Z"),
    ("9999-12-31T23:59:59.999Z", "9999-12-31T23:59:59.999Z"),
]
NO_DUE_DATES = [
    *(
        "",
        " ",
        "x",
        "2026",
        "2026-12",
        "20261201",
        "2026-W49-2",
        "2026-335",
        "2026-1-1",
        "0000-01-01",
    ),
    *(
        "2026-02-29",
        "2026-13-01",
        "2026-00-01",
        "2026-12-32",
        "2026-12-00",
        "2100-02-29",
        "10000-01-01",
    ),
    *("2026-12-01 ", " 2026-12-01", "2026-12-01\n", "-2026-12-01", "٢٠٢٦-12-01", "2026-12-01Z"),
    *("2026-12-01T10:00:00", "2026-12-01T10:00Z", "2026-12-01T10Z", "2026-12-01 10:00:00Z"),
    *(
        "2026-12-01T24:00:00Z",
        "2026-12-01T10:60:00Z",
        "2026-12-01T10:00:60Z",
        "2026-12-01T23:59:60Z",
        "2026-12-30T23:59:60Z",
        "2026-12-31T23:59:60-01:00",
        "2026-12-01T10:00:61Z",
    ),
    *("2026-12-01T10:00:00.Z", "2026-12-01T10:00:00,5Z", "2026-12-01T10:00:00+0200"),
    *("2026-12-01T10:00:00+24:00", "2026-12-01T10:00:00+02:60", "2026-12-01T10:00:00 Z"),
    *("2026-12-01T10:00:00Z\n", "2026-12-01T10:00:00ZZ", "2026-02-30T10:00:00Z", "2026-12-01\0"),
    *("0001-01-01T00:00:00+00:01", "9999-12-31T23:59:00-00:01", "9999-12-31T23:59:60Z", "tomorrow"),
]


@pytest.mark.parametrize(("sent", "kept"), DUE_DATES)
def test_a_time_is_kept_in_utc_with_milliseconds(alice: Person, sent: str, kept: str) -> None:
    assert alice.add(due_date=sent)["due_date"] == kept
    assert alice.call("PATCH", "/1", json={"due_date": kept}).json["due_date"] == kept
    assert alice.call("GET", "/1").json["due_date"] == kept


@pytest.mark.sqlite("it is not about the database")
def test_a_time_is_kept_in_utc_wherever_the_server_stands(
    alice: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Kathmandu")
        time.tzset()
        due = [alice.add(due_date=sent)["due_date"] for sent, _ in DUE_DATES]
    time.tzset()
    assert due == [kept for _, kept in DUE_DATES]


@pytest.mark.sqlite("it is not about the database")
def test_what_is_not_a_day_or_a_time_is_422_in_bodies_and_parameters(alice: Person) -> None:
    task = alice.add()
    for text in NO_DUE_DATES:
        for method, path in [("POST", ""), ("PUT", "/1"), ("PATCH", "/1")]:
            response = alice.call(method, path, json={"title": "x", "due_date": text})
            [error] = assert_problem(response, 422)["errors"]
            assert error["field"] == "due_date", ascii(text)
        for name in ("due_before", "due_after"):
            [error] = assert_problem(alice.call("GET", params={name: text}), 422)["errors"]
            assert error["field"] == name, ascii(text)
    assert alice.call("GET").json == [task]


def test_each_field_changes_alone_and_null_clears_it(alice: Person) -> None:
    more = {"priority": "low", "due_date": "2026-12-01", "tags": ["b", "a"]}
    task = alice.add(description="x", **more)
    assert {name: task[name] for name in more} == more
    for name, value in [("priority", None), ("due_date", None), ("tags", []), ("tags", ["c"])]:
        for method, sent in (("PUT", more[name]), ("PATCH", value)):
            changed = alice.call(method, "/1", json={name: sent}).json
            assert changed == task | {name: sent, "updated_at": changed["updated_at"]}
            task = changed


def test_an_empty_object_toggles_as_no_body_does(alice: Person) -> None:
    alice.add()
    for body, done in [({}, True), ({}, False), ({"id": 7}, True), ({"completed": True}, True)]:
        assert alice.call("PATCH", "/1/complete", json=body).json["completed"] is done


UNKNOWN = {
    "status=open": "completed=true or completed=false",
    "search=milk": "send q",
    "order=asc": "send sort",
    "sort_by=title": "send sort",
    "sortBy=title": "send sort",
    "sort_order=desc": "send sort",
    "tags=home": "send tag",
    "offset=20": "limit, and follow the Link",
    "skip=20": "limit, and follow the Link",
    "page=2": "limit, and follow the Link",
    "per_page=20": "send limit",
    "page_size=20": "send limit",
    "complete=true": "completed=true",
    "Completed=true": "send completed",
    "compleated=true": "send completed",
    "Search=milk": "send q",
    "SortOrder=desc": "send sort",
    "page-size=20": "send limit",
    "perPage=20": "send limit",
    "-due-=2026-12-01": "send due_before or due_after",
    "due__=2026-12-01": "send due_before or due_after",
    "xyzzy=1": "one of completed",
    "completed%5B%5D=true": "send completed",
    f"{'x' * 5000}=1": "one of completed",
}


@pytest.mark.sqlite("it is not about the database")
@pytest.mark.parametrize(("query", "hint"), UNKNOWN.items(), ids=[query[:20] for query in UNKNOWN])
def test_an_unknown_parameter_is_422_and_says_what_to_send(
    alice: Person, query: str, hint: str
) -> None:
    [error] = assert_problem(alice.call("GET", query_string=query), 422)["errors"]
    assert query.startswith(error["field"].replace("[]", "%5B%5D"))
    assert len(error["field"]) <= 100
    assert hint in error["message"]


@pytest.mark.sqlite("it is not about the database")
def test_a_thousand_unknown_parameters_are_refused_in_few_words(alice: Person) -> None:
    query = "&".join(f"x{number}=1" for number in range(1000))
    assert len(assert_problem(alice.call("GET", query_string=query), 422)["errors"]) == 20


TAGS = [
    "a",
    "A",
    "a,",
    ",a",
    ",",
    '"',
    'x"a',
    '","',
    "[",
    "]",
    '["a"]',
    "\\",
    "a\\",
    "é",
    "e\u0301",
    "%",
    "_",
    " a",
    "a ",
    "\t\u3000a",
]


def test_a_tag_is_found_exactly_and_no_other(alice: Person) -> None:
    for tag, other in itertools.product(TAGS, [[], ["b"]]):
        alice.add(tags=[*other, tag])
    alice.add(tags=["x,", ",y", 'foo"home', "home\\", "a b"])
    for tag in [*TAGS, "b", "home", "x", '","', "Home"]:
        found = listed(alice, tag=tag)
        assert found == [task for task in listed(alice) if tag in task["tags"]], tag
        assert [task["title"] for task in found] or tag in ("home", "x", "Home")
    both = alice.call("GET", query_string=urlencode([("tag", "b"), ("tag", "A")])).json
    assert [task["tags"] for task in both] == [["b", "A"]]


def test_tags_are_kept_as_databases_have_them_already(alice: Person, tmp_path: Path) -> None:
    alice.add(tags=['a"b,c', "\\", "é\n"])
    kept = r'["a\u0022b\u002cc","\\","é\n"]', 'a"b,cA\\Aé\n'
    assert sql(tmp_path / "taskd.db", "SELECT tags, tags_folded FROM task") == [kept]


def test_tags_are_searched_as_texts_each_by_itself(alice: Person) -> None:
    alice.add(title="x", tags=["Straße", "nach Hause"])
    for q, there in {"STRASSE": 1, "hause": 1, "sse": 1, '"': 0, ",": 0, "[": 0, "a": 1, "enach": 0,
                     "eanach": 0, "eAnach": 0, "\\": 0}.items():  # fmt: skip
        assert len(listed(alice, q=q)) == there, q
    alice.call("PATCH", "/1", json={"tags": []})
    assert listed(alice, q="hause") == []


def test_a_day_counts_as_its_first_moment_in_utc_and_the_bounds_are_strict(alice: Person) -> None:
    for due in (
        "2026-12-01",
        "2026-12-01T00:00:00Z",
        "2026-12-01T00:00:00.001Z",
        None,
        "2026-11-30T23:59:59.999Z",
    ):
        alice.add(due_date=due)
    for query, found in [
        ({"due_before": "2026-12-01"}, [5]),
        ({"due_before": "2026-12-01T00:00:00Z"}, [5]),
        ({"due_before": "2026-12-01T01:00:00.001+01:00"}, [1, 2, 5]),
        ({"due_before": "2026-12-01T00:00:00.000000Z"}, [5]),
        ({"due_before": "2026-12-01T00:00:00.0001Z"}, [1, 2, 5]),
        ({"due_before": "2026-12-01T00:00:00.0019999Z"}, [1, 2, 3, 5]),
        ({"due_after": "2026-12-01T00:00:00.0009Z"}, [3]),
        ({"due_after": "2026-12-01"}, [3]),
        ({"due_after": "2026-11-30"}, [1, 2, 3, 5]),
        (
            {"due_after": "2026-11-30T23:59:59.999Z", "due_before": "2026-12-01T00:00:00.001Z"},
            [1, 2],
        ),
    ]:
        assert [task["id"] for task in listed(alice, **query)] == found, query


SOME = st.sampled_from
NEW = st.fixed_dictionaries(
    {
        "title": SOME(["a", "b", "B", "é", "Straße", "🌧", "\uffff"]),
        "description": SOME([None, "a", "\\"]),
        "completed": st.booleans(),
        "priority": SOME(["low", "medium", "high", None]),
        "due_date": SOME(
            [
                *("2026-12-01", "2026-12-01T00:00:00.000Z", "2026-12-01T00:00:00.001Z"),
                *("2026-11-30T23:59:59.999Z", "2026-11-30", "0001-01-01", None, None),
            ]
        ),
        "tags": st.lists(SOME(["a", "A", "b", "c,", '"', "\\u0022", "ß"]), max_size=3, unique=True),
    }
)
ASKED = st.fixed_dictionaries(
    {"sort": SOME([f"{sign}{name}" for name in taskd.ORDERS for sign in ("", "-")])},
    optional={
        "completed": SOME(["true", "false"]),
        "priority": SOME(["low", "medium", "high"]),
        "tag": st.lists(SOME(["a", "b", "c,", '"']), min_size=1, max_size=2),
        "due_before": SOME(["2026-12-01", "2026-12-02"]),
        "due_after": SOME(["2026-11-30", "0001-01-01T00:00:00Z"]),
        "q": SOME(["a", "C", "É", "SS", '"', "\\", "u0022", "a A"]),
        "limit": st.integers(1, 7),
    },
)
RANK = {"low": 1, "medium": 2, "high": 3}


def moment(due: str) -> str:
    return due if "T" in due else f"{due}T00:00:00.000Z"


def fits(task: dict[str, Any], query: dict[str, Any]) -> bool:
    """Return whether a task is in a list, by a plain model of the contract."""
    due = task["due_date"] and moment(task["due_date"])
    texts = [task["title"], task["description"] or "", *task["tags"]]
    before, after = query.get("due_before"), query.get("due_after")
    return (
        ("completed" not in query or task["completed"] == (query["completed"] == "true"))
        and query.get("priority", task["priority"]) == task["priority"]
        and set(query.get("tag", [])) <= set(task["tags"])
        and (not before or bool(due and due < moment(before)))
        and (not after or bool(due and due > moment(after.replace("00Z", "00.000Z"))))
        and any(query.get("q", "").casefold() in text.casefold() for text in texts)
    )


def ordered(tasks: list[dict[str, Any]], sort: str) -> list[dict[str, Any]]:
    """Return tasks in an order, those without a value last in both directions, equal ones by id."""
    name, down = sort.lstrip("-"), sort.startswith("-")
    read = {"priority": RANK.__getitem__, "due_date": moment}.get(name, lambda value: value)
    there = [task for task in tasks if task[name] is not None]
    there.sort(key=lambda task: (read(task[name]), task["id"]), reverse=down)
    absent = [task for task in tasks if task[name] is None]
    return there + sorted(absent, key=lambda task: task["id"], reverse=down)


@given(
    tasks=st.lists(NEW, max_size=12), asked=st.lists(ASKED, min_size=1, max_size=5), data=st.data()
)
@settings(
    deadline=None,
    max_examples=15 if support.postgresql else 50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_lists_are_those_of_a_plain_model_also_while_tasks_change(
    client: testing.TestClient,
    tasks: list[dict[str, Any]],
    asked: list[dict[str, Any]],
    data: st.DataObject,
) -> None:
    user = Person(client, f"user-{time.monotonic_ns()}")
    model = [user.add(**task) for task in tasks]
    for query in asked:
        text = urlencode(query, doseq=True)
        expected = ordered([task for task in model if fits(task, query)], query["sort"])
        rest = {name: value for name, value in query.items() if name != "limit"}
        assert user.call("GET", query_string=urlencode(rest, doseq=True)).json == expected
        seen: list[int] = []
        link: str | None = text
        while link is not None:
            response = user.call("GET", query_string=link)
            seen += [task["id"] for task in response.json]
            link = next_query(response)
            if link and len(seen) > len(model):
                raise AssertionError("a task is on two pages")
        assert seen == [task["id"] for task in expected]
        if model and data.draw(SOME([True, False])):  # and continues with another state
            at = data.draw(st.integers(0, len(model) - 1))
            change = data.draw(NEW)
            model[at] = dict(user.call("PATCH", f"/{model[at]['id']}", json=change).json)


@pytest.mark.parametrize("sort", ["priority", "-priority", "due_date", "-due_date"])
def test_a_walk_has_what_was_there_all_the_time_once_while_others_come_and_go(
    alice: Person, sort: str
) -> None:
    values = {
        "priority": ["low", None, "high"],
        "due_date": ["2026-12-01", None, "2026-12-02T00:00:00Z"],
    }
    name = sort.lstrip("-")
    for number in range(30):
        alice.add(**{name: values[name][number % 3]})
    stay = [task["id"] for task in ordered(listed(alice), sort) if task["id"] % 5]
    seen: list[int] = []
    for turn, page in enumerate(walk(alice, sort=sort, limit=4)):
        seen += [task["id"] for task in page]
        alice.call("DELETE", f"/{5 * turn + 5}")
        alice.add(**{name: values[name][turn % 3]})
    assert [number for number in seen if number in stay] == stay
    assert len(seen) == len(set(seen))


def test_a_key_is_for_the_same_task_whatever_is_left_out_or_written_otherwise(
    alice: Person,
) -> None:
    headers = {"Idempotency-Key": "k"}
    first = {"title": "x", "due_date": "2026-12-01T01:00:00+01:00", "tags": []}
    task = alice.call("POST", json=first, headers=headers).json
    same = {"title": "x", "due_date": "2026-12-01T00:00:00Z", "priority": None, "description": None}
    again = alice.call("POST", json=same, headers=headers)
    assert (again.json, again.headers["idempotency-replayed"]) == (task, "true")
    for other in (
        {"priority": "low"},
        {"tags": ["a"]},
        {"due_date": None},
        {"due_date": "2026-12-01"},
    ):
        assert_problem(alice.call("POST", json=first | other, headers=headers), 422)


CHANGES = [
    ("PUT", "/1", {"json": {"title": "y"}}),
    ("PATCH", "/1", {"json": {"title": "y"}}),
    ("PATCH", "/1", {"json": {}}),
    ("PATCH", "/1/complete", {}),
    ("PATCH", "/1/complete", {"json": {}}),
    ("PATCH", "/1/complete", {"json": {"completed": True}}),
    ("DELETE", "/1", {}),
]


@pytest.mark.parametrize(("method", "path", "options"), CHANGES)
def test_if_none_match_keeps_a_change_from_a_task_that_has_the_tag(
    alice: Person, method: str, path: str, options: dict[str, Any]
) -> None:
    task = alice.add()
    tag, old = alice.call("GET", "/1").headers["etag"], '"1-2001-01-01T00:00:00.000Z"'
    for value in (tag, f"W/{tag}", f"{old}, {tag}", "*"):
        response = alice.call(method, path, headers={"If-None-Match": value}, **options)
        assert_problem(response, 412)
        assert response.headers["etag"] == tag
    assert alice.call("GET").json == [task]
    both = {"If-Match": old, "If-None-Match": old}
    assert alice.call(method, path, headers=both, **options).status_code == 412
    assert (
        alice.call(
            method, path.replace("1", "9"), headers={"If-None-Match": "*"}, **options
        ).status_code
        == 404
    )
    done = alice.call(method, path, headers={"If-None-Match": old, "If-Match": tag}, **options)
    assert done.status_code == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_if_match_is_looked_at_before_if_none_match_when_reading(
    alice: Person, method: str
) -> None:
    alice.add()
    tag, old = alice.call("GET", "/1").headers["etag"], '"1-2001-01-01T00:00:00.000Z"'
    for headers, status in [
        ({"If-Match": tag}, 200),
        ({"If-Match": "*"}, 200),
        ({"If-Match": old}, 412),
        ({"If-Match": f"W/{tag}"}, 412),
        ({"If-Match": old, "If-None-Match": tag}, 412),
        ({"If-Match": tag, "If-None-Match": tag}, 304),
        ({"If-Match": tag, "If-None-Match": old}, 200),
    ]:
        response = alice.call(method, "/1", headers=headers)
        assert (response.status_code, response.headers["etag"]) == (status, tag), headers
    assert alice.call(method, "/9", headers={"If-Match": old}).status_code == 404


@pytest.mark.sqlite("it is not about the database")
def test_a_user_with_many_tasks_is_sorted_and_filtered_in_a_thread_for_searches(
    app: taskd.App, alice: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taskd.thread_state, "in_event_loop", True)
    slow = [taskd.Listing(sort="title"), taskd.Listing(priority="low"), taskd.Listing(tags=("a",))]
    new = taskd.parse_body(json.dumps({"title": "x"}), taskd.NEW_TASK)
    for count in (taskd.FIRST_PAGE, 1):
        for _ in range(count):
            app.store.add("alice", new)
        for listing in slow:
            if count == 1:
                with pytest.raises(taskd.SearchWouldBlock), app.store.page_reader("alice", listing):
                    pass
            else:
                with app.store.page_reader("alice", listing) as read:
                    assert read(listing)
        with app.store.page_reader("alice", taskd.Listing(completed=False, sort="-id")):
            pass

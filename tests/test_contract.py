"""Sections 2, 3, 5, 6 and 7 of the contract as tables: tasks, routes, bodies, errors, headers."""

from __future__ import annotations

import gzip
import json
import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest
from falcon import testing

import support
import taskd
from conftest import Person
from support import (
    DEADLINE,
    NEW_TASK,
    SECRET,
    TASK_KEYS,
    assert_problem,
    bearer,
    database_url,
    empty,
    sql,
    token,
)

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
JSON = {"Content-Type": "application/json"}
KIB_64 = 64 * 1024
CLOCK = (
    "\N{ALARM CLOCK}"  # outside the basic plane: one code point, two in UTF-16, four bytes in UTF-8
)
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # five code points, shown as one character
SPACES = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680"
    "\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)  # all that Unicode or str.isspace() call white space
MAX_ID = 2**63 - 1
SAME_ON_ALL = pytest.mark.sqlite(
    "what is tested is done before or after the database, which does not differ in it"
)

COLLECTION, ITEM, COMPLETE = "/api/alice/tasks", "/api/alice/tasks/1", "/api/alice/tasks/1/complete"
ALLOWED = {
    COLLECTION: {"GET", "HEAD", "POST"},
    ITEM: {"GET", "HEAD", "PUT", "PATCH", "DELETE"},
    COMPLETE: {"PATCH"},
    "/healthz": {"GET", "HEAD"},
}
METHODS = [
    "GET",
    "HEAD",
    "POST",
    "PUT",
    "PATCH",
    "DELETE",
    "TRACE",
    "CONNECT",
    "BREW",
    "PROPFIND",
    "get",
    "Post",
]


def send(person, method, path, body, headers=JSON):
    """Send these bytes unchanged."""
    return person.call(method, path, body=body, headers=headers)


def fields(response):
    """Check a 422 and return the fields that it names."""
    problem = assert_problem(response, 422)
    assert problem["title"] == "Unprocessable Content"
    assert problem["errors"]
    assert all(set(fault) == {"field", "message"} for fault in problem["errors"])
    assert all(
        isinstance(fault["message"], str) and fault["message"] for fault in problem["errors"]
    )
    for fault in problem["errors"]:
        assert f"{fault['field']} {fault['message']}" in problem["detail"]
    return [fault["field"] for fault in problem["errors"]]


@pytest.fixture(scope="module")
def settled(tmp_path_factory):
    """Alice with one task, for all tests that change nothing."""
    path = tmp_path_factory.mktemp("settled") / "taskd.db"
    app = taskd.create_app(taskd.Settings(secret=SECRET, database_url=database_url(path)))
    alice = Person(testing.TestClient(app), "alice")
    alice.add()
    yield alice
    app.database.close()


# --- Section 2: a task ----------------------------------------------------------------------------


def test_a_task_has_these_keys_in_this_order_on_every_answer(alice):
    created = alice.call(
        "POST", json={"completed": True, "description": "2 litres", "title": "Buy milk"}
    )
    answers = [
        created,
        alice.call("GET", "/1"),
        alice.call("PUT", "/1", json={"title": "x"}),
        alice.call("PUT", "/1", json={}),
        alice.call("PATCH", "/1/complete"),
        alice.call("DELETE", "/1"),
    ]
    assert [response.status_code for response in answers] == [201, 200, 200, 200, 200, 200]
    assert [list(response.json) for response in answers] == [TASK_KEYS] * 6
    assert list(alice.add()) == TASK_KEYS
    assert [list(task) for task in alice.call("GET").json] == [TASK_KEYS]


def test_a_task_of_which_only_the_title_is_given_is_open_and_has_nothing_else(alice):
    task = alice.call("POST", json={"title": "Buy milk"}).json
    assert {name: task[name] for name in TASK_KEYS[:-2]} == {
        "id": 1,
        "user_id": "alice",
        "title": "Buy milk",
        **NEW_TASK,
    }


def test_times_are_rfc_3339_in_utc_with_milliseconds_and_of_now(alice):
    before = time.time()
    task = alice.add()
    after = time.time()
    assert TIME.fullmatch(task["created_at"])
    assert task["updated_at"] == task["created_at"]
    shown = (
        time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(before)),
        time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(after + 1)),
    )
    assert shown[0] <= task["created_at"] <= shown[1]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/1", {"title": "y"}),
        ("PATCH", "/1/complete", None),
        ("PATCH", "/1/complete", {"completed": False}),
    ],
)
def test_a_change_moves_updated_at_and_leaves_created_at(alice, method, path, body):
    task, deadline = alice.add(), time.monotonic() + DEADLINE
    changed = task
    while changed["updated_at"] == task["updated_at"] and time.monotonic() < deadline:
        changed = alice.call(method, path, json=body).json
        assert changed["created_at"] == task["created_at"]
    assert TIME.fullmatch(changed["updated_at"])
    assert changed["updated_at"] > task["updated_at"]


GOOD_VALUES = [
    ("title", "x"),
    ("title", "x" * 200),
    ("title", CLOCK * 200),
    ("title", "e\u0301" * 100),
    ("title", FAMILY * 40),
    ("title", "é"),
    ("title", "e\u0301"),
    ("title", "  padded \t"),
    ("title", "x\n" + " " * 198),
    ("title", "\u200b"),  # zero width, but not white space
    ("title", "\ufeff"),
    ("title", "\x01\x7f\x80\x9f"),
    ("title", "\ufffe\uffff\U0010ffff"),
    ("title", "\u202eRTL \u05d0"),
    ("title", '"\\/\b\f\n\r\t'),
    ("title", r"not an escape: \u0000"),
    ("title", "'; DROP TABLE task; --"),
    ("title", "%s %(title)s {title} :title ? $1"),
    ("title", "<script>alert(1)</script>"),
    ("title", "null"),
    ("description", None),
    ("description", ""),
    ("description", " "),
    ("description", "x" * 10_000),
    ("description", CLOCK * 10_000),
    ("description", SPACES),
    ("description", r"\u0000 \\u0000"),
    ("completed", True),
    ("completed", False),
    *(("priority", value) for value in ("low", "medium", "high", None)),
    *(("due_date", value) for value in ("2028-02-29", "0001-01-01", "9999-12-31", None)),
    ("due_date", "2026-12-01T09:00:00.000Z"),
    ("tags", []),
    ("tags", [f"tag {number}" for number in range(20)]),
    ("tags", ["b", "a", "B", "é", "e\u0301", " a", "a "]),
    ("tags", [CLOCK * 50, "x" * 50, FAMILY * 2]),
    ("tags", ['"', "\\", ",", '","', "]", '["a"]', "\\u0000", "'", "A", "%", "a\nb", "\ufeff"]),
]


@pytest.mark.parametrize(("name", "value"), GOOD_VALUES)
def test_a_good_value_is_stored_exactly_as_sent(alice, name, value):
    raw = json.dumps({"title": "x", name: value}, ensure_ascii=False).encode()
    escaped = json.dumps({name: value}).encode()
    created = send(alice, "POST", "", raw)
    assert (created.status_code, created.json[name]) == (201, value)
    alice.call("PUT", "/1", json={"title": "y", "description": "y", "completed": not value})
    changed = send(alice, "PUT", "/1", escaped if len(escaped) <= KIB_64 else raw)
    assert (changed.status_code, changed.json[name]) == (200, value)
    assert alice.call("GET", "/1").json[name] == value
    assert alice.call("GET").json[0][name] == value


BAD_VALUES = [
    ("title", ""),
    ("title", "x" * 201),
    ("title", CLOCK * 201),
    ("title", "e\u0301" * 101),
    ("title", " " * 201),
    ("title", None),
    ("title", 5),
    ("title", 5.5),
    ("title", 10**400),
    ("title", True),
    ("title", []),
    ("title", ["x"]),
    ("title", {}),
    ("title", {"title": "x"}),
    ("title", "\0"),
    ("title", "a\0"),
    ("title", "\0b"),
    ("description", "x" * 10_001),
    ("description", CLOCK * 10_001),
    ("description", 5),
    ("description", False),
    ("description", []),
    ("description", {"text": "x"}),
    ("description", "a\0b"),
    ("completed", None),
    ("completed", 0),
    ("completed", 1),
    ("completed", 1.0),
    ("completed", "true"),
    ("completed", ""),
    ("completed", []),
    ("completed", {}),
    *(("priority", value) for value in ("", "High", "urgent", 1, True, [], ["low"], "low\0")),
    *(("tags", value) for value in (None, "home", {}, {"a": 1}, 5, True, [None], [1], [["a"]])),
    *(
        ("tags", value)
        for value in ([""], [" "], [SPACES], ["x" * 51], [CLOCK * 51], ["a\0"], ["a", "a"])
    ),
    ("tags", [f"tag {number}" for number in range(21)]),
    *(("due_date", value) for value in (5, 1764547200, True, [], {})),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
@SAME_ON_ALL
def test_a_bad_value_is_422_and_names_the_field(settled, name, value):
    tasks = settled.call("GET").json
    bodies = [("POST", "", {"title": "x", name: value}), ("PUT", "/1", {name: value})]
    if name == "completed":
        bodies.append(("PATCH", "/1/complete", {name: value}))
    for method, path, body in bodies:
        raw = json.dumps(body, ensure_ascii=False).encode()
        assert fields(send(settled, method, path, raw)) == [name]
    assert settled.call("GET").json == tasks


@pytest.mark.parametrize("title", ["", *SPACES, SPACES, " " * 200])
@SAME_ON_ALL
def test_a_blank_title_is_422_and_called_blank(settled, title):
    for method, path in [("POST", ""), ("PUT", "/1")]:
        for escaped in (False, True):
            body = json.dumps({"title": title}, ensure_ascii=escaped).encode()
            assert assert_problem(send(settled, method, path, body), 422) == {
                "title": "Unprocessable Content",
                "status": 422,
                "detail": "title must not be blank",
                "errors": [{"field": "title", "message": "must not be blank"}],
            }


@SAME_ON_ALL
def test_a_title_that_is_missing_is_422(settled):
    for body in ({}, {"description": "x"}, {"id": 1, "user_id": "alice"}):
        assert fields(settled.call("POST", json=body)) == ["title"]


def test_ids_are_unique_across_users_and_never_used_again(alice, bob):
    assert [alice.add()["id"], bob.add()["id"], alice.add()["id"]] == [1, 2, 3]
    alice.call("DELETE", "/3")
    assert alice.add()["id"] == 4
    for number in (1, 4):
        alice.call("DELETE", f"/{number}")
    bob.call("DELETE", "/2")
    assert bob.add()["id"] == 5


def test_ids_are_never_used_again_after_a_restart_either(make_app):
    first = Person(testing.TestClient(make_app()), "alice")
    assert [first.add()["id"] for _ in range(3)] == [1, 2, 3]
    assert first.call("DELETE", "/3").status_code == 200
    first.client.app.database.close()
    second = Person(testing.TestClient(make_app()), "alice")
    assert second.add()["id"] == 4


# --- Section 3: routes ----------------------------------------------------------------------------


def test_the_list_is_an_array_oldest_first_and_stays_so_after_changes(alice):
    ids = [alice.add(title=f"Task {number}")["id"] for number in range(12)]
    alice.call("PUT", "/1", json={"title": "zzz"})
    alice.call("PATCH", "/5/complete")
    alice.call("DELETE", "/7")
    ids.remove(7)
    listed = alice.call("GET").json
    assert isinstance(listed, list)
    assert [task["id"] for task in listed] == ids


def test_a_new_tasks_location_leads_to_it(client):
    for user in (
        "alice",
        "a b",
        "a%20b",
        "a+b",
        "é",
        "e\u0301",
        "\u05d0\u202e",
        "a?b#c",
        "a;b=c,d",
        "~._-!$&'()*@:",
    ):
        person = Person(client, user)
        response = client.simulate_post(
            f"/api/{quote(user, safe='')}/tasks", headers=bearer(user), json={"title": "x"}
        )
        assert response.status_code == 201
        location = response.headers["location"]
        assert location.isascii()
        assert location.endswith(f"/tasks/{response.json['id']}")
        assert person.call("GET", location).json == response.json


def test_a_location_respects_the_place_where_the_application_is_mounted(alice):
    response = alice.call("POST", json={"title": "x"}, root_path="/todo")
    assert response.headers["location"] == "/todo/api/alice/tasks/1"


@pytest.mark.parametrize(
    ("body", "changed"),
    [
        ({}, {}),
        ({"id": 99, "user_id": "bob", "created_at": "", "updated_at": None}, {}),
        ({"title": "Oat milk"}, {"title": "Oat milk"}),
        ({"description": "x"}, {"description": "x"}),
        ({"description": ""}, {"description": ""}),
        ({"description": None}, {"description": None}),
        ({"completed": True}, {"completed": True}),
        ({"title": "Oat milk", "completed": False}, {"title": "Oat milk", "completed": False}),
        ({"description": None, "completed": True}, {"description": None, "completed": True}),
    ],
)
def test_put_changes_the_fields_that_the_body_names_and_leaves_the_rest(alice, body, changed):
    task = alice.add(
        title="Milk", description="2 litres", completed=bool(changed.get("completed") is False)
    )
    response = alice.call("PUT", "/1", json=body)
    assert response.status_code == 200
    assert response.json == task | changed | {"updated_at": response.json["updated_at"]}
    assert alice.call("GET", "/1").json == response.json


@pytest.mark.parametrize(
    "body", [{}, {"id": 99, "user_id": "bob", "created_at": "2000", "updated_at": 0}]
)
def test_put_of_nothing_changes_nothing_not_even_updated_at(alice, body):
    task, deadline = alice.add(), time.monotonic() + DEADLINE
    while alice.add()["updated_at"] == task["updated_at"] and time.monotonic() < deadline:
        pass  # until the time is another
    response = alice.call("PUT", "/1", json=body)
    assert (response.status_code, response.json) == (200, task)


def test_put_of_nothing_to_a_task_that_is_not_there_is_404(alice, bob):
    bob.add()
    for number in (1, 2):
        assert_problem(alice.call("PUT", f"/{number}", json={}), 404)


def test_a_task_that_was_read_can_be_sent_back_whole(alice):
    task = alice.add(title="Milk", description="2 litres", completed=True)
    updated = alice.call("PUT", "/1", json=task).json
    assert updated == task | {"updated_at": updated["updated_at"]}
    copy = alice.call("POST", json=task).json
    assert copy == task | {
        "id": 2,
        "created_at": copy["created_at"],
        "updated_at": copy["updated_at"],
    }
    task = updated | {"completed": False}
    assert alice.call(
        "PATCH", "/1/complete", json={"id": 1, "user_id": "alice", "completed": False}
    ).json == (task | {"updated_at": alice.call("GET", "/1").json["updated_at"]})


@pytest.mark.parametrize(
    "value",
    ["null", "-1", "1e999", "9" * 5000, '"\\u0000"', "[]", "{}", "true", '"' + "x" * 50_000 + '"'],
    ids=len,
)
def test_what_the_server_owns_is_accepted_and_ignored_whatever_its_value(alice, value):
    for number, member in enumerate(["id", "user_id", "created_at", "updated_at"], 1):
        created = send(alice, "POST", "", f'{{"title": "x", "{member}": {value}}}'.encode())
        assert created.status_code == 201
        task = created.json
        assert (task["id"], task["user_id"]) == (number, "alice")
        assert TIME.fullmatch(task["created_at"])
        changed = send(
            alice, "PUT", f"/{number}", f'{{"{member}": {value}, "title": "y"}}'.encode()
        )
        assert changed.json == task | {"title": "y", "updated_at": changed.json["updated_at"]}
        completed = send(
            alice,
            "PATCH",
            f"/{number}/complete",
            f'{{"{member}": {value}, "completed": true}}'.encode(),
        )
        assert completed.json == changed.json | {
            "completed": True,
            "updated_at": completed.json["updated_at"],
        }


@pytest.mark.parametrize(
    ("method", "path", "body", "unknown"),
    [
        ("POST", "", {"title": "x", "titel": "y"}, ["titel"]),
        ("POST", "", {"title": "x", "Title": "y"}, ["Title"]),
        ("POST", "", {"title": "x", "": 1, " title": 2}, ["", " title"]),
        ("POST", "", {"title": "x", "é\u0301\u202e": None}, ["é\u0301\u202e"]),
        ("POST", "", {"title": "x", "done": True, "ID": 4}, ["done", "ID"]),
        ("POST", "", {"title": "x", "__class__": {}, "user-id": 4}, ["__class__", "user-id"]),
        ("POST", "", {"title": "x", '"\\\n\0': 1}, ['"\\\n\0']),
        ("PUT", "/1", {"complete": True}, ["complete"]),
        ("PUT", "/1", {"description": "x", "descripton": "y"}, ["descripton"]),
        ("PATCH", "/1/complete", {"completed": True, "title": "x"}, ["title"]),
        ("PATCH", "/1/complete", {"completed": True, "done": True}, ["done"]),
    ],
)
@SAME_ON_ALL
def test_an_unknown_member_is_422_and_named(settled, method, path, body, unknown):
    tasks = settled.call("GET").json
    assert sorted(fields(settled.call(method, path, json=body))) == sorted(unknown)
    assert settled.call("GET").json == tasks


@pytest.mark.parametrize(
    ("method", "path", "body", "faulty"),
    [
        (
            "POST",
            "",
            {"title": "", "description": 5, "completed": None},
            ["title", "description", "completed"],
        ),
        ("POST", "", {"description": 5, "done": 1}, ["title", "description", "done"]),
        ("POST", "", {"title": "a\0", "description": "b\0", "x": 1}, ["title", "description", "x"]),
        ("POST", "", {"completed": "a\0"}, ["title", "completed"]),
        (
            "PUT",
            "/1",
            {"title": None, "description": [], "completed": 1},
            ["title", "description", "completed"],
        ),
        ("PUT", "/1", {"x": 1, "title": None, "y": 2}, ["x", "title", "y"]),
        ("PATCH", "/1/complete", {"completed": 1, "title": "x"}, ["completed", "title"]),
        ("PATCH", "/1/complete", {"done": True}, ["done"]),
        ("PATCH", "/1", {"title": None, "tags": None, "due": 1}, ["title", "tags", "due"]),
    ],
)  # fmt: skip
@SAME_ON_ALL
def test_all_faults_of_a_body_are_reported_at_once(settled, method, path, body, faulty):
    tasks = settled.call("GET").json
    assert sorted(fields(settled.call(method, path, json=body))) == sorted(faulty)
    assert settled.call("GET").json == tasks


@SAME_ON_ALL
def test_a_422_in_full(settled):
    response = settled.call(
        "POST", json={"title": " ", "description": 5, "completed": "yes", "titel": "x"}
    )
    assert assert_problem(response, 422) == {
        "title": "Unprocessable Content",
        "status": 422,
        "detail": "title must not be blank; "
        "description must be a string of at most 10,000 characters, or null; "
        "completed must be true or false; titel is not a field that can be set here",
        "errors": [
            {"field": "title", "message": "must not be blank"},
            {
                "field": "description",
                "message": "must be a string of at most 10,000 characters, or null",
            },
            {"field": "completed", "message": "must be true or false"},
            {"field": "titel", "message": "is not a field that can be set here"},
        ],
    }


def test_a_body_with_thousands_of_faults_gets_a_short_answer(alice):
    body = json.dumps({"x" * 50 + str(number): number for number in range(900)}).encode()
    response = send(alice, "POST", "", body)
    assert fields(response)
    assert len(response.content) < KIB_64
    response = send(alice, "POST", "", json.dumps({"title": "x", "y" * 60_000: 1}).encode())
    assert fields(response)
    assert len(response.content) < KIB_64


@pytest.mark.parametrize(
    ("bodies", "states"),
    [
        ([None, None, None], [True, False, True]),
        ([{"completed": True}, {"completed": True}], [True, True]),
        ([{"completed": False}, None, {"completed": False}], [False, True, False]),
        ([{"completed": True}, None], [True, False]),
    ],
)
def test_patch_toggles_without_a_body_and_sets_with_one(alice, bodies, states):
    task = alice.add(description="2 litres")
    answers = [alice.call("PATCH", "/1/complete", json=body) for body in bodies]
    assert [response.status_code for response in answers] == [200] * len(bodies)
    assert [response.json["completed"] for response in answers] == states
    assert answers[-1].json == task | {
        "completed": states[-1],
        "updated_at": answers[-1].json["updated_at"],
    }
    assert alice.call("GET", "/1").json == answers[-1].json


@pytest.mark.parametrize(
    "content_type", [None, "application/json", "text/plain", "application/x-www-form-urlencoded"]
)
def test_patch_toggles_without_a_body_whatever_its_content_type(alice, content_type):
    alice.add()
    headers = {"Content-Type": content_type} if content_type else {}
    response = send(alice, "PATCH", "/1/complete", b"", headers)
    assert (response.status_code, response.json["completed"]) == (200, True)


def test_concurrent_toggles_each_count(app, alice):
    alice.add()

    def toggle(_):
        try:
            return [alice.call("PATCH", "/1/complete").json["completed"] for _ in range(25)]
        finally:
            app.database.close()

    with ThreadPoolExecutor(4) as pool:
        states = [state for states in pool.map(toggle, range(4)) for state in states]
    assert (states.count(True), states.count(False)) == (50, 50)
    assert alice.call("GET", "/1").json["completed"] is False


def test_delete_answers_the_task_as_it_was_and_once(alice):
    alice.add(title="Milk", description="2 litres")
    task = alice.call("PATCH", "/1/complete").json
    response = alice.call("DELETE", "/1")
    assert (response.status_code, response.json) == (200, task)
    assert_problem(alice.call("DELETE", "/1"), 404)


def test_a_404_is_byte_for_byte_the_same_for_anothers_a_missing_and_a_deleted_task(alice, bob):
    bob.add()
    alice.add()
    alice.call("DELETE", "/2")
    for method, suffix, options in [
        ("GET", "", {}),
        ("HEAD", "", {}),
        ("PUT", "", {"json": {"title": "x"}}),
        ("PUT", "", {"json": {}}),
        ("DELETE", "", {}),
        ("PATCH", "/complete", {}),
        ("PATCH", "/complete", {"json": {"completed": True}}),
    ]:
        answers = set()
        for number in (1, 2, 3, MAX_ID):
            response = alice.call(
                method, f"/{number}{suffix}", headers={"X-Request-ID": "same"}, **options
            )
            if method != "HEAD":
                assert_problem(response, 404)
            answers.add(
                (response.status, response.content, tuple(sorted(response.headers.items())))
            )
        assert len(answers) == 1
        assert answers.pop()[0] == "404 Not Found"


def test_a_403_does_not_tell_whether_the_user_or_the_task_exists(alice, bob):
    bob.add()
    answers = {
        (response.status, response.content, tuple(sorted(response.headers.items())))
        for user in ("bob", "nobody")
        for number in (1, 2)
        for response in [
            alice.call("GET", f"/api/{user}/tasks/{number}", headers={"X-Request-ID": "same"})
        ]
    }
    assert len(answers) == 1
    assert answers.pop()[0] == "403 Forbidden"


# Texts in the place of the id in the URL.
BAD_IDS = [
    "0", "-1", "+1", "-0", "007", "01", "00", "1_0", "1.0", "1.", "1e0", "1e3", "0x1", "0b1",
    "%31%20", "%201", "1%00", "1%0A", "%EF%BC%91", "%D9%A1", "%C2%B2", "%E2%91%A0", str(2**63),
    str(2**64), str(2**64 + 1), "9" * 19, "9" * 400, "1" * 5000, "abc", "null", "NaN", "Infinity",
    "1,2", "1;2", "*", "%25", "_", "%27%20OR%201=1--", "true", "complete", "..", ".", "%2531",
    "1%FF",
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_IDS)
@SAME_ON_ALL
def test_an_id_that_is_not_a_number_from_1_to_2_to_the_63_minus_1_is_404_but_401_without_a_token(
    settled, bad
):
    tasks = settled.call("GET").json
    for method, suffix, body in [
        ("GET", "", None),
        ("PUT", "", {"title": "x"}),
        ("PUT", "", {"x": 1}),
        ("DELETE", "", None),
        ("PATCH", "/complete", None),
        ("PATCH", "/complete", {"completed": True}),
    ]:
        path = f"/api/alice/tasks/{bad}{suffix}"
        assert_problem(settled.call(method, path, json=body), 404)
        assert_problem(settled.client.simulate_request(method, path, json=body), 401)
        assert_problem(
            settled.client.simulate_request(method, path, headers=bearer("bob"), json=body), 403
        )
    assert settled.call("GET").json == tasks


def test_the_largest_id_is_an_id(alice):
    assert_problem(alice.call("GET", f"/{MAX_ID}"), 404)
    assert_problem(alice.call("PATCH", f"/{MAX_ID}/complete"), 404)


def test_an_empty_id_is_404(client, alice):
    alice.add()
    for method, path in [("PATCH", "//complete"), ("GET", "//"), ("DELETE", "//")]:
        assert_problem(alice.call(method, path), 404)
    assert_problem(client.simulate_patch("/api/alice/tasks//complete"), 401)


def test_one_trailing_slash_is_the_same_resource(client, alice):
    task = alice.call("POST", "/", json={"title": "x"}).json
    assert alice.call("GET", "/").json == [task]
    assert alice.call("GET", "/1/").json == task
    assert alice.call("HEAD", "/1/").status_code == 200
    assert alice.call("PUT", "/1/", json={}).json == task
    assert alice.call("PATCH", "/1/complete/").json["completed"] is True
    assert alice.call("DELETE", "/1/").json["id"] == 1
    for path in ("/", "/1/", "/1/complete/"):
        assert_problem(client.simulate_get(f"/api/alice/tasks{path}"), 401)
        assert_problem(client.simulate_get(f"/api/alice/tasks{path}", headers=bearer("bob")), 403)


@pytest.mark.parametrize("slashes", ["//", "///", "/" * 50])
def test_leading_slashes_do_not_lead_around_the_token(client, alice, slashes):
    alice.add(title="Milk")
    for path in ("api/alice/tasks", "api/alice/tasks/1"):
        for headers, statuses in [
            ({}, (401, 404)),
            (bearer("bob"), (403, 404)),
            (bearer("alice"), (200, 404)),
        ]:
            response = client.simulate_request(
                "GET",
                "/x",
                headers=headers,
                extras={"PATH_INFO": slashes + path, "SCRIPT_NAME": ""},
            )
            assert response.status_code in statuses
            assert ("Milk" in response.text) == (response.status_code == 200)
    response = client.simulate_request(
        "DELETE", "/x", extras={"PATH_INFO": f"{slashes}api/alice/tasks/1"}
    )
    assert response.status_code in (401, 404)
    assert alice.call("GET", "/1").status_code == 200


@pytest.mark.parametrize("path", ["", "/1", "/2", "/x", "/healthz", "/nowhere"])
@pytest.mark.parametrize("token_for", ["alice", "bob", None])
def test_head_is_get_without_the_body(client, alice, path, token_for):
    alice.add(title=CLOCK)
    path = path if path in ("/healthz", "/nowhere") else f"/api/alice/tasks{path}"
    headers = {"X-Request-ID": "same"} | (bearer(token_for) if token_for else {})
    get, head = (
        client.simulate_request(method, path, headers=headers) for method in ("GET", "HEAD")
    )
    assert head.content == b""
    assert (head.status_code, head.headers) == (get.status_code, get.headers)
    assert head.headers["content-length"] == str(len(get.content))


@pytest.mark.parametrize("path", ALLOWED)
@SAME_ON_ALL
def test_options_answers_allow_without_a_token(settled, path):
    for headers in ({}, {"Authorization": "Bearer x"}, bearer("bob")):
        response = settled.client.simulate_options(path, headers=headers)
        assert response.status_code in (200, 204)
        assert response.content == b""
        assert {method.strip() for method in response.headers["allow"].split(",")} - {
            "OPTIONS"
        } == ALLOWED[path]


@pytest.mark.parametrize("method", METHODS)
@SAME_ON_ALL
def test_any_other_method_is_405_with_allow(settled, method):
    tasks = settled.call("GET").json
    for path in [path for path, methods in ALLOWED.items() if method not in methods]:
        response = settled.client.simulate_request(method, path, headers=bearer("alice"))
        if method == "HEAD":
            assert (response.status_code, response.content) == (405, b"")
        else:
            assert assert_problem(response, 405)["title"] == "Method Not Allowed"
        assert {name.strip() for name in response.headers["allow"].split(",")} - {
            "OPTIONS"
        } == ALLOWED[path]
    assert settled.call("GET").json == tasks


@pytest.mark.parametrize("method", METHODS)
@SAME_ON_ALL
def test_without_a_token_every_method_is_401_before_it_is_405(settled, method):
    for path in (COLLECTION, ITEM, COMPLETE):
        response = settled.client.simulate_request(method, path)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == 'Bearer realm="taskd"'
        assert "allow" not in response.headers


@pytest.mark.parametrize(
    "path",
    [
        "/api", "/api/", "/api/alice", "/api/alice/", "/api/alice/task", "/api/alice/Tasks",
        "/API/alice/tasks", "/api/alice/tasks/1/completed", "/api/alice/tasks/1/complete/x",
        "/api/alice/tasks/1/2", "/tasks", "/alice/tasks", "/api/alice/x/tasks", "/favicon.ico",
        "/robots.txt", "/.env", "/taskd.db", "/healthz/x", "/api/../../etc/passwd", "/%00", "/%FF",
        "/" + "x" * 5000,
    ],
)  # fmt: skip
@SAME_ON_ALL
def test_unknown_paths_are_404(settled, path):
    for headers in ({}, bearer("alice")):
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "BREW"):
            response = settled.client.simulate_request(method, path, headers=headers)
            assert assert_problem(response, 404)["title"] == "Not Found"
        response = settled.client.simulate_head(path, headers=headers)
        assert (response.status_code, response.content) == (404, b"")


@SAME_ON_ALL
def test_healthz_needs_no_token(settled):
    for headers in ({}, {"Authorization": "Bearer x"}, bearer("bob")):
        response = settled.client.simulate_get("/healthz", headers=headers)
        assert (response.status_code, response.json) == (200, {"status": "ok"})
        assert response.headers["content-type"] == "application/json"


# --- Section 5: bodies ----------------------------------------------------------------------------

WITH_A_BODY = [("POST", ""), ("PUT", "/1"), ("PATCH", "/1/complete")]
SURROGATES = [r"\ud800", r"\udfff", r"\udc00\ud800", r"a\uD83D", r"\ud83d\u0041", r"\ud83dx\udd52"]
UNREADABLE = {
    "white space": b" \r\n\t",
    "a NUL": b"\0",
    "an open brace": b"{",
    "a closing brace": b"}",
    "an open member": b'{"title"',
    "no value": b'{"title":}',
    "an open string": b'{"title":"x',
    "an open object": b'{"title":"x"',
    "a trailing comma": b'{"title":"x",}',
    "two commas": b'{"title":"x",,"completed":true}',
    "no comma": b'{"title":"x" "completed":true}',
    "no quotes": b"{title:1}",
    "single quotes": b"{'title':'x'}",
    "a number for a name": b'{1:"x"}',
    "a comment": b'{"title":"x"/* really */}',
    "a line comment": b'// x\n{"title":"x"}',
    "trailing text": b'{"title":"x"} x',
    "trailing NUL": b'{"title":"x"}\0',
    "two objects": b'{"title":"x"}{"title":"y"}',
    "lines of objects": b'{"title":"x"}\n{"title":"y"}\n',
    "python": b'{"title":None}',
    "a form": b"title=x&completed=true",
    "xml": b"<title>x</title>",
    "NaN": b"NaN",
    "NaN in a field": b'{"title":"x","completed":NaN}',
    "Infinity": b'{"title":"x","completed":Infinity}',
    "-Infinity": b'{"title":"x","completed":-Infinity}',
    "NaN in an ignored field": b'{"title":"x","id":NaN}',
    "NaN in an unknown field": b'{"title":"x","completed":true,"x":NaN}',
    "nan in an array": b'{"title":"x","id":[1,nan]}',
    "a leading zero": b'{"title":"x","id":01}',
    "a leading plus": b'{"title":"x","id":+1}',
    "a hexadecimal number": b'{"title":"x","id":0x1}',
    "a raw tab": b'{"title":"a\tb"}',
    "a raw newline": b'{"title":"a\nb"}',
    "a raw NUL": b'{"title":"a\0b"}',
    "a raw NUL in an ignored field": b'{"title":"x","id":"a\0b"}',
    "a wrong escape": rb'{"title":"\x41"}',
    "half an escape": rb'{"title":"\u12"}',
    "a BOM": b'\xef\xbb\xbf{"title":"x"}',
    "a BOM behind": b'{"title":"x"}\xef\xbb\xbf',
    "Latin-1": b'{"title":"caf\xe9"}',
    "Latin-1 in an ignored field": b'{"title":"x","id":"caf\xe9"}',
    "0xFF": b'{"title":"\xff"}',
    "an overlong slash": b'{"title":"\xc0\xaf"}',
    "an overlong NUL": b'{"title":"\xc0\x80"}',
    "a surrogate in UTF-8": b'{"title":"\xed\xa0\x80"}',
    "beyond Unicode": b'{"title":"\xf4\x90\x80\x80"}',
    "half a character": b'{"title":"\xe2\x82"}',
    "UTF-16": '{"title":"x"}'.encode("utf-16"),
    "UTF-16LE": '{"title":"x"}'.encode("utf-16-le"),
    "UTF-16BE": '{"title":"x"}'.encode("utf-16-be"),
    "UTF-32": '{"title":"x"}'.encode("utf-32"),
    "gzip": gzip.compress(b'{"title":"x"}'),
    "open brackets": b"[" * 60_000,
    "open braces": b'{"x":' * 10_000,
    "open brackets in a title": b'{"title":' + b"[" * 60_000,
    "bottomless arrays": b"[" * 30_000 + b"]" * 30_000,
    "bottomless objects": b'{"x":' * 10_000 + b"1" + b"}" * 10_000,
    "bottomless arrays in a title": b'{"title":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "bottomless arrays in an ignored field": b'{"title":"x","id":'
    + b"[" * 30_000
    + b"]" * 30_000
    + b"}",
    "bottomless arrays in an unknown field": b'{"title":"x","y":'
    + b"[" * 30_000
    + b"]" * 30_000
    + b"}",
    **{f"{text} in a title": f'{{"title":"{text}"}}'.encode() for text in SURROGATES},
    **{
        f"{text} in a description": f'{{"title":"x","description":"{text}"}}'.encode()
        for text in SURROGATES
    },
    **{
        f"{text} in an ignored field": f'{{"title":"x","user_id":"{text}"}}'.encode()
        for text in SURROGATES
    },
    **{
        f"{text} in an ignored array": f'{{"title":"x","id":["{text}"]}}'.encode()
        for text in SURROGATES
    },
    **{f"{text} in a name": f'{{"title":"x","{text}":1}}'.encode() for text in SURROGATES},
    # The parser meets a value that is wrong first, and must still read what follows without a 500.
    **{
        f"{first[:15]} and then {then[:15]}": f"{{{first},{then}".encode()
        for first in ('"title":5', '"x":1', '"title":"\\u0000"', '"completed":"\\u0000"')
        for then in (
            "nonsense}",
            '"title":"x"',
            '"title":"x"} x',
            '"description":NaN}',
            r'"title":"\ud800"}',
            r'"description":"\ud800"}',
            r'"user_id":"\ud800"}',
            r'"\ud800":1}',
            '"description":' + "[" * 60_000,
            '"description":' + "[" * 30_000 + "]" * 30_000 + "}",
            '"y":' + "[" * 30_000 + "]" * 30_000 + "}",
        )
    },
}


@pytest.mark.parametrize("name", UNREADABLE)
@SAME_ON_ALL
def test_a_body_that_is_not_json_is_400(settled, name):
    tasks = settled.call("GET").json
    for method, path in WITH_A_BODY:
        problem = assert_problem(send(settled, method, path, UNREADABLE[name]), 400)
        assert problem["title"] == "Bad Request"
        assert "JSON" in problem["detail"]
    assert settled.call("GET").json == tasks


@pytest.mark.parametrize(
    ("text", "depth"), [('[""]', 1), (r'{"\"[":"\\","]":0}', 1), ('[{"[":["]"]}]', 3)]
)
def test_arrays_and_objects_may_be_500_deep_whatever_is_in_strings(alice, text, depth):
    strings = json.dumps('["' * 300)
    for around, status in ((499 - depth, 201), (500 - depth, 400)):
        nested = "[" * around + text + "]" * around
        body = f'{{"title":"deep","description":{strings},"id":{nested}}}'.encode()
        assert send(alice, "POST", "", body).status_code == status


@pytest.mark.parametrize(("method", "path"), [("POST", ""), ("PUT", "/1")])
@pytest.mark.parametrize("headers", [{}, JSON])
@SAME_ON_ALL
def test_an_empty_body_where_one_is_needed_is_400(settled, method, path, headers):
    tasks = settled.call("GET").json
    assert_problem(send(settled, method, path, b"", headers), 400)
    assert settled.call("GET").json == tasks


WRONG_SHAPE = [
    b"null",
    b"true",
    b"false",
    b"0",
    b"-1.5e3",
    b'"x"',
    b'""',
    b"[]",
    b'[{"title":"x"}]',
    b'["title","x"]',
]


@pytest.mark.parametrize("body", WRONG_SHAPE)
@SAME_ON_ALL
def test_json_that_is_not_an_object_is_422(settled, body):
    tasks = settled.call("GET").json
    for method, path in WITH_A_BODY:
        assert fields(send(settled, method, path, body))
    assert settled.call("GET").json == tasks


@pytest.mark.parametrize(
    "body",
    [
        b'{"title":5,"title":"x"}',
        b'{"title":"x","title":5}',
        b'{"title":" ","title":"x"}',
        rb'{"title":"\u0000","title":"x"}',
        b'{"x":1,"x":2,"title":"x"}',
        b'{"title":"x","completed":1,"completed":true}',
        rb'{"title":5,"titl\u0065":"x"}',
        b'{"title":"x","title":"y"}',
    ],
)
def test_a_member_that_is_given_twice_is_a_readable_422_or_the_last_one_counts(alice, body):
    response = send(alice, "POST", "", body)
    if response.status_code == 201:
        assert response.json["title"] == json.loads(body)["title"]
    else:
        assert fields(response)


@pytest.mark.parametrize(
    "body",
    [
        b' \r\n\t{ "title" : "x" }\n ',
        rb'{"\u0074itle":"\u0078"}',
        b'{"title":"x","id":[[[[[[{"a":[{}]}]]]]]]}',
        b'{"title":"x","completed":false,"description":null,"id":-0.0E+5}',
    ],
)
def test_unusual_but_good_json_is_read(alice, body):
    response = send(alice, "POST", "", body)
    assert (response.status_code, response.json["title"]) == (201, "x")


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json", "Application/JSON", "application/json; charset=utf-8",
        "application/json;charset=UTF-8", 'application/json; charset="utf-8"',
        "application/json ; charset=utf-8",
        "application/json;", "application/json; x=y", 'application/json; x="a;b"; charset="UTF-8"',
        "application/json;odata.metadata=minimal", "application/json; charset=utf-8; profile=x",
    ],
)  # fmt: skip
def test_json_in_utf_8_is_read(alice, content_type):
    response = send(alice, "POST", "", '{"title":"é"}'.encode(), {"Content-Type": content_type})
    assert (response.status_code, response.json["title"]) == (201, "é")


WRONG_TYPES = [
    "", "text/plain", "text/json", "text/html", "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x", "application/xml", "application/msgpack",
    "application/octet-stream", "application/jsonp", "application/json5", "application/x-ndjson",
    "application/json-patch+json", "application/merge-patch+json", "application/problem+json",
    "json", "*/*", "application/*", "application/json, text/plain",
    "application/json; charset=latin-1", "application/json; charset=iso-8859-1",
    "application/json; charset=utf-16", "application/json; charset=utf-7",
    "application/json; x=y; charset=utf-16", 'application/json; charset="latin-1"; charset',
    "application/jsonx; charset=utf-8", "application\\json",
]  # fmt: skip


@pytest.mark.parametrize("content_type", WRONG_TYPES)
@SAME_ON_ALL
def test_another_or_no_content_type_is_415(settled, content_type):
    tasks = settled.call("GET").json
    headers = {"Content-Type": content_type} if content_type else {}
    for method, path in WITH_A_BODY:
        for body in (b'{"title":"x"}', b"title=x", b"\xff"):
            assert (
                assert_problem(send(settled, method, path, body, headers), 415)["title"]
                == "Unsupported Media Type"
            )
    assert settled.call("GET").json == tasks


def test_a_body_may_say_that_it_is_not_compressed(alice):
    headers = JSON | {"Content-Encoding": "Identity"}
    assert send(alice, "POST", "", b'{"title":"x"}', headers).status_code == 201


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "x-gzip", "gzip, gzip"])
@SAME_ON_ALL
def test_a_compressed_body_is_415(settled, coding):
    tasks = settled.call("GET").json
    headers = JSON | {"Content-Encoding": coding}
    for body in (
        gzip.compress(b'{"title":"x"}'),
        b'{"title":"x"}',
        gzip.compress(b"[" * 10_000_000),
    ):
        assert_problem(send(settled, "POST", "", body, headers), 415)
    assert settled.call("GET").json == tasks


@pytest.mark.parametrize(("method", "path"), WITH_A_BODY)
def test_a_body_of_64_kib_is_read_and_one_byte_more_is_413(alice, method, path):
    task = alice.add()
    body = b'{"completed":true}' if method == "PATCH" else b'{"title":"x","completed":true}'
    assert_problem(send(alice, method, path, body.ljust(KIB_64 + 1)), 413)
    assert_problem(send(alice, method, path, body.rjust(KIB_64 + 1)), 413)
    assert alice.call("GET").json == [task]
    response = send(alice, method, path, body.ljust(KIB_64))
    assert response.status_code == (201 if method == "POST" else 200)
    assert response.json["completed"] is True


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b"x" * 1_000_000, b" " * 70_000, b'{"title":"' + b"x" * 70_000 + b'"}'],
    ids=["brackets", "text", "spaces", "title"],
)
@SAME_ON_ALL
def test_a_body_that_is_too_large_is_413_whatever_is_in_it(settled, body):
    tasks = settled.call("GET").json
    for headers in (JSON, {"Content-Type": "text/plain"}, {}):
        problem = assert_problem(send(settled, "POST", "", body, headers), 413)
        assert problem["title"] == "Content Too Large"
    assert settled.call("GET").json == tasks


@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("GET", "/1"), ("DELETE", "/1"), ("GET", "/healthz")]
)
def test_a_body_where_none_is_looked_at_is_ignored(alice, method, path):
    alice.add()
    path = path if path == "/healthz" else f"{COLLECTION}{path}"
    response = alice.client.simulate_request(method, path, headers=bearer() | JSON, body=b"\xff[[[")
    assert response.status_code == 200


# --- Section 6: errors, section 7: every answer ---------------------------------------------------

# name: (method, path, options, status); None as the user means no token
ANSWERS = {
    "list": ("GET", COLLECTION, {}, 200),
    "create": ("POST", COLLECTION, {"json": {"title": "x"}}, 201),
    "read": ("GET", ITEM, {}, 200),
    "change": ("PUT", ITEM, {"json": {"title": "x"}}, 200),
    "toggle": ("PATCH", COMPLETE, {}, 200),
    "delete": ("DELETE", ITEM, {}, 200),
    "head": ("HEAD", ITEM, {}, 200),
    "options": ("OPTIONS", ITEM, {}, 200),
    "unreadable": ("POST", COLLECTION, {"body": b"{", "content_type": "application/json"}, 400),
    "no token": ("GET", COLLECTION, {"headers": {"Authorization": "x"}}, 401),
    "bad token": ("GET", COLLECTION, {"headers": {"Authorization": "Bearer x"}}, 401),
    "another user": ("GET", "/api/bob/tasks", {}, 403),
    "no such task": ("GET", "/api/alice/tasks/99", {}, 404),
    "no such id": ("GET", "/api/alice/tasks/x", {}, 404),
    "no such path": ("GET", "/api/alice/x", {}, 404),
    "no such method": ("POST", ITEM, {}, 405),
    "unknown method": ("BREW", ITEM, {}, 405),
    "too large": (
        "POST",
        COLLECTION,
        {"body": b" " * 65_537, "content_type": "application/json"},
        413,
    ),
    "another type": ("POST", COLLECTION, {"body": b"x", "content_type": "text/plain"}, 415),
    "wrong": ("POST", COLLECTION, {"json": {}}, 422),
    "broken": ("GET", COLLECTION, {}, 500),
    "unavailable": ("GET", COLLECTION, {}, 503),
}
TITLES = {
    400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 413: "Content Too Large", 415: "Unsupported Media Type",
    422: "Unprocessable Content", 500: "Internal Server Error", 503: "Service Unavailable",
}  # fmt: skip


@pytest.fixture(scope="module")
def emptied(tmp_path_factory):
    """Applications for all tests, one for each kind of settings, without tasks."""
    made = {}

    def emptied(**settings):
        key = str(settings)
        if key not in made:
            path = tmp_path_factory.mktemp("emptied") / "taskd.db"
            url = database_url(path)
            made[key] = (
                taskd.create_app(taskd.Settings(secret=SECRET, database_url=url, **settings)),
                path,
            )
        app, path = made[key]
        empty(path)
        return app

    yield emptied
    for app, _ in made.values():
        app.database.close()


@pytest.fixture
def answer(make_app, emptied, tmp_path, monkeypatch):
    """Provoke one of ANSWERS and return it."""

    def answer(name, headers=None, **settings):
        method, path, options, status = ANSWERS[name]
        own = name == "unavailable" or support.postgresql  # whose tests give their database back
        app = make_app(**settings) if own else emptied(**settings)
        alice = Person(testing.TestClient(app), "alice")
        alice.add()
        if name == "broken":
            monkeypatch.setattr(app.store, "page", broken)
        if name == "unavailable":
            app.database.close()
            move_away(tmp_path / "taskd.db")
        headers = (headers or {}) | options.get("headers", {})
        response = alice.call(method, path, **(options | {"headers": headers}))
        assert response.status_code == status, response.text
        return response

    return answer


def move_away(database):
    if support.postgresql:
        sql(database, "ALTER TABLE task RENAME TO away")
    else:
        database.rename(database.with_name("away.db"))
        database.mkdir()


def broken(user_id, listing):
    raise RuntimeError(f"the innermost secret of {user_id}")


@pytest.fixture
def lines():
    """What taskd logs during the test, formatted as an operator sees it."""
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(taskd.TextLines().format(record).partition(" ")[2])
    logger = logging.getLogger("taskd")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("DEBUG")
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.parametrize("name", ANSWERS)
def test_every_answer_has_the_headers_of_section_7(answer, name):
    response = answer(name)
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", response.headers["x-request-id"])
    assert "server" not in response.headers
    assert not [header for header in response.headers if header.startswith("access-control-")]
    assert "set-cookie" not in response.headers


@pytest.mark.parametrize(
    "accept", ["application/json", "text/html", "application/xml", "*/*;q=0", ""]
)
@pytest.mark.parametrize("name", [name for name, row in ANSWERS.items() if row[3] >= 400])
@SAME_ON_ALL
def test_every_error_is_problem_json_whatever_the_client_accepts(answer, name, accept):
    status = ANSWERS[name][3]
    problem = assert_problem(answer(name, {"Accept": accept}), status)
    assert list(problem) == ["title", "status", "detail", "errors"][: 4 if status == 422 else 3]
    assert problem["title"] == TITLES[status]
    assert isinstance(problem["detail"], str)


@pytest.mark.parametrize(
    "accept", ["application/json", "text/html", "application/xml", "*/*;q=0", ""]
)
@pytest.mark.parametrize("name", ["list", "read", "create"])
@SAME_ON_ALL
def test_every_success_is_json_whatever_the_client_accepts(answer, name, accept):
    assert answer(name, {"Accept": accept}).headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("name", "given"), list(zip(ANSWERS, ["x", "A-Z.a_z-09", "7" * 64] * 8, strict=False))
)
@SAME_ON_ALL
def test_a_request_id_is_given_back(answer, lines, name, given):
    assert answer(name, {"X-Request-ID": given}).headers["x-request-id"] == given
    assert any(given in line for line in lines)


@pytest.mark.parametrize(
    "given",
    [
        "", "x" * 65, "a b", "a,b", "x, y", "a/b", "a:b", "é", "a\tb", "<script>", '"x"', "a%20b",
        "x;y", "x\\",
    ],
)  # fmt: skip
@SAME_ON_ALL
def test_a_request_id_that_cannot_stand_in_a_log_is_replaced(settled, lines, given):
    ids = {
        settled.client.simulate_get(path, headers={"X-Request-ID": given} | headers).headers[
            "x-request-id"
        ]
        for path, headers in [
            (COLLECTION, bearer()),
            (COLLECTION, {}),
            ("/nowhere", {}),
            ("/healthz", {}),
        ]
    }
    assert len(ids) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{8,64}", new) for new in ids)
    assert given not in ids
    assert all(any(new in line for line in lines) for new in ids)


def test_every_request_has_one_line_in_the_log_and_nothing_secret_is_in_it(alice, lines):
    secret = token("alice")
    headers = {"Authorization": f"Bearer {secret}"}
    alice.client.simulate_post(
        f"{COLLECTION}?token={secret}", headers=headers, json={"title": "Milk", "x": "Cream"}
    )
    alice.client.simulate_post(
        COLLECTION, headers=headers, json={"title": "Milk", "description": "Cream"}
    )
    alice.client.simulate_get(ITEM, headers=headers)
    alice.client.simulate_get(ITEM, headers={"Authorization": f"Bearer {secret}x"})
    alice.client.simulate_get("/nowhere/Milk?Cream", headers=headers)
    assert len(lines) == 5
    for line, parts in zip(
        lines,
        [
            ("POST", "/api/{user_id}/tasks", "422", "alice"),
            ("POST", "/api/{user_id}/tasks", "201", "alice"),
            ("GET", "/api/{user_id}/tasks/{task_id}", "200", "alice"),
            ("GET", "/api/{user_id}/tasks/{task_id}", "401"),
            ("GET", "404"),
        ],
        strict=True,
    ):
        assert all(part in line for part in parts)
        assert re.search(r"\d(\.\d+)? ?ms", line)
        assert "Milk" not in line
        assert "Cream" not in line
        assert secret[:20] not in line


def test_a_user_id_cannot_forge_a_line_in_the_log(client, lines):
    user = "alice\n2026-11-20T21:00:00.000Z INFO GET forged 200\r\u2028\x1b[2J"
    response = client.simulate_get(f"/api/{quote(user, safe='')}/tasks", headers=bearer(user))
    assert response.status_code == 200
    assert len(lines) == 1
    assert lines[0].isprintable()


def test_a_500_shows_the_request_id_and_nothing_else_and_logs_the_traceback(answer, lines):
    response = answer("broken", {"X-Request-ID": "quote-me"})
    problem = assert_problem(response, 500)
    assert problem["title"] == "Internal Server Error"
    assert "quote-me" in problem["detail"]
    for hidden in ("innermost", "RuntimeError", "Traceback", "alice", ".py"):
        assert hidden not in response.text
    logged = [line for line in lines if "Traceback" in line]
    assert len(logged) == 1
    assert "quote-me" in logged[0]
    assert "RuntimeError: the innermost secret of alice" in logged[0]
    assert "in broken" in logged[0]


# --- Section 7: CORS ------------------------------------------------------------------------------

ORIGINS = ("https://app.example", "http://localhost:3000")
FOREIGN = [
    "https://evil.example", "http://app.example", "https://app.example:8443",
    "https://app.example.evil.example", "https://xapp.example", "https://APP.example",
    "https://app.example/", "https://app.example,http://localhost:3000",
    "https://app.example http://localhost:3000", "null", "*", "",
]  # fmt: skip


def varies_by_origin(response):
    return "origin" in [
        name.strip().lower() for name in response.headers.get("vary", "").split(",")
    ]


@pytest.mark.parametrize(("name", "origin"), list(zip(ANSWERS, ORIGINS * 11, strict=True)))
@SAME_ON_ALL
def test_every_answer_can_be_read_by_a_page_of_a_configured_origin(answer, name, origin):
    response = answer(name, {"Origin": origin}, cors_origins=ORIGINS)
    assert response.headers["access-control-allow-origin"] == origin
    exposed = {
        header.strip() for header in response.headers["access-control-expose-headers"].split(",")
    }
    assert exposed == {
        "Location", "Link", "ETag", "X-Request-ID", "Idempotency-Replayed", "Retry-After",
        "WWW-Authenticate",
    }  # fmt: skip
    assert "access-control-allow-credentials" not in response.headers
    assert varies_by_origin(response)


@pytest.mark.parametrize("origin", FOREIGN)
@pytest.mark.parametrize("name", ["list", "no token"])
@SAME_ON_ALL
def test_no_answer_can_be_read_by_a_page_of_another_origin(answer, name, origin):
    response = answer(name, {"Origin": origin}, cors_origins=ORIGINS)
    assert not [header for header in response.headers if header.startswith("access-control-")]
    assert varies_by_origin(response)


@SAME_ON_ALL
def test_an_answer_without_an_origin_varies_by_origin_too(answer):
    response = answer("list", cors_origins=ORIGINS)
    assert not [header for header in response.headers if header.startswith("access-control-")]
    assert varies_by_origin(response)


@pytest.mark.parametrize("name", ANSWERS)
@SAME_ON_ALL
def test_without_cors_origins_no_answer_has_cors_headers(answer, name):
    response = answer(name, {"Origin": ORIGINS[0], "Access-Control-Request-Method": "GET"})
    assert not [header for header in response.headers if header.startswith("access-control-")]


def preflight(client, path, method, origin=ORIGINS[0]):
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type,x-anything",
    }
    return client.simulate_options(path, headers=headers)


@pytest.mark.parametrize("path", ALLOWED)
@SAME_ON_ALL
def test_a_preflight_needs_no_token_and_says_what_is_allowed(make_app, path):
    client = testing.TestClient(make_app(cors_origins=ORIGINS))
    for method in ALLOWED[path]:
        response = preflight(client, path, method)
        assert response.status_code in (200, 204)
        assert response.headers["access-control-allow-origin"] == ORIGINS[0]
        methods = {
            name.strip() for name in response.headers["access-control-allow-methods"].split(",")
        }
        assert methods - {"OPTIONS"} == ALLOWED[path]
        allowed = {
            name.strip() for name in response.headers["access-control-allow-headers"].split(",")
        }
        assert allowed >= {
            "Authorization", "Content-Type", "If-Match", "If-None-Match", "Idempotency-Key",
            "X-Request-ID",
        }  # fmt: skip
        assert "x-anything" in allowed, "a page of a listed origin may send any header"
        assert {name.strip() for name in response.headers["allow"].split(",")} - {
            "OPTIONS"
        } == ALLOWED[path]
        assert varies_by_origin(response)


@pytest.mark.parametrize("origin", FOREIGN)
@SAME_ON_ALL
def test_a_preflight_of_another_origin_is_allowed_nothing(make_app, origin):
    client = testing.TestClient(make_app(cors_origins=ORIGINS))
    response = preflight(client, COLLECTION, "POST", origin)
    assert not [header for header in response.headers if header.startswith("access-control-")]
    assert response.content == b""


@SAME_ON_ALL
def test_a_preflight_without_cors_origins_is_allowed_nothing(client):
    response = preflight(client, COLLECTION, "POST")
    assert response.status_code in (200, 204)
    assert not [header for header in response.headers if header.startswith("access-control-")]


def test_a_preflight_does_nothing(make_app):
    app = make_app(cors_origins=ORIGINS)
    alice = Person(testing.TestClient(app), "alice")
    task = alice.add()
    for path in (COLLECTION, ITEM, COMPLETE):
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
            response = preflight(alice.client, path, method)
            assert response.content == b""
    assert alice.call("GET").json == [task]


@pytest.mark.parametrize(
    ("body", "faults"),
    [
        ({}, [("title", "is missing")]),
        ({"title": ""}, [("title", "must not be blank")]),
        ({"title": "x" * 201}, [("title", "must be a string of 1 to 200 characters")]),
        ({"title": 5}, [("title", "must be a string of 1 to 200 characters")]),
        ({"title": "a\0b"}, [("title", "must not contain U+0000")]),
        (
            {"title": "x", "description": " " * 10_001},
            [("description", "must be a string of at most 10,000 characters, or null")],
        ),
        ({"title": "x", "description": "\0"}, [("description", "must not contain U+0000")]),
        ({"title": "x", "completed": "yes"}, [("completed", "must be true or false")]),
        ({"title": "x", "titel": "y"}, [("titel", "is not a field that can be set here")]),
        ([], [("body", "must be a JSON object")]),
    ],
)
@SAME_ON_ALL
def test_each_fault_is_told_in_these_words(alice, body, faults):
    problem = assert_problem(alice.call("POST", json=body), 422)
    assert problem["errors"] == [{"field": field, "message": message} for field, message in faults]
    assert problem["detail"] == "; ".join(f"{field} {message}" for field, message in faults)


@pytest.mark.parametrize("value", ["1e999", "-1e999", "9" * 5000, "[]", "{}", "null", "true"])
def test_a_title_that_is_not_a_string_is_told_so_whatever_it_is(alice, value):
    refused = send(alice, "POST", "", f'{{"title": {value}}}'.encode())
    rule = "must be a string of 1 to 200 characters"
    assert assert_problem(refused, 422)["errors"] == [{"field": "title", "message": rule}]


@pytest.mark.parametrize("method", ["WEBSOCKET", "BREW", "PROPFIND", "TRACE", "CONNECT"])
@SAME_ON_ALL
def test_a_method_that_nobody_knows_is_401_404_or_405_and_nothing_else(client, alice, method):
    assert_problem(client.simulate_request(method, "/api/alice/tasks"), 401)
    refused = alice.call(method)
    assert_problem(refused, 405)
    assert refused.headers["Allow"] == "GET, HEAD, POST, OPTIONS"
    assert refused.headers["X-Request-ID"]
    assert_problem(client.simulate_request(method, "/nowhere"), 404)


@pytest.mark.parametrize(
    ("body", "headers", "status", "detail"),
    [
        (b"", {"Content-Type": "application/json"}, 400, "send a JSON object as the body"),
        (
            b"{}",
            {},
            415,
            "send plain JSON in UTF-8, with the header Content-Type: application/json",
        ),
        (
            b"{}",
            {"Content-Type": "application/json", "Content-Encoding": "gzip"},
            415,
            "send plain JSON in UTF-8, with the header Content-Type: application/json",
        ),
        (
            b" " * 65_537,
            {"Content-Type": "application/json"},
            413,
            "send a body of at most 65536 bytes",
        ),
    ],
)
@SAME_ON_ALL
def test_a_body_that_is_refused_says_what_to_send(alice, body, headers, status, detail):
    for method, path in (("POST", ""), ("PUT", "/1")):
        assert (
            assert_problem(alice.call(method, path, body=body, headers=headers), status)["detail"]
            == detail
        )

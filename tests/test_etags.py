"""ETag, If-None-Match and If-Match: no repeated download, and no lost update.

Reading uses the weak comparison of RFC 9110, section 8.8.3.2, and writing the strong one.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from falcon import testing
from hypothesis import HealthCheck, example, given, settings, strategies

import taskd
from conftest import Pair, Person
from support import (
    OTHER_SECRET,
    Answer,
    Process,
    Wire,
    WireAnswer,
    assert_problem,
    at_once,
    bearer,
    database_url,
    token,
    written,
)

STRONG = re.compile(r'"[\x21\x23-\x7e]+"')
OLD = '"1-2001-01-01T00:00:00.000Z"'  # a tag in taskd's form, but of no task here
SAME_ON_ALL = pytest.mark.sqlite("the header is parsed before the database is asked")
WRITES: list[tuple[str, str, dict[str, Any]]] = [
    ("PUT", "", {"json": {"title": "Buy tea"}}),
    ("PUT", "", {"json": {"title": "Buy tea", "description": None, "completed": True}}),
    ("PATCH", "", {"json": {"priority": "high", "tags": ["home"]}}),
    ("PATCH", "/complete", {}),
    ("PATCH", "/complete", {"json": {}}),
    ("PATCH", "/complete", {"json": {"completed": True}}),
    ("DELETE", "", {}),
]
NOTHING: tuple[str, str, dict[str, Any]] = ("PUT", "", {"json": {}})

each_write = pytest.mark.parametrize(
    "write", WRITES, ids=[" ".join(map(str, write)) for write in WRITES]
)
each_write_or_none = pytest.mark.parametrize("write", [*WRITES, NOTHING], ids=str)

Start = Callable[..., Process]
Write = tuple[str, str, dict[str, Any]]


def tag(answer: testing.Result | Answer) -> str:
    """Return the entity tag of a good answer."""
    assert answer.status_code in (200, 201, 304), answer.text
    return str(answer.headers["etag"])


def new(person: Person, **task: Any) -> tuple[str, str]:
    """Create a task, and return its path below the person's tasks, and its tag."""
    answer = person.call("POST", json={"title": "Buy milk"} | task)
    return f"/{answer.json['id']}", tag(answer)


def send(person: Person, one: str, write: Write, if_match: str) -> testing.Result:
    method, path, options = write
    return person.call(method, one + path, headers={"If-Match": if_match}, **options)


def state(person: Person, one: str) -> tuple[Any, str]:
    answer = person.call("GET", one)
    return answer.json, tag(answer)


# --- The tag --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("either_thread")
def test_every_answer_with_one_task_has_its_strong_tag(alice: Person) -> None:
    created = alice.call("POST", json={"title": "Buy milk"})
    one = f"/{created.json['id']}"
    answers = [
        created,
        alice.call("GET", one),
        alice.call("HEAD", one),
        *(
            alice.call(method, one + path, **options)
            for method, path, options in [NOTHING, *WRITES]
        ),
    ]
    for answer in answers:
        assert STRONG.fullmatch(tag(answer))
        assert answer.headers["etag"].count('"') == 2


@pytest.mark.usefixtures("either_thread")
def test_the_tag_stays_as_long_as_the_task_does(alice: Person) -> None:
    one, first = new(alice)
    other, _ = new(alice)
    for _ in range(2):
        assert tag(alice.call("GET", one)) == first
        assert tag(alice.call("HEAD", one)) == first
        assert tag(alice.call("PUT", one, json={})) == first
        assert tag(alice.call("PUT", one, json={"id": 99, "updated_at": "now"})) == first
        assert alice.call("PUT", other, json={"title": "Buy tea"}).status_code == 200
        assert alice.call("GET").status_code == 200
    for refused in ({"title": ""}, {"titel": "x"}, []):
        assert_problem(alice.call("PUT", one, json=refused), 422)
    assert tag(alice.call("GET", one)) == first
    assert tag(alice.call("DELETE", one)) == first, "a deleted task is shown as it was"


@pytest.mark.usefixtures("either_thread")
@pytest.mark.parametrize("clock", ["running", "standing still", "going back"])
def test_the_tag_changes_with_every_change(
    alice: Person, monkeypatch: pytest.MonkeyPatch, clock: str
) -> None:
    times = iter(range(999, 0, -1))
    if clock == "standing still":
        monkeypatch.setattr(taskd, "timestamp", lambda when: "2026-11-21T00:00:00.000Z")
    elif clock == "going back":
        monkeypatch.setattr(
            taskd, "timestamp", lambda when: f"2026-11-21T00:00:00.{next(times):03}Z"
        )
    one, first = new(alice)
    seen = [first]
    for number in range(15):
        for method, path, body in (
            ("PATCH", "/complete", None),
            ("PUT", "", {"title": f"Buy {number}"}),
            ("PUT", "", {"title": f"Buy {number}"}),
            ("PATCH", "/complete", {"completed": False}),
        ):
            answer = alice.call(method, one + path, **({"json": body} if body else {}))
            assert state(alice, one) == (answer.json, tag(answer))
            seen.append(tag(answer))
    assert len(set(seen)) == len(seen) == 61


def test_lists_and_errors_have_no_tag(alice: Person) -> None:
    one, _ = new(alice)
    for answer in (
        alice.call("GET"),
        alice.call("GET", query_string="limit=1"),
        alice.call("GET", "/99"),
        alice.call("PUT", one, json={"title": ""}),
        alice.call("POST", json={}),
        alice.call("POST", one),
    ):
        assert "etag" not in answer.headers


def test_tags_survive_a_restart(start: Start) -> None:
    server = start()
    tags = {}
    for number in range(1, 4):
        answer = server.request("POST", "/api/alice/tasks", {"title": "x"}, bearer())
        for _ in range(number):
            answer = server.request(
                "PATCH", f"/api/alice/tasks/{number}/complete", headers=bearer()
            )
        tags[f"/api/alice/tasks/{number}"] = tag(answer)
    assert server.terminate() == 0
    server = start()
    for one, known in tags.items():
        assert tag(server.request("GET", one, headers=bearer())) == known
        unchanged = server.request("GET", one, headers=bearer() | {"If-None-Match": known})
        assert (unchanged.status_code, unchanged.content) == (304, b"")
        changed = server.request("PUT", one, {"title": "y"}, bearer() | {"If-Match": known})
        assert tag(changed) != known


# --- If-None-Match --------------------------------------------------------------------------------


@pytest.mark.usefixtures("either_thread")
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_request_with_the_current_tag_gets_304_without_a_body(alice: Person, method: str) -> None:
    one, now = new(alice)
    for known in (now, f"W/{now}", "*", f"{OLD}, {now}", f'W/"x",{now},""', f" ,, W/{now} ,"):
        answer = alice.call(method, one, headers={"If-None-Match": known})
        assert (answer.status_code, answer.content) == (304, b""), known
        assert answer.headers["etag"] == now
        assert answer.headers["cache-control"] == "no-store"
        assert not {"content-type", "content-length", "transfer-encoding"} & {
            name.lower() for name in answer.headers
        }


@pytest.mark.usefixtures("either_thread")
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_request_with_another_tag_gets_the_task(alice: Person, method: str) -> None:
    one, before = new(alice)
    task = alice.call("PATCH", f"{one}/complete").json
    now = tag(alice.call("GET", one))
    for known in (
        before,
        OLD,
        f"{before}, W/{OLD}",
        '""',
        '"*"',
        now.lower(),
        f'"{now[2:]}',
        f'{now[:-1]}x"',
    ):
        answer = alice.call(method, one, headers={"If-None-Match": known})
        assert (answer.status_code, tag(answer)) == (200, now), known
        assert answer.content == (b"" if method == "HEAD" else taskd.to_json(task))


@pytest.mark.parametrize("known", ["*", OLD, f"W/{OLD}"])
def test_a_task_that_is_not_yours_or_not_there_is_404_whatever_one_has(
    alice: Person, bob: Person, known: str
) -> None:
    one, now = new(alice)
    gone, last = new(bob)
    assert bob.call("DELETE", gone).status_code == 200
    for path in (one, gone, "/99", "/0"):
        for tags in (known, now, last):
            answer = bob.call("GET", path, headers={"If-None-Match": tags})
            assert_problem(answer, 404)
            assert "etag" not in answer.headers


def test_a_list_is_never_304(alice: Person) -> None:
    _, now = new(alice)
    for known in ("*", now):
        assert alice.call("GET", headers={"If-None-Match": known}).status_code == 200


def test_304_keeps_the_connection_for_the_next_request(server: Process) -> None:
    with Wire(server) as wire:
        wire.send(written("POST", "/api/alice/tasks", {"title": "x"}, user="alice"))
        created = wire.answer()
        one, lines = created.headers["location"], [f"If-None-Match: {tag(created)}"]
        for method in ("GET", "HEAD", "GET"):
            answer = wire.send(written(method, one, None, *lines, user="alice")).answer(
                bodiless=True
            )
            assert (answer.line, tag(answer)) == ("HTTP/1.1 304 Not Modified", tag(created))
            assert not {"connection", "content-length", "transfer-encoding", "content-type"} & set(
                answer.headers
            )
        many = written("GET", one, None, *lines, user="alice") * 3 + written(
            "GET", one, user="alice"
        )
        wire.send(many)  # pipelined
        assert [wire.answer(bodiless=True).status_code for _ in range(3)] == [304] * 3
        last = wire.answer()
        assert (last.status_code, last.content) == (200, created.content)
        wire.send(written("GET", one, None, *lines, "Connection: close", user="alice"))
        assert wire.answer(bodiless=True).status_code == 304
        assert wire.is_closed()


def test_304_over_http_1_0_ends_the_connection(server: Process) -> None:
    created = server.request("POST", "/api/alice/tasks", {"title": "x"}, bearer())
    line = f"If-None-Match: {tag(created)}"
    with Wire(server) as wire:
        wire.send(
            written("GET", created.headers["location"], None, line, user="alice", version="1.0")
        )
        assert wire.answer(bodiless=True).status_code == 304
        assert wire.is_closed()


def test_a_page_of_another_origin_may_read_the_tag_of_304_and_412(
    make_app: Callable[..., taskd.App],
) -> None:
    app = make_app(cors_origins=("https://a.example",))
    alice = Person(testing.TestClient(app), "alice")
    one, now = new(alice)
    for method, header, status in (
        ("GET", {"If-None-Match": now}, 304),
        ("DELETE", {"If-Match": OLD}, 412),
    ):
        answer = alice.call(method, one, headers={"Origin": "https://a.example"} | header)
        assert answer.status_code == status
        assert answer.headers["etag"] == now
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "ETag" in answer.headers["access-control-expose-headers"]


# --- If-Match -------------------------------------------------------------------------------------


def hits(now: str) -> list[str]:
    """Return values of If-Match with which a task of this tag may be changed."""
    return [
        now,
        "*",
        f"{OLD},{now}",
        f"{now}, {OLD}",
        f'"x",W/"y" , {now},',
        f'W/{now}, {now}, "{"z" * 500}"',
    ]


@each_write
@pytest.mark.usefixtures("either_thread")
def test_a_write_that_names_the_tag_is_done(alice: Person, write: Write) -> None:
    for number in range(len(hits(OLD))):
        one, now = new(alice, title=f"Buy {number}")
        answer = send(alice, one, write, hits(now)[number])
        assert answer.status_code == 200, answer.text
        if write[0] == "DELETE":
            assert_problem(alice.call("GET", one), 404)
        else:
            assert tag(answer) != now
            assert state(alice, one) == (answer.json, tag(answer))


MISSES: dict[str, Callable[[str], str]] = {
    "another": lambda now: OLD,
    "weak": lambda now: f"W/{now}",
    "weak in a list": lambda now: f"{OLD}, W/{now}",
    "lower case": lambda now: now.lower(),
    "a quoted star": lambda now: '"*"',
    "wild cards": lambda now: '"%", "_", "1-%", "%Z"',
    "wild cards in its form": lambda now: now.replace("2", "_"),
    "nothing in quotes": lambda now: '""',
    "its beginning": lambda now: f'{now[:-2]}"',
    "its end": lambda now: f'"{now[2:]}',
    "longer in front": lambda now: f'"1{now[1:]}',
    "longer behind": lambda now: f'{now[:-1]}Z"',
    "in two parts": lambda now: f'{now[:9]}", "{now[9:]}',
    "the commas of a list in quotes": lambda now: f'"x,{now[1:-1]},y"',
    "the next version": lambda now: f'"2{now[2:]}',
    "beyond ASCII": lambda now: f'"é\xff", {now[:-1]}\xa0"',
    "in other digits": lambda now: '"²-2001"',
}


@each_write_or_none
@pytest.mark.usefixtures("either_thread")
def test_a_write_that_names_another_tag_is_412_with_the_tag_and_changes_nothing(
    alice: Person, write: Write
) -> None:
    one, now = new(alice)
    before = state(alice, one)
    for name, miss in MISSES.items():
        answer = send(alice, one, write, miss(now))
        problem = assert_problem(answer, 412)
        assert problem["title"] == "Precondition Failed", name
        assert problem["detail"].startswith("the task's ETag does not meet")
        assert answer.headers["etag"] == now
        assert state(alice, one) == before, name
    assert send(alice, one, write, now).status_code == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_read_that_names_another_tag_is_412_with_the_tag(alice: Person, method: str) -> None:
    one, now = new(alice)
    refused = alice.call(method, one, headers={"If-Match": OLD})
    assert (refused.status_code, refused.headers["etag"]) == (412, now)
    assert alice.call(method, one, headers={"If-Match": f"{OLD}, {now}"}).status_code == 200


@each_write_or_none
@pytest.mark.usefixtures("either_thread")
def test_an_if_none_match_with_another_tag_lets_a_write_pass(alice: Person, write: Write) -> None:
    method, path, options = write
    for name, miss in MISSES.items():
        if not name.startswith("weak"):  # If-None-Match compares weakly
            one, now = new(alice)
            answer = alice.call(method, one + path, headers={"If-None-Match": miss(now)}, **options)
            assert answer.status_code == 200, name


@each_write
def test_the_tag_of_412_is_the_one_to_go_on_with(alice: Person, write: Write) -> None:
    one, before = new(alice)
    theirs = alice.call("PUT", one, json={"title": "changed by somebody"})
    refused = send(alice, one, write, before)
    assert_problem(refused, 412)
    assert refused.headers["etag"] == tag(theirs)
    assert send(alice, one, write, refused.headers["etag"]).status_code == 200


def test_a_put_of_nothing_under_if_match_changes_nothing(alice: Person) -> None:
    one, now = new(alice)
    for tags in hits(now):
        answer = send(alice, one, NOTHING, tags)
        assert (answer.status_code, tag(answer)) == (200, now)


@each_write_or_none
@pytest.mark.usefixtures("either_thread")
def test_a_task_that_is_not_there_or_anothers_is_404_and_never_412(
    alice: Person, bob: Person, write: Write
) -> None:
    hers, now = new(alice)
    gone, last = new(bob)
    assert bob.call("DELETE", gone).status_code == 200
    before = state(alice, hers)
    seen = set()
    for one in (hers, gone, "/99", f"/{2**63 - 1}", f"/{2**63}", "/0", "/x"):
        for tags in (now, last, OLD, "*", "W/" + now, '""'):
            answer = send(bob, one, write, tags)
            assert_problem(answer, 404)
            assert "etag" not in answer.headers
            seen.add(answer.text)
            if one == hers:
                assert_problem(send(bob, alice.tasks + one, write, tags), 403)
    assert len(seen) == 1, "nobody can tell one from the other"
    assert state(alice, hers) == before


def test_without_if_match_a_write_is_done(alice: Person) -> None:
    one, _ = new(alice)
    for method, path, options in WRITES:
        assert alice.call(method, one + path, **options).status_code == 200


# --- The form of the headers, and the order of the checks -----------------------------------------

MALFORMED = [
    "",
    " ",
    "\t",
    ",",
    " , ,, ",
    "abc",
    "1-2026-11-21T00:00:00.000Z",
    '"abc',
    'abc"',
    '"',
    '"""',
    '"a""b"',
    '"a" "b"',
    '"a";"b"',
    '"a", b',
    '"a", "b',
    "'a'",
    '"a b"',
    '"a\tb"',
    '"a"\xa0',
    '\xa0"a"',
    '"a",\xa0"b"',
    "W/",
    "W/abc",
    'w/"a"',
    'W /"a"',
    'W/ "a"',
    'WW/"a"',
    'W/W/"a"',
    "* *",
    "**",
    "*,",
    ",*",
    '*, "a"',
    '"a", *',
    "W/*",
    "\xa0*",
    "*\x85",
    '"a"*',
]
CONTROLS = ['"a\x01b"', '"a\x7fb"', '"a"\x0b', '\x0b"a"', "\x0b*", "*\x0c", "\x1f*"]
ODD = [
    ',"a"',
    '"a",',
    '\t"a"\t,\t, ,"b" ',
    '"a,b"',
    '","',
    '""',
    '"W/"',
    '"\xff\x80"',
    '"*"',
    '"\\"',
    '"\'"',
    '"a","b"',
]


@pytest.mark.parametrize("value", MALFORMED)
@SAME_ON_ALL
def test_a_malformed_header_is_400_and_changes_nothing(pair: Pair, value: str) -> None:
    with Wire(pair[0][0]) as wire:
        wire.send(written("POST", "/api/malformed/tasks", {"title": "x"}, user="malformed"))
        created = wire.answer()
        one = created.headers["location"]
        for method, path, body in (
            ("PUT", "", {"title": "y"}),
            ("PUT", "", {}),
            ("PATCH", "/complete", None),
        ):
            wire.send(written(method, one + path, body, f"If-Match: {value}", user="malformed"))
            assert "If-Match" in assert_problem(wire.answer(), 400)["detail"]
        wire.send(written("DELETE", one, None, f"If-Match: {value}", user="malformed"))
        assert "If-Match" in assert_problem(wire.answer(), 400)["detail"]
        wire.send(written("GET", one, None, f"If-None-Match: {value}", user="malformed"))
        assert "If-None-Match" in assert_problem(wire.answer(), 400)["detail"]
        wire.send(written("HEAD", one, None, f"If-None-Match: {value}", user="malformed"))
        assert wire.answer(bodiless=True).status_code == 400
        unchanged = wire.send(written("GET", one, user="malformed")).answer()
        assert (unchanged.content, tag(unchanged)) == (created.content, tag(created))


@pytest.mark.parametrize("value", CONTROLS)
@pytest.mark.parametrize("header", ["If-Match", "If-None-Match"])
@SAME_ON_ALL
def test_a_control_character_is_400_in_every_layer(pair: Pair, header: str, value: str) -> None:
    server = pair[0][0]
    created = server.request("POST", "/api/controls/tasks", {"title": "x"}, bearer("controls"))
    one = created.headers["location"]
    with Wire(server) as wire:
        method = "GET" if header == "If-None-Match" else "DELETE"
        assert_problem(
            wire.send(written(method, one, None, f"{header}: {value}", user="controls")).answer(),
            400,
        )
    assert server.request("GET", one, headers=bearer("controls")).content == created.content


@pytest.mark.parametrize("value", ODD)
@SAME_ON_ALL
def test_an_odd_but_good_header_is_understood(pair: Pair, value: str) -> None:
    with Wire(pair[0][0]) as wire:
        wire.send(written("POST", "/api/odd/tasks", {"title": "x"}, user="odd"))
        created = wire.answer()
        one, now = created.headers["location"], tag(created)
        for before, after in ((value, ""), (value, f",{now}"), (f"{now} ,", value)):
            tags = before + after
            hit = now in tags
            wire.send(written("GET", one, None, f"If-None-Match: {tags}", user="odd"))
            assert wire.answer(bodiless=hit).status_code == (304 if hit else 200)
            wire.send(written("PUT", one, {}, f"If-Match: {tags}", user="odd"))
            assert wire.answer().status_code == (200 if hit else 412)


@pytest.mark.parametrize("header", ["If-Match", "If-None-Match"])
def test_a_header_given_twice_is_one_list(pair: Pair, header: str) -> None:
    with Wire(pair[0][0]) as wire:
        created = wire.send(
            written("POST", "/api/twice/tasks", {"title": "x"}, user="twice")
        ).answer()
        one, now = created.headers["location"], tag(created)
        method, body, good = ("PUT", {}, 200) if header == "If-Match" else ("GET", None, 304)
        for pair_of_tags in ((OLD, now), (now, OLD), (now, now)):
            lines = [f"{header}: {value}" for value in pair_of_tags]
            answer = wire.send(written(method, one, body, *lines, user="twice")).answer(
                bodiless=good == 304
            )
            assert answer.status_code == good
        lines = [f"{header}: {value}" for value in ("*", now)]
        assert_problem(wire.send(written(method, one, body, *lines, user="twice")).answer(), 400)


def parsed(value: str) -> list[str] | None:
    """Return the tags of a list by the grammar of RFC 9110, or None if it is not a list."""
    tags, rest = [], value
    while rest := rest.lstrip(" \t"):
        if rest[0] == ",":
            rest = rest[1:]
            continue
        weak = "W/" if rest.startswith("W/") else ""
        rest = rest[len(weak) :]
        if not rest.startswith('"') or (end := rest.find('"', 1)) < 0:
            return None
        opaque, rest = rest[1:end], rest[end + 1 :].lstrip(" \t")
        if any(letter <= " " or letter == "\x7f" for letter in opaque) or (
            not rest.startswith(",") and rest
        ):
            return None
        tags.append(f'{weak}"{opaque}"')
    return tags or None


PIECES = [
    '"',
    "W/",
    "*",
    ",",
    " ",
    "\t",
    "NOW",
    "W/NOW",
    OLD,
    '"x"',
    '"a,b"',
    "w/",
    ";",
    "a",
    "\xffa",
    '""',
    ", ",
]
LISTS = strategies.lists(
    strategies.sampled_from(["NOW", "W/NOW", OLD, '""', '"a,b"', 'W/"\xff"', ""]).flatmap(
        lambda element: strategies.sampled_from([element, f" {element}", f"{element}\t "])
    ),
    max_size=6,
).map(",".join)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    database = database_url(tmp_path_factory.mktemp("fuzzed") / "taskd.db")
    app = taskd.create_app(taskd.Settings(secret="x" * 32, database_url=database))
    client = testing.TestClient(
        app, headers={"Authorization": f"Bearer {token('alice', secret='x' * 32)}"}
    )
    client.simulate_post("/api/alice/tasks", json={"title": "x"})
    yield client
    app.database.close()


@pytest.mark.sqlite("it is about a header")
@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(value=LISTS | strategies.lists(strategies.sampled_from(PIECES), max_size=8).map("".join))
@example(value="*")
@example(value="W/NOW,NOW")
def test_any_value_is_understood_as_a_small_parser_of_rfc_9110_does(
    fuzzed: testing.TestClient, value: str
) -> None:
    one = "/api/alice/tasks/1"
    now = fuzzed.simulate_get(one).headers["etag"]
    value = value.replace("NOW", now)
    tags = ["*"] if value.strip(" \t") == "*" else parsed(value)
    if tags is None:
        read = changed = 400
    else:
        read = 304 if tags == ["*"] or now in tags or f"W/{now}" in tags else 200
        changed = 200 if tags == ["*"] or now in tags else 412
    assert fuzzed.simulate_get(one, headers={"If-None-Match": value}).status_code == read
    for method, path, options in (("PUT", "", {"json": {}}), ("PATCH", "/complete", {})):
        answer = fuzzed.simulate_request(method, one + path, headers={"If-Match": value}, **options)
        assert answer.status_code == changed
    after = fuzzed.simulate_get(one).headers["etag"]
    assert (after != now) == (changed == 200)


def test_who_calls_is_checked_first_then_the_path_then_the_header_then_the_body(
    alice: Person, bob: Person
) -> None:
    one, now = new(alice)
    for tags in ("not good", OLD, now):
        for method, path, options in WRITES:
            options = {**options, "headers": {"If-Match": tags}}
            for bad in (
                {"Authorization": ""},
                bearer("alice", secret=OTHER_SECRET),
                bearer("alice", exp=1),
            ):
                again = {**options, "headers": options["headers"] | bad}
                assert_problem(alice.call(method, one + path, **again), 401)
            assert_problem(bob.call(method, alice.tasks + one + path, **options), 403)
            assert_problem(alice.call(method, "/0" + path, **options), 404)
    bad_bodies: list[tuple[int, dict[str, Any]]] = [
        (400, {"body": b"{", "headers": {"Content-Type": "application/json"}}),
        (413, {"body": b" " * 65537, "headers": {"Content-Type": "application/json"}}),
        (415, {"body": b"{}", "headers": {"Content-Type": "text/plain"}}),
        (422, {"json": {"titel": "x"}}),
    ]
    for method, path in (("PUT", ""), ("PATCH", "/complete")):
        for status, options in bad_bodies:
            for tags, expected in (("not good", 400), (OLD, status), (now, status), ("*", status)):
                headers = options.get("headers", {}) | {"If-Match": tags}
                problem = assert_problem(
                    alice.call(method, one + path, **{**options, "headers": headers}), expected
                )
                assert ("If-Match" in problem["detail"]) == (tags == "not good")
    assert state(alice, one)[1] == now


LONG = 60_000  # characters; the server takes 64 KiB of header
HUGE: dict[str, tuple[str, int]] = {
    "tags of other tasks": (
        ",".join(f'"{number}-2026-11-21T00:00:00.000Z"' for number in range(1800)),
        412,
    ),
    "tags that begin as this one": ("NOW-,".replace("NOW-", 'NOW_"') * 1700, 412),
    "short tags": ('"1-Z",' * (LONG // 6), 412),
    "empty tags": ('"",' * (LONG // 3), 412),
    "weak tags": ('W/"a",' * (LONG // 6), 412),
    "one tag": (f'"{"1-" * (LONG // 2)}Z"', 412),
    "this one at the end": ('"a",' * (LONG // 4) + "NOW", 200),
    "commas": ("," * LONG, 400),
    "commas and an end": ("," * LONG + "x", 400),
    "spaces and commas and an end": (" ," * (LONG // 2) + "x", 400),
    "tags and an end": ('"a" , ' * (LONG // 6) + "x", 400),
    "tags with wide gaps": (('"a"' + " " * 997) * (LONG // 1000), 400),
    "one gap": ('"a"' + " " * LONG + "x", 400),
    "an open quote": ('"' + "a" * LONG, 400),
    "quotes": ('"' * LONG, 400),
    "the beginnings of weak tags": ("W/" * (LONG // 2), 400),
    "stars": ("*" * LONG, 400),
}


@pytest.mark.parametrize(("value", "status"), HUGE.values(), ids=HUGE)
@SAME_ON_ALL
def test_a_huge_header_is_answered_at_once(pair: Pair, value: str, status: int) -> None:
    with Wire(pair[0][0]) as wire:
        created = wire.send(
            written("POST", "/api/huge/tasks", {"title": "x"}, user="huge")
        ).answer()
        one, now = created.headers["location"], tag(created)
        value = value.replace(
            'NOW_"', f'{now[:-2]}0Z"' if now[-3] != "0" else f'{now[:-2]}1Z"'
        ).replace("NOW", now)
        value = value[: LONG + 2000]
        for method, header, body in (
            ("PUT", "If-Match", {"title": "y"}),
            ("GET", "If-None-Match", None),
        ):
            started = time.monotonic()
            wire.send(written(method, one, body, f"{header}: {value}", user="huge"))
            answer = wire.answer()
            # A pattern that backtracks takes minutes.
            assert time.monotonic() - started < 10
            assert answer.status_code == (status if method == "PUT" or status == 400 else 200)


# --- At the same time -----------------------------------------------------------------------------


def conditional(method: str, one: str, body: object, if_match: str, user: str) -> bytes:
    return written(method, one, body, f"If-Match: {if_match}", user=user)


def one_wins(
    servers: list[Process], requests: list[bytes], lock: Path | None
) -> tuple[WireAnswer, list[WireAnswer]]:
    """Send all at the same time, and return the answer of the one that succeeded, and the rest."""
    answers = at_once(servers, requests, lock)
    assert [answer.status_code for answer in answers].count(200) == 1, Counter(
        answer.text for answer in answers
    )
    [winner] = [answer for answer in answers if answer.status_code == 200]
    return winner, [answer for answer in answers if answer is not winner]


meetings = pytest.mark.parametrize("meeting", ["as they come", "in the worker threads"])
processes = pytest.mark.parametrize("processes", [1, 2])


@meetings
@processes
@pytest.mark.parametrize(
    ("method", "path"),
    [("PATCH", "/complete"), ("PUT", ""), ("both", "")],
    ids=["toggles", "puts", "both"],
)
def test_of_writers_that_saw_the_same_task_exactly_one_wins(
    pair: Pair, processes: int, meeting: str, method: str, path: str
) -> None:
    servers, database = pair
    lock = database if meeting == "in the worker threads" else None
    for size in (2, 16):
        created = servers[0].request("POST", "/api/race/tasks", {"title": "x"}, bearer("race"))
        one = created.headers["location"]
        put = [
            conditional("PUT", one, {"title": f"{number}"}, tag(created), "race")
            for number in range(size)
        ]
        toggle = [conditional("PATCH", f"{one}/complete", None, tag(created), "race")] * size
        requests = {"PUT": put, "PATCH": toggle, "both": put[::2] + toggle[::2]}[method]
        winner, losers = one_wins(servers[:processes], requests, lock)
        for loser in losers:
            assert_problem(loser, 412)
            assert loser.headers["etag"] == tag(winner)
        left = servers[-1].request("GET", one, headers=bearer("race"))
        assert (left.content, tag(left)) == (winner.content, tag(winner))


@meetings
@processes
def test_of_a_delete_and_a_change_of_the_same_task_exactly_one_wins(
    pair: Pair, processes: int, meeting: str
) -> None:
    servers, database = pair
    lock = database if meeting == "in the worker threads" else None
    for turn in range(6):
        created = servers[0].request("POST", "/api/end/tasks", {"title": "x"}, bearer("end"))
        one = created.headers["location"]
        delete = conditional("DELETE", one, None, tag(created), "end")
        put = conditional("PUT", one, {"title": "y"}, tag(created), "end")
        requests = ([delete, put] if turn % 2 else [put, delete]) * 4
        winner, losers = one_wins(servers[:processes], requests, lock)
        left = servers[-1].request("GET", one, headers=bearer("end"))
        if winner.content == created.content:  # it was deleted
            assert {loser.status_code for loser in losers} == {404}
            assert_problem(left, 404)
        else:
            assert {(loser.status_code, loser.headers["etag"]) for loser in losers} == {
                (412, tag(winner))
            }
            assert (left.content, tag(left)) == (winner.content, tag(winner))


def test_no_update_is_lost_among_writers_that_read_first_and_try_again(pair: Pair) -> None:
    servers, _ = pair
    created = servers[0].request("POST", "/api/count/tasks", {"title": "0"}, bearer("count"))
    one = created.headers["location"]

    def count(number: int) -> int:
        """Add one, ten times, to the number in the title; return how often others were faster."""
        done = refused = 0
        with Wire(servers[number % 2]) as wire:
            while done < 10:
                seen = wire.send(written("GET", one, user="count")).answer()
                more = {"title": str(int(seen.json["title"]) + 1)}
                answer = wire.send(conditional("PUT", one, more, tag(seen), "count")).answer()
                assert answer.status_code in (200, 412)
                done += answer.status_code == 200
                refused += answer.status_code == 412
        return refused

    with ThreadPoolExecutor(6) as pool:
        refused = sum(pool.map(count, range(6)))
    last = servers[0].request("GET", one, headers=bearer("count"))
    assert last.json["title"] == "60"
    assert refused > 0, "they did meet"
    assert json.loads(tag(last)).startswith("61-"), "and nothing else changed it"

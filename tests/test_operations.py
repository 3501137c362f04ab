"""What an operator sees of a running taskd: readiness, metrics, log lines, clients of a proxy."""

from __future__ import annotations

import http.client
import json
import logging
import math
import re
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from falcon import testing
from prometheus_client.parser import text_string_to_metric_families as families

import taskd
from conftest import Person
from support import (
    DEADLINE,
    ROOT,
    SECRET,
    Answer,
    Process,
    Wire,
    assert_problem,
    bearer,
    locked,
    sql,
    until,
    written,
)

pytestmark = pytest.mark.sqlite("most of it is about log lines, numbers and proxies")

Start = Callable[..., Process]
MakeApp = Callable[..., taskd.App]
TASKS = "/api/alice/tasks"
NASTY = [  # user ids that Better Auth would not make
    "alice\n2026-11-21T00:00:00.000Z INFO DELETE /api/{user_id}/tasks/{task_id} 200 0.1ms"
    " id=forged user='bob'",
    "alice\r\nERROR the database is gone",
    "alice user='bob' client=10.0.0.1",
    "alice' id=forged",
    'alice", "status": 200, "user": "bob',
    "alice\x1b[2K\x07\x7f",
    "alice\u2028INFO\u2029INFO\x85INFO",
    "\u202eecila",
    "\0",
]


def path_of(user: str) -> str:
    return f"/api/{quote(user, safe='')}/tasks"


# --- Is it ready? ---------------------------------------------------------------------------------


@pytest.mark.both_engines
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_server_whose_database_answers_is_ready_without_a_token(
    server: Process, method: str
) -> None:
    answer = server.request(method, "/readyz")
    assert answer.status_code == 200
    assert answer.text == ('{"status": "ok"}' if method == "GET" else "")


FIT_WORDS = (
    r"the database(, whose [a-z ]+,)? cannot be used right now; try again"  # no path, no SQL
)
UNREADY = {
    "a column is gone": "ALTER TABLE task DROP COLUMN description",
    "a column has another name": "ALTER TABLE task RENAME COLUMN title TO name",
    "a column has come": "ALTER TABLE task ADD COLUMN mood INTEGER",
    "an index is gone": "DROP INDEX task_id",
    "the tasks are gone": "DROP TABLE task",
    "the keys are gone": "DROP TABLE idempotency_key",
}


@pytest.mark.both_engines
@pytest.mark.parametrize("change", UNREADY.values(), ids=UNREADY)
def test_a_database_that_no_longer_fits_is_not_ready_and_the_log_says_why(
    server: Process, tmp_path: Path, change: str
) -> None:
    sql(tmp_path / "taskd.db", change)
    answer = server.request("GET", "/readyz")
    problem = assert_problem(answer, 503)
    assert int(answer.headers["retry-after"]) > 0
    assert re.fullmatch(FIT_WORDS, problem["detail"])
    assert server.request("GET", "/healthz").status_code == 200
    until(
        lambda: re.search(
            'ERROR GET /readyz 503 .* reason="the database(, whose schema does not fit,)? cannot',
            server.log,
        ),
        "a line",
    )


@pytest.mark.both_engines
def test_it_is_ready_again_when_the_database_fits_again(server: Process, tmp_path: Path) -> None:
    for change, status in (("title TO name", 503), ("name TO title", 200)):
        sql(tmp_path / "taskd.db", f"ALTER TABLE task RENAME COLUMN {change}")
        assert server.request("GET", "/readyz").status_code == status


def test_a_check_is_for_all_requests_that_were_received_before_it(
    app: taskd.App, client: testing.TestClient
) -> None:
    ready, checks = app.public["/readyz"], list[float]()
    check = ready._check
    ready._check = lambda: checks.append(time.perf_counter()) or check()
    received = time.perf_counter()
    for _ in range(3):
        answer = client.simulate_get("/readyz", extras={"taskd.received": received})
        assert answer.status_code == 200
    assert len(checks) == 1
    client.simulate_get("/readyz", extras={"taskd.received": checks[0] + 1e-6})
    assert len(checks) == 2, "it was received after the check began"
    ready._check = lambda: checks.append(0) or 1 / 0
    later = time.perf_counter()
    for _ in range(2):
        client.simulate_get("/readyz", extras={"taskd.received": later})
    assert len(checks) == 4, "a check that failed is for nobody else"


@pytest.mark.both_engines
def test_another_process_that_writes_does_not_make_it_unready(
    server: Process, tmp_path: Path
) -> None:
    with locked(tmp_path / "taskd.db"):
        assert server.request("GET", "/readyz").status_code == 200


def replace(file: Path, other: Path) -> None:
    """Replace a file by another good database, as an operator may who restores a backup."""
    with closing(sqlite3.connect(file)) as database, closing(sqlite3.connect(other)) as copy:
        database.backup(copy)
    other.rename(file)


def test_a_database_whose_file_is_gone_or_another_one_is_not_ready(
    server: Process, tmp_path: Path
) -> None:
    file, away = tmp_path / "taskd.db", tmp_path / "away.db"
    assert server.request("POST", TASKS, {"title": "x"}, bearer()).status_code == 201
    file.rename(away)
    deleted = assert_problem(server.request("GET", "/readyz"), 503)["detail"]
    assert "whose file was replaced or deleted" in deleted
    away.rename(file)
    assert server.request("GET", "/readyz").status_code == 200
    replace(file, tmp_path / "other.db")
    answer = server.request("GET", "/readyz")
    assert assert_problem(answer, 503)["detail"] == deleted
    assert int(answer.headers["retry-after"]) > 0
    assert server.terminate() == 0


def test_the_event_loop_checks_sqlite_by_itself_however_many_writes_wait(
    app: taskd.App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taskd.thread_state, "in_event_loop", True)
    assert isinstance(app.store._database, taskd.Sqlite)
    with app.store._database._write_lock:
        app.database.check()


def test_a_damaged_database_is_not_ready(server: Process, tmp_path: Path) -> None:
    for user in range(40):
        body = {"title": "x", "description": "y" * 2000}
        assert (
            server.request("POST", path_of(f"u{user}"), body, bearer(f"u{user}")).status_code == 201
        )
    assert server.terminate() == 0
    file = tmp_path / "taskd.db"
    whole = file.read_bytes()
    again = Process(tmp_path)
    try:
        file.write_bytes(whole[:100] + b"\xff" * (len(whole) - 100))
        assert_problem(again.request("GET", "/readyz"), 503)
        assert "Traceback" not in again.log
    finally:
        again.kill()


# --- Metrics --------------------------------------------------------------------------------------


def samples(answer: Answer | testing.Result) -> dict[tuple[str, ...], float]:
    """Return the numbers in /metrics, by name and sorted label values."""
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (
            sample.name,
            *(f"{name}={value}" for name, value in sorted(sample.labels.items())),
        ): sample.value
        for family in families(answer.text)
        for sample in family.samples
    }


@pytest.mark.parametrize("setting", [{}, {"TASKD_METRICS": "0"}, {"TASKD_METRICS": ""}])
def test_metrics_are_404_without_the_setting(start: Start, setting: dict[str, str]) -> None:
    answer = start(**setting).request("GET", "/metrics")
    assert_problem(answer, 404)


@pytest.mark.parametrize("metrics", [False, True])
def test_the_library_is_loaded_only_with_the_setting(tmp_path: Path, metrics: bool) -> None:
    settings = f"secret={SECRET!r}, database_url='sqlite:///{tmp_path}/taskd.db', metrics={metrics}"
    code = (
        f"import sys, taskd; taskd.create_app(taskd.Settings({settings})); "
        "print('prometheus_client' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE
    )
    assert (done.stdout, done.stderr) == (f"{metrics}\n", "")


def test_requests_are_counted_by_route_method_and_status(make_app: MakeApp) -> None:
    client = testing.TestClient(make_app(metrics=True))

    def ask(
        method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> testing.Result:
        return client.simulate_request(method, path, json=body, headers=headers)

    made = [ask("POST", TASKS, {"title": "x"}, bearer()).json["id"] for _ in range(3)]
    ask("POST", TASKS, {"title": "y"}, bearer() | {"Idempotency-Key": "k"})
    ask("POST", TASKS, {"title": "y"}, bearer() | {"Idempotency-Key": "k"})
    ask("POST", TASKS, {"title": ""}, bearer())
    ask("GET", f"{TASKS}/{made[0]}", headers=bearer())
    ask("PUT", f"{TASKS}/{made[0]}", {"title": "z"}, bearer())
    ask("PUT", f"{TASKS}/999", {"title": "z"}, bearer())
    ask("PATCH", f"{TASKS}/{made[0]}/complete", headers=bearer())
    ask("DELETE", f"{TASKS}/{made[0]}", headers=bearer())
    for path in ("/nowhere", "/nowhere/else", "/api/alice"):
        ask("GET", path)
    for method in ("BREW", "MAKE", "TRACE"):
        ask(method, TASKS, headers=bearer())
    ask("GET", TASKS)
    found = samples(client.simulate_get("/metrics"))
    everything, one = "route=/api/{user_id}/tasks", "route=/api/{user_id}/tasks/{task_id}"
    expected = {
        ("method=POST", everything, "status=201"): 5,
        ("method=POST", everything, "status=422"): 1,
        ("method=GET", everything, "status=401"): 1,
        ("method=GET", one, "status=200"): 1,
        ("method=PUT", one, "status=200"): 1,
        ("method=PUT", one, "status=404"): 1,
        ("method=PATCH", f"{one}/complete", "status=200"): 1,
        ("method=DELETE", one, "status=200"): 1,
        ("method=GET", "route=-", "status=404"): 3,
        ("method=unknown", everything, "status=405"): 2,
        ("method=TRACE", everything, "status=405"): 1,
    }
    assert {
        key[1:]: count for key, count in found.items() if key[0] == "taskd_requests_total"
    } == expected
    for (method, route, _), _ in expected.items():
        assert found["taskd_request_seconds_count", method, route] >= 1
        assert 0 < found["taskd_request_seconds_sum", method, route] < DEADLINE
    written = {
        name: found["taskd_tasks_written_total", f"change={name}"]
        for name in ("created", "changed", "deleted")
    }
    assert written == {"created": 4, "changed": 2, "deleted": 1}
    for statement, least in (("insert", 4), ("update", 2), ("delete", 1), ("select", 1)):
        assert found["taskd_database_seconds_count", f"statement={statement}"] >= least
        assert 0 < found["taskd_database_seconds_sum", f"statement={statement}"] < DEADLINE
    assert found["taskd_build_info", f"version={taskd.__version__}"] == 1
    assert found["process_open_fds",] > 0
    for name in ("taskd_request_seconds_bucket", "taskd_database_seconds_bucket"):
        limits = {
            float(label[3:])
            for sample, *labels in found
            if sample == name
            for label in labels
            if label[:3] == "le="
        }
        assert (min(limits), *sorted(limits)[-2:]) == (0.0005, 10, math.inf)


def test_each_metric_says_in_a_sentence_what_it_is(make_app: MakeApp) -> None:
    shown = testing.TestClient(make_app(metrics=True)).simulate_get("/metrics").text
    told = {
        family.name: family.documentation
        for family in families(shown)
        if family.name.startswith("taskd_")
    }
    assert len(told) == 6
    assert all(re.fullmatch("[A-Z][a-z ,]+[.]", sentence) for sentence in told.values()), told


def test_head_of_the_metrics_has_no_body(make_app: MakeApp) -> None:
    answer = testing.TestClient(make_app(metrics=True)).simulate_head("/metrics")
    assert (answer.status_code, answer.text) == (200, "")


def test_no_metric_tells_anything_about_a_user_or_a_task(start: Start) -> None:
    server = start(TASKD_METRICS="1")
    for user in ("alice-in-wonderland", *NASTY):
        answer = server.request("POST", path_of(user), {"title": "the white rabbit"}, bearer(user))
        assert answer.status_code == 201
        server.request("GET", f"{path_of(user)}/{answer.json['id']}?q=rabbit", headers=bearer(user))
    shown = server.request("GET", "/metrics").text
    for hidden in ("wonderland", "rabbit", "forged", "bob"):
        assert hidden not in shown
    assert set(re.findall(r'route="([^"]*)"', shown)) <= {
        "-",
        "/api/{user_id}/tasks",
        "/api/{user_id}/tasks/{task_id}",
    }


def test_a_write_that_had_to_wait_in_another_thread_is_one_statement(
    start: Start, tmp_path: Path
) -> None:
    server = start(TASKD_METRICS="1")
    with Wire(server) as wire:
        with locked(tmp_path / "taskd.db"):
            wire.send(written("POST", TASKS, {"title": "x"}, user="alice"))
            assert server.request("GET", "/healthz").status_code == 200
            time.sleep(0.1)
        assert wire.answer().status_code == 201
    found = samples(server.request("GET", "/metrics"))
    for statement in ("insert", "commit"):
        assert found["taskd_database_seconds_count", f"statement={statement}"] == 1
    took = found["taskd_request_seconds_sum", "method=POST", "route=/api/{user_id}/tasks"]
    assert took > 0.1, "all the time that the client waited"
    assert (
        found["taskd_requests_total", "method=POST", "route=/api/{user_id}/tasks", "status=201"]
        == 1
    )


@pytest.mark.both_engines
def test_statements_that_belong_together_are_timed_with_their_commit(start: Start) -> None:
    server = start(TASKD_METRICS="1")
    deletes = "taskd_database_seconds_count", "statement=delete"
    until(
        lambda: samples(server.request("GET", "/metrics")).get(deletes) == 1,
        "the old idempotency keys are deleted, as at every start",
    )
    before = samples(server.request("GET", "/metrics"))
    server.request("POST", TASKS, {"title": "x"}, bearer() | {"Idempotency-Key": "k"})
    found = samples(server.request("GET", "/metrics"))
    parts = sum(
        found["taskd_database_seconds_sum", f"statement={part}"]
        - before.get(("taskd_database_seconds_sum", f"statement={part}"), 0)
        for part in ("insert", "delete")
    )
    assert found["taskd_database_seconds_count", "statement=transaction"] == 1
    assert found["taskd_database_seconds_sum", "statement=transaction"] > parts


@pytest.mark.both_engines
def test_metrics_that_fail_do_not_affect_a_request(
    make_app: Callable[..., taskd.App],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    alice = Person(testing.TestClient(make_app(metrics=True)), "alice")
    monkeypatch.setattr(taskd, "CHANGES", None)
    created = alice.call("POST", json={"title": "x"})
    assert created.status_code == 201
    assert alice.call("GET").json[0]["title"] == "x"
    record, *_ = [record for record in caplog.records if "metrics lack" in record.message]
    assert vars(record)["id"] == created.headers["x-request-id"]


@pytest.mark.both_engines
def test_a_database_that_cannot_be_used_is_counted_as_503(start: Start, tmp_path: Path) -> None:
    server = start(TASKD_METRICS="1")
    sql(tmp_path / "taskd.db", "DROP TABLE task")
    assert_problem(server.request("GET", TASKS, headers=bearer()), 503)
    found = samples(server.request("GET", "/metrics"))
    assert (
        found["taskd_requests_total", "method=GET", "route=/api/{user_id}/tasks", "status=503"] == 1
    )


# --- Log lines ------------------------------------------------------------------------------------

LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (?:INFO|ERROR)"
    r" (?P<method>[A-Z-]+) (?P<route>\S+) (?P<status>\d{3}) (?P<ms>\d+\.\d)ms"
    r" id=(?P<id>[A-Za-z0-9._-]{1,64}) user=(?P<user>-|'[A-Za-z0-9._~%-]+')"
    r"( client=(?P<client>\S+))?( reason=\"[^\"]+\")?"
)


def lines(server: Process) -> list[str]:
    """Return the log after the start, split at everything that any program takes for a line end."""
    return server.log.splitlines()[1:]


def fields(server: Process) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(server)]


def test_a_line_has_the_time_to_the_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskd.time, "time", lambda: 1795208401.123456)
    monkeypatch.setattr(taskd.time, "time_ns", lambda: 1795208401_123456000)  # since Python 3.13
    fields = {"method": "GET", "route": "-", "status": 404, "ms": 0.5, "id": "mine", "user": None}
    request = logging.makeLogRecord(
        {"levelname": "INFO", "msg": "%s", "args": taskd.AccessLogFields(fields)}
    )
    line = "2026-11-20T21:00:01.123Z INFO GET - 404 0.5ms id=mine user=-"
    assert taskd.TextLines().format(request) == line


@pytest.mark.parametrize("user", NASTY)
def test_no_user_can_forge_a_line_of_text(server: Process, user: str) -> None:
    assert (
        server.request(
            "GET", path_of(user), headers=bearer(user) | {"X-Request-ID": "mine"}
        ).status_code
        == 200
    )
    until(lambda: lines(server), "a line in the log")
    [line] = lines(server)
    assert (found := LINE.fullmatch(line))
    assert (found["method"], found["status"], found["id"]) == ("GET", "200", "mine")
    assert found["user"] == f"'{quote(user, safe='')}'"


@pytest.mark.parametrize("user", NASTY)
def test_no_user_can_forge_a_field_even_if_lines_are_split_at_spaces(
    server: Process, user: str
) -> None:
    server.request("GET", path_of(user), headers=bearer(user) | {"X-Request-ID": "mine"})
    until(lambda: lines(server), "a line in the log")
    [line] = lines(server)
    assert line.isascii()
    assert line.isprintable()
    assert [word.partition("=")[0] for word in line.split(" ")[6:]] == ["id", "user"]


def test_a_user_called_dash_is_told_from_nobody(start: Start) -> None:
    for log_format, users in (("text", ["'-'", "-"]), ("json", ["-", None])):
        server = start(TASKD_LOG_FORMAT=log_format)
        server.request("GET", path_of("-"), headers=bearer("-"))
        server.request("GET", path_of("-"))
        until(partial(lambda server: len(lines(server)) == 2, server), "two lines in the log")
        found = (
            fields(server)
            if log_format == "json"
            else [LINE.fullmatch(line) for line in lines(server)]
        )
        assert [line["user"] for line in found if line] == users


def test_every_line_is_json_from_the_first_one_on(start: Start) -> None:
    server = start(
        TASKD_LOG_FORMAT="json", TASKD_LOG="warning", TASKD_JWKS_URL="http://127.0.0.1:9/jwks"
    )
    assert server.terminate() == 0
    *warned, listening = sorted(
        (json.loads(line) for line in server.log.splitlines()),
        key=lambda line: line["level"] == "INFO",
    )
    assert {line["level"] for line in warned} == {"WARNING"}
    assert listening["message"].startswith(f"taskd: listening on http://127.0.0.1:{server.port} ")


def test_a_request_takes_tenths_of_a_millisecond_and_gets_an_id_of_16_digits(
    alice: Person, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="taskd"):
        for _ in range(10):
            alice.call("GET")
    seen = [
        record.args for record in caplog.records if isinstance(record.args, taskd.AccessLogFields)
    ]
    assert len(seen) == 10
    for request in seen:
        assert request["ms"] == round(request["ms"], 1)
        assert re.fullmatch("[0-9a-f]{16}", request["id"])


@pytest.mark.parametrize("user", NASTY)
def test_no_user_can_forge_a_line_of_json(start: Start, user: str) -> None:
    server = start(TASKD_LOG_FORMAT="json")
    assert (
        server.request(
            "GET", path_of(user), headers=bearer(user) | {"X-Request-ID": "mine"}
        ).status_code
        == 200
    )
    until(lambda: lines(server), "a line in the log")
    [line] = fields(server)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line["ms"] == round(line["ms"], 1)
    assert 0 <= line.pop("ms") < 5000
    expected = {
        "level": "INFO",
        "method": "GET",
        "route": "/api/{user_id}/tasks",
        "status": 200,
        "id": "mine",
    }
    assert line == expected | {"user": user}


def test_each_request_has_its_line_whatever_became_of_it(start: Start) -> None:
    server = start(TASKD_LOG_FORMAT="json")
    server.request("POST", TASKS, {"title": "x"}, bearer())
    server.request("GET", f"{TASKS}?q=x", headers=bearer())
    server.request("GET", TASKS)
    server.request("GET", "/nowhere?token=secret")
    with Wire(server) as wire:
        assert (
            wire.send(written("POST", TASKS, None, "Content-Length: 1048577")).answer().status_code
            == 413
        )
    until(lambda: len(lines(server)) == 5, "five lines in the log")
    found = [
        (line["method"], line["route"], line["status"], line["user"]) for line in fields(server)
    ]
    route = "/api/{user_id}/tasks"
    assert found[:4] == [
        ("POST", route, 201, "alice"), ("GET", route, 200, "alice"), ("GET", route, 401, None),
        ("GET", "-", 404, None),
    ]  # fmt: skip
    assert found[4][2:] == (413, None)
    assert "secret" not in server.log


@pytest.mark.both_engines
def test_what_cannot_be_used_is_an_error_in_the_line_of_its_request(
    start: Start, tmp_path: Path
) -> None:
    server = start(TASKD_LOG_FORMAT="json")
    sql(tmp_path / "taskd.db", "DROP TABLE task")
    server.request("GET", TASKS, headers=bearer())
    until(lambda: lines(server), "a line in the log")
    [line] = fields(server)
    assert (line["level"], line["status"]) == ("ERROR", 503)
    assert re.search("no such table|does not exist", line["reason"])


def raised(text: str) -> Any:
    try:
        raise RuntimeError(text)
    except RuntimeError as ex:
        return type(ex), ex, ex.__traceback__


@pytest.mark.parametrize("text", NASTY)
def test_a_traceback_forges_no_line_either(text: str) -> None:
    record = logging.LogRecord(
        "taskd", logging.ERROR, "", 0, "unhandled exception", None, raised(text)
    )
    record.__dict__["id"] = "mine"
    line = taskd.JsonLines().format(record)
    assert len(line.splitlines()) == 1
    found = json.loads(line)
    assert (found["message"], found["id"]) == ("unhandled exception", "mine")
    assert "RuntimeError" in found["traceback"]
    first, *rest = (
        taskd.TextLines()
        .format(logging.makeLogRecord(record.__dict__ | {"exc_text": None}))
        .split("\n")
    )
    assert first.endswith("ERROR unhandled exception id=mine")
    assert rest
    assert all(line.startswith("    ") and line.isprintable() for line in rest)


@pytest.mark.parametrize("text", NASTY)
def test_a_message_forges_no_line_whatever_another_server_has_answered(text: str) -> None:
    record = logging.LogRecord(
        "taskd", logging.ERROR, "", 0, "the key set cannot be used: %s", (text,), None
    )
    line = taskd.TextLines().format(record)
    assert line.isprintable()
    assert (
        json.loads(taskd.JsonLines().format(record))["message"]
        == f"the key set cannot be used: {text}"
    )


def test_the_level_leaves_out_the_line_of_a_request(start: Start) -> None:
    server = start(TASKD_LOG="warning", TASKD_LOG_FORMAT="json")
    assert server.request("GET", "/healthz").status_code == 200
    assert server.terminate() == 0
    assert lines(server) == []


@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_at_every_level_a_request_that_found_the_database_unusable_has_a_line_with_its_time(
    start: Start, tmp_path: Path, level: str
) -> None:
    server = start(TASKD_LOG=level, before="taskd.LOCK_TIMEOUT = 0.5")
    with locked(tmp_path / "taskd.db"):
        assert server.request("POST", TASKS, {"title": "x"}, bearer()).status_code == 503
    assert server.request("GET", "/healthz").status_code == 200
    assert server.terminate() == 0
    found = [match for line in lines(server) if (match := LINE.fullmatch(line))]
    assert [line["status"] for line in found] == ["503", "200"][: 2 if level == "info" else 1]
    assert 400 < float(found[0]["ms"]) < 10_000


# --- Behind a proxy -------------------------------------------------------------------------------

FORWARDED = [  # the header of the proxy, and the client in it
    ("10.1.2.3", "10.1.2.3"),
    ("6.6.6.6, 10.1.2.3", "10.1.2.3"),  # only the last was added by the proxy
    ("10.1.2.3,2001:db8::7", "2001:db8::7"),
    ("[2001:db8::7]", "[2001:db8::7]"),
    ("[2001:db8::7]:4711", "[2001:db8::7]:4711"),
    ("10.1.2.3:4711", "10.1.2.3:4711"),
    ("", "127.0.0.1"),
    ("10.1.2.3, nonsense", "127.0.0.1"),
    ("10.1.2.3\tuser='bob'", "127.0.0.1"),
    ("<script>", "127.0.0.1"),
    ("x" * 1000, "127.0.0.1"),
]


@pytest.mark.parametrize("trusted", ["127.0.0.1", "*", "10.0.0.1, ::1,127.0.0.1"])
def test_a_trusted_proxy_tells_the_client(start: Start, trusted: str) -> None:
    server = start(TASKD_TRUSTED_PROXY=trusted)
    for forwarded, _ in FORWARDED:
        assert (
            server.request("GET", "/healthz", headers={"X-Forwarded-For": forwarded}).status_code
            == 200
        )
    until(lambda: len(lines(server)) == len(FORWARDED), "a line for each")
    found = [match["client"] for line in lines(server) if (match := LINE.fullmatch(line))]
    assert found == [client for _, client in FORWARDED]


def test_the_client_is_the_last_address_that_is_not_of_a_trusted_proxy(start: Start) -> None:
    server = start(TASKD_TRUSTED_PROXY="127.0.0.1, 10.9.9.9")
    chains = ["192.0.2.1, 10.1.2.3, 127.0.0.1", "10.1.2.3,10.9.9.9 , 127.0.0.1", "10.9.9.9"]
    for chain in chains:
        server.request("GET", "/healthz", headers={"X-Forwarded-For": chain})
    until(lambda: len(lines(server)) == len(chains), "a line for each")
    found = [match["client"] for line in lines(server) if (match := LINE.fullmatch(line))]
    assert found == ["10.1.2.3", "10.1.2.3", "127.0.0.1"]


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="there is no IPv6")
def test_a_proxy_is_known_however_its_address_is_spelt(start: Start) -> None:
    server = start(TASKD_TRUSTED_PROXY="0:0:0:0:0:0:0:1", TASKD_HOST="::1")
    connection = http.client.HTTPConnection("::1", server.port, timeout=DEADLINE)
    with closing(connection):
        connection.request("GET", "/healthz", headers={"X-Forwarded-For": "10.1.2.3"})
        assert connection.getresponse().status == 200
    until(lambda: lines(server), "a line in the log")
    assert LINE.fullmatch(lines(server)[0])["client"] == "10.1.2.3"  # type: ignore[index]


@pytest.mark.parametrize(("forwarded", "client"), FORWARDED)
@pytest.mark.parametrize("trusted", ["127.0.0.1", "*", "10.0.0.1", None])
def test_only_the_trusted_proxy_may_name_the_client(
    make_app: MakeApp,
    caplog: pytest.LogCaptureFixture,
    trusted: str | None,
    forwarded: str,
    client: str,
) -> None:
    caplog.set_level("INFO", "taskd")
    headers = bearer() | {"X-Forwarded-For": forwarded, "X-Request-ID": "mine"}
    testing.TestClient(make_app(trusted_proxies=(trusted,) if trusted else ())).simulate_get(
        TASKS, headers=headers
    )
    [line] = caplog.messages
    assert (found := LINE.fullmatch(f"2026-11-21T00:00:00.000Z INFO {line}"))
    expected = {
        "method": "GET",
        "route": "/api/{user_id}/tasks",
        "status": "200",
        "id": "mine",
        "user": "'alice'",
    }
    believed = {None: None, "10.0.0.1": "127.0.0.1"}.get(trusted, client)
    assert found.groupdict() == expected | {"client": believed, "ms": found["ms"]}
    assert 0 <= float(found["ms"]) < DEADLINE * 1000


def test_the_client_is_in_the_json_too(start: Start) -> None:
    server = start(TASKD_TRUSTED_PROXY="127.0.0.1", TASKD_LOG_FORMAT="json")
    server.request("GET", "/healthz", headers={"X-Forwarded-For": "10.1.2.3"})
    until(lambda: lines(server), "a line in the log")
    assert fields(server)[0]["client"] == "10.1.2.3"


@pytest.mark.parametrize("settings", [{}, {"TASKD_TRUSTED_PROXY": "10.0.0.1"}])
def test_only_the_listed_proxies_are_trusted(start: Start, settings: dict[str, str]) -> None:
    server = start(**settings)
    headers = bearer() | {
        "X-Forwarded-For": "10.1.2.3",
        "X-Forwarded-Prefix": "/todo",
        "Forwarded": "for=10.1.2.3",
    }
    headers |= {"X-Forwarded-Proto": "gopher", "X-Forwarded-Host": "evil", "X-Forwarded-Port": "x"}
    answer = server.request("POST", TASKS, {"title": "x"}, headers)
    assert answer.headers["location"] == f"{TASKS}/{answer.json['id']}"
    until(lambda: lines(server), "a line in the log")
    assert "10.1.2.3" not in server.log
    if settings:
        assert LINE.fullmatch(lines(server)[0])["client"] == "127.0.0.1"  # type: ignore[index]


@pytest.mark.parametrize(
    ("prefix", "shown"),
    [
        ("/todo", "/todo"),
        ("/a/b", "/a/b"),
        ("/todo/", "/todo"),
        ("", ""),
        ("todo", ""),
        ("/", ""),
        ("//evil.example", ""),
        ("/a b", ""),
        ("https://evil.example", ""),
        ('/"><x', ""),
    ],
)
def test_a_trusted_proxy_tells_where_it_has_put_taskd(
    make_app: MakeApp, prefix: str, shown: str
) -> None:
    client = testing.TestClient(make_app(trusted_proxies=("127.0.0.1",)))
    user = "a/ä"
    headers = bearer(user) | {"X-Forwarded-Prefix": prefix}
    extras = {
        "REQUEST_URI": path_of(user),
        "PATH_INFO": f"/api/{user}/tasks".encode().decode("latin-1"),
    }
    for _ in range(2):
        answer = client.simulate_post("/", headers=headers, extras=extras, json={"title": "x"})
        assert answer.headers["location"] == f"{shown}{path_of(user)}/{answer.json['id']}"
    link = client.simulate_get("/?limit=1", headers=headers, extras=extras).headers["link"]
    assert link.startswith(f"<{shown}{path_of(user)}?limit=1&after=")


def test_what_a_trusted_proxy_tells_counts_for_its_own_request_only(start: Start) -> None:
    server = start(TASKD_TRUSTED_PROXY="127.0.0.1")
    user = "a/ä"
    for prefix in ("/todo", "", "/a/b"):
        answer = server.request(
            "POST", path_of(user), {"title": "x"}, bearer(user) | {"X-Forwarded-Prefix": prefix}
        )
        assert answer.headers["location"] == f"{prefix}{path_of(user)}/{answer.json['id']}"


UNUSABLE = [
    ("TASKD_METRICS", "yes"),
    ("TASKD_METRICS", "2"),
    ("TASKD_LOG_FORMAT", "xml"),
    ("TASKD_LOG_FORMAT", "JSON"),
    ("TASKD_TRUSTED_PROXY", "proxy.example"),
    ("TASKD_TRUSTED_PROXY", "10.0.0.1, proxy"),
    ("TASKD_TRUSTED_PROXY", "*, 10.0.0.1"),
    ("TASKD_TRUSTED_PROXY", "999.1.1.1"),
    ("TASKD_TRUSTED_PROXY", "cafe"),
    ("TASKD_TRUSTED_PROXY", "10.0.0.0/8"),
]


@pytest.mark.parametrize(("variable", "value"), UNUSABLE)
def test_a_setting_that_cannot_be_used_stops_the_start(
    tmp_path: Path, variable: str, value: str
) -> None:
    variables: dict[str, Any] = {variable: value}
    process = Process(tmp_path, wait=False, **variables)
    assert process.terminate(0) == 2
    assert re.fullmatch(rf"taskd: {variable} must be [^\n]+\n", process.log)

"""What a careless or hostile client can do on the wire, and that nobody else notices."""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import (
    DEADLINE,
    ROOT,
    Process,
    Wire,
    WireAnswer,
    assert_problem,
    bearer,
    database_url,
    limited,
    stored,
    token,
    until,
    written,
)

TASKS = "/api/alice/tasks"
MILK = b'{"title": "Buy milk"}'
JSON = "Content-Type: application/json"
SOON = 5  # seconds for what takes milliseconds unless it hangs
SLOWEST = 1  # second until an ordinary request is answered, whatever the others do
SAME_ON_ALL = pytest.mark.sqlite("a request is parsed before the database is asked")
NEVER_SHOWN = (
    "Traceback",
    "sqlite",
    "peewee",
    "waitress",
    "SELECT",
    "INSERT",
    "taskd.db",
    ".py",
    str(ROOT),
)
NEVER_LOGGED = (
    "Traceback",
    "uncaptured",
    "unhandled",
    "Exception",
    " 500 ",
    " 501 ",
    " 502 ",
    " 503 ",
)


class Shared:
    """One server for many tests; a new one is started after a test that damaged it."""

    process: Process | None = None
    directory: Path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    shared = Shared()
    shared.directory = tmp_path_factory.mktemp("shared")
    # A database that is taken here is given to no other test of this module.
    database_url(shared.directory / "taskd.db")
    yield shared
    if shared.process:
        shared.process.kill()


@pytest.fixture
def server(shared: Shared) -> Iterator[Process]:
    """Give the shared server, and check afterwards that it is unharmed."""
    process = shared.process = shared.process or Process(shared.directory)
    logged = len(process.log)
    tasks = len(tasks_of(process))
    yield process
    shared.process = None
    try:
        unharmed(process, logged)
        assert len(tasks_of(process)) == tasks, (
            "a test must leave the tasks as they were, and so must its clients"
        )
        shared.process = process
    finally:
        if not shared.process:
            process.kill()


def tasks_of(process: Process) -> list[dict[str, object]]:
    return list(process.request("GET", TASKS, headers=bearer(), timeout=SOON).json)


def unharmed(process: Process, logged: int = 0) -> None:
    """Check that the server answers and writes, and that its log has nothing bad."""
    assert process.request("GET", "/healthz", timeout=SOON).status_code == 200
    created = process.request("POST", TASKS, {"title": "Buy milk"}, bearer(), timeout=SOON)
    assert created.status_code == 201, created.text
    assert (
        process.request("DELETE", f"{TASKS}/{created.json['id']}", headers=bearer()).json
        == created.json
    )
    log = process.log[logged:]
    assert not [bad for bad in NEVER_LOGGED if bad in log], log


def decent(answer: WireAnswer) -> WireAnswer:
    """Check the properties of every answer, and return it."""
    assert answer.status_code < 500, answer.text
    shown = f"{answer.line} {answer.headers} {answer.text}"
    assert not [word for word in NEVER_SHOWN if word in shown], shown
    if answer.status_code >= 400:
        assert_problem(answer, answer.status_code)
    return answer


# --- Requests that are wrong ----------------------------------------------------------------------

WRONG = [
    *[(f"Content-Length: {bad}",
       written("POST", TASKS, MILK, JSON, f"Content-Length: {bad}", user="alice"), 400)
      for bad in ("-1", "+21", "0x15", "2 1", "2_1", "many", "\xb2")],
    ("no Content-Length", written("POST", TASKS, None, JSON, "Content-Length:", user="alice"), 400),
    ("of 5,000 digits",
     written("POST", TASKS, MILK, JSON, f"Content-Length: {'9' * 5000}", user="alice"), (400, 413)),
    ("of 5,000 zeros", written("GET", "/healthz", None, f"Content-Length: {'0' * 5000}"), 200),
    ("two the same",
     written("POST", TASKS, MILK, JSON, *["Content-Length: 21"] * 2, user="alice"), 400),
    ("two that differ",
     written("POST", TASKS, MILK, "Content-Length: 21", "Content-Length: 5", user="alice"), 400),
    ("a list", written("POST", TASKS, MILK, JSON, "Content-Length: 21, 21", user="alice"), 400),
    ("a NUL in a header", written("GET", TASKS, None, "X-Nul: a\0b", user="alice"), 400),
    ("a NUL in a header's name", written("GET", TASKS, None, "X-\0: a", user="alice"), 400),
    ("an escape in a header", written("GET", TASKS, None, "X-Escape: \x1b[2J", user="alice"), 400),
    ("a NUL in the token", written("GET", TASKS, None, f"Authorization: Bearer {token()}\0"), 400),
    ("a bare CR in a header", written("GET", TASKS, None, "X-Bare: a\rb", user="alice"), 400),
    ("a bare LF in a header",
     written("GET", TASKS, None, "X-Bare: a\nAuthorization: Bearer x", user="alice"), 400),
    ("a bare LF in the request line", b"GET /healthz\nX: y HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("a folded first header", b"GET /healthz HTTP/1.1\r\n  folded: x\r\n\r\n", 400),
    ("a space before the colon",
     written("GET", TASKS, None, f"Authorization : Bearer {token()}"), 400),
    ("a NUL in the request line", b"GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n", (400, 404)),
    ("no version", b"GET /healthz\r\n\r\n", 400),
    ("HTTP/9.9", b"GET /healthz HTTP/9.9\r\n\r\n", 400),
    ("HTTP/x", b"GET /healthz HTTP/x\r\n\r\n", 400),
    ("the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) + b"\r\n\r\n", 400),
    ("OPTIONS *", b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", (200,)),
    ("CONNECT", b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\n\r\n", (400, 404, 405)),
    ("an address with a bracket",
     b"GET http://[::1/healthz HTTP/1.1\r\nHost: x\r\n\r\n", (400, 404)),
    ("an address that is no address",
     b"GET http://[x]/healthz HTTP/1.1\r\nHost: x\r\n\r\n", (200, 400, 404)),
    ("an address with a port of letters",
     b"GET http://x:port/healthz HTTP/1.1\r\nHost: x\r\n\r\n", (200, 400)),
    ("a host with a bracket", b"GET /healthz HTTP/1.1\r\nHost: [\r\n\r\n", (200, 400)),
    ("a host with a port of letters", b"GET /nowhere HTTP/1.1\r\nHost: x:port\r\n\r\n", (400, 404)),
    ("bytes that are no UTF-8 in the path",
     b"GET /api/%ff%fe\xff/tasks HTTP/1.1\r\n\r\n", (400, 401, 404)),
    ("a percent sign alone", b"GET /api/%/tasks%zz HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    ("a query of nonsense",
     b"GET /healthz?%ff&=&=%00&a=%zz;[]{}| HTTP/1.1\r\nHost: x\r\n\r\n", 200),
    ("a request line of 100 KB", written("GET", "/" + "x" * 100_000), 431),
    ("a query of 100 KB", written("GET", "/healthz?" + "x" * 100_000), 431),
    ("a path of 60 KB", written("GET", "/" + "x" * 60_000), 431),
    ("a path of 15 KB", written("GET", "/" + "x" * 15_000), 404),
    ("a path of 8,000 parts", written("GET", "/api" + "/x" * 8_000), 404),
    ("200 headers",
     written("GET", "/healthz", None, *[f"X-{number}: y" for number in range(200)]), 200),
    ("2,000 headers",
     written("GET", "/healthz", None, *[f"X-{number}: y" for number in range(2000)]), 431),
    ("20,000 headers",
     written("GET", "/healthz", None, *[f"X-{number}: y" for number in range(20_000)]), 431),
    ("one header 200 times",
     written("GET", TASKS, None, *["Accept: a/b;q=0.1"] * 200, user="alice"), 200),
    ("a token of 60 KB", written("GET", TASKS, None, f"Authorization: Bearer {'x' * 60_000}"), 401),
    ("two tokens",
     written("GET", TASKS, None, f"Authorization: Bearer {token('bob')}", user="alice"), 401),
    ("the same token twice",
     written("GET", TASKS, None, f"Authorization: Bearer {token()}", user="alice"), 401),
    ("a token and an empty one", written("GET", TASKS, None, "Authorization:", user="alice"), 401),
    ("a token and Basic",
     written("GET", TASKS, None, "Authorization: Basic YTpi", user="alice"), 401),
    ("a token under another's name",
     written("GET", TASKS, None, f"Authorization_: Bearer {token()}"), 401),
    ("an unknown method", written("BREW", TASKS, user="alice"), 405),
    ("a method of 1,000 letters", written("A" * 1000, TASKS, user="alice"), 405),
    ("chunks of no size",
     written("POST", TASKS, b"\r\n\r\nx", JSON, "Transfer-Encoding: chunked", user="alice"), None),
    ("a negative chunk",
     written("POST", TASKS, b"-5\r\n", JSON, "Transfer-Encoding: chunked", user="alice"), 400),
    ("a chunk of 0x",
     written("POST", TASKS, b"0x15\r\n", JSON, "Transfer-Encoding: chunked", user="alice"), 400),
    ("a chunk too short",
     written("POST", TASKS, b"3\r\nabcdef\r\n", "Transfer-Encoding: chunked", user="alice"), 400),
    ("a chunk of 2^70",
     written("POST", TASKS, b"f" * 18 + b"\r\nx", JSON, "Transfer-Encoding: chunked"), None),
    ("a chunk's size of 100 KB",
     written("POST", TASKS, b"0" * 100_000, JSON, "Transfer-Encoding: chunked"), None),
    ("chunked twice",
     written("POST", TASKS, b"0\r\n\r\n", *["Transfer-Encoding: chunked"] * 2, user="alice"), 400),
    ("chunked, gzip",
     written("POST", TASKS, b"0\r\n\r\n", "Transfer-Encoding: chunked, gzip", user="alice"), 400),
    ("xchunked",
     written("POST", TASKS, b"0\r\n\r\n", "Transfer-Encoding: xchunked", user="alice"), 400),
    ("a body of gzip",
     written("PUT", f"{TASKS}/1", {}, "Content-Encoding: gzip", user="alice"), 415),
    ("an unknown expectation",
     written("GET", "/healthz", None, "Expect: the unexpected"), (200, 417)),
    ("an upgrade",
     written("GET", "/healthz", None, "Connection: Upgrade", "Upgrade: websocket"), 200),
]  # fmt: skip


@pytest.mark.parametrize(
    ("sent", "status"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG]
)
@SAME_ON_ALL
def test_a_request_that_is_wrong_harms_nobody(
    server: Process, sent: bytes, status: int | tuple[int, ...] | None
) -> None:
    with Wire(server, timeout=SOON) as wire:
        wire.send(sent)
        # Without a status the request is unfinished, and the server waits for the rest.
        if status is not None:
            answer = decent(wire.answer())
            assert answer.status_code in (status if isinstance(status, tuple) else (status,)), (
                answer.text
            )


def test_garbage_of_every_byte_is_answered_or_cut_off(server: Process) -> None:
    for byte in range(256):
        with Wire(server, timeout=SOON) as wire:
            wire.send(bytes([byte]) * 64 + b"\r\n\r\n")
            if bytes(
                [byte]
            ).strip():  # empty lines before a request are ignored (RFC 9112, section 2.2)
                assert decent(wire.answer()).status_code in (400, 404, 405)


# --- Bodies that are not what their length says ---------------------------------------------------


def test_a_length_that_is_too_large_makes_no_task_when_the_client_leaves(server: Process) -> None:
    with Wire(server) as wire:
        wire.send(written("POST", TASKS, MILK, JSON, "Content-Length: 22", user="alice"))
        wire.socket.shutdown(socket.SHUT_WR)
        assert wire.is_closed()


def test_after_a_length_that_is_too_small_the_rest_is_not_taken_for_a_request(
    server: Process,
) -> None:
    with Wire(server) as wire:
        wire.send(written("POST", TASKS, MILK, JSON, "Content-Length: 5", user="alice"))
        assert decent(wire.answer()).status_code == 400
        wire.socket.shutdown(socket.SHUT_WR)
        assert wire.is_closed()


def test_what_is_hidden_behind_two_kinds_of_length_is_not_answered_as_a_second_request(
    server: Process,
) -> None:
    hidden = written("DELETE", f"{TASKS}/1", user="alice")
    both = ("Content-Length: 5", "Transfer-Encoding: chunked")
    for lines in (both, both[::-1]):
        with Wire(server) as wire:
            wire.send(written("POST", TASKS, b"0\r\n\r\n" + hidden, JSON, *lines, user="alice"))
            assert decent(wire.answer()).status_code == 400
            assert wire.is_closed(), (
                "RFC 9112, section 6.1: the connection cannot be trusted any more"
            )


@pytest.mark.parametrize("cut", [1, 3, 20, 24, 26, 29])
def test_a_chunked_body_that_ends_too_early_makes_no_task(server: Process, cut: int) -> None:
    body = b"15\r\n" + MILK + b"\r\n0\r\n\r\n"
    with Wire(server) as wire:
        wire.send(
            written("POST", TASKS, body[:cut], JSON, "Transfer-Encoding: chunked", user="alice")
        )
        wire.socket.shutdown(socket.SHUT_WR)
        assert wire.is_closed()


def test_300_clients_that_leave_in_mid_body_leave_nothing_behind(server: Process) -> None:
    descriptors = Path(f"/proc/{server.popen.pid}/fd")
    before = len(list(descriptors.iterdir())) if descriptors.exists() else 0
    whole = written("POST", TASKS, {"title": "Buy milk", "description": "x" * 10_000}, user="alice")
    large = written("POST", TASKS, b"x" * 700_000, JSON, "Content-Length: 900000", user="alice")
    for number in range(300):
        with Wire(server) as wire:
            wire.send(large if number % 50 == 0 else whole[: -1 - number])
            if number % 2:
                wire.reset()
    assert tasks_of(server) == []
    if descriptors.exists():
        until(
            lambda: len(list(descriptors.iterdir())) <= before,
            "the connections and their files are closed",
        )


def test_clients_that_leave_before_their_answer_leave_nothing_half_done(server: Process) -> None:
    for number in range(100):
        with Wire(server) as wire:
            wire.send(written("POST", TASKS, {"title": f"Buy milk {number}"}, user="alice"))
            wire.reset()
    quiet = 0
    while quiet < 20:  # on PostgreSQL some of them still run in worker threads
        done = tasks_of(server)
        assert all(str(task["title"]).startswith("Buy milk ") for task in done)
        for task in done:
            server.request("DELETE", f"{TASKS}/{task['id']}", headers=bearer())
        quiet = 0 if done else quiet + 1


# --- Clients that take their time -----------------------------------------------------------------


def timed(server: Process, times: int) -> list[float]:
    """Return the seconds of some ordinary requests, each on a connection of its own."""
    taken = []
    for _ in range(times):
        started = time.monotonic()
        assert server.request("GET", TASKS, headers=bearer(), timeout=DEADLINE).status_code == 200
        taken.append(time.monotonic() - started)
    return taken


def test_250_slow_and_idle_connections_delay_nobody(server: Process) -> None:
    idle = [Wire(server) for _ in range(200)]
    for wire in idle[:100]:
        assert wire.send(written("GET", "/healthz")).answer().status_code == 200
    slow = [Wire(server) for _ in range(50)]
    request = written("POST", TASKS, MILK, JSON, "Content-Length: 21", user="alice")
    ended = threading.Event()

    def trickle() -> None:
        for byte in request[:-1]:
            for wire in slow:
                wire.send(bytes([byte]))
            if ended.wait(0.01):
                return

    trickling = threading.Thread(target=trickle)
    trickling.start()
    try:
        taken = timed(server, 50)
    finally:
        ended.set()
        trickling.join(DEADLINE)
        for wire in idle + slow:
            wire.close()
    assert max(taken) < SLOWEST


def test_a_request_that_comes_byte_by_byte_is_answered(server: Process) -> None:
    with Wire(server) as wire:
        wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in written("GET", TASKS, user="alice"):
            wire.send(bytes([byte]))
        assert decent(wire.answer()).json == []


def fill(server: Process, count: int) -> None:
    for number in range(count):
        task = {"title": f"Dig {number}", "description": "€" * 10_000}
        assert server.request("POST", TASKS, task, bearer()).status_code == 201


def test_readers_that_do_not_read_delay_nobody(start: Callable[..., Process]) -> None:
    server = start()
    fill(server, 200)  # eight lists have 48 MB, in files: more than there may be in memory
    readers = [
        Wire(server, receive_buffer=4096).send(written("GET", TASKS, user="alice"))
        for _ in range(8)  # more simultaneous long lists of one user are rejected
    ]
    started = time.monotonic()
    for _ in range(20):
        assert (
            server.request("GET", f"{TASKS}/1", headers=bearer(), timeout=DEADLINE).status_code
            == 200
        )
        assert (
            server.request(
                "PATCH", f"{TASKS}/1/complete", headers=bearer(), timeout=DEADLINE
            ).status_code
            == 200
        )
    assert time.monotonic() - started < 20 * SLOWEST
    assert len(readers[0].answer().json) == 200
    for reader in readers:
        reader.reset()
    unharmed(server)


def test_a_reader_that_pipelines_and_does_not_read_stops_nobody(
    start: Callable[..., Process],
) -> None:
    server = start()
    fill(server, 30)
    request = written("GET", TASKS, user="alice")
    with Wire(server, receive_buffer=4096) as wire:
        wire.send(request * 60)  # 50 MB of answers, more than the server keeps for one client
        assert max(timed(server, 10)) < SOON
        status = Path(f"/proc/{server.popen.pid}/status")
        if status.exists():
            resident = next(
                line for line in status.read_text().splitlines() if line.startswith("VmRSS")
            )
            assert int(resident.split()[1]) < 150_000, "answers that nobody takes must not pile up"
        for _ in range(60):
            assert len(decent(wire.answer()).json) == 30
    unharmed(server)


def test_more_pipelined_requests_than_fit_into_one_read_are_all_answered(server: Process) -> None:
    with Wire(server) as wire:
        sending = threading.Thread(target=wire.send, args=(written("GET", "/healthz") * 3000,))
        sending.start()
        for _ in range(3000):
            assert wire.answer().status_code == 200
        sending.join(DEADLINE)


def test_one_client_that_pipelines_does_not_delay_the_others(server: Process) -> None:
    with Wire(server) as wire:
        sending = threading.Thread(
            target=wire.send, args=(written("GET", TASKS, user="alice") * 1000,)
        )
        sending.start()
        assert max(timed(server, 20)) < SLOWEST
        for _ in range(1000):
            assert wire.answer().status_code == 200
        sending.join(DEADLINE)


def test_more_connections_than_descriptors_close_those_that_are_idle_longest(
    start: Callable[..., Process],
) -> None:
    server = start(before=limited(100))
    with Wire(server) as old:
        assert (
            old.send(written("POST", TASKS, {"title": "Buy milk"}, user="alice"))
            .answer()
            .status_code
            == 201
        )
        flood = [Wire(server) for _ in range(150)]
        assert old.is_closed()
        for number in range(5):
            started = time.monotonic()
            task = {"title": f"Buy tea {number}"}
            assert server.request("POST", TASKS, task, bearer()).status_code == 201
            assert server.request("GET", "/readyz").status_code == 200
            assert time.monotonic() - started < SLOWEST
        assert flood[0].is_closed()
        assert flood[-1].send(written("GET", "/healthz")).answer().status_code == 200
        for wire in flood:
            wire.close()
    assert server.request("POST", TASKS, {"title": "Buy milk"}, bearer()).status_code == 201
    assert "Traceback" not in server.log
    assert server.terminate() == 0


def test_bodies_that_nobody_may_send_are_not_kept(server: Process) -> None:
    """Send 64 bodies of 900 KB: each is rejected, and the memory is freed."""
    before = resource.getpagesize() * int(
        Path(f"/proc/{server.popen.pid}/statm").read_text().split()[1]
    )
    for _ in range(64):
        with Wire(server) as wire:
            wire.send(written("POST", TASKS, b"x" * 900_000, JSON, "Content-Length: 900000"))
            assert decent(wire.answer()).status_code == 413
    after = resource.getpagesize() * int(
        Path(f"/proc/{server.popen.pid}/statm").read_text().split()[1]
    )
    assert after - before < 20_000_000


def test_what_the_wire_tests_left_in_the_database_is_sound(server: Process) -> None:
    assert stored(server.log_path.with_name("taskd.db")) == {}

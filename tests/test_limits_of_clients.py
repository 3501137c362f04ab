"""What a client can cost: framing that is not HTTP; slow, idle, silent and greedy clients."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import taskd
from support import (
    DEADLINE,
    Answer,
    Process,
    Wire,
    assert_problem,
    bearer,
    limited,
    locked,
    stored,
    token,
    until,
    written,
)
from test_costs import fill

Start = Callable[..., Process]

TASKS = "/api/alice/tasks"
SOON = 1.0  # seconds of the server's processor time within which another client is served
PATIENCE = 15.0  # seconds on the clock: not what is judged, a busy machine can be slow
CHUNKED = "Transfer-Encoding: chunked"
JSON = "Content-Type: application/json"
MILK = b'{"title": "Buy milk"}'
WHOLE = b"15\r\n" + MILK + b"\r\n0\r\n\r\n"  # it makes a task where chunks are understood
GOOD = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
HIDDEN = written("DELETE", f"{TASKS}/1", user="alice")  # a request that a body must not smuggle in


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(tmp_path_factory.mktemp("limits"), TASKD_CORS_ORIGINS="https://a.example")
    assert process.request("POST", TASKS, {"title": "Stay"}, bearer()).status_code == 201
    yield process
    assert [*stored(process.log_path.with_name("taskd.db"))][:1] == [1], "nothing was smuggled in"
    assert not [bad for bad in ("Traceback", "uncaptured", "unhandled") if bad in process.log]
    assert process.terminate() == 0


def memory(server: Process) -> int:
    """Return the resident memory of a process in bytes."""
    pages = Path(f"/proc/{server.popen.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def another_is_served(server: Process, soon: float = SOON) -> None:
    """Check that another client reads, lists and writes in time."""
    task = {"title": "Another"}
    asked = (("GET", None), ("POST", task), ("GET", None))
    for method, body in asked:
        started, used = time.monotonic(), server.processor_time()
        answer = server.request(method, "/api/bob/tasks", body, bearer("bob"))
        assert answer.status_code in (200, 201), answer.text
        assert server.processor_time() - used < soon
        assert time.monotonic() - started < PATIENCE
    assert server.request("GET", "/readyz").status_code == 200


def add_long_tasks(server: Process, count: int) -> None:
    """Create tasks of alice with 10,000 characters each."""
    for number in range(count):
        task = {"title": f"Dig {number}", "description": "x" * 10_000}
        assert server.request("POST", TASKS, task, bearer()).status_code == 201


@contextlib.contextmanager
def connected(server: Process, count: int) -> Iterator[list[Wire]]:
    """Give connections of a client that reads nothing, and close them."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Wire(server, receive_buffer=4096)) for _ in range(count)]


def refuses_connections(server: Process, tried: contextlib.ExitStack) -> bool:
    """Try to connect, and keep the connection: one that is closed would make room for others."""
    client = tried.enter_context(socket.socket())
    return client.connect_ex(("127.0.0.1", server.port)) != 0


def sent_in_vain(wire: Wire, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # the server may have closed it
        wire.send(data)


# --- Framing --------------------------------------------------------------------------------------


def get(*lines: str, target: str = "/healthz", version: str = "HTTP/1.1") -> bytes:
    return "\r\n".join([f"GET {target} {version}", *lines, "", ""]).encode("latin-1")


def post(body: bytes, *lines: str, version: str = "1.1") -> bytes:
    return written("POST", TASKS, body, JSON, *lines, user="alice", version=version)


def put_chunks(body: bytes) -> bytes:
    return written("PUT", f"{TASKS}/1", body, JSON, CHUNKED, user="alice")


def many_chunks(size: bytes, count: int) -> bytes:
    """Return a body of chunks with this size line, all of them a space, and then the chunk {}."""
    return (size + b"\r\n \r\n") * count + b"2\r\n{}\r\n0\r\n\r\n"


HOST = "Host: x"
EMPTY = b'{"title": "Stay"}'
KIBIBYTE = b"X: " + b"y" * 1019 + b"\r\n"  # a header line
# The cases of llhttp's and h11's test suites and of the published lists of request smuggling,
# with what RFC 9110 and 9112 say of each, and taskd's own limits.
REQUESTS: dict[str, tuple[bytes, int]] = {
    # the request line
    "version 1.0": (get(HOST, version="HTTP/1.0"), 200),
    "version 1.2": (get(HOST, version="HTTP/1.2"), 200),
    "version 1.9": (get(HOST, version="HTTP/1.9"), 200),
    "version 0.9": (get(HOST, version="HTTP/0.9"), 400),
    "version 2.0": (get(HOST, version="HTTP/2.0"), 400),
    "version 3.0": (get(HOST, version="HTTP/3.0"), 400),
    "version 1.10": (get(HOST, version="HTTP/1.10"), 400),
    "version 1": (get(HOST, version="HTTP/1"), 400),
    "version 01.1": (get(HOST, version="HTTP/01.1"), 400),
    "small letters in the version": (get(HOST, version="http/1.1"), 400),
    "another protocol": (get(HOST, version="RTSP/1.0"), 400),
    "a space after the version": (get(HOST, version="HTTP/1.1 "), 400),
    "two spaces before the version": (get(HOST, version=" HTTP/1.1"), 400),
    "two spaces before the path": (get(HOST, target=" /healthz"), 400),
    "a tab for a space": (b"GET\t/healthz HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a carriage return too many": (get(HOST, version="HTTP/1.1\r"), 400),
    "a bare line feed after the request line": (b"GET /healthz HTTP/1.1\nHost: x\r\n\r\n", 400),
    "an empty line first": (b"\r\n" + get(HOST), 200),
    "a space first": (b" " + get(HOST), 400),
    "an unknown method": (get(HOST).replace(b"GET", b"M-SEARCH"), 405),
    "a method of every token character": (get(HOST).replace(b"GET", b"!#$%&'*+.^_`|~-A9"), 405),
    "a method that is no token": (get(HOST).replace(b"GET", b"G@T"), 400),
    "a method of small letters": (get(HOST).replace(b"GET", b"get"), 405),
    "a method of TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "a tab in the path": (get(HOST, target="/hea\tlthz"), 400),
    "a control character in the path": (get(HOST, target="/hea\x01lthz"), 400),
    "a NUL in the path": (get(HOST, target="/healthz\x00"), 400),
    "DEL in the path": (get(HOST, target="/hea\x7flthz"), 400),
    "a path without a slash": (get(HOST, target="healthz"), 400),
    "an asterisk": (get(HOST, target="*"), 400),
    "an authority": (get(HOST, target="x:80"), 400),
    "CONNECT": (get(HOST, target="x:80").replace(b"GET", b"CONNECT"), 400),
    "an http URL": (get(HOST, target="http://x/healthz"), 200),
    "an HTTPS URL with a port": (get(HOST, target="HTTPS://x.example:443/healthz?a=b"), 200),
    "an http URL without a path": (get(HOST, target="http://x"), 307),
    "a URL of another scheme": (get(HOST, target="ftp://x/healthz"), 400),
    "a URL without a host": (get(HOST, target="http:///healthz"), 400),
    "a URL with a user": (get(HOST, target="http://me@x/healthz"), 400),
    "a fragment": (get(HOST, target="/healthz#a"), 200),
    # Host
    "no Host": (get(), 400),
    "no Host in 1.0": (get(version="HTTP/1.0"), 200),
    "an empty Host": (get("Host:"), 400),
    "an empty Host in 1.0": (get("Host: ", version="HTTP/1.0"), 400),
    "two Hosts": (get(HOST, "Host: y"), 400),
    "the same Host twice": (get(HOST, HOST), 400),
    "a list of Hosts": (get("Host: x, y"), 400),
    "Hosts without a space": (get("Host: x,y"), 400),
    "a Host with a space": (get("Host: x y"), 400),
    "a Host with a path": (get("Host: x/y"), 400),
    "a Host with a user": (get("Host: me@x"), 400),
    "a Host with a port": (get("Host: x.example:8000"), 200),
    "a Host with an underscore": (get("Host: my_service:8000"), 200),
    "a Host of IPv6": (get("Host: [::1]:8000"), 200),
    "a Host with half a bracket": (get("Host: [::1"), 400),
    "a port of letters": (get("Host: x:http"), 400),
    # headers
    "a space before the colon": (get(HOST, "X : y"), 400),
    "a line without a colon": (get(HOST, "X"), 400),
    "a header without a name": (get(HOST, ": y"), 400),
    "an empty header": (get(HOST, "X:"), 200),
    "a folded header": (get(HOST, "X: a", " b"), 400),
    "a folded first header": (get(" X: a", HOST), 400),
    "a header in brackets": (get(HOST, "X[]: y"), 400),
    "a control character in a header": (get(HOST, "X: a\x01b"), 400),
    "DEL in a header": (get(HOST, "X: a\x7fb"), 400),
    "letters beyond ASCII in a header": (get(HOST, "X: \xe4\xff"), 200),
    "a bare carriage return in a header": (get(HOST, "X: a\rb"), 400),
    "a bare line feed after a header": (b"GET /healthz HTTP/1.1\r\nHost: x\nX: y\r\n\r\n", 400),
    "255 headers": (get(HOST, *["X: y"] * 254), 200),
    "256 headers": (get(HOST, *["X: y"] * 255), 200),
    "257 headers": (get(HOST, *["X: y"] * 256), 431),
    "a header that never ends": (get(HOST)[:-2] + b"X: " + b"y" * 66_000, 431),
    "a request line that never ends": (b"GET /" + b"x" * 66_000, 431),
    "a target of 20 KiB": (get(HOST, target="/healthz?" + "a" * (20 * 1024 - 9)), 200),
    "a longer target": (get(HOST, target="/healthz?" + "a" * (20 * 1024 - 8)), 431),
    "an upgrade": (get(HOST, "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings"), 200),
    # lengths
    "two lengths": (post(MILK, "Content-Length: 21", "Content-Length: 21"), 400),
    "two lengths in one": (post(MILK, "Content-Length: 21, 21"), 400),
    "an empty length": (post(MILK, "Content-Length:"), 400),
    "a length with a sign": (post(MILK, "Content-Length: +21"), 400),
    "a length below zero": (post(MILK, "Content-Length: -1"), 400),
    "a length in hexadecimal": (post(MILK, "Content-Length: 0x15"), 400),
    "a length with a space": (post(MILK, "Content-Length: 2 1"), 400),
    "a length with a no-break space": (post(MILK, "Content-Length: 21\xa0"), 400),
    "a length over 2^64": (post(MILK, "Content-Length: 18446744073709551617"), 400),
    "a length over the limit": (post(b"", "Content-Length: 65537"), 413),
    "a space before a length's colon": (post(MILK, "Content-Length : 21"), 400),
    # transfer codings
    "a length and chunks": (post(b"0\r\n\r\n" + HIDDEN, "Content-Length: 5", CHUNKED), 400),
    "chunks and a length": (post(b"0\r\n\r\n" + HIDDEN, CHUNKED, "Content-Length: 5"), 400),
    "chunks in 1.0": (post(WHOLE, CHUNKED, version="1.0"), 400),
    "chunks and a length in 1.0": (
        post(b"0\r\n\r\n" + HIDDEN, CHUNKED, "Content-Length: 5", version="1.0"),
        400,
    ),
    "chunks in 2.0": (post(b"0\r\n\r\n" + HIDDEN, CHUNKED, version="2.0"), 400),
    "gzip": (post(b"", "Transfer-Encoding: gzip"), 400),
    "gzip, chunked": (post(WHOLE, "Transfer-Encoding: gzip, chunked"), 400),
    "chunked, gzip": (post(WHOLE, "Transfer-Encoding: chunked, gzip"), 400),
    "identity": (post(b"", "Transfer-Encoding: identity"), 400),
    "chunked, identity": (post(WHOLE, "Transfer-Encoding: chunked, identity"), 400),
    "chunked twice": (post(WHOLE, CHUNKED, CHUNKED), 400),
    "an empty coding": (post(MILK, "Transfer-Encoding:", "Content-Length: 21"), 400),
    "an empty coding alone": (post(b"", "Transfer-Encoding: "), 400),
    "a coding in quotes": (post(WHOLE, 'Transfer-Encoding: "chunked"'), 400),
    "a coding behind a vertical tab": (post(WHOLE, "Transfer-Encoding: \x0bchunked"), 400),
    "xchunked": (post(WHOLE, "Transfer-Encoding: xchunked"), 400),
    "a coding of capitals": (
        written(
            "PUT",
            f"{TASKS}/1",
            b"2\r\n{}\r\n0\r\n\r\n",
            JSON,
            "Transfer-Encoding: CHUNKED",
            user="alice",
        ),
        200,
    ),
    # chunks
    "a chunk": (put_chunks(b"2\r\n{}\r\n0\r\n\r\n"), 200),
    "one-byte chunks": (put_chunks(b"1\r\n{\r\n1\r\n}\r\n0\r\n\r\n"), 200),
    "leading zeros": (put_chunks(b"0000000000000002\r\n{}\r\n0000\r\n\r\n"), 200),
    "an extension": (put_chunks(b"2;a=b\r\n{}\r\n0;c\r\n\r\n"), 200),
    "an extension between spaces": (put_chunks(b"2 ; a=b\r\n{}\r\n0\t;\tc\r\n\r\n"), 200),
    "an extension in quotes": (put_chunks(b'2;a="b;c"\r\n{}\r\n0\r\n\r\n'), 200),
    "a trailer": (put_chunks(b"2\r\n{}\r\n0\r\nX: y\r\n\r\n"), 200),
    "a trailer with a length": (put_chunks(b"2\r\n{}\r\n0\r\nX-Length: 9\r\n\r\n"), 200),
    "several extensions": (put_chunks(b'2;a;b=c ; d = "e\\"\xe4" ;f\r\n{}\r\n0\r\n\r\n'), 200),
    "an extension without a name": (put_chunks(b"2;\r\n{}\r\n0\r\n\r\n"), 400),
    "a control character in an extension": (put_chunks(b"2;a\x01\r\n{}\r\n0\r\n\r\n"), 400),
    "a bare line feed after a size": (put_chunks(b"2\n{}\r\n0\r\n\r\n"), 400),
    "a bare line feed after an extension": (put_chunks(b"2;a\n{}\r\n0\r\n\r\n"), 400),
    "a bare line feed after a chunk": (put_chunks(b"2\r\n{}\n0\r\n\r\n"), 400),
    "a carriage return alone after a chunk": (put_chunks(b"2\r\n{}\rx0\r\n\r\n"), 400),
    "a size line of 4,000 bytes": (put_chunks(b"2;%b\r\n{}\r\n0\r\n\r\n" % (b"a" * 4_000)), 200),
    "a size line of 4,200 bytes": (put_chunks(b"2;%b\r\n{}\r\n0\r\n\r\n" % (b"a" * 4_200)), 400),
    "60,000 chunks of a byte": (put_chunks(many_chunks(b"1", 60_000)), 200),
    "20,000 chunks of a byte after a zero": (put_chunks(many_chunks(b"01", 20_000)), 200),
    "30,000 chunks of a byte after a zero": (put_chunks(many_chunks(b"01", 30_000)), 413),
    "an empty line before a size": (put_chunks(b"\r\n2\r\n{}\r\n0\r\n\r\n"), 400),
    "a space before a size": (put_chunks(b" 2\r\n{}\r\n0\r\n\r\n"), 400),
    "a space after a size": (put_chunks(b"2 \r\n{}\r\n0\r\n\r\n"), 400),
    "a size with a sign": (put_chunks(b"+2\r\n{}\r\n0\r\n\r\n"), 400),
    "a size of 0x2": (put_chunks(b"0x2\r\n{}\r\n0\r\n\r\n"), 400),
    "a size with an underscore": (put_chunks(b"0_2\r\n{}\r\n0\r\n\r\n"), 400),
    "an empty size": (put_chunks(b";a\r\n{}\r\n0\r\n\r\n"), 400),
    "a chunk too long": (put_chunks(b"2\r\n{}}\r\n0\r\n\r\n"), 400),
    "a size over 2^64": (put_chunks(b"1" + b"0" * 16 + b"2\r\n{}\r\n0\r\n\r\n"), 400),
    "a chunk of 64 KiB": (put_chunks(b"10000\r\n" + b"{}".ljust(65536) + b"\r\n0\r\n\r\n"), 200),
    "a size over the limit": (put_chunks(b"10001\r\n"), 413),
    "a request for a trailer": (put_chunks(b"2\r\n{}\r\n0\r\n" + HIDDEN), 400),
    "trailers of 60 KiB": (put_chunks(b"2\r\n{}\r\n0\r\n" + KIBIBYTE * 60 + b"\r\n"), 200),
    "trailers of 65 KiB": (put_chunks(b"2\r\n{}\r\n0\r\n" + KIBIBYTE * 65), 413),
    "a trailer that never ends": (put_chunks(b"2\r\n{}\r\n0\r\nX: " + b"y" * 66_000), 413),
    "200 headers and 100 trailers": (
        written(
            "PUT",
            f"{TASKS}/1",
            b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 100 + b"\r\n",
            JSON,
            CHUNKED,
            *["X: y"] * 200,
            user="alice",
        ),
        200,
    ),
    "a folded trailer": (put_chunks(b"2\r\n{}\r\n0\r\nX: y\r\n z\r\n\r\n"), 400),
    "a bare line feed after a trailer": (put_chunks(b"2\r\n{}\r\n0\r\nX: y\n\r\n"), 400),
}  # fmt: skip


@pytest.mark.sqlite("it is about HTTP")
@pytest.mark.parametrize(("sent", "status"), REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut in two"])
def test_each_request_of_the_corpora_has_its_answer(
    shared: Process, sent: bytes, status: int, cut: bool
) -> None:
    with Wire(shared) as wire:
        wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if cut:  # in the middle
            wire.send(sent[: len(sent) // 2])
            assert shared.request("GET", "/healthz").status_code == 200
            sent = sent[len(sent) // 2 :]
        sent_in_vain(wire, sent + GOOD if status < 400 else sent)
        answer = wire.answer()
        assert answer.status_code == status, answer.text
        if status in (400, 413, 431):
            assert_problem(answer, status)
            assert wire.is_closed(), "where the next request begins is not known"
        elif status < 300 and answer.headers.get("connection") != "close":
            assert wire.answer().text == '{"status": "ok"}'


@pytest.mark.sqlite("it is about HTTP")
def test_requests_that_come_in_pieces_of_any_size_are_the_same(shared: Process) -> None:
    requests = [
        put_chunks(b"2 ; a=b\r\n{}\r\n0\r\nX: y\r\n\r\n"),
        written("PUT", f"{TASKS}/1", {"title": "Stay"}, user="alice"),
        written("M-SEARCH", f"{TASKS}/1", None, "Content-Length: 4", user="alice") + b"\r\n\r\n",
        written("GET", f"{TASKS}/1", None, "Upgrade: x", "Connection: Upgrade", user="alice"),
        b"\r\n" + GOOD,
    ]
    sent = b"".join(requests) * 3
    for size in (1, 2, 3, 5, 7, 64, 100, 1000):
        with Wire(shared) as wire:
            wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for at in range(0, len(sent), size):
                wire.send(sent[at : at + size])
            assert [wire.answer().status_code for _ in range(15)] == [200, 200, 405, 200, 200] * 3


@pytest.mark.sqlite("it is about HTTP")
@pytest.mark.parametrize("line", ["Content-Length: 21", CHUNKED])
def test_an_upgrade_is_ignored_and_its_body_read(shared: Process, line: str) -> None:
    body = MILK if "Length" in line else b"15\r\n" + MILK + b"\r\n0\r\n\r\n"
    upgrade = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMA")
    with Wire(shared) as wire:
        created = wire.send(post(body, line, *upgrade) + GOOD).answer()
        assert created.status_code == 201
        assert wire.answer().status_code == 200


@pytest.mark.sqlite("it is about HTTP")
@pytest.mark.parametrize("options", ["close", "TE, close", "Close", "keep-alive, close"])
def test_a_connection_is_closed_when_close_is_among_the_options(
    shared: Process, options: str
) -> None:
    with Wire(shared) as wire:
        answer = wire.send(get(HOST, f"Connection: {options}") + GOOD).answer()
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert wire.is_closed()


@pytest.mark.sqlite("it is about HTTP")
def test_a_user_id_with_an_encoded_slash_is_found_by_a_url_too(shared: Process) -> None:
    target = "http://x/api/a%2Fb/tasks?limit=1"
    request = f"GET {target} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token('a/b')}\r\n\r\n"
    with Wire(shared) as wire:
        assert wire.send(request.encode()).answer().json == []


REFUSED = {
    "400": b"POST /api/alice/tasks HTTP/1.1\r\n",
    "413": b"POST /api/alice/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 70000\r\n",
    "431": b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 4100,
    "400-in-a-body": f"POST {TASKS} HTTP/1.1\r\nHost: x\r\n{CHUNKED}\r\n\r\nx".encode(),
    "413-in-a-body": f"POST {TASKS} HTTP/1.1\r\nHost: x\r\n{CHUNKED}\r\n\r\n10001".encode(),
}


@pytest.mark.sqlite("it is about HTTP")
@pytest.mark.parametrize(("kind", "sent"), REFUSED.items(), ids=REFUSED)
def test_a_refusal_has_the_headers_of_every_answer(shared: Process, kind: str, sent: bytes) -> None:
    line, _, rest = sent.partition(b"\r\n")
    status, request_id = int(kind[:3]), f"refused-{kind}"
    own = f"\r\nX-Request-ID: {request_id}\r\nOrigin: https://a.example\r\n".encode()
    with Wire(shared) as wire:
        sent_in_vain(wire, line + own + rest + b"\r\n")
        answer = wire.answer()
    assert_problem(answer, status)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-request-id"] == request_id
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
    method = line.decode().partition(" ")[0]
    assert f"INFO {method} - {status} " in shared.log
    assert f" id={request_id} user=-" in shared.log


@pytest.mark.sqlite("it is about HTTP")
@pytest.mark.parametrize(
    ("status", "before", "after"),
    [
        (400, REFUSED["400"], b""),
        (413, REFUSED["413"], b""),
        (400, b"GET /healthz\r\n", b""),
        (400, b"GET /healthz HTTP/1.1\r\nHost: x\r\n", b"X : y\r\n"),
        (431, b"GET /healthz HTTP/1.1\r\nHost: x\r\n", b"X: y\r\n" * 256),
    ],
    ids=["no host", "a body too large", "a malformed line", "a malformed header", "many headers"],
)
def test_a_refusal_has_nothing_of_what_follows_its_head(
    shared: Process, status: int, before: bytes, after: bytes
) -> None:
    own = b"X-Request-ID: own\r\nOrigin: https://a.example\r\n"
    following = own.replace(b"own", b"next").replace(b"a.example", b"b.example")
    with Wire(shared) as wire:
        sent_in_vain(wire, before + own + after + b"\r\n" + following + b"\r\n")
        answer = wire.answer()
    assert_problem(answer, status)
    assert answer.headers["x-request-id"] == "own"
    assert answer.headers["access-control-allow-origin"] == "https://a.example"


@pytest.mark.sqlite("it is about HTTP")
def test_a_head_a_little_too_long_has_the_headers_of_what_comes_last_too(shared: Process) -> None:
    last = ["X-Two: " + "x" * 200, "X-Request-ID: last", "Origin: https://a.example"]
    with Wire(shared) as wire:
        sent_in_vain(wire, get(HOST, "X-Long: " + "x" * 65_300, *last))
        answer = wire.answer()
    assert_problem(answer, 431)
    assert answer.headers["x-request-id"] == "last"
    assert answer.headers["access-control-allow-origin"] == "https://a.example"


@pytest.mark.sqlite("it is about HTTP")
@pytest.mark.parametrize(
    "line",
    [b"GET /a b HTTP/1.1", b"GET /\x01 HTTP/1.1", b"GET ftp://x/ HTTP/1.1", b"GET / HTTP/2.0"],
)
def test_a_refusal_of_the_first_line_has_the_headers_too(shared: Process, line: bytes) -> None:
    own = b"\r\nHost: x\r\nx-request-id: first-line\r\nOrigin: https://a.example\r\n\r\n"
    with Wire(shared) as wire:
        answer = wire.send(line + own).answer()
    assert_problem(answer, 400)
    assert answer.headers["x-request-id"] == "first-line"
    assert answer.headers["access-control-allow-origin"] == "https://a.example"


@pytest.mark.sqlite("it is about HTTP")
@pytest.mark.parametrize("method", ["patch", "Get", "head"])
def test_a_method_of_small_letters_is_another_method(shared: Process, method: str) -> None:
    path = "/api/alice/tasks/1"
    assert_problem(shared.request(method, path), 401)
    answer = shared.request(method, path, None, bearer())
    assert_problem(answer, 405)
    assert "PATCH" in answer.headers["allow"]


@pytest.mark.sqlite("it is about HTTP")
@pytest.mark.parametrize("at_once", [True, False], ids=["whole", "a byte at a time"])
@pytest.mark.parametrize("bad", ["Bad Header: y", "X: \x01", "no colon", "Content-Length: x"])
def test_a_refusal_of_a_header_has_the_cors_headers_of_the_origin_before_it(
    shared: Process, bad: str, at_once: bool
) -> None:
    head = get(HOST, "origin: https://a.example", bad)
    with Wire(shared) as wire:
        for piece in [head] if at_once else (head[at : at + 1] for at in range(len(head))):
            sent_in_vain(wire, piece)
        answer = wire.answer()
    assert_problem(answer, 400)
    assert answer.headers["access-control-allow-origin"] == "https://a.example"


@pytest.mark.sqlite("it is about HTTP")
def test_a_refusal_of_another_version_is_an_http_1_1_answer(shared: Process) -> None:
    with Wire(shared) as wire:
        answer = wire.send(get(HOST, version="HTTP/2.0")).answer()
    assert answer.line == "HTTP/1.1 400 Bad Request"
    assert "no other major version" in assert_problem(answer, 400)["detail"]


@pytest.mark.sqlite("it is about HTTP")
def test_a_refusal_is_logged_with_the_clients_address_and_not_counted(start: Start) -> None:
    server = start(TASKD_TRUSTED_PROXY="127.0.0.1", TASKD_METRICS="1")
    with Wire(server) as wire:
        wire.send(b"GET /healthz HTTP/1.1\r\nX-Forwarded-For: 192.0.2.7\r\n\r\n")
        assert_problem(wire.answer(), 400)
    assert " client=192.0.2.7" in server.log.splitlines()[-1]
    metrics = server.request("GET", "/metrics").text
    assert not [line for line in metrics.splitlines() if line.startswith("taskd_requests_total{")]


# --- Processor time -------------------------------------------------------------------------------


DEAR: dict[str, tuple[bytes, float]] = {
    "white space and a control character": (get(HOST, f"X:{' ' * 65_000}\x01"), 0.02),
    "white space": (get(HOST, f"X:{' ' * 65_000}y"), 0.02),
    "tabs and DEL": (get(HOST, "X:" + "\t" * 30_000 + "\x7f"), 0.02),
    "a URL of digits": (b"GET a://" + b"4" * 65_000 + b" x\r\n\r\n", 0.02),
    "a port of digits": (get(HOST, target=f"http://x:{'4' * 16_000}"), 0.02),
    "headers of one letter": (get(HOST, *["a:"] * 16_000), 0.02),
    "one header many times": (get(HOST, *["Accept: a"] * 250), 0.02),
    "a length of zeros": (get(HOST, f"Content-Length: {'0' * 65_000}x"), 0.01),
    "many options": (get(HOST, "Connection: " + "," * 64_000), 0.02),
    "many slashes": (get(HOST, target="/" * 16_000), 0.02),
    "a quoted Content-Type": (
        written(
            "POST",
            TASKS,
            MILK,
            f'Content-Type: application/json;a="{";" * 60_000}',
            f"Content-Length: {len(MILK)}",
            user="alice",
        ),
        0.02,
    ),
    "bytes beyond ASCII": (get(HOST, target="/" + "\x80" * 16_000), 0.005),
    "many lines": (get(HOST, *(f"{number:x}:" for number in range(250))), 0.005),
    "an encoded path": (get(HOST, target="/" + "%41" * 5_400), 0.02),
    "a query of parameters": (get(HOST, target="/healthz?" + "a=1&" * 4_000), 0.02),
    "170,000 chunks of a byte": (post(b"1\r\nx\r\n" * 170_000, CHUNKED), 0.05),
    "60,000 chunks of a byte": (post(b"1\r\n \r\n" * 60_000 + b"0\r\n\r\n", CHUNKED), 0.05),
    "30,000 chunks of two bytes": (post(b"2\r\n  \r\n" * 30_000 + b"0\r\n\r\n", CHUNKED), 0.05),
    "an endless chunk size": (post(b"0" * 600_000, CHUNKED), 0.05),
    "an endless extension": (post(b"1;" + b"a" * 600_000, CHUNKED), 0.05),
    "an endless trailer": (post(b"0\r\n" + b"a:\r\n" * 100_000, CHUNKED), 0.05),
    "blank lines": (b"\r\n" * 500_000, 0.05),
    "1 MB of body": (post(b"x" * 1_000_000, "Content-Length: 1000000"), 0.05),
}


@pytest.mark.sqlite("it is about HTTP")
@pytest.mark.parametrize(("sent", "bound"), DEAR.values(), ids=DEAR)
def test_no_request_costs_more_than_its_bound(shared: Process, sent: bytes, bound: float) -> None:
    rounds = 100 if bound < 0.01 else 10  # the kernel counts in steps of 10 ms
    before = shared.processor_time()
    for _ in range(rounds):
        with Wire(shared) as wire:
            sent_in_vain(wire, sent)
            wire.answer()
    used = shared.processor_time() - before
    assert round(100 * used) <= round(100 * rounds * bound) + 1


@pytest.mark.slow
@pytest.mark.sqlite("it is about HTTP")
@pytest.mark.parametrize("part", ["head", "body"])
def test_a_request_that_comes_byte_by_byte_costs_little(shared: Process, part: str) -> None:
    sent = post(b" " * 10_000, "Content-Length: 10000")
    if part == "head":
        sent = get(HOST, "X: " + "y" * 10_000)
    before = shared.processor_time()
    with Wire(shared) as wire:
        wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in sent:
            wire.send(bytes([byte]))
            time.sleep(0.0001)
        assert wire.answer().status_code == (200 if part == "head" else 400)
    assert shared.processor_time() - before < 0.1


@pytest.mark.sqlite("it is about HTTP")
def test_many_requests_in_few_pieces_on_a_connection_are_not_paused(shared: Process) -> None:
    started = time.monotonic()
    with Wire(shared) as wire:
        wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(200):
            wire.send(GOOD[:10])
            time.sleep(0.001)
            assert wire.send(GOOD[10:]).answer().status_code == 200
    assert time.monotonic() - started < 200 * taskd.PAUSE / 2


@pytest.mark.sqlite("it is about HTTP")
def test_a_client_that_sends_on_after_a_refusal_is_cut_off(shared: Process) -> None:
    with Wire(shared) as wire:
        assert wire.send(b"x\r\n").answer().status_code == 400
        with pytest.raises(ConnectionError):  # the systems of both sides buffer some of it
            wire.send(bytes(64 * taskd.MAX_DISCARDED))


@pytest.mark.sqlite("it is about HTTP")
def test_a_client_may_send_a_mebibyte_more_before_it_reads_the_refusal(shared: Process) -> None:
    with Wire(shared) as wire:
        wire.send(post(b"", f"Content-Length: {2**30}"))
        for _ in range(16):
            wire.send(bytes(2**16))
            time.sleep(0.01)  # the connection would be reset, and the answer lost
        assert_problem(wire.answer(), 413)


@pytest.mark.sqlite("it is about HTTP")
def test_bytes_that_are_not_http_are_one_line_in_the_log(shared: Process) -> None:
    for sent in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"\0" * 70_000, b"SSH-2.0-x\r\n"):
        lines = len(shared.log.splitlines())
        with Wire(shared) as wire:
            assert wire.send(sent).answer().status_code == 400
        assert len(shared.log.splitlines()) == lines + 1
    with Wire(shared):
        pass  # nothing at all
    assert shared.request("GET", "/healthz").status_code == 200
    assert len(shared.log.splitlines()) == lines + 2


@pytest.mark.sqlite("it is about HTTP")
def test_a_body_is_in_no_file(shared: Process) -> None:
    descriptors = Path(f"/proc/{shared.popen.pid}/fd")

    def files() -> set[Path]:
        found = set()
        for descriptor in descriptors.iterdir():
            with contextlib.suppress(FileNotFoundError):  # a connection that is closed meanwhile
                found.add(descriptor.readlink())
        return {file for file in found if file.is_absolute()}

    before = files()
    with Wire(shared) as wire:
        wire.send(post(bytes(2**16 - 1), f"Content-Length: {2**16}"))
        for _ in range(20):  # between them taskd reads the body
            assert shared.request("GET", "/healthz").status_code == 200
            assert files() == before
        assert wire.send(b"\0").answer().status_code == 400


@pytest.mark.sqlite("it is about HTTP")
def test_urgent_data_closes_the_connection_with_one_line_in_the_log(shared: Process) -> None:
    lines, before = len(shared.log.splitlines()), shared.processor_time()
    with Wire(shared) as wire:
        wire.socket.send(b"!", socket.MSG_OOB)
        assert wire.is_closed()
    assert shared.log.splitlines()[lines:][0].endswith("urgent data came client=127.0.0.1")
    assert len(shared.log.splitlines()) == lines + 1
    assert shared.processor_time() - before < 0.1


# --- Time -----------------------------------------------------------------------------------------


SHORT = "taskd.DEADLINES.update(request=0.9, head=0.3, body=0.6, delivery=0.8, close=0.3)"


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Give a server whose deadlines are short."""
    process = Process(tmp_path_factory.mktemp("hasty"), before=SHORT)
    yield process
    assert process.terminate() == 0


WAITING = {
    "nothing at all": (b"", 0.9, "request"),
    "half a head": (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: ", 0.3, "head"),
    "half a body": (post(b"x", "Content-Length: 21"), 0.6, "body"),
    "half a chunk": (post(b"15\r\nx", CHUNKED), 0.6, "body"),
}


@pytest.mark.sqlite("it is about HTTP")
@pytest.mark.parametrize("trickles", [False, True], ids=["silent", "trickling"])
@pytest.mark.parametrize(("sent", "seconds", "waits"), WAITING.values(), ids=WAITING)
def test_a_client_that_keeps_taskd_waiting_is_closed(
    hasty: Process, sent: bytes, seconds: float, waits: str, trickles: bool
) -> None:
    if trickles and waits == "request":
        pytest.skip("what trickles is a request")
    logged = len(hasty.log)
    with Wire(hasty) as wire:
        started = time.monotonic()
        wire.send(sent)
        while trickles and time.monotonic() < started + seconds - 0.05:
            wire.send(b"x" if waits == "head" else b"")
            time.sleep(0.02)
        assert wire.is_closed()
        assert time.monotonic() - started > seconds - 0.1
    assert hasty.log[logged:].count(f"it waited too long for the {waits}") == 1
    assert len(hasty.log[logged:].splitlines()) == 1


@pytest.mark.sqlite("on PostgreSQL no write runs in the event loop")
def test_a_client_that_resets_a_write_while_the_disk_is_slow_stops_nobody(tmp_path: Path) -> None:
    process = Process(tmp_path, before="taskd.SLOW_COMMIT = -1")
    another_is_served(process)  # and taskd has measured that the disk is slow
    with Wire(process) as wire:
        assert wire.send(GOOD).answer().status_code == 200
        process.popen.send_signal(signal.SIGSTOP)  # so that the request and the reset come together
        wire.send(post(MILK, JSON, f"Content-Length: {len(MILK)}"))
        wire.reset()
    process.popen.send_signal(signal.SIGCONT)
    another_is_served(process)
    assert "Traceback" not in process.log
    assert process.terminate() == 0


@pytest.mark.slow
@pytest.mark.sqlite("it is about HTTP")
def test_a_connection_that_was_used_is_closed_when_it_is_idle(hasty: Process) -> None:
    with Wire(hasty) as wire:
        for _ in range(5):  # for longer than it may be idle
            assert wire.send(GOOD).answer().status_code == 200
            time.sleep(0.3)
            assert hasty.request("GET", "/healthz").status_code == 200  # deadlines are looked at
        lines = len(hasty.log.splitlines())
        assert wire.is_closed()
    assert len(hasty.log.splitlines()) == lines


@pytest.mark.sqlite("it is about HTTP")
@pytest.mark.slow
def test_an_answer_of_which_nothing_is_taken_closes_the_connection(hasty: Process) -> None:
    add_long_tasks(hasty, 100)
    request = written("GET", TASKS, user="alice")
    with Wire(hasty, receive_buffer=4096) as idle, Wire(hasty, receive_buffer=4096) as slow:
        for wire in (idle, slow):
            wire.send(request * 20)
        taken = 0
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            taken += len(slow.socket.recv(4096))
            time.sleep(0.01)
        until(lambda: "too long for the delivery" in hasty.log, "the idle one is closed")
        assert hasty.log.count("too long for the delivery") == 1
        assert len(slow.socket.recv(100)) > 0


@pytest.mark.sqlite("it is about HTTP")
@pytest.mark.slow
def test_what_the_clients_system_takes_at_once_does_not_count_as_read_at_the_deadline(
    start: Start,
) -> None:
    server = start(before="taskd.DEADLINES.update(delivery=3)")
    add_long_tasks(server, 300)
    with Wire(server) as wire:
        wire.send(written("GET", TASKS, user="alice") * 10)
        started = time.monotonic()
        until(lambda: "too long for the delivery" in server.log, "it is closed")
        assert 2.5 < time.monotonic() - started < 5.5


@pytest.mark.sqlite("it is about HTTP")
@pytest.mark.slow
def test_a_head_that_is_not_whole_is_closed_after_10_seconds(shared: Process) -> None:
    with Wire(shared) as wire:
        started = time.monotonic()
        assert wire.send(b"GET ").is_closed()
        assert 9.5 < time.monotonic() - started < 15


@dataclasses.dataclass
class Queued:
    """What a queue knows of a connection, and of its request."""

    sender: str
    name: str
    command: str = "GET"

    @property
    def reader(self) -> Any:
        return SimpleNamespace(request=self)


# --- Numbers --------------------------------------------------------------------------------------

PARTS = {
    "nothing": b"",
    "half a head": b"GET /healthz HTTP/1.1\r\nX: ",
    "half a body": post(b"x" * 40_000, "Content-Length: 60000"),
    "requests, without reading": GOOD * 20,
    "as many requests as fit, without reading": GOOD * (60_000 // len(GOOD)),
}


@pytest.mark.parametrize("sent", PARTS.values(), ids=PARTS)
def test_more_connections_than_descriptors_lock_no_client_out(start: Start, sent: bytes) -> None:
    server = start(before=limited(256), TASKD_THREADS="4")
    another_is_served(server)
    before = memory(server)
    with connected(server, 300) as wires:
        for wire in wires:
            sent_in_vain(wire, sent)
        another_is_served(server)
        assert len([*Path(f"/proc/{server.popen.pid}/fd").iterdir()]) < 256 - 10
        assert memory(server) - before < 300 * 100_000
        assert wires[0].is_closed() or sent.startswith(GOOD)
        another_is_served(server)
        started = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - started < 10
        assert "Traceback" not in server.log
        assert "uncaptured" not in server.log


@pytest.mark.sqlite("it is about HTTP")
def test_more_connections_than_allowed_close_the_oldest_whatever_descriptors_are_free(
    start: Start,
) -> None:
    server = start(before="taskd.MAX_CONNECTIONS = 30")
    with connected(server, 40) as wires:
        another_is_served(server)
        assert [wire.is_closed() for wire in wires[:10]] == [True] * 10
        assert wires[-1].send(GOOD).answer().status_code == 200


@pytest.mark.sqlite("PostgreSQL's client needs more descriptors")
def test_where_no_descriptor_is_free_a_new_connection_closes_the_oldest(start: Start) -> None:
    server = start(before=limited(24), TASKD_THREADS="2")
    with connected(server, 20):
        assert server.request("GET", "/healthz").status_code == 200


FEW_EVENTS = """
class FewEvents:
    def __init__(self, epoll=select.epoll):
        self._epoll = epoll()

    def __getattr__(self, name):
        return getattr(self._epoll, name)

    def poll(self, timeout):
        return self._epoll.poll(timeout, 10)

select.epoll = FewEvents
"""


@pytest.mark.sqlite("it is about HTTP")
def test_a_request_that_came_makes_no_room_for_another_connection(start: Start) -> None:
    server = start(before=f"taskd.MAX_CONNECTIONS = 60\n{FEW_EVENTS}")
    with connected(server, 60) as wires, contextlib.ExitStack() as later:
        for wire in wires:
            assert wire.send(GOOD).answer().status_code == 200
        server.popen.send_signal(signal.SIGSTOP)  # so that all of it comes at once
        for _ in range(20):
            later.enter_context(Wire(server))
        for wire in wires:
            wire.send(GOOD)
        server.popen.send_signal(signal.SIGCONT)
        assert [wire.answer().status_code for wire in wires] == [200] * 60
        another_is_served(server)


@pytest.mark.sqlite("it is about HTTP")
def test_names_of_headers_are_not_kept(shared: Process) -> None:
    before = memory(shared)
    for number in range(300):
        with Wire(shared) as wire:
            wire.send(get(HOST, f"{'x' * 60_000}{number}: 1"))
            assert wire.answer().status_code == 200
    assert memory(shared) - before < 300 * 60_000 / 2


@pytest.mark.sqlite("another process can hold the one lock of writes")
def test_pipelined_requests_are_answered_at_the_end_also_at_the_limit_of_connections(
    start: Start, tmp_path: Path
) -> None:
    server = start(before=limited(256), TASKD_THREADS="4")
    # They connect first: a write waits 4 seconds for the lock, which may be too short for it.
    with connected(server, 300), Wire(server) as wire, contextlib.ExitStack() as tried:
        with locked(tmp_path / "taskd.db"):
            wire.send(written("POST", TASKS, {"title": "Buy milk"}, user="alice") * 3)
            server.popen.send_signal(signal.SIGTERM)
            until(lambda: refuses_connections(server, tried), "it stops")
        assert [wire.answer().status_code for _ in range(3)] == [201] * 3


@pytest.mark.sqlite("on PostgreSQL the worker threads read the lists")
def test_more_long_lists_that_nobody_reads_than_descriptors_lock_no_client_out(
    start: Start,
) -> None:
    server = start(before=limited(256))
    add_long_tasks(server, 150)
    with connected(server, 400) as wires:
        for wire in wires:
            sent_in_vain(wire, written("GET", TASKS, user="alice") * 3)
        another_is_served(server, soon=6.0)  # some 50 lists of 1.5 MB may be read before
        assert memory(server) < 200_000_000


@pytest.mark.slow
@pytest.mark.sqlite("it is about HTTP")
@pytest.mark.parametrize("kind", ["heads", "bodies"])
def test_what_closed_connections_had_sent_leaves_the_memory(start: Start, kind: str) -> None:
    server = start()
    most = [f"X-{number}: {'y' * 240}" for number in range(240)]
    lines, body = (most, b"") if kind == "heads" else ([], b"x" * 60_000)
    sent = post(body, "Content-Length: 65536", *lines)
    for _ in range(5):
        with connected(server, 400) as wires:
            for wire in wires:
                wire.send(sent)
            another_is_served(server)
    assert memory(server) < 140_000_000


@pytest.mark.sqlite("it is about HTTP")
def test_thousands_of_idle_connections_do_not_slow_requests(start: Start) -> None:
    server = start()

    def cost() -> float:
        before = server.processor_time()
        with Wire(server) as wire:
            for _ in range(600):
                assert wire.send(GOOD).answer().status_code == 200
        return server.processor_time() - before

    alone = cost()
    with connected(server, 700):
        assert cost() < 2 * alone + 0.1


@pytest.mark.parametrize("threads", ["2"])
def test_readers_that_read_nothing_hold_no_worker(start: Start, threads: str) -> None:
    server = start(TASKD_THREADS=threads)
    add_long_tasks(server, 150)
    request = written("GET", TASKS, user="alice")  # over 100 tasks: a worker makes it
    wires = [Wire(server, receive_buffer=4096).send(request * 2) for _ in range(4)]
    for _ in range(3):
        another_is_served(server)
    for wire in wires:
        wire.reset()
    until(lambda: len(server.request("GET", TASKS, headers=bearer()).json) == 150, "it is served")


@pytest.mark.sqlite("on PostgreSQL the worker threads read the pages, each into memory of its own")
@pytest.mark.parametrize(("clients", "megabytes"), [(1, 3), (60, 45)])
def test_pages_that_nobody_reads_keep_one_page_of_each_connection_in_memory(
    start: Start, clients: int, megabytes: int
) -> None:
    server = start()
    add_long_tasks(server, 110)
    page = f"{TASKS}?limit=1000"  # 1 MiB
    for _ in range(3):
        assert server.request("GET", page, headers=bearer()).status_code == 200
    before = memory(server)
    with connected(server, clients) as wires:
        for wire in wires:
            wire.send(written("GET", page, user="alice") * 20)
        for _ in range(3):
            another_is_served(server)
        assert memory(server) - before < megabytes * 1024 * 1024


@pytest.mark.sqlite("on PostgreSQL the worker threads read the pages, each into memory of its own")
def test_of_clients_that_do_not_read_those_that_hold_most_memory_are_closed(start: Start) -> None:
    server = start(before="taskd.MAX_HELD = 2 * 1024 * 1024")
    add_long_tasks(server, 110)
    with Wire(server, receive_buffer=4096) as slow, connected(server, 60) as wires:
        slow.send(written("GET", TASKS, user="alice"))  # its answer is in a file
        until(lambda: " 200 " in server.log.rpartition(" GET ")[2], "it is answered")
        for wire in wires:
            wire.send(written("GET", f"{TASKS}?limit=1000", user="alice") * 20)
        until(lambda: "others need the memory" in server.log, "some are closed")
        another_is_served(server)
        closed = server.log.count("others need the memory")
        assert 0 < closed < len(wires) - 2
        assert server.request("GET", f"{TASKS}?limit=1000", headers=bearer()).status_code == 200
        assert len(slow.answer().json) == 110
        assert "Traceback" not in server.log


@pytest.mark.sqlite("it is not about the database")
def test_requests_that_are_sent_in_part_take_bounded_memory(start: Start) -> None:
    server = start()
    assert server.request("GET", "/healthz").status_code == 200
    lines = [f"X-{number}: {'x' * 230}" for number in range(240)]
    head = post(b"x" * 64_000, "Content-Length: 65000", *lines)
    before = memory(server)
    with connected(server, 700) as wires:
        for wire in wires:
            with contextlib.suppress(OSError):  # it is closed
                wire.send(head)
        until(lambda: "others need the memory" in server.log, "some are closed")
        another_is_served(server)
        assert memory(server) - before < 120 * 1024 * 1024
        assert server.request("POST", TASKS, {"title": "Buy milk"}, bearer()).status_code == 201
    assert "Traceback" not in server.log


@pytest.mark.parametrize("part", ["half of a head", "a head, and no body"])
@pytest.mark.sqlite("it is not about the database")
def test_short_headers_count_with_the_memory_that_they_take(start: Start, part: str) -> None:
    server = start(before="taskd.MAX_HELD = 2 * 1024 * 1024")
    head = post(b"", "Content-Length: 1", *(f"a{number}:" for number in range(240)))
    with connected(server, 100) as wires:  # 2 kB each, and 25 times as much in Python
        for wire in wires:
            with contextlib.suppress(OSError):  # it is closed
                wire.send(head[:-3] if part == "half of a head" else head)
        until(lambda: "others need the memory" in server.log, "some are closed")
        another_is_served(server)


@pytest.mark.sqlite("it is not about the database")
def test_a_user_who_sends_a_task_is_not_closed_for_another_who_holds_more(start: Start) -> None:
    server = start(before="taskd.MAX_HELD = 1024 * 1024")
    body = json.dumps({"title": "Buy milk", "description": "x" * 9_000}).encode().ljust(40_000)
    size = f"Content-Length: {len(body)}"
    sent = written("POST", "/api/bob/tasks", body, JSON, size, user="bob")
    for user in ("alice", "bob"):
        assert server.request("GET", f"/api/{user}/tasks", None, bearer(user)).status_code == 200
    with Wire(server) as bob, connected(server, 350) as wires:
        bob.send(sent[:-10])
        for wire in wires:
            with contextlib.suppress(OSError):  # it is closed
                wire.send(post(b"x" * 4_000, "Content-Length: 5000"))
        until(lambda: "others need the memory" in server.log, "some are closed")
        assert bob.send(sent[-10:]).answer().status_code == 201


@pytest.mark.sqlite("another process can hold the one lock of writes")
def test_requests_that_are_being_answered_count_with_their_memory_and_are_not_closed(
    start: Start, tmp_path: Path
) -> None:
    server = start(before="taskd.MAX_HELD = 1024 * 1024")
    with connected(server, 25) as wires, Wire(server) as half:
        with locked(tmp_path / "taskd.db"):
            for wire in wires:
                wire.send(post(MILK.ljust(39_500), "Content-Length: 39500"))
            half.send(post(b"x" * 60_000, "Content-Length: 65000"))
            until(lambda: "others need the memory" in server.log, "the other one is closed")
        assert [wire.answer().status_code for wire in wires] == [201] * 25


@pytest.mark.sqlite("it is not about the database")
def test_a_connection_that_only_waits_for_its_end_keeps_no_request(start: Start) -> None:
    server = start()
    assert server.request("GET", "/healthz").status_code == 200
    before = memory(server)
    with connected(server, 700) as wires:
        for wire in wires:  # the byte more keeps the connection open until its client ends it
            size = "Content-Length: 65000"
            wire.send(post(b"x" * 65_000, size, "Connection: close") + b"x")
            assert wire.answer().status_code == 400
        assert memory(server) - before < 20 * 1024 * 1024
        assert "others need the memory" not in server.log


SLOW_LISTS = """
def sleep_first(*given, page=TaskStore.page):
    if thread_state.in_event_loop:
        raise WouldBlock
    time.sleep(0.01)
    return page(*given)

TaskStore.page = sleep_first
"""


@pytest.mark.slow
@pytest.mark.sqlite("on PostgreSQL the worker threads read the lists")
def test_worker_threads_take_a_request_of_each_user_in_turn(start: Start, tmp_path: Path) -> None:
    server = start(before=SLOW_LISTS, TASKD_THREADS="2")
    another_is_served(server)
    for user in ("alice", "bob"):
        fill(tmp_path / "taskd.db", user, 101, "x")
    finished = "GET /api/{user_id}/tasks 200"
    before = server.log.count(finished)
    with connected(server, 100) as wires, Wire(server) as other:
        for wire in wires:
            wire.send(written("GET", TASKS, user="alice"))
        until(lambda: server.log.count(finished) > before, "the first is answered")
        other.send(written("GET", "/api/bob/tasks", None, "X-Request-ID: bob", user="bob"))
        assert len(other.answer().json) > 100
        until(lambda: server.log.count(finished) > before + 100, "all are answered")
    lists = [line for line in server.log.splitlines() if finished in line][before:]
    assert next(number for number, line in enumerate(lists) if "id=bob" in line) < 50


@pytest.mark.sqlite("another process can hold the one lock of writes")
def test_connections_over_the_limit_wait_while_all_others_are_being_answered(
    start: Start, tmp_path: Path
) -> None:
    limit = 256 - 2 * 4 - 80
    server = start(before=limited(256), TASKD_THREADS="4")
    write = written("POST", TASKS, {"title": "Buy milk"}, user="alice")
    with connected(server, limit) as wires, contextlib.ExitStack() as later:
        with locked(tmp_path / "taskd.db"):
            for wire in wires:
                wire.send(write)
            time.sleep(0.5)  # until all of them are read: others make room
            wires += [later.enter_context(Wire(server)).send(write) for _ in range(40)]
            time.sleep(1)
            descriptors = Path(f"/proc/{server.popen.pid}/fd").iterdir()
            sockets = [one for one in descriptors if str(one.readlink()).startswith("socket:")]
            # One of them listens.
            assert len(sockets) == limit + taskd.CONNECTIONS_OVER_LIMIT + 1
        assert {wire.answer().status_code for wire in wires} == {201}


@pytest.mark.slow
@pytest.mark.sqlite("PostgreSQL does much of the work")
def test_a_burst_of_one_user_on_many_connections_delays_nobody_else(start: Start) -> None:
    server = start()
    add_long_tasks(server, 110)
    page = written("GET", f"{TASKS}?limit=1000", user="alice")  # 1 MiB
    with connected(server, 300) as wires, Wire(server) as other:
        assert other.send(GOOD).answer().status_code == 200
        server.popen.send_signal(signal.SIGSTOP)  # so that all of it comes at once
        for wire in wires:
            wire.send(page)
        other.send(written("GET", "/api/bob/tasks", user="bob"))
        before = server.processor_time()
        server.popen.send_signal(signal.SIGCONT)
        assert other.answer().text == "[]"
        assert server.processor_time() - before < 0.25
    assert server.terminate() == 0


@pytest.mark.parametrize("user", ["bob", "user-{}"])
@pytest.mark.sqlite("it is not about the database")
def test_a_burst_of_strangers_delays_no_user_whatever_paths_they_ask_for(
    start: Start, user: str
) -> None:
    server = start()
    query = "a%FF&" * 700  # in one read, so that all are queued before the first is answered
    with connected(server, 900) as wires, Wire(server) as other, Wire(server) as probe:
        for wire in (other, probe):
            assert wire.send(GOOD).answer().status_code == 200
        server.popen.send_signal(signal.SIGSTOP)  # so that all of it comes at once
        for number, wire in enumerate(wires):
            wire.send(get("Host: x", target=f"/api/{user.format(number)}/tasks?{query}"))
        other.send(written("GET", "/api/bob/tasks", user="bob"))
        probe.send(get("Host: x", target="/readyz"))
        before = server.processor_time()
        server.popen.send_signal(signal.SIGCONT)
        assert other.answer().text == "[]"
        assert probe.answer().status_code == 200
        assert server.processor_time() - before < 0.25
    assert server.terminate() == 0


def test_only_so_many_threads_read_for_one_user_at_the_same_time() -> None:
    queue: Any = taskd.FairQueue(places=2)
    for name in ("a1", "a2", "a3", "b1", "a4"):
        queue.append(Queued(name[0], name))

    def take() -> str:
        return queue.popleft().name if queue else ""

    with contextlib.ExitStack() as stack:
        threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(6)]
        taken = [thread.submit(take).result() for thread in threads]
        assert taken == ["a1", "b1", "a2", "", "", ""], "two threads read for a"
        assert threads[1].submit(take).result() == "", "b's has ended"
        assert threads[0].submit(take).result() == "a3", "a's first has ended"
        for number in range(3):
            queue.append(Queued("a", f"write {number}", "PATCH"))
        taken = [thread.submit(take).result() for thread in threads[3:]]
        assert taken == ["write 0", "write 1", "write 2"], "as many as there are threads"
    queue.places = math.inf
    assert [take(), take()] == ["a4", ""]


@pytest.mark.postgresql("on SQLite the event loop reads pages")
def test_pages_of_one_user_leave_threads_to_others_and_to_the_writes_of_that_user(
    start: Start,
) -> None:
    server = start(before=SLOW_LISTS.replace("0.01", "60"), TASKD_THREADS="6")
    with connected(server, 20) as wires, Wire(server) as writer:
        for wire in wires:
            wire.send(written("GET", TASKS, user="alice"))
        create = written("POST", TASKS, {"title": "Buy milk"}, user="alice")
        assert writer.send(create).answer().status_code == 201
        answer = server.request("POST", "/api/bob/tasks", {"title": "Buy milk"}, bearer("bob"))
        one = f"/api/bob/tasks/{answer.json['id']}"
        assert server.request("GET", one, headers=bearer("bob")).status_code == 200
        server.kill()


@pytest.mark.sqlite("it is about threads")
def test_requests_of_one_user_that_wait_for_a_place_at_sigterm_are_all_answered(
    start: Start,
) -> None:
    slow = SLOW_LISTS.replace("0.01", "0.5")
    server = start(before=f"taskd.REJECT_BLOCKED_AFTER = 0.0\n{slow}", TASKD_THREADS="3")
    with connected(server, 20) as wires:
        for wire in wires:
            wire.send(written("GET", TASKS, user="alice"))
        until(lambda: " 200 " in server.log, "the first is answered")
        server.popen.terminate()
        answers = [wire.answer() for wire in wires]
    assert {answer.status_code for answer in answers} == {200, 503}
    assert server.popen.wait(DEADLINE) == 0


def test_a_queue_takes_a_request_of_each_user_in_turn() -> None:
    queue: Any = taskd.FairQueue()
    for name in ("a1", "a2", "a3", "b1", "b2", "c1"):
        queue.append(Queued(name[0], name))
    taken = [queue.popleft().name for _ in range(2)]
    queue.append(Queued("d", "d1"))
    while queue:
        taken.append(queue.popleft().name)
    assert taken == ["a1", "b1", "c1", "a2", "b2", "d1", "a3"]
    assert not queue


def test_all_900_clients_that_sent_a_write_before_sigterm_are_answered(start: Start) -> None:
    server = start()
    with connected(server, 900) as wires:
        for number, wire in enumerate(wires):
            wire.send(written("POST", TASKS, {"title": f"Buy milk {number}"}, user="alice"))
        server.popen.terminate()
        answers: list[Answer] = [wire.answer() for wire in wires]
    counts = Counter(answer.status_code for answer in answers)
    assert counts.keys() <= {201, 503}, counts  # 503 where the disk is slow
    assert counts[201] > 800
    assert server.popen.wait(DEADLINE) == 0

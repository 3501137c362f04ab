"""A login system's bad days: what its key set may do, and what taskd does meanwhile."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from falcon import testing

import taskd
from support import DEADLINE, SECRET, Process, Wire, assert_problem, bearer, until, written
from test_key_set import NEW, PRIVATE, WEAK, AuthServer, auth_server, call, public, signed

__all__ = ["auth_server", "call"]
pytestmark = pytest.mark.sqlite("it is about keys")

Call = Callable[..., testing.Result]
GOOD = signed(PRIVATE["ES256"], "ES256", "ES256", exp=253402300799)


class Clock:
    """The clock of taskd's key set, which a test can advance."""

    ahead = 0.0

    def __call__(self) -> float:
        return real_clock() + self.ahead


real_clock = time.monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(taskd.time, "monotonic", clock)
    return clock


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the log lines about the key set, without those of the rejected requests."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING and record.name == "taskd"
    ]


# --- What answers at the address of the key set ---------------------------------------------------


def test_a_firewall_that_knows_programs_by_their_names_lets_taskd_pass(
    call: Call, auth_server: AuthServer
) -> None:
    auth_server.answer = auth_server.behind_a_firewall
    assert call(GOOD).status_code == 200


@pytest.mark.parametrize("target", ["/", "/api/auth/jwks", "/keys?tenant=a%20b&x=1"])
def test_the_key_set_is_requested_as_its_address_says(auth_server: AuthServer, target: str) -> None:
    asked: list[str] = []

    def answer(request: Any) -> None:
        asked.append(request.path)
        AuthServer.send(request, 200, b"{}")

    auth_server.answer = answer
    origin = auth_server.url.removesuffix("/api/auth/jwks")
    for url in [origin + target, *([origin] if target == "/" else [])]:
        assert taskd.download(url) == b"{}"
    assert set(asked) == {target}


def test_a_fetch_does_not_keep_the_process_from_ending_and_the_first_is_not_logged(
    auth_server: AuthServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "taskd")
    auth_server.answer = auth_server.late
    keys = taskd.KeySet(auth_server.url)
    fetch = keys.fetch()
    assert fetch
    until(lambda: auth_server.asked, "the fetch has begun")
    assert running("(_run)")
    assert running("(_download)")
    others = [one for one in threading.enumerate() if one is not threading.main_thread()]
    assert all(one.daemon for one in others)
    auth_server.free.set()
    fetch.result(DEADLINE)
    assert caplog.messages == []


def test_of_a_huge_answer_little_is_read(call: Call, auth_server: AuthServer) -> None:
    auth_server.answer = auth_server.huge
    assert_problem(call(GOOD), 503)
    until(lambda: auth_server.sent, "the server has sent something")
    assert auth_server.sent < 16 * 2**20  # the kernel's buffers of both sides, and 1 MiB


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nX-Slow:",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffff\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
    ids=["status line", "header", "body", "body of known length", "chunk", "length of a chunk"],
)
def test_a_set_sent_byte_by_byte_times_out_and_leaves_no_thread(
    call: Call,
    auth_server: AuthServer,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    head: bytes,
) -> None:
    monkeypatch.setattr(taskd, "KEYS_WAIT", 0.4)
    auth_server.answer = auth_server.trickling(head)
    started = real_clock()
    assert_problem(call(GOOD), 503)
    assert real_clock() - started < 4
    [said] = warnings_in(caplog)
    assert said.endswith("it cannot be fetched: TimeoutError: no whole answer within 0.4 s")
    auth_server.answer = auth_server.well
    clock.ahead += taskd.KEYS_PAUSE
    assert call(GOOD).status_code == 200, "the next fetch does not wait for the first"
    until(lambda: not running("_download"), "the thread of the first fetch has ended")


def running(name: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if name in thread.name]


def test_a_fetch_is_bounded_and_a_removed_key_ends_within_five_minutes() -> None:
    assert (taskd.KEYS_WAIT, taskd.KEYS_SIZE, taskd.KEYS_END) == (5, 2**20, 3600)
    assert taskd.KEYS_AGE + taskd.KEYS_WAIT + taskd.KEYS_RETRY + taskd.KEYS_WAIT < 300
    assert taskd.KEYS_LIMIT + taskd.KEYS_WAIT < 300
    assert taskd.TOKEN_CACHE_AGE <= 300


RSA, EC = PRIVATE["RS256"], PRIVATE["ES256"]
PRIVATE_RSA = jwt.get_algorithm_by_name("RS256").to_jwk(RSA, as_dict=True)
PRIVATE_EC = jwt.get_algorithm_by_name("ES256").to_jwk(EC, as_dict=True)
P256 = public(ec.generate_private_key(ec.SECP256R1()), "ES256", "odd")
ODD: dict[str, Any] = {
    "a number": 5,
    "null": None,
    "text": "key",
    "a list": [],
    "an empty object": {},
    "oct without k": {"kty": "oct", "kid": "odd", "alg": "HS256"},
    "oct": {"kty": "oct", "kid": "odd", "alg": "HS256", "k": "c2VjcmV0"},
    "alg none": {"kty": "RSA", "kid": "odd", "alg": "none", "n": "AQAB", "e": "AQAB"},
    "alg a list": public(NEW, "EdDSA", "odd", alg=["EdDSA"]),  # type: ignore[arg-type]
    "alg an object": public(NEW, "EdDSA", "odd", alg={}),  # type: ignore[arg-type]
    "alg a number": public(NEW, "EdDSA", "odd", alg=7),  # type: ignore[arg-type]
    "alg unknown": public(NEW, "EdDSA", "odd", alg="RSA-OAEP"),
    "alg of another kty": public(NEW, "EdDSA", "odd", alg="RS256"),
    "alg of another curve": P256 | {"alg": "ES512"},
    "alg that logins do not have": P256 | {"alg": "ES384"},
    "a curve that logins do not have": public(
        ec.generate_private_key(ec.SECP384R1()), "ES384", "odd"
    )
    | {"alg": None},
    "crv unknown": P256 | {"crv": "P-000"},
    "crv a list": P256 | {"crv": ["P-256"]},
    "a point that is not on the curve": P256 | {"x": P256["y"]},
    "a short point": P256 | {"x": "AQAB"},
    "x a number": P256 | {"x": 7},
    "x null": public(NEW, "EdDSA", "odd") | {"x": None},
    "x not base64": public(NEW, "EdDSA", "odd", x="!!!"),
    "n zero": {"kty": "RSA", "kid": "odd", "alg": "RS256", "n": "AA", "e": "AA"},
    "n missing": {"kty": "RSA", "kid": "odd", "alg": "RS256", "e": "AQAB"},
    "weak": public(WEAK, "RS256", "odd"),
    "kid a list": public(NEW, "EdDSA", None) | {"kid": ["odd"]},
    "kid a number": public(NEW, "EdDSA", None) | {"kid": 7},
    "use enc": public(NEW, "EdDSA", "odd", use="enc"),
    "key_ops without verify": public(NEW, "EdDSA", "odd", key_ops=["encrypt", "wrapKey"]),
    "key_ops a number": public(NEW, "EdDSA", "odd", key_ops=7),
    "private RSA": PRIVATE_RSA | {"kid": "odd", "alg": "RS256"},
    "private RSA, of which half is missing": public(RSA, "RS256", "odd", d="AQAB"),
    "private EC": PRIVATE_EC | {"kid": "odd", "alg": "ES256"},
    "nested deeply": {"kty": "OKP", "kid": "odd", "x": [[[[]]]]},
}

NO_KEY = "it is not an object, or its kid or alg is not a string"
NO_ALG = "its alg is not one of EdDSA, ES256, ES512, RS256, PS256"
SECRET_KEY = "it is private or secret: whoever can read the set can sign with it"
WHY = {  # the others are malformed
    "an empty object": "it is malformed (InvalidKeyError)",
    **dict.fromkeys(["a number", "null", "text", "a list", "kid a list", "kid a number"], NO_KEY),
    **dict.fromkeys(["alg a list", "alg an object", "alg a number"], NO_KEY),
    **dict.fromkeys(["oct without k", "alg none", "alg unknown"], NO_ALG),
    **dict.fromkeys(["alg that logins do not have", "a curve that logins do not have"], NO_ALG),
    **dict.fromkeys(["oct", "private RSA", "private EC"], SECRET_KEY),
    "private RSA, of which half is missing": SECRET_KEY,
    "use enc": "its use is not sig",
    "key_ops without verify": "its key_ops do not have verify",
    "weak": (
        "The RSA key is 1024 bits long, which is below the minimum recommended size of 2048 bits."
        " See NIST SP 800-131A."
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_member_is_ignored_and_logged_and_the_other_keys_work(
    call: Call, auth_server: AuthServer, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    odd = ODD[name]
    auth_server.keys.insert(1, odd)
    for algorithm, key in PRIVATE.items():
        assert call(signed(key, algorithm, algorithm)).status_code == 200
    for headers in (
        signed(NEW, "EdDSA", "odd"),
        signed(RSA, "RS256", "odd"),
        signed(EC, "ES256", "odd"),
    ):
        assert_problem(call(headers), 401)
    [said] = warnings_in(caplog)
    kid = " (kid 'odd')" if isinstance(odd, dict) and odd.get("kid") == "odd" else ""
    why = WHY.get(name) or r"it is malformed \([A-Za-z]+\)"
    expected = re.escape(f"the key set {auth_server.url}: its key number 2{kid} is left out: ")
    assert re.fullmatch(expected + (re.escape(why) if name in WHY else why), said)
    for member in ("d", "k", "p", "q"):
        if isinstance(odd, dict) and len(str(odd.get(member, ""))) > 4:
            assert odd[member] not in said


def test_a_set_of_nothing_but_odd_members_is_an_answer(call: Call, auth_server: AuthServer) -> None:
    auth_server.keys = [5, None, {}]  # type: ignore[list-item]
    assert_problem(call(GOOD), 401)


def test_of_a_set_without_end_the_first_hundred_keys_are_read(
    call: Call, auth_server: AuthServer, caplog: pytest.LogCaptureFixture
) -> None:
    auth_server.keys = auth_server.keys + [5] * 5000  # type: ignore[list-item]
    assert call(GOOD).status_code == 200
    assert len(warnings_in(caplog)) <= 101


def test_one_kid_may_have_keys_of_several_algorithms(call: Call, auth_server: AuthServer) -> None:
    auth_server.keys = [public(key, algorithm, "one") for algorithm, key in PRIVATE.items()]
    for algorithm, key in PRIVATE.items():
        assert call(signed(key, algorithm, "one")).status_code == 200
    assert_problem(call(signed(PRIVATE["RS256"], "PS256", "one")), 401)


def test_keys_without_alg_are_told_apart_by_their_kind(call: Call, auth_server: AuthServer) -> None:
    kinds = ("RS256", "ES256", "ES512", "EdDSA")
    auth_server.keys = [public(PRIVATE[name], name, "one") for name in kinds]
    for key in auth_server.keys:
        del key["alg"]
    for name in kinds:
        assert call(signed(PRIVATE[name], name, "one")).status_code == 200


def test_a_key_without_a_kid_verifies_tokens_without_one(
    call: Call, auth_server: AuthServer
) -> None:
    auth_server.keys = [public(NEW, "EdDSA", None)]
    assert call(signed(NEW, "EdDSA", None)).status_code == 200
    assert_problem(call(signed(NEW, "EdDSA", "None")), 401)


def test_of_two_keys_with_one_kid_and_alg_the_first_counts(
    call: Call, auth_server: AuthServer, caplog: pytest.LogCaptureFixture
) -> None:
    auth_server.keys.append(public(NEW, "EdDSA", "EdDSA"))
    assert call(signed(PRIVATE["EdDSA"], "EdDSA", "EdDSA")).status_code == 200
    assert_problem(call(signed(NEW, "EdDSA", "EdDSA")), 401)
    why = "its key number 6 (kid 'EdDSA') is left out: a key before it has the same kid and alg"
    assert warnings_in(caplog) == [f"the key set {auth_server.url}: {why}"]


@pytest.mark.parametrize("text", ["[]", "{}", "5", '{"keys": {}}', '{"keys": null}', '"keys"'])
def test_an_answer_that_is_not_a_key_set_is_reported_as_such(text: str) -> None:
    with pytest.raises(ValueError, match=r"^the answer is not a JSON object with a list of keys$"):
        taskd.parse_key_set(text.encode())


@pytest.mark.parametrize(
    ("number", "said"), [(100, []), (101, ["only its first 100 keys are read"])]
)
def test_a_hundred_keys_are_read(number: int, said: list[str]) -> None:
    [key] = [public(NEW, "EdDSA", "x" * 70)]
    members = [key | {"kid": f"{n}"} for n in range(number)]
    keys, warnings = taskd.parse_key_set(json.dumps({"keys": members}).encode())
    assert (len(keys), warnings) == (100, said)


def test_a_long_kid_is_cut_in_the_log() -> None:
    odd = {"kid": "k" * 99, "use": "enc"}
    _, [said] = taskd.parse_key_set(json.dumps({"keys": [odd]}).encode())
    assert said == f"its key number 1 (kid '{'k' * 60}') is left out: its use is not sig"


@pytest.mark.parametrize("more", [0, 1])
def test_an_answer_of_a_mebibyte_is_read_and_one_byte_more_is_not(
    auth_server: AuthServer, more: int
) -> None:
    body = b" " * (2**20 + more)
    auth_server.answer = lambda request: AuthServer.send(request, 200, body)
    if not more:
        assert taskd.download(auth_server.url) == body
        return
    with pytest.raises(OSError, match=r"^the answer is longer than 1048576 bytes$"):
        taskd.download(auth_server.url)


# --- Keys that go, and sets that go away ----------------------------------------------------------


@pytest.mark.parametrize("age", [None, 1], ids=["the real age", "a shortened age"])
def test_a_key_that_is_taken_out_is_refused_for_tokens_seen_before_too(
    call: Call,
    auth_server: AuthServer,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    age: int | None,
) -> None:
    if age:
        monkeypatch.setattr(taskd, "KEYS_AGE", age)
    other = signed(PRIVATE["EdDSA"], "EdDSA", "EdDSA")
    assert call(GOOD).status_code == call(other).status_code == 200
    auth_server.keys = [key for key in auth_server.keys if key["kid"] != "ES256"]
    assert call(GOOD).status_code == 200
    clock.ahead += max(age or taskd.KEYS_AGE, taskd.KEYS_PAUSE)
    until(lambda: call(GOOD).status_code == 401, "the set was fetched again")
    assert call(other).status_code == 200
    assert auth_server.asked == 2


def test_after_a_quiet_time_no_old_key_is_trusted(
    call: Call, auth_server: AuthServer, clock: Clock
) -> None:
    assert call(GOOD).status_code == 200
    auth_server.keys = []
    clock.ahead += 300
    assert_problem(call(GOOD), 401)


def test_a_key_that_is_replaced_under_its_name_no_longer_verifies(
    call: Call, auth_server: AuthServer, clock: Clock
) -> None:
    assert call(GOOD).status_code == 200
    other = ec.generate_private_key(ec.SECP256R1())
    auth_server.keys = [public(other, "ES256", "ES256")]
    clock.ahead += 300
    assert_problem(call(GOOD), 401)
    assert call(signed(other, "ES256", "ES256")).status_code == 200


def test_an_empty_set_is_an_answer(call: Call, auth_server: AuthServer, clock: Clock) -> None:
    auth_server.keys = []
    detail = assert_problem(call(GOOD), 401)["detail"]
    assert detail == "the key set has no key for this kid and alg"


@pytest.mark.parametrize("status", [404, 500])
def test_without_a_good_answer_old_keys_go_on_for_an_hour_and_no_longer(
    call: Call, auth_server: AuthServer, clock: Clock, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    assert call(GOOD).status_code == 200
    auth_server.answer = lambda request: AuthServer.send(request, status, b"")
    for _ in range(11):
        clock.ahead += 5 * 60
        assert call(GOOD).status_code == 200
        until(lambda: not running("_run"), "the fetch has ended")
        assert len(warnings_in(caplog)) == 1
    clock.ahead += 5 * 60
    assert_problem(call(GOOD), 503)
    until(lambda: not running("_run"), "the fetch has ended")
    first, second = warnings_in(caplog)
    assert f"it cannot be fetched: OSError: the answer is {status}, not 200" in first
    assert second == (
        f"the key set {auth_server.url}: its keys have expired: no good answer for an hour"
    )
    auth_server.answer = auth_server.well
    clock.ahead += taskd.KEYS_PAUSE
    assert call(GOOD).status_code == 200


def test_a_failure_is_logged_once_for_each_reason_and_again_after_a_good_answer(
    call: Call, auth_server: AuthServer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "taskd")
    for status in (500, 500, 404, 500, 200, 500):
        auth_server.answer = partial(AuthServer.send, status=status, body=b'{"keys": []}')
        clock.ahead += taskd.KEYS_PAUSE
        assert call(GOOD).status_code == (401 if status == 200 else 503)
    said = [re.findall(r"is \d+", line)[0][3:] for line in warnings_in(caplog)]
    assert said == ["500", "404", "500"]
    assert caplog.messages.count("the key set is fetched again") == 1


def test_the_client_that_waits_as_long_as_it_is_told_is_served(
    call: Call, auth_server: AuthServer, clock: Clock
) -> None:
    auth_server.answer = lambda request: AuthServer.send(request, 500, b"")
    assert call(GOOD).headers["Retry-After"] == "3"
    auth_server.answer = auth_server.well
    clock.ahead += 1.5
    refused = call(GOOD)
    assert_problem(refused, 503)
    assert refused.headers["Retry-After"] == "2"
    auth_server.answer = auth_server.well
    clock.ahead += 2
    assert call(GOOD).status_code == 200


def test_retry_after_is_at_least_a_second(
    call: Call, auth_server: AuthServer, clock: Clock
) -> None:
    auth_server.answer = lambda request: AuthServer.send(request, 500, b"")
    assert_problem(call(GOOD), 503)
    clock.ahead += 2.5
    assert call(GOOD).headers["Retry-After"] == "1"


def test_known_keys_are_fetched_again_when_they_are_old_and_sooner_after_a_failure(
    auth_server: AuthServer, clock: Clock
) -> None:
    keys = taskd.KeySet(auth_server.url)

    def asked_after(seconds: float) -> int:
        clock.ahead += seconds
        assert keys.find("ES256", "ES256") is not None
        until(lambda: not running("_run"), "the fetch has ended")
        return auth_server.asked

    assert [asked_after(seconds) for seconds in (0, 200, 41)] == [1, 1, 2]
    auth_server.answer = lambda request: AuthServer.send(request, 500, b"")
    assert [asked_after(seconds) for seconds in (241, 15, 6, 21)] == [3, 3, 4, 5]
    auth_server.answer = auth_server.well
    assert [asked_after(seconds) for seconds in (21, 200)] == [6, 6]


def test_a_thread_that_cannot_start_once_is_tried_again(
    call: Call, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        assert_problem(call(GOOD), 503)
    [said] = warnings_in(caplog)
    assert said.endswith("it cannot be fetched: RuntimeError: can't start new thread")
    clock.ahead += taskd.KEYS_PAUSE
    assert call(GOOD).status_code == 200


def test_a_process_that_is_forked_during_a_fetch_begins_one_of_its_own(
    auth_server: AuthServer,
) -> None:
    keys = taskd.KeySet(auth_server.url)
    keys._fetch = Future()  # its thread is in the parent process
    assert keys.find("ES256", "ES256") is not None


def test_a_long_reason_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    keys = taskd.KeySet("http://127.0.0.1:1/")
    keys._note_failure(OSError("x" * 9000))
    assert warnings_in(caplog) == [
        f"the key set http://127.0.0.1:1/: it cannot be fetched: OSError: {'x' * 191}"
    ]


def test_tokens_of_either_kind_are_remembered_beside_each_other(auth_server: AuthServer) -> None:
    tokens = taskd.Tokens(taskd.Settings(secret=SECRET, jwks_url=auth_server.url))
    for headers in (GOOD, bearer()):
        token = headers["Authorization"].removeprefix("Bearer ")
        assert tokens.verify(token) is tokens.verify(token)


# --- A proxy that lies ----------------------------------------------------------------------------


@pytest.fixture
def proxy() -> Iterator[AuthServer]:
    """A proxy that answers every request with its own key set."""
    server = AuthServer()
    server.keys = [public(NEW, "EdDSA", "EdDSA")]
    yield server
    server.close()


def test_a_proxy_is_not_asked_for_the_set_of_this_machine(
    start: Callable[..., Process], auth_server: AuthServer, proxy: AuthServer
) -> None:
    address = f"http://127.0.0.1:{proxy.http.server_port}"
    names = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"), address)
    server = start(TASKD_JWKS_URL=auth_server.url, NO_PROXY="", no_proxy="", **names)
    good, forged = (signed(key, "EdDSA", "EdDSA") for key in (PRIVATE["EdDSA"], NEW))
    assert server.request("GET", "/api/alice/tasks", headers=good).status_code == 200
    assert server.request("GET", "/api/alice/tasks", headers=forged).status_code == 401
    assert (auth_server.asked, proxy.asked) == (1, 0)


@contextlib.contextmanager
def first_bytes() -> Iterator[tuple[int, list[bytes]]]:
    """Refuse what connects to a port; yield the port, and a list of what each sent first."""
    received: list[bytes] = []

    def refuse() -> None:
        with contextlib.suppress(OSError):
            while True:
                with listener.accept()[0] as connection:
                    received.append(connection.recv(4096))
                    connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=refuse, daemon=True).start()
        yield listener.getsockname()[1], received
        listener.shutdown(socket.SHUT_RDWR)


def set_proxy(monkeypatch: pytest.MonkeyPatch, https: str | None, none: str | None = None) -> None:
    """Set the environment's proxy for https, and the hosts that are reached without it."""
    for name, value in {"HTTPS_PROXY": https, "NO_PROXY": none}.items():
        for spelling in (name, name.lower()):
            monkeypatch.delenv(spelling, raising=False)
            if value is not None:
                monkeypatch.setenv(spelling, value)


# The address 0.0.0.0 leads to this machine too, but counts as another one.
@pytest.mark.parametrize(
    ("host", "none", "proxied"),
    [
        ("127.0.0.1", None, False),
        ("localhost", "", False),
        ("0.0.0.0", None, True),
        ("0.0.0.0", "auth.example", True),
        ("0.0.0.0", "auth.example,0.0.0.0", False),
    ],
)
def test_a_set_is_fetched_through_the_proxy_unless_its_host_is_this_machine_or_excepted(
    monkeypatch: pytest.MonkeyPatch, host: str, none: str | None, proxied: bool
) -> None:
    with first_bytes() as (port, directly), first_bytes() as (proxy_port, at_proxy):
        set_proxy(monkeypatch, f"http://127.0.0.1:{proxy_port}", none)
        with pytest.raises(OSError, match="502" if proxied else "SSL"):
            taskd.download(f"https://{host}:{port}/jwks")
    if proxied:
        assert directly == []
        assert at_proxy[0].startswith(f"CONNECT {host}:{port} HTTP/1.".encode())
    else:
        assert at_proxy == []
        assert directly[0][:2] == b"\x16\x03"  # TLS


def test_the_proxy_is_not_asked_for_the_address_of_this_machine_in_ipv6(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with first_bytes() as (proxy_port, at_proxy):
        set_proxy(monkeypatch, f"http://127.0.0.1:{proxy_port}")
        with pytest.raises(OSError, match=r"refused|unreachable|assign|not supported"):
            taskd.download("https://[::1]:9/jwks")
    assert at_proxy == []


def test_without_a_proxy_a_set_is_fetched_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    with first_bytes() as (port, directly):
        set_proxy(monkeypatch, None)
        with pytest.raises(OSError, match="SSL"):
            taskd.download(f"https://0.0.0.0:{port}/jwks")
    assert directly[0][:2] == b"\x16\x03"


@pytest.mark.parametrize(
    ("login", "header"),
    [
        ("", None),
        ("http://", None),
        ("http://user:p%40ss@", b"Basic dXNlcjpwQHNz"),
        ("http://user:p@ss@", b"Basic dXNlcjpwQHNz"),
        ("user:p%40ss@", b"Basic dXNlcjpwQHNz"),
    ],
)
def test_a_proxy_gets_the_login_of_its_address(
    monkeypatch: pytest.MonkeyPatch, login: str, header: bytes | None
) -> None:
    with first_bytes() as (port, asked):
        set_proxy(monkeypatch, f"{login}127.0.0.1:{port}")
        with pytest.raises(OSError, match="502"):
            taskd.download("https://auth.example/jwks")
    assert asked[0].startswith(b"CONNECT auth.example:443 HTTP/1.")
    assert re.findall(b"(?i)Proxy-Authorization: (.*)\r", asked[0]) == ([header] if header else [])


# --- Many at once, at a real taskd ----------------------------------------------------------------


def at_once(server: Process, headers: dict[str, str], number: int = 40) -> list[Wire]:
    """Send the same request on several connections, without waiting for the answers."""
    authorization = f"Authorization: {headers['Authorization']}"
    wires = [Wire(server) for _ in range(number)]
    for wire in wires:
        wire.send(written("GET", "/api/alice/tasks", None, authorization))
    return wires


def test_forty_callers_at_a_cold_start_wait_for_one_fetch_and_hold_nobody_up(
    start: Callable[..., Process], auth_server: AuthServer
) -> None:
    auth_server.answer = auth_server.late
    server = start(TASKD_JWKS_URL=auth_server.url, TASKD_THREADS="2")
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(wire) for wire in at_once(server, GOOD)]
        assert server.request("GET", "/healthz").status_code == 200
        created = server.request("POST", "/api/bob/tasks", {"title": "x"}, bearer("bob"))
        assert created.status_code == 201
        auth_server.free.set()
        assert [wire.answer().status_code for wire in wires] == [200] * 40
    assert auth_server.asked == 1


@pytest.mark.slow
def test_forty_callers_after_a_rotation_wait_for_one_fetch(
    start: Callable[..., Process], auth_server: AuthServer
) -> None:
    server = start(TASKD_JWKS_URL=auth_server.url)
    assert server.request("GET", "/api/alice/tasks", headers=GOOD).status_code == 200
    auth_server.keys.append(public(NEW, "EdDSA", "new"))
    auth_server.answer = auth_server.late
    rotated = signed(NEW, "EdDSA", "new")

    def waits() -> bool:
        with Wire(server) as wire:
            wire.send(
                written(
                    "GET", "/api/alice/tasks", None, f"Authorization: {rotated['Authorization']}"
                )
            )
            return auth_server.asked == 2

    until(waits, "the pause between two fetches is over")
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(wire) for wire in at_once(server, rotated)]
        assert server.request("GET", "/healthz").status_code == 200
        auth_server.free.set()
        assert [wire.answer().status_code for wire in wires] == [200] * 40
    assert auth_server.asked == 2


def test_a_caller_who_leaves_while_the_set_is_fetched_harms_nobody(
    start: Callable[..., Process], auth_server: AuthServer
) -> None:
    auth_server.answer = auth_server.late
    server = start(TASKD_JWKS_URL=auth_server.url)
    for wire in at_once(server, GOOD, 10):
        wire.reset()
    [stays] = at_once(server, GOOD, 1)
    auth_server.free.set()
    assert stays.answer().status_code == 200
    stays.close()
    assert server.request("GET", "/api/alice/tasks", headers=GOOD).status_code == 200
    assert server.terminate() == 0
    assert "Traceback" not in server.log


# --- The log --------------------------------------------------------------------------------------


def test_the_log_says_why_a_token_is_refused_and_whose_it_is(start: Callable[..., Process]) -> None:
    server = start(TASKD_LOG_FORMAT="json")
    refused = server.request("GET", "/api/alice/tasks", headers=bearer(exp=1))
    server.request("GET", "/api/alice/tasks")
    server.request("GET", "/api/alice/tasks", headers=bearer("bob"))
    server.request("GET", "/api/alice/tasks", headers=bearer())
    until(lambda: server.log.count("\n") == 5, "a line for each")
    seen = [json.loads(line) for line in server.log.splitlines()[1:]]
    assert [(line["status"], line["user"], line.get("reason")) for line in seen] == [
        (401, None, refused.json["detail"]),
        (401, None, "send the header Authorization: Bearer <JWT>, with the token from your login"),
        (403, "bob", None),
        (200, "alice", None),
    ]


def test_the_reason_ends_the_line_for_people(start: Callable[..., Process]) -> None:
    server = start()
    server.request("GET", "/api/alice/tasks", headers=bearer(exp=1))
    until(lambda: server.log.count("\n") == 2, "a line for it")
    assert server.log.endswith(' user=- reason="the token has expired; log in again"\n')

"""The key set, from an auth server that answers well, badly, late or not at all."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from falcon import testing

import taskd
from support import DEADLINE, SECRET, assert_problem, bearer, sign, token, until

pytestmark = pytest.mark.sqlite("it is about keys")

PRIVATE = {
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "ES512": ec.generate_private_key(ec.SECP521R1()),
    "RS256": rsa.generate_private_key(65537, 2048),
    "PS256": rsa.generate_private_key(65537, 2048),
}
NEW = ed25519.Ed25519PrivateKey.generate()
WEAK = rsa.generate_private_key(65537, 1024)


def public(private: Any, algorithm: str, kid: str | None, **more: Any) -> dict[str, Any]:
    """Return the JWK of a private key's public half."""
    jwk = jwt.get_algorithm_by_name(algorithm).to_jwk(private.public_key(), as_dict=True)
    return {
        name: value
        for name, value in {**jwk, "alg": algorithm, "kid": kid, **more}.items()
        if value is not None
    }


def signed(
    private: Any, algorithm: str, kid: str | None, user: str = "alice", **claims: Any
) -> dict[str, str]:
    """Return the Authorization header of a token signed with a private key."""
    payload = {"sub": user, "exp": int(time.time()) + 900} | claims
    made = jwt.encode(payload, private, algorithm, headers={"kid": kid} if kid else {})
    return {"Authorization": f"Bearer {made}"}


class AuthServer:
    """An auth server on loopback; its answers can be changed, and its requests are counted."""

    def __init__(self) -> None:
        self.keys = [public(key, algorithm, algorithm) for algorithm, key in PRIVATE.items()]
        self.answer: Callable[[http.server.BaseHTTPRequestHandler], None] = self.well
        self.asked = self.sent = self.hung_up = 0
        auth_server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                auth_server.asked += 1
                with contextlib.suppress(ConnectionError):
                    auth_server.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/api/auth/jwks"
        self.free = threading.Event()
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def well(self, request: http.server.BaseHTTPRequestHandler) -> None:
        self.send(request, 200, json.dumps({"keys": self.keys}).encode())

    def late(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """Answer well, but only after the test releases it."""
        self.free.wait(30)
        self.well(request)

    def behind_a_firewall(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """Reject clients whose User-Agent is only the name of a library."""
        if request.headers["User-Agent"] == f"taskd/{taskd.__version__}":
            return self.well(request)
        return self.send(request, 403, b"")

    def huge(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """Send a good set with 300 MB of white space before its end."""
        good = json.dumps({"keys": self.keys}).encode()
        request.send_response(200)
        request.end_headers()
        self.sent = 0
        for piece in itertools.chain([good[:-1]], itertools.repeat(b" " * 2**20, 300), [b"}"]):
            self.sent += request.wfile.write(piece)

    def trickling(self, head: bytes) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
        """Return a handler that sends this much at once, then single bytes without end."""

        def answer(request: http.server.BaseHTTPRequestHandler) -> None:
            request.wfile.write(head)
            while not self.free.wait(0.05):
                request.wfile.write(b" ")
            self.hung_up += 1

        return answer

    @staticmethod
    def send(
        request: http.server.BaseHTTPRequestHandler, status: int, body: bytes, **headers: str
    ) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def close(self) -> None:
        self.free.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def auth_server() -> Iterator[AuthServer]:
    server = AuthServer()
    yield server
    server.close()


UNKNOWN_KEY = "the key set has no key for this kid and alg"


@pytest.fixture
def call(
    auth_server: AuthServer, make_app: Callable[..., taskd.App]
) -> Callable[..., testing.Result]:
    """List alice's tasks with the given header, at a taskd that has a secret and this key set."""
    clients: list[testing.TestClient] = []

    def call(headers: dict[str, str], user: str = "alice") -> testing.Result:
        if not clients:  # after the application, which fetches the set when it is made
            clients.append(testing.TestClient(make_app(jwks_url=auth_server.url)))
        return clients[0].simulate_get(f"/api/{user}/tasks", headers=headers)

    return call


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test about another behaviour fetch without a limit."""
    monkeypatch.setattr(taskd, "KEYS_PAUSE", 0)


@pytest.mark.parametrize("algorithm", PRIVATE)
def test_a_token_signed_with_a_key_of_the_set_is_accepted(call, algorithm):
    assert call(signed(PRIVATE[algorithm], algorithm, algorithm)).json == []


def test_a_token_of_the_secret_does_not_wait_for_the_key_set(call, auth_server):
    auth_server.answer = auth_server.late
    assert call(bearer()).status_code == 200


def test_the_key_set_alone_is_enough_and_then_hs256_is_401(auth_server, make_app):
    client = testing.TestClient(make_app(secret=None, jwks_url=auth_server.url))
    good = signed(PRIVATE["EdDSA"], "EdDSA", "EdDSA")
    assert client.simulate_get("/api/alice/tasks", headers=good).status_code == 200
    refused = assert_problem(client.simulate_get("/api/alice/tasks", headers=bearer()), 401)
    assert refused["detail"] == "alg must be one of EdDSA, ES256, ES512, RS256, PS256"


def test_taskd_does_not_start_without_a_key_set_or_a_secret(make_app):
    with pytest.raises(taskd.SettingsError, match="BETTER_AUTH_SECRET is missing"):
        make_app(secret=None)


def test_the_set_is_fetched_at_the_start(auth_server, make_app):
    make_app(jwks_url=auth_server.url)
    until(lambda: auth_server.asked == 1, "it is asked for the set before anybody logs in")


def test_a_server_with_a_key_set_alone_cannot_mint(auth_server):
    with pytest.raises(taskd.SettingsError) as caught:
        taskd.Tokens(taskd.Settings(jwks_url=auth_server.url)).mint({"sub": "alice"})
    why = "and taskd cannot sign with the keys of TASKD_JWKS_URL; use the token of a login"
    assert str(caught.value) == f"BETTER_AUTH_SECRET is missing, {why}"


def test_without_a_key_set_a_token_of_better_auths_own_key_says_what_to_set(make_app):
    client = testing.TestClient(make_app())
    refused = client.simulate_get(
        "/api/alice/tasks", headers=signed(PRIVATE["EdDSA"], "EdDSA", "EdDSA")
    )
    assert "set TASKD_JWKS_URL" in assert_problem(refused, 401)["detail"]


@pytest.mark.parametrize(
    ("private", "algorithm", "kid", "why"),
    [
        (NEW, "EdDSA", "EdDSA", "the signature does not match"),
        (PRIVATE["EdDSA"], "EdDSA", "nobody's", UNKNOWN_KEY),
        (PRIVATE["EdDSA"], "EdDSA", None, UNKNOWN_KEY),
        (PRIVATE["RS256"], "PS256", "RS256", UNKNOWN_KEY),
        (PRIVATE["RS256"], "RS256", "PS256", UNKNOWN_KEY),
        (PRIVATE["ES256"], "ES256", "EdDSA", UNKNOWN_KEY),
        (PRIVATE["RS256"], "RS512", "RS256", "alg must be one of HS256, EdDSA, "),
    ],
)
def test_another_key_kid_or_algorithm_is_401(call, private, algorithm, kid, why):
    assert why in assert_problem(call(signed(private, algorithm, kid)), 401)["detail"]


@pytest.mark.parametrize("algorithm", ["EdDSA", "RS256"])
def test_hs256_signed_with_a_public_key_is_401(call, auth_server, algorithm):
    [key] = [key for key in auth_server.keys if key["kid"] == algorithm]
    text = json.dumps(key)
    for secret in (text, key.get("x", ""), key.get("n", "")):
        forged = sign(
            {"alg": "HS256", "kid": algorithm},
            {"sub": "alice", "exp": int(time.time()) + 900},
            secret or "x",
        )
        assert_problem(call({"Authorization": f"Bearer {forged}"}), 401)


def test_a_set_that_holds_secrets_weak_keys_or_keys_for_other_uses_offers_none_of_them(
    call, auth_server
):
    auth_server.keys += [
        {
            "kty": "oct",
            "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA",
            "alg": "HS256",
            "kid": "secret",
        },
        public(WEAK, "RS256", "weak"),
        public(NEW, "EdDSA", "enc", use="enc"),
    ]
    claims = {"sub": "alice", "exp": int(time.time()) + 900}
    forged = sign({"alg": "HS256", "kid": "secret"}, claims, "secret-secret-secret-secret-secret")
    assert_problem(call({"Authorization": f"Bearer {forged}"}), 401)
    with pytest.warns(jwt.warnings.InsecureKeyLengthWarning):
        weak = signed(WEAK, "RS256", "weak")
    assert_problem(call(weak), 401)
    assert_problem(call(signed(NEW, "EdDSA", "enc")), 401)


@pytest.mark.parametrize(
    "claims",
    [{"exp": 1}, {"exp": None}, {"exp": "9999999999"}, {"sub": ""}, {"nbf": 2**40}, {"iat": 2**40}],
)
def test_the_claims_of_such_a_token_count_as_much(call, claims):
    assert_problem(call(signed(PRIVATE["ES256"], "ES256", "ES256", **claims)), 401)


def test_a_token_for_bob_cannot_read_alices_tasks(call):
    assert_problem(call(signed(PRIVATE["ES256"], "ES256", "ES256", user="bob")), 403)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda request: AuthServer.send(request, 500, b"oh no"), "an error"),
        (lambda request: AuthServer.send(request, 404, b"{}"), "nothing there"),
        (
            lambda request: AuthServer.send(request, 302, b"", Location="http://127.0.0.1:1/"),
            "a redirect",
        ),
        (lambda request: AuthServer.send(request, 200, b"<html>"), "no JSON"),
        (lambda request: AuthServer.send(request, 200, b"\xff\xfe"), "no text"),
        (lambda request: AuthServer.send(request, 200, b"[]"), "no object"),
        (lambda request: AuthServer.send(request, 200, b"{}"), "no keys"),
        (lambda request: AuthServer.send(request, 200, b'{"keys": 5}'), "keys that are not a list"),
        (lambda request: AuthServer.send(request, 204, b""), "another good status"),
        (lambda request: AuthServer.send(request, 200, b'{"keys": ' + b"[" * 100_000), "no bottom"),
        (lambda request: request.wfile.write(b"SSH-2.0\r\n"), "another protocol"),
        (lambda request: None, "nothing"),
    ],
)
@pytest.mark.usefixtures("no_pause")
def test_a_key_set_that_cannot_be_fetched_is_503_until_it_can(call, auth_server, answer, why):
    auth_server.answer = answer
    refused = call(signed(PRIVATE["ES256"], "ES256", "ES256"))
    assert_problem(refused, 503)
    assert int(refused.headers["Retry-After"]) > 0
    assert call(bearer()).status_code == 200, "HS256 goes on"
    auth_server.answer = auth_server.well
    assert call(signed(PRIVATE["ES256"], "ES256", "ES256")).status_code == 200


def test_a_redirect_is_not_followed(call, auth_server):
    other = AuthServer()
    auth_server.answer = lambda request: AuthServer.send(request, 302, b"", Location=other.url)
    assert_problem(call(signed(PRIVATE["ES256"], "ES256", "ES256")), 503)
    assert other.asked == 0
    other.close()


@pytest.mark.usefixtures("no_pause")
def test_known_keys_stay_valid_while_the_set_cannot_be_fetched(call, auth_server):
    assert call(signed(PRIVATE["ES256"], "ES256", "ES256")).status_code == 200
    auth_server.answer = lambda request: AuthServer.send(request, 500, b"")
    assert_problem(call(signed(NEW, "EdDSA", "new")), 503)
    assert call(signed(PRIVATE["ES256"], "ES256", "ES256", jti="another token")).status_code == 200
    assert call(signed(PRIVATE["EdDSA"], "EdDSA", "EdDSA")).status_code == 200


def test_a_set_that_does_not_answer_is_503_after_the_wait_and_not_later(
    call, auth_server, monkeypatch
):
    monkeypatch.setattr(taskd, "KEYS_WAIT", 0.2)
    auth_server.answer = auth_server.late
    started = time.monotonic()
    assert_problem(call(signed(PRIVATE["ES256"], "ES256", "ES256")), 503)
    assert 0.2 <= time.monotonic() - started < 5
    assert_problem(call(signed(PRIVATE["EdDSA"], "EdDSA", "EdDSA")), 503)
    assert auth_server.asked == 1, "one fetch at a time"


def test_the_wait_is_at_most_5_seconds():
    assert taskd.KEYS_WAIT <= 5


def test_the_event_loop_never_waits_for_the_set_but_is_told_when_it_is_there(
    auth_server, monkeypatch
):
    auth_server.answer = auth_server.late
    keys = taskd.KeySet(auth_server.url)
    monkeypatch.setattr(taskd.thread_state, "in_event_loop", True)
    with pytest.raises(taskd.WouldBlock) as caught:
        keys.find("ES256", "ES256")
    told = threading.Event()
    caught.value.until.add_done_callback(lambda _: told.set())
    assert not told.is_set()
    auth_server.free.set()
    assert told.wait(DEADLINE)
    assert keys.find("ES256", "ES256") is not None


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://[::1]/jwks", ("::1", 80)),
        ("http://localhost/jwks", ("localhost", 80)),
        ("https://[::1]/jwks", ("::1", 443)),
        ("https://[::1]:8443/jwks", ("::1", 8443)),
    ],
)
def test_an_address_without_a_port_has_that_of_its_scheme(url, address, monkeypatch):
    asked = []

    def refuse(to, *_, **__):
        asked.append(to)
        raise ConnectionRefusedError

    monkeypatch.setattr("socket.create_connection", refuse)
    with pytest.raises(ConnectionRefusedError):
        taskd.download(url)
    assert asked == [address]


def test_a_flood_of_made_up_kids_reaches_the_auth_server_once(call, auth_server):
    for number in range(50):
        assert_problem(call(signed(NEW, "EdDSA", f"made-up-{number}")), 401)
    assert auth_server.asked == 1


def test_however_many_ask_for_a_key_not_yet_known_they_wait_for_one_fetch(auth_server):
    auth_server.answer = auth_server.late
    keys = taskd.KeySet(auth_server.url)
    with ThreadPoolExecutor(40) as threads:
        asking = [threads.submit(keys.find, "ES256", "ES256") for _ in range(40)]
        until(lambda: auth_server.asked, "the fetch has begun")
        auth_server.free.set()
        assert all(one.result(DEADLINE) for one in asking)
    assert auth_server.asked == 1


def test_a_rotated_key_is_accepted_once_the_pause_is_over(call, auth_server, monkeypatch):
    assert call(signed(PRIVATE["ES256"], "ES256", "ES256")).status_code == 200
    auth_server.keys.append(public(NEW, "EdDSA", "new"))
    assert_problem(call(signed(NEW, "EdDSA", "new")), 401)
    assert taskd.KEYS_PAUSE <= 5
    monkeypatch.setattr(taskd, "KEYS_PAUSE", 0)
    assert call(signed(NEW, "EdDSA", "new")).status_code == 200
    assert auth_server.asked == 2


@pytest.mark.parametrize(
    "url",
    [
        "https://auth.example.com/api/auth/jwks",
        "http://localhost:3000/api/auth/jwks",
        "http://127.0.0.1/jwks",
        "http://127.1.2.3:80/jwks?x=1",
        "http://[::1]:3000/jwks",
    ],
)
def test_https_or_http_to_this_machine_is_taken(url, tmp_path):
    assert taskd.Settings.load({"TASKD_JWKS_URL": url}, tmp_path / ".env").jwks_url == url


@pytest.mark.parametrize(
    "url",
    [
        "http://auth.example.com/jwks",
        "http://10.0.0.1/jwks",
        "http://127.0.0.1@evil.example/jwks",
        "http://127.0.0.1:80@evil.example/jwks",
        "http://localhost.evil.example/jwks",
        "https://user@evil.example/jwks",
        "ftp://localhost/jwks",
        "file:///etc/passwd",
        "/api/auth/jwks",
        "https://auth.example.com/a b",
    ],
)
def test_a_key_set_from_anywhere_else_is_refused(url, tmp_path):
    with pytest.raises(taskd.SettingsError, match="TASKD_JWKS_URL must be https"):
        taskd.Settings.load({"TASKD_JWKS_URL": url}, tmp_path / ".env")


def test_verified_tokens_are_remembered_but_only_so_many(monkeypatch):
    monkeypatch.setattr(taskd, "TOKEN_CACHE_SIZE", 3)
    tokens = taskd.Tokens(taskd.Settings(secret=SECRET))
    made = [token(f"user-{number}") for number in range(7)]
    for text in made:
        assert tokens.verify(text) is tokens.verify(text)
        assert len(tokens._verified) <= 3


def test_a_remembered_token_still_expires(monkeypatch):
    tokens = taskd.Tokens(taskd.Settings(secret=SECRET))
    now = time.time()
    text = token(exp=int(now) + 100)
    assert tokens.verify(text).id == "alice"
    monkeypatch.setattr(taskd.time, "time", lambda: now + 100 + taskd.LEEWAY - 2)
    assert tokens.verify(text) is tokens.verify(text)
    until, _, _ = tokens._verified[text]
    assert until == int(now) + 100 + taskd.LEEWAY


def test_a_token_is_remembered_for_no_longer_than_five_minutes():
    tokens = taskd.Tokens(taskd.Settings(secret=SECRET))
    text = token(exp=253402300799)
    tokens.verify(text)
    until, _, _ = tokens._verified[text]
    assert 290 < until - time.time() <= 300


def test_a_failure_names_the_url_that_cannot_be_fetched_and_the_reason(auth_server):
    auth_server.answer = lambda request: AuthServer.send(request, 500, b"")
    with pytest.raises(taskd.Unavailable) as caught:
        taskd.KeySet(auth_server.url).find("ES256", "ES256")
    assert caught.value.args == ("the key set", "OSError: the answer is 500, not 200")


def test_the_answer_says_that_the_key_set_cannot_be_fetched(call, auth_server):
    auth_server.answer = lambda request: AuthServer.send(request, 500, b"")
    refused = assert_problem(call(signed(PRIVATE["ES256"], "ES256", "ES256")), 503)
    assert refused["detail"] == "the key set cannot be used right now; try again"

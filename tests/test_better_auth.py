"""A real Better Auth logs users in; each kind of token that it makes is sent to a real taskd.

`better_auth/server.mjs` runs it under Node, with the configuration of docs/better-auth.md.
"""

from __future__ import annotations

import base64
import dataclasses
import http.client
import itertools
import json
import re
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from packages import install
from support import (
    DEADLINE,
    OTHER_SECRET,
    ROOT,
    SECRET,
    TASK_KEYS,
    Answer,
    Process,
    assert_problem,
    environment,
    until,
)
from taskd import Settings, Tokens

pytestmark = pytest.mark.sqlite("it is about tokens")

HERE = Path(__file__).parent / "better_auth"
PAGE = ROOT / "docs" / "better-auth.md"
OLDEST_NODE = (20, 19)  # better-auth's own libraries ask for it
PASSWORD = "correct horse battery staple"

Serve = Callable[..., Process]
Auth = Callable[..., "BetterAuth"]


def node_is_missing() -> str:
    """Return why Better Auth cannot run here, or nothing."""
    node = shutil.which("node")
    if not node or not shutil.which("npm"):
        return "Better Auth runs on Node: install node and npm to run these tests"
    version = subprocess.run(
        [node, "--version"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if tuple(int(number) for number in version.lstrip("v").split(".")[:2]) < OLDEST_NODE:
        oldest = f"{OLDEST_NODE[0]}.{OLDEST_NODE[1]}"
        return f"Better Auth needs Node {oldest} or newer to run these tests, not {version}"
    return ""


MISSING = node_is_missing()
needs_node = pytest.mark.skipif(bool(MISSING), reason=MISSING)


# Better Auth and its users.


class BetterAuth:
    """A Better Auth server under Node: mode `jwks` (or with an algorithm), `secret`, `route`."""

    def __init__(self, *arguments: str, **variables: str) -> None:
        if "BETTER_AUTH_SECRETS" not in variables:
            variables.setdefault("BETTER_AUTH_SECRET", SECRET)
        self.popen = subprocess.Popen(
            ["node", "server.mjs", *arguments],
            cwd=HERE,
            env=environment(**variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.popen.stdout
        ready, _, _ = select.select([self.popen.stdout], [], [], DEADLINE)
        line = self.popen.stdout.readline() if ready else ""
        if not line.startswith("listening on http://127.0.0.1:"):
            self.end()
            self.wait()
            raise AssertionError(f"Better Auth did not start: {line!r}")
        self.url = line.removeprefix("listening on ").strip()
        self.port = int(self.url.rpartition(":")[2])
        self._numbers = itertools.count(1)  # so that each user has an address of their own

    @property
    def settings(self) -> dict[str, str]:
        """The settings with which taskd trusts this server's keys."""
        return {
            "TASKD_JWKS_URL": f"{self.url}/api/auth/jwks",
            "TASKD_ISSUER": self.url,
            "TASKD_AUDIENCE": self.url,
        }

    def sign_up(self, name: str) -> Visitor:
        """Make a user, sign in, and return the user's browser."""
        visitor = Visitor(self)
        person = {"email": f"{name}-{next(self._numbers)}@example.com", "password": PASSWORD}
        signed_up = visitor.call("POST", "/api/auth/sign-up/email", person | {"name": name}).json
        visitor.id = signed_up["user"]["id"]
        visitor.cookies.clear()
        visitor.call("POST", "/api/auth/sign-in/email", person)
        return visitor

    def end(self) -> None:
        """Close its standard input, which also happens when this process ends."""
        assert self.popen.stdin
        self.popen.stdin.close()

    def wait(self) -> int:
        """Wait for its end and return its exit status."""
        assert self.popen.stdout
        try:
            return self.popen.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            return self.popen.wait(DEADLINE)
        finally:
            self.popen.stdout.close()


class Visitor:
    """A user with a browser, which keeps Better Auth's cookies."""

    id: str

    def __init__(self, server: BetterAuth) -> None:
        self.server = server
        self.cookies: dict[str, str] = {}

    def ask(self, method: str, path: str, body: object = None) -> Answer:
        """Send a request to Better Auth."""
        headers = {"Origin": self.server.url, "Content-Type": "application/json"}
        if self.cookies:
            headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=DEADLINE)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            for cookie in response.headers.get_all("Set-Cookie", []):
                name, _, value = cookie.partition(";")[0].partition("=")
                self.cookies[name] = value
            return Answer(response)
        finally:
            connection.close()

    def call(self, method: str, path: str, body: object = None) -> Answer:
        """Send a request to Better Auth, which must succeed."""
        answer = self.ask(method, path, body)
        assert answer.status_code == 200, (method, path, answer.status_code, answer.text)
        return answer

    def token(self) -> str:
        """Return a JWT from the jwt() plugin's own route."""
        return str(self.call("GET", "/api/auth/token").json["token"])

    def token_in_header(self) -> str:
        """Return the JWT that comes with the session."""
        return self.call("GET", "/api/auth/get-session").headers["set-auth-jwt"]

    def token_of_route(self) -> str:
        """Return a JWT from the route in auth-route.mjs."""
        return str(self.call("GET", "/api/token").json["token"])

    def session_token(self) -> str:
        """Return `<token>.<signature>`, as the bearer() plugin hands it out in set-auth-token."""
        return unquote(self.session_cookie())

    def session_cookie(self) -> str:
        return self.cookies["better-auth.session_token"]

    def cookie_cache(self) -> str:
        return self.cookies["better-auth.session_data"]

    def mail_token(self) -> str:
        """Return the token of the link in the last verification mail."""
        return str(self.call("GET", "/test/mails").json[-1]["token"])

    def tasks(self, path: str = "") -> str:
        return f"/api/{self.id}/tasks{path}"


@pytest.fixture(scope="module")
def installed() -> None:
    install(HERE / "package-lock.json")


@pytest.fixture(scope="module")
def better_auth(installed: None) -> Iterator[Auth]:
    """Give the Better Auth of this mode, started once; `fresh=True` gives one that may be ended."""
    running: dict[object, BetterAuth] = {}

    def give(*arguments: str, fresh: bool = False, **variables: str) -> BetterAuth:
        key = len(running) if fresh else (arguments, *sorted(variables.items()))
        if key not in running:
            running[key] = BetterAuth(*arguments, **variables)
        return running[key]

    yield give
    for server in running.values():
        server.end()
    assert {server.wait() for server in running.values()} <= {0}


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Give the taskd with these settings, started once; `fresh=True`: one without any key yet."""
    running: dict[object, Process] = {}

    def give(fresh: bool = False, **settings: str) -> Process:
        key = len(running) if fresh else tuple(sorted(settings.items()))
        if key not in running:
            running[key] = Process(
                tmp_path_factory.mktemp("taskd"), wait=True, command=None, **settings
            )
        return running[key]

    yield give
    for process in running.values():
        process.popen.terminate()
    assert {process.popen.wait(DEADLINE) for process in running.values()} <= {0}


# Requests with a token.


def headers_with(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def part(token: str, number: int) -> dict[str, Any]:
    """Return a JWT's header (0) or claims (1)."""
    text = token.split(".")[number]
    return dict(json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))))


def new_task(task: dict[str, Any], user_id: str) -> dict[str, Any]:
    """Return the expected task of a user, just after it was created."""
    made: dict[str, Any] = {"title": "Buy milk", "description": None, "completed": False}
    made |= {"priority": None, "due_date": None, "tags": []}
    times = {"created_at": task["created_at"], "updated_at": task["updated_at"]}
    return {"id": task["id"], "user_id": user_id} | made | times


def drive_all_routes(server: Process, visitor: Visitor, token: str) -> None:
    """Create, list, read, change, toggle and delete a task, and leave nothing behind."""
    headers = headers_with(token)
    created = server.request("POST", visitor.tasks(), {"title": "Buy milk"}, headers)
    assert created.status_code == 201, created.text
    task = created.json
    assert list(task) == TASK_KEYS
    assert task == new_task(task, visitor.id)
    one = visitor.tasks(f"/{task['id']}")
    assert created.headers["location"] == one

    def answered(method: str, path: str, body: object = None) -> Any:
        answer = server.request(method, path, body, headers)
        assert answer.status_code == 200, answer.text
        return answer.json

    assert answered("GET", visitor.tasks()) == [task]
    assert answered("GET", one) == task
    changed = answered("PUT", one, {"title": "Buy oat milk"})
    assert changed == task | {"title": "Buy oat milk", "updated_at": changed["updated_at"]}
    toggled = answered("PATCH", f"{one}/complete")
    assert toggled == changed | {"completed": True, "updated_at": toggled["updated_at"]}
    assert answered("DELETE", one) == toggled
    assert answered("GET", visitor.tasks()) == []


def assert_refused(server: Process, visitor: Visitor, token: str, why: str) -> None:
    """Check that all six routes answer 401 and say why."""
    task = visitor.tasks("/1")
    for method, path in [
        ("GET", visitor.tasks()),
        ("POST", visitor.tasks()),
        ("GET", task),
        ("PUT", task),
        ("DELETE", task),
        ("PATCH", f"{task}/complete"),
    ]:
        answer = server.request(
            method,
            path,
            {"title": "Buy milk"} if method in {"POST", "PUT"} else None,
            headers_with(token),
        )
        problem = assert_problem(answer, 401)
        assert why in problem["detail"]
        challenge = (
            f'Bearer realm="taskd", error="invalid_token", error_description="{problem["detail"]}"'
        )
        assert answer.headers["www-authenticate"] == challenge


def listed(server: Process, visitor: Visitor, token: str) -> Answer:
    return server.request("GET", visitor.tasks(), headers=headers_with(token))


# The shared secret.

HS256_TOKENS: list[tuple[str, Callable[[Visitor], str], dict[str, str], set[str]]] = [
    (
        "secret",
        Visitor.token,
        {"alg": "HS256", "typ": "JWT"},
        {"iss", "aud", "id", "emailVerified"},
    ),
    (
        "secret",
        Visitor.token_in_header,
        {"alg": "HS256", "typ": "JWT"},
        {"iss", "aud", "id", "emailVerified"},
    ),
    ("route", Visitor.token_of_route, {"alg": "HS256", "typ": "JWT"}, set()),
]


@needs_node
@pytest.mark.parametrize(("mode", "take", "header", "more"), HS256_TOKENS)
def test_a_token_signed_with_the_shared_secret_drives_all_routes(
    better_auth: Auth,
    serve: Serve,
    mode: str,
    take: Callable[[Visitor], str],
    header: dict[str, str],
    more: set[str],
) -> None:
    alice = better_auth(mode).sign_up("alice")
    token = take(alice)
    assert part(token, 0) == header
    claims = part(token, 1)
    assert claims["sub"] == alice.id
    assert claims["exp"] - claims["iat"] == 15 * 60
    assert set(claims) >= {"sub", "iat", "exp", "email", "name"} | more
    assert bool(more) == ("aud" in claims)
    drive_all_routes(serve(), alice, token)


@needs_node
def test_the_plugins_hs256_token_names_the_server_as_issuer_and_audience(
    better_auth: Auth, serve: Serve
) -> None:
    server = better_auth("secret")
    alice = server.sign_up("alice")
    token = alice.token()
    trusting = serve(TASKD_ISSUER=server.url, TASKD_AUDIENCE=server.url)
    assert listed(trusting, alice, token).status_code == 200
    assert_refused(serve(TASKD_ISSUER="https://other.example"), alice, token, "iss")
    assert_refused(serve(TASKD_AUDIENCE="https://other.example"), alice, token, "aud")


NOT_LOGINS: list[tuple[str, Callable[[Visitor], str], str]] = [
    ("session token", Visitor.session_token, "not a JWT"),
    ("session token in its cookie", Visitor.session_cookie, "not a JWT"),
    ("cookie cache", Visitor.cookie_cache, "the sub claim is missing"),
    ("verification mail", Visitor.mail_token, "the sub claim is missing"),
]


@needs_node
@pytest.mark.parametrize("mode", ["jwks", "secret"])
@pytest.mark.parametrize(
    ("take", "why"), [row[1:] for row in NOT_LOGINS], ids=[row[0] for row in NOT_LOGINS]
)
def test_what_better_auth_signs_beside_logins_is_refused(
    better_auth: Auth, serve: Serve, mode: str, take: Callable[[Visitor], str], why: str
) -> None:
    server = better_auth(mode)
    alice = server.sign_up("alice")
    token = take(alice)
    if token.count(".") == 2:
        assert part(token, 0) == {"alg": "HS256"}  # with the secret that signs logins
    assert_refused(serve(**(server.settings if mode == "jwks" else {})), alice, token, why)


@needs_node
@pytest.mark.parametrize("told", ["issuer and audience", "neither"])
def test_a_session_cookie_signed_with_the_published_keys_is_refused(
    better_auth: Auth, serve: Serve, told: str
) -> None:
    """With jwt({sessionCookieCache: true}) the cookie has a `sub`; only `typ` and `aud` differ."""
    server = better_auth("jwks", "--signed-cookies")
    alice = server.sign_up("alice")
    cookie = alice.cookie_cache()
    assert part(cookie, 0)["alg"] == "EdDSA"
    assert part(cookie, 0)["typ"] == "better-auth.session-cache+jwt"
    assert part(cookie, 1)["sub"] == alice.id
    settings = (
        server.settings
        if told != "neither"
        else {"TASKD_JWKS_URL": server.settings["TASKD_JWKS_URL"]}
    )
    taskd = serve(**settings)
    assert listed(taskd, alice, alice.token()).status_code == 200
    assert_refused(taskd, alice, cookie, "")


@needs_node
def test_a_rotated_secret_signs_new_tokens_while_old_ones_go_on(
    better_auth: Auth, serve: Serve
) -> None:
    secrets = f"2:{OTHER_SECRET},1:{SECRET}"
    alice = better_auth("secret").sign_up("alice")
    bob = better_auth("secret", BETTER_AUTH_SECRETS=secrets).sign_up("bob")
    both = serve(BETTER_AUTH_SECRET="", BETTER_AUTH_SECRETS=secrets)
    drive_all_routes(both, alice, alice.token())
    drive_all_routes(both, bob, bob.token())
    # Signed with the new secret.
    assert_refused(both, bob, bob.mail_token(), "the sub claim is missing")
    assert_refused(serve(), bob, bob.token(), "the signature does not match")
    assert_refused(
        serve(BETTER_AUTH_SECRET=OTHER_SECRET), alice, alice.token(), "the signature does not match"
    )


# A start of Better Auth, and what it answers a user without and one with a second factor.
LOGINS = {
    "before": None,
    "without the old one beside": ["signed out", 200, {"secret": 200, "jwks": 500}, 200, 500, 401],
    "with the old one beside": ["signed out", 200, 200, 200, 200, 200],
    "without the old one in the list": [200, 200, 200, 200, 200, 200],
    "with quotes": None,
}


@needs_node
@pytest.mark.parametrize("mode", ["secret", "jwks"])
def test_the_rotation_of_the_page_locks_nobody_out_and_without_the_old_secret_beside_it_would(
    installed: None, mode: str
) -> None:
    command = ["node", "rotation.mjs", mode, SECRET, OTHER_SECRET]
    run = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=DEADLINE)
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert list(seen["answers"]) == list(LOGINS)
    for step, expected in LOGINS.items():
        if expected:
            statuses = [answer.partition(" ")[2] for answer in seen["answers"][step]]
            assert statuses == [
                str(one[mode] if isinstance(one, dict) else one) for one in expected
            ]
    assert "Invalid version in BETTER_AUTH_SECRETS" in seen["answers"]["with quotes"]
    if mode == "secret":
        both = Tokens(Settings(secret=SECRET, secrets=(OTHER_SECRET, SECRET)))
        new = Tokens(Settings(secret=SECRET, secrets=(OTHER_SECRET,)))
        for step, token in seen["tokens"].items():
            assert both.verify(token).id, "taskd, which was told first, takes old and new tokens"
            if not step.startswith("before"):
                assert new.verify(token).id, "and new ones when the old secret is off its list"


# The key set.


@needs_node
@pytest.mark.parametrize("secret", [SECRET, ""], ids=["beside a secret", "alone"])
def test_tokens_signed_with_better_auths_own_key_drive_all_routes_for_two_users(
    better_auth: Auth, serve: Serve, secret: str
) -> None:
    server = better_auth("jwks")
    alice, bob = server.sign_up("alice"), server.sign_up("bob")
    taskd = serve(BETTER_AUTH_SECRET=secret, **server.settings)
    for visitor, take in [(alice, Visitor.token), (bob, Visitor.token_in_header)]:
        token = take(visitor)
        assert part(token, 0).keys() == {"alg", "kid"}
        assert part(token, 0)["alg"] == "EdDSA"
        claims = part(token, 1)
        assert (claims["sub"], claims["iss"], claims["aud"]) == (visitor.id, server.url, server.url)
        drive_all_routes(taskd, visitor, token)

    task = taskd.request(
        "POST", alice.tasks(), {"title": "Alice's own"}, headers_with(alice.token())
    ).json
    bobs = headers_with(bob.token())
    assert taskd.request("GET", bob.tasks(), headers=bobs).json == []
    for method, path in [("GET", ""), ("PUT", ""), ("DELETE", ""), ("PATCH", "/complete")]:
        body = {"title": "Bob's now"} if method == "PUT" else None
        assert_problem(taskd.request(method, bob.tasks(f"/{task['id']}{path}"), body, bobs), 404)
        assert_problem(taskd.request(method, alice.tasks(f"/{task['id']}{path}"), body, bobs), 403)
    assert_problem(taskd.request("GET", alice.tasks(), headers=bobs), 403)
    assert_problem(taskd.request("POST", alice.tasks(), {"title": "From Bob"}, bobs), 403)
    assert listed(taskd, alice, alice.token()).json == [task]


@needs_node
@pytest.mark.parametrize("algorithm", ["ES256", "ES512", "RS256", "PS256"])
def test_each_other_algorithm_of_the_plugin_works(
    better_auth: Auth, serve: Serve, algorithm: str
) -> None:
    server = better_auth("jwks", algorithm)
    alice = server.sign_up("alice")
    token = alice.token()
    assert part(token, 0).keys() == {"alg", "kid"}
    assert part(token, 0)["alg"] == algorithm
    drive_all_routes(serve(**server.settings), alice, token)


@needs_node
def test_a_token_of_better_auths_own_key_is_refused_where_only_a_secret_is_set(
    better_auth: Auth, serve: Serve
) -> None:
    alice = better_auth("jwks").sign_up("alice")
    assert_refused(serve(), alice, alice.token(), "TASKD_JWKS_URL")


@needs_node
def test_a_token_of_the_shared_secret_is_refused_where_only_a_key_set_is_configured(
    better_auth: Auth, serve: Serve
) -> None:
    alice = better_auth("secret").sign_up("alice")
    taskd = serve(BETTER_AUTH_SECRET="", **better_auth("jwks").settings)
    assert_refused(taskd, alice, alice.token(), "alg must be")


@needs_node
@pytest.mark.parametrize(("variable", "why"), [("TASKD_ISSUER", "iss"), ("TASKD_AUDIENCE", "aud")])
def test_a_token_of_another_issuer_or_audience_is_refused(
    better_auth: Auth, serve: Serve, variable: str, why: str
) -> None:
    server = better_auth("jwks")
    alice = server.sign_up("alice")
    taskd = serve(**(server.settings | {variable: f"{server.url}/"}))  # one slash too many
    assert_refused(taskd, alice, alice.token(), why)


@needs_node
def test_a_token_of_another_better_auth_is_refused(better_auth: Auth, serve: Serve) -> None:
    server, other = better_auth("jwks"), better_auth("jwks", fresh=True)
    alice = other.sign_up("alice")
    taskd = serve(TASKD_JWKS_URL=server.settings["TASKD_JWKS_URL"])
    assert_refused(taskd, alice, alice.token(), "no key")


@needs_node
def test_after_a_key_rotation_new_tokens_pass_within_seconds_and_old_ones_go_on(
    better_auth: Auth, serve: Serve
) -> None:
    server = better_auth("jwks", fresh=True)
    alice = server.sign_up("alice")
    taskd = serve(**server.settings)
    bob = server.sign_up("bob")
    old, old_and_not_seen_yet = alice.token(), bob.token()
    assert listed(taskd, alice, old).status_code == 200
    kid = alice.call("POST", "/test/rotate").json["kid"]
    new = alice.token()
    assert part(new, 0)["kid"] == kid != part(old, 0)["kid"]
    until(
        lambda: listed(taskd, alice, new).status_code == 200,
        "the new key's token is accepted",
        seconds=10,
    )
    drive_all_routes(taskd, alice, new)
    assert listed(taskd, alice, old).status_code == 200
    drive_all_routes(taskd, bob, old_and_not_seen_yet)
    # The old key is still published.
    drive_all_routes(serve(fresh=True, **server.settings), alice, old)


@needs_node
def test_while_better_auth_is_away_known_keys_go_on_and_unknown_ones_are_503(
    better_auth: Auth, serve: Serve
) -> None:
    server = better_auth("jwks", fresh=True)
    alice = server.sign_up("alice")
    with_secret = better_auth("secret").sign_up("alice")
    taskd = serve(**server.settings)
    known, bob = alice.token(), server.sign_up("bob")
    not_seen_yet = bob.token()
    assert listed(taskd, alice, known).status_code == 200
    alice.call("POST", "/test/rotate")
    unknown = alice.token()
    server.end()
    assert server.wait() == 0

    answers: list[Answer] = []

    def unavailable() -> bool:
        started = time.monotonic()
        answers.append(listed(taskd, alice, unknown))
        assert time.monotonic() - started < 6
        return answers[-1].status_code == 503

    until(unavailable, "503 for a key that cannot be had", seconds=10)
    assert {answer.status_code for answer in answers} <= {401, 503}
    assert_problem(answers[-1], 503)
    assert int(answers[-1].headers["retry-after"]) >= 1
    drive_all_routes(taskd, alice, known)
    drive_all_routes(taskd, bob, not_seen_yet)

    never_reached = serve(fresh=True, **server.settings)
    assert_problem(listed(never_reached, alice, known), 503)
    local = serve(TASKD_JWKS_URL=server.settings["TASKD_JWKS_URL"])
    assert_problem(listed(local, alice, known), 503)
    drive_all_routes(local, with_secret, with_secret.token())


# A page in a browser, and docs/better-auth.md.


@needs_node
@pytest.mark.parametrize(
    ("mode", "path", "status"),
    [
        ("route", "/api/auth/token", 404),
        ("jwks", "/api/auth/token", 401),
        ("secret", "/api/auth/jwks", 404),
    ],
    ids=["no jwt plugin", "not signed in", "signed with the secret"],
)
def test_better_auth_itself_answers_as_the_page_says(
    better_auth: Auth, mode: str, path: str, status: int
) -> None:
    assert Visitor(better_auth(mode)).ask("GET", path).status_code == status


def run_page(server: BetterAuth, taskd: Process) -> subprocess.CompletedProcess[str]:
    command = ["node", "page.mjs", server.url, f"http://127.0.0.1:{taskd.port}"]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=DEADLINE)


@needs_node
def test_the_browser_code_of_the_page_works_across_origins(better_auth: Auth, serve: Serve) -> None:
    server = better_auth("jwks")
    run = run_page(server, serve(TASKD_CORS_ORIGINS=server.url, **server.settings))
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    task = seen["added"]
    assert task == new_task(task, seen["user"])
    assert seen["changed"] == task | {
        "description": "2 litres",
        "updated_at": seen["changed"]["updated_at"],
    }
    assert seen["toggled"] == seen["changed"] | {
        "completed": True,
        "updated_at": seen["toggled"]["updated_at"],
    }
    assert (seen["listed"], seen["read"], seen["removed"]) == (
        [seen["toggled"]],
        seen["toggled"],
        seen["toggled"],
    )
    assert (seen["left"], seen["refused"], seen["afterwards"]) == (
        [],
        "not signed in",
        "not signed in",
    )
    assert seen["missing"] == "Not Found: you have no task with this id"


@needs_node
def test_the_browser_code_is_shown_nothing_where_its_origin_is_not_allowed(
    better_auth: Auth, serve: Serve
) -> None:
    server = better_auth("jwks")
    run = run_page(server, serve(TASKD_CORS_ORIGINS="https://other.example", **server.settings))
    assert run.returncode == 1
    assert "TypeError: CORS" in run.stderr


def fenced(language: str) -> list[str]:
    """Return the page's code blocks in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_page_shows_the_very_files_that_these_tests_run() -> None:
    files = ["auth-jwks.mjs", "auth-secret.mjs", "auth-route.mjs", "tasks.mjs"]
    assert fenced("js") == [(HERE / name).read_text() for name in files]


def test_the_page_names_only_settings_that_exist() -> None:
    variables = {field.metadata["variable"] for field in dataclasses.fields(Settings)}
    assert set(re.findall(r"\bTASKD_[A-Z_]+\b", PAGE.read_text())) <= variables


def test_the_page_quotes_taskd_word_for_word() -> None:
    quoted = re.findall(r"^\| (?:40[13]|503|start): `(.+?)`", PAGE.read_text(), re.MULTILINE)
    assert len(quoted) >= 10
    source = (
        (ROOT / "taskd.py")
        .read_text()
        .replace("{ex.claim}", "sub")
        .replace("{ex.args[0]}", "the key set")
    )
    assert [quote for quote in quoted if quote not in source] == []


def test_the_lock_file_names_no_address_to_download_from() -> None:
    lock = json.loads((HERE / "package-lock.json").read_text())
    assert not [name for name, package in lock["packages"].items() if "resolved" in package]
    assert all(
        re.fullmatch(r"[0-9.]+", pin) for pin in lock["packages"][""]["dependencies"].values()
    )
    assert (
        lock["packages"][""]["dependencies"]
        == json.loads((HERE / "package.json").read_text())["dependencies"]
    )

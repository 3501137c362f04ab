"""Section 4 of the contract as tables: good and bad tokens, who may read what, and the settings."""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import json
import re
import time
from urllib.parse import quote

import pytest
from falcon import testing

import taskd
from support import (
    DEADLINE,
    OTHER_SECRET,
    SECRET,
    assert_problem,
    base64url,
    bearer,
    database_url,
    sign,
    token,
)

pytestmark = pytest.mark.sqlite("it is about tokens")

NOW = int(time.time())
DAY = 24 * 3600  # these tables are made long before the last test runs
HS256 = {"alg": "HS256", "typ": "JWT"}
CLAIMS = {"sub": "alice", "iat": NOW, "exp": NOW + DAY}
ROUTES = [
    ("GET", "/api/alice/tasks"),
    ("HEAD", "/api/alice/tasks"),
    ("POST", "/api/alice/tasks"),
    ("GET", "/api/alice/tasks/1"),
    ("HEAD", "/api/alice/tasks/1"),
    ("PUT", "/api/alice/tasks/1"),
    ("DELETE", "/api/alice/tasks/1"),
    ("PATCH", "/api/alice/tasks/1/complete"),
]
GOOD = sign(HS256, CLAIMS)
HEADER, PAYLOAD, SIGNATURE = GOOD.split(".")


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """An application for all tests of this file, which rejects most of their requests."""
    path = tmp_path_factory.mktemp("tokens") / "taskd.db"
    app = taskd.create_app(taskd.Settings(secret=SECRET, database_url=database_url(path)))
    app.add_route("/api/{user_id}/whoami", WhoAmI())
    client = testing.TestClient(app)
    client.simulate_post("/api/alice/tasks", headers=bearer("alice"), json={"title": "Milk"})
    yield client
    app.database.close()


class WhoAmI:
    """A resource that shows the user whom the middleware found."""

    def on_get(self, req, resp):
        user = req.context.user
        resp.media = {"id": user.id, "email": user.email, "name": user.name}


def hmac_token(header, payload, digest, secret=SECRET):
    """Return a JWS that is signed with another hash."""
    signing_input = ".".join(base64url(json.dumps(part).encode()) for part in (header, payload))
    return (
        f"{signing_input}.{base64url(hmac.digest(secret.encode(), signing_input.encode(), digest))}"
    )


def with_signature(header, payload, signature):
    parts = [base64url(json.dumps(part).encode()) for part in (header, payload)]
    return ".".join([*parts, base64url(signature)])


def of_length(length):
    """Return a good token of so many characters."""
    sizes = itertools.product(range(3), range(length * 3 // 4 - 300, length * 3 // 4))
    tokens = (sign({"alg": "HS256", "kid": "x" * kid}, claims(x="x" * size)) for kid, size in sizes)
    return next(token for token in tokens if len(token) == length)


def claims(**changes):
    """Return a good set of claims with these changes; `...` leaves one out."""
    return {name: value for name, value in (CLAIMS | changes).items() if value is not ...}


def raw(text):
    return sign(HS256, text.encode())


def raw_header(text):
    return sign(text.encode(), CLAIMS)


def authorized(good):
    return {"Authorization": f"Bearer {good}"}


def status_for(client, good, user="alice"):
    return client.simulate_get(
        f"/api/{quote(user, safe='')}/tasks", headers=authorized(good)
    ).status_code


def challenge(response):
    """Check the WWW-Authenticate header of RFC 6750 and return its error_description, or None."""
    match = re.fullmatch(
        r'Bearer realm="taskd"(?:, error="invalid_token", error_description="([^"\\]+)")?',
        response.headers["www-authenticate"],
    )
    assert match, response.headers["www-authenticate"]
    if match[1] is not None:
        assert all(" " <= character <= "~" for character in match[1])
        assert len(match[1]) < 200
    return match[1]


# --- 401: no token at all -------------------------------------------------------------------------

NO_TOKEN = {
    "nothing": None,
    "an empty header": "",
    "a space": " ",
    "the scheme alone": "Bearer",
    "the scheme and a space": "Bearer ",
    "the scheme and spaces": "Bearer     ",
    "the token alone": GOOD,
    "no space": f"Bearer{GOOD}",
    "a colon": f"Bearer:{GOOD}",
    "an equals sign": f"Bearer={GOOD}",
    "a leading word": f"x Bearer {GOOD}",
    "Basic": "Basic YWxpY2U6c2VjcmV0",
    "Basic with a JWT": f"Basic {GOOD}",
    "Digest": 'Digest username="alice"',
    "Token": f"Token {GOOD}",
    "JWT": f"JWT {GOOD}",
    "DPoP": f"DPoP {GOOD}",
    "Bearers": f"Bearers {GOOD}",
    "Bear": f"Bear {GOOD}",
    "a long s": f"Bearer\u017f {GOOD}".encode().decode("latin-1"),
    "bytes": "\xff\xfe",
}


@pytest.mark.parametrize("authorization", NO_TOKEN.values(), ids=NO_TOKEN)
def test_a_request_without_a_token_is_401_and_is_told_no_error(client, authorization):
    headers = {} if authorization is None else {"Authorization": authorization}
    for method, path in ROUTES:
        response = client.simulate_request(method, path, headers=headers)
        assert response.status_code == 401
        assert challenge(response) is None
        if method != "HEAD":
            problem = assert_problem(response, 401)
            assert problem["title"] == "Unauthorized"
            assert (
                problem["detail"]
                == "send the header Authorization: Bearer <JWT>, with the token from your login"
            )


@pytest.mark.parametrize(
    "name", ["token", "access_token", "jwt", "authorization", "Authorization", "bearer"]
)
def test_a_token_in_the_query_string_a_cookie_a_form_or_another_header_is_not_looked_at(
    client, name
):
    for options in (
        {"params": {name: GOOD}},
        {"params": {name: f"Bearer {GOOD}"}},
        {"cookies": {name: GOOD}},
        {"cookies": {"better-auth.session_token": GOOD}},
        {"headers": {"X-Authorization": f"Bearer {GOOD}", "Proxy-Authorization": f"Bearer {GOOD}"}},
        {"body": f"{name}={GOOD}", "content_type": "application/x-www-form-urlencoded"},
        {"json": {name: GOOD}},
    ):
        for method in ("GET", "POST"):
            response = client.simulate_request(method, "/api/alice/tasks", **options)
            assert_problem(response, 401)
            assert challenge(response) is None


# --- 401: bad tokens ------------------------------------------------------------------------------

FORM = {  # not a compact JWS, or bad base64url
    "one letter": "x",
    "two dots": "..",
    "three dots": "...",
    "one part": HEADER,
    "two parts": f"{HEADER}.{PAYLOAD}",
    "four parts": f"{GOOD}.{SIGNATURE}",
    "five parts": f"{GOOD}.{SIGNATURE}.{SIGNATURE}",
    "no signature": f"{HEADER}.{PAYLOAD}.",
    "no payload": f"{HEADER}..{SIGNATURE}",
    "no header": f".{PAYLOAD}.{SIGNATURE}",
    "a leading dot": f".{GOOD}",
    "a trailing dot": f"{GOOD}.",
    "signature padded": f"{GOOD}=",
    "signature padded twice": f"{GOOD}==",
    "payload padded": f"{HEADER}.{PAYLOAD}=.{SIGNATURE}",
    "header padded": f"{HEADER}=.{PAYLOAD}.{SIGNATURE}",
    "padded before signing": None,
    "plain base64": f"{HEADER}.{PAYLOAD}.{'+' + SIGNATURE[1:]}",
    "a slash": f"{HEADER}.{PAYLOAD}.{'/' + SIGNATURE[1:]}",
    "an exclamation mark": f"{HEADER}.{PAYLOAD}.{'!' + SIGNATURE[1:]}",
    "a letter too many": f"{GOOD}A",
    **{
        f"a header of {size} letters": f"{'A' * size}.{PAYLOAD}.{SIGNATURE}"
        for size in range(1, 10)
    },
    **{
        f"a payload of {size} letters": f"{HEADER}.{'A' * size}.{SIGNATURE}"
        for size in range(1, 10)
    },
    **{
        f"a signature of {size} letters": f"{HEADER}.{PAYLOAD}.{'A' * size}"
        for size in range(1, 10)
    },
    "letters": "A.A.A",
    "a letter too few": GOOD[:-1],
    "other letters for the same bytes": GOOD[:-1] + chr(ord(GOOD[-1]) + 1),
    "a space inside": f"{HEADER}. {PAYLOAD}.{SIGNATURE}",
    "a space in a part": f"{HEADER}.{PAYLOAD[:5]} {PAYLOAD[5:]}.{SIGNATURE}",
    "a tab inside": f"{HEADER}.{PAYLOAD}\t.{SIGNATURE}",
    "quotes": f'"{GOOD}"',
    "single quotes": f"'{GOOD}'",
    "angle brackets": f"<{GOOD}>",
    "a comma behind": f"{GOOD},",
    "a semicolon behind": f"{GOOD};",
    "a parameter behind": f"{GOOD}, realm=x",
    "the scheme twice": f"Bearer {GOOD}",
    "two tokens": f"{GOOD} {GOOD}",
    "two headers joined": f"{GOOD}, Bearer {GOOD}",
    "two headers joined tightly": f"{GOOD},Bearer {GOOD}",
    "two headers, one of them Basic": f"{GOOD}, Basic YWxpY2U6eA==",
    "percent-encoded": GOOD.replace(".", "%2E"),
    "in Cyrillic": "\u0435yJ".encode().decode("latin-1") + GOOD[3:],
    "bytes": "\xff\xff\xff",
    "a backslash and a quote": 'x\\"y',
    "null": "null",
    "undefined": "undefined",
    "a session token of Better Auth": (
        "Wh4BMDpjgCqfXqRdbqjOBKpSSgMnhSxB.5bdxj0fYcmCvuWfsKbPMuaVpVSkIVU2ETx8hWdXpRyM="
    ),
    "a PASETO": "v4.local." + "x" * 100,
    "a JWE": ".".join([HEADER] * 5),
    "a megabyte of letters": "x" * 1_000_000,
    "a megabyte of dots": "." * 1_000_000,
    "a megabyte in three parts": f"{HEADER}.{'x' * 1_000_000}.{SIGNATURE}",
    "a megabyte that is well signed": sign(HS256, CLAIMS | {"x": "x" * 700_000}),
    "one character more than may be": of_length(16 * 1024 + 1),
    "JSON": json.dumps({"protected": HEADER, "payload": PAYLOAD, "signature": SIGNATURE}),
}
_padded = ".".join(
    base64.urlsafe_b64encode(json.dumps(part).encode()).decode()
    for part in ({"alg": "HS256"}, CLAIMS)
)
assert "=" in _padded
FORM["padded before signing"] = (
    f"{_padded}.{base64url(hmac.digest(SECRET.encode(), _padded.encode(), hashlib.sha256))}"
)

JSON_TEXTS = [
    "",
    " ",
    "null",
    "true",
    "7",
    '"alice"',
    "[]",
    '["sub","alice"]',
    "{",
    "}",
    "{}{}",
    "{'alg':'HS256'}",
    "NaN",
]
PARTS = {  # header or payload not an object
    **{f"header {text}": raw_header(text) for text in JSON_TEXTS},
    **{f"payload {text}": raw(text) for text in JSON_TEXTS},
    "empty header": raw_header("{}"),
    "empty payload": raw("{}"),
    "header in an array": sign([HS256], CLAIMS),
    "payload in an array": sign(HS256, [CLAIMS]),
    "header of bytes": sign(b"\xff\xfe\xfd", CLAIMS),
    "payload of bytes": sign(HS256, b"\xff\xfe\xfd"),
    "header in Latin-1": sign(b'{"alg":"HS256","x":"\xe9"}', CLAIMS),
    "payload in Latin-1": sign(HS256, json.dumps(CLAIMS)[:-1].encode() + b',"x":"\xe9"}'),
    "header with text behind": sign(json.dumps(HS256).encode() + b"x", CLAIMS),
    "payload with text behind": sign(HS256, json.dumps(CLAIMS).encode() + b"x"),
    "payload nested without end": sign(HS256, b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "payload in base64 twice": sign(HS256, PAYLOAD.encode()),
    "alg twice, none first": raw_header('{"alg":"none","alg":"HS256"}'),
    "alg twice, none last": raw_header('{"alg":"HS256","alg":"none"}'),
}

NONES = ["none", "None", "NONE", "nOnE", "none ", " none", "non\u0435", "n\u200bone", "", "null"]
ALGS = {
    **{f"alg {alg!a}, no signature": with_signature({"alg": alg}, CLAIMS, b"") for alg in NONES},
    **{f"alg {alg!a}, a signature": sign({"alg": alg}, CLAIMS) for alg in NONES},
    **{
        f"alg {alg!a}, signature of nothing": with_signature({"alg": alg}, CLAIMS, b"\0")
        for alg in NONES
    },
    "HS384": hmac_token({"alg": "HS384"}, CLAIMS, hashlib.sha384),
    "HS512": hmac_token({"alg": "HS512"}, CLAIMS, hashlib.sha512),
    "HS512 signed, HS256 said": hmac_token(HS256, CLAIMS, hashlib.sha512),
    "HS256 signed, HS512 said": sign({"alg": "HS512"}, CLAIMS),
    "HS1": hmac_token({"alg": "HS1"}, CLAIMS, hashlib.sha1),
    **{
        f"{alg!a} said, HS256 signed": sign({"alg": alg}, CLAIMS)
        for alg in (
            "RS256", "RS384", "RS512", "PS256", "ES256", "ES256K", "ES512", "EdDSA", "Ed25519",
            "hs256", "Hs256", "HS256 ", "HS-256", "HMAC", "HS256\0", "HS\uff12\uff15\uff16", "dir",
            "A128KW", "x" * 5000,
        )
    },
    **{
        f"alg {json.dumps(alg)}": sign({"alg": alg}, CLAIMS)
        for alg in (None, True, 256, 0, 1.5, [], ["HS256"], ["HS256", "none"], {}, {"HS256": 1})
    },
    "alg missing": sign({"typ": "JWT"}, CLAIMS),
    "alg in the payload only": sign({"typ": "JWT"}, CLAIMS | {"alg": "HS256"}),
    "ALG": sign({"ALG": "HS256"}, CLAIMS),
    "EdDSA with a kid": with_signature({"alg": "EdDSA", "kid": "x"}, CLAIMS, b"x" * 64),
    "EdDSA without a kid": with_signature({"alg": "EdDSA"}, CLAIMS, b"x" * 64),
    "RS256 with a signature": with_signature({"alg": "RS256", "kid": "x"}, CLAIMS, b"x" * 256),
    "kid of another type": sign(HS256 | {"kid": 7}, CLAIMS),
}  # fmt: skip

OWN_KEY = "the-attackers-own-key-of-at-least-32-bytes"
OWN_JWK = {"kty": "oct", "k": base64url(OWN_KEY.encode()), "alg": "HS256"}
SIGNATURES = {
    "another secret": sign(HS256, CLAIMS, OTHER_SECRET),
    "the secret and a newline": sign(HS256, CLAIMS, SECRET + "\n"),
    "the secret in quotes": sign(HS256, CLAIMS, f'"{SECRET}"'),
    "the secret in capitals": sign(HS256, CLAIMS, SECRET.upper()),
    "the secret hashed": sign(HS256, CLAIMS, hashlib.sha256(SECRET.encode()).hexdigest()),
    "the secret in base64": sign(HS256, CLAIMS, base64.b64encode(SECRET.encode()).decode()),
    "Better Auth's public default": sign(HS256, CLAIMS, "better-auth-secret-12345678901234567890"),
    "the empty secret": sign(HS256, CLAIMS, ""),
    "zeros": with_signature(HS256, CLAIMS, b"\0" * 32),
    "a short one": with_signature(HS256, CLAIMS, b"x"),
    "a long one": with_signature(HS256, CLAIMS, b"x" * 500),
    "a truncated one": f"{HEADER}.{PAYLOAD}.{SIGNATURE[:22]}",
    "of another payload": (
        f"{HEADER}.{base64url(json.dumps(CLAIMS | {'x': 1}).encode())}.{SIGNATURE}"
    ),
    "of another header": (
        f"{base64url(json.dumps(HS256 | {'x': 1}).encode())}.{PAYLOAD}.{SIGNATURE}"
    ),
    "of the payload alone": (
        f"{HEADER}.{PAYLOAD}.{base64url(hmac.digest(SECRET.encode(), PAYLOAD.encode(), 'sha256'))}"
    ),
    "a plain hash": (
        f"{HEADER}.{PAYLOAD}.{base64url(hashlib.sha256(f'{HEADER}.{PAYLOAD}'.encode()).digest())}"
    ),
    "a jwk of one's own": sign(HS256 | {"jwk": OWN_JWK}, CLAIMS, OWN_KEY),
    "a jku of one's own": sign(
        HS256 | {"jku": "http://127.0.0.1:1/jwks", "kid": "x"}, CLAIMS, OWN_KEY
    ),
    "an x5u of one's own": sign(HS256 | {"x5u": "http://127.0.0.1:1/x"}, CLAIMS, OWN_KEY),
    "an x5c of one's own": sign(
        HS256 | {"x5c": [base64.b64encode(OWN_KEY.encode()).decode()]}, CLAIMS, OWN_KEY
    ),
    "a kid that is a path": sign(HS256 | {"kid": "../../../../dev/null"}, CLAIMS, ""),
    "a kid that is a statement": sign(
        HS256 | {"kid": f"x' UNION SELECT '{OWN_KEY}"}, CLAIMS, OWN_KEY
    ),
}

CRITS = [
    ["exp"],
    ["x"],
    [],
    ["b64"],
    ["b64", "b64"],
    ["alg"],
    ["crit"],
    ["x", "x"],
    "b64",
    "x",
    None,
    7,
    {},
    [None],
    [7],
]
EXTENSIONS = {
    **{f"crit {json.dumps(crit)}": sign(HS256 | {"crit": crit, "x": 1}, CLAIMS) for crit in CRITS},
    **{
        f"crit {json.dumps(crit)}, b64 true": sign(HS256 | {"crit": crit, "b64": True}, CLAIMS)
        for crit in CRITS
    },
    **{
        f"crit {json.dumps(crit)}, b64 false": sign(HS256 | {"crit": crit, "b64": False}, CLAIMS)
        for crit in CRITS
    },
    "crit twice": raw_header('{"alg":"HS256","crit":["x"],"crit":["b64"],"b64":true}'),
    "b64 false": sign(HS256 | {"b64": False}, CLAIMS),
    "b64 0": sign(HS256 | {"b64": 0}, CLAIMS),
    **{
        f"typ {json.dumps(typ)}": sign(HS256 | {"typ": typ}, CLAIMS)
        for typ in ("better-auth.session-cache+jwt", "jwe", "", None, 7, ["JWT"])
    },
    "b64 false, payload as it is": None,
    "b64 false, payload detached": None,
}
_b64 = base64url(json.dumps({"alg": "HS256", "b64": False, "crit": ["b64"]}).encode())
_plain = json.dumps(CLAIMS)
_signature = base64url(hmac.digest(SECRET.encode(), f"{_b64}.{_plain}".encode(), "sha256"))
EXTENSIONS["b64 false, payload as it is"] = f"{_b64}.{_plain}.{_signature}"
EXTENSIONS["b64 false, payload detached"] = f"{_b64}..{_signature}"


def numeric(name, text):
    """Return a well-signed token in which a claim is written as this text."""
    others = json.dumps({key: value for key, value in CLAIMS.items() if key != name})[1:-1]
    return raw(f'{{{others},"{name}":{text}}}')


NO_NUMBERS = [
    "null", "true", "false", '"soon"', '""', '"never"', f'"{NOW + 900}"', f'"{NOW - 900}"',
    f'"{NOW + 900}.0"', "[]", "{}", f"[{NOW + 900}]", "NaN", "Infinity", "-Infinity", "1e999",
    "-1e999", '"Infinity"', '"2099-01-01T00:00:00Z"',
]  # fmt: skip
TIMES = {
    **{f"exp {text}": numeric("exp", text) for text in NO_NUMBERS},
    **{f"nbf {text}": numeric("nbf", text) for text in NO_NUMBERS if text != f'"{NOW + 900}"'},
    **{f"iat {text}": numeric("iat", text) for text in NO_NUMBERS if text != f'"{NOW + 900}"'},
    "exp missing": sign(HS256, claims(exp=...)),
    "Exp": sign(HS256, claims(exp=..., Exp=NOW + 900)),
    "expires": sign(HS256, claims(exp=..., expires=NOW + 900, expiresAt=NOW + 900)),
    "exp past": sign(HS256, claims(exp=NOW - 15)),
    "exp long past": sign(HS256, claims(exp=NOW - 10**9)),
    "exp 0": sign(HS256, claims(exp=0)),
    "exp -1": sign(HS256, claims(exp=-1)),
    "exp 1.5": sign(HS256, claims(exp=1.5)),
    "exp -1e308": sign(HS256, claims(exp=-1e308)),
    "exp hugely negative": numeric("exp", "-" + "9" * 400),
    "exp of 5000 digits": numeric("exp", "9" * 5000),
    "nbf tomorrow": sign(HS256, claims(nbf=NOW + DAY)),
    "nbf in a million years": sign(HS256, claims(nbf=NOW + 3 * 10**13)),
    "nbf 1e308": sign(HS256, claims(nbf=1e308)),
    "nbf in milliseconds": sign(HS256, claims(nbf=NOW * 1000)),
    "iat tomorrow": sign(HS256, claims(iat=NOW + DAY)),
    "iat in milliseconds": sign(HS256, claims(iat=NOW * 1000)),
    "iat 1e308": sign(HS256, claims(iat=1e308)),
    "iat hugely large": numeric("iat", "9" * 400),
}

SUBJECTS = {
    "sub missing": sign(HS256, claims(sub=...)),
    **{
        f"sub {json.dumps(sub)}": sign(HS256, claims(sub=sub))
        for sub in (
            None, "", 7, 0, 1.5, True, False, [], ["alice"], {}, {"id": "alice"}, "\ud800",
            "alice\udfff", "\udc00\ud800",
        )
    },
    "sub of a raw surrogate": sign(HS256, b'{"sub":"\xed\xa0\x80","exp":9999999999}'),
    "Sub": sign(HS256, claims(sub=..., Sub="alice", SUB="alice")),
    "userId and email, as in a mail link": sign(
        HS256, claims(sub=..., userId="alice", email="alice@example.com")
    ),
    "user_id": sign(HS256, claims(sub=..., user_id="alice", id="alice", uid="alice", name="alice")),
    "a session cookie": sign(
        HS256, claims(sub=..., session={"userId": "alice"}, user={"id": "alice", "sub": "alice"})
    ),
    "sub in the header": sign(HS256 | {"sub": "alice"}, claims(sub=...)),
    "sub with a space in its name": sign(HS256, claims(sub=...) | {"sub ": "alice"}),
}  # fmt: skip

BAD_TOKENS = {
    f"{kind}: {name}"[:70]: bad
    for kind, table in {
        "form": FORM, "parts": PARTS, "alg": ALGS, "signature": SIGNATURES, "extension": EXTENSIONS,
        "time": TIMES, "subject": SUBJECTS,
    }.items()
    for name, bad in table.items()
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_a_bad_token_is_401_on_every_route_and_is_told_why(client, name):
    for method, path in ROUTES:
        response = client.simulate_request(method, path, headers=authorized(BAD_TOKENS[name]))
        assert response.status_code == 401, response.text
        why = challenge(response)
        assert why
        if method != "HEAD":
            problem = assert_problem(response, 401)
            assert problem["title"] == "Unauthorized"
            assert problem["detail"] == why


@pytest.mark.both_engines
def test_no_bad_token_did_anything(client):
    for bad in BAD_TOKENS.values():
        response = client.simulate_post(
            "/api/alice/tasks", headers=authorized(bad), json={"title": "x"}
        )
        assert_problem(response, 401)
    tasks = client.simulate_get("/api/alice/tasks", headers=authorized(GOOD)).json
    assert [task["title"] for task in tasks] == ["Milk"]


def test_neither_the_token_nor_the_secret_is_in_a_401(client):
    for bad in BAD_TOKENS.values():
        response = client.simulate_get("/api/alice/tasks", headers=authorized(bad))
        for part in [part for part in bad.split(".") if len(part) > 10]:
            assert part not in response.text + str(response.headers)
        assert SECRET not in response.text + str(response.headers)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (TIMES["exp past"], "expired"),
        (TIMES["exp missing"], "exp"),
        (TIMES["nbf tomorrow"], "nbf"),
        (TIMES["iat tomorrow"], "iat"),
        (SUBJECTS["sub missing"], "sub"),
        (SIGNATURES["another secret"], "signature"),
        (ALGS["HS512"], "alg must be HS256"),
        (ALGS["alg 'none', no signature"], "alg must be HS256"),
        (FORM["no signature"], "the signature does not match"),
        (EXTENSIONS['crit ["x"]'], "crit"),
        (SUBJECTS['sub ""'], "sub"),
        (EXTENSIONS["typ 7"], "the header's typ, kid, crit or b64 is not that of a login token"),
        (
            FORM["null"],
            "this is not a JWT: three base64url parts with dots, in one Authorization header",
        ),
        (
            FORM["a session token of Better Auth"],
            "this is not a JWT but perhaps a session token; get a JWT from /api/auth/token",
        ),
        (FORM["one character more than may be"], "the token is longer than 16384 characters"),
        (PARTS["header null"], "the token is malformed"),
        (token("alice", exp=[]), "or its exp, nbf or iat is not a number"),
        (token("alice", nbf="x"), "or its exp, nbf or iat is not a number"),
        (token("alice", iat="x"), "or its exp, nbf or iat is not a number"),
    ],
)
def test_the_reason_names_what_is_wrong(client, bad, reason):
    response = client.simulate_get("/api/alice/tasks", headers=authorized(bad))
    assert reason in challenge(response)
    assert reason in response.json["detail"]


def test_a_token_that_passed_is_refused_once_it_has_expired(client):
    # About a second of the leeway is left.
    exp, deadline = int(time.time() - 8.5), time.time() + DEADLINE
    short = sign(HS256, claims(exp=exp))
    assert status_for(client, short) == 200
    while status_for(client, short) == 200 and time.time() < deadline:
        time.sleep(0.01)
    assert time.time() >= exp + 10
    response = client.simulate_get("/api/alice/tasks", headers=authorized(short))
    assert_problem(response, 401)
    assert "expired" in challenge(response)


def test_a_good_token_does_not_make_a_changed_one_pass_nor_the_other_way_round(client):
    for _ in range(3):
        assert status_for(client, GOOD) == 200
        assert status_for(client, SIGNATURES["another secret"]) == 401
        assert status_for(client, f"{HEADER}.{PAYLOAD}.{SIGNATURE[:-1]}") == 401
        assert status_for(client, GOOD, user="bob") == 403


def test_a_rejected_token_is_rejected_again_for_the_same_reason(client):
    bad = [SIGNATURES["another secret"], sign(HS256, claims(exp=NOW - 60)), FORM["two parts"]]
    headers = [authorized(token) for token in bad]
    first, second = (
        [client.simulate_get("/api/alice/tasks", headers=one) for one in headers] for _ in range(2)
    )
    assert {response.status_code for response in first + second} == {401}
    assert [challenge(one) for one in first] == [challenge(one) for one in second]
    assert len({challenge(one) for one in first}) == len(bad)
    assert status_for(client, GOOD) == 200


@pytest.mark.slow
def test_a_token_that_was_rejected_because_it_is_not_valid_yet_passes_as_soon_as_it_is(client):
    # It is one to two seconds too early.
    nbf, deadline = int(time.time()) + 12, time.time() + DEADLINE
    early = sign(HS256, claims(nbf=nbf))
    assert status_for(client, early) == 401
    while status_for(client, early) == 401 and time.time() < deadline:
        time.sleep(0.01)
    assert nbf - 10 <= time.time() < nbf - 10 + 5
    assert status_for(client, early) == 200


def test_many_rejected_tokens_are_forgotten_and_each_is_still_rejected():
    tokens = taskd.Tokens(taskd.Settings(secret=SECRET))
    for number in range(1000):
        with pytest.raises(taskd.TokenError):
            tokens.verify(f"{GOOD[:-6]}{number:06}")
        assert len(tokens._rejected) <= 200
    assert tokens.verify(GOOD).id == "alice"


# --- Good tokens ----------------------------------------------------------------------------------

GOOD_TOKENS = {
    "the smallest": sign({"alg": "HS256"}, {"sub": "alice", "exp": NOW + DAY}),
    "one of Better Auth's": token("alice", exp=NOW + DAY),
    "with its jwt() claims": token(
        exp=NOW + DAY, id="x", createdAt="x", emailVerified=True, iss="http://a", aud="http://a"
    ),
    "aud": sign(HS256, claims(aud="someone else")),
    "aud as a list": sign(HS256, claims(aud=["a", "b"])),
    "aud as nonsense": sign(HS256, claims(aud=7)),
    "iss": sign(HS256, claims(iss="https://anyone.example")),
    "typ at+jwt": sign({"alg": "HS256", "typ": "at+jwt"}, CLAIMS),
    "typ application/at+jwt": sign({"alg": "HS256", "typ": "application/at+jwt"}, CLAIMS),
    "typ application/JWT": sign({"alg": "HS256", "typ": "application/JWT"}, CLAIMS),
    "typ in small letters": sign({"alg": "HS256", "typ": "jwt"}, CLAIMS),
    "typ missing": sign({"alg": "HS256"}, CLAIMS),
    "as long as may be": of_length(16 * 1024),
    "kid": sign(HS256 | {"kid": "any"}, CLAIMS),
    "jwk, well signed all the same": sign(HS256 | {"jwk": OWN_JWK}, CLAIMS),
    "jku, well signed all the same": sign(
        HS256 | {"jku": "http://127.0.0.1:1/", "x5u": "http://127.0.0.1:1/"}, CLAIMS
    ),
    "exp in a year": sign(HS256, claims(exp=NOW + 365 * DAY)),
    "exp as a float": sign(HS256, claims(exp=NOW + DAY + 0.5)),
    "exp in scientific notation": numeric("exp", "4e9"),
    "exp in the year 10000": sign(HS256, claims(exp=253402300800)),
    "exp 2^63": sign(HS256, claims(exp=2**63)),
    "exp 1e308": sign(HS256, claims(exp=1e308)),
    "exp of 400 digits": numeric("exp", "9" * 400),
    "iat long ago": sign(HS256, claims(iat=0)),
    "iat missing": sign(HS256, claims(iat=...)),
    "nbf now": sign(HS256, claims(nbf=NOW)),
    "nbf as a float": sign(HS256, claims(nbf=NOW - 0.5)),
    "nbf negative": sign(HS256, claims(nbf=-1)),
    "other claims of any kind": sign(
        HS256, claims(scope=["a"], role=None, x={"y": [1, 2.5, True, "\u05d0\0"]})
    ),
    "white space in the JSON": sign(
        b' {\n"alg" : "HS256" }\t', json.dumps(CLAIMS, indent=4).encode()
    ),
    "ten kilobytes": sign(HS256, claims(x="x" * 8000)),
}


@pytest.mark.parametrize("name", GOOD_TOKENS)
def test_a_good_token_passes(client, name):
    assert status_for(client, GOOD_TOKENS[name]) == 200


@pytest.mark.parametrize("seconds", [0, 1, 5, 8])
def test_clocks_may_differ_by_ten_seconds(client, seconds):
    now = int(time.time())
    assert status_for(client, sign(HS256, claims(exp=now - seconds))) == 200
    assert status_for(client, sign(HS256, claims(nbf=now + seconds))) == 200
    assert status_for(client, sign(HS256, claims(iat=now + seconds))) == 200


@pytest.mark.parametrize("seconds", [20, 60, 3600])
def test_clocks_may_differ_by_no_more(client, seconds):
    now = int(time.time())
    assert status_for(client, sign(HS256, claims(exp=now - seconds))) == 401
    assert status_for(client, sign(HS256, claims(nbf=now + seconds))) == 401
    assert status_for(client, sign(HS256, claims(iat=now + seconds))) == 401


def test_a_token_is_known_when_it_was_verified_and_as_long_as_it_is_valid(app, monkeypatch):
    good, bad = token("alice"), token("alice", secret="x" * 32)
    assert app.tokens.known(good) is None, "no turn is taken before it is verified"
    assert app.tokens.verify(good) == app.tokens.known(good)
    with pytest.raises(taskd.TokenError):
        app.tokens.verify(bad)
    assert app.tokens.known(bad) is None
    later = time.time() + 2 * 24 * 3600
    monkeypatch.setattr(time, "time", lambda: later)
    assert app.tokens.known(good) is None


@pytest.mark.parametrize("other", [{"jti": 1}, {"jti": None}, {"jti": ""}, {"nonce": []}])
def test_a_claim_that_taskd_does_not_use_may_be_anything(client, other):
    assert status_for(client, sign(HS256, claims(**other))) == 200


@pytest.mark.parametrize(
    "prefix", ["Bearer ", "bearer ", "BEARER ", "bEaReR ", "Bearer  ", "Bearer      "]
)
def test_the_scheme_is_case_insensitive_and_spaces_do_not_matter(client, prefix):
    for suffix in ("", " ", "   "):
        extras = {
            "HTTP_AUTHORIZATION": f"{prefix}{GOOD}{suffix}"
        }  # falcon's client would strip a header
        response = client.simulate_get("/api/alice/tasks", extras=extras)
        assert response.status_code == 200


@pytest.mark.parametrize("value", [f"Bearer \t{GOOD}", f"Bearer {GOOD}\t", f"Bearer\t{GOOD}"])
def test_other_white_space_after_the_scheme_is_401(client, value):
    assert (
        client.simulate_get("/api/alice/tasks", extras={"HTTP_AUTHORIZATION": value}).status_code
        == 401
    )


@pytest.mark.parametrize(
    ("email", "name", "seen"),
    [
        ("a@example.com", "Alice \u05d0", {"email": "a@example.com", "name": "Alice \u05d0"}),
        (None, None, {"email": None, "name": None}),
        (7, ["Alice"], {"email": None, "name": None}),
        ("", "", {"email": "", "name": ""}),
    ],
)
def test_the_user_is_on_the_request_context(client, email, name, seen):
    good = sign(HS256, claims(email=email, name=name, userId="bob", id="bob"))
    response = client.simulate_get("/api/alice/whoami", headers=authorized(good))
    assert response.json == {"id": "alice"} | seen


# JSON, more or less, in a header and in a payload: to reject or to accept, but never with a 500.
STRANGE = [
    f'{{"alg":"HS256","sub":"alice","exp":{NOW + DAY},"x":{value}}}'.encode()
    for value in (
        "NaN", "-Infinity", "1e999", "9" * 5000, "1" * 4300, "1." + "0" * 5000, '"\\ud800"',
        '"\\u0000"', '"\x00"', "01",
        *("[" * depth + "]" * depth for depth in (100, 300, 900, 980, 990, 1000, 1100, 3000, 5000)),
        *('{"a":' * depth + "1" + "}" * depth for depth in (300, 990, 1000, 2000)),
    )
]  # fmt: skip
STRANGE += [
    json.dumps(CLAIMS | HS256).encode(coding) for coding in ("utf-16", "utf-32", "utf-8-sig")
]
STRANGE += [
    b'{"alg":"HS256","\\ud800":1}',
    b'{"alg":"HS256","\xed\xa0\x80":1}',
    b'{"alg":"HS256","":{"":[]}}',
]


@pytest.mark.parametrize("text", STRANGE)
def test_strange_json_in_a_token_is_never_our_fault(client, text):
    for strange in (
        sign(text, CLAIMS),
        sign(HS256, text),
        sign(text, text),
        f"{base64url(text)}.x.x",
    ):
        response = client.simulate_get("/api/alice/tasks", headers=authorized(strange))
        if response.status_code != 200:
            assert_problem(response, 401)
            assert challenge(response)


# --- 403: another user's URL ----------------------------------------------------------------------

OTHERS = [  # (the token's sub, the user id in the URL, percent-encoded)
    ("alice", "bob"),
    ("alice", "Alice"),
    ("alice", "ALICE"),
    ("alice", "alic"),
    ("alice", "alicee"),
    ("alice", "alice%20"),
    ("alice", "%20alice"),
    ("alice", "alice%09"),
    ("alice", "alice%0A"),
    ("alice", "alice%00"),
    ("alice", "%00"),
    ("alice", "alice%00x"),
    ("alice", "%2561lice"),
    ("alice", "*"),
    ("alice", "%25"),
    ("alice", "_____"),
    ("alice", "."),
    ("alice", ".."),
    ("alice", "me"),
    ("alice", "alice;x=1"),
    ("alice", "alice,bob"),
    ("alice", "alice'--"),
    ("alice", "%EF%BD%81lice"),  # a fullwidth a
    ("alice", "%D0%B0lice"),  # a Cyrillic a
    ("alice", "alice%E2%80%8B"),  # a zero-width space
    ("alice", "alice%E2%80%AE"),  # right to left from here
    ("alice ", "alice"),
    ("alice\n", "alice"),
    ("\u00e9", "e%CC%81"),  # composed and decomposed
    ("e\u0301", "%C3%A9"),
    ("\u00e9", "%E9"),  # Latin-1
    ("\ufffd", "%FF"),  # bytes that are not UTF-8 are not a user id
    ("\ufffd", "%ED%A0%80"),
    ("\u212b", "%C3%85"),  # Angstrom sign, A with ring
    ("\ufb01", "fi"),  # a ligature
    ("\u0131", "i"),  # a dotless i
    ("\u212a", "k"),  # Kelvin
    ("\u00df", "ss"),
    ("\u1e9e", "%C3%9F"),
    ("100%", "100%2525"),
    ("100%25", "100%25"),
    ("%61lice", "alice"),
    ("a b", "a+b"),
    ("a+b", "a%20b"),
    ("1", "01"),
    ("1", "+1"),
    ("1", "1.0"),
    ("1", "%EF%BC%91"),
    ("0", ""),
    ("alice", ""),
    ("None", ""),
    ("null", "None"),
    ("{user_id}", "alice"),
    ("6f0f3c9e-8f1c-4a7e-9b43-0b6a4c3d2e1f", "6F0F3C9E-8F1C-4A7E-9B43-0B6A4C3D2E1F"),
    ("6f0f3c9e-8f1c-4a7e-9b43-0b6a4c3d2e1f", "6f0f3c9e8f1c4a7e9b430b6a4c3d2e1f"),
]
SAME = [
    ("alice", "alice"),
    ("alice", "%61%6c%69%63%65"),
    ("1", "1"),
    ("6f0f3c9e-8f1c-4a7e-9b43-0b6a4c3d2e1f", "6f0f3c9e-8f1c-4a7e-9b43-0b6a4c3d2e1f"),
    ("kUxQ3bGzF0mVwYtR9sLpJdHnCaE7oIvX", "kUxQ3bGzF0mVwYtR9sLpJdHnCaE7oIvX"),
    ("\u00e9", "%C3%A9"),
    ("\u00e9", "%c3%a9"),
    ("e\u0301", "e%CC%81"),
    ("100%", "100%25"),
    ("100%25", "100%2525"),
    ("a b", "a%20b"),
    ("a+b", "a+b"),
    ("a+b", "a%2Bb"),
    (" ", "%20"),
    ("\u202ealice\u05d0", "%E2%80%AEalice%D7%90"),
    ("\U0001f600", "%F0%9F%98%80"),
    ("\ufffd", "%EF%BF%BD"),
    ("tasks", "tasks"),
    ("..", ".."),
    ("a?b#c", "a%3Fb%23c"),
    ("{user_id}", "%7Buser_id%7D"),
    ("x" * 1000, "x" * 1000),
    ("'; DROP TABLE task; --", "%27%3B%20DROP%20TABLE%20task%3B%20--"),
]


@pytest.mark.parametrize(("subject", "user"), OTHERS)
def test_a_token_is_403_where_the_url_is_another_users_code_point_for_code_point(
    client, subject, user
):
    headers = authorized(sign(HS256, claims(sub=subject)))
    path = f"/api/{user}/tasks"
    for method, suffix in [
        ("GET", ""),
        ("POST", ""),
        ("GET", "/1"),
        ("PUT", "/1"),
        ("DELETE", "/1"),
    ]:
        response = simulate(client, method, path + suffix, headers)
        problem = assert_problem(response, 403)
        assert problem["title"] == "Forbidden"
        assert (
            problem["detail"] == "this token is not for the user in the URL; use your own user id"
        )
        assert "www-authenticate" not in response.headers
    assert_problem(simulate(client, "PATCH", f"{path}/1/complete", headers), 403)
    assert simulate(client, "HEAD", path, headers).status_code == 403
    assert_problem(simulate(client, "GET", path, {}), 401)


@pytest.mark.both_engines
@pytest.mark.parametrize(("subject", "user"), SAME)
def test_a_token_passes_where_the_url_is_its_users_and_the_tasks_are_theirs(client, subject, user):
    headers = authorized(sign(HS256, claims(sub=subject)))
    path = f"/api/{user}/tasks"
    task = simulate(client, "POST", path, headers, {"title": "x"}).json
    assert task["user_id"] == subject
    listed = simulate(client, "GET", path, headers).json
    assert {one["user_id"] for one in listed} == {subject}
    assert simulate(client, "DELETE", f"{path}/{task['id']}", headers).json == task


@pytest.mark.parametrize("rest", ["tasks", "tasks/", "tasks?q=%2F", "tasks/?q=/"])
@pytest.mark.parametrize(
    ("user", "subject"),
    [
        ("a%2fb", "a/b"),
        ("a%2Fb", "a/b"),
        ("%61%2F%62", "a/b"),
        ("a+b%2Fc", "a+b/c"),
        ("alice", "alice"),
    ],
)
@pytest.mark.parametrize("variable", ["REQUEST_URI", "RAW_URI"])  # of taskd and uWSGI; of gunicorn
def test_a_slash_is_part_of_a_user_id_where_it_is_encoded_and_only_there(
    client, user, subject, rest, variable
):
    sent, decoded = f"/api/{user}/{rest}", f"/api/{subject}/{rest.partition('?')[0]}"
    headers = authorized(sign(HS256, claims(sub=subject)))
    extras = {variable: sent, "PATH_INFO": decoded, "QUERY_STRING": rest.partition("?")[2]}
    assert client.simulate_get("/x", headers=headers, extras=extras).status_code == 200


def simulate(client, method, path, headers, body=None):
    """Send a request whose path is percent-decoded byte by byte, as in WSGI."""
    decoded = re.sub(r"%([0-9A-Fa-f]{2})", lambda code: chr(int(code[1], 16)), path)
    content = json.dumps(body).encode() if body else b""
    return client.simulate_request(
        method,
        "/x",
        headers=headers,
        body=content,
        content_type="application/json",
        extras={"PATH_INFO": decoded},
    )


@pytest.mark.both_engines
def test_users_whose_names_differ_in_nothing_that_sorts_are_kept_apart(client):
    users = [
        "u",
        "U",
        "u ",
        " u",
        "u\x01",
        "u\x01a",
        "u\x01b",
        "\u00fc",
        "u\u0308",
        "\uff55",
        "u%",
        "u_",
        "1",
        "1.0",
        "01",
        "1e0",
    ]
    tasks = {}
    for user in users:
        headers = authorized(sign(HS256, claims(sub=user)))
        tasks[user] = simulate(
            client, "POST", f"/api/{quote(user, safe='')}/tasks", headers, {"title": "x"}
        ).json
    for user in users:
        headers = authorized(sign(HS256, claims(sub=user)))
        assert simulate(client, "GET", f"/api/{quote(user, safe='')}/tasks", headers).json == [
            tasks[user]
        ]


# --- The order of checks --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "options"),
    [
        ("GET", "/api/bob/tasks/0", {}),
        ("GET", "/api/bob/tasks/x", {}),
        ("GET", "/api/bob/tasks/99", {}),
        ("GET", "/api//tasks", {}),
        ("GET", "/api/%00/tasks", {}),
        ("POST", "/api/bob/tasks", {}),
        ("POST", "/api/bob/tasks", {"body": b"{", "content_type": "application/json"}),
        ("POST", "/api/bob/tasks", {"body": b"x", "content_type": "text/plain"}),
        ("POST", "/api/bob/tasks", {"body": b"x" * 100_000}),
        ("POST", "/api/bob/tasks", {"json": {"titel": 5}}),
        ("PUT", "/api/bob/tasks/x", {"json": []}),
        ("PATCH", "/api/bob/tasks/x/complete", {"json": {"completed": 5}}),
        ("DELETE", "/api/bob/tasks/-1", {}),
        ("DELETE", "/api/bob/tasks", {}),
        ("PUT", "/api/bob/tasks", {}),
        ("POST", "/api/bob/tasks/1", {}),
        ("GET", "/api/bob/tasks/1/complete", {}),
        ("TRACE", "/api/bob/tasks", {}),
        ("BREW", "/api/bob/tasks", {}),
    ],
)
def test_401_comes_before_everything_and_403_before_all_but_401(client, method, path, options):
    assert_problem(client.simulate_request(method, path, **options), 401)
    for bad in (SIGNATURES["another secret"], TIMES["exp past"], "x"):
        assert_problem(
            client.simulate_request(method, path, headers=authorized(bad), **options), 401
        )
    assert_problem(client.simulate_request(method, path, headers=authorized(GOOD), **options), 403)


def test_a_token_of_bob_does_not_pass_for_alice_even_if_it_is_bad_in_two_ways(client):
    response = client.simulate_get(
        "/api/alice/tasks", headers=authorized(sign(HS256, claims(sub="bob", exp=1)))
    )
    assert_problem(response, 401)


# --- Issuer, audience, rotation -------------------------------------------------------------------

ISSUER, AUDIENCE = "https://auth.example", "https://tasks.example"


@pytest.mark.parametrize(
    ("configured", "changes", "status"),
    [
        ({"issuer": ISSUER}, {"iss": ISSUER}, 200),
        ({"issuer": ISSUER}, {"iss": ISSUER, "aud": "anything"}, 200),
        ({"issuer": ISSUER}, {}, 401),
        ({"issuer": ISSUER}, {"iss": None}, 401),
        ({"issuer": ISSUER}, {"iss": ""}, 401),
        ({"issuer": ISSUER}, {"iss": f"{ISSUER}/"}, 401),
        ({"issuer": ISSUER}, {"iss": ISSUER.upper()}, 401),
        ({"issuer": ISSUER}, {"iss": "https"}, 401),
        ({"issuer": ISSUER}, {"iss": [ISSUER]}, 401),
        ({"issuer": ISSUER}, {"iss": {ISSUER: 1}}, 401),
        ({"issuer": ISSUER}, {"iss": 7}, 401),
        ({"issuer": ISSUER}, {"aud": ISSUER}, 401),
        ({"audience": AUDIENCE}, {"aud": AUDIENCE}, 200),
        ({"audience": AUDIENCE}, {"aud": AUDIENCE, "iss": "anything"}, 200),
        ({"audience": AUDIENCE}, {"aud": [AUDIENCE]}, 200),
        ({"audience": AUDIENCE}, {"aud": ["x", AUDIENCE]}, 200),
        ({"audience": AUDIENCE}, {}, 401),
        ({"audience": AUDIENCE}, {"aud": None}, 401),
        ({"audience": AUDIENCE}, {"aud": ""}, 401),
        ({"audience": AUDIENCE}, {"aud": []}, 401),
        ({"audience": AUDIENCE}, {"aud": ["x", "y"]}, 401),
        ({"audience": AUDIENCE}, {"aud": AUDIENCE[:-1]}, 401),
        ({"audience": AUDIENCE}, {"aud": AUDIENCE + "/"}, 401),
        ({"audience": AUDIENCE}, {"aud": [7, AUDIENCE]}, 401),
        ({"audience": AUDIENCE}, {"aud": {AUDIENCE: 1}}, 401),
        ({"audience": AUDIENCE}, {"aud": 7}, 401),
        ({"audience": AUDIENCE}, {"iss": AUDIENCE}, 401),
        ({"issuer": ISSUER, "audience": AUDIENCE}, {"iss": ISSUER, "aud": AUDIENCE}, 200),
        ({"issuer": ISSUER, "audience": AUDIENCE}, {"iss": ISSUER}, 401),
        ({"issuer": ISSUER, "audience": AUDIENCE}, {"aud": AUDIENCE}, 401),
        ({"issuer": ISSUER, "audience": AUDIENCE}, {"iss": AUDIENCE, "aud": ISSUER}, 401),
    ],
)
def test_iss_and_aud_are_checked_when_they_are_configured(make_app, configured, changes, status):
    client = testing.TestClient(make_app(**configured))
    response = client.simulate_get(
        "/api/alice/tasks", headers=authorized(sign(HS256, claims(**changes)))
    )
    assert response.status_code == status
    if status == 401:
        assert_problem(response, 401)
        assert re.search("iss|aud", challenge(response))


NEWEST, NEW, OLD = (
    f"{age}-secret-for-the-tests-of-32-bytes-or-more" for age in ("newest", "new", "old")
)


@pytest.mark.parametrize(
    ("secret", "changes", "status"),
    [
        (NEWEST, {}, 200),
        (NEW, {}, 200),
        (OLD, {}, 200),
        (SECRET, {}, 401),
        (OTHER_SECRET, {}, 401),
        (f"2:{NEW}", {}, 401),
        (f"3:{NEWEST},2:{NEW},1:{OLD}", {}, 401),
        (NEWEST, {"exp": NOW - 60}, 401),
        (NEW, {"exp": NOW - 60}, 401),
        (OLD, {"exp": NOW - 60}, 401),
        (OLD, {"nbf": NOW + DAY}, 401),
        (OLD, {"sub": ""}, 401),
        (OLD, {"exp": ...}, 401),
    ],
)
def test_every_listed_secret_verifies_and_nothing_else_is_forgiven(
    make_app, tmp_path, secret, changes, status
):
    environ = {"BETTER_AUTH_SECRET": SECRET, "BETTER_AUTH_SECRETS": f"3:{NEWEST},2:{NEW},1:{OLD}"}
    settings = taskd.Settings.load(environ, tmp_path / "none.env")
    client = testing.TestClient(make_app(secret=settings.secret, secrets=settings.secrets))
    response = client.simulate_get(
        "/api/alice/tasks", headers=authorized(sign(HS256, claims(**changes), secret))
    )
    assert response.status_code == status
    if changes.get("exp") == NOW - 60:
        assert "expired" in challenge(response)


@pytest.mark.parametrize("secret", [OLD, NEWEST])
@pytest.mark.parametrize(
    ("claim", "seconds", "status"),
    [
        ("exp", -4, 200),
        ("exp", -20, 401),
        ("nbf", 4, 200),
        ("nbf", 20, 401),
        ("iat", 4, 200),
        ("iat", 20, 401),
    ],
)
def test_the_clocks_of_taskd_and_the_issuer_may_differ_by_ten_seconds(
    make_app, secret, claim, seconds, status
):
    client = testing.TestClient(make_app(secret=SECRET, secrets=(NEWEST, OLD)))
    token = sign(HS256, claims(**{claim: int(time.time()) + seconds}), secret)
    for _ in range(2):  # the second time from the cache
        assert status_for(client, token) == status


def test_the_first_of_the_secrets_signs():
    tokens = taskd.Tokens(taskd.Settings(secret=SECRET, secrets=(NEWEST, NEW, OLD)))
    minted = tokens.mint(CLAIMS)
    signing_input, _, signature = minted.rpartition(".")
    assert signature == base64url(hmac.digest(NEWEST.encode(), signing_input.encode(), "sha256"))
    assert tokens.verify(minted).id == "alice"


def test_the_secret_is_taken_as_utf_8(make_app):
    secret = "gehe\u00edmn\u012bs-\U0001f511-" + "x" * 20
    client = testing.TestClient(make_app(secret=secret))
    assert status_for(client, sign(HS256, CLAIMS, secret)) == 200


# --- Settings -------------------------------------------------------------------------------------

DEFAULTS = {
    "secret": None, "secrets": (), "database_url": "sqlite:///taskd.db", "host": "127.0.0.1",
    "port": 8000, "cors_origins": (), "issuer": None, "audience": None, "log_level": "info",
}  # fmt: skip
GOOD_SETTINGS = [
    ("BETTER_AUTH_SECRET", SECRET, {"secret": SECRET}),
    ("BETTER_AUTH_SECRET", "x" * 32, {"secret": "x" * 32}),
    ("BETTER_AUTH_SECRET", "\u00e9" * 16, {"secret": "\u00e9" * 16}),
    ("BETTER_AUTH_SECRET", " $HOME ${HOME} '\"#\\n" * 3, {"secret": " $HOME ${HOME} '\"#\\n" * 3}),
    ("BETTER_AUTH_SECRETS", f"1:{OLD}", {"secrets": (OLD,)}),
    ("BETTER_AUTH_SECRETS", f"2:{NEW},1:{OLD}", {"secrets": (NEW, OLD)}),
    ("BETTER_AUTH_SECRETS", f"1:{OLD}, 2:{NEW}", {"secrets": (OLD, NEW)}),
    ("BETTER_AUTH_SECRETS", f"2:{NEW}:with:colons,0:{OLD}",
     {"secrets": (f"{NEW}:with:colons", OLD)}),
    ("DATABASE_URL", "sqlite:///x.db", {"database_url": "sqlite:///x.db", "database": "x.db"}),
    ("DATABASE_URL", "sqlite:////var/lib/x.db", {"database": "/var/lib/x.db"}),
    ("DATABASE_URL", "sqlite:///data/my tasks.db", {"database": "data/my tasks.db"}),
    ("TASKD_HOST", "0.0.0.0", {"host": "0.0.0.0"}),
    ("TASKD_HOST", "::1", {"host": "::1"}),
    ("TASKD_HOST", "localhost", {"host": "localhost"}),
    ("TASKD_PORT", "0", {"port": 0}),
    ("TASKD_PORT", "80", {"port": 80}),
    ("TASKD_PORT", "65535", {"port": 65535}),
    ("TASKD_THREADS", "2", {"threads": 2}),
    ("TASKD_THREADS", "64", {"threads": 64}),
    ("TASKD_CORS_ORIGINS", "https://a.example", {"cors_origins": ("https://a.example",)}),
    ("TASKD_CORS_ORIGINS", "http://localhost:3000,https://a.example",
     {"cors_origins": ("http://localhost:3000", "https://a.example")}),
    ("TASKD_CORS_ORIGINS", "http://localhost:3000 , https://a.example",
     {"cors_origins": ("http://localhost:3000", "https://a.example")}),
    ("TASKD_CORS_ORIGINS", "http://[::1]:3000", {"cors_origins": ("http://[::1]:3000",)}),
    ("TASKD_CORS_ORIGINS", "http://[0:0::0001]:3000", {"cors_origins": ("http://[::1]:3000",)}),
    ("TASKD_CORS_ORIGINS", "https://a.example:443", {"cors_origins": ("https://a.example",)}),
    ("TASKD_CORS_ORIGINS", "https://a.example:0443", {"cors_origins": ("https://a.example",)}),
    ("TASKD_CORS_ORIGINS", "http://a.example:80", {"cors_origins": ("http://a.example",)}),
    ("TASKD_CORS_ORIGINS", "http://a.example:443", {"cors_origins": ("http://a.example:443",)}),
    ("TASKD_CORS_ORIGINS", "http://[::1]:80,http://a.example:08080",
     {"cors_origins": ("http://[::1]", "http://a.example:8080")}),
    ("TASKD_CORS_ORIGINS", "capacitor://localhost", {"cors_origins": ("capacitor://localhost",)}),
    ("TASKD_CORS_ORIGINS", "ionic://localhost tauri://localhost",
     {"cors_origins": ("ionic://localhost", "tauri://localhost")}),
    ("TASKD_CORS_ORIGINS", "chrome-extension://abcdefghijklmnop",
     {"cors_origins": ("chrome-extension://abcdefghijklmnop",)}),
    ("TASKD_CORS_ORIGINS", "safari-web-extension://E8BEA491-9B80",
     {"cors_origins": ("safari-web-extension://E8BEA491-9B80",)}),
    ("TASKD_ISSUER", "https://auth.example", {"issuer": "https://auth.example"}),
    ("TASKD_AUDIENCE", "https://tasks.example", {"audience": "https://tasks.example"}),
    *[("TASKD_LOG", level, {"log_level": level})
      for level in ("debug", "info", "warning", "error")],
]  # fmt: skip
PEM = "-----BEGIN PUBLIC KEY-----\n" + "x" * 64 + "\n-----END PUBLIC KEY-----"
BAD_SETTINGS = [
    *[("BETTER_AUTH_SECRET", bad) for bad in (
        "x", "x" * 31, "\u00e9" * 15, " ", " " * 40, "\t \u00a0" * 20,
        "better-auth-secret-12345678901234567890", "\udcff" * 40, PEM, "ssh-rsa " + "A" * 64,
    )],
    *[("BETTER_AUTH_SECRETS", bad) for bad in (
        "x", SECRET, f"{SECRET},{OTHER_SECRET}", "1:", "1:short", f"2:{NEW},1:short",
        f"1:{NEW},1:{OLD}", f"x:{NEW}", f":{NEW}", f"-1:{NEW}", f"1.5:{NEW}", f"2:{NEW},",
        f",2:{NEW}", f"2:{NEW},,1:{OLD}", f"2:{NEW};1:{OLD}x,y",
        "1:better-auth-secret-12345678901234567890", f"\u0661:{NEW}", f"2 {NEW}",
    )],
    *[("DATABASE_URL", bad) for bad in (
        "taskd.db", "/var/lib/taskd.db", "sqlite", "sqlite:", "sqlite:/taskd.db", "sqlite://",
        "sqlite://taskd.db", "sqlite:///", "sqlite:///:memory:", "sqlite://:memory:", ":memory:",
        "sqlite:///taskd.db?mode=memory", "sqlite:///taskd.db#x", "sqlite:///a\0b",
        "sqlite:///taskd.db\n", "sqlite:///a\tb", "SQLITE:///taskd.db",
        "sqlite+pool:///taskd.db", "file:taskd.db", "mysql://u:hidden@h/d",
        "postgres://u:hidden@h/d", " sqlite:///taskd.db", "sqlite:///?mode=memory",
    )],
    *[("TASKD_HOST", bad) for bad in (
        "a b", "http://localhost", "localhost/", " ", "127.0.0.1\n", "*",
    )],
    *[("TASKD_JWKS_URL", bad) for bad in (
        "http://127.0.0.1/\u00e9", "https://a.example/ x", "https://a.example/\n",
        "https://\u00e9.example/",
    )],
    *[("TASKD_PORT", bad) for bad in (
        "x", "-1", "+1", "1.0", "1e3", "0x50", "1_0", "80 ", " 80", "\u0661", "65536", "99999",
        "100000", "9" * 5000, "http",
    )],
    *[("TASKD_THREADS", bad) for bad in (
        "0", "-1", "1.5", "x", "100000", "\u0664", "9" * 5000, " 4",
    )],
    *[("TASKD_CORS_ORIGINS", bad) for bad in (
        "*", "null", "a.example", "https://", "https://*", "https://*.example",
        "https://a.example/", "https://a.example/path", "ftp://a.example", "https://a.example?x",
        "https://u@a.example", "https://a.example;https://b.example",
        "https://a.examplehttps://b.example", "HTTPS://A.EXAMPLE", ",", "https://a.example,*",
        "https://a.example,null", "https://a.example:port", "https://a.example:",
        "https://a.example:0", "https://a.example:65536", "https://a.example:99999",
        "https://a.example:1000000", "https://[::1", "https://[1::2::3]", "capacitor://", "file://",
        "javascript://x", "extension://x",
    )],
    *[("TASKD_MAX_TASKS", bad) for bad in ("0", "00", "-1", "1.0", "1e3", "x", " 5", "9" * 17)],
    *[("TASKD_LOG", bad) for bad in ("verbose", "trace", "10", "info ", "infos", "x")],
]  # fmt: skip


@pytest.fixture
def no_dotenv(tmp_path):
    return tmp_path / "no.env"


def test_without_any_setting_there_are_the_defaults_and_no_start(no_dotenv):
    settings = taskd.Settings.load({}, no_dotenv)
    assert {name: getattr(settings, name) for name in DEFAULTS} == DEFAULTS
    assert 1 <= settings.threads <= 99
    with pytest.raises(taskd.SettingsError, match=r"^BETTER_AUTH_SECRET .*(taskctl|openssl)"):
        taskd.Tokens(settings)


@pytest.mark.parametrize(("variable", "value", "expected"), GOOD_SETTINGS)
def test_a_good_setting_is_taken_and_leaves_the_others_alone(no_dotenv, variable, value, expected):
    settings = taskd.Settings.load({variable: value, "PATH": "/bin", "TASKD": "x"}, no_dotenv)
    for name, default in DEFAULTS.items():
        if name not in expected and "database" not in expected:
            assert getattr(settings, name) == default
    for name, wanted in expected.items():
        assert getattr(settings, name) == wanted


@pytest.mark.parametrize(("variable", "value"), BAD_SETTINGS)
def test_a_bad_setting_is_refused_by_name_in_one_line(tmp_path, variable, value):
    dotenv = tmp_path / ".env"
    dotenv.write_text(f"{variable}='{value}'\n", errors="replace")
    for environ, path in [({variable: value}, tmp_path / "no.env"), ({}, dotenv)]:
        if path == dotenv and not re.fullmatch(r"[^\0\n'\udc80-\udcff]+", value):
            continue  # it cannot be written in a line of .env
        with pytest.raises(taskd.SettingsError) as caught:
            taskd.Settings.load(environ, path)
        message = str(caught.value)
        assert re.match(rf"{variable} (must|is) ", message)
        assert "\n" not in message
        assert len(message) < 300
        if "SECRET" in variable:
            for secret in re.split(r"[:,\s]+", value):
                assert len(secret) < 5 or secret not in message
        assert "hidden" not in message


def test_a_secret_is_in_no_representation_of_the_settings(no_dotenv):
    settings = taskd.Settings.load(
        {"BETTER_AUTH_SECRET": SECRET, "BETTER_AUTH_SECRETS": f"1:{OLD}"}, no_dotenv
    )
    for text in (repr(settings), str(settings), f"{settings}"):
        assert SECRET not in text
        assert OLD not in text


def test_a_secret_that_cannot_be_used_says_how_to_make_one(no_dotenv):
    public = "better-auth-secret-12345678901234567890"
    for secret in ("short", public, " " * 40, "\udc80" * 40, PEM):
        with pytest.raises(taskd.SettingsError, match="remove it, and make one with"):
            taskd.Settings.load({"BETTER_AUTH_SECRET": secret}, no_dotenv)
        if secret != PEM:
            with pytest.raises(taskd.SettingsError, match=r"; replace its secret 1$"):
                taskd.Settings.load({"BETTER_AUTH_SECRETS": f"2:{NEW},1:{secret}"}, no_dotenv)


@pytest.mark.parametrize(
    "variable",
    sorted({variable for variable, _ in BAD_SETTINGS} | {"TASKD_ISSUER", "TASKD_AUDIENCE"}),
)
def test_an_empty_value_is_none(no_dotenv, variable):
    assert taskd.Settings.load({variable: ""}, no_dotenv) == taskd.Settings.load({}, no_dotenv)


def test_dotenv_is_for_what_the_environment_does_not_set(tmp_path):
    dotenv = tmp_path / ".env"
    dotenv.write_text(
        f"BETTER_AUTH_SECRET={OTHER_SECRET}\nTASKD_PORT=1234\nTASKD_HOST=localhost\nOTHER=x\n"
    )
    settings = taskd.Settings.load({"BETTER_AUTH_SECRET": SECRET, "TASKD_HOST": "::1"}, dotenv)
    assert (settings.secret, settings.port, settings.host) == (SECRET, 1234, "::1")
    settings = taskd.Settings.load({}, dotenv)
    assert (settings.secret, settings.port, settings.host) == (OTHER_SECRET, 1234, "localhost")


@pytest.mark.parametrize(
    ("line", "secret"),
    [
        (f"BETTER_AUTH_SECRET={SECRET}", SECRET),
        (f"export BETTER_AUTH_SECRET={SECRET}", SECRET),
        (f'BETTER_AUTH_SECRET="{SECRET}"', SECRET),
        (f"BETTER_AUTH_SECRET='{SECRET}'", SECRET),
        (f"# a comment\n\nBETTER_AUTH_SECRET = {SECRET}  # mine", SECRET),
        (f"BETTER_AUTH_SECRET={SECRET}\r", SECRET),
        (
            "BETTER_AUTH_SECRET='$HOME-${PATH}-$$-of-at-least-32-bytes'",
            "$HOME-${PATH}-$$-of-at-least-32-bytes",
        ),
        (
            'BETTER_AUTH_SECRET="$HOME-${PATH}-$$-of-at-least-32-bytes"',
            "$HOME-${PATH}-$$-of-at-least-32-bytes",
        ),
        (
            "BETTER_AUTH_SECRET=$HOME-${PATH}-$$-of-at-least-32-bytes",
            "$HOME-${PATH}-$$-of-at-least-32-bytes",
        ),
        (f"BETTER_AUTH_SECRET={'=' * 40}", "=" * 40),
        ("BETTER_AUTH_SECRET=" + "\u00e9" * 20, "\u00e9" * 20),
        ("BETTER_AUTH_SECRET=", None),
        ("BETTER_AUTH_SECRET", None),
        ("", None),
    ],
)
def test_a_secret_in_dotenv_is_taken_as_it_stands_there(tmp_path, line, secret):
    (tmp_path / ".env").write_bytes(line.encode() + b"\n")
    assert (
        taskd.Settings.load({"HOME": "/root", "PATH": "/bin"}, tmp_path / ".env").secret == secret
    )


def test_a_dotenv_that_cannot_be_read_is_refused_by_name(tmp_path):
    dotenv = tmp_path / "latin-1.env"
    dotenv.write_bytes(b"BETTER_AUTH_SECRET=caf\xe9-the-secret-that-must-not-be-shown-here\n")
    with pytest.raises(taskd.SettingsError) as caught:
        taskd.Settings.load({}, dotenv)
    assert "latin-1.env" in str(caught.value)
    assert "must-not-be-shown" not in str(caught.value)


def test_loading_settings_touches_neither_the_environment_nor_the_disk(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text(f"BETTER_AUTH_SECRET={SECRET}\nTASKD_PORT=1234\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TASKD_PORT", raising=False)
    import os

    before = dict(os.environ)
    assert taskd.Settings.load({}).port == 1234
    assert dict(os.environ) == before
    assert [path.name for path in tmp_path.iterdir()] == [".env"]


def test_the_application_does_not_start_without_a_usable_secret_and_touches_nothing(tmp_path):
    with pytest.raises(taskd.SettingsError, match=r"^BETTER_AUTH_SECRET "):
        taskd.create_app(taskd.Settings(database_url=f"sqlite:///{tmp_path}/taskd.db"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["\0", "alice\0", "alice\0bob", "x" * 2000])
def test_a_user_whose_id_sqlite_can_keep_is_served(client, name):
    """PostgreSQL can store neither U+0000 nor a text that is too long for an index."""
    path = f"/api/{quote(name, safe='')}/tasks"
    created = client.simulate_post(path, json={"title": "x"}, headers=bearer(name))
    assert (created.status_code, created.json["user_id"]) == (201, name)
    assert client.simulate_get(path, headers=bearer(name)).json == [created.json]
    assert client.simulate_get("/api/alice/tasks", headers=bearer(name)).status_code == 403

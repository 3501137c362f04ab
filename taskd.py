"""taskd: a JWT-protected task API for many users, in one file.

Better Auth logs people in; taskd verifies the token that it hands out and serves that user's tasks, nobody else's.
The chapters, from top to bottom: settings, tokens, bodies, store, database, middleware, resources, errors, app,
server. Importing this module does nothing; `create_app` builds everything.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import fcntl
import hashlib
import hmac
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import re
import resource
import select
import signal
import socket
import sqlite3
import sys
import tempfile
import termios
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache, partial, reduce
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar, cast
from urllib.parse import unquote_to_bytes, urlencode

import falcon
import httptools
import jwt
import msgspec
import peewee
import waitress.buffers
import waitress.channel
import waitress.server
import waitress.task
from msgspec import UNSET, Meta, Struct, UnsetType
from waitress import wasyncore

__version__ = "0.2.0"

log = logging.getLogger("taskd")

# --- Settings -------------------------------------------------------------------------------------

MIN_SECRET = 32  # bytes; RFC 7518, section 3.2: an HS256 key is at least as long as the hash
PUBLIC_SECRET = (
    "better-auth-secret-12345678901234567890"  # what Better Auth signs with when given none
)
MAKE_ONE = "make one with: python taskctl.py init"
KEY_SET_URL = r"https://[^\s@]+|http://(localhost|127\.[0-9.]+|\[::1\])(:[0-9]+)?(/\S*)?"
ORIGIN = r"https?://(\[[0-9a-f:]+\]|[a-z0-9.-]+)(:[0-9]+)?"


class SettingsError(Exception):
    """A setting is missing or unusable; the message names the variable and says what to do."""


def _secret(text: str) -> str:
    if text == PUBLIC_SECRET:
        raise ValueError(f"is Better Auth's public default, which everybody knows; {MAKE_ONE}")
    try:
        size = len(text.encode())
        jwt.get_algorithm_by_name("HS256").prepare_key(text)
    except (UnicodeEncodeError, jwt.InvalidKeyError):
        raise ValueError(f"must be UTF-8 text, and no public or private key; {MAKE_ONE}") from None
    if size < MIN_SECRET:
        raise ValueError(f"must be at least {MIN_SECRET} bytes long, not {size}; {MAKE_ONE}")
    return text


def _secrets(text: str) -> tuple[str, ...]:
    secrets: dict[str, str] = {}
    for entry in text.split(","):
        version, _, secret = entry.strip().partition(":")
        if not re.fullmatch("[0-9]+", version) or version in secrets:
            raise ValueError(
                'must look like "2:new,1:old", with a different whole number before each secret'
            )
        secrets[version] = _secret(secret.strip())
    return tuple(secrets.values())


def _port(text: str) -> int:
    if int(text) > 65535:  # getaddrinfo would take 65536 for 0
        raise ValueError("must be at most 65535")
    return int(text)


def _split(text: str) -> tuple[str, ...]:
    return tuple(re.split(r"[,\s]+", text.strip(", ")))


def _addresses(text: str) -> tuple[str, ...]:
    """Return IP addresses as the server spells them, or "*"."""
    try:
        return (
            ("*",) if text == "*" else tuple(str(ipaddress.ip_address(one)) for one in _split(text))
        )
    except ValueError as ex:
        raise ValueError(f"must be IP addresses, with commas, or * for any: {ex}") from None


def _setting(
    variable: str,
    default: Any,
    about: str,
    pattern: str = "(?s).+",
    parse: Callable[[str], Any] = str,
    secret: bool = False,
) -> Any:
    metadata = {
        "variable": variable,
        "about": about,
        "pattern": pattern,
        "parse": parse,
        "secret": secret,
    }
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an operator can change: each with its environment variable, default, meaning and form, declared once."""

    secret: str | None = _setting(
        "BETTER_AUTH_SECRET", None, "the secret shared with Better Auth", parse=_secret, secret=True
    )
    secrets: tuple[str, ...] = _setting(
        "BETTER_AUTH_SECRETS",
        (),
        'rotation: "2:new,1:old"; all verify, the first signs',
        parse=_secrets,
        secret=True,
    )
    database_url: str = _setting(
        "DATABASE_URL",
        "sqlite:///taskd.db",
        "sqlite:/// and the path of a file, or postgresql://user:password@host/name",
        r"sqlite:///(?!:memory:)[^?#\0]+|postgresql://([^\s\0/@]*@)?[^\s\0/@]*(/[^\s\0@?]*)?(\?[^\s\0]*)?",
    )
    host: str = _setting(
        "TASKD_HOST", "127.0.0.1", "a host name or address to listen on", r"[^\s/]+"
    )
    port: int = _setting(
        "TASKD_PORT", 8000, "a port from 1 to 65535, or 0 for any free one", "[0-9]{1,5}", _port
    )
    threads: int = _setting(
        "TASKD_THREADS", 16, "a number of threads from 2 to 99", "[2-9]|[1-9][0-9]", int
    )
    cors_origins: tuple[str, ...] = _setting(
        "TASKD_CORS_ORIGINS",
        (),
        "origins such as https://a.example, with commas",
        rf"{ORIGIN}([,\s]+{ORIGIN})*,?",
        _split,
    )
    jwks_url: str | None = _setting(
        "TASKD_JWKS_URL",
        None,
        "https, or http to this machine: Better Auth's /api/auth/jwks",
        KEY_SET_URL,
    )
    issuer: str | None = _setting("TASKD_ISSUER", None, "the iss claim that a token must have")
    audience: str | None = _setting("TASKD_AUDIENCE", None, "the aud claim that a token must have")
    metrics: bool | None = _setting(
        "TASKD_METRICS", None, "1 to show /metrics, else 0", "[01]", "1".__eq__
    )
    trusted_proxies: tuple[str, ...] = _setting(
        "TASKD_TRUSTED_PROXY",
        (),
        "the address of the proxy before taskd, or several, or *",
        parse=_addresses,
    )
    log_level: str = _setting(
        "TASKD_LOG", "info", "debug, info, warning or error", "debug|info|warning|error"
    )
    log_format: str | None = _setting(
        "TASKD_LOG_FORMAT", None, "text (as without it) or json", "text|json"
    )

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ, dotenv: Path = Path(".env")) -> Settings:
        """Return the settings of the environment and, for variables not set there, of `.env`.

        An empty value is none. Raises SettingsError for a value that cannot be used.
        """
        given = {
            **_read_dotenv(dotenv),
            **{name: value for name, value in environ.items() if value},
        }
        fields = [
            field for field in dataclasses.fields(cls) if given.get(field.metadata["variable"])
        ]
        return cls(
            **{
                field.name: _parse(given[field.metadata["variable"]], **field.metadata)
                for field in fields
            }
        )

    @property
    def database(self) -> str:
        """The path of SQLite's file, or what else can be told of where the data is: no password."""
        if self.database_url.startswith("sqlite:"):
            return self.database_url.removeprefix("sqlite:///")
        return re.sub("//.*@", "//…@", self.database_url.partition("?")[0])


def _parse(
    text: str, *, variable: str, about: str, pattern: str, parse: Callable[[str], Any], secret: bool
) -> Any:
    try:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"must be {about}")
        return parse(text)
    except ValueError as ex:
        raise SettingsError(f"{variable} {ex}") from None


def _read_dotenv(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    from dotenv import dotenv_values  # loaded only where there is such a file

    try:
        values = dotenv_values(path, interpolate=False)  # a $ in a secret is a $
    except (OSError, UnicodeDecodeError) as ex:
        raise SettingsError(f"{path} cannot be read: {ex}") from None
    return {name: value for name, value in values.items() if value is not None}


# --- Log ------------------------------------------------------------------------------------------

EMPTY_RECORD = logging.LogRecord(log.name, logging.INFO, __file__, 0, "", None, None).__dict__


class AccessLogRecord(logging.LogRecord):
    """A request's line in the log, without all that logging looks up elsewhere and no line of ours shows."""

    fields: dict[str, Any]

    def __init__(self, fields: dict[str, Any]) -> None:
        """Take the fields in the order in which JSON shows them."""
        now = time.time()
        self.__dict__ = {**EMPTY_RECORD, "created": now, "msecs": now % 1 * 1000, "fields": fields}

    def getMessage(self) -> str:  # noqa: N802
        """Return it as text. The user is percent-encoded as in a URL: no field and no line can be forged with it."""
        field, user = self.fields, self.fields["user"]
        user = "-" if user is None else f"'{falcon.uri.encode_value(user)}'"
        client = f" client={field['client']}" if "client" in field else ""
        what = f"{field['method']} {field['route']} {field['status']} {field['ms']:.1f}ms"
        return f"{what} id={field['id']} user={user}{client}"


def log_request(**fields: Any) -> None:
    """Log a request; the user is None where nobody is known."""
    if log.isEnabledFor(logging.INFO):
        log.handle(AccessLogRecord(fields))


class TextLines(logging.Formatter):
    """Log lines for people. A traceback is indented, so that none of its lines can be taken for one of the log."""

    _second, _clock = 0, ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Return the time in UTC, of which only the milliseconds are made anew each time."""
        if self._second != int(record.created):
            self._second = int(record.created)
            self._clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self._second))
        return f"{self._clock}.{int(record.msecs):03}Z"

    def format(self, record: logging.LogRecord) -> str:
        """Return a line, and perhaps a traceback below it."""
        line = f"{self.formatTime(record)} {record.levelname} {printable(record.getMessage())}"
        if not record.exc_info:
            return line
        return "\n    ".join(
            [line, *map(printable, self.formatException(record.exc_info).splitlines())]
        )


class JsonLines(TextLines):
    """Log lines for programs: each a JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a line with a request's fields, or with a message and perhaps a traceback."""
        line = {"time": self.formatTime(record), "level": record.levelname}
        line |= (
            record.fields
            if isinstance(record, AccessLogRecord)
            else {"message": record.getMessage()}
        )
        return json.dumps(
            line | ({"traceback": self.formatException(record.exc_info)} if record.exc_info else {})
        )


def printable(text: str) -> str:
    """Return a text with everything escaped that breaks a line or moves a cursor."""
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )


def configure_log(settings: Settings) -> None:
    """Send taskd's and waitress' log lines to stderr, without looking up what no line shows."""
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # as the logging HOWTO's "Optimization" says
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if settings.log_format == "json" else TextLines())
    for logger in (log, logging.getLogger("waitress")):
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(settings.log_level.upper())
    logging.getLogger("waitress.queue").setLevel(
        "ERROR"
    )  # it warns of every request that waits for a thread


# --- Threads --------------------------------------------------------------------------------------


class Unavailable(Exception):
    """What is needed to answer cannot be used right now; the arguments say what and why."""


class WouldBlock(BaseException):
    """Raised in the event loop when a request would block; the server runs it again in a worker thread.

    One thread, the event loop, reads all requests and runs the application for each, because Python's
    threads take turns at a high cost. It must never wait. Whatever would wait there raises this
    instead: the database for a lock, a slow disk or a long query, the key set for a fetch. The
    server drops what was done and calls the application again, from the start, in a worker thread,
    where `thread_state.in_event_loop` is False and nobody raises it. So everything before the first
    write to the database must be safe to run twice; nothing that raises it may have written.
    """


class _ThreadState(threading.local):
    in_event_loop = False  # True in the thread that serves the sockets


thread_state = _ThreadState()


# --- Tokens ---------------------------------------------------------------------------------------

LEEWAY = 10  # seconds that this clock and Better Auth's may differ
MAX_TOKEN = 16 * 1024  # characters; Better Auth's have a few hundred
TOKEN_CACHE_SIZE = 1000  # verified tokens
COMPACT_JWS = re.compile(
    r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+){2}"
)  # RFC 7515, section 7.1: no padding
LOGIN_TYPES = (
    "jwt",
    "at+jwt",
)  # RFC 8725, section 3.11: Better Auth signs its session cookies too, of another type
ASYMMETRIC = (
    "EdDSA",
    "ES256",
    "ES512",
    "RS256",
    "PS256",
)  # what Better Auth's jwt() plugin can sign with
REFUSALS: dict[type[Exception], str] = {
    jwt.InvalidTokenError: "the header's typ, kid, crit or b64 is not that of a login token",
    jwt.ExpiredSignatureError: "the token has expired; log in again",
    jwt.ImmatureSignatureError: "the token is not valid yet: nbf or iat is in the future",
    jwt.InvalidSignatureError: "the signature does not match: the token was changed, or signed with another secret",
    jwt.InvalidIssuerError: "iss is not the issuer that this server trusts (TASKD_ISSUER)",
    jwt.InvalidAudienceError: "aud does not name this server (TASKD_AUDIENCE)",
    jwt.exceptions.InvalidSubjectError: "sub must be a string",
}
KEYS_AGE = 300  # seconds after which the key set is fetched again, while its keys go on
KEYS_PAUSE = 3  # seconds at least between two fetches, whatever kids are asked for
KEYS_WAIT = 5  # seconds that a request waits for a fetch


class TokenError(Exception):
    """The token is not accepted; the message says why, fit for an error_description (RFC 6750, section 3)."""


class User(Struct, frozen=True):
    """Whom a token speaks for: `id` is its `sub`, `expires` its `exp` in seconds since 1970."""

    id: str
    expires: float
    email: str | None = None
    name: str | None = None


class KeySet:
    """Better Auth's public keys (RFC 7517), fetched when they are old or a token names one that is not among them."""

    def __init__(self, url: str, waiting: int) -> None:
        """Take the address of a key set; at most `waiting` requests wait for it at once."""
        self._url = url
        self._slots = threading.BoundedSemaphore(waiting)
        self._lock = threading.Lock()
        self._keys: dict[str, jwt.PyJWK] = {}
        self._started, self._finished, self._failure = -math.inf, threading.Event(), ""
        self._finished.set()

    def find(self, kid: str) -> jwt.PyJWK | None:
        """Return the key of this name, or None if the set has none. Raises Unavailable if the set cannot be had."""
        finished = self._refresh(KEYS_AGE if kid in self._keys else KEYS_PAUSE)
        if kid not in self._keys and not finished.is_set():
            self._wait(finished)
        if kid not in self._keys and self._failure:
            raise Unavailable("the key set", self._failure)
        return self._keys.get(kid)

    def _refresh(self, age: float) -> threading.Event:
        """Start a fetch if none is under way and the last began `age` seconds ago; return what tells its end."""
        with self._lock:
            if self._finished.is_set() and time.monotonic() - self._started > age:
                self._started, self._finished = time.monotonic(), threading.Event()
                threading.Thread(target=self._fetch, args=(self._finished,), daemon=True).start()
            return self._finished

    def _wait(self, finished: threading.Event) -> None:
        if thread_state.in_event_loop:
            raise WouldBlock
        if not self._slots.acquire(blocking=False):
            raise Unavailable("the key set", "too many requests are waiting for it")
        try:
            if not finished.wait(KEYS_WAIT):
                raise Unavailable("the key set", f"no answer within {KEYS_WAIT} s")
        finally:
            self._slots.release()

    def _fetch(self, finished: threading.Event) -> None:
        try:
            keys = download_keys(self._url)
            self._keys, self._failure = {str(key.key_id): key for key in keys}, ""
        except Exception as ex:  # whatever the other side does
            self._failure = f"{type(ex).__name__}: {ex}"
        finished.set()


def download_keys(url: str) -> list[jwt.PyJWK]:
    """Return the keys of a set that can verify a login; a set that leaves its host or holds secrets gives none."""
    keys = jwt.PyJWKClient(url, cache_jwk_set=False, timeout=KEYS_WAIT).get_signing_keys()
    return [
        key
        for key in keys
        if key.algorithm_name in ASYMMETRIC and not key.Algorithm.check_key_length(key.key)
    ]


class StrictJWT(jwt.PyJWT):
    """PyJWT that also refuses a claim given twice (RFC 7519, section 4)."""

    def _decode_payload(self, decoded: dict[str, Any]) -> dict[str, Any]:
        return _json_object(decoded["payload"])


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member is given twice")
    return members


_decode_strictly = json.JSONDecoder(object_pairs_hook=_each_once).decode


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        members = _decode_strictly(text.decode())
    except (ValueError, RecursionError) as ex:
        raise jwt.DecodeError(str(ex)) from None
    if not isinstance(members, dict):
        raise jwt.DecodeError("not a JSON object")
    return members


class Tokens:
    """Verify Better Auth's JWTs (RFC 7519): HS256 with the shared secret, or signed with a key of its key set."""

    def __init__(self, settings: Settings) -> None:
        """Raise SettingsError when there is neither a secret nor a key set."""
        self._secrets = settings.secrets or ((settings.secret,) if settings.secret else ())
        self._key_set = (
            KeySet(settings.jwks_url, settings.threads // 2) if settings.jwks_url else None
        )
        if not self._secrets and not self._key_set:
            raise SettingsError(f"BETTER_AUTH_SECRET is missing; {MAKE_ONE}")
        self._issuer, self._audience = settings.issuer, settings.audience
        # Better Auth puts aud into its tokens, and PyJWT refuses any token with an aud unless told otherwise.
        self._jwt = StrictJWT({"require": ["sub", "exp"], "verify_aud": self._audience is not None})
        self._verified: dict[str, User] = {}

    def verify(self, token: str) -> User:
        """Return the user of a compact JWS, or raise TokenError, or Unavailable if its key cannot be had.

        Identity is `sub` and nothing else: Better Auth signs e-mail links with the same secret, and they name a user
        by `userId` and `email`.
        """
        user = self._verified.get(token)
        if user is None or user.expires <= time.time() - LEEWAY:
            user = self._verify(token)
            if len(self._verified) >= TOKEN_CACHE_SIZE:
                self._verified.clear()
            self._verified[token] = user
        return user

    def mint(self, claims: dict[str, Any]) -> str:
        """Return a token with these claims, signed with the first secret."""
        if not self._secrets:
            raise SettingsError(
                f"BETTER_AUTH_SECRET is missing, without which no token can be signed; {MAKE_ONE}"
            )
        return self._jwt.encode(claims, self._secrets[0], "HS256")

    def _verify(self, token: str) -> User:
        if len(token) > MAX_TOKEN:
            raise TokenError(f"the token is longer than {MAX_TOKEN} characters")
        if token.count(".") == 1:
            raise TokenError(
                "this is no JWT but perhaps a session token; get a JWT from /api/auth/token"
            )
        if not COMPACT_JWS.fullmatch(token):
            raise TokenError(
                "this is no JWT: it must be three base64url parts with dots between them"
            )
        try:
            header = _json_object(jwt.utils.base64url_decode(token.partition(".")[0]))
            if (
                not {"crit", "b64"}.isdisjoint(header)
                or str(header.get("typ", "JWT")).lower() not in LOGIN_TYPES
            ):
                raise jwt.InvalidTokenError
            return _user(self._decode(token, header.get("alg"), str(header.get("kid"))))
        except jwt.MissingRequiredClaimError as ex:
            raise TokenError(
                f"the {ex.claim} claim is missing: this is not the token of a login"
            ) from None
        except (jwt.InvalidTokenError, ValueError) as ex:
            raise TokenError(REFUSALS.get(type(ex), "the token is malformed")) from None

    def _decode(self, token: str, alg: object, kid: str) -> dict[str, Any]:
        """Return the claims. The key pins the algorithm: the header only says which key to try (RFC 8725, 3.1)."""
        for key, algorithm in self._keys(alg, kid):
            try:
                return self._jwt.decode(
                    token,
                    key,
                    [algorithm],
                    issuer=self._issuer,
                    audience=self._audience,
                    leeway=LEEWAY,
                )
            except jwt.InvalidSignatureError as ex:
                mismatch = ex  # perhaps another of the secrets made it
        raise mismatch

    def _keys(self, alg: object, kid: str) -> list[tuple[Any, str]]:
        if alg == "HS256" and self._secrets:
            return [(secret, "HS256") for secret in self._secrets]
        if alg not in ASYMMETRIC:
            raise TokenError(
                "alg must be HS256"
                if self._secrets
                else f"alg must be one of {', '.join(ASYMMETRIC)}"
            )
        if not self._key_set:
            raise TokenError(
                "signed with Better Auth's own key, which this server does not know: set TASKD_JWKS_URL"
            )
        key = self._key_set.find(kid)
        if key is None or key.algorithm_name != alg:
            raise TokenError("the key set has no key for this kid and alg")
        return [(key, key.algorithm_name)]


def _user(claims: dict[str, Any]) -> User:
    for name in (
        "exp",
        "nbf",
        "iat",
    ):  # RFC 7519, section 2: a number; PyJWT would take a string of digits too
        if name in claims and type(claims[name]) not in (int, float):
            raise TokenError(f"{name} must be a number")
    subject = claims["sub"]
    if not subject or any("\ud800" <= character <= "\udfff" for character in subject):
        raise TokenError("sub must name a user")
    texts = {name: claims[name] for name in ("email", "name") if isinstance(claims.get(name), str)}
    return User(subject, claims["exp"], **texts)


# --- Bodies ---------------------------------------------------------------------------------------

MAX_BODY = 64 * 1024  # bytes; the largest possible task has 41,000 in UTF-8
MAX_FAULTS = 20  # reported at once, each with at most so many characters of the field's name
MAX_NAME = 100
JSON_TYPE = re.compile(r'application/json\s*(;\s*charset\s*=\s*"?utf-?8"?\s*)?', re.IGNORECASE)

Title = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"\S")]
Description = Annotated[str, Meta(max_length=10_000)] | None
RULES: dict[str, tuple[Any, str]] = {
    "title": (Title, "must be a string of 1 to 200 characters"),
    "description": (Description, "must be a string of at most 10,000 characters, or null"),
    "completed": (bool, "must be true or false"),
}


class _Body(Struct, forbid_unknown_fields=True, kw_only=True):
    """A JSON object; what the server owns may be in it and is ignored, so that a task can be sent back whole."""

    id: msgspec.Raw | UnsetType = UNSET
    user_id: msgspec.Raw | UnsetType = UNSET
    created_at: msgspec.Raw | UnsetType = UNSET
    updated_at: msgspec.Raw | UnsetType = UNSET


class NewTask(_Body):
    """What POST takes."""

    title: Title
    description: Description = None
    completed: bool = False


class TaskChanges(_Body):
    """What PUT takes: the fields to change; the rest stays."""

    title: Title | UnsetType = UNSET
    description: Description | UnsetType = UNSET
    completed: bool | UnsetType = UNSET


class Completion(_Body):
    """What PATCH takes, if it is given a body: the state to set."""

    completed: bool


class TaskView(Struct, frozen=True):
    """A task as every answer shows it: these members, in this order."""

    id: int
    user_id: str
    title: str
    description: str | None
    completed: bool
    created_at: str
    updated_at: str


class Fault(Struct, frozen=True):
    """What is wrong with one field of a body."""

    field: str
    message: str


class Unprocessable(falcon.HTTPUnprocessableEntity):
    """The body is JSON but not what is wanted; `faults` says what is wrong, field by field."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__(
            description="; ".join(f"{fault.field} {fault.message}" for fault in faults)
        )
        self.faults = faults


Body = TypeVar("Body", bound=_Body)
to_json = msgspec.json.Encoder().encode


def read(req: falcon.Request, kind: type[Body], body: bytes | None = None) -> Body:
    """Return the request's body as a `kind`, or raise 400, 413, 415 or 422."""
    body = content(req) if body is None else body
    if not body:
        raise falcon.HTTPBadRequest(description="send a JSON object as the body")
    if not JSON_TYPE.fullmatch(req.content_type or "") or req.get_header("Content-Encoding"):
        raise falcon.HTTPUnsupportedMediaType(
            description="send plain JSON in UTF-8, with the header Content-Type: application/json"
        )
    try:
        return decode(body.decode(), kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as ex:
        raise falcon.HTTPBadRequest(description=f"the body must be JSON in UTF-8: {ex}") from None


def content(req: falcon.Request) -> bytes:
    """Return the request's body, whatever its type, or raise 413."""
    stream = req.stream if req.env.get("wsgi.input_terminated") else req.bounded_stream
    body: bytes = stream.read(MAX_BODY + 1)
    if len(body) > MAX_BODY:
        raise too_large()
    return body


def too_large() -> falcon.HTTPError:
    """Return the error for a body that is over the limit."""
    return falcon.HTTPContentTooLarge(description=f"send a body of at most {MAX_BODY} bytes")


def decode(text: str, kind: type[Body]) -> Body:
    """Return JSON as a `kind`; raise 422 with all that is wrong, or msgspec.DecodeError for what is no JSON."""
    try:
        if r"\u0000" not in text:
            return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError:
        pass  # msgspec stops at the first fault; the caller wants them all
    try:
        members = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        msgspec.json.decode(text, type=msgspec.Raw)  # it may be no JSON at all
        raise Unprocessable([Fault("body", "must be a JSON object")]) from None
    if faults := _faults(members, kind):
        raise Unprocessable(faults[:MAX_FAULTS])
    return msgspec.json.decode(to_json(members), type=kind)


def _faults(members: dict[str, msgspec.Raw], kind: type[Struct]) -> list[Fault]:
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    faults = [
        Fault(name, "is missing")
        for name, field in fields.items()
        if field.required and name not in members
    ]
    for name, value in members.items():
        if name not in fields:
            faults.append(Fault(name[:MAX_NAME], "is not a field that can be set here"))
        elif name in RULES and (reason := _reason(name, value)):
            faults.append(Fault(name, reason))
    return faults


def _reason(name: str, value: msgspec.Raw) -> str | None:
    expected, rule = RULES[name]
    try:
        given = msgspec.json.decode(value, type=expected)
    except msgspec.ValidationError:
        is_text = bytes(value).startswith(b'"')
        blank = name == "title" and is_text and not msgspec.json.decode(value, type=str).strip()
        return "must not be blank" if blank else rule
    return "must not contain U+0000" if isinstance(given, str) and "\0" in given else None


# --- Requests -------------------------------------------------------------------------------------

POSITION = tuple[
    str | int, int
]  # where a page ended: the value by which its last task was sorted, and its id
SEAL = 16  # bytes
PARAMETERS = {
    "completed": ("true|false", "must be true or false"),
    "q": (r"[^\0]{0,1000}", "must be at most 1,000 characters, without U+0000"),
    "sort": (
        "-?(id|created_at|updated_at|title)",
        "must be id, created_at, updated_at or title, or one with - before",
    ),
    "limit": ("[1-9][0-9]{0,2}|1000", "must be a whole number from 1 to 1000"),
    "after": (
        "[A-Za-z0-9_-]+",
        'must come from the link rel="next" of a page of your tasks in the same order',
    ),
}
ENTITY_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'  # RFC 9110, section 8.8.3
ENTITY_TAGS = rf"[ \t,]*{ENTITY_TAG}(?:[ \t]*,[ \t,]*{ENTITY_TAG})*[ \t,]*"
TAG = r'"[0-9]+-[0-9T:.-]+Z"'  # taskd's own: the version and updated_at
IDEMPOTENCY_KEY = r"[\x21-\x7e]{1,255}"


class Listing(Struct, frozen=True):
    """Which of a user's tasks, in which order, from where on; without a limit all of them."""

    completed: bool | None = None
    q: str = ""
    sort: str = "id"
    limit: int | None = None
    after: POSITION | None = None


def read_listing(req: falcon.Request, cursors: Cursors) -> Listing:
    """Return what the query asks for, or raise 422 for a wrong value of a known parameter."""
    given = {
        name: text
        for name, text in req.params.items()
        if name in PARAMETERS and isinstance(text, str)
    }
    wrong = [name for name, text in given.items() if not re.fullmatch(PARAMETERS[name][0], text)]
    wrong += [
        name for name in PARAMETERS if isinstance(req.params.get(name), list)
    ]  # given more than once
    sort, after = given.get("sort", "id"), None
    if "after" in given and not {"after", "sort"}.intersection(wrong):
        after = cursors.read(given["after"], req.context.user.id, sort)
        wrong += [] if after else ["after"]
    if wrong:
        raise Unprocessable([Fault(name, PARAMETERS[name][1]) for name in wrong])
    completed = {"true": True, "false": False}.get(given.get("completed", ""))
    return Listing(completed, given.get("q", ""), sort, int(given.get("limit", 0)) or None, after)


class Cursors:
    """Say where a page ended, in a form that only the same user can use, and only for the same order."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    def write(self, after: POSITION, user_id: str, sort: str) -> str:
        """Return the cursor of a position."""
        position = to_json(after)
        seal = hmac.digest(self._key, to_json([user_id, sort]) + position, "sha256")[:SEAL]
        return base64.urlsafe_b64encode(seal + position).decode().rstrip("=")

    def read(self, cursor: str, user_id: str, sort: str) -> POSITION | None:
        """Return the position, or None if this is not its cursor, to the letter, for this user and order."""
        try:
            position = jwt.utils.base64url_decode(cursor)[SEAL:]
            after = msgspec.json.decode(position, type=POSITION)
        except (ValueError, msgspec.DecodeError):
            return None
        return after if hmac.compare_digest(cursor, self.write(after, user_id, sort)) else None


def read_tags(req: falcon.Request, name: str) -> list[str] | None:
    """Return the entity tags of If-Match or If-None-Match, perhaps "*", or None; raise 400 (RFC 9110, section 13.1)."""
    value = req.get_header(name)
    if value is None:
        return None
    if value.strip(" \t") == "*":
        return ["*"]
    if not re.fullmatch(ENTITY_TAGS, value):
        raise falcon.HTTPBadRequest(
            description=f'send {name} as it was in an ETag: "1-…", or several with commas, or *'
        )
    return re.findall(ENTITY_TAG, value)


def read_expected(req: falcon.Request) -> str | None:
    """Return the entity tags of which the task must have one to be changed, or None if any will do.

    The comparison is strong: a weak tag, and one that taskd did not make, never fits (RFC 9110, section 8.8.3.2).
    """
    tags = read_tags(req, "If-Match")
    if tags is None or tags == ["*"]:
        return None
    return " ".join(tag for tag in tags if re.fullmatch(TAG, tag))


def read_key(req: falcon.Request) -> str | None:
    """Return the Idempotency-Key, or None; raise 400 if it is malformed."""
    key = req.get_header("Idempotency-Key")
    if key is not None and not re.fullmatch(IDEMPOTENCY_KEY, key):
        raise falcon.HTTPBadRequest(
            description="Idempotency-Key must be 1 to 255 visible ASCII characters"
        )
    return key


# --- Store ----------------------------------------------------------------------------------------

CHUNK = 100  # tasks of a list that are read and sent at once
IDEMPOTENCY_WINDOW = timedelta(
    hours=24
)  # how long a create can be repeated with its Idempotency-Key
CONTAINS = " OR ".join(
    f"REPLACE({text}, :q, '') <> {text}" for text in ("title_folded", "description_folded")
)
AS_EXPECTED = """(CAST(:expected AS TEXT) IS NULL OR :expected LIKE '%"' || version || '-' || updated_at || '"%')"""


class Changed(Exception):
    """The task is not what the caller expected; `tag` is its entity tag now."""

    def __init__(self, tag: str) -> None:
        self.tag = tag


class Task(peewee.Model):
    """A row of schema.sql's table. Statements are built from it; rows never become one, which would cost 100 µs."""

    id = peewee.AutoField()
    user_id = peewee.TextField()
    title = peewee.TextField()
    description = peewee.TextField(null=True)
    completed = peewee.BooleanField(default=False)
    created_at = peewee.TextField()
    updated_at = peewee.TextField()
    version = peewee.IntegerField()
    title_folded = peewee.TextField()
    description_folded = peewee.TextField(null=True)

    class Meta:
        """Where schema.sql keeps it."""

        table_name = "task"


class IdempotencyKey(peewee.Model):
    """A create that can be repeated: its key, the digest of what was asked for, and what was answered."""

    id = peewee.AutoField()
    user_id = peewee.TextField()
    name = peewee.TextField()
    body = peewee.TextField()
    answer = peewee.TextField()
    created_at = peewee.TextField()

    class Meta:
        """Where schema.sql keeps it."""

        table_name = "idempotency_key"


class About(peewee.Model):
    """The schema's version, and the key that signs cursors."""

    version = peewee.IntegerField()
    cursor_key = peewee.TextField()

    class Meta:
        """Where schema.sql keeps it."""

        table_name = "about"
        primary_key = False


MODELS: tuple[type[peewee.Model], ...] = (Task, IdempotencyKey, About)
SHOWN = [getattr(Task, name) for name in TaskView.__struct_fields__]


class Stored(Struct, frozen=True):
    """A task with its entity tag; `replayed` if a create with the same Idempotency-Key made it before."""

    task: TaskView
    tag: str
    replayed: bool = False


def search_columns(title: str | None, description: str | None) -> dict[str, str | None]:
    """Return the columns in which `q` is searched: the texts as they are when upper and lower case do not count."""
    return {
        "title_folded": title and title.casefold(),
        "description_folded": description and description.casefold(),
    }


def placeholder(name: str) -> peewee.SQL:
    """Return the place of a value in a statement that is compiled once."""
    return peewee.SQL(f":{name}")


def owned_by_user(model: type[Task | IdempotencyKey]) -> peewee.Expression:
    """Whose row is this? The one predicate of ownership."""
    return model.user_id == placeholder("user_id")


class TaskStore:
    """One user's tasks at a time; None means that this user has no such task, and Unavailable that the database is.

    Each method is one SQL statement, compiled once by Peewee and bound to its owner, and is therefore atomic; only a
    create that can be repeated takes several, in one transaction. `expected` is entity tags of which the task must
    have one, else Changed is raised.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.cursor_key: str = database.run(database.compile(About.select(About.cursor_key)))[0][0]
        self._lists: dict[tuple[object, ...], str] = {}
        this = owned_by_user(Task) & (Task.id == placeholder("id"))
        as_expected = this & peewee.SQL(AS_EXPECTED)
        touched = {"updated_at": placeholder("now"), "version": peewee.SQL("version + 1")}
        new = {name: placeholder(name) for name in ("user_id", *RULES, *search_columns(None, None))}
        changed: dict[str, Any] = {
            name: peewee.fn.COALESCE(placeholder(name), getattr(Task, name))
            for name in new
            if name != "user_id"
        }
        for name in ("description", "description_folded"):
            changed[name] = peewee.Case(
                None, [(placeholder("described"), placeholder(name))], getattr(Task, name)
            )
        toggled = peewee.fn.COALESCE(placeholder("completed"), ~Task.completed)
        self._get = database.compile(Task.select(*SHOWN, Task.version).where(this))
        self._add = self._compile(
            Task.insert(created_at=placeholder("now"), updated_at=placeholder("now"), **new)
        )
        self._change = self._compile(Task.update(**changed, **touched).where(as_expected))
        self._complete = self._compile(Task.update(completed=toggled, **touched).where(as_expected))
        self._remove = self._compile(Task.delete().where(as_expected))
        key = owned_by_user(IdempotencyKey) & (IdempotencyKey.name == placeholder("name"))
        oldest = (
            IdempotencyKey.select(IdempotencyKey.id)
            .order_by(IdempotencyKey.id)
            .limit(peewee.SQL("2"))
        )
        expired = (key | IdempotencyKey.id.in_(oldest)) & (
            IdempotencyKey.created_at < placeholder("before")
        )
        claim = {name: placeholder(name) for name in ("user_id", "name", "body")}
        claimed = IdempotencyKey.insert(
            answer=peewee.SQL("''"), created_at=placeholder("now"), **claim
        )
        self._expire = database.compile(IdempotencyKey.delete().where(expired))
        self._claim = database.compile(claimed.on_conflict_ignore().returning(IdempotencyKey.id))
        self._answer = database.compile(
            IdempotencyKey.update(answer=placeholder("answer")).where(key)
        )
        self._replay = database.compile(
            IdempotencyKey.select(IdempotencyKey.body, IdempotencyKey.answer).where(key)
        )

    def _compile(self, query: Any) -> str:
        return self._database.compile(query.returning(*SHOWN, Task.version))

    def page(self, user_id: str, listing: Listing) -> tuple[list[TaskView], Listing | None]:
        """Return the user's tasks, as many as the listing's limit or a piece; and the listing of those that follow."""
        if listing.q and thread_state.in_event_loop:
            raise WouldBlock  # it looks at each task of the user
        size, (value, last) = listing.limit or CHUNK, listing.after or (None, None)
        shape = listing.completed is None, not listing.q, listing.sort, last is None
        sql = self._lists.get(shape) or self._lists.setdefault(shape, self._select(*shape))
        values = {
            "completed": listing.completed,
            "q": listing.q.casefold(),
            "value": value,
            "last": last,
        }
        tasks = _views(self._database.run(sql, user_id=user_id, limit=size + 1, **values))
        if len(tasks) <= size:
            return tasks, None
        after = getattr(tasks[size - 1], listing.sort.lstrip("-")), tasks[size - 1].id
        return tasks[:size], msgspec.structs.replace(listing, after=after)

    def _select(self, both: bool, everything: bool, sort: str, first: bool) -> str:
        """Return the statement of a page: from its first task on, along an index, and never with OFFSET.

        It is put together from parts that each are a piece of an index in its order: open and done tasks, those equal
        to the last one before and those after them. SQLite would read all that are equal if it were asked at once.
        """
        column, descending = getattr(Task, sort.lstrip("-")), sort.startswith("-")
        value, last = placeholder("value"), placeholder("last")
        halves, places = [], []
        if not both:
            halves = [Task.completed == placeholder("completed")]
        elif column is not Task.id:
            halves = [Task.completed == peewee.SQL("FALSE"), Task.completed == peewee.SQL("TRUE")]
        if not first:
            places = [Task.id < last if descending else Task.id > last]
        if not first and column is not Task.id:
            places = [
                (column == value) & places[0],
                column < value if descending else column > value,
            ]
        query = Task.select(*SHOWN).where(
            owned_by_user(Task), *([] if everything else [peewee.SQL(f"({CONTAINS})")])
        )
        parts: list[Any] = [
            query.where(*part) for part in itertools.product(*filter(None, (halves, places)))
        ]
        direction = " DESC" if descending else ""
        order = (peewee.SQL(f"{key}{direction}") for key in dict.fromkeys([column.name, "id"]))
        return self._database.compile(
            reduce(operator.add, parts).order_by(*order).limit(placeholder("limit"))
        )

    def get(self, user_id: str, task_id: int) -> Stored | None:
        """Return one task."""
        return _first(self._database.run(self._get, user_id=user_id, id=task_id))

    def add(self, user_id: str, task: NewTask, key: str | None = None) -> Stored | None:
        """Create a task; it is on disk when this returns. None if the key was used for another one.

        With a key, a create that was done within 24 hours is not done again, but answered as it was then.
        """
        now = datetime.now(UTC)
        new = {"title": task.title, "description": task.description, "completed": task.completed}
        values = {
            **new,
            **search_columns(task.title, task.description),
            "user_id": user_id,
            "now": timestamp(now),
        }
        if key is None:
            return _first(self._database.write(self._add, **values))
        body = hashlib.sha256(to_json(new)).hexdigest()
        values |= {"name": key, "body": body, "before": timestamp(now - IDEMPOTENCY_WINDOW)}
        with self._database.transaction():
            self._database.run(self._expire, **values)
            found = self._database.run(self._replay, **values)
            if not found and self._database.run(self._claim, **values):
                [row] = self._database.run(self._add, **values)
                stored = _stored(row)
                self._database.run(self._answer, **values, answer=to_json(stored.task).decode())
                return stored
            [(known, answer)] = found or self._database.run(
                self._replay, **values
            )  # another process was faster
        return _replayed(answer) if known == body else None

    def change(
        self, user_id: str, task_id: int, changes: TaskChanges, expected: str | None = None
    ) -> Stored | None:
        """Change the fields that are given, and return the task as it is now."""
        given = {name: value for name in RULES if (value := getattr(changes, name)) is not UNSET}
        if not given:
            stored = self.get(user_id, task_id)
            if stored and expected is not None and stored.tag not in expected:
                raise Changed(stored.tag)
            return stored
        values = {
            "title": None,
            "description": None,
            "completed": None,
            "described": "description" in given,
            **given,
        }
        values |= search_columns(given.get("title"), given.get("description"))
        return self._write(
            self._change, expected, user_id=user_id, id=task_id, now=_now(), **values
        )

    def complete(
        self, user_id: str, task_id: int, completed: bool | None, expected: str | None = None
    ) -> Stored | None:
        """Set whether the task is completed, or toggle it with None, and return the task as it is now."""
        return self._write(
            self._complete, expected, user_id=user_id, id=task_id, now=_now(), completed=completed
        )

    def remove(self, user_id: str, task_id: int, expected: str | None = None) -> Stored | None:
        """Delete the task, and return it as it was."""
        return self._write(self._remove, expected, user_id=user_id, id=task_id)

    def check(self) -> None:
        """Raise Unavailable unless the database answers and fits schema.sql."""
        self._database.check()

    def close(self) -> None:
        """Close this thread's connections."""
        self._database.close()

    def _write(self, sql: str, expected: str | None, **values: Any) -> Stored | None:
        stored = _first(self._database.write(sql, expected=expected, **values))
        if (
            not stored
            and expected is not None
            and (other := self.get(values["user_id"], values["id"]))
        ):
            raise Changed(other.tag)
        return stored


Row = tuple[Any, ...]


def _views(rows: list[Row]) -> list[TaskView]:
    return [
        TaskView(key, user, title, text, done == 1, new, now)
        for key, user, title, text, done, new, now in rows
    ]


def _stored(row: Row) -> Stored:
    key, user, title, text, done, new, now, version = row
    return Stored(TaskView(key, user, title, text, done == 1, new, now), f'"{version}-{now}"')


def _first(rows: list[Row]) -> Stored | None:
    return _stored(rows[0]) if rows else None


def _replayed(answer: str) -> Stored:
    task = msgspec.json.decode(answer, type=TaskView)
    return Stored(task, f'"1-{task.updated_at}"', replayed=True)


def timestamp(when: datetime) -> str:
    """Return a time in UTC as tasks show it (RFC 3339, milliseconds)."""
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _now() -> str:
    return timestamp(datetime.now(UTC))


# --- Database -------------------------------------------------------------------------------------

SCHEMA = Path(__file__).with_name("schema.sql")
MIGRATIONS = Path(__file__).with_name("migrations")
VERSION = 2  # of the schema; migrations/2.sql makes it from version 1
TABLES = tuple(model._meta.table_name for model in MODELS)
LOCK_TIMEOUT = (
    4.0  # seconds that a write waits for another process which holds the database's write lock
)
WRITE_TURN_TIMEOUT = 4.0  # seconds that it waits before that for the writes of this process
QUEUE_PLACE_TIMEOUT = (
    0.25  # seconds that it waits for leave to wait, so that waiting writes never take every thread
)
SLOW_WRITE = 0.005  # seconds; a disk on which a write takes longer must not hold up the thread that serves the sockets


class DatabaseError(Exception):
    """The database cannot be opened or does not fit schema.sql; the message says which file and why."""


def open_database(settings: Settings) -> Database:
    """Return the database of the settings, made or brought up to date if need be. Raises DatabaseError."""
    if settings.database_url.startswith("postgresql:"):
        return Postgres(settings)
    return Sqlite(settings.database, settings.threads // 2)


def compiled(query: peewee.Query, database: peewee.Database) -> str:
    """Return the SQL of a query all of whose values are parameters."""
    sql, values = database.get_sql_context().sql(query).query()
    if values:
        raise AssertionError(f"every request would use the same values: {values}")
    return str(sql)


class Sqlite:
    """SQLite: a connection in each thread, and one write at a time."""

    def __init__(self, path: str, waiting: int) -> None:
        """Open the database, creating it if need be; at most `waiting` writes wait at once. Raises DatabaseError."""
        prepare_database(path)
        self._event_loop_connection, self._worker_connection = (
            connect(path, timeout=0, cache=16),
            connect(path, timeout=LOCK_TIMEOUT),
        )
        try:  # one connection stays open, so that no other needs to set up the log on a disk that is full or locked
            self._worker_connection.execute_sql("SELECT 1 FROM task LIMIT 1").fetchall()
        except peewee.DatabaseError as ex:
            raise DatabaseError(f"{path} cannot be opened: {ex}") from None
        self.peewee = self._worker_connection  # for queries of taskctl's own
        self._path, self._opened = Path(path), Path(path).stat()
        self._slots = threading.BoundedSemaphore(waiting)
        self._turn = threading.Lock()
        self._slow = False

    def compile(self, query: peewee.Query) -> str:
        """Return the SQL of a query all of whose values are parameters."""
        return compiled(query, self._worker_connection)

    def run(self, sql: str, **values: Any) -> list[tuple[Any, ...]]:
        """Run a statement and return its rows. Raises Unavailable, and WouldBlock where it must not wait."""
        database = self._here()
        try:
            with peewee.__exception_wrapper__:  # type: ignore[attr-defined]  # the last fetch commits, and can fail
                return database.execute_sql(sql, values).fetchall()  # type: ignore[no-any-return]
        except peewee.DatabaseError as ex:
            if thread_state.in_event_loop and "locked" in str(ex):
                raise WouldBlock from None
            self._drop()  # whatever state the connection is in, the next request starts with a fresh one
            if type(ex) not in (peewee.DatabaseError, peewee.OperationalError):
                raise
            raise Unavailable("the database", str(ex)) from ex

    def write(self, sql: str, **values: Any) -> list[tuple[Any, ...]]:
        """Run a statement that changes something, alone; it is on disk when this returns."""
        with self._alone():
            return self.run(sql, **values)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Run several statements alone; all of them are on disk when this ends, or none."""
        with self._alone():
            self.run("BEGIN IMMEDIATE")
            try:
                yield
                self.run("COMMIT")
            except BaseException:
                self._drop()
                raise

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait for this thread's turn. Writes queue here, because in SQLite's own waiting they back off and starve."""
        if not thread_state.in_event_loop:
            self._queue_up()
        elif self._slow or not self._turn.acquire(blocking=False):
            raise WouldBlock
        started = time.monotonic()
        try:
            yield
        finally:
            self._slow = time.monotonic() - started > SLOW_WRITE
            self._turn.release()

    def _drop(self) -> None:
        """Undo what this thread's connection has begun, and close it; only closed, it may keep its lock for a while."""
        if not (database := self._here()).is_closed():
            with contextlib.suppress(sqlite3.Error):
                database.connection().rollback()
            database.close()

    def _here(self) -> peewee.SqliteDatabase:
        return (
            self._event_loop_connection if thread_state.in_event_loop else self._worker_connection
        )

    def _queue_up(self) -> None:
        if not self._slots.acquire(timeout=QUEUE_PLACE_TIMEOUT):
            raise Unavailable("the database", "too many writes are waiting")
        try:
            if not self._turn.acquire(timeout=WRITE_TURN_TIMEOUT):
                raise Unavailable("the database", "the writes before this one took too long")
        finally:
            self._slots.release()

    def check(self) -> None:
        """Raise Unavailable unless the database answers, fits schema.sql, and is still what lies at its path.

        SQLite would go on in a file that was deleted or replaced, where nobody will ever find what it wrote.
        """
        if thread_state.in_event_loop:
            raise WouldBlock
        self.run("SELECT 1 FROM task LIMIT 1")
        try:
            replaced = not os.path.samestat(self._path.stat(), self._opened)
            _check_fit(self._worker_connection, sqlite_definitions)
        except (peewee.DatabaseError, sqlite3.DatabaseError, OSError) as ex:
            raise Unavailable("the database", str(ex)) from ex
        if replaced:
            raise Unavailable(
                "the database, whose file was replaced,",
                "restart taskd to serve what lies there now",
            )

    def close(self) -> None:
        """Close this thread's connections; the last one of all folds SQLite's log into the database."""
        self._event_loop_connection.close()
        self._worker_connection.close()


class Postgres:
    """PostgreSQL: a pool of connections, and any number of taskd processes beside each other."""

    def __init__(self, settings: Settings) -> None:
        """Open the database, and make its tables if need be. Raises DatabaseError, or SettingsError for no driver."""
        try:
            import psycopg  # only those who have a server pay for its driver
            from playhouse.pool import MaxConnectionsExceeded, PooledPostgresqlDatabase

            psycopg.conninfo.conninfo_to_dict(settings.database_url)
        except ImportError:
            raise SettingsError(
                "DATABASE_URL needs psycopg: pip install -r requirements-postgresql.txt"
            ) from None
        except (
            psycopg.ProgrammingError
        ):  # what it says of a password with a % may have the password in it
            raise SettingsError(
                "DATABASE_URL cannot be read: write it as PostgreSQL's manual says (libpq)"
            ) from None
        self._pool = self.peewee = PooledPostgresqlDatabase(
            settings.database_url,
            max_connections=settings.threads,
            timeout=WRITE_TURN_TIMEOUT,
            prefer_psycopg3=True,
            connect_timeout=3,
            tcp_user_timeout=5000,
            options=f"-c statement_timeout={2000 * LOCK_TIMEOUT:.0f}ms -c lock_timeout={1000 * LOCK_TIMEOUT:.0f}ms",
        )
        self._unusable = (peewee.DatabaseError, peewee.InterfaceError, MaxConnectionsExceeded)
        try:
            self._prepare(settings.database)
        except (peewee.PeeweeException, ValueError) as ex:
            raise DatabaseError(
                f"{settings.database} cannot be opened: {_first_line(ex)}"
            ) from None
        finally:
            self.close()

    def compile(self, query: peewee.Query) -> str:
        """Return the SQL of a query all of whose values are parameters."""
        return re.sub(r":([a-z_]+)", r"%(\1)s", compiled(query, self._pool).replace("%", "%%"))

    def run(self, sql: str, **values: Any) -> list[tuple[Any, ...]]:
        """Run a statement and return its rows. Raises Unavailable, and WouldBlock where it must not wait."""
        with self._connected():
            cursor = self._pool.execute_sql(sql, values)
            return cursor.fetchall() if cursor.description else []

    write = run  # the server keeps writers apart

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Run several statements together; all of them are on disk when this ends, or none."""
        with self._connected(), self._pool.atomic():
            yield

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """Take a connection from the pool, or go on with the one of the transaction that is under way."""
        if thread_state.in_event_loop:
            raise WouldBlock
        try:
            with (
                self._pool.connection_context()
                if self._pool.is_closed()
                else contextlib.nullcontext()
            ):
                yield
        except self._unusable as ex:
            self._pool.close_idle()  # the server was perhaps away; then none of them is good any more
            raise Unavailable("the database", _first_line(ex)) from ex

    def check(self) -> None:
        """Raise Unavailable unless the database answers and fits schema.sql."""
        with self._connected():
            _check_fit(self._pool, portable_definitions)

    def close(self) -> None:
        """Close the connections that nobody uses."""
        self._pool.close_idle()

    def _prepare(self, name: str) -> None:
        with self._pool.connection_context(), self._pool.atomic():
            self._pool.execute_sql("SELECT pg_advisory_xact_lock(%s)", (int.from_bytes(b"taskd"),))
            if not schema_version(self._pool):
                _make_tables(self._pool, map(for_postgresql, statements(SCHEMA)))
            check_schema(self._pool, name, portable_definitions)


def _check_fit(database: peewee.Database, describe: Callable[[Any], set[str]]) -> None:
    try:
        check_schema(database, "it", describe)
    except (DatabaseError, peewee.ProgrammingError) as ex:
        raise Unavailable("the database, whose schema does not fit,", _first_line(ex)) from None


def for_postgresql(statement: str) -> str:
    """Return a statement of schema.sql as PostgreSQL has it, where text is to be sorted by code point as in SQLite."""
    key = "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY"
    return statement.replace("INTEGER PRIMARY KEY AUTOINCREMENT", key).replace(
        " TEXT", ' TEXT COLLATE "C"'
    )


def _first_line(ex: Exception) -> str:
    return (str(ex).splitlines() or [type(ex).__name__])[0]


Database = Sqlite | Postgres


def connect(path: str, timeout: float, cache: int = 2) -> peewee.SqliteDatabase:
    """Return a database that opens a connection in each thread that uses it.

    A connection waits `timeout` seconds for another's lock, and keeps up to `cache` MB of pages.
    """
    pragmas = {
        "journal_mode": "wal",
        "synchronous": "full",
    }  # reads never wait, and a commit is on disk
    pragmas["cache_size"] = str(-1000 * cache)
    existing = f"{Path(path).absolute().as_uri()}?mode=rw"  # a file that is away is not replaced by an empty one
    return peewee.SqliteDatabase(existing, uri=True, pragmas=pragmas, timeout=timeout)


def prepare_database(path: str) -> None:
    """Make a new file fit schema.sql, readable by its owner alone, or check that an old one does.

    One of an earlier version is brought up to date; beside it stays a copy of what it was. Raises DatabaseError for a
    file that cannot be opened or does not fit, and leaves it as it was.
    """
    database = peewee.SqliteDatabase(path, timeout=LOCK_TIMEOUT)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        if schema_version(database) < VERSION:
            _bring_up_to_date(database, path)
        check_schema(database, path, sqlite_definitions)
    except (peewee.DatabaseError, sqlite3.DatabaseError, OSError) as ex:
        raise DatabaseError(f"{path} cannot be opened: {ex}") from None
    finally:
        database.close()


def check_schema(database: peewee.Database, name: str, describe: Callable[[Any], set[str]]) -> None:
    """Raise DatabaseError if the database is not of this version or does not fit schema.sql."""
    if (version := schema_version(database)) > VERSION:
        raise DatabaseError(
            f"{name} was made by a newer taskd: its schema is {version}, not {VERSION}; update taskd"
        )
    if differences := schema_differences(database, describe):
        raise DatabaseError(f"{name} does not fit schema.sql: {differences}")


def schema_version(database: peewee.Database) -> int:
    """Return the version of the schema that a database has; 0 for none.

    Version 1 did not say so. A task table that nobody knows counts as today's, and will not fit.
    """
    if database.table_exists("about"):
        [version] = database.execute_sql("SELECT MAX(version) FROM about").fetchone()
        return version if isinstance(version, int) else 0
    columns = [column.name for column in database.get_columns("task")]
    return 0 if not columns else 1 if columns == list(TaskView.__struct_fields__) else VERSION


def _bring_up_to_date(database: peewee.SqliteDatabase, path: str) -> None:
    database.register_function(lambda text: text and text.casefold(), "casefold", 1)
    with database.atomic("IMMEDIATE"), contextlib.ExitStack() as undo:
        version = schema_version(database)  # another process may have been here first
        if version >= VERSION:
            return
        if version:
            undo.callback(os.unlink, _keep_copy(path, version))
        scripts = (
            [MIGRATIONS / f"{number}.sql" for number in range(version + 1, VERSION + 1)]
            if version
            else [SCHEMA]
        )
        _make_tables(database, itertools.chain(*map(statements, scripts)))
        check_schema(database, path, sqlite_definitions)
        undo.pop_all()


def _make_tables(database: peewee.Database, script: Iterable[str]) -> None:
    for statement in script:
        database.execute_sql(statement)
    About.insert(version=VERSION, cursor_key=os.urandom(32).hex()).execute(database)


def _keep_copy(path: str, version: int) -> str:
    """Copy the database beside itself, under its name only when it is whole, and return that name."""
    copy, part = f"{path}.v{version}-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}", f"{path}.part"
    for left in (part, f"{part}-journal"):  # by a start that was killed
        Path(left).unlink(missing_ok=True)
    os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with (
        contextlib.closing(sqlite3.connect(path)) as now,
        contextlib.closing(sqlite3.connect(part)) as kept,
    ):
        now.backup(kept)
    Path(part).rename(copy)
    return copy


def statements(script: Path) -> Iterator[str]:
    """Yield the statements of an SQL script one by one; sqlite3's own `executescript` would commit before them."""
    statement = ""
    for line in script.read_text().splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def schema_differences(database: peewee.Database, describe: Callable[[Any], set[str]]) -> str:
    """Return in words what the tables have otherwise than schema.sql; other tables are no concern of ours."""
    wanted, found = _wanted(describe), describe(database)
    lacking = [f"it lacks {part}" for part in sorted(wanted - found)]
    return "; ".join(
        lacking
        + [f"it has {part}" for part in sorted(found - wanted) if not part.startswith("index")]
    )


@cache
def _wanted(describe: Callable[[Any], set[str]]) -> set[str]:
    """Return what a database has that schema.sql has just made: /readyz compares with it again and again."""
    model = peewee.SqliteDatabase(":memory:")
    model.connection().executescript(SCHEMA.read_text())
    wanted = describe(model)
    model.close()
    return wanted


def sqlite_definitions(database: peewee.SqliteDatabase) -> set[str]:
    """Return the columns and indexes of taskd's tables as SQLite keeps them, without comments and layout."""
    rows = database.execute_sql("SELECT tbl_name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    parts = set()
    for sql in [sql for table, sql in rows.fetchall() if table in TABLES]:
        name, _, columns = " ".join(re.sub("--.*", "", sql).split()).partition("(")
        if name.startswith("CREATE TABLE"):
            parts |= {f"{name.split()[2]}.{part.strip(' )')}" for part in columns.split(",")}
        else:
            parts.add(f"{name.removeprefix('CREATE ').replace('INDEX', 'index')}({columns}")
    return parts


def portable_definitions(database: peewee.Database) -> set[str]:
    """Return the columns and indexes of taskd's tables as any database tells them."""
    parts = set()
    for table in TABLES:
        for column in database.get_columns(table):
            kind = column.data_type.upper().replace("BIGINT", "INTEGER")
            required = "" if column.null or column.primary_key else " NOT NULL"
            parts.add(f"{table}.{column.name} {kind}{required}")
        parts |= {
            f"index on {table} ({', '.join(index.columns)})"
            for index in database.get_indexes(table)
        }
    return parts


# --- Metrics --------------------------------------------------------------------------------------

BUCKETS = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
)  # seconds
CHANGES = {"POST": "created", "PUT": "changed", "PATCH": "changed", "DELETE": "deleted"}


class Metrics:
    """Count and time what is done, for Prometheus: by route templates and statements, never by user."""

    public = True

    def __init__(self) -> None:
        import prometheus_client as prometheus  # only where it is asked for

        self._registry = registry = prometheus.CollectorRegistry()
        self._show, self._content_type = prometheus.generate_latest, prometheus.CONTENT_TYPE_LATEST
        what, seconds = (
            ("route", "method"),
            partial(prometheus.Histogram, registry=registry, buckets=BUCKETS),
        )
        self._requests = prometheus.Counter(
            "taskd_requests", "Requests.", (*what, "status"), registry=registry
        )
        self._seconds = seconds("taskd_request_seconds", "Time to answer.", what)
        self._written = prometheus.Counter(
            "taskd_tasks_written", "Tasks.", ("change",), registry=registry
        )
        waited = "Time of a statement, or a transaction, with the wait for its turn."
        self._database_seconds = seconds("taskd_database_seconds", waited, ("statement",))
        prometheus.Info("taskd_build", "What runs.", registry=registry).info(
            {"version": __version__}
        )
        prometheus.ProcessCollector(registry=registry)

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: object, succeeded: bool
    ) -> None:
        """Count and time a request. A fault here is told to the log and breaks no answer."""
        if req.context.refusal:
            return
        try:
            self._count(req, resp)
        except Exception:
            log.exception("the metrics lack a request id=%s", req.context.id)

    def _count(self, req: falcon.Request, resp: falcon.Response) -> None:
        what = req.uri_template or "-", req.method
        self._requests.labels(*what, resp.status_code).inc()
        self._seconds.labels(*what).observe(time.perf_counter() - req.context.started)
        if (
            req.method in CHANGES
            and resp.status_code in (200, 201)
            and not resp.get_header("Idempotency-Replayed")
        ):
            self._written.labels(CHANGES[req.method]).inc()

    def timed(self, database: Database) -> Database:
        """Return the database, the time of whose statements is taken."""
        return cast(Database, TimedDatabase(database, self._database_seconds))

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Show them in Prometheus' text format."""
        resp.content_type, resp.data = self._content_type, self._show(self._registry)

    on_head = on_get


class TimedDatabase:
    """A database that notes how long each statement takes."""

    def __init__(self, database: Database, seconds: Any) -> None:
        self._database, self._seconds = database, seconds

    def __getattr__(self, name: str) -> Any:
        """Leave all else to the database itself."""
        return getattr(self._database, name)

    def run(self, sql: str, **values: Any) -> list[Row]:
        """Run a statement."""
        with self._timed(sql.partition(" ")[0].lower()):
            return self._database.run(sql, **values)

    def write(self, sql: str, **values: Any) -> list[Row]:
        """Run a statement that changes something."""
        with self._timed(sql.partition(" ")[0].lower()):
            return self._database.write(sql, **values)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Run several statements together, and take the time of all of them with their commit."""
        with self._timed("transaction"), self._database.transaction():
            yield

    @contextlib.contextmanager
    def _timed(self, statement: str) -> Iterator[None]:
        started, blocked = time.perf_counter(), False
        try:
            yield
        except WouldBlock:
            blocked = True  # it starts again in another thread, and counts there
            raise
        finally:
            if not blocked:
                self._seconds.labels(statement).observe(time.perf_counter() - started)


# --- Middleware -----------------------------------------------------------------------------------

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
ADDRESS = re.compile(
    r"[0-9A-Fa-f.:]{2,45}|\[[0-9A-Fa-f.:]{2,45}\](:[0-9]{1,5})?"
)  # some proxies add a port
PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")
CORS_ALLOWED = "Authorization, Content-Type, If-Match, Idempotency-Key"
CORS_EXPOSED = "Location, Link, ETag, X-Request-ID"


class AuthMiddleware:
    """Let a request for a user's tasks pass only with that user's token, and leave the user on `req.context.user`."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Route by the path as it was sent if a slash is encoded in it: WSGI decodes %2F, a user id may have one."""
        sent = req.env.get("REQUEST_URI", "").partition("?")[0]
        req.context.decode = "%2f" in sent or "%2F" in sent
        if req.context.decode:
            req.path = sent.removesuffix("/")

    def process_resource(
        self, req: falcon.Request, resp: falcon.Response, resource: object, params: dict[str, Any]
    ) -> None:
        """Raise 401 without a good token, 403 for another user's URL.

        This runs after routing, because the router reads `//api/...` as `/api/...`. Every resource is private unless
        it says otherwise, and no resource learns the user from the URL: the token's `sub` takes its place.
        """
        if req.method == "OPTIONS" or getattr(resource, "public", False):
            return  # a CORS preflight carries no token
        user = self._authenticate(req.get_header("Authorization"))
        asked, path = params.pop("user_id", ""), req.env["PATH_INFO"]
        asked = falcon.uri.decode(asked, unquote_plus=False) if req.context.decode else asked
        if (
            asked != user.id or user.id.encode().decode("latin-1") not in path
        ):  # bytes that are no UTF-8 are U+FFFD
            raise falcon.HTTPForbidden(
                description="this token is not for the user in the URL; use your own user id"
            )
        req.context.user = user

    def _authenticate(self, authorization: str | None) -> User:
        """Return the user of an Authorization header (RFC 6750, section 2.1), or raise 401 (section 3)."""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not (token := token.strip(" ")):
            raise _unauthorized(
                "send the header Authorization: Bearer <JWT>, with the token from your login"
            )
        try:
            return self._tokens.verify(token)
        except TokenError as ex:
            raise _unauthorized(
                str(ex), f', error="invalid_token", error_description="{ex}"'
            ) from None


def _unauthorized(detail: str, why: str = "") -> falcon.HTTPUnauthorized:
    return falcon.HTTPUnauthorized(description=detail, challenges=[f'Bearer realm="taskd"{why}'])


class RequestContext:
    """Give every answer the headers that all have, and every request its id and its line in the log."""

    def __init__(self, trusted_proxies: tuple[str, ...]) -> None:
        self._proxies = trusted_proxies

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Take the client's request id if it can stand in a log, else make one, and start the clock.

        Raises what the server refuses the request with: its answer gets the same headers and log line.
        """
        req.context.started = time.perf_counter()
        given = req.get_header("X-Request-ID")
        req.context.id = given if given and REQUEST_ID.fullmatch(given) else os.urandom(8).hex()
        resp.set_headers({
            "X-Request-ID": req.context.id, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
        })  # fmt: skip
        if self._proxies:
            req.context.client = self._client(req)
        req.context.refusal = req.env.get("taskd.refusal")
        if req.context.refusal:
            raise req.context.refusal

    def _client(self, req: falcon.Request) -> str:
        """Return the client's address as the trusted proxy tells it, and believe it where it has put taskd."""
        if self._proxies != ("*",) and req.remote_addr not in self._proxies:
            return str(req.remote_addr)
        prefix = req.get_header("X-Forwarded-Prefix") or ""
        if PREFIX.fullmatch(prefix):
            req.env["SCRIPT_NAME"] = prefix
        forwarded = (req.get_header("X-Forwarded-For") or "").rpartition(",")[2].strip()
        return forwarded if ADDRESS.fullmatch(forwarded) else str(req.remote_addr)

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: object, succeeded: bool
    ) -> None:
        """Log the request: never its token, its query or its body."""
        context = req.context
        log_request(
            method="-" if context.refusal else req.method,
            route=req.uri_template or "-",
            status=resp.status_code,
            ms=round((time.perf_counter() - context.started) * 1000, 1),
            id=context.id,
            user=context.user.id if "user" in context else None,
            **({"client": context.client} if self._proxies else {}),
        )


class Cors(falcon.CORSMiddleware):  # type: ignore[type-arg]
    """Let pages of exactly these origins call taskd, and read its errors (WHATWG Fetch, CORS protocol)."""

    def __init__(self, origins: tuple[str, ...]) -> None:
        super().__init__(allow_origins=origins, expose_headers=CORS_EXPOSED)

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: object, succeeded: bool
    ) -> None:
        """Add the headers; where Falcon would allow whatever a preflight asks for, allow what taskd reads."""
        allow = resp.get_header("Allow")
        super().process_response(req, resp, resource, succeeded)
        resp.append_header("Vary", "Origin")
        if resp.get_header("Access-Control-Allow-Headers"):
            resp.set_header("Access-Control-Allow-Headers", CORS_ALLOWED)
        if allow:
            resp.set_header("Allow", allow)


# --- Resources ------------------------------------------------------------------------------------

TASK_NUMBER = re.compile(r"[1-9][0-9]{0,18}")
MAX_TASK_NUMBER = 2**63 - 1  # what SQLite can hold
NO_TASK = "you have no task with this id"
MAX_LIST_IN_MEMORY = 512 * 1024  # bytes; a longer list goes into a file, which its client reads
MAX_LISTS = 32  # such files at a time
MAX_LISTS_OF_USER = 8
MAX_LIST_BYTES = 1024 * 1024 * 1024  # in all of them
DOCS_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


class TaskResource:
    """A user's tasks, and one of them."""

    def __init__(self, store: TaskStore) -> None:
        self._store, self._cursors = store, Cursors(store.cursor_key)

    def on_get_collection(self, req: falcon.Request, resp: falcon.Response) -> None:
        """List the user's tasks: all of them, or a page with a link to the next (RFC 8288)."""
        user_id = req.context.user.id
        listing = read_listing(req, self._cursors) if req.query_string else Listing()
        tasks, rest = self._store.page(user_id, listing)
        if rest and not listing.limit:
            self._list_all(req, resp, self._pieces(user_id, tasks, rest))
            return
        resp.data = to_json(tasks)
        if rest and rest.after:
            cursor = self._cursors.write(rest.after, user_id, rest.sort)
            query = urlencode({**req.params, "after": cursor}, doseq=True)
            resp.set_header("Link", f'<{tasks_path(req)}?{query}>; rel="next"')

    def on_post_collection(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Create a task, or answer again a create that is repeated with its Idempotency-Key."""
        key = read_key(req)
        stored = self._store.add(req.context.user.id, read(req, NewTask), key)
        if stored is None:
            raise Unprocessable(
                [
                    Fault(
                        "Idempotency-Key",
                        "was used for another task; send a new one with a new task",
                    )
                ]
            )
        resp.status = falcon.HTTP_201
        resp.location = f"{tasks_path(req)}/{stored.task.id}"
        if stored.replayed:
            resp.set_header("Idempotency-Replayed", "true")
        respond_with_task(resp, stored)

    def on_get(self, req: falcon.Request, resp: falcon.Response, task_id: str) -> None:
        """Show a task, unless the caller has it as it is."""
        task, tags = parse_task_id(task_id), read_tags(req, "If-None-Match")
        respond_with_task(resp, self._store.get(req.context.user.id, task))
        if tags and (
            tags == ["*"] or resp.get_header("ETag") in [tag.removeprefix("W/") for tag in tags]
        ):
            resp.status, resp.data = falcon.HTTP_304, None

    def on_put(self, req: falcon.Request, resp: falcon.Response, task_id: str) -> None:
        """Change the fields that the body names."""
        task, expected = parse_task_id(task_id), read_expected(req)
        respond_with_task(
            resp, self._store.change(req.context.user.id, task, read(req, TaskChanges), expected)
        )

    def on_delete(self, req: falcon.Request, resp: falcon.Response, task_id: str) -> None:
        """Delete a task, and show it as it was."""
        respond_with_task(
            resp,
            self._store.remove(req.context.user.id, parse_task_id(task_id), read_expected(req)),
        )

    on_head_collection = on_get_collection
    on_head = on_get

    def _pieces(self, user_id: str, tasks: list[TaskView], rest: Listing | None) -> Iterator[bytes]:
        """Yield the JSON array of these tasks and the rest, read piece by piece."""
        yield to_json(tasks)[:-1]
        while rest:
            tasks, rest = self._store.page(user_id, rest)
            yield b"," + to_json(tasks)[1:-1] if tasks else b""
        yield b"]"

    def _list_all(
        self, req: falcon.Request, resp: falcon.Response, pieces: Iterator[bytes]
    ) -> None:
        """Answer with all pieces: from memory, or from a file if they are too many."""
        if thread_state.in_event_loop:
            raise WouldBlock
        start = bytearray()
        for piece in pieces:
            start += piece
            if len(start) > MAX_LIST_IN_MEMORY:
                break
        else:
            resp.data = bytes(start)
            return
        file = ListFile(req.context.user.id, itertools.chain([bytes(start)], pieces))
        resp.content_length = file.size
        if req.method == "HEAD":
            file.close()
        else:
            resp.stream = file


class TaskCompleteResource:
    """Whether a task is completed."""

    def __init__(self, store: TaskStore) -> None:
        self._store = store

    def on_patch(self, req: falcon.Request, resp: falcon.Response, task_id: str) -> None:
        """Toggle completion, or set it to what the body says."""
        task, expected, body = parse_task_id(task_id), read_expected(req), content(req)
        completed = read(req, Completion, body).completed if body else None
        respond_with_task(
            resp, self._store.complete(req.context.user.id, task, completed, expected)
        )


class ListFile(io.FileIO):
    """A list that is too long for memory, in a temporary file that is gone when it is closed.

    Raises Unavailable when the user, or all users together, have too many such files, too many
    bytes in them, or the disk has no room.
    """

    _lock = threading.Lock()
    _owners: ClassVar[list[str]] = []
    _bytes: ClassVar[int] = 0
    _owner: str | None = None

    def __init__(self, user_id: str, pieces: Iterable[bytes]) -> None:
        """Write all pieces into the file; it is to be read from its beginning."""
        with self._lock:
            full = len(self._owners) >= MAX_LISTS
            if full or self._owners.count(user_id) >= MAX_LISTS_OF_USER:
                raise Unavailable("a list this long", "too many of them are being read")
            self._owners.append(user_id)
        self._owner, self.size = user_id, 0
        try:
            with tempfile.TemporaryFile() as file:
                super().__init__(os.dup(file.fileno()), "r+")
            for piece in pieces:
                self._append(piece)
        except OSError as ex:
            self.close()
            raise Unavailable("the disk for temporary files", str(ex)) from None
        except BaseException:
            self.close()
            raise
        self.seek(0)

    def _append(self, piece: bytes) -> None:
        with self._lock:
            if ListFile._bytes + len(piece) > MAX_LIST_BYTES:
                raise Unavailable("a list this long", "those being read take too much of the disk")
            ListFile._bytes += len(piece)
            self.size += len(piece)
        while piece:
            piece = piece[self.write(piece) :]

    def close(self) -> None:
        """Delete the file, so that another one can be made."""
        with self._lock:
            if self._owner is not None:
                self._owners.remove(self._owner)
                ListFile._bytes -= self.size
                self._owner = None
        super().close()


class HealthResource:
    """Whether the process is alive."""

    public = True

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Say so."""
        resp.data = b'{"status": "ok"}'

    on_head = on_get


class ReadyResource:
    """Whether the database answers, and fits."""

    public = True

    def __init__(self, store: TaskStore) -> None:
        self._store = store

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Say so, or 503."""
        self._store.check()
        resp.data = b'{"status": "ok"}'

    on_head = on_get


class FileResource:
    """A file of this repository that everybody may read."""

    public = True

    def __init__(self, name: str, content_type: str) -> None:
        self._content, self._content_type = (
            (Path(__file__).parent / name).read_bytes(),
            content_type,
        )

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Show it; it may load and call nothing but this server."""
        resp.content_type, resp.data = self._content_type, self._content
        resp.set_header("Content-Security-Policy", DOCS_POLICY)

    on_head = on_get


def parse_task_id(text: str) -> int:
    """Return a task's id from the URL, or raise the 404 of a task that does not exist."""
    if not TASK_NUMBER.fullmatch(text) or int(text) > MAX_TASK_NUMBER:
        raise falcon.HTTPNotFound(description=NO_TASK)
    return int(text)


def tasks_path(req: falcon.Request) -> str:
    """Return the path of the user's tasks as the client sees it."""
    return f"{req.root_path}/api/{falcon.uri.encode_value(req.context.user.id)}/tasks"


def respond_with_task(resp: falcon.Response, stored: Stored | None) -> None:
    """Answer with a task; raise the same 404 for one that is not there and for one that is another user's."""
    if stored is None:
        raise falcon.HTTPNotFound(description=NO_TASK)
    resp.data = to_json(stored.task)
    resp.set_header("ETag", stored.tag)


# --- Errors ---------------------------------------------------------------------------------------

RETRY_AFTER = 2  # seconds
DETAILS = {
    404: "there is nothing at this path; tasks are at /api/{user_id}/tasks",
    405: "this path does not know this method; the Allow header lists those that it knows",
}
TITLES = {
    413: "Content Too Large",
    422: "Unprocessable Content",
}  # RFC 9110; older Pythons have older names


def problem(status: int, detail: str | None, faults: list[Fault] | None = None) -> bytes:
    """Return the body of an error answer (RFC 9457): the one place where its shape is made."""
    title = TITLES.get(status) or HTTPStatus(status).phrase
    members = {
        "title": title,
        "status": status,
        "detail": detail or DETAILS.get(status),
        "errors": faults,
    }
    return to_json({name: value for name, value in members.items() if value})


def serialize_error(req: falcon.Request, resp: falcon.Response, ex: falcon.HTTPError) -> None:
    """Write an error as problem+json, whatever the client accepts."""
    resp.content_type = "application/problem+json"
    resp.data = problem(ex.status_code, ex.description, getattr(ex, "faults", None))


def unavailable(
    req: falcon.Request, resp: falcon.Response, ex: Unavailable, params: object
) -> NoReturn:
    """Answer 503 while the database or the key set cannot be used, and tell the operator why."""
    what, why = ex.args
    log.error("%s cannot be used: %s id=%s", what, why, req.context.id)
    raise falcon.HTTPServiceUnavailable(
        description=f"{what} cannot be used right now; try again", retry_after=RETRY_AFTER
    )


def changed(req: falcon.Request, resp: falcon.Response, ex: Changed, params: object) -> NoReturn:
    """Answer 412 when the task is not the one that If-Match names, with the entity tag that it has."""
    detail = "the task was changed in between; read it again, and send the ETag that it has now"
    raise falcon.HTTPPreconditionFailed(description=detail, headers={"ETag": ex.tag})


def handle_unexpected(
    req: falcon.Request, resp: falcon.Response, ex: Exception, params: object
) -> NoReturn:
    """Answer 500 to a fault of ours: the log gets the traceback, the caller the request id to quote."""
    log.error("unhandled exception id=%s", req.context.id, exc_info=ex)
    raise falcon.HTTPInternalServerError(
        description=f"this is our fault; when you report it, quote {req.context.id}"
    )


# --- App ------------------------------------------------------------------------------------------

METHODS = frozenset(falcon.HTTP_METHODS)


class App(falcon.App):  # type: ignore[type-arg]
    """The WSGI application, and the store that it answers from."""

    store: TaskStore

    def __call__(self, env: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Answer a request. Falcon has 400 for a method that it never heard of, even before routing; TRACE is 405."""
        if env["REQUEST_METHOD"] not in METHODS:
            env["REQUEST_METHOD"] = "TRACE"
        return super().__call__(env, start_response)


def create_app(settings: Settings) -> App:
    """Return the WSGI application: the only place where its parts meet. Raises SettingsError and DatabaseError."""
    tokens, database = Tokens(settings), open_database(settings)
    metrics = [Metrics()] if settings.metrics else []
    store = TaskStore(metrics[0].timed(database) if metrics else database)
    cors = [Cors(settings.cors_origins)] if settings.cors_origins else []
    app = App(
        middleware=[
            RequestContext(settings.trusted_proxies),
            *metrics,
            *cors,
            AuthMiddleware(tokens),
        ]
    )
    app.store = store
    app.req_options.strip_url_path_trailing_slash = True
    app.set_error_serializer(serialize_error)
    app.add_error_handler(Exception, handle_unexpected)
    app.add_error_handler(Unavailable, unavailable)
    app.add_error_handler(Changed, changed)
    tasks = TaskResource(store)
    app.add_route("/api/{user_id}/tasks", tasks, suffix="collection")
    app.add_route("/api/{user_id}/tasks/{task_id}", tasks)
    app.add_route("/api/{user_id}/tasks/{task_id}/complete", TaskCompleteResource(store))
    app.add_route("/healthz", HealthResource())
    app.add_route("/readyz", ReadyResource(store))
    if metrics:
        app.add_route("/metrics", *metrics)
    app.add_route("/openapi.json", FileResource("openapi.json", falcon.MEDIA_JSON))
    app.add_route("/docs", FileResource("docs/api.html", falcon.MEDIA_HTML))
    return app


def wsgi() -> App:
    """Return the application with the environment's settings, for other WSGI servers: `gunicorn 'taskd:wsgi()'`."""
    settings = Settings.load()
    configure_log(settings)
    return create_app(settings)


# --- HTTP -----------------------------------------------------------------------------------------

MAX_HEAD = 64 * 1024  # bytes of a request line with its headers, and of trailers
MAX_HEADERS = 4096  # header lines
MAX_CHUNKED = 8 * MAX_BODY  # bytes of a body with its chunk sizes: one-byte chunks are six each
MAX_CHUNKS = 20 * 1024  # besides those of one byte
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Z-]+"  # RFC 9110, section 5.6.2, without small letters
REQUEST_LINE = re.compile(rb"(%s) ([\x21-\x7e\x80-\xff]+) HTTP/([0-9])\.([0-9])\r\n" % TOKEN)
PRINTABLE = re.compile(rb"[!-~]")  # a TLS hello begins otherwise
HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+;=%-]+)(?::[0-9]{0,5})?"
HTTP_URL = re.compile(rf"(?i:https?)://{HOST}([/?].*)?")
CHUNK_SIZE = re.compile(rb"0*([0-9A-Fa-f]{1,8})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?\r\n")
ONE_BYTE_CHUNKS = re.compile(rb"(?:1\r\n[\x00-\xff]\r\n)+")


def malformed(why: str) -> falcon.HTTPError:
    """Return the error for what is not HTTP/1.1 (RFC 9112)."""
    return falcon.HTTPBadRequest(description=f"send a well-formed HTTP/1.1 request: {why}")


def head_too_large() -> falcon.HTTPError:
    """Return the error for a head that is over a limit."""
    return falcon.HTTPRequestHeaderFieldsTooLarge(
        description=f"send a head of at most {MAX_HEAD} bytes and {MAX_HEADERS} lines"
    )


@lru_cache(1000)
def header_key(name: bytes) -> str:
    """Return a header's name as WSGI has it; "" for one with "_", which WSGI confuses with "-"."""
    return "" if b"_" in name else name.decode("latin-1").upper().replace("-", "_")


class ServerRequest:
    """A request as waitress's task takes it: whole, or refused before the application sees it."""

    url_scheme, request_uri, path, query = "http", "/", "/", ""
    command, version = "-", "1.1"
    refusal: falcon.HTTPError | None = None

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.body = bytearray()

    def get_body_stream(self) -> io.BytesIO:
        """Return the body, to be read from its beginning."""
        return io.BytesIO(self.body)

    def take_line(self, method: str, target: str, major: str, minor: str) -> None:
        """Take the parts of a request line (RFC 9112, section 3). Raises 400 or 505."""
        self.command, self.version = method, "1.0" if minor == "0" else "1.1"
        if major == "0":
            raise malformed("HTTP/0.9 has no headers")
        if major != "1":
            raise falcon.HTTPError(falcon.HTTP_505, description="send the request as HTTP/1.1")
        if url := HTTP_URL.fullmatch(target):
            target = "/" + (url[1] or "").removeprefix("/")
        elif not target.startswith("/") and (method, target) != ("OPTIONS", "*"):
            raise malformed("the target must be a path, or an http URL")
        self.request_uri = target.partition("#")[0]
        path, _, self.query = self.request_uri.partition("?")
        self.path = unquote_to_bytes(path).decode("latin-1") if "%" in path else path

    def take_headers(self, lines: Iterable[tuple[bytes, bytes]]) -> None:
        """Take the headers as WSGI has them: those of the same name become a list."""
        values: dict[str, list[str]] = {}
        for name, value in lines:
            values.setdefault(header_key(name), []).append(value.decode("latin-1").strip(" \t"))
        self.headers = {key: ", ".join(several) for key, several in values.items() if key}
        options = [one.strip() for one in self.headers.get("CONNECTION", "").lower().split(",")]
        closes = "close" in options or (self.version == "1.0" and "keep-alive" not in options)
        self.headers["CONNECTION"] = "close" if closes else "keep-alive"

    def check_headers(self) -> None:
        """Raise 400 or 413 for headers that llhttp lets pass."""
        host = self.headers.get("HOST")
        if self.version == "1.1" if host is None else not re.fullmatch(HOST, host):
            raise malformed("there must be one Host header, with a host and perhaps a port")
        coding = self.headers.get("TRANSFER_ENCODING", "").lower()
        if coding and (coding != "chunked" or self.version == "1.0"):
            raise malformed("the only Transfer-Encoding is chunked, and only in HTTP/1.1")
        if int(self.headers.get("CONTENT_LENGTH", "0")) > MAX_BODY:
            raise too_large()

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for leave to send the body."""
        return self.version == "1.1" and self.headers.get("EXPECT", "").lower() == "100-continue"


class RequestReader:
    """Reads one request after another from the bytes of a connection.

    llhttp parses the headers, and trailers. The request line is read here, because llhttp refuses
    methods that it does not know, and so is the body, because llhttp refuses `f ; extension`. All
    steps cost time in proportion to the bytes, and keep no more of them than the limits above.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self.next()

    def next(self) -> None:
        """Expect a new request, of which some may have been received already."""
        self.request, self.complete, self.waits = ServerRequest(), False, "request"
        self._step: Callable[[], bool] = self._read_line
        self._taken = self._chunks = self._length = 0
        self._lines: list[tuple[bytes, bytes]] = []

    @property
    def has_more(self) -> bool:
        """Whether more was received than the request."""
        return bool(self._buffer)

    def receive(self, data: bytes) -> None:
        """Read on until the request is complete, perhaps refused, or needs more bytes."""
        self._buffer += data
        try:
            while not self.complete and self._step():
                pass
        except falcon.HTTPError as ex:
            self._refuse(ex)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header from llhttp."""
        self._lines.append((name, value))

    def on_headers_complete(self) -> None:
        """Take note that llhttp has read the empty line."""
        self._ended = True

    def _refuse(self, refusal: falcon.HTTPError) -> None:
        """End the request, and the connection: where the next request would begin is not known."""
        if self.waits != "body":
            self.request.take_headers(self._lines)
        self.request.headers["CONNECTION"] = "close"
        self.request.refusal, self.complete = refusal, True

    def _take(self, size: int) -> bytes:
        """Cut bytes off the buffer. Raises 413 or 431 when there were too many."""
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        self._taken += len(taken)
        if self._taken > (MAX_CHUNKED if self.waits == "body" else MAX_HEAD):
            raise too_large() if self.waits == "body" else head_too_large()
        return taken

    def _read_line(self) -> bool:
        """Read the request line; empty ones before it do not count (RFC 9112, section 2.2)."""
        self._take(len(self._buffer) - len(self._buffer.lstrip(b"\r\n")))
        if not self._buffer:
            return False
        self.waits = "head"
        line, newline, _ = self._buffer.partition(b"\n")
        found = REQUEST_LINE.fullmatch(line + newline) if newline else None
        if not found and (newline or not PRINTABLE.match(line)):
            raise malformed("its first line must be METHOD /path HTTP/1.1")
        if not found:
            return len(line) > MAX_HEAD and bool(self._take(len(line)))
        self._take(len(line) + 1)
        self.request.take_line(*(part.decode("latin-1") for part in found.groups()))
        self._begin_fields(self._read_head)
        return True

    def _begin_fields(self, step: Callable[[], bool]) -> None:
        self._llhttp = httptools.HttpRequestParser(self)
        self._llhttp.feed_data(b"PUT / HTTP/1.1\r\n")
        self._tail, self._ended, self._step = b"\r\n", False, step

    def _read_fields(self) -> bool:
        """Give llhttp the header lines that have come, no more; return whether they have ended."""
        received = self._tail + self._buffer
        end = received.find(b"\r\n\r\n")
        size = len(received) if end < 0 else end + 4
        piece = self._take(size - len(self._tail))
        self._tail = received[:size][-3:]
        try:
            self._llhttp.feed_data(piece)
        except httptools.HttpParserUpgrade:
            pass  # taskd speaks nothing else, and answers as if it was not asked to
        except httptools.HttpParserError as ex:
            raise malformed(str(ex).replace("`", "")) from None
        if len(self._lines) > MAX_HEADERS:
            raise head_too_large()
        return self._ended

    def _read_head(self) -> bool:
        if not self._read_fields():
            return False
        request = self.request
        request.take_headers(self._lines)
        request.check_headers()
        self.waits, self._taken = "body", 0
        self._length = int(request.headers.get("CONTENT_LENGTH", "0"))
        chunked = request.headers.pop("TRANSFER_ENCODING", None)
        self._step = self._read_chunks if chunked else self._read_body
        return True

    def _read_body(self) -> bool:
        body = self.request.body
        body += self._take(self._length - len(body))
        self.complete = len(body) == self._length
        return False

    def _read_chunks(self) -> bool:
        """Read the chunks that have come whole (RFC 9112, section 7.1)."""
        at = end = 0
        while self._step == self._read_chunks and (end := self._read_chunk(at)) > at:
            at = end
        if len(self.request.body) > MAX_BODY or self._chunks > MAX_CHUNKS:
            raise too_large()
        self._take(at)
        return self._step != self._read_chunks

    def _read_chunk(self, at: int) -> int:
        """Read a chunk, or several of one byte, and return where it ends; if it is not whole, `at`."""
        data, body = self._buffer, self.request.body
        self._chunks += 1
        if several := ONE_BYTE_CHUNKS.match(data, at):
            body += several[0][3::6]
            return several.end()
        found = CHUNK_SIZE.match(data, at)
        if not found:
            if b"\n" in data[at:] or len(data) - at > MAX_HEAD:
                raise malformed("a chunk must begin with its size in hexadecimal digits")
            return at
        start, size = found.end(), int(found[1], 16)
        if size == 0:
            self._begin_fields(self._read_trailers)
            return start
        if len(body) + size > MAX_BODY:
            raise too_large()
        end = start + size
        if len(data) < end + 2:
            return at
        if data[end : end + 2] != b"\r\n":
            raise malformed("a chunk must be as long as its size says")
        body += data[start:end]
        return end + 2

    def _read_trailers(self) -> bool:
        """Read trailers, which nobody looks at."""
        self.complete = self._read_fields()
        self.request.headers["CONTENT_LENGTH"] = str(len(self.request.body))
        return False


# --- Server ---------------------------------------------------------------------------------------

RECEIVE = 4096  # bytes read at once
FREE_READS = 64  # reads of a request before a client that sends a few bytes at a time must pause
PAUSE = 0.05  # seconds
TURN = 1024 * 1024  # bytes sent to one client before the others have their turn
DISCARD = 1024 * 1024  # bytes read after a refusal, so that the client comes to read the answer
MAX_UNSENT = 32 * 1024 * 1024  # bytes in memory of all answers that clients have not taken yet
OVERFLOW = 4 * 1024 * 1024  # bytes over which waitress would put an answer into a file
MAX_CONNECTIONS = 16_000
OVER_LIMIT = 10  # connections that are accepted even if all others are being answered
ACCEPTED = 500  # connections at most in one go
BACKLOG = 1024
DRAIN = 9.0  # seconds within which what was sent is answered after SIGTERM
QUIET = 0.1  # seconds without anything to do before the end
POLL_SECOND = 1 if hasattr(select, "epoll") else 1000  # select.poll takes milliseconds
READ = select.POLLIN | select.POLLPRI  # the latter is urgent data
DEADLINES = {  # what a connection waits for from its client, and for how many seconds
    "request": 120.0,
    "head": 10.0,
    "body": 30.0,
    "reader": 60.0,  # since the client last took a part of its answer
    "end": 10.0,
}
EVENTS = {  # what the poll object looks for meanwhile
    "request": READ,
    "head": READ,
    "body": READ,
    "reader": select.POLLOUT,
    "end": select.POLLIN,
    None: 0,
}


class ServerTask(waitress.task.WSGITask):
    """The answer to a request."""

    wrote_header: bool

    def start(self) -> None:
        """Close the connection after this answer if it is the last before the server stops."""
        super().start()
        if self.channel.server.stopping and not self.channel.has_more():
            self.request.headers["CONNECTION"] = "close"

    def get_environment(self) -> dict[str, Any]:
        """Return the WSGI environment, with the error if the request is refused."""
        environ: dict[str, Any] = super().get_environment()
        environ["taskd.refusal"] = self.request.refusal
        return environ

    def set_close_on_finish(self) -> None:
        """Close the connection at the end; waitress would also after a 304, which has no length."""
        if self.has_body or self.request.headers["CONNECTION"] == "close":
            super().set_close_on_finish()

    def write(self, data: bytes) -> None:
        """Send the head and the whole of a short body in one packet."""
        whole = self.complete and self.has_body and self.content_length == len(data)
        if self.wrote_header or not whole:
            super().write(data)
        else:
            self.channel.write_soon(self.build_response_header() + data)
            self.wrote_header, self.content_bytes_written = True, len(data)


class ServerChannel(waitress.channel.HTTPChannel):
    """A client's connection. Its next request is read when the client has taken the last answer.

    `answer` runs in the event loop or in a worker thread, all else in the event loop. Meanwhile
    `waits` is None, and the poll object looks for nothing: the client can only be heard to leave.
    """

    outbufs: list[Any]
    waits: str | None = None
    _events = _turn = _reads = _received = _queued = 0
    _served = _closes = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._reader = RequestReader()
        self.sendbuf_len = 256 * 1024  # bytes taken from a file at once
        self.wait_for("request")

    def add_channel(self, map: Any = None) -> None:  # noqa: A002
        """Get to know the poll object."""
        super().add_channel(map)
        self.server.poll.register(self._fileno, 0)

    def del_channel(self, map: Any = None) -> None:  # noqa: A002
        """Be forgotten: the connection is about to be closed."""
        if self._fileno is not None:
            self.server.deadlines.move(self, self.waits, None)
            self.server.poll.unregister(self._fileno)
        super().del_channel(map)

    def wait_for(self, what: str | None) -> None:
        """Note whose turn it is: what the client has to do now, or None for the server's."""
        if what != self.waits or what in ("request", "reader"):
            self.server.deadlines.move(self, self.waits, what)
            self.waits = what
        self.watch(EVENTS[what])

    def watch(self, events: int) -> None:
        """Have the poll object look for these events."""
        if events != self._events:
            self._events = events
            self.server.poll.modify(self._fileno, events)

    def has_more(self) -> bool:
        """Return whether the client has sent more than the request that is being answered."""
        if self._reader.has_more:
            return True
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def handle_read(self) -> None:
        """Read what the client sends, or discard it after a refusal."""
        if self.waits is None:
            return  # the request before comes first
        try:
            data = self.socket.recv(RECEIVE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._reads, self._received = self._reads + 1, self._received + len(data)
        if not data or (self.waits == "end" and self._received > DISCARD):
            self.handle_close()
        elif self.waits != "end":
            self._receive(data)
        if self.waits and self._reads > FREE_READS + self._received // 512:
            self.watch(0)
            self.server.pause(self)

    def resume(self) -> None:
        """Read again after a pause."""
        if self.connected:
            self.watch(EVENTS[self.waits])

    def handle_expt(self) -> None:
        """Close a connection with urgent data, which HTTP has not."""
        self.close_early("urgent data came")

    def _receive(self, data: bytes) -> None:
        reader, self._turn = self._reader, TURN
        reader.receive(data)
        if reader.complete:
            self.server.deadlines.move(self, self.waits, None)
            self.waits = None
            self.server.ready.append(self)
            return
        if reader.waits == "body" and reader.request.expects_continue:
            del reader.request.headers["EXPECT"]
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if reader.waits != self.waits:
            self.wait_for(reader.waits)

    def answer(self) -> None:
        """Answer the request. Raises WouldBlock when a worker thread has to."""
        task, self._turn = ServerTask(self, self._reader.request), TURN
        try:
            if self.connected:
                task.service()
        except waitress.channel.ClientDisconnected:
            task.close_on_finish = True
        except Exception:
            log.exception("unhandled exception outside the application")
            task.close_on_finish = True
        self._closes = task.close_on_finish

    def service(self) -> None:
        """Answer the request in a worker thread."""
        self.answer()
        self.server.finish(self)

    def answered(self) -> None:
        """Go on when the request was answered, and the client has taken the answer or some of it."""
        if not self.connected:
            return
        if self.total_outbufs_len:
            self.wait_for("reader")
            self._queued = self._untaken()
            return
        if self.outbufs[-1].buf:  # it would keep the memory of what it has sent
            self.outbufs, self.current_outbuf_count = (
                [waitress.buffers.OverflowableBuffer(OVERFLOW)],
                0,
            )
        if self._closes:
            self._end()
            return
        self._reader.next()
        self._reads = self._received = 0
        self._served = True
        self.wait_for("request")
        if self._reader.has_more:
            self._receive(b"")

    def _end(self) -> None:
        """Close the connection, after a while if the client may still be sending (RFC 9112, 9.6)."""
        if self._reader.request.refusal is None and not self._reader.has_more:
            self.handle_close()
            return
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        self.wait_for("end")

    def handle_write(self) -> None:
        """Send what the client takes."""
        self._turn = TURN
        try:
            if self._flush_some():
                self.answered()
        except OSError:
            self.handle_close()

    def send(self, data: bytes, do_close: bool = True) -> int:
        """Send some of the data; nothing when the others must have their turn."""
        sent: int = super().send(data, do_close) if self._turn > 0 else 0
        self._turn -= sent
        return sent

    def write_soon(self, data: Any) -> int:
        """Send what the client takes at once, and keep the rest. No thread waits for a client."""
        if not self.connected:
            raise waitress.channel.ClientDisconnected
        sent = 0
        if isinstance(data, bytes) and not self.total_outbufs_len:
            sent = self.send(data, do_close=False)
        if sent < len(data):
            super().write_soon(data[sent:] if sent else data)
        return len(data)

    def _flush_outbufs_below_high_watermark(self) -> None:
        """Keep what is unsent, which is one answer at most, instead of waiting."""

    def unsent(self) -> int:
        """Return how many bytes are kept in memory until the client takes them."""
        return sum(len(buf) for buf in self.outbufs if not hasattr(buf, "block_size"))

    def _untaken(self) -> int:
        """Return how many bytes the kernel has sent, or keeps, that the client has not taken."""
        try:
            return int.from_bytes(
                fcntl.ioctl(self.socket, termios.TIOCOUTQ, b"\0" * 4), sys.byteorder
            )
        except OSError:
            return 0

    def close_early(self, why: str) -> None:
        """Close the connection, and tell the operator why."""
        log.info("connection closed: %s client=%s", why, self.addr[0])
        self.handle_close()

    def expire(self) -> None:
        """Close the connection when its client has had its time."""
        if self.waits == "reader" and self._untaken() < self._queued:
            self._queued = self._untaken()
            self.wait_for("reader")  # the client has taken some of what the kernel has
        elif self.waits == "end" or (self.waits == "request" and self._served):
            self.handle_close()
        else:
            self.close_early(f"it waited too long for the {self.waits}")


class Deadlines:
    """Which connections wait for their client, for what, and since when; the first waits longest."""

    def __init__(self) -> None:
        self._since: dict[str, OrderedDict[ServerChannel, float]] = {
            kind: OrderedDict() for kind in DEADLINES
        }

    def move(self, channel: ServerChannel, before: str | None, now: str | None) -> None:
        """Let a connection wait for something else, or for nothing, from now on."""
        if before:
            self._since[before].pop(channel, None)
        if now:
            self._since[now][channel] = time.monotonic()

    def waiting(self, kind: str) -> list[ServerChannel]:
        """Return the connections that wait for this, the longest first."""
        return list(self._since[kind])

    def overdue(self) -> list[ServerChannel]:
        """Return the connections whose client has had its time."""
        found: list[ServerChannel] = []
        for kind, waiting in self._since.items():
            latest = time.monotonic() - DEADLINES[kind]
            over = itertools.takewhile(lambda entry: entry[1] < latest, waiting.items())  # noqa: B023
            found += [channel for channel, _ in over]
        return found

    def longest(self, before: float) -> ServerChannel | None:
        """Return the connection that waits longest, if one has waited since before that time."""
        firsts = [next(iter(waiting.items())) for waiting in self._since.values() if waiting]
        channel, since = min(firsts, key=operator.itemgetter(1), default=(None, before))
        return channel if since < before else None


class Server(waitress.server.TcpWSGIServer):
    """waitress, but requests are answered in the event loop: the thread that serves the sockets.

    Python's threads take turns at a cost several times that of a request. So only a request that
    would block (`WouldBlock`) is answered in a worker thread. SIGTERM, which waitress ignores, ends
    the server when all that was sent is answered.
    """

    channel_class = ServerChannel

    def __init__(self, app: App, **adjustments: Any) -> None:
        self.poll = select.epoll() if hasattr(select, "epoll") else select.poll()
        self.deadlines, self.stopping = Deadlines(), False
        self.ready: deque[ServerChannel] = deque()  # with a request to be answered
        self._finished: deque[ServerChannel] = deque()  # answered by a worker thread
        self._paused: list[ServerChannel | Server] = []
        self._resume_at = self._warn_at = 0.0
        self._knocking = False  # clients wait to be accepted
        super().__init__(app, **adjustments)
        for descriptor in self._map:  # the listening socket, and the trigger that ends a wait
            self.poll.register(descriptor, select.POLLIN)

    def finish(self, channel: ServerChannel) -> None:
        """Take note, from a worker thread, that a request is answered."""
        self._finished.append(channel)
        self.trigger.pull_trigger()

    def pause(self, paused: ServerChannel | Server) -> None:
        """Resume a connection, or accepting others, in a while."""
        if not self._paused:
            self._resume_at = time.monotonic() + PAUSE
        self._paused.append(paused)

    def handle_accept(self) -> None:
        """Accept clients after the events at hand, which might be about descriptors of the same number."""
        self._knocking = True

    def stop(self, *_: object) -> None:
        """Ask the server to stop; safe to call from a signal handler, and more than once."""
        if not self.stopping:
            self.stopping = True
            self.trigger.pull_trigger()

    def run(self) -> None:
        """Serve until `stop`, then answer every request that was sent."""
        thread_state.in_event_loop = True
        while not self.stopping:
            self._serve_once(timeout=1)
        for _ in range(BACKLOG // ACCEPTED + 1):
            self._accept()  # whom the kernel has let in already
        self.poll.unregister(self._fileno)
        self.del_channel()
        self.socket.close()
        self._paused = [paused for paused in self._paused if paused is not self]
        self._drain()
        self.task_dispatcher.shutdown(timeout=0.5)
        wasyncore.close_all(self._map)

    def _drain(self) -> None:
        end, last = time.monotonic() + DRAIN, time.monotonic()
        while time.monotonic() < min(end, last + QUIET):
            worked = self._serve_once(timeout=QUIET / 5)
            channels = self.active_channels.values()
            if worked or any(channel.waits in (None, "reader") for channel in channels):
                last = time.monotonic()

    def _serve_once(self, timeout: float) -> bool:
        """Serve the sockets that are ready, and return whether a request was answered."""
        timeout = 0 if self.ready else min(timeout, PAUSE) if self._paused else timeout
        for descriptor, events in self.poll.poll(timeout * POLL_SECOND):
            if descriptor in self._map:
                wasyncore.readwrite(self._map[descriptor], events)
        if self._knocking:
            self._accept()
        self._keep_time()
        worked = len(self._finished) + len(self.ready)
        for _ in range(len(self._finished)):
            self._answered(self._finished.popleft())
        for _ in range(len(self.ready)):
            self._answer(self.ready.popleft())
        return worked > 0

    def _answer(self, channel: ServerChannel) -> None:
        try:
            channel.answer()
        except WouldBlock:
            channel.watch(0)
            self.task_dispatcher.add_task(channel)
        else:
            self._answered(channel)

    def _answered(self, channel: ServerChannel) -> None:
        channel.answered()
        if channel.waits == "reader":
            unsent = {one: one.unsent() for one in self.deadlines.waiting("reader")}
            while sum(unsent.values()) > MAX_UNSENT:
                slowest = next(iter(unsent))
                slowest.close_early("others need the memory of its unread answer")
                del unsent[slowest]

    def _keep_time(self) -> None:
        for channel in self.deadlines.overdue():
            channel.expire()
        if self._paused and time.monotonic() >= self._resume_at:
            resumed, self._paused = self._paused, []
            for paused in resumed:
                paused.resume()

    def resume(self) -> None:
        """Accept again after a pause."""
        self.poll.modify(self._fileno, select.POLLIN)

    def _accept(self) -> None:
        """Accept clients. At the limit each takes the place of one that waited before this."""
        self._knocking, started = False, time.monotonic()
        room = len(self.active_channels) < self.adj.connection_limit + OVER_LIMIT
        for _ in range(ACCEPTED if room or self._make_room(started) else 0):
            try:
                connection, address = self.socket.accept()
            except BlockingIOError:
                return
            except OSError:  # the client has left, or this process has no more descriptors
                self._make_room(started)
                break
            full = len(self.active_channels) >= self.adj.connection_limit
            room = not full or self._make_room(started)
            with contextlib.suppress(OSError):
                self.set_socket_options(connection)
            ServerChannel(self, connection, address, self.adj, map=self._map)
            if not room:
                break
        self.poll.modify(self._fileno, 0)
        self.pause(self)

    def _make_room(self, before: float) -> bool:
        """Close the connection that waits longest for its client, at least since then, if any."""
        channel = self.deadlines.longest(before)
        if channel:
            channel.handle_close()
        if time.monotonic() > self._warn_at:
            self._warn_at = time.monotonic() + 10
            log.warning("too many connections: each new one closes the one that is idle longest")
        return channel is not None


def connection_limit(threads: int) -> int:
    """Return how many connections leave enough descriptors for the database, lists and the log."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(10, min(MAX_CONNECTIONS, descriptors - 3 * threads - 40))


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there, or raise SettingsError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, OverflowError, UnicodeError) as ex:
        raise SettingsError(
            f"TASKD_HOST, TASKD_PORT: cannot listen on {host}:{port}: {ex}"
        ) from None


def serve(app: App, listener: socket.socket, settings: Settings) -> None:
    """Serve the application on waitress until SIGTERM or SIGINT."""
    server = Server(
        app,
        _sock=listener,
        bind_socket=False,
        sockinfo=(listener.family, listener.type, listener.proto, listener.getsockname()),
        threads=settings.threads,
        ident=None,  # no Server header
        connection_limit=connection_limit(settings.threads),
        outbuf_overflow=OVERFLOW,
        clear_untrusted_proxy_headers=False,  # taskd reads none
        log_socket_errors=False,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.stop)
    host = f"[{server.effective_host}]" if ":" in server.effective_host else server.effective_host
    line = f"taskd: listening on http://{host}:{server.effective_port}"  # told at every level of the log
    if settings.log_format == "json":
        line = JsonLines().format(logging.makeLogRecord({"levelname": "INFO", "msg": line}))
    print(
        f"{line}\n", end="", file=sys.stderr, flush=True
    )  # in one write: somebody may wait for this line
    server.run()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def main() -> int:
    """Serve with the environment's settings, and return the exit status: 2 when they cannot be used."""
    try:
        settings = Settings.load()
        listener = listen(settings.host, settings.port)
        app = create_app(settings)
    except (SettingsError, DatabaseError) as ex:
        print(
            "taskd:", *str(ex).splitlines(), file=sys.stderr
        )  # one line, whatever a path may hold
        return 2
    configure_log(settings)
    if settings.jwks_url and not (settings.issuer and settings.audience):
        log.warning(
            "TASKD_JWKS_URL without TASKD_ISSUER and TASKD_AUDIENCE takes tokens meant for other services"
        )
    serve(app, listener, settings)
    app.store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""taskd: a JWT-protected task API for many users, in one file.

Better Auth logs people in; taskd verifies the token that it hands out and serves that user's tasks, nobody else's.
A request goes through the chapters from top to bottom: settings, tokens, bodies, store, middleware, resources,
errors, app, server. Importing this module does nothing; `create_app` builds everything.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import resource
import signal
import socket
import sqlite3
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import falcon
import jwt
import msgspec
import peewee
import waitress.channel
import waitress.parser
import waitress.server
import waitress.task
from msgspec import UNSET, Meta, Struct, UnsetType
from waitress import wasyncore

__version__ = "0.1.0"

log = logging.getLogger("taskd")

# --- Settings -------------------------------------------------------------------------------------------------------

MIN_SECRET = 32  # bytes; RFC 7518, section 3.2: an HS256 key is at least as long as the hash
PUBLIC_SECRET = "better-auth-secret-12345678901234567890"  # what Better Auth signs with when given none
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
            raise ValueError('must look like "2:new,1:old", with a different whole number before each secret')
        secrets[version] = _secret(secret.strip())
    return tuple(secrets.values())


def _port(text: str) -> int:
    if int(text) > 65535:  # getaddrinfo would take 65536 for 0
        raise ValueError("must be at most 65535")
    return int(text)


def _split(text: str) -> tuple[str, ...]:
    return tuple(re.split(r"[,\s]+", text.strip(", ")))


def _setting(
    variable: str,
    default: Any,
    about: str,
    pattern: str = "(?s).+",
    parse: Callable[[str], Any] = str,
    secret: bool = False,
) -> Any:
    metadata = {"variable": variable, "about": about, "pattern": pattern, "parse": parse, "secret": secret}
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an operator can change: each with its environment variable, default, meaning and form, declared once."""

    secret: str | None = _setting(
        "BETTER_AUTH_SECRET", None, "the secret shared with Better Auth", parse=_secret, secret=True
    )
    secrets: tuple[str, ...] = _setting(
        "BETTER_AUTH_SECRETS", (), 'rotation: "2:new,1:old"; all verify, the first signs', parse=_secrets, secret=True
    )
    database_url: str = _setting(
        "DATABASE_URL", "sqlite:///taskd.db", "sqlite:/// and the path of a file", r"sqlite:///(?!:memory:)[^?#\0]+"
    )
    host: str = _setting("TASKD_HOST", "127.0.0.1", "a host name or address to listen on", r"[^\s/]+")
    port: int = _setting("TASKD_PORT", 8000, "a port from 1 to 65535, or 0 for any free one", "[0-9]{1,5}", _port)
    threads: int = _setting("TASKD_THREADS", 16, "a number of threads from 2 to 99", "[2-9]|[1-9][0-9]", int)
    cors_origins: tuple[str, ...] = _setting(
        "TASKD_CORS_ORIGINS",
        (),
        "origins such as https://a.example, with commas",
        rf"{ORIGIN}([,\s]+{ORIGIN})*,?",
        _split,
    )
    jwks_url: str | None = _setting(
        "TASKD_JWKS_URL", None, "https, or http to this machine: Better Auth's /api/auth/jwks", KEY_SET_URL
    )
    issuer: str | None = _setting("TASKD_ISSUER", None, "the iss claim that a token must have")
    audience: str | None = _setting("TASKD_AUDIENCE", None, "the aud claim that a token must have")
    log_level: str = _setting("TASKD_LOG", "info", "debug, info, warning or error", "debug|info|warning|error")

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ, dotenv: Path = Path(".env")) -> Settings:
        """Return the settings of the environment and, for variables not set there, of `.env`.

        An empty value is none. Raises SettingsError for a value that cannot be used.
        """
        given = {**_read_dotenv(dotenv), **{name: value for name, value in environ.items() if value}}
        fields = [field for field in dataclasses.fields(cls) if given.get(field.metadata["variable"])]
        return cls(**{field.name: _parse(given[field.metadata["variable"]], **field.metadata) for field in fields})

    @property
    def database(self) -> str:
        """The path of the database file."""
        return self.database_url.removeprefix("sqlite:///")


def _parse(text: str, *, variable: str, about: str, pattern: str, parse: Callable[[str], Any], secret: bool) -> Any:
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


# --- Tokens ---------------------------------------------------------------------------------------------------------

LEEWAY = 10  # seconds that this clock and Better Auth's may differ
MAX_TOKEN = 16 * 1024  # characters; Better Auth's have a few hundred
REMEMBERED = 1000  # verified tokens
COMPACT_JWS = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+){2}")  # RFC 7515, section 7.1: no padding
LOGIN_TYPES = ("jwt", "at+jwt")  # RFC 8725, section 3.11: Better Auth signs its session cookies too, of another type
ASYMMETRIC = ("EdDSA", "ES256", "ES512", "RS256", "PS256")  # what Better Auth's jwt() plugin can sign with
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


class Unavailable(Exception):
    """What is needed to answer cannot be used right now; the arguments say what and why."""


class Blocked(BaseException):
    """This thread must not wait, and would have to; nothing was done, so the request can start again in another."""


class _Thread(threading.local):
    hurried = False  # True in the thread that serves the sockets


this_thread = _Thread()


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
        if this_thread.hurried:
            raise Blocked
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
    return [key for key in keys if key.algorithm_name in ASYMMETRIC and not key.Algorithm.check_key_length(key.key)]


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
        self._key_set = KeySet(settings.jwks_url, settings.threads // 2) if settings.jwks_url else None
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
            if len(self._verified) >= REMEMBERED:
                self._verified.clear()
            self._verified[token] = user
        return user

    def mint(self, claims: dict[str, Any]) -> str:
        """Return a token with these claims, signed with the first secret."""
        if not self._secrets:
            raise SettingsError(f"BETTER_AUTH_SECRET is missing, without which no token can be signed; {MAKE_ONE}")
        return self._jwt.encode(claims, self._secrets[0], "HS256")

    def _verify(self, token: str) -> User:
        if len(token) > MAX_TOKEN:
            raise TokenError(f"the token is longer than {MAX_TOKEN} characters")
        if token.count(".") == 1:
            raise TokenError("this is no JWT but perhaps a session token; get a JWT from /api/auth/token")
        if not COMPACT_JWS.fullmatch(token):
            raise TokenError("this is no JWT: it must be three base64url parts with dots between them")
        try:
            header = _json_object(jwt.utils.base64url_decode(token.partition(".")[0]))
            if not {"crit", "b64"}.isdisjoint(header) or str(header.get("typ", "JWT")).lower() not in LOGIN_TYPES:
                raise jwt.InvalidTokenError
            return _user(self._decode(token, header.get("alg"), str(header.get("kid"))))
        except jwt.MissingRequiredClaimError as ex:
            raise TokenError(f"the {ex.claim} claim is missing: this is not the token of a login") from None
        except (jwt.InvalidTokenError, ValueError) as ex:
            raise TokenError(REFUSALS.get(type(ex), "the token is malformed")) from None

    def _decode(self, token: str, alg: object, kid: str) -> dict[str, Any]:
        """Return the claims. The key pins the algorithm: the header only says which key to try (RFC 8725, 3.1)."""
        for key, algorithm in self._keys(alg, kid):
            try:
                return self._jwt.decode(
                    token, key, [algorithm], issuer=self._issuer, audience=self._audience, leeway=LEEWAY
                )
            except jwt.InvalidSignatureError as ex:
                mismatch = ex  # perhaps another of the secrets made it
        raise mismatch

    def _keys(self, alg: object, kid: str) -> list[tuple[Any, str]]:
        if alg == "HS256" and self._secrets:
            return [(secret, "HS256") for secret in self._secrets]
        if alg not in ASYMMETRIC:
            raise TokenError("alg must be HS256" if self._secrets else f"alg must be one of {', '.join(ASYMMETRIC)}")
        if not self._key_set:
            raise TokenError("signed with Better Auth's own key, which this server does not know: set TASKD_JWKS_URL")
        key = self._key_set.find(kid)
        if key is None or key.algorithm_name != alg:
            raise TokenError("the key set has no key for this kid and alg")
        return [(key, key.algorithm_name)]


def _user(claims: dict[str, Any]) -> User:
    for name in ("exp", "nbf", "iat"):  # RFC 7519, section 2: a number; PyJWT would take a string of digits too
        if name in claims and type(claims[name]) not in (int, float):
            raise TokenError(f"{name} must be a number")
    subject = claims["sub"]
    if not subject or any("\ud800" <= character <= "\udfff" for character in subject):
        raise TokenError("sub must name a user")
    texts = {name: claims[name] for name in ("email", "name") if isinstance(claims.get(name), str)}
    return User(subject, claims["exp"], **texts)


# --- Bodies ---------------------------------------------------------------------------------------------------------

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
        super().__init__(description="; ".join(f"{fault.field} {fault.message}" for fault in faults))
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
        return _decode(body.decode(), kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as ex:
        raise falcon.HTTPBadRequest(description=f"the body must be JSON in UTF-8: {ex}") from None


def content(req: falcon.Request) -> bytes:
    """Return the request's body, whatever its type, or raise 413."""
    stream = req.stream if req.env.get("wsgi.input_terminated") else req.bounded_stream
    body: bytes = stream.read(MAX_BODY + 1)
    if len(body) > MAX_BODY:
        raise falcon.HTTPContentTooLarge(description=f"send a body of at most {MAX_BODY} bytes")
    return body


def _decode(text: str, kind: type[Body]) -> Body:
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
    faults = [Fault(name, "is missing") for name, field in fields.items() if field.required and name not in members]
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


# --- Store ----------------------------------------------------------------------------------------------------------

SCHEMA = Path(__file__).with_name("schema.sql")
BUSY = 4.0  # seconds that a write waits for another process which holds the database's write lock
QUEUE = 4.0  # seconds that it waits before that for the writes of this process
SLOT = 0.25  # seconds that it waits for leave to wait, so that waiting writes never take every thread
SLOW = 0.005  # seconds; a disk on which a write takes longer must not hold up the thread that serves the sockets


class DatabaseError(Exception):
    """The database cannot be opened or does not fit schema.sql; the message says which file and why."""


class Task(peewee.Model):
    """A row of schema.sql's table. Statements are built from it; rows never become one, which would cost 100 µs."""

    id = peewee.AutoField()
    user_id = peewee.TextField()
    title = peewee.TextField()
    description = peewee.TextField(null=True)
    completed = peewee.BooleanField(default=False)
    created_at = peewee.TextField()
    updated_at = peewee.TextField()

    class Meta:
        """Where schema.sql keeps it."""

        table_name = "task"
        indexes = ((("user_id", "id"), False),)


class TaskStore:
    """One user's tasks at a time; None means that this user has no such task, and Unavailable that the database is.

    Each method is one SQL statement, compiled once by Peewee and bound to its owner, and is therefore atomic.
    """

    def __init__(self, path: str, waiting: int) -> None:
        """Open the database, creating it if need be; at most `waiting` writes wait at once. Raises DatabaseError."""
        prepare_database(path)
        self._hurried, self._patient = connect(path, timeout=0, cache=16), connect(path, timeout=BUSY)
        try:  # one connection stays open, so that no other needs to set up the log on a disk that is full or locked
            self._patient.execute_sql("SELECT 1 FROM task LIMIT 1").fetchall()
        except peewee.DatabaseError as ex:
            raise DatabaseError(f"{path} cannot be opened: {ex}") from None
        self._slots = threading.BoundedSemaphore(waiting)
        self._turn = threading.Lock()
        self._slow = False
        task = {name: peewee.SQL(f":{name}") for name in ("id", "title", "description", "completed")}
        this, now = self._mine() & (Task.id == task["id"]), peewee.SQL(":now")
        described = peewee.Case(None, [(peewee.SQL(":described"), task["description"])], Task.description)
        new = {"title": task["title"], "description": task["description"], "completed": task["completed"]}
        changed = {
            "title": peewee.fn.COALESCE(task["title"], Task.title),
            "description": described,
            "completed": peewee.fn.COALESCE(task["completed"], Task.completed),
        }
        toggled = peewee.fn.COALESCE(task["completed"], ~Task.completed)
        self._list = self._compile(Task.select().where(self._mine()).order_by(Task.id))
        self._get = self._compile(Task.select().where(this))
        self._add = self._compile(Task.insert(user_id=peewee.SQL(":user_id"), created_at=now, updated_at=now, **new))
        self._change = self._compile(Task.update(updated_at=now, **changed).where(this))
        self._complete = self._compile(Task.update(updated_at=now, completed=toggled).where(this))
        self._remove = self._compile(Task.delete().where(this))

    @staticmethod
    def _mine() -> peewee.Expression:
        """Whose task is this? The one predicate of ownership."""
        return Task.user_id == peewee.SQL(":user_id")

    def _compile(self, query: peewee.Query) -> str:
        if isinstance(query, peewee.ModelInsert | peewee.ModelUpdate | peewee.ModelDelete):
            query = query.returning(Task)
        sql, values = self._patient.get_sql_context().sql(query).query()
        if values:
            raise AssertionError(f"every request would use the same values: {values}")
        return str(sql)

    def list(self, user_id: str) -> TaskList:
        """Return all the user's tasks, oldest first."""
        return self._read(self._list, user_id=user_id)

    def get(self, user_id: str, task_id: int) -> TaskView | None:
        """Return one task."""
        return _first(self._read(self._get, user_id=user_id, id=task_id))

    def add(self, user_id: str, task: NewTask) -> TaskView:
        """Create a task; it is on disk when this returns."""
        new = {"title": task.title, "description": task.description, "completed": task.completed}
        return self._write(self._add, user_id=user_id, now=_now(), **new)[0]

    def change(self, user_id: str, task_id: int, changes: TaskChanges) -> TaskView | None:
        """Change the fields that are given, and return the task as it is now."""
        given = {name: value for name in RULES if (value := getattr(changes, name)) is not UNSET}
        if not given:
            return self.get(user_id, task_id)
        values = {"title": None, "description": None, "completed": None, "described": "description" in given, **given}
        return _first(self._write(self._change, user_id=user_id, id=task_id, now=_now(), **values))

    def complete(self, user_id: str, task_id: int, completed: bool | None) -> TaskView | None:
        """Set whether the task is completed, or toggle it with None, and return the task as it is now."""
        return _first(self._write(self._complete, user_id=user_id, id=task_id, now=_now(), completed=completed))

    def remove(self, user_id: str, task_id: int) -> TaskView | None:
        """Delete the task, and return it as it was."""
        return _first(self._write(self._remove, user_id=user_id, id=task_id))

    def close(self) -> None:
        """Close this thread's connections; the last one of all folds SQLite's log into the database."""
        self._hurried.close()
        self._patient.close()

    def _read(self, sql: str, **values: Any) -> TaskList:
        database = self._hurried if this_thread.hurried else self._patient
        try:
            with peewee.__exception_wrapper__:  # type: ignore[attr-defined]  # the last fetch commits, and can fail
                rows = database.execute_sql(sql, values).fetchall()
        except peewee.DatabaseError as ex:
            if this_thread.hurried and "locked" in str(ex):
                raise Blocked from None
            database.close()  # whatever state the connection is in, the next request starts with a fresh one
            if type(ex) not in (peewee.DatabaseError, peewee.OperationalError):
                raise
            raise Unavailable("the database", str(ex)) from ex
        return [
            TaskView(key, user, title, text, done == 1, new, now) for key, user, title, text, done, new, now in rows
        ]

    def _write(self, sql: str, **values: Any) -> TaskList:
        """Run a statement alone. Writes queue here, because in SQLite's own waiting they back off and starve."""
        if not this_thread.hurried:
            self._queue_up()
        elif self._slow or not self._turn.acquire(blocking=False):
            raise Blocked
        started = time.monotonic()
        try:
            return self._read(sql, **values)
        finally:
            self._slow = time.monotonic() - started > SLOW
            self._turn.release()

    def _queue_up(self) -> None:
        if not self._slots.acquire(timeout=SLOT):
            raise Unavailable("the database", "too many writes are waiting")
        try:
            if not self._turn.acquire(timeout=QUEUE):
                raise Unavailable("the database", "the writes before this one took too long")
        finally:
            self._slots.release()


TaskList = list[TaskView]


def _first(tasks: TaskList) -> TaskView | None:
    return tasks[0] if tasks else None


def timestamp(when: datetime) -> str:
    """Return a time in UTC as tasks show it (RFC 3339, milliseconds)."""
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _now() -> str:
    return timestamp(datetime.now(UTC))


def connect(path: str, timeout: float, cache: int = 2) -> peewee.SqliteDatabase:
    """Return a database that opens a connection in each thread that uses it.

    A connection waits `timeout` seconds for another's lock, and keeps up to `cache` MB of pages.
    """
    pragmas = {"journal_mode": "wal", "synchronous": "full"}  # reads never wait, and a commit is on disk
    pragmas["cache_size"] = str(-1000 * cache)
    existing = f"{Path(path).absolute().as_uri()}?mode=rw"  # a file that is away is not replaced by an empty one
    return peewee.SqliteDatabase(existing, uri=True, pragmas=pragmas, timeout=timeout)


def prepare_database(path: str) -> None:
    """Make a new file fit schema.sql, readable by its owner alone, or check that an old one does.

    Raises DatabaseError for a file that cannot be opened or does not fit, and leaves it as it was.
    """
    database = peewee.SqliteDatabase(path, timeout=BUSY)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        if not database.table_exists("task"):
            database.connection().executescript(f"BEGIN IMMEDIATE; {SCHEMA.read_text()} COMMIT;")
        differences = schema_differences(database)
    except (peewee.DatabaseError, sqlite3.DatabaseError, OSError) as ex:
        raise DatabaseError(f"{path} cannot be opened: {ex}") from None
    finally:
        database.close()
    if differences:
        raise DatabaseError(f"{path} does not fit schema.sql: {differences}")


def schema_differences(database: peewee.SqliteDatabase) -> str:
    """Return in words what the task table has otherwise than schema.sql; other tables are no concern of ours."""
    model = peewee.SqliteDatabase(":memory:")
    model.connection().executescript(SCHEMA.read_text())
    wanted, found = _schema(model), _schema(database)
    model.close()
    lacking = [f"it lacks {part}" for part in sorted(wanted - found)]
    return "; ".join(lacking + [f"it has {part}" for part in sorted(found - wanted) if not part.startswith("index")])


def _schema(database: peewee.SqliteDatabase) -> set[str]:
    """Return the columns and indexes of the task table as SQLite keeps them, without comments and layout."""
    statements = database.execute_sql("SELECT sql FROM sqlite_master WHERE tbl_name = 'task' AND sql IS NOT NULL")
    parts = set()
    for (sql,) in statements.fetchall():
        plain = " ".join(re.sub("--.*", "", sql).split())
        table = plain.startswith("CREATE TABLE")
        parts |= (
            {part.strip(" )") for part in plain.partition("(")[2].split(",")}
            if table
            else {plain.replace("CREATE INDEX", "index")}
        )
    return parts


# --- Middleware -----------------------------------------------------------------------------------------------------

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
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
        if asked != user.id or user.id.encode().decode("latin-1") not in path:  # bytes that are no UTF-8 are U+FFFD
            raise falcon.HTTPForbidden(description="this token is not for the user in the URL; use your own user id")
        req.context.user = user

    def _authenticate(self, authorization: str | None) -> User:
        """Return the user of an Authorization header (RFC 6750, section 2.1), or raise 401 (section 3)."""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not (token := token.strip(" ")):
            raise _unauthorized("send the header Authorization: Bearer <JWT>, with the token from your login")
        try:
            return self._tokens.verify(token)
        except TokenError as ex:
            raise _unauthorized(str(ex), f', error="invalid_token", error_description="{ex}"') from None


def _unauthorized(detail: str, why: str = "") -> falcon.HTTPUnauthorized:
    return falcon.HTTPUnauthorized(description=detail, challenges=[f'Bearer realm="taskd"{why}'])


class Envelope:
    """Give every answer the headers that all have, and every request its id and its line in the log."""

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Take the client's request id if it can stand in a log, else make one, and start the clock."""
        req.context.started = time.perf_counter()
        given = req.get_header("X-Request-ID")
        req.context.id = given if given and REQUEST_ID.fullmatch(given) else os.urandom(8).hex()
        resp.set_headers({
            "X-Request-ID": req.context.id, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
        })  # fmt: skip

    def process_response(self, req: falcon.Request, resp: falcon.Response, resource: object, succeeded: bool) -> None:
        """Log the request: never its token, its query or its body."""
        context = req.context
        milliseconds = (time.perf_counter() - context.started) * 1000
        user = repr(context.user.id) if "user" in context else "-"
        route = req.uri_template or "-"
        log.info("%s %s %s %.1fms id=%s user=%s", req.method, route, resp.status_code, milliseconds, context.id, user)


class Cors(falcon.CORSMiddleware):  # type: ignore[type-arg]
    """Let pages of exactly these origins call taskd, and read its errors (WHATWG Fetch, CORS protocol)."""

    def __init__(self, origins: tuple[str, ...]) -> None:
        super().__init__(allow_origins=origins, expose_headers=CORS_EXPOSED)

    def process_response(self, req: falcon.Request, resp: falcon.Response, resource: object, succeeded: bool) -> None:
        """Add the headers; where Falcon would allow whatever a preflight asks for, allow what taskd reads."""
        allow = resp.get_header("Allow")
        super().process_response(req, resp, resource, succeeded)
        resp.append_header("Vary", "Origin")
        if resp.get_header("Access-Control-Allow-Headers"):
            resp.set_header("Access-Control-Allow-Headers", CORS_ALLOWED)
        if allow:
            resp.set_header("Allow", allow)


# --- Resources ------------------------------------------------------------------------------------------------------

TASK_NUMBER = re.compile(r"[1-9][0-9]{0,18}")
MAX_TASK_NUMBER = 2**63 - 1  # what SQLite can hold
DOCS_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)

Found = TypeVar("Found")


class TaskResource:
    """A user's tasks, and one of them."""

    def __init__(self, store: TaskStore) -> None:
        self._store = store

    def on_get_collection(self, req: falcon.Request, resp: falcon.Response) -> None:
        """List the user's tasks."""
        resp.data = to_json(self._store.list(req.context.user.id))

    def on_post_collection(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Create a task."""
        task = self._store.add(req.context.user.id, read(req, NewTask))
        resp.status = falcon.HTTP_201
        resp.location = f"{req.root_path}/api/{falcon.uri.encode_value(task.user_id)}/tasks/{task.id}"
        resp.data = to_json(task)

    def on_get(self, req: falcon.Request, resp: falcon.Response, task_id: str) -> None:
        """Show a task."""
        resp.data = to_json(found(self._store.get(req.context.user.id, number(task_id))))

    def on_put(self, req: falcon.Request, resp: falcon.Response, task_id: str) -> None:
        """Change the fields that the body names."""
        task = number(task_id)
        resp.data = to_json(found(self._store.change(req.context.user.id, task, read(req, TaskChanges))))

    def on_delete(self, req: falcon.Request, resp: falcon.Response, task_id: str) -> None:
        """Delete a task, and show it as it was."""
        resp.data = to_json(found(self._store.remove(req.context.user.id, number(task_id))))

    on_head_collection = on_get_collection
    on_head = on_get


class TaskCompleteResource:
    """Whether a task is completed."""

    def __init__(self, store: TaskStore) -> None:
        self._store = store

    def on_patch(self, req: falcon.Request, resp: falcon.Response, task_id: str) -> None:
        """Toggle completion, or set it to what the body says."""
        task, body = number(task_id), content(req)
        completed = read(req, Completion, body).completed if body else None
        resp.data = to_json(found(self._store.complete(req.context.user.id, task, completed)))


class HealthResource:
    """Whether the process is alive."""

    public = True

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Say so."""
        resp.data = b'{"status": "ok"}'

    on_head = on_get


class FileResource:
    """A file of this repository that everybody may read."""

    public = True

    def __init__(self, name: str, content_type: str) -> None:
        self._path, self._content_type = Path(__file__).parent / name, content_type

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Show it; it may load and call nothing but this server."""
        resp.content_type, resp.data = self._content_type, self._path.read_bytes()
        resp.set_header("Content-Security-Policy", DOCS_POLICY)

    on_head = on_get


def number(text: str) -> int:
    """Return a task's id from the URL, or raise the 404 of a task that does not exist."""
    if TASK_NUMBER.fullmatch(text) and (task_id := int(text)) <= MAX_TASK_NUMBER:
        return task_id
    return found(None)


def found(task: Found | None) -> Found:
    """Return the task; raise the same 404 for one that is not there and for one that is another user's."""
    if task is None:
        raise falcon.HTTPNotFound(description="you have no task with this id")
    return task


# --- Errors ---------------------------------------------------------------------------------------------------------

RETRY_AFTER = 2  # seconds


DETAILS = {
    404: "there is nothing at this path; tasks are at /api/{user_id}/tasks",
    405: "this path does not know this method; the Allow header lists those that it knows",
}
TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}  # RFC 9110; older Pythons have older names


def problem(status: int, detail: str | None, faults: list[Fault] | None = None) -> bytes:
    """Return the body of an error answer (RFC 9457): the one place where its shape is made."""
    title = TITLES.get(status) or HTTPStatus(status).phrase
    members = {"title": title, "status": status, "detail": detail or DETAILS.get(status), "errors": faults}
    return to_json({name: value for name, value in members.items() if value})


def serialize_error(req: falcon.Request, resp: falcon.Response, ex: falcon.HTTPError) -> None:
    """Write an error as problem+json, whatever the client accepts."""
    resp.content_type = "application/problem+json"
    resp.data = problem(ex.status_code, ex.description, getattr(ex, "faults", None))


def unavailable(req: falcon.Request, resp: falcon.Response, ex: Unavailable, params: object) -> NoReturn:
    """Answer 503 while the database or the key set cannot be used, and tell the operator why."""
    what, why = ex.args
    log.error("%s cannot be used: %s id=%s", what, why, req.context.id)
    raise falcon.HTTPServiceUnavailable(
        description=f"{what} cannot be used right now; try again", retry_after=RETRY_AFTER
    )


def crash(req: falcon.Request, resp: falcon.Response, ex: Exception, params: object) -> NoReturn:
    """Answer 500 to a fault of ours: the log gets the traceback, the caller the request id to quote."""
    log.error("unhandled exception id=%s", req.context.id, exc_info=ex)
    raise falcon.HTTPInternalServerError(description=f"this is our fault; when you report it, quote {req.context.id}")


# --- App ------------------------------------------------------------------------------------------------------------


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
    tokens, store = Tokens(settings), TaskStore(settings.database, settings.threads // 2)
    cors = [Cors(settings.cors_origins)] if settings.cors_origins else []
    app = App(middleware=[Envelope(), *cors, AuthMiddleware(tokens)])
    app.store = store
    app.req_options.strip_url_path_trailing_slash = True
    app.set_error_serializer(serialize_error)
    app.add_error_handler(Exception, crash)
    app.add_error_handler(Unavailable, unavailable)
    tasks = TaskResource(store)
    app.add_route("/api/{user_id}/tasks", tasks, suffix="collection")
    app.add_route("/api/{user_id}/tasks/{task_id}", tasks)
    app.add_route("/api/{user_id}/tasks/{task_id}/complete", TaskCompleteResource(store))
    app.add_route("/healthz", HealthResource())
    app.add_route("/openapi.json", FileResource("openapi.json", falcon.MEDIA_JSON))
    app.add_route("/docs", FileResource("docs/api.html", falcon.MEDIA_HTML))
    return app


def wsgi() -> App:
    """Return the application with the environment's settings, for other WSGI servers: `gunicorn 'taskd:wsgi()'`."""
    settings = Settings.load()
    configure_log(settings.log_level)
    return create_app(settings)


def configure_log(level: str) -> None:
    """Send taskd's and waitress' log lines to stderr, without looking up what no line shows."""
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # as the logging HOWTO's "Optimization" says
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    for logger in (log, logging.getLogger("waitress")):
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    logging.getLogger("waitress.queue").setLevel("ERROR")  # it warns of every request that waits for a thread


# --- Server ---------------------------------------------------------------------------------------------------------

DRAIN = 9.0  # seconds within which what was sent is answered after SIGTERM
ACCEPTED = 500  # connections at most in one go
QUIET = 5  # looks at the sockets, 20 ms apart, that must find nothing to do before the end


class ServerTask(waitress.task.WSGITask):
    """A request, perhaps one that starts again in a worker thread."""

    wrote_header: bool

    def get_environment(self) -> dict[str, Any]:
        """Return the WSGI environment, with the body to be read from its beginning."""
        environ: dict[str, Any] = super().get_environment()
        environ["wsgi.input"].seek(0)
        return environ

    def build_response_header(self) -> bytes:
        """Return the head of the answer; once the server is stopping it closes the connection (RFC 9112, 9.6)."""
        if self.channel.server.stopping and len(self.channel.requests) == 1 and not self.channel.has_unread():
            self.set_close_on_finish()
        head: bytes = super().build_response_header()
        return head

    def write(self, data: bytes) -> None:
        """Send the head and the whole of a short body in one packet."""
        if self.wrote_header or self.content_length != len(data) or not self.complete or not self.has_body:
            super().write(data)
        else:
            self.channel.write_soon(self.build_response_header() + data)
            self.wrote_header, self.content_bytes_written = True, len(data)


class ServerErrorTask(waitress.task.ErrorTask):
    """The answer to what never reaches the application: no HTTP, too large, or in an unknown transfer coding."""

    def execute(self) -> None:
        """Write the error in the shape of all errors; what waitress calls 501 is the client's doing, 400."""
        error = self.request.error
        status = 400 if error.code == 501 else error.code
        body, request_id = problem(status, error.body), os.urandom(8).hex()
        log.info("- - %s id=%s user=-", status, request_id)
        self.status = f"{status} {HTTPStatus(status).phrase}"
        self.response_headers += [("Content-Type", "application/problem+json"), ("X-Request-ID", request_id)]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class ServerParser(waitress.parser.HTTPRequestParser):
    """A request as it comes in; what is ambiguous or no HTTP is 400."""

    def parse_header(self, header_plus: bytes) -> None:
        """Take the request line and the header, or raise ParsingError."""
        try:
            super().parse_header(header_plus)
        except ValueError as ex:  # such as a Content-Length of 5,000 digits
            raise waitress.parser.ParsingError(str(ex)) from None
        if self.chunked and re.search(rb"(?im)^content-length[ \t]*:", header_plus):  # RFC 9112, section 6.3
            raise waitress.parser.ParsingError("Content-Length beside Transfer-Encoding")


class ServerChannel(waitress.channel.HTTPChannel):
    """A client's connection. Its next request waits until the client has taken the last answer."""

    task_class = ServerTask
    error_task_class = ServerErrorTask
    parser_class = ServerParser
    stalled = False

    def has_unread(self) -> bool:
        """Say whether the client has sent more than was read."""
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def send_continue(self) -> None:
        """Invite the body, if one is still to come; waitress would wait for one that never does."""
        if not self.request.completed:
            super().send_continue()

    def handle_write(self) -> None:
        """Send what the client takes; when it has taken all, see to its next request."""
        super().handle_write()
        if self.stalled and not self.total_outbufs_len:
            self.stalled = False
            self.server.add_task(self)

    def _flush_outbufs_below_high_watermark(self) -> None:
        if not this_thread.hurried:
            super()._flush_outbufs_below_high_watermark()


class Server(waitress.server.TcpWSGIServer):
    """waitress, but requests run one after another in the thread that serves the sockets.

    Python's threads take turns at a cost several times that of a request. So only a request that must wait (`Blocked`)
    goes to a worker thread. SIGTERM, which waitress ignores, ends it when all that was sent is answered.
    """

    channel_class = ServerChannel

    def __init__(self, app: App, **adjustments: Any) -> None:
        self._ready: deque[ServerChannel] = deque()
        self.stopping = False
        super().__init__(app, **adjustments)

    def add_task(self, channel: ServerChannel) -> None:
        """Take note that a connection has a request to answer."""
        self._ready.append(channel)

    def handle_accept(self) -> None:
        """Accept whoever is waiting, so that nobody waits for the requests of those who came before."""
        connections, last = -1, len(self._map) + ACCEPTED
        while connections < len(self._map) < last:
            connections = len(self._map)
            super().handle_accept()

    def pull_trigger(self) -> None:
        """Wake the thread that serves the sockets, unless this is the one."""
        if not this_thread.hurried:
            super().pull_trigger()

    def stop(self, *_: object) -> None:
        """Ask the server to stop; safe to call from a signal handler, and more than once."""
        if not self.stopping:
            self.stopping = True
            self.trigger.pull_trigger()

    def run(self) -> None:
        """Serve until `stop`, then answer every request that was sent."""
        this_thread.hurried = True
        while not self.stopping:
            self._serve_once(timeout=1)
        self.handle_accept()  # whom the kernel has let in already
        self.del_channel()
        self.socket.close()
        self._drain()
        self.task_dispatcher.shutdown(timeout=1)
        wasyncore.close_all(self._map)

    def _serve_once(self, timeout: float) -> None:
        wasyncore.loop(0 if self._ready else timeout, use_poll=True, map=self._map, count=1)
        for _ in range(len(self._ready)):
            channel = self._ready.popleft()
            channel.stalled = channel.total_outbufs_len > 0
            if not channel.stalled:
                self._answer(channel)

    def _answer(self, channel: ServerChannel) -> None:
        try:
            channel.service()
        except Blocked:
            self.task_dispatcher.add_task(channel)
        except Exception:
            log.exception("unhandled exception outside the application")
            channel.handle_close()

    def _drain(self) -> None:
        deadline, quiet = time.monotonic() + DRAIN, 0
        while quiet < QUIET and time.monotonic() < deadline:
            self._serve_once(timeout=0.02)
            busy = any(channel.requests or channel.total_outbufs_len for channel in self.active_channels.values())
            quiet = 0 if busy else quiet + 1


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there, or raise SettingsError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, OverflowError, UnicodeError) as ex:
        raise SettingsError(f"TASKD_HOST, TASKD_PORT: cannot listen on {host}:{port}: {ex}") from None


def serve(app: App, listener: socket.socket, threads: int) -> None:
    """Serve the application on waitress until SIGTERM or SIGINT."""
    server = Server(
        app,
        _sock=listener,
        bind_socket=False,
        sockinfo=(listener.family, listener.type, listener.proto, listener.getsockname()),
        threads=threads,
        ident=None,  # no Server header
        connection_limit=max(100, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100),  # idle ones shut nobody out
        max_request_body_size=1024 * 1024,
        max_request_header_size=64 * 1024,
        recv_bytes=128 * 1024,
        clear_untrusted_proxy_headers=False,  # taskd reads none
        log_socket_errors=False,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.stop)
    host = f"[{server.effective_host}]" if ":" in server.effective_host else server.effective_host
    print(f"taskd: listening on http://{host}:{server.effective_port}", file=sys.stderr, flush=True)
    server.run()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def main() -> int:
    """Serve with the environment's settings, and return the exit status: 2 when they cannot be used."""
    try:
        settings = Settings.load()
        Tokens(settings)  # before anything is touched
        listener = listen(settings.host, settings.port)
        app = create_app(settings)
    except (SettingsError, DatabaseError) as ex:
        print("taskd:", *str(ex).splitlines(), file=sys.stderr)  # one line, whatever a path may hold
        return 2
    configure_log(settings.log_level)
    if settings.jwks_url and not (settings.issuer and settings.audience):
        log.warning("TASKD_JWKS_URL without TASKD_ISSUER and TASKD_AUDIENCE takes tokens meant for other services")
    serve(app, listener, settings.threads)
    app.store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""taskd: a JWT-protected task API for many users, in one file.

Better Auth, or another issuer of JWTs, logs people in; taskd verifies their tokens and serves each
user only that user's tasks. Each chapter uses only names of chapters above it, so a request enters
at the end of the file and passes upwards: Server, HTTP, App, Middleware, Resources, Requests and
Bodies, Store. The store runs its statements on the database that `create_app` gives it; the chapter
Database is below the Store, because it uses the models of the tables. The other chapters are used
on the way.

| chapter    | knows                                                                           |
|------------|---------------------------------------------------------------------------------|
| Settings   | the environment and `.env`                                                      |
| Log        | how a log line is formatted                                                     |
| Threads    | which thread a request runs in, and what may block                              |
| Tokens     | JWTs, the secrets, the key set                                                  |
| Fields     | the fields of a task: each is declared once                                     |
| Bodies     | JSON and its validation                                                         |
| Requests   | parameters of lists, cursors, entity tags, idempotency keys                     |
| Store      | one user's tasks, in SQL                                                        |
| Database   | SQLite, PostgreSQL, schema and migrations                                       |
| Metrics    | Prometheus                                                                      |
| Middleware | who may pass; request ids, CORS, the access log                                 |
| Resources  | HTTP methods, status codes and headers                                          |
| Errors     | the one shape of every error                                                    |
| App        | how the parts are put together                                                  |
| HTTP       | one connection's bytes as requests: syntax and limits                           |
| Server     | connections, threads, deadlines, shutdown                                       |
| Start      | the command line, the listening socket, `main`                                  |

Importing this module does nothing: `create_app` builds the application, `serve` the server.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "falcon==4.4.0",
#     "msgspec==0.22.0",
#     "peewee==4.5.3",
#     "prometheus-client==0.26.0",
#     "PyJWT[crypto]==2.15.1",
#     "python-dotenv==1.2.4",
#     "rich==15.0.0",
#     "typer==0.29.2",
#     "waitress==3.0.2",
# ]
# ///

from __future__ import annotations

import base64
import contextlib
import ctypes
import dataclasses
import difflib
import errno
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
import secrets
import select
import shutil
import signal
import socket
import sqlite3
import sys
import tempfile
import termios
import threading
import time
import traceback
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, InvalidStateError, wait
from datetime import UTC, date, datetime, timedelta
from functools import cache, lru_cache, partial
from http import HTTPStatus
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, cast
from urllib.parse import SplitResult, unquote_to_bytes, urlencode, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass
from weakref import WeakValueDictionary

try:
    import falcon
    import jwt
    import msgspec
    import peewee
    import waitress.buffers
    import waitress.channel
    import waitress.server
    import waitress.task
    import waitress.utilities
    from falcon import Request, Response
    from msgspec import UNSET, Meta, Struct
    from waitress import wasyncore
except ModuleNotFoundError as ex:
    if __name__ != "__main__":
        raise
    sys.exit(
        f"taskd: the package {ex.name} is not installed for this Python; "
        "use .venv/bin/python, which `make run` makes, or run: pip install -r requirements.txt"
    )
except KeyboardInterrupt:
    sys.exit(130)

__version__ = "0.2.0"

log = logging.getLogger("taskd")

# --- Settings -------------------------------------------------------------------------------------

DOTENV = Path(".env")  # in the working directory
MIN_SECRET = 32  # bytes; RFC 7518, section 3.2: an HS256 key is at least as long as the hash
PUBLIC_SECRET = "better-auth-secret-12345678901234567890"  # Better Auth's default
MAKE_ONE = "make one with: python taskctl.py init"
REPLACE_IT = f"remove it, and {MAKE_ONE}"
DATABASE_PATTERN = (
    r"sqlite:///(?!:memory:)[^?#\0-\x1f]+"
    r"|postgresql://([^\s\0/@]*@)?[^\s\0/@]*(/[^\s\0@?]*)?(\?[^\s\0]*)?"
)
DATABASE_RULE = "sqlite:/// and the path of a file, or postgresql://user:password@host/name"
HOST_PATTERN = r"[\w.:%-]+"
LOOPBACK = r"localhost|127\.[0-9.]+|\[?::1\]?"
KEY_SET_PATTERN = (  # of visible ASCII characters
    rf"(?=[!-~]+\Z)(?:(https|insecure\+http)://[^@/?#][^@]*|http://({LOOPBACK})(:[0-9]+)?(/.*)?)"
)
KEY_SET_RULE = "https, or http to this machine, or insecure+http in a private network"
ORIGIN_PATTERN = re.compile(
    r"((https?)://(?:\[([0-9a-f:]+)\]|[a-z0-9._-]+)"
    r"|(?:capacitor|ionic|tauri|[a-z-]+-extension)://[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?"
)
ORIGIN_RULE = "origins such as https://a.example, in lower case, without a path, with commas"
PROXY_RULE = "IP addresses, with commas, or * for any"
LOG_LEVELS = "debug|info|warning|error"
TASK_LIMIT = "a whole number from 1: the most tasks that a user may have"
SETTING_NAMES = ("TASKD", "BETTER_AUTH_S", "DATABASE_")  # how a setting's name begins


def shipped(name: str) -> Path:
    """Return a file that belongs to taskd: in taskd_files if installed, else beside this file."""
    here = Path(__file__).parent
    installed = here / "taskd_files" / name
    return installed if installed.exists() else here / name


class SettingsError(Exception):
    """A setting is missing or unusable; the message names the variable and says what to do."""


def _secret(text: str, advice: str = REPLACE_IT) -> str:
    if text == PUBLIC_SECRET:
        raise ValueError(f"is Better Auth's public default, which everybody knows; {advice}")
    if not text.strip():
        raise ValueError(f"must not be only white space; {advice}")
    try:
        size = len(text.encode())
        jwt.get_algorithm_by_name("HS256").prepare_key(text)
    except (UnicodeEncodeError, jwt.InvalidKeyError):
        raise ValueError(f"must be UTF-8 text, not a public or private key; {advice}") from None
    if size < MIN_SECRET:
        raise ValueError(f"must be at least {MIN_SECRET} bytes long, not {size}; {advice}")
    return text


def _secrets(text: str) -> tuple[str, ...]:
    secrets: dict[str, str] = {}
    for entry in text.split(","):
        version, _, secret = entry.strip().partition(":")
        if not re.fullmatch("[0-9]+", version) or version in secrets:
            form = '"2:new,1:old", with a different whole number before each secret'
            raise ValueError(f"must look like {form}")
        secrets[version] = _secret(secret.strip(), f"replace its secret {version}")
    return tuple(secrets.values())


def _port(text: str) -> int:
    if int(text) > 65535:  # getaddrinfo would take 65536 for 0
        raise ValueError("must be at most 65535")
    return int(text)


def _split(text: str) -> list[str]:
    return re.split(r"[,\s]+", text.strip(", "))


def _key_set_url(text: str) -> str:
    with contextlib.suppress(ValueError):
        if urlsplit(text).hostname and urlsplit(text).port != 0:
            return text
    raise ValueError("must have a host name, and a port from 1 to 65535 if any")


def _origins(text: str) -> tuple[str, ...]:
    return tuple(map(_origin, _split(text)))


def _origin(text: str) -> str:
    """Return an origin as browsers send it: without the scheme's own port (RFC 6454, section 6)."""
    if not (found := ORIGIN_PATTERN.fullmatch(text)):
        raise ValueError(f"must be {ORIGIN_RULE}")
    origin, scheme, address, port = found.groups()
    if address:
        origin = f"{scheme}://[{_address(address)}]"
    if port and not 1 <= int(port) <= 65535:
        raise ValueError(f"must have ports from 1 to 65535, not {port}")
    default = {"http": 80, "https": 443}.get(scheme)
    return f"{origin}:{int(port)}" if port and int(port) != default else origin


def _addresses(text: str) -> tuple[str, ...]:
    """Return normalised IP addresses, or "*"."""
    return ("*",) if text == "*" else tuple(map(_address, _split(text)))


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as ex:
        raise ValueError(f"must be written with valid IP addresses: {ex}") from None


def _env(variable: str, default: Any, rule: str, pattern: str = "(?s).+", parse: Any = str) -> Any:
    """Declare a setting: variable, default, rule ("must be …"), pattern of its text, parser."""
    metadata = {"variable": variable, "rule": rule, "pattern": pattern, "parse": parse}
    return dataclasses.field(default=default, metadata=metadata, repr="SECRET" not in variable)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an operator can change; each setting is declared once."""

    secret: str | None = _env("BETTER_AUTH_SECRET", None, "shared with Better Auth", parse=_secret)
    secrets: tuple[str, ...] = _env("BETTER_AUTH_SECRETS", (), '"2:new,1:old"', parse=_secrets)
    database_url: str = _env("DATABASE_URL", "sqlite:///taskd.db", DATABASE_RULE, DATABASE_PATTERN)
    host: str = _env("TASKD_HOST", "127.0.0.1", "a host name or address to listen on", HOST_PATTERN)
    port: int = _env("TASKD_PORT", 8000, "a port, or 0 for any free one", "[0-9]{1,5}", _port)
    threads: int = _env("TASKD_THREADS", 16, "a number from 2 to 99", "[2-9]|[1-9][0-9]", int)
    cors_origins: tuple[str, ...] = _env("TASKD_CORS_ORIGINS", (), ORIGIN_RULE, parse=_origins)
    jwks_url: str | None = _env("TASKD_JWKS_URL", None, KEY_SET_RULE, KEY_SET_PATTERN, _key_set_url)
    issuer: str | None = _env("TASKD_ISSUER", None, "the iss that a token must have")
    audience: str | None = _env("TASKD_AUDIENCE", None, "the aud that a token must have")
    metrics: bool | None = _env("TASKD_METRICS", None, "1 or 0", "[01]", lambda text: text == "1")
    trusted_proxies: tuple[str, ...] = _env("TASKD_TRUSTED_PROXY", (), PROXY_RULE, parse=_addresses)
    max_tasks: int | None = _env("TASKD_MAX_TASKS", None, TASK_LIMIT, "[1-9][0-9]{0,15}", int)
    log_level: str = _env("TASKD_LOG", "info", "one of " + LOG_LEVELS, LOG_LEVELS)
    log_format: str | None = _env("TASKD_LOG_FORMAT", None, "text or json", "text|json")

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ, dotenv: Path = DOTENV) -> Settings:
        """Return the settings of the environment and, for variables not set there, of `.env`.

        An empty value counts as not set. Raises SettingsError for a value that cannot be used.
        """
        given = _given(environ, dotenv)
        values = {}
        for field in dataclasses.fields(cls):
            if text := given.get(field.metadata["variable"]):
                values[field.name] = _parse(text, field.metadata)
        return cls(**values)

    @property
    def database(self) -> str:
        """The path of SQLite's file, or PostgreSQL's address without user, password and options."""
        if self.database_url.startswith("sqlite:"):
            return self.database_url.removeprefix("sqlite:///")
        return re.sub("//[^/@]*@", "//…@", self.database_url).partition("?")[0]


def _parse(text: str, metadata: Mapping[str, Any]) -> Any:
    try:
        if not re.fullmatch(metadata["pattern"], text):
            raise ValueError(f"must be {metadata['rule']}")
        return metadata["parse"](text)
    except ValueError as ex:
        raise SettingsError(f"{metadata['variable']} {ex}") from None


def _given(environ: Mapping[str, str], dotenv: Path) -> dict[str, str]:
    return read_dotenv(dotenv) | {name: value for name, value in environ.items() if value}


def read_dotenv(path: Path) -> dict[str, str]:
    """Return the variables that a .env file sets; none if it does not exist."""
    try:
        if not path.exists():
            return {}
        from dotenv.parser import parse_stream  # loaded only where there is such a file

        with path.open(encoding="utf-8") as file:
            bindings = list(parse_stream(file))
    except (OSError, UnicodeDecodeError) as ex:
        raise SettingsError(f"{path} cannot be read: {ex}") from None
    for binding in bindings:
        if binding.error:
            where = f"{path}, line {binding.original.line},"
            raise SettingsError(f"{where} cannot be parsed: write NAME=value, and close each quote")
    return {one.key: one.value for one in bindings if one.key and one.value is not None}


def misspelt(environ: Mapping[str, str] = os.environ, dotenv: Path = DOTENV) -> list[str]:
    """Return a message for each variable that looks like a misspelt setting."""
    names = [field.metadata["variable"] for field in dataclasses.fields(Settings)]
    unknown = sorted(set(_given(environ, dotenv)) - set(names))
    found = [_nearest(name, names) for name in unknown if name.upper().startswith(SETTING_NAMES)]
    return list(filter(None, found))


def _nearest(name: str, names: list[str]) -> str:
    ours = name.upper().startswith("TASKD")
    nearest = difflib.get_close_matches(name.upper(), names, 1, 0.7 if ours else 0.9)
    hint = f": is {nearest[0]} meant?" if nearest else ""
    return f"{name} is not a setting, and is ignored{hint}" if ours or nearest else ""


# --- Log ------------------------------------------------------------------------------------------


class AccessLogFields(dict[str, Any]):
    """What the log shows of a request, in the order of the JSON; `user` may be None."""

    def __str__(self) -> str:
        """Return it as text; the user is percent-encoded, so that it cannot forge a field."""
        user = "-" if self["user"] is None else f"'{falcon.uri.encode_value(self['user'])}'"
        client = f" client={self['client']}" if "client" in self else ""
        reason = ' reason="{}"'.format(self["reason"].replace('"', "'")) if "reason" in self else ""
        what = f"{self['method']} {self['route']} {self['status']} {self['ms']:.1f}ms"
        return f"{what} id={self['id']} user={user}{client}{reason}"


class TextLines(logging.Formatter):
    """Log lines for people, in UTC. A traceback is indented, so that it cannot forge a line."""

    converter = time.gmtime  # type: ignore[assignment]  # a built-in function is not bound
    default_time_format, default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"

    def format(self, record: logging.LogRecord) -> str:
        """Return a line, and the traceback below it if there is one."""
        line = f"{self.formatTime(record)} {record.levelname} {printable(record.getMessage())}"
        line += f" id={record.id}" if hasattr(record, "id") else ""
        if not record.exc_info:
            return line
        traceback = self.formatException(record.exc_info).splitlines()
        return "\n    ".join([line, *map(printable, traceback)])


class JsonLines(TextLines):
    """Log lines for programs: each is a JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a line with a request's fields, or with a message and perhaps a traceback."""
        line: dict[str, Any] = {"time": self.formatTime(record), "level": record.levelname}
        if isinstance(record.args, AccessLogFields):
            line |= record.args
        else:
            line["message"] = record.getMessage()
            line |= {"id": record.id} if hasattr(record, "id") else {}  # the request's
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def printable(text: str) -> str:
    """Escape every character that breaks a line or moves the terminal's cursor."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def configure_log(settings: Settings) -> None:
    """Send taskd's and waitress's log lines to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if settings.log_format == "json" else TextLines())
    for logger in (log, logging.getLogger("waitress")):
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(settings.log_level.upper())
    logging.getLogger("waitress.queue").setLevel("ERROR")  # it warns of every queued request


# --- Threads --------------------------------------------------------------------------------------


RETRY_AFTER = 2  # seconds until a client should try again
PLACE_TIMEOUT = 0.25  # seconds in which no place is taken or freed until those that wait give up


class Unavailable(Exception):
    """The database, the key set or the disk cannot be used now; says which, why, when to retry."""

    def __init__(self, what: str, why: str = "", retry_after: int = RETRY_AFTER) -> None:
        super().__init__(what, why)
        self.retry_after = retry_after  # seconds


class Busy(Unavailable):
    """A limit prevents the answer now; the first argument is the answer's detail."""


class WouldBlock(BaseException):
    """Raised in the event loop when a request would block.

    One thread, the event loop, reads all requests and runs the application for each of them,
    because switching between Python threads costs several times as much as a request. It must
    never wait. Code that would wait there raises this instead: SQLite for a lock, PostgreSQL for
    each statement, the key set for a fetch. So does code that takes long (a search, a long list),
    and a statement that fails. Nothing has been changed, or it was rolled back, so the server
    catches this in `Server._answer` and runs the request again from the start: in a worker thread,
    where `thread_state.in_event_loop` is False and this is never raised; with `until`, in the event
    loop when that future is done; or where the subclass says. Everything before the first write
    must therefore be safe to run twice.

    It is a BaseException so that no `except Exception`, here or in Falcon, catches it.
    """

    def __init__(self, until: Future[None] | None = None) -> None:
        self.until = until


class SearchWouldBlock(WouldBlock):
    """Raised in the event loop by a search; it runs again in one of the search threads."""


class WriteWouldBlock(WouldBlock):
    """Raised in the event loop by a write while no batch can begin; it runs again when one can.

    A batch is a transaction that several requests share. It cannot begin while the last one is
    being committed, or while another thread or process holds SQLite's lock.
    """


class BatchFailed(WouldBlock):
    """Raised in the event loop by a write that failed, and with it the batch that it was part of.

    The batch was rolled back. Each of its requests runs again by itself, in a worker thread.
    """


class _ThreadState(threading.local):
    in_event_loop = False  # True in the thread that serves the sockets
    write_timed_out = False  # True in the event loop for a write that has waited LOCK_TIMEOUT
    # In the event loop: functions to call after the commit of this request's write; None until it
    # has written, and in all other threads, where a write is on disk when it returns.
    after_commit: list[Callable[[], object]] | None = None
    # Whether nobody waits for the answer to this thread's request; worker threads set it.
    client_has_left: Callable[[], bool] = staticmethod(lambda: False)


thread_state = _ThreadState()


def when_on_disk(call: Callable[[], object]) -> None:
    """Call a function when what this thread's request wrote is on disk, which may be now."""
    if thread_state.after_commit is None:
        call()
    else:
        thread_state.after_commit.append(call)


def check_client() -> None:
    """Raise Busy if the client has closed the connection."""
    if thread_state.client_has_left():
        raise Busy("keep the connection open until the answer")


class Semaphore:
    """A semaphore whose callers give up when nobody takes or frees a place for PLACE_TIMEOUT.

    They give up in any case after `most` seconds.
    """

    def __init__(self, places: int, error: Callable[[], Exception], most: float = math.inf) -> None:
        self._free, self._error, self._most = places, error, most
        # The time of the last change of `_free`, by time.monotonic().
        self._last_change, self._changed = 0.0, threading.Condition()

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Wait for a place, or raise the error; free the place at the end."""
        end = time.monotonic() + self._most
        with self._changed:
            while not self._free:
                seconds = min(end, self._last_change + PLACE_TIMEOUT) - time.monotonic()
                if seconds <= 0:
                    raise self._error()
                self._changed.wait(seconds)
            self._free, self._last_change = self._free - 1, time.monotonic()
        try:
            yield
        finally:
            with self._changed:
                self._free, self._last_change = self._free + 1, time.monotonic()
                self._changed.notify()


# --- Tokens ---------------------------------------------------------------------------------------

LEEWAY = 10  # seconds by which this clock and the issuer's may differ
MAX_TOKEN = 16 * 1024  # characters; Better Auth's have a few hundred
TOKEN_CACHE_SIZE = 1000  # verified tokens
TOKEN_CACHE_AGE = 300  # seconds after which a token is verified again
REJECTED_CACHE_SIZE = 200  # rejected tokens: clients go on sending one that has expired
REJECTED_CACHE_AGE = 1  # seconds after which a rejected token is verified again
SURROGATE = re.compile("[\ud800-\udfff]")  # in a text that is not UTF-8
# RFC 7515, section 7.1: no padding; the signature of "none" is empty.
COMPACT_JWS = re.compile(r"([A-Za-z0-9_-]+\.){2}[A-Za-z0-9_-]*")
# RFC 8725, section 3.11: Better Auth signs its session cookies too, with another type.
LOGIN_TYPES = ("jwt", "at+jwt")
NO_KEY_SET = "signed with Better Auth's own key, which is not known here: set TASKD_JWKS_URL"
ASYMMETRIC = ["EdDSA", "ES256", "ES512", "RS256", "PS256"]  # what Better Auth's plugin offers
MALFORMED = "the token is malformed, or its exp, nbf or iat is not a number"
TOKEN_ERRORS: dict[type[Exception], str] = {
    jwt.InvalidTokenError: "the header's typ, kid, crit or b64 is not that of a login token",
    jwt.ExpiredSignatureError: "the token has expired; log in again",
    jwt.ImmatureSignatureError: "the token is not valid yet: nbf or iat is in the future",
    jwt.InvalidSignatureError: (
        "the signature does not match: the token was changed, or signed with another secret"
    ),
    jwt.InvalidIssuerError: "iss is not the issuer that this server trusts (TASKD_ISSUER)",
    jwt.InvalidAudienceError: "aud does not name this server (TASKD_AUDIENCE)",
    jwt.exceptions.InvalidSubjectError: "sub must be a string",
}
KEYS_AGE = 240  # seconds after a fetch until the key set is fetched again, while its keys are used
KEYS_LIMIT = 290  # seconds after a fetch until callers wait for the next one
KEYS_RETRY = 20  # seconds after a fetch that failed until the next one, while its keys are used
KEYS_PAUSE = 3  # seconds at least between two fetches, whatever key ids are asked for
KEYS_WAIT = 5  # seconds that a fetch may take
KEYS_END = 3600  # seconds after the last good answer until its keys are no longer accepted
KEYS_SIZE = 1024 * 1024  # bytes that an answer may have
KEYS_COUNT = 100  # members of a key set that are read

KeyId = tuple[str | None, str]  # a kid and an alg
Claims = dict[str, Any]


class TokenError(Exception):
    """The token is not accepted; the message is fit for an error_description (RFC 6750, 3)."""


class UnusableKey(Exception):
    """A member of a key set cannot be used; the message says why."""


class User(Struct, frozen=True):
    """Whom a token speaks for: `id` is its `sub`, `expires` its `exp` in seconds since 1970."""

    id: str
    expires: float
    email: str | None = None
    name: str | None = None


class KeySet:
    """The public keys of an issuer (RFC 7517).

    A background thread fetches them at the start, every KEYS_AGE seconds while they are used, and
    when a key is asked for that is not among them.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._keys: dict[KeyId, jwt.PyJWK] = {}
        self._last_success = self._last_attempt = -math.inf  # by time.monotonic()
        self._failure = ""
        self._logged: set[str] = set()
        self._lock, self._thread = threading.Lock(), threading.Thread()
        self._fetch: Future[None] = Future()  # the last one, which the thread makes

    def find(self, kid: str | None, alg: str) -> jwt.PyJWK | None:
        """Return a key, or None if the set has no such key.

        A caller that asks for an unknown key waits for the fetch under way, or for a new one.
        Raises Unavailable if the set cannot be fetched.
        """
        if key := self.get(kid, alg):
            return key
        if fetch := self.fetch():
            if thread_state.in_event_loop:
                raise WouldBlock(until=fetch)
            wait([fetch], KEYS_WAIT + 1)
        key = self.get(kid, alg)
        if key is None and self._failure:
            pause = math.ceil(self._last_attempt + KEYS_PAUSE - time.monotonic())
            raise Unavailable("the key set", self._failure, max(1, pause))
        return key

    def get(self, kid: str | None, alg: str) -> jwt.PyJWK | None:
        """Return a key if the set is fresh enough, without waiting; begin a fetch if it is old."""
        now = time.monotonic()
        if now - self._last_attempt > (KEYS_RETRY if self._failure else KEYS_AGE):
            self.fetch()
        fresh = now - self._last_attempt < KEYS_LIMIT and now - self._last_success < KEYS_END
        return self._keys.get((kid, alg)) if fresh else None

    def fetch(self) -> Future[None] | None:
        """Return the fetch under way, or begin one, or return None if the last was just now."""
        with self._lock:
            if self._thread.is_alive() and not self._fetch.done():  # no thread survives a fork
                return self._fetch
            if time.monotonic() < self._last_attempt + KEYS_PAUSE:
                return None
            self._fetch = Future()
            self._thread = threading.Thread(target=self._run, args=[self._fetch], daemon=True)
            try:
                self._thread.start()
            except RuntimeError as ex:  # the system allows no further thread
                self._note_failure(ex)
                return None
            return self._fetch

    def _run(self, fetch: Future[None]) -> None:
        try:
            keys, warnings = parse_key_set(download(self._url))
        except Exception as ex:  # the answer may be anything
            self._note_failure(ex)
        else:
            if self._failure:
                log.info("the key set is fetched again")
            self._keys, self._failure = keys, ""
            self._last_success = self._last_attempt = time.monotonic()
            self._logged &= set(warnings)
            self._warn(warnings)
        fetch.set_result(None)

    def _note_failure(self, ex: Exception) -> None:
        self._failure, self._last_attempt = f"{type(ex).__name__}: {ex}"[:200], time.monotonic()
        messages = [f"it cannot be fetched: {self._failure}"]
        if self._keys and self._last_attempt - self._last_success >= KEYS_END:
            messages.append("its keys have expired: no good answer for an hour")
        self._warn(messages)

    def _warn(self, messages: list[str]) -> None:
        for message in messages:
            if message not in self._logged:
                log.warning("the key set %s: %s", self._url, message)
        self._logged.update(messages)


def download(url: str) -> bytes:
    """Return what an address answers: at most KEYS_SIZE bytes, within KEYS_WAIT seconds.

    Only 200 counts, and a redirect is not followed. Raises OSError, HTTPException or ValueError.
    """
    connection, answer = _connection(urlsplit(url)), Future[bytes]()
    threading.Thread(target=_download, args=(url, connection, answer), daemon=True).start()
    try:
        return answer.result(KEYS_WAIT)
    except TimeoutError:
        raise TimeoutError(f"no whole answer within {KEYS_WAIT} s") from None
    finally:  # the thread ends: its next read fails, or finds that nobody waits for it
        answer.cancel()
        with contextlib.suppress(OSError, AttributeError):
            connection.sock.shutdown(socket.SHUT_RDWR)


def _download(url: str, connection: HTTPConnection, answer: Future[bytes]) -> None:
    where = urlsplit(url)
    target = urlunsplit(("", "", where.path or "/", where.query, ""))
    headers = {"User-Agent": f"taskd/{__version__}", "Accept": "application/json"}
    try:
        connection.request("GET", target, headers=headers)
        with connection.getresponse() as response:
            answer.set_result(_read_answer(response, answer.cancelled))
    except Exception as ex:  # the answer may be anything
        with contextlib.suppress(InvalidStateError):
            answer.set_exception(ex)
    finally:
        connection.close()


def _read_answer(response: HTTPResponse, is_cancelled: Callable[[], bool]) -> bytes:
    if response.status != HTTPStatus.OK:
        raise OSError(f"the answer is {response.status}, not 200")
    body = bytearray()
    while (piece := response.read1(KEYS_SIZE)) and not is_cancelled():
        body += piece
        if len(body) > KEYS_SIZE:
            raise OSError(f"the answer is longer than {KEYS_SIZE} bytes")
    return bytes(body)


def _connection(url: SplitResult) -> HTTPConnection:
    """Return a connection for an address: https through the environment's proxy, if it has one."""
    host, port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
    if url.scheme != "https":
        return HTTPConnection(host, port, timeout=KEYS_WAIT)  # without a port it would split ::1
    direct = re.fullmatch(LOOPBACK, host) or proxy_bypass(host)
    proxy = urlsplit("//" + ("" if direct else getproxies().get("https", "")).split("://")[-1])
    if not proxy.hostname:
        return HTTPSConnection(host, port, timeout=KEYS_WAIT)
    connection = HTTPSConnection(proxy.hostname, proxy.port or 80, timeout=KEYS_WAIT)
    login = base64.b64encode(unquote_to_bytes(proxy.netloc.rpartition("@")[0])).decode()
    headers = {"Proxy-Authorization": f"Basic {login}"} if login else {}
    connection.set_tunnel(host, port, headers)
    return connection


def parse_key_set(text: bytes) -> tuple[dict[KeyId, jwt.PyJWK], list[str]]:
    """Return the usable keys of a key set, and a message about each member that is left out."""
    document = json.loads(text)
    members = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(members, list):
        raise ValueError("the answer is not a JSON object with a list of keys")
    keys: dict[KeyId, jwt.PyJWK] = {}
    warnings = [f"only its first {KEYS_COUNT} keys are read"] * (len(members) > KEYS_COUNT)
    for number, member in enumerate(members[:KEYS_COUNT], 1):
        try:
            key = public_key(member)
            if keys.setdefault((key.key_id, key.algorithm_name), key) is not key:
                raise UnusableKey("a key before it has the same kid and alg")
        except Exception as ex:  # a message of another class could show a key
            kind = type(ex).__name__
            why = str(ex) if isinstance(ex, UnusableKey) else f"it is malformed ({kind})"
            kid = member.get("kid") if isinstance(member, dict) else None
            name = f" (kid {kid[:60]!r})" if isinstance(kid, str) else ""
            warnings.append(f"its key number {number}{name} is left out: {why}")
    return keys, warnings


def public_key(member: Any) -> jwt.PyJWK:
    """Return a member of a key set as a key; raises UnusableKey, or any error if malformed."""
    names = ("kid", "alg")
    if not (isinstance(member, dict) and all(isinstance(member.get(n), str | None) for n in names)):
        raise UnusableKey("it is not an object, or its kid or alg is not a string")
    if not {"d", "k"}.isdisjoint(member):
        raise UnusableKey("it is private or secret: whoever can read the set can sign with it")
    if member.get("use", "sig") != "sig":
        raise UnusableKey("its use is not sig")
    if "verify" not in member.get("key_ops", ["verify"]):
        raise UnusableKey("its key_ops do not have verify")
    key = jwt.PyJWK(member) if member.get("alg") in (None, "", *ASYMMETRIC) else None
    if key is None or key.algorithm_name not in ASYMMETRIC:
        raise UnusableKey(f"its alg is not one of {', '.join(ASYMMETRIC)}")
    if weak := key.Algorithm.check_key_length(key.key):
        raise UnusableKey(weak)
    key.Algorithm.verify(b"", key.Algorithm.prepare_key(key.key), b"")  # it must not raise
    return key


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError
    return members


_decode_strictly = json.JSONDecoder(object_pairs_hook=_unique_members).decode


def _header(token: str) -> dict[str, Any]:
    """Return the header of a login token; no member may be given twice (RFC 7515, section 4)."""
    try:
        header = _decode_strictly(jwt.utils.base64url_decode(token.partition(".")[0]).decode())
    except (ValueError, RecursionError):
        raise jwt.DecodeError from None
    if not isinstance(header, dict):
        raise jwt.DecodeError
    kind = str(header.get("typ", "JWT")).lower().removeprefix("application/")
    kid_is_text = isinstance(header.get("kid", ""), str)
    if not kid_is_text or kind not in LOGIN_TYPES or not {"crit", "b64"}.isdisjoint(header):
        raise jwt.InvalidTokenError
    return header


def bearer_token(authorization: str) -> str:
    """Return the token in the value of an Authorization header, or "" (RFC 6750, section 2.1)."""
    scheme, _, token = authorization.partition(" ")
    return token.strip(" ") if scheme.lower() == "bearer" else ""


class Tokens:
    """Verify JWTs (RFC 7519): HS256 with the shared secret, or signed with a key of the key set."""

    def __init__(self, settings: Settings) -> None:
        """Raise SettingsError when there is neither a secret nor a key set."""
        # A token is verified with each of them; the first one signs.
        self.secrets = settings.secrets or ((settings.secret,) if settings.secret else ())
        self._key_set = KeySet(settings.jwks_url) if settings.jwks_url else None
        if not self.secrets and not self._key_set:
            raise SettingsError(f"BETTER_AUTH_SECRET is missing; {MAKE_ONE}")
        issuer, aud = settings.issuer, settings.audience
        # PyJWT rejects any token with an aud unless told otherwise, and Better Auth's have one.
        options: Any = {"require": ["sub", "exp"], "verify_aud": bool(aud), "verify_jti": False}
        decode = jwt.PyJWT(options).decode
        self._read_claims = partial(decode, issuer=issuer, audience=aud, leeway=LEEWAY)
        self._verified: dict[str, tuple[float, jwt.PyJWK | None, User]] = {}
        self._rejected: dict[str, tuple[float, str]] = {}

    def fetch_keys(self) -> None:
        """Begin to fetch the key set, so that the first login need not wait for it."""
        if self._key_set:
            self._key_set.fetch()

    def verify(self, token: str) -> User:
        """Return the user of a compact JWS.

        Raises TokenError, or Unavailable if its key cannot be fetched. Identity is `sub` and
        nothing else: Better Auth signs e-mail links with the same secret, and they name a user by
        `userId` and `email`.
        """
        if known := self.known(token):
            return known
        user, key = self._verify_unless_rejected(token)
        until = min(user.expires + LEEWAY, time.time() + TOKEN_CACHE_AGE)
        if len(self._verified) >= TOKEN_CACHE_SIZE:
            self._verified.clear()
        self._verified[token] = (until, key, user)
        return user

    def known(self, token: str) -> User | None:
        """Return the user of a token that was verified before and is still valid."""
        until, key, user = self._verified.get(token, (0, None, None))
        gone = key and self._key_set and self._key_set.get(key.key_id, key.algorithm_name) != key
        return user if until > time.time() and not gone else None

    def mint(self, claims: Claims) -> str:
        """Return a token with these claims, signed with the first secret."""
        if not self.secrets:
            why = "and taskd cannot sign with the keys of TASKD_JWKS_URL; use the token of a login"
            raise SettingsError(f"BETTER_AUTH_SECRET is missing, {why}")
        return jwt.encode(claims, self.secrets[0], "HS256")

    def _verify_unless_rejected(self, token: str) -> tuple[User, jwt.PyJWK | None]:
        """Verify a token, or reject it for the reason for which it was rejected just now."""
        until, why = self._rejected.get(token, (0, ""))
        if until > time.monotonic():
            raise TokenError(why)
        try:
            return self._verify(token)
        except TokenError as ex:
            if not self._key_set:  # a key set may have the missing key by the next request
                if len(self._rejected) >= REJECTED_CACHE_SIZE:
                    self._rejected.clear()
                self._rejected[token] = time.monotonic() + REJECTED_CACHE_AGE, str(ex)
            raise

    def _verify(self, token: str) -> tuple[User, jwt.PyJWK | None]:
        if len(token) > MAX_TOKEN:
            raise TokenError(f"the token is longer than {MAX_TOKEN} characters")
        if token.count(".") == 1:
            why = "this is not a JWT but perhaps a session token; get a JWT from /api/auth/token"
            raise TokenError(why)
        if not COMPACT_JWS.fullmatch(token):
            why = "this is not a JWT: three base64url parts with dots, in one Authorization header"
            raise TokenError(why)
        try:
            header = _header(token)
            claims, key = self._decode(token, header.get("alg"), header.get("kid"))
            return _user(claims), key
        except jwt.MissingRequiredClaimError as ex:
            why = f"the {ex.claim} claim is missing: this is not the token of a login"
            raise TokenError(why) from None
        except (jwt.InvalidTokenError, ValueError) as ex:
            raise TokenError(TOKEN_ERRORS.get(type(ex), MALFORMED)) from None

    def _decode(self, token: str, alg: object, kid: str | None) -> tuple[Claims, jwt.PyJWK | None]:
        """Return the claims, and the key of the key set that signed them, if it was one.

        The key pins the algorithm: the header only says which key to try (RFC 8725, section 3.1).
        """
        if alg != "HS256" or not self.secrets:
            key = self._find_key(alg, kid)
            return self._read_claims(token, key, [key.algorithm_name]), key
        for secret in self.secrets:
            try:
                return self._read_claims(token, secret, ["HS256"]), None
            except jwt.InvalidSignatureError as ex:
                mismatch = ex  # another secret may have signed it
        raise mismatch

    def _find_key(self, alg: object, kid: str | None) -> jwt.PyJWK:
        if not isinstance(alg, str) or alg not in ASYMMETRIC:
            algs = ", ".join((["HS256"] if self.secrets else []) + ASYMMETRIC)
            raise TokenError(f"alg must be one of {algs}" if self._key_set else "alg must be HS256")
        if not self._key_set:
            raise TokenError(NO_KEY_SET)
        if not (key := self._key_set.find(kid, alg)):
            raise TokenError("the key set has no key for this kid and alg")
        return key


def _user(claims: Claims) -> User:
    for name in ("exp", "nbf", "iat"):  # RFC 7519, section 2; PyJWT would take a string of digits
        if name in claims and type(claims[name]) not in (int, float):
            raise TokenError(f"{name} must be a number")
    subject = claims["sub"]
    if not subject or SURROGATE.search(subject):
        raise TokenError("sub must name a user")
    texts = {name: claims[name] for name in ("email", "name") if isinstance(claims.get(name), str)}
    return User(subject, claims["exp"], **texts)


# --- Fields ---------------------------------------------------------------------------------------

DUE_DATE = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[Tt]((?:[01][0-9]|2[0-3]):[0-5][0-9]):([0-5][0-9]|60)(?:\.([0-9]+))?"
    r"([Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9]))?"
)
MIDNIGHT = "T00:00:00.000Z"  # a day counts as its first moment in UTC
TAG_SEPARATOR = "A"  # of tags_folded; case folding leaves no "A", so no search spans two tags

to_json = msgspec.json.Encoder().encode
parse_tags = msgspec.json.Decoder(list[str]).decode
Title = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"\S")]
Tag = Annotated[str, Meta(min_length=1, max_length=50, pattern=r"\S")]


class TagsField(peewee.TextField):
    """A column with an array of texts as JSON, in which REPLACE finds a text as `quoted` has it."""

    def db_value(self, value: list[str]) -> str:
        """Return the JSON of the array, as the database keeps it."""
        return f"[{','.join(map(quoted, value))}]"

    def python_value(self, value: str) -> list[str]:
        """Return the array of this JSON, as a task shows it."""
        try:
            return parse_tags(value) if value != "[]" else []
        except ValueError as ex:
            raise Unavailable("the database", f"it is damaged: {ex}") from None


def quoted(text: str) -> str:
    """Return a text as a JSON string in which its own quotes and commas are escaped.

    A tag in quotes is then found only as a whole tag, never across two tags.
    """
    parts = (to_json(part).decode()[1:-1] for part in text.split('"'))
    return '"' + "\\u0022".join(parts).replace(",", "\\u002c") + '"'


def parse_due_date(text: str) -> str:
    """Return a day as it is, or a time in UTC with milliseconds. Raises ValueError.

    A leap second is kept as the second after it, which must be the first second of a month in UTC.
    """
    found = DUE_DATE.fullmatch(text)
    if not found:
        raise ValueError("neither a day nor a time of RFC 3339")
    if not found[2]:
        return date.fromisoformat(text).isoformat()
    leap = found[3] == "60"
    try:
        when = datetime.fromisoformat(text.upper().replace(":60", ":59")).astimezone(UTC)
        parsed = when.replace(microsecond=0) + timedelta(seconds=1) if leap else when
    except OverflowError:
        raise ValueError("not in the years 0001 to 9999") from None
    if leap and f"{parsed:%d %H:%M}" != "01 00:00":
        raise ValueError("no leap second is at this time")
    return timestamp(parsed)


def due_moment(text: str) -> str:
    """Return what a due date is compared by: a time in UTC with milliseconds. Raises ValueError."""
    return (parse_due_date(text) + MIDNIGHT)[:24]


def timestamp(when: datetime) -> str:
    """Return a time in UTC as tasks show it (RFC 3339, milliseconds)."""
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def unique_tags(tags: list[str]) -> list[str]:
    """Return the tags, or raise ValueError if one is there twice."""
    if len(set(tags)) < len(tags):
        raise ValueError("one is there twice")
    return tags


class Field(Struct, frozen=True, kw_only=True):
    """A field that a task's owner sets: bodies, views, columns, lists, openapi.json follow."""

    type: Any  # in a body
    rule: str  # the message where a body breaks it
    column: Callable[[], peewee.Field] = partial(peewee.TextField, null=True)
    default: Any = ...  # of a new task, which must have the field if this is `...`
    normalise: Callable[[Any], Any] | None = None  # raises ValueError where the rule is broken
    searched: bool = False  # by q, in the column of this name with _folded behind it
    order: str | None = None  # the SQL of the text by which lists are sorted


FIELDS = {
    "title": Field(
        type=Title,
        rule="must be a string of 1 to 200 characters",
        column=peewee.TextField,
        searched=True,
        order="title",
    ),
    "description": Field(
        type=Annotated[str, Meta(max_length=10_000)] | None,
        rule="must be a string of at most 10,000 characters, or null",
        default=None,
        searched=True,
    ),
    "completed": Field(
        type=bool, rule="must be true or false", column=peewee.BooleanField, default=False
    ),
    "priority": Field(
        type=Literal["low", "medium", "high"] | None,
        rule="must be low, medium or high, or null",
        default=None,
        order="CASE priority WHEN 'low' THEN '1' WHEN 'medium' THEN '2' WHEN 'high' THEN '3' END",
    ),
    "due_date": Field(
        type=Annotated[str, Meta(pattern=f"^{DUE_DATE.pattern}$")] | None,
        rule="must be a day such as 2026-12-01, a time with its offset from UTC such as"
        " 2026-12-01T09:00:00Z, or null, and exist in the years 0001 to 9999",
        default=None,
        normalise=parse_due_date,
        order=f"due_date || SUBSTR('{MIDNIGHT}', LENGTH(due_date) - 9)",
    ),
    "tags": Field(
        type=Annotated[list[Tag], Meta(max_length=20, extra_json_schema={"uniqueItems": True})],
        rule="must be an array of at most 20 different strings of 1 to 50 characters,"
        " none of them blank",
        column=TagsField,
        default=[],
        normalise=unique_tags,
        searched=True,
    ),
}
SEARCHED = [name for name, field in FIELDS.items() if field.searched]


# --- Bodies ---------------------------------------------------------------------------------------

MAX_BODY = 64 * 1024  # bytes; the largest possible task has 51,000 in UTF-8
MAX_DEPTH = 500  # arrays and objects within each other
MAX_FAULTS = 20  # reported at once
MAX_NAME = 100  # characters of the name of a field or parameter, in a message


# What a body may set, with its default: `...` if it must be given, UNSET if it may be left out.
NEW_TASK = {name: field.default for name, field in FIELDS.items()}
TASK_CHANGES: dict[str, Any] = dict.fromkeys(FIELDS, UNSET)
COMPLETION: dict[str, Any] = {"completed": UNSET}

parse_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
FIELD_PARSERS = {name: msgspec.json.Decoder(field.type).decode for name, field in FIELDS.items()}
_types = {name: field.type for name, field in FIELDS.items()}
_members = {"id": int, "user_id": str, **_types, "created_at": str, "updated_at": str}
TaskView = msgspec.defstruct("TaskView", _members.items(), frozen=True)
SERVER_OWNED = _members.keys() - FIELDS.keys()  # ignored in bodies: a task can be sent back whole
View = Any  # a TaskView, whose members follow from FIELDS


class Fault(Struct, frozen=True):
    """What is wrong with one field of a body, one parameter or one header."""

    field: str
    message: str


class Unprocessable(falcon.HTTPUnprocessableEntity):
    """The request is readable but wrong; `faults` says what is wrong, field by field."""

    def __init__(self, faults: list[Fault]) -> None:
        detail = "; ".join(f"{fault.field} {fault.message}" for fault in faults)
        super().__init__(description=detail)
        self.faults = faults


def read_body(req: Request, fields: dict[str, Any], body: bytes | None = None) -> dict[str, Any]:
    """Return the fields that the request's body sets, or raise 400, 413, 415 or 422."""
    body = raw_body(req) if body is None else body
    if not body.strip():
        raise falcon.HTTPBadRequest(description="send a JSON object as the body")
    if not is_plain_json(req):
        detail = "send plain JSON in UTF-8, with the header Content-Type: application/json"
        raise falcon.HTTPUnsupportedMediaType(description=detail)
    try:
        return parse_body(body.decode(), fields)
    except (msgspec.DecodeError, UnicodeDecodeError) as ex:
        raise falcon.HTTPBadRequest(description=f"the body must be JSON in UTF-8: {ex}") from None


def is_plain_json(req: Request) -> bool:
    """Say whether the headers declare JSON in UTF-8; other parameters have no effect (RFC 8259)."""
    kind, parameters = falcon.parse_header((req.content_type or "")[:256])  # quotes make it slow
    return (
        kind.lower() == "application/json"
        and parameters.get("charset", "utf-8").lower() in ("utf-8", "utf8")
        and req.get_header("Content-Encoding", default="identity").lower() == "identity"
    )


def raw_body(req: Request) -> bytes:
    """Return the request's body, whatever its type, or raise 413."""
    stream = req.stream if req.env.get("wsgi.input_terminated") else req.bounded_stream
    body: bytes = stream.read(MAX_BODY + 1)
    if len(body) > MAX_BODY:
        raise too_large()
    return body


def too_large() -> falcon.HTTPError:
    """Return the error for a body that is over the limit."""
    return falcon.HTTPContentTooLarge(description=f"send a body of at most {MAX_BODY} bytes")


def parse_body(text: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that a JSON object sets, and the defaults of those that it leaves out.

    Raises 422 with everything that is wrong, or msgspec.DecodeError if the text is not JSON.
    """
    if text.count("[") + text.count("{") > MAX_DEPTH and depth(text) > MAX_DEPTH:
        raise msgspec.DecodeError(f"it is nested more than {MAX_DEPTH} deep")
    try:
        members = parse_members(text)
    except msgspec.ValidationError:
        msgspec.json.decode(text, type=msgspec.Raw)  # perhaps it is not JSON at all
        raise Unprocessable([Fault("body", "must be a JSON object")]) from None
    given, faults = dict(fields), []
    for name, value in members.items():
        try:
            if name in fields:
                given[name] = parse_value(name, value)
            elif name not in SERVER_OWNED:
                raise ValueError("is not a field that can be set here")
        except ValueError as ex:
            faults.append(Fault(name[:MAX_NAME], str(ex)))
    missing = [name for name in given if given[name] is ... and name not in members]
    faults = [Fault(name, "is missing") for name in missing] + faults
    if faults:
        raise Unprocessable(faults[:MAX_FAULTS])
    return {name: value for name, value in given.items() if value is not UNSET}


def depth(text: str) -> int:
    """Return how deep arrays and objects of JSON are nested; not every Python limits recursion."""
    brackets = re.sub(r'(?s)"(?:[^"\\]++|\\.)*+"?|[^][{}"]++', "", text)
    return max(itertools.accumulate(1 if one in "[{" else -1 for one in brackets), default=0)


def parse_value(name: str, value: msgspec.Raw) -> Any:
    """Return the value of a field. Raises ValueError, which says what is wrong."""
    field = FIELDS[name]
    try:
        given = FIELD_PARSERS[name](value)
        normalised = field.normalise(given) if field.normalise and given is not None else given
    except ValueError:
        blank = bytes(value)[:1] == b'"' and not msgspec.json.decode(value, type=str).strip()
        reason = "must not be blank" if blank and field.type is Title else field.rule
        raise ValueError(reason) from None
    texts = given if isinstance(given, list) else [given]
    if any("\0" in text for text in texts if isinstance(text, str)):
        raise ValueError("must not contain U+0000")
    return normalised


# --- Requests -------------------------------------------------------------------------------------

# Where a page ended: the value by which its last task was sorted, and its id.
Position = tuple[str | int, int]
MAC_SIZE = 16  # bytes
ORDERS = {"id": "id", "created_at": "created_at", "updated_at": "updated_at"} | {
    name: field.order for name, field in FIELDS.items() if field.order
}  # what lists are sorted by, and its SQL
DUE_RULE = (
    "must be a day such as 2026-12-01, or a time with its offset from UTC such as"
    " 2026-12-01T09:00:00Z, in which + is written %2B"
)
PARAMETERS = {
    "completed": ("true|false", "must be true or false"),
    "priority": ("low|medium|high", "must be low, medium or high"),
    "tag": (r"(?s)(?=.*\S)[^\0]{1,50}", "must be 1 to 50 characters, not blank, without U+0000"),
    "due_before": (DUE_DATE.pattern, DUE_RULE),
    "due_after": (DUE_DATE.pattern, DUE_RULE),
    "q": (r"[^\0]{0,200}", "must be at most 200 characters, without U+0000"),
    "sort": (
        f"-?({'|'.join(ORDERS)})",
        f"must be one of {', '.join(ORDERS)}, or one with - before it",
    ),
    "limit": ("[1-9][0-9]{0,2}|1000", "must be a whole number from 1 to 1000"),
    "after": (
        "[A-Za-z0-9_-]+",
        'must come from the link rel="next" of a page of your tasks in the same order',
    ),
}
PARAMETER_PARSERS: dict[str, Callable[[str], Any]] = {  # the others are taken as they are
    "completed": lambda text: text == "true",
    # Times are kept in milliseconds; a bound between two of them comes after the earlier one.
    "due_before": lambda text: due_moment(text) + "~" * bool(re.search(r"\.\d{3}\d*[1-9]", text)),
    "due_after": due_moment,
    "limit": int,
}
REPEATABLE = "tag"
MAX_TAGS = 20  # no task has more
PARAMETER_HINTS = {  # what to send in place of common names of parameters
    "completed=true or completed=false": "status state done open is_completed complete filter",
    "q": "search query text keyword title",
    "sort, with - before it for descending": "order order_by sort_by sort_order direction",
    "tag, once for each": "tags label labels category",
    "due_before or due_after": "due due_date",
    "limit": "per_page page_size size count",
    'limit, and follow the Link header with rel="next"': "offset skip page cursor",
}
ENTITY_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'  # RFC 9110, section 8.8.3
ENTITY_TAGS = rf"[ \t,]*{ENTITY_TAG}(?:[ \t]*,[ \t,]*{ENTITY_TAG})*[ \t,]*"
OWN_ENTITY_TAG = r'"[0-9]+-[0-9T:.-]+Z"'  # taskd's own: the version and updated_at
IDEMPOTENCY_KEY = r"[\x21-\x7e]{1,255}"


class Listing(Struct, frozen=True):
    """Which tasks of a user to list, in which order, after which position; all without `limit`."""

    completed: bool | None = None
    q: str = ""
    priority: str | None = None
    tags: tuple[str, ...] = ()
    due_before: str | None = None  # as PARAMETER_PARSERS returns it
    due_after: str | None = None
    sort: str = "id"
    limit: int | None = None
    after: Position | None = None

    @property
    def is_by_id(self) -> bool:
        """Whether its order is that of an index."""
        return self.sort in ("id", "-id")


def read_listing(req: Request, cursors: Cursors) -> Listing:
    """Return what the query asks for, or raise 422 for a wrong value or an unknown parameter."""
    given = {
        name: value if isinstance(value, list) else [value]
        for name, value in req.params.items()
        if not name.startswith("_")
    }
    query = unquote_to_bytes(req.query_string)
    is_utf8 = query == query.decode(errors="ignore").encode()  # Falcon replaces what is not
    faults = [
        Fault(name[:MAX_NAME], reason)
        for name, values in itertools.islice(given.items(), MAX_FAULTS)
        if (reason := wrong_parameter(name, values, is_utf8))
    ]
    tags, cursor = given.pop(REPEATABLE, []), given.pop("after", None)
    asked, after = {name: values[0] for name, values in given.items()}, None
    if cursor and not {"after", "sort"}.intersection(fault.field for fault in faults):
        after = cursors.read(cursor[0], req.context.user.id, asked.get("sort", "id"))
        faults += [] if after else [Fault("after", PARAMETERS["after"][1])]
    if faults:
        raise Unprocessable(faults[:MAX_FAULTS])
    parsed = {name: PARAMETER_PARSERS.get(name, str)(text) for name, text in asked.items()}
    return Listing(**parsed, tags=tuple(tags), after=after)


def wrong_parameter(name: str, values: list[str], is_utf8: bool = True) -> str | None:
    """Return what is wrong with a parameter of lists, or None."""
    if name not in PARAMETERS:
        return f"is not a parameter of lists; {_parameter_hint(name[:MAX_NAME])}"
    if not is_utf8 and "\ufffd" in "".join(values):
        return "must be UTF-8"
    pattern, rule = PARAMETERS[name]
    if len(values) > (MAX_TAGS if name == REPEATABLE else 1):
        most = f"{MAX_TAGS} times" if name == REPEATABLE else "once"
        return f"must be given at most {most}, not {len(values)} times"
    try:
        PARAMETER_PARSERS.get(name, str)(values[0])
        return None if all(re.fullmatch(pattern, value) for value in values) else rule
    except ValueError:
        return rule


def _parameter_hint(name: str) -> str:
    """Say what to send in place of a parameter that is not known."""
    plain = re.sub("(?<=[a-z])(?=[A-Z])|-", "_", name).lower()
    for parameter, names in PARAMETER_HINTS.items():
        if plain.strip("_") in names.split():
            return f"send {parameter}"
    close = difflib.get_close_matches(plain.strip("_"), PARAMETERS, 1, 0.8)
    return f"send {close[0]}" if close else f"send one of {', '.join(PARAMETERS)}"


class Cursors:
    """Signs where a page ended, so that only the same user can use it, for the same order."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    def write(self, after: Position, user_id: str, sort: str) -> str:
        """Return the cursor of a position."""
        position = to_json(after)
        mac = hmac.digest(self._key, to_json([user_id, sort]) + position, "sha256")[:MAC_SIZE]
        return base64.urlsafe_b64encode(mac + position).decode().rstrip("=")

    def read(self, cursor: str, user_id: str, sort: str) -> Position | None:
        """Return the position, or None if this is not its cursor for this user and order."""
        try:
            position = jwt.utils.base64url_decode(cursor)[MAC_SIZE:]
            after = msgspec.json.decode(position, type=Position)
        except ValueError:
            return None
        expected = self.write(after, user_id, sort)
        return after if hmac.compare_digest(cursor.encode(), expected.encode()) else None


class Conditions(Struct, frozen=True):
    """The entity tags of If-Match and If-None-Match, separated by spaces; * for any.

    `in` finds only whole tags, because a tag includes its quotes.
    """

    match: str = "*"
    none_match: str = ""

    def match_fails(self, tag: str) -> bool:
        """Say whether If-Match was sent, and neither has this entity tag nor is *."""
        return self.match != "*" and tag not in self.match

    def none_match_fails(self, tag: str) -> bool:
        """Say whether If-None-Match has this entity tag, or is *."""
        return self.none_match == "*" or tag in self.none_match


ANY = Conditions()  # whatever the version


def read_conditions(req: Request) -> Conditions:
    """Return what If-Match and If-None-Match ask for, or raise 400.

    A weak tag never fits If-Match, which compares strongly; If-None-Match compares weakly
    (RFC 9110, section 8.8.3.2). A tag that taskd did not make fits neither.
    """
    match, none_match = _entity_tags(req, "If-Match"), _entity_tags(req, "If-None-Match")
    return Conditions(
        "*" if match is None else " ".join(tag for tag in match if not tag.startswith("W/")),
        " ".join(tag.removeprefix("W/") for tag in none_match or ()),
    )


def _entity_tags(req: Request, name: str) -> list[str] | None:
    value = req.get_header(name)
    if value is None:
        return None
    if value.strip(" \t") == "*":
        return ["*"]
    if not re.fullmatch(ENTITY_TAGS, value):
        detail = f'send {name} as it was in an ETag: "1-…", or several with commas, or *'
        raise falcon.HTTPBadRequest(description=detail)
    # Only tags of taskd's own form: the store compares tags with LIKE, which may ignore case.
    return re.findall(rf"(?:W/)?{OWN_ENTITY_TAG}", value)


def read_idempotency_key(req: Request) -> str | None:
    """Return the Idempotency-Key, or None; raise 400 if it is malformed."""
    key = req.get_header("Idempotency-Key")
    if key is not None and not re.fullmatch(IDEMPOTENCY_KEY, key):
        detail = "send one Idempotency-Key, of 1 to 255 visible ASCII characters"
        raise falcon.HTTPBadRequest(description=detail)
    return key


# --- Store ----------------------------------------------------------------------------------------

# A list without `limit` is read page by page.
FIRST_PAGE = 100  # tasks of the first page by id; a longer page is read row by row
NEXT_PAGE = 20_000  # tasks at most of its other pages, and of all pages of a sorted list
MAX_PAGE_BYTES = 1024 * 1024  # of JSON, after which a page ends
MAX_SORTED_PAGE_BYTES = 4 * MAX_PAGE_BYTES  # larger: each page sorts all of the user's tasks
SEARCHES = 4  # threads for searches: so many searches of all users run at once
SEARCHES_OF_USER = 2
SEARCH_TIME = 2.0  # seconds
OTHER_SEARCHES = "other searches of yours are still running; wait until one ends"
IDEMPOTENCY_WINDOW = timedelta(hours=24)  # in which a create can be repeated with its key
DIGESTED = ("title", "description", "completed")  # part of the digest even with their defaults
# LIKE has wildcards, and SQLite and PostgreSQL have no other function for this in common.
CONTAINS = " OR ".join(f"REPLACE({name}_folded, :q, '') <> {name}_folded" for name in SEARCHED)
FILTERS = {
    "completed": "completed = :completed",
    "q": f"({CONTAINS})",
    "priority": "priority = :priority",
    "due_before": f"{ORDERS['due_date']} < :due_before",
    "due_after": f"{ORDERS['due_date']} > :due_after",
}
# A pattern for LIKE: Conditions has the tags of a header in one text.
ENTITY_TAG_OF_ROW = "'%\"' || version || '-' || updated_at || '\"%'"
CONDITIONS_MET = (
    f"(:match = '*' OR :match LIKE {ENTITY_TAG_OF_ROW})"
    f" AND NOT (:none_match = '*' OR :none_match LIKE {ENTITY_TAG_OF_ROW})"
)


class TooManyTasks(Exception):
    """The user has as many tasks as the operator allows; the argument is their number."""


class Changed(Exception):
    """The task does not meet the caller's conditions; the argument is its current entity tag."""


class Task(peewee.Model):
    """A row of schema.sql's table, with the columns of FIELDS.

    Only statements are built from it; making rows into instances would cost 100 µs each.
    """

    id = peewee.AutoField()
    user_id = peewee.TextField()
    created_at = peewee.TextField()
    updated_at = peewee.TextField()
    version = peewee.IntegerField()


for _name, _field in FIELDS.items():
    Task._meta.add_field(_name, _field.column())
for _name in SEARCHED:
    Task._meta.add_field(f"{_name}_folded", peewee.TextField(null=getattr(Task, _name).null))


class IdempotencyKey(peewee.Model):
    """A create that can be repeated: its key, the digest of the request, and the answer."""

    id = peewee.AutoField()
    user_id = peewee.TextField()
    name = peewee.TextField()
    body = peewee.TextField()
    answer = peewee.TextField()
    created_at = peewee.TextField()

    class Meta:
        table_name = "idempotency_key"


class About(peewee.Model):
    """The schema's version, and the key that signs cursors."""

    version = peewee.IntegerField()
    cursor_key = peewee.TextField()

    class Meta:
        primary_key = False


MODELS: tuple[type[peewee.Model], ...] = (Task, IdempotencyKey, About)
SHOWN = [getattr(Task, name) for name in TaskView.__struct_fields__]
CONVERTERS: dict[Any, Any] = {peewee.BooleanField: bool, TagsField: TagsField().python_value}
CONVERTED = [(n, CONVERTERS[kind]) for n, kind in enumerate(map(type, SHOWN)) if kind in CONVERTERS]
Row = tuple[Any, ...]
Page = tuple[bytes, Listing | None]  # tasks as a JSON array, and where more follow
ReadPage = Callable[[Listing], Page]


class Stored(Struct, frozen=True):
    """A task with its id and entity tag; `replayed` if an earlier create with this key made it."""

    task: View
    id: int
    tag: str
    replayed: bool = False


def search_columns(fields: dict[str, Any]) -> dict[str, str | None]:
    """Return the case-folded copies, which `q` searches, of the texts among these fields."""
    return {f"{name}_folded": _folded(fields[name]) for name in SEARCHED if name in fields}


def _folded(value: str | list[str] | None) -> str | None:
    if isinstance(value, list):
        return TAG_SEPARATOR.join(tag.casefold() for tag in value)
    return value and value.casefold()


def columns(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the columns in which the database keeps these fields."""
    kept = {name: getattr(Task, name).db_value(value) for name, value in fields.items()}
    return kept | search_columns(fields)


def placeholder(name: str) -> peewee.SQL:
    """Return a named placeholder."""
    return peewee.SQL(f":{name}")


def owned_by_user(model: type[Task | IdempotencyKey]) -> peewee.Expression:
    """Whose row is this? The one predicate of ownership."""
    return model.user_id == placeholder("user_id")


THIS_TASK = owned_by_user(Task) & (Task.id == placeholder("id"))
THIS_TASK_IF_MET = THIS_TASK & peewee.SQL(f"({CONDITIONS_MET})")


def queries() -> dict[str, Any]:
    """Return the store's statements by name, except those of lists and changes."""
    now = placeholder("now")
    names = ["user_id", *FIELDS, *(f"{name}_folded" for name in SEARCHED)]
    new = {name: placeholder(name) for name in names}
    key = owned_by_user(IdempotencyKey) & (IdempotencyKey.name == placeholder("name"))
    old = IdempotencyKey.created_at < placeholder("before")
    old_ids = IdempotencyKey.select(IdempotencyKey.id).where(old).order_by(IdempotencyKey.id)
    span = IdempotencyKey.id.between(placeholder("first"), placeholder("last"))
    new_key = {name: placeholder(name) for name in ("user_id", "name", "body", "answer")}
    task_ids = Task.select(Task.id).where(owned_by_user(Task))
    counted = task_ids.limit(placeholder("limit"))
    return {
        "get": Task.select(*SHOWN, Task.version).where(THIS_TASK),
        "add": _returning(Task.insert(created_at=now, updated_at=now, **new)),
        "over_first_page": task_ids.limit(peewee.SQL("1")).offset(peewee.SQL(str(FIRST_PAGE))),
        "count": peewee.Select([counted], [peewee.fn.COUNT(peewee.SQL("1"))]),
        "toggle": _update(completed=peewee.SQL("NOT completed")),
        "remove": _returning(Task.delete().where(THIS_TASK_IF_MET)),
        "delete_old_key": IdempotencyKey.delete().where(key & old),
        "old_key_ids": old_ids.limit(peewee.SQL("500")),
        "delete_old_keys": IdempotencyKey.delete().where(old & span),
        "add_key": IdempotencyKey.insert(created_at=now, **new_key),
        "replay": IdempotencyKey.select(IdempotencyKey.body, IdempotencyKey.answer).where(key),
    }


def change_query(*names: str) -> Any:
    """Return the statement that changes these columns of a task."""
    return _update(**{name: placeholder(name) for name in names})


def _update(**values: Any) -> Any:
    later = peewee.SQL("CASE WHEN updated_at > :now THEN updated_at ELSE :now END")
    touched = {"updated_at": later, "version": peewee.SQL("version + 1")}
    return _returning(Task.update(**values, **touched).where(THIS_TASK_IF_MET))


def _returning(query: Any) -> Any:
    return query.returning(*SHOWN, Task.version)


def page_query(filters: tuple[str, ...], tags: int, sort: str, first: bool) -> Any:
    """Return the statement of a page, which starts after a position and never uses OFFSET.

    The order by id follows an index; any other order sorts the user's tasks. NULL is replaced by a
    text that sorts after all others, or before them when descending, so that it comes last.
    """
    name, descending = sort.lstrip("-"), sort.startswith("-")
    key = ORDERS[name]
    if getattr(Task, name).null:
        key = f"COALESCE({key}, '{'' if descending else 'z'}')"
    where = [peewee.SQL(FILTERS[name]) for name in filters]
    where += [peewee.SQL(f"REPLACE(tags, :tag_{n}, '') <> tags") for n in range(tags)]
    if not first:
        position = "id > :last" if name == "id" else f"({key}, id) > (:value, :last)"
        where.append(peewee.SQL(position.replace(">", "<") if descending else position))
    direction = " DESC" if descending else ""
    order = [peewee.SQL(f"{part}{direction}") for part in dict.fromkeys([key, "id"])]
    query = Task.select(*SHOWN, peewee.SQL(key)).where(owned_by_user(Task), *where)
    return query.order_by(*order).limit(placeholder("limit"))


class TaskStore:
    """One user's tasks at a time. Returns None if the user has no such task.

    Each change of a task is one SQL statement, compiled once by Peewee and bound to its owner, and
    is therefore atomic; only a create with a key or with a limit takes several, in a transaction.
    In the event loop a change is not on disk yet when its method returns: see `when_on_disk`.
    Raises Unavailable if the database cannot be used, and Changed if a task does not meet
    `conditions`.
    """

    def __init__(self, database: Database, max_tasks: int | None = None) -> None:
        self._database, self._max_tasks = database, max_tasks
        self.cursor_key: str = database.run(database.compile(About.select(About.cursor_key)))[0][0]
        self._sql = {name: database.compile(query) for name, query in queries().items()}
        self._change = lru_cache(256)(lambda *names: database.compile(change_query(*names)))
        self._page = lru_cache(256)(lambda *shape: database.compile(page_query(*shape)))
        self._searches: WeakValueDictionary[str, Semaphore] = WeakValueDictionary()  # by user
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def page_reader(self, user_id: str, listing: Listing) -> Iterator[ReadPage]:
        """Yield the function that reads pages.

        A search waits for one of the user's places. Raises Busy if none becomes free, or if the
        client has left.
        """
        if not self._is_search(user_id, listing):
            yield partial(self.page, user_id)
            return
        if thread_state.in_event_loop:
            raise SearchWouldBlock
        check_client()
        with self._lock:
            new = Semaphore(SEARCHES_OF_USER, partial(Busy, OTHER_SEARCHES), PLACE_TIMEOUT)
            places = self._searches.setdefault(user_id, new)
        with places.place():
            yield partial(self._search, user_id)

    def _search(self, user_id: str, listing: Listing) -> Page:
        """Read a page. Raises Busy after SEARCH_TIME, or if the client has left."""
        end = time.monotonic() + SEARCH_TIME
        try:
            with self._database.deadline(end):
                return self.page(user_id, listing, end)
        except Unavailable as ex:
            check_client()
            if time.monotonic() < end:
                raise
            detail = f"the search took over {SEARCH_TIME:.0f} s; narrow it by other parameters"
            raise Busy(detail) from ex

    def _is_search(self, user_id: str, listing: Listing) -> bool:
        """Say whether a page reads texts, or each task of a user who has more than FIRST_PAGE."""
        if listing.q:
            return True
        filters = listing.priority, listing.tags, listing.due_before, listing.due_after
        if listing.is_by_id and not any(filters):
            return False
        with contextlib.suppress(WouldBlock):  # then it runs where searches do
            return bool(self._database.run(self._sql["over_first_page"], user_id=user_id))
        return True

    def page(self, user_id: str, listing: Listing, end: float = math.inf) -> Page:
        """Return a page as a JSON array, and the listing of the tasks that follow, or None.

        A page has at most `limit` tasks; a listing without `limit` is read in pages too. Within
        `deadline(end)`, pass the same `end`.
        """
        size = listing.limit or (NEXT_PAGE if listing.after or not listing.is_by_id else FIRST_PAGE)
        sql, values = self._page_statement(listing)
        values |= {"user_id": user_id, "limit": size + 1}
        room = MAX_PAGE_BYTES if listing.limit or listing.is_by_id else MAX_SORTED_PAGE_BYTES
        if size <= FIRST_PAGE:
            found = self._database.run(sql, **values)
            # One call of the encoder: encoding each task by itself takes 40 % longer.
            tasks = [view(row) for row in found[:size]]
            after = (found[size - 1][-1], tasks[-1].id) if len(found) > size else None
            page = to_json(tasks)
            if len(page) > room:
                page, after = _fill_page(found, size, room)
        else:
            # Without `closing`, its statement would stay open, with its snapshot of the database.
            with contextlib.closing(self._database.rows(sql, end, **values)) as rows:
                page, after = _fill_page(rows, size, room)
        return page, after and msgspec.structs.replace(listing, after=after)

    def _page_statement(self, listing: Listing) -> tuple[str, dict[str, Any]]:
        value, last = listing.after or (None, None)
        asked = ((name, getattr(listing, name)) for name in FILTERS)
        values = {name: value for name, value in asked if value is not None and value != ""}
        sql = self._page(tuple(values), len(listing.tags), listing.sort, last is None)
        values |= {f"tag_{place}": quoted(tag) for place, tag in enumerate(listing.tags)}
        return sql, values | {"q": listing.q.casefold(), "value": value, "last": last}

    def get(self, user_id: str, task_id: int) -> Stored | None:
        """Return one task."""
        return _first_stored(self._database.run(self._sql["get"], user_id=user_id, id=task_id))

    def add(self, user_id: str, task: dict[str, Any], key: str | None = None) -> Stored | None:
        """Create a task. Returns None if the key was used for another task. Raises TooManyTasks.

        A create that is repeated with its key within 24 hours returns the task as it was created.
        """
        now = datetime.now(UTC)
        values = {**columns(task), "user_id": user_id, "now": timestamp(now)}
        if key is None and self._max_tasks is None:
            return _first_stored(self._database.write(self._sql["add"], **values))
        with self._database.transaction():
            if key is None:
                return self._add_within_limit(values)
            # Of this key only: creates that wait take places from other users.
            self._database.lock(user_id, key)
            before = timestamp(now - IDEMPOTENCY_WINDOW)
            values |= {"name": key, "body": _digest(task), "before": before}
            self._run("delete_old_key", values)
            for known, answer in self._run("replay", values):
                return _replayed(answer) if known == values["body"] else None
            stored = self._add_within_limit(values)
            self._run("add_key", values | {"answer": to_json(stored.task).decode()})
            return stored

    def _add_within_limit(self, values: dict[str, Any]) -> Stored:
        if self._max_tasks is not None:
            self._database.lock(values["user_id"])
            [(count,)] = self._run("count", values | {"limit": self._max_tasks})
            if count >= self._max_tasks:
                raise TooManyTasks(f"{self._max_tasks:,}")
        return _stored(*self._run("add", values))

    def change(
        self, user_id: str, task_id: int, changes: dict[str, Any], conditions: Conditions = ANY
    ) -> Stored | None:
        """Change these fields, and return the task as it is now."""
        if changes:
            values = columns(changes)
            return self._write(self._change(*values), conditions, user_id, task_id, **values)
        found = self.get(user_id, task_id)
        if found and (conditions.match_fails(found.tag) or conditions.none_match_fails(found.tag)):
            raise Changed(found.tag)
        return found

    def toggle(self, user_id: str, task_id: int, conditions: Conditions = ANY) -> Stored | None:
        """Toggle whether the task is completed, and return the task as it is now."""
        return self._write(self._sql["toggle"], conditions, user_id, task_id)

    def remove(self, user_id: str, task_id: int, conditions: Conditions = ANY) -> Stored | None:
        """Delete the task, and return it as it was."""
        return self._write(self._sql["remove"], conditions, user_id, task_id)

    def expire_keys(self) -> None:
        """Delete all expired idempotency keys, 500 at a time so that no write waits long."""
        before = timestamp(datetime.now(UTC) - IDEMPOTENCY_WINDOW)
        ids: list[Row] = [(0,)]  # the first write deletes nothing; /readyz learns if it fails
        while ids:
            span = {"first": ids[0][0], "last": ids[-1][0]}
            self._database.write(self._sql["delete_old_keys"], before=before, **span)
            ids = self._database.run(self._sql["old_key_ids"], before=before)  # without a lock
            time.sleep(0.05 if ids else 0)  # other writes begin

    def _run(self, name: str, values: dict[str, Any]) -> list[Row]:
        return self._database.run(self._sql[name], **values)

    def _write(
        self, sql: str, conditions: Conditions, user_id: str, task_id: int, **values: Any
    ) -> Stored | None:
        values |= msgspec.structs.asdict(conditions) | {"now": timestamp(datetime.now(UTC))}
        stored = _first_stored(self._database.write(sql, user_id=user_id, id=task_id, **values))
        if not stored and conditions != ANY and (other := self.get(user_id, task_id)):
            raise Changed(other.tag)
        return stored


def view(row: Row) -> View:
    """Return a row as a task, without its last column: the version, or the position in a list."""
    values = list(row[:-1])
    for place, convert in CONVERTED:
        values[place] = convert(values[place])
    return TaskView(*values)


def _fill_page(rows: Iterable[Row], limit: int, room: int) -> tuple[bytes, Position | None]:
    """Return the JSON of at most `limit` tasks, of about `room` bytes, and where more follow."""
    tasks, after = list[bytes](), None
    for row in rows:
        if len(tasks) == limit or room <= 0:
            break
        task = view(row)
        tasks.append(to_json(task))
        after, room = (row[-1], task.id), room - len(tasks[-1])
    else:
        after = None
    return b"[%b]" % b",".join(tasks), after


def _stored(row: Row) -> Stored:
    task = view(row)
    return Stored(task, task.id, f'"{row[-1]}-{task.updated_at}"')


def _first_stored(rows: list[Row]) -> Stored | None:
    return _stored(rows[0]) if rows else None


def _digest(task: dict[str, Any]) -> str:
    """Return the SHA-256 of a requested task, which does not change when a field is added."""
    asked = {
        name: value
        for name, value in task.items()
        if name in DIGESTED or value != FIELDS[name].default
    }
    return hashlib.sha256(to_json(asked)).hexdigest()


def _replayed(answer: str) -> Stored:
    task = msgspec.json.decode(answer)
    return Stored(task, task["id"], f'"1-{task["updated_at"]}"', replayed=True)


# --- Database -------------------------------------------------------------------------------------

SCHEMA = shipped("schema.sql")
MIGRATIONS = shipped("migrations")
VERSION = 3  # of the schema; migrations/N.sql makes version N from the one before it
# A statement of a script, up to a semicolon at the end of a line, where a comment may follow.
# sqlite3's `executescript` would commit first.
STATEMENT = re.compile(r"(?ms).+?;(?: *--[^\n]*)?$")
VERSION_1 = ["id", "user_id", "title", "description", "completed", "created_at", "updated_at"]
MIN_SQLITE = (3, 35)  # the first with RETURNING
MIN_FREE_SPACE = 256 * 1024  # bytes of free space; below it SQLite cannot store every task
# SQLite's errors that mean that the database cannot be used; others are errors in taskd.
UNUSABLE = ("DatabaseError", "OperationalError")
# Messages that mean that no write can be stored.
UNWRITABLE = re.compile("full|read-?only|I/O error|No space|unable to open", re.IGNORECASE)
SESSION = """
    SET statement_timeout = {:.0f}; SET idle_in_transaction_session_timeout = 0;
    SET lock_timeout = {:.0f}; SET default_transaction_isolation = 'read committed';
    SET quote_all_identifiers = off; SELECT set_config('synchronous_commit',
        COALESCE(NULLIF(current_setting('synchronous_commit'), 'off'), 'on'), FALSE)
"""  # in milliseconds; a commit is on disk before it is answered, whatever is set later
BACKEND = "SELECT pg_backend_pid(), pg_postmaster_start_time()::text"  # what serves a session
MIGRATION_LOCK = int.from_bytes(b"taskd")  # PostgreSQL's advisory lock, held while taskd starts
TABLES = tuple(model._meta.table_name for model in MODELS)
# Seconds that a write waits for other threads of this process, and then for the database's lock.
LOCK_TIMEOUT = 4.0
MIGRATION_TIMEOUT = 60.0  # seconds that a start waits for another one, which may be migrating
LOCK_RETRY = 0.01  # seconds until a write that waits for SQLite's lock is tried again
MAX_WAL_PAGES = 16 * 1024  # of 4 KiB in SQLite's write-ahead log; it grows while searches overlap
DEADLINE_STEPS = 1000  # SQLite instructions between two checks of the time
CONNECT_WAIT = 0.8  # seconds that requests wait for each new connection to PostgreSQL
SLOW_COMMIT = 0.002  # seconds; if commits take longer, the event loop does not wait for them
TRANSACTION = "BEGIN IMMEDIATE", "COMMIT", "ROLLBACK"
SAVEPOINT = "SAVEPOINT write", "RELEASE write", "ROLLBACK TO write"  # in the event loop's batch
too_many_writes = partial(Unavailable, "the database", "too many writes are waiting")


class DatabaseError(Exception):
    """The database cannot be opened or does not fit schema.sql; the message says which and why."""


class Unstorable(Exception):
    """The user id cannot be stored by this database."""


def open_database(settings: Settings, statement_timeout: float = 2 * LOCK_TIMEOUT) -> Database:
    """Return the database of the settings, created or migrated if need be. Raises DatabaseError.

    PostgreSQL cancels a statement after the time-out in seconds; 0 means no time-out.
    """
    if settings.database_url.startswith("postgresql:"):
        return Postgres(settings, statement_timeout)
    return Sqlite(settings.database, settings.threads // 2)


def compiled(query: peewee.Query, database: peewee.Database) -> str:
    """Return the SQL of a query all of whose values are parameters."""
    return str(database.get_sql_context().sql(query).query()[0])


def first_line(ex: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has none."""
    return (str(ex).splitlines() or [type(ex).__name__])[0]


class WriteHealth:
    """Remembers for /readyz that a write has failed, until a write of its own succeeds.

    Reads show nothing of it: they work on a full or read-only disk too.
    """

    _failure = ""
    probe = "UPDATE about SET version = version"  # a write that changes nothing
    write: Callable[..., object]

    def _unavailable(self, ex: Exception) -> Unavailable:
        """Return the error for a statement that failed, and remember why if all writes may fail.

        A read can fail for the same reason: then the next check finds that a write succeeds.
        """
        why = first_line(ex)
        self._failure = why if UNWRITABLE.search(why) else self._failure
        return Unavailable("the database", why)

    def _check_writes(self) -> None:
        """Raise Unavailable if a write has failed, and another one fails now."""
        if not self._failure:
            return
        try:
            self.write(self.probe)
        except Unavailable as ex:
            raise Unavailable("the database, which stores no writes,", ex.args[1]) from ex
        when_on_disk(partial(setattr, self, "_failure", ""))


class Sqlite(WriteHealth):
    """SQLite: a connection in each thread, and one write at a time.

    The event loop adds the writes of many requests to one transaction of `_writer`, the batch, and
    commits it before it answers them: they share a flush of the disk. `_event_loop_connection`,
    which reads, does not see them earlier. In other threads `_worker_connection` is one for each,
    and each write is committed by itself. `_anchor` is never closed while taskd serves, so that
    SQLite keeps its write-ahead log; `_writer` is closed after an error.
    """

    probe = "UPDATE about SET rowid = -rowid"  # SQLite writes no row that stays as it is

    def __init__(self, path: str, waiting: int) -> None:
        """Open the database; at most `waiting` threads wait to write. Raises DatabaseError."""
        prepare_database(path)
        self._event_loop_connection = connect(path, timeout=0, cache=16_000)
        self._writer = connect(path, timeout=0, cache=16_000, thread_safe=False)
        self._worker_connection = self.peewee = connect(path, timeout=LOCK_TIMEOUT)
        self._path, self._opener = Path(path), threading.get_ident()
        self._anchor = connect(path, timeout=LOCK_TIMEOUT, thread_safe=False)
        self._files: list[tuple[Path, os.stat_result]] = []
        end = time.monotonic() + LOCK_TIMEOUT
        while not self._files:
            try:
                self._files = self._open_files()
            except peewee.DatabaseError as ex:
                if "locked" not in str(ex) or time.monotonic() > end:
                    raise DatabaseError(f"{path} cannot be opened: {ex}") from None
                time.sleep(LOCK_RETRY)  # SQLite itself does not wait to begin its log
        self._queue, self._write_lock = Semaphore(waiting, too_many_writes), threading.Lock()
        self._committing, self._commit_time = False, 0.0  # seconds

    def compile(self, query: peewee.Query) -> str:
        """Return the SQL of a query all of whose values are parameters."""
        return compiled(query, self._worker_connection)

    def run(self, sql: str, **values: Any) -> list[tuple[Any, ...]]:
        """Run a statement and return its rows. Raises Unavailable, or WouldBlock."""
        try:  # directly, because most requests run one; the last fetch commits, and can fail
            return self._current().connection().execute(sql, values).fetchall()  # type: ignore
        except (peewee.DatabaseError, sqlite3.DatabaseError) as ex:
            self._raise_failure(ex)

    def rows(self, sql: str, end: float = math.inf, **values: Any) -> Generator[tuple[Any, ...]]:
        """Read a statement's rows one by one, until the iterator is closed."""
        try:
            with contextlib.closing(self._current().connection().execute(sql, values)) as cursor:
                yield from cursor
        except (peewee.DatabaseError, sqlite3.DatabaseError) as ex:
            self._raise_failure(ex)

    def _raise_failure(self, ex: Exception) -> NoReturn:
        """Roll back, and raise BatchFailed, WouldBlock, Unavailable or the error itself."""
        if thread_state.after_commit is not None:
            _discard(self._writer)
            raise BatchFailed from None
        _discard(self._current())  # its state is not known; the next request opens a new one
        if thread_state.in_event_loop:  # perhaps it is locked
            raise WouldBlock from None
        if type(ex).__name__ not in UNUSABLE:
            raise ex
        raise self._unavailable(ex) from ex

    @contextlib.contextmanager
    def deadline(self, end: float) -> Iterator[None]:
        """Let this thread's statements raise Unavailable after `end`, or once the client has left.

        `end` is a time of time.monotonic().
        """
        self.run("SELECT 1")  # opens the connection, or raises Unavailable
        self._checkpoint_if_long()
        connection = self._current().connection()

        def is_over() -> bool:
            return time.monotonic() > end or thread_state.client_has_left()

        connection.set_progress_handler(is_over, DEADLINE_STEPS)
        try:
            yield
        finally:
            with contextlib.suppress(sqlite3.ProgrammingError):  # it was closed
                connection.set_progress_handler(None, 0)

    def _checkpoint_if_long(self) -> None:
        """Checkpoint a log that is too long; raise Busy if other readers prevent it.

        SQLite writes to the beginning of its log again when no reader needs what is there.
        """
        self._check_files()
        if any(file.stat().st_size > 4096 * MAX_WAL_PAGES for file, _ in self._files[1:]):
            [[_, pages, moved]] = self.run("PRAGMA wal_checkpoint")
            if pages > MAX_WAL_PAGES and moved < pages:
                raise Busy("other readers must end first; send it again")

    def lock(self, user_id: str, key: str = "") -> None:
        """Do nothing: SQLite has one writer, so a transaction already excludes other creates."""

    def write(self, sql: str, **values: Any) -> list[tuple[Any, ...]]:
        """Run a statement that writes, exclusively; it is on disk when `when_on_disk` calls."""
        with self._exclusively():
            return self.run(sql, **values)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Run several statements exclusively; all of them are stored, or none."""
        begin, commit, roll_back = SAVEPOINT if thread_state.in_event_loop else TRANSACTION
        with self._exclusively():
            self.run(begin)
            try:
                yield
                self.run(commit)
            except Exception:
                if _is_in_transaction(self._current()):
                    self.run(roll_back)
                raise

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Join the batch in the event loop; in another thread wait until no other one writes."""
        if thread_state.in_event_loop:
            self._join_batch()
            yield
            return
        with self._queue.place():  # SQLite's own busy handler is unfair to threads that wait
            if not self._write_lock.acquire(timeout=LOCK_TIMEOUT):
                raise Unavailable("the database", "the writes before this one took too long")
        try:
            self._check_files()  # the write would go to a deleted file
            yield
            self._check_files()  # the file was replaced meanwhile, and the write is lost
        finally:
            self._write_lock.release()

    def _join_batch(self) -> None:
        """Begin the batch, unless it has begun, and let this request's statements be part of it."""
        if not self.begin():
            if thread_state.write_timed_out:
                raise Unavailable("the database", "database is locked")
            raise WriteWouldBlock
        if thread_state.after_commit is None:
            thread_state.after_commit = []

    def begin(self) -> bool:
        """Begin the batch, if none is open; return False while another thread or process writes."""
        if self._committing:
            return False
        if _is_in_transaction(self._writer):
            return True
        if not self._has_its_files():
            raise BatchFailed
        if self._write_lock.locked():  # that thread may wait for SQLite, and asks less often
            return False
        try:
            self._writer.execute_sql("BEGIN IMMEDIATE")
        except peewee.DatabaseError as ex:
            if "locked" in str(ex):
                return False
            _discard(self._writer)
            raise BatchFailed from None
        return True

    def commit(self) -> Future[bool]:
        """Commit the batch, in another thread if the disk is slow.

        The result is False if the batch was rolled back, or its file replaced.
        """
        self._committing, done = True, Future[bool]()
        if self._commit_time > SLOW_COMMIT:
            with contextlib.suppress(RuntimeError):  # the system allows no further thread
                threading.Thread(target=self._commit, args=[done], daemon=True).start()
                return done
        self._commit(done)
        return done

    def _commit(self, done: Future[bool]) -> None:
        started, stored = time.monotonic(), True
        try:
            self._writer.execute_sql("COMMIT")
        except peewee.DatabaseError:  # the requests run again, and one that fails says why
            _discard(self._writer)
            stored = False
        stored, self._committing = stored and self._has_its_files(), False
        seconds = min(time.monotonic() - started, 10 * SLOW_COMMIT)
        self._commit_time += (seconds - self._commit_time) / 8  # a moving average
        done.set_result(stored)

    def _current(self) -> peewee.SqliteDatabase:
        """Return Peewee's object for the database, whose connection this thread uses now."""
        if thread_state.after_commit is not None:
            return self._writer
        if thread_state.in_event_loop:
            return self._event_loop_connection
        return self._worker_connection

    def check(self) -> None:
        """Raise Unavailable unless the database answers, fits schema.sql and is at its path."""
        self._check_files()
        self.run("SELECT 1 FROM task LIMIT 1")
        try:
            _check_fit(self._current(), sqlite_definitions)
        except (peewee.DatabaseError, sqlite3.DatabaseError) as ex:
            raise Unavailable("the database", str(ex)) from ex
        if self._failure and shutil.disk_usage(self._path.parent).free < MIN_FREE_SPACE:
            raise Unavailable("the database, whose disk is full,", self._failure)
        self._check_writes()

    def _open_files(self) -> list[tuple[Path, os.stat_result]]:
        """Open `_anchor`, which stays open, and return the files of the database and its log.

        While a connection is open, SQLite does not delete the log.
        """
        self._anchor.execute_sql("SELECT 1 FROM task LIMIT 1").fetchall()
        real = os.path.realpath(self._path)
        files = [file for file in map(Path, (f"{real}-wal", f"{real}-shm")) if file.exists()]
        return [(file, file.stat()) for file in (self._path, *files)]

    def _has_its_files(self) -> bool:
        """Say whether the database and its log are still the files that were opened.

        SQLite would go on writing to files that were deleted or replaced; those writes are lost.
        """
        with contextlib.suppress(OSError, peewee.DatabaseError):
            if self._anchor.is_closed():  # by `close`
                self._files = self._open_files()
            return all(os.path.samestat(file.stat(), opened) for file, opened in self._files)
        return False

    def _check_files(self) -> None:
        """Raise Unavailable unless the database and its log are the files that were opened."""
        if not self._has_its_files():
            why = "restart taskd to serve the file that is there now"
            raise Unavailable("the database, whose file was replaced or deleted,", why)

    def close(self) -> None:
        """Close this thread's connections; the last one to close checkpoints SQLite's log."""
        self._event_loop_connection.close()
        self._worker_connection.close()
        if thread_state.in_event_loop and not self._committing:
            self._writer.close()
        if threading.get_ident() == self._opener:
            self._anchor.close()


def _discard(database: peewee.SqliteDatabase) -> None:
    """Roll back the transaction of a connection and close it, which releases its lock."""
    if not database.is_closed():
        with contextlib.suppress(sqlite3.Error):
            database.connection().rollback()
        database.close()


def _is_in_transaction(database: peewee.SqliteDatabase) -> bool:
    return not database.is_closed() and bool(database.connection().in_transaction)


def connect(
    path: str, timeout: float, cache: int = 500, thread_safe: bool = True
) -> peewee.SqliteDatabase:
    """Return a database that opens a connection in each thread, or one for all if not thread_safe.

    A connection waits `timeout` seconds for another's lock, and keeps up to `cache` kB of pages.
    """
    # Reads never wait, and a commit is on disk.
    pragmas = {"journal_mode": "wal", "synchronous": "full", "cache_size": str(-cache)}
    pragmas["journal_size_limit"] = str(4096 * MAX_WAL_PAGES)  # or a log that was longer stays so
    existing = f"{Path(path).absolute().as_uri()}?mode=rw"  # never creates an empty file
    threads: dict[str, Any] = {"thread_safe": thread_safe, "check_same_thread": thread_safe}
    return peewee.SqliteDatabase(existing, uri=True, pragmas=pragmas, timeout=timeout, **threads)


def prepare_database(path: str) -> None:
    """Create a file that fits schema.sql, with mode 600, or migrate or check an existing one.

    Before a migration the database is copied to a file beside it. Raises DatabaseError for a file
    that cannot be opened or does not fit, and leaves it unchanged.
    """
    if sqlite3.sqlite_version_info < MIN_SQLITE:
        raise DatabaseError(f"SQLite {sqlite3.sqlite_version} is too old; 3.35 is needed")
    # Absolute, because SQLite may take file:x for a URI.
    database = peewee.SqliteDatabase(str(Path(path).absolute()), timeout=LOCK_TIMEOUT)
    try:
        Path(path).parent.stat()  # its error names a directory that is missing
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        if not Path(path).is_file():
            raise OSError("it is not a regular file")
        if schema_version(database) < VERSION:
            _migrate_file(database, path)
        check_schema(database, path, sqlite_definitions)
    except (peewee.DatabaseError, sqlite3.DatabaseError, OSError) as ex:
        full = "I/O" in str(ex) and shutil.disk_usage(Path(path).parent).free < MIN_FREE_SPACE
        why = "database or disk is full" if full else ex  # SQLite may report only an I/O error
        raise DatabaseError(f"{path} cannot be opened: {why}") from None
    finally:
        database.close()


def _migrate_file(database: peewee.SqliteDatabase, path: str) -> None:
    database.register_function(lambda text: text and text.casefold(), "casefold", 1)
    database.execute_sql(f"PRAGMA busy_timeout = {1000 * MIGRATION_TIMEOUT:.0f}")
    database.execute_sql("BEGIN IMMEDIATE")
    version = schema_version(database)  # another process may have migrated it meanwhile
    copy = _copy_beside(path, version) if 0 < version < VERSION else None
    try:
        if version < VERSION:
            migrate(database, version)
            check_schema(database, path, sqlite_definitions)
        database.execute_sql("COMMIT")
    except BaseException as ex:
        traceback.clear_frames(ex.__traceback__)  # a cursor there would keep the file locked
        database.close()
        if copy and _is_whole(database, path, version):
            copy.unlink()
        raise
    _checkpoint_migration(database, path)


def _checkpoint_migration(database: peewee.SqliteDatabase, path: str) -> None:
    """Move a migration from SQLite's log into the database, or warn that it needs the log."""
    try:
        database.execute_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    except peewee.OperationalError as ex:
        log.warning("%s is not whole without the file %s-wal: %s", path, path, str(ex))


def _is_whole(database: peewee.SqliteDatabase, path: str, version: int) -> bool:
    """Say whether a rollback has succeeded; opening the file finishes it."""
    with contextlib.suppress(peewee.DatabaseError, sqlite3.DatabaseError):
        found = schema_version(database)
        return found == version and not Path(f"{os.path.realpath(path)}-journal").exists()
    return False


def _copy_beside(path: str, version: int) -> Path:
    """Copy the database to a file beside it, renamed when complete, and return its path.

    Raises OperationalError without the space for this copy and for the migration.
    """
    needed = Path(path).stat().st_size * (6 if version == 1 else 3)
    if shutil.disk_usage(Path(path).parent).free < needed:
        raise peewee.OperationalError(f"database or disk is full: {needed} bytes must be free")
    copy = Path(f"{path}.v{version}-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")
    part, journal = Path(f"{path}.part").absolute(), Path(f"{path}.part-journal")
    with contextlib.ExitStack() as cleanup:
        for left in (part, journal):  # left by a start that was killed
            left.unlink(missing_ok=True)
            cleanup.callback(left.unlink, missing_ok=True)
        os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with (
            contextlib.closing(sqlite3.connect(Path(path).absolute())) as source,
            contextlib.closing(sqlite3.connect(part)) as target,
        ):
            source.backup(target)
        part.rename(copy)
    log.info("%s is kept as %s before its migration", path, copy)
    return copy


class PostgresPool(peewee.PostgresqlDatabase):
    """A pool of connections to PostgreSQL; a thread of its own makes new ones, one by one.

    If the server is silent, that thread waits for seconds; a request that needs a connection waits
    for at most `wait_limit`. The session settings override those of the role, database and libpq.
    """

    session_settings: str
    answer_timeout: float | None = None  # seconds until a server that is silent counts as lost
    wait_limit = threading.TIMEOUT_MAX  # seconds from its start to wait for each new connection

    def __init__(self, url: str, **parameters: Any) -> None:
        super().__init__(url, prefer_psycopg3=True, encoding="UTF8", **parameters)
        self._idle: list[Any] = []
        self._new: Future[None] | None = None
        self._changed, self._deadline = threading.Condition(), 0.0

    def connect(self, reuse_if_open: bool = False) -> bool:
        """Take an idle connection, or wait for a new one or for one that becomes idle."""
        while True:
            with contextlib.suppress(IndexError):  # none is idle
                return bool(super().connect(reuse_if_open))
            try:
                self._wait_for_idle()
            except (TimeoutError, RuntimeError):  # or the system allows no further thread
                raise peewee.OperationalError("no server accepts connections") from None

    def close_idle(self) -> None:
        """Close the connections that nobody uses."""
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()

    def _connect(self) -> Any:
        while True:
            connection, poll = self._idle.pop(), select.poll()
            # A server that closes an idle connection says so; a round trip could take long.
            poll.register(connection, select.POLLIN)
            if not poll.poll(0):
                return connection
            connection.close()

    def _close(self, connection: Any) -> None:
        if connection.info.transaction_status:  # not 0, idle: a time-out has ended its statement
            connection.close()
        else:
            with self._changed:
                self._idle.append(connection)
                self._changed.notify()

    def _wait_for_idle(self) -> None:
        """Start a thread that connects, unless one runs, and wait until a connection is idle.

        Raises the error of the attempt, or TimeoutError if it takes longer than `wait_limit`.
        """
        with self._changed:
            if self._new is None or self._new.done():
                new: Future[None] = Future()
                threading.Thread(target=self._add_connection, args=(new,), daemon=True).start()
                self._new, self._deadline = new, time.monotonic() + self.wait_limit
            new, wait_limit = self._new, self._deadline - time.monotonic()
            self._changed.wait_for(lambda: self._idle or new.done(), wait_limit)
            if not self._idle:
                new.result(0)

    def _add_connection(self, new: Future[None]) -> None:
        try:
            self._idle.append(self.new_connection())
            new.set_result(None)
        except Exception as ex:
            new.set_exception(ex)
        with self._changed:
            self._changed.notify_all()

    def new_connection(self) -> Any:
        """Return a connection that is not one of the pool's."""
        for attempt in range(5):  # a very short time-out of the role may end it
            connection = super()._connect()  # type: ignore[misc]  # the stubs leave it out
            self._prefer(connection.info)
            connection.wait = lambda gen, w=connection.wait: w(gen, timeout=self.answer_timeout)
            try:  # after connecting: PgBouncer rejects settings in the start-up packet
                connection.execute(self.session_settings)
                return connection
            except BaseException as ex:
                connection.close()
                if attempt == 4 or getattr(ex, "sqlstate", None) != "57014":
                    raise

    def _prefer(self, server: Any) -> None:
        """Try this server first from now on: the one that the URL names first may be silent."""
        named = {name: self.connect_params.get(name, "") for name in ("host", "hostaddr", "port")}
        lists = {name: text.split(",") for name, text in named.items() if "," in text}
        this = tuple(str(getattr(server, name)) for name in lists)
        servers = sorted(zip(*lists.values(), strict=True), key=lambda other: other != this)
        for name, values in zip(lists, zip(*servers, strict=True), strict=True):
            self.connect_params[name] = ",".join(values)


class Postgres(WriteHealth):
    """PostgreSQL: a pool of connections; several taskd processes can share the database."""

    def __init__(self, settings: Settings, statement_timeout: float) -> None:
        """Open the database and prepare its tables. Raises DatabaseError or SettingsError."""
        parameters = libpq_parameters(settings.database_url)
        from psycopg import Error as PsycopgError

        self._pool = self.peewee = PostgresPool(settings.database_url, **parameters)
        self._pool.session_settings = SESSION.format(1000 * statement_timeout, 1000 * LOCK_TIMEOUT)
        # Fewer places than threads, so that reads always find a thread.
        self._queue = Semaphore(settings.threads * 3 // 4, too_many_writes)
        self._unusable = (peewee.PeeweeException, PsycopgError)
        try:
            self._prepare(settings.database)
        except (*self._unusable, ValueError) as ex:
            self.close()
            raise DatabaseError(f"{settings.database} cannot be opened: {first_line(ex)}") from None
        if statement_timeout:
            self._pool.answer_timeout, self._pool.wait_limit = statement_timeout + 1, CONNECT_WAIT

    def compile(self, query: peewee.Query) -> str:
        """Return the SQL of a query all of whose values are parameters."""
        sql = compiled(query, self._pool).replace("%", "%%")
        return re.sub(r":([a-z][a-z_0-9]*)", r"%(\1)s", sql)

    def run(self, sql: str, **values: Any) -> list[tuple[Any, ...]]:
        """Run a statement and return its rows. Raises Unavailable, or WouldBlock."""
        with self._connected():
            cursor = self._pool.execute_sql(sql, values)
            return cursor.fetchall() if cursor.description else []

    def write(self, sql: str, **values: Any) -> list[tuple[Any, ...]]:
        """Run a statement that writes; it is on disk when this returns."""
        # Connect first: if the places were taken by writes that wait for a connection, none would
        # be freed, and further writes would be rejected.
        with self._connected(), self._queue.place():
            return self.run(sql, **values)

    def rows(self, sql: str, end: float = math.inf, **values: Any) -> Generator[tuple[Any, ...]]:
        """Read a statement's rows one by one, until the iterator is closed; each fetch by `end`."""
        with (
            self._connected(),
            self._pool.transaction(),
            self._pool.connection().cursor("rows") as cursor,  # the server keeps the rows
        ):
            cursor.execute(sql, values)
            while rows := cursor.fetchmany(50):  # a task has up to 45 kB
                yield from rows
                self._limit_statement(end)

    def lock(self, user_id: str, key: str = "") -> None:
        """Lock out creates of the user that lock the same key, until the transaction ends."""
        sql = "SELECT pg_advisory_xact_lock(hashtext(%(user_id)s), hashtext(%(key)s))"
        self.run(sql, user_id=user_id, key=key)

    @contextlib.contextmanager
    def deadline(self, end: float) -> Iterator[None]:
        """Let this thread's next statement and each fetch of rows raise Unavailable after `end`."""
        with self._connected(), self._pool.atomic():
            self._limit_statement(end)
            yield

    def _limit_statement(self, end: float) -> None:
        """Let the transaction's next statement raise Unavailable after `end`; inf is never."""
        if (seconds := end - time.monotonic()) < math.inf:
            # 0 is no limit: the cursor can still be closed.
            self.run(f"SET LOCAL statement_timeout = {max(0, math.ceil(1000 * seconds))}")
        if seconds <= 0:
            raise Unavailable("the database", "the time for its statements has passed")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Run several statements together; all of them are on disk when this ends, or none."""
        with self._connected(), self._queue.place(), self._pool.atomic():
            yield

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """Take a connection from the pool, or use that of the transaction under way."""
        if thread_state.in_event_loop:
            raise WouldBlock
        if not self._pool.is_closed():
            yield  # whoever took the connection handles the error
            return
        try:
            self._pool.connect()
            with contextlib.closing(self._pool):
                yield
        except self._unusable as ex:
            original = getattr(ex, "orig", None) or ex.__cause__ or ex.__context__
            code = getattr(original or ex, "sqlstate", None)
            if isinstance(ex, peewee.DataError) or code == "54000":  # too long for an index
                raise Unstorable from ex
            if code not in ("57014", "55P03"):  # statement_timeout, lock_timeout
                # This connection too: after a restart of PostgreSQL none of them works, and one to
                # a server that has become a standby reads but does not write.
                self._pool.close_idle()
            raise self._unavailable(ex) from ex

    def check(self) -> None:
        """Raise Unavailable unless the database answers and fits schema.sql."""
        with self._connected():
            _check_fit(self._pool, portable_definitions)
            [[is_standby]] = self.run("SELECT pg_is_in_recovery()")
        if not is_standby:  # a standby rejects every write, and serves reads
            self._check_writes()

    def close(self) -> None:
        """Close the idle connections."""
        self._pool.close_idle()

    def _prepare(self, name: str) -> None:
        with self._pool.connection_context():
            check_encoding(self._pool, name)
            self._check_transport(name)
            self._check_sessions(name)
            with self._pool.atomic():
                for setting in ("statement_timeout", "lock_timeout"):  # a migration may take long
                    self._pool.execute_sql(f"SET LOCAL {setting} = 0")
                self._pool.execute_sql("SELECT pg_advisory_xact_lock(%s)", (MIGRATION_LOCK,))
                self._pool.execute_sql(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}s'")
                if (version := schema_version(self._pool)) < VERSION:
                    self._check_search_path(version)
                    migrate(self._pool, version, for_postgresql)
                check_schema(self._pool, name, portable_definitions)

    def _check_transport(self, name: str) -> None:
        """Warn of a connection over the network without TLS."""
        connection = self._pool.connection()
        address = connection.info.hostaddr  # empty for a socket in the file system
        away = address and not ipaddress.ip_address(address).is_loopback
        if away and not connection.pgconn.ssl_in_use:
            log.warning("%s is not encrypted on its way: add ?sslmode=verify-full", name)

    def _check_sessions(self, name: str) -> None:
        """Reject a pooler that gives a session another connection for each transaction."""
        ours = self._pool.connection()
        if ours.execute(BACKEND).fetchone()[0] == ours.info.backend_pid:
            return  # no pooler is between: a pooler tells its clients another number
        with contextlib.closing(self._pool.new_connection()) as other:
            served = [one.execute(BACKEND, prepare=False).fetchone() for one in [ours, other] * 20]
        pairs = set(zip(served[::2], served[1::2], strict=True))
        if len(pairs) > 1 or len(set(*pairs)) == 1:
            raise DatabaseError(f"{name} is behind a pooler that is not in session mode")

    def _check_search_path(self, version: int) -> None:
        """Reject a first schema without tables if the search path finds them in another one."""
        [found] = self._pool.execute_sql("SELECT to_regclass('task')::text").fetchone()
        if found and not version:
            raise peewee.DatabaseError(f"{found} is not in the first schema of the search path")


def libpq_parameters(url: str) -> dict[str, Any]:
    """Return the connection parameters of the URL, and those that taskd adds to them."""
    try:
        import psycopg  # loaded only where PostgreSQL is used

        parameters = psycopg.conninfo.conninfo_to_dict(url)
    except ImportError:
        why = "DATABASE_URL needs psycopg: pip install -r requirements-postgresql.txt"
        raise SettingsError(why) from None
    except psycopg.ProgrammingError:  # its message may contain a password with a % in it
        why = "DATABASE_URL cannot be read: write it as PostgreSQL's manual says (libpq)"
        raise SettingsError(why) from None
    defaults = {
        "connect_timeout": os.environ.get("PGCONNECT_TIMEOUT", "3"),
        "tcp_user_timeout": "5000",
        "application_name": os.environ.get("PGAPPNAME", "taskd"),
    }
    return defaults | parameters


def check_encoding(database: peewee.Database, name: str) -> None:
    """Raise DatabaseError if a PostgreSQL database has an encoding that cannot hold every text."""
    [encoding] = database.execute_sql("SHOW server_encoding").fetchone()
    if encoding != "UTF8":
        raise DatabaseError(f"{name} has the encoding {encoding}, and taskd needs UTF8")


def for_postgresql(statement: str) -> str:
    """Translate a statement of schema.sql or a migration; text is sorted by code point."""
    key = "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY"
    statement = statement.replace("INTEGER PRIMARY KEY AUTOINCREMENT", key).replace("%", "%%")
    return re.sub(r"(?<! AS) TEXT\b", ' TEXT COLLATE "C"', statement)


Database = Sqlite | Postgres


def schema_version(database: peewee.Database) -> int:
    """Return the version of the schema that a database has; 0 if it has no tables.

    Version 1 had no table `about`. An unknown table `task` counts as the newest and will not fit.
    """
    if database.table_exists("about"):
        rows = database.execute_sql("SELECT version FROM about").fetchall()
        if len(rows) != 1 or not isinstance(rows[0][0], int):
            raise peewee.DatabaseError("the table about must have one row, with a version")
        return rows[0][0]
    columns = [column.name for column in database.get_columns("task")]
    return 0 if not columns else 1 if columns == VERSION_1 else VERSION


def migrate(database: peewee.Database, version: int, translate: Callable[[str], str] = str) -> None:
    """Run the scripts from this version to the newest, or schema.sql for version 0."""
    numbers = range(version + 1, VERSION + 1)
    scripts = [MIGRATIONS / f"{number}.sql" for number in numbers] if version else [SCHEMA]
    for script in scripts:
        for statement in re.findall(STATEMENT, script.read_text()):
            database.execute_sql(translate(statement))
    if not About.update(version=VERSION).execute(database):
        About.insert(version=VERSION, cursor_key=os.urandom(32).hex()).execute(database)


def check_schema(database: peewee.Database, name: str, describe: Callable[[Any], set[str]]) -> None:
    """Raise DatabaseError if the database is not of this version or does not fit schema.sql."""
    if (version := schema_version(database)) > VERSION:
        newer = f"its schema is version {version}, not {VERSION}; update taskd"
        raise DatabaseError(f"{name} was made by a newer taskd: {newer}")
    if differences := schema_differences(database, describe):
        raise DatabaseError(f"{name} does not fit schema.sql: {differences}")


def _check_fit(database: peewee.Database, describe: Callable[[Any], set[str]]) -> None:
    try:
        check_schema(database, "it", describe)
    except (DatabaseError, peewee.ProgrammingError) as ex:
        raise Unavailable("the database, whose schema does not fit,", first_line(ex)) from None


def schema_differences(database: peewee.Database, describe: Callable[[Any], set[str]]) -> str:
    """Return how taskd's tables differ from schema.sql, in words; more indexes are allowed."""
    wanted, found = _wanted_definitions(describe), describe(database)
    lacking = [f"it lacks {part}" for part in sorted(wanted - found)]
    extra = [f"it has {part}" for part in sorted(found - wanted) if not part.startswith("index")]
    return "; ".join(lacking + extra)


@cache
def _wanted_definitions(describe: Callable[[Any], set[str]]) -> set[str]:
    """Return the definitions of a database that schema.sql has just made."""
    model = peewee.SqliteDatabase(":memory:")
    model.connection().executescript(SCHEMA.read_text())
    wanted = describe(model)
    model.close()
    return wanted


def sqlite_definitions(database: peewee.SqliteDatabase) -> set[str]:
    """Return the columns and indexes of taskd's tables in SQLite's words, normalised."""
    rows = database.execute_sql("SELECT tbl_name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    parts = set()
    for sql in [sql for table, sql in rows.fetchall() if table in TABLES]:
        name, _, columns = " ".join(re.sub("--.*", "", sql).split()).partition("(")
        if name.startswith("CREATE TABLE"):
            each = re.findall(r"(?:[^,(]|\([^)]*\))+", columns)
            parts |= {f"{name.split()[2]}.{part.strip(' )')}" for part in each}
        else:
            parts.add(f"{name.removeprefix('CREATE ').replace('INDEX', 'index')}({columns}")
    return parts


def portable_definitions(database: peewee.Database) -> set[str]:
    """Return the columns and indexes of taskd's tables as any database describes them."""
    parts = set()
    for table in TABLES:
        for column in database.get_columns(table):
            kind = column.data_type.upper().replace("BIGINT", "INTEGER")
            required = "" if column.null or column.name == "id" else " NOT NULL"
            parts.add(f"{table}.{column.name} {kind}{required}")
        indexes = database.get_indexes(table)
        parts |= {f"index on {table} ({', '.join(index.columns)})" for index in indexes}
    return parts


# --- Metrics --------------------------------------------------------------------------------------

# Seconds.
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
CHANGES = {"POST": "created", "PUT": "changed", "PATCH": "changed", "DELETE": "deleted"}


def method_of(req: Request) -> str:
    """Return the method for the log and the metrics; all unknown methods have one name."""
    return str(req.env.get("taskd.method", req.method))


class Metrics:
    """Prometheus metrics: middleware that counts requests, and the resource that serves them.

    They are labelled by route template and kind of statement, never by user.
    """

    def __init__(self) -> None:
        import prometheus_client as prometheus  # loaded only where metrics are asked for

        self._registry = registry = prometheus.CollectorRegistry()
        self._show, self._content_type = prometheus.generate_latest, prometheus.CONTENT_TYPE_LATEST
        count = partial(prometheus.Counter, registry=registry)
        seconds = partial(prometheus.Histogram, registry=registry, buckets=BUCKETS)
        what = ("route", "method")
        self._requests = count("taskd_requests", "Requests.", (*what, "status"))
        self._seconds = seconds("taskd_request_seconds", "Time to answer.", what)
        self._written = count("taskd_tasks_written", "Tasks.", ("change",))
        about = "Time of a statement, transaction or shared commit."
        self.database_seconds = seconds("taskd_database_seconds", about, ("statement",))
        build = prometheus.Info("taskd_build", "What runs.", registry=registry)
        build.info({"version": __version__})
        prometheus.ProcessCollector(registry=registry)

    def process_response(self, req: Request, resp: Response, resource: object, ok: bool) -> None:
        """Count and time a request. Errors are logged and never affect the response."""
        if not req.context.rejection:
            when_on_disk(partial(self._count, req, resp))

    def _count(self, req: Request, resp: Response) -> None:
        what = req.uri_template or "-", method_of(req)
        try:
            self._requests.labels(*what, resp.status_code).inc()
            self._seconds.labels(*what).observe(time.perf_counter() - req.context.started)
            is_change = req.method in CHANGES and resp.status_code in (200, 201)
            if is_change and not resp.get_header("Idempotency-Replayed"):
                self._written.labels(CHANGES[req.method]).inc()
        except Exception:
            log.exception("the metrics lack a request", extra={"id": req.context.id})

    def on_get(self, req: Request, resp: Response) -> None:
        """Answer with all metrics in Prometheus's text format."""
        resp.content_type, resp.data = self._content_type, self._show(self._registry)

    on_head = on_get


class TimedDatabase:
    """A database that measures how long each statement takes."""

    def __init__(self, database: Database, seconds: Any) -> None:
        self._database, self._seconds = database, seconds

    def __getattr__(self, name: str) -> Any:
        """Delegate everything else to the database."""
        return getattr(self._database, name)

    def run(self, sql: str, **values: Any) -> list[Row]:
        """Run a statement."""
        with self._timed(sql):
            return self._database.run(sql, **values)

    def write(self, sql: str, **values: Any) -> list[Row]:
        """Run a statement that writes."""
        with self._timed(sql):
            return self._database.write(sql, **values)

    def rows(self, sql: str, end: float = math.inf, **values: Any) -> Generator[Row]:
        """Read a statement's rows one by one."""
        with self._timed(sql):
            yield from self._database.rows(sql, end, **values)

    def commit(self) -> Future[bool]:
        """Commit the writes of the event loop, and measure it with the flush of the disk."""
        started, done = time.perf_counter(), cast(Sqlite, self._database).commit()
        seconds = self._seconds.labels("commit")
        done.add_done_callback(lambda _: seconds.observe(time.perf_counter() - started))
        return done

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Run several statements together, and measure all of them."""
        with self._timed("transaction"), self._database.transaction():
            yield

    @contextlib.contextmanager
    def _timed(self, sql: str) -> Iterator[None]:
        started, statement, blocked = time.perf_counter(), sql.partition(" ")[0].lower(), False
        try:
            yield
        except WouldBlock:
            blocked = True  # the request runs again, and is measured then
            raise
        finally:
            if not blocked:
                self._seconds.labels(statement).observe(time.perf_counter() - started)


# --- Middleware -----------------------------------------------------------------------------------

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# A client's address in X-Forwarded-For; some proxies add a port.
ADDRESS = re.compile(r"[0-9A-Fa-f.:]{2,45}|\[[0-9A-Fa-f.:]{2,45}\](:[0-9]{1,5})?")
PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")
HEADERS_OF_ALL = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
CORS_ALLOWED = "Authorization, Content-Type, If-Match, If-None-Match, Idempotency-Key, X-Request-ID"
CORS_EXPOSED = (
    "Location, Link, ETag, X-Request-ID, Idempotency-Replayed, Retry-After, WWW-Authenticate"
)
HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+(, ?[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")


class RequestContext:
    """Give every response the headers that all have, and every request an id and a log line."""

    def __init__(self, trusted_proxies: tuple[str, ...]) -> None:
        self._proxies = trusted_proxies

    def process_request(self, req: Request, resp: Response) -> None:
        """Take the client's request id, or make one if it is not valid; start the clock.

        The clock starts when the request was received. Raises the server's rejection of a request,
        so that it gets the same headers and log line.
        """
        req.context.started = req.env.get("taskd.received", time.perf_counter())
        given = req.get_header("X-Request-ID")
        req.context.id = given if given and REQUEST_ID.fullmatch(given) else os.urandom(8).hex()
        resp.set_headers({"X-Request-ID": req.context.id, **HEADERS_OF_ALL})
        if self._proxies:
            req.context.client = self._client(req)
        req.context.rejection = req.env.get("taskd.rejection")
        if req.context.rejection:
            raise req.context.rejection

    def _client(self, req: Request) -> str:
        """Return the client's address, and use the path prefix, that the trusted proxy reports."""
        if self._proxies != ("*",) and req.remote_addr not in self._proxies:
            return str(req.remote_addr)
        prefix = (req.get_header("X-Forwarded-Prefix") or "").removesuffix("/")
        if PREFIX.fullmatch(prefix):
            req.env["SCRIPT_NAME"] = prefix
        hops = [hop.strip() for hop in (req.get_header("X-Forwarded-For") or "").split(",")]
        # The last one that is not a trusted proxy itself.
        forwarded = next((hop for hop in reversed(hops) if hop not in self._proxies), "")
        return forwarded if ADDRESS.fullmatch(forwarded) else str(req.remote_addr)

    def process_response(self, req: Request, resp: Response, resource: object, ok: bool) -> None:
        """Log the request without its token, query and body, and complete Allow for OPTIONS."""
        allow = resp.get_header("Allow")
        if req.method == "OPTIONS" and allow:
            resp.set_header("Allow", f"{allow}, OPTIONS")  # as in the Allow of a 405
            resp.content_type = falcon.MEDIA_TEXT  # an empty body is not JSON
        when_on_disk(partial(self._log, req, resp))

    def _log(self, req: Request, resp: Response) -> None:
        context = req.context
        fields = AccessLogFields(
            method=method_of(req),
            route=req.uri_template or "-",
            status=resp.status_code,
            ms=round((time.perf_counter() - context.started) * 1000, 1),
            id=context.id,
            user=context.user.id if "user" in context else None,
            **({"client": context.client} if self._proxies else {}),
            **({"reason": context.reason} if "reason" in context else {}),
        )
        log.log(logging.ERROR if context.get("unavailable") else logging.INFO, "%s", fields)


class Cors(falcon.CORSMiddleware):  # type: ignore[type-arg]
    """Let pages of exactly these origins call taskd and read its errors (WHATWG Fetch, CORS)."""

    def __init__(self, origins: tuple[str, ...]) -> None:
        super().__init__(allow_origins=origins, expose_headers=CORS_EXPOSED)

    def process_response(self, req: Request, resp: Response, resource: object, ok: bool) -> None:
        """Add the headers; a page of a listed origin may send any header that it asks for.

        taskd reads no cookies, and headers that it does not know have no effect.
        """
        allow = resp.get_header("Allow")
        super().process_response(req, resp, resource, ok)
        resp.append_header("Vary", "Origin")
        if resp.get_header("Access-Control-Allow-Headers"):
            asked = req.get_header("Access-Control-Request-Headers") or ""
            allowed = f"{CORS_ALLOWED}, {asked}" if HEADER_NAMES.fullmatch(asked) else CORS_ALLOWED
            resp.set_header("Access-Control-Allow-Headers", allowed)
        if allow:
            resp.set_header("Allow", allow)


class AuthMiddleware:
    """Let a request for a user's tasks pass only with that user's token.

    The user is left on `req.context.user`. Only the routes in `public` need no token.
    """

    def __init__(self, tokens: Tokens, public: Iterable[str]) -> None:
        self._tokens, self._public = tokens, frozenset(public)

    def process_request(self, req: Request, resp: Response) -> None:
        """Route by the path as it was sent if a slash is encoded in it.

        WSGI decodes %2F, and a user id may have a slash.
        """
        sent = (req.env.get("REQUEST_URI") or req.env.get("RAW_URI", "")).partition("?")[0]
        req.context.is_encoded = "%2f" in sent or "%2F" in sent
        if req.context.is_encoded:
            req.path = sent.removesuffix("/")

    def process_resource(
        self, req: Request, resp: Response, resource: object, params: dict[str, Any]
    ) -> None:
        """Raise 401 without a good token, 403 for another user's URL.

        This runs after routing, because the router reads `//api/...` as `/api/...`. No resource
        learns the user from the URL: the token's `sub` takes its place.
        """
        if req.method == "OPTIONS" or req.uri_template in self._public:
            return  # a CORS preflight carries no token
        req.context.user = user = self._authenticate(req)
        asked, path = params.pop("user_id", ""), req.env["PATH_INFO"]
        if req.context.is_encoded:
            asked = falcon.uri.decode(asked, unquote_plus=False)
        # Bytes that are not UTF-8 are U+FFFD in the parameter, but not in the path.
        if asked != user.id or user.id.encode().decode("latin-1") not in path:
            detail = "this token is not for the user in the URL; use your own user id"
            raise falcon.HTTPForbidden(description=detail)

    def _authenticate(self, req: Request) -> User:
        """Return the user of the Authorization header, or raise 401 (RFC 6750, sections 2.1, 3)."""
        token, error = bearer_token(req.get_header("Authorization") or ""), ""
        try:
            if token:
                return self._tokens.verify(token)
            reason = "send the header Authorization: Bearer <JWT>, with the token from your login"
        except TokenError as ex:
            reason = str(ex)
            error = f', error="invalid_token", error_description="{reason}"'
        req.context.reason = reason
        challenge = f'Bearer realm="taskd"{error}'
        raise falcon.HTTPUnauthorized(description=reason, challenges=[challenge])


# --- Resources ------------------------------------------------------------------------------------

TASK_NUMBER = re.compile(r"[1-9][0-9]{0,18}")
MAX_TASK_NUMBER = 2**63 - 1  # what SQLite can hold
NO_TASK = "you have no task with this id"
MAX_LIST_IN_MEMORY = 512 * 1024  # bytes; a longer list is written to a file, then sent from there
MAX_LISTS = 32  # such files at a time
MAX_LISTS_OF_USER = 8
MAX_LIST_BYTES = 2 * 1024 * 1024 * 1024  # of all such files; half of it of those of a user
Chunk = bytes | memoryview
DOCS_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline';"
    " connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none';"
    " form-action 'none'"
)


class TaskResource:
    """A user's tasks, and one of them."""

    def __init__(self, store: TaskStore) -> None:
        self._store, self._cursors = store, Cursors(store.cursor_key)

    def on_get_collection(self, req: Request, resp: Response) -> None:
        """List the user's tasks: all of them, or a page with a link to the next (RFC 8288)."""
        user_id = req.context.user.id
        listing = read_listing(req, self._cursors) if req.query_string else Listing()
        if listing == Listing(sort=listing.sort):  # it is of all tasks
            ListFile.check(user_id)
        with self._store.page_reader(user_id, listing) as read:
            tasks, rest = read(listing)
            if rest and not listing.limit:
                self._list_all(req, resp, json_chunks(read, tasks, rest))
                return
        resp.data = tasks
        if rest and rest.after:
            cursor = self._cursors.write(rest.after, user_id, rest.sort)
            query = urlencode({**req.params, "after": cursor}, doseq=True)
            resp.set_header("Link", f'<{tasks_path(req)}?{query}>; rel="next"')

    def on_post_collection(self, req: Request, resp: Response) -> None:
        """Create a task, or answer again a create that is repeated with its Idempotency-Key."""
        key = read_idempotency_key(req)
        stored = self._store.add(req.context.user.id, read_body(req, NEW_TASK), key)
        if stored is None:
            used = "was used for another task; send a new one with a new task"
            raise Unprocessable([Fault("Idempotency-Key", used)])
        resp.status = falcon.HTTP_201
        resp.location = f"{tasks_path(req)}/{stored.id}"
        if stored.replayed:
            resp.set_header("Idempotency-Replayed", "true")
        respond_with_task(resp, stored)

    def on_get(self, req: Request, resp: Response, task_id: str) -> None:
        """Answer with a task, or 304 if the caller has its current version."""
        number, conditions = parse_task_id(task_id), read_conditions(req)
        stored = found_or_404(self._store.get(req.context.user.id, number))
        if conditions.match_fails(stored.tag):
            raise Changed(stored.tag)
        respond_with_task(resp, stored)
        if conditions.none_match_fails(stored.tag):
            resp.status, resp.data = falcon.HTTP_304, None

    def on_put(self, req: Request, resp: Response, task_id: str) -> None:
        """Change the fields that the body names."""
        number, conditions = parse_task_id(task_id), read_conditions(req)
        changes, user_id = read_body(req, TASK_CHANGES), req.context.user.id
        respond_with_task(resp, self._store.change(user_id, number, changes, conditions))

    def on_delete(self, req: Request, resp: Response, task_id: str) -> None:
        """Delete a task, and answer with it as it was."""
        number, conditions = parse_task_id(task_id), read_conditions(req)
        respond_with_task(resp, self._store.remove(req.context.user.id, number, conditions))

    on_head_collection = on_get_collection
    on_head = on_get
    on_patch = on_put

    def _list_all(self, req: Request, resp: Response, chunks: Iterator[Chunk]) -> None:
        """Answer with all chunks: from memory, or from a file if they are too many."""
        if thread_state.in_event_loop:
            raise WouldBlock
        start, size = list[Chunk](), 0
        for chunk in chunks:
            start.append(chunk)
            size += len(chunk)
            if size > MAX_LIST_IN_MEMORY:
                break
        else:
            resp.data = b"".join(start)
            return
        file = ListFile(req.context.user.id, itertools.chain(start, chunks))
        resp.content_length = file.size
        if req.method == "HEAD":
            file.close()
        else:
            resp.stream = file


class TaskCompleteResource:
    """Whether a task is completed."""

    def __init__(self, store: TaskStore) -> None:
        self._store = store

    def on_patch(self, req: Request, resp: Response, task_id: str) -> None:
        """Toggle completion, or set it to what the body says."""
        number, conditions, body = parse_task_id(task_id), read_conditions(req), raw_body(req)
        given = read_body(req, COMPLETION, body) if body else {}
        store, task = self._store, (req.context.user.id, number)
        found = store.change(*task, given, conditions) if given else store.toggle(*task, conditions)
        respond_with_task(resp, found)


class ListFile(io.FileIO):
    """A list that is too long for memory, in a temporary file that is deleted when closed.

    Raises Busy if the user, or all users together, have too many such files, or if these are too
    large together, and Unavailable if the disk is full.
    """

    _lock = threading.RLock()  # the garbage collector may close a file in a thread that holds it
    _sizes: ClassVar[dict[tuple[str, int], int]] = {}  # of the open files

    def __init__(self, user_id: str, chunks: Iterable[Chunk]) -> None:
        """Write all chunks into the file, which is then read from its beginning."""
        self._place, self.size = (user_id, id(self)), 0
        with self._lock:
            self.check(user_id, len(self._sizes) >= MAX_LISTS)
            self._sizes[self._place] = 0
        try:
            with tempfile.TemporaryFile() as file:
                super().__init__(os.dup(file.fileno()), "r+")
            for chunk in chunks:
                self._append(chunk)
        except BaseException as ex:
            self.close()
            if isinstance(ex, OSError):
                raise Unavailable("the disk for temporary files", str(ex)) from None
            raise
        self.seek(0)

    @classmethod
    def check(cls, user_id: str, too_many: bool = False) -> None:
        """Raise Busy if the user has too many such files, or `too_many` is true."""
        with cls._lock:
            of_user = [user for user, _ in cls._sizes if user == user_id]
            if too_many or len(of_user) >= MAX_LISTS_OF_USER:
                raise Busy("too many long lists are being read; wait until one ends")
        if of_user and thread_state.in_event_loop:  # probably this list is long too
            raise WouldBlock

    def _append(self, chunk: Chunk) -> None:
        self.size += len(chunk)
        with self._lock:
            self._sizes[self._place] = self.size
            own = sum(size for (user, _), size in self._sizes.items() if user == self._place[0])
            if max(2 * own, sum(self._sizes.values())) > MAX_LIST_BYTES:
                raise Busy("the long lists being read are too large; wait until one ends")
        while chunk:
            chunk = chunk[self.write(chunk) :]

    def close(self) -> None:
        """Delete the file, and release its place."""
        with self._lock:
            self._sizes.pop(self._place, None)
        super().close()


class HealthResource:
    """Liveness: the process answers. Or readiness: a check does not raise Unavailable."""

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._check, self._checked = check, 0.0  # when the last good check began

    def on_get(self, req: Request, resp: Response) -> None:
        """Answer 200, or raise Unavailable. One good check answers all requests received before."""
        if self._checked < req.context.started:
            began = time.perf_counter()
            self._check()  # it may write
            when_on_disk(partial(setattr, self, "_checked", began))
        resp.data = b'{"status": "ok"}'

    on_head = on_get


class FileResource:
    """A public file that belongs to taskd."""

    def __init__(self, name: str, content_type: str) -> None:
        self._content, self._content_type = shipped(name).read_bytes(), content_type

    def on_get(self, req: Request, resp: Response) -> None:
        """Answer with the file; a page may load and call only this server."""
        resp.content_type, resp.data = self._content_type, self._content
        resp.set_header("Content-Security-Policy", DOCS_POLICY)

    on_head = on_get


class RootResource:
    """The root, where a browser starts."""

    def on_get(self, req: Request, resp: Response) -> None:
        """Redirect to the page that describes the API."""
        resp.status, resp.location = falcon.HTTP_307, f"{req.root_path}/docs"

    on_head = on_get


def json_chunks(read: ReadPage, tasks: bytes, rest: Listing | None) -> Iterator[Chunk]:
    """Yield the JSON array of these tasks and the rest, read page by page."""
    yield memoryview(tasks)[:-1]
    while rest:
        check_client()
        tasks, rest = read(rest)
        yield b"," if tasks != b"[]" else b""
        yield memoryview(tasks)[1:-1]
    yield b"]"


def parse_task_id(text: str) -> int:
    """Return a task's id from the URL, or raise the 404 of a task that does not exist."""
    if not TASK_NUMBER.fullmatch(text) or int(text) > MAX_TASK_NUMBER:
        raise falcon.HTTPNotFound(description=NO_TASK)
    return int(text)


def tasks_path(req: Request) -> str:
    """Return the path of the user's tasks as the client sees it."""
    return f"{req.root_path}/api/{falcon.uri.encode_value(req.context.user.id)}/tasks"


def found_or_404(stored: Stored | None) -> Stored:
    """Return the task, or raise 404, the same for a missing task and another user's."""
    if stored is None:
        raise falcon.HTTPNotFound(description=NO_TASK)
    return stored


def respond_with_task(resp: Response, stored: Stored | None) -> None:
    """Answer with a task and its entity tag, or raise 404."""
    stored = found_or_404(stored)
    resp.data = to_json(stored.task)
    resp.set_header("ETag", stored.tag)


# --- Errors ---------------------------------------------------------------------------------------

DETAILS = {
    404: "there is nothing at this path; tasks are at /api/{user_id}/tasks",
    405: "this path does not support this method; the Allow header lists those that it supports",
}
TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}  # older Pythons differ

HTTP_ERRORS: dict[type[Exception], Callable[[Any], falcon.HTTPError]] = {
    Unavailable: lambda ex: falcon.HTTPServiceUnavailable(
        description=f"{ex.args[0]} cannot be used right now; try again", retry_after=ex.retry_after
    ),
    Busy: lambda ex: falcon.HTTPServiceUnavailable(
        description=ex.args[0], retry_after=ex.retry_after
    ),
    Unstorable: lambda ex: falcon.HTTPForbidden(
        description="this user id, or it and the key, cannot be stored: too long or contains U+0000"
    ),
    TooManyTasks: lambda ex: falcon.HTTPForbidden(
        description=f"you have as many tasks as this server allows, {ex}; delete one first"
    ),
    Changed: lambda ex: falcon.HTTPPreconditionFailed(
        description="the task's ETag does not meet If-Match or If-None-Match; read it again",
        headers={"ETag": str(ex)},
    ),
}


@cache
def phrase(status: int) -> str:
    """Return the status phrase (RFC 9110), which is an error's title and in its status line."""
    return TITLES.get(status) or HTTPStatus(status).phrase


def problem(status: int, detail: str | None, faults: list[Fault] | None = None) -> bytes:
    """Return the body of an error (RFC 9457); its members are chosen only here."""
    detail = detail or DETAILS.get(status)
    members = {"title": phrase(status), "status": status, "detail": detail, "errors": faults}
    return to_json({name: value for name, value in members.items() if value})


def serialize_error(req: Request, resp: Response, ex: falcon.HTTPError) -> None:
    """Write an error as problem+json, whatever the client accepts."""
    resp.status = f"{ex.status_code} {phrase(ex.status_code)}"
    resp.content_type = "application/problem+json"
    resp.data = problem(ex.status_code, ex.description, getattr(ex, "faults", None))


def handle_expected(req: Request, resp: Response, ex: Exception, params: object) -> NoReturn:
    """Answer an exception of HTTP_ERRORS; the log names what cannot be used."""
    if type(ex) is Unavailable:
        req.context.unavailable, req.context.reason = True, "{} cannot be used: {}".format(*ex.args)
    raise HTTP_ERRORS[type(ex)](ex)


def handle_unexpected(req: Request, resp: Response, ex: Exception, params: object) -> NoReturn:
    """Answer 500: the log gets the traceback, the caller only the request id."""
    log.error("unhandled exception", exc_info=ex, extra={"id": req.context.id})
    detail = f"this is our fault; when you report it, quote {req.context.id}"
    raise falcon.HTTPInternalServerError(description=detail)


# --- App ------------------------------------------------------------------------------------------

EXPIRY_INTERVAL = 3600  # seconds between two deletions of old idempotency keys


class App(falcon.App):  # type: ignore[type-arg]
    """The WSGI application, and the parts that it is made of; `public` paths need no token."""

    tokens: Tokens
    store: TaskStore
    database: Database
    public: dict[str, Any]

    def __call__(self, env: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Answer a request; an unknown method is handled as TRACE.

        Falcon answers an unknown method with 400, but TRACE, which no route has, with 405.
        """
        if env["REQUEST_METHOD"] not in falcon.HTTP_METHODS:
            env["REQUEST_METHOD"], env["taskd.method"] = "TRACE", "unknown"
        return super().__call__(env, start_response)


def create_app(settings: Settings) -> App:
    """Return the WSGI application with all its parts. Raises SettingsError or DatabaseError."""
    tokens = Tokens(settings)
    database: Any = open_database(settings)
    tokens.fetch_keys()
    metrics = Metrics() if settings.metrics else None
    cors = Cors(settings.cors_origins) if settings.cors_origins else None
    database = TimedDatabase(database, metrics.database_seconds) if metrics else database
    store = TaskStore(database, settings.max_tasks)
    public = {
        "/": RootResource(),
        "/healthz": HealthResource(),
        "/readyz": HealthResource(database.check),
        "/openapi.json": FileResource("openapi.json", falcon.MEDIA_JSON),
        "/docs": FileResource("docs/api.html", falcon.MEDIA_HTML),
    } | ({"/metrics": metrics} if metrics else {})
    context, auth = RequestContext(settings.trusted_proxies), AuthMiddleware(tokens, public)
    app = App(middleware=list(filter(None, (context, metrics, cors, auth))))
    app.tokens, app.store, app.database, app.public = tokens, store, database, public
    app.req_options.strip_url_path_trailing_slash = True
    app.set_error_serializer(serialize_error)
    app.add_error_handler(Exception, handle_unexpected)
    for kind in HTTP_ERRORS:
        app.add_error_handler(kind, handle_expected)
    tasks = TaskResource(store)
    app.add_route("/api/{user_id}/tasks", tasks, suffix="collection")
    app.add_route("/api/{user_id}/tasks/{task_id}", tasks)
    app.add_route("/api/{user_id}/tasks/{task_id}/complete", TaskCompleteResource(store))
    for path, public_resource in public.items():
        app.add_route(path, public_resource)
    return app


def warn_about(settings: Settings) -> None:
    """Log settings that are valid but probably mistakes."""
    for message in misspelt():
        log.warning("%s", message)
    if DOTENV.exists() and DOTENV.stat().st_mode & 0o007:
        log.warning("%s can be read or changed by every user: chmod 600 %s", DOTENV, DOTENV)
    if settings.jwks_url and not (settings.issuer and settings.audience):
        log.warning("without TASKD_ISSUER and TASKD_AUDIENCE tokens of other services are accepted")


def expire_keys_hourly(app: App) -> None:
    """Delete old idempotency keys, and the text in them, at the start and then every hour."""
    while True:
        try:
            app.store.expire_keys()
        except Unavailable as ex:
            log.warning("old idempotency keys stay for another hour: %s", ex.args[1])
        app.database.close()  # an open connection could keep SQLite's log from being checkpointed
        time.sleep(EXPIRY_INTERVAL)


def wsgi() -> App:
    """Return the application with the environment's settings, for other WSGI servers."""
    settings = Settings.load()
    configure_log(settings)
    warn_about(settings)
    app = create_app(settings)
    threading.Thread(target=expire_keys_hourly, args=[app], daemon=True).start()
    return app


# --- HTTP -----------------------------------------------------------------------------------------

MAX_HEAD = 64 * 1024  # bytes of a request line with its headers, and of trailers
MAX_TARGET = 20 * 1024  # bytes; the longest query that taskd understands has about 16,300
MAX_HEADERS = 256  # header lines
MAX_CHUNKED = 8 * MAX_BODY  # bytes of a body with its chunk sizes: one-byte chunks are six each
MAX_CHUNKS = 20 * 1024  # not counting runs of chunks of one byte
MAX_CHUNK_LINE = 4096  # bytes of a chunk's size with its extensions
HTTP_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # a method, a header's name: RFC 9110, section 5.6.2
REQUEST_LINE = re.compile(rb"(%s) ([\x21-\x7e\x80-\xff]+) HTTP/([0-9])\.([0-9])\r\n" % HTTP_TOKEN)
HEADER_LINE = re.compile(rb"(%s):([\t\x20-\x7e\x80-\xff]*+)\r\n" % HTTP_TOKEN)  # not folded
HEADER_LINES = re.compile(rb"(?:%b)*+" % HEADER_LINE.pattern.replace(b"(", b"(?:"))  # no groups
# The headers on which the answer to a rejected request depends.
FOR_REJECTIONS = re.compile(rb"(?im)^(Origin|X-Request-ID):[ \t]*([!-~]+)\r$")
PRINTABLE = re.compile(rb"[!-~]")  # how a request begins; TLS begins with a control character
HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+;=%-]+)(?::[0-9]{0,5})?"
HTTP_URL = re.compile(rf"(?i:https?)://{HOST}([/?].*)?")
PERCENT_ENCODED = {code: f"%{code:02X}" for code in range(128, 256)}
CHUNK_SIZE = re.compile(  # possessive: it takes time in proportion to the bytes
    rb"(?=[0-9A-Fa-f])0*+([0-9A-Fa-f]{0,8}+)(?:[ \t]*+;[ \t]*+[!-~][\t\x20-\x7e\x80-\xff]*+)?\r\n"
)
ONE_BYTE_CHUNKS = re.compile(rb"(?:1\r\n[\x00-\xff]\r\n)+")


def malformed(why: str) -> falcon.HTTPError:
    """Return the error for bytes that are not HTTP/1.1 (RFC 9112)."""
    return falcon.HTTPBadRequest(description=f"send a well-formed HTTP/1.1 request: {why}")


def head_too_large() -> falcon.HTTPError:
    """Return the error for a request line and headers that exceed a limit."""
    limits = f"{MAX_HEAD} bytes and {MAX_HEADERS} lines, with path and query in {MAX_TARGET}"
    return falcon.HTTPRequestHeaderFieldsTooLarge(description=f"send a head of at most {limits}")


def header_key(name: bytes) -> str:
    """Return a header's name as WSGI has it; "" for one with "_", which WSGI confuses with "-"."""
    return "" if b"_" in name else name.decode("latin-1").upper().replace("-", "_")


class ServerRequest:
    """A request with the attributes that waitress expects: complete, or rejected by the parser."""

    url_scheme, request_uri, path, query = "http", "/", "/", ""
    command, version = "-", "1.1"
    rejection: falcon.HTTPError | None = None

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.body = bytearray()

    def get_body_stream(self) -> io.BytesIO:
        """Return the body as a stream."""
        return io.BytesIO(self.body)

    def set_line(self, method: str, target: str, major: str, minor: str) -> None:
        """Store the parts of a request line (RFC 9112, section 3), or raise 400 or 431."""
        self.command, self.version = method, "1.0" if (major, minor) == ("1", "0") else "1.1"
        if len(target) > MAX_TARGET:
            raise head_too_large()
        if major != "1":
            raise malformed("no other major version of HTTP is served")
        if url := HTTP_URL.fullmatch(target):
            target = "/" + (url[1] or "").removeprefix("/")
        elif (method, target) == ("OPTIONS", "*"):
            target = "/"  # the server itself
        elif not target.startswith("/"):
            raise malformed("the target must be a path, or an http URL")
        path = target.partition("#")[0].partition("?")[0].encode("latin-1")
        self.path = unquote_to_bytes(path).decode("latin-1")
        if not target.isascii():  # Falcon would read the query as Latin-1
            target = target.translate(PERCENT_ENCODED)
        self.request_uri = target.partition("#")[0]
        self.query = self.request_uri.partition("?")[2]

    def set_headers(self, lines: Iterable[tuple[bytes, bytes]]) -> None:
        """Store the headers under their WSGI names; headers of the same name become a list."""
        values: dict[str, list[str]] = {}
        for name, value in lines:
            values.setdefault(header_key(name), []).append(value.decode("latin-1").strip(" \t"))
        self.headers = {key: ", ".join(several) for key, several in values.items() if key}
        options = [one.strip() for one in self.headers.get("CONNECTION", "").lower().split(",")]
        closes = "close" in options or (self.version == "1.0" and "keep-alive" not in options)
        self.headers["CONNECTION"] = "close" if closes else "keep-alive"

    def check_headers(self) -> None:
        """Raise 400 or 413 for headers from which the host or the body cannot be told."""
        host = self.headers.get("HOST", "" if self.version == "1.1" else "none")  # 1.0 needs none
        if not re.fullmatch(HOST, host):
            raise malformed("there must be one Host header, with a host and perhaps a port")
        coding, length = map(self.headers.get, ("TRANSFER_ENCODING", "CONTENT_LENGTH"))
        if coding is not None and (coding.lower() != "chunked" or self.version == "1.0"):
            raise malformed("the only Transfer-Encoding is chunked, and only in HTTP/1.1")
        if length is not None and (coding or not re.fullmatch("(?=[0-9])0*+[0-9]{0,19}", length)):
            raise malformed("there must be one Content-Length, and none beside Transfer-Encoding")
        if self.content_length > MAX_BODY:
            raise too_large()

    @property
    def content_length(self) -> int:
        """The announced length of the body in bytes; int() would reject 4,300 leading zeros."""
        return int(self.headers.get("CONTENT_LENGTH", "").lstrip("0") or "0")

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for "100 Continue" before it sends the body."""
        return self.version == "1.1" and self.headers.get("EXPECT", "").lower() == "100-continue"


class RequestReader:
    """An incremental parser that turns the bytes of a connection into requests, one by one.

    `unread` is the buffer. Each `_read_…` method is a step, and `_step` is the current one: it
    consumes what it can of the buffer and returns whether the next step can run. Each step takes
    time in proportion to the bytes received, and stores no more than the limits. `part` says what
    is being read: "request" before the first byte, then "head" and "body"; `_room` is the number of
    bytes that it may still have.
    """

    def __init__(self) -> None:
        self.unread, self.received = b"", 0.0  # when bytes came last, by time.perf_counter()
        self.next()

    def next(self) -> None:
        """Start a new request; the buffer may already contain some of it."""
        self.request, self.complete, self.part = ServerRequest(), False, "request"
        self._step: Callable[[], bool] = self._read_line
        self._room, self._chunks, self._length = MAX_HEAD, 0, 0
        self.lines: list[tuple[bytes, bytes]] = []  # names and values of headers or trailers

    def receive(self, data: bytes) -> None:
        """Parse until the request is complete or rejected, or more bytes are needed."""
        self.unread += data
        self.received = time.perf_counter() if data else self.received
        try:
            while not self.complete and self._step():
                pass
        except falcon.HTTPError as ex:
            self._reject(ex)

    def _reject(self, rejection: falcon.HTTPError) -> None:
        """Reject the request and close the connection: the next request's start is not known."""
        if self.part != "body":
            own = self.unread.partition(b"\n\r\n")[0]  # not the body or the next request
            self.request.set_headers(self.lines + FOR_REJECTIONS.findall(own))
        self.request.headers["CONNECTION"] = "close"
        self.request.rejection, self.complete = rejection, True

    def _limit(self, size: int) -> None:
        """Raise 413 or 431 if this part of the request has no room for so many bytes more."""
        if size > self._room:
            raise too_large() if self.part == "body" else head_too_large()

    def _take(self, size: int) -> bytes:
        """Remove and return bytes of the buffer. Raises 413 or 431 over the limit of the part."""
        self._limit(size)
        taken, self.unread = self.unread[:size], self.unread[size:]
        self._room -= len(taken)
        return taken

    def _read_line(self) -> bool:
        """Read the request line; empty lines before it are ignored (RFC 9112, section 2.2)."""
        self._take(len(self.unread) - len(self.unread.lstrip(b"\r\n")))
        if not self.unread:
            return False
        self.part = "head"
        line, newline, _ = self.unread.partition(b"\n")
        found = REQUEST_LINE.fullmatch(line + newline) if newline else None
        if not found and (newline or not PRINTABLE.match(line)):
            raise malformed("its first line must be METHOD /path HTTP/1.1")
        if not found:
            self._limit(len(line))
            return False  # the rest of the line is missing
        self._take(len(line) + 1)
        self.request.set_line(*(part.decode("latin-1") for part in found.groups()))
        self._step = self._read_head
        return True

    def _take_lines(self) -> bool:
        """Remove all complete lines of headers or trailers; return whether they have ended."""
        complete = self.unread.rfind(b"\n") + 1  # only complete lines: the last one may grow
        end = HEADER_LINES.match(self.unread, 0, complete).end()  # type: ignore[union-attr]
        ended = self.unread.startswith(b"\r\n", end)
        if len(self.lines) + self.unread.count(b"\n", 0, end) > MAX_HEADERS:
            raise head_too_large()
        self.lines += HEADER_LINE.findall(self._take(end + 2 * ended))
        if not ended:
            self._limit(len(self.unread))
            if end < complete:
                raise malformed("a header must be Name: value, without control characters")
        return ended

    def _read_head(self) -> bool:
        """Read the headers, check them, and choose how to read the body."""
        if not self._take_lines():
            return False
        request = self.request
        request.set_headers(self.lines)
        self.lines = []  # the request has them
        self.part, self._room = "body", MAX_CHUNKED  # a rejection looks for no headers in the body
        request.check_headers()
        self._length = request.content_length
        chunked = request.headers.pop("TRANSFER_ENCODING", None)
        self._step = self._read_chunks if chunked else self._read_body
        return True

    def _read_body(self) -> bool:
        """Read a body of the announced length, which may be 0."""
        body = self.request.body
        body += self._take(self._length - len(body))
        self.complete = len(body) == self._length
        return False

    def _read_chunks(self) -> bool:
        """Read all complete chunks in the buffer (RFC 9112, section 7.1)."""
        data, body, at = self.unread, self.request.body, 0
        while found := CHUNK_SIZE.match(data, at, at + MAX_CHUNK_LINE):
            start, size = found.end(), int(found[1] or b"0", 16)
            end = start + size
            if len(body) + size > MAX_BODY or self._chunks > MAX_CHUNKS:
                raise too_large()
            if size == 0:
                self._step, at = self._read_trailers, start
                self._room = start + MAX_HEAD  # for the trailers; `_take` below subtracts `start`
                break
            if len(data) < end + 2:
                break
            if data[end : end + 2] != b"\r\n":
                raise malformed("a chunk must be as long as its size says")
            body += data[start:end]
            at, self._chunks = end + 2, self._chunks + 1
            if size == 1 and (several := ONE_BYTE_CHUNKS.match(data, at)):
                body += several[0][3::6]
                at = several.end()
        else:
            if b"\n" in data[at:] or len(data) - at > MAX_CHUNK_LINE:
                raise malformed("a chunk must begin with its size in hexadecimal digits")
        self._take(at)
        return self._step != self._read_chunks

    def _read_trailers(self) -> bool:
        """Read the trailers, of which only the syntax and the size are checked."""
        self.complete = self._take_lines()
        self.request.headers["CONTENT_LENGTH"] = str(len(self.request.body))
        return False


# --- Server ---------------------------------------------------------------------------------------

RECEIVE_SIZE = 4096  # bytes read from a connection at once
# Reads of a request, and one more for each 512 bytes, before a client that sends little at a time
# is paused.
READS_BEFORE_PAUSE = 64
PAUSE = 0.05  # seconds without reading from such a client, or without accepting connections
CHECK_INTERVAL = 0.1  # seconds between two checks for connections whose deadline has passed
SEND_BUDGET = 1024 * 1024  # bytes sent to one client before the others are served
MAX_BATCH = 100  # writes; a batch that has as many is committed at the end of the round
BATCH_TIME = 0.02  # seconds after which a batch is committed, even if each round adds a write
ROUND_TIME = 0.02  # seconds of answering before the event loop looks at the sockets again
MAX_DISCARDED = 1024 * 1024  # bytes read after a rejection, so that the client can read the answer
# Bytes in memory of all requests that are not answered yet, and of answers that are not read yet.
MAX_HELD = 32 * 1024 * 1024
MAX_IN_MEMORY = 4 * 1024 * 1024  # bytes of an answer above which waitress would use a file
MAX_CONNECTIONS = 2000  # if each sends a whole request at once, others wait for less than 1 s
CONNECTIONS_OVER_LIMIT = 10  # accepted even when no other connection can be closed
ACCEPTS_AT_ONCE = 500
BACKLOG = 4096  # connections that the kernel accepts before taskd does
DRAIN_TIMEOUT = 9.0  # seconds after SIGTERM in which the requests received are answered
# Seconds after SIGTERM from which requests that would block are rejected: before, one wait of
# LOCK_TIMEOUT or KEYS_WAIT still fits. Two waits of a worker thread's write may be cut off.
REJECT_BLOCKED_AFTER = DRAIN_TIMEOUT - max(LOCK_TIMEOUT, KEYS_WAIT) - 0.5
# Seconds after its request in which a client that has closed its half of the connection counts as
# one that waits for the answer.
HALF_CLOSED_TIME = 0.2
IDLE_BEFORE_EXIT = 0.1  # seconds without a request after which a server that stops exits
POLL_SECOND = 1 if hasattr(select, "epoll") else 1000  # select.poll takes milliseconds
READABLE = select.POLLIN | select.POLLPRI  # the latter is urgent data
DEADLINES: dict[str | None, float] = {  # what a connection waits for from its client: seconds
    "request": 120.0,  # its first byte
    "head": 10.0,  # the request line and headers
    "body": 30.0,
    "delivery": 60.0,  # until the client receives some of its answer
    "close": 10.0,  # until the client closes
    None: math.inf,  # its request is queued or answered
}
# What a connection is polled for in these states; in the others READABLE.
EVENTS = {"delivery": select.POLLOUT, "close": select.POLLIN, None: 0}
HEADER_WORDS = {"etag": "ETag", "id": "ID", "www": "WWW"}
http_date = lru_cache(1)(waitress.utilities.build_http_date)


@cache
def header_name(name: str) -> str:
    """Return a header's name as it is documented; Falcon has it in lower case."""
    return "-".join(HEADER_WORDS.get(word, word.capitalize()) for word in name.split("-"))


class ServerTask(waitress.task.WSGITask):
    """Writes the answer to a request (waitress's task)."""

    wrote_header: bool

    def start(self) -> None:
        """Announce `Connection: close` when the server stops and no other request follows.

        At the limit of connections do it when one follows: a connection that always has another
        request never waits for its client, and could not be closed to make room.
        """
        super().start()
        channel, server = self.channel, self.channel.server
        makes_room = server.is_full and channel.reader.unread and not server.stopping
        if makes_room or (server.stopping and not channel.has_more()):
            self.request.headers["CONNECTION"] = "close"

    def get_environment(self) -> Any:
        """Return the WSGI environment, with the parser's error, if any, and the time of receipt."""
        environ, reader = super().get_environment(), self.channel.reader
        environ["REQUEST_METHOD"] = reader.request.command  # waitress has it in capitals
        environ |= {"taskd.rejection": reader.request.rejection, "taskd.received": reader.received}
        return environ

    def build_response_header(self) -> bytes:
        """Return the status line and headers; waitress needs five times as long for them."""
        if self.request.headers["CONNECTION"] == "close":
            self.set_close_on_finish()
        elif self.version == "1.0":
            self.response_headers.append(("Connection", "keep-alive"))
        lines = [f"{header_name(name)}: {value}" for name, value in self.response_headers]
        first = f"HTTP/{self.version} {self.status}\r\nDate: {http_date(int(time.time()))}"
        return "\r\n".join([first, *lines, "\r\n"]).encode("latin-1")

    def write(self, data: bytes) -> None:
        """Write the answer; the headers and the first bytes of the body are sent together."""
        if self.wrote_header:
            super().write(data)
        else:
            self.channel.write_soon(self.build_response_header() + data)
            self.wrote_header, self.content_bytes_written = True, len(data)


Sender = tuple[str, str]  # of a request, such as ("user", "alice")


class ServerChannel(waitress.channel.HTTPChannel):
    """A client's connection, which processes one request at a time.

    `waiting_for` is the state: what the client must do next (a key of DEADLINES), or None while
    the request is queued or answered. The states of a request follow one another:

        "request" -> "head" -> "body" -> None -> "delivery" -> "request"

    "head" and "body" last only while bytes are missing, "delivery" only if the client has not taken
    the whole answer at once. Where the client may still send, the last state is "close". In None no
    further bytes are read, so that taskd never holds two answers of a connection. While a request
    waits, the poll reports only a reset of its connection; most are answered before the next poll.
    Worker threads call only `service`, and through it `answer`, `has_more`, `has_left` and
    `write_soon`, while the event loop does not read; `outbuf_lock` guards sending and closing.
    """

    outbufs: list[Any]
    waiting_for: str | None = None
    since = 0.0  # when that began, by time.monotonic()
    # What the poll reports; bytes to send before other clients are served; reads and bytes of this
    # request; the fewest bytes of its answer that the kernel had not delivered yet.
    _events = _send_budget = _reads = _received = _least_undelivered = 0
    _served = _closes = False  # whether an answer was sent; whether it is the last one

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reader = RequestReader()
        self.sendbuf_len = 256 * 1024  # bytes taken from a file at once
        self.wait_for("request")

    def add_channel(self, map: Any = None) -> None:  # noqa: A002
        """Register the connection with waitress and with the poll object."""
        super().add_channel(map)
        self.server.poll.register(self._fileno, 0)

    def del_channel(self, map: Any = None) -> None:  # noqa: A002
        """Remove the connection from everything that refers to it, before it is closed."""
        if self._fileno is not None:
            self.server.poll.unregister(self._fileno)
        if self.waiting_for:  # no thread uses the reader, which refers to itself and is freed late
            self.reader.next()
            self.reader.unread = b""
        super().del_channel(map)

    def wait_for(self, what: str) -> None:
        """Change the state, and start its deadline."""
        if self._fileno is None:
            return  # the connection was closed meanwhile
        self.waiting_for, self.since = what, time.monotonic()
        self.watch(EVENTS.get(what, READABLE))

    def watch(self, events: int) -> None:
        """Poll the connection for these events, unless it was closed."""
        if events != self._events and self._fileno is not None:
            self._events = events
            self.server.poll.modify(self._fileno, events)

    def has_more(self) -> bool:
        """Return whether another request, or some of it, was received."""
        return bool(self.reader.unread or self._peek())

    def has_left(self) -> bool:
        """Return whether the client has left; safe to call from any thread.

        A client that has closed only its own half of the connection looks the same, and may wait
        for the answer: it counts as gone HALF_CLOSED_TIME after its request was received.
        """
        waited = time.perf_counter() - self.reader.received > HALF_CLOSED_TIME
        return not self.connected or (waited and not self.reader.unread and self._peek() == b"")

    def _peek(self) -> bytes | None:
        """Return the next byte, b"" if the connection was closed, or None if nothing has come."""
        try:
            return bytes(self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return None
        except (OSError, AttributeError):  # the event loop has closed it
            return b""

    def handle_read(self) -> None:
        """Read from the client, and parse it, or discard it in the state "close"."""
        if self.waiting_for is None:
            return  # its current request is answered first
        try:
            data = self.socket.recv(RECEIVE_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._reads, self._received = self._reads + 1, self._received + len(data)
        if not data or (self.waiting_for == "close" and self._received > MAX_DISCARDED):
            self.handle_close()
        elif self.waiting_for != "close":
            self._receive(data)
        if self.waiting_for and self._reads > READS_BEFORE_PAUSE + self._received // 512:
            self.watch(0)
            self.server.pause(self)

    def resume(self) -> None:
        """Poll again after a pause."""
        if self.connected:
            self._least_undelivered = min(self._least_undelivered, self._undelivered())
            self.watch(EVENTS.get(self.waiting_for, READABLE))

    def handle_expt(self) -> None:
        """Close the connection: urgent data is not part of HTTP."""
        self.close_early("urgent data came")

    def _receive(self, data: bytes) -> None:
        """Parse these bytes and those that are left; queue the request when it is complete."""
        reader, self._send_budget = self.reader, SEND_BUDGET
        reader.receive(data)
        if reader.complete:
            self.waiting_for = None  # not by `wait_for`: most are answered before the next poll
            self.server.ready.append(self)
            return
        if reader.part == "body" and reader.request.expects_continue:
            del reader.request.headers["EXPECT"]
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if reader.part != self.waiting_for:
            self.wait_for(reader.part)

    @property
    def sender(self) -> Sender:
        """Whose turn the request takes: that of a user, of a public path, or of all strangers.

        A token is not verified before its turn: new ones, with the bad ones, have a turn together.
        """
        request, app = self.reader.request, self.server.application
        token = bearer_token(request.headers.get("AUTHORIZATION", ""))
        if user := app.tokens.known(token):
            return "user", str(user.id)
        return ("path", request.path) if request.path in app.public else ("new", token and "token")

    def answer(self) -> None:
        """Run the application. Raises WouldBlock in the event loop if it has to wait.

        The answer to a write in the event loop is sent after the commit: see `when_on_disk`.
        """
        task, self._send_budget = ServerTask(self, self.reader.request), SEND_BUDGET
        try:
            task.service()
        except Exception as ex:
            if not isinstance(ex, waitress.channel.ClientDisconnected):
                log.exception("unhandled exception outside the application")
            task.close_on_finish = True
        self._closes = task.close_on_finish

    def service(self) -> None:
        """Answer the request in a worker thread."""
        thread_state.client_has_left = self.has_left
        self.answer()
        self.server.call_soon(self.answered)

    def answered(self) -> None:
        """Continue after (a part of) the answer was sent: with the rest, or the next request."""
        if not self.connected:
            return
        if self.total_outbufs_len:
            self.wait_for("delivery")
            self._least_undelivered = self._undelivered()
            self.server.pause(self)  # measure again when the client's system has buffered some
            return
        if self.outbufs[-1].buf:  # waitress would keep the answer's memory
            self.outbufs = [waitress.buffers.OverflowableBuffer(MAX_IN_MEMORY)]
        if self._closes:
            self._end()
            return
        self.reader.next()
        self._reads = self._received = 0
        self._served = True
        self.wait_for("request")
        if self.reader.unread:
            self._receive(b"")

    def _end(self) -> None:
        """Close the connection; if the client may still send, half-close it (RFC 9112, 9.6)."""
        if self.reader.request.rejection is None and not self.reader.unread:
            self.handle_close()
            return
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        self.reader.next()  # the request is not needed, and what still comes is discarded
        self.reader.unread = b""
        self.wait_for("close")

    def handle_write(self) -> None:
        """Send more of the answer: the client can receive again."""
        self._send_budget = SEND_BUDGET
        if self._flush_some():
            self.answered()

    def send(self, data: bytes, do_close: bool = True) -> int:
        """Send some of the data, but nothing above the budget, so that others are served."""
        sent = 0
        if self._send_budget > 0:
            with contextlib.suppress(OSError):  # the poll reports it too
                sent = super().send(data, do_close)
        self._send_budget -= sent
        return sent

    def write_soon(self, data: Any) -> int:
        """Send what the socket accepts and buffer the rest; no thread ever waits for a client."""
        if not self.connected:
            raise waitress.channel.ClientDisconnected
        when_on_disk(partial(self._send_or_buffer, data))
        return len(data)

    def _send_or_buffer(self, data: Any) -> None:
        """Send the data unless some is buffered, and buffer what the socket does not accept."""
        with self.outbuf_lock:  # the event loop takes it before it closes the socket
            if not self.connected:  # the client has left
                return
            sent = 0
            if isinstance(data, bytes) and not self.total_outbufs_len:
                sent = self.send(data, do_close=False)
            if sent < len(data):
                super().write_soon(data[sent:] if sent else data)

    def _flush_outbufs_below_high_watermark(self) -> None:
        """Do nothing, where waitress would wait: at most one answer is buffered."""

    def held(self) -> int:
        """Return how many bytes of the connection's request and answer are in memory."""
        # waitress's buffer of a file has a block_size.
        unread = (len(buf) for buf in self.outbufs if not hasattr(buf, "block_size"))
        headers = len(self.reader.request.headers) + len(self.reader.lines)
        return self._received + 200 * headers + sum(unread)  # 200 bytes of objects for each header

    def _undelivered(self) -> int:
        """Return how many bytes the kernel has not delivered to the client yet."""
        try:
            queued = fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4))
            return int.from_bytes(queued, sys.byteorder)
        except OSError:
            return 0

    def close_early(self, why: str) -> None:
        """Close the connection and log why."""
        log.info("connection closed: %s client=%s", why, self.addr[0])
        self.handle_close()

    def expire(self) -> None:
        """Close the connection because its deadline has passed, unless it made progress."""
        if self.waiting_for == "delivery" and self._undelivered() < self._least_undelivered:
            self._least_undelivered = self._undelivered()
            self.wait_for("delivery")  # the client has read some of it
        elif self.waiting_for == "close" or (self.waiting_for == "request" and self._served):
            self.handle_close()
        else:
            self.close_early(f"it waited too long for the {self.waiting_for}")


class FairQueue:
    """A queue of requests that takes one from each user in turn; many delay only their sender's.

    The reads of a user have a turn, and the writes another. `Server.ready` is such a queue, and
    each dispatcher has one instead of waitress's deque: of its threads at most `places` read for a
    user at the same time. The database limits how many writes wait, since a lock can make them wait
    for seconds.
    """

    def __init__(self, places: float = math.inf) -> None:
        self._requests: OrderedDict[tuple[Sender, bool], deque[ServerChannel]] = OrderedDict()
        # By the id of a thread that runs a request: the turn that it has.
        self.places, self._running = places, dict[int, tuple[Sender, bool]]()

    def append(self, channel: ServerChannel) -> None:
        """Add a connection, whose request is complete, behind the others of the same turn."""
        turn = channel.sender, channel.reader.request.command in ("GET", "HEAD")
        self._requests.setdefault(turn, deque()).append(channel)

    def popleft(self) -> ServerChannel:
        """Remove and return the first of the next turn that has a place."""
        turn = next(filter(self._has_place, self._requests))
        self._running[threading.get_ident()], channels = turn, self._requests.pop(turn)
        if len(channels) > 1:
            self._requests[turn] = channels
        return channels.popleft()

    def __bool__(self) -> bool:
        """Return whether a turn has a place; this ends the turn of the thread that asks.

        waitress's threads ask it when they have ended a request, to see whether another one waits.
        """
        self._running.pop(threading.get_ident(), None)
        return any(map(self._has_place, self._requests))

    def __len__(self) -> int:
        """Return how many turns have a request that waits."""
        return len(self._requests)

    def _has_place(self, turn: tuple[Sender, bool]) -> bool:
        """Return whether a request of this turn may run: a write always, a read below `places`."""
        return not turn[1] or operator.countOf(self._running.values(), turn) < self.places


def dispatcher(threads: int, places: int = 0) -> waitress.task.ThreadedTaskDispatcher:
    """Return threads with a fair queue; at most `places`, or a third, read for one user at once."""
    started = waitress.task.ThreadedTaskDispatcher()
    started.queue = FairQueue(places or threads // 3 or 1)
    started.set_thread_count(threads)
    return started


# Requests whose writes share a commit, and what is called after it: to log, count and send.
Batch = list[tuple[ServerChannel, list[Callable[[], object]]]]


class Server(waitress.server.TcpWSGIServer):
    """waitress's server, with requests answered in the event loop itself where possible.

    `run` is the event loop; on SIGTERM it answers the requests received, then returns. `ready`
    holds the requests that can run. `_answer` runs each in the event loop, and again where
    WouldBlock says if that is raised. Other threads use only three things: the dispatchers' queues,
    from which they take requests; `_calls`, by which they hand a call to the event loop; and what
    `ServerChannel` says.
    """

    channel_class = ServerChannel

    def __init__(self, app: App, **adjustments: Any) -> None:
        self._database = cast(Sqlite, app.database)  # PostgreSQL never writes in the event loop
        self._searches = dispatcher(SEARCHES, SEARCHES)  # the store limits those of a user
        self.poll = select.epoll() if hasattr(select, "epoll") else select.poll()
        self.ready, self.stopping = FairQueue(), False
        self._calls: deque[Callable[[], None]] = deque()
        self._batch: Batch = []
        self._blocked: deque[tuple[float, ServerChannel]] = deque()  # writes that wait, since when
        self._paused: list[ServerChannel | Server] = []
        self._resume_at = self._next_warning = self._next_check = self._commit_at = 0.0
        self._accept_pending = self._exits_soon = False
        super().__init__(app, dispatcher=dispatcher(adjustments["threads"]), **adjustments)
        for descriptor in self._map:  # the listening socket and the trigger, which wakes the poll
            self.poll.register(descriptor, select.POLLIN)

    @property
    def is_full(self) -> bool:
        """Whether each new connection has to replace another one."""
        return len(self.active_channels) >= int(self.adj.connection_limit)

    def call_soon(self, call: Callable[[], None]) -> None:
        """Call a function in the event loop; safe to call from any thread."""
        self._calls.append(call)
        self.trigger.pull_trigger()

    def pause(self, paused: ServerChannel | Server) -> None:
        """Call `resume` of a connection, or of the server itself, after PAUSE."""
        if not self._paused:
            self._resume_at = time.monotonic() + PAUSE
        self._paused.append(paused)

    def handle_accept(self) -> None:
        """Accept connections after this round, which may have an event for one that makes room.

        A new connection would get the descriptor of the closed one, and then its event.
        """
        self._accept_pending = True

    def stop(self, *_: object) -> None:
        """Make `run` return; safe to call from a signal handler, and more than once."""
        if not self.stopping:
            self.stopping = True
            self.trigger.pull_trigger()

    def run(self) -> None:
        """Serve until `stop`, then answer every request that was received."""
        thread_state.in_event_loop = True
        while not self.stopping:
            self._serve_once(timeout=1)
        # The connections in the backlog. Requests are read before each `_accept`: at the limit it
        # closes a connection that waits for its client, never one whose request was received.
        for _ in range(BACKLOG // ACCEPTS_AT_ONCE + 1):
            self._serve_once(timeout=0)
            self._accept()
        self.poll.unregister(self._fileno)
        self.del_channel()
        self.socket.close()
        self._paused = [paused for paused in self._paused if paused is not self]
        self._drain()
        # With DRAIN_TIMEOUT these leave time for the process to end within 10 s.
        self.task_dispatcher.shutdown(timeout=0.25)
        self._searches.shutdown(timeout=0.25)
        wasyncore.close_all(self._map)

    def _drain(self) -> None:
        """Serve until no request is left for IDLE_BEFORE_EXIT, but at most for DRAIN_TIMEOUT."""
        started = last = time.monotonic()
        while (now := time.monotonic()) < min(started + DRAIN_TIMEOUT, last + IDLE_BEFORE_EXIT):
            if now > started + REJECT_BLOCKED_AFTER and not self._exits_soon:
                self._take_back_queued()
            worked = self._serve_once(timeout=IDLE_BEFORE_EXIT / 5)
            channels = self.active_channels.values()
            if worked or any(channel.waiting_for in (None, "delivery") for channel in channels):
                last = time.monotonic()

    def _take_back_queued(self) -> None:
        """Run the requests that no thread has begun in the event loop, and reject those that block.

        They, and those that would block from now on, could still wait when the process ends.
        """
        self._exits_soon = True
        for threads in (self.task_dispatcher, self._searches):
            with threads.lock:
                threads.queue.places = math.inf
                while threads.queue:
                    self.ready.append(threads.queue.popleft())

    def _serve_once(self, timeout: float) -> bool:
        """Run one round of the event loop; return whether a request was answered."""
        if self._blocked or self._paused:
            timeout = min(timeout, LOCK_RETRY if self._blocked else PAUSE)
        timeout = 0 if len(self.ready) or self._batch else timeout
        for descriptor, events in self.poll.poll(timeout * POLL_SECOND):
            if descriptor in self._map:
                wasyncore.readwrite(self._map[descriptor], events)
        if self._accept_pending:
            self._accept()
        self._check_connections()
        worked, end = bool(self._calls or len(self.ready)), time.monotonic() + ROUND_TIME
        for _ in range(len(self._calls)):
            self._calls.popleft()()
        # A batch that has begun holds SQLite's lock: it is committed even without a write.
        begun = bool(self._blocked) and self._retry_writes()
        before = len(self._batch)  # with those that `_retry_writes` has added
        while len(self.ready) and time.monotonic() < end:  # every turn of `ready` has a place
            self._answer(self.ready.popleft())
        # The batch waits for further writes while each round adds one, up to its limits.
        grows = before < len(self._batch) < MAX_BATCH and time.monotonic() < self._commit_at
        if (self._batch or begun) and not grows:
            self._commit()
        return worked

    def _answer(self, channel: ServerChannel) -> None:
        """Run a request in the event loop; if it would block, hand it over to where it runs again.

        An answer that waits for its batch is kept in `_batch`.
        """
        try:
            channel.answer()
        except WouldBlock as ex:
            channel.watch(0)  # until it is answered, the poll reports only a reset
            if isinstance(ex, BatchFailed):
                self._end_batch([*self._batch, (channel, [])], stored=False)
                self._batch = []
            elif self._exits_soon:
                detail = "the server is stopping; send the request again"
                error = falcon.HTTPServiceUnavailable(description=detail, retry_after=RETRY_AFTER)
                channel.reader.request.rejection = error
                self.ready.append(channel)
            elif isinstance(ex, SearchWouldBlock):
                self._searches.add_task(channel)
            elif isinstance(ex, WriteWouldBlock):
                self._blocked.append((time.monotonic(), channel))
            elif ex.until is None:
                self.task_dispatcher.add_task(channel)
            else:
                again = partial(self.ready.append, channel)
                ex.until.add_done_callback(lambda _: self.call_soon(again))
        else:
            if thread_state.after_commit is None:
                channel.answered()
            else:
                if not self._batch:
                    self._commit_at = time.monotonic() + BATCH_TIME
                self._batch.append((channel, thread_state.after_commit))
        finally:
            thread_state.after_commit = None

    def _retry_writes(self) -> bool:
        """Begin a batch for the writes that wait, and return whether it began.

        Otherwise run those that have waited for LOCK_TIMEOUT; unless a batch can begin now, they
        are answered 503. When the server exits soon, run all; those that would block are rejected.
        """
        begun = False
        with contextlib.suppress(WouldBlock):
            begun = self._database.begin()
        while self._blocked and (begun or self._exits_soon):
            self.ready.append(self._blocked.popleft()[1])
        thread_state.write_timed_out = True
        while self._blocked and self._blocked[0][0] < time.monotonic() - LOCK_TIMEOUT:
            self._answer(self._blocked.popleft()[1])
        thread_state.write_timed_out = False
        return begun

    def _commit(self) -> None:
        """Commit the batch, here or in another thread, then send its answers."""
        batch, self._batch = self._batch, []
        done = self._database.commit()
        if done.done():
            self._end_batch(batch, done.result())
            return
        for channel, _ in batch:
            channel.watch(0)
        committed = partial(self._end_batch, batch)
        done.add_done_callback(lambda _: self.call_soon(partial(committed, done.result())))

    def _end_batch(self, batch: Batch, stored: bool) -> None:
        """Answer the requests of a batch that was stored; else run them in worker threads."""
        for channel, calls in batch:
            if stored:
                for call in calls:
                    call()
                channel.answered()
            else:
                channel.watch(0)
                self.task_dispatcher.add_task(channel)

    def _check_connections(self) -> None:
        """Close connections that take too long or too much memory, and resume paused ones."""
        now = time.monotonic()
        if now >= self._next_check:
            self._next_check = now + CHECK_INTERVAL
            for channel in list(self.active_channels.values()):
                if now - channel.since > DEADLINES[channel.waiting_for]:
                    channel.expire()
            self._limit_memory()
        if self._paused and now >= self._resume_at:
            resumed, self._paused = self._paused, []
            for paused in resumed:
                paused.resume()

    def _limit_memory(self) -> None:
        """If all connections hold more than MAX_HELD, close those of the senders who hold most."""
        channels = self.active_channels.values()
        holding = [one for one in channels if one.waiting_for not in ("request", "close")]
        waiting = [one for one in holding if one.waiting_for]
        excess = sum(one.held() for one in holding) - MAX_HELD
        if excess > 0:
            of_sender = Counter[Sender]()
            for one in waiting:
                of_sender[one.sender] += one.held()
            waiting.sort(key=lambda one: (of_sender[one.sender], one.held()))
        while waiting and excess > 0:
            excess -= waiting[-1].held()
            waiting.pop().close_early("others need the memory of its request or answer")

    def resume(self) -> None:
        """Accept connections again after a pause."""
        self.poll.modify(self._fileno, select.POLLIN)

    def _accept(self) -> None:
        """Accept connections. At the limit each replaces one that was waiting before this call.

        After ACCEPTS_AT_ONCE of them, without room, or after an error, it pauses.
        """
        self._accept_pending, replaceable = False, self._replaceable(time.monotonic())
        room = len(self.active_channels) < self.adj.connection_limit + CONNECTIONS_OVER_LIMIT
        for _ in range(ACCEPTS_AT_ONCE if room or self._make_room(replaceable) else 0):
            try:
                connection, address = self.socket.accept()
            except BlockingIOError:
                return
            except OSError:  # the client has left, or no descriptor is free
                self._make_room(replaceable)
                break
            room = not self.is_full or self._make_room(replaceable)
            with contextlib.suppress(OSError):
                self.set_socket_options(connection)
            ServerChannel(self, connection, address, self.adj, map=self._map)
            if not room:
                break
        self.poll.modify(self._fileno, 0)
        self.pause(self)

    def _replaceable(self, before: float) -> Iterator[ServerChannel]:
        """Yield the connections that wait for their client since before that time, oldest first."""
        for channel in sorted(self.active_channels.values(), key=operator.attrgetter("since")):
            waits = channel.waiting_for and channel.since < before
            # A request may have come after the poll.
            if waits and (channel.waiting_for != "request" or not channel._peek()):
                yield channel

    def _make_room(self, replaceable: Iterator[ServerChannel]) -> bool:
        """Close the connection that has waited longest; return whether there was one."""
        if channel := next(replaceable, None):
            channel.handle_close()
        if time.monotonic() > self._next_warning:
            self._next_warning = time.monotonic() + 10
            log.warning("too many connections: each new one closes the one that is idle longest")
        return channel is not None


# --- Start ----------------------------------------------------------------------------------------

BALANCE_INTERVAL = 1.0  # seconds in which the use of the processors is measured
LESS_BUSY = 0.25  # seconds by which others must use a processor less for taskd to move to it


def connection_limit(threads: int) -> int:
    """Return a number of connections that leaves descriptors for the database, lists and log."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(10, min(MAX_CONNECTIONS, descriptors - 2 * threads - 80))


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises SettingsError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, OverflowError, UnicodeError) as ex:
        in_use = "it is in use; stop what listens there, or set another TASKD_PORT"
        why = in_use if getattr(ex, "errno", None) == errno.EADDRINUSE else ex
        where = f"cannot listen on {host}:{port}"
        raise SettingsError(f"TASKD_HOST, TASKD_PORT: {where}: {why}") from None


def url_of(host: str, port: int) -> str:
    """Return the URL of a server that listens there."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: App, listener: socket.socket, settings: Settings) -> None:
    """Serve the application on waitress until SIGTERM or SIGINT, then close its database."""
    # No line shows these; other WSGI servers may log them.
    for unused in ("_srcfile", "logThreads", "logProcesses", "logMultiprocessing"):
        setattr(logging, unused, None)
    # M_ARENA_MAX of mallopt(3): two pools of memory, each of which keeps what its threads free.
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)(-8, 2)  # only glibc has it
    server = Server(
        app,
        _sock=listener,
        bind_socket=False,
        sockinfo=(listener.family, listener.type, listener.proto, listener.getsockname()),
        threads=settings.threads,
        ident=None,  # no Server header
        connection_limit=connection_limit(settings.threads),
        outbuf_overflow=MAX_IN_MEMORY,
        clear_untrusted_proxy_headers=False,  # taskd does not use them
        log_socket_errors=False,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.stop)
    url = url_of(server.effective_host, server.effective_port)
    line = f"taskd: listening on {url} (try it at {url}/docs)"  # at every log level
    if settings.log_format == "json":
        line = JsonLines().format(logging.makeLogRecord({"levelname": "INFO", "msg": line}))
    print(f"{line}\n", end="", file=sys.stderr, flush=True)  # one write: scripts wait for the line
    server.run()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    app.database.close()


def use_one_processor() -> None:
    """Keep all threads on one processor at a time.

    Python runs one thread at a time. On PostgreSQL the threads of a request pass Python's global
    lock to each other, and if they run on several processors, each time another processor has to
    be woken. That halves the throughput.
    """
    for processor in quiet_processors():
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended, or the system does not allow this
                os.sched_setaffinity(int(thread.name), {processor})


def quiet_processors() -> Iterator[int]:
    """Yield the processor to use for the next second, of those that this process may use.

    It stays the same while others use little of it or as much of the other ones. The choice is
    random, so that several processes do not move at the same time to the same one.
    """
    allowed = os.sched_getaffinity(0) & busy_times().keys()
    if len(allowed) < 2:
        return
    processor = secrets.choice(list(allowed))
    while True:
        own, before = time.process_time(), busy_times()
        yield processor
        time.sleep(BALANCE_INTERVAL)
        others = {one: busy - before[one] for one, busy in busy_times().items()}
        others[processor] -= time.process_time() - own
        quieter = [one for one in allowed if others[one] < others[processor] - LESS_BUSY]
        processor = secrets.choice([processor, *quieter])


def busy_times() -> dict[int, float]:
    """Return for how many seconds each processor has been busy since the system was started."""
    # User, nice and system; not idle and waiting for a disk; interrupts and stolen time.
    line = re.compile(r"^cpu(\d+) (\d+) (\d+) (\d+) \d+ \d+ (\d+) (\d+) (\d+)", re.MULTILINE)
    found = [map(int, numbers) for numbers in line.findall(Path("/proc/stat").read_text())]
    return {number: sum(ticks) / os.sysconf("SC_CLK_TCK") for number, *ticks in found}


def parse_arguments(arguments: list[str]) -> None:
    """Answer --help and --version, and reject every other argument: exit status 2."""
    import argparse  # loaded only where there are arguments

    rows = [(field.metadata, field.default) for field in dataclasses.fields(Settings)]
    settings = (
        f"  {meta['variable']:20}  {meta['rule']}{f' ({default})' if default else ''}\n"
        for meta, default in rows
    )
    parser = argparse.ArgumentParser(
        "taskd",
        description="Serve each user's tasks to whoever has that user's token.",
        epilog=f"settings, from the environment or .env:\n{''.join(settings)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"taskd {__version__}")
    parser.parse_args(arguments)


@contextlib.contextmanager
def standard_streams(program: str) -> Iterator[None]:
    """Open closed standard streams, escape what their encoding lacks, and flush them at the end.

    A socket or the database would get the descriptor of a closed one. Output that cannot be written
    is discarded, and the exit status is 1; Python would try again at its exit, and end with 120.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name) or open(os.devnull, mode)  # noqa: PTH123, SIM115
        setattr(sys, name, stream)
        if mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    status = None
    try:
        yield
    except SystemExit as ex:
        status = ex.code
    if (failure := flush_or_discard(sys.__stdout__)) and not status:
        status = 1
        if not isinstance(failure, BrokenPipeError):  # its reader wanted no more
            with contextlib.suppress(OSError):
                print(f"{program}: the output: {failure.strerror}", file=sys.stderr)
    flush_or_discard(sys.__stderr__)
    sys.exit(status)


def flush_or_discard(stream: io.TextIOWrapper | None) -> OSError | None:
    """Write what a standard stream still holds, or discard it and return the error."""
    if stream:
        try:
            stream.flush()
        except OSError as ex:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            return ex
    return None


def main() -> None:
    """Serve with the settings of the environment; the exit status is 2 for unusable ones."""
    with standard_streams("taskd"):
        if len(sys.argv) > 1:
            parse_arguments(sys.argv[1:])
        try:
            settings = Settings.load()
            configure_log(settings)
            listener = listen(settings.host, settings.port)
            app = create_app(settings)
        except (SettingsError, DatabaseError) as ex:
            # One line, whatever a path contains.
            print("taskd:", *str(ex).splitlines(), file=sys.stderr)
            sys.exit(2)
        warn_about(settings)
        threading.Thread(target=expire_keys_hourly, args=[app], daemon=True).start()
        if sys.platform == "linux" and settings.database_url.startswith("postgresql:"):
            threading.Thread(target=use_one_processor, daemon=True).start()
        serve(app, listener, settings)


if __name__ == "__main__":
    main()

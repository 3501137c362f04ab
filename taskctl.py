#!/usr/bin/env python3
"""taskctl: the operator's and developer's tool beside taskd.

It reads the settings that taskd reads, and decides about tokens and the database with taskd's own
code. Data goes to stdout, messages to stderr. Exit status: 0; 1 when something is refused, not
found or failed; 2 for wrong usage, unusable settings, and a database that cannot be opened or does
not fit. A command opens the database, makes one call and prints; each chapter uses only those above
it:

| chapter            | has                                                                     |
|--------------------|-------------------------------------------------------------------------|
| Terminal           | messages, tables, JSON, CSV, progress bars                              |
| Set up             | `init`, `settings`                                                      |
| Tokens             | `mint`, `verify`                                                        |
| Tasks              | `users`, `tasks`, `stats`, `seed`                                       |
| Backup and restore | `backup`, `restore`                                                     |
| Check              | `check`                                                                 |
| Export and import  | `export`, `import`, `purge`                                             |
| Copy               | `copy`, between SQLite and PostgreSQL                                   |
| Live server        | `smoke`, `wait`                                                         |
| Ephemeral server   | `serve`                                                                 |
| Main               | signals, errors, exit status                                            |
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

import csv
import dataclasses
import gzip
import hashlib
import http.client
import json
import logging
import math
import os
import random
import re
import secrets
import select
import shutil
import signal
import sqlite3
import stat
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Annotated, Any, BinaryIO
from urllib.parse import urlsplit

try:
    import msgspec
    import peewee
    from jwt.utils import base64url_decode
    from peewee import EXCLUDED, fn
    from rich.cells import cell_len
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Column, Table
    from rich.text import Text
    from typer import Argument, BadParameter, CallbackParam, Exit, Option, Typer

    import taskd
    from taskd import DOTENV, About, IdempotencyKey, Settings, Task, Tokens
except ModuleNotFoundError as ex:
    if __name__ != "__main__":
        raise
    sys.exit(
        f"taskctl: the package {ex.name} is not installed for this Python; "
        "use .venv/bin/python, which `make run` makes, or run: pip install -r requirements.txt"
    )
except KeyboardInterrupt:
    sys.exit(130)

at_end = ExitStack()  # closes the databases of a command, and removes its unfinished files
app = Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# --- Terminal -------------------------------------------------------------------------------------

AsJson = Annotated[bool, Option("--json", help="Print JSON.")]
AsLines = Annotated[bool, Option("--nl", help="Print JSON lines.")]
AsCsv = Annotated[bool, Option("--csv", help="Print CSV.")]
Wide = Annotated[bool, Option("--wide", help="All columns, however wide.")]
Version = Annotated[bool, Option("--version", help="Show the version and exit.")]
Row = dict[str, Any]
Names = tuple[str, ...]
STYLES = {"ok": "green", "warning": "yellow", "FAIL": "bold red"}
ALIGNED = 60  # characters; a longer value does not widen its column of a wide table
TIMES = ("created_at", "updated_at", "due_date", "last_change")  # shown to the minute


class Refused(Exception):
    """A command is refused, or what it looks for is not found; the message says why."""


def say(message: str) -> None:
    """Print a message on stderr, which its reader may have closed."""
    with suppress(OSError):
        print(f"taskctl: {message}", file=sys.stderr)


def show(row: Row, as_json: bool) -> None:
    """Print one row: as a JSON object, or a line for each member."""
    if as_json:
        print(json.dumps(row))
    else:
        print_aligned([[name, printable(value)] for name, value in row.items()])


def show_all(rows: list[Row], as_json: bool, wide: bool = False, hidden: Names = ()) -> None:
    """Print rows as JSON or a table; on a terminal it lacks the hidden columns, unless wide."""
    if as_json:
        print(json.dumps(rows))
    elif rows and sys.stdout.isatty() and not wide:
        show_table(rows, hidden)
    elif rows:
        print_aligned([[*rows[0]], *(list(map(printable, row.values())) for row in rows)])


def show_list(
    rows: list[Row], as_json: bool, nl: bool, as_csv: bool, wide: bool, hidden: Names, total: str
) -> None:
    """Print rows as JSON, JSON lines or CSV, or else a table; say the total to people."""
    if as_json + nl + as_csv > 1:
        raise BadParameter("--json, --nl and --csv exclude each other")
    if nl:
        sys.stdout.writelines(f"{json.dumps(row)}\n" for row in rows)
    elif as_csv:
        show_csv(rows)
    else:
        show_all(rows, as_json, wide, hidden)
        if not as_json and (sys.stdout.isatty() or not rows):
            say(total)


def show_csv(rows: list[Row]) -> None:
    """Print rows as CSV (RFC 4180): null as nothing, and what is not text as in JSON."""
    writer = csv.writer(sys.stdout)
    writer.writerows(row.keys() for row in rows[:1])
    for row in rows:
        values = row.values()
        writer.writerow(v if v is None or isinstance(v, str) else json.dumps(v) for v in values)


def show_table(rows: list[Row], hidden: Names) -> None:
    """Print a table without the hidden columns and those in which no row has a value."""
    filled = [name for name in rows[0] if any(row[name] not in (None, []) for row in rows)]
    names = [name for name in filled if name not in hidden]
    columns = [Column("done" if n == "completed" else n, no_wrap=n in TIMES) for n in names]
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(cell(name, row[name]) for name in names))
    Console().print(table)


def cell(name: str, value: object) -> Text:
    """Return a value for a table on a terminal, in which times are to the minute, in UTC."""
    text = printable(value)
    text = text[:16].replace("T", " ") if name in TIMES else text
    return Text(text, STYLES.get(text, "") if name == "result" else "", overflow="fold")


def print_aligned(lines: list[list[str]]) -> None:
    """Print values below each other in columns, except for those that are long."""
    columns = [list(map(cell_len, column)) for column in zip(*lines, strict=True)]
    widths = [max(size for size in column if size <= ALIGNED) for column in columns[:-1]]
    for *values, last in lines:
        pairs = zip(values, widths, strict=True)
        print(*(text + " " * (width - cell_len(text)) for text, width in pairs), last, sep="  ")


def counted(number: int, noun: str) -> str:
    """Return "no tasks", "1 task" or "2 tasks"."""
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def conclude(rows: list[Row], noun: str, quiet: bool, why: str = "") -> None:
    """Say how many checks or calls passed; raise Refused if one failed."""
    results = [row["result"] for row in rows]
    failed, warned = results.count("FAIL"), results.count("warning")
    if failed:
        raise Refused(f"{failed} of {len(rows)} {noun}s failed{why}")
    if not quiet:
        warnings = f", {counted(warned, 'warning')}" if warned else ""
        say(f"all {len(rows)} {noun}s passed{warnings}")


def printable(value: object) -> str:
    """Return a value as text in which no character controls the terminal."""
    value = (", ".join(value) or None) if isinstance(value, list) else value
    words = {"None": "-", "True": "yes", "False": "no"}
    return taskd.printable(words.get(repr(value), str(value)))


def progress(hidden: bool = False) -> Progress:
    """Return a progress bar, which is shown only if stderr is a terminal."""
    console = Console(stderr=True)
    return Progress(console=console, disable=hidden or not console.is_terminal, transient=True)


@app.callback(invoke_without_command=True)
def options(version: Version = False) -> None:
    """Mint and verify tokens, inspect and seed tasks, keep them safe, and try a live server."""
    if version:
        print(f"taskctl {taskd.__version__}")
        raise Exit


# --- Set up ---------------------------------------------------------------------------------------


@app.command()
def init() -> None:
    """Write .env with a fresh secret, and create the database.

    Nothing is ever overwritten. Where TASKD_JWKS_URL is set, no secret is needed.
    """
    settings = Settings.load()
    if settings.secrets or settings.secret:
        say("the secret is there already")
    elif settings.jwks_url:
        say("no secret is needed: TASKD_JWKS_URL is set, and only its keys sign logins")
    else:
        write_secret()
        say(f"wrote a new secret to {DOTENV}; give the same BETTER_AUTH_SECRET to Better Auth")
    existed = exists(settings)
    taskd.open_database(settings).close()
    say(f"{settings.database} is there already" if existed else f"created {settings.database}")


def is_postgresql(settings: Settings) -> bool:
    """Say whether the database is PostgreSQL's and not a file of SQLite's."""
    return settings.database_url.startswith("postgresql:")


def exists(settings: Settings) -> bool:
    """Say whether there is a file of SQLite's, or PostgreSQL has taskd's tables."""
    if not is_postgresql(settings):
        return Path(settings.database).exists()
    with open_postgresql(settings) as database:
        return taskd.schema_version(database) > 0


@contextmanager
def open_postgresql(settings: Settings) -> Iterator[peewee.Database]:
    """Yield PostgreSQL's database for reading, without making or migrating its tables."""
    url = settings.database_url
    parameters = taskd.libpq_parameters(url)
    database = peewee.PostgresqlDatabase(url, prefer_psycopg3=True, encoding="UTF8", **parameters)
    try:
        with database.connection_context():
            database.execute_sql("SET default_transaction_read_only = on")
            taskd.check_encoding(database, "it")
            yield database
    except Exception as ex:
        why = taskd.first_line(ex)
        raise taskd.DatabaseError(f"{settings.database} cannot be used: {why}") from None


def write_secret() -> None:
    """Append a secret of 256 random bits to .env, which only its owner may read."""
    line = f"BETTER_AUTH_SECRET={secrets.token_urlsafe(32)}\n"
    if DOTENV.is_symlink():
        raise taskd.SettingsError(f"{DOTENV} is a symbolic link, and is not written through")
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        with open(DOTENV, "r+b", opener=lambda path, _: os.open(path, flags, 0o600)) as file:
            os.fchmod(file.fileno(), 0o600)
            written = file.read()
            file.write((line if not written or written.endswith(b"\n") else f"\n{line}").encode())
    except OSError as ex:
        raise taskd.SettingsError(f"{DOTENV} cannot be written: {ex.strerror}") from None


@app.command()
def settings(as_json: AsJson = False) -> None:
    """Show the effective settings, secrets masked. The table also says where each comes from."""
    effective, dotenv, shown = Settings.load(), taskd.read_dotenv(DOTENV), {}
    for field in dataclasses.fields(effective):
        variable, value = field.metadata["variable"], getattr(effective, field.name)
        value = "(set)" if value and not field.repr else without_password(value)
        source = str(DOTENV) if dotenv.get(variable) else "default"
        source = "environment" if os.environ.get(variable) else source
        shown[variable] = value if as_json else f"{printable(value)}  ({source})"
    show(shown, as_json)


def without_password(value: object) -> object:
    """Return a setting as it is written in the environment, without a password in it."""
    if isinstance(value, str):
        value = re.sub(r"(//[^/:@]*):[^/]*@", r"\1:…@", value)
        return re.sub("(?<=password=)[^&]*", "…", value)
    return (",".join(value) or None) if isinstance(value, tuple) else value


# --- Tokens ---------------------------------------------------------------------------------------

UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}  # seconds
SET_BY = {"sub": "USER", "email": "--email", "name": "--name", "exp": "--ttl"}
MISTAKES: dict[str, Callable[[str], str]] = {  # what two services often make of one secret
    "followed by a line break": "{}\n".format,
    "in double quotes": '"{}"'.format,
    "in single quotes": "'{}'".format,
    "without the white space around it": str.strip,
    "without the quotes around it": lambda secret: secret.strip("\"'"),
}


def parse_user(text: str) -> str:
    """Return the id of a user as it is, or reject one that is empty or not UTF-8."""
    if not text or taskd.SURROGATE.search(text):
        raise BadParameter("it must not be empty, and UTF-8")
    return text


UserArgument = partial(Argument, parser=parse_user)
UserOption = partial(Option, parser=parse_user)
UserId = Annotated[str, UserArgument(help="The user's id: a token's sub.")]


@app.command()
def mint(
    user: UserId,
    email: Annotated[str | None, Option(help="The email claim.")] = None,
    name: Annotated[str | None, Option(help="The name claim.")] = None,
    ttl: Annotated[str | None, Option(help="90s, 15m, 1h (default), 7d; -1h has expired.")] = None,
    claim: Annotated[list[str] | None, Option(help="A claim, k=v; v may be JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print a token like a login's, signed with the first secret."""
    settings, more = Settings.load(), dict(map(parse_claim, claim or ()))
    given = {"sub": user, "email": email, "name": name, "exp": ttl}
    for twice in (claim for claim in more if given.get(claim) is not None):
        raise BadParameter(f"--claim {twice}=… and {SET_BY[twice]} exclude each other")
    lifetime = seconds("1h" if ttl is None else ttl)
    claims = login(settings, user, lifetime, email=email, name=name) | more
    try:
        token = Tokens(settings).mint(claims)
    except (TypeError, ValueError, RecursionError) as ex:
        raise BadParameter(str(ex)) from None
    print(json.dumps({"token": token, "claims": claims}) if as_json else token)


def login(settings: Settings, user: str, ttl: int, **more: str | None) -> dict[str, Any]:
    """Return the claims of a login that these settings accept for `ttl` seconds."""
    now = int(time.time())
    claims: dict[str, Any] = {"sub": user, "iss": settings.issuer, "aud": settings.audience, **more}
    claims |= {"iat": now, "exp": now + ttl}
    return {name: value for name, value in claims.items() if value is not None}


def seconds(text: str) -> int:
    """Return a duration such as 90s, 15m, 1h or 7d in seconds."""
    if not (found := re.fullmatch(r"(-?[0-9]{1,9})([smhd]?)", text)):
        raise BadParameter(f"a duration must look like 90s, 15m, 1h or 7d, not {text!r}")
    return int(found[1]) * UNITS[found[2]]


def finite(text: str) -> float | str:
    """Return a number, or its text if JSON could not show it: NaN, Infinity, 1e400."""
    return float(text) if math.isfinite(float(text)) else text


read_json = partial(json.loads, parse_constant=finite, parse_float=finite)


def parse_claim(text: str) -> tuple[str, Any]:
    """Return the name and value of `k=v`; a value that is not JSON is a string."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise BadParameter(f"--claim must look like role=admin, not {text!r}")
    with suppress(ValueError, RecursionError):
        return name, read_json(value)
    return name, value


@app.command()
def verify(
    token: Annotated[str, Argument(help="The token; - reads it from stdin.")] = "-",
    as_json: AsJson = False,
) -> None:
    """Say whether taskd would accept a token, and show what it says.

    If so, as whom and until when; if not, exactly why. The header and claims of a refused token
    are unverified.
    """
    settings, text = Settings.load(), read_token(token)
    tokens = Tokens(settings)
    found = contents(text) if as_json else readable(contents(text))
    try:
        user = tokens.verify(text)
    except taskd.TokenError as ex:
        refused = {"accepted": False, "reason": str(ex)} | ({"unverified": found} if found else {})
        unverified = {f"{name} (unverified)": value for name, value in found.items()}
        show(refused if as_json else unverified, as_json)
        raise Refused(f"taskd refuses this token: {ex}{hint(settings, tokens, text)}") from None
    accepted = {"accepted": True, "user_id": user.id, "email": user.email, "name": user.name}
    accepted["until"] = instant(user.expires)
    show(accepted | found, as_json)


def read_token(given: str) -> str:
    """Return a token, from stdin if it is `-`, without white space and its scheme before it."""
    if given == "-":
        if sys.stdin.isatty():
            say("paste a token, then press Enter and Ctrl-D")
        given = sys.stdin.buffer.read().decode(errors="replace")
    return re.sub("^bearer +", "", given.strip(), flags=re.IGNORECASE)


def contents(token: str) -> dict[str, Any]:
    """Return the header and the claims of a token as far as they can be read, whoever signed it."""
    found = {}
    if token.count(".") == 2:
        for name, part in zip(("header", "claims"), token.split("."), strict=False):
            with suppress(ValueError, RecursionError):
                found[name] = read_json(base64url_decode(part))
    return found


def readable(contents: dict[str, Any]) -> dict[str, Any]:
    """Return a header and claims for people: as JSON, with the times as RFC 3339 below them."""
    lines = {name: json.dumps(value, ensure_ascii=False) for name, value in contents.items()}
    claims = contents.get("claims")
    for name, value in claims.items() if isinstance(claims, dict) else ():
        if name in ("iat", "nbf", "exp") and type(value) in (int, float):
            lines[name] = instant(value)
    return lines


def hint(settings: Settings, tokens: Tokens, token: str) -> str:
    """Return what is wrong with the secret, if a common mistake makes the token good."""
    for mistake, change in MISTAKES.items():
        changed = tuple(filter(None, map(change, tokens.secrets)))
        with suppress(taskd.TokenError, taskd.SettingsError):
            Tokens(dataclasses.replace(settings, secrets=changed, jwks_url=None)).verify(token)
            return f"; it is signed with this secret {mistake}: give both services exactly the same"
    return ""


def instant(seconds: float) -> str:
    """Return a time in RFC 3339."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat()[:19] + "Z"
    except (OverflowError, ValueError, OSError):
        return f"{seconds} seconds after 1970"


# --- Tasks ----------------------------------------------------------------------------------------

ROWS_PER_STATEMENT = 1000
USER_MODELS = [model for model in taskd.MODELS if "user_id" in model._meta.fields]
HIDDEN = ("user_id", "description", "created_at", "updated_at")  # a terminal has no room for them
TITLES = [
    *("Buy milk", "Buy bread and butter", "Buy a birthday present for Nora", "Buy light bulbs"),
    *("Call the dentist", "Call grandmother", "Call the landlord about the heating"),
    *("Write the minutes of Monday's meeting", "Write the release notes", "Write a travel report"),
    *("Repair the bicycle's rear light", "Repair the dripping tap", "Repair the build on main"),
    *("Book the train to Vienna", "Book a table for six", "Book the meeting room for Thursday"),
    *("Read the lease", "Read chapter four", "Read the review of the new API"),
]
NOTES = ["before the weekend", "ask Mira first", "2 litres", "not urgent", "twice, if need be"]
TAGS = ["home", "work", "errand", "garden", "someday", "phone"]
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)  # the same random seed gives the same times too
RANDOM_SEED = 1
USER_ORDERS = "user_id, tasks, done or last_change"


TASKS = fn.COUNT(Task.id).alias("tasks")
DONE = fn.COUNT(Task.id).filter(Task._meta.fields["completed"]).alias("done")
LAST_CHANGE = fn.MAX(Task.updated_at).alias("last_change")


def require_database(settings: Settings) -> None:
    """Raise Refused if SQLite's file does not exist, or PostgreSQL has no tables of taskd."""
    if not exists(settings):
        made = "make it with: python taskctl.py init"
        raise Refused(f"there is no database {settings.database}; {made}")


def database(settings: Settings | None = None, create: bool = False) -> taskd.Database:
    """Return the database of the settings, which `Task` then queries."""
    settings = settings or Settings.load()
    if not create:
        require_database(settings)
    opened = taskd.open_database(settings, statement_timeout=0)
    at_end.callback(opened.close)
    Task.bind(opened.peewee)
    return opened


def columns(task: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a new row: a task with these members."""
    return {**task, **taskd.search_columns(task), "version": 1}


@app.command()
def users(
    sort: Annotated[str, Option(help=f"{USER_ORDERS}; -tasks for most first.")] = "user_id",
    limit: Annotated[int | None, Option(min=1, max=10**9, help="How many at most.")] = None,
    as_json: AsJson = False,
    nl: AsLines = False,
    as_csv: AsCsv = False,
    wide: Wide = False,
) -> None:
    """List the users who have tasks."""
    shown = {"user_id": Task.user_id, "tasks": TASKS, "done": DONE, "last_change": LAST_CHANGE}
    if not (key := shown.get(sort.removeprefix("-"))):
        raise BadParameter(f"--sort takes {USER_ORDERS}")
    database()
    order = key.desc() if sort.startswith("-") else key
    query: Any = Task.select(*shown.values()).group_by(Task.user_id).order_by(order, Task.user_id)
    found = [dict(zip(shown, row, strict=True)) for row in query.limit(limit).tuples()]
    show_list(found, as_json, nl, as_csv, wide, (), counted(len(found), "user"))


def check_filter(parameter: CallbackParam, value: Any) -> Any:
    """Return the value of a filter, or reject what taskd would reject as a parameter of lists."""
    values = value if isinstance(value, list) else [str(value)]
    if taskd.SURROGATE.search("".join(values)):
        raise BadParameter("must be UTF-8")
    if value not in (None, []) and (wrong := taskd.wrong_parameter(parameter.name or "", values)):
        raise BadParameter(wrong.partition(", in which + ")[0])  # that is for a URL
    return value


Filter = partial(Option, callback=check_filter)
SORT_HELP = f"{', '.join(taskd.ORDERS)}; with - before it descending."


@app.command()
def tasks(
    user: UserId,
    only_open: Annotated[bool, Option("--open", help="Only those that are not completed.")] = False,
    only_done: Annotated[bool, Option("--done", help="Only those that are completed.")] = False,
    q: Annotated[str, Filter("--search", "-q", help="Only those with this text in them.")] = "",
    sort: Annotated[str, Filter(help=SORT_HELP)] = "id",
    priority: Annotated[str | None, Filter(help="Only those of this priority.")] = None,
    tag: Annotated[list[str] | None, Filter(help="With this tag; several times: with all.")] = None,
    due_before: Annotated[str | None, Filter(help="Only those due before a day or a time.")] = None,
    limit: Annotated[int | None, Filter(help="How many at most, 1 to 1000.")] = None,
    as_json: AsJson = False,
    nl: AsLines = False,
    as_csv: AsCsv = False,
    wide: Wide = False,
) -> None:
    """List a user's tasks, oldest first."""
    if only_open and only_done:
        raise BadParameter("--open and --done exclude each other")
    completed = only_done if only_open or only_done else None
    due = due_before and taskd.PARAMETER_PARSERS["due_before"](due_before)
    listing = taskd.Listing(completed, q, priority, tuple(tag or ()), due, sort=sort, limit=limit)
    found = read_list(user, listing)
    noun = "task" if listing == taskd.Listing(sort=sort) else "such task"
    total = f"{printable(user)} has {counted(len(found), noun)}"
    show_list(found, as_json, nl, as_csv, wide, HIDDEN, total)


def read_list(user: str, listing: taskd.Listing) -> list[dict[str, Any]]:
    """Return all pages of a list, up to its limit."""
    store = taskd.TaskStore(database())
    found: list[dict[str, Any]] = []
    rest: taskd.Listing | None = listing
    while rest and (not listing.limit or len(found) < listing.limit):
        page, rest = store.page(user, rest)
        found += json.loads(page)
    return found[: listing.limit]


@app.command()
def stats(as_json: AsJson = False) -> None:
    """Count users and tasks."""
    settings = Settings.load()
    database(settings)
    users = fn.COUNT(Task.user_id.distinct()).alias("users")
    oldest = fn.MIN(Task.created_at).alias("oldest")
    query: Any = Task.select(users, TASKS, DONE, oldest, LAST_CHANGE)
    size = None if is_postgresql(settings) else Path(settings.database).stat().st_size
    show(query.dicts().get() | {"bytes": size}, as_json)


@app.command()
def seed(
    user: Annotated[list[str] | None, UserArgument(help="Users to give tasks to.")] = None,
    count: Annotated[int, Option(min=1, max=10**6, help="Tasks for each user.")] = 20,
    users: Annotated[int, Option(min=0, max=10**6, help="Made-up users to add, user-1 …")] = 0,
    random_seed: Annotated[int, Option(help="The same number makes the same tasks.")] = RANDOM_SEED,
    as_json: AsJson = False,
) -> None:
    """Add believable tasks. The database is created if need be; tasks that are there stay."""
    names = [*dict.fromkeys([*(user or ()), *(f"user-{n}" for n in range(1, users + 1))])]
    if not names:
        raise BadParameter("name a user, or say how many to make up: --users 3")
    database(create=True)
    add_believable(names, count, random_seed)
    show({"users": len(names), "tasks": len(names) * count}, as_json)


def add_believable(users: list[str], count: int, random_seed: int) -> None:
    """Add tasks for these users, the same for the same random seed."""
    rng = random.Random(random_seed)  # noqa: S311  nothing secret is drawn from it
    tasks = believable(users, count, rng)
    with progress() as bar:
        tracked = bar.track(tasks, total=len(users) * count, description="seeding")
        for batch in peewee.chunked(tracked, ROWS_PER_STATEMENT):
            Task.insert_many(map(columns, batch)).execute()  # one statement: all of them or none


def believable(users: list[str], count: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yield tasks, the same for the same random number generator."""
    for user in users:
        for second in sorted(rng.randrange(300 * 86400) for _ in range(count)):
            created = EPOCH + timedelta(seconds=second)
            done = rng.random() < 0.4
            updated = created + timedelta(seconds=rng.randrange(14 * 86400)) if done else created
            due = created + timedelta(days=rng.randrange(1, 60), hours=rng.randrange(24))
            yield {
                "user_id": user,
                "title": rng.choice(TITLES),
                "description": rng.choice(NOTES) if rng.random() < 0.5 else None,
                "completed": done,
                "priority": rng.choice(["low", "medium", "high", None, None]),
                "due_date": rng.choice([None, f"{due:%Y-%m-%d}", taskd.timestamp(due)]),
                "tags": rng.sample(TAGS, rng.choice([0, 0, 1, 2])),
                "created_at": taskd.timestamp(created),
                "updated_at": taskd.timestamp(updated),
            }


# --- Backup and restore ---------------------------------------------------------------------------

PAGES = 256  # copied between two updates of the progress bar: 1 MB
JOURNALS = ("-wal", "-journal")  # what SQLite keeps beside a database until it is checkpointed
ATTEMPTS = 10  # at reading a file that changes meanwhile
GZIP = b"\x1f\x8b"  # how a gzip file begins
EXCLUSIVE = (  # keeps the lock until the connection is closed
    "PRAGMA busy_timeout = 0; PRAGMA journal_mode = DELETE; PRAGMA synchronous = EXTRA;"
    "PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE; COMMIT"
)
SEQUENCE = "pg_get_serial_sequence(%s, 'id')::regclass"  # of a table's ids, in PostgreSQL
SKIP_HELP = "How many ids to leave unused, for tasks created since the backup and lost."
SKIP_IDS = "so that none is used again, restore once more with --skip-ids"
DATABASE_ERRORS = (peewee.DatabaseError, sqlite3.DatabaseError)


@app.command()
def backup(file: Annotated[str, Argument(help="The new file; - writes it to stdout.")]) -> None:
    """Copy the database into a new file, also while taskd serves. No file is ever overwritten."""
    settings = Settings.load()
    database = file_of(settings)
    require_database(settings)
    if file == "-" and sys.stdout.isatty():
        raise Refused("a database is not written to a terminal; send stdout to a file or a program")
    target = Path(tempfile.gettempdir(), database.name) if file == "-" else Path(file)
    if file != "-" and os.path.lexists(target):
        raise Refused(f"{target} exists already, and is never overwritten")
    copy = unfinished(target)
    copy_database(database, copy, f"{database} cannot be backed up")
    if file == "-":
        with copy.open("rb") as whole:
            shutil.copyfileobj(whole, sys.stdout.buffer)
    else:
        publish(copy, target)
        say(f"backed up {database} to {target}, {target.stat().st_size} bytes")


@app.command()
def restore(
    file: Annotated[str, Argument(help="A backup, packed with gzip or not; - reads stdin.")],
    skip_ids: Annotated[int, Option(min=0, max=10**9, help=SKIP_HELP)] = 0,
) -> None:
    """Put a backup in the database's place, while no server runs.

    The backup is checked first. The old database is kept beside the new one, as
    <name>.before-restore-<time>, and no id that it has used is used again. If it is lost, skip
    more ids than tasks can have been created since the backup.
    """
    database, name = file_of(Settings.load()), name_of(file)
    copy, given = unfinished(database), unpacked(file, database)
    copy_database(given, copy, f"{name} cannot be restored")
    try:
        taskd.prepare_database(str(copy))
    except taskd.DatabaseError as ex:
        why = str(ex).removeprefix(f"{copy} ")
        raise Refused(f"{name} cannot be restored: {why}") from None
    replaced = database.exists() and database.stat().st_size
    with closing(connect(copy)) as new, closing(open_exclusively(database)) as live:
        raise_last_id(new, Task, last_id(new, Task) + skip_ids)
        if replaced:
            say(f"the old database is kept as {keep_old_copy(live, database)}")
            try:
                continue_ids(live, new)
            except DATABASE_ERRORS:  # it is damaged
                say(f"its last ids cannot be read; {SKIP_IDS}")
        # In one transaction: SQLite rolls back half of one at the next start.
        copy_pages(new, live, "restoring")
    sync(database.parent)
    say(f"restored {database} from {name}")


def file_of(settings: Settings) -> Path:
    """Return the path of the database, which must be a file."""
    if is_postgresql(settings):
        own = "keep it safe with its server's own tools, such as pg_dump"
        raise Refused(f"{settings.database} is not a file; {own}")
    return followed(settings.database)


def name_of(file: str) -> str:
    """Return what messages call a file that is given on the command line."""
    return "stdin" if file == "-" else file


def followed(path: str) -> Path:
    """Return where a symbolic link leads, or the path: SQLite's log lies beside the file itself."""
    return Path(os.path.realpath(path)) if Path(path).is_symlink() else Path(path)


def unpacked(file: str, beside: Path) -> Path:
    """Return the path of a backup; stdin and gzip files are unpacked into a temporary file."""
    if file == "-" and sys.stdin.isatty():
        raise Refused("stdin is a terminal; send a backup to it, from a file or a program")
    if file != "-" and not Path(file).is_file():
        raise Refused(f"there is no file {file}")
    with open(sys.stdin.fileno() if file == "-" else file, "rb") as stream:  # noqa: PTH123
        packed = stream.peek(len(GZIP)).startswith(GZIP)
        if file != "-" and not packed:
            return Path(file)
        whole = unfinished(beside)
        try:
            with whole.open("wb") as target:
                shutil.copyfileobj(gzip.GzipFile(fileobj=stream) if packed else stream, target)
        except (EOFError, zlib.error, OSError) as ex:
            raise Refused(f"{name_of(file)} cannot be unpacked: {ex}") from None
        return whole


def unfinished(path: Path) -> Path:
    """Return an empty file, mode 600, in a directory beside `path` that is removed at the end."""
    if not path.parent.is_dir():
        raise Refused(f"there is no directory {path.parent}")
    directory = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    at_end.callback(shutil.rmtree, directory, ignore_errors=True)
    directory.mkdir(mode=0o700)
    file = directory / path.name
    file.touch(mode=0o600)
    return file


def publish(file: Path, path: Path) -> None:
    """Sync a complete file and rename it, unless something with that name exists."""
    sync(file)
    try:
        path.hardlink_to(file)
    except FileExistsError:
        raise Refused(f"{path} exists already, and is never overwritten") from None
    except OSError:  # a file system without links, such as a memory stick's; this could overwrite
        file.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    at_end.callback(os.close, descriptor)
    os.fsync(descriptor)


def connect(path: Path, mode: str = "mode=rw") -> peewee.SqliteDatabase:
    """Return an existing database, with transactions only where they are begun."""
    uri = f"{path.absolute().as_uri()}?{mode}"
    return peewee.SqliteDatabase(uri, uri=True, timeout=taskd.LOCK_TIMEOUT)


def readings(path: Path, scratch: Path) -> Iterator[peewee.SqliteDatabase]:
    """Yield the database for reading, once for each attempt.

    Without a server it is read without a lock; if it was changed meanwhile, it is read once more.
    Nothing beside the database is created or changed: files left by a user who can only read would
    stop taskd's writes. While a server has it open (there is a -shm file) it is read in place. If
    there is a log but no server, SQLite would create an index for it, so database and log are
    copied beside `scratch` and read there.
    """
    if not path.is_file():
        raise Refused(f"{path}: it is not a regular file")
    for _ in range(ATTEMPTS):
        # It exists while a server has the database open, or after one was killed.
        in_use, before = Path(f"{path}-shm").exists(), fingerprint(path)
        source, mode = path, "mode=ro" if in_use else "immutable=1"
        if not in_use and any(Path(f"{path}{log}").exists() for log in JOURNALS):
            source, mode = unfinished(scratch), "mode=rw"
            copy_files(path, source)
        with closing(connect(source, mode)) as database:
            yield database
        if source != path:
            shutil.rmtree(source.parent)  # the next attempt takes as much space
        if in_use or fingerprint(path) == before:
            return
    raise Refused(f"{path} cannot be read: another program goes on writing to it")


def existing(settings: Settings) -> Iterator[peewee.Database]:
    """Yield the database of the settings for reading, perhaps several times: see `readings`."""
    if is_postgresql(settings):
        with open_postgresql(settings) as database:
            yield database
    else:
        path = followed(settings.database)
        yield from readings(path, Path(tempfile.gettempdir(), path.name))


def fingerprint(path: Path) -> tuple[object, ...]:
    """Return what a write to a database changes: its header, size, time and logs."""
    with path.open("rb") as file:
        header, status = file.read(28), os.fstat(file.fileno())
    logs = (Path(f"{path}{suffix}").exists() for suffix in (*JOURNALS, "-shm"))
    return header, status.st_size, status.st_mtime_ns, *logs


def copy_files(path: Path, copy: Path) -> None:
    """Copy a database that nobody has open, and the logs that a killed writer left."""
    for suffix in ("", *JOURNALS):
        with suppress(FileNotFoundError):  # or it was removed meanwhile
            shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")


def copy_database(path: Path, copy: Path, failed: str) -> None:
    """Copy a database as it is now, with what its log holds, into one file without a log.

    Raises Refused, with what has `failed` and why, if the copy is not whole or not taskd's.
    """
    try:
        with closing(connect(copy)) as target:
            for source in readings(path, copy):
                copy_pages(source, target, f"reading {path}")
            target.execute_sql("PRAGMA journal_mode = DELETE")
            fault = damage(target)
    except DATABASE_ERRORS as ex:
        fault = str(ex)
    if fault:
        raise Refused(f"{failed}: {fault}")


def copy_pages(source: peewee.SqliteDatabase, target: peewee.SqliteDatabase, what: str) -> None:
    """Copy all pages of a database, within one transaction of the source.

    Without it SQLite's backup starts again at every change of the source, and never ends on a busy
    server. Its writes are one transaction of the target.
    """
    reading = source.connection()
    with progress() as bar, source.atomic():
        job = bar.add_task(what, total=None)
        reading.execute("SELECT 1 FROM sqlite_master").fetchone()  # BEGIN alone takes no snapshot
        reading.backup(
            target.connection(),
            pages=PAGES,
            progress=lambda _, left, total: bar.update(job, total=total, completed=total - left),
        )


def open_exclusively(path: Path) -> peewee.SqliteDatabase:
    """Return a database, new if need be, that nobody else has open, with an exclusive lock.

    A server keeps its database open in WAL mode, which cannot be left as long as anybody has it
    open.
    """
    if (not path.exists() or not path.stat().st_size) and Path(f"{path}-wal").exists():
        raise Refused(f"{path}-wal exists without its database; move it away first")
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    live = connect(path)
    try:
        live.connection().executescript(EXCLUSIVE)
    except sqlite3.DatabaseError as ex:
        live.close()
        if ex.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            raise Refused(f"{path} is open elsewhere: stop the server first") from None
        by_hand = f"stop the server, move all {path}* away, and restore again"
        raise Refused(f"{path}: {ex}; {by_hand}") from None
    return live


def keep_old_copy(live: peewee.SqliteDatabase, path: Path) -> Path:
    """Copy the database as it is to a file beside it, and return its path."""
    kept = path.with_name(f"{path.name}.before-restore-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")
    copy = unfinished(kept)
    with closing(connect(copy)) as target:
        copy_pages(live, target, "keeping the old one")
    publish(copy, kept)
    return kept


def last_id(database: peewee.Database, model: type[peewee.Model]) -> int:
    """Return the last id that a row of a table was given, also if it was deleted since; or 0."""
    query = "SELECT MAX(seq) FROM sqlite_sequence WHERE name = ?"
    if not isinstance(database, peewee.SqliteDatabase):
        query = f"SELECT pg_sequence_last_value({SEQUENCE})"
    return database.execute_sql(query, (model._meta.table_name,)).fetchone()[0] or 0


def raise_last_id(database: peewee.Database, model: type[peewee.Model], last: int) -> None:
    """Give new rows ids after this one, unless they get such ids already."""
    table = model._meta.table_name
    if last <= last_id(database, model):
        return
    if isinstance(database, peewee.SqliteDatabase):
        database.execute_sql("DELETE FROM sqlite_sequence WHERE name = ?", (table,))
        database.execute_sql("INSERT INTO sqlite_sequence VALUES (?, ?)", (table, last))
    else:
        # The lock keeps others from taking ids meanwhile. The roll-back ends it, but leaves setval.
        with database.atomic() as locking:
            database.execute_sql(f"LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE")
            last = max(last, last_id(database, model))
            database.execute_sql(f"SELECT setval({SEQUENCE}, %s)", (table, last))
            locking.rollback()


def continue_ids(source: peewee.Database, target: peewee.Database) -> None:
    """Start the ids of the target after those of the source, so that none is used again."""
    for model in USER_MODELS:
        raise_last_id(target, model, last_id(source, model))


def damage(database: peewee.SqliteDatabase) -> str | None:
    """Return in words why a database is not taskd's, or not whole; None if it is both."""
    [[found]] = database.execute_sql("PRAGMA integrity_check(1)").fetchall()
    if found != "ok":
        return f"it is damaged: {' '.join(found.split())}"
    foreign = "it has no table task: it is not a database of taskd"
    return None if database.table_exists(Task) else foreign


# --- Check ----------------------------------------------------------------------------------------

Findings = Iterator[tuple[str, str, str]]  # ok, warning or FAIL; about what; and why
ODD_SECRET = "white space or quotes around it, or few different characters: is that intended?"


@app.command()
def check(as_json: AsJson = False) -> None:
    """Check the settings, the database and the key set.

    Who can read the files is checked too. Nothing is changed. Each line says ok, warning (it works,
    but should be changed) or FAIL, and what to do about it.
    """
    settings = Settings.load()
    tokens = Tokens(settings)  # raises SettingsError if nothing can verify a token
    findings = [
        *(("warning", message.split()[0], message) for message in taskd.misspelt()),
        *check_secrets(tokens),
        *check_database(settings),
        *check_modes(settings),
        *check_key_set(settings),
    ]
    rows = [dict(zip(("result", "about", "found"), finding, strict=True)) for finding in findings]
    show_all(rows, as_json)
    conclude(rows, "check", as_json)


def check_secrets(tokens: Tokens) -> Findings:
    """Yield how strong each secret is, but never one of them."""
    for number, secret in enumerate(tokens.secrets, 1):
        odd = secret != secret.strip() or secret[0] in "\"'" or len(set(secret)) < 10
        found = f"{len(secret.encode())} bytes, {ODD_SECRET if odd else 'strong'}"
        yield "warning" if odd else "ok", f"secret {number}", found


def check_database(settings: Settings) -> Findings:
    """Yield whether the database is whole and fits schema.sql."""
    is_file, name = not is_postgresql(settings), settings.database
    about = settings.database_url if is_file else name
    try:
        if is_file and not Path(name).exists() and Path(name).parent.stat():
            yield "warning", about, "not there yet; taskd makes it at its first start"
            return
        for database in existing(settings):
            result, found = look_into(database, name)
            if result != "FAIL":  # a change during the check may look like damage
                break
    except (Refused, OSError, taskd.DatabaseError) as ex:
        result, found = "FAIL", str(ex)
    yield result, about, found


def look_into(database: Any, name: str) -> tuple[str, str]:
    """Return how good a database is, and in words what to do about it."""
    is_file = isinstance(database, peewee.SqliteDatabase)
    try:
        if is_file and (fault := damage(database)):
            return "FAIL", f"{fault}; taskctl restore puts a backup in its place"
        if not (version := taskd.schema_version(database)):
            return "warning", "no tables yet; taskd makes them at its start"
        if version < taskd.VERSION:
            return "warning", "whole, and of an earlier version; taskd migrates it at its start"
        definitions = taskd.sqlite_definitions if is_file else taskd.portable_definitions
        taskd.check_schema(database, name, definitions)
        return "ok", "whole, and fits schema.sql" if is_file else "fits schema.sql"
    except (peewee.DatabaseError, taskd.DatabaseError) as ex:
        return "FAIL", taskd.first_line(ex)


def check_modes(settings: Settings) -> Findings:
    """Yield whether only their owner can read the files with secrets and tasks."""
    database = followed(settings.database)
    for path in (DOTENV, *(Path(f"{database}{suffix}") for suffix in ("", "-wal", "-shm"))):
        if path.exists():
            mode = path.stat().st_mode & 0o777
            result = "FAIL" if mode & 0o007 else "warning" if mode & 0o070 else "ok"
            advice = f"others can read it; run: chmod 600 {path}" if result != "ok" else ""
            yield result, str(path), f"mode {mode:o}: {advice or 'only its owner can read it'}"


def check_key_set(settings: Settings) -> Findings:
    """Yield which keys the key set has, and whether other services' tokens are rejected."""
    if not (url := settings.jwks_url):
        yield "ok", "TASKD_JWKS_URL", "not set: only the secret can sign a login"
        return
    try:
        keys, warnings = taskd.parse_key_set(taskd.download(url))
        found = "keys: " + ", ".join(f"{alg} {kid}" for kid, alg in keys)
        yield ("ok", url, found) if keys else ("FAIL", url, "it has no key that can sign a login")
        yield from (("warning", url, warning) for warning in warnings)
    except Exception as ex:  # whatever the other side does
        yield "FAIL", url, f"{type(ex).__name__}: {ex}"
    for variable, value in [("ISSUER", settings.issuer), ("AUDIENCE", settings.audience)]:
        found = value or "not set: other services' tokens are accepted"
        yield "ok" if value else "warning", f"TASKD_{variable}", found


# --- Export and import ----------------------------------------------------------------------------

MAX_LINE = 1024 * 1024  # bytes; the largest possible task has 130,000, all escaped
MAX_ID = 2**53 - 1  # which JavaScript still reads exactly, and leaves room for new tasks
ID_RULE = f"must be a whole number from 1 to {MAX_ID}"
TIME_RULE = "must be a time with its offset from UTC, such as 2026-11-20T21:00:00.000Z"
Time = Annotated[datetime, msgspec.Meta(tz=True)]
# The members of an exported task that the server owns; the others are `taskd.NEW_TASK`'s.
OWNED_MEMBERS: dict[str, tuple[Any, str]] = {
    "id": (Annotated[int, msgspec.Meta(ge=1, le=MAX_ID)], ID_RULE),
    "user_id": (Annotated[str, msgspec.Meta(min_length=1)], "must be a string that is not empty"),
    "created_at": (Time, TIME_RULE),
    "updated_at": (Time, TIME_RULE),
}


class Incoming(Task):
    """The tasks of an import, in a table of this connection until all of them are checked."""

    line = peewee.AutoField()
    id = peewee.BigIntegerField(index=True)

    class Meta:
        """SQLite keeps a temporary table in another file, and writes it without a lock."""

        temporary = True


@app.command()
def export(
    user: Annotated[str | None, UserArgument(help="Only this user's tasks.")] = None,
) -> None:
    """Print tasks as JSON lines, as the API shows them. All are read from one snapshot."""
    opened, theirs = database(), taskd.owned_by_user(Task) if user else peewee.SQL("TRUE")
    count = Task.select(TASKS).where(theirs)
    [[total]] = opened.run(opened.compile(count), user_id=user)
    if user and not total:
        raise Refused(f"{printable(user)} has no tasks")
    query = Task.select(*taskd.SHOWN, Task.version).where(theirs).order_by(Task.id)
    rows = opened.rows(opened.compile(query), user_id=user)  # one statement sees one snapshot
    with closing(rows), progress(hidden=sys.stdout.isatty()) as bar:
        for row in bar.track(rows, total=total, description="exporting"):
            sys.stdout.buffer.write(taskd.to_json(taskd.view(row)) + b"\n")
        sys.stdout.flush()  # if the reader has gone, fail here, where the bar is removed


@app.command("import")
def import_tasks(
    file: Annotated[str, Argument(help="JSON lines as export prints them; - reads stdin.")],
    new: Annotated[bool, Option("--new", help="Each line is a new task; ids are ignored.")] = False,
) -> None:
    """Add tasks from JSON lines: all of them, or none if one is wrong. Ids are kept.

    An import can be repeated: a line with the id, user_id and created_at of an existing task is
    that task, and of the two the one with the newer updated_at stays. A line with the id of
    another task is rejected. With --new every line becomes another task, and a repeated import
    adds all of them again.
    """
    opened = database()
    Incoming.bind(opened.peewee)
    Incoming.create_table()
    with sys.stdin.buffer if file == "-" else Path(file).open("rb") as lines:
        stage_lines(lines, new)
    with opened.transaction():
        done = f"{insert_new()} imported" if new else import_by_id(opened.peewee)
    say(done)


def import_by_id(database: peewee.Database) -> str:
    """Write the lines under their ids, and return in words what was done. Raises Refused."""
    refuse_repeated_ids()
    own = Incoming.id.between(*own_ids(database))
    last = Incoming.select(fn.COALESCE(fn.MAX(Incoming.id), 0)).where(own).scalar()
    raise_last_id(database, Task, last)  # first, so that nobody creates a task with one
    refuse_taken_ids()
    imported, there, updated, older = compared()
    if merge() != imported + updated:
        raise Refused("tasks were changed meanwhile; nothing was imported; repeat it")
    left = f", {older} skipped: the existing task is newer" if older else ""
    return f"{imported} imported, {there} already there, {updated} updated{left}"


def own_ids(database: peewee.Database) -> list[int]:
    """Return the smallest and the largest id that a new task can get: a partition has a range."""
    if isinstance(database, peewee.SqliteDatabase):
        return [1, MAX_ID]
    query = f"SELECT seqmin, seqmax FROM pg_sequence WHERE seqrelid = {SEQUENCE}"  # noqa: S608
    return [*database.execute_sql(query, ("task",)).fetchone()]


def stage_lines(lines: BinaryIO, new: bool) -> None:
    """Read the lines of an import into the temporary table."""
    size = os.fstat(lines.fileno()).st_size if lines.seekable() else None
    with progress() as bar:
        job = bar.add_task("reading", total=size)
        for batch in peewee.chunked(parsed(lines, new), ROWS_PER_STATEMENT):
            Incoming.insert_many(batch).execute()
            bar.update(job, completed=lines.tell() if lines.seekable() else None)


def parsed(lines: BinaryIO, new: bool = False) -> Iterator[Row]:
    """Yield a row for each line that is not empty; raise Refused for the first that is no task."""
    for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE), b""), 1):
        if line.strip():
            try:
                # A new task has no id yet, and the column needs one.
                yield {"line": number, "id": number, **columns(parse_task(line.decode(), new))}
            except (taskd.Unprocessable, ValueError) as ex:
                fault = getattr(ex, "description", f"it must be JSON in UTF-8: {ex}")
                raise Refused(f"line {number}: {fault}; nothing was imported") from None


def parse_task(text: str, new: bool) -> Row:
    """Return the members of a task; a new one has no id, and gets the times that it lacks."""
    task, members = taskd.parse_body(text, taskd.NEW_TASK), msgspec.json.decode(text)
    for name, (kind, rule) in OWNED_MEMBERS.items():
        if new and (name == "id" or (kind is Time and members.get(name) is None)):
            continue
        try:
            value = msgspec.convert(members.get(name), kind)
            task[name] = taskd.timestamp(value.astimezone(UTC)) if kind is Time else value
        except (msgspec.ValidationError, ArithmeticError):
            raise taskd.Unprocessable([taskd.Fault(name, rule)]) from None
    if new:
        now = taskd.timestamp(datetime.now(UTC))
        created = task.get("created_at") or task.get("updated_at") or now
        task = {"created_at": created, "updated_at": created} | task
    return task


def refuse_repeated_ids() -> None:
    """Raise Refused if an id is on two lines of an import."""
    first, again = fn.MIN(Incoming.line), fn.MAX(Incoming.line)
    query: Any = Incoming.select(Incoming.id, first, again).group_by(Incoming.id)
    for key, line, other in query.having(first < again).order_by(again).limit(1).tuples():
        raise Refused(f"line {other}: id {key} is on line {line} already; nothing was imported")


def refuse_taken_ids() -> None:
    """Raise Refused if a line of an import has the id of another task in the database."""
    other = (Task.user_id != Incoming.user_id) | (Task.created_at != Incoming.created_at)
    query: Any = Incoming.select(Incoming.line, Incoming.id).join(Task, on=Task.id == Incoming.id)
    for line, key in query.where(other).order_by(Incoming.line).limit(1).tuples():
        raise Refused(f"line {line}: id {key} is that of another task here; nothing was imported")


def compared() -> list[int]:
    """Return how many lines are new, like the task that is there, newer than it, and older."""
    line, task = Incoming.updated_at, Task.updated_at
    cases = Task.id.is_null(), line == task, line > task, line < task
    query: Any = Incoming.select(*(fn.COUNT(Incoming.line).filter(case) for case in cases))
    return [*query.join(Task, peewee.JOIN.LEFT_OUTER, on=Task.id == Incoming.id).tuples().get()]


def merge() -> int:
    """Write what is new, and what is newer than the task that is there; return how many rows."""
    fields = Task._meta.sorted_fields
    lines = Incoming.select(*(getattr(Incoming, field.name) for field in fields))
    update = {field: getattr(EXCLUDED, field.name) for field in fields}
    same = (EXCLUDED.user_id == Task.user_id) & (EXCLUDED.created_at == Task.created_at)
    # Without WHERE, SQLite would take ON CONFLICT for the ON of a join.
    query = Task.insert_from(lines.where(peewee.SQL("TRUE")), fields).on_conflict(
        conflict_target=[Task.id],
        update=update | {Task.version: Task.version + 1},
        where=same & (EXCLUDED.updated_at > Task.updated_at),
    )
    return int(query.as_rowcount().execute())


def insert_new() -> int:
    """Write the lines as new tasks with ids of the database, and return how many they are."""
    fields = [field for field in Task._meta.sorted_fields if field is not Task.id]
    lines = Incoming.select(*(getattr(Incoming, field.name) for field in fields))
    return int(Task.insert_from(lines.order_by(Incoming.line), fields).as_rowcount().execute())


@app.command()
def purge(user: UserId, yes: Annotated[bool, Option("--yes", help="Do not ask.")] = False) -> None:
    """Delete everything that is kept of a user, after a confirmation."""
    opened, name = database(), printable(user)
    owned = [(model, model._meta.fields["user_id"] == user) for model in USER_MODELS]
    found = [model.select().where(theirs).count(opened.peewee) for model, theirs in owned]
    if not any(found):
        raise Refused(f"{name} has no tasks")
    what = owned_rows(*found)
    if not yes:
        if not sys.stdin.isatty():
            raise Refused(f"{name} has {what}; cannot ask without a terminal; repeat it with --yes")
        print(f"Delete all {what} of {name}?", end=" [y/N] ", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise Refused("nothing was deleted")
    with opened.transaction():  # keys first: a task that is created meanwhile stays with its key
        done = [of.delete().where(theirs).execute(opened.peewee) for of, theirs in owned[::-1]]
    say(f"deleted {owned_rows(*done[::-1])} of {name}")


def owned_rows(tasks: int, keys: int) -> str:
    """Return in words how many tasks and idempotency keys there are."""
    return counted(tasks, "task") + (f" and {counted(keys, 'idempotency key')}" if keys else "")


# --- Copy -----------------------------------------------------------------------------------------

GIVE_URL = "give the DATABASE_URL of a database, env:VARIABLE or @FILE"


@app.command()
def copy(
    source: Annotated[str, Argument(help="A DATABASE_URL, env:VARIABLE or @FILE.")],
    target: Annotated[str, Argument(help="Another, of an empty database.")],
) -> None:
    """Copy a database into an empty one of either engine.

    Stop taskd first. The copy is compared with the original. Every user of the machine can read a
    password on a command line: put such a URL into an environment variable (env:VARIABLE) or into
    a file (@FILE).
    """
    old, new = settings_with(source), settings_with(target)
    if old.database_url == new.database_url:
        raise BadParameter("the two are the same")
    reading, writing = database(old), database(new, create=True)
    with reading.transaction(), writing.transaction(), progress() as bar:
        if any(model.select().count(writing.peewee) for model in USER_MODELS):
            raise Refused(f"{new.database} has tasks or keys already; nothing was copied")
        rows = sum(model.select().count(reading.peewee) for model in USER_MODELS)
        bar.add_task("copying", total=3 * rows)
        copy_rows(reading.peewee, writing.peewee, bar)
        checksums = [checksum(model, reading.peewee, bar) for model in USER_MODELS]
        if checksums != [checksum(model, writing.peewee, bar) for model in USER_MODELS]:
            why = "the copy differs from the original, perhaps because someone wrote to it"
            raise Refused(f"{why}; nothing was copied")
        counts = [model.select().count(writing.peewee) for model in USER_MODELS]
    say(f"copied {owned_rows(*counts)} from {old.database} to {new.database}")
    say(f"counts and checksums agree; that of the tasks is {checksums[0]}")


def settings_with(text: str) -> Settings:
    """Return the settings with a URL that is given as it is, in a variable, or in a file."""
    url = text
    if text.startswith("env:"):
        url = os.environ.get(text.removeprefix("env:"), "")
    elif text.startswith("@"):
        url = os.fsdecode(Path(text[1:]).read_bytes()).strip()
    if not url or taskd.SURROGATE.search(url):
        raise BadParameter(f"{text!r} is empty, not set, or not in UTF-8; {GIVE_URL}")
    return Settings.load({**os.environ, "DATABASE_URL": url})


def read_rows(model: Any, database: peewee.Database, bar: Progress) -> Iterator[list[Row]]:
    """Yield a table's rows in the order of their ids, some at a time, and advance the bar.

    Psycopg would keep all of a large result in memory.
    """
    page, last = model.select().order_by(model.id).limit(ROWS_PER_STATEMENT).dicts(), 0
    while batch := list(page.where(model.id > last).execute(database)):
        yield batch
        bar.advance(bar.task_ids[0], len(batch))
        last = batch[-1]["id"]


def copy_rows(source: peewee.Database, target: peewee.Database, bar: Progress) -> None:
    """Copy all rows, the key that signs cursors, and the last ids."""
    for model in USER_MODELS:
        for batch in read_rows(model, source, bar):
            model.insert_many(batch).execute(target)
    cursor_key = About.select(About.cursor_key).scalar(source)
    About.update(cursor_key=cursor_key).execute(target)
    continue_ids(source, target)


def checksum(model: type[peewee.Model], database: peewee.Database, bar: Progress) -> str:
    """Return the SHA-256 of all rows of a table."""
    sha = hashlib.sha256()
    for batch in read_rows(model, database, bar):
        sha.update(json.dumps(batch).encode())
    return sha.hexdigest()


# --- Live server ----------------------------------------------------------------------------------

NEW_TASK: Row = {"title": "Try every route", "description": "with taskctl smoke"}
NEW_TASK |= {"priority": "high", "due_date": "2026-12-01", "tags": ["smoke"]}
CONNECTIONS = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
NO_LOGIN = "; the server's secret, issuer or audience differs"
MAX_TIMEOUT = 86400  # seconds that a socket waits; some systems take no more than 24 days
BAD_ANSWERS = (OSError, http.client.HTTPException, ValueError, RecursionError)


def connection_to(url: str, timeout: float) -> tuple[http.client.HTTPConnection, str]:
    """Return a connection that is not yet open, and what the paths of this URL begin with."""
    try:
        parts = urlsplit(url)
        connection = CONNECTIONS[parts.scheme if parts.hostname else ""]
        port = "" if parts.port is None else parts.port
        # Without brackets, http.client takes the end of ::1 for a port.
        return connection(f"[{parts.hostname}]:{port}", timeout=timeout), parts.path.rstrip("/")
    except (KeyError, ValueError, http.client.InvalidURL):
        raise BadParameter(f"URL must look like http://127.0.0.1:8000, not {url!r}") from None


class SmokeClient:
    """A throw-away user of a live server; `results` has a row for each call, with its time."""

    def __init__(self, url: str, settings: Settings) -> None:
        """Raise BadParameter if this is not a server's URL."""
        self._connection, self._prefix = connection_to(url, timeout=10)
        self.id = f"smoke-{secrets.token_hex(8)}"
        self.results: list[Row] = []
        self._tasks = f"/api/{self.id}/tasks"
        self._token = Tokens(settings).mint(login(settings, self.id, ttl=300))
        self._headers = {"Content-Type": "application/json"}
        self._tag = ""  # of the task that was last shown

    def run(self) -> None:
        """Try every route, and delete what is left. Raises one of BAD_ANSWERS."""
        self._connection.connect()
        try:
            self._try_every_route()
        finally:
            self._clean_up()

    def _try_every_route(self) -> None:
        """Call each route as it is meant to be called, and some as they are not."""
        call, tasks, key = self._call, self._tasks, {"Idempotency-Key": self.id}
        for path in ("/healthz", "/readyz"):
            call("GET", path, 200, shows={"status": "ok"})
        call("GET", "/openapi.json", 200, shows={"openapi": "3.1.0"})
        call("HEAD", "/docs", 200)
        call("GET", tasks, 401, carries="WWW-Authenticate")
        self._headers["Authorization"] = f"Bearer {self._token}"
        call("GET", "/api/somebody-else/tasks", 403)
        call("POST", tasks, 422, {"title": " "})
        call("GET", tasks, 200)
        if task := call("POST", tasks, 201, NEW_TASK, key, NEW_TASK | {"completed": False}):
            call("POST", tasks, 201, NEW_TASK, key, task, "Idempotency-Replayed")
            self._try_task(task)

    def _clean_up(self) -> None:
        """Delete what is left, also by a call that went wrong, over another connection."""
        self._connection.close()
        left = self._call("GET", self._tasks, 200)
        for task in left if isinstance(left, list) else ():
            if isinstance(task, dict) and "id" in task:
                self._call("DELETE", f"{self._tasks}/{task['id']}", 200)

    def _try_task(self, task: dict[str, Any]) -> None:
        """Read, change, list and delete a task."""
        call, tasks, path = self._call, self._tasks, f"{self._tasks}/{task.get('id')}"
        changed = {"title": "Tried", "id": task.get("id")}
        call("GET", path, 200, shows=task, carries="ETag")
        known = {"If-Match": self._tag}
        call("GET", path, 304, headers={"If-None-Match": self._tag}, carries="ETag")
        call("PUT", path, 200, {"title": "Tried"}, known, changed, carries="ETag")
        call("PATCH", path, 200, {"priority": None}, shows={"priority": None}, carries="ETag")
        call("PATCH", f"{path}/complete", 412, headers=known, carries="ETag")
        call("PATCH", f"{path}/complete", 200, shows={"completed": True}, carries="ETag")
        call("POST", tasks, 201, NEW_TASK, carries="Location")
        call("GET", f"{tasks}?limit=1&tag=smoke", 200, carries="Link")
        call("GET", f"{tasks}?status=open", 422)
        call("DELETE", path, 200, shows={"title": "Tried", "completed": True})
        call("GET", path, 404)

    def _call(
        self,
        method: str,
        path: str,
        expected: int,
        body: Any = None,
        headers: dict[str, str] | None = None,
        shows: dict[str, Any] | None = None,
        carries: str = "X-Request-ID",
    ) -> Any:
        """Make a call, note whether it answered as expected, and return the answer's JSON.

        `shows` holds members that the answer must have, and `carries` names a header. Returns None
        if the answer is another one.
        """
        content = None if body is None else json.dumps(body)
        headers, started = self._headers | (headers or {}), time.perf_counter()
        self._connection.request(method, self._prefix + path, content, headers)
        answer = self._connection.getresponse()
        shown = json.loads(answer.read() or "null")
        ms = round((time.perf_counter() - started) * 1000, 1)
        self._tag = answer.headers.get("ETag", self._tag)
        right = not shows or (isinstance(shown, dict) and shows.items() <= shown.items())
        fits = right and answer.status == expected and carries in answer.headers
        route = re.sub("(?<=/)[0-9]+(?=/|$)", "{id}", path.replace(self.id, "{user_id}"))
        row: Row = {"result": "ok" if fits else "FAIL", "method": method, "route": route}
        self.results.append(row | {"status": answer.status, "expected": expected, "ms": ms})
        return shown if fits else None


@app.command()
def smoke(
    url: Annotated[str | None, Argument(help="The server; else that of the settings.")] = None,
    as_json: AsJson = False,
) -> None:
    """Call every route of a live server. The tasks that this creates are deleted."""
    settings = Settings.load()
    client = SmokeClient(url := url or taskd.url_of(settings.host, settings.port), settings)
    try:
        client.run()
    except ConnectionRefusedError:
        raise Refused(f"nothing listens at {url}; start taskd, or name its URL") from None
    except BAD_ANSWERS as ex:
        why = printable(str(ex).strip())
        raise Refused(f"{url} does not answer as taskd does: {why}") from None
    finally:
        show_all(client.results, as_json)
        forget_keys(settings, client.id)
    statuses = {row["status"] for row in client.results if row["expected"] != 401}
    conclude(client.results, "call", as_json, NO_LOGIN if statuses == {200, 401} else "")


def forget_keys(settings: Settings, user: str) -> None:
    """Delete a user's idempotency keys if the server's database is the one of these settings.

    Another one may be older, and opening it would migrate it.
    """
    with suppress(Refused, OSError, taskd.DatabaseError, taskd.SettingsError, *DATABASE_ERRORS):
        if any(taskd.schema_version(found) == taskd.VERSION for found in existing(settings)):
            theirs = IdempotencyKey.delete().where(IdempotencyKey.user_id == user)
            theirs.execute(database(settings).peewee)


@app.command()
def wait(
    url: Annotated[str, Argument(help="The server, such as http://127.0.0.1:8000.")],
    timeout: Annotated[str, Option(help="How long to wait: 30s, 2m.")] = "30s",
) -> None:
    """Wait until /readyz of a server answers 200. Exit status 1 if it does not in time."""
    deadline = time.monotonic() + seconds(timeout)
    while fault := not_ready(url, min(max(deadline - time.monotonic(), 0.1), MAX_TIMEOUT)):
        if time.monotonic() >= deadline:
            raise Refused(f"{url} is not ready after {timeout}: {printable(fault)}")
        time.sleep(0.05)


def not_ready(url: str, timeout: float) -> str:
    """Return why a server is not ready, or nothing if it is."""
    connection, prefix = connection_to(url, timeout)
    try:
        with closing(connection):
            connection.request("GET", f"{prefix}/readyz")
            answer = connection.getresponse()
            said = answer.read(1000).decode(errors="replace")
    except BAD_ANSWERS as ex:
        return getattr(ex, "strerror", None) or str(ex) or type(ex).__name__
    return "" if answer.status == 200 else f"/readyz answers {answer.status}: {said}"


# --- Ephemeral server -----------------------------------------------------------------------------

# Run by sh; read ends with its stdin: when this process ends, even if it is killed. A port file
# that another server has written since stays.
REMOVE = """
read -r _
[ -e "$1/port" ] && [ "$(cat "$1/port")" = "$(cat < "$2")" ] && rm -f -- "$2"
rm -rf -- "$1"
"""
TOKEN_TTL = 24 * 3600  # seconds


@app.command()
def serve(
    ephemeral: Annotated[bool, Option("--ephemeral", help="Required: all is temporary.")] = False,
    user: Annotated[list[str] | None, UserOption(help="A user to print a token for.")] = None,
    seed: Annotated[int, Option(min=0, help="How many tasks to add for each --user.")] = 0,
    port_file: Annotated[Path | None, Option(help="A file for the port.", dir_okay=False)] = None,
    given: Annotated[list[str] | None, Option("--set", help="A setting: TASKD_PORT=8123.")] = None,
) -> None:
    """Serve a temporary database for tests.

    When it is ready, it prints url, secret, pid and tokens as one JSON line. The environment and
    .env are not read. It ends on SIGTERM or SIGINT, or when its stdin ends if that is a pipe or a
    socket. Its database and the port file are then removed.
    """
    if not ephemeral:
        raise BadParameter("--ephemeral is required; python taskd.py serves your database")
    if seed and not user:
        raise BadParameter("--seed adds tasks for each --user: name one")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    directory = Path(tempfile.mkdtemp(prefix="taskd-"))
    remover = ["/bin/sh", "-c", REMOVE, "sh", str(directory), str(port_file or "")]
    run_until_end = partial(Popen, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True)
    with run_until_end(remover, stdin=PIPE):
        settings = ephemeral_settings(directory, given or [])
        listener = taskd.listen(settings.host, settings.port)
        application = taskd.create_app(settings)
        if seed:
            with closing(database(settings)):
                add_believable(user or [], seed, RANDOM_SEED)
        taskd.configure_log(settings)
        port = listener.getsockname()[1]
        (directory / "port").write_text(f"{port}\n")
        announce(settings, port, user or [], port_file)
        threading.Thread(target=end_with_stdin, daemon=True).start()
        taskd.serve(application, listener, settings)


def ephemeral_settings(directory: Path, given: list[str]) -> Settings:
    """Return settings with these VARIABLE=VALUE, a database in this directory and a new secret."""
    known = {field.metadata["variable"] for field in dataclasses.fields(Settings)}
    values = {"BETTER_AUTH_SECRET": secrets.token_urlsafe(32), "TASKD_PORT": "0"}
    values |= {"TASKD_LOG": "warning", "DATABASE_URL": f"sqlite:///{directory / 'taskd.db'}"}
    for name, equals, value in (text.partition("=") for text in given):
        if not equals or name not in known - {"DATABASE_URL"}:
            raise BadParameter(f"--set VARIABLE=VALUE is for settings, not DATABASE_URL: {name!r}")
        values[name] = value
    settings = Settings.load(values, directory / ".env")
    if not (settings.secrets or settings.secret):
        raise BadParameter("--set BETTER_AUTH_SECRET= leaves no secret; give one, or leave it out")
    return settings


def announce(settings: Settings, port: int, users: list[str], port_file: Path | None) -> None:
    """Print what a test needs to know about the server, and write its port to the file."""
    tokens = Tokens(settings)
    shown = {
        "url": taskd.url_of(settings.host, port),
        "secret": tokens.secrets[0],
        "pid": os.getpid(),
        "tokens": {user: tokens.mint(login(settings, user, TOKEN_TTL)) for user in users},
    }
    if port_file:  # whoever waits for it must not read it half written
        written = Path(f"{port_file}.{secrets.token_hex(8)}")
        written.write_text(f"{port}\n")
        written.replace(port_file)
    print(json.dumps(shown), flush=True)


def end_with_stdin() -> None:
    """Terminate when stdin ends, if it is a pipe or a socket: a sign that the starter has ended.

    Nothing is read from it.
    """
    mode = os.fstat(0).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        poll = select.poll()
        poll.register(0, getattr(select, "POLLRDHUP", 0))  # a hang-up is always reported
        poll.poll()
        os.kill(os.getpid(), signal.SIGTERM)


# --- Main -----------------------------------------------------------------------------------------


def end(number: int, _: object) -> None:
    """Exit, so that unfinished files are removed; another signal does not interrupt that."""
    for one in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> None:
    """Run a command; if it fails, print the reason as one line on stderr."""
    with taskd.standard_streams("taskctl"):
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, end)
        taskd.log.addHandler(logging.NullHandler())  # a command says itself what failed
        try:
            with at_end:
                app(prog_name="taskctl")  # always raises SystemExit
        except (Refused, taskd.SettingsError, taskd.DatabaseError) as ex:
            status, reason = 1 if isinstance(ex, Refused) else 2, str(ex)
        except taskd.Unavailable as ex:
            status, reason = 1, "{} cannot be used: {}".format(*ex.args)
        except (*DATABASE_ERRORS, taskd.Unstorable) as ex:
            why = taskd.first_line(ex.__cause__ or ex)  # PostgreSQL's messages have several
            status, reason = 1, f"the database cannot be used: {why}"
        except OSError as ex:
            status, reason = 1, f"{ex.filename or 'the output'}: {ex.strerror}"
        say(reason)
        sys.exit(status)


if __name__ == "__main__":
    main()

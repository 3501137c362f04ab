#!/usr/bin/env python3
"""taskctl: the operator's and developer's tool beside taskd.

It reads the settings that taskd reads, and decides about tokens and the database with taskd's own code. Data goes to
stdout, messages to stderr. Exit status: 0; 1 when something is refused, not found or off; 2 for usage and settings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import random
import re
import secrets
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
import peewee
import typer
from peewee import fn
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

import taskd
from taskd import Settings, Task, Tokens

app = typer.Typer(
    help="Mint and verify tokens, inspect and seed tasks, and try a live server.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DOTENV = Path(".env")
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}  # seconds


class Refused(Exception):
    """What was asked for is refused, not found or off; the message says why. Exit status 1."""


# --- The terminal ---------------------------------------------------------------------------------------------------


def say(message: str) -> None:
    """Print a message on stderr."""
    print(f"taskctl: {message}", file=sys.stderr)


def show(row: dict[str, Any], as_json: bool) -> None:
    """Print one row: as a JSON object, or a line for each member."""
    if as_json:
        print(json.dumps(row))
        return
    for name, value in row.items():
        print(f"{name:{max(map(len, row))}}  {printable(value)}")


def show_all(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print rows: as a JSON array, or a table."""
    if as_json:
        print(json.dumps(rows))
        return
    if not rows:
        return
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(printable(value), overflow="fold") for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 10**6).print(table)


def printable(value: object) -> str:
    """Return a value as text that a terminal shows and does not obey."""
    words: dict[object, str] = {None: "-", True: "yes", False: "no"}
    text = words[value] if value is None or isinstance(value, bool) else str(value)
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def progress() -> Progress:
    """Return a progress bar on stderr, which shows only where somebody looks at it."""
    console = Console(stderr=True)
    return Progress(console=console, disable=not console.is_terminal, transient=True)


# --- Set up ---------------------------------------------------------------------------------------------------------


@app.command()
def init() -> None:
    """Write .env with a fresh secret if there is none, and create the database. Nothing is ever overwritten."""
    settings = Settings.load()
    if settings.secret or settings.secrets:
        say("the secret is there already")
    else:
        write_secret()
        say(f"wrote a new secret to {DOTENV}; give the same BETTER_AUTH_SECRET to Better Auth")
        settings = Settings.load()
    existed = Path(settings.database).exists()
    taskd.prepare_database(settings.database)
    say(f"{settings.database} is there already" if existed else f"created {settings.database}")


def write_secret() -> None:
    """Append a secret of 256 random bits to .env, which its owner alone may read."""
    line = f"BETTER_AUTH_SECRET={secrets.token_urlsafe(32)}\n"
    try:
        DOTENV.touch(mode=0o600)
        DOTENV.chmod(0o600)
        with DOTENV.open("a+", encoding="utf-8") as file:
            file.seek(0)
            written = file.read()
            file.write(line if not written or written.endswith("\n") else f"\n{line}")
    except OSError as ex:
        raise taskd.SettingsError(f"{DOTENV} cannot be written: {ex.strerror}") from None


@app.command()
def settings(as_json: AsJson = False) -> None:
    """Show the effective settings; secrets are masked."""
    effective = Settings.load()
    rows = [(field.metadata, getattr(effective, field.name)) for field in dataclasses.fields(effective)]
    show({meta["variable"]: "(set)" if meta["secret"] and value else plain(value) for meta, value in rows}, as_json)


def plain(value: object) -> object:
    """Return a setting as it is written in the environment."""
    return (",".join(value) or None) if isinstance(value, tuple) else value


# --- Tokens ---------------------------------------------------------------------------------------------------------


def some_text(value: str | list[str] | None) -> str | list[str] | None:
    """Return ids of users as they are, or refuse one that is empty or no UTF-8."""
    for user in [value] if isinstance(value, str) else value or ():
        if not user or any("\ud800" <= character <= "\udfff" for character in user):
            raise typer.BadParameter("it must not be empty, and UTF-8")
    return value


UserId = Annotated[str, typer.Argument(help="The user's id: a token's sub.", callback=some_text)]


@app.command()
def mint(
    user: UserId,
    email: Annotated[str | None, typer.Option(help="The email claim.")] = None,
    name: Annotated[str | None, typer.Option(help="The name claim.")] = None,
    ttl: Annotated[str, typer.Option(help="How long it is valid: 90s, 15m, 1h, 7d; -1h has expired.")] = "1h",
    claim: Annotated[list[str] | None, typer.Option(help="Another claim, k=v; v may be JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print a token signed with the first secret, as a login would hand it out."""
    settings = Settings.load()
    claims = login(settings, user, seconds(ttl), email=email, name=name) | dict(map(parse_claim, claim or ()))
    try:
        token = Tokens(settings).mint(claims)
    except (TypeError, ValueError, RecursionError) as ex:
        raise typer.BadParameter(str(ex)) from None
    print(json.dumps({"token": token, "claims": claims}) if as_json else token)


def login(settings: Settings, user: str, ttl: int, **more: str | None) -> dict[str, Any]:
    """Return the claims of a login that these settings accept for `ttl` seconds."""
    now = int(time.time())
    claims = {"sub": user, "iss": settings.issuer, "aud": settings.audience, **more, "iat": now, "exp": now + ttl}
    return {name: value for name, value in claims.items() if value is not None}


def seconds(text: str) -> int:
    """Return a duration such as 90s, 15m, 1h or 7d in seconds."""
    if not (found := re.fullmatch(r"(-?[0-9]{1,9})([smhd]?)", text)):
        raise typer.BadParameter(f"--ttl must look like 90s, 15m, 1h or 7d, not {text!r}")
    return int(found[1]) * UNITS[found[2]]


def parse_claim(text: str) -> tuple[str, Any]:
    """Return the name and value of `k=v`; a value that is no JSON is a string."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"--claim must look like role=admin, not {text!r}")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


@app.command()
def verify(
    token: Annotated[str, typer.Argument(help="The token; - reads it from stdin.")] = "-", as_json: AsJson = False
) -> None:
    """Say whether taskd would accept a token, as whom and until when, or exactly why not."""
    tokens = Tokens(Settings.load())
    text = sys.stdin.buffer.read().decode(errors="replace") if token == "-" else token
    text = re.sub("^bearer +", "", text.strip(), flags=re.IGNORECASE)
    try:
        user = tokens.verify(text)
    except taskd.TokenError as ex:
        if as_json:
            print(json.dumps({"accepted": False, "reason": str(ex)}))
        raise Refused(f"taskd refuses this token: {ex}{hint(text)}") from None
    show({"accepted": True, "user_id": user.id, "email": user.email, "name": user.name, "until": until(user)}, as_json)


def hint(token: str) -> str:
    """Return what is probably wrong with the secret, where a small change of it would make the token good."""
    settings = Settings.load()
    for secret in settings.secrets or filter(None, [settings.secret]):
        changes = {
            "followed by a line break": f"{secret}\n",
            "in double quotes": f'"{secret}"',
            "in single quotes": f"'{secret}'",
            "without the white space around it": secret.strip(),
            "without the quotes around it": secret.strip("\"'"),
        }
        for change, other in changes.items():
            with contextlib.suppress(taskd.TokenError):
                if other != secret and Tokens(dataclasses.replace(settings, secret=other, secrets=())).verify(token):
                    return f"; it was signed with this secret {change}: give both services exactly the same"
    return ""


def until(user: taskd.User) -> str:
    """Return when a token expires, in RFC 3339."""
    try:
        return datetime.fromtimestamp(user.expires, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    except (OverflowError, ValueError, OSError):
        return f"{user.expires} seconds after 1970"


@app.command()
def check(as_json: AsJson = False) -> None:
    """Look at the settings, the database and the key set, and say what is there, line by line."""
    settings = Settings.load()
    Tokens(settings)
    findings = [*check_secrets(settings), *check_files(settings), *check_key_set(settings)]
    show_all([{"result": result, "about": about, "found": found} for result, about, found in findings], as_json)
    if off := sum(result == "OFF" for result, _, _ in findings):
        raise Refused(f"{off} of {len(findings)} things are off")


def check_secrets(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """Yield what is to be said of the secrets, but never one of them."""
    for number, secret in enumerate(settings.secrets or filter(None, [settings.secret]), 1):
        odd = secret != secret.strip() or secret[0] in "\"'" or len(set(secret)) < 10
        found = "white space or quotes around it, or few different characters: is it meant so?" if odd else "strong"
        yield "warning" if odd else "ok", f"secret {number}", f"{len(secret.encode())} bytes, {found}"


def check_files(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """Yield whether the files are there, fit, and are their owner's alone to read."""
    try:
        if Path(settings.database).exists():
            taskd.prepare_database(settings.database)
            yield "ok", settings.database_url, "fits schema.sql"
        else:
            yield "warning", settings.database_url, "not there yet; taskd makes it at its first start"
    except taskd.DatabaseError as ex:
        yield "OFF", settings.database_url, str(ex)
    for path in (DOTENV, Path(settings.database)):
        if path.exists() and (mode := path.stat().st_mode & 0o777) & 0o077:
            yield "warning", str(path), f"others can read it: mode {mode:o}, better 600"


def check_key_set(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """Yield what the key set answers."""
    if not settings.jwks_url:
        yield "ok", "TASKD_JWKS_URL", "not set: only tokens signed with the secret are accepted"
        return
    try:
        keys = taskd.download_keys(settings.jwks_url)
        found = ", ".join(f"{key.algorithm_name} {key.key_id}" for key in keys)
        yield (
            ("ok", settings.jwks_url, f"keys: {found}") if keys else ("OFF", settings.jwks_url, "no key that can sign")
        )
    except Exception as ex:  # whatever the other side does
        yield "OFF", settings.jwks_url, f"{type(ex).__name__}: {ex}"
    for variable, value in (("TASKD_ISSUER", settings.issuer), ("TASKD_AUDIENCE", settings.audience)):
        yield (
            ("ok", variable, value) if value else ("warning", variable, "not set: other services' tokens are accepted")
        )


# --- Tasks ----------------------------------------------------------------------------------------------------------


def database(create: bool = False) -> Settings:
    """Return the settings, with `Task` ready to be asked about the database that they name."""
    settings = Settings.load()
    if not create and not Path(settings.database).exists():
        raise Refused(f"there is no database {settings.database}; make it with: python taskctl.py init")
    taskd.prepare_database(settings.database)
    Task.bind(taskd.connect(settings.database, taskd.BUSY))
    return settings


def rows(query: Any, *names: str) -> list[dict[str, Any]]:
    """Return what a query finds, with its columns in this order."""
    return [{name: row[name] for name in names} for row in query.dicts()]


@app.command()
def users(as_json: AsJson = False) -> None:
    """List the users who have tasks."""
    database()
    counts = {"tasks": fn.COUNT(Task.id), "done": fn.SUM(Task.completed), "last_change": fn.MAX(Task.updated_at)}
    query = Task.select(Task.user_id, *(count.alias(name) for name, count in counts.items()))
    show_all(rows(query.group_by(Task.user_id).order_by(Task.user_id), "user_id", *counts), as_json)


def fits(context: typer.CallbackParam, value: str | int | None) -> str | int | None:
    """Return the value of an option that the service knows as a parameter, or refuse what the service would."""
    pattern, rule = taskd.PARAMETERS[context.name or ""]
    if value is not None and not re.fullmatch(pattern, str(value)):
        raise typer.BadParameter(rule)
    return value


@app.command()
def tasks(
    user: UserId,
    only_open: Annotated[bool, typer.Option("--open", help="Only those that are not completed.")] = False,
    only_done: Annotated[bool, typer.Option("--done", help="Only those that are completed.")] = False,
    q: Annotated[str, typer.Option("--search", "-q", help="Only those with this text in them.", callback=fits)] = "",
    sort: Annotated[
        str, typer.Option(help="id, created_at, updated_at or title; with - before it descending.", callback=fits)
    ] = "id",
    limit: Annotated[int | None, typer.Option(help="At most so many.", callback=fits)] = None,
    as_json: AsJson = False,
) -> None:
    """List a user's tasks, oldest first."""
    if only_open and only_done:
        raise typer.BadParameter("--open and --done exclude each other")
    settings = database()
    store = taskd.TaskStore(taskd.open_database(settings))
    rest: taskd.Listing | None = taskd.Listing(only_done if only_open or only_done else None, q, sort, limit)
    found: list[taskd.TaskView] = []
    while rest and len(found) != limit:
        page, rest = store.page(user, rest)
        found += page
    store.close()
    show_all([msgspec.structs.asdict(task) for task in found], as_json)


@app.command()
def stats(as_json: AsJson = False) -> None:
    """Count users and tasks."""
    settings = database()
    counts = {
        "users": fn.COUNT(Task.user_id.distinct()),
        "tasks": fn.COUNT(Task.id),
        "done": fn.COALESCE(fn.SUM(Task.completed), 0),
        "oldest": fn.MIN(Task.created_at),
        "last_change": fn.MAX(Task.updated_at),
    }
    [row] = rows(Task.select(*(count.alias(name) for name, count in counts.items())), *counts)
    show({**row, "bytes": Path(settings.database).stat().st_size}, as_json)


VERBS = {
    "Buy": ["milk", "bread and butter", "a birthday present for Nora", "coffee beans", "light bulbs", "stamps"],
    "Call": ["the dentist", "grandmother", "the landlord about the heating", "the bank", "Jonas back"],
    "Write": ["the minutes of Monday's meeting", "the release notes", "a letter of thanks", "the travel report"],
    "Repair": ["the bicycle's rear light", "the dripping tap", "the kitchen shelf", "the build on main"],
    "Book": ["the train to Vienna", "a table for six", "the vaccination", "the meeting room for Thursday"],
    "Read": ["the lease", "chapter four", "the review of the new API", "the manual before asking"],
}
NOTES = [
    "before the weekend",
    "ask Mira first",
    "2 litres",
    "see the e-mail of Tuesday",
    "not urgent",
    "twice, if need be",
]
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)  # the same random seed gives the same times too
BATCH = 1000  # tasks in a statement


@app.command()
def seed(
    user: Annotated[list[str] | None, typer.Argument(help="Users to give tasks to.", callback=some_text)] = None,
    count: Annotated[int, typer.Option(min=1, help="Tasks for each user.")] = 20,
    users: Annotated[int, typer.Option(min=0, help="Made-up users besides: user-1, user-2 …")] = 0,
    random_seed: Annotated[int, typer.Option(help="The same number makes the same tasks.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Add believable tasks. The database is created if need be; tasks that are there stay."""
    names = [*(user or ()), *(f"user-{number}" for number in range(1, users + 1))]
    if not names:
        raise typer.BadParameter("name a user, or say how many to make up: --users 3")
    database(create=True)
    made = believable(names, count, random.Random(random_seed))  # noqa: S311  nothing secret is drawn from it
    with progress() as bar:
        job = bar.add_task("seeding", total=len(names) * count)
        for rows in peewee.chunked(made, BATCH):
            Task.insert_many(rows).execute()  # one statement, so all of them or none
            bar.advance(job, len(rows))
    show({"users": len(names), "tasks": len(names) * count}, as_json)


def believable(names: list[str], count: int, chance: random.Random) -> Iterator[dict[str, Any]]:
    """Yield rows of tasks, the same for the same source of chance."""
    for name in names:
        for second in sorted(chance.randrange(300 * 86400) for _ in range(count)):
            verb = chance.choice(list(VERBS))
            created = EPOCH + timedelta(seconds=second)
            done = chance.random() < 0.4
            updated = created + timedelta(seconds=chance.randrange(14 * 86400)) if done else created
            title = f"{verb} {chance.choice(VERBS[verb])}"
            note = chance.choice(NOTES) if chance.random() < 0.5 else None
            yield {
                "user_id": name,
                "title": title,
                "description": note,
                **taskd.folded(title, note),
                "completed": done,
                "created_at": taskd.timestamp(created),
                "updated_at": taskd.timestamp(updated),
            }


# --- Smoke test -----------------------------------------------------------------------------------------------------


class Visitor:
    """A throw-away user of a live server, who keeps what each call answered and how long it took."""

    def __init__(self, url: str, settings: Settings) -> None:
        try:
            parts = urlsplit(url)
            kind = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}[parts.scheme]
            self._connection = kind(parts.hostname or "", parts.port, timeout=10)
        except (KeyError, ValueError):
            raise typer.BadParameter(f"URL must look like http://127.0.0.1:8000, not {url!r}") from None
        self.id = f"smoke-{secrets.token_hex(8)}"
        self.headers: dict[str, str] = {}
        self._prefix = parts.path.rstrip("/")
        self._tasks = f"/api/{self.id}/tasks"
        self._token = Tokens(settings).mint(login(settings, self.id, ttl=300))
        self.results: list[dict[str, Any]] = []

    def call(
        self, method: str, path: str, expected: int, *, body: object = None, shows: dict[str, Any] | None = None
    ) -> Any:
        """Make a call, note whether it answered as expected, and return the answer's JSON.

        `shows` holds members that the answer must have.
        """
        content = None if body is None else json.dumps(body)
        started = time.perf_counter()
        self._connection.request(method, self._prefix + path, content, self.headers)
        answer = self._connection.getresponse()
        shown = json.loads(answer.read() or "null")
        milliseconds = round((time.perf_counter() - started) * 1000, 1)
        members = shown if isinstance(shown, dict) else {}
        fits = answer.status == expected and all(members.get(name) == value for name, value in (shows or {}).items())
        route = re.sub("[0-9]+(?=/|$)", "{id}", path.replace(self.id, "{user_id}"))
        row = {"result": "ok" if fits else "OFF", "method": method, "route": route, "status": answer.status}
        self.results.append({**row, "expected": expected, "ms": milliseconds})
        return shown if fits else None

    def try_every_route(self) -> None:
        """Call each route as it is meant to be called, and some as they are not."""
        self.headers = {"Content-Type": "application/json"}
        self.call("GET", "/healthz", 200, shows={"status": "ok"})
        self.call("GET", self._tasks, 401)
        self.headers["Authorization"] = f"Bearer {self._token}"
        self.call("GET", "/api/somebody-else/tasks", 403)
        self.call("POST", self._tasks, 422, body={"title": " "})
        self.call("GET", self._tasks, 200)
        new = {"title": "Try every route", "description": "with taskctl smoke"}
        if task := self.call("POST", self._tasks, 201, body=new, shows={**new, "completed": False}):
            path = f"{self._tasks}/{task.get('id')}"
            self.call("GET", path, 200, shows=task)
            self.call("PUT", path, 200, body={"title": "Tried"}, shows={"title": "Tried", "id": task["id"]})
            self.call("PATCH", f"{path}/complete", 200, shows={"completed": True})
            self.call("DELETE", path, 200, shows={"title": "Tried", "completed": True})
            self.call("GET", path, 404)

    def clean_up(self) -> None:
        """Delete what a call that went wrong may have left."""
        left = self.call("GET", self._tasks, 200)
        for task in left if isinstance(left, list) else ():
            if isinstance(task, dict) and "id" in task:
                self.call("DELETE", f"{self._tasks}/{task['id']}", 200)


@app.command()
def smoke(
    url: Annotated[
        str | None, typer.Argument(help="The server; by default the one that the settings describe.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Call every route of a live server as a throw-away user, and leave nothing behind."""
    settings = Settings.load()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = url or f"http://{host}:{settings.port}"
    visitor = Visitor(url, settings)
    try:
        try:
            visitor.try_every_route()
        finally:
            visitor.clean_up()
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as ex:
        raise Refused(f"{url} does not answer as taskd does: {printable(str(ex).strip())}") from None
    finally:
        show_all(visitor.results, as_json)
    if off := sum(row["result"] != "ok" for row in visitor.results):
        raise Refused(f"{off} of {len(visitor.results)} calls are off")


def main() -> None:
    """Run a command; what it cannot do is one line on stderr."""
    try:
        app()
    except Refused as ex:
        say(str(ex))
        sys.exit(1)
    except taskd.Unavailable as ex:
        say("{} cannot be used: {}".format(*ex.args))
        sys.exit(1)
    except peewee.DatabaseError as ex:
        say(f"the database cannot be used: {ex}")
        sys.exit(1)
    except (taskd.SettingsError, taskd.DatabaseError) as ex:
        say(str(ex))
        sys.exit(2)


if __name__ == "__main__":
    main()

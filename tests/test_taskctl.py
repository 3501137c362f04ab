"""taskctl as a process: what it prints on which stream, its exit status, the files it leaves."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import pty
import re
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import IO, Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest

import support
import taskctl as program
import taskd
from support import (
    DEADLINE,
    NEW_TASK,
    OTHER_SECRET,
    ROOT,
    SECRET,
    TASK_KEYS,
    ForkServer,
    Process,
    bearer,
    locked,
    sign,
    stored,
    token,
)
from tokens import DAY

pytestmark = pytest.mark.sqlite("most of it is about files, tokens and the terminal")

Answer = subprocess.CompletedProcess[str]
Taskctl = Callable[..., Answer]
Start = Callable[..., Process]

COMMAND = [sys.executable, str(ROOT / "taskctl.py")]
OPTIONS = {
    "init": [],
    "backup": [],
    "check": ["--json"],
    "copy": [],
    "export": [],
    "import": ["--new"],
    "mint": ["--claim", "--email", "--json", "--name", "--ttl"],
    "purge": ["--yes"],
    "restore": ["--skip-ids"],
    "seed": ["--count", "--json", "--random-seed", "--users"],
    "serve": ["--ephemeral", "--port-file", "--seed", "--set", "--user"],
    "settings": ["--json"],
    "smoke": ["--json"],
    "stats": ["--json"],
    "tasks": [
        *("--csv", "--done", "--due-before", "--json", "--limit", "--nl", "--open"),
        *("--priority", "--search", "--sort", "--tag", "--wide"),
    ],
    "users": ["--csv", "--json", "--limit", "--nl", "--sort", "--wide"],
    "verify": ["--json"],
    "wait": ["--timeout"],
}
NOT_GIVEN = ["-"] * (len(NEW_TASK) - 2)  # after description and completed
MILK = [
    "1",
    "alice",
    "Buy milk",
    "2 litres",
    "no",
    *NOT_GIVEN,
    "2026-01-02T03:04:05.006Z",
    "2026-01-02T03:04:05.006Z",
]
DENTIST = [
    "3",
    "alice",
    "Call the dentist",
    "-",
    "yes",
    *NOT_GIVEN,
    "2026-01-03T03:04:05.006Z",
    "2026-01-05T03:04:05.006Z",
]
LETTER = [
    "2",
    "bob",
    "Write a letter",
    "-",
    "no",
    *NOT_GIVEN,
    "2026-01-01T03:04:05.006Z",
    "2026-01-04T03:04:05.006Z",
]
SHOWN = {"-": None, "yes": True, "no": False}


def environment(**variables: str) -> dict[str, str]:
    """Return a process environment without variables that change a terminal's output."""
    looks = {"COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS", "NO_COLOR", "PY_COLORS", "TERMINAL_WIDTH"}
    kept = {
        name: value for name, value in support.environment(**variables).items() if name not in looks
    }
    return {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"} | kept | variables


def fork_server() -> ForkServer:
    return ForkServer.of("taskctl", environment(BETTER_AUTH_SECRET=SECRET))


def run(
    directory: Path,
    *arguments: str,
    stdin: str | bytes = "",
    secret: str = SECRET,
    **variables: str,
) -> Answer:
    """Run taskctl in a directory, and check that it prints no traceback and no secret."""
    if secret:
        variables = {"BETTER_AUTH_SECRET": secret} | variables
    done = fork_server().run(
        *arguments,
        directory=directory,
        variables=environment(**variables),
        stdin=stdin if isinstance(stdin, bytes) else stdin.encode(),
    )
    assert "Traceback" not in done.stderr, done.stderr
    for text in (SECRET, OTHER_SECRET):
        assert text not in done.stdout + done.stderr, "that was a secret"
    return done


def launched(
    directory: Path,
    *arguments: str,
    command: list[str] | None = None,
    before: str = "",
    **options: Any,
) -> Any:
    """Start taskctl without waiting for it: forked, unless a command must start it.

    A forked one can run a statement before it runs taskctl.

    It is not measured for coverage, because its output is counted and cut off.
    """
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    variables = {
        name: value
        for name, value in environment(BETTER_AUTH_SECRET=SECRET).items()
        if not name.startswith("COVERAGE_PROCESS_")
    } | options.pop("variables", {})
    if command:
        return subprocess.Popen(
            [*command, *COMMAND, *arguments], cwd=directory, env=variables,
            **streams | {"text": True} | options,
        )  # fmt: skip
    server = ForkServer.of("taskctl", variables)
    options |= {"directory": directory, "variables": variables, "before": before}
    return server.launch(*arguments, **options)


def data(answer: Answer) -> Any:
    """Return the JSON of a command that succeeded; it is on stdout, and stderr is empty."""
    assert (answer.returncode, answer.stderr) == (0, ""), answer
    return json.loads(answer.stdout)


def cells(answer: Answer, said: str = "") -> list[list[str]]:
    """Return the table that a successful command printed on stdout, and the text on stderr."""
    assert (answer.returncode, answer.stderr) == (0, f"taskctl: {said}\n" if said else ""), answer
    return [re.split(" {2,}", line.strip()) for line in answer.stdout.splitlines()]


def one_line(answer: Answer, status: int) -> str:
    """Return the message of a failed command: one line on stderr, and nothing on stdout."""
    assert answer.stdout == "", answer
    return refusal(answer, status)


def refusal(answer: Answer, status: int = 1) -> str:
    """Return the message of a failed command: one line on stderr; stdout is not checked."""
    assert answer.returncode == status, answer
    assert re.fullmatch(r"taskctl: [^\n]+\n", answer.stderr), answer.stderr
    return answer.stderr.removeprefix("taskctl: ").rstrip("\n")


def parts(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a token's header and claims."""
    header, claims = parts_as_sent(text)
    return json.loads(header), json.loads(claims)


def keep(path: Path, rows: list[list[Any]]) -> None:
    """Make a database with these tasks, without taskd's own code."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript((ROOT / "schema.sql").read_text())
        connection.execute(
            f"INSERT INTO about VALUES ({taskd.VERSION}, 'cursors are signed with it')"
        )
        columns = ", ".join(TASK_KEYS)
        more = [json.dumps(value) if value == [] else value for value in NEW_TASK.values()][2:]
        rows = [[*row[:5], *more, *row[-2:]] for row in rows]
        marks = ", ".join("?" * len(TASK_KEYS))
        connection.executemany(f"INSERT INTO task ({columns}) VALUES ({marks})", rows)
        connection.commit()


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A database with two tasks of alice's and one of bob's."""
    keep(
        tmp_path / "taskd.db",
        [[SHOWN.get(cell, cell) for cell in row] for row in (MILK, LETTER, DENTIST)],
    )
    return tmp_path / "taskd.db"


@pytest.mark.parametrize("command", ["users", "mint", "verify x"])
def test_a_forked_run_is_like_one_from_the_start(
    taskctl: Taskctl, kept: Path, command: str
) -> None:
    variables = environment(BETTER_AUTH_SECRET=SECRET)
    cold = subprocess.run(
        [*COMMAND, *command.split()], cwd=kept.parent, env=variables, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=DEADLINE, check=False,
    )  # fmt: skip
    forked = taskctl(*command.split())
    assert (cold.returncode, cold.stdout, cold.stderr) == (
        forked.returncode,
        forked.stdout,
        forked.stderr,
    )


# --- Help and usage -------------------------------------------------------------------------------


def test_help_lists_every_command_with_what_it_does(taskctl: Taskctl) -> None:
    answer = taskctl("--help", COLUMNS="80")
    assert (answer.returncode, answer.stderr) == (0, "")
    commands = answer.stdout.partition("Commands")[2]
    assert "..." not in commands, "each first sentence fits in 80 columns"
    assert sorted(re.findall("^  ([a-z-]+) +[A-Z]", commands, re.MULTILINE)) == sorted(OPTIONS)


@pytest.mark.parametrize("command", OPTIONS)
def test_each_command_explains_itself_and_its_options(taskctl: Taskctl, command: str) -> None:
    answer = taskctl(command, "--help")
    assert (answer.returncode, answer.stderr) == (0, "")
    shown = {*re.findall("^  (?:-[a-z], )?(--[a-z-]+)", answer.stdout, re.MULTILINE)}
    assert "bool" not in answer.stdout
    assert sorted(shown - {"--help"}) == OPTIONS[command]
    assert re.search(r"[A-Z][a-z]+ .+\.", answer.stdout)


USAGE_ERRORS = {
    "no such command": ["backpu"],
    "an unknown option": ["users", "--jsno"],
    "mint: no user": ["mint"],
    "mint: an empty user": ["mint", ""],
    "mint: a user that is no UTF-8": ["mint", "\udcff"],
    "mint: a time without a number": ["mint", "alice", "--ttl", "h"],
    "mint: an unknown unit": ["mint", "alice", "--ttl", "1w"],
    "mint: an empty time": ["mint", "alice", "--ttl", ""],
    "mint: a time with a fraction": ["mint", "alice", "--ttl", "1.5h"],
    "mint: a claim without a value": ["mint", "alice", "--claim", "role"],
    "mint: a claim without a name": ["mint", "alice", "--claim", "=admin"],
    "mint: another user": ["mint", "alice", "--claim", "sub=bob"],
    "mint: two ends": ["mint", "alice", "--ttl", "1h", "--claim", "exp=2000000000"],
    "mint: two e-mails": ["mint", "alice", "--email", "a@b.example", "--claim", "email=null"],
    "mint: two names": ["mint", "alice", "--name", "", "--claim", "name=Bob"],
    "mint: an issuer that is no string": ["mint", "alice", "--claim", "iss=5"],
    "tasks: no user": ["tasks"],
    "tasks: an empty order": ["tasks", "alice", "--sort", ""],
    "tasks: an empty priority": ["tasks", "alice", "--priority", ""],
    "tasks: a search that is no UTF-8": ["tasks", "alice", "-q", "\udcff"],
    "tasks: a tag that is no UTF-8": ["tasks", "alice", "--tag", "home", "--tag", "\udcff"],
    "copy: an empty URL": ["copy", "", "sqlite:///other.db"],
    "copy: an empty target": ["copy", "sqlite:///taskd.db", ""],
    "copy: an unset variable": ["copy", "env:NOWHERE", "sqlite:///other.db"],
    "copy: an empty file": ["copy", "@/dev/null", "sqlite:///other.db"],
    "copy: a file that is no UTF-8": ["copy", f"@{sys.executable}", "sqlite:///other.db"],
    "tasks: both open and done": ["tasks", "alice", "--open", "--done"],
    "seed: nobody": ["seed"],
    "seed: an empty user": ["seed", ""],
    "seed: no tasks": ["seed", "alice", "--count", "0"],
    "seed: fewer than no users": ["seed", "--users", "-1"],
    "seed: a count that is no number": ["seed", "alice", "--count", "many"],
    "smoke: another scheme": ["smoke", "ftp://127.0.0.1"],
    "smoke: no scheme": ["smoke", "127.0.0.1:8000"],
    "smoke: a port that cannot be": ["smoke", "http://127.0.0.1:99999"],
    "smoke: a port that is no number": ["smoke", "http://127.0.0.1:http"],
    "smoke: half an address": ["smoke", "http://[::1"],
    "smoke: a space in the host": ["smoke", "http://a b"],
    "wait: a space in the host": ["wait", "http://a b"],
}


@pytest.mark.parametrize("arguments", USAGE_ERRORS.values(), ids=USAGE_ERRORS)
def test_wrong_usage_is_explained_on_stderr_with_status_2(
    taskctl: Taskctl, kept: Path, arguments: list[str]
) -> None:
    before = stored(kept)
    answer = taskctl(*arguments)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("Usage: ")
    assert "Error" in answer.stderr
    assert stored(kept) == before


def test_a_shell_can_complete_commands_and_options(taskctl: Taskctl, tmp_path: Path) -> None:
    shown = subprocess.run(
        ["bash", "-c", '"$@"; true', "bash", *COMMAND, "--show-completion"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=DEADLINE,
        check=True,
    )  # fmt: skip
    assert shown.stderr == ""
    found = re.search(r"(\S+_COMPLETE)=complete_bash", shown.stdout)
    assert found, shown.stdout
    complete = partial(taskctl, **{found[1]: "complete_bash"})
    assert sorted(complete(COMP_WORDS="taskctl.py se", COMP_CWORD="1").stdout.split()) == [
        "seed",
        "serve",
        "settings",
    ]
    assert complete(COMP_WORDS="taskctl.py mint --t", COMP_CWORD="2").stdout.split() == ["--ttl"]


# --- init -----------------------------------------------------------------------------------------

SECRET_LINE = r"BETTER_AUTH_SECRET=([A-Za-z0-9_-]{43,})\n"


def test_init_writes_a_fresh_secret_for_its_owner_alone_and_makes_the_database(
    taskctl: Taskctl, tmp_path: Path
) -> None:
    answer = taskctl("init", secret="")
    assert (answer.returncode, answer.stdout) == (0, "")
    dotenv, database = tmp_path / ".env", tmp_path / "taskd.db"
    secret = re.fullmatch(SECRET_LINE, dotenv.read_text())
    assert secret
    assert secret[1] not in answer.stderr
    assert [stat.S_IMODE(path.stat().st_mode) for path in (dotenv, database)] == [0o600, 0o600]
    assert stored(database) == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".env", "taskd.db"]
    assert re.search(r"^taskctl: .*\.env", answer.stderr, re.MULTILINE)
    assert re.search(r"^taskctl: .*taskd\.db", answer.stderr, re.MULTILINE)


def test_what_init_made_is_all_that_taskd_needs(
    taskctl: Taskctl, start: Start, tmp_path: Path
) -> None:
    taskctl("init", secret="")
    server = start(before="del os.environ['BETTER_AUTH_SECRET']")
    minted = taskctl("mint", "alice", secret="").stdout.strip()
    answer = server.request(
        "GET", "/api/alice/tasks", headers={"Authorization": f"Bearer {minted}"}
    )
    assert (answer.status_code, answer.json) == (200, [])


def test_init_run_again_changes_nothing(taskctl: Taskctl, tmp_path: Path) -> None:
    taskctl("init", secret="")
    taskctl("seed", "alice", "--count", "3", secret="")
    before, tasks = (tmp_path / ".env").read_bytes(), stored(tmp_path / "taskd.db")
    assert len(tasks) == 3
    assert taskctl("init", secret="").returncode == 0
    assert (tmp_path / ".env").read_bytes() == before
    assert stored(tmp_path / "taskd.db") == tasks


def test_no_two_secrets_are_alike(tmp_path: Path) -> None:
    homes = [tmp_path / name for name in ("one", "two")]
    for home in homes:
        home.mkdir()
        run(home, "init", secret="")
    assert len({(home / ".env").read_text() for home in homes}) == 2


@pytest.mark.parametrize(
    "before",
    [
        b"TASKD_PORT=8001\n",
        b"TASKD_PORT=8001",
        b"# caf\xc3\xa9\r\nTASKD_PORT=8001\r\n",
        b"BETTER_AUTH_SECRET=\n",
        b"",
    ],
    ids=["a line", "no final newline", "CRLF and UTF-8", "an empty secret", "an empty file"],
)
def test_init_adds_to_a_dotenv_file_without_losing_a_byte(
    taskctl: Taskctl, tmp_path: Path, before: bytes
) -> None:
    (tmp_path / ".env").write_bytes(before)
    answer = taskctl("init", secret="")
    assert (answer.returncode, answer.stdout) == (0, "")
    after = (tmp_path / ".env").read_bytes()
    assert after.startswith(before)
    assert re.fullmatch(rb"\n?" + SECRET_LINE.encode(), after.removeprefix(before))
    assert data(taskctl("settings", "--json", secret=""))["BETTER_AUTH_SECRET"] == "(set)"


def test_a_dotenv_file_that_gets_the_secret_is_for_its_owner_alone(
    taskctl: Taskctl, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("TASKD_PORT=8001\n")
    (tmp_path / ".env").chmod(0o644)
    taskctl("init", secret="")
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("dotenv", "variables"),
    [
        (f"BETTER_AUTH_SECRET={SECRET}\n", {}),
        (f"BETTER_AUTH_SECRETS=2:{OTHER_SECRET},1:{SECRET}\n", {}),
        ("TASKD_PORT=8001\n", {"BETTER_AUTH_SECRET": SECRET}),
        ("TASKD_PORT=8001\n", {"BETTER_AUTH_SECRETS": f"1:{SECRET}"}),
    ],
    ids=["in .env", "several in .env", "in the environment", "several in the environment"],
)
def test_init_leaves_a_secret_that_is_there(
    taskctl: Taskctl, tmp_path: Path, dotenv: str, variables: dict[str, str]
) -> None:
    (tmp_path / ".env").write_text(dotenv)
    answer = taskctl("init", secret="", **variables)
    assert (answer.returncode, answer.stdout) == (0, "")
    assert (tmp_path / ".env").read_text() == dotenv
    assert stored(tmp_path / "taskd.db") == {}


def test_init_with_an_empty_secret_in_the_environment_does_not_replace_the_one_in_dotenv(
    taskctl: Taskctl, tmp_path: Path
) -> None:
    taskctl("init", secret="")
    before = (tmp_path / ".env").read_text()
    taskctl("init", secret="", BETTER_AUTH_SECRET="")
    assert (tmp_path / ".env").read_text() == before


def test_init_makes_the_database_that_the_settings_name(taskctl: Taskctl, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert taskctl("init", DATABASE_URL="sqlite:///data/other.db").returncode == 0
    assert stored(tmp_path / "data" / "other.db") == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_init_says_so_when_dotenv_cannot_be_written(taskctl: Taskctl, tmp_path: Path) -> None:
    (tmp_path / ".env").mkdir()
    assert ".env" in one_line(taskctl("init", secret=""), 2)


# --- mint -----------------------------------------------------------------------------------------


def test_a_minted_token_stands_alone_on_stdout_and_names_its_user(taskctl: Taskctl) -> None:
    before = int(time.time())
    answer = taskctl("mint", "alice")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+\n", answer.stdout)
    header, claims = parts(answer.stdout.strip())
    assert header == {"alg": "HS256", "typ": "JWT"}
    assert before <= claims["iat"] <= time.time()
    assert claims == {"sub": "alice", "iat": claims["iat"], "exp": claims["iat"] + 3600}


def test_every_option_of_mint_becomes_a_claim_of_its_json_type(taskctl: Taskctl) -> None:
    given = {
        "role": ("admin", "admin"), "level": ("3", 3), "ratio": ("0.5", 0.5),
        "verified": ("true", True), "gone": ("null", None), "groups": ('["a", 1]', ["a", 1]),
        "org": ('{"id": 7}', {"id": 7}), "quoted": ('"3"', "3"), "sum": ("1+1=2", "1+1=2"),
        "empty": ("", ""), "word": ("caf\u00e9", "caf\u00e9"),
    }  # fmt: skip
    options = [
        option for name, (text, _) in given.items() for option in ("--claim", f"{name}={text}")
    ]
    shown = data(
        taskctl("mint", "alice", "--email", "a@b.example", "--name", "Al Ice", "--json", *options)
    )
    claims = shown["claims"]
    assert claims == {
        "sub": "alice", "email": "a@b.example", "name": "Al Ice", "iat": claims["iat"],
        "exp": claims["iat"] + 3600, **{name: value for name, (_, value) in given.items()},
    }  # fmt: skip
    assert shown == {"token": shown["token"], "claims": claims}
    assert parts(shown["token"])[1] == claims


@pytest.mark.parametrize(
    ("ttl", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("15m", 900),
        ("1h", 3600),
        ("7d", 604_800),
        ("0", 0),
        ("-1h", -3600),
    ],
)
def test_the_time_to_live_has_units_and_may_have_passed(
    taskctl: Taskctl, ttl: str, seconds: int
) -> None:
    claims = data(taskctl("mint", "alice", "--ttl", ttl, "--json"))["claims"]
    assert claims["exp"] - claims["iat"] == seconds


def test_a_claim_sets_the_times_of_a_token_that_no_option_sets(taskctl: Taskctl) -> None:
    odd = ["--claim", "exp=2000000000", "--claim", "iat=never", "--claim", "email=7"]
    claims = data(taskctl("mint", "alice", "--json", *odd))["claims"]
    assert claims == {"sub": "alice", "iat": "never", "exp": 2_000_000_000, "email": 7}
    answer = taskctl("mint", "alice", "--ttl", "1h", "--claim", "exp=2000000000")
    assert "--claim exp=… and --ttl exclude each other" in answer.stderr


def test_a_minted_token_is_accepted_by_a_real_server_and_only_for_its_user(
    taskctl: Taskctl, server: Process
) -> None:
    sent = {"Authorization": f"Bearer {taskctl('mint', 'alice').stdout.strip()}"}
    assert server.request("GET", "/api/alice/tasks", headers=sent).status_code == 200
    assert server.request("GET", "/api/bob/tasks", headers=sent).status_code == 403
    expired = taskctl("mint", "alice", "--ttl", "-1m").stdout.strip()
    answer = server.request(
        "GET", "/api/alice/tasks", headers={"Authorization": f"Bearer {expired}"}
    )
    assert answer.status_code == 401


def test_the_first_of_several_secrets_signs(taskctl: Taskctl) -> None:
    several = f"2:{OTHER_SECRET},1:{SECRET}"
    minted = taskctl("mint", "alice", BETTER_AUTH_SECRETS=several).stdout.strip()
    assert minted == sign(*parts_as_sent(minted), secret=OTHER_SECRET)
    alone = taskctl("mint", "alice").stdout.strip()
    assert alone == sign(*parts_as_sent(alone), secret=SECRET)


def parts_as_sent(text: str) -> tuple[bytes, bytes]:
    """Return a token's header and claims, byte for byte."""
    header, claims, _ = (
        base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in text.split(".")
    )
    return header, claims


def test_mint_puts_in_the_issuer_and_audience_that_taskd_asks_for(taskctl: Taskctl) -> None:
    names = {"TASKD_ISSUER": "https://auth.example", "TASKD_AUDIENCE": "taskd"}
    shown = data(taskctl("mint", "alice", "--json", **names))
    assert {name: shown["claims"][name] for name in ("iss", "aud")} == {
        "iss": "https://auth.example",
        "aud": "taskd",
    }
    assert data(taskctl("verify", shown["token"], "--json", **names))["accepted"] is True


# --- verify ---------------------------------------------------------------------------------------

NOW = int(time.time())
LATER = NOW + DAY
GOOD_TOKENS = {  # some of those in test_tokens.py
    "as Better Auth makes it": token(),
    "a user who is a number": token("1"),
    "a user with a space and an umlaut": token("J\u00f6 1"),
    "claims that nobody knows": token(role="admin", sid=None, nested={"a": [1]}),
}
BAD_TOKENS = {
    "expired": (token(exp=NOW - 60), "expired"),
    "another secret": (token(secret=OTHER_SECRET), "secret"),
    "Better Auth's own key": (
        sign({"alg": "EdDSA", "kid": "k"}, {"sub": "alice", "exp": LATER}),
        "TASKD_JWKS_URL",
    ),
    "an e-mail-verification link": (
        sign({"alg": "HS256"}, {"email": "a@b", "userId": "7", "exp": LATER}),
        "sub",
    ),
    "a payload that is not JSON": (sign({"alg": "HS256"}, b"alice"), "malformed"),
    "a session token": ("Zk3l8fQ0p2.dGhpcyBpcyBubyBqd3Q", "session token"),
}
USERS = {"a user who is a number": "1", "a user with a space and an umlaut": "J%C3%B6%201"}


def served(server: Process, text: str, user: str = "alice") -> tuple[int, str]:
    """Return the status and the reason of a real server for a token."""
    answer = server.request(
        "GET", f"/api/{user}/tasks", headers={"Authorization": f"Bearer {text}"}
    )
    return answer.status_code, "" if answer.status_code == 200 else answer.json["detail"]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A real taskd for many tokens."""
    process = Process(tmp_path_factory.mktemp("judge"))
    yield process
    assert process.terminate() == 0


@pytest.mark.parametrize("name", GOOD_TOKENS)
def test_verify_accepts_what_a_real_server_accepts(
    taskctl: Taskctl, judge: Process, name: str
) -> None:
    assert served(judge, GOOD_TOKENS[name], USERS.get(name, "alice")) == (200, "")
    assert data(taskctl("verify", "--json", GOOD_TOKENS[name]))["accepted"] is True


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_verify_refuses_what_a_real_server_refuses_and_for_the_same_reason(
    taskctl: Taskctl, judge: Process, name: str
) -> None:
    text, why = BAD_TOKENS[name]
    status, reason = served(judge, text)
    assert status == 401
    assert why in reason
    answer = taskctl("verify", "--json", text)
    shown = json.loads(answer.stdout)
    shown.pop("unverified", None)
    assert (answer.returncode, shown) == (1, {"accepted": False, "reason": reason})
    assert re.fullmatch(rf"taskctl: [^\n]*{re.escape(reason)}[^\n]*\n", answer.stderr)
    assert reason in refusal(taskctl("verify", text))


def test_verify_says_as_whom_and_until_when(taskctl: Taskctl) -> None:
    text = token(iat=1_795_208_400, exp=4_102_444_800, email="a@b.example", name=None)
    _, claims = parts(text)
    assert cells(taskctl("verify", text)) == [
        ["accepted", "yes"],
        ["user_id", "alice"],
        ["email", "a@b.example"],
        ["name", "-"],
        ["until", "2100-01-01T00:00:00Z"],
        ["header", '{"alg": "HS256", "typ": "JWT"}'],
        ["claims", json.dumps(claims)],
        ["iat", "2026-11-20T21:00:00Z"],
        ["exp", "2100-01-01T00:00:00Z"],
    ]
    assert data(taskctl("verify", "--json", text)) == {
        "accepted": True, "user_id": "alice", "email": "a@b.example", "name": None,
        "until": "2100-01-01T00:00:00Z", "header": {"alg": "HS256", "typ": "JWT"}, "claims": claims,
    }  # fmt: skip


def test_verify_shows_what_a_refused_token_says_as_unverified(taskctl: Taskctl) -> None:
    text = token(exp=1_795_208_400, iat=None, email=None, name=None, secret=OTHER_SECRET)
    header, claims = {"alg": "HS256", "typ": "JWT"}, {"sub": "alice", "exp": 1_795_208_400}
    answer = taskctl("verify", text)
    assert "the signature does not match" in refusal(answer)
    assert [re.split(" {2,}", line) for line in answer.stdout.splitlines()] == [
        ["header (unverified)", json.dumps(header)],
        ["claims (unverified)", json.dumps(claims)],
        ["exp (unverified)", "2026-11-20T21:00:00Z"],
    ]
    shown = json.loads(taskctl("verify", "--json", text).stdout)
    assert shown["accepted"] is False
    assert shown["unverified"] == {"header": header, "claims": claims}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        *((text, "") for text in ("x", "a.b", "A.A.A", "!.!.!", "a" * 50)),
        ("W10.W10.x", "header (unverified)  []\nclaims (unverified)  []\n"),
    ],
)
def test_verify_shows_only_what_can_be_read(taskctl: Taskctl, text: str, shown: str) -> None:
    answer = taskctl("verify", text)
    assert refusal(answer)
    assert answer.stdout == shown


@pytest.mark.parametrize(
    ("argument", "stdin"),
    [
        ("{}", ""),
        ("-", "{}\n"),
        ("", "{}"),
        ("Bearer {}", ""),
        ("bearer {}", ""),
        ("-", "Bearer {}\n"),
        ("-", " {}\n\n"),
    ],
    ids=[
        "argument",
        "dash",
        "stdin",
        "scheme",
        "scheme in small letters",
        "scheme on stdin",
        "white space around",
    ],
)
def test_a_token_can_be_given_in_every_way_in_which_people_have_it(
    taskctl: Taskctl, argument: str, stdin: str
) -> None:
    text = token()
    given = [argument.format(text)] if argument else []
    assert data(taskctl("verify", "--json", *given, stdin=stdin.format(text)))["user_id"] == "alice"


@pytest.mark.parametrize("prefix", ["", "Bearer "])
@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (SECRET, f"{SECRET}\n", "line break"),
        (SECRET, f'"{SECRET}"', "double quotes"),
        (SECRET, f"'{SECRET}'", "single quotes"),
        (f"{SECRET} ", SECRET, "white space"),
        (f'"{SECRET}"', SECRET, "quotes"),
    ],
    ids=["line break", "double quotes", "single quotes", "our white space", "our quotes"],
)
def test_verify_says_which_small_change_of_the_secret_would_fit(
    taskctl: Taskctl, ours: str, theirs: str, words: str, prefix: str
) -> None:
    said = refusal(taskctl("verify", prefix + token(secret=theirs), secret=ours))
    assert "the signature does not match" in said
    assert words in said


def test_verify_guesses_nothing_about_a_secret_that_is_quite_another(taskctl: Taskctl) -> None:
    said = refusal(taskctl("verify", token(secret=OTHER_SECRET)))
    assert said == (
        "taskd refuses this token: the signature does not match: "
        "the token was changed, or signed with another secret"
    )


def test_a_refusal_is_one_line_with_the_reason(taskctl: Taskctl) -> None:
    assert "expired" in refusal(taskctl("verify", token(exp=NOW - 60)))
    assert "not a JWT" in one_line(taskctl("verify", "", stdin=""), 1)


def test_an_expiry_beyond_the_calendar_is_accepted(taskctl: Taskctl) -> None:
    shown = data(taskctl("verify", "--json", token(exp=10**15)))
    assert (shown["accepted"], "1000000000000000" in shown["until"]) == (True, True)


def test_verify_takes_any_of_several_secrets(taskctl: Taskctl) -> None:
    several = {"BETTER_AUTH_SECRETS": f"2:{OTHER_SECRET},1:{SECRET}", "secret": ""}
    answers = [
        taskctl("verify", token(secret=secret), **several) for secret in (SECRET, OTHER_SECRET)
    ]
    assert [answer.returncode for answer in answers] == [0, 0]


@pytest.mark.parametrize(
    ("claims", "status", "why"),
    [
        ({"iss": "https://auth.example", "aud": ["other", "taskd"]}, 0, ""),
        ({"iss": "https://evil.example", "aud": "taskd"}, 1, "TASKD_ISSUER"),
        ({"iss": "https://auth.example", "aud": "other"}, 1, "TASKD_AUDIENCE"),
        ({"aud": "taskd"}, 1, "iss"),
        ({"iss": "https://auth.example"}, 1, "aud"),
    ],
    ids=["both right", "another issuer", "another audience", "no issuer", "no audience"],
)
def test_verify_checks_issuer_and_audience_where_they_are_set(
    taskctl: Taskctl, claims: dict[str, Any], status: int, why: str
) -> None:
    answer = taskctl(
        "verify", token(**claims), TASKD_ISSUER="https://auth.example", TASKD_AUDIENCE="taskd"
    )
    assert answer.returncode == status
    assert why in answer.stderr


def test_a_key_set_that_cannot_be_fetched_is_named_as_the_reason(taskctl: Taskctl) -> None:
    with dead_port() as port:
        answer = taskctl(
            "verify",
            BAD_TOKENS["Better Auth's own key"][0],
            TASKD_JWKS_URL=f"http://127.0.0.1:{port}/jwks",
        )
    said = one_line(answer, 1)
    assert "key set" in said
    assert "database" not in said


def test_bytes_that_are_not_text_are_not_a_token(taskctl: Taskctl) -> None:
    one_line(taskctl("verify", "-", stdin=b"\xff\xfe"), 1)


# --- check ----------------------------------------------------------------------------------------

PUBLIC_KEY = {
    "kty": "OKP", "crv": "Ed25519", "kid": "first", "alg": "EdDSA", "use": "sig",
    "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo",  # RFC 8037, appendix A.2
}  # fmt: skip


def test_check_finds_nothing_off_after_init(taskctl: Taskctl) -> None:
    taskctl("init", secret="")
    findings = data(taskctl("check", "--json", secret=""))
    assert {finding["result"] for finding in findings} == {"ok"}
    assert [finding["about"] for finding in findings] == [
        "secret 1", "sqlite:///taskd.db", ".env", "taskd.db", "TASKD_JWKS_URL",
    ]  # fmt: skip
    table = cells(taskctl("check", secret=""), said=f"all {len(findings)} checks passed")
    assert table == [["result", "about", "found"], *([*finding.values()] for finding in findings)]


def test_check_names_the_keys_that_it_reached(taskctl: Taskctl, kept: Path) -> None:
    kept.chmod(0o600)
    names = {"TASKD_ISSUER": "https://auth.example", "TASKD_AUDIENCE": "taskd"}
    with answering(http_answer(json.dumps({"keys": [PUBLIC_KEY]}).encode())) as url:
        findings = data(taskctl("check", "--json", TASKD_JWKS_URL=f"{url}/jwks", **names))
    assert {finding["result"] for finding in findings} == {"ok"}
    found = {finding["about"]: finding["found"] for finding in findings}
    assert "EdDSA first" in found[f"{url}/jwks"]
    assert {name: found[name] for name in names} == names


def test_check_warns_of_what_works_but_should_not_stay(
    taskctl: Taskctl, kept: Path, tmp_path: Path
) -> None:
    kept.chmod(0o640)
    (tmp_path / ".env").write_text("TASKD_PORT=8001\n")
    (tmp_path / ".env").chmod(0o640)
    with answering(http_answer(json.dumps({"keys": [PUBLIC_KEY]}).encode())) as url:
        variables = {
            "BETTER_AUTH_SECRETS": f"3:{'a' * 40},2:'{SECRET}',1:{SECRET}",
            "TASKD_JWKS_URL": url,
        }
        findings = data(taskctl("check", "--json", **variables))
    assert [finding["about"] for finding in findings if finding["result"] == "warning"] == [
        "secret 1", "secret 2", ".env", "taskd.db", "TASKD_ISSUER", "TASKD_AUDIENCE",
    ]  # fmt: skip
    assert [finding["about"] for finding in findings if finding["result"] == "ok"] == [
        "secret 3", "sqlite:///taskd.db", url,
    ]  # fmt: skip


NO_KEY_SET = {
    "nobody there": None,
    "hangs up": b"",
    "no such path": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    "a web page": b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>",
    "an empty set": b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"keys":[]}',
}


@pytest.mark.parametrize("content", NO_KEY_SET.values(), ids=NO_KEY_SET)
def test_check_says_that_a_key_set_is_off(
    taskctl: Taskctl, kept: Path, content: bytes | None
) -> None:
    kept.chmod(0o600)
    with contextlib.ExitStack() as stack:
        url = (
            f"http://127.0.0.1:{stack.enter_context(dead_port())}"
            if content is None
            else stack.enter_context(answering(content))
        )
        answer = taskctl("check", "--json", TASKD_JWKS_URL=f"{url}/jwks")
    assert answer.returncode == 1
    assert re.fullmatch(r"taskctl: 1 of \d+ [^\n]+\n", answer.stderr)
    assert [f["about"] for f in json.loads(answer.stdout) if f["result"] == "FAIL"] == [
        f"{url}/jwks"
    ]


def test_check_says_that_a_database_is_off_and_leaves_it(taskctl: Taskctl, tmp_path: Path) -> None:
    (tmp_path / "taskd.db").write_text("Dear diary, today I bought milk. " * 100)
    answer = taskctl("check")
    assert (answer.returncode, answer.stderr.count("\n")) == (1, 1)
    assert "file is not a database" in answer.stdout


def test_check_says_that_the_directory_of_the_database_is_missing(taskctl: Taskctl) -> None:
    answer = taskctl("check", "--json", DATABASE_URL="sqlite:///missing/taskd.db")
    found = {row["about"]: (row["result"], row["found"]) for row in json.loads(answer.stdout)}
    why = "[Errno 2] No such file or directory: 'missing'"
    assert found["sqlite:///missing/taskd.db"] == ("FAIL", why)
    assert (answer.returncode, "1 of " in answer.stderr) == (1, True)


def test_check_does_not_wait_for_a_writer_of_a_named_pipe(taskctl: Taskctl, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "taskd.db")
    answer = taskctl("check", "--json")
    assert answer.returncode == 1
    assert "it is not a regular file" in answer.stdout


def test_check_makes_nothing(taskctl: Taskctl, tmp_path: Path) -> None:
    assert taskctl("check").returncode == 0
    assert list(tmp_path.iterdir()) == []


# --- users, tasks, stats --------------------------------------------------------------------------


def test_users_counts_the_tasks_of_each(taskctl: Taskctl, kept: Path) -> None:
    assert cells(taskctl("users")) == [
        ["user_id", "tasks", "done", "last_change"],
        ["alice", "2", "1", "2026-01-05T03:04:05.006Z"],
        ["bob", "1", "0", "2026-01-04T03:04:05.006Z"],
    ]
    assert data(taskctl("users", "--json")) == [
        {"user_id": "alice", "tasks": 2, "done": 1, "last_change": "2026-01-05T03:04:05.006Z"},
        {"user_id": "bob", "tasks": 1, "done": 0, "last_change": "2026-01-04T03:04:05.006Z"},
    ]


def test_tasks_shows_one_users_tasks_oldest_first(taskctl: Taskctl, kept: Path) -> None:
    assert cells(taskctl("tasks", "alice")) == [TASK_KEYS, MILK, DENTIST]
    assert cells(taskctl("tasks", "bob")) == [TASK_KEYS, LETTER]
    shown = taskctl("tasks", "alice", "--json")
    assert data(shown) == [
        {
            "id": 1, "user_id": "alice", "title": "Buy milk", **NEW_TASK, "description": "2 litres",
            "created_at": "2026-01-02T03:04:05.006Z", "updated_at": "2026-01-02T03:04:05.006Z",
        },
        {
            "id": 3, "user_id": "alice", "title": "Call the dentist", **NEW_TASK, "completed": True,
            "created_at": "2026-01-03T03:04:05.006Z", "updated_at": "2026-01-05T03:04:05.006Z",
        },
    ]  # fmt: skip
    assert list(data(shown)[0]) == TASK_KEYS


def test_tasks_of_a_priority_a_tag_or_a_time_are_those_of_the_service(
    taskctl: Taskctl, kept: Path
) -> None:
    with contextlib.closing(sqlite3.connect(kept)) as database, database:
        more = "priority = 'high', due_date = '2026-12-01', tags = '[\"home\",\"a b\"]'"
        database.execute(f"UPDATE task SET {more} WHERE id = 3")
    for options, ids in [
        (["--priority", "high"], ["3"]),
        (["--priority", "low"], []),
        (["--tag", "home", "--tag", "a b"], ["3"]),
        (["--tag", "home", "--tag", "a"], []),
        (["--due-before", "2026-12-02"], ["3"]),
        (["--due-before", "2026-12-01"], []),
        (["--sort=-due_date", "--limit", "1"], ["3"]),
    ]:
        answer = taskctl("tasks", "alice", *options, "--json")
        assert [str(task["id"]) for task in json.loads(answer.stdout)] == ids, options
    shown = cells(taskctl("tasks", "alice", "--tag", "home"))[1]
    assert {"high", "2026-12-01", "home, a b"} <= set(shown)
    for option in (["--priority", "urgent"], ["--tag", " "], ["--due-before", "2026-02-30"]):
        assert taskctl("tasks", "alice", *option).returncode == 2


@pytest.mark.parametrize(("option", "ids"), [("--open", [1]), ("--done", [3])])
def test_tasks_can_be_narrowed(taskctl: Taskctl, kept: Path, option: str, ids: list[int]) -> None:
    assert [task["id"] for task in data(taskctl("tasks", "alice", option, "--json"))] == ids
    assert [row[0] for row in cells(taskctl("tasks", "alice", option))] == ["id", *map(str, ids)]


@pytest.mark.parametrize("user", ["ALICE", "alice ", "ali%", "ali*", "_lice", "'alice'"])
def test_a_users_name_is_taken_letter_by_letter(taskctl: Taskctl, kept: Path, user: str) -> None:
    assert data(taskctl("tasks", user, "--json")) == []


def test_stats_counts_everything(taskctl: Taskctl, kept: Path) -> None:
    expected = {
        "users": 2, "tasks": 3, "done": 1, "oldest": "2026-01-01T03:04:05.006Z",
        "last_change": "2026-01-05T03:04:05.006Z", "bytes": kept.stat().st_size,
    }  # fmt: skip
    assert data(taskctl("stats", "--json")) == expected
    assert cells(taskctl("stats")) == [[name, str(value)] for name, value in expected.items()]


def test_an_empty_database_is_shown_without_an_error(taskctl: Taskctl, tmp_path: Path) -> None:
    keep(tmp_path / "taskd.db", [])
    assert data(taskctl("users", "--json")) == []
    assert taskctl("users").stdout.strip() == ""
    stats = data(taskctl("stats", "--json"))
    assert {name: stats[name] for name in ("users", "tasks", "done", "oldest", "last_change")} == {
        "users": 0, "tasks": 0, "done": 0, "oldest": None, "last_change": None,
    }  # fmt: skip


HOSTILE = {
    "[bold]brackets[/bold] [/] [link=x]": "[bold]brackets[/bold] [/] [link=x]",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07": r"\x1b[31mred\x1b[0m \x1b]0;title\x07",
    "\x9b2J and \x7f": r"\x9b2J and \x7f",
    "two\nlines\r\tand a tab": r"two\nlines\r\tand a tab",
    "\u2028line\u2029paragraph": r"\u2028line\u2029paragraph",
    "\u202egnihtemos\u202c": r"\u202egnihtemos\u202c",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd": (
        "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd"
    ),
    "\u8cb7\u3044\u7269 \U0001f6d2": "\u8cb7\u3044\u7269 \U0001f6d2",
    "a:smile: http://x.example {braces} %s": "a:smile: http://x.example {braces} %s",
    "x" * 200: "x" * 200,
}


@pytest.fixture
def hostile(tmp_path: Path) -> list[list[str]]:
    """Tasks with each of these texts as user, title and description, and one of mallory's."""
    rows = [[n, text, text, text, 0, *MILK[-2:]] for n, text in enumerate(HOSTILE, 1)]
    mallory = [[n + len(rows), "mallory", *row[2:]] for n, row in enumerate(rows, 1)]
    keep(tmp_path / "taskd.db", rows + mallory)
    return [
        [str(n + len(rows)), "mallory", shown, shown, *MILK[4:]]
        for n, shown in enumerate(HOSTILE.values(), 1)
    ]


def test_what_users_wrote_is_shown_whole_and_does_nothing_to_the_terminal(
    taskctl: Taskctl, hostile: list[list[str]]
) -> None:
    assert cells(taskctl("tasks", "mallory", COLUMNS="20")) == [TASK_KEYS, *hostile]
    users = cells(taskctl("users", COLUMNS="20"))[1:]
    assert sorted(row[0] for row in users) == sorted([*HOSTILE.values(), "mallory"])
    shown = data(taskctl("tasks", "mallory", "--json"))
    assert [[task["title"], task["description"]] for task in shown] == [
        [text, text] for text in HOSTILE
    ]


@pytest.mark.parametrize("text", [*HOSTILE][:2], ids=["markup", "escapes"])
def test_a_users_name_is_shown_whole_and_does_nothing_to_the_terminal(
    taskctl: Taskctl, hostile: list[list[str]], text: str
) -> None:
    row = cells(taskctl("tasks", text, COLUMNS="20"))[1]
    assert row[1:4] == [HOSTILE[text]] * 3
    assert data(taskctl("tasks", text, "--json"))[0]["user_id"] == text


def test_the_longest_description_is_shown_whole_on_one_line(
    taskctl: Taskctl, tmp_path: Path
) -> None:
    description = "word " * 1999 + "end."
    keep(tmp_path / "taskd.db", [[1, "alice", "Buy milk", description, 0, *MILK[-2:]]])
    assert cells(taskctl("tasks", "alice"))[1] == ["1", "alice", "Buy milk", description, *MILK[4:]]


def test_what_users_wrote_does_nothing_to_a_real_terminal_either(tmp_path: Path) -> None:
    keep(
        tmp_path / "taskd.db",
        [[n, text, text, None, 0, *MILK[-2:]] for n, text in enumerate(HOSTILE, 1)],
    )
    _, seen = on_a_terminal(tmp_path, "users", stream="stdout")
    assert [
        text for text in ("\x1b[31m", "\x1b]0;", "\x9b", "\u202e", "\u2028") if text in seen
    ] == []
    assert r"\x1b[31mred" in seen


def test_what_a_token_says_does_nothing_to_the_terminal(taskctl: Taskctl) -> None:
    text = token("\x1b[31mmallory", name="two\nlines", email="[/bold]")
    assert cells(taskctl("verify", text))[1:4] == [
        ["user_id", r"\x1b[31mmallory"],
        ["email", "[/bold]"],
        ["name", r"two\nlines"],
    ]


LONG_LIST = [[number, "alice", "Buy milk", None, 0, *MILK[-2:]] for number in range(1, 1001)]
OUTPUT = [("taskd", "--help")] + [
    ("taskctl", command)
    for command in ("tasks alice", "settings --json", "stats", "export", "users", "mint alice")
]


# These are started, because Python complains of its output when it ends; the others are forked.
STARTED = (
    "taskd --help",
    *(f"taskctl {it}" for it in ("mint alice", "tasks alice", "export", "stats")),
)


def run_into(
    stdout: IO[bytes] | int, directory: Path, program: str, command: str
) -> tuple[int, str]:
    """Run a program whose output goes there; return its exit status and stderr."""
    keep(directory / "taskd.db", LONG_LIST)
    arguments = command.split()
    if f"{program} {command}" in STARTED:
        ended = subprocess.run(
            [sys.executable, str(ROOT / f"{program}.py"), *arguments], cwd=directory,
            env=environment(BETTER_AUTH_SECRET=SECRET), stdout=stdout, stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL, text=True, timeout=DEADLINE, check=False,
        )  # fmt: skip
        return ended.returncode, ended.stderr
    end = stdout if isinstance(stdout, int) else stdout.fileno()
    forked = launched(directory, *arguments, stdout=end)
    messages = forked.communicate(timeout=DEADLINE)[1]
    return forked.returncode, messages


@pytest.mark.slow
@pytest.mark.parametrize(("program", "command"), OUTPUT)
def test_output_that_cannot_be_written_is_one_line_and_the_status_1(
    tmp_path: Path, program: str, command: str
) -> None:
    with Path("/dev/full").open("wb") as full:
        status, said = run_into(full, tmp_path, program, command)
    assert (status, said) == (1, f"{program}: the output: No space left on device\n")


@pytest.mark.slow
@pytest.mark.parametrize(("program", "command"), OUTPUT)
def test_a_reader_who_stops_reading_causes_no_complaint(
    tmp_path: Path, program: str, command: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert run_into(writer, tmp_path, program, command) == (1, "")
    finally:
        os.close(writer)


def test_a_reader_of_the_messages_who_stops_reading_changes_nothing(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [*COMMAND, "init"], cwd=tmp_path, env=environment(), stderr=full,
            timeout=DEADLINE, check=False,
        )  # fmt: skip
    assert (ended.returncode, {path.name for path in tmp_path.iterdir()}) == (
        0, {".env", "taskd.db"},
    )  # fmt: skip


def test_the_first_line_of_a_long_list_can_be_read_alone(tmp_path: Path) -> None:
    keep(tmp_path / "taskd.db", LONG_LIST)
    answer = subprocess.run(
        ["bash", "-c", '"$@" | head -1', "bash", *COMMAND, "tasks", "alice"],
        cwd=tmp_path, env=environment(BETTER_AUTH_SECRET=SECRET), capture_output=True, text=True,
        timeout=DEADLINE, check=True,
    )  # fmt: skip
    assert (answer.stdout.split(), answer.stderr) == (TASK_KEYS, "")


# --- seed -----------------------------------------------------------------------------------------


def test_seed_gives_each_user_so_many_believable_tasks(taskctl: Taskctl, tmp_path: Path) -> None:
    assert data(taskctl("seed", "alice", "--users", "2", "--count", "400", "--json")) == {
        "users": 3,
        "tasks": 1200,
    }
    made = list(stored(tmp_path / "taskd.db").values())
    counts = {
        user: sum(task["user_id"] == user for task in made)
        for user in {task["user_id"] for task in made}
    }
    assert counts == {"alice": 400, "user-1": 400, "user-2": 400}
    assert all(task["title"].strip() and len(task["title"]) <= 200 for task in made)
    assert len({task["title"] for task in made}) > 10
    assert {task["description"] is None for task in made} == {True, False}
    assert {task["completed"] for task in made} == {0, 1}
    times = [(task["created_at"], task["updated_at"]) for task in made]
    assert all(
        re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text)
        for pair in times
        for text in pair
    )
    assert all(
        datetime.fromisoformat(created) <= datetime.fromisoformat(updated)
        for created, updated in times
    )


def test_seeded_tasks_are_listed_oldest_first(taskctl: Taskctl) -> None:
    taskctl("seed", "alice", "--count", "30")
    created = [task["created_at"] for task in data(taskctl("tasks", "alice", "--json"))]
    assert created == sorted(created)


def test_seed_says_on_stdout_what_it_made(taskctl: Taskctl) -> None:
    assert cells(taskctl("seed", "alice", "bob", "--count", "3")) == [
        ["users", "2"],
        ["tasks", "6"],
    ]
    assert data(taskctl("seed", "carol", "--json")) == {"users": 1, "tasks": 20}


def test_the_same_random_seed_makes_the_same_tasks_and_another_others(tmp_path: Path) -> None:
    def made(home: Path, *options: str) -> dict[int, dict[str, Any]]:
        home.mkdir()
        run(home, "seed", "alice", "--users", "1", *options)
        return stored(home / "taskd.db")

    tasks = made(tmp_path / "one", "--random-seed", "7")
    assert len(tasks) == 40
    assert made(tmp_path / "same", "--random-seed", "7") == tasks
    others = made(tmp_path / "other", "--random-seed", "8")
    assert [task["title"] for task in others.values()] != [task["title"] for task in tasks.values()]
    assert made(tmp_path / "plain") == made(tmp_path / "plain again")


def test_seed_adds_and_never_deletes(taskctl: Taskctl, kept: Path) -> None:
    before = stored(kept)
    taskctl("seed", "alice", "--count", "5")
    taskctl("seed", "alice", "--count", "5")
    after = stored(kept)
    assert {key: after[key] for key in before} == before
    assert sorted(after) == list(range(1, 14))


def test_seed_works_while_a_server_runs(taskctl: Taskctl, server: Process) -> None:
    assert (
        server.request("POST", "/api/alice/tasks", {"title": "Buy milk"}, bearer()).status_code
        == 201
    )
    assert taskctl("seed", "alice", "--count", "5").returncode == 0
    listed = server.request("GET", "/api/alice/tasks", headers=bearer()).json
    assert [task["id"] for task in listed] == [1, 2, 3, 4, 5, 6]
    assert (
        server.request("POST", "/api/alice/tasks", {"title": "Buy milk"}, bearer()).json["id"] == 7
    )
    assert [task["id"] for task in data(taskctl("tasks", "alice", "--json"))] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
    ]


def on_a_terminal(
    directory: Path, *arguments: str, stream: str, status: int = 0
) -> tuple[bytes, str]:
    """Run taskctl with stdout or stderr on a terminal; return the other stream and the screen."""
    shown, terminal = pty.openpty()
    options: Any = {stream: terminal, "variables": {"COLUMNS": "300"}, "text": False}
    with launched(directory, *arguments, **options) as process:
        os.close(terminal)
        seen = b""
        # Linux raises OSError when no process has the terminal open any more.
        with contextlib.suppress(OSError):
            while chunk := os.read(shown, 65536):
                seen += chunk
        os.close(shown)
        written = (process.stderr if stream == "stdout" else process.stdout).read()
        assert process.wait(DEADLINE) == status
    return written, seen.decode()


def test_a_user_who_is_named_twice_is_seeded_once(taskctl: Taskctl) -> None:
    arguments = ["seed", "user-1", "bob", "bob", "--users", "2", "--count", "3", "--json"]
    assert data(taskctl(*arguments)) == {"users": 3, "tasks": 9}
    assert data(taskctl("stats", "--json"))["users"] == 3


@pytest.mark.parametrize("option", ["--count", "--users"])
def test_more_tasks_or_users_than_memory_can_hold_are_wrong_usage(
    taskctl: Taskctl, option: str, tmp_path: Path
) -> None:
    answer = taskctl("seed", "alice", option, str(10**12))
    assert answer.returncode == 2
    assert option in answer.stderr
    assert not (tmp_path / "taskd.db").exists()


def test_progress_shows_on_a_terminal_and_leaves_stdout_alone(tmp_path: Path) -> None:
    data_written, seen = on_a_terminal(tmp_path, "seed", "alice", "--json", stream="stderr")
    assert json.loads(data_written) == {"users": 1, "tasks": 20}
    assert "seeding" in seen
    assert "%" in seen


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["backup", "copy.db"], "reading taskd.db"),
        (["restore", "kept.db"], "reading kept.db"),
        (["import", "tasks.jsonl"], "reading"),
        (["copy", "sqlite:///kept.db", "sqlite:///new.db"], "copying"),
    ],
    ids=lambda value: value[0],
)
def test_long_work_shows_its_progress_on_a_terminal(
    taskctl: Taskctl, tmp_path: Path, arguments: list[str], shown: str
) -> None:
    taskctl("seed", "alice", "--count", "1000")
    taskctl("backup", "kept.db")
    (tmp_path / "tasks.jsonl").write_text(taskctl("export").stdout)
    _, seen = on_a_terminal(tmp_path, *arguments, stream="stderr")
    assert re.search(rf"{shown}.*100%", seen)
    assert "\x1b[2K" in seen, "and removes it at the end"


def test_no_progress_is_shown_without_a_terminal(taskctl: Taskctl) -> None:
    assert taskctl("seed", "alice", "--count", "2500").stderr == ""


# --- settings -------------------------------------------------------------------------------------


def test_settings_shows_every_setting_with_its_default(taskctl: Taskctl) -> None:
    variables = [field.metadata["variable"] for field in dataclasses.fields(taskd.Settings)]
    shown = data(taskctl("settings", "--json", secret=""))
    assert list(shown) == variables
    assert shown == dict.fromkeys(variables) | {
        "DATABASE_URL": "sqlite:///taskd.db",
        "TASKD_HOST": "127.0.0.1",
        "TASKD_PORT": 8000,
        "TASKD_LOG": "info",
        "TASKD_THREADS": next(
            field.default for field in dataclasses.fields(taskd.Settings) if field.name == "threads"
        ),
    }  # fmt: skip
    assert [row[0] for row in cells(taskctl("settings", secret=""))] == variables


def test_settings_shows_what_holds_and_masks_the_secrets(taskctl: Taskctl, tmp_path: Path) -> None:
    dotenv = f"BETTER_AUTH_SECRET='{SECRET}'\nTASKD_PORT=8001\nTASKD_HOST=::1\nTASKD_ISSUER=\n"
    (tmp_path / ".env").write_text(dotenv)
    given = {
        "BETTER_AUTH_SECRETS": f"2:{OTHER_SECRET},1:{SECRET}",
        "TASKD_PORT": "8002",
        "TASKD_CORS_ORIGINS": "https://a.example, https://b.example",
        "TASKD_AUDIENCE": "[red]taskd",
    }
    expected = {
        "BETTER_AUTH_SECRET": "(set)", "BETTER_AUTH_SECRETS": "(set)", "TASKD_PORT": 8002,
        "TASKD_HOST": "::1", "TASKD_CORS_ORIGINS": "https://a.example,https://b.example",
        "TASKD_AUDIENCE": "[red]taskd", "TASKD_ISSUER": None,
    }  # fmt: skip
    as_json, table = (
        data(taskctl("settings", "--json", secret="", **given)),
        taskctl("settings", secret="", **given),
    )
    assert {name: as_json[name] for name in expected} == expected
    as_text = {None: "-"} | {value: str(value) for value in expected.values() if value}
    assert {row[0]: row[1] for row in cells(table) if row[0] in expected} == {
        name: as_text[value] for name, value in expected.items()
    }


# --- smoke ----------------------------------------------------------------------------------------

ROUTES = {
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/openapi.json"),
    ("GET", "/api/{user_id}/tasks"),
    ("POST", "/api/{user_id}/tasks"),
    ("GET", "/api/{user_id}/tasks/{id}"),
    ("PUT", "/api/{user_id}/tasks/{id}"),
    ("PATCH", "/api/{user_id}/tasks/{id}"),
    ("DELETE", "/api/{user_id}/tasks/{id}"),
    ("PATCH", "/api/{user_id}/tasks/{id}/complete"),
}


@contextlib.contextmanager
def dead_port() -> Iterator[int]:
    """Yield a port on which no program listens, or can listen at this time."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """Yield the address of a server that answers every request with the same bytes."""

    def serve() -> None:
        with contextlib.suppress(OSError):  # which ends it
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(ConnectionError):
                    connection.recv(65536)
                    connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        pool.submit(serve)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def test_smoke_tries_every_route_of_a_live_server_and_leaves_nothing_behind(
    taskctl: Taskctl, server: Process, tmp_path: Path
) -> None:
    server.request("POST", "/api/alice/tasks", {"title": "Buy milk"}, bearer())
    before = stored(tmp_path / "taskd.db")
    url = f"http://127.0.0.1:{server.port}"
    calls = data(taskctl("smoke", url, "--json"))
    assert {call["result"] for call in calls} == {"ok"}
    assert {(call["method"], call["route"]) for call in calls} >= ROUTES
    assert {call["status"] for call in calls} >= {200, 201, 304, 401, 403, 404, 412, 422}
    assert all(call["status"] == call["expected"] for call in calls)
    assert all(0 < call["ms"] < 10_000 for call in calls)
    table = cells(taskctl("smoke", f"{url}/"), said=f"all {len(calls)} calls passed")
    assert table[0] == ["result", "method", "route", "status", "expected", "ms"]
    assert [row[:4] for row in table[1:]] == [
        [call["result"], call["method"], call["route"], str(call["status"])] for call in calls
    ]
    assert stored(tmp_path / "taskd.db") == before


@pytest.mark.sqlite("it is about a file of an earlier version")
@pytest.mark.parametrize("journal", ["DELETE", "WAL"])
def test_smoke_of_another_server_changes_nothing_in_the_database_of_the_settings(
    taskctl: Taskctl, server: Process, tmp_path: Path, journal: str
) -> None:
    made, old = tmp_path / "made.db", tmp_path / "old"
    old.mkdir()
    with contextlib.closing(sqlite3.connect(made)) as database:
        database.executescript((ROOT / "tests" / "version-2.sql").read_text())
        database.execute(f"PRAGMA journal_mode = {journal}")
        database.execute("DELETE FROM task WHERE id = (SELECT MIN(id) FROM task)")
        database.commit()
        for suffix in ("", "-wal") if journal == "WAL" else ("",):  # as a killed server leaves it
            shutil.copy(f"{made}{suffix}", old / f"taskd.db{suffix}")
    before = {file.name: file.read_bytes() for file in old.iterdir()}
    url = f"http://127.0.0.1:{server.port}"
    assert taskctl("smoke", url, DATABASE_URL=f"sqlite:///{old}/taskd.db").returncode == 0
    left = {file.name: file.read_bytes() for file in old.iterdir()}
    left.pop("taskd.db-shm", None)
    assert left == before


OTHER_DATABASES = {
    "missing": "sqlite:///missing.db",
    "another file": "sqlite:///other.txt",
    "a name that is too long": f"sqlite:///{'x' * 300}",
    "away": "postgresql://127.0.0.1:1/tasks",
    "an unknown option": "postgresql:///tasks?no_option=1",
}


@pytest.mark.sqlite("another database than the server's is in the settings")
@pytest.mark.parametrize("url", OTHER_DATABASES.values(), ids=OTHER_DATABASES)
def test_smoke_of_another_server_passes_whatever_the_database_of_the_settings_is(
    taskctl: Taskctl, server: Process, tmp_path: Path, url: str
) -> None:
    (tmp_path / "other.txt").write_text("x" * 100)
    answer = taskctl("smoke", f"http://127.0.0.1:{server.port}", DATABASE_URL=url)
    assert (answer.returncode, answer.stderr.count("\n")) == (0, 1)


def test_smoke_tries_a_server_behind_the_path_of_its_url(taskctl: Taskctl, server: Process) -> None:
    answer = taskctl("smoke", f"http://127.0.0.1:{server.port}/todo/", "--json")
    assert {call["status"] for call in json.loads(answer.stdout)} == {404}


def test_smoke_by_itself_tries_the_server_of_the_settings(
    taskctl: Taskctl, server: Process
) -> None:
    assert taskctl("smoke", TASKD_PORT=str(server.port)).returncode == 0
    assert "smoke-" in server.log


@pytest.mark.parametrize(
    "variables",
    [
        {"TASKD_ISSUER": "https://auth.example", "TASKD_AUDIENCE": "taskd"},
        {"TASKD_HOST": "::1"},
        {"BETTER_AUTH_SECRETS": f"2:{OTHER_SECRET},1:{SECRET}"},
    ],
    ids=["issuer and audience", "IPv6", "several secrets"],
)
def test_smoke_fits_the_settings_of_the_server(
    taskctl: Taskctl, start: Start, variables: dict[str, str]
) -> None:
    server = start(**variables)
    answer = taskctl("smoke", **(variables | {"TASKD_PORT": str(server.port)}))
    assert answer.returncode == 0
    assert re.fullmatch(r"taskctl: all \d+ calls passed\n", answer.stderr)


def test_smoke_with_a_wrong_secret_says_what_is_off(
    taskctl: Taskctl, server: Process, tmp_path: Path
) -> None:
    answer = taskctl("smoke", f"http://127.0.0.1:{server.port}", "--json", secret=OTHER_SECRET)
    assert answer.returncode == 1
    assert re.fullmatch(r"taskctl: [^\n]+\n", answer.stderr)
    calls = json.loads(answer.stdout)
    off = [call for call in calls if call["result"] != "ok"]
    assert {call["status"] for call in off} == {401}
    assert f"{len(off)} of {len(calls)}" in answer.stderr
    assert stored(tmp_path / "taskd.db") == {}


Environ = dict[str, Any]


def deletes_nothing(environ: Environ) -> None:
    if environ["REQUEST_METHOD"] == "DELETE":
        environ["REQUEST_METHOD"] = "GET"


def completes_nothing(environ: Environ) -> None:
    if environ["PATH_INFO"].endswith("/complete"):
        environ["REQUEST_METHOD"] = "GET"
        environ["PATH_INFO"] = environ["PATH_INFO"].removesuffix("/complete")


def changes_nothing(environ: Environ) -> None:
    if environ["REQUEST_METHOD"] == "PUT":
        environ["REQUEST_METHOD"] = "GET"


def repeats_creates(environ: Environ) -> None:
    environ.pop("HTTP_IDEMPOTENCY_KEY", None)


def sends_what_is_known(environ: Environ) -> None:
    environ.pop("HTTP_IF_NONE_MATCH", None)


def changes_what_is_not_known(environ: Environ) -> None:
    environ.pop("HTTP_IF_MATCH", None)


def knows_no_pages(environ: Environ) -> None:
    environ["QUERY_STRING"] = ""


def is_not_ready(environ: Environ) -> None:
    environ["PATH_INFO"] = environ["PATH_INFO"].replace("/readyz", "/docs/none")


def lets_everybody_in(environ: Environ) -> None:
    if environ["PATH_INFO"].startswith("/api"):
        environ["HTTP_AUTHORIZATION"] = bearer(environ["PATH_INFO"].split("/")[2])["Authorization"]


SABOTAGE: dict[
    Callable[[Environ], None], str
] = {  # a fault of a server, and the method in whose answer smoke must notice it
    deletes_nothing: "GET",
    completes_nothing: "PATCH",
    changes_nothing: "PUT",
    repeats_creates: "POST",
    sends_what_is_known: "GET",
    changes_what_is_not_known: "PATCH",
    knows_no_pages: "GET",
    is_not_ready: "GET",
    lets_everybody_in: "GET",
}


class SilentHandler(WSGIRequestHandler):
    """Handle a request without a line on stderr."""

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def broken_server(
    app: taskd.App, sabotage: Callable[[Environ], object], without: str = ""
) -> Iterator[str]:
    """Yield the address of a server that changes each request before the application sees it.

    Its answers lack the header `without`.
    """

    def broken(environ: Environ, start_response: Any) -> Any:
        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            kept = [header for header in headers if header[0].lower() != without.lower()]
            return start_response(status, kept, *error)

        sabotage(environ)
        return app(environ, start)

    with (
        make_server("127.0.0.1", 0, broken, handler_class=SilentHandler) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        pool.submit(server.serve_forever, 0.01)
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            pool.submit(app.database.close)  # the connection of that thread


@pytest.mark.parametrize("sabotage", SABOTAGE, ids=lambda sabotage: sabotage.__name__)
def test_smoke_notices_a_server_that(
    taskctl: Taskctl, make_app: Callable[..., taskd.App], sabotage: Callable[[Environ], None]
) -> None:
    with broken_server(make_app(), sabotage) as url:
        answer = taskctl("smoke", url, "--json")
    assert answer.returncode == 1
    assert re.fullmatch(r"taskctl: [^\n]+\n", answer.stderr)
    assert SABOTAGE[sabotage] in {
        call["method"] for call in json.loads(answer.stdout) if call["result"] != "ok"
    }


@pytest.mark.parametrize(
    ("header", "methods"),
    [
        ("Location", {"POST"}),
        ("Idempotency-Replayed", {"POST"}),
        ("WWW-Authenticate", {"GET"}),
        ("Link", {"GET"}),
    ],
)
def test_smoke_notices_a_server_whose_answers_lack_a_header(
    taskctl: Taskctl, make_app: Callable[..., taskd.App], header: str, methods: set[str]
) -> None:
    with broken_server(make_app(), len, without=header) as url:
        answer = taskctl("smoke", url, "--json")
    failed = {call["method"] for call in json.loads(answer.stdout) if call["result"] != "ok"}
    assert (answer.returncode, failed) == (1, methods)


def http_answer(content: bytes, status: str = "200 OK") -> bytes:
    return (
        f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode()
        + content
    )


NO_TASKD = {
    "hangs up": b"",
    "speaks another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "tries to paint the terminal": b"\x1b[31mred\x1b[0m\r\n",
    "has a web page": http_answer(b"<!doctype html><title>It works</title>"),
    "has no such path": http_answer(b"Not found", "404 Not Found"),
    "redirects": http_answer(b"", "302 Found"),
    "answers a list": http_answer(b"[]"),
    "answers a list of numbers": http_answer(b"[1, 2]"),
    "answers an empty object": http_answer(b"{}"),
    "answers a number": http_answer(b"5"),
    "answers null": http_answer(b"null"),
    "is well but has no ids": http_answer(
        b'{"status": "ok", "title": "Try every route"}', "201 Created"
    ),
    "answers no UTF-8": http_answer(b"\xff\xfe"),
    "answers without a bottom": http_answer(b"[" * 200_000),
    "breaks off": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
}


@pytest.mark.parametrize("content", NO_TASKD.values(), ids=NO_TASKD)
def test_smoke_against_another_server_than_taskd_fails_in_one_line(
    taskctl: Taskctl, content: bytes
) -> None:
    with answering(content) as url:
        answer = taskctl("smoke", url, "--json")
    assert answer.returncode == 1
    assert isinstance(json.loads(answer.stdout), list)
    assert re.fullmatch(r"taskctl: [^\n]+\n", answer.stderr)
    assert "\x1b" not in answer.stderr


def test_smoke_that_is_ended_while_it_waits_for_an_answer_leaves_nothing_behind(
    server: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{server.port}"
    client = program.SmokeClient(url, taskd.Settings(secret=SECRET))

    def ends(task: Any) -> None:
        client._connection.request("GET", "/healthz")
        raise TimeoutError("no answer")

    monkeypatch.setattr(client, "_try_task", ends)
    with pytest.raises(TimeoutError, match="no answer"):
        client.run()
    client._connection.close()
    assert client.results[-1]["method"] == "DELETE"
    assert stored(tmp_path / "taskd.db") == {}


@pytest.mark.parametrize("claim", ["x=NaN", "x=Infinity", "x=-Infinity", "x=1e400", "x=-1e400"])
def test_what_is_not_json_in_a_claim_is_text(taskctl: Taskctl, claim: str) -> None:
    minted = json.loads(taskctl("mint", "alice", "--claim", claim, "--json").stdout)
    assert minted["claims"]["x"] == claim.partition("=")[2]
    odd = b'{"sub": "alice", "exp": 1099511627776, "x": %b}' % claim.partition("=")[2].encode()
    answer = taskctl("verify", "--json", sign({"alg": "HS256"}, odd))
    shown = json.loads(answer.stdout, parse_constant=pytest.fail)["claims"]
    assert shown == {"sub": "alice", "exp": 2**40, "x": claim.partition("=")[2]}


# --- Trouble --------------------------------------------------------------------------------------

UNUSABLE = {
    "no secret": ({}, ["mint", "alice"], "BETTER_AUTH_SECRET is missing"),
    "no secret to verify with": ({}, ["verify", "x"], "BETTER_AUTH_SECRET is missing"),
    "no secret for smoke": ({}, ["smoke"], "BETTER_AUTH_SECRET is missing"),
    "a short secret": (
        {"BETTER_AUTH_SECRET": "hunter2"},
        ["mint", "alice"],
        "BETTER_AUTH_SECRET must be at least 32",
    ),
    "a short secret for init": (
        {"BETTER_AUTH_SECRET": "hunter2"},
        ["init"],
        "BETTER_AUTH_SECRET must be at least 32",
    ),
    "a short secret among several": (
        {"BETTER_AUTH_SECRETS": "1:hunter2"},
        ["settings"],
        "BETTER_AUTH_SECRETS must",
    ),
    "secrets without a number": (
        {"BETTER_AUTH_SECRETS": "hunter2" * 9},
        ["users"],
        "BETTER_AUTH_SECRETS must",
    ),
    "a port": ({"TASKD_PORT": "hunter2"}, ["settings"], "TASKD_PORT must"),
    "another database": ({"DATABASE_URL": "mysql://x/hunter"}, ["stats"], "DATABASE_URL must"),
    "a database in memory": (
        {"DATABASE_URL": "sqlite:///:memory:"},
        ["users"],
        "DATABASE_URL must",
    ),
    "no directory": (
        {"DATABASE_URL": "sqlite:///no/such/taskd.db"},
        ["seed", "alice"],
        "no/such/taskd.db cannot be",
    ),
    "no secret to check": ({}, ["check"], "BETTER_AUTH_SECRET is missing"),
    "a key set over plain http": (
        {"TASKD_JWKS_URL": "http://a.example/"},
        ["check"],
        "TASKD_JWKS_URL must",
    ),
}


@pytest.mark.parametrize(("variables", "arguments", "why"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_settings_are_one_line_with_status_2_and_nothing_is_touched(
    taskctl: Taskctl, tmp_path: Path, variables: dict[str, str], arguments: list[str], why: str
) -> None:
    said = one_line(taskctl(*arguments, secret="", **variables), 2)
    assert said.startswith(why)
    assert "hunter2" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["users", "tasks alice", "stats", "stats --json"])
def test_a_missing_database_is_not_made_by_looking_at_it(
    taskctl: Taskctl, tmp_path: Path, command: str
) -> None:
    said = one_line(taskctl(*command.split()), 1)
    assert said == "there is no database taskd.db; make it with: python taskctl.py init"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["users", "tasks alice", "stats", "seed alice", "init"])
def test_a_file_that_is_not_a_database_is_not_changed(
    taskctl: Taskctl, tmp_path: Path, command: str
) -> None:
    content = b"Dear diary, today I bought milk. " * 100
    (tmp_path / "taskd.db").write_bytes(content)
    answer = taskctl(*command.split())
    assert (answer.returncode, answer.stdout) == (2, "")
    assert (
        answer.stderr.splitlines()[-1]
        == "taskctl: taskd.db cannot be opened: file is not a database"
    )
    assert (tmp_path / "taskd.db").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["taskd.db"]


def test_a_schema_that_does_not_fit_is_named(taskctl: Taskctl, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "taskd.db")) as connection:
        connection.execute("CREATE TABLE task (id INTEGER PRIMARY KEY, title TEXT)")
    said = one_line(taskctl("users"), 2)
    assert "does not fit schema.sql" in said
    assert "user_id" in said


def test_a_damaged_database_is_one_line(taskctl: Taskctl, kept: Path) -> None:
    taskctl("seed", "alice", "--count", "500")
    size, first_page = kept.stat().st_size, kept.read_bytes()[:4096]
    kept.write_bytes(first_page + hashlib.sha256(b"damage").digest() * ((size - 4096) // 32))
    answer = taskctl("tasks", "alice")
    assert answer.returncode in (1, 2)
    assert re.fullmatch(r"taskctl: [^\n]+\n", answer.stderr)


@pytest.mark.slow
def test_a_database_that_another_process_has_locked_can_be_read_but_not_written(
    taskctl: Taskctl, kept: Path
) -> None:
    taskctl("stats")  # turns on the write-ahead log, as taskd does
    with locked(kept):
        assert [row["tasks"] for row in data(taskctl("users", "--json"))] == [2, 1]
        assert [task["id"] for task in data(taskctl("tasks", "alice", "--json"))] == [1, 3]
        assert "locked" in one_line(taskctl("seed", "alice"), 1)
    assert sorted(stored(kept)) == [1, 2, 3]


@pytest.mark.parametrize("command", ["tasks", "seed"])
def test_a_name_that_is_not_text_is_a_usage_error(
    taskctl: Taskctl, kept: Path, command: str
) -> None:
    answer = taskctl(command, "\udcff")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert sorted(stored(kept)) == [1, 2, 3]

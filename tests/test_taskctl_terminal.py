"""What taskctl prints on a terminal and in a pipe: tables, totals, colours, JSON lines, CSV."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pty
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from rich.cells import cell_len

import taskd
from support import DEADLINE, OTHER_SECRET, TASK_KEYS, Process, bearer, token
from test_taskctl import dead_port, launched

pytestmark = pytest.mark.sqlite("it is about a terminal")

Taskctl = Callable[..., Any]
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
ODD = 'Buy "milk", =bread\nand butter'


def on_a_terminal(
    directory: Path, *arguments: str, typed: str = "", status: int = 0, **variables: str
) -> str:
    """Return what a run of taskctl shows on a terminal of 80 columns."""
    ours, terminal = pty.openpty()
    streams: Any = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    variables = {"COLUMNS": "80"} | variables
    with launched(directory, *arguments, variables=variables, **streams) as process:
        os.close(terminal)
        seen = b""
        with contextlib.suppress(OSError):  # Linux says so when the last writer has gone
            while chunk := os.read(ours, 65536):
                seen += chunk
                if typed and b"paste" in seen:
                    os.write(ours, typed.encode() + b"\n\x04")
                    typed = ""
        os.close(ours)
        assert process.wait(DEADLINE) == status, seen
    return seen.decode().replace("\r\n", "\n")


def plain(shown: str) -> list[str]:
    """Return the lines without their colours."""
    return [line.rstrip() for line in re.sub("\x1b\\[[0-9;]*m", "", shown).splitlines()]


def new(**fields: object) -> dict[str, object]:
    """Return the fields of a new task."""
    return taskd.parse_body(json.dumps(fields), taskd.NEW_TASK)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A database with two tasks of alice and one of bob."""
    database = taskd.open_database(taskd.Settings(database_url=f"sqlite:///{tmp_path}/taskd.db"))
    store = taskd.TaskStore(database)
    store.add("bob", new(title="Sleep"))
    store.add("alice", new(title=ODD, description="2 litres"))
    store.add("alice", new(title="Rest", completed=True, priority="low"))
    database.close()
    return tmp_path


# --- Tables ---------------------------------------------------------------------------------------


def test_a_table_fits_a_terminal_and_ends_with_a_total(kept: Path) -> None:
    head, first, second, total = plain(on_a_terminal(kept, "tasks", "alice"))
    names = head.split()
    assert {"id", "title", "done"} <= set(names)
    assert not {"user_id", "created_at", "updated_at"} & set(names)
    assert first.startswith("2   Buy")
    assert second.startswith("3   Rest")
    assert total == "taskctl: alice has 2 tasks"
    assert max(map(len, (head, first, second))) <= 80
    _, alice, *_ = plain(on_a_terminal(kept, "users"))
    assert re.search(r" \d{4}-\d\d-\d\d \d\d:\d\d$", alice)


@pytest.mark.parametrize(
    ("user", "names"), [("alice", "id title done priority"), ("bob", "id title done")]
)
def test_a_table_has_the_columns_in_which_a_task_has_a_value(
    kept: Path, user: str, names: str
) -> None:
    assert plain(on_a_terminal(kept, "tasks", user))[0].split() == names.split()


def test_most_titles_fit_into_one_line_of_a_terminal(taskctl: Taskctl, kept: Path) -> None:
    taskctl("seed", "carol")
    lines = plain(on_a_terminal(kept, "tasks", "carol"))
    assert max(map(len, lines)) <= 80
    assert len(lines) < 2 + 20 * 1.5


def test_wide_shows_every_column_and_whole_times(kept: Path) -> None:
    shown = plain(on_a_terminal(kept, "tasks", "alice", "--wide", "--done"))
    assert set(shown[0].split()) >= {"user_id", "created_at"}
    assert len(re.findall(TIME, shown[1])) == 2
    assert shown[-1] == "taskctl: alice has 1 such task"


def test_a_pipe_gets_every_column_and_no_total(taskctl: Taskctl, kept: Path) -> None:
    answer = taskctl("tasks", "alice")
    assert answer.stderr == ""
    assert answer.stdout.splitlines()[0].split() == TASK_KEYS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tasks", "nobody"], "nobody has no tasks"),
        (["tasks", "alice", "-q", "cheese"], "alice has no such tasks"),
    ],
)
def test_an_empty_result_is_reported(
    taskctl: Taskctl, kept: Path, arguments: list[str], said: str
) -> None:
    answer = taskctl(*arguments)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", f"taskctl: {said}\n")
    for form, nothing in [("--json", "[]\n"), ("--nl", ""), ("--csv", "")]:
        answer = taskctl(*arguments, form)
        assert (answer.returncode, answer.stdout, answer.stderr) == (0, nothing, "")


def test_what_passed_and_what_failed_have_colours_of_their_own(kept: Path) -> None:
    (kept / "taskd.db").chmod(0o644)
    shown = on_a_terminal(kept, "check", status=1)
    assert "\x1b[32mok" in shown
    assert "\x1b[1;31mFAIL" in shown
    assert plain(shown)[-1] == "taskctl: 1 of 4 checks failed"
    (kept / "taskd.db").chmod(0o640)
    shown = on_a_terminal(kept, "check")
    assert "\x1b[33mwarning" in shown
    assert plain(shown)[-1] == "taskctl: all 4 checks passed, 1 warning"


def test_each_call_of_smoke_has_the_colour_of_its_result_and_one_line(
    kept: Path, start: Callable[..., Process]
) -> None:
    url = f"http://127.0.0.1:{start().port}"
    shown = on_a_terminal(kept, "smoke", url)
    lines, total = plain(shown)[1:-1], plain(shown)[-1]
    assert total == f"taskctl: all {len(lines)} calls passed"
    assert shown.count("\x1b[32mok") == len(lines)
    assert max(map(len, lines)) <= 80
    assert "\x1b[1;31mFAIL" in on_a_terminal(
        kept, "smoke", url, status=1, BETTER_AUTH_SECRET=OTHER_SECRET
    )


# --- Users ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "users"),
    [
        ([], ["alice", "bob"]),
        (["--sort", "-user_id"], ["bob", "alice"]),
        (["--sort", "tasks"], ["bob", "alice"]),
        (["--sort=-tasks", "--limit", "1"], ["alice"]),
        (["--sort=-last_change"], ["alice", "bob"]),
        (["--limit", "5"], ["alice", "bob"]),
    ],
)
def test_users_are_sorted_and_limited(
    taskctl: Taskctl, kept: Path, options: list[str], users: list[str]
) -> None:
    answer = taskctl("users", *options, "--json")
    assert [user["user_id"] for user in json.loads(answer.stdout)] == users


@pytest.mark.parametrize(
    "options", [["--sort", "title"], ["--sort", ""], ["--limit", "0"], ["--limit", "9" * 20]]
)
def test_an_order_or_a_limit_of_users_that_cannot_be_is_wrong_usage_even_without_a_database(
    taskctl: Taskctl, options: list[str]
) -> None:
    answer = taskctl("users", *options)
    assert answer.returncode == 2
    assert options[0] in answer.stderr
    assert "No such option" not in answer.stderr


# --- JSON lines and CSV ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["tasks", "alice"], ["users"]])
def test_json_lines_are_the_rows_of_json(taskctl: Taskctl, kept: Path, command: list[str]) -> None:
    rows = json.loads(taskctl(*command, "--json").stdout)
    lines = taskctl(*command, "--nl").stdout
    assert [json.loads(line) for line in lines.splitlines()] == rows


def test_csv_has_a_header_and_reads_back_as_what_was_kept(taskctl: Taskctl, kept: Path) -> None:
    rows = json.loads(taskctl("tasks", "alice", "--json").stdout)
    answer = taskctl("tasks", "alice", "--csv")
    read = list(csv.DictReader(io.StringIO(answer.stdout)))
    assert list(read[0]) == TASK_KEYS
    assert [row["title"] for row in read] == [ODD, "Rest"]
    assert [row["description"] for row in read] == ["2 litres", ""]
    assert [json.loads(row["completed"]) for row in read] == [False, True]
    assert [row["created_at"] for row in read] == [row["created_at"] for row in rows]


def test_only_one_form_of_output_can_be_asked_for(taskctl: Taskctl, kept: Path) -> None:
    for forms in (("--json", "--csv"), ("--nl", "--csv"), ("--json", "--nl")):
        answer = taskctl("users", *forms)
        assert (answer.returncode, answer.stdout) == (2, "")
        assert "--json, --nl and --csv exclude each other" in answer.stderr


def test_columns_of_wide_characters_stand_below_each_other(
    taskctl: Taskctl, server: Process
) -> None:
    for user in ("日本", "alice"):
        path = f"/api/{quote(user)}/tasks"
        assert server.request("POST", path, {"title": "x"}, bearer(user)).status_code == 201
    head, *lines = taskctl("users").stdout.splitlines()
    assert [cell_len(line[: line.index(" 1 ")]) for line in lines] == [head.index("tasks") - 1] * 2


def test_csv_keeps_a_carriage_return(taskctl: Taskctl, tmp_path: Path) -> None:
    (tmp_path / "new.jsonl").write_text(json.dumps({"user_id": "a\rb", "title": "x\ry"}))
    taskctl("init")
    taskctl("import", "--new", "new.jsonl")
    for command, row in (["tasks", "a\rb"], ["1", "a\rb", "x\ry"]), (["users"], ["a\rb", "1", "0"]):
        with launched(tmp_path, *command, "--csv", text=False) as process:
            written = process.stdout.read().decode()
        [_, read] = csv.reader(io.StringIO(written, newline=""))
        assert read[:3] == row


# --- Settings, verify, smoke ----------------------------------------------------------------------


def test_settings_say_where_they_come_from(taskctl: Taskctl, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "TASKD_PORT=8000\nTASKD_HOST=::1\nTASKD_ISSUER=\nTASKD_AUDIENCE=${X}\n"
    )
    shown = taskctl("settings", TASKD_HOST="127.0.0.2").stdout
    found = {line.split()[0]: line.split()[1:] for line in shown.splitlines()}
    assert found["BETTER_AUTH_SECRET"] == ["(set)", "(environment)"]
    assert found["TASKD_HOST"] == ["127.0.0.2", "(environment)"]
    assert found["TASKD_PORT"] == ["8000", "(.env)"]
    assert found["TASKD_ISSUER"] == ["-", "(default)"]
    assert found["TASKD_AUDIENCE"] == ["${X}", "(.env)"], "as taskd reads it"


def test_verify_says_that_it_waits_for_a_token(tmp_path: Path) -> None:
    shown = plain(on_a_terminal(tmp_path, "verify", typed=token()))
    assert shown[0].startswith("taskctl: paste a token, then press Enter and Ctrl-D")
    assert any(re.match(r"user_id +alice", line) for line in shown)


def test_smoke_says_that_nothing_listens(taskctl: Taskctl) -> None:
    with dead_port() as port:
        answer = taskctl("smoke", f"http://127.0.0.1:{port}")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr == (
        f"taskctl: nothing listens at http://127.0.0.1:{port}; start taskd, or name its URL\n"
    )


def test_smoke_says_that_the_server_has_another_secret(
    taskctl: Taskctl, start: Callable[..., Process]
) -> None:
    server = start(BETTER_AUTH_SECRET=OTHER_SECRET)
    answer = taskctl("smoke", f"http://127.0.0.1:{server.port}")
    assert answer.returncode == 1
    why = "the server's secret, issuer or audience differs"
    assert answer.stderr.endswith(f"calls failed; {why}\n")
    assert len(answer.stderr) <= 80

"""README.md against the code: its lists are complete, and its instructions work for a newcomer."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import itertools
import json
import operator
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import falcon
import pytest
import typer.main

import taskctl
import taskd
from conftest import Person
from routes import routes
from support import DEADLINE, ROOT, TASK_KEYS, environment, until

pytestmark = pytest.mark.sqlite("it is about a text")

README = (ROOT / "README.md").read_text()
HEADINGS = [
    "Try it in a minute",
    "Is it for you?",
    "Documentation",
    "Endpoints",
    "Listing",
    "Safe to retry",
    "Errors",
    "Settings",
    "taskctl",
]
API, OPERATIONS, POSTGRESQL, LAYOUT, TASKCTL = (
    (ROOT / "docs" / f"{name}.md").read_text()
    for name in ("using-the-api", "operations", "postgresql", "how-it-works", "taskctl")
)
Row = list[str]


def section(heading: str, document: str = README) -> str:
    """Return the text under a heading of the second level."""
    found = re.search(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", document, re.MULTILINE | re.DOTALL
    )
    assert found, f"there is no section {heading!r}"
    return found[1]


def table(heading: str, first: str, document: str = README) -> list[Row]:
    """Return the rows of this section's table whose first column has this name."""
    for block in re.findall(r"(?:^\|.*\n)+", section(heading, document), re.MULTILINE):
        rows = [
            [cell.strip() for cell in line.strip().strip("|").split("|")]
            for line in block.splitlines()
        ]
        if rows[0][0] == first:
            assert {len(row) for row in rows} == {len(rows[0])}, block
            return rows[2:]
    raise AssertionError(f"the section {heading!r} has no table of {first!r}")


def code(cell: str) -> str:
    """Return the first `code` of a cell."""
    found = re.search("`([^`]+)`", cell)
    assert found, cell
    return found[1]


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository without the files that git ignores, as in a fresh clone."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    copy = tmp_path_factory.mktemp("readme") / "taskd"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "node_modules", *ignored))
    return copy


# --- What it lists --------------------------------------------------------------------------------


def test_the_sections_come_in_the_order_in_which_a_newcomer_needs_them() -> None:
    headings = re.findall("^## (.+)$", README, re.MULTILINE)
    assert headings == HEADINGS


@pytest.fixture
def app(make_app: Any) -> taskd.App:
    app: taskd.App = make_app(metrics=True)
    return app


def test_the_endpoints_are_the_routes_and_methods_of_the_router(app: taskd.App) -> None:
    routed = {
        (method.method, route.path)
        for route in routes(app)
        for method in route.methods
        if not method.internal
        and method.method not in ("HEAD", "OPTIONS")  # promised for all of them together
    }
    listed = [(row[0].split()[0], code(row[0])) for row in table("Endpoints", "method and path")]
    assert sorted(listed) == sorted(routed)


def test_the_endpoints_that_need_a_token_are_marked(client: Any) -> None:
    for method_and_path, needs_token, *_ in table("Endpoints", "method and path"):
        path = re.sub(r"\{\w+\}", "1", code(method_and_path))
        answer = client.simulate_request(method_and_path.split()[0], path)
        assert (needs_token, answer.status_code) in (("yes", 401), ("no", 200), ("no", 307)), (
            method_and_path
        )


def test_the_members_of_a_task_are_those_that_a_client_can_set() -> None:
    assert [code(row[0]) for row in table("Endpoints", "member")] == list(taskd.FIELDS)


def test_the_parameters_of_the_list_are_those_of_the_code() -> None:
    assert [code(row[0]) for row in table("Listing", "parameter")] == list(taskd.PARAMETERS)


def test_the_tables_are_those_of_the_code() -> None:
    assert [code(row[0]) for row in table("Data layout", "table", LAYOUT)] == list(taskd.TABLES)


def test_the_errors_are_all_that_taskd_can_answer() -> None:
    tree = ast.parse((ROOT / "taskd.py").read_text())
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} - {
        "HTTPError"
    }
    kinds: list[Any] = [getattr(falcon, name, None) for name in names]
    raised = {
        kind().status_code  # type: ignore[call-arg]
        for kind in kinds
        if isinstance(kind, type) and issubclass(kind, falcon.HTTPError)
    }
    possible = raised | set(taskd.DETAILS)
    assert possible >= {400, 401, 403, 404, 405, 413, 415, 422, 431, 500, 503}
    listed = [int(row[0]) for row in table("Errors", "status")]
    assert sorted(set(listed)) == sorted(possible)
    assert listed == sorted(listed)
    assert {one for one in listed if listed.count(one) > 1} == {403, 503}  # for several reasons


def test_the_error_that_is_shown_is_the_one_that_comes(alice: Person) -> None:
    [shown] = blocks(section("Errors"), "json")
    answer = alice.call("POST", json={"title": " "})
    assert (answer.status_code, answer.json) == (422, json.loads(shown))


def test_the_settings_are_those_of_the_code_with_their_defaults() -> None:
    listed = {code(row[0]): row[1] for row in table("Settings", "variable")}
    fields = {
        field.metadata["variable"]: field.default for field in dataclasses.fields(taskd.Settings)
    }
    assert listed == {
        name: f"`{default}`" if default else "none" for name, default in fields.items()
    }
    assert list(listed) == list(fields)


def test_the_commands_are_those_of_taskctl_and_have_the_options_that_are_shown() -> None:
    group: Any = typer.main.get_command(taskctl.app)
    commands: dict[str, Any] = group.commands
    rows = {code(row[0]).split()[0]: row for row in table("Commands", "command", TASKCTL)}
    assert sorted(rows) == sorted(commands)
    named = [re.findall("`([^`]+)`", row[1]) for row in table("taskctl", "for")]
    assert sorted(itertools.chain(*named)) == sorted(commands)  # in the README, by purpose
    for name, row in rows.items():
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"`(--[a-z-]+)", row[1])) <= options, name
        arguments = [
            parameter
            for parameter in commands[name].params
            if parameter.param_type_name == "argument"
        ]
        assert bool(arguments) == (" " in code(row[0])), name


def test_the_pythons_that_are_named_are_those_that_are_tested() -> None:
    [sentence] = re.findall(r"^You need make and Python (.+) \(\[all tests", README, re.MULTILINE)
    named = re.findall(r"3\.\d+", sentence)
    workflow = (ROOT / ".github" / "workflows" / "check.yml").read_text()
    [tested] = re.findall(r"^ +python: \[(.+)\]$", workflow, re.MULTILINE)
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    classified = [
        name.rpartition(" ")[2]
        for name in metadata["classifiers"]
        if re.search(r"Python :: 3\.", name)
    ]
    assert named == json.loads(f"[{tested}]") == classified
    assert metadata["requires-python"] == f">={named[0]}"


def test_the_chapters_that_are_named_are_those_of_the_code(clone: Path) -> None:
    code = (clone / "taskd.py").read_text()
    chapters = re.findall(r"^# --- (\w+) -+$", code, re.MULTILINE)
    contributing = (clone / "CONTRIBUTING.md").read_text()
    [listed] = re.findall(r"the service, in chapters: (.+?)\.", contributing)
    assert listed.split(", ") == chapters
    assert re.findall(r"^\| (\w+) +\|", code, re.MULTILINE) == ["chapter", *chapters]


def test_the_functions_that_are_named_exist() -> None:
    named = re.findall(r"`([A-Za-z_.]+)\(\)`", LAYOUT)
    assert {"Server.run", "KeySet.fetch", "main", "owned_by_user"} <= set(named)
    for name in named:
        assert callable(operator.attrgetter(name)(taskd)), name


def test_the_threads_are_as_many_as_the_table_says() -> None:
    threads = {row[0]: row[1] for row in table("The server's threads", "thread", LAYOUT)}
    assert threads["search threads"] == str(taskd.SEARCHES)
    assert threads["worker threads"] == "`TASKD_THREADS`"


def test_the_limits_of_what_a_client_may_send_are_those_of_the_guide() -> None:
    guide = (ROOT / "docs" / "self-hosting.md").read_text()
    limits = {row[0]: row[1] for row in table("Without a proxy", "what", guide)}
    head, body = f"{taskd.MAX_HEAD // 1024} KiB", f"{taskd.MAX_BODY // 1024} KiB"
    wait = {state: f"{seconds:.0f} s" for state, seconds in taskd.DEADLINES.items()}
    assert limits["a head"] == (
        f"{head}, {taskd.MAX_HEADERS:,} lines, {wait['head']};"
        f" its path with the query {taskd.MAX_TARGET // 1024} KiB"
    )
    assert limits["a body"] == f"{body}, {wait['body']}"
    waiting = "an answer of which the client reads nothing, an idle connection"
    assert limits[waiting] == f"{wait['delivery']}, {wait['request']}"
    held = "requests that are not answered yet and answers that are not read yet, in memory"
    assert limits[held] == f"{taskd.MAX_HELD >> 20} MiB in all"
    room = taskd.MAX_LIST_BYTES >> 30
    lists = (
        f"{taskd.MAX_LISTS_OF_USER} of a user, {taskd.MAX_LISTS} in all;"
        f" {room // 2} GiB of a user, {room} GiB in all"
    )
    assert limits["lists over 512 KiB that are being read"] == lists
    assert limits["a write that waits for another process"] == f"{taskd.LOCK_TIMEOUT:.0f} s"


def test_the_make_targets_that_are_named_exist(clone: Path) -> None:
    documents = README + (clone / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`make ([a-z-]+)`", documents)) | {"run"}
    targets = set(re.findall(r"^([a-z-]+):", (clone / "Makefile").read_text(), re.MULTILINE))
    assert sorted(named - targets) == []


# --- What it points to ----------------------------------------------------------------------------

MADE_BY_TASKD = {".env", "taskd.db", "taskd.db-wal", "taskd.db-shm"}  # or kept beside it


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_inside_the_repository_leads_somewhere(clone: Path) -> None:
    dead = []
    for document in [*clone.glob("*.md"), *clone.glob("docs/*.md")]:
        for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
            if re.match("https?://", link):
                continue
            name, _, anchor = link.partition("#")
            target = document.parent / name if name else document
            if not target.exists() or (anchor and anchor not in anchors(target)):
                dead.append((document.name, link))
    assert dead == []


def test_every_file_that_is_named_exists(clone: Path) -> None:
    documents = README + LAYOUT + (clone / "CONTRIBUTING.md").read_text()
    named = set(
        re.findall(
            r"`((?!/)[\w./-]+\.(?:py|sql|md|txt|json|toml|html|mjs|db)[\w-]*|\.env)`", documents
        )
    )
    assert {"taskd.py", "taskctl.py", "schema.sql"} <= named
    assert sorted(name for name in named - MADE_BY_TASKD if not (clone / name).exists()) == []


FORBIDDEN = [
    "py" + "pi.org",
    "pythonhosted" + ".org",
    "registry.npm" + "js.org",
    "registry.yarn" + "pkg.com",
    "/wo" + "rk/",
    "/ro" + "ot/",
]


def test_no_file_names_a_package_registry_or_a_path_of_somebodys_machine(clone: Path) -> None:
    found = []
    for path in sorted(path for path in clone.rglob("*") if path.is_file()):
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            found += [
                (str(path.relative_to(clone)), number, text) for text in FORBIDDEN if text in line
            ]
    assert found == []


# --- What it tells to do --------------------------------------------------------------------------

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def fresh(clone: Path, tmp_path: Path) -> Path:
    """A fresh clone in which make finds this environment ready, so that nothing is downloaded."""
    home = tmp_path / "taskd"
    shutil.copytree(clone, home)
    (home / ".venv").mkdir()
    (home / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    (home / ".venv" / "lib").symlink_to(Path(sys.prefix) / "lib")
    if (Path(sys.prefix) / "pyvenv.cfg").exists():
        shutil.copy(Path(sys.prefix) / "pyvenv.cfg", home / ".venv")
    for stamp in ("run", "test"):
        (home / ".venv" / stamp).touch()
    return home


def told(commands: str, port: int) -> list[str]:
    """Return the command line that runs the README's commands on a port of this test's."""
    return ["bash", "-euo", "pipefail", "-c", commands.replace("8000", str(port))]


def shell_environment(home: Path, port: int) -> dict[str, str]:
    path = f"{home}/.venv/bin:{os.environ['PATH']}"
    return environment(
        TASKD_PORT=str(port), PATH=path, PIP_NO_INDEX="1", PIP_DISABLE_PIP_VERSION_CHECK="1"
    )


@contextlib.contextmanager
def serving(commands: str, home: Path, port: int) -> Iterator[None]:
    """Run the commands that serve until the server listens, and end it later as Ctrl-C would."""
    log = home.parent / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            told(commands, port),
            cwd=home, env=shell_environment(home, port), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    line = f"taskd: listening on http://127.0.0.1:{port} "
    try:
        until(lambda: line in log.read_text() or process.poll() is not None, "the server listens")
        assert line in log.read_text(), log.read_text()
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(DEADLINE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def told_to(commands: str, home: Path, port: int) -> subprocess.CompletedProcess[str]:
    """Run the commands of a document, which must succeed."""
    answer = subprocess.run(
        told(commands, port), cwd=home, env=shell_environment(home, port), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=DEADLINE, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer
    return answer


def printed(commands: str, home: Path, port: int) -> str:
    """Run the commands of a document, which must succeed, and return their output."""
    answer = told_to(commands, home, port)
    assert answer.stderr == ""
    assert answer.stdout.endswith("\n")  # otherwise the prompt is on the same line
    return answer.stdout


needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="the README's commands need curl")


@pytest.mark.slow
@needs_curl
def test_the_quick_start_works_line_by_line(fresh: Path, port: int) -> None:
    serve, create, use, _ = blocks(section("Try it in a minute"), "sh")
    [shown] = blocks(section("Try it in a minute"), "json")
    with serving(serve, fresh, port):
        assert {".venv", ".env", "taskd.db"} <= {path.name for path in fresh.iterdir()}
        answer = told_to(create + use, fresh, port)
    first, *tasks, smoked = answer.stdout.split("\n", 6)
    assert re.fullmatch(r"taskctl: all \d+ calls passed\n", answer.stderr)
    assert re.sub(TIME, "T", first) == re.sub(TIME, "T", shown.strip())
    created, (listed, read, changed, completed, deleted) = json.loads(first), map(json.loads, tasks)
    assert list(created) == TASK_KEYS
    assert (listed, read) == ([created], created)
    assert changed == created | {"description": "2 litres", "updated_at": changed["updated_at"]}
    assert completed == changed | {"completed": True, "updated_at": completed["updated_at"]}
    assert deleted == completed
    results = [line.split()[0] for line in smoked.splitlines()[1:] if line]
    assert results.count("ok") > 10
    assert "FAIL" not in results


def responses(shown: str) -> list[tuple[str, dict[str, str], Any]]:
    """Return what `curl -i` printed: the status line, the headers and any JSON of each answer."""
    found = []
    for text in shown.split("HTTP/1.1 ")[1:]:
        head, _, body = text.partition("\n\n")
        status, *lines = head.splitlines()
        header = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines)
        }
        found.append((status, header, json.loads(body) if body.strip() else None))
    return found


@pytest.mark.slow
@needs_curl
def test_lists_and_retries_work_as_they_are_shown(fresh: Path, port: int) -> None:
    serve, create_one, *_ = blocks(section("Try it in a minute"), "sh")
    [given] = blocks(API.partition("\n## ")[0], "sh")
    assert given in create_one  # the README's first lines, so that either page can be pasted alone
    narrow, walk = blocks(section("Listing", API), "sh")
    create, change = blocks(section("Safe to retry", API), "sh")
    with serving(serve, fresh, port):
        shown = printed(given + narrow, fresh, port).splitlines()
        pages = printed(given + walk, fresh, port).splitlines()
        once, again = responses(printed(given + create, fresh, port))
        unchanged, changed, refused = responses(printed(given + change, fresh, port))
    *created, still_open, found, titles = map(json.loads, shown)
    milk, cafe, dentist = created
    assert [task["title"] for task in created] == [
        "Buy milk",
        "Book a table at the CAFÉ",
        "Call the dentist",
    ]
    assert (still_open, found, titles) == (created, [cafe], [dentist, milk, cafe])
    assert list(map(json.loads, pages)) == [[milk, cafe], [dentist]]
    assert (once[0], again[0]) == ("201 Created", "201 Created")
    assert (once[1].get("idempotency-replayed"), again[1]["idempotency-replayed"]) == (None, "true")
    assert once[2] == again[2]
    assert once[1]["etag"] == again[1]["etag"]
    assert (unchanged[0], unchanged[2]) == ("304 Not Modified", None)
    assert (changed[0], changed[2]["id"]) == ("200 OK", once[2]["id"] + 1)
    assert changed[2]["completed"]
    assert (refused[0], refused[2]["status"]) == ("412 Precondition Failed", 412)
    assert unchanged[1]["etag"] != changed[1]["etag"] == refused[1]["etag"]


@pytest.mark.slow
def test_a_backup_is_made_and_restored_as_it_is_shown(fresh: Path, port: int) -> None:
    [serve, *_] = blocks(section("Try it in a minute"), "sh")
    backup, restore = blocks(section("Backup and restore", OPERATIONS), "sh")
    with serving(serve, fresh, port):
        told_to(backup, fresh, port)
    told_to(restore, fresh, port)
    assert {"monday.db", "taskd.db"} <= {path.name for path in fresh.iterdir()}


@pytest.mark.slow
def test_the_quick_start_works_without_make_too(fresh: Path, port: int) -> None:
    *_, commands = blocks(section("Try it in a minute"), "sh")
    make_environment, *rest = commands.splitlines(keepends=True)
    assert make_environment == "python3 -m venv .venv\n"  # which `fresh` has, as it is after this
    with (
        serving("".join(rest), fresh, port),
        contextlib.closing(socket.create_connection(("127.0.0.1", port))) as client,
    ):
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.0 200 OK\r\n")
    assert {".env", "taskd.db"} <= {path.name for path in fresh.iterdir()}

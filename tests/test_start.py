"""How both programs are installed and started: arguments, packages, the wheel, the first page."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import socket
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from falcon import testing

import taskd
from support import DEADLINE, ROOT, ForkServer, assert_problem, environment
from test_taskctl import fork_server

pytestmark = pytest.mark.sqlite("it is about how the programs are started")

PROGRAMS = ["taskd", "taskctl"]


def run(
    *command: str | Path, cwd: Path, code: int = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a directory, and check its exit status."""
    answer = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment(**variables), text=True,
        stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE, check=False,
    )  # fmt: skip
    assert answer.returncode == code, answer
    return answer


def requirements(name: str) -> list[str]:
    lines = (ROOT / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-r"))]


# --- Arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_explains_itself_without_settings(program: str, tmp_path: Path) -> None:
    answer = run(sys.executable, ROOT / f"{program}.py", "--help", cwd=tmp_path)
    assert f"usage: {program}" in answer.stdout.lower()
    assert answer.stderr == ""
    server = fork_server() if program == "taskctl" else ForkServer.of("taskd", environment())
    short = server.run("-h", directory=tmp_path, variables=environment())
    assert (short.returncode, short.stdout, short.stderr) == (0, answer.stdout, "")
    assert list(tmp_path.iterdir()) == []


def test_the_help_of_taskd_lists_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        taskd.parse_arguments(["--help"])
    shown = capsys.readouterr().out
    variables = [field.metadata["variable"] for field in dataclasses.fields(taskd.Settings)]
    assert re.findall("^  ([A-Z_]+) ", shown, re.MULTILINE) == variables


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_says_its_version(program: str, tmp_path: Path) -> None:
    answer = run(sys.executable, ROOT / f"{program}.py", "--version", cwd=tmp_path)
    assert (answer.stdout, answer.stderr) == (f"{program} {taskd.__version__}\n", "")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_argument_of_taskd_starts_and_makes_nothing(tmp_path: Path) -> None:
    answer = run(
        sys.executable, ROOT / "taskd.py", "serve", cwd=tmp_path, code=2,
        BETTER_AUTH_SECRET="x" * 32, TASKD_PORT="0",
    )  # fmt: skip
    assert answer.stderr == (
        "usage: taskd [-h] [--version]\ntaskd: error: unrecognized arguments: serve\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--vers"], ["--port", "9"], ["--port=9"], ["-x"], [""], ["a b"]]
)
def test_no_argument_is_taken_for_another(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        taskd.parse_arguments(arguments)
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert "taskd: error: unrecognized arguments: " in shown.err


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_without_its_packages_says_so_in_one_line(program: str, tmp_path: Path) -> None:
    answer = run(sys.executable, "-S", ROOT / f"{program}.py", cwd=tmp_path, code=1)
    assert re.fullmatch(
        rf"{program}: the package \w+ is not installed for this Python; .*pip install.*\n",
        answer.stderr,
    )
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        answer = run(
            sys.executable, ROOT / "taskd.py", cwd=tmp_path, code=2,
            TASKD_PORT=port, BETTER_AUTH_SECRET="x" * 32,
        )  # fmt: skip
    assert answer.stderr == (
        f"taskd: TASKD_HOST, TASKD_PORT: cannot listen on 127.0.0.1:{port}: it is in use; "
        "stop what listens there, or set another TASKD_PORT\n"
    )


# --- The first page -------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{}, {"Accept": "text/html"}, {"Authorization": "Bearer no"}])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_root_leads_to_the_docs(client: Any, method: str, headers: dict[str, str]) -> None:
    answer = client.simulate_request(method, "/", headers=headers)
    assert (answer.status_code, answer.headers["location"]) == (307, "/docs")
    assert answer.text == ""


def test_the_root_leads_to_the_docs_behind_a_prefix(make_app: Any) -> None:
    client = testing.TestClient(make_app(trusted_proxies=("127.0.0.1",)))
    answer = client.simulate_get("/", headers={"X-Forwarded-Prefix": "/tasks"})
    assert answer.headers["location"] == "/tasks/docs"


def test_nothing_else_is_at_the_root(client: Any) -> None:
    assert_problem(client.simulate_post("/"), 405)
    assert_problem(client.simulate_get("/index.html"), 404)


# --- Packages -------------------------------------------------------------------------------------


def test_the_packages_are_the_same_wherever_they_are_named() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = requirements("requirements.txt")
    assert project["dependencies"] == needed
    assert project["optional-dependencies"]["postgresql"] == requirements(
        "requirements-postgresql.txt"
    )
    for program in PROGRAMS:
        text = (ROOT / f"{program}.py").read_text()
        block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", text, re.MULTILINE)
        assert block
        metadata = tomllib.loads(re.sub("^# ?", "", block[1], flags=re.MULTILINE))
        assert metadata == {"requires-python": project["requires-python"], "dependencies": needed}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which the wheel of this checkout is installed, beside the packages here."""
    home = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps"]
    run(*pip, "wheel", *offline, "--no-build-isolation", "-w", home, ROOT, cwd=home)
    [wheel] = home.glob("taskd-*.whl")
    assert wheel.name.startswith(f"taskd-{taskd.__version__}-")
    run(*pip, "install", *offline, "--target", home / "site", wheel, cwd=home)
    return home / "site"


def test_the_wheel_holds_all_that_the_programs_read(installed: Path) -> None:
    shipped = [ROOT / name for name in ("schema.sql", "openapi.json", "docs/api.html")]
    for path in [*shipped, *(ROOT / "migrations").iterdir()]:
        copy = installed / "taskd_files" / path.relative_to(ROOT)
        assert copy.read_bytes() == path.read_bytes()
    top = {path.name for path in installed.iterdir() if "dist-info" not in path.name}
    assert top - {"__pycache__"} == {"bin", "taskd.py", "taskctl.py", "taskd_files"}


def test_the_installed_programs_serve(installed: Path, tmp_path: Path) -> None:
    variables: dict[str, Any] = {"PYTHONPATH": str(installed), "TASKD_PORT": "0"}
    for program in PROGRAMS:
        answer = run(installed / "bin" / program, "--version", cwd=tmp_path, **variables)
        assert answer.stdout == f"{program} {taskd.__version__}\n"
    run(installed / "bin" / "taskctl", "init", cwd=tmp_path, **variables)
    with (
        subprocess.Popen(
            [installed / "bin" / "taskd"], cwd=tmp_path, env=environment(**variables),
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        ) as server,
        contextlib.ExitStack() as cleaning,
    ):  # fmt: skip
        cleaning.callback(server.kill)
        assert server.stderr
        found = re.match(r"taskd: listening on (http://\S+) ", server.stderr.readline())
        assert found
        for path in ("/docs", "/openapi.json", "/readyz", "/"):
            with urllib.request.urlopen(found[1] + path, timeout=DEADLINE) as page:
                assert page.status == 200

"""A linter reads openapi.json, and clients generated from it call every route of a taskd."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from packages import install, run
from support import ROOT, Process, token

HERE = ROOT / "tests" / "openapi_clients"
DOCUMENT = ROOT / "openapi.json"
pytestmark = [
    pytest.mark.sqlite("it is about a document"),
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("npm"), reason="these tools run on Node: install npm"),
]


@pytest.fixture(scope="module")
def tools() -> Path:
    return install(HERE / "package-lock.json") / ".bin"


@pytest.fixture(scope="module")
def python() -> Path:
    """A Python with the generator of clients, which needs another version of typer."""
    uv = str(Path(sys.executable).with_name("uv"))
    venv = [uv, "venv", "--quiet", "--clear", "--python", sys.executable, ".venv"]
    pip = [uv, "pip", "install", "--quiet", "--python", ".venv", "--requirement"]
    commands = [venv, [*pip, "requirements.txt"]]
    return install(HERE / "requirements.txt", ".venv", commands) / "bin" / "python"


def test_a_linter_finds_nothing_but_what_is_meant(tools: Path) -> None:
    lint: list[str | Path] = [tools / "redocly", "lint", DOCUMENT, "--extends", "recommended"]
    printed = run(*lint, "--format", "json", at=HERE, REDOCLY_TELEMETRY="off")
    found = json.JSONDecoder().raw_decode(printed[printed.index("{") :])[0]["problems"]
    # Some routes are never refused; 405 answers the methods that are not in the document.
    meant = {"operation-4xx-response", "no-unused-components"}
    assert [one for one in found if one["ruleId"] not in meant] == []


def test_a_strict_typescript_client_calls_every_route(
    tools: Path, tmp_path: Path, start: Callable[..., Process]
) -> None:
    for name in ("client.ts", "tsconfig.json", "package.json"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "node_modules").symlink_to(HERE / "node_modules")
    run(tools / "openapi-typescript", DOCUMENT, "-o", "schema.d.ts", at=tmp_path)
    run(tools / "tsc", "-p", ".", at=tmp_path)
    where = {"TASKD_URL": f"http://127.0.0.1:{start().port}", "TASKD_TOKEN": token("alice")}
    assert run("node", "built/client.js", at=tmp_path, **where) == "all routes\n"


def test_a_strict_python_client_calls_every_route(
    python: Path, tmp_path: Path, start: Callable[..., Process]
) -> None:
    (tmp_path / "config.yml").write_text(
        "package_name_override: taskd_client\nproject_name_override: taskd-client\npost_hooks: []\n"
    )
    module = "openapi_python_client"
    generator: list[str | Path] = [python, "-m", module, "generate", "--path", DOCUMENT]
    options = ["--config", "config.yml", "--meta", "none", "--output-path", "taskd_client"]
    assert "WARNING" not in run(*generator, *options, at=tmp_path).upper()
    (tmp_path / "taskd_client" / "py.typed").touch()
    shutil.copy(HERE / "client.py", tmp_path)
    mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python)]
    run(*mypy, "client.py", at=tmp_path)
    where = {"TASKD_URL": f"http://127.0.0.1:{start().port}", "TASKD_TOKEN": token("alice")}
    assert run(python, "client.py", at=tmp_path, **where) == "all routes\n"

"""docs/testing.md: each example is run as it stands there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import free_port
from packages import install
from processes import ROOT, environment
from test_better_auth import MISSING
from waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.sqlite("it is about a text")]

PAGE = (ROOT / "docs" / "testing.md").read_text()
PLAYWRIGHT = ROOT / "tests" / "playwright"
RUN_TIME = 60  # seconds that an example may take


def write_blocks(language: str, directory: Path) -> None:
    """Write each code block of this language to the file that its first line names."""
    for block in re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        (directory / re.findall(r"[\w.-]+\.\w+", block)[0]).write_text(block)


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has installed taskd."""
    programs = tmp_path / "bin"
    programs.mkdir()
    command = programs / "taskctl"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "taskctl.py"}" "$@"\n')
    command.chmod(0o755)
    (tmp_path / "tmp").mkdir()
    path = environment()["PATH"]
    return environment(PATH=f"{programs}:{path}", TMPDIR=str(tmp_path / "tmp"))


def run(directory: Path, variables: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        command,
        cwd=directory,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=RUN_TIME,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_pytest_fixture(tmp_path: Path, variables: dict[str, str]) -> None:
    write_blocks("python", tmp_path)
    pytest_alone = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
    assert "1 passed" in run(tmp_path, variables, sys.executable, *pytest_alone)
    assert list((tmp_path / "tmp").glob("taskd-*")) == []


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_the_playwright_fixture(tmp_path: Path, variables: dict[str, str]) -> None:
    modules = install(PLAYWRIGHT / "package-lock.json")
    (tmp_path / "node_modules").symlink_to(modules)
    write_blocks("js", tmp_path)
    program = str(modules / "@playwright" / "test" / "cli.js")
    assert "1 passed" in run(tmp_path, variables, "node", program, "test", "--reporter=line")
    assert list((tmp_path / "tmp").glob("taskd-*")) == []


def test_the_steps_of_the_workflow(tmp_path: Path, variables: dict[str, str]) -> None:
    [text] = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    port = str(free_port())
    steps: list[dict[str, Any]] = yaml.safe_load(text)["jobs"]["test"]["steps"]
    scripts = [step["run"].replace("8123", port) for step in steps if "name" in step]
    assert len(scripts) == 3
    try:
        for script in scripts:  # a shell for each, as the runner does
            output = run(tmp_path, variables, "bash", "-e", "-o", "pipefail", "-c", script)
            assert json.loads(output or "[]") == []
    finally:
        server = json.loads((tmp_path / "taskd.json").read_text())["pid"]
        with contextlib.suppress(ProcessLookupError):
            os.kill(server, signal.SIGTERM)
    until(lambda: not list((tmp_path / "tmp").glob("taskd-*")), "nothing is left")

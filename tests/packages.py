"""Packages of npm and PyPI that a few tests need, installed once for all processes of a run."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path

from processes import environment

NPM = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
TIME = 300  # seconds that a command may take


def run(*command: str | Path, at: Path, **variables: str) -> str:
    """Run a command that must succeed, and return what it printed."""
    done = subprocess.run(
        command, cwd=at, env=environment(**variables), capture_output=True, text=True, timeout=TIME
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def npm_ci(listed: Path, into: Path) -> None:
    """Install what a package-lock.json lists: in memory, if the tests are, and by one thread.

    Thousands of small files that several threads write at once to a disk take twice the time.
    """
    with tempfile.TemporaryDirectory(dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")) as home:
        for name in (listed.name, "package.json"):
            shutil.copy(listed.parent / name, home)
        run(*NPM, at=Path(home), UV_THREADPOOL_SIZE="1")
        shutil.rmtree(into, ignore_errors=True)
        run("cp", "-a", Path(home, "node_modules"), into, at=listed.parent)


def install(listed: Path, into: str = "node_modules", commands: Collection[list[str]] = ()) -> Path:
    """Install what a file lists, unless that very file was installed before; return where it is.

    Without commands it is npm that installs. One process installs while the others that ask for the
    same packages wait.
    """
    directory = listed.parent / into
    stamp = directory / ".installed"
    with listed.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        digest = hashlib.sha256(file.read()).hexdigest()
        if stamp.exists() and stamp.read_text() == digest:
            return directory
        for command in commands:
            run(*command, at=listed.parent)
        if not commands:
            npm_ci(listed, directory)
        stamp.write_text(digest)
    return directory

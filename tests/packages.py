"""Packages of npm and PyPI that a few tests need, installed once for all processes of a run."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path

from processes import environment

NPM = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
TIME = 300  # seconds that a command may take


def run(*command: str | Path, at: Path, **variables: str) -> str:
    """Run a command that must succeed, and return what it printed."""
    done = subprocess.run(
        command, cwd=at, env=environment(**variables), capture_output=True, text=True, timeout=TIME
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def install(
    listed: Path, into: str = "node_modules", commands: Iterable[list[str]] = (NPM,)
) -> Path:
    """Install what a file lists, unless that very file was installed before; return where it is.

    One process installs while the others that ask for the same packages wait.
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
        stamp.write_text(digest)
    return directory

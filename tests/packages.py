"""Packages of npm and PyPI that a few tests need, installed once for all processes of a run."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path

from processes import environment

NPM = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
INSTALL_TIME = 300  # seconds that a command may take


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
            done = subprocess.run(
                command,
                cwd=listed.parent,
                env=environment(),
                capture_output=True,
                text=True,
                timeout=INSTALL_TIME,
            )
            assert done.returncode == 0, done.stdout + done.stderr
        stamp.write_text(digest)
    return directory

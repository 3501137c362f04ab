"""Waiting for another process, without sleeping longer than it takes."""

from __future__ import annotations

import time
from collections.abc import Callable

DEADLINE = 20  # seconds that anything in the tests may take before it counts as failed


def until(condition: Callable[[], object], why: str, seconds: float = DEADLINE) -> None:
    """Poll until the condition is true; fail if it is not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {why}"
        time.sleep(0.01)

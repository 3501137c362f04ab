"""The names of tokens, database, processes, waiting and wire, for tests that import them here."""

from typing import Any

import database
from database import NEW_TASK, TASK_KEYS, database_url, empty, locked, release, sql, stored
from processes import (
    COLD,
    LISTENING,
    ROOT,
    Child,
    Forking,
    ForkServer,
    Process,
    environment,
    limited,
    traced,
)
from tokens import OTHER_SECRET, SECRET, base64url, bearer, sign, token
from waiting import DEADLINE, until
from wire import Answer, Wire, WireAnswer, ask, assert_problem, at_once, written

__all__ = [
    "COLD",
    "DEADLINE",
    "LISTENING",
    "NEW_TASK",
    "OTHER_SECRET",
    "ROOT",
    "SECRET",
    "TASK_KEYS",
    "Answer",
    "Child",
    "ForkServer",
    "Forking",
    "Process",
    "Wire",
    "WireAnswer",
    "ask",
    "assert_problem",
    "at_once",
    "base64url",
    "bearer",
    "database_url",
    "empty",
    "environment",
    "limited",
    "locked",
    "release",
    "sign",
    "sql",
    "stored",
    "token",
    "traced",
    "until",
    "written",
]


def __getattr__(name: str) -> Any:
    """Return support.postgresql, which is set when the run begins."""
    return getattr(database, name)

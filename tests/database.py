"""The database of a test, read and changed without taskd, on either engine."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waiting import DEADLINE

if TYPE_CHECKING:
    from cluster import Databases

# A task of which only the title is given: the one place in the tests that knows all fields.
NEW_TASK: dict[str, Any] = {
    "description": None,
    "completed": False,
    "priority": None,
    "due_date": None,
    "tags": [],
}
TASK_KEYS = ["id", "user_id", "title", *NEW_TASK, "created_at", "updated_at"]

postgresql: Databases | None = None  # set in a run with --postgresql


def database_url(file: Path) -> str:
    """Return the URL of a database: of this file or, on PostgreSQL, of the one in its place."""
    return postgresql.url(str(file)) if postgresql else f"sqlite:///{file}"


@contextlib.contextmanager
def locked(database: Path) -> Iterator[Any]:
    """Hold the write lock of the database, or PostgreSQL's locks of its tables, without taskd."""
    if postgresql:
        with postgresql.connect(str(database)) as session, session.transaction():
            session.execute("LOCK TABLE task, idempotency_key IN EXCLUSIVE MODE")
            yield session
        return
    with contextlib.closing(
        sqlite3.connect(database, timeout=DEADLINE, isolation_level=None)
    ) as connection:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        finally:
            connection.execute("ROLLBACK")


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row in the form that the API shows."""
    return row | {"tags": json.loads(row["tags"])}


def stored(database: Path) -> dict[int, dict[str, Any]]:
    """Return the tasks of the database by their ids, read without taskd."""
    if postgresql:
        with postgresql.connect(str(database)) as session:
            rows = session.execute(
                f"SELECT {', '.join(TASK_KEYS)} FROM task ORDER BY id"
            ).fetchall()
        return {row[0]: shown(dict(zip(TASK_KEYS, row, strict=True))) for row in rows}
    with contextlib.closing(sqlite3.connect(database, timeout=DEADLINE)) as connection:
        connection.row_factory = sqlite3.Row
        return {
            row["id"]: shown(dict(row))
            for row in connection.execute(f"SELECT {', '.join(TASK_KEYS)} FROM task")
        }


def sql(database: Path, statement: str, *values: object) -> list[Any]:
    """Run a statement without taskd, and return its rows."""
    if postgresql:
        if statement.startswith(("ALTER", "CREATE", "DROP")):
            postgresql.spoiled.add(str(database))
        with postgresql.connect(str(database)) as session:
            cursor = session.execute(statement.replace("?", "%s").encode(), values)
            return cursor.fetchall() if cursor.description else []
    with contextlib.closing(sqlite3.connect(database, timeout=DEADLINE)) as connection, connection:
        return connection.execute(statement, values).fetchall()


def empty(database: Path) -> None:
    """Delete all tasks; the next one has the id 1."""
    if postgresql:
        sql(database, "TRUNCATE task RESTART IDENTITY")
        return
    sql(database, "DELETE FROM task")
    sql(database, "DELETE FROM sqlite_sequence")


def release(database: Path) -> None:
    """Give a PostgreSQL database to another test before this one ends; a file needs nothing."""
    if postgresql:
        postgresql.release(str(database))

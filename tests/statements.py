"""Write tests/statements.sql, the compiled text of every statement of the store: `make statements`.

A statement that both engines have in common stands there once, but for its placeholders.
"""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import peewee

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import taskd  # noqa: E402

FILE = Path(__file__).with_name("statements.sql")
HEAD = """-- The statements that taskd runs for a user, as Peewee compiles them: `make statements`.
-- Where PostgreSQL's text differs it follows. Its placeholders are %(name)s in place of :name.
-- Of the pages of lists there are the orders, and each filter once; filters are joined by AND.
"""


def queries() -> dict[str, Any]:
    """Return the statements of the store by name, with samples of those put together."""
    found = dict(taskd.queries())
    for name in taskd.FIELDS:
        columns = [name, *([f"{name}_folded"] if name in taskd.SEARCHED else [])]
        found[f"change {name}"] = taskd.change_query(*columns)
    for sort, first in itertools.product(taskd.ORDERS, (True, False)):
        found[f"page by {sort}, {'first' if first else 'next'}"] = taskd.page_query(
            (), 0, sort, first
        )
    for sort in ("-id", "-due_date"):
        found[f"page by {sort}, next"] = taskd.page_query((), 0, sort, False)
    found["page with all filters"] = taskd.page_query(tuple(taskd.FILTERS), 2, "id", False)
    return found


def text() -> str:
    """Return the text of the file."""
    parts = [HEAD]
    sqlite = peewee.SqliteDatabase(None)
    postgresql = peewee.PostgresqlDatabase(None)
    for name, query in queries().items():
        statement, other = (taskd.compiled(query, engine) for engine in (sqlite, postgresql))
        parts.append(f"-- {name}\n{broken(statement)};\n")
        if other != statement:
            parts.append(f"-- {name}, on PostgreSQL\n{broken(other)};\n")
    return "\n".join(parts)


def broken(statement: str) -> str:
    """Return a statement with its clauses on lines of their own."""
    return re.sub(
        r" (FROM|WHERE|AND|ORDER BY|LIMIT|SET|VALUES|RETURNING|ON CONFLICT)\b", r"\n  \1", statement
    )


if __name__ == "__main__":
    FILE.write_text(text())

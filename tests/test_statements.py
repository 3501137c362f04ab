"""The store's statements are those of tests/statements.sql, which shows what runs where."""

from __future__ import annotations

import re

import pytest

import statements
import taskd


@pytest.mark.sqlite("it compiles for both engines, and runs nothing")
def test_the_statements_are_those_of_the_file() -> None:
    assert statements.text() == statements.FILE.read_text(), "run: make statements"


def test_a_list_with_all_filters_finds_the_owner_by_the_index(app: taskd.App) -> None:
    filters = tuple(taskd.FILTERS)
    sql = app.store._page(filters, 2, "id", False)
    values = dict.fromkeys(filters, "2026") | {"completed": False, "user_id": "alice"}
    values |= {"last": 0, "limit": 2, "value": None, "tag_0": '"a"', "tag_1": '"b"'}
    explain = "EXPLAIN QUERY PLAN " if isinstance(app.store._database, taskd.Sqlite) else "EXPLAIN "
    run = app.store._database.run
    if explain == "EXPLAIN ":
        with app.store._database.transaction():
            run("SET LOCAL enable_seqscan = off")  # there are no rows, and a scan of none is free
            run("SET LOCAL enable_bitmapscan = off")
            plan = " ".join(str(row[0]) for row in run(explain + sql, **values))
    else:
        plan = " ".join(str(row[3]) for row in run(explain + sql, **values))
    assert re.search("(Index Scan using|SEARCH t1 USING INDEX) task_(completed_)?id", plan), plan
    assert "SCAN t" not in plan
    assert "B-TREE" not in plan, "sorted by id it needs no sorting"
    assert "Sort" not in plan

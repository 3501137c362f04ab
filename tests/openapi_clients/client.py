"""Calls every route of a running taskd with the client that openapi-python-client makes of openapi.json."""

from __future__ import annotations

import os
import re
import sys

from taskd_client import AuthenticatedClient
from taskd_client.api.tasks import (
    complete_task,
    create_task,
    delete_task,
    list_tasks,
    patch_task,
    read_task,
    update_task,
)
from taskd_client.models import (
    Completion,
    ListTasksPriority,
    ListTasksSort,
    NewTask,
    Task,
    TaskChanges,
)
from taskd_client.types import UNSET, Unset


def task_of(answer: object) -> Task:
    assert isinstance(answer, Task), answer
    return answer


def main() -> None:
    client = AuthenticatedClient(os.environ["TASKD_URL"], os.environ["TASKD_TOKEN"])
    with client:
        new = NewTask(title="Buy milk")
        first, again = (
            task_of(create_task.sync("alice", client=client, body=new, idempotency_key="once"))
            for _ in range(2)
        )
        assert first == again
        more = NewTask(title="Call", due_date="2026-12-01", tags=["home", "phone"])
        second = task_of(create_task.sync("alice", client=client, body=more))
        after: str | Unset = UNSET
        seen: list[int] = []
        while True:
            page = list_tasks.sync_detailed(
                "alice", client=client, limit=1, sort=ListTasksSort.DUE_DATE_DESCENDING, after=after
            )
            assert isinstance(page.parsed, list), page
            seen += [task.id for task in page.parsed]
            link = re.search("after=([^&>]+)", page.headers.get("Link", ""))
            if not link:
                break
            after = link[1]
        assert seen == [second.id, first.id]
        found = list_tasks.sync(
            "alice", client=client, tag=["home", "phone"], completed=False, due_before="2027-01-01"
        )
        assert isinstance(found, list)
        assert found[0].tags == ["home", "phone"]
        none = list_tasks.sync("alice", client=client, priority=ListTasksPriority.HIGH)
        assert none == []
        read = read_task.sync_detailed("alice", first.id, client=client)
        tag = read.headers["ETag"]
        known = read_task.sync_detailed("alice", first.id, client=client, if_none_match=tag)
        assert known.status_code == 304
        changes = TaskChanges(description="2 litres")
        put = update_task.sync("alice", first.id, client=client, body=changes, if_match=tag)
        assert task_of(put).description == "2 litres"
        changes = TaskChanges(tags=["x"], priority=None)
        stale = patch_task.sync_detailed(
            "alice", first.id, client=client, body=changes, if_match=tag
        )
        assert stale.status_code == 412
        assert task_of(patch_task.sync("alice", first.id, client=client, body=changes)).tags == [
            "x"
        ]
        for body, done in (Completion(), True), (Completion(completed=True), True):
            answer = complete_task.sync("alice", first.id, client=client, body=body)
            assert task_of(answer).completed is done
        assert task_of(delete_task.sync("alice", first.id, client=client)).id == first.id
        assert read_task.sync_detailed("alice", first.id, client=client).status_code == 404
    sys.stdout.write("all routes\n")


if __name__ == "__main__":
    main()

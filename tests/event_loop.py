"""The event loop without sockets: an application that is called as the server calls it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any, cast

import taskd

Application = Callable[[taskd.App, dict[str, Any], Any], Iterable[bytes]]


def commit(database: taskd.Database) -> bool:
    """Commit what the event loop has written; return False if it was rolled back."""
    calls, taskd.thread_state.after_commit = taskd.thread_state.after_commit, None
    stored = calls is None or cast(taskd.Sqlite, database).commit().result()
    for call in calls if calls and stored else ():
        call()
    return stored


def as_the_event_loop(application: Application) -> Application:
    """Run a request in the event loop and commit it, or run it again in a worker thread."""

    # Falcon's test client counts the parameters without one that is called self.
    def call(self: taskd.App, env: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        body = io.BytesIO(env["wsgi.input"].read(int(env.get("CONTENT_LENGTH") or 0)))
        env["wsgi.input"] = body
        taskd.thread_state.in_event_loop = True
        try:
            answer = application(self, dict(env), start_response)
            if commit(self.database):
                return answer
        except taskd.WouldBlock:
            pass  # it runs again
        finally:
            taskd.thread_state.in_event_loop, taskd.thread_state.after_commit = False, None
        body.seek(0)
        return application(self, env, start_response)

    return call

"""Schemathesis makes valid and invalid calls to a running server and checks every answer.

`make test` runs a few examples of each kind, the same each time; on PostgreSQL, only of the calls
that reach the database. With TASKD_FUZZ_EXAMPLES=500 (`make fuzz`) there are 500 for each operation
and check, and different ones each time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import support
from support import ROOT, Process, environment, token

EXAMPLES = os.environ.get("TASKD_FUZZ_EXAMPLES", "")
FEW = "1"  # example of each kind in `make test`
PEOPLE = ("alice", "bob", "carol")
DAY = 24 * 60 * 60  # seconds that the tokens live: longer than the longest run
PATIENCE = 300 + 30 * int(EXAMPLES or FEW)  # seconds for a run on the slowest machine

# Every check is on, except those that contradict the contract:
COMMON = """
[cache]
enabled = false

# OPTIONS asks about a path, not about a task, and needs no token. If its answer differed for a
# deleted and an existing task, it would show everybody which ids exist.
[[operations]]
include-method = "OPTIONS"
phases.stateful.enabled = false
"""
ALICE = """
hooks = "hooks.py"

[parameters]
"path.user_id" = "alice"

[warnings]
fail-on = true

[auth.wfc]
path = "people.json"
user = "alice"
peers = ["alice", "bob"]  # what one of them may read, the other must not
"""
# A call that the document allows is still rejected if it does not fit what is stored: a key that
# was used for another task, a tag that the task does not have, a cursor that taskd did not make.
HOOKS = """
import uuid

import schemathesis


@schemathesis.hook
def before_call(context, case, kwargs):
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    case.query.pop("after", None)
    if "Idempotency-Key" in case.headers:
        case.headers["Idempotency-Key"] = str(uuid.uuid4())
    if "If-Match" in case.headers:
        case.headers["If-Match"] = "*"
    if case.method.upper() in ("PUT", "PATCH", "DELETE") and "If-None-Match" in case.headers:
        case.headers["If-None-Match"] = '"another"'
    if case.headers.get("If-None-Match") == "0":  # which the coverage phase takes for valid
        case.headers["If-None-Match"] = "*"
"""
CAROL = """
[auth.wfc]
path = "people.json"
user = "carol"
"""
# Every call under /api/ gets this answer. A call that breaks the document may also have no token.
REFUSED = """
[warnings]
enabled = false  # it would warn that every call is refused, which is the point

[[operations]]
include-path-regex = "^/api/"
exclude-method = "OPTIONS"
checks.positive_data_acceptance.expected-statuses = [{status}]
checks.negative_data_rejection.expected-statuses = [{status}, 401]
"""
# The token is checked before all else, even the method (section 4): a caller without access gets
# 401 or 403, never 405. The run with the right token on the right path has this check on.
NO_405 = ["--exclude-checks", "unsupported_method"]
FUZZING = "coverage,fuzzing" if EXAMPLES else "fuzzing"
# A call that does not fit the document is refused before it reaches the database: if it is not, the
# run on SQLite says so. What fits it is what PostgreSQL may take in another way.
STORED = ["--mode", "positive", "--include-path-regex", "^/api/", "--exclude-method", "OPTIONS"]

RUNS: dict[str, tuple[str, list[str]]] = {
    "alice_on_her_own_path": (ALICE + COMMON, ["--phases", "examples,coverage,fuzzing,stateful"]),
    "carol_on_the_paths_of_others": (
        CAROL + REFUSED.format(status=403) + COMMON,
        ["--phases", FUZZING, *NO_405],
    ),
    "nobody_without_a_token": (REFUSED.format(status=401) + COMMON, ["--phases", FUZZING, *NO_405]),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(tmp_path_factory.mktemp("schemathesis"), TASKD_METRICS="1")
    yield process
    process.kill()


@pytest.fixture
def people(tmp_path: Path) -> dict[str, str]:
    """The tokens of two users, in the file that Schemathesis reads."""
    tokens = {name: token(name, exp=int(time.time()) + DAY) for name in PEOPLE}
    logins = [
        {"name": name, "fixedHeaders": [{"name": "Authorization", "value": f"Bearer {text}"}]}
        for name, text in tokens.items()
    ]
    (tmp_path / "people.json").write_text(json.dumps({"auth": logins}))
    return tokens


@pytest.fixture
def schemathesis(
    tmp_path: Path, server: Process
) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(config: str, options: list[str]) -> subprocess.CompletedProcess[str]:
        (tmp_path / "schemathesis.toml").write_text(config)
        (tmp_path / "hooks.py").write_text(HOOKS)
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml"]
        command += [
            "run",
            str(ROOT / "openapi.json"),
            "--url",
            f"http://127.0.0.1:{server.port}",
            "--no-color",
        ]
        command += ["--checks", "all", "--max-examples", EXAMPLES or FEW, "--request-timeout", "20"]
        # With two workers, Python 3.11's parser fails inside Hypothesis now and then.
        command += ["--workers", "1"]
        command += ["--generation-database", "none"] if EXAMPLES else ["--generation-deterministic"]
        settings = environment(
            PYTHONUTF8="1",
            NO_PROXY="127.0.0.1",
            # What Hypothesis knows of Unicode is kept there, and its plugins are not loaded.
            HYPOTHESIS_STORAGE_DIRECTORY=str(ROOT / ".hypothesis"),
            HYPOTHESIS_NO_PLUGINS="1",
        )
        return subprocess.run(
            command + options,
            cwd=tmp_path,
            env=settings,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    return run


REFUSED_EARLY = pytest.mark.sqlite("a call that is refused does not reach the database")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=REFUSED_EARLY if "alice" not in name else ()) for name in RUNS],
)
def test_whatever_is_sent_is_answered_as_the_document_says(name, schemathesis, server, people):
    config, options = RUNS[name]
    few = support.postgresql and not EXAMPLES
    finished = schemathesis(config, options + STORED if few else options)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"Operations:       {9 if few else 27} selected / 27 total" in finished.stdout
    assert "No issues found" in finished.stdout
    assert server.popen.poll() is None
    assert "Traceback" not in server.log
    assert not any(text in server.log for text in people.values())

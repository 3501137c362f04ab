"""A real OpenID Connect issuer other than Better Auth, set up as docs/openid-connect.md says."""

from __future__ import annotations

import json
import re
import select
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from support import DEADLINE, ROOT, Process, assert_problem
from test_better_auth import HERE, installed, needs_node, part

__all__ = ["installed"]
pytestmark = [pytest.mark.sqlite("it is about tokens"), pytest.mark.slow, needs_node]

AUDIENCE = "https://tasks.example.com"
USER = "auth0|5f7c8e"


@pytest.fixture(scope="module")
def issuer(installed: None) -> Iterator[str]:
    popen = subprocess.Popen(
        ["node", "oidc.mjs", AUDIENCE],
        cwd=HERE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert popen.stdin
    assert popen.stdout
    with popen, popen.stdin:
        ready, _, _ = select.select([popen.stdout], [], [], DEADLINE)
        line = popen.stdout.readline() if ready else ""
        assert line.startswith("listening on http://127.0.0.1:"), line
        yield line.removeprefix("listening on ").strip()


def fetched(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=DEADLINE) as answer:
        return json.load(answer)


def test_only_the_access_token_for_this_audience_is_a_login(
    issuer: str, start: Callable[..., Process], tmp_path: Path
) -> None:
    document = fetched(f"{issuer}/.well-known/openid-configuration")
    settings = {"TASKD_JWKS_URL": document["jwks_uri"], "TASKD_ISSUER": document["issuer"]}
    server = start(BETTER_AUTH_SECRET="", TASKD_AUDIENCE=AUDIENCE, **settings)
    tokens = fetched(f"{issuer}/test/login?user={quote(USER)}")
    access = tokens["resource"]["access_token"]
    assert (part(access, 0)["typ"], part(access, 1)["sub"]) == ("at+jwt", USER)

    def answer(token: str, user: str = USER, method: str = "GET", body: object = None) -> Any:
        path = f"/api/{quote(user, safe='')}/tasks"
        return server.request(method, path, body, {"Authorization": f"Bearer {token}"})

    assert answer(access, method="POST", body={"title": "Milk"}).json["user_id"] == USER
    assert [task["title"] for task in answer(access).json] == ["Milk"]
    assert_problem(answer(access, "machine"), 403)
    assert "this is not a JWT" in answer(tokens["plain"]["access_token"]).json["detail"]
    for id_token in (tokens["resource"]["id_token"], tokens["plain"]["id_token"]):
        assert "TASKD_AUDIENCE" in assert_problem(answer(id_token), 401)["detail"]
    assert answer(tokens["machine"]["access_token"], "machine").json == []
    assert "WARNING" not in server.log


def test_without_an_audience_the_id_token_is_a_login_too_and_the_start_warns(
    issuer: str, start: Callable[..., Process]
) -> None:
    server = start(BETTER_AUTH_SECRET="", TASKD_JWKS_URL=f"{issuer}/jwks", TASKD_ISSUER=issuer)
    id_token = fetched(f"{issuer}/test/login?user=alice")["plain"]["id_token"]
    headers = {"Authorization": f"Bearer {id_token}"}
    assert server.request("GET", "/api/alice/tasks", headers=headers).status_code == 200
    assert "tokens of other services are accepted" in server.log


def test_the_page_names_the_algorithms_and_the_issuer_that_are_tested() -> None:
    page = (ROOT / "docs" / "openid-connect.md").read_text()
    packages = json.loads((HERE / "package.json").read_text())["dependencies"]
    tried = re.findall(r"oidc-provider\) ([0-9.]+)", page)
    assert tried == [packages["oidc-provider"].rpartition(".")[0]]

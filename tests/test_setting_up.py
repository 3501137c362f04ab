"""Setting taskd up: names, files and key sets that are wrong, at the start and in taskctl."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from falcon import testing

import taskd
from support import DEADLINE, Process
from test_key_set import NEW, AuthServer, auth_server, signed
from test_login_system import GOOD, ODD

__all__ = ["auth_server"]
pytestmark = pytest.mark.sqlite("it is about settings and keys")

NAMES = {
    "TASKD_CORS_ORIGIN": "TASKD_CORS_ORIGINS",
    "TASKD_PROT": "TASKD_PORT",
    "taskd_port": "TASKD_PORT",
    "TASKD_JWKS": "TASKD_JWKS_URL",
    "TASKD_LOGFORMAT": "TASKD_LOG_FORMAT",
    "TASKD_LOG_LEVEL": "TASKD_LOG",
    "BETTER_AUTH_SECERT": "BETTER_AUTH_SECRET",
    "DATABASE_URI": "DATABASE_URL",
}


@pytest.mark.parametrize(("name", "nearest"), NAMES.items())
@pytest.mark.parametrize("place", ["environment", ".env"])
def test_a_misspelt_name_is_told_with_the_nearest(
    tmp_path: Path, name: str, nearest: str, place: str
) -> None:
    dotenv = tmp_path / ".env"
    if place == ".env":
        dotenv.write_text(f"{name}=x\n")
    environ = {} if place == ".env" else {name: "x"}
    assert taskd.misspelt(environ, dotenv) == [
        f"{name} is not a setting, and is ignored: is {nearest} meant?"
    ]


def test_a_name_that_resembles_none_is_told_only_if_it_is_taskds_own(tmp_path: Path) -> None:
    others = ("BETTER_AUTH_URL", "DATABASE_HOST", "BETTER_AUTH_TRUSTED_ORIGINS", "PATH", "PORT")
    given = dict.fromkeys((*others, "TASKD_QQQQQQQ", "TASKD_WORKERS"), "x") | {"TASKD_EMPTY": ""}
    assert taskd.misspelt(given, tmp_path / ".env") == [
        "TASKD_QQQQQQQ is not a setting, and is ignored",
        "TASKD_WORKERS is not a setting, and is ignored",
    ]


def test_the_start_and_check_warn_of_misspelt_names_and_of_a_dotenv_for_everybody(
    start: Callable[..., Process], taskctl: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("TASKD_PROT=8001\n")
    (tmp_path / ".env").chmod(0o666)
    server = start(TASKD_CORS_ORIGIN="https://a.example")
    for words in (
        "TASKD_PROT is not a setting, and is ignored: is TASKD_PORT meant?",
        "TASKD_CORS_ORIGIN is not a setting, and is ignored: is TASKD_CORS_ORIGINS meant?",
        ".env can be read or changed by every user: chmod 600 .env",
    ):
        assert f" WARNING {words}\n" in server.log
    found = json.loads(taskctl("check", "--json").stdout)
    assert {"result": "warning", "about": "TASKD_PROT"}.items() <= found[0].items()
    assert "is TASKD_PORT meant?" in found[0]["found"]


@pytest.mark.parametrize(
    "line",
    [
        "DATABASE_URL='sqlite:///other.db",
        'DATABASE_URL="sqlite:///other.db',
        "= x",
        "a note",
        "A='x' y",
    ],
)
def test_a_line_of_dotenv_that_cannot_be_parsed_stops_the_start(
    start: Callable[..., Process], taskctl: Callable[..., Any], tmp_path: Path, line: str
) -> None:
    (tmp_path / ".env").write_text(f"TASKD_PORT=0\n{line}\n# the end\n")
    said = ".env, line 2, cannot be parsed: write NAME=value, and close each quote\n"
    server = start(wait=False)
    assert (server.popen.wait(DEADLINE), server.log) == (2, f"taskd: {said}")
    answer = taskctl("init")
    assert (answer.returncode, answer.stderr) == (2, f"taskctl: {said}")
    assert not (tmp_path / "taskd.db").exists()


def test_init_writes_no_secret_where_only_a_key_set_signs(
    taskctl: Callable[..., Any], tmp_path: Path
) -> None:
    before = "TASKD_JWKS_URL=http://127.0.0.1:1/jwks\n"
    (tmp_path / ".env").write_text(before)
    answer = taskctl("init", secret="")
    assert answer.returncode == 0
    assert "no secret is needed" in answer.stderr
    assert (tmp_path / ".env").read_text() == before
    assert (tmp_path / "taskd.db").exists()


@pytest.mark.parametrize("exists", [True, False])
def test_init_does_not_write_through_a_symbolic_link(
    taskctl: Callable[..., Any], tmp_path: Path, exists: bool
) -> None:
    target = tmp_path / "elsewhere"
    if exists:
        target.write_text("TASKD_PORT=8001\n")
        target.chmod(0o644)
    (tmp_path / ".env").symlink_to(target)
    answer = taskctl("init", secret="")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "symbolic link" in answer.stderr
    assert target.exists() == exists
    assert not exists or (target.read_text(), target.stat().st_mode & 0o777) == (
        "TASKD_PORT=8001\n", 0o644,
    )  # fmt: skip


@pytest.mark.parametrize("claim", ["sub=bob", 'sub="bob"', "sub=", "sub=null"])
def test_mint_refuses_another_sub(taskctl: Callable[..., Any], claim: str) -> None:
    answer = taskctl("mint", "alice", "--claim", claim)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "sub" in answer.stderr


def test_verify_asks_the_key_set_once_and_gives_the_right_reason(
    taskctl: Callable[..., Any], auth_server: AuthServer
) -> None:
    wrong = signed(NEW, "EdDSA", "EdDSA")["Authorization"]
    answer = taskctl("verify", wrong, TASKD_JWKS_URL=auth_server.url)
    assert "the signature does not match" in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert auth_server.asked == 1


def test_check_tells_of_a_private_key_in_the_set(
    taskctl: Callable[..., Any], auth_server: AuthServer
) -> None:
    auth_server.keys.append(ODD["private RSA"])
    found = json.loads(taskctl("check", "--json", TASKD_JWKS_URL=auth_server.url).stdout)
    told = [row["found"] for row in found if row["about"] == auth_server.url]
    assert "keys: EdDSA EdDSA, ES256 ES256" in told[0]
    assert "its key number 6 (kid 'odd') is left out: it is private or secret" in told[1]


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("insecure+http://frontend:3000/api/auth/jwks", True),
        ("insecure+http://10.0.0.1/jwks", True),
        ("http://frontend:3000/api/auth/jwks", False),
        ("insecure+https://frontend/jwks", False),
        ("insecure+http://", False),
        ("https://auth.example:99999/jwks", False),
        ("https://auth.example:0/jwks", False),
        ("https://auth.example:x/jwks", False),
        ("https://:3000/jwks", False),
    ],
)
def test_plain_http_inside_a_private_network_must_be_meant(
    tmp_path: Path, url: str, allowed: bool
) -> None:
    expected = contextlib.nullcontext() if allowed else pytest.raises(taskd.SettingsError)
    with expected:
        settings = taskd.Settings.load({"TASKD_JWKS_URL": url}, tmp_path / ".env")
        assert settings.jwks_url == url


def test_a_set_that_is_meant_to_be_plain_http_is_fetched(
    make_app: Callable[..., taskd.App], auth_server: AuthServer
) -> None:
    client = testing.TestClient(make_app(jwks_url=f"insecure+{auth_server.url}"))
    assert client.simulate_get("/api/alice/tasks", headers=GOOD).status_code == 200

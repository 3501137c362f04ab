"""What the tests share: tokens made without taskd's own code, and real taskd processes on real sockets."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SECRET = "a-secret-for-the-tests-of-at-least-32-bytes"
OTHER_SECRET = "another-secret-of-at-least-32-bytes-indeed"
TASK_KEYS = ["id", "user_id", "title", "description", "completed", "created_at", "updated_at"]
DEADLINE = 20  # seconds that anything here may take before it counts as failed


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def sign(header: object, payload: object, secret: str = SECRET) -> str:
    """Return a compact JWS of any header and payload, HMAC SHA-256; bytes are taken as they are, others as JSON."""
    parts = [base64url(part if isinstance(part, bytes) else json.dumps(part).encode()) for part in (header, payload)]
    signing_input = ".".join(parts)
    return f"{signing_input}.{base64url(hmac.digest(secret.encode(), signing_input.encode(), hashlib.sha256))}"


def token(user: str = "alice", secret: str = SECRET, **claims: object) -> str:
    """Return a token as Better Auth's own would be; a claim that is None is left out."""
    now = int(time.time())
    claims = {"sub": user, "iat": now, "exp": now + 900, "email": f"{user}@example.com", "name": user} | claims
    return sign(
        {"alg": "HS256", "typ": "JWT"}, {name: value for name, value in claims.items() if value is not None}, secret
    )


def bearer(user: str = "alice", **claims: object) -> dict[str, str]:
    return {"Authorization": f"Bearer {token(user, **claims)}"}


def assert_problem(response: Any, status: int) -> dict[str, Any]:
    """Check the shape of an error (contract, section 6) and return its body. Takes falcon's results and ours."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = json.loads(response.text)
    assert set(body) <= {"title", "status", "detail", "errors"}, body
    assert body["status"] == status
    assert isinstance(body["title"], str)
    assert body["title"]
    assert ("errors" in body) == (status == 422), body
    return body


def environment(**variables: str) -> dict[str, str]:
    """Return a process environment with these variables and none of taskd's own that happen to be set here."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TASKD_", "BETTER_AUTH", "DATABASE_URL"))
    }
    return kept | variables


class Answer:
    """An HTTP answer off a socket, with the names that falcon's test results have."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status_code = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.content = response.read()

    @property
    def text(self) -> str:
        return self.content.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.content)


class Process:
    """A taskd process of its own, in a directory of its own."""

    def __init__(
        self, directory: Path, *, wait: bool = True, command: list[str] | None = None, **variables: str
    ) -> None:
        defaults = {"BETTER_AUTH_SECRET": SECRET, "TASKD_PORT": "0"}
        self.log_path = directory / f"stderr-{time.monotonic_ns()}.log"
        with self.log_path.open("wb") as log:
            self.popen = subprocess.Popen(
                [*(command or []), sys.executable, str(ROOT / "taskd.py")],
                cwd=directory,
                env=environment(**(defaults | variables)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.port = self._wait_for_port() if wait else 0

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def _wait_for_port(self) -> int:
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline and self.popen.poll() is None:
            if started := re.search(r"^taskd: listening on http://.*:(\d+)", self.log, re.MULTILINE):
                return int(started[1])
            time.sleep(0.01)
        self.kill()
        raise AssertionError(f"taskd did not start: {self.log}")

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: dict[str, str] | None = None,
        timeout: float = DEADLINE,
    ) -> Answer:
        """Send one request on a connection of its own; a body that is no bytes goes as JSON."""
        headers = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers)
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def terminate(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(DEADLINE)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(DEADLINE)

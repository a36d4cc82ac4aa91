"""The ledger of several gateways: PostgreSQL for rows, a store of objects for routing rows and blobs.

    append_turn ─▶ object: noted, uploaded ─▶ writer's thread: BEGIN · lock session · rows … COMMIT ─▶ futures resolve

Every gateway process has a writer of its own; an advisory lock on each session and consumer makes their transactions
take turns where they meet and nowhere else. Two transactions that wait for each other are told so by the server, and
their operations run again, each alone. A connection that breaks comes back by itself: what had not reached COMMIT runs
again, what was in COMMIT is a LedgerError (503), because nobody can know; it is whole or not there, and repeating it is
safe.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Self

import psycopg
from obstore.exceptions import BaseError
from psycopg import errors, pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.types.string import StrDumperUnknown, TextBinaryLoader, TextLoader

from gateway.contracts.errors import (
    ConfigurationError,
    LedgerCorrupt,
    LedgerError,
    LedgerFull,
    SchemaMismatch,
    VerbatimError,
)
from gateway.contracts.records import SCHEMA_VERSION
from gateway.contracts.rollouts import Reclaimed, StoreUsage
from gateway.ledger import register, schema
from gateway.ledger.backend import Connection, Rows, Value
from gateway.ledger.objects import OBJECT_FAILURES, ObjectArrays, ObjectBlobs, Objects, open_objects
from gateway.ledger.register import GRACE_SECONDS, ObjectRegister, SweepReport
from gateway.ledger.reserve import Room, is_disk_full
from gateway.ledger.store import SqlLedger

_log = logging.getLogger(__name__)

_CONNECT_SECONDS = 5
_PATIENCE_SECONDS = 10.0
_RECONNECT_PAUSE_SECONDS = 0.1
_COLUMN_TYPES = schema.ColumnTypes(text='TEXT COLLATE "C"', data="BYTEA", place='TEXT COLLATE "C"')
_MET_ANOTHER = (errors.DeadlockDetected, errors.SerializationFailure, errors.LockNotAvailable, errors.UniqueViolation)
_DAMAGED = (errors.DataCorrupted, errors.IndexCorrupted)

_SESSION_SETTINGS = """
    SET client_encoding = 'UTF8';
    SET lock_timeout = '1s';
    SET idle_in_transaction_session_timeout = '4s';
    SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'
"""
"""Of every connection: a gateway that hangs inside a transaction loses it, before those that wait for its locks have
tried for the last time; and a commit is on disk when it returns (I4), whatever the server's default."""

_MIGRATIONS: Mapping[int, Sequence[str]] = {}
"""Version → the statements that make the next one of it. 3 is the first that this store has had."""


class ConnectionLost(errors.OperationalError):
    """The connection broke inside a transaction, before COMMIT: nothing of it is stored."""


class PostgresLedger(SqlLedger):
    """`gateway.contracts.ports.Ledger` that several gateways share; make it with `open`, end it with `aclose`."""

    _store: PostgresBackend

    @classmethod
    def open(cls, dsn: str, objects: str, *, read_only: bool = False, full_wait_seconds: float = 0.0) -> Self:
        """Open or make the ledger in a database; blocks for a moment.

        dsn: `postgresql://user@host:port/database`, without the password: libpq takes it from PGPASSWORD or PGPASSFILE.
        objects: `s3://bucket/prefix` or `file:///folder`. full_wait_seconds: how long a turn that was sampled waits for
        room on a full disk. Raises ConfigurationError if the database or the objects cannot be used, SchemaMismatch for
        a store of another version.
        """
        ledger_objects = open_objects(objects, read_only=read_only)
        backend = PostgresBackend(dsn, ledger_objects, read_only=read_only)
        ledger = cls(backend, Room(wait_seconds=full_wait_seconds))
        ledger._store = backend
        return ledger

    def sweep_objects(self, *, grace_seconds: float = GRACE_SECONDS) -> SweepReport:
        """Remove objects that nothing refers to and nobody stored within `grace_seconds`; blocks. It is done from time
        to time without being asked."""
        return self._store.register.sweep(grace_seconds=grace_seconds)

    async def usage(self) -> StoreUsage:
        """What the tables and the objects take; the server's log, which all of its databases share, is not counted."""
        return await self._read(_usage)

    async def reclaim(self) -> Reclaimed:
        """Remove objects that nothing refers to any more and nobody has just stored; the server itself looks after the
        space in its tables."""
        if self._store.read_only:
            return Reclaimed()
        return Reclaimed(*await self._in_thread(self.sweep_objects))


class PostgresBackend:
    """`gateway.ledger.backend.Backend` on a server."""

    shared = True
    alone_in_transaction = False
    failures: tuple[type[Exception], ...] = (psycopg.Error, *OBJECT_FAILURES)

    def __init__(self, dsn: str, objects: Objects, *, read_only: bool) -> None:
        """Raises ConfigurationError if the server or the database cannot be used, SchemaMismatch."""
        self._conninfo = _checked_conninfo(dsn)
        self.name = dsn
        self.read_only = read_only
        _prepare(self._conninfo, dsn, read_only=read_only)
        self.register = ObjectRegister(lambda: self.connect(read_only=read_only), objects, self.failures)
        self.arrays = ObjectArrays(objects, self.register)
        self.blobs = ObjectBlobs(objects, self.register)
        if not read_only:
            self.register.start_sweeping()

    def connect(self, *, read_only: bool) -> PostgresConnection:
        """Another connection."""
        return PostgresConnection(self._conninfo, read_only=read_only)

    def translate(self, error: Exception) -> VerbatimError:
        """What happened is logged; what an agent reads names no host, no user and no bucket."""
        if isinstance(error, VerbatimError):
            return error
        _log.warning("ledger: %s: %s", type(error).__name__, _first_line(error))
        if is_disk_full(error) or isinstance(error, errors.DiskFull):
            return LedgerFull("the ledger's disk is full; what adds to it is taken again when there is room")
        if isinstance(error, _DAMAGED):
            return LedgerCorrupt(f"the ledger's database is damaged: {error.diag.message_primary}")
        if isinstance(error, errors.ForeignKeyViolation):
            return LedgerError("storing took so long that its arrays were cleared away; try again")
        if isinstance(error, psycopg.OperationalError):
            return LedgerError("the ledger's database cannot be reached, or is overloaded; try again")
        if isinstance(error, BaseError):
            return LedgerError("the ledger's object store cannot be used; try again")
        if isinstance(error, OSError):
            return LedgerError(
                f"the ledger's objects cannot be used ({error.strerror or type(error).__name__}); try again"
            )
        return LedgerError(f"the ledger cannot be used: {error}")

    def met_another(self, error: Exception) -> bool:
        """Deadlocks and their like, and a connection that was lost before COMMIT."""
        return isinstance(error, (*_MET_ANOTHER, ConnectionLost))

    def unclaimed_blobs(self) -> Sequence[str]:
        """None: the register knows them."""
        return ()

    def keep_house(self, connection: Connection) -> None:
        """The server does."""

    def free_space(self, connection: Connection, blobs: Iterable[str]) -> None:
        """Left to the sweep: another gateway may just be storing the same content again."""

    def close(self) -> None:
        """End the sweep and its connections."""
        self.register.close()


class PostgresConnection:
    """`gateway.ledger.backend.Connection` on a server; used by one thread at a time.

    Outside of a transaction a broken connection is opened anew, with patience for a server that restarts: all that wait
    share one span of `_PATIENCE_SECONDS` from the loss on, after which every attempt is a single one.
    """

    def __init__(self, conninfo: str, *, read_only: bool) -> None:
        self._conninfo = conninfo
        self._read_only = read_only
        self._lost_at: float | None = None
        self._connection = _connect(conninfo, read_only=read_only)

    @property
    def in_transaction(self) -> bool:
        """Whether BEGIN was said and neither side has ended it; also after an error that only a rollback mends."""
        status = self._connection.info.transaction_status
        return status in (pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR)

    def wait_for_turn(self) -> None:
        """Nothing to wait for: transactions write beside each other."""

    def begin(self) -> None:
        """Start a transaction; each of its statements sees what has been committed by then."""
        self.execute("BEGIN ISOLATION LEVEL READ COMMITTED")

    def commit(self) -> None:
        """Returns when it is on disk; raises LedgerError where the answer was lost."""
        try:
            ended = self._connection.execute("COMMIT").statusmessage
        except errors.IdleInTransactionSessionTimeout as error:  # this process hung, and the server rolled back
            raise ConnectionLost(str(error)) from error
        except psycopg.Error as error:
            if not self._is_broken():
                raise
            raise LedgerError("the ledger's database went away during a commit; try again") from error
        if ended != "COMMIT":  # of a transaction that had failed, COMMIT makes a rollback without a word
            raise LedgerError("the ledger's transaction had failed and was rolled back")

    def rollback(self) -> None:
        """Forget the transaction; fine if there is none."""
        if self.in_transaction:
            try:
                self._connection.execute("ROLLBACK")
            except psycopg.Error:
                self._connection.close()  # the server forgets it too

    def execute(self, sql: str, parameters: Sequence[Value] = ()) -> Rows:
        """Run one statement; `?` stands for a parameter."""
        if self.in_transaction:
            try:
                return self._run(sql, parameters)
            except psycopg.Error as error:
                if self._is_broken():
                    raise ConnectionLost(str(error)) from error
                raise
        return self._run_with_patience(sql, parameters)

    def executemany(self, sql: str, parameters: Iterable[Sequence[Value]]) -> None:
        """Run one statement for each row of parameters, inside a transaction."""
        try:
            with self._connection.cursor() as cursor:
                cursor.executemany(_translated(sql), parameters)
        except psycopg.Error as error:
            if self._is_broken():
                raise ConnectionLost(str(error)) from error
            raise

    def lock(self, name: str) -> None:
        """Hold `name` until the transaction ends; names may share a lock by chance, which costs a wait only."""
        self.execute("SELECT pg_advisory_xact_lock(hashtextextended(?, 0))", (name,))

    def close(self) -> None:
        """Say goodbye; repeating it is fine."""
        self._connection.close()

    def _run(self, sql: str, parameters: Sequence[Value]) -> Rows:
        return self._connection.execute(_translated(sql), parameters, binary=True)

    def _run_with_patience(self, sql: str, parameters: Sequence[Value]) -> Rows:
        """Statements outside of transactions are safe to run twice: reads, BEGIN, notes of the register."""
        while True:
            try:
                if self._is_broken():
                    self._connection = _connect(self._conninfo, read_only=self._read_only)
                result = self._run(sql, parameters)
            except psycopg.Error:
                if not self._is_broken():
                    raise
                now = time.monotonic()
                self._lost_at = now if self._lost_at is None else self._lost_at
                if now > self._lost_at + _PATIENCE_SECONDS:
                    raise
                time.sleep(_RECONNECT_PAUSE_SECONDS)
            else:
                self._lost_at = None
                return result

    def _is_broken(self) -> bool:
        return self._connection.closed or self._connection.info.transaction_status is pq.TransactionStatus.UNKNOWN


class _EscapingDumper(StrDumperUnknown):
    """Texts as a server takes them that knows neither NUL nor lone surrogates."""

    def dump(self, obj: str) -> Any:
        return super().dump(escape_text(obj))


class _UnescapingLoader(TextLoader):
    def load(self, data: Any) -> Any:
        return unescape_text(str(super().load(data)))


class _UnescapingBinaryLoader(TextBinaryLoader):
    def load(self, data: Any) -> Any:
        return unescape_text(str(super().load(data)))


_ESCAPE = "\x01"
_TO_ESCAPE = re.compile("[\x00\x01\ud800-\udfff]")
_ESCAPED = re.compile("\x01([\x02\x03]|\x04[0-9a-f]{4})")


def escape_text(text: str) -> str:
    """A text without NUL and lone surrogates, another one for every other text.

    Texts sort as before (surrogates aside): NUL and its successor are two characters that start with the latter.
    """
    return _TO_ESCAPE.sub(_escape_character, text)


def unescape_text(text: str) -> str:
    """What `escape_text` was given."""
    return _ESCAPED.sub(_unescape_character, text) if _ESCAPE in text else text


def _escape_character(found: re.Match[str]) -> str:
    character = found[0]
    short = {"\x00": "\x02", "\x01": "\x03"}
    return _ESCAPE + (short[character] if character in short else f"\x04{ord(character):04x}")


def _unescape_character(found: re.Match[str]) -> str:
    code = found[1]
    return {"\x02": "\x00", "\x03": "\x01"}[code] if len(code) == 1 else chr(int(code[1:], 16))


@lru_cache(maxsize=512)
def _translated(sql: str) -> bytes:
    """The ledger's SQL with psycopg's placeholders; there is no other `?` or `%` in it."""
    return sql.replace("?", "%s").encode()


def _connect(conninfo: str, *, read_only: bool) -> psycopg.Connection[Any]:
    connection = psycopg.connect(conninfo, autocommit=True)
    connection.adapters.register_dumper(str, _EscapingDumper)
    connection.adapters.register_loader("text", _UnescapingLoader)
    connection.adapters.register_loader("text", _UnescapingBinaryLoader)
    try:
        connection.execute(_SESSION_SETTINGS)
        if read_only:
            connection.execute("SET default_transaction_read_only = on")
    except BaseException:
        connection.close()
        raise
    return connection


def _checked_conninfo(dsn: str) -> str:
    """libpq's form of the URL, with our patience where the URL says nothing; raises ConfigurationError."""
    if not dsn.startswith(("postgresql://", "postgres://")):
        raise ConfigurationError("ledger: write it as postgresql://USER@HOST:PORT/DATABASE")
    try:
        given = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError as error:
        raise ConfigurationError(f"ledger: no PostgreSQL URL ({_first_line(error)})") from error
    if "password" in given:
        raise ConfigurationError(
            "ledger: leave the password out of the URL, which is shown and logged; set PGPASSWORD or PGPASSFILE"
        )
    defaults: dict[str, Any] = {
        "connect_timeout": _CONNECT_SECONDS,
        "application_name": "verbatim",
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 20_000,
    }
    return make_conninfo("", **(defaults | given))


def _usage(connection: Connection) -> StoreUsage:
    tables, objects, routing, blobs = map(
        int,
        connection.execute(
            """SELECT (SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0) FROM pg_class c
                       WHERE c.relkind = 'r' AND c.relnamespace = current_schema()::regnamespace),
                      (SELECT coalesce(sum(num_bytes), 0) FROM objects),
                      (SELECT coalesce(sum(experts_bytes), 0) FROM turns),
                      (SELECT coalesce(sum(once.num_bytes), 0)
                       FROM (SELECT max(num_bytes) AS num_bytes FROM blobs GROUP BY sha256) AS once)"""
        ).fetchone(),
    )
    return StoreUsage(
        rows_bytes=tables,
        reusable_bytes=0,
        log_bytes=0,
        routing_bytes=objects - blobs,
        dead_routing_bytes=objects - blobs - routing,
        blob_bytes=blobs,
    )


def _prepare(conninfo: str, name: str, *, read_only: bool) -> None:
    """Make the tables of an empty database or check those that are there; two gateways may start at once."""
    try:
        connection = PostgresConnection(conninfo, read_only=read_only)
    except psycopg.OperationalError as error:
        raise ConfigurationError(f"ledger {name}: {_first_line(error)}") from error
    try:
        _check_server(connection, name)
        connection.begin()
        connection.lock("schema")
        _prepare_tables(connection, name, read_only=read_only)
        connection.commit()
    except psycopg.Error as error:
        raise ConfigurationError(f"ledger {name}: cannot be used ({_first_line(error)})") from error
    finally:
        connection.close()


def _first_line(error: Exception) -> str:
    """What happened; the server's and libpq's hints and positions stand on lines of their own."""
    return str(error).strip().split("\n", 1)[0]


def _check_server(connection: PostgresConnection, name: str) -> None:
    encoding, fsync = connection.execute(
        "SELECT current_setting('server_encoding'), current_setting('fsync')"
    ).fetchone()
    if encoding != "UTF8":
        raise ConfigurationError(f"ledger {name}: the database has encoding {encoding}; make one with ENCODING 'UTF8'")
    if fsync != "on":
        _log.warning("ledger %s: the server runs with fsync off; a crash of its machine may lose what was stored", name)


def _prepare_tables(connection: PostgresConnection, name: str, *, read_only: bool) -> None:
    version = _version(connection, name)
    if version is None and read_only:
        raise ConfigurationError(f"ledger {name}: the database holds no ledger")
    if version is None:
        for statement in (*schema.tables(_COLUMN_TYPES), *register.TABLES):
            connection.execute(statement)
        connection.execute("CREATE TABLE verbatim_ledger (schema_version BIGINT NOT NULL)")
        connection.execute("INSERT INTO verbatim_ledger VALUES (?)", (SCHEMA_VERSION,))
        return
    while version != SCHEMA_VERSION:
        if read_only or version not in _MIGRATIONS:
            raise SchemaMismatch(
                f"ledger {name} has schema version {version}, this program reads {SCHEMA_VERSION}; "
                "use the version of Verbatim that wrote it, or another database"
            )
        for statement in _MIGRATIONS[version]:
            connection.execute(statement)
        version += 1
        connection.execute("UPDATE verbatim_ledger SET schema_version = ?", (version,))


def _version(connection: PostgresConnection, name: str) -> int | None:
    """None in a database without a ledger; raises ConfigurationError for one that holds other tables of our names."""
    found = {
        table
        for (table,) in connection.execute(
            "SELECT tablename::text FROM pg_tables WHERE schemaname = current_schema() "
            "AND tablename IN ('verbatim_ledger', 'sessions', 'turns', 'objects')"
        )
    }
    if "verbatim_ledger" in found:
        return int(connection.execute("SELECT schema_version FROM verbatim_ledger").fetchone()[0])
    if found:
        names = ", ".join(sorted(found))
        raise ConfigurationError(f"ledger {name}: the database holds tables of another program ({names})")
    return None

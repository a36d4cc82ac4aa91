"""The embedded ledger: SQLite (WAL, synchronous=FULL) for rows, segment files for routing rows, one folder, no server.

    data/ledger.lock      held by the one gateway that writes; its pid inside
    data/ledger.sqlite    sessions, turns, finishes, leases, policies
    data/routing/*.seg    routing rows (segments_file.py)
    data/blobs/*          images and other bytes that messages refer to (blobs.py)

While one gateway hands over to the next, both write: the lock's descriptor is passed on, SQLite lets one transaction
write at a time, and each process appends to a segment file of its own.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Self

from gateway.contracts.errors import ConfigurationError, LedgerCorrupt, LedgerError, LedgerFull, VerbatimError
from gateway.contracts.rollouts import Compressed, Reclaimed, StoreUsage
from gateway.ledger import migration
from gateway.ledger.backend import Buffer, Connection, Location, Rows, Value
from gateway.ledger.blobs import BlobFiles
from gateway.ledger.checkpoints import WITHOUT_US_PAGES, Checkpoints
from gateway.ledger.compaction import (
    FULL_BYTES,
    LiveRecord,
    Packed,
    chunks,
    live_bytes,
    live_records,
    mostly_dead,
    move,
    pack_records,
    point_to,
)
from gateway.ledger.packing import is_worth_packing
from gateway.ledger.reserve import Room, SpaceReserve, is_disk_full
from gateway.ledger.rows import decode_json
from gateway.ledger.segments_file import (
    SegmentFileWriter,
    file_sizes,
    is_held,
    is_packed,
    read_record,
    read_stored,
    sync_folder,
)
from gateway.ledger.store import Result, SqlLedger
from gateway.ledger.wal import check_log
from gateway.ledger.write_turn import WriteTurn

_log = logging.getLogger(__name__)

_BUSY_TIMEOUT_SECONDS = 30.0
_PAGES_AT_ONCE = 500
_LOWEST_PRIORITY = 19
_KEPT_LOG_BYTES = 16 * 2**20
"""To which the write-ahead log is cut after a burst has let it grow."""

_PAGE_BYTES = 8192
"""Of a new store: three small turns share a page, of SQLite's own 4096 each would take one."""


class SqliteLedger(SqlLedger):
    """`gateway.contracts.ports.Ledger` on a local disk; make it with `open`, end it with `aclose`."""

    def __init__(self, backend: SqliteBackend, room: Room) -> None:
        """Use `open`."""
        super().__init__(backend, room)
        self._files = backend
        self._needs_no_packing: set[int] = set()
        """Files that were looked at and are packed, or would not become smaller."""

    @classmethod
    def open(
        cls,
        data: Path,
        *,
        read_only: bool = False,
        lock: int | None = None,
        is_alone: bool = False,
        reserve: SpaceReserve | None = None,
        full_wait_seconds: float = 0.0,
    ) -> Self:
        """Open or make the ledger in folder `data`; blocks for a moment.

        `read_only` takes no lock and makes nothing, so that another program can look while a gateway runs.
        `lock`: a descriptor of the folder's lock (`lock_descriptor`) that the process which holds it has passed on; it
        belongs to this ledger then, and the other one may go on writing. Such a ledger starts out as `shared`.
        `is_alone`: whoever passed the lock on does not have the ledger open now, so that what a crash left is mended.
        reserve: what is given up when the disk is full; full_wait_seconds: how long a sampled turn waits for room then.
        Raises ConfigurationError if the folder cannot be used or another process writes to it, SchemaMismatch for a
        store of another version, LedgerCorrupt for one that cannot be read.
        """
        backend = SqliteBackend.open(data, read_only=read_only, lock=lock, is_alone=is_alone, reserve=reserve)
        arrays = backend.arrays
        return cls(backend, Room(reserve, arrays.begin, arrays.forget, full_wait_seconds))

    @property
    def lock_descriptor(self) -> int | None:
        """What a process that takes over needs (None when open for reading only); it stays this ledger's to close."""
        return self._files.lock

    def share(self, shared: bool) -> None:
        """Say whether another process writes too, from now on (`shared`)."""
        self._files.shared = shared

    async def usage(self) -> StoreUsage:
        """What the folder's files take, by kind."""

        def read(connection: Connection) -> StoreUsage:
            (num_free,) = connection.execute("PRAGMA freelist_count").fetchone()
            (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
            live = sum(live_bytes(connection).values())
            return self._files.usage(reusable_bytes=num_free * page_bytes, live_routing_bytes=live)

        return await self._read(read)

    async def reclaim(self) -> Reclaimed:
        """Compact segment files of which most is dead, and give back the database's empty pages, a little at a time.

        Files that another process appends to are left to it.
        """
        before, num_files = await self._footprint()
        num_moved = await self._compact()
        has_more = True
        while has_more:  # between two steps turns are written
            has_more = await self._write(_give_back_pages)
        await self._free_files()
        after, num_files_after = await self._footprint()
        return Reclaimed(max(0, num_files - num_files_after), before - after, num_moved)

    async def _free_files(self) -> None:
        """Have the writer's housekeeping remove files and merge the log; it is done when this returns."""
        self._space_was_freed = True
        await self._write(lambda connection: None)  # which is answered before the housekeeping behind its commit
        await self._write(lambda connection: None)

    async def _compact(self) -> int:
        """How many bytes were moved; a file that holds a damaged record, or for which there is no room, stays."""
        arrays = self._files.arrays
        sizes, live = await self._read(lambda connection: (arrays.sizes(), live_bytes(connection)))
        num_moved = 0
        for number in mostly_dead(sizes, live):
            try:
                if number != arrays.number and arrays.is_held(number):
                    continue
                if number == arrays.number:
                    await self._write(lambda connection: arrays.begin_next())
                for part in chunks(await self._read(partial(live_records, number=number))):
                    num_moved += await self._write(partial(move, arrays=arrays, records=part), grows=True)
            except (LedgerCorrupt, LedgerFull) as error:
                _log.warning("segment file %d is not compacted: %s", number, error)
        return num_moved

    async def compress(self, *, bytes_per_second: float, full_bytes: int = FULL_BYTES) -> Compressed:
        """Pack the rows of segment files that are full, at no more than this pace; may take long.

        full_bytes: from which size on the file that is appended to is closed as well.

        Nobody waits for it: the work is done in a thread that runs when no other wants to, and the writer's thread only
        notes where the rows are now. Files of a store that an older program may still have open stay as they are.
        """
        done = Compressed()
        arrays, packing = self._files.arrays, self._files.packing
        if packing is None or not await self._read(migration.may_pack):
            return done
        if arrays.num_bytes >= full_bytes:
            await self._write(lambda connection: arrays.begin_next())
        numbers = sorted(await self._read(live_bytes))
        self._needs_no_packing &= set(numbers)
        for number in numbers:
            if number in self._needs_no_packing or number == arrays.number or arrays.is_held(number):
                continue
            try:
                done += await self._compress_file(number, packing, bytes_per_second)
            except LedgerCorrupt as error:
                _log.warning("segment file %d is not packed: %s", number, error)
            self._needs_no_packing.add(number)
        if done.num_records:
            await self._free_files()
        return done

    async def _compress_file(self, number: int, packing: Packing, bytes_per_second: float) -> Compressed:
        records = await self._read(partial(live_records, number=number))
        done = Compressed()
        if not records or not await self._in_thread(partial(packing.is_worth, records[0], records[-1])):
            return done
        for part in chunks(records):
            began = time.monotonic()
            packed = await self._on(packing.thread, partial(packing.append, part))
            num_saved = await self._write(partial(point_to, packed=packed), grows=True)
            num_bytes = sum(record.location.num_bytes for record in part)
            done += Compressed(len(part), num_bytes, num_saved)
            if bytes_per_second:
                await asyncio.sleep(max(0.0, num_bytes / bytes_per_second - (time.monotonic() - began)))
        return done

    async def _on(self, thread: Executor, work: Callable[[], Result]) -> Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, work)
        except self._files.failures as error:
            raise self._files.translate(error) from error

    async def _footprint(self) -> tuple[int, int]:
        """Bytes and number of all files."""
        usage = await self.usage()
        num_files = await self._read(lambda connection: self._files.num_files())
        return usage.rows_bytes + usage.log_bytes + usage.routing_bytes + usage.blob_bytes, num_files


class SqliteConnection:
    """`gateway.ledger.backend.Connection` on a SQLite file."""

    def __init__(self, raw: sqlite3.Connection, turn: WriteTurn | None = None) -> None:
        """`raw` in autocommit mode, usable by any thread (one at a time, which the callers see to); it is closed here,
        and so is `turn`, without which nothing is written."""
        self._raw = raw
        self._turn = turn

    @property
    def in_transaction(self) -> bool:
        return self._raw.in_transaction

    def wait_for_turn(self) -> None:
        if self._turn is not None:
            self._turn.take()

    def begin(self) -> None:
        self.wait_for_turn()
        try:
            self._raw.execute("BEGIN IMMEDIATE")
        except sqlite3.Error:
            self._end()
            raise

    def commit(self) -> None:
        self._raw.execute("COMMIT")  # after a failure the transaction is open still, for `rollback`
        self._end()

    def rollback(self) -> None:
        try:
            if self._raw.in_transaction:
                self._raw.execute("ROLLBACK")
        finally:
            self._end()

    def _end(self) -> None:
        if self._turn is not None:
            self._turn.give()

    def execute(self, sql: str, parameters: Sequence[Value] = ()) -> Rows:
        return self._raw.execute(sql, parameters)

    def executemany(self, sql: str, parameters: Iterable[Sequence[Value]]) -> None:
        self._raw.executemany(sql, parameters)

    def lock(self, name: str) -> None:
        """Nothing to do: `begin` waits until no other transaction writes."""

    def close(self) -> None:
        self._raw.close()
        if self._turn is not None:
            self._turn.close()
            self._turn = None


class Packing:
    """The thread that packs records, and the file into which it does; made when first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SegmentFileWriter | None = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="ledger-packing", initializer=_step_back)

    def is_worth(self, first: LiveRecord, last: LiveRecord) -> bool:
        """Whether a file of these records is not packed yet, and gets smaller. Both, as a file may begin with packed
        ones that were moved there. Raises LedgerCorrupt."""
        for record in (first, last):
            if not is_packed(self._folder, record.location):
                return self._shrinks(record)
        return False

    def append(self, records: Sequence[LiveRecord]) -> list[Packed]:
        """Pack records; durable when it returns. Raises LedgerCorrupt, OSError."""
        if self._writer is None:
            self._writer = SegmentFileWriter(self._folder)
            self._writer.begin_next()  # what another process has left behind stays of one kind
        return pack_records(self._folder, self._writer, records)

    def close(self) -> None:
        """Wait for the thread, close the file."""
        self.thread.shutdown(wait=True)
        if self._writer is not None:
            self._writer.close()

    def _shrinks(self, record: LiveRecord) -> bool:
        name = f"session {record.session_id} turn {record.turn_id}"
        key, payload, _ = read_stored(self._folder, record.location, name=name)
        return is_worth_packing(payload, decode_json(key))


def _step_back() -> None:
    """On Linux a thread has a priority of its own."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)


class SegmentFiles:
    """`gateway.ledger.backend.ArrayStore` on a folder of segment files."""

    before_transaction = False

    def __init__(self, folder: Path, writer: SegmentFileWriter | None) -> None:
        """`writer` is None for reading only."""
        self._folder = folder
        self._writer = writer

    def append(self, key: bytes, payload: Buffer) -> Location:
        """Store one record; durable after `flush`. Raises OSError."""
        assert self._writer is not None
        return self._writer.append(key, payload)

    def begin(self) -> None:
        """What is appended from here on belongs together."""
        if self._writer is not None:
            self._writer.begin()

    def forget(self) -> None:
        """Cut off what was appended since `begin`."""
        if self._writer is not None:
            self._writer.forget()

    def flush(self) -> None:
        """Make durable what was appended."""
        if self._writer is not None:
            self._writer.flush()

    def read(self, location: Location, *, name: str) -> tuple[bytes, memoryview]:
        """Key and payload; raises LedgerCorrupt saying `name`."""
        return read_record(self._folder, location, name=name)

    def copy(self, location: Location, *, name: str) -> Location:
        """Append a record once more, as it is; raises LedgerCorrupt saying `name`, OSError."""
        assert self._writer is not None
        key, payload, is_packed = read_stored(self._folder, location, name=name)
        return self._writer.append(key, payload, is_packed=is_packed)

    def is_held(self, number: int) -> bool:
        """Whether somebody appends to a file."""
        return is_held(self._folder, number)

    @property
    def num_bytes(self) -> int:
        """Of the file that is appended to."""
        return 0 if self._writer is None else self._writer.num_bytes

    @property
    def number(self) -> int | None:
        """Of the file that is appended to."""
        return None if self._writer is None else self._writer.number

    def begin_next(self) -> None:
        """Append to a new file from here on."""
        if self._writer is not None:
            self._writer.begin_next()

    def sizes(self) -> dict[int, int]:
        """Bytes of every file, by its number."""
        return file_sizes(self._folder) if self._folder.is_dir() else {}

    def remove_files(self, is_used: Callable[[int], bool]) -> None:
        """Delete the files whose number `is_used` denies and that nobody appends to."""
        if self._writer is not None:
            self._writer.remove_files(is_used)

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()


class SqliteBackend:
    """`gateway.ledger.backend.Backend` in a folder; make it with `open`."""

    alone_in_transaction = True
    failures = (sqlite3.Error, OSError)

    def __init__(self, data: Path, *, lock: int | None, routing: SegmentFileWriter | None, shared: bool) -> None:
        """Use `open`; without a lock it is for reading only."""
        self.shared = shared
        self._data = data
        self._lock = lock
        self._arrays = SegmentFiles(data / "routing", routing)
        self._packing = None if routing is None else Packing(data / "routing")
        self._blobs = BlobFiles(data / "blobs")
        self._checkpoints = None if lock is None else Checkpoints(lambda: self.connect(read_only=False))

    @classmethod
    def open(
        cls,
        data: Path,
        *,
        read_only: bool,
        lock: int | None,
        is_alone: bool = False,
        reserve: SpaceReserve | None = None,
    ) -> Self:
        """As `SqliteLedger.open`."""
        if read_only:
            if not _store(data).is_file():
                raise ConfigurationError(f"{data}: holds no ledger")
            _prepare(data, migration.check)
            return cls(data, lock=None, routing=None, shared=False)
        is_given = lock is not None
        handed_over = is_given and not is_alone
        held = hold_folder(data) if lock is None else lock
        try:
            if not handed_over:
                check_log(_store(data).with_name(f"{_store(data).name}-wal"))
            if reserve is not None:
                reserve.prepare()
            _prepare_with_room(data, partial(migration.prepare, migrate=not handed_over), reserve)
            name_holder(held)
            routing = _open_files(data, alone=not handed_over)
            return cls(data, lock=held, routing=routing, shared=is_given)
        except BaseException:
            if not is_given:
                os.close(held)
            raise

    @property
    def name(self) -> str:
        """The folder."""
        return str(self._data)

    @property
    def read_only(self) -> bool:
        """Whether it was opened without a lock."""
        return self._lock is None

    @property
    def lock(self) -> int | None:
        """The descriptor of the folder's lock."""
        return self._lock

    @property
    def arrays(self) -> SegmentFiles:
        """Routing rows."""
        return self._arrays

    @property
    def packing(self) -> Packing | None:
        """What makes routing rows smaller; None for reading only."""
        return self._packing

    @property
    def blobs(self) -> BlobFiles:
        """Contents by their sha256."""
        return self._blobs

    def connect(self, *, read_only: bool) -> SqliteConnection:
        """Another connection to the file."""
        raw = _connect(_store(self._data), read_only=read_only)
        try:
            return SqliteConnection(raw, None if read_only else WriteTurn(self._data / "ledger.turn"))
        except OSError:
            raw.close()
            raise

    def translate(self, error: Exception) -> VerbatimError:
        """SQLite's and the system's errors as ours."""
        return translate(error)

    def met_another(self, error: Exception) -> bool:
        """Never: a transaction that writes has the file for itself."""
        return False

    def unclaimed_blobs(self) -> Sequence[str]:
        """All that are there."""
        return self._blobs.stored()

    def keep_house(self, connection: Connection) -> None:
        """Keep the log short."""
        if self._checkpoints is not None:
            self._checkpoints.note(connection)

    def free_space(self, connection: Connection, blobs: Iterable[str]) -> None:
        """Remove segment files without a row, and those of `blobs` to which no session refers.

        In a transaction, so that no other process is between looking for a file and writing the row that needs it.
        """
        used = "SELECT 1 FROM turns WHERE experts_file = ? LIMIT 1"
        held = "SELECT 1 FROM blobs WHERE sha256 = ? LIMIT 1"
        connection.begin()
        self._arrays.remove_files(lambda number: connection.execute(used, (number,)).fetchone() is not None)
        for sha256 in blobs:
            if connection.execute(held, (sha256,)).fetchone() is None:
                self._blobs.remove(sha256)
        connection.rollback()  # nothing was written
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()  # waits for nobody; the database shrinks here

    def usage(self, *, reusable_bytes: int, live_routing_bytes: int) -> StoreUsage:
        """What the files take."""
        store = _store(self._data)
        routing = sum(self._arrays.sizes().values())
        return StoreUsage(
            rows_bytes=_size(store),
            reusable_bytes=reusable_bytes,
            log_bytes=_size(store.with_name(f"{store.name}-wal")),
            routing_bytes=routing,
            dead_routing_bytes=max(0, routing - live_routing_bytes),
            blob_bytes=sum(_size(self._data / "blobs" / name) for name in self._blobs.stored()),
        )

    def num_files(self) -> int:
        """Of routing rows and blobs."""
        return len(self._arrays.sizes()) + len(self._blobs.stored())

    def close(self) -> None:
        """Close the files and give up the lock, unless another process has it too."""
        if self._checkpoints is not None:
            self._checkpoints.close()
        self._arrays.close()
        if self._packing is not None:
            self._packing.close()
        if self._lock is not None:
            os.close(self._lock)


def translate(error: Exception) -> VerbatimError:
    """SQLite's and the system's errors as ours; ours as they are."""
    if isinstance(error, VerbatimError):
        return error
    if type(error) is sqlite3.DatabaseError:  # SQLITE_CORRUPT and SQLITE_NOTADB; every other code has a subclass
        return LedgerCorrupt(f"the ledger's SQLite file is damaged: {error}")
    if is_disk_full(error):
        return LedgerFull(f"the ledger's disk is full: {error}")
    return LedgerError(f"the ledger cannot be used: {error}")


def _give_back_pages(connection: Connection) -> bool:
    """Move some pages from the database's end into empty ones; whether there are more.

    A store that an earlier version made keeps its empty pages, and uses them again.
    """
    (before,) = connection.execute("PRAGMA freelist_count").fetchone()
    connection.execute(f"PRAGMA incremental_vacuum({_PAGES_AT_ONCE})").fetchall()
    (after,) = connection.execute("PRAGMA freelist_count").fetchone()
    return 0 < int(after) < int(before)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _store(data: Path) -> Path:
    return data / "ledger.sqlite"


def name_holder(lock: int) -> None:
    """Have the lock's file name this process, for who finds the folder taken."""
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)


def hold_folder(data: Path) -> int:
    """The descriptor that holds the folder's lock for as long as it, or a copy of it, is open.

    Raises ConfigurationError if the folder cannot be used, or another process has it.
    """
    try:
        data.mkdir(parents=True, exist_ok=True)
        lock = os.open(data / "ledger.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigurationError(f"{data}: cannot be used as data folder ({error.strerror})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(lock, 32, 0).decode() or "unknown"
        os.close(lock)
        raise ConfigurationError(
            f"{data}: another gateway (process {holder}) uses this data folder; stop it or choose another --data"
        ) from error
    except OSError as error:
        os.close(lock)
        raise ConfigurationError(f"{data}: cannot be locked ({error.strerror})") from error
    return lock


def _open_files(data: Path, *, alone: bool) -> SegmentFileWriter:
    """The routing rows' writer, and the blobs' folder; the names of new files become durable here too.

    alone: nobody else writes here, so that what is half-written was left by a crash.
    """
    try:
        routing = SegmentFileWriter(data / "routing")
        if alone:
            BlobFiles(data / "blobs").prepare()
        sync_folder(data)
    except OSError as error:
        raise ConfigurationError(f"{data}: cannot be used as data folder ({error.strerror})") from error
    return routing


def _prepare_with_room(
    data: Path, step: Callable[[sqlite3.Connection, str], None], reserve: SpaceReserve | None
) -> None:
    """A gateway also starts on a full disk: with what it had kept back."""
    while True:
        try:
            return _prepare(data, step)
        except LedgerFull:
            if reserve is None or not reserve.make_room(grows=False):
                raise


def _prepare(data: Path, step: Callable[[sqlite3.Connection, str], None]) -> None:
    path = _store(data)
    try:
        connection = _connect(path, read_only=step is migration.check)
    except sqlite3.OperationalError as error:
        if is_disk_full(error):
            raise translate(error) from error
        raise ConfigurationError(f"{path}: cannot be opened ({error})") from error
    except sqlite3.DatabaseError as error:
        raise LedgerCorrupt(f"{path}: {error}; it is damaged, or no ledger") from error
    try:
        step(connection, str(path))
    except sqlite3.Error as error:
        raise translate(error) from error
    finally:
        connection.close()


def _connect(path: Path, *, read_only: bool) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        if not read_only:
            connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # of a new store; `reclaim` gives back its pages
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA journal_size_limit = {_KEPT_LOG_BYTES}")
            connection.execute(f"PRAGMA wal_autocheckpoint = {WITHOUT_US_PAGES}")
            connection.execute("PRAGMA synchronous = FULL")  # I4: a commit is on disk when it returns
        else:
            connection.execute("PRAGMA query_only = ON")
    except sqlite3.Error:
        connection.close()
        raise
    return connection

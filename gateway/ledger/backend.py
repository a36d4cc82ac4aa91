"""What a store must give `SqlLedger`: connections that run its SQL, a place for arrays and one for blobs.

The ledger's SQL is one text for every store. It is written with `?` for parameters, `ON CONFLICT` for upserts, and the
types that a store chooses in `ColumnTypes`. What stores do differently stands here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from gateway.contracts.errors import VerbatimError
from gateway.contracts.media import Blob

Buffer: TypeAlias = bytes | memoryview
Value: TypeAlias = str | bytes | int | float | None


class Location(NamedTuple):
    """Where a record of an array store lies, as the store itself understands it (columns `experts_*` of `turns`).

    file: a segment file's number or an object's name. offset: of the record in it. num_bytes: what it takes there.
    """

    file: int | str
    offset: int
    num_bytes: int


class Rows(Protocol):
    """What a statement gave: `fetchone`, `fetchall` or iteration give rows as tuples, bytes as `bytes`."""

    @property
    def rowcount(self) -> int:
        """How many rows an UPDATE or DELETE changed."""
        ...

    def fetchone(self) -> Any: ...

    def fetchall(self) -> list[Any]: ...

    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    """A session with the store, used by one thread at a time; each statement commits alone outside of a transaction."""

    @property
    def in_transaction(self) -> bool:
        """Between `begin` and `commit`, unless the store itself has rolled back."""
        ...

    def wait_for_turn(self) -> None:
        """Wait until no other transaction writes, where a store lets one do so at a time; `begin` does so, too.

        Who waits here first may learn meanwhile what else there is to write. What it took, the end of the next
        transaction gives back.
        """
        ...

    def begin(self) -> None:
        """Start a transaction that will write."""
        ...

    def commit(self) -> None:
        """Returns when the transaction is on disk (I4)."""
        ...

    def rollback(self) -> None:
        """Forget the transaction; fine if there is none, or if the connection is broken."""
        ...

    def execute(self, sql: str, parameters: Sequence[Value] = ()) -> Rows: ...

    def executemany(self, sql: str, parameters: Iterable[Sequence[Value]]) -> None: ...

    def lock(self, name: str) -> None:
        """Inside a transaction: wait until no other transaction holds `name`, and hold it until this one's end.

        What is read afterwards is what the others committed. A store that lets one transaction write at a time has
        nothing to do.
        """
        ...

    def close(self) -> None: ...


class ArrayStore(Protocol):
    """Where routing rows lie: records of a key (JSON) and a payload, with a checksum over both."""

    @property
    def before_transaction(self) -> bool:
        """True: `append` is slow and safe in any thread, call it ahead of the transaction; what a transaction that
        fails leaves behind is the store's to find again. False: call it inside, in the writer's thread."""
        ...

    def append(self, key: bytes, payload: Buffer) -> Location:
        """Store one record; durable after `flush`."""
        ...

    def flush(self) -> None:
        """Make durable what was appended; called before each commit."""
        ...

    def read(self, location: Location, *, name: str) -> tuple[bytes, bytes | memoryview]:
        """Key and payload; `name` (session and turn) is said in errors. Raises LedgerCorrupt if it is missing, cut or
        changed."""
        ...


class BlobStore(Protocol):
    """Contents by their sha256; safe to use from several threads."""

    def write(self, blob: Blob) -> None:
        """Store a content unless it is there; durable when it returns."""
        ...

    def has(self, sha256: str) -> bool: ...

    def read(self, sha256: str, *, name: str) -> bytes:
        """Raises LedgerCorrupt, saying `name`, if it is missing or another one."""
        ...


class Backend(Protocol):
    """One store, opened: of the schema that this program writes (`schema.py`)."""

    @property
    def name(self) -> str:
        """What errors call it."""
        ...

    @property
    def read_only(self) -> bool: ...

    @property
    def shared(self) -> bool:
        """Whether other processes may write to it meanwhile."""
        ...

    @property
    def alone_in_transaction(self) -> bool:
        """Whether one transaction that writes runs at a time, so that what was checked in it holds until its end."""
        ...

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """What its connections and stores raise besides VerbatimError; `translate` makes ours of them."""
        ...

    @property
    def arrays(self) -> ArrayStore: ...

    @property
    def blobs(self) -> BlobStore: ...

    def connect(self, *, read_only: bool) -> Connection:
        """Another connection; it may find its way back by itself after a failure outside of a transaction."""
        ...

    def translate(self, error: Exception) -> VerbatimError:
        """One of `failures` as ours; VerbatimError as it is."""
        ...

    def met_another(self, error: Exception) -> bool:
        """Whether a transaction failed only because of another one at the same time (a deadlock, a write between): its
        operations are then run again, each alone."""
        ...

    def unclaimed_blobs(self) -> Sequence[str]:
        """Contents that a crash may have left without a session, to look at once after opening."""
        ...

    def keep_house(self, connection: Connection) -> None:
        """After every commit, in the writer's thread and outside of a transaction; costs next to nothing."""
        ...

    def free_space(self, connection: Connection, blobs: Iterable[str]) -> None:
        """After a commit that deleted turns or let go of `blobs`: remove what no row refers to any more.

        Runs in the writer's thread, outside of a transaction; a failure is tried again after a later commit.
        """
        ...

    def close(self) -> None:
        """After all connections were closed."""
        ...

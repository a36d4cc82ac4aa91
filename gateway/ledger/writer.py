"""Group commit: one thread owns the store's write connection and commits what has gathered since its last commit.

    submit ──▶ gathered ──▶ queue ──▶ [ BEGIN · ordinary ones together · others in savepoints · COMMIT ] ──▶ futures
               (this turn of the event loop)

A future resolves after the commit that holds its operation (I4). An operation that raises fails alone; a commit that
fails takes its whole batch with it, and nothing of that batch is stored.

What a batch costs besides its rows is an fsync, and handing the interpreter's lock to and fro. So there is little of
both: what one turn of the event loop brings goes to the thread at once, what comes while it or another process commits
is the next batch, statements are few (`gateway.ledger.batch`), and one wake-up of the loop resolves all futures of a
batch.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias, TypeVar

from msgspec import Struct

from gateway.contracts.errors import LedgerError, VerbatimError
from gateway.ledger.backend import Connection
from gateway.ledger.reserve import NO_ROOM_TO_MAKE, Room, is_disk_full

Result = TypeVar("Result")
Operation: TypeAlias = Callable[[Connection], Result]
"""Runs in the writer thread, inside a transaction; what it returns is the future's result. It may run several times,
each time on what the store holds then, and only what the last run did is stored."""

_MAX_BATCH = 512
_MAX_TRIES_ALONE = 5
_TICK_SECONDS = 0.001
"""Of an event loop's timers: uvloop rounds to it, and a shorter time would be none."""


class StoreFailures(NamedTuple):
    """How a store fails: what it raises besides VerbatimError, how that reads as ours, and whether it only met another
    process (`gateway.ledger.backend.Backend`)."""

    errors: tuple[type[Exception], ...]
    translate: Callable[[Exception], VerbatimError]
    met_another: Callable[[Exception], bool]


class _Waiting(Struct, frozen=True, eq=False):
    operation: Operation[Any]
    future: asyncio.Future[Any]
    grows: bool


class _Settled(Struct, frozen=True, eq=False):
    """A future and what it is told; result is of no meaning where there is an error."""

    future: asyncio.Future[Any]
    result: Any = None
    error: Exception | None = None


def leave_all(connection: Connection, operations: Sequence[Operation[Any]]) -> set[int]:
    """Of a store where nothing is done together."""
    return set(range(len(operations)))


class GroupCommitWriter:
    """Owns `connection` until `close`, which it also closes.

    failures: of the store. flush: makes durable what operations wrote beside the store; called before each commit.
    after_commit: housekeeping after each commit, outside of a transaction; its failure is nobody's. room: what can be
    done about a full disk before a batch fails. together: carries out what it can of a batch and returns the positions
    of what it left; the result of all others is None.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        failures: StoreFailures,
        flush: Callable[[], None],
        after_commit: Callable[[Connection], None],
        room: Room = NO_ROOM_TO_MAKE,
        together: Callable[[Connection, Sequence[Operation[Any]]], set[int]] = leave_all,
        patience_seconds: float = 0.01,
    ) -> None:
        self._connection = connection
        self._failures = failures
        self._fatal: tuple[type[Exception], ...] = (*failures.errors, LedgerError)  # to a whole batch
        self._flush = flush
        self._after_commit = after_commit
        self._room = room
        self._together = together
        self._patience_seconds = patience_seconds
        self._gathered: list[_Waiting] = []
        self._gathered_since = 0.0
        self._leaves_soon = False
        self._timed_by: asyncio.AbstractEventLoop | None = None
        self._queue: queue.SimpleQueue[list[_Waiting] | None] = queue.SimpleQueue()
        self._submit_lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)
        self._thread.start()

    def submit(
        self, operation: Operation[Result], *, grows: bool = False, urgent: bool = True
    ) -> asyncio.Future[Result]:
        """Queue an operation; a future of the running event loop. Cancelling it before its batch starts means that it
        never runs.

        grows: it adds data, so that on a full disk it fails before others do. urgent: it starts a batch at once; what
        is not waits a moment for others to be committed with.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        with self._submit_lock:  # nothing may be queued behind the end mark, its future would never resolve
            if self._closed:
                raise LedgerError("the ledger is closed")
            if not self._gathered:
                self._gathered_since = time.monotonic()
            self._gathered.append(_Waiting(operation, future, grows))
            if urgent and not self._leaves_soon:
                self._leaves_soon = True
                loop.call_soon(self._hand_over)
            elif not urgent and (self._timed_by is None or self._timed_by.is_closed()):
                self._timed_by = loop
                loop.call_later(self._patience_seconds, self._end_patience, loop)
        return future

    def _end_patience(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hand over what has waited long enough.

        What came since an urgent batch left waits on: a turn and the note of its delivery would else be two commits,
        and the next turn of a lone agent would wait for the second one.
        """
        with self._submit_lock:
            rest = self._gathered_since + self._patience_seconds - time.monotonic()
            if self._gathered and rest > 0:
                loop.call_later(max(rest, _TICK_SECONDS), self._end_patience, loop)
                return
            self._timed_by = None
        self._hand_over()

    def _hand_over(self) -> None:
        """Give the thread what has gathered."""
        with self._submit_lock:
            gathered, self._gathered = self._gathered, []
            self._leaves_soon = False
            if gathered:
                self._queue.put(gathered)

    def close(self) -> None:
        """Commit what is queued, end the thread, close the connection; blocks, repeating it is fine."""
        with self._submit_lock:
            if not self._closed:
                self._closed = True
                self._queue.put(self._gathered)
                self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while (batch := self._next_batch()) is not None:
                for start in range(0, len(batch), _MAX_BATCH):
                    self._commit(batch[start : start + _MAX_BATCH])
        finally:
            self._connection.close()

    def _next_batch(self) -> list[_Waiting] | None:
        """Wait for operations and take what else is queued; None when the end mark was reached."""
        batch = self._queue.get()
        if batch is None:
            return None
        with suppress(*self._fatal):  # the transaction tries again
            self._connection.wait_for_turn()  # first: what comes while another process commits goes with this batch
        while len(batch) < _MAX_BATCH:
            try:
                more = self._queue.get_nowait()
            except queue.Empty:
                break
            if more is None:
                self._queue.put(None)  # finish this batch first
                break
            batch += more
        return batch

    def _commit(self, batch: Sequence[_Waiting]) -> None:
        running = [waiting for waiting in batch if not waiting.future.cancelled()]
        failure = self._try(running)
        while failure is not None and running and is_disk_full(failure):
            growing = [waiting for waiting in running if waiting.grows]
            if not self._room.make(grows=bool(growing)):
                if not growing:
                    break
                self._fail(growing, failure)
                running = [waiting for waiting in running if not waiting.grows]
            failure = self._try(running)
        if failure is not None and self._failures.met_another(failure):
            for waiting in running:
                self._commit_alone(waiting)
        elif failure is not None:
            self._fail(running, failure)
        self._keep_house()

    def _commit_alone(self, waiting: _Waiting) -> None:
        """What failed in company because of another process, until it meets nobody."""
        for tries_left in reversed(range(_MAX_TRIES_ALONE)):
            failure = self._try([waiting])
            if failure is None:
                return
            if tries_left == 0 or not self._failures.met_another(failure):
                self._fail([waiting], failure)
                return

    def _fail(self, batch: Sequence[_Waiting], failure: Exception) -> None:
        _settle([_Settled(waiting.future, error=self._failures.translate(failure)) for waiting in batch])

    def _try(self, running: Sequence[_Waiting]) -> Exception | None:
        """Run and commit operations and resolve their futures; or roll all back, resolve none and say why."""
        try:
            self._room.begin()
            self._connection.begin()
            left = self._run_together([waiting.operation for waiting in running])
            settled = [
                self._run_alone(waiting) if position in left else _Settled(waiting.future)
                for position, waiting in enumerate(running)
            ]
            self._flush()
            self._connection.commit()
        except self._fatal as error:
            self._connection.rollback()
            if is_disk_full(error):  # after another failure, a commit that failed may still be found after a crash
                self._room.forget()
            return error
        _settle(settled)
        return None

    def _run_together(self, operations: Sequence[Operation[Any]]) -> set[int]:
        """Positions of what must run alone; all, where what is done together failed in a way that may be of one."""
        try:
            return self._together(self._connection, operations)
        except self._failures.errors as error:
            if self._failures.met_another(error) or is_disk_full(error):
                raise
            self._check_transaction()
            return leave_all(self._connection, operations)

    def _run_alone(self, waiting: _Waiting) -> _Settled:
        try:
            return _Settled(waiting.future, self._run_in_savepoint(waiting.operation))
        except self._failures.errors as error:
            if self._failures.met_another(error) or is_disk_full(error):
                raise
            return _Settled(waiting.future, error=self._failures.translate(error))
        except Exception as error:  # noqa: BLE001  # a bug in one operation belongs to its waiter, not to this thread
            return _Settled(waiting.future, error=error)
        finally:
            self._check_transaction()

    def _run_in_savepoint(self, operation: Operation[Any]) -> Any:
        connection = self._connection
        connection.execute("SAVEPOINT operation")
        try:
            result = operation(connection)
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK TO operation")
                connection.execute("RELEASE operation")
            raise
        connection.execute("RELEASE operation")
        return result

    def _check_transaction(self) -> None:
        if not self._connection.in_transaction:
            raise LedgerError("the ledger's transaction was rolled back (disk full or failing)")

    def _keep_house(self) -> None:
        try:
            self._after_commit(self._connection)
        except self._fatal:
            self._connection.rollback()
            return  # only space is at stake; a later commit tries again


def _settle(settled: Sequence[_Settled]) -> None:
    """Tell every future its end: one wake-up for all of an event loop, whose self-pipe costs as much as a row."""
    by_loop: defaultdict[asyncio.AbstractEventLoop, list[_Settled]] = defaultdict(list)
    for one in settled:
        by_loop[one.future.get_loop()].append(one)
    for loop, of_loop in by_loop.items():
        with suppress(RuntimeError):  # it was closed: nobody waits there any more
            loop.call_soon_threadsafe(_tell, of_loop)


def _tell(settled: Sequence[_Settled]) -> None:
    for one in settled:
        if one.future.done():  # cancelled
            continue
        if one.error is None:
            one.future.set_result(one.result)
        else:
            one.future.set_exception(one.error)

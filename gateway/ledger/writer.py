"""Group commit: one thread owns the store's write connection and commits what has gathered since its last commit.

    submit(operation) ──▶ queue ──▶ [ BEGIN · each operation in a savepoint · flush routing rows · COMMIT ] ──▶ futures

A future resolves after the commit that holds its operation (I4). An operation that raises fails alone; a commit that
fails takes its whole batch with it, and nothing of that batch is stored.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeAlias, TypeVar

from gateway.contracts.errors import LedgerError, VerbatimError
from gateway.ledger.backend import Connection
from gateway.ledger.reserve import NO_ROOM_TO_MAKE, Room, is_disk_full

Result = TypeVar("Result")
Operation: TypeAlias = Callable[[Connection], Result]
"""Runs in the writer thread, inside a transaction; what it returns is the future's result. It may run several times,
each time on what the store holds then, and only what the last run did is stored."""

_MAX_BATCH = 512
_MAX_TRIES_ALONE = 5


class StoreFailures(NamedTuple):
    """How a store fails: what it raises besides VerbatimError, how that reads as ours, and whether it only met another
    process (`gateway.ledger.backend.Backend`)."""

    errors: tuple[type[Exception], ...]
    translate: Callable[[Exception], VerbatimError]
    met_another: Callable[[Exception], bool]


class _Waiting(NamedTuple):
    operation: Operation[Any]
    future: Future[Any]
    grows: bool


class GroupCommitWriter:
    """Owns `connection` until `close`, which it also closes.

    failures: of the store. flush: makes durable what operations wrote beside the store; called before each commit.
    after_commit: housekeeping after each commit, outside of a transaction; its failure is nobody's. room: what can be
    done about a full disk before a batch fails.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        failures: StoreFailures,
        flush: Callable[[], None],
        after_commit: Callable[[Connection], None],
        room: Room = NO_ROOM_TO_MAKE,
    ) -> None:
        self._connection = connection
        self._failures = failures
        self._fatal: tuple[type[Exception], ...] = (*failures.errors, LedgerError)  # to a whole batch
        self._flush = flush
        self._after_commit = after_commit
        self._room = room
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._submit_lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)
        self._thread.start()

    def submit(self, operation: Operation[Result], *, grows: bool = False) -> Future[Result]:
        """Queue an operation; cancelling the future before its batch starts means that it never runs.

        grows: it adds data, so that on a full disk it fails before others do.
        """
        future: Future[Result] = Future()
        with self._submit_lock:  # nothing may be queued behind the end mark, its future would never resolve
            if self._closed:
                raise LedgerError("the ledger is closed")
            self._queue.put(_Waiting(operation, future, grows))
        return future

    def close(self) -> None:
        """Commit what is queued, end the thread, close the connection; blocks, repeating it is fine."""
        with self._submit_lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while (batch := self._next_batch()) is not None:
                self._commit(batch)
        finally:
            self._connection.close()

    def _next_batch(self) -> list[_Waiting] | None:
        """Wait for one operation and take what else has gathered; None when the end mark was reached."""
        first = self._queue.get()
        if first is None:
            return None
        batch = [first]
        while len(batch) < _MAX_BATCH:
            try:
                waiting = self._queue.get_nowait()
            except queue.Empty:
                break
            if waiting is None:
                self._queue.put(None)  # finish this batch first
                break
            batch.append(waiting)
        return batch

    def _commit(self, batch: Sequence[_Waiting]) -> None:
        running = [waiting for waiting in batch if waiting.future.set_running_or_notify_cancel()]
        failure = self._try(running)
        while failure is not None and running and is_disk_full(failure):
            growing = [waiting for waiting in running if waiting.grows]
            if not self._room.make(grows=bool(growing)):
                if not growing:
                    break
                for waiting in growing:
                    waiting.future.set_exception(self._failures.translate(failure))
                running = [waiting for waiting in running if not waiting.grows]
            failure = self._try(running)
        if failure is not None:
            for waiting in running:
                if self._failures.met_another(failure):
                    self._commit_alone(waiting)
                else:
                    waiting.future.set_exception(self._failures.translate(failure))
        self._keep_house()

    def _commit_alone(self, waiting: _Waiting) -> None:
        """What failed in company because of another process, until it meets nobody."""
        for tries_left in reversed(range(_MAX_TRIES_ALONE)):
            failure = self._try([waiting])
            if failure is None:
                return
            if tries_left == 0 or not self._failures.met_another(failure):
                waiting.future.set_exception(self._failures.translate(failure))
                return

    def _try(self, running: Sequence[_Waiting]) -> Exception | None:
        """Run and commit operations and resolve their futures; or roll all back, resolve none and say why."""
        done: list[tuple[Future[Any], Any]] = []
        failed: list[tuple[Future[Any], Exception]] = []
        try:
            self._room.begin()
            self._connection.begin()
            for waiting in running:
                try:
                    done.append((waiting.future, self._run_alone(waiting.operation)))
                except self._failures.errors as error:
                    if self._failures.met_another(error) or is_disk_full(error):
                        raise
                    failed.append((waiting.future, self._failures.translate(error)))
                except Exception as error:  # noqa: BLE001  # a bug in one operation belongs to its waiter, not to this thread
                    failed.append((waiting.future, error))
                if not self._connection.in_transaction:
                    raise LedgerError("the ledger's transaction was rolled back (disk full or failing)")
            self._flush()
            self._connection.commit()
        except self._fatal as error:
            self._connection.rollback()
            if is_disk_full(error):  # after another failure, a commit that failed may still be found after a crash
                self._room.forget()
            return error
        for future, result in done:
            future.set_result(result)
        for future, reason in failed:
            future.set_exception(reason)
        return None

    def _run_alone(self, operation: Operation[Any]) -> Any:
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

    def _keep_house(self) -> None:
        try:
            self._after_commit(self._connection)
        except self._fatal:
            self._connection.rollback()
            return  # only space is at stake; a later commit tries again

"""Group commit: one thread owns the store's write connection and commits what has gathered since its last commit.

    submit(operation) ──▶ queue ──▶ [ BEGIN · each operation in a savepoint · flush routing rows · COMMIT ] ──▶ futures

A future resolves after the commit that holds its operation (I4). An operation that raises fails alone; a commit that
fails takes its whole batch with it, and nothing of that batch is stored.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeAlias, TypeVar

from gateway.contracts.errors import LedgerCorrupt, LedgerError, VerbatimError

Result = TypeVar("Result")
Operation: TypeAlias = Callable[[sqlite3.Connection], Result]
"""Runs in the writer thread, inside a transaction; what it returns is the future's result."""

_MAX_BATCH = 512


class _Waiting(NamedTuple):
    operation: Operation[Any]
    future: Future[Any]


class GroupCommitWriter:
    """Owns `connection` (autocommit mode) until `close`, which it also closes.

    flush: makes durable what operations wrote beside the store; called before each commit.
    after_commit: housekeeping after each commit that changed something; its failure is nobody's.
    """

    def __init__(
        self, connection: sqlite3.Connection, *, flush: Callable[[], None], after_commit: Operation[None]
    ) -> None:
        self._connection = connection
        self._flush = flush
        self._after_commit = after_commit
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._submit_lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)
        self._thread.start()

    def submit(self, operation: Operation[Result]) -> Future[Result]:
        """Queue an operation; cancelling the future before its batch starts means that it never runs."""
        future: Future[Result] = Future()
        with self._submit_lock:  # nothing may be queued behind the end mark, its future would never resolve
            if self._closed:
                raise LedgerError("the ledger is closed")
            self._queue.put(_Waiting(operation, future))
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

    def _commit(self, batch: list[_Waiting]) -> None:
        running = [waiting for waiting in batch if waiting.future.set_running_or_notify_cancel()]
        done: list[tuple[Future[Any], Any]] = []
        failed: list[tuple[Future[Any], BaseException]] = []
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for waiting in running:
                try:
                    done.append((waiting.future, self._run_alone(waiting.operation)))
                except VerbatimError as error:
                    failed.append((waiting.future, error))
                except Exception as error:  # noqa: BLE001  # a bug in one operation belongs to its waiter, not to this thread
                    failed.append((waiting.future, error))
                if not self._connection.in_transaction:
                    raise LedgerError("the ledger's transaction was rolled back (disk full or failing)")
            self._flush()
            self._connection.execute("COMMIT")
        except (sqlite3.Error, OSError, LedgerError) as error:
            self._roll_back()
            for waiting in running:
                waiting.future.set_exception(translate(error))
            return
        for future, result in done:
            future.set_result(result)
        for future, reason in failed:
            future.set_exception(reason)
        self._keep_house()

    def _run_alone(self, operation: Operation[Any]) -> Any:
        connection = self._connection
        connection.execute("SAVEPOINT operation")
        try:
            result = operation(connection)
        except BaseException as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK TO operation")
                connection.execute("RELEASE operation")
            if isinstance(error, sqlite3.Error | OSError):
                raise translate(error) from error
            raise
        connection.execute("RELEASE operation")
        return result

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def _keep_house(self) -> None:
        try:
            self._after_commit(self._connection)
        except (sqlite3.Error, OSError):
            return  # only space is at stake; the next commit tries again


def translate(error: Exception) -> VerbatimError:
    """SQLite's and the system's errors as ours; ours as they are."""
    if isinstance(error, VerbatimError):
        return error
    if type(error) is sqlite3.DatabaseError:  # SQLITE_CORRUPT and SQLITE_NOTADB; every other code has a subclass
        return LedgerCorrupt(f"the ledger's SQLite file is damaged: {error}")
    return LedgerError(f"the ledger cannot be used: {error}")

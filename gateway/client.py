"""Typed clients, async and sync, of the gateway's own endpoints (sessions, feed, admin): for trainers and tools.

Agents need none of it: they speak to `SessionHandle.base_url` with any OpenAI client. Errors of the gateway come back
as the contracts' error classes, found by their code; a gateway that cannot be reached is a LedgerError (retryable).

A gateway may be killed and started again under a client: every call is tried again for `retry_seconds`. That is safe
because every call can be repeated: sessions and leases get their ids here, so that another try finds what a lost reply
was about.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import aiohttp

from gateway.background import background
from gateway.client_calls import ConflictAfterRetry, RepeatedCalls, path_segment, query_string
from gateway.contracts.codec import decode_rollout
from gateway.contracts.errors import Conflict, LedgerError, RequestError, VerbatimError
from gateway.contracts.generation import JsonValue
from gateway.contracts.rollouts import FeedCounts, FinishedRollout, IncompleteGroup, Lease, LeasedRollout

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)

_LONGEST_POLL_SECONDS = 30.0
_GIVE_BACK_SECONDS = 5.0
_RENEWALS_PER_LEASE = 3


@dataclass(frozen=True, slots=True)
class SessionHandle:
    """What an agent needs: an OpenAI client's `base_url` and `api_key`."""

    session_id: str
    base_url: str
    api_key: str


class GatewayClient:
    """Use as `async with GatewayClient(url) as gateway`; safe for concurrent calls of one event loop.

    base_url: of the gateway, as `http://host:port`. api_key: the operator's key, None where keys are off.
    timeout_seconds: of one try; long polls get their waiting time on top. retry_seconds: how long a call is tried again
    after its first try has failed, 0 for never.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_seconds: float = 60.0,
        retry_seconds: float = 120.0,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._timeout_seconds = timeout_seconds
        self._retry_seconds = retry_seconds
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._open_calls: RepeatedCalls | None = None

    async def __aenter__(self) -> Self:
        self._open_calls = RepeatedCalls(
            self.base_url,
            aiohttp.ClientSession(headers=self._headers),
            timeout_seconds=self._timeout_seconds,
            retry_seconds=self._retry_seconds,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open_calls is not None:
            await self._open_calls.aclose()
            self._open_calls = None

    # ---- sessions ----

    async def create_session(
        self,
        *,
        session_id: str | None = None,
        group: str | None = None,
        group_size: int | None = None,
        task: JsonValue = None,
        labels: Mapping[str, str] | None = None,
        metadata: Mapping[str, JsonValue] | None = None,
        sampling: Mapping[str, JsonValue] | None = None,
        ttl_seconds: float | None = None,
    ) -> SessionHandle:
        """Open a session; without an id of your own it gets one. Repeating it with an id is safe where keys are off.

        With keys on, the key of a session is told to one call only: raises Conflict for a session that exists already.
        """
        body = {
            "session_id": session_id or f"session-{uuid.uuid4().hex}",
            "group": group,
            "group_size": group_size,
            "task": task,
            "labels": labels,
            "metadata": metadata,
            "sampling": sampling,
            "ttl_seconds": ttl_seconds,
        }
        given = {name: value for name, value in body.items() if value is not None}
        # The key makes the session's own key the same in every try, so that a lost reply loses nothing.
        reply = await self._calls.value("POST", "/sessions", given, headers={"Idempotency-Key": uuid.uuid4().hex})
        if reply["api_key"] is None:
            raise Conflict(f"session {reply['session_id']} exists already and its key is not told again")
        return SessionHandle(reply["session_id"], reply["base_url"], reply["api_key"])

    async def finish_session(
        self,
        session_id: str,
        *,
        reward: float | None,
        outcome: str = "completed",
        metadata: Mapping[str, JsonValue] | None = None,
    ) -> dict[str, Any]:
        """Seal a session; its rollout enters the feed. `reward` None says that none could be computed."""
        body = {"reward": reward, "outcome": outcome, "metadata": dict(metadata or {})}
        return await self._object("POST", f"/sessions/{path_segment(session_id)}/finish", body)

    async def session(self, session_id: str) -> dict[str, Any]:
        """One session; raises NotFound."""
        return await self._object("GET", f"/sessions/{path_segment(session_id)}")

    async def turns(self, session_id: str) -> list[dict[str, Any]]:
        """All turns of a session as recorded, in order, less their arrays; raises NotFound."""
        return list((await self._object("GET", f"/sessions/{path_segment(session_id)}/turns"))["turns"])

    async def session_report(self, session_id: str, *, pick: str | None = None) -> dict[str, Any]:
        """What happened to a session's tokens (fields of `gateway.sessions.report.SessionReport`); raises NotFound."""
        return await self._object("GET", f"/sessions/{path_segment(session_id)}/report{query_string([('pick', pick)])}")

    async def sessions(
        self, *, labels: Mapping[str, str] | None = None, limit: int = 100, after: str | None = None
    ) -> list[dict[str, Any]]:
        """Sessions in order of id, starting after `after`; `labels` as `label=key:value` in the query."""
        query = [("limit", str(limit)), ("after", after)]
        query += [("label", f"{key}:{value}") for key, value in (labels or {}).items()]
        reply = await self._object("GET", f"/sessions{query_string(query)}")
        return list(reply["sessions"])

    async def delete_session(self, session_id: str) -> None:
        """Forget a session; Conflict while its rollout waits in the feed."""
        await self._calls.value("DELETE", f"/sessions/{path_segment(session_id)}", gone_after_retry=True)

    # ---- the feed ----

    async def lease(
        self,
        *,
        consumer: str,
        limit: int,
        wait_seconds: float = 0.0,
        lease_seconds: float = 600.0,
        whole_groups: bool = True,
        labels: Mapping[str, str] | None = None,
        group_deadline_seconds: float | None = None,
    ) -> Lease | None:
        """Lease finished rollouts, waiting up to `wait_seconds` for the first; None when there was nothing.

        group_deadline_seconds: how long after the first of its rollouts has ended a group is lent in part; `incomplete`
        of the lease names what is missing. None: never in part.
        """
        deadline = time.monotonic() + wait_seconds
        body = {
            "lease_id": uuid.uuid4().hex,  # the same in every try: a lost reply leaves no lease behind
            "consumer": consumer,
            "limit": limit,
            "lease_seconds": lease_seconds,
            "whole_groups": whole_groups,
            "labels": None if labels is None else dict(labels),
            "group_deadline_seconds": group_deadline_seconds,
        }
        while True:
            wait = min(max(deadline - time.monotonic(), 0.0), _LONGEST_POLL_SECONDS)
            polled = {**body, "wait_seconds": wait}
            try:
                reply = await self._calls.value("POST", "/feed/leases", polled, extra_seconds=wait)
            except ConflictAfterRetry:
                # A try whose reply was lost made it, and the gateway has taken it back since.
                body["lease_id"] = uuid.uuid4().hex
                continue
            if reply is not None:
                return lease_of_json(reply)
            if time.monotonic() >= deadline:
                return None

    @asynccontextmanager
    async def leased(
        self,
        *,
        consumer: str,
        limit: int,
        wait_seconds: float = 0.0,
        lease_seconds: float = 600.0,
        whole_groups: bool = True,
        labels: Mapping[str, str] | None = None,
        group_deadline_seconds: float | None = None,
    ) -> AsyncIterator[Lease | None]:
        """`lease` for the length of a block: extended while the block runs, however long; acknowledged when it ends,
        given back when it raises. None when there was nothing to lease.
        """
        lease = await self.lease(
            consumer=consumer,
            limit=limit,
            wait_seconds=wait_seconds,
            lease_seconds=lease_seconds,
            whole_groups=whole_groups,
            labels=labels,
            group_deadline_seconds=group_deadline_seconds,
        )
        if lease is None:
            yield None
            return
        async with self.extending(lease.lease_id, lease_seconds=lease_seconds):
            try:
                yield lease
            except BaseException:
                with suppress(VerbatimError):  # it expires by itself; what was raised is what the caller must see
                    await self._release(lease.lease_id, retry_seconds=_GIVE_BACK_SECONDS)
                raise
            await self.acknowledge(lease.lease_id)

    async def iter_rollouts(
        self,
        *,
        consumer: str,
        limit: int = 1,
        wait_seconds: float = 0.0,
        lease_seconds: float = 600.0,
        whole_groups: bool = False,
        labels: Mapping[str, str] | None = None,
        pick: str | None = None,
    ) -> AsyncGenerator[FinishedRollout, None]:
        """Rollouts, oldest first, until none has come for `wait_seconds`; `limit` of them are leased at a time.

        A lease is acknowledged when the one after its last rollout is asked for, and given back if the loop is left
        before; in async code leave it through `contextlib.aclosing`, so that this happens at once.
        """
        while True:
            async with self.leased(
                consumer=consumer,
                limit=limit,
                wait_seconds=wait_seconds,
                lease_seconds=lease_seconds,
                whole_groups=whole_groups,
                labels=labels,
            ) as lease:
                if lease is None:
                    return
                for leased in lease.rollouts:
                    yield await self.rollout(leased.session_id, leased.snapshot, pick=pick)

    @asynccontextmanager
    async def extending(self, lease_id: str, *, lease_seconds: float) -> AsyncIterator[None]:
        """Extend a lease again and again while the block runs.

        A lease that was lost nevertheless (to a consumer of the same name) shows when it is acknowledged.
        """
        async with background(self._extend_for_ever(lease_id, lease_seconds)):
            yield

    async def extend(self, lease_id: str, *, lease_seconds: float) -> float:
        """Let a lease end `lease_seconds` from now; returns when that is, in seconds since the epoch.

        Raises NotFound for an unknown lease, Conflict for one that has ended.
        """
        body = {"lease_seconds": lease_seconds}
        reply = await self._object("POST", f"/feed/leases/{path_segment(lease_id)}/extend", body)
        return float(reply["expires_at"])

    async def rollout(self, session_id: str, snapshot: str, *, pick: str | None = None) -> FinishedRollout:
        """One finished rollout with its segments; raises NotFound, Conflict, IntegrityError.

        pick: which of its turns train, one of `picks()`; None leaves it to the gateway.
        """
        return await asyncio.to_thread(decode_rollout, await self.rollout_bytes(session_id, snapshot, pick=pick))

    async def rollout_bytes(self, session_id: str, snapshot: str, *, pick: str | None = None) -> bytearray:
        """The same as the safetensors file that it travels as."""
        query = query_string([("snapshot", snapshot), ("pick", pick)])
        return await self._calls.content("GET", f"/feed/rollouts/{path_segment(session_id)}{query}")

    async def picks(self) -> tuple[str, ...]:
        """Names that `pick` of `rollout` may have at this gateway."""
        return tuple((await self._object("GET", "/feed/picks"))["picks"])

    async def acknowledge(self, lease_id: str) -> list[str]:
        """Mark a lease's rollouts as consumed; repeating it is fine."""
        reply = await self._object("POST", f"/feed/leases/{path_segment(lease_id)}/ack")
        return list(reply["session_ids"])

    async def release(self, lease_id: str) -> None:
        """Give a lease back at once."""
        await self._release(lease_id, retry_seconds=self._retry_seconds)

    async def release_consumer(self, consumer: str) -> int:
        """Give back all that this consumer holds; returns how many rollouts, which a lost reply may have counted."""
        reply = await self._object("POST", f"/feed/consumers/{path_segment(consumer)}/release")
        return int(reply["released"])

    async def drop(self, session_id: str, snapshot: str) -> None:
        """Free a rollout's data at the gateway."""
        await self._calls.value(
            "DELETE", f"/feed/rollouts/{path_segment(session_id)}{query_string([('snapshot', snapshot)])}"
        )

    async def counts(self, consumer: str) -> FeedCounts:
        """Back-pressure figures."""
        return FeedCounts(**await self._object("GET", f"/feed/counts{query_string([('consumer', consumer)])}"))

    async def consumers(self) -> tuple[str, ...]:
        """Who holds rollouts or has acknowledged some, in order of name."""
        return tuple((await self._object("GET", "/feed/consumers"))["consumers"])

    async def leases(self, *, consumer: str | None = None) -> tuple[Lease, ...]:
        """Leases that are held now, those that end soonest first."""
        reply = await self._object("GET", f"/feed/leases{query_string([('consumer', consumer)])}")
        return tuple(map(lease_of_json, reply["leases"]))

    # ---- operation ----

    async def engines(self) -> list[dict[str, Any]]:
        """The engines that the gateway uses."""
        reply = await self._object("GET", "/admin/engines")
        return list(reply["engines"])

    async def identity(self) -> dict[str, Any]:
        """What the gateway and each engine know of the model, with the policy that each engine serves."""
        return await self._object("GET", "/admin/identity")

    async def pause(self, mode: str, *, max_seconds: float | None = None) -> None:
        """Pause generation on every engine; `mode` is abort, keep, retract or drain.

        max_seconds: after which it goes on by itself, None never.
        """
        body = {"mode": mode, "max_seconds": max_seconds}
        await self._calls.value("POST", "/admin/generation/pause", body)

    async def generation(self) -> dict[str, Any]:
        """Whether generation is paused, how, since when, and what each engine says of it."""
        return await self._object("GET", "/admin/generation")

    async def resume(self) -> None:
        """Let generation go on."""
        await self._calls.value("POST", "/admin/generation/resume")

    async def set_policy(self, policy_version: int, weight_version: str) -> None:
        """Tell the gateway that the engines' label `weight_version` means `policy_version`."""
        await self._calls.value(
            "POST", "/admin/policy", {"policy_version": policy_version, "weight_version": weight_version}
        )

    async def health(self) -> dict[str, Any]:
        """The gateway's own health reply."""
        return await self._object("GET", "/health")

    # ---- HTTP ----

    @property
    def _calls(self) -> RepeatedCalls:
        if self._open_calls is None:
            raise LedgerError("the gateway client is not open; use it with `async with`")
        return self._open_calls

    async def _release(self, lease_id: str, *, retry_seconds: float) -> None:
        await self._calls.content("POST", f"/feed/leases/{path_segment(lease_id)}/release", retry_seconds=retry_seconds)

    async def _extend_for_ever(self, lease_id: str, lease_seconds: float) -> None:
        while True:
            await asyncio.sleep(lease_seconds / _RENEWALS_PER_LEASE)
            try:
                await self.extend(lease_id, lease_seconds=lease_seconds)
            except LedgerError as error:
                _log.warning("lease %s could not be extended: %s", lease_id, error.message)
            except RequestError as error:
                _log.warning("lease %s cannot be extended any more: %s", lease_id, error.message)
                return

    async def _object(self, method: str, path: str, body: JsonValue = None) -> dict[str, Any]:
        reply = await self._calls.value(method, path, body)
        if not isinstance(reply, dict):
            raise LedgerError(f"{method} {path}: the gateway at {self.base_url} answered no JSON object")
        return reply


def _blocking(
    method: Callable[Concatenate[GatewayClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[SyncGatewayClient, P], T]:
    """The method of the same name that waits for the other's result."""

    @functools.wraps(method)
    def call(self: SyncGatewayClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._wait(method(self._client, *args, **kwargs))

    return call


class SyncGatewayClient:
    """`GatewayClient` for programs without an event loop: use as `with SyncGatewayClient(url) as gateway`.

    Methods, types and retries are the same; calls from several threads are safe, and Ctrl-C cancels the one it meets.
    Its loop runs in a thread of its own, so a lease that is held stays extended while the program computes.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_seconds: float = 60.0,
        retry_seconds: float = 120.0,
    ) -> None:
        self._client = GatewayClient(
            base_url, api_key=api_key, timeout_seconds=timeout_seconds, retry_seconds=retry_seconds
        )
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def base_url(self) -> str:
        """Of the gateway."""
        return self._client.base_url

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gateway-client", daemon=True)
        self._thread.start()
        self._wait(self._client.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        loop = self._loop
        if loop is None:
            return
        self._wait(self._client.__aexit__(kind, error, trace))
        self._loop = None
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    create_session = _blocking(GatewayClient.create_session)
    finish_session = _blocking(GatewayClient.finish_session)
    session = _blocking(GatewayClient.session)
    turns = _blocking(GatewayClient.turns)
    session_report = _blocking(GatewayClient.session_report)
    sessions = _blocking(GatewayClient.sessions)
    delete_session = _blocking(GatewayClient.delete_session)

    lease = _blocking(GatewayClient.lease)
    extend = _blocking(GatewayClient.extend)
    rollout = _blocking(GatewayClient.rollout)
    rollout_bytes = _blocking(GatewayClient.rollout_bytes)
    picks = _blocking(GatewayClient.picks)
    acknowledge = _blocking(GatewayClient.acknowledge)
    release = _blocking(GatewayClient.release)
    release_consumer = _blocking(GatewayClient.release_consumer)
    drop = _blocking(GatewayClient.drop)
    counts = _blocking(GatewayClient.counts)
    consumers = _blocking(GatewayClient.consumers)
    leases = _blocking(GatewayClient.leases)

    engines = _blocking(GatewayClient.engines)
    identity = _blocking(GatewayClient.identity)
    pause = _blocking(GatewayClient.pause)
    resume = _blocking(GatewayClient.resume)
    set_policy = _blocking(GatewayClient.set_policy)
    health = _blocking(GatewayClient.health)

    @contextmanager
    def leased(
        self,
        *,
        consumer: str,
        limit: int,
        wait_seconds: float = 0.0,
        lease_seconds: float = 600.0,
        whole_groups: bool = True,
        labels: Mapping[str, str] | None = None,
        group_deadline_seconds: float | None = None,
    ) -> Iterator[Lease | None]:
        """As `GatewayClient.leased`."""
        block = self._client.leased(
            consumer=consumer,
            limit=limit,
            wait_seconds=wait_seconds,
            lease_seconds=lease_seconds,
            whole_groups=whole_groups,
            labels=labels,
            group_deadline_seconds=group_deadline_seconds,
        )
        with self._inside(block) as lease:
            yield lease

    @contextmanager
    def extending(self, lease_id: str, *, lease_seconds: float) -> Iterator[None]:
        """As `GatewayClient.extending`."""
        with self._inside(self._client.extending(lease_id, lease_seconds=lease_seconds)):
            yield

    def iter_rollouts(
        self,
        *,
        consumer: str,
        limit: int = 1,
        wait_seconds: float = 0.0,
        lease_seconds: float = 600.0,
        whole_groups: bool = False,
        labels: Mapping[str, str] | None = None,
        pick: str | None = None,
    ) -> Generator[FinishedRollout, None, None]:
        """As `GatewayClient.iter_rollouts`; a loop that is left gives its lease back at once."""
        while True:
            with self.leased(
                consumer=consumer,
                limit=limit,
                wait_seconds=wait_seconds,
                lease_seconds=lease_seconds,
                whole_groups=whole_groups,
                labels=labels,
            ) as lease:
                if lease is None:
                    return
                for leased in lease.rollouts:
                    yield self.rollout(leased.session_id, leased.snapshot, pick=pick)

    @contextmanager
    def _inside(self, block: AbstractAsyncContextManager[T]) -> Iterator[T]:
        value = self._wait(block.__aenter__())
        try:
            yield value
        except BaseException as error:
            if not self._wait(block.__aexit__(type(error), error, error.__traceback__)):
                raise
        else:
            self._wait(block.__aexit__(None, None, None))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            work.close()
            raise LedgerError("the gateway client is not open; use it with `with`")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # after Ctrl-C; what has ended is not changed
            raise


def lease_of_json(reply: Mapping[str, Any]) -> Lease:
    """A lease as the gateway writes it."""
    rollouts = tuple(LeasedRollout(**rollout) for rollout in reply["rollouts"])
    incomplete = tuple(map(IncompleteGroup.of_json, reply["incomplete"]))
    return Lease(reply["lease_id"], reply["consumer"], reply["expires_at"], rollouts, incomplete)

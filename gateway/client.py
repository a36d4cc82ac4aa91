"""An async, typed client of the gateway's own endpoints (sessions, feed, admin), for trainers, rollouts and tools.

Agents need none of it: they speak to `SessionHandle.base_url` with any OpenAI client. Errors of the gateway come back
as the contracts' error classes, found by their code; a gateway that cannot be reached is a LedgerError (retryable).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import aiohttp
from yarl import URL

from gateway.contracts.codec import decode_rollout
from gateway.contracts.errors import Conflict, InvalidRequest, LedgerError, RequestError, VerbatimError
from gateway.contracts.generation import JsonValue
from gateway.contracts.rollouts import FeedCounts, FinishedRollout, IncompleteGroup, Lease, LeasedRollout


@dataclass(frozen=True, slots=True)
class SessionHandle:
    """What an agent needs: an OpenAI client's `base_url` and `api_key`."""

    session_id: str
    base_url: str
    api_key: str


class GatewayClient:
    """Use as `async with GatewayClient(url) as gateway`; safe for concurrent calls of one event loop.

    base_url: of the gateway, as `http://host:port`. api_key: the operator's key, None where keys are off.
    timeout_seconds: of one call; long polls get their waiting time on top.
    """

    def __init__(self, base_url: str, *, api_key: str | None = None, timeout_seconds: float = 60.0) -> None:
        self.base_url = base_url.rstrip("/")
        self._timeout_seconds = timeout_seconds
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(headers=self._headers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._http is not None:
            await self._http.close()
            self._http = None

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
    ) -> SessionHandle:
        """Open a session; repeating it with an id of your own is safe where keys are off.

        With keys on, the key of a session is told once: raises Conflict for a session that exists already.
        """
        body = {
            "session_id": session_id,
            "group": group,
            "group_size": group_size,
            "task": task,
            "labels": labels,
            "metadata": metadata,
            "sampling": sampling,
        }
        reply = await self._json(
            "POST", "/sessions", {name: value for name, value in body.items() if value is not None}
        )
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

    async def session_report(self, session_id: str, *, pick: str | None = None) -> dict[str, Any]:
        """What happened to a session's tokens (fields of `gateway.sessions.report.SessionReport`); raises NotFound."""
        return await self._object("GET", f"/sessions/{path_segment(session_id)}/report{_optional_query(pick=pick)}")

    async def sessions(
        self, *, labels: Mapping[str, str] | None = None, limit: int = 100, after: str | None = None
    ) -> list[dict[str, Any]]:
        """Sessions in order of id, starting after `after`; `labels` as `label=key:value` in the query."""
        query = [("limit", str(limit))]
        query += [] if after is None else [("after", after)]
        query += [("label", f"{key}:{value}") for key, value in (labels or {}).items()]
        reply = await self._object("GET", f"/sessions?{_query(query)}")
        return list(reply["sessions"])

    async def delete_session(self, session_id: str) -> None:
        """Forget a session; Conflict while its rollout waits in the feed."""
        await self._json("DELETE", f"/sessions/{path_segment(session_id)}")

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
    ) -> Lease | None:
        """Lease finished rollouts, waiting up to `wait_seconds` for the first; None when there was nothing.

        The gateway waits 60 s at most in one call.
        """
        body = {
            "consumer": consumer,
            "limit": limit,
            "wait_seconds": wait_seconds,
            "lease_seconds": lease_seconds,
            "whole_groups": whole_groups,
            "labels": None if labels is None else dict(labels),
        }
        reply = await self._json("POST", "/feed/leases", body, extra_seconds=wait_seconds)
        if reply is None:
            return None
        rollouts = tuple(LeasedRollout(**rollout) for rollout in reply["rollouts"])
        incomplete = tuple(IncompleteGroup.of_json(group) for group in reply["incomplete"])
        return Lease(reply["lease_id"], reply["consumer"], reply["expires_at"], rollouts, incomplete)

    async def rollout(self, session_id: str, snapshot: str, *, pick: str | None = None) -> FinishedRollout:
        """One finished rollout with its segments; raises NotFound, Conflict, IntegrityError.

        pick: which of its turns train, one of `picks()`; None leaves it to the gateway.
        """
        path = f"/feed/rollouts/{path_segment(session_id)}{_optional_query(snapshot=snapshot, pick=pick)}"
        body = await self._call("GET", path)
        return await asyncio.to_thread(decode_rollout, body)

    async def picks(self) -> tuple[str, ...]:
        """Names that `pick` of `rollout` may have at this gateway."""
        return tuple((await self._object("GET", "/feed/picks"))["picks"])

    async def acknowledge(self, lease_id: str) -> list[str]:
        """Mark a lease's rollouts as consumed; repeating it is fine."""
        reply = await self._object("POST", f"/feed/leases/{path_segment(lease_id)}/ack")
        return list(reply["session_ids"])

    async def release(self, lease_id: str) -> None:
        """Give a lease back at once."""
        await self._json("POST", f"/feed/leases/{path_segment(lease_id)}/release")

    async def release_consumer(self, consumer: str) -> int:
        """Give back all that this consumer holds; returns how many rollouts."""
        reply = await self._object("POST", f"/feed/consumers/{path_segment(consumer)}/release")
        return int(reply["released"])

    async def drop(self, session_id: str, snapshot: str) -> None:
        """Free a rollout's data at the gateway."""
        await self._json("DELETE", f"/feed/rollouts/{path_segment(session_id)}?{_query([('snapshot', snapshot)])}")

    async def counts(self, consumer: str) -> FeedCounts:
        """Back-pressure figures."""
        return FeedCounts(**await self._object("GET", f"/feed/counts?{_query([('consumer', consumer)])}"))

    # ---- operation ----

    async def engines(self) -> list[dict[str, Any]]:
        """The engines that the gateway uses."""
        reply = await self._object("GET", "/admin/engines")
        return list(reply["engines"])

    async def pause(self, mode: str, *, max_seconds: float | None = None) -> None:
        """Pause generation on every engine; `mode` is abort, keep, retract or drain.

        max_seconds: after which it goes on by itself, None never.
        """
        await self._json("POST", "/admin/generation/pause", {"mode": mode, "max_seconds": max_seconds})

    async def generation(self) -> dict[str, Any]:
        """Whether generation is paused, how, since when, and what each engine says of it."""
        return await self._object("GET", "/admin/generation")

    async def resume(self) -> None:
        """Let generation go on."""
        await self._json("POST", "/admin/generation/resume")

    async def set_policy(self, policy_version: int, weight_version: str) -> None:
        """Tell the gateway that the engines' label `weight_version` means `policy_version`."""
        await self._json("POST", "/admin/policy", {"policy_version": policy_version, "weight_version": weight_version})

    async def health(self) -> dict[str, Any]:
        """The gateway's own health reply."""
        return await self._object("GET", "/health")

    # ---- HTTP ----

    async def _object(self, method: str, path: str, body: JsonValue = None) -> dict[str, Any]:
        reply = await self._json(method, path, body)
        if not isinstance(reply, dict):
            raise LedgerError(f"{method} {path}: the gateway at {self.base_url} answered no JSON object")
        return reply

    async def _json(self, method: str, path: str, body: JsonValue = None, *, extra_seconds: float = 0.0) -> Any:
        content = await self._call(method, path, body, extra_seconds=extra_seconds)
        try:
            return json.loads(content) if content else None
        except ValueError as error:
            raise LedgerError(f"{method} {path}: {self.base_url} answered no JSON; is it a gateway?") from error

    async def _call(self, method: str, path: str, body: JsonValue = None, *, extra_seconds: float = 0.0) -> bytes:
        if self._http is None:
            raise LedgerError("the gateway client is not open; use it with `async with`")
        timeout = aiohttp.ClientTimeout(total=self._timeout_seconds + extra_seconds)
        url = URL(self.base_url + path, encoded=True)  # as we encoded it: ids keep their %2F
        try:
            async with self._http.request(method, url, json=body, timeout=timeout) as response:
                content = await response.read()
        except TimeoutError as error:
            raise LedgerError(f"{method} {path}: no answer from the gateway at {self.base_url} in time") from error
        except aiohttp.ClientError as error:
            raise LedgerError(f"cannot reach the gateway at {self.base_url}: {error}") from error
        if response.status >= 400:
            raise error_of_reply(response.status, content, where=f"{method} {path}")
        return content


def path_segment(text: str) -> str:
    """An id as one segment of a URL path: everything reserved is percent-encoded, dots of "." and ".." too."""
    encoded = quote(text, safe="")
    return encoded.replace(".", "%2E") if set(text) == {"."} else encoded


def error_of_reply(status: int, body: bytes, *, where: str) -> VerbatimError:
    """The error that a reply of the gateway stands for, found by `error.code`, else by its status."""
    reply = _json_or_none(body)
    details = reply.get("error") if isinstance(reply, dict) else None
    if isinstance(details, dict) and isinstance(details.get("message"), str):
        kind = _ERRORS.get(str(details.get("code"))) or _ERRORS.get(str(details.get("type")))
        if kind is not None:
            return kind(details["message"])
        message = f"{where}: {details['message']}"
    else:
        message = f"{where}: HTTP {status} {body[:200].decode(errors='replace')}"
    return InvalidRequest(message) if 400 <= status < 500 else LedgerError(message)


def _json_or_none(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None  # a proxy's page, say; the caller shows its text


def _query(items: Sequence[tuple[str, str]]) -> str:
    return "&".join(f"{name}={quote(value, safe='')}" for name, value in items)


def _optional_query(**values: str | None) -> str:
    given = [(name, value) for name, value in values.items() if value is not None]
    return f"?{_query(given)}" if given else ""


def _errors_by_code(kind: type[VerbatimError]) -> dict[str, type[VerbatimError]]:
    found = {kind.code: kind}
    for child in kind.__subclasses__():
        found = _errors_by_code(child) | found  # the class that names a code, not one that inherits it
    return found


_ERRORS = _errors_by_code(VerbatimError) | {RequestError.code: InvalidRequest}

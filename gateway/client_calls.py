"""HTTP calls of a client that outlive a restart of the gateway, and its errors as the contracts' classes.

A call is tried again while nobody answers, the connection breaks, or the gateway asks for another try (`Retry-After`),
until its time is over. That is right for calls that may be repeated, and all of `gateway.client` may.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import aiohttp
from yarl import URL

from gateway.contracts.errors import Conflict, InvalidRequest, LedgerError, NotFound, RequestError, VerbatimError
from gateway.contracts.generation import JsonValue

_log = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.05, 2.0
_ASKS_FOR_ANOTHER_TRY = frozenset({408, 429, 503})
_OF_A_PROXY = frozenset({502, 503, 504})


class RepeatedCalls:
    """Calls of one gateway. timeout_seconds: of one try; retry_seconds: how long after the first failure the last try
    may begin."""

    def __init__(
        self, base_url: str, http: aiohttp.ClientSession, *, timeout_seconds: float, retry_seconds: float
    ) -> None:
        self._base_url = base_url
        self._http = http
        self._timeout_seconds = timeout_seconds
        self._retry_seconds = retry_seconds

    async def aclose(self) -> None:
        """Close its connections."""
        await self._http.close()

    async def value(
        self,
        method: str,
        path: str,
        body: JsonValue = None,
        *,
        extra_seconds: float = 0.0,
        headers: Mapping[str, str] | None = None,
        gone_after_retry: bool = False,
    ) -> Any:
        """The reply's value, None for an empty one. extra_seconds: what one try may take beside its timeout.

        gone_after_retry: NotFound, once a try has failed, says that its reply was lost and not its work.
        """
        try:
            content = await self.content(method, path, body, extra_seconds=extra_seconds, headers=headers)
        except GoneAfterRetry:
            if gone_after_retry:
                return None
            raise
        try:
            return json.loads(content) if content else None
        except ValueError as error:
            raise LedgerError(f"{method} {path}: {self._base_url} answered no JSON; is it a gateway?") from error

    async def content(
        self,
        method: str,
        path: str,
        body: JsonValue = None,
        *,
        extra_seconds: float = 0.0,
        headers: Mapping[str, str] | None = None,
        retry_seconds: float | None = None,
    ) -> bytearray:
        """The reply's body; raises the error that it stands for."""
        pauses = _Pauses(self._retry_seconds if retry_seconds is None else retry_seconds)
        while True:
            try:
                return await self._try(method, path, body, extra_seconds=extra_seconds, headers=headers or {})
            except _TryAgain as failure:
                pause = pauses.next(at_least=failure.after_seconds)
                if pause is None:
                    raise failure.error from failure
                if pauses.num_given == 1:
                    _log.info("%s; tried again for %g s", failure.error.message, pauses.retry_seconds)
                await asyncio.sleep(pause)
            except (NotFound, Conflict) as error:
                if not pauses.num_given:
                    raise
                kind = GoneAfterRetry if isinstance(error, NotFound) else ConflictAfterRetry
                raise kind(error.message) from error

    async def _try(
        self, method: str, path: str, body: JsonValue, *, extra_seconds: float, headers: Mapping[str, str]
    ) -> bytearray:
        timeout = aiohttp.ClientTimeout(total=self._timeout_seconds + extra_seconds)
        url = URL(self._base_url + path, encoded=True)  # as we encoded it: ids keep their %2F
        try:
            async with self._http.request(method, url, json=body, timeout=timeout, headers=headers) as response:
                content = await _read_once(response)
        except TimeoutError as error:
            late = LedgerError(f"{method} {path}: no answer from the gateway at {self._base_url} in time")
            raise _TryAgain(late) from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise _TryAgain(self._unreachable(error)) from error
        except aiohttp.ClientError as error:
            raise self._unreachable(error) from error
        if response.status < 400:
            return content
        failure = error_of_reply(response.status, content, where=f"{method} {path}")
        after_seconds = _seconds_to_wait(response.status, response.headers.get("Retry-After"), content)
        if after_seconds is not None:
            raise _TryAgain(failure, after_seconds)
        raise failure

    def _unreachable(self, error: aiohttp.ClientError) -> LedgerError:
        return LedgerError(f"cannot reach the gateway at {self._base_url}: {error}")


async def _read_once(response: aiohttp.ClientResponse) -> bytearray:
    """The body, written where it stays: joining its blocks would hold it twice, and rollouts are large."""
    body = bytearray(response.content_length or 0)
    filled = 0
    async for block in response.content.iter_any():
        body[filled : filled + len(block)] = block  # past the end it extends: a length that was not told, or zipped
        filled += len(block)
    del body[filled:]
    return body


class _TryAgain(Exception):
    """A try failed and another one may not; `error` is what the caller gets if there is no time for one."""

    def __init__(self, error: VerbatimError, after_seconds: float = 0.0) -> None:
        super().__init__(error.message)
        self.error = error
        self.after_seconds = after_seconds


class GoneAfterRetry(NotFound):
    """Not there at a later try: an earlier one, whose reply was lost, may have removed it."""


class ConflictAfterRetry(Conflict):
    """Refused at a later try: possibly for what an earlier one, whose reply was lost, has done."""


class _Pauses:
    """Between tries: longer and longer, each different from other clients', until `retry_seconds` have passed."""

    def __init__(self, retry_seconds: float) -> None:
        self.retry_seconds = retry_seconds
        self.num_given = 0
        self._deadline: float | None = None
        self._seconds = _FIRST_PAUSE_SECONDS

    def next(self, *, at_least: float) -> float | None:
        """Seconds to sleep before the next try; None when the time is over."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self.retry_seconds  # from the first failure: a long poll's wait is no failure
        pause = max(at_least, self._seconds * random.uniform(0.5, 1.0))
        self._seconds = min(self._seconds * 2, _LONGEST_PAUSE_SECONDS)
        if now + pause > self._deadline:
            return None
        self.num_given += 1
        return pause


def path_segment(text: str) -> str:
    """An id as one segment of a URL path: everything reserved is percent-encoded, dots of "." and ".." too."""
    encoded = quote(text, safe="")
    return encoded.replace(".", "%2E") if set(text) == {"."} else encoded


def query_string(items: Sequence[tuple[str, str | None]]) -> str:
    """`?a=b&…` of those that have a value, "" if none has."""
    given = "&".join(f"{name}={quote(value, safe='')}" for name, value in items if value is not None)
    return f"?{given}" if given else ""


def error_of_reply(status: int, body: bytes | bytearray, *, where: str) -> VerbatimError:
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


def _seconds_to_wait(status: int, retry_after: str | None, body: bytes | bytearray) -> float | None:
    """How long to wait before another try, None if none would help."""
    if status in _ASKS_FOR_ANOTHER_TRY and retry_after is not None and retry_after.strip().isdecimal():
        return float(retry_after)
    # A proxy before a gateway that restarts has no words of ours.
    return 0.0 if status in _OF_A_PROXY and _json_or_none(body) is None else None


def _json_or_none(body: bytes | bytearray) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None  # a proxy's page, say; the caller shows its text


def _errors_by_code(kind: type[VerbatimError]) -> dict[str, type[VerbatimError]]:
    found = {kind.code: kind}
    for child in kind.__subclasses__():
        found = _errors_by_code(child) | found  # the class that names a code, not one that inherits it
    return found


_ERRORS = _errors_by_code(VerbatimError) | {RequestError.code: InvalidRequest}

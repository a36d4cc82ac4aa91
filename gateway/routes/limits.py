"""What every request meets first: its id, the account of the body bytes that are held for requests under way, the names
that it may call us by, and the note that the audit gets of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.contracts.errors import Forbidden, InvalidRequest, TooManyRequests, VerbatimError
from gateway.contracts.fresh_ids import fresh_hex
from gateway.routes.access import HostCheck
from gateway.routes.audit import NOTE, AuditLog, AuditNote
from gateway.wire.errors import error_body
from gateway.wire.json_text import dump_json

FREE_BYTES = 2**20
"""Of each body, which is not counted."""

_ACCOUNT = "verbatim.body_account"
_READ_TIMEOUT = "verbatim.read_timeout_seconds"
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
_SAYS_WHO = (b"authorization", b"x-api-key", b"x-session-id")


class BodyBudget:
    """`limit_bytes` for the bodies of all requests under way; `FREE_BYTES` of each are free, so small ones get in."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0

    def change(self, num_bytes: int) -> None:
        """Hold more, or less; raises TooManyRequests and holds nothing more where there is no room."""
        if num_bytes > 0:
            self.check(num_bytes)
        self._held_bytes += num_bytes

    def check(self, num_bytes: int) -> None:
        """Raise TooManyRequests where there is no room for so much more."""
        if self._held_bytes + num_bytes > self._limit_bytes:
            held = f"{self._held_bytes} of {self._limit_bytes} bytes"
            raise TooManyRequests(f"the requests under way hold {held}; send this one again later")


class BodyAccount(msgspec.Struct, eq=False):
    """One request's share of the budget, held until `close`."""

    budget: BodyBudget
    held_bytes: int = 0

    def announce(self, num_bytes: int) -> None:
        """A body of this length begins; raises TooManyRequests if there is no room for it now."""
        self.budget.check(max(0, num_bytes - FREE_BYTES))

    def grow(self, num_bytes: int) -> None:
        """The body has reached this length; raises TooManyRequests."""
        held = max(0, num_bytes - FREE_BYTES)
        self.budget.change(held - self.held_bytes)
        self.held_bytes = held

    def close(self) -> None:
        """The request is answered."""
        self.budget.change(-self.held_bytes)
        self.held_bytes = 0


class RequestEdge:
    """ASGI middleware around everything: gives each request an id and an account for its body.

    The id is that of `X-Request-ID` where it is one, else a new one of fixed length; it is in every reply.
    hosts: None where every name is fine, on_refused hears `host` for one that is not; audit: None where it is off.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        budget: BodyBudget,
        read_timeout_seconds: float,
        hosts: HostCheck | None = None,
        on_refused: Callable[[str], None] = lambda _: None,
        audit: AuditLog | None = None,
    ) -> None:
        self._app = app
        self._budget = budget
        self._read_timeout_seconds = read_timeout_seconds
        self._hosts = hosts
        self._on_refused = on_refused
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on; what the body holds is given back when the request is answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id, note, account = _request_id(headers), AuditNote(), BodyAccount(self._budget)
        last = (b"x-request-id", request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                note.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), last]}
            await send(message)

        try:
            is_plain = self._hosts is not None and self._hosts.is_plainly_ours(scope, headers)
            if not is_plain and (refusal := self._refusal(scope, headers)) is not None:
                await _refuse(refusal, send_with_id)
                return
            # In place: a scope is made for one request, and copies of it would be kept while its turn is sampled.
            scope[_ACCOUNT], scope[_READ_TIMEOUT] = account, self._read_timeout_seconds
            scope[NOTE] = note
            del headers  # while a turn is sampled
            await self._app(scope, receive, send_with_id)
        finally:
            if account.held_bytes:
                account.close()
            if self._audit is not None:
                self._audit.record(scope, request_id, note)

    def _refusal(self, scope: Scope, headers: Mapping[bytes, bytes]) -> VerbatimError | None:
        if self._hosts is not None and (why := self._hosts.refusal(scope)):
            self._on_refused("host")
            return Forbidden(why)
        if len(headers) < len(scope["headers"]) and (name := _repeated(scope)) is not None:
            return InvalidRequest(f"{name}: was sent more than once; which one counts?")
        return None


def body_account(scope: Scope) -> BodyAccount:
    """The account of a request that came through a `RequestEdge`."""
    account: BodyAccount = scope[_ACCOUNT]
    return account


def read_timeout_seconds(scope: Scope) -> float:
    """How long the body of a request may take to come that came through a `RequestEdge`."""
    seconds: float = scope[_READ_TIMEOUT]
    return seconds


def _repeated(scope: Scope) -> str | None:
    """A header that says who calls or for which session, and was sent twice: what stands before us may read another of
    them than we do."""
    names = [name for name, _ in scope["headers"]]
    return next((name.decode() for name in _SAYS_WHO if names.count(name) > 1), None)


async def _refuse(error: VerbatimError, send: Send) -> None:
    body = dump_json(error_body(error))
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": error.http_status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _request_id(headers: Mapping[bytes, bytes]) -> bytes:
    sent = headers.get(b"x-request-id")
    if sent is not None and _REQUEST_ID.fullmatch(sent):
        return sent
    return b"req_" + fresh_hex(32).encode()

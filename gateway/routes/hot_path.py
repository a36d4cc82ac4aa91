"""The way of a model call into the gateway and out again, below the framework.

    socket ─▶ connections.py, exchange.py ─▶ limits.py RequestEdge ─▶ ModelCalls ─▶ chat.py … ─▶ turns.py ─▶ sessions
    socket ◀─ exchange.py ◀──────────────────────────── bodies.py JsonReply, FrameReply ◀─ wire's writer ◀─┘

FastAPI finds a route by trying all of them one after the other, inside of six layers of its own: some 300 µs a call,
and a turn as a whole may cost 250. So the calls that run turns are found by their path in one step. Their functions are
those of the FastAPI application: each is a `ModelRoute` of it, which is how they come into its document, and nothing is
written twice. Everything else passes on to the framework.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.requests import empty_receive, empty_send
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.contracts.errors import VerbatimError
from gateway.routes.errors import bug_reply, error_reply
from gateway.routes.exchange import exchange_of
from gateway.routes.paths import IN_SESSION, split_session

Answer = Callable[[Request], Awaitable[Response]]

CLIENT_GONE_STATUS = 499
"""In the audit, of a call whose client went; nobody gets it."""

_SESSION = "/sessions/{session_id}"


class ModelRoute(APIRoute):
    """A route that runs turns: `POST`, its path fixed but for the session."""


class ModelRequest(Request):
    """A request whose headers are looked up in a dict, and are text only where one is read."""

    headers: Mapping[str, str] = {}  # type: ignore[assignment]  # all that is used of Headers, by their lower-case names
    # As the framework sets them for each.
    _send = staticmethod(empty_send)
    _stream_consumed = False
    _is_disconnected = False
    _form = None

    def __init__(self, scope: Scope, receive: Receive = empty_receive) -> None:
        self.scope = scope
        self._receive = receive
        self.headers = _Headers(scope["headers"])


class _Headers(Mapping[str, str]):
    """Of one that was sent twice, the first counts."""

    def __init__(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        self._values = dict(reversed(pairs))

    def __getitem__(self, name: str) -> str:
        return self._values[name.encode("latin-1")].decode("latin-1")

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or `default`."""
        value = self._values.get(name.encode("latin-1"))
        return default if value is None else value.decode("latin-1")

    def __iter__(self) -> Iterator[str]:
        return (name.decode("latin-1") for name in self._values)

    def __len__(self) -> int:
        return len(self._values)


class ModelCalls:
    """ASGI application before the framework's: answers the calls of the `ModelRoute`s among `routes`, and passes on all
    others."""

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        answers = {route.path: route.endpoint for route in routes if isinstance(route, ModelRoute)}
        self._alone = {path: answer for path, answer in answers.items() if not path.startswith(_SESSION)}
        self._of_session = {path.removeprefix(_SESSION): answers[path] for path in answers.keys() - self._alone.keys()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        answer = self._answer_of(scope)
        if answer is None:
            await self._app(scope, receive, send)
            return
        try:
            request = ModelRequest(scope, receive)
            try:
                response = await answer(request)
            except VerbatimError as error:
                response = error_reply(request, error)
            await response(scope, receive, send)
        except asyncio.CancelledError:
            exchange = exchange_of(scope)
            if exchange is None or not exchange.excuse():
                raise
            if not exchange.response_started:
                await Response(status_code=CLIENT_GONE_STATUS)(scope, receive, send)
        except Exception as error:
            exchange = exchange_of(scope)
            if exchange is not None and not exchange.response_started:
                await bug_reply(error)(scope, receive, send)
            raise  # the server logs it

    def _answer_of(self, scope: Scope) -> Answer | None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return None
        found = split_session(scope)
        path = scope["path"] if found is None else found.rest
        answer = (self._alone if found is None else self._of_session).get(path)
        if answer is not None:
            scope[IN_SESSION] = path
            if found is not None:
                scope["path_params"] = {"session_id": found.session_id}
        return answer

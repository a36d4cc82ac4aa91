"""Session ids in paths may hold "/" and unicode: their segment stays percent-encoded until a route decodes it."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

_PREFIX = b"/sessions/"


class SessionPaths:
    """ASGI middleware: routes under `/sessions/` see the path as it was sent, so that `%2F` is no separator."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, with the raw path under `/sessions/`."""
        raw_path = scope.get("raw_path") or b""
        if scope["type"] == "http" and raw_path.startswith(_PREFIX) and raw_path.isascii():
            scope = {**scope, "path": raw_path.decode("ascii")}
        await self._app(scope, receive, send)
